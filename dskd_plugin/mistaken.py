"""What pydantic finds wrong with a block of settings, in the four parts of our errors.

Nothing here knows a setting by name: what may stand where is read from the schema.
"""

from collections.abc import Iterator
from difflib import get_close_matches
from typing import Any, get_args, get_origin

from pydantic import BaseModel

from dskd_plugin.errors import SettingError

# By the beginning of pydantic's name of the finding.
TYPES = {"float_": "a number", "int_": "a whole number", "bool_": "true or false", "string_type": "a text"}


def explain(item: Any, root: str, schema: type[BaseModel]) -> SettingError:
    """One finding of pydantic about the block ``root``, which has that schema."""
    kinds = {kind: model for _, model in _blocks(schema) for kind in _kinds(model)}
    path = [str(part) for part in item["loc"]]
    keys = [part for part in path if part not in kinds]
    # A number is a place in a list, or a key of a mapping, of which pydantic says so.
    of_mapping = keys[-1:] == ["[key]"]
    name = root + "".join(f"[{key}]" if key.isdigit() and not of_mapping else f".{key}" for key in keys)
    got = item.get("input")
    if item["type"] == "extra_forbidden":
        known = sorted(_model_at(path[:-1], schema).model_fields)
        return SettingError(
            name,
            f"one of {', '.join(known)}",
            f"the unknown setting '{path[-1]}'",
            _instead(".".join(keys), known, root, schema),
        )
    if item["type"] == "missing":
        return SettingError(name, "a value", "nothing", "Add it to the recipe.")
    if item["type"] in ("union_tag_invalid", "union_tag_not_found"):
        kind = got.get("kind") if isinstance(got, dict) else getattr(got, "kind", None)
        return SettingError(
            f"{name}.kind",
            f"one of {', '.join(kinds)}",
            "nothing" if kind is None else f"{kind!r}",
            _nearest(kind, kinds),
        )
    if item["type"] == "literal_error":
        choices = item["ctx"]["expected"].replace("'", "").replace(" or ", ", ").split(", ")
        return SettingError(name, item["ctx"]["expected"], f"{got!r}", _nearest(got, choices))
    if item["type"] == "value_error":
        found: SettingError = item["ctx"]["error"]  # of a rule between settings, which names them itself
        return found
    if item["type"].startswith("model_"):
        first = next(iter(_model_at(path, schema).model_fields))
        value = "..." if isinstance(got, bool) or got is None else got
        return SettingError(name, "a block of settings", f"{got!r}", f"Write {path[-1]}: {{{first}: {value}}}.")
    expected = next((text for start, text in TYPES.items() if item["type"].startswith(start)), None)
    values = _values(_model_at(path[:-1], schema), path[-1]) if expected == "a text" else None
    if values is not None:
        expected = f"a text ({values})"
    if expected is None:
        expected = item["msg"].removeprefix("Input should be ").removeprefix("a valid ")
    return SettingError(name, expected, f"{got!r}", "Change it in the recipe.")


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """The blocks that a setting of this type may hold."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _models(part)


def _blocks(schema: type[BaseModel]) -> Iterator[tuple[str, type[BaseModel]]]:
    """The blocks inside a block, with the settings that hold them."""
    for key, field in schema.model_fields.items():
        for model in _models(field.annotation):
            yield key, model


def _is_list(schema: type[BaseModel], key: str) -> bool:
    """Whether a setting holds several blocks."""
    annotation = schema.model_fields[key].annotation
    return any(get_origin(part) is list for part in (annotation, *get_args(annotation)))


def _kinds(model: type[BaseModel]) -> tuple[str, ...]:
    """The values of ``kind`` that choose this block among several."""
    field = model.model_fields.get("kind")
    return () if field is None else get_args(field.annotation)


def _model_at(path: list[str], schema: type[BaseModel]) -> type[BaseModel]:
    """The block at a path; one of several is named by its kind, which stands in the path."""
    model = schema
    for key in path:
        for name, inner in _blocks(schema):
            if key in (name, *_kinds(inner)):
                model = inner
                break
    return model


def _values(model: type[BaseModel], key: str) -> str | None:
    field = model.model_fields.get(key)
    extra = None if field is None else field.json_schema_extra  # None: a key of a mapping
    return str(extra["values"]).replace("`", "") if isinstance(extra, dict) and "values" in extra else None


def _plain(text: object) -> str:
    return str(text).casefold().replace("-", "").replace("_", "")


def _nearest(got: object, choices: Any) -> str:
    by_plain = {_plain(choice): choice for choice in choices}
    near = get_close_matches(_plain(got), list(by_plain), n=1)
    return f"Did you mean '{by_plain[near[0]]}'?" if near else "Choose one of them."


def _instead(given: str, known: list[str], root: str, schema: type[BaseModel]) -> str:
    """What to do about a setting that is not known where it stands, at the path ``given``."""
    single = [(block, model) for block, model in _blocks(schema) if not _is_list(schema, block)]
    inner = [(f"{block}.{key}", model) for block, model in single for key in model.model_fields]
    kinds = [kind for place, model in inner if place == given for kind in _kinds(model)]
    if kinds:
        return f"Remove it, or set kind: {' or '.join(kinds)}."
    key = given.rpartition(".")[2]
    near = get_close_matches(key, known, n=1, cutoff=0.8)
    # `model` beside `teacher`, `teacher_model`, and a setting of the whole block inside another one.
    places = [*schema.model_fields, *dict.fromkeys(place for place, _ in inner)]
    same = [place for place in places if key in (place.rpartition(".")[2], place.replace(".", "_"))]
    if same and not near:
        return f"Write it where it belongs: {' or '.join(_written(place, root) for place in same)}."
    near = near or get_close_matches(key, known, n=1, cutoff=0.5)
    return f"Did you mean '{near[0]}'?" if near else "Remove it."


def _written(place: str, root: str) -> str:
    block, _, key = place.rpartition(".")
    return f"{block}: {{{key}: ...}}" if block else f"{key}: ... right below {root}:"
