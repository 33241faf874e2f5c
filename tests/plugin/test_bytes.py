"""Rows that begin inside a teacher token, on real tokenizers: where they stand, and what a sure teacher says there."""

import itertools
import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizer_zoo import PIECES, ZOO, apart, closed, load, spans_in, spell

from dskd_plugin.core.divergences import forward_kl
from dskd_plugin.core.prefixes import PrefixCompare
from dskd_plugin.text.align import align
from dskd_plugin.text.pieces import vocabulary_events
from dskd_plugin.text.prefix_maps import maps_by_events, maps_by_ids
from dskd_plugin.text.tokens import overlap
from dskd_plugin.text.vocabularies import encode

EXAMPLES = int(os.environ.get("DSKD_FUZZ_EXAMPLES", "20"))
fuzz = settings(
    max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), derandomize=EXAMPLES <= 200
)
CODE = (
    "def area_of(cost, n):\n    return [cost[i]*201 for i in range(n)]  # naïve 漢字 🙂\n\n\nprint(area_of([3.14], 1))"
)
PAIRS = [
    ("smollm2", "qwen-fast", False),
    ("smollm2", "qwen-fast", True),
    ("qwen-fast", "smollm2", True),
    ("qwen", "smollm2", False),
    ("mistral", "qwen-fast", False),
    ("deepseek", "mistral", False),
    ("tekken", "qwen", False),
    ("byte-level-doubles", "qwen-fast", False),
]


def placed(one, other, ids, other_ids):
    """Rows of one response with what the teacher's tokens are there, without that of the end of turn."""
    ids, other_ids = closed(one, ids), closed(other, other_ids)
    options = {"student_end": ids[-1], "teacher_end": other_ids[-1], "pairing": "bytes"}
    found = align(ids, [True] * len(ids), other_ids, [True] * len(other_ids), one.table, other.table, **options)
    rows = list(zip(found.student_N, found.teacher_N, found.offsets_N, found.more_N, strict=True))
    if rows:
        assert rows.pop() == (len(ids) - 1, len(other_ids) - 1, 0, 0)
    return rows


def by_hand(ours, theirs, words, other_words):
    """Every token of the student whose bytes lie in tokens of the teacher; -1 is the place of a dummy space.

    A dummy space that one side lacks is not text.
    """
    found = []
    begins = max(ours[0][0], theirs[0][0]) if ours and theirs else 0
    for i, (start, end) in enumerate(ours):
        for j, (begin, stop) in enumerate(theirs):
            first = max(start, begins)
            if not (end > first and max(begin, begins) <= first < stop):
                continue
            if start == begin and apart(words, i, other_words, j):
                continue  # other white space was read before
            more = next(k for k in range(len(theirs) - j) if theirs[j + k][1] >= end)
            found.append((i, j, start - begin, more))
    return found


@fuzz
@given(
    text=st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=6)), max_size=8).map("".join),
    names=st.lists(st.sampled_from(list(ZOO)), min_size=4, max_size=4),
)
def test_rows_stand_where_the_bytes_say(text, names):
    for student, teacher in itertools.product(names, names):
        one, other = load(student), load(teacher)
        ids, other_ids = encode(one.tokenizer, text), encode(other.tokenizer, text)
        rows = placed(one, other, ids, other_ids)
        words, other_words = spell(one, ids), spell(other, other_ids)
        why = student, teacher, text, words, other_words
        for i, j, offset, more in rows:
            spelled = b"".join(other_words[j : j + more + 1])
            assert spelled[max(0, offset) :].startswith(words[i][max(0, -offset) :]), why
            # No teacher token too many, and none that begins behind the row.
            assert offset < len(other_words[j]), why
            assert len(b"".join(other_words[j : j + more])) - offset < len(words[i]), why
        places = spans_in(one, ids, text), spans_in(other, other_ids, text)
        if None in places:
            continue
        known = [entry.table.bytes for entry in (one, other)]
        expected = [
            (i, j, offset, more)
            for i, j, offset, more in by_hand(*places, words, other_words)
            if known[0][ids[i]] is not None and None not in [known[1][k] for k in other_ids[j : j + more + 1]]
        ]
        assert rows == expected, why


