"""Reasoning before the final answer: where an assistant's text begins, and where in it the answer does.

Everything between the role header and the end of the turn is the assistant's. A generation prompt may open the
reasoning itself (``<think>``), and a model may write it between markers, plain text or special tokens. The markers are
read off the chat template where it shows them; the known ones hold besides.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from difflib import Match, SequenceMatcher
from typing import Any

Turn = dict[str, str]
Render = Callable[[list[Turn], bool], str]  # turns and whether to add a generation prompt -> text
Markers = tuple[str, str]  # what opens and what closes the reasoning

KNOWN: tuple[Markers, ...] = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("<seed:think>", "</seed:think>"),
    ("[THINK]", "[/THINK]"),
    ("◁think▷", "◁/think▷"),
    ("<|think|>", "<|/think|>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("<|inner_prefix|>", "<|inner_suffix|>"),
    ("<|channel>thought", "<channel|>"),
    ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"),
)
# What some models put around the answer after their reasoning.
WRAPPERS: tuple[Markers, ...] = (
    ("<response>", "</response>"),
    ("<answer>", "</answer>"),
    ("<|begin_of_solution|>", "<|end_of_solution|>"),
    ("<|START_RESPONSE|>", "<|END_RESPONSE|>"),
)
FIELDS = ("reasoning_content", "reasoning", "thinking")  # of a message, by the names that templates give it
_QUESTION, _ANSWER, _THOUGHT = "Zulu?", "Quebec", "Oscar"
_TAG = re.compile(r"<\|?[^<>|\s/]+\|?>|\[[^\[\]\s/]+\]|◁[^◁▷\s/]+▷")
_OPPOSITES = (("START", "END"), ("start", "end"), ("BEGIN", "END"), ("begin", "end"), ("prefix", "suffix"))


@dataclass(frozen=True)
class Split:
    """An assistant's text. whole: all of it; closed: whether reasoning, if there is any, came to its end."""

    whole: str
    reasoning: str
    answer: str
    closed: bool = True


@dataclass(frozen=True)
class AssistantForm:
    """How a chat template begins an assistant's turn.

    opened: what the generation prompt writes after the role header; it belongs to the assistant's text.
    lead: what the template writes between the generation prompt and an answer without reasoning.
    own: markers that the template or the vocabulary knows; a closing tag of them counts without its opening one.
    """

    opened: str = ""
    lead: str = ""
    own: tuple[Markers, ...] = ()

    def split(self, said: str) -> Split:
        """The text after the generation prompt, as reasoning and answer."""
        whole = (self.opened + said.removeprefix(self.lead)).rstrip()
        begun = [pair for pair in (*self.own, *KNOWN) if whole.lstrip().startswith(pair[0])]
        for opening, closing in begun:
            before, found, after = whole.lstrip().removeprefix(opening).rpartition(closing)
            if found:
                return Split(whole, before.strip(), self._answer(after))
        if begun:
            return Split(whole, whole.lstrip().removeprefix(begun[0][0]).strip(), "", closed=False)
        for opening, closing in self.own:
            before, found, after = whole.rpartition(closing)
            # Plain words that close, such as "Result:", may stand in any answer; tags do not.
            if not found or closing[0] not in "<[◁":
                continue
            if opening not in before:
                return Split(f"{opening}\n{whole.lstrip()}", before.strip(), self._answer(after))
            lead, _, thought = before.partition(opening)  # words before the reasoning belong to no answer
            return Split(whole, f"{lead.strip()}\n{thought.strip()}".strip(), self._answer(after))
        return Split(whole, "", whole)

    @property
    def is_marked(self) -> bool:
        """Whether it shows where reasoning that the generation prompt opens comes to its end."""
        return not self.opened or any(self.opened.lstrip().startswith(opening) for opening, _ in (*self.own, *KNOWN))

    def _answer(self, after: str) -> str:
        """What follows the reasoning, without the line breaks in between; an indented answer stays indented."""
        return _without_breaks(after).removeprefix(self.lead.strip())


def unwrapped(answer: str, asked: str) -> str:
    """An answer after reasoning, without the tags around it that the conversation does not ask for by name."""
    for opening, closing in WRAPPERS:
        if answer.lstrip().startswith(opening) and opening not in asked:
            inside, found, after = answer.lstrip().removeprefix(opening).rpartition(closing)
            if not found:
                inside, after = after, ""
            return answer if after.strip() else _without_breaks(inside).rstrip()
    return answer


def _without_breaks(text: str) -> str:
    return re.sub(r"\A(?:\s*\n|[^\S\n]+)", "", text)


def form_of(tokenizer: Any, template: str, options: Mapping[str, Any]) -> AssistantForm:
    """`assistant_form` of a tokenizer's chat template. options: variables of the template."""

    def render(turns: list[Turn], generation: bool) -> str:
        text: str = tokenizer.apply_chat_template(
            turns, chat_template=template, add_generation_prompt=generation, tokenize=False, **options
        )
        return text

    return assistant_form(render, template, tokenizer.get_added_vocab())


