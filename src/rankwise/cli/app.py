"""The application, and how errors reach the user: one line, and an exit code."""

import warnings
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from ..core.progress import listening


class _Group(TyperGroup):
    """Turns errors about input into one line on standard error and exit code 2."""

    def invoke(self, ctx: Any) -> Any:
        """Run a command."""
        try:
            with listening(say):
                return super().invoke(ctx)
        except BrokenPipeError:
            raise
        except (ValueError, TypeError, OSError) as error:
            if ctx.params.get("debug"):
                raise
            say(f"error: {_one_line(error) or type(error).__name__}")
            raise typer.Exit(2) from error
        except KeyboardInterrupt as error:
            say("interrupted; no output was left half-written.")
            raise typer.Exit(130) from error
        except (typer.Exit, typer.Abort):  # which are errors at run time, too
            raise
        except (ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError) as error:
            if ctx.params.get("debug"):
                raise
            say(f"error: {type(error).__name__}: {_one_line(error)} (rankwise --debug ... shows where)")
            raise typer.Exit(1) from error


app = typer.Typer(cls=_Group, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


def main() -> None:
    """Run the command line; the entry point of the console script."""
    warnings.showwarning = _show
    app(prog_name="rankwise")


def say(text: str) -> None:
    """Write one line for people on standard error."""
    typer.echo(text, err=True)


def _show(message: Warning | str, *_: Any, **__: Any) -> None:
    """Show a warning without the place in the code, which says nothing to who uses commands."""
    say(f"warning: {_one_line(message)}")


def _one_line(error: Exception | str) -> str:
    return " ".join(str(error).split())


def _version(wanted: bool) -> None:
    if wanted:
        from .. import __version__

        typer.echo(f"rankwise {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the whole traceback of an error.")] = False,
) -> None:
    """Inspect and compress neural networks through the structure of their matrices."""
