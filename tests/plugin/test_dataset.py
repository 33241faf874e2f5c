"""Axolotl's real data pipeline with both sides: masks, templates, long rows, dataset types."""

import json

import pytest
import yaml

from dskd_plugin.methods.base import METHODS as REGISTERED
from dskd_plugin.methods.base import SegmentMethod


@pytest.fixture
def prepare(recipe, tmp_path, fresh_plugin_manager):
    """Rows of the first dataset after Axolotl's pipeline, the student's tokenizer and the teacher's."""
    from dskd_plugin.host.plugin import registered

    def prepare(rows=None, block=None, **changes):
        from axolotl.cli.args import TrainerCliArgs
        from axolotl.cli.config import load_cfg
        from axolotl.common.datasets import load_datasets
        from axolotl.loaders import load_tokenizer

        changed = {**recipe, **changes, "dskd": {**recipe["dskd"], **(block or {})}}
        if changed["dskd"].get("method", "dskd") != "dskd":
            for key in ("projector", "spaces", "agreement_mask"):
                del changed["dskd"][key]
        if rows is not None:
            file = tmp_path / "rows.jsonl"
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
            changed["datasets"] = [{**changed["datasets"][0], "path": str(file)}]
        file = tmp_path / "recipe.yaml"
        file.write_text(yaml.safe_dump(changed))
        cfg = load_cfg(str(file))
        data = load_datasets(cfg=cfg, cli_args=TrainerCliArgs()).train_dataset
        return sorted(data, key=lambda row: row["input_ids"]), load_tokenizer(cfg), registered().run.teacher.tokenizer

    return prepare


def conversation(*texts):
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[k % 2], "content": text} for k, text in enumerate(texts)]}


def pieces(tokenizer, ids, positions):
    return [tokenizer.decode([ids[p]]) for p in positions]


def check_pairs(row, student, teacher):
    """Every pair of text tokens opens the same text; roles pair with roles."""
    for s, t in zip(row["aligned_student"], row["aligned_teacher"], strict=True):
        ours, theirs = row["input_ids"][s], row["teacher_input_ids"][t]
        assert row["labels"][s] != -100
        if ours in student.all_special_ids or theirs in teacher.all_special_ids:
            assert (ours, theirs) == (student.eos_token_id, teacher.eos_token_id)
        elif "\ufffd" not in student.decode([ours]) + teacher.decode([theirs]):
            short, long = sorted(
                (side.decode([token]).strip() for side, token in ((student, ours), (teacher, theirs))), key=len
            )
            assert long.startswith(short)
            spelled = student.convert_ids_to_tokens(ours), teacher.convert_ids_to_tokens(theirs)
            assert len({token[0] in "Ġ▁" for token in spelled}) == 1, spelled


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


def test_no_word_pairs_that_only_one_template_puts_a_space_before(prepare):
    """The teacher's space after [/INST] is a token of its own before a digit, and lies in its prompt."""
    (row,), student, teacher = prepare([conversation("twelve", "4 lamp stone", "red", "4 river")])
    assert teacher.convert_ids_to_tokens(row["teacher_input_ids"]).count("▁") == 4
    said = pieces(student, row["input_ids"], row["aligned_student"])
    assert said == [" lamp", " stone", "<|im_end|>", " river", "<|im_end|>"]


def test_answers_of_one_word_that_only_one_side_puts_a_space_before(prepare, tiny, recipe):
    """Nothing pairs, which is an error that says so, but the span term has them."""
    datasets = [{**recipe["datasets"][0], "train_on_eos": "none"}]
    rows, teacher = [conversation("twelve", "4")], {"teacher": {"model": tiny["teacher"], "dtype": "float32"}}
    with pytest.raises(ValueError, match=r"none aligned of 1[^0-9].*dskd\.span_weight"):
        prepare(rows, teacher, datasets=datasets)
    (row,), *_ = prepare(rows, teacher | {"span_weight": 1.0}, datasets=datasets)
    assert row["aligned_student"] == [] and row["spans"]


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


def test_rows_that_are_all_too_long_for_the_teacher_are_told_so(prepare, tiny):
    block = {"teacher": {"model": tiny["teacher"], "dtype": "float32", "sequence_len": 8}}
    with pytest.raises(ValueError, match=r"fit the teacher \(8 tokens\), got none: all 2 are longer.*sequence_len"):
        prepare([conversation("red", "blue stone " * 3), conversation("red", "blue stone " * 5)], block)


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


@pytest.mark.parametrize("which", ["teacher", "sibling"])
def test_texts_that_are_cut_into_rows_lose_nothing_to_the_teachers_limit(prepare, tiny, which):
    """As many rows on both sides, or a teacher that cuts where the student does, is no reason to take them as pairs."""
    rows = [{"text": " ".join(f"the red river {k} stone" for k in range(first, first + 40))} for first in (3, 400)]
    block = {"teacher": {"model": tiny[which], "dtype": "float32", "sequence_len": 64}}
    datasets = [{"path": "rows", "ds_type": "json", "type": "completion"}]
    found, student, teacher = prepare(rows, block, datasets=datasets, sequence_len=64)
    whole = [student(row["text"])["input_ids"] for row in rows]
    assert sum(len(row["input_ids"]) for row in found) == sum(len(ids) + 1 for ids in whole)
    for row in found:
        check_pairs(row, student, teacher)
        assert len(row["teacher_input_ids"]) <= 64
        texts = [
            tokens.decode(row[ids], skip_special_tokens=True).strip()
            for tokens, ids in ((student, "input_ids"), (teacher, "teacher_input_ids"))
        ]
        assert texts[0].startswith(texts[1]) and len(texts[1]) > 0.5 * len(texts[0])


