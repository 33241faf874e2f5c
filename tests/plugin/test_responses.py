"""Where the responses of a row run: the end of sequence that a template puts behind the end of turn is none."""

import pytest
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st
from tokenizer_zoo import PIECES, load

from dskd_plugin.text.align import Aligner
from dskd_plugin.text.responses import answers, responses_of
from dskd_plugin.text.vocabularies import encode

NAMES = ["qwen-fast", "smollm2", "gemma-like", "tekken-fast", "mistral"]
# What of an answer is trained on: its end of turn, and an end of sequence behind it.
FORMS = {"ended": (True, False), "closed": (True, True), "closed alone": (False, True), "open": (False, False)}
texts = st.lists(st.sampled_from(PIECES), min_size=1, max_size=6).map("".join)


def end_of(entry):
    """A special token for the end of turn, which is not the end of sequence."""
    table = entry.table
    return min(table.special - table.vague - {table.eos, table.unknown})


def turns(entry, said, form, gap):
    """A row of answers: ids, what is trained on, which are the answers with all ends, places of the ends of sequence.

    A token between an end of turn and the end of sequence behind it is white space.
    """
    ends, closes = FORMS[form]
    ids, trained, inside, closings = [], [], [], []
    for text in said:
        asked, answer = encode(entry.tokenizer, "Q: what?"), encode(entry.tokenizer, text)
        white = encode(entry.tokenizer, gap)
        if not answer or len(white) > 2 or any((entry.table.literal[k] or b"x").strip() for k in white):
            reject()
        ids += [*asked, *answer, end_of(entry), *white, entry.table.eos]
        trained += [False] * len(asked) + [True] * len(answer) + [ends] + [False] * len(white) + [closes]
        behind = [closes] * (len(white) + 1)
        inside += [False] * len(asked) + [True] * len(answer) + [ends or closes] + behind
        closings.append(len(ids) - 1)
    return ids, trained, inside, closings


def aligner(one, other, **rules):
    return Aligner(one.table, other.table, student_end=end_of(one), teacher_end=end_of(other), **rules)


def pairs(rules, *sides):
    row = rules.columns(*(value for side in sides for value in side[:2]))
    return set(zip(row["aligned_student"], row["aligned_teacher"], strict=True)), row["unmatched_responses"]


def without_closings(row):
    ids, trained, _, closings = row
    return ids, [inside and k not in closings for k, inside in enumerate(trained)]


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(
    said=st.lists(texts, min_size=1, max_size=3),
    names=st.tuples(st.sampled_from(NAMES), st.sampled_from(NAMES)),
    forms=st.tuples(st.sampled_from(list(FORMS)), st.sampled_from(list(FORMS))),
    gaps=st.tuples(st.sampled_from(["", "\n"]), st.sampled_from(["", "\n", " "])),
)
def test_an_answer_pairs_as_without_what_closes_it_and_ends_of_sequence_pair_with_each_other(said, names, forms, gaps):
    one, other = map(load, names)
    ours, theirs = (turns(entry, said, form, gap) for entry, form, gap in zip((one, other), forms, gaps, strict=True))
    rules = aligner(one, other)
    found, unmatched = pairs(rules, ours, theirs)
    expected, lonely = pairs(rules, without_closings(ours), without_closings(theirs))
    assert unmatched == lonely
    extra = found - expected
    assert expected <= found and extra <= set(zip(ours[3], theirs[3], strict=True))
    apart = [form == "closed alone" or (form == "closed" and gap) for form, gap in zip(forms, gaps, strict=True)]
    if all(apart) and not lonely:
        assert len(extra) == len(said)
    elif not all(FORMS[form][1] for form in forms):
        assert not extra


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(
    said=st.lists(texts, min_size=1, max_size=3),
    name=st.sampled_from(NAMES),
    form=st.sampled_from(list(FORMS)),
    gap=st.sampled_from(["", "\n", " "]),
)
def test_an_answer_goes_on_to_what_closes_it(said, name, form, gap):
    entry = load(name)
    ids, trained, inside, _ = turns(entry, said, form, gap)
    assert answers(ids, trained, entry.table, end_of(entry)) == inside
    assert len(responses_of(ids, trained, entry.table, end_of(entry))) == len(said)


@pytest.mark.parametrize("pairing", ["exact", "starts", "bytes", "position", "warped", "all"])
def test_ends_of_sequence_pair_under_every_rule(zoo, pairing):
    one, other = zoo("smollm2"), zoo("gemma-like")
    ours = turns(one, ["The red house", "blue"], "closed alone", "\n")
    theirs, bare = (turns(other, ["The red house", "blue"], form, "\n") for form in ("closed", "ended"))
    rules = aligner(one, other, pairing=pairing, spans=True)
    columns = [rules.columns(*ours[:2], *side[:2]) for side in (theirs, bare)]
    for row, partners in zip(columns, (theirs[3], []), strict=True):
        assert row["unmatched_responses"] == 0
        assert [k for k in row["aligned_student"] if k in ours[3]] == ours[3][: len(partners)]
        assert [k for k in row["aligned_teacher"] if k in theirs[3]] == partners
        if pairing == "bytes":
            assert len(row["aligned_offset"]) == len(row["aligned_more"]) == len(row["aligned_student"])


