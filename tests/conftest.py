"""What every tier shares: tiny real models, tokenizers and conversations, and a guard against empty tiers."""

import importlib.util
import os
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from benchmarks.tiny import (
    byte_level_tokenizer,
    conversations,
    make_pair,
    save_model,
    sentencepiece_tokenizer,
    small_recipe,
)

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("AXOLOTL_DO_NOT_TRACK", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models: more threads only wait for one another


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--at-least", type=int, default=0, help="fail unless this many tests passed")


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """A tier that silently skipped is not a pass."""
    wanted = session.config.getoption("--at-least")
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if wanted and reporter and not hasattr(session.config, "workerinput"):
        passed = len(reporter.stats.get("passed", []))
        if passed < wanted and session.exitstatus == 0:
            reporter.write_line(f"expected at least {wanted} passed tests, got {passed}", red=True)
            session.exitstatus = 1


@pytest.fixture(scope="session")
def oracle() -> ModuleType:
    """tests/core/oracle.py, loaded by path because test folders are not packages."""
    path = Path(__file__).parent / "core" / "oracle.py"
    spec = importlib.util.spec_from_file_location("core_oracle", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def build() -> SimpleNamespace:
    """The builders below, for tests that need other sizes."""
    return SimpleNamespace(
        conversations=conversations,
        byte_level_tokenizer=byte_level_tokenizer,
        sentencepiece_tokenizer=sentencepiece_tokenizer,
        save_model=save_model,
    )


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders: student (byte-level BPE, Llama), teacher (SentencePiece-like, Qwen3), sibling (as the student), data."""
    return make_pair(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def third(build: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a teacher with a third vocabulary and a template of its own."""
    tokenizer = build.byte_level_tokenizer(330, 9)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + ': ' + m.content + '<|im_end|>' }}{% endfor %}"
    )
    return build.save_model(tmp_path_factory.mktemp("third") / "teacher", tokenizer, "llama", width=40, seed=5)


@pytest.fixture
def recipe(tiny: dict[str, str], tmp_path: Path) -> dict[str, Any]:
    """A complete small recipe; tests change what they need."""
    return small_recipe(tiny, tmp_path)
