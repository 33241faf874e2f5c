"""The collators: student and teacher rows of every pair, padded, left-padded, packed and truncated."""

import copy
import dataclasses
import itertools
import random

import pytest
import torch
from accelerate.utils import send_to_device
from axolotl.utils.dict import DictDefault

from dskd_plugin.batch import KEY
from dskd_plugin.columns import COLUMNS
from dskd_plugin.host.collator import (
    PackedMaskPairCollator,
    PackedPairCollator,
    PaddedPairCollator,
    collator_class,
    pair_rows,
)

COLLATORS = {
    "padded": (PaddedPairCollator, None),
    "packed": (PackedPairCollator, 3),
    "packed-mask": (PackedMaskPairCollator, 3),
}


def sample(rng, cut=None):
    """A conversation with two responses whose tokens pair at random; ids are unique, so rows can be recognised."""
    length, teacher_length = rng.randint(8, 15), rng.randint(8, 18)
    ids = [rng.randint(3, 250) for _ in range(length)]
    labels = [token if k % 5 in (0, 2, 3) else -100 for k, token in enumerate(ids)]
    targets = sorted(rng.sample([k for k in range(length) if labels[k] != -100], 3))
    partners = sorted(rng.sample(range(teacher_length), 3))
    row = {
        "input_ids": ids[:cut],
        "attention_mask": [1] * len(ids[:cut]),
        "labels": labels[:cut],
        "position_ids": list(range(len(ids[:cut]))),
        "teacher_input_ids": [rng.randint(1000, 10**6) for _ in range(teacher_length)],
        "aligned_student": targets,
        "aligned_teacher": partners,
    }
    return row


@pytest.fixture(scope="module")
def tokenizer(build):
    return build.byte_level_tokenizer(300, 1)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", COLLATORS)
def test_rows_point_at_the_tokens_of_their_sample(tokenizer, kind, side):
    rng = random.Random(kind + side)
    cls, per_bin = COLLATORS[kind]
    samples = [sample(rng, cut) for cut in (None, None, 9, None, 6, None)]
    if per_bin is None:
        samples = [{key: value for key, value in one.items() if key != "position_ids"} for one in samples]
    features = samples if per_bin is None else [samples[k : k + per_bin] for k in range(0, 6, per_bin)]
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.padding_side = side
    batch = cls(tokenizer, pad_to_multiple_of=8)(copy.deepcopy(features))

    expected_pairs, expected_rest = [], []
    for one in samples:
        kept = {
            s: t
            for s, t in zip(one["aligned_student"], one["aligned_teacher"], strict=True)
            if 0 < s < len(one["input_ids"]) and t > 0
        }
        for position, label in enumerate(one["labels"]):
            if label == -100 or position == 0:
                continue
            before = one["input_ids"][position - 1]
            if position in kept:
                expected_pairs.append((before, label, one["teacher_input_ids"][kept[position] - 1]))
            else:
                expected_rest.append((before, label))
    own = batch[KEY]
    text = own.teacher_text
    flat, flat_teacher = batch["input_ids"].flatten(), text.ids_T
    rows, targets, partners = own.rows_R, own.targets_R, text.rows_M
    aligned = len(partners)
    found = [
        (int(flat[r]), int(y), int(flat_teacher[t]))
        for r, y, t in zip(rows[:aligned], targets[:aligned], partners, strict=True)
    ]
    assert found == expected_pairs
    assert sorted((int(flat[r]), int(y)) for r, y in zip(rows[aligned:], targets[aligned:], strict=True)) == sorted(
        expected_rest
    )
    assert text.lengths_S.tolist() == [len(one["teacher_input_ids"]) for one in samples]
    assert text.samples_B.tolist() == ([1] * 6 if per_bin is None else [per_bin] * 2)
    assert next(iter(batch)) == "input_ids"  # the host measures the batch by its first tensor


