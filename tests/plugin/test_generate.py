"""`dskd generate`: which prompts the teacher gets, what it answers, and that a kill at any point changes nothing."""

import functools
import hashlib
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner

pytestmark = pytest.mark.axolotl
NEW = 24


@pytest.fixture(autouse=True)
def surroundings(monkeypatch, fresh_plugin_manager):
    # datasets, with several processes, puts a copy in its place: what is set here would outlive the test.
    monkeypatch.setattr(os, "environ", os.environ)
    monkeypatch.setenv("AXOLOTL_LOG_LEVEL", "WARNING")


def spelled(tokenizer, ids):
    """Text of an answer, read off the strings of its tokens; broken characters are replaced together."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    code = {char: byte for byte, char in bytes_to_unicode().items()}
    pieces, out = "<0x0A>" in tokenizer.get_vocab(), b""
    for token in tokenizer.convert_ids_to_tokens(list(ids)):
        if token in tokenizer.all_special_tokens:
            out += token.encode()
        elif pieces and re.fullmatch("<0x[0-9A-F]{2}>", token):
            out += bytes([int(token[3:5], 16)])
        else:
            out += token.replace("▁", " ").encode() if pieces else bytes(code[char] for char in token)
    return out.decode("utf-8", "replace")


@pytest.fixture(scope="module")
def teacher(tiny, tmp_path_factory) -> str:
    """The tiny teacher with an end-of-sequence token likely enough that some answers end and some are cut."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("generate") / "teacher"
    shutil.copytree(tiny["teacher"], folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        model.lm_head.weight[model.config.eos_token_id] *= 2
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def written(recipe, teacher, tmp_path, monkeypatch):
    """written(changes, block) -> path of the recipe file, in the current folder."""

    def write(changes=None, block=None, drop=()):
        changed = {**recipe, "output_dir": "out", **(changes or {})}
        changed["dskd"] = {"teacher": {"model": teacher, "dtype": "float32"}, **(block or {})}
        for key in drop:
            changed.pop(key)
        Path("recipe.yaml").write_text(yaml.safe_dump(changed))
        return "recipe.yaml"

    monkeypatch.chdir(tmp_path)
    return write


def run(*arguments, code=0):
    """Output of the command in this process; fails unless it ends with the exit code."""
    from axolotl.integrations.base import PluginManager
    from axolotl.utils import tee

    from dskd_plugin.cli import main

    PluginManager._instance = None
    streams = sys.stdout, sys.stderr
    tee.close_debug_log()  # a recipe that another test loaded may have left it open
    sys.stdout, sys.stderr = streams
    result = CliRunner().invoke(main, ["generate", *map(str, arguments)])
    unexpected = result.exception if not isinstance(result.exception, SystemExit) else None
    assert result.exit_code == code, (result.output, unexpected)
    assert unexpected is None
    assert "Traceback" not in result.output
    return result.output


def lines(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def data_of(rows, name="data.jsonl"):
    Path(name).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return name


def entry(path, **more):
    return {"datasets": [{"path": path, "ds_type": "json", "type": "chat_template", **more}]}


def test_whole_run(written, tiny):
    output = run(written(), "--max-new-tokens", NEW, "--batch-size", 5, "--write-recipe", "next.yaml")
    rows, source = lines("out-generated.jsonl"), lines(tiny["data"])
    manifest = json.loads(Path("out-generated.manifest.json").read_text())
    counts = manifest["counts"]
    assert counts["prompts"] == len(source) == 48
    assert counts["written"] == len(rows) > 5
    assert counts["unfinished"] > 5
    assert counts["written"] + counts["unfinished"] + counts["empty"] == 48
    assert f"{counts['written']} of 48 answers written" in output
    assert f"{counts['unfinished']} answers cut at {NEW} tokens (left out" in output
    assert manifest["recipe"]["sha256"] == hashlib.sha256(Path("recipe.yaml").read_bytes()).hexdigest()
    assert {"out-generated.jsonl", "out-generated.manifest.json", "recipe.yaml", "next.yaml"} == set(os.listdir())
    # In dataset order; all up to the last user turn is the source's.
    prompts = [[(m["role"], m["content"]) for m in row["messages"][:-1]] for row in source]
    found = [[(m["role"], m["content"]) for m in row["messages"][:-1]] for row in rows]
    places = [prompts.index(prompt) for prompt in found]
    assert places == sorted(places)
    for row in rows:
        *before, last = row["messages"]
        assert last["role"] == "assistant" and last["content"].strip()
        assert last["training"] is True and not any(message["training"] for message in before)
    old, new = (yaml.safe_load(Path(name).read_text()) for name in ("recipe.yaml", "next.yaml"))
    made = {"path": "out-generated.jsonl", "type": "chat_template", "message_field_training": "training"}
    assert new["datasets"] == [*old["datasets"], made]
    assert new["output_dir"] == "out-distilled" and new["dataset_prepared_path"] != old.get("dataset_prepared_path")
    changed = {"datasets", "output_dir", "dataset_prepared_path"}
    assert {k: v for k, v in new.items() if k not in changed} == {k: v for k, v in old.items() if k not in changed}
    assert f"The recipe trains on: {tiny['data']}, out-generated.jsonl" in output


def reference_prompts(teacher, source):
    """Token ids of each prompt, from the template's text."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(teacher)
    texts = [
        tokenizer.apply_chat_template(row["messages"][:-1], tokenize=False, add_generation_prompt=True)
        for row in source
    ]
    return tokenizer, [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]


def test_greedy_answers_are_those_of_single_prompts(written, teacher, tiny):
    from transformers import AutoModelForCausalLM

    run(written(), "--max-new-tokens", NEW, "--batch-size", 7, "--keep-unfinished", "--limit", 20)
    tokenizer, prompts = reference_prompts(teacher, lines(tiny["data"])[:20])
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32).eval()
    expected = []
    for ids in prompts:
        made = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=NEW)[0, len(ids) :]
        text = spelled(tokenizer, made.tolist())
        expected.append(text.partition(tokenizer.eos_token)[0].strip())
    answers = [row["messages"][-1]["content"].strip() for row in lines("out-generated.jsonl")]
    assert answers == [answer for answer in expected if answer]
    assert len(set(answers)) > 10


def test_sampling_defaults_in_the_teachers_folder_do_not_hold(written, teacher):
    folder = Path(shutil.copytree(teacher, "teacher"))
    config = json.loads((folder / "generation_config.json").read_text())
    changed = {**config, "do_sample": True, "temperature": 0.3, "repetition_penalty": 9.0, "max_new_tokens": 3}
    (folder / "generation_config.json").write_text(json.dumps(changed))
    options = ["--max-new-tokens", 12, "--keep-unfinished", "--limit", 8]
    run(written(), *options, "--out", "plain.jsonl")
    run(written(block={"teacher": {"model": str(folder), "dtype": "float32"}}), *options, "--out", "folder.jsonl")
    assert Path("folder.jsonl").read_bytes() == Path("plain.jsonl").read_bytes()


FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": 6},
    "gemma3_text": {"sliding_window": 6},
    "gpt2": {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 512},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "bloom": {"n_layer": 2, "n_head": 4},
    "phi": {"num_key_value_heads": 4},
    "qwen3": {},
    "lfm2": {"layer_types": ["conv", "full_attention"], "num_key_value_heads": 2},
    "mamba": {"state_size": 4},
}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_answer_does_not_depend_on_its_batch(family, temperature, build, tmp_path):
    """Padding, cache and positions of every family; the head has more rows than the tokenizer has tokens."""
    from transformers import AutoModelForCausalLM

    from dskd_plugin.generation.answers import Sampling, Writer

    tokenizer = build.byte_level_tokenizer(300, 1)
    sizes = {"vocab_size": len(tokenizer) + 60, "initializer_range": 0.3, **FAMILIES[family]}
    path = build.save_model(tmp_path, tokenizer, family, **sizes)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    sampling = Sampling(14, temperature, 1.0, 0, 1)
    ends = [tokenizer.eos_token_id, *range(200, 240)]  # some answers end early and leave the batch
    writer = Writer(model, tokenizer, vocab_size=len(tokenizer), ends=ends, sampling=sampling)
    generator = torch.Generator().manual_seed(2)
    lengths = [3, 11, 7, 1]
    prompts = [torch.randint(3, len(tokenizer), (length,), generator=generator).tolist() for length in lengths]
    alone = [writer.answer([row], [prompt])[0] for row, prompt in enumerate(prompts)]
    together = writer.answer(range(4), prompts)
    assert together == alone
    assert len({answer.text for answer in alone}) > 2
    assert len({answer.tokens for answer in alone}) > 1
    for prompt, answer in zip(prompts, alone, strict=True):
        ids = list(prompt)
        for _ in range(0 if temperature else answer.tokens):
            with torch.no_grad():
                scores = model(torch.tensor([ids])).logits[0, -1, : len(tokenizer)]
            ids.append(int(scores.argmax()))
        made = ids[len(prompt) : -1 if answer.finished else None]
        assert temperature or answer.text == spelled(tokenizer, made)


def test_sampled_answers_follow_a_loop_over_floats(written, teacher, tiny):
    from transformers import AutoModelForCausalLM

    options = ["--temperature", 1.3, "--top-k", 40, "--top-p", 0.9, "--seed", 5, "--keep-unfinished", "--limit", 6]
    run(written(), "--max-new-tokens", 12, "--batch-size", 4, *options)
    tokenizer, prompts = reference_prompts(teacher, lines(tiny["data"])[:6])
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32).eval()
    expected = []
    for row, prompt in enumerate(prompts):
        draw, ids = random.Random(f"5:{row}"), list(prompt)
        for _ in range(12):
            with torch.no_grad():
                logits = [value / 1.3 for value in model(torch.tensor([ids])).logits[0, -1].tolist()]
            top = sorted(range(len(logits)), key=lambda i: -logits[i])[:40]
            weights = [math.exp(logits[i] - logits[top[0]]) for i in top]
            kept, mass = {}, 0.0
            for i, weight in zip(top, weights, strict=True):
                if mass < 0.9:
                    kept[i] = weight / sum(weights)
                mass += weight / sum(weights)
            number, reached = draw.random() * sum(kept.values()), 0.0
            for i in sorted(kept):
                reached += kept[i]
                if reached > number:
                    ids.append(i)
                    break
            if ids[-1] == tokenizer.eos_token_id:
                break
        text = spelled(tokenizer, ids[len(prompt) :])
        expected.append(text.partition(tokenizer.eos_token)[0].strip())
    answers = [row["messages"][-1]["content"].strip() for row in lines("out-generated.jsonl")]
    assert answers == [answer for answer in expected if answer]


class Steps:
    """A model that is watched: how many rows it reads in each step."""

    def __init__(self, model):
        self.rows, forward = [], model.forward

        @functools.wraps(forward)
        def counted(*arguments, **named):
            self.rows.append(len(named["input_ids"]))
            return forward(*arguments, **named)

        model.forward = counted


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("size", [5, 20])
def test_a_finished_answer_leaves_its_batch(size, temperature, teacher):
    """Answers as one by one; no step reads more rows than are unfinished, but for those that wait to leave together."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from dskd_plugin.generation.answers import Sampling, Writer

    tokenizer = AutoTokenizer.from_pretrained(teacher)
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32).eval()
    steps = Steps(model)
    ends = [tokenizer.eos_token_id]
    sampling = Sampling(40, temperature, 1.0, 0, 1)
    writer = Writer(model, tokenizer, vocab_size=len(tokenizer), ends=ends, sampling=sampling)
    generator = torch.Generator().manual_seed(5)
    lengths = torch.randint(2, 12, (size,), generator=generator).tolist()
    prompts = [torch.randint(3, len(tokenizer), (length,), generator=generator).tolist() for length in lengths]
    alone = [writer.answer([row], [prompt])[0] for row, prompt in enumerate(prompts)]
    steps.rows.clear()
    heard = []
    together = writer.answer(range(size), prompts, lambda tokens, ended: heard.append((tokens, ended)))
    assert together == alone
    tokens = [answer.tokens for answer in alone]
    assert len(set(tokens)) > 3 and max(tokens) == len(steps.rows)
    for step, rows in enumerate(steps.rows):
        unfinished = sum(count > step for count in tokens)
        assert unfinished <= rows <= unfinished + max(0, rows // 8 - 1), step
    assert sum(count for count, _ in heard) == sum(tokens)
    assert sum(ended for _, ended in heard) == size
    assert len(heard) >= max(tokens)  # told after every step, not after the batch


def test_the_time_left_is_right_for_answers_of_one_length(monkeypatch):
    """Ten answers of 50 tokens, two at a time, 4 tokens a second: 125 s in all."""
    from dskd_plugin.cli import progress
    from dskd_plugin.generation.answers import Answer

    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    earlier = [Answer(row, "a", 50, True) for row in range(2)]
    for done in ([], earlier):
        clock[0] = 0.0
        with progress.Progress(10, done, 80) as bar:
            for step in range(1, 201):
                clock[0] += 0.5
                bar.told(2, 2 if step % 50 == 0 else 0)
                answers = len(done) + 2 * (step // 50)
                assert answers or bar.tokens_left == 80 * 10 - 2 * step
                if step % 50 == 0:
                    assert bar.tokens_left == 50 * (10 - answers)
                    assert f"4.0 tokens/s, {progress.tqdm.format_interval(12.5 * (10 - answers))} left" in str(bar.bar)
                    break


def test_the_bar_moves_within_a_batch(written, monkeypatch):
    """One batch only: a log file already has speed and time left before any answer has ended."""
    from dskd_plugin.cli import progress

    monkeypatch.setattr(progress, "PAUSE", {True: 0.0, False: 0.0})
    output = run(written(), "--max-new-tokens", 30, "--batch-size", 48, "--keep-unfinished")
    bars = re.findall(r"\| (\d+)/48 answers \[[\d:]+, ([\d.]+) tokens/s, (at most )?([\d:]+) left\]", output)
    assert len(bars) >= 30
    counts = [int(count) for count, *_ in bars]
    assert counts == sorted(counts) and len(set(counts)) > 5
    assert [bool(most) for count, _, most, _ in bars] == [count == 0 for count in counts]


def test_draws_follow_the_probabilities():
    from dskd_plugin.generation.answers import Draw, Sampling

    weights = [0.5, 0.0, 0.2, 0.05, 0.25]
    scores = torch.tensor(weights).log().expand(20_000, -1)
    draw = Draw(Sampling(1, 1.0, 1.0, 0, 3), range(20_000), prompt_length=4)
    chosen = draw(torch.zeros(20_000, 4, dtype=torch.long), scores).argmax(-1)
    for token, weight in enumerate(weights):
        share = float((chosen == token).double().mean())
        assert abs(share - weight) <= 4 * math.sqrt(weight * (1 - weight) / 20_000)


def test_seed_and_batch_size_of_sampled_answers(written):
    def answers(*options):
        run(written(), "--max-new-tokens", 8, "--temperature", 1, "--keep-unfinished", "--overwrite", *options)
        return Path("out-generated.jsonl").read_bytes()

    first = answers("--seed", 1, "--batch-size", 6)
    assert answers("--seed", 1, "--batch-size", 6) == first
    assert answers("--seed", 1, "--batch-size", 11) == first
    assert answers("--seed", 2, "--batch-size", 6) != first


# -- stopped and started again -------------------------------------------------------------------------------


def stop_after(monkeypatch, count):
    """Ctrl-C in the batch after the first ``count``."""
    from dskd_plugin.generation.answers import Writer

    original, calls = Writer.answer, []

    def answer(self, rows, prompts, *told):
        if len(calls) == count:
            raise KeyboardInterrupt
        calls.append(rows)
        return original(self, rows, prompts, *told)

    monkeypatch.setattr(Writer, "answer", answer)
    return lambda: monkeypatch.setattr(Writer, "answer", original)


SETTINGS = {
    "greedy": ["--max-new-tokens", 10, "--batch-size", 4],
    "sampled": ["--max-new-tokens", 10, "--batch-size", 4, "--temperature", 0.8, "--top-p", 0.95, "--seed", 3],
}


@pytest.mark.parametrize("settings", SETTINGS)
def test_ctrl_c_and_every_torn_file_lead_to_the_same_bytes(settings, written, monkeypatch):
    options = [written(), *SETTINGS[settings], "--keep-unfinished", "--limit", 22]
    run(*options, "--out", "whole.jsonl")
    resume = stop_after(monkeypatch, 4)
    assert "Stopped after 16 of 22 answers; the same command goes on from there." in run(*options, code=130)
    resume()
    partial = Path("out-generated.jsonl.partial")
    content = partial.read_bytes()
    assert content.count(b"\n") == 17
    assert not Path("out-generated.jsonl").exists()
    ends = [at + 1 for at, byte in enumerate(content) if byte == ord("\n")]
    cuts = [0, 5, ends[0] - 1, ends[0], ends[0] + 9, ends[3] + 1, ends[4], ends[10] - 1, len(content) - 1, len(content)]
    for cut in cuts:
        partial.write_bytes(content[:cut])
        Path("out-generated.jsonl").unlink(missing_ok=True)
        run(*options)
        assert Path("out-generated.jsonl").read_bytes() == Path("whole.jsonl").read_bytes(), cut
        assert not partial.exists()


def test_a_resumed_run_answers_only_what_is_missing(written, monkeypatch):
    from dskd_plugin.generation.answers import Writer

    options = [written(), *SETTINGS["greedy"], "--keep-unfinished"]
    resume = stop_after(monkeypatch, 9)
    run(*options, code=130)
    resume()
    calls, original = [], Writer.answer
    monkeypatch.setattr(Writer, "answer", lambda self, rows, *more: calls.append(rows) or original(self, rows, *more))
    run(*options)
    assert len(calls) == 12 - 9


def test_a_batch_that_does_not_fit_is_answered_in_parts(written, monkeypatch):
    """A real run whose memory ends at batches of three: the same answers, and a bar that counts each once."""
    import torch

    from dskd_plugin.cli.progress import Progress
    from dskd_plugin.generation.answers import Writer

    options = [written(), *SETTINGS["sampled"], "--keep-unfinished", "--limit", 22]
    run(*options, "--out", "whole.jsonl")
    original, bars, start = Writer.answer, [], Progress.__enter__

    def answer(self, rows, prompts, told):
        found = original(self, rows, prompts, told)
        if len(rows) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return found

    monkeypatch.setattr(Writer, "answer", answer)
    monkeypatch.setattr(Progress, "__enter__", lambda self: bars.append(self) or start(self))
    run(*options)
    assert Path("out-generated.jsonl").read_bytes() == Path("whole.jsonl").read_bytes()
    counts = json.loads(Path("out-generated.manifest.json").read_text())["counts"]
    assert (bars[0].ended, bars[0].tokens) == (22, counts["tokens"])

    def nothing_fits(self, rows, prompts, told):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(Writer, "answer", nothing_fits)
    refused = run(*options, "--overwrite", code=1)
    assert "--max-new-tokens: expected one prompt and its answer that fit on cpu" in refused, refused


def test_kill_9_in_the_middle_gives_the_same_bytes(written):
    options = [written(), "--max-new-tokens", 60, "--batch-size", 1, "--temperature", 1, "--keep-unfinished"]
    run(*options, "--out", "whole.jsonl")
    command = [sys.executable, "-m", "dskd_plugin.cli", "generate", *map(str, options)]
    partial = Path("out-generated.jsonl.partial")
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    with open("log.txt", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline and process.poll() is None:
            if partial.exists() and partial.read_bytes().count(b"\n") > 8:
                break
            time.sleep(0.002)
        process.kill()
        process.wait()
    assert partial.exists(), Path("log.txt").read_text()[-3000:]
    assert 8 < partial.read_bytes().count(b"\n") < 49
    assert not Path("out-generated.jsonl").exists()
    run(*options)
    assert Path("out-generated.jsonl").read_bytes() == Path("whole.jsonl").read_bytes()


def test_dropped_and_kept_answers_come_from_one_unfinished_run(written, monkeypatch):
    """Whether cut answers are kept does not decide the answers."""
    resume = stop_after(monkeypatch, 2)
    run(written(), *SETTINGS["greedy"], code=130)
    resume()
    output = run("recipe.yaml", *SETTINGS["greedy"], "--keep-unfinished")
    counts = json.loads(Path("out-generated.manifest.json").read_text())["counts"]
    assert f"{counts['unfinished']} answers cut at 10 tokens (kept)" in output
    assert counts["written"] + counts["empty"] == 48


@pytest.mark.parametrize(
    ("option", "value", "name"),
    [
        ("--max-new-tokens", 11, "settings.max_new_tokens: 11"),
        ("--temperature", 0.7, "settings.temperature: 0.7"),
        ("--seed", 4, "settings.seed: 4"),
        ("--batch-size", 3, "settings.batch_size: 3"),
        ("--limit", 40, "data.rows: 40"),
    ],
)
def test_other_settings_do_not_go_on(option, value, name, written, monkeypatch):
    options = [written(), *SETTINGS["sampled"]]
    resume = stop_after(monkeypatch, 3)
    run(*options, code=130)
    resume()
    output = run(*options, option, value, code=1)
    assert name in output and "out-generated.jsonl.partial" in output and "--overwrite" in output
    run(*options, option, value, "--overwrite", "--keep-unfinished")
    assert Path("out-generated.jsonl").exists()


def test_another_teacher_or_other_rows_do_not_go_on(written, teacher, tiny, monkeypatch):
    file = Path(shutil.copy(tiny["data"], "data.jsonl"))
    other = Path(shutil.copytree(teacher, "teacher"))
    options = [written(entry(str(file)), {"teacher": {"model": str(other), "dtype": "float32"}}), *SETTINGS["greedy"]]
    resume = stop_after(monkeypatch, 3)
    run(*options, code=130)
    resume()
    weights = other / "model.safetensors"
    trained = bytearray(weights.read_bytes())
    trained[-9] ^= 1
    whole = weights.read_bytes()
    weights.write_bytes(trained)
    assert "teacher.files.weights.model.safetensors" in run(*options, code=1)
    weights.write_bytes(whole)  # another time and a note beside it are no other teacher
    (other / "README.md").write_text("A note.")
    content = file.read_text(encoding="utf-8")
    file.write_text(content.replace("river", "rivers", 1), encoding="utf-8")
    assert "data.sha256" in run(*options, code=1)
    file.write_text(content, encoding="utf-8")
    run(*options, "--keep-unfinished")


def test_a_finished_result_is_not_overwritten_by_accident(written):
    options = [written(), *SETTINGS["greedy"], "--keep-unfinished"]
    run(*options)
    before = Path("out-generated.jsonl").read_bytes()
    assert "got an earlier result" in run(*options, code=1)
    assert Path("out-generated.jsonl").read_bytes() == before
    run(*options, "--overwrite", "--limit", 3)
    assert len(lines("out-generated.jsonl")) <= 3


def test_two_runs_do_not_write_one_file(written):
    import fcntl

    with open("out-generated.jsonl.partial", "ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert "only writer" in run(written(), *SETTINGS["greedy"], code=1)


# -- prompts -------------------------------------------------------------------------------------------------

SYSTEM = {"role": "system", "content": "Be brief."}
ASK, TOLD, AGAIN = "red stone?", "blue lamp.", "and the river?"


def chat(*contents):
    roles = ["user", "assistant"]
    return [{"role": roles[k % 2], "content": content} for k, content in enumerate(contents)]


CONVERSATIONS = {
    "one turn": ({"messages": chat(ASK, TOLD)}, {}, chat(ASK)),
    "no answer yet": ({"messages": chat(ASK)}, {}, chat(ASK)),
    "earlier answers stay": ({"messages": chat(ASK, TOLD, AGAIN, TOLD)}, {}, chat(ASK, TOLD, AGAIN)),
    "system": ({"messages": [SYSTEM, *chat(ASK, TOLD)]}, {}, [SYSTEM, *chat(ASK)]),
    "system column": ({"messages": chat(ASK, TOLD), "system": "Be brief."}, {}, [SYSTEM, *chat(ASK)]),
    "system dropped": ({"messages": [SYSTEM, *chat(ASK, TOLD)]}, {"drop_system_message": True}, chat(ASK)),
    "content parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": ASK}]}, *chat(ASK, TOLD)[1:]]},
        {},
        chat(ASK),
    ),
    "other names": (
        {"talk": [{"from": "human", "value": ASK}, {"from": "gpt", "value": TOLD}]},
        {"field_messages": "talk", "message_property_mappings": {"role": "from", "content": "value"}},
        chat(ASK),
    ),
    "own roles": (
        {"messages": [{"role": "Q", "content": ASK}, {"role": "A", "content": TOLD}]},
        {"roles": {"user": ["Q"], "assistant": ["A"]}},
        chat(ASK),
    ),
    "alpaca": ({"instruction": ASK, "input": "", "output": TOLD}, {"type": "alpaca"}, chat(ASK)),
    "alpaca with input": (
        {"instruction": ASK, "input": AGAIN, "output": TOLD},
        {"type": "alpaca"},
        chat(f"{ASK}\n\n{AGAIN}"),
    ),
    "alpaca without answers": ({"instruction": ASK}, {"type": "alpaca"}, chat(ASK)),
    "alpaca with system": (
        {"instruction": ASK, "input": "", "output": TOLD, "system": "Be brief."},
        {"type": "alpaca_w_system.load_chat"},
        [SYSTEM, *chat(ASK)],
    ),
}


