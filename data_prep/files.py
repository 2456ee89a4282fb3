"""Files in, directories out: what every reader of `data_prep` shares.

A source file is read once, front to back, in bounded memory (plain, gzip or bgzip); its sha256 comes along. A dataset
directory is made beside its place and renamed at the end, so an error or Ctrl-C leaves nothing half-written.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Self

from seqlab.dataset import FORMAT
from seqlab.errors import UserError
from seqlab.processes import usual_mode

Table = dict[str, list[list[int]]]
"""The splits of a manifest: split -> rows [sequence index, start, end], sorted; 0-based half-open, in the sequence."""
READ_SIZE = 1 << 20  # bytes of text handled at once; larger blocks leave the cache and are slower


def check_source(path: Path, wanted: str = "FASTA file (.fa, .fasta, .fna, with or without .gz)") -> int:
    """Size of a source file in bytes (0 for a pipe), having made sure that it can be read."""
    try:
        if path.is_dir():
            hint = f"the files in it, for example {path / '*.fa.gz'}" if wanted.startswith("FASTA") else f"a {wanted}"
            raise UserError(f"{path}: is a directory; give {hint}")
        if not path.exists():
            raise UserError(f"{path}: no such file; give a {wanted}")
        if path.is_file():
            if not path.stat().st_size:
                raise UserError(f"{path}: is empty; give a {wanted}")
            with open(path, "rb"):
                pass
        return path.stat().st_size
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


_ARCHIVES = (
    (b"BZh", "bzip2", "bunzip2"),
    (b"\xfd7zXZ", "xz", "unxz"),
    (b"\x28\xb5\x2f\xfd", "zstd", "unzstd"),
    (b"PK\x03\x04", "a zip archive", "unzip"),
    (b"\x27\x43\x41\x1a", "a .2bit file", "twoBitToFa"),
    (b"\x1a\x41\x27\x43", "a .2bit file", "twoBitToFa"),
)
_BGZF_END = bytes.fromhex("1f8b08040000000000ff0600424302001b0003000000000000000000")


class SourceFile:
    """One file, read once: its text in blocks (decompressed if it is gzip), its size and its sha256."""

    def __init__(self, path: Path, report: Callable[[int], None]):
        self.path, self.report = path, report
        self.shown = "standard input" if str(path) == "/dev/stdin" else str(path)
        self.bytes_read = 0
        self._hash = hashlib.sha256()
        self._tail = b""  # the last bytes of the file so far

    def __enter__(self) -> Self:
        try:
            self._file = open(self.path, "rb", buffering=0)
        except OSError as error:
            raise UserError(f"{self.shown}: cannot be read ({error.strerror})") from None
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()

    def sha256(self) -> str:
        return self._hash.hexdigest()

    def _read(self, size: int) -> bytes:
        try:
            data = self._file.read(size)
        except OSError as error:
            raise UserError(f"{self.shown}: cannot be read ({error.strerror})") from None
        self._hash.update(data)
        self._tail = (self._tail + data[-len(_BGZF_END) :])[-len(_BGZF_END) :]
        self.bytes_read += len(data)
        self.report(self.bytes_read)
        return data

    def blocks(self) -> Iterator[bytes]:
        head = self._read(min(READ_SIZE, 1 << 16))
        if not head:
            raise UserError(f"{self.shown}: is empty; give a file that holds something")
        for magic, what, tool in _ARCHIVES:
            if head.startswith(magic):
                raise UserError(f"{self.shown}: is {what}, which is not read; {tool} it first (gzip is fine)")
        if head.startswith(b"\x1f\x8b"):
            texts = self._gunzip(head)
        else:
            texts = self._plain(head)
        first = next(texts, b"")
        if first.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise UserError(f"{self.shown}: is UTF-16 text; save it as plain ASCII or UTF-8")
        yield first.removeprefix(b"\xef\xbb\xbf")  # the mark some editors put before UTF-8 text
        yield from texts

    def _plain(self, data: bytes) -> Iterator[bytes]:
        while data:
            yield data
            data = self._read(READ_SIZE)

    def _gunzip(self, data: bytes) -> Iterator[bytes]:
        """gzip of one or many members; bgzip is gzip of many small ones, ended by an empty one."""
        is_bgzf = data[3:4] == b"\x04" and data[12:14] == b"BC"
        while data:
            member = zlib.decompressobj(wbits=31)  # 31: gzip header and checksum
            while not member.eof:
                if not data:
                    raise UserError(f"{self.shown}: the gzip file is cut short; fetch or copy it again")
                try:
                    text = member.decompress(data, READ_SIZE)
                except zlib.error:
                    raise UserError(f"{self.shown}: the gzip file is damaged; fetch or copy it again") from None
                if text:
                    yield text
                data = member.unconsumed_tail or (b"" if member.eof else self._read(1 << 16))
            # what follows the member: zeros may pad it (tar, tape), another member may follow, else it is damage
            data = member.unused_data.lstrip(b"\0")
            while not data and (more := self._read(1 << 16)):
                data = more.lstrip(b"\0")
            if len(data) == 1:
                data += self._read(1 << 16)
            if data and not data.startswith(b"\x1f\x8b"):
                raise UserError(f"{self.shown}: there is something else after the gzip data; fetch or copy it again")
        if is_bgzf and self._tail != _BGZF_END:
            raise UserError(f"{self.shown}: the bgzip file is cut short (its end mark is missing); fetch it again")


def sync(file: IO) -> None:
    file.flush()
    os.fsync(file.fileno())


def write_synced(path: Path, text: str) -> None:
    """A small file of a dataset that is being made."""
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        sync(file)


@contextlib.contextmanager
def output_directory(out: Path, overwrite: bool) -> Iterator[Path]:
    """A new directory beside `out` that becomes `out` if the block ends well and vanishes if it does not."""
    made: list[Path] = []  # parents that had to be created
    directory = old = None
    try:
        _check_output(out, overwrite)
        for parent in reversed([p for p in out.parents if not p.exists()]):
            parent.mkdir()
            made.append(parent)
        directory = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
        yield directory
        directory.chmod(usual_mode(0o777))
        _check_output(out, overwrite)  # again: it may be there by now, made by somebody else in the hours since
        if out.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".old", dir=out.parent))
            os.rename(out, old)
        os.rename(directory, out)
        directory = None
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise UserError(f"{out}: the disk is full; free some space or write elsewhere (one byte a base)") from None
        raise UserError(f"{out}: cannot be written ({error.strerror or error}); choose another place") from None
    finally:
        if old is not None:
            if directory is not None and not out.exists():
                os.rename(old, out)  # the new one could not take its place
            else:
                shutil.rmtree(old, ignore_errors=True)
        if directory is not None:
            shutil.rmtree(directory, ignore_errors=True)
            for parent in reversed(made):
                with contextlib.suppress(OSError):
                    parent.rmdir()


def _check_output(out: Path, overwrite: bool) -> None:
    if not out.exists() and not out.is_symlink():
        return
    if not overwrite:
        raise UserError(f"{out}: exists; choose another directory or add --overwrite")
    if out.is_symlink() or not out.is_dir():
        raise UserError(f"{out}: is not a directory; choose another name (--overwrite replaces datasets only)")
    if any(out.iterdir()):
        try:
            is_dataset = json.loads((out / "manifest.json").read_bytes()).get("format") == FORMAT
        except (OSError, ValueError, AttributeError):
            is_dataset = False
        if not is_dataset:
            raise UserError(f"{out}: is not a seqlab dataset, so --overwrite leaves it alone; choose another directory")
