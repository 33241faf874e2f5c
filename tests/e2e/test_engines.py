"""Two ranks under the real engines: the same curve as one process, and a student that loads everywhere."""

import pytest

pytestmark = pytest.mark.e2e

PACKED = {
    "sample_packing": True,
    "eval_sample_packing": True,
    "sequence_len": 128,
    "micro_batch_size": 1,
    "val_set_size": 0.25,
    "eval_steps": 2,
}


ENGINES = ["ddp", "zero2", "zero3", "fsdp2"]


@pytest.fixture(scope="module")
def one_process():
    """The curve of one process, computed once."""
    return {}


@pytest.mark.xdist_group("two ranks")
@pytest.mark.parametrize("engine", ENGINES)
def test_two_ranks_train_as_one_process(train, tmp_path, engine, options, one_process):
    if not one_process:
        one_process["curve"] = train("single", micro_batch_size=2, gradient_accumulation_steps=2).curve()
    # torchrun once for what shards and once for what does not: the other engines start in forks.
    fresh = engine in ("ddp", "zero3")
    run = train(engine, ranks=2, fresh=fresh, gradient_accumulation_steps=1, **options(engine, tmp_path))
    assert run.curve() == [pytest.approx(step, rel=2e-5) for step in one_process["curve"]]
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    for folder in (run.out, run.out / "checkpoint-4"):
        if (folder / "model.safetensors").exists():
            _, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
            assert not info["missing_keys"] and not info["unexpected_keys"]
        assert load_file(folder / "dskd/projectors.safetensors")["t2s.linear.weight"].shape == (32, 48)
    assert (run.out / "model.safetensors").is_file()


@pytest.mark.parametrize("engine", ["zero3"])
def test_weights_that_rest_on_the_whole_step_are_those_of_one_process(train, tmp_path, engine, options):
    """Rows without a partner on either rank, and the ratio of the two parts over both; a projector that every rank
    fits for itself is the same one.
    """
    weights = {"kd_weight": "balanced", "unpaired": "ce", "projector": {"init": "fitted"}}
    names = ("loss", "grad_norm", "dskd/ce", "dskd/kd", "dskd/kd_scale", "dskd/ce_unpaired")
    alone = train("single", dskd=weights, micro_batch_size=2, gradient_accumulation_steps=2).curve(*names)
    run = train(engine, ranks=2, dskd=weights, gradient_accumulation_steps=1, **options(engine, tmp_path))
    assert run.curve(*names) == [pytest.approx(step, rel=2e-5) for step in alone]
    assert alone[0][4] == 1 != alone[1][4] and all(step[5] > 0 for step in alone)
    assert run.output.count("dskd: projector fitted on") == 1


@pytest.mark.parametrize("engine", ["zero3", pytest.param("fsdp2", marks=pytest.mark.more)])
def test_packed_lora_with_one_tokenizer_on_sharded_engines(train, tiny, tmp_path, engine, options, lora):
    run = train(
        ranks=2,
        gradient_accumulation_steps=2,
        dskd={"teacher": {"model": tiny["sibling"], "dtype": "float32"}},
        **PACKED,
        **lora,
        **options(engine, tmp_path),
    )
    from safetensors.torch import load_file

    names = list(load_file(run.out / "adapter_model.safetensors"))
    assert names and all("lora_" in name for name in names)
    steps = [entry for entry in run.log if "loss" in entry]
    assert all(entry["dskd/align_ratio"] == 1 for entry in steps)
    assert any("eval_dskd/ce" in entry for entry in run.log)
    for entry in steps:
        assert entry["loss"] == pytest.approx(0.5 * entry["dskd/ce"] + 0.5 * run.kd_of(entry), rel=1e-5)


def resumed(train, run_axolotl, recipe, name, **changes):
    """A run killed with kill -9 after a checkpoint and started again, beside one that was left alone."""
    changes = {"max_steps": 30, "save_steps": 5, "gradient_accumulation_steps": 1, **changes}
    ranks = changes.pop("ranks", 1)
    whole = train(f"{name}-whole", ranks=ranks, **changes)
    cut = {**recipe, **changes, "output_dir": str(whole.out.parent / name)}
    killed = run_axolotl(cut, ranks=ranks, kill_after=f"{cut['output_dir']}/checkpoint-10/trainer_state.json")
    assert killed.code != 0
    assert not (killed.out / "dskd_state.json").exists(), "the run was not cut"
    assert (killed.out / "PARTIAL.txt").is_file()
    again = run_axolotl({**cut, "auto_resume_from_checkpoints": True}, ranks=ranks)
    assert again.code == 0, again.output[-3000:]
    assert not (again.out / "PARTIAL.txt").exists()
    return whole, again


@pytest.mark.parametrize("engine", ["one process", "zero3", pytest.param("fsdp2", marks=pytest.mark.more)])
def test_killed_run_resumes_the_same_curve(train, run_axolotl, recipe, tmp_path, engine, options):
    changes = {} if engine == "one process" else {"ranks": 2, **options(engine, tmp_path)}
    changes["learning_rate"] = 5e-3  # so that the student soon leads and the guard acts
    whole, again = resumed(train, run_axolotl, recipe, "cut", **changes)
    assert len(again.curve()) == 30
    assert again.curve("dskd/teacher_lead") == whole.curve("dskd/teacher_lead")
    assert again.curve() == whole.curve()  # bit for bit
    assert {step for (step,) in whole.curve("dskd/guarded")} == {0, 1}
    assert "so the gold answers teach alone" in whole.output
    from safetensors.torch import load_file

    for file in ("model.safetensors", "dskd/projectors.safetensors"):
        ours, theirs = load_file(again.out / file), load_file(whole.out / file)
        assert ours.keys() == theirs.keys()
        assert all((ours[key] == theirs[key]).all() for key in ours)


def test_lora_resumes_the_same_curve(train, lora):
    # Axolotl draws LoRA's start without a seed, so the resumed run starts from the other's checkpoint.
    changes = {**lora, "max_steps": 20, "save_steps": 5}
    whole = train("whole", **changes)
    again = train("again", resume_from_checkpoint=str(whole.out / "checkpoint-10"), **changes)
    assert again.curve()[10:] == whole.curve()[10:]


def test_resume_tells_what_changed_and_refuses_another_pair_and_half_a_checkpoint(train, run_axolotl, recipe, tiny):
    run = train(max_steps=2)
    checkpoint = run.out / "checkpoint-2"
    other = {
        **recipe,
        "output_dir": f"{run.out}-other",
        "max_steps": 4,
        "resume_from_checkpoint": str(checkpoint),
    }
    warmer = run_axolotl({**other, "dskd": {**recipe["dskd"], "temperature": 2.0}})
    assert warmer.code == 0
    assert "goes on with other settings than it was trained with: dskd.temperature 1.0 -> 2.0." in warmer.output
    sibling = {"teacher": {"model": tiny["sibling"], "dtype": "float32"}}
    refused = run_axolotl({**other, "dskd": sibling})
    assert refused.code != 0
    assert "dskd_state.json: expected the projectors of this pair, got those of another: teacher" in refused.output
    (checkpoint / "trainer_state.json").unlink()
    refused = run_axolotl(other)
    assert refused.code != 0
    assert "expected a finished checkpoint" in refused.output
