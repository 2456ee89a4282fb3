"""Files that a killed process cannot leave half-written, and names that are no files: devices, pipes, links.

A file is written under a hidden name beside its own, and takes its place by a rename after fsync.
"""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from seqlab.errors import UserError
from seqlab.processes import usual_mode


def is_stream(path: Path) -> bool:
    """Whether `path` is something to write into and no file to replace: a device, a pipe, a name of a descriptor. (As root a
    rename would take the place of /dev/null.)"""
    named = os.path.abspath(path)
    if named in ("/dev/stdout", "/dev/stderr") or named.startswith(("/dev/fd/", "/proc/self/fd/")):
        return True
    return path.exists() and not path.is_file() and not path.is_dir()


def target_of(path: Path) -> Path:
    """The file that writing to `path` makes or replaces: `path`, or where it leads to if it is a link."""
    return Path(os.path.realpath(path)) if path.is_symlink() else path


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name, which ends as `path` does, for the block to write; after it the file takes the place of `path`, or goes
    into it if that is a stream. Nothing is left behind if the block fails. Raises UserError where `path` cannot be written."""
    path, temporary = Path(path), None
    into_stream = is_stream(path)
    try:
        with _unwritable(path):
            target = target_of(path)
            folder = None if into_stream else target.parent
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=folder, prefix=f".{path.stem}.", suffix=path.suffix)
            os.close(handle)
            temporary = Path(name)
        yield temporary
        with _unwritable(path):
            if into_stream:
                with open(temporary, "rb") as source, open(path, "ab") as sink:
                    shutil.copyfileobj(source, sink)
                return
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            temporary.chmod(usual_mode(0o666))
            os.replace(temporary, target)
            directory = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def open_text(path: Path) -> Iterator[Any]:
    """A text file to write line by line, which appears at `path` when the block ends well; a stream gets every line at once."""
    path = Path(path)
    if is_stream(path):
        with open(path, "a", encoding="utf-8") as file:
            yield file
        return
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        yield file


def write_atomic(path: Path, write: Callable[[Path], None]) -> None:
    """Call `write(temporary)` and put that file in the place of `path`, as `replacing` does. Raises UserError where it cannot be
    written, also where safetensors or torch.save have words of their own for that."""
    with replacing(path) as temporary, _unwritable(path):
        write(temporary)


def write_text(path: Path, text: str) -> None:
    write_atomic(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, data: Any) -> None:
    write_text(path, json.dumps(data, indent=1) + "\n")


@contextlib.contextmanager
def _unwritable(path: Path) -> Iterator[None]:
    """Turns an error of the disk into a UserError that names `path`."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "inline_container" not in str(error):  # torch.save's own
            raise
        reason = getattr(error, "strerror", None) or ("No space left on device?" if isinstance(error, RuntimeError) else str(error))
        raise UserError(f"{path}: cannot be written ({reason}); free some space or choose another place") from None
