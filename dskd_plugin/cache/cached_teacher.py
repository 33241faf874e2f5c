"""A teacher whose hidden states were computed before: its head is here, its decoder is not.

Shapes: T teacher tokens of a batch, N rows that the student needs, V ids of the teacher, E its width.
"""

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from dskd_plugin.cache.layout import HEAD
from dskd_plugin.cache.manifest import Manifest
from dskd_plugin.cache.needs import key_of
from dskd_plugin.cache.store import Found, Store
from dskd_plugin.core.heads import Head
from dskd_plugin.errors import SettingError
from dskd_plugin.teachers.live import Teacher

WEIGHT, BIAS, EMBEDDING = "weight", "bias", "embedding"


class CachedTeacher:
    """A `HiddenStates` that looks samples up.

    fallback: the live teacher for samples that nobody could compute before, such as answers of the student. advice:
    what to do about any other sample that is not there.
    """

    packed = False

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        *,
        vocab_size: int,
        device: torch.device,
        advice: str,
        fallback: Teacher | None = None,
    ) -> None:
        """vocab_size: real ids of the teacher's tokenizer, which may know more than when the states were read."""
        self.folder, self._advice, self.fallback = folder, advice, fallback
        self.store = Store(folder, manifest.shards)
        self._dtype = getattr(torch, manifest.states)
        if fallback is not None:
            self.head = fallback.head
            self._embedding: Tensor | None = fallback.embedding
            return
        tensors = load_file(folder / HEAD, device=str(device))
        self.head = Head(tensors[WEIGHT], vocab_size, tensors.get(BIAS), **manifest.head)
        self._embedding = tensors.get(EMBEDDING)

    @property
    def width(self) -> int:
        return self.head.weight_VD.shape[1]

    @property
    def embedding(self) -> Tensor:
        """Input embeddings [V, D]."""
        if self._embedding is None:
            raise SettingError(self.folder / HEAD, "the teacher's embeddings, for alignment: cma", "none", self._advice)
        return self._embedding

    @torch.no_grad()
    def rows(self, ids_T: Tensor, lengths: Tensor, bins: Tensor, rows_N: Tensor) -> Tensor:
        """See `HiddenStates.rows`; in the dtype of the head, as the live teacher's are."""
        device, dtype = ids_T.device, self.head.weight_VD.dtype
        if not len(rows_N):
            return torch.zeros(0, self.width, dtype=dtype, device=device)
        rows = rows_N.cpu().numpy()
        starts, found, known, unknown = self._places(ids_T.cpu().numpy(), lengths.numpy(), rows)
        if unknown and self.fallback is None:
            one = next(iter(unknown))
            raise SettingError(
                self.folder,
                "the teacher's states of every sample of the run",
                f"none of one of {starts[one + 1] - starts[one]} tokens, or not those of all its rows",
                self._advice,
            )
        result_NE = torch.empty(len(rows), self.width, dtype=dtype, device=device)
        if known:
            at = torch.from_numpy(np.concatenate(known))
            kept_NE = torch.empty(len(at), self.width, dtype=self._dtype, pin_memory=device.type == "cuda")
            self.store.pick(found, kept_NE)
            result_NE[at.to(device)] = kept_NE.to(device, non_blocking=True).to(dtype)
        if unknown:
            at = torch.from_numpy(np.concatenate(list(unknown.values())))
            result_NE[at.to(device)] = self._computed(ids_T, lengths, bins, unknown, rows, starts).to(dtype)
        return result_NE

    def read_ahead(self, ids_T: Tensor, lengths: Tensor, rows_N: Tensor) -> None:
        """Have the system read what `rows` will ask for, all on the CPU; called in a worker of the dataloader.

        The rows themselves stay where they are: a worker would send them through shared memory, of which a container
        often has little.
        """
        _, found, _, _ = self._places(ids_T.numpy(), lengths.numpy(), rows_N.numpy())
        self.store.read(found)

    def _places(
        self, ids_T: np.ndarray, lengths: np.ndarray, rows_N: np.ndarray
    ) -> tuple[np.ndarray, list[Found], list[np.ndarray], dict[int, np.ndarray]]:
        """Where each sample starts; where rows are in the store and which they are, and those of unknown samples."""
        starts = np.concatenate([[0], lengths.cumsum()])
        sample_N = np.searchsorted(starts, rows_N, side="right") - 1
        order_N = np.argsort(sample_N, kind="stable")
        samples, first = np.unique(sample_N[order_N], return_index=True)
        found: list[Found] = []
        known: list[np.ndarray] = []
        unknown: dict[int, np.ndarray] = {}
        for sample, mine in zip(samples.tolist(), np.split(order_N, first[1:]), strict=True):
            start, stop = starts[sample], starts[sample + 1]
            place = self.store.find(key_of(ids_T[start:stop]), rows_N[mine] - start)
            if place is None:
                unknown[sample] = mine
            else:
                found.append(place)
                known.append(mine)
        return starts, found, known, unknown

    def _computed(
        self,
        ids_T: Tensor,
        lengths: Tensor,
        bins: Tensor,
        unknown: dict[int, np.ndarray],
        rows: np.ndarray,
        starts: np.ndarray,
    ) -> Tensor:
        """The live teacher's states of the rows of unknown samples, which alone it reads, packed as they were."""
        assert self.fallback is not None
        samples = list(unknown)
        bin_of = torch.repeat_interleave(torch.arange(len(bins)), bins)[samples]
        counts = torch.bincount(bin_of)
        inside = lengths[samples]
        new_starts = (inside.cumsum(0) - inside).tolist()
        shifted = [
            rows[mine] - starts[sample] + start
            for (sample, mine), start in zip(unknown.items(), new_starts, strict=True)
        ]
        return self.fallback.rows(
            torch.cat([ids_T[starts[sample] : starts[sample + 1]] for sample in samples]),
            inside,
            counts[counts > 0],
            torch.from_numpy(np.concatenate(shifted)).to(ids_T.device),
        )
