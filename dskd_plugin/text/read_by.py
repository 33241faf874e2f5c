"""Which text of a conversation one side alone reads: each template is rendered once for every shape of a row.

In the shape of a row each text is replaced by a mark, so that it shows in a rendering whether a template reads it, and
rows of one shape need one rendering. Tags stay, since templates look for them.
"""

import functools
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

SIDES = ("student", "teacher")
_TAG = re.compile(r"(<[^<>\s]+>)")
# Fields that say what a message is; a template compares them with words of its own.
_KINDS = {"role", "from", "type"}
_MOST_SHAPES = 2048
_SHOWN = 80
# Characters that no template writes, of one case: some stay of a text that a template cuts or capitalises.
_FIRST_MARK, _MOST_MARKS, _MARK_LENGTH = 0x20000, 42_000, 9
_ESCAPED_MARK = re.compile(r"\\u(d[89ab][0-9a-f]{2})\\u(d[c-f][0-9a-f]{2})", re.IGNORECASE)
# What Axolotl reads of a message to decide which of its text is trained on; no template's.
_MASKS = {"training", "training_detail", "reasoning_training_detail"}
_SHOWS_CALLS = re.compile(r"tool_calls|tojson|items")

Render = Callable[[dict[str, Any]], str]


class Unread(NamedTuple):
    """A text that one side alone reads. reader: whose template shows it; what: the field; text: its beginning."""

    reader: str
    what: str
    text: str


@dataclass(frozen=True)
class _Text:
    """A text of a row. path: of its field, without the numbers of list entries, and the role of its message."""

    path: tuple[str, ...]
    role: str
    tag: str
    text: str

    @property
    def field(self) -> str:
        """The field of the row or of its messages that it belongs to."""
        return self._named(1)

    @property
    def part(self) -> str:
        """That field and what is inside it, at most three names."""
        return self._named(3)

    def _named(self, depth: int) -> str:
        name = ".".join(self.path[:depth])
        inside = f"text after {self.tag} in " if self.tag else ""
        return f"{inside}{name} of {self.role} messages" if self.role else f"{inside}{name}"


class Names(NamedTuple):
    """The fields of a row with its messages, its tools and its system message, and that of a message with its role."""

    messages: str = "messages"
    tools: str = "tools"
    system: str | None = None
    role: str = "role"


class OneSided:
    """What two templates read of rows. student, teacher: the text that a side makes of a row, which it may change."""

    def __init__(self, student: Render, teacher: Render, names: Names) -> None:
        self.sides, self.names = (student, teacher), names
        self.known: dict[str, tuple[frozenset[int], frozenset[int]] | None] = {}

    @classmethod
    def of(cls, student: Any, teacher: Any) -> "OneSided | None":
        """Of two strategies; None where they do not read conversations through templates."""
        through_templates = all(
            hasattr(side, "get_conversation_thread") and getattr(side.prompter, "chat_template", None)
            for side in (student, teacher)
        )
        if not through_templates:
            return None
        prompter = student.prompter
        role = prompter.message_property_mappings.get("role", "role")
        names = Names(prompter.field_messages, prompter.field_tools, prompter.field_system, role)
        return cls(_Rendering(student), _Rendering(teacher), names)

    def find(self, row: dict[str, Any]) -> list[Unread]:
        """Texts of a row that one side alone reads, the first of each field."""
        shape, texts = self._shape(row)
        key = json.dumps(shape, sort_keys=True, default=str)
        if key not in self.known:
            if len(self.known) >= _MOST_SHAPES:
                self.known.clear()
            self.known[key] = self._read(shape, len(texts))
        read = self.known[key]
        if read is None or read[0] == read[1]:
            return []
        found: dict[tuple[str, str], Unread] = {}
        for side, (mine, other) in enumerate((read, read[::-1])):
            for number in sorted(mine - other):
                text = texts[number]
                siblings = {k for k, one in enumerate(texts) if one.field == text.field}
                what = text.part if siblings & other else text.field
                found.setdefault((SIDES[side], what), Unread(SIDES[side], what, text.text[:_SHOWN]))
        return list(found.values())

    def _shape(self, row: dict[str, Any]) -> tuple[dict[str, Any], list[_Text]]:
        names = self.names
        given = (names.messages, names.tools, names.system)
        fields = {name: row[name] for name in given if name is not None and row.get(name) is not None}
        texts: list[_Text] = []
        shape: dict[str, Any] = {}
        for name, value in fields.items():
            if name != names.messages:
                shape[name] = _marked(value, (name,), "", texts)
                continue
            shape[name] = []
            for message in json.loads(value) if isinstance(value, str) else value:
                role = message.get(names.role)
                parts = {key: part for key, part in message.items() if part is not None}
                for key, part in parts.items():
                    if key != names.role:
                        parts[key] = _marked(part, (key,), str(role), texts)
                shape[name].append(parts)
        return shape, texts

    def _read(self, shape: dict[str, Any], count: int) -> tuple[frozenset[int], frozenset[int]] | None:
        """Which marks each side shows; None where a template does not take marks."""
        try:
            shown = [set(_unescaped(render(json.loads(json.dumps(shape))))) for render in self.sides]
        except Exception:  # whatever a template raises; rows that it cannot render are told of elsewhere
            return None
        student, teacher = (frozenset(k for k in range(count) if _mark(k)[0] in signs) for signs in shown)
        return student, teacher


