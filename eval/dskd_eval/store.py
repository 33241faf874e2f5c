"""Finished batches of answers on disk, so that a run that is stopped loses none."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from dskd_eval.backends.base import Generation
from dskd_eval.errors import UserError


class GenerationStore:
    """Finished batches on disk, keyed by model content, dtype, backend, prompts and settings. Survives `kill -9`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._connection = sqlite3.connect(path, isolation_level=None)
            self._connection.execute("PRAGMA journal_mode=WAL")
            self._connection.execute("CREATE TABLE IF NOT EXISTS batches (key TEXT PRIMARY KEY, value TEXT)")
        except sqlite3.Error as error:
            raise UserError(
                f"generation store {path}",
                expected="a writable sqlite file",
                got=str(error),
                fix="Remove the file, or choose another --cache.",
            ) from error

    def get(self, key: str) -> list[Generation] | None:
        found = self._connection.execute("SELECT value FROM batches WHERE key = ?", (key,)).fetchone()
        return [Generation(**item) for item in json.loads(found[0])] if found else None

    def put(self, key: str, generations: Sequence[Generation]) -> None:
        """Keep the generations of a batch; ``UserError`` where the file cannot be written."""
        value = json.dumps([asdict(item) for item in generations])
        try:
            self._connection.execute("INSERT OR REPLACE INTO batches VALUES (?, ?)", (key, value))
        except sqlite3.Error as error:
            raise UserError(
                f"generation store {self.path}",
                expected="room for finished batches",
                got=str(error),
                fix="Free some space, or choose another --output, or another --cache if a second run writes into "
                "this one; then --resume keeps the finished tasks.",
            ) from error

    def close(self) -> None:
        self._connection.close()
