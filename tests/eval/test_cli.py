"""The command line: help, lists, dry runs, and what bad input gets for an answer."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dskd_eval
import pytest
from conftest_models import make_tokenizer
from dskd_eval.tasks import selection
from dskd_eval.tasks.spec import SUITES

Invoke = Callable[..., Any]


def refused(found: Any, *words: str) -> None:
    """Exit code 1, the four parts, no traceback."""
    assert found.exit_code == 1, found.output
    assert "Traceback" not in found.output
    assert all(part in found.output for part in ("Error", "expected", "got", "do  ")), found.output
    for word in words:
        assert word in found.output, (word, found.output)


def test_help_of_every_command(invoke: Invoke) -> None:
    assert "compare" in invoke("--help").output and "--suite" in invoke().output
    for command in ("list", "doctor", "compare", "report"):
        found = invoke(command, "--help")
        assert found.exit_code == 0 and "Usage" in found.output


def test_list_names_every_task(invoke: Invoke) -> None:
    rows = json.loads(invoke("list", "--json").output)
    assert [row["task"] for row in rows] == list(selection.builtin_tasks())
    for row in rows:
        assert row["primary_metric"] == row["metrics"][0] and row["version"] == 1
        assert row["generation"]["max_gen_toks"] > 0 and row["data"]
    table = invoke("list").output
    assert all(suite in table for suite in SUITES)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--suite", "maths"], ["--suite", "Did you mean math?"]),
        (["--tasks", "gsm8"], ["--tasks", "Did you mean gsm8k"]),
        (["--task-file", "/nowhere/t.yaml"], ["/nowhere/t.yaml", "readable file"]),
        (["--suite", "math", "--data-dir", "/nowhere"], ["--data-dir", "existing directory"]),
        (["--suite", "math", "--chat-template", "of"], ["--chat-template", "template file"]),
        (["--suite", "math", "--resume"], ["--resume", "--output FOLDER"]),
        (["--suite", "math", "--recipe", "/nowhere/r.yaml"], ["--recipe", "readable YAML recipe"]),
    ],
)
def test_bad_options(invoke: Invoke, tmp_path: Path, arguments: list[str], words: list[str]) -> None:
    refused(invoke("--model", tmp_path, *arguments), *words)


def break_model(kind: str, source: Path, folder: Path) -> Path:
    """A copy of a model folder with one fault."""
    if kind == "a file":
        folder.write_text("x")
        return folder
    if kind == "nothing there":
        return folder
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    if kind == "no config":
        (folder / "config.json").unlink()
    elif kind == "broken config":
        (folder / "config.json").write_text("{")
    elif kind == "unknown type":
        (folder / "config.json").write_text(json.dumps(config | {"model_type": "lama"}))
    elif kind == "no type":
        (folder / "config.json").write_text(json.dumps({}))
    elif kind == "no weights":
        (folder / "model.safetensors").unlink()
    elif kind == "an unfinished run":
        (folder / "model.safetensors").unlink()
        shutil.copytree(source, folder / "checkpoint-5")
    elif kind == "damaged weights":
        (folder / "model.safetensors").write_bytes(b"\0" * 64)
    elif kind == "missing shard":
        (folder / "model.safetensors").rename(folder / "model-1.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-2.safetensors"}}))
    elif kind == "larger config":
        (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    elif kind == "no tokenizer":
        for path in folder.glob("tokenizer*"):
            path.unlink()
    elif kind == "checkpoints below":
        shutil.copytree(source, folder / "checkpoint-5")
        (folder / "config.json").unlink()
    return folder


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("nothing there", ["an existing folder or a hub id"]),
        ("a file", ["a folder or a hub id", "a file"]),
        ("no config", ["a model folder with config.json"]),
        ("checkpoints below", ["Did you mean its subfolder checkpoint-5?"]),
        ("broken config", ["a readable config.json"]),
        ("no type", ["model_type in config.json"]),
        ("no weights", ["no weights", "Give the folder that holds the trained model."]),
        ("an unfinished run", ["no weights", "Did you mean its subfolder checkpoint-5?"]),
        ("missing shard", ["no model-2.safetensors"]),
        ("no tokenizer", ["a tokenizer that transformers can load"]),
    ],
)
def test_bad_models_are_refused_at_once(
    invoke: Invoke, own_task: Callable[..., Path], tiny_model: Path, tmp_path: Path, kind: str, words: list[str]
) -> None:
    model = break_model(kind, tiny_model, tmp_path / "model")
    found = invoke("--model", model, "--task-file", own_task(), "--output", tmp_path / "o")
    refused(found, *words)
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("unknown type", ["transformers can load"]),
        ("damaged weights", ["a causal language model that transformers can load"]),
        ("larger config", ["weights for every parameter", "9 missing"]),
    ],
)
def test_models_that_do_not_load_fail_without_a_traceback(
    invoke: Invoke, own_task: Callable[..., Path], tiny_model: Path, tmp_path: Path, kind: str, words: list[str]
) -> None:
    model = break_model(kind, tiny_model, tmp_path / "model")
    found = invoke("--model", model, "--task-file", own_task(), "--output", tmp_path / "o")
    assert found.exit_code == 1 and "Traceback" not in found.output
    assert all(word in found.output for word in words), found.output


def test_hub_model_without_network(invoke: Invoke, own_task: Callable[..., Path]) -> None:
    refused(invoke("--model", "nobody/nothing", "--task-file", own_task()), "HF_HUB_OFFLINE is set")


def test_absent_device_and_backend(invoke: Invoke, own_task: Callable[..., Path], tiny_model: Path) -> None:
    import importlib.util

    import torch

    path = own_task()
    device = f"cuda:{torch.cuda.device_count()}"
    refused(invoke("--model", tiny_model, "--task-file", path, "--device", device), "--device", "--device cpu")
    refused(invoke("--model", tiny_model, "--task-file", path, "--device", "gpu"), "auto, cpu, cuda")
    if importlib.util.find_spec("vllm") is None:
        refused(invoke("--model", tiny_model, "--task-file", path, "--backend", "vllm"), "the package vllm")


def test_settings_without_effect_are_errors(invoke: Invoke, own_task: Callable[..., Path], tiny_model: Path) -> None:
    path = own_task()
    for extra, word in (
        (["--samples", 4], "pass@k"),
        (["--num-fewshot", 2], "rows for shots"),
        (["--protocol", "paper"], "with that protocol"),
        (["--temperature", 0.5], "pass@k"),
    ):
        refused(invoke("--model", tiny_model, "--task-file", path, *extra), word)


def test_chat_template_must_exist_when_asked_for(
    invoke: Invoke, own_task: Callable[..., Path], tiny_model: Path, tmp_path: Path
) -> None:
    plain = tmp_path / "plain"
    shutil.copytree(tiny_model, plain)
    for path in [*plain.glob("tokenizer*"), *plain.glob("chat_template*")]:
        path.unlink()
    make_tokenizer(plain, chat=False)
    refused(invoke("--model", plain, "--task-file", own_task(), "--chat-template", "on"), "a chat template")
    template = tmp_path / "t.jinja"
    template.write_text("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}")
    shown = invoke("--model", plain, "--task-file", own_task(), "--chat-template", template, "--dry-run")
    assert "<user>What is 0 + 0?" in shown.output


def test_dry_run_shows_prompts_and_generates_nothing(
    invoke: Invoke, tiny_model: Path, data_dir: Path, tmp_path: Path
) -> None:
    found = invoke("--model", tiny_model, "--tasks", "gsm8k,mbpp,dolly,math500", "--data-dir", data_dir, "--limit", 5,
                   "--output", tmp_path / "o", "--dry-run")  # fmt: skip
    assert found.exit_code == 0, found.output
    for word in (
        "documents 5 of 1319", "shots 5", "style chat", "<|im_start|>user", "until 'Question:'", "#### ",
        "primary metric flexible: last number of the answer equals the reference", "reference (scores 100)",
    ):  # fmt: skip
        assert word in found.output, word
    reference = re.search(r"#### (\d+)[ │\n╰─╯]+╭─ extracted from it ─+╮\n│ (\d+) ", found.output)
    assert reference and reference[1] == reference[2]
    assert re.search(r"program that is run for it.*?\bdef .*?\bassert ", found.output, re.DOTALL)
    assert not (tmp_path / "o").exists()


def test_doctor_names_what_is_missing(invoke: Invoke, data_dir: Path, tmp_path: Path) -> None:
    assert invoke("doctor", "--data-dir", data_dir, "--suite", "math").exit_code == 0
    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "gsm8k" / "test.jsonl").write_text("{}\n")
    found = invoke("doctor", "--data-dir", tmp_path, "--suite", "math")
    assert found.exit_code == 1
    assert "gsm8k/test.jsonl is altered" in found.output and "math500/test.jsonl is missing" in found.output
    solved = invoke("doctor", "--data-dir", data_dir, "--suite", "math", "--oracle", "--limit", 3)
    assert solved.exit_code == 0 and solved.output.count("100.0 on 3 documents") == 4


def test_options_that_nothing_reads_are_wrong_usage(invoke: Invoke, data_dir: Path) -> None:
    for words, told in (
        (["--limit", 5], "Nothing to evaluate: give --model"),
        (["--data-dir", data_dir, "doctor"], "give them after its name"),
        (["doctor", "--limit", 3], "--limit is of the reference answers"),
    ):
        found = invoke(*words)
        assert found.exit_code == 2 and told in found.output, found.output


def test_doctor_goes_on_after_a_file_that_cannot_be_read(
    invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DSKD_DATA", raising=False)
    for name, rows in (("broken", "{"), ("whole", '{"q": "1?", "a": "1"}\n')):
        (tmp_path / f"{name}.jsonl").write_text(rows)
        keys = {"task": name, "data": f"{name}.jsonl", "prompt": "{{q}}", "reference": "a", "scorer": "number"}
        (tmp_path / f"{name}.yaml").write_text(json.dumps(keys))
    files = [word for name in ("broken", "whole") for word in ("--task-file", tmp_path / f"{name}.yaml")]
    found = invoke("doctor", *files)
    assert found.exit_code == 1 and "Traceback" not in found.output
    assert "bad  broken" in found.output and "ok   whole" in found.output, found.output


def test_ctrl_c_in_any_command_is_exit_code_130(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    from dskd_eval import doctor

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "run", stopped)
    found = invoke("doctor")
    assert found.exit_code == 130 and "Stopped." in found.output


def test_doctor_checks_a_task_file(invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the given task, its own rows, no benchmark data: reference answers that do not score 100 are named."""
    monkeypatch.delenv("DSKD_DATA", raising=False)

    def task(answers: list[str], **more: object) -> Path:
        rows = [{"q": f"question {n}", "a": answer} for n, answer in enumerate(answers)]
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        keys = {"task": "mine", "data": "rows.jsonl", "prompt": "{{q}}", "reference": "a", "scorer": "number"}
        (tmp_path / "mine.yaml").write_text(json.dumps({k: v for k, v in {**keys, **more}.items() if v is not None}))
        return tmp_path / "mine.yaml"

    right = invoke("doctor", "--oracle", "--task-file", task(["4", "9{,}500", "\u22125"]))
    assert right.exit_code == 0, right.output
    assert right.output.count("100.0 on 3 documents") == 2 and "gsm8k" not in right.output
    noted = invoke("doctor", "--oracle", "--task-file", task(["a", "b, c"], scorer="exact_match", stop=","))
    assert noted.exit_code == 0 and noted.output.count("warn oracle mine") == 2 and "bad " not in noted.output
    wrong = invoke("doctor", "--oracle", "--task-file", task(["4", "none", "5"]))
    assert wrong.exit_code == 1 and "wrong: [1]" in wrong.output
    broken = invoke("doctor", "--oracle", "--task-file", task(["4"], reference="b"))
    assert broken.exit_code == 1 and "row 1, field 'b'" in " ".join(broken.output.split())
    tests = task(["4"], reference=None, scorer="python", code={"tests": "assert f() == {{a}}"})
    bare = invoke("doctor", "--oracle", "--task-file", tests)
    assert "oracle mine" in bare.output and bare.output.count("has no reference answers") == 2


