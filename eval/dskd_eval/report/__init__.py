"""report.md, report.html and comparison files of runs; no network needed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dskd_eval import run_folder
from dskd_eval.entries import Roles
from dskd_eval.report.collect import payload
from dskd_eval.report.markdown import as_markdown, comparison_lines, escaped
from dskd_eval.report.page_file import as_html
from dskd_eval.run_folder import SavedRun
from dskd_eval.schema import Comparison


def write(runs: Sequence[SavedRun], folder: Path, roles: Roles | None = None) -> tuple[Path, Path]:
    """Write report.md and report.html of one or several runs into a folder; returns their paths.

    roles: as for `comparison.compare`; None: those of the recipe.
    """
    found = payload(runs, roles or Roles())
    markdown, page = folder / "report.md", folder / "report.html"
    run_folder.replace_text(markdown, as_markdown(found))
    run_folder.replace_text(page, as_html(found))
    return markdown, page


def write_comparison(found: Comparison, output: Path) -> list[Path]:
    """A comparison as a .json or a .md file; another name is a folder for comparison.json and comparison.md."""
    files = [output] if output.suffix in (".json", ".md") else [output / f"comparison{end}" for end in (".json", ".md")]
    for file in files:
        if file.suffix == ".json":
            run_folder.write_json(file, found)
        else:
            notes = [f"- {escaped(note)}" for note in found.notes]
            run_folder.replace_text(file, "\n".join(["# Comparison", "", *comparison_lines(found), *notes, ""]))
    return files
