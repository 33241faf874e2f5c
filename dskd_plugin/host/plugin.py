"""The hooks that Axolotl calls. Each hands on to another module; all are inert without a ``dskd:`` block."""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

from axolotl.integrations.base import BasePlugin

from dskd_plugin import __version__
from dskd_plugin.folders import check_student
from dskd_plugin.log import LOG
from dskd_plugin.methods import method_of
from dskd_plugin.preflight import check_key, check_recipe
from dskd_plugin.text.align import RULES


class DSKDPlugin(BasePlugin):
    """Dual-space knowledge distillation inside Axolotl."""

    def __init__(self) -> None:
        super().__init__()
        self.reader: Any = None
        self._trainer: Any = None
        self._post_train_calls = 0
        self._summary: str | None = None

    def register(self, cfg: Any) -> None:
        """Check everything that can be checked before a model is loaded or a file written."""
        from dskd_plugin.host import dataset

        self.reader = self._trainer = None
        dataset.install(None)
        check_key(cfg)
        if "dskd" not in cfg:
            LOG.warning("dskd: the plugin is listed but the recipe has no `dskd:` block; this run is plain Axolotl.")
            return
        self.reader = self._read(cfg)
        cfg["dataset_prepared_path"] = self._prepared_path(cfg)
        dataset.install(self.reader)

    def _read(self, cfg: Any) -> Any:
        from dskd_plugin.host.named_templates import named_template
        from dskd_plugin.pair import make_pair
        from dskd_plugin.settings import parse_settings
        from dskd_plugin.teachers.reader import check_reachable, read_teacher

        settings = parse_settings(cfg["dskd"].to_dict() if hasattr(cfg["dskd"], "to_dict") else cfg["dskd"])
        check_recipe(cfg, settings)
        without_gpu_kernels(cfg)
        trust_remote_code = bool(cfg.get("trust_remote_code"))
        check_student(cfg["base_model"])
        if not Path(cfg["base_model"]).exists():
            check_reachable("base_model", cfg["base_model"], cfg.get("revision_of_model"), trust_remote_code)
        reader = read_teacher(settings, cfg, named_template)
        changed = any(cfg.get(key) for key in ("tokens", "added_tokens_overrides", "special_tokens"))
        one_tokenizer = settings.alignment == "identity" or method_of(settings).needs_one_tokenizer
        if (one_tokenizer or settings.span_weight > 0) and not changed:
            from transformers import AutoTokenizer

            student = AutoTokenizer.from_pretrained(
                cfg.get("tokenizer_config") or cfg["base_model"],
                revision=cfg.get("revision_of_model") or "main",
                trust_remote_code=trust_remote_code,
            )
            make_pair(student, reader.table, settings)
        return reader

    def _prepared_path(self, cfg: Any) -> str:
        """A folder of its own for every teacher and setting: Axolotl's hash knows neither."""
        settings = self.reader.settings
        key = {
            "version": [__version__, RULES],
            "teacher": [
                *(settings.teacher.model, settings.teacher.revision, settings.teacher.adapter),
                self.reader.sequence_len,
            ],
            # Not the method: methods that pair rows alike share them.
            "pairing": method_of(settings).pairing(settings),
            "alignment": settings.alignment,
            "spans": settings.span_weight > 0,
            "prompts": settings.on_policy is not None,
            "tokenizer": self.reader.table.digest,
            "template": [self.reader.template, self.reader.template_options],
            "student_tokenizer": _tokenizer_files(cfg.get("tokenizer_config") or cfg["base_model"]),
            "student_sequence_len": cfg.get("sequence_len"),
            "excess_length_strategy": cfg.get("excess_length_strategy"),
        }
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
        return str(Path(cfg.get("dataset_prepared_path") or "last_run_prepared") / f"dskd-{digest}")

    def get_input_args(self) -> str:
        return "dskd_plugin.settings.DSKDArgs"

    def get_trainer_cls(self, cfg: Any) -> Any:
        if self.reader is None:
            return None
        from dskd_plugin.host.trainer import DSKDTrainer

        return DSKDTrainer.configured(self.reader, cfg)

    def get_collator_cls_and_kwargs(self, cfg: Any, is_eval: bool = False) -> Any:
        if self.reader is None:
            return None
        from dskd_plugin.host.collator import collator_class

        attends = not method_of(self.reader.settings).in_pairs
        return collator_class(cfg, is_eval), {"cross_attention": attends}

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        if self.reader is not None:
            self._trainer, self._post_train_calls = trainer, 0

    def post_train(self, cfg: Any, model: Any) -> None:
        """Axolotl calls it after the last step, and again after the student is saved."""
        if self._trainer is None:
            return
        self._post_train_calls += 1
        if self._post_train_calls == 2:
            from dskd_plugin.host import partial
            from dskd_plugin.host.summary import summary

            trainer, self._trainer = self._trainer, None
            partial.finished(trainer)
            if trainer.is_world_process_zero():
                try:
                    self._summary = summary(trainer)
                except Exception as error:  # the student is saved: its run has not failed
                    LOG.warning("dskd: the run is finished, its summary could not be made: %r", error)

    def post_train_unload(self, cfg: Any) -> None:
        """The last hook of a run."""
        if self._summary is not None:
            sys.stdout.flush()
            sys.stderr.write(f"\n{self._summary}\n")
            sys.stderr.flush()
            self._summary = None


LORA_KERNELS = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel")


def without_gpu_kernels(cfg: Any) -> None:
    """Axolotl turns fused LoRA kernels on by itself; they allocate on a GPU and die without one."""
    import torch

    unset = [key for key in LORA_KERNELS if cfg.get(key) is None]
    if cfg.get("adapter") and unset and not torch.cuda.is_available():
        for key in unset:
            cfg[key] = False
        LOG.info("dskd: no GPU here, so LoRA trains without Axolotl's fused kernels: %s: false", ", ".join(unset))


def _tokenizer_files(model: str) -> str:
    """Digest of a local tokenizer's files: retraining it in place must not reuse old rows."""
    digest = hashlib.sha256(model.encode())
    for file in sorted(Path(model).glob("token*")) + sorted(Path(model).glob("*.jinja")):
        digest.update(file.read_bytes())
    return digest.hexdigest()
