"""The kernels that read a row of logits and write its gradient where the logits were. Names as in softmax.py.

Weights of rows are those of their terms in the loss; a row of weight 0 gets the gradient 0, whatever its value.
Gradients of one row, with q = softmax(z / tau) and [] 1 where it holds:

    cross-entropy        d / dz = softmax(z) - [v == gold]                       over all ids of the head
    a divergence         d / dz = (g - q G) / tau                                pointwise.py
    masses of events     d / dz = exp(z / tau - M(e)) slope(e) / tau             events._Masses, slope = d / dM
    scale and soft-cap   d / dx = d / dz * scale * (1 - (z / cap)^2)             heads.capped

A stride is that of rows.
"""

import triton
import triton.language as tl

from dskd_plugin.core.fused.softmax import LOWEST, joined, log_normaliser, log_sum, logits, to_product


# Called with parts of tensors: that these begin anywhere must not be another program each.
@triton.jit(do_not_specialize_on_alignment=["gold", "ce_weight"])
def cross_entropy(
    product,
    product_stride,
    out,
    out_stride,
    size,
    real,
    gold,
    nll,
    ce_weight,
    mass,
    mass_stride,
    slope,
    slope_stride,
    event_of,
    normaliser,
    CE: tl.constexpr,
    EVENTS: tl.constexpr,
    WRITE: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    SCALE: tl.constexpr,
    CAP: tl.constexpr,
    TILE: tl.constexpr,
    WIDE: tl.constexpr,
):
    """-log softmax(z)[gold] over all ids of the head (CE), and the gradient of it and of what events handed back.

    EVENTS: add exp(z / tau - normaliser - mass(e)) slope(e) / tau at the real ids, mass and normaliser those of
    `event_masses`, the mass less the normaliser. WRITE: write gradients at all.
    """
    place = tl.program_id(0)
    row = product + place.to(tl.int64) * product_stride
    if CE:
        whole = log_normaliser(row, size, SCALE, CAP, TILE, WIDE)
        answer = tl.load(gold + place)
        tl.store(nll + place, whole - logits(tl.load(row + answer).to(WIDE), SCALE, CAP))
    if WRITE:
        lanes = tl.arange(0, TILE)
        if CE:
            share = tl.load(ce_weight + place).to(WIDE)
        if EVENTS:
            all_ids = tl.load(normaliser + place)
        tl.debug_barrier()  # the gold id's logit has been read before it is written over
        for start in range(0, size, TILE):
            at = start + lanes
            there = at < size
            z = logits(tl.load(row + at, there, 0.0).to(WIDE), SCALE, CAP)
            gradient = tl.zeros((TILE,), WIDE)
            if CE:
                pull = tl.exp(z - whole) - tl.where(at == answer, 1.0, 0.0)
                gradient += tl.where(share != 0, share * pull, 0.0)
            if EVENTS:
                is_real = at < real
                event = tl.load(event_of + at, is_real, 0)
                handed = tl.load(slope + place.to(tl.int64) * slope_stride + event, is_real, 0.0)
                own = tl.load(mass + place.to(tl.int64) * mass_stride + event, is_real, 0.0)
                inside = tl.exp(z / TEMPERATURE - all_ids - own)
                gradient += tl.where(is_real & (handed != 0), inside * handed / TEMPERATURE, 0.0)
            tl.store(out + place.to(tl.int64) * out_stride + at, to_product(gradient, z, SCALE, CAP), there)


@triton.jit
def partners(partner_of, at, real, PAIRED: tl.constexpr):
    """Where the other side has these ids, and which of them have a place there. PAIRED: else at the same place."""
    takes = at < real
    partner = at
    if PAIRED:
        partner = tl.load(partner_of + at, takes, -1)
        takes = partner >= 0
    return partner, takes


@triton.jit
def of_events(event_of, of_row, at, takes):
    """The row's number for the event of each id."""
    return tl.load(of_row + tl.load(event_of + at, takes, 0), takes, 0.0)


