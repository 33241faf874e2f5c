"""Several teachers: the loss against those of each alone, rows for each of them, and what is refused."""

import math

import pytest
import torch

from dskd_plugin.assemble import distillation_loss
from dskd_plugin.batch import KEY, ask
from dskd_plugin.columns import COLUMNS, columns, dataset_of, numbered, row_of
from dskd_plugin.core.backend import TorchBlocks
from dskd_plugin.core.objective import TERMS
from dskd_plugin.errors import DSKDSetupError, Mistakes, SettingError, naming
from dskd_plugin.host.collator import PackedMaskPairCollator, PaddedPairCollator
from dskd_plugin.host.metrics import together
from dskd_plugin.losses.several import SeveralTeachers
from dskd_plugin.settings import parse_settings
from dskd_plugin.student import attach
from tests.plugin.test_student import PUBLISHED, Setup

A, B = {"model": "A"}, {"model": "B"}


@pytest.fixture(scope="module")
def third(build, tmp_path_factory):
    """A teacher with a third vocabulary."""
    folder = tmp_path_factory.mktemp("third") / "teacher"
    return build.save_model(folder, build.byte_level_tokenizer(330, 9), "llama", width=40, seed=5)


@pytest.fixture(scope="module")
def rows(build):
    return build.conversations(4, 11)


class Several:
    """One student, a loss for each teacher, and batches of rows that all of them have read."""

    def __init__(self, alone, weights):
        self.alone = alone
        self.student = alone[0].student.__class__.from_pretrained(alone[0].student.config._name_or_path)
        settings = alone[0].settings
        self.attends = settings.alignment == "cma"
        losses = [
            distillation_loss(
                *(settings, self.student, one.teacher, one.pair, one.overlap, one.events),
                tokenizers=(one.tokenizer, one.teacher_tokenizer),
                seed=0,
                backend=TorchBlocks(3000),
                teacher_weight=weight,
                adds_ce=place == 0,
            )
            for place, (one, weight) in enumerate(zip(alone, weights, strict=True))
        ]
        self.loss = SeveralTeachers(losses)
        attach(self.student, self.loss)

    def samples(self, conversations):
        """The first teacher's rows, and the columns of the others' under numbers."""
        found = self.alone[0].samples(conversations)
        for number, one in enumerate(self.alone[1:], start=2):
            for sample, other in zip(found, one.samples(conversations), strict=True):
                sample |= {f"{name}_{number}": other[name] for name in COLUMNS if name in other}
        return found

    def padded(self, samples):
        return self.collator(PaddedPairCollator)([dict(sample) for sample in samples])

    def collator(self, kind):
        options = {"cross_attention": self.attends, "teachers": len(self.alone)}
        return kind(self.alone[0].tokenizer, pad_to_multiple_of=8, **options)

    def run(self, batches):
        """Loss, the sums of each teacher and the gradients of the student, of one optimizer step."""
        self.student.zero_grad()
        window = []
        for batch in batches:
            own = batch.pop(KEY)
            batch.pop("labels")
            window.append([ask(one, alone.teacher) for one, alone in zip(own.each, self.alone, strict=True)])
        for of_teacher in zip(*window, strict=True):
            of_teacher[0].window = list(of_teacher)
        total, sums = 0.0, [{term: [0.0, 0.0] for term in TERMS} for _ in self.alone]
        for batch, asked in zip(batches, window, strict=True):
            for loss, one in zip(self.loss.each, asked, strict=True):
                loss.micro_batch = one
            value = self.student(**batch, use_cache=False, logits_to_keep=1)["loss"]
            for loss in self.loss.each:
                loss.micro_batch = None
            value.backward()
            total += float(value.detach())
            for mine, one in zip(sums, asked, strict=True):
                for term in TERMS:
                    for k in range(2):
                        mine[term][k] += float(one.sums[term][k])
        return total, sums, {name: p.grad.clone() for name, p in self.student.named_parameters() if p.grad is not None}


