"""Files of samples: written whole or not at all, known by their content, checked before they are used.

A shard holds the tensors ``keys`` [S, 16], ``starts`` [S + 1], ``positions`` [n] and ``states`` [n, E]: sample s has
the rows from starts[s] to starts[s + 1]. It counts once the small file beside it, which has its checksum, is there too:
a process that dies loses the shard at which it was, and no more.
"""

import hashlib
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from dskd_plugin.cache.layout import PARTIAL, SHARDS, VERIFIED, write_json
from dskd_plugin.cache.needs import KEY_BYTES
from dskd_plugin.errors import SettingError
from dskd_plugin.folders import read_json
from dskd_plugin.log import LOG

_CHUNK = 1 << 22
_UNNAMED = ".tmp??????"  # what safetensors writes before it gives a file the name that it was asked for
SILENT_SECONDS = 2.0


@dataclass(frozen=True)
class File:
    """A file of the cache as the manifest lists it. file: path inside the folder; samples, rows: 0 for the head."""

    file: str
    sha256: str
    bytes: int
    samples: int = 0
    rows: int = 0


@dataclass(frozen=True)
class Computed:
    """One sample, computed. states_nE: on the CPU, in the dtype of the cache."""

    key: bytes
    positions: np.ndarray
    states_nE: Tensor


def write(folder: Path, samples: list[Computed]) -> File:
    """Write one shard; its name is a digest of what it is about."""
    keys_SB = np.frombuffer(b"".join(sample.key for sample in samples), np.uint8).reshape(-1, KEY_BYTES)
    starts = np.cumsum([0, *(len(sample.positions) for sample in samples)])
    positions_n = np.concatenate([sample.positions for sample in samples]).astype(np.int32)
    name = hashlib.blake2b(keys_SB.tobytes() + positions_n.tobytes(), digest_size=10).hexdigest()
    tensors = {
        "keys": torch.from_numpy(keys_SB.copy()),
        "starts": torch.from_numpy(starts),
        "positions": torch.from_numpy(positions_n),
        "states": torch.cat([sample.states_nE for sample in samples]),
    }
    target = folder / SHARDS / f"{name}.safetensors"
    info = save(folder, target, tensors, samples=len(samples), rows=len(positions_n))
    write_json(target.with_suffix(".json"), asdict(info))
    return info


def save(folder: Path, target: Path, tensors: dict[str, Tensor], **counts: int) -> File:
    """Write a safetensors file that appears whole or not at all; ``ValueError`` where there is no room for it."""
    partial = target.with_name(f"{target.name}.{os.getpid()}{PARTIAL}")
    try:
        save_file(tensors, partial)
        descriptor = os.open(partial, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        checksum = sha256(partial)
        partial.replace(target)
    except Exception as error:
        partial.unlink(missing_ok=True)
        needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        raise SettingError(
            folder,
            f"room and permission to write {needed / 2**20:,.0f} MiB",
            str(error).splitlines()[0],
            "Free some space, then run the same command again: it goes on from here.",
        ) from error
    return File(str(target.relative_to(folder)), checksum, target.stat().st_size, **counts)


def finished(folder: Path) -> list[File]:
    """The shards that were written to their end, listed in a manifest or not; of those whose file is still there."""
    found = []
    for beside in sorted((folder / SHARDS).glob("*.json")):
        content = read_json(beside)
        if content.keys() == File.__dataclass_fields__.keys() and (folder / content["file"]).is_file():
            found.append(File(**content))
    return found


def remove(folder: Path, file: str) -> None:
    """Remove a shard and what stands beside it; what says that it is whole goes first."""
    target = folder / file
    target.with_suffix(".json").unlink(missing_ok=True)
    target.unlink(missing_ok=True)


def tidy(folder: Path) -> None:
    """Remove what a process that died has left: half-written files, and shards without their checksum."""
    for place in (folder, folder / SHARDS):
        for partial in [*place.glob(f"*{PARTIAL}"), *place.glob(_UNNAMED)]:
            partial.unlink(missing_ok=True)
    whole = {info.file for info in finished(folder)}
    for shard in (folder / SHARDS).glob("*.safetensors"):
        if str(shard.relative_to(folder)) not in whole:
            remove(folder, str(shard.relative_to(folder)))


def sha256(file: Path, bar: Any = None) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
            if bar is not None:
                bar.update(len(chunk))
    return digest.hexdigest()


def damaged(folder: Path, files: Iterable[File], *, afresh: bool = False) -> dict[str, tuple[str, str]]:
    """What is wrong with files of a cache: (expected, got) by file.

    A file that was read whole before, and whose size and time of change are as they were, is not read again; afresh:
    read all. A bar is shown where it takes long.
    """
    files = list(files)
    known = {} if afresh else read_json(folder / VERIFIED)
    wrong: dict[str, tuple[str, str]] = {}
    listed = {info.file for info in files}
    seen: dict[str, object] = {file: mark for file, mark in known.items() if file not in listed}
    to_read: list[tuple[File, list[object]]] = []
    for info in files:
        path = folder / info.file
        if not path.is_file():
            wrong[info.file] = (f"{info.bytes:,} bytes", "no such file")
            continue
        status = path.stat()
        mark = [status.st_size, status.st_mtime_ns, info.sha256]
        if status.st_size != info.bytes:
            kind = "cut short" if status.st_size < info.bytes else "longer than it was written"
            wrong[info.file] = (f"{info.bytes:,} bytes", f"{status.st_size:,}: the file is {kind}")
        elif known.get(info.file) == mark:
            seen[info.file] = mark
        else:
            to_read.append((info, mark))
    if seen != known:
        _remember(folder, seen)
    total = sum(info.bytes for info, _ in to_read)
    options: dict[str, object] = {"unit": "B", "unit_scale": True, "delay": SILENT_SECONDS, "leave": False}
    with tqdm(total=total, desc="Checking the teacher cache", **options) as bar:
        for info, mark in to_read:
            found = sha256(folder / info.file, bar)
            if found == info.sha256:
                seen[info.file] = mark
                # After each, so that a start that is stopped here is not for nothing.
                _remember(folder, seen)
            else:
                wrong[info.file] = (f"the checksum {info.sha256[:16]}", f"{found[:16]}: its content has changed")
    return wrong


def _remember(folder: Path, seen: dict[str, object]) -> None:
    """Keep which files were read whole, and their sizes and times."""
    try:
        write_json(folder / VERIFIED, seen)
    except OSError as error:  # a cache that others may read only is checked each time
        LOG.debug("dskd: %s: the check is not remembered: %r", folder, error)
