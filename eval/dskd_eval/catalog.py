"""Tasks and suites: the YAML files of the package and of the user, checked and made ready to run.

A task file is an lm-eval task YAML with a few more keys (data, scorer, metrics, styles, protocols;
docs/eval.md). `load_task` reads one, `plan` settles what depends on the model and the command line: style
(base or chat), protocol, shots, number of samples.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from dskd_eval.data import DataSource, HubSource, Row, content_hash, half_character, joined_surrogates
from dskd_eval.errors import UserError, nearest
from dskd_eval.schema import TaskRecord

TASK_FOLDER = Path(__file__).parent / "tasks"
SUITES = ("instruct", "math", "code")
STYLES = ("base", "chat")
SCORER_METRICS: dict[str, tuple[str, ...]] = {
    "rouge_l": ("rouge_l", "exact_match", "response_words", "rouge_l_unicode"),
    "exact_match": ("exact_match",),
    "contains": ("contains", "exact_match"),
    "number": ("flexible", "strict"),
    "math": ("math_verify", "exact_match", "boxed"),
    "ifeval": ("prompt_strict", "prompt_loose", "instruction_strict", "instruction_loose"),
    "python": ("pass@1", "timeout", "syntax_error"),
}
# What a scorer needs besides packages, whichever task uses it: see `runner.check_needs`.
SCORER_NEEDS: dict[str, tuple[str, ...]] = {"ifeval": ("nltk_punkt",)}
NEEDS = ("nltk_punkt",)
# Scorers that judge without a reference answer: by tests, and by the instructions of the row.
WITHOUT_REFERENCE = ("python", "ifeval")
CODE_PARTS = ("setup", "completes", "entry_point", "tests")
ALIASES = {"prompt": "doc_to_text", "reference": "doc_to_target", "shots": "num_fewshot"}
OWN_KEYS = {
    "task", "extends", "version", "suite", "summary", "scorer", "metrics", "floor", "data", "needs", "styles",
    "protocols", "code", "reference_answer", "shot_target", "stop", "max_new_tokens", *ALIASES,
}  # fmt: skip
LM_EVAL_KEYS = {
    "task_alias", "tag", "custom_dataset", "dataset_path", "dataset_name", "dataset_kwargs", "training_split",
    "validation_split", "test_split", "fewshot_split", "process_docs", "doc_to_text", "doc_to_target",
    "doc_to_choice", "unsafe_code", "process_results", "use_prompt", "description", "target_delimiter",
    "fewshot_delimiter", "fewshot_config", "num_fewshot", "metric_list", "output_type", "generation_kwargs",
    "repeats", "filter_list", "should_decontaminate", "doc_to_decontamination_query", "gen_prefix",
    "metadata",
}  # fmt: skip
STYLE_KEYS = {
    "doc_to_text", "doc_to_target", "reference_answer", "shot_target", "num_fewshot", "generation_kwargs",
    "target_delimiter", "fewshot_delimiter", "description", "style", "seeds", "gen_prefix",
}  # fmt: skip
PASS_AT_K = (1, 5, 10, 25, 50, 100)
LENGTH_ALIASES = ("max_new_tokens", "max_tokens", "max_completion_tokens")


def _is_whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_number(value: Any, least: float, most: float = float("inf")) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and least <= value <= most


def _are_texts(value: Any) -> bool:
    return all(isinstance(item, str) and item for item in (value if isinstance(value, list) else [value]))


def _is_version(value: Any) -> bool:
    return _is_number(value, 0) or (isinstance(value, str) and value.replace(".", "", 1).isdigit())


Kinds = Mapping[str, tuple[str, Callable[[Any], bool]]]
_COUNT = ("a whole number, 1 or more", lambda value: _is_whole(value, 1))
_MAPPING = ("a mapping", lambda value: isinstance(value, dict))
_MAPPINGS = (
    "a list of mappings",
    lambda value: isinstance(value, list) and all(isinstance(item, dict) for item in value),
)
_TEXTS = ("a text or a list of texts, none empty", _are_texts)
KINDS: Kinds = {
    "max_new_tokens": _COUNT,
    "repeats": _COUNT,
    "num_fewshot": ("a whole number, 0 or more", lambda value: _is_whole(value, 0)),
    "version": ("a number", _is_version),
    "suite": ("a name", lambda value: isinstance(value, str)),
    "stop": ("a text or a list of texts, none empty", lambda value: value == [] or _are_texts(value)),
    "metrics": _TEXTS,
    "needs": _TEXTS,
    "metric_list": _MAPPINGS,
    "filter_list": _MAPPINGS,
    **dict.fromkeys(
        ("styles", "protocols", "code", "floor", "generation_kwargs", "dataset_kwargs", "metadata"), _MAPPING
    ),
}
DATA_KINDS: Kinds = {
    "rows": _COUNT,
    "first": _COUNT,
    "select": (
        "columns with the lowest and highest value to keep, {column: [1, 5]}",
        lambda value: (
            isinstance(value, dict) and all(isinstance(ends, list) and len(ends) == 2 for ends in value.values())
        ),
    ),
}
GENERATION_KINDS: Kinds = {
    "until": KINDS["stop"],
    "max_gen_toks": _COUNT,
    "do_sample": ("true or false", lambda value: isinstance(value, bool)),
    "temperature": ("a number, 0 or more", lambda value: _is_number(value, 0)),
    "top_p": ("a number from 0 to 1", lambda value: _is_number(value, 0, 1)),
    "top_k": ("a whole number, 0 or more", lambda value: _is_whole(value, 0)),
    "keep_first_tokens": _COUNT,
}


@dataclass(frozen=True)
class TaskSpec:
    """A task file, read and checked. `native`: scored by lm-eval's own metrics, not by a scorer of ours."""

    name: str
    version: float
    suite: str
    summary: str
    path: Path
    scorer: str | None
    metrics: tuple[str, ...]
    data: Mapping[str, tuple[DataSource, ...]]
    config: Mapping[str, Any]
    styles: Mapping[str, Mapping[str, Any]]
    protocols: Mapping[str, Mapping[str, Any]]
    code: Mapping[str, str]
    needs: tuple[str, ...] = ()
    floor: Mapping[str, Any] = field(default_factory=dict)

    @property
    def native(self) -> bool:
        return self.scorer is None

    @property
    def own(self) -> bool:
        return self.path.parent != TASK_FOLDER

    @property
    def executes_code(self) -> bool:
        return self.scorer == "python"


