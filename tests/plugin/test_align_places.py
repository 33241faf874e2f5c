"""Two tokens pair only if both spell the same bytes at the same place of the answer, whatever white space is around.

The oracle knows the two texts before they were tokenized, spells tokens without a table and counts bytes one by one.
"""

import os
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizer_zoo import TAGGED, apart, closed, load, load_tagged, spell, swallowing

from dskd_plugin.text.align import Aligner, align
from dskd_plugin.text.vocabularies import encode

EXAMPLES = int(os.environ.get("DSKD_FUZZ_EXAMPLES", "40"))
fuzz = settings(
    max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), derandomize=EXAMPLES <= 200
)
WHITE = b" \t\n\r\x0b\f"
INK = ["the", "house", "four", "x", "4", "12", "3.14", "def f(x):", "return", "naïve", "é", "漢字", "🙂", "=", "DON'T"]
TAGS = ["<think>", "</think>"]
SPACES = ["", " ", "  ", "\n", "\n\n", "\n    ", "\t", " \n"]
# A tokenizer may put a space after a tag, so that only it could tell whether the text has one.
AFTER_TAGS = ["", "\n", "\n\n"]


@st.composite
def answers(draw):
    """One answer as two templates render it: the same ink, other white space here and there."""
    pieces = draw(st.lists(st.sampled_from(INK + TAGS), max_size=8))
    ours = theirs = draw(st.sampled_from(SPACES))
    if draw(st.booleans()):
        # In front, too, a tokenizer may put a space; with no ink behind it only white space could tell.
        theirs = draw(st.sampled_from(SPACES)) if pieces else ours + draw(st.sampled_from(AFTER_TAGS))
    for piece in pieces:
        white = draw(st.sampled_from(SPACES))
        other = white
        if draw(st.integers(0, 3)) == 0:
            is_plain = white in AFTER_TAGS or piece not in TAGS
            other = draw(st.sampled_from(AFTER_TAGS if piece in TAGS else SPACES)) if is_plain else white
        ours, theirs = ours + piece + white, theirs + piece + other
    return ours, theirs


def runs_of(text):
    """The white space before each byte of ink of a text, and at last that behind it."""
    runs, run = [], b""
    for byte in text.encode():
        if bytes([byte]) in WHITE:
            run += bytes([byte])
        else:
            runs.append(run)
            run = b""
    return [*runs, run]


def places_of(words):
    """For each token: bytes of ink before it, bytes of white space before and behind it up to the next ink."""
    found = []
    for k in range(len(words)):
        before, behind = b"".join(words[:k]), b"".join(words[k:])
        ink = len([byte for byte in before if byte not in WHITE])
        found.append((ink, len(before) - len(before.rstrip(WHITE)), len(behind) - len(behind.lstrip(WHITE))))
    return found


def inked(word):
    return [byte for byte in word if byte not in WHITE]


def at_one_place(i, j, words, places, runs):
    """Whether token i of one side and token j of the other spell the same bytes at the same place."""
    word, other = words[0][i], words[1][j]
    (ink, before, behind), (other_ink, other_before, other_behind) = places[0][i], places[1][j]
    if word != other or ink != other_ink:
        return False
    if inked(word):
        return True
    # A dummy space stands in front of white space, so that its places are counted from behind.
    if runs[0][ink] == runs[1][ink]:
        return behind == other_behind
    at_start, at_end = ink == 0, ink + 1 == len(runs[0])
    return at_start != at_end and (before == other_before if at_end else behind == other_behind)


def touches_a_difference(place, word, runs):
    """Whether white space within a token, or next to it, differs between the two texts."""
    ink = place[0]
    return any(runs[0][k] != runs[1][k] for k in range(ink, ink + len(inked(word)) + 1))


