"""First pieces of texts that continue another one, against the same text in a longer one, and the events they make."""

import pytest
from tokenizer_zoo import TAGGED, ZOO, Entry, letters, load, load_tagged, spell

from dskd_plugin.text.pieces import first_pieces, opening_pieces
from dskd_plugin.text.vocabularies import encode

BEFORE = ["a", ".", "7", "x)", "\n"]
TEXTS = [
    *("the", " the", "The", " The house", "  the", "   left", "\n    return x", "\t\tx", " \n the", "\n\n\nthe"),
    *("re", " red", ".", " .", "12", " 12", "=", " == 3:\n", "  return", "é", " é", "e\u0301", " e\u0301t", "x y  "),
    *("<think>", " <think>", "foo<think>", "  <think>the", "\n<think>\n", "<thin", "</think>", "x</think>", "<<think>"),
]


def tokenizers():
    return [load(name) for name in ZOO] + [load_tagged(name) for name in TAGGED]


def in_a_text(entry, before, text):
    """The token that begins right behind another text, None if none does; read without the table."""
    ids = encode(entry.tokenizer, before + text)
    parts, at = spell(entry, ids), 0
    whole = b"".join(parts)
    wanted = before.encode() if whole.startswith(before.encode()) else b" " + before.encode()
    for token, part in zip(ids, parts, strict=True):
        if at == len(wanted) and whole.startswith(wanted):
            return token, part
        at += len(part)
    return None


@pytest.mark.parametrize("name", [*ZOO, *(f"tagged {name}" for name in TAGGED)])
def test_a_first_piece_is_the_token_that_stands_there_in_a_longer_text(name):
    entry = load_tagged(name.removeprefix("tagged ")) if name.startswith("tagged ") else load(name)
    if "drops" in entry.changes:
        pytest.skip("drops characters without a token")
    compared = 0
    for text, piece in zip(TEXTS, first_pieces(entry.tokenizer, entry.table)(TEXTS), strict=True):
        found = {in_a_text(entry, before, text) for before in BEFORE} - {None}
        hidden = entry.table.special | entry.table.vague
        expected = {None if token in hidden else part for token, part in found}
        if found:
            compared += 1
            assert piece in expected, (text, piece, expected)
    assert compared > 20


def added(tokenizer, *contents, **kwargs):
    from tokenizers import AddedToken

    tokenizer.add_tokens([AddedToken(content, **kwargs) for content in contents])
    return Entry("added", tokenizer)


@pytest.mark.parametrize("normalized", [True, False])
def test_added_tokens_begin_a_text_where_the_tokenizer_finds_them(tokenizer_zoo, normalized):
    """Whatever a normalizer does to the ends of their own text."""

    def of(tokenizer, contents, texts):
        entry = added(tokenizer, *contents, normalized=normalized)
        return first_pieces(entry.tokenizer, entry.table)(texts)

    texts = ["<a>", " <a>", "<b>x", "x<a>", "\n", "\n\n", " the"]
    legacy = tokenizer_zoo.llama_legacy(marks=False)
    found = [b"<", b" <a>", b"<", b"x", b"\n", b"\n", b" the"] if normalized else None
    assert of(legacy, ["<a>", "<b>"], texts) == (found or [b"<a>", b" ", b"<b>", b"x", b"\n", b"\n", b" the"])
    words = tokenizer_zoo.unigram_fast(fallback=False, splits=True)
    found = of(words, ["\n", "<a>", "<b>"], texts)
    assert found == [b"<a>", b" ", b"<b>", b"x", b"\n", b"\n", b" the"]
    strips = tokenizer_zoo.byte_level(normalizer="Strip")
    found = of(strips, [" the ", "<b>"], ["the", " the", " the ", "the ", "<b>x"])
    assert found == ([b"the", b" ", b" ", b"the", b"<b>"] if normalized else [b"t", b" the", b" the ", b"t", b"<b>"])


@pytest.mark.parametrize("build", ["unigram_slow", "unigram_fast"])
def test_added_tokens_of_a_class_in_python_begin_a_text_as_those_of_a_fast_one(tokenizer_zoo, build):
    kinds = [
        ({}, ["<a>", "<a>b"]),
        ({"lstrip": True}, ["<l>"]),
        ({"single_word": True}, ["<w>"]),
        ({"special": True}, ["<e>"]),
    ]
    options = {"remove_extra_whitespaces": False} if build == "unigram_slow" else {}
    tokenizer = getattr(tokenizer_zoo, build)(**options)
    for kind, contents in kinds:
        entry = added(tokenizer, *contents, normalized=False, **kind)
    expected = {
        **{"<a>": b"<a>", "<a>b": b"<a>b", "<a><l>": b"<a>", "<a": b"<", " <a>": b" ", "x<a>": b"x", " x<a>": b" "},
        **{"x": b"x", " the<a>": b" the", " the": b" the", "<l>": None, " <l>": None, " the <l>": b" the", "": None},
        **{"<w>": b"<w>", "<w> x": b"<w>", "<w>x": b"<", "x<w>": b"x", "<w>x<a>": b"<", "<e>": None, "x<e>": b"x"},
    }
    assert dict(zip(expected, first_pieces(tokenizer, entry.table)(list(expected)), strict=True)) == expected


@pytest.mark.parametrize("name", ["unigram-nfkc-cf", "unigram-words", "byte-level-strips", "unigram-nfkc-slow"])
def test_words_with_and_without_a_space_are_two_events(zoo, name):
    one, other = zoo("byte-level"), zoo(name)
    texts = {text for entry in (one, other) for text in entry.table.bytes if text}
    cutters = [first_pieces(entry.tokenizer, entry.table) for entry in (one, other)]
    openings = opening_pieces(texts, cutters)
    assert all(piece.startswith(b" ") == text.startswith(b" ") for text, piece in openings.items() if text.strip())
    assert openings[b" the"] == b" the" and openings[b" "] == b" "
    assert openings[b"\n"] == (b" " if other.table.collapses_space else b"\n")


def test_an_opening_piece_is_the_beginning_of_its_text(zoo):
    """Of the text as the tokenizers read it: upper case and composed characters apart."""
    one = zoo("byte-level")
    for other in tokenizers():
        texts = {text for entry in (one, other) for text in entry.table.bytes[:2000] if text}
        cutters = [first_pieces(entry.tokenizer, entry.table) for entry in (one, other)]
        for text, piece in opening_pieces(texts, cutters).items():
            text, piece = (part.decode(errors="replace") for part in (text, piece))
            begins = letters(text).startswith(letters(piece.replace("\ufffd", "")))
            assert text.startswith(piece) or "\ufffd" in piece or begins, (other, text, piece)
