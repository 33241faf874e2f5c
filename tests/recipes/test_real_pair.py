"""The benchmark on a real pair: its table, its measures, and one whole command on tiny models."""

import gzip
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.real_pair import data, easy, measures, records, report, runs, table
from benchmarks.real_pair.__main__ import chosen, parse
from benchmarks.real_pair.table import BASE, Run
from dskd_plugin.settings import parse_settings

ROOT = Path(__file__).parents[2]
MODELS = ["--teacher", "t", "--student", "s", "--data", "d"]


# -- the table ---------------------------------------------------------------------------------------------------------


def test_no_run_is_planned_twice_and_the_untrained_student_comes_before_its_first():
    planned = table.planned()
    assert len(planned) == len(set(planned)) == len({run.name for run in planned})
    for run in planned:
        base = Run(run.pair, run.data, BASE, 0.0, 0, 0)
        assert planned.index(base) <= planned.index(run)
    seeds = {(r.setting, r.rate, r.steps, r.seed) for r in planned if (r.pair, r.data) == ("turned", "gsm8k")}
    wanted = {(s, r, n, k) for s in table.SETTINGS for r in table.RATES for n in table.STEPS for k in table.SEEDS}
    assert wanted <= seeds


def test_every_setting_is_a_block_that_the_plugin_takes_or_lacks_a_setting_for():
    missing = set()
    for name in table.SETTINGS:
        made = table.accepted(table.block(name, "few"))
        if made is None:
            missing.add(name)
            continue
        parse_settings({"teacher": {"model": "t"}, **made})
        assert ("kd_ratio" in made) == (made.get("method") != "sft")
    # These need nothing that the plugin has not always had.
    assert not missing & {"sft", "seqkd", "overlap_kd_ids", "dskd_default", "dskd_projected", "dskd_projected_random"}


def test_a_setting_that_the_plugin_lacks_is_left_out_only_where_nothing_else_could_happen():
    assert table.accepted({"method": "overlap_kd", "made_up": 1}) is None
    from dskd_plugin.settings import Settings

    for key, value in table.IMPLIED.items():
        made = table.accepted({key: value})
        assert made == ({key: value} if key in Settings.model_fields else {})


def test_a_run_of_old_defaults_is_made_again_and_one_that_the_change_does_not_touch_is_kept():
    old = {"method": "dskd", "kd_ratio": 0.5, "projector": {"init": "ideal"}}
    new = {"method": "dskd", "kd_ratio": 0.5, "projector": {"init": "ideal", "fit_rows": 9}}
    assert table.same_behaviour(old, new | {"target": "projected", "shared": "events"})
    assert not table.same_behaviour(old, new | {"target": "exact", "shared": "ids"})
    assert not table.same_behaviour(old, new | {"target": "projected", "projector": {"init": "random"}})
    overlap = {"method": "overlap_kd", "kd_ratio": 0.5}
    assert table.same_behaviour(overlap, overlap | {"target": "exact", "shared": "ids"})
    assert not table.same_behaviour(overlap, overlap | {"target": "exact", "shared": "events"})
    assert table.same_behaviour({"method": "sft"}, {"method": "sft", "target": "exact", "shared": "events"})
    assert table.same_behaviour({"method": "sft", "unpaired": "share"}, {"method": "sft", "unpaired": "auto"})
    assert not table.same_behaviour(overlap, overlap | {"unpaired": "auto"})
    for name in table.SETTINGS:
        made = table.accepted(table.block(name, "mbpp"))
        assert made is None or table.same_behaviour(table.resolved(made), table.resolved(made))


def test_options_choose_runs_and_words_that_are_none_are_refused(capsys):
    options = parse([*MODELS, "--settings", "base", "sft", "--data-sets", "mbpp", "--pairs", "forward", "--seeds", "2"])
    found = chosen(options)
    assert {(run.setting, run.seed) for run in found} == {("base", 0), ("sft", 2)}
    assert {(run.rate, run.steps) for run in found if run.setting == "sft"} == {
        (rate, steps) for rate in table.RATES for steps in table.STEPS
    }
    with pytest.raises(SystemExit):
        parse([*MODELS, "rnus"])
    assert "got rnus" in capsys.readouterr().err


