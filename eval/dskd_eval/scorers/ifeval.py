"""The scorer `ifeval`: instructions of the row that a program can verify, as lm-eval checks them."""

from __future__ import annotations

from collections.abc import Mapping

from dskd_eval.data import Row
from dskd_eval.errors import UserError
from dskd_eval.schema import Free
from dskd_eval.scorers.base import Answer, AnswerScorer
from dskd_eval.scorers.metrics import Judgement, Metric

_FIELDS = ("prompt", "instruction_id_list", "kwargs")


class IFEval(AnswerScorer):
    """The instructions of the row judge; there is no reference answer."""

    name = "ifeval"
    metrics = {
        "prompt_strict": Metric("prompt strict", "all instructions of the prompt followed"),
        "prompt_loose": Metric("prompt loose", "as strict, after removing markdown and first or last line"),
        "instruction_strict": Metric("instruction strict", "share of instructions followed"),
        "instruction_loose": Metric("instruction loose", "share of instructions followed, loose"),
    }
    modules = ("langdetect", "immutabledict", "nltk")
    needs = ("nltk_punkt",)
    needs_reference = False
    references_are_right = False
    probe = "Hello there."

    def check_row(self, row: Row, parts: Mapping[str, str]) -> None:
        for name in _FIELDS:
            if name not in row:
                raise UserError(
                    "`scorer: ifeval`",
                    expected=f"the field {name!r}, as in IFEval",
                    got=", ".join(sorted(row)),
                    fix="Add it, or choose another scorer.",
                )

    def check_reference(self, answer: Answer) -> None:
        """Raises UserError when an answer to the row cannot be scored."""
        try:
            self.score_one(answer)
        except Exception as error:
            raise UserError(
                "`scorer: ifeval`",
                expected="instructions of IFEval, with the arguments that each takes",
                got=f"{type(error).__name__}: {str(error)[:200]}",
                fix="Correct `instruction_id_list` and `kwargs` (one mapping per instruction).",
            ) from error

    def score_one(self, answer: Answer) -> Judgement:
        from dskd_eval.lmeval import ifeval

        found = ifeval.followed(answer.row, answer.text)
        strict, loose = [strictly for _, strictly, _ in found], [loosely for _, _, loosely in found]
        count = float(len(found))
        failed: list[Free] = [name for name, followed, _ in found if not followed]
        return Judgement(
            {
                "prompt_strict": float(all(strict)),
                "prompt_loose": float(all(loose)),
                "instruction_strict": (float(sum(strict)), count),
                "instruction_loose": (float(sum(loose)), count),
            },
            {"not_followed": failed},
        )
