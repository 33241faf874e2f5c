"""Tasks: their files, their plans, and what reference and constant answers score."""

from __future__ import annotations

import gzip
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from dskd_eval import data, sandbox, task_checks
from dskd_eval.backends.oracle import OracleBackend
from dskd_eval.errors import UserError
from dskd_eval.lmeval import run_task
from dskd_eval.lmeval.eval_lm import EvalLM
from dskd_eval.tasks import load, planning, render, selection
from dskd_eval.tasks import rows as task_rows
from dskd_eval.tasks.spec import TaskSpec

# Whole sets take minutes; DSKD_EVAL_WHOLE=1 runs them.
LIMIT = None if os.environ.get("DSKD_EVAL_WHOLE") == "1" else 6
SOLVABLE = [name for name in selection.builtin_tasks() if name != "ifeval"]


def score(name: str, directory: Path, *, chat: bool, constant: str | None = None, limit: int | None) -> Any:
    spec = selection.builtin_tasks()[name]
    plan = planning.plan(spec, chat=chat)
    rows = task_rows.load_data(spec, directory)
    task_checks.check_needs(spec, directory)
    box = None
    if spec.executes_code:
        try:
            box = sandbox.choose()
        except UserError as error:
            pytest.skip(error.got)
    return run_task.evaluate_task(EvalLM(OracleBackend(plan, constant=constant)), plan, rows, limit=limit, sandbox=box)


@pytest.mark.parametrize("chat", [False, True], ids=["base", "chat"])
@pytest.mark.parametrize("name", SOLVABLE)
def test_reference_answers_score_100(name: str, chat: bool, data_dir: Path) -> None:
    result = score(name, data_dir, chat=chat, limit=LIMIT)
    primary = selection.builtin_tasks()[name].metrics[0]
    wrong = [sample.doc_id for sample in result.samples if sample.metrics[primary] != 1.0]
    assert not wrong
    assert result.score.metrics[primary].value == 100.0
    assert result.score.n == (LIMIT or result.score.documents)


DOCUMENTS = {
    "dolly": 500, "self_instruct": 242, "vicuna": 80, "s_ni": 1694, "unni": 1050, "ifeval": 541,
    "gsm8k": 1319, "math500": 500, "humaneval": 164, "mbpp": 500,
}  # fmt: skip


@pytest.mark.parametrize("name", DOCUMENTS)
def test_number_of_documents(name: str, data_dir: Path) -> None:
    assert len(task_rows.load_data(selection.builtin_tasks()[name], data_dir).test.rows) == DOCUMENTS[name]


def test_constant_answer_scores_the_floor_of_gsm8k(data_dir: Path) -> None:
    """'#### 20' is right exactly where the solution ends so, counted here without the scorer."""
    lines = (data_dir / "gsm8k" / "test.jsonl").read_text(encoding="utf-8").splitlines()
    share = sum(json.loads(line)["answer"].endswith("#### 20") for line in lines) / len(lines)
    result = score("gsm8k", data_dir, chat=False, constant="#### 20", limit=None)
    assert 0 < share < 0.05
    assert result.score.metrics["flexible"].value == pytest.approx(100 * share, abs=1e-6)
    assert result.score.metrics["strict"].value == pytest.approx(100 * share, abs=1e-6)


def test_constant_answer_scores_the_floor_of_ifeval(data_dir: Path, punkt: None) -> None:
    floor = selection.builtin_tasks()["ifeval"].floor
    result = score("ifeval", data_dir, chat=False, constant=floor["answer"], limit=None)
    assert result.score.metrics["prompt_strict"].value == pytest.approx(floor["prompt_strict"], abs=0.05)


@pytest.mark.parametrize("name", ["math500", "humaneval", "mbpp", "vicuna"])
def test_empty_answers_score_nothing(name: str, data_dir: Path) -> None:
    result = score(name, data_dir, chat=True, constant="", limit=4)
    primary = selection.builtin_tasks()[name].metrics[0]
    assert result.score.metrics[primary].value == 0.0
    assert result.score.answers.empty == 4