def test_first_token_of_a_packed_neighbour_is_not_predicted():
    labels = torch.tensor([[5, 6, 7, 8, 9, 10]])
    rows = {
        "input_ids": [0] * 3,
        "teacher_input_ids": [0] * 3,
        "aligned_student": [0, 1],
        "aligned_teacher": [1, 2],
    }
    out = pair_rows(labels.clamp(min=0), labels, [[(0, rows), (3, rows)]], cross_attention=False)
    assert out.rows_R.tolist() == [0, 3, 1, 4]
    assert out.targets_R.tolist() == [6, 9, 7, 10]
    assert out.teacher_text.rows_M.tolist() == [1, 4]


@pytest.mark.parametrize("kind", COLLATORS)
def test_rows_reach_into_the_tokens_of_their_own_sample(tokenizer, kind):
    """A pair whose further teacher tokens were cut off is none; where it begins goes with it."""
    rng, ids = random.Random(kind), itertools.count(1000)
    cls, per_bin = COLLATORS[kind]
    seen = 0
    for _ in range(8):
        samples = [rich_sample(rng, ids, cut=cut, paired=True, spans=False, on_policy=None) for cut in (None, 9, None)]
        expected = []
        for one in samples:
            length, theirs = len(one["input_ids"]), one["teacher_input_ids"]
            one["aligned_offset"] = [rng.randint(-1, 4) for _ in one["aligned_student"]]
            one["aligned_more"] = [rng.choice([0, 0, 1, 3]) for _ in one["aligned_student"]]
            if per_bin is None:
                one.pop("position_ids")
            columns = ("aligned_student", "aligned_teacher", "aligned_offset", "aligned_more")
            for s, t, offset, more in zip(*(one[name] for name in columns), strict=True):
                if 0 < s < length and t > 0 and t + more < len(theirs):
                    along = [(theirs[k - 1], theirs[k]) for k in range(t + 1, t + more + 1)]
                    expected.append((one["input_ids"][s], offset, theirs[t], along))
        own = cls(tokenizer, pad_to_multiple_of=8)(bins_of(samples, per_bin))[KEY]
        reach, flat = own.reach, own.teacher_text.ids_T
        along = [[] for _ in own.teacher_text.rows_M]
        for pair, row, target in zip(reach.of_Q, reach.teacher_rows_Q, reach.teacher_targets_Q, strict=True):
            along[pair].append((int(flat[row]), int(target)))
        found = zip(
            own.targets_R[: len(along)].tolist(), reach.offset_N.tolist(), reach.targets_N.tolist(), along, strict=True
        )
        assert list(found) == expected
        assert reach.targets_N.tolist() == flat[own.teacher_text.rows_M + 1].tolist()
        seen += len(reach.of_Q)
    assert seen


def test_no_pair_at_all():
    labels = torch.full((1, 4), -100)
    rows = {"input_ids": [0] * 4, "teacher_input_ids": [0], "aligned_student": [], "aligned_teacher": []}
    out = pair_rows(labels.clamp(min=0), labels, [[(0, rows)]], cross_attention=False)
    assert [len(rows) for rows in (out.rows_R, out.targets_R, out.ce_R, out.teacher_text.rows_M)] == [0, 0, 0, 0]
    assert out.spans is None and out.attention is None and out.reach is None


@pytest.mark.parametrize(
    ("cfg", "is_eval", "cls"),
    [
        ({}, False, PaddedPairCollator),
        ({"sample_packing": True, "model_config_type": "llama"}, False, PackedMaskPairCollator),
        ({"sample_packing": True, "model_config_type": "llama"}, True, PaddedPairCollator),
        (
            {"sample_packing": True, "model_config_type": "gpt2", "attn_implementation": "flash_attention_2"},
            False,
            PackedPairCollator,
        ),
        (
            {"sample_packing": True, "eval_sample_packing": True, "model_config_type": "qwen3"},
            True,
            PackedMaskPairCollator,
        ),
    ],
)
def test_collator_is_the_one_axolotl_would_extend(cfg, is_eval, cls):
    assert collator_class(DictDefault(cfg), is_eval) is cls


