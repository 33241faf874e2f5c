"""`python -m benchmarks.cache`: what building a teacher cache costs, and what a step costs that reads it.

The build is compared with the bare decoder on the same batches: no head, nothing kept. A step with the cache is
compared with the same step with the teacher in memory, and with fine-tuning. Models have random weights. Seconds are
this process's CPU seconds, on a GPU the clock's.
"""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from benchmarks import results
from benchmarks.options import dtype_of, parser_of
from benchmarks.results import Row
from benchmarks.shapes import RandomTeacher, random_model
from benchmarks.timing import Spread, ratios, taking_turns
from dskd_plugin.assemble import distillation_loss
from dskd_plugin.batch import StepBatch, TeacherText, ask
from dskd_plugin.cache.build import BATCH_TOKENS, Order, batches, build
from dskd_plugin.cache.cached_teacher import CachedTeacher
from dskd_plugin.cache.needs import wanted
from dskd_plugin.cache.ranks import Ranks
from dskd_plugin.core.overlap import Overlap
from dskd_plugin.losses.base import DistillationLoss
from dskd_plugin.models import decoder, output_head
from dskd_plugin.settings import parse_settings
from dskd_plugin.student import attach
from dskd_plugin.teachers.base import TeacherParts
from dskd_plugin.text.pieces import shared_id_events


@dataclass(frozen=True)
class Size:
    """Layers, width, heads and ids of both sides; samples of the build, their tokens from and to, rows of a step."""

    teacher: tuple[int, int, int, int]
    student: tuple[int, int, int, int]
    samples: int
    tokens: tuple[int, int]
    rows: int

    def text(self) -> str:
        sides = [f"{side[0]} x {side[1]}, V {side[3]}" for side in (self.teacher, self.student)]
        build = f"build of {self.samples} samples of {self.tokens[0]} to {self.tokens[1]} tokens"
        return f"{sides[0]} -> {sides[1]}; {build}, step of {self.rows}"


SIZES = {
    "tiny": Size((2, 32, 2, 300), (2, 16, 2, 200), 6, (10, 20), 2),
    "small": Size((12, 512, 8, 32000), (8, 256, 4, 16000), 32, (100, 400), 4),
    # A student whose layers, not whose vocabulary, cost the most, as those of real pairs.
    "deep": Size((8, 512, 8, 8000), (16, 384, 6, 8000), 8, (100, 300), 2),
    "true": Size((28, 3584, 28, 152064), (16, 2048, 32, 128256), 512, (256, 1024), 4),
}


def shape_of(side: tuple[int, int, int, int]) -> tuple[str, dict[str, Any]]:
    """Family and options of a model of these layers, width, heads and ids."""
    layers, width, heads, ids = side
    return "llama", {
        "num_hidden_layers": layers,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "vocab_size": ids,
        "max_position_embeddings": 4096,
    }


