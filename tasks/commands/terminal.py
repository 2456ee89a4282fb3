"""How commands talk: the error line and exit code, notes, tables, JSON, progress bars."""

import contextlib
import errno
import functools
import inspect
import json
import os
import shlex
import sys
import traceback
from pathlib import Path
from typing import Annotated, Optional

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from seqlab.errors import UserError
from seqlab.processes import at_terminal, is_main_process


def command(group: typer.Typer, name: str):
    """A command that turns UserError into one line and exit code 1, and adds --debug for tracebacks, and --seed where it has
    none, so that a script may give one to any command."""

    def decorate(function):
        signature = inspect.signature(function)

        @functools.wraps(function)
        def wrapper(*args, debug: bool = False, **kwargs):
            if "seed" not in signature.parameters:
                del kwargs["seed"]
            try:
                if sys.stdout is None:
                    raise UserError("standard output is closed; leave it open, or send it to /dev/null")
                check_output_file(kwargs.get("json_out"), "--json")
                return function(*args, **kwargs)
            except (typer.Exit, typer.Abort, typer.BadParameter):
                raise
            except KeyboardInterrupt:
                if debug:
                    raise
                fail("stopped by Ctrl-C")
            except BrokenPipeError:  # `seqlab ... | head`: nothing is wrong
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                raise typer.Exit(0) from None
            except Exception as error:
                if debug:
                    traceback.print_exc()
                    raise typer.Exit(1) from None
                if isinstance(error, UserError):
                    fail(str(error))
                if isinstance(error, OSError) and error.strerror:
                    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
                    advice = "; free some space, or write somewhere else" if full else ""
                    fail(f"{error.filename or 'input/output'}: {error.strerror}{advice}")
                first = (str(error).strip().splitlines() or [""])[0][:200]
                fail(f"{type(error).__name__}: {first} (unexpected; repeat with --debug for the whole story)")

        added = {
            "seed": Annotated[int, typer.Option("--seed", help="Taken by every command; nothing here is drawn.")],
            "debug": Annotated[bool, typer.Option("--debug", help="Show a traceback on errors.")],
        }
        options = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=0 if name == "seed" else False, annotation=kind)
            for name, kind in added.items()
            if name not in signature.parameters
        ]
        wrapper.__signature__ = signature.replace(parameters=[*signature.parameters.values(), *options])
        return group.command(name)(wrapper)

    return decorate


def program() -> str:
    """What the user types for this program here: `seqlab`, or a path to it that is not on PATH."""
    import shutil

    called = Path(sys.argv[0])
    if called.name != "seqlab":
        return "seqlab" if shutil.which("seqlab") else "python -m cli"
    if shutil.which("seqlab"):
        return "seqlab"
    try:
        return quoted(called.resolve().relative_to(Path.cwd().resolve()))
    except ValueError:
        return quoted(called.resolve())


def quoted(path) -> str:
    """A path as a shell takes it, in a command that the user is told to type."""
    return shlex.quote(str(path))


def check_output_file(name: Optional[str], option: str, overwrite: bool = True) -> None:
    """UserError, before any work is done, unless a file of that name can be written; None and - are none. `overwrite`: also
    over one that is there."""
    if name in (None, "-"):
        return
    from seqlab.training.checkpoint import is_stream

    path = Path(name)
    if is_stream(path):
        return
    if path.exists() and not overwrite:
        raise UserError(f"{path}: exists; choose another {option} or add --overwrite")
    if path.is_dir():
        raise UserError(f"{option} {name}: is a directory; give a file in it, or - for standard output")
    parent = path.parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise UserError(f"{option} {name}: {parent} is not a directory; give another file")
    if not os.access(path if path.exists() else parent, os.W_OK):
        raise UserError(f"{option} {name}: {path if path.exists() else parent} is not writable; give another file")


def fail(message: str) -> None:
    Console(stderr=True, highlight=False, soft_wrap=True, emoji=False).print(f"[bold red]error:[/] {escape(message)}")
    raise typer.Exit(1)


def note(message: str = "") -> None:
    """A line for people, on standard error; once, however many processes there are."""
    if not is_main_process():
        return
    Console(stderr=True, highlight=False, soft_wrap=True, emoji=False).print(message, markup=False)


def emit(json_out: Optional[str], data: dict, *, human) -> None:
    """`human()` prints for people; --json FILE writes `data` too, and --json - prints it instead."""
    text = json.dumps(data, indent=1)
    if json_out == "-":
        print(text)
        return
    human()
    if json_out is not None:
        from seqlab.training.checkpoint import write_text

        write_text(Path(json_out), text + "\n")


def print_table(title: str, header: list[str], rows: list[list[str]]) -> None:
    table = Table(header_style="bold", box=box.SIMPLE_HEAD)
    table.pad_edge, table.collapse_padding = False, True  # six columns fit into 80 characters
    for i, name in enumerate(header):
        table.add_column(name, justify="left" if i == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    console = Console(highlight=False, emoji=False)
    whole = Console(width=1000).measure(table).maximum  # a line that a terminal breaks can be read, columns of "…" cannot
    console.width = max(console.width, whole)
    console.print(escape(title), style="bold", soft_wrap=True)  # a title of the table itself would be as narrow as that
    console.print(table)


@contextlib.contextmanager
def status_line():
    """show(text): what is being done, in a line that is drawn again; silent when not on a terminal."""
    if not at_terminal():
        yield lambda text: None
        return
    with Console(stderr=True).status("") as status:
        yield status.update


def progress_bar(title: str, unit: str, scale: float = 1.0, suffix: str = "/s", out: Optional[str] = None):
    """(context manager, update(done, total)): a bar with rate and remaining time; silent when not on a terminal, or where rows
    go to that terminal meanwhile (`out`, the command's --out, is -): they show how far it has come."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        console=console,
        disable=not at_terminal() or (out == "-" and sys.stdout.isatty()),
        transient=True,
        expand=True,
        redirect_stdout=False,  # to standard error, that is: rows for a file or a pipe would go to the terminal
    )
    task = bar.add_task(title, total=None, rate="")

    def update(done: float, total: float | None) -> None:
        speed = bar.tasks[0].speed
        rate = f"{speed / scale:,.1f} {unit}{suffix}" if speed else ""
        bar.update(task, completed=done, total=total, rate=rate)

    return bar, update
