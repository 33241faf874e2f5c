"""What a run leaves behind: its folder, the record of each finished task, results.json and samples.jsonl.

    run.json                      identity of the run: settings, models, tasks (compared by --resume)
    parts/<model>/<task>.json     scores of a finished task;  <task>.jsonl  its samples
    generations.sqlite            finished batches, also of the task in progress
    results.json  samples.jsonl  report.md  report.html

Times stand under `times` in results.json and nowhere else; apart from them two runs of the same thing are
equal.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path

from pydantic import JsonValue, ValidationError

from dskd_eval import schema
from dskd_eval.data import content_hash
from dskd_eval.errors import UserError
from dskd_eval.schema import Environment, Identity, LoadedModel, ModelRecord, Part, Record, Results, Sample, ScoreRow

_PACKAGES = ("dskd", "lm_eval", "transformers", "torch", "peft", "datasets", "tokenizers", "rouge_score",
             "math-verify", "markdown-it-py", "antlr4-python3-runtime", "langdetect", "nltk", "numpy",
             "vllm")  # fmt: skip
MEGABYTE = 1 << 20


def environment() -> Environment:
    """Versions that can move a score."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return Environment(python=platform.python_version(), platform=platform.platform(terse=True), packages=versions)


def write_json(path: Path, record: Record) -> None:
    """Write a file as a whole or not at all."""
    replace_text(path, json.dumps(record.plain(), indent=1, ensure_ascii=False, sort_keys=False) + "\n")


def write_lines(path: Path, rows: Iterable[Record]) -> None:
    replace_text(path, "".join(json.dumps(row.plain(), ensure_ascii=False) + "\n" for row in rows))


def replace_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        # Half a character, as in the name of a folder, becomes JSON's escape of it: the file stays UTF-8.
        with beside.open("w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise UserError(
            f"output {path}",
            expected="room and permission to write",
            got=error.strerror or str(error),
            fix="Free some space or choose another --output; then --resume keeps the finished tasks.",
        ) from error


def read_samples(path: Path) -> Iterator[Sample]:
    """Lines of samples. UserError names the bad line."""
    with path.open(encoding="utf-8", errors="surrogatepass") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where, fix = f"{path}, line {number}", "Repeat the run with --resume."
            try:
                yield Sample.model_validate(json.loads(line))
            except json.JSONDecodeError as error:
                raise UserError(where, expected="JSON", got=str(error), fix=fix) from error
            except ValidationError as error:
                raise UserError(where, expected="the record of a sample", got=schema.problem(error), fix=fix) from error


