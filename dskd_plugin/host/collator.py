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

# Columns that a prepared row adds to the host's; the last three only where the settings ask for them.
COLUMNS = ("teacher_input_ids", "aligned_student", "aligned_teacher", "spans", "teacher_prompt")
# Set by the trainer: True for an answer of the student, False for the gold row beside it.
ON_POLICY = "on_policy"
IGNORE = -100

Sample = dict[str, Any]
Placed = tuple[int, int, Sample]


def pair_rows(
    input_ids: Tensor, labels: Tensor, samples: list[Placed], *, cross_attention: bool = False
) -> dict[str, Tensor]:
    """Indices of the rows that a step needs.

    input_ids, labels: [B, S] of the student, labels IGNORE outside responses.
    samples: (batch row, offset of the sample in that row, sample) in batch order. The first token of a sample has no
    position that predicts it: what stands before it is padding or a packed neighbour.
    Axes: R student rows, N aligned ones (the first of R), M teacher rows, P and Q rows of spans.
    Returns dskd_rows [R] flat positions in B x S that predict a response token; dskd_targets [R] their gold ids;
    dskd_ce [R] whether the row counts for the cross-entropy; dskd_teacher_rows [N] flat teacher positions of the
    aligned ones.
    cross_attention: dskd_teacher_rows [M], and dskd_row_sample [R], dskd_teacher_row_sample [M] the number of each
    row's sample (-1: takes no part), dskd_row_inputs [R], dskd_teacher_row_inputs [M] ids at the rows,
    dskd_teacher_row_targets [M] ids after them.
    Samples with spans: dskd_span_rows [P] index into R, dskd_span_of [P] number of the span;
    dskd_span_teacher_rows [Q] flat teacher positions, dskd_span_teacher_targets [Q] ids after them,
    dskd_span_teacher_of [Q].
    """
    width = labels.shape[1]
    flat_labels, flat_ids = labels.flatten(), input_ids.flatten()
    teacher_ids = _cat([_ids(sample["teacher_input_ids"]) for _, _, sample in samples if _distilled(sample)])
    trained = flat_labels != IGNORE
    trained[[row * width + offset for row, offset, _ in samples]] = False
    counted = trained.clone()
    student, teacher, student_sample, teacher_sample, spans = [], [], [], [], []
    teacher_offset = 0
    for number, (row, offset, sample) in enumerate(samples):
        base, length = row * width + offset, len(sample["input_ids"])  # the host truncates the student's side only
        teacher_length = len(sample["teacher_input_ids"])
        if sample.get(ON_POLICY):
            counted[base : base + length] = False
        if not _distilled(sample):
            continue
        targets, partners = _ids(sample["aligned_student"]), _ids(sample["aligned_teacher"])
        inside = (targets > 0) & (targets < length)
        inside[inside.clone()] = trained[targets[inside] + base]
        there = (partners > 0) & (partners < teacher_length)
        if not cross_attention:
            inside = there = inside & there
        elif not inside.any() or not there.any():
            inside, there = torch.zeros_like(inside), torch.zeros_like(there)
        student.append(targets[inside] + base)
        teacher.append(partners[there] + teacher_offset)
        student_sample.append(torch.full_like(student[-1], number))
        teacher_sample.append(torch.full_like(teacher[-1], number))
        spans.append(_kept_spans(sample, trained[base : base + length], base, teacher_offset))
        teacher_offset += teacher_length
    aligned, partners, spans_C4 = _cat(student), _cat(teacher), _cat(spans).view(-1, 4)
    span_targets, span_of = _spread(spans_C4[:, 0], spans_C4[:, 1])
    rest = counted.clone()
    rest[span_targets] = True
    rest[aligned] = False
    targets_R = torch.cat([aligned, rest.nonzero().flatten()])
    out = {
        "dskd_rows": targets_R - 1,
        "dskd_targets": flat_labels[targets_R],
        "dskd_ce": counted[targets_R],
        "dskd_teacher_rows": partners - 1,
    }
    if cross_attention:
        row_sample = torch.full_like(targets_R, -1)
        row_sample[: len(aligned)] = _cat(student_sample)
        out |= {
            "dskd_row_sample": row_sample,
            "dskd_teacher_row_sample": _cat(teacher_sample),
            "dskd_row_inputs": flat_ids[targets_R - 1],
            "dskd_teacher_row_inputs": teacher_ids[partners - 1],
            "dskd_teacher_row_targets": teacher_ids[partners],
        }
    if any("spans" in sample for _, _, sample in samples):
        place = torch.full_like(flat_labels, -1)
        place[targets_R] = torch.arange(len(targets_R))
        span_partners, span_teacher_of = _spread(spans_C4[:, 2], spans_C4[:, 3])
        out |= {
            "dskd_span_rows": place[span_targets],
            "dskd_span_of": span_of,
            "dskd_span_teacher_rows": span_partners - 1,
            "dskd_span_teacher_targets": teacher_ids[span_partners],
            "dskd_span_teacher_of": span_teacher_of,
        }
    return out


