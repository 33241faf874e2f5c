"""Where the parts of a teacher cache lie, and whether a folder is one. Standard library only: read before torch is."""

import json
import os
from pathlib import Path
from typing import Any

from dskd_plugin.errors import SettingError

AUTO = "auto"
MANIFEST, HEAD, SHARDS = "manifest.json", "head.safetensors", "shards"
LOCK, VERIFIED = "lock", "verified.json"
PARTIAL = ".partial"


def folder_of(cache: str | None) -> Path | None:
    """The folder that ``dskd.teacher.cache`` names; None where it is unset or ``auto``."""
    return None if cache is None or cache == AUTO else Path(cache).expanduser()


def command(recipe: Any = None) -> str:
    """The command that makes what a recipe lacks, as advice."""
    return f"Run `dskd cache build {recipe or 'RECIPE'}`."


def check_there(cache: str | None, recipe: Any = None) -> None:
    """Raise ``ValueError`` where a recipe names a folder that holds no cache. recipe: its file."""
    folder = folder_of(cache)
    if folder is None or (folder / MANIFEST).is_file():
        return
    got = "without a manifest.json" if folder.exists() else f"which does not exist in {os.getcwd()}"
    raise SettingError(
        "dskd.teacher.cache",
        "the folder of a teacher cache, or auto",
        f"{cache!r}, {got}",
        command(recipe),
    )


def write_json(file: Path, content: object) -> None:
    """Write a JSON file that appears whole or not at all."""
    partial = file.with_name(f"{file.name}.{os.getpid()}{PARTIAL}")
    with partial.open("w", encoding="utf-8") as stream:
        json.dump(content, stream, indent=1)
        stream.write("\n")
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(file)
