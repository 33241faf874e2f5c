"""Response tokens of one conversation in two tokenizations, aligned by the bytes they cover."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise, product
from typing import Any, Literal, NamedTuple

import numpy as np

from dskd_plugin.core.spans import match_spans, match_starts
from dskd_plugin.errors import SettingError
from dskd_plugin.text.regions import Common, Text, beginning, contained, first_difference, same, same_ink
from dskd_plugin.text.tokens import Canonical, TokenTable, canonical

PROBE = [{"role": "user", "content": "Zulu?"}, {"role": "assistant", "content": "Quebec"}]

RULES = 8  # raise it where the same rows would align in another way, so that no prepared rows are reused

Pairing = Literal["exact", "starts", "position", "warped", "all"]
Span = tuple[int, int, int, int]
Ends = tuple[int | None, int | None]  # end-of-turn ids of student and teacher, see `end_of_turn`
_AROUND = 40  # bytes that are shown on either side of a place
_LONGEST_GAP = 3  # where Axolotl still finds an end of turn after its answer


@dataclass(frozen=True)
class Alignment:
    """Which response tokens of two sequences belong together.

    student_N, teacher_N: positions of the tokens themselves (targets, predicted one position before), pair by
        pair; with pairing "all", two lists of their own lengths. The student's rise strictly. Position 0 can
        occur where a sequence begins with its response; no row predicts it.
    student_tokens: response tokens of the student, paired or not.
    segments: responses of the student; unmatched_segments: those without a counterpart of the teacher's.
    spans: (student start, student stop, teacher start, teacher stop), half-open positions, see `align`.
    """

    student_N: list[int]
    teacher_N: list[int]
    student_tokens: int
    segments: int
    unmatched_segments: int
    spans: list[Span]


@dataclass(frozen=True)
class Aligner:
    """How the rows of one run are aligned: the rules of `align` with the two tokenizers."""

    student: TokenTable
    teacher: TokenTable
    pairing: Pairing = "exact"
    identity: bool = False
    spans: bool = False
    student_end: int | None = None
    teacher_end: int | None = None
    rules: int = RULES

    def columns(
        self,
        student_ids: Sequence[int],
        student_response: Sequence[bool],
        teacher_ids: Sequence[int],
        teacher_response: Sequence[bool],
    ) -> dict[str, Any]:
        """Columns of a training row: aligned_student, aligned_teacher, spans (flat, if on), unmatched_segments.

        What a template puts between an answer and its end of turn, see `gaps`, is left out.
        """
        ours = _without(gaps(student_ids, student_response, self.student, self.student_end), len(student_ids))
        theirs = _without(gaps(teacher_ids, teacher_response, self.teacher, self.teacher_end), len(teacher_ids))
        found = align(
            [student_ids[k] for k in ours],
            [student_response[k] for k in ours],
            [teacher_ids[k] for k in theirs],
            [teacher_response[k] for k in theirs],
            self.student,
            self.teacher,
            identity=self.identity,
            student_end=self.student_end,
            teacher_end=self.teacher_end,
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
            **({"spans": flat} if self.spans else {}),
            "unmatched_segments": found.unmatched_segments,
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
            [_Segment(ids, run, table, end) for run in _runs(answers(ids, response, table, end))]
            for ids, response, table, end in sides
        )
        if len(ours) != len(theirs):
            numbers = f"{len(ours)} responses of the student, {len(theirs)} of the teacher"
            firsts = [
                _excerpt(side[0].read(side[0].readings[0], ()).text, 0) if side else "none" for side in (ours, theirs)
            ]
            return "{}; the first of them: student {}, teacher {}".format(numbers, *firsts)
        for one, other in zip(ours, theirs, strict=True):
            if _match(one, other) is None:
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
    pairing: Pairing = "exact",
    with_spans: bool = False,
) -> Alignment:
    """Alignment of the response segments (maximal runs of response tokens) of two sequences.

    The k-th segment of one side goes with the k-th of the other; where their numbers differ, segments of
    equal text go together, in order.

    pairing "exact": within two segments of one text, tokens pair iff they cover the same
    bytes of it, and the two end-of-turn tokens pair by role: student_end and teacher_end (see `end_of_turn`),
    else the last special token after which only white space follows. What follows the end of turn is no text.
    Two tokens of the same bytes do not pair where a space comes before their word on one side alone, or on one in the
    token and on the other before it: the dummy prefix of a text. What one model says there of words without a space,
    the other says of words with one, which are other ids.
    Texts may differ by white space, wherever it is, by what a template puts before or after one of them, by
    truncation of one, by dummy spaces (before a text, or after each added token), and by what the tokenizers do to
    text (NFC, NFKC, lower-casing, white space); then a token pairs only where its ends are known. White space that
    differs costs the tokens that it touches. Any other difference leaves the segment without pairs.
    White space alone pairs only where both have the same of it; an answer that was cut short, only with the start of
    the other, or, if it is long, with the one place where the other has it.
    pairing "starts": as "exact", but two tokens pair iff they begin at the same byte, wherever they end.
    pairing "position": the k-th token of a segment with the k-th of the other, as far as both go.
    pairing "warped": see `warp`, on the bytes of the two texts; the end-of-turn tokens pair by role.
    pairing "all": every token of two segments of one text (in the sense of "exact").
    identity: the tokenizers are one; segments with equal ids pair token by token.
    with_spans: also find the smallest spans of text tokens that begin and end at a byte boundary of both sides and are
    not one token on each that pair, where the bytes of every token within are certain. A dummy prefix that is a token
    of its own belongs to the span that it begins.
    Source: ETA of DSKD v2 (arXiv 2504.11426), on bytes, per segment; position: ULD (arXiv 2402.12030); spans:
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
    ours = [_Segment(student_ids, run, student, student_end) for run in _runs(student_response)]
    theirs = [_Segment(teacher_ids, run, teacher, teacher_end) for run in _runs(teacher_response)]
    student_N: list[int] = []
    teacher_N: list[int] = []
    spans: list[Span] = []
    unmatched = len(ours)
    for one, other in _partners(ours, theirs):
        same = identity and one.ids == other.ids
        common = _match(one, other) if not same and (with_spans or pairing in ("exact", "starts", "all")) else None
        found: list[tuple[int, int]] = []
        if pairing == "position":
            found = list(zip(one.run, other.run, strict=False))
        elif pairing == "warped":
            found = _warped(one, other)
        elif same:
            found = list(zip(one.run, other.run, strict=True))
        elif common is None:
            continue
        elif pairing in ("exact", "starts"):
            match = match_spans if pairing == "exact" else match_starts
            matched = match(*common.offsets)
            found = [(one.run[i], other.run[j]) for i, j in matched if not _apart(one, other, common, i, j)]
            found += _ends(one, other, common.ends)
        unmatched -= 1
        if pairing == "all":
            student_N.extend(one.run)
            teacher_N.extend(other.run)
        else:
            student_N.extend(i for i, _ in found)
            teacher_N.extend(j for _, j in found)
        if with_spans and common is not None:
            first, start = one.run.start, other.run.start
            spans.extend((a + first, b + first, c + start, d + start) for a, b, c, d in _spans(one, other, common))
    return Alignment(student_N, teacher_N, sum(map(bool, student_response)), len(ours), unmatched, spans)


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
    word, other = (
        np.array([number[text] for text in side])
        for side, number in (
            (student, {text: k for k, text in enumerate(words)}),
            (teacher, {text: k for k, text in enumerate(others)}),
        )
    )
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


