"""Read and write Caduceus checkpoints (config.json + model.safetensors), without remote code.

What the released files do that a loader must know:
- Tied tensors are left out (in_proj and out_proj of the reverse direction, the head): they are tied again here.
- Caduceus-PS was trained with a fused add-norm that swaps the two halves of the channels before every block, without a
  flip (not before the final norm). The swap is part of the function those weights compute; it cannot be seen in any
  equivariance test. `fused_add_norm: false` checkpoints do not have it. Here it becomes an arrangement of the weights,
  and the model an ordinary equivariant one (`_arrange`).
- `complement_map` has string keys, in any order; it is read by key.
- `bidirectional` may be the string "true,".
"""

import dataclasses
from pathlib import Path

import torch
from torch import Tensor, nn

from seqlab.config import from_dict
from seqlab.errors import UserError
from seqlab.interop.weights import load_weights, padded_vocabulary, read_json, save_weights, ssm_options
from seqlab.model import LanguageModel, ModelConfig, build_model, language_model
from seqlab.tokenizers.nucleotide import COMPLEMENT

STRATEGIES = {None: "add", "add": "add", "ew_multiply": "multiply"}
"""bidirectional_strategy -> our `combine`."""


def read_config(path: Path) -> tuple[ModelConfig, Tensor | None, bool]:
    """config.json -> (our config, complement (vocab) or None, whether the halves are swapped). Raises UserError."""
    data = read_json(path, "a Caduceus")
    if data.get("model_type") != "caduceus":
        raise UserError(f"{path}: model_type is {data.get('model_type')!r}, expected 'caduceus'")
    for key in ("vocab_size", "d_model", "n_layer"):
        if not isinstance(data.get(key), int):
            raise UserError(f"{path}: has no {key!r}; it is no config.json of a Caduceus model")
    ssm, vocab = ssm_options(data, path), padded_vocabulary(data, path)
    rcps = _truth(data.get("rcps", False))
    rank = ssm.get("dt_rank", "auto")
    if not _truth(data.get("rms_norm", True)):
        raise UserError(f"{path}: rms_norm false (LayerNorm) is not supported; the released models use RMSNorm")
    strategy = data.get("bidirectional_strategy", "add")
    if strategy not in STRATEGIES:
        raise UserError(f"{path}: bidirectional_strategy is {strategy!r}; allowed: 'add', 'ew_multiply'")
    config = from_dict(
        ModelConfig,
        dict(
            d_model=data["d_model"],
            n_layer=data["n_layer"],
            direction="bidirectional" if _truth(data.get("bidirectional", True)) else "causal",
            d_state=ssm.get("d_state", 16),
            d_conv=ssm.get("d_conv", 4),
            expand=ssm.get("expand", 2),
            dt_rank=None if rank == "auto" else rank,
            conv_bias=ssm.get("conv_bias", True),
            bias=ssm.get("bias", False),
            norm_epsilon=data.get("norm_epsilon", 1e-5),
            tie_projections=_truth(data.get("bidirectional_weight_tie", True)),
            combine=STRATEGIES[strategy],
            vocab_size=vocab,
            strand="equivariant" if rcps else "augment",
        ),
        str(path),
    )
    complement = None
    if data.get("complement_map"):
        complement = torch.arange(vocab)
        try:
            for key, value in data["complement_map"].items():
                if int(key) < vocab:
                    complement[int(key)] = int(value)
            is_involution = torch.equal(complement[complement], torch.arange(vocab))
        except (AttributeError, TypeError, ValueError, IndexError):
            is_involution = False
        if not is_involution:
            raise UserError(f"{path}: complement_map is not an involution; the file is damaged")
    elif rcps:
        raise UserError(f"{path}: rcps is true and there is no complement_map; the file is damaged")
    return config, complement, rcps and _truth(data.get("fused_add_norm", True))


def load_caduceus(directory: Path) -> nn.Module:
    """The released model in `directory`: token ids (b l) -> (logits (b l vocab), None). Raises UserError."""
    directory = Path(directory)
    config, complement, swaps_halves = read_config(directory / "config.json")
    model = build_model(config, complement)
    load_weights(language_model(model), directory / "model.safetensors", _rename)
    if swaps_halves:
        _arrange(language_model(model), model.complement)
    return model


