"""trainer.pt: what `--resume` needs beside the weights."""

from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO

from seqlab.errors import UserError
from seqlab.files import write_atomic


class AtomicCheckpointIO(CheckpointIO):
    """Lightning's trainer state in one file, written atomically and read with `weights_only=True`."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        write_atomic(Path(path), lambda temporary: torch.save(checkpoint, temporary))

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        if not Path(path).is_file():
            raise UserError(f"{path}: nothing to resume; the run has not saved a checkpoint yet, start it again")
        try:
            return torch.load(path, map_location=map_location or "cpu", weights_only=True)
        except Exception as error:  # torch raises a dozen kinds for a damaged file
            reason = str(error).splitlines()[0][:80] if str(error) else type(error).__name__
            weights = Path(path).with_name("model.safetensors")
            raise UserError(f"{path}: damaged trainer state ({reason}); start a new run from its weights: --init {weights}") from None

    def remove_checkpoint(self, path: Any) -> None:
        Path(path).unlink(missing_ok=True)