# -- methods, spans and answers of the student ----------------------------------------------------------------------


def rich_sample(rng, ids, *, cut, paired, spans, on_policy):
    """As `sample`, every token unique in the batch; spans may reach beyond the trained tokens and the cut."""
    row = sample(rng)
    length, teacher_length = len(row["input_ids"]), len(row["teacher_input_ids"])
    row["input_ids"] = [next(ids) for _ in range(length)]
    row["labels"] = [
        token if label != -100 else -100 for token, label in zip(row["input_ids"], row["labels"], strict=True)
    ]
    row["teacher_input_ids"] = [next(ids) for _ in range(teacher_length)]
    if not paired:
        row["aligned_student"] = [k for k, label in enumerate(row["labels"]) if label != -100]
        row["aligned_teacher"] = sorted(rng.sample(range(teacher_length), rng.randint(0, 6)))
    for key in ("input_ids", "labels", "attention_mask", "position_ids"):
        row[key] = row[key][:cut]
    if spans:
        row["spans"] = []
        for _ in range(rng.randint(0, 5)):
            (a, b), (c, d) = (sorted(rng.sample(range(size + 1), 2)) for size in (length, teacher_length))
            row["spans"] += [a, min(b, a + 2), c, d]
    if on_policy is not None:
        row["on_policy"] = on_policy
    return row


def oracle(samples, paired):
    """Every row as (sample, input id, gold id), with what it takes part in; plain loops over tokens."""
    rows, pairs, teachers, spans = {}, [], [], []
    for number, one in enumerate(samples):
        ids, theirs, mode = one["input_ids"], one["teacher_input_ids"], one.get("on_policy")
        trained = [k for k in range(1, len(ids)) if one["labels"][k] != -100]
        wanted = set(trained) if mode is not True else set()
        if mode is not False:
            ours = [k for k in one["aligned_student"] if k in trained]
            partners = [j for j in one["aligned_teacher"] if 1 <= j < len(theirs)]
            if paired:
                both = zip(one["aligned_student"], one["aligned_teacher"], strict=True)
                both = [(k, j) for k, j in both if k in trained and 1 <= j < len(theirs)]
                ours, partners = [k for k, _ in both], [j for _, j in both]
            elif not (ours and partners):
                ours, partners = [], []
            pairs += [(number, ids[k - 1], ids[k]) for k in ours]
            teachers += [(number, theirs[j - 1], theirs[j]) for j in partners]
            wanted |= set(ours)
            flat = one.get("spans", [])
            for at in range(0, len(flat), 4):
                a, b, c, d = flat[at : at + 4]
                if all(k in trained for k in range(a, b)) and all(1 <= j < len(theirs) for j in range(c, d)):
                    student = [(number, ids[k - 1], ids[k]) for k in range(a, b)]
                    spans.append((student, [(theirs[j - 1], theirs[j]) for j in range(c, d)]))
                    wanted |= set(range(a, b))
        for k in sorted(wanted):
            rows[number, ids[k - 1], ids[k]] = mode is not True
    return rows, pairs, teachers, spans


def bins_of(samples, per_bin):
    return samples if per_bin is None else [samples[k : k + per_bin] for k in range(0, len(samples), per_bin)]


