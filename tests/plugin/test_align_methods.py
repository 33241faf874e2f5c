"""Rows of every method and spans, against oracles that go through all paths and all pairs of boundaries."""

import itertools
import os
import pickle
import time
from functools import cache

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizer_zoo import PIECES, apart, closed, letters, spans_in, spell

from dskd_plugin.methods.base import METHODS, SegmentMethod
from dskd_plugin.pair import aligner, make_pair, nearest_ids
from dskd_plugin.settings import parse_settings
from dskd_plugin.text.align import Aligner, align, warp
from dskd_plugin.text.tokens import TokenTable
from dskd_plugin.text.vocabularies import encode

EXAMPLES = int(os.environ.get("DSKD_FUZZ_EXAMPLES", "20"))
fuzz = settings(
    max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), derandomize=EXAMPLES <= 200
)
TEXT = "Natalia sold 48/2 = 24 clips in May.\nSo 48+24 = 72 naïve cafés 漢字 🙂 antidisestablishmentarianism.\n#### 72"
PAIRS = [("smollm2", "mistral"), ("mistral", "qwen"), ("unigram", "tekken"), ("gemma-like", "deepseek")]


def spans_of(one, other, ids, other_ids, **options):
    ids, other_ids = closed(one, ids), closed(other, other_ids)
    found = align(
        ids, [True] * len(ids), other_ids, [True] * len(other_ids), one.table, other.table, with_spans=True, **options
    )
    return found, found.spans


# -- spans ------------------------------------------------------------------------------------------------------


def brute_spans(ours, theirs, our_doubt, their_doubt, words, other_words):
    """All pairs of stretches with equal ends and no common boundary within, less the pairs of single tokens.

    words: what each token spells, with the dummy space that the text lacks; where that is a token, it is in the span
    of what follows it.
    """
    if ours and theirs and max(ours[0][0], theirs[0][0]) == 0:  # a dummy space that one side lacks is not text
        ours, theirs = ([(max(0, s), e) for s, e in side] for side in (ours, theirs))

    def stretches(spans, doubt):
        for start, stop in itertools.combinations(range(len(spans) + 1), 2):
            stretch = spans[start:stop]
            if not any(doubt[start:stop]) and all(e > s for s, e in stretch):
                yield (stretch[0][0], stretch[-1][1]), {e for _, e in stretch[:-1]}, start, stop

    mine = [one for one in stretches(ours, our_doubt)]
    yours = {}
    for place, inner, start, stop in stretches(theirs, their_doubt):
        yours[place] = inner, start, stop
    found = []
    for place, inner, start, stop in mine:
        if place in yours:
            other_inner, other_start, other_stop = yours[place]
            single = (stop - start, other_stop - other_start) == (1, 1)
            alone = apart(words, start, other_words, other_start)
            # A token may spell a dummy space beside what it covers.
            alone = alone or (single and words[start] != other_words[other_start])
            if not inner & other_inner and (alone or not single):
                begin, other_begin = (
                    0 if alone and (k, side[0]) == (1, b" ") else k
                    for k, side in ((start, words), (other_start, other_words))
                )
                found.append((begin, stop, other_begin, other_stop))
    return found


def check_spans(one, other, ids, other_ids, found):
    """Rules that hold for every text: spans and pairs rise, never overlap, and spell the same on both sides."""
    ids, other_ids = closed(one, ids), closed(other, other_ids)
    places = [(i, i + 1, j, j + 1) for i, j in zip(found.student_N, found.teacher_N, strict=True)]
    together = sorted([*places, *found.spans])
    for (_, stop, _, other_stop), (start, _, other_start, _) in itertools.pairwise(together):
        assert stop <= start and other_stop <= other_start
    parts = spell(one, ids), spell(other, other_ids)
    for start, stop, other_start, other_stop in found.spans:
        single = (stop - start, other_stop - other_start) == (1, 1)
        equal = parts[0][start] == parts[1][other_start]
        assert not single or not equal or apart(parts[0], start, parts[1], other_start)
        a = b"".join(parts[0][start:stop]).decode(errors="replace")
        b = b"".join(parts[1][other_start:other_stop]).decode(errors="replace")
        assert "\ufffd" in a + b or letters(a) == letters(b), (one.name, other.name, a, b)
        for entry, side in ((one, ids[start:stop]), (other, other_ids[other_start:other_stop])):
            assert not any(entry.table.bytes[token] is None for token in side)