def check(one, other, ours, theirs):
    ids, other_ids = (encode(side.tokenizer, text) for side, text in ((one, ours), (other, theirs)))
    words = spell(one, ids), spell(other, other_ids)
    places, runs = [places_of(side) for side in words], [runs_of(ours), runs_of(theirs)]
    mine, yours = closed(one, ids), closed(other, other_ids)
    why = one.name, other.name, ours, theirs, words
    for pairing in ("exact", "starts"):
        masks = [True] * len(mine), [True] * len(yours)
        found = align(mine, masks[0], yours, masks[1], one.table, other.table, pairing=pairing, with_spans=True)
        pairs = list(zip(found.student_N, found.teacher_N, strict=True))
        for start, stop, begin, end in found.spans:
            spans = b"".join(words[0][start:stop]), b"".join(words[1][begin:end])
            places_inside = places[0][start][0], places[1][begin][0]
            # The first token of a span may spell a dummy space.
            assert spans[0] == spans[1] or spans[0] == b" " + spans[1] or b" " + spans[0] == spans[1], (spans, why)
            assert places_inside[0] == places_inside[1], (spans, why)
        assert pairs and pairs.pop() == (len(ids), len(other_ids)), why
        assert pairs == sorted(pairs) and len({j for _, j in pairs}) == len(pairs), why
        if pairing == "starts":
            for i, j in pairs:  # what one of them spells begins with what the other does
                short = min(len(words[0][i]), len(words[1][j]))
                assert words[0][i][:short] == words[1][j][:short] and places[0][i][0] == places[1][j][0], why
            continue
        for i, j in pairs:
            assert at_one_place(i, j, words, places, runs), (words[0][i], words[1][j], why)
        missing = [
            (words[0][i], words[1][j])
            for i in range(len(ids))
            for j in range(len(other_ids))
            if at_one_place(i, j, words, places, runs)
            and (i, j) not in pairs
            and not apart(words[0], i, words[1], j)
            and not touches_a_difference(places[0][i], words[0][i], runs)
        ]
        assert not missing, (missing, why)


@fuzz
@given(texts=answers(), names=st.lists(st.sampled_from(list(TAGGED)), min_size=4, max_size=4))
def test_tokens_pair_only_where_both_spell_the_same_bytes_at_the_same_place(texts, names):
    for student in names:
        for teacher in names:
            check(load_tagged(student), load_tagged(teacher), *texts)


BLOCKS = ["", "<think>\n\n</think>\n\n", "<think>\nfour, or the 4 house\n</think>\n\n"]


@fuzz
@given(
    texts=answers(),
    block=st.sampled_from(BLOCKS),
    share=st.floats(0, 1),
    cut_teacher=st.booleans(),
    names=st.lists(st.sampled_from(list(TAGGED)), min_size=3, max_size=3),
)
def test_an_answer_that_was_cut_short_pairs_at_its_own_place_or_not_at_all(texts, block, share, cut_teacher, names):
    """block: what the other template writes before the answer, and the template of the cut one does not."""
    ours, theirs = texts[0], block + texts[1]
    if "four" in block and ours.lstrip().startswith("<"):
        return  # the mark that a block begins with could be the answer's
    offset = len(inked(block.encode()))
    for student in names:
        for teacher in names:
            one, other = load_tagged(student), load_tagged(teacher)
            ids, other_ids = encode(one.tokenizer, ours), encode(other.tokenizer, theirs)
            words = spell(one, ids), spell(other, other_ids)
            places = [places_of(side) for side in words]
            ids, other_ids = ids[: round(share * len(ids))], closed(other, other_ids)
            sides = [(one, ids), (other, other_ids)]
            if cut_teacher:
                sides.reverse()
            (a, a_ids), (b, b_ids) = sides
            found = align(a_ids, [True] * len(a_ids), b_ids, [True] * len(b_ids), a.table, b.table)
            pairs = list(zip(found.student_N, found.teacher_N, strict=True))
            why = student, teacher, ours, theirs, words, len(ids), cut_teacher
            for pair in pairs:
                i, j = reversed(pair) if cut_teacher else pair
                assert j < len(words[1]), why  # a text that was cut has no end of turn
                assert words[0][i] == words[1][j] and places[0][i][0] + offset == places[1][j][0], (i, j, why)
            expected = {
                (j, i) if cut_teacher else (i, j)
                for i in range(len(ids))
                for j in range(len(words[1]))
                if words[0][i] == words[1][j]
                and inked(words[0][i])
                and places[0][i][0] + offset == places[1][j][0]
                and not apart(words[0], i, words[1], j)
            }
            # A mark in front could be the answer's or the template's.
            if texts[0] == texts[1] and "four" not in block and not ours.lstrip().startswith("<"):
                assert expected <= set(pairs), (expected - set(pairs), why)


# -- by hand -----------------------------------------------------------------------------------------------------


def paired(one, other, ids, other_ids, **options):
    """What the paired tokens spell, and how many segments have no partner."""
    found = align(ids, [True] * len(ids), other_ids, [True] * len(other_ids), one.table, other.table, **options)
    words = spell(one, ids), spell(other, other_ids)
    return [
        (words[0][i], words[1][j]) for i, j in zip(found.student_N, found.teacher_N, strict=True)
    ], found.unmatched_responses


