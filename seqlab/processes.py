"""Which process this is when a run has several, whether it has a terminal, and what its files may be; from the environment
alone, so that it costs no import."""

import ctypes
import os
import signal
import sys
from typing import NamedTuple


class Launched(NamedTuple):
    """How many processes a launcher has started, one a device."""

    per_node: int
    nodes: int

    @property
    def world_size(self) -> int:
        return self.per_node * self.nodes


def launched() -> Launched | None:
    """What torchrun or Slurm's srun has started this process as part of; None: nothing but this process yet."""
    if "TORCHELASTIC_RUN_ID" in os.environ:  # first, because srun may have started torchrun
        per_node = int(os.environ["LOCAL_WORLD_SIZE"])
        return Launched(per_node, int(os.environ["WORLD_SIZE"]) // per_node)
    if is_srun():
        nodes = int(os.environ.get("SLURM_NNODES", 1))
        return Launched(int(os.environ["SLURM_NTASKS"]) // nodes, nodes)
    return None


def is_srun() -> bool:
    """Started by srun as one of several tasks (the rule of Lightning, which then takes ranks and addresses from Slurm)."""
    return int(os.environ.get("SLURM_NTASKS", 1)) > 1 and os.environ.get("SLURM_JOB_NAME") not in ("bash", "interactive")


def is_main_process() -> bool:
    """False in the extra processes that a run on several devices starts."""
    if "RANK" not in os.environ and is_srun():
        return int(os.environ["SLURM_PROCID"]) == 0
    return int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0"))) == 0


def end_with_parent() -> None:
    """In a process that the first one of its run started (`--devices`): end when that one does. One that waits for the others
    in NCCL would not notice for ten minutes. Linux only; with torchrun and Slurm nothing to do, they watch their processes."""
    if sys.platform == "linux" and launched() is None and not is_main_process():
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG; no milder signal reaches a process inside a collective


def at_terminal() -> bool:
    """Whether standard error is a terminal, on which a line may be drawn again. (rich says so too where FORCE_COLOR wants
    colours in the log of a machine.)"""
    return sys.stderr is not None and sys.stderr.isatty()


def usual_mode(mode: int) -> int:
    """0o666 or 0o777 less the umask: what a new file or folder would get. Those of tempfile are for their owner alone."""
    umask = os.umask(0)
    os.umask(umask)
    return mode & ~umask
