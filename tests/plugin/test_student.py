"""The loss inside the student's forward: against plain float loops, under any split, padded and packed."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dskd_plugin.assemble import backend_of, distillation_loss
from dskd_plugin.batch import KEY, ask
from dskd_plugin.core.backend import TorchBlocks
from dskd_plugin.core.fused import launch
from dskd_plugin.core.fused.backend import FusedBlocks
from dskd_plugin.errors import DSKDSetupError
from dskd_plugin.host.collator import PackedMaskPairCollator, PaddedPairCollator
from dskd_plugin.methods.base import METHODS, Method, SegmentMethod, register
from dskd_plugin.models import output_head
from dskd_plugin.pair import aligner, make_pair, pair_events, shared_ids
from dskd_plugin.settings import parse_settings
from dskd_plugin.student import attach
from dskd_plugin.teacher_settings import TeacherSettings
from dskd_plugin.teachers.live import Teacher
from dskd_plugin.text.respelled import respelling_matrix
from dskd_plugin.text.turn_ends import end_of_turn
from dskd_plugin.text.vocabularies import token_table


def split(batch):
    """The step batch, and what the student's forward takes."""
    return batch[KEY], {key: value for key, value in batch.items() if key not in (KEY, "labels")}


class Setup:
    """A student with its loss attached, a teacher and a way to run batches through both."""

    def __init__(self, student_path, teacher_path, *, packed=False, backend=None, **settings):
        self.settings = parse_settings({"teacher": {"model": teacher_path, "dtype": "float32"}, **settings})
        self.tokenizer = AutoTokenizer.from_pretrained(student_path)
        self.teacher_tokenizer = AutoTokenizer.from_pretrained(teacher_path)
        self.pair = make_pair(self.tokenizer, token_table(self.teacher_tokenizer), self.settings)
        self.student = AutoModelForCausalLM.from_pretrained(student_path, dtype=torch.float32)
        self.teacher = Teacher(
            TeacherSettings(model=teacher_path, dtype="float32"),
            vocab_size=self.pair.teacher.vocab_size,
            device=torch.device("cpu"),
            attn_implementation="sdpa",
            packed=packed,
            trust_remote_code=False,
        )
        ends = (
            end_of_turn(self.tokenizer, self.tokenizer.chat_template, self.pair.student),
            end_of_turn(self.teacher_tokenizer, self.teacher_tokenizer.chat_template, self.pair.teacher),
        )
        self.overlap = shared_ids(
            self.pair,
            [ends],
            head_rows=(self.student.config.vocab_size, self.teacher.head.weight_VD.shape[0]),
        )
        self.aligner = aligner(self.pair, self.settings, ends)
        teacher = None if self.settings.method == "sft" else self.teacher
        tokenizers = self.tokenizer, self.teacher_tokenizer
        ids = self.pair.student.vocab_size, self.teacher.head.vocab_size
        self.events = pair_events(self.pair, tokenizers, self.overlap, self.settings, [ends], ids)
        self.loss = distillation_loss(
            self.settings,
            self.student,
            teacher,
            self.pair,
            teacher and self.overlap,
            self.events,
            tokenizers=tokenizers,
            seed=0,
            backend=backend or TorchBlocks(3000),
        )
        attach(self.student, self.loss)

    def samples(self, conversations):
        return [self.sample(row["messages"]) for row in conversations]

    def sample(self, messages):
        """What the dataset makes of a conversation: the answers of the assistant are the responses."""
        sides = []
        for tokenizer in (self.tokenizer, self.teacher_tokenizer):
            ids, response = [], []
            for k, message in enumerate(messages):
                text = tokenizer.apply_chat_template(messages[: k + 1], tokenize=False)
                whole = tokenizer(text, add_special_tokens=False)["input_ids"]
                response += [message["role"] == "assistant"] * (len(whole) - len(ids))
                ids = whole
            sides.append((ids, response))
        (ids, response), (teacher_ids, teacher_response) = sides
        found = self.aligner.columns(ids, response, teacher_ids, teacher_response)
        found.pop("unmatched_responses")
        return {
            "input_ids": ids,
            "attention_mask": [1] * len(ids),
            "labels": [token if inside else -100 for token, inside in zip(ids, response, strict=True)],
            "teacher_input_ids": teacher_ids,
            **found,
        }

    def run(self, batches):
        """Loss, sums and gradients of one optimizer step over these micro-batches."""
        self.student.zero_grad()
        teacher = None if self.settings.method == "sft" else self.teacher
        sides = [split(batch) for batch in batches]
        window = [ask(own, teacher) for own, _ in sides]
        window[0].window = window
        total, sums = 0.0, {}
        for (_, inputs), rows in zip(sides, window, strict=True):
            self.loss.micro_batch = rows
            loss = self.student(**inputs, use_cache=False, logits_to_keep=1)["loss"]
            self.loss.micro_batch = None
            loss.backward()
            total += float(loss.detach())
            for name, (value, count) in rows.sums.items():
                old = sums.get(name, (0.0, 0.0))
                sums[name] = (old[0] + float(value), old[1] + float(count))
        return total, sums, {name: p.grad.clone() for name, p in self.student.named_parameters()}


def padded(setup, samples):
    attends = setup.settings.alignment == "cma"
    return PaddedPairCollator(setup.tokenizer, pad_to_multiple_of=8, cross_attention=attends)(
        [dict(sample) for sample in samples]
    )


@pytest.fixture(scope="module")
def rows(build):
    return build.conversations(6, 11)