@pytest.mark.parametrize("case", CONVERSATIONS)
def test_the_prompt_is_the_conversation_up_to_the_last_question(case, written, teacher):
    row, options, expected = CONVERSATIONS[case]
    from transformers import AutoTokenizer

    from dskd_plugin.host.prompts import load_recipe, read_prompts, read_recipe

    path = Path(written(entry(data_of([row]), **options)))
    source = load_recipe(path, read_recipe(path))
    (found,) = read_prompts(source, None)
    assert json.loads(found["messages"]) == expected
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    text = tokenizer.apply_chat_template(expected, tokenize=False, add_generation_prompt=True)
    assert found["prompt_ids"] == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_entries_are_read_as_axolotl_reads_them(written, build):
    """Splits, shards, parquet and the order of several entries."""
    from datasets import Dataset

    from dskd_plugin.host.prompts import load_recipe, read_prompts, read_recipe

    first = [{"messages": chat(f"first {k}", TOLD)} for k in range(9)]
    second = [{"messages": chat(f"second {k}", TOLD)} for k in range(6)]
    Dataset.from_list(second).to_parquet("second.parquet")
    datasets = [
        {"path": data_of(first), "ds_type": "json", "type": "chat_template", "split": "train[2:5]"},
        {"path": "second.parquet", "type": "chat_template", "shards": 3, "shards_idx": 1},
    ]
    path = Path(written({"datasets": datasets}))
    source = load_recipe(path, read_recipe(path))
    asked = [json.loads(row["messages"])[0]["content"] for row in read_prompts(source, None)]
    shard = Dataset.from_list(second).shuffle(seed=7).shard(num_shards=3, index=1)
    assert asked == ["first 2", "first 3", "first 4", *(row["messages"][0]["content"] for row in shard)]
    assert [json.loads(r["messages"])[0]["content"] for r in read_prompts(source, 4)] == asked[:4]


