"""docs/results.md: its table and its figure are those of the records, and its links lead somewhere."""

import math

import pytest

from benchmarks import summary


@pytest.fixture(scope="module")
def found() -> list[summary.Line]:
    return summary.lines()


def test_the_table_of_the_page_is_that_of_the_records(found):
    text = summary.PAGE.read_text(encoding="utf-8")
    assert summary.table(found) in text
    assert all((summary.PAGE.parent / line.page).is_file() for line in found)


def test_a_line_is_in_per_cent_of_the_fine_tuning():
    line = summary.relative("here", "bpm", 2, 0.5, (-0.1, -0.2, 0.05), "scarce.md")
    assert (line.value, line.low, line.high) == pytest.approx((-20.0, -40.0, 10.0))
    assert "-20.0 % [-40.0, +10.0]" in summary.table([line])


def test_every_place_has_a_finite_difference_inside_its_interval(found):
    assert {line.page for line in found} == {"scarce.md", "real_pair.md", "study.md"}
    for line in found:
        assert math.isfinite(line.sft) and line.low <= line.value <= line.high


def test_the_figure_has_a_point_for_each_line(found, tmp_path):
    summary.draw(found, tmp_path / "plot.svg")
    drawn = (tmp_path / "plot.svg").read_text(encoding="utf-8")
    assert drawn == summary.PLOT.read_text(encoding="utf-8"), "run `python -m benchmarks.summary`"
