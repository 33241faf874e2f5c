"""One run: its recipe, training through the `axolotl` command, its measures, and what is kept of it on disk."""

import os
import shutil
import sys
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import yaml

from benchmarks.real_pair import data, measures
from benchmarks.real_pair.table import BASE, BATCH, RATES, SETTINGS, Run, accepted, block, resolved, same_behaviour
from benchmarks.study import launch, states
from benchmarks.study.data import Row, read
from benchmarks.study.runs import environment, read_json, write_json
from quickstart.stages import digest

SEQUENCE = 768
ANSWER_TOKENS = 300


@dataclass(frozen=True)
class Place:
    """out: the benchmark's folder; data: the public data sets; limits: documents of a measure that `dskd-eval` makes.

    A measure without a limit, or with 0, takes all documents.
    """

    out: Path
    data: Path
    limits: dict[str, int]
    measures: tuple[str, ...]
    keep_models: bool

    def folder(self, run: Run) -> Path:
        return self.out / "runs" / run.name

    def model(self, run: Run) -> Path:
        return self.out / "models" / roles(run.pair)[1] if run.setting == BASE else self.folder(run) / "model"


def roles(pair: str) -> tuple[str, str]:
    """Folders of teacher and student under models/."""
    return ("teacher", "student") if pair == "forward" else ("student", "teacher")


def rows_name(run: Run) -> str:
    """The training rows of a run, a file of data/."""
    if run.data == "few":
        return f"few-{run.pair}"
    return f"{run.data}-gold" if SETTINGS[run.setting].rows == "gold" else f"{run.data}-generated-{run.pair}"


def common(pair: str, dskd: dict[str, Any], rows: str, output: str) -> dict[str, Any]:
    """What every recipe says, of a training and of `dskd generate`; paths hold in the benchmark's folder."""
    teacher, student = roles(pair)
    return {
        "base_model": f"./models/{student}",
        "output_dir": output,
        "plugins": ["dskd"],
        # float32: a CPU is slower in bfloat16.
        "dskd": {"teacher": {"model": f"./models/{teacher}", "dtype": "float32"}, **dskd},
        "datasets": [{"path": f"data/{rows}.jsonl", "type": "chat_template", "field_messages": "messages"}],
        "chat_template": "tokenizer_default",
        "dataset_num_proc": 1,
        # A worker is a fork, and each step of the optimizer would copy its share of the weights.
        "dataloader_num_workers": 0,
        "sequence_len": SEQUENCE,
        "sample_packing": False,
        "bf16": False,
        "fp16": False,
        "tf32": False,
        "attn_implementation": "sdpa",
    }


