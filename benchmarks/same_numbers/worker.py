"""Trains recipes with the checkout that PYTHONPATH names, each in a fork of one process that has imported everything.

It imports nothing from here, because benchmarks/ and quickstart/ would be those of the other checkout. Started by the
command; it reads lines of JSON from stdin: recipe (a file) and log. It answers with exit codes.
"""

import json
import os
import sys
import traceback

os.environ |= {
    "AXOLOTL_DO_NOT_TRACK": "1",
    "AXOLOTL_METRIC_NDIGITS": "17",
    "CUDA_VISIBLE_DEVICES": "",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

import datasets
import torch
from axolotl.cli.main import cli

import dskd_plugin


def train(recipe: str, log: str) -> int:
    """The exit code of `axolotl train RECIPE` in a child."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    code = 1
    try:
        sink = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(sink, 1)
        os.dup2(sink, 2)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
        os.chdir(os.path.dirname(recipe))
        torch.manual_seed(0)  # Axolotl draws LoRA's start without a seed
        cli.main(args=["train", recipe, "--launcher", "python"], prog_name="axolotl", standalone_mode=False)
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main() -> None:
    torch.set_num_threads(1)
    # A spawned worker would import everything again just to write some rows.
    forked = datasets.arrow_dataset.mp.get_context("fork")
    datasets.arrow_dataset.mp.get_context = lambda method=None: forked
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    print(json.dumps(dskd_plugin.__file__), file=answers, flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        print(json.dumps(train(order["recipe"], order["log"])), file=answers, flush=True)


if __name__ == "__main__":
    main()
