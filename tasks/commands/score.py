"""`seqlab score`: effects of variants, VCF in and VCF out."""

import time
from pathlib import Path
from typing import Annotated, Optional

import typer

from seqlab.errors import UserError
from tasks.commands.options import Device, Json, Overwrite, parse_context, resolve_device
from tasks.commands.terminal import (
    check_one_takes_stdout,
    check_output_file,
    emit,
    note,
    progress_bar,
    text_output,
)


def score(
    run: Annotated[Path, typer.Argument(help="Run directory or checkpoint of train dna.")],
    vcf: Annotated[Path, typer.Argument(help="Variants: VCF, plain, gzip or bgzip.")],
    fasta: Annotated[Path, typer.Option("--fasta", help="The genome that the variants were called on.")],
    out: Annotated[str, typer.Option("--out", help="VCF to write; - for standard output.")] = "-",
    context: Annotated[Optional[str], typer.Option("--context", help="Bases in a window; default: as in training.")] = None,
    alias: Annotated[
        Optional[list[str]], typer.Option("--alias", help="VCFNAME=FASTANAME of a sequence that has another name there; may be repeated.")
    ] = None,
    skip_mismatches: Annotated[
        bool, typer.Option("--skip-mismatches", help="Leave variants whose REF is not the genome's without a score, instead of stopping.")
    ] = False,
    device: Device = "auto",
    overwrite: Overwrite = False,
    json_out: Json = None,
) -> None:
    """Score variants: the same VCF with INFO SEQLAB, log p(ALT) - log p(REF) in nats for each ALT.

    Example:  seqlab score runs/ecoli variants.vcf.gz --fasta ecoli.fa.gz --out scored.vcf
    """
    import itertools
    from collections import Counter

    from data_prep.variants import KEY, Record, mismatch, read_genome, read_vcf
    from seqlab.inference.variants import Variant, score_variants
    from tasks import runs

    check_one_takes_stdout(out, json_out, "VCF")
    if out.endswith((".gz", ".bgz", ".bcf")):
        raise UserError(f"--out {out}: is written as text; give a name that ends in .vcf and bgzip it")
    check_output_file(out, "--out", overwrite)
    aliases = {}
    for pair in alias or []:
        name, equals, other = pair.partition("=")
        if not (name and equals and other) or name in aliases:
            raise UserError(f"--alias {pair}: expected VCFNAME=FASTANAME, each once, for example --alias NC_000020.11=chr20")
        aliases[name] = other
    length = None if context is None else parse_context(context, "--context")
    device = resolve_device(device)
    loaded = runs.load_run(run, task="dna")
    length = length or (8192 if loaded.config.data.context == "whole" else loaded.config.data.context)
    total = Counter(item.chrom for item in read_vcf(vcf) if isinstance(item, Record))
    if not total:
        raise UserError(f"{vcf}: holds no variant")
    if not vcf.is_file():
        raise UserError(f"{vcf}: is read more than once; give a file, not a pipe")
    genome, renamed = read_genome(fasta, set(total), aliases)
    differ, first = 0, None
    for item in read_vcf(vcf):  # all of it, before anything is written
        if isinstance(item, Record) and (difference := mismatch(item, genome[item.chrom])) is not None:
            differ, first = differ + 1, first or difference
    if differ:
        told = f"{vcf}: {differ:,} of {total.total():,} variants have another REF than the genome, the first: {first}"
        if not skip_mismatches or differ == total.total():
            or_skip = "" if differ == total.total() else ", or leave these without a score: --skip-mismatches"
            raise UserError(f"{told}; give the genome that the variants were called on{or_skip}")
        note(f"{told}; they get no score")
    for name, other in renamed.items():
        note(f"{name} of the variants is {other} of {fasta}" + ("" if differ else ": every REF agrees"))

    def variant(record: Record) -> Variant:
        there = genome[record.chrom]
        scored = differ == 0 or mismatch(record, there) is None
        return Variant(there, record.start, record.ref, record.alts if scored else [None] * len(record.alts))

    added = f'##INFO=<ID={KEY},Number=A,Type=Float,Description="log p(ALT) - log p(REF) in nats, windows of {length} bases, seqlab">'
    alleles = scored = done = 0
    started = time.monotonic()
    bar, update = progress_bar("scoring", "variants", out=out)
    with text_output(out) as file, bar:
        items = read_vcf(vcf)
        while some := list(itertools.islice(items, 1024)):  # a large file is never held
            scores = score_variants(loaded.model, map(variant, filter(lambda item: isinstance(item, Record), some)), context=length, device=device)
            for item in some:
                if not isinstance(item, Record):
                    file.write(f"{added}\n{item}\n" if item.startswith("#CHROM\t") else f"{item}\n")
                    continue
                values = next(scores)
                file.write(item.line(values) + "\n")
                alleles, scored, done = alleles + len(values), scored + sum(v is not None for v in values), done + 1
                update(done, total.total())
    seconds = max(time.monotonic() - started, 1e-9)
    note(
        f"{scored:,} of {alleles:,} alleles of {done:,} variants scored, windows of {length:,} bases, in {seconds:.1f} s "
        f"({done / seconds:,.0f} variants/s) on the {device.upper()}."
    )
    if scored < alleles:
        only = "" if loaded.config.model.direction == "causal" else " A bidirectional model scores substitutions of up to 16 bases."
        note(f"Without a score: {alleles - scored:,} alleles that are no plain sequence of A, C, G, T, or on another symbol{' or REF' * bool(differ)}.{only}")
    summary = {"variants": done, "alleles": alleles, "scored": scored, "mismatches": differ, "context": length, "seconds": seconds, "device": device}
    emit(json_out, summary, human=lambda: None)
