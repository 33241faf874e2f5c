"""The projectors' place in the host's optimizer: a parameter group with a learning rate of its own."""

from typing import Any

from torch import nn

from dskd_plugin.errors import DSKDSetupError


def give_own_group(optimizer: Any, own: list[nn.Parameter], learning_rate: float, name: object) -> None:
    """Move ``own`` into a new group that is otherwise like the one that has them. name: the recipe's `optimizer`."""
    if not own or any(group.get("dskd") for group in optimizer.param_groups):
        return
    ids = {id(parameter) for parameter in own}
    homes = [group for group in optimizer.param_groups if ids & {id(parameter) for parameter in group["params"]}]
    if len(homes) != 1:
        raise DSKDSetupError(
            "optimizer",
            "one that has the projectors' weights in one group of parameters",
            f"{name!r}, which has them in {len(homes)}",
            "Use adamw_torch, or another optimizer that steps once after the backward pass.",
        )
    (home,) = homes
    home["params"] = [parameter for parameter in home["params"] if id(parameter) not in ids]
    optimizer.add_param_group({**home, "params": own, "lr": learning_rate, "dskd": True})
