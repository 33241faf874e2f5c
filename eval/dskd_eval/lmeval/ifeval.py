"""IFEval's instructions, checked by lm-eval's own code."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any


@functools.cache
def _checks() -> Any:
    import langdetect
    from lm_eval.tasks.ifeval import utils

    # Its guesses at the language of a text are drawn; a score must not be.
    langdetect.DetectorFactory.seed = 0
    return utils


def followed(row: Mapping[str, Any], text: str) -> list[tuple[str, bool, bool]]:
    """Each instruction of the row by name, and whether it was followed, strictly and loosely."""
    utils = _checks()
    # Rows of the hub name every argument of any instruction; only those with a value belong to this one.
    kwargs = [{key: value for key, value in item.items() if value is not None} for item in row["kwargs"]]
    example = utils.InputExample(
        key=row.get("key", 0), instruction_id_list=row["instruction_id_list"], prompt=row["prompt"], kwargs=kwargs
    )
    strict = utils.test_instruction_following_strict(example, text)
    loose = utils.test_instruction_following_loose(example, text)
    found = (row["instruction_id_list"], strict.follow_instruction_list, loose.follow_instruction_list)
    return list(zip(*found, strict=True))
