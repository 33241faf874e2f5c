"""What a cache says of itself: of which teacher it is, what it was made for, and which files belong to it."""

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from dskd_plugin import __version__
from dskd_plugin.cache.fingerprint import difference, fingerprint
from dskd_plugin.cache.layout import MANIFEST, write_json
from dskd_plugin.cache.shards import File
from dskd_plugin.errors import SettingError
from dskd_plugin.folders import read_json
from dskd_plugin.run import Run, Sides
from dskd_plugin.text.align import RULES

FORMAT = 2
# What may differ between a cache and a recipe, in words: rows that only the other one needs are missing then.
MADE_FOR = {
    "rules": "version of the alignment rules",
    "teacher_tokenizer": "the teacher's tokenizer",
    "template": "the teacher's chat template",
    "sequence_len": "dskd.teacher.sequence_len",
    "student_tokenizer": "the student's tokenizer",
    "pairing": "which tokens the method pairs",
    "identity": "whether the tokenizers count as one",
    "spans": "whether spans are compared (dskd.span_weight, or the method)",
}


@dataclass(frozen=True)
class Manifest:
    """A cache. teacher: what decides its states; made_for: the builds that went into it; states: their dtype.

    head: the fields of the teacher's head beside its tensors, and the file with these.
    """

    teacher: dict[str, object]
    states: str
    made_for: list[dict[str, object]]
    width: int = 0
    head: dict[str, Any] = field(default_factory=dict)
    head_file: File | None = None
    shards: list[File] = field(default_factory=list)

    @property
    def files(self) -> list[File]:
        return [*([self.head_file] if self.head_file else []), *self.shards]

    @property
    def samples(self) -> int:
        return sum(shard.samples for shard in self.shards)

    @property
    def rows(self) -> int:
        return sum(shard.rows for shard in self.shards)

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files)

    def also_for(self, made_for: dict[str, object]) -> "Manifest":
        return self if made_for in self.made_for else replace(self, made_for=[*self.made_for, made_for])

    def write(self, folder: Path) -> None:
        write_json(folder / MANIFEST, {"format": FORMAT, "dskd": __version__, **asdict(self)})


def read(folder: Path, advice: str) -> Manifest:
    """The manifest of a folder; ``ValueError`` for one that is missing, cut or of another format."""
    if not (folder / MANIFEST).is_file():
        # It may hold anything: nothing is said of removing it.
        raise SettingError(folder, "the folder of a teacher cache", f"one without a {MANIFEST}", "Check the path.")
    content = read_json(folder / MANIFEST)
    found, format_ = content.pop("dskd", None), content.pop("format", None)
    if format_ != FORMAT:
        raise SettingError(
            folder / MANIFEST,
            f"a teacher cache of format {FORMAT}",
            f"format {format_} of dskd {found}" if content else "a file that is cut short",
            f"Remove the folder. {advice}",
        )
    try:
        head_file = content.pop("head_file")
        shards = [File(**shard) for shard in content.pop("shards")]
        return Manifest(**content, head_file=None if head_file is None else File(**head_file), shards=shards)
    except (KeyError, TypeError) as error:
        raise SettingError(
            folder / MANIFEST, "the entries of a teacher cache", repr(error), f"Remove the folder. {advice}"
        ) from error


def states_in(folder: Path) -> str | None:
    """The dtype of the states in a folder; None where it holds no cache."""
    found: str | None = read_json(folder / MANIFEST).get("states")
    return found


def teacher_of(run: Run) -> dict[str, Any]:
    """What decides the teacher's states, and the name that it goes by."""
    settings = run.settings.teacher
    return {
        "model": settings.model,
        "revision": settings.revision,
        "adapter": settings.adapter,
        "dtype": settings.dtype,
        "quantization": settings.quantization,
        "fingerprint": fingerprint(run.teacher.parts),
    }


def made_for(sides: Sides) -> dict[str, object]:
    """What decides which samples and rows a recipe needs, beside its data."""
    run, teacher = sides.run, sides.run.teacher
    return {
        "rules": RULES,
        "teacher_tokenizer": teacher.table.digest,
        "template": _digest([teacher.template, teacher.template_options]),
        "sequence_len": teacher.sequence_len,
        "student_tokenizer": sides.pair.student.digest,
        "pairing": run.method.pairing(run.settings),
        "identity": sides.pair.identity,
        "spans": run.settings.with_spans,
    }


def check_teacher(folder: Path, kept: dict[str, Any], now: dict[str, Any], advice: str) -> None:
    """Raise ``ValueError`` where the states are not those of the recipe's teacher, whatever it is called."""
    different = difference(kept["fingerprint"], now["fingerprint"])
    if different is not None:
        part, was, is_ = different
        raise SettingError(
            folder / MANIFEST,
            f"a cache of dskd.teacher.model {now['model']!r} ({part} {is_})",
            f"one of another teacher, {kept['model']!r} ({part} {was})",
            advice,
        )
    for key in ("dtype", "quantization"):
        if kept[key] != now[key]:
            raise SettingError(
                folder / MANIFEST,
                f"a cache of the teacher with dskd.teacher.{key} {now[key]!r}",
                f"one with {kept[key]!r}",
                f"Set dskd.teacher.{key}: {kept[key]}, or build another cache. {advice}",
            )


def differences(kept: list[dict[str, object]], now: dict[str, object]) -> str:
    """In what a recipe differs from all builds of a cache, in words; empty where one was for the like of it."""
    if now in kept or not kept:
        return ""
    last = kept[-1]
    said = [f"{name} is {now[key]!r} and was {last[key]!r}" for key, name in MADE_FOR.items() if last[key] != now[key]]
    return "; ".join(said)


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]