@pytest.mark.parametrize("name", SOLVABLE)
def test_prompts_do_not_hold_their_answers(name: str, data_dir: Path) -> None:
    """The last turn of a prompt never contains the whole reference (long references only)."""
    spec = selection.builtin_tasks()[name]
    for chat in (False, True):
        plan = planning.plan(spec, chat=chat, num_fewshot=0)
        rows = task_rows.load_data(spec, data_dir)
        for row in rows.test.rows[:40]:
            reference = render.references(plan.config["doc_to_target"], row)[0]
            if len(reference) > 120:
                assert reference not in render.render(plan.config["doc_to_text"], row)


def test_shots_are_the_same_for_every_subset(data_dir: Path) -> None:
    spec = selection.builtin_tasks()["gsm8k"]
    plan = planning.plan(spec, chat=False)
    rows = task_rows.load_data(spec, data_dir)
    prompts = {}
    for limit in (3, 6):
        result = run_task.evaluate_task(EvalLM(OracleBackend(plan)), plan, rows, limit=limit)
        prompts[limit] = {sample.doc_id: sample.prompt for sample in result.samples}
    assert set(prompts[3]) < set(prompts[6])
    assert all(prompts[6][doc] == prompt for doc, prompt in prompts[3].items())
    assert all(prompt.count("Question:") == 6 for prompt in prompts[6].values())


def test_mbpp_uses_tasks_11_to_510_and_shots_2_to_4(data_dir: Path) -> None:
    rows = task_rows.load_data(selection.builtin_tasks()["mbpp"], data_dir)
    assert [row["task_id"] for row in rows.test.rows] == list(range(11, 511))
    assert [row["task_id"] for row in rows.shots.rows] == [2, 3, 4]


def test_paper_protocol_is_the_published_one() -> None:
    for name in ("dolly", "self_instruct", "vicuna", "s_ni", "unni"):
        plan = planning.plan(selection.builtin_tasks()[name], chat=True, protocol="paper")
        assert (plan.style, plan.seeds, plan.protocol) == ("base", (10, 20, 30, 40, 50), "paper")
        wanted = {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_gen_toks": 256}
        assert wanted.items() <= plan.generation.items()
        assert plan.generation["keep_first_tokens"] == 256
        assert render.render(plan.config["doc_to_text"], {"prompt": "a<n>b"}) == "a\nb"


def test_every_builtin_metric_is_described() -> None:
    from dskd_eval.scorers import registry

    for spec in selection.builtin_tasks().values():
        assert all(registry.metric_info(name).description != "metric of the task file" for name in spec.metrics)
        assert spec.summary and spec.version == 1


def test_subsets_are_seeded_nested_and_sorted() -> None:
    small, large = task_rows.choose_documents(100, 8, 3), task_rows.choose_documents(100, 20, 3)
    assert set(small) < set(large) and large == sorted(large) and len(set(large)) == 20
    assert small != list(range(8)) and small != task_rows.choose_documents(100, 8, 4)
    assert task_rows.choose_documents(5, 8, 0) == [0, 1, 2, 3, 4]


# --- files of the user ---


def test_altered_and_missing_files_are_named(data_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "math500").mkdir()
    text = (data_dir / "math500" / "test.jsonl").read_text(encoding="utf-8")
    (tmp_path / "math500" / "test.jsonl").write_text(text.replace("the", "teh", 1), encoding="utf-8")
    spec = selection.builtin_tasks()["math500"]
    with pytest.raises(UserError, match=r"math500/test.jsonl is altered: sha256 \w+…, not 35dc41080a36…"):
        task_rows.load_data(spec, tmp_path)
    with pytest.raises(UserError, match=r"gsm8k/test.jsonl is missing"):
        task_rows.load_data(selection.builtin_tasks()["gsm8k"], tmp_path)


def test_without_data_and_network_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=r"hub:openai/gsm8k/main/test.*--data-dir"):
        task_rows.load_data(selection.builtin_tasks()["gsm8k"], None)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{"a": 1}\n{"a": \n', r"rows.jsonl, row 2"),
        ("[1, 2]\n", r"row 1: expected a JSON object per line; got a list"),
        ("\n\n", r"expected at least one row; got no rows"),
    ],
)
def test_bad_rows_are_located(own_task: Callable[..., Path], text: str, problem: str) -> None:
    path = own_task()
    (path.parent / "rows.jsonl").write_text(text)
    with pytest.raises(UserError, match=problem):
        task_rows.load_data(load.load_task(path), None)


