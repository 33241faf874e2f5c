"""Where DeepSpeed and FSDP do not see ``from_pretrained``."""

import contextlib
import os
from collections.abc import Iterator


@contextlib.contextmanager
def outside_engines() -> Iterator[None]:
    """Hide DeepSpeed ZeRO-3 and FSDP from ``from_pretrained``: the teacher is never sharded."""
    import transformers.integrations.deepspeed as integration
    import transformers.modeling_utils as modeling

    hidden: list[tuple[object, str, object]] = [(integration, "_hf_deepspeed_config_weak_ref", None)]
    hidden += [
        (module, "is_deepspeed_zero3_enabled", lambda: False)
        for module in (integration, modeling)
        if hasattr(module, "is_deepspeed_zero3_enabled")
    ]
    kept = [(module, name, getattr(module, name)) for module, name, _ in hidden]
    use_fsdp = os.environ.pop("ACCELERATE_USE_FSDP", None)
    try:
        for module, name, value in hidden:
            setattr(module, name, value)
        yield
    finally:
        for module, name, value in kept:
            setattr(module, name, value)
        if use_fsdp is not None:
            os.environ["ACCELERATE_USE_FSDP"] = use_fsdp
