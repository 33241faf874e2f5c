"""Who may import whom (docs: arrows point inwards)."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PLUGIN = ROOT / "dskd_plugin"
CORE = PLUGIN / "core"
HOSTS = {"axolotl", "transformers", "lm_eval"}
LEAVES = {"heads", "divergences", "reduce", "projectors", "overlap", "exact_alignment", "attend", "events", "fitting"}
LEAVES |= {"balance", "fading", "top_shared", "prefixes", "segments"}
# core module -> core modules that it may import
ABOVE = {
    "attend": {"projectors", "row_blocks"},
    "balance": {"fading"},
    "events": {"divergences"},
    "top_shared": {"divergences"},
    "prefixes": {"divergences", "events"},
    "extended": {"divergences", "overlap", "segments"},
    "likelihood": {"divergences", "segments"},
    "hybrid": {"divergences", "segments"},
    "vocabulary_matrix": {"divergences", "events"},
    "common_support": {"divergences", "events", "overlap", "segments"},
    "objective": LEAVES,
    "rows": LEAVES | {"objective"},
    "teacher_rows": LEAVES | {"objective", "rows"},
    "terms": LEAVES | {"objective", "rows", "teacher_rows"},
    "row_blocks": {"heads"},
    "readings": LEAVES | {"row_blocks"},
    "walk": LEAVES | {"objective", "rows", "teacher_rows", "terms", "row_blocks", "readings"},
    "blockwise": LEAVES | {"objective", "rows", "teacher_rows", "terms", "row_blocks", "readings", "walk"},
    "baselines": LEAVES | {"objective"},
    "backend": LEAVES | {"objective", "rows", "readings", "blockwise", "walk"},
    "__init__": set(),
}


def imports(path):
    """Full dotted names that a file imports, anywhere in it; relative imports resolved."""
    package = ".".join(path.relative_to(ROOT).with_suffix("").parts[:-1])
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parent = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parent, base]).strip(".")
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def top(name):
    return name.split(".")[0]


def core_modules(path):
    """Names of the core modules that a file imports."""
    prefix = "dskd_plugin.core."
    return {name[len(prefix) :].split(".")[0] for name in imports(path) if name.startswith(prefix)}


def check_inwards(package, files, allowed, folder):
    """That the files of a folder import from no folders of the package but itself and those that are allowed."""
    inside = [path for path in files if path.parent.name == folder]
    assert inside
    for path in inside:
        parts = (name.split(".") for name in imports(path) if name.startswith(f"{package}."))
        used = {part[1] for part in parts if part[1] in allowed}
        assert used <= allowed[folder] | {folder}, path


CORE_FILES = sorted(CORE.glob("*.py"))
FUSED_FILES = sorted((CORE / "fused").glob("*.py"))
KERNELS = [CORE / "fused" / f"{name}.py" for name in ("event_kernel", "pointwise", "row_kernels", "softmax")]
EVAL_FILES = sorted((ROOT / "eval" / "dskd_eval").rglob("*.py"))


def test_the_folders_are_found():
    assert {"heads", "divergences", "reduce", "projectors", "objective", "blockwise"} <= {p.stem for p in CORE_FILES}
    assert EVAL_FILES


@pytest.mark.parametrize("path", CORE_FILES, ids=lambda path: path.stem)
def test_core_needs_torch_and_the_standard_library_alone(path):
    allowed = {"torch", "dskd_plugin"} | set(sys.stdlib_module_names)
    assert {top(name) for name in imports(path)} <= allowed
    outside = {name for name in imports(path) if top(name) == "dskd_plugin"}
    assert all(name.startswith("dskd_plugin.core") for name in outside)


@pytest.mark.parametrize("path", FUSED_FILES, ids=lambda path: path.stem)
def test_kernels_alone_import_triton_and_they_are_imported_when_they_run(path):
    body = ast.parse(path.read_text()).body
    at_import = {ast.unparse(node) for node in body if isinstance(node, ast.Import | ast.ImportFrom)}
    if path not in KERNELS:
        assert not [line for line in at_import if "triton" in line]
        assert not {f"dskd_plugin.core.fused.{kernels.stem}" for kernels in KERNELS} & set(imports(path))
    allowed = {"torch", "triton", "dskd_plugin"} | set(sys.stdlib_module_names)
    assert {top(name) for name in imports(path)} <= allowed


@pytest.mark.parametrize("path", CORE_FILES, ids=lambda path: path.stem)
def test_core_is_a_star(path):
    siblings = {p.stem for p in CORE_FILES}
    assert core_modules(path) & siblings <= ABOVE.get(path.stem, set()), "leaf modules do not import one another"


@pytest.mark.parametrize("path", EVAL_FILES, ids=lambda path: path.stem)
def test_the_evaluator_knows_neither_plugin_nor_axolotl(path):
    assert not {top(name) for name in imports(path)} & {"dskd_plugin", "axolotl"}


EVAL = ROOT / "eval" / "dskd_eval"
# folder -> folders that it may import; what stands beside the folders is open to all of them.
EVAL_INWARDS = {
    "schema": set(),
    "programs": set(),
    "sandbox": {"schema"},
    "scorers": {"schema", "programs", "sandbox", "lmeval"},
    "tasks": {"schema", "scorers"},
    "backends": {"schema", "tasks", "lmeval"},
    "lmeval": {"schema", "scorers", "sandbox", "tasks", "backends"},
    "report": {"schema", "scorers"},
    "cli": {"schema", "scorers", "tasks", "backends", "lmeval", "report"},
}


def test_every_folder_of_the_evaluator_has_its_place():
    assert {path.parent.name for path in EVAL_FILES} - {"dskd_eval"} == set(EVAL_INWARDS)


@pytest.mark.parametrize("path", EVAL_FILES, ids=lambda path: str(path.relative_to(EVAL)))
def test_only_the_lmeval_folder_imports_lm_eval(path):
    if path.parent.name != "lmeval":
        assert "lm_eval" not in {top(name) for name in imports(path)}


@pytest.mark.parametrize("folder", EVAL_INWARDS)
def test_folders_of_the_evaluator_import_inwards(folder):
    check_inwards("dskd_eval", EVAL_FILES, EVAL_INWARDS, folder)


@pytest.mark.parametrize("path", EVAL_FILES, ids=lambda path: str(path.relative_to(EVAL)))
def test_files_of_the_evaluator_are_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 360


PLUGIN_FILES = sorted(PLUGIN.rglob("*.py"))
# folder -> folders that it may import; what stands beside the folders is open to all of them but `core`.
INWARDS = {
    "core": set(),
    "fused": {"core"},
    "methods": {"core", "losses", "text"},
    "text": {"core"},
    "losses": {"core", "teachers"},
    "teachers": {"core", "methods", "text"},
    "cache": {"core", "methods", "teachers", "text"},
    "generation": {"core", "text"},
    "plan": {"losses", "methods", "teachers"},
    "host": {"core", "methods", "text", "losses", "teachers", "generation", "cache"},
    "cli": {"methods", "text", "teachers", "generation", "host", "cache", "plan"},
}


def names_of(files):
    """The names of modules and of the folders that they lie in."""
    return sorted({path.stem for path in files} | {path.parent.name for path in files})


@pytest.mark.parametrize("files", [PLUGIN_FILES, EVAL_FILES], ids=["plugin", "evaluator"])
def test_modules_differ_by_more_than_a_letter(files):
    names = names_of(files)
    for place, name in enumerate(names):
        for other in names[place + 1 :]:
            longer, shorter = sorted((name, other), key=len, reverse=True)
            assert longer not in {shorter + letter for letter in "abcdefghijklmnopqrstuvwxyz"}, (name, other)


@pytest.mark.parametrize("path", [*PLUGIN_FILES, *EVAL_FILES], ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_says_in_its_first_line_what_it_is_for(path):
    first, *_ = path.read_text(encoding="utf-8").splitlines()
    assert re.match(r'r?"""\S.{10,}', first)
    assert first.rstrip('"')[-1] in ".:"


