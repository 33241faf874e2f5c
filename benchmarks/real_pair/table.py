"""What the benchmark runs, as data: settings, data sets, and the groups of runs in the order in which they start.

A setting is a `dskd:` block without its teacher; a new one is one line.
"""

from dataclasses import dataclass
from typing import Any

from benchmarks.study.table import Block, merged

SEEDS = (1, 2, 3)
RATES = (5e-5, 2e-4)
STEPS = (25, 100)
LONG_STEPS = 170
GOLD_STEPS = (15, 30, 60)  # of SFT on the gold answers of `few` alone: 1, 2 and 4 epochs
BATCH = 4
BASE = "base"  # the untrained student
STOPS = (1, 5, 10, 20, 25)  # steps whose terms the tables show


@dataclass(frozen=True)
class Setting:
    """title: name in tables; rows: "gold", or "generated" for the teacher's answers to the same prompts."""

    title: str
    block: Block
    rows: str = "gold"


# An earlier default, so that the runs made with it stay what they are.
SHARE: Block = {"unpaired": "share"}
PROJECTED: Block = SHARE | {"target": "projected"}

SETTINGS: dict[str, Setting] = {
    "sft": Setting("SFT", {"method": "sft"}),
    "overlap_kd": Setting("overlap_kd", {"method": "overlap_kd"}),
    "overlap_kd_ids": Setting(
        "overlap_kd, `shared: ids`, `unpaired: share`", SHARE | {"method": "overlap_kd", "shared": "ids"}
    ),
    "dskd_default": Setting("DSKD, defaults", {}),
    "dskd_unguarded": Setting("DSKD, `guard: false`", {"guard": False}),
    "dskd_share": Setting("DSKD, `unpaired: share`", SHARE),
    "dskd_ids": Setting("DSKD, `shared: ids`", {"shared": "ids"}),
    "dskd_fitted": Setting("DSKD, fitted start", {"projector": {"init": "fitted"}}),
    "dskd_random": Setting("DSKD, random start", {"projector": {"init": "random"}}),
    "dskd_slow": Setting("DSKD, projector at 5e-5", {"projector": {"learning_rate": 5e-5}}),
    "dskd_fast": Setting("DSKD, projector at 5e-3", {"projector": {"learning_rate": 5e-3}}),
    "bpm": Setting("bpm", {"method": "bpm"}),
    "alm": Setting("alm, `kd_weight: balanced`", {"method": "alm", "kd_weight": "balanced"}),
    "csd": Setting("csd, `kd_weight: balanced`", {"method": "csd", "kd_weight": "balanced"}),
    "dskd_projected": Setting("DSKD, projected, `unpaired: share`", PROJECTED),
    "dskd_projected_fitted": Setting(
        "DSKD, projected, fitted start, `unpaired: share`", PROJECTED | {"projector": {"init": "fitted"}}
    ),
    "dskd_projected_random": Setting(
        "DSKD, projected, random start, `unpaired: share`", PROJECTED | {"projector": {"init": "random"}}
    ),
    "seqkd": Setting("SeqKD", {"method": "sft"}, rows="generated"),
}
# How a plugin behaves that does not have the setting yet.
IMPLIED: dict[str, Any] = {"target": "projected", "shared": "ids", "unpaired": "share", "guard": False}

DATA_SETS = ("mbpp", "gsm8k", "few", "few_gold")
PAIRS = {"forward": "teacher -> student", "turned": "turned round, the better model learns"}


@dataclass(frozen=True)
class Run:
    """One training: a setting on a data set and a pair, at one rate, length and seed; `base` trains nothing."""

    pair: str
    data: str
    setting: str
    rate: float
    steps: int
    seed: int

    @property
    def name(self) -> str:
        if self.setting == BASE:
            return f"{self.pair}-{self.data}-{BASE}"
        return f"{self.pair}-{self.data}-{self.setting}-{self.rate:g}-{self.steps}-{self.seed}"


@dataclass(frozen=True)
class Group:
    """Runs that answer one question; change: written over the block of every setting but SFT."""

    pair: str
    data: str
    settings: tuple[str, ...]
    rate: float
    steps: int
    seeds: tuple[int, ...]

    def runs(self) -> list[Run]:
        return [
            Run(self.pair, self.data, setting, self.rate, self.steps, seed)
            for seed in self.seeds
            for setting in self.settings
        ]