@dataclass
class Bench:
    """Two models and rows in random ids whose second half is the answer, each of its tokens paired."""

    size: Size
    device: torch.device
    dtype: torch.dtype
    folder: Path

    @cached_property
    def teacher(self) -> RandomTeacher:
        return RandomTeacher(random_model(shape_of(self.size.teacher), self.device, self.dtype, 1))

    @cached_property
    def student(self) -> Any:
        return random_model(shape_of(self.size.student), self.device, self.dtype, 0)

    @cached_property
    def dataset(self) -> Dataset:
        generator = torch.Generator().manual_seed(2)
        low, high = self.size.tokens
        lengths = torch.randint(low, high + 1, (self.size.samples,), generator=generator).tolist()
        ids = [torch.randint(self.size.teacher[3], (length,), generator=generator).tolist() for length in lengths]
        targets = [list(range(length // 2, length)) for length in lengths]
        return Dataset.from_dict({"teacher_input_ids": ids, "aligned_teacher": targets})

    def order(self, folder: Path) -> Order:
        return Order(
            folder=folder,
            teacher=lambda: {"fingerprint": {"config": "", "weights": {}, "adapter": None}, "dtype": "", "model": ""},
            made_for={},
            width=self.size.teacher[1],
            embedding=False,
            head_bytes=0,
            wanted=wanted([self.dataset]),
            datasets=[self.dataset],
            states="bfloat16",
            batch_tokens=None,
            load=lambda: self.teacher,
            say=lambda _: None,
            advice="",
        )

    def build(self) -> None:
        """A whole build, checksums and all, into an empty folder."""
        shutil.rmtree(self.folder / "built", ignore_errors=True)
        build(self.order(self.folder / "built"), Ranks())

    @torch.no_grad()
    def bare(self) -> None:
        """The decoder on the batches of the build."""
        wants = wanted([self.dataset])
        for batch in batches(wants, BATCH_TOKENS.get(self.device.type, BATCH_TOKENS["cpu"])):
            ids = [torch.tensor(self.dataset[wants[key].at[1]]["teacher_input_ids"]) for key in batch]
            lengths = torch.tensor([wants[key].length for key in batch])
            self.teacher.padded_hidden(torch.cat(ids).to(self.device), lengths)

    @cached_property
    def cached(self) -> CachedTeacher:
        found = build(self.order(self.folder / "kept"), Ranks())
        return CachedTeacher(
            self.folder / "kept", found, vocab_size=self.teacher.head.vocab_size, device=self.device, advice=""
        )

    @cached_property
    def batch(self) -> tuple[Tensor, StepBatch]:
        """The student's ids and what the collator adds: the longest samples, for the student cut to one length."""
        theirs = [torch.tensor(ids) for ids in sorted(self.dataset["teacher_input_ids"], key=len)[-self.size.rows :]]
        length = len(theirs[0])
        ids = torch.stack([part[:length] % self.size.student[3] for part in theirs])
        mine, teachers, start = [], [], 0
        for number, part in enumerate(theirs):
            targets = torch.arange(len(part) // 2, min(len(part), length))
            mine.append(targets - 1 + number * length)
            teachers.append(targets - 1 + start)
            start += len(part)
        rows_R = torch.cat(mine)
        text = TeacherText(
            torch.cat(theirs),
            torch.tensor([len(part) for part in theirs]),
            torch.ones(len(theirs), dtype=torch.long),
            torch.cat(teachers),
        )
        step = StepBatch(rows_R, ids.flatten()[rows_R + 1], teacher_text=text)
        return ids.to(self.device), step.to(self.device)

    def head_work(self) -> int:
        """Multiplications of one product with the teacher's head and one with the student's, of all paired rows."""
        (_, theirs, _, their_ids), (_, ours, _, our_ids) = self.size.teacher, self.size.student
        return len(self.batch[1].rows_R) * (theirs * their_ids + ours * our_ids)

    def student_work(self) -> int:
        """Multiplications of fine-tuning, forward and backward: three times those of the weights."""
        ids, step = self.batch
        head = output_head(self.student).weight.numel()
        body = sum(parameter.numel() for parameter in decoder(self.student).layers.parameters())
        return 3 * (ids.numel() * body + len(step.rows_R) * head)

    def loss(self, method: str) -> DistillationLoss:
        """The loss of a method, inside the student."""
        settings = parse_settings({"teacher": {"model": "random"}, "method": method})
        ours, theirs = self.size.student[3], self.size.teacher[3]
        sides = [SimpleNamespace(vocab_size=ids) for ids in (ours, theirs)]
        pair: Any = SimpleNamespace(student=sides[0], teacher=sides[1], identity=False)
        shared = torch.arange(int(0.8 * ours))
        to_student = torch.full((theirs,), -1)
        to_student[: len(shared)] = shared
        overlap = Overlap(shared, shared.clone(), to_student, 0.8, 0.8, 0)
        events = shared_id_events(overlap, (ours, theirs)).to(self.device)
        teacher = None if method == "sft" else self.teacher
        found = distillation_loss(settings, self.student, teacher, pair, overlap, events, seed=0)
        attach(self.student, found)
        return found

    def step(self, loss: DistillationLoss, teacher: TeacherParts | None) -> None:
        """One micro-batch, forward and backward, gradients thrown away."""
        ids, step = self.batch
        asked = ask(step, teacher)
        asked.window = [asked]
        loss.micro_batch = asked
        try:
            value = self.student(input_ids=ids, use_cache=False, logits_to_keep=1)["loss"]
        finally:
            loss.micro_batch = None
        value.backward()
        self.student.zero_grad(set_to_none=True)


def measure(bench: Bench, repeats: int) -> list[Row]:
    built = taking_turns({"bare decoder": bench.bare, "build": bench.build}, repeats, bench.device)
    tokens = sum(map(len, bench.dataset["teacher_input_ids"]))
    speed = {name: [tokens / value for value in seconds] for name, seconds in built.items()}
    rows = [
        Row("bare decoder, tokens/s", str(Spread.of(speed["bare decoder"]))),
        Row(
            "build, tokens/s",
            str(Spread.of(speed["build"])),
            "bare decoder",
            str(ratios(speed["build"], speed["bare decoder"])),
        ),
    ]
    sft, dskd = bench.loss("sft"), bench.loss("dskd")
    steps = {
        "sft": lambda: bench.step(sft, None),
        "dskd, live": lambda: bench.step(dskd, bench.teacher),
        "dskd, cached": lambda: bench.step(dskd, bench.cached),
        "states, live": lambda: ask(bench.batch[1], bench.teacher),
        "states, cached": lambda: ask(bench.batch[1], bench.cached),
    }
    seconds = taking_turns(steps, repeats, bench.device)
    rows += [Row(f"{name}, s", str(Spread.of(values))) for name, values in seconds.items()]
    heads, student = bench.head_work(), bench.student_work()
    rows.append(Row("one product with each head on the pairs", f"{heads / student:.2g} of sft"))
    for name, base in (("dskd, cached", "sft"), ("dskd, cached", "dskd, live"), ("states, cached", "states, live")):
        middle = f"{Spread.of(seconds[name]).median:.3g}"
        rows.append(Row(f"{name}, s", middle, base, str(ratios(seconds[name], seconds[base]))))
    return rows


def main(words: list[str] | None = None) -> None:
    parser = parser_of("cache", __doc__, sizes=SIZES)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args(words)
    device, dtype = options.device, dtype_of(options)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(SIZES[options.size], device, dtype, Path(folder))
        rows = measure(bench, options.repeats)
    setting = f"{bench.size.text()}, {str(dtype).removeprefix('torch.')}"
    results.append("cache", device, setting, rows, results.command_of("benchmarks.cache", words), options.results)


if __name__ == "__main__":
    main()
