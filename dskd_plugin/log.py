"""The log of a run. It is Axolotl's, found by its name: what starts with ``axolotl`` is shown from INFO on.

Standard library only, so that nothing outside ``host`` needs Axolotl to say something.
"""

import logging
import os


def _on_first_rank(record: logging.LogRecord) -> bool:
    """All ranks would say the same."""
    return int(os.environ.get("RANK", "0")) == 0


LOG = logging.getLogger("axolotl.dskd")
LOG.setLevel(logging.DEBUG)  # else the root's WARNING holds; the handlers choose
LOG.addFilter(_on_first_rank)
