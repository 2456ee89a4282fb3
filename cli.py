"""The command line: `seqlab`, `python -m cli`, `torchrun -m cli`. The commands themselves are in tasks/commands/."""

import typer

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

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Train and run Mamba models on DNA and raw audio at million-token context.",
)
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