def save_caduceus(model: nn.Module, directory: Path) -> None:
    """Write a bidirectional language model (as `build_model` makes it) in the published layout: Caduceus-PS without the swap
    of halves if it is equivariant, else Caduceus-Ph. Raises UserError for a model that is neither."""
    inner = language_model(model)
    c = inner.config
    if c.direction != "bidirectional" or c.architecture != "isotropic" or set(c.blocks) != {"s6"} or not c.tie_embeddings:
        raise UserError("export: Caduceus is a bidirectional stack of selective blocks with a tied head; this model is not")
    equivariant = c.strand == "equivariant"
    complement = model.complement if equivariant else torch.from_numpy(COMPLEMENT.astype("int64"))
    config = {
        "architectures": ["CaduceusForMaskedLM"],
        "model_type": "caduceus",
        "d_model": c.d_model,
        "n_layer": c.n_layer,
        "vocab_size": c.vocab_size,
        "pad_vocab_size_multiple": 1,
        "ssm_cfg": {
            "d_state": c.d_state, "d_conv": c.d_conv, "expand": c.expand, "dt_rank": c.rank, "conv_bias": c.conv_bias, "bias": c.bias,
        },
        "rms_norm": True,
        "residual_in_fp32": False,
        "fused_add_norm": False,
        "norm_epsilon": c.norm_epsilon,
        "bidirectional": True,
        "bidirectional_strategy": "add" if c.combine == "add" else "ew_multiply",
        "bidirectional_weight_tie": c.tie_projections,
        "rcps": equivariant,
        "complement_map": {str(i): int(other) for i, other in enumerate(complement[: c.vocab_size])},
    }  # fmt: skip
    words = "caduceus.backbone.embeddings.word_embeddings"

    def rename(name: str) -> str:
        if not equivariant:
            return f"{words}.weight" if name == "embedding.weight" else f"caduceus.{name}"
        if name == "embedding.weight":
            return f"{words}.embedding.weight"
        for wrapped in (".mixer.", ".norm.", ".norm_f."):  # without the fused add-norm, norms are wrapped as mixers are
            name = name.replace(wrapped, f"{wrapped}submodule.")
        return f"caduceus.{name}"

    buffers = {f"{words}.complement_map": complement, "lm_head.complement_map": complement} if equivariant else {}
    save_weights(inner, directory, config, rename, buffers)


@torch.no_grad()
def _arrange(model: LanguageModel, complement: Tensor) -> None:
    """Weights of blocks that the strands are swapped before -> weights that compute the same without a swap.

    In our layout the strands are two rows p, q, each in its own frame, and the swap before a block b is (p, q) -> (F q, F p),
    where F turns a row around along length and channels. F F = 1, so a swap moves through a block, and two of them cancel:

        b2(swap(b1(swap(p, q)))) = b2(F b1(F p)), b2(F b1(F q))

    Every row keeps to itself, and F b F is b with its directions exchanged and its channels in the opposite order. After an
    odd number of blocks one swap is left: then the features are the other strand's turned around, and the head, which can no
    longer be the embedding, turns them back (the released models have 4 and 16 blocks).
    """
    for layer in model.backbone.layers[::2]:
        mixer = layer.mixer
        mixer.mamba_fwd, mixer.mamba_rev = mixer.mamba_rev, mixer.mamba_fwd
        layer.norm.weight.copy_(layer.norm.weight.flip(0))
        both = mixer.mamba_fwd, mixer.mamba_rev
        for weight in {m.in_proj.weight for m in both}:  # tied: one
            weight.copy_(weight.flip(1))
        for parameter in {p for m in both for p in m.out_proj.parameters()}:
            parameter.copy_(parameter.flip(0))
    if len(model.backbone.layers) % 2:
        model.backbone.norm_f.weight.copy_(model.backbone.norm_f.weight.flip(0))
        model.lm_head.weight = nn.Parameter(model.lm_head.weight[complement].flip(1))
        model.config = dataclasses.replace(model.config, tie_embeddings=False)


def _rename(name: str) -> str | None:
    """A published parameter name -> ours; None for what is not a parameter."""
    if name.endswith("complement_map"):
        return None
    for prefix in ("model.", "caduceus."):
        name = name.removeprefix(prefix)
    name = name.replace(".submodule", "").replace("lm_head.lm_head", "lm_head")
    return name.replace("backbone.embeddings.word_embeddings.embedding", "embedding").replace(
        "backbone.embeddings.word_embeddings", "embedding"
    )


def _truth(value: object) -> bool:
    return value if isinstance(value, bool) else str(value).strip(" ,").lower() == "true"
