"""The loss of methods that say the teacher's distribution in the student's tokens, by bytes.

Shape letters: N pairs, Q further teacher rows, V ids of the student.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

from torch import Tensor, nn

from dskd_plugin.batch import StepBatch
from dskd_plugin.core.heads import Head
from dskd_plugin.core.objective import Objective
from dskd_plugin.core.prefixes import Places, PrefixCompare
from dskd_plugin.core.rows import Rows
from dskd_plugin.losses.direct import Direct


class ByBytes(Direct):
    """The student at each pair against what the teacher says there of the bytes that follow.

    places: see `text.prefix_maps.PrefixMaps.places`. silent_V: bool, rows with such a gold token are not compared; None
    for none.
    """

    def __init__(
        self,
        student: nn.Module,
        objective: Objective,
        compare: PrefixCompare,
        *,
        places: Callable[..., Places],
        silent_V: Tensor | None,
        **options: Any,
    ) -> None:
        super().__init__(student, objective, compare, **options)
        self._places, self._silent_V = places, silent_V

    def labelled(self, batch: StepBatch, student_head: Head) -> Rows:
        rows, reach = super().labelled(batch, student_head), batch.reach
        assert reach is not None and reach.teacher_QD is not None
        gold_N = batch.targets_R[: batch.aligned]
        further: list[Sequence[int]] = [()] * batch.aligned
        tokens = zip(reach.of_Q.tolist(), reach.teacher_targets_Q.tolist(), strict=True)
        for row, group in groupby(tokens, key=lambda one: one[0]):
            further[row] = [token for _, token in group]
        places = self._places(gold_N.tolist(), reach.offset_N.tolist(), reach.targets_N.tolist(), further)
        kd_N = None if self._silent_V is None else ~self._silent_V.to(gold_N.device)[gold_N]
        return replace(rows, places=places.of_states(reach.teacher_QD), kd_N=kd_N)
