"""How one row is tokenized: by the student's strategy and the teacher's, joined with the pairs of tokens."""

import copy
import copyreg
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
from axolotl.prompt_strategies.completion import CompletionPromptTokenizingStrategy

from dskd_plugin.columns import COLUMNS, IGNORE, numbered
from dskd_plugin.host import dataset_report
from dskd_plugin.host.dataset_report import NOTES, ONE_SIDED, PARTED, REFUSED, UNMATCHED
from dskd_plugin.host.pickled import packed, unpacked
from dskd_plugin.host.read_once import read_once
from dskd_plugin.pair import Pair, aligner
from dskd_plugin.settings import Settings
from dskd_plugin.text.read_by import OneSided, hand_over
from dskd_plugin.text.responses import answers
from dskd_plugin.text.tokens import TokenTable, places, spell
from dskd_plugin.text.turn_ends import end_of_turn

# Strategies by their bytes; a forked process has those of its parent and need not build their tokenizers again.
KNOWN: WeakValueDictionary[bytes, "PairedStrategy"] = WeakValueDictionary()


class PairedStrategy:
    """A student strategy and a teacher strategy on the same raw rows."""

    def __init__(
        self,
        student: Any,
        teacher: Any,
        pair: Pair,
        settings: Settings,
        student_len: int | None = None,
        teacher_len: int | None = None,
    ) -> None:
        self.student, self.teacher, self.pair = student, teacher, pair
        self.aligner = aligner(pair, settings, (_turn_end(student, pair.student), _turn_end(teacher, pair.teacher)))
        self.with_prompts = settings.on_policy is not None
        self.student_len, self.teacher_len = student_len, teacher_len
        self.cuts_texts = isinstance(student, CompletionPromptTokenizingStrategy)
        self.filter_rows = getattr(student, "filter_rows", None)
        self.one_sided = OneSided.of(student, teacher)
        self._packed: bytes | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """As bytes made once: `datasets` pickles it twice for a fingerprint and once for each process, in Python.

        That takes seconds where a tokenizer of transformers keeps its vocabulary and its merges.
        """
        if self._packed is None:
            self._packed = packed(self.__dict__)
        if self._packed is None:
            return copyreg.__newobj__, (type(self),), self.__dict__  # type: ignore[attr-defined]
        KNOWN[self._packed] = self
        return _restored, (self._packed,)

    @property
    def supports_batched(self) -> bool:
        return bool(self.student.supports_batched)

    def tokenize_prompt(self, prompt: Any) -> dict[str, Any]:
        """The student's columns plus the teacher's ids, the aligned target positions of both sides and the like."""
        if not self.cuts_texts:
            return self._tokenize(prompt)
        parts = [self._tokenize(_batch_of(text)) for text in _rows_of(prompt)]
        joined: dict[str, Any] = {column: [] for column in _columns(parts)}
        for part in parts:
            for column, rows in part.items():
                joined[column] += rows
        return joined

    def _tokenize(self, prompt: dict[str, Any]) -> dict[str, Any]:
        if self.one_sided is not None:
            for row in _rows_of(prompt) if self._is_batch(prompt) else [prompt]:
                hand_over(self.student, row)
                hand_over(self.teacher, row)
        student, refusals = self._columns_of("student", prompt)
        teacher, teacher_refusals = self._columns_of("teacher", prompt)
        ids = student["input_ids"]
        if not (self.supports_batched and (len(ids) == 0 or isinstance(ids[0], list | np.ndarray))):
            joined = self._join(ids, student["labels"], teacher["input_ids"], teacher["labels"])
            notes = {REFUSED: (refusals or teacher_refusals or [""])[0], ONE_SIDED: self._one_sided(prompt)}
            return {**student, **joined, **notes}
        if self.cuts_texts and not len(ids) == len(teacher["input_ids"]) == 1:
            # The two sides are cut at different places.
            teacher_rows = self.reread(ids, prompt[self.student.field][0])
        else:
            teacher_rows = list(zip(teacher["input_ids"], teacher["labels"], strict=True))
        rows = [
            self._join(*row, *teacher_row)
            for row, teacher_row in zip(zip(ids, student["labels"], strict=True), teacher_rows, strict=True)
        ]
        none = [""] * len(rows)
        said = [self._one_sided(row) for row in _rows_of(prompt)] if self.one_sided else none
        refused = [mine or theirs for mine, theirs in zip(refusals or none, teacher_refusals or none, strict=False)]
        columns = {column: [row[column] for row in rows] for column in self._join([], [], [], [])}
        # A text that was cut into rows has one note for all of them.
        return {**student, **columns, REFUSED: [*refused, *none][: len(rows)], ONE_SIDED: said}

    def _columns_of(self, side: str, prompt: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """A side's columns, empty for rows that its template cannot render, and a note for each row if there are such.

        A strategy reads a batch of rows as a whole; where that fails, each row is read alone.
        """
        strategy = self.student if side == "student" else self.teacher
        try:
            # Strategies change the row they are given.
            return dict(_read(strategy, copy.deepcopy(prompt))), []
        except Exception as error:  # whatever a template raises, e.g. for a system message
            if side == "student" and self.one_sided is None:
                raise  # no template's
            if not self._is_batch(prompt):
                return _no_columns(), [dataset_report.refusal_note(side, error, prompt)]
        parts, notes = [], []
        for row in _rows_of(prompt):
            try:
                found = _read(strategy, copy.deepcopy(_batch_of(row)))
                parts.append({column: values[0] for column, values in found.items()})
                notes.append("")
            except Exception as error:
                parts.append(_no_columns())
                notes.append(dataset_report.refusal_note(side, error, row))
        return {column: [part.get(column, _no_ids()) for part in parts] for column in _columns(parts)}, notes

    def _is_batch(self, prompt: dict[str, Any]) -> bool:
        asks = getattr(self.student, "is_prompt_batched", None)
        return bool(asks(prompt) if asks else self.supports_batched)

    def _one_sided(self, row: dict[str, Any]) -> str:
        return "" if self.one_sided is None else dataset_report.one_sided_note(self.one_sided.find(row))

    def reread(self, rows: list[list[int]], text: str) -> list[tuple[list[int], list[int]]]:
        """The teacher's tokens, as many as it reads, of each student row of a text; all of them are trained on."""
        if self.pair.identity:
            return [(list(row), list(row)) for row in rows]
        end, student_end = self.teacher.tokenizer.eos_token_id, self.student.tokenizer.eos_token_id
        found = []
        for number, (row, said) in enumerate(zip(rows, self._texts(rows, text.encode()), strict=True)):
            ids = self._read_on(said) if number else list(self.teacher.tokenizer(said)["input_ids"])
            if end is not None and row[-1] == student_end and ids[-1:] != [end]:
                ids.append(end)
            ids = ids[: self.teacher_len]
            found.append((ids, list(ids)))
        return found

    def _texts(self, rows: list[list[int]], text: bytes) -> list[str]:
        """What of a text each student row holds; what the row spells where its tokenizer has changed the text."""
        table = self.pair.student
        ends = places([token for row in rows for token in row], table, text)
        if ends is None:
            plain = [[token for token in row if table.bytes[token] is not None] for row in rows]
            spelled = [spell(row, table) for row in plain]
            spelled[0] = spelled[0].removeprefix(b" ") if table.dummy_prefix else spelled[0]
        else:
            stops = [ends[length - 1] for length in np.cumsum([len(row) for row in rows])]
            spelled = [text[start:stop] for start, stop in zip([0, *stops], stops, strict=False)]
        return [part.decode("utf-8", "ignore") for part in spelled]

    def _read_on(self, text: str) -> list[int]:
        """The teacher's tokens of a text that goes on from another: they spell no space more, if that can be."""
        table, tokenizer = self.pair.teacher, self.teacher.tokenizer
        bare = text.removeprefix(" ") if table.dummy_prefix else text
        for said in dict.fromkeys((bare, text)):
            ids = list(tokenizer(said)["input_ids"])
            if b"".join(table.bytes[token] or b"" for token in ids) == text.encode():
                return ids
        return list(tokenizer(bare)["input_ids"])

    def _join(
        self, ids: list[int], labels: list[int], teacher_ids: list[int], teacher_labels: list[int]
    ) -> dict[str, Any]:
        sides = (
            ids,
            _responses(ids, labels, self.student.tokenizer),
            teacher_ids,
            _responses(teacher_ids, teacher_labels, self.teacher.tokenizer),
        )
        found = self.aligner.columns(*sides)
        found[PARTED] = self.aligner.parted(*sides) if found[UNMATCHED] else ""
        if self.with_prompts:
            ours = answers(ids, _trained(labels), self.pair.student, self.aligner.student_end)
            theirs = answers(teacher_ids, _trained(teacher_labels), self.pair.teacher, self.aligner.teacher_end)
            found["teacher_prompt"] = prompt_end(ours[: self.student_len], ours, theirs)
        # Arrays know that they hold integers where they are empty in all of the first rows.
        return {
            column: np.asarray(value, dtype=np.int64) if isinstance(value, list) else value
            for column, value in {"teacher_input_ids": list(teacher_ids), **found}.items()
        }


class SeveralTeachers:
    """In the place of a `PairedStrategy`: one for each teacher, all with the student's strategy, and their columns."""

    def __init__(self, each: list[PairedStrategy]) -> None:
        self.each = each
        self.filter_rows = each[0].filter_rows

    @property
    def supports_batched(self) -> bool:
        return self.each[0].supports_batched

    def tokenize_prompt(self, prompt: Any) -> dict[str, Any]:
        first, *others = (one.tokenize_prompt(prompt) for one in self.each)
        for number, found in enumerate(others, start=2):
            first |= {numbered(name, number): found[name] for name in (*COLUMNS, *NOTES) if name in found}
        return first


def _restored(content: bytes) -> PairedStrategy:
    found = KNOWN.get(content)
    if found is None:
        found = PairedStrategy.__new__(PairedStrategy)
        found.__dict__.update(unpacked(content))
    return found


def prompt_end(kept: list[bool], ours: list[bool], theirs: list[bool]) -> int:
    """Teacher tokens before the answer to the student's last prompt within ``kept``; 0 where there is no prompt."""
    starts, whole, teacher_starts = _starts(kept), _starts(ours), _starts(theirs)
    if not starts or starts[-1] == 0:
        return 0
    if len(whole) == len(teacher_starts):
        return teacher_starts[len(starts) - 1]
    return teacher_starts[-1] if teacher_starts and len(starts) == len(whole) else 0


def _starts(inside: list[bool]) -> list[int]:
    """Where the answers begin."""
    return [k for k, here in enumerate(inside) if here and (k == 0 or not inside[k - 1])]


def _read(strategy: Any, prompt: dict[str, Any]) -> Any:
    with read_once(strategy.tokenizer):
        return strategy.tokenize_prompt(prompt)


def _turn_end(strategy: Any, table: TokenTable) -> int | None:
    prompter = getattr(strategy, "prompter", None)
    template = getattr(prompter, "chat_template", None)
    return end_of_turn(strategy.tokenizer, template or None, table, getattr(prompter, "chat_template_kwargs", None))


def _responses(ids: list[int], labels: list[int], tokenizer: Any) -> list[bool]:
    """Which tokens belong to a response; a leading BOS is markup even where everything is trained on."""
    response = _trained(labels)
    if response and ids[0] == tokenizer.bos_token_id:
        response[0] = False
    return response


def _no_ids() -> Any:
    return np.zeros(0, dtype=np.int64)  # knows that it holds integers, where all of the first rows are empty


def _no_columns() -> dict[str, Any]:
    return {column: _no_ids() for column in ("input_ids", "attention_mask", "labels")}


def _rows_of(prompt: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of a batch."""
    return [dict(zip(prompt, values, strict=True)) for values in zip(*prompt.values(), strict=True)]


def _batch_of(row: dict[str, Any]) -> dict[str, Any]:
    """One row as a batch."""
    return {name: [value] for name, value in row.items()}


def _columns(parts: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(column for part in parts for column in part))


def _trained(labels: list[int]) -> list[bool]:
    return [label != IGNORE for label in labels]
