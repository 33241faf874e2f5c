"""docs/real_pair.md from the records: one section for each pair, data set, rate and length that has runs."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from dskd_eval.stats import wilson

from benchmarks.real_pair import records
from benchmarks.real_pair.measures import HELDOUT, NEWLINE, PROGRAMS
from benchmarks.real_pair.table import BASE, DATA_SETS, GOLD_STEPS, PAIRS, SETTINGS, STOPS, planned
from benchmarks.study.records import Record
from benchmarks.study.report import markdown
from benchmarks.study.statistics import Difference, Floats, paired, score

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "real_pair.md"
WINDOW = 5  # consecutive steps
SAME = 0.002  # nats: logged values are rounded, and a method's rows may be added up in another order
REFERENCES = ("sft", "overlap_kd")
KD_TERMS = ("dskd/t2s_kd", "dskd/kd")  # the first that a run logs
TITLES = {
    "mbpp": "MBPP, 374 gold rows",
    "gsm8k": "GSM8K, 374 gold rows",
    "few": "MBPP, 60 gold rows and the teacher's answers to the other prompts, `kd_ratio: 0.9`",
    "few_gold": "MBPP, 60 gold rows",
}
Key = tuple[str, str, float, int]

INTRO = """# A real pair

Two pretrained models, Qwen2.5-Coder-0.5B-Instruct and SmolLM2-135M-Instruct, have tokenizers of their own. This page
says what each method does to the student in its first steps: whether it does harm. `python -m benchmarks.real_pair`
makes it ([README](../benchmarks/real_pair/README.md)); what stands here is what has run.

How to read the tables:

- *bits per byte*: of the gold answers of 60 held-out rows, lower is better. Gold answers favour SFT, which trains on
  nothing else; a distillation gives half of its loss to the teacher, so a small gap to SFT is its price.
- *to SFT*, *to overlap_kd*: difference with its 95 % interval, a bootstrap over seeds and rows, paired in both.
  With one seed the interval says nothing about other seeds.
- *worst five steps*: the cross-entropy of the gold tokens is logged at each step, on the same rows as SFT's. Shown is
  the largest ratio of the mean of five consecutive steps to SFT's mean of the same five, and the largest difference in
  nats; over all seeds whose rows came in the same order as SFT's.
- *bare newline*: an indented comment is put before the last statement of held-out MBPP solutions. Shown is the mean
  probability that the next token is a newline alone. The tokenizer of SmolLM2 writes a newline and its indentation as
  one token, so a bare newline there ends the function. Where a tokenizer never does so the cell is empty.
- *easy*, *HumanEval*, *MBPP*: programs that pass their tests, `dskd-eval`, greedy, with 95 % Wilson intervals over
  programs. *easy*: forty short generated tasks. *MBPP*: 160 tasks of its test split, none of which is trained on.
  *programs to …*: the difference in the share of all these programs, with the interval of the bits.
- *lost*: answers in which Python misses the indentation of a block, of all programs of these sets.
- *KD term*, *agreement*: `dskd/kd`, or with DSKD `dskd/t2s_kd`, and `dskd/t2s_agreement` of [the log](metrics.md).

