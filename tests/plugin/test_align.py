"""Alignment against a brute-force oracle on the original text, over every ordered pair of tokenizers."""

import json
import os
import random
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizer_zoo import PIECES, apart, closed, letters, spans_in, spell

from dskd_plugin.text.align import align
from dskd_plugin.text.turn_ends import end_of_turn, role_pairs
from dskd_plugin.text.vocabularies import encode, token_table

DATA = Path(os.environ.get("DSKD_DATA", Path(__file__).parents[3] / "shared" / "data"))
EXAMPLES = int(os.environ.get("DSKD_FUZZ_EXAMPLES", "60"))
fuzz = settings(
    max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), derandomize=EXAMPLES <= 200
)

texts = st.one_of(
    st.text(max_size=40),
    st.lists(st.sampled_from(PIECES), max_size=12).map("".join),
    st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=6)), max_size=8).map("".join),
)


def brute_force(ours, theirs, words, other_words):
    """words: what each token spells, with the dummy space that the text lacks."""
    if ours and theirs and max(ours[0][0], theirs[0][0]) == 0:  # a dummy space that one side lacks is not text
        ours, theirs = ([(max(0, s), e) for s, e in side] for side in (ours, theirs))
    return [
        (i, j)
        for i, (s, e) in enumerate(ours)
        for j, (t, f) in enumerate(theirs)
        # The same place is not enough: a token may spell a dummy space beside what it covers.
        if (s, e) == (t, f) and e > s and words[i] == other_words[j] and not apart(words, i, other_words, j)
    ]


def aligned(one, other, ids, other_ids):
    """Pairs of one response, without that of the end of turn, which both sides have."""
    ids, other_ids = closed(one, ids), closed(other, other_ids)
    found = align(ids, [True] * len(ids), other_ids, [True] * len(other_ids), one.table, other.table)
    pairs = list(zip(found.student_N, found.teacher_N, strict=True))
    assert bool(pairs) == (found.unmatched_responses == 0)
    if pairs:
        assert pairs.pop() == (len(ids) - 1, len(other_ids) - 1)
    return pairs


def sound(one, other, ids, other_ids, text, pairs):
    """Each pair covers the same stretch of the original text, as far as the tokenizers can tell."""
    offsets = []
    for entry in (one, other):
        backend = getattr(entry.tokenizer, "backend_tokenizer", None)
        # The library's offsets are wrong where it drops characters.
        encoding = "drops" not in entry.changes and backend and backend.encode(text, add_special_tokens=False)
        offsets.append(encoding and encoding.offsets)
    parts = spell(one, ids), spell(other, other_ids)
    for i, j in pairs:
        a, b = (side[k].decode(errors="replace") for side, k in zip(parts, (i, j), strict=True))
        assert "\ufffd" in a + b or letters(a) == letters(b), (one.name, other.name, text, a, b)
        if all(offsets) and a.strip() and b.strip():
            a, b = (shrink(text, side[k]) for side, k in zip(offsets, (i, j), strict=True))
            # The library gives some tokens the offsets of neighbours (byte fallback, composed characters).
            apart = a[1] <= b[0] or b[1] <= a[0]
            assert not apart or a[0] == a[1] or b[0] == b[1], (one.name, other.name, text, a, b)


def shrink(text, span):
    start, end = span
    while start < end and (text[start].isspace() or text[start] == "▁"):
        start += 1
    while start < end and (text[end - 1].isspace() or text[end - 1] == "▁"):
        end -= 1
    return start, end


@fuzz
@given(text=texts)
def test_every_ordered_pair_of_tokenizers_matches_the_brute_force(whole_zoo, text):
    sides = []
    for entry in whole_zoo:
        ids = encode(entry.tokenizer, text)
        sides.append((entry, ids, spans_in(entry, ids, text)))
    for one, ids, spans in sides:
        for other, other_ids, other_spans in sides:
            pairs = aligned(one, other, ids, other_ids)
            assert pairs == sorted(pairs) and len({j for _, j in pairs}) == len(pairs)
            if spans is not None and other_spans is not None:
                parts = spell(one, ids), spell(other, other_ids)
                assert pairs == brute_force(spans, other_spans, *parts), (one.name, other.name, text)
                # A pair is one word to both vocabularies, so that what one model says can be said by the other.
                assert all(parts[0][i].strip(b" ") == parts[1][j].strip(b" ") for i, j in pairs)
            else:
                sound(one, other, ids, other_ids, text, pairs)


