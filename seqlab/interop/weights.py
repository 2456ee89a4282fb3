"""Weights of another project's file into a model of ours, and the other way round: names and shapes checked, ties kept."""

import json
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from seqlab.errors import UserError
from seqlab.files import write_atomic, write_json
from seqlab.training.checkpoint import each_once


def read_json(path: Path, what: str) -> dict:
    """A config.json. Raises UserError for what is none."""
    try:
        data = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as {what} config.json ({str(error)[:80]})") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: is no {what} config.json; it holds no table")
    return data


def ssm_options(data: dict, path: Path) -> dict:
    """ssm_cfg of a config.json, empty if there is none. Raises UserError for another kind of layer than Mamba1."""
    ssm = data.get("ssm_cfg")
    if not isinstance(ssm, dict | None):
        raise UserError(f"{path}: ssm_cfg holds no table, but {ssm!r}")
    ssm = ssm or {}
    if (layer := ssm.get("layer", "Mamba1")) != "Mamba1":
        raise UserError(f"{path}: ssm_cfg.layer is {layer!r}; only Mamba1 is supported")
    return ssm


def padded_vocabulary(data: dict, path: Path) -> int:
    """vocab_size, rounded up to a multiple as those models do. Raises UserError."""
    sizes = {"vocab_size": data.get("vocab_size"), "pad_vocab_size_multiple": data.get("pad_vocab_size_multiple", 8)}
    for name, size in sizes.items():
        if type(size) is not int or size < 1:
            raise UserError(f"{path}: {name}: expected a whole number of 1 or more, got {size!r}")
    vocab, multiple = sizes.values()
    return vocab + -vocab % multiple


def load_weights(model: nn.Module, path: Path, rename: Callable[[str], str | None]) -> None:
    """The safetensors file into `model`; `rename`: a name there -> ours, None for what is no parameter. What is tied may be
    left out. Raises UserError."""
    pickled, index = path.with_name("pytorch_model.bin"), path.with_name(f"{path.name}.index.json")
    if not path.exists() and index.exists():
        raise UserError(f"{index}: the weights are in several files; save them in one: model.save_pretrained(folder, max_shard_size='100GB')")
    if not path.exists() and pickled.exists():
        raise UserError(
            f"{pickled}: is a pickle, which is not read; make a safetensors file of it: python -c \"import torch, safetensors.torch as s; "
            f"s.save_file({{k: v.clone() for k, v in torch.load('{pickled}', weights_only=True).items()}}, '{path}')\""
        )
    try:
        stored = load_file(path)
    except Exception as error:
        raise UserError(f"{path}: cannot be read ({str(error)[:80]})") from None
    weights = {name: tensor for old, tensor in stored.items() if (name := rename(old)) is not None}
    own = model.state_dict()
    for name, tensor in weights.items():
        if name not in own or own[name].shape != tensor.shape:
            seen = list(own[name].shape) if name in own else "absent"
            raise UserError(f"{path}: {name} is {list(tensor.shape)} there and {seen} in a model of its config.json")
    pointers = {own[name].data_ptr() for name in weights}
    absent = [name for name, tensor in own.items() if tensor.data_ptr() not in pointers]
    if absent:
        raise UserError(f"{path}: lacks {absent[0]}; the file is damaged or of another model")
    model.load_state_dict(weights, strict=False)


def save_weights(
    model: nn.Module, directory: Path, config: dict, rename: Callable[[str], str], buffers: dict[str, Tensor] | None = None
) -> None:
    """config.json and model.safetensors, each tied tensor once, under the names that `rename` makes of ours; `buffers` beside
    them, under theirs."""
    weights = {name: buffer.clone() for name, buffer in (buffers or {}).items()}
    weights |= {rename(name): tensor for name, tensor in each_once(model).items()}
    write_atomic(Path(directory) / "model.safetensors", lambda temporary: save_file(weights, temporary, metadata={"format": "pt"}))
    write_json(Path(directory) / "config.json", config)