def recipe(run: Run, dskd: dict[str, Any], rows: int) -> dict[str, Any]:
    """The recipe of a run over a file of so many rows."""
    return common(run.pair, dskd, rows_name(run), f"./runs/{run.name}/model") | {
        "micro_batch_size": BATCH,
        "gradient_accumulation_steps": 1,
        "max_steps": run.steps,
        "num_epochs": -(-run.steps * BATCH // rows),
        "learning_rate": run.rate,
        "lr_scheduler": "cosine",
        "warmup_ratio": 0.05,
        "optimizer": "adamw_torch",
        "weight_decay": 0.0,
        "seed": run.seed,
        "logging_steps": 1,
        "save_steps": run.steps,
        "save_only_model": True,
    }


def finished(run: Run, place: Place) -> bool:
    """Whether nothing is left to do."""
    trained = run.setting == BASE or (place.folder(run) / "train.json").is_file()
    return trained and not missing(run, place) and not stale(run, place)


def missing(run: Run, place: Place) -> list[str]:
    """Measures that the run lacks."""
    return [kind for kind in place.measures if not (place.folder(run) / f"{kind}.json").is_file()]


def obstacle(run: Run, place: Place) -> str | None:
    """Why a run cannot start now, None when it can."""
    if run.setting == BASE:
        return None
    if accepted(block(run.setting, run.data)) is None:
        return "the installed plugin does not know a setting of it"
    file = place.out / "data" / f"{rows_name(run)}.jsonl"
    return None if file.is_file() else f"its rows {file.name} are not there, see the stage generate"


def stale(run: Run, place: Place) -> bool:
    """Whether a finished run was made with defaults that the installed plugin no longer has."""
    file = place.folder(run) / "train.json"
    dskd = None if run.setting == BASE else accepted(block(run.setting, run.data))
    return dskd is not None and file.is_file() and not same_behaviour(read_json(file)["settings"], resolved(dskd))


def work(run: Run, place: Place) -> None:
    """Train and measure what is missing, then free the disk; a finished part is not done again."""
    folder = place.folder(run)
    if stale(run, place):
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if not place.model(run).is_dir() or (run.setting != BASE and not (folder / "train.json").is_file()):
        train(run, place)
    rows: dict[str, list[Row]] = {
        "heldout": read(place.out / "data" / f"{run.data}-heldout.jsonl"),
        "code": read(place.out / "data" / "mbpp-heldout.jsonl"),
    }
    options = {"data": place.data, "limits": place.limits, "easy": place.out / "tasks" / "easy_functions.yaml"}
    for kind in missing(run, place):
        started = time.process_time()
        found = measures.measure(kind, place.model(run), rows, folder, options)
        spent = time.process_time() - started
        write_json(folder / f"{kind}.json", found | {"cpu_seconds": spent, "date": date.today().isoformat()})
        print(f"{run.name}: {kind} measured in {spent:.0f} CPU s", flush=True)
    if run.setting != BASE and not place.keep_models:
        shutil.rmtree(folder / "model", ignore_errors=True)


def train(run: Run, place: Place) -> None:
    """`axolotl train` in this process, which ends after it; leaves `model/` and `train.json` in the run's folder."""
    from dskd_plugin.host.trainer import on_create

    folder, out = place.folder(run), place.out
    shutil.rmtree(folder / "model", ignore_errors=True)
    dskd = accepted(block(run.setting, run.data))
    assert dskd is not None
    file = out / "data" / f"{rows_name(run)}.jsonl"
    made = recipe(run, dskd, len(read(file)))
    # Axolotl names its prepared rows after their path, not their content, and keeps the order of the first seed.
    made["dataset_prepared_path"] = f"prepared/{digest(file)}-{run.pair}-{run.seed}"
    (folder / "recipe.yaml").write_text(yaml.safe_dump(made, sort_keys=False), encoding="utf-8")
    on_create.append(states.in_folder(out / "states"))
    started, processor = time.monotonic(), time.process_time()
    launch.axolotl(["train", f"runs/{run.name}/recipe.yaml", "--launcher", "python"], out)
    seconds = {"wall": time.monotonic() - started, "cpu": time.process_time() - processor}
    (checkpoint,) = (folder / "model").glob("checkpoint-*")
    log = read_json(checkpoint / "trainer_state.json")["log_history"]
    shutil.rmtree(checkpoint)
    facts = {"recipe": made, "settings": resolved(dskd), "log": log, "seconds": seconds, "environment": environment()}
    write_json(folder / "train.json", facts | {"date": date.today().isoformat()})


def generate(pair: str, source: str, out: Path) -> None:
    """`dskd generate`: the teacher's answers to the prompts of a data set; goes on where an earlier one stopped."""
    from dskd_plugin.cli import main

    folder = out / "data"
    target = folder / f"{source}-generated-{pair}.jsonl"
    if not target.is_file():
        # Axolotl takes no recipe that could not train.
        training = {"micro_batch_size": BATCH, "num_epochs": 1, "learning_rate": RATES[0]}
        prompts = "few-prompts" if source == "few" else f"{source}-gold"
        made = common(pair, {}, prompts, f"./generated-{pair}") | training
        file = out / f"generate-{source}-{pair}.yaml"
        file.write_text(yaml.safe_dump(made, sort_keys=False), encoding="utf-8")
        os.chdir(out)
        arguments = ["generate", file.name, "--out", str(target.relative_to(out))]
        main.main(args=[*arguments, "--max-new-tokens", str(ANSWER_TOKENS)], prog_name="dskd", standalone_mode=False)
    if source == "few":
        data.few(folder / "few_gold-gold.jsonl", target, folder / f"few-{pair}.jsonl")


def link_models(out: Path, teacher: Path, student: Path) -> None:
    """models/teacher and models/student, so that no recipe and no record holds a path of this machine."""
    folder = out / "models"
    folder.mkdir(parents=True, exist_ok=True)
    for name, target in (("teacher", teacher), ("student", student)):
        if not (target / "config.json").is_file():
            raise ValueError(
                f"--{name}: expected a model folder with a config.json, got {target}. "
                "Give the folder of the saved model."
            )
        link = folder / name
        if link.is_symlink() and link.resolve() != target.resolve():
            sys.exit(f"--{name}: expected {link.resolve()} as in {out}, got {target}. Choose another --out.")
        if not link.is_symlink():
            link.symlink_to(target.resolve(), target_is_directory=True)
