"""Rouge-L with the tokenizer of rouge_score, which sees ASCII letters and digits alone, and with one for any script."""

from __future__ import annotations

import functools
import re
import unicodedata
from typing import TYPE_CHECKING

import regex

if TYPE_CHECKING:
    from rouge_score.rouge_scorer import RougeScorer

# Scripts that put no space between words: every character counts as a word.
_UNSPACED = r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]"
_WORD = regex.compile(
    rf"{_UNSPACED}\p{{M}}*|[[\p{{L}}\p{{N}}]--{_UNSPACED}][[\p{{L}}\p{{M}}\p{{N}}]--{_UNSPACED}]*", regex.VERSION1
)
_LETTERS = regex.compile(r"[\p{L}\p{N}]")
_SEEN = re.compile(r"[a-zA-Z0-9]")


def rouge_l(text: str, reference: str) -> float:
    """Rouge-L F-measure in [0, 1] (Lin 2004) with rouge_score's tokenizer and Porter stemmer.

    That tokenizer drops all but ASCII letters and digits; a reference without any (another script, an emoji) is
    matched as a whole.
    """
    if not _SEEN.search(reference):
        return _whole(text, reference)
    return float(_ascii_scorer().score(reference, text)["rougeL"].fmeasure)


def rouge_l_unicode(text: str, reference: str) -> float:
    """Rouge-L F-measure in [0, 1] over words of any script; equal to `rouge_l` where all letters are ASCII.

    Words are compared in NFKC without case. In scripts without spaces every character is a word; Porter's stemmer works
    on ASCII words alone. A reference without letters and digits is matched as a whole.
    """
    if not _LETTERS.search(reference):
        return _whole(text, reference)
    return float(_unicode_scorer().score(reference, text)["rougeL"].fmeasure)


def unseen(reference: str) -> str:
    """What `rouge_l` does not see of a reference, in words; '' where it sees every letter and digit."""
    letters = _LETTERS.findall(reference)
    lost = sum(1 for letter in letters if not _SEEN.match(letter))
    if not lost:
        return ""
    judged = "compared as a whole" if lost == len(letters) else "only the rest is compared"
    return f"{lost} of {len(letters)} letters and digits are not ASCII: {judged}"


def plain(text: str) -> str:
    """A text without case and outer or repeated space."""
    return " ".join(text.split()).casefold()


def _whole(text: str, reference: str) -> float:
    return float(plain(text) == plain(reference))


class _AnyScript:
    """A tokenizer for rouge_score."""

    def __init__(self) -> None:
        from nltk.stem.porter import PorterStemmer

        self.stemmer = PorterStemmer()

    def tokenize(self, text: str) -> list[str]:
        words: list[str] = _WORD.findall(unicodedata.normalize("NFKC", text).casefold())
        # As rouge_score: words of three letters or fewer stay as they are.
        return [self.stemmer.stem(word) if word.isascii() and len(word) > 3 else word for word in words]


@functools.cache
def _ascii_scorer() -> RougeScorer:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=True)


@functools.cache
def _unicode_scorer() -> RougeScorer:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], tokenizer=_AnyScript())
