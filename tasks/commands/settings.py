"""A run's settings: a preset or YAML file, under the command line's options, under --set."""

from pathlib import Path
from typing import Optional

import configs
from seqlab.errors import UserError
from seqlab.processes import launched
from tasks.commands.options import check_device, parse_context, parse_precision
from tasks.commands.terminal import note

CONFIGS = Path(configs.__file__).parent


def presets(task: Optional[str] = None) -> list[str]:
    """Names of the presets, of one task (`dna`, where a file names none) or of all."""
    from seqlab.config import load_yaml

    paths = sorted(CONFIGS.glob("*.yaml"))
    return [path.stem for path in paths if task in (None, load_yaml(path).get("task", "dna"))]


def find_config(name: str, option: str = "--config ") -> Path:
    """A preset's name or a path -> the YAML file. `option`: what stands before it on the command line, for the message."""
    if (CONFIGS / f"{name}.yaml").is_file():
        return CONFIGS / f"{name}.yaml"
    path = Path(name)
    if path.is_file():
        return path
    import difflib

    close = difflib.get_close_matches(name, presets(), n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    raise UserError(f"{option}{name}: no such file or preset; {hint}presets: {', '.join(presets())}")


def load_config(cls: type, name: str, overrides: list[str], options: dict):
    """The preset or file, then the options of the command line, then --set, all through the same check."""
    from seqlab.config import load_yaml

    data = load_yaml(find_config(name))
    return lay_over(cls, data, make_room(data, options, overrides), overrides, name)


def lay_over(cls: type, data: dict, options: dict, overrides: list[str], source: str):
    """A config `cls` of the values in `data`, under `options`, under the --set texts; `source` serves the messages."""
    from seqlab.config import from_dict, merge, parse_override

    for top in [options, *(parse_override(text) for text in overrides)]:
        data = merge(data, top)
    return from_dict(cls, data, source)


def train_options(
    *, context=None, seed=None, device=None, devices=None, precision=None, max_steps=None, max_minutes=None, context_parallel=None
) -> dict:
    """The command-line options that every `seqlab train` has, as a nested dictionary of what was given."""
    if (started := launched()) is not None:
        devices = started.world_size
    if device is not None:
        check_device(device)
    train = {
        "seed": seed,
        "devices": devices,
        "context_parallel": context_parallel,
        "accelerator": "gpu" if device == "cuda" else device,
        "precision": None if precision is None else parse_precision(precision),
        "max_steps": max_steps,
        "max_minutes": max_minutes,
    }
    options = {"train": {key: value for key, value in train.items() if value is not None}}
    if max_steps is not None and max_minutes is None:
        options["train"]["max_minutes"] = None  # of a preset: what was asked for is a number of steps, the same on every machine
    if context is not None:
        options["data"] = {"context": "whole" if context == "whole" else parse_context(context, "--context")}
    return options


def make_room(data: dict, options: dict, overrides: list[str]) -> dict:
    """`options` with a larger train.tokens_per_step if --context asks for a window that a step of `data` does not hold."""
    from seqlab.config import merge, parse_override
    from seqlab.training.config import TrainConfig

    context = options.get("data", {}).get("context")
    if context in (None, "whole"):
        return options
    for text in overrides:
        data = merge(data, parse_override(text))
    train = {**data.get("train", {}), **options.get("train", {})}
    tokens, devices = train.get("tokens_per_step", TrainConfig.tokens_per_step), train.get("devices", 1)
    needed = context * max(1, devices // train.get("context_parallel", 1))
    if not isinstance(tokens, int) or tokens >= needed:
        return options
    note(f"--context {context:,}: train.tokens_per_step goes from {tokens:,} to {needed:,}, one window a step and device")
    return merge(options, {"train": {"tokens_per_step": needed}})
