"""One process of an `axolotl` command, in a child of `quickstart.forked`: a test saves the imports of each run."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Rank:
    """Work of a child. port: where the ranks of this run meet."""

    arguments: list[str]
    rank: int
    ranks: int
    port: int

    def __call__(self) -> None:
        sys.argv = self.arguments
        if self.ranks == 1:
            from axolotl.cli.main import cli

            cli.main(args=self.arguments[1:], prog_name="axolotl", standalone_mode=False)
            return
        world = {"RANK": self.rank, "LOCAL_RANK": self.rank, "WORLD_SIZE": self.ranks, "LOCAL_WORLD_SIZE": self.ranks}
        place = {"GROUP_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": self.port}
        os.environ.update({name: str(value) for name, value in (world | place).items()})
        sys.path.insert(0, str(Path(__file__).parent))
        import cpu_engines

        cpu_engines.main(self.arguments[-1])