# -- measures ----------------------------------------------------------------------------------------------------------

CODE = "def f(x):\n    y = x + 1\n    if y:\n        y = 2\n    return y"


def test_the_comment_stands_before_the_last_statement_with_its_indentation():
    head, tail = measures.commented(CODE)
    assert head.endswith(f"        y = 2\n    {measures.COMMENT}") and tail == "\n    return y"
    compile(head + tail, "made", "exec")
    assert measures.commented("def f(x):\n    return x") is None
    assert measures.commented("x = 1\ny = 2") is None
    assert measures.commented("def f(x:") is None


@pytest.mark.parametrize(
    ("reply", "lost"),
    [
        (f"Here:\n```python\n{CODE}\n```\nDone.", False),
        ("```python\ndef f(x):\n    # why\nreturn x\n```", True),
        ("def f(x):\nreturn x", True),
        ("def f(x):\n    y = x\n    # why\nreturn y", True),
        ("```python\ndef f(x):\n```", False),
        ("```python\ndef f(x):\n    return (x\n", False),
        ("```python\ndef f(x):\n    y = 1\n      return y\n```", False),
        ("No code at all.", False),
    ],
)
def test_a_lost_indentation_is_told_from_other_errors_and_from_a_cut(reply, lost):
    assert measures.lost_indentation(reply) is lost


def test_the_worst_window_is_that_of_the_means():
    one, other = [1.0, 1.0, 1.0, 4.0, 1.0, 1.0, 1.0], [1.0] * 7
    assert report.worst_window(one, other, 5) == pytest.approx((1.6, 0.6))
    assert report.worst_window(one[:2], other[:2], 5) == pytest.approx((1.0, 0.0))


def test_programs_are_compared_over_the_seeds_and_sets_that_both_have():
    def run(seed, easy, mbpp=()):
        return {"seed": seed, "easy": {"passed": list(easy)}} | ({"mbpp": {"passed": list(mbpp)}} if mbpp else {})

    one, other = [run(1, [1, 1], [1, 0]), run(2, [1, 1])], [run(1, [0, 1], [0, 0]), run(3, [0, 0])]
    found = report.solved(one, other)
    assert found.value == pytest.approx(0.5) and found.low <= 0.5 <= found.high
    assert report.more(found).startswith("+50.0 [")
    assert report.solved([run(1, [1])], other) is None and report.more(None) == ""
    assert report.solved([{"easy": {"passed": [1]}}], one) is None
    # A set that one of them was not asked has no part, whatever its size.
    other_set = {"seed": 1, "easy": {"passed": [1, 1]}, "humaneval": {"passed": [0, 0]}}
    assert report.solved([other_set], other[:1]).value == pytest.approx(0.5)
    assert report.solved([{"seed": 1, "humaneval": {"passed": [1, 1]}}], [run(1, [0, 0])]) is None


