"""Sound files in and out: any format as blocks of mono float32, resampled as one stream; WAV written while it grows.

soundfile (libsndfile) reads WAV, FLAC, OGG, MP3, AIFF, CAF, AU, W64, RF64 and more; what it cannot open goes through the
`ffmpeg` program where there is one. Everything is a stream: an hour costs no more memory than a second.
"""

import contextlib
import math
import os
import shutil
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple, Self

import numpy as np

from seqlab.errors import UserError

BLOCK = 1 << 16  # frames handled at once
SUFFIXES = (
    ".wav .wave .flac .ogg .oga .opus .mp3 .aif .aiff .aifc .au .snd .caf .w64 .rf64 "  # soundfile
    ".m4a .mp4 .aac .wma .mka .webm .ac3 .amr"  # ffmpeg
).split()
LOWEST_RATE, HIGHEST_RATE = 1_000, 768_000


class AudioInfo(NamedTuple):
    sample_rate: int  # of the file
    channels: int
    format: str  # "WAV PCM_16", "ffmpeg", ...


class AudioReader:
    """One sound file, read once, front to back: `blocks()` yields mono float32 (n,) at the file's own rate.

    Integer samples are divided by 2^(bits - 1), so full scale is 1; channels are averaged. Raises UserError for what is no
    sound, is empty, is damaged, or holds NaN or infinity.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        self.frames = 0  # read so far
        self.expected_frames = 0  # as the file's header has it (not always right), 0 where it has none; for progress only

    def __enter__(self) -> Self:
        check_file(self.path)
        self._stack = contextlib.ExitStack()
        try:
            self._source = self._open()
        except BaseException:
            self._stack.close()
            raise
        if not LOWEST_RATE <= self.info.sample_rate <= HIGHEST_RATE:
            self._stack.close()
            raise UserError(
                f"{self.path}: says it has {self.info.sample_rate:,} samples a second; from {LOWEST_RATE:,} to "
                f"{HIGHEST_RATE:,} is read. Repair its header, or convert it"
            )
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def _open(self) -> Iterator[np.ndarray]:
        import soundfile

        try:
            file = self._stack.enter_context(soundfile.SoundFile(str(self.path)))
        except (soundfile.LibsndfileError, RuntimeError, TypeError) as error:
            return self._open_ffmpeg(str(error))
        self.info = AudioInfo(file.samplerate, file.channels, f"{file.format} {file.subtype}")
        self.expected_frames = file.frames
        return self._read_soundfile(file)

    def _read_soundfile(self, file) -> Iterator[np.ndarray]:
        import soundfile

        while True:
            try:
                frames = file.read(BLOCK, dtype="float32", always_2d=True)
            except (soundfile.LibsndfileError, RuntimeError) as error:
                reason = str(error).rsplit(":", 1)[-1].strip() or "libsndfile cannot decode it"
                raise UserError(f"{self.path}: damaged after {self.frames:,} samples ({reason}); copy it again") from None
            if not len(frames):
                return
            yield frames

    def _open_ffmpeg(self, reason: str) -> Iterator[np.ndarray]:
        reason = reason.rsplit(":", 1)[-1].strip().rstrip(".") or "unknown format"
        program = shutil.which("ffmpeg")
        if program is None:
            raise UserError(
                f"{self.path}: not a sound file that can be read here ({reason}); give WAV, FLAC, OGG, MP3 or AIFF, or "
                "install ffmpeg, which is used for m4a, aac, wma and others if it is on PATH"
            )
        # .au: the header of a stream, 24 bytes that say rate and channels, then big-endian floats
        command = [program, "-v", "error", "-nostdin", "-i", str(self.path), "-vn", "-c:a", "pcm_f32be", "-f", "au", "-"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL)
        self._stack.callback(_end_process, process)
        header = process.stdout.read(24)
        if len(header) < 24 or header[:4] != b".snd":
            said = process.stderr.read().decode("utf-8", "replace").strip().splitlines() or ["no sound in it"]
            raise UserError(f"{self.path}: neither libsndfile ({reason}) nor ffmpeg can read it ({said[-1][:120]})")
        offset, _, encoding, rate, channels = struct.unpack(">5I", header[4:])
        if encoding != 6 or channels < 1:
            raise UserError(f"{self.path}: ffmpeg gave an unexpected stream (encoding {encoding}); convert the file to WAV")
        process.stdout.read(offset - 24)
        self.info = AudioInfo(rate, channels, "ffmpeg")
        return self._read_ffmpeg(process, channels)

    def _read_ffmpeg(self, process: subprocess.Popen, channels: int) -> Iterator[np.ndarray]:
        size = 4 * channels
        while data := process.stdout.read(BLOCK * size):
            whole = data[: len(data) // size * size]
            yield np.frombuffer(whole, ">f4").astype(np.float32).reshape(-1, channels)
        if process.wait():
            said = process.stderr.read().decode("utf-8", "replace").strip().splitlines() or ["no reason given"]
            raise UserError(f"{self.path}: damaged; ffmpeg stopped: {said[-1][:120]}")

    def blocks(self) -> Iterator[np.ndarray]:
        for frames in self._source:
            mono = frames[:, 0] if frames.shape[1] == 1 else frames.mean(axis=1, dtype=np.float32)
            if not np.isfinite(mono).all():
                at = self.frames + int(np.flatnonzero(~np.isfinite(mono))[0])
                raise UserError(
                    f"{self.path}: sample {at:,} ({at / self.info.sample_rate:.3f} s) is NaN or infinite; repair the file"
                )
            self.frames += len(mono)
            yield mono
        if not self.frames:
            raise UserError(f"{self.path}: holds no samples (a header only)")


def _end_process(process: subprocess.Popen) -> None:
    process.stdout.close()
    process.terminate()
    process.wait()
    process.stderr.close()


def check_file(path: Path) -> None:
    """UserError unless `path` is a readable file with something in it."""
    try:
        if path.is_dir():
            raise UserError(f"{path}: is a directory; give a sound file")
        if not path.exists():
            raise UserError(f"{path}: no such file; give a sound file (WAV, FLAC, OGG, MP3, AIFF, ...)")
        if not path.stat().st_size:
            raise UserError(f"{path}: is empty (0 bytes)")
        with open(path, "rb"):
            pass
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def read_mono(path: Path, sample_rate: int) -> Iterator[np.ndarray]:
    """A whole file as blocks of mono float32 at `sample_rate`. Raises UserError."""
    with AudioReader(path) as reader:
        resampler = Resampler(reader.info.sample_rate, sample_rate)
        for block in reader.blocks():
            yield resampler.push(block)
        yield resampler.finish()


# -- resampling ----------------------------------------------------------------------------------------------------
class Resampler:
    """Sample rate conversion of a stream: the blocks joined equal `torchaudio.functional.resample` of the whole.

    Band-limited interpolation (J. O. Smith, "Digital audio resampling") with torchaudio's filter: a sinc with 6 zero
    crossings on each side, Hann window, cut-off at 0.99 of the lower Nyquist frequency.

        input    ....[ a ][ b ][ c ]....     n samples for m outputs, n / m = old / new in lowest terms
        output   m phases for each frame of n; output j of frame k stands at input time (k m + j) n / m and reads the
                 2 width + 1 or so inputs around it

    The last of the input is kept until its neighbours have come, so no block has an edge.
    """

    ZERO_CROSSINGS, ROLLOFF = 6, 0.99

    def __init__(self, old_rate: int, new_rate: int):
        divisor = math.gcd(old_rate, new_rate)
        self.n, self.m = old_rate // divisor, new_rate // divisor
        self.taken = self.given = 0  # samples in, samples out
        if self.n == self.m:
            return
        cutoff = min(self.n, self.m) * self.ROLLOFF
        self.width = math.ceil(self.ZERO_CROSSINGS * self.n / cutoff)
        # output j reads inputs first[j] .. first[j] + taps - 1 of its frame
        phase = np.arange(self.m)
        self.first = phase * self.n // self.m - self.width
        taps = 2 * self.width + 2
        time = (self.first[:, None] + np.arange(taps)) / self.n - phase[:, None] / self.m
        t = np.clip(time * cutoff, -self.ZERO_CROSSINGS, self.ZERO_CROSSINGS)
        window = np.cos(t * np.pi / self.ZERO_CROSSINGS / 2) ** 2
        self.kernel = (np.sinc(t) * window * cutoff / self.n).astype(np.float32)  # (m, taps)
        self._held = np.zeros(self.width, np.float32)  # inputs from self._start on
        self._start = -self.width

    def push(self, block: np.ndarray) -> np.ndarray:
        """The outputs that this block completes (perhaps none)."""
        block = np.asarray(block, np.float32)
        self.taken += len(block)
        if self.n == self.m:
            self.given += len(block)
            return block
        self._held = np.concatenate([self._held, block])
        # output i needs inputs up to i n // m + width + 1
        ready = (self._start + len(self._held) - self.width - 2) * self.m // self.n + 1
        return self._make(ready)

    def finish(self) -> np.ndarray:
        """The rest: ceil(taken * new / old) outputs have been given when this returns."""
        if self.n == self.m:
            return np.empty(0, np.float32)
        self._held = np.concatenate([self._held, np.zeros(self.width + 2, np.float32)])
        return self._make(-(-self.taken * self.m // self.n))

    def _make(self, end: int) -> np.ndarray:
        taps = self.kernel.shape[1]
        parts = []
        while self.given < end:
            i = np.arange(self.given, min(end, self.given + BLOCK), dtype=np.int64)
            phase = i % self.m
            start = i // self.m * self.n + self.first[phase]
            windows = np.lib.stride_tricks.sliding_window_view(self._held, taps)
            parts.append(np.einsum("it,it->i", windows[start - self._start], self.kernel[phase]))
            self.given += len(i)
        # what output number `given` does not need any more
        needed = self.given // self.m * self.n + int(self.first[self.given % self.m])
        drop = max(0, needed - self._start)
        self._held, self._start = self._held[drop:], self._start + drop
        return np.concatenate(parts) if parts else np.empty(0, np.float32)


def change_speed(samples: np.ndarray, factor: float) -> np.ndarray:
    """Play `factor` times as fast (and as high): float32 (n,) -> (round(n / factor),), by a windowed sinc of 32 taps whose
    phase is rounded to 1/512 sample. For augmentation; `Resampler` is the exact one."""
    taps, phases = 32, 512
    position = np.arange(max(1, round(len(samples) / factor))) * factor
    whole = np.floor(position).astype(np.int64)
    offset = np.arange(taps) - taps // 2 + 1
    time = offset - np.arange(phases)[:, None] / phases
    cutoff = min(1.0, 1.0 / factor) * 0.98
    table = cutoff * np.sinc(cutoff * time) * np.cos(np.clip(time / (taps // 2), -1, 1) * np.pi / 2) ** 2
    padded = np.pad(np.asarray(samples, np.float32), taps)
    windows = np.lib.stride_tricks.sliding_window_view(padded, taps)[whole + taps + offset[0]]
    phase = ((position - whole) * phases).astype(np.int64)
    return np.einsum("it,it->i", windows, table.astype(np.float32)[phase])


# -- writing -------------------------------------------------------------------------------------------------------
class WavFile:
    """A mono 16-bit WAV file that can be played while it grows: after every write its header is true.

    With `keep` samples an existing file is cut there and continued.
    """

    HEADER = 44
    LONGEST = (2**32 - 1 - HEADER) // 2  # samples: the size in the header has 32 bits

    def __init__(self, path: Path, sample_rate: int, keep: int | None = None):
        self.path, self.sample_rate = Path(path), sample_rate
        self.samples = keep or 0
        if keep is None:
            self._file: BinaryIO = open(self.path, "wb")
        else:
            if not self.path.is_file() or self.path.stat().st_size < self.HEADER + 2 * keep:
                raise UserError(f"{self.path}: is not the file that was left behind; start again without --resume")
            self._file = open(self.path, "r+b")
            self._file.truncate(self.HEADER + 2 * keep)
        self._write_header()

    def _write_header(self) -> None:
        size = 2 * self.samples
        rate = self.sample_rate
        header = b"RIFF" + struct.pack("<I", 36 + size) + b"WAVEfmt " + struct.pack("<IHHIIHH", 16, 1, 1, rate, 2 * rate, 2, 16)
        self._file.seek(0)
        self._file.write(header + b"data" + struct.pack("<I", size))
        self._file.seek(self.HEADER + size)
        self._file.flush()

    def write(self, samples: np.ndarray) -> None:
        """float32 in [-1, 1] (n,)"""
        if self.samples + len(samples) > self.LONGEST:
            raise UserError(f"{self.path}: a WAV file holds {self.LONGEST:,} samples at most; ask for fewer --seconds")
        self._file.write(pcm16(samples).tobytes())
        self.samples += len(samples)
        self._write_header()

    def close(self) -> None:
        if not self._file.closed:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()


def pcm16(samples: np.ndarray) -> np.ndarray:
    """float32 in [-1, 1] -> little-endian int16."""
    return np.clip(np.rint(np.asarray(samples, np.float32) * 32768), -32768, 32767).astype("<i2")