def end_of_turn(
    tokenizer: Any, chat_template: str | None, table: TokenTable, options: Mapping[str, Any] | None = None
) -> int | None:
    """Id of the token that ends an assistant turn: the first special, else added, token after its text.

    A short conversation is rendered with chat_template, given options as its variables. Without a template, or where
    no such token follows, it is the end-of-sequence token.
    """
    eos = getattr(tokenizer, "eos_token_id", None)
    if chat_template is None:
        return eos
    try:
        text = tokenizer.apply_chat_template(PROBE, chat_template=chat_template, tokenize=False, **(options or {}))
    except Exception as error:
        raise SettingError(
            "chat template",
            "one that renders a user and an assistant message",
            f"{error!r}",
            "Choose another chat template.",
        ) from error
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    answer = PROBE[1]["content"].encode()
    spelled = [table.literal[i] or b"" for i in ids]
    whole = b"".join(spelled)
    if answer not in whole.lower() and answer.lower() not in whole.lower():
        return eos
    after, at = whole.lower().rindex(answer.lower()) + len(answer), 0
    following = []
    for token_id, text_bytes in zip(ids, spelled, strict=True):
        if at >= after:
            following.append(token_id)
        at += len(text_bytes)
    for kind in (table.special, table.added):
        for token_id in following:
            if token_id in kind:
                return int(token_id)
    return eos


