"""The table of the quickstart, as text and as one HTML page that needs no other file."""

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

TEMPLATES = Path(__file__).parent / "templates"
SHOWN = ("sft", "seqkd", "dskd", "teacher")


def table(results: dict[str, Any]) -> list[dict[str, str]]:
    """One row per model: title, bits_per_byte and exact_match with their intervals, and cost."""
    rows = []
    for model in results["models"].values():
        bits, match = model["bits_per_byte"], model["exact_match"]
        rows.append(
            {
                "title": model["title"],
                "bits": f"{bits['value']:.3f} ({bits['low']:.3f} to {bits['high']:.3f})",
                "match": f"{match['value']:.1%} ({match['low']:.1%} to {match['high']:.1%})",
                "cost": f"{model['cpu_seconds']:.0f} s" if model["cpu_seconds"] else "",
            }
        )
    return rows


def as_text(rows: list[dict[str, str]]) -> str:
    """The table for a terminal."""
    heads = {"title": "model", "bits": "bits/byte (95 %)", "match": "exact match (95 %)", "cost": "CPU time"}
    wide = {key: max(len(head), *(len(row[key]) for row in rows)) for key, head in heads.items()}
    lines = []
    for row in [heads, *rows]:
        lines.append("  ".join(row[key].ljust(wide[key]) for key in heads).rstrip())
    return "\n".join(lines)


def answered(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The first held-out question of every third kind, with the gold answer and the replies of four models.

    Chosen by position, so that nobody picks the ones that look well.
    """
    models = results["models"]
    kinds = list(dict.fromkeys(one["kind"] for one in models["teacher"]["answers"]))[::3]
    shown = []
    for kind in kinds:
        at = next(i for i, one in enumerate(models["teacher"]["answers"]) if one["kind"] == kind)
        replies = [models[name]["answers"][at] for name in SHOWN]
        shown.append({"question": replies[0]["question"], "gold": replies[0]["gold"], "replies": replies})
    return shown


def render(results: dict[str, Any], picture: str) -> str:
    """The page; `picture` is an SVG element."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html").render(
        results=results,
        rows=table(results),
        shown=answered(results),
        heads=[results["models"][name]["short"] for name in SHOWN],
        picture=Markup(picture),  # our own drawing, the only part that is not text
    )
