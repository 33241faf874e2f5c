"""One conversation, two tokenizations, one batch.

The host's own collator builds the student's side, padded or packed; the teacher's side is handed over unpadded (flat
ids and lengths), and the aligned pairs become row indices, so that a training step only selects rows.
"""

from typing import Any

import torch
from axolotl.utils.collators import (
    BatchSamplerDataCollatorForSeq2Seq,
    DataCollatorForSeq2Seq,
    V2BatchSamplerDataCollatorForSeq2Seq,
)
from torch import Tensor

COLUMNS = ("teacher_input_ids", "aligned_student", "aligned_teacher")
IGNORE = -100

Sample = dict[str, Any]


def pair_rows(labels: Tensor, samples: list[tuple[int, int, Sample]]) -> dict[str, Tensor]:
    """Indices of the rows that a step needs.

    labels: [B, S] student labels, IGNORE outside responses.
    samples: (batch row, offset of the sample in that row, sample) in batch order. The first token of a sample has no
    position that predicts it: what stands before it is padding or a packed neighbour.
    Returns dskd_rows [R] flat positions in B x S that predict a response token, the aligned ones first;
    dskd_targets [R] their gold ids; dskd_teacher_rows [N] flat teacher positions of the aligned ones.
    """
    width = labels.shape[1]
    flat_labels = labels.flatten()
    flat_valid = flat_labels != IGNORE
    flat_valid[[row * width + offset for row, offset, _ in samples]] = False
    student, teacher, teacher_offset = [], [], 0
    for row, offset, sample in samples:
        targets = torch.as_tensor(sample["aligned_student"], dtype=torch.long)
        partners = torch.as_tensor(sample["aligned_teacher"], dtype=torch.long)
        length = len(sample["input_ids"])  # truncation by the host shortens the student's side only
        inside = (targets > 0) & (targets < length) & (partners > 0)
        student.append(targets[inside] + (row * width + offset))
        teacher.append(partners[inside] + (teacher_offset - 1))
        teacher_offset += len(sample["teacher_input_ids"])
    targets, partners = torch.cat(student), torch.cat(teacher)
    trained = flat_valid[targets]
    targets, partners = targets[trained], partners[trained]
    flat_valid[targets] = False
    targets_R = torch.cat([targets, flat_valid.nonzero().flatten()])
    return {"dskd_rows": targets_R - 1, "dskd_targets": flat_labels[targets_R], "dskd_teacher_rows": partners}


def _strip(sample: Sample) -> Sample:
    return {key: value for key, value in sample.items() if key not in COLUMNS}


class _PairMixin:
    """Adds the teacher's side and the row indices to what the host's collator returns."""

    packed = True

    def __call__(self, features: list[Any], return_tensors: str | None = None) -> Any:
        packed = self.packed
        if packed:
            bins: list[list[Sample]] = features if isinstance(features[0], list) else [features]
        else:
            bins = [[sample] for sample in features]
        lengths = [[len(sample["input_ids"]) for sample in samples] for samples in bins]
        stripped = [[_strip(sample) for sample in samples] for samples in bins]
        batch = super().__call__(stripped if packed else [samples[0] for samples in stripped], return_tensors)  # type: ignore[misc]
        labels = batch["labels"]
        left = self.tokenizer.padding_side == "left"  # type: ignore[attr-defined]
        placed = []
        for row, samples in enumerate(bins):
            offset = labels.shape[1] - sum(lengths[row]) if left else 0
            for sample, length in zip(samples, lengths[row], strict=True):
                placed.append((row, offset, sample))
                offset += length
        batch.update(pair_rows(labels, placed))
        teacher_ids = [torch.as_tensor(sample["teacher_input_ids"], dtype=torch.long) for _, _, sample in placed]
        batch["teacher_input_ids"] = torch.cat(teacher_ids)
        batch["teacher_lengths"] = torch.tensor([len(ids) for ids in teacher_ids])
        batch["teacher_bins"] = torch.tensor([len(samples) for samples in bins])
        return batch


class PaddedPairCollator(_PairMixin, DataCollatorForSeq2Seq):
    """One conversation per batch row."""

    packed = False


class PackedPairCollator(_PairMixin, BatchSamplerDataCollatorForSeq2Seq):
    """Several conversations per batch row, kept apart by position ids."""


class PackedMaskPairCollator(_PairMixin, V2BatchSamplerDataCollatorForSeq2Seq):
    """Several conversations per batch row, numbered in the attention mask where the model reads it."""


def collator_class(cfg: Any, is_eval: bool) -> type[_PairMixin]:
    """The collator that extends the one Axolotl would choose for this recipe."""
    if not (cfg.eval_sample_packing if is_eval else cfg.sample_packing):
        return PaddedPairCollator
    from axolotl.monkeypatch.multipack import SUPPORTED_MULTIPACK_MODEL_TYPES

    numbered = (
        cfg.attn_implementation == "flex_attention"
        or cfg.model_config_type in SUPPORTED_MULTIPACK_MODEL_TYPES
        or (cfg.model_config_type == "llama" and cfg.attn_implementation != "flash_attention_2")
    )
    return PackedMaskPairCollator if numbered else PackedPairCollator