def test_few_gold_rows_stand_beside_the_best_fine_tuning_on_them():
    """Shown first, of the length that is best on the held-out rows; SFT on the answers has its own name there."""

    def run(data, setting, steps, bits, passed):
        made = {"kind": "run", "pair": "forward", "data": data, "setting": setting, "rate": 5e-5, "steps": steps}
        made |= {"seed": 1, "seconds": {"cpu": 1.0}, "curve": {"dskd/ce": [1.0]}}
        return made | {"heldout": {"gold_bits": bits}, "mbpp": {"passed": passed, "lost": [0, 0]}}

    records = [{"kind": "documents", "data": "few", "gold_bytes": [10, 10]}]
    lengths = {15: [9.0, 9.0], 30: [4.0, 6.0], 60: [7.0, 8.0]}
    records += [run("few_gold", "sft", steps, bits, [0, 0]) for steps, bits in lengths.items()]
    records += [run("few", "sft", 170, [4.0, 4.0], [0, 1]), run("few", "dskd_default", 170, [3.0, 3.0], [1, 1])]
    found = report.Runs(records)
    key = ("forward", "few", 5e-5, 170)
    assert [made["steps"] for made in found.best_gold(key)] == [30]
    lines = report.table(found, key).splitlines()[2:]
    assert [line.split("|")[1].strip() for line in lines] == [
        "SFT on the gold rows alone, best: 30 steps",
        "SFT on the same rows (SeqKD)",
        "DSKD, defaults",
    ]
    assert [line.split("|")[3].strip() for line in lines] == ["0.500", "0.400", "0.300"]
    assert "-0.100" in lines[2] and "+0.100" in lines[0]
    head, *rows = ([cell.strip() for cell in line.split("|")] for line in report.table(found, key).splitlines())
    to_sft, to_gold = (head.index(f"programs to {title}, %") for title in ("SFT", "SFT on the gold rows"))
    assert [row[to_sft].split(" ")[0] for row in rows[1:]] == ["-50.0", "", "+50.0"]
    assert [row[to_gold].split(" ")[0] for row in rows[1:]] == ["", "+50.0", "+100.0"]


def test_programs_stand_beside_those_of_the_untrained_student():
    """Measured once, it is compared with every seed."""
    base = {
        "kind": "run",
        "pair": "forward",
        "data": "mbpp",
        "setting": BASE,
        "easy": {"passed": [0, 1], "lost": [0, 0]},
    }
    made = base | {"setting": "sft", "rate": 5e-5, "steps": 25, "curve": {"dskd/ce": [1.0]}, "seconds": {"cpu": 1.0}}
    runs = [made | {"seed": seed, "easy": {"passed": [1, 1], "lost": [0, 0]}} for seed in (1, 2)]
    found = report.Runs([{"kind": "documents", "data": "mbpp", "gold_bytes": [10]}, base, *runs])
    head, _, *rows = report.table(found, ("forward", "mbpp", 5e-5, 25)).splitlines()
    column = [cell.strip() for cell in head.split("|")].index("programs to untrained, %")
    assert [row.split("|")[column].strip().split(" ")[0] for row in rows] == ["", "+50.0"]


def test_steps_are_compared_on_the_same_rows_alone():
    """Prepared rows keep the order of whoever prepared them first: another one shows at the first step."""

    def run(seed, ce):
        return {"seed": seed, "curve": {"dskd/ce": ce}}

    base = [run(1, [1.0, 1.0]), run(2, [2.0, 2.0])]
    assert report.worst([run(1, [1.001, 1.2]), run(2, [1.5, 9.0])], base) == pytest.approx((1.1005, 0.1005))
    assert report.worst([run(2, [1.5, 9.0]), run(3, [1.0, 1.0])], base) is None