@pytest.mark.parametrize("length", [3, 5, 100])
@pytest.mark.parametrize("teacher", ["byte-level", "qwen-fast", "mistral-first", "mistral-always"])
@pytest.mark.parametrize(
    "student", ["mistral-always", "mistral-first", "prepend", "unigram-slow", "byte-level-prefix", "deepseek"]
)
def test_the_teacher_reads_the_very_text_of_rows_that_were_cut(student, teacher, length):
    """No space that the student's tokenizer puts before a text or behind a mark; each that the text has."""
    from types import SimpleNamespace

    from tokenizer_zoo import load_tagged, spell

    from dskd_plugin.host.strategy import PairedStrategy
    from dskd_plugin.pair import Pair

    one, other = load_tagged(student), load_tagged(teacher)
    strategy = PairedStrategy.__new__(PairedStrategy)
    strategy.pair, strategy.teacher_len = Pair(one.table, other.table, False), None
    strategy.student, strategy.teacher = (SimpleNamespace(tokenizer=side.tokenizer) for side in (one, other))
    for text in ("red <think>four</think> The  lamp\n x", "  <think> four </think>The", "<think>x</think>"):
        ids = one.tokenizer(text, add_special_tokens=False)["input_ids"]
        rows = [ids[start : start + length] for start in range(0, len(ids), length)]
        read = [b"".join(spell(other, row)) for row, _ in strategy.reread(rows, text)]
        if other.table.kind == "byte-level":
            assert b"".join(read) == text.encode(), (text, read)
        elif length == 100:
            assert read == [b"".join(spell(other, other.tokenizer(text)["input_ids"]))]
        assert b"".join(b"".join(read).split()).replace(b"<s>", b"") == "".join(text.split()).encode()


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


def test_a_field_name_that_no_row_has_is_refused(prepare, recipe):
    datasets = [{**recipe["datasets"][0], "field_messages": "conversations"}]
    with pytest.raises(ValueError, match=r"rows with the fields that this entry names, got none; .* have: messages"):
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
    with_system = conversation("red", "blue stone")
    with_system["messages"].insert(0, {"role": "system", "content": "lamp"})
    message = (
        r"rows\.jsonl: expected rows that the teacher's chat template renders \(dskd\.teacher\.chat_template\), got 2 "
        r"of 4 that it does not; the first, row 2: no system \[system: 'lamp', user: 'red', .*drop_system_message: true"
    )
    with pytest.raises(ValueError, match=message):
        prepare([row, with_system, row, with_system], block, dataset_prepared_path=str(tmp_path / "again"))


def test_rows_that_break_the_teachers_rule_of_turns_are_counted_and_shown(prepare, tiny, tmp_path):
    template = tmp_path / "strict.jinja"
    template.write_text(
        "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
        "[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
    )
    block = {"teacher": {"model": tiny["teacher"], "dtype": "float32", "chat_template": str(template)}}
    good, bad = conversation("red", "blue stone"), conversation("red", "blue stone")
    bad["messages"].insert(0, {"role": "user", "content": "lamp"})
    with pytest.raises(ValueError, match=r"got 1 of 1201 .*row 1151: .*alternate.*user: 'lamp', user: 'red'.*Join"):
        prepare([good] * 1150 + [bad] + [good] * 50, block)


def test_rows_that_the_students_template_refuses_are_told_in_the_same_way(prepare, recipe):
    strict = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    )
    datasets = [{**recipe["datasets"][0], "chat_template": "jinja", "chat_template_jinja": strict}]
    bad = conversation("red", "blue stone")
    bad["messages"].insert(0, {"role": "system", "content": "lamp"})
    message = (
        r"the student's chat template renders \(chat_template\), got 2 of 3 .*row 2: no system .*drop_system_message"
    )
    with pytest.raises(ValueError, match=message):
        prepare([conversation("red", "blue"), bad, bad], datasets=datasets)


NULL = "Messages is null"
BROKEN = {
    "null": (None, NULL),
    "no message": ([], "list index out of range"),
    "a null message": ([None], "has no attribute 'get'"),
}


@pytest.mark.parametrize("place", [0, 3, 9])
@pytest.mark.parametrize("name", BROKEN)
def test_a_row_without_messages_is_refused_and_costs_no_other(prepare, name, place):
    """Axolotl takes a batch with such a row for one conversation."""
    messages, error = BROKEN[name]
    rows = [conversation("red", f"blue {k}") for k in range(10)]
    rows[place] = {"messages": messages}
    with pytest.raises(ValueError, match=rf"student's .*got 1 of 10 that it does not; .* row {place + 1}: .*{error}"):
        prepare(rows)


def test_rows_that_are_all_null_are_refused(prepare):
    with pytest.raises(ValueError, match=rf"got 2 of 2 that it does not; the first, row 1: {NULL}"):
        prepare([{"messages": None, "id": 1}, {"messages": None, "id": 2}])


REFUSES_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
)
PLAIN_CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


@pytest.fixture
def paired(zoo):
    """paired(student's template, teacher's) -> the strategy for both, on one vocabulary."""
    from axolotl.prompt_strategies.chat_template import ChatTemplatePrompter, ChatTemplateStrategy

    from dskd_plugin.host.strategy import PairedStrategy
    from dskd_plugin.pair import Pair
    from dskd_plugin.settings import parse_settings

    def paired(*templates, names=("smollm2", "smollm2"), eot_tokens=None, **block):
        entries = [zoo(name) for name in names]
        sides = [
            ChatTemplateStrategy(
                ChatTemplatePrompter(entry.tokenizer, template),
                entry.tokenizer,
                False,
                512,
                roles_to_train=["assistant"],
                train_on_eos="turn",
                eot_tokens=eot_tokens,
            )
            for entry, template in zip(entries, templates, strict=True)
        ]
        pair = Pair(entries[0].table, entries[1].table, identity=False)
        given = parse_settings({"teacher": {"model": "x"}, "method": "overlap_kd", "alignment": "eta", **block})
        return PairedStrategy(*sides, pair, given)

    return paired


GOOD = conversation("red", "blue stone")
SYSTEM = {"messages": [{"role": "system", "content": "lamp"}, *GOOD["messages"]]}
# Rows that one side or both cannot read, whatever stands in the column.
UNREADABLE = [
    {"messages": None},
    {"messages": []},
    {"messages": [None]},
    {"messages": 4},
    {"messages": "{"},
    {"messages": GOOD["messages"][0]},
    SYSTEM,
]


