"""One run: its recipe, training through the `axolotl` command, its scores and its record on disk."""

import json
import os
import platform
import shutil
import subprocess
import time
from dataclasses import dataclass
from functools import cache as remember
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from benchmarks.study import evaluate, gradients, launch, states
from benchmarks.study.table import METHODS, Size, block
from quickstart.stages import digest

PACKAGES = ("dskd", "axolotl", "torch", "transformers", "lm_eval")


@dataclass(frozen=True)
class Run:
    """A method (with one change, when `ablation` is set) on a pair and a task, at one rate and seed."""

    task: str
    pair: str
    method: str
    rate: float
    seed: int
    ablation: str | None = None

    @property
    def name(self) -> str:
        label = self.method if self.ablation is None else f"{self.method}+{self.ablation}"
        return f"{self.task}-{self.pair}-{label}-{self.rate:g}-{self.seed}".replace(" ", "_").replace(",", "")

    def folder(self, out: Path) -> Path:
        return out / "runs" / self.name


def recipe(run: Run, size: Size) -> dict[str, Any]:
    """The recipe of a run; paths hold in the study's output folder."""
    dskd = {"teacher": {"model": f"./teacher-{run.task}"}, **block(run.method, run.ablation)}
    if "on_policy" in dskd:
        dskd["on_policy"] = dskd["on_policy"] | size.on_policy
    return {
        "base_model": f"./student-{run.pair}",
        "output_dir": f"./runs/{run.name}/model",
        "plugins": ["dskd"],
        "dskd": dskd,
        "datasets": [
            {
                "path": f"data/{run.task}-{METHODS[run.method].rows}.jsonl",
                "type": "chat_template",
                "field_messages": "messages",
            }
        ],
        "chat_template": "tokenizer_default",
        "dataset_num_proc": 1,
        # A worker is a fork, and each step of the optimizer would copy its share of the weights.
        "dataloader_num_workers": 0,
        "dataset_prepared_path": "prepared",
        "sequence_len": 384,
        "sample_packing": False,
        "micro_batch_size": size.batch,
        "gradient_accumulation_steps": 1,
        "max_steps": size.steps,
        "num_epochs": -(-size.steps * size.batch // size.rows[run.task]),
        "learning_rate": run.rate,
        "lr_scheduler": "cosine",
        "warmup_ratio": 0.05,
        "optimizer": "adamw_torch",
        "weight_decay": 0.01,
        "seed": run.seed,
        "bf16": False,
        "fp16": False,
        "tf32": False,
        "attn_implementation": "sdpa",
        "logging_steps": 4,
        "save_steps": size.steps,
        "save_only_model": True,
    } | size.train


def write_json(file: Path, value: Any) -> None:
    """The whole file or none of it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    partial.write_text(json.dumps(value, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(file)


def read_json(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def train(run: Run, size: Size, out: Path, *, probes: int = 0) -> None:
    """Train unless it was finished; leaves `model/` and `train.json` in the run's folder.

    probes: number of steps at which the gradient of each term is measured.
    """
    import torch

    from dskd_plugin.host.trainer import on_create

    folder = run.folder(out)
    if (folder / "train.json").is_file():
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    made = recipe(run, size)
    # Axolotl names its prepared rows after their path, not their content.
    made["dataset_prepared_path"] = f"prepared/{digest(out / made['datasets'][0]['path'])}"
    (folder / "recipe.yaml").write_text(yaml.safe_dump(made, sort_keys=False), encoding="utf-8")
    gpu = torch.cuda.is_available()
    kept = None if gpu else states.File(out / f"teacher-{run.task}-states.pt")
    # This process trains once and ends, so nothing is taken back.
    if kept:
        on_create.append(states.keep(lambda teacher: kept))
    if probes:
        on_create.append(gradients.watch(folder / "gradients.jsonl", every=max(1, size.steps // probes)))
    started, processor = time.monotonic(), time.process_time()
    launch.axolotl(["train", f"runs/{run.name}/recipe.yaml", "--launcher", "python"], out)
    seconds = {"wall": time.monotonic() - started, "cpu": time.process_time() - processor}
    if kept:
        kept.save()
    memory = {"gpu_gib": torch.cuda.max_memory_allocated() / 2**30} if gpu else {}
    (checkpoint,) = (folder / "model").glob("checkpoint-*")
    log = read_json(checkpoint / "trainer_state.json")["log_history"]
    shutil.rmtree(checkpoint, ignore_errors=True)
    write_json(
        folder / "train.json",
        {"recipe": made, "log": log, "seconds": seconds, "memory": memory, "environment": environment()},
    )


def drop_stale(found: list[Run], size: Size, out: Path) -> list[Run]:
    """`found`, after deleting what is left of runs whose recipe was another one."""
    for run in found:
        file = run.folder(out) / "train.json"
        made = {"dataset_prepared_path": None}
        if file.is_file() and read_json(file)["recipe"] | made != recipe(run, size) | made:
            shutil.rmtree(run.folder(out))
    return found


def measure(run: Run, split: str, out: Path, *, answers: bool) -> None:
    """Scores on a split, written to `<split>.json` (likelihoods only: `<split>-likelihood.json`)."""
    folder = run.folder(out)
    file = folder / (f"{split}.json" if answers else f"{split}-likelihood.json")
    if file.is_file():
        return
    started = time.process_time()
    if answers:
        found = evaluate.heldout(out, folder / "model", run.task, folder / f"eval-{split}", split=split)
    else:
        found = evaluate.validation(out, folder / "model", run.task)
    write_json(file, found | {"seconds": time.process_time() - started})


def forget_model(run: Run, out: Path) -> None:
    """Free the disk; the record stays."""
    shutil.rmtree(run.folder(out) / "model", ignore_errors=True)


@remember
def environment() -> dict[str, Any]:
    """What can move a number: versions, commit, device."""
    import torch

    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    root = Path(__file__).resolve().parents[2]
    git = ["git", "-C", str(root)]
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    changed = subprocess.run(
        [*git, "status", "--porcelain", "dskd_plugin", "eval"], capture_output=True, text=True
    ).stdout.strip()
    cuda = torch.cuda.is_available()
    return {
        "packages": versions,
        "python": platform.python_version(),
        "commit": commit + ("+changes" if changed else ""),
        "device": torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} thread",
    }
