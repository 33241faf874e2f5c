"""The built wheel, its start-up hook, and what the hook does to a real Axolotl."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import textwrap
import tomllib
import zipfile
from email.parser import Parser
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HOOK_FILES = {"dskd_plugin.pth", "dskd_plugin.start"}
BUDGET_US = 1000
QUIET = {
    "AXOLOTL_DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
}

needs_axolotl = pytest.mark.axolotl


def run(*command: str | Path, check: bool = True, **env: str) -> subprocess.CompletedProcess[str]:
    """Run outside the repository, so that its source tree cannot leak in."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    result = subprocess.run(
        [str(part) for part in command],
        cwd=os.path.abspath(os.sep),
        env={**clean, **env},
        capture_output=True,
        text=True,
    )
    if check and result.returncode:
        raise AssertionError(f"{command}: exit code {result.returncode}\n{result.stdout}\n{result.stderr}")
    return result


class Environment:
    """A fresh virtual environment with nothing but the wheel."""

    def __init__(self, folder: Path) -> None:
        run(sys.executable, "-m", "venv", "--without-pip", folder)
        self.python = folder / "bin" / "python"
        self.site = Path(self.run("import sysconfig; print(sysconfig.get_path('purelib'))").stdout.strip())

    def run(self, code: str, *options: str, check: bool = True, **env: str) -> subprocess.CompletedProcess[str]:
        return run(self.python, *options, "-c", textwrap.dedent(code), check=check, **env)

    def pip(self, *arguments: str | Path) -> None:
        run(
            sys.executable,
            "-m",
            "pip",
            "--disable-pip-version-check",
            "--quiet",
            "--python",
            self.python,
            *arguments,
        )

    def install(self, wheel: Path) -> None:
        self.pip("install", "--no-deps", "--no-index", wheel)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    pytest.importorskip("build", reason="building the wheel needs the dev extra")
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, ROOT)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    environment = Environment(tmp_path_factory.mktemp("installed") / "venv")
    environment.install(wheel)
    return environment


# -- what is in the wheel ------------------------------------------------------------------------------------


def test_wheel_holds_both_packages_the_hook_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        tops = {name.split("/")[0] for name in names if ".dist-info/" not in name}
        assert tops == {"dskd_plugin", "dskd_eval", *HOOK_FILES}
        for name in HOOK_FILES:
            assert archive.read(name) == (ROOT / name).read_bytes()
    tracked = {
        path.relative_to(base).as_posix()
        for base, package in ((ROOT, "dskd_plugin"), (ROOT / "eval", "dskd_eval"))
        for path in (base / package).rglob("*.py")
    }
    assert {name for name in names if name.endswith(".py")} == tracked
    assert not [name for name in names if "test" in Path(name).stem.split("_") or "/tests/" in name]


def test_metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        info = next(name.split("/")[0] for name in archive.namelist() if ".dist-info/" in name)
        metadata = Parser().parsestr(archive.read(f"{info}/METADATA").decode())
        assert f"{info}/licenses/LICENSE" in archive.namelist()
        entry_points = f"{info}/entry_points.txt"
        groups = archive.read(entry_points).decode() if entry_points in archive.namelist() else ""
    assert metadata["Name"] == "dskd"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert {"train", "gpu", "eval", "dev"} <= set(metadata.get_all("Provides-Extra"))
    # Axolotl would load such an entry point in every run on the machine, listed or not.
    assert "axolotl.plugins" not in groups
    from dskd_plugin import __version__

    assert metadata["Version"] == __version__
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.search(r"(?m)^version: (.*)$", citation)[1] == __version__


# -- the hook without Axolotl --------------------------------------------------------------------------------


def test_start_is_silent_and_harmless_without_axolotl(installed):
    result = installed.run("import sys; print('dskd_plugin._bootstrap' in sys.modules)", "-W", "error")
    assert (result.stdout, result.stderr) == ("True\n", "")
    missing = installed.run("import axolotl.integrations.base", check=False)
    assert "No module named 'axolotl'" in missing.stderr


def test_start_imports_only_the_standard_library(installed):
    loaded = json.loads(installed.run("import sys, json; print(json.dumps(sorted(sys.modules)))").stdout)
    own = {name for name in loaded if name.split(".")[0] not in {*sys.stdlib_module_names, "__main__", "sitecustomize"}}
    assert own == {"dskd_plugin", "dskd_plugin._bootstrap"}


def test_start_costs_less_than_a_millisecond(installed):
    """The best of several starts: everything above the best is the machine's business."""

    def cost() -> int:
        lines = installed.run("pass", "-X", "importtime").stderr.splitlines()
        found = [re.fullmatch(r"import time:\s+(\d+) \|\s+(\d+) \|(\s+)(\S+)", line) for line in lines]
        own = [(len(m[3]), int(m[2])) for m in found if m and m[4].split(".")[0] == "dskd_plugin"]
        assert len(own) == 2
        # Deeper lines are part of the cumulative time of the line that follows them.
        outermost = min(depth for depth, _ in own)
        return sum(time for depth, time in own if depth == outermost)

    best = min(cost() for _ in range(15))
    assert best < BUDGET_US, f"{best} us"


