"""Common-Support: what two models can both say at a segment, and one event for all the rest.

Shape letters as in core/segments.py: B segments, V ids of a side; S spans among them, K events of a span.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dskd_plugin.core.divergences import NEARLY_CERTAIN, Divergence, log1mexp, log_probs
from dskd_plugin.core.events import EventCompare, Events
from dskd_plugin.core.overlap import preferred
from dskd_plugin.core.segments import SegmentCompare, Side

Pairs = tuple[Tensor, Tensor]


class Completions:
    """Tokens that say one text in one vocabulary, and what is left of it after a prefix in the other.

    student_bytes, teacher_bytes: bytes of each id, None for ids without. student_of, teacher_of: the id that stands for
    each byte string, see `preferred`; the lowest where they are left out.
    """

    def __init__(
        self,
        student_bytes: Sequence[bytes | None],
        teacher_bytes: Sequence[bytes | None],
        student_of: Mapping[bytes, int] | None = None,
        teacher_of: Mapping[bytes, int] | None = None,
    ) -> None:
        self._bytes = student_bytes, teacher_bytes
        self._id_of = student_of or preferred(student_bytes)[0], teacher_of or preferred(teacher_bytes)[0]
        self._sorted = sorted(self._id_of[0]), sorted(self._id_of[1])
        # All of them together are no more pairs than the tokens have bytes.
        self._after: list[dict[bytes, Pairs]] = [{}, {}]

    def of_span(self, student_id: int, teacher_id: int, sizes: tuple[int, int]) -> Pairs:
        """Last tokens (student, teacher) that complete the same text, [K] each; the observed two are among them.

        student_id, teacher_id: the last tokens of the span on each side. sizes: tokens of each side.
        Where neither side has one token alone, or their bytes do not fit, these are all.
        """
        observed = torch.tensor([student_id]), torch.tensor([teacher_id])
        if min(sizes) > 1 or max(sizes) == 1:
            return observed
        whole = 0 if sizes[0] == 1 else 1
        ids = student_id, teacher_id
        text, last = self._bytes[whole][ids[whole]], self._bytes[1 - whole][ids[1 - whole]]
        if not text or not last or not text.endswith(last) or len(last) == len(text):
            return observed
        prefix, known = text.removesuffix(last), self._after[whole]
        if prefix not in known:
            known[prefix] = self._found_after(prefix, whole)
        found = known[prefix]
        has_observed = ((found[0] == student_id) & (found[1] == teacher_id)).any()
        return found if has_observed else observed

    def _found_after(self, prefix: bytes, whole: int) -> Pairs:
        """All pairs of tokens: one of the side `whole` that begins with the prefix, and its rest on the other side."""
        texts, id_of, rest_of = self._sorted[whole], self._id_of[whole], self._id_of[1 - whole]
        pairs = []
        for k in range(bisect_left(texts, prefix), len(texts)):
            if not texts[k].startswith(prefix):
                break
            rest = rest_of.get(texts[k][len(prefix) :])
            if rest is not None:
                pairs.append((id_of[texts[k]], rest) if whole == 0 else (rest, id_of[texts[k]]))
        pairs_K2 = torch.tensor(pairs, dtype=torch.long).view(-1, 2)
        return pairs_K2[:, 0].contiguous(), pairs_K2[:, 1].contiguous()


class CommonSupport(SegmentCompare):
    """dist over the events that both sides can realise with the tokens so far held fixed, and over the rest.

        q(k) = (product of the probabilities of the tokens before the last) p(u_k),   q(rest) = 1 - sum of q(k)

    u_k: at a pair the shared ids; at a span of one token against several the last tokens that complete the same text,
    `Completions`; else the observed one alone. Nothing is renormalised. At a pair the rest of a side that has none is
    as in events.teacher_masses.
    temperature: of every token's distribution. Returns [B] nats. The gradient reaches all of the student's tokens.
    Source: Common-Support distillation, arXiv 2610.28895.
    """

    opens = "last"

    def __init__(self, divergence: Divergence, temperature: float, events: Events, completions: Completions) -> None:
        """events: one for each shared id, and the rest; on the device of the logits."""
        self.divergence, self.temperature = divergence, temperature
        self._of_pairs = EventCompare(divergence, temperature, events)
        self._completions = completions

    def __call__(self, *, student: Side, teacher: Side, paired_B: Tensor) -> Tensor:
        pairs, spans = paired_B.nonzero()[:, 0], (~paired_B).nonzero()[:, 0]
        found_B = student.logits_BV.new_zeros(len(paired_B))
        if len(pairs):
            of_pairs = self._of_pairs(student_NV=student.logits_BV[pairs], teacher_NV=teacher.logits_BV[pairs])
            found_B = found_B.index_put((pairs,), of_pairs)
        if len(spans):
            student, teacher = student.at(spans), teacher.at(spans)
            own_ids_SK, their_ids_SK, there_SK = self.event_ids(student, teacher)
            own_SK, their_SK = (
                self.event_log_probs(side, ids_SK, there_SK)
                for side, ids_SK in ((student, own_ids_SK), (teacher, their_ids_SK))
            )
            found_B = found_B.index_put((spans,), self.divergence(student_NV=own_SK, teacher_NV=their_SK))
        return found_B

    def event_ids(self, student: Side, teacher: Side) -> tuple[Tensor, Tensor, Tensor]:
        """The ids of the events of each span on either side, [S, K], and which events there are.

        In place of one that is not there stands one that is.
        """
        ends = zip(student.ids_B.tolist(), teacher.ids_B.tolist(), strict=True)
        sizes = zip(student.sizes_B.tolist(), teacher.sizes_B.tolist(), strict=True)
        found = [self._completions.of_span(*ids, of) for ids, of in zip(ends, sizes, strict=True)]
        device = student.ids_B.device
        counts_S = torch.tensor([len(own) for own, _ in found])
        there_SK = (torch.arange(int(counts_S.max())) < counts_S[:, None]).to(device)
        own_SK, their_SK = (
            torch.where(there_SK, pad_sequence(list(ids), batch_first=True).to(device), last_S[:, None])
            for ids, last_S in zip(zip(*found, strict=True), (student.ids_B, teacher.ids_B), strict=True)
        )
        return own_SK, their_SK, there_SK

    def event_log_probs(self, side: Side, ids_SK: Tensor, there_SK: Tensor) -> Tensor:
        """Log-probabilities of the events and of the rest, [S, K + 1]; -inf for an event that is not there."""
        last_SV = log_probs(side.logits_BV, temperature=self.temperature)
        several_S = side.sizes_B > 1
        before_S = torch.where(several_S, side.others_B.clamp(max=NEARLY_CERTAIN), NEARLY_CERTAIN)
        named_SV = torch.zeros_like(last_SV, dtype=torch.bool).scatter(1, ids_SK, True)
        rest_S = last_SV.masked_fill(named_SV, -torch.inf).logsumexp(1)
        # What another prefix would have led to belongs to the rest as well.
        rest_S = torch.where(several_S, torch.logaddexp(log1mexp(before_S), before_S + rest_S), rest_S)
        said_SK = last_SV.gather(1, ids_SK) + torch.where(several_S, before_S, 0)[:, None]
        return torch.cat([said_SK.masked_fill(~there_SK, -torch.inf), rest_S[:, None]], dim=1)
