"""Reasoning traces: where an answer begins, in texts and through the whole command line."""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest_models import CHATML, make_reciter
from dskd_eval import reasoning
from dskd_eval.backends.base import GenerationSettings, cut_at_stop
from dskd_eval.errors import UserError

THINK = (("<think>", "</think>"),)
FENCE = "```python\ndef strip(t):\n    return t.split('</think>')[-1]\n```"
XML = "```xml\n<think>\nhm\n</think>\n42\n```"


@pytest.mark.parametrize("pair", reasoning.FAMILIES, ids=[start for start, _ in reasoning.FAMILIES])
def test_every_family(pair: reasoning.Pair) -> None:
    start, end = pair
    found = reasoning.choose("auto", [f"{{% if thinking %}}{start}{{% endif %}}"])
    assert found == (pair,)
    assert reasoning.choose("auto", ["x " + end]) == (pair,)
    for text in (f"{start}\nIs it 3?\n{end}\n\n4.", f"\n{start}Is it 3?{end} 4."):
        assert reasoning.separate(text, found) == reasoning.Separated(
            "4.", text[: text.index(end) + len(end)], "closed"
        )
    assert reasoning.separate(f"Is it 3?{end}4.", found, pair).answer == "4."
    assert reasoning.separate(f"{start}Is it \\boxed{{42}}", found).state == "unclosed"
    assert reasoning.separate("Is it \\boxed{42}", found, pair).answer == ""
    assert reasoning.separate("4.", found) == reasoning.Separated("4.", "", "none")


ANSWERS = [
    ("<think>a</think>4", None, "4"),
    ("<think></think>\n\n4", None, "4"),
    ("a</think>4", "opened", "4"),
    ("a</think>4", None, "4"),
    ("that's it</think>It's 4", None, "It's 4"),
    ("4", "opened", ""),
    ("<think>a", None, ""),
    ("  \n<think>a", None, ""),
    ("", "opened", ""),
    ("", None, ""),
    # Several traces.
    ("<think>a</think>3 <think>no</think>4", None, "4"),
    ("<think>a</think>3\n<think>no, \\boxed{4}", None, ""),
    ("a</think>3\n<think>b</think>\n4", "opened", "4"),
    ("<think>a <think>b</think> c</think>4", None, "4"),
    ("Well. <think>a</think>4", None, "4"),
    # Drafts within a trace, also with an open code block or a quoted marker.
    ("<think>\n```python\ndraft\n</think>\n4", None, "4"),
    ("```python\ndraft\n</think>\n4", "opened", "4"),
    ("```python\ndraft\n</think>\n4", None, "4"),
    ("<think>I end with '</think>' here.\n</think>\n4", None, "4"),
    # Markers that the answer only mentions.
    (f"<think>split</think>\n{FENCE}", None, FENCE),
    (f"split</think>\n{FENCE}", "opened", FENCE),
    (FENCE, None, FENCE),
    (FENCE[:-4], None, FENCE[:-4]),
    (f"<think>a</think>{FENCE[:-4]}", None, FENCE[:-4]),
    (f"<think>a</think>\n{XML}", None, XML),
    (f"<think>a</think>\n{XML[:-8]}", None, XML[:-8]),
    ("<think>a</think>\n~~~\n</think>\n~~~\nso", None, "~~~\n</think>\n~~~\nso"),
    ("<think>a</think>The tag `</think>` ends it.", None, "The tag `</think>` ends it."),
    ('<think>a</think>The tag "<think>" begins it.', None, 'The tag "<think>" begins it.'),
    ("    return re.sub(r\"<think>.*?</think>\", '', t)", None, "    return re.sub(r\"<think>.*?</think>\", '', t)"),
    # An opening marker without an end: a new trace at the start of a line, else talked about.
    ("<think>a</think>3\n  <think>no", None, ""),
    ("<think>a</think><think>no", None, ""),
    ("<think>a</think>I use <think> to think: 4", None, "I use <think> to think: 4"),
    ("<think>a</think>I use <think> twice\n<think>no", None, ""),
    ("Models write <think> first. So 4", None, "Models write <think> first. So 4"),
    # Indentation of a body stays.
    ("<think>a</think>\n\n    return 1\n", None, "    return 1\n"),
    # Tags that some models put around the answer.
    ("<think>a</think><response>4</response>", None, "4"),
    ("<think>a</think>\n<answer>\n4\n</answer>", None, "4\n"),
]


