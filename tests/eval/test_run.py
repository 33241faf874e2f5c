"""Whole runs with tiny models: records, resuming, the store of generations, and what is counted."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest_models import make_model
from dskd_eval.backends.base import Generation, GenerationSettings, Prompt
from dskd_eval.errors import UserError
from dskd_eval.lmeval.eval_lm import EvalLM, fit
from dskd_eval.store import GenerationStore


def results(folder: Path, *, times: bool = False) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    return found if times else {key: value for key, value in found.items() if key != "times"}


@pytest.fixture(scope="module")
def two_models(tiny_model: Path, other_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two models over two tasks of the user."""
    from click.testing import CliRunner
    from dskd_eval import cli

    folder = tmp_path_factory.mktemp("run")
    rows = [{"question": f"What is {n} + {n}?", "answer": str(n + n)} for n in range(12)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, scorer in (("sums", "number"), ("words", "rouge_l")):
        (folder / f"{name}.yaml").write_text(
            f"task: {name}\ndata: rows.jsonl\nprompt: '{{{{question}}}}'\nreference: answer\nscorer: {scorer}\n"
            "max_new_tokens: 8\n"
        )
    arguments = ["--model", tiny_model, "--model", f"second={other_model}", "--limit", 8, "--batch-size", 3]
    arguments += ["--task-file", folder / "sums.yaml", "--task-file", folder / "words.yaml"]
    done = CliRunner().invoke(cli.main, [str(a) for a in [*arguments, "--output", folder / "out"]])
    assert done.exit_code == 0, done.output
    assert "Scores with 95 % intervals" in done.output and "report.html" in done.output
    return folder / "out"


def test_records_are_complete(two_models: Path) -> None:
    found = results(two_models)
    assert found["schema_version"] == 1 and found["complete"]
    assert [model["name"] for model in found["models"]] == ["tiny", "second"]
    assert {"lm_eval", "transformers", "torch"} <= found["environment"]["packages"].keys()
    assert len(found["scores"]) == 4
    for score in found["scores"]:
        metric = score["metrics"][score["task"]["primary_metric"]]
        assert metric["n"] == 8 == score["n"]
        if score["task"]["task"] == "words":  # Rouge-L of eight random answers is 0, which tells no width
            assert (metric["value"], metric["low"], metric["high"], metric["interval"]) == (0.0, None, None, "none")
        else:
            assert metric["low"] <= metric["value"] <= metric["high"] and metric["interval"] == "wilson"
        assert score["documents"] == 12
        assert len(score["task"]["data"]["test"]["sha256"]) == 64
        assert score["answers"]["count"] == 8
    assert any("random subset of at most 8" in note for note in found["notes"])
    fingerprints = {model["fingerprint"] for model in found["models"]}
    assert len(fingerprints) == 2


def test_samples_hold_prompt_answer_reference_and_hashes(two_models: Path) -> None:
    lines = [json.loads(line) for line in (two_models / "samples.jsonl").read_text().splitlines()]
    assert len(lines) == 2 * 2 * 8
    by_place = {(line["model"], line["task"], line["doc_id"]): line for line in lines}
    for line in lines:
        assert line["prompt"].startswith("<|im_start|>user\nWhat is ")
        assert line["prompt"].endswith("<|im_start|>assistant\n")
        assert line["references"] == [str(2 * line["doc_id"])]
        assert len(line["generation"]) == 1 and line["generation"][0]["max_new_tokens"] == 8
        other = by_place["tiny" if line["model"] == "second" else "second", line["task"], line["doc_id"]]
        assert (line["doc_hash"], line["prompt_hash"]) == (other["doc_hash"], other["prompt_hash"])
    assert len({line["prompt_hash"] for line in lines}) == 8
    assert all((two_models / name).is_file() for name in ("report.md", "report.html"))


def test_killed_and_resumed_run_gives_the_same_results(
    tiny_model: Path, own_task: Callable[..., Path], tmp_path: Path, invoke: Callable[..., Any]
) -> None:
    """kill -9 within the second task: finished batches are kept, the results file is equal apart from times."""
    rows = [{"question": f"Say {n}", "answer": str(n)} for n in range(40)]
    first = own_task(rows, max_new_tokens=24)
    second = tmp_path / "second.yaml"
    second.write_text(first.read_text().replace("task: sums", "task: more"))
    arguments = ["--model", tiny_model, "--task-file", first, "--task-file", second, "--batch-size", 2]
    done = invoke(*arguments, "--output", tmp_path / "whole")
    assert done.exit_code == 0, done.output

    cut = tmp_path / "cut"
    command = [sys.executable, "-m", "dskd_eval.cli", *map(str, arguments), "--output", str(cut)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 600
    while not (cut / "parts" / "tiny" / "sums.json").is_file():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (cut / "report.md").exists()
    resumed = invoke(*arguments, "--output", cut, "--resume")
    assert resumed.exit_code == 0, resumed.output
    assert "(kept)" in resumed.output
    assert results(cut) == results(tmp_path / "whole")
    for name in ("samples.jsonl", "report.md"):
        assert (cut / name).read_text() == (tmp_path / "whole" / name).read_text()


def test_interrupt_leaves_a_resumable_folder(
    tiny_model: Path, own_task: Callable[..., Path], tmp_path: Path, invoke: Callable[..., Any], monkeypatch: Any
) -> None:
    from dskd_eval.backends.hf import HFBackend

    path, real, calls = own_task(), HFBackend.generate, []

    def stops(self: Any, prompts: Any, settings: Any) -> Any:
        calls.append(len(prompts))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, prompts, settings)

    monkeypatch.setattr(HFBackend, "generate", stops)
    arguments = ["--model", tiny_model, "--task-file", path, "--batch-size", 2, "--output", tmp_path / "o"]
    stopped = invoke(*arguments)
    assert stopped.exit_code == 130
    assert "--resume" in stopped.output and "Traceback" not in stopped.output
    monkeypatch.setattr(HFBackend, "generate", real)
    assert invoke(*arguments, "--resume").exit_code == 0
    assert results(tmp_path / "o", times=True)["times"]["tasks"][0]["answers_reused"] == 4


def test_terminate_stops_a_background_job(
    tiny_model: Path, own_task: Callable[..., Path], tmp_path: Path, invoke: Callable[..., Any]
) -> None:
    """A shell starts background jobs with SIGINT ignored; SIGTERM still leaves a folder that --resume takes up."""
    rows = [{"question": f"Say {n}", "answer": str(n)} for n in range(12)]
    first = own_task(rows, max_new_tokens=8)
    second = tmp_path / "second.yaml"
    second.write_text(
        first.read_text().replace("task: sums", "task: more").replace("max_new_tokens: 8", "max_new_tokens: 2000")
    )
    output = tmp_path / "o"
    arguments = ["--model", tiny_model, "--task-file", first, "--task-file", second, "--batch-size", 2]
    command = [sys.executable, "-m", "dskd_eval.cli", *map(str, arguments), "--output", str(output)]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )  # fmt: skip
    deadline = time.monotonic() + 600
    while not (output / "parts" / "tiny" / "sums.json").is_file():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=300)[1]
    assert process.returncode == 130 and "Stopped." in said and "--resume" in said and "Traceback" not in said
    assert not (output / "parts" / "tiny" / "more.json").exists()


