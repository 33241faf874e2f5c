"""Token bytes of every tokenizer of the zoo, against the text they were made from."""

import json
import os
import pickle
import subprocess
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dskd_plugin.text.tokens import TokenTable, ids_of_bytes, overlap, places, same_tokenizer, spell
from dskd_plugin.text.vocabularies import encode, token_table

EXAMPLES = int(os.environ.get("DSKD_FUZZ_EXAMPLES", "40"))
TEXTS = [
    "Hello world",
    " leading and trailing ",
    "a  b   c\n\n\td\r\n",
    "naïve café 漢字 한국어 שלום नमस्ते 👍🏽 👨‍👩‍👧 \u0301",
    "def f(x):\n    return {'a': [1, 2, 3.14]}  # ok\n",
    "3 + 4 = 7, $5.00; 1234567890",
    "0x0A Ġ ċ [INST]",
    "\x07\x1b[0m\u200b\ufeff\ufffd",
]


def spelled(entry, text):
    return b"".join(entry.table.literal[i] for i in encode(entry.tokenizer, text))


@pytest.mark.parametrize("text", TEXTS)
def test_token_bytes_spell_the_text(zoo, zoo_name, text):
    entry = zoo(zoo_name)
    if "drops" in entry.changes:
        pytest.skip("drops characters without a token")
    if entry.changes:
        text = text.lower().replace("\u0301", "").encode("ascii", "ignore").decode()
    ids = encode(entry.tokenizer, text)
    if entry.table.vague & set(ids):
        pytest.skip("has no token for one of the characters")
    got, want = spelled(entry, text), text.encode()
    if {"NFKC", "folds"} & set(entry.changes):  # those of NFKC fold white space as well
        got, want = b" ".join(got.split()), b" ".join(want.split())
    assert got in (want, b" " + want)


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), derandomize=EXAMPLES <= 200)
@given(text=st.text(max_size=60))
def test_tokenizers_that_leave_text_alone_are_spelled_exactly(whole_zoo, text):
    text = text.replace("▁", "_")  # a space to SentencePiece
    for entry in whole_zoo:
        if not entry.changes:
            assert spelled(entry, text) in (text.encode(), b" " + text.encode()), entry


def test_every_id_has_its_bytes_or_is_special(zoo, zoo_name):
    table = zoo(zoo_name).table
    assert len(table.bytes) == len(table.literal) == table.vocab_size
    for token_id, text in enumerate(table.bytes):
        hidden = token_id in table.special or token_id in table.vague or not table.literal[token_id]
        assert (text is None) == hidden and text in (None, table.literal[token_id])


def test_decoding_agrees_with_the_bytes(zoo, zoo_name):
    """Whole texts only: decoding single tokens loses partial characters and leading spaces."""
    entry = zoo(zoo_name)
    if entry.changes or not hasattr(entry.tokenizer, "backend_tokenizer"):
        pytest.skip("changes the text, or decodes byte tokens by their names")
    text = "It's 12 o'clock\n  if a_b != 3: naïve"
    ids = encode(entry.tokenizer, text)
    decoded = entry.tokenizer.decode(ids)
    assert spelled(entry, text).decode().strip() == decoded.strip() == text


@pytest.mark.parametrize(
    ("name", "kind", "dummy", "everywhere", "changes"),
    [
        ("smollm2", "byte-level", False, False, "none"),
        ("qwen", "tiktoken", False, False, "NFC"),
        ("qwen-fast", "byte-level", False, False, "NFC"),
        ("tekken", "tekken", False, False, "none"),
        ("mistral", "sentencepiece", True, False, "none"),
        ("mistral-always", "sentencepiece", True, True, "none"),
        ("mistral-never", "sentencepiece", False, False, "none"),
        ("mistral-slow", "sentencepiece", True, True, "none"),
        ("llama-legacy", "sentencepiece", True, True, "none"),
        ("gemma-like", "sentencepiece", False, False, "none"),
        ("byte-level-prefix", "byte-level", True, True, "none"),
        ("byte-level-partial", "byte-level", False, False, "characters without a token are dropped"),
        ("unigram-nfkc-cf", "sentencepiece", True, True, "NFKC, Lowercase"),
        ("unigram-nfkc-slow", "sentencepiece", True, True, "Precompiled, white space collapsed"),
    ],
)
def test_what_a_tokenizer_does_to_text_is_told(zoo, name, kind, dummy, everywhere, changes):
    table = zoo(name).table
    assert (table.kind, table.dummy_prefix, bool(table.prefixing)) == (kind, dummy, everywhere)
    assert table.normalization == changes


def test_refused_with_a_reason(tokenizer_zoo, refused_name):
    build, reason = tokenizer_zoo.REFUSED[refused_name]
    with pytest.raises(ValueError, match=rf"tokenizer .*: expected .*token bytes.*, got .*{reason}.* Use a model"):
        token_table(build())