@pytest.mark.parametrize("answers", [False, True])
@pytest.mark.parametrize("spans", [False, True])
@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", COLLATORS)
def test_batches_of_every_method_match_plain_loops(tokenizer, kind, side, paired, spans, answers):
    rng = random.Random(f"{kind} {side} {paired} {spans} {answers}")
    cls, per_bin = COLLATORS[kind]
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.padding_side = side
    cfg = {"sample_packing": per_bin is not None}
    cfg |= {"model_config_type": "llama"} if kind == "packed-mask" else {"attn_implementation": "flash_attention_2"}
    made = collator_class(DictDefault(cfg), False)
    assert made is cls
    collator, seen_spans = made(tokenizer, pad_to_multiple_of=8, cross_attention=not paired), 0
    for _ in range(12):
        ids = iter(rng.sample(range(1000, 9000), 400))
        samples = [
            rich_sample(
                rng,
                ids,
                cut=cut,
                paired=paired,
                spans=spans,
                on_policy=k % 2 == 1 if answers else None,
            )
            for k, cut in enumerate((None, None, 9, None, 6, None))
        ]
        if per_bin is None:
            samples = [{key: value for key, value in one.items() if key != "position_ids"} for one in samples]
        features = bins_of(samples, per_bin)
        before = copy.deepcopy(features)
        batch = collator(features)
        assert features == before
        rows, pairs, teachers, span_list = oracle(samples, paired)
        owner = {token: number for number, one in enumerate(samples) for token in one["input_ids"]}
        own = batch[KEY]
        text, attention, in_spans = own.teacher_text, own.attention, own.spans
        flat, flat_teacher = batch["input_ids"].flatten(), text.ids_T
        found = [(owner[int(y)], int(flat[r]), int(y)) for r, y in zip(own.rows_R, own.targets_R, strict=True)]
        assert found[: len(pairs)] == pairs
        assert len(set(found)) == len(found)
        assert dict(zip(found, own.ce_R.tolist(), strict=True)) == rows
        partners = text.rows_M
        assert [(int(flat_teacher[t]), int(flat_teacher[t + 1])) for t in partners] == [t[1:] for t in teachers]
        read = [one["teacher_input_ids"] for one in samples if one.get("on_policy") is not False]
        assert flat_teacher.tolist() == [token for theirs in read for token in theirs]
        assert text.lengths_S.tolist() == [len(theirs) for theirs in read]
        assert int(text.samples_B.sum()) == len(read) and text.samples_B.min() > 0
        assert (attention is None) == paired
        if not paired:
            assert attention.sample_N.tolist() == [n for n, *_ in pairs]
            assert attention.inputs_N.tolist() == [before for _, before, _ in pairs]
            assert attention.sample_M.tolist() == [n for n, *_ in teachers]
            assert attention.inputs_M.tolist() == [before for _, before, _ in teachers]
            assert attention.targets_M.tolist() == [target for *_, target in teachers]
        assert (in_spans is not None) == spans
        if spans:
            seen_spans += len(span_list)
            grouped = [([], []) for _ in span_list]
            for place, number in zip(in_spans.rows_P, in_spans.of_P, strict=True):
                grouped[number][0].append(found[place])
            for row, target, number in zip(
                in_spans.teacher_rows_Q,
                in_spans.teacher_targets_Q,
                in_spans.teacher_of_Q,
                strict=True,
            ):
                assert int(flat_teacher[row + 1]) == int(target)
                grouped[number][1].append((int(flat_teacher[row]), int(target)))
            assert grouped == span_list
        assert not {"on_policy", *COLUMNS} & set(batch) and own.samples is None
    assert bool(seen_spans) == spans


@pytest.mark.parametrize("kind", COLLATORS)
def test_samples_travel_with_the_batch_where_answers_may_be_wanted(tokenizer, kind):
    rng, ids = random.Random(0), iter(range(1000, 9000))
    cls, per_bin = COLLATORS[kind]
    samples = [rich_sample(rng, ids, cut=None, paired=True, spans=True, on_policy=None) for _ in range(6)]
    if per_bin is None:
        samples = [{key: value for key, value in one.items() if key != "position_ids"} for one in samples]
    for one in samples:
        one["teacher_prompt"] = 3
    features = bins_of(samples, per_bin)
    collator = cls(tokenizer)
    batch = collator(features)
    assert batch[KEY].samples == features and next(iter(batch)) == "input_ids"
    promptless = [{k: v for k, v in one.items() if k != "teacher_prompt"} for one in samples]
    assert collator(bins_of(promptless, per_bin))[KEY].samples is None
    again = bins_of([{**one, "on_policy": k % 2 == 1} for k, one in enumerate(samples)], per_bin)
    assert collator(again)[KEY].samples is None


