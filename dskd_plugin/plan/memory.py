"""What lives on a device at once: what stays for the whole run, and what each moment of a step adds to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from dskd_plugin.losses.base import BLOCK_ELEMENTS
from dskd_plugin.methods import method_of
from dskd_plugin.plan.facts import STATES_LIKE_WEIGHTS, STATES_OF_BYTES, Engine, Facts
from dskd_plugin.plan.models import Student, Teacher

GIB = 2**30
# Measured: an `axolotl train` that has loaded Python, torch and Axolotl, but no model (docs/plan.md).
PROCESS = int(0.82 * GIB)
# Chosen on seven runs (docs/log.md): what a process on a CPU takes beside its tensors, as a share of them; malloc most
# likely keeps it.
MALLOC = 0.1
# Assumed, not measured: what a CUDA context and the kernels loaded into it take beside the allocator.
CUDA_CONTEXT = int(0.6 * GIB)
# How many fp32 tensors of a block live at once while the loss is computed, over the student's and over the teacher's
# ids; measured by torch's profiler (tests/plugin/test_plan.py).
CROSS_ENTROPY = (3.0, 0.0)
FEW_IDS = (4.0, 0.0)
DISTRIBUTIONS = (6.0, 1.4)
STUDENT_SPACE = (6.2, 1.1)
TEACHER_SPACE = (1.2, 6.9)
# Weights with fp32 copy and both states of Adam: what DeepSpeed keeps for half precision.
MASTER_AND_STATES = 12
SHARDED: dict[str, frozenset[Engine]] = {
    "optimizer": frozenset({"ZeRO-1", "ZeRO-2", "ZeRO-3", "FSDP2"}),
    "gradients": frozenset({"ZeRO-2", "ZeRO-3", "FSDP2"}),
    "weights": frozenset({"ZeRO-3", "FSDP2"}),
}


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank. stays: name -> bytes, the whole run; moments: name -> what it adds while it lasts.

    host: on the CPU beside a device, where an engine or a setting keeps something there. lost: what an allocator keeps
    beside all that; of a GPU's allocator `Plan.usable` knows.
    """

    stays: dict[str, int]
    moments: dict[str, int]
    host: int
    lost: int = 0

    @property
    def peak(self) -> int:
        return sum(self.stays.values()) + max(self.moments.values()) + self.lost

    @property
    def worst(self) -> str:
        """The moment at which most is alive."""
        return max(self.moments, key=lambda name: self.moments[name])


def memory_of(facts: Facts, student: Student, *teachers: Teacher | None) -> Memory:
    """Add up what a rank holds. teachers: those of the recipe in their order; None where the method needs none."""
    counts = student.counts
    read = [(one, teacher) for one, teacher in zip(facts.each, teachers, strict=True) if teacher is not None]
    projector = sum(_projector_weights(one, student, teacher) for one, teacher in read)
    share = {part: facts.ranks if facts.engine in engines else 1 for part, engines in SHARDED.items()}

    weights = student.bytes // share["weights"]
    gradients = sum(size * number for size, number in counts.trained.items()) // share["gradients"] + 4 * projector
    states = _optimizer_states(facts, counts.trained, projector, share["optimizer"])
    host = 0
    if "optimizer" in facts.offload:
        host, states = host + states, 0
    if "weights" in facts.offload:
        host, weights = host + weights, 0

    stays = {"student's weights": weights, "optimizer's states": states}
    for one, teacher in read:
        for name, size in _of_teacher(one, teacher).items():
            title = name if len(read) == 1 else name.replace("teacher's", "teachers'") + "s"
            stays[title] = stays.get(title, 0) + size
        # The loss has a head of its own beside a teacher on the CPU.
        host += teacher.decoder_bytes + teacher.head_bytes if one.teacher_on_cpu else 0
    stays |= {"projector": 4 * projector} if projector else {}
    stays["CUDA context" if facts.on_gpu else "the process itself"] = CUDA_CONTEXT if facts.on_gpu else PROCESS
    # Kept from micro-batch to micro-batch, and by DeepSpeed from step to step.
    held = facts.accumulation > 1 or facts.engine in ("ZeRO-1", "ZeRO-2", "ZeRO-3")
    if held:
        stays["gradients"] = gradients
    if facts.engine == "DDP":
        # What ranks exchange is a copy: torch makes gradients views of it only with gradient_as_bucket_view.
        stays["gradients in DDP's buckets"] = gradients

    of_micro_batch = sum(
        facts.rows * facts.tokens * teacher.counts.width * _bytes_of(one.settings.teacher.dtype)
        for one, teacher in read
    )
    # The teacher is asked for all micro-batches of a step before the first loss.
    states_of_teacher = of_micro_batch * facts.accumulation
    gathered = _gathered(facts, student)
    head_gradient = 4 * counts.vocab * counts.width if _head_is_trained(facts) else 0
    # Each teacher's loss keeps one of its own for the backward.
    kept_gradients = head_gradient * max(1, len(read))
    logits = max([_logits(one, student, teacher) for one, teacher in read] or [_logits(facts, student, None)])
    # The head in the dtype of its products, where mixed precision makes a copy of a float32 weight.
    cast = 2 * counts.vocab * counts.width if facts.weights != "float32" and not facts.adapter else 0

    lived, growing = student.lived, 0 if held else gradients
    # Of the first layer, computed again or not; then tied weights have two gradients for a moment.
    last = max(lived.backward - lived.kept, head_gradient if counts.tied else 0)
    moments = {
        "loss": lived.kept + states_of_teacher + logits + kept_gradients + cast + gathered,
        "start of the backward": lived.backward + states_of_teacher + head_gradient + kept_gradients + gathered,
        # Gradients have grown while what the layers kept has gone.
        "end of the backward": growing + states_of_teacher + last + gathered,
        "optimizer's step": growing + states_of_teacher,
    }
    if facts.settings.on_policy is not None:
        # The whole student, put together before the answers; their key-value cache is not counted.
        moments["answers"] = student.bytes - weights + states_of_teacher
    reading = [_reading(one, teacher) for one, teacher in read if one.teacher_resident and one.teacher_at == "student"]
    # The host keeps the batches of a step until it has those of the next one.
    if reading:
        # One teacher reads after the other.
        moments["teacher's forward"] = max(reading) + 2 * states_of_teacher - of_micro_batch
    elif read:
        moments["teacher's states"] = 2 * states_of_teacher
    counted = Memory(stays, moments, host)
    return counted if facts.on_gpu else replace(counted, lost=int(MALLOC * (counted.peak - PROCESS)))


