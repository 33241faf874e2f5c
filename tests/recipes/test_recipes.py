"""Every recipe is what Axolotl accepts, and the two recipes of a pair make a fair comparison."""

import json
import os
import re
from pathlib import Path

import pytest
import yaml

RECIPES = Path(__file__).parents[2] / "recipes"
FILES = sorted(RECIPES.rglob("*.yaml")) + sorted(RECIPES.rglob("*.yml"))
DISTILLED = [file for file in FILES if "dskd" in yaml.safe_load(file.read_text())]
PAIRS = sorted({file.parent for file in FILES if (file.parent / "dskd.yaml").exists()})
ENGINES = sorted((RECIPES / "deepspeed").glob("*.json"))
ALLOWED = {"plugins", "dskd", "output_dir"}
# What dskd.yaml is compared with on the same rows; the quickstart's sft.yaml has the gold rows alone.
BASELINE = {"quickstart": "seqkd.yaml"}
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
GPU = {"bf16": True, "fp8": True, "tf32": True, "n_gpu": 1, "compute_capability": "sm_90"}


def name(path: Path) -> str:
    return path.relative_to(RECIPES).as_posix()


def read(file: Path) -> dict:
    """The recipe; a key that is written twice is an error, which plain YAML readers hide."""

    class Strict(yaml.SafeLoader):
        pass

    def mapping(loader, node, deep=False):
        keys = [loader.construct_object(key, deep=True) for key, _ in node.value]
        assert len(keys) == len(set(keys)), f"{name(file)}: a key occurs twice in {keys}"
        return yaml.SafeLoader.construct_mapping(loader, node, deep)

    Strict.add_constructor(
        yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, lambda loader, node: mapping(loader, node, True)
    )
    return yaml.load(file.read_text(encoding="utf-8"), Strict)


def test_the_recipes_are_found():
    found = {name(pair) for pair in PAIRS}
    assert found >= {
        "quickstart",
        "qwen2.5-7b-instruct--llama-3.2-1b-instruct",
        "mistral-7b--tinyllama-1.1b",
        "qwen1.5-1.8b--gpt2-120m",
    }
    assert len(FILES) >= 10
    assert [engine.name for engine in ENGINES] == ["zero1.json", "zero2.json", "zero3.json"]


def test_of_the_teachers_answers_only_the_last_turn_is_trained_on():
    """`dskd generate` keeps the earlier turns of a conversation, which are the data set's, and marks them."""
    entries = [(file, entry) for file in FILES for entry in read(file)["datasets"] if "answers/" in entry["path"]]
    chats = [(file, entry) for file, entry in entries if "quickstart" not in file.parts]  # its questions have one turn
    assert len(chats) >= 4
    for file, entry in chats:
        assert entry.get("message_field_training") == "training", name(file)


# -- Axolotl's own schema ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def axolotl():
    pytest.importorskip("axolotl", reason="needs an importable Axolotl")
    os.environ.setdefault("AXOLOTL_DO_NOT_TRACK", "1")
    from axolotl.integrations.base import PluginManager
    from axolotl.utils import config
    from axolotl.utils.dict import DictDefault

    def validate(recipe: dict) -> dict:
        """What `axolotl train` does with a recipe on one GPU before it looks at models and data."""
        cfg = DictDefault(recipe)
        manager = PluginManager.get_instance()
        kept = manager.plugins.copy()
        manager.plugins.clear()
        try:
            for plugin in cfg.plugins or ():
                manager.register(plugin)
            valid = config.validate_config(cfg, capabilities=GPU, env_capabilities={"torch_version": "2.9.0"})
        finally:
            manager.plugins.clear()
            manager.plugins.update(kept)
        return valid.to_dict()

    return validate


@pytest.mark.axolotl
@pytest.mark.parametrize("file", FILES, ids=name)
def test_axolotl_accepts_the_recipe_and_drops_nothing(axolotl, file):
    recipe = read(file)
    valid = axolotl(read(file))
    # Axolotl ignores keys that it does not know, wherever they stand.
    renamed = {"sdp_attention": "attn_implementation"}
    assert {renamed.get(key, key) for key in recipe} - set(valid) == set()
    for written, kept in zip(recipe["datasets"], valid["datasets"], strict=True):
        assert set(written) <= set(kept), f"unknown to Axolotl in datasets: {set(written) - set(kept)}"
        if isinstance(written["type"], dict):
            assert written["type"].items() <= kept["type"].items()