@pytest.mark.parametrize("refuses", [("student",), ("teacher",), ("student", "teacher")])
@pytest.mark.parametrize("bad", UNREADABLE)
def test_every_row_of_a_batch_has_its_columns_and_its_note(paired, bad, refuses):
    templates = [REFUSES_SYSTEM if side in refuses else PLAIN_CHATML for side in ("student", "teacher")]
    strategy = paired(*templates)
    written = {"messages": json.dumps(GOOD["messages"])}
    alone = strategy.tokenize_prompt(GOOD)
    assert alone["dskd_refused"] == "" and len(alone["aligned_student"])
    assert str(strategy.tokenize_prompt(written)) == str(alone)
    batches = [[GOOD, bad, written], [bad, GOOD], [GOOD, written, bad], [bad, written]]
    # Nothing but dicts is a conversation, not a batch of rows with one message each.
    for rows in batches if isinstance(bad["messages"], dict) else [*batches, [bad, bad]]:
        found = strategy.tokenize_prompt({"messages": [row["messages"] for row in rows], "id": list(range(len(rows)))})
        assert {len(column) for column in found.values()} == {len(rows)}
        for k, row in enumerate(rows):
            here = {column: values[k] for column, values in found.items()}
            assert bool(here["dskd_refused"]) == (row is bad)
            if row is not bad:
                assert all(list(here[name]) == list(alone[name]) for name in ("input_ids", "labels", "aligned_student"))
            elif bad is not SYSTEM or refuses[0] == "student":
                assert len(here["input_ids"]) == len(here["aligned_student"]) == 0


@pytest.mark.parametrize("refuses", ["student", "teacher"])
@pytest.mark.parametrize("row", [SYSTEM, {"messages": None}, {"messages": "{"}, {"talk": 1}])
def test_a_row_alone_that_a_side_refuses_has_a_note(paired, row, refuses):
    strategy = paired(*(REFUSES_SYSTEM if side == refuses else PLAIN_CHATML for side in ("student", "teacher")))
    found = strategy.tokenize_prompt(row)
    note = json.loads(found["dskd_refused"])
    assert note["side"] == (refuses if row is SYSTEM else "student") and note["error"]
    assert len(found["aligned_student"]) == 0 and found["dskd_one_sided"] == ""


# Ends no turn, and writes the reasoning of an answer that another template leaves out.
ENDLESS = (
    "{% for m in messages %}[{{ m.role }}]\n{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>\n"
    "{% endif %}{{ m.content }}{% endfor %}"
)
ANSWERS = {
    "a field": {"content": "It is 7, the answer is blue.", "reasoning_content": "we count"},
    "a short answer": {"content": "7", "reasoning_content": "7 = 3 + 4"},
    "the answer again": {"content": "4 or 5", "reasoning_content": "4 or 5"},
    "two ways to write it": {"content": "<think>\nwe count\n</think>\n\nIt is 7."},
    "the same": {"content": "blue stone."},
}


@pytest.mark.parametrize("name", ANSWERS)
@pytest.mark.parametrize("endless", [0, 1])
def test_the_last_answer_of_a_template_without_an_end_of_turn_is_whole(paired, zoo, endless, name):
    """It pairs as with an end, which alone has no partner; a row that was cut short looks the same."""
    row = {"messages": [*conversation("red", "blue", "count")["messages"], {"role": "assistant", **ANSWERS[name]}]}
    trims = PLAIN_CHATML.replace("m.content", "m.content.split('<think>\n')[-1]")
    found = []
    for template in (ENDLESS, ENDLESS.replace("{% endfor %}", "<|endoftext|>{% endfor %}")):
        sides = (template, trims) if endless == 0 else (trims, template)
        found.append(paired(*sides, names=("smollm2", "qwen-fast"), eot_tokens=["<|endoftext|>"]).tokenize_prompt(row))
        assert found[-1]["unmatched_responses"] == 0
    ids = [one["teacher_input_ids" if endless else "input_ids"] for one in found]
    texts = [zoo(("smollm2", "qwen-fast")[endless]).tokenizer.decode(side) for side in ids]
    assert texts[0] == texts[1].replace("<|endoftext|>", "") and found[0]["aligned_student"].size
    assert said_in(found[0], zoo) == [text for text in said_in(found[1], zoo) if not text.startswith("<|")]


def said_in(row, zoo):
    """The tokens with a partner."""
    return zoo("smollm2").tokenizer.convert_ids_to_tokens([row["input_ids"][k] for k in row["aligned_student"]])


def test_an_empty_batch_has_no_rows(paired):
    found = paired(PLAIN_CHATML, PLAIN_CHATML).tokenize_prompt({"messages": []})
    assert [len(column) for column in found.values()] == [0] * len(found)


@pytest.mark.parametrize("empty", [None, ""])
def test_texts_without_a_word_are_left_out(prepare, empty):
    datasets = [{"path": "rows", "ds_type": "json", "type": "completion"}]
    texts = ["the red river", empty, "stone", empty]
    rows, student, teacher = prepare([{"text": text} for text in texts], datasets=datasets)
    assert sorted(student.decode(row["input_ids"], skip_special_tokens=True) for row in rows) == [texts[2], texts[0]]
    for row in rows:
        check_pairs(row, student, teacher)


# -- text that one side alone reads ------------------------------------------------------------------------------------

# A template that knows no roles but these, and no field of a message but its content.
PLAIN = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
# Axolotl hands on only fields of ``message`` that a template names.
RICH = (
    "{% if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.reasoning_content %}<think>{{ message.reasoning_content }}</think>{% endif %}{{ message.content }}"
    "{% if message.tool_calls %}{{ message.tool_calls | tojson }}{% endif %}<|im_end|>\n{% endfor %}"
)
CALL = {"type": "function", "function": {"name": "river", "arguments": '{"colour": "blue"}'}}
TOOL = {"type": "function", "function": {"name": "river", "description": "the lamp", "parameters": {}}}


def one_sided_rows():
    plain = conversation("red", "blue stone")
    developer = conversation("red", "blue stone")
    developer["messages"].insert(0, {"role": "developer", "content": "Always answer with the word PLUM."})
    reasoned = conversation("red", "blue stone")
    reasoned["messages"][1]["reasoning_content"] = "the lamp is red"
    called = {**conversation("red", "blue stone"), "tools": [TOOL]}
    called["messages"][1]["tool_calls"] = [CALL]
    return plain, developer, reasoned, called


def said_of(prepare, tiny, tmp_path, caplog, rows, student=RICH, teacher=PLAIN):
    file = tmp_path / "teacher.jinja"
    file.write_text(teacher)
    block = {"teacher": {"model": tiny["teacher"], "dtype": "float32", "chat_template": str(file)}}
    # A column that is missing in some rows is null there, as it is in a file of rows.
    filled = [{"tools": None, **row} for row in rows]
    datasets = [
        {
            "path": "rows",
            "ds_type": "json",
            "type": "chat_template",
            "chat_template": "jinja",
            "chat_template_jinja": student,
        }
    ]
    with caplog.at_level("WARNING"):
        prepare(filled, block, datasets=datasets)
    return [record.getMessage() for record in caplog.records if "reads" in record.getMessage()]