def role_pairs(ends: Sequence[Ends], student: TokenTable, teacher: TokenTable) -> list[tuple[int, int]]:
    """(student id, teacher id) of tokens with one role: the ends of turn of the data, then the ends of sequence.

    A student with one token for both gives it to both roles of the teacher; the first pair of an id counts.
    """
    ours = student.eos if student.eos is not None or not ends else ends[0][0]
    return list(dict.fromkeys((a, b) for a, b in [*ends, (ours, teacher.eos)] if a is not None and b is not None))


def gaps(ids: Sequence[int], response: Sequence[bool], table: TokenTable, end_id: int | None) -> list[int]:
    """Positions of the white space that a template puts between an answer and its end of turn.

    Axolotl marks such an answer and its end as two responses, as in Llama 2's `' ' + content + ' ' + eos_token`.
    """
    runs = list(_runs(response))
    found: list[int] = []
    for one, other in pairwise(runs):
        between = range(one.stop, other.start)
        if (
            len(between) <= _LONGEST_GAP
            and ids[other.start] == end_id
            and (ids[one.stop - 1] != end_id or len(one) > 1)  # an answer may end with text that spells the end of turn
            and not any(ids[k] in table.special or (table.literal[ids[k]] or b"x").strip() for k in between)
        ):
            found.extend(between)
    return found


def answers(ids: Sequence[int], response: Sequence[bool], table: TokenTable, end_id: int | None) -> list[bool]:
    """Which tokens belong to an answer, from its first token to its end of turn."""
    inside = list(response)
    for k in gaps(ids, response, table, end_id):
        inside[k] = True
    return inside


def _without(left_out: list[int], length: int) -> Sequence[int]:
    dropped = set(left_out)
    return [k for k in range(length) if k not in dropped] if dropped else range(length)


def _excerpt(text: bytes, at: int) -> str:
    """A text around a place, in quotes."""
    start, stop = max(0, at - _AROUND), at + _AROUND
    shown = text[start:stop].decode(errors="ignore")
    return f"{'…' if start else ''}{shown!r}{'…' if stop < len(text) else ''}"


def _runs(response: Sequence[bool]) -> Iterator[range]:
    start = None
    for position, inside in enumerate(response):
        if inside and start is None:
            start = position
        elif not inside and start is not None:
            yield range(start, position)
            start = None
    if start is not None:
        yield range(start, len(response))