@pytest.mark.axolotl
@pytest.mark.parametrize("file", DISTILLED, ids=name)
def test_the_plugin_accepts_the_recipe(axolotl, file):
    from axolotl.utils.dict import DictDefault

    from dskd_plugin.preflight import check_recipe
    from dskd_plugin.settings import parse_settings

    recipe = read(file)
    settings = parse_settings(recipe["dskd"])
    assert settings.model_dump() == parse_settings(settings.model_dump(exclude_unset=True)).model_dump()
    check_recipe(DictDefault(recipe))
    assert axolotl(read(file))["dskd"]["teacher"]["model"] == recipe["dskd"]["teacher"]["model"]


@pytest.mark.axolotl
def test_a_wrong_recipe_would_be_noticed(axolotl):
    """The checks above can fail: one mistake of each kind is seen."""
    recipe = read(RECIPES / "qwen1.5-1.8b--gpt2-120m" / "dskd.yaml")
    assert "num_epoch" not in axolotl({**recipe, "num_epoch": 1})
    with pytest.raises(ValueError, match="micro_batch_size"):
        axolotl({**recipe, "micro_batch_size": "some"})
    with pytest.raises(ValueError, match="kd_ratio"):
        axolotl({**recipe, "dskd": {**recipe["dskd"], "kd_ratio": 1.5}})
    with pytest.raises(ValueError, match="plugins: expected 'dskd' in the list"):
        axolotl({key: value for key, value in recipe.items() if key != "plugins"})


# -- a comparison is a comparison ----------------------------------------------------------------------------


@pytest.mark.parametrize("pair", PAIRS, ids=name)
def test_the_two_recipes_of_a_pair_differ_only_where_the_comparison_does(pair):
    sft, dskd = read(pair / BASELINE.get(name(pair), "sft.yaml")), read(pair / "dskd.yaml")
    different = {key for key in {*sft, *dskd} if sft.get(key) != dskd.get(key)}
    assert different == ALLOWED
    assert dskd["plugins"] == ["dskd"]
    assert set(sft) == set(dskd) - {"plugins", "dskd"}


@pytest.mark.parametrize("file", FILES, ids=name)
def test_a_copied_recipe_keeps_one_checkpoint_and_says_why(file):
    recipe = read(file)
    if recipe.get("save_strategy") == "no" or "dskd generate" in file.read_text():  # nothing is trained
        return
    # The best checkpoint is kept beside the last one.
    assert recipe["save_total_limit"] == (2 if recipe.get("load_best_model_at_end") else 1)
    assert "heckpoint" in file.read_text(encoding="utf-8")
    # It can be resumed.
    assert not recipe.get("save_only_model")


def test_the_quickstart_gives_teacher_and_student_the_same_gold_rows():
    """And the student's search chooses on rows that no recipe trains on."""
    recipes = {file.stem: read(file) for file in sorted((RECIPES / "quickstart").glob("*.yaml"))}
    gold = recipes["teacher"]["datasets"]
    assert recipes["sft"]["datasets"] == gold
    assert recipes["seqkd"]["datasets"][:1] == recipes["dskd"]["datasets"][:1] == gold
    trained = {entry["path"] for recipe in recipes.values() for entry in recipe["datasets"]}
    chosen_on = {entry["path"] for recipe in recipes.values() for entry in recipe.get("test_datasets", ())}
    assert chosen_on == {"data/validation.jsonl"}
    assert not trained & {"data/validation.jsonl", "data/heldout.jsonl", "data/prompts_key.jsonl"}


def test_no_two_recipes_write_to_the_same_place():
    places = [
        (file.parent if name(file).startswith("quickstart") else RECIPES, read(file)["output_dir"]) for file in FILES
    ]
    assert len(set(places)) == len(places)


