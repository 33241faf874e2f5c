"""A generated answer as a message of the dataset, with its reasoning or without."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dskd_plugin.errors import SettingError
from dskd_plugin.text.reasoning import AssistantForm, unwrapped

if TYPE_CHECKING:
    from dskd_plugin.generation.answers import Answer

FIELD = "reasoning_content"  # as Axolotl and most chat templates name it


@dataclass(frozen=True)
class Written:
    """row: number of the prompt; whole: ended before the limit and, where it reasons, has a final answer.

    ended: before the limit; reasoned: has reasoning.
    """

    row: int
    message: dict[str, Any]
    whole: bool
    ended: bool
    reasoned: bool

    @property
    def is_empty(self) -> bool:
        return not self.message["content"]


def as_message(answer: "Answer", form: AssistantForm, reasoning: str, asked: str = "", field: str = FIELD) -> Written:
    """reasoning: keep it in the text, drop it, or put it into the ``field`` of the message. asked: the conversation."""
    found = form.split(answer.text)
    reasons = bool(found.reasoning) or not found.closed
    content = found.answer
    if reasons:
        content = found.whole.lstrip() if reasoning == "keep" else unwrapped(found.answer, asked)
    message = {"role": "assistant", "content": content}
    if reasoning == "field" and reasons:
        message[field] = found.reasoning
    return Written(answer.row, message, answer.finished and found.closed, answer.finished, reasons)


def check_reasoning(form: AssistantForm, reasoning: str) -> None:
    """Raise ``ValueError`` where reasoning is to be told from the answer and nothing shows where it ends."""
    if reasoning != "keep" and not form.is_marked:
        raise SettingError(
            f"--reasoning {reasoning}",
            "a chat template that shows how reasoning ends",
            f"one whose generation prompt opens it with {form.opened!r}",
            "Use --reasoning keep, or another dskd.teacher.chat_template.",
        )
