"""Where each token of a student begins in the tokens of a teacher, also inside one, and how far its own bytes reach."""

from collections.abc import Iterator
from typing import Literal, NamedTuple

from dskd_plugin.core.exact_alignment import match_covers, match_spans, match_starts
from dskd_plugin.text.matching import Overlay
from dskd_plugin.text.responses import Response


class Placed(NamedTuple):
    """A token of the student, `student`, and the teacher's token in which it begins, `teacher`, as indices.

    offset: bytes of the teacher's token before it; below 0, its own bytes before the teacher's token. more: how many
    further teacher tokens its bytes reach into.
    """

    student: int
    teacher: int
    offset: int = 0
    more: int = 0


def matched(
    one: Response,
    other: Response,
    spans: Overlay,
    sides: tuple[bytes, bytes],
    by: Literal["exact", "starts", "bytes"],
) -> Iterator[Placed]:
    """The student's tokens and those of the teacher that cover the same bytes, or begin at the same, or hold the first.

    sides: see `align._before_words`; tokens that begin together with other values do not stand at the same place.
    by: "bytes": the student's tokens whose every byte lies in teacher tokens, and is what these spell there. A dummy
    space is a byte of the token that spells it, though it is none of the text: words before which one side alone has
    one begin at different bytes of their tokens.
    """
    if by != "bytes":
        pairs = (match_spans if by == "exact" else match_starts)(*spans.offsets)
        yield from (Placed(i, j) for i, j in pairs if sides[0][i] == sides[1][j])
        return
    student_starts, _, teacher_starts, _ = spans.offsets
    for i, j, more in match_covers(*spans.offsets):
        begins = student_starts[i] - (i in spans.padded[0]), teacher_starts[j] - (j in spans.padded[1])
        offset = begins[0] - begins[1]
        if offset == 0 and sides[0][i] != sides[1][j]:
            continue
        theirs = range(j, j + more + 1)
        if one.table.bytes[one.ids[i]] is None or any(other.table.bytes[other.ids[k]] is None for k in theirs):
            continue
        said, text = one.literal(i)[max(0, -offset) :], b"".join(map(other.literal, theirs))
        if text.startswith(said, max(0, offset)):
            yield Placed(i, j, offset, more)
