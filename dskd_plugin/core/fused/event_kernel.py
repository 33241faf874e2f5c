"""The kernel that adds ids up to events. Names as in softmax.py."""

import triton
import triton.language as tl

from dskd_plugin.core.fused.softmax import LOWEST, joined, log_sum, logits


@triton.jit
def segments_joined(event, peak, total, next_event, next_peak, next_total):
    """What `associative_scan` adds up: log-sums within an event, begun anew at the next."""
    same = event == next_event
    higher = tl.maximum(peak, next_peak)
    both = total * tl.exp(peak - higher) + next_total * tl.exp(next_peak - higher)
    return next_event, tl.where(same, higher, next_peak), tl.where(same, both, next_total)


@triton.jit
def event_masses(
    product,
    product_stride,
    ids,
    events,
    number,
    mass,
    mass_stride,
    normaliser,
    likeliest,
    TEMPERATURE: tl.constexpr,
    SCALE: tl.constexpr,
    CAP: tl.constexpr,
    TILE: tl.constexpr,
    WIDE: tl.constexpr,
):
    """log sum exp(z / tau) of each event and of all ids, and the event of the likeliest id, of several the first.

    ids, events: `number` ids sorted by event. An event without any keeps what stands in its mass.
    """
    place = tl.program_id(0)
    row = product + place.to(tl.int64) * product_stride
    masses = mass + place.to(tl.int64) * mass_stride
    lanes = tl.arange(0, TILE)
    last_lane = lanes == TILE - 1
    row_peak = tl.full((TILE,), LOWEST, WIDE)
    row_total = tl.zeros((TILE,), WIDE)
    best = tl.full((), LOWEST, WIDE)
    best_event = tl.full((), 0, tl.int32)
    # The event that the tile before broke off in.
    open_event = tl.full((), -1, tl.int32)
    open_peak = tl.full((), LOWEST, WIDE)
    open_total = tl.full((), 0.0, WIDE)
    for start in range(0, number, TILE):
        at = start + lanes
        there = at < number
        event = tl.load(events + at, there, -1)
        following = tl.load(events + at + 1, at + 1 < number, -1)
        x = tl.load(row + tl.load(ids + at, there, 0), there, 0.0).to(WIDE)
        z = tl.where(there, logits(x, SCALE, CAP) / TEMPERATURE, LOWEST)
        one = tl.where(there, 1.0, 0.0).to(WIDE)
        row_peak, row_total = joined(row_peak, row_total, tl.where(there, z, float("-inf")))
        highest = tl.max(z, 0)
        first = tl.min(tl.where(there & (z == highest), event, 2147483647), 0)
        best_event = tl.where(highest > best, first, best_event)
        best = tl.maximum(highest, best)
        goes_on = (lanes == 0) & (event == open_event)
        higher = tl.maximum(z, open_peak)
        both = one * tl.exp(z - higher) + open_total * tl.exp(open_peak - higher)
        peak, total = tl.where(goes_on, higher, z), tl.where(goes_on, both, one)
        event, peak, total = tl.associative_scan((event, peak, total), 0, segments_joined)
        tl.store(masses + event, peak + tl.log(total), there & (event != following))
        open_event = tl.max(tl.where(last_lane, event, -1), 0)
        open_peak = tl.sum(tl.where(last_lane, peak, 0.0), 0)
        open_total = tl.sum(tl.where(last_lane, total, 0.0), 0)
    tl.store(normaliser + place, log_sum(row_peak, row_total))
    tl.store(likeliest + place, best_event)
