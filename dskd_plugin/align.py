"""Response tokens of one conversation in two tokenizations, aligned by the bytes they cover."""

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import numpy as np

from dskd_plugin.core.spans import match_spans, match_starts
from dskd_plugin.tokens import Canonical, TokenTable, canonical, units

PROBE = [{"role": "user", "content": "Zulu?"}, {"role": "assistant", "content": "Quebec"}]

RULES = 5  # raise it where the same rows would align in another way, so that no prepared rows are reused

Pairing = Literal["exact", "starts", "position", "warped", "all"]
Chunk = tuple[int, int, int, int]
Ends = tuple[int | None, int | None]  # end-of-turn ids of student and teacher, see `end_of_turn`
_LONGEST_GAP = 3  # where Axolotl still finds an end of turn after its answer


@dataclass(frozen=True)
class Alignment:
    """Which response tokens of two sequences belong together.

    student_N, teacher_N: positions of the tokens themselves (targets, predicted one position before), pair by
        pair; with pairing "all", two lists of their own lengths. The student's rise strictly. Position 0 can
        occur where a sequence begins with its response; no row predicts it.
    student_tokens: response tokens of the student, paired or not.
    segments: responses of the student; unmatched_segments: those without a counterpart of the teacher's.
    chunks: (student start, student stop, teacher start, teacher stop), half-open positions, see `align`.
    """

    student_N: list[int]
    teacher_N: list[int]
    student_tokens: int
    segments: int
    unmatched_segments: int
    chunks: list[Chunk]