def test_an_unknown_class_is_refused():
    class Odd:
        name_or_path = "some/model"

    with pytest.raises(ValueError, match=r"tokenizer some/model: expected .* got a class without a known backend"):
        token_table(Odd())


def test_bare_backends_give_the_same_bytes(zoo, tokenizer_zoo):
    import sentencepiece

    fast = zoo("byte-level")
    assert token_table(fast.tokenizer.backend_tokenizer).literal == fast.table.literal
    model = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_zoo.mistral_model()))
    assert token_table(model).bytes == zoo("mistral").table.bytes
    encoding = zoo("qwen").tokenizer._tokenizer
    assert token_table(encoding).bytes == zoo("qwen").table.bytes


@pytest.mark.parametrize(
    ("a", "b"), [("mistral", "mistral-slow"), ("mistral", "mistral-common"), ("tekken", "tekken-fast")]
)
def test_one_vocabulary_through_two_classes_has_the_same_bytes(zoo, a, b):
    assert zoo(a).table.bytes == zoo(b).table.bytes


def test_qwen_has_the_same_bytes_as_its_fast_form(zoo):
    slow, fast = zoo("qwen").table, zoo("qwen-fast").table
    assert fast.bytes[:151643] == slow.bytes[:151643]


def test_added_tokens_count_with_their_text(zoo):
    table = zoo("qwen-fast").table
    think = table.bytes.index(b"<think>")
    assert think in table.added and think not in table.special
    end = table.literal.index(b"<|im_end|>")
    assert end in table.special and table.bytes[end] is None
    neox = zoo("neox-like")
    assert [neox.table.bytes[i] for i in encode(neox.tokenizer, "a" + " " * 9 + "=")][1] == b" " * 9


def test_ids_that_no_token_has_are_none(zoo):
    entry = zoo("unigram-gap")
    table, (end,) = entry.table, encode(entry.tokenizer, "<|im_end|>")
    size = entry.tokenizer.vocab_size
    assert table.literal[end] == b"<|im_end|>" and end in table.special and end == size + 7 == table.vocab_size - 1
    assert None not in table.literal[:size] and table.literal[size:end] == [None] * 7
    assert table.literal[:size] == zoo("unigram-slow").table.literal


def test_a_normalised_added_token_has_the_space_that_the_normaliser_puts_before_it(zoo):
    entry = zoo("llama-legacy")
    text = "so <think> on"
    assert spelled(entry, text) == b" so <think> on"
    assert b" <think>" in [entry.table.bytes[i] for i in encode(entry.tokenizer, text)]


def test_a_table_survives_pickling_and_its_digest_is_stable(zoo):
    entry = zoo("mistral")
    again = pickle.loads(pickle.dumps(entry.table))
    assert again == entry.table and hash(again) == hash(entry.table) and again.digest == entry.table.digest
    assert token_table(entry.tokenizer).digest == entry.table.digest
    assert len({zoo(name).table.digest for name in ("mistral", "mistral-always", "mistral-never", "qwen")}) == 4


@pytest.mark.parametrize(
    "field", ["literal", "special", "added", "vague", "eos", "dummy_prefix", "normalizer", "space_mark"]
)
def test_the_digest_covers(field):
    content = dict(
        bytes=[b"a", None],
        literal=[b"a", b"<s>"],
        special=frozenset({1}),
        added=frozenset({1}),
        kind="characters",
    )
    changed = {
        "literal": [b"a", b"</s>"],
        "special": frozenset({0, 1}),
        "added": frozenset(),
        "vague": frozenset({0}),
        "eos": 1,
        "dummy_prefix": True,
        "normalizer": json.dumps({"type": "NFC"}),
        "space_mark": "▁",
    }
    assert TokenTable(**content).digest != TokenTable(**{**content, field: changed[field]}).digest


def test_same_tokenizer(zoo, tokenizer_zoo):
    assert same_tokenizer(zoo("mistral").table, zoo("mistral").table)
    padded = tokenizer_zoo.mistral()
    padded.add_special_tokens({"pad_token": "<pad>"})
    assert same_tokenizer(zoo("mistral").table, token_table(padded))
    assert same_tokenizer(token_table(padded), zoo("mistral").table)
    assert not same_tokenizer(zoo("mistral").table, zoo("qwen").table)
    assert not same_tokenizer(zoo("neox-like").table, zoo("byte-level").table)


