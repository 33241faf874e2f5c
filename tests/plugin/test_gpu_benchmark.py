"""`benchmarks.on_gpu` without a GPU: a part of it, and the limit holds."""

import csv

import torch

from benchmarks import on_gpu
from benchmarks.shapes import SIZES


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