@dataclass(frozen=True)
class Aligner:
    """How the rows of one run are aligned: the rules of `align` with the two tokenizers."""

    student: TokenTable
    teacher: TokenTable
    pairing: Pairing = "exact"
    identity: bool = False
    chunks: bool = False
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
        """Columns of a training row: aligned_student, aligned_teacher, chunks (flat, if on), unmatched_segments.

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
            chunks=self.chunks,
        )
        flat = [
            position
            for a, b, c, d in found.chunks
            for position in (ours[a], ours[b - 1] + 1, theirs[c], theirs[d - 1] + 1)
        ]
        return {
            "aligned_student": [ours[k] for k in found.student_N],
            "aligned_teacher": [theirs[k] for k in found.teacher_N],
            **({"chunks": flat} if self.chunks else {}),
            "unmatched_segments": found.unmatched_segments,
        }


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
    chunks: bool = False,
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
    Texts may differ by white space at the ends, by what a template puts before or after one of them, by
    truncation of one, by the dummy prefix, and by what the tokenizers do to text (NFC, NFKC, lower-casing,
    white space); then a token pairs only where its ends are known. Any other difference leaves the segment
    without pairs.
    pairing "starts": as "exact", but two tokens pair iff they begin at the same byte, wherever they end.
    pairing "position": the k-th token of a segment with the k-th of the other, as far as both go.
    pairing "warped": see `warp`, on the bytes of the two texts; the end-of-turn tokens pair by role.
    pairing "all": every token of two segments of one text (in the sense of "exact").
    identity: the tokenizers are one; segments with equal ids pair token by token.
    chunks: also find the smallest spans of text tokens that begin and end at a byte boundary of both sides and are
    not one token on each that pair, where the bytes of every token within are certain. A dummy prefix that is a token
    of its own belongs to the chunk that it begins.
    Source: ETA of DSKD v2 (arXiv 2504.11426), on bytes, per segment; position: ULD (arXiv 2402.12030); chunks:
    approximate likelihood matching (arXiv 2503.20083).
    """
    for side, ids, response in (
        ("student", student_ids, student_response),
        ("teacher", teacher_ids, teacher_response),
    ):
        if len(ids) != len(response):
            raise ValueError(
                f"{side} response mask: expected one value per token ({len(ids)}), got {len(response)}. "
                "Give the mask of these ids."
            )
    ours = [_Segment(student_ids, run, student, student_end) for run in _runs(student_response)]
    theirs = [_Segment(teacher_ids, run, teacher, teacher_end) for run in _runs(teacher_response)]
    student_N: list[int] = []
    teacher_N: list[int] = []
    spans: list[Chunk] = []
    unmatched = len(ours)
    for one, other in _partners(ours, theirs):
        same = identity and one.ids == other.ids
        common = _match(one, other) if not same and (chunks or pairing in ("exact", "starts", "all")) else None
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
            found += _ends(one, other)
        unmatched -= 1
        if pairing == "all":
            student_N.extend(one.run)
            teacher_N.extend(other.run)
        else:
            student_N.extend(i for i, _ in found)
            teacher_N.extend(j for _, j in found)
        if chunks and common is not None:
            first, start = one.run.start, other.run.start
            spans.extend((a + first, b + first, c + start, d + start) for a, b, c, d in _chunks(one, other, common))
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
        raise ValueError(
            f"chat template: expected one that renders a user and an assistant message, got {error!r}. "
            "Choose another chat template."
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
    runs, found = list(_runs(response)), []
    for one, other in pairwise(runs):
        between = range(one.stop, other.start)
        if (
            len(between) <= _LONGEST_GAP
            and ids[other.start] == end_id != ids[one.stop - 1]
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


class _Text:
    """Text of a segment as bytes, the span of each token, and the offsets where unknown text is missing."""

    def __init__(self, text: bytes, starts: list[int], ends: list[int], cuts: list[int]) -> None:
        self.text, self.starts, self.ends, self.cuts = text, starts, ends, cuts

    def canonical(self, changes: Sequence[Canonical]) -> "_Text":
        """The text as both tokenizers change it; tokens that end inside a changed unit lose their span."""
        collapses = any(change.collapses_space for change in changes)
        to = [-1] * (len(self.text) + 1)
        parts: list[bytes] = []
        removed: list[int] = []
        size = at = 0
        for start, stop in zip([0, *self.cuts], [*self.cuts, len(self.text)], strict=True):
            spaced = False
            for unit in units().findall(self.text[start:stop].decode(errors="surrogateescape")):
                new = unit
                for change in changes:
                    new = change(new)
                joins = collapses and new.isspace() and spaced
                spaced = new.isspace()
                old_bytes, new_bytes = (part.encode(errors="surrogateescape") for part in (unit, new))
                if joins:
                    at += len(old_bytes)
                    continue
                if new == unit:
                    to[at : at + len(old_bytes)] = range(size, size + len(old_bytes))
                else:
                    to[at] = size
                    if not new_bytes:
                        removed.append(at)
                parts.append(new_bytes)
                size += len(new_bytes)
                at += len(old_bytes)
        to[at] = size
        starts, ends = [], []
        for start, end in zip(self.starts, self.ends, strict=True):
            known = to[start] >= 0 and to[end] >= 0 and bisect_left(removed, start) == bisect_left(removed, end)
            starts.append(to[start] if known else 0)
            ends.append(to[end] if known else 0)
        return _Text(b"".join(parts), starts, ends, [to[cut] for cut in self.cuts])


class _Segment:
    """One run of response tokens: its text and its end-of-turn token."""

    def __init__(self, ids: Sequence[int], run: range, table: TokenTable, end_id: int | None) -> None:
        self.ids = list(ids[run.start : run.stop])
        if self.ids and not 0 <= min(self.ids) <= max(self.ids) < table.vocab_size:
            raise ValueError(
                f"response token ids: expected ids below {table.vocab_size}, got {min(self.ids)} to "
                f"{max(self.ids)}. Tokenize with the tokenizer of this table."
            )
        self.run, self.table = run, table
        self.before = (table.literal[ids[run.start - 1]] if run.start else None) or b""
        self.end = self._find_end(end_id)
        self.truncated = self.end is None and run.stop == len(ids)
        self.known: dict[tuple[object, ...], _Text] = {}

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
    def variants(self) -> list[tuple[bool, bool]]:
        """Readings, likeliest first: (drop a space after added tokens, unknown text is missing)."""
        text_ids = self.ids[: self.end]
        tight = self.table.prefix_after_added and not self.table.added.isdisjoint(text_ids)
        cut = not self.table.vague.isdisjoint(text_ids) or any(self.table.literal[i] is None for i in text_ids)
        return [(a, b) for b in ((False, True) if cut else (False,)) for a in ((False, True) if tight else (False,))]

    def read(self, tight: bool, cut: bool, changes: tuple[Canonical, ...]) -> _Text:
        key = (tight, cut, changes)
        if key not in self.known:
            if changes:
                self.known[key] = self.read(tight, cut, ()).canonical(changes)
            else:
                self.known[key] = self._spell(tight, cut)
        return self.known[key]

    def _spell(self, tight: bool, cut: bool) -> _Text:
        table = self.table
        parts: list[bytes] = []
        starts, ends, cuts = [], [], []
        size = 0
        after_added = False
        for token_id in self.ids[: self.end]:
            text = table.literal[token_id]
            if cut and (text is None or token_id in table.vague):
                cuts.append(size)
                text = b""
            text = text or b""
            if tight and after_added and text[:1] == b" ":
                text = text[1:]
            after_added = token_id in table.added
            parts.append(text)
            starts.append(size)
            size += len(text)
            ends.append(size)
        return _Text(b"".join(parts), starts, ends, cuts)


def _partners(ours: list[_Segment], theirs: list[_Segment]) -> list[tuple[_Segment, _Segment]]:
    """The k-th with the k-th; of unequal numbers, the longest chain of segments with the same text."""
    if len(ours) == len(theirs):
        return list(zip(ours, theirs, strict=True))
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


def _ends(one: _Segment, other: _Segment) -> list[tuple[int, int]]:
    return [] if one.end is None or other.end is None else [(one.run[one.end], other.run[other.end])]


def _warped(one: _Segment, other: _Segment) -> list[tuple[int, int]]:
    texts = [[side.literal(k) for k in range(len(side.ids[: side.end]))] for side in (one, other)]
    return [(one.run[i], other.run[j]) for i, j in enumerate(warp(*texts))] + _ends(one, other)


def _match(one: _Segment, other: _Segment, whole: bool = False) -> "Spans | None":
    """Spans of the tokens of two segments, None where their texts differ; whole: a part of a text will not do."""
    changes = tuple(dict.fromkeys(change for side in (one, other) if (change := canonical(side.table)) is not None))
    for locate in (_same,) if whole else (_same, _contained):
        for steps in ((), changes) if changes else ((),):
            for mine in one.variants:
                for yours in other.variants:
                    a, b = one.read(*mine, steps), other.read(*yours, steps)
                    regions = locate(a, b, one.truncated, other.truncated)
                    if regions is not None:
                        return _spans_in(a, b, regions)
    return None


def _spans_in(a: _Text, b: _Text, regions: "Regions") -> "Spans":
    """Where the tokens lie in the text of a, within the regions (start in a, start in b, size) that both have."""
    starts, ends, padded = [], [], []
    for side, text in enumerate((a, b)):
        places = [(region[side], region[side] + region[2], region[0] - region[side]) for region in regions]
        first = places[0][0] if places else 0
        # A single space before the text is a dummy prefix or the template's: its token starts at the text.
        glue = first == 1 and text.text[:1] == b" "
        at = 0
        moved: list[tuple[int, int]] = []
        padded.append(-1)
        for index, (start, end) in enumerate(zip(text.starts, text.ends, strict=True)):
            if glue and start == 0 < end:
                start = 1
                padded[side] = index
            while at < len(places) and places[at][1] < end:
                at += 1
            inside = at < len(places) and places[at][0] <= start < end
            moved.append((start + places[at][2], end + places[at][2]) if inside else (0, 0))
        starts.append([start for start, _ in moved])
        ends.append([end for _, end in moved])
    return Spans((starts[0], ends[0], starts[1], ends[1]), (padded[0], padded[1]))


Regions = list[tuple[int, int, int]]


class Spans(NamedTuple):
    """Where the tokens of two segments lie in one text.

    offsets: starts and ends of the student's tokens, then of the teacher's; a token of uncertain place has an empty
    span. padded: on each side the index of the token that spells a space before the text beside what it covers, -1
    for none.
    """

    offsets: tuple[list[int], list[int], list[int], list[int]]
    padded: tuple[int, int]


def _apart(one: _Segment, other: _Segment, spans: Spans, i: int, j: int) -> bool:
    """Whether the space before the word of token i of one and of token j of the other is not at the same place.

    A padded token spells one space more than it covers: of white space alone, only that tells the two apart.
    """
    return one.spaces(i) != other.spaces(j) or (i == spans.padded[0]) != (j == spans.padded[1])


def _chunks(one: _Segment, other: _Segment, spans: Spans) -> Iterator[Chunk]:
    """Half-open index ranges of the chunks of two segments."""
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
                    int(apart and k > 0 and places[k - 1] == (0, 0) and segment.literal(k - 1) == b" ")
                    for segment, places, k in ((one, ours, i), (other, theirs, first))
                )
                yield i - lead, stops[0], first - other_lead, stops[1]
            i = stops[0]
            continue
        i += 1


def _same(a: _Text, b: _Text, a_cut: bool, b_cut: bool) -> Regions | None:
    """Regions of two texts that differ only by white space at the ends and by unknown text."""
    if a.cuts or b.cuts:
        return _around_cuts(a, b)
    if a.text == b.text:
        return [(0, 0, len(a.text))]
    core = a.text.strip()
    if core != b.text.strip():
        return None
    if not core:
        short, long = sorted((a.text, b.text), key=len)
        if long != b" " + short:
            return []
        return [(len(a.text) - len(short), len(b.text) - len(short), len(short))]
    a_lead, b_lead = (len(side.text) - len(side.text.lstrip()) for side in (a, b))
    left = _common(a.text[:a_lead][::-1], b.text[:b_lead][::-1])
    right = _common(a.text[a_lead + len(core) :], b.text[b_lead + len(core) :])
    return [(a_lead - left, b_lead - left, left + len(core) + right)]


def _common(a: bytes, b: bytes) -> int:
    size = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        size += 1
    return size


def _contained(a: _Text, b: _Text, a_cut: bool, b_cut: bool) -> Regions | None:
    """Region of the text that lies within the other: at its start if cut short, else the last place."""
    if a.cuts or b.cuts:
        return None
    if len(a.text.strip()) > len(b.text.strip()):
        found = _contained(b, a, b_cut, a_cut)
        return found and [(a_start, b_start, size) for b_start, a_start, size in found]
    lead = len(a.text) - len(a.text.lstrip())
    core = a.text[lead:] if a_cut else a.text.strip()
    if not core:
        return None
    at = len(b.text) - len(b.text.lstrip())
    if a_cut and b.text.startswith(core, at):
        return [(lead, at, len(core))]
    at = b.text.rfind(core)
    if at < 0 or _within_word(b.text, at) or (not a_cut and _within_word(b.text, at + len(core))):
        return None
    last = not a_cut and b.text.rstrip().endswith(core)
    if not last and b.text.find(core) != at:
        return None
    left = _common(a.text[:lead][::-1], b.text[:at][::-1])
    right = _common(a.text[lead + len(core) :], b.text[at + len(core) :])
    return [(lead - left, at - left, left + len(core) + right)]


def _within_word(text: bytes, at: int) -> bool:
    around = text[max(0, at - 1) : at + 1]
    return 0 < at < len(text) and all(byte >= 0x80 or chr(byte).isalnum() for byte in around)


def _around_cuts(a: _Text, b: _Text) -> Regions | None:
    """Regions whose place is certain although one text lacks, at its cuts, bytes of unknown number."""
    if a.cuts and b.cuts:
        return _ends_only(a, b)
    if b.cuts:
        found = _around_cuts(b, a)
        return found and [(a_start, b_start, size) for b_start, a_start, size in found]
    bounds = [0, *a.cuts, len(a.text)]
    pieces = [(start, a.text[start:end]) for start, end in pairwise(bounds)]
    head, tail = pieces[0][1], pieces[-1][1]
    low, high = 0, len(b.text)
    regions: Regions = []
    if head.strip():
        low = len(b.text) - len(b.text.lstrip())
        lead = len(head) - len(head.lstrip())
        if not b.text.startswith(head[lead:], low):
            return None
        regions.append((lead, low, len(head) - lead))
        low += len(head) - lead
    if tail.strip():
        size = len(tail.rstrip())
        high = len(b.text.rstrip()) - size
        if high < low or b.text[high : high + size] != tail[:size]:
            return None
        regions.append((pieces[-1][0], high, size))
    middle = pieces[1:-1]
    earliest, latest, at = [], [], low
    for _, piece in middle:
        at = b.text.find(piece, at + 1, high)
        if at < 0:
            return None
        earliest.append(at)
        at += len(piece)
    if at >= high:
        return None
    at = high
    for _, piece in reversed(middle):
        at = b.text.rfind(piece, low, at - 1)
        latest.append(at)
    for (start, piece), first, last in zip(middle, earliest, reversed(latest), strict=True):
        if first == last:
            regions.append((start, first, len(piece)))
    return sorted(regions)


def _ends_only(a: _Text, b: _Text) -> Regions | None:
    """Where both texts lack bytes, only what is before the first or after the last cut is certain."""
    regions: Regions = []
    heads = [side.text[: side.cuts[0]] for side in (a, b)]
    leads = [len(head) - len(head.lstrip()) for head in heads]
    size = min(len(head) - lead for head, lead in zip(heads, leads, strict=True))
    if heads[0][leads[0] : leads[0] + size] != heads[1][leads[1] : leads[1] + size]:
        return None
    regions.append((leads[0], leads[1], size))
    tails = [side.text[side.cuts[-1] :].rstrip() for side in (a, b)]
    size = min(map(len, tails))
    stops = [side.cuts[-1] + len(tail) for side, tail in zip((a, b), tails, strict=True)]
    if size and tails[0][-size:] != tails[1][-size:]:
        return None
    regions.append((stops[0] - size, stops[1] - size, size))
    return regions