def test_several_processes_read_the_same_prompts(written):
    from dskd_plugin.host.prompts import load_recipe, read_prompts, read_recipe

    name = data_of([{"messages": chat(f"question {k}", TOLD)} for k in range(1001)])
    found = []
    for processes in (1, 2):
        path = Path(written({**entry(name), "dataset_num_proc": processes}))
        found.append(read_prompts(load_recipe(path, read_recipe(path)), None)[:])
    assert found[0] == found[1]
    assert [json.loads(text)[0]["content"] for text in found[0]["messages"]] == [f"question {k}" for k in range(1001)]


def test_the_space_that_the_template_writes_is_not_part_of_an_answer(written):
    from dskd_plugin.host.prompts import load_recipe, read_recipe

    path = Path(written())
    assert load_recipe(path, read_recipe(path)).form.lead == " "
    path = Path(written(block={"teacher": {"model": read_recipe(path)["dskd"]["teacher"]["model"]}}))
    with_chatml = {**read_recipe(path)["dskd"]["teacher"], "chat_template": "chatml"}
    path = Path(written(block={"teacher": with_chatml}))
    assert load_recipe(path, read_recipe(path)).form.lead == ""


def test_rows_without_a_question_are_left_out_and_counted(written):
    rows = [{"messages": chat(ASK, TOLD)}, {"messages": [SYSTEM]}, {"messages": chat(AGAIN, TOLD)}]
    output = run(written(entry(data_of(rows))), *SETTINGS["greedy"], "--keep-unfinished")
    assert "1 rows without a turn to answer" in output
    assert [row["messages"][0]["content"] for row in lines("out-generated.jsonl")] == [ASK, AGAIN]


