"""Axolotl's real data pipeline with both sides: masks, templates, long rows, dataset types."""

import json

import pytest
import yaml


@pytest.fixture
def prepare(recipe, tmp_path):
    """Rows of the first dataset after Axolotl's pipeline, the student's tokenizer and the teacher's."""
    from axolotl.integrations.base import PluginManager

    from dskd_plugin import dataset

    PluginManager._instance = None

    def prepare(rows=None, block=None, **changes):
        from axolotl.cli.args import TrainerCliArgs
        from axolotl.cli.config import load_cfg
        from axolotl.common.datasets import load_datasets
        from axolotl.loaders import load_tokenizer

        changed = {**recipe, **changes, "dskd": {**recipe["dskd"], **(block or {})}}
        if rows is not None:
            file = tmp_path / "rows.jsonl"
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
            changed["datasets"] = [{**changed["datasets"][0], "path": str(file)}]
        file = tmp_path / "recipe.yaml"
        file.write_text(yaml.safe_dump(changed))
        cfg = load_cfg(str(file))
        data = load_datasets(cfg=cfg, cli_args=TrainerCliArgs()).train_dataset
        reader = dataset._reader
        return sorted(data, key=lambda row: row["input_ids"]), load_tokenizer(cfg), reader.tokenizer

    yield prepare
    PluginManager._instance = None
    dataset.install(None)


def conversation(*texts):
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[k % 2], "content": text} for k, text in enumerate(texts)]}


def pieces(tokenizer, ids, positions):
    return [tokenizer.decode([ids[p]]) for p in positions]


def check_pairs(row, student, teacher):
    """Every pair of text tokens shows the same text; roles pair with roles."""
    for s, t in zip(row["aligned_student"], row["aligned_teacher"], strict=True):
        ours, theirs = row["input_ids"][s], row["teacher_input_ids"][t]
        assert row["labels"][s] != -100
        if ours in student.all_special_ids or theirs in teacher.all_special_ids:
            assert (ours, theirs) == (student.eos_token_id, teacher.eos_token_id)
        elif "\ufffd" not in student.decode([ours]) + teacher.decode([theirs]):
            assert student.decode([ours]).strip() == teacher.decode([theirs]).strip()


def test_both_sides_read_the_conversation_in_their_own_template(prepare):
    rows, student, teacher = prepare([conversation("red river", "blue stone.", "twelve", "the lamp\n- item")])
    (row,) = rows
    assert student.decode(row["input_ids"]).startswith("<|im_start|>user\nred river<|im_end|>")
    assert (
        teacher.decode(row["teacher_input_ids"])
        == "<s>[INST] red river [/INST] blue stone.</s>[INST] twelve [/INST] the lamp\n- item</s>"
    )
    check_pairs(row, student, teacher)
    ends = [s for s in row["aligned_student"] if row["input_ids"][s] == student.eos_token_id]
    assert len(ends) == 2
    said = "".join(pieces(student, row["input_ids"], row["aligned_student"]))
    assert said.count("<|im_end|>") == 2 and "red" not in said and "twelve" not in said


@pytest.mark.parametrize(
    ("options", "trained", "ends"),
    [
        ({}, ["blue stone", "lamp"], 2),
        ({"roles_to_train": ["user"]}, ["red river", "twelve"], 2),
        ({"roles_to_train": ["user", "assistant"]}, ["red river", "blue stone", "twelve", "lamp"], 4),
        ({"train_on_eos": "last"}, ["blue stone", "lamp"], 1),
        ({"train_on_eos": "none"}, ["blue stone", "lamp"], 0),
    ],
)
def test_options_of_chat_template_mask_both_sides(prepare, recipe, options, trained, ends):
    datasets = [{**recipe["datasets"][0], **options}]
    (row,), student, teacher = prepare([conversation("red river", "blue stone", "twelve", "lamp")], datasets=datasets)
    check_pairs(row, student, teacher)
    labelled = student.decode([label for label in row["labels"] if label != -100])
    assert all(text in labelled for text in trained)
    pairs = {s for s in row["aligned_student"] if row["input_ids"][s] == student.eos_token_id}
    # The teacher's template has no end of a user turn.
    assert len(pairs) == min(ends, 2) if "user" not in options.get("roles_to_train", ()) else True
    assert len(row["aligned_student"]) > len(pairs)


