"""What a pair of models means for distillation, in one line each for the pair and for a dataset."""

from pathlib import Path

from dskd_plugin.methods import method_of
from dskd_plugin.pair import Pair
from dskd_plugin.settings import Settings

DOCS = "docs/method.md#which-method"
_MUCH, _SOME = 0.8, 0.5


def of_pair(pair: Pair, settings: Settings, student_share: float) -> str:
    """The vocabularies, and the method that suits them. student_share: shared ids among the student's, in [0, 1]."""
    ids = f"student {pair.student.vocab_size} ids, teacher {pair.teacher.vocab_size} ids"
    if pair.identity:
        return f"one tokenizer ({ids}); recommended: {_recommended('kd', settings)}; see {DOCS}"
    return (
        f"two tokenizers ({ids}), {100 * student_share:.0f} % of the student's ids shared ({_amount(student_share)}); "
        f"recommended: {_recommended('dskd', settings)}; see {DOCS}"
    )


def of_one_model(base_model: str, settings: Settings) -> str | None:
    """The warning about a teacher that is the student before training; None for any other."""
    teacher = settings.teacher
    same = Path(teacher.model).expanduser().resolve() == Path(base_model).expanduser().resolve()
    if not same or teacher.adapter or teacher.revision:
        return None
    return (
        f"dskd.teacher.model is base_model itself, {base_model!r}: such a teacher only keeps the student near where it "
        "began. Name a larger model, or one that is better at the task, unless that is meant."
    )


def of_dataset(aligned_share: float) -> str:
    """How much of a dataset the teacher can speak of. aligned_share: of the response tokens, in [0, 1]."""
    amount = _amount(aligned_share)
    rest = " the others learn from the data alone" if aligned_share < 1 else ""
    return f"{100 * aligned_share:.1f} % aligned with the teacher ({amount}{';' + rest if rest else ''})"


def _amount(share: float) -> str:
    return "much" if share >= _MUCH else "about average" if share >= _SOME else "little"


def _recommended(method: str, settings: Settings) -> str:
    best = settings.model_copy(update={"method": method, "alignment": "auto", "spaces": "student", "target": "exact"})
    advised, chosen = (method_of(one).title(one) for one in (best, settings))
    return f"{advised} (this recipe)" if chosen == advised else f"{advised} (this recipe: {chosen})"
