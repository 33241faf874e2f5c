"""Sampled answers: exact sampling for every family, rows as the dataset would have made them, nothing left behind."""

import itertools
import json
import logging
import math
import random
import warnings

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from dskd_plugin.generation import rollout
from dskd_plugin.generation.answer_text import PlainReader
from dskd_plugin.generation.rollout import Rollout, pack
from dskd_plugin.generation.sampling import batches_exactly, generating, prompt_parts
from dskd_plugin.setting_blocks import OnPolicySettings
from dskd_plugin.text.align import Aligner
from dskd_plugin.text.turn_ends import end_of_turn
from dskd_plugin.text.vocabularies import token_table

IGNORE = -100
WINDOW = {"sliding_window": 6}
FAMILIES = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": WINDOW,
    "gemma2": WINDOW,
    "gemma3_text": {"layer_types": ["sliding_attention", "full_attention"], **WINDOW},
    "gpt2": {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 512},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "bloom": {"n_layer": 2, "n_head": 4},
    "falcon": {"alibi": True, "head_dim": None},
    "gpt_neox": {},
    "mamba": {"state_size": 8},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1, "expand": 2, "state_size": 8},
    "rwkv": {"attention_hidden_size": 32},
}
ALONE = {"rwkv"}


def settings(**changes):
    return OnPolicySettings(**{"fraction": 1.0, "max_new_tokens": 12, "top_k": 1, **changes})


def family_model(name, vocab):
    options = {
        "vocab_size": vocab,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "initializer_range": 0.3,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
        **FAMILIES[name],
    }
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **{key: value for key, value in options.items() if value is not None})
    return AutoModelForCausalLM.from_config(config).eval()


@torch.no_grad()
def greedy(model, prompt, limit, stops, vocab):
    """The likeliest continuation, one whole forward per token, without padding or cache."""
    ids = list(prompt)
    while len(ids) < len(prompt) + limit:
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1, :vocab]
        ids.append(int(logits.argmax()))
        if ids[-1] in stops:
            break
    return ids[len(prompt) :]


class Side:
    """A tokenizer, its table, and the rows that a dataset would make with it."""

    def __init__(self, tokenizer, template=None):
        self.tokenizer, self.template = tokenizer, template or tokenizer.chat_template
        self.table = token_table(tokenizer)
        self.end = end_of_turn(tokenizer, self.template, self.table)

    def row(self, messages):
        """Ids and the response mask: the tokens of every answer and its end of turn."""
        text = self.tokenizer.apply_chat_template(messages, chat_template=self.template, tokenize=False)
        coded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, at, inside = coded["input_ids"], 0, set()
        for message in messages:
            at = text.index(message["content"], at)
            stop = at + len(message["content"])
            if message["role"] == "assistant":
                inner = [k for k, (a, b) in enumerate(coded["offset_mapping"]) if a < stop and b > at]
                last = inner[-1] + 1 if inner else 0
                inside.update(inner, [last] if ids[last : last + 1] == [self.end] else [])
            at = stop
        return ids, [k in inside for k in range(len(ids))]


def aligner_of(student, teacher, **rules):
    return Aligner(student.table, teacher.table, student_end=student.end, teacher_end=teacher.end, **rules)


def gold_row(student, teacher, messages, rules, **extra):
    ids, response = student.row(messages)
    teacher_ids, teacher_response = teacher.row(messages)
    columns = rules.columns(ids, response, teacher_ids, teacher_response)
    columns.pop("unmatched_responses")
    return {
        "input_ids": ids,
        "labels": [token if inside else IGNORE for token, inside in zip(ids, response, strict=True)],
        "attention_mask": [1] * len(ids),
        "teacher_input_ids": teacher_ids,
        "teacher_prompt": last_run(teacher_response)[0],
        **columns,
        **extra,
    }


def last_run(response):
    places = [k for k, inside in enumerate(response) if inside]
    start = places[-1]
    while start and response[start - 1]:
        start -= 1
    return start, places[-1] + 1


def rollout_of(student, teacher, rules=None, **knobs):
    options = {
        name: knobs.pop(name) for name in ("seed", "teacher_len", "student_len", "teacher_rows") if name in knobs
    }
    return Rollout(
        settings(**knobs),
        student.tokenizer,
        teacher.tokenizer,
        rules or aligner_of(student, teacher),
        **{"seed": 5, "teacher_len": 512, **options},
    )


def scripted(vocab, script, start, positions=400):
    """A GPT-2 that says ``script`` after a prompt of ``start`` tokens: its position embedding alone decides."""
    width = max(positions, 8)
    config = GPT2Config(vocab_size=vocab, n_embd=width, n_layer=1, n_head=1, n_positions=positions, n_inner=4)
    config.tie_word_embeddings = False
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in [*model.transformer.h.parameters(), model.transformer.wte.weight, model.lm_head.weight]:
            parameter.zero_()
        model.transformer.wpe.weight.copy_(torch.eye(positions, width))
        for place, token in enumerate(script):
            model.lm_head.weight[token, start - 1 + place] = 1.0
    return model


def say(script, student, teacher, messages, *, rules=None, one=None, **knobs):
    """What the rollout makes of a student that says these tokens: its rows, the gold row and the rollout."""
    rules = one.aligner if one else rules or aligner_of(student, teacher)
    gold = gold_row(student, teacher, messages, rules)
    start = last_run([label != IGNORE for label in gold["labels"]])[0]
    model = scripted(student.table.vocab_size, script, start)
    one = one or rollout_of(student, teacher, rules, **{"max_new_tokens": len(script), **knobs})
    return answered(one, model, [gold], step=0, rank=0), gold, one


