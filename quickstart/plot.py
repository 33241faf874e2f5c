"""The loss plot of the quickstart."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

Log = list[dict[str, Any]]


def series(log: Log, key: str) -> tuple[list[float], list[float]]:
    """Steps and values of the log entries that hold `key`."""
    entries = [entry for entry in log if key in entry]
    return [float(entry["step"]) for entry in entries], [float(entry[key]) for entry in entries]


def smooth(values: list[float], window: int = 9) -> list[float]:
    """Mean of each value and up to `window` - 1 values before it."""
    return [sum(part := values[max(0, i + 1 - window) : i + 1]) / len(part) for i in range(len(values))]


def draw(sft: Log, dskd: Log, file: Path) -> None:
    """Left: cross-entropy on the gold answers of both runs; right: what the distillation terms did."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for label, log, key in (("SFT", sft, "loss"), ("DSKD", dskd, "dskd/ce")):
        steps, values = series(log, key)
        (line,) = left.plot(steps, values, alpha=0.25)
        left.plot(steps, smooth(values), color=line.get_color(), label=label)
    left.set(title="Cross-entropy on the training answers", xlabel="step", ylabel="nats per student token")
    left.legend()
    for key in ("dskd/t2s_kd", "dskd/s2t_kd", "dskd/t2s_ce"):
        steps, values = series(dskd, key)
        if steps:
            right.plot(steps, smooth(values), label=key)
    right.set(title="DSKD terms and agreement", xlabel="step", ylabel="nats per aligned token")
    rate = right.twinx()
    rate.plot(*series(dskd, "dskd/t2s_agreement"), color="grey", linestyle=":", label="dskd/t2s_agreement")
    rate.set(ylim=(0, 1), ylabel="share")
    lines = [*right.get_lines(), *rate.get_lines()]
    right.legend(lines, [str(line.get_label()) for line in lines], loc="center right")
    # Written beside and renamed, so that a killed run leaves no half a picture.
    partial = file.with_name("partial-" + file.name)
    figure.savefig(partial, dpi=120)
    plt.close(figure)
    partial.replace(file)
