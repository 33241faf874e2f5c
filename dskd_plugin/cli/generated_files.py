"""The files that ``dskd generate`` writes: dataset, manifest, and a recipe that trains on them."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import yaml

from dskd_plugin.errors import SettingError
from dskd_plugin.folders import read_json
from dskd_plugin.generation.messages import FIELD, Written
from dskd_plugin.whole_file import write_whole

if TYPE_CHECKING:
    from dskd_plugin.generation.answers import Sampling
    from dskd_plugin.host.prompts import Source

# Settings of a recipe's chat_template entries that say how the student reads a conversation.
_STUDENT_KEYS = ("chat_template", "chat_template_jinja", "train_on_eos", "train_on_eot", "split_thinking")
_THINKING_KEYS = ("template_thinking_key", "field_thinking")
# Axolotl's own names of roles, for an entry without `roles`.
_ROLES = {"user": ["human"], "assistant": ["gpt"]}


def conditions_of(source: "Source", sampling: "Sampling", batch_size: int, device: str, rows: Any) -> dict[str, Any]:
    """All that decides the answers. A run goes on only where it is unchanged."""
    from importlib.metadata import version

    import torch
    import transformers
    from transformers import AutoConfig

    from dskd_plugin import __version__
    from dskd_plugin.cache.fingerprint import fingerprint

    teacher = source.run.settings.teacher
    parts = source.teacher.parts
    config = AutoConfig.from_pretrained(
        parts.weights, revision=parts.revision, trust_remote_code=source.run.trust_remote_code
    )
    return {
        "teacher": {
            **teacher.model_dump(include={"model", "revision", "adapter", "dtype", "quantization"}),
            "commit": getattr(config, "_commit_hash", None),
            "files": fingerprint(parts),
            "chat_template": hashlib.sha256(
                json.dumps([source.template, source.teacher.template_options], sort_keys=True).encode()
            ).hexdigest(),
            "ends": source.ends,
            "answers": "with special tokens",
        },
        "settings": {**asdict(sampling), "batch_size": batch_size, "device": device.split(":")[0]},
        "data": {"rows": len(rows), "sha256": _rows_digest(rows)},
        "versions": {
            "dskd": __version__,
            "axolotl": version("axolotl"),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def _rows_digest(rows: Any) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True).encode())
    return digest.hexdigest()


def write_dataset(
    out: Path, made_with: dict[str, Any], answers: list[Written], tokens: int, rows: Any, recipe: Path
) -> dict[str, object]:
    """Dataset and manifest from the complete answers; returns the counts."""
    answers = sorted(answers, key=lambda answer: answer.row)
    used = [answer for answer in answers if not answer.is_empty and (answer.whole or made_with["keep_unfinished"])]
    counts = {
        "prompts": len(answers),
        "written": len(used),
        "empty": sum(answer.is_empty and (answer.whole or not answer.reasoned) for answer in answers),
        "unfinished": sum(not answer.ended and (answer.reasoned or not answer.is_empty) for answer in answers),
        "reasoned": sum(answer.reasoned for answer in answers),
        "reasoning_without_answer": sum(answer.ended and not answer.whole for answer in answers),
        "tokens": tokens,
    }
    if not used:
        raise SettingError(
            out,
            "some whole answer",
            (
                f"{counts['unfinished']} cut at the limit, {counts['empty']} empty ones and "
                f"{counts['reasoning_without_answer']} of reasoning alone"
            ),
            "Raise --max-new-tokens, keep cut answers with --keep-unfinished, or choose another teacher.",
        )
    earlier = any(message["role"] == "assistant" for text in rows["messages"] for message in json.loads(text))
    manifest = {
        **made_with,
        "recipe": {"file": recipe.name, "sha256": hashlib.sha256(recipe.read_bytes()).hexdigest()},
        "counts": counts,
    }
    write_whole(manifest_of(out), [json.dumps(manifest, indent=2, ensure_ascii=False), "\n"])
    write_whole(out, _lines(used, rows, earlier))
    return {**counts, "earlier_answers": earlier}


def manifest_of(out: Path) -> Path:
    return out.with_name(f"{out.stem}.manifest.json")


def _lines(answers: list[Written], rows: Any, earlier: bool) -> Iterator[str]:
    """One conversation per line; every message of the file has the same keys, as Arrow wants it."""
    keys = dict.fromkeys(key for text in rows["messages"] for turn in json.loads(text) for key in turn)
    keys |= dict.fromkeys(key for answer in answers for key in answer.message)
    tools = any(rows["tools"])
    for answer in answers:
        row = rows[answer.row]
        turns = [*json.loads(row["messages"]), answer.message]
        messages = [{key: _plain(key, turn.get(key)) for key in keys} for turn in turns]
        if earlier:
            for message in messages:
                message["training"] = message is messages[-1]
        line = {"messages": messages, **({"tools": row["tools"] or None} if tools else {})}
        yield json.dumps(line, ensure_ascii=False) + "\n"


def _plain(key: str, value: Any) -> Any:
    """Arguments of tool calls as JSON text: their keys differ from call to call."""
    if key != "tool_calls" or not value:
        return value
    return [
        {**call, "function": {**call["function"], "arguments": json.dumps(call["function"].get("arguments"))}}
        if isinstance(call.get("function"), dict) and not isinstance(call["function"].get("arguments"), str)
        else call
        for call in value
    ]


def dataset_entry(out: Path, counts: dict[str, object], recipe: dict[str, object]) -> dict[str, object]:
    """The entry of the generated rows; the student reads them as it reads the recipe's own conversations."""
    entry: dict[str, object] = {"path": str(out), "type": "chat_template"}
    chats = chat_entries(recipe)
    if chats:
        entry |= {key: chats[0][key] for key in _STUDENT_KEYS if key in chats[0]}
        if "roles_to_train" in chats[0]:
            entry["roles_to_train"] = _roles_to_train(chats[0])
        if any(key in chats[0] for key in _THINKING_KEYS):
            # The rows are written under the names that the template knows, whatever they are in the recipe's own.
            entry |= dict.fromkeys(_THINKING_KEYS, thinking_field(recipe))
    if counts["earlier_answers"]:
        entry["message_field_training"] = "training"
    return entry


