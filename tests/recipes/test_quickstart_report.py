"""The quickstart's commands, scores and page, on small models and numbers made here."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.nn.functional import log_softmax
from transformers import AutoModelForCausalLM, AutoTokenizer

from quickstart import compare, curves, forked, models, page, report, rows
from quickstart.commands import Commands, program
from quickstart.measure import Answered, measure
from quickstart.pipeline import Done, Tried
from quickstart.recipes import best_of, log_of, mean_of
from quickstart.stages import Cost, stage

SMALL = {"train": 126, "validation": 14, "heldout": 14, "prompts": 28, "prose": 280}
COUNTS = {"gold": 84, "gold_all": 504, "prompts": 490, "validation": 112, "heldout": 168}
NAMES = ("student", "sft", "seqkd", "dskd", "sft_all", "teacher")


# -- commands ------------------------------------------------------------------------------------------------


@pytest.fixture
def commands(tmp_path: Path) -> Commands:
    return Commands(tmp_path, seed=1, offline=True)


def python(text: str) -> list[str]:
    return [sys.executable, "-c", text]


def test_a_command_tells_its_own_cpu_time(commands: Commands, tmp_path: Path) -> None:
    busy = "import time\nwhile time.process_time() < 0.7: pass"
    idle = "import time\ntime.sleep(0.7)"
    spent = {}
    for name, text in (("busy", busy), ("idle", idle)):
        spent[name] = commands.run(python(text), tmp_path / f"{name}.log", title=name, threads=1)
    assert 0.6 < spent["busy"] < 3
    assert spent["idle"] < spent["busy"] - 0.3


IN_A_CHILD = """
import os, sys
from pathlib import Path
from quickstart import forked
from quickstart.commands import Commands

if __name__ == "__main__":
    out = Path(sys.argv[1])
    commands = Commands(out, seed=1, offline=True)
    if sys.argv[2] == "prepared":
        forked.MODULES = ("torch",)
        forked.prepare(commands.environment)
    print(commands.run([f"{Path(sys.executable).parent}/dskd", *sys.argv[3:]], out / "a.log", title="a", threads=2))
"""


@pytest.mark.skipif(forked.script("dskd") is None, reason="processes are not forked on this system")
@pytest.mark.parametrize("start", ["prepared", "cold"])
def test_a_forked_command_is_the_installed_one(tmp_path: Path, start: str) -> None:
    """Its output is in the log, its CPU time is told, its failure is told with the end of the log."""
    (tmp_path / "run.py").write_text(IN_A_CHILD, encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    words = [sys.executable, str(tmp_path / "run.py"), str(tmp_path), start]

    def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run([*words, *arguments], env=environment, capture_output=True, text=True)

    good = run("generate", "--help")
    assert good.returncode == 0, good.stderr
    assert float(good.stdout) > 0
    assert "--write-recipe" in (tmp_path / "a.log").read_text(encoding="utf-8")
    bad = run("generate", "no-such-recipe.yaml")
    assert bad.returncode == 1
    assert re.search(r"dskd generate no-such-recipe\.yaml: expected exit code 0, got [12]\.", bad.stderr), bad.stderr
    assert "no-such-recipe.yaml" in (tmp_path / "a.log").read_text(encoding="utf-8")


TRAINING = """
import time
from tqdm import tqdm
for _ in tqdm(range(5), desc='Loading weights'): pass
for step in tqdm(range(40), mininterval=0):
    time.sleep(0.06)
    if step == 20:
        for _ in tqdm(range(7), mininterval=0): pass
"""
ANSWERS = """
import time
from tqdm import tqdm
from dskd_plugin.cli import progress
for _ in tqdm(range(5), desc='Reading prompts'): pass
progress.PAUSE = {False: 0}
with progress.Progress(40, [], 3) as bar:
    for answer in range(40):
        time.sleep(0.06)
        bar.told(3, 1)
