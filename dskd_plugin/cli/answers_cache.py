"""``dskd generate --cache``: the teacher cache of the written recipe, by the teacher that has written the answers.

It reads the rows again: the states that it had while it wrote are not kept (docs/decisions/answers-are-read-again.md).
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dskd_plugin.cache.layout import MANIFEST
from dskd_plugin.cli.asked_prompts import check_writable
from dskd_plugin.cli.cache import contents
from dskd_plugin.errors import SettingError
from dskd_plugin.folders import nearest

if TYPE_CHECKING:
    from dskd_plugin.host.prompts import Source
    from dskd_plugin.teachers.live import Teacher


def check_cache(folder: Path, source: "Source", answers: int, longest: int) -> None:
    """Refuse now what would fail after hours, and say what the states of the answers may take on the disk.

    answers, longest: how many the teacher will write, and of how many tokens at most.
    """
    from dskd_plugin.cache import manifest
    from dskd_plugin.host.teacher_source import bytes_of_state, states_dtype

    run = source.run
    if not run.method.needs_teacher:
        raise SettingError(
            "--cache",
            "a dskd.method that compares states of the teacher",
            f"{run.settings.method!r}",
            "Leave the option out, or choose another method.",
        )
    if folder.exists() and not folder.is_dir():
        raise SettingError("--cache", "a folder", f"{str(folder)!r}, a file", "Name another one.")
    check_writable(folder / MANIFEST)
    if (folder / MANIFEST).exists():
        kept = manifest.read(folder, "Or name another folder with --cache.")
        manifest.check_teacher(folder, kept.teacher, manifest.teacher_of(run), "Name another folder with --cache.")
    size = bytes_of_state(run, states_dtype(run, folder))
    most, free = answers * longest * size, shutil.disk_usage(nearest(folder)).free
    told = f"{folder}: {size:,} bytes for each token of an answer, at most {most / 2**30:,.1f} GiB for all of them"
    if most > free:
        told += f"; {free / 2**30:,.1f} GiB are free, and what does not fit is refused once the answers are written"
    click.echo(f"{told}. Rows with answers of their own come on top.", err=True)


def build_cache(recipe: Path, folder: Path, load: Callable[[], "Teacher"]) -> None:
    """Compute the states that the run of the written recipe needs and the folder lacks."""
    from dskd_plugin.cache.build import build
    from dskd_plugin.cache.ranks import Ranks
    from dskd_plugin.host.prepared import prepare
    from dskd_plugin.host.teacher_source import order_of

    (prepared,) = prepare(recipe)
    order = order_of(prepared.sides, folder, prepared.datasets, load=load, say=click.echo)
    done = build(order, Ranks())
    click.echo(f"Teacher cache: {contents(done)} in {folder}")


def reads_from(recipe: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What changes in a recipe that reads its teacher's states from the folder."""
    block = recipe["dskd"]
    return {"dskd": {**block, "teacher": {**block["teacher"], "cache": str(folder)}}}