@pytest.mark.parametrize("file", DISTILLED, ids=name)
def test_a_base_model_has_a_template_where_conversations_need_one(file):
    recipe = read(file)
    conversations = any(entry["type"] == "chat_template" for entry in recipe["datasets"])
    teacher = recipe["dskd"]["teacher"]
    made_by_us = not HUB_ID.fullmatch(teacher["model"])
    if conversations:
        for model, template in (
            (recipe["base_model"], recipe.get("chat_template", "tokenizer_default")),
            (teacher["model"], teacher.get("chat_template", "tokenizer_default")),
        ):
            instructed = "Instruct" in model or not HUB_ID.fullmatch(model)
            assert instructed == (template == "tokenizer_default"), f"{model} with chat_template: {template}"
    trained = file.parent / "teacher.yaml"
    if trained.exists() and not name(file).startswith("quickstart"):
        # The teacher reads its data as it was trained to.
        before = read(trained)
        assert before["datasets"] == recipe["datasets"]
        assert before.get("chat_template") == (teacher.get("chat_template") if conversations else None)
        assert before["output_dir"] == (teacher["model"] if made_by_us else teacher["adapter"])
        assert before["base_model"] == teacher["model"] or made_by_us


# -- files that recipes name ---------------------------------------------------------------------------------


@pytest.mark.parametrize("file", FILES, ids=name)
def test_every_file_that_a_recipe_names_exists_or_is_made_by_another_one(file):
    recipe = read(file)
    teacher = recipe.get("dskd", {}).get("teacher", {})
    named = [recipe["base_model"], *(entry["path"] for entry in recipe["datasets"])]
    named += [teacher[key] for key in ("model", "adapter") if key in teacher]
    named += [recipe[key] for key in ("deepspeed",) if isinstance(recipe.get(key), str)]
    if name(file).startswith("quickstart"):
        return  # every path of it is made by `make quickstart`, which the end-to-end run covers
    made = {read(other)["output_dir"] for other in FILES}
    for path in named:
        # What `dskd generate` writes stands in the folder that its recipe names.
        known = path in made or str(Path(path).parent) in {place.removeprefix("./") for place in made}
        assert HUB_ID.fullmatch(path) or known or (RECIPES.parent / path).exists(), path
    for key in ("output_dir", "dataset_prepared_path"):
        assert recipe[key].startswith("./outputs/"), "what a recipe writes is ignored by git"


@pytest.mark.parametrize("document", sorted(RECIPES.rglob("*.md")), ids=name)
def test_every_recipe_that_a_document_names_exists(document):
    named = set(re.findall(r"recipes/[\w./-]+\.(?:yaml|json)", document.read_text(encoding="utf-8")))
    assert named
    for path in named:
        assert (RECIPES.parent / path).is_file(), path


@pytest.mark.axolotl
@pytest.mark.parametrize("engine", ENGINES, ids=name)
def test_deepspeed_files_are_accepted(axolotl, engine):
    """By the plugin, by Axolotl and, key by key, by DeepSpeed, whose own schema forbids unknown ZeRO keys."""
    from axolotl.utils.dict import DictDefault

    from dskd_plugin.preflight import check_recipe

    content = json.loads(engine.read_text(encoding="utf-8"))
    assert content["zero_optimization"]["stage"] == int(engine.stem[-1])
    recipe = {
        **read(RECIPES / "qwen2.5-7b-instruct--llama-3.2-1b-instruct" / "dskd.yaml"),
        "deepspeed": str(engine),
    }
    check_recipe(DictDefault(recipe))
    assert axolotl(recipe)["deepspeed"] == str(engine)
    pytest.importorskip("deepspeed", reason="needs DeepSpeed")
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    given = {key: value for key, value in content["zero_optimization"].items() if value != "auto"}
    assert DeepSpeedZeroConfig(**given).stage == int(engine.stem[-1])
    assert set(content["zero_optimization"]) <= known_names(DeepSpeedZeroConfig)


def known_names(model) -> set[str]:
    return {*model.model_fields, *(field.alias for field in model.model_fields.values() if field.alias)}