def markers_of(templates: Iterable[tuple[Any, str | None, Mapping[str, Any]]]) -> tuple[Markers, ...]:
    """The markers that these tokenizers, templates and variables show, then the known ones."""
    shown = [
        pair
        for tokenizer, template, options in templates
        if template is not None
        for pair in form_of(tokenizer, template, options).own
    ]
    return tuple(dict.fromkeys([*shown, *KNOWN]))


def assistant_form(render: Render, template: str, vocabulary: Iterable[str] = ()) -> AssistantForm:
    """What a chat template and the added tokens of its vocabulary show; nothing where the template does not show it.

    template: its source. A template may render another turn than the last one without its reasoning, and say in the
    generation prompt alone that reasoning comes.
    """
    asked = [{"role": "user", "content": _QUESTION}]
    answered = [*asked, {"role": "assistant", "content": _ANSWER}]
    prompt = _rendered(render, asked, True)
    earlier, last = _before_answer(render, [*answered, *asked]), _before_answer(render, answered)
    plain = earlier if earlier is not None else last
    if plain is None or prompt is None:
        return AssistantForm()
    opened, lead = _opened(prompt, plain)
    shown = [*_from_field(render, asked, prompt, plain)]
    if opened.strip() and last is not None and last.startswith(prompt) and last[len(prompt) :].strip():
        shown.append((opened.strip(), last[len(prompt) :].strip()))
    tokens = set(vocabulary)
    known = (*KNOWN, *((tag, end) for tag in _TAG.findall(opened) for end in _ends_of(tag)))
    # What the prompt opens is closed by its opposite, whether or not the template shows that.
    shown += [pair for pair in known if pair[1] in template or pair[1] in tokens or pair[0] == opened.strip()]
    return AssistantForm(opened if opened.strip() else "", lead, tuple(dict.fromkeys(shown)))


def _before_answer(render: Render, turns: list[Turn]) -> str | None:
    """The text up to the probe's answer; None where the template does not render it."""
    before, found, _ = (_rendered(render, turns, False) or "").partition(_ANSWER)
    return before if found else None


def _rendered(render: Render, turns: list[Turn], generation: bool) -> str | None:
    try:
        return render(turns, generation)
    except Exception:  # whatever a template raises: what it does not render shows nothing
        return None


def _opened(prompt: str, plain: str) -> Markers:
    """What the prompt opens beyond the header of a plain answer, and what the template goes on with before one."""
    if not plain.startswith(prompt):
        return _beyond_header(prompt, plain)
    rest = plain[len(prompt) :]
    for tag in _TAG.findall(_after_question(prompt)):
        if any(end in rest for end in _ends_of(tag)):  # also a plain answer has the reasoning, empty
            return prompt[prompt.rindex(tag) :], ""
    return "", rest


def _beyond_header(prompt: str, plain: str) -> Markers:
    """The same where a plain answer does not go on from the prompt: they part after the header, maybe before it too."""
    if prompt.startswith(plain):
        return prompt[len(plain) :], ""
    asked, answered = _after_question(prompt), _after_question(plain)
    # The end of the question's turn may differ before the header.
    found = _common(asked, answered)
    end = found.a + found.size
    cut = [tag.start() for tag in _TAG.finditer(asked) if tag.start() < end < tag.end()]
    opened, lead = asked[min([end, *cut]) :], answered[found.b + found.size :]
    return (opened, "") if opened else ("", lead)


def _common(one: str, other: str) -> Match:
    """The longest text that both have: the header of the turn, which all ways to begin it share."""
    return SequenceMatcher(None, one, other, autojunk=False).find_longest_match()


def _after_question(text: str) -> str:
    return text.rsplit(_QUESTION, 1)[-1]


def _from_field(render: Render, asked: list[Turn], prompt: str, plain: str) -> Iterator[Markers]:
    """The markers between which a template writes the reasoning of a message."""
    turn = {"role": "assistant", "content": _ANSWER, **dict.fromkeys(FIELDS, _THOUGHT)}
    before = _before_answer(render, [*asked, turn])
    if before is None or _THOUGHT not in before:
        return
    head, _, between = before.partition(_THOUGHT)
    begun = _after_question(head)
    found = [_common(_after_question(one), begun) for one in (prompt, plain)]
    opening, closing = begun[min(match.b + match.size for match in found) :].strip(), between.strip()
    if opening and closing:
        yield opening, closing


def _ends_of(tag: str) -> Iterator[str]:
    """Forms in which a tag is closed."""
    inner = re.search(r"[\w:-]", tag)
    if inner is not None:
        yield f"{tag[: inner.start()]}/{tag[inner.start() :]}"
    for word, opposite in _OPPOSITES:
        if word in tag:
            yield tag.replace(word, opposite)
