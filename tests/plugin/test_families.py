"""Every model family, tiny and random: its head is read right, and teacher rows do not depend on padding or packing."""

import pytest
import torch

from dskd_plugin.core.heads import head_logits
from dskd_plugin.errors import DSKDSetupError
from dskd_plugin.models import check_head, decoder, output_head, read_head
from dskd_plugin.teacher_settings import TeacherSettings
from dskd_plugin.teachers.live import Teacher

TIED = {"tie_word_embeddings": True}
FAMILIES = {
    "llama": {},
    "llama-tied": TIED,
    "mistral": {},
    "qwen2": {},
    "qwen3": {},
    "qwen3-wide": {"width": 128},
    "gemma2": {"final_logit_softcapping": 3.0, **TIED},
    "gemma3_text": TIED,
    "gpt2": {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 512, **TIED},
    "phi": {"num_key_value_heads": 4},
    "phi3": {"num_key_value_heads": 4},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "opt-projected": {"ffn_dim": 64, "word_embed_proj_dim": 16, "do_layer_norm_before": False},
    "gpt_neox": {},
    "cohere": {"logit_scale": 0.25, **TIED},
    "granite": {"logits_scaling": 4.0},
    "bloom": {"n_layer": 2, "n_head": 4, **TIED},
}


@pytest.fixture(scope="module")
def folder(build, tmp_path_factory):
    made = {}

    def make(name):
        if name not in made:
            tokenizer = build.byte_level_tokenizer(300, 1)
            path = tmp_path_factory.mktemp(name)
            # Some families keep more head rows than the tokenizer has ids.
            sizes = {"vocab_size": len(tokenizer) + 5, "initializer_range": 0.3, **FAMILIES[name]}
            made[name] = build.save_model(path, tokenizer, name.split("-")[0], **sizes), len(tokenizer)
        return made[name]

    return make


def teacher(path, vocab, packed=False, **settings):
    return Teacher(
        TeacherSettings(model=path, dtype="float32", **settings),
        vocab_size=vocab,
        device=torch.device("cpu"),
        attn_implementation="sdpa",
        packed=packed,
        trust_remote_code=False,
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_head_reads_as_the_model_does(folder, name):
    path, vocab = folder(name)
    one = teacher(path, vocab)
    ids = torch.randint(0, vocab, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = one.model(input_ids=ids, use_cache=False).logits
        hidden = decoder(one.model)(input_ids=ids, use_cache=False).last_hidden_state
    assert one.head.vocab_size == vocab < one.head.weight_VD.shape[0]
    torch.testing.assert_close(head_logits(hidden.flatten(0, 1), one.head), logits.flatten(0, 1))
    assert not any(parameter.requires_grad for parameter in one.model.parameters())
    assert not one.model.training


@pytest.mark.parametrize("name", FAMILIES)
def test_teacher_rows_are_those_of_each_sample_alone(folder, name):
    path, vocab = folder(name)
    generator = torch.Generator().manual_seed(1)
    samples = [torch.randint(0, vocab, (length,), generator=generator) for length in (7, 12, 5, 9)]
    lengths, ids = torch.tensor([len(sample) for sample in samples]), torch.cat(samples)
    rows = torch.tensor([0, 6, 7, 18, 19, 23, 24, 32])
    padded, packed = teacher(path, vocab), teacher(path, vocab, packed=True)
    with torch.no_grad():
        alone = torch.cat(
            [padded.model.get_decoder()(input_ids=s[None], use_cache=False).last_hidden_state[0] for s in samples]
        )[rows]
    for one in (padded, packed):
        found = one.rows(ids, lengths, torch.tensor([2, 2]), rows)
        torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-4)
    assert packed.rows(ids, lengths, torch.tensor([2, 2]), rows[:0]).shape == (0, packed.width)


def test_unknown_step_between_decoder_and_logits_is_refused(folder):
    path, vocab = folder("llama")
    one = teacher(path, vocab)
    hidden = torch.randn(3, one.width)
    logits = head_logits(hidden, one.head)
    check_head(hidden, logits, one.head, "base_model")
    with pytest.raises(DSKDSetupError, match="base_model: expected logits = output head"):
        check_head(hidden, logits * 1.5, one.head, "base_model")
    with pytest.raises(DSKDSetupError, match="expected weights whose logits are numbers, got NaN"):
        check_head(hidden, logits * float("nan"), one.head, "base_model")


def test_lora_on_the_head_is_part_of_the_head(folder):
    from peft import LoraConfig, get_peft_model

    path, vocab = folder("llama")
    model = get_peft_model(teacher(path, vocab).model, LoraConfig(target_modules=["lm_head"], r=2))
    head = output_head(model)
    torch.nn.init.normal_(head.lora_B["default"].weight)
    ids = torch.arange(6)[None]
    hidden = decoder(model)(input_ids=ids, use_cache=False).last_hidden_state[0]
    found = read_head(model, head, vocab)
    torch.testing.assert_close(head_logits(hidden, found), model(input_ids=ids).logits[0])
    head_logits(hidden, found).sum().backward()
    assert head.lora_B["default"].weight.grad.abs().sum() > 0


def test_adapter_of_the_teacher_is_merged(folder, tmp_path):
    from peft import LoraConfig, get_peft_model

    path, vocab = folder("llama")
    plain = teacher(path, vocab)
    model = get_peft_model(teacher(path, vocab).model, LoraConfig(target_modules=["q_proj"], r=2))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path)
    ids, lengths, rows = torch.arange(6), torch.tensor([6]), torch.arange(6)
    adapted = teacher(path, vocab, adapter=str(tmp_path)).rows(ids, lengths, torch.tensor([1]), rows)
    with torch.no_grad():
        expected = decoder(model)(input_ids=ids[None], use_cache=False).last_hidden_state[0]
    torch.testing.assert_close(adapted, expected, rtol=1e-4, atol=1e-4)
    assert (adapted - plain.rows(ids, lengths, torch.tensor([1]), rows)).abs().max() > 1e-3


