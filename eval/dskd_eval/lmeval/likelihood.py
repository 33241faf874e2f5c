"""lm-eval's own model around weights that are loaded, for tasks that rank choices by likelihood."""

from __future__ import annotations

import logging
from typing import Any


def likelihood_model(model: Any, tokenizer: Any, batch_size: int, max_length: int) -> Any:
    from lm_eval.models.huggingface import HFLM

    # It warns that it cannot tell the revision and the size of a model that it did not load.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=max_length)