@pytest.mark.parametrize(("text", "opened", "expected"), ANSWERS)
def test_where_the_answer_begins(text: str, opened: str | None, expected: str) -> None:
    assert reasoning.separate(text, THINK, THINK[0] if opened else None).answer == expected


def test_tags_that_the_prompt_asks_for_stay() -> None:
    text = "<think>a</think>\n<answer>4</answer>"
    assert reasoning.separate(text, THINK, asked="Put it between <answer> tags.").answer == "<answer>4</answer>"
    assert reasoning.separate(text, THINK, asked="Put it between <response> tags.").answer == "4"


def test_a_control_token_opens_a_trace_wherever_it_stands() -> None:
    pair = ("<|channel|>analysis<|message|>", "<|channel|>final<|message|>")
    text = f"{pair[0]}a{pair[1]}4<|start|>assistant{pair[0]}no"
    assert reasoning.separate(text, [pair]).state == "unclosed"


UNITS = [
    "<think>", "</think>", "x <think>", "<think>a</think>", "`</think>` ", "'</think>' ", "it's</think>", "“</think>",
    "a`</think>", "```\n</think>\n```\n", "```\n</think>\n", "`` ` </think> ", "[THINK] </think> ", '"x" </think> ',
]  # fmt: skip


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("start", ["", "<think>a</think>"])
def test_many_markers_take_time_in_proportion(unit: str, start: str) -> None:
    begun = time.process_time()
    reasoning.separate(start + unit * (100_000 // len(unit)), reasoning.FAMILIES)
    assert time.process_time() - begun < 6


def slow_answer_start(text: str) -> int | None:
    """As `answer_start`, reading the whole rest anew after every trace."""
    begin, traced = 0, False
    if text.startswith("<think>"):
        if "</think>" not in text:
            return None
        begin, traced = text.index("</think>") + 8, True
    while True:
        rest = text[begin:]
        for found in re.finditer("</?think>", rest):
            unclosed = found[0] == "<think>" and "</think>" not in rest[found.start() :]
            line = rest[: found.start()].rpartition("\n")[2]
            if (unclosed and line.strip()) or is_literal(rest, found.start(), found.end(), traced):
                continue
            if unclosed:
                return None
            end = rest.index("</think>", found.start()) + 8
            begin, traced = begin + end, True
            break
        else:
            return begin


def is_literal(text: str, first: int, last: int, traced: bool) -> bool:
    spans = [found.span() for found in reasoning.CODE_SPAN.finditer(text)]
    spans += [found.span() for found in reasoning.QUOTED.finditer(text)]
    spans += reasoning.code_blocks(text, unclosed_is_code=traced)
    return any(start <= first and last <= end for start, end in spans)


def test_reading_no_further_than_needed_finds_the_same() -> None:
    pieces = ["<think>", "</think>", "`", "``", "'", '"', "“", "”", "\n", "\n```\n", "\n~~~\n", "a", " ", "> ", "\n\n"]
    draw = random.Random(0)
    for _ in range(4000):
        text = "".join(draw.choices(pieces, k=draw.randrange(1, 24)))
        if not text.lstrip().startswith("<think>") or text.startswith("<think>"):
            assert reasoning.answer_start(text, THINK) == slow_answer_start(text), text


def test_without_markers_nothing_is_taken_off() -> None:
    text = "<think>a</think>4"
    assert reasoning.separate(text, ()) == reasoning.Separated(text, "", "unread")
    assert reasoning.separate("4 </think>", ()).state == "none"


PROMPTS = [
    ("<user>2 + 2?<assistant><think>\n", "2 + 2?", True),
    ("<user>2 + 2?<assistant>", "2 + 2?", False),
    ("<user>2 + 2?<assistant><think>\n\n</think>\n\n", "2 + 2?", False),
    ("<user>What is <think>?<assistant>", "What is <think>?", False),
    ("<user>What is <think>?<assistant><think>", "What is <think>?", True),
    ("<user>2 + 2?<assistant><think>\nOkay,", "2 + 2?", True),
]


@pytest.mark.parametrize(("prompt", "question", "opened"), PROMPTS)
def test_a_prompt_that_has_opened_the_trace(prompt: str, question: str, opened: bool) -> None:
    messages = [{"role": "user", "content": question}]
    assert reasoning.opened_by(prompt, messages, THINK) == (THINK[0] if opened else None)


def test_a_prompt_without_template_and_a_begun_answer() -> None:
    assert reasoning.opened_by("Q: 2 + 2?\nA: <think>\n", None, THINK) == THINK[0]
    assert reasoning.opened_by("Explain <think> to me.", None, THINK) is None
    begun = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "<think>So"}]
    assert reasoning.opened_by("<user>q<assistant><think>So", begun, THINK) == THINK[0]