@dataclass(frozen=True)
class Plan:
    """A task as it will run for one model: every setting that shapes a prompt or an answer."""

    spec: TaskSpec
    style: str
    protocol: str
    config: Mapping[str, Any]
    shots: int
    generation: Mapping[str, Any]
    seeds: tuple[int, ...]
    metrics: tuple[str, ...]

    @property
    def primary(self) -> str:
        return self.metrics[0]

    def record(self) -> TaskRecord:
        return TaskRecord(
            task=self.spec.name,
            version=self.spec.version,
            suite=self.spec.suite,
            summary=self.spec.summary,
            primary_metric=self.primary,
            metrics=list(self.metrics),
            scorer=self.spec.scorer or "lm-eval metrics",
            style=self.style,
            protocol=self.protocol,
            shots=self.shots,
            prompt=_text_of(self.config.get("doc_to_text")),
            generation=dict(self.generation),
            seeds=list(self.seeds),
            floor=dict(self.spec.floor),
        )


def _text_of(template: Any) -> Any:
    return template if isinstance(template, (str, int, type(None))) else getattr(template, "__name__", "function")


@functools.cache
def builtin_tasks() -> Mapping[str, TaskSpec]:
    """The tasks of the package by name, in the order of the suites."""
    specs = [load_task(path) for path in sorted(TASK_FOLDER.glob("*.yaml"))]
    order = ["dolly", "self_instruct", "vicuna", "s_ni", "unni", "ifeval"]
    rank = {name: place for place, name in enumerate(order)}
    specs.sort(key=lambda spec: (SUITES.index(spec.suite), rank.get(spec.name, 99), spec.name))
    return {spec.name: spec for spec in specs}