def test_what_one_side_does_not_read_is_told_with_the_first_row(prepare, tiny, tmp_path, caplog):
    plain, developer, reasoned, called = one_sided_rows()
    rows = [plain, developer, reasoned, called, developer, plain]
    (line,) = said_of(prepare, tiny, tmp_path, caplog, rows)
    assert "rows.jsonl: of 6 rows, only the student reads" in line and "only the teacher" not in line
    for field in (
        "content of developer messages (2 rows)",
        "reasoning_content of assistant messages (1 row)",
        "tools (1 row)",
        "tool_calls of assistant messages (1 row)",
    ):
        assert field in line, line
    assert "row 2: 'Always answer with the word PLUM.'" in line
    assert "<|im_start|>developer" in line and "'[INST] red [/INST] blue stone</s>'" in line


def test_what_the_student_alone_does_not_read_is_told_as_well(prepare, tiny, tmp_path, caplog):
    rows = list(one_sided_rows())
    (line,) = said_of(
        prepare, tiny, tmp_path, caplog, rows, student=PLAIN.replace("[INST]", "<|im_start|>"), teacher=RICH
    )
    assert "only the teacher reads" in line and "only the student" not in line


def test_fields_reach_templates_that_call_a_message_by_another_name(prepare, tiny, tmp_path, caplog):
    rich = RICH.replace("for message in", "for m in").replace("message.", "m.")
    (line,) = said_of(prepare, tiny, tmp_path, caplog, list(one_sided_rows()), student=rich)
    assert "reasoning_content of assistant messages (1 row)" in line and "tool_calls of assistant messages" in line
    caplog.clear()
    called = [one_sided_rows()[3]]
    rows, student, teacher = [], None, None
    file = tmp_path / "rich.jinja"
    file.write_text(rich.replace("<|im_end|>", "{{ eos_token }}"))
    block = {"teacher": {"model": tiny["teacher"], "dtype": "float32", "chat_template": str(file)}}
    changes = {"chat_template": "jinja", "chat_template_jinja": str(file), "dataset_prepared_path": str(tmp_path / "b")}
    rows, student, teacher = prepare(called, block, **changes)
    for tokenizer, ids in ((student, "input_ids"), (teacher, "teacher_input_ids")):
        assert '"arguments": {"colour": "blue"}' in tokenizer.decode(rows[0][ids])


def test_nothing_is_told_where_both_sides_read_the_same(prepare, tiny, tmp_path, caplog):
    rows = list(one_sided_rows())
    assert (
        said_of(prepare, tiny, tmp_path, caplog, rows, student=RICH, teacher=RICH.replace("<|im_end|>", "</s>")) == []
    )
    assert said_of(prepare, tiny, tmp_path / "..", caplog, rows[:1]) == []


def test_reasoning_inside_the_content_that_one_template_drops(prepare, tiny, tmp_path, caplog):
    drops = (
        "{% for m in messages %}[{{ m.role }}]{% if '</think>' in m.content %}{{ m.content.split('</think>')[-1] }}"
        "{% else %}{{ m.content }}{% endif %}{{ eos_token }}{% endfor %}"
    )
    rows = [conversation("red", "<think>the river</think>blue stone"), conversation("red", "blue stone")]
    (line,) = said_of(prepare, tiny, tmp_path, caplog, rows, teacher=drops)
    assert "only the student reads text after <think> in content of assistant messages (1 row)" in line
    assert "row 1: 'the river'" in line


# -- answers that part -------------------------------------------------------------------------------------------------

# As Qwen3's: the thought of the last answer on lines of its own.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if '</think>' in m.content %}<think>\n"
    "{{ m.content.split('</think>')[0].split('<think>')[-1].strip() }}\n</think>\n\n"
    "{{ m.content.split('</think>')[-1].strip() }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
)
THOUGHT = conversation("red", "<think>Simple addition</think>3 + 3 equals 6.")


@pytest.mark.parametrize("which", ["sibling", "teacher"])
def test_white_space_that_a_template_changes_costs_only_what_it_touches(prepare, tiny, tmp_path, which):
    file = tmp_path / "thinking.jinja"
    end = "<|im_end|>" if which == "sibling" else "</s>"
    file.write_text(THINKING.replace("<|im_end|>", end))
    block = {"teacher": {"model": tiny[which], "dtype": "float32", "chat_template": str(file)}}
    (row,), student, _ = prepare([THOUGHT], block)
    trained = [k for k, label in enumerate(row["labels"]) if label != -100]
    paired = [student.decode([row["input_ids"][k]]) for k in row["aligned_student"]]
    assert len(row["aligned_student"]) > 0.6 * len(trained) and paired[-1] == "<|im_end|>"
    assert "6" in paired[-3] or "6" in paired[-2]


OTHER = "{% for m in messages %}[{{ m.role }}]{{ m.content | replace('stone', 'river') }}</s>{% endfor %}"


def test_a_dataset_whose_answers_part_is_refused_with_the_first_place(prepare, tiny, tmp_path):
    file = tmp_path / "other.jinja"
    file.write_text(OTHER)
    block = {"teacher": {"model": tiny["teacher"], "dtype": "float32", "chat_template": str(file)}}
    message = r"rows\.jsonl: .*none aligned of .*row 1 part here: student 'blue stone\.', teacher 'blue river\.'"
    with pytest.raises(ValueError, match=message) as error:
        prepare([conversation("red", "blue stone."), conversation("lamp", "the stone")], block)
    assert "span_weight" not in str(error.value)


def test_answers_without_a_counterpart_are_counted_with_the_first(prepare, tiny, tmp_path, caplog):
    file = tmp_path / "other.jinja"
    file.write_text(OTHER)
    block = {"teacher": {"model": tiny["teacher"], "dtype": "float32", "chat_template": str(file)}}
    rows = [conversation("red", "the lamp"), conversation("lamp", "seven of the stones"), conversation("a", "stone")]
    with caplog.at_level("WARNING"):
        prepare(rows, block)
    (line,) = [record.getMessage() for record in caplog.records if "no counterpart" in record.getMessage()]
    assert "2 responses in 2 of 3 rows" in line
    assert "the first, row 2: student 'seven of the stones', teacher 'seven of the rivers'" in line