def test_one_tokenizer_pairs_what_closes_an_answer_too(zoo):
    entry = zoo("smollm2")
    row = turns(entry, ["The red house", "blue"], "closed", "\n")
    found, unmatched = pairs(aligner(entry, entry, identity=True), row, row)
    assert found == {(k, k) for k, inside in enumerate(row[1]) if inside} and not unmatched
    bare = turns(entry, ["The red house", "blue"], "closed alone", "\n")
    found, unmatched = pairs(aligner(entry, entry, identity=True), row, bare)
    assert found == {(k, k) for k, inside in enumerate(bare[1]) if inside} and not unmatched


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(
    answer=texts,
    around=st.tuples(*[st.sampled_from(["", "<a>so</a>", "<think></think>", "\n", " "])] * 2),
    names=st.tuples(st.sampled_from(NAMES), st.sampled_from(NAMES)),
    ends=st.tuples(st.booleans(), st.booleans()),
)
def test_a_whole_answer_without_an_end_pairs_as_with_one(answer, around, names, ends):
    one, other = map(load, names)
    rows, whole = [], []
    for entry, before, has_end in zip((one, other), around, ends, strict=True):
        ids = encode(entry.tokenizer, before + answer)
        if not ids or not entry.table.special.isdisjoint(ids):
            reject()  # a special token may be text or an end
        rows.append(([*ids, end_of(entry)], [True] * (len(ids) + 1)))
        whole.append(rows[-1] if has_end else (ids, [True] * len(ids)))
    expected, unmatched = pairs(aligner(one, other, whole=True), *rows)
    found, lonely = pairs(aligner(one, other, whole=True), *whole)
    last = tuple(len(row[0]) - 1 for row in rows)
    assert lonely == unmatched and found == (expected if all(ends) else expected - {last})


def test_a_cut_answer_is_no_whole_one(zoo):
    one, other = zoo("qwen-fast"), zoo("smollm2")
    ids, theirs = encode(one.tokenizer, "4"), encode(other.tokenizer, "<think>2 + 2 = 4</think>\n\nfour")
    sides = (ids, [True] * len(ids)), ([*theirs, end_of(other)], [True] * (len(theirs) + 1))
    assert pairs(aligner(one, other), *sides) == (set(), 1)
    text = encode(one.tokenizer, "<think>2 + 2 = 4</think>\n\nfour, and so")
    sides = (text, [True] * len(text)), sides[1]
    assert len(pairs(aligner(one, other), *sides)[0]) == 0
    assert pairs(aligner(one, other, whole=True), *sides)[1] == 0


# A row of the tokens of "red", (E)nd of turn, end of (S)equence, (I) another special token, a line break and a word;
# below each, whether it is trained on; how many responses that makes.
WHITE = ("r E n E", "x x . x", 1)
ROWS = [
    ("r E S", "x x .", 1),
    ("r E S", "x x x", 1),
    ("r E S", "x . x", 1),
    ("r E n S", "x x . x", 1),
    ("r E n S", "x . . x", 1),
    ("r E n n S", "x . . . x", 1),
    ("r E I S", "x x . x", 1),
    ("r E I n S", "x . . . x", 1),
    ("r S E n S", "x x . . x", 1),
    ("r E n S S", "x x . x x", 1),
    # Behind the turn of another, behind a text, behind no end of turn at all, too far away, or an answer.
    ("r E S I r E S", "x x x . x x x", 2),
    ("r E w S", "x x . x", 2),
    ("r n S", "x . x", 2),
    ("r I S", "x . x", 2),
    ("r E n n n n S", "x x . . . . x", 2),
    ("r E n S w", "x x . x x", 2),
    WHITE,
    ("r E I E", "x x . x", 2),
    ("r E n S n S", "x x . x . x", 2),
]


@pytest.mark.parametrize(("tokens", "trained", "number"), ROWS)
def test_which_runs_close_a_response(zoo, tokens, trained, number):
    entry = zoo("smollm2")
    table = entry.table
    word, other, line = (encode(entry.tokenizer, text) for text in ("red", " house", "\n"))
    assert len(word) == len(other) == len(line) == 1
    end = end_of(entry)
    special = min(table.special - table.vague - {table.eos, table.unknown, end})
    ids = [
        {"r": word[0], "w": other[0], "n": line[0], "E": end, "S": table.eos, "I": special}[k] for k in tokens.split()
    ]
    response = [sign == "x" for sign in trained.split()]
    inside = answers(ids, response, table, end)
    assert len(responses_of(ids, inside, table, end)) == number
    if (tokens, trained, number) != WHITE:  # an end of turn behind white space, which `gaps` is for
        assert len(responses_of(ids, response, table, end)) == number
    assert all(now for now, before in zip(inside, response, strict=True) if before)


def test_a_line_break_before_the_end_of_sequence_may_be_unknown(zoo):
    entry = zoo("characters")
    table, end = entry.table, end_of(entry)
    said, white = encode(entry.tokenizer, "red"), encode(entry.tokenizer, "\n")
    assert white == [table.unknown]
    ids = [*said, end, *white, table.eos]
    for ended in (True, False):
        response = [True] * len(said) + [ended, False, True]
        assert answers(ids, response, table, end) == [True] * len(ids)
        assert len(responses_of(ids, response, table, end)) == 1


def test_where_one_token_ends_turns_and_sequences_each_ends_an_answer(zoo):
    entry = zoo("smollm2")
    (word,), eos = encode(entry.tokenizer, "red"), entry.table.eos
    ids, response = [word, eos, *encode(entry.tokenizer, " x"), eos], [True, True, False, True]
    assert len(responses_of(ids, response, entry.table, eos)) == 2
