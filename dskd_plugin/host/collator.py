"""One conversation, two tokenizations, one batch.

The host's own collator builds the student's side, padded or packed. Beside it stands a `batch.StepBatch`: the teacher's
side, unpadded, and the aligned pairs as row indices, so that a training step only selects rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from axolotl.utils.collators import (
    BatchSamplerDataCollatorForSeq2Seq,
    DataCollatorForSeq2Seq,
    V2BatchSamplerDataCollatorForSeq2Seq,
)
from torch import Tensor
from torch.utils.data import get_worker_info

from dskd_plugin.batch import KEY, AttentionRows, ReachRows, SpanRows, StepBatch, TeacherText, announce
from dskd_plugin.columns import IGNORE, columns, row_of
from dskd_plugin.teachers.base import HiddenStates, ReadsAhead
from dskd_plugin.text.align import REACH

# Set by the trainer: True for an answer of the student, False for the gold row beside it.
ON_POLICY = "on_policy"

Sample = dict[str, Any]
Placed = tuple[int, Sample]


def pair_rows(input_ids: Tensor, labels: Tensor, bins: list[list[Placed]], *, cross_attention: bool) -> StepBatch:
    """The rows that a step needs.

    input_ids, labels: [B, S] of the student, labels IGNORE outside responses.
    bins: the samples of each batch row, each with its offset in the row. The first token of a sample has no position
    that predicts it: what stands before it is padding or a packed neighbour.
    cross_attention: every trained row of a sample meets every row of the teacher's, in place of pairs; where one side
    has none, neither takes part.
    """
    width = labels.shape[1]
    flat_labels, flat_ids = labels.flatten(), input_ids.flatten()
    placed = [(row * width + offset, sample) for row, samples in enumerate(bins) for offset, sample in samples]
    read = [[_ids(sample["teacher_input_ids"]) for _, sample in samples if _distilled(sample)] for samples in bins]
    teacher_ids = _cat([ids for samples in read for ids in samples])
    trained = flat_labels != IGNORE
    trained[[base for base, _ in placed]] = False
    counted = trained.clone()
    student, teacher, student_sample, teacher_sample, spans = [], [], [], [], []
    offsets, more = [], []
    teacher_offset = 0
    for number, (base, sample) in enumerate(placed):
        # The host truncates the student's side only: columns of pairs and spans may reach beyond it.
        length, teacher_length = len(sample["input_ids"]), len(sample["teacher_input_ids"])
        if sample.get(ON_POLICY):
            counted[base : base + length] = False
        if not _distilled(sample):
            continue
        targets, partners = _ids(sample["aligned_student"]), _ids(sample["aligned_teacher"])
        offset, further = (_ids(sample.get(column, [0] * len(partners))) for column in REACH)
        inside = _trained_on(targets, trained[base : base + length])
        there = (partners > 0) & (partners + further < teacher_length)
        if not cross_attention:
            inside = there = inside & there
        elif not inside.any() or not there.any():
            inside, there = torch.zeros_like(inside), torch.zeros_like(there)
        student.append(targets[inside] + base)
        teacher.append(partners[there] + teacher_offset)
        offsets.append(offset[there])
        more.append(further[there])
        student_sample.append(torch.full_like(student[-1], number))
        teacher_sample.append(torch.full_like(teacher[-1], number))
        spans.append(_kept_spans(sample, trained[base : base + length], base, teacher_offset))
        teacher_offset += teacher_length
    aligned, partners, spans_C4 = _cat(student), _cat(teacher), _cat(spans).view(-1, 4)
    # A token of a span needs its row even where it neither pairs nor counts for the cross-entropy.
    wanted = counted.clone()
    wanted[_spread(spans_C4[:, 0], spans_C4[:, 1])[0]] = True
    wanted[aligned] = False
    targets_R = torch.cat([aligned, wanted.nonzero().flatten()])
    attention = None
    if cross_attention:
        attention = AttentionRows(
            sample_N=_cat(student_sample),
            inputs_N=flat_ids[aligned - 1],
            sample_M=_cat(teacher_sample),
            inputs_M=teacher_ids[partners - 1],
            targets_M=teacher_ids[partners],
        )
    with_spans, with_reach = (any(column in sample for _, sample in placed) for column in ("spans", REACH[0]))
    return StepBatch(
        rows_R=targets_R - 1,
        targets_R=flat_labels[targets_R],
        ce_R=counted[targets_R],
        teacher_text=TeacherText(
            ids_T=teacher_ids,
            lengths_S=_ids([len(ids) for samples in read for ids in samples]),
            samples_B=_ids([len(samples) for samples in read if samples]),
            rows_M=partners - 1,
        ),
        spans=_span_rows(spans_C4, targets_R, teacher_ids, positions=len(flat_labels)) if with_spans else None,
        reach=_reach_rows(_cat(offsets), _cat(more), partners, teacher_ids) if with_reach else None,
        attention=attention,
    )


def _trained_on(targets: Tensor, trained_S: Tensor) -> Tensor:
    """Which targets of a sample have a place before them, are left of the sample and are trained on."""
    inside = (targets > 0) & (targets < len(trained_S))
    inside[inside.clone()] = trained_S[targets[inside]]
    return inside


def _reach_rows(offset_N: Tensor, more_N: Tensor, partners_N: Tensor, teacher_ids: Tensor) -> ReachRows:
    """Where the student's tokens of pairs lie. partners_N: flat positions of the teacher's tokens."""
    further, of_Q = _spread(partners_N + 1, partners_N + 1 + more_N)
    return ReachRows(
        offset_N=offset_N,
        targets_N=teacher_ids[partners_N],
        of_Q=of_Q,
        teacher_rows_Q=further - 1,
        teacher_targets_Q=teacher_ids[further],
    )


def _span_rows(spans_C4: Tensor, targets_R: Tensor, teacher_ids: Tensor, *, positions: int) -> SpanRows:
    """Rows of the spans. positions: of the student's batch, padding included."""
    student_targets, of_P = _spread(spans_C4[:, 0], spans_C4[:, 1])
    teacher_targets, teacher_of_Q = _spread(spans_C4[:, 2], spans_C4[:, 3])
    row_at = torch.full((positions,), -1)
    row_at[targets_R] = torch.arange(len(targets_R))
    return SpanRows(
        rows_P=row_at[student_targets],
        of_P=of_P,
        teacher_rows_Q=teacher_targets - 1,
        teacher_targets_Q=teacher_ids[teacher_targets],
        teacher_of_Q=teacher_of_Q,
    )


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


