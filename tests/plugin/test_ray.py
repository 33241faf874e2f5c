"""A worker of Ray reads the recipe a second time, as Axolotl's `ray_train_func` does: validated, with every default."""

import pytest
import torch
import yaml

pytestmark = pytest.mark.usefixtures("fresh_plugin_manager")

BLOCKS = {
    "dskd": {},
    "with another method": {"method": "overlap_kd", "temperature": 2.0, "spaces": None, "agreement_mask": None},
    "on policy": {"on_policy": {"fraction": 0.5}},
}


@pytest.mark.parametrize("name", BLOCKS)
def test_the_recipe_is_the_same_when_it_is_read_again(recipe, tmp_path, name, plugins_forgotten):
    from axolotl.cli.config import load_cfg, prepare_plugins
    from axolotl.utils.config import validate_config
    from axolotl.utils.dict import DictDefault

    from dskd_plugin.host.plugin import registered

    block = {key: value for key, value in {**recipe["dskd"], **BLOCKS[name]}.items() if value is not None}
    if name == "with another method":
        block.pop("projector")
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump({**recipe, "dskd": block, "use_ray": True}))
    driver = load_cfg(str(file))
    read = registered().run
    with plugins_forgotten():
        worker = DictDefault(driver.to_dict())
        prepare_plugins(worker)
        capabilities = {"bf16": False, "fp8": False, "tf32": False, "n_gpu": 1, "compute_capability": "cpu"}
        versions = {"torch_version": str(torch.__version__)}
        worker = validate_config(worker, capabilities=capabilities, env_capabilities=versions)
        again = registered().run
    assert again is not read and again.settings == read.settings
    assert again.teacher.template == read.teacher.template
    assert worker.dataset_prepared_path == driver.dataset_prepared_path
