"""The HTML report in headless Chromium: it builds without errors, filters, and fits a phone."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from dskd_eval import report
from dskd_eval.entries import Roles
from dskd_eval.run_folder import SavedRun
from test_compare import values, write_run

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
PROBE = """<script>
const errors = [];
addEventListener("error", e => errors.push(e.message));
addEventListener("load", () => {
  document.body.dataset.errors = errors.join(" ");
  document.body.dataset.width = document.documentElement.scrollWidth;
  document.body.dataset.window = innerWidth;
});
</script></head>"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    first, second = values(0, 0.5, 60), values(1, 0.6, 60)
    run = write_run(folder / "x", {"base model": first, "<i>student</i>": second})
    report.write([SavedRun(run)], run)
    copy = run / "probed.html"
    copy.write_text((run / "report.html").read_text(encoding="utf-8").replace("</head>", PROBE, 1), encoding="utf-8")
    return copy


def open_page(page: Path, place: str = "", width: int = 1280) -> str:
    """The document after its script ran."""
    command = [str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=3000"]
    command += [f"--window-size={width},900", f"--user-data-dir={page.parent / 'profile'}", "--dump-dom"]
    done = subprocess.run(
        [*command, f"file://{page}#{place}"], capture_output=True, text=True, timeout=120, check=False
    )
    assert "data-errors" in done.stdout, done.stderr[-2000:]
    return done.stdout


def test_page_shows_scores_and_samples(page: Path) -> None:
    shown = open_page(page)
    assert 'data-errors=""' in shown
    assert "60 of 60 documents" in shown
    assert len(re.findall(r'class="bar"', shown)) == 2
    assert (
        "&lt;i&gt;student&lt;/i&gt;" in shown and "<i>student</i>" not in shown.split("</head>")[1].split("<script")[0]
    )
    assert "Question 0" in shown


@pytest.mark.parametrize("name", ["wrong", "right", "changed"])
def test_filters_count_as_counted_here(page: Path, name: str) -> None:
    first, second = values(0, 0.5, 60), values(1, 0.6, 60)
    expected = {
        "wrong": first.count(0.0),
        "right": first.count(1.0),
        "changed": sum(a != b for a, b in zip(first, second, strict=True)),
    }[name]
    assert f"{expected} of 60 documents" in open_page(page, f"task=quiz&model=base model&filter={name}")


def test_find_narrows_the_list(page: Path) -> None:
    assert "11 of 60 documents" in open_page(page, "task=quiz&find=question 1")


def test_page_fits_a_phone(page: Path) -> None:
    shown = open_page(page, width=390)
    facts = {key: int(value) for key, value in re.findall(r'data-(width|window)="(\d+)"', shown)}
    assert facts["window"] <= 500
    assert facts["width"] <= facts["window"]


def test_page_rounds_ties_and_shows_unknown_intervals(tmp_path: Path) -> None:
    """1 of 16 is 6.25 and shows as 6.3, as in report.md; an unknown interval is a dash."""
    run = write_run(tmp_path / "x", {"a": [0.0] * 16, "b": [1.0] + [0.0] * 15}, metric={"low": None, "high": None})
    report.write([SavedRun(run)], run, Roles(baseline="a"))
    copy = run / "probed.html"
    copy.write_text((run / "report.html").read_text(encoding="utf-8").replace("</head>", PROBE, 1), encoding="utf-8")
    page_shown = open_page(copy)
    assert 'data-errors=""' in page_shown
    assert "<b>6.3</b><small>–</small>" in page_shown
    assert "6.3 (–)" in (run / "report.md").read_text(encoding="utf-8")
    assert "+6.3" in page_shown and "+6.3" in (run / "report.md").read_text(encoding="utf-8")
