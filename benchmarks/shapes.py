"""Pairs of models with random weights in the shapes of real ones: nothing is downloaded.

Shapes: B rows of a batch, T tokens of a row, V and U ids of student and teacher.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.dense import SUPPORT, wide
from dskd_plugin.assemble import distillation_loss
from dskd_plugin.batch import StepBatch, TeacherText, ask
from dskd_plugin.core.backend import Backend
from dskd_plugin.core.events import Events
from dskd_plugin.core.fused.backend import FusedBlocks
from dskd_plugin.core.overlap import Overlap
from dskd_plugin.losses.base import FUSED_BLOCK_ELEMENTS, DistillationLoss
from dskd_plugin.methods import method_of
from dskd_plugin.models import decoder, output_head, read_head
from dskd_plugin.settings import Settings, parse_settings
from dskd_plugin.student import attach
from dskd_plugin.teachers.live import Teacher

# Of a SmolLM2 student's tokens in MBPP, the share that begin where a token of Qwen2.5's begins (docs/log.md).
PAIRED = 0.788
# Of SmolLM2's ids: the share that has an event of its own with Qwen2.5; the other ids are further ones of these events.
EVENTS = 0.794

METHODS: dict[str, dict[str, Any]] = {
    "sft": {"method": "sft"},
    "overlap_kd": {"method": "overlap_kd"},
    "overlap_kd_support": {"method": "overlap_kd", "shared": "ids", "support": SUPPORT},
    "dskd": {},
    "dskd_both": {"spaces": "both"},
}

# Values of `dskd.impl`. A loss is named by its method, and by what computes it where that is not the reference.
IMPLS = ("blocks", "fused")


def settings_of(method: str) -> Settings:
    """Those of a method of METHODS."""
    return parse_settings({"teacher": {"model": "random"}, **METHODS[method]})


def computed(methods: Iterable[str], impls: Iterable[str]) -> dict[str, tuple[str, Backend | None]]:
    """Name -> (method, backend) of every loss to measure; a method without kernels is measured in blocks alone."""
    found: dict[str, tuple[str, Backend | None]] = {}
    for method in methods:
        if "blocks" in impls:
            found[method] = method, None
        settings = settings_of(method)
        if "fused" in impls and method_of(settings).fuses(settings):
            found[f"{method}, fused"] = method, FusedBlocks(FUSED_BLOCK_ELEMENTS)
    return found


def impls_on(device: torch.device) -> tuple[str, ...]:
    """Those that run on a device."""
    return IMPLS if device.type == "cuda" else IMPLS[:1]


@dataclass(frozen=True)
class Size:
    """A pair of models and the batch that they read. student, teacher: (family, configuration)."""

    student: tuple[str, dict[str, Any]]
    teacher: tuple[str, dict[str, Any]]
    rows: int
    tokens: int
    prompt: int

    def text(self) -> str:
        (_, student), (_, teacher) = self.student, self.teacher
        sides = [
            f"{side['num_hidden_layers']} x {side['hidden_size']}, V {side['vocab_size']}"
            for side in (teacher, student)
        ]
        return f"{sides[0]} -> {sides[1]}; {self.rows} rows x {self.tokens} tokens, {self.prompt} of them prompt"


def _sizes(layers: int, width: int, inner: int, heads: int, kv_heads: int, vocab: int, **more: Any) -> dict[str, Any]:
    return {
        "num_hidden_layers": layers,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "tie_word_embeddings": True,
        "max_position_embeddings": 8192,
        **more,
    }


SIZES = {
    "tiny": Size(
        ("llama", _sizes(2, 32, 64, 4, 2, 420)), ("qwen2", _sizes(2, 48, 96, 4, 2, 500)), rows=2, tokens=24, prompt=6
    ),
    # Qwen2.5-Coder-0.5B -> SmolLM2-135M
    "small": Size(
        ("llama", _sizes(30, 576, 1536, 9, 3, 49152)),
        ("qwen2", _sizes(24, 896, 4864, 14, 2, 151936)),
        rows=4,
        tokens=300,
        prompt=75,
    ),
    # Qwen2.5-7B -> Llama-3.2-1B
    "true": Size(
        ("llama", _sizes(16, 2048, 8192, 32, 8, 128256, head_dim=64)),
        ("qwen2", _sizes(28, 3584, 18944, 28, 4, 152064, tie_word_embeddings=False)),
        rows=4,
        tokens=1024,
        prompt=256,
    ),
}


class RandomTeacher(Teacher):
    """The live teacher with a model that is handed in, in place of one that is loaded."""

    def __init__(self, model: Any) -> None:
        self.model = model.requires_grad_(False).eval()
        self.decoder = decoder(model)
        self.head = read_head(model, output_head(model), model.config.vocab_size).detach()
        self.packed = False


def random_model(side: tuple[str, dict[str, Any]], device: torch.device, dtype: torch.dtype, seed: int) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    family, options = side
    with device:
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(family, **options), dtype=dtype, attn_implementation="sdpa"
        )
    return model


def events_like(student_ids: int, teacher_ids: int) -> Events:
    """Events in the proportions of SmolLM2 and Qwen2.5: most have one id of each side, a few have very many."""
    count = int(EVENTS * student_ids)

    def side(ids: int, busy: int) -> Tensor:
        # A cube, so that few events take most of the further ids, as the first bytes of a script do.
        further = torch.rand(ids - count, generator=torch.Generator().manual_seed(ids)) ** 3 * busy
        event_V = torch.cat([torch.arange(count), further.long()])
        event_V[-20:] = count
        return event_V[torch.randperm(ids, generator=torch.Generator().manual_seed(ids))]

    return Events(side(student_ids, count // 10), side(teacher_ids, count // 5), count + 1)


def overlap_like(student_ids: int, teacher_ids: int) -> Overlap:
    shared = torch.arange(int(EVENTS * student_ids))
    to_student = torch.full((teacher_ids,), -1)
    to_student[: len(shared)] = shared
    return Overlap(shared, shared.clone(), to_student, EVENTS, EVENTS, 0)


@dataclass
class Bench:
    """A student, a teacher, what their vocabularies share, and one batch."""

    size: Size
    device: torch.device
    dtype: torch.dtype = torch.float32

    @cached_property
    def student(self) -> Any:
        return random_model(self.size.student, self.device, self.dtype, 0)

    @cached_property
    def teacher(self) -> RandomTeacher:
        return RandomTeacher(random_model(self.size.teacher, self.device, self.dtype, 1))

    @cached_property
    def events(self) -> Events:
        return events_like(*self._ids).to(self.device)

    @property
    def _ids(self) -> tuple[int, int]:
        return self.size.student[1]["vocab_size"], self.size.teacher[1]["vocab_size"]

    @property
    def response_rows(self) -> int:
        return self.size.rows * (self.size.tokens - self.size.prompt)

    @property
    def paired_rows(self) -> int:
        return int(PAIRED * self.response_rows)

    @cached_property
    def batch(self) -> StepBatch:
        """What the collator adds for a step, in random ids."""
        size, generator = self.size, torch.Generator().manual_seed(2)
        teacher_ids = self._ids[1]
        first, tokens = size.prompt - 1, size.tokens
        positions_R = torch.cat([torch.arange(first, tokens - 1) + row * tokens for row in range(size.rows)])
        order_R = torch.randperm(len(positions_R), generator=generator)
        paired_N = order_R[: self.paired_rows].sort().values
        rows_R = torch.cat([positions_R[paired_N], positions_R[order_R[self.paired_rows :].sort().values]])
        text = TeacherText(
            ids_T=torch.randint(teacher_ids, (size.rows * tokens,), generator=generator),
            lengths_S=torch.full((size.rows,), tokens),
            samples_B=torch.ones(size.rows, dtype=torch.long),
            rows_M=positions_R[paired_N],
        )
        targets_R = self.input_ids.cpu().flatten()[rows_R + 1]
        ce_R = torch.ones(len(rows_R), dtype=torch.bool)
        return StepBatch(rows_R, targets_R, ce_R, teacher_text=text).to(self.device)

    @property
    def shared_ids(self) -> int:
        """Ids that are the same token on both sides, the first of both."""
        return len(overlap_like(*self._ids).student_ids_O)

    @cached_property
    def input_ids(self) -> Tensor:
        generator = torch.Generator().manual_seed(3)
        ids = torch.randint(self._ids[0], (self.size.rows, self.size.tokens), generator=generator)
        return ids.to(self.device)

    def loss(self, method: str, backend: Backend | None = None) -> DistillationLoss:
        """The loss of a method of METHODS, inside the student."""
        settings = settings_of(method)
        sides = [SimpleNamespace(vocab_size=ids) for ids in self._ids]
        pair: Any = SimpleNamespace(student=sides[0], teacher=sides[1], identity=False)
        teacher = None if method == "sft" else self.teacher
        overlap = None if method == "sft" else overlap_like(*self._ids)
        loss = distillation_loss(settings, self.student, teacher, pair, overlap, self.events, seed=0, backend=backend)
        attach(self.student, loss)
        return loss

    def step(self, loss: DistillationLoss, *, with_teacher: bool = True) -> Tensor:
        """One micro-batch as the trainer runs it, forward and backward, gradients thrown away. Returns the loss."""
        batch = ask(self.batch, self.teacher if with_teacher else None)
        batch.window = [batch]
        loss.micro_batch = batch
        try:
            value = self.student(input_ids=self.input_ids, use_cache=False, logits_to_keep=1)["loss"]
        finally:
            loss.micro_batch = None
        value.backward()
        self.student.zero_grad(set_to_none=True)
        return value.detach()

    def student_states(self) -> Tensor:
        """The student's last hidden states [R, d] at the response rows, with their graph."""
        hidden: Tensor = decoder(self.student)(input_ids=self.input_ids, use_cache=False).last_hidden_state
        return hidden.flatten(0, 1)[self.batch.rows_R]

    def teacher_states(self) -> Tensor:
        """The teacher's last hidden states [N, D] at the paired rows."""
        asked = ask(self.batch, self.teacher)
        return asked.teacher_states

    def plain_sft(self) -> Tensor:
        """Plain fine-tuning on the same response rows: all logits at once, cross-entropy, backward."""
        logits_RV = wide(nn.functional.linear(self.student_states(), output_head(self.student).weight))
        value = nn.functional.cross_entropy(logits_RV, self.batch.targets_R)
        value.backward()
        self.student.zero_grad(set_to_none=True)
        return value.detach()

    def floor(self) -> Tensor:
        """F: plain fine-tuning and the teacher's decoder on its rows, without its head."""
        self.teacher_states()
        return self.plain_sft()