def test_tool_calls_are_written_as_text_and_read_back_by_axolotl(written, teacher):
    """Calls with different arguments in one file."""
    from dskd_plugin.host.prompts import load_recipe, read_prompts, read_recipe

    template = (
        "{% for message in messages %}<s>{{ message['role'] }} {{ message['content'] }}"
        "{% if message['tool_calls'] %}{% for c in message['tool_calls'] %}"
        "{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}{% endif %}</s>"
        "{% endfor %}{% if tools %}{{ tools | tojson }}{% endif %}"
        "{% if add_generation_prompt %}<s>assistant {% endif %}"
    )
    Path("tools.jinja").write_text(template)
    tools = [{"type": "function", "function": {"name": "lamp", "parameters": {"type": "object", "properties": {}}}}]

    def call(**arguments):
        function = {"name": "lamp", "arguments": json.dumps(arguments)}
        turn = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}
        return [*chat(ASK), turn, {"role": "tool", "content": "on"}, {"role": "assistant", "content": TOLD}]

    rows = [{"messages": call(colour="red"), "tools": json.dumps(tools)}, {"messages": call(level=[1, 2])}]
    teacher_block = {"teacher": {"model": teacher, "dtype": "float32", "chat_template": "tools.jinja"}}
    run(written(entry(data_of(rows)), teacher_block), *SETTINGS["greedy"], "--keep-unfinished")
    first, second = lines("out-generated.jsonl")
    arguments = [row["messages"][1]["tool_calls"][0]["function"]["arguments"] for row in (first, second)]
    assert [json.loads(text) for text in arguments] == [{"colour": "red"}, {"level": [1, 2]}]
    assert json.loads(first["tools"]) == tools and second["tools"] is None
    assert [message["role"] for message in first["messages"]] == ["user", "assistant", "tool", "assistant"]

    def prompts(data):
        path = Path(written(entry(data), teacher_block))
        return read_prompts(load_recipe(path, read_recipe(path)), None)["prompt_ids"]

    assert prompts("out-generated.jsonl") == prompts("data.jsonl")


