"""`python -m benchmarks.summary`: the figure and the table of docs/results.md, from the records of three benchmarks."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from dskd_eval import stats

from benchmarks.real_pair import records as real_pair_records
from benchmarks.real_pair import report as real_pair_report
from benchmarks.scarce import report as scarce_report
from benchmarks.scarce import students
from benchmarks.study import records as study_records
from benchmarks.study import report as study_report
from benchmarks.study.data import read
from benchmarks.study.statistics import score

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "results.md"
PLOT = ROOT / "docs" / "plots" / "summary.svg"
FEW = "Few gold answers, the teacher answers more questions"
PLENTY = "Plenty of gold answers"
# What is shown of each benchmark, under names that are the same in all of them.
SCARCE = {
    "seqkd": "SFT on the same rows (SeqKD)",
    "dskd": "dskd, kd_ratio: 0.9",
    "bpm": "bpm",
    "overlap_kd": "overlap_kd",
    "csd": "csd, kd_weight: balanced",
    "alm": "alm, kd_weight: balanced",
}
REAL = {
    "overlap_kd": "overlap_kd",
    "overlap_kd_ids": "overlap_kd, shared: ids, unpaired: share",
    "bpm": "bpm",
    "dskd_default": "dskd, defaults",
    "dskd_unguarded": "dskd, guard: false",
    "dskd_share": "dskd, unpaired: share",
    "csd": "csd, kd_weight: balanced",
}
STUDY = {
    "kd": "kd",
    "overlap_kd": "overlap_kd, shared: ids",
    "dskd": "dskd, target: projected",
    "dskd_default": "dskd, defaults",
    "dskd_v2": "dskd, as published",
}


@dataclass(frozen=True)
class Line:
    """A recipe against plain fine-tuning, in per cent of its bits per byte: below 0 is better.

    where: what the recipe was tried on; page: of docs/, where it stands in full; sft: bits per byte of the fine-tuning.
    """

    where: str
    recipe: str
    seeds: int
    sft: float
    value: float
    low: float
    high: float
    page: str


def records_of(benchmark: str, name: str) -> Path:
    """A file of a benchmark's committed records."""
    return ROOT / "benchmarks" / benchmark / "records" / f"{name}.jsonl"


def relative(where: str, recipe: str, seeds: int, sft: float, gap: tuple[float, float, float], page: str) -> Line:
    """gap: difference, low and high in bits per byte."""
    value, low, high = (100 * each / sft for each in gap)
    return Line(where, recipe, seeds, sft, value, low, high, page)


def few() -> Iterator[Line]:
    """Each student where gold answers are few, against the best fine-tuning on them."""
    records = read(records_of("scarce", "scarce"))
    for student in students.STUDENTS:
        found = scarce_report.Found(records, student)
        for name, title in SCARCE.items():
            gap = found.against(name, scarce_report.SFT) if name in found.runs else None
            if gap is None or gap.low is None or gap.high is None:
                continue
            seeds = found.seeds(name, scarce_report.SFT)
            sft = stats.mean(found.bits(scarce_report.SFT, seeds))
            span = (gap.difference, gap.low, gap.high)
            where = f"{FEW}: {students.STUDENTS[student].short}"
            yield relative(where, title, len(seeds), sft, span, "scarce.md")


def pretrained() -> Iterator[Line]:
    """The real pair, student and teacher as in the names, against fine-tuning on the same rows."""
    found = real_pair_report.Runs(real_pair_records.read(records_of("real_pair", "real_pair")))
    for key in found.sections():
        pair, data, _, steps = key
        if data == "few_gold":
            continue  # what those of `few` are compared with
        sft, sizes = found.of(key, "sft"), found.sizes[data]
        shown, where = REAL, f"{PLENTY}, pretrained models, {data.upper()}, {steps} steps"
        where += ", the weaker model teaches" if pair == "turned" else ""
        if data == "few":
            sft = found.best_gold(key)
            shown, where = {"sft": SCARCE["seqkd"]} | REAL, f"{FEW}: pretrained models, MBPP, kd_ratio: 0.9"
        for name, title in shown.items():
            runs = found.of(key, name)
            gap = real_pair_report.difference(runs, sft, sizes)
            if gap is None:
                continue
            seeds = {made["seed"] for made in runs} & {made["seed"] for made in sft}
            base = score(real_pair_report.bits(made for made in sft if made["seed"] in seeds), sizes)
            yield relative(where, title, len(seeds), base, (gap.value, gap.low, gap.high), "real_pair.md")


def studied() -> Iterator[Line]:
    """The study's pairs, both sizes, against fine-tuning on the same rows."""
    metric = study_report.METRICS[0]
    for size in ("gpu", "small"):
        found = study_report.Study(study_records.read(records_of("study", size)))
        for task, pair in found.settings():
            sft = found.chosen(task, pair, study_report.BASE, None, "heldout")
            for name, title in STUDY.items():
                runs = found.chosen(task, pair, name, None, "heldout")
                gap = study_report.against(found, sft, runs, "heldout", metric)
                if gap is None:
                    continue
                values = found.values(sft, "heldout", metric)
                base = score(values, found.sizes(task, "heldout", metric, values.shape[1]))
                where = f"{PLENTY}, 126 steps, {study_report.TASKS[task]}, {study_report.PAIRS[pair]}"
                yield relative(where, title, len(runs), base, (gap.value, gap.low, gap.high), "study.md")


def lines() -> list[Line]:
    return [*few(), *pretrained(), *studied()]


def table(found: list[Line]) -> str:
    """One row for each recipe; the place stands in its first row alone. SFT is that of the recipe's seeds."""
    rows, last = [], ""
    for line in found:
        difference = f"{line.value:+.1f} % [{line.low:+.1f}, {line.high:+.1f}]"
        place = "" if line.where == last else f"[{line.where}]({line.page})"
        rows.append([place, f"`{line.recipe}`", str(line.seeds), f"{line.sft:.3f}", difference])
        last = line.where
    return study_report.markdown(["where", "recipe", "seeds", "SFT, bits per byte", "recipe to SFT"], rows)


def draw(found: list[Line], file: Path) -> None:
    """One point with its interval for each line, in a panel for each place."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "summary"
    from matplotlib import pyplot as plt

    places = list(dict.fromkeys(line.where for line in found))
    counts = [sum(line.where == place for line in found) for place in places]
    height = 0.24 * len(found) + 0.5 * len(places) + 0.6
    figure, axes = plt.subplots(
        len(places), 1, figsize=(9, height), sharex=True, height_ratios=counts, layout="constrained", squeeze=False
    )
    for axis, place in zip(axes[:, 0], places, strict=True):
        here = [line for line in found if line.where == place]
        heights = np.arange(len(here))[::-1]
        for at, line in zip(heights, here, strict=True):
            colour = "C2" if line.high < 0 else "C3" if line.low > 0 else "grey"
            whiskers = [[line.value - line.low], [line.high - line.value]]
            axis.errorbar([line.value], [at], xerr=whiskers, fmt="o", markersize=4, color=colour, capsize=2)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_yticks(heights, [line.recipe for line in here], fontsize=8)
        axis.set_ylim(-0.6, len(here) - 0.4)
        axis.set_title(place, fontsize=9, loc="left")
        axis.grid(axis="x", alpha=0.3)
    axes[-1, 0].set_xlabel("bits per byte of held-out gold answers, to SFT, % (left is better; 95 % intervals)")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    found = lines()
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(study_report.insert(text, {"table": table(found)}, "summary"), encoding="utf-8")
    draw(found, PLOT)
    print(f"{PAGE}, {PLOT}")


if __name__ == "__main__":
    main()