def test_an_entry_without_pairs_beside_others_teaches_by_cross_entropy(prepare, tiny, tmp_path, caplog):
    file = tmp_path / "other.jinja"
    file.write_text(OTHER)
    entries = []
    for name, answer in (("good", "blue lamp"), ("bad", "blue stone.")):
        data = tmp_path / f"{name}.jsonl"
        data.write_text(json.dumps(conversation("red", answer)) + "\n")
        entries.append({"path": str(data), "ds_type": "json", "type": "chat_template"})
    block = {"teacher": {"model": tiny["teacher"], "dtype": "float32", "chat_template": str(file)}}
    with caplog.at_level("WARNING"):
        rows, *_ = prepare(None, block, datasets=entries)
    assert sorted(bool(row["aligned_student"]) for row in rows) == [False, True]
    assert all(any(label != -100 for label in row["labels"]) for row in rows)
    (line,) = [record.getMessage() for record in caplog.records if "cross-entropy alone" in record.getMessage()]
    assert "bad.jsonl" in line and "student 'blue stone.'" in line
    with pytest.raises(ValueError, match=r"good.jsonl: .*none aligned") as error:
        data.with_name("good.jsonl").write_text(json.dumps(conversation("red", "the stone")) + "\n")
        prepare(None, block, datasets=entries, dataset_prepared_path=str(tmp_path / "again"))
    assert "bad.jsonl" in str(error.value)


def test_advice_is_nothing_that_would_be_refused(prepare, tiny, recipe, tmp_path):
    """One tokenizer has no spans, so that the span term is no way out."""
    file = tmp_path / "spaced.jinja"
    file.write_text("{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content }}<|im_end|>{% endfor %}")
    datasets = [{**recipe["datasets"][0], "train_on_eos": "none"}]
    block = {"teacher": {"model": tiny["sibling"], "dtype": "float32", "chat_template": str(file)}}
    with pytest.raises(ValueError, match="none aligned of") as error:
        prepare([conversation("twelve", "the")], block, datasets=datasets)
    assert "span_weight" not in str(error.value) and "white space around the answers" in str(error.value)