def test_overlap_prefers_ordinary_tokens_to_byte_tokens(zoo):
    mistral, qwen = zoo("mistral").table, zoo("qwen").table
    found = overlap(mistral, qwen)
    pairs = dict(zip(found.student_ids_O.tolist(), found.teacher_ids_O.tolist(), strict=True))
    letter = mistral.bytes.index(b"A", 300)
    assert mistral.bytes[letter] == b"A" and letter in pairs and mistral.bytes.index(b"A") not in pairs
    assert found.student_share > 0.5
    assert all(mistral.bytes[i] == qwen.bytes[j] for i, j in pairs.items())
    assert found.collisions > 0


def test_the_id_of_some_bytes_is_the_one_that_the_tokenizer_produces(zoo, zoo_name):
    entry = zoo(zoo_name)
    found, said = ids_of_bytes(entry.table), set()
    for text in (*TEXTS, "a\n  the\n\n the answer house the\n"):
        said.update(encode(entry.tokenizer, text))
    assert {i for i in said if entry.table.bytes[i] is not None} <= set(found.values())


def test_two_vocabularies_without_a_common_token_are_refused():
    from dskd_plugin.pair import Pair, shared_ids

    tables = [TokenTable([text], [text], frozenset(), frozenset(), "byte-level") for text in (b"a", b"b")]
    with pytest.raises(ValueError, match=r"dskd\.teacher\.model: expected tokenizers that share some tokens, got none"):
        shared_ids(Pair(*tables, False), [], head_rows=(1, 1))


def test_shared_ids_are_said_where_an_added_token_has_the_bytes_of_another_one(zoo):
    one, other = zoo("byte-level-doubles"), zoo("byte-level")
    text = "it is\n  the house\n"
    ids, other_ids = (set(encode(entry.tokenizer, text)) for entry in (one, other))
    for student, teacher in ((one, other), (other, one)):
        found = overlap(student.table, teacher.table)
        pairs = list(zip(found.student_ids_O.tolist(), found.teacher_ids_O.tolist(), strict=True))
        ours, theirs = (ids, other_ids) if student is one else (other_ids, ids)
        assert ours <= {own for own, _ in pairs} and theirs <= {there for _, there in pairs}
        assert all(found.teacher_to_student_V[there] == own for own, there in pairs)
    newline = encode(one.tokenizer, "\n")
    assert newline == [one.tokenizer.convert_tokens_to_ids("\n")] != [one.table.bytes.index(b"\n")]


def test_importing_it_loads_neither_transformers_nor_axolotl():
    hosts = ("transformers", "axolotl", "tokenizers")
    code = f"import dskd_plugin.text.align, sys; print([m for m in {hosts} if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


@pytest.mark.parametrize("text", ["a\nb 4", "line one\n\n    line two\n", "naïve 漢字 w"])
def test_a_spelled_answer_is_its_text(zoo, zoo_name, text):
    """Whatever the tokenizer's own decode makes of line breaks and bytes."""
    entry = zoo(zoo_name)
    ids = encode(entry.tokenizer, text)
    if entry.changes or entry.table.vague & set(ids):
        pytest.skip("changes the text, or has no token for one of the characters")
    assert spell(ids, entry.table).decode().removeprefix(" ") == text


MARKED = ["<think>", "</think>", " ", "  ", "\n", "four", "The", " lamp", "日", "é", "x=1"]


@pytest.fixture(scope="module")
def marked_zoo():
    from tokenizer_zoo import TAGGED, load_tagged, swallowing

    return [
        *(load_tagged(name) for name in TAGGED),
        *(swallowing(name, before=False) for name in ("byte-level", "mistral", "mistral-always", "unigram-slow")),
    ]


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), derandomize=EXAMPLES <= 200)
@given(parts=st.lists(st.sampled_from(MARKED), max_size=9))
def test_tokens_are_found_at_their_places_in_the_text(marked_zoo, parts):
    """Whatever spaces the tokenizer puts and whatever white space its marks swallow, ink is where the text has it."""
    text = "".join(parts).encode()
    for entry in marked_zoo:
        ids = encode(entry.tokenizer, text.decode())
        ends = places(ids, entry.table, text)
        why = entry, text, ids, ends
        assert ends is not None and ends == sorted(ends) and len(ends) == len(ids), why
        ink = 0
        for token, end in zip(ids, ends, strict=True):
            ink += len(b"".join(entry.table.literal[token].split()))
            assert len(b"".join(text[:end].split())) == ink, why
        assert not text[ends[-1] if ends else 0 :].strip(), why


def test_other_tokens_have_no_places(zoo):
    entry = zoo("smollm2")
    assert places(encode(entry.tokenizer, "red lamp"), entry.table, b"red stone") is None


def test_only_the_dummy_space_is_left_out_after_an_added_token(zoo):
    """`<think>` is normalised there, so that the normaliser puts its space before it alone; `<|end|>` is not."""
    entry = zoo("llama-legacy")
    ids = encode(entry.tokenizer, "<think> four<s>five")
    assert spell(ids, entry.table) == b" <think> four<s>five"
