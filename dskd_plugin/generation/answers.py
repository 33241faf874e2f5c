"""The teacher's answers: sampled in fixed batches, kept in a file that survives a kill at any point.

Shapes: B prompts of a batch, L longest of them, S steps, V vocabulary.
"""

import inspect
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import (
    Cache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from dskd_plugin.errors import SettingError
from dskd_plugin.generation.sampling import WithinVocabulary, left_padded
from dskd_plugin.text.tokens import spell
from dskd_plugin.text.vocabularies import token_table

Told = Callable[[int, int], None]  # tokens and ended answers since the last call


@dataclass(frozen=True)
class Answer:
    """row: number of the prompt; text: as generated, with its special tokens; tokens: the end included; finished: ended
    before the limit."""

    row: int
    text: str
    tokens: int
    finished: bool


@dataclass(frozen=True)
class Sampling:
    """temperature 0: the most likely token; top_k 0 and top_p 1: all tokens."""

    max_new_tokens: int
    temperature: float
    top_p: float
    top_k: int
    seed: int


def batches(lengths: Sequence[int], size: int) -> list[list[int]]:
    """All rows in batches of like length, longest first, so that too large a batch fails at once."""
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    return [order[start : start + size] for start in range(0, len(order), size)]


# Of so many answers that are being written, one leaves at once; of twice as many, two together, and so on:
# a restart costs some milliseconds, and a GPU gains little from a batch that is one row smaller.
_LEAVE_TOGETHER = 8


def numbers_of(sampling: Sampling, row: int) -> list[float]:
    """The random numbers of a row, one for each token that its answer may have."""
    source = random.Random(f"{sampling.seed}:{row}")
    return [source.random() for _ in range(sampling.max_new_tokens)]


class Draw(LogitsProcessor):
    """Leaves one token of each row: where the row's own random number falls in the cumulative probabilities.

    The numbers of a row come from (seed, row), so they depend neither on its batch nor on earlier runs.
    """

    def __init__(self, sampling: Sampling, rows: Sequence[int], prompt_length: int) -> None:
        self.numbers_BS = torch.tensor(
            [numbers_of(sampling, row) for row in rows],
            dtype=torch.float64,
        )
        self.prompt_length = prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        precise = torch.float32 if scores.device.type == "mps" else torch.float64
        cumulative_BV = scores.to(precise).softmax(-1).cumsum(-1)
        self.numbers_BS = self.numbers_BS.to(scores.device, precise)  # once
        number_B = self.numbers_BS[:, input_ids.shape[1] - self.prompt_length]
        # The last bits of the sum are rounding: never beyond the last token with a probability.
        target_B1 = (number_B.clamp(max=1 - 1e-6) * cumulative_BV[:, -1])[:, None]
        chosen_B1 = torch.searchsorted(cumulative_BV, target_B1, right=True)
        return torch.full_like(scores, -torch.inf).scatter(1, chosen_B1, 0.0)


def _processors(sampling: Sampling, vocab_size: int, rows: Sequence[int], prompt_length: int) -> LogitsProcessorList:
    found = LogitsProcessorList([WithinVocabulary(vocab_size)])
    if sampling.temperature > 0:
        if sampling.temperature != 1:
            found.append(TemperatureLogitsWarper(sampling.temperature))
        if sampling.top_k > 0:
            found.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            found.append(TopPLogitsWarper(sampling.top_p))
        found.append(Draw(sampling, rows, prompt_length))
    return found


class _Leaving(StoppingCriteria):
    """Follows a batch: which answers have ended, told after each step; stops it when ``enough`` of them have."""

    def __init__(self, size: int, ends: Sequence[int], enough: int, told: Told, device: torch.device) -> None:
        self.ended_B = torch.zeros(size, dtype=torch.bool, device=device)
        self.ends = torch.tensor(ends, device=device)
        self.enough, self.told, self._ended = enough, told, 0

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: object) -> Tensor:
        self.ended_B |= torch.isin(input_ids[:, -1], self.ends)
        before, ended = self._ended, int(self.ended_B.sum())
        self._ended = ended
        self.told(len(self.ended_B) - before, ended - before)
        return torch.full_like(self.ended_B, ended >= self.enough)


def _quiet(tokens: int, ended: int) -> None:
    """Nobody listens."""