def test_other_output_folders_are_refused(
    two_models: Path, tiny_model: Path, own_task: Callable[..., Path], tmp_path: Path, invoke: Callable[..., Any]
) -> None:
    path = own_task()
    for extra, words in (([], "the folder of another run"), (["--resume"], "the folder of another run")):
        found = invoke("--model", tiny_model, "--task-file", path, "--output", two_models, *extra)
        assert found.exit_code == 1 and words in found.output
        assert 'models: ["tiny", "second"] there, ["tiny"] here' in " ".join(found.output.split())
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("x")
    found = invoke("--model", tiny_model, "--task-file", path, "--output", tmp_path / "full")
    assert "letter.txt" in found.output and found.exit_code == 1
    found = invoke("--model", tiny_model, "--task-file", path, "--output", tmp_path / "new", "--resume")
    assert "no run.json" in found.output and found.exit_code == 1


def test_a_full_disk_keeps_finished_tasks(
    tiny_model: Path, own_task: Callable[..., Path], tmp_path: Path, invoke: Callable[..., Any]
) -> None:
    """A file size limit stands in for a full disk: the second task's samples do not fit."""
    rows = [{"question": "Say " + "x" * 300, "answer": "1"} for _ in range(120)]
    small = own_task(rows[:2])
    (tmp_path / "many.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    large = tmp_path / "large.yaml"
    large.write_text(small.read_text().replace("sums", "large").replace("rows.jsonl", "many.jsonl"))
    output = tmp_path / "o"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (70_000, hard))
    try:
        done = invoke("--model", tiny_model, "--task-file", small, "--task-file", large, "--output", output)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert done.exit_code == 1 and "Traceback" not in done.output
    assert "room and permission to write" in done.output
    assert (output / "parts" / "tiny" / "sums.json").is_file()
    assert not (output / "parts" / "tiny" / "large.json").is_file()
    again = invoke("--model", tiny_model, "--task-file", small, "--task-file", large, "--output", output, "--resume")
    assert again.exit_code == 0, again.output


