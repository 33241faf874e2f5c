"""The tokenizer zoo for every plugin test: `zoo(name)` gives a tokenizer and its table, built once."""

import contextlib
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest

# Axolotl's copy of the output would replace the streams that pytest and click capture, and outlive the test.
os.environ["AXOLOTL_TEE_STDOUT"] = "0"


def _load_zoo() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tokenizer_zoo", Path(__file__).with_name("tokenizer_zoo.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # for tests that import its helpers
    spec.loader.exec_module(module)
    return module


_ZOO = _load_zoo()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "zoo_name" in metafunc.fixturenames:
        metafunc.parametrize("zoo_name", list(_ZOO.ZOO))
    if "refused_name" in metafunc.fixturenames:
        metafunc.parametrize("refused_name", list(_ZOO.REFUSED))


@pytest.fixture
def caplog(caplog):
    """What the plugin says, in whatever order the tests run.

    The first import of Axolotl's commands puts handlers of its own in place of those that pytest listens with.
    """
    import axolotl.cli  # noqa: F401

    from dskd_plugin.log import LOG

    before, level = LOG.propagate, LOG.level
    LOG.addHandler(caplog.handler)
    LOG.setLevel("DEBUG")  # what Axolotl was imported with, AXOLOTL_LOG_LEVEL, would hold
    LOG.propagate = False  # else a message that reaches the root as well would be there twice
    yield caplog
    LOG.removeHandler(caplog.handler)
    LOG.propagate = before
    LOG.setLevel(level)


@pytest.fixture(scope="session")
def plugins_forgotten():
    """A context before and after which Axolotl knows no plugin and no dataset of an earlier recipe."""
    from axolotl.integrations.base import PluginManager

    from dskd_plugin.host import dataset

    @contextlib.contextmanager
    def context():
        PluginManager._instance = None
        try:
            yield
        finally:
            PluginManager._instance = None
            dataset.install(None)

    return context


@pytest.fixture
def fresh_plugin_manager(plugins_forgotten):
    with plugins_forgotten():
        yield


@pytest.fixture(scope="session")
def tokenizer_zoo() -> ModuleType:
    """The module itself: ZOO, REFUSED, load and the builders."""
    return _ZOO


@pytest.fixture(scope="session")
def zoo():
    """zoo(name) -> .name, .tokenizer, .table, .spelling, .changes."""
    return _ZOO.load


@pytest.fixture(scope="session")
def whole_zoo() -> list:
    return [_ZOO.load(name) for name in _ZOO.ZOO]