def _distilled(sample: Sample) -> bool:
    """Whether the teacher reads the sample: not the gold row beside an answer, which has the cross-entropy alone."""
    return sample.get(ON_POLICY) is not False


def _ids(values: Any) -> Tensor:
    return torch.as_tensor(values, dtype=torch.long)


def _cat(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.long)


def _kept_spans(sample: Sample, trained: Tensor, base: int, teacher_offset: int) -> Tensor:
    """The spans, flat, whose every token is predicted and, for the student, trained on; as flat positions."""
    spans_C4 = _ids(sample.get("spans", ())).view(-1, 4)
    begin, stop, teacher_begin, teacher_stop = spans_C4.unbind(1)
    inside = (begin > 0) & (stop <= len(trained))
    inside &= (teacher_begin > 0) & (teacher_stop <= len(sample["teacher_input_ids"]))
    spans_C4 = spans_C4[inside]
    until = torch.cat([torch.zeros(1, dtype=torch.long), trained.long().cumsum(0)])
    whole = until[spans_C4[:, 1]] - until[spans_C4[:, 0]] == spans_C4[:, 1] - spans_C4[:, 0]
    return (spans_C4[whole] + torch.tensor([base, base, teacher_offset, teacher_offset])).flatten()


def _spread(begin: Tensor, stop: Tensor) -> tuple[Tensor, Tensor]:
    """Positions of all spans in order, and the number of the span of each."""
    sizes = stop - begin
    number = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
    first = sizes.cumsum(0) - sizes
    return torch.arange(len(number)) - first[number] + begin[number], number


def _strip(sample: Sample) -> Sample:
    return {key: value for key, value in sample.items() if key not in COLUMNS and key != ON_POLICY}


class _PairMixin:
    """Adds the teacher's side and the row indices to what the host's collator returns."""

    packed = True
    cross_attention = False

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
        batch.update(pair_rows(batch["input_ids"], labels, placed, cross_attention=self.cross_attention))
        read = [[sample["teacher_input_ids"] for sample in samples if _distilled(sample)] for samples in bins]
        batch["teacher_input_ids"] = _cat([_ids(ids) for rows in read for ids in rows])
        batch["teacher_lengths"] = _ids([len(ids) for rows in read for ids in rows])
        batch["teacher_bins"] = _ids([len(rows) for rows in read if rows])
        if any("teacher_prompt" in sample and ON_POLICY not in sample for _, _, sample in placed):
            batch["dskd_samples"] = list(features)
        return batch


class PaddedPairCollator(_PairMixin, DataCollatorForSeq2Seq):
    """One conversation per batch row."""

    packed = False


class PackedPairCollator(_PairMixin, BatchSamplerDataCollatorForSeq2Seq):
    """Several conversations per batch row, kept apart by position ids."""


class PackedMaskPairCollator(_PairMixin, V2BatchSamplerDataCollatorForSeq2Seq):
    """Several conversations per batch row, numbered in the attention mask where the model reads it."""


class PaddedAttentionCollator(PaddedPairCollator):
    """Padded, with what cross-model attention needs."""

    cross_attention = True


class PackedAttentionCollator(PackedPairCollator):
    """Packed, with what cross-model attention needs."""

    cross_attention = True


class PackedMaskAttentionCollator(PackedMaskPairCollator):
    """Packed and numbered, with what cross-model attention needs."""

    cross_attention = True


_ATTENDING: dict[type[_PairMixin], type[_PairMixin]] = {
    PaddedPairCollator: PaddedAttentionCollator,
    PackedPairCollator: PackedAttentionCollator,
    PackedMaskPairCollator: PackedMaskAttentionCollator,
}


def collator_class(cfg: Any, is_eval: bool) -> type[_PairMixin]:
    """The collator that extends the one Axolotl would choose for this recipe."""
    chosen = _host_choice(cfg, is_eval)
    return _ATTENDING[chosen] if (cfg.dskd or {}).get("alignment") == "cma" else chosen


def _host_choice(cfg: Any, is_eval: bool) -> type[_PairMixin]:
    if not (cfg.eval_sample_packing if is_eval else cfg.sample_packing):
        return PaddedPairCollator
    from axolotl.monkeypatch.multipack import SUPPORTED_MULTIPACK_MODEL_TYPES

    numbered = (
        cfg.attn_implementation == "flex_attention"
        or cfg.model_config_type in SUPPORTED_MULTIPACK_MODEL_TYPES
        or (cfg.model_config_type == "llama" and cfg.attn_implementation != "flash_attention_2")
    )
    return PackedMaskPairCollator if numbered else PackedPairCollator
