"""What can be said of a recipe without a model library: its ``dskd:`` block, its folders, settings that do not mix.

``mistakes_of`` runs in the command itself, before torch, transformers and Axolotl's modules are imported; the same
functions run again when Axolotl loads the plugin, on the recipe as it is then.
"""

import json
import os
import re
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from dskd_plugin import kept_settings, last_words, recipe_file
from dskd_plugin.cache.layout import check_there
from dskd_plugin.errors import DSKDSetupError, Mistakes, SettingError, naming
from dskd_plugin.folders import check_optimizer, check_student, looks_local, nearest, read_json
from dskd_plugin.recipe_options import REFUSED, tiled_batches, whole_number
from dskd_plugin.teachers.files import check_pair, check_teacher
from dskd_plugin.teachers.resolve import parts_of

NAMES = ("dskd", "dskd_plugin")
PLUGINS = ("dskd", ".DSKDPlugin", ":DSKDPlugin")
COMMANDS = ("train", "preprocess", "evaluate")
DATA_FILES = (".json", ".jsonl", ".csv", ".parquet", ".arrow", ".txt", ".gz", ".zst")


def check_recipe(cfg: Any) -> None:
    """Raise ``ValueError`` for settings of the recipe that distillation cannot honour."""
    problems = [
        SettingError(key, "it unset beside a `dskd:` block", repr(cfg[key]), advice)
        for key, advice in REFUSED.items()
        if cfg.get(key)
    ]
    problems += tiled_batches(cfg)
    fsdp = cfg.get("fsdp_config")
    if (fsdp or cfg.get("fsdp")) and str(cfg.get("fsdp_version")) != "2":
        problems.append(SettingError("fsdp_version", "2", f"{cfg.get('fsdp_version')!r}", "Set fsdp_version: 2."))
    if fsdp and fsdp.get("state_dict_type") != "FULL_STATE_DICT":
        problems.append(
            SettingError(
                "fsdp_config.state_dict_type",
                "FULL_STATE_DICT",
                f"{fsdp.get('state_dict_type')!r}",
                "Set it, so that the student is saved without the projectors.",
            )
        )
    for key in ("sequence_parallel_degree", "context_parallel_size", "tensor_parallel_size"):
        if whole_number(cfg, key, 1) > 1:
            problems.append(SettingError(key, "1 beside a `dskd:` block", cfg[key], "Use data parallelism."))
    for key in ("dispatch_batches", "split_batches"):
        if (cfg.get("accelerator_config") or {}).get(key):
            problems.append(
                SettingError(f"accelerator_config.{key}", "false", "true: it cuts batches apart", "Remove it.")
            )
    # A worker of Ray reads the recipe as Axolotl has completed it, with a device map of its own.
    completed = cfg.get("world_size") is not None
    if not completed and cfg.get("device_map") in ("auto", "balanced", "balanced_low_0", "sequential"):
        problems.append(
            SettingError(
                "device_map",
                "it unset beside a `dskd:` block",
                f"{cfg['device_map']!r}",
                "Use DeepSpeed or FSDP2 for a student that does not fit on one device.",
            )
        )
    if cfg.get("lr_scheduler") == "one_cycle":
        problems.append(
            SettingError(
                "lr_scheduler", "a schedule that keeps the projectors' own learning rate", "'one_cycle'", "Use cosine."
            )
        )
    problems += _deepspeed_problems(cfg.get("deepspeed"))
    if problems:
        raise Mistakes(problems)


def _deepspeed_problems(given: Any) -> list[SettingError]:
    """What a file of DeepSpeed sets that the recipe must. given: its path or its content, or nothing."""
    if not given:
        return []
    content = given if isinstance(given, dict) else _engine_file(given)
    problems = []
    if "optimizer" in content:
        problems.append(
            SettingError(
                "deepspeed",
                "a file without an optimizer",
                f"{content['optimizer'].get('type')!r}: it would give the projectors the student's learning rate",
                "Set `optimizer` in the recipe.",
            )
        )
    if "scheduler" in content:
        problems.append(
            SettingError(
                "deepspeed",
                "a file without a scheduler",
                f"{content['scheduler'].get('type')!r}: it would give the projectors the student's learning rate",
                "Set `lr_scheduler` in the recipe.",
            )
        )
    return problems


