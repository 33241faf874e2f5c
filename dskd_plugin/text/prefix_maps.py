"""What the tokens of a teacher open for a student, by their bytes: the maps of byte-prefix marginalization.

A *class* is what the student's tokens are told apart by, a number. Source: arXiv 2607.22334.
"""

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache

import numpy as np
import torch

from dskd_plugin.core.events import Events
from dskd_plugin.core.prefixes import NONE, Places, PrefixMap
from dskd_plugin.text.tokens import TokenTable, ids_of_bytes

# A map of what a text goes on with after some bytes may hold most of the teacher's ids: 1 MB each.
_KEPT_MAPS = 256


class PrefixMaps:
    """The maps of one pair, each made when its bytes occur for the first time.

    opens: the class of each teacher id where the student's row and the teacher's token begin together.
    classes: the class of each byte string that is a token. residual: the class of what no token takes.
    """

    def __init__(
        self,
        student: TokenTable,
        teacher: TokenTable,
        *,
        opens: Sequence[int],
        classes: Mapping[bytes, int],
        residual: int,
        device: torch.device | str = "cpu",
    ) -> None:
        self._student, self._teacher, self._device = student, teacher, device
        self._classes, self.residual = classes, residual
        texts = sorted((text, token) for token, text in enumerate(teacher.bytes[: len(opens)]) if text)
        self._texts, self._ids = [text for text, _ in texts], np.array([token for _, token in texts], dtype=np.int64)
        self._keys = sorted(classes)
        self.together = PrefixMap(None, torch.tensor(opens)).to(torch.device(device))
        # All the maps of bytes already said hold each teacher id no oftener than it has bytes.
        self._inside = lru_cache(None)(self._make_inside)
        self._after = lru_cache(_KEPT_MAPS)(self._make_after)

    def inside(self, said: bytes) -> PrefixMap:
        """The map for a row that begins inside a teacher token; said: the bytes of that token before the row.

        Given that the token begins with these bytes. One that is these bytes and no more says nothing of what follows:
        it is residual.
        """
        return self._inside(said) if said else self.together

    def after(self, lead: bytes) -> PrefixMap:
        """The map for a teacher token that begins inside a student token; lead: the bytes of that one before it."""
        return self._after(lead) if lead else self.together

    def places(
        self, gold: Sequence[int], offsets: Sequence[int], targets: Sequence[int], further: Sequence[Sequence[int]]
    ) -> Places:
        """Where rows stand in the teacher's text, without the teacher's states.

        gold: the student's token of each row. offsets: how many bytes after its start it begins in the teacher's token
        of this row, targets; below 0, so many bytes before it. further: the teacher tokens that follow, as far as the
        student's token goes.
        """
        numbers: dict[int, int] = {}
        maps: list[PrefixMap] = []

        def number(one: PrefixMap) -> int:
            if id(one) not in numbers:
                numbers[id(one)] = len(maps)
                maps.append(one)
            return numbers[id(one)]

        rows: list[tuple[int, int]] = []
        more: list[tuple[int, int, int, int]] = []
        for row, (token, offset, target, following) in enumerate(zip(gold, offsets, targets, further, strict=True)):
            text = self._teacher.literal[target] or b""
            said = (self._student.literal[token] or b"")[: max(0, -offset)]
            first = self.after(said) if offset < 0 else self.inside(text[:offset])
            rows.append((number(first), target if following else NONE))
            said += text[max(0, offset) :]
            for depth, one in enumerate(following, 1):
                goes_on = one if depth < len(following) else NONE
                more.append((row, depth, number(self.after(said)), goes_on))
                said += self._teacher.literal[one] or b""
        map_N, next_N = torch.tensor(rows, dtype=torch.long).reshape(-1, 2).T
        row_Q, depth_Q, map_Q, next_Q = torch.tensor(more, dtype=torch.long).reshape(-1, 4).T
        return Places(
            maps=tuple(maps),
            map_N=map_N,
            next_N=next_N,
            row_Q=row_Q,
            depth_Q=depth_Q,
            map_Q=map_Q,
            next_Q=next_Q,
            teacher_QE=torch.zeros(len(more), 0),
        )

    def opened_by(self, text: bytes) -> int:
        """The class of the longest token that a text begins with."""
        return longest(self._classes, text, self.residual)

    def _make_inside(self, said: bytes) -> PrefixMap:
        first, stop = _beginning_with(self._texts, said)
        return self._map(self._ids[first:stop], [self.opened_by(text[len(said) :]) for text in self._texts[first:stop]])

    def _make_after(self, lead: bytes) -> PrefixMap:
        found = np.full(len(self._texts), NONE)
        longer = self._keys[slice(*_beginning_with(self._keys, lead))]
        # The longest token comes last and holds.
        for key in sorted(longer, key=len):
            if key != lead:
                first, stop = _beginning_with(self._texts, key[len(lead) :])
                found[first:stop] = self._classes[key]
        changed = np.flatnonzero(found != NONE)
        return self._map(self._ids[changed], found[changed].tolist(), self.opened_by(lead))

    def _map(self, ids: np.ndarray, classes: list[int], others: int | None = None) -> PrefixMap:
        used = sorted({*classes} | ({others} if others is not None else set()))
        place = {one: k for k, one in enumerate(used)}
        return PrefixMap(
            torch.from_numpy(ids.copy()),
            torch.tensor([place[one] for one in classes], dtype=torch.long),
            torch.tensor(used, dtype=torch.long),
            None if others is None else place[others],
        ).to(torch.device(self._device))


