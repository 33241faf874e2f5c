"""Memory on the GPU: what the loss holds does not grow with rows times vocabulary, and `dskd plan` is near."""

import pytest
import torch

from benchmarks.memory import StatesAlone, of_tokens, peak
from benchmarks.shapes import METHODS, SIZES, Bench
from dskd_plugin.plan.facts import facts_of
from dskd_plugin.plan.memory import memory_of
from dskd_plugin.plan.models import student_of, teacher_of
from dskd_plugin.settings import parse_settings


def loss_bytes(bench, method, device):
    loss = bench.loss(method)
    loss.head_checked = True  # there are no logits to check it by
    loss.step = lambda: 0
    bench.step(loss, with_teacher=method != "sft")  # workspaces of the first products
    return peak(lambda: bench.step(loss, with_teacher=method != "sft"), device)


@pytest.mark.parametrize("method", list(METHODS))
def test_four_times_the_rows_do_not_take_four_times_the_logits(method, device):
    small = SIZES["small"]
    few, many = (StatesAlone(of_tokens(small, tokens, None), device, torch.bfloat16) for tokens in (1024, 4096))
    many.student, many.teacher = few.student, few.teacher
    sizes = []
    for bench in (few, many):
        bench.draw()
        sizes.append(loss_bytes(bench, method, device))
    states = 8 * 3072 * (576 + 896) * 2  # of the further rows, with gradients and copies
    assert sizes[1] <= 1.05 * sizes[0] + states


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", ["sft", "overlap_kd", "dskd"])
def test_the_plan_is_near(method, checkpointing, device, tmp_path):
    from transformers import AutoConfig

    size = of_tokens(SIZES["small"], 2048, None)
    for role, (family, options) in (("student", size.student), ("teacher", size.teacher)):
        AutoConfig.for_model(family, **options).save_pretrained(tmp_path / role)
    recipe = {
        "base_model": str(tmp_path / "student"),
        "dskd": {"teacher": {"model": str(tmp_path / "teacher")}, **METHODS[method]},
        "micro_batch_size": size.rows,
        "sequence_len": size.tokens,
        "gradient_checkpointing": checkpointing,
        "bf16": True,
        "cut_cross_entropy": True,  # weights of one dtype, as this bench has them
        "flash_attention": True,
    }
    facts = facts_of(recipe, parse_settings(recipe["dskd"]), 1, on_gpu=True)
    memory = memory_of(facts, student_of(facts), None if method == "sft" else teacher_of(facts))
    bench = Bench(size, device, torch.bfloat16)
    bench.student.train()
    if checkpointing:
        bench.student.gradient_checkpointing_enable({"use_reentrant": False})
    loss = bench.loss(method)
    with torch.autocast(device.type, torch.bfloat16):
        bench.step(loss, with_teacher=method != "sft")
        real = peak(lambda: bench.step(loss, with_teacher=method != "sft"), device)
    assert 0.85 < max(memory.moments.values()) / real < 1.3