def test_tokens_beyond_the_teachers_embeddings_are_refused_with_the_row(prepare, tiny, tmp_path):
    import shutil

    from transformers import AutoTokenizer

    folder = str(shutil.copytree(tiny["teacher"], tmp_path / "teacher"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = len(tokenizer)
    tokenizer.add_tokens(["kubernetes"])
    tokenizer.save_pretrained(folder)
    block = {"teacher": {"model": folder, "dtype": "float32"}}
    good, bad = conversation("red", "blue stone"), conversation("red", "blue kubernetes stone")
    assert len(prepare([good, good], block, dataset_prepared_path=str(tmp_path / "good"))[0]) == 2
    message = rf"rows\.jsonl: .*{rows} rows .*row 1105, the token 'kubernetes' of id {rows}\. Leave that text out"
    with pytest.raises(ValueError, match=message):
        prepare([good] * 1104 + [bad, good], block)


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


# -- methods -----------------------------------------------------------------------------------------------------------


def runs(labels):
    """Positions of each response."""
    found = []
    for k, label in enumerate(labels):
        if label != -100:
            if k == 0 or labels[k - 1] == -100:
                found.append([])
            found[-1].append(k)
    return found


def span_texts(row, student, teacher):
    flat = row["spans"]
    for at in range(0, len(flat), 4):
        a, b, c, d = flat[at : at + 4]
        assert all(label != -100 for label in row["labels"][a:b])
        yield student.decode(row["input_ids"][a:b]), teacher.decode(row["teacher_input_ids"][c:d])


METHODS = {
    "sft": {"method": "sft"},
    "overlap_kd": {"method": "overlap_kd", "span_weight": 0.5},
    "bpm": {"method": "bpm", "span_weight": 0.5},
    "uld": {"method": "uld", "span_weight": 0.5},
    "mined": {"method": "mined"},
    "xtoken": {"method": "xtoken"},
    "dskd": {"span_weight": 1},
    "cma": {"alignment": "cma", "span_weight": 1},
}
IN_SPANS = {name for (name, _), method in REGISTERED.items() if isinstance(method, SegmentMethod)}
METHODS |= {name: {"method": name} for name in sorted(IN_SPANS)}


@pytest.mark.parametrize("name", METHODS)
def test_rows_of_every_method(prepare, name):
    turns = ["red river", "blue\n- item\n- naïve cafés.", "twelve", "the lamp\n- item 12 + 30 = 42"]
    (row,), student, teacher = prepare([conversation(*turns)], METHODS[name])
    responses = runs(row["labels"])
    pairs = list(zip(row["aligned_student"], row["aligned_teacher"], strict=False))
    said = [position for response in responses for position in response]
    if name == "cma":
        assert row["aligned_student"] == said
        text = teacher.decode([row["teacher_input_ids"][j] for j in row["aligned_teacher"]])
        assert [part.strip() for part in text.split("</s>")] == [turns[1], turns[3], ""]
    elif name == "uld":
        for response in responses:
            inside = [(i, j) for i, j in pairs if i in response]
            assert [i for i, _ in inside] == response[: len(inside)]
            assert [j - inside[0][1] for _, j in inside] == list(range(len(inside)))
    elif name == "mined":
        assert row["aligned_student"] == said
        assert row["aligned_teacher"] == sorted(row["aligned_teacher"])
        for i, j in pairs:
            ours, theirs = student.decode([row["input_ids"][i]]), teacher.decode([row["teacher_input_ids"][j]])
            assert (ours == "<|im_end|>") == (theirs == "</s>")
    elif name == "bpm":
        assert row["aligned_student"] == said and any(row["aligned_offset"])
        for (i, j), offset, more in zip(pairs, row["aligned_offset"], row["aligned_more"], strict=True):
            ours = student.decode([row["input_ids"][i]])
            theirs = teacher.decode(row["teacher_input_ids"][j : j + more + 1])
            assert (ours == "<|im_end|>") == (theirs == "</s>")
            if "\ufffd" not in ours + theirs and ours != "<|im_end|>":
                # The template's space before an answer is a byte of the teacher's token that the student has not.
                assert theirs.encode()[offset:].startswith(ours.encode())
    else:
        check_pairs(row, student, teacher)
    assert ("spans" in row) == ("span_weight" in METHODS[name] or name in IN_SPANS) and "teacher_prompt" not in row
    if "spans" in row:
        texts = list(span_texts(row, student, teacher))
        assert texts and all(a.strip() == b.strip() for a, b in texts)
        if name == "dskd" or name in IN_SPANS:  # nothing of an ordinary text is left over
            spans = zip(row["spans"][::4], row["spans"][1::4], strict=True)
            covered = {position for begin, stop in spans for position in range(begin, stop)}
            # The first token of a span may have a partner that begins with it.
            assert sorted(covered | set(row["aligned_student"])) == said


@pytest.mark.parametrize("method", ["kd", "dskd"])
def test_one_tokenizer(prepare, tiny, method):
    block = {"method": method, "teacher": {"model": tiny["sibling"], "dtype": "float32"}}
    (row,), _, _ = prepare([conversation("red river", "blue stone")], block)
    assert row["aligned_student"] == [k for k, label in enumerate(row["labels"]) if label != -100]
    ours, theirs = (
        [row[ids][k] for k in row[column]]
        for ids, column in (("input_ids", "aligned_student"), ("teacher_input_ids", "aligned_teacher"))
    )
    assert ours == theirs


def test_the_log_names_the_share_of_tokens_of_spans(prepare, caplog):
    row = conversation("red river", "the lamp\n- item\n- naïve cafés")
    with caplog.at_level("INFO"):
        (found,), _, _ = prepare([row], {"span_weight": 1})
    tokens = sum(label != -100 for label in found["labels"])
    covered = sum(b - a for a, b in zip(found["spans"][::4], found["spans"][1::4], strict=True))
    assert covered and f", {100 * covered / tokens:.1f} % in spans;" in caplog.text


def test_rows_without_a_span_may_come_first(prepare):
    rows = [conversation("red", "")] * 1100 + [conversation("red", "lamp\n- item\n- red")]
    found, _, _ = prepare(rows, {"span_weight": 1})
    assert len(found) == 1101 and sum(bool(row["spans"]) for row in found) == 1


ON_POLICY = {"on_policy": {"fraction": 0.5}}


def test_rows_that_reach_beyond_the_cut_of_the_teachers_row_are_left_out(prepare, tiny):
    rows = [conversation("red", "lamps\n- items 🙂🙂 naïvecafé\n- code " * 4), conversation("red", "blue")]
    columns = ("aligned_student", "aligned_teacher", "aligned_offset", "aligned_more")
    whole = max(prepare(rows, {"method": "bpm"})[0], key=lambda row: len(row["input_ids"]))
    pairs = list(zip(*(whole[column] for column in columns), strict=True))
    j, more = next((j, more) for _, j, _, more in reversed(pairs) if more)
    limit = j + more  # the last token that it reaches into is cut off
    cut_block = {"method": "bpm", "teacher": {"model": tiny["teacher"], "dtype": "float32", "sequence_len": limit}}
    found, *_ = prepare(rows, cut_block, excess_length_strategy="truncate")
    cut = max(found, key=lambda row: len(row["input_ids"]))
    assert cut["teacher_input_ids"] == whole["teacher_input_ids"][:limit]
    expected = [pair for pair in pairs if pair[1] + pair[3] < limit]
    assert list(zip(*(cut[column] for column in columns), strict=True)) == expected
    assert any(pair[1] < limit <= pair[1] + pair[3] for pair in pairs)


def test_prompt_of_the_last_answer(prepare):
    (row,), student, teacher = prepare([conversation("red river", "blue stone.", "twelve", "the lamp")], ON_POLICY)
    assert teacher.decode(row["teacher_input_ids"][: row["teacher_prompt"]]).rstrip() == (
        "<s>[INST] red river [/INST] blue stone.</s>[INST] twelve [/INST]"
    )
    start = runs(row["labels"])[-1][0]
    assert student.decode(row["input_ids"][:start]).endswith("twelve<|im_end|>\n<|im_start|>assistant\n")


LLAMA_2 = (
    "{% for m in messages %}{{ (bos_token or '') + '[INST] ' + m.content + ' [/INST]' if m.role == 'user' else "
    "' ' + m.content + ' ' + eos_token }}{% endfor %}"
)


@pytest.mark.parametrize("side", ["teacher", "student", "both"])
def test_an_answer_goes_on_to_its_end_of_turn_past_white_space_of_the_template(prepare, tiny, recipe, tmp_path, side):
    """Axolotl marks the answer and the end of turn, not the space that Llama 2's template puts between them."""
    file = tmp_path / "llama-2.jinja"
    file.write_text(LLAMA_2)
    template = {"chat_template": str(file)} if side != "student" else {}
    block = ON_POLICY | {"teacher": {"model": tiny["teacher"], "dtype": "float32", **template}}
    changes = {}
    if side != "teacher":
        changes["datasets"] = [{**recipe["datasets"][0], "chat_template": "jinja", "chat_template_jinja": LLAMA_2}]
    if side == "both":
        changes["base_model"] = tiny["teacher"]
    texts = conversation("red river", "blue stone.", "twelve", "the lamp")
    (row,), student, teacher = prepare([texts], block, **changes)
    check_pairs(row, student, teacher)
    ends = [s for s in row["aligned_student"] if row["input_ids"][s] == student.eos_token_id]
    assert len(ends) == 2
    asked = teacher.decode(row["teacher_input_ids"][: row["teacher_prompt"]])
    assert asked.rstrip().endswith("[INST] twelve [/INST]") and "blue stone" in asked


# An end of turn, a line break and, behind the last turn, the end of sequence.
CLOSED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|endoftext|>\n' }}{% endfor %}"
    "{{ eos_token }}"
)
# Two ends behind every answer.
TWICE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|endoftext|>"
    "{{ eos_token if m.role == 'assistant' else '' }}\n{% endfor %}"
)