@pytest.fixture(scope="module")
def sides(tiny):
    """student (byte-level, ChatML), teacher (SentencePiece-like, [INST]), sibling (as the student)."""
    return {name: Side(AutoTokenizer.from_pretrained(tiny[name])) for name in ("student", "teacher", "sibling")}


@pytest.fixture(scope="module")
def shared(sides):
    """shared(**knobs): a rollout of two models with one tokenizer, in which every answer is aligned."""
    rules = aligner_of(sides["student"], sides["sibling"], identity=True)
    return lambda **knobs: rollout_of(sides["student"], sides["sibling"], rules, **knobs)


@pytest.fixture
def gold(sides, shared, build):
    rows = [row["messages"] for row in build.conversations(5, 21)]
    return [gold_row(sides["student"], sides["sibling"], messages, shared().aligner) for messages in rows]


@pytest.fixture
def student_model(tiny):
    return AutoModelForCausalLM.from_pretrained(tiny["student"], dtype=torch.float32)


def answered(one, model, samples, **place):
    """The rows of the answers to one group of prompts."""
    (answers,) = one.answer(model, [samples], **place)
    return answers.rows


def prompt_of(row):
    return row["input_ids"][: last_run([label != IGNORE for label in row["labels"]])[0]]


def answers(rows, gold):
    return [row["input_ids"][len(prompt_of(one)) :] for row, one in zip(rows, gold, strict=True)]


# -- sampling ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_padded_batch_says_what_each_prompt_says_alone(name, sides, shared):
    vocab = sides["student"].table.vocab_size
    model = family_model(name, vocab + 5)
    rng = random.Random(1)
    prompts = [[rng.randrange(3, vocab) for _ in range(length)] for length in (4, 17, 9, 1, 9)]
    one = shared(max_new_tokens=14)
    found = one.sample(model, prompts, 0, None)
    assert one.in_batches == (name not in ALONE)
    for prompt, ids in zip(prompts, found, strict=True):
        expected = greedy(model, prompt, 14, one.stops, vocab)
        assert ids[: len(expected)] == expected
        assert len(expected) == 14 or ids[len(expected) - 1] in one.stops


def test_leaking_padding_is_noticed(sides, shared):
    class Blind(GPT2LMHeadModel):
        def forward(self, input_ids=None, attention_mask=None, position_ids=None, **rest):
            return super().forward(input_ids=input_ids, **rest)

    vocab = sides["student"].table.vocab_size
    honest = family_model("gpt2", vocab)
    blind = Blind(honest.config).eval()
    blind.load_state_dict(honest.state_dict())
    for model, exact in ((honest, True), (blind, False)):
        with generating(model, 0, None) as generator:
            assert batches_exactly(generator, vocab) is exact
    one = shared()
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12]]
    for prompt, ids in zip(prompts, one.sample(blind, prompts, 0, None), strict=True):
        expected = greedy(honest, prompt, 12, one.stops, vocab)
        assert ids[: len(expected)] == expected


def softened(logits, temperature, top_p, top_k):
    """Probabilities in plain floats: temperature, then the k likeliest, then the smallest set of mass top_p."""
    order = sorted(range(len(logits)), key=lambda k: -logits[k])
    order = order[:top_k] if top_k else order
    weights = [math.exp((logits[k] - logits[order[0]]) / temperature) for k in order]
    kept, mass = {}, 0.0
    for k, weight in zip(order, weights, strict=True):
        kept[k] = weight / sum(weights)
        mass += kept[k]
        if mass >= top_p:
            break
    return {k: weight / sum(kept.values()) for k, weight in kept.items()}


@pytest.mark.parametrize(
    "knobs",
    [
        {"temperature": 1.0, "top_p": 1.0, "top_k": 0},
        {"temperature": 2.5, "top_p": 1.0, "top_k": 0},
        {"temperature": 0.5, "top_p": 1.0, "top_k": 0},
        {"temperature": 1.5, "top_p": 0.6, "top_k": 0},
        {"temperature": 1.5, "top_p": 1.0, "top_k": 3},
        {"temperature": 1.5, "top_p": 0.8, "top_k": 5},
    ],
)
def test_tokens_are_drawn_from_the_stated_distribution(knobs, sides, shared, student_model):
    draws, prompt = 6000, [7, 30, 41]
    vocab = sides["student"].table.vocab_size
    with torch.no_grad():
        logits = (0.3 * student_model.eval()(torch.tensor([prompt])).logits[0, -1, :vocab]).double().tolist()
        student_model.lm_head.weight.mul_(0.3)
    expected = softened(logits, **knobs)
    one = shared(max_new_tokens=1, **knobs)
    found = [ids[0] for ids in one.sample(student_model, [prompt] * draws, 3, None)]
    assert set(found) <= set(expected)
    likely = sorted(expected, key=expected.get)[-8:]
    for token in likely:
        share = expected[token]
        assert abs(found.count(token) / draws - share) < 4.5 * math.sqrt(share * (1 - share) / draws) + 1e-9
    if knobs["top_p"] == 1.0 and not knobs["top_k"]:
        assert len(set(found)) > 60


def test_ids_beyond_the_tokenizer_are_never_sampled(sides, shared):
    vocab = sides["student"].table.vocab_size
    model = scripted(vocab + 8, [vocab + 3] * 4, 3)
    one = shared(top_k=0, max_new_tokens=4)
    assert all(token < vocab for ids in one.sample(model, [[5, 6, 7]] * 20, 0, None) for token in ids)


