"""The students before training, with the teacher's tokenizer or a SentencePiece model of their own."""

import contextlib
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, normalizers
from tokenizers.models import BPE
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.study.table import Student
from dskd_plugin.text.vocabularies import token_table
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
    """The student before it is trained and its tokenizer, written to `out`."""
    torch.manual_seed(seed)
    teachers = AutoTokenizer.from_pretrained(teacher)
    new = shape.tokenizer != "teacher"
    tokenizer: Any = sentencepiece_tokenizer(texts, vocab_size=shape.vocab_size) if new else teachers
    if shape.width is None:
        model = cut(AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32), shape.layers)
        if new:
            move(model, teachers, tokenizer)
    else:
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
                **_special_ids(tokenizer),
            )
        )
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def _special_ids(tokenizer: Any) -> dict[str, int]:
    return {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}


def cut(model: Any, layers: int) -> Any:
    """`model` with `layers` of its layers: the first, the last and evenly spaced ones between them."""
    old = model.model.layers
    if not 2 <= layers <= len(old):
        raise ValueError(f"layers: expected 2 to {len(old)}, those of the teacher, got {layers}. Change the table.")
    kept = [round(i * (len(old) - 1) / (layers - 1)) for i in range(layers)]
    model.model.layers = torch.nn.ModuleList(old[i] for i in kept)
    model.config.num_hidden_layers = layers
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = [model.config.layer_types[i] for i in kept]
    for place, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = place
    return model


@torch.no_grad()
def move(model: Any, old: Any, new: Any) -> None:
    """Give `model` the tokenizer `new`: a token's embedding is the mean of those of its text under `old`.

    A token without text of its own, special or part of a character, takes the mean of all.
    """
    table, bytes_of = model.get_input_embeddings().weight.clone(), token_table(new).bytes
    rows_VD = table.mean(0).repeat(len(new), 1)
    for i, text in enumerate(bytes_of[: len(new)]):
        with contextlib.suppress(UnicodeDecodeError):
            if text and (ids := old.encode(text.decode(), add_special_tokens=False)):
                rows_VD[i] = table[ids].mean(0)
    rows_VD[new.eos_token_id] = table[old.eos_token_id]
    model.resize_token_embeddings(len(new), mean_resizing=False)
    model.get_input_embeddings().weight.copy_(rows_VD)
    for config in (model.config, model.generation_config):
        config.update(_special_ids(new))
