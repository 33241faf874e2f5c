"""A recipe's datasets as prompts for its teacher: read by Axolotl's own loaders, rendered in the teacher's template."""

import copy
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dskd_plugin import recipe_file
from dskd_plugin.errors import SettingError
from dskd_plugin.preflight import check_started
from dskd_plugin.run import Run
from dskd_plugin.teachers.reader import TeacherReader, answer_ends, resolve_template
from dskd_plugin.text.read_by import hand_over
from dskd_plugin.text.reasoning import AssistantForm, form_of

# Settings of the training run that mean nothing here and may not suit this machine.
_TRAINING_ONLY = {
    **dict.fromkeys(("deepspeed", "fsdp", "fsdp_config", "fsdp_version", "resume_from_checkpoint")),
    **dict.fromkeys(("context_parallel_size", "tensor_parallel_size", "dp_shard_size")),
    **dict.fromkeys(("bf16", "fp16", "tf32"), False),
}
# Prompters that lay out an instruction and an input and add no words of their own to the task.
_LAYOUTS = {
    "AlpacaPrompter",
    "UnpromptedPrompter",
    "GPTeacherPrompter",
    "SystemDataPrompter",
    "OpenOrcaSystemDataPrompter",
}


def read_recipe(path: Path) -> dict[str, Any]:
    """The recipe as written; ``ValueError`` unless it is a mapping with a ``dskd:`` block."""
    recipe = recipe_file.read(path)
    if not isinstance(recipe, dict):
        raise SettingError(path, "an Axolotl recipe", type(recipe).__name__, "Name another file.")
    if not recipe.get("dskd"):
        raise SettingError(
            path,
            "a `dskd:` block that names the teacher",
            "none",
            "Add at least:\n  plugins: [dskd]\n  dskd:\n    teacher:\n      model: <hub id or folder>",
        )
    if not recipe.get("datasets"):
        raise SettingError(path, "`datasets` with the prompts", "none", "List at least one.")
    return recipe


def checked_recipe(path: Path, *, unread: tuple[str, ...]) -> dict[str, Any]:
    """`read_recipe`; ``ValueError`` also for what can be known to be wrong with it before a library loads.

    unread: settings that the command has no use for, beside those of a training.
    """
    recipe = read_recipe(path)
    check_started({key: value for key, value in recipe.items() if key not in (*_TRAINING_ONLY, *unread)}, {})
    return recipe


@dataclass(frozen=True)
class Source:
    """A checked recipe whose teacher answers. template: it reads all entries in this one, of whatever type.

    ends: ids that end its answers; form: how it lays out an answer, see `reasoning.AssistantForm`.
    """

    run: Run
    template: str
    ends: list[int]
    form: AssistantForm

    @property
    def teacher(self) -> TeacherReader:
        return self.run.teacher


def load_run(path: Path, recipe: dict[str, Any]) -> Run:
    """Validate the recipe as ``axolotl train`` does, with the plugin's own checks; nothing is written for the run."""
    os.environ.setdefault("AXOLOTL_LOG_LEVEL", "WARNING")
    os.environ["AXOLOTL_TEE_STDOUT"] = "0"
    try:
        from axolotl.cli.config import load_cfg
        from axolotl.utils import tee
    except ImportError as error:
        raise SettingError(
            "axolotl", "an installed Axolotl", error, "Install it: pip install 'dskd[train]'."
        ) from error

    from dskd_plugin.host.plugin import registered

    changes = {key: value for key, value in _TRAINING_ONLY.items() if key in recipe}
    with tempfile.TemporaryDirectory() as scratch:  # Axolotl empties the log in output_dir
        try:
            cfg = load_cfg(str(path), output_dir=scratch, **changes)
        except ValidationError as error:
            wrong = "; ".join(
                f"{'.'.join(map(str, item['loc'])) or 'recipe'}: {item['msg']}" for item in error.errors()
            )
            raise SettingError(
                path, "a recipe that Axolotl accepts", wrong, "Correct it: it could not train either."
            ) from error
        except OSError as error:
            raise SettingError(
                path, "models and files that can be read", error, "Check the names and the network."
            ) from error
        tee.close_debug_log()
    resolved = registered().run
    assert resolved is not None
    return resolved.on(cfg)