def test_settings_of_the_model_folder_do_not_leak(tiny, shared, tmp_path, gold):
    plain = AutoModelForCausalLM.from_pretrained(tiny["student"], dtype=torch.float32)
    plain.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(
        json.dumps(
            {
                "do_sample": False,
                "top_k": 2,
                "top_p": 0.1,
                "min_p": 0.4,
                "typical_p": 0.2,
                "repetition_penalty": 9.0,
                "no_repeat_ngram_size": 1,
                "max_length": 5,
                "min_new_tokens": 11,
                "min_length": 400,
                "forced_eos_token_id": 9,
                "suppress_tokens": list(range(40, 200)),
                "begin_suppress_tokens": list(range(200, 400)),
                "bad_words_ids": [[k] for k in range(20, 40)],
                "num_beams": 3,
                "num_return_sequences": 2,
                "eos_token_id": [5, 6, 7],
                "use_cache": False,
                "max_time": 1e-9,
                "temperature": 0.1,
            }
        )
    )
    told = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert told.generation_config.repetition_penalty == 9.0
    kept = told.generation_config
    before = kept.to_dict()
    for knobs in ({"top_k": 0}, {"top_k": 0, "temperature": 0.7, "top_p": 0.9}):
        one, other = (shared(**knobs) for _ in range(2))
        rows = answered(one, plain, gold, step=1, rank=0)
        assert rows and rows == answered(other, told, gold, step=1, rank=0)
    assert told.generation_config is kept and kept.to_dict() == before


def test_same_place_same_answers_and_the_global_random_state_stays(shared, student_model, gold):
    def run(seed=5, **place):
        one = shared(top_k=0, seed=seed, max_new_tokens=20)
        return answered(one, student_model, gold, **{"step": 3, "rank": 0, **place})

    torch.manual_seed(11)
    random.seed(11)
    before = torch.get_rng_state(), random.getstate()
    first = run()
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]
    torch.manual_seed(99)
    assert run() == first
    others = [run(rank=1), run(step=4), run(seed=6)]
    for one, other in itertools.combinations([first, *others], 2):
        assert one != other


def test_parts_hold_every_prompt_once_within_the_limit(monkeypatch):
    rng = random.Random(2)
    prompts = [[1] * rng.randint(1, 60) for _ in range(40)]
    room = [rng.randint(1, 20) for _ in prompts]
    monkeypatch.setattr("dskd_plugin.generation.sampling.CACHE_TOKENS", 300)
    for together in (True, False):
        parts = list(prompt_parts(prompts, room, together))
        assert sorted(k for part in parts for k in part) == list(range(40))
        for part in parts:
            assert len(part) * (max(len(prompts[k]) for k in part) + max(room[k] for k in part)) <= 300
        assert 1 < len(parts) < 40 if together else len(parts) == 40


def test_answers_do_not_depend_on_the_parts(shared, student_model, gold, monkeypatch):
    whole = answered(shared(), student_model, gold, step=0, rank=0)
    monkeypatch.setattr("dskd_plugin.generation.sampling.CACHE_TOKENS", 1)
    assert answered(shared(), student_model, gold, step=0, rank=0) == whole


def test_groups_are_answered_together_and_each_gets_its_own(shared, student_model, gold, monkeypatch):
    knobs = {"top_k": 0, "max_new_tokens": 12}
    together = shared(**knobs)
    rows = answered(together, student_model, gold, step=3, rank=0)
    calls = []
    one = shared(**knobs)
    padded = rollout.left_padded
    monkeypatch.setattr(
        rollout, "left_padded", lambda prompts, *more: calls.append(len(prompts)) or padded(prompts, *more)
    )
    unanswerable = {**gold[0], "teacher_prompt": 0}
    found = one.answer(student_model, [gold[:2], [unanswerable], gold[2:]], step=3, rank=0)
    assert [row for answers in found for row in answers.rows] == rows and not found[1].rows
    assert [len(answers.rows) for answers in found] == [2, 0, len(gold) - 2]
    assert calls == [len(gold)]
    assert sum(answers.tokens for answers in found) == one.counts["tokens"] == together.counts["tokens"] > 0
    for answers, part in ((found[0], gold[:2]), (found[2], gold[2:])):
        said = [len(row["input_ids"]) - len(prompt_of(of)) for row, of in zip(answers.rows, part, strict=True)]
        assert answers.tokens == sum(said)


# -- a student in training -----------------------------------------------------------------------------------------


def attached(model, sides, teacher_path):
    """The student with its real loss attached, as the trainer does it."""
    from dskd_plugin.assemble import distillation_loss
    from dskd_plugin.models import output_head
    from dskd_plugin.pair import make_pair, pair_events, shared_ids
    from dskd_plugin.settings import parse_settings
    from dskd_plugin.student import attach
    from dskd_plugin.teachers.live import Teacher

    both = parse_settings({"teacher": {"model": teacher_path, "dtype": "float32"}})
    ours, theirs = sides["student"], sides["teacher"]
    pair = make_pair(ours.tokenizer, theirs.table, both)
    teacher = Teacher(
        both.teacher,
        vocab_size=pair.teacher.vocab_size,
        device=torch.device("cpu"),
        attn_implementation="sdpa",
        packed=False,
        trust_remote_code=False,
    )
    overlap = shared_ids(
        pair,
        [(ours.end, theirs.end)],
        head_rows=(len(output_head(model).weight), len(teacher.head.weight_VD)),
    )
    ids = min(pair.student.vocab_size, len(output_head(model).weight)), teacher.head.vocab_size
    events = pair_events(pair, (ours.tokenizer, theirs.tokenizer), overlap, both, [(ours.end, theirs.end)], ids)
    loss = distillation_loss(both, model, teacher, pair, overlap, events, seed=0)
    attach(model, loss)
    return loss