def _newline_tokenizer():
    """Words, and newline with indentation as one token, as SmolLM2's has."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = pre_tokenizers.ByteLevel.alphabet()
    newline, space = "Ċ", "Ġ"
    vocab = {token: i for i, token in enumerate(["<pad>", *sorted(letters)])}
    merges = []
    for width in range(4):
        left = newline + space * width
        vocab[left + space] = len(vocab)
        merges.append((left, space))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\n *"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<pad>")
    fast.chat_template = "{% for m in messages %}{{ m.content }}|{% endfor %}"
    return fast


def test_the_bare_newline_is_the_models_own_probability_after_the_comment(build, tmp_path):
    from transformers import AutoModelForCausalLM

    tokenizer = _newline_tokenizer()
    folder = build.save_model(tmp_path / "model", tokenizer)
    row = data.conversation("made", "Ask", CODE)
    (found,) = measures.bare_newline(Path(folder), [row, data.conversation("made", "Ask", "x = 1")])
    head, _ = measures.commented(CODE)
    ids = tokenizer("Ask|" + head, add_special_tokens=False)["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, -1].tolist()
    (bare,) = [i for i in range(len(tokenizer)) if tokenizer.decode([i]) == "\n"]
    expected = math.exp(logits[bare]) / sum(math.exp(value) for value in logits)
    assert found == pytest.approx(expected, rel=1e-4) and found > 0


def test_a_tokenizer_that_goes_on_with_a_bare_newline_is_asked_nothing(build, tiny):
    row = data.conversation("made", "Ask", CODE)
    assert measures.bare_newline(Path(tiny["student"]), [row]) == []


def test_the_easy_tasks_are_solved_by_their_solutions_and_by_no_other(tmp_path):
    rows = list(easy.tasks())
    assert len(rows) == len({row["name"] for row in rows}) == easy.EACH * len(easy.FAMILIES) == 40
    for row in rows:
        exec(f"{row['solution']}\n{row['tests']}", {})
        wrong = row["solution"].split("return")[0] + "return None"
        with pytest.raises(AssertionError):
            exec(f"{wrong}\n{row['tests']}", {})
    assert rows == list(easy.tasks())


# -- teacher states ----------------------------------------------------------------------------------------------------


class _Settings:
    dtype, quantization, attn_implementation, adapter, revision = "float32", "none", None, None, None

    def __init__(self, model: str) -> None:
        self.model = model


def test_kept_states_are_the_teachers_and_the_decoder_is_asked_once(tiny, tmp_path, monkeypatch):
    from benchmarks.study.states import Folder, Kept
    from dskd_plugin.teachers.live import Teacher

    options = {"vocab_size": 460, "device": torch.device("cpu"), "attn_implementation": "sdpa"}
    teacher = Teacher(_Settings(tiny["teacher"]), **options, packed=False, trust_remote_code=False)
    lengths = torch.tensor([5, 9, 3])
    ids, bins = torch.arange(17) % 400 + 3, torch.tensor([3])
    rows = torch.tensor([0, 4, 7, 16])
    expected = teacher.rows(ids, lengths, bins, rows)
    kept = Kept(teacher, Folder(tmp_path / "states", "the model"))
    fresh = kept.rows(ids, lengths, bins, rows)
    torch.testing.assert_close(fresh, expected)
    calls = []
    monkeypatch.setattr(teacher, "decoder", lambda **inputs: calls.append(inputs))
    assert torch.equal(kept.rows(ids, lengths, bins, rows), fresh)
    # Another batch of known samples in another order.
    again = kept.rows(torch.cat([ids[14:], ids[:5]]), torch.tensor([3, 5]), torch.tensor([2]), torch.tensor([2, 3]))
    assert torch.equal(again, torch.stack([fresh[3], fresh[0]])) and not calls
    assert len(list((tmp_path / "states").iterdir())) == 3


# -- the whole command -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A data folder with the fields of the public sets and text of the project's own."""
    to = tmp_path_factory.mktemp("data")
    tasks = [
        {
            "task_id": number,
            "text": f"red stone {number}",
            "code": f"def f(x):\r\n\ty = x + {number} \r\n\treturn y\r\n",
            "test_list": [f"assert f(0) == {number}"],
        }
        for number in [*range(511, 571), *range(601, 975)]
    ]
    sums = [{"question": f"the river {k}", "answer": f"12 + {k} = <<12+{k}={12 + k}>>{12 + k}"} for k in range(374)]
    for name, rows in (("mbpp/mbpp", tasks), ("gsm8k/train", sums), ("gsm8k/test", sums[:60])):
        (to / name).parent.mkdir(exist_ok=True)
        (to / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (to / "humaneval").mkdir()
    with gzip.open(to / "humaneval" / "HumanEval.jsonl.gz", "wt") as stream:
        stream.write("")
    return to


def test_rows_have_one_form_and_few_rows_are_gold_first(folder, tmp_path):
    data.prepare(folder, tmp_path)
    gold = data.read(tmp_path / "mbpp-gold.jsonl")
    assert len(gold) == 374 and len(data.read(tmp_path / "mbpp-heldout.jsonl")) == 60
    assert gold[0]["messages"][0]["content"].endswith("tests:\nassert f(0) == 601")
    assert gold[0]["messages"][1]["content"] == "def f(x):\n    y = x + 601\n    return y"
    assert "<<" not in (tmp_path / "gsm8k-gold.jsonl").read_text()
    few, prompts = (data.read(tmp_path / f"{name}.jsonl") for name in ("few_gold-gold", "few-prompts"))
    assert (len(few), len(prompts)) == (60, 314)
    # The tests of a task name its number: gold rows and prompts are the two parts of the same tasks.
    for number, row in enumerate([*few, *prompts], start=601):
        assert f"assert f(0) == {number}\n```\n\nAnswer with one" in row["messages"][0]["content"]
    assert few[0]["messages"][1]["content"] == f"```python\n{gold[0]['messages'][1]['content']}\n```"
    answers = [data.conversation("t", row["messages"][0]["content"], "answer") for row in prompts]
    data.write(answers, tmp_path / "generated.jsonl")
    data.few(tmp_path / "few_gold-gold.jsonl", tmp_path / "generated.jsonl", tmp_path / "few.jsonl")
    rows = data.read(tmp_path / "few.jsonl")
    assert rows[:60] == few and len(rows) == 374
    assert {row["messages"][1]["content"] for row in rows[60:]} == {"answer"}
    assert [row["messages"][0] for row in rows[60:]] == [row["messages"][0] for row in prompts]
    with pytest.raises(ValueError, match=r"--data: expected a folder with mbpp/ .* got .*nowhere"):
        data.prepare(tmp_path / "nowhere", tmp_path)


@pytest.mark.more
@pytest.mark.axolotl
def test_the_whole_command_on_tiny_models(tiny, folder, tmp_path):
    """prepare, two trainings of two steps through `axolotl train`, measures, records and page; then nothing is left."""
    file, page = tmp_path / "records.jsonl", tmp_path / "page.md"
    words = ["--teacher", tiny["teacher"], "--student", tiny["student"], "--data", str(folder)]
    words += ["--out", str(tmp_path / "out"), "--records", str(file), "--page", str(page)]
    words += ["--measures", "heldout", "newline"]
    made = small_command(["prepare", "runs", "records", "report", *words])
    assert made.returncode == 0, made.stderr + logs(tmp_path / "out")
    found = {made["setting"]: made for made in records.read(file) if made["kind"] == "run"}
    assert set(found) == {"base", "sft", "dskd_projected"}
    sft, dskd = (found[name]["curve"] for name in ("sft", "dskd_projected"))
    assert sft["step"] == [1.0, 2.0]
    # The same rows and the same student: the first step's cross-entropy is one number.
    assert sft["dskd/ce"][0] == pytest.approx(dskd["dskd/ce"][0], rel=1e-4)
    assert "dskd/t2s_kd" in dskd and "dskd/t2s_kd" not in sft
    bits = {name: np.sum(made["heldout"]["gold_bits"]) for name, made in found.items()}
    assert bits["sft"] < bits["base"] and len(found["sft"]["heldout"]["gold_bits"]) == 60
    assert list((tmp_path / "out" / "states").iterdir()) and not list((tmp_path / "out").glob("runs/*/model"))
    assert "red stone" not in file.read_text() and str(tmp_path) not in file.read_text()
    text = page.read_text()
    assert "| SFT | 1 |" in text and "DSKD, projected" in text and text.count("## MBPP") == 1
    before = (tmp_path / "out" / "runs" / found_name("sft") / "train.json").stat().st_mtime_ns
    again = small_command(["runs", *words])
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "out" / "runs" / found_name("sft") / "train.json").stat().st_mtime_ns == before
    assert "runs 1/" not in again.stdout
    run = Run("forward", "mbpp", "dskd_projected", 5e-5, 2, 1)
    place = runs.Place(tmp_path / "out", folder, {}, ("heldout", "newline"), False)
    assert runs.finished(run, place)
    trained = tmp_path / "out" / "runs" / run.name / "train.json"
    facts = json.loads(trained.read_text())
    facts["settings"]["temperature"] = 2.0
    trained.write_text(json.dumps(facts))
    assert runs.stale(run, place) and not runs.finished(run, place)


