"""The study: its table says what the plugin accepts, its statistics are right, its records hold numbers only."""

import itertools
import json
import math
import os
import random
import signal
import statistics as standard
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from dskd_eval.stats import holm

from benchmarks.study import data, launch, pairs, plan, records, report, runs, table
from benchmarks.study.__main__ import parse
from benchmarks.study.statistics import paired, score
from dskd_plugin.host.watch import Watch
from dskd_plugin.settings import parse_settings

ROOT = Path(__file__).parents[2]
COMMITTED = sorted((ROOT / "benchmarks" / "study" / "records").glob("*.jsonl"))
DATA = Path(os.environ.get("DSKD_DATA") or ROOT.parent / "shared" / "data")
needs_data = pytest.mark.skipif(not (DATA / "gsm8k" / "train.jsonl").is_file(), reason="needs the data of DSKD_DATA")
TEACHER = {"teacher": {"model": "./teacher"}}


# -- the table of methods --------------------------------------------------------------------------------------------

LINES = [(method, None) for method in table.METHODS] + [("dskd", name) for name in table.ABLATIONS]


@pytest.mark.parametrize(("method", "ablation"), LINES, ids=str)
def test_every_line_of_the_table_is_a_block_that_the_plugin_accepts(method, ablation):
    block = table.block(method, ablation)
    settings = parse_settings(TEACHER | block)
    written = settings.model_dump(exclude_unset=True)
    written.pop("teacher")
    assert written == block


def test_every_ablation_changes_a_setting_and_only_what_it_names():
    base = parse_settings(TEACHER | table.block("dskd")).model_dump()
    seen = [base]
    for name in table.ABLATIONS:
        changed = parse_settings(TEACHER | table.block("dskd", name)).model_dump()
        assert changed not in seen, name
        seen.append(changed)
        different = {key for key in base if base[key] != changed[key]}
        named = set(table.ABLATIONS[name].block)
        assert different <= named | ({"projector"} if table.ABLATIONS[name].block.get("spaces") == "teacher" else set())


def test_merging_goes_into_blocks_and_leaves_the_originals_alone():
    base = {"a": {"x": 1, "y": {"z": 2}}, "b": 3}
    change = {"a": {"y": {"w": 4}}, "b": 5}
    assert table.merged(base, change) == {"a": {"x": 1, "y": {"z": 2, "w": 4}}, "b": 5}
    assert base == {"a": {"x": 1, "y": {"z": 2}}, "b": 3}
    assert table.merged(base, {"a": {"x": None}, "b": None}) == {"a": {"y": {"z": 2}}}


@pytest.mark.parametrize("size", table.SIZES.values(), ids=list(table.SIZES))
def test_recipes_of_a_pair_differ_in_the_block_the_rate_the_seed_and_their_folders_only(size):
    wanted = plan.Wanted(("qa", "text"))
    free = {"dskd", "learning_rate", "seed", "output_dir", "dataset_prepared_path", "datasets"}
    for (task, pair), lines in itertools.groupby(wanted.methods_of(size), key=lambda line: line[:2]):
        made = [runs.recipe(runs.Run(task, pair, method, size.rates[0], 1), size) for _, _, method in lines]
        for recipe in made[1:]:
            assert {k: v for k, v in recipe.items() if k not in free} == {
                k: v for k, v in made[0].items() if k not in free
            }
        assert len({recipe["output_dir"] for recipe in made}) == len(made)


@pytest.mark.parametrize("words", [["--methods", "sft", "search"], ["--pairs", "three"], ["serach"]], ids=" ".join)
def test_a_word_that_is_no_stage_method_or_pair_is_refused(words, capsys):
    with pytest.raises(SystemExit):
        parse(words)
    assert words[-1] in capsys.readouterr().err


def test_the_search_is_of_one_size_for_every_method():
    size = table.SMALL
    found = plan.search_runs(size, plan.Wanted(("qa",)))
    grids = {}
    for run in found:
        grids.setdefault((run.pair, run.method), []).append((run.rate, run.seed))
    assert {tuple(grid) for grid in grids.values()} == {tuple((rate, size.seeds[0]) for rate in size.rates)}
    assert len(size.seeds) >= 3
    assert {pair for pair, _ in grids} == {"one", "two"}


