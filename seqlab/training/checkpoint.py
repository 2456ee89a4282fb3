"""Run directories and checkpoints.

    RUN/config.yaml                     the resolved configuration, and nothing else is needed to load the model
    RUN/manifest.json                   the dataset's manifest (its hash is in run.json)
    RUN/run.json                        versions, git commit, dataset path and hash, state of the run
    RUN/metrics.csv                     one row a logged step
    RUN/checkpoints/best/               model.safetensors + config.yaml: lowest validation loss
    RUN/checkpoints/last/               the same, and trainer.pt: everything `--resume` needs, in one file
    RUN/plots/*.png, RUN/report.md

Every file is replaced by rename (seqlab/files.py). Only `trainer.pt` is read for resuming and only `model.safetensors` for
anything else, so no pair of files has to be consistent.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from seqlab.errors import UserError
from seqlab.files import write_atomic, write_text


def each_once(model: nn.Module) -> dict[str, Tensor]:
    """The model's tensors on the CPU; what is tied under its first name alone, since the model ties it again by itself."""
    weights, seen = {}, set()
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in seen or not tensor.numel():
            seen.add(tensor.data_ptr())
            weights[name] = tensor.detach().contiguous().cpu()
    return weights


def save_model(model: nn.Module, directory: Path, config_text: str, **notes: str) -> None:
    """Weights as safetensors, tied tensors once, with the config beside them; `notes` go into the file's metadata."""
    weights = each_once(model)
    write_text(directory / "config.yaml", config_text)
    write_atomic(
        directory / "model.safetensors",
        lambda temporary: save_file(weights, temporary, metadata={"format": "pt", "writer": "seqlab", **notes}),
    )


def read_notes(path: Path) -> dict[str, str]:
    """The metadata of a model.safetensors that `save_model` wrote."""
    with safe_open(path, "pt") as file:
        return file.metadata() or {}


class OtherModel(UserError):
    """A checkpoint's weights are not those of the model at hand; `what` differs."""

    def __init__(self, path: Path, what: str):
        super().__init__(f"{path}: {what}; it belongs to another model, use the config that it was trained with")
        self.what = what


def load_model(model: nn.Module, path: Path) -> None:
    """Load `model.safetensors` strictly: every weight present, every shape equal. Raises what `check_model` raises.

    A module may name parts of itself in `may_be_absent`: parts that checkpoints older than them lack, and that change
    nothing as they are made.
    """
    check_model(model, path)
    with _whole(path):
        weights = load_file(path)
    model.load_state_dict(weights, strict=False)


def check_model(model: nn.Module, path: Path) -> None:
    """Whether `load_model` could, by the names and shapes at the file's beginning: no weight is read.

    Raises:
        UserError: no such file, or none that is whole.
        OtherModel: the weights of another model.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint; give a run directory that `seqlab train` has written")
    with _whole(path), safe_open(path, "pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}
    own = model.state_dict()
    for name, shape in shapes.items():
        if name not in own:
            raise OtherModel(path, f"{name} is there and not in this model")
        if list(own[name].shape) != shape:
            raise OtherModel(path, f"{name} is {shape} there and {list(own[name].shape)} in this model")
    pointers = {own[name].data_ptr() for name in shapes}
    absent = [name for name, tensor in own.items() if tensor.data_ptr() not in pointers and tensor.numel()]
    newer = tuple(
        f"{name}.{part}.".lstrip(".") for name, module in model.named_modules() for part in getattr(module, "may_be_absent", ())
    )
    absent = [name for name in absent if not name.startswith(newer)]
    if absent:
        more = f" (and {len(absent) - 1} more)" if len(absent) > 1 else ""
        raise OtherModel(path, f"{absent[0]}{more} is in this model and not there")


@contextlib.contextmanager
def _whole(path: Path) -> Iterator[None]:
    """Safetensors' own complaints about a file, in our words."""
    try:
        yield
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path}: damaged or not a safetensors file ({str(error)[:80]}); use another checkpoint") from None