@pytest.mark.more
@pytest.mark.axolotl
def test_the_teacher_answers_the_prompts_that_have_no_gold_answer(tiny, folder, tmp_path):
    words = ["--teacher", tiny["teacher"], "--student", tiny["student"], "--data", str(folder)]
    words += ["--out", str(tmp_path / "out"), "--pairs", "forward", "--data-sets", "few"]
    made = small_command(["prepare", "generate", *words])
    assert made.returncode == 0, made.stderr + logs(tmp_path / "out")
    files = sorted(file.name for file in (tmp_path / "out" / "data").glob("*forward.jsonl"))
    assert files == ["few-forward.jsonl", "few-generated-forward.jsonl"]
    rows = data.read(tmp_path / "out" / "data" / "few-forward.jsonl")
    assert rows[:60] == data.read(tmp_path / "out" / "data" / "few_gold-gold.jsonl")
    assert {row["source"] for row in rows[60:]} == {"teacher"}  # an empty answer of the random teacher is left out


def small_command(words: list[str]) -> subprocess.CompletedProcess:
    """The command with one small group for its table, in a process of its own: Axolotl replaces its streams."""
    text = (
        "import sys\nfrom benchmarks.real_pair import runs, table\nfrom benchmarks.real_pair.__main__ import main\n"
        "runs.ANSWER_TOKENS = 4\n"
        "small = table.Group('forward', 'mbpp', ('sft', 'dskd_projected'), 5e-5, 2, (1,))\n"
        "table.GROUPS = (small,)\nsys.exit(main(sys.argv[1:]))\n"
    )
    return subprocess.run([sys.executable, "-c", text, *words], cwd=ROOT, capture_output=True, text=True, check=False)