def close(found, expected, tolerance=2e-5):
    total, sums, gradients = found
    other_total, other_sums, other_gradients = expected
    assert total == pytest.approx(other_total, rel=tolerance)
    for name, (value, count) in sums.items():
        assert value == pytest.approx(other_sums[name][0], rel=tolerance, abs=1e-6), name
        assert count == other_sums[name][1], name
    for name, gradient in gradients.items():
        torch.testing.assert_close(
            gradient, other_gradients[name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


PUBLISHED = {
    "target": "projected",
    "unpaired": "share",
    "spaces": "both",
    "temperature": 2.0,
    "agreement_mask": True,
    "projector": {"labels": "hard"},
}
MODES = {
    "default": {},
    "published": PUBLISHED,
    "both": {"spaces": "both"},
    "teacher": {"spaces": "teacher"},
    "mask": {"agreement_mask": True},
    "random": {"projector": {"init": "random"}},
    "projected": {"target": "projected"},
    "projected mask": {"target": "projected", "agreement_mask": True},
    "ids": {"shared": "ids"},
    "hard": {"projector": {"labels": "hard"}},
    "kd-only": {"kd_ratio": 1.0, "divergence": {"kind": "js"}},
    "keep": PUBLISHED | {"unmapped_argmax": "teacher_space"},
    "spans": {"span_weight": 0.7},
    "unpaired": {"unpaired": "ce"},
    "unpaired published": PUBLISHED | {"unpaired": "ce"},
    "balanced": {"spaces": "both", "kd_weight": "balanced"},
    "sft": {"method": "sft"},
    "overlap_kd": {"method": "overlap_kd"},
    "overlap_kd ids": {"method": "overlap_kd", "shared": "ids"},
    "overlap_kd support": {"method": "overlap_kd", "shared": "ids", "support": 16},
    "bpm": {"method": "bpm"},
    "bpm ids": {"method": "bpm", "shared": "ids", "divergence": {"kind": "js"}, "unpaired": "ce"},
    "overlap_kd spans": {"method": "overlap_kd", "span_weight": 2.0},
    "uld": {"method": "uld"},
    "mined": {"method": "mined"},
    "span_kd unpaired": {"method": "span_kd", "unpaired": "ce", "divergence": {"kind": "reverse_kl"}},
    "xtoken": {"method": "xtoken"},
    "xtoken few": {"method": "xtoken", "xtoken": {"top_k": 20}, "divergence": {"kind": "js"}},
    "xtoken hybrid": {"method": "xtoken", "xtoken": {"loss": "hybrid"}},
    "cma": {"alignment": "cma", "spaces": "both", "agreement_mask": True},
    "cma student": {"alignment": "cma"},
    "cma teacher": {"alignment": "cma", "spaces": "teacher"},
    "cma random": {"alignment": "cma", "projector": {"init": "random"}, "span_weight": 0.5},
}
MODES |= {name: {"method": name} for (name, _), method in METHODS.items() if isinstance(method, SegmentMethod)}


@pytest.mark.parametrize("mode", MODES)
def test_any_split_gives_the_same_loss_and_gradients(tiny, rows, mode):
    setup = Setup(tiny["student"], tiny["teacher"], **MODES[mode])
    samples = setup.samples(rows)
    whole = setup.run([padded(setup, samples)])
    assert whole[0] > 0
    if setup.settings.kd_weight == "balanced":
        setup.loss.after_step(lambda sums: sums)
        assert setup.run([padded(setup, samples)])[0] != pytest.approx(whole[0], rel=0.01)
        whole = setup.run([padded(setup, samples)])
    close(
        setup.run([padded(setup, samples[:1]), padded(setup, samples[1:4]), padded(setup, samples[4:])]),
        whole,
    )
    close(setup.run([padded(setup, [sample]) for sample in samples]), whole)


@pytest.mark.parametrize(
    ("pair", "mode"),
    [
        ("teacher", {}),
        ("teacher", PUBLISHED),
        ("sibling", {}),
        ("teacher", {"alignment": "cma", "spaces": "both", "span_weight": 0.5}),
        ("teacher", {"method": "uld"}),
        ("teacher", {"method": "bpm", "span_weight": 0.5}),
        ("teacher", {"method": "span_kd"}),
        ("sibling", {"method": "span_kd"}),
    ],
)
def test_packed_equals_padded(tiny, rows, pair, mode):
    apart = Setup(tiny["student"], tiny[pair], **mode)
    together = Setup(tiny["student"], tiny[pair], packed=True, **mode)
    assert together.teacher.packed
    samples = apart.samples(rows)
    bins = [
        [{**sample, "position_ids": list(range(len(sample["input_ids"])))} for sample in samples[k : k + 3]]
        for k in (0, 3)
    ]
    attends = mode.get("alignment") == "cma"
    batch = PackedMaskPairCollator(together.tokenizer, pad_to_multiple_of=8, cross_attention=attends)(bins)
    batch.pop("attention_mask")  # as Axolotl does: position ids keep the neighbours apart
    close(together.run([batch]), apart.run([padded(apart, samples)]))


def softmax(logits, temperature=1.0):
    top = max(logits)
    parts = [math.exp((value - top) / temperature) for value in logits]
    whole = sum(parts)
    return [part / whole for part in parts]


@pytest.mark.parametrize(("pair", "mode"), [("teacher", {}), ("teacher", {"shared": "ids"}), ("sibling", {})])
def test_top_vocab_changes_the_maps_and_nothing_else(tiny, rows, pair, mode):
    """It says from which shared tokens the projector starts, not which of them the teacher decides between."""
    whole = Setup(tiny["student"], tiny[pair], **mode)
    cut = Setup(tiny["student"], tiny[pair], projector={"top_vocab": 60}, **mode)
    heads = [model.lm_head.weight.detach().double() for model in (whole.student, whole.teacher.model)]
    student, teacher = (
        head[ids[:60]]
        for head, ids in zip(heads, (whole.overlap.student_ids_O, whole.overlap.teacher_ids_O), strict=True)
    )
    torch.testing.assert_close(
        cut.loss.t2s.weight_Dd.detach().double(), teacher.T @ torch.linalg.pinv(student.T), rtol=1e-3, atol=1e-4
    )
    samples = whole.samples(rows)
    assert cut.run([padded(cut, samples)])[0] != pytest.approx(whole.run([padded(whole, samples)])[0], rel=1e-3)
    cut.loss.load_state_dict(whole.loss.state_dict())
    close(cut.run([padded(cut, samples)]), whole.run([padded(whole, samples)]))


@pytest.mark.parametrize("labels", ["hard", "soft"])
def test_loss_is_the_formula_of_the_method(tiny, rows, labels):
    """Float loops over the models' own logits and heads; nothing shared with the product but the rows."""
    settings = {"target": "projected", "spaces": "both", "agreement_mask": labels == "hard"}
    settings |= {"projector": {"labels": labels}, "unpaired": "share"}
    setup = Setup(tiny["student"], tiny["teacher"], temperature=1.7, kd_ratio=0.3, **settings)
    samples = setup.samples(rows[:2])
    loss, sums, _ = setup.run([padded(setup, samples)])
    student, teacher = setup.student.double(), setup.teacher.model.double()
    heads = student.lm_head.weight.detach(), teacher.lm_head.weight.detach()
    ids = setup.overlap.student_ids_O.tolist(), setup.overlap.teacher_ids_O.tolist()
    assert all(
        setup.pair.student.bytes[s] == setup.pair.teacher.bytes[t]
        for s, t in zip(*ids, strict=True)
        if setup.pair.student.bytes[s] is not None
    )
    t2s = heads[1][ids[1]].T @ torch.linalg.pinv(heads[0][ids[0]].T)
    s2t = heads[0][ids[0]].T @ torch.linalg.pinv(heads[1][ids[1]].T)
    to_student = dict(zip(ids[1], ids[0], strict=True))
    for teacher_id, text in enumerate(setup.pair.teacher.bytes):  # byte tokens double ordinary ones
        if text is not None and text in setup.pair.student.bytes:
            to_student[teacher_id] = setup.pair.student.bytes.index(text)
    ce, t2s_kd, t2s_ce, s2t_kd = [], [], [], []
    with torch.no_grad():
        for sample in samples:
            hidden = student.model(torch.tensor([sample["input_ids"]])).last_hidden_state[0]
            teacher_hidden = teacher.model(torch.tensor([sample["teacher_input_ids"]])).last_hidden_state[0]
            for position, label in enumerate(sample["labels"]):
                if label != -100 and position:
                    ce.append(-math.log(softmax((heads[0] @ hidden[position - 1]).tolist())[label]))
            for s, t in zip(sample["aligned_student"], sample["aligned_teacher"], strict=True):
                own = (heads[0] @ hidden[s - 1]).tolist()
                theirs = (heads[1] @ teacher_hidden[t - 1]).tolist()
                label = to_student.get(max(range(len(theirs)), key=theirs.__getitem__))
                if label is None:
                    continue
                projected = (heads[0] @ (teacher_hidden[t - 1] @ t2s)).tolist()
                back = (heads[1] @ (hidden[s - 1] @ s2t)).tolist()
                if labels == "hard":
                    t2s_ce.append(-math.log(softmax(projected)[label]))
                else:
                    moved = [0.0] * len(projected)
                    for teacher_id, probability in enumerate(softmax(theirs)):
                        if teacher_id in to_student:
                            moved[to_student[teacher_id]] += probability
                    moved = [probability / sum(moved) for probability in moved]
                    t2s_ce.append(
                        sum(a * math.log(a / b) for a, b in zip(moved, softmax(projected), strict=True) if a > 0)
                    )
                p, q = softmax(theirs, 1.7), softmax(back, 1.7)
                s2t_kd.append(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
                if labels == "soft" or max(range(len(projected)), key=projected.__getitem__) == label:
                    p, q = softmax(projected, 1.7), softmax(own, 1.7)
                    t2s_kd.append(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
    means = [sum(term) / max(1, len(term)) for term in (ce, t2s_kd, t2s_ce, s2t_kd)]
    assert len(s2t_kd) > 10
    for name, term in zip(("ce", "t2s_kd", "t2s_ce", "s2t_kd"), (ce, t2s_kd, t2s_ce, s2t_kd), strict=True):
        assert sums[name] == (pytest.approx(sum(term), rel=1e-4, abs=1e-4), len(term))
    assert loss == pytest.approx(0.7 * means[0] + 0.3 * sum(means[1:]), rel=1e-4)


def shared_pairs(setup):
    return list(zip(setup.overlap.student_ids_O.tolist(), setup.overlap.teacher_ids_O.tolist(), strict=True))


def matrix_of(setup):
    ids = setup.pair.student.vocab_size, setup.teacher.head.vocab_size
    sides = setup.pair.student, (setup.teacher_tokenizer, setup.pair.teacher)
    return respelling_matrix(*sides, setup.overlap, ids)


def loosely_matched(setup):
    pairs = list(zip(*(ids.tolist() for ids in matrix_of(setup).best_pairs(0.6)), strict=True))
    assert len(pairs) >= len(setup.overlap.student_ids_O)
    return pairs


def adaptive(setup):
    share = len(shared_pairs(setup)) / setup.teacher.head.vocab_size
    return share, 1 - share


def ends_there(setup, logits):
    """Whether the teacher finds it likely that something new begins: white space or a special token."""
    table, chances = setup.pair.teacher, softmax(logits)
    texts = enumerate(table.bytes[: len(chances)])
    begins = [k in table.special or (text is not None and text[:1].isspace()) for k, text in texts]
    return sum(chance for chance, there in zip(chances, begins, strict=True) if there) >= 0.4


# name -> (settings, the distance of a segment in plain loops; None for one that is left out). A distance takes the
# student's side, the teacher's side, whether they pair, and the teacher's logits right after, None where not read.
BY_SEGMENTS = {
    "span_kd": (
        {"temperature": 1.7, "divergence": {"kind": "reverse_kl"}},
        lambda oracle, setup, *of, after: oracle.extended(*of, 1.7, "reverse_kl", shared_pairs(setup)),
    ),
    "csd": (
        {"temperature": 1.7, "divergence": {"kind": "js"}},
        lambda oracle, setup, *of, after: oracle.common_support(
            *of, 1.7, "js", shared_pairs(setup), (setup.pair.student.bytes, setup.pair.teacher.bytes)
        ),
    ),
    "gold": (
        {"temperature": 1.7, "gold": {"beta": 0.3}},
        lambda oracle, setup, *of, after: oracle.hybrid(*of[:2], 1.7, 0.3, adaptive(setup), shared_pairs(setup)),
    ),
    "xtoken": (
        {"temperature": 1.7, "xtoken": {"loss": "hybrid"}},
        lambda oracle, setup, *of, after: oracle.hybrid(*of[:2], 1.7, 0.5, (1, 1), loosely_matched(setup)),
    ),
    "alm": (
        {"alm": {"bias_threshold": 0.4}, "unpaired": "ce"},
        lambda oracle, setup, student, teacher, paired, *, after: (
            oracle.likelihood(student, teacher, 100.0) if after is None or ends_there(setup, after) else None
        ),
    ),
}


@pytest.mark.parametrize("sides", [("student", "teacher"), ("teacher", "student")])
@pytest.mark.parametrize("name", BY_SEGMENTS)
def test_segments_are_those_of_the_text(oracle, tiny, rows, name, sides):
    """Float loops over the models' own logits at the pairs and spans of each sample; one of the two cuts finer."""
    changes, distance = BY_SEGMENTS[name]
    setup = Setup(*(tiny[side] for side in sides), method=name, kd_ratio=0.3, **changes)
    samples = setup.samples(rows[:2])
    loss, sums, _ = setup.run([padded(setup, samples)])
    student, teacher = setup.student.double(), setup.teacher.model.double()
    real = setup.pair.student.vocab_size, setup.teacher.head.vocab_size
    found, sizes, left_out, unpaired = [], set(), 0, 0
    for sample in samples:
        ids = sample["input_ids"], sample["teacher_input_ids"]
        with torch.no_grad():
            hidden = [
                model.model(torch.tensor([side])).last_hidden_state[0]
                for model, side in zip((student, teacher), ids, strict=True)
            ]
            logits = [
                (states @ model.lm_head.weight.T)[:, :size].tolist()
                for states, model, size in zip(hidden, (student, teacher), real, strict=True)
            ]
        pairs = zip(sample["aligned_student"], sample["aligned_teacher"], strict=True)
        segments = [((s, s + 1), (t, t + 1), True) for s, t in pairs]
        spans = [sample["spans"][k : k + 4] for k in range(0, len(sample["spans"]), 4)]
        segments += [((a, b), (c, d), False) for a, b, c, d in spans]
        read = {t for _, theirs, _ in segments for t in range(*theirs)}
        unpaired += sum(label != -100 for label in sample["labels"][1:])
        for own, theirs, paired in segments:
            said = [
                ([logits[side][p - 1] for p in range(*of)], [ids[side][p] for p in range(*of)])
                for side, of in enumerate((own, theirs))
            ]
            sizes.add((min(2, len(said[0][1])), min(2, len(said[1][1]))))
            after = logits[1][theirs[1] - 1] if theirs[1] in read else None
            value = distance(oracle, setup, *said, paired, after=after)
            if value is None:
                left_out += 1
            else:
                found.append(value)
                unpaired -= own[1] - own[0]
    assert (left_out > 0) == (name == "alm")
    assert sizes == {(1, 1), (2, 1) if sides[0] == "student" else (1, 2)}
    assert sums["kd"] == (pytest.approx(sum(found), rel=1e-4), len(found))
    ce, number = sums["ce"]
    kept, _ = sums.get("ce_unpaired", (0.0, 0))
    assert loss == pytest.approx(0.7 * ce / number + 0.3 * (sum(found) / len(found) + kept / number), rel=1e-4)
    if "unpaired" in changes:
        # A random model gives every token about the same.
        assert kept == pytest.approx(unpaired * ce / number, rel=0.05) and 0 < unpaired < number


def test_a_projected_student_is_compared_where_both_begin_a_token(oracle, tiny, rows):
    setup = Setup(tiny["student"], tiny["teacher"], method="xtoken", temperature=1.7, xtoken={"top_k": 30})
    (sample,) = setup.samples(rows[:1])
    _, sums, _ = setup.run([padded(setup, [sample])])
    matrix, found = matrix_of(setup), []
    entries = list(zip(*(x.tolist() for x in (matrix.student_E, matrix.teacher_E, matrix.weights_E)), strict=True))
    student, teacher = setup.student.double(), setup.teacher.model.double()
    ids = torch.tensor([sample["input_ids"]]), torch.tensor([sample["teacher_input_ids"]])
    with torch.no_grad():
        own, theirs = student(ids[0]).logits[0], teacher(ids[1]).logits[0, :, : setup.teacher.head.vocab_size]
    for s, t in zip(sample["aligned_student"], sample["aligned_teacher"], strict=True):
        z_s, z_t = own[s - 1].tolist(), theirs[t - 1].tolist()
        found.append(oracle.projected(z_s, z_t, 1.7, "forward_kl", entries, 30))
    assert len(found) > 10 and sums["kd"] == (pytest.approx(sum(found), rel=1e-4), len(found))


WITH_UNPAIRED = [{}, {"method": "overlap_kd"}, {"method": "uld"}, {"kd_ratio": 1.0}, {"method": "bpm"}]


@pytest.mark.parametrize("mode", WITH_UNPAIRED)
def test_rows_without_a_partner_keep_their_cross_entropy(tiny, rows, mode):
    """Each of them counts 1 and each of the others 1 - kd_ratio, over all response rows."""
    share, whole = (Setup(tiny["student"], tiny["teacher"], unpaired=value, **mode) for value in ("share", "ce"))
    samples = whole.samples(rows)
    loss, sums, gradients = whole.run([padded(whole, samples[:2]), padded(whole, samples[2:])])
    other, other_sums, other_gradients = share.run([padded(share, samples)])
    plain = Setup(tiny["student"], tiny["teacher"], method="sft")
    of_rows = 0.0
    events = whole.events.student_V.tolist() if whole.settings.by_events else []

    def of_several(label):
        return bool(events) and events.count(events[label]) > 1

    for sample in samples:
        # A gold token whose event has others beside it is one of them.
        paired = {place for place in sample["aligned_student"] if not of_several(sample["labels"][place])}
        labels = [-100 if place in paired else label for place, label in enumerate(sample["labels"])]
        value, found, _ = plain.run([padded(plain, [{**sample, "labels": labels}])])
        of_rows += value * found["ce"][1]
    ratio, (_, number) = whole.settings.kd_ratio, sums["ce"]
    assert of_rows > 0 and sums["ce_unpaired"] == (pytest.approx(of_rows, rel=2e-5), number)
    assert loss == pytest.approx(other + ratio * of_rows / number, rel=2e-5)
    assert not all(torch.equal(gradient, other_gradients[name]) for name, gradient in gradients.items())
    if ratio < 1:
        assert sums["ce"] == (pytest.approx(other_sums["ce"][0], rel=2e-5), number)


@pytest.mark.parametrize(
    "mode",
    [{"spaces": "both", "span_weight": 0.5}, {"method": "overlap_kd"}, {"alignment": "cma"}, {"method": "span_kd"}],
)
def test_a_balanced_kd_part_weighs_as_much_as_the_cross_entropy(tiny, rows, mode):
    mode = mode | {"kd_ratio": 0.3, "unpaired": "share"}
    setup = Setup(tiny["student"], tiny["teacher"], kd_weight="balanced", **mode)
    fixed = Setup(tiny["student"], tiny["teacher"], **mode)
    samples = setup.samples(rows)
    batches = [padded(setup, samples[:1]), padded(setup, samples[1:])]
    expected = fixed.run(batches)
    first = setup.run(batches)
    close(first, expected)  # before the first step nothing is known
    assert setup.loss.kd_scale == 1
    ranks = 2
    setup.loss.after_step(lambda sums: ranks * sums)  # as if a second rank had seen the same
    loss, sums, gradients = setup.run(batches)
    means = {name: sums[name][0] / max(1, sums[name][1]) for name in setup.loss.objective.terms}
    of_projector = means.get("t2s_ce", 0.0)
    assert loss == pytest.approx(0.7 * means["ce"] + 0.3 * (means["ce"] + of_projector), rel=1e-5)
    close((0.0, sums, {}), (0.0, expected[1], {}))  # logged unscaled
    assert not all(torch.equal(gradients[name], expected[2][name]) for name in gradients)
    setup.loss.after_step(lambda sums: sums)
    kd = sum(means[name] * (0.5 if name == "span_kl" else 1) for name in setup.loss.objective.scaled)
    assert setup.loss.kd_scale == pytest.approx(means["ce"] / kd, rel=1e-5)
    setup.student.eval()
    assert setup.run(batches)[0] == pytest.approx(expected[0], rel=1e-5)  # evaluations can be compared
    assert fixed.loss.kd_scale is None


def test_a_teacher_that_knows_the_gold_tokens_no_better_stops_pulling(tiny, rows):
    setup = Setup(tiny["student"], tiny["teacher"], kd_ratio=0.3)
    sft = Setup(tiny["student"], tiny["teacher"], method="sft")
    samples = setup.samples(rows)
    batches = [padded(setup, samples[:1]), padded(setup, samples[1:])]
    pulled = setup.run(batches)
    lead, count = pulled[1]["teacher_lead"]

    def after(total, number, loss=setup.loss):
        """A run after steps that have shown this lead over so many rows."""
        loss.remember({**loss.memory(), "teacher_lead": torch.tensor([total, number], dtype=torch.float64)})
        return setup.run(batches)

    for shown in ((1.0, 100), (-1.0, 31)):  # a lead, or too few rows to tell
        close(after(*shown), pulled)
    loss, sums, gradients = after(-1.0, 100)
    of_sft = sft.run([padded(sft, samples[:1]), padded(sft, samples[1:])])
    of_projector = sums["t2s_ce"][0] / sums["t2s_ce"][1]
    assert loss == pytest.approx(of_sft[0] + 0.3 * of_projector, rel=1e-5)
    for name, gradient in of_sft[2].items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-6)
    assert sums["t2s_kd"] == pulled[1]["t2s_kd"]  # logged as if it pulled
    setup.student.eval()
    assert setup.run(batches)[0] == pytest.approx(pulled[0], rel=1e-5)  # evaluations can be compared
    setup.student.train()

    setup.loss.after_step(lambda sums: 2 * sums)  # as if a second rank had seen the same
    assert setup.loss.guarded_steps == [True]
    shown, runs = setup.loss.memory()["teacher_lead"].tolist(), 4
    assert shown == pytest.approx([0.95 * -1.0 + 2 * runs * lead, 0.95 * 100 + 2 * runs * count], rel=1e-4)


@pytest.mark.parametrize(("sampled", "remembers"), [(None, True), (9, False)])
def test_answers_of_the_student_do_not_say_who_knows_better(tiny, rows, sampled, remembers):
    """What it drew itself it finds likelier than anyone else does, on average."""
    setup = Setup(tiny["student"], tiny["teacher"], kd_ratio=1.0)
    batch = padded(setup, setup.samples(rows))
    batch[KEY].sampled = sampled
    assert setup.run([batch])[1]["teacher_lead"][1] > 0  # logged
    setup.loss.after_step(lambda sums: sums)
    assert bool(setup.loss.memory()["teacher_lead"].any()) == remembers


@pytest.mark.parametrize("free", [{"guard": False}, {"unpaired": "share"}, {"target": "projected"}])
def test_without_the_guard_the_teacher_teaches_on(tiny, rows, free):
    setup = Setup(tiny["student"], tiny["teacher"], **free)
    batches = [padded(setup, setup.samples(rows))]
    before = setup.run(batches)
    setup.loss.remember({**setup.loss.memory(), "teacher_lead": torch.tensor([-1.0, 100.0], dtype=torch.float64)})
    close(setup.run(batches), before)
    assert setup.loss.guarded_steps is None


def test_the_support_moves_the_loss_up_to_all_shared_ids(tiny, rows):
    sizes = (4, 16, 10**6, None)
    setups = [Setup(tiny["student"], tiny["teacher"], method="overlap_kd", shared="ids", support=k) for k in sizes]
    found = [setup.run([padded(setup, setup.samples(rows))]) for setup in setups]
    losses = [loss for loss, _, _ in found]
    assert losses[0] != pytest.approx(losses[1], rel=1e-3) and losses[1] != pytest.approx(losses[3], rel=1e-3)
    close(found[2], found[3])


def test_a_resumed_loss_is_balanced_as_it_was(tiny, rows, tmp_path):
    """Also where the method has no projector to save."""
    from dskd_plugin import state

    setups = [Setup(tiny["student"], tiny["teacher"], method="overlap_kd", kd_weight="balanced") for _ in range(2)]
    batches = [padded(setups[0], setups[0].samples(rows))]
    setups[0].run(batches)
    setups[0].loss.after_step(lambda sums: sums)
    state.save(tmp_path, state.projector_state(setups[0].loss), {})
    state.load(tmp_path, setups[1].loss)
    assert setups[0].run(batches)[0] == setups[1].run(batches)[0]
    assert setups[0].loss.memory()["kd_balance"].equal(setups[1].loss.memory()["kd_balance"])


def test_warm_up_trains_the_projectors_alone(tiny, rows):
    """The student gets the gradient of ce, the projectors that of the KD terms they are learned from."""
    for mode in ({"projector": {"warmup_steps": 3}}, {"alignment": "cma", "projector": {"warmup_steps": 3}}):
        setup = Setup(tiny["student"], tiny["teacher"], spaces="both", unpaired="share", **mode)
        batch = [padded(setup, setup.samples(rows))]
        step = [2]
        setup.loss.step = lambda step=step: step[0]
        _, sums, warming = setup.run(batch)
        plain = Setup(tiny["student"], tiny["teacher"], method="sft")
        expected = plain.run([padded(plain, plain.samples(rows))])[2]
        for name, gradient in expected.items():
            torch.testing.assert_close(warming[name], 0.5 * gradient, rtol=1e-4, atol=1e-6)
        step[0] = 3
        _, later_sums, after = setup.run(batch)
        assert later_sums["t2s_kd"] == sums["t2s_kd"]
        own = [name for name in after if name.startswith("dskd.")]
        assert own and not all(torch.equal(after[name], warming[name]) for name in expected)
        for name in own:
            assert warming[name].abs().sum() > 0
            torch.testing.assert_close(warming[name], after[name])


def test_gold_rows_and_answers_of_an_on_policy_step(tiny, rows):
    """ce comes from the gold rows and the KD terms from the answers, as two batches of their own would give."""
    setup = Setup(tiny["student"], tiny["teacher"], span_weight=0.5, spaces="both", unpaired="share")
    gold, answers = setup.samples(rows[:3]), setup.samples(rows[3:])
    mixed = padded(setup, [{**s, "on_policy": False} for s in gold] + [{**s, "on_policy": True} for s in answers])
    total, sums, _ = setup.run([mixed])
    of_gold, of_answers = (setup.run([padded(setup, samples)])[1] for samples in (gold, answers))
    sums = {name: sums[name] for name in setup.loss.objective.terms}
    for name, (value, count) in sums.items():
        other, number = (of_gold if name == "ce" else of_answers)[name]
        assert count == number > 0
        assert value == pytest.approx(other, rel=2e-5), name
    means = {name: value / count for name, (value, count) in sums.items()}
    kd = means["t2s_kd"] + means["t2s_ce"] + means["s2t_kd"] + 0.5 * means["span_kl"]
    assert total == pytest.approx(0.5 * means["ce"] + 0.5 * kd, rel=1e-5)


def test_student_equal_to_teacher_has_no_divergence(tiny, rows):
    setup = Setup(tiny["sibling"], tiny["sibling"], spaces="both")
    assert setup.pair.identity
    _, sums, _ = setup.run([padded(setup, setup.samples(rows))])
    assert sums["t2s_agreement"][0] == sums["t2s_agreement"][1] > 0
    assert sums["s2t_agreement"][0] == sums["s2t_agreement"][1]
    for name in ("t2s_kd", "t2s_ce", "s2t_kd"):
        assert sums[name][0] / sums[name][1] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("method", ["dskd", "bpm"])
def test_no_aligned_row_keeps_the_graph(tiny, rows, method):
    setup = Setup(tiny["student"], tiny["teacher"], method=method)
    samples = setup.samples(rows)
    samples = [{**sample, **{name: [] for name in sample if name.startswith("aligned_")}} for sample in samples]
    loss, sums, gradients = setup.run([padded(setup, samples)])
    assert loss == pytest.approx(sums["ce"][0] / sums["ce"][1])  # no token has a partner: fine-tuning
    assert method == "bpm" or gradients["dskd.t2s.linear.weight"].abs().sum() == 0
    silent = [{**sample, "labels": [-100] * len(sample["labels"])} for sample in samples]
    loss, _, gradients = setup.run([padded(setup, silent)])
    assert loss == 0 and all(gradient.abs().sum() == 0 for gradient in gradients.values())


def test_the_map_into_the_teachers_space_follows_the_live_head(tiny, rows):
    setup = Setup(tiny["student"], tiny["teacher"], spaces="both")
    batch = [padded(setup, setup.samples(rows))]
    step = [0]
    setup.loss.step = lambda: step[0]

    def map_after_a_run():
        setup.run(batch)
        return setup.loss.s2t_map(setup.loss.student_head()).clone()

    before = map_after_a_run()
    with torch.no_grad():
        setup.student.lm_head.weight.mul_(1.5)
    assert torch.equal(map_after_a_run(), before)
    step[0] = 1
    torch.testing.assert_close(map_after_a_run(), 1.5 * before)


def test_dropout_within_the_head_is_no_unknown_architecture(tiny, rows):
    """A LoRA head that has learned something, as after a resumption."""
    from peft import LoraConfig, inject_adapter_in_model

    setup = Setup(tiny["student"], tiny["teacher"])
    inject_adapter_in_model(LoraConfig(target_modules=["lm_head"], r=4, lora_dropout=0.5), setup.student)
    head = output_head(setup.student)
    torch.nn.init.normal_(head.lora_B["default"].weight)
    setup.student.requires_grad_(True).train()
    setup.loss.student_and_head = (setup.student, head)
    batch = [padded(setup, setup.samples(rows))]
    dropped = setup.run(batch)
    setup.student.eval()
    close(dropped, setup.run(batch))
    head.lora_dropout["default"] = torch.nn.Hardtanh(-0.1, 0.1)  # something that the weights do not say
    setup.loss.head_checked = False
    with pytest.raises(DSKDSetupError, match="base_model: expected logits"):
        setup.run(batch)


def test_without_a_micro_batch_the_student_is_untouched(tiny):
    setup = Setup(tiny["student"], tiny["teacher"])
    plain = AutoModelForCausalLM.from_pretrained(tiny["student"], dtype=torch.float32)
    ids = torch.arange(10)[None]
    output = setup.student(input_ids=ids, labels=ids)
    assert torch.equal(output.logits, plain(input_ids=ids).logits)
    assert setup.student.generate(ids, max_new_tokens=3, do_sample=False).shape == (1, 13)


def test_saved_student_has_no_projector(tiny, tmp_path):
    setup = Setup(tiny["student"], tiny["teacher"])
    setup.student.save_pretrained(tmp_path)
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]


@pytest.mark.parametrize("mode", [PUBLISHED, {"spaces": "both"}], ids=["published", "both"])
@pytest.mark.parametrize("precision", ["bf16 weights", "fp32 weights, bf16 products"])
def test_low_precision_is_close(tiny, rows, precision, mode):
    setup = Setup(tiny["student"], tiny["teacher"], **mode)
    batch = [padded(setup, setup.samples(rows))]
    expected, sums, _ = setup.run(batch)
    if precision == "bf16 weights":
        setup.student.bfloat16()
        setup.loss.t2s.float()
    setup.loss.matmul_dtype = torch.bfloat16
    setup.loss.step = lambda: 1  # the map between the spaces is made anew
    with torch.autocast("cpu", torch.bfloat16, enabled=precision != "bf16 weights"):
        found, low_sums, gradients = setup.run(batch)
    assert found == pytest.approx(expected, rel=0.05)  # t2s_kd is a mean over the few rows that agree
    for name in ("ce", "t2s_ce", "s2t_kd"):
        assert low_sums[name][0] == pytest.approx(sums[name][0], rel=0.03), name
    for name, parameter in setup.student.named_parameters():
        assert gradients[name].dtype == parameter.dtype
        assert gradients[name].isfinite().all()


@pytest.mark.parametrize(
    "settings", [{}, {"target": "projected"}, {"target": "projected", "projector": {"labels": "hard"}}]
)
def test_a_fitted_projector_is_better_on_rows_that_it_did_not_see(tiny, rows, settings):
    from dskd_plugin.fitted import fit_projector

    projector = {"init": "fitted", **settings.get("projector", {})}
    setups = [Setup(tiny["student"], tiny["teacher"], **{**settings, "projector": projector}) for _ in range(2)]
    samples = setups[0].samples(rows)
    samples = samples * -(-600 // sum(len(sample["aligned_teacher"]) for sample in samples))
    weights = []
    for setup in setups:
        start = setup.loss.t2s.linear.weight.clone()
        fit = fit_projector(setup.loss, setup.teacher, samples, seed=3, quiet=True)
        assert fit.after.label_loss < fit.before.label_loss
        assert not torch.equal(setup.loss.t2s.linear.weight, start)
        assert torch.equal(setup.loss.t2s.weight_Dd, fit.map_Dd)
        weights.append(setup.loss.t2s.linear.weight)
    assert torch.equal(*weights)  # on all ranks alike
    with pytest.raises(ValueError, match=r"dskd\.projector\.init: expected at least 512 aligned tokens .* got \d+\."):
        fit_projector(setups[0].loss, setups[0].teacher, samples[:2], seed=3, quiet=True)
    start = setups[0].loss.t2s.linear.weight.clone()
    with torch.no_grad():
        setups[0].teacher.model.model.norm.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"dskd\.projector\.init: expected teacher states that are numbers"):
        fit_projector(setups[0].loss, setups[0].teacher, samples, seed=3, quiet=True)
    assert torch.equal(setups[0].loss.t2s.linear.weight, start)


# -- the teacher by bytes --------------------------------------------------------------------------------------------


# Tokens of either side begin inside one of the other, and reach beyond its end.
UNEVEN = [
    {"role": "user", "content": "red lamp"},
    {"role": "assistant", "content": "returned lamps\n- items 🙂🙂 naïvecafé\n- code"},
]
BY_BYTES = {
    "ids": {"method": "bpm", "shared": "ids", "bpm": {"mask_whitespace": False}, "divergence": {"kind": "js"}},
    "events": {"method": "bpm", "divergence": {"kind": "js"}},
}


@pytest.mark.parametrize("name", BY_BYTES)
def test_loss_by_bytes_is_the_formula_of_the_method(oracle, tiny, name):
    """Loops over the models' own logits and all their tokens' bytes."""
    settings = {"temperature": 1.7, "kd_ratio": 0.3, "unpaired": "share"}
    setup = Setup(tiny["student"], tiny["teacher"], **settings, **BY_BYTES[name])
    sample = setup.sample(UNEVEN)
    loss, sums, _ = setup.run([padded(setup, [sample])])
    student, teacher = setup.student.double(), setup.teacher.model.double()
    ours, theirs = setup.pair.student, setup.pair.teacher
    with torch.no_grad():
        own = student(torch.tensor([sample["input_ids"]])).logits[0].tolist()
        other = teacher(torch.tensor([sample["teacher_input_ids"]])).logits[0].tolist()
    roles = {
        t: s for t, s in enumerate(setup.overlap.teacher_to_student_V.tolist()) if s >= 0 and theirs.bytes[t] is None
    }
    assert roles
    found, kinds = [], set()
    columns = ("aligned_student", "aligned_teacher", "aligned_offset", "aligned_more")
    for i, j, offset, more in zip(*(sample[column] for column in columns), strict=True):
        kinds.add((offset > 0, more > 0))
        ids = sample["teacher_input_ids"][j : j + more + 1]
        along = [oracle.softmax(other[k - 1][: theirs.vocab_size], 1.7) for k in range(j, j + more + 1)]
        begun = (theirs.literal[ids[0]] or b"")[: max(0, offset)]
        q = oracle.softmax(own[i - 1][: ours.vocab_size], 1.7)
        if name == "ids":
            masses = oracle.prefix_target(along, theirs.bytes, ours.bytes, roles, begun=begun, said=ids)
            found.append(oracle.compare_masses(q, masses, "js"))
        else:
            found.append(by_event(oracle, setup.events, along, theirs, ours, begun, ids, q))
    assert len(kinds) == 4
    assert sums["kd"] == (pytest.approx(sum(found), rel=1e-4, abs=1e-5), len(found))
    assert loss == pytest.approx(0.7 * sums["ce"][0] / sums["ce"][1] + 0.3 * sum(found) / len(found), rel=1e-4)


def by_event(oracle, events, along, teacher, student, begun, said, q):
    """The distance of the masses of events: tokens of both sides are told apart by them."""
    event, tokens = events.student_V.tolist(), [*student.bytes, *teacher.bytes]
    of_tokens = [*event, *events.teacher_U.tolist()]
    roles = {t: len(student.bytes) + t for t, text in enumerate(teacher.bytes) if text is None}
    by_token = oracle.prefix_target(along, teacher.bytes, tokens, roles, begun=begun, said=said)
    if not begun and len(along) == 1:  # the token itself, as both would cut it
        by_token = [0.0] * len(student.bytes) + along[0] + [0.0]
    masses, own = [0.0] * events.count, [0.0] * events.count
    for mass, one in zip(by_token, of_tokens, strict=False):
        masses[one] += mass
    for mass, one in zip(q, event, strict=True):
        own[one] += mass
    return oracle.compare_masses(own, [*masses, by_token[-1]], "js")


def test_events_are_those_of_overlap_kd_where_both_begin_together(tiny, rows):
    by_bytes, plain = (Setup(tiny["student"], tiny["teacher"], method=method) for method in ("bpm", "overlap_kd"))
    samples, others = by_bytes.samples(rows), plain.samples(rows)
    for sample, other in zip(samples, others, strict=True):
        columns = ("aligned_student", "aligned_teacher", "aligned_offset", "aligned_more")
        rows = [row for row in zip(*(sample[name] for name in columns), strict=True) if row[2:] == (0, 0)]
        sample |= dict(zip(columns, map(list, zip(*rows, strict=True)), strict=True))
        other |= {name: sample[name] for name in columns[:2]}
    close(by_bytes.run([padded(by_bytes, samples)]), plain.run([padded(plain, others)]))


def test_white_space_is_masked_as_published(tiny, rows):
    setups = {
        masked: Setup(
            tiny["student"],
            tiny["teacher"],
            method="bpm",
            shared="ids",
            **({} if masked else {"bpm": {"mask_whitespace": False}}),
        )
        for masked in (True, False)
    }
    counts = {}
    for masked, setup in setups.items():
        samples = setup.samples(rows)
        _, sums, _ = setup.run([padded(setup, samples)])
        gold = [sample["input_ids"][i] for sample in samples for i in sample["aligned_student"] if i]
        white = [token for token in gold if (setup.pair.student.bytes[token] or b"x").isspace()]
        counts[masked] = sums["kd"][1]
        assert white and sums["kd"][1] == len(gold) - (len(white) if masked else 0)
        assert sums["ce"][1] >= len(gold)
    assert counts[True] < counts[False]


@pytest.mark.parametrize("shared", ["ids", "events"])
def test_a_student_that_is_its_teacher_is_left_alone(tiny, rows, shared):
    setup = Setup(tiny["sibling"], tiny["sibling"], method="bpm", shared=shared)
    assert setup.pair.identity
    _, sums, _ = setup.run([padded(setup, setup.samples(rows))])
    assert sums["kd"][1] > 0 and abs(sums["kd"][0]) / sums["kd"][1] < 1e-5


# -- a new method ---------------------------------------------------------------------------------------------------


@pytest.fixture
def toy():
    @register
    class Nearness(Method):
        """Squared distance of the two probabilities of the token that comes first in both vocabularies."""

        name = "nearness"
        ignores = ("divergence", "projector")

        def compare(self, parts):
            def distance(*, student_NV, teacher_NV):
                return (student_NV.softmax(-1)[:, 0] - teacher_NV.softmax(-1)[:, 0]) ** 2

            return distance

    yield "nearness"
    del METHODS["nearness", None]


def test_a_new_method_is_one_class(toy, tiny, rows):
    """It is a value of the setting, refuses what it ignores, and trains; nothing else was told of it."""
    with pytest.raises(ValueError, match=r"got divergence which method: nearness ignores"):
        parse_settings({"teacher": {"model": "t"}, "method": toy, "divergence": {"kind": "js"}})
    with pytest.raises(ValueError, match=r"method: expected .*'dskd' or 'nearness', got 'nearnes'. Did you mean 'near"):
        parse_settings({"teacher": {"model": "t"}, "method": "nearnes"})
    setup = Setup(tiny["student"], tiny["teacher"], method=toy, kd_ratio=1.0, unpaired="share")
    loss, sums, gradients = setup.run([padded(setup, setup.samples(rows))])
    assert loss == pytest.approx(sums["kd"][0] / sums["kd"][1]) and loss > 0
    assert sums["kd"][1] > 0 and sums["ce"][1] == 0
    assert any(gradient.abs().max() > 0 for gradient in gradients.values())


def test_another_backend_is_one_class(tiny, rows):
    """It takes the place of the reference in every product with a vocabulary; nothing else was told of it."""
    calls = []

    class Counted:
        def __init__(self, inner):
            self.inner = inner

        def __getattr__(self, name):
            calls.append(name)
            return getattr(self.inner, name)

    settings = {"spaces": "both", "agreement_mask": True, "span_weight": 1.0}
    setup = Setup(tiny["student"], tiny["teacher"], **settings)
    expected = setup.run([padded(setup, setup.samples(rows))])
    other = Setup(tiny["student"], tiny["teacher"], backend=Counted(TorchBlocks(700)), **settings)
    close(other.run([padded(other, other.samples(rows))]), expected)
    assert set(calls) == {"argmax", "agreement", "token_log_probs", "paired_loss"}


# Settings -> whether the fused backend has kernels for them.
FUSES = [
    ({"method": "sft"}, True),
    ({"method": "kd"}, True),
    ({"method": "kd", "divergence": {"kind": "adaptive_kl"}}, False),
    ({"method": "overlap_kd"}, True),
    ({"method": "overlap_kd", "shared": "ids"}, True),
    ({"method": "overlap_kd", "shared": "ids", "support": 8}, False),
    ({"method": "mined"}, True),
    ({"method": "uld"}, False),
    ({"method": "bpm"}, False),
    ({"method": "span_kd"}, False),
    ({"method": "alm"}, False),
    ({"method": "xtoken"}, False),
    ({}, True),
    ({"divergence": {"kind": "js"}, "projector": {"labels": "hard"}}, True),
    ({"divergence": {"kind": "adaptive_kl"}}, False),
    ({"target": "projected", "spaces": "both"}, True),
    ({"spaces": "teacher"}, True),
    ({"alignment": "cma"}, True),
]


@pytest.mark.parametrize(("settings", "fuses"), FUSES, ids=str)
def test_settings_know_what_the_kernels_have(tiny, rows, settings, fuses, monkeypatch):
    class KernelRan(Exception):
        pass

    def kernel(*_, **__):
        raise KernelRan

    for name in ("event_masses", "cross_entropy_of", "compare"):
        monkeypatch.setattr(launch, name, kernel)
    teacher = tiny["sibling" if settings.get("method") == "kd" else "teacher"]
    setup = Setup(tiny["student"], teacher, backend=FusedBlocks(3000), **settings)
    batch = padded(setup, setup.samples(rows[:2]))
    if fuses:
        with pytest.raises(KernelRan):
            setup.run([batch])
        parse_settings({"teacher": {"model": "t"}, **settings, "impl": "fused"})
    else:
        setup.run([batch])
        with pytest.raises(ValueError, match=r"dskd.impl"):
            parse_settings({"teacher": {"model": "t"}, **settings, "impl": "fused"})


def test_impl_chooses_by_device_and_method():
    def chosen(impl, device, **block):
        settings = parse_settings({"teacher": {"model": "t"}, "impl": impl, **block})
        return backend_of(settings, torch.device(device))

    assert chosen("blocks", "cuda") is None
    assert isinstance(chosen("auto", "cuda"), FusedBlocks)
    assert isinstance(chosen("fused", "cuda"), FusedBlocks)
    assert chosen("auto", "cuda", method="uld") is None
    assert chosen("auto", "cpu") is None
    with pytest.raises(ValueError, match=r"dskd.impl: expected 'blocks' or 'auto' without .* a student on cpu. Set"):
        chosen("fused", "cpu")
