"""The students: one model, three tokenizers, which cut a text as the teacher's does, more coarsely, or more finely."""

from dataclasses import dataclass
from functools import partial

from quickstart.models import TokenizerOf, train_tokenizer

OWN = "own"


@dataclass(frozen=True)
class Student:
    """title, short: what tables and figures call it; tokenizer_of: the tokenizer, from texts that it may see."""

    title: str
    short: str
    tokenizer_of: TokenizerOf


STUDENTS: dict[str, Student] = {
    OWN: Student("The quickstart's tokenizer, tokens within words", "similar tokenizers", train_tokenizer),
    "coarse": Student(
        "A coarse tokenizer: tokens of up to 24 characters, over several words",
        "the student's tokenizer coarser",
        partial(train_tokenizer, over_words=True, longest=24),
    ),
    "fine": Student(
        "A fine tokenizer: 384 ids, tokens of few characters",
        "the student's tokenizer finer",
        partial(train_tokenizer, vocab_size=384),
    ),
}
