"""The distillation methods, one file each; `dskd.method` and `dskd.alignment` choose one."""

# Importing a method registers it; the order is that of messages and tables.
from dskd_plugin.methods import sft, kd, overlap_kd, bpm, uld, mined  # noqa: F401, I001
from dskd_plugin.methods import span_kd, csd, alm, gold, xtoken, dual_space, cross_attention  # noqa: F401
from dskd_plugin.methods.base import METHODS, Method, method_of, names, register

__all__ = ["METHODS", "Method", "method_of", "names", "register"]
