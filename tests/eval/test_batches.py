"""Which prompts share a batch, how answers leave it, and what is said meanwhile: results never depend on it."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest_models import make_model, make_tokenizer
from dskd_eval import models
from dskd_eval.backends import hf
from dskd_eval.backends.base import GenerationSettings, Prompt, tell_nobody
from dskd_eval.cli.progress import TerminalProgress
from dskd_eval.lmeval.eval_lm import EvalLM
from test_run import Echo, Request


def lengths(sizes: list[int], **options: Any) -> list[list[int]]:
    """Prompt lengths of the batches that are formed of prompts of these lengths."""
    backend = Echo(max_length=1 << 20)
    EvalLM(backend, **options).generate_until([Request(i, "x" * size) for i, size in enumerate(sizes)])
    return [[len(text) for text in batch] for batch in backend.batches]


@pytest.mark.parametrize(
    ("sizes", "batches"),
    [
        ([31, 200_000], [[31], [200_000]]),
        ([31, 30, 200_000, 29, 28], [[31, 30, 29, 28], [200_000]]),
        ([1000, 900, 500, 499, 20], [[1000, 900, 500], [499], [20]]),
        ([256, 1, 2, 3], [[256, 3, 2, 1]]),
        ([4096] * 4, [[4096] * 2] * 2),
        ([3000, 100, 2900, 2048], [[2048], [100], [3000, 2900]]),
        ([10] * 9, [[10] * 4, [10] * 4, [10]]),
    ],
)
def test_a_long_prompt_holds_no_other(sizes: list[int], batches: list[list[int]]) -> None:
    """Batches of 4: at most 8192 tokens with padding, no prompt padded to more than twice its length unless short."""
    assert lengths(sizes, batch_size=4) == batches


def test_one_row_that_does_not_fit_still_has_its_batch() -> None:
    assert lengths([9000, 5], batch_size=1) == [[5], [9000]]


def test_a_backend_that_schedules_itself_gets_all_prompts_at_once() -> None:
    class Scheduler(Echo):
        pads = False

    backend = Scheduler(max_length=1 << 20)
    EvalLM(backend, batch_size=100).generate_until([Request(i, "x" * size) for i, size in enumerate([5, 9000, 70])])
    assert len(backend.batches) == 1


def plain_greedy(model: Any, tokens: list[int], limit: int, ends: list[int]) -> list[int]:
    """The most likely token, again and again, each time from the whole text and without a cache."""
    made: list[int] = []
    while len(made) < limit and not (made and made[-1] in ends):
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([tokens + made]), use_cache=False).logits[0, -1]
        made.append(int(logits.argmax()))
    return made


def first_part(answer: list[int], ends: list[int]) -> list[int]:
    """An answer up to its first end token, that included."""
    return next((answer[: place + 1] for place, token in enumerate(answer) if token in ends), answer)


def some_ends(answers: list[list[int]]) -> list[int]:
    """Tokens that would end the answers at as many places as possible, at least one not at all."""
    best: list[int] = []
    for token in sorted({token for answer in answers for token in answer}):
        ends = [*best, token]
        sizes = [len(first_part(answer, ends)) for answer in answers]
        before = {len(first_part(answer, best)) for answer in answers}
        if max(sizes) == len(answers[0]) and len(set(sizes)) > len(before):
            best = ends
    return best


@pytest.fixture(scope="module")
def unequal(tmp_path_factory: pytest.TempPathFactory) -> tuple[hf.HFBackend, list[Prompt], list[list[int]]]:
    """A model some of whose answers end early and some never, with the answers that a plain loop gives."""
    folder = make_model(tmp_path_factory.mktemp("unequal") / "m", seed=3)
    backend = hf.HFBackend(models.locate(models.parse_model(str(folder))), dtype="float32", device="cpu")
    with torch.no_grad():
        for weight in backend.model.parameters():
            weight.mul_(8 if weight.dim() > 1 else 1)  # random weights as small as usual repeat one token
    texts = [f"prompt {n} " + "x" * (n % 7) for n in range(12)]
    prompts = [Prompt(text, backend.encode(text, special_tokens=True), {}) for text in texts]
    answers = [plain_greedy(backend.model, prompt.tokens, 48, []) for prompt in prompts]
    backend.end_tokens = some_ends(answers)
    cut = [first_part(answer, backend.end_tokens) for answer in answers]
    assert len({len(answer) for answer in cut}) > 3 and max(map(len, cut)) == 48
    return backend, prompts, cut


def count_rows(backend: hf.HFBackend, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of every pass of the model."""
    rows: list[int] = []
    real = backend.model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        rows.append(kwargs["input_ids"].shape[0])
        return real(*args, **kwargs)

    forward.__signature__ = inspect.signature(real)  # type: ignore[attr-defined]
    monkeypatch.setattr(backend.model, "forward", forward)
    return rows