USERS = sorted(path for folder in ("tests", "benchmarks", "quickstart") for path in (ROOT / folder).rglob("*.py"))


def private_members():
    """The names with an underscore that objects of the two packages have."""
    private = set()
    for path in [*PLUGIN_FILES, *EVAL_FILES]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                private.add(node.attr if ast.unparse(node.value) == "self" else "")
            elif isinstance(node, ast.ClassDef):
                private |= {part.name for part in node.body if isinstance(part, ast.FunctionDef)}
    return {name for name in private if name.startswith("_") and not name.endswith("__")}


# A member of transformers' tokenizers has that name too, and tests speak of it.
PRIVATE = private_members() - {"_tokenizer"}
GIVEN = ("_bootstrap", "__version__")


@pytest.mark.parametrize("path", USERS, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_uses_the_packages_uses_public_names(path):
    ours = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and top(node.module or "") in ("dskd_plugin", "dskd_eval"):
            imported = {alias.name for alias in node.names}
            assert not [name for name in imported if name.startswith("_") and name not in GIVEN], node.lineno
            ours |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.endswith("__"):
            owner = ast.unparse(node.value)
            assert owner in ("self", "cls") or not (node.attr in PRIVATE or owner in ours), (node.lineno, node.attr)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("setattr"):
            words = [part.value for part in node.args[:2] if isinstance(part, ast.Constant)]
            names = [str(word).split(".")[-1] for word in words]
            assert not [name for name in names if name.startswith("_") and not name.endswith("__")], node.lineno


def test_every_folder_of_the_plugin_has_its_place():
    assert {path.parent.name for path in PLUGIN_FILES} - {"dskd_plugin"} == set(INWARDS)


@pytest.mark.parametrize("path", PLUGIN_FILES, ids=lambda path: str(path.relative_to(PLUGIN)))
def test_only_the_host_folder_imports_axolotl(path):
    if path.parent.name != "host":
        assert "axolotl" not in {top(name) for name in imports(path)}


@pytest.mark.parametrize("folder", INWARDS)
def test_folders_of_the_plugin_import_inwards(folder):
    check_inwards("dskd_plugin", PLUGIN_FILES, INWARDS, folder)


@pytest.mark.parametrize("path", [path for path in PLUGIN_FILES if path.parent == PLUGIN], ids=lambda path: path.stem)
def test_files_beside_the_folders_know_neither_host_nor_commands(path):
    outer = ("dskd_plugin.host", "dskd_plugin.cli", "dskd_plugin.plan")
    found = {name for name in imports(path) if name.startswith(outer)}
    # What Python and Axolotl are handed; both import it late.
    assert not found or path.stem in ("__init__", "_bootstrap"), found


@pytest.mark.parametrize("path", CORE_FILES, ids=lambda path: path.stem)
def test_core_names_no_setting_of_a_recipe(path):
    said = [node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)]
    assert not [text for text in said if isinstance(text, str) and re.search(r"\bdskd\.(?!core)|\w\.init: ", text)]


