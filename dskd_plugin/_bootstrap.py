"""Lets an unmodified Axolotl load this plugin by its bare name: ``plugins: [dskd]``.

``dskd_plugin.pth`` runs this at interpreter start. It does nothing but wait for two Axolotl modules to be
imported, then wraps one function in each; and before the first of Axolotl's commands is imported, it has the recipe
looked at, so that a mistake in it is told at once. Without Axolotl it never does anything.
"""

import os
import sys

TYPE_CHECKING = False  # every interpreter would load typing, and __future__ for names without quotes
if TYPE_CHECKING:
    from typing import Any

NAME, TARGET = "dskd", "dskd_plugin.DSKDPlugin"


def _wrap_load_plugin(module: "Any") -> None:
    from dskd_plugin import last_words

    last_words.follow()
    original = module.load_plugin

    def load_plugin(plugin_name: str, *args: object, **kwargs: object) -> object:
        return original(TARGET if plugin_name == NAME else plugin_name, *args, **kwargs)

    module.load_plugin = load_plugin


def _wrap_validate_config(module: "Any") -> None:
    original = module.validate_config

    def validate_config(cfg: "Any", *args: "Any", **kwargs: "Any") -> "Any":
        from dskd_plugin.preflight import check_listed

        check_listed(cfg)
        return original(cfg, *args, **kwargs)

    module.validate_config = validate_config


WRAPPERS = {
    "axolotl.integrations.base": _wrap_load_plugin,
    "axolotl.utils.config": _wrap_validate_config,
}


# The command itself, and what a launcher starts.
COMMANDS = {f"axolotl.cli.{name}" for name in ("main", "train", "preprocess", "evaluate")}


def _look_at_recipe(command: str) -> None:
    try:
        from dskd_plugin import last_words, preflight

        if last_words.helps():
            return  # multiprocessing imports the command once more in each of its workers
        mistakes = preflight.mistakes_of(command, sys.argv, sys.orig_argv)
    except Exception:
        return  # what is wrong with the installation is told when the plugin is loaded
    if mistakes is not None:
        sys.stderr.write(f"\n{mistakes}\n")
        raise SystemExit(1)
    if command == "axolotl.cli.main":
        last_words.listen()


class _Finder:
    """Finds nothing of its own; wraps the loader of each awaited module once."""

    def __init__(self) -> None:
        self.waiting = dict(WRAPPERS)
        self.commands = COMMANDS

    def find_spec(self, fullname: str, path: "Any" = None, target: "Any" = None) -> "Any":
        if fullname in self.commands:
            self.commands = set()
            _look_at_recipe(fullname)
            return None
        wrap = self.waiting.pop(fullname, None)
        if wrap is None:
            return None
        from importlib.util import find_spec

        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: "Any") -> None:
                execute(module)
                wrap(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def install() -> None:
    """Start waiting for Axolotl. Idempotent."""
    if not any(type(finder).__name__ == "_Finder" and type(finder).__module__ == __name__ for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
        if "DSKD_RUN" in os.environ:
            from dskd_plugin import last_words

            last_words.follow_launcher()


install()