def test_stop_strings_count_outside_traces() -> None:
    settings = GenerationSettings(9, stop=("Question:",), reasoning=THINK)
    assert cut_at_stop("<think>Question: a", settings) is None
    assert cut_at_stop("<think>Question: a</think>4 Question: b", settings) == "<think>Question: a</think>4 "
    assert cut_at_stop("Question: a</think>4 Question: b", settings, THINK[0]) == "Question: a</think>4 "
    assert cut_at_stop("4 Question: b", settings) == "4 "


@pytest.mark.parametrize("option", ["on", "<think>", "<think>,", ",</think>", "a,a"])
def test_wrong_markers_are_refused(option: str) -> None:
    with pytest.raises(UserError, match="--reasoning: expected auto, off, or two different markers"):
        reasoning.choose(option, [])


QUESTION = "What is 2 + 2?"
OPENING = CHATML.replace("assistant\n{% endif", "assistant\n<think>\n{% endif")
KNOWING = CHATML + "{# answers may hold <think> and </think> #}"


@pytest.fixture
def evaluated(
    tmp_path: Path, own_task: Callable[..., Path], invoke: Callable[..., Any]
) -> Callable[..., tuple[Any, dict[str, Any], dict[str, Any]]]:
    """Runs a model that recites a text through the command line: its output, the score, the sample."""

    def run(text: str, *options: object, template: str = KNOWING, special: tuple[str, ...] = (), **task: Any) -> Any:
        model = make_reciter(tmp_path / "reciter", text, QUESTION, template, special)
        path = own_task([{"question": QUESTION, "answer": "4"}], **{"max_new_tokens": 200, **task})
        done = invoke("--model", model, "--task-file", path, "--output", tmp_path / "o", "--dtype", "float32", *options)
        assert done.exit_code == 0, done.output
        results = json.loads((tmp_path / "o" / "results.json").read_text())
        sample = json.loads((tmp_path / "o" / "samples.jsonl").read_text())
        return done, results["scores"][0], sample

    return run


def primary(score: dict[str, Any]) -> float:
    return float(score["metrics"][score["task"]["primary_metric"]]["value"])


def test_a_trace_is_not_scored(evaluated: Callable[..., Any]) -> None:
    text = "<think>\nIs it 3? Or 5.\n</think>\n\nThe answer is 4"
    done, score, sample = evaluated(text, scorer="rouge_l", reference="The answer is {{answer}}")
    assert primary(score) == 100.0
    assert sample["answers"] == ["The answer is 4"]
    assert sample["generation"][0]["reasoning"] == "<think>\nIs it 3? Or 5.\n</think>"
    assert (score["answers"]["with_reasoning"], score["answers"]["unfinished_reasoning"]) == (1, 0)
    assert "1 with reasoning" in done.output


def test_off_scores_everything_and_says_so(evaluated: Callable[..., Any]) -> None:
    done, score, _ = evaluated("<think>\nSo 4.\n</think>\n\nIt is four", "--reasoning", "off")
    assert primary(score) == 100.0
    assert score["answers"]["unread_reasoning"] == 1
    assert "begin with reasoning" in done.output


def test_an_unfinished_trace_is_an_empty_answer(evaluated: Callable[..., Any]) -> None:
    text = "<think>\nI guess \\boxed{4}, but let me see, and see again"
    done, score, sample = evaluated(text, "--max-new-tokens", 30, scorer="math")
    assert primary(score) == 0.0 and sample["answers"] == [""]
    assert score["answers"]["unfinished_reasoning"] == score["answers"]["empty"] == 1
    assert score["task"]["generation"]["max_gen_toks"] == 30
    assert sample["generation"][0]["new_tokens"] == 30
    assert "reasoning did not end" in done.output


@pytest.mark.parametrize(("closed", "right"), [(True, 100.0), (False, 0.0)])
def test_the_prompt_has_opened_the_trace(closed: bool, right: float, evaluated: Callable[..., Any]) -> None:
    text = "First 4.\n</think>\n4" if closed else "It is 4"
    _, score, sample = evaluated(text, template=OPENING)
    assert primary(score) == right
    assert sample["answers"] == ["4" if closed else ""]