@pytest.mark.parametrize(
    ("student", "teacher", "first"),
    [
        ("mistral", "qwen-fast", (0, 0, -1, 0)),
        ("qwen-fast", "mistral", (0, 0, 1, 0)),
        ("mistral", "llama-legacy", (0, 0, 0, 0)),
    ],
)
def test_a_first_word_with_a_dummy_space_on_one_side_alone(zoo, student, teacher, first):
    one, other = zoo(student), zoo(teacher)
    ids, other_ids = (encode(entry.tokenizer, "The house") for entry in (one, other))
    assert placed(one, other, ids, other_ids)[0] == first


CHANGED = [
    ("mistral", "byte-level-lower", "The House and THE house", [b" and", b" house"], [b" House"]),
    ("byte-level-lower", "mistral", "The House and THE house", [b" and"], []),
    ("smollm2", "qwen", "Cafe\u0301 au lait", [b" au"], [b"\xcc\x81"]),
    ("unigram-unknown", "byte-level", "the house ☃☃ and the river ☂ is blue", [b" blue"], [b"<unk>"]),
]


@pytest.mark.parametrize(("student", "teacher", "text", "present", "absent"), CHANGED)
def test_rows_whose_bytes_are_changed_by_one_side_have_no_target(zoo, student, teacher, text, present, absent):
    one, other = zoo(student), zoo(teacher)
    ids, other_ids = encode(one.tokenizer, text), encode(other.tokenizer, text)
    words, other_words = spell(one, ids), spell(other, other_ids)
    rows = placed(one, other, ids, other_ids)
    said = [words[i] for i, *_ in rows]
    assert set(present) <= set(said) and not set(absent) & set(said), said
    for i, j, offset, more in rows:
        spelled = b"".join(other_words[j : j + more + 1])
        assert spelled[max(0, offset) :].startswith(words[i][max(0, -offset) :])
    assert len(rows) < len(ids)


def compared(one, other, by_events):
    sizes = one.table.vocab_size, other.table.vocab_size
    shared = overlap(one.table, other.table)
    if not by_events:
        maps = maps_by_ids(one.table, other.table, shared.teacher_to_student_V.tolist(), sizes[0], torch.device("cpu"))
        return maps, PrefixCompare(forward_kl, 1.0, maps.together, maps.residual + 1)
    events = vocabulary_events((one.tokenizer, one.table), (other.tokenizer, other.table), [], ids=sizes)
    maps = maps_by_events(one.table, other.table, events, torch.device("cpu"))
    return maps, PrefixCompare(forward_kl, 1.0, maps.together, maps.residual + 1, events.student_V)


@pytest.mark.parametrize(("student", "teacher", "by_events"), PAIRS)
def test_every_token_of_code_has_a_target_and_a_certain_teacher_says_the_text(zoo, student, teacher, by_events):
    """The teacher is all but certain of its next token: the mass is on the longest token that the text goes on with."""
    one, other = zoo(student), zoo(teacher)
    ids, other_ids = (encode(entry.tokenizer, CODE) for entry in (one, other))
    rows = placed(one, other, ids, other_ids)
    # A dummy space that is a token is none of the text.
    assert len(rows) >= len(ids) - 1
    assert any(offset > 0 or more for *_, offset, more in rows)
    logits = torch.full((len(other_ids), other.table.vocab_size), 0.0, dtype=torch.float64)
    logits[torch.arange(len(other_ids)), torch.tensor(other_ids)] = 60.0
    maps, compare = compared(one, other, by_events)
    reach = [(ids[i], offset, other_ids[j], other_ids[j + 1 : j + 1 + more]) for i, j, offset, more in rows]
    further = [k for _, j, _, more in rows for k in range(j + 1, j + 1 + more)]
    places = maps.places(*zip(*reach, strict=True)).of_states(logits[further])
    target = compare.target(logits[[j for _, j, _, _ in rows]], places, lambda states: states, rows=16).exp()
    torch.testing.assert_close(target.sum(-1), torch.ones(len(rows), dtype=torch.float64), rtol=0, atol=1e-12)
    words, known = spell(other, other_ids), one.table.bytes
    for n, (i, j, offset, more) in enumerate(rows):
        lead = (known[ids[i]] or b"")[: max(0, -offset)]
        said = lead + b"".join(words[j : j + more + 1])[max(0, offset) :]
        likeliest = int(target[n].argmax())
        assert target[n, likeliest] > 0.999
        if not by_events:
            assert known[likeliest] == max((text for text in known if text and said.startswith(text)), key=len)
        # What a tokenizer makes of white space depends on what follows it.
        elif offset == 0 and words[j].strip():
            assert likeliest == int(compare.student_V[ids[i]]), (words[j], known[ids[i]])