def test_installing_the_hook_twice_changes_nothing(installed):
    result = installed.run("""
        import sys, importlib
        from dskd_plugin import _bootstrap
        before = list(sys.meta_path)
        _bootstrap.install()
        importlib.reload(_bootstrap)
        ours = [finder for finder in before if type(finder).__module__ == "dskd_plugin._bootstrap"]
        print(sys.meta_path == before, len(ours))
    """)
    assert result.stdout == "True 1\n"


def test_plugin_without_axolotl_is_an_error_that_says_so(installed):
    result = installed.run("from dskd_plugin import DSKDPlugin", check=False)
    assert result.returncode != 0
    assert "DSKDSetupError: plugins: expected a working installation of dskd" in result.stderr
    assert "pip install 'dskd[train]'" in result.stderr


def test_uninstall_leaves_nothing(wheel, tmp_path):
    environment = Environment(tmp_path / "venv")
    before = set(environment.site.rglob("*"))
    environment.install(wheel)
    assert {path.name for path in environment.site.iterdir()} >= HOOK_FILES
    environment.run("pass")
    environment.pip("uninstall", "--yes", "dskd")
    assert {path for path in environment.site.rglob("*") if path.is_file()} == {
        path for path in before if path.is_file()
    }
    result = environment.run("import sys; print([name for name in sys.modules if 'dskd' in name])")
    assert (result.stdout, result.stderr) == ("[]\n", "")


# -- the hook with Axolotl -----------------------------------------------------------------------------------

WITH_AXOLOTL = """
    import contextlib, inspect, io, json, logging, sys
    answers = {"hook": "dskd_plugin._bootstrap" in sys.modules}
    from axolotl.integrations.base import BasePlugin, PluginManager, load_plugin
    from axolotl.utils.dict import DictDefault
    import axolotl.cli.config, axolotl.utils.config
    import dskd_plugin
    answers["file"] = dskd_plugin.__file__

    answers["classes"] = [type(load_plugin(name)).__module__ + "." + type(load_plugin(name)).__name__
                          for name in ("dskd", "dskd_plugin.DSKDPlugin")]
    try:
        load_plugin("dsdk")
        answers["other names"] = "loaded"
    except Exception as error:
        answers["other names"] = type(error).__name__

    recipe = {"base_model": "x", "datasets": [{"path": "x", "type": "alpaca"}], "micro_batch_size": 1,
              "gradient_accumulation_steps": 1, "learning_rate": 1e-4, "num_epochs": 1}
    said = io.StringIO()
    listener = logging.StreamHandler(said)
    logging.getLogger("axolotl.dskd").addHandler(listener)
    manager = PluginManager.get_instance()
    manager.register("dskd")
    plugin = manager.plugins["dskd"]
    cfg = DictDefault({**recipe, "plugins": ["dskd"]})
    before = json.dumps(cfg.to_dict(), sort_keys=True)
    plugin.register(cfg)
    answers["said"] = said.getvalue()
    answers["recipe untouched"] = json.dumps(cfg.to_dict(), sort_keys=True) == before
    answers["hooks"] = {}
    for name, value in vars(BasePlugin).items():
        if not inspect.isfunction(value) or name.startswith("_") or name in ("register", "get_input_args"):
            continue
        needed = [p.name for p in inspect.signature(getattr(BasePlugin, name)).parameters.values()
                  if p.name != "self" and p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
        arguments = {argument: cfg if argument == "cfg" else None for argument in needed}
        same = getattr(plugin, name)(**arguments) == getattr(BasePlugin(), name)(**arguments)
        answers["hooks"][name] = same
    valid = axolotl.utils.config.validate_config(DictDefault({**recipe, "plugins": ["dskd"]}))
    answers["valid"] = valid.get("dskd") is None

    answers["block alone"] = {}
    for module in (axolotl.utils.config, axolotl.cli.config):
        for plugins in (None, [], ["axolotl.integrations.liger.LigerPlugin"]):
            alone = {**recipe, "dskd": {"teacher": {"model": "y"}}}
            alone.update({} if plugins is None else {"plugins": plugins})
            try:
                module.validate_config(DictDefault(alone))
                message = "accepted"
            except ValueError as error:
                message = str(error)
            answers["block alone"][f"{module.__name__} {plugins}"] = message
    kept = axolotl.utils.config.validate_config(
        DictDefault({**recipe, "plugins": ["dskd"], "dskd": {"teacher": {"model": "y"}, "kd_ratio": 0.25}}))
    answers["kept"] = kept["dskd"]["kd_ratio"]
    print("ANSWERS" + json.dumps(answers))
"""


def dependencies() -> str:
    """This interpreter's packages as a path, whose .pth files are not read: an installed hook runs alone."""
    return sysconfig.get_path("purelib")


