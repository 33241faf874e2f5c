"""Files of runs that were written before: read as typed records, written again byte for byte, damage told in words."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from dskd_eval import report, schema
from dskd_eval.errors import UserError
from dskd_eval.run_folder import SavedRun

# A real run of three random models on four tasks, one of which failed; written before there were typed records.
SAVED = Path(__file__).parent / "saved_run"


def test_results_written_before_are_written_again_byte_for_byte() -> None:
    text = (SAVED / "results.json").read_text(encoding="utf-8")
    results = schema.Results.model_validate(json.loads(text))
    assert json.dumps(results.plain(), indent=1, ensure_ascii=False) + "\n" == text
    finished = [score for score in results.scores if score.finished]
    assert {score.task.task for score in finished} == {"sums", "rouge", "choice"}
    assert all(score.primary.n == 3 and score.task.limit is not None for score in finished)
    assert [score.error != "" for score in results.scores] == [not score.finished for score in results.scores]


def test_samples_written_before_are_written_again_byte_for_byte() -> None:
    lines = (SAVED / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    samples = [schema.Sample.model_validate(json.loads(line)) for line in lines]
    assert [json.dumps(sample.plain(), ensure_ascii=False) for sample in samples] == lines
    assert {sample.model for sample in samples} == {"base", "student", "teacher"}


def test_commands_say_the_same_of_a_run_written_before(tmp_path: Path, invoke: Callable[..., Any]) -> None:
    compared = invoke("compare", SAVED, "--base", "base", "--teacher", "teacher", "--json")
    assert compared.output == (SAVED / "comparison.json").read_text(encoding="utf-8")
    assert invoke("report", SAVED, "--output", tmp_path).exit_code == 0
    assert (tmp_path / "report.md").read_bytes() == (SAVED / "report.md").read_bytes()


def test_what_another_version_adds_or_lacks_is_kept() -> None:
    """A key that is not known stays in the file, one that is missing does not appear."""
    sample = json.loads((SAVED / "samples.jsonl").read_text(encoding="utf-8").splitlines()[0])
    del sample["answer_metrics"]
    sample |= {"colour": {"of": ["the", 1.5, None]}}
    assert json.dumps(schema.Sample.model_validate(sample).plain()) == json.dumps(sample)


def test_half_a_character_survives() -> None:
    """The name of a folder that is no UTF-8 stands in the file as JSON's escape."""
    model = {"name": "m\udcff", "role": None, "source": "/x/m\udcff", "fingerprint": "f"}
    assert schema.ModelSource.model_validate(json.loads(json.dumps(model))).plain() == model


@pytest.mark.parametrize(
    ("file", "old", "new", "where", "got"),
    [
        ("results.json", '"documents": 12', '"documents": "many"', "results.json", "scores.0.documents: Input should"),
        ("results.json", '"primary_metric"', '"metric_of_it"', "results.json", "scores.0.task.primary_metric: Field"),
        ("results.json", '"scores": [', '"scores": {}, "_": [', "results.json", "scores: Input should be a valid list"),
        ("samples.jsonl", '"doc_id": 1,', '"doc_id": "one",', "samples.jsonl, line 1", "doc_id: Input should be a val"),
        ("samples.jsonl", '"prompt":', '"frage":', "samples.jsonl, line 1", "prompt: Field required"),
    ],
)
def test_a_damaged_file_is_told_with_its_place(
    tmp_path: Path, file: str, old: str, new: str, where: str, got: str
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(SAVED, folder)
    text = (folder / file).read_text(encoding="utf-8")
    assert old in text
    (folder / file).write_text(text.replace(old, new), encoding="utf-8")
    with pytest.raises(UserError) as told:
        report.write([SavedRun(folder)], tmp_path)
    error = told.value
    assert error.where.endswith(where) and error.got.startswith(got) and error.expected.startswith("the record of a ")
    assert "--resume" in error.fix
