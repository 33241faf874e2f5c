"""Schema of the ``dskd:`` block: every setting, its bounds, its default and the rules between settings.

Nothing here touches a model or a file. ``parse_settings`` turns the raw block into :class:`Settings` or raises one
``ValueError`` that lists everything wrong with it, each line naming the setting, what was expected, what came and
what to do. The descriptions are the table of docs/settings.md, see docs/tables.py; ``values`` and ``see`` beside them
are for that table alone.
"""

import functools
from typing import TYPE_CHECKING, Any, Literal

from pydantic import (
    BaseModel,
    Field,
    ValidationError,
    ValidationInfo,
    field_serializer,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from dskd_plugin.core.fused.cover import COVERED
from dskd_plugin.errors import Mistakes, SettingError
from dskd_plugin.log import LOG
from dskd_plugin.methods import METHODS, method_of
from dskd_plugin.methods import names as method_names
from dskd_plugin.mistaken import explain
from dskd_plugin.setting_blocks import (
    Block,
    BytePrefixSettings,
    Divergence,
    ForwardKL,
    GoldSettings,
    LikelihoodSettings,
    OnPolicySettings,
    ProjectorSettings,
    XTokenSettings,
)
from dskd_plugin.teacher_settings import TeacherSettings, WeightedTeacher

_RENAMED = {"chunk_ratio": "span_weight"}


@functools.cache  # the block is validated several times in a run
def _notice(old: str, new: str) -> None:
    LOG.warning("dskd: dskd.%s is now called dskd.%s. Rename it: the next release refuses the old name.", old, new)


class Settings(Block):
    """The block `dskd:` of a recipe, checked; docs/settings.md is made of the fields."""

    if TYPE_CHECKING:
        teacher: TeacherSettings
        """None beside `teachers`: what reads a teacher takes the settings of one, see `each`."""
    else:
        teacher: TeacherSettings | None = None
    teachers: list[WeightedTeacher] | None = Field(
        None,
        validate_default=True,
        description="in place of `teacher`: each with the settings of `teacher` and a `weight` of its own, above 0, by "
        "default 1; the weights count by their share of the sum",
        json_schema_extra={
            "values": "list of `{model: ..., weight: ...}`",
            "see": "[several teachers](own-pair.md#several-teachers)",
        },
    )
    method: str = Field(
        "dskd",
        description="distillation method",
        json_schema_extra={"enum": [*method_names()], "see": "[Methods](#methods)"},
    )
    alignment: Literal["auto", "identity", "eta", "cma"] = Field(
        "auto",
        description="auto: identity for one tokenizer, else eta, exact token alignment by bytes; cma: cross-model "
        "attention",
    )
    divergence: Divergence = Field(default_factory=lambda: ForwardKL(kind="forward_kl"))
    temperature: float = Field(1.0, gt=0, le=100, description="softens the two distributions that a method compares")
    kd_ratio: float = Field(0.5, gt=0, le=1, description="loss = (1 - kd_ratio) CE + kd_ratio KD")
    kd_weight: Literal["fixed", "balanced"] = Field(
        "fixed",
        description="balanced: the KD terms that move the student are scaled to the size of the cross-entropy, by the "
        "ratio of the two over about twenty steps before; needs a kd_ratio below 1",
        json_schema_extra={"see": "[balanced](method.md#kd_weight-balanced)"},
    )
    unpaired: Literal["auto", "share", "ce"] = Field(
        "auto",
        description="cross-entropy of response tokens of which the teacher says nothing (those without a partner) or "
        "not all (one of several tokens of an *event*). ce: the whole of it; share: (1 - kd_ratio) of it, as of all "
        "others, as published; auto: ce, and share with `on_policy`, where no gold token has a partner",
        json_schema_extra={"see": "[which rows](method.md#which-rows-count)"},
    )
    spaces: Literal["both", "student", "teacher"] = Field(
        "student",
        description="whose head the compared distributions share; `student` keeps t2s_kd + t2s_ce, `teacher` s2t_kd",
    )
    target: Literal["exact", "projected"] = Field(
        "exact",
        description="what t2s_kd pulls the student to. exact: the teacher's own mass of each *event* (tokens that open "
        "the same text), shared out inside an event by the projected teacher where it knows better; "
        "projected: the projected teacher alone, as published",
        json_schema_extra={"see": "[events](method.md#events-and-the-exact-target)"},
    )
    shared: Literal["events", "ids"] = Field(
        "events",
        description="what both vocabularies can say, for `target: exact`, `overlap_kd` and `bpm`. ids: equal tokens "
        "alone; with `bpm` every token of the student",
    )
    support: int | None = Field(
        None,
        ge=2,
        description="`overlap_kd` with `shared: ids`: compare only the k shared tokens that the student finds "
        "likeliest at a row, both sides renormalised on them; the teacher's head is read at these alone; null: all",
    )
    guard: bool = Field(
        True,
        description="with `target: exact` and `unpaired: ce`: while the teacher finds the gold tokens less likely than "
        "the student does (`dskd/teacher_lead`, in the mean of the last steps), learn from the gold answers alone",
        json_schema_extra={"see": "[guard](method.md#the-guard)"},
    )
    agreement_mask: bool = Field(False, description="t2s_kd only where the projected teacher predicts its own token")
    unmapped_argmax: Literal["drop", "teacher_space"] = Field(
        "drop",
        description="aligned rows whose teacher argmax has no student id: drop from all KD terms, or keep in s2t_kd; "
        "needs `spaces: teacher`, or `spaces: both` with `target: projected`",
    )
    span_weight: float = Field(
        0.0,
        ge=0,
        le=100,
        description="weight, inside the KD part, of the likelihood of spans that the two tokenizers cut differently; "
        "the term is some hundredths of the cross-entropy, so that 1 is hardly felt",
    )
    projector: ProjectorSettings = Field(default_factory=ProjectorSettings)
    bpm: BytePrefixSettings = Field(default_factory=BytePrefixSettings)
    alm: LikelihoodSettings = Field(default_factory=LikelihoodSettings)
    gold: GoldSettings = Field(default_factory=GoldSettings)
    xtoken: XTokenSettings = Field(default_factory=XTokenSettings)
    impl: Literal["auto", "blocks", "fused"] = Field(
        "blocks",
        description="what computes the loss. blocks: torch, the reference; fused: Triton kernels, on CUDA alone and "
        "not for every method; auto: fused where it can be, else blocks",
        json_schema_extra={"see": "[fused](method.md#the-fused-backend)"},
    )
    on_policy: OnPolicySettings | None = Field(None, description="KD terms on answers that the student samples")

    @property
    def each(self) -> list["Settings"]:
        """The same settings with each of the teachers alone, in their order."""
        if self.teachers is None:
            return [self]
        return [self.model_copy(update={"teacher": one.alone, "teachers": None}) for one in self.teachers]

    @property
    def weights(self) -> list[float]:
        """Of the teachers, in their order; their sum is 1."""
        if self.teachers is None:
            return [1.0]
        total = sum(one.weight for one in self.teachers)
        return [one.weight / total for one in self.teachers]

    @property
    def needs_weights(self) -> bool:
        """Whether the teacher's decoder may have to be loaded: not where all of its states are in a folder."""
        return self.teacher.cache in (None, "auto") or self.on_policy is not None

    @property
    def exact(self) -> bool:
        """Whether the student-space target is the teacher's own between events."""
        return method_of(self).exact(self)

    @property
    def with_spans(self) -> bool:
        """Whether spans of text are compared, beside pairs or as a term of their own."""
        return self.span_weight > 0 or method_of(self).with_spans(self)

    @property
    def unpaired_ce(self) -> bool:
        """Whether tokens of which the teacher does not say all keep their whole cross-entropy."""
        if self.unpaired == "auto":
            return self.on_policy is None and method_of(self).compares != "nothing"
        return self.unpaired == "ce"

    @property
    def can_guard(self) -> bool:
        """Whether the teacher's and the student's mass on a gold token can be told, and its cross-entropy kept."""
        return self.exact and self.unpaired_ce

    @property
    def guards(self) -> bool:
        """Whether a teacher that knows the gold tokens no better than the student stops pulling it."""
        return self.guard and self.can_guard

    @property
    def by_events(self) -> bool:
        """Whether events of several tokens are compared."""
        return method_of(self).by_events(self)

    @model_validator(mode="before")
    @classmethod
    def old_names(cls, block: object) -> object:
        """Take up settings under the names that they had one release ago, with a notice."""
        for old, new in _RENAMED.items():
            if isinstance(block, dict) and old in block:
                if new in block:
                    raise SettingError(f"dskd.{old}", f"{new} alone, its new name", "both", f"Remove {old}.")
                _notice(old, new)
                block = {new if key == old else key: value for key, value in block.items()}
        return block

    @field_validator("method")
    @classmethod
    def known_method(cls, name: str) -> str:
        known = method_names()
        if name.casefold().replace("_", "").replace("-", "") in ("seqkd", "sequencekd", "sequencelevelkd"):
            raise SettingError(
                "dskd.method",
                f"one of {', '.join(known)}",
                f"{name!r}: learning the teacher's answers as plain text needs no teacher in training",
                "Run `dskd generate RECIPE --plain-recipe --write-recipe FILE`, then train FILE.",
            )
        if name not in known:
            listed = f"{', '.join(repr(one) for one in known[:-1])} or {known[-1]!r}"
            raise PydanticCustomError("literal_error", "Input should be {expected}", {"expected": listed})
        return name

    @field_validator("teachers")
    @classmethod
    def one_form(cls, teachers: list[WeightedTeacher] | None, info: ValidationInfo) -> list[WeightedTeacher] | None:
        """Exactly one of `teacher` and `teachers`."""
        form = "teachers: [{model: <hub id or folder>, weight: 1}, ...]"
        if teachers is not None and not teachers:
            raise SettingError("dskd.teachers", "one teacher or more", "an empty list", f"Write {form}.")
        if "teacher" not in info.data:
            return teachers  # of which another error tells
        single = info.data["teacher"]
        if teachers is None and single is None:
            raise SettingError("dskd.teacher", "a value", "nothing", "Add it to the recipe.")
        if teachers is not None and single is not None:
            raise SettingError(
                "dskd.teachers", "it unset beside dskd.teacher", "both", f"Keep one of the two; for several: {form}."
            )
        return teachers

    @model_validator(mode="after")
    def no_ignored_setting(self) -> "Settings":
        """A setting that the chosen mode would ignore is an error."""
        method = method_of(self)
        if self.teachers is not None and len(self.teachers) == 1:
            self.teacher, self.teachers = self.teachers[0].alone, None
        if self.teachers is not None and not method.needs_teacher:
            raise SettingError(
                "dskd.teachers",
                f"one teacher beside {method.chosen_by()}",
                f"{len(self.teachers)}: no state of theirs is read",
                "Name one of them: dskd.teacher.",
            )
        unused = method.ignored(self)
        if unused:
            owners = [f"method: {other.name}" for other in METHODS.values() if set(other.own) & set(unused)]
            raise SettingError(
                "dskd",
                "only settings that have an effect",
                f"{', '.join(unused)} which {method.chosen_by()} ignores",
                f"Remove {'it' if len(unused) == 1 else 'them'}{''.join(f', or choose {owner}' for owner in owners)}.",
            )
        if self.alignment == "cma" and method.alignment != "cma":
            raise SettingError(
                "dskd.alignment",
                f"auto, identity or eta beside {method.chosen_by()}",
                "'cma': cross-model attention belongs to dskd",
                "Remove it.",
            )
        if not method.needs_teacher and self.teacher.cache is not None:
            raise SettingError(
                "dskd.teacher.cache",
                f"it unset beside {method.chosen_by()}",
                f"{self.teacher.cache!r}: no state of the teacher is read",
                "Remove it.",
            )
        if self.kd_weight == "balanced" and self.kd_ratio == 1:
            raise SettingError(
                "dskd.kd_weight",
                "'fixed' beside kd_ratio: 1",
                "'balanced': there is no cross-entropy whose size the KD part could take",
                "Remove it, or set a lower kd_ratio.",
            )
        if self.impl == "fused" and not method.fuses(self):
            known = dict.fromkeys(each.name for each in METHODS.values() if each.fused)
            raise SettingError(
                "dskd.impl",
                f"'blocks' or 'auto' beside {method.chosen_by()} with these settings",
                f"'fused', which has the methods {', '.join(known)} without support, and the divergences "
                f"{', '.join(COVERED)}",
                "Remove it, or set impl: auto.",
            )
        if self.unpaired == "ce" and self.on_policy is not None:
            raise SettingError(
                "dskd.unpaired",
                "'share' beside on_policy",
                "'ce': in a step on sampled answers no gold token has a partner, and each would count whole",
                "Remove one of the two.",
            )
        method.check(self)
        return self


class DSKDArgs(BaseModel):
    """What the plugin adds to Axolotl's recipe schema."""

    dskd: Settings | None = Field(default=None, description="dual-space knowledge distillation")

    @field_serializer("dskd")
    def as_written(self, block: Settings | None) -> dict[str, Any] | None:
        """Without defaults: a worker of Ray reads the validated recipe again, and they would look chosen."""
        return None if block is None else block.model_dump(exclude_unset=True)


def parse_settings(block: object) -> Settings:
    """The validated ``dskd:`` block; ``ValueError`` with one line per mistake."""
    if not isinstance(block, dict):
        raise SettingError(
            "dskd",
            "a block of settings",
            f"{block!r}",
            "Write at least:\n  dskd:\n    teacher:\n      model: <hub id or folder>",
        )
    try:
        return Settings.model_validate(block)
    except ValidationError as error:
        raise Mistakes([explain(item, "dskd", Settings) for item in error.errors()]) from None
