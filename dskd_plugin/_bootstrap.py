"""Lets an unmodified Axolotl load this plugin by its bare name: ``plugins: [dskd]``.

``dskd_plugin.pth`` runs this at interpreter start. It does nothing but wait for two Axolotl modules to be
imported, then wraps one function in each. Without Axolotl it never does anything.
"""

import sys

NAME, TARGET = "dskd", "dskd_plugin.DSKDPlugin"


def _wrap_load_plugin(module):
    original = module.load_plugin

    def load_plugin(plugin_name, *args, **kwargs):
        return original(TARGET if plugin_name == NAME else plugin_name, *args, **kwargs)

    module.load_plugin = load_plugin


def _wrap_validate_config(module):
    original = module.validate_config

    def validate_config(cfg, *args, **kwargs):
        # Axolotl drops unknown top-level keys: without this, a `dskd:` block alone would train plain SFT.
        listed = [str(plugin).replace(":", ".").split(".")[0] for plugin in cfg.get("plugins") or ()]
        if cfg.get("dskd") is not None and not {NAME, "dskd_plugin"} & set(listed):
            raise ValueError(
                f"plugins: expected '{NAME}' in the list because the recipe has a `dskd:` block, "
                f"got {list(cfg.get('plugins') or ())}. Add `plugins: [{NAME}]`, or remove the block."
            )
        return original(cfg, *args, **kwargs)

    module.validate_config = validate_config


WRAPPERS = {
    "axolotl.integrations.base": _wrap_load_plugin,
    "axolotl.utils.config": _wrap_validate_config,
}


class _Finder:
    """Finds nothing of its own; wraps the loader of each awaited module once."""

    def __init__(self):
        self.waiting = dict(WRAPPERS)

    def find_spec(self, fullname, path=None, target=None):
        wrap = self.waiting.pop(fullname, None)
        if wrap is None:
            return None
        from importlib.util import find_spec

        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module):
                execute(module)
                wrap(module)

            spec.loader.exec_module = exec_module
        return spec


def install():
    """Start waiting for Axolotl. Idempotent."""
    if not any(type(finder).__name__ == "_Finder" and type(finder).__module__ == __name__ for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


install()
