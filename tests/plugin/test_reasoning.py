"""Reasoning before the final answer: what `dskd generate` writes of it, for every way in which a template marks it.

A tiny teacher has learnt by heart what it says after each template's own prompt; texts and markers are written by hand.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner

pytestmark = pytest.mark.axolotl

# The prompt opens the reasoning; the last answer of a conversation is rendered with an empty one.
OPENS = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.role=='assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
# As Qwen3: the model opens it itself, unless the prompt holds an empty one.
OPENS_ITSELF = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.role == 'assistant' and message.reasoning_content %}<think>\n{{ message.reasoning_content }}\n"
    "</think>\n\n{% endif %}{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
# Markers that are special tokens, around the answer as well.
CHANNELS = (
    "{% for m in messages %}<|start|>{{ m.role }}{% if m.role == 'assistant' %}"
    "{% if m.thinking %}<|channel|>analysis<|message|>{{ m.thinking }}<|end|><|start|>assistant{% endif %}"
    "<|channel|>final{% endif %}<|message|>{{ m.content }}{% if loop.last %}<|return|>{% else %}<|end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
BRACKETS = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}[THINK]{% endif %}"
    "{# [/THINK] #}"
)
# Every answer has the block, also an earlier one; words of its own.
ALWAYS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}<musing>\n\n</musing>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<musing>\n{% endif %}"
)
# No tags: what opens and closes shows in the last answer alone.
WORDS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}Notes:\n\nResult:\n"
    "{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\nNotes:\n"
    "{% endif %}"
)
# The template does not know that the model reasons.
PLAIN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Dialect:
    """said: after the prompt; content: of the message as a whole, reasoning and answer apart."""

    template: str
    said: str
    content: str
    reasoning: str
    answer: str
    kwargs: str = "{}"

    @property
    def question(self):
        """One of its own, so that no two are told apart by less than a word."""
        return f"{self.answer.strip()[:3]} What is 2 + 2?"


DIALECTS = {
    "prompt opens": Dialect(
        OPENS, "Let me see.\n</think>\n\n4.", "<think>\nLet me see.\n</think>\n\n4.", "Let me see.", "4."
    ),
    "model opens": Dialect(
        OPENS_ITSELF,
        "<think>\nTwo and two.\n</think>\n\n    four",
        "<think>\nTwo and two.\n</think>\n\n    four",
        "Two and two.",
        "    four",
    ),
    "prompt closes": Dialect(OPENS_ITSELF, "Just 4.", "Just 4.", "", "Just 4.", '{"enable_thinking": false}'),
    "channels": Dialect(
        CHANNELS,
        "<|channel|>analysis<|message|>Hm, sums.<|end|><|start|>assistant<|channel|>final<|message|>It is 4.",
        "<|channel|>analysis<|message|>Hm, sums.<|end|><|start|>assistant<|channel|>final<|message|>It is 4.",
        "Hm, sums.",
        "It is 4.",
    ),
    "brackets": Dialect(
        BRACKETS, "Oh, sums.[/THINK]Four it is.", "[THINK]Oh, sums.[/THINK]Four it is.", "Oh, sums.", "Four it is."
    ),
    "always": Dialect(
        ALWAYS, "Is it?\n</musing>\n\nIt is.", "<musing>\nIs it?\n</musing>\n\nIt is.", "Is it?", "It is."
    ),
    "words": Dialect(WORDS, "2 and 2\nResult:\n4!", "Notes:\n2 and 2\nResult:\n4!", "2 and 2", "4!"),
}
SPECIAL = [
    *("<|im_start|>", "<|im_end|>", "[THINK]", "[/THINK]"),
    *("<|start|>", "<|end|>", "<|return|>", "<|channel|>", "<|message|>"),
]


@pytest.fixture(scope="module")
def teacher(build, tmp_path_factory):
    """A folder: a Llama that has learnt the table by heart. Its markers but `<think>` are special tokens."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("reasoning") / "teacher"
    tokenizer = build.byte_level_tokenizer(420, 1)
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL, "eos_token": "<|return|>"})
    tokenizer.bos_token = "<|endoftext|>"
    build.save_model(folder, tokenizer, width=64, initializer_range=0.1)
    rows = []
    for dialect in DIALECTS.values():
        prompt = prompt_of(tokenizer, dialect)
        end = "<|return|>" if dialect.template in (CHANNELS, BRACKETS) else "<|im_end|>"
        ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, dialect.said + end)]
        rows.append((ids[0] + ids[1], len(ids[0])))
    width = max(len(ids) for ids, _ in rows)
    inputs = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in rows])
    labels = torch.full_like(inputs, -100)
    for k, (ids, start) in enumerate(rows):
        labels[k, start : len(ids)] = inputs[k, start : len(ids)]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0)
    for _ in range(400):
        loss = model(input_ids=inputs, labels=labels).loss
        if loss < 0.01:
            break
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.05
    model.save_pretrained(folder)
    return str(folder)


