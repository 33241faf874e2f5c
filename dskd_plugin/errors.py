"""The error of a run that cannot work; ``ValueError`` is for the user's settings and files."""


class DSKDSetupError(RuntimeError):
    """The environment or the model cannot run the recipe."""