@pytest.mark.parametrize(
    ("row", "place"),
    [
        ({"question": "a \ud800 b", "answer": "2"}, r"'\\ud800', in 'question'"),
        ({"question": "x", "answer": ["1", "\udfff"]}, r"'\\udfff', in 'answer'.1"),
        ({"question": "x", "answer": "1", "more": {"deep": "\ude00\ud83d"}}, r"'\\ude00', in 'more'.deep"),
        ({"question": "x", "answer": "1", "\ud800": "y"}, r"'\\ud800', in a name"),
    ],
)
def test_half_characters_in_rows_are_located(own_task: Callable[..., Path], row: dict[str, Any], place: str) -> None:
    """A lone surrogate reaches neither a tokenizer nor a file."""
    spec = load.load_task(own_task([{"question": "fine \U0001f600", "answer": "1"}, row]))
    with pytest.raises(UserError, match=rf"rows.jsonl, row 2: expected texts of whole characters; .*{place}"):
        task_rows.load_data(spec, None)


def test_half_characters_in_a_task_file(own_task: Callable[..., Path]) -> None:
    """YAML reads JSON's escape of an emoji as two halves: they are joined, a half alone is refused."""
    path = own_task()
    text = path.read_text().replace("'{{question}}'", '"\\ud83d\\ude00 {{question}}"')
    path.write_text(text)
    assert load.load_task(path).config["doc_to_text"] == "\U0001f600 {{question}}"
    path.write_text(text.replace("\\ude00", ""))
    with pytest.raises(UserError, match=r"sums.yaml: expected texts of whole characters; .*'\\ud83d', in 'prompt'"):
        load.load_task(path)


def test_what_a_file_may_hold_besides_json(own_task: Callable[..., Path]) -> None:
    """A damaged archive and a number of 5000 digits are told like any other bad row."""
    path = own_task(data="rows.jsonl.gz")
    whole = gzip.compress(b'{"question": "x"}\n' * 50)
    (path.parent / "rows.jsonl.gz").write_bytes(whole[:12] + b"\xff" * 8 + whole[20:])
    with pytest.raises(UserError, match=r"rows.jsonl.gz: expected a readable UTF-8 file"):
        task_rows.load_data(load.load_task(path), None)
    path = own_task()
    (path.parent / "rows.jsonl").write_text('{"question": ' + "1" * 5000 + "}\n")
    with pytest.raises(UserError, match=r"rows.jsonl, row 1: expected a JSON object per line"):
        task_rows.load_data(load.load_task(path), None)