@pytest.mark.parametrize("teacher", ["qwen-fast", "mistral-first", "byte-level-prefix", "deepseek"])
@pytest.mark.parametrize("student", ["mistral-always", "prepend", "unigram-always", "unigram-slow"])
def test_the_dummy_space_is_decided_for_each_added_token(student, teacher):
    """After one mark the text goes on without a space, after the other with its own."""
    one, other = load_tagged(student), load_tagged(teacher)
    text = "<think>four</think> The answer is 4."
    sides = [closed(entry, encode(entry.tokenizer, text)) for entry in (one, other)]
    pairs, unmatched = paired(one, other, *sides)
    spelled = [a for a, _ in pairs]
    assert not unmatched and pairs[-1] == (b"</s>", spell(other, sides[1])[-1])
    assert {b"<think>", b"</think>", b"."} <= set(spelled) and all(a == b for a, b in pairs[:-1])
    if teacher in ("mistral-first", "qwen-fast") and student != "unigram-slow" and "mistral" in student:
        assert b" The" in spelled and b" answer" in spelled


@fuzz
@given(texts=answers(), name=st.sampled_from(list(TAGGED)))
def test_marks_that_swallow_white_space_pair_with_marks_and_never_with_anything_else(texts, name):
    for sides in ((swallowing("mistral"), load_tagged(name)), (load_tagged(name), swallowing("byte-level"))):
        ids = [encode(entry.tokenizer, text) for entry, text in zip(sides, texts, strict=True)]
        words = [spell(entry, one) for entry, one in zip(sides, ids, strict=True)]
        ink = [[place[0] for place in places_of(side)] for side in words]
        masks = [[True] * (len(one) + 1) for one in ids]
        closed_ids = [closed(entry, one) for entry, one in zip(sides, ids, strict=True)]
        found = align(closed_ids[0], masks[0], closed_ids[1], masks[1], sides[0].table, sides[1].table)
        pairs = set(zip(found.student_N, found.teacher_N, strict=True)) - {(len(ids[0]), len(ids[1]))}
        why = sides, texts, words
        for i, j in pairs:
            assert words[0][i] == words[1][j] and ink[0][i] == ink[1][j], (i, j, why)
        if "untagged" in name:
            continue
        tags = {tag.encode() for tag in TAGS}
        marks = [{(at, word) for at, word in zip(ink[k], words[k], strict=True) if word in tags} for k in (0, 1)]
        spaced = any(b" " in word for side in words for word in side)
        paired_marks = {(ink[0][i], words[0][i]) for i, _ in pairs if words[0][i] in tags}
        # A space before a mark on one side alone parts them, as it does any word.
        assert spaced or paired_marks == marks[0] & marks[1], why


BYTES = ["byte-level", "qwen-fast", "deepseek", "mistral-never"]


@pytest.mark.parametrize(("text", "other_text"), [(" ", "  "), ("\n", "\n\n"), ("", " "), ("\n", " "), ("\n ", "\n")])
def test_white_space_alone_pairs_only_where_it_is_the_same(text, other_text):
    for student in BYTES:
        for teacher in BYTES:
            one, other = load_tagged(student), load_tagged(teacher)
            for ours, theirs in ((text, other_text), (other_text, text)):
                ids, other_ids = (
                    closed(one, encode(one.tokenizer, ours)),
                    closed(other, encode(other.tokenizer, theirs)),
                )
                pairs, _ = paired(one, other, ids, other_ids)
                assert pairs == [(spell(one, ids)[-1], spell(other, other_ids)[-1])]
            ids, other_ids = (closed(entry, encode(entry.tokenizer, text)) for entry in (one, other))
            pairs, _ = paired(one, other, ids, other_ids)
            assert len(pairs) == len(ids) or len(ids) != len(other_ids)


@pytest.mark.parametrize("teacher", ["smollm2", "mistral", "qwen-fast", "gemma-like"])
def test_white_space_that_a_template_changes_costs_the_tokens_that_it_touches(teacher):
    one, other = load("qwen-fast"), load(teacher)
    ids = encode(one.tokenizer, "<think>Simple addition</think>3 + 3 equals 6.")
    other_ids = encode(other.tokenizer, "<think>\nSimple addition\n</think>\n\n3 + 3 equals 6.")
    pairs, unmatched = paired(one, other, closed(one, ids), closed(other, other_ids), pairing="starts")
    spelled = [a for a, _ in pairs]
    assert not unmatched
    assert {b" addition", b"3", b" +", b" equals", b"6", b".", b"<|im_end|>"} <= set(spelled)


