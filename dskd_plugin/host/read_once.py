"""A text that is tokenized twice in a row is read once: Axolotl asks for the ids of a row, then for their places."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def read_once(tokenizer: Any) -> Iterator[None]:
    """Inside, a tokenizer of the tokenizers library keeps what it read last; others are left as they are."""
    backend = getattr(tokenizer, "__dict__", {}).get("_tokenizer")
    if backend is None or not getattr(tokenizer, "is_fast", False):
        yield
        return
    tokenizer._tokenizer = Remembering(backend)
    try:
        yield
    finally:
        tokenizer._tokenizer = backend


class Remembering:
    """A backend with its last reading, which is forgotten at whatever could change the next."""

    _HARMLESS = frozenset({"truncation", "padding", "encode_special_tokens"})  # looked at before every reading

    def __init__(self, backend: Any) -> None:
        self.__dict__.update(_backend=backend, _asked=None, _found=None)

    def encode_batch(self, texts: Any, **options: Any) -> Any:
        if self._asked != (texts, options):
            self.__dict__.update(_asked=(list(texts), options), _found=self._backend.encode_batch(texts, **options))
        return self._found

    def __getattr__(self, name: str) -> Any:
        if name not in self._HARMLESS:
            self.__dict__["_asked"] = None
        return getattr(self._backend, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self.__dict__["_asked"] = None
        setattr(self._backend, name, value)
