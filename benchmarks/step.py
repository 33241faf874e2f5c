"""`python -m benchmarks.step`: what a training step costs beside the least that it could.

The floor F is plain fine-tuning of the student, forward and backward, and the teacher's decoder without its head. Each
method is compared with F, with fine-tuning, with the target 1.1 F + one product with the teacher's head + two with the
student's on the paired rows, and with the dense reference; the fused backend, on a GPU, also with the blocks. Seconds
are this process's CPU seconds, on a GPU the clock's. Also reported: rows that went through products with either head,
per paired row, and the largest logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from benchmarks import results
from benchmarks.counting import VocabularyWork
from benchmarks.dense import dense_loss
from benchmarks.options import dtype_of, parser_of
from benchmarks.results import Row
from benchmarks.shapes import IMPLS, METHODS, SIZES, Bench, computed, impls_on
from benchmarks.timing import Spread, ratios, taking_turns
from dskd_plugin.losses.base import DistillationLoss
from dskd_plugin.losses.dual_space import DualSpaceLoss
from dskd_plugin.models import output_head


def dense_step(bench: Bench, method: str, loss: DistillationLoss) -> Tensor:
    """The step of the dense reference, with the projectors of the loss."""
    weight = output_head(bench.student).weight
    maps: dict[str, Tensor | None] = {}
    if isinstance(loss, DualSpaceLoss):
        assert loss.t2s is not None
        maps["t2s_Dd"] = loss.t2s.weight_Dd
        if method == "dskd_both":
            maps["s2t_dD"] = loss.s2t_map(loss.student_head())
    events = bench.events
    value = dense_loss(
        method,
        teacher_ND=bench.teacher_states(),
        teacher_head_UD=bench.teacher.head.weight_VD,
        student_Rd=bench.student_states(),
        gold_R=bench.batch.targets_R,
        student_head_Vd=weight,
        event_V=events.student_V,
        event_U=events.teacher_U,
        shared=bench.shared_ids,
        **maps,
    )
    value.backward()
    bench.student.zero_grad(set_to_none=True)
    loss.zero_grad(set_to_none=True)
    return value.detach()


def head_product(hidden_ND: Tensor, weight_VD: Tensor, rows: int = 256) -> None:
    for part_BD in hidden_ND.split(rows):
        torch.nn.functional.linear(part_BD, weight_VD)


def work_of(bench: Bench, loss: DistillationLoss, *, with_teacher: bool) -> VocabularyWork:
    """What one step does with the vocabularies."""
    heads = {"student": output_head(bench.student).weight, "teacher": bench.teacher.head.weight_VD}
    with VocabularyWork(heads) as work:
        bench.step(loss, with_teacher=with_teacher)
    return work


def measure(bench: Bench, methods: list[str], repeats: int, dense: list[str], impls: Iterable[str]) -> list[Row]:
    named = computed(methods, impls)
    losses = {name: bench.loss(method, backend) for name, (method, backend) in named.items()}
    for loss in losses.values():
        loss.step = lambda: 0  # one step for ever: the map of s2t is made once
    paired = bench.paired_rows
    teacher_ND = torch.randn(paired, bench.teacher.head.weight_VD.shape[1], device=bench.device, dtype=bench.dtype)
    student_Nd = torch.randn(paired, output_head(bench.student).weight.shape[1], device=bench.device, dtype=bench.dtype)
    student_weight = output_head(bench.student).weight.detach()
    candidates: dict[str, Callable[[], object]] = {
        "plain_sft": bench.plain_sft,
        "F": bench.floor,
        "teacher_head": lambda: head_product(teacher_ND, bench.teacher.head.weight_VD),
        "student_head": lambda: head_product(student_Nd, student_weight),
    }
    for name, loss in losses.items():
        with_teacher = named[name][0] != "sft"
        candidates[name] = lambda loss=loss, with_teacher=with_teacher: bench.step(loss, with_teacher=with_teacher)
    for method in dense:
        candidates[f"dense_{method}"] = lambda method=method: dense_step(bench, method, losses[method])
    seconds = taking_turns(candidates, repeats, bench.device)
    rows = [Row(f"{name}, s", str(Spread.of(values))) for name, values in seconds.items()]
    products = [t + 2 * s for t, s in zip(seconds["teacher_head"], seconds["student_head"], strict=True)]
    target = [1.1 * floor + three for floor, three in zip(seconds["F"], products, strict=True)]
    for name, (method, _) in named.items():
        against = {"F": seconds["F"], "plain_sft": seconds["plain_sft"]}
        if method == "dskd":
            against["target"] = target
        if method in dense:
            against[f"dense_{method}"] = seconds[f"dense_{method}"]
        if name != method and method in seconds:
            against[method] = seconds[method]
        for base, values in against.items():
            rows.append(Row(name, f"{Spread.of(seconds[name]).median:.3g}", base, str(ratios(seconds[name], values))))
    for name, loss in losses.items():
        work = work_of(bench, loss, with_teacher=named[name][0] != "sft")
        ours, theirs = work.products["student"], work.products["teacher"]
        rows += [
            Row(f"{name}, teacher-head products per paired row", f"{theirs.logits / paired:.3g}"),
            Row(f"{name}, teacher-head gradients per paired row", f"{theirs.back / paired:.3g}"),
            Row(f"{name}, student-head products per response row", f"{ours.logits / bench.response_rows:.3g}"),
            Row(f"{name}, student-head gradients per response row", f"{ours.back / bench.response_rows:.3g}"),
            Row(f"{name}, student-weight gradients per response row", f"{ours.weight / bench.response_rows:.3g}"),
            Row(f"{name}, largest logits, elements", str(work.largest)),
        ]
    return rows


def main(words: list[str] | None = None) -> None:
    parser = parser_of("step", __doc__, sizes=SIZES)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--dense", nargs="*", choices=list(METHODS), default=["dskd"], help="also as dense reference")
    parser.add_argument("--impl", nargs="+", choices=IMPLS, help="dskd.impl; blocks, on CUDA also fused")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args(words)
    device, dtype = options.device, dtype_of(options)
    bench = Bench(SIZES[options.size], device, dtype)
    dense = [method for method in options.dense if method in options.methods]
    rows = measure(bench, options.methods, options.repeats, dense, options.impl or impls_on(device))
    setting = f"{bench.size.text()}, {bench.paired_rows} pairs, {str(dtype).removeprefix('torch.')}"
    results.append("step", device, setting, rows, results.command_of("benchmarks.step", words), options.results)


if __name__ == "__main__":
    main()