`unpaired: share` was a default of earlier versions; a row that does not name a setting has today's.
"""


class Runs:
    """The records of one file, looked up by what they are."""

    def __init__(self, found: list[Record]) -> None:
        self.sizes = {
            made["data"]: np.array(made["gold_bytes"], dtype=float) for made in found if made["kind"] == "documents"
        }
        runs = [made for made in found if made["kind"] == "run"]
        self.base = {(made["pair"], made["data"]): made for made in runs if made["setting"] == BASE}
        self.trained = [made for made in runs if made["setting"] != BASE and "error" not in made]
        self.failed = [made for made in runs if "error" in made]

    def sections(self) -> list[Key]:
        """(pair, data, rate, steps) that have runs, in a fixed order."""
        found = {key_of(made) for made in self.trained}
        order = (list(PAIRS), list(DATA_SETS))
        return sorted(found, key=lambda key: (order[0].index(key[0]), order[1].index(key[1]), key[3], key[2]))

    def of(self, key: Key, setting: str) -> list[Record]:
        """Runs of a setting by seed."""
        found = [made for made in self.trained if key_of(made) == key and made["setting"] == setting]
        return sorted(found, key=lambda made: made["seed"])

    def best_gold(self, key: Key) -> list[Record]:
        """SFT on the gold rows of `few` alone, of the length that is best on the held-out rows; empty without runs."""
        sizes = self.sizes["few"]
        lengths = [self.of((key[0], "few_gold", key[2], steps), "sft") for steps in GOLD_STEPS]
        every = [runs for runs in lengths if runs and all(HELDOUT in made for made in runs)]
        return min(every, key=lambda runs: score(bits(runs), sizes), default=[])


def key_of(made: Record) -> Key:
    return made["pair"], made["data"], made["rate"], made["steps"]


# -- numbers -----------------------------------------------------------------------------------------------------------


def bits(runs: Iterable[Record]) -> Floats:
    """[seeds, documents]."""
    return np.array([made[HELDOUT]["gold_bits"] for made in runs], dtype=float)


def both(runs: list[Record], others: list[Record], kinds: Iterable[str]) -> tuple[list[Record], list[Record]]:
    """Of each side the runs of the seeds with which both have one of the measures; the untrained has no seed."""
    one, other = (
        {made["seed"]: made for made in side if "seed" in made and any(kind in made for kind in kinds)}
        for side in (runs, others)
    )
    seeds = sorted(one.keys() & other.keys())
    return [one[seed] for seed in seeds], [other[seed] for seed in seeds]


def difference(runs: list[Record], others: list[Record], sizes: Floats) -> Difference | None:
    """runs - others in bits per byte over the seeds that both have."""
    one, other = both(runs, others, (HELDOUT,))
    return paired(bits(one), bits(other), sizes) if one else None


def solved(runs: list[Record], others: list[Record]) -> Difference | None:
    """runs - others in programs that pass, of the sets that all runs were asked, over the seeds that both have."""
    one, other = both(runs, others, PROGRAMS)
    asked = [kind for kind in PROGRAMS if all(kind in made for made in one + other)]
    # With another --limit a set has other documents.
    kinds = [kind for kind in asked if len({len(made[kind]["passed"]) for made in one + other}) == 1]
    if not kinds:
        return None
    one_SN, other_SN = (
        np.hstack([np.array([made[kind]["passed"] for made in side], dtype=float) for kind in kinds])
        for side in (one, other)
    )
    return paired(one_SN, other_SN, np.ones(one_SN.shape[1]))


def gold_ce(made: Record) -> list[float]:
    """Cross-entropy of the gold tokens at each step, nats per token."""
    found: list[float] = made["curve"]["dskd/ce"]
    return found


def worst_window(ce: list[float], reference: list[float], width: int = WINDOW) -> tuple[float, float]:
    """(largest ratio, largest difference) of the means of `width` consecutive steps; shorter series are one window."""
    width = min(width, len(ce))
    kernel = np.full(width, 1 / width)
    one, other = (np.convolve(series, kernel, mode="valid") for series in (ce, reference))
    return float((one / other).max()), float((one - other).max())


def same_rows(ce: list[float], reference: list[float]) -> bool:
    """Whether two runs saw the same rows in the same order: before the first update both are the same student."""
    return abs(ce[0] - reference[0]) < SAME


def worst(runs: list[Record], others: list[Record]) -> tuple[float, float] | None:
    """The worst window of any seed that both have with the same rows in the same order."""
    base = {made["seed"]: gold_ce(made) for made in others}
    found = []
    for made in runs:
        reference = base.get(made["seed"])
        if reference is not None and "dskd/ce" in made["curve"] and same_rows(gold_ce(made), reference):
            found.append(worst_window(gold_ce(made), reference))
    return (max(ratio for ratio, _ in found), max(nats for _, nats in found)) if found else None


# -- cells -------------------------------------------------------------------------------------------------------------


def gap(found: Difference | None) -> str:
    return "" if found is None else f"{found.value:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"


def more(found: Difference | None) -> str:
    """A difference of shares, in per cent of the programs."""
    return "" if found is None else f"{100 * found.value:+.1f} [{100 * found.low:+.1f}, {100 * found.high:+.1f}]"


def passed(runs: list[Record], kind: str) -> str:
    flags = [flag for made in runs if kind in made for flag in made[kind]["passed"]]
    if not flags:
        return ""
    low, high = wilson(sum(flags), len(flags))
    return f"{sum(flags)}/{len(flags)} = {100 * sum(flags) / len(flags):.1f} % ({100 * low:.1f} to {100 * high:.1f})"


def lost(runs: list[Record]) -> str:
    flags = [flag for made in runs for kind in PROGRAMS if kind in made for flag in made[kind]["lost"]]
    return f"{sum(flags)}/{len(flags)}" if flags else ""


def newline(runs: list[Record]) -> str:
    values = [value for made in runs if NEWLINE in made for value in made[NEWLINE]["probability"]]
    return f"{np.mean(values):.4f}" if values else ""


def mean_bits(runs: list[Record], sizes: Floats) -> str:
    measured = [made for made in runs if HELDOUT in made]
    return f"{score(bits(measured), sizes):.3f}" if measured else ""


# -- tables ------------------------------------------------------------------------------------------------------------


HEAD = [
    *("setting", "seeds", "bits per byte", "to SFT", "to overlap_kd", "worst five steps", "bare newline"),
    *(*PROGRAMS.values(), "programs to SFT, %"),
]


def table(found: Runs, key: Key) -> str:
    """What each setting did to the student."""
    sizes = found.sizes[key[1]]
    sft, overlap = (found.of(key, name) for name in REFERENCES)
    base = found.base.get(key[:2])
    gold = found.best_gold(key) if key[1] == "few" else []

    def row(title: str, runs: list[Record], name: str = "") -> list[str]:
        compared = name in SETTINGS and name != "sft" and SETTINGS[name].rows == "gold"
        window = worst(runs, sft) if compared else None
        spent = [made["seconds"]["cpu"] for made in runs if "seconds" in made]
        seeds = [made["seed"] for made in runs if "seed" in made]
        without = gold or ([base | {"seed": seed} for seed in seeds] if base else [])
        return [
            title,
            " ".join(map(str, seeds)),
            mean_bits(runs, sizes),
            "" if name == "sft" else gap(difference(runs, sft, sizes)),
            "" if name == "overlap_kd" else gap(difference(runs, overlap, sizes)),
            "" if window is None else f"{window[0]:.2f} x, {window[1]:+.3f}",
            newline(runs),
            *(passed(runs, kind) for kind in PROGRAMS),
            "" if name == "sft" else more(solved(runs, sft)),
            "" if name == "gold" else more(solved(runs, without)),
            lost(runs),
            f"{np.mean(spent):.0f}" if spent else "",
        ]

    rows = [row("untrained", [base])] if base else []
    if gold:
        rows.append(row(f"SFT on the gold rows alone, best: {gold[0]['steps']} steps", gold, "gold"))
    for name in SETTINGS:
        if runs := found.of(key, name):
            rows.append(row(title_of(name, key[1]), runs, name))
    reference = "SFT on the gold rows" if gold else "untrained"
    return markdown([*HEAD, f"programs to {reference}, %", "lost", "CPU s"], rows)


def title_of(setting: str, data: str) -> str:
    """With few gold rows, SFT trains on the teacher's answers too."""
    return "SFT on the same rows (SeqKD)" if (setting, data) == ("sft", "few") else SETTINGS[setting].title