class Writer:
    """The teacher as a writer of answers, free of the sampling defaults that its folder may carry."""

    def __init__(self, model: Any, tokenizer: Any, *, vocab_size: int, ends: list[int], sampling: Sampling) -> None:
        self.model, self.tokenizer, self.vocab_size = model, tokenizer, vocab_size
        self.ends, self.sampling, self.table = ends, sampling, token_table(tokenizer)
        self.pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0]
        # Families that keep no such cache (Mamba) answer the whole batch in one go.
        self.narrows = "past_key_values" in inspect.signature(model.forward).parameters
        model.generation_config = GenerationConfig()

    @torch.inference_mode()
    def answer(self, rows: Sequence[int], prompts: Sequence[Sequence[int]], told: Told = _quiet) -> list[Answer]:
        """One answer to each prompt, whatever else is in the batch up to rounding.

        A finished answer leaves the batch, so that the longest one does not hold the others' places.
        """
        ids_BS, mask_BS = left_padded(prompts, self.pad, self.model.device).values()
        length, cache, narrows = ids_BS.shape[1], None, self.narrows
        answers: dict[int, Answer] = {}
        unfinished = list(rows)
        while unfinished:
            enough = max(1, len(unfinished) // _LEAVE_TOGETHER) if narrows else len(unfinished)
            watch = _Leaving(len(unfinished), self.ends, enough, told, ids_BS.device)
            ids_BS, cache = self._write(unfinished, ids_BS, mask_BS, length, cache, watch)
            cut = ids_BS.shape[1] - length == self.sampling.max_new_tokens
            if cut:
                told(0, int((~watch.ended_B).sum()))
            gone_B = watch.ended_B | cut
            for row, gone, ids in zip(unfinished, gone_B.tolist(), ids_BS[:, length:].tolist(), strict=True):
                if gone:
                    answers[row] = self._read(row, ids)
            unfinished = [row for row in unfinished if row not in answers]
            stay: Any = (~gone_B).nonzero()[:, 0]
            if isinstance(cache, Cache):
                cache.reorder_cache(stay)
            else:  # a cache of the model's own kind: read all once more, then without a stop
                cache, narrows = None, False
            ids_BS = ids_BS[stay]
            mask_BS = pad(mask_BS[stay], (0, ids_BS.shape[1] - mask_BS.shape[1]), value=1)
        return [answers[row] for row in rows]

    def _write(
        self, rows: Sequence[int], ids_BS: Tensor, mask_BS: Tensor, length: int, cache: Any, watch: _Leaving
    ) -> tuple[Tensor, object]:
        """Go on with a batch until the watch stops it or the limit is reached: all ids, and what the model keeps."""
        config = GenerationConfig(
            do_sample=False,
            max_new_tokens=length + self.sampling.max_new_tokens - ids_BS.shape[1],
            eos_token_id=self.ends,
            pad_token_id=self.pad,
            use_cache=True,
            return_dict_in_generate=True,
        )
        made = self.model.generate(
            input_ids=ids_BS,
            attention_mask=mask_BS,
            generation_config=config,
            logits_processor=_processors(self.sampling, self.vocab_size, rows, length),
            stopping_criteria=StoppingCriteriaList([watch]),
            **({} if cache is None else {"past_key_values": cache}),
        )
        return made.sequences, made.get("past_key_values")

    def _read(self, row: int, ids: list[int]) -> Answer:
        end = next((k for k, token in enumerate(ids) if token in self.ends), None)
        # Special tokens inside an answer part its texts: without them, reasoning and answer would run together.
        # Spelled from the tokens' bytes: some tokenizers decode a line break as `<0x0A>`, or add spaces of their own.
        text = spell(ids[:end], self.table).decode("utf-8", "replace")
        text = text.removeprefix(" ") if self.table.dummy_prefix else text
        return Answer(
            row=row,
            text=text,
            tokens=len(ids) if end is None else end + 1,
            finished=end is not None,
        )


class Partial:
    """Answers of an unfinished run: a line with what makes them, then one line each, in the order of the batches."""

    def __init__(self, path: Path, made_with: dict[str, object], plan: list[list[int]], *, overwrite: bool) -> None:
        self.path, self.plan = path, plan
        self.answers: list[Answer] = []
        self.stream: BinaryIO = path.open("a+b")
        self._lock()
        start = self._resume(made_with, overwrite)
        self.stream.truncate(start)
        if not start:
            self._append([made_with])

    def _lock(self) -> None:
        try:
            import fcntl
        except ImportError:
            return
        try:
            fcntl.flock(self.stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.stream.close()
            raise SettingError(
                self.path,
                "to be its only writer",
                "another `dskd generate` at work",
                "Wait for it, or write elsewhere with --out.",
            ) from None

    def _resume(self, made_with: dict[str, object], overwrite: bool) -> int:
        """Take over the whole batches of an earlier run; returns the bytes to keep."""
        self.stream.seek(0)
        lines = self.stream.read().splitlines(keepends=True)
        if lines and not lines[-1].endswith(b"\n"):
            lines.pop()
        if len(lines) < 2:
            return 0
        try:
            earlier, *records = [json.loads(line) for line in lines]
            answers = [Answer(**record) for record in records]
            order = [row for batch in self.plan for row in batch]
            changed = _difference(earlier, made_with)
            damaged = not changed and [answer.row for answer in answers] != order[: len(answers)]
        except (ValueError, TypeError, AttributeError):
            changed, damaged = None, True
        if overwrite and (changed or damaged):
            return 0
        if damaged:
            self.stream.close()
            raise SettingError(
                self.path,
                "the answers of an unfinished run",
                "other content",
                "Remove the file, or start anew with --overwrite.",
            )
        if changed:
            self.stream.close()
            key, old, new = changed
            raise SettingError(
                self.path,
                f"an unfinished run with {key}: {new!r}",
                f"one with {old!r}",
                "Use the earlier value to go on with it, or start anew with --overwrite.",
            )
        whole = 0
        for batch in self.plan:
            if whole + len(batch) > len(answers):
                break
            whole += len(batch)
        self.answers = answers[:whole]
        return sum(map(len, lines[: 1 + whole])) if whole else 0

    def remaining(self) -> Iterator[list[int]]:
        done = len(self.answers)
        for batch in self.plan:
            if done <= 0:
                yield batch
            done -= len(batch)

    def append(self, answers: Sequence[Answer]) -> None:
        self._append([asdict(answer) for answer in answers])
        self.answers.extend(answers)

    def _append(self, records: Sequence[dict[str, object]]) -> None:
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        self.stream.write(lines.encode())
        self.stream.flush()

    def close(self) -> None:
        self.stream.close()

    def remove(self) -> None:
        self.close()
        self.path.unlink()


def _difference(old: object, new: object, name: str = "") -> tuple[str, object, object] | None:
    """The first setting that differs: (dotted name, old value, new value)."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in new | old:
            found = _difference(old.get(key), new.get(key), f"{name}.{key}" if name else key)
            if found:
                return found
        return None
    return None if old == new else (name, old, new)
