"""The frozen teacher's hidden states, kept between epochs and runs: it reads the same rows every time.

Kept per sample and in the teacher's own precision, for benchmarks. A sample that was not seen before, such as an
answer of the student, is computed as always. Packed rows are never kept: their states are those of the packed forward
pass.

Not `dskd.teacher.cache`: `auto` keeps bfloat16 and refuses a second run that builds beside it, a folder in float32
needs a build for every set of rows and settings before its runs, and either would be a part of the recipe, by which
the studies know the runs that they have.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from dskd_plugin.host.trainer import DSKDTrainer

LIMIT = 4096  # samples in memory


class Store(Protocol):
    def get(self, sample: Tensor) -> Tensor | None: ...

    def put(self, sample: Tensor, states: Tensor) -> None: ...


class File:
    """Samples in memory, read from one file and written to it by `save`."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._kept: dict[tuple[int, ...], Tensor] = torch.load(file) if file.is_file() else {}
        self._known = len(self._kept)

    def get(self, sample: Tensor) -> Tensor | None:
        return self._kept.get(tuple(sample.tolist()))

    def put(self, sample: Tensor, states: Tensor) -> None:
        if len(self._kept) < LIMIT:
            self._kept[tuple(sample.tolist())] = states

    def save(self) -> None:
        if len(self._kept) > self._known == 0:
            partial = self.file.with_name(f"{self.file.name}.{torch.initial_seed()}.partial")
            torch.save({sample: states.clone() for sample, states in self._kept.items()}, partial)
            partial.replace(self.file)


class Folder:
    """One file for each sample, by the hash of the model and the ids."""

    def __init__(self, folder: Path, model: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.model = folder, model

    def _file(self, sample: Tensor) -> Path:
        key = hashlib.sha256(self.model.encode() + b"\0" + sample.long().cpu().numpy().tobytes())
        return self.folder / f"{key.hexdigest()[:32]}.pt"

    def get(self, sample: Tensor) -> Tensor | None:
        file = self._file(sample)
        return torch.load(file).to(sample.device) if file.is_file() else None

    def put(self, sample: Tensor, states: Tensor) -> None:
        file = self._file(sample)
        partial = file.with_suffix(f".{torch.initial_seed()}.{id(states)}")
        torch.save(states.detach().cpu().clone(), partial)
        partial.replace(file)


class Kept:
    """A teacher whose states are looked up in a store first; in all else it is that teacher."""

    def __init__(self, teacher: Any, store: Store) -> None:
        self._teacher, self._store = teacher, store

    def __getattr__(self, name: str) -> Any:
        return getattr(self._teacher, name)

    def rows(self, ids_T: Tensor, lengths: Tensor, bins: Tensor, rows_N: Tensor) -> Tensor:
        if self._teacher.packed or not len(rows_N):
            states: Tensor = self._teacher.rows(ids_T, lengths, bins, rows_N)
            return states
        samples = ids_T.split(lengths.tolist())
        found = [self._store.get(sample) for sample in samples]
        missing = [i for i, states in enumerate(found) if states is None]
        if missing:
            ids, inside = torch.cat([samples[i] for i in missing]), lengths[missing]
            fresh = self._teacher.rows(ids, inside, bins, torch.arange(len(ids), device=ids.device))
            for i, part in zip(missing, fresh.split(inside.tolist()), strict=True):
                self._store.put(samples[i], part)
                found[i] = part
        return torch.cat([states for states in found if states is not None])[rows_N]


def keep(store: Callable[[Any], Store]) -> Callable[["DSKDTrainer"], None]:
    """For `trainer.on_create`: put the store in front of the trainer's teacher, if it has one. store: of a teacher."""

    def install(trainer: "DSKDTrainer") -> None:
        if trainer.teacher is not None:
            trainer.teacher = Kept(trainer.teacher, store(trainer.teacher))

    return install


def in_folder(folder: Path) -> Callable[["DSKDTrainer"], None]:
    """`keep` in one folder, for all models."""
    return keep(lambda teacher: Folder(folder, f"{teacher.model.config._name_or_path} {teacher.model.dtype}"))