"""


@pytest.mark.parametrize("text", [TRAINING, ANSWERS])
def test_the_bar_follows_the_steps_of_the_log(tmp_path: Path, text: str) -> None:
    """Loading comes first, an evaluation of another length comes between: the bar shows the training alone.

    In a process of its own: tqdm reads TQDM_DISABLE when it is imported, and other tests set it.
    """
    command = (
        "import sys\nfrom pathlib import Path\nfrom quickstart.commands import Commands\n"
        "out = Path(sys.argv[1])\n"
        "words = [sys.executable, '-c', sys.argv[2]]\n"
        "Commands(out, seed=1, offline=True).run(words, out / 'bar.log', title='Training', threads=1)\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "TQDM_DISABLE"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    words = [*python(command), str(tmp_path), text]
    ended = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
    shown = ended.stderr.replace("\r", "\n")
    totals = {int(total) for total in re.findall(r"Training: +\d+%.*\| *\d+/(\d+),", shown)}
    assert totals == {40}, shown
    assert "Training: starting" in shown


def test_a_failed_command_says_where_to_look(commands: Commands, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"expected exit code 0, got 3\. Read .*bad\.log; it ends with:\nthe reason"):
        commands.run(
            python("import sys; print('the reason'); sys.exit(3)"), tmp_path / "bad.log", title="bad", threads=1
        )


def test_a_failure_ends_the_command_beside_it(commands: Commands, tmp_path: Path) -> None:
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs two cores: with one, commands run one after the other")
    started = time.monotonic()

    def fails() -> float:
        return commands.run(python("import sys; sys.exit(3)"), tmp_path / "a.log", title="a", threads=1)

    def waits() -> float:
        return commands.run(python("import time; time.sleep(60)"), tmp_path / "b.log", title="b", threads=1)

    with pytest.raises(RuntimeError, match="got 3"):
        commands.side_by_side(waits, fails)
    assert time.monotonic() - started < 30


def test_results_come_in_the_order_of_the_jobs(commands: Commands) -> None:
    assert commands.side_by_side(lambda: time.sleep(0.2) or "first", lambda: "second") == ["first", "second"]


def test_a_stopped_quickstart_leaves_no_process(tmp_path: Path) -> None:
    """SIGTERM to the Python that runs a command ends that command too."""
    text = (
        "import signal, sys\nfrom pathlib import Path\nfrom quickstart.commands import Commands\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n"
        f"commands = Commands(Path({str(tmp_path)!r}), seed=1, offline=True)\n"
        "work = 'import os, time; print(os.getpid(), flush=True); time.sleep(120)'\n"
        f"log = Path({str(tmp_path / 'work.log')!r})\n"
        "commands.side_by_side(lambda: commands.run([sys.executable, '-c', work], log, title='w', threads=1))\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(python(text), env=environment) as outer:
        log, deadline = tmp_path / "work.log", time.monotonic() + 60
        while not (log.exists() and log.read_text().strip()) and time.monotonic() < deadline:
            time.sleep(0.2)
        inner = int(log.read_text().split()[0])
        outer.send_signal(signal.SIGTERM)
        assert outer.wait(timeout=30) == 143
    with pytest.raises(ProcessLookupError):
        os.kill(inner, 0)


def test_a_missing_program_is_named() -> None:
    with pytest.raises(ValueError, match="no-such-program: expected the command beside"):
        program("no-such-program")


# -- stages --------------------------------------------------------------------------------------------------


def test_a_stage_is_done_once_for_its_inputs(tmp_path: Path) -> None:
    calls = []

    def build(to: Path) -> float:
        calls.append(to)
        (to / "made").write_text(str(len(calls)))
        return 12.5

    first = stage(tmp_path / "model", "Model", "key", build)
    again = stage(tmp_path / "model", "Model", "key", build)
    assert len(calls) == 1 and again == first and first.cpu_seconds == 12.5
    stage(tmp_path / "model", "Model", "another key", build)
    assert (tmp_path / "model" / "made").read_text() == "2"
    assert {to.name for to in calls} == {"model"} and [one.name for one in tmp_path.iterdir()] == ["model"]


def test_a_failed_stage_leaves_no_finished_folder(tmp_path: Path) -> None:
    def build(to: Path) -> float:
        raise RuntimeError("broke")

    with pytest.raises(RuntimeError, match="broke"):
        stage(tmp_path / "model", "Model", "key", build)
    assert not (tmp_path / "model").exists()
    assert stage(tmp_path / "model", "Model", "key", lambda to: None).cpu_seconds == 0


# -- student and scores --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("small")
    rows.write(out / "data", seed=3, sizes=SMALL)
    models.create_student(models.read_texts(out / "data"), out / "student", seed=3)
    return out


def test_the_student_ties_its_embeddings_and_has_its_own_tokenizer(small: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(small / "student")
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    tokenizer = AutoTokenizer.from_pretrained(small / "student")
    assert tokenizer.decode(tokenizer("Ada Marsh: 12").input_ids) == "Ada Marsh: 12"


def test_the_tokenizer_sees_no_held_out_question(small: Path) -> None:
    heldout = {row["messages"][1]["content"] for row in rows.read(small / "data" / "heldout.jsonl")}
    assert not heldout & set(models.read_texts(small / "data"))


def test_measured_bits_are_those_of_the_whole_distribution(small: Path) -> None:
    """Every row by itself, all logits, summed here; replies are the model's own greedy text."""
    file = small / "data" / "heldout.jsonl"
    answered = measure(small / "student", file, title="held-out", limit=4)
    tokenizer = AutoTokenizer.from_pretrained(small / "student")
    model = AutoModelForCausalLM.from_pretrained(small / "student").eval()
    assert len(answered) == 4
    for one, row in zip(answered, rows.read(file), strict=False):
        prompt = tokenizer.apply_chat_template(row["messages"][:-1], tokenize=False, add_generation_prompt=True)
        before = tokenizer(prompt, add_special_tokens=False).input_ids
        answer = tokenizer(row["messages"][-1]["content"], add_special_tokens=False).input_ids
        with torch.no_grad():
            logits = model(torch.tensor([before + answer])).logits[0].double()
        chosen = log_softmax(logits, -1)[torch.arange(len(before) - 1, len(before + answer) - 1), answer]
        assert one.bits == pytest.approx(float(-chosen.sum()) / math.log(2), rel=1e-4)
        assert one.bytes == len(row["messages"][-1]["content"].encode())
        assert one.right is (one.reply.split() == one.gold.split())


