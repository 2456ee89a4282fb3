"""`seqlab generate`: sound or DNA drawn from a trained model."""

import json
from pathlib import Path
from typing import Annotated, Optional

import typer

from seqlab.errors import UserError
from tasks.commands.options import Backend, Device, Json, Overwrite, check_decoder, resolve_device
from tasks.commands.terminal import (
    check_one_takes_stdout,
    check_output_file,
    command,
    emit,
    note,
    print_table,
    program,
    progress_bar,
    quoted,
    text_output,
)

group = typer.Typer(no_args_is_help=True, help="Make sequences with a trained model.")


@command(group, "audio")
def generate_audio(
    run: Annotated[Optional[Path], typer.Argument(help="Run directory or checkpoint; with --resume it is known.")] = None,
    out: Annotated[str, typer.Option("--out", help="Folder for the WAV files; - for raw PCM on standard output.")] = "samples",
    seconds: Annotated[float, typer.Option("--seconds", help="Length of each sample, without the prompt.")] = 10.0,
    num: Annotated[int, typer.Option("--num", help="How many samples.")] = 1,
    prompt: Annotated[Optional[Path], typer.Option("--prompt", help="A recording to continue.")] = None,
    prompt_start: Annotated[float, typer.Option("--prompt-start", help="Second at which the prompt begins.")] = 0.0,
    prompt_seconds: Annotated[Optional[float], typer.Option("--prompt-seconds", help="Length of the prompt.")] = None,
    with_prompt: Annotated[bool, typer.Option("--with-prompt", help="Write the prompt before its continuation.")] = False,
    class_: Annotated[
        Optional[list[str]], typer.Option("--class", help="Class to make; repeated: in turn; `all`: every one in turn.")
    ] = None,
    temperature: Annotated[float, typer.Option("--temperature", help="1: as learned; 0: always the likeliest.")] = 1.0,
    top_k: Annotated[int, typer.Option("--top-k", help="Draw among so many likeliest codes; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option("--top-p", help="Draw among the likeliest codes of this probability.")] = 1.0,
    guidance: Annotated[float, typer.Option("--guidance", help="Above 0: follow --class more closely than learned.")] = 0.0,
    hold: Annotated[
        Optional[float],
        typer.Option("--hold", help="0 to 1: how much the whole past keeps level and spectrum where they were; by default what the run's config says."),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the draws.")] = 0,
    rank: Annotated[Optional[int], typer.Option("--rank", help="Make so many and keep the --num likeliest.")] = None,
    rank_by: Annotated[
        str, typer.Option("--rank-by", help="likelihood, or class: the model's own belief in the class asked for.")
    ] = "likelihood",
    runaway: Annotated[str, typer.Option("--runaway", help="What has run away: mark it, or resample it.")] = "mark",
    batch: Annotated[int, typer.Option("--batch", "--batch-size", help="Samples made side by side.")] = 256,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the unfinished generation in --out.")] = False,
    device: Device = "auto",
    backend: Backend = "auto",
    overwrite: Overwrite = False,
    json_out: Json = None,
) -> None:
    """Make sound with a trained model: WAV files that grow while you listen, likelihoods, a contact sheet.

    Example:  seqlab generate audio runs/digits --seconds 1 --num 20 --class all --out digits/
    """
    from tasks import audio, audio_generation, runs

    device = resolve_device(device)
    check_decoder(backend)
    to_stdout = out == "-"
    if to_stdout and (num != 1 or rank is not None or resume or json_out == "-"):
        raise UserError("--out -: one sample goes to standard output; leave out --num, --rank, --resume and --json -")
    folder = Path(out)
    asked = {
        "seconds": seconds, "num": num, "prompt": None if prompt is None else str(prompt.resolve()), "prompt_start": prompt_start,
        "prompt_seconds": prompt_seconds, "with_prompt": with_prompt, "classes": tuple(class_ or ()), "temperature": temperature,
        "top_k": top_k, "top_p": top_p, "guidance": guidance, "hold": hold, "seed": seed, "candidates": rank, "rank_by": rank_by,
        "runaway": runaway, "batch": batch,
    }  # fmt: skip
    if resume:
        usual, called = audio_generation.Settings(), {"classes": "class", "candidates": "rank"}
        given = [called.get(name, name).replace("_", "-") for name, value in asked.items() if value != getattr(usual, name)]
        if given:
            raise UserError(f"--resume: goes on with the settings that it was stopped with; leave out --{', --'.join(given)}")
        audio_generation.load_state(folder)
        checkpoint, settings = audio_generation.load_settings(folder)
        checkpoint = run or checkpoint
    else:
        if run is None:
            raise UserError("which run? give the directory that `seqlab train audio` wrote")
        checkpoint, settings = run, audio_generation.Settings(**asked)
    loaded = runs.load_run(checkpoint, task=audio.NAME)
    if settings.classes == ("all",):
        import dataclasses

        if not loaded.config.sound.labels:
            raise UserError("--class all: this run was trained without classes; prepare data with --label-from")
        settings = dataclasses.replace(settings, classes=loaded.config.sound.labels)
    bar, update = progress_bar("generating", "x real time", suffix="")
    generator = audio_generation.Generator(loaded, settings, device, backend, update)
    if not to_stdout and not resume:
        audio_generation.check_sample_folder(folder, overwrite)
    with bar:
        if to_stdout:
            outcome = generator.to_pcm(audio_generation.write_to_stdout)
        else:
            outcome = generator.to_folder(folder, resume)
    if not outcome.finished:
        note(f"Stopped after {outcome.seconds_of_sound:.1f} s of sound; saved. Go on with:  "
             f"{program()} generate audio --resume --out {quoted(folder)}")  # fmt: skip
        raise typer.Exit(130)
    sound = f"{outcome.seconds_of_sound:,.1f} s of sound in {outcome.wall_seconds:,.1f} s"
    decoder = f"{outcome.backend} decoder on {device}" if outcome.backend else "nothing was left to make"
    speed = f"{outcome.real_time_factor:,.1f} x real time in all ({decoder})"
    if to_stdout:
        note(f"{sound}: {speed}. Played with:  aplay -f S16_LE -c 1 -r {outcome.sample_rate}")
        return

    def human() -> None:
        rows = [
            [row["file"], row["class"] or "-", f"{row['log_likelihood']:,.0f}", f"{row['bits_per_sample']:.3f}",
             ", ".join(f"{name} from {at:.1f} s" for name, at in row["marks"].items()) or "-"]
            for row in outcome.rows
        ]  # fmt: skip
        print_table(f"{folder}: {len(rows)} samples", ["file", "class", "log-likelihood", "bits/sample", "ran away"], rows)
        note(f"{sound}: {speed}. Contact sheet: {folder / 'contact_sheet.png'}")

    emit(json_out, json.loads((folder / "generation.json").read_text()), human=human)


@command(group, "dna")
def generate_dna(
    run: Annotated[Path, typer.Argument(help="Run directory or checkpoint of a causal model.")],
    out: Annotated[str, typer.Option("--out", help="FASTA file to write; - for standard output.")] = "-",
    length: Annotated[int, typer.Option("--length", help="Bases of each sequence, without the prompt.")] = 1000,
    num: Annotated[int, typer.Option("--num", help="How many sequences.")] = 1,
    prompt: Annotated[str, typer.Option("--prompt", help="Bases to go on from, or a FASTA file that holds them.")] = "",
    temperature: Annotated[float, typer.Option("--temperature", help="1: as learned; 0: always the likeliest.")] = 1.0,
    top_k: Annotated[int, typer.Option("--top-k", help="Draw among so many likeliest bases; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option("--top-p", help="Draw among the likeliest bases of this probability.")] = 1.0,
    seed: Annotated[int, typer.Option("--seed", help="Of the draws.")] = 0,
    batch: Annotated[int, typer.Option("--batch", "--batch-size", help="Sequences made side by side.")] = 256,
    device: Device = "auto",
    backend: Backend = "auto",
    overwrite: Overwrite = False,
    json_out: Json = None,
) -> None:
    """Draw DNA from a causal model: A, C, G and T only, with the log-likelihood of each sequence.

    Example:  seqlab generate dna runs/dna_demo --length 2000 --num 4 --prompt ATGAAACGC --out drawn.fa
    """
    from seqlab.ops.decode import Sampling
    from tasks import dna_generation, runs

    device = resolve_device(device)
    check_decoder(backend)
    check_output_file(out, "--out", overwrite)
    check_one_takes_stdout(out, json_out, "FASTA")
    try:
        sampling = Sampling(temperature, top_k, top_p, seed)
    except ValueError as error:
        raise UserError(f"--{str(error).replace('_', '-', 1)}") from None
    loaded = runs.load_run(run, task="dna")
    prompt = _bases_or_file(prompt)
    bar, update = progress_bar("generating", "k bases", 1e3)
    with bar:
        sequences, seconds, used = dna_generation.generate(
            loaded, length=length, num=num, prompt=prompt, sampling=sampling, device=device, backend=backend, batch=batch,
            progress=update,
        )  # fmt: skip
    with text_output(out) as file:
        file.write("".join(sequence.fasta() for sequence in sequences))
    rate = length * num / max(seconds, 1e-9)
    done = f"{num} sequences of {length:,} bases in {seconds:.1f} s: {rate:,.0f} bases/s ({used} decoder on {device})"
    facts = {"seconds": seconds, "bases_per_second": rate, "backend": used, "device": device}
    emit(json_out, {**facts, "sequences": [vars(sequence) for sequence in sequences]}, human=lambda: note(done))


def _bases_or_file(prompt: str) -> str:
    """A prompt as it is, or the one sequence of the file that it names: a command line has no room for long ones."""
    import itertools

    from data_prep.records import read_records
    from seqlab.tokenizers import nucleotide

    try:
        if set(prompt.upper()) <= set("ACGTUN") or not Path(prompt).is_file():
            return prompt
    except OSError:  # too long for a name
        return prompt
    records = list(itertools.islice(read_records(prompt), 2))
    if len(records) > 1:
        raise UserError(f"--prompt {prompt}: holds several sequences; give a file with the one to go on from")
    return nucleotide.decode(records[0][1])
