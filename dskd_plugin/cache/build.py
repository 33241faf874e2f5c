"""Computes what a cache lacks: by length, in batches of a number of tokens, shared by all ranks, to be gone on with.

Rows are padded, not packed: sorted by length there is next to no padding, and packed rows would multiply the attention
by all of their neighbours.
"""

import contextlib
import fcntl
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

import torch
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm

from dskd_plugin.cache import manifest as manifests
from dskd_plugin.cache import shards
from dskd_plugin.cache.cached_teacher import BIAS, EMBEDDING, WEIGHT
from dskd_plugin.cache.layout import HEAD, LOCK, MANIFEST, SHARDS
from dskd_plugin.cache.manifest import Manifest
from dskd_plugin.cache.needs import KEY_BYTES, Want
from dskd_plugin.cache.ranks import Ranks
from dskd_plugin.cache.shards import Computed, File
from dskd_plugin.cache.store import Store
from dskd_plugin.errors import DSKDSetupError, SettingError
from dskd_plugin.teachers.base import staying
from dskd_plugin.teachers.live import Teacher

SHARD_BYTES = 256 << 20
BATCH_TOKENS = {"cuda": 16384, "cpu": 2048}
# The time is told after so many seconds and batches.
_MEASURED_SECONDS, _MEASURED_BATCHES = 1.0, 3


@dataclass(frozen=True, kw_only=True)
class Order:
    """What is to be built. teacher, made_for: see `manifest`; width: of the states; embedding: whether it is kept too;
    head_bytes: what the head takes, and the embedding where it is kept.

    wanted: all samples that the recipe needs, see `needs`; datasets: where they are; states: dtype of the states;
    load: brings the teacher into memory; say: tells the user a line.
    """

    folder: Path
    teacher: Callable[[], dict[str, object]]
    made_for: dict[str, object]
    width: int
    embedding: bool
    head_bytes: int
    wanted: dict[bytes, Want]
    datasets: Sequence[Any]
    states: str
    batch_tokens: int | None
    load: Callable[[], Teacher]
    say: Callable[[str], None]
    advice: str

    @property
    def state_bytes(self) -> int:
        dtype: torch.dtype = getattr(torch, self.states)
        return self.width * dtype.itemsize


def build(order: Order, ranks: Ranks) -> Manifest:
    """Compute all samples that the folder lacks and return its manifest. All ranks must call it."""
    with _locked(order.folder, ranks):
        kept = ranks.first_does(lambda: _begin(order))
        store = Store(order.folder, kept.shards)
        missing = {key: want for key, want in order.wanted.items() if store.find(key, want.positions) is None}
        del store
        with_head = kept.head_file is None or (order.embedding and not _has_embedding(order.folder))
        ranks.first_does(lambda: _plan(order, missing, with_head, ranks))
        error: Exception | None = None
        if missing or with_head:
            try:
                teacher = order.load()
            except Exception as failed:
                error = failed
            ranks.agree(error=error)
            kept = ranks.first_does(lambda: _describe(order, kept, teacher))
            try:
                _compute(order, missing, teacher, ranks)
            except torch.OutOfMemoryError as failed:
                error = DSKDSetupError(
                    "--batch-tokens",
                    "batches that fit on the teacher's device",
                    f"one that does not ({str(failed).splitlines()[0]})",
                    "What is computed stays. Go on with `dskd cache build RECIPE --batch-tokens N`, N small.",
                )
            except Exception as failed:
                error = failed
            ranks.agree(error=error)
        done: Manifest = ranks.first_does(lambda: _finish(order, kept))
        return done