def made(bits_per_byte: list[float], right: list[bool]) -> list[Answered]:
    found = []
    for at, (bits, hit) in enumerate(zip(bits_per_byte, right, strict=True)):
        kind = ("home", "job", "gain", "loss", "price", "convert")[at % 6]
        found.append(Answered(f"question {at}", "gold", kind, 10 * bits, 10, "gold" if hit else "<wrong>", hit))
    return found


def level(bits: float, share: float, *, n: int = 60) -> list[Answered]:
    return made([bits + 0.05 * math.sin(at) for at in range(n)], [at < share * n for at in range(n)])


def test_score_and_difference() -> None:
    worse, better = level(0.4, 0.1), level(0.3, 0.3)
    score = compare.score(worse)
    assert score["bits_per_byte"]["low"] < score["bits_per_byte"]["value"] < score["bits_per_byte"]["high"]
    assert score["exact_match"]["value"] == pytest.approx(0.1)
    assert set(score["by_kind"]) == {"home", "job", "gain", "loss", "price", "convert"}
    found = compare.difference(better, worse)
    assert found["bits_per_byte"] == pytest.approx(-0.1, abs=1e-12)
    # Both have the same noise per question, which pairing takes out.
    assert found["low"] == pytest.approx(-0.1, abs=1e-9) and found["high"] == pytest.approx(-0.1, abs=1e-9)
    assert found["exact_match"]["value"] == pytest.approx(0.2)
    back = compare.difference(worse, better)
    assert back["bits_per_byte"] == pytest.approx(-found["bits_per_byte"])


