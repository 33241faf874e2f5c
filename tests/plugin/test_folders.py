"""Model folders: which weight files are read, and what is missing of them."""

import json

import pytest

from dskd_plugin.errors import SettingError
from dskd_plugin.folders import check_whole, loaded_weights

OTHER = "pytorch_model.bin.index.json"
CASES = {
    # what lies in the folder (an index with the files that it lists) -> what transformers reads of it
    "one file": ({"model.safetensors": None}, ["model.safetensors"]),
    "shards": (
        {"model.safetensors.index.json": ["model-1.safetensors"], "model-1.safetensors": None},
        ["model-1.safetensors"],
    ),
    "the index of another form": ({"model.safetensors": None, OTHER: ["pytorch_model-1.bin"]}, ["model.safetensors"]),
    "flax beside": ({"pytorch_model.bin": None, "flax_model.msgpack.index.json": ["x"]}, ["pytorch_model.bin"]),
}


def made(folder, files):
    for name, listed in files.items():
        (folder / name).write_text(json.dumps({"weight_map": {f"w{k}": file for k, file in enumerate(listed or ())}}))
    return folder


@pytest.mark.parametrize("case", CASES)
def test_the_weights_that_are_read_are_checked_and_no_others(tmp_path, case):
    files, expected = CASES[case]
    folder = made(tmp_path, files)
    assert loaded_weights(folder)[1] == expected
    check_whole("base_model", folder)
    (folder / expected[0]).unlink()
    with pytest.raises(SettingError, match="weight"):
        check_whole("base_model", folder)


def test_a_missing_shard_is_named(tmp_path):
    folder = made(tmp_path, {OTHER: ["a.bin", "b.bin", "c.bin"], "b.bin": None})
    with pytest.raises(SettingError, match=r"expected the 3 weight files that it lists, got no a\.bin and 1 more"):
        check_whole("base_model", folder)
