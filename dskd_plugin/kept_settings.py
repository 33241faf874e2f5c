"""The settings that a checkpoint keeps, and whether a recipe may go on from it, told before torch loads."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from dskd_plugin.errors import SettingError

if TYPE_CHECKING:
    from dskd_plugin.settings import Settings  # which loads pydantic, in every command of Axolotl

STATE = "dskd_state.json"
# Where the recipe sets what the file keeps under another name.
SETTINGS = {
    "teacher": "teacher.model",
    "teacher_revision": "teacher.revision",
    "teacher_adapter": "teacher.adapter",
    "teachers": "teachers",
    "method": "method",
    "alignment": "alignment",
    "spaces": "spaces",
    "target": "target",
    "shared": "shared",
    "kd_weight": "kd_weight",
    "projector_init": "projector.init",
    "unpaired": "unpaired",
}
# The whole `dskd:` block as it was resolved: what of it may change in the middle of a run is told, not refused.
BLOCK = "settings"
# What a run did before the setting was there to be kept; UNPAIRED is one of the block.
BEFORE = {"method": "dskd", "target": "projected", "shared": "ids", "kd_weight": "fixed", "projector_init": "ideal"}
UNPAIRED = "share"
# Defaults of 0.1.0, whose file keeps no block, no method and no alignment, and names tokenizers by another rule.
FIRST = {"temperature": 2.0, "agreement_mask": True, "unpaired": UNPAIRED, "projector": {"labels": "hard"}}
_UNTOLD_BY_FIRST = ("student_tokenizer", "teacher_tokenizer", "alignment")


def of(settings: "Settings") -> dict[str, object]:
    """What of a run the recipe alone decides."""
    block = settings.model_dump(mode="json", exclude={"teacher", "teachers", "impl"})
    if len(settings.each) > 1:
        block["teachers"] = {"weight": settings.weights}
    return {
        **_teachers(settings),
        "method": settings.method,
        "alignment": settings.alignment,
        "spaces": settings.spaces,
        "target": "exact" if settings.exact else "projected",
        "shared": "events" if settings.by_events else "ids",
        "kd_weight": settings.kd_weight,
        "projector_init": settings.projector.init,
        BLOCK: block,
    }


def _teachers(settings: "Settings") -> dict[str, object]:
    """One teacher by its own keys, several as a list in their order."""
    given = [one.teacher for one in settings.each]
    if len(given) > 1:
        keys = {"model", "revision", "adapter"}
        listed = [teacher.model_dump(include=keys, exclude_none=True) for teacher in given]
        return {**dict.fromkeys(("teacher", "teacher_revision", "teacher_adapter")), "teachers": listed}
    return {
        "teacher": given[0].model,
        "teacher_revision": given[0].revision,
        "teacher_adapter": given[0].adapter,
        "teachers": None,
    }


def check_same(file: Path, found: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise ``ValueError`` where a checkpoint's file says of a key of `now`, other than BLOCK, something else.

    found: what the file holds.
    """
    # A setting that does not apply to the method is None here, and may not have been kept.
    expected = {key: value for key, value in now.items() if key != BLOCK and (key in found or value is not None)}
    is_first, before, after = _is_first(found), _flat(_block(found)), _flat(_block(now))
    if is_first:
        expected = {key: value for key, value in expected.items() if key not in _UNTOLD_BY_FIRST}
    found = {**BEFORE, **found}
    different = [key for key, value in expected.items() if found.get(key) != value]
    if not different:
        return
    kept: dict[str, object] = {key: found.get(key) for key in different if key in SETTINGS}
    if kept.get("target") == "projected":
        kept.pop("shared", None)  # has no effect there, and is refused
    restored = _flat(FIRST) if is_first else ("unpaired",)
    kept |= {key: before.get(key) for key in restored if before.get(key) != after.get(key)}
    # A recipe has one of the two forms.
    other_form = ("teacher", "teacher_revision", "teacher_adapter") if kept.get("teachers") else ("teachers",)
    lines = _recipe_lines({key: value for key, value in kept.items() if key not in other_form})
    told = ", ".join(f"{key} {found.get(key)!r} instead of {now[key]!r}" for key in different)
    advice = "Resume with the teacher and settings of that run, or start a new output_dir."
    raise SettingError(
        file,
        "the projectors of this pair",
        f"those of another: {told}",
        f"{advice} The lines of that run's recipe:\n{lines}" if lines else advice,
    )


def changed(found: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Settings that may change in the middle of a run and did, each with both values."""
    before, after = _flat(_block(found)), _flat(_block(now))
    names = [key for key in after if key in before and before[key] != after[key]]
    return [f"dskd.{key} {before[key]} -> {after[key]}" for key in names]


def _block(state: dict[str, Any]) -> dict[str, Any]:
    """The kept block, with what `unpaired` meant and what a run did before there was a guard."""
    from dskd_plugin.methods import METHODS

    block = dict(FIRST if _is_first(state) else state.get(BLOCK, {}))
    ignored = {key for (name, _), method in METHODS.items() if name == state.get("method") for key in method.ignores}
    if "unpaired" in ignored:
        block.pop("unpaired", None)
    elif block.setdefault("unpaired", UNPAIRED) == "auto":
        block["unpaired"] = "share" if block.get("on_policy") else "ce"
    if state.get("target") == "exact":
        block.setdefault("guard", False)
    return block


def _is_first(state: dict[str, Any]) -> bool:
    return BLOCK not in state and not state.keys() & {"alignment", "target"}


def _flat(block: dict[str, object], above: str = "") -> dict[str, object]:
    """The block with its inner keys as `outer.inner`."""
    flat: dict[str, object] = {}
    for key, value in block.items():
        flat |= _flat(value, f"{above}{key}.") if isinstance(value, dict) else {f"{above}{key}": value}
    return flat


def _recipe_lines(kept: dict[str, object]) -> str:
    """The part of a `dskd:` block that restores what a checkpoint was trained with."""
    block: dict[str, Any] = {}
    for key, value in kept.items():
        inner = block
        *above, last = SETTINGS.get(key, key).split(".")
        for name in above:
            inner = inner.setdefault(name, {})
        inner[last] = value
    return str(yaml.safe_dump({"dskd": block}, sort_keys=False)).rstrip() if block else ""
