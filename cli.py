"""The command line: `seqlab`, `python -m cli`, `torchrun -m cli`. The commands themselves are in tasks/commands/."""

import sys

try:
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
    from tasks.commands.terminal import command, one_line_on_interrupt
except KeyboardInterrupt:  # these imports are the first 0.2 s of every command
    print("Stopped by Ctrl-C.", file=sys.stderr)
    sys.exit(130)

__all__ = ["app", "load_config", "presets"]

ORDER = "doctor prep train eval generate predict embed score import export plan bench".split()


class Commands(TyperGroup):
    """Lists the commands in the order in which they are met (typer has groups last), and says so when Ctrl-C ends one."""

    def list_commands(self, context) -> list[str]:
        return sorted(super().list_commands(context), key=[*ORDER, *self.commands].index)

    # Ctrl-C before the command's own code: reading options imports things too
    def make_context(self, *arguments, **options):
        with one_line_on_interrupt():
            return super().make_context(*arguments, **options)

    def invoke(self, context):
        with one_line_on_interrupt():
            return super().invoke(context)


app = typer.Typer(
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
