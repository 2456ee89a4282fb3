"""Options that several commands have, and what their values mean."""

from pathlib import Path
from typing import Annotated, Optional

import typer

from seqlab.errors import UserError

Fasta = Annotated[Optional[list[Path]], typer.Option("--fasta", help="FASTA file, plain, gzip or bgzip; may be repeated.")]
Splits = Annotated[Optional[Path], typer.Option("--splits", help="BED: chrom start end train|valid|test.")]
Valid = Annotated[Optional[list[str]], typer.Option("--valid", help="Sequence to validate on; may be repeated.")]
Test = Annotated[Optional[list[str]], typer.Option("--test", help="Sequence to test on; may be repeated.")]
Block = Annotated[Optional[int], typer.Option("--block", help="Bases in a block of the default split.")]
MinLength = Annotated[int, typer.Option("--min-length", help="Leave out shorter sequences.")]
Json = Annotated[Optional[str], typer.Option("--json", help="Write results as JSON to this file; - for standard output.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")]
Backend = Annotated[str, typer.Option("--backend", help="Back end of the decoder; auto: the fastest.")]
BatchSize = Annotated[int, typer.Option("--batch-size", help="Sequences looked at together; changes no answer.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]
# of every `seqlab train`
RunOut = Annotated[Optional[Path], typer.Option("--out", help="Run directory; default runs/NAME-TIME.")]
Init = Annotated[Optional[Path], typer.Option("--init", help="Start from the weights of this run.")]
Freeze = Annotated[bool, typer.Option("--freeze", help="Train the head alone; wants --init.")]
Set = Annotated[Optional[list[str]], typer.Option("--set", help="KEY=VALUE laid over the config; may be repeated.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the run in --out (default: the newest).")]
Seed = Annotated[Optional[int], typer.Option("--seed", help="Of weights, data order, masks and dropout.")]
TrainDevice = Annotated[Optional[str], typer.Option("--device", help="auto, cpu or cuda: train.accelerator of the config.")]
ContextParallel = Annotated[
    Optional[int], typer.Option("--context-parallel", help="Devices that share a window, each with a piece of it.")
]
Devices = Annotated[Optional[int], typer.Option("--devices", help="GPUs, or processes on a CPU.")]
Precision = Annotated[Optional[str], typer.Option("--precision", help="fp32, bf16 or auto: bf16 on a GPU.")]
MaxSteps = Annotated[Optional[int], typer.Option("--max-steps", help="Stop after so many steps.")]
MaxMinutes = Annotated[Optional[float], typer.Option("--max-minutes", help="Stop after so many minutes of training.")]
BenchSeed = Annotated[int, typer.Option("--seed", help="Of weights and data.")]

DATASETS = {"dna": ("dna", "species"), "species": ("species",), "classify": ("labelled",), "audio": ("audio",)}
"""Task -> the kinds of dataset that it reads; `seqlab prep` of the first name writes them."""


def show_context(context: int | str) -> str:
    return "whole sequences" if context == "whole" else f"{context:,}"


def parse_context(text: str, option: str) -> int:
    try:
        number = int(str(text).replace(",", "").replace("_", ""))
    except ValueError:
        raise UserError(f"{option} {text}: expected a whole number, for example 131072 or 1_000_000") from None
    if number < 2:
        raise UserError(f"{option} {text}: must be 2 or more")
    return number


def parse_precision(text: str) -> str:
    """--precision: float32, bfloat16 or auto, of the words for them. Raises UserError."""
    names = {"float32": "float32", "fp32": "float32", "32": "float32", "bfloat16": "bfloat16", "bf16": "bfloat16", "auto": "auto"}
    if text in ("fp16", "float16", "16", "half"):
        raise UserError(
            f"--precision {text}: float16 is refused, its range is too small for the scan's state and training "
            "turns to NaN; use bf16 or fp32"
        )
    if text not in names:
        raise UserError(f"--precision {text}: unknown; use fp32, bf16 or auto")
    return names[text]


def check_decoder(backend: str) -> None:
    """UserError for a --backend that no decoder has."""
    from seqlab.ops import decode, dispatch

    dispatch.check_name(backend, decode.BACKENDS, "--backend")


def check_device(device: str) -> None:
    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"--device {device}: unknown; use auto, cpu or cuda")


def resolve_device(device: str) -> str:
    """--device: "cpu" or "cuda" for auto, cpu or cuda. Raises UserError where there is no such device."""
    import torch

    check_device(device)
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU here; use cpu, or run `seqlab doctor` for the reason")
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device