def load_recipe(path: Path, recipe: dict[str, Any], number: int | None = None) -> Source:
    """`load_run` for a teacher that answers: Axolotl's loaders read the rows as they are, without the other side.

    number: of the teacher where there are several, counted from 1; None where there is one.
    """
    of_each = load_run(path, recipe).each
    from dskd_plugin.host import dataset

    dataset.install(None)
    if (number is None and len(of_each) > 1) or (number or 1) > len(of_each):
        named = ", ".join(f"{place}: {one.settings.teacher.model!r}" for place, one in enumerate(of_each, start=1))
        raise SettingError(
            "--teacher",
            f"which of the recipe's teachers is to answer ({named})",
            number or "none",
            "Give its number, and generate once for each teacher whose answers you want.",
        )
    run = of_each[(number or 1) - 1]
    teacher = run.teacher
    # Entries of other types than chat_template are answered in the teacher's template as well.
    template = resolve_template(run.settings.teacher, teacher.tokenizer, run.templates.named, needed=True)
    assert template is not None
    form = form_of(teacher.tokenizer, template, teacher.template_options)
    return Source(run, template, answer_ends(teacher, template), form)


def read_prompts(source: Source, limit: int | None) -> Any:
    """A dataset with the columns ``messages`` (JSON, up to the turn to answer), ``tools`` (JSON or ""), ``prompt_ids``,
    ``entry`` (number of the recipe's entry), ``row`` (number within it) and ``answered`` (whether the row has an answer
    of its own).

    Rows keep the order of the recipe's datasets. A row without a turn to answer has no prompt_ids.
    """
    from axolotl.utils.data.shared import datasets_with_name_generator
    from datasets import Features, Value, concatenate_datasets

    columns = Features(
        {
            "messages": Value("string"),
            "tools": Value("string"),
            "prompt_ids": [Value("int32")],
            "entry": Value("int32"),
            "row": Value("int32"),
            "answered": Value("bool"),
        }
    )
    teacher = source.teacher
    cfg = copy.deepcopy(source.run.recipe)
    cfg["chat_template"], cfg["chat_template_jinja"], cfg["eot_tokens"] = "jinja", source.template, None
    cfg["tokenizer_use_mistral_common"] = None
    parts: list[Any] = []
    named = ((k, one) for k, listed in enumerate(cfg.datasets) for one in datasets_with_name_generator([listed]))
    for number, entry in named:
        name = f"datasets: {entry['path']}"
        entry["chat_template"], entry["chat_template_jinja"] = "jinja", source.template
        strategy, rows = _load_entry(name, entry, cfg, teacher.tokenizer)
        reader = _Reader(name, number, strategy, teacher.tokenizer, source.template, teacher.template_options)
        if not reader.understands:
            raise _unreadable(name, entry)
        if limit is not None:
            rows = rows.select(range(min(len(rows), limit - sum(len(part) for part in parts))))
        if strategy.filter_rows:
            rows = rows.filter(strategy.filter_rows)
        parts.append(
            rows.map(
                reader,
                with_indices=True,
                remove_columns=rows.column_names,
                features=columns,
                num_proc=cfg.dataset_num_proc if len(rows) > 1000 else None,
                desc="Reading prompts",
            )
        )
    return concatenate_datasets([part for part in parts if len(part)] or parts[:1])


def _load_entry(name: str, entry: Any, cfg: Any, tokenizer: Any) -> tuple[Any, Any]:
    """Axolotl's strategy for an entry of `datasets`, and the entry's rows as they are on disk."""
    from axolotl.utils.data import sft

    with _captured() as found:
        try:
            sft._load_and_process_single_dataset(entry, cfg, tokenizer, split="train", seed=cfg.seed)
        except Exception as error:
            raise SettingError(
                name,
                "data that Axolotl reads",
                f"{type(error).__name__}: {error}",
                "Check path, split, ds_type and type of the entry.",
            ) from error
    if len(found) != 1:
        raise _unreadable(name, entry)
    return found[0]


