"""``projector.init: fitted``: reads teacher states of training rows and lets `core.fitting` fit the projector."""

import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from dskd_plugin.core.fitting import Fit, NotFalling
from dskd_plugin.errors import SettingError
from dskd_plugin.log import LOG
from dskd_plugin.losses.dual_space import DualSpaceLoss
from dskd_plugin.teachers.base import HiddenStates, staying

LEARNED_ROWS, UNSEEN_ROWS, FEWEST_ROWS = 4096, 1024, 512


def fit_projector(loss: DualSpaceLoss, teacher: HiddenStates, dataset: Any, *, seed: int, quiet: bool) -> Fit | None:
    """Fit the projector of ``loss`` on teacher states of the dataset's aligned rows and say what it was worth.

    The same on every rank: each reads the same rows in the same order. None on a rank that is sent its weights later.
    quiet: no bar and no line in the log. ``ValueError`` for a dataset with too few aligned rows.
    """
    if loss.head_weight.device.type == "meta":
        return None
    started = time.monotonic()
    device = loss.teacher_head.weight_VD.device
    unseen, learned = _read(teacher, dataset, device, seed=seed, quiet=quiet)
    if not bool(unseen.isfinite().all() & learned.isfinite().all()):
        raise SettingError(
            "dskd.projector.init",
            "teacher states that are numbers to fit the projector on",
            "NaN or infinite ones",
            "Check the teacher's weights and dtype.",
        )
    with tqdm(desc="Fitting the projector", unit="batch", disable=quiet) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        try:
            fit = loss.fit(learned, unseen, generator=torch.Generator().manual_seed(seed), on_batch=show)
        except NotFalling as error:
            raise SettingError(
                "dskd.projector.init",
                "a falling loss while the projector is fitted",
                error.loss,
                "Check the teacher's weights and dtype, or use init: ideal.",
            ) from error
    if not quiet:
        LOG.info(
            "dskd: projector fitted on %d teacher states in %d passes and %.0f s; on %d others it agrees with the "
            "teacher on %.0f %% -> %.0f %%, t2s_ce %.2f -> %.2f",
            *(len(learned), fit.passes, time.monotonic() - started, len(unseen)),
            *(100 * fit.before.agreement, 100 * fit.after.agreement, fit.before.label_loss, fit.after.label_loss),
        )
    return fit


def _read(
    teacher: HiddenStates, dataset: Any, device: torch.device, *, seed: int, quiet: bool
) -> tuple[Tensor, Tensor]:
    """Teacher states for measuring and for learning, of different samples in an order of the seed's."""
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed)).tolist()
    parts: list[Tensor] = []
    wanted, got = UNSEEN_ROWS + LEARNED_ROWS, 0
    with tqdm(total=wanted, desc="Reading teacher states", unit="row", disable=quiet) as bar, staying(teacher):
        for states_ND in _states(teacher, dataset, order, device):
            parts.append(states_ND)
            got += len(states_ND)
            bar.update(min(len(states_ND), wanted - bar.n))
            if got >= wanted:
                break
    if got < FEWEST_ROWS:
        raise SettingError(
            "dskd.projector.init",
            f"at least {FEWEST_ROWS} aligned tokens in the training rows to fit on",
            got,
            "Use init: ideal, or more rows.",
        )
    # Whole samples on either side: neighbouring states of one sample are much alike.
    unseen: list[Tensor] = []
    while sum(map(len, unseen)) < min(UNSEEN_ROWS, got // 5):
        unseen.append(parts.pop(0))
    if not parts:
        raise SettingError(
            "dskd.projector.init",
            "training rows to fit on beside those that measure the fit",
            f"{got} aligned tokens in {len(dataset)} rows",
            "Use init: ideal, or more rows.",
        )
    return torch.cat(unseen), torch.cat(parts)[:LEARNED_ROWS]


def _states(teacher: HiddenStates, dataset: Any, order: list[int], device: torch.device) -> Iterator[Tensor]:
    """The teacher's states at the aligned rows of each sample."""
    for index in order:
        sample = dataset[index]
        ids = torch.as_tensor(sample["teacher_input_ids"], device=device)
        targets = [position for position in sample["aligned_teacher"] if 0 < position < len(ids)]
        if targets:
            rows_N = torch.tensor(targets, device=ids.device) - 1
            yield teacher.rows(ids, torch.tensor([len(ids)]), torch.tensor([1]), rows_N)
