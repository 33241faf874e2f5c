"""Writes the tables of the documents that come from the code: `make docs`.

docs/settings.md lists the schema of the ``dskd:`` block, docs/metrics.md what a run logs, docs/options.md what the
tests found of Axolotl's options. A test compares them with what this file makes of the code.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from dskd_plugin.host.metrics import MEANINGS
from dskd_plugin.settings import Settings
from tests.options import NEAR, OPTIONS, VERDICTS, Option, advice

DOCS = Path(__file__).parent
BOUNDS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
Found = list[tuple[str, FieldInfo]]


def blocks(annotation: Any) -> list[type[BaseModel]]:
    """The settings blocks that an annotation allows."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [block for part in get_args(annotation) for block in blocks(part)]


def settings_of(block: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str, FieldInfo]]:
    """(name, kind of its block or "", field) of every setting that is no block itself."""
    for key, field in block.model_fields.items():
        # A list of blocks whose settings the table has already is told in one row.
        inside = [] if "values" in extras(field) else blocks(field.annotation)
        for one in inside:
            yield from settings_of(one, f"{prefix}{key}.")
        if not inside:
            kind = block.model_fields.get("kind")
            yield prefix + key, "" if kind is None else get_args(kind.annotation)[0], field


def default_of(name: str, field: FieldInfo) -> str:
    if name == "divergence.kind":
        return f"`{Settings(teacher={'model': 'x'}).divergence.kind}`"
    if field.default is PydanticUndefined:
        return "required"
    return f"`{yaml.safe_dump(field.default).splitlines()[0]}`"


def values_of(fields: list[FieldInfo]) -> str:
    """The values that a setting takes: what its schema says of them, its choices or its bounds."""
    first, extra = fields[0], extras(fields[0])
    if "values" in extra:
        return str(extra["values"])
    choices = extra.get("enum") or [choice for field in fields for choice in choices_of(field.annotation)]
    if choices:
        return ", ".join(f"`{choice}`" for choice in choices)
    bounds = []
    for rule in first.metadata:
        for key, sign in BOUNDS.items():
            if getattr(rule, key, None) is not None:
                bounds.append(f"{sign} {getattr(rule, key):g}")
    return ", ".join(bounds)


def choices_of(annotation: Any) -> list[str]:
    if annotation is bool:
        return ["true", "false"]
    return [choice for choice in get_args(annotation) if isinstance(choice, str)]


def extras(field: FieldInfo) -> dict[str, Any]:
    return field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}


def meaning_of(name: str, found: Found) -> str:
    """What a setting means; a knob of a divergence with the kinds that have it."""
    if name == "divergence.kind":
        return "distance between the two distributions"
    told = []
    for kind, field in found:
        see = f"; see {extras(field)['see']}" if "see" in extras(field) else ""
        told.append(f"{f'`{kind}`: ' if kind else ''}{field.description}{see}")
    return "; ".join(told)


def settings_table() -> str:
    by_name: dict[str, Found] = {}
    for name, kind, field in settings_of(Settings):
        by_name.setdefault(name, []).append((kind, field))
    rows = []
    for name, found in by_name.items():
        fields = [field for _, field in found]
        rows.append([f"`{name}`", default_of(name, fields[0]), values_of(fields), meaning_of(name, found)])
    return _table(["setting", "default", "values", "meaning"], rows)


def metrics_table() -> str:
    return _table(["name", "meaning"], [[f"`dskd/{name}`", meaning] for name, meaning in MEANINGS.items()])


def verdicts_table() -> str:
    return _table(["word", "meaning"], [[word, meaning] for word, meaning in VERDICTS.items()])


def options_table() -> str:
    rows = []
    for group, options in OPTIONS.items():
        for number, option in enumerate(options):
            lines = f"`{option.name}`" + ("" if option.base == "padded" else f" ({_BASES[option.base]})")
            rows.append([group if number == 0 else "", lines, option.verdict, known(option)])
    return _table(["", "recipe", "beside the plugin", "to know"], rows)


_BASES = {"packed": "packed rows", "lora": "LoRA", "warm": "`temperature: 2`"}


def known(option: Option) -> str:
    """What the reader of an option's line should know."""
    told = option.note
    if option.verdict == NEAR:
        told += f"{'; ' if told else ''}tested to {100 * option.within:g} %"
    return told or advice(option).rstrip(".")


def _table(titles: list[str], rows: list[list[str]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


# page -> section -> its first table
PAGES = {
    "settings.md": {"Settings": settings_table},
    "metrics.md": {"What is logged": metrics_table},
    "options.md": {"Words": verdicts_table, "Options": options_table},
}


def written(page: str) -> str:
    """A page with its tables as the code has them."""
    text = (DOCS / page).read_text(encoding="utf-8")
    for section, table in PAGES[page].items():
        text = with_table(text, section, table())
    return text


def with_table(text: str, section: str, table: str) -> str:
    start = text.index("\n| ", text.index(f"\n## {section}\n")) + 1
    lines = text[start:].splitlines(keepends=True)
    size = next((k for k, line in enumerate(lines) if not line.startswith("| ")), len(lines))
    return text[:start] + table + "".join(lines[size:])


def main() -> int:
    for page in PAGES:
        (DOCS / page).write_text(written(page), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
