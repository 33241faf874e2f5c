"""Tiny random models, rows made by hand, and the shared benchmark files where they exist."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from conftest_models import make_model

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TQDM_DISABLE="1", TOKENIZERS_PARALLELISM="false")


@pytest.fixture(scope="session")
def data_dir() -> Path:
    found = os.environ.get("DSKD_DATA") or Path(__file__).parents[2].parent / "shared" / "data"
    path = Path(found)
    if not (path / "gsm8k" / "test.jsonl").is_file():
        pytest.skip(f"no benchmark files in {path} (set DSKD_DATA)")
    return path.resolve()


@pytest.fixture(scope="session")
def punkt(data_dir: Path) -> None:
    """NLTK's sentence splitter, from the shared files."""
    import nltk

    nltk.data.path.insert(0, str(data_dir / "nltk_data"))
    try:
        nltk.data.find("tokenizers/punkt_tab")
    except LookupError:
        pytest.skip("no punkt_tab")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "other", seed=1)


@pytest.fixture
def own_task(tmp_path: Path) -> Callable[..., Path]:
    """Writes a task file with rows beside it; keyword arguments are further keys."""

    def write(rows: list[dict[str, Any]] | None = None, **keys: Any) -> Path:
        import yaml

        rows = rows or [{"question": f"What is {n} + {n}?", "answer": str(n + n)} for n in range(12)]
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        task = {
            "task": "sums", "data": "rows.jsonl", "prompt": "{{question}}", "reference": "{{answer}}",
            "scorer": "number", "max_new_tokens": 8, **keys,
        }  # fmt: skip
        path = tmp_path / "sums.yaml"
        path.write_text(yaml.safe_dump({key: value for key, value in task.items() if value is not None}))
        return path

    return write


@pytest.fixture
def invoke() -> Callable[..., Any]:
    """Runs the command line in this process; `.output` holds stdout and stderr."""
    from click.testing import CliRunner
    from dskd_eval import cli

    def run(*arguments: object) -> Any:
        return CliRunner().invoke(cli.main, [str(argument) for argument in arguments])

    return run