def test_fields_that_only_the_students_template_reads_are_written(written):
    """The teacher's template knows role and content; tool_call_id, name and a field of the user's own stay."""
    from dskd_plugin.host.prompts import load_recipe, read_prompts, read_recipe

    tool = {"role": "tool", "content": "on", "tool_call_id": "call-7", "name": "lamp"}
    question = {"role": "user", "content": ASK, "source": {"page": 3}, "mark": True}
    told = {"role": "assistant", "content": TOLD, "mark": False}
    rows = [{"messages": [question, told, tool, told]}, {"messages": chat(AGAIN, TOLD)}]
    bare = [{"messages": [{k: m[k] for k in ("role", "content")} for m in row["messages"]]} for row in rows]
    options = {"message_field_training": "mark"}

    def prompts(data):
        path = Path(written(entry(data, **options)))
        return read_prompts(load_recipe(path, read_recipe(path)), None)["prompt_ids"]

    assert prompts(data_of(rows)) == prompts(data_of(bare, "bare.jsonl"))
    run(written(entry("data.jsonl", **options)), *SETTINGS["greedy"], "--keep-unfinished")
    first, second = lines("out-generated.jsonl")
    assert first["messages"][2] == {**tool, "training": False, "source": None}
    assert first["messages"][0] == {
        **chat(ASK)[0],
        "source": {"page": 3},
        **dict.fromkeys(["tool_call_id", "name"]),
        "training": False,
    }
    assert second["messages"][0]["content"] == AGAIN


