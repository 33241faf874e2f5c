"""The chat templates that Axolotl has under names."""

from typing import Any

from axolotl.utils.chat_templates import get_chat_template


def named_template(name: str, tokenizer: Any = None) -> Any:
    """Axolotl's template of a name; ``ValueError`` where it has none."""
    return get_chat_template(name, tokenizer=tokenizer)
