"""Start one rank of a recipe with real DDP, DeepSpeed or FSDP2 on CPU processes over gloo.

torchrun --nproc-per-node 2 cpu_engines.py recipe.yaml

The engines are the real ones; what is replaced is only the choice of device and backend, which accelerate, Axolotl and
DeepSpeed make for GPUs.
"""

import importlib
import os
import sys

os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
os.environ["DS_ACCELERATOR"] = "cpu"

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType, ParallelismConfig


def use_gloo() -> None:
    def prepare_backend(self, cpu=False, sagemaker_dp=False, backend=None):
        engine = any(os.environ.get(f"ACCELERATE_USE_{name}", "").lower() == "true" for name in ("DEEPSPEED", "FSDP"))
        return "gloo", DistributedType.MULTI_GPU if engine else DistributedType.MULTI_CPU

    PartialState._prepare_backend = prepare_backend
    build = ParallelismConfig.build_device_mesh
    ParallelismConfig.build_device_mesh = lambda self, device_type: build(self, "cpu")


def use_deepspeed_without_compiler() -> None:
    # The attribute deepspeed.comm.torch is torch itself, so the module is asked for by name.
    comm = importlib.import_module("deepspeed.comm.torch")
    comm.build_shm_op = lambda: None
    comm.TorchBackend.all_gather_into_tensor = torch.no_grad()(comm.TorchBackend.all_gather_into_tensor)


def use_cpu_device_map() -> None:
    from axolotl.loaders.model import ModelLoader

    choose = ModelLoader._set_device_map_config

    def without_device_map(self):
        choose(self)
        self.model_kwargs.pop("device_map", None)

    ModelLoader._set_device_map_config = without_device_map


def install() -> None:
    use_gloo()
    use_deepspeed_without_compiler()
    use_cpu_device_map()


def main(recipe: str) -> None:
    install()
    from axolotl.cli.train import do_cli

    do_cli(recipe)


if __name__ == "__main__":
    main(sys.argv[1])
