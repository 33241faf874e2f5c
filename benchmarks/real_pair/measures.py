"""What a trained model is asked: bits of held-out answers, the bare newline, and programs that run."""

import ast
import re
import warnings
from pathlib import Path
from typing import Any

from benchmarks.study import evaluate
from benchmarks.study.data import Row, read

COMMENT = "# the rest follows from what is known here"
PROBES = 30  # solutions that are asked for the bare newline
_BLOCK = re.compile(r"```(?:python|py)?[ ]*\n(.*?)(?:```|\Z)", re.DOTALL)

HELDOUT, NEWLINE, EASY, HUMANEVAL, MBPP = "heldout", "newline", "easy", "humaneval", "mbpp"
PROGRAMS = {EASY: "easy", HUMANEVAL: "HumanEval", MBPP: "MBPP"}  # measures that run programs, as tables call them
MEASURES = (HELDOUT, NEWLINE, *PROGRAMS)


def measure(kind: str, model: Path, rows: dict[str, list[Row]], work: Path, options: dict[str, Any]) -> dict[str, Any]:
    """One measure of the model in a folder; rows: "heldout" of the run's data set, "code" for the bare newline."""
    if kind == HELDOUT:
        return {"gold": evaluate.likelihood(model, rows["heldout"])}
    if kind == NEWLINE:
        return {"probability": bare_newline(model, rows["code"])}
    return programs(kind, model, work, options)


# -- the bare newline --------------------------------------------------------------------------------------------------


def commented(code: str) -> tuple[str, str] | None:
    """The code up to the end of an indented comment that is put before the last statement of its last function, and
    the rest, which begins with the newline; None for code without a function of two statements."""
    try:
        functions = [node for node in ast.parse(code).body if isinstance(node, ast.FunctionDef)]
    except SyntaxError:
        return None
    if not functions or len(functions[-1].body) < 2:
        return None
    statement, lines = functions[-1].body[-1], code.split("\n")
    before, after = lines[: statement.lineno - 1], lines[statement.lineno - 1 :]
    head = "\n".join([*before, " " * statement.col_offset + COMMENT])
    return head, "\n" + "\n".join(after)


def bare_newline(model: Path, rows: list[Row]) -> list[float]:
    """Probability, after an indented comment inside a function, that the next token is a newline and nothing more.

    Rows are conversations whose answers are programs. An indented comment (`COMMENT`) is put before the last statement
    of the last function of each, the text is cut by the model's own tokenizer, and the probabilities of all tokens
    whose text is exactly one newline are added up at the place where the comment ends. In a tokenizer that writes
    newline and indentation as one token, a bare newline there means that the next line is not indented. A place is
    left out where the tokenizer itself goes on with a bare newline (then it says nothing about the indentation) or
    joins the newline to the comment. The list is empty when every place is left out.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    texts = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
    bare = {token for token, text in enumerate(texts) if text == "\n"}
    places = [place for row in rows if (place := _place(tokenizer, row, bare)) is not None][:PROBES]
    if not places:
        return []
    device = "cuda" if torch.cuda.is_available() else "cpu"
    decoder = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval().to(device)
    found = []
    with torch.inference_mode():
        for ids in places:
            logits = decoder(torch.tensor([ids], device=device), logits_to_keep=1, use_cache=False).logits[0, -1]
            found.append(float(logits.double().softmax(-1)[sorted(bare)].sum()))
    return found


def _place(tokenizer: Any, row: Row, bare: set[int]) -> list[int] | None:
    """Token ids up to the end of the comment; None where the place says nothing."""
    parts = commented(row["messages"][-1]["content"])
    if parts is None:
        return None
    prompt = tokenizer.apply_chat_template(row["messages"][:-1], tokenize=False, add_generation_prompt=True)
    head = prompt + parts[0]
    encoded = tokenizer(head + parts[1], return_offsets_mapping=True, add_special_tokens=False)
    ids, starts = encoded["input_ids"], [start for start, _ in encoded["offset_mapping"]]
    if len(head) not in starts:
        return None
    at = starts.index(len(head))
    return None if ids[at] in bare else ids[:at]


# -- programs ----------------------------------------------------------------------------------------------------------


def lost_indentation(reply: str) -> bool:
    """Whether the first code block of a reply (or all of it) has a block without its indented body, or a `return` that
    stands outside every function because its line lost its indentation.

    A reply that ends where a body should begin was cut, not badly indented.
    """
    block = _BLOCK.search(reply)
    lines = (block[1] if block else reply).rstrip().split("\n")
    while lines and (not lines[-1].strip() or lines[-1].lstrip().startswith("#")):
        lines.pop()
    if lines and lines[-1].endswith(":"):
        indented = len(lines[-1]) - len(lines[-1].lstrip()) + 4
        lines.append(" " * indented + "pass")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the reply's own code
            compile("\n".join(lines), "reply", "exec")
    except SyntaxError as error:
        return error.msg.startswith(("expected an indented block", "'return' outside function"))
    except ValueError:
        return False
    return False


def programs(kind: str, model: Path, work: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Right-or-wrong and lost-indentation flags of the greedy answers, by `dskd-eval`."""
    from dskd_eval.cli import main

    output = work / f"eval-{kind}"
    arguments = ["--model", f"model={model}", "--output", str(output), "--dtype", "float32"]
    arguments += ["--batch-size", str(evaluate.batch(8))]
    if kind == EASY:
        arguments += ["--task-file", str(options["easy"])]
    else:
        arguments += ["--tasks", kind, "--data-dir", str(options["data"])]
        limit = options["limits"].get(kind)
        arguments += ["--limit", str(limit)] if limit else []
    if (output / "run.json").is_file():
        arguments.append("--resume")
    main.main(args=arguments, prog_name="dskd-eval", standalone_mode=False)
    samples = read(output / "samples.jsonl")
    return {
        "passed": [int(evaluate.metric(sample, "pass@1")) for sample in samples],
        "lost": [int(lost_indentation(evaluate.reply(sample))) for sample in samples],
    }