def _begin(order: Order) -> Manifest:
    """The folder, tidied, with what is whole in it; ``ValueError`` where it is another teacher's."""
    folder = order.folder
    (folder / SHARDS).mkdir(parents=True, exist_ok=True)
    shards.tidy(folder)
    if not (folder / MANIFEST).exists():
        if shards.finished(folder):
            raise SettingError(
                folder / MANIFEST, "the manifest of the shards beside it", "none", "Name another folder with --out."
            )
        return Manifest(order.teacher(), order.states, [order.made_for])
    kept = manifests.read(folder, order.advice)
    manifests.check_teacher(folder, kept.teacher, order.teacher(), "Name another folder with --out.")
    if kept.states != order.states:
        raise SettingError(
            "--dtype", f"{kept.states}, as in {folder}", order.states, "Change it, or name another folder with --out."
        )
    head = [] if kept.head_file is None else [kept.head_file]
    every = shards.finished(folder)
    bad = shards.damaged(folder, [*head, *every])
    for file, (_, got) in bad.items():
        order.say(f"{folder / file} is damaged ({got}) and is made again")
        shards.remove(folder, file)
    whole = [info for info in every if info.file not in bad]
    return replace(kept, shards=whole, head_file=None if HEAD in bad else kept.head_file)


def _plan(order: Order, missing: dict[bytes, Want], with_head: bool, ranks: Ranks) -> None:
    """Say what is to be done; ``ValueError`` where the disk has no room for it. with_head: whether that is to come."""
    rows, tokens = sum(len(want.positions) for want in missing.values()), sum(want.length for want in missing.values())
    size = rows * (order.state_bytes + 4) + len(missing) * (KEY_BYTES + 8)
    head = f", and the teacher's head, {_size(order.head_bytes)}" if with_head else ""
    share = f", shared by {ranks.world} processes" if ranks.world > 1 else ""
    order.say(
        f"{order.folder}: {len(order.wanted):,} samples, {len(order.wanted) - len(missing):,} of them there; "
        f"to compute: {len(missing):,} samples of {tokens:,} tokens, {rows:,} rows of {order.width} x {order.states}, "
        f"{_size(size)}{head}{share}"
    )
    size += order.head_bytes if with_head else 0
    free = shutil.disk_usage(order.folder).free
    if size > free:
        raise SettingError(
            order.folder,
            f"{_size(size)} of free space for the teacher's states and head",
            _size(free),
            "Free some, name a folder on another disk with --out, or use --dtype bfloat16.",
        )


def _describe(order: Order, kept: Manifest, teacher: Teacher) -> Manifest:
    """Write the head and a manifest, from which a build that is stopped goes on."""
    folder, head = order.folder, teacher.head
    tensors = {WEIGHT: head.weight_VD, BIAS: head.bias_V, EMBEDDING: teacher.embedding if order.embedding else None}
    head_file = kept.head_file
    if head_file is None or (order.embedding and not _has_embedding(folder)):
        # On the CPU and apart: tied weights share their memory.
        whole = {
            name: tensor.to("cpu", copy=True).contiguous() for name, tensor in tensors.items() if tensor is not None
        }
        head_file = shards.save(folder, folder / HEAD, whole)
    # With the weights in memory all of their files are here, also those of a hub model.
    described = replace(
        kept.also_for(order.made_for),
        teacher=order.teacher(),
        width=head.weight_VD.shape[1],
        head={"scale": head.scale, "softcap": head.softcap},
        head_file=head_file,
    )
    described.write(folder)
    return described


def _finish(order: Order, kept: Manifest) -> Manifest:
    done = replace(kept.also_for(order.made_for), shards=shards.finished(order.folder))
    done.write(order.folder)
    return done


def _has_embedding(folder: Path) -> bool:
    file = folder / HEAD
    if not file.is_file():
        return False
    with safe_open(file, "pt") as opened:
        return EMBEDDING in opened.keys()  # noqa: SIM118