def found_name(setting: str) -> str:
    return Run("forward", "mbpp", setting, 5e-5, 2, 1).name


def logs(out: Path) -> str:
    return "\n".join(file.read_text()[-3000:] for file in (out / "logs").glob("*.log"))


def test_a_run_without_its_rows_or_setting_says_what_it_lacks(tmp_path, monkeypatch):
    place = runs.Place(tmp_path, tmp_path, {}, measures.MEASURES, False)
    seqkd = Run("forward", "mbpp", "seqkd", 5e-5, 25, 1)
    assert "mbpp-generated-forward.jsonl are not there, see the stage generate" in runs.obstacle(seqkd, place)
    monkeypatch.setitem(table.SETTINGS, "new", table.Setting("new", {"made_up": True}))
    assert "does not know" in runs.obstacle(Run("forward", "mbpp", "new", 5e-5, 25, 1), place)
    assert runs.obstacle(Run("forward", "mbpp", BASE, 0.0, 0, 0), place) is None
    with pytest.raises(ValueError, match=r"--teacher: expected a model folder with a config\.json, got"):
        runs.link_models(tmp_path, tmp_path / "no", tmp_path / "no")


COMMITTED = ROOT / "benchmarks" / "real_pair" / "records" / "real_pair.jsonl"


@pytest.mark.skipif(not COMMITTED.is_file(), reason="no records are committed yet")
def test_the_page_is_that_of_the_records():
    assert report.PAGE.read_text(encoding="utf-8") == report.page(report.Runs(records.read(COMMITTED)))