@pytest.mark.parametrize("lora", [False, True])
def test_student_in_training_answers_without_dropout_and_is_left_as_it_was(lora, tiny, sides, shared, gold):
    model = AutoModelForCausalLM.from_pretrained(tiny["student"], dtype=torch.float32, attention_dropout=0.5)
    if lora:
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(target_modules=["q_proj", "v_proj"], r=4, lora_dropout=0.9, task_type="CAUSAL_LM")
        model = get_peft_model(model, config)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.3)
    base = model.get_base_model() if lora else model
    loss = attached(model, sides, tiny["teacher"])
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model.enable_input_require_grads()
    base.config.use_cache = False
    model.train()
    base.model.layers[0].mlp.eval()
    training = {name: module.training for name, module in model.named_modules()}
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    one = shared(max_new_tokens=10)
    rows = answered(one, model, gold, step=0, rank=0)

    assert {name: module.training for name, module in model.named_modules()} == training
    assert not training["base_model.model.model.layers.0.mlp" if lora else "model.layers.0.mlp"]
    assert base.config.use_cache is False and base.is_gradient_checkpointing and loss.micro_batch is None
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    ids = torch.tensor([gold[0]["input_ids"]])
    model(input_ids=ids, labels=ids).loss.backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())

    model.eval()
    vocab = sides["student"].table.vocab_size
    expected = [greedy(model, prompt_of(row), 10, one.stops, vocab) for row in gold]
    said = [one.read(ids) for ids in expected]
    assert answers(rows, gold) == [answer.ids + [answer.end] * (answer.end is not None) for answer in said]


def test_weights_cast_for_the_answers_do_not_serve_the_training(shared, student_model, gold):
    one = shared()
    ids = torch.tensor([gold[0]["input_ids"]])
    student_model.train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rows = answered(one, student_model, gold, step=0, rank=0)
        student_model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in student_model.parameters())
    again = shared()
    assert answered(again, student_model, gold, step=0, rank=0, autocast=torch.bfloat16) == rows


def test_nothing_is_warned_of(shared, student_model, gold, caplog):
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("error")
        logging.getLogger("transformers").addHandler(caplog.handler)
        try:
            for knobs in ({}, {"top_k": 0, "temperature": 0.7}, {"top_p": 0.5}):
                assert answered(shared(**knobs), student_model.train(), gold, step=0, rank=0)
        finally:
            logging.getLogger("transformers").removeHandler(caplog.handler)
    assert not caplog.records


# -- which steps ---------------------------------------------------------------------------------------------------


def test_due_steps_are_drawn_once_for_all_ranks(shared):
    def draws(fraction, steps=range(4000), seed=5, epoch=0.0, start_epoch=0.0):
        one = shared(fraction=fraction, start_epoch=start_epoch, seed=seed)
        return [one.due(step, epoch) for step in steps]

    assert all(draws(1.0, range(500)))
    for fraction in (0.05, 0.3, 0.9):
        found = draws(fraction)
        assert abs(sum(found) / 4000 - fraction) < 4 * math.sqrt(fraction * (1 - fraction) / 4000)
        assert found == draws(fraction)
        assert found[1500:] == draws(fraction, range(1500, 4000)), "a resumed run draws as the first one"
        assert found != draws(fraction, seed=6)
    assert not any(draws(1.0, range(50), epoch=0.99, start_epoch=1.0))
    assert all(draws(1.0, range(50), epoch=1.0, start_epoch=1.0))


# -- rows ----------------------------------------------------------------------------------------------------------


def last_turn(gold, student, teacher, rules):
    """The gold row as it would be if only its last answer were a response, and nothing followed that answer."""
    start, stop = last_run([label != IGNORE for label in gold["labels"]])
    ids, teacher_ids = gold["input_ids"][:stop], gold["teacher_input_ids"]
    teacher_stop = len(teacher_ids) - teacher_ids[::-1].index(teacher.end)
    teacher_ids = teacher_ids[:teacher_stop]
    columns = rules.columns(
        ids,
        [k >= start for k in range(len(ids))],
        teacher_ids,
        [k >= gold["teacher_prompt"] for k in range(len(teacher_ids))],
    )
    return {
        **gold,
        "input_ids": ids,
        "labels": [IGNORE] * start + ids[start:],
        "attention_mask": [1] * stop,
        "teacher_input_ids": teacher_ids,
        "aligned_student": columns["aligned_student"],
        "aligned_teacher": columns["aligned_teacher"],
        "on_policy": True,
    }


@pytest.mark.parametrize("names", [("student", "teacher"), ("teacher", "student"), ("teacher", "teacher")])
def test_student_that_says_the_gold_answer_gives_the_gold_row(names, sides, build):
    """Whatever templates put between prompt and answer, the teacher reads an answer as it would in a dataset."""
    student, teacher = (sides[name] for name in names)
    rules = aligner_of(student, teacher)
    for row in build.conversations(12, 31):
        ids, response = student.row(row["messages"])
        start, stop = last_run(response)
        rows, gold, one = say(ids[start:stop], student, teacher, row["messages"])
        assert rows == [last_turn(gold, student, teacher, rules)]
        assert len(rows[0]["aligned_student"]) > 3
        counts = one.counts
        assert (counts["answers"], counts["tokens"], counts["cut"], counts["empty"]) == (1, stop - start, 0, 0)


