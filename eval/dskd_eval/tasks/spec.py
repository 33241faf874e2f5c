"""What a task file may say: its keys with the kinds of their values, and the task that is made of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, TypedDict

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError
from pydantic_core import PydanticCustomError

from dskd_eval.data import DataSource
from dskd_eval.errors import UserError
from dskd_eval.scorers.registry import SCORERS

TASK_FOLDER = Path(__file__).parent
SUITES = ("instruct", "math", "code")
STYLES = ("base", "chat")
CODE_PARTS = ("setup", "completes", "entry_point", "tests")
ALIASES = {"prompt": "doc_to_text", "reference": "doc_to_target", "shots": "num_fewshot"}
LENGTH_ALIASES = ("max_new_tokens", "max_tokens", "max_completion_tokens")


def _kind(expected: str, fits: Callable[[object], bool]) -> BeforeValidator:
    """A check of a value as it stands in the file; `expected` is what the message says."""

    def check(value: object) -> object:
        if value is not None and not fits(value):
            raise PydanticCustomError("kind", "{expected}", {"expected": expected})
        return value

    return BeforeValidator(check)


def _is_whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_number(value: object, least: float, most: float = float("inf")) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and least <= value <= most


def _are_texts(value: object) -> bool:
    return all(isinstance(item, str) and item for item in (value if isinstance(value, list) else [value]))


def _is_version(value: object) -> bool:
    return _is_number(value, 0) or (isinstance(value, str) and value.replace(".", "", 1).isdigit())


def _are_mappings(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


def _are_ranges(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(ends, list) and len(ends) == 2 for ends in value.values())


# YAML holds what a user wrote, and functions of `!function`; the kinds say what fits.
Value = object
Block = dict[str, object]
Count = Annotated[Value, _kind("a whole number, 1 or more", lambda value: _is_whole(value, 1))]
Natural = Annotated[Value, _kind("a whole number, 0 or more", lambda value: _is_whole(value, 0))]
Mappable = Annotated[Value, _kind("a mapping", lambda value: isinstance(value, dict))]
Blocks = Annotated[Value, _kind("a list of mappings", _are_mappings)]
Texts = Annotated[Value, _kind("a text or a list of texts, none empty", _are_texts)]
Stops = Annotated[Value, _kind("a text or a list of texts, none empty", lambda value: value == [] or _are_texts(value))]


class Keys(BaseModel):
    """The keys of a block of YAML. Unknown ones are told by `check_known`, which knows the nearest."""

    model_config = ConfigDict(extra="ignore", protected_namespaces=())


class PromptKeys(Keys):
    """What shapes prompts and answers, of a whole task or of one style."""

    doc_to_text: Value = None
    doc_to_target: Value = None
    reference_answer: Value = None
    shot_target: Value = None
    num_fewshot: Natural = None
    generation_kwargs: Mappable = None
    target_delimiter: Value = None
    fewshot_delimiter: Value = None
    description: Value = None
    gen_prefix: Value = None


class StyleKeys(PromptKeys):
    """A block of `styles` or `protocols`."""

    style: Value = None
    seeds: Value = None


class LmEvalKeys(PromptKeys):
    """Keys that lm-eval reads."""

    task_alias: Value = None
    tag: Value = None
    custom_dataset: Value = None
    dataset_path: Value = None
    dataset_name: Value = None
    dataset_kwargs: Mappable = None
    training_split: Value = None
    validation_split: Value = None
    test_split: Value = None
    fewshot_split: Value = None
    process_docs: Value = None
    doc_to_choice: Value = None
    unsafe_code: Value = None
    process_results: Value = None
    use_prompt: Value = None
    fewshot_config: Value = None
    metric_list: Blocks = None
    output_type: Value = None
    repeats: Count = None
    filter_list: Blocks = None
    should_decontaminate: Value = None
    doc_to_decontamination_query: Value = None
    metadata: Mappable = None


class TaskFile(LmEvalKeys):
    """A whole task file: lm-eval's keys, those of this evaluator, and short names of some."""

    task: Value = None
    extends: Value = None
    version: Annotated[Value, _kind("a number", _is_version)] = None
    suite: Annotated[Value, _kind("a name", lambda value: isinstance(value, str))] = None
    summary: Value = None
    scorer: Value = None
    metrics: Texts = None
    floor: Mappable = None
    data: Value = None
    needs: Texts = None
    styles: Mappable = None
    protocols: Mappable = None
    code: Mappable = None
    stop: Stops = None
    max_new_tokens: Count = None
    prompt: Value = None
    reference: Value = None
    shots: Natural = None


