"""Read released Caduceus checkpoints (config.json + model.safetensors) into our model, without remote code.

What the released files do that a loader must know:
- Tied tensors are left out (in_proj and out_proj of the reverse direction, the head): they are tied again here.
- Caduceus-PS was trained with a fused add-norm that swaps the two halves of the channels before every block, without a
  flip (not before the final norm). The swap is part of the function those weights compute; it cannot be seen in any
  equivariance test. `fused_add_norm: false` checkpoints do not have it.
- `complement_map` has string keys, in any order; it is read by key.
- `bidirectional` may be the string "true,".
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from seqlab.errors import UserError
from seqlab.model import ModelConfig, build_model, language_model


def read_config(path: Path) -> tuple[ModelConfig, Tensor | None, bool]:
    """config.json -> (our config, complement (vocab) or None, whether the halves are swapped). Raises UserError."""
    try:
        data = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as a Caduceus config.json ({str(error)[:80]})") from None
    if data.get("model_type") != "caduceus":
        raise UserError(f"{path}: model_type is {data.get('model_type')!r}, expected 'caduceus'")
    ssm = data.get("ssm_cfg") or {}
    vocab = data["vocab_size"]
    multiple = data.get("pad_vocab_size_multiple", 8)
    vocab += -vocab % multiple
    rcps = _truth(data.get("rcps", False))
    rank = ssm.get("dt_rank", "auto")
    if not _truth(data.get("rms_norm", True)):
        raise UserError(f"{path}: rms_norm false (LayerNorm) is not supported; the released models use RMSNorm")
    config = ModelConfig(
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
        combine="add" if data.get("bidirectional_strategy", "add") in (None, "add") else "multiply",
        vocab_size=vocab,
        strand="equivariant" if rcps else "augment",
    )
    complement = None
    if data.get("complement_map"):
        complement = torch.arange(vocab)
        for key, value in data["complement_map"].items():
            if int(key) < vocab:
                complement[int(key)] = int(value)
        if not torch.equal(complement[complement], torch.arange(vocab)):
            raise UserError(f"{path}: complement_map is not an involution; the file is damaged")
    return config, complement, rcps and _truth(data.get("fused_add_norm", True))


def load_caduceus(directory: Path) -> nn.Module:
    """The released model in `directory`: token ids (b l) -> (logits (b l vocab), None). Raises UserError."""
    directory = Path(directory)
    config, complement, swaps_halves = read_config(directory / "config.json")
    model = build_model(config, complement)
    path = directory / "model.safetensors"
    try:
        stored = load_file(path)
    except Exception as error:
        raise UserError(f"{path}: cannot be read ({str(error)[:80]})") from None
    weights = {name: tensor for old, tensor in stored.items() if (name := _rename(old)) is not None}
    inner = language_model(model)
    own = inner.state_dict()
    for name, tensor in weights.items():
        if name not in own or own[name].shape != tensor.shape:
            seen = list(own[name].shape) if name in own else "absent"
            raise UserError(f"{path}: {name} is {list(tensor.shape)} there and {seen} in a model of its config.json")
    pointers = {own[name].data_ptr() for name in weights}
    absent = [name for name, tensor in own.items() if tensor.data_ptr() not in pointers]
    if absent:
        raise UserError(f"{path}: lacks {absent[0]}; the file is damaged or of another model")
    inner.load_state_dict(weights, strict=False)
    if swaps_halves:
        for layer in inner.backbone.layers:
            layer.register_forward_pre_hook(_swap_halves)
    return model


def _swap_halves(layer: nn.Module, arguments: tuple) -> tuple:
    """The fused add-norm's exchange of the channel halves, in our layout: two batch halves, each in its own frame.

    In the published layout the second half of the channels is the other strand's row flipped along length and channels;
    exchanging the halves there is exchanging the rows here and flipping both.
    """
    forward_strand, reverse_strand = arguments[0].chunk(2)
    return torch.cat([reverse_strand.flip(1, 2), forward_strand.flip(1, 2)]), *arguments[1:]


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
