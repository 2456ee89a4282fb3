"""Recordings -> dataset directory (tokens.bin, manifest.json): any format, rate and channel count, bounded memory.

A file and what becomes of it:

    speech/anna_03.flac, 44,100 Hz stereo     sequence "anna_03.flac": the mean of the channels, resampled as one stream to
                                              the dataset's rate, times the dataset's one scale, clamped to [-1, 1], and
                                              quantized to 8 bits: one byte a sample

The scale is one number for the whole dataset (1: full scale of the files; `peak`: the loudest sample of all becomes 1), so
silence has one code everywhere and a prompt is encoded as the training data were. Nothing is trimmed or dropped; what is
clipped or silent is counted.

Splits are by file, so that no recording is in two; a dataset of few files is split within each file, along time. Recordings
that are the same sample for sample, whatever their names and formats, stay together; where patterns put them into two splits,
they are counted.
"""

import fnmatch
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.files import Table, output_directory, sync, write_synced
from seqlab.audio import HIGHEST_RATE, LOWEST_RATE, SUFFIXES, AudioReader, Resampler, check_file
from seqlab.dataset import FORMAT, SPLITS, VERSION, nearest
from seqlab.errors import UserError
from seqlab.tokenizers.waveform import DEFAULT, QUANTIZERS, Quantizer

Progress = Callable[[float, float], None]  # (bytes of source files done, of all)

FEW_FILES = 20  # fewer than this are split within each file
SHARE = 0.1  # of each of the validation and the test split
FRAME_S = 0.02  # stretches whose level is measured
SILENCE_DB = -60.0  # a stretch below this level is silent
FULL_SCALE = 32767 / 32768  # at or above it a sample counts as clipped