def test_rows_may_be_zipped_or_a_json_list(tmp_path: Path) -> None:
    rows = [{"q": "é\u2028x", "a": "1\r\n2"}]
    with gzip.open(tmp_path / "r.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write(json.dumps(rows[0], ensure_ascii=False) + "\n")
    (tmp_path / "r.json").write_text(json.dumps(rows), encoding="utf-8")
    loaded = [data.load((data.DataSource(str(tmp_path / name)),), None) for name in ("r.jsonl.gz", "r.json")]
    assert loaded[0].rows == loaded[1].rows == [{"q": "é\u2028x", "a": "1\n2"}]
    assert loaded[0].digest == loaded[1].digest


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ({"promt": "x"}, r"expected known keys; got 'promt'. Did you mean prompt"),
        ({"scorer": "rogue_l"}, r"Did you mean rouge_l"),
        ({"scorer": None}, r"`scorer`: expected one of rouge_l"),
        ({"prompt": None}, r"expected `doc_to_text` \(or `prompt`\)"),
        ({"data": None}, r"expected `data:`"),
        ({"task": "two words"}, r"a name of letters"),
        ({"extends": "gsm9k"}, r"Did you mean gsm8k"),
        ({"scorer": "python"}, r"`code: \{tests: ...\}`"),
        ({"styles": {"talk": {}}}, r"expected base or chat; got 'talk'"),
        ({"styles": {"chat": {"temperature": 1}}}, r"`styles.chat`: expected a key that shapes prompts"),
        ({"metric_list": [{"metric": "acc"}]}, r"either `scorer` or lm-eval's own metrics"),
        ({"output_type": "multiple_choice"}, r"generate_until with `scorer: number`"),
        ({"data": {"train": "rows.jsonl"}}, r"expected test, shots or a file; got 'train'"),
    ],
)
def test_bad_task_files(own_task: Callable[..., Path], keys: dict[str, Any], problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        load.load_task(own_task(**keys))


def test_template_of_a_missing_field(own_task: Callable[..., Path]) -> None:
    spec = load.load_task(own_task(prompt="{{frage}}"))
    plan = planning.plan(spec, chat=False)
    with pytest.raises(UserError, match=r"'frage' is undefined"):
        run_task.evaluate_task(EvalLM(OracleBackend(plan)), plan, task_rows.load_data(spec, None))


def oracle(spec: TaskSpec, *, chat: bool = False, constant: str | None = None, **plan_keys: Any) -> Any:
    plan = planning.plan(spec, chat=chat, **plan_keys)
    box = sandbox.choose(unsafe=True) if spec.executes_code else None
    rows = task_rows.load_data(spec, None)
    return run_task.evaluate_task(EvalLM(OracleBackend(plan, constant=constant)), plan, rows, sandbox=box)


def test_own_task_scores(own_task: Callable[..., Path]) -> None:
    spec = load.load_task(own_task())
    assert oracle(spec).score.metrics["flexible"].value == 100.0
    assert oracle(spec, constant="4").score.metrics["flexible"].value == pytest.approx(100 / 12, abs=1e-4)


def test_own_task_with_shots(own_task: Callable[..., Path]) -> None:
    path = own_task(data={"test": "rows.jsonl", "shots": "shots.jsonl"}, shots=2)
    shots = [{"question": f"shot {n}?", "answer": f"{n}"} for n in range(3)]
    (path.parent / "shots.jsonl").write_text("".join(json.dumps(row) + "\n" for row in shots))
    result = oracle(load.load_task(path))
    assert result.samples[0].prompt == "shot 0? 0\n\nshot 1? 1\n\nWhat is 0 + 0?"
    with pytest.raises(UserError, match=r"expected at most 3 shots; got 4"):
        oracle(load.load_task(path), num_fewshot=4)


def test_own_rows_in_a_builtin_task(own_task: Callable[..., Path], data_dir: Path) -> None:
    rows = [{"question": "2 + 3?", "answer": "2 + 3 = 5\n#### 5"}]
    path = own_task(rows, extends="gsm8k", prompt=None, reference=None, scorer=None, shots=0)
    result = oracle(load.load_task(path))
    assert result.samples[0].prompt == "Question: 2 + 3?\nAnswer:"
    assert result.score.metrics["strict"].value == 100.0


def test_own_code_task(own_task: Callable[..., Path]) -> None:
    rows = [{"question": f"Write add{n}", "name": f"add{n}", "solution": f"def add{n}(a):\n    return a + {n}\n",
             "n": n} for n in range(3)]  # fmt: skip
    spec = load.load_task(
        own_task(rows, reference="solution", scorer="python",
                 code={"tests": "assert {{name}}(1) == 1 + {{n}}", "entry_point": "{{name}}"})
    )  # fmt: skip
    assert oracle(spec).score.metrics["pass@1"].value == 100.0
    assert oracle(spec, constant="import sys; sys.exit(0)").score.metrics["pass@1"].value == 0.0
    many = oracle(spec, samples=4)
    assert {"pass@1", "pass@4"} <= many.score.metrics.keys()
    assert many.score.answers.count == 12


CODE = {"tests": "assert {{name}}(1) == 2", "entry_point": "{{name}}"}


def test_own_code_task_without_reference_solutions(own_task: Callable[..., Path]) -> None:
    """Tests alone judge a program."""
    rows = [{"question": f"Write add{n}", "name": f"add{n}"} for n in range(3)]
    path = own_task(rows, reference=None, scorer="python", code=CODE)
    spec = load.load_task(path)
    task_checks.check_task(planning.plan(spec, chat=False), task_rows.load_data(spec, None))
    result = oracle(spec, constant="def add1(a):\n    return a + 1\n")
    assert [sample.metrics["pass@1"] for sample in result.samples] == [0.0, 1.0, 0.0]
    assert all(sample.references == [] for sample in result.samples)


def test_shots_of_a_code_task_need_answers(own_task: Callable[..., Path]) -> None:
    rows = [{"question": "Write f", "name": "f"}]
    path = own_task(
        rows, reference=None, scorer="python", code=CODE, shots=1, data={"test": "rows.jsonl", "shots": "rows.jsonl"}
    )
    spec = load.load_task(path)
    with pytest.raises(UserError, match=r"expected answers for its shots; got neither `reference` nor `shot_target`"):
        task_checks.check_task(planning.plan(spec, chat=False), task_rows.load_data(spec, None))


def test_lm_eval_task_file_with_its_own_metrics(own_task: Callable[..., Path]) -> None:
    metric = {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True, "ignore_case": True}
    path = own_task(
        scorer=None, data=None, prompt=None, reference=None, max_new_tokens=None, dataset_path="json",
        dataset_kwargs={"data_files": {"test": "rows.jsonl"}}, test_split="test", output_type="generate_until",
        doc_to_text="{{question}}", doc_to_target="{{answer}}", metric_list=[metric],
        generation_kwargs={"until": ["\n"], "max_gen_toks": 4},
    )  # fmt: skip
    spec = load.load_task(path)
    plan = planning.plan(spec, chat=False)
    result = run_task.evaluate_task(
        EvalLM(OracleBackend(plan, constant="4")), plan, task_rows.load_data(spec, None), limit=6
    )
    assert result.score.documents == 12 and result.score.n == 6
    right = sum(sample.references == ["4"] for sample in result.samples)
    assert result.score.metrics["exact_match"].value == pytest.approx(100 * right / 6, abs=1e-4)


def test_lm_eval_task_file_with_a_function(own_task: Callable[..., Path]) -> None:
    path = own_task(scorer=None, metric_list=[{"metric": "same", "aggregation": "mean", "higher_is_better": True}])
    (path.parent / "helper.py").write_text(
        "def process_results(doc, results):\n    return {'same': float(doc['answer'] in results[0])}\n"
    )
    path.write_text(path.read_text() + "process_results: !function helper.process_results\n")
    spec = load.load_task(path)
    assert spec.native
    assert oracle(spec, constant="4 or 22").score.metrics["same"].value == pytest.approx(300 / 12, abs=0.01)


@pytest.mark.parametrize(
    ("value", "unit", "shown"),
    [("1 / (1 + len(results[0]))", "percent", 50.0), ("10.0 + len(results[0])", "number", 11.0)],
)
def test_own_metrics_are_percentages_when_they_lie_between_0_and_1(
    own_task: Callable[..., Path], value: str, unit: str, shown: float
) -> None:
    path = own_task(scorer=None, metric_list=[{"metric": "m", "aggregation": "mean", "higher_is_better": False}])
    (path.parent / "helper.py").write_text(f"def score(doc, results):\n    return {{'m': {value}}}\n")
    path.write_text(path.read_text() + "process_results: !function helper.score\n")
    metric = oracle(load.load_task(path), constant="4").score.metrics["m"]
    assert (metric.value, metric.unit, metric.higher_is_better) == (shown, unit, False)


def test_a_metric_that_is_no_number_is_refused(own_task: Callable[..., Path]) -> None:
    path = own_task(scorer=None, metric_list=[{"metric": "m", "aggregation": "mean", "higher_is_better": True}])
    (path.parent / "helper.py").write_text("def score(doc, results):\n    return {'m': float('nan')}\n")
    path.write_text(path.read_text() + "process_results: !function helper.score\n")
    with pytest.raises(
        UserError, match=r"metric m: expected a finite number for every document; got nan for document 0"
    ):
        oracle(load.load_task(path), constant="4")


def test_metric_that_the_task_does_not_give(own_task: Callable[..., Path]) -> None:
    path = own_task(scorer=None, metrics=["f1"], metric_list=[{"metric": "exact_match"}])
    with pytest.raises(UserError, match=r"one number per document: exact_match; got 'f1'"):
        oracle(load.load_task(path), constant="4")


def test_unsafe_code_of_a_task_file_is_refused(own_task: Callable[..., Path]) -> None:
    path = own_task(scorer=None, unsafe_code=True, metric_list=[{"metric": "exact_match"}])
    with pytest.raises(UserError, match=r"`scorer: python`"):
        oracle(load.load_task(path), constant="4")


def test_lm_eval_task_file_that_includes_another(own_task: Callable[..., Path]) -> None:
    """The included file's functions lie beside it; own keys win over included ones."""
    path = own_task(scorer=None, metric_list=[{"metric": "same", "aggregation": "mean", "higher_is_better": True}])
    folder = path.parent / "common"
    folder.mkdir()
    (folder / "marks.py").write_text(
        "def same(doc, results):\n    return {'same': float(doc['answer'] == results[0])}\n"
    )
    (folder / "base.yaml").write_text("task: other\nprocess_results: !function marks.same\ndescription: 'Sums. '\n")
    path.write_text("include: common/base.yaml\n" + path.read_text())
    result = oracle(load.load_task(path), constant="4")
    assert result.score.metrics["same"].value == pytest.approx(100 / 12, abs=1e-4)
    assert result.samples[0].task == "sums" and result.samples[0].prompt.startswith("Sums. What is")


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ({"max_new_tokens": "many"}, r"`max_new_tokens`: expected a whole number, 1 or more; got 'many'"),
        ({"max_new_tokens": 0}, r"`max_new_tokens`: expected a whole number, 1 or more; got 0"),
        ({"version": "v1"}, r"`version`: expected a number; got 'v1'"),
        ({"shots": "three"}, r"`shots`: expected a whole number, 0 or more; got 'three'"),
        ({"stop": 5}, r"`stop`: expected a text"),
        ({"stop": ["x", ""]}, r"`stop`: expected a text or a list of texts, none empty"),
        ({"styles": ["base"]}, r"`styles`: expected a mapping"),
        ({"styles": {"base": "x"}}, r"`styles.base`: expected a mapping"),
        ({"styles": {"base": {"num_fewshot": -1}}}, r"`styles.base`, `num_fewshot`: expected a whole number"),
        ({"protocols": "paper"}, r"`protocols`: expected a mapping"),
        ({"code": "assert True"}, r"`code`: expected a mapping"),
        ({"floor": "x"}, r"`floor`: expected a mapping"),
        ({"suite": ["math"]}, r"`suite`: expected a name"),
        ({"metrics": ["flexibel"]}, r"`metrics`: expected metrics of `scorer: number`; got 'flexibel'.*mean flexible"),
        ({"metric_list": "exact_match", "scorer": None}, r"`metric_list`: expected a list of mappings"),
        ({"generation_kwargs": "x"}, r"`generation_kwargs`: expected a mapping"),
        ({"generation_kwargs": {"temprature": 1}}, r"got 'temprature'. Did you mean temperature"),
        ({"generation_kwargs": {"temperature": "hot"}}, r"`temperature`: expected a number, 0 or more; got 'hot'"),
        ({"data": {"file": "rows.jsonl", "rows": "6"}}, r"`rows`: expected a whole number"),
        ({"data": {"file": "rows.jsonl", "select": {"n": 1}}}, r"`select`: expected columns"),
    ],
)
def test_wrong_kinds_of_values(own_task: Callable[..., Path], keys: dict[str, Any], problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        load.load_task(own_task(**keys))


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ({"max_new_tokens": 5}, {"max_gen_toks": 5, "do_sample": False}),
        ({"max_tokens": 5, "until": "x"}, {"max_gen_toks": 5, "until": ["x"]}),
        ({"temperature": 0.5}, {"do_sample": True, "temperature": 0.5}),
        ({"temperature": 0.0}, {"do_sample": False}),
        ({"do_sample": False, "temperature": 0.5}, {"do_sample": False}),
    ],
)
def test_generation_settings_read_as_lm_eval_does(
    own_task: Callable[..., Path], given: dict[str, Any], kept: dict[str, Any]
) -> None:
    spec = load.load_task(own_task(max_new_tokens=None, generation_kwargs=given))
    generation = planning.plan(spec, chat=False).generation
    assert {key: generation[key] for key in kept} == kept


