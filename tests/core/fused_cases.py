"""Small losses that the fused backend covers, for its tests on the CPU (tests/core) and on a GPU (tests/gpu).

R rows, N of them with a partner; V and U ids, of heads with more rows than ids; K events.
"""

import dataclasses
from functools import cached_property

import torch

from dskd_plugin.core.baselines import MappedIds, SameIds, SharedIds
from dskd_plugin.core.blockwise import baseline_loss, cma_loss, dskd_loss
from dskd_plugin.core.divergences import divergence, forward_kl
from dskd_plugin.core.events import EventCompare, Events, Exact
from dskd_plugin.core.heads import Head
from dskd_plugin.core.objective import Objective
from dskd_plugin.core.rows import Rows, Spans, row_masks

R, N, M, V, U, D, E = 9, 6, 7, 21, 19, 5, 6
NAN = float("nan")
# 21 and 19 ids: two full tiles of 8 and a part of a third. Event 3 has many ids, so that it runs over tiles.
STUDENT_V = [0, 1, 2, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 4, 5, 5, 6, 7, 8, 9, 9]
TEACHER_U = [5, 4, 3, 3, 3, 2, 1, 0, 6, 7, 8, 9, 9, 3, 3, 3, 3, 3, 0]
TABLES = {
    "events": (STUDENT_V, TEACHER_U),
    "rest of the student alone": (STUDENT_V, [0 if event == 9 else event for event in TEACHER_U]),
    "rest of the teacher alone": ([0 if event == 9 else event for event in STUDENT_V], TEACHER_U),
}
SHARED = ([0, 2, 3, 7, 20], [18, 0, 5, 6, 7])
IMAGE = [3, -1, 0, 0, 8, 1, -1, 2, 7, 5, 4, -1, 20, 20, 11, 11, 11, 9, 3]

HEADS = {
    "plain": {},
    "padded, with a bias": {"padding": 3, "bias": True},
    "scaled": {"scale": 0.7},
    "capped": {"padding": 2, "scale": 1.3, "softcap": 4.0, "bias": True},
}
KNOBS = {"js": {"teacher_share": 0.3}, "skewed_forward_kl": {"skew": 0.2}, "skewed_reverse_kl": {"skew": 0.2}}

# name -> what is compared, what of it, and the settings of the objective
LOSSES = {
    "sft": ("nothing", None, {}),
    "kd": ("distributions", "same", {}),
    "kd alone": ("distributions", "same", {"kd_ratio": 1.0}),
    "kd at temperature 1": ("distributions", "same", {"temperature": 1.0}),
    "kd, unpaired rows whole": ("distributions", "same", {"unpaired_ce": True}),
    "kd, some rows": ("distributions", "masked", {"unpaired_ce": True}),
    "kd, spans": ("distributions", "same", {"span_weight": 0.5}),
    "shared ids": ("distributions", "shared", {}),
    "mined": ("distributions", "mapped", {}),
    "events": ("distributions", "events", {}),
    "events, open rows whole": ("distributions", "events", {"unpaired_ce": True}),
    "rest of the student alone": ("distributions", "rest of the student alone", {}),
    "rest of the teacher alone": ("distributions", "rest of the teacher alone", {}),
    "projected, hard labels": ("spaces", None, {"agreement_mask": True}),
    "projected, soft labels": ("spaces", "mapped", {}),
    "both spaces": ("spaces", "mapped", {"spaces": "both"}),
    "teacher's space": ("spaces", None, {"spaces": "teacher"}),
    "warm-up": ("spaces", "mapped", {"spaces": "both", "projectors_alone": True}),
    "exact": ("spaces", "exact", {}),
    "exact at temperature 1": ("spaces", "exact", {"temperature": 1.0}),
    "exact, own shares": ("spaces", "exact, own shares", {}),
    "exact, hard labels": ("spaces", "exact, hard labels", {}),
    "exact, open rows whole": ("spaces", "exact", {"unpaired_ce": True}),
    "exact, gold alone": ("spaces", "exact", {"unpaired_ce": True, "gold_alone": True}),
    "exact, both spaces": ("spaces", "exact", {"spaces": "both"}),
    "attention": ("attention", None, {"spaces": "both"}),
}


