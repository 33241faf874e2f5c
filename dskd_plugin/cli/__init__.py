"""The command line: ``dskd generate``, ``cache`` and ``plan``.

Exit codes: 0 done, 1 failure, 2 wrong usage, 130 stopped with Ctrl-C.
"""

import sys

import click

from dskd_plugin.errors import DSKDSetupError


class _Commands(click.Group):
    """A group that prints the user's mistakes without a traceback."""

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except (ValueError, DSKDSetupError) as error:
            click.echo(f"Error: {error}", err=True)
        except OSError as error:
            # Libraries for the network raise OSErrors too, without a file.
            what = error.filename or "files or the network"
            fix = "space and permissions" if error.filename else "what it says"
            told = f"{type(error).__name__}: {error}"
            click.echo(
                f"Error: {what}: expected to read and write, got {told}. Check {fix}, then start again.", err=True
            )
        except KeyboardInterrupt:
            click.echo("Stopped.", err=True)
            sys.exit(130)
        sys.exit(1)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="dskd", prog_name="dskd")
def main() -> None:
    """Distil a teacher language model into a smaller student with Axolotl."""


from dskd_plugin.cli.cache import cache  # noqa: E402
from dskd_plugin.cli.generate import generate  # noqa: E402
from dskd_plugin.cli.plan import plan  # noqa: E402

main.add_command(cache)
main.add_command(generate)
main.add_command(plan)