@fuzz
@given(texts=st.lists(texts, min_size=2, max_size=2))
def test_different_texts_never_pair_what_differs(whole_zoo, texts):
    for one in whole_zoo[:: max(1, len(whole_zoo) // 8)]:
        for other in whole_zoo[:: max(1, len(whole_zoo) // 8)]:
            ids, other_ids = encode(one.tokenizer, texts[0]), encode(other.tokenizer, texts[1])
            pairs = aligned(one, other, ids, other_ids)
            parts = spell(one, ids), spell(other, other_ids)
            for i, j in pairs:
                a, b = parts[0][i].decode(errors="replace"), parts[1][j].decode(errors="replace")
                assert "\ufffd" in a + b or letters(a) == letters(b)


@pytest.mark.parametrize("text", ["\ud83d", "a\udc00b", "\ud800\udbff ok"])
def test_lone_surrogates_are_refused_by_the_tokenizer_or_aligned_soundly(whole_zoo, text):
    sides = []
    for entry in whole_zoo:
        try:
            sides.append((entry, encode(entry.tokenizer, text)))
        except (UnicodeEncodeError, TypeError, ValueError, RuntimeError):
            continue
    for one, ids in sides:
        for other, other_ids in sides:
            for i, j in aligned(one, other, ids, other_ids):
                assert spell(one, ids)[i].strip() == spell(other, other_ids)[j].strip()


# The texts differ after normalisation; which tokens of the student must pair all the same and which must not.
NORMALISED = [
    ("smollm2", "qwen", "Cafe\u0301 au lait, s'il vous plai\u0302t", [" au", ","], ["\u0301"]),
    ("mistral", "qwen-fast", "Cafe\u0301 au lait", [" au"], []),
    ("byte-level-lower", "mistral", "The House and THE house", [" and", " house"], []),
    (
        "unigram-nfkc-cf",
        "deepseek",
        "The red house\n\nand the  blue house",
        [" red", " house"],
        [" blue", " and"],
    ),
    (
        "unigram-nfkc-slow",
        "tekken",
        "The red house\n\nand the  river house",
        [" red", " house"],
        [" river", " and"],
    ),
    ("mistral", "byte-level", "a literal ▁ mark and the house", [" and", " house"], []),
    ("unigram-unknown", "byte-level", "the house ☃☃ and the river ☂ is blue", [" river", " blue"], ["<unk>"]),
    ("characters", "smollm2", "the ☃ house are!", ["!"], ["<unk>"]),
]


@pytest.mark.parametrize(("student", "teacher", "text", "present", "absent"), NORMALISED)
def test_normalised_texts_align_where_the_positions_are_certain(zoo, student, teacher, text, present, absent):
    one, other = zoo(student), zoo(teacher)
    ids, other_ids = encode(one.tokenizer, text), encode(other.tokenizer, text)
    pairs = aligned(one, other, ids, other_ids)
    sound(one, other, ids, other_ids, text, pairs)
    paired = [spell(one, ids)[i].decode(errors="replace") for i, _ in pairs]
    assert set(present) <= set(paired) and not set(absent) & set(paired), paired


def conversation(entry, turns, *, before="", after="", end=None, tail=""):
    """Ids and response mask of question-answer turns, from a template with those marks around an answer."""
    ids, response, spans = [], [], []
    end = closed(entry, [])[0] if end is None else end
    for question, answer in turns:
        header = encode(entry.tokenizer, f"\n{question}:\n")
        text = encode(entry.tokenizer, before + answer + after)
        closing = [end, *(encode(entry.tokenizer, tail) if tail else [])]
        spans.append(range(len(ids) + len(header), len(ids) + len(header) + len(text)))
        ids += header + text + closing
        response += [False] * len(header) + [True] * (len(text) + len(closing))
    return ids, response, spans


def expected_pairs(sides, turns):
    """Brute force over each answer on its own; sides: (entry, ids, spans of the answers)."""
    pairs = []
    for turn, (_, answer) in enumerate(turns):
        data = answer.encode()
        parts = [spell(entry, [ids[i] for i in spans[turn]]) for entry, ids, spans in sides]
        wholes = [b"".join(side) for side in parts]
        leads = [whole[: whole.rindex(data)] for whole in wholes]
        trails = [whole[whole.rindex(data) + len(data) :] for whole in wholes]
        # White space that both sides have next to the answer belongs to the text.
        low, high = 0, len(data)
        while -low < min(map(len, leads)) and leads[0][low - 1] == leads[1][low - 1] and leads[0][low - 1] in b" \n":
            low -= 1
        while high - len(data) < min(map(len, trails)) and len({t[high - len(data)] for t in trails}) == 1:
            high += 1
        places = []
        for side, lead in zip(parts, leads, strict=True):
            at, spans = -len(lead), []
            for part in side:
                start = 0 if lead == b" " and low == 0 and at == -1 else at
                spans.append((start, at + len(part)))
                at += len(part)
            places.append(spans)
        pairs += [
            (sides[0][2][turn][i], sides[1][2][turn][j])
            for i, span in enumerate(places[0])
            for j, other in enumerate(places[1])
            if span == other and low <= span[0] < span[1] <= high and not apart(parts[0], i, parts[1], j)
        ]
        pairs.append((sides[0][2][turn].stop, sides[1][2][turn].stop))
    return pairs


TURNS = [
    ("Sum", "Natalia sold 48/2 = 24 clips in May.\nSo 48+24 = 72.\n#### 72"),
    ("Code", "def f(x):\n    return {'é': x}  # naïve 漢字 🙂"),
    ("Short", "4"),
    ("Bye", "Auf Wiedersehen, Привет!"),
]
THINK = "<think>\n\n</think>\n\n"
PAIRS = [
    ("smollm2", "qwen"),
    ("mistral", "qwen-fast"),
    ("qwen-fast", "mistral-slow"),
    ("deepseek", "llama-legacy"),
    ("gemma-like", "tekken"),
    ("unigram", "smollm2"),
    ("byte-level-prefix", "mistral-common"),
]
TEMPLATES = {
    "plain": ({}, {}),
    "thinking teacher": ({}, {"before": THINK}),
    "thinking student, line break after the turn": ({"before": THINK, "tail": "\n"}, {}),
    "trimmed white space": ({"after": "\n"}, {}),
    "both add white space": ({"after": " "}, {"before": "\n", "tail": "\n"}),
    "space after the header": ({"before": " "}, {}),
    "words around the answer": ({}, {"before": "Answer: ", "after": "\nEnd of answer."}),
}


@pytest.mark.parametrize("template", list(TEMPLATES))
@pytest.mark.parametrize(("student", "teacher"), PAIRS)
def test_conversations_align_turn_by_turn_whatever_the_templates(zoo, student, teacher, template):
    mine, yours = TEMPLATES[template]
    one, other = zoo(student), zoo(teacher)
    ids, response, spans = conversation(one, TURNS, **mine)
    other_ids, other_response, other_spans = conversation(other, TURNS, **yours)
    found = align(ids, response, other_ids, other_response, one.table, other.table)
    assert (found.responses, found.unmatched_responses, found.student_tokens) == (len(TURNS), 0, sum(response))
    pairs = list(zip(found.student_N, found.teacher_N, strict=True))
    assert pairs == expected_pairs([(one, ids, spans), (other, other_ids, other_spans)], TURNS)


def test_a_bad_turn_does_not_harm_its_neighbours(zoo):
    one, other = zoo("mistral"), zoo("qwen")
    ids, response, spans = conversation(one, TURNS)
    wrong = [*TURNS[:1], ("Code", "something else"), *TURNS[2:]]
    other_ids, other_response, _ = conversation(other, wrong)
    found = align(ids, response, other_ids, other_response, one.table, other.table)
    assert found.unmatched_responses == 1
    assert not set(found.student_N) & {*spans[1], spans[1].stop}
    assert all(set(found.student_N) & {*spans[k], spans[k].stop} for k in (0, 2, 3))


def test_a_missing_turn_leaves_the_others_paired_by_their_text(zoo):
    one, other = zoo("smollm2"), zoo("mistral")
    ids, response, _ = conversation(one, TURNS)
    other_ids, other_response, _ = conversation(other, TURNS[1:3])
    found = align(ids, response, other_ids, other_response, one.table, other.table)
    assert (found.responses, found.unmatched_responses) == (4, 2)
    there = align(other_ids, other_response, ids, response, other.table, one.table)
    assert sorted(zip(there.teacher_N, there.student_N, strict=True)) == list(
        zip(found.student_N, found.teacher_N, strict=True)
    )
    assert there.unmatched_responses == 0


@pytest.mark.parametrize("cut", [1, 2, 5, 9, 14])
def test_a_truncated_answer_pairs_with_the_start_of_the_other(zoo, cut):
    one, other = zoo("qwen"), zoo("mistral")
    text = "4 is 4 and 2 + 2 is 4, so 4"
    ids, other_ids = encode(one.tokenizer, text)[:cut], closed(other, encode(other.tokenizer, text))
    found = align(ids, [True] * cut, other_ids, [True] * len(other_ids), one.table, other.table)
    whole = spans_in(one, encode(one.tokenizer, text), text)[:cut]
    expected = brute_force(whole, spans_in(other, other_ids[:-1], text), spell(one, ids), spell(other, other_ids[:-1]))
    assert list(zip(found.student_N, found.teacher_N, strict=True)) == expected


def test_special_text_within_an_answer_counts_as_text(zoo):
    one, other = zoo("smollm2"), zoo("qwen")
    turns = [("Q", "Write <|im_end|> and <|endoftext|> to stop <file_sep> now")]
    ids, response, _ = conversation(one, turns)
    other_ids, other_response, _ = conversation(other, turns)
    found = align(ids, response, other_ids, other_response, one.table, other.table)
    names = [one.table.literal[ids[i]] for i in found.student_N]
    assert found.unmatched_responses == 0
    assert b"<|im_end|>" in names[:-1] and b" now" in names and b"<file_sep>" not in names


def test_the_end_of_turn_is_the_given_token_where_several_follow(zoo):
    one, other = zoo("qwen"), zoo("mistral")
    im_end, end_of_text = one.table.literal.index(b"<|im_end|>"), one.table.literal.index(b"<|endoftext|>")
    text = encode(one.tokenizer, "Hello there")
    ids, other_ids = [*text, im_end, end_of_text], [*encode(other.tokenizer, "Hello there"), other.table.eos]
    mask, other_mask = [True] * len(ids), [True] * len(other_ids)
    found = align(ids, mask, other_ids, other_mask, one.table, other.table, student_end=im_end)
    assert found.student_N == [1, 2] and found.teacher_N == [1, 2]


def test_a_first_word_pairs_only_where_both_sides_have_read_the_space(zoo):
    """The dummy prefix: the student's first word is another id than the teacher's, and so are all its alternatives."""
    sentencepiece, byte_level = zoo("mistral"), zoo("qwen")
    for one, other, expected in (
        (sentencepiece, byte_level, [(1, 1)]),
        (byte_level, sentencepiece, [(1, 1)]),
        (sentencepiece, zoo("llama-legacy"), [(0, 0), (1, 1)]),
        (byte_level, zoo("tekken"), [(0, 0), (1, 1)]),
    ):
        ids, other_ids = (encode(entry.tokenizer, "The house") for entry in (one, other))
        assert len(ids) == len(other_ids) == 2
        assert aligned(one, other, ids, other_ids) == expected


SAID = "<think>so</think>"
# The text before the response and the response, for each side; which of the student's words pair.
BEFORE = [
    ("mistral", "", "4 and 5", "qwen", "", "4 and 5", [" and", "5"]),
    ("mistral", "[INST] q [/INST] ", "4 and 5", "qwen", "Q:\n", "4 and 5", [" and", "5"]),
    ("qwen", "A: ", "4 and 5", "llama-legacy", "", "4 and 5", ["4", " and", "5"]),
    ("mistral-always", "", f"{SAID}4 and", "qwen-fast", "", f"{SAID}4 and", ["<think>", "</think>", " and"]),
    ("mistral", "", "The house", "byte-level-lower", "", "The house", [" house"]),
    ("llama-legacy", "", " The house", "qwen", "", " The house", [" The", " house"]),
]


@pytest.mark.parametrize(("student", "before", "text", "teacher", "other_before", "other_text", "expected"), BEFORE)
def test_a_word_pairs_only_where_both_sides_have_read_the_space_before_it(
    zoo, student, before, text, teacher, other_before, other_text, expected
):
    one, other = zoo(student), zoo(teacher)
    found, parts = [], []
    for entry, prompt, answer in ((one, before, text), (other, other_before, other_text)):
        ids = closed(entry, encode(entry.tokenizer, prompt + answer))
        words = spell(entry, ids[:-1])
        lengths = [len(b"".join(words[k:])) for k in range(len(words))]
        start = sum(length >= len(answer.encode()) for length in lengths) - 1 if prompt else 0
        found.append((ids, [k >= start for k in range(len(ids))]))
        parts.append(words)
    paired = align(*found[0], *found[1], one.table, other.table).student_N[:-1]
    said = [parts[0][i].decode() for i in paired]
    assert [word for word in said if word.strip()] == expected


def test_unknown_text_leaves_gaps_and_never_shifts(zoo):
    one, other = zoo("unigram-unknown"), zoo("byte-level")
    text = "the ☃ house ☃ the ☃ river ☃ house."
    ids, other_ids = encode(one.tokenizer, text), encode(other.tokenizer, text)
    pairs = aligned(one, other, ids, other_ids)
    assert pairs and not {i for i, _ in pairs} & {k for k, token in enumerate(ids) if token in one.table.vague}
    sound(one, other, ids, other_ids, text, pairs)


def test_empty_responses_and_empty_masks(zoo):
    table, other = zoo("qwen").table, zoo("mistral").table
    end = closed(zoo("qwen"), [])[0]
    none = align([5, 6], [False, False], [7], [False], table, other)
    assert (none.student_N, none.responses, none.student_tokens) == ([], 0, 0)
    empty = align([5, end], [False, True], [7, other.eos], [False, True], table, other)
    assert (empty.student_N, empty.teacher_N, empty.unmatched_responses) == ([1], [1], 0)
    with pytest.raises(ValueError, match=r"student response mask: expected one value per token \(2\), got 1"):
        align([5, 6], [True], [7], [True], table, other)


def test_identity_pairs_every_token_and_falls_back_to_bytes(zoo):
    entry = zoo("smollm2")
    ids, response, spans = conversation(entry, TURNS, tail="\n")
    other_ids, other_response, _ = conversation(entry, TURNS, before=THINK)
    same = align(ids, response, [9, *ids], [False, *response], entry.table, entry.table, identity=True)
    assert same.student_N == [i for i, inside in enumerate(response) if inside]
    assert same.teacher_N == [i + 1 for i in same.student_N]
    other = align(ids, response, other_ids, other_response, entry.table, entry.table, identity=True)
    assert other.unmatched_responses == 0
    assert {i for span in spans for i in span} - set(other.student_N) == set()


def test_gsm8k_answers_reach_what_the_bytes_allow(zoo):
    file = DATA / "gsm8k" / "test.jsonl"
    if not file.exists():
        pytest.skip(f"no GSM8K answers at {file}; set DSKD_DATA")
    answers = [json.loads(line)["answer"] for line in file.read_text().splitlines()[:200]]
    for student, teacher in (("mistral", "qwen"), ("qwen", "mistral"), ("smollm2", "qwen")):
        one, other = zoo(student), zoo(teacher)
        tokens = paired = possible = 0
        for answer in answers:
            ids, other_ids = encode(one.tokenizer, answer), encode(other.tokenizer, answer)
            tokens += len(ids)
            paired += len(aligned(one, other, ids, other_ids))
            places = spans_in(one, ids, answer), spans_in(other, other_ids, answer)
            possible += len(brute_force(*places, spell(one, ids), spell(other, other_ids)))
        print(f"GSM8K {student} -> {teacher}: {paired}/{tokens} student tokens, {possible} possible")
        assert paired == possible
        assert paired >= 0.85 * tokens


@pytest.mark.parametrize(("student", "teacher"), [("mistral", "qwen"), ("unigram-nfkc-cf", "deepseek")])
def test_eight_thousand_tokens_align_in_linear_time(zoo, student, teacher):
    one, other = zoo(student), zoo(teacher)
    rng, words = random.Random(1), ["The", "Red", "house", "12", "left.", "naïve", "你好", "\n\n(x)", "="]
    seconds = []
    for size in (8000, 32000):
        ids = closed(one, encode(one.tokenizer, " ".join(rng.choice(words) for _ in range(size * 2)))[:size])
        text = b"".join(one.table.literal[i] or b"" for i in ids[:-1]).decode(errors="ignore")
        other_ids = closed(other, encode(other.tokenizer, text))
        masks = [True] * len(ids), [True] * len(other_ids)
        best = float("inf")
        for _ in range(5):
            start = time.process_time()
            found = align(ids, masks[0], other_ids, masks[1], one.table, other.table)
            best = min(best, time.process_time() - start)
        assert found.student_N
        seconds.append(best)
    print(f"{student} -> {teacher}: {seconds[0] * 1000:.0f} ms for 8000 tokens")
    assert seconds[0] < 0.1 and seconds[1] < 8 * seconds[0]


CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
LLAMA2 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("name", "template", "token"),
    [
        ("qwen-fast", CHATML, b"<|im_end|>"),
        ("smollm2", None, b"<|im_end|>"),
        ("smollm2", CHATML, b"<|im_end|>"),
        ("smollm2", CHATML.replace("im_end", "endoftext"), b"<|endoftext|>"),  # its unknown token
        ("mistral", LLAMA2, b"</s>"),
        ("deepseek", LLAMA2, "<｜end▁of▁sentence｜>".encode()),
        ("gemma-like", CHATML.replace("im_end|", "end_of_turn").replace("<|end", "<end"), b"<end_of_turn>"),
        ("llama-legacy", CHATML.replace("im_end", "end"), b"<|end|>"),
        ("mistral", "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", b"</s>"),
    ],
)
def test_end_of_turn_comes_from_the_template(zoo, name, template, token):
    entry = zoo(name)
    assert entry.table.literal[end_of_turn(entry.tokenizer, template, entry.table)] == token


LETTERS = ["byte-level-partial", "unigram-nfkc-cf", "unigram-nfkc-slow", "unigram-unknown", "characters"]


@pytest.mark.parametrize("change", ["", "| upper", "| lower", "| trim | title"])
@pytest.mark.parametrize("name", LETTERS)
def test_the_end_of_turn_stands_behind_an_answer_whose_letters_a_vocabulary_lacks(tokenizer_zoo, name, change):
    tokenizer = tokenizer_zoo.ZOO[name][0]()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    table, end = token_table(tokenizer), tokenizer.convert_tokens_to_ids("<|im_end|>")
    ids = tokenizer("Quebec", add_special_tokens=False)["input_ids"]
    assert b"quebec" not in b"".join(table.literal[token] or b"" for token in ids).lower()
    template = CHATML.replace("m.content", f"m.content {change}")
    for shown in (template, template.replace("<|im_end|>", "\n<|im_end|>")):
        assert end_of_turn(tokenizer, shown, table) == end != table.eos
    # Where no end follows, and where the answer is not there.
    for silent in (template.replace("<|im_end|>", ""), template.replace("m.content", "'red'")):
        assert end_of_turn(tokenizer, silent, table) == table.eos


def test_end_of_turn_says_which_template_failed(zoo):
    entry = zoo("mistral")
    with pytest.raises(
        ValueError, match=r"chat template: expected one that renders .* got .*no system.*Choose another"
    ):
        end_of_turn(entry.tokenizer, "{{ raise_exception('no system') }}", entry.table)


def test_role_pairs_join_end_of_turn_and_end_of_sequence(zoo):
    one, other = zoo("mistral"), zoo("qwen-fast")
    chat, base = (2, 151645), (2, 151643)
    assert role_pairs([chat], one.table, other.table) == [chat]
    assert role_pairs([base], one.table, other.table) == [base, chat]
    assert role_pairs([base, chat], one.table, other.table) == [base, chat]
    assert role_pairs([(None, 151643)], one.table, other.table) == [chat]
    assert role_pairs([], one.table, zoo("byte-level").table) == [(2, 0)]


def test_whole_rendered_conversations_align(zoo):
    """Templates rendered and tokenized as one string; the masks from the character offsets of the answers."""
    sides = []
    for name, style in (("mistral", LLAMA2), ("qwen-fast", CHATML)):
        entry = zoo(name)
        messages = [
            {"role": role, "content": text}
            for turn in TURNS
            for role, text in zip(("user", "assistant"), turn, strict=True)
        ]
        text = entry.tokenizer.apply_chat_template(messages, chat_template=style, tokenize=False)
        encoding = entry.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, places, inside, at = encoding["input_ids"], encoding["offset_mapping"], [False] * len(text), 0
        end = len("</s>") if name == "mistral" else len("<|im_end|>")
        for question, answer in TURNS:
            at = text.index(answer, text.index(question, at) + len(question) + 5)
            inside[at : at + len(answer) + end] = [True] * (len(answer) + end)
            at += len(answer)
        sides.append((entry, ids, [any(inside[s:e]) for s, e in places]))
    (one, ids, response), (other, other_ids, other_response) = sides
    found = align(ids, response, other_ids, other_response, one.table, other.table)
    assert (found.responses, found.unmatched_responses) == (len(TURNS), 0)
    assert len(found.student_N) > 0.6 * found.student_tokens
    for i, j in zip(found.student_N, found.teacher_N, strict=True):
        a, b = one.table.literal[ids[i]], other.table.literal[other_ids[j]]
        assert a == b or (a, b) == (b"</s>", b"<|im_end|>")


def test_a_turn_may_end_with_a_token_that_swallows_white_space(zoo):
    one, other = zoo("llama-legacy"), zoo("qwen-fast")
    text = "<|assistant|>\nHello there<|end|>\n"
    ids, response = encode(one.tokenizer, text), [False]
    response += [True] * (len(ids) - 1)
    other_ids = [*encode(other.tokenizer, "Hello there"), other.table.eos]
    found = align(ids, response, other_ids, [True] * len(other_ids), one.table, other.table)
    names = [one.table.literal[ids[i]] for i in found.student_N]
    assert found.unmatched_responses == 0 and names[-1] == b"<|end|>" and found.teacher_N[-1] == len(other_ids) - 1


def test_a_space_after_an_added_token_is_no_text_where_the_tokenizer_puts_one(zoo):
    one, other = zoo("mistral-always"), zoo("qwen-fast")
    text = "<think>so</think>Hello there"
    ids, other_ids = encode(one.tokenizer, text), encode(other.tokenizer, text)
    assert b"".join(one.table.literal[i] for i in ids) == b"<think> so</think> Hello there"
    pairs = aligned(one, other, ids, other_ids)
    names = [(one.table.literal[ids[i]], other.table.literal[other_ids[j]]) for i, j in pairs]
    # " so" and " Hello" cover the text of "so" and "Hello" but are other words to their models.
    assert names == [(b"<think>", b"<think>"), (b"</think>", b"</think>"), (b" there", b" there")]


def test_ids_beyond_the_table_are_named(zoo):
    table = zoo("byte-level").table
    with pytest.raises(ValueError, match=r"response token ids: expected ids below 1200, got 5 to 1200"):
        align([5, 1200], [True, True], [5], [True], table, table)