OWN_TEMPLATES = ("reference_answer", "shot_target")
LM_EVAL_KEYS = frozenset(LmEvalKeys.model_fields) - {*OWN_TEMPLATES}


class GenerationKeys(Keys):
    """`generation_kwargs`, under lm-eval's canonical names."""

    until: Stops = None
    max_gen_toks: Count = None
    do_sample: Annotated[Value, _kind("true or false", lambda value: isinstance(value, bool))] = None
    temperature: Annotated[Value, _kind("a number, 0 or more", lambda value: _is_number(value, 0))] = None
    top_p: Annotated[Value, _kind("a number from 0 to 1", lambda value: _is_number(value, 0, 1))] = None
    top_k: Natural = None
    keep_first_tokens: Count = None


class DataKeys(Keys):
    """A file of rows, as an entry of `data`."""

    file: Value = None
    sha256: Value = None
    rows: Count = None
    hub: Mappable = None
    select: Annotated[
        Value, _kind("columns with the lowest and highest value to keep, {column: [1, 5]}", _are_ranges)
    ] = None
    first: Count = None
    note: Value = None


def check_kinds(keys: type[Keys], block: Mapping[str, object], where: str) -> None:
    """Raises UserError for the first key of the block whose value is of another kind."""
    try:
        keys.model_validate(block)
    except ValidationError as error:
        wrong = {str(item["loc"][0]): str(item["msg"]) for item in error.errors(include_url=False)}
        key = next(key for key in block if key in wrong)
        raise UserError(
            f"{where}, `{key}`", expected=wrong[key], got=repr(block[key]), fix="Correct the value."
        ) from error


def block_of(keys: Mapping[str, object], name: str) -> Block:
    """A block within a block, empty where there is none."""
    found = keys.get(name)
    return found if isinstance(found, dict) else {}


class GenerationKwargs(TypedDict, total=False):
    """How answers are made: `generation_kwargs`, checked."""

    until: list[str]
    max_gen_toks: int
    do_sample: bool
    temperature: float
    top_p: float
    top_k: int
    keep_first_tokens: int


class TaskSpec(BaseModel):
    """A task, read and checked. `native`: scored by lm-eval's own metrics, not by a scorer of ours.

    config: what lm-eval is told; styles and protocols: keys that take the place of its own.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    name: str
    version: float
    suite: str
    summary: str
    path: Path
    scorer: str | None
    metrics: tuple[str, ...]
    data: dict[str, tuple[DataSource, ...]]
    config: Block
    styles: dict[str, Block]
    protocols: dict[str, Block]
    code: Block
    needs: tuple[str, ...] = ()
    floor: Block = {}

    @property
    def native(self) -> bool:
        return self.scorer is None

    @property
    def own(self) -> bool:
        return self.path.parent != TASK_FOLDER

    @property
    def executes_code(self) -> bool:
        return self.scorer is not None and SCORERS[self.scorer].executes_code

    def sources(self) -> Iterator[DataSource]:
        """Every file that rows may come from."""
        for alternatives in self.data.values():
            yield from alternatives

    @property
    def takes_shots(self) -> bool:
        """Whether the task has rows to take few-shot examples from."""
        return "shots" in self.data or bool(self.config.get("fewshot_split") or self.config.get("fewshot_config"))