@pytest.mark.parametrize("name", FAMILIES)
def test_student_of_every_family_has_the_cross_entropy_of_ordinary_fine_tuning(folder, name):
    from dskd_plugin.batch import StepBatch
    from dskd_plugin.core.divergences import divergence
    from dskd_plugin.core.objective import Objective
    from dskd_plugin.core.overlap import identity
    from dskd_plugin.losses.dual_space import DualSpaceLoss
    from dskd_plugin.student import attach

    path, vocab = folder(name)
    one, student = teacher(path, vocab), teacher(path, vocab).model.requires_grad_(True)
    ids = torch.randint(1, vocab, (2, 9), generator=torch.Generator().manual_seed(2))
    labels = torch.where(torch.arange(9) > 3, ids, -100).expand(2, 9)
    expected = student(input_ids=ids, labels=labels).loss
    expected.backward()
    gradients = {key: p.grad.clone() for key, p in student.named_parameters()}
    student.zero_grad()
    objective = Objective(
        divergence=divergence("forward_kl"),
        temperature=2.0,
        kd_ratio=1e-9,
        spaces="both",
        agreement_mask=True,
        compares="spaces",
    )
    loss = DualSpaceLoss(
        student,
        objective,
        student_vocab_size=vocab,
        teacher_head=one.head,
        overlap=identity(vocab),
        keep_unmapped=False,
        soft_labels=False,
        events=None,
        guard=False,
        projector_init="ideal",
        projector_dtype=torch.float32,
        seed=0,
    )
    attach(student, loss)
    rows = torch.tensor([row * 9 + position for row in (0, 1) for position in range(3, 8)])
    hidden = one.rows(ids.flatten(), torch.tensor([9, 9]), torch.tensor([1, 1]), rows)
    batch = StepBatch(rows, ids.flatten()[rows + 1], teacher_MD=hidden)
    batch.window = [batch]
    loss.micro_batch = batch
    found = student(input_ids=ids, use_cache=False, logits_to_keep=1)["loss"]
    found.backward()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    for key, gradient in gradients.items():
        torch.testing.assert_close(student.get_parameter(key).grad, gradient, rtol=1e-3, atol=1e-6, msg=key)
    # Student and teacher are one model: the projected teacher is the teacher.
    assert batch.sums["t2s_kd"][0] / batch.sums["t2s_kd"][1].clamp(min=1) == pytest.approx(0, abs=1e-4)
    assert batch.sums["s2t_agreement"][0] == batch.sums["s2t_agreement"][1] == len(rows)


@pytest.mark.parametrize("tied", [False, True])
def test_trained_copy_of_the_head_is_the_head(folder, tied):
    from peft import LoraConfig, get_peft_model

    path, vocab = folder("llama-tied" if tied else "llama")
    config = LoraConfig(target_modules=["q_proj"], r=2, modules_to_save=["lm_head"])
    model = get_peft_model(teacher(path, vocab).model, config)
    head = output_head(model)
    trained = next(p for key, p in model.named_parameters() if "lm_head" in key and p.requires_grad)
    torch.nn.init.normal_(trained)
    hidden = decoder(model)(input_ids=torch.arange(6)[None], use_cache=False).last_hidden_state[0]
    logits = model(input_ids=torch.arange(6)[None]).logits[0]
    found = head_logits(hidden, read_head(model, head, vocab))
    torch.testing.assert_close(found, logits)
    found.sum().backward()
    assert trained.grad is not None


@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
def test_quantized_teacher_is_close_and_keeps_its_head(folder, quantization):
    path, vocab = folder("qwen3-wide")
    ids, lengths, rows = torch.arange(12), torch.tensor([12]), torch.arange(12)
    exact = teacher(path, vocab)
    found = teacher(path, vocab, quantization=quantization)
    assert torch.equal(found.head.weight_VD, exact.head.weight_VD)
    near = found.rows(ids, lengths, torch.tensor([1]), rows)
    far = exact.rows(ids, lengths, torch.tensor([1]), rows)
    assert 0 < (near - far).norm() / far.norm() < (0.05 if quantization == "8bit" else 0.6)