class _Segment:
    """One run of response tokens: its text and its end-of-turn token."""

    def __init__(self, ids: Sequence[int], run: range, table: TokenTable, end_id: int | None) -> None:
        self.ids = list(ids[run.start : run.stop])
        if self.ids and not 0 <= min(self.ids) <= max(self.ids) < table.vocab_size:
            raise SettingError(
                "response token ids",
                f"ids below {table.vocab_size}",
                f"{min(self.ids)} to {max(self.ids)}",
                "Tokenize with the tokenizer of this table.",
            )
        self.run, self.table, self.length = run, table, len(ids)
        self.before = (table.literal[ids[run.start - 1]] if run.start else None) or b""
        self.end = self._find_end(end_id)
        self.known: dict[tuple[object, ...], Text] = {}

    def _find_end(self, end_id: int | None) -> int | None:
        table, last = self.table, None
        for index in range(len(self.ids) - 1, -1, -1):
            token_id = self.ids[index]
            if token_id == end_id:
                return index
            if token_id in table.special and (token_id != table.unknown or token_id == table.eos):
                last = index if last is None else last
            elif (table.literal[token_id] or b"x").strip():
                break
        return last

    def literal(self, index: int) -> bytes:
        return self.table.literal[self.ids[index]] or b""

    def spaces(self, index: int) -> tuple[bool, bool]:
        """Whether a token begins with a space, and whether it does or the one before it ends with one."""
        before = self.literal(index - 1) if index else self.before
        inside = self.literal(index)[:1] == b" "
        return inside, inside or before[-1:] == b" "

    @cached_property
    def readings(self) -> list["_Reading"]:
        """Likeliest first. A row that is cut right after text that spells the end of turn has no end.

        An answer that is this one token is an end without text.
        """
        last = self.run.stop == self.length
        text_ids = self.ids[: self.end]
        ended = _Reading(self.end, short=self.end is None and last)
        whole = [ended] if not self.end or not last else [ended, _Reading(None, short=True)]
        cut = not self.table.vague.isdisjoint(text_ids) or any(self.table.literal[i] is None for i in text_ids)
        return [*whole, ended._replace(cut=True)] if cut else whole

    def read(self, reading: "_Reading", changes: tuple[Canonical, ...]) -> Text:
        key = (reading, changes)
        if key not in self.known:
            if changes:
                self.known[key] = self.read(reading, ()).canonical(changes)
            else:
                self.known[key] = self._spell(reading)
        return self.known[key]

    def _spell(self, reading: "_Reading") -> Text:
        table = self.table
        parts: list[bytes] = []
        starts, ends, cuts, dummies = [], [], [], []
        size = 0
        prefixed = table.dummy_prefix
        for token_id in self.ids[: reading.end]:
            text = table.literal[token_id]
            if reading.cut and (text is None or token_id in table.vague):
                cuts.append(size)
                text = b""
            text = text or b""
            if prefixed and text[:1] == b" ":
                dummies.append(size)
            prefixed = token_id in table.prefixing
            parts.append(text)
            starts.append(size)
            size += len(text)
            ends.append(size)
        return Text(b"".join(parts), starts, ends, cuts, dummies, reading.short)


class _Reading(NamedTuple):
    """How a segment is read: which token ends it, None where its text goes on to its last token.

    short: the text is cut at its end. cut: unknown text is missing.
    """

    end: int | None
    short: bool
    cut: bool = False


def _partners(ours: list[_Segment], theirs: list[_Segment]) -> list[tuple[_Segment, _Segment]]:
    """The k-th with the k-th; of unequal numbers, the longest chain of segments with the same text."""
    if len(ours) == len(theirs):
        return list(zip(ours, theirs, strict=True))
    # Most of them are the same from either end; the table, which grows with the product, is for those between.
    before = 0
    while before < min(len(ours), len(theirs)) and _match(ours[before], theirs[before], whole=True) is not None:
        before += 1
    behind = 0
    left = min(len(ours), len(theirs)) - before
    while behind < left and _match(ours[-1 - behind], theirs[-1 - behind], whole=True) is not None:
        behind += 1
    middle = _chain(ours[before : len(ours) - behind], theirs[before : len(theirs) - behind])
    tails = (ours[len(ours) - behind :], theirs[len(theirs) - behind :])
    return [*zip(ours[:before], theirs[:before], strict=True), *middle, *zip(*tails, strict=True)]


def _chain(ours: list[_Segment], theirs: list[_Segment]) -> list[tuple[_Segment, _Segment]]:
    """The longest chain of segments with the same text."""
    longest = [[0] * (len(theirs) + 1) for _ in range(len(ours) + 1)]
    same = [[_match(one, other, whole=True) is not None for other in theirs] for one in ours]
    for i in range(len(ours) - 1, -1, -1):
        for j in range(len(theirs) - 1, -1, -1):
            longest[i][j] = max(longest[i + 1][j], longest[i][j + 1], longest[i + 1][j + 1] + 1 if same[i][j] else 0)
    chain, i, j = [], 0, 0
    while i < len(ours) and j < len(theirs):
        if same[i][j] and longest[i][j] == longest[i + 1][j + 1] + 1:
            chain.append((ours[i], theirs[j]))
            i, j = i + 1, j + 1
        elif longest[i + 1][j] >= longest[i][j + 1]:
            i += 1
        else:
            j += 1
    return chain


def _ends(one: _Segment, other: _Segment, ends: Ends) -> list[tuple[int, int]]:
    return [] if ends[0] is None or ends[1] is None else [(one.run[ends[0]], other.run[ends[1]])]