def test_other_questions_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match="expected the same questions"):
        compare.difference(level(0.3, 0.1), level(0.3, 0.1)[::-1])


def differences(dskd: float, sft: float, seqkd: float, sft_all: float) -> dict[str, dict]:
    against = {"best_sft": sft, "seqkd": seqkd, "sft_all": sft_all}
    return {
        f"dskd_minus_{name}": compare.difference(level(dskd, 0.2), level(bits, 0.1)) for name, bits in against.items()
    }


def write_lines(file: Path, found: list[dict]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")


def test_results_hold_all_that_was_measured(tmp_path: Path) -> None:
    """In the folder of a finished run: scores, differences, costs, the search, counts, sentences and the curves."""
    asked = [{"role": "user", "content": "Q?"}, {"role": "assistant", "content": "gold"}]
    (tmp_path / "data").mkdir()
    (tmp_path / "answers").mkdir()
    for number, file in enumerate((*COUNTS, "prompts_key"), start=1):
        write_lines(tmp_path / "data" / f"{file}.jsonl", [{"messages": asked}] * number)
    write_lines(tmp_path / "answers" / "rows.jsonl", [{"messages": asked}])
    folders = ("sft-1e-3", "sft_all", "seqkd", "dskd")
    for folder in folders:
        (tmp_path / folder / "checkpoint-2").mkdir(parents=True)
        logged = [{"step": step, "loss": 2.0 / step, "dskd/align_ratio": 0.5} for step in (1, 2)]
        state = json.dumps({"log_history": logged})
        (tmp_path / folder / "checkpoint-2" / "trainer_state.json").write_text(state)
    costs = {name: Cost(2.0, 1.0) for name in (*folders, "teacher-tuned", "student", "answers")}
    answered = {name: level(0.4 - 0.02 * at, 0.1) for at, name in enumerate(NAMES)}
    done = Done(costs, [Tried("sft-1e-3", 1e-3, 7, 0.5)], answered)
    results = json.loads(json.dumps(report.collect(tmp_path, done, teacher="t", seed=3)))
    difference = results["difference"]["dskd_minus_best_sft"]
    assert difference["bits_per_byte"] == pytest.approx(-0.04) and difference["low"] <= difference["high"] < 0
    assert set(results["models"]) == set(NAMES) and len(results["models"]["dskd"]["answers"]) == 60
    assert results["costs"]["dskd"] == {"seconds": 2.0, "cpu_seconds": 1.0}
    assert results["search"][0]["step"] == 7 and results["rows"]["gold"] == 1 and results["seed"] == 3
    assert results["teacher_answers"] == {"written": 1, "right": 1}
    assert "0.040 bits per byte fewer" in results["verdict"] and "no contradiction" in results["more_labels"]
    assert set(results["curves"]) == {"sft", "sft_all", "seqkd", "dskd"}
    assert [entry["loss"] for entry in results["curves"]["dskd"]] == [2.0, 1.0]


@pytest.mark.parametrize(
    ("sft", "words"),
    [
        (0.4, "needs 0.100 bits per byte fewer than the best student trained on these gold answers alone"),
        (0.2, "needs 0.100 bits per byte more than the best student trained on these gold answers alone"),
        (0.3, "cannot be told apart from the best student trained on these gold answers alone"),
    ],
)
def test_the_sentence_says_what_the_numbers_say(sft: float, words: str) -> None:
    text = compare.sentence(differences(0.3, sft, 0.35, 0.25), COUNTS)
    assert words in text and "84 gold answers and 490 questions" in text
    assert "10.0 points more of the questions" in text


@pytest.mark.parametrize(
    ("sft_all", "words"), [(0.25, "is better than"), (0.35, "is still behind"), (0.3, "cannot be told apart from")]
)
def test_more_labels_are_named_whatever_they_bring(sft_all: float, words: str) -> None:
    text = compare.more_labels(differences(0.3, 0.4, 0.35, sft_all), COUNTS)
    assert f"trained on 504 gold answers, 6 times as many, {words} the distilled one" in text


# -- logs, curves, page --------------------------------------------------------------------------------------


def test_logs_of_the_last_checkpoint_and_the_best_step(tmp_path: Path) -> None:
    for step, best in ((11, 11), (132, 44)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        state = {"log_history": [{"step": step, "loss": 1.0}], "best_global_step": best, "best_metric": 0.5}
        (folder / "trainer_state.json").write_text(json.dumps(state))
    assert log_of(tmp_path) == [{"step": 132, "loss": 1.0}]
    assert best_of(tmp_path) == (44, 0.5)
    assert mean_of(log_of(tmp_path), "loss") == 1.0
    with pytest.raises(ValueError, match="expected 'dskd/align_ratio', got none"):
        mean_of(log_of(tmp_path), "dskd/align_ratio")
    with pytest.raises(ValueError, match="expected a checkpoint with trainer_state"):
        log_of(tmp_path / "checkpoint-11")


@pytest.fixture(scope="module")
def results() -> dict:
    answered = {name: level(0.3 + 0.02 * at, 0.1 * at) for at, name in enumerate(NAMES)}
    found = differences(0.3, 0.4, 0.35, 0.25)
    shown = {}
    for name in NAMES:
        shown[name] = {"short": name, "title": f"title of {name} <b>", "cpu_seconds": Cost(3, 4).cpu_seconds}
        shown[name] |= compare.score(answered[name])
    return {
        "teacher": "SmolLM2",
        "seed": 1,
        "verdict": compare.sentence(found, COUNTS),
        "more_labels": compare.more_labels(found, COUNTS),
        "rows": COUNTS,
        "difference": found,
        "models": shown,
        "search": [{"learning_rate": 0.001, "step": 44}],
        "teacher_answers": {"written": 1000, "right": 420},
        "shared_costs": "Shared.",
        "seconds": 600.0,
        "peak_rss_gib": 2.0,
    }


@pytest.fixture(scope="module")
def picture() -> str:
    ramp = [{"step": at, "loss": 1 / at, "dskd/ce": 1 / at, "dskd/t2s_kd": 2 / at} for at in range(1, 30)]
    ramp += [{"step": 10 * at, "eval_loss": 0.5} for at in range(1, 3)]
    ramp += [{"step": at, "dskd/t2s_agreement": 0.9} for at in range(1, 30)]
    return curves.draw({name: ramp for name in ("sft", "sft_all", "seqkd", "dskd")})


def test_the_curves_are_one_svg_element(picture: str) -> None:
    assert picture.startswith("<svg") and picture.rstrip().endswith("</svg>")


def test_the_page_needs_no_other_file(results: dict, picture: str) -> None:
    text = page.render(results, picture)
    assert not re.search(r"""(?:src|href)=["'](?!#)""", text.replace("xlink:href", "href"))
    assert "@import" not in text and "url(http" not in text
    assert results["verdict"] in text.replace("&#39;", "'").replace("&lt;", "<")
    assert "title of dskd &lt;b&gt;" in text and "<b>" not in text


def test_the_table_has_all_models_with_intervals(results: dict) -> None:
    text = page.as_text(page.table(results))
    assert len(text.splitlines()) == 1 + len(NAMES)
    for name in NAMES:
        line = next(line for line in text.splitlines() if line.startswith(f"title of {name} "))
        assert len(re.findall(r"\([\d.%]+ to [\d.%]+\)", line)) == 2 and line.endswith("4 s")


def test_shown_answers_are_chosen_by_position(results: dict) -> None:
    shown = page.answered(results)
    assert [one["question"] for one in shown] == ["question 0", "question 3"]
    for one in shown:
        assert len(one["replies"]) == len(page.SHOWN)
