"""The chat template of a model as one text: its tokenizer's, one of several under names, one of Axolotl's, or a file.

transformers takes `tool_use` for a conversation with tools and `default` for any other; benchmarks here have no tools,
but the text makes the same choice, so that a model reads as it was trained.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

from dskd_eval.errors import UserError, nearest

OWN = "tokenizer_default"
_DEFAULT, _TOOLS = "default", "tool_use"
Found = str | dict[str, str] | None


def one(found: Found) -> str | None:
    """One text for all conversations; None where there is none, or several and none of them is the default."""
    if not isinstance(found, dict):
        return found or None
    default, tools = found.get(_DEFAULT), found.get(_TOOLS)
    if default is None or tools is None or tools == default:
        return default
    # As transformers sets jinja: a line break after a tag is dropped, white space before it kept with a plus sign, and
    # one line break taken from the end of a template.
    first, second = tools.removesuffix("\n"), default.removesuffix("\n")
    return f"{{% if tools is defined and tools is not none %}}\n{first}{{%+ else %}}\n{second}{{%+ endif %}}"


def check_default(where: str, found: Found) -> None:
    """Raise UserError where a tokenizer has several templates and none that holds for every conversation."""
    if isinstance(found, dict) and _DEFAULT not in found:
        names = ", ".join(sorted(found))
        raise UserError(
            where,
            expected=f"a chat template named {_DEFAULT!r}",
            got=f"several, named {names}",
            fix="Save the one to use into a file and give --chat-template FILE, or --chat-template off.",
        )


def chosen(choice: str, found: Found, where: str) -> Found:
    """What a recipe's `chat_template` means: a file, one of the tokenizer's own, or one of Axolotl's by its name."""
    if choice == OWN:
        return found
    if Path(choice).is_file():
        return Path(choice).read_text(encoding="utf-8")
    if isinstance(found, dict) and choice in found:
        return found[choice]
    fallback = choice.removeprefix(f"{OWN}_fallback_")
    if fallback != choice and found:
        return found
    listed = _of_axolotl()
    if fallback in listed:
        return listed[fallback].read_text(encoding="utf-8")
    own = [] if not isinstance(found, dict) else list(found)
    known = (
        nearest(choice, [*own, *listed]) if listed else "Axolotl, whose templates have names, is not installed here."
    )
    raise UserError(
        where,
        expected=f"{OWN}, a jinja file or the name of a chat template",
        got=repr(choice),
        fix=f"{known} Or save the template into a file and give --chat-template FILE.",
    )


def in_folder(folder: Path) -> Found:
    """The chat templates of a model folder, wherever its files hold them; None where there are none."""
    found: dict[str, str] = {}
    for file in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        found[file.stem] = file.read_text(encoding="utf-8")
    single = folder / "chat_template.jinja"
    written: object = single.read_text(encoding="utf-8") if single.is_file() else None
    for name in ("chat_template.json", "tokenizer_config.json"):
        written = written or _settings(folder / name).get("chat_template")
    if isinstance(written, list):
        found |= {str(entry.get("name")): str(entry.get("template")) for entry in written if isinstance(entry, dict)}
    elif isinstance(written, dict):
        found |= written
    elif written:
        found[_DEFAULT] = str(written)
    return found.get(_DEFAULT) if set(found) <= {_DEFAULT} else found


def _settings(file: Path) -> dict[str, object]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _of_axolotl() -> dict[str, Path]:
    """The files of the templates that an installed Axolotl has, by name; it is not imported."""
    axolotl = find_spec("axolotl")
    places = [] if axolotl is None else list(axolotl.submodule_search_locations or ())
    files = [file for place in places for file in Path(place).glob("utils/chat_templates/templates/*.jinja")]
    return {file.stem: file for file in files}
