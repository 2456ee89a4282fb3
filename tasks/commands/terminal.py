"""How commands talk: the error line and exit code, notes, tables, JSON, progress bars."""

import contextlib
import errno
import functools
import inspect
import json
import os
import shlex
import signal
import sys
import threading
import traceback
from pathlib import Path
from typing import Annotated, Optional

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from seqlab.errors import UserError
from seqlab.files import is_stream, open_text, target_of, write_text
from seqlab.processes import at_terminal, is_main_process

EVERYWHERE = {
    "seed": (int, 0, typer.Option("--seed", help="Taken by every command; nothing here is drawn.")),
    "overwrite": (bool, False, typer.Option("--overwrite", help="Replace the file of --json.")),
    "debug": (bool, False, typer.Option("--debug", help="Show a traceback on errors.")),
}
"""Options (type, default, declaration) that a command is given where its function has none of that name: so a script may use
them with any command."""


def command(group: typer.Typer, name: str):
    """A command that turns UserError into one line and exit code 1, with the options of EVERYWHERE. `json_out`, --json, is
    checked before the function runs."""

    def decorate(function):
        parameters = inspect.signature(function).parameters

        @functools.wraps(function)
        def wrapper(**given):
            with noticed_interrupts() as interrupts:
                try:
                    if sys.stdout is None:
                        raise UserError("standard output is closed; leave it open, or send it to /dev/null")
                    _check_json(given)
                    return function(**{name: value for name, value in given.items() if name in parameters})
                except (typer.Exit, typer.Abort, typer.BadParameter):
                    raise
                except BrokenPipeError:  # `seqlab ... | head`: nothing is wrong
                    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                    raise typer.Exit(0) from None
                except (Exception, KeyboardInterrupt) as error:
                    if given["debug"]:
                        traceback.print_exc()
                    if interrupts or isinstance(error, KeyboardInterrupt):
                        raise stopped() from None
                    if given["debug"]:
                        raise typer.Exit(1) from None
                    fail(in_one_line(error))

        added = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option])
            for name, (kind, default, option) in EVERYWHERE.items()
            if name not in parameters
        ]
        wrapper.__signature__ = inspect.Signature([*parameters.values(), *added])
        return group.command(name)(wrapper)

    return decorate


@contextlib.contextmanager
def noticed_interrupts():
    """A list that Ctrl-C adds to while this lasts. Some imports (numpy's and torch's among them) swallow the KeyboardInterrupt and
    go on, or fail a moment later with an error that says nothing of it, or crash: so it waits until they are over."""
    pressed = []

    def press(number, frame) -> None:
        pressed.append(number)
        while frame is not None:
            if frame.f_code.co_filename.startswith("<frozen importlib"):
                again = threading.Timer(0.05, os.kill, (os.getpid(), number))
                again.daemon = True
                again.start()
                return
            frame = frame.f_back
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    usual = threading.current_thread() is threading.main_thread() and callable(before)  # under nohup it is ignored
    if usual:
        signal.signal(signal.SIGINT, press)
    try:
        yield pressed
    finally:
        if usual:
            signal.signal(signal.SIGINT, before)


def in_one_line(error: Exception) -> str:
    """What the user reads of an error."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        advice = "; free some space, or write somewhere else" if full else ""
        return f"{error.filename or 'input/output'}: {error.strerror}{advice}"
    first = (str(error).strip().splitlines() or [""])[0][:200]
    return f"{type(error).__name__}: {first} (unexpected; repeat with --debug for the whole story)"


def _check_json(given: dict) -> None:
    name = given["json_out"]
    check_output_file(name, "--json", given["overwrite"])
    for option in ("out", "plot"):
        if name not in (None, "-") and given.get(option) is not None and Path(name).resolve() == Path(given[option]).resolve():
            raise UserError(f"--json {name}: is what --{option} writes; give another file")


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


def check_output_file(name: Optional[str], option: str, overwrite: bool) -> None:
    """UserError, before any work is done, unless a file of that name can be written; None and - are none. One that is there is
    replaced with `overwrite` alone."""
    if name in (None, "-") or is_stream(Path(name)):
        return
    path = target_of(Path(name))
    if path.is_dir():
        raise UserError(f"{option} {name}: is a directory; give a file in it, or - for standard output")
    if path.exists() and not overwrite:
        raise UserError(f"{option} {name}: exists; choose another name, or add --overwrite")
    parent = path.parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise UserError(f"{option} {name}: {parent} is not a directory; give another file")
    if not os.access(parent, os.W_OK | os.X_OK):  # of a file that is there as well: another takes its place
        raise UserError(f"{option} {name}: {parent} is not writable; give another file")


def check_one_takes_stdout(out: str, json_out: Optional[str], what: str) -> None:
    """UserError where --out and --json are both -: `what` --out writes would have JSON in it."""
    if out == "-" and json_out == "-":
        raise UserError(f"--json -: standard output is taken by the {what}; give --out FILE, or --json FILE")


@contextlib.contextmanager
def text_output(out: str):
    """--out of a command that writes lines: standard output for -, or a file that appears only when it is complete. (One that may
    not be written `check_output_file` refuses before the work.)"""
    if out == "-":
        yield sys.stdout
        return
    with open_text(Path(out)) as file:
        yield file


def stopped() -> typer.Exit:
    """What ends a command after Ctrl-C, having said so."""
    note("Stopped by Ctrl-C.")
    return typer.Exit(130)


def fail(message: str) -> None:
    Console(stderr=True, highlight=False, soft_wrap=True, emoji=False).print(f"[bold red]error:[/] {escape(message)}")
    raise typer.Exit(1)


def note(message: str = "") -> None:
    """A line for people, on standard error; once, however many processes there are."""
    if not is_main_process():
        return
    Console(stderr=True, highlight=False, soft_wrap=True, emoji=False).print(message, markup=False)


def rates(sequences: int, bases: int, seconds: float, device: str) -> str:
    """The last words of a command that reads sequences."""
    each, all_ = sequences / seconds, bases / seconds
    return f"{sequences:,} sequence{'s' * (sequences != 1)}, {bases:,} bases in {seconds:.1f} s: {each:,.0f} sequences/s, {all_:,.0f} bases/s on the {device.upper()}."


def emit(json_out: Optional[str], data: dict, *, human) -> None:
    """`human()` prints for people; --json FILE writes `data` too, and --json - prints it instead."""
    text = json.dumps(data, indent=1)
    if json_out == "-":
        print(text)
        return
    human()
    if json_out is not None:
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