FIRST = ("sft", "overlap_kd", "dskd_default", "dskd_projected")
STARTS = ("dskd_ids", "dskd_fitted", "dskd_random", "dskd_slow", "dskd_fast", "dskd_projected_fitted", "seqkd")
SHORT = ("sft", "overlap_kd", "dskd_default")
ALL = tuple(SETTINGS)

# The first groups say most; later ones repeat their runs, which are done once.
GROUPS: tuple[Group, ...] = (
    Group("forward", "mbpp", FIRST, 5e-5, 25, (1,)),
    Group("forward", "mbpp", STARTS, 5e-5, 25, (1,)),
    Group("forward", "mbpp", SHORT, 5e-5, 25, (2, 3)),
    Group("forward", "gsm8k", SHORT + ("dskd_projected",), 5e-5, 25, (1,)),
    Group("forward", "few", SHORT, 5e-5, LONG_STEPS, (1,)),
    Group("turned", "mbpp", SHORT + ("dskd_projected",), 5e-5, 25, (1,)),
    *(
        Group(pair, data, ALL, rate, steps, SEEDS)
        for steps in STEPS
        for rate in RATES
        for data in ("mbpp", "gsm8k")
        for pair in PAIRS
    ),
    *(Group("forward", "few_gold", ("sft",), 5e-5, steps, SEEDS) for steps in GOLD_STEPS),
    Group("forward", "few", tuple(name for name in ALL if SETTINGS[name].rows == "gold"), 5e-5, LONG_STEPS, SEEDS),
)

# Written over the block of every distillation on a data set: with few gold answers the teacher says nearly all.
CHANGES: dict[str, Block] = {"few": {"kd_ratio": 0.9}}


def block(setting: str, data: str) -> Block:
    """The `dskd:` block of a run, without its teacher."""
    own = SETTINGS[setting].block
    return own if own.get("method") == "sft" else merged(own, CHANGES.get(data, {}))


def accepted(made: Block) -> Block | None:
    """The block as the installed plugin takes it; None when it does not know one of its settings.

    A setting that the plugin lacks is left out where the plugin can behave in no other way.
    """
    from dskd_plugin.settings import Settings, parse_settings

    known = Settings.model_fields
    kept = {key: value for key, value in made.items() if key in known or IMPLIED.get(key) != value}
    try:
        parse_settings({"teacher": {"model": "teacher"}, **kept})
    except ValueError:
        return None
    return kept


def resolved(made: Block) -> Block:
    """All settings of a block as the installed plugin fills them in, without the teacher."""
    from dskd_plugin.settings import parse_settings

    found = parse_settings({"teacher": {"model": "teacher"}, **made}).model_dump()
    return {key: value for key, value in found.items() if key != "teacher"}


def same_behaviour(then: Block, now: Block) -> bool:
    """Whether resolved settings of an earlier plugin and of this one ask for the same training.

    A setting that only one of the two has does not count, except for those of `IMPLIED` where they have an effect.
    """
    then, now = ({**IMPLIED, **side} for side in (then, now))
    idle = set()
    if now["method"] == "sft":
        idle.add("unpaired")
    if now["method"] != "dskd":
        idle.add("target")
    if (now["method"], now["target"]) != ("dskd", "exact") or now["unpaired"] == "share":
        idle.add("guard")
    if now["method"] not in ("overlap_kd", "bpm") and (now["method"], now["target"]) != ("dskd", "exact"):
        idle.add("shared")
    return _agree(*({key: value for key, value in side.items() if key not in idle} for side in (then, now)))


def _agree(one: Block, other: Block) -> bool:
    both = [(one[key], other[key]) for key in one.keys() & other.keys()]
    return all(_agree(a, b) if isinstance(a, dict) and isinstance(b, dict) else a == b for a, b in both)


def planned() -> list[Run]:
    """Every run once, in the order of the groups, the untrained student of a pair and data set before its first."""
    found: dict[Run, None] = {}
    for group in GROUPS:
        found[Run(group.pair, group.data, BASE, 0.0, 0, 0)] = None
        found |= dict.fromkeys(group.runs())
    return list(found)