MODES = {
    "default": {},
    "published": PUBLISHED,
    "both spaces": {"spaces": "both"},
    "KD alone": {"kd_ratio": 1.0},
    "spans": {"span_weight": 0.7},
    "unpaired": {"unpaired": "ce"},
    "unpaired, KD alone": {"method": "overlap_kd", "unpaired": "ce", "kd_ratio": 1.0},
    "overlap_kd": {"method": "overlap_kd"},
    "bpm": {"method": "bpm"},
    "csd": {"method": "csd"},
    "cma": {"alignment": "cma", "spaces": "both", "span_weight": 0.5},
}


@pytest.mark.parametrize("mode", MODES)
def test_the_loss_is_the_cross_entropy_once_and_the_weighted_sum_of_the_teachers(tiny, third, rows, mode):
    """By the runs of each teacher alone, whose own numbers have float oracles of their own."""
    weights = 0.7, 0.3
    alone = [Setup(tiny["student"], teacher, **MODES[mode]) for teacher in (tiny["teacher"], third)]
    both = Several(alone, weights)
    samples = both.samples(rows)
    loss, sums, gradients = both.run([both.padded(samples[:1]), both.padded(samples[1:])])

    expected, expected_gradients = 0.0, {}
    for number, (one, weight) in enumerate(zip(alone, weights, strict=True), start=1):
        value, of_one, found = one.run([both_alone(one, rows)])
        expected += weight * value
        for name, gradient in found.items():
            # A projector's own terms have the weight of its teacher.
            name = name.replace("dskd.", f"dskd.teacher{number}.")
            expected_gradients[name] = expected_gradients.get(name, 0) + weight * gradient
        for term in TERMS:
            if term != "ce":
                assert sums[number - 1][term] == pytest.approx([float(x) for x in of_one[term]], rel=2e-5, abs=1e-6)
    assert loss == pytest.approx(expected, rel=2e-5)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=2e-4, atol=1e-6, msg=name)


def both_alone(one, rows):
    attends = one.settings.alignment == "cma"
    collator = PaddedPairCollator(one.tokenizer, pad_to_multiple_of=8, cross_attention=attends)
    return collator(one.samples(rows))


def test_the_cross_entropy_is_computed_once(tiny, third, rows):
    settings = {"method": "overlap_kd", "unpaired": "share"}
    alone = [Setup(tiny["student"], teacher, **settings) for teacher in (tiny["teacher"], third)]
    first, second = (loss.objective for loss in Several(alone, (0.5, 0.5)).loss.each)
    assert first.terms == ("ce", "kd") and second.terms == ("kd",)
    assert first.shares() == {"ce": 0.5, "kd": 0.25} and second.shares() == {"kd": 0.25}


def test_each_teacher_is_guarded_by_its_own_lead(tiny, third, rows):
    weights = (0.7, 0.3)
    alone = [Setup(tiny["student"], teacher) for teacher in (tiny["teacher"], third)]
    both = Several(alone, weights)
    behind = torch.tensor([-1.0, 100.0], dtype=torch.float64)
    both.loss.remember({**both.loss.memory(), "teacher2.teacher_lead": behind})
    loss, sums, _ = both.run([both.padded(both.samples(rows))])
    alone[1].loss.remember({**alone[1].loss.memory(), "teacher_lead": behind})
    of_each = [one.run([both_alone(one, rows)]) for one in alone]
    assert loss == pytest.approx(sum(w * value for w, (value, *_) in zip(weights, of_each, strict=True)), rel=2e-5)
    ce, of_first, of_second = sums[0]["ce"][0], sums[0]["ce_unpaired"][0], sums[1]["ce_unpaired"][0]
    assert of_second == pytest.approx(ce) and of_first < ce
    both.loss.after_step(lambda sums: sums)
    assert [one.guarded_steps for one in both.loss.each] == [[False], [True]]


