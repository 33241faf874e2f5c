"""`python -m dskd_eval.cli`."""

from dskd_eval.cli.root import main

main()