@pytest.fixture(scope="module", params=["this environment", "wheel"])
def answers(request):
    pytest.importorskip("axolotl", reason="needs an importable Axolotl")
    code = textwrap.dedent(WITH_AXOLOTL)
    newest = {"PYTHONPATH": os.environ["PYTHONPATH"]} if os.environ.get("PYTHONPATH") else {}
    if request.param == "wheel":
        environment = request.getfixturevalue("installed")
        path = os.pathsep.join([*newest.values(), dependencies()])
        result = run(environment.python, "-W", "ignore", "-c", code, **QUIET, PYTHONPATH=path)
        expected = environment.site
    else:
        result = run(sys.executable, "-W", "ignore", "-c", code, **QUIET, **newest)
        expected = ROOT
    found = json.loads(result.stdout.rsplit("ANSWERS", 1)[1])
    assert found["hook"]
    assert Path(found["file"]).is_relative_to(expected)
    return found


@needs_axolotl
def test_axolotl_loads_the_plugin_by_both_names(answers):
    assert answers["classes"] == ["dskd_plugin.host.plugin.DSKDPlugin"] * 2
    assert answers["other names"] != "loaded"


@needs_axolotl
def test_plugin_without_a_block_is_inert_and_says_so(answers):
    assert "no `dskd:` block; this run is plain Axolotl" in answers["said"]
    assert answers["recipe untouched"]
    assert {"get_trainer_cls", "get_collator_cls_and_kwargs"} <= set(answers["hooks"])
    assert [name for name, same in answers["hooks"].items() if not same] == []
    assert answers["valid"]


@needs_axolotl
def test_block_without_the_plugin_is_refused(answers):
    assert len(answers["block alone"]) == 6
    for started, message in answers["block alone"].items():
        assert message.startswith("plugins: expected 'dskd' in the list because the recipe has a `dskd:` block, got [")
        advice = "Add dskd to that list" if "liger" in started else "Write `plugins: [dskd]`"
        assert message.endswith(f"{advice}, or remove the block.")
    assert answers["kept"] == 0.25


@needs_axolotl
def test_broken_install_stops_the_run(tmp_path):
    """Axolotl 0.19 prints an ImportError and trains on without the plugin; ours must not be one."""
    pytest.importorskip("axolotl", reason="needs an importable Axolotl")
    shutil.copytree(ROOT / "dskd_plugin", tmp_path / "dskd_plugin", ignore=shutil.ignore_patterns("__pycache__"))
    module = tmp_path / "dskd_plugin" / "host" / "plugin.py"
    module.write_text("import a_missing_dependency\n" + module.read_text())
    code = textwrap.dedent("""
        import dskd_plugin
        from axolotl.cli.config import prepare_plugins
        from axolotl.utils.dict import DictDefault
        print("imported:", dskd_plugin.__file__)
        for name in ("dskd", "dskd_plugin.DSKDPlugin"):
            try:
                prepare_plugins(DictDefault({"plugins": [name]}))
                print("went on")
            except RuntimeError as error:
                print("stopped:", error)
    """)
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    lines = run(sys.executable, "-W", "ignore", "-c", code, **QUIET, PYTHONPATH=path).stdout.splitlines()
    assert f"imported: {tmp_path / 'dskd_plugin' / '__init__.py'}" in lines
    assert [line for line in lines if line == "went on"] == []
    stopped = [line for line in lines if line.startswith("stopped:")]
    assert len(stopped) == 2
    for line in stopped:
        assert "expected a working installation of dskd, got ModuleNotFoundError" in line
        assert "a_missing_dependency" in line


def test_the_evaluator_of_the_wheel_finds_its_tasks(installed):
    pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness")
    code = """
        import dskd_eval
        from dskd_eval.cli import main
        print(dskd_eval.__file__)
        main(["list"])
    """
    lines = installed.run(code, "-W", "ignore", **QUIET, PYTHONPATH=dependencies()).stdout.splitlines()
    assert Path(lines[0]).is_relative_to(installed.site)
    listed = {line.split()[0] for line in lines[1:] if line.split()}
    assert {"humaneval", "mbpp", "gsm8k", "math500", "ifeval", "dolly"} <= listed


# Imported where it is present and done without where it is not.
OPTIONAL = {"deepspeed", "psutil", "sentencepiece", "triton", "vllm"}


@pytest.mark.parametrize(("package", "extra"), [("dskd_plugin", "train"), ("eval/dskd_eval", "eval")])
def test_every_imported_distribution_is_declared(package, extra):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    listed = [*project["dependencies"], *project["optional-dependencies"][extra]]
    declared = {re.match(r"[\w.-]+", line)[0].lower().replace("_", "-") for line in listed}
    of_module = packages_distributions()
    imported = set()
    for file in (ROOT / package).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                imported.add(node.module.split(".")[0])
    foreign = imported - set(sys.stdlib_module_names) - {"dskd_plugin", "dskd_eval"} - OPTIONAL
    missing = [
        module
        for module in sorted(foreign)
        if not declared & {name.lower().replace("_", "-") for name in of_module.get(module, [module])}
    ]
    assert foreign and not missing
