"""The command line: one module a group of commands, and one place where errors become a line."""

from __future__ import annotations

import errno
import os
import re
import sys
import warnings
from typing import Annotated, Any, NoReturn

import typer

from derivation.cli import derived, gpu, output, planning
from derivation.cli.panels import PanelledCommand, PanelledGroup
from derivation.cli.process import alone
from derivation.errors import DerivationError, one_line, unsupported
from derivation.version import __version__

DEBUG = "DERIVATION_DEBUG"
# a full disk, a quota, a device that fails
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EIO)
MAX_MESSAGE = 1000
# The last two as a shell says of SIGINT and SIGPIPE: 128 + signal.
EXIT_USAGE, EXIT_BUG, EXIT_INTERRUPTED, EXIT_CLOSED_PIPE = 2, 70, 130, 141

# click's own class, which typer has vendored since 0.26 and re-exports only as a base of BadParameter
_ClickException: Any = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")

app = typer.Typer(
    name="derivation",
    cls=PanelledGroup,
    no_args_is_help=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
PANELS = {
    "What fits": (derived.estimate, planning.fit, planning.recommend, planning.compare),
    "The equation": (derived.export, derived.report, derived.models),
    "How it is checked": (derived.verify, gpu.validate, gpu.measure, gpu.calibrate),
}
for panel, commands in PANELS.items():
    for command in commands:
        app.command(cls=PanelledCommand, rich_help_panel=panel)(command)


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an unexpected error.")] = False,
) -> None:
    """How much GPU memory does a diffusion pipeline need? The equation, derived from its config files.

    Exit codes: 0 done, 1 a check failed or a call does not fit its GPU, 2 a request that cannot be answered.
    """
    if debug:
        os.environ[DEBUG] = "1"
    if version:
        typer.echo(__version__)
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line and exit."""
    alone(lambda: run(arguments))


def run(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code; every error that a user can cause is one line on stderr."""
    warnings.showwarning = output.warned
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the shell, as in >&-
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    given = sys.argv[1:] if arguments is None else arguments
    if given[:1] == ["help"]:
        given = [*given[1:], "--help"]
    try:
        code = app(given, prog_name="derivation", standalone_mode=False)
        sys.stdout.flush()
    except DerivationError as error:
        return _fail(str(error))
    except _ClickException as error:
        return _fail(_usage(error))
    except (typer.Abort, KeyboardInterrupt):
        return _fail("interrupted", EXIT_INTERRUPTED)
    except BrokenPipeError:
        return _abandoned(EXIT_CLOSED_PIPE)
    except SystemExit as error:  # what click and rich's console make of a BrokenPipeError
        if not isinstance(error.__context__, BrokenPipeError):
            raise
        return _abandoned(EXIT_CLOSED_PIPE)
    except Exception as error:
        if isinstance(error, OSError) and error.filename is None and error.errno in UNWRITABLE:
            return _abandoned(_fail(f"the output cannot be written ({error.strerror})"))
        if os.environ.get(DEBUG):
            raise
        return _fail(f"unexpected {type(error).__name__}: {error} (a bug; --debug shows where)", EXIT_BUG)
    return code if isinstance(code, int) else 0


def _abandoned(code: int) -> int:
    """Drop what is still to be written, so that nothing fails at exit, and return ``code``."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return code


def _usage(error: Any) -> str:
    context = getattr(error, "ctx", None)
    hint = f" (see {context.command_path} --help)" if context else ""
    if (refused := getattr(error.__cause__, "errors", None)) is not None:  # pydantic's ValidationError
        first = refused()[0]
        wanted = re.sub(r"^Input should be |, unable to parse.*", "", first["msg"])
        return str(unsupported(error.param.name, first["input"], wanted)) + hint
    message = re.sub(r"\(Possible options: (.*?)\)", r"Did you mean \1?", error.format_message())
    return re.sub(r"extra argument\S* \((\d+(?:x\d+)?)\)$", r"\g<0>. Did you mean --size \1?", message) + hint


def _fail(message: str, code: int = EXIT_USAGE) -> int:
    text = one_line(" ".join(message.split()))
    shortened = text if len(text) <= MAX_MESSAGE else text[:MAX_MESSAGE] + "..."
    print(f"error: {shortened}", file=sys.stderr)
    return code