@triton.jit
def compare(
    product,
    product_stride,
    out,
    out_stride,
    size,
    real,
    gold,
    nll,
    ce_weight,
    other,
    other_stride,
    partner_of,
    change,
    change_stride,
    event_of,
    distance,
    weight,
    CE: tl.constexpr,
    PAIRED: tl.constexpr,
    CHANGED: tl.constexpr,
    WRITE: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    KNOB: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    SCALE: tl.constexpr,
    CAP: tl.constexpr,
    OTHER_TEMPERATURE: tl.constexpr,
    OTHER_SCALE: tl.constexpr,
    OTHER_CAP: tl.constexpr,
    TILE: tl.constexpr,
    WIDE: tl.constexpr,
):
    """A divergence of softmax(z / tau) over the first `real` ids from another row, cross-entropy, and their gradient.

    other: z of the other side, read at the same ids and normalised over them. PAIRED: read at partner_of(v) instead;
    ids whose partner is -1 are left out on both sides. CHANGED: change(e) is added to the other side's log-probability
    of each id of an event, after it was normalised. out: may be `product`, and, unless PAIRED, `other`.
    """
    place = tl.program_id(0)
    row = product + place.to(tl.int64) * product_stride
    theirs = other + place.to(tl.int64) * other_stride
    of_row = change + place.to(tl.int64) * change_stride
    lanes = tl.arange(0, TILE)
    own_peak = tl.full((TILE,), LOWEST, WIDE)
    own_total = tl.zeros((TILE,), WIDE)
    other_peak = tl.full((TILE,), LOWEST, WIDE)
    other_total = tl.zeros((TILE,), WIDE)
    for start in range(0, real, TILE):
        at = start + lanes
        partner, takes = partners(partner_of, at, real, PAIRED)
        z = logits(tl.load(row + at, takes, 0.0).to(WIDE), SCALE, CAP) / TEMPERATURE
        t = logits(tl.load(theirs + partner, takes, 0.0).to(WIDE), OTHER_SCALE, OTHER_CAP) / OTHER_TEMPERATURE
        own_peak, own_total = joined(own_peak, own_total, tl.where(takes, z, float("-inf")))
        other_peak, other_total = joined(other_peak, other_total, tl.where(takes, t, float("-inf")))
    own_whole = log_sum(own_peak, own_total)
    other_whole = log_sum(other_peak, other_total)

    value = tl.zeros((TILE,), WIDE)
    slopes = tl.zeros((TILE,), WIDE)
    for start in range(0, real, TILE):
        at = start + lanes
        partner, takes = partners(partner_of, at, real, PAIRED)
        z = logits(tl.load(row + at, takes, 0.0).to(WIDE), SCALE, CAP) / TEMPERATURE
        t = logits(tl.load(theirs + partner, takes, 0.0).to(WIDE), OTHER_SCALE, OTHER_CAP) / OTHER_TEMPERATURE
        log_p = t - other_whole
        if CHANGED:
            log_p += of_events(event_of, of_row, at, takes)
        added, slope = DIVERGENCE(z - own_whole, log_p, KNOB)
        value += tl.where(takes, added, 0.0)
        slopes += tl.where(takes, slope, 0.0)
    tl.store(distance + place, tl.sum(value, 0))

    if CE:
        whole = log_normaliser(row, size, SCALE, CAP, TILE, WIDE)
        answer = tl.load(gold + place)
        tl.store(nll + place, whole - logits(tl.load(row + answer).to(WIDE), SCALE, CAP))
    if WRITE:
        slope_of_row = tl.sum(slopes, 0)
        share = tl.load(weight + place).to(WIDE) / TEMPERATURE
        if CE:
            ce_share = tl.load(ce_weight + place).to(WIDE)
        tl.debug_barrier()  # the gold id's logit has been read before it is written over
        for start in range(0, size, TILE):
            at = start + lanes
            there = at < size
            partner, takes = partners(partner_of, at, real, PAIRED)
            z = logits(tl.load(row + at, there, 0.0).to(WIDE), SCALE, CAP)
            t = logits(tl.load(theirs + partner, takes, 0.0).to(WIDE), OTHER_SCALE, OTHER_CAP) / OTHER_TEMPERATURE
            log_p = t - other_whole
            if CHANGED:
                log_p += of_events(event_of, of_row, at, takes)
            log_q = z / TEMPERATURE - own_whole
            added, slope = DIVERGENCE(log_q, log_p, KNOB)
            pull = share * (slope - tl.exp(log_q) * slope_of_row)
            gradient = tl.where(takes, tl.where(share != 0, pull, 0.0), 0.0)
            if CE:
                pull = tl.exp(z - whole) - tl.where(at == answer, 1.0, 0.0)
                gradient += tl.where(ce_share != 0, ce_share * pull, 0.0)
            tl.store(out + place.to(tl.int64) * out_stride + at, to_product(gradient, z, SCALE, CAP), there)
