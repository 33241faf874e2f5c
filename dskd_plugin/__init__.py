"""dskd: distil a teacher into a smaller student inside Axolotl, whatever their tokenizers are.

Every interpreter start imports this file (through ``dskd_plugin.pth``), so it imports nothing itself.
"""

__version__ = "0.1.0"
__all__ = ["DSKDPlugin"]


def __getattr__(name: str) -> object:
    if name != "DSKDPlugin":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from dskd_plugin.host.plugin import DSKDPlugin
    except ImportError as error:
        from dskd_plugin.errors import DSKDSetupError

        # Axolotl 0.19 swallows ImportError and would go on with plain fine-tuning.
        raise DSKDSetupError(
            "plugins",
            "a working installation of dskd",
            f"{type(error).__name__}: {error}",
            "Reinstall it beside Axolotl with: pip install 'dskd[train]'",
        ) from error
    return DSKDPlugin