def prompt_of(tokenizer, dialect):
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": dialect.question}],
        chat_template=dialect.template,
        add_generation_prompt=True,
        tokenize=False,
        **json.loads(dialect.kwargs),
    )


@pytest.fixture
def generated(recipe, teacher, tmp_path, monkeypatch, plugins_forgotten):
    """generated(dialect, *options) -> the last message of the only row, and the output."""
    from dskd_plugin.cli import main

    monkeypatch.chdir(tmp_path)

    def run(dialect, *options, code=0, template=None):
        Path("own.jinja").write_text(dialect.template if template is None else template)
        row = {"messages": [{"role": "user", "content": dialect.question}, {"role": "assistant", "content": "5"}]}
        Path("rows.jsonl").write_text(json.dumps(row) + "\n")
        block = {"model": teacher, "dtype": "float32", "chat_template": "own.jinja"}
        block["chat_template_kwargs"] = json.loads(dialect.kwargs)
        datasets = [{"path": "rows.jsonl", "ds_type": "json", "type": "chat_template"}]
        Path("recipe.yaml").write_text(yaml.safe_dump({**recipe, "datasets": datasets, "dskd": {"teacher": block}}))
        options = ["--out", "made.jsonl", "--overwrite", "--max-new-tokens", 60, *options]
        with plugins_forgotten():
            done = CliRunner().invoke(main, ["generate", "recipe.yaml", *map(str, options)])
        assert done.exit_code == code, (done.output, done.exception)
        if code:
            return done.output
        (line,) = Path("made.jsonl").read_text(encoding="utf-8").splitlines()
        return json.loads(line)["messages"][-1], done.output

    return run


@pytest.mark.parametrize("mode", ["keep", "drop", "field"])
@pytest.mark.parametrize("name", DIALECTS)
def test_what_is_written_of_an_answer_that_reasons(name, mode, generated):
    dialect = DIALECTS[name]
    message, output = generated(dialect, "--reasoning", mode)
    assert message["role"] == "assistant"
    assert message["content"] == (dialect.content if mode == "keep" else dialect.answer)
    assert message.get("reasoning_content", "") == (dialect.reasoning if mode == "field" else "")
    assert ("1 answers reason first" in output) == bool(dialect.reasoning)
    unread = "The student's chat template does not read reasoning_content"
    assert (unread in output) == (mode == "field" and bool(dialect.reasoning))
    counts = json.loads(Path("made.manifest.json").read_text())["counts"]
    assert counts["reasoned"] == bool(dialect.reasoning) and counts["written"] == 1


def test_keep_is_the_default(generated):
    dialect = DIALECTS["prompt opens"]
    assert generated(dialect)[0]["content"] == "<think>\nLet me see.\n</think>\n\n4."


@pytest.mark.parametrize("mode", ["keep", "drop", "field"])
def test_reasoning_that_is_cut_is_no_answer(mode, generated):
    dialect = DIALECTS["prompt opens"]
    output = generated(dialect, "--reasoning", mode, "--max-new-tokens", 3, code=1)
    assert "got 1 cut at the limit, 0 empty ones" in " ".join(output.split())


def test_reasoning_without_an_answer_is_left_out_and_counted(generated):
    """The teacher ends its turn within the reasoning, as it does where it learnt another template."""
    from dskd_plugin.generation.answers import Answer
    from dskd_plugin.generation.messages import as_message
    from dskd_plugin.text.reasoning import AssistantForm

    form = AssistantForm("<think>\n", own=(("<think>", "</think>"),))
    for mode, content in {"keep": "<think>\nHm.", "drop": "", "field": ""}.items():
        found = as_message(Answer(0, "Hm.", 3, True), form, mode)
        assert (found.whole, found.ended, found.reasoned) == (False, True, True)
        assert found.message["content"] == content


def test_a_template_that_shows_no_end_of_reasoning_cannot_drop_it(generated):
    dialect = DIALECTS["words"]
    blind = dialect.template.replace("{% if m.role == 'assistant' and loop.last %}Notes:\n\nResult:\n{% endif %}", "")
    message, _ = generated(dialect, template=blind)
    assert message["content"] == dialect.content
    output = generated(dialect, "--reasoning", "drop", code=1, template=blind)
    assert "--reasoning drop: expected a chat template that shows how reasoning ends" in " ".join(output.split())


