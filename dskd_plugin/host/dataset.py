"""Ordinary Axolotl datasets, read twice: once by the student, once by the teacher, with the same masking rules.

Axolotl builds a tokenizing strategy for each dataset entry. Three of its module functions are replaced so that the
strategy is first built for the teacher, only to be kept, and then for the student, whose tokenization of each row is
joined with the teacher's and the aligned pairs. Everything around it (loading, parallel map, caching, filtering,
packing) stays Axolotl's.
"""

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from datasets import Dataset

from dskd_plugin import pair_advice
from dskd_plugin.errors import Mistakes, SettingError, naming
from dskd_plugin.host import row_checks
from dskd_plugin.host.strategy import PairedStrategy, SeveralTeachers
from dskd_plugin.host.turn_end_warning import names_the_side, template_end
from dskd_plugin.log import LOG
from dskd_plugin.run import Run, Sides, is_chat
from dskd_plugin.teachers.reader import TeacherReader
from dskd_plugin.text.tokens import overlap
from dskd_plugin.text.turn_ends import end_of_turn


def _with_one_template(entry: Any, sides: Sides) -> Any:
    """A dataset entry whose template is one text, also where the student's tokenizer has several under names."""
    if not is_chat(entry) or not isinstance(getattr(sides.tokenizer, "chat_template", None), dict):
        return entry
    entry = copy.deepcopy(entry)
    template = sides.run.student_template(entry, sides.tokenizer)
    entry["chat_template"], entry["chat_template_jinja"] = "jinja", template
    return entry


