"""The bar of ``dskd generate``: moves with every token, and says how long the rest takes."""

import sys
import time
from collections.abc import Sequence
from typing import Self

from tqdm import tqdm

from dskd_plugin.generation.answers import Answer

_FORMAT = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} answers [{elapsed}{postfix}]"
PAUSE = {True: 0.5, False: 10.0}  # seconds between two states: of a terminal, of a log file


class Progress:
    """A bar of finished answers, with tokens per second and the time left.

    total: answers of the whole run; earlier: those of a run that was stopped; longest: tokens of an answer at most.
    """

    def __init__(self, total: int, earlier: Sequence[Answer], longest: int) -> None:
        self.total, self.longest = total, longest
        self.ended = len(earlier)
        self.earlier_tokens = sum(answer.tokens for answer in earlier)
        self.tokens = 0
        self.start = time.monotonic()
        self.bar = tqdm(
            total=total,
            initial=self.ended,
            desc="Generating",
            bar_format=_FORMAT,
            mininterval=PAUSE[sys.stderr.isatty()],
            miniters=0,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    @property
    def speed(self) -> float:
        """Tokens per second of this run."""
        return self.tokens / max(time.monotonic() - self.start, 1e-9)

    @property
    def tokens_left(self) -> float:
        """Expected; until an answer has ended, the most that there can be."""
        written = self.earlier_tokens + self.tokens
        # An unfinished answer is longer than what is there of it: tokens over ended answers is not biased by that.
        mean = min(self.longest, written / self.ended) if self.ended else self.longest
        return max(self.total * mean - written, self.total - self.ended)

    def told(self, tokens: int, ended: int) -> None:
        """Count what was written since the last call."""
        self.tokens += tokens
        self.ended += ended
        left = tqdm.format_interval(self.tokens_left / self.speed)
        most = "" if self.ended else "at most "
        self.bar.set_postfix_str(f"{self.speed:.1f} tokens/s, {most}{left} left", refresh=False)
        self.bar.update(ended)

    def back_to(self, tokens: int, ended: int) -> None:
        """Forget what was counted since: of a batch that is begun anew."""
        self.tokens, self.ended = tokens, ended
        self.bar.n = ended
