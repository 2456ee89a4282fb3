"""run.json of a run: versions, machine, dataset, how it ended."""

import importlib.metadata
import json
import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch

import seqlab
from seqlab.errors import UserError
from seqlab.files import write_json


@dataclass(frozen=True)
class FitResult:
    """How a run ended. `best` is the validation metric of `checkpoints/best`."""

    steps: int
    minutes: float
    best: float
    best_step: int
    tokens: int
    tokens_per_second: float
    ended: str  # "finished", "stopped early" or "interrupted"


def write_run_facts(run_dir: Path, facts: dict) -> None:
    """run.json: versions, commit and whatever else is needed to say later how a number came about."""
    write_json(
        Path(run_dir) / "run.json",
        {
            "seqlab": seqlab.__version__,
            "git": git_commit(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "lightning": importlib.metadata.version("lightning"),
            "machine": machine(),
            **facts,
        },
    )


def read_run_facts(run_dir: Path) -> dict:
    path = Path(run_dir) / "run.json"
    try:
        facts = json.loads(path.read_text())
    except (OSError, ValueError):
        facts = None
    if not isinstance(facts, dict):
        raise UserError(f"{run_dir}: not a run directory (no readable run.json); give one that `seqlab train` wrote")
    return facts


def machine() -> str:
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def git_commit() -> str | None:
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=Path(seqlab.__file__).parent,
            capture_output=True,
            text=True,
            timeout=5,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip() or None if found.returncode == 0 else None