def prepare_audio(
    sources: Iterable[Path | str] | Path | str,
    out: Path | str,
    *,
    sample_rate: int,
    quantizer: str = DEFAULT,
    scale: float | str = 1.0,
    label_from: str | None = None,
    label_pattern: str | None = None,
    valid: Iterable[str] = (),
    test: Iterable[str] = (),
    share: float | None = None,
    skip_bad: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Read sound files, or every sound file below a directory, into the dataset directory `out` and return it.

    scale: what samples are multiplied by, or "peak": such that the loudest of the dataset is 1 (reads everything twice).
    label_from: "folder" (the file's parent directory) or "name": what `label_pattern`, a regular expression, captures in
        the file's name; several groups are joined by "_"; default: all up to the first "_".
    valid, test: patterns such as "*_[0-4].wav", matched with the file's name and with its path below the directory; or
        "@list.txt", a file of names, one a line, as public sets have them (zero/0a7c2a8d_nohash_0.wav): the ends of paths. Of
        a list, what is not here is left out. With `test` alone, every tenth of the other files validates.
    share: of each of the two splits, if no pattern chooses them: every tenth file (0.1) tests, the next one validates; a
        dataset of fewer than 20 files is cut within each file instead: the last tenth tests, the tenth before validates.
    skip_bad: leave out files that cannot be used, listing them in the manifest, instead of stopping at the first.

    Nothing is written to `out` before everything is known to be right. Raises UserError.
    """
    out, valid, test = Path(out), list(valid), list(test)
    if not LOWEST_RATE <= sample_rate <= HIGHEST_RATE:
        raise UserError(f"--sample-rate {sample_rate}: must lie in {LOWEST_RATE:,} .. {HIGHEST_RATE:,}, for example 16000")
    if quantizer not in QUANTIZERS:
        raise UserError(f"--quantizer {quantizer}: unknown; use one of {', '.join(QUANTIZERS)}")
    if scale != "peak" and not (isinstance(scale, (int, float)) and 0 < scale < 1e6):
        raise UserError(f"--scale {scale}: must be a number above 0, or peak")
    if share is not None and not 0 < share <= 0.4:
        raise UserError(f"--share {share}: of each of the two splits; must lie above 0 and be at most 0.4")
    if share is not None and (valid or test):
        raise UserError("--share: patterns choose the splits; leave one of them out")
    for option, patterns in (("--valid", valid), ("--test", test)):  # wrong files are told before hours of reading
        _match(option, [pattern for pattern in patterns if pattern.startswith("@")], [], None)
    find_label = _labeller(label_from, label_pattern)
    files = find_files(sources)
    bad: list[dict[str, str]] = []
    labels = {}
    for name, path in files:
        try:
            labels[name] = find_label(name, path)
        except UserError:
            if not skip_bad:
                raise
            bad.append({"path": str(path), "reason": "has no label"})
    files = [(name, path) for name, path in files if name in labels]
    total_bytes = sum(path.stat().st_size for _, path in files if path.is_file())
    passes = 2 if scale == "peak" else 1
    done_bytes = 0

    def report(path: Path, share_of_file: float) -> None:
        if progress is not None:
            progress(done_bytes + share_of_file * path.stat().st_size, passes * total_bytes)

    if scale == "peak":
        peak = 0.0
        for _, path in files:
            try:
                check_file(path)
                for block in _stream(path, sample_rate, report):
                    peak = max(peak, float(np.abs(block).max(initial=0)))
            except UserError:  # said, or skipped, in the second pass
                continue
            done_bytes += path.stat().st_size
        scale = 1.0 / peak if peak > 0 else 1.0
    q = QUANTIZERS[quantizer]
    with output_directory(out, overwrite) as directory:
        sequences: list[dict[str, Any]] = []
        contents: list[bytes] = []  # a hash of each one's codes
        used: list[dict[str, Any]] = []
        counts = np.zeros(256, np.int64)
        digest = hashlib.sha256()
        offset = 0
        with open(directory / "tokens.bin", "wb", buffering=1 << 20) as tokens:
            for name, path in files:
                writer = _SequenceWriter(q, sample_rate, float(scale))
                start = tokens.tell()
                try:
                    check_file(path)
                    file_digest, content = _sha256(path), hashlib.sha256()
                    for codes in writer.codes(_stream(path, sample_rate, report, writer)):
                        tokens.write(codes)
                        content.update(codes)
                except UserError as error:
                    if not skip_bad:
                        raise
                    bad.append({"path": str(path), "reason": str(error).removeprefix(f"{path}: ")})
                    tokens.seek(start)
                    tokens.truncate()
                    continue
                sequences.append(
                    {
                        "name": name,
                        "source": len(used),
                        "offset": offset,
                        "length": writer.samples,
                        "label": labels[name],
                        **writer.statistics(),
                    }
                )
                contents.append(content.digest())
                used.append({"path": str(path), "sha256": file_digest, "bytes": path.stat().st_size, **writer.source})
                counts += writer.histogram
                offset += writer.samples
                done_bytes += path.stat().st_size
            sync(tokens)
        if not sequences:
            first = f"; the first: {bad[0]['path']}: {bad[0]['reason']}" if bad else ""
            raise UserError(f"none of {len(bad)} files could be used{first}")
        with open(directory / "tokens.bin", "rb") as tokens:
            while data := tokens.read(1 << 22):
                digest.update(data)
        first_of: dict[bytes, int] = {}
        first = [first_of.setdefault(content, i) for i, content in enumerate(contents)]
        table, rule = _splits(sequences, [file["path"] for file in used], first, valid, test, share)
        if not table["train"]:
            raise UserError("nothing is left to train on; choose --valid and --test so that some file is in neither")
        classes = sorted({s["label"] for s in sequences if s["label"] is not None}, key=natural)
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "kind": "audio",
            "tokenizer": quantizer,
            "vocab": 256,
            "total": offset,
            "counts": {str(code): int(n) for code, n in enumerate(counts) if n},
            "soft_masked": 0,
            "sha256": digest.hexdigest(),
            "sample_rate": sample_rate,
            "scale": float(scale),
            "labels": classes,
            "clipped": sum(s["clipped"] for s in sequences),
            "silent": sum(s["silent"] for s in sequences),
            "repeats": _repeats(sequences, first, table),
            "skipped": bad,
            "split_rule": rule,
            "sources": used,
            "sequences": sequences,
            "splits": table,
        }
        write_synced(directory / "manifest.json", json.dumps(manifest, indent=1) + "\n")
    return out


# -- files ---------------------------------------------------------------------------------------------------------
def natural(text: str) -> list:
    """Sorting key in which take_10 comes after take_9."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", text) if part]


