"""The hooks that Axolotl calls. Each hands on to another module; all are inert without a ``dskd:`` block."""

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from axolotl.integrations.base import BasePlugin

from dskd_plugin import __version__
from dskd_plugin.log import LOG
from dskd_plugin.preflight import check_key
from dskd_plugin.recipe_options import unheeded
from dskd_plugin.text.align import RULES

if TYPE_CHECKING:
    from dskd_plugin.run import Run


class DSKDPlugin(BasePlugin):
    """Dual-space knowledge distillation inside Axolotl."""

    def __init__(self) -> None:
        super().__init__()
        self.run: Run | None = None
        self._trainer: Any = None
        self._post_train_calls = 0
        self._summary: str | None = None

    def register(self, cfg: Any) -> None:
        """Check everything that can be checked before a model is loaded or a file written."""
        from dskd_plugin.host import dataset
        from dskd_plugin.host.named_templates import TEMPLATES
        from dskd_plugin.run import resolve

        self.run = self._trainer = None
        dataset.install(None)
        check_key(cfg)
        if "dskd" not in cfg:
            LOG.warning("dskd: the plugin is listed but the recipe has no `dskd:` block; this run is plain Axolotl.")
            return
        self.run = resolve(cfg, TEMPLATES)
        without_gpu_kernels(cfg)
        for option in unheeded(cfg):
            LOG.info("dskd: %s has no effect: distillation computes its own cross-entropy, a block at a time", option)
        on_one_device(cfg)
        cfg["dataset_prepared_path"] = _prepared_path(self.run)
        dataset.install(self.run)

    def get_input_args(self) -> str:
        return "dskd_plugin.settings.DSKDArgs"

    def get_trainer_cls(self, cfg: Any) -> Any:
        if self.run is None:
            return None
        from dskd_plugin.host.trainer import DSKDTrainer

        return DSKDTrainer.configured(self.run.on(cfg))

    def get_collator_cls_and_kwargs(self, cfg: Any, is_eval: bool = False) -> Any:
        if self.run is None:
            return None
        from dskd_plugin.host.collator import collator_class

        options = {"cross_attention": not self.run.method.in_pairs, "teachers": len(self.run.readers)}
        return collator_class(cfg, is_eval), options

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        from dskd_plugin.host.trainer import DSKDTrainer

        # A process that trains a plain recipe after one of ours still has this plugin registered.
        if isinstance(trainer, DSKDTrainer):
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


def registered() -> DSKDPlugin:
    """The plugin that Axolotl has made for the recipe that it read last."""
    from axolotl.integrations.base import PluginManager

    (plugin,) = (one for one in PluginManager.get_instance().plugins.values() if isinstance(one, DSKDPlugin))
    return plugin


def _prepared_path(run: "Run") -> str:
    """A folder of its own for every teacher and setting: Axolotl's hash knows neither."""
    settings, recipe = run.settings, run.recipe
    read = [_read_by(one) for one in run.each]
    key = {
        "version": [__version__, RULES],
        **(read[0] if len(read) == 1 else {"teachers": read}),
        # Not the method: methods that pair rows alike share them.
        "pairing": run.method.pairing(settings),
        "alignment": settings.alignment,
        "spans": settings.with_spans,
        "prompts": settings.on_policy is not None,
        "student_tokenizer": _tokenizer_files(recipe.get("tokenizer_config") or recipe["base_model"]),
        "student_sequence_len": run.student_len,
        "excess_length_strategy": recipe.get("excess_length_strategy"),
    }
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    folder, own = Path(recipe.get("dataset_prepared_path") or "last_run_prepared"), f"dskd-{digest}"
    # A worker of Ray gets the recipe in which it has been written already.
    return str(folder if folder.name == own else folder / own)


def _read_by(run: "Run") -> dict[str, Any]:
    """What decides how the teacher of a run with one alone reads the rows."""
    settings, teacher = run.settings.teacher, run.teacher
    return {
        "teacher": [settings.model, settings.revision, settings.adapter, teacher.sequence_len],
        "tokenizer": teacher.table.digest,
        "template": [teacher.template, teacher.template_options],
    }


LORA_KERNELS = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel")


def without_gpu_kernels(cfg: Any) -> None:
    """Axolotl turns fused LoRA kernels on by itself; they allocate on a GPU and die without one."""
    import torch

    unset = [key for key in LORA_KERNELS if cfg.get(key) is None]
    if cfg.get("adapter") and unset and not torch.cuda.is_available():
        for key in unset:
            cfg[key] = False
        LOG.info("dskd: no GPU here, so LoRA trains without Axolotl's fused kernels: %s: false", ", ".join(unset))


def on_one_device(cfg: Any) -> None:
    """Keep a student in one process on one device, where its rows are: Axolotl would spread it over all."""
    import torch

    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1 and not cfg.get("device_map")
    if alone and torch.cuda.device_count() > 1:
        cfg["device_map"] = {"": 0}


def _tokenizer_files(model: str) -> str:
    """Digest of a local tokenizer's files: retraining it in place must not reuse old rows."""
    digest = hashlib.sha256(model.encode())
    for file in sorted(Path(model).glob("token*")) + sorted(Path(model).glob("*.jinja")):
        digest.update(file.read_bytes())
    return digest.hexdigest()
