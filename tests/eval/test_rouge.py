"""Rouge-L against the textbook table, in ASCII and in any script."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from dskd_eval.backends.oracle import OracleBackend
from dskd_eval.lmeval import run_task
from dskd_eval.lmeval.eval_lm import EvalLM
from dskd_eval.scorers import rouge
from dskd_eval.scorers.base import Answer
from dskd_eval.scorers.text import RougeL
from dskd_eval.tasks import load, planning
from dskd_eval.tasks import rows as task_rows


def lcs_f(text: list[str], reference: list[str]) -> float:
    """Rouge-L F by the textbook table, on words that need no stemming."""
    table = [[0] * (len(reference) + 1) for _ in range(len(text) + 1)]
    for i, j in itertools.product(range(len(text)), range(len(reference))):
        same = text[i] == reference[j]
        table[i + 1][j + 1] = table[i][j] + 1 if same else max(table[i][j + 1], table[i + 1][j])
    common = table[-1][-1]
    return 0.0 if common == 0 else 2 * common / (len(text) + len(reference))


@pytest.mark.parametrize(
    ("text", "reference"),
    [("the cat sat", "the cat sat"), ("a red dog", "a dog red big"), ("x y", "p q"), ("b a c d", "a b d c")],
)
def test_rouge_l_equals_table(text: str, reference: str) -> None:
    assert rouge.rouge_l(text, reference) == pytest.approx(lcs_f(text.split(), reference.split()))


@pytest.mark.parametrize(("text", "score"), [("- 😌😊 ", 1.0), ("😌", 0.0), ("", 0.0), ("calm", 0.0)])
def test_rouge_l_of_a_reference_without_words(text: str, score: float) -> None:
    assert rouge.rouge_l(text, "- 😌😊") == score


def test_rouge_l_takes_the_best_reference_and_stems() -> None:
    found = RougeL().score_one(Answer({}, "running dogs", ["cat", "run dog"])).metrics
    assert found == {
        "rouge_l": pytest.approx(1.0),
        "exact_match": 0.0,
        "response_words": 2.0,
        "rouge_l_unicode": pytest.approx(1.0),
    }


# Answer, reference, and the words of both as a reader of the script cuts them.
SCRIPTS = {
    "Greek": ("ο σκύλος τρέχει", "Ο σκύλος κοιμάται", ["ο", "σκύλος", "τρέχει"], ["ο", "σκύλος", "κοιμάται"]),
    "Cyrillic": ("Кот спит.", "Чёрный кот спит", ["кот", "спит"], ["чёрный", "кот", "спит"]),
    "accents": ("Le café est fermé", "Un café fermé", ["le", "café", "est", "fermé"], ["un", "café", "fermé"]),
    "Hindi": ("बिल्ली सो रही है", "काली बिल्ली है", ["बिल्ली", "सो", "रही", "है"], ["काली", "बिल्ली", "है"]),
    "Arabic": ("القط نائم", "القط الأسود نائم", ["القط", "نائم"], ["القط", "الأسود", "نائم"]),
    "Chinese": ("北京是首都。", "首都是北京", list("北京是首都"), list("首都是北京")),
    "Japanese": ("猫がいる", "猫はいる", list("猫がいる"), list("猫はいる")),
    "Korean": ("고양이가 잔다", "고양이가 논다", ["고양이가", "잔다"], ["고양이가", "논다"]),
    "Thai": ("แมวนอน", "แมวกิน", ["แ", "ม", "ว", "น", "อ", "น"], ["แ", "ม", "ว", "กิ", "น"]),
    "two scripts": ("iPhone 手机", "手机 iPhone", ["iphone", "手", "机"], ["手", "机", "iphone"]),
    "full width": ("ＡＢＣ 42", "abc 42", ["abc", "42"], ["abc", "42"]),
    "composed": ("cafe\u0301 noir", "café noir", ["café", "noir"], ["café", "noir"]),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_any_script_equals_table(name: str) -> None:
    text, reference, words, wanted = SCRIPTS[name]
    assert rouge.rouge_l_unicode(text, reference) == pytest.approx(lcs_f(words, wanted))
    assert rouge.rouge_l_unicode(reference, reference) == 1.0
    assert rouge.rouge_l_unicode("", reference) == 0.0


def test_any_script_equals_rouge_l_on_ascii(data_dir: Path) -> None:
    """Whole references of Dolly against the next one, where both are ASCII."""
    rows = [json.loads(line)["output"] for line in (data_dir / "dskd/dolly/valid.jsonl").open(encoding="utf-8")]
    texts = [row if isinstance(row, str) else row[0] for row in rows]
    texts = [text for text in texts if text.isascii()]
    assert len(texts) > 300
    for text, reference in itertools.pairwise(texts):
        assert rouge.rouge_l_unicode(text, reference) == pytest.approx(rouge.rouge_l(text, reference))


@pytest.mark.parametrize(
    ("reference", "note"),
    [
        ("The answer is 42.", ""), ("— 😌", ""), ("", ""),
        ("Das Café in Köln", "2 of 13 letters and digits are not ASCII: only the rest is compared"),
        ("北京", "2 of 2 letters and digits are not ASCII: compared as a whole"),
    ],
)  # fmt: skip
def test_a_row_says_what_rouge_l_does_not_see(reference: str, note: str) -> None:
    details = RougeL().score_one(Answer({}, "x", [reference, "plain"])).details
    assert details == ({"unseen_by_rouge_l": note} if note else {})


def test_a_task_with_references_of_another_script(own_task: Callable[..., Path], tmp_path: Path, invoke: Any) -> None:
    """rouge_l is 100 for a wrong answer in the same letters beside ASCII; the other metric is not."""
    rows = [{"question": f"capital {n}?", "answer": f"{city} (a)"} for n, city in enumerate(["北京", "東京", "Αθήνα"])]
    spec = load.load_task(own_task(rows, scorer="rouge_l"))
    result = run_task.evaluate_task(
        EvalLM(OracleBackend(planning.plan(spec, chat=False), constant="ソウル (a)")),
        planning.plan(spec, chat=False),
        task_rows.load_data(spec, None),
    )
    assert result.score.metrics["rouge_l"].value == 100.0
    assert result.score.metrics["rouge_l_unicode"].value < 50
    assert result.score.answers.references_unseen == 3
    assert all("unseen_by_rouge_l" in sample.details[0] for sample in result.samples)


def test_a_run_notes_unseen_references(
    own_task: Callable[..., Path], tiny_model: Path, tmp_path: Path, invoke: Callable[..., Any]
) -> None:
    rows = [{"question": "capital?", "answer": "北京 (a)"}] * 4
    for metrics, noted in (("rouge_l", True), ("rouge_l_unicode", False)):
        path = own_task(rows, scorer="rouge_l", metrics=[metrics])
        done = invoke("--model", tiny_model, "--task-file", path, "--output", tmp_path / metrics)
        assert done.exit_code == 0, done.output
        assert ("letters that rouge_l does not see" in " ".join(done.output.split())) is noted
