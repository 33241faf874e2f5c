"""Arithmetic, network and disk of a step, counted from the sizes of the matrix products.

A product of a weight costs 2 operations per token forward and 4 more backward. Every token counts as a response token,
which makes the heads an upper bound.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dskd_plugin.methods import method_of
from dskd_plugin.plan.facts import Facts
from dskd_plugin.plan.models import Counts, Student, Teacher


@dataclass(frozen=True)
class Work:
    """Of one optimizer step and one rank. flops: what -> operations; network: bytes sent; read: bytes of a cache read.

    checkpoint: bytes on disk, all ranks; cache_per_million: bytes of a teacher cache for a million response tokens.
    """

    flops: dict[str, float]
    network: int
    read: int
    checkpoint: int
    cache_per_million: int


def work_of(facts: Facts, student: Student, teachers: Sequence[Teacher], states: int) -> Work:
    """Count a step. teachers: in the recipe's order; states: bytes that the optimizer keeps, of all ranks."""
    counts = student.counts
    tokens = facts.rows * facts.tokens * facts.accumulation
    passes = 3 + facts.checkpointing
    if facts.adapter:
        passes -= 1  # no gradients of frozen weights
    flops = {
        "student": passes * _decoder(counts, tokens, facts.tokens),
        "student's head": 6.0 * counts.vocab * counts.width * tokens,
    }
    sent = 0
    trained = sum(size * number for size, number in counts.trained.items())
    if facts.ranks > 1:
        away = (facts.ranks - 1) / facts.ranks
        if facts.engine in ("ZeRO-3", "FSDP2"):
            # Weights put together forward and backward for each micro-batch, gradients added up once.
            sent = int(away * (2 * facts.accumulation * student.bytes + trained))
        else:
            sent = int(2 * away * trained)
    per_token = read = 0
    of_teachers: dict[str, float] = {}
    for one, teacher in zip(facts.each if teachers else [], teachers, strict=True):
        settings = one.settings
        products = 0.0 if settings.support is not None else 2.0
        projected = 4.0 if method_of(settings).compares == "spaces" else 0.0
        found = {"teacher's head": products * teacher.counts.vocab * teacher.counts.width * tokens}
        if projected:
            found["projected states through the student's head"] = projected * counts.vocab * counts.width * tokens
        if one.teacher_resident:
            found["teacher"] = _decoder(teacher.counts, tokens, facts.tokens)
        else:
            read += 2 * teacher.counts.width * tokens
        if of_teachers:
            # A further loss reads the student's head once more.
            found["student's head"] = 6.0 * counts.vocab * counts.width * tokens
        per_token += 2 * teacher.counts.width
        for name, size in found.items():
            of_teachers[name] = of_teachers.get(name, 0.0) + size
    for name, size in of_teachers.items():
        flops[name] = flops.get(name, 0.0) + size
    weights = trained if facts.adapter else student.bytes
    return Work(flops, sent, read, weights + states, per_token * 1_000_000)


def _decoder(counts: Counts, tokens: int, length: int) -> float:
    """Operations of a forward: products of weights, and causal attention over rows of so many tokens."""
    return 2.0 * counts.products * tokens + 2.0 * counts.depth * counts.width * length * tokens
