"""Chat templates of a tokenizer: in files, and as one text where a tokenizer has several under names.

transformers takes ``tool_use`` for a conversation with tools and ``default`` for any other. Axolotl and this package
hand one text to all rows, so the two become one text that makes the same choice. Standard library only.
"""

from pathlib import Path

from dskd_plugin.folders import read_json

DEFAULT, TOOLS = "default", "tool_use"
# A tokenizer's chat_template as transformers has it: one text, or several under names.
Found = str | dict[str, str] | None


def templates_in(folder: Path) -> Found:
    """The chat templates of a model folder, wherever its files hold them; None where there are none."""
    found: dict[str, str] = {}
    for file in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        found[file.stem] = file.read_text(encoding="utf-8")
    single = folder / "chat_template.jinja"
    written = single.read_text(encoding="utf-8") if single.is_file() else None
    written = written or read_json(folder / "chat_template.json").get("chat_template")
    written = written or read_json(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(written, list):
        found |= {str(entry.get("name")): str(entry.get("template")) for entry in written if isinstance(entry, dict)}
    elif isinstance(written, dict):
        found |= written
    elif written:
        found[DEFAULT] = str(written)
    if set(found) <= {DEFAULT}:
        return found.get(DEFAULT)
    return found


def one_template(found: Found) -> str | None:
    """One text for all rows; None where there is no template, or several and none for a conversation without tools."""
    if not isinstance(found, dict):
        return found or None
    if DEFAULT not in found:
        return None
    if TOOLS not in found or found[TOOLS] == found[DEFAULT]:
        return found[DEFAULT]
    # As transformers sets jinja: a line break after a tag is dropped, white space before it kept with a plus sign, and
    # one line break taken from the end of a template.
    tools, default = (text.removesuffix("\n") for text in (found[TOOLS], found[DEFAULT]))
    return f"{{% if tools is defined and tools is not none %}}\n{tools}{{%+ else %}}\n{default}{{%+ endif %}}"


def names(found: Found) -> list[str]:
    """The names under which a tokenizer has its templates; none where it has one or none."""
    return sorted(found) if isinstance(found, dict) else []
