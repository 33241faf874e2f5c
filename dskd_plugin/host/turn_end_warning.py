"""Axolotl's warning about an end of turn that a chat template lacks, with whose it is and what to write."""

import contextlib
import logging
import re
from collections.abc import Iterator
from typing import Any

LOGGER = "axolotl.prompt_strategies.chat_template"
LACKS = re.compile(r"(EOS|EOT) token '(.*)' not found in chat_template", re.DOTALL)


class _Named(logging.Filter):
    def __init__(self, side: str, turn_end: str | None) -> None:
        super().__init__()
        self.side, self.turn_end = side, turn_end

    def filter(self, record: logging.LogRecord) -> bool:
        found = LACKS.search(record.getMessage())
        if found:
            record.msg, record.args = self._text(*found.groups()), ()
        return True

    def _text(self, kind: str, token: str) -> str:
        seen = f"the {self.side}'s chat template does not contain {token!r}, the token that is to end a turn"
        if self.side == "teacher":
            return (
                f"dskd: {seen}, so the teacher says nothing about where an answer ends. Write in the recipe "
                "dskd.teacher.chat_template: <name or jinja file> of a template that has it."
            )
        end = repr(self.turn_end) if self.turn_end else "<the token that ends a turn in the template>"
        listed = f"eot_tokens without {token!r}, e.g. " if kind == "EOT" else ""
        return (
            f"dskd: {seen}, so the student does not learn to stop. Write in the recipe {listed}eot_tokens: [{end}], "
            f"or chat_template: <name> of a template that has {token!r}."
        )


@contextlib.contextmanager
def names_the_side(side: str, turn_end: str | None = None) -> Iterator[None]:
    """Inside, the warning says that it is about the ``side``, student or teacher.

    turn_end: the token that ends a turn of this side, where it is known.
    """
    logger, named = logging.getLogger(LOGGER), _Named(side, turn_end)
    logger.addFilter(named)
    try:
        yield
    finally:
        logger.removeFilter(named)


def template_end(dataset_config: Any, tokenizer: Any, cfg: Any, table: Any) -> str | None:
    """The token with which the student's template ends a turn; None where it does not show, or there is no template."""
    from axolotl.utils.chat_templates import get_chat_template_from_config

    from dskd_plugin.text.templates import one_template
    from dskd_plugin.text.turn_ends import end_of_turn

    try:
        template = one_template(get_chat_template_from_config(cfg, dataset_config, tokenizer))
    except ValueError:
        return None
    end = end_of_turn(tokenizer, template, table, cfg.get("chat_template_kwargs"))
    return None if end is None else str(tokenizer.convert_ids_to_tokens(end))
