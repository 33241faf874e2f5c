"""A run takes up a cache: whole, of its teacher, and with every row that it needs; or it is refused before a step."""

from pathlib import Path
from typing import Any

import torch

from dskd_plugin.cache import manifest as manifests
from dskd_plugin.cache.cached_teacher import CachedTeacher
from dskd_plugin.cache.layout import MANIFEST
from dskd_plugin.cache.manifest import Manifest
from dskd_plugin.cache.needs import needed
from dskd_plugin.cache.ranks import Ranks
from dskd_plugin.cache.shards import damaged
from dskd_plugin.errors import Mistakes, SettingError
from dskd_plugin.log import LOG
from dskd_plugin.run import Sides
from dskd_plugin.teachers.live import Teacher


def check_whole(folder: Path, files: Manifest, advice: str, *, afresh: bool = False) -> None:
    """Raise ``ValueError`` with each file of a cache that is missing or damaged."""
    wrong = damaged(folder, files.files, afresh=afresh)
    errors = [SettingError(folder / file, expected, got, advice) for file, (expected, got) in wrong.items()]
    if errors:
        raise errors[0] if len(errors) == 1 else Mistakes(errors)


def open_cache(
    folder: Path,
    sides: Sides,
    datasets: dict[str, object],
    *,
    ranks: Ranks,
    device: torch.device,
    advice: str,
    fallback: Teacher | None = None,
) -> CachedTeacher:
    """The cache as the run's teacher; ``ValueError`` for one that does not do. All ranks must call it."""
    files: Manifest = ranks.first_does(lambda: _checked(folder, sides, advice))
    # Once on each machine, whose disk may be its own; the other processes find it remembered.
    error: Exception | None = None
    for turn in (True, False):
        try:
            if error is None and (ranks.local == 0) == turn:
                check_whole(folder, files, advice)
        except (OSError, ValueError) as failed:
            error = failed
        ranks.agree(error=error)
    vocab_size = sides.run.teacher.table.vocab_size
    cached = CachedTeacher(folder, files, vocab_size=vocab_size, device=device, advice=advice, fallback=fallback)
    ranks.first_does(lambda: check_rows(cached, files, sides, datasets, advice))
    LOG.info(
        "dskd: the teacher's states come from %s: %s samples, %s rows, %s; %s",
        *(folder, f"{files.samples:,}", f"{files.rows:,}", files.states),
        "the teacher itself reads the student's answers alone" if fallback else "its decoder is not loaded",
    )
    return cached


def _checked(folder: Path, sides: Sides, advice: str) -> Manifest:
    found = manifests.read(folder, advice)
    now = manifests.teacher_of(sides.run)
    elsewhere = f"{advice} Give it --out <another folder>, and name that as dskd.teacher.cache."
    manifests.check_teacher(folder, found.teacher, now, elsewhere)
    if found.head_file is None:
        raise SettingError(folder / MANIFEST, "a finished build", "one that was stopped", advice)
    if not now["fingerprint"]["weights"]:
        LOG.info("dskd: the teacher's weights are not here; its cache is known by its config.json alone")
    return found


def check_rows(cached: CachedTeacher, files: Manifest, sides: Sides, datasets: dict[str, Any], advice: str) -> None:
    """Raise ``ValueError`` where the run needs rows, or embeddings, that the cache has not."""
    if sides.run.method.needs_embedding:
        _ = cached.embedding
    count = lacking = 0
    example = ""
    for name, dataset in datasets.items():
        for one in needed(dataset):
            count += 1
            if cached.store.find(one.key, one.positions) is None:
                lacking += 1
                ids = dataset[one.place]["teacher_input_ids"][:24]
                example = example or f"{name} row {one.place}, {sides.run.teacher.tokenizer.decode(ids)!r}..."
    if lacking:
        different = manifests.differences(files.made_for, manifests.made_for(sides))
        raise SettingError(
            cached.folder,
            f"the teacher's states of all {count:,} samples of the run",
            f"those of {count - lacking:,}; {lacking:,} lack some or all places (the first: {example})"
            + (f"; since it was made, {different}" if different else ""),
            f"{advice} It adds what is missing.",
        )