def check_datasets(recipe: Any) -> None:
    """Raise ``ValueError`` for a data file or folder of this machine that is not there."""
    for block in ("datasets", "test_datasets"):
        entries = recipe.get(block) or ()
        if isinstance(entries, str | dict) or not all(hasattr(entry, "get") for entry in entries):
            raise SettingError(
                block,
                "a list of entries",
                f"{entries!r}",
                f"Write {block}: and below it - {{path: <file or hub id>, type: chat_template}}.",
            )
        for number, entry in enumerate(entries):
            path = str(entry.get("path") or "")
            local = looks_local(path) or ("://" not in path and path.endswith(DATA_FILES))
            if local and not Path(path).expanduser().exists():
                raise SettingError(
                    f"{block}[{number}].path",
                    "a file, a folder or a hub id",
                    f"{path!r}, which does not exist in {os.getcwd()}",
                    "Check the path.",
                )


def check_adapter(recipe: Any) -> None:
    """Raise ``ValueError`` for a student's adapter of this machine that is not there."""
    adapter = recipe.get("lora_model_dir")
    if not isinstance(adapter, str) or not (looks_local(adapter) or Path(adapter).expanduser().exists()):
        return
    if not (Path(adapter).expanduser() / "adapter_config.json").is_file():
        raise SettingError(
            "lora_model_dir",
            "the folder of a PEFT adapter, with an adapter_config.json",
            f"{adapter!r}{' without one' if Path(adapter).expanduser().exists() else ', which does not exist'}",
            "Check the path, or leave it out to start with a new adapter.",
        )


def check_kernels(settings: Any) -> None:
    """Raise ``ValueError`` for kernels that this machine cannot run."""
    import torch  # slow, and only where kernels are asked for

    from dskd_plugin.assemble import check_impl

    check_impl(settings, "cuda" if torch.cuda.is_available() else "cpu")


def check_places(recipe: Any) -> None:
    """Raise ``ValueError`` for a folder of the run that cannot be one: a file, or below a file or a locked folder."""
    for key in ("output_dir", "dataset_prepared_path"):
        place = recipe.get(key)
        if not isinstance(place, str) or "://" in place:
            continue
        there = nearest(Path(place).expanduser())
        if not there.is_dir() or not os.access(there, os.W_OK):
            wrong = "which cannot be written to" if there.is_dir() else "which is a file"
            raise SettingError(
                key,
                "a folder, or the path of a new one",
                f"{place!r}: there is {there}, {wrong}",
                "Name another folder.",
            )


def check_checkpoint(recipe: Any, settings: Any) -> None:
    """Raise ``ValueError`` for a checkpoint folder that is not there, lacks the optimizer, or is of other settings."""
    checkpoint = recipe.get("resume_from_checkpoint")
    if isinstance(checkpoint, str) and not Path(checkpoint).is_dir():
        raise SettingError(
            "resume_from_checkpoint",
            "the folder of a checkpoint",
            f"{checkpoint!r}, which does not exist",
            "Check the path, or leave it out.",
        )
    if isinstance(checkpoint, str):
        check_optimizer(Path(checkpoint))
        file = Path(checkpoint) / kept_settings.STATE
        # Half a file, of a run that was killed, is told with the other files of the checkpoint.
        if found := read_json(file):
            kept_settings.check_same(file, found, kept_settings.of(settings))


def check_listed(recipe: Any) -> None:
    """Raise ``ValueError`` for a block without the plugin: Axolotl drops it, and would train plain SFT."""
    plugins = recipe.get("plugins") or []
    roots = set() if isinstance(plugins, str) else _roots(plugins)
    if recipe.get("dskd") is not None and not roots & set(NAMES):
        raise SettingError(
            "plugins",
            "'dskd' in the list because the recipe has a `dskd:` block",
            f"the text {plugins!r}" if isinstance(plugins, str) else list(plugins),
            f"{'Add dskd to that list' if roots else 'Write `plugins: [dskd]`'}, or remove the block.",
        )
    wrong = [str(name) for name in plugins if _roots([name]) & set(NAMES) and not str(name).endswith(PLUGINS)]
    if wrong:
        raise SettingError("plugins", "'dskd'", repr(wrong[0]), "Write `plugins: [dskd]`.")


def check_key(recipe: Any) -> None:
    """Raise ``ValueError`` for a misspelt name of the block beside the listed plugin."""
    near = [] if "dskd" in recipe else get_close_matches("dskd", [str(key) for key in recipe], n=1, cutoff=0.7)
    if near:
        raise SettingError(near[0], "the key 'dskd' for the plugin's block", f"'{near[0]}'", "Rename it.")


def _engine_file(path: str) -> Any:
    if not Path(path).is_file():
        raise SettingError("deepspeed", "a JSON file", f"{path!r}, which does not exist", "Check the path.")
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise SettingError("deepspeed", "a JSON file", f"{path!r} ({error})", "Mend the file.") from None
    if not isinstance(content, dict):
        raise SettingError("deepspeed", "a JSON file with an object", f"{path!r} without one", "Mend the file.")
    return content


