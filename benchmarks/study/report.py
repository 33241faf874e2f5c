"""Tables and plots from the committed records; the tables of docs/study.md stand between marker comments."""

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from dskd_eval.stats import holm

from benchmarks.study import records
from benchmarks.study.records import Record
from benchmarks.study.statistics import Difference, Floats, paired, score
from benchmarks.study.table import ABLATIONS, METHODS

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "study.md"
PLOTS = ROOT / "docs" / "plots"
TASKS = {"qa": "short questions", "text": "GSM8K and Dolly"}
PAIRS = {"one": "one tokenizer", "two": "two tokenizers"}
BASE = "sft"
# (title, method, ablation) in the order of the tables of changes
CHANGES: list[tuple[str, str, str | None]] = [
    *((METHODS[name].title, name, None) for name in (BASE, "dskd")),
    *((name, "dskd", name) for name in ABLATIONS),
]
TERMS = ("ce", "t2s_kd", "s2t_kd", "kd")


@dataclass(frozen=True)
class Metric:
    """key in a record; sizes: key of the document sizes, None where every document weighs the same."""

    title: str
    key: str
    sizes: str | None
    lower_is_better: bool
    factor: float = 1.0
    digits: int = 3


METRICS = (
    Metric("bits per byte, gold", "gold_bits", "gold_bytes", True),
    Metric("bits per byte, teacher's answers", "teacher_bits", "teacher_bytes", True),
    Metric("exact match %", "exact", None, False, 100, 1),
    Metric("Rouge-L", "rouge_l", None, False, 100, 1),
    Metric("same answer as the teacher %", "same_as_teacher", None, False, 100, 1),
)


class Study:
    """The records of one file, looked up by what they are."""

    def __init__(self, found: list[Record]) -> None:
        self.documents = {(made["task"], made["split"]): made for made in found if made["kind"] == "documents"}
        self.gradients = [made for made in found if made["kind"] == "gradients"]
        self.runs = [made for made in found if made["kind"] == "run"]

    def settings(self) -> list[tuple[str, str]]:
        """(task, pair) that have finished runs, in a fixed order."""
        present = {(run["task"], run["pair"]) for run in self.runs if "heldout" in run}
        return [(task, pair) for task in TASKS for pair in PAIRS if (task, pair) in present]

    def chosen(self, task: str, pair: str, method: str, ablation: str | None, split: str) -> list[Record]:
        """Runs that were scored on the split, by seed."""
        wanted = (task, pair, method, ablation)
        found = [
            run
            for run in self.runs
            if (run["task"], run["pair"], run["method"], run["ablation"]) == wanted and split in run
        ]
        return sorted(found, key=lambda run: run["seed"])

    def values(self, runs: list[Record], split: str, metric: Metric) -> Floats:
        """[seeds, documents]."""
        return np.array([run[split][metric.key] for run in runs], dtype=float)

    def sizes(self, task: str, split: str, metric: Metric, count: int) -> Floats:
        if metric.sizes is None:
            return np.ones(count)
        return np.array(self.documents[task, split][metric.sizes], dtype=float)

    def teacher(self, task: str, split: str, metric: Metric) -> float | None:
        found = self.documents[task, split].get("teacher", {}).get(metric.key)
        if found is None:
            return None
        values = np.array([found], dtype=float)
        return score(values, self.sizes(task, split, metric, values.shape[1]))


def against(study: Study, base: list[Record], runs: list[Record], split: str, metric: Metric) -> Difference | None:
    """runs - base over the seeds that both have; None without such seeds or without the metric."""
    shared = sorted({run["seed"] for run in base} & {run["seed"] for run in runs})
    one, other = ([run for run in side if run["seed"] in shared] for side in (runs, base))
    if not shared or any(metric.key not in run[split] for run in one + other):
        return None
    values = study.values(one, split, metric), study.values(other, split, metric)
    return paired(*values, study.sizes(one[0]["task"], split, metric, values[0].shape[1]))


def shown(value: float, metric: Metric, *, sign: bool = False) -> str:
    return f"{value * metric.factor:{'+' if sign else ''}.{metric.digits}f}"


def interval(found: Difference | None, metric: Metric) -> str:
    if found is None:
        return ""
    low, high = (shown(value, metric, sign=True) for value in (found.low, found.high))
    return f"{shown(found.value, metric, sign=True)} [{low}, {high}]"


