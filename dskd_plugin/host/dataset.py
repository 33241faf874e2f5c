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
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset

from dskd_plugin import pair_advice
from dskd_plugin.columns import dataset_of, numbered, row_of
from dskd_plugin.errors import Mistakes, SettingError, naming
from dskd_plugin.host import dataset_report
from dskd_plugin.host.dataset_report import NOTES, ONE_SIDED, PARTED, REFUSED, UNMATCHED
from dskd_plugin.host.strategy import IGNORE, PairedStrategy, SeveralTeachers
from dskd_plugin.host.turn_end_warning import names_the_side, template_end
from dskd_plugin.log import LOG
from dskd_plugin.run import Run, Sides, is_chat
from dskd_plugin.teachers.reader import TeacherReader
from dskd_plugin.text.align import REACH
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
                dataset = self._checked(title, dataset, sides, place)
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

    def _checked(self, name: str, every: Any, sides: Sides, place: int) -> Any:
        """The rows that fit the teacher, what they hold in the log; an error for a dataset that teaches nothing.

        every: rows with the columns of all teachers. place: of this one in their list, from 0.
        """
        run, rows, number = sides.run, len(every), place + 1
        if "teacher_input_ids" not in every.column_names:
            raise SettingError(
                name,
                "rows with the fields that this entry names",
                f"none; what the rows have: {', '.join(every.column_names)}",
                "Check field_messages, message_property_mappings and the other field names of the entry.",
            )
        dataset = dataset_of(every, number, NOTES)
        _check_readable(name, dataset, sides)
        notes = list(dataset[PARTED]) if rows else []
        unmatched = int(np.sum(dataset[UNMATCHED])) if rows else 0
        if line := dataset_report.parted(notes, unmatched):
            LOG.warning("dskd: %s: %s.", name, line)
        every, over_long = _fitting(name, every, run, number)
        dataset = dataset_of(every, number, NOTES)
        if rows:
            unmatched = int(np.sum(dataset[UNMATCHED]))
        responses, aligned = _responses_in(dataset), int(_lengths(dataset, "aligned_student").sum())
        in_spans = _span_tokens(dataset) if "spans" in dataset.column_names else None
        if rows and not len(dataset):
            raise SettingError(
                name,
                f"rows that fit the teacher ({run.teacher.sequence_len} tokens)",
                f"none: all {rows} are longer",
                "Raise dskd.teacher.sequence_len, shorten the rows, or set excess_length_strategy: truncate.",
            )
        if responses == 0:
            raise SettingError(
                name,
                "rows with response tokens to train on",
                f"none in {rows} rows",
                "Check the field names, roles_to_train, train_on_inputs and the chat template. Prompts without "
                "answers are for `dskd generate`: train the recipe that it writes.",
            )
        of_spans = "" if in_spans is None else f", {100 * in_spans / responses:.1f} % in spans"
        LOG.info(
            "dskd: %s: %d rows, %d response tokens, %s%s; %d over-long teacher rows (%s), "
            "%d responses without a counterpart",
            *(name, rows, responses, pair_advice.of_dataset(aligned / responses), of_spans),
            *(over_long, _excess_strategy(run) if over_long else "none", unmatched),
        )
        if not aligned and not in_spans and run.method.needs_teacher:
            self._unpaired[place].append(dataset_report.unpaired(name, responses, notes, sides.pair, run.settings))
        if run.settings.on_policy is not None and not any(dataset["teacher_prompt"]):
            self._promptless[place].append(dataset_report.promptless(name, rows))
        return every.remove_columns([numbered(note, number) for note in NOTES])


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


def _check_readable(name: str, dataset: Any, sides: Sides) -> None:
    """Refuse rows that a side cannot read, and tell of what one side alone reads."""
    teacher = sides.run.teacher
    refusals = list(dataset[REFUSED]) if len(dataset) else []
    if refusal := dataset_report.refused(name, refusals, len(dataset)):
        raise refusal
    if refusal := _beyond_rows(name, dataset, teacher):
        raise refusal
    _tell_one_sided(name, dataset, *sides.tokenizers)


def _excess_strategy(run: Run) -> str:
    return str(run.recipe.excess_length_strategy or "drop").lower()