class Echo:
    """A backend that answers with its own name and the number of the prompt's tokens."""

    kind = "echo"
    default_batch_size = 4

    def __init__(self, name: str = "a", max_length: int = 64, dtype: str = "float32") -> None:
        self.name, self.max_length = name, max_length
        self.identity: Mapping[str, Any] = {"fingerprint": name, "dtype": dtype, "device": "cpu"}
        self.batches: list[list[str]] = []

    def encode(self, text: str, *, special_tokens: bool) -> list[int]:
        return [ord(letter) for letter in text]

    def render(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        return "".join(message["content"] for message in messages)

    def template(self) -> str | None:
        return None

    def generate(self, prompts: Sequence[Prompt], settings: GenerationSettings) -> list[Generation]:
        self.batches.append([prompt.text for prompt in prompts])
        return [Generation(f"{self.name}:{len(p.tokens)}:{settings.seed}", 3, "stop") for p in prompts]

    def likelihood_model(self, batch_size: int) -> Any:
        raise NotImplementedError


class Request:
    def __init__(self, doc_id: int, text: str, **kwargs: Any) -> None:
        self.doc_id, self.args, self.doc = doc_id, (text, {"max_gen_toks": 16, **kwargs}), {}


def test_store_is_keyed_by_model_dtype_prompt_and_settings(tmp_path: Path) -> None:
    store = GenerationStore(tmp_path / "g.sqlite")
    requests = [Request(0, "one"), Request(1, "two")]

    def fresh(backend: Echo, asked: Sequence[Request] = requests) -> bool:
        answers = EvalLM(backend, store=store).generate_until(list(asked))
        assert all(answer.startswith(backend.name) for answer in answers)
        return bool(backend.batches)

    assert fresh(Echo("a"))
    assert not fresh(Echo("a"))
    assert fresh(Echo("b")) and fresh(Echo("a", dtype="bfloat16"))
    assert fresh(Echo("a"), [Request(0, "one"), Request(1, "too")])
    assert fresh(Echo("a"), [Request(0, "one", until=["x"]), Request(1, "two", until=["x"])])
    assert not fresh(Echo("a"))


def test_repeats_use_their_seeds_and_resume(tmp_path: Path) -> None:
    store = GenerationStore(tmp_path / "g.sqlite")
    sampled = {"do_sample": True, "temperature": 1.0}
    requests = [Request(doc, f"q{doc}", **sampled) for doc in range(3) for _ in range(2)]
    model = EvalLM(Echo(), store=store)
    model.begin((10, 20))
    answers = model.generate_until(requests)
    assert len({answers[0], answers[1]}) == 2 and answers[0] == answers[2]
    backend = Echo()
    again = EvalLM(backend, store=store)
    again.begin((10, 20))
    assert again.generate_until(requests) == answers and not backend.batches
    other = EvalLM(Echo(), store=store)
    other.begin((10, 30))
    assert other.generate_until(requests) != answers


def test_answers_come_back_in_order_whatever_the_batches() -> None:
    texts = ["a" * n for n in (3, 9, 1, 7, 5, 9, 2)]
    backend = Echo()
    answers = EvalLM(backend, batch_size=2).generate_until([Request(i, text) for i, text in enumerate(texts)])
    assert answers == [f"a:{len(text)}:0" for text in texts]
    assert [len(batch[0]) for batch in backend.batches] == [9, 7, 3, 1]


@pytest.mark.parametrize(
    ("prompt", "wanted", "context", "new", "kept"),
    [
        (100, 50, 512, 50, 100),
        (480, 256, 512, 128, 384),
        (300, 256, 512, 192, 300),
        (2000, 256, 512, 128, 384),
        (100, 1280, 512, 384, 100),
        (10, 256, 8, 2, 6),
    ],
)
def test_fit(prompt: int, wanted: int, context: int, new: int, kept: int) -> None:
    tokens = list(range(prompt))
    found_new, found = fit(tokens, wanted, context, keep_start=False)
    assert (found_new, len(found)) == (new, kept)
    assert found == tokens[-kept:] and found_new + kept <= context
    started = fit(tokens, wanted, context, keep_start=True)[1]
    assert started[0] == 0 and len(started) == kept and started[1:] == tokens[-(kept - 1) :]


def test_start_token_stays_and_end_token_goes(tmp_path: Path) -> None:
    """Some tokenizers frame every text; a prompt must begin with their start token and not be ended."""
    from conftest_models import make_tokenizer
    from dskd_eval.backends.tokenizers import encode
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer(tmp_path, chat=False)
    start, end = (tokenizer.convert_tokens_to_ids(f"<|im_{name}|>") for name in ("start", "end"))
    plain = tokenizer("abc")["input_ids"]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A <|im_end|>", special_tokens=[("<|im_start|>", start), ("<|im_end|>", end)]
    )
    tokenizer.bos_token = "<|im_start|>"
    assert tokenizer("abc")["input_ids"] == [start, *plain, end]
    assert encode(tokenizer, "abc", special_tokens=True) == [start, *plain]
    assert encode(tokenizer, "abc", special_tokens=False) == plain
    assert encode(tokenizer, "abc<|im_end|>", special_tokens=False) == [*plain, end]
    assert encode(tokenizer, "", special_tokens=True) == [start]