@dataclass(frozen=True)
class _Rendering:
    """The text that a strategy's template makes of a row."""

    strategy: Any

    def __call__(self, row: dict[str, Any]) -> str:
        strategy, prompter = self.strategy, self.strategy.prompter
        hand_over(strategy, row)
        options = {"chat_template": prompter.chat_template, **(getattr(prompter, "chat_template_kwargs", None) or {})}
        if tools := strategy._get_tools(row):
            options["tools"] = tools
        turns = strategy.get_conversation_thread(row)
        return str(strategy.tokenizer.apply_chat_template(turns, tokenize=False, **options))


def hand_over(strategy: Any, row: dict[str, Any], *, calls: bool = False) -> None:
    """Let a strategy hand every field of the row's messages to its template.

    Axolotl hands on those alone that it sees read from a variable named ``message``.
    calls: also calls of tools that the template does not show.
    """
    prompter = strategy.prompter
    apart = _MASKS | set(prompter.message_property_mappings)
    # Axolotl parses their arguments, and a row whose arguments are no JSON is no fault where nobody reads them.
    if not calls and not _shows_calls(prompter.chat_template or ""):
        apart = apart | {"tool_calls"}
    fields = {name for message in _messages(row.get(prompter.field_messages)) for name in message}
    prompter._chat_template_msg_variables = prompter.chat_template_msg_variables | (fields - apart)


@functools.lru_cache  # asked for every row
def _shows_calls(template: str) -> bool:
    return _SHOWS_CALLS.search(template) is not None


def _messages(value: Any) -> list[dict[str, Any]]:
    """The messages of a row, which may be JSON; none where it is something else, for Axolotl to tell of."""
    if isinstance(value, str):
        value = _json(value)
    return [message for message in value if isinstance(message, dict)] if isinstance(value, list) else []


def _mark(number: int) -> str:
    # Some templates ask that the id of a call has nine characters.
    return chr(_FIRST_MARK + number % _MOST_MARKS) * _MARK_LENGTH


def _unescaped(text: str) -> str:
    """The text with marks that a template has escaped, as JSON may, in their own form."""
    return _ESCAPED_MARK.sub(lambda found: str(json.loads(f'"{found[0].lower()}"')), text)


def _marked(value: Any, path: tuple[str, ...], role: str, texts: list[_Text]) -> Any:
    """The value with marks in place of its texts, which join ``texts``."""
    if isinstance(value, dict):
        marked = {}
        for key, part in value.items():
            if part is not None:
                marked[key] = part if key in _KINDS else _marked(part, (*path, str(key)), role, texts)
        return marked
    if isinstance(value, list | tuple):
        return [_marked(part, path, role, texts) for part in value]
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        return value
    inner = _json(value)
    if inner is not None:
        return json.dumps(_marked(inner, path, role, texts), ensure_ascii=False)
    return "".join(_pieces(value, path, role, texts))


def _pieces(value: str, path: tuple[str, ...], role: str, texts: list[_Text]) -> Iterator[str]:
    tag = ""
    for piece in _TAG.split(value):
        core = piece.strip()
        if _TAG.fullmatch(piece):
            tag = "" if piece.startswith("</") else piece
            yield piece
        elif core:
            before, behind = piece.split(core, 1)
            yield f"{before}{_mark(len(texts))}{behind}"
            texts.append(_Text(path, role, tag, core))
        else:
            yield piece


def _json(text: str) -> object:
    """The object or list that a text spells, as the arguments of a call often come; else None."""
    if not text.lstrip().startswith(("{", "[")):
        return None
    try:
        return json.loads(text)
    except ValueError:
        return None
