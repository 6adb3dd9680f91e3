"""The command line: lists the commands, catches every error once, sets the exit code.

Nothing heavier than typer is imported here or by the command modules; each command imports what it needs when
it runs.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Annotated, ParamSpec, cast

import typer
from typer.core import TyperGroup

from gradflow._version import __version__
from gradflow.commands.anatomy import anatomy
from gradflow.commands.check import check
from gradflow.commands.compare_folders import diff
from gradflow.commands.delivery import ARGUMENTS
from gradflow.commands.explain_rule import explain
from gradflow.commands.inspect_model import inspect
from gradflow.commands.rerender import report
from gradflow.commands.rule_list import rules
from gradflow.commands.show_config import config
from gradflow.errors import GradflowError, ModelError
from gradflow.standard_streams import end_report, open_closed

Options = ParamSpec("Options")

USAGE = 2
INTERRUPTED = 2
BUG = 4

_UsageProblem = cast(type[Exception], typer.BadParameter.__base__)


class _Group(TyperGroup):
    """Keeps the arguments as they were typed, for the commands that a report suggests.

    What is wrong with them is said like every other error: in one sentence.
    """

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        ctx.meta[ARGUMENTS] = tuple(args)
        if not args:  # the help is shown
            return super().parse_args(ctx, args)
        with _problems_in_a_sentence():
            return super().parse_args(ctx, _with_values(args))

    def invoke(self, ctx: typer.Context) -> object:  # type: ignore[override]
        with _problems_in_a_sentence():
            return super().invoke(ctx)


@contextmanager
def _problems_in_a_sentence() -> Iterator[None]:
    try:
        yield
    except _UsageProblem as problem:
        print(f"gradflow: {_in_a_sentence(problem)}", file=sys.stderr)
        raise typer.Exit(USAGE) from problem


def _with_values(args: list[str]) -> list[str]:
    """``--ablate`` alone means ``--ablate each``; the parser knows no option whose value may be left out."""
    following = [*args[1:], ""]
    return [
        "--ablate=each" if arg == "--ablate" and not _is_value(after) else arg
        for arg, after in zip(args, following, strict=True)
    ]


def _is_value(word: str) -> bool:
    """A plain word is meant as the value, right or wrong; a target has a dot, a colon or a slash in it."""
    return word.isidentifier()


def _in_a_sentence(problem: Exception) -> str:
    said = problem.format_message().strip().rstrip(".").replace("Value error, ", "")  # type: ignore[attr-defined]
    context = getattr(problem, "ctx", None)
    where = f" (see {context.command_path} --help)" if context is not None else ""
    return f"{said[:1].lower()}{said[1:]}{where}"


app = typer.Typer(
    name="gradflow",
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help", "-h"]},
    epilog="Exit codes: 0 clean, 1 findings (with --fail-on), 2 usage or target not understood, "
    "3 the model raised, 4 a bug in gradflow.",
)


def main() -> None:
    """Run the command line and exit."""
    open_closed()
    try:
        app(prog_name="gradflow")
    finally:
        end_report()


def guarded(command: Callable[Options, int]) -> Callable[Options, None]:
    """A command that ends in its exit code, whatever it raises; the only place that catches errors."""

    @wraps(command)
    def run(*args: Options.args, **kwargs: Options.kwargs) -> None:
        try:
            code = command(*args, **kwargs)
        except GradflowError as error:
            code = _say(error)
        except KeyboardInterrupt:
            print("interrupted; nothing was written", file=sys.stderr)
            code = INTERRUPTED
        except Exception as error:
            code = _confess(error)
        raise typer.Exit(code)

    return run


def _say(error: GradflowError) -> int:
    if isinstance(error, ModelError) and error.trace_text:
        print(error.trace_text.rstrip("\n"), file=sys.stderr)
    print(f"gradflow: {error}", file=sys.stderr)
    return error.exit_code


def _confess(error: Exception) -> int:
    traceback.print_exception(error)
    print(
        f"gradflow: a bug in gradflow ({type(error).__name__}); please report the traceback above with the "
        "command line, the model file if you can, and what `gradflow --version` prints",
        file=sys.stderr,
    )
    return BUG


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import PackageNotFoundError, version

        try:
            torch = version("torch")
        except PackageNotFoundError:
            torch = "not installed"
        print(f"gradflow {__version__} (torch {torch}, Python {sys.version.split()[0]})")
        raise typer.Exit


@app.callback()
def _gradflow(
    version: Annotated[
        bool,
        typer.Option("--version", "-V", callback=_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    """Say where the gradient of a PyTorch model goes, which layers lose it, and what to change.

    Start with: gradflow inspect model.py
    """


for _command in (inspect, anatomy, check, report, diff, config, rules, explain):
    app.command()(guarded(_command))