@pytest.mark.parametrize("mode", [{}, {"method": "overlap_kd", "unpaired": "ce"}, {"kd_weight": "balanced"}])
def test_two_copies_of_a_teacher_are_one(tiny, rows, mode):
    one = Setup(tiny["student"], tiny["teacher"], **mode)
    two = Several([one, one], (0.5, 0.5))
    samples = two.samples(rows)
    for _ in range(2):  # the second step is scaled by what the first one has seen
        loss, sums, gradients = two.run([two.padded(samples)])
        value, of_one, expected = one.run([both_alone(one, rows)])
        assert loss == pytest.approx(value, rel=1e-6)
        assert sums[0]["ce"] == sums[1]["ce"] == pytest.approx([float(x) for x in of_one["ce"]], rel=1e-6)
        for name, gradient in expected.items():
            if not name.startswith("dskd."):
                torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-7, msg=name)
        two.loss.after_step(lambda sums: sums)
        one.loss.after_step(lambda sums: sums)
    if mode.get("kd_weight"):
        assert one.loss.kd_scale != 1
        assert [loss.kd_scale for loss in two.loss.each] == pytest.approx([one.loss.kd_scale] * 2, rel=1e-6)


def test_each_teacher_is_balanced_by_itself(tiny, third, rows):
    alone = [Setup(tiny["student"], teacher, kd_weight="balanced") for teacher in (tiny["teacher"], third)]
    both = Several(alone, (0.9, 0.1))
    both.run([both.padded(both.samples(rows))])
    both.loss.after_step(lambda sums: sums)
    for one in alone:
        one.run([both_alone(one, rows)])
        one.loss.after_step(lambda sums: sums)
    both.run([both.padded(both.samples(rows))])
    both.loss.after_step(lambda sums: sums)  # tells the scale of the second step
    for one, loss in zip(alone, both.loss.each, strict=True):
        one.run([both_alone(one, rows)])
        one.loss.after_step(lambda sums: sums)
        assert loss.kd_scale == pytest.approx(one.loss.kd_scale, rel=1e-5)
    names = both.loss.memory()
    assert {"teacher1.kd_balance", "teacher2.kd_balance"} <= set(names)
    fresh = Several(alone, (0.9, 0.1))
    fresh.loss.remember(names)
    assert {name: value.tolist() for name, value in fresh.loss.memory().items()} == {
        name: value.tolist() for name, value in names.items()
    }


def test_packed_rows_are_those_of_padded_ones(tiny, third, rows):
    both = Several([Setup(tiny["student"], teacher) for teacher in (tiny["teacher"], third)], (0.7, 0.3))
    samples = both.samples(rows)
    expected = both.run([both.padded(samples)])
    bins = [
        [{**sample, "position_ids": list(range(len(sample["input_ids"])))} for sample in samples[k : k + 2]]
        for k in (0, 2)
    ]
    batch = both.collator(PackedMaskPairCollator)(bins)
    batch.pop("attention_mask")  # as Axolotl does: position ids keep the neighbours apart
    assert both.run([batch])[0] == pytest.approx(expected[0], rel=2e-5)


def test_a_batch_moves_with_all_of_its_teachers(tiny, third, rows):
    both = Several([Setup(tiny["student"], teacher) for teacher in (tiny["teacher"], third)], (0.7, 0.3))
    batch = both.padded(both.samples(rows))
    assert set(batch) == {"input_ids", "attention_mask", "labels", KEY}
    moved = batch[KEY].to("meta")
    assert [one.rows_R.device.type for one in moved.each] == ["meta", "meta"]
    texts = [one.teacher_text.ids_T for one in batch[KEY].each]
    assert len(texts[0]) != len(texts[1])


def test_columns_of_a_teacher():
    from datasets import Dataset

    row = {"input_ids": [1], "teacher_input_ids": [2], "spans": [5], "teacher_input_ids_2": [3], "note_2": "x"}
    assert row_of(row, 1) == row
    assert row_of(row, 2)["teacher_input_ids"] == [3] and "spans" not in row_of(row, 2)
    assert numbered("spans", 1) == "spans" and columns(2)[len(COLUMNS)] == "teacher_input_ids_2"
    dataset = Dataset.from_list([row])
    assert dataset_of(dataset, 1) is dataset and dataset_of(None, 2) is None
    assert dataset_of(dataset, 2, ("note",))[0] == {"input_ids": [1], "teacher_input_ids": [3], "note": "x"}


