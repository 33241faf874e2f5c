"""The benchmarks of a step and of memory on tiny shapes, and what they compare with."""

import csv

import pytest
import torch

from benchmarks import memory, plan, results, step, trl_gold
from benchmarks.counting import VocabularyWork
from benchmarks.shapes import METHODS, SIZES, Bench
from dskd_plugin.core.backend import TorchBlocks

CPU = torch.device("cpu")


def table(file):
    with file.open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_the_committed_results_have_every_column():
    rows = table(results.RESULTS)
    assert tuple(rows[0]) == results.COLUMNS
    assert all(row["date"] and row["device"] and row["metric"] and row["value"] and row["command"] for row in rows)


def test_step_writes_ratios_to_the_floor_the_target_and_the_dense_reference(tmp_path):
    file = tmp_path / "results.csv"
    step.main(["--size", "tiny", "--repeats", "2", "--results", str(file)])
    rows = table(file)
    assert {row["benchmark"] for row in rows} == {"step"}
    compared = {(row["metric"], row["baseline"]) for row in rows if row["ratio"]}
    assert {(method, base) for method in METHODS for base in ("F", "plain_sft")} <= compared
    assert {("dskd", "target"), ("dskd", "dense_dskd")} <= compared
    values = {row["metric"]: row["value"] for row in rows}
    # The other one of both spaces is the student, read by the teacher's head.
    products = {"sft": "0", "overlap_kd": "1", "overlap_kd_support": "0", "dskd": "1", "dskd_both": "2"}
    for method, number in products.items():
        assert values[f"{method}, teacher-head products per paired row"] == number
    assert {row["command"] for row in rows} == {"python -m benchmarks.step --size tiny --repeats 2"}


def test_memory_writes_ratios_to_the_floor_and_the_dense_reference(tmp_path):
    file = tmp_path / "results.csv"
    memory.main(["--size", "tiny", "--methods", "sft", "dskd", "--results", str(file)])
    rows = table(file)
    ratios = {row["metric"]: float(row["ratio"]) for row in rows if row["ratio"]}
    assert len(ratios) == 4
    assert all(0 < ratio < 100 for ratio in ratios.values())
    assert all(float(row["value"]) > 0 for row in rows)


def test_a_peak_is_what_lives_at_once():
    def work():
        for _ in range(3):
            both = torch.ones(1000), torch.ones(500)
            del both

    assert memory.peak(work, CPU) == 6000


@pytest.mark.parametrize("method", METHODS)
def test_the_dense_reference_has_the_loss_and_the_gradient_of_the_blocks(method):
    """Two writings of docs/method.md, in float64."""
    found = []
    bench = Bench(SIZES["tiny"], CPU, torch.float64)
    loss = bench.loss(method, TorchBlocks(1000))
    grabbed = []
    weight = bench.student.get_output_embeddings().weight
    hook = weight.register_post_accumulate_grad_hook(lambda p: grabbed.append(p.grad.clone()))
    found.append(bench.step(loss, with_teacher=method != "sft"))
    found.append(step.dense_step(bench, method, loss))
    hook.remove()
    # The projectors are fp32, and so are the projected states of both.
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=0)
    torch.testing.assert_close(grabbed[0], grabbed[1], rtol=1e-4, atol=1e-9)


def test_the_count_of_products():
    head, other = torch.randn(50, 8, requires_grad=True), torch.randn(60, 8)
    with VocabularyWork({"a": head, "b": other}) as work:
        hidden = torch.randn(7, 8, requires_grad=True)
        logits = torch.nn.functional.linear(hidden, head[:40]) + (hidden @ other.T)[:, :40]
        logits.sum().backward()
    assert (work.products["a"].logits, work.products["a"].back, work.products["a"].calls) == (7, 7, 1)
    assert (work.products["b"].logits, work.products["b"].back, work.products["b"].weight) == (7, 7, 0)
    assert work.largest == 7 * 60


@pytest.mark.more
@pytest.mark.axolotl
def test_a_step_is_measured_beside_that_of_trl(tmp_path):
    """Both trainers really train: on a pair of no size neither number says anything."""
    file = tmp_path / "results.csv"
    trl_gold.main(["--size", "none", "--steps", "1", "--methods", "dskd", "--results", str(file)])
    rows = {row["metric"]: row for row in table(file)}
    assert set(rows) == {f"{name}, {what}" for name in ("TRL GOLD", "dskd") for what in ("s a step", "resident MiB")}
    for what in ("s a step", "resident MiB"):
        ours, base = rows[f"dskd, {what}"], rows[f"TRL GOLD, {what}"]
        assert ours["baseline"] == "TRL GOLD" and not base["ratio"]
        assert float(ours["ratio"]) == pytest.approx(float(ours["value"]) / float(base["value"]), rel=0.02)


@pytest.mark.more
@pytest.mark.axolotl
def test_a_plan_is_measured_beside_real_runs(tmp_path):
    """In float32 and in bfloat16, which transformers has to be told of on a CPU."""
    file = tmp_path / "results.csv"
    words = ["--size", "none", "--recipes", "sft", "dskd, bf16", "--rows", "1", "--tokens", "64"]
    plan.main([*words, "--results", str(file)])
    rows = table(file)
    assert [row["metric"] for row in rows] == ["sft, MiB planned", "dskd, bf16, MiB planned"]
    # Of models of no size, the process alone.
    assert all(0.7 < float(row["ratio"]) < 1.3 for row in rows)


def test_the_pair_beside_trl_is_named_whole_or_not_at_all(capsys):
    with pytest.raises(SystemExit):
        trl_gold.main(["--teacher", "x"])
    assert "--teacher, --student and --rows: expected all three or none" in capsys.readouterr().err
