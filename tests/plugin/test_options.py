"""Axolotl's options beside the plugin: what is refused, and recipes for a GPU as far as a CPU goes."""

import contextlib
import dataclasses

import pytest
import torch
import yaml

from benchmarks.shapes import METHODS, SIZES, Bench
from dskd_plugin.errors import DSKDSetupError, Mistakes, SettingError
from dskd_plugin.recipe_options import REFUSED as ADVICE
from dskd_plugin.recipe_options import UNHEEDED as NOT_HEEDED
from dskd_plugin.recipe_options import unheeded
from tests.options import CUDA, REFUSED, UNHEEDED, VERDICTS, all_options, with_verdict, written

pytestmark = pytest.mark.usefixtures("fresh_plugin_manager")

H100 = {"bf16": True, "fp8": True, "tf32": True, "n_gpu": 1, "compute_capability": "sm_90"}
# Refused as well, and no options of speed or memory: other tests have them.
OTHER_RUNS = {
    *("rl", "reward_model", "process_reward_model", "pretraining_dataset", "streaming", "skip_prepare_dataset"),
    *("processor_type", "push_dataset_to_hub", "kd_trainer"),
}


def name(option):
    return f"{option.base}: {option.name}"


@pytest.mark.parametrize("option", with_verdict(REFUSED), ids=name)
def test_refused_with_all_four_parts(recipe, tmp_path, option):
    from axolotl.cli.config import load_cfg

    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(written(recipe, option.changes)))
    with pytest.raises(Mistakes) as refused:
        load_cfg(str(file))
    (error,) = refused.value.errors
    assert isinstance(error, SettingError)
    where, expected, got, do = error.parts
    assert where in option.recipe and expected and got
    assert do.endswith(".") and do == ADVICE.get(where, do)


@pytest.mark.parametrize("option", with_verdict(CUDA), ids=name)
def test_a_recipe_for_a_gpu_is_accepted_and_the_plugin_in_place(recipe, option, monkeypatch):
    from axolotl.cli.config import prepare_plugins
    from axolotl.integrations.base import PluginManager
    from axolotl.utils.config import normalize_config, validate_config
    from axolotl.utils.dict import DictDefault

    from dskd_plugin.host.collator import collator_class
    from dskd_plugin.host.plugin import DSKDPlugin
    from dskd_plugin.host.trainer import DSKDTrainer

    if option.package == "flash_attn":  # Axolotl looks for it; nothing here calls it
        pytest.importorskip("flash_attn")
    cfg = DictDefault(written(recipe, option.changes))
    prepare_plugins(cfg)
    cfg = validate_config(cfg, capabilities=H100, env_capabilities={"torch_version": str(torch.__version__)})
    normalize_config(cfg)
    manager = PluginManager.get_instance()
    assert issubclass(manager.get_trainer_cls(cfg), DSKDTrainer)
    (plugin,) = (one for one in manager.plugins.values() if isinstance(one, DSKDPlugin))
    made, _ = plugin.get_collator_cls_and_kwargs(cfg)
    assert made is collator_class(cfg, False)


def test_every_refused_or_unheeded_key_has_a_line():
    in_rows = {key for option in all_options() for key in option.recipe}
    assert set(ADVICE) - OTHER_RUNS <= in_rows and set(ADVICE) >= OTHER_RUNS
    for option in all_options():
        assert (option.verdict == REFUSED) <= bool(set(option.recipe) & {*ADVICE, "lr_scheduler", "tiled_mlp"})
    unseen = set(NOT_HEEDED) - in_rows
    assert unseen == {"flash_attn_cross_entropy"}  # Axolotl has the key and reads it nowhere but in old patches
    assert {option.verdict for option in all_options()} == set(VERDICTS)


def test_no_line_is_there_twice():
    seen = [(option.name, option.base) for option in all_options()]
    assert len(seen) == len(set(seen)) > 50


def test_options_that_have_no_effect_are_found():
    cut = "axolotl.integrations.cut_cross_entropy.CutCrossEntropyPlugin"
    assert unheeded({"plugins": ["dskd"], "chunked_cross_entropy": False}) == []
    assert unheeded({"plugins": ["dskd", cut]}) == ["cut_cross_entropy"]  # on by default
    assert unheeded({"plugins": ["dskd", cut], "cut_cross_entropy": False}) == []
    for option in with_verdict(UNHEEDED):
        assert len(unheeded(option.recipe)) == 1


def test_lines_are_data():
    for option in all_options():
        assert yaml.safe_load(yaml.safe_dump(dataclasses.asdict(option)))["recipe"] == option.recipe


@pytest.mark.parametrize("method", list(METHODS))
def test_gradients_survive_saved_tensors_that_are_kept_elsewhere(method):
    """What activation offloading does to whatever autograd keeps, the loss's own tensors among them."""

    def gradients(away):
        torch.manual_seed(0)
        bench = Bench(SIZES["tiny"], torch.device("cpu"), torch.float32)
        loss = bench.loss(method)
        bench.student.zero_grad = lambda **_: None  # a step of the bench throws gradients away
        if away:
            kept = torch.autograd.graph.saved_tensors_hooks(lambda saved: saved.clone().numpy(), torch.from_numpy)
        else:
            kept = contextlib.nullcontext()
        with kept:
            bench.step(loss, with_teacher=method != "sft")
        return {name: weight.grad for name, weight in bench.student.named_parameters() if weight.grad is not None}

    found, truth = gradients(away=True), gradients(away=False)
    assert found.keys() == truth.keys() and found
    for key in truth:
        torch.testing.assert_close(found[key], truth[key], rtol=1e-6, atol=1e-9)


def test_an_optimizer_without_the_projectors_weights_is_refused():
    from dskd_plugin.host.parameter_group import give_own_group

    student, projector = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    with pytest.raises(DSKDSetupError, match="got 'layerwise', which has them in 0"):
        give_own_group(torch.optim.SGD([student], lr=1.0), [projector], 0.5, "layerwise")
    optimizer = torch.optim.SGD([{"params": [student, projector], "weight_decay": 0.1}], lr=1.0)
    give_own_group(optimizer, [projector], 0.5, "sgd")
    give_own_group(optimizer, [projector], 0.5, "sgd")  # of a resumed run
    first, own = optimizer.param_groups
    assert first["params"] == [student] and own["params"] == [projector]
    assert (own["lr"], own["weight_decay"], first["lr"]) == (0.5, 0.1, 1.0)
