"""Tests that need a GPU. DSKD_GPU_DEVICE=cpu runs them on a CPU: that tries the tests, not a GPU."""

import os

import pytest
import torch

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
