"""A task file made into a `TaskSpec`, with every key checked before anything runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import cast

from dskd_eval.data import DataSource, HubSource
from dskd_eval.errors import UserError, nearest
from dskd_eval.scorers.base import Scorer
from dskd_eval.scorers.registry import SCORERS
from dskd_eval.scorers.requirements import REQUIREMENTS
from dskd_eval.tasks.spec import (
    ALIASES,
    LENGTH_ALIASES,
    LM_EVAL_KEYS,
    OWN_TEMPLATES,
    STYLES,
    TASK_FOLDER,
    Block,
    DataKeys,
    GenerationKeys,
    GenerationKwargs,
    StyleKeys,
    TaskFile,
    TaskSpec,
    block_of,
    check_kinds,
)
from dskd_eval.tasks.yaml_file import listed, read_task


def load_task(path: Path) -> TaskSpec:
    """Read and check one task file. Raises UserError with the file, the key and the nearest valid key."""
    raw = read_task(path)
    where = f"task file {path.name}"
    for key in raw:
        if key not in TaskFile.model_fields:
            raise UserError(where, expected="known keys", got=repr(key), fix=nearest(str(key), TaskFile.model_fields))
    name = raw.get("task")
    if not isinstance(name, str) or not name.replace("_", "").replace("-", "").replace(".", "").isalnum():
        raise UserError(
            where,
            expected="`task:` a name of letters, digits, - and _",
            got=repr(name),
            fix="Add `task: my_task`.",
        )
    check_kinds(TaskFile, raw, where)
    config = _config(raw, where)
    scorer = _scorer(raw, config, where)
    facts = SCORERS[scorer] if scorer is not None else None
    data = _data(raw.get("data"), path, where)
    if not data and not config.get("dataset_path") and not config.get("custom_dataset"):
        raise UserError(where, expected="`data:` a file of rows", got="none", fix="Add `data: my.jsonl`.")
    _check_templates(raw, config, facts, where)
    needs = [str(need) for need in listed(raw.get("needs"))]
    for need in needs:
        if need not in REQUIREMENTS:
            raise UserError(
                f"{where}, `needs`", expected="known needs", got=repr(need), fix=nearest(need, REQUIREMENTS)
            )
    metrics = tuple(str(metric) for metric in listed(raw.get("metrics"))) or _default_metrics(scorer, config)
    known = tuple(facts.metrics) if facts else metrics
    for metric in metrics:
        if metric not in known:
            raise UserError(
                f"{where}, `metrics`",
                expected=f"metrics of `scorer: {scorer}`",
                got=repr(metric),
                fix=nearest(metric, known),
            )
    return TaskSpec(
        name=name,
        version=float(str(raw.get("version") or block_of(config, "metadata").get("version") or 1)),
        suite=str(raw.get("suite") or "own"),
        summary=str(raw.get("summary") or ""),
        path=path,
        scorer=scorer,
        metrics=metrics,
        data=data,
        config=_with_absolute_files(config, path.parent),
        styles=_overrides(raw, "styles", where),
        protocols=_overrides(raw, "protocols", where),
        code=block_of(raw, "code"),
        needs=tuple(dict.fromkeys([*needs, *(facts.needs if facts else ())])),
        floor=block_of(raw, "floor"),
    )


def _config(raw: Mapping[str, object], where: str) -> Block:
    """What lm-eval is told of the task, under its own names."""
    config = {key: value for key, value in raw.items() if key in LM_EVAL_KEYS}
    config |= {ALIASES[key]: value for key, value in raw.items() if key in ALIASES}
    generation = dict(block_of(config, "generation_kwargs"))
    if "stop" in raw:
        generation["until"] = raw["stop"] or []
    if "max_new_tokens" in raw:
        generation["max_gen_toks"] = raw["max_new_tokens"]
    if generation:
        config["generation_kwargs"] = _generation(generation, where)
    for key in OWN_TEMPLATES:
        if key in raw:
            config[key] = raw[key]
    return config


def _scorer(raw: Mapping[str, object], config: Mapping[str, object], where: str) -> str | None:
    """The name of the scorer, None where lm-eval's own metrics score the task."""
    scorer = raw.get("scorer")
    native = scorer is None and any(key in config for key in ("metric_list", "process_results", "doc_to_choice"))
    if not (native or (isinstance(scorer, str) and scorer in SCORERS)):
        raise UserError(
            f"{where}, `scorer`",
            expected="one of " + ", ".join(SCORERS) + ", or lm-eval's metric_list",
            got=repr(scorer),
            fix=nearest(str(scorer), SCORERS) if scorer else "Add `scorer: exact_match` or another.",
        )
    scorer = None if scorer is None else str(scorer)
    for key in ("metric_list", "process_results", "filter_list", "doc_to_choice", "repeats"):
        if scorer is not None and key in config:
            raise UserError(
                f"{where}, `{key}`",
                expected="either `scorer` or lm-eval's own metrics",
                got=f"both `scorer: {scorer}` and `{key}`",
                fix="Leave one of them out.",
            )
    if scorer is not None and config.get("output_type", "generate_until") != "generate_until":
        raise UserError(
            f"{where}, `output_type`",
            expected=f"generate_until with `scorer: {scorer}`",
            got=repr(config["output_type"]),
            fix="Leave out `scorer` and give lm-eval's metric_list, or leave out `output_type`.",
        )
    return scorer


