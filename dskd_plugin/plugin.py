"""The hooks that Axolotl calls. Each hands on to another module; all are inert without a ``dskd:`` block."""

import hashlib
import json
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from axolotl.integrations.base import BasePlugin
from axolotl.utils.logging import get_logger

from dskd_plugin import __version__
from dskd_plugin.align import RULES

LOG = get_logger("axolotl.dskd")

# Settings of the recipe that the method cannot honour: (key, what to do).
UNSUPPORTED = {
    "rl": "Remove it: distillation is a supervised run.",
    "reward_model": "Remove it: distillation trains a language model.",
    "process_reward_model": "Remove it: distillation trains a language model.",
    "pretraining_dataset": "List the data under `datasets`.",
    "streaming": "Remove it: teacher and student rows are aligned before training.",
    "skip_prepare_dataset": "Remove it: teacher and student rows are aligned before training.",
    "processor_type": "Remove it: only text is distilled.",
    "batch_flattening": "Use sample_packing instead.",
    "label_smoothing_factor": "Remove it: the cross-entropy of the student's tokens is exact.",
    "push_dataset_to_hub": "Remove it: the hub copy would be shared by different teachers.",
    "kd_trainer": "Remove Axolotl's own distillation settings.",
    "torch_compile": "Remove it: the loss inside the student's forward is not compiled.",
    "max_memory": "Remove it: the student stays on one device per process; use DeepSpeed or FSDP2.",
    "gpu_memory_limit": "Remove it: the student stays on one device per process; use DeepSpeed or FSDP2.",
    "loraplus_lr_ratio": "Remove it: the projectors need a learning rate of their own.",
}


class DSKDPlugin(BasePlugin):
    """Dual-space knowledge distillation inside Axolotl."""

    def __init__(self) -> None:
        super().__init__()
        self.reader: Any = None

    def register(self, cfg: Any) -> None:
        """Check everything that can be checked before a model is loaded or a file written."""
        from dskd_plugin import dataset

        self.reader = None
        dataset.install(None)
        if "dskd" not in cfg:
            near = get_close_matches("dskd", list(cfg), n=1, cutoff=0.7)
            if near:
                raise ValueError(
                    f"{near[0]}: expected the key 'dskd' for the plugin's block, got '{near[0]}'. Rename it."
                )
            LOG.warning("dskd: the plugin is listed but the recipe has no `dskd:` block; this run is plain Axolotl.")
            return
        self.reader = self._read(cfg)
        cfg["dataset_prepared_path"] = self._prepared_path(cfg)
        dataset.install(self.reader)

    def _read(self, cfg: Any) -> Any:
        from dskd_plugin.args import parse_settings
        from dskd_plugin.dataset import TeacherReader
        from dskd_plugin.pair import make_pair, read_table
        from dskd_plugin.teacher import (
            check_config,
            check_files,
            load_tokenizer,
            resolve_template,
            teacher_sequence_len,
        )

        settings = parse_settings(cfg["dskd"].to_dict() if hasattr(cfg["dskd"], "to_dict") else cfg["dskd"])
        check_recipe(cfg, settings)
        trust_remote_code = bool(cfg.get("trust_remote_code"))
        positions = check_config(settings.teacher, trust_remote_code)
        limit = teacher_sequence_len(settings.teacher, cfg.get("sequence_len") or 512, positions)
        check_files("base_model", cfg["base_model"])
        tokenizer = load_tokenizer(settings.teacher, trust_remote_code)
        types = [str(entry.get("type")) for entry in [*(cfg.get("datasets") or ()), *(cfg.get("test_datasets") or ())]]
        template = resolve_template(
            settings.teacher, tokenizer, any(kind.startswith("chat_template") for kind in types)
        )
        table = read_table("tokenizer of dskd.teacher.model", tokenizer)
        changed = any(cfg.get(key) for key in ("tokens", "added_tokens_overrides", "special_tokens"))
        needs_pair = settings.alignment == "identity" or settings.method == "kd" or settings.chunk_ratio > 0
        if needs_pair and not changed:
            from transformers import AutoTokenizer

            student = AutoTokenizer.from_pretrained(
                cfg.get("tokenizer_config") or cfg["base_model"],
                revision=cfg.get("revision_of_model") or "main",
                trust_remote_code=trust_remote_code,
            )
            make_pair(student, table, settings)
        return TeacherReader(settings, tokenizer, template, table, limit)

    def _prepared_path(self, cfg: Any) -> str:
        """A folder of its own for every teacher and setting: Axolotl's hash knows neither."""
        from dskd_plugin.pair import pairing

        settings = self.reader.settings
        key = {
            "version": [__version__, RULES],
            "teacher": [settings.teacher.model, settings.teacher.revision, self.reader.sequence_len],
            # Not the method: methods that pair rows alike share them.
            "pairing": pairing(settings),
            "alignment": settings.alignment,
            "chunks": settings.chunk_ratio > 0,
            "prompts": settings.on_policy is not None,
            "tokenizer": self.reader.table.digest,
            "template": self.reader.template,
            "student_tokenizer": _tokenizer_files(cfg.get("tokenizer_config") or cfg["base_model"]),
            "student_sequence_len": cfg.get("sequence_len"),
            "excess_length_strategy": cfg.get("excess_length_strategy"),
        }
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
        return str(Path(cfg.get("dataset_prepared_path") or "last_run_prepared") / f"dskd-{digest}")

    def get_input_args(self) -> str:
        return "dskd_plugin.args.DSKDArgs"

    def get_trainer_cls(self, cfg: Any) -> Any:
        if self.reader is None:
            return None
        from dskd_plugin.trainer import DSKDTrainer

        return DSKDTrainer.configured(self.reader, cfg)

    def get_collator_cls_and_kwargs(self, cfg: Any, is_eval: bool = False) -> Any:
        if self.reader is None:
            return None
        from dskd_plugin.collator import collator_class

        return collator_class(cfg, is_eval), {}


