"""On-policy rows: the current student answers the prompts of a batch, and the teacher reads the answers.

An answer becomes a row like any other: the student's tokens as sampled, the teacher's tokens of the same text in the
teacher's own template, and the aligned columns of both.
"""

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, LogitsProcessorList

from dskd_plugin.columns import COLUMNS, IGNORE, numbered, row_of
from dskd_plugin.generation.answer_text import PlainReader, control_tokens, decoded, leading_white_space, open_from
from dskd_plugin.generation.sampling import WithinVocabulary, batches_exactly, generating, left_padded, prompt_parts
from dskd_plugin.log import LOG
from dskd_plugin.models import causal_lm
from dskd_plugin.setting_blocks import OnPolicySettings
from dskd_plugin.text.align import Aligner
from dskd_plugin.text.reasoning import KNOWN, Markers
from dskd_plugin.text.responses import answers
from dskd_plugin.text.tokens import spell

COUNTS = ("answers", "tokens", "seconds", "empty", "cut", "unaligned", "skipped")
Sample = dict[str, Any]


@dataclass(frozen=True)
class Prompt:
    """What stands before the last response of a conversation, in both tokenizations.

    student_lead, teacher_lead: white space that one template puts before the answer and the other does not.
    Reasoning that one template opens in the prompt is open on both sides, or on neither, see `Rollout._level`.
    """

    student_ids: list[int]
    teacher_ids: list[int]
    student_lead: bytes = b""
    teacher_lead: bytes = b""


@dataclass(frozen=True)
class Answer:
    """A sampled answer: its tokens, and the token that ended it (None: cut at the limit or at a control token)."""

    ids: list[int]
    end: int | None


@dataclass
class Answers:
    """To the prompts of one group. rows: training rows, in the order of the prompts; tokens: sampled, ends included."""

    rows: list[Sample] = field(default_factory=list)
    tokens: int = 0


