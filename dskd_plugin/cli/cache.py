"""``dskd cache``: builds the teacher's states on disk for all epochs and runs, says what is there and whether whole."""

import functools
import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dskd_plugin.cli.device import device_named
from dskd_plugin.errors import SettingError

if TYPE_CHECKING:
    import torch

    from dskd_plugin.cache.manifest import Manifest
    from dskd_plugin.cache.ranks import Ranks

_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)


@click.group()
def cache() -> None:
    """The teacher's states on disk: training reads them in place of the teacher."""


@cache.command()
@click.argument("recipe", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    help="[default: dskd.teacher.cache of the recipe, else a folder beside its prepared rows]",
)
@click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float16", "float32"]),
    help="Of the states. [default: as in the folder, else float16 for a teacher in float16, else bfloat16]",
)
@click.option(
    "--batch-tokens",
    type=click.IntRange(min=1),
    help="Teacher tokens at a time. [default: 16384 on a GPU, 2048 on a CPU]",
)
@click.option(
    "--device",
    default="auto",
    show_default=True,
    help="auto, cpu, cuda or cuda:N; auto-map: a teacher spread over all devices, and the CPU, where it fits no one.",
)
def build(recipe: Path, out: Path | None, dtype: str | None, batch_tokens: int | None, device: str) -> None:
    """Compute the states that the run of RECIPE needs and the folder lacks.

    A stopped build goes on when it is started again. Several processes (torchrun --nproc-per-node N -m dskd_plugin.cli
    cache build RECIPE) share the work.
    """
    ranks = _join()
    from dskd_plugin.cache.build import build as compute
    from dskd_plugin.cache.layout import folder_of
    from dskd_plugin.host.prepared import prepare
    from dskd_plugin.host.teacher_source import automatic_folder, live, order_of

    every = prepare(recipe)
    if out is not None and len(every) > 1:
        raise SettingError(
            "--out",
            "it left out beside dskd.teachers, whose caches have a folder each",
            out,
            "Name the folders in the recipe: a `cache` for each of dskd.teachers.",
        )
    target = _device(device, ranks)

    def say(text: str) -> None:
        if ranks.first:
            click.echo(text)

    for prepared in every:
        sides, settings = prepared.sides, prepared.sides.run.settings
        named = folder_of(settings.teacher.cache)
        folder = out or named or automatic_folder(sides)
        order = order_of(
            sides,
            folder,
            prepared.datasets,
            load=functools.partial(live, sides.run, device=target, packed=False, attn_implementation=None),
            say=say,
            states=dtype,
            batch_tokens=batch_tokens,
        )
        try:
            done = compute(order, ranks)
        except KeyboardInterrupt:
            click.echo("\nStopped; the same command goes on from here.", err=True)
            sys.exit(130)
        say(f"Done: {contents(done)} in {folder}")
        if folder != named and settings.teacher.cache != "auto":
            lines = f"  teacher:\n    cache: {folder}"
            if len(every) > 1:
                lines = f"  teachers:\n    - model: {settings.teacher.model}\n      cache: {folder}"
            say(f"In the recipe:\n\ndskd:\n{lines}")


@cache.command()
@click.argument("folder", type=_FOLDER)
def info(folder: Path) -> None:
    """Say what is in a cache, how large it is and of what it was made."""
    from dskd_plugin.cache import manifest, shards

    found = manifest.read(folder, "Build it again.")
    teacher = found.teacher
    click.echo(f"{folder}: {contents(found)}")
    adapter = f" with adapter {teacher['adapter']}" if teacher["adapter"] else ""
    click.echo(f"teacher: {teacher['model']}{adapter}, {teacher['dtype']}, quantization {teacher['quantization']}")
    click.echo(f"states: {found.states}, {found.width} wide, in {len(found.shards)} shards")
    for made in found.made_for:
        click.echo("made for: " + ", ".join(f"{key} {str(value)[:12]}" for key, value in made.items()))
    unfinished = len(shards.finished(folder)) - len(found.shards)
    if unfinished > 0:
        click.echo(f"and {unfinished} shards of a build that has not ended: the same command goes on from there")


@cache.command()
@click.argument("folder", type=_FOLDER)
def verify(folder: Path) -> None:
    """Read a cache to its end and compare the checksums; exit code 1 names the files that are damaged."""
    from dskd_plugin.cache import manifest
    from dskd_plugin.cache.open import check_whole

    found = manifest.read(folder, "Build it again.")
    check_whole(folder, found, "Run `dskd cache build RECIPE` again: it makes what is damaged anew.", afresh=True)
    click.echo(f"{folder}: {len(found.files)} files are as they were written: {contents(found)}")


def contents(found: "Manifest") -> str:
    return f"{found.samples:,} samples, {found.rows:,} rows, {found.bytes / 2**20:,.1f} MiB"


def _join() -> "Ranks":
    """This process among those that a launcher has started."""
    import torch.distributed as dist

    from dskd_plugin.cache.ranks import Ranks

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # They exchange words, no tensors. Whoever is done first waits for the slowest, which may take hours.
        dist.init_process_group("gloo", timeout=timedelta(days=30))
    return Ranks.here()


def _device(name: str, ranks: "Ranks") -> "torch.device | str":
    import torch

    if name == "auto-map":
        if ranks.world > 1:
            raise SettingError(
                "--device",
                "auto, cpu or cuda for several processes",
                "'auto-map': each of them would spread the teacher over all devices",
                "Start one process.",
            )
        return "auto"
    found = device_named(name)
    return torch.device(f"cuda:{ranks.local}" if found == "cuda" else found)