def test_cut_prompts_keep_their_start_token() -> None:
    class Framed(Echo):
        def encode(self, text: str, *, special_tokens: bool) -> list[int]:
            return [1] * special_tokens + [ord(letter) for letter in text]

        def generate(self, prompts: Sequence[Prompt], settings: GenerationSettings) -> list[Generation]:
            assert [prompt.tokens for prompt in prompts] == [[1, *[ord("b")] * 47]]
            return super().generate(prompts, settings)

    assert EvalLM(Framed()).generate_until([Request(0, "a" * 20 + "b" * 60)]) == ["a:48:0"]


def test_short_context_is_reported(own_task: Callable[..., Path], tmp_path: Path, invoke: Callable[..., Any]) -> None:
    model = make_model(tmp_path / "short", context=128)
    rows = [{"question": "Say " + "x" * length, "answer": "1"} for length in (5, 60, 400)]
    path = own_task(rows, max_new_tokens=100)
    done = invoke("--model", model, "--task-file", path, "--output", tmp_path / "o", "--chat-template", "off")
    assert done.exit_code == 0, done.output
    facts = results(tmp_path / "o")["scores"][0]["answers"]
    assert (facts["clamped"], facts["prompts_cut"], facts["smallest_limit"]) == (2, 1, 32)
    assert "prompts longer than the context, cut at their beginning: sums 1/3" in done.output


def test_tokenizer_without_end_token(own_task: Callable[..., Path], tmp_path: Path, invoke: Callable[..., Any]) -> None:
    model = make_model(tmp_path / "endless", chat=False, end=False)
    done = invoke("--model", model, "--task-file", own_task(), "--output", tmp_path / "o", "--limit", 2)
    assert done.exit_code == 0, done.output
    assert "names no end token" in done.output
    assert results(tmp_path / "o")["scores"][0]["answers"]["unfinished"] == 2