def test_runs_that_generate_start_first(tmp_path):
    names = [job.name for job in plan.search_jobs(table.SMALL, tmp_path, plan.Wanted(("qa",)))]
    on_policy = ["on_policy" in name for name in names]
    assert any(on_policy) and on_policy == sorted(on_policy, reverse=True)
    assert sorted(names) == sorted(run.name for run in plan.search_runs(table.SMALL, plan.Wanted(("qa",))))


def test_a_run_with_another_recipe_is_made_again(tmp_path):
    run = runs.Run("qa", "two", "dskd", table.SMALL.rates[0], 1)
    for change, kept in (({"dataset_prepared_path": "elsewhere"}, True), ({"max_steps": 7}, False)):
        runs.write_json(run.folder(tmp_path) / "train.json", {"recipe": runs.recipe(run, table.SMALL) | change})
        assert runs.drop_stale([run], table.SMALL, tmp_path) == [run]
        assert run.folder(tmp_path).is_dir() == kept


def test_the_chosen_rate_is_that_of_the_fewest_bits_and_failed_runs_do_not_count(tmp_path):
    size = replace(table.SMALL, rates=(5e-4, 1e-3, 2e-3))
    bits = dict(zip(size.rates, (30.0, 20.0, 20.0), strict=True))
    for rate, value in bits.items():
        run = runs.Run("qa", "two", "dskd", rate, size.seeds[0])
        runs.write_json(run.folder(tmp_path) / "validation-likelihood.json", {"gold": [[value, 5.0]]})
    assert plan.chosen_rate("qa", "two", "dskd", size, tmp_path) == size.rates[1]
    broken = runs.Run("qa", "two", "uld", size.rates[0], size.seeds[0])
    runs.write_json(broken.folder(tmp_path) / "validation-likelihood.json", {"gold": [[math.nan, 5.0]]})
    assert plan.chosen_rate("qa", "two", "uld", size, tmp_path) is None


# -- statistics ------------------------------------------------------------------------------------------------------