def test_what_is_logged_of_several_teachers():
    one, other = {"ce": 2.0, "kd": 1.0}, {"kd": 3.0}
    assert together([one], [1.0]) == one
    assert together([one, other], [0.75, 0.25]) == {"ce": 2.0, "kd": 1.5, "teacher1/kd": 1.0, "teacher2/kd": 3.0}


def test_a_list_of_one_is_the_simple_form():
    assert parse_settings({"teachers": [{**A, "weight": 3}]}) == parse_settings({"teacher": A})


def test_weights_are_shares_of_their_sum():
    settings = parse_settings({"teachers": [{**A, "weight": 6, "dtype": "float32"}, {**B, "weight": 2}, B]})
    assert settings.weights == pytest.approx([6 / 9, 2 / 9, 1 / 9])
    assert [one.teacher.model for one in settings.each] == ["A", "B", "B"]
    assert [one.teacher.dtype for one in settings.each] == ["float32", "bfloat16", "bfloat16"]
    assert parse_settings({"teachers": [A, B]}).weights == [0.5, 0.5]


WRONG = {
    "both forms": ({"teacher": A, "teachers": [B]}, "dskd.teachers: expected it unset beside dskd.teacher, got both"),
    "none": ({"method": "dskd"}, "dskd.teacher: expected a value, got nothing"),
    "an empty list": ({"teachers": []}, "dskd.teachers: expected one teacher or more, got an empty list"),
    "weight 0": ({"teachers": [A, {**B, "weight": 0}]}, r"dskd.teachers\[1\].weight: expected greater than 0, got 0"),
    "a negative weight": ({"teachers": [{**A, "weight": -1}, B]}, r"dskd.teachers\[0\].weight: .* 0, got -1"),
    "no number": ({"teachers": [{**A, "weight": math.nan}, B]}, r"teachers\[0\].weight: expected a finite number"),
    "infinite": ({"teachers": [{**A, "weight": math.inf}, B]}, r"teachers\[0\].weight: expected a finite number"),
    "an unknown key": ({"teachers": [A, {**B, "wieght": 1}]}, r"dskd.teachers\[1\].wieght: .*Did you mean 'weight'"),
    "a weight alone": ({"teacher": {**A, "weight": 1}}, "dskd.teacher.weight: .* the unknown setting 'weight'"),
    "no model": ({"teachers": [{"weight": 1}, B]}, r"dskd.teachers\[0\].model: expected a value"),
    "no states read": ({"teachers": [A, B], "method": "sft"}, "dskd.teachers: expected one teacher beside method: sft"),
}


@pytest.mark.parametrize("name", WRONG)
def test_lists_that_are_refused(name):
    block, told = WRONG[name]
    with pytest.raises(ValueError, match=told):
        parse_settings(block)


def test_errors_name_the_teacher_that_they_are_about():
    error = SettingError("dskd.teacher.model", "x", "y", "Set dskd.teacher.adapter.")
    with pytest.raises(SettingError) as found, naming(0, 1):
        raise error
    assert found.value is error
    with (
        pytest.raises(SettingError, match=r"^dskd.teachers\[2\].model: .* Set dskd.teachers\[2\].adapter.$"),
        naming(2, 3),
    ):
        raise error
    with pytest.raises(DSKDSetupError, match=r"^dskd.teachers\[1\]: "), naming(1, 3):
        raise DSKDSetupError("dskd.teacher", "x", "y", "z.")
    with pytest.raises(Mistakes, match=r"^dskd.teachers\[1\].model: "), naming(1, 3):
        raise Mistakes([error])


@pytest.mark.parametrize("wrong", [{"teacher_weight": 0.0}, {"teacher_weight": 1.5}, {"adds_ce": False}])
def test_an_objective_of_one_of_several_teachers_has_bounds(wrong, tiny):
    from dataclasses import replace

    objective = Setup(tiny["student"], tiny["teacher"], method="sft").loss.objective
    with pytest.raises(ValueError, match=next(iter(wrong))):
        replace(objective, **wrong)
