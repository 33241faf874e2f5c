"""The curves of the quickstart as one SVG picture."""

import io

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from quickstart.recipes import Log, series

# What the plugin logs besides the cross-entropy, where the method has it: nats per aligned token.
TERMS = ("dskd/t2s_kd", "dskd/t2s_ce", "dskd/s2t_kd", "dskd/kd")
AGREEMENT = "dskd/t2s_agreement"


def smooth(values: list[float], window: int = 9) -> list[float]:
    """Mean of each value and up to `window` - 1 values before it."""
    return [sum(part := values[max(0, i + 1 - window) : i + 1]) / len(part) for i in range(len(values))]


def draw(logs: dict[str, Log]) -> str:
    """SVG: cross-entropy on the training answers, plain fine-tuning on unseen rows, and the distillation terms."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    for label, name, key in (("SFT", "sft", "loss"), ("SeqKD", "seqkd", "loss"), ("DSKD", "dskd", "dskd/ce")):
        steps, values = series(logs[name], key)
        (line,) = left.plot(steps, values, alpha=0.2)
        left.plot(steps, smooth(values), color=line.get_color(), label=label)
    left.set(title="Cross-entropy on the training answers", xlabel="step", ylabel="nats per token")
    left.legend()
    for label, name in (("few gold answers", "sft"), ("all gold answers", "sft_all")):
        steps, values = series(logs[name], "eval_loss")
        middle.plot(steps, values, marker="o", markersize=3, label=label)
    middle.set(title="SFT on validation rows", xlabel="step", ylabel="nats per token")
    middle.legend()
    _terms(right, logs["dskd"])
    picture = io.StringIO()
    figure.savefig(picture, format="svg", metadata={"Date": None})
    plt.close(figure)
    return picture.getvalue()[picture.getvalue().index("<svg") :]


def _terms(axes: "plt.Axes", log: Log) -> None:
    for key in TERMS:
        steps, values = series(log, key)
        if steps:
            axes.plot(steps, smooth(values), label=key)
    axes.set(title="Distillation terms", xlabel="step", ylabel="nats per aligned token")
    lines = list(axes.get_lines())
    steps, values = series(log, AGREEMENT)
    if steps:
        rate = axes.twinx()
        lines += rate.plot(steps, smooth(values), color="grey", linestyle=":", label=AGREEMENT)
        rate.set(ylim=(0, 1), ylabel="share")
    axes.legend(lines, [str(line.get_label()) for line in lines], loc="center right")