TEXTS = [
    "Seven lamps.",
    "It's  12 o'clock\n\n- naïve café",
    "日本 is 你好 🙂!",
    "    def f():\n\treturn x - 1",
    "a <b> c",
]
INSTRUCT = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %}{{ 'SPACE' }}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    "teacher_name",
    [
        "smollm2",
        "mistral",
        "mistral-always",
        "mistral-never",
        "gemma-like",
        "llama-legacy",
        "byte-level-prefix",
        "neox-like",
        "unigram",
        "unigram-first",
    ],
)
def test_answer_reads_as_in_a_dataset_for_every_kind_of_teacher(teacher_name, zoo, sides):
    student = sides["student"]
    for space in ("", " ", "\\n"):
        teacher = Side(zoo(teacher_name).tokenizer, INSTRUCT.replace("SPACE", space))
        one = rollout_of(student, teacher, max_new_tokens=80)
        for text in TEXTS:
            messages = [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": text}]
            ids, response = student.row(messages)
            start, stop = last_run(response)
            rows, gold, _ = say(ids[start:stop], student, teacher, messages, one=one)
            assert rows == [last_turn(gold, student, teacher, one.aligner)], (space, text)


def test_the_teacher_never_reads_a_spelled_control_token(zoo_name, zoo):
    entry = zoo(zoo_name)
    table, reader = entry.table, PlainReader(entry.tokenizer, entry.table)
    real = {token for token in table.special if table.literal[token]} - {table.unknown}
    assert real or not table.special
    for token in sorted(real)[:6]:
        spelled = table.literal[token].decode(errors="ignore")
        ids, whole = reader.ids(f"five {spelled} lamps", [])
        assert real.isdisjoint(ids)
        read = b"".join(table.literal[i] or b"" for i in ids).decode()
        assert entry.changes or read.strip() == (f"five {spelled} lamps" if whole else "five")


def test_plain_text_is_read_the_same_way_alone_or_after_a_prompt(zoo_name, zoo):
    from dskd_plugin.text.vocabularies import encode

    entry = zoo(zoo_name)
    table, reader = entry.table, PlainReader(entry.tokenizer, entry.table)
    for prompt, text in itertools.product(["Question: who?\nAnswer:", "Say: "], TEXTS):
        before, whole = (encode(entry.tokenizer, part) for part in (prompt, prompt + text))
        ids, complete = reader.ids(text, before)
        assert complete
        if prompt[-1] != " " and whole[: len(before)] == before:
            assert ids == whole[len(before) :]
        if not entry.changes:
            assert b"".join(table.literal[i] for i in ids).strip() == text.encode().strip()


CONVERSATION = [{"role": "user", "content": "red stone"}, {"role": "assistant", "content": "blue 🙂 river"}]


def plain(side, text):
    return side.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def text_of(side, ids):
    return b"".join(side.table.literal[i] for i in ids)


@pytest.mark.parametrize("kept", range(2, 12))
def test_answer_cut_at_the_limit_is_read_as_far_as_its_characters_go(kept, sides):
    student, teacher = sides["student"], sides["teacher"]
    script = plain(student, "ab 🙂é日 stone of")[:kept]
    (row,), gold, one = say(script, student, teacher, CONVERSATION)
    assert row["input_ids"] == prompt_of(gold) + script and teacher.end not in row["teacher_input_ids"][1:]
    said = row["teacher_input_ids"][gold["teacher_prompt"] :]
    whole = text_of(student, script).decode(errors="ignore")
    assert text_of(teacher, said).decode() == " " + whole
    assert one.counts["cut"] == 1 and one.counts["empty"] == 0
    assert row["aligned_student"] and min(row["aligned_student"]) >= len(prompt_of(gold))
    for mine, yours in zip(row["aligned_student"], row["aligned_teacher"], strict=True):
        a, b = student.table.literal[row["input_ids"][mine]], teacher.table.literal[row["teacher_input_ids"][yours]]
        assert a == b


def test_answer_without_a_pair_is_counted_and_left_out(sides):
    """A first word before which the teacher alone reads a space, cut before a second one."""
    student, teacher = sides["student"], sides["teacher"]
    rows, _, one = say(plain(student, "a"), student, teacher, CONVERSATION)
    assert rows == [] and one.counts["unaligned"] == one.counts["cut"] == 1 and one.counts["empty"] == 0


def test_broken_character_ends_what_the_teacher_reads(sides):
    student, teacher = sides["student"], sides["teacher"]
    smile = plain(student, "🙂")
    script = [*plain(student, "red "), smile[0], *plain(student, "stone"), student.end]
    (row,), gold, one = say(script, student, teacher, CONVERSATION)
    assert text_of(teacher, row["teacher_input_ids"][gold["teacher_prompt"] :]) == b" red "
    assert row["input_ids"][-1] == student.end and len(row["input_ids"]) - 1 not in row["aligned_student"]
    assert one.counts["cut"] == 0


def test_control_token_in_an_answer_ends_it(sides):
    student, teacher = sides["student"], sides["teacher"]
    marker = student.tokenizer.convert_tokens_to_ids("<|im_start|>")
    said = plain(student, "blue lamp")
    (row,), gold, one = say([*said, marker, *plain(student, "user"), student.end], student, teacher, CONVERSATION)
    assert row["input_ids"] == prompt_of(gold) + said
    assert text_of(teacher, row["teacher_input_ids"][gold["teacher_prompt"] :]) == b" blue lamp"
    assert one.counts["cut"] == 1
    rows, _, one = say([marker, *said, student.end], student, teacher, CONVERSATION)
    assert rows == [] and one.counts["unaligned"] == one.counts["empty"] == one.counts["cut"] == 1


@pytest.mark.parametrize("spelled", ["</s>", "<s>", "a </s> b", "<unk>", "<|im_end|>"])
def test_spelled_control_token_stays_text(spelled, sides):
    student, teacher = sides["student"], sides["teacher"]
    script = [*plain(student, spelled), student.end]
    (row,), gold, _ = say(script, student, teacher, CONVERSATION)
    said = row["teacher_input_ids"][gold["teacher_prompt"] :]
    assert said[-1] == teacher.end and teacher.table.special.isdisjoint(said[:-1])
    assert text_of(teacher, said[:-1]).decode() == " " + spelled
    assert row["aligned_student"][-1] == len(row["input_ids"]) - 1


@pytest.mark.parametrize("trains_end", [True, False])
@pytest.mark.parametrize("white", ["\n", ""])
def test_an_end_of_sequence_behind_the_end_of_turn_is_no_answer_to_ask_for(sides, white, trains_end):
    """The prompt would hold the gold answer, and the student would be asked for what follows it."""
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|endoftext|>" + white + "' }}"
        "{% endfor %}{{ eos_token }}"
    )
    student, teacher = Side(sides["student"].tokenizer, template), sides["teacher"]
    messages = [{"role": "user", "content": "red?"}, {"role": "assistant", "content": "blue stone"}]
    gold = gold_row(student, teacher, messages, aligner_of(student, teacher))
    asked = prompt_of(gold)
    end = gold["input_ids"].index(student.end, len(asked))
    assert gold["input_ids"][-1] == student.tokenizer.eos_token_id != student.end == gold["labels"][end]
    gold["labels"][-1] = gold["input_ids"][-1]
    if not trains_end:
        gold["labels"][end] = IGNORE
    (prompt,) = rollout_of(student, teacher).prompts(gold, None)
    assert prompt.student_ids == asked and "blue" not in student.tokenizer.decode(asked)


