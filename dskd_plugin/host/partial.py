"""A run that ends early: a mark on its folder, a checkpoint where there is time for one, and how to go on."""

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from dskd_plugin import last_words
from dskd_plugin.folders import checkpoints, read_json
from dskd_plugin.log import LOG

MARK = "PARTIAL.txt"
TEXT = """This folder belongs to a training run that has not ended, or that was stopped. Weights that lie beside this
file are not the finished student. A folder checkpoint-<step> is whole if it holds a trainer_state.json.
This file disappears when a run comes to its end.
"""
SIGNALS = {signal.SIGINT: "Ctrl-C (SIGINT)", signal.SIGTERM: "SIGTERM"}
# A terminal signals every process of a run, and its launcher hands the same signal down.
ECHO_SECONDS = 2.0


def newest_checkpoint(folder: Path) -> Path | None:
    """The last checkpoint that was written to its end."""
    return next((path for path in reversed(checkpoints(folder)) if read_json(path / "trainer_state.json")), None)


class Interruption(TrainerCallback):
    """Lets the step end and saves a checkpoint at the first signal; gives way at once to a second one."""

    def __init__(self, *, at_once: bool) -> None:
        # Several ranks would have to agree on a last step.
        self.at_once = at_once
        self.signal: int | None = None
        self._since = 0.0

    def listen(self) -> None:
        """Take the signals over, also from Axolotl, which would save the weights as if they were the finished ones."""
        if threading.current_thread() is not threading.main_thread():
            return  # a Ray worker: signals are Ray's
        for number in SIGNALS:
            signal.signal(number, self._on_signal)

    def stop_listening(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def _on_signal(self, number: int, frame: Any) -> None:
        if self.signal is not None and time.monotonic() - self._since < ECHO_SECONDS:
            return
        if self.at_once or self.signal is not None:
            self.signal = number
            raise SystemExit(128 + number)
        self.signal, self._since = number, time.monotonic()
        LOG.warning("dskd: stopping after this step, with a checkpoint; once more stops at once")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if self.signal is not None:
            control.should_save = control.should_training_stop = True
        return control

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.at_once = True  # there is no further step


@contextlib.contextmanager
def unfinished(trainer: Any, recipe: str | None) -> Iterator[None]:
    """Training inside: marked as partial until ``finished``; if it ends early, the last lines say how to go on."""
    folder = Path(trainer.args.output_dir)
    main = trainer.is_world_process_zero()
    if main:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MARK).write_text(TEXT, encoding="utf-8")
    interruption = Interruption(at_once=trainer.args.world_size > 1)
    trainer.add_callback(interruption)
    trainer.interruption = interruption
    interruption.listen()
    try:
        yield
        if interruption.signal is not None:
            raise SystemExit(128 + interruption.signal)
    except BaseException:
        if main:
            _say_how_to_go_on(trainer, interruption, folder, recipe or "<recipe>.yaml")
        raise


def finished(trainer: Any) -> None:
    """The student is saved: nothing is partial any more."""
    trainer.interruption.stop_listening()
    if trainer.is_world_process_zero():
        (Path(trainer.args.output_dir) / MARK).unlink(missing_ok=True)


def _say_how_to_go_on(trainer: Any, interruption: Interruption, folder: Path, recipe: str) -> None:
    by = SIGNALS.get(interruption.signal, "an error") if interruption.signal else "an error"  # type: ignore[call-overload]
    state = trainer.state
    lines = [
        f"dskd: stopped by {by} after step {state.global_step} of {state.max_steps}. {folder} holds no finished "
        f"student ({MARK} marks it)."
    ]
    checkpoint = newest_checkpoint(folder)
    if checkpoint is None:
        lines.append(f"There is no checkpoint yet. Start anew: {last_words.command(recipe)}")
    else:
        resuming = last_words.command(recipe, "--resume-from-checkpoint", str(checkpoint))
        lines.append(f"Go on:      {resuming}")
        lines.append(f"Start anew: {last_words.command(recipe)}, with another output_dir")
    last_words.say(last_words.STOP if interruption.signal else last_words.ADVICE, "\n".join(lines))
