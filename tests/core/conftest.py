import importlib.util
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dskd_plugin.core.baselines import MappedIds
from dskd_plugin.core.blockwise import baseline_loss
from dskd_plugin.core.divergences import divergence
from dskd_plugin.core.heads import Head
from dskd_plugin.core.objective import Objective
from dskd_plugin.core.rows import Rows, counts

NAN = float("nan")


def _import_cases() -> None:
    """fused_cases.py, loaded by path because test folders are not packages, for tests that import its helpers."""
    spec = importlib.util.spec_from_file_location("fused_cases", Path(__file__).with_name("fused_cases.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)


_import_cases()


class Largest(TorchDispatchMode):
    """Sees every tensor that an operation makes, also within autograd's own steps."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return out


@pytest.fixture(scope="session")
def largest():
    return Largest


@dataclass
class Case:
    """One micro-batch and everything that its loss depends on, for the product and for the oracle."""

    student: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    t2s: torch.Tensor
    s2t: torch.Tensor
    teacher: torch.Tensor
    teacher_weight: torch.Tensor
    teacher_bias: torch.Tensor | None
    gold: list[int]
    label: list[int]
    s2t_rows: list[bool]
    ids: int
    teacher_ids: int
    scale: float
    softcap: float | None
    settings: dict[str, Any]
    agree: list[bool] = field(default_factory=list)

    LEAVES = ("student", "weight", "bias", "t2s")

    def leaves(self):
        """Name -> tensor of everything that may get a gradient."""
        return {name: getattr(self, name) for name in self.LEAVES if getattr(self, name) is not None}

    def to(self, dtype):
        """The same case in another dtype, with fresh leaves."""
        for name in (*self.LEAVES, "s2t", "teacher", "teacher_weight", "teacher_bias"):
            value = getattr(self, name)
            if value is not None:
                setattr(self, name, value.detach().to(dtype).requires_grad_())
        return self

    def rows(self):
        return Rows(
            student_RD=self.student,
            labels_R=torch.tensor(self.gold, dtype=torch.long),
            teacher_NE=self.teacher,
            label_N=torch.tensor(self.label, dtype=torch.long),
            agree_N=torch.tensor(self.agree, dtype=torch.bool),
            s2t_N=torch.tensor(self.s2t_rows, dtype=torch.bool),
        )

    def objective(self, **changes):
        settings = self.settings | changes
        kind, knobs = settings["divergence"], settings.get("knobs", {})
        return Objective(
            divergence=divergence(kind, **knobs),
            temperature=settings["temperature"],
            kd_ratio=settings["kd_ratio"],
            spaces=settings["spaces"],
            agreement_mask=settings["agreement_mask"],
            compares="spaces",
        )

    def compared(self, compare, kind, tau, *, rows=None, divisors, block_elements, **options):
        """What baseline_loss makes of two distributions. rows: None for pairs alone; divisors: None for counts."""
        if rows is None:
            rows = Rows(student_RD=self.student, labels_R=torch.tensor(self.gold), teacher_NE=self.teacher)
        objective = Objective(
            divergence=divergence(kind),
            temperature=tau,
            kd_ratio=0.4,
            spaces="student",
            agreement_mask=False,
            compares="distributions",
            **options,
        )
        return baseline_loss(
            rows,
            student_head=self.student_head(),
            teacher_head=self.teacher_head(),
            compare=compare,
            objective=objective,
            divisors_T=counts(rows, objective) if divisors is None else divisors,
            block_elements=block_elements,
        )

    def whole(self):
        """The case without a teacher's state that is not a number."""
        with torch.no_grad():
            self.teacher.nan_to_num_(0.4)
        return self

    def student_head(self):
        return Head(self.weight, self.ids, self.bias, self.scale, self.softcap)

    def teacher_head(self):
        return Head(self.teacher_weight, self.teacher_ids, self.teacher_bias, self.scale, self.softcap)

    def parts(self, **changes):
        """Keyword arguments of dskd_loss."""
        return {
            "student_head": self.student_head(),
            "teacher_head": self.teacher_head(),
            "t2s_Dd": self.t2s,
            "s2t_dD": self.s2t,
            "objective": self.objective(**changes),
            "soft_labels": MappedIds(1.0, torch.tensor(self.settings["image"]), self.ids)
            if self.settings["image"]
            else None,
        }

    def floats(self, divisors=None, **changes):
        """The case as the oracle reads it."""
        settings = self.settings | changes

        def plain(x):
            return None if x is None else x.detach().double().tolist()

        return {
            "student": plain(self.student),
            "t2s": plain(self.t2s),
            "s2t": plain(self.s2t),
            "teacher": plain(self.teacher),
            "head": self._head(plain(self.weight), plain(self.bias)),
            "teacher_head": self._head(plain(self.teacher_weight), plain(self.teacher_bias)),
            "gold": self.gold,
            "label": self.label,
            "s2t_rows": self.s2t_rows,
            "ids": self.ids,
            "teacher_ids": self.teacher_ids,
            "distance": settings["divergence"],
            "temperature": settings["temperature"],
            "kd_ratio": settings["kd_ratio"],
            "spaces": settings["spaces"],
            "agreement_mask": settings["agreement_mask"],
            "image": settings["image"],
            "divisors": divisors,
        }

    def live(self):
        return {
            name: getattr(self, name) if value is None else value.detach().double().tolist()
            for name in self.LEAVES
            for value in [getattr(self, name)]
        }

    def _head(self, weight, bias):
        return {"weight": weight, "bias": bias, "scale": self.scale, "softcap": self.softcap}


@pytest.fixture(scope="session")
def make_case(oracle):
    """Build a Case: 7 response rows, 5 with a partner, of which row 2 has no label and row 3 no s2t.

    Rows 0 and 1 agree unless there are fewer pairs. The teacher row that no term uses holds NaN.
    image: student id of each teacher id, or -1, for soft labels of the projector; None for hard ones.
    """

    def build(
        *,
        seed=0,
        rows=7,
        pairs=5,
        bias=True,
        scale=1.0,
        softcap=None,
        padding=2,
        dtype=torch.float64,
        **settings,
    ):
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape, by=1.0):
            return by * torch.randn(*shape, generator=generator, dtype=torch.float64)

        ids, teacher_ids, d, D = 9, 11, 4, 5
        case = Case(
            student=draw(rows, d),
            weight=draw(ids + padding, d),
            bias=draw(ids + padding) if bias else None,
            t2s=draw(D, d, by=0.5),
            s2t=draw(d, D, by=0.5),
            teacher=draw(pairs, D),
            teacher_weight=draw(teacher_ids + 1, D),
            teacher_bias=draw(teacher_ids + 1) if bias else None,
            gold=torch.randint(ids, (rows,), generator=generator).tolist(),
            label=[-1] * pairs,
            s2t_rows=[n != 3 and n != 4 for n in range(pairs)],
            ids=ids,
            teacher_ids=teacher_ids,
            scale=scale,
            softcap=softcap,
            settings={
                "divergence": "forward_kl",
                "temperature": 2.0,
                "kd_ratio": 0.4,
                "spaces": "both",
                "agreement_mask": True,
                "image": None,
            }
            | settings,
        )
        floats = case.floats()
        for n in range(pairs):
            projected = oracle.row_times_matrix(floats["teacher"][n], floats["t2s"])
            best = oracle.argmax(oracle.logits(projected, floats["head"])[:ids])
            case.label[n] = -1 if n in (2, 4) else best if n < 2 else (best + 1) % ids
            case.agree.append(case.label[n] == best)
        if pairs > 4:
            case.teacher[4] = NAN
        return case.to(dtype)

    return build
