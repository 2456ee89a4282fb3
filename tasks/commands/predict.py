"""`seqlab predict`: sequences -> table of labels."""

import time
from pathlib import Path
from typing import Annotated

import typer

from seqlab.errors import UserError
from tasks.commands.options import BatchSize, Device, Json, Overwrite, resolve_device
from tasks.commands.terminal import (
    check_one_takes_stdout,
    check_output_file,
    emit,
    note,
    progress_bar,
    rates,
    text_output,
)


def predict(
    run: Annotated[Path, typer.Argument(help="Run directory or checkpoint of a classifier.")],
    reads: Annotated[str, typer.Argument(help="FASTA, FASTQ or GenBank, plain or gzip; - for standard input.")],
    out: Annotated[str, typer.Option("--out", help="TSV to write; - for standard output.")] = "-",
    batch_size: BatchSize = 1024,
    device: Device = "auto",
    overwrite: Overwrite = False,
    json_out: Json = None,
) -> None:
    """Label sequences of any length, in order: name, label, a probability for each class, length.

    Example:  seqlab predict runs/apes reads.fa.gz | cut -f 1,2
    """
    from collections import Counter

    from seqlab.inference.classify import predict_records

    if batch_size < 1:
        raise UserError(f"--batch-size {batch_size}: must be 1 or more")
    check_one_takes_stdout(out, json_out, "table")
    check_output_file(out, "--out", overwrite)
    device = resolve_device(device)
    from data_prep.records import read_records
    from tasks import runs

    loaded = runs.load_run(run)
    module = runs.task_module(loaded.task)
    if not hasattr(module, "interpret"):
        raise UserError(f"{run}: is a run of `train {loaded.task}`, which gives no labels; give one of train species or classify")
    counts, unknown, total, started = Counter(), [], 0, time.monotonic()
    bar, update = progress_bar("predicting", "k bases", 1e3, out=out)
    with text_output(out) as file, bar:
        names = module.output_names(loaded.config)
        file.write("\t".join(["name", "label", *names, "length"]) + "\n")
        records = predict_records(
            loaded.model, read_records(reads), lambda outputs: module.interpret(loaded.config, outputs),
            device=device, precision=loaded.config.train.precision, batch_size=batch_size,
        )
        for name, label, values, length in records:
            cells = ["."] * len(names) if values is None else [f"{value:.4f}" for value in values]
            file.write("\t".join([name, label or ".", *cells, str(length)]) + "\n")
            counts[label or "."] += 1
            total += length
            if label is None:
                unknown.append(name)
            update(total, None)
        n = sum(counts.values())
        if not n:
            raise UserError(f"{reads}: no sequence in it")
        if len(unknown) == n:
            raise UserError(f"{reads}: none of its {n:,} sequences holds an A, C, G or T, so none has a label")
    seconds = max(time.monotonic() - started, 1e-9)
    note(rates(n, total, seconds, device))
    if unknown:
        note(f"{len(unknown):,} without any A, C, G or T have no label (first: {unknown[0]}).")
    summary = {"sequences": n, "bases": total, "seconds": seconds, "labels": dict(counts), "device": device}
    emit(json_out, summary, human=lambda: None)