def test_empty_answer_is_an_end_of_turn(sides):
    student, teacher = sides["student"], sides["teacher"]
    (row,), gold, one = say([student.end], student, teacher, CONVERSATION)
    assert row["input_ids"] == [*prompt_of(gold), student.end]
    assert row["teacher_input_ids"] == [*gold["teacher_input_ids"][: gold["teacher_prompt"]], teacher.end]
    assert row["aligned_student"] == [len(row["input_ids"]) - 1]
    assert row["aligned_teacher"] == [len(row["teacher_input_ids"]) - 1]
    assert one.counts["empty"] == one.counts["answers"] == one.counts["tokens"] == 1


def test_content_marker_that_both_have_is_text(build):
    student, teacher = Side(build.byte_level_tokenizer(400, 1)), Side(build.sentencepiece_tokenizer(450, 2))
    for side in (student, teacher):
        side.tokenizer.add_tokens(["<think>"])
    student.tokenizer.add_tokens(["<tool>", "\n\n"])
    student, teacher = Side(student.tokenizer), Side(teacher.tokenizer)
    marker, tool, lines = (student.tokenizer.convert_tokens_to_ids(t) for t in ("<think>", "<tool>", "\n\n"))
    script = [marker, *plain(student, "red"), lines, *plain(student, "lamp"), student.end]
    (row,), gold, _ = say(script, student, teacher, CONVERSATION)
    said = row["teacher_input_ids"][gold["teacher_prompt"] :]
    assert teacher.tokenizer.convert_tokens_to_ids("<think>") in said and said[-1] == teacher.end
    assert text_of(teacher, said[:-1]).strip() == b"<think>red\n\nlamp"
    (row,), gold, one = say([*plain(student, "red lamp"), tool, student.end], student, teacher, CONVERSATION)
    # A token that only the student has is text to the teacher.
    said = row["teacher_input_ids"][gold["teacher_prompt"] :]
    assert text_of(teacher, said) == b" red lamp<tool></s>" and one.counts["cut"] == 0
    assert row["aligned_student"][-1] == len(row["input_ids"]) - 1
    # Not where it is a control token of the teacher.
    teacher.tokenizer.add_special_tokens({"additional_special_tokens": ["<tool>"]})
    teacher = Side(teacher.tokenizer)
    (row,), gold, one = say([*plain(student, "red lamp"), tool, student.end], student, teacher, CONVERSATION)
    assert text_of(teacher, row["teacher_input_ids"][gold["teacher_prompt"] :]) == b" red lamp"
    assert one.counts["cut"] == 1


@pytest.mark.parametrize("names", [("student", "teacher"), ("student", "sibling")])
def test_no_token_beyond_the_teachers_embeddings_is_read(names, sides):
    student, teacher = (sides[name] for name in names)
    rules = aligner_of(student, teacher, identity=names[1] == "sibling")
    script = [*plain(student, "a b c d e f red stone lamp"), student.end]
    (whole,), gold, _ = say(script, student, teacher, CONVERSATION, rules=rules)
    said = whole["teacher_input_ids"][gold["teacher_prompt"] :]
    place = next(k for k in range(3, len(said)) if said[k] > max(said[:k]))
    rows = said[place]
    one = rollout_of(student, teacher, rules, teacher_rows=rows, max_new_tokens=len(script))
    (row,), *_ = say(script, student, teacher, CONVERSATION, one=one)
    cut = row["teacher_input_ids"][gold["teacher_prompt"] :]
    assert cut == said[:place]


@pytest.mark.parametrize("other_template", [False, True])
def test_one_tokenizer_shares_the_ids(other_template, sides):
    student = sides["student"]
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|endoftext|>{% endfor %}"
    teacher = Side(sides["sibling"].tokenizer, template if other_template else None)
    smile = plain(student, "🙂")
    # Not the tokens that the tokenizer would choose, and no text.
    script = [*plain(student, "r"), *plain(student, "ed"), smile[0], *plain(student, "x"), student.end]
    rules = aligner_of(student, teacher, identity=True)
    (row,), gold, _ = say(script, student, teacher, CONVERSATION, rules=rules)
    assert row["teacher_input_ids"][gold["teacher_prompt"] :] == [*script[:-1], teacher.end]
    assert (teacher.end == student.end) is not other_template
    if not other_template:
        start = len(prompt_of(gold))
        assert row["aligned_student"] == list(range(start, start + len(script)))
        assert row["aligned_teacher"] == list(range(gold["teacher_prompt"], gold["teacher_prompt"] + len(script)))


