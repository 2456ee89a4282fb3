"""`seqlab plan`: what a run would need, before it starts."""

from typing import Annotated, Optional

import typer

from tasks.commands.options import Json, Seed, Set, TrainDevice
from tasks.commands.settings import find_config, load_config, train_options
from tasks.commands.terminal import emit, note, print_table, progress_bar


def plan(
    config: Annotated[str, typer.Argument(help="Preset or YAML file.")],
    context: Annotated[Optional[str], typer.Option("--context", help="Window length; default: the config's.")] = None,
    device: TrainDevice = None,
    devices: Annotated[int, typer.Option("--devices", min=1, help="GPUs like this machine's that the run would have.")] = 1,
    context_parallel: Annotated[
        Optional[int], typer.Option("--context-parallel", help="How many of them would share a window.")
    ] = None,
    seed: Seed = None,
    set_: Set = None,
    json_out: Json = None,
) -> None:
    """Memory, step time and cost of a run before it starts: a few short steps on this machine, extrapolated.

    Example:  seqlab plan dna_base --context 1_000_000
    """
    import dataclasses

    from seqlab.config import load_yaml
    from seqlab.training import planner
    from tasks import planning

    module = planning.plannable(str(load_yaml(find_config(config, option="")).get("task", "dna")))
    options = train_options(context=context, device=device, devices=devices, context_parallel=context_parallel, seed=seed)
    settings = load_config(module.Config, config, set_ or [], options)
    with progress_bar("measuring", "")[0]:
        found = planning.plan_run(settings)
    result = found.plan
    per_step = found.tokens_per_step

    def human() -> None:
        hosts = any(e.host for e in result.estimates)
        header = ["memory", "chunk", "peak", *(["host"] if hosts else []), "s/step", "tokens/s", "longest", "fits"]
        rows = []
        for e in result.estimates:
            chunk = "" if e.memory.chunk_tokens is None else f"{e.memory.chunk_tokens:,}"
            host = [planner.gib(e.host) if e.host else ""] if hosts else []
            seconds = f"{e.step_seconds:,.{0 if e.step_seconds >= 100 else 2}f}"
            rate, longest = f"{per_step / e.step_seconds:,.0f}", f"{e.longest:,}"
            rows.append([e.memory.mode, chunk, planner.gib(e.peak), *host, seconds, rate, longest, "yes" if e.fits else "no"])
        title = f"{config}: {found.parameters:,} parameters, context {result.length:,}, {per_step:,} tokens a step"
        print_table(title, header, rows)
        for mode, reason in result.unavailable.items():
            note(f"{mode}: not for this model: {reason}")
        note(f"Free here: {planner.gib(result.capacity)} ({'GPU' if result.device == 'cuda' else 'CPU'})")
        if result.chosen is None:
            note(result.refusal(None if settings.train.memory == "auto" else settings.train.memory))
            return
        hours = found.device_hours
        note(
            f"`train` would use memory {result.chosen.memory}: {found.steps:,} steps, {found.steps * per_step:,} tokens, "
            f"{show_duration(found.seconds)} on {found.devices} device(s), {hours:,.{2 if hours < 10 else 0}f} device-hours, validation apart."
        )

    data = {"config": config, **{k: v for k, v in dataclasses.asdict(found).items() if k != "plan"}, "plan": planner.as_dict(result)}
    emit(json_out, {**data, "device_hours": found.device_hours}, human=human)


def show_duration(seconds: float) -> str:
    for size, unit in ((86_400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:,.0f} seconds"