def test_stop_strings_and_batches_agree_with_single_prompts(tiny_model: Path) -> None:
    """A batch gives what each prompt gives alone, and answers end before the stop string."""
    from dskd_eval import models
    from dskd_eval.backends import hf

    backend = hf.HFBackend(models.locate(models.parse_model(str(tiny_model))), dtype="float32", device="cpu")
    texts = ["short", "a somewhat longer prompt", "x"]
    prompts = [Prompt(text, backend.encode(text, special_tokens=True), {}) for text in texts]
    free = backend.generate(prompts, GenerationSettings(24))
    alone = [backend.generate([prompt], GenerationSettings(24))[0] for prompt in prompts]
    assert [item.text for item in free] == [item.text for item in alone]
    stop = free[0].text[5:7]
    stopped = backend.generate(prompts[:1], GenerationSettings(24, stop=(stop,)))[0]
    assert stopped.text == free[0].text[: free[0].text.index(stop)]
    assert stopped.finish == "stop" and stopped.new_tokens < 24
    drawn = [backend.generate(prompts, GenerationSettings(8, temperature=1.0, seed=seed)) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_own_sampling_settings_of_a_checkpoint_do_not_count(tmp_path: Path, tiny_model: Path) -> None:
    import shutil

    from dskd_eval import models
    from dskd_eval.backends import hf

    folder = tmp_path / "loud"
    shutil.copytree(tiny_model, folder)
    config = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(
        json.dumps(config | {"repetition_penalty": 5.0, "do_sample": True, "temperature": 3.0})
    )
    texts = []
    for place in (tiny_model, folder):
        backend = hf.HFBackend(models.locate(models.parse_model(str(place))), dtype="float32", device="cpu")
        prompt = Prompt("hello", backend.encode("hello", special_tokens=True), {})
        texts.append(backend.generate([prompt], GenerationSettings(16))[0].text)
    assert texts[0] == texts[1]


def test_adapter_folder_is_evaluated_with_its_base(
    tiny_model: Path, own_task: Callable[..., Path], tmp_path: Path, invoke: Callable[..., Any]
) -> None:
    peft = pytest.importorskip("peft")
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    done = invoke("--model", tiny_model, "--model", tmp_path / "adapter", "--task-file", own_task(max_new_tokens=20),
                  "--output", tmp_path / "o", "--limit", 3)  # fmt: skip
    assert done.exit_code == 0, done.output
    found = results(tmp_path / "o")
    assert found["models"][1]["adapter"] and found["models"][0]["fingerprint"] != found["models"][1]["fingerprint"]
    answers: dict[str, list[str]] = {"tiny": [], "adapter": []}
    for line in (tmp_path / "o" / "samples.jsonl").read_text().splitlines():
        row = json.loads(line)
        answers[row["model"]] += row["answers"]
    assert answers["tiny"] != answers["adapter"]


@pytest.mark.parametrize("kind", ["new tokens", "new tokens, trained", "prompt tuning"])
def test_adapters_of_every_kind(tiny_model: Path, tmp_path: Path, kind: str) -> None:
    """What the adapter folder gives is what the adapted model gave; tokens added in training enlarge the base."""
    peft = pytest.importorskip("peft")
    import torch
    from dskd_eval import models
    from dskd_eval.backends import hf
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    if kind == "prompt tuning":
        adapted = peft.get_peft_model(model, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    else:
        tokenizer.add_tokens(["<new1>", "<new2>"])
        model.resize_token_embeddings(len(tokenizer))
        saved = ["embed_tokens", "lm_head"] if "trained" in kind else None
        adapted = peft.get_peft_model(
            model, peft.LoraConfig(target_modules=["q_proj"], modules_to_save=saved, init_lora_weights=False)
        )
    adapted.save_pretrained(tmp_path / "a", save_embedding_layers="auto" if kind != "new tokens" else True)
    tokenizer.save_pretrained(tmp_path / "a")
    backend = hf.HFBackend(models.locate(models.parse_model(str(tmp_path / "a"))), dtype="float32", device="cpu")
    text = "hello" if kind == "prompt tuning" else "hello <new2>"
    ids = torch.tensor([backend.encode(text, special_tokens=True)])
    with torch.inference_mode():
        expected, found = adapted.eval()(input_ids=ids).logits, backend.model(input_ids=ids).logits
    assert torch.allclose(expected, found, atol=1e-5)
    assert backend.generate([Prompt(text, ids[0].tolist(), {})], GenerationSettings(4))[0].new_tokens <= 4


def test_a_failing_task_leaves_the_others(
    tiny_model: Path, own_task: Callable[..., Path], tmp_path: Path, invoke: Callable[..., Any]
) -> None:
    good = own_task()
    bad = tmp_path / "bad.yaml"
    bad.write_text(
        "task: bad\ndata: rows.jsonl\ndoc_to_text: question\ndoc_to_target: answer\n"
        "metric_list: [{metric: exact_match}]\nprocess_results: !function marks.fails\n"
    )
    (tmp_path / "marks.py").write_text("def fails(doc, results):\n    raise RuntimeError('no marks today')\n")
    arguments = ["--model", tiny_model, "--task-file", bad, "--task-file", good, "--output", tmp_path / "o"]
    done = invoke(*arguments)
    assert done.exit_code == 1 and "RuntimeError: no marks today" in done.output
    status = {score["task"]["task"]: score["status"] for score in results(tmp_path / "o")["scores"]}
    assert status == {"bad": "failed", "sums": "finished"}
    assert (tmp_path / "o" / "errors.log").read_text().count("Traceback") >= 1


def test_store_reports_an_unusable_file(tmp_path: Path) -> None:
    (tmp_path / "g.sqlite").write_bytes(os.urandom(4096))
    with pytest.raises(UserError, match="generation store"):
        GenerationStore(tmp_path / "g.sqlite")
