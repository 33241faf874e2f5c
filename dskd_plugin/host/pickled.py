"""The state of an object as bytes: by Python's pickler in C, and the same in every process for the same content."""

import io
import pickle
from collections.abc import Iterable
from typing import Any


def packed(state: dict[str, Any]) -> bytes | None:
    """The bytes of a state; None where it holds what only dill can pickle, such as a function within another."""
    stream = io.BytesIO()
    try:
        _Packer(stream, protocol=5).dump(state)
    except Exception:  # whatever the objects of other libraries raise
        return None
    return stream.getvalue()


def unpacked(content: bytes) -> dict[str, Any]:
    """The state of which `packed` made these bytes."""
    state: dict[str, Any] = _Unpacker(io.BytesIO(content)).load()
    return state


class _Packer(pickle.Pickler):
    def persistent_id(self, part: Any) -> tuple[type, list[Any]] | None:
        kind = type(part)
        # The order within a set of texts is another in every process.
        return (kind, sorted(part, key=repr)) if kind is set or kind is frozenset else None


class _Unpacker(pickle.Unpickler):
    def persistent_load(self, part: tuple[type, Iterable[Any]]) -> Any:
        kind, content = part
        return kind(content)
