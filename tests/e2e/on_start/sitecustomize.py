"""With this folder on PYTHONPATH, a rank that a launcher starts trains on the CPU; launchers stay as they are."""

import os
import sys
from pathlib import Path

if "LOCAL_RANK" in os.environ:
    sys.path.insert(0, str(Path(__file__).parents[1]))
    import cpu_engines

    cpu_engines.install()