class OutputFolder:
    """The output folder of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def generations(self) -> Path:
        return self.path / "generations.sqlite"

    def open(self, identity: Identity, *, resume: bool) -> None:
        """Create the folder, or take up the run in it.

        Raises UserError: the folder holds another run, or files that no run wrote; nothing to resume; no
        space.
        """
        where = f"--output {self.path}"
        marker = self.path / "run.json"
        if marker.is_file():
            self._check_same(marker, identity, where, resume=resume)
        elif self.path.is_file():
            raise UserError(where, expected="a folder", got="a file", fix="Choose another --output.")
        elif resume:
            raise UserError(
                where,
                expected="the folder of a run to resume",
                got="no run.json in it",
                fix="Leave --resume out.",
            )
        elif self.path.is_dir() and any(self.path.iterdir()):
            raise UserError(
                where,
                expected="a new or empty folder",
                got="a folder with other files: " + ", ".join(sorted(p.name for p in self.path.iterdir())[:4]),
                fix="Choose another --output.",
            )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                where,
                expected="a folder that can be made",
                got=error.strerror or str(error),
                fix="Choose another --output.",
            ) from error
        free = shutil.disk_usage(self.path).free
        if free < 64 * MEGABYTE:
            raise UserError(
                where,
                expected="64 MB of free disk space",
                got=f"{free / MEGABYTE:.0f} MB",
                fix="Free some space or choose another --output.",
            )
        write_json(marker, identity)

    def _check_same(self, marker: Path, identity: Identity, where: str, *, resume: bool) -> None:
        try:
            found: JsonValue = json.loads(marker.read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError) as error:
            raise UserError(where, expected="a readable run.json", got=str(error), fix="Remove the folder.") from error
        different = sorted(_differences(found, json.loads(json.dumps(identity.plain()))))
        if different:
            raise UserError(
                where,
                expected="the folder of this run" if resume else "a new folder",
                got="the folder of another run, which differs in " + "; ".join(different[:4]),
                fix="Choose another --output, or repeat the settings of that run with --resume.",
            )
        if not resume:
            raise UserError(
                where,
                expected="a new folder",
                got="the folder of this very run",
                fix="Add --resume to go on with it, or choose another --output.",
            )

    def part(self, model: str, task: str) -> Path:
        return self.path / "parts" / _slug(model) / f"{task}.json"

    def save_part(self, model: str, task: str, part: Part, samples: Iterable[Sample]) -> None:
        path = self.part(model, task)
        write_lines(path.with_suffix(".jsonl"), samples)
        write_json(path, part)

    def load_part(self, model: str, task: str) -> Part | None:
        """The record of a finished task, or None. A record without its samples counts as unfinished."""
        path = self.part(model, task)
        if not path.is_file() or not path.with_suffix(".jsonl").is_file():
            return None
        try:
            return Part.model_validate(json.loads(path.read_text(encoding="utf-8")))
        except (json.JSONDecodeError, ValidationError):
            return None

    def save_loaded(self, model: str, facts: LoadedModel) -> None:
        write_json(self.part(model, "model"), facts)

    def loaded(self, model: str) -> LoadedModel:
        """What is known of the model in memory; without a field where it was not loaded yet."""
        path = self.part(model, "model")
        return LoadedModel.model_validate(json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {})

    def samples(self, model: str, task: str) -> list[Sample]:
        return list(read_samples(self.part(model, task).with_suffix(".jsonl")))

    def join_samples(self, order: Iterable[tuple[str, str]]) -> None:
        """samples.jsonl from the parts, in the order of models and tasks."""
        target = self.path / "samples.jsonl"
        beside = target.with_name(".samples.jsonl.new")
        try:
            with beside.open("wb") as joined:
                for model, task in order:
                    part = self.part(model, task).with_suffix(".jsonl")
                    if part.is_file():
                        with part.open("rb") as file:
                            shutil.copyfileobj(file, joined)
            os.replace(beside, target)
        except OSError as error:
            raise UserError(
                f"output {target}",
                expected="room and permission to write",
                got=error.strerror or str(error),
                fix="Free some space; then --resume keeps the finished tasks.",
            ) from error


def _slug(model: str) -> str:
    safe = "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in model)
    return safe if safe == model else f"{safe}-{content_hash(model)[:6]}"


def _differences(first: JsonValue, second: JsonValue, path: str = "") -> Iterator[str]:
    if isinstance(first, dict) and isinstance(second, dict):
        for key in sorted(first.keys() | second.keys()):
            yield from _differences(first.get(key), second.get(key), f"{path}.{key}" if path else str(key))
    elif isinstance(first, list) and isinstance(second, list) and len(first) == len(second):
        for number, (one, other) in enumerate(zip(first, second, strict=True)):
            yield from _differences(one, other, f"{path}[{number}]")
    elif first != second:
        yield f"{path}: {_short(first)} there, {_short(second)} here"


def _short(value: JsonValue) -> str:
    if isinstance(value, list):
        # Models and tasks are told by their names: their other values are long.
        value = [one["name"] if isinstance(one, dict) and "name" in one else one for one in value]
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


class SavedRun:
    """A finished (or partly finished) run read back: results and samples by model and task."""

    def __init__(self, path: Path, only: str | None = None) -> None:
        folder = path if path.is_dir() else path.parent
        results = folder / "results.json"
        if not results.is_file():
            raise UserError(
                f"run {path}",
                expected="a folder with results.json",
                got="none" if folder.is_dir() else "no such folder",
                fix="Give the --output folder of a dskd-eval run.",
            )
        try:
            found: JsonValue = json.loads(results.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise UserError(f"run {results}", expected="JSON", got=str(error), fix="Run with --resume.") from error
        version = found.get("schema_version") if isinstance(found, dict) else None
        if version != schema.SCHEMA_VERSION:
            raise UserError(
                f"run {results}",
                expected=f"schema version {schema.SCHEMA_VERSION}",
                got=repr(version),
                fix="Repeat the run with this version of dskd-eval.",
            )
        try:
            self.results = Results.model_validate(found)
        except ValidationError as error:
            raise UserError(
                f"run {results}",
                expected="the record of a run",
                got=schema.problem(error),
                fix="Run with --resume, which writes it again.",
            ) from error
        self.folder, self.only = folder, only
        names = [model.name for model in self.results.models]
        if only is not None and only not in names:
            raise UserError(
                f"run {path}", expected="one of its models: " + ", ".join(names), got=only, fix="Choose one."
            )
        self._samples: dict[tuple[str, str], list[Sample]] | None = None

    @property
    def models(self) -> list[ModelRecord]:
        return [model for model in self.results.models if self.only in (None, model.name)]

    def score(self, model: str, task: str) -> ScoreRow | None:
        """The score of a finished task."""
        for score in self.results.scores:
            if score.model == model and score.task.task == task and score.finished:
                return score
        return None

    def samples(self, model: str, task: str) -> list[Sample]:
        if self._samples is None:
            self._samples = {}
            path = self.folder / "samples.jsonl"
            if not path.is_file():
                raise UserError(f"run {path}", expected="samples.jsonl", got="none", fix="Run with --resume.")
            for sample in read_samples(path):
                self._samples.setdefault((sample.model, sample.task), []).append(sample)
        return self._samples.get((model, task), [])