def test_a_finished_answer_leaves_its_batch(
    unequal: tuple[hf.HFBackend, list[Prompt], list[list[int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One answer as long as the limit: the passes of the others end with them, and all answers are as alone."""
    backend, prompts, expected = unequal
    rows = count_rows(backend, monkeypatch)
    found = backend.generate(prompts, GenerationSettings(48))
    assert [item.new_tokens for item in found] == [
        len(answer) - (answer[-1] in backend.end_tokens) for answer in expected
    ]
    assert [item.finish for item in found] == [
        "stop" if answer[-1] in backend.end_tokens else "length" for answer in expected
    ]
    for item, answer in zip(found, expected, strict=True):
        kept = [token for token in answer if token not in backend.end_tokens]
        assert item.text == backend.tokenizer.decode(kept, skip_special_tokens=True)
    unfinished = sum(len(answer) == 48 for answer in expected)
    assert rows[-1] == unfinished < rows[0] == len(prompts)
    assert sum(rows) <= sum(map(len, expected)) + len(prompts)


def test_stop_strings_let_answers_leave_too(
    unequal: tuple[hf.HFBackend, list[Prompt], list[list[int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    backend, prompts, _ = unequal
    free = backend.generate(prompts, GenerationSettings(48))
    stop = free[0].text[3:5]
    rows = count_rows(backend, monkeypatch)
    found = backend.generate(prompts, GenerationSettings(48, stop=(stop,)))
    assert [item.text for item in found] == [item.text.split(stop)[0] for item in free]
    assert rows[-1] < rows[0]


def test_progress_within_a_batch(unequal: tuple[hf.HFBackend, list[Prompt], list[list[int]]]) -> None:
    """Every token and every finished answer is told once."""
    backend, prompts, expected = unequal
    told: list[tuple[int, int]] = []
    backend.told = lambda tokens, finished: told.append((tokens, finished))
    backend.generate(prompts, GenerationSettings(48))
    backend.told = tell_nobody
    assert sum(tokens for tokens, _ in told) == sum(map(len, expected))
    assert sum(finished for _, finished in told) == len(prompts)


def test_sampled_answers_do_not_depend_on_the_batch(
    unequal: tuple[hf.HFBackend, list[Prompt], list[list[int]]],
) -> None:
    backend, prompts, _ = unequal
    settings = GenerationSettings(24, temperature=0.9, top_p=0.95, top_k=40, seed=5)
    together = backend.generate(prompts, settings)
    alone = [backend.generate([prompt], settings)[0] for prompt in reversed(prompts)]
    assert [item.text for item in together] == [item.text for item in reversed(alone)]
    assert len({item.text for item in together}) == len(prompts)


def test_sampled_tokens_have_their_probabilities() -> None:
    """4,000 draws of one token over logits 0, 1, 2, the last beyond top-k: chi-square against the renormalised two."""
    logits = torch.tensor([0.0, 1.0, -2.0]).expand(4000, 3)
    prompts = [Prompt(str(n), [n], {}) for n in range(4000)]
    draw = hf.processors(GenerationSettings(1, temperature=0.5, top_k=2, seed=1), prompts, 1)
    chosen = draw(torch.zeros(4000, 1, dtype=torch.long), logits.clone()).argmax(-1)
    expected = torch.tensor([1.0, torch.e**2]) / (1 + torch.e**2) * 4000
    counts = torch.bincount(chosen, minlength=3)
    assert counts[2] == 0
    assert float(((counts[:2] - expected) ** 2 / expected).sum()) < 10.8  # p = 0.001


FAMILIES: dict[str, dict[str, Any]] = {
    "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 2},
    "GPTNeoX": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64},
    "OPT": {"hidden_size": 32, "word_embed_proj_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
            "ffn_dim": 64},
    "Bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 2},
    "Falcon": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "alibi": True},
    "Mistral": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
                "intermediate_size": 64, "sliding_window": 8},
    "Gemma3": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
               "intermediate_size": 64, "head_dim": 16, "sliding_window": 8,
               "layer_types": ["sliding_attention", "full_attention"], "tie_word_embeddings": False},
    "Mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_families_answer_in_a_batch_as_alone(family: str, tmp_path: Path) -> None:
    """Answers of different length, from prompts of different length, past the window of those that have one."""
    name = "Gemma3Text" if family == "Gemma3" else family
    tokenizer = make_tokenizer(tmp_path)
    torch.manual_seed(0)
    tokens = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    config = getattr(transformers, f"{name}Config")(
        vocab_size=len(tokenizer), **FAMILIES[family], **tokens, initializer_range=0.3
    )
    architecture = {"GPT2": "GPT2LMHeadModel"}.get(family, f"{family}ForCausalLM")
    model = getattr(transformers, architecture)(config)
    model.save_pretrained(tmp_path)
    backend = hf.HFBackend(models.locate(models.parse_model(str(tmp_path))), dtype="float32", device="cpu")
    texts = ["a", "some longer prompt", "another", "b c d e", "zz", "0123456789", "q", "last one"]
    if family == "Mamba":  # reads padding as text
        texts = [text[0] for text in texts]
    prompts = [Prompt(text, backend.encode(text, special_tokens=True), {}) for text in texts]
    answers = [plain_greedy(backend.model, prompt.tokens, 24, []) for prompt in prompts]
    backend.end_tokens = some_ends(answers)
    alone = [backend.generate([prompt], GenerationSettings(24))[0] for prompt in prompts]
    together = backend.generate(prompts, GenerationSettings(24))
    assert [item.text for item in together] == [item.text for item in alone]
    expected = [first_part(answer, backend.end_tokens) for answer in answers]
    assert [item.new_tokens for item in alone] == [
        len(answer) - (answer[-1] in backend.end_tokens) for answer in expected
    ]
    assert len({item.new_tokens for item in alone}) > 2


def test_without_a_terminal_a_line_comes_within_a_task(
    tiny_model: Path, own_task: Callable[..., Path], tmp_path: Path
) -> None:
    """As in a log file of a batch job: what is done, how long it took; also while one answer is being written."""
    rows = [{"question": f"Say {n}", "answer": str(n)} for n in range(6)]
    script = (
        "import sys\nfrom dskd_eval import cli\nfrom dskd_eval.cli.progress import TerminalProgress\n"
        "TerminalProgress.every = 0.2\ncli.main(sys.argv[1:])\n"
    )
    command = [sys.executable, "-c", script, "--model", str(tiny_model), "--batch-size", "1"]
    command += ["--task-file", str(own_task(rows, max_new_tokens=300)), "--output", str(tmp_path / "o")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("  sums") and " of 6, " in line]
    assert len(lines) >= 2, done.stderr
    assert any("answers, " in line and " tokens: " in line for line in lines)
    assert json.loads((tmp_path / "o" / "results.json").read_text())["complete"]
    assert 20 <= TerminalProgress.every <= 60
