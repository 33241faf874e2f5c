"""Task files as mappings: YAML with lm-eval's `include` and `!function`, and `extends` of this evaluator."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import yaml

from dskd_eval.data import half_character, joined_surrogates
from dskd_eval.errors import UserError, nearest
from dskd_eval.tasks.spec import ALIASES, TASK_FOLDER, Block, StyleKeys, block_of


def read_task(path: Path) -> Block:
    """The keys of a task file, those of the task that it extends among them."""
    return _extended(read_mapping(path), path, ())


def read_mapping(path: Path) -> Block:
    where = f"task file {path}"
    try:
        raw = _parsed(path)
    except Exception as error:
        problem = " ".join(str(error).split())[:300]
        unreadable = isinstance(error, (OSError, UnicodeDecodeError))
        expected, fix = ("a readable file", "Check the path.") if unreadable else ("a YAML task", "Correct the file.")
        raise UserError(where, expected=expected, got=problem, fix=fix) from error
    if not isinstance(raw, dict):
        raise UserError(where, expected="a mapping of keys", got=type(raw).__name__, fix="Start with `task: my_task`.")
    if half := half_character(raw):
        raise UserError(where, expected="texts of whole characters", got=half, fix="Correct the text.")
    return raw


def _parsed(path: Path) -> object:
    """A YAML file with lm-eval's `include: FILE` (the file's own keys win) and `!function module.name`."""

    class Loader(yaml.SafeLoader):
        """Finds modules beside this file."""

        def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> str:
            return joined_surrogates(super().construct_scalar(node))

    Loader.add_constructor("!function", lambda loader, node: _function(path.parent, str(node.value)))
    raw: object = yaml.load(path.read_text(encoding="utf-8"), Loader)
    if not isinstance(raw, dict) or "include" not in raw:
        return raw
    included: Block = {}
    for name in reversed(listed(raw.pop("include"))):
        part = _parsed(path.parent / str(name))
        if not isinstance(part, dict):
            raise TypeError(f"{name}: a {type(part).__name__}, not a mapping")
        included |= part
    return included | raw


def _function(folder: Path, name: str) -> object:
    module_name, _, attribute = name.rpartition(".")
    file = folder.joinpath(*module_name.split(".")).with_suffix(".py")
    spec = importlib.util.spec_from_file_location(module_name, file)
    if spec is None or spec.loader is None:
        raise ImportError(f"no module {file}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found: object = getattr(module, attribute)
    return found


def _extended(raw: Block, path: Path, through: tuple[Path, ...]) -> Block:
    """The mapping with what it takes over from the task that `extends` names; through: the files that extend it."""
    name = raw.pop("extends", None)
    if not name:
        return raw
    place = _extendable(str(name), path)
    chain = (*through, path)
    if place in chain:
        raise UserError(
            f"task file {path.name}, `extends`",
            expected="a task that does not extend this one",
            got=" extends ".join(file.stem for file in (*chain[chain.index(place) :], place)),
            fix="Leave out one of them.",
        )
    return _taken_over(_extended(read_mapping(place), place, chain), raw)


def _extendable(name: str, path: Path) -> Path:
    """The file of a task that may be extended: of the package, else beside the file."""
    beside = {file.stem: file for file in sorted(path.parent.glob("*.yaml"))}
    # The package wins: a file of one's own named dolly.yaml extends the package's dolly.
    known = beside | {file.stem: file for file in sorted(TASK_FOLDER.glob("*.yaml"))}
    if name not in known:
        raise UserError(
            f"task file {path.name}, `extends`",
            expected="a task of the package, or a task file beside this one",
            got=repr(name),
            fix=nearest(name, known),
        )
    return known[name]


def _taken_over(base: Block, raw: Block) -> Block:
    """The keys of a base with those of the file that extends it in their place."""
    # What was measured of the base, and where it belongs, does not hold for another task.
    base.pop("floor", None)
    base.pop("suite", None)
    data, own = base.pop("data", None), raw.get("data")
    shots = data.get("shots") if isinstance(data, dict) else None
    if own is None:
        raw = {**raw, "data": data}
    elif shots is not None and not isinstance(own, dict):
        raw = {**raw, "data": {"test": own, "shots": shots}}
    elif shots is not None and isinstance(own, dict) and "shots" not in own and "file" not in own:
        raw = {**raw, "data": {**own, "shots": shots}}
    # A short name stands for the long one, so either takes the place of both.
    long_names = {ALIASES.get(key, key) for key in raw}
    base = {key: value for key, value in base.items() if ALIASES.get(key, key) not in long_names}
    # A key of the whole task holds for both styles, also where the base sets it for one.
    styled = long_names & StyleKeys.model_fields.keys()
    if "stop" in raw or "max_new_tokens" in raw:
        styled.add("generation_kwargs")
    for style in block_of(base, "styles").values():
        if isinstance(style, dict):
            for key in styled:
                style.pop(key, None)
    return {**base, **raw}


def listed(value: object) -> list[object]:
    """A list as it is, nothing as an empty one, all else as a list of one."""
    return list(value) if isinstance(value, (list, tuple)) else [value] if value else []
