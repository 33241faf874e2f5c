"""Benchmark files: where they lie, whether they are whole, and their rows.

A data file is found in --data-dir (or DSKD_DATA), else on the hub. Files of a data directory are checked by
sha256 and row count; rows from the hub by row count. Every row set also has a content digest, equal for equal
rows whichever way they came.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from dskd_eval.errors import UserError
from dskd_eval.schema import DataRecord

Row = dict[str, object]  # a cell holds what JSON or the hub's data set has there


@dataclass(frozen=True)
class HubSource:
    """A hub data set: one file of the repository, or a configuration and split."""

    repo: str
    file: str | None = None
    config: str | None = None
    split: str | None = None

    def __str__(self) -> str:
        return "/".join(["hub:" + self.repo, *(part for part in (self.config, self.split, self.file) if part)])


@dataclass(frozen=True)
class DataSource:
    """One file of rows.

    file: path below the data directory, or absolute for a user's own file. sha256 and rows: None when
    unknown. select: {column: [lowest, highest]} keeps the rows in that range. first: keep that many rows.
    """

    file: str
    sha256: str | None = None
    rows: int | None = None
    hub: HubSource | None = None
    select: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    first: int | None = None
    note: str | None = None

    @property
    def own(self) -> bool:
        return Path(self.file).is_absolute()


@dataclass(frozen=True)
class LoadedData:
    """Rows with the facts that go into the record."""

    rows: list[Row]
    source: str
    sha256: str | None
    digest: str
    note: str | None

    def record(self) -> DataRecord:
        facts = DataRecord(source=self.source, sha256=self.sha256, digest=self.digest, rows=len(self.rows))
        return facts.model_copy(update={"note": self.note}) if self.note else facts


def canonical(value: object) -> object:
    """The value without None entries of mappings, so that hub and file rows agree."""
    if isinstance(value, Mapping):
        return {str(key): canonical(item) for key, item in value.items() if item is not None}
    if isinstance(value, (list, tuple)):
        return [canonical(item) for item in value]
    return value


def content_hash(value: object) -> str:
    """First 16 hex digits of the sha256 of the canonical JSON of a value."""
    text = json.dumps(canonical(value), sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def file_sha256(path: Path) -> str:
    """Hex sha256 of a file, read in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def joined_surrogates(text: str) -> str:
    """The text with the two halves of a character joined, as YAML leaves them of JSON's escapes (an emoji)."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")


def half_character(value: object, place: str = "") -> str | None:
    """Where a text holds half a character (a lone surrogate), which no tokenizer and no file takes; None: nowhere."""
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            near = value[max(0, error.start - 20) : error.start + 20]
            return f"half a character, {value[error.start]!r}, in {place or 'the text'}: {near!r}"
        return None
    items: Iterable[tuple[object, object]] = ()
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, (list, tuple)):
        items = enumerate(value)
    for key, item in items:
        found = half_character(key, "a name") or half_character(item, f"{place}.{key}" if place else repr(key))
        if found:
            return found
    return None


def read_rows(path: Path) -> list[Row]:
    """Rows of a .jsonl, .jsonl.gz or .json (list of objects) file. UserError names the bad line."""
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8-sig") as file:
            text = file.read()
    except (OSError, UnicodeDecodeError, EOFError, zlib.error) as error:
        raise UserError(str(path), expected="a readable UTF-8 file", got=str(error), fix="Restore the file.") from error
    return list(_parse(text, path))


def _parse(text: str, path: Path) -> Iterator[Row]:
    if path.name.removesuffix(".gz").endswith(".json"):
        try:
            items: object = json.loads(text)
        except ValueError as error:  # JSONDecodeError, or a number of too many digits
            raise _bad_row(path, getattr(error, "lineno", 1), str(error)) from error
        if not isinstance(items, list):
            raise _bad_row(path, 1, "a JSON value that is no list")
        numbered: Iterable[tuple[int, object]] = enumerate(items, 1)
    else:
        numbered = _json_lines(text, path)
    for number, row in numbered:
        if not isinstance(row, dict):
            raise _bad_row(path, number, f"a {type(row).__name__}")
        yield row


def _json_lines(text: str, path: Path) -> Iterator[tuple[int, object]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except ValueError as error:  # JSONDecodeError, or a number of too many digits
                raise _bad_row(path, number, str(error)) from error


def _bad_row(path: Path, number: int, got: str) -> UserError:
    return UserError(
        f"{path}, row {number}",
        expected="a JSON object per line",
        got=got,
        fix="Correct or restore the file.",
    )


def data_directory(option: str | None) -> Path | None:
    """--data-dir, else DSKD_DATA, else None (the hub). The directory must exist."""
    value, name = (option, "--data-dir") if option else (os.environ.get("DSKD_DATA"), "DSKD_DATA")
    if not value:
        return None
    path = Path(value).expanduser().resolve()
    if not path.is_dir():
        raise UserError(
            name,
            expected="an existing directory",
            got=str(value),
            fix="Give the folder that holds gsm8k/, dskd/ ...",
        )
    return path


def offline() -> str | None:
    """The environment variable that forbids the network, or None."""
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        if os.environ.get(name, "").lower() not in ("", "0", "false", "no", "off"):
            return name
    return None


def problem_of(source: DataSource, directory: Path | None) -> str | None:
    """Why a file of the data directory cannot be used (missing, altered), or None. Cheap: hashes, parses
    nothing.
    """
    path = _path(source, directory)
    if path is None:
        return None
    if not path.is_file():
        return f"{path} is missing"
    if source.sha256 and (found := file_sha256(path)) != source.sha256:
        return f"{path} is altered: sha256 {found[:12]}…, not {source.sha256[:12]}…"
    return None


def _path(source: DataSource, directory: Path | None) -> Path | None:
    if source.own:
        return Path(source.file)
    return directory / source.file if directory else None


def load(sources: tuple[DataSource, ...], directory: Path | None) -> LoadedData:
    """Rows of the first alternative that exists; the last one's error when none does.

    Raises UserError for a missing or altered file, a wrong row count, an unreachable hub.
    """
    for source in sources[:-1]:
        path = _path(source, directory)
        if path is not None and path.is_file():
            return _load_one(source, directory)
        if path is None and source.hub:
            return _load_one(source, directory)
    return _load_one(sources[-1], directory)


def _load_one(source: DataSource, directory: Path | None) -> LoadedData:
    path = _path(source, directory)
    if path is not None:
        if problem := problem_of(source, directory):
            raise UserError(
                "data",
                expected=f"{source.file} as published" if not source.own else "the file that the task names",
                got=problem,
                fix="Restore it (`dskd-eval doctor` lists all files), or use --task-file for your own data.",
            )
        rows, where, digest = read_rows(path), str(source.file), file_sha256(path)
    else:
        rows, where, digest = _from_hub(source), str(source.hub), None
    if source.rows is not None and len(rows) != source.rows:
        raise UserError(
            f"data {where}",
            expected=f"{source.rows} rows",
            got=f"{len(rows)} rows",
            fix="The data set changed at its source: use --data-dir with the files of `dskd-eval doctor`.",
        )
    for number, row in enumerate(rows, 1):
        if problem := half_character(row):
            raise UserError(
                f"data {where}, row {number}",
                expected="texts of whole characters",
                got=problem,
                fix="Correct the row: the other half (JSON's \\udc00 to \\udfff) was cut off.",
            )
    rows = [{key: _unix_lines(value) for key, value in row.items()} for row in _selected(rows, source)]
    if not rows:
        raise UserError(f"data {where}", expected="at least one row", got="no rows", fix="Add rows to the file.")
    return LoadedData(rows, where, digest, content_hash(rows), source.note)


def _selected(rows: list[Row], source: DataSource) -> list[Row]:
    for column, (lowest, highest) in source.select.items():
        kept = []
        for number, row in enumerate(rows, 1):
            value = row.get(column)
            if not isinstance(value, (int, float)):
                raise UserError(
                    f"{source.file}, row {number}",
                    expected=f"a number in {column!r}, because `select` names it",
                    got=repr(value),
                    fix="Correct `select` or the row.",
                )
            if lowest <= value <= highest:
                kept.append(row)
        rows = kept
    return rows[: source.first] if source.first else rows


def _unix_lines(value: object) -> object:
    if isinstance(value, str):
        return value.replace("\r\n", "\n")
    if isinstance(value, list):
        return [_unix_lines(item) for item in value]
    if isinstance(value, dict):
        return {key: _unix_lines(item) for key, item in value.items()}
    return value


def _from_hub(source: DataSource) -> list[Row]:
    hub = source.hub
    if hub is None:
        raise UserError(
            f"data {source.file}",
            expected="a data directory, because this set is not on the hub",
            got="neither --data-dir nor DSKD_DATA",
            fix="Give --data-dir.",
        )
    if switch := offline():
        raise UserError(
            f"data {hub}",
            expected="a data directory or the hub",
            got=f"no --data-dir, no DSKD_DATA and {switch} is set",
            fix=f"Give --data-dir, or unset {switch}.",
        )
    try:
        if hub.file:
            from huggingface_hub import hf_hub_download

            return read_rows(Path(hf_hub_download(hub.repo, hub.file, repo_type="dataset")))
        import datasets

        return [dict(row) for row in datasets.load_dataset(hub.repo, hub.config, split=hub.split)]
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"data {hub}",
            expected="a download from the hub",
            got=f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}",
            fix="Check the network, or give --data-dir with the files that `dskd-eval doctor` lists.",
        ) from error
