"""How one row is tokenized: by the student's strategy and the teacher's, joined with the pairs of tokens."""

import copy
import copyreg
from itertools import pairwise
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
        ends = _turn_end(student, pair.student), _turn_end(teacher, pair.teacher)
        # Axolotl cuts the texts of other types where it reads them, and conversations later.
        whole = all(hasattr(side, "get_conversation_thread") for side in (student, teacher))
        self.aligner = aligner(pair, settings, ends, whole=whole)
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
        """The student's columns plus the teacher's ids, the aligned target positions of both sides and the like.

        prompt: a row, or columns of rows where the strategies read batches. As many rows come out, but of texts that
        the student cuts. A row that a side cannot read has no tokens and a note about it.
        """
        if not self.supports_batched:
            return self._of_row(prompt)
        if self.cuts_texts:
            return _joined([self._of_text(row) for row in _rows_of(prompt)])
        field = _messages_of(self.student)
        if not _is_batch(prompt, field):
            return _first(self._of_batch(_batch_of(prompt)))
        # `row_checks.checked` tells of a column that no row has.
        return self._of_batch(prompt) if field is None or field in prompt else _joined([])

    def _of_row(self, row: dict[str, Any]) -> dict[str, Any]:
        self._hand_over(row)
        student, refused = self._columns_of("student", row)
        teacher, teacher_refused = self._columns_of("teacher", row)
        columns = student["input_ids"], student["labels"], teacher["input_ids"], teacher["labels"]
        return {**student, **self._join(*columns), **self._notes(row, refused or teacher_refused)}

    def _of_batch(self, prompt: dict[str, Any]) -> dict[str, Any]:
        rows = _rows_of(prompt)
        if not rows:
            return _joined([])
        for row in rows:
            self._hand_over(row)
        student, refused = self._columns_of_batch("student", prompt, rows)
        teacher, teacher_refused = self._columns_of_batch("teacher", prompt, rows)
        columns = student["input_ids"], student["labels"], teacher["input_ids"], teacher["labels"]
        found = [
            {**self._join(*sides), **self._notes(row, mine or theirs)}
            for row, mine, theirs, *sides in zip(rows, refused, teacher_refused, *columns, strict=True)
        ]
        return {**student, **_as_batch(found)}

    def _of_text(self, row: dict[str, Any]) -> dict[str, Any]:
        """Columns of the rows that a text is cut into; none for a text without tokens."""
        student = dict(_read(self.student, _batch_of(row)))
        if not student.get("input_ids"):
            return {}
        teacher, (refused,) = self._columns_of_batch("teacher", _batch_of(row), [row])
        ids, teacher_ids = student["input_ids"], teacher.get("input_ids", [])
        if len(ids) == len(teacher_ids) == 1:
            teacher_rows = list(zip(teacher_ids, teacher["labels"], strict=True))
        else:
            # The two sides are cut at different places.
            teacher_rows = self.reread(ids, row[self.student.field])
        found = [
            self._join(own, labels, *theirs)
            for own, labels, theirs in zip(ids, student["labels"], teacher_rows, strict=True)
        ]
        silent = [""] * len(ids)
        # The rows have one note for all of them.
        return {**student, **_as_batch(found), REFUSED: [refused, *silent[1:]], ONE_SIDED: silent}

    def _hand_over(self, row: dict[str, Any]) -> None:
        if self.one_sided is not None:
            hand_over(self.student, row)
            hand_over(self.teacher, row)

    def _columns_of(self, side: str, row: dict[str, Any]) -> tuple[dict[str, Any], str]:
        """A side's columns of a row, or where its template cannot render it none and a note that says why."""
        strategy = self.student if side == "student" else self.teacher
        try:
            # Strategies change the row they are given.
            return dict(_read_alone(strategy, copy.deepcopy(row))), ""
        except Exception as error:  # whatever a template raises, e.g. for a system message
            if side == "student" and self.one_sided is None:
                raise  # no template's
            return _no_columns(), dataset_report.refusal_note(side, error, row)

    def _columns_of_batch(
        self, side: str, prompt: dict[str, Any], rows: list[dict[str, Any]]
    ) -> tuple[dict[str, Any], list[str]]:
        """The same of a batch, with a note for each row.

        A strategy reads a batch of rows as a whole; where that fails, each row is read alone.
        """
        strategy = self.student if side == "student" else self.teacher
        try:
            return dict(_read(strategy, copy.deepcopy(prompt))), [""] * len(rows)
        except Exception:
            found = [self._columns_of(side, row) for row in rows]
        parts = [part for part, _ in found]
        columns = {column: [part.get(column, _no_ids()) for part in parts] for column in _columns(parts)}
        return columns, [note for _, note in found]

    def _notes(self, row: dict[str, Any], refused: str) -> dict[str, str]:
        """What is told of a row; refused: why a side cannot read it, "" where both can."""
        found = [] if refused or self.one_sided is None else self.one_sided.find(row)
        return {REFUSED: refused, ONE_SIDED: dataset_report.one_sided_note(found)}

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
            spelled = [text[start:stop] for start, stop in pairwise([0, *stops])]
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


def _read_alone(strategy: Any, row: dict[str, Any]) -> Any:
    """One row's columns."""
    field = _messages_of(strategy)
    # Of a batch, Axolotl would take what is neither messages nor JSON of some for a message.
    if strategy.supports_batched and (field is None or isinstance(row.get(field), list | str)):
        return _first(_read(strategy, _batch_of(row)))
    return _read(strategy, row)


def _messages_of(strategy: Any) -> str | None:
    """The column of its conversations; None where it reads none."""
    return getattr(getattr(strategy, "prompter", None), "field_messages", None)


def _is_batch(prompt: dict[str, Any], messages: str | None) -> bool:
    """Whether these are columns of rows by their shape, whatever is wrong with a row: a conversation holds dicts."""
    said = None if messages is None else prompt.get(messages)
    return all(isinstance(values, list) for values in prompt.values()) and not (
        said and all(isinstance(one, dict) for one in said)
    )


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


def _first(batch: dict[str, Any]) -> dict[str, Any]:
    """The first row of a batch."""
    return {column: values[0] for column, values in batch.items()}


def _as_batch(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Rows of the same columns, one at least, as a batch."""
    return {column: [row[column] for row in rows] for column in rows[0]}


def _joined(batches: list[dict[str, Any]]) -> dict[str, Any]:
    """Batches one after the other, those without rows left out; `datasets` wants a column where all are."""
    held = [batch for batch in batches if batch]
    found = {column: [value for batch in held for value in batch[column]] for column in _columns(held)}
    return found or {"input_ids": []}


def _columns(parts: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(column for part in parts for column in part))


def _trained(labels: list[int]) -> list[bool]:
    return [label != IGNORE for label in labels]
