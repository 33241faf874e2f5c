"""A run that ends early: a mark on its folder, a checkpoint where there is time for one, and how to go on."""

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
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


def newest_checkpoint(folder: Path) -> Path | None:
    """The last checkpoint of this run that was written to its end: an earlier run may have left some behind."""
    start = (folder / MARK).stat().st_mtime_ns
    for path in reversed(checkpoints(folder)):
        state = path / "trainer_state.json"
        if read_json(state) and state.stat().st_mtime_ns >= start:
            return path
    return None


def of_earlier_run(folder: Path) -> bool:
    """Whether there are weights in a folder that this run has not written."""
    start = (folder / MARK).stat().st_mtime_ns
    return any(file.stat().st_mtime_ns < start for file in folder.glob("*model*.safetensors"))


class Interruption(TrainerCallback):
    """Lets the step end and saves a checkpoint at the first signal; gives way at once to a second one, and where there
    is no step.

    several: whether several ranks train, which would have to agree on a last step. words: said when the training is
    over and the student is being saved.
    """

    def __init__(self, *, several: bool, words: Callable[[], None]) -> None:
        self._several, self._words = several, words
        self.at_once, self.trained = True, False
        self.signal: int | None = None
        self._since = 0.0

    def listen(self) -> None:
        """Take the signals over, also from Axolotl, which would save the weights as if they were the finished ones."""
        if threading.current_thread() is not threading.main_thread():
            return  # a Ray worker: signals are Ray's
        for number in last_words.SIGNALS:
            signal.signal(number, self.on_signal)

    def stop_listening(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def on_signal(self, number: int, frame: Any) -> None:
        if self.signal is not None and time.monotonic() - self._since < last_words.ECHO_SECONDS:
            return
        if self.at_once or self.signal is not None:
            self.signal, self._since = number, time.monotonic()
            if self.trained:
                self._words()
            raise SystemExit(128 + number)
        self.signal, self._since = number, time.monotonic()
        LOG.warning("dskd: stopping after this step, with a checkpoint; once more stops at once")

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.at_once = self._several

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if self.signal is not None:
            control.should_save = control.should_training_stop = True
        return control

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.signal is not None:
            # Here, or the host would end the training as if it were complete, and keep its best checkpoint alone.
            raise SystemExit(128 + self.signal)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.at_once = True  # there is no further step


@contextlib.contextmanager
def unfinished(trainer: Any, recipe: str | None, resumed: str | None) -> Iterator[None]:
    """Training inside: marked as partial until ``finished``; if it ends early, the last lines say how to go on.

    resumed: the checkpoint that the run goes on from.
    """
    folder = Path(trainer.args.output_dir)
    main = trainer.is_world_process_zero()
    if main:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MARK).write_text(TEXT, encoding="utf-8")

    def words() -> None:
        if main:
            _say_how_to_go_on(trainer, interruption, folder, recipe or "<recipe>.yaml", resumed)

    interruption = Interruption(several=trainer.args.world_size > 1, words=words)
    trainer.add_callback(interruption)
    trainer.interruption = interruption
    interruption.listen()
    try:
        yield
        if interruption.signal is not None:
            raise SystemExit(128 + interruption.signal)
    except BaseException:
        words()
        raise
    interruption.trained = True


def finished(trainer: Any) -> None:
    """The student is saved: nothing is partial any more."""
    trainer.interruption.stop_listening()
    if trainer.is_world_process_zero():
        (Path(trainer.args.output_dir) / MARK).unlink(missing_ok=True)


def _say_how_to_go_on(trainer: Any, interruption: Interruption, folder: Path, recipe: str, resumed: str | None) -> None:
    by = last_words.SIGNALS[interruption.signal] if interruption.signal else "an error"
    state = trainer.state
    when = f"after step {state.global_step} of {state.max_steps}" if state.max_steps > 0 else "before the first step"
    other = "; the weights in it are of an earlier run" if of_earlier_run(folder) else ""
    lines = [f"dskd: stopped by {by} {when}. {folder} holds no finished student ({MARK} marks it{other})."]
    checkpoint = newest_checkpoint(folder) or resumed
    if checkpoint is None:
        lines.append(f"There is no checkpoint yet. Start anew: {last_words.command(recipe)}")
    else:
        resuming = last_words.command(recipe, "--resume-from-checkpoint", str(checkpoint))
        lines.append(f"Go on:      {resuming}")
        lines.append(f"Start anew: {last_words.command(recipe)}, with another output_dir")
    last_words.say(last_words.STOP if interruption.signal else last_words.ADVICE, "\n".join(lines))
