"""Where a new run goes, and how what is there already is treated."""

import contextlib
import datetime
import os
import shutil
from pathlib import Path

from seqlab.errors import UserError
from seqlab.processes import is_main_process, launched


def default_run_dir(name: str) -> Path:
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    return Path("runs") / f"{name}-{stamp}"


def newest_run() -> Path:
    runs = sorted(Path("runs").glob("*/run.json"), key=lambda path: path.stat().st_mtime)
    if not runs:
        raise UserError("--resume: no run under runs/; name it with --out DIR")
    return runs[-1].parent


def check_new_directory(path: Path, overwrite: bool) -> None:
    """UserError unless `path` can become a new directory (or --overwrite says it may be replaced)."""
    # a process that was killed while it prepared the data of a run leaves that half-done, under a hidden name, and nothing else
    if path.exists() and (not path.is_dir() or any(not entry.match(".*.partial") for entry in path.iterdir())):
        if not overwrite:
            raise UserError(f"{path}: already used; choose another --out, continue with --resume, or add --overwrite")
        if not path.is_dir() or not (path / "run.json").exists():
            raise UserError(f"{path}: not a run directory, so --overwrite will not remove it; choose another --out")
    parent = path
    while not parent.exists():
        parent = parent.parent
    if not os.access(parent, os.W_OK):
        raise UserError(f"{path}: {parent} is not writable; choose another --out")


def new_run_directory(name: str, out: Path | None) -> Path:
    """Where a new run goes: --out, or runs/NAME-TIME; every process of a run on several devices gets the same answer."""
    if out is not None:
        return out
    if "SEQLAB_RUN_DIR" in os.environ and not is_main_process():
        return Path(os.environ["SEQLAB_RUN_DIR"])  # an extra process of a run on several devices
    if launched():
        raise UserError("torchrun or srun: give --out DIR, so that all processes agree on the run directory")
    run_dir = default_run_dir(Path(name).stem)
    os.environ["SEQLAB_RUN_DIR"] = str(run_dir)
    return run_dir


@contextlib.contextmanager
def held(run_dir: Path):
    """While this process trains in `run_dir`, no other can: two would write each other's checkpoints over. The system keeps the
    lock, so it ends with the process, however that ends. Of a run on several devices the main process holds it. Raises UserError
    where another one does."""
    if not is_main_process():
        yield
        return
    try:
        import fcntl

        descriptor = os.open(run_dir, os.O_RDONLY)
    except (ImportError, OSError):  # not Linux or macOS; no such directory
        yield
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{run_dir}: another process is training this run; wait for its end, or stop it first") from None
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(descriptor)


def is_held(run_dir: Path) -> bool:
    try:
        with held(run_dir):
            return False
    except UserError:
        return True


@contextlib.contextmanager
def fresh_directory(run_dir: Path, overwrite: bool, in_use: list[Path]):
    """While a new run begins in `run_dir`: an old run there is set aside (with --overwrite, else refused), and put back if
    the new one fails before it has trained anything; of a run that failed so, nothing is left. `in_use`: what the new run
    reads."""
    from tasks import runs  # imports torch

    check_new_directory(run_dir, overwrite)
    aside = None
    if run_dir.is_dir() and any(run_dir.iterdir()):
        for path in in_use:
            if path.resolve().is_relative_to(run_dir.resolve()):
                raise UserError(f"{path}: lies in {run_dir}, which --overwrite would replace; choose another --out")
        with held(run_dir):  # or refused
            pass
        aside = run_dir.with_name(f".{run_dir.name}.replaced")
        shutil.rmtree(aside, ignore_errors=True)
        run_dir.rename(aside)
    try:
        yield
    except BaseException:
        runs.discard_empty(run_dir)
        if aside is not None and not run_dir.exists():
            aside.rename(run_dir)
            aside = None
        raise
    finally:
        if aside is not None:
            shutil.rmtree(aside, ignore_errors=True)


@contextlib.contextmanager
def no_empty_folder(folder: Path | None):
    """While results are written into `folder`: one that was not there is gone again if an error has left it without a file."""
    is_new = folder is not None and not folder.exists()
    try:
        yield
    except BaseException:
        if is_new and folder.is_dir() and not any(path.is_file() for path in folder.rglob("*")):
            shutil.rmtree(folder, ignore_errors=True)
        raise