@pytest.mark.parametrize("path", PLUGIN_FILES, ids=lambda path: str(path.relative_to(PLUGIN)))
def test_no_loss_goes_through_the_function_that_liger_replaces(path):
    called = {ast.unparse(node.func) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)}
    assert not [name for name in called if name.split(".")[-1] in ("cross_entropy", "CrossEntropyLoss")]


@pytest.mark.parametrize("path", PLUGIN_FILES, ids=lambda path: str(path.relative_to(PLUGIN)))
def test_errors_of_four_parts_are_put_together_in_one_place(path):
    if path.parent == CORE or path.stem == "errors":
        return
    raised = [node.exc for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Raise) and node.exc]
    own = ("ValueError", "RuntimeError")
    assert not [error for error in map(ast.unparse, raised) if error.startswith(own) and ": expected" in error]


def test_only_learned_parts_are_modules():
    holders = {
        path.stem
        for path in CORE_FILES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef) and any(ast.unparse(base).endswith("Module") for base in node.bases)
    }
    assert holders <= {"projectors", "attend"}


def test_no_plugin_file_but_the_outer_ring_imports_a_host():
    """The package's own entry files must import without Axolotl; it swallows what fails there."""
    for name in ("__init__.py", "_bootstrap.py"):
        tree = ast.parse((ROOT / "dskd_plugin" / name).read_text())
        at_import = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        for node in at_import:
            names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            assert all(top(module) in sys.stdlib_module_names for module in names), (name, names)


def test_importing_core_loads_no_host():
    modules = [f"dskd_plugin.core.{path.stem}" for path in CORE_FILES if path.stem != "__init__"]
    code = (
        f"import sys, importlib\nfor name in {modules}: importlib.import_module(name)\n"
        f"print(sorted({HOSTS} & set(sys.modules)), len(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("[] "), done.stdout


def _symbols(path):
    """Names of classes, functions and assignments of a file, methods as Class.method."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{part.name}" for part in node.body if isinstance(part, ast.FunctionDef)}
    return found


@pytest.mark.parametrize(
    "page", ["docs/equations.md", "docs/method.md", "CONTRIBUTING.md", "docs/generate.md", "docs/eval.md"]
)
def test_docs_name_files_functions_and_tests_that_exist(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for name, symbol in re.findall(r"`((?:dskd_plugin|eval|benchmarks|quickstart)/[\w/]+\.py)`(?: `([\w.]+)`)?", text):
        assert (ROOT / name).is_file(), name
        assert not symbol or symbol in _symbols(ROOT / name), (name, symbol)
    for name, test in re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", text):
        assert (ROOT / name).is_file(), name
        assert not test or f"def {test}(" in (ROOT / name).read_text(encoding="utf-8"), (name, test)
