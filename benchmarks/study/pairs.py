"""The students before training: one with the teacher's tokenizer, one with a SentencePiece model of its own."""

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, normalizers
from tokenizers.models import BPE
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.study.table import Student
from quickstart.models import END, SPECIAL, STUDENT_TEMPLATE

MARK = "\u2581"


def merges(pieces: list[str]) -> list[tuple[str, str]]:
    """The merges of a SentencePiece BPE vocabulary: every split of a piece into two pieces, in order of the piece."""
    rank = {piece: i for i, piece in enumerate(pieces)}
    found = []
    for piece in pieces:
        splits = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        splits = [pair for pair in splits if pair[0] in rank and pair[1] in rank]
        found += sorted(splits, key=lambda pair: (rank[pair[0]], rank[pair[1]]))
    return found


def sentencepiece_tokenizer(texts: Iterable[str], *, vocab_size: int) -> PreTrainedTokenizerFast:
    """BPE with byte fallback and a space put in front, trained by SentencePiece, as Llama 2 and Mistral have it."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        vocab_size=vocab_size,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        character_coverage=0.9995,
        num_threads=1,
        minloglevel=2,
    )
    trained = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    pieces = [trained.id_to_piece(i) for i in range(trained.get_piece_size())]
    plain = [
        piece
        for i, piece in enumerate(pieces)
        if not (trained.is_control(i) or trained.is_unknown(i) or trained.is_byte(i))
    ]
    backend = Tokenizer(
        BPE(
            vocab={piece: i for i, piece in enumerate(pieces)},
            merges=merges(plain),
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(MARK), normalizers.Replace(" ", MARK)])
    backend.decoder = decoders.Sequence(
        [decoders.Replace(MARK, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL[1:]])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token=END,
        pad_token=END,
        unk_token="<unk>",
        chat_template=STUDENT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def create_student(shape: Student, texts: Iterable[str], teacher: Path, out: Path, *, seed: int) -> None:
    """A randomly initialised Llama and its tokenizer, written to `out`."""
    tokenizer: Any
    if shape.tokenizer == "teacher":
        tokenizer = AutoTokenizer.from_pretrained(teacher)
    else:
        tokenizer = sentencepiece_tokenizer(texts, vocab_size=shape.vocab_size)
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=shape.width,
            intermediate_size=-(-shape.width * 8 // 3 // 32) * 32,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.width // 32,
            num_key_value_heads=shape.width // 32,
            max_position_embeddings=512,
            tie_word_embeddings=False,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
