"""The collators: student and teacher rows of every pair, padded, left-padded, packed and truncated."""

import copy
import random

import pytest
import torch
from axolotl.utils.dict import DictDefault

from dskd_plugin.collator import (
    PackedMaskPairCollator,
    PackedPairCollator,
    PaddedPairCollator,
    collator_class,
    pair_rows,
)

COLLATORS = {
    "padded": (PaddedPairCollator, None),
    "packed": (PackedPairCollator, 3),
    "packed-mask": (PackedMaskPairCollator, 3),
}


def sample(rng, cut=None):
    """A conversation with two responses whose tokens pair at random; ids are unique, so rows can be recognised."""
    length, teacher_length = rng.randint(8, 15), rng.randint(8, 18)
    ids = [rng.randint(3, 250) for _ in range(length)]
    labels = [token if k % 5 in (0, 2, 3) else -100 for k, token in enumerate(ids)]
    targets = sorted(rng.sample([k for k in range(length) if labels[k] != -100], 3))
    partners = sorted(rng.sample(range(teacher_length), 3))
    row = {
        "input_ids": ids[:cut],
        "attention_mask": [1] * len(ids[:cut]),
        "labels": labels[:cut],
        "position_ids": list(range(len(ids[:cut]))),
        "teacher_input_ids": [rng.randint(1000, 10**6) for _ in range(teacher_length)],
        "aligned_student": targets,
        "aligned_teacher": partners,
    }
    return row


@pytest.fixture(scope="module")
def tokenizer(build):
    return build.byte_level_tokenizer(300, 1)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", COLLATORS)
def test_rows_point_at_the_tokens_of_their_sample(tokenizer, kind, side):
    rng = random.Random(kind + side)
    cls, per_bin = COLLATORS[kind]
    samples = [sample(rng, cut) for cut in (None, None, 9, None, 6, None)]
    if per_bin is None:
        samples = [{key: value for key, value in one.items() if key != "position_ids"} for one in samples]
    features = samples if per_bin is None else [samples[k : k + per_bin] for k in range(0, 6, per_bin)]
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.padding_side = side
    batch = cls(tokenizer, pad_to_multiple_of=8)(copy.deepcopy(features))

    expected_pairs, expected_rest = [], []
    for one in samples:
        kept = {
            s: t
            for s, t in zip(one["aligned_student"], one["aligned_teacher"], strict=True)
            if 0 < s < len(one["input_ids"]) and t > 0
        }
        for position, label in enumerate(one["labels"]):
            if label == -100 or position == 0:
                continue
            before = one["input_ids"][position - 1]
            if position in kept:
                expected_pairs.append((before, label, one["teacher_input_ids"][kept[position] - 1]))
            else:
                expected_rest.append((before, label))
    flat, flat_teacher = batch["input_ids"].flatten(), batch["teacher_input_ids"]
    rows, targets, partners = (batch[key] for key in ("dskd_rows", "dskd_targets", "dskd_teacher_rows"))
    aligned = len(partners)
    found = [
        (int(flat[r]), int(y), int(flat_teacher[t]))
        for r, y, t in zip(rows[:aligned], targets[:aligned], partners, strict=True)
    ]
    assert found == expected_pairs
    assert sorted((int(flat[r]), int(y)) for r, y in zip(rows[aligned:], targets[aligned:], strict=True)) == sorted(
        expected_rest
    )
    assert batch["teacher_lengths"].tolist() == [len(one["teacher_input_ids"]) for one in samples]
    assert batch["teacher_bins"].tolist() == ([1] * 6 if per_bin is None else [per_bin] * 2)
    assert next(iter(batch)) == "input_ids"  # the host measures the batch by its first tensor


def test_first_token_of_a_packed_neighbour_is_not_predicted():
    labels = torch.tensor([[5, 6, 7, 8, 9, 10]])
    rows = {
        "input_ids": [0] * 3,
        "teacher_input_ids": [0] * 3,
        "aligned_student": [0, 1],
        "aligned_teacher": [1, 2],
    }
    out = pair_rows(labels.clamp(min=0), labels, [(0, 0, rows), (0, 3, rows)])
    assert out["dskd_rows"].tolist() == [0, 3, 1, 4]
    assert out["dskd_targets"].tolist() == [6, 9, 7, 10]
    assert out["dskd_teacher_rows"].tolist() == [1, 4]


def test_no_pair_at_all():
    labels = torch.full((1, 4), -100)
    rows = {"input_ids": [0] * 4, "teacher_input_ids": [0], "aligned_student": [], "aligned_teacher": []}
    out = pair_rows(labels.clamp(min=0), labels, [(0, 0, rows)])
    assert [len(value) for value in out.values()] == [0, 0, 0, 0]


@pytest.mark.parametrize(
    ("cfg", "is_eval", "cls"),
    [
        ({}, False, PaddedPairCollator),
        ({"sample_packing": True, "model_config_type": "llama"}, False, PackedMaskPairCollator),
        ({"sample_packing": True, "model_config_type": "llama"}, True, PaddedPairCollator),
        (
            {"sample_packing": True, "model_config_type": "gpt2", "attn_implementation": "flash_attention_2"},
            False,
            PackedPairCollator,
        ),
        (
            {"sample_packing": True, "eval_sample_packing": True, "model_config_type": "qwen3"},
            True,
            PackedMaskPairCollator,
        ),
    ],
)
def test_collator_is_the_one_axolotl_would_extend(cfg, is_eval, cls):
    assert collator_class(DictDefault(cfg), is_eval) is cls
