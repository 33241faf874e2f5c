"""`python -m benchmarks.answers`: what the teacher cache of generated answers costs beside writing them.

The states at the answers can be kept while the teacher writes, token by token, or read again from the finished rows.
Measured are both passes, how far their states are apart, and `dskd generate --cache` against `dskd generate` and then
`dskd cache build`, as a user starts them. Models have random weights. Seconds are CPU seconds.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from benchmarks import results
from benchmarks.options import parser_of
from benchmarks.results import Row
from benchmarks.timing import Spread, ratios, taking_turns
from benchmarks.tiny import make_pair, save_model, small_recipe
from dskd_plugin.generation.answers import Sampling, Writer
from dskd_plugin.teacher_settings import TeacherSettings
from dskd_plugin.teachers.live import Teacher

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Size:
    """Layers and width of the teacher; prompts, tokens of an answer, answers of a batch."""

    layers: int
    width: int
    prompts: int
    tokens: int
    batch: int


SIZES = {"tiny": Size(2, 32, 4, 8, 2), "small": Size(8, 512, 32, 96, 8)}


@dataclass
class Bench:
    size: Size
    folder: Path

    @cached_property
    def pair(self) -> dict[str, str]:
        """The small pair with a teacher of this size."""
        from transformers import AutoTokenizer

        pair = make_pair(self.folder)
        tokenizer = AutoTokenizer.from_pretrained(pair["teacher"])
        layers, width = self.size.layers, self.size.width
        teacher = save_model(self.folder / "large", tokenizer, width=width, num_hidden_layers=layers)
        return {**pair, "teacher": teacher, "tokenizer": tokenizer}

    def load(self, dtype: str = "float32") -> Teacher:
        return Teacher(
            TeacherSettings(model=self.pair["teacher"], dtype=dtype),
            vocab_size=len(self.pair["tokenizer"]),
            device=CPU,
            attn_implementation=None,
            packed=False,
            trust_remote_code=False,
        )

    @cached_property
    def teacher(self) -> Teacher:
        return self.load()

    @cached_property
    def prompts(self) -> list[list[int]]:
        tokenizer: Any = self.pair["tokenizer"]
        rows = [json.loads(line) for line in Path(self.pair["data"]).read_text(encoding="utf-8").splitlines()]
        asked = [row["messages"][:1] for row in rows[: self.size.prompts]]
        return [tokenizer.apply_chat_template(one, add_generation_prompt=True, return_dict=False) for one in asked]

    def write(self) -> None:
        """Answers of the full length: nothing ends them."""
        sampling = Sampling(self.size.tokens, 0.0, 1.0, 0, 0)
        writer = Writer(
            self.teacher.model,
            self.pair["tokenizer"],
            vocab_size=self.teacher.head.vocab_size,
            ends=[self.teacher.head.vocab_size - 1],
            sampling=sampling,
        )
        for start in range(0, len(self.prompts), self.size.batch):
            part = self.prompts[start : start + self.size.batch]
            writer.answer(range(len(part)), part)

    def rows(self) -> list[Tensor]:
        """Finished rows: a prompt and as many tokens as an answer has."""
        generator = torch.Generator().manual_seed(0)
        ids = len(self.pair["tokenizer"])
        answers = [torch.randint(3, ids, (self.size.tokens,), generator=generator) for _ in self.prompts]
        return [torch.cat([torch.tensor(prompt), answer]) for prompt, answer in zip(self.prompts, answers, strict=True)]

    def read(self) -> None:
        """The rows once more, in batches as a build reads them, at the places of the answers."""
        rows = sorted(self.rows(), key=len)
        for start in range(0, len(rows), self.size.batch):
            part = rows[start : start + self.size.batch]
            states(self.teacher, part, self.size.tokens)


def states(teacher: Teacher, rows: list[Tensor], answer: int) -> Tensor:
    """The teacher's states before each token of the answers, of all rows."""
    lengths = torch.tensor([len(row) for row in rows])
    ends = lengths.cumsum(0)
    wanted = torch.cat([torch.arange(end - answer - 1, end - 1) for end in ends.tolist()])
    return teacher.rows(torch.cat(rows), lengths, torch.ones_like(lengths), wanted)


