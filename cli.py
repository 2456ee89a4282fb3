"""The command line: `seqlab`, `python -m cli`, `torchrun -m cli`. The commands themselves are in tasks/commands/."""

import contextlib
import os
import signal
import threading


@contextlib.contextmanager
def ended_by_ctrl_c():
    """Ctrl-C ends the program on the spot, with one line, while there is nothing to undo: as an exception some imports swallow
    it, and others make something else of it, or crash."""

    def end(number, frame) -> None:
        os.write(2, b"Stopped by Ctrl-C.\n")
        os._exit(130)

    usual = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if usual:
        signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        if usual:
            signal.signal(signal.SIGINT, signal.default_int_handler)


with ended_by_ctrl_c():  # these imports are the first 0.2 s of every command
    from typing import Annotated

    import typer
    from typer.core import TyperGroup

    import seqlab
    from tasks.commands import bench, generate, prep, train
    from tasks.commands.convert import export, import_
    from tasks.commands.doctor import doctor
    from tasks.commands.embed import embed
    from tasks.commands.evaluate import eval_
    from tasks.commands.plan import plan
    from tasks.commands.predict import predict
    from tasks.commands.score import score
    from tasks.commands.settings import load_config, presets
    from tasks.commands.terminal import command

__all__ = ["app", "load_config", "presets"]

ORDER = "doctor prep train eval generate predict embed score import export plan bench".split()


class Commands(TyperGroup):
    """Lists the commands in the order in which they are met (typer has groups last)."""

    def list_commands(self, context) -> list[str]:
        return sorted(super().list_commands(context), key=[*ORDER, *self.commands].index)


class App(typer.Typer):
    # until a command's own code runs: typer builds the commands, and imports things to read their options
    def __call__(self, *arguments, **options):
        with ended_by_ctrl_c():
            return super().__call__(*arguments, **options)


app = App(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Train and run Mamba models on DNA and raw audio at million-token context.",
)


def show_version(is_asked: bool) -> None:
    if is_asked:
        print(f"seqlab {seqlab.__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[bool, typer.Option("--version", callback=show_version, is_eager=True, help="Show the version and exit.")] = False,
) -> None:
    pass


command(app, "predict")(predict)
command(app, "embed")(embed)
command(app, "score")(score)
command(app, "plan")(plan)
command(app, "eval")(eval_)
command(app, "import")(import_)
command(app, "export")(export)
command(app, "doctor")(doctor)
app.add_typer(prep.group, name="prep")
app.add_typer(train.group, name="train")
app.add_typer(generate.group, name="generate")
app.add_typer(bench.group, name="bench")


if __name__ == "__main__":
    app()
