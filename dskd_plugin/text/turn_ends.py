"""Which token ends a turn, as a chat template shows it."""

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
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    answer = PROBE[1]["content"].encode()
    spelled = [table.literal[i] or b"" for i in ids]
    whole = b"".join(spelled)
    if answer not in whole.lower() and answer.lower() not in whole.lower():
        return eos
    after, at = whole.lower().rindex(answer.lower()) + len(answer), 0
    following = []
    for token_id, text_bytes in zip(ids, spelled, strict=True):
        if at >= after:
            following.append(token_id)
        at += len(text_bytes)
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