def _optimizer_states(facts: Facts, trained: Mapping[int, int], projector: int, share: int) -> int:
    """Bytes that the optimizer keeps. trained: weights by their size; share: ranks that split them."""
    if facts.engine.startswith("ZeRO") and facts.weights != "float32":
        return MASTER_AND_STATES * (sum(trained.values()) + projector) // share
    of_student = sum(_states(facts, size) * number for size, number in trained.items()) // share
    return of_student + _states(facts, 4) * projector


def _of_teacher(facts: Facts, teacher: Teacher) -> dict[str, int]:
    """What of the teacher is in memory for the whole run."""
    stays = {"teacher's output head": teacher.head_bytes}
    if facts.teacher_resident:
        if facts.teacher_at == "student" and not facts.teacher_waits:
            stays["teacher's decoder"] = teacher.decoder_bytes
    elif method_of(facts.settings).needs_embedding:
        size = _bytes_of(facts.settings.teacher.dtype)
        stays["teacher's embedding"] = teacher.counts.vocab * teacher.counts.width * size
    return stays


def _reading(facts: Facts, teacher: Teacher) -> int:
    """What the teacher's forward takes beside what stays; with its weights, where they come for it."""
    arriving = teacher.decoder_bytes + (teacher.head_bytes if teacher.counts.tied else 0)
    return teacher.reading + (arriving if facts.teacher_waits else 0)


def _logits(facts: Facts, student: Student, teacher: Teacher | None) -> int:
    """What a block of logits takes at its worst stage."""
    settings, ours = facts.settings, student.counts.vocab
    method = method_of(settings)
    theirs = 0 if teacher is None else teacher.counts.vocab
    if teacher is None or method.compares == "nothing":
        stages = [CROSS_ENTROPY]
    elif method.compares == "distributions":
        stages = [FEW_IDS if settings.support is not None else DISTRIBUTIONS]
    else:
        stages = {"student": [STUDENT_SPACE], "teacher": [CROSS_ENTROPY, TEACHER_SPACE]}.get(
            settings.spaces, [STUDENT_SPACE, TEACHER_SPACE]
        )
    read = max(ours, theirs if any(of_theirs for _, of_theirs in stages) else 0)
    rows = min(facts.rows * facts.tokens, max(1, BLOCK_ELEMENTS["cuda" if facts.on_gpu else "cpu"] // read))
    return int(max(4 * rows * (of_ours * ours + of_theirs * theirs) for of_ours, of_theirs in stages))


def _states(facts: Facts, size: int) -> int:
    """Bytes of the optimizer for a weight of so many bytes; unknown ones count as Adam."""
    if facts.optimizer in STATES_OF_BYTES:
        return STATES_OF_BYTES[facts.optimizer]
    return STATES_LIKE_WEIGHTS.get(facts.optimizer, 2) * size


def _projector_weights(facts: Facts, student: Student, teacher: Teacher) -> int:
    """Trained numbers between the two widths."""
    method = method_of(facts.settings)
    if method.compares != "spaces":
        return 0
    small, large = student.counts.width, teacher.counts.width
    if method.needs_embedding:  # cross-model attention: to the student, to the teacher, and the queries
        return 2 * small * large + 4 * small * large
    return small * large if facts.settings.spaces != "teacher" else 0


def _head_is_trained(facts: Facts) -> bool:
    """Whether the loss collects a gradient for the student's output head."""
    saved = facts.recipe.get("lora_modules_to_save") or ()
    return not facts.adapter or any("lm_head" in name or "embed" in name for name in saved)


def _gathered(facts: Facts, student: Student) -> int:
    """What an engine that splits weights puts together at a time: a layer ahead, and the head for the loss."""
    if facts.engine not in SHARDED["weights"] or facts.ranks == 1:
        return 0
    each = 2 if facts.weights != "float32" else 4
    return each * (2 * student.counts.largest + student.counts.vocab * student.counts.width)


def _bytes_of(dtype: str) -> int:
    return 4 if dtype == "float32" else 2
