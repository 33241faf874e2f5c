"""`benchmarks.growth`: what grows grows alone, rows and plot are written."""

import csv

import pytest

from benchmarks import growth
from benchmarks.shapes import SIZES


@pytest.mark.parametrize("what", list(growth.GROWTH))
def test_one_thing_grows_at_a_time(what):
    size = SIZES["true"]
    same, amount = growth.grown(size, what, 1.0)
    assert same == size
    half, less = growth.grown(size, what, 0.5)
    assert half != size and less == amount // 2


def test_rows_and_plot_are_written(tmp_path):
    table, picture = tmp_path / "r.csv", tmp_path / "out" / "growth.png"
    growth.main(["--size", "tiny", "--repeats", "1", "--results", str(table), "--plot", str(picture)])
    with table.open() as file:
        rows = list(csv.DictReader(file))
    amounts = sum(map(len, growth.GROWTH.values()))
    assert len(rows) == 3 * amounts and all(float(row["value"]) > 0 for row in rows)
    assert {row["metric"].split(",")[0] for row in rows} == {"growth: sft", "growth: F", "growth: dskd"}
    assert picture.read_bytes().startswith(b"\x89PNG")