def test_markers_that_are_special_tokens_are_seen(evaluated: Callable[..., Any]) -> None:
    pair = ("[THINK]", "[/THINK]")
    template = CHATML + "{# [THINK] [/THINK] #}"
    _, score, sample = evaluated("[THINK]Is it 5?[/THINK]It is 4 or 3", template=template, special=pair)
    assert sample["answers"] == ["It is 4 or 3"] and primary(score) == 0.0
    assert sample["generation"][0]["reasoning"] == "[THINK]Is it 5?[/THINK]"


def test_own_markers_and_a_stop_string_in_the_trace(evaluated: Callable[..., Any]) -> None:
    text = "(hm)\nQuestion: what?\n(so)\n4 is it, 4\nQuestion: 5"
    _, score, sample = evaluated(text, "--reasoning", "(hm),(so)", template=CHATML, stop="Question:")
    assert sample["answers"] == ["4 is it, 4\n"] and primary(score) == 100.0


def test_a_program_in_the_trace_does_not_run(evaluated: Callable[..., Any]) -> None:
    text = "<think>\n```python\ndef four():\n    return 4\n```\n</think>\n```python\ndef four():\n    return 5\n```"
    code = {"tests": "assert four() == 4", "entry_point": "four"}
    _, score, sample = evaluated(text, scorer="python", reference=None, code=code)
    assert primary(score) == 0.0
    assert sample["details"][0]["program"].strip() == "def four():\n    return 5"


def test_metrics_of_lm_eval_see_the_answer_alone(evaluated: Callable[..., Any]) -> None:
    metric = {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}
    text = "<think>\nIs it 3?\n</think>\n\n4"
    _, score, _ = evaluated(text, scorer=None, metric_list=[metric])
    assert score["metrics"]["exact_match"]["value"] == 100.0


def test_a_limit_needs_a_task_that_generates(
    tiny_model: Path, own_task: Callable[..., Path], invoke: Callable[..., Any]
) -> None:
    path = own_task(
        scorer=None, output_type="multiple_choice", doc_to_choice=["1", "2"], reference="{{0}}", max_new_tokens=None,
        metric_list=[{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    )  # fmt: skip
    done = invoke("--model", tiny_model, "--task-file", path, "--max-new-tokens", 9, "--dry-run")
    assert done.exit_code == 1
    assert "--max-new-tokens" in done.output and "a task that generates text" in done.output


def test_channels_of_special_tokens(tmp_path: Path) -> None:
    """Markers of several tokens; the token that ends a channel does not end the answer."""
    from conftest_models import make_tokenizer
    from dskd_eval.backends import tokenizers
    from dskd_eval.backends.decoding import decode

    tokenizer = make_tokenizer(tmp_path)
    extra = ["<|channel|>", "<|message|>", "<|start|>", "<|end|>", "<|return|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": extra, "eos_token": "<|return|>"})
    said = "<|channel|>analysis<|message|>Is it 3?<|end|><|start|>assistant<|channel|>final<|message|>4<|return|>"
    pairs = reasoning.choose("auto", ["... <|channel|>analysis<|message|> ... <|channel|>final<|message|>"])
    text = decode(tokenizer, tokenizer(said)["input_ids"], pairs)
    assert reasoning.separate(text, pairs).answer == "4"
    assert decode(tokenizer, tokenizer(said)["input_ids"]) == "analysisIs it 3?assistantfinal4"
    folder = SimpleNamespace(ends=str(tmp_path), config={}, ref=SimpleNamespace(template_options={}))
    ends = tokenizers.end_tokens(folder, tokenizer)
    assert tokenizer.convert_tokens_to_ids("<|end|>") not in ends
    assert tokenizer.convert_tokens_to_ids("<|return|>") in ends


def test_a_line_break_without_a_token_does_not_end_an_answer() -> None:
    """The unknown token is a special one."""
    from dskd_eval.backends import tokenizers
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Split
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2, "<end>": 3}, unk_token="<unk>"))
    words.pre_tokenizer = Split("\n", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="</s>")
    tokenizer.add_tokens(["<end>"], special_tokens=True)
    folder = SimpleNamespace(ends="no-such-folder", config={}, ref=SimpleNamespace(template_options={}))
    for end, ids in (("\n<end>", [2, 3]), ("\n", [2]), ("<unk>", [0, 2])):
        shown = f"{{{{ m.content + {end!r} }}}}"
        tokenizer.chat_template = f"{{% for m in messages %}}{shown}{{% endfor %}}"
        assert tokenizers.end_tokens(folder, tokenizer) == ids, end
