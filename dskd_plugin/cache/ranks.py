"""The processes that share a cache: torchrun's for a build, the trainer's in a run, or one alone."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar, cast

import torch.distributed as dist

Said = TypeVar("Said")


@dataclass(frozen=True)
class Ranks:
    """This process among all. local: its number on its machine."""

    rank: int = 0
    world: int = 1
    local: int = 0

    @classmethod
    def here(cls) -> "Ranks":
        if not (dist.is_available() and dist.is_initialized()):
            return cls()
        return cls(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", "0")))

    @property
    def first(self) -> bool:
        return self.rank == 0

    def everyones(self, mine: Said) -> list[Said]:
        """What each rank has to say. All ranks must call it."""
        if self.world == 1:
            return [mine]
        said: list[Said | None] = [None] * self.world
        dist.all_gather_object(said, mine)
        return cast(list[Said], said)

    def agree(self, result: object = None, error: Exception | None = None) -> object:
        """The first rank's result on all; where any of them has failed, its error on all. All ranks must call it."""
        said = self.everyones((result if self.first else None, error))
        for _, failed in said:
            if failed is not None:
                raise failed
        return said[0][0]

    def first_does(self, work: Callable[[], Said]) -> Said:
        """The result of ``work()``, which the first rank does, on all; its error likewise."""
        try:
            result = work() if self.first else None
        except Exception as error:
            return cast(Said, self.agree(error=error))
        return cast(Said, self.agree(result))
