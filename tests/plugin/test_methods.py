"""What the registry knows of each method."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from dskd_plugin import methods
from dskd_plugin.methods.base import METHODS
from dskd_plugin.settings import parse_settings

FOLDER = Path(methods.__file__).parent
PAIRS_BY = {
    "sft": "exact",
    "kd": "exact",
    "overlap_kd": "starts",
    "bpm": "bytes",
    "uld": "position",
    "mined": "warped",
    "span_kd": "exact",
    "csd": "exact",
    "alm": "exact",
    "gold": "exact",
    "xtoken": "starts",
    "dskd": "starts",
    "cma": "all",
    "xtoken hybrid": "exact",
}
NAMES = [name for name in PAIRS_BY if name not in ("cma", "xtoken hybrid")]
BLOCKS = {name: {"method": name} for name in NAMES} | {
    "cma": {"method": "dskd", "alignment": "cma"},
    "xtoken hybrid": {"method": "xtoken", "xtoken": {"loss": "hybrid"}},
}


def settings_of(block):
    return parse_settings({"teacher": {"model": "t"}, **block})


def test_every_method_has_a_file_and_no_other_file_knows_its_name():
    files = {path.stem for path in FOLDER.glob("*.py")} - {"__init__", "base"}
    homes = {type(method).__module__.rsplit(".", 1)[1] for method in METHODS.values()}
    assert homes == files and len(METHODS) == len(files)
    assert methods.names() == NAMES
    for path in FOLDER.parent.rglob("*.py"):
        if FOLDER in path.parents:
            continue
        compared = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Compare)]
        names = {part.value for node in compared for part in ast.walk(node) if isinstance(part, ast.Constant)}
        # kd is the name of a term, too, and dskd that of the block.
        assert not names & (set(NAMES) - {"kd", "dskd"}), path


@pytest.mark.parametrize("name", PAIRS_BY)
def test_which_tokens_a_method_pairs(name):
    settings = settings_of(BLOCKS[name])
    assert methods.method_of(settings).pairing(settings) == PAIRS_BY[name]


def test_checking_settings_does_not_load_torch():
    text = (
        "import sys\nfrom dskd_plugin.settings import parse_settings\nparse_settings({'teacher': {'model': 't'}})\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", text], check=True)