def _warped(one: _Segment, other: _Segment) -> list[tuple[int, int]]:
    texts = [[side.literal(k) for k in range(len(side.ids[: side.end]))] for side in (one, other)]
    return [(one.run[i], other.run[j]) for i, j in enumerate(warp(*texts))] + _ends(one, other, (one.end, other.end))


class Spans(NamedTuple):
    """Where the tokens of two segments lie in one text.

    offsets: starts and ends of the student's tokens, then of the teacher's; a token of uncertain place has an empty
    span. padded: on each side the indices of tokens that spell a space before the text beside what they cover.
    ends: indices of the two ends of turn, None where there is none.
    """

    offsets: tuple[list[int], list[int], list[int], list[int]]
    padded: tuple[frozenset[int], frozenset[int]]
    ends: Ends


# Whether a reading is cut, as where an added token swallows white space, and how it is compared; likeliest first. What
# such a token shows is text as long as white space alone tells the texts apart.
_WHOLE = tuple(product((False, True), (same, same_ink)))
_PARTS = tuple(product((False, True), (beginning, contained)))


def _match(one: _Segment, other: _Segment, whole: bool = False) -> Spans | None:
    """Spans of the tokens of two segments, None where their texts differ; whole: a part of a text will not do."""
    changes = tuple(dict.fromkeys(change for side in (one, other) if (change := canonical(side.table)) is not None))
    for is_cut, locate in _WHOLE if whole else _WHOLE + _PARTS:
        for steps in ((), changes) if changes else ((),):
            for mine, yours in product(one.readings, other.readings):
                doubtful = locate is contained or is_cut
                if (mine.cut or yours.cut) != is_cut:
                    continue
                if doubtful and (mine.end, yours.end) != (one.end, other.end):
                    continue
                a, b = one.read(mine, steps), other.read(yours, steps)
                common = locate(a, b)
                if common is not None:
                    ours, theirs = _spans_in(a, common, 0), _spans_in(b, common, 1)
                    return Spans((*ours[0], *theirs[0]), (ours[1], theirs[1]), (mine.end, yours.end))
    return None


def _spans_in(text: Text, common: Common, side: int) -> tuple[tuple[list[int], list[int]], frozenset[int]]:
    """Where the tokens lie in the first text, and which of them are padded. side: of ``text``, 0 for the first."""
    regions, padding = common.regions, common.padding[side]
    starts, ends, padded = [], [], set()
    at = 0
    for index, (start, end) in enumerate(zip(text.starts, text.ends, strict=True)):
        if start in padding and start < end:
            start += 1
            padded.add(index)
        while at < len(regions) and regions[at][side] + regions[at].size < end:
            at += 1
        moved = 0, 0
        if at < len(regions):
            region = regions[at]
            place = region[side]
            certain = end > place + region.lead and start < place + region.size - region.trail
            if place <= start < end and certain:
                moved = start + region.first - place, end + region.first - place
        starts.append(moved[0])
        ends.append(moved[1])
    return (starts, ends), frozenset(padded)


def _apart(one: _Segment, other: _Segment, spans: Spans, i: int, j: int) -> bool:
    """Whether the space before the word of token i of one and of token j of the other is not at the same place.

    A padded token spells one space more than it covers: of white space alone, only that tells the two apart.
    """
    return one.spaces(i) != other.spaces(j) or (i in spans.padded[0]) != (j in spans.padded[1])


def _spans(one: _Segment, other: _Segment, spans: Spans) -> Iterator[Span]:
    """Half-open index ranges of the spans of two segments."""
    sides = []
    student_starts, student_ends, teacher_starts, teacher_ends = spans.offsets
    for segment, starts, ends in ((one, student_starts, student_ends), (other, teacher_starts, teacher_ends)):
        known = [segment.table.bytes[token] is not None for token in segment.ids]
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
            apart = _apart(one, other, spans, i, first)
            if apart or stops != [i + 1, first + 1]:
                lead, other_lead = (
                    int(apart and k - 1 in padded and places[k - 1] == (0, 0))
                    for places, padded, k in ((ours, spans.padded[0], i), (theirs, spans.padded[1], first))
                )
                yield i - lead, stops[0], first - other_lead, stops[1]
            i = stops[0]
            continue
        i += 1
