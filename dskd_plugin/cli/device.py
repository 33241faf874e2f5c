"""The option ``--device``: auto, or a device that torch has here."""

from dskd_plugin.errors import SettingError


def device_named(name: str) -> str:
    """The name for torch; ``ValueError`` for one that it does not have here."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise SettingError(
            "--device",
            "auto or a device that torch has here",
            f"{name!r}: {str(error).splitlines()[0]}",
            "Choose another device.",
        ) from None
    return name