def find_files(sources: Iterable[Path | str] | Path | str) -> list[tuple[str, Path]]:
    """(name, path) of each file, in natural order; directories are searched for files with a sound file's suffix. A name
    is the path below the directory given, or the file's own name. Raises UserError."""
    given = [Path(sources)] if isinstance(sources, (str, os.PathLike)) else [Path(p) for p in sources]
    if not given:
        raise UserError("no sound file given; give files or a directory")
    found: dict[str, Path] = {}
    for source in given:
        if source.is_dir():
            below = sorted(p for p in source.rglob("*") if p.suffix.lower() in SUFFIXES and not p.is_dir())
            if not below:
                raise UserError(f"{source}: holds no sound file ({', '.join(SUFFIXES[:9])}, ...)")
            pairs = [(p.relative_to(source).as_posix(), p) for p in below if not p.name.startswith("._")]
        else:
            if not source.exists():
                raise UserError(f"{source}: no such file or directory")
            pairs = [(source.name, source)]
        for name, path in pairs:
            if name in found and found[name].resolve() != path.resolve():
                name = path.as_posix()
            found[name] = path
    return sorted(found.items(), key=lambda item: natural(item[0]))


def _labeller(label_from: str | None, pattern: str | None) -> Callable[[str, Path], str | None]:
    if label_from not in (None, "folder", "name"):
        raise UserError(f"--label-from {label_from}: unknown; use folder or name")
    if pattern is not None and label_from != "name":
        raise UserError("--label-pattern: goes with --label-from name")
    if label_from is None:
        return lambda name, path: None
    if label_from == "folder":
        return lambda name, path: path.resolve().parent.name
    try:
        compiled = re.compile(pattern or r"^([^_]+)_")
    except re.error as error:
        raise UserError(f"--label-pattern {pattern}: not a regular expression ({error})") from None
    if not compiled.groups:
        raise UserError(f"--label-pattern {pattern}: has no group; put what is the label in brackets, as in '^([0-9]+)_'")

    def by_name(name: str, path: Path) -> str:
        match = compiled.search(path.name)
        if match is None or not any(match.groups()):
            raise UserError(
                f"{path}: its name does not hold a label (pattern {compiled.pattern}); change --label-pattern, or leave "
                "such files out with --skip-bad"
            )
        return "_".join(group for group in match.groups() if group)

    return by_name


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _stream(path: Path, sample_rate: int, report, writer: "_SequenceWriter | None" = None) -> Iterator[np.ndarray]:
    with AudioReader(path) as reader:
        if writer is not None:
            writer.source = reader.info._asdict()
        resampler = Resampler(reader.info.sample_rate, sample_rate)
        for block in reader.blocks():
            yield resampler.push(block)
            report(path, min(1.0, reader.frames / max(1, reader.expected_frames)))
        yield resampler.finish()


