"""Where a run's teacher states come from: the teacher itself, a cache, or a cache that the run makes first."""

import gc
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dskd_plugin.cache.build import Order, build
from dskd_plugin.cache.cached_teacher import CachedTeacher
from dskd_plugin.cache.fingerprint import known_before_loading
from dskd_plugin.cache.layout import AUTO, check_there, command, folder_of
from dskd_plugin.cache.manifest import made_for, states_in, teacher_of
from dskd_plugin.cache.needs import wanted
from dskd_plugin.cache.open import open_cache
from dskd_plugin.cache.ranks import Ranks
from dskd_plugin.log import LOG
from dskd_plugin.models import causal_lm
from dskd_plugin.run import Run, Sides
from dskd_plugin.teachers.live import Teacher
from dskd_plugin.teachers.placement import is_offloaded, teacher_device


def live(
    run: Run,
    *,
    device: torch.device | str,
    packed: bool,
    attn_implementation: str | None,
    student: torch.device | None = None,
    offload: bool = False,
) -> Teacher:
    """The teacher of a run, in memory, see `Teacher`. attn_implementation: of the student."""
    return Teacher(
        run.settings.teacher,
        vocab_size=run.teacher.table.vocab_size,
        device=device,
        attn_implementation=attn_implementation,
        packed=packed,
        trust_remote_code=run.trust_remote_code,
        student=student,
        offload=offload,
    )


def teacher_source(
    sides: Sides, student: Any, device: torch.device, datasets: dict[str, Any]
) -> Teacher | CachedTeacher:
    """The teacher of a training run. datasets: its prepared rows, by what they are for."""
    run = sides.run
    packed = bool(run.recipe.get("sample_packing"))
    attention = causal_lm(student).config._attn_implementation

    def in_memory(packed: bool) -> Teacher:
        at = teacher_device(run.settings.teacher, device)
        offload = is_offloaded(run.settings.teacher, at)
        if offload or at != device:
            waits = ", and its weights wait on the CPU between uses" if offload else ""
            LOG.info("dskd: the teacher computes on %s, the student on %s%s", at, device, waits)
        return live(run, device=at, packed=packed, attn_implementation=attention, student=device, offload=offload)

    cache = run.settings.teacher.cache
    if cache is None:
        teacher = in_memory(packed)
        if packed and not teacher.packed:
            LOG.info("dskd: the teacher's architecture leaks between packed neighbours; its rows are padded instead")
        return teacher
    recipe, ranks = run.recipe.get("axolotl_config_path"), Ranks.here()
    check_there(cache, recipe)
    folder = folder_of(cache)
    if folder is None:
        folder = ranks.first_does(lambda: automatic_folder(sides))
        order = order_of(
            sides, folder, datasets, load=lambda: in_memory(False), say=lambda text: LOG.info("dskd: %s", text)
        )
        build(order, ranks)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    fallback = in_memory(packed) if run.settings.on_policy is not None else None
    return open_cache(folder, sides, datasets, ranks=ranks, device=device, advice=command(recipe), fallback=fallback)


def order_of(
    sides: Sides,
    folder: Path,
    datasets: dict[str, Any],
    *,
    load: Callable[[], Teacher],
    say: Callable[[str], None],
    states: str | None = None,
    batch_tokens: int | None = None,
) -> Order:
    """What is to be built for a run. states: None for `states_dtype`."""
    run = sides.run
    return Order(
        folder=folder,
        teacher=lambda: teacher_of(run),
        made_for=made_for(sides),
        width=_width(run),
        embedding=run.method.needs_embedding,
        head_bytes=_head_bytes(run),
        wanted=wanted(datasets.values()),
        datasets=list(datasets.values()),
        states=states or states_dtype(run, folder),
        batch_tokens=batch_tokens,
        load=load,
        say=say,
        advice=command(run.recipe.get("axolotl_config_path")),
    )


def states_dtype(run: Run, folder: Path) -> str:
    """The dtype of states unless one is named: that of the folder, else half precision, the teacher's own if it has."""
    return states_in(folder) or ("float16" if run.settings.teacher.dtype == "float16" else "bfloat16")


def bytes_of_state(run: Run, states: str) -> int:
    """What the state at one position takes in a cache of this dtype."""
    dtype: torch.dtype = getattr(torch, states)
    return _width(run) * dtype.itemsize


def _head_bytes(run: Run) -> int:
    """What a cache keeps of the teacher's weights: its head, and its embedding for methods that need it."""
    dtype: torch.dtype = getattr(torch, run.settings.teacher.dtype)
    matrices = 2 if run.method.needs_embedding else 1
    return int(run.teacher.config.get_text_config().vocab_size) * _width(run) * dtype.itemsize * matrices


def _width(run: Run) -> int:
    config = run.teacher.config.get_text_config()
    # OPT's head reads another width than its decoder works in.
    return int(getattr(config, "word_embed_proj_dim", None) or config.hidden_size)


def automatic_folder(sides: Sides) -> Path:
    """The folder of ``cache: auto``, beside the prepared rows: one for each teacher, whatever it is read for.

    The same before the weights of a hub id are here and after; the manifest inside knows the weights too.
    """
    settings = sides.run.settings.teacher
    content = {
        "dtype": settings.dtype,
        "quantization": settings.quantization,
        "fingerprint": known_before_loading(sides.run.teacher.parts),
    }
    digest = hashlib.sha256(json.dumps([AUTO, content], sort_keys=True).encode()).hexdigest()[:16]
    # The plugin has given the prepared rows a folder of their own inside that of the recipe.
    return Path(sides.run.recipe["dataset_prepared_path"]).parent / f"dskd-cache-{digest}"