texts = st.one_of(
    st.text(max_size=25),
    st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=6)), max_size=7).map("".join),
)


@fuzz
@given(text=texts)
def test_spans_of_every_ordered_pair_match_the_brute_force(whole_zoo, text):
    sides = []
    for entry in whole_zoo:
        ids = encode(entry.tokenizer, text)
        sides.append((entry, ids, spans_in(entry, ids, text), [entry.table.bytes[i] is None for i in ids]))
    for one, ids, spans, doubt in sides:
        for other, other_ids, other_spans, other_doubt in sides:
            found, left_over = spans_of(one, other, ids, other_ids)
            check_spans(one, other, ids, other_ids, found)
            if spans is not None and other_spans is not None:
                parts = spell(one, ids), spell(other, other_ids)
                expected = brute_spans(spans, other_spans, doubt, other_doubt, *parts)
                assert left_over == expected, (one.name, other.name, text)


@pytest.mark.parametrize(("student", "teacher"), PAIRS)
def test_pairs_and_spans_cover_the_whole_of_a_plain_text(zoo, student, teacher):
    one, other = zoo(student), zoo(teacher)
    ids, other_ids = encode(one.tokenizer, TEXT), encode(other.tokenizer, TEXT)
    found, spans = spans_of(one, other, ids, other_ids)
    covered = [*found.student_N, *(i for start, stop, *_ in spans for i in range(start, stop))]
    partners = [*found.teacher_N, *(j for *_, start, stop in spans for j in range(start, stop))]
    assert sorted(covered) == list(range(len(ids) + 1))
    assert sorted(partners) == list(range(len(other_ids) + 1))
    assert spans
    for start, stop, other_start, other_stop in spans:
        ours, theirs = (
            b"".join(spell(entry, side))
            for entry, side in ((one, ids[start:stop]), (other, other_ids[other_start:other_stop]))
        )
        assert ours.removeprefix(b" " if start == 0 else b"") == theirs.removeprefix(b" " if other_start == 0 else b"")


def test_a_first_word_without_a_partner_is_a_span(zoo):
    one, other = zoo("mistral"), zoo("qwen")
    ids, other_ids = (encode(entry.tokenizer, "The house") for entry in (one, other))
    assert spans_of(one, other, ids, other_ids)[1] == [(0, 1, 0, 1)]
    ids, other_ids = (encode(entry.tokenizer, "4 houses") for entry in (one, other))
    assert spans_of(one, other, ids, other_ids)[1] == [(0, 2, 0, 1)]  # the space is a token of its own


# What spans must not cover although a pair of tokens before and one after are certain.
UNCERTAIN = [
    ("smollm2", "qwen", "Cafe\u0301 au lait antidisestablishmentarianism", "é", "arianism"),
    ("unigram-unknown", "byte-level", "the house ☃☃ and the zzxqj river is blue", "☃", " z"),
    ("unigram-nfkc-cf", "deepseek", "The red  house\n\nand the blue zqxj there", "house", "xj"),
]


@pytest.mark.parametrize(("student", "teacher", "text", "absent", "present"), UNCERTAIN)
def test_text_of_uncertain_bytes_is_in_no_span(zoo, student, teacher, text, absent, present):
    one, other = zoo(student), zoo(teacher)
    ids, other_ids = encode(one.tokenizer, text), encode(other.tokenizer, text)
    found, spans = spans_of(one, other, ids, other_ids)
    check_spans(one, other, ids, other_ids, found)
    spelled = [b"".join(spell(other, other_ids[start:stop])).decode(errors="replace") for *_, start, stop in spans]
    assert present in spelled, spelled
    assert not any(absent in text for text in spelled), spelled