def select(suites: Iterable[str], tasks: Iterable[str], files: Iterable[str | Path]) -> list[TaskSpec]:
    """Tasks of suites, named tasks and task files, once each. UserError names the nearest known names."""
    known = dict(builtin_tasks())
    chosen: dict[str, TaskSpec] = {}
    for suite in suites:
        if suite not in SUITES:
            raise UserError(
                "--suite", expected="one of " + ", ".join(SUITES), got=repr(suite), fix=nearest(suite, SUITES)
            )
        chosen |= {name: spec for name, spec in known.items() if spec.suite == suite}
    for name in tasks:
        if name not in known:
            raise UserError("--tasks", expected="a task of `dskd-eval list`", got=repr(name), fix=nearest(name, known))
        chosen[name] = known[name]
    for file in files:
        spec = load_task(Path(file).expanduser().resolve())
        if spec.name in chosen:
            raise UserError(
                f"--task-file {file}",
                expected="a task name of its own",
                got=f"{spec.name!r}, which is taken",
                fix="Change `task:` in the file.",
            )
        chosen[spec.name] = spec
    if not chosen:
        raise UserError(
            "--suite",
            expected="at least one suite or task",
            got="none",
            fix="Add --suite instruct,math,code.",
        )
    return list(chosen.values())


def load_task(path: Path) -> TaskSpec:
    """Read and check one task file. Raises UserError with the file, the key and the nearest valid key."""
    raw = _read_yaml(path)
    if extends := raw.pop("extends", None):
        raw = _extended(raw, str(extends), path)
    where = f"task file {path.name}"
    for key in raw:
        if key not in OWN_KEYS | LM_EVAL_KEYS:
            raise UserError(where, expected="known keys", got=repr(key), fix=nearest(str(key), OWN_KEYS | LM_EVAL_KEYS))
    name = raw.get("task")
    if not isinstance(name, str) or not name.replace("_", "").replace("-", "").replace(".", "").isalnum():
        raise UserError(
            where,
            expected="`task:` a name of letters, digits, - and _",
            got=repr(name),
            fix="Add `task: my_task`.",
        )
    _check_kinds(raw, KINDS, where)
    config = {key: value for key, value in raw.items() if key in LM_EVAL_KEYS}
    config |= {ALIASES[key]: value for key, value in raw.items() if key in ALIASES}
    generation = dict(config.get("generation_kwargs") or {})
    if "stop" in raw:
        generation["until"] = raw["stop"] or []
    if "max_new_tokens" in raw:
        generation["max_gen_toks"] = raw["max_new_tokens"]
    if generation:
        config["generation_kwargs"] = _generation(generation, where)
    for key in ("reference_answer", "shot_target"):
        if key in raw:
            config[key] = raw[key]

    scorer: str | None = raw.get("scorer")
    native = scorer is None and any(key in config for key in ("metric_list", "process_results", "doc_to_choice"))
    if not native and (not isinstance(scorer, str) or scorer not in SCORER_METRICS):
        raise UserError(
            f"{where}, `scorer`",
            expected="one of " + ", ".join(SCORER_METRICS) + ", or lm-eval's metric_list",
            got=repr(scorer),
            fix=nearest(str(scorer), SCORER_METRICS) if scorer else "Add `scorer: exact_match` or another.",
        )
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
    data = _data(raw.get("data"), path, where)
    if not data and not config.get("dataset_path") and not config.get("custom_dataset"):
        raise UserError(where, expected="`data:` a file of rows", got="none", fix="Add `data: my.jsonl`.")
    for key in ("doc_to_text", "doc_to_target"):
        styles = raw.get("styles") or {}
        needed = key == "doc_to_text" or scorer not in WITHOUT_REFERENCE
        if needed and key not in config and not all(key in (styles.get(style) or {}) for style in STYLES):
            alias = {value: alias for alias, value in ALIASES.items()}[key]
            raise UserError(where, expected=f"`{key}` (or `{alias}`)", got="none", fix=f"Add `{alias}:`.")
    if scorer == "python" and "tests" not in (raw.get("code") or {}):
        raise UserError(
            where, expected="`code: {tests: ...}`", got="none", fix="Give a template of the tests of a row."
        )
    needs = _listed(raw.get("needs"))
    for need in needs:
        if need not in NEEDS:
            raise UserError(f"{where}, `needs`", expected="known needs", got=repr(need), fix=nearest(str(need), NEEDS))
    metrics = tuple(_listed(raw.get("metrics"))) or _default_metrics(scorer, config)
    known = SCORER_METRICS[scorer] if scorer else metrics
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
        version=float(raw.get("version") or (config.get("metadata") or {}).get("version") or 1),
        suite=str(raw.get("suite") or "own"),
        summary=str(raw.get("summary") or ""),
        path=path,
        scorer=scorer,
        metrics=metrics,
        data=data,
        config=_with_absolute_files(config, path.parent),
        styles=_overrides(raw, "styles", where),
        protocols=_overrides(raw, "protocols", where),
        code=raw.get("code") or {},
        needs=tuple(dict.fromkeys([*needs, *SCORER_NEEDS.get(str(scorer), ())])),
        floor=raw.get("floor") or {},
    )