@torch.no_grad()
def states_of_steps(teacher: Teacher, row: Tensor, answer: int) -> Tensor:
    """The same of one row as a teacher has them that writes it: the prompt at once, then token by token."""
    found = teacher.decoder(input_ids=row[None, :-answer], use_cache=True)
    kept = [found.last_hidden_state[0, -1]]
    for token in row[-answer:-1]:
        found = teacher.decoder(input_ids=token[None, None], past_key_values=found.past_key_values, use_cache=True)
        kept.append(found.last_hidden_state[0, -1])
    return torch.stack(kept)


def distances(bench: Bench) -> list[Row]:
    """Norms of differences between states of one row, of that of the states."""
    row, answer = bench.rows()[0], bench.size.tokens
    found = {}
    for dtype in ("float32", "bfloat16"):
        teacher = bench.load(dtype)
        found[dtype] = states(teacher, [row], answer), states_of_steps(teacher, row, answer)
    teacher.model.float()  # the weights of the half, and no other rounding
    truth = states(teacher, [row], answer)
    rows = [
        Row(f"states of steps from the row's, {name}", f"{_apart(*both[::-1]):.2g}") for name, both in found.items()
    ]
    for name, of_pass in zip(("row", "steps"), found["bfloat16"], strict=True):
        rows.append(Row(f"states of the {name}, bfloat16, from float32's", f"{_apart(of_pass, truth):.3g}"))
    return rows


def _apart(states_ND: Tensor, others_ND: Tensor) -> float:
    return float((states_ND.double() - others_ND.double()).norm() / others_ND.double().norm())


def command_seconds(words: list[str], folder: Path) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "dskd_plugin.cli", *words], cwd=folder, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def commands(bench: Bench) -> list[Row]:
    """The real commands: two after each other against one."""
    recipe = small_recipe(bench.pair, bench.folder)
    (bench.folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    size = bench.size
    written = ["generate", "recipe.yaml", "--keep-unfinished", "--limit", str(size.prompts), "--device", "cpu"]
    written += ["--max-new-tokens", str(size.tokens), "--batch-size", str(size.batch), "--overwrite"]
    build = ["cache", "build", "apart.yaml", "--out", "apart", "--device", "cpu"]
    apart = command_seconds([*written, "--write-recipe", "apart.yaml"], bench.folder)
    apart += command_seconds(build, bench.folder)
    together = command_seconds([*written, "--write-recipe", "one.yaml", "--cache", "one"], bench.folder)
    return [
        Row("generate, then cache build, s", f"{apart:.3g}"),
        Row("generate --cache, s", f"{together:.3g}", "generate, then cache build", f"{together / apart:.3g}"),
    ]


def measure(bench: Bench, repeats: int) -> list[Row]:
    work = {"loading": bench.load, "writing": bench.write, "reading again": bench.read}
    seconds = taking_turns(work, repeats, CPU)
    found = [Row(f"{name}, s", str(Spread.of(values))) for name, values in seconds.items()]
    again = ratios(seconds["reading again"], seconds["writing"])
    found.append(Row("reading again, s", f"{Spread.of(seconds['reading again']).median:.3g}", "writing", str(again)))
    return [*found, *distances(bench), *commands(bench)]


def main(words: list[str] | None = None) -> None:
    parser = parser_of("answers", __doc__)
    parser.add_argument("--size", choices=list(SIZES), default="small")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args(words)
    size = SIZES[options.size]
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Bench(size, Path(folder)), options.repeats)
    setting = (
        f"teacher {size.layers} x {size.width}, float32; {size.prompts} answers of {size.tokens} tokens, "
        f"{size.batch} at a time"
    )
    results.append("answers", CPU, setting, rows, results.command_of("benchmarks.answers", words), options.results)


if __name__ == "__main__":
    main()
