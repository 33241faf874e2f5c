"""The frozen teacher's hidden states, kept between epochs and runs: it reads the same rows every time.

Only for the study on a CPU. Rows are kept per sample and in the teacher's own precision; a row that was not seen
before, such as an answer of the student, is computed as always.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LIMIT = 4096  # samples


def install(file: Path) -> Any:
    """Make the plugin's teacher look its samples up in `file`; returns a function that writes the file."""
    from dskd_plugin.teacher import Teacher

    compute = Teacher._padded_hidden
    kept: dict[tuple[int, ...], Tensor] = torch.load(file) if file.is_file() else {}
    known = len(kept)

    def hidden(self: Any, ids_T: Tensor, lengths: Tensor) -> Tensor:
        samples = [tuple(part.tolist()) for part in ids_T.split(lengths.tolist())]
        missing = [i for i, sample in enumerate(samples) if sample not in kept]
        fresh: dict[int, Tensor] = {}
        if missing:
            ids = torch.cat([ids_T.new_tensor(samples[i]) for i in missing])
            parts = compute(self, ids, lengths[missing]).split(lengths[missing].tolist())
            fresh = dict(zip(missing, parts, strict=True))
            if len(kept) < LIMIT:
                kept.update({samples[i]: part for i, part in fresh.items()})
        return torch.cat([fresh[i] if i in fresh else kept[sample] for i, sample in enumerate(samples)])

    Teacher._padded_hidden = hidden  # type: ignore[method-assign]

    def save() -> None:
        if len(kept) > known == 0:
            partial = file.with_name(f"{file.name}.{torch.initial_seed()}.partial")
            torch.save({sample: part.clone() for sample, part in kept.items()}, partial)
            partial.replace(file)

    return save