def test_only_gold_rows_beside_answers_take_no_kd(tokenizer):
    rng, ids = random.Random(3), iter(range(1000, 9000))
    gold = [rich_sample(rng, ids, cut=None, paired=True, spans=True, on_policy=False) for _ in range(3)]
    gold = [{key: value for key, value in one.items() if key != "position_ids"} for one in gold]
    batch = PaddedPairCollator(tokenizer)(gold)
    own = batch[KEY]
    text = own.teacher_text
    assert len(text.lengths_S) == len(text.samples_B) == len(text.ids_T) == len(text.rows_M) == 0
    assert own.ce_R.all() and len(own.ce_R) > 0
    assert len(own.spans.rows_P) == len(own.spans.teacher_rows_Q) == 0


def test_columns_are_all_that_a_prepared_row_may_add():
    pairs = {"aligned_student", "aligned_teacher", "aligned_offset", "aligned_more"}
    assert set(COLUMNS) == {"teacher_input_ids", *pairs, "spans", "teacher_prompt"}


# -- on the way to the trainer --------------------------------------------------------------------------------------


def tensors_of(part):
    """All tensors inside a step batch, by name."""
    found = {}
    for one in dataclasses.fields(part):
        value = getattr(part, one.name)
        if isinstance(value, torch.Tensor):
            found[one.name] = value
        elif dataclasses.is_dataclass(value):
            found |= {f"{one.name}.{name}": tensor for name, tensor in tensors_of(value).items()}
    return found


def full_batch(tokenizer):
    """A batch with spans, attention and the rows of the dataset."""
    rng, ids = random.Random(5), iter(range(1000, 9000))
    samples = [rich_sample(rng, ids, cut=None, paired=False, spans=True, on_policy=None) for _ in range(4)]
    for one in samples:
        one.pop("position_ids")
        one["teacher_prompt"] = 3
    return samples, PaddedPairCollator(tokenizer, cross_attention=True)


ON_HOST = ["teacher_text.lengths_S", "teacher_text.samples_B"]


def test_every_tensor_is_moved_with_the_batch_as_accelerate_moves_it(tokenizer):
    samples, collator = full_batch(tokenizer)
    batch = collator(samples)
    moved = send_to_device(batch, "meta", non_blocking=True)
    assert moved["input_ids"].device.type == "meta"
    names = tensors_of(collator(samples)[KEY])
    assert len(names) == 17 and tensors_of(moved[KEY]).keys() == names.keys()
    # What the host alone reads stays there.
    stayed = [name for name, tensor in tensors_of(moved[KEY]).items() if tensor.device.type != "meta"]
    assert stayed == ON_HOST
    assert moved[KEY].samples == samples


def test_a_worker_process_hands_the_batch_over_whole(tokenizer):
    samples, collator = full_batch(tokenizer)
    (batch,) = torch.utils.data.DataLoader(samples, batch_size=4, collate_fn=collator, num_workers=1)
    expected = collator(samples)[KEY]
    for name, tensor in tensors_of(expected).items():
        assert torch.equal(tensors_of(batch[KEY])[name], tensor), name
    assert batch[KEY].samples == expected.samples == samples


def test_pinning_keeps_every_tensor(tokenizer, monkeypatch):
    samples, collator = full_batch(tokenizer)
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor)
    own = collator(samples)[KEY]
    assert len(tensors_of(own.pin_memory())) == len(tensors_of(own)) == len(pinned) + len(ON_HOST)