def test_no_span_crosses_a_special_token_the_end_of_turn_or_another_segment(zoo):
    one, other = zoo("smollm2"), zoo("qwen")
    answer = "Write <|im_end|> antidisestablishmentarianism"
    ids, other_ids = encode(one.tokenizer, answer), encode(other.tokenizer, answer)
    assert one.table.literal.index(b"<|im_end|>") in ids  # one token here, several there
    mine, yours = closed(one, ids), closed(other, other_ids)
    found = align(
        mine * 2,
        ([False] + [True] * (len(mine) - 1)) * 2,
        yours * 2,
        [True] * len(yours) + [False] + [True] * (len(yours) - 1),
        one.table,
        other.table,
        with_spans=True,
    )
    assert found.responses == 2
    special = {k for k, token in enumerate(mine * 2) if token in one.table.special}
    for start, stop, other_start, other_stop in found.spans:
        assert not special & set(range(start, stop))
        assert (start < len(mine)) == (stop <= len(mine)) == (other_start < len(yours)) == (other_stop <= len(yours))


def test_one_tokenizer_has_no_spans(zoo):
    entry = zoo("smollm2")
    ids = encode(entry.tokenizer, TEXT)
    assert spans_of(entry, entry, ids, ids)[1] == [] == spans_of(entry, entry, ids, ids, identity=True)[1]


@pytest.mark.parametrize("size", [2000, 16000])
def test_spans_take_linear_time(zoo, size):
    one, other = zoo("mistral"), zoo("qwen-fast")
    text = " ".join(["Antidisestablishmentarianism naïve"] * size)
    ids, other_ids = encode(one.tokenizer, text), encode(other.tokenizer, text)
    start = time.process_time()
    _, spans = spans_of(one, other, ids, other_ids)
    assert len(spans) > size
    assert time.process_time() - start < 30e-6 * (len(ids) + len(other_ids)) + 0.2


# -- dynamic time warping ------------------------------------------------------------------------------------------


def edit_distance(a, b):
    """Levenshtein distance by its definition."""

    @cache
    def rest(i, j):
        if i == len(a) or j == len(b):
            return len(a) - i + len(b) - j
        return min(1 + rest(i + 1, j), 1 + rest(i, j + 1), (a[i] != b[j]) + rest(i + 1, j + 1))

    return rest(0, 0)


def plain_warp(student, teacher):
    """The same warping by plain recursion from the last cell back."""
    if not student or not teacher:
        return []

    def cost(i, j):
        return edit_distance(student[i], teacher[j]) / max(len(student[i]), len(teacher[j]), 1)

    @cache
    def total(i, j):
        if (i, j) == (0, 0):
            return cost(0, 0), None
        ways = [(a, b) for a, b in ((i - 1, j - 1), (i - 1, j), (i, j - 1)) if a >= 0 and b >= 0]
        way = min(ways, key=lambda cell: total(*cell)[0])  # the first of equals
        return cost(i, j) + total(*way)[0], way

    cell, path = (len(student) - 1, len(teacher) - 1), []
    while cell is not None:
        path.append(cell)
        cell = total(*cell)[1]
    rows = {}
    for i, j in reversed(path):
        rows.setdefault(i, []).append(j)
    return [min(columns, key=lambda j: cost(i, j)) for i, columns in sorted(rows.items())]


words = st.lists(st.binary(max_size=4) | st.sampled_from([b"a", b"ab", b" a", b"b"]), max_size=9)


@settings(fuzz, max_examples=5 * EXAMPLES)
@given(student=words, teacher=words)
def test_warping_matches_plain_recursion(student, teacher):
    assert warp(student, teacher) == plain_warp(student, teacher)


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        ([], [b"a"], []),
        ([b"a"], [], []),
        ([b"a", b"a", b"a"], [b"a", b"a", b"a"], [0, 1, 2]),
        ([b"utter", b"ly"], [b"ut", b"terly"], [0, 1]),
        ([b"Hello", b" you"], [b" Hello", b" y", b"ou"], [0, 1]),
        ([b"x"], [b"abc", b"x", b"x"], [1]),
    ],
)
def test_warping_by_hand(student, teacher, expected):
    assert warp(student, teacher) == expected