def mistakes_of(module: str, argv: list[str], original: list[str]) -> str | None:
    """What is wrong with the recipe that this process was started with; None if nothing is known to be."""
    words = _words(module, argv, original)
    try:
        recipe = _recipe(words)
    except SettingError as error:
        return str(error)
    if recipe is None:
        return None
    if module == "axolotl.cli.main":
        last_words.begin()
    given = _overridden(words)
    # The rows are prepared first, then the cache is made of them.
    trains = module != "axolotl.cli.preprocess" and argv[1:2] != ["preprocess"]
    try:
        check_started(recipe, given, _file(words) if trains else None)
    except (DSKDSetupError, ValueError) as error:
        return str(error)
    return None


def _words(module: str, argv: list[str], original: list[str]) -> list[str]:
    """The arguments of an Axolotl command; none in a process that only imports its module."""
    if module == "axolotl.cli.main":
        started = Path(argv[0]).name.startswith("axolotl") or module in original
        return argv[2:] if started and len(argv) > 1 and argv[1] in COMMANDS else []
    return argv[1:] if module in original else []


def _file(words: list[str]) -> str | None:
    return next((word for word in words if word.endswith((".yaml", ".yml")) and Path(word).is_file()), None)


def _recipe(words: list[str]) -> dict[str, object] | None:
    """The recipe, if it lies here and has to do with this plugin."""
    file = _file(words)
    if file is None or "--help" in words or any(word.startswith(("--cloud", "--sweep")) for word in words):
        return None
    text = Path(file).read_text(encoding="utf-8")
    if "dskd" not in text:
        return None
    recipe = recipe_file.parse(file, text)
    if len(re.findall(r"^dskd\s*:", text, re.MULTILINE)) > 1:
        raise SettingError(file, "one `dskd:` block", "several: YAML keeps the last alone", "Write them as one.")
    if not isinstance(recipe, dict):
        return None
    return recipe if "dskd" in recipe or _roots(recipe.get("plugins") or ()) & set(NAMES) else None


def _roots(plugins: Any) -> set[str]:
    """The packages of listed plugins."""
    return {str(plugin).replace(":", ".").split(".")[0] for plugin in plugins}


def _overridden(words: list[str]) -> dict[str, object]:
    """Settings of the recipe that the command line replaces."""
    given: dict[str, object] = {}
    for word, following in zip(words, [*words[1:], ""], strict=True):
        key, equals, value = word.partition("=")
        if key.startswith("--"):
            given[key[2:].replace("-", "_").split(".")[0]] = value if equals else following
    return given


def check_started(recipe: dict[str, Any], given: dict[str, Any], trains_by: str | None = None) -> None:
    """trains_by: the recipe's file, where the command reads the teacher's states."""
    for key in ("base_model", "resume_from_checkpoint"):
        if key in given:
            recipe = {**recipe, key: given[key]}
    # What else the command line replaces is not known here in its final form.
    kept = ("base_model", "resume_from_checkpoint", "dskd")
    recipe = {key: value for key, value in recipe.items() if key not in given or key in kept}
    if "plugins" not in given:
        check_listed(recipe)
    check_key(recipe)
    if "dskd" not in recipe or "dskd" in given:
        return
    from dskd_plugin.settings import parse_settings

    settings = parse_settings(recipe["dskd"])
    check_recipe(recipe)
    # Axolotl reads a .env file later, which may move the cache.
    cached = not Path(".env").is_file()
    check_datasets(recipe)
    entries = [*(recipe.get("datasets") or ()), *(recipe.get("test_datasets") or ())]
    needs_template = any(str(entry.get("type")).startswith("chat_template") for entry in entries)
    views, found = settings.each, []
    for place, one in enumerate(views):
        with naming(place, len(views)):
            found.append(parts_of(one.teacher))
            check_teacher(
                one.teacher,
                found[-1],
                needs_template=needs_template,
                needs_weights=one.needs_weights,
                cached=cached,
            )
    if recipe.get("base_model"):
        check_student(str(recipe["base_model"]), cached=cached)
    check_adapter(recipe)
    check_places(recipe)
    if not any(key in recipe or key in given for key in ("tokenizer_config", "tokens", "added_tokens_overrides")):
        for place, (one, parts) in enumerate(zip(views, found, strict=True)):
            with naming(place, len(views)):
                check_pair(str(recipe.get("base_model")), one, parts)
    check_checkpoint(recipe, settings)
    if trains_by is not None:
        if settings.impl == "fused" and not recipe.get("use_ray"):
            check_kernels(settings)
        for place, one in enumerate(views):
            with naming(place, len(views)):
                check_there(one.teacher.cache, trains_by)
