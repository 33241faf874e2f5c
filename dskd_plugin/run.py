"""A recipe, resolved: its settings, the parts of its teacher, both token tables, where turns end, how long rows may be.

`resolve` checks a recipe and finds everything that needs no weights. Plugin, dataset, trainer, summary and
``dskd generate`` take what it returns. What only the training host knows, `Templates`, is handed in by `host/`.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from dskd_plugin.errors import SettingError, naming
from dskd_plugin.folders import check_student
from dskd_plugin.methods import method_of
from dskd_plugin.methods.base import Method
from dskd_plugin.pair import Pair, aligner, make_pair
from dskd_plugin.preflight import check_recipe
from dskd_plugin.recipe_options import whole_number
from dskd_plugin.settings import Settings, parse_settings
from dskd_plugin.teachers.reader import Named, TeacherReader, check_reachable, read_teacher
from dskd_plugin.text.align import Aligner
from dskd_plugin.text.reasoning import Markers, markers_of
from dskd_plugin.text.templates import names, one_template
from dskd_plugin.text.turn_ends import Ends, end_of_turn


@dataclass(frozen=True)
class Templates:
    """The chat templates that the host knows.

    named: by a name, see `reader.Named`. of_entry: (recipe, dataset entry, tokenizer) -> what the student reads it in.
    """

    named: Named
    of_entry: Callable[[Any, Any, Any], Any]


@dataclass(frozen=True)
class Run:
    """A checked recipe. recipe: as the host has it; settings: its ``dskd:`` block; readers: how each teacher reads.

    asked: the recipe as the user wrote it, with what the command line replaces.
    """

    recipe: Any
    settings: Settings
    readers: tuple[TeacherReader, ...]
    templates: Templates
    asked: dict[str, Any]

    def on(self, recipe: Any) -> "Run":
        """The same run with the recipe as the host has completed it since."""
        return replace(self, recipe=recipe)

    @property
    def each(self) -> list["Run"]:
        """The same run with each of its teachers alone, in their order."""
        of_each = zip(self.settings.each, self.readers, strict=True)
        return [replace(self, settings=settings, readers=(reader,)) for settings, reader in of_each]

    @property
    def teacher(self) -> TeacherReader:
        """How the teacher of a run with one alone reads."""
        (only,) = self.readers
        return only

    @property
    def method(self) -> Method:
        return method_of(self.settings)

    @property
    def trust_remote_code(self) -> bool:
        return bool(self.recipe.get("trust_remote_code"))

    @property
    def entries(self) -> list[object]:
        """The recipe's entries of datasets, of training and of evaluation."""
        return [*(self.recipe.get("datasets") or ()), *(self.recipe.get("test_datasets") or ())]

    @property
    def student_len(self) -> int | None:
        """Longest row of the student in tokens."""
        return whole_number(self.recipe, "sequence_len", 0) or None

    @property
    def student_template_options(self) -> dict[str, object]:
        return dict(self.recipe.get("chat_template_kwargs") or {})

    def student_template(self, entry: Any, tokenizer: Any) -> str:
        """The chat template in which the student reads a dataset entry, as one text.

        ``SettingError`` where its tokenizer has several under names and none that holds for every conversation.
        """
        found = self.templates.of_entry(self.recipe, entry, tokenizer)
        template = one_template(found)
        if template is None:
            raise SettingError(
                "chat_template",
                "a student with a chat template named 'default'",
                f"one with {', '.join(names(found))}",
                "Write the one to use into a jinja file: chat_template: jinja, chat_template_jinja: <file>.",
            )
        return template

    def student_tokenizer(self) -> Any:
        """The student's tokenizer as its files have it; the host may add tokens to its own."""
        from transformers import AutoTokenizer

        recipe = self.recipe
        return AutoTokenizer.from_pretrained(
            recipe.get("tokenizer_config") or recipe["base_model"],
            revision=recipe.get("revision_of_model") or "main",
            trust_remote_code=self.trust_remote_code,
        )

    def with_student(self, tokenizer: Any) -> "Sides":
        """Both sides, once the student's tokenizer is there; ``SettingError`` for settings that do not fit the two."""
        return Sides(self, tokenizer, make_pair(tokenizer, self.teacher.table, self.settings))

    def sides(self, tokenizer: Any) -> list["Sides"]:
        """`with_student` for each teacher."""
        found = []
        for place, run in enumerate(self.each):
            with naming(place, len(self.readers)):
                found.append(run.with_student(tokenizer))
        return found


@dataclass
class Sides:
    """A run with one teacher, whose student's tokenizer is loaded."""

    run: Run
    tokenizer: Any
    pair: Pair

    @property
    def tokenizers(self) -> tuple[Any, Any]:
        return self.tokenizer, self.run.teacher.tokenizer

    @cached_property
    def ends(self) -> list[Ends]:
        """The end-of-turn ids of the recipe's datasets, each once; plain-text types end with the end of sequence."""
        run, teacher = self.run, self.run.teacher
        found = []
        for entry in run.entries:
            chat = is_chat(entry)
            ours = run.student_template(entry, self.tokenizer) if chat else None
            theirs = teacher.template if chat else None
            found.append(
                (
                    end_of_turn(self.tokenizer, ours, self.pair.student, run.recipe.get("chat_template_kwargs")),
                    end_of_turn(teacher.tokenizer, theirs, teacher.table, teacher.template_options),
                )
            )
        return list(dict.fromkeys(found))

    @property
    def markers(self) -> tuple[Markers, ...]:
        """What opens and closes reasoning in the templates of both sides."""
        run, teacher = self.run, self.run.teacher
        templates: list[Any] = [(teacher.tokenizer, teacher.template, teacher.template_options)]
        for entry in run.recipe.get("datasets") or ():
            if is_chat(entry):
                template = run.student_template(entry, self.tokenizer)
                templates.append((self.tokenizer, template, run.student_template_options))
        return markers_of(templates)

    def aligner(self) -> Aligner:
        """How rows are aligned whose turns end as those of the first dataset."""
        return aligner(self.pair, self.run.settings, self.ends[0])


def is_chat(entry: Any) -> bool:
    """Whether a dataset entry holds conversations that a chat template renders."""
    return str(entry.get("type")).startswith("chat_template")


def resolve(recipe: Any, templates: Templates) -> Run:
    """Check a recipe and find all of it that needs no weights; ``ValueError`` for what is wrong with it."""
    asked = recipe.to_dict() if hasattr(recipe, "to_dict") else copy.deepcopy(recipe)
    settings = parse_settings(asked["dskd"])
    check_recipe(recipe)
    check_student(recipe["base_model"])
    if not Path(recipe["base_model"]).exists():
        trusted = bool(recipe.get("trust_remote_code"))
        check_reachable("base_model", recipe["base_model"], recipe.get("revision_of_model"), trusted)
    readers = []
    for place, one in enumerate(settings.each):
        with naming(place, len(settings.each)):
            readers.append(read_teacher(one, recipe, templates.named))
    run = Run(recipe, settings, tuple(readers), templates, asked)
    changed = any(recipe.get(key) for key in ("tokens", "added_tokens_overrides", "special_tokens"))
    one_tokenizer = settings.alignment == "identity" or run.method.needs_one_tokenizer
    # What the pair must be is told now; other pairs are read when the host has made its tokenizer.
    if (one_tokenizer or settings.span_weight > 0) and not changed:
        run.sides(run.student_tokenizer())
    return run
