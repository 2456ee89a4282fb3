"""`seqlab bench`: this machine's numbers."""

import json
from pathlib import Path
from typing import Annotated, Optional

import typer

from seqlab.errors import UserError
from tasks.commands.options import (
    BenchSeed,
    Device,
    Json,
    Overwrite,
    Precision,
    Seed,
    Set,
    check_decoder,
    parse_context,
    parse_precision,
    resolve_device,
)
from tasks.commands.settings import find_config, load_config, train_options
from tasks.commands.terminal import check_output_file, command, emit, note, print_table, status_line

group = typer.Typer(no_args_is_help=True, help="This machine's numbers, beside whatever peers are installed.")


@command(group, "scan")
def bench_scan(
    batch: Annotated[int, typer.Option("--batch", help="Sequences side by side.")] = 1,
    d_inner: Annotated[int, typer.Option("--d-inner", help="Channels.")] = 512,
    d_state: Annotated[int, typer.Option("--d-state", help="States a channel.")] = 16,
    min_length: Annotated[str, typer.Option("--min-length", help="The shortest; others are four times as long, and so on.")] = "1024",
    max_length: Annotated[Optional[str], typer.Option("--max-length", help="The longest. Default: 1,048,576 on a GPU, 16,384 on a CPU.")] = None,
    device: Device = "auto",
    precision: Precision = None,
    seconds: Annotated[float, typer.Option("--seconds", help="Most time a contender may take at one length.")] = 10.0,
    attention: Annotated[bool, typer.Option("--attention/--no-attention", help="Causal attention of the same width too.")] = True,
    plot: Annotated[Optional[Path], typer.Option("--plot", help="Plot to write: .png, .pdf or .svg.")] = None,
    overwrite: Overwrite = False,
    seed: BenchSeed = 0,
    json_out: Json = None,
) -> None:
    """Selective scan by length: parity with float64 first, then every back end and peer installed here, side by side.

    Example:  seqlab bench scan --max-length 4096 --plot scan.png
    """
    import torch

    from seqlab.bench import scan

    if plot is not None:
        if plot.suffix.lower() not in (".png", ".pdf", ".svg"):
            raise UserError(f"--plot {plot}: give a name that ends in .png, .pdf or .svg")
        check_output_file(str(plot), "--plot", overwrite)
    device = resolve_device(device)
    precision = parse_precision(precision or "auto")
    half = device == "cuda" if precision == "auto" else precision == "bfloat16"
    longest = max_length or (2**20 if device == "cuda" else 2**14)
    settings = scan.Settings(
        batch=batch,
        d_inner=d_inner,
        d_state=d_state,
        min_length=parse_context(min_length, "--min-length"),
        max_length=parse_context(longest, "--max-length"),
        device=device,
        dtype=torch.bfloat16 if half else torch.float32,
        attention=attention,
        seconds=seconds,
        seed=seed,
    )
    with status_line() as show:
        result = scan.run(settings, show, note)
    if plot is not None:
        scan.plot(result, plot)

    def human() -> None:
        shown = f"batch {batch}, d_inner {d_inner}, d_state {d_state}, {result.settings['dtype']}, {result.machine}"
        print_table("Error against the float64 reference", *scan.error_table(result))
        print_table(f"Forward / forward + backward, ms: {shown}", *scan.table(result))
        for name, why in {**result.absent, **result.dropped}.items():
            note(f"{name}: {why}")
        if plot is not None:
            note(f"Plot: {plot}")
        print(json.dumps(result.as_dict()))

    emit(json_out, result.as_dict(), human=human)