def _roles_to_train(entry: dict[str, Any]) -> list[str]:
    """The trained roles by their names in the written rows, where no `roles` translates; the answers' is among them."""
    renamed = {name: role for role, names in (entry.get("roles") or _ROLES).items() for name in names}
    return list(dict.fromkeys([*(renamed.get(name, name) for name in entry["roles_to_train"] or ()), "assistant"]))


def with_answers(entries: list[dict[str, Any]], rows: Any) -> list[dict[str, Any]]:
    """The entries without those that are prompts only; an entry beyond --limit was not read and stays."""
    read = set(rows["entry"])
    answered = {number for number, own in zip(rows["entry"], rows["answered"], strict=True) if own}
    return [entry for number, entry in enumerate(entries) if number in answered or number not in read]


def chat_entries(recipe: dict[str, Any]) -> list[dict[str, Any]]:
    return [entry for entry in recipe["datasets"] if entry.get("type") == "chat_template"]


def thinking_field(recipe: dict[str, object]) -> str:
    """The field of a message under which the student's template knows its reasoning."""
    return str((chat_entries(recipe) or [{}])[0].get("template_thinking_key") or FIELD)


def template_setting(recipe: dict[str, object], source: "Source") -> dict[str, object]:
    """A template for a student that has none and needed none until now."""
    needed = not chat_entries(recipe) and not recipe.get("chat_template") and not _student_has_template(source)
    return {"chat_template": "alpaca"} if needed else {}


def check_same(out: Path, made_with: dict[str, Any]) -> None:
    """Raise ``ValueError`` for a dataset that another run of the command than this one has written."""
    kept = {key: value for key, value in read_json(manifest_of(out)).items() if key not in ("recipe", "counts")}
    if kept != json.loads(json.dumps(made_with)):
        raise earlier_result(out)


def earlier_result(path: Path) -> SettingError:
    """The error about a file that the command would replace."""
    return SettingError(
        path,
        "no file of this name",
        "an earlier result",
        "Name another file with --out, or replace it with --overwrite.",
    )


def write_new_recipe(
    path: Path, out: Path, recipe: dict[str, Any], changes: dict[str, Any], *, plain: bool, overwrite: bool
) -> None:
    """The recipe with the new rows, as it is or without what distils; an equal one may be there."""
    digest = hashlib.sha256(out.read_bytes()).hexdigest()[:12]
    new = {**recipe, **changes}
    if plain:
        del new["dskd"]
        plugins = [name for name in new.pop("plugins") if str(name).split(".")[0] not in ("dskd", "dskd_plugin")]
        new |= {"plugins": plugins} if plugins else {}
    name = "seqkd" if plain else "distilled"
    new["output_dir"] = f"{str(recipe.get('output_dir') or './model-out').rstrip('/')}-{name}"
    # Axolotl knows prepared data by its path, not by its content.
    new["dataset_prepared_path"] = f"{recipe.get('dataset_prepared_path') or 'last_run_prepared'}/generated-{digest}"
    text = yaml.safe_dump(new, sort_keys=False, allow_unicode=True)
    if path.exists() and not overwrite and path.read_text(encoding="utf-8") != text:
        raise earlier_result(path)
    write_whole(path, [text])
    sources = ", ".join(str(entry["path"]) for entry in new["datasets"])
    click.echo(f"The recipe trains on: {sources}")


def _student_has_template(source: "Source") -> bool:
    try:
        return source.run.student_tokenizer().chat_template is not None
    except (OSError, ValueError):  # for `axolotl train` to explain; the answers are written
        return True
