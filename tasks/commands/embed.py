"""`seqlab embed`: sequences -> vectors."""

import time
from pathlib import Path
from typing import Annotated

import typer

from seqlab.errors import UserError
from seqlab.files import is_stream, write_atomic
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


def embed(
    run: Annotated[Path, typer.Argument(help="Run directory or checkpoint of train dna, species or classify.")],
    reads: Annotated[str, typer.Argument(help="FASTA, FASTQ or GenBank, plain or gzip; - for standard input.")],
    out: Annotated[str, typer.Option("--out", help="TSV or .npz (names, embeddings, lengths) to write; - for TSV.")] = "-",
    batch_size: BatchSize = 1024,
    device: Device = "auto",
    overwrite: Overwrite = False,
    json_out: Json = None,
) -> None:
    """Embed sequences of any length, in order: the mean of the last layer's features over A, C, G and T.

    Example:  seqlab embed runs/ecoli reads.fa.gz --out reads.npz
    """
    from data_prep.records import read_records
    from seqlab.inference.embed import embed_records
    from tasks import runs

    if batch_size < 1:
        raise UserError(f"--batch-size {batch_size}: must be 1 or more")
    check_one_takes_stdout(out, json_out, "table")
    if out != "-" and Path(out).suffix not in (".npz", ".tsv") and not is_stream(Path(out)):
        raise UserError(f"--out {out}: give a name that ends in .npz or .tsv, or - for TSV on standard output")
    check_output_file(out, "--out", overwrite)
    device = resolve_device(device)
    loaded = runs.load_run(run)
    if loaded.task not in ("dna", "species", "classify"):
        raise UserError(f"{run}: is a run of `train {loaded.task}`, which reads no bases; give one of train dna, species or classify")
    width, started, n, total = loaded.config.model.d_model, time.monotonic(), 0, 0
    records = embed_records(
        loaded.model, read_records(reads), device=device, precision=loaded.config.train.precision, batch_size=batch_size
    )
    bar, update = progress_bar("embedding", "k bases", 1e3, out=out)
    with bar:
        if out.endswith(".npz"):
            rows = []
            for row in records:
                rows.append(row)
                n, total = n + 1, total + row[2]
                update(total, None)
            _write_npz(Path(out), rows)
        else:
            with text_output(out) as file:
                file.write("\t".join(["name", *(f"e{i}" for i in range(width)), "length"]) + "\n")
                for name, vector, length in records:
                    file.write("\t".join([name, *(f"{value:.6g}" for value in vector.tolist()), str(length)]) + "\n")
                    n, total = n + 1, total + length
                    update(total, None)
    seconds = max(time.monotonic() - started, 1e-9)
    note(rates(n, total, seconds, device))
    summary = {"sequences": n, "bases": total, "seconds": seconds, "d_model": width, "device": device}
    emit(json_out, summary, human=lambda: None)


def _write_npz(path: Path, rows: list) -> None:
    import numpy as np

    names, vectors, lengths = zip(*rows)
    arrays = {"names": np.array(names), "embeddings": np.stack(vectors), "lengths": np.array(lengths, np.int64)}

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            np.savez(file, **arrays)

    write_atomic(path, write)