class Case:
    """One loss with everything that it depends on, in a dtype and on a device; the same numbers in all of them."""

    LEAVES = ("student", "weight", "bias", "t2s")

    def __init__(self, name, *, head="capped", kind="forward_kl", dtype=torch.float64, device="cpu", rounded=None):
        """rounded: a dtype to which all numbers are rounded first."""
        self.compares, self.what, settings = LOSSES[name]
        self.head, self.divergence = dict(HEADS[head]), divergence(kind, **KNOBS.get(kind, {}))
        generator = torch.Generator().manual_seed(3)

        def draw(*shape, by=1.0):
            drawn = by * torch.randn(*shape, generator=generator, dtype=torch.float64)
            return drawn.to(rounded or dtype).to(device, dtype)

        padding = self.head.get("padding", 0)
        self.student, self.weight = draw(R, D), draw(V + padding, D)
        self.bias = draw(V + padding) if self.head.get("bias") else None
        self.ids = V if self.what in ("same", "masked") else U
        self.teacher, self.teacher_weight = draw(M, E), draw(self.ids + padding, E)
        self.teacher_bias = draw(self.ids + padding) if self.head.get("bias") else None
        maps = (N, D), (M, E)
        self.t2s = draw(*maps[0]) if self.compares == "attention" else draw(E, D, by=0.5)
        self.s2t = draw(*maps[1]) if self.compares == "attention" else draw(D, E, by=0.5)
        self.labels = torch.randint(V, (R,), generator=generator).to(device)
        self.device, self.dtype = device, dtype
        compares = "spaces" if self.compares == "attention" else self.compares
        defaults = {"temperature": 2.0, "kd_ratio": 0.4, "spaces": "student", "agreement_mask": False}
        self.objective = Objective(divergence=self.divergence, compares=compares, **defaults | settings)
        self.divisors = torch.tensor([11.0, 4, 5, 7, 6, 3, 0], device=device)
        for name in self.LEAVES:
            if getattr(self, name) is not None:
                getattr(self, name).requires_grad_()

    def leaves(self):
        leaves = {name: getattr(self, name) for name in self.LEAVES}
        if self.compares in ("nothing", "distributions"):
            del leaves["t2s"]
        return {name: leaf for name, leaf in leaves.items() if leaf is not None and leaf.requires_grad}

    @cached_property
    def rows(self):
        def where(*places, of):
            return torch.tensor([n not in places for n in range(of)], device=self.device)

        given = {"teacher_NE": self.teacher[:N]}
        if self.compares == "nothing":
            given = {}
        if self.compares in ("spaces", "attention") and "exact" not in str(self.what):
            given["label_N"] = torch.tensor([4, 0, -1, 20, 7, -1], device=self.device)
            given["s2t_N"] = where(2, of=N)
            given["agree_N"] = where(0, 4, of=N) if self.objective.agreement_mask else None
        if self.compares == "attention":
            given["s2t_M"] = where(1, 3, of=M)
        if self.what == "masked":
            given["kd_N"], given["ce_R"] = where(1, 4, of=N), where(1, 8, of=R)
        if self.objective.unpaired_ce and self.what in ("events", "exact"):
            given["open_N"] = ~where(1, 3, of=N)
        if self.objective.span_weight:
            rows_P, of_P = torch.tensor([6, 7, 8], device=self.device), torch.tensor([0, 0, 1], device=self.device)
            teacher_C = torch.tensor([-3.0, -1.0], dtype=torch.float64, device=self.device)
            given["spans"] = Spans(rows_P=rows_P, of_P=of_P, teacher_C=teacher_C)
        return Rows(student_RD=self.student, labels_R=self.labels, **given)

    def table(self, name):
        student_V, teacher_U = (torch.tensor(side) for side in TABLES.get(name, TABLES["events"]))
        return Events(student_V, teacher_U, 10).to(torch.device(self.device))

    @cached_property
    def compare(self):
        """What the two sides of a pair are compared by."""
        tau, ids = self.objective.temperature, [torch.tensor(side, device=self.device) for side in SHARED]
        if self.what in TABLES:
            return EventCompare(self.divergence, tau, self.table(self.what))
        return {
            "same": SameIds(self.divergence, tau),
            "masked": SameIds(self.divergence, tau),
            "shared": SharedIds(self.divergence, tau, *ids),
            "mapped": MappedIds(tau, torch.tensor(IMAGE, device=self.device), V),
        }.get(self.what)

    @cached_property
    def target(self):
        """What the projector learns, and the exact target."""
        exact, soft_labels = None, MappedIds(1.0, torch.tensor(IMAGE, device=self.device), V)
        if "exact" in str(self.what):
            exact = Exact(self.table("events"), shares_inside=self.what != "exact, own shares")
            soft_labels = EventCompare(forward_kl, 1.0, exact.events)
        if self.what is None or "hard" in self.what:
            soft_labels = None
        return {"exact": exact, "soft_labels": soft_labels}

    def loss(self, engine, *, rows=None, block_elements=10**6):
        """The loss and its sums."""
        rows = self.rows if rows is None else rows
        scale, softcap = self.head.get("scale", 1.0), self.head.get("softcap")
        options = {
            "student_head": Head(self.weight, V, self.bias, scale, softcap),
            "teacher_head": Head(self.teacher_weight, self.ids, self.teacher_bias, scale, softcap),
            "objective": self.objective,
            "divisors_T": self.divisors,
            "block_elements": block_elements,
            "engine": engine,
        }
        if self.compares in ("nothing", "distributions"):
            return baseline_loss(rows, **options, compare=self.compare)
        if self.compares == "attention":
            maps = {"t2s_Nd": self.t2s, "s2t_MD": self.s2t, "teacher_MD": self.teacher}
            return cma_loss(rows, **options | maps)
        maps = {
            "t2s_Dd": None if self.objective.spaces == "teacher" else self.t2s,
            "s2t_dD": None if self.objective.spaces == "student" else self.s2t,
        }
        return dskd_loss(rows, **options | maps | self.target)

    def numbers(self, engine, **options):
        """The loss, the sum and count of every term, and the gradient of each leaf, by name."""
        loss, sums = self.loss(engine, **options)
        leaves = self.leaves()
        found = {"loss": loss.detach()}
        found |= {
            f"{name}, {what}": value for name, pair in sums.items() for what, value in zip("sn", pair, strict=True)
        }
        if loss.requires_grad:
            gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
            for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
                found[f"gradient of {name}"] = torch.zeros_like(leaf) if gradient is None else gradient
        return found

    def with_nan(self):
        """The same case with NaN in every row that no term takes."""
        rows = self.rows
        masks = row_masks(rows, self.objective)
        taken_N = torch.stack([mask for mask in (masks.get("t2s_ce"), masks.get("kd")) if mask is not None]).any(0)
        with torch.no_grad():
            self.teacher[:N][~taken_N] = NAN
            taken_R = masks["ce"].clone()
            taken_R[:N] |= masks["t2s_kd" if "t2s_kd" in masks else "kd"]
            self.student[~taken_R] = NAN
        return dataclasses.replace(rows, teacher_NE=self.teacher[:N], student_RD=self.student)


def worst_excess(found, naive, truth, floor):
    """How far the found numbers are beyond the error of the naive ones plus a floor; at most 0 is good.

    All by name, against the truth in float64. Returns the name and the excess, as a share of the largest number there.
    """
    excess = {}
    for name, exact in truth.items():
        scale = exact.abs().max().clamp(min=1e-6)
        errors = [(side[name].double().to(exact.device) - exact).abs().max() / scale for side in (found, naive)]
        excess[name] = float(errors[0] - errors[1]) - floor
    return max(excess.items(), key=lambda item: item[1])