class ReadTwice:
    """Stands in for three functions of Axolotl in one run: what they do, for both sides.

    Each takes the original and the arguments of a call.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._sides: list[Sides] = []
        # What takes a strategy that Axolotl has just built, and gives back the one to use.
        self._exchange: Callable[[Any], Any] | None = None
        # What is said of the entries without a pair and of those without a prompt, until all of a split are read.
        self._unpaired: list[list[SettingError]] = [[] for _ in run.readers]
        self._promptless: list[list[SettingError]] = [[] for _ in run.readers]

    def get_dataset_wrapper(
        self, original: Callable[..., Any], dataset_config: Any, tokenizer: Any, cfg: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """A dataset entry tokenized for both sides."""
        if not self._sides or self._sides[0].tokenizer is not tokenizer:
            self._sides = self._run.on(cfg).sides(tokenizer)
        first, teachers = self._sides[0], len(self._sides)
        name = f"datasets: {dataset_config['path']}"
        pairings: list[Callable[[Any], PairedStrategy]] = []
        for place, sides in enumerate(self._sides):
            with naming(place, teachers):
                reading = _for_teacher(dataset_config, cfg, sides.run.teacher)
                build = functools.partial(original, *reading, *args, **kwargs)
                teacher_strategy = self._teacher_strategy(name, build, dataset_config)
                if sides.run.settings.on_policy is not None:
                    _check_one_end(sides)
            pairings.append(
                functools.partial(
                    PairedStrategy,
                    teacher=teacher_strategy,
                    pair=sides.pair,
                    settings=sides.run.settings,
                    student_len=cfg.sequence_len,
                    teacher_len=sides.run.teacher.sequence_len,
                )
            )

        def paired(strategy: Any) -> PairedStrategy | SeveralTeachers:
            found = [pairing(strategy) for pairing in pairings]
            return found[0] if teachers == 1 else SeveralTeachers(found)

        dataset_config = _with_one_template(dataset_config, first)
        turn_end = template_end(dataset_config, tokenizer, cfg, first.pair.student)
        with self._each_strategy(paired), names_the_side("student", turn_end):
            dataset, prompter = original(dataset_config, tokenizer, cfg, *args, **kwargs)
        for place, sides in enumerate(self._sides):
            pair, settings = sides.pair, sides.run.settings
            _say_once(pair_advice.of_pair(pair, settings, overlap(pair.student, pair.teacher).student_share))
            title = name if teachers == 1 else f"{name} (teacher {place + 1}, {settings.teacher.model})"
            with naming(place, teachers):
                found = row_checks.checked(title, dataset, sides, place + 1)
            dataset = found.rows
            self._unpaired[place] += found.unpaired
            self._promptless[place] += found.promptless
        return dataset, prompter

    def _teacher_strategy(self, name: str, build: Callable[[], Any], dataset_config: Any) -> Any:
        """The strategy that Axolotl builds for a teacher."""
        captured: list[Any] = []
        with self._each_strategy(captured.append), names_the_side("teacher"):
            build()
        if len(captured) != 1:
            raise SettingError(
                name,
                "a dataset type that Axolotl tokenizes row by row",
                f"{dataset_config['type']!r}",
                "Use chat_template, alpaca, completion or a custom type with raw text.",
            )
        return captured[0]

    def wrap_dataset_for_tokenized_prompt(
        self, original: Callable[..., Any], strategy: Any, dataset: Any, **kwargs: Any
    ) -> Any:
        """A dataset tokenized with the strategy that is wanted at this time."""
        if self._exchange is not None:
            strategy = self._exchange(strategy)
        return dataset if strategy is None else rows_alone(original(strategy, dataset, **kwargs))

    def merge_datasets(self, original: Callable[..., Any], datasets: list[Any], *args: Any, **kwargs: Any) -> Any:
        """An entry without a pair, or without a prompt to answer, may stand beside others that have one."""
        lacking = (
            (self._unpaired, "The rows of this entry teach by cross-entropy alone."),
            (self._promptless, "The student answers the prompts of the other entries."),
        )
        for of_each, consequence in lacking:
            for place, lines in enumerate(of_each):
                said, lines[:] = lines[:], []
                with naming(place, len(of_each)):
                    if said and len(said) == len(datasets):
                        raise Mistakes(said)
                for line in said:
                    LOG.warning("dskd: %s %s", line, consequence)
        return original(datasets, *args, **kwargs)

    @contextmanager
    def _each_strategy(self, exchange: Callable[[Any], Any]) -> Iterator[None]:
        """Hand every strategy that Axolotl builds to ``exchange``; where that returns None, nothing is tokenized."""
        self._exchange = exchange
        try:
            yield
        finally:
            self._exchange = None


def install(run: Run | None) -> None:
    """Let Axolotl's datasets carry the teacher's side of a run; None gives Axolotl its own functions back."""
    from axolotl.utils.data import sft, wrappers

    both = None if run is None else ReadTwice(run)
    for module, name in (
        (sft, "get_dataset_wrapper"),
        (sft, "merge_datasets"),
        (wrappers, "wrap_dataset_for_tokenized_prompt"),
    ):
        found = getattr(module, name)
        original = getattr(found, "axolotls_own", found)
        if both is None:
            setattr(module, name, original)
            continue
        replaced = functools.partial(getattr(both, name), original)
        replaced.axolotls_own = original  # type: ignore[attr-defined]
        setattr(module, name, replaced)


def rows_alone(dataset: Any) -> Any:
    """A tokenized dataset without the strategy that Axolotl leaves in it.

    With it, every change of columns copies both tokenizers, and every process that filters or saves rows reads them.
    """
    if not isinstance(dataset, Dataset):
        return dataset
    return Dataset(dataset.data, info=dataset.info, split=dataset.split, fingerprint=dataset._fingerprint)


@functools.cache
def _say_once(line: str) -> None:
    """The same for all entries of a recipe."""
    LOG.info("dskd: %s", line)


def _check_one_end(sides: Sides) -> None:
    """Raise ``SettingError`` where the datasets' turns end in several ways; sampled answers end in one."""
    if len(sides.ends) < 2:
        return
    told = []
    for tokenizer, ends in zip(sides.tokenizers, zip(*sides.ends, strict=True), strict=True):
        tokens = tokenizer.convert_ids_to_tokens([end for end in ends if end is not None])
        told.append(" and ".join(tokens))
    raise SettingError(
        "datasets",
        "one end of turn in all entries, since sampled answers have one (dskd.on_policy)",
        f"{told[0]} of the student, {told[1]} of the teacher",
        "Use one type and one chat template for all of them, or remove dskd.on_policy.",
    )


def _for_teacher(dataset_config: Any, cfg: Any, reader: TeacherReader) -> tuple[Any, Any, Any]:
    """The dataset entry, tokenizer and recipe of the teacher: copies with its own template and limits."""
    config, teacher_cfg = copy.deepcopy(dataset_config), copy.deepcopy(cfg)
    for block in (config, teacher_cfg):
        if reader.template is not None:
            block["chat_template"], block["chat_template_jinja"] = "jinja", reader.template
    teacher_cfg["tokenizer_use_mistral_common"] = None
    # One above the limit, so that a row cut by its strategy is still seen to be too long.
    teacher_cfg["sequence_len"] = reader.sequence_len + 1
    teacher_cfg["eot_tokens"] = None
    teacher_cfg["chat_template_kwargs"] = dict(reader.template_options)
    turn_end = end_of_turn(reader.tokenizer, reader.template, reader.table, reader.template_options)
    if turn_end is not None and turn_end != reader.tokenizer.eos_token_id:
        teacher_cfg["eot_tokens"] = [reader.tokenizer.convert_ids_to_tokens(turn_end)]
    return config, reader.tokenizer, teacher_cfg
