"""transformers' `MambaForCausalLM` (config.json + model.safetensors, model_type "mamba") and our causal model: the same function.

Names differ in one place: `backbone.embeddings.weight` there is `embedding.weight` here. The head is left out where it is tied.
"""

from pathlib import Path

from seqlab.config import from_dict
from seqlab.errors import UserError
from seqlab.interop.weights import load_weights, read_json, save_weights
from seqlab.model import LanguageModel, ModelConfig


def read_config(path: Path) -> ModelConfig:
    """config.json -> our config. Raises UserError for another model, or one that computes something else."""
    data = read_json(path, "transformers' Mamba")
    if data.get("model_type") != "mamba":
        raise UserError(f"{path}: model_type is {data.get('model_type')!r}, expected 'mamba'")
    if data.get("hidden_act", "silu") != "silu":
        raise UserError(f"{path}: hidden_act is {data['hidden_act']!r}; only silu is supported")
    for key in ("hidden_size", "num_hidden_layers", "vocab_size"):
        if key not in data:
            raise UserError(f"{path}: has no {key!r}; it is no config.json of a Mamba model")
    rank = data.get("time_step_rank", "auto")
    return from_dict(
        ModelConfig,
        dict(
            d_model=data["hidden_size"],
            n_layer=data["num_hidden_layers"],
            d_state=data.get("state_size", 16),
            d_conv=data.get("conv_kernel", 4),
            expand=data.get("expand", 2),
            dt_rank=None if rank == "auto" else rank,
            conv_bias=data.get("use_conv_bias", True),
            bias=data.get("use_bias", False),
            norm_epsilon=data.get("layer_norm_epsilon", 1e-5),
            vocab_size=data["vocab_size"],
            tie_embeddings=data.get("tie_word_embeddings", True),
        ),
        str(path),
    )


def load_transformers_mamba(directory: Path) -> LanguageModel:
    """The model in `directory`: token ids (b l) -> (logits (b l vocab), state). Raises UserError."""
    directory = Path(directory)
    model = LanguageModel(read_config(directory / "config.json"))
    load_weights(model, directory / "model.safetensors", _ours)
    return model


def check_plain(c: ModelConfig, whose: str) -> None:
    """UserError unless the model is a causal stack of selective blocks, which is all that others' Mamba is."""
    plain = ModelConfig(
        d_model=c.d_model, n_layer=c.n_layer, d_state=c.d_state, d_conv=c.d_conv, expand=c.expand, dt_rank=c.dt_rank, dt_min=c.dt_min,
        dt_max=c.dt_max, dt_init_floor=c.dt_init_floor, conv_bias=c.conv_bias, bias=c.bias, norm_epsilon=c.norm_epsilon,
        dropout=c.dropout, tie_projections=c.tie_projections, combine=c.combine, pool=c.pool, pool_expand=c.pool_expand,
        vocab_size=c.vocab_size, strand=c.strand, tie_embeddings=c.tie_embeddings,
    )  # fmt: skip
    if c != plain:
        raise UserError(
            f"export: {whose} is a causal stack of selective blocks; this model has another direction, architecture, block or head"
        )


def save_transformers_mamba(model: LanguageModel, directory: Path) -> None:
    """Write a directory that `transformers.MambaForCausalLM.from_pretrained` reads. Raises UserError for a model that is none."""
    check_plain(model.config, "transformers' Mamba")
    c = model.config
    config = {
        "architectures": ["MambaForCausalLM"],
        "model_type": "mamba",
        "hidden_size": c.d_model,
        "intermediate_size": c.d_inner,
        "num_hidden_layers": c.n_layer,
        "state_size": c.d_state,
        "conv_kernel": c.d_conv,
        "expand": c.expand,
        "time_step_rank": c.rank,
        "use_conv_bias": c.conv_bias,
        "use_bias": c.bias,
        "layer_norm_epsilon": c.norm_epsilon,
        "hidden_act": "silu",
        "residual_in_fp32": True,
        "vocab_size": c.vocab_size,
        "tie_word_embeddings": c.tie_embeddings,
        "torch_dtype": "float32",
    }
    save_weights(model, directory, config, _theirs)


def _ours(name: str) -> str:
    if name.startswith(("embeddings.", "layers.", "norm_f.")):  # a MambaModel, which has no head and says no `backbone`
        name = f"backbone.{name}"
    return {"backbone.embeddings.weight": "embedding.weight", "backbone.embedding.weight": "embedding.weight"}.get(name, name)


def _theirs(name: str) -> str:
    return {"embedding.weight": "backbone.embeddings.weight"}.get(name, name)
