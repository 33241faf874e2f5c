"""What the documents say about settings, files, tests and messages is what the code has."""

import ast
import re
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import get_args

import pytest
import yaml
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from dskd_plugin.core.objective import RATES, TERMS
from dskd_plugin.recipe_options import REFUSED
from dskd_plugin.settings import Settings

ROOT = Path(__file__).parents[2]
DOCUMENTS = [
    *ROOT.glob("*.md"),
    *(ROOT / "docs").rglob("*.md"),
    *(ROOT / "benchmarks").rglob("*.md"),
    ROOT / "recipes" / "README.md",
]
PAGES = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md")}


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def table(text: str, section: str | None = None) -> list[list[str]]:
    """The cells of the first table of a section, or of the page."""
    body = text if section is None else text.split(f"\n## {section}\n")[1].split("\n## ")[0]
    lines = [line for line in body.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]


def blocks(annotation) -> list[type[BaseModel]]:
    """The settings blocks that an annotation allows."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [block for part in get_args(annotation) for block in blocks(part)]


def schema(model: type[BaseModel] = Settings, prefix: str = "") -> dict[str, list]:
    """Dotted name -> its fields; a knob that several divergences have is one setting with several fields."""
    found: dict[str, list] = {}
    for key, field in model.model_fields.items():
        # A teacher of the list has the settings of the one, beside its weight.
        inside = [] if key == "teachers" else blocks(field.annotation)
        for block in inside:
            for deeper, fields in schema(block, f"{prefix}{key}.").items():
                found.setdefault(deeper, []).extend(fields)
        if not inside:
            found.setdefault(prefix + key, []).append(field)
    return found


@pytest.mark.parametrize("page", ["settings.md", "metrics.md", "options.md"])
def test_tables_that_come_from_the_code_are_up_to_date(page):
    spec = spec_from_file_location("docs_tables", ROOT / "docs" / "tables.py")
    tables = module_from_spec(spec)
    spec.loader.exec_module(tables)
    assert page in tables.PAGES
    assert tables.written(page) == (ROOT / "docs" / page).read_text(encoding="utf-8"), "run `make docs`"


SCHEMA = schema()
ROWS = {row[0].strip("`"): row for row in table(PAGES["settings"], "Settings")}


def test_the_table_lists_every_setting_and_no_other():
    assert len(ROWS) == len(table(PAGES["settings"], "Settings"))
    assert set(ROWS) == set(SCHEMA)
    assert len(SCHEMA) > 15


@pytest.mark.parametrize("setting", sorted(SCHEMA))
def test_default_and_bounds_of_a_setting_are_those_of_the_schema(setting):
    _, default, values, meaning = ROWS[setting]
    assert meaning
    for field in SCHEMA[setting]:
        if setting == "divergence.kind":
            assert default == f"`{Settings(teacher={'model': 'x'}).divergence.kind}`"
        elif field.default is PydanticUndefined:
            assert default == "required"
        else:
            assert yaml.safe_load(default.strip("`")) == field.default
        options = [option for option in get_args(field.annotation) if isinstance(option, str)]
        said = re.findall(r"`([^`]+)`", values)
        assert set(options) <= set(said)
        bounds = {
            f"{sign} {getattr(rule, key):g}"
            for rule in field.metadata
            for key, sign in (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<="))
            if getattr(rule, key, None) is not None
        }
        assert set(re.findall(r"[<>]=? [\d.]+", values)) == bounds
    if setting == "divergence.kind":
        kinds = {option for field in SCHEMA[setting] for option in get_args(field.annotation)}
        assert set(re.findall(r"`([^`]+)`", values)) == kinds


def test_every_logged_name_is_explained():
    explained = {row[0] for row in table(PAGES["metrics"], "What is logged")}
    tree = ast.parse((ROOT / "dskd_plugin" / "generation" / "rollout.py").read_text(encoding="utf-8"))
    (counts,) = (n.value for n in tree.body if isinstance(n, ast.Assign) and n.targets[0].id == "COUNTS")
    sampled = [f"rollout_{name}" for name in ast.literal_eval(counts)]
    others = ("kd", "kd_scale", "guarded", "align_ratio", *sampled)
    assert explained == {f"`dskd/{metric}`" for metric in (*TERMS, *RATES, *others)}


def test_examples_of_the_documents_are_valid_recipes():
    from dskd_plugin.settings import parse_settings

    texts = [document.read_text(encoding="utf-8") for document in DOCUMENTS]
    written = [yaml.safe_load(found) for text in texts for found in re.findall(r"```yaml\n(.*?)```", text, re.S)]
    recipes = [
        recipe
        for recipe in written
        if isinstance(recipe, dict) and {"teacher", "teachers"} & set(recipe.get("dskd") or {})
    ]
    assert len(recipes) >= 4
    for recipe in recipes:
        assert all(one.teacher.model for one in parse_settings(recipe["dskd"]).each)
        assert "output_dir" not in recipe or "save_total_limit" in recipe, recipe  # checkpoints of 16 GB otherwise


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_links_lead_somewhere(document):
    text = document.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if target.startswith("http"):
            continue
        file, _, heading = target.partition("#")
        linked = document.parent / file if file else document
        assert linked.exists(), f"{name(document)} links to {target}"
        if heading:
            headings = re.findall(r"^#+ (.*)$", linked.read_text(encoding="utf-8"), re.M)
            assert heading in {re.sub(r"[^\w -]", "", line).lower().replace(" ", "-") for line in headings}


def test_every_refused_key_is_among_the_limits():
    assert len(REFUSED) >= 10
    assert set(REFUSED) <= set(re.findall(r"`(\w+)`", PAGES["limits"]))


# -- equations.md --------------------------------------------------------------------------------------------


def functions(path: str) -> set[str]:
    """Names that a file defines, methods as Class.method."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    kinds = (ast.FunctionDef, ast.ClassDef)
    top = {node.name for node in tree.body if isinstance(node, kinds)}
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    return top | {f"{c.name}.{node.name}" for c in classes for node in c.body if isinstance(node, kinds)}


