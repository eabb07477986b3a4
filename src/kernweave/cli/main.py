# SPDX-License-Identifier: GPL-2.0-or-later
"""The front of the command line: options before the command, errors, exit status."""

from __future__ import annotations

import importlib
import os
import sys
from typing import NoReturn

import click

from kernweave.cli.output import print_error
from kernweave.errors import KernweaveError

#: command -> name of the click command in the module called like it; imported when it is used
_COMMANDS = {
    "count": "count",
    "show": "show",
    "sites": "sites",
    "list": "list_",
    "callers": "callers",
    "callees": "callees",
    "query": "query",
    "analyze": "analyze",
    "symbolize": "symbolize",
    "lab": "lab",
    "bench": "bench",
    "doctor": "doctor",
}
_LATER = ("run", "time", "trace")

_DEBUG = "--debug"
_EPILOG = """\b
Examples:
  kernweave count vfs_read -- dd if=/dev/zero of=/dev/null count=1000
  kernweave count 'vfs_read@blocks' --json -- true
  kernweave lab up
  kernweave doctor
"""


class _Commands(click.Group):
    """Imports a command only when it is used, and knows those to come."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in _LATER:
            raise click.UsageError(f"{cmd_name} is not there yet")
        if cmd_name not in _COMMANDS:
            return None
        module = importlib.import_module(f"kernweave.cli.{cmd_name}")
        command = getattr(module, _COMMANDS[cmd_name])
        assert isinstance(command, click.Command)
        return command


@click.group(
    cls=_Commands, epilog=_EPILOG, context_settings={"help_option_names": ["-h", "--help"]}
)
@click.option(
    "--target",
    metavar="TARGET",
    envvar="KERNWEAVE_TARGET",
    default="lab",
    show_default=True,
    help="lab, lab:NAME; the real machine (local) only when named.",
)
@click.option("--debug", is_flag=True, help="Show a traceback for every error.")
@click.version_option(package_name="kernweave")
@click.pass_context
def kernweave(ctx: click.Context, target: str, debug: bool) -> None:
    """Count any instruction of a running Linux kernel. No rebuild, no reboot."""
    ctx.obj = {"target": target, "command": ctx.obj}


def split_command(argv: list[str]) -> tuple[list[str], list[str] | None]:
    """Split argv at the first `--`: kernweave's own words, and the command or None."""
    if "--" not in argv:
        return argv, None
    at = argv.index("--")
    return argv[:at], argv[at + 1 :]


def run() -> NoReturn:
    """Parse, run, and turn every error into one message and an exit status."""
    own, command = split_command(sys.argv[1:])
    own = [word for word in own if word != _DEBUG]  # accepted anywhere
    status = 0
    failed = 125 if command is not None else None
    try:
        result = kernweave.main(own, standalone_mode=False, prog_name="kernweave", obj=command)
        status = result if isinstance(result, int) else 0
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        status = 2
    except click.ClickException as error:
        print_error(error.format_message().rstrip("."), help=_usage_help(error))
        status = failed or 2
    except KernweaveError as error:
        _maybe_raise()
        print_error(error.message, error.notes, error.help)
        status = failed or error.exit_code
    except (click.Abort, KeyboardInterrupt):
        print_error("interrupted")
        status = 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = failed or 1
    except Exception as error:  # a bug must end in one message too
        _maybe_raise()
        print_error(
            f"bug in kernweave: {type(error).__name__}: {error}",
            help="run it again with --debug and report what it prints",
        )
        status = failed or 4
    sys.exit(status)


def _maybe_raise() -> None:
    if _DEBUG in split_command(sys.argv[1:])[0]:
        raise


def _usage_help(error: click.ClickException) -> str | None:
    context = getattr(error, "ctx", None)
    return f"{context.command_path} --help" if context else "kernweave --help"
