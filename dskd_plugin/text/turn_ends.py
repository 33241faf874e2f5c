"""Which token ends a turn, as a chat template shows it."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from dskd_plugin.errors import SettingError
from dskd_plugin.text.tokens import TokenTable

PROBE = [{"role": "user", "content": "Zulu?"}, {"role": "assistant", "content": "Quebec"}]
Ends = tuple[int | None, int | None]  # end-of-turn ids of student and teacher, see `end_of_turn`


def end_of_turn(
    tokenizer: Any, chat_template: str | None, table: TokenTable, options: Mapping[str, Any] | None = None
) -> int | None:
    """Id of the token that ends an assistant turn: the first special, else added, token after its text.

    A short conversation is rendered with chat_template, given options as its variables. Without a template, or where
    no such token follows, it is the end-of-sequence token.
    """
    eos = getattr(tokenizer, "eos_token_id", None)
    if chat_template is None:
        return eos
    try:
        text = tokenizer.apply_chat_template(PROBE, chat_template=chat_template, tokenize=False, **(options or {}))
    except Exception as error:
        raise SettingError(
            "chat template",
            "one that renders a user and an assistant message",
            f"{error!r}",
            "Choose another chat template.",
        ) from error
    # In the text and not in its tokens: a vocabulary may lack letters of the answer, and a template change their case.
    answers = list(re.finditer(re.escape(PROBE[1]["content"]), text, re.IGNORECASE))
    if not answers:
        return eos
    after = text[answers[-1].end() :]
    following = tokenizer(after, add_special_tokens=False)["input_ids"]
    # The unknown token is a special one, also where it stands for a line break.
    if table.unknown is not None and (table.literal[table.unknown] or b"") not in after.encode():
        following = [token_id for token_id in following if token_id != table.unknown]
    for kind in (table.special, table.added):
        for token_id in following:
            if token_id in kind:
                return int(token_id)
    return eos


def role_pairs(ends: Sequence[Ends], student: TokenTable, teacher: TokenTable) -> list[tuple[int, int]]:
    """(student id, teacher id) of tokens with one role: the ends of turn of the data, then the ends of sequence.

    A student with one token for both gives it to both roles of the teacher; the first pair of an id counts.
    """
    ours = student.eos if student.eos is not None or not ends else ends[0][0]
    return list(dict.fromkeys((a, b) for a, b in [*ends, (ours, teacher.eos)] if a is not None and b is not None))