def markdown(head: list[str], rows: Iterable[list[str]]) -> str:
    lines = [head, ["---"] + ["--:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def comparison(study: Study, task: str, pair: str) -> str:
    """Held-out scores of every method: mean over seeds, difference to SFT, Holm-adjusted p over the methods."""
    parts = []
    base = study.chosen(task, pair, BASE, None, "heldout")
    methods = [name for name, method in METHODS.items() if pair in method.pairs]
    found = {name: study.chosen(task, pair, name, None, "heldout") for name in methods}
    found = {name: runs for name, runs in found.items() if runs}
    all_seeds = sorted({run["seed"] for runs in found.values() for run in runs})
    for metric in METRICS:
        # Not measured, or zero for every document of every run.
        if not any(any(run["heldout"].get(metric.key, ())) for runs in found.values() for run in runs):
            continue
        gaps = {name: against(study, base, runs, "heldout", metric) for name, runs in found.items() if name != BASE}
        tested = [name for name, gap in gaps.items() if gap is not None]
        adjusted = dict(zip(tested, holm([gaps[name].p for name in tested if gaps[name]]), strict=True))  # type: ignore[union-attr]
        rows = []
        for name, runs in found.items():
            values = study.values(runs, "heldout", metric)
            sizes = study.sizes(task, "heldout", metric, values.shape[1])
            seeds = {run["seed"]: score(values[i : i + 1], sizes) for i, run in enumerate(runs)}
            rows.append(
                [
                    METHODS[name].title,
                    f"{runs[0]['rate']:g}",
                    shown(score(values, sizes), metric),
                    " ".join(shown(seeds[seed], metric) if seed in seeds else "-" for seed in all_seeds),
                    interval(gaps.get(name), metric),
                    f"{adjusted[name]:.3f}" if name in adjusted else "",
                ]
            )
        teacher = study.teacher(task, "heldout", metric)
        if teacher is not None:
            rows.append(["teacher, tuned", "", shown(teacher, metric), "", "", ""])
        head = [metric.title, "rate", "mean", "by seed", "difference to SFT [95 %]", "p (Holm)"]
        parts.append(markdown(head, rows))
    return "\n\n".join(parts)


def overview(study: Study) -> str:
    """Difference of every method to SFT in bits per byte of the gold answers, all tasks and pairs side by side."""
    metric, settings = METRICS[0], study.settings()
    rows = []
    for name, method in METHODS.items():
        cells = []
        for task, pair in settings:
            base, runs = (study.chosen(task, pair, which, None, "heldout") for which in (BASE, name))
            if name == BASE:
                values = study.values(runs, "heldout", metric)
                cells.append(shown(score(values, study.sizes(task, "heldout", metric, values.shape[1])), metric))
            else:
                cells.append(interval(against(study, base, runs, "heldout", metric), metric))
        if any(cells):
            rows.append([method.title, *cells])
    return markdown([metric.title, *(f"{TASKS[task]}, {PAIRS[pair]}" for task, pair in settings)], rows)


def last(run: Record, name: str, part: float = 0.1) -> float | None:
    """Mean of the last tenth of a logged series."""
    series = run["curve"].get(name)
    return None if not series else float(np.mean(series[-max(1, math.ceil(part * len(series))) :]))


def first(run: Record, name: str) -> float | None:
    series = run["curve"].get(name)
    return None if not series else float(series[0])


def mean_of(runs: list[Record], read: Callable[[Record], float | None], form: str = ".2f") -> str:
    values = [value for run in runs if (value := read(run)) is not None]
    return f"{np.mean(values):{form}}" if values else ""


def cost(study: Study) -> tuple[str, Callable[[Record], float | None]]:
    """Title and value of what a run needed: processor time on a CPU, memory at its peak on a GPU."""
    if any("memory" in run for run in study.runs):
        return "GPU GiB", lambda run: run.get("memory", {}).get("gpu_gib")
    return "CPU s", lambda run: run["seconds"]["cpu"]


def search(study: Study, task: str, pair: str) -> str:
    """Validation bits per byte by rate, first seed."""
    size = sum(study.documents[task, "validation"]["gold_bytes"])
    rates = sorted({run["rate"] for run in study.runs if run["task"] == task and run["ablation"] is None})
    rows = []
    for name, method in METHODS.items():
        if pair not in method.pairs:
            continue
        found = {
            run["rate"]: run["validation_bits"] / size
            for run in study.runs
            if (run["task"], run["pair"], run["method"], run["ablation"]) == (task, pair, name, None)
            and "validation_bits" in run
        }
        if found:
            best = min(found, key=lambda rate: (found[rate], rate))
            cells = [f"{found[r]:.3f}" if r in found else "failed" for r in rates]
            rows.append([method.title, *[f"**{c}**" if r == best else c for c, r in zip(cells, rates, strict=True)]])
    return markdown(["validation bits per byte"] + [f"rate {rate:g}" for rate in rates], rows)


def ablations(study: Study, task: str, pair: str) -> str:
    """One change to DSKD at a time on the validation rows: scores, agreement, cost."""
    unit, needed = cost(study)
    rows = []
    for title, method, ablation in CHANGES:
        runs = study.chosen(task, pair, method, ablation, "validation")
        if not runs:
            continue
        cells = [title, f"{len(runs)}"]
        for metric in (METRICS[0], METRICS[1], METRICS[2]):
            values = study.values(runs, "validation", metric)
            cells.append(shown(score(values, study.sizes(task, "validation", metric, values.shape[1])), metric))
        cells.append(mean_of(runs, lambda run: first(run, "dskd/t2s_agreement")))
        cells.append(mean_of(runs, lambda run: last(run, "dskd/t2s_agreement")))
        cells.append(mean_of(runs, needed, ".3g"))
        rows.append(cells)
    head = ["validation rows", "seeds", "gold bits/byte", "teacher's bits/byte", "exact match %"]
    head += ["agreement, start", "end", unit]
    return markdown(head, rows)


def changes(study: Study) -> str:
    """Differences to DSKD, of SFT and of every ablation, on the validation rows; all tasks and pairs side by side."""
    bases = {setting: study.chosen(*setting, "dskd", None, "validation") for setting in study.settings()}
    rows = []
    for title, method, ablation in CHANGES:
        if (method, ablation) == ("dskd", None):
            continue
        cells = []
        for setting, base in bases.items():
            runs = study.chosen(*setting, method, ablation, "validation")
            cells.append(f"{len(runs) or ''}")
            cells += [interval(against(study, base, runs, "validation", metric), metric) for metric in METRICS[:2]]
        if any(cells):
            rows.append([title, *cells])
    head = ["change to DSKD"]
    for _, pair in bases:
        head += ["seeds", f"{PAIRS[pair]}: gold", "teacher's"]
    return markdown(head, rows)


def terms(study: Study, task: str, pair: str) -> str:
    """What the logs say at the end of training, mean over seeds."""
    names = ["loss", "dskd/ce", "dskd/kd", "dskd/t2s_kd", "dskd/t2s_ce", "dskd/s2t_kd"]
    names += ["dskd/t2s_agreement", "dskd/s2t_agreement", "dskd/align_ratio", "grad_norm"]
    title, needed = cost(study)
    rows = []
    for name, method in METHODS.items():
        runs = [run for run in study.chosen(task, pair, name, None, "heldout")]
        if runs:
            cells = [mean_of(runs, lambda run, key=key: last(run, key)) for key in names]  # type: ignore[misc]
            rows.append([method.title, *cells, mean_of(runs, needed, ".3g")])
    return markdown(["last tenth of training", *[name.removeprefix("dskd/") for name in names], title], rows)


def gradients(study: Study, task: str, pair: str) -> str:
    """Norm of each term's gradient by the student's last hidden states, and its cosine with the gradient of CE."""
    rows = []
    for made in study.gradients:
        if (made["task"], made["pair"]) != (task, pair):
            continue
        for probe in made["probes"]:
            norms = [f"{probe[f'norm/{term}']:.3f}" if f"norm/{term}" in probe else "" for term in TERMS]
            cosines = [f"{probe[f'cosine/{term}']:+.2f}" if f"cosine/{term}" in probe else "" for term in TERMS[1:]]
            rows.append([METHODS[made["method"]].title, f"{probe['step']}", *norms, *cosines])
    head = ["method", "step", *(f"norm {term}" for term in TERMS), *(f"cosine {term}, ce" for term in TERMS[1:])]
    return markdown(head, rows) if rows else "not measured"


def failures(study: Study) -> str:
    lines = []
    for run in study.runs:
        if "error" in run:
            name = run["method"] if run["ablation"] is None else f"{run['method']} + {run['ablation']}"
            where = f"{TASKS[run['task']]}, {PAIRS[run['pair']]}"
            lines.append(f"- {where}: {name}, rate {run['rate']:g}, seed {run['seed']}: {run['error']}")
    return "\n".join(lines) or "No run failed."


def facts(study: Study) -> str:
    """Device, versions and cost."""
    runs = [run for run in study.runs if "environment" in run]
    environments = [run["environment"] for run in runs]
    versions = sorted({f"{name} {number}" for made in environments for name, number in made["packages"].items()})
    commits = sorted({made["commit"][:7] + ("+changes" if "+" in made["commit"] else "") for made in environments})
    devices = sorted({made["device"] for made in environments})
    hours = sum(run["seconds"]["cpu"] for run in runs) / 3600
    return (
        f"{len(runs)} runs, {hours:.1f} CPU hours of training; {', '.join(devices)}; {', '.join(versions)}; "
        f"commits {', '.join(commits)}."
    )


def sections(study: Study) -> dict[str, str]:
    """Generated text by marker name."""
    made = {"facts": facts(study), "overview": overview(study), "failures": failures(study), "changes": changes(study)}
    for task, pair in study.settings():
        for name, table in (
            ("comparison", comparison),
            ("search", search),
            ("ablations", ablations),
            ("terms", terms),
            ("gradients", gradients),
        ):
            made[f"{name}-{task}-{pair}"] = table(study, task, pair)
    return made


def insert(text: str, made: dict[str, str], prefix: str) -> str:
    """`text` with each generated part between `<!-- PREFIX-NAME -->` and `<!-- end -->` replaced."""
    for name, body in made.items():
        pattern = re.compile(rf"(<!-- {prefix}-{name} -->\n).*?(<!-- end -->)", re.DOTALL)
        text = pattern.sub(lambda found, body=body: f"{found[1]}\n{body}\n\n{found[2]}", text)  # type: ignore[misc]
    return text


def draw(study: Study, folder: Path, prefix: str) -> list[Path]:
    """Differences to SFT with intervals, and agreement over the steps; one SVG for each task and pair."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "study"
    from matplotlib import pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for task, pair in study.settings():
        figure, axes = plt.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
        base = study.chosen(task, pair, BASE, None, "heldout")
        names = [n for n in METHODS if n != BASE and study.chosen(task, pair, n, None, "heldout")]
        for axis, metric in zip(axes[:2], (METRICS[0], METRICS[2]), strict=True):
            for place, name in enumerate(reversed(names)):
                gap = against(study, base, study.chosen(task, pair, name, None, "heldout"), "heldout", metric)
                if gap is not None:
                    low, value, high = (metric.factor * x for x in (gap.low, gap.value, gap.high))
                    axis.errorbar(value, place, xerr=[[value - low], [high - value]], fmt="o", color="C0", capsize=3)
            axis.set_yticks(range(len(names)), [METHODS[name].title for name in reversed(names)])
            axis.axvline(0, color="grey", linewidth=0.8)
            better = "left" if metric.lower_is_better else "right"
            axis.set_title(f"{metric.title}, difference to SFT\n({better} is better, 95 % intervals)", fontsize=9)
        axes[1].set_yticklabels([])
        for name in [n for n in names if n.startswith("dskd")]:
            runs = study.chosen(task, pair, name, None, "heldout")
            series = [run["curve"]["dskd/t2s_agreement"] for run in runs if "dskd/t2s_agreement" in run["curve"]]
            if series and len({len(part) for part in series}) == 1:
                steps = runs[0]["curve"]["step"][-len(series[0]) :]
                axes[2].plot(steps, np.mean(series, axis=0), label=METHODS[name].title)
        axes[2].set(ylim=(0, 1), xlabel="step")
        axes[2].set_title("agreement of the projected teacher\nwith the teacher, mean over seeds", fontsize=9)
        if axes[2].get_legend_handles_labels()[0]:
            axes[2].legend(fontsize=8)
        files.append(folder / f"study-{prefix}-{task}-{pair}.svg")
        figure.savefig(files[-1], metadata={"Date": None})
        plt.close(figure)
    return files


def write(file: Path, size: str) -> dict[str, Any]:
    """Refresh docs/study.md and the plots from the records of one size; prints what was missing."""
    study = Study(records.read(file))
    made = sections(study)
    if PAGE.is_file():
        text = PAGE.read_text(encoding="utf-8")
        PAGE.write_text(insert(text, made, size), encoding="utf-8")
        missing = [name for name in made if f"<!-- {size}-{name} -->" not in text]
        if missing:
            print(f"{PAGE.name}: no marker for {', '.join(missing)}")
    for plot in draw(study, PLOTS, size):
        print(plot.relative_to(ROOT))
    return made