def _fitting(name: str, dataset: Any, run: Run, number: int) -> tuple[Any, int]:
    """The dataset by Axolotl's own rule for rows that are too long, and how many were too long for the teacher.

    number: of the teacher, whose columns are looked at.
    """
    limit, processes = run.teacher.sequence_len, run.recipe.dataset_num_proc
    over_long = int(np.sum(_lengths(dataset, numbered("teacher_input_ids", number)) > limit))
    if not over_long:
        return dataset, 0
    if _excess_strategy(run) == "raise":
        raise SettingError(
            name,
            f"teacher rows of at most {limit} tokens (excess_length_strategy: raise)",
            f"{over_long} longer ones",
            "Raise dskd.teacher.sequence_len or shorten the rows.",
        )
    if _excess_strategy(run) == "truncate":
        cut = _Truncate(limit, pairs=run.method.in_pairs, number=number)
        return dataset.map(cut, num_proc=processes, desc="Truncating teacher rows"), over_long
    return dataset.filter(_Fits(limit, number), num_proc=processes, desc="Dropping over-long teacher rows"), over_long


def _responses_in(dataset: Any) -> int:
    """Response tokens to train on."""
    count = 0
    for batch in dataset.select_columns(["labels"]).with_format("arrow").iter(1000):
        labels = batch["labels"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        count += int(np.count_nonzero(labels != IGNORE))
    return count


def _beyond_rows(name: str, dataset: Any, reader: TeacherReader) -> SettingError | None:
    """The error about a row with a token that the teacher has no embedding for; None where there is none."""
    first = 0
    for batch in dataset.select_columns(["teacher_input_ids"]).with_format("arrow").iter(1000):
        ids = batch["teacher_input_ids"].combine_chunks()
        if len(ids.flatten()) and ids.flatten().to_numpy(zero_copy_only=False).max() >= reader.rows:
            place, row = next((k, row) for k, row in enumerate(ids.to_pylist()) if max(row, default=0) >= reader.rows)
            return dataset_report.beyond_rows(name, first + place, row, reader.tokenizer, reader.rows)
        first += len(ids)
    return None


def _tell_one_sided(name: str, dataset: Any, tokenizer: Any, teacher_tokenizer: Any) -> None:
    found = dataset_report.one_sided(list(dataset[ONE_SIDED]) if len(dataset) else [])
    if found is None:
        return
    place, texts, said = found
    row = dataset[place]
    renderings = tokenizer.decode(row["input_ids"]), teacher_tokenizer.decode(row["teacher_input_ids"])
    LOG.warning("dskd: %s: %s.", name, dataset_report.one_sided_line(said, place, texts[0].text, renderings))


def _span_tokens(dataset: Any) -> int:
    """Student tokens within spans."""
    flat = (
        batch["spans"].combine_chunks().flatten().to_numpy(zero_copy_only=False).reshape(-1, 4)
        for batch in dataset.select_columns(["spans"]).with_format("arrow").iter(1000)
    )
    return sum(int(np.sum(spans[:, 1] - spans[:, 0])) for spans in flat)


def _lengths(dataset: Any, column: str) -> Any:
    parts = [
        batch[column].combine_chunks().value_lengths().to_numpy(zero_copy_only=False)
        for batch in dataset.select_columns([column]).with_format("arrow").iter(1000)
    ]
    return np.concatenate(parts) if parts else np.zeros(0, dtype=int)


@dataclass
class _Fits:
    limit: int
    number: int

    def __call__(self, row: dict[str, Any]) -> bool:
        return len(row[numbered("teacher_input_ids", self.number)]) <= self.limit


@dataclass
class _Truncate:
    """Cut the side of the teacher of this number; pairs: the two aligned columns go together, else each on its own."""

    limit: int
    pairs: bool
    number: int

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        row = row_of(row, self.number)
        more = row.get("aligned_more") or [0] * len(row["aligned_teacher"])
        kept = [k for k, position in enumerate(row["aligned_teacher"]) if position + more[k] < self.limit]
        new = {"teacher_input_ids": row["teacher_input_ids"][: self.limit]}
        for column in ("aligned_teacher", *(("aligned_student", *REACH) if self.pairs else ())):
            if column in row:
                new[column] = [row[column][k] for k in kept]
        if "spans" in row:
            spans = [row["spans"][k : k + 4] for k in range(0, len(row["spans"]), 4)]
            new["spans"] = [position for span in spans if span[3] <= self.limit for position in span]
        if row.get("teacher_prompt", 0) > self.limit:
            new["teacher_prompt"] = 0
        return {numbered(column, self.number): value for column, value in new.items()}
