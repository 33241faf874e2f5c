"""What the study found (docs/results.md), for the log of a run that it concerns."""

from dskd_plugin.args import Settings

LOW_AGREEMENT = 0.15  # runs that began at 0.08 gained by it, those that began at 0.25 and 0.7 did not


def on_method(settings: Settings, *, one_tokenizer: bool) -> str | None:
    if settings.method == "dskd" and one_tokenizer:
        return "dskd: with one tokenizer `method: kd` scored better and cost less, see docs/results.md"
    return None


def on_agreement(settings: Settings, agreement: float) -> str | None:
    """agreement: share of rows where the projected teacher predicts its own token, in the first steps."""
    if agreement >= LOW_AGREEMENT or settings.projector.warmup_steps:
        return None
    return (
        f"dskd: the projected teacher predicts its own token on {agreement:.0%} of the rows. Where that began so low, "
        "`projector: {learning_rate: 5e-3, warmup_steps: 30}` scored better, see docs/results.md"
    )
