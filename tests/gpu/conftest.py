"""Tests that need a GPU. DSKD_GPU_DEVICE=cpu runs them on a CPU: that tries the tests, not a GPU."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch

# tests/core/fused_cases.py, loaded by path because test folders are not packages, for tests that import its helpers.
_CASES = Path(__file__).parents[1] / "core" / "fused_cases.py"
_SPEC = importlib.util.spec_from_file_location("fused_cases", _CASES)
assert _SPEC is not None and _SPEC.loader is not None
sys.modules["fused_cases"] = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(sys.modules["fused_cases"])

DEVICE = os.environ.get("DSKD_GPU_DEVICE", "cuda")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "gpu" in item.path.parts:
            item.add_marker(pytest.mark.gpu)
            if DEVICE.startswith("cuda") and not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="no CUDA device here"))


@pytest.fixture(scope="session")
def device() -> torch.device:
    torch.backends.cuda.matmul.allow_tf32 = False  # float32 means float32 in what follows
    return torch.device(DEVICE)