def _read_yaml(path: Path) -> dict[str, Any]:
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


def _parsed(path: Path) -> Any:
    """A YAML file with lm-eval's `include: FILE` (the file's own keys win) and `!function module.name`."""

    class Loader(yaml.SafeLoader):
        """Finds modules beside this file."""

        def construct_scalar(self, node: Any) -> Any:
            value: Any = super().construct_scalar(node)
            return joined_surrogates(value) if isinstance(value, str) else value

    Loader.add_constructor("!function", lambda loader, node: _function(path.parent, str(node.value)))
    raw = yaml.load(path.read_text(encoding="utf-8"), Loader)
    if not isinstance(raw, dict) or "include" not in raw:
        return raw
    included: dict[str, Any] = {}
    for name in reversed(_listed(raw.pop("include"))):
        included |= _parsed(path.parent / name)
    return included | raw


def _function(folder: Path, name: str) -> Any:
    module_name, _, attribute = name.rpartition(".")
    file = folder.joinpath(*module_name.split(".")).with_suffix(".py")
    spec = importlib.util.spec_from_file_location(module_name, file)
    if spec is None or spec.loader is None:
        raise ImportError(f"no module {file}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, attribute)


def _extended(raw: dict[str, Any], extends: str, path: Path) -> dict[str, Any]:
    known = {file.stem: file for file in TASK_FOLDER.glob("*.yaml")}
    if extends not in known:
        raise UserError(
            f"task file {path.name}, `extends`",
            expected="a task of the package",
            got=repr(extends),
            fix=nearest(extends, known),
        )
    base: dict[str, Any] = yaml.safe_load(known[extends].read_text(encoding="utf-8"))
    data = base.pop("data")
    base.pop("floor", None)
    own = raw.get("data")
    if own is None:
        raw = {**raw, "data": data}
    elif isinstance(own, dict) and "shots" not in own and "shots" in data and "file" not in own:
        raw = {**raw, "data": {**own, "shots": data["shots"]}}
    elif not isinstance(own, dict) and "shots" in data:
        raw = {**raw, "data": {"test": own, "shots": data["shots"]}}
    styled = {ALIASES.get(key, key) for key in raw} & STYLE_KEYS
    if "stop" in raw or "max_new_tokens" in raw:
        styled.add("generation_kwargs")
    for style in (base.get("styles") or {}).values():
        for key in styled:
            style.pop(key, None)
    if not raw.get("suite"):
        base.pop("suite", None)
    return {**base, **raw}


def _check_kinds(block: Mapping[str, Any], kinds: Kinds, where: str) -> None:
    for key, value in block.items():
        expected, fits = kinds.get(ALIASES.get(key, key), ("", None))
        if fits is not None and value is not None and not fits(value):
            raise UserError(f"{where}, `{key}`", expected=expected, got=repr(value), fix="Correct the value.")


def _generation(raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    """generation_kwargs under lm-eval's canonical names; a temperature alone asks for sampling, as there."""
    where = f"{where}, `generation_kwargs`"
    found = {"max_gen_toks" if key in LENGTH_ALIASES else key: value for key, value in raw.items()}
    for key in found:
        if key not in GENERATION_KINDS:
            raise UserError(where, expected="known settings", got=repr(key), fix=nearest(str(key), GENERATION_KINDS))
    _check_kinds(found, GENERATION_KINDS, where)
    found = {key: value for key, value in found.items() if value is not None}
    if "until" in found:
        found["until"] = _listed(found["until"])
    if "temperature" in found and "do_sample" not in found:
        found["do_sample"] = found["temperature"] > 0
    return found


def _listed(value: Any) -> list[Any]:
    return list(value or ()) if not isinstance(value, str) else [value]


def _overrides(raw: Mapping[str, Any], group: str, where: str) -> dict[str, dict[str, Any]]:
    """The blocks of `styles` or `protocols`, checked."""
    blocks = {}
    for name, block in (raw.get(group) or {}).items():
        place = f"{where}, `{group}.{name}`"
        if group == "styles" and name not in STYLES:
            raise UserError(
                f"{where}, `{group}`", expected=" or ".join(STYLES), got=repr(name), fix=nearest(str(name), STYLES)
            )
        if not isinstance(block, dict):
            raise UserError(place, expected="a mapping", got=repr(block), fix="Correct the value.")
        for key in block:
            if key not in STYLE_KEYS:
                raise UserError(
                    place, expected="a key that shapes prompts", got=repr(key), fix=nearest(str(key), STYLE_KEYS)
                )
        _check_kinds(block, KINDS, place)
        generation = block.get("generation_kwargs")
        blocks[name] = block | ({"generation_kwargs": _generation(generation, place)} if generation else {})
    return blocks


def _default_metrics(scorer: str | None, config: Mapping[str, Any]) -> tuple[str, ...]:
    if scorer is not None:
        return SCORER_METRICS[scorer]
    listed = [entry["metric"] for entry in config.get("metric_list") or [] if "metric" in entry]
    return tuple(str(getattr(metric, "__name__", metric)) for metric in listed) or ("acc",)


def _data(raw: Any, path: Path, where: str) -> dict[str, tuple[DataSource, ...]]:
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
    return {
        split: tuple(_source(item, path, where) for item in (value if isinstance(value, list) else [value]))
        for split, value in splits.items()
    }


def _source(item: Any, path: Path, where: str) -> DataSource:
    entry: Any = {"file": item} if isinstance(item, str) else item
    if not isinstance(entry, dict) or not isinstance(entry.get("file"), str):
        raise UserError(
            f"{where}, `data`",
            expected="a file name or {file: ...}",
            got=repr(item),
            fix="Write `data: my.jsonl`.",
        )
    entry = dict[str, Any](entry)
    _check_kinds(entry, DATA_KINDS, f"{where}, `data`")
    unknown = set(entry) - set(DataSource.__dataclass_fields__)
    if unknown:
        name = sorted(unknown)[0]
        raise UserError(
            f"{where}, `data`",
            expected="known keys",
            got=repr(name),
            fix=nearest(name, DataSource.__dataclass_fields__),
        )
    if path.parent != TASK_FOLDER and "hub" not in entry:
        beside, here = path.parent / Path(entry["file"]).expanduser(), Path(entry["file"])
        entry["file"] = str((here if here.is_file() and not beside.is_file() else beside).resolve())
    if "hub" in entry:
        entry["hub"] = HubSource(**entry["hub"])
    return DataSource(**entry)


def _with_absolute_files(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Paths of lm-eval's `dataset_kwargs` are relative to the task file, not to the working directory."""
    kwargs = config.get("dataset_kwargs")
    if not isinstance(kwargs, dict):
        return config

    def absolute(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: absolute(item) for key, item in value.items()}
        if isinstance(value, list):
            return [absolute(item) for item in value]
        if isinstance(value, str) and (folder / value).exists():
            return str((folder / value).resolve())
        return value

    located = {key: absolute(value) if key in ("data_files", "data_dir") else value for key, value in kwargs.items()}
    return {**config, "dataset_kwargs": located}


def plan(
    spec: TaskSpec,
    *,
    chat: bool,
    protocol: str = "default",
    num_fewshot: int | None = None,
    samples: int = 1,
    temperature: float | None = None,
    seed: int = 0,
    max_new_tokens: int | None = None,
) -> Plan:
    """Settle a task for one model.

    chat: whether the chat template is used. protocol: 'default', or a published one; a task without it runs
    its default. samples: answers per prompt of tasks that execute code (pass@k); above 1 they are sampled.
    max_new_tokens: the limit of an answer in place of the task's.
    """
    published = spec.protocols.get(protocol) if protocol != "default" else None
    style = "chat" if chat else "base"
    overrides: dict[str, Any] = {}
    if published is not None:
        style = str(published.get("style", style))
        overrides = {key: value for key, value in published.items() if key not in ("style", "seeds")}
    config = {**spec.config, **spec.styles.get(style, {}), **overrides}
    merged = dict(spec.config.get("generation_kwargs") or {})
    merged |= dict(spec.styles.get(style, {}).get("generation_kwargs") or {})
    generation = {"until": [], "max_gen_toks": 256, "do_sample": False} | merged
    generation |= dict(overrides.get("generation_kwargs") or {})
    if max_new_tokens is not None:
        generation["max_gen_toks"] = max_new_tokens
    seeds: tuple[int, ...] = (seed,)
    if published is not None:
        seeds = tuple(published.get("seeds") or seeds)
    metrics = spec.metrics
    if spec.executes_code and samples > 1:
        seeds = tuple(seed + index for index in range(samples))
        sampled = 0.8 if temperature is None else temperature
        generation |= {"do_sample": True, "temperature": sampled, "top_p": 0.95, "top_k": 0}
        extra = [f"pass@{k}" for k in sorted({*PASS_AT_K, samples}) if 1 < k <= samples]
        metrics = (metrics[0], *extra, *metrics[1:])
    shots = int(config.get("num_fewshot") or 0)
    if num_fewshot is not None and takes_shots(spec):
        shots = num_fewshot
    return Plan(
        spec=spec,
        style=style,
        protocol=protocol if published is not None else "default",
        config=config | {"num_fewshot": shots, "generation_kwargs": generation},
        shots=shots,
        generation=generation,
        seeds=seeds,
        metrics=metrics,
    )


def takes_shots(spec: TaskSpec) -> bool:
    """Whether the task has rows to take few-shot examples from."""
    return "shots" in spec.data or bool(spec.config.get("fewshot_split") or spec.config.get("fewshot_config"))


def render(template: Any, row: Row) -> str:
    """A template filled with a row: a field name, a Jinja template or a function of the row."""
    if not isinstance(template, str):
        return str(_called(template, row))
    if template in row:
        return str(row[template])
    check_literal(template, row)
    return _template(template, row)


def render_text(template: Any, row: Row) -> str:
    """As `render`, for a text that answers are compared with. Raises UserError when Python would have to print a
    list, a mapping or None for it.
    """
    if (value := printed_value(template, row)) is not None:
        raise _printed(template, value)
    return render(template, row)


def _called(template: Any, row: Row) -> Any:
    """The value of a function of the task file, or a constant."""
    if not callable(template):
        return template
    try:
        return template(row)
    except UserError:
        raise
    except Exception as error:
        name = getattr(template, "__name__", "function")
        got = f"{type(error).__name__}: {str(error)[:200]}"
        raise UserError(f"!function {name}", expected="a value for every row", got=got, fix="Correct it.") from error


# Jinja's paths to a part of a field: q.text, answers[0], answer | trim.
_PATH = re.compile(r"([^\W\d]\w*)(?:\s*(?:\.\s*\w+|\[[^\[\]]*\]))+(?:\s*\|.*)?")
_FILTERED = re.compile(r"([^\W\d]\w*)\s*\|.*")
# What Python prints for an object that has no text of its own.
_OBJECT = re.compile(
    r"<(?:(?:built-in|bound|class|function|generator|method|module|Macro)\b|[\w.]+ object\b).*>", re.DOTALL
)
METHOD_NAMES = "Where a field has the name of a method, write {{ q['items'] }} for {{ q.items }}"
# {name} of Python's format strings; not the argument of a LaTeX command, a power or an index.
_SINGLE_BRACES = re.compile(r"(\\[A-Za-z]+\s*|[_^])?(?<!\{)\{\s*([^\W\d]\w*)\s*(?:[.\[|:!][^{}]*)?\}(?!\})")


def printed_object(text: str, row: Row) -> str | None:
    """What a prompt of lm-eval's own templates shows of an object of Python, unless the row holds that text itself."""
    found = re.search(r"<(?:built-in|bound) method [^<>\n]*>|<[\w. ]+ object[^<>\n]* at 0x[0-9a-f]+>", text)
    return found[0] if found and found[0] not in str(row) else None


def check_literal(template: str, row: Row) -> None:
    """Raises UserError for a text without Jinja's braces that can only be meant as a field: it would stand in every
    prompt, or be every reference, letter by letter.
    """
    if "{{" in template or "{%" in template:
        return
    name = template.strip()
    constant = f"A constant text is written {{{{ {template!r} }}}}."
    if name.isidentifier():
        hint = f"Write `{name}` without white space." if name in row else nearest(name, row)
        raise UserError(
            f"field {template!r}",
            expected="a field of the row: " + ", ".join(sorted(row)),
            got="none of that name",
            fix=f"{hint} {constant}",
        )
    filtered = _FILTERED.fullmatch(name)
    if _PATH.fullmatch(name) or (filtered and filtered[1] in row):
        raise UserError(
            f"template {template!r}",
            expected="a field of the row, or a template with {{ }}",
            got="a path without braces, which is a constant text",
            fix=f"Write {{{{ {name} }}}}. {constant}",
        )
    if found := single_braces(template, row):
        raise UserError(
            f"template {template[:80]!r}",
            expected="Jinja's double braces around a field",
            got=f"single braces, {found}, which stay as they are in every row",
            fix=f"Write {{{found}}}. {constant}",
        )


def single_braces(template: str, row: Row) -> str | None:
    """The first {field} with single braces, which is no part of LaTeX; None: there is none."""
    names = {name.casefold() for name in row}
    for found in _SINGLE_BRACES.finditer(template):
        if not found[1] and found[2].casefold() in names:
            return found[0]
    return None


def references(template: Any, row: Row) -> list[str]:
    """Accepted answers of a row; a field or function may hold a list. Raises UserError when there is none.

    A task without a template (programs that only have to pass tests) has no reference answers.
    """
    if template is None:
        return []
    if isinstance(template, str) and template not in row:
        return [render_text(template, row)]
    value = row[template] if isinstance(template, str) else _called(template, row)
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    if not values or any(_is_missing(item) for item in values):
        raise UserError(
            f"reference {template if isinstance(template, str) else 'function'!r}",
            expected="a reference answer in every row",
            got=repr(value),
            fix="Correct or remove the row.",
        )
    for item in values:
        if _has_parts(item):
            raise _printed(template, item)
    return [str(item) for item in values]


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _has_parts(value: Any) -> bool:
    return isinstance(value, (list, tuple, dict, set))


def _printed(template: Any, value: Any) -> UserError:
    shown = f"template {template[:80]!r}" if isinstance(template, str) else "function"
    return UserError(
        shown,
        expected="texts or numbers",
        got=f"a {type(value).__name__}, which Python would print as {str(value)[:80]!r}",
        fix="Name the part that is meant, as in {{ answers[0] }} or {{ answers | join(', ') }}; `reference: answers` "
        "accepts every text of a list.",
    )


class _PrintedValue(Exception):
    """A template came to a value that is neither a text nor a number."""

    def __init__(self, value: Any) -> None:
        self.value = value


def printed_value(template: Any, row: Row) -> Any:
    """What Python would have to print for a template: a list, a mapping, or 'None' for a missing value; else None."""
    if isinstance(template, str) and template not in row:
        try:
            _template(template, row, texts=True)
        except _PrintedValue as found:
            return found.value
        return None
    value = row[template] if isinstance(template, str) else _called(template, row)
    return str(value) if _is_missing(value) else value if _has_parts(value) else None


def _no_object(value: Any) -> Any:
    """Raises UserError for a value that prints as `<built-in method ...>` or alike: `{{ q.items }}` of a mapping."""
    import jinja2

    if not isinstance(value, (str, jinja2.Undefined)) and _OBJECT.fullmatch(text := str(value)):
        raise UserError(
            "template",
            expected="texts or numbers",
            got=f"{text[:80]!r}: it prints a method or another object of Python",
            fix=f"{METHOD_NAMES}; call a method with (); end a generator with | list or | join.",
        )
    return value


def _finalized(value: Any) -> Any:
    _no_object(value)
    if _is_missing(value) or _has_parts(value):
        raise _PrintedValue(str(value) if _is_missing(value) else value)
    return value


@functools.cache
def _environment(texts: bool) -> Any:
    import jinja2

    return jinja2.Environment(
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        autoescape=False,
        finalize=_finalized if texts else _no_object,
    )


@functools.cache
def _compiled(template: str, texts: bool) -> Any:
    return _environment(texts).from_string(template)


def _template(template: str, row: Row, *, texts: bool = False) -> str:
    """texts: raise _PrintedValue for a value that is neither a text nor a number."""
    import jinja2

    try:
        return str(_compiled(template, texts).render(**row))
    except (_PrintedValue, UserError):
        raise
    except Exception as error:
        if not isinstance(error, (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError)):
            raise
        raise UserError(
            f"template {template[:80]!r}",
            expected="only fields of the rows: " + ", ".join(sorted(row)),
            got=str(error),
            fix="Correct the template or the data file.",
        ) from error


def code_parts(spec: TaskSpec, row: Row) -> dict[str, str]:
    """The `code:` block of a row: setup, completes, entry_point, tests ('' where absent), each a field or a template.

    A list in a template stands as Python writes it: `assert f({{arguments}})`. A part without a value is empty.
    """
    parts = {}
    for key in CODE_PARTS:
        template = str(spec.code.get(key) or "")
        if template and template not in row:
            _check_program(key, template, row)
        text = str(row[template]) if template in row else _template(template, row)
        parts[key] = "" if text.strip() in ("None", "nan") else text
    return parts


def _check_program(key: str, template: str, row: Row) -> None:
    """As `check_literal`, for a part of a program: the name of a function may be the same for all rows, and helper
    code may hold the braces of sets and format strings.
    """
    constant_name = key == "entry_point" and template.isidentifier()
    helpers = key == "setup" and single_braces(template, row)
    if not constant_name and not helpers:
        check_literal(template, row)


def digest(plan_: Plan) -> str:
    """Hash of everything in a plan that shapes prompts, answers and scores."""
    facts = plan_.record().plain() | {"config": {key: repr(value) for key, value in plan_.config.items()}}
    facts |= {"code": dict(plan_.spec.code)}
    return content_hash(_without_addresses(facts))


def _without_addresses(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_addresses(item) for key, item in value.items()}
    return re.sub(r" at 0x[0-9a-f]+", "", value) if isinstance(value, str) else value