@command(group, "generate")
def bench_generate(
    shape: Annotated[Optional[list[str]], typer.Option("--shape", help="Model shape; may be repeated. Default: all.")] = None,
    batch: Annotated[Optional[list[int]], typer.Option("--batch", help="Streams side by side; may be repeated.")] = None,
    backend: Annotated[Optional[list[str]], typer.Option("--backend", help="Back end; may be repeated. Default: auto.")] = None,
    device: Device = "auto",
    prompt: Annotated[
        Optional[str], typer.Option("--prompt", help="Length of the prompt that is timed; 0: none. Default: 160,000 on a GPU, 16,000 on a CPU.")
    ] = None,
    tokens: Annotated[int, typer.Option("--tokens", help="Tokens of the calls that are timed whole.")] = 2048,
    seconds: Annotated[float, typer.Option("--seconds", help="About how long one timing runs, two calls at least.")] = 0.5,
    seed: BenchSeed = 0,
    json_out: Json = None,
) -> None:
    """Tokens a second while generating: parity with the parallel forward pass first, then beside mamba_ssm if installed.

    Example:  seqlab bench generate --shape youtubemix_1m --batch 1 --prompt 0
    """
    import torch

    from seqlab.bench import generate

    device = resolve_device(device)
    for name in backend or []:
        check_decoder(name)
    on_gpu = device == "cuda"
    prompt = prompt or ("160000" if on_gpu else "16000")
    settings = generate.Settings(
        shapes=tuple(shape or generate.SHAPES),
        batches=tuple(batch or ((1, 64, 512) if on_gpu else (1, 16))),
        dtypes=(torch.float32, torch.bfloat16) if on_gpu else (torch.float32,),
        backends=tuple(backend or ("auto",)),
        prompt=0 if prompt == "0" else parse_context(prompt, "--prompt"),
        tokens=tokens,
        seconds=seconds,
        device=device,
        seed=seed,
    )
    with status_line() as show:
        result = generate.run(settings, show, note)

    def human() -> None:
        print_table(f"Generation, {result.machine}", *generate.table(result))
        print_table("Prompt and state", *generate.facts(result))
        note(f"largest difference from the parallel forward pass: {max(result.errors.values()):.1e}")
        for name, why in result.absent.items():
            note(f"{name}: {why}")
        print(json.dumps(result.as_dict()))

    emit(json_out, result.as_dict(), human=human)


@command(group, "train")
def bench_train(
    config: Annotated[str, typer.Argument(help="Preset or YAML file.")] = "dna_small",
    context: Annotated[Optional[str], typer.Option("--context", help="Window length; default: the config's.")] = None,
    device: Device = "auto",
    precision: Precision = None,
    seconds: Annotated[float, typer.Option("--seconds", help="About how long a contender's steps are timed.")] = 5.0,
    seed: Seed = None,
    set_: Set = None,
    json_out: Json = None,
) -> None:
    """Tokens a second and memory of a preset's training step: parity with the reference first, then beside mamba_ssm if installed.

    Example:  seqlab bench train dna_small --context 4096
    """
    import torch

    from seqlab.bench import train
    from seqlab.config import load_yaml
    from tasks import planning

    device = resolve_device(device)
    module = planning.plannable(str(load_yaml(find_config(config, option="")).get("task", "dna")))
    run = load_config(module.Config, config, set_ or [], train_options(context=context, precision=precision, seed=seed))
    half = run.train.precision == "bfloat16" or (run.train.precision == "auto" and device == "cuda")
    step = planning.step_of(run)
    settings = train.Settings(
        rows=step.rows,
        length=step.length,
        micro_batches=step.micro_batches,
        device=device,
        dtype=torch.bfloat16 if half else torch.float32,
        seconds=seconds,
    )
    with status_line() as show:
        result = train.run(step.task, step.batch, settings, run.train, run.optim, show, note)

    def human() -> None:
        title = f"{config}: {result.parameters:,} parameters, {settings.show()} a step, {result.settings['dtype']}, {result.machine}"
        print_table(title, *train.table(result))
        note("loss and gradients beside the reference operators': " + ", ".join(f"{name} {error:.1e}" for name, error in result.errors.items()))
        for name, why in result.absent.items():
            note(f"{name}: {why}")
        print(json.dumps(result.as_dict()))

    emit(json_out, {"config": config, **result.as_dict()}, human=human)