# -- one sequence --------------------------------------------------------------------------------------------------
class _SequenceWriter:
    """Blocks of amplitudes -> blocks of codes, measuring on the way."""

    def __init__(self, quantizer: Quantizer, sample_rate: int, scale: float):
        self.quantizer, self.scale = quantizer, np.float32(scale)
        self.frame = max(1, round(FRAME_S * sample_rate))
        self.samples = self.clipped = self.silent = 0
        self.peak = self.power = 0.0
        self.histogram = np.zeros(256, np.int64)
        self.source: dict[str, Any] = {}
        self._rest = np.empty(0, np.float32)  # of a frame that is not complete

    def codes(self, blocks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        for block in blocks:
            x = block * self.scale
            self._measure(x)
            codes = self.quantizer.encode(x)
            self.histogram += np.bincount(codes, minlength=256)
            yield codes
        self._count_silence(self._rest[None])

    def _measure(self, x: np.ndarray) -> None:
        self.samples += len(x)
        level = np.abs(x)
        self.peak = max(self.peak, float(level.max(initial=0)))
        self.clipped += int((level >= FULL_SCALE).sum())
        self.power += float((x.astype(np.float64) ** 2).sum())
        held = np.concatenate([self._rest, x])
        whole = len(held) // self.frame * self.frame
        self._count_silence(held[:whole].reshape(-1, self.frame))
        self._rest = held[whole:]

    def _count_silence(self, frames: np.ndarray) -> None:
        if frames.size:
            power = (frames.astype(np.float64) ** 2).mean(axis=1)
            self.silent += int((power < 10 ** (SILENCE_DB / 10)).sum()) * frames.shape[1]

    def statistics(self) -> dict[str, Any]:
        rms = (self.power / max(1, self.samples)) ** 0.5
        return {"peak": round(self.peak, 6), "rms": round(rms, 6), "clipped": self.clipped, "silent": self.silent}


# -- splits --------------------------------------------------------------------------------------------------------
def _splits(
    sequences: list[dict[str, Any]], paths: list[str], first: list[int], valid: list[str], test: list[str], share: float | None
) -> tuple[Table, str]:
    """The manifest's table and the rule. paths: of the sequences' files. first: of each sequence, the first one that is the same
    sample for sample."""
    table: Table = {name: [] for name in SPLITS}
    lengths = [s["length"] for s in sequences]
    if valid or test:
        names = [s["name"] for s in sequences]
        chosen = {"test": _match("--test", test, names, paths), "valid": _match("--valid", valid, names, paths)}
        both = chosen["test"] & chosen["valid"]
        if both:
            raise UserError(f"{names[min(both)]}: chosen by --valid and by --test; a file is in one split")
        rest = [i for i in range(len(names)) if i not in chosen["test"] | chosen["valid"]]
        rule = f"by file: test {' '.join(test) or 'none'}, valid {' '.join(valid) or 'none'}"
        if test and not valid and len(rest) > 1:
            every = min(10, len(rest))
            place = {first[i]: n for n, i in reversed(list(enumerate(rest)))}  # of the first of those that are the same
            chosen["valid"] = {i for i in rest if place[first[i]] % every == 0}
            rule = f"by file: test {' '.join(test)}; every {every}th other file validates"
        for i, length in enumerate(lengths):
            split = next((name for name, files in chosen.items() if i in files), "train")
            table[split].append([i, 0, length])
        return table, rule
    share = SHARE if share is None else share
    if len(sequences) >= FEW_FILES:
        every = max(3, round(1 / share))
        for i, length in enumerate(lengths):
            split = {0: "test", 1: "valid"}.get(first[i] % every, "train")
            table[split].append([i, 0, length])
        return table, f"by file, in natural order: of every {every}, the first tests, the second validates"
    for i, length in enumerate(lengths):
        part = int(length * share)
        borders = {"train": (0, length - 2 * part), "valid": (length - 2 * part, length - part), "test": (length - part, length)}
        for split, (start, end) in borders.items():
            if end > start:
                table[split].append([i, start, end])
    return table, f"within each file ({len(sequences)} of them): the last {share:.0%} tests, the {share:.0%} before validates"


def _repeats(sequences: list[dict[str, Any]], first: list[int], table: Table) -> dict[str, Any]:
    """recordings: how many are the same as one before; leaking: how many of a split are in a later one of train, valid, test as
    well, and `example`, the names of such a pair."""
    where = [{i for i, _, _ in table[split]} for split in SPLITS]
    whole = [i for i in range(len(sequences)) if sum(i in split for split in where) == 1]  # not cut along time
    latest: dict[int, int] = {}
    for code, split in enumerate(where):
        latest |= {first[i]: i for i in whole if i in split}
    code_of = {i: code for code, split in enumerate(where) for i in split}
    leaking = [i for i in whole if code_of[i] < code_of[latest[first[i]]]]
    example = [sequences[i]["name"] for i in (leaking[0], latest[first[leaking[0]]])] if leaking else []
    return {"recordings": sum(f != i for i, f in enumerate(first)), "leaking": len(leaking), "example": example}


def _match(option: str, patterns: list[str], names: list[str], paths: list[str] | None) -> set[int]:
    """Which of the sequences the patterns choose. Without `paths`, lists are only read."""
    chosen: set[int] = set()
    for pattern in patterns:
        if pattern.startswith("@"):
            matches = _listed(option, Path(pattern[1:]), paths or [])
        else:
            matches = {
                i for i, n in enumerate(names)
                if fnmatch.fnmatchcase(n, pattern) or fnmatch.fnmatchcase(n.rsplit("/", 1)[-1], pattern)
            }
        if not matches and paths is not None:
            raise UserError(f"{option} {pattern}: matches no file; {nearest(pattern, names)}")
        chosen |= matches
    return chosen


def _listed(option: str, path: Path, paths: list[str]) -> set[int]:
    """Which of the paths end with a line of the file."""
    try:
        lines = {line.strip().removeprefix("./") for line in path.read_text(encoding="utf-8-sig").splitlines()} - {""}
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "no text"
        raise UserError(f"{option} @{path}: cannot be read ({reason}); a list has the name of a file a line") from None
    depths = {line.count("/") + 1 for line in lines}
    return {i for i, p in enumerate(paths) if any("/".join(Path(p).parts[-depth:]) in lines for depth in depths)}