def test_end_of_sequence_ends_an_answer_too(build):
    student = build.byte_level_tokenizer(400, 1)
    student.eos_token = "<|endoftext|>"
    student, teacher = Side(student), Side(build.sentencepiece_tokenizer(450, 2))
    assert student.end != student.tokenizer.eos_token_id
    script = [*plain(student, "red lamp"), student.tokenizer.eos_token_id, *plain(student, "more")]
    (row,), _, one = say(script, student, teacher, CONVERSATION)
    assert row["input_ids"][-1] == student.tokenizer.eos_token_id and row["teacher_input_ids"][-1] == teacher.end
    assert row["aligned_student"][-1] == len(row["input_ids"]) - 1
    assert one.counts["cut"] == 0


def test_rows_have_the_keys_of_the_gold_rows(sides, shared, student_model, build):
    messages = build.conversations(1, 3)[0]["messages"]
    extra = {"position_ids": [0], "length": 1, "token_type_ids": [0]}
    for names in ([], ["position_ids"], ["length"], list(extra)):
        gold = gold_row(sides["student"], sides["sibling"], messages, shared().aligner, **{n: extra[n] for n in names})
        (row,) = answered(shared(), student_model, [gold], step=0, rank=0)
        assert set(row) == {*gold, "on_policy"} and row["on_policy"] is True
        size = len(row["input_ids"])
        assert len(row["labels"]) == len(row["attention_mask"]) == size
        assert row["labels"][: len(prompt_of(gold))] == [IGNORE] * len(prompt_of(gold))
        assert row["labels"][len(prompt_of(gold)) :] == row["input_ids"][len(prompt_of(gold)) :]
        for name, expected in (("position_ids", list(range(size))), ("length", size), ("token_type_ids", [0] * size)):
            assert row.get(name, expected) == expected


def test_spans_are_a_column_where_the_run_has_them(sides):
    student, teacher = sides["student"], sides["teacher"]
    rules = aligner_of(student, teacher, spans=True)
    messages = [CONVERSATION[0], {"role": "assistant", "content": "river straße 1234 unbread"}]
    ids, response = student.row(messages)
    start, stop = last_run(response)
    (row,), gold, _ = say(ids[start:stop], student, teacher, messages, rules=rules)
    assert row["spans"] == gold["spans"] and len(row["spans"]) % 4 == 0 and row["spans"]


# -- limits --------------------------------------------------------------------------------------------------------


def test_samples_that_cannot_be_answered_are_skipped_and_counted(sides, shared, student_model, gold):
    no_prompt = {**gold[0], "labels": list(gold[0]["input_ids"])}
    no_teacher_prompt = {**gold[0], "teacher_prompt": 0}
    cut_teacher = {**gold[0], "teacher_input_ids": gold[0]["teacher_input_ids"][: gold[0]["teacher_prompt"]]}
    no_response = {**gold[0], "labels": [IGNORE] * len(gold[0]["labels"])}
    unanswerable = [no_prompt, no_teacher_prompt, cut_teacher, no_response]
    one = shared()
    assert answered(one, student_model, unanswerable, step=0, rank=0) == []
    assert one.counts == {**dict.fromkeys(one.counts, 0), "skipped": 4}
    rows = answered(one, student_model, [no_prompt, gold[1], no_response, gold[2]], step=0, rank=0)
    assert [row["input_ids"][: len(prompt_of(g))] for row, g in zip(rows, gold[1:3], strict=True)] == [
        prompt_of(g) for g in gold[1:3]
    ]
    assert one.counts["skipped"] == 6 and one.counts["answers"] == 2 and one.counts["seconds"] > 0
    one.reset_counts()
    assert set(one.counts.values()) == {0}


def test_prompt_that_leaves_no_room_in_the_positions_is_skipped(sides, shared, gold):
    sizes = sorted({len(prompt_of(row)) for row in gold})
    limit = sizes[len(sizes) // 2]
    vocab = sides["student"].table.vocab_size
    model = scripted(vocab, [], 1, positions=limit + 8)
    one = shared(max_new_tokens=8, top_k=0)
    answered(one, model, gold, step=0, rank=0)
    assert one.counts["skipped"] == sum(len(prompt_of(row)) > limit for row in gold) > 0
    assert one.counts["answers"] == sum(len(prompt_of(row)) <= limit for row in gold) > 0


def test_answer_stays_within_the_student_row(sides, shared, student_model, gold):
    limit = sorted(len(prompt_of(row)) for row in gold)[2] + 3
    one = shared(max_new_tokens=30, student_len=limit)
    rows = answered(one, student_model, gold, step=0, rank=0)
    assert rows and all(len(row["input_ids"]) <= limit for row in rows)
    assert one.counts["skipped"] == sum(len(prompt_of(row)) >= limit for row in gold) > 0
    vocab = sides["student"].table.vocab_size
    kept = [row for row in gold if len(prompt_of(row)) < limit]
    for row, found in zip(kept, one.sample(student_model, [prompt_of(r) for r in kept], 0, None), strict=True):
        room = limit - len(prompt_of(row))
        expected = greedy(student_model.eval(), prompt_of(row), min(30, room), one.stops, vocab)
        assert found[: len(expected)] == expected and len(found) <= room


def test_teacher_row_is_cut_to_its_limit(sides):
    student, teacher = sides["student"], sides["teacher"]
    script = [*plain(student, "red stone of the river bread lamp"), student.end]
    (whole,), gold, _ = say(script, student, teacher, CONVERSATION)
    limit = gold["teacher_prompt"] + 3
    assert len(whole["teacher_input_ids"]) > limit
    (row,), _, _ = say(script, student, teacher, CONVERSATION, teacher_len=limit)
    assert row["teacher_input_ids"] == whole["teacher_input_ids"][:limit]
    assert row["input_ids"] == whole["input_ids"]
    assert 0 < len(row["aligned_teacher"]) < len(whole["aligned_teacher"]) and max(row["aligned_teacher"]) < limit


def test_some_answers_are_logged(sides, shared, student_model, gold, caplog):
    one = shared(log_samples=2)
    logger = logging.getLogger("axolotl.dskd")
    logger.addHandler(caplog.handler)
    try:
        with caplog.at_level(logging.INFO, logger="axolotl.dskd"):
            rows = answered(one, student_model, gold, step=7, rank=0)
            answered(one, student_model, gold, step=8, rank=1)
    finally:
        logger.removeHandler(caplog.handler)
    lines = list(dict.fromkeys(record.getMessage() for record in caplog.records))
    assert len(lines) == 2
    for line, row, one_gold in zip(lines, rows, gold, strict=False):
        answer = [token for token in row["input_ids"][len(prompt_of(one_gold)) :] if token not in one.stops]
        said = text_of(sides["student"], answer).decode(errors="replace")
        assert "step 7" in line and repr(said) in line and "assistant\\n" in line and "\n" not in line


def test_packed_bins_keep_to_the_budget():
    rows = [{"input_ids": [0] * length} for length in (5, 9, 4, 30, 1, 6)]
    bins = pack(rows, 10)
    assert [[len(row["input_ids"]) for row in one] for one in bins] == [[5, 4, 1], [9], [30], [6]]
    assert pack([], 10) == []


# -- reasoning -----------------------------------------------------------------------------------------------------

ROLES = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
# As Qwen3 or DeepSeek: the last answer is rendered within a block that the template opens.
BLOCK = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %}"
    "{% if not m.content.startswith('<think>') %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}{{ eos_token }}"
    "{% endif %}{% endfor %}"
)
THOUGHT = "<think>\nblue stone.\n</think>\n\nThe river."


