"""Response tokens of one conversation in two tokenizations, aligned by the bytes they cover."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from dskd_plugin.errors import SettingError
from dskd_plugin.text.comparisons import first_difference
from dskd_plugin.text.matching import Overlay, match_texts, partners_of
from dskd_plugin.text.placed import Placed, matched
from dskd_plugin.text.responses import Response, all_but, answers, gaps, responses_of
from dskd_plugin.text.tokens import TokenTable
from dskd_plugin.text.turn_ends import Ends

# Raise it where the same rows would align in another way, or have other columns: prepared rows are made anew.
RULES = 12
Pairing = Literal["exact", "starts", "bytes", "position", "warped", "all"]
Span = tuple[int, int, int, int]
REACH = ("aligned_offset", "aligned_more")  # columns beside the pairs, see `placed.Placed`
_AROUND = 40  # bytes that are shown on either side of a place


@dataclass(frozen=True)
class Alignment:
    """Which response tokens of two sequences belong together.

    student_N, teacher_N: positions of the tokens themselves (targets, predicted one position before), pair by
        pair; with pairing "all", two lists of their own lengths. The student's rise strictly. Position 0 can
        occur where a sequence begins with its response; no row predicts it.
    student_tokens: response tokens of the student, paired or not.
    responses: responses of the student; unmatched_responses: those without a counterpart of the teacher's.
    spans: (student start, student stop, teacher start, teacher stop), half-open positions, see `align`.
    offsets_N, more_N: of each pair, see `placed.Placed`; none with pairing "all".
    """

    student_N: list[int]
    teacher_N: list[int]
    student_tokens: int
    responses: int
    unmatched_responses: int
    spans: list[Span]
    offsets_N: list[int]
    more_N: list[int]


@dataclass(frozen=True)
class Aligner:
    """How the rows of one run are aligned: the rules of `align` with the two tokenizers. whole: no row was cut."""

    student: TokenTable
    teacher: TokenTable
    pairing: Pairing = "exact"
    identity: bool = False
    spans: bool = False
    student_end: int | None = None
    teacher_end: int | None = None
    whole: bool = False
    rules: int = RULES

    def columns(
        self,
        student_ids: Sequence[int],
        student_response: Sequence[bool],
        teacher_ids: Sequence[int],
        teacher_response: Sequence[bool],
    ) -> dict[str, Any]:
        """Columns of a training row: aligned_student, aligned_teacher, with pairing "bytes" aligned_offset and
        aligned_more, spans (flat, if on), unmatched_responses.

        What a template puts between an answer and its end of turn, see `gaps`, is left out.
        """
        ours = all_but(gaps(student_ids, student_response, self.student, self.student_end), len(student_ids))
        theirs = all_but(gaps(teacher_ids, teacher_response, self.teacher, self.teacher_end), len(teacher_ids))
        found = align(
            _at(ours, student_ids),
            _at(ours, student_response),
            _at(theirs, teacher_ids),
            _at(theirs, teacher_response),
            self.student,
            self.teacher,
            identity=self.identity,
            student_end=self.student_end,
            teacher_end=self.teacher_end,
            whole=self.whole,
            pairing=self.pairing,
            with_spans=self.spans,
        )
        flat = [
            position
            for a, b, c, d in found.spans
            for position in (ours[a], ours[b - 1] + 1, theirs[c], theirs[d - 1] + 1)
        ]
        return {
            "aligned_student": [ours[k] for k in found.student_N],
            "aligned_teacher": [theirs[k] for k in found.teacher_N],
            **(dict(zip(REACH, (found.offsets_N, found.more_N), strict=True)) if self.pairing == "bytes" else {}),
            **({"spans": flat} if self.spans else {}),
            "unmatched_responses": found.unmatched_responses,
        }

    def parted(
        self,
        student_ids: Sequence[int],
        student_response: Sequence[bool],
        teacher_ids: Sequence[int],
        teacher_response: Sequence[bool],
    ) -> str:
        """The first two answers of different texts, from where they part; "" where no two differ."""
        sides = (
            (student_ids, student_response, self.student, self.student_end),
            (teacher_ids, teacher_response, self.teacher, self.teacher_end),
        )
        ours, theirs = (
            responses_of(ids, answers(ids, response, table, end), table, end, whole=self.whole)
            for ids, response, table, end in sides
        )
        if len(ours) != len(theirs):
            numbers = f"{len(ours)} responses of the student, {len(theirs)} of the teacher"
            firsts = [
                _excerpt(side[0].read(side[0].readings[0], ()).text, 0) if side else "none" for side in (ours, theirs)
            ]
            return "{}; the first of them: student {}, teacher {}".format(numbers, *firsts)
        for one, other in zip(ours, theirs, strict=True):
            if match_texts(one, other) is None:
                texts = one.read(one.readings[0], ()), other.read(other.readings[0], ())
                at = first_difference(*texts)
                shown = (_excerpt(text.text, place) for text, place in zip(texts, at, strict=True))
                return "student {}, teacher {}".format(*shown)
        return ""


def align(
    student_ids: Sequence[int],
    student_response: Sequence[bool],
    teacher_ids: Sequence[int],
    teacher_response: Sequence[bool],
    student: TokenTable,
    teacher: TokenTable,
    *,
    identity: bool = False,
    student_end: int | None = None,
    teacher_end: int | None = None,
    whole: bool = False,
    pairing: Pairing = "exact",
    with_spans: bool = False,
) -> Alignment:
    """Alignment of the responses of two sequences: maximal runs of response tokens.

    The k-th response of one side goes with the k-th of the other; where their numbers differ, responses of
    equal text go together, in order. An end of sequence behind the end of turn, as a run of its own, belongs to the
    response before it and pairs with that of the other side alone.

    pairing "exact": within two responses of one text, tokens pair iff they cover the same
    bytes of it, and the two end-of-turn tokens pair by role: student_end and teacher_end (see `end_of_turn`),
    else the last special token after which only white space follows. What follows the end of turn is no text.
    Two tokens of the same bytes do not pair where a space comes before their word on one side alone, or on one in the
    token and on the other before it: the dummy prefix of a text. What one model says there of words without a space,
    the other says of words with one, which are other ids.
    Texts may differ by white space, wherever it is, by what a template puts before or after one of them, by
    truncation of one, by dummy spaces (before a text, or after each added token), and by what the tokenizers do to
    text (NFC, NFKC, lower-casing, white space); then a token pairs only where its ends are known. White space that
    differs costs the tokens that it touches. Any other difference leaves the response without pairs.
    White space alone pairs only where both have the same of it; an answer that was cut short, only with the start of
    the other, or, if it is long, with the one place where the other has it. Without an end of turn at the end of its
    row an answer was cut short, unless the rows are whole.
    pairing "starts": as "exact", but two tokens pair iff they begin at the same byte, wherever they end.
    pairing "bytes": as "exact", but each token of the student pairs with the one of the teacher in which it begins, at
    its start or inside it, see `placed.matched`.
    pairing "position": the k-th token of a response with the k-th of the other, as far as both go.
    pairing "warped": see `warp`, on the bytes of the two texts; the end-of-turn tokens pair by role.
    pairing "all": every token of two responses of one text (in the sense of "exact").
    identity: the tokenizers are one; responses with equal ids pair token by token.
    with_spans: also find the smallest spans of text tokens that begin and end at a byte boundary of both sides and are
    not one token on each that pair, where the bytes of every token within are certain. A dummy prefix that is a token
    of its own belongs to the span that it begins.
    Source: ETA of DSKD v2 (arXiv 2504.11426), on bytes, per response; position: ULD (arXiv 2402.12030); spans:
    approximate likelihood matching (arXiv 2503.20083).
    """
    for side, ids, response in (
        ("student", student_ids, student_response),
        ("teacher", teacher_ids, teacher_response),
    ):
        if len(ids) != len(response):
            raise SettingError(
                f"{side} response mask",
                f"one value per token ({len(ids)})",
                len(response),
                "Give the mask of these ids.",
            )
    ours = responses_of(student_ids, student_response, student, student_end, whole=whole)
    theirs = responses_of(teacher_ids, teacher_response, teacher, teacher_end, whole=whole)
    student_N: list[int] = []
    teacher_N: list[int] = []
    rows: list[Placed] = []
    spans: list[Span] = []
    unmatched = len(ours)
    for one, other in partners_of(ours, theirs):
        same = identity and one.ids == other.ids
        by_text = with_spans or pairing not in ("position", "warped")
        common = match_texts(one, other) if by_text and not same else None
        first, start = one.run.start, other.run.start
        found: list[Placed] = []
        if pairing == "position":
            found = list(map(Placed, one.run, other.run))
        elif pairing == "warped":
            found = _warped(one, other)
        elif same:
            found = list(map(Placed, one.run, other.run))
        elif common is None:
            continue
        elif pairing != "all":
            sides = _before_words(one, common, 0), _before_words(other, common, 1)
            here = matched(one, other, common, sides, pairing)
            found = [row._replace(student=first + row.student, teacher=start + row.teacher) for row in here]
            found += _ends(one, other, common.ends)
        unmatched -= 1
        closing = list(zip(one.closing, other.closing, strict=False))  # one side may have none
        if pairing == "all":
            student_N.extend([*one.run, *(a for a, _ in closing)])
            teacher_N.extend([*other.run, *(b for _, b in closing)])
        else:
            rows += [*found, *(Placed(a, b) for a, b in closing)]
        if with_spans and common is not None:
            spans.extend((a + first, b + first, c + start, d + start) for a, b, c, d in _spans(one, other, common))
    student_N += [row.student for row in rows]
    teacher_N += [row.teacher for row in rows]
    reach = [row.offset for row in rows], [row.more for row in rows]
    return Alignment(student_N, teacher_N, sum(map(bool, student_response)), len(ours), unmatched, spans, *reach)


def warp(student: Sequence[bytes], teacher: Sequence[bytes]) -> list[int]:
    """Index of the teacher token of each student token, by dynamic time warping of the two token sequences.

    The path runs from the first cell to the last by steps of one token on either side or both and has the least sum
    of costs; cost of a cell: Levenshtein distance of the two tokens / length of the longer, 0 where both are empty.
    Of equally good paths, followed from the end, one that steps on both sides, then on the student's. Each student
    token gets the cell of least cost in its row of the path, the first of equals. Empty if either side is.
    O(n m) time, n m bytes. Source: minimum edit distance alignment (arXiv 2401.10491).
    """
    from rapidfuzz.distance import Levenshtein
    from rapidfuzz.process import cdist

    rows, columns = len(student), len(teacher)
    if not rows or not columns:
        return []
    words, others = list(dict.fromkeys(student)), list(dict.fromkeys(teacher))
    table = cdist(words, others, scorer=Levenshtein.normalized_distance, dtype=np.float64)
    row_of = {text: k for k, text in enumerate(words)}
    column_of = {text: k for k, text in enumerate(others)}
    word, other = np.array([row_of[text] for text in student]), np.array([column_of[text] for text in teacher])
    steps = np.zeros((rows, columns), dtype=np.uint8)  # 0: from both, 1: from the student token before, 2: teacher
    # Costs of the last two antidiagonals by student index, shifted by one.
    before, last = np.full(rows + 1, np.inf), np.full(rows + 1, np.inf)
    before[0] = 0.0
    for diagonal in range(rows + columns - 1):
        low, high = max(0, diagonal - columns + 1), min(rows, diagonal + 1)
        i = np.arange(low, high)
        ways = np.stack([before[low:high], last[low:high], last[low + 1 : high + 1]])
        way = ways.argmin(0)
        steps[i, diagonal - i] = way
        now = np.full(rows + 1, np.inf)
        now[low + 1 : high + 1] = table[word[i], other[diagonal - i]] + ways[way, np.arange(len(i))]
        before, last = last, now
    best = [(np.inf, 0)] * rows
    a, b = rows - 1, columns - 1
    while a >= 0 and b >= 0:
        best[a] = min(best[a], (float(table[word[a], other[b]]), b))
        step = steps[a, b]
        a, b = a - int(step != 2), b - int(step != 1)
    return [b for _, b in best]


def _at(places: Sequence[int], values: Sequence[Any]) -> Sequence[Any]:
    """The values at these places, in order; all of them without a copy."""
    return values if len(places) == len(values) else [values[k] for k in places]


def _excerpt(text: bytes, at: int) -> str:
    """A text around a place, in quotes."""
    start, stop = max(0, at - _AROUND), at + _AROUND
    shown = text[start:stop].decode(errors="ignore")
    return f"{'…' if start else ''}{shown!r}{'…' if stop < len(text) else ''}"


def _ends(one: Response, other: Response, ends: Ends) -> list[Placed]:
    return [] if ends[0] is None or ends[1] is None else [Placed(one.run[ends[0]], other.run[ends[1]])]


def _warped(one: Response, other: Response) -> list[Placed]:
    texts = [[side.literal(k) for k in range(len(side.ids[: side.end]))] for side in (one, other)]
    found = [Placed(one.run[i], other.run[j]) for i, j in enumerate(warp(*texts))]
    return found + _ends(one, other, (one.end, other.end))


def _before_words(response: Response, spans: Overlay, side: int) -> bytes:
    """For each token where the space before its word is: tokens with other values do not stand at the same place.

    A padded token spells one space more than it covers: of white space alone, only that tells the two apart.
    """
    found = bytearray(response.spaces.tobytes())
    for index in spans.padded[side]:
        found[index] += 3
    return bytes(found)


def _spans(one: Response, other: Response, spans: Overlay) -> Iterator[Span]:
    """Half-open index ranges of the spans of two responses."""
    mine, yours = _before_words(one, spans, 0), _before_words(other, spans, 1)
    sides = []
    student_starts, student_ends, teacher_starts, teacher_ends = spans.offsets
    for response, starts, ends in ((one, student_starts, student_ends), (other, teacher_starts, teacher_ends)):
        known = [response.table.bytes[token] is not None for token in response.ids]
        sides.append([(s, e) if sure else (0, 0) for s, e, sure in zip(starts, ends, known, strict=False)])
    ours, theirs = sides
    begin = {start: j for j, (start, end) in enumerate(theirs) if end > start}
    i = 0
    while i < len(ours):
        start, end = ours[i]
        first = begin.get(start) if end > start else None
        if first is None:
            i += 1
            continue
        stops, at = [i + 1, first + 1], [end, theirs[first][1]]
        while at[0] != at[1]:
            side = int(at[1] < at[0])
            tokens = sides[side]
            if stops[side] == len(tokens) or not tokens[stops[side]][0] == at[side] < tokens[stops[side]][1]:
                break
            at[side] = tokens[stops[side]][1]
            stops[side] += 1
        else:
            apart = mine[i] != yours[first]
            if apart or stops != [i + 1, first + 1]:
                lead, other_lead = (
                    int(apart and k - 1 in padded and places[k - 1] == (0, 0))
                    for places, padded, k in ((ours, spans.padded[0], i), (theirs, spans.padded[1], first))
                )
                yield i - lead, stops[0], first - other_lead, stops[1]
            i = stops[0]
            continue
        i += 1