class Rollout:
    """Answers prompts with the student and makes training rows of the answers.

    aligner: the rules, tables and end-of-turn ids of the run's ordinary rows.
    teacher_len: longest teacher row in tokens; what is beyond it is cut off.
    student_len: longest student row; an answer is cut where its row reaches it. None: no limit.
    teacher_rows: rows of the teacher's embeddings; an answer is cut before a token beyond them. None: all have one.
    markers: of reasoning, in answers and at the end of prompts; they are text, also as special tokens of their own.
    counts: since the last `reset_counts`: answers; their student tokens, ends included; seconds of generation; empty
        (no token before the end); cut (no end of turn: at the limit, or before a control token); unaligned (no row
        paired with the teacher's, not returned); skipped (samples without a prompt, or whose prompt leaves no room).
    """

    def __init__(
        self,
        settings: OnPolicySettings,
        student_tokenizer: Any,
        teacher_tokenizer: Any,
        aligner: Aligner,
        *,
        seed: int,
        teacher_len: int,
        student_len: int | None = None,
        teacher_rows: int | None = None,
        markers: Sequence[Markers] = KNOWN,
    ) -> None:
        self.settings, self.aligner, self.seed = settings, aligner, seed
        self.teacher_len, self.student_len = teacher_len, student_len
        eos = getattr(student_tokenizer, "eos_token_id", None)
        self.stops = list(dict.fromkeys(token for token in (aligner.student_end, eos) if token is not None))
        pad = getattr(student_tokenizer, "pad_token_id", None)
        self._pad = pad if pad is not None else self.stops[0] if self.stops else 0
        texts = frozenset(text.encode() for pair in markers for text in pair)
        self._openings = sorted({opening.encode() for opening, _ in markers}, key=len, reverse=True)
        known = aligner.teacher.vocab_size if teacher_rows is None else teacher_rows
        self._reader = None if aligner.identity else PlainReader(teacher_tokenizer, aligner.teacher, texts, known)
        self._controls = control_tokens(aligner, texts)
        if aligner.identity:
            self._controls |= frozenset(range(known, aligner.student.vocab_size))
        self._others: list[Rollout] = []
        # Whether the model answers a padded batch as it answers each prompt alone; measured at the first answers.
        self.in_batches: bool | None = None
        self.reset_counts()

    def read_by_all(self, others: Sequence["Rollout"]) -> "Rollout":
        """This one, whose answers further teachers read as well, each by the rules of its own of `others`.

        An answer is cut where one of the teachers would cut it; prompts that one of them has no room for are skipped.
        """
        self._others = list(others)
        self._controls = self._controls.union(*(one._controls for one in others))
        return self

    @property
    def _each(self) -> list["Rollout"]:
        return [self, *self._others]

    def reset_counts(self) -> None:
        self.counts: dict[str, float] = dict.fromkeys(COUNTS, 0)

    def due(self, step: int, epoch: float) -> bool:
        """Whether this optimizer step is on-policy: one draw for all ranks, the same after a resumption."""
        draw = random.Random(f"on-policy step {self.seed} {step}").random()
        return epoch >= self.settings.start_epoch and draw < self.settings.fraction

    def answer(
        self,
        model: nn.Module,
        groups: Sequence[Sequence[Sample]],
        *,
        step: int,
        rank: int,
        autocast: torch.dtype | None = None,
    ) -> list[Answers]:
        """Training rows of the student's answers to the prompts of these rows, group by group.

        All prompts are answered together, whatever their group: a token of many answers costs little more than of one.
        model: the student, unwrapped from DDP or DeepSpeed, with its adapters; left as it was found.
        groups: rows of the dataset (dicts of lists), with the column teacher_prompt.
        (seed, step, rank) decide the sampled tokens; the global random state is left alone.
        autocast: dtype of the mixed precision that training uses, if any.
        Rows have the same keys and "on_policy": True; a group has fewer than samples where some were skipped or no
        token of the answer pairs with the teacher's, none where that holds for all.
        """
        positions = getattr(causal_lm(model).config.get_text_config(), "max_position_embeddings", None)
        made = [Answers() for _ in groups]
        asked: list[tuple[Answers, Sample, list[Prompt]]] = []
        for group, samples in zip(made, groups, strict=True):
            for sample in samples:
                prompts = self.prompts(sample, positions)
                if prompts is None:
                    self.counts["skipped"] += 1
                else:
                    asked.append((group, sample, prompts))
        if not asked:
            return made
        start = time.perf_counter()
        sampled = self.sample(
            model,
            [prompts[0].student_ids for _, _, prompts in asked],
            random.Random(f"on-policy answers {self.seed} {step} {rank}").getrandbits(63),
            autocast,
        )
        self.counts["seconds"] += time.perf_counter() - start
        for place, ((group, sample, prompts), new_ids) in enumerate(zip(asked, sampled, strict=True)):
            answer = self.read(new_ids)
            group.tokens += len(answer.ids) + (answer.end is not None)
            self.counts["answers"] += 1
            self.counts["empty"] += not answer.ids
            self.counts["cut"] += answer.end is None
            row, paired = self._read_row(sample, prompts, answer)
            if paired:
                group.rows.append(row)
            else:
                self.counts["unaligned"] += 1
            if rank == 0 and place < self.settings.log_samples:
                self._log(step, prompts[0], answer)
        self.counts["tokens"] += sum(group.tokens for group in made)
        return made

    # -- prompts ---------------------------------------------------------------------------------------------------

    def prompts(self, sample: Sample, positions: int | None) -> list[Prompt] | None:
        """The prompt of a row beside each teacher's; None where one of them has none.

        positions: the most that the student knows, None without a limit.
        """
        found = [one._prompt(row_of(sample, number), positions) for number, one in enumerate(self._each, start=1)]
        prompts = [prompt for prompt in found if prompt is not None]
        return prompts if len(prompts) == len(found) else None

    def _prompt(self, sample: Sample, positions: int | None) -> Prompt | None:
        """The prompt of the last response; None where there is none or it leaves no room for an answer."""
        student_ids = list(sample["input_ids"])
        trained = [label != IGNORE for label in sample["labels"]]
        inside = answers(student_ids, trained, self.aligner.student, self.aligner.student_end)
        stop = len(inside)
        while stop and not inside[stop - 1]:
            stop -= 1
        start = stop
        while start and inside[start - 1]:
            start -= 1
        teacher_ids, teacher_start = list(sample["teacher_input_ids"]), int(sample["teacher_prompt"])
        fits = positions is None or start + self.settings.max_new_tokens <= positions
        fits = fits and (self.student_len is None or start < self.student_len)
        if not (fits and start > 0 and 0 < teacher_start < min(self.teacher_len, len(teacher_ids))):
            return None
        leads = (
            leading_white_space(student_ids[start:stop], self.aligner.student),
            leading_white_space(teacher_ids[teacher_start:], self.aligner.teacher),
        )
        shared = 0
        while shared < min(map(len, leads)) and leads[0][-1 - shared] == leads[1][-1 - shared]:
            shared += 1
        return self._level(
            Prompt(
                student_ids[:start],
                teacher_ids[:teacher_start],
                leads[0][: len(leads[0]) - shared],
                leads[1][: len(leads[1]) - shared],
            )
        )

    def _level(self, prompt: Prompt) -> Prompt:
        """The prompt with reasoning open on the teacher's side where it is on the student's, which says what follows.

        The two templates may differ in whether they open it, and gold answers with reasoning show up to where.
        """
        ours = open_from(prompt.student_ids, self.aligner.student, self._openings)
        theirs = open_from(prompt.teacher_ids, self.aligner.teacher, self._openings)
        if (ours is None) == (theirs is None):
            return prompt
        if ours is None:
            return replace(prompt, teacher_ids=prompt.teacher_ids[:theirs])
        opened = prompt.student_ids[ours:]
        if self._reader is not None:
            text = prompt.teacher_lead.decode() + spell(opened, self.aligner.student).decode(errors="ignore")
            opened, _ = self._reader.ids(text, prompt.teacher_ids)
        return replace(prompt, teacher_ids=prompt.teacher_ids + opened, teacher_lead=b"")

    # -- sampling --------------------------------------------------------------------------------------------------

    def sample(
        self, model: nn.Module, prompts: list[list[int]], seed: int, autocast: torch.dtype | None
    ) -> list[list[int]]:
        """New tokens of each prompt, at most what its limits allow."""
        room = [
            min([self.settings.max_new_tokens] + ([] if self.student_len is None else [self.student_len - len(ids)]))
            for ids in prompts
        ]
        found: list[list[int]] = [[] for _ in prompts]
        with generating(model, seed, autocast) as generator:
            if self.in_batches is None:
                self.in_batches = batches_exactly(generator, self.aligner.student.vocab_size)
            for part in prompt_parts(prompts, room, self.in_batches):
                new = self._generate(generator, [prompts[k] for k in part], max(room[k] for k in part))
                for k, ids in zip(part, new, strict=True):
                    found[k] = ids[: room[k]]
        return found

    def _generate(self, generator: Any, prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
        config = GenerationConfig(
            do_sample=True,
            num_beams=1,
            temperature=self.settings.temperature,
            top_p=self.settings.top_p,
            top_k=self.settings.top_k,
            max_new_tokens=max_new_tokens,
            use_cache=True,
            eos_token_id=self.stops or None,
            pad_token_id=self._pad,
        )
        inputs = left_padded(prompts, self._pad, generator.device)
        within = WithinVocabulary(self.aligner.student.vocab_size)
        limits = LogitsProcessorList([within])
        # Each process answers for itself, also where transformers sees that an engine splits the weights.
        ids_BS = generator.generate(**inputs, generation_config=config, logits_processor=limits, synced_gpus=False)
        return ids_BS[:, inputs["input_ids"].shape[1] :].tolist()

    # -- rows ------------------------------------------------------------------------------------------------------

    def read(self, new_ids: list[int]) -> Answer:
        for place, token in enumerate(new_ids):
            if token in self.stops:
                return Answer(new_ids[:place], token)
            if token in self._controls:
                return Answer(new_ids[:place], None)
        return Answer(new_ids, None)

    def _read_row(self, sample: Sample, prompts: list[Prompt], answer: Answer) -> tuple[Sample, bool]:
        """The row with the columns of each teacher, and whether a token pairs with one of a teacher's."""
        found: Sample = {}
        paired = False
        for number, (one, prompt) in enumerate(zip(self._each, prompts, strict=True), start=1):
            row = one._row(row_of(sample, number), prompt, answer)
            paired = paired or bool(row["aligned_student"] or row.get("spans"))
            if number == 1:
                found = row
            else:
                found |= {numbered(column, number): row[column] for column in COLUMNS if column in row}
        return found, paired

    def _row(self, sample: Sample, prompt: Prompt, answer: Answer) -> Sample:
        response = answer.ids + ([] if answer.end is None else [answer.end])
        ids = prompt.student_ids + response
        teacher_response = self._teacher_response(prompt, answer)
        teacher_ids = (prompt.teacher_ids + teacher_response)[: self.teacher_len]
        columns = self.aligner.columns(
            ids,
            _response_mask(len(prompt.student_ids), len(ids)),
            teacher_ids,
            _response_mask(len(prompt.teacher_ids), len(teacher_ids)),
        )
        columns.pop("unmatched_responses")
        per_token = {
            "attention_mask": [1] * len(ids),
            "position_ids": list(range(len(ids))),
            "token_type_ids": [0] * len(ids),
            "length": len(ids),
        }
        return {
            **sample,
            **{key: value for key, value in per_token.items() if key in sample},
            "input_ids": ids,
            "labels": [IGNORE] * len(prompt.student_ids) + response,
            "teacher_input_ids": teacher_ids,
            **columns,
            "on_policy": True,
        }

    def _teacher_response(self, prompt: Prompt, answer: Answer) -> list[int]:
        """The teacher's tokens of the answer, its end of turn included if the student ended its turn."""
        if self._reader is None:
            ids, whole = answer.ids, True
        else:
            spelled = spell(answer.ids, self.aligner.student).removeprefix(prompt.student_lead)
            text, whole = decoded(spelled)
            ids, plain = self._reader.ids((prompt.teacher_lead if text else b"").decode() + text, prompt.teacher_ids)
            end = self.aligner.teacher_end
            if end in ids:
                ids, plain = ids[: ids.index(end)], False
            whole = whole and plain
        ended = answer.end is not None and whole and self.aligner.teacher_end is not None
        return ids + ([self.aligner.teacher_end] if ended else [])  # type: ignore[list-item]

    def _log(self, step: int, prompt: Prompt, answer: Answer) -> None:
        ended = "cut" if answer.end is None else "ended"
        LOG.info(
            "dskd: step %d, the student answers %r with %r (%d tokens, %s)",
            *(step, self._shown(prompt.student_ids)[-200:], self._shown(answer.ids), len(answer.ids), ended),
        )

    def _shown(self, ids: Sequence[int]) -> str:
        """Tokens of the student as text for the log; ids beyond its tokenizer have none."""
        table = self.aligner.student
        parts = [table.literal[token] or b"" for token in ids if token < table.vocab_size]
        return b"".join(parts).decode(errors="replace")


def _response_mask(prompt: int, length: int) -> list[bool]:
    return [False] * prompt + [True] * (length - prompt)


def pack(rows: list[Sample], budget: int) -> list[list[Sample]]:
    """Bins of rows of at most ``budget`` student tokens each (first fit); a longer row has a bin of its own."""
    bins: list[list[Sample]] = []
    sizes: list[int] = []
    for row in rows:
        length = len(row["input_ids"])
        place = next((k for k, size in enumerate(sizes) if size + length <= budget), None)
        if place is None:
            bins.append([row])
            sizes.append(length)
        else:
            bins[place].append(row)
            sizes[place] += length
    return bins
