"""``python -m dskd_plugin.cli``."""

from dskd_plugin.cli import main

main(prog_name="dskd")