@pytest.mark.parametrize("eot_tokens", [None, ["<|endoftext|>"]])
@pytest.mark.parametrize("side", ["teacher", "student", "both"])
@pytest.mark.parametrize("template", [CLOSED, TWICE])
def test_an_end_of_sequence_behind_the_end_of_turn_is_no_answer(
    prepare, tiny, recipe, tmp_path, caplog, template, side, eot_tokens
):
    """Axolotl marks it as a response of its own, and the end of turn only where `eot_tokens` names it."""
    file = tmp_path / "closed.jinja"
    file.write_text(template)
    theirs = {"chat_template": str(file)} if side != "student" else {}
    block = ON_POLICY | {"teacher": {"model": tiny["sibling"], "dtype": "float32", **theirs}, "alignment": "eta"}
    changes = {}
    if side != "teacher":
        changes["datasets"] = [{**recipe["datasets"][0], "chat_template": "jinja", "chat_template_jinja": template}]
        changes["eot_tokens"] = eot_tokens
    with caplog.at_level("WARNING"):
        (row,), student, teacher = prepare(
            [conversation("red river", "blue stone.", "twelve", "the lamp")], block, **changes
        )
    assert "counterpart" not in caplog.text
    places = row["aligned_student"], row["aligned_teacher"]
    assert all(row["labels"][k] != -100 for k in places[0])
    said = "".join(pieces(student, row["input_ids"], places[0]))
    assert said.replace("<|endoftext|>", "").replace("<|im_end|>", "") == "blue stone.the lamp"
    pairs = [(row["input_ids"][s], row["teacher_input_ids"][t]) for s, t in zip(*places, strict=True)]
    assert all((a in student.all_special_ids) == (b in teacher.all_special_ids) for a, b in pairs)
    # What closes an answer has a partner where it is apart on both sides, and never an end of turn.
    closing = student.eos_token_id, teacher.eos_token_id
    assert (closing in pairs) == (side == "both" and template == CLOSED)
    assert side == "teacher" or all(b == closing[1] for a, b in pairs if a == closing[0])
    assert side == "student" or all(a == closing[0] for a, b in pairs if b == closing[1])
    asked = teacher.decode(row["teacher_input_ids"][: row["teacher_prompt"]])
    assert asked.endswith(
        "twelve" + ("<|im_end|>" if side == "student" else "<|endoftext|>") + "\n<|im_start|>assistant\n"
    )
    assert "blue stone" in asked and "lamp" not in asked


def test_every_kind_of_dataset_names_the_ends_of_turn_of_its_rows(prepare, tiny, recipe, monkeypatch):
    """What the run takes for the ends, from the recipe alone, is what the rows were aligned with."""
    from axolotl.utils.dict import DictDefault

    from dskd_plugin.host import strategy
    from dskd_plugin.host.plugin import registered

    seen, uncut = [], []
    original = strategy.aligner

    def spy(pair, settings, ends, *, whole):
        seen.append(ends)
        uncut.append(whole)
        return original(pair, settings, ends, whole=whole)

    entries = [
        recipe["datasets"][0],
        {**recipe["datasets"][0], "chat_template": "jinja", "chat_template_jinja": LLAMA_2},
        *({"path": tiny["data"], "ds_type": "json", "type": kind} for kind in TYPES.values()),
    ]
    monkeypatch.setattr(strategy, "aligner", spy)
    ends = {"special_tokens": {"eos_token": "<|endoftext|>"}, "eot_tokens": ["<|im_end|>"]}
    _, student, teacher = prepare(datasets=entries, sequence_len=128, **ends)
    changed = DictDefault(recipe | ends | {"datasets": entries})
    found = registered().run.on(changed).with_student(student).ends
    assert len(seen) == len(entries) and found == list(dict.fromkeys(seen))
    assert uncut == [entry["type"] == "chat_template" for entry in entries]
    chat, text = (student.convert_tokens_to_ids(name) for name in ("<|im_end|>", "<|endoftext|>"))
    assert found[0] == (chat, teacher.eos_token_id) and found[-1] == (text, teacher.eos_token_id)


def test_datasets_whose_turns_end_in_two_ways_are_refused_for_answers(prepare, tiny, recipe):
    datasets = [recipe["datasets"][0], {"path": tiny["data"], "ds_type": "json", "type": "alpaca"}]
    ends = {"special_tokens": {"eos_token": "<|endoftext|>"}, "eot_tokens": ["<|im_end|>"]}
    assert prepare(None, ON_POLICY, datasets=datasets)[0]  # where both are one token
    with pytest.raises(
        ValueError, match=r"one end of turn .*on_policy.*<\|im_end\|> and <\|endoftext\|> of the student"
    ):
        prepare(None, ON_POLICY, datasets=datasets, **ends)


@pytest.mark.parametrize(
    ("cut", "prompt"), [(None, "twelve [/INST]"), (-1, "twelve [/INST]"), (0, "river [/INST]"), (1, "twelve [/INST]")]
)
def test_prompt_belongs_to_the_last_answer_that_the_host_leaves(prepare, cut, prompt):
    """cut: tokens of the last answer that stay."""
    texts = conversation("red river", "blue stone.", "twelve", "the lamp")
    (row,), _, teacher = prepare([texts], ON_POLICY)
    if cut is not None:
        answer = runs(row["labels"])[-1]
        length = answer[cut] if cut >= 0 else answer[-1]
        (row,), _, teacher = prepare(
            [texts], ON_POLICY, sequence_len=length, excess_length_strategy="truncate", sample_packing=False
        )
        assert len(row["input_ids"]) == length
    assert teacher.decode(row["teacher_input_ids"][: row["teacher_prompt"]]).rstrip().endswith(prompt)


@pytest.mark.parametrize("kind", ["completion", "train_on_inputs"])
def test_rows_without_any_prompt_are_refused_for_answers(prepare, tiny, recipe, kind):
    datasets = [{"path": tiny["data"], "ds_type": "json", "type": "alpaca" if kind != "completion" else kind}]
    changes = {"datasets": datasets, "train_on_inputs": kind != "completion"}
    with pytest.raises(ValueError, match=r"expected rows with a prompt that the student can answer \(dskd\.on_policy"):
        prepare(None, ON_POLICY, **changes)


def test_an_entry_without_prompts_beside_others_is_named(prepare, tiny, recipe, tmp_path, caplog):
    texts = tmp_path / "texts.jsonl"
    texts.write_text(json.dumps({"text": "the red river stone"}) + "\n")
    plain = {"path": str(texts), "ds_type": "json", "type": "completion"}
    with caplog.at_level("WARNING"):
        rows, *_ = prepare(None, ON_POLICY, datasets=[recipe["datasets"][0], plain])
    assert sorted({bool(row["teacher_prompt"]) for row in rows}) == [False, True]
    (line,) = [record.getMessage() for record in caplog.records if "can answer" in record.getMessage()]
    assert "texts.jsonl" in line and line.endswith("The student answers the prompts of the other entries.")