CASES = {
    # template, said -> whole, reasoning, answer
    "no reasoning": (PLAIN, "4.\n", "4.", "", "4."),
    "a model whose template does not reason": (PLAIN, "<think>\na\n</think>\n4", "<think>\na\n</think>\n4", "a", "4"),
    "the last end counts": (
        OPENS,
        "a </think> b\n</think>\n\n4",
        "<think>\na </think> b\n</think>\n\n4",
        "a </think> b",
        "4",
    ),
    "an end without a beginning": (OPENS_ITSELF, "a\n</think>\n\n4", "<think>\na\n</think>\n\n4", "a", "4"),
    "an answer about the marker": (
        PLAIN,
        "Write </think> there.",
        "Write </think> there.",
        "",
        "Write </think> there.",
    ),
    "words that may close": (
        "{% for m in messages %}{{ m.role }}: {% if m.thinking %}Notes: {{ m.thinking }} Result: {% endif %}"
        "{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}",
        "The Result: 4",
        "The Result: 4",
        "",
        "The Result: 4",
    ),
    "an answer of tags": (PLAIN, "<analysis>a</analysis>", "<analysis>a</analysis>", "", "<analysis>a</analysis>"),
    "indented answer": (PLAIN, "    return 4\n", "    return 4", "", "    return 4"),
    "words before the reasoning": (
        OPENS_ITSELF,
        "Okay. <think>hm</think> 4.",
        "Okay. <think>hm</think> 4.",
        "Okay.\nhm",
        "4.",
    ),
    "a tag that only the prompt shows": (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: <reflect>\n{% endif %}",
        "hm\n</reflect>\n\n4",
        "<reflect>\nhm\n</reflect>\n\n4",
        "hm",
        "4",
    ),
    "an empty reasoning": (OPENS, "</think>\n\n4", "<think>\n</think>\n\n4", "", "4"),
    "straight to the final channel": (CHANNELS, "<|channel|>final<|message|>4", "4", "", "4"),
}


@pytest.mark.parametrize("case", CASES)
def test_where_an_answer_begins(case, build):
    from dskd_plugin.text.reasoning import assistant_form

    template, said, *expected = CASES[case]
    tokenizer = build.byte_level_tokenizer(300, 1)

    def render(turns, generation):
        return tokenizer.apply_chat_template(
            turns, chat_template=template, add_generation_prompt=generation, tokenize=False
        )

    found = assistant_form(render, template).split(said)
    assert [found.whole, found.reasoning, found.answer] == expected and found.closed


def test_earlier_unfinished_files_are_not_mixed_in(generated, teacher, recipe):
    """Answers of a version that dropped special tokens are another run's."""
    dialect = DIALECTS["channels"]
    generated(dialect)
    manifest = json.loads(Path("made.manifest.json").read_text())
    assert manifest["teacher"]["answers"] == "with special tokens" and manifest["reasoning"] == "keep"
    shutil.rmtree("out", ignore_errors=True)


@pytest.mark.parametrize(
    ("said", "asked", "expected"),
    [
        ("<think>a</think>\n<answer> 42 </answer>", "Sum?", "42"),
        ("<think>a</think><response>\n    x = 1\n</response>", "Sum?", "    x = 1"),
        ("<think>a</think><|begin_of_solution|>42<|end_of_solution|>", "Sum?", "42"),
        ("<think>a</think><answer>42", "Sum?", "42"),
        ("<think>a</think><answer>42</answer>", "Answer within <answer> and </answer>.", "<answer>42</answer>"),
        ("<think>a</think><answer>42</answer> or 43", "Sum?", "<answer>42</answer> or 43"),
        ("<answer>42</answer>", "Sum?", "<answer>42</answer>"),
        ("<think>a</think>The tag is <answer>.", "Sum?", "The tag is <answer>."),
    ],
)
def test_tags_around_an_answer_after_reasoning(said, asked, expected):
    from dskd_plugin.generation.answers import Answer
    from dskd_plugin.generation.messages import as_message
    from dskd_plugin.text.reasoning import AssistantForm

    answer = Answer(0, said, 9, True)
    for reasoning in ("drop", "field"):
        assert as_message(answer, AssistantForm(), reasoning, asked).message["content"] == expected
    assert as_message(answer, AssistantForm(), "keep", asked).message["content"] == said
    assert as_message(answer, AssistantForm(), "field", asked, "musing").message.get("musing", "a") == "a"
