"""docs/scarce.md from the records: every recipe beside the best plain fine-tuning and SeqKD."""

from collections.abc import Iterable
from pathlib import Path

from dskd_eval import stats

from benchmarks.scarce.students import OWN, STUDENTS
from benchmarks.scarce.table import DSKD, RECIPES, SEQKD
from benchmarks.study.records import Record
from benchmarks.study.report import markdown

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "scarce.md"
SFT = "sft"

INTRO = """# Few gold answers, many questions

Which method is worth most where answers are few? Every recipe starts from the student of `make quickstart` and learns
from the same rows: {gold} gold answers, which the teacher was tuned on too, and the teacher's answers to {prompts} more
questions. The student comes with three tokenizers, because a method stands or falls with what the two tokenizers have
in common. `python -m benchmarks.scarce` makes this page ([how](../benchmarks/scarce/README.md)).

How to read the tables:

- *bits per byte*: of the gold answers to {heldout} held-out questions, one number for each seed; lower is better.
- *to the best SFT*: the difference to plain fine-tuning on the gold answers alone, the best of three rates; below 0 is
  better. *to SeqKD*: to plain fine-tuning on the same rows as the recipe. *to `dskd`*: to the recipe of that name with
  `kd_ratio: 0.9`. In brackets the 95 % interval over the questions of all seeds. A seed has its own questions, student
  and teacher; the interval says nothing of further seeds.
- *p*: of no difference in the column before, a sign-flip test over questions, after Holm's correction over the recipes.
- A recipe with a teacher has `kd_ratio: 0.9`, as the quickstart, where its name says nothing else; the default of the
  setting is 0.5.
- `unpaired`: `uld` has `share`, the others `ce`, today's default of off-policy recipes. With `share`, the default
  before, `dskd` had 0.329 and 0.403 with the quickstart's tokenizer (seeds 1 and 2), 0.926 and 0.488 with the coarse
  and the fine one (seed 1).
- What is shown was measured on students that were pretrained at a rate of 5e-3, and trained at 2e-3. `make quickstart`
  has 3e-3 and 1e-3 since then: its student copies a name from the question and has [other numbers](quickstart.md). A
  new run of this benchmark does as the quickstart: give it `--records` and `--page` of its own.
- Seeds differ, and so do two runs of one: on another machine seed 1 of the coarse student gave `csd` 0.639 and `dskd`
  0.690. Intervals over questions do not hold that.
- *exact*: held-out answers that are exactly right. So weak a student solves few.
- `dskd` was measured before it had its guard, which never acts here: on seed 1 each of the three students has the same
  bits with it.
- *CPU s*: of the recipe's trainings, one thread, the mean over seeds; the teacher's states of the rows were kept from
  run to run, so the time of a first run is longer. `csd` ran first in each of its three seeds: some 90 of its seconds
  are the teacher's (18 and 19 s in earlier runs, where another recipe ran first).
"""


class Found:
    """The records of a student by recipe and seed; `sft`, `sft_all` and `teacher` are the quickstart's."""

    def __init__(self, records: Iterable[Record], student: str) -> None:
        self.student = student
        self.runs: dict[str, dict[int, Record]] = {}
        self.rows: dict[str, int] = {}
        self.overlaps: list[tuple[float, float]] = []
        for one in records:
            if one["student"] != student:
                continue
            if one["kind"] == "run":
                self.runs.setdefault(one["recipe"], {})[one["seed"]] = one
                continue
            self.rows = one["rows"]
            if "shared_ids" in one:
                self.overlaps.append((one["shared_ids"], one["align_ratio"]))
            for name in ("sft", "sft_all", "teacher"):
                self.runs.setdefault(name, {})[one["seed"]] = one[name]

    def seeds(self, *names: str) -> list[int]:
        """Seeds that all of these ran with."""
        return sorted(set.intersection(*(set(self.runs.get(name, ())) for name in names)))

    def bits(self, name: str, seeds: list[int]) -> list[tuple[float, float]]:
        """(bits, bytes) of each question of these seeds."""
        pairs = []
        for seed in seeds:
            one = self.runs[name][seed]
            pairs += [(bits, float(size)) for bits, size in zip(one["bits"], one["bytes"], strict=True)]
        return pairs

    def against(self, name: str, other: str) -> stats.Paired | None:
        """name - other on the questions of the seeds that both have."""
        seeds = self.seeds(name, other)
        return stats.compare(self.bits(other, seeds), self.bits(name, seeds)) if seeds else None


