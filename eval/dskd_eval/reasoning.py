"""Reasoning traces: where the answer of a model begins that thinks aloud first.

A trace stands between an opening and a closing marker. The prompt may have opened it already; there may be several.
The answer begins after the last closing marker, and a trace without an end leaves an empty answer. Markers that an
answer merely quotes, in code or in quotation marks, are text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from markdown_it import MarkdownIt

from dskd_eval.errors import UserError

Pair = tuple[str, str]
State = Literal["none", "closed", "unclosed", "unread"]

# Opening and closing markers of published reasoning models.
FAMILIES: tuple[Pair, ...] = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("[THINK]", "[/THINK]"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("<seed:think>", "</seed:think>"),
    ("◁think▷", "◁/think▷"),
    ("<|channel|>analysis<|message|>", "<|channel|>final<|message|>"),
)
# What some models put around the answer after a trace.
_WRAPPERS: tuple[Pair, ...] = (
    ("<|START_RESPONSE|>", "<|END_RESPONSE|>"),
    ("<|begin_of_solution|>", "<|end_of_solution|>"),
    ("<response>", "</response>"),
    ("<answer>", "</answer>"),
)
_QUOTED = re.compile(r"""(?<!\w)[rbfuRBFU]{0,2}(["'])(?:(?!\1).)*\1(?!\w)|“[^”\n]*”|«[^»\n]*»""")
_CODE_SPAN = re.compile(r"(?<!`)(`+)(?!`)((?:(?!\n[ \t]*\n).)+?)(?<!`)\1(?!`)", re.DOTALL)


@dataclass(frozen=True)
class Separated:
    """An answer apart from the reasoning before it. state: 'none' (no trace), 'closed' or 'unclosed'."""

    answer: str
    reasoning: str
    state: State


def choose(option: str, templates: Sequence[str]) -> tuple[Pair, ...]:
    """Markers of `--reasoning`: 'auto' (those that a chat template knows), 'off', or 'START,END'."""
    if option == "off":
        return ()
    if option == "auto":
        return tuple(pair for pair in FAMILIES if any(marker in text for text in templates for marker in pair))
    start, _, end = (part.strip() for part in option.partition(","))
    if not start or not end or start == end:
        raise UserError(
            "--reasoning",
            expected="auto, off, or two different markers START,END",
            got=repr(option),
            fix="Write for example --reasoning '<think>,</think>'.",
        )
    return ((start, end),)


def opened_by(prompt: str, messages: Sequence[Mapping[str, str]] | None, pairs: Sequence[Pair]) -> Pair | None:
    """The pair whose opening marker the prompt ends with, so that the answer begins inside a trace.

    messages: the conversation that a chat template rendered; what it holds itself does not count, except the
    beginning of an answer.
    """
    tail = prompt
    content = str(messages[-1]["content"]).strip() if messages else ""
    if messages and content:
        place = prompt.rfind(content)
        tail = prompt[place + len(content) :] if place >= 0 else prompt
        if messages[-1]["role"] == "assistant":
            tail = content + tail
    for pair in pairs:
        start, end = pair
        last = tail.rfind(start)
        if last > tail.rfind(end) and (content or not tail[last + len(start) :].strip()):
            return pair
    return None


def answer_start(text: str, pairs: Sequence[Pair], opened: Pair | None = None) -> int | None:
    """Where the answer begins: 0 without a trace, None inside a trace that has no end."""
    begin, traced = 0, False
    first = opened or next((pair for pair in pairs if text.lstrip().startswith(pair[0])), None)
    if first is not None:
        # The first closing marker ends a trace, whatever stands around it: drafts may hold open code blocks.
        begin, traced = text.find(first[1]) + len(first[1]), True
        if first[1] not in text:
            return None
    while (found := _next(text, begin, pairs, unclosed_is_code=traced)) is not None:
        place, marker, pair = found
        if marker == pair[0]:
            closing = text.find(pair[1], place)
            if closing < 0:
                return None
            place, marker = closing, pair[1]
        begin, traced = place + len(marker), True
    return begin


def separate(text: str, pairs: Sequence[Pair], opened: Pair | None = None) -> Separated:
    """An answer and the reasoning before it."""
    if not pairs:
        known = any(text.lstrip().startswith(start) for start, _ in FAMILIES)
        return Separated(text, "", "unread" if known else "none")
    begin = answer_start(text, pairs, opened)
    if begin is None:
        return Separated("", text, "unclosed")
    if begin == 0:
        return Separated(text, "", "none")
    return Separated(_unwrapped(text[begin:]), text[:begin], "closed")


def _next(text: str, begin: int, pairs: Sequence[Pair], *, unclosed_is_code: bool) -> tuple[int, str, Pair] | None:
    """The next marker after `begin` that is no quotation: its place, itself and its pair."""
    owners = {marker: pair for pair in pairs for marker in pair}
    if not any(marker in text[begin:] for marker in owners):
        return None
    literal = _literal(text[begin:], unclosed_is_code=unclosed_is_code)
    pattern = "|".join(re.escape(marker) for marker in sorted(owners, key=len, reverse=True))
    for found in re.finditer(pattern, text[begin:]):
        if not any(first <= found.start() and found.end() <= last for first, last in literal):
            return begin + found.start(), found[0], owners[found[0]]
    return None


def _literal(text: str, *, unclosed_is_code: bool) -> list[tuple[int, int]]:
    """Spans of text that are code or quotations. unclosed_is_code: also a code block without an end."""
    lines = text.split("\n")
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line) + 1)
    spans = []
    for token in MarkdownIt("commonmark", {"html": False}).parse(text):
        if token.type == "fence" and token.map:
            first, last = token.map
            end = lines[last - 1].strip().lstrip("> \t")
            closed = last - 1 > first and end.startswith(token.markup) and not end.strip(token.markup[0])
            if closed or unclosed_is_code:
                spans.append((starts[first], starts[last]))
    spans += [found.span() for found in _CODE_SPAN.finditer(text)]
    return spans + [found.span() for found in _QUOTED.finditer(text)]


def _unwrapped(text: str) -> str:
    """The answer without blank lines before it and without the tags that some models put around it."""
    # Indentation counts where a program follows.
    below = re.sub(r"\A(?:[ \t]*\n)+", "", text)
    text = below if below != text else text.lstrip(" \t")
    for start, end in _WRAPPERS:
        if text.lstrip().startswith(start):
            inside = text.lstrip()[len(start) :]
            return _unwrapped(inside.rpartition(end)[0] if end in inside else inside)
    return text