# -- what one side alone reads -------------------------------------------------------------------------------

RICH = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.reasoning_content }}{{ m.name }}{{ m.content }}<|im_end|>\n{% endfor %}"
)
PLAIN = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
DEVELOPER = {"role": "developer", "content": "Always answer with the word PLUM."}
LAMP = {"type": "function", "function": {"name": "lamp", "parameters": {"type": "object", "properties": {}}}}


def warned(output):
    return [line for line in output.splitlines() if "What one side does not read" in line]


def with_templates(written, teacher, rows, student, teachers, **changes):
    Path("teacher.jinja").write_text(teachers)
    entries = entry(data_of(rows), chat_template="jinja", chat_template_jinja=student)
    block = {"teacher": {"model": teacher, "dtype": "float32", "chat_template": "teacher.jinja"}}
    return run(written({**entries, **changes}, block), *SETTINGS["greedy"], "--keep-unfinished")


def test_what_the_teachers_template_drops_is_told_before_it_answers(written, teacher):
    named = [{**chat(ASK)[0], "name": "Ann"}]
    rows = [
        {"messages": chat(ASK, TOLD), "tools": None},
        {"messages": [DEVELOPER, *chat(ASK, TOLD)], "tools": None},
        {"messages": named, "tools": None},
        {"messages": chat(AGAIN, TOLD), "tools": json.dumps([LAMP])},
        {"messages": [DEVELOPER, *chat(AGAIN)], "tools": None},
    ]
    (line,) = warned(with_templates(written, teacher, rows, RICH, PLAIN))
    assert line.startswith("Warning: datasets: data.jsonl: of 5 rows, only the student reads")
    for field in ("content of developer messages (2 rows)", "tools (1 row)", "name of user messages (1 row)"):
        assert field in line, line
    assert "row 2: 'Always answer with the word PLUM.'" in line and "[INST] red stone? [/INST]" in line
    assert "<|im_start|>developer" in line and "only the teacher" not in line


def test_what_the_student_alone_will_not_read_is_told_as_well(written, teacher):
    rows = [{"messages": [DEVELOPER, *chat(ASK, TOLD)]}]
    (line,) = warned(with_templates(written, teacher, rows, PLAIN, RICH))
    assert "only the teacher reads content of developer messages (1 row)" in line


def test_nothing_is_told_where_both_read_the_same(written, teacher):
    rows = [{"messages": [DEVELOPER, *chat(ASK, TOLD)]}]
    assert warned(with_templates(written, teacher, rows, RICH, RICH)) == []
    other = [{"messages": chat(ASK, TOLD)}]
    assert warned(with_templates(written, teacher, other, RICH, PLAIN, output_dir="other")) == []