def gap(found: stats.Paired | None) -> str:
    if found is None:
        return ""
    inside = "" if found.low is None or found.high is None else f" [{found.low:+.3f}, {found.high:+.3f}]"
    return f"{found.difference:+.3f}{inside}"


def adjusted(gaps: dict[str, stats.Paired | None]) -> dict[str, str]:
    """p of no difference for each recipe that has run, after Holm's correction over them."""
    tested = {name: gap.p for name, gap in gaps.items() if name in RECIPES and gap is not None}
    return {name: f"{p:.4f}" for name, p in zip(tested, stats.holm(list(tested.values())), strict=True)}


def table(found: Found) -> str:
    """One row for each recipe that has run, in the order of RECIPES, then what the quickstart measured."""
    titles = {name: recipe.title for name, recipe in RECIPES.items()}
    titles |= {SFT: "SFT on the gold answers, best of three rates", "teacher": "the teacher"}
    titles |= {"sft_all": f"for comparison: SFT on {found.rows['gold_all']} gold answers"}
    names = [name for name in titles if name in found.runs]
    to_sft, to_seqkd, to_dskd = (
        {name: found.against(name, other) for name in names if name != other} for other in (SFT, SEQKD, DSKD)
    )
    p_sft, p_seqkd = adjusted(to_sft), adjusted(to_seqkd)
    rows = []
    for name in names:
        seeds = found.seeds(name)
        runs = [found.runs[name][seed] for seed in seeds]
        right = [flag for run in runs for flag in run["right"]]
        cost = [sum(run["cpu_seconds"]) for run in runs if "cpu_seconds" in run]
        rows.append(
            [
                titles[name],
                " ".join(str(seed) for seed in seeds),
                ", ".join(f"{stats.mean(found.bits(name, [seed])):.3f}" for seed in seeds),
                gap(to_sft.get(name)),
                p_sft.get(name, ""),
                gap(to_seqkd.get(name)),
                p_seqkd.get(name, ""),
                gap(to_dskd.get(name)),
                f"{100 * sum(right) / len(right):.1f} %",
                f"{sum(cost) / len(cost):.0f}" if cost else "",
            ]
        )
    heads = ["recipe", "seeds", "bits per byte", "to the best SFT", "p", "to SeqKD", "p", "to `dskd`", "exact", "CPU s"]
    return markdown(heads, rows)


def section(found: Found) -> str:
    """What a student is, its table, and what has not run."""
    parts = [f"## {STUDENTS[found.student].title}"]
    if found.overlaps:
        shared, aligned = (stats.mean([(each, 1.0) for each in column]) for column in zip(*found.overlaps, strict=True))
        parts.append(
            f"The teacher's tokenizer has {100 * shared:.0f} % of the student's ids. {100 * aligned:.0f} % of the "
            "answers' tokens begin where one of the teacher's begins, and are compared with it."
        )
    parts.append(table(found))
    missing = [recipe.title for name, recipe in RECIPES.items() if name not in found.runs]
    if missing:
        parts.append("Not run: " + "; ".join(missing) + ".")
    return "\n\n".join(parts)


def page(records: list[Record]) -> str:
    runs = [one for one in records if one["kind"] == "run"]
    dates = sorted({one["date"] for one in runs})
    commits = sorted({one["environment"]["commit"][:7] for one in runs})
    packages = sorted({f"{name} {version}" for one in runs for name, version in one["environment"]["packages"].items()})
    said = f"Command: `python -m benchmarks.scarce`. CPU, {', '.join(dates)}; commits {', '.join(commits)}; "
    parts = [INTRO.format(**Found(records, OWN).rows), said + ", ".join(packages) + "."]
    parts += [section(Found(records, name)) for name in STUDENTS if any(one["student"] == name for one in runs)]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def write(records: list[Record], file: Path) -> None:
    file.write_text(page(records), encoding="utf-8")
