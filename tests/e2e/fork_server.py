"""Runs `axolotl train` in children of one process that has imported everything: a test saves the imports of each run.

A line of JSON on stdin starts a run: arguments, folder, log, ranks, environment. Two lines come back: the process ids
of its ranks at once, and their exit codes when all have ended. As under torchrun, a rank that fails ends the others.
"""

import json
import os
import signal
import socket
import sys
from functools import partial
from pathlib import Path

os.environ["DS_ACCELERATOR"] = "cpu"

from benchmarks.study import launch


def work(order: dict, rank: int, port: int) -> None:
    """One process of a run; never returns before its training has ended."""
    os.environ.update(order["environment"])
    sys.argv = order["arguments"]
    if order["ranks"] == 1:
        return launch.axolotl(order["arguments"][1:], Path(order["folder"]))
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": order["ranks"], "LOCAL_WORLD_SIZE": order["ranks"]}
    place = {"GROUP_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in (ranks | place).items()})
    os.chdir(order["folder"])
    import cpu_engines

    return cpu_engines.main(order["arguments"][-1])


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def ended(ranks: dict[int, int]) -> list[int]:
    """Exit codes by rank, once all have ended; ranks: process id -> rank."""
    codes = {}
    while len(codes) < len(ranks):
        pid, status = os.wait()
        codes[ranks[pid]] = os.waitstatus_to_exitcode(status)
        if codes[ranks[pid]] != 0:
            for other, rank in ranks.items():
                if rank not in codes:
                    os.kill(other, signal.SIGKILL)
    return [codes[rank] for rank in sorted(codes)]


def serve() -> None:
    launch.preload()
    for line in sys.stdin:
        order = json.loads(line)
        port, log = free_port(), Path(order["log"])
        ranks = {}
        for rank in range(order["ranks"]):
            job = launch.Job(f"rank {rank}", log, partial(work, order, rank, port))
            ranks[launch.start(job)] = rank
        print(json.dumps(list(ranks)), flush=True)
        print(json.dumps(ended(ranks)), flush=True)


if __name__ == "__main__":
    serve()