def _strip(sample: Sample, ours: set[str]) -> Sample:
    return {key: value for key, value in sample.items() if key not in ours and key != ON_POLICY}


@dataclass
class PairCollator:
    """Adds the step batch to what the host's collator returns."""

    packed: ClassVar[bool] = True
    cross_attention: bool = False
    teachers: int = 1
    sources: Sequence[HiddenStates | None] = ()
    """Set by the trainer: where each teacher's states come from, to be told of what comes."""

    def __getstate__(self) -> dict[str, Any]:
        # A worker that is not a fork gets the collator pickled, and needs none of the teachers in it.
        return {**vars(self), "sources": ()}

    def __call__(self, features: list[Any], return_tensors: str | None = None) -> Any:
        if self.packed:
            bins: list[list[Sample]] = features if isinstance(features[0], list) else [features]
        else:
            bins = [[sample] for sample in features]
        ours = set(columns(self.teachers))
        stripped = [[_strip(sample, ours) for sample in samples] for samples in bins]
        batch = super().__call__(stripped if self.packed else [samples[0] for samples in stripped], return_tensors)  # type: ignore[misc]
        labels = batch["labels"]
        left = self.tokenizer.padding_side == "left"  # type: ignore[attr-defined]
        placed = [_placed(samples, labels.shape[1] if left else None) for samples in bins]
        first, *others = (
            pair_rows(
                *(batch["input_ids"], labels, [_of_teacher(samples, teacher) for samples in placed]),
                cross_attention=self.cross_attention,
            )
            for teacher in range(1, self.teachers + 1)
        )
        first.others = tuple(others)
        if get_worker_info() is not None:
            for of_teacher, source in zip(first.each, self.sources, strict=False):
                if isinstance(source, ReadsAhead):
                    announce(of_teacher, source)
        # Last: the host measures the batch by its first entry.
        batch[KEY] = first
        if any("teacher_prompt" in sample and ON_POLICY not in sample for samples in bins for sample in samples):
            batch[KEY].samples = list(features)
        return batch


def _of_teacher(samples: list[Placed], teacher: int) -> list[Placed]:
    return [(offset, row_of(sample, teacher)) for offset, sample in samples]


def _placed(samples: list[Sample], width: int | None) -> list[Placed]:
    """The samples of a batch row with their offsets. width: of the row, where its padding stands on the left."""
    offset = 0 if width is None else width - sum(len(sample["input_ids"]) for sample in samples)
    placed = []
    for sample in samples:
        placed.append((offset, sample))
        offset += len(sample["input_ids"])
    return placed


@dataclass
class PaddedPairCollator(PairCollator, DataCollatorForSeq2Seq):
    """One conversation per batch row."""

    packed = False


@dataclass
class PackedPairCollator(PairCollator, BatchSamplerDataCollatorForSeq2Seq):
    """Several conversations per batch row, kept apart by position ids."""


@dataclass
class PackedMaskPairCollator(PairCollator, V2BatchSamplerDataCollatorForSeq2Seq):
    """Several conversations per batch row, numbered in the attention mask where the model reads it."""


def collator_class(cfg: Any, is_eval: bool) -> type[PairCollator]:
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
