"""What is told of a dataset, or refused: text that one side alone reads, answers of two texts, rows without teacher."""

import json
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from dskd_plugin.errors import SettingError
from dskd_plugin.methods import method_of
from dskd_plugin.pair import Pair
from dskd_plugin.settings import Settings
from dskd_plugin.text.read_by import SIDES, Unread

# Columns of rows on their way here; they are taken off before the rows are kept.
UNMATCHED, PARTED, REFUSED, ONE_SIDED = "unmatched_responses", "dskd_parted", "dskd_refused", "dskd_one_sided"
NOTES = (UNMATCHED, PARTED, REFUSED, ONE_SIDED)
_SETTING = {"student": "chat_template", "teacher": "dskd.teacher.chat_template"}
_SHOWN = 200


def refusal_note(side: str, error: Exception, prompt: dict[str, Any]) -> str:
    """What is kept of a row that the template of a side, student or teacher, cannot render."""
    said = next((value for value in prompt.values() if isinstance(value, list) and value), None)
    messages = [one for one in said or () if isinstance(one, dict)]
    roles = [str(one.get("role", one.get("from", ""))) for one in messages]
    texts = [f"{role}: {one.get('content', one.get('value'))!r}" for role, one in zip(roles, messages, strict=True)]
    shown = shortened(", ".join(texts) if texts else str(prompt))
    return json.dumps({"side": side, "error": str(error) or repr(error), "row": shown, "roles": roles})


def refused(name: str, notes: list[str], rows: int) -> SettingError | None:
    """The error about rows that a template cannot render; notes: of all rows, "" for a good one."""
    places = [k for k, note in enumerate(notes) if note]
    if not places:
        return None
    first = json.loads(notes[places[0]])
    side = first["side"]
    count = sum(json.loads(notes[k])["side"] == side for k in places)
    return SettingError(
        name,
        f"rows that the {side}'s chat template renders ({_SETTING[side]})",
        (f"{count} of {rows} that it does not; the first, row {places[0] + 1}: {first['error']} [{first['row']}]"),
        f"{_advice_for(first['roles'])}, or name another template ({_SETTING[side]}).",
    )


def _advice_for(roles: list[str]) -> str:
    said = [role for role in roles if role != "system"]
    doubled = any(one == following for one, following in pairwise(said))
    unusual = [role for role in dict.fromkeys(said) if role not in ("user", "assistant")]
    # The roles of the row say more than the template's words: many name system messages in every complaint.
    if doubled:
        return "Join neighbouring messages of one role, or leave such rows out"
    if unusual:
        return f"The row has messages of the role {unusual[0]!r}: change them, or leave such rows out"
    if roles[:1] == ["system"]:
        return "Set drop_system_message: true in the dataset's entry"
    if said[:1] == ["assistant"]:
        return "The row begins with a message of the assistant: put the user's before it, or leave such rows out"
    return "Change or leave out such rows"


def beyond_rows(name: str, place: int, ids: Sequence[int], tokenizer: Any, rows: int) -> SettingError:
    """The error about a row, of this place, with a token that the teacher has no embedding for."""
    token = next(token for token in ids if token >= rows)
    return SettingError(
        name,
        "tokens that the teacher (dskd.teacher.model) has embeddings for",
        (
            f"{rows} rows of them and, in row {place + 1}, the token "
            f"{tokenizer.convert_ids_to_tokens(token)!r} of id {token}"
        ),
        (
            "Leave that text out of the rows, or give the model that was trained with this tokenizer, or the "
            "tokenizer of this model."
        ),
    )


def parted(notes: list[str], responses: int) -> str | None:
    """The line about answers without a counterpart; notes: of all rows, "" for a good one."""
    places = [k for k, note in enumerate(notes) if note]
    if not places:
        return None
    return (
        f"no counterpart of the same text on the teacher's side: {_number(responses, 'response')} in "
        f"{len(places)} of {_number(len(notes), 'row')}; they learn from the data alone; the first, row "
        f"{places[0] + 1}: {notes[places[0]]}"
    )


def unpaired(name: str, responses: int, notes: list[str], pair: Pair, settings: Settings) -> SettingError:
    """Why no response token of a dataset has a partner, and what to do."""
    first = next((k for k, note in enumerate(notes) if note), None)
    if first is not None:
        do = (
            f"The texts of row {first + 1} part here: {notes[first]}. Check that both chat templates render "
            "the answers (dskd.teacher.chat_template) and that train_on_eos and roles_to_train fit both."
        )
    else:
        do = "The texts are the same, but no token of one side is a token of the other at the same place. "
        method = method_of(settings)
        has_no_spans = "span_weight" in method.ignores or not method.in_pairs
        if pair.identity or settings.span_weight > 0 or has_no_spans:
            do += "Name a template that puts the same white space around the answers (dskd.teacher.chat_template)."
        else:
            do += (
                "A first word does not pair where one tokenizer alone puts a space before it; dskd.span_weight: 1 "
                "takes it in."
            )
    return SettingError(name, "response tokens that student and teacher share", f"none aligned of {responses}", do)


def promptless(name: str, rows: int) -> SettingError:
    """What is to be done about a dataset without a prompt that the student can answer."""
    return SettingError(
        name,
        "rows with a prompt that the student can answer (dskd.on_policy)",
        f"none in {rows} rows",
        "Mask the prompts (train_on_inputs: false, roles_to_train: [assistant]), use a dataset type with prompts, "
        "raise dskd.teacher.sequence_len if it cuts them, or remove dskd.on_policy.",
    )


def one_sided_note(found: list[Unread]) -> str:
    return json.dumps(found) if found else ""


def one_sided(notes: list[str]) -> tuple[int, list[Unread], str] | None:
    """The first row with text that one side alone reads, what it is, and in how many rows each field is so."""
    rows: Counter[tuple[str, str]] = Counter()
    first: tuple[int, list[Unread]] | None = None
    for place, note in enumerate(notes):
        if not note:
            continue
        found = [Unread(*one) for one in json.loads(note)]
        rows.update((one.reader, one.what) for one in found)
        first = first or (place, found)
    if first is None:
        return None
    parts = []
    for reader in SIDES:
        fields = [f"{what} ({_number(count, 'row')})" for (side, what), count in rows.most_common() if side == reader]
        if fields:
            parts.append(f"only the {reader} reads {', '.join(fields)}")
    return *first, f"of {_number(len(notes), 'row')}, {'; '.join(parts)}"


def one_sided_line(said: str, place: int, text: str, renderings: tuple[str, str]) -> str:
    """The warning about such rows, with the first as an example. renderings: of the student and of the teacher."""
    student, teacher = (around(rendering, text) for rendering in renderings)
    return (
        f"{said}. What one side does not read, it cannot take into account. The first, row {place + 1}: {text!r}; the "
        f"student reads {student!r}, the teacher reads {teacher!r}. Choose templates that render it, or leave it out "
        "of the rows"
    )


def around(rendering: str, text: str) -> str:
    """A rendering, shortened to what is around a text of it."""
    at = rendering.find(text)
    if at < 0 or at + len(text) < _SHOWN:
        return shortened(rendering)
    start = max(0, at - _SHOWN // 3)
    return f"… {shortened(rendering[start:])}"


def shortened(text: str) -> str:
    """A text without its middle."""
    if len(text) <= _SHOWN:
        return text
    return f"{text[: _SHOWN * 2 // 3]} … {text[-_SHOWN // 3 :]}"


def _number(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"
