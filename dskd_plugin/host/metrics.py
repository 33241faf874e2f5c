"""What a run logs under ``dskd/``: exact means of the terms since the last log, over accumulation and ranks."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dskd_plugin.batch import StepBatch
from dskd_plugin.core.objective import CE_TERMS, RATES, TERMS, Objective, numbers_beside
from dskd_plugin.generation.rollout import COUNTS

# The order in which sums are kept; align_ratio, aligned rows out of all, stands last.
NAMES = (*TERMS, *RATES, "align_ratio")


# What each name under ``dskd/`` says, in the order of docs/metrics.md (`make docs`).
MEANINGS = {
    "ce": "cross-entropy of the gold tokens, nats (1.44 bits each) per response token",
    "t2s_kd": "divergence in the student's space, per row that takes part",
    "t2s_ce": "how far the projected teacher is from its labels, the teacher's distribution "
    "(`projector.labels: soft`, a divergence) or argmax (`hard`, a cross-entropy): how good the "
    "projector is",
    "s2t_kd": "divergence in the teacher's space",
    "kd": "the sum of the KD terms; with a method other than dskd its one term",
    "span_kl": "divergence of the likelihoods of a span, per span; enters `dskd/kd` with its weight",
    "kd_scale": "`kd_weight: balanced`: what the KD terms but `dskd/t2s_ce` were multiplied with in the last step; "
    "`dskd/kd` and its terms are logged without it",
    "ce_unpaired": "`unpaired: ce`, the default without `on_policy`: the part of `dskd/ce` of tokens of which the "
    "teacher does not say all, mostly those without a partner, their sum divided by "
    "all response tokens; all of `dskd/ce` in a step that the guard takes",
    "t2s_agreement": "share of aligned rows where the projected teacher predicts its own token; with `target: exact` "
    "the event of it",
    "t2s_inside": "`target: exact`: how much likelier, in nats, the projected teacher finds the gold token, given "
    "its event, than the student does; it shares out inside events while the mean of the last steps "
    "is above 0",
    "teacher_lead": "`target: exact`: how much likelier, in nats per aligned row, the teacher finds the event of the "
    "gold token than the student does; below 0 the student says the gold answers better than the teacher",
    "guarded": "`guard: true`, the default: share of the steps since the last line that learned from the gold answers "
    "alone, because `dskd/teacher_lead` was below 0 over the steps before ([guard](method.md#the-guard))",
    "s2t_agreement": "share of aligned rows where the projected student predicts the teacher's token",
    "align_ratio": "aligned rows / response rows",
    "rollout_answers": "with `on_policy`, over the steps since the last line and all ranks: sampled answers",
    "rollout_tokens": "their tokens",
    "rollout_seconds": "time spent on sampling, per rank",
    "rollout_empty": "answers without text",
    "rollout_cut": "answers without an end of turn, e.g. at `max_new_tokens`",
    "rollout_unaligned": "answers without an aligned row",
    "rollout_skipped": "rows without a prompt, or with one that leaves no room for an answer",
}


class WithoutPerplexity(dict[str, Any]):
    """Axolotl adds ppl = exp(loss), which means nothing for a mixture of losses."""

    def __setitem__(self, key: str, value: Any) -> None:
        if key not in ("ppl", "eval_ppl"):
            super().__setitem__(key, value)


def active_names(objective: Objective, *, exact: bool, in_pairs: bool) -> set[str]:
    """Terms and rates that the objective computes, and whether pairs are counted."""
    names = set(objective.terms)
    if objective.in_student_space:
        names.add("t2s_agreement")
    if objective.in_teacher_space:
        names.add("s2t_agreement")
    if exact:
        names |= {"t2s_inside", "teacher_lead"}
    if in_pairs:
        names.add("align_ratio")
    return names


def loss_of(means: dict[str, float], objective: Objective) -> float:
    """The loss, or a teacher's part of it, from the means of its terms."""
    return sum(share * means[term] for term, share in objective.shares().items())


def kd_of(means: dict[str, float], objective: Objective) -> float:
    """All KD terms in one, as if their teacher were the only one."""
    of_kd = (share * means[term] for term, share in objective.shares().items() if term not in CE_TERMS)
    return sum(of_kd) / (objective.kd_ratio * objective.teacher_weight)


def together(of_each: list[dict[str, float]], weights: list[float]) -> dict[str, float]:
    """What all teachers say, by their weights, and what each of them says, under a name that begins with its number."""
    if len(of_each) == 1:
        return of_each[0]
    first = of_each[0]
    # The cross-entropy is the same beside every teacher.
    found = {
        name: value if name == "ce" else sum(w * means[name] for w, means in zip(weights, of_each, strict=True))
        for name, value in first.items()
    }
    for number, means in enumerate(of_each, start=1):
        found |= {f"teacher{number}/{name}": value for name, value in means.items() if name != "ce"}
    return found


class Totals:
    """Sums and counts of training and of evaluation. over_ranks: the sum of a tensor over all processes."""

    def __init__(self, names: set[str], device: torch.device, over_ranks: Callable[[Tensor], Tensor]) -> None:
        self._names, self._device, self._over_ranks = names, device, over_ranks
        self._sums = {kind: self._nothing() for kind in ("train", "eval")}

    def _nothing(self) -> Tensor:
        return torch.zeros(len(NAMES), 2, dtype=torch.double, device=self._device)

    def add(self, kind: str, batch: StepBatch, like: Tensor) -> None:
        """Take in the sums of a micro-batch. like: a tensor on the device of the loss."""
        rows = [torch.stack([value.double() for value in batch.sums[name]]) for name in (*TERMS, *RATES)]
        rows.append(numbers_beside(like, [batch.aligned, batch.responses]))
        self._sums[kind] += torch.stack(rows)

    def means(self, kind: str) -> dict[str, float]:
        """Mean of each name since the last call, over all ranks."""
        totals = self._over_ranks(self._sums[kind]).tolist()
        self._sums[kind] = self._nothing()
        found = {}
        for name, (total, count) in zip(NAMES, totals, strict=True):
            if name in self._names:
                found[name] = total / max(count, 1.0)
        return found


def of_answers(totals: list[float], processes: int) -> dict[str, float]:
    """Counts of the sampled answers over all ranks, seconds per rank. totals: `COUNTS`, summed over ranks."""
    found = {f"rollout_{name}": value for name, value in zip(COUNTS, totals, strict=True)}
    found["rollout_seconds"] /= processes
    return found


def greater_is_better(args: Any, asked: bool | None) -> bool | None:
    """Whether a run's ``metric_for_best_model`` is to be large. asked: the recipe's ``greater_is_better``.

    Axolotl does not hand a ``false`` on, and transformers takes every name that does not end in "loss" for a score.
    """
    name = (args.metric_for_best_model or "").removeprefix("eval_")
    if asked is None and name.startswith("dskd/"):
        return name.rpartition("/")[2] in (*RATES, "align_ratio")
    default: bool | None = args.greater_is_better
    return default if asked is None else asked