@pytest.mark.parametrize(("student", "teacher"), PAIRS)
def test_mined_rows_of_real_tokenizers(zoo, student, teacher):
    one, other = zoo(student), zoo(teacher)
    ids, other_ids = encode(one.tokenizer, TEXT), encode(other.tokenizer, TEXT)
    found, _ = spans_of(one, other, ids, other_ids, pairing="warped")
    assert found.student_N == list(range(len(ids) + 1))
    assert found.teacher_N == [*plain_warp(spell(one, ids), spell(other, other_ids)), len(other_ids)]


# -- all methods ---------------------------------------------------------------------------------------------------


def block(**changes):
    return parse_settings({"teacher": {"model": "teacher"}, **changes})


SETTINGS = {
    "sft": ({"method": "sft"}, "exact"),
    "overlap_kd": ({"method": "overlap_kd"}, "starts"),
    "overlap_kd-ids": ({"method": "overlap_kd", "shared": "ids"}, "exact"),
    "bpm": ({"method": "bpm"}, "bytes"),
    "uld": ({"method": "uld"}, "position"),
    "mined": ({"method": "mined"}, "warped"),
    "dskd": ({}, "starts"),
    "dskd-eta": ({"alignment": "eta"}, "starts"),
    "dskd-ids": ({"shared": "ids"}, "exact"),
    "dskd-projected": ({"target": "projected"}, "exact"),
    "dskd-cma": ({"alignment": "cma"}, "all"),
}
SETTINGS["xtoken"] = ({"method": "xtoken"}, "starts")
IN_SPANS = {name for (name, _), method in METHODS.items() if isinstance(method, SegmentMethod)}
SETTINGS |= {name: ({"method": name}, "exact") for name in sorted(IN_SPANS)}
SETTINGS["xtoken-hybrid"] = ({"method": "xtoken", "xtoken": {"loss": "hybrid"}}, "exact")
IN_SPANS.add("xtoken-hybrid")


def turns(entry, answers):
    """Ids and response mask of a prompt and an answer with its end of turn, several times."""
    ids, response, runs = [], [], []
    for k, answer in enumerate(answers):
        prompt, said = encode(entry.tokenizer, f"question {k}\n"), closed(entry, encode(entry.tokenizer, answer))
        runs.append(range(len(ids) + len(prompt), len(ids) + len(prompt) + len(said)))
        ids += prompt + said
        response += [False] * len(prompt) + [True] * len(said)
    return ids, response, runs


def same_starts(one, other, ids, other_ids, text):
    """Pairs of tokens that begin at the same byte of the text, by brute force."""
    words, other_words = spell(one, ids), spell(other, other_ids)
    places, other_places = spans_in(one, ids, text), spans_in(other, other_ids, text)
    found = []
    for (i, (start, end)), (j, (begin, stop)) in itertools.product(enumerate(places), enumerate(other_places)):
        # A dummy space begins before the text: its token is another than one without.
        if start == begin and end > start and stop > begin and not apart(words, i, other_words, j):
            found.append((i, j))
    return found


