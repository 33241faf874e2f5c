"""`python -m benchmarks.plan`: how near `dskd plan` comes to the memory that real runs take.

Each recipe is trained for three steps by the `axolotl` command in a process of its own, whose largest resident memory
is compared with the plan. Models have random weights; rows are as long as the plan assumes. CPU alone: the process
itself, Python with torch and Axolotl, is measured with models of no size.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks import results, tiny
from benchmarks.options import parser_of
from benchmarks.results import Row

MIB = 2**20
ROOT = Path(__file__).resolve().parents[1]
RECIPES: dict[str, dict[str, Any]] = {
    "sft": {"dskd": {"method": "sft"}},
    "overlap_kd": {"dskd": {"method": "overlap_kd"}},
    "dskd": {},
    "dskd, both spaces": {"dskd": {"spaces": "both"}},
    "dskd, gradient_checkpointing": {"gradient_checkpointing": True},
    "dskd, accumulation": {"gradient_accumulation_steps": 2},
    "dskd, cached": {"dskd": {"teacher": {"cache": "states"}}},
    "dskd, bf16": {"bf16": True, "plugins": ["dskd", "benchmarks.on_cpu.OnCpu"]},
    "dskd, LoRA": {
        "adapter": "lora",
        "lora_r": 16,
        "lora_alpha": 16,
        "lora_target_linear": True,
        **{key: False for key in ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel")},
    },
    "dskd, sgd": {"optimizer": "sgd"},
}
SIZES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "none": ({}, {"width": 48}),
    "small": (
        {
            "width": 512,
            "num_hidden_layers": 16,
            "intermediate_size": 2048,
            "vocab_size": 49152,
            "num_attention_heads": 8,
        },
        {
            "width": 768,
            "num_hidden_layers": 12,
            "intermediate_size": 3072,
            "vocab_size": 64000,
            "num_attention_heads": 8,
        },
    ),
}


def pair(folder: Path, size: str, rows: int, tokens: int, teacher_tokenizer: Any = None) -> tuple[dict[str, Any], int]:
    """A recipe over models of a size, and the tokens of its longest row. The teacher's tokenizer: SentencePiece."""
    student_tokenizer = tiny.byte_level_tokenizer(420, 1)
    teacher_tokenizer = teacher_tokenizer or tiny.sentencepiece_tokenizer(460, 2)
    student, teacher = SIZES[size]
    made = [" ".join(row["text"] for row in tiny.conversations(20, seed)) for seed in range(4 * rows)]
    longest, lines = 0, []
    for text in made:
        answer, count = text, tokens + 1
        while count > tokens:
            answer = answer[: -max(8, len(answer) // 50)]
            messages = [{"role": "user", "content": "red"}, {"role": "assistant", "content": answer.strip()}]
            sides = (student_tokenizer, teacher_tokenizer)
            count = max(len(side.apply_chat_template(messages)["input_ids"]) for side in sides)
        longest = max(longest, count)
        lines.append(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    (folder / "train.jsonl").write_text("".join(lines), encoding="utf-8")
    models = {
        "student": tiny.save_model(folder / "student", student_tokenizer, max_position_embeddings=4096, **student),
        "teacher": tiny.save_model(
            folder / "teacher", teacher_tokenizer, "qwen3", seed=1, max_position_embeddings=4096, **teacher
        ),
        "data": str(folder / "train.jsonl"),
    }
    recipe = tiny.small_recipe(models, folder)
    recipe["dskd"] = {"teacher": recipe["dskd"]["teacher"]}
    changes = {"micro_batch_size": rows, "gradient_accumulation_steps": 1, "sequence_len": tokens, "max_steps": 3}
    return recipe | changes, longest


def changed(recipe: dict[str, Any], changes: dict[str, Any], folder: Path) -> dict[str, Any]:
    block = dict(changes.get("dskd", {}))
    teacher = {**recipe["dskd"]["teacher"], **block.pop("teacher", {})}
    if teacher.get("cache"):
        teacher["cache"] = str(folder / teacher["cache"])
    return {**recipe, **changes, "dskd": {**block, "teacher": teacher}}


def resident(command: list[str]) -> int:
    """Largest resident bytes of a command; RuntimeError with its last words where it fails."""
    with tempfile.TemporaryFile() as words:
        child = os.posix_spawnp(
            command[0],
            command,
            {**os.environ, "AXOLOTL_DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)},
            file_actions=[(os.POSIX_SPAWN_DUP2, words.fileno(), 1), (os.POSIX_SPAWN_DUP2, words.fileno(), 2)],
        )
        _, status, used = os.wait4(child, 0)
        if status != 0:
            words.seek(0)
            raise RuntimeError(words.read().decode(errors="replace")[-2000:])
    return 1024 * used.ru_maxrss


def run(folder: Path, recipe: dict[str, Any]) -> int:
    """Train a recipe; bytes."""
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    here = Path(sys.executable).parent
    if recipe["dskd"]["teacher"].get("cache"):
        resident([str(here / "dskd"), "cache", "build", str(file), "--dtype", "float32"])
    return resident([str(here / "axolotl"), "train", str(file), "--launcher", "python"])


def planned(recipe: dict[str, Any], tokens: int) -> int:
    from dskd_plugin.plan import make

    return make(recipe, ranks=1, on_gpu=False, tokens=tokens).memory.peak


def main(words: list[str] | None = None) -> None:
    parser = parser_of("plan", __doc__)
    parser.add_argument("--size", choices=list(SIZES), default="small")
    parser.add_argument("--recipes", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=512)
    options = parser.parse_args(words)
    command, cpu = results.command_of("benchmarks.plan", words), torch.device("cpu")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipe, tokens = pair(folder, options.size, options.rows, options.tokens)
        sides = SIZES[options.size]
        setting = f"{options.size}: {sides[1]} -> {sides[0]}; {options.rows} rows x {tokens} tokens"
        for title in options.recipes:
            made = changed(recipe, RECIPES[title], folder)
            plan, real = planned(made, tokens), run(folder, made)
            row = Row(
                f"{title}, MiB planned", f"{plan / MIB:.0f}", f"measured, {real / MIB:.0f} MiB", f"{plan / real:.3f}"
            )
            # One by one, so that a recipe that fails takes no other with it.
            results.append("plan", cpu, setting, [row], command, options.results)


if __name__ == "__main__":
    main()
