"""Scores with 95 % intervals over questions, paired differences, and the sentence that says what they mean."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from dskd_eval import stats

from quickstart.measure import Answered


def bits(answered: Sequence[Answered]) -> list[tuple[float, float]]:
    """(bits of the gold answer, its bytes) per question: their sums make bits per byte."""
    return [(one.bits, float(one.bytes)) for one in answered]


def hits(answered: Sequence[Answered]) -> list[float]:
    return [float(one.right) for one in answered]


def score(answered: Sequence[Answered]) -> dict[str, Any]:
    """bits_per_byte and exact_match as value, low and high, the share of right answers by kind, all replies."""
    by_kind = {}
    for kind in sorted({one.kind for one in answered}):
        of_kind = [one.right for one in answered if one.kind == kind]
        by_kind[kind] = sum(of_kind) / len(of_kind)
    return {
        "bits_per_byte": _interval(bits(answered)),
        "exact_match": _interval(hits(answered)),
        "by_kind": by_kind,
        "answers": [asdict(one) for one in answered],
    }


def _interval(values: Sequence[Any]) -> dict[str, float]:
    found = stats.interval(values)
    low, high = (found.value if edge is None else edge for edge in (found.low, found.high))
    return {"value": found.value, "low": low, "high": high}


def difference(model: Sequence[Answered], baseline: Sequence[Answered]) -> dict[str, Any]:
    """`model` minus `baseline` on the same questions: bits_per_byte with low and high, and exact_match likewise.

    The intervals are a paired bootstrap over questions and a paired score interval. Fewer bits and more exact
    matches are better.
    """
    if [one.question for one in model] != [one.question for one in baseline]:
        raise ValueError("difference: expected the same questions in one order, got others. Measure both on one file.")
    of_bits = stats.compare(bits(baseline), bits(model))
    of_hits = stats.compare(hits(baseline), hits(model))
    # Where every question differs by the same number of bits, the bootstrap has no width.
    same = of_bits.difference
    return {
        "bits_per_byte": of_bits.difference,
        "low": same if of_bits.low is None else of_bits.low,
        "high": same if of_bits.high is None else of_bits.high,
        "exact_match": {"value": of_hits.difference, "low": of_hits.low, "high": of_hits.high},
    }


def outcome(found: dict[str, Any]) -> str:
    """better, worse or undecided, by the interval of the difference in bits per byte."""
    if found["high"] < 0:
        return "better"
    return "worse" if found["low"] > 0 else "undecided"


def sentence(found: dict[str, Any], rows: dict[str, int]) -> str:
    """What the differences of the distilled student mean, in one sentence, whatever they are."""
    sft = found["dskd_minus_best_sft"]
    size = f"{abs(sft['bits_per_byte']):.3f} bits per byte"
    versus_sft = {
        "better": f"needs {size} fewer than the best student trained on these gold answers alone",
        "worse": f"needs {size} more than the best student trained on these gold answers alone",
        "undecided": "cannot be told apart from the best student trained on these gold answers alone",
    }[outcome(sft)]
    versus_answers = {
        "better": "fewer than the student trained on the teacher's answers as plain text",
        "worse": "more than the student trained on the teacher's answers as plain text",
        "undecided": "no measurable difference to the student trained on the teacher's answers as plain text",
    }[outcome(found["dskd_minus_seqkd"])]
    matches = sft["exact_match"]
    certain = "" if matches["low"] > 0 or matches["high"] < 0 else ", which chance alone can explain"
    points = abs(matches["value"]) * 100
    more = "more" if matches["value"] > 0 else "fewer"
    return (
        f"With {rows['gold']} gold answers and {rows['prompts']} questions without any, the distilled student "
        f"{versus_sft} (95 % interval of the difference {sft['low']:+.3f} to {sft['high']:+.3f}) and {versus_answers}; "
        f"it answers {points:.1f} points {more} of the questions exactly right than the first{certain}."
    )


def more_labels(found: dict[str, Any], rows: dict[str, int]) -> str:
    """How the student with all gold answers compares, and why that contradicts nothing."""
    against = {
        "better": "is still behind the distilled one",
        "worse": "is better than the distilled one",
        "undecided": "cannot be told apart from the distilled one",
    }[outcome(found["dskd_minus_sft_all"])]
    times = rows["gold_all"] // rows["gold"]
    return (
        f"A student trained on {rows['gold_all']} gold answers, {times} times as many, {against}. "
        "That is no contradiction: neither the teacher nor the distilled student saw those further answers. "
        "Distillation is for the case in which they do not exist; where they do, train on them."
    )
