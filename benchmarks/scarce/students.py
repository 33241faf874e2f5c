"""The students: one model, three tokenizers, which cut a text as the teacher's does, more coarsely, or more finely."""

from dataclasses import dataclass
from functools import partial

from quickstart.models import TokenizerOf, train_tokenizer

OWN = "own"


@dataclass(frozen=True)
class Student:
    """title: what the tables call it; tokenizer_of: makes the tokenizer from the texts that a student may see."""

    title: str
    tokenizer_of: TokenizerOf


STUDENTS: dict[str, Student] = {
    OWN: Student("the quickstart's tokenizer: 2,048 ids, tokens within words", train_tokenizer),
    "coarse": Student(
        "a coarse tokenizer: 2,048 ids, tokens over words of up to 24 characters",
        partial(train_tokenizer, over_words=True, longest=24),
    ),
    "fine": Student("a fine tokenizer: 384 ids, tokens of few characters", partial(train_tokenizer, vocab_size=384)),
}