def test_refuses_code_tasks_without_a_sandbox(
    invoke: Invoke, tiny_model: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dskd_eval import sandbox

    monkeypatch.setattr(sandbox, "unavailable", lambda backend: "not here" if backend != "none" else None)
    refused(invoke("--model", tiny_model, "--tasks", "mbpp", "--data-dir", data_dir), "--unsafe-code", "not here")


def test_unknown_command_names_the_nearest(invoke: Invoke) -> None:
    found = invoke("compar", "x")
    assert found.exit_code == 2 and "Did you mean compare" in found.output


def test_importing_the_package_needs_neither_axolotl_nor_the_plugin() -> None:
    """Only light modules come with the command line; the heavy ones wait for a run."""
    script = (
        "import sys; before = set(sys.modules)\n"
        "import dskd_eval.cli, dskd_eval.stats, dskd_eval.run_folder\n"
        "heavy = {'axolotl', 'dskd_plugin', 'torch', 'transformers', 'lm_eval'}\n"
        "sys.exit(' '.join(heavy & (set(sys.modules) - before)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert not done.stderr.strip()


def test_no_module_imports_axolotl_or_the_plugin() -> None:
    import ast

    for path in Path(dskd_eval.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [name for name in names if name.split(".")[0] in ("axolotl", "dskd_plugin")], path