def _unreadable(name: str, entry: Any) -> SettingError:
    kind = entry["type"] if isinstance(entry["type"], str) else "a custom type"
    return SettingError(
        name,
        "type chat_template or an alpaca type, whose prompt and answer are apart",
        f"{kind!r}",
        "Convert the rows to conversations (`messages`, type: chat_template), or remove the entry.",
    )


@contextmanager
def _captured() -> Iterator[list[tuple[Any, Any]]]:
    """Inside, Axolotl loads a dataset and builds its strategy, but tokenizes nothing: both are kept."""
    from axolotl.utils.data import wrappers

    found: list[tuple[Any, Any]] = []

    def keep(strategy: Any, dataset: Any, **_: Any) -> Any:
        found.append((strategy, dataset))
        return dataset

    original = wrappers.wrap_dataset_for_tokenized_prompt
    wrappers.wrap_dataset_for_tokenized_prompt = keep
    try:
        yield found
    finally:
        wrappers.wrap_dataset_for_tokenized_prompt = original


@dataclass
class _Reader:
    """One row of a dataset entry -> its prompt. Picklable, for several processes."""

    name: str
    number: int
    strategy: Any
    tokenizer: Any
    template: str
    template_options: dict[str, Any]

    @property
    def understands(self) -> bool:
        return hasattr(self.strategy, "get_conversation_thread") or (
            hasattr(self.strategy, "parse_instruction_fields") and type(self.strategy.prompter).__name__ in _LAYOUTS
        )

    def __call__(self, row: dict[str, Any], index: int) -> dict[str, Any]:
        from axolotl.utils.dict import remove_none_values

        try:
            turns, tools, answered = self._conversation(remove_none_values(row))
            asked = [k for k, turn in enumerate(turns) if turn["role"] not in ("assistant", "system", "developer")]
            turns = turns[: asked[-1] + 1] if asked else []
            ids = [] if not turns else self._render(turns, tools)
        except Exception as error:
            raise SettingError(
                f"{self.name}, row {index}",
                "a conversation that the teacher's template renders",
                f"{type(error).__name__}: {error}",
                "Correct the row, its field names or dskd.teacher.chat_template.",
            ) from error
        return {
            "messages": json.dumps(turns, ensure_ascii=False),
            "tools": json.dumps(tools, ensure_ascii=False) if tools else "",
            "prompt_ids": ids,
            "entry": self.number,
            "row": index,
            "answered": answered,
        }

    def _render(self, turns: list[dict[str, Any]], tools: list[Any] | None) -> list[int]:
        ids: list[int] = self.tokenizer.apply_chat_template(
            turns,
            tools=tools or None,
            chat_template=self.template,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=False,
            **self.template_options,
        )
        return ids

    def _conversation(self, row: dict[str, Any]) -> tuple[list[dict[str, Any]], list[Any] | None, bool]:
        """The turns, the tools, and whether an answer follows the last question."""
        if hasattr(self.strategy, "get_conversation_thread"):
            prompter = self.strategy.prompter
            if not self.strategy._get_messages(row):
                return [], None, False
            # The teacher's template may not read a field; the student's may.
            hand_over(self.strategy, row, calls=True)
            markup = {"training", "training_detail", "reasoning_training_detail"}
            markup |= {prompter.message_field_training, prompter.message_field_training_detail}
            turns = self.strategy.get_conversation_thread(row)
            plain = [{key: value for key, value in turn.items() if key not in markup} for turn in turns]
            return plain, self.strategy._get_tools(row), bool(plain) and _is_answer(plain[-1])
        fields = self.strategy.parse_instruction_fields({"output": "", "response": "", **row})
        instruction, given, answer, *system = fields
        turns = [{"role": "system", "content": system[0]}] if system and system[0] else []
        turns.append({"role": "user", "content": f"{instruction}\n\n{given}" if given else instruction})
        return turns, None, bool(str(answer or "").strip())


def _is_answer(turn: dict[str, Any]) -> bool:
    """Whether a message answers: the empty message of an assistant is a place for an answer."""
    said = bool(str(turn.get("content") or "").strip() or turn.get("tool_calls"))
    return turn["role"] == "assistant" and said
