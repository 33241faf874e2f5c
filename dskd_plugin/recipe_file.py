"""A recipe as it is written, before Axolotl reads it."""

from pathlib import Path

from dskd_plugin.errors import SettingError


def parse(file: Path | str, text: str) -> object:
    """What the YAML text of a file says; ``ValueError`` with the place where it says nothing."""
    import yaml  # not before a recipe is known to be ours

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = "" if mark is None else f"line {mark.line + 1}, column {mark.column + 1}: "
        problem = getattr(error, "problem", None) or error
        raise SettingError(
            file, "an Axolotl recipe in YAML", f"{place}{problem}", "Correct that line or the one above it."
        ) from None


def read(file: Path) -> object:
    """What a YAML file says."""
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise SettingError(file, "an Axolotl recipe in UTF-8", error, "Save it in UTF-8.") from None
    return parse(file, text)