@pytest.mark.parametrize("row", table(PAGES["equations"]), ids=lambda row: row[0][:40])
def test_every_equation_has_its_module_and_its_test(row):
    _, modules, tests = row
    path = None
    for quoted in re.findall(r"`([^`]+)`", modules):
        if quoted.startswith("dskd_plugin/"):
            path = quoted
            assert (ROOT / path).is_file()
        else:
            assert quoted in functions(path), f"{path}: {quoted}"
    assert path
    named = re.findall(r"`(tests/[^`:]+)::(\w+)`", tests)
    assert named
    for path, test in named:
        assert test in functions(path), f"{path}::{test}"


# -- troubleshooting -----------------------------------------------------------------------------------------


def text_of(node: ast.expr) -> str:
    """A text in the code, with … for what is filled in."""
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else "…"


def messages() -> list[str]:
    """Every text in the plugin; those of errors put together from their four parts."""
    found = []
    for file in (ROOT / "dskd_plugin").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("SettingError", "DSKDSetupError"):
                if len(node.args) == 4:
                    found.append("{}: expected {}, got {}. {}".format(*map(text_of, node.args)))
            elif isinstance(node, ast.JoinedStr | ast.Constant):
                found.append(text_of(node))
    return found


MESSAGES = messages()


@pytest.mark.parametrize("row", table(PAGES["troubleshooting"]), ids=lambda row: row[0][:50])
def test_every_message_of_the_troubleshooting_table_exists(row):
    message = row[0].strip("` ")
    parts = [part.strip() for part in message.split("…") if part.strip()]
    assert parts
    assert any(all(part in text for part in parts) for text in MESSAGES), message