@pytest.mark.parametrize("alignment", ["eta", "cma"])
def test_columns_follow_when_the_teachers_row_is_cut(prepare, tiny, alignment):
    texts = conversation("red " * 12, "lamp\n- item\n- naïve " * 6, "twelve", "the lamp\n- item\n- lamp")
    block = {"alignment": alignment, "span_weight": 1, **ON_POLICY}
    rows = [texts, conversation("red", "blue")]  # the second is never cut
    whole = max(prepare(rows, block)[0], key=lambda row: len(row["input_ids"]))
    limit = whole["aligned_teacher"][len(whole["aligned_teacher"]) // 2]
    cut_block = block | {"teacher": {"model": tiny["teacher"], "dtype": "float32", "sequence_len": limit}}
    found, *_ = prepare(rows, cut_block, excess_length_strategy="truncate")
    cut = max(found, key=lambda row: len(row["input_ids"]))
    assert cut["teacher_input_ids"] == whole["teacher_input_ids"][:limit] and cut["labels"] == whole["labels"]
    kept = [k for k, position in enumerate(whole["aligned_teacher"]) if position < limit]
    assert cut["aligned_teacher"] == [whole["aligned_teacher"][k] for k in kept]
    if alignment == "cma":
        assert cut["aligned_student"] == whole["aligned_student"]
    else:
        assert cut["aligned_student"] == [whole["aligned_student"][k] for k in kept]
    spans = [whole["spans"][at : at + 4] for at in range(0, len(whole["spans"]), 4)]
    assert cut["spans"] == [p for span in spans if all(q < limit for q in range(span[2], span[3])) for p in span]
    assert 0 < len(cut["spans"]) < len(whole["spans"])
    assert whole["teacher_prompt"] > limit and cut["teacher_prompt"] == 0


@pytest.mark.parametrize(
    ("kept", "labels", "teacher", "prompt"),
    [
        ([-100, 1, 1], [-100, 1, 1], [-100, -100, 1], 2),
        ([1, 1], [1, 1], [-100, 1], 0),
        ([-100, 1], [-100, 1], [1, 1], 0),
        ([-100], [-100, 1], [-100, 1], 0),
        ([-100, 1, -100], [-100, 1, -100, 1], [-100, 1, -100, -100, 1], 1),
        ([-100, 1, -100, 1], [-100, 1, -100, 1], [-100, -100, -100, 1], 3),
        ([-100, 1, -100], [-100, 1, -100, 1], [-100, -100, -100, 1], 0),
        ([-100, 1], [-100, 1], [-100, -100], 0),
        ([], [], [], 0),
    ],
)
def test_prompt_by_hand(kept, labels, teacher, prompt):
    from dskd_plugin.host.strategy import prompt_end

    assert prompt_end(*([label == 1 for label in side] for side in (kept, labels, teacher))) == prompt


THINKS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last and think %}"
    "(thinking)\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
)


@pytest.mark.parametrize("teachers", [None, {}, {"think": True}])
@pytest.mark.parametrize("recipes", [None, {"think": True}])
def test_template_variables_of_the_teacher_alone(recipes, teachers, prepare, tiny, tmp_path):
    """The recipe's hold for both sides; the teacher's own, where there are any, for the teacher instead."""
    (tmp_path / "thinks.jinja").write_text(THINKS)
    teacher = {"model": tiny["teacher"], "chat_template": str(tmp_path / "thinks.jinja")}
    if teachers is not None:
        teacher["chat_template_kwargs"] = teachers
    changes = {"chat_template": "jinja", "chat_template_jinja": str(tmp_path / "thinks.jinja")}
    if recipes is not None:
        changes["chat_template_kwargs"] = recipes
    (row,), ours, theirs = prepare([conversation("red", "blue stone")], {"teacher": teacher}, **changes)
    assert ("(thinking)" in ours.decode(row["input_ids"])) == bool(recipes)
    expected = recipes if teachers is None else teachers
    assert ("(thinking)" in theirs.decode(row["teacher_input_ids"])) == bool(expected)


def test_both_sides_may_have_several_templates_under_names(prepare, tiny, tmp_path):
    """Rows with tools are read in the template for tools, as transformers has it."""
    import shutil

    from transformers import AutoTokenizer

    plain = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}\n{% endfor %}"
    named = {"default": plain, "tool_use": "{{ tools | length }} tool\n" + plain}
    folders = {}
    for side in ("student", "teacher"):
        folders[side] = str(shutil.copytree(tiny[side], tmp_path / side))
        tokenizer = AutoTokenizer.from_pretrained(folders[side])
        tokenizer.chat_template = named
        tokenizer.save_pretrained(folders[side])
    tool = {"type": "function", "function": {"name": "lamp", "parameters": {"type": "object", "properties": {}}}}
    rows = [conversation("red", "blue stone"), {**conversation("green", "blue stone"), "tools": json.dumps([tool])}]
    rows[0]["tools"] = None
    block = {"teacher": {"model": folders["teacher"], "dtype": "float32"}}
    found, ours, theirs = prepare(rows, block, base_model=folders["student"])
    texts = {(ours.decode(row["input_ids"]), theirs.decode(row["teacher_input_ids"])) for row in found}
    for side in (0, 1):
        assert sorted(text[side].count("1 tool\n") for text in texts) == [0, 1]
    assert all(row["aligned_student"] for row in found)


@pytest.mark.parametrize(
    ("error", "roles", "advice"),
    [
        ("After the optional system message, roles must alternate", ["user", "user", "assistant"], "Join neighbouring"),
        ("After the optional system message, roles must alternate", ["user", "tool", "assistant"], "the role 'tool'"),
        ("Only user, system and assistant roles are supported!", ["user", "tool", "assistant"], "the role 'tool'"),
        ("Conversation roles must alternate", ["system", "user", "assistant"], "drop_system_message"),
        (
            "Conversation roles must alternate",
            ["assistant", "user", "assistant"],
            "The row begins with",
        ),
        ("something else", ["user", "assistant"], "Change or leave out"),
    ],
)
def test_advice_about_a_refused_row_follows_its_roles(error, roles, advice):
    import json

    from dskd_plugin.host import dataset_report

    note = json.dumps({"side": "teacher", "error": error, "row": "x", "roles": roles})
    assert advice in str(dataset_report.refused("datasets: d", ["", note], 2))


def test_a_tokenized_dataset_keeps_its_rows_and_not_its_strategy():
    from datasets import Dataset

    from dskd_plugin.host.dataset import rows_alone

    dataset = Dataset.from_dict({"labels": [[1, 2], [3]]})
    dataset.prompt_tokenizer = object()
    alone = rows_alone(dataset)
    assert alone[:] == dataset[:] and not hasattr(alone, "prompt_tokenizer")
    assert alone.features == dataset.features and rows_alone(None) is None
