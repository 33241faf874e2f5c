"""The chat templates that Axolotl knows: by name, and of a dataset entry."""

from typing import Any

from axolotl.utils.chat_templates import get_chat_template, get_chat_template_from_config

from dskd_plugin.run import Templates


def named_template(name: str, tokenizer: Any = None) -> Any:
    """Axolotl's template of a name; ``ValueError`` where it has none."""
    return get_chat_template(name, tokenizer=tokenizer)


def entry_template(recipe: Any, entry: Any, tokenizer: Any) -> Any:
    """The template, or the templates by name, in which Axolotl lets the student read a dataset entry."""
    return get_chat_template_from_config(cfg=recipe, ds_cfg=entry, tokenizer=tokenizer)


TEMPLATES = Templates(named=named_template, of_entry=entry_template)
