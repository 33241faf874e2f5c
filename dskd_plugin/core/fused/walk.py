"""The row-block engine on kernels: the sums of a block and their gradients, without an autograd graph over logits.

Where the reference follows a graph from a sum back to hidden states, a kernel writes the gradient of the weighted sum
over the logits, and one product with the head takes it on. What stands before the hidden states (the maps between the
spaces) is left to autograd, see `Walk.handed`.

Shape letters as in objective.py; K rows in the teacher's space.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dskd_plugin.core.baselines import MappedIds, SameIds, SharedIds
from dskd_plugin.core.events import EventCompare, Events, Exact
from dskd_plugin.core.fused import launch
from dskd_plugin.core.fused.launch import Gold, Logits, Masses, Other
from dskd_plugin.core.fused.terms import Block, TeacherLogits, kd, t2s
from dskd_plugin.core.heads import Head, add_weight_gradient
from dskd_plugin.core.objective import TERMS, Compare, Sums
from dskd_plugin.core.reduce import keep_rows, masked_sum
from dskd_plugin.core.rows import row_masks
from dskd_plugin.core.segments import Others
from dskd_plugin.core.teacher_rows import TeacherRows, states_read
from dskd_plugin.core.terms import needed_rows
from dskd_plugin.core.walk import Walk


class FusedWalk(Walk):
    """Takes the place of `Walk` where the kernels have what is compared, and is that walk where they have not."""

    def covers(
        self,
        *,
        compare: Compare | None = None,
        soft_labels: Compare | None = None,
        exact: Exact | None = None,
        others: Others | None = None,
        **_: Any,
    ) -> bool:
        """Whether the kernels have all that is compared."""
        if isinstance(compare, SameIds | SharedIds | EventCompare):
            known = launch.covers(compare.divergence)
        else:
            known = compare is None or isinstance(compare, MappedIds)
        if self.objective.compares == "spaces":
            labels = MappedIds if exact is None else EventCompare
            known &= soft_labels is None or isinstance(soft_labels, labels)
            known &= launch.covers(self.objective.divergence)
        return known and others is None

    # -- the teacher -----------------------------------------------------------------------------------------------

    def read_teacher(self, block: slice, head: Head, **reads: Any) -> TeacherRows | None:
        if not self.covers(**reads):
            return super().read_teacher(block, head, **reads)
        compare, exact = reads.get("compare"), reads.get("exact")
        labels = exact is not None or reads.get("soft_labels") is not None
        kept_NE = states_read(self.rows.block(block), self.objective, labels=labels)
        if kept_NE is None:
            return None
        logits = Logits.of(kept_NE, head.detach().real())
        if isinstance(compare, EventCompare):
            return TeacherLogits(None, _masses(logits, compare.events, {compare.temperature}))
        if exact is not None:
            masses = _masses(logits, exact.events, {1.0, self.objective.temperature})
            return TeacherLogits(logits if self.objective.in_teacher_space else None, masses)
        return TeacherLogits(logits)

    def read_states(self, teacher_KD: Tensor) -> TeacherRows:
        if not self.covers():
            return super().read_states(teacher_KD)
        return TeacherLogits(Logits.of(teacher_KD, self.constant_teacher_head.real()))

    # -- the two spaces --------------------------------------------------------------------------------------------

    def student_space(
        self,
        block: slice,
        teacher: TeacherRows | None,
        *,
        student_RD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        **more: Any,
    ) -> Sums:
        if not self.covers(**more):
            return super().student_space(
                block, teacher, student_RD=student_RD, weight_VD=weight_VD, bias_V=bias_V, **more
            )
        rows = replace(self.rows.block(block), student_RD=student_RD.detach())
        masks = row_masks(rows, self.objective)
        pull_R = None if self.pull_R is None else self.pull_R[block]
        with_gold = self.objective.with_ce or pull_R is not None
        size = len(rows) if with_gold else rows.pairs
        if not size or not (with_gold or "t2s_kd" in masks or "kd" in masks):
            return {}
        moves = any(name in self.gradients for name in ("student_RD", "weight_VD", "bias_V"))
        part = Block(rows, masks, self.objective, self.student_head, self._weights(), teacher, moves)
        with torch.no_grad():
            kept_RD = keep_rows(rows.student_RD[:size], needed_rows(rows, masks, pull_R)[:size])
            own = Logits.of(kept_RD, self.student_head)
            gold = Gold(rows.labels_R, part.weight_of_gold(pull_R)) if with_gold else None
            sums, nll_R = self._terms(part, own, gold, **more)
            if self.objective.with_ce:
                sums["ce"] = masked_sum(nll_R, masks["ce"])
            if "ce_unpaired" in masks:
                sums["ce_unpaired"] = masked_sum(nll_R, masks["ce_unpaired"])[0], sums["ce"][1]
            gradient_RV = own.product_NV
            if "weight_VD" in self.gradients:
                add_weight_gradient(self.gradients["weight_VD"], gradient_RV, kept_RD.to(gradient_RV.dtype))
        if student_RD.requires_grad:
            self._hand_on(student_RD[:size], gradient_RV, self.student_head)
        if bias_V is not None and bias_V.requires_grad:
            self.handed.append((bias_V, gradient_RV.sum(0, dtype=self.dtype).to(bias_V.dtype)))
        return sums

    def _terms(
        self,
        part: Block,
        own: Logits,
        gold: Gold | None,
        *,
        compare: Compare | None = None,
        t2s_Nd: Tensor | None = None,
        **labels: Any,
    ) -> tuple[Sums, Tensor]:
        """The KD terms of a block, and the cross-entropy of its rows; their gradient goes over the logits."""
        pairs = part.rows.pairs
        of_pairs, gold_of_pairs = own.part(0, pairs), None if gold is None else gold.part(0, pairs)
        sums: Sums = {}
        if pairs and "kd" in part.masks:
            assert compare is not None
            kd_N, nll_N = kd(part, of_pairs, gold_of_pairs, compare)
            sums["kd"] = masked_sum(kd_N, part.masks["kd"])
        elif pairs and "t2s_kd" in part.masks:
            assert t2s_Nd is not None
            learns = t2s_Nd.requires_grad
            sums, nll_N, theirs = t2s(part, of_pairs, gold_of_pairs, t2s_Nd.detach(), learns, **labels)
            if learns:
                self._hand_on(t2s_Nd, theirs.product_NV, self.student_head)
        else:
            nll_N = launch.cross_entropy_of(of_pairs, gold_of_pairs, write=part.moves)
        if gold is None:
            return sums, nll_N
        rest = pairs, len(part.rows)
        return sums, torch.cat([nll_N, launch.cross_entropy_of(own.part(*rest), gold.part(*rest), write=part.moves)])

    def teacher_space(self, s2t_KD: Tensor, teacher: TeacherRows, mask_K: Tensor) -> Sums:
        if not isinstance(teacher, TeacherLogits):
            return super().teacher_space(s2t_KD, teacher, mask_K)
        head, temperature, moves = self.constant_teacher_head.real(), self.objective.temperature, s2t_KD.requires_grad
        with torch.no_grad():
            own, theirs = Logits.of(keep_rows(s2t_KD.detach(), mask_K), head, temperature), teacher.at(temperature)
            agree_K = own.argmax() == theirs.argmax()
            weight_K = self._weights()["s2t_kd"] * mask_K
            s2t_kd_K, _ = launch.compare(own, Other(theirs), self.objective.divergence, weight_K, write=moves)
        if moves:
            self._hand_on(s2t_KD, own.product_NV, head)
        return {
            "s2t_kd": masked_sum(s2t_kd_K, mask_K),
            "s2t_agreement": masked_sum(agree_K.to(s2t_kd_K.dtype), mask_K),
        }

    # -- gradients -------------------------------------------------------------------------------------------------

    def _weights(self) -> dict[str, Tensor]:
        """What the sum of each term weighs in the gradients that are collected."""
        return dict(zip(TERMS, self.relative_T, strict=True))

    def _hand_on(self, hidden_ND: Tensor, gradient_NV: Tensor, head: Head) -> None:
        """The gradient by the logits as one by the states that they were made of."""
        self.handed.append((hidden_ND, (gradient_NV @ head.weight_VD).to(hidden_ND.dtype)))


def _masses(logits: Logits, events: Events, temperatures: set[float]) -> dict[float, Masses]:
    return {
        temperature: launch.event_masses(logits.at(temperature), events.teacher_ids, events.count)
        for temperature in sorted(temperatures)
    }
