"""A plugin that tells transformers to train on the CPU, which mixed precision and 8-bit weights insist to be told."""

from typing import Any

from axolotl.integrations.base import BasePlugin


class OnCpu(BasePlugin):
    """Listed behind ours: ``plugins: [dskd, benchmarks.on_cpu.OnCpu]``."""

    def get_training_args(self, cfg: Any) -> dict[str, bool]:
        return {"use_cpu": True}
