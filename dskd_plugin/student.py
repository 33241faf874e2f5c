"""Puts the loss inside the forward of the student's root module, so that every training engine sees it.

DDP, DeepSpeed and FSDP hook the root module's forward: outside it, parameters are missing or sharded. So a hook on the
root, registered before any engine wraps it, hands the decoder's last hidden state to the loss, a child module of the
root, and puts the result into ``output["loss"]``.
"""

from typing import Any

from torch import Tensor, nn

from dskd_plugin.losses.several import Loss
from dskd_plugin.models import causal_lm, decoder


def attach(student: nn.Module, loss: Loss) -> None:
    """Make ``loss`` a child of the student and let the student's forward return it whenever a micro-batch is set."""
    hidden: list[Tensor] = []  # the last hidden state on its way from the decoder's hook to the root's

    def keep_hidden(_module: nn.Module, _inputs: Any, output: Any) -> None:
        if loss.micro_batch is not None:
            hidden[:] = [output.last_hidden_state if hasattr(output, "last_hidden_state") else output[0]]

    def put_loss(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        if loss.micro_batch is None:
            return None
        output["loss"] = loss(hidden.pop(), output.logits)
        return output

    student.add_module("dskd", loss)
    names = {f"dskd.{name}" for name in loss.state_dict()}
    for module in {student, causal_lm(student)}:
        module._keys_to_ignore_on_save = {*(getattr(module, "_keys_to_ignore_on_save", None) or ()), *names}
    decoder(student).register_forward_hook(keep_hidden)
    student.register_forward_hook(put_loss)