@pytest.mark.parametrize(("strategy", "kept"), [("drop", 1), ("truncate", 2), ("raise", None)])
def test_long_rows(prepare, tiny, strategy, kept):
    rows = [conversation("red", "blue stone " * 3), conversation("red", "blue stone " * 30)]
    block = {"teacher": {"model": tiny["teacher"], "dtype": "float32", "sequence_len": 40}}
    if kept is None:
        with pytest.raises(ValueError, match="expected teacher rows of at most 40 tokens"):
            prepare(rows, block, excess_length_strategy=strategy)
        return
    found, student, teacher = prepare(rows, block, excess_length_strategy=strategy)
    assert len(found) == kept
    for row in found:
        assert len(row["teacher_input_ids"]) <= 40
        check_pairs(row, student, teacher)


TYPES = {
    "alpaca": "alpaca",
    "custom": {
        "field_instruction": "instruction",
        "field_output": "output",
        "format": "Q: {instruction}\nA: ",
        "no_input_format": "Q: {instruction}\nA: ",
    },
    "completion": "completion",
}


@pytest.mark.parametrize("kind", TYPES)
def test_other_dataset_types(prepare, recipe, tiny, kind):
    datasets = [{"path": tiny["data"], "ds_type": "json", "type": TYPES[kind]}]
    rows, student, teacher = prepare(datasets=datasets, sequence_len=64 if kind == "completion" else 256)
    assert len(rows) > 48 if kind == "completion" else len(rows) == 48
    aligned = sum(len(row["aligned_student"]) for row in rows)
    trained = sum(label != -100 for row in rows for label in row["labels"])
    assert aligned / trained > 0.85
    for row in rows:
        check_pairs(row, student, teacher)


def test_several_datasets_of_different_types(prepare, tiny):
    datasets = [
        {"path": tiny["data"], "ds_type": "json", "type": "chat_template"},
        {"path": tiny["data"], "ds_type": "json", "type": "alpaca"},
    ]
    rows, student, teacher = prepare(datasets=datasets)
    assert len(rows) == 96
    for row in rows:
        check_pairs(row, student, teacher)


def test_rows_without_a_response_are_refused(prepare, recipe):
    datasets = [{**recipe["datasets"][0], "roles_to_train": ["tool"]}]
    with pytest.raises(ValueError, match="expected rows with response tokens to train on, got none in 1 rows"):
        prepare([conversation("red", "blue")], datasets=datasets)


def test_template_that_cannot_render_a_row_is_named(prepare, tiny, tmp_path):
    template = tmp_path / "strict.jinja"
    template.write_text(
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
    )
    block = {"teacher": {"model": tiny["teacher"], "dtype": "float32", "chat_template": str(template)}}
    row = conversation("red", "blue stone")
    found, _, teacher = prepare([row], block)
    assert teacher.decode(found[0]["teacher_input_ids"]) == "[user]red</s>[assistant]blue stone</s>"
    row["messages"].insert(0, {"role": "system", "content": "lamp"})
    with pytest.raises(ValueError, match=r"dskd\.teacher\.chat_template: expected a template that renders"):
        prepare([row], block, dataset_prepared_path=str(tmp_path / "again"))


def test_tokenized_datasets_are_refused(prepare, recipe):
    rows = [{"input_ids": [1, 2], "attention_mask": [1, 1], "labels": [1, 2]}]
    with pytest.raises(ValueError, match="expected a dataset type that Axolotl tokenizes row by row"):
        prepare(rows)


def test_prepared_rows_are_reused(prepare, tmp_path):
    prepare([conversation("red", "blue stone")])
    prepared = sorted((tmp_path / "prepared").rglob("*.arrow"))
    stamps = [file.stat().st_mtime_ns for file in prepared]
    prepare([conversation("red", "blue stone")])
    assert prepared and [file.stat().st_mtime_ns for file in prepared] == stamps