def test_a_prompt_beyond_the_teachers_embeddings_is_refused(written, teacher):
    from transformers import AutoTokenizer

    folder = str(shutil.copytree(teacher, "wider"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = len(tokenizer)
    tokenizer.add_tokens(["kubernetes"])
    tokenizer.save_pretrained(folder)
    data = data_of([{"messages": chat(ASK, TOLD)}, {"messages": chat("red kubernetes?", TOLD)}])
    block = {"teacher": {"model": folder, "dtype": "float32"}}
    output = run(written(entry(data), block), *SETTINGS["greedy"], code=1)
    assert "datasets: data.jsonl: expected tokens that the teacher (dskd.teacher.model) has embeddings for" in output
    assert f"got {rows} rows of them and, in row 2, the token 'kubernetes' of id {rows}" in output


# -- what is printed -----------------------------------------------------------------------------------------


THINKING = {
    "named": ({"template_thinking_key": "thinking", "field_thinking": "thinking"}, "thinking"),
    "split": ({"split_thinking": True}, "reasoning_content"),
    "split under another name": ({"split_thinking": True, "template_thinking_key": "thinking"}, "thinking"),
}


@pytest.mark.parametrize("case", THINKING)
def test_the_student_reads_earlier_reasoning_of_the_written_rows_as_before(case, written, teacher):
    """Whatever the recipe calls it: what the printed entry makes of the rows is what the recipe's made of its own."""
    from dskd_plugin.host.prompts import load_recipe, read_prompts, read_recipe

    options, key = THINKING[case]
    reads = (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{% if message.KEY %}({{ message.KEY }})"
        "{% endif %}{{ message.content }}<|im_end|>\n{% endfor %}"
    ).replace("KEY", key)
    said = {"role": "assistant", "content": TOLD, key: "it is red"}
    if "split_thinking" in options:
        said = {"role": "assistant", "content": f"<think>it is red</think>{TOLD}"}
    options = {**options, "chat_template": "jinja", "chat_template_jinja": reads}
    Path("reads.jinja").write_text(reads)
    block = {"teacher": {"model": teacher, "dtype": "float32", "chat_template": "reads.jinja"}}
    data = data_of([{"messages": [*chat(ASK), said, *chat(AGAIN, TOLD)]}])
    output = run(written(entry(data, **options), block), *SETTINGS["greedy"], "--keep-unfinished")
    (made,) = snippet(output)["datasets"]

    def prompts(one):
        path = Path(written({"datasets": [{"ds_type": "json", **one}]}, block))
        source = load_recipe(path, read_recipe(path))
        return read_prompts(source, None)["prompt_ids"], source.teacher.tokenizer

    before, tokenizer = prompts({"path": data, "type": "chat_template", **options})
    assert f"(it is red){TOLD}" in tokenizer.decode(before[0])
    assert prompts(made)[0] == before
    assert {made.get(name, key) for name in ("template_thinking_key", "field_thinking")} == {key}


def snippet(output):
    return yaml.safe_load(output.split("in place of its datasets:\n")[1])


def test_the_printed_entry_keeps_how_the_student_reads_a_conversation(written, tiny):
    more = {"train_on_eos": "last", "roles_to_train": ["assistant"], "field_messages": "messages"}
    rows = [{"messages": chat(ASK, TOLD)}, {"messages": chat(AGAIN, TOLD)}]
    output = run(written(entry(data_of(rows), **more)), *SETTINGS["greedy"], "--keep-unfinished", "--out", "new.jsonl")
    assert snippet(output) == {
        "datasets": [
            {
                "path": "new.jsonl",
                "type": "chat_template",
                "roles_to_train": ["assistant"],
                "train_on_eos": "last",
            }
        ]
    }
    assert set(lines("new.jsonl")[0]["messages"][0]) == {"role", "content"}


TRAINED = {
    "a role under another name": ({"roles": {"user": ["Q"], "assistant": ["A"]}, "roles_to_train": ["A"]}, "QA"),
    "of two names for one role": (
        {"roles": {"user": ["Q"], "assistant": ["A", "B"]}, "roles_to_train": ["A", "B"]},
        "QB",
    ),
    "Axolotl's own names": ({"roles_to_train": ["gpt"]}, ("human", "gpt")),
    "marked messages alone": ({"roles_to_train": [], "message_field_training": "learn"}, ("user", "assistant")),
}


@pytest.mark.parametrize("case", TRAINED)
def test_the_written_recipe_trains_on_the_answers_whatever_the_roles_are_called(case, written):
    """Each answer has a trained token, in the rows as Axolotl prepares them."""
    from dskd_plugin.host.prepared import prepare

    more, (asks, tells) = TRAINED[case]
    rows = [{"messages": [{"role": asks, "content": ASK}, {"role": tells, "content": TOLD, "learn": True}]}]
    options = ["--recipe-rows", "generated", "--write-recipe", "next.yaml", "--keep-unfinished", *SETTINGS["greedy"]]
    run(written(entry(data_of(rows), **more)), *options)
    (made,) = yaml.safe_load(Path("next.yaml").read_text())["datasets"]
    assert made["roles_to_train"] == ["assistant"]
    (found,) = prepare(Path("next.yaml"))
    assert all(any(label != -100 for label in row["labels"]) for row in found.datasets["training"])


def test_a_student_without_a_template_gets_one_named(written, tiny):
    student = Path(shutil.copytree(tiny["student"], "student"))
    (student / "chat_template.jinja").unlink()
    rows = [{"instruction": ASK, "input": "", "output": TOLD}]
    changes = {**entry(data_of(rows), type="alpaca"), "base_model": str(student)}
    output = run(written(changes, drop=["chat_template"]), *SETTINGS["greedy"], "--keep-unfinished")
    assert snippet(output)["chat_template"] == "alpaca"


GOLD = [{"messages": chat(ASK, TOLD)}, {"messages": chat(AGAIN, TOLD)}]
PROMPTS = [{"messages": chat(f"stone {k}?")} for k in range(5)]


@pytest.fixture
def gold_and_prompts(written):
    """A recipe of a few gold answers and more prompts without one, whose student has settings of its own."""
    more = {"ds_type": "json", "type": "chat_template"}
    gold = {"path": data_of(GOLD, "gold.jsonl"), **more, "train_on_eos": "last"}
    return written({"datasets": [gold, {"path": data_of(PROMPTS, "prompts.jsonl"), **more}]}, {"method": "overlap_kd"})


@pytest.mark.parametrize("ask", ["all", "unanswered"])
def test_the_written_recipe_distils_on_gold_and_generated_rows(ask, gold_and_prompts):
    options = ["--ask", ask, *SETTINGS["greedy"], "--keep-unfinished", "--write-recipe", "next.yaml"]
    run(gold_and_prompts, *options)
    asked = [row["messages"][0]["content"] for row in lines("out-generated.jsonl")]
    questions = [row["messages"][0]["content"] for row in [*(GOLD if ask == "all" else []), *PROMPTS]]
    assert asked == questions
    old, new = (yaml.safe_load(Path(name).read_text()) for name in ("recipe.yaml", "next.yaml"))
    made = {"path": "out-generated.jsonl", "type": "chat_template", "train_on_eos": "last"}
    assert new["datasets"] == [old["datasets"][0], made]
    assert new["dskd"] == old["dskd"] and new["plugins"] == old["plugins"]


RECIPES = {
    "generated rows": (["--recipe-rows", "generated"], ["out-generated.jsonl"], True, "out-distilled"),
    "plain": (["--plain-recipe"], ["gold.jsonl", "out-generated.jsonl"], False, "out-seqkd"),
    "a limit before the prompts": (
        ["--limit", "2"],
        ["gold.jsonl", "prompts.jsonl", "out-generated.jsonl"],
        True,
        "out-distilled",
    ),
    "plain, generated rows": (
        ["--plain-recipe", "--recipe-rows", "generated"],
        ["out-generated.jsonl"],
        False,
        "out-seqkd",
    ),
}


@pytest.mark.parametrize("case", RECIPES)
def test_what_the_written_recipe_holds(case, gold_and_prompts):
    options, paths, distils, folder = RECIPES[case]
    run(gold_and_prompts, *options, *SETTINGS["greedy"], "--keep-unfinished", "--write-recipe", "next.yaml")
    new = yaml.safe_load(Path("next.yaml").read_text())
    assert [one["path"] for one in new["datasets"]] == paths
    assert ("dskd" in new) == ("plugins" in new) == distils
    assert new["output_dir"] == folder


def test_the_limit_counts_the_rows_that_are_asked(gold_and_prompts):
    run(gold_and_prompts, "--ask", "unanswered", "--limit", 3, *SETTINGS["greedy"], "--keep-unfinished")
    asked = [row["messages"][0]["content"] for row in lines("out-generated.jsonl")]
    assert asked == [row["messages"][0]["content"] for row in PROMPTS[:3]]


@pytest.mark.parametrize("method", ["sft", "kd", "dskd"])
def test_every_method_and_a_training_setup_of_another_machine(method, written, tiny):
    """One process generates, whatever the recipe trains with."""
    teacher = {"model": tiny["sibling"], "dtype": "float32"}
    Path("zero.json").write_text(json.dumps({"zero_optimization": {"stage": 2}}))
    changes = {"bf16": True, "deepspeed": "zero.json"}
    Path("out").mkdir()
    Path("out/debug.log").write_text("log of a training run")
    output = run(
        written(changes, {"teacher": teacher, "method": method}), *SETTINGS["greedy"], "--limit", 2, "--keep-unfinished"
    )
    assert "answers written" in output
    assert Path("out/debug.log").read_text() == "log of a training run"
    assert os.listdir("out") == ["debug.log"]


# -- refused -------------------------------------------------------------------------------------------------


def edited(**changes):
    def make(written, teacher):
        return [written(changes)]

    return make


def base_teacher(written, teacher):
    folder = Path(shutil.copytree(teacher, "base"))
    (folder / "chat_template.jinja").unlink()
    return [written(block={"teacher": {"model": str(folder)}})]


def raw(text):
    def make(written, teacher):
        Path("raw.yaml").write_text(text)
        return ["raw.yaml"]

    return make


def with_options(*options):
    return lambda written, teacher: [written(), *options]


def below_a_file(written, teacher):
    Path("file").write_text("")
    return [written(), "--out", "file/data.jsonl"]


def torn_recipe(written, teacher):
    return [written(drop=["dskd"])]


REFUSED = {
    "no yaml": (raw("a: [1"), ["raw.yaml: expected an Axolotl recipe in YAML"]),
    "a list": (raw("- a"), ["raw.yaml: expected an Axolotl recipe, got list"]),
    "no block": (torn_recipe, ["expected a `dskd:` block that names the teacher, got none", "Add at least"]),
    "no datasets": (lambda w, t: [w(drop=["datasets"])], ["expected `datasets` with the prompts, got none"]),
    "plugin not listed": (edited(plugins=[]), ["plugins: expected 'dskd' in the list"]),
    "unknown setting": (lambda w, t: [w(block={"methd": "sft"})], ["dskd.methd", "Did you mean 'method'?"]),
    "refused by axolotl": (edited(micro_batch_size="many"), ["recipe.yaml: expected a recipe that Axolotl accepts"]),
    "missing student": (edited(base_model="./nowhere"), ["base_model: expected a model folder or a hub id"]),
    "missing teacher": (
        lambda w, t: [w(block={"teacher": {"model": "./nowhere"}})],
        ["dskd.teacher.model: expected a model folder or a hub id", "./nowhere", "Check the path."],
    ),
    "base teacher": (base_teacher, ["dskd.teacher.chat_template: expected a teacher with a chat template"]),
    "missing data": (
        lambda w, t: [w(entry("nowhere.jsonl"))],
        ["datasets[0].path: expected a file, a folder or a hub id, got 'nowhere.jsonl'"],
    ),
    "completion": (
        lambda w, t: [w(entry(data_of([{"text": ASK}]), type="completion"))],
        ["datasets: data.jsonl: expected type chat_template or an alpaca type", "'completion'"],
    ),
    "custom type": (
        lambda w, t: [
            w(
                entry(
                    data_of([{"instruction": ASK, "output": TOLD}]),
                    type={"field_instruction": "instruction", "field_output": "output", "format": "Say: {instruction}"},
                )
            )
        ],
        ["datasets: data.jsonl: expected type chat_template or an alpaca type", "a custom type"],
    ),
    "wrong field": (
        lambda w, t: [w(entry(data_of([{"talk": chat(ASK)}])))],
        ["datasets: data.jsonl, row 0: expected a conversation", "field_messages"],
    ),
    "no question": (
        lambda w, t: [w(entry(data_of([{"messages": [SYSTEM]}])))],
        ["datasets: expected conversations with a user turn to answer, got none in 1 rows"],
    ),
    "too long": (
        with_options("--max-new-tokens", "500"),
        ["--max-new-tokens 500 in the 512 positions of the teacher", "Lower --max-new-tokens"],
    ),
    "all too long": (
        with_options("--max-new-tokens", "511", "--skip-long"),
        ["--skip-long: expected some prompt", "Lower --max-new-tokens"],
    ),
    "all answered": (
        with_options("--ask", "unanswered"),
        ["--ask unanswered: expected rows without an answer, got one in each of 48 rows", "Add a dataset of prompts"],
    ),
    "below a file": (below_a_file, ["file/data.jsonl: expected a folder to write to, got a file"]),
    "own rows as target": (
        lambda w, t: [w(entry(data_of([{"messages": chat(ASK)}]))), "--out", "data.jsonl", "--overwrite"],
        ["data.jsonl: expected a file that the recipe does not read, got a data set of the recipe"],
    ),
    "recipe as target": (with_options("--out", "recipe.yaml"), ["expected a file that the recipe does not read"]),
    "unknown device": (with_options("--device", "cuda:99"), ["--device: expected auto or a device", "'cuda:99'"]),
    "nothing finished": (
        lambda w, t: [w(entry(data_of([{"messages": chat(ASK)}]))), "--max-new-tokens", "1"],
        ["expected some whole answer, got 1 cut at the limit, 0 empty ones and 0 of reasoning alone"],
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_ends_with_a_message(case, written, teacher):
    make, expected = REFUSED[case]
    output = run(*make(written, teacher), code=1)
    for text in expected:
        assert text in " ".join(output.split()), output
    assert not Path("out-generated.jsonl").exists()


@pytest.mark.parametrize(
    "options",
    [
        ["nowhere.yaml"],
        ["recipe.yaml", "--top-p", "0.9"],
        ["recipe.yaml", "--seed", "1"],
        ["recipe.yaml", "--temperature", "-1"],
        ["recipe.yaml", "--max-new-tokens", "0"],
        ["recipe.yaml", "--recipe-rows", "both"],
        ["recipe.yaml", "--plain-recipe"],
        ["recipe.yaml", "--ask", "none"],
    ],
)
def test_wrong_usage_is_exit_code_2(options, written):
    written()
    assert "Error" in run(*options, code=2)


def test_long_prompts_are_left_out_when_asked(written):
    rows = [{"messages": chat(ASK, TOLD)}, {"messages": chat("red " * 400, TOLD)}]
    output = run(
        written(entry(data_of(rows))), *SETTINGS["greedy"], "--keep-unfinished", "--skip-long", "--max-new-tokens", 400
    )
    assert "1 rows without a turn to answer or too long" in output
    assert [row["messages"][0]["content"] for row in lines("out-generated.jsonl")] == [ASK]


def test_help_and_module_entry():
    command = [sys.executable, "-m", "dskd_plugin.cli", "generate", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "Usage: dskd generate [OPTIONS] RECIPE" in done.stdout
    loaded = "import sys, dskd_plugin.cli; print({'torch', 'transformers', 'axolotl'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "set()"