def reasoning_sides(build, student, teacher):
    """student, teacher: how each has the markers: text, added or special."""
    made = []
    for kind, tokenizer, template in (
        (student, build.byte_level_tokenizer(400, 1), ROLES),
        (teacher, build.sentencepiece_tokenizer(450, 2), BLOCK),
    ):
        if kind != "text":
            tokenizer.add_tokens(["<think>", "</think>"], special_tokens=kind == "special")
        made.append(Side(tokenizer, template))
    return made


def as_ids(side, text):
    return side.tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("teacher_has", ["text", "added", "special"])
@pytest.mark.parametrize("student_has", ["text", "added", "special"])
def test_reasoning_that_the_student_says_is_read_as_in_a_dataset(student_has, teacher_has, build):
    """Markers are text on a side that has no token for them, and that side's token where it has one."""
    student, teacher = reasoning_sides(build, student_has, teacher_has)
    messages = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": THOUGHT}]
    (row,), gold, one = say([*as_ids(student, THOUGHT), student.end], student, teacher, messages)
    assert row["input_ids"] == gold["input_ids"][: len(row["input_ids"])]
    assert row["teacher_input_ids"] == gold["teacher_input_ids"]
    assert one.counts["cut"] == 0 and one.counts["unaligned"] == 0
    said = b"".join(student.table.literal[row["input_ids"][k]] for k in row["aligned_student"])
    assert b"river" in said


@pytest.mark.parametrize("has", ["text", "special"])
def test_reasoning_that_the_students_prompt_opens_is_open_for_the_teacher(has, build):
    """The gold answers' block is opened by the student's template; the sampled answer closes it."""
    student, teacher = reasoning_sides(build, has, has)
    messages = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": THOUGHT}]
    gold = gold_row(student, teacher, messages, rules := aligner_of(student, teacher))
    # As Axolotl marks it where the template itself writes what opens the block.
    block = as_ids(student, "<think>\n")
    start = len(prompt_of(gold))
    prompt_end = start + len(block)
    gold["labels"][start:prompt_end] = [IGNORE] * len(block)
    assert gold["input_ids"][start:prompt_end] == block
    plain_answer = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "stone"}]
    gold["teacher_input_ids"], response = teacher.row(plain_answer)
    gold["teacher_prompt"] = last_run(response)[0]
    script = [*as_ids(student, "red lamp.\n</think>\n\nThere."), student.end]
    model = scripted(student.table.vocab_size, script, prompt_end)
    (row,) = answered(rollout_of(student, teacher, rules, max_new_tokens=len(script)), model, [gold], step=0, rank=0)
    read = text_of(teacher, row["teacher_input_ids"][gold["teacher_prompt"] :]).decode()
    assert read == "<think>\nred lamp.\n</think>\n\nThere.</s>"
    # The opening itself is no part of what the student said: it pairs with nothing.
    first = min(row["aligned_teacher"])
    assert b"<think>" not in b"".join(teacher.table.literal[t] for t in row["teacher_input_ids"][first:])


@pytest.mark.parametrize("has", ["text", "special"])
def test_a_block_that_only_the_teachers_prompt_opens_is_not_open(has, build):
    student, teacher = reasoning_sides(build, has, has)
    messages = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": THOUGHT}]
    gold = gold_row(student, teacher, messages, rules := aligner_of(student, teacher))
    header = gold["teacher_prompt"]
    # As Axolotl marks it where the template itself writes what opens the block.
    gold["teacher_prompt"] += len(as_ids(teacher, "<think>\n"))
    assert text_of(teacher, gold["teacher_input_ids"][header : gold["teacher_prompt"]]) == b"<think>\n"
    for said in (THOUGHT, "The river."):
        script = [*as_ids(student, said), student.end]
        model = scripted(student.table.vocab_size, script, len(prompt_of(gold)))
        (row,) = answered(
            rollout_of(student, teacher, rules, max_new_tokens=len(script)), model, [gold], step=0, rank=0
        )
        assert text_of(teacher, row["teacher_input_ids"][header:]).decode() == f"{said}</s>"
