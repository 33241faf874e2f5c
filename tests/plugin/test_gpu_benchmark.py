"""`benchmarks.on_gpu` without a GPU: what grows grows alone, rows and plot are written, and the limit holds."""

import csv

import pytest
import torch

from benchmarks import on_gpu
from benchmarks.shapes import SIZES


@pytest.mark.parametrize("what", list(on_gpu.GROWTH))
def test_one_thing_grows_at_a_time(what):
    size = SIZES["true"]
    same, amount = on_gpu.grown(size, what, 1.0)
    assert same == size
    half, less = on_gpu.grown(size, what, 0.5)
    assert half != size and less == amount // 2


def test_rows_and_plot_are_written(tmp_path):
    rows = on_gpu.growth(SIZES["tiny"], "teacher layers", torch.device("cpu"), torch.float32, 1)
    assert {row.metric.split(",")[0] for row in rows} == {"growth: sft", "growth: F", "growth: dskd"}
    on_gpu.plot(rows, tmp_path / "out" / "gpu.png")
    assert (tmp_path / "out" / "gpu.png").read_bytes().startswith(b"\x89PNG")


def test_a_teacher_that_waits_is_timed_beside_one_that_stays():
    rows = on_gpu.offloaded(SIZES["tiny"], torch.device("cpu"), torch.float32, 1)
    assert [row.baseline for row in rows] == ["", "dskd, teacher on the device"] and rows[1].ratio


def test_nothing_starts_after_the_limit(tmp_path, capsys):
    words = ["--size", "tiny", "--device", "cpu", "--repeats", "1", "--minutes", "0.00001"]
    on_gpu.main([*words, "--results", str(tmp_path / "r.csv"), "--plot", str(tmp_path / "p.png")])
    left = [line for line in capsys.readouterr().out.splitlines() if line.startswith("left out: ")]
    names = list(on_gpu.parts("tiny", torch.device("cpu"), torch.float32, 1))
    assert [line.removeprefix("left out: ") for line in left] == names[len(names) - len(left) :] and len(left) > 4
    with (tmp_path / "r.csv").open() if (tmp_path / "r.csv").exists() else open("/dev/null") as file:
        assert {row["benchmark"] for row in csv.DictReader(file)} <= set(names[:2])