def test_one_metric_needs_no_list(own_task: Callable[..., Path]) -> None:
    assert load.load_task(own_task(metrics="strict")).metrics == ("strict",)


ROWS = [{"q": "1?", "a": "1"}, {"q": "2?", "a": "2"}]


@pytest.mark.parametrize(
    ("rows", "keys", "problem"),
    [
        (ROWS, {"reference": "aa"}, r"row 1, field 'aa': expected a field of the row: a, q; got none"),
        (ROWS, {"prompt": "question"}, r"row 1, field 'question'"),
        ([*ROWS, {"q": "3?"}], {}, r"row 3, field 'a'"),
        (
            [*ROWS, {"q": "3?", "a": None}],
            {},
            r"row 3, reference 'a': expected a reference answer in every row; got None",
        ),
        ([*ROWS, {"q": "3?", "a": []}], {}, r"row 3, reference 'a'"),
        (ROWS, {"prompt": "{{q"}, r"row 1, template '\{\{q'"),
        (ROWS, {"prompt": "{{p}}"}, r"row 1, template .*'p' is undefined"),
        (ROWS, {"scorer": "python", "code": {"tests": "{{t}}"}}, r"row 1, template .*'t' is undefined"),
        (ROWS, {"scorer": "ifeval"}, r"row 1, `scorer: ifeval`: expected the field 'prompt'"),
        (ROWS, {"shots": 2}, r"expected rows for its shots"),
        (ROWS, {"scorer": None, "metric_list": [{"metric": "exactmatch"}]}, r"a task that lm-eval can build"),
        (ROWS, {"scorer": None, "metric_list": [{"metric": "exact_match"}], "output_type": "generate"}, r"output_type"),
    ],
)
def test_rows_that_do_not_fit_the_task(
    own_task: Callable[..., Path], rows: list[dict[str, Any]], keys: dict[str, Any], problem: str
) -> None:
    """Found before a model is loaded, with the number of the row."""
    spec = load.load_task(own_task(rows, **{"prompt": "{{q}}", "reference": "a", **keys}))
    with pytest.raises(UserError, match=problem):
        task_checks.check_task(planning.plan(spec, chat=False), task_rows.load_data(spec, None))


