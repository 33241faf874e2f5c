"""Exact token alignment (ETA): tokens of two tokenizations that cover the same bytes of one text."""

from collections.abc import Sequence


def match_spans(
    student_starts: Sequence[int],
    student_ends: Sequence[int],
    teacher_starts: Sequence[int],
    teacher_ends: Sequence[int],
) -> list[tuple[int, int]]:
    """Pairs (i, j) with the same non-empty span: student [start_i, end_i) == teacher [start_j, end_j).

    Starts and ends are offsets into one text, the same unit on both sides. On each side the ends of non-empty
    spans rise strictly and spans do not overlap, as the tokens of a text do; gaps are allowed. A span with
    end <= start is empty: it covers nothing and is never paired.
    Returns the pairs in text order, each i and each j at most once; O(number of tokens).
    Source: exact token alignment of DSKD v2 (arXiv 2504.11426), on byte spans in place of its string walk.
    """
    if len(student_starts) != len(student_ends) or len(teacher_starts) != len(teacher_ends):
        raise ValueError(
            f"match_spans: expected as many starts as ends on each side, got student {len(student_starts)} "
            f"and {len(student_ends)}, teacher {len(teacher_starts)} and {len(teacher_ends)}. "
            "Give both per token."
        )
    teacher_at_end = {
        end: index for index, (start, end) in enumerate(zip(teacher_starts, teacher_ends, strict=True)) if end > start
    }
    pairs: list[tuple[int, int]] = []
    for i, (start, end) in enumerate(zip(student_starts, student_ends, strict=True)):
        j = teacher_at_end.get(end)
        if end > start and j is not None and teacher_starts[j] == start:
            pairs.append((i, j))
    return pairs


def match_starts(
    student_starts: Sequence[int],
    student_ends: Sequence[int],
    teacher_starts: Sequence[int],
    teacher_ends: Sequence[int],
) -> list[tuple[int, int]]:
    """Pairs (i, j) of non-empty spans that begin at the same byte, wherever they end; otherwise as match_spans.

    Before such a pair both models have read the same bytes, so that their next tokens speak of the same text.
    """
    teacher_at_start = {
        start: index for index, (start, end) in enumerate(zip(teacher_starts, teacher_ends, strict=True)) if end > start
    }
    spans = enumerate(zip(student_starts, student_ends, strict=True))
    return [(i, teacher_at_start[start]) for i, (start, end) in spans if end > start and start in teacher_at_start]


def match_covers(
    student_starts: Sequence[int],
    student_ends: Sequence[int],
    teacher_starts: Sequence[int],
    teacher_ends: Sequence[int],
) -> list[tuple[int, int, int]]:
    """(i, j, more): the spans of the teacher that cover span i without a gap are j to j + more; as match_spans.

    Span j holds the byte at which i begins. Spans of the student that are not covered whole are left out.
    """
    found: list[tuple[int, int, int]] = []
    j = 0
    for i, (start, end) in enumerate(zip(student_starts, student_ends, strict=True)):
        if end <= start:
            continue
        while j < len(teacher_ends) and teacher_ends[j] <= start:
            j += 1
        if j == len(teacher_ends) or teacher_starts[j] > start:
            continue
        last, covered = j, teacher_ends[j]
        while covered < end and last + 1 < len(teacher_ends):
            if not teacher_starts[last + 1] == covered < teacher_ends[last + 1]:
                break
            last, covered = last + 1, teacher_ends[last + 1]
        if covered >= end:
            found.append((i, j, last - j))
    return found
