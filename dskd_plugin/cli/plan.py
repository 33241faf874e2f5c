"""``dskd plan``: says before a run what it will need, and what to change where that does not fit."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dskd_plugin.errors import SettingError

if TYPE_CHECKING:
    from dskd_plugin.plan import Plan

GIB = 2**30


@click.command()
@click.argument("recipe", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--gpus", type=click.IntRange(min=1), help="Processes, one per GPU. [default: 1]")
@click.option(
    "--gpu-memory", type=click.FloatRange(min=0, min_open=True), help="GiB of one GPU: says whether the run fits."
)
@click.option(
    "--tokens", type=click.IntRange(min=1), help="Of the longest row in a micro-batch. [default: sequence_len]"
)
@click.option("--cpu", is_flag=True, help="Plan a run on the CPU.")
@click.option("--json", "as_json", is_flag=True, help="All numbers, in bytes and operations, as JSON.")
def plan(
    recipe: Path, gpus: int | None, gpu_memory: float | None, tokens: int | None, cpu: bool, as_json: bool
) -> None:
    """Say what the run of RECIPE needs: memory, arithmetic, network and disk.

    Reads the recipe and the two models' configurations, no weights and no rows.
    """
    if cpu and (gpus is not None or gpu_memory is not None):
        raise click.UsageError("--cpu: expected no --gpus and no --gpu-memory beside it. Remove them.")
    from dskd_plugin.plan import make

    made = make(_read(recipe), ranks=gpus or 1, on_gpu=not cpu, tokens=tokens, gpu_memory=gpu_memory)
    click.echo(json.dumps(made.as_json(), indent=1) if as_json else "\n".join(lines(made, gpu_memory)))


def _read(path: Path) -> dict[str, Any]:
    from dskd_plugin.host.prompts import read_recipe
    from dskd_plugin.preflight import check_recipe
    from dskd_plugin.settings import parse_settings

    written = read_recipe(path)
    if not written.get("base_model"):
        raise SettingError("base_model", "the student, a hub id or folder", "nothing", "Add it to the recipe.")
    parse_settings(written["dskd"])
    check_recipe(written)
    return written


def lines(made: "Plan", gpu_memory: float | None) -> list[str]:
    """What is shown."""
    facts, memory, work = made.facts, made.memory, made.work
    device = "GPU" if facts.on_gpu else "CPU"
    where = f"{facts.ranks} {device}{'s' if facts.ranks > 1 else ''}" + (
        f" with {facts.engine}" if facts.engine != "one process" else ""
    )
    sizes = [_billions(teacher.counts.all) for teacher in made.teachers]
    teacher = f"teacher{'s' if len(sizes) > 1 else ''} of {' and '.join(sizes)} weights" if sizes else "no teacher"
    shown = [
        f"{teacher}, student of {_billions(made.student.counts.all)}, "
        f"{_billions(sum(made.student.counts.trained.values()))} of them trained in {facts.weights}; {where}; "
        f"{facts.rows} x {facts.tokens} tokens at a time, {facts.accumulation} times a step; {facts.optimizer}",
        "",
        f"Memory of one {device}, GiB, when a micro-batch is full:",
    ]
    shown += [f"  {name:<28}{_gib(size)}" for name, size in sorted(memory.stays.items(), key=lambda item: -item[1])]
    shown.append(f"  {memory.worst:<28}{_gib(memory.moments[memory.worst])}   (the moment at which most is alive)")
    if memory.lost:
        shown.append(f"  {'lost by the allocator':<28}{_gib(memory.lost)}")
    shown.append(f"  {'together':<28}{_gib(memory.peak)}")
    others = [f"{name} {size / GIB:.2f}" for name, size in memory.moments.items() if name != memory.worst]
    shown.append(f"Other moments of a step: {', '.join(others)}.")
    if memory.host:
        shown.append(f"On the CPU beside it: {memory.host / GIB:.2f} GiB.")
    if not facts.optimizer_known:
        shown.append(f"The optimizer {facts.optimizer!r} is not known here: counted like Adam.")
    shown += ["", f"Arithmetic of a step on one {device}: {sum(work.flops.values()) / 1e12:.3g} TFLOP"]
    total = sum(work.flops.values())
    shown += [f"  {name:<45}{100 * found / total:5.1f} %" for name, found in work.flops.items() if found]
    if work.network:
        shown.append(f"Sent by each process in a step: {work.network / GIB:.2f} GiB")
    shown.append(f"A checkpoint on disk: {work.checkpoint / GIB:.2f} GiB with the optimizer's state")
    if work.cache_per_million:
        size = f"{work.cache_per_million / GIB:.2f} GiB for a million response tokens"
        shown.append(f"A teacher cache on disk: at most {size}" + (f", {_read_a_step(work.read)}" if work.read else ""))
    if gpu_memory is not None:
        shown += ["", *_verdict(made, gpu_memory)]
    return shown


def _verdict(made: "Plan", gpu_memory: float) -> list[str]:
    """Whether it fits, and else what to change."""
    need, have = made.memory.peak / GIB, made.usable(gpu_memory)
    if need <= have:
        return [f"Fits: {need:.1f} of {gpu_memory:g} GiB."]
    shown = [
        f"Does not fit: {need:.1f} GiB, and of {gpu_memory:g} GiB an allocator can use some {have:.1f}. What helps:",
        f"  {'':<58}{'alone':>8}{'with those above':>20}",
    ]
    for planned in made.helpful:
        together = planned.together.peak / GIB
        end = "   fits" if together <= have else ""
        shown.append(f"  {planned.change.lines:<58}{planned.alone.peak / GIB:8.1f}{together:20.1f}{end}")
    if not made.helpful or made.helpful[-1].together.peak / GIB > have:
        shown.append("Even together they are not enough: use more or larger GPUs, or smaller models.")
    return shown


def _read_a_step(size: int) -> str:
    return f"of which a step reads {size / 2**20:.1f} MiB"


def _billions(number: int) -> str:
    return f"{number / 1e9:.2f} B" if number >= 1e8 else f"{number / 1e6:.2f} M"


def _gib(size: int) -> str:
    return f"{size / GIB:8.2f}"