def _check_templates(
    raw: Mapping[str, object], config: Mapping[str, object], facts: type[Scorer] | None, where: str
) -> None:
    """That prompts, references and parts of programs have templates. facts: the scorer, None for lm-eval's metrics."""
    for key in ("doc_to_text", "doc_to_target"):
        styles = block_of(raw, "styles")
        needed = key == "doc_to_text" or facts is None or facts.needs_reference
        if needed and key not in config and not all(key in block_of(styles, style) for style in STYLES):
            alias = {value: alias for alias, value in ALIASES.items()}[key]
            raise UserError(where, expected=f"`{key}` (or `{alias}`)", got="none", fix=f"Add `{alias}:`.")
    for part in facts.required_code if facts else ():
        if part not in block_of(raw, "code"):
            fix = f"Give a template of the {part} of a row."
            raise UserError(where, expected=f"`code: {{{part}: ...}}`", got="none", fix=fix)


def _generation(raw: Mapping[str, object], where: str) -> GenerationKwargs:
    """generation_kwargs under lm-eval's canonical names; a temperature alone asks for sampling, as there."""
    where = f"{where}, `generation_kwargs`"
    found = {"max_gen_toks" if key in LENGTH_ALIASES else key: value for key, value in raw.items()}
    for key in found:
        if key not in GenerationKeys.model_fields:
            raise UserError(
                where, expected="known settings", got=repr(key), fix=nearest(str(key), GenerationKeys.model_fields)
            )
    check_kinds(GenerationKeys, found, where)
    found = {key: value for key, value in found.items() if value is not None}
    if "until" in found:
        found["until"] = listed(found["until"])
    checked = cast(GenerationKwargs, found)
    if "temperature" in checked and "do_sample" not in checked:
        checked["do_sample"] = checked["temperature"] > 0
    return checked


def _overrides(raw: Mapping[str, object], group: str, where: str) -> dict[str, Block]:
    """The blocks of `styles` or `protocols`, checked."""
    blocks: dict[str, Block] = {}
    for name, block in block_of(raw, group).items():
        place = f"{where}, `{group}.{name}`"
        if group == "styles" and name not in STYLES:
            raise UserError(
                f"{where}, `{group}`", expected=" or ".join(STYLES), got=repr(name), fix=nearest(str(name), STYLES)
            )
        if not isinstance(block, dict):
            raise UserError(place, expected="a mapping", got=repr(block), fix="Correct the value.")
        for key in block:
            if key not in StyleKeys.model_fields:
                raise UserError(
                    place,
                    expected="a key that shapes prompts",
                    got=repr(key),
                    fix=nearest(str(key), StyleKeys.model_fields),
                )
        check_kinds(StyleKeys, block, place)
        blocks[name] = block
        if generation := block_of(block, "generation_kwargs"):
            blocks[name] = {**block, "generation_kwargs": _generation(generation, place)}
    return blocks


def _default_metrics(scorer: str | None, config: Mapping[str, object]) -> tuple[str, ...]:
    if scorer is not None:
        return tuple(SCORERS[scorer].metrics)
    entries = [entry for entry in listed(config.get("metric_list")) if isinstance(entry, dict) and "metric" in entry]
    return tuple(str(getattr(entry["metric"], "__name__", entry["metric"])) for entry in entries) or ("acc",)


def _data(raw: object, path: Path, where: str) -> dict[str, tuple[DataSource, ...]]:
    if raw is None:
        return {}
    splits = raw if isinstance(raw, dict) and "file" not in raw else {"test": raw}
    for split in splits:
        if split not in ("test", "shots"):
            raise UserError(
                f"{where}, `data`",
                expected="test, shots or a file",
                got=repr(split),
                fix="Name the file under test.",
            )
    data = {}
    for split, value in splits.items():
        # Of several files the first that exists is taken.
        alternatives = value if isinstance(value, list) else [value]
        data[split] = tuple(_source(item, path, where) for item in alternatives)
    return data


def _source(item: object, path: Path, where: str) -> DataSource:
    entry: object = {"file": item} if isinstance(item, str) else item
    if not isinstance(entry, dict) or not isinstance(entry.get("file"), str):
        raise UserError(
            f"{where}, `data`",
            expected="a file name or {file: ...}",
            got=repr(item),
            fix="Write `data: my.jsonl`.",
        )
    check_kinds(DataKeys, entry, f"{where}, `data`")
    unknown = set(entry) - DataKeys.model_fields.keys()
    if unknown:
        name = sorted(unknown)[0]
        raise UserError(
            f"{where}, `data`",
            expected="known keys",
            got=repr(name),
            fix=nearest(name, DataKeys.model_fields),
        )
    file, hub = str(entry["file"]), entry.get("hub")
    if path.parent != TASK_FOLDER and hub is None:
        # A file beside the task wins over one in the working directory, where lm-eval would look.
        beside, here = path.parent / Path(file).expanduser(), Path(file)
        file = str((here if here.is_file() and not beside.is_file() else beside).resolve())
    facts = {key: value for key, value in entry.items() if key not in ("file", "hub")}
    return DataSource(file=file, hub=None if hub is None else HubSource(**hub), **facts)


def _with_absolute_files(config: Block, folder: Path) -> Block:
    """Paths of lm-eval's `dataset_kwargs` are relative to the task file, not to the working directory."""
    kwargs = config.get("dataset_kwargs")
    if not isinstance(kwargs, dict):
        return config

    def absolute(value: object) -> object:
        if isinstance(value, dict):
            return {key: absolute(item) for key, item in value.items()}
        if isinstance(value, list):
            return [absolute(item) for item in value]
        if isinstance(value, str) and (folder / value).exists():
            return str((folder / value).resolve())
        return value

    located = {key: absolute(value) if key in ("data_files", "data_dir") else value for key, value in kwargs.items()}
    return {**config, "dataset_kwargs": located}