def maps_by_ids(
    student: TokenTable, teacher: TokenTable, to_student: Sequence[int], ids: int, device: torch.device
) -> PrefixMaps:
    """Each student id is a class of its own; the residual is the next number.

    to_student: the student id that means the same as each teacher id, -1 for none, see `Overlap`; special tokens
    have one by their role alone. ids: how many real ids the student's head has.
    """
    classes = ids_of_bytes(student, ids)
    opens = [
        same if same >= 0 else longest(classes, text or b"", ids)
        for same, text in zip(to_student, teacher.bytes, strict=False)
    ]
    return PrefixMaps(student, teacher, opens=opens, classes=classes, residual=ids, device=device)


def maps_by_events(student: TokenTable, teacher: TokenTable, events: Events, device: torch.device) -> PrefixMaps:
    """The student's tokens are told apart by their events; the residual is one more.

    Where both begin together, the class of a teacher token is its event, as both tokenizers would cut it. The bytes
    that are left of a token belong to the event of the longest token of either side that they begin with.
    """
    opens, residual = events.teacher_U.tolist(), events.count
    if events.student_lacks_last:  # a class that no token of the student has
        opens = [residual if one == events.count - 1 else one for one in opens]
    ours = zip(student.bytes, events.student_V.tolist(), strict=False)
    classes = classes_of([*ours, *zip(teacher.bytes, opens, strict=False)])
    return PrefixMaps(student, teacher, opens=opens, classes=classes, residual=residual, device=device)


def longest(classes: Mapping[bytes, int], text: bytes, default: int) -> int:
    """The class of the longest of the byte strings that a text begins with."""
    for size in range(len(text), 0, -1):
        found = classes.get(text[:size])
        if found is not None:
            return found
    return default


def classes_of(texts: Iterable[tuple[bytes | None, int]]) -> dict[bytes, int]:
    """The class of each byte string; of several with the same bytes the first."""
    found: dict[bytes, int] = {}
    for text, one in texts:
        if text:
            found.setdefault(text, one)
    return found


def _beginning_with(ordered: Sequence[bytes], prefix: bytes) -> tuple[int, int]:
    """The range of the byte strings, in rising order, that begin with a prefix."""
    first = bisect_left(ordered, prefix)
    after = prefix.rstrip(b"\xff")
    # The first string that is larger than all that begin with it; none where it has no other bytes than 255.
    stop = bisect_left(ordered, after[:-1] + bytes([after[-1] + 1])) if after else len(ordered)
    return first, stop
