"""`seqlab import` and `seqlab export`: other projects' checkpoints."""

from pathlib import Path
from typing import Annotated

import typer

from seqlab.errors import UserError
from tasks.commands.options import Json, Overwrite
from tasks.commands.terminal import emit, note, program, quoted
from tasks.run_directory import fresh_directory, no_empty_folder


def import_(
    source: Annotated[Path, typer.Argument(help="Folder with config.json and model.safetensors: Caduceus, or Mamba of transformers or mamba_ssm.")],
    out: Annotated[Path, typer.Option("--out", help="Run directory to write.")],
    overwrite: Overwrite = False,
    json_out: Json = None,
) -> None:
    """Make a run of a published DNA model, for score, embed, eval --data, and --init of train.

    Example:  seqlab import caduceus-ph_seqlen-131k_d_model-256_n_layer-16 --out runs/caduceus_ph
    """
    import dataclasses

    import torch

    from seqlab.config import dump_yaml
    from seqlab.files import write_text
    from seqlab.interop import caduceus, mamba_ssm, transformers_mamba
    from seqlab.interop.weights import read_json
    from seqlab.model import language_model
    from seqlab.tokenizers import nucleotide
    from seqlab.training.checkpoint import save_model
    from seqlab.training.facts import write_run_facts
    from tasks.dna import Config

    if not source.is_dir():
        raise UserError(f"{source}: no such folder; give the one that config.json and model.safetensors lie in")
    if not (source / "config.json").exists():
        is_run = (source / "run.json").is_file()
        advice = "is a run already; use it as it is" if is_run else "holds no config.json; give the folder that it and model.safetensors lie in"
        raise UserError(f"{source}: {advice}")
    data = read_json(source / "config.json", "a model's")
    kind = "mamba_ssm" if mamba_ssm.is_config(data) else data.get("model_type")
    if kind == "caduceus":
        config, complement, _ = caduceus.read_config(source / "config.json")
        if complement is not None and not torch.equal(complement, torch.from_numpy(nucleotide.COMPLEMENT.astype("int64"))):
            raise UserError(f"{source}: complement_map is not that of the vocabulary A 7, C 8, G 9, T 10; other symbols are not supported")
    elif kind == "mamba":
        config = transformers_mamba.read_config(source / "config.json")
    elif kind == "mamba_ssm":
        config = mamba_ssm.read_config(source / "config.json")
    else:
        raise UserError(f"{source}: model_type is {kind!r} in config.json; caduceus and mamba are known, and mamba_ssm's files without one")
    if not nucleotide.VOCAB_SIZE <= config.vocab_size <= nucleotide.PADDED_VOCAB_SIZE:
        raise UserError(f"{source}: vocab_size is {config.vocab_size:,}; a model of this DNA vocabulary has 12 to 16 symbols")
    load = {
        "caduceus": caduceus.load_caduceus, "mamba": transformers_mamba.load_transformers_mamba, "mamba_ssm": mamba_ssm.load_mamba_ssm,
    }[kind]  # fmt: skip
    with fresh_directory(out, overwrite, [source]):
        model = load(source)
        config = language_model(model).config
        text = dump_yaml(dataclasses.replace(Config(), model=config))
        facts = {"task": "dna", "imported": str(source.resolve()), "parameters": sum(p.numel() for p in language_model(model).parameters())}
        write_text(out / "config.yaml", text)
        write_run_facts(out, {**facts, "ended": "imported"})
        save_model(model, out / "checkpoints" / "best", text)

    def human() -> None:
        note(f"{out}: {config.direction} Mamba, {config.n_layer} layers of d_model {config.d_model}, {facts['parameters']:,} parameters")
        note(f"Next:  {program()} train classify --data DATASET --init {quoted(out)}")

    emit(json_out, {"run": str(out), **facts}, human=human)


def export(
    run: Annotated[Path, typer.Argument(help="Run directory or checkpoint of train dna.")],
    out: Annotated[Path, typer.Option("--out", help="Folder to write config.json and model.safetensors to.")],
    layout: Annotated[str, typer.Option("--layout", help="auto, or mamba_ssm: a causal model for its MambaLMHeadModel.")] = "auto",
    overwrite: Overwrite = False,
    json_out: Json = None,
) -> None:
    """Write a DNA model for other programs: a causal one for transformers' MambaForCausalLM or mamba_ssm, a bidirectional one as Caduceus.

    Example:  seqlab export runs/ecoli --out ecoli_hf
    """
    from seqlab.interop.caduceus import save_caduceus
    from seqlab.interop.mamba_ssm import save_mamba_ssm
    from seqlab.interop.transformers_mamba import save_transformers_mamba
    from seqlab.model import language_model
    from tasks import runs

    if layout not in ("auto", "mamba_ssm"):
        raise UserError(f"--layout {layout}: unknown; use auto or mamba_ssm")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; choose another --out")
    taken = [name for name in ("config.json", "model.safetensors", "pytorch_model.bin") if (out / name).exists()]
    if taken and not overwrite:
        raise UserError(f"{out / taken[0]}: exists; choose another --out, or add --overwrite")
    loaded = runs.load_run(run, task="dna")
    with no_empty_folder(out):
        if layout == "mamba_ssm":
            save_mamba_ssm(language_model(loaded.model), out)
            written = "mamba_ssm's MambaLMHeadModel"
        elif loaded.config.model.direction == "causal":
            save_transformers_mamba(language_model(loaded.model), out)
            written = "transformers' MambaForCausalLM"
        else:
            save_caduceus(loaded.model, out)
            written = "Caduceus"
    emit(json_out, {"folder": str(out), "layout": written}, human=lambda: note(f"{out}: config.json and model.safetensors, as {written} has them"))
