"""A teacher known by its content: the same model under another path is the same, a retrained one in place is not."""

import hashlib
from pathlib import Path
from typing import Any

from dskd_plugin.folders import loaded_weights
from dskd_plugin.teachers.resolve import Parts

_BLOCK, _BLOCKS = 1 << 16, 64


def fingerprint(parts: Parts) -> dict[str, object]:
    """Digests of config.json, of each weight file that is loaded, and of the adapter; those of files that are here.

    Of a weight file the size, the start, which in safetensors has the names and shapes of all tensors, and 64 blocks of
    64 KiB spread evenly over it: to read 140 GB takes minutes at every start, and training a model changes all of its
    weights. A few bytes changed between the blocks are not seen. An adapter is small and is read whole.
    """
    folder = _folder(parts)
    loaded = [] if folder is None else [folder / name for name in loaded_weights(folder)[1]]
    weights = {file.name: _sampled(file) for file in loaded if file.is_file()}
    return {**_without_weights(parts, folder), "weights": weights}


def known_before_loading(parts: Parts) -> dict[str, object]:
    """`fingerprint`, but of a hub id the commit in place of its weights, which are not here until they are loaded."""
    if Path(parts.weights).is_dir():
        return fingerprint(parts)
    folder = _folder(parts)
    # The folder of a snapshot is named by its commit.
    commit = f"{parts.weights}@{parts.revision}" if folder is None else folder.name
    return {**_without_weights(parts, folder), "weights": commit}


def _without_weights(parts: Parts, folder: Path | None) -> dict[str, object]:
    return {
        "config": "" if folder is None else _whole([folder / "config.json"]),
        "adapter": None if parts.adapter is None else _whole(sorted(parts.adapter.glob("adapter_*"))),
    }


def difference(kept: dict[str, Any], now: dict[str, Any]) -> tuple[str, str, str] | None:
    """The first difference of two fingerprints, as (name of the part, kept, now).

    Weights that are not here any more cannot differ.
    """
    for part in ("config", "adapter"):
        if kept.get(part) != now[part] and now[part] != "":
            return ("config.json" if part == "config" else part), str(kept.get(part)), str(now[part])
    for file, digest in now["weights"].items():
        if kept["weights"].get(file) != digest:
            return file, str(kept["weights"].get(file)), digest
    return None


def _folder(parts: Parts) -> Path | None:
    """The folder of the weights; of a hub id that in the cache, None where it is not there."""
    if Path(parts.weights).is_dir():
        return Path(parts.weights)
    from transformers.utils.hub import cached_file

    try:
        found = cached_file(parts.weights, "config.json", revision=parts.revision)
    except OSError:
        return None
    return None if found is None else Path(found).parent


def _whole(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:32]


def _sampled(file: Path) -> str:
    size = file.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with file.open("rb") as stream:
        start = stream.read(8)
        header = int.from_bytes(start, "little") if file.suffix == ".safetensors" else 0
        digest.update(start + stream.read(min(header, size)))
        for number in range(_BLOCKS):
            stream.seek(max(0, size - _BLOCK) * number // (_BLOCKS - 1))
            digest.update(stream.read(_BLOCK))
    return digest.hexdigest()[:32]