def _tokenizer_files(model: str) -> str:
    """Digest of a local tokenizer's files: retraining it in place must not reuse old rows."""
    digest = hashlib.sha256(model.encode())
    for file in sorted(Path(model).glob("token*")) + sorted(Path(model).glob("*.jinja")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def check_recipe(cfg: Any, settings: Any) -> None:
    """Raise ``ValueError`` for settings of the recipe that distillation cannot honour."""
    problems = [
        f"{key}: expected it unset beside a `dskd:` block, got {cfg[key]!r}. {advice}"
        for key, advice in UNSUPPORTED.items()
        if cfg.get(key)
    ]
    fsdp = cfg.get("fsdp_config")
    if (fsdp or cfg.get("fsdp")) and str(cfg.get("fsdp_version")) != "2":
        problems.append(f"fsdp_version: expected 2, got {cfg.get('fsdp_version')!r}. Set fsdp_version: 2.")
    if fsdp and fsdp.get("state_dict_type") != "FULL_STATE_DICT":
        problems.append(
            f"fsdp_config.state_dict_type: expected FULL_STATE_DICT, got {fsdp.get('state_dict_type')!r}. "
            "Set it, so that the student is saved without the projectors."
        )
    for key in ("sequence_parallel_degree", "context_parallel_size", "tensor_parallel_size"):
        if (cfg.get(key) or 1) > 1:
            problems.append(f"{key}: expected 1 beside a `dskd:` block, got {cfg[key]}. Use data parallelism.")
    for key in ("dispatch_batches", "split_batches"):
        if (cfg.get("accelerator_config") or {}).get(key):
            problems.append(f"accelerator_config.{key}: expected false, got true: it cuts batches apart. Remove it.")
    if cfg.get("device_map") in ("auto", "balanced", "balanced_low_0", "sequential"):
        problems.append(
            f"device_map: expected it unset beside a `dskd:` block, got {cfg['device_map']!r}. Use DeepSpeed or FSDP2 "
            "for a student that does not fit on one device."
        )
    if cfg.get("lr_scheduler") == "one_cycle":
        problems.append(
            "lr_scheduler: expected a schedule that keeps the projectors' own learning rate, got 'one_cycle'. "
            "Use cosine."
        )
    if settings.on_policy is not None and (fsdp or cfg.get("fsdp")):
        problems.append(
            "dskd.on_policy: expected a student that each process holds whole, got fsdp_config. "
            "Use DDP or DeepSpeed ZeRO-1 or -2."
        )
    deepspeed = cfg.get("deepspeed")
    if deepspeed:
        content = deepspeed if isinstance(deepspeed, dict) else json.loads(Path(deepspeed).read_text(encoding="utf-8"))
        stage = (content.get("zero_optimization") or {}).get("stage", 0)
        if settings.on_policy is not None and stage == 3:
            problems.append(
                "dskd.on_policy: expected a student that each process holds whole, got DeepSpeed ZeRO-3. "
                "Use ZeRO-1 or -2."
            )
        if "optimizer" in content:
            problems.append(
                f"deepspeed: expected a file without an optimizer, got {content['optimizer'].get('type')!r}: "
                "it would give the projectors the student's learning rate. Set `optimizer` in the recipe."
            )
        if "scheduler" in content:
            problems.append(
                f"deepspeed: expected a file without a scheduler, got {content['scheduler'].get('type')!r}: "
                "it would give the projectors the student's learning rate. Set `lr_scheduler` in the recipe."
            )
    if problems:
        raise ValueError("\n".join(problems))
