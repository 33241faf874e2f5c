"""The bytes of a strategy: the same in every process, and back from them the same content."""

import os
import pickle
import subprocess
import sys
from types import SimpleNamespace

import pytest

from dskd_plugin.host.pickled import packed, unpacked
from dskd_plugin.host.strategy import KNOWN, PairedStrategy

STATE = {"names": {"role", "content", "tools"}, "ids": [frozenset({3, 1}), ({"a", ("b", 2)}, None)], "empty": set()}


def test_sets_come_back_as_they_were():
    back = unpacked(packed(STATE))
    assert back == STATE
    assert [type(each) for each in (back["names"], back["ids"][0], back["empty"])] == [set, frozenset, set]


def test_every_process_makes_the_same_bytes():
    code = f"from dskd_plugin.host.pickled import packed; print(packed({STATE!r}).hex())"
    made = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert made == {packed(STATE).hex() + "\n"}


def _strategy(**state):
    strategy = PairedStrategy.__new__(PairedStrategy)
    strategy.__dict__.update(state, _packed=None)
    return strategy


def test_a_strategy_is_itself_in_its_own_process_and_its_equal_elsewhere():
    strategy = _strategy(teacher=SimpleNamespace(names={"role"}), student_len=7)
    content = pickle.dumps(strategy)
    assert pickle.loads(content) is strategy
    KNOWN.clear()
    back = pickle.loads(content)
    assert back is not strategy
    assert back.teacher == strategy.teacher and back.student_len == 7


@pytest.mark.parametrize("library", ["dill", "datasets"])
def test_what_only_dill_pickles_is_left_to_it(library):
    import dill
    from datasets.utils._dill import dumps

    strategy = _strategy(filter_rows=lambda row: row == 3)
    back = pickle.loads({"dill": dill.dumps, "datasets": dumps}[library](strategy))
    assert back.filter_rows(3) and not back.filter_rows(4)
