"""Reasoning traces: where the answer of a model begins that thinks aloud first.

A trace stands between an opening and a closing marker. The prompt may have opened it already; there may be several.
The answer begins after the last closing marker, and a trace without an end leaves an empty answer. Markers that an
answer merely quotes, in code or in quotation marks, are text.
"""

from __future__ import annotations

import functools
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
QUOTED = re.compile(r"""(?<!\w)[rbfuRBFU]{0,2}(["'])(?:(?!\1).)*\1(?!\w)|“[^“”\n]*”|«[^«»\n]*»""")
_QUOTE = re.compile(r"""(?<!\w)[rbfuRBFU]{0,2}["']|[“«]""")
CODE_SPAN = re.compile(r"(?<!`)(`+)(?!`)((?:(?!\n[ \t]*\n).)+?)(?<!`)\1(?!`)", re.DOTALL)
_TICKS = re.compile("`+")
# What may open each kind of span within a line, and the whole span.
_KINDS = ((_TICKS, CODE_SPAN), (_QUOTE, QUOTED))
_FENCE = re.compile("```|~~~")
# Blocks alone: what stands within a line is of no use here and slow to read.
_MARKDOWN = MarkdownIt("commonmark", {"html": False}).disable("inline")


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
    last_end = {pair: text.rfind(pair[1]) for pair in pairs}
    while (found := _next(text, begin, last_end, unclosed_is_code=traced)) is not None:
        place, marker, pair = found
        if marker == pair[0]:
            if last_end[pair] < place:
                return None
            place, marker = text.find(pair[1], place), pair[1]
        begin, traced = place + len(marker), True
    return begin


def separate(text: str, pairs: Sequence[Pair], opened: Pair | None = None, asked: str = "") -> Separated:
    """An answer and the reasoning before it. asked: what the prompt says; tags that it names stay in the answer."""
    if not pairs:
        known = any(text.lstrip().startswith(start) for start, _ in FAMILIES)
        return Separated(text, "", "unread" if known else "none")
    begin = answer_start(text, pairs, opened)
    if begin is None:
        return Separated("", text, "unclosed")
    if begin == 0:
        return Separated(text, "", "none")
    wrappers = [pair for pair in _WRAPPERS if not any(tag in asked for tag in pair)]
    return Separated(_unwrapped(text[begin:], wrappers), text[:begin], "closed")


def _next(
    text: str, begin: int, last_end: Mapping[Pair, int], *, unclosed_is_code: bool
) -> tuple[int, str, Pair] | None:
    """The next marker after `begin` that is no quotation: its place, itself and its pair.

    last_end: where the last closing marker of each pair stands.
    """
    owners = {marker: pair for pair in last_end for marker in pair}
    literal = _Literal(text, begin, unclosed_is_code=unclosed_is_code)
    for found in _any_of(tuple(owners)).finditer(text, begin):
        marker, pair = found[0], owners[found[0]]
        unclosed = marker == pair[0] and last_end[pair] < found.start()
        if unclosed and not _may_open(text, begin, found.start(), marker):
            continue
        if not literal.holds(found.start(), found.end()):
            return found.start(), marker, pair
    return None


@functools.lru_cache(maxsize=64)
def _any_of(markers: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(re.escape(marker) for marker in sorted(markers, key=len, reverse=True)))


def _may_open(text: str, begin: int, place: int, marker: str) -> bool:
    """Whether a marker without an end opens a trace: within a line it is talked about, unless it is a control token."""
    line = max(begin, text.rfind("\n", begin, place) + 1)
    return marker.startswith("<|") or not text[line:place].strip()


class _Literal:
    """Code and quotations after `begin`, read no further than asked, so that many markers take no square of time.

    unclosed_is_code: also a code block without an end.
    """

    def __init__(self, text: str, begin: int, *, unclosed_is_code: bool) -> None:
        self.text, self.begin, self.unclosed_is_code = text, begin, unclosed_is_code
        self.blocks: list[tuple[int, int]] = []
        self.read = self.block = 0
        self.spans = {kind: (begin, begin) for kind in _KINDS}

    def holds(self, first: int, last: int) -> bool:
        """Whether the text from first to last is code or quoted; asked from left to right."""
        quoted = [self._in_line(kind, first, last) for kind in _KINDS]
        return any(quoted) or self._in_block(first, last)

    def _in_line(self, kind: tuple[re.Pattern[str], re.Pattern[str]], first: int, last: int) -> bool:
        opening, whole = kind
        start, end = self.spans[kind]
        while end <= first and (opened := opening.search(self.text, end, first)):
            found = whole.match(self.text, opened.start())
            start, end = found.span() if found else (opened.end(), opened.end())
        self.spans[kind] = (start, end) if end > first else (first, first)
        return start <= first and last <= end

    def _in_block(self, first: int, last: int) -> bool:
        if self.read < last and not _FENCE.search(self.text, self.begin, first):
            return False
        if self.read < last:
            # Whether a block has an end shows at the end of the text; else twice as far as asked is enough.
            wanted = self.begin + 2 * (last - self.begin) if self.unclosed_is_code else len(self.text)
            line_end = self.text.find("\n", min(wanted, len(self.text)))
            self.read = line_end if line_end >= 0 else len(self.text)
            found = code_blocks(self.text[self.begin : self.read], unclosed_is_code=self.unclosed_is_code)
            self.blocks = [(self.begin + start, self.begin + end) for start, end in found]
            self.block = 0
        while self.block < len(self.blocks) and self.blocks[self.block][1] < last:
            self.block += 1
        return self.block < len(self.blocks) and self.blocks[self.block][0] <= first


def code_blocks(text: str, *, unclosed_is_code: bool) -> list[tuple[int, int]]:
    """Spans of the fenced blocks of a text."""
    lines = text.split("\n")
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line) + 1)
    spans = []
    for token in _MARKDOWN.parse(text):
        if token.type == "fence" and token.map:
            first, last = token.map
            end = lines[last - 1].strip().lstrip("> \t")
            closed = last - 1 > first and end.startswith(token.markup) and not end.strip(token.markup[0])
            if closed or unclosed_is_code:
                spans.append((starts[first], starts[last]))
    return spans


def _unwrapped(text: str, wrappers: Sequence[Pair]) -> str:
    """The answer without blank lines before it and without the tags that some models put around it."""
    # Indentation counts where a program follows.
    below = re.sub(r"\A(?:[ \t]*\n)+", "", text)
    text = below if below != text else text.lstrip(" \t")
    for start, end in wrappers:
        if text.lstrip().startswith(start):
            inside = text.lstrip()[len(start) :]
            return _unwrapped(inside.rpartition(end)[0] if end in inside else inside, wrappers)
    return text