@pytest.mark.parametrize(
    ("name", "span_weight"),
    [(name, ratio) for name in SETTINGS for ratio in (0, 0.5) if not (name in ("sft", "xtoken", *IN_SPANS) and ratio)],
)
@pytest.mark.parametrize(("student", "teacher"), PAIRS)
def test_columns_of_every_method(zoo, student, teacher, name, span_weight):
    changes, pairing = SETTINGS[name]
    one, other = zoo(student), zoo(teacher)
    options = block(**changes, **({"span_weight": span_weight} if span_weight else {}))
    made = aligner(make_pair(one.tokenizer, other.table, options), options, (None, None))
    assert made == pickle.loads(pickle.dumps(made))
    answers = [TEXT, "So 4 rivers, naïvely", "漢字"]
    ids, response, runs = turns(one, answers)
    other_ids, other_response, other_runs = turns(other, answers)
    row = made.columns(ids, response, other_ids, other_response)
    with_spans = span_weight or name in IN_SPANS
    assert ("spans" in row) == bool(with_spans) and row["unmatched_responses"] == 0
    pairs = list(zip(row["aligned_student"], row["aligned_teacher"], strict=pairing != "all"))
    if pairing == "position":
        assert pairs == [(i, j) for a, b in zip(runs, other_runs, strict=True) for i, j in zip(a, b, strict=False)]
    elif pairing == "all":
        assert row["aligned_student"] == [i for run in runs for i in run]
        assert row["aligned_teacher"] == [j for run in other_runs for j in run]
    else:
        expected = []
        for answer, run, other_run in zip(answers, runs, other_runs, strict=True):
            a, b = [ids[i] for i in run[:-1]], [other_ids[j] for j in other_run[:-1]]
            if pairing == "warped":
                found = list(enumerate(plain_warp(spell(one, a), spell(other, b))))
            elif pairing in ("starts", "bytes"):
                found = same_starts(one, other, a, b, answer)
            else:
                only, _ = spans_of(one, other, a, b)
                found = list(zip(only.student_N, only.teacher_N, strict=True))[:-1]
            expected += [(run[i], other_run[j]) for i, j in found] + [(run[-1], other_run[-1])]
        if pairing == "bytes":  # those that begin inside a token, or with a dummy space on one side alone, come on top
            together = [
                not (offset or pair in expected) for offset, pair in zip(row["aligned_offset"], pairs, strict=True)
            ]
            assert not any(together) and len(row["aligned_more"]) == len(pairs)
            pairs = [pair for pair, offset in zip(pairs, row["aligned_offset"], strict=True) if not offset]
        assert pairs == expected
    assert ("aligned_offset" in row) == (pairing == "bytes")
    if with_spans:
        exact = Aligner(one.table, other.table, spans=True).columns(ids, response, other_ids, other_response)
        assert row["spans"] == exact["spans"] != []


@pytest.mark.parametrize("name", SETTINGS)
def test_segments_of_different_texts_and_numbers(zoo, name):
    changes, pairing = SETTINGS[name]
    one, other = zoo("mistral"), zoo("qwen-fast")
    options = block(**changes)
    made = aligner(make_pair(one.tokenizer, other.table, options), options, (None, None))
    ids, response, runs = turns(one, ["red house", "quite another thing", "blue river"])
    same_number = turns(other, ["red house", "12 + 30 = 42!", "blue river"])
    row = made.columns(ids, response, *same_number[:2])
    inside = [i for i in row["aligned_student"] if i in runs[1]]
    theirs = [j for j in row["aligned_teacher"] if j in same_number[2][1]]
    by_place = pairing in ("position", "warped")
    assert (bool(inside), bool(theirs), row["unmatched_responses"]) == (by_place, by_place, 0 if by_place else 1)
    fewer = turns(other, ["blue river"])
    row = made.columns(ids, response, *fewer[:2])
    assert row["unmatched_responses"] == 2
    assert row["aligned_student"] and set(row["aligned_student"]) <= set(runs[2])
    assert set(row["aligned_teacher"]) <= set(fewer[2][0])
    empty = made.columns([], [], [], [])
    assert (empty["aligned_student"], empty["aligned_teacher"]) == ([], [])


@pytest.mark.parametrize("name", [*SETTINGS, "kd"])
def test_one_tokenizer_pairs_every_token_with_itself_whatever_the_method(zoo, name):
    changes, _ = SETTINGS.get(name, ({"method": "kd"}, "exact"))
    entry = zoo("smollm2")
    options = block(**changes)
    made = aligner(make_pair(entry.tokenizer, entry.table, options), options, (None, None))
    ids, response, runs = turns(entry, [TEXT, "a a a a"])
    row = made.columns(ids, response, [7, *ids], [False, *response])
    positions = [i for run in runs for i in run]
    assert row["aligned_student"] == positions and row["aligned_teacher"] == [i + 1 for i in positions]