def test_rows_without_a_selected_column(own_task: Callable[..., Path]) -> None:
    path = own_task(ROWS, data={"file": "rows.jsonl", "select": {"n": [1, 2]}})
    with pytest.raises(UserError, match=r"row 1: expected a number in 'n'"):
        task_rows.load_data(load.load_task(path), None)


def test_docs_name_every_task() -> None:
    text = (Path(__file__).parents[2] / "docs" / "eval.md").read_text(encoding="utf-8")
    for name, spec in selection.builtin_tasks().items():
        row = re.search(rf"^\| `{name}` \|.*$", text, re.MULTILINE)
        assert row, name
        assert spec.data["test"][-1].file in row[0] and spec.metrics[0] in row[0]


def test_a_task_may_extend_one_that_extends(tmp_path: Path) -> None:
    """s_ni extends dolly, b.yaml the file beside it; each takes the place of keys of those before it."""
    (tmp_path / "a.yaml").write_text(
        "extends: s_ni\ntask: a\nprompt: 'Do: {{instruction}}'\ndata: rows.jsonl\nstop: x\n"
    )
    (tmp_path / "b.yaml").write_text("extends: a\ntask: b\ndoc_to_text: '{{instruction}}'\nmax_new_tokens: 7\n")
    first, second = load.load_task(tmp_path / "a.yaml"), load.load_task(tmp_path / "b.yaml")
    assert (first.scorer, first.suite, second.suite) == ("rouge_l", "own", "own")
    assert second.protocols == first.protocols == selection.builtin_tasks()["dolly"].protocols
    assert second.data["test"][0].file == str(tmp_path / "rows.jsonl")
    for chat in (False, True):
        of_first, of_second = planning.plan(first, chat=chat), planning.plan(second, chat=chat)
        assert of_first.config["doc_to_text"] == "Do: {{instruction}}"
        assert of_second.config["doc_to_text"] == "{{instruction}}", "also where the base used the short name"
        assert (of_first.generation["until"], of_second.generation["until"]) == (["x"], ["x"])
        assert of_second.generation["max_gen_toks"] == 7


def test_extending_nothing_and_extending_in_a_circle_are_refused(tmp_path: Path) -> None:
    for name, base in (("a", "b"), ("b", "c"), ("c", "a"), ("me", "me"), ("typo", "s_nii")):
        (tmp_path / f"{name}.yaml").write_text(f"extends: {base}\ntask: {name}\n")
    for name, got in (("a", "a extends b extends c extends a"), ("me", "me extends me")):
        with pytest.raises(UserError, match="`extends`: expected a task that does not extend this one") as told:
            load.load_task(tmp_path / f"{name}.yaml")
        assert told.value.got == got
    with pytest.raises(UserError, match=r"typo.yaml, `extends`: expected a task of the package.*'s_nii'.*mean s_ni"):
        load.load_task(tmp_path / "typo.yaml")
