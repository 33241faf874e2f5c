"""Short trainings on the GPU: the loss falls, also under QLoRA, and sampled answers are those of the CPU."""

import pytest
import torch
from transformers import GenerationConfig

from benchmarks.shapes import METHODS, SIZES, Bench
from benchmarks.tiny import make_pair
from dskd_plugin.generation.sampling import batches_exactly, generating, left_padded


@pytest.mark.parametrize("method", list(METHODS))
def test_the_loss_falls(method, device):
    bench = Bench(SIZES["tiny"], device, torch.bfloat16)
    loss = bench.loss(method)
    optimizer = torch.optim.AdamW([weight for weight in bench.student.parameters() if weight.requires_grad], lr=3e-3)
    seen = []
    zero = bench.student.zero_grad
    bench.student.zero_grad = lambda **_: None  # a step of the bench throws gradients away
    for _ in range(12):
        seen.append(float(bench.step(loss, with_teacher=method != "sft")))
        optimizer.step()
        zero(set_to_none=True)
    assert all(value == value for value in seen) and seen[-1] < 0.9 * seen[0], seen


def test_a_qlora_student_learns(device, tmp_path):
    pytest.importorskip("bitsandbytes")
    peft = pytest.importorskip("peft")
    if device.type == "cpu":
        pytest.skip("4-bit weights are for a GPU")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    whole = Bench(SIZES["tiny"], device, torch.bfloat16)
    whole.student.save_pretrained(tmp_path)
    small = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    base = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=small, device_map={"": device})
    config = peft.LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    bench = Bench(SIZES["tiny"], device, torch.bfloat16)
    bench.student = peft.get_peft_model(base, config)
    loss = bench.loss("dskd")
    optimizer = torch.optim.AdamW([weight for weight in bench.student.parameters() if weight.requires_grad], lr=1e-2)
    zero, bench.student.zero_grad = bench.student.zero_grad, lambda **_: None
    seen = []
    for _ in range(10):
        seen.append(float(bench.step(loss)))
        optimizer.step()
        zero(set_to_none=True)
    assert seen[-1] < seen[0], seen


def test_sampled_answers_are_those_of_the_cpu(device, tmp_path):
    """Greedy, so that both must agree; a batch of prompts of several lengths, as in training."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    pair = make_pair(tmp_path, head_dim=16)
    tokenizer = AutoTokenizer.from_pretrained(pair["student"])
    prompts = [[{"role": "user", "content": text}] for text in ("red stone", "blue", "the lamp of seven rivers")]
    rows = [tokenizer.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"] for prompt in prompts]
    told = []
    for where in (torch.device("cpu"), device):
        model = AutoModelForCausalLM.from_pretrained(pair["student"], dtype=torch.float32).to(where)
        assert batches_exactly(model, len(tokenizer))
        with generating(model, seed=1, autocast=None) as generator:
            inputs = left_padded(rows, tokenizer.pad_token_id, generator.device)
            config = GenerationConfig(max_new_tokens=12, do_sample=False, pad_token_id=tokenizer.pad_token_id)
            made = generator.generate(**inputs, generation_config=config)
        told.append(made[:, inputs["input_ids"].shape[1] :].tolist())
    assert told[0] == told[1]
