"""mamba_ssm's `MambaLMHeadModel` (config.json + weights, no model_type) and our causal model: the same function.

Names differ in one place: `backbone.embedding.weight` there is `embedding.weight` here. `MambaLMHeadModel.from_pretrained` reads
`pytorch_model.bin`, a pickle, and wants the tied head in it too; it is written beside the safetensors file and never read.
"""

from pathlib import Path

import torch

from seqlab.config import from_dict
from seqlab.errors import UserError
from seqlab.files import write_atomic
from seqlab.interop.transformers_mamba import check_plain
from seqlab.interop.weights import load_weights, padded_vocabulary, read_json, save_weights, ssm_options
from seqlab.model import LanguageModel, ModelConfig


def is_config(data: dict) -> bool:
    """Whether a config.json is mamba_ssm's, which does not say so."""
    return "model_type" not in data and {"d_model", "n_layer", "vocab_size"} <= data.keys()


def read_config(path: Path) -> ModelConfig:
    """config.json -> our config. Raises UserError for another model, or one that computes something else."""
    data = read_json(path, "mamba_ssm's")
    if not is_config(data):
        raise UserError(f"{path}: is no config.json of mamba_ssm, which has d_model, n_layer and vocab_size and no model_type")
    for key, plain in (("rms_norm", True), ("d_intermediate", 0), ("attn_layer_idx", [])):
        if data.get(key, plain) != plain:
            raise UserError(f"{path}: {key} is {data[key]!r}; a stack of Mamba blocks with RMSNorm has {plain!r}")
    ssm = ssm_options(data, path)
    rank = ssm.get("dt_rank", "auto")
    return from_dict(
        ModelConfig,
        dict(
            d_model=data["d_model"],
            n_layer=data["n_layer"],
            d_state=ssm.get("d_state", 16),
            d_conv=ssm.get("d_conv", 4),
            expand=ssm.get("expand", 2),
            dt_rank=None if rank == "auto" else rank,
            conv_bias=ssm.get("conv_bias", True),
            bias=ssm.get("bias", False),
            vocab_size=padded_vocabulary(data, path),
            tie_embeddings=data.get("tie_embeddings", True),
        ),
        str(path),
    )


def load_mamba_ssm(directory: Path) -> LanguageModel:
    """The model in `directory`: token ids (b l) -> (logits (b l vocab), state). Raises UserError."""
    directory = Path(directory)
    model = LanguageModel(read_config(directory / "config.json"))
    load_weights(model, directory / "model.safetensors", _ours)
    return model


def save_mamba_ssm(model: LanguageModel, directory: Path) -> None:
    """Write a directory that `MambaLMHeadModel.from_pretrained` reads. Raises UserError for a model that is none."""
    check_plain(model.config, "mamba_ssm's MambaLMHeadModel")
    c, directory = model.config, Path(directory)
    if c.norm_epsilon != ModelConfig.norm_epsilon:
        raise UserError(f"export: mamba_ssm's config.json has no place for norm_epsilon {c.norm_epsilon}; there it is {ModelConfig.norm_epsilon}")
    config = {
        "d_model": c.d_model,
        "d_intermediate": 0,
        "n_layer": c.n_layer,
        "vocab_size": c.vocab_size,
        "ssm_cfg": {
            "layer": "Mamba1", "d_state": c.d_state, "d_conv": c.d_conv, "expand": c.expand, "dt_rank": c.rank, "conv_bias": c.conv_bias,
            "bias": c.bias,
        },
        "attn_layer_idx": [],
        "attn_cfg": {},
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": 1,
        "tie_embeddings": c.tie_embeddings,
    }  # fmt: skip
    save_weights(model, directory, config, _theirs)
    whole = {_theirs(name): tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    write_atomic(directory / "pytorch_model.bin", lambda temporary: torch.save(whole, temporary))


def _ours(name: str) -> str:
    return {"backbone.embedding.weight": "embedding.weight"}.get(name, name)


def _theirs(name: str) -> str:
    return {"embedding.weight": "backbone.embedding.weight"}.get(name, name)