def drawn(seed: int, seeds: int, documents: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = random.Random(seed)
    sizes = np.array([rng.randint(5, 60) for _ in range(documents)], dtype=float)
    ease = [rng.gauss(0.4, 0.2) for _ in range(documents)]
    sides, pairs_of = [], list(zip(sizes, ease, strict=True))
    for shift in (0.0, 0.05):
        sides.append(
            np.array([[size * (e + shift + rng.gauss(0, 0.05)) for size, e in pairs_of] for _ in range(seeds)])
        )
    return sides[0], sides[1], sizes


def test_the_paired_difference_equals_a_bootstrap_in_plain_python():
    one, other, sizes = drawn(3, seeds=3, documents=40)
    found = paired(other, one, sizes, draws=4000)
    rng = random.Random(17)
    sample = []
    for _ in range(4000):
        seeds = [rng.randrange(3) for _ in range(3)]
        documents = [rng.randrange(40) for _ in range(40)]
        top = sum(other[s][d] - one[s][d] for s in seeds for d in documents)
        sample.append(top / (3 * sum(sizes[d] for d in documents)))
    sample.sort()
    spread = standard.stdev(sample)
    assert found.value == pytest.approx((other.sum() - one.sum()) / (3 * sizes.sum()), abs=1e-12)
    # Two Monte Carlo estimates of a percentile with 4000 draws each: their standard errors are near 0.05 spread.
    assert found.low == pytest.approx(sample[100], abs=0.2 * spread)
    assert found.high == pytest.approx(sample[3899], abs=0.2 * spread)
    assert 0 < found.p < 0.01


def test_no_difference_is_not_significant_and_both_directions_are_one_test():
    one, other, sizes = drawn(5, seeds=3, documents=30)
    same = paired(one, one, sizes, draws=500)
    assert (same.value, same.low, same.high, same.p) == (0.0, 0.0, 0.0, 1.0)
    there, back = paired(one, other, sizes, draws=2000), paired(other, one, sizes, draws=2000)
    assert (there.value, there.low, there.high) == pytest.approx((-back.value, -back.high, -back.low), abs=1e-12)
    assert there.p == back.p


def test_a_difference_that_one_seed_alone_carries_is_uncertain():
    sizes = np.ones(50)
    one = np.zeros((3, 50))
    other = np.array([[0.9] * 50, [-0.2] * 50, [-0.2] * 50])
    found = paired(other, one, sizes, draws=3000)
    assert found.low < 0 < found.high
    # All three drawn seeds avoid the first one in 8 of 27 draws.
    assert found.p == pytest.approx(2 * 8 / 27, abs=0.06)


def test_scores_are_ratios_of_sums():
    assert score(np.array([[2.0, 6.0], [4.0, 4.0]]), np.array([4.0, 12.0])) == 0.5


def test_unequal_sides_are_refused():
    with pytest.raises(ValueError, match=r"paired difference: expected one shape.*\(3, 5\).*\(2, 5\)"):
        paired(np.zeros((3, 5)), np.zeros((2, 5)), np.ones(5))


def test_holm_equals_the_step_down_rule_applied_by_hand():
    values = [0.04, 0.001, 0.03, 0.5, 0.012]
    adjusted = holm(values)
    # 0.001 x 5, 0.012 x 4, 0.03 x 3, max(0.04 x 2, 0.09), 0.5
    assert adjusted == pytest.approx([0.09, 0.005, 0.09, 0.5, 0.048])
    for level in (0.004, 0.01, 0.05, 0.095, 0.6):
        rejected, left = set(), sorted(range(5), key=values.__getitem__)
        while left and values[left[0]] <= level / len(left):
            rejected.add(left.pop(0))
        assert {i for i in range(5) if adjusted[i] <= level} == rejected
    assert holm([]) == [] and holm([0.9, 0.8]) == [1.0, 1.0]


# -- records ---------------------------------------------------------------------------------------------------------


def finished(folder: Path, run: runs.Run, shift: float) -> None:
    """The files that a finished run leaves, with made-up numbers and a reply that must not reach the record."""
    log = [
        {"step": step, "loss": 2 / step + shift, "grad_norm": 1.0, "dskd/t2s_agreement": min(1.0, step / 8)}
        for step in (4, 8)
    ] + [{"step": 8, "train_runtime": 3.0}]
    environment = {"packages": {"dskd": "0"}, "python": "3", "commit": "abcdef012", "device": "CPU, 1 thread"}
    runs.write_json(
        run.folder(folder) / "train.json",
        {
            "recipe": runs.recipe(run, table.SMALL),
            "log": log,
            "seconds": {"wall": 1.26, "cpu": 1.0},
            "memory": {"gpu_gib": 1.234},
            "environment": environment,
        },
    )
    found = {
        "gold": [[10.123456 + shift, 20.0], [4.0 + shift, 10.0]],
        "teacher": [[9.0 + shift, 18.0], [0.0, 0.0]],
        "exact": [1.0, 0.0],
        "rouge_l": [0.9999, 1 / 3],
        "same_as_teacher": [1.0, 0.0],
        "replies": ["SECRET reply", "SECRET other"],
    }
    for split in ("validation", "heldout"):
        runs.write_json(run.folder(folder) / f"{split}.json", found)
    runs.write_json(run.folder(folder) / "validation-likelihood.json", {"gold": found["gold"]})


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Path:
    """A study's folder with two finished methods, a failed one and a teacher."""
    out = tmp_path_factory.mktemp("study")
    rows = [data.chat("home", "SECRET", "SECRET", answer) for answer in ("x" * 20, "ä" * 5)]
    (out / "data").mkdir()
    (out / "teacher-qa").mkdir()
    for split in ("validation", "heldout"):
        data.write(rows, out / "data" / f"qa-{split}.jsonl")
        runs.write_json(out / f"teacher-qa-{split}.json", ["SECRET " + "y" * 11, " "])
        runs.write_json(
            out / "teacher-eval" / f"qa-{split}.json",
            {"gold": [[2.0, 20.0], [1.0, 10.0]], "exact": [1.0, 1.0], "rouge_l": [1.0, 1.0]},
        )
    for method, shift in (("sft", 1.0), ("dskd", 0.0)):
        for seed in (1, 2, 3):
            finished(out, runs.Run("qa", "two", method, 1e-3, seed), shift + 0.1 * seed)
    finished(out, runs.Run("qa", "two", "dskd", 1e-3, 1, "random init"), 0.5)
    failed = runs.Run("qa", "two", "uld", 1e-3, 1)
    (out / "logs").mkdir()
    plan.failure(out, failed.name).touch()
    (out / "logs" / f"{runs.Run('qa', 'two', 'uld', 1e-3, 2).name}.log").write_text("still running")
    (out / "logs" / f"{failed.name}.log").write_text("first\nValueError: expected a, got b in /home/me/file\n\n")
    return out


def test_records_come_back_as_they_were_written_and_hold_no_text(study, tmp_path):
    made = plan.all_records(table.SMALL, study)
    records.write(tmp_path / "r.jsonl", made)
    assert "SECRET" not in (tmp_path / "r.jsonl").read_text(encoding="utf-8")
    back = records.read(tmp_path / "r.jsonl")
    assert back == made
    assert [record["kind"] for record in back].count("documents") == 2
    (heldout,) = (record for record in back if record.get("split") == "heldout")
    assert heldout["gold_bytes"] == [20, 10] and heldout["teacher_bytes"] == [18, 0]
    ran = {(r["method"], r["ablation"], r["seed"]): r for r in back if r["kind"] == "run"}
    assert set(ran) == {("sft", None, s) for s in (1, 2, 3)} | {("dskd", None, s) for s in (1, 2, 3)} | {
        ("dskd", "random init", 1),
        ("uld", None, 1),
    }
    one = ran["dskd", None, 2]
    assert one["heldout"]["gold_bits"] == [10.32, 4.2]
    assert one["heldout"]["rouge_l"] == [1.0, 0.333] and one["heldout"]["exact"] == [1, 0]
    assert one["curve"]["step"] == [4.0, 8.0] and one["curve"]["dskd/t2s_agreement"] == [0.5, 1.0]
    assert one["recipe"]["dskd"] == {"teacher": {"model": "./teacher-qa"}, **table.block("dskd")}
    assert one["environment"]["commit"] == "abcdef012" and one["memory"] == {"gpu_gib": 1.23}
    assert ran["uld", None, 1]["error"] == "ValueError: expected a, got b in"
    assert "heldout" not in ran["uld", None, 1]


def test_another_schema_is_refused(tmp_path):
    records.write(tmp_path / "r.jsonl", [{"kind": "run", "schema": 99}])
    with pytest.raises(ValueError, match=r"expected records of schema 1, got schema 99"):
        records.read(tmp_path / "r.jsonl")


def test_the_report_shows_the_means_the_differences_and_the_failures(study, tmp_path):
    made = report.sections(report.Study(plan.all_records(table.SMALL, study)))
    lines = made["comparison-qa-two"].splitlines()
    sft, dskd = (
        next(line for line in lines if line.startswith(f"| {name} |")) for name in ("SFT", "DSKD, projected target")
    )
    # (10.12 + 4 + 2 x 1.2) / 30 and one bit less for each of the two documents
    assert "| 0.551 |" in sft and "| 0.484 |" in dskd and "-0.067 [" in dskd
    assert next(line for line in lines if line.startswith("| teacher")).split(" | ")[2] == "0.100"
    assert made["overview"].splitlines()[0] == "| bits per byte, gold | short questions, two tokenizers |"
    assert "| DSKD, projected target | -0.067 [" in made["overview"] and "| SFT | 0.551 |" in made["overview"]
    assert "uld, rate 0.001, seed 1: ValueError" in made["failures"]
    assert "| random init | 1 |" in made["ablations-qa-two"]
    changes = made["changes"].splitlines()
    assert changes[0].startswith("| change to DSKD | seeds | two tokenizers: gold |")
    assert next(line for line in changes if line.startswith("| random init")).startswith("| random init | 1 | ")
    assert made["ablations-qa-two"].splitlines()[0].endswith("| GPU GiB |")
    assert "8 runs" not in made["facts"] and made["facts"].startswith("7 runs")
    text = "a\n<!-- small-facts -->\nold\n<!-- end -->\nb <!-- end -->\n"
    once = report.insert(text, made, "small")
    assert "old" not in once and made["facts"] in once and once.startswith("a\n") and once.endswith("b <!-- end -->\n")
    assert report.insert(once, made, "small") == once
    files = report.draw(report.Study(plan.all_records(table.SMALL, study)), tmp_path, "small")
    assert [file.name for file in files] == ["study-small-qa-two.svg"] and files[0].stat().st_size > 5000


NUMBERS = {"gold_bytes", "teacher_bytes", "gold_bits", "teacher_bits", "exact", "rouge_l", "same_as_teacher"}


def test_gradients_of_the_terms_are_shown_beside_each_other(tmp_path):
    file = tmp_path / "gradients.jsonl"
    probe = {"step": 21, "norm/ce": 0.5, "norm/t2s_kd": 0.123456, "cosine/t2s_kd": -0.25}
    file.write_text(json.dumps(probe) + "\n")
    made = records.gradients(runs.Run("qa", "two", "dskd", 1e-3, 4), file)
    assert made["probes"] == [probe | {"norm/t2s_kd": 0.1235}]
    table_text = report.gradients(report.Study([made]), "qa", "two")
    assert table_text.splitlines()[-1] == "| DSKD, projected target | 21 | 0.500 | 0.123 |  |  | -0.25 |  |  |"
    assert report.gradients(report.Study([]), "qa", "two") == "not measured"


@pytest.mark.skipif(not COMMITTED, reason="no records are committed yet")
@pytest.mark.parametrize("file", COMMITTED, ids=lambda file: file.stem)
def test_committed_records_hold_numbers_and_settings_only(file):
    found = records.read(file)
    sizes = {(r["task"], r["split"]): len(r["gold_bytes"]) for r in found if r["kind"] == "documents"}
    assert sizes and any("heldout" in r for r in found)
    kinds = {kind for r in found if r["kind"] == "documents" for kind in r["source"]}
    assert all(len(kind.split()) == 1 and len(kind) < 12 for kind in kinds)
    for made in found:
        for split in {"validation", "heldout"} & made.keys() if made["kind"] == "run" else ():
            for key, values in made[split].items():
                assert key in NUMBERS
                assert all(isinstance(value, int | float) for value in values)
        texts = [value for value in strings(made) if len(value) > 100 and value != made.get("error")]
        assert not texts, texts[:1]


def strings(value) -> list[str]:
    if isinstance(value, str):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [text for part in parts for text in strings(part)]


@pytest.mark.skipif(not COMMITTED, reason="no records are committed yet")
def test_every_run_that_is_warned_of_ended_behind_fine_tuning():
    """Of several hundred runs; of none with the teacher's own target, as none of these was harmed."""
    warned, replayed, bits = [], 0, {}

    def split(run):
        return "validation" if "validation" in run else "heldout"

    def place(run):
        """Of which runs the bits can be compared; a run of the real pair names its data and its steps."""
        of_run = tuple(run.get(key) for key in ("pair", "task", "data", "steps"))
        return *of_run, run["recipe"]["learning_rate"], split(run)

    def score(run):
        return sum(run[split(run)]["gold_bits"])

    for file in (*COMMITTED, ROOT / "benchmarks" / "real_pair" / "records" / "real_pair.jsonl"):
        found = [run for run in map(json.loads, file.read_text().splitlines()) if "curve" in run]
        for run in found:
            if run["recipe"]["dskd"].get("method") == "sft" and {"validation", "heldout"} & run.keys():
                bits[place(run)] = max(score(run), bits.get(place(run), 0.0))
        for run in (run for run in found if "dskd/kd" in run["curve"]):
            made = {**run["recipe"]["dskd"], **run.get("settings", {})}
            # What the plugin of the first records did, which kept no resolved settings.
            target = made.get("target", "projected") if made.get("method", "dskd") == "dskd" else None
            names = [name for name in run["curve"] if name.startswith("dskd/")]
            watch, replayed, said = Watch(target=target), replayed + 1, []
            lines = zip(run["curve"]["step"], *(run["curve"][name] for name in names), strict=True)
            for step, *values in lines:
                means = zip((name.removeprefix("dskd/") for name in names), values, strict=True)
                said += watch.see({name: value for name, value in means if value is not None}, step)
            if said:
                assert target == "projected", said
                assert score(run) > bits[place(run)], said
                warned.append(run.get("setting"))
    assert replayed > 200 and len(warned) > 10 and "dskd_projected" in warned


@pytest.mark.skipif(not COMMITTED, reason="no records are committed yet")
def test_the_tables_of_the_page_are_those_of_the_records():
    text = report.PAGE.read_text(encoding="utf-8")
    for file in COMMITTED:
        made = report.sections(report.Study(records.read(file)))
        assert report.insert(text, made, file.stem) == text
        for name in made:
            assert f"<!-- {file.stem}-{name} -->" in text


@needs_data
@pytest.mark.skipif(not COMMITTED, reason="no records are committed yet")
def test_no_question_or_answer_of_the_data_is_in_the_records(monkeypatch):
    monkeypatch.setenv("DSKD_DATA", str(DATA))
    found = [data.text_splits(size, data.data_folder()) for size in table.SIZES.values()]
    rows = [r for splits in found for split in ("heldout", "validation", "train") for r in splits[split]]
    parts = [turn["content"] for row in rows for turn in row["messages"]]
    for file in COMMITTED:
        text = file.read_text(encoding="utf-8")
        assert not [part for part in parts if len(part) > 12 and json.dumps(part, ensure_ascii=False)[1:-1] in text]


# -- data ------------------------------------------------------------------------------------------------------------


@needs_data
def test_no_question_is_in_two_splits_and_students_see_a_part_of_the_teachers_rows(monkeypatch, tmp_path):
    monkeypatch.setenv("DSKD_DATA", str(DATA))
    size = table.SMALL
    data.prepare(size, tmp_path)
    for task in ("qa", "text"):
        rows = {
            split: data.read(tmp_path / f"{task}-{split}.jsonl")
            for split in ("teacher", "train", "validation", "heldout")
        }
        assert {split: len(found) for split, found in rows.items()} == {
            "teacher": size.teacher_rows[task],
            "train": size.rows[task],
            "validation": size.validation[task],
            "heldout": size.heldout[task],
        }
        assert rows["train"] == rows["teacher"][: len(rows["train"])]
        asked = [{row["messages"][1]["content"] for row in rows[s]} for s in ("teacher", "validation", "heldout")]
        assert not any(one & other for one, other in itertools.combinations(asked, 2))
        prose = (tmp_path / "prose.jsonl").read_text(encoding="utf-8")
        assert not [q for q in asked[1] | asked[2] if json.dumps(q, ensure_ascii=False)[1:-1] in prose]


def test_rows_come_back_whatever_they_hold(tmp_path):
    rows = [{"text": "one\u2028two\x85three\nfour\r\n"}, {"text": ""}]
    data.write(rows, tmp_path / "rows.jsonl")
    assert data.read(tmp_path / "rows.jsonl") == rows


def test_missing_data_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("DSKD_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"DSKD_DATA: expected a folder .* got .*nowhere"):
        data.data_folder()


def test_the_students_tokenizer_is_sentencepiece_with_byte_fallback():
    from dskd_plugin.text.vocabularies import token_table

    rng = random.Random(2)
    words = ["apple", "river", "counts", "eleven", "the", "of", "and", "stones", "near", "house"]
    texts = [" ".join(rng.choice(words) for _ in range(12)) + f" {rng.randrange(100)}." for _ in range(300)]
    tokenizer = pairs.sentencepiece_tokenizer(texts, vocab_size=340)
    for text in ("the river counts eleven stones", "a 你好 b", "  two\nlines "):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    found = token_table(tokenizer)
    assert found.kind == "sentencepiece" and len(found.byte_tokens) == 256
    assert tokenizer.tokenize("47") == ["▁", "4", "7"]


@pytest.fixture(scope="module")
def small_teacher(tmp_path_factory):
    """A Llama of six layers with tied embeddings and a byte-level tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from quickstart.models import train_tokenizer

    folder = tmp_path_factory.mktemp("teacher")
    tokenizer = train_tokenizer(TEXTS, vocab_size=400)
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 6}
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    config = LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=True, **shape, **ids)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


TEXTS = ["the river counts eleven stones near the old house", "an apple and two houses of stone"] * 40


def test_a_student_cut_from_the_teacher_is_the_teacher_without_some_layers(small_teacher, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    pairs.create_student(table.Student("teacher", layers=3), TEXTS, small_teacher, tmp_path, seed=1)
    student, teacher = (AutoModelForCausalLM.from_pretrained(folder) for folder in (tmp_path, small_teacher))
    assert student.config.num_hidden_layers == 3
    teacher.model.layers = torch.nn.ModuleList(teacher.model.layers[i] for i in (0, 2, 5))
    ids = AutoTokenizer.from_pretrained(tmp_path)(TEXTS[0], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        found, expected = (model(ids, use_cache=False).logits for model in (student, teacher))
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        # The layers know their place in the cache.
        cached = student(ids[:, :4], use_cache=True)
        step = student(ids[:, 4:5], past_key_values=cached.past_key_values, use_cache=True).logits
    torch.testing.assert_close(step[:, -1], expected[:, 4], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"layers: expected 2 to 6.* got 7"):
        pairs.create_student(table.Student("teacher", layers=7), TEXTS, small_teacher, tmp_path, seed=1)


def test_a_student_moved_to_another_tokenizer_keeps_the_meaning_of_its_tokens(small_teacher, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    shape = table.Student("sentencepiece", layers=2, vocab_size=320)
    pairs.create_student(shape, TEXTS, small_teacher, tmp_path, seed=1)
    student, teacher = (AutoModelForCausalLM.from_pretrained(folder) for folder in (tmp_path, small_teacher))
    new, old = (AutoTokenizer.from_pretrained(folder) for folder in (tmp_path, small_teacher))
    rows, known = (model.get_input_embeddings().weight for model in (student, teacher))
    assert len(rows) == len(new) and student.config.eos_token_id == new.eos_token_id
    for piece, text in (("\u2581river", " river"), ("s", "s")):
        ids = old.encode(text, add_special_tokens=False)
        expected = sum(known[i] for i in ids) / len(ids)
        assert rows[new.convert_tokens_to_ids(piece)].tolist() == pytest.approx(expected.tolist(), abs=1e-6)
    mean = known.mean(0).tolist()
    assert rows[new.convert_tokens_to_ids("<0xE4>")].tolist() == pytest.approx(mean, abs=1e-6)
    assert rows[new.eos_token_id].tolist() == known[old.eos_token_id].tolist()
    assert student.get_output_embeddings().weight is rows


def test_records_of_another_folder_stay_beside_the_new_ones():
    def run(method, seed, value):
        return {"kind": "run", "task": "qa", "pair": "one", "method": method, "seed": seed, "value": value}

    documents = {"kind": "documents", "task": "qa", "split": "heldout", "gold_bytes": [3, 4]}
    earlier = [documents, run("sft", 1, 0), run("kd", 1, 0)]
    failed = {**run("kd", 1, 9), "error": "stopped"}
    made = [documents, run("sft", 1, 9), run("sft", 2, 9), failed]
    assert records.merged(earlier, made) == [documents, run("sft", 1, 9), run("kd", 1, 0), run("sft", 2, 9)]
    with pytest.raises(ValueError, match="expected the documents of qa, heldout as in the file, got others"):
        records.merged(earlier, [{**documents, "gold_bytes": [3, 5]}])


# -- launching -------------------------------------------------------------------------------------------------------


def test_a_failed_job_stops_no_other_and_leaves_its_log(tmp_path):
    program = (
        "from pathlib import Path\nprint(f'job {number}')\n"
        "if number == 1: raise RuntimeError('broken on purpose')\n"
        "Path(folder, f'{number}.done').touch()"
    )
    works = [partial(exec, program, {"number": n, "folder": str(tmp_path)}) for n in range(4)]
    jobs = [launch.Job(str(n), tmp_path / f"{n}.log", work) for n, work in enumerate(works)]
    outcomes = {outcome.job.name: outcome.ok for outcome in launch.run(jobs, at_once=2)}
    assert outcomes == {"0": True, "1": False, "2": True, "3": True}
    assert {file.stem for file in tmp_path.glob("*.done")} == {"0", "2", "3"}
    assert "broken on purpose" in (tmp_path / "1.log").read_text() and "job 3" in (tmp_path / "3.log").read_text()


@pytest.mark.parametrize("visible", [None, "3,5"])
def test_the_gpu_is_hidden_while_libraries_are_imported_and_shown_to_the_children(tmp_path, visible):
    (tmp_path / "sees_while_imported.py").write_text(
        "import os\nfrom pathlib import Path\n"
        f"Path({str(tmp_path)!r}, 'imports').write_text(repr(os.environ.get('CUDA_VISIBLE_DEVICES')))\n"
    )
    program = f"""
from functools import partial
from pathlib import Path
from benchmarks.study import launch
from quickstart import forked

forked.MODULES = ("sees_while_imported",)
launch.preload()
launch.preload()
work = partial(exec, "import os; print(repr(os.environ.get('CUDA_VISIBLE_DEVICES')))", {{}})
job = launch.Job("child", Path({str(tmp_path)!r}) / "child", work)
assert [outcome.ok for outcome in launch.run([job], at_once=1)] == [True]
"""
    environment = {key: value for key, value in os.environ.items() if key != "CUDA_VISIBLE_DEVICES"}
    environment |= {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "eval"), str(tmp_path)])
    subprocess.run([sys.executable, "-c", program], check=True, env=environment, cwd=ROOT, timeout=300)
    assert (tmp_path / "imports").read_text() == repr("")
    assert (tmp_path / "child").read_text().strip() == repr(visible)


def test_stopping_ends_the_jobs_that_run(tmp_path):
    program = "import os, time\nfrom pathlib import Path\nPath(file).write_text(str(os.getpid()))\ntime.sleep(600)"
    file = tmp_path / "pid"
    work = partial(exec, program, {"file": str(file)})
    outcomes = launch.run([launch.Job("long", tmp_path / "long.log", work)], at_once=1)

    def stop(*_):
        if file.is_file() and file.read_text():
            raise KeyboardInterrupt

    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 0.5, 0.5)
    try:
        with pytest.raises(KeyboardInterrupt):
            next(outcomes)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
    assert not psutil.pid_exists(int(file.read_text()))


# -- the teacher's states --------------------------------------------------------------------------------------------


class Source:
    """Its hidden state at a token is the token and its place; it remembers which lengths it was asked for."""

    packed = False

    def __init__(self):
        self.calls = []

    def rows(self, ids_T, lengths, bins, rows_N):
        self.calls.append(lengths.tolist())
        place = torch.cat([torch.arange(int(length)) for length in lengths])
        return torch.stack([ids_T, place], dim=1).float()[rows_N]


def test_kept_states_are_the_teachers_own_and_new_rows_are_computed(tmp_path):
    from benchmarks.study import states

    bins, rows_N = torch.tensor([2]), torch.tensor([1, 4])
    batch = torch.tensor([5, 6, 7, 8, 9]), torch.tensor([2, 3])
    again = torch.tensor([7, 8, 9, 5, 6, 1]), torch.tensor([3, 2, 1])
    file, source = states.File(tmp_path / "states.pt"), Source()
    kept = states.Kept(source, file)
    assert torch.equal(kept.rows(*batch, bins, rows_N), Source().rows(*batch, bins, rows_N))
    assert torch.equal(kept.rows(*again, bins, rows_N), Source().rows(*again, bins, rows_N))
    assert source.calls == [[2, 3], [1]]
    file.save()
    fresh = Source()
    kept = states.Kept(fresh, states.File(tmp_path / "states.pt"))
    assert torch.equal(kept.rows(*batch, bins, rows_N), Source().rows(*batch, bins, rows_N)) and not fresh.calls