def _compute(order: Order, missing: dict[bytes, Want], teacher: Teacher, ranks: Ranks) -> None:
    """This rank's share of the batches, written in shards while the next ones are computed."""
    device = teacher.input_device
    tokens = order.batch_tokens or BATCH_TOKENS.get(device.type, BATCH_TOKENS["cpu"])
    mine = batches(missing, tokens)[ranks.rank :: ranks.world]
    total = sum(missing[key].length for batch in mine for key in batch)
    written: Future[File] | None = None
    collected: list[Computed] = []
    started, told, done, held = time.monotonic(), False, 0, 0
    bar = tqdm(total=total, desc="Teacher states", unit=" tokens", unit_scale=True, disable=not ranks.first)
    with ThreadPoolExecutor(1) as writer, bar, staying(teacher):
        try:
            for number, batch in enumerate(mine):
                states = _states(order, [missing[key] for key in batch], teacher, device)
                for key, states_nE in zip(batch, states, strict=True):
                    collected.append(Computed(key, missing[key].positions, states_nE))
                held += sum(len(missing[key].positions) for key in batch) * order.state_bytes
                if held >= SHARD_BYTES:
                    if written is not None:
                        written.result()
                    written = writer.submit(shards.write, order.folder, collected)
                    collected, held = [], 0
                done += sum(missing[key].length for key in batch)
                bar.update(done - bar.n)
                seconds = time.monotonic() - started
                if not told and number + 1 >= _MEASURED_BATCHES and seconds >= _MEASURED_SECONDS and ranks.first:
                    told = True
                    left = tqdm.format_interval((total - done) * seconds / done)
                    order.say(f"{ranks.world * done / seconds:,.0f} tokens/s; about {left} to go")
            if written is not None:
                written.result()
        except BaseException:
            # What is computed is kept, also where the user or an error ends the build.
            with contextlib.suppress(SettingError):
                _write_rest(order.folder, collected)
            raise
        _write_rest(order.folder, collected)


def _write_rest(folder: Path, collected: list[Computed]) -> None:
    if collected:
        shards.write(folder, collected)


def batches(missing: dict[bytes, Want], tokens: int) -> list[list[bytes]]:
    """Keys in batches of like length, padding included at most so many tokens, or one sample; the longest first."""
    # The longest first: memory that does not suffice shows at once.
    ordered = sorted(missing, key=lambda key: (-missing[key].length, key))
    found: list[list[bytes]] = []
    for key in ordered:
        if found and (len(found[-1]) + 1) * missing[found[-1][0]].length <= tokens:
            found[-1].append(key)
        else:
            found.append([key])
    return found


def _states(order: Order, wants: list[Want], teacher: Teacher, device: torch.device) -> tuple[Tensor, ...]:
    """The states [n, E] of each sample of a batch at its positions."""
    ids = [torch.as_tensor(order.datasets[want.at[0]][want.at[1]]["teacher_input_ids"]) for want in wants]
    lengths = torch.tensor([want.length for want in wants])
    starts = (lengths.cumsum(0) - lengths).tolist()
    rows = torch.cat([torch.from_numpy(want.positions).long() + s for want, s in zip(wants, starts, strict=True)])
    found = teacher.rows(torch.cat(ids).to(device), lengths, torch.ones_like(lengths), rows.to(device))
    # To the CPU as a whole: one transfer for a batch.
    kept = found.to(getattr(torch, order.states)).cpu()
    return torch.split(kept, [len(want.positions) for want in wants])


def _size(count: float) -> str:
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 else f"{count / 2**20:,.1f} MiB"


@contextmanager
def _locked(folder: Path, ranks: Ranks) -> Iterator[None]:
    """The first rank holds the folder's lock; ``ValueError`` on all ranks where another build has it."""
    held: list[TextIO] = []

    def lock() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        stream = (folder / LOCK).open("w")
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            stream.close()
            raise SettingError(
                folder,
                "a folder into which nothing else is built",
                "one of a build that is running",
                "Wait for its end, or name another folder with --out.",
            ) from None
        held.append(stream)

    ranks.first_does(lock)
    try:
        yield
    finally:
        for stream in held:
            stream.close()