def terms(found: Runs, key: Key) -> str:
    """Gold cross-entropy, KD term and agreement at chosen steps, mean over seeds."""
    stops = [stop for stop in STOPS if stop <= key[3]] + ([key[3]] if key[3] > max(STOPS) else [])
    rows = []
    for name in SETTINGS:
        runs = found.of(key, name)
        if not runs:
            continue
        logged = runs[0]["curve"]
        kd = next((term for term in KD_TERMS if term in logged), "")
        cells = []
        for term in ("dskd/ce", kd, "dskd/t2s_agreement"):
            at = [[made["curve"][term][stop - 1] for made in runs] for stop in stops if term in logged]
            cells.append(" ".join(f"{np.mean(values):.2f}" for values in at))
        rows.append([title_of(name, key[1]), *cells])
    names = ", ".join(str(stop) for stop in stops)
    return markdown([f"steps {names}", "gold CE, nats", "KD term, nats", "agreement"], rows)


def facts(found: Runs) -> str:
    """Command, device, date, versions and cost."""
    environments = [made["environment"] for made in found.trained]
    versions = sorted({f"{name} {number}" for made in environments for name, number in made["packages"].items()})
    devices = sorted({made["device"] for made in environments})
    commits = sorted({made["commit"][:7] + ("+changes" if "+" in made["commit"] else "") for made in environments})
    dates = sorted({made["date"] for made in found.trained})
    hours = sum(made["seconds"]["cpu"] for made in found.trained) / 3600
    return (
        "Command: `python -m benchmarks.real_pair --teacher QWEN --student SMOLLM2 --data DATA`. "
        f"{len(found.trained)} runs, {hours:.1f} CPU hours of training; {', '.join(devices)}; {', '.join(dates)}; "
        f"{', '.join(versions)}; commits {', '.join(commits)}."
    )


def page(found: Runs) -> str:
    parts = [INTRO]
    if found.trained:
        parts.append(facts(found))
    for key in found.sections():
        pair, data, rate, steps = key
        parts.append(f"## {TITLES[data]}, {steps} steps, rate {rate:g}, {PAIRS[pair]}")
        parts += [table(found, key), terms(found, key)]
        implied = [made for name in SETTINGS for made in found.of(key, name) if made["implied"]]
        if implied:
            names = sorted({SETTINGS[made["setting"]].title for made in implied})
            parts.append(f"Run by a plugin that had no other way to behave: {'; '.join(names)}.")
    lacking = []
    for key in found.sections():
        asked = {run.setting for run in planned() if (run.pair, run.data, run.rate, run.steps) == key}
        names = [setting.title for name, setting in SETTINGS.items() if name in asked and not found.of(key, name)]
        if names:
            pair, data, rate, steps = key
            lacking.append(f"- {TITLES[data]}, {steps} steps, rate {rate:g}, {PAIRS[pair]}: {', '.join(names)}")
    parts += ["## What has not run", "Every pair, data set, rate and length without a section above, and:"]
    parts += ["\n".join(lacking) or "nothing else."]
    if found.failed:
        lines = [f"- {made['pair']}, {made['data']}, {made['setting']}: {made['error']}" for made in found.failed]
        parts += ["## What failed", "\n".join(lines)]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def write(file: Path, target: Path) -> None:
    """The page of the records."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(page(Runs(records.read(file))), encoding="utf-8")
