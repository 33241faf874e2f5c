"""`dskd plan`: what a run will need of memory, disk, arithmetic and network, read from configurations alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any, TypeVar, cast

from dskd_plugin.errors import naming
from dskd_plugin.methods import method_of
from dskd_plugin.plan.changes import Planned, changes
from dskd_plugin.plan.facts import Facts, facts_of
from dskd_plugin.plan.memory import GIB, Memory, memory_of
from dskd_plugin.plan.models import Student, Teacher, student_of, teacher_of
from dskd_plugin.plan.work import Work, work_of
from dskd_plugin.settings import parse_settings

# Of a GPU's memory, what an allocator that is cut into pieces can hand out. Assumed, not measured.
USABLE = 0.93

Made = TypeVar("Made")


@dataclass(frozen=True)
class Plan:
    """helpful: changes for a run that does not fit, in the order to try them, up to the one with which it does."""

    facts: Facts
    student: Student
    teachers: list[Teacher]
    memory: Memory
    work: Work
    helpful: list[Planned] = field(default_factory=list)

    @staticmethod
    def usable(gpu_memory: float) -> float:
        """GiB of so many that tensors can fill."""
        return USABLE * gpu_memory

    def _teacher_weights(self) -> dict[str, int | list[int] | None]:
        """How many weights each teacher has; of one teacher the number alone."""
        counts = [teacher.counts.all for teacher in self.teachers]
        return {"teachers": counts} if len(counts) > 1 else {"teacher": counts[0] if counts else None}

    def as_json(self) -> dict[str, Any]:
        """Bytes and operations by name."""
        facts = self.facts
        return {
            "ranks": facts.ranks,
            "engine": facts.engine,
            "rows": facts.rows,
            "tokens": facts.tokens,
            "accumulation": facts.accumulation,
            "dtype": facts.weights,
            "optimizer": facts.optimizer,
            "weights": {
                "student": self.student.counts.all,
                "trained": sum(self.student.counts.trained.values()),
                **self._teacher_weights(),
            },
            "memory": {**asdict(self.memory), "peak": self.memory.peak, "worst": self.memory.worst},
            "work": asdict(self.work),
            "helpful": [
                {
                    "change": one.change.lines,
                    "peak_alone": one.alone.peak,
                    "peak_with_those_above": one.together.peak,
                }
                for one in self.helpful
            ],
        }


def make(
    recipe: dict[str, Any], *, ranks: int, on_gpu: bool, tokens: int | None = None, gpu_memory: float | None = None
) -> Plan:
    """Plan a recipe. tokens: of the longest row, None for sequence_len; gpu_memory: GiB to fit into, if any."""
    facts = facts_of(recipe, parse_settings(recipe["dskd"]), ranks, on_gpu)
    if tokens is not None:
        facts = replace(facts, tokens=tokens, teacher_tokens=tokens)
    models = _Models()
    student, teachers = models.of(facts)
    memory = models.memory(facts)
    states = memory.stays["optimizer's states"] * (ranks if facts.engine not in ("one process", "DDP") else 1)
    plan = Plan(facts, student, teachers, memory, work_of(facts, student, teachers, states + memory.host))
    if gpu_memory is None or memory.peak <= USABLE * gpu_memory * GIB:
        return plan
    return replace(plan, helpful=_helpful(facts, models, memory, USABLE * gpu_memory * GIB))


def _helpful(facts: Facts, models: _Models, now: Memory, limit: float) -> list[Planned]:
    """Changes that make the run smaller, one after the other until it fits."""
    found: list[Planned] = []
    so_far: dict[str, Any] = {}
    best = now
    for change in changes(facts):
        merged = _merged(so_far, change.recipe)
        try:
            changed = [facts.with_recipe(**recipe) for recipe in (change.recipe, merged)]
        except ValueError:  # beside another setting of the recipe it is refused
            continue
        alone, together = map(models.memory, changed)
        if together.peak >= best.peak:
            continue
        so_far, best = merged, together
        found.append(Planned(change, alone, together))
        if together.peak <= limit:
            break
    return found


def _merged(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    teacher = {**one.get("dskd", {}).get("teacher", {}), **other.get("dskd", {}).get("teacher", {})}
    return {**one, **other, **({"dskd": {"teacher": teacher}} if teacher else {})}


class _Models:
    """Simulated models, each once for all plans in which nothing changes for it."""

    def __init__(self) -> None:
        self._known: dict[tuple[object, ...], object] = {}

    def of(self, facts: Facts) -> tuple[Student, list[Teacher]]:
        """The models of a plan; no teacher for a method that needs none."""
        batch = (facts.rows, facts.tokens)
        ours = ("student", *batch, facts.checkpointing, facts.adapter, facts.engine == "FSDP2")
        teachers = []
        for place, one in enumerate(facts.each if method_of(facts.settings).needs_teacher else []):
            with naming(place, len(facts.each)):
                key = ("teacher", place, *batch, one.settings.teacher.quantization)
                teachers.append(self._once(key, teacher_of, one))
        return self._once(ours, student_of, facts), teachers

    def memory(self, facts: Facts) -> Memory:
        student, teachers = self.of(facts)
        return memory_of(facts, student, *teachers) if teachers else memory_of(facts, student, None)

    def _once(self, key: tuple[object, ...], make: Callable[[Facts], Made], facts: Facts) -> Made:
        if key not in self._known:
            self._known[key] = make(facts)
        return cast(Made, self._known[key])