@pytest.mark.parametrize(
    ("said", "other_text", "same"),
    [
        ("The answer is 4\u00a0", "The answer is 4", b" answer"),
        ("答えは四です\u3000", "答えは四です", None),
        ("Line one\x85", "Line one", b" one"),
        ("the lamp\u00a0stone", "the lamp stone", b" lamp"),
        ("The answer is four.", "◁think▷◁/think▷The answer is four.", b" answer"),
        ("Das ist klar", "Das ist klar…", b" ist"),
    ],
)
@pytest.mark.parametrize("teacher", ["smollm2", "mistral"])
def test_other_white_space_and_other_letters_cost_no_whole_answer(said, other_text, same, teacher):
    """Templates trim what str.strip strips, which is more than ASCII has."""
    one, other = load("qwen-fast"), load(teacher)
    ids, other_ids = encode(one.tokenizer, said), encode(other.tokenizer, other_text)
    pairs, unmatched = paired(one, other, closed(one, ids), closed(other, other_ids), pairing="starts")
    assert not unmatched and len(pairs) >= 2  # the end of turn is one of them
    assert same is None or same in [a for a, _ in pairs]


def test_unequal_numbers_of_turns_are_matched_in_about_linear_time():
    one, other = load("qwen-fast"), load("smollm2")
    texts = [f"turn {k} is here" for k in range(300)]

    def side(entry, kept):
        ids, response = [], []
        for text in kept:
            part = closed(entry, encode(entry.tokenizer, text))
            asked = encode(entry.tokenizer, "next")
            ids += asked + part
            response += [False] * len(asked) + [True] * len(part)
        return ids, response

    started = time.process_time()
    found = columns(
        one, other, side(one, texts), side(other, texts[:150] + texts[151:]), ends=(one.table.eos, other.table.eos)
    )
    assert len(found) > 299 * 4
    assert time.process_time() - started < 1.5


def test_a_short_answer_that_was_cut_does_not_pair_with_a_later_occurrence():
    one, other = load("qwen-fast"), load("smollm2")
    for said, whole in (
        ("e", "\u00e9t\u00e9 and e or"),
        ("x", "Let x be 4"),
        ("4", "<think>2 + 2 = 4</think>\n\nfour"),
    ):
        ids, other_ids = encode(one.tokenizer, said), closed(other, encode(other.tokenizer, whole))
        assert paired(one, other, ids, other_ids) == ([], 1)


def columns(one, other, *sides, ends):
    """Pairs of rows given as (ids, response) of each side."""
    (ids, response), (other_ids, other_response) = sides
    row = Aligner(one.table, other.table, student_end=ends[0], teacher_end=ends[1]).columns(
        ids, response, other_ids, other_response
    )
    return list(zip(row["aligned_student"], row["aligned_teacher"], strict=True))


def test_an_answer_that_ends_with_the_text_of_an_end_of_turn(zoo):
    """The teacher's template has white space before the end; the student's row may be cut before its end."""
    one, other = zoo("qwen-fast"), zoo("smollm2")
    ends = closed(one, [])[0], closed(other, [])[0]
    answer, said = (encode(entry.tokenizer, "Write <|im_end|>") for entry in (one, other))
    assert (answer[-1], said[-1]) == ends
    gap = encode(other.tokenizer, "\n")
    theirs = [*said, *gap, ends[1]], [True] * len(said) + [False] * len(gap) + [True]
    whole = [(k, k) for k in range(len(answer))]
    found = columns(one, other, ([*answer, ends[0]], [True] * (len(answer) + 1)), theirs, ends=ends)
    assert found == [*whole, (len(answer), len(theirs[0]) - 1)]
    # The same row, cut right after the text, and cut with more to come.
    assert columns(one, other, (answer, [True] * len(answer)), theirs, ends=ends) == whole
    more = encode(other.tokenizer, "Write <|im_end|> to stop")
    rest = [*more, ends[1]], [True] * (len(more) + 1)
    assert columns(one, other, (answer, [True] * len(answer)), rest, ends=ends) == whole
    # And the other way round.
    swapped = columns(other, one, rest, (answer, [True] * len(answer)), ends=ends[::-1])
    assert swapped == whole