REFUSED = [
    ({"method": "kd"}, "mistral", "qwen", r"dskd\.method: expected 'kd' only for one tokenizer, got .*'overlap_kd'"),
    ({"alignment": "identity"}, "mistral", "qwen", r"dskd\.alignment: expected 'identity' only for one tokenizer"),
    (
        {"span_weight": 0.5},
        "smollm2",
        "smollm2",
        r"dskd\.span_weight: expected 0 for one tokenizer, got 0\.5: .* Remove it",
    ),
    ({"span_weight": 2, "alignment": "cma"}, "smollm2", "smollm2", r"dskd\.span_weight: expected 0 for one tokenizer"),
]


@pytest.mark.parametrize(("changes", "student", "teacher", "message"), REFUSED)
def test_settings_that_do_not_fit_the_pair_are_refused(zoo, changes, student, teacher, message):
    with pytest.raises(ValueError, match=message):
        make_pair(zoo(student).tokenizer, zoo(teacher).table, block(**changes))


# -- nearest tokens --------------------------------------------------------------------------------------------------


def table(pieces, *, special=(), byte_tokens=(), added=(), eos=None):
    """A vocabulary of these bytes; special ids show nothing."""
    return TokenTable(
        bytes=[None if i in special else text for i, text in enumerate(pieces)],
        literal=list(pieces),
        special=frozenset(special),
        added=frozenset(special) | frozenset(added),
        kind="byte-level",
        byte_tokens=frozenset(byte_tokens),
        eos=eos,
    )


def said(student, token):
    """Whether it is the one of its bytes that is said."""
    same = [i for i, text in enumerate(student.bytes) if text == student.bytes[token]]
    return token == min(same, key=lambda i: (i in student.byte_tokens, i not in student.added, i))


def brute_nearest(student, teacher):
    out = []
    for text in teacher.bytes:
        ranked = [
            (edit_distance(text, other), i in student.byte_tokens, i)
            for i, other in enumerate(student.bytes)
            if text and other and said(student, i)
        ]
        out.append(min(ranked)[2] if ranked else -1)
    return out


pieces = st.lists(
    st.binary(min_size=1, max_size=7) | st.text("ab ", min_size=1, max_size=9).map(str.encode), max_size=20
)

kinds = st.sets(st.integers(0, 19))


@settings(fuzz, max_examples=5 * EXAMPLES)
@given(student=pieces, teacher=pieces, byte_tokens=kinds, added=kinds, special=kinds)
def test_nearest_ids_match_the_brute_force(student, teacher, byte_tokens, added, special):
    one, other = table(student, byte_tokens=byte_tokens, added=added), table(teacher, special=special)
    assert nearest_ids(one, other).tolist() == brute_nearest(one, other)


def test_nearest_ids_of_special_tokens_go_by_role():
    one = table([b"<s>", b"</s>", b"a", b"<0x61>"], special={0, 1}, eos=1)
    other = table([b"a", b"<eot>", b"<eos>", b"<pad>", b"ab"], special={1, 2, 3}, eos=2)
    assert nearest_ids(one, other).tolist() == [2, -1, 1, -1, 2]
    assert nearest_ids(one, other, [(0, 1), (1, 1), (0, 2)]).tolist() == [2, 0, 0, -1, 2]


@pytest.mark.parametrize("length", [250, 300])
def test_nearest_ids_of_very_long_tokens(length):
    one, other = table([b" " * length, b"x" * length, b"y"]), table([b" " * (length - 3), b"x" * (length + 7), b"\n"])
    assert nearest_ids(one, other).tolist() == [0, 1, 2]


def test_nearest_ids_of_real_vocabularies(zoo):
    one, other = zoo("byte-level").table, zoo("unigram").table
    found = nearest_ids(one, other)
    assert found.tolist() == [
        one.eos if token == other.eos else nearest for token, nearest in enumerate(brute_real(one, other))
    ]


def brute_real(student, teacher):
    """As `brute_nearest`, with the distance from the library."""
    from rapidfuzz.distance import Levenshtein

    out = []
    for text in teacher.bytes:
        ranked = [
            (Levenshtein.distance(text, other), i in student.byte_tokens, i)
            for i, other in enumerate(student.bytes)
            if text and other
        ]
        out.append(min(ranked)[2] if ranked else -1)
    return out
