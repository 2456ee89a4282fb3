"""`seqlab generate audio`: WAV files from a run, written while they grow; the best by likelihood; stopped and continued.

A folder of samples:

    sample-001.wav ...      16-bit mono at the run's sample rate; each can be played while it grows
    samples.csv             one row a file: class, log-likelihood under the model, marks of the runaway detector
    generation.json         the settings, the same rows and the speed
    contact_sheet.png       waveforms and spectrograms
    .state.pt               only while unfinished: what `--resume` needs

What is drawn is a function of (seed, stream, position) alone, so the files do not depend on how many are made at once, on
the back end's blocks, or on a stop in between.
"""

import csv
import dataclasses
import io
import json
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from seqlab import report
from seqlab.audio import WavFile, pcm16, read_mono
from seqlab.dataset import nearest
from seqlab.errors import UserError
from seqlab.files import write_atomic, write_json, write_text
from seqlab.inference.runaway import RunawayDetector
from seqlab.ops.decode import Decoder, Sampling
from seqlab.tokenizers.waveform import QUANTIZERS
from tasks import runs
from tasks.audio import AudioConfig

ATTEMPTS = 3  # how often a sample that ran away is drawn anew
SAVE_EVERY_S = 30.0
SHOWN = 24  # samples on the contact sheet


@dataclass(frozen=True)
class Settings:
    """What to generate. `classes`: labels, dealt out in turn; empty: "unknown". `candidates`: how many are made, of which
    `num` are kept; `num` by default. `rank_by`: "likelihood", or "class": how sure the model itself is that a sample is of the
    class it was made for, the best of every class in turn."""

    seconds: float = 10.0
    num: int = 1
    prompt: str | None = None
    prompt_start: float = 0.0
    prompt_seconds: float | None = None
    with_prompt: bool = False  # write the prompt before its continuation
    classes: tuple[str, ...] = ()
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    guidance: float = 0.0  # above 0: follow the class more closely than the model would
    hold: float | None = None  # None: what the run's config says
    seed: int = 0
    candidates: int | None = None
    rank_by: str = "likelihood"
    runaway: str = "mark"  # mark, resample
    batch: int = 256  # streams decoded side by side

    def __post_init__(self) -> None:
        if not 0 < self.seconds < float("inf"):
            raise UserError(f"--seconds {self.seconds}: must be above 0")
        if self.num < 1 or self.batch < 1:
            raise UserError("--num and --batch: must be 1 or more")
        if self.candidates is not None and self.candidates < self.num:
            raise UserError(f"--rank {self.candidates}: makes so many and keeps the best --num {self.num}; give at least as many")
        if self.rank_by not in ("likelihood", "class"):
            raise UserError(f"--rank-by {self.rank_by}: unknown; use likelihood or class")
        if self.rank_by == "class" and not (self.classes and self.candidates):
            raise UserError("--rank-by class: goes with --rank N and --class NAME (or --class all)")
        if not 0 <= self.guidance < float("inf"):
            raise UserError(f"--guidance {self.guidance}: must be 0 or more")
        if self.guidance and not self.classes:
            raise UserError("--guidance: goes with --class NAME (or --class all)")
        if self.runaway not in ("mark", "resample"):
            raise UserError(f"--runaway {self.runaway}: unknown; use mark or resample")
        if self.hold is not None and not 0 <= self.hold <= 1:
            raise UserError(f"--hold {self.hold:g}: must lie in 0 .. 1")
        if self.prompt_start < 0 or (self.prompt_seconds is not None and self.prompt_seconds <= 0):
            raise UserError("--prompt-start and --prompt-seconds: must be 0 or more, and above 0")
        if self.prompt is None and (self.with_prompt or self.prompt_start or self.prompt_seconds):
            raise UserError("--with-prompt, --prompt-start and --prompt-seconds: go with --prompt FILE")
        self.sampling()

    def sampling(self) -> Sampling:
        try:
            return Sampling(self.temperature, self.top_k, self.top_p, self.seed)
        except ValueError as error:
            raise UserError(f"--{str(error).replace('_', '-', 1)}") from None

    @property
    def total(self) -> int:
        return self.candidates or self.num


@dataclass
class Outcome:
    """What has been made: `rows` one for each kept file, likeliest first if they were ranked."""

    rows: list[dict[str, Any]]
    sample_rate: int
    seconds_of_sound: float  # all streams, discarded ones too
    wall_seconds: float
    backend: str
    finished: bool = True

    @property
    def real_time_factor(self) -> float:
        """Seconds of sound, all streams together, per second."""
        return self.seconds_of_sound / max(self.wall_seconds, 1e-9)


class Generator:
    """One `seqlab generate audio`: from a loaded run and settings to a folder of samples.

    progress(seconds of sound made, in all) is called after every block.
    """

    def __init__(
        self,
        run: runs.LoadedRun,
        settings: Settings,
        device: str,
        backend: str = "auto",
        progress: Callable[[float, float], None] | None = None,
    ):
        self.run, self.settings, self.device, self.backend = run, settings, device, backend
        self.config: AudioConfig = run.config
        self.sound = self.config.sound
        self.quantizer = QUANTIZERS[self.sound.quantizer]
        self.rate = int(self.sound.sample_rate)
        if run.model.prediction_head is not None:
            hold = self.config.generation.hold if settings.hold is None else settings.hold
            run.model.prediction_head.predictor.hold = hold
        elif settings.hold is not None:
            raise UserError("--hold: this run has no linear prediction that could be held (model.prediction_order: 0)")
        self.samples = max(1, round(settings.seconds * self.rate))
        self.progress = progress or (lambda done, total: None)
        self.classes = [class_index(self.sound.labels, name) for name in settings.classes]
        self.prompt = self._read_prompt()
        if self.samples + len(self.prompt) > WavFile.LONGEST:
            raise UserError(f"--seconds {settings.seconds:g}: a WAV file holds {WavFile.LONGEST / self.rate:,.0f} s at most")
        self.made = 0  # samples, all streams
        self.elapsed = 0.0
        self.used_backend = ""
        self._stop = threading.Event()

    def _read_prompt(self) -> np.ndarray:
        """Codes of the prompt, without the code of silence that comes before everything."""
        s = self.settings
        if s.prompt is None:
            return np.empty(0, np.uint8)
        start = round(s.prompt_start * self.rate)
        end = math.inf if s.prompt_seconds is None else start + round(s.prompt_seconds * self.rate)
        parts, at = [], 0
        for block in read_mono(Path(s.prompt), self.rate):
            part = block[max(0, start - at) : max(0, int(min(end, at + len(block)) - at))]
            parts.append(self.quantizer.encode(part * np.float32(self.sound.scale)))
            at += len(block)
            if at >= end:
                break
        codes = np.concatenate(parts)
        if not len(codes):
            raise UserError(f"{s.prompt}: lasts {at / self.rate:.2f} s, so nothing is left after --prompt-start {s.prompt_start:g}")
        return codes

    def decoder(self, streams: list[int], classes: list[int]) -> Decoder:
        """A decoder at the start of these streams (numbers that tell their random draws apart)."""
        try:
            decoder = Decoder(
                self.run.model,
                batch=len(streams),
                classes=torch.tensor(classes) if self.config.model.n_classes else None,
                device=self.device,
                backend=self.backend,
                streams=torch.tensor(streams),
                guidance=self.settings.guidance,
            )
        except (ValueError, RuntimeError) as error:  # no such back end, or it cannot run this model here
            raise UserError(f"--backend {self.backend}: {error}") from None
        self.used_backend = decoder.backend
        return decoder

    def first_ids(self) -> torch.Tensor:
        return torch.from_numpy(np.concatenate([np.full(1, self.quantizer.zero, np.uint8), self.prompt]).astype(np.int64))

    def class_of(self, stream: int) -> int:
        return self.classes[stream % len(self.classes)] if self.classes else self.sound.unknown

    def amplitudes(self, codes: np.ndarray) -> np.ndarray:
        """At the level of the recordings, before the dataset's scale."""
        return self.quantizer.decode(codes) / np.float32(self.sound.scale)

    # -- to standard output ----------------------------------------------------------------------------------------
    def to_pcm(self, write: Callable[[bytes], Any]) -> Outcome:
        """One stream as raw 16-bit little-endian PCM, in pieces of a quarter of a second at most."""
        decoder = self.decoder([0], [self.class_of(0)])
        began = time.monotonic()
        decoder.prefill(self.first_ids())
        if self.settings.with_prompt:
            write(pcm16(self.amplitudes(self.prompt)).tobytes())
        total = 0.0
        for tokens, log_probs in self._blocks(decoder, 0, longest=max(1, self.rate // 4)):
            write(pcm16(self.amplitudes(tokens[0])).tobytes())
            total += float(log_probs.sum())
        row = self._row(1, 0, 0, total, {}) | {"file": "-"}
        return Outcome([row], self.rate, self.made / self.rate, time.monotonic() - began, self.used_backend, not self._stop.is_set())

    # -- to files --------------------------------------------------------------------------------------------------
    def to_folder(self, out: Path, resume: bool = False) -> Outcome:
        """Generate into `out`; with `resume`, go on where a stop left it. `finished` is False after Ctrl-C."""
        with _StopOnInterrupt(self._stop):
            return self._to_folder(Path(out), resume)

    def _to_folder(self, out: Path, resume: bool) -> Outcome:
        s = self.settings
        saved = load_state(out) if resume else None
        began = time.monotonic()
        queue = [list(range(i, min(i + s.batch, s.total))) for i in range(0, s.total, s.batch)]
        attempt_of: dict[int, int] = {}
        rows: dict[int, dict] = {}
        if saved is not None:
            queue = saved["queue"]
            attempt_of = {int(k): v for k, v in saved["attempts"].items()}
            rows = {int(k): v for k, v in saved["rows"].items()}
            self.made, self.elapsed = saved["made"], saved["elapsed"]
        else:
            self.decoder([0], [self.class_of(0)])  # refused now, not with half a folder
            out.mkdir(parents=True, exist_ok=True)
            write_json(out / "generation.json", self._facts([], None))
            # so that a process that is killed before its first save can be resumed as well, from the start
            start = {"queue": queue, "attempts": {}, "rows": {}, "made": self.made, "elapsed": self.elapsed, "done": None}
            write_atomic(out / ".state.pt", lambda path: torch.save(start, path))
        before = self.elapsed
        while queue:
            group = queue[0]
            streams = [index + attempt_of.get(index, 0) * s.total for index in group]
            decoder = self.decoder(streams, [self.class_of(i) for i in group])
            detector = RunawayDetector(len(group), self.rate, self.quantizer)
            sums, done = np.zeros(len(group)), 0
            lead = len(self.prompt) if s.with_prompt else 0
            if saved is not None and saved["done"] is not None:
                try:
                    decoder.load_state_dict(saved["decoder"])
                    detector.load_state_dict(saved["detector"])
                except (ValueError, TypeError, KeyError) as error:  # the run was trained anew meanwhile, with another shape
                    raise UserError(f"{out}: cannot go on ({error}); generate again with --overwrite instead of --resume") from None
                sums, done = np.array(saved["sums"]), saved["done"]
                files = [WavFile(out / name_of(i), self.rate, keep=lead + done) for i in group]
            else:
                decoder.prefill(self.first_ids())
                files = [WavFile(out / name_of(i), self.rate) for i in group]
                if lead:
                    for file in files:
                        file.write(self.amplitudes(self.prompt))
            saved = None

            def save(in_group: bool = True) -> None:
                self.elapsed = before + time.monotonic() - began
                state = {
                    "queue": queue,
                    "attempts": {str(k): v for k, v in attempt_of.items()},
                    "rows": {str(k): v for k, v in rows.items()},
                    "made": self.made,
                    "elapsed": self.elapsed,
                    "done": done if in_group else None,
                    "sums": sums.tolist(),
                    "detector": detector.state_dict(),
                    "decoder": decoder.state_dict() if in_group else {},
                }
                write_atomic(out / ".state.pt", lambda path: torch.save(state, path))

            last_save = time.monotonic()
            try:
                for tokens, log_probs in self._blocks(decoder, done):
                    for file, codes in zip(files, tokens):
                        file.write(self.amplitudes(codes))
                    detector.watch(tokens)
                    sums += log_probs.sum(axis=1, dtype=np.float64)
                    done += tokens.shape[1]
                    if time.monotonic() - last_save > SAVE_EVERY_S:
                        save()
                        last_save = time.monotonic()
            finally:
                for file in files:
                    file.close()
            if done < self.samples:
                save()
                return Outcome(list(rows.values()), self.rate, self.made / self.rate, self.elapsed, self.used_backend, False)
            again = []
            for index, total, marks in zip(group, sums, detector.finish()):
                attempt = attempt_of.get(index, 0)
                rows[index] = self._row(index + 1, index, attempt, float(total), marks)
                if marks and s.runaway == "resample" and attempt + 1 < ATTEMPTS:
                    attempt_of[index] = attempt + 1
                    again.append(index)
            queue = queue[1:] + ([again] if again else [])
            save(in_group=False)
        self.elapsed = before + time.monotonic() - began
        outcome = Outcome(self._keep(out, rows), self.rate, self.made / self.rate, self.elapsed, self.used_backend)
        self._write_results(out, outcome)
        (out / ".state.pt").unlink(missing_ok=True)
        return outcome

    def _blocks(self, decoder: Decoder, done: int, longest: int = 1 << 14) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(codes (b n), log-probabilities (b n)) until there are `samples`, or until a stop is asked for. Blocks grow until
        one takes about a third of a second."""
        size, total = 64, self.settings.total * self.samples / self.rate
        while done < self.samples and not self._stop.is_set():
            n = min(size, self.samples - done)
            began = time.monotonic()
            tokens, log_probs = decoder.generate(n, self.settings.sampling())
            tokens, log_probs = tokens.cpu().numpy().astype(np.uint8), log_probs.float().cpu().numpy()
            if time.monotonic() - began < 0.15:
                size = min(2 * size, longest)
            done += n
            self.made += n * len(tokens)
            yield tokens, log_probs
            self.progress(self.made / self.rate, max(total, self.made / self.rate))

    def _row(self, number: int, stream: int, attempt: int, log_likelihood: float, marks: dict) -> dict[str, Any]:
        label = self.class_of(stream)
        return {
            "file": name_of(number - 1),
            "class": self.sound.labels[label] if label < len(self.sound.labels) else None,
            "seconds": self.samples / self.rate,
            "log_likelihood": log_likelihood,
            "bits_per_sample": -log_likelihood / math.log(2) / self.samples,
            "attempt": attempt,
            "marks": marks,
        }

    def _keep(self, out: Path, rows: dict[int, dict]) -> list[dict]:
        """The `num` best, best first, if there were candidates; the other files are removed."""
        ordered = [rows[i] for i in sorted(rows)]
        s = self.settings
        if s.candidates is None:
            return ordered
        if s.rank_by == "class":
            self._judge(out, ordered)
        # what ran away is often very likely (silence, say), so it comes last
        merit = "log_likelihood" if s.rank_by == "likelihood" else "log_posterior"
        ordered.sort(key=lambda row: (bool(row["marks"]), -row[merit]))
        if s.rank_by == "class":  # the best of every class, then the second of every class, ...
            place: dict[str, int] = {}
            for row in ordered:
                row["place"] = place[row["class"]] = place.get(row["class"], 0) + 1
            ordered.sort(key=lambda row: (row["place"], s.classes.index(row["class"])))
            for row in ordered:
                del row["place"]
        for row in ordered[s.num :]:
            (out / row["file"]).unlink(missing_ok=True)
        return ordered[: s.num]

    def _judge(self, out: Path, rows: list[dict]) -> None:
        """Adds `log_posterior` to every row: log p(class it was made for | samples) by Bayes' rule, all classes alike."""
        labels = self.sound.labels
        model = self.run.model.to(self.device)
        lead = len(self.prompt) if self.settings.with_prompt else 0
        batch = max(1, (1 << 19) // (len(self.prompt) + self.samples))
        for at in range(0, len(rows), batch):
            part = rows[at : at + batch]
            codes = []
            for row in part:
                wave = np.concatenate(list(read_mono(out / row["file"], self.rate)))[lead:]
                codes.append(self.quantizer.encode(wave * np.float32(self.sound.scale)))
            first = np.tile(self.first_ids().numpy().astype(np.uint8), (len(part), 1))
            ids = torch.from_numpy(np.concatenate([first, np.stack(codes)], axis=1)).to(self.device)
            scores = torch.stack(
                [log_likelihood(model, ids, first.shape[1], torch.full((len(part),), k)) for k in range(len(labels))]
            )
            posterior = scores.log_softmax(0)
            for i, row in enumerate(part):
                row["log_posterior"] = float(posterior[labels.index(row["class"]), i])

    def _facts(self, rows: list[dict], outcome: Outcome | None) -> dict[str, Any]:
        facts = {
            "run": str(self.run.checkpoint.resolve()),
            "settings": dataclasses.asdict(self.settings),
            "sample_rate": self.rate,
            "prompt_samples": len(self.prompt),
            "samples": rows,
        }
        if outcome is not None:
            facts |= {
                "backend": outcome.backend,
                "device": self.device,
                "seconds_of_sound": outcome.seconds_of_sound,
                "wall_seconds": outcome.wall_seconds,
                "real_time_factor": outcome.real_time_factor,
            }
        return facts

    def _write_results(self, out: Path, outcome: Outcome) -> None:
        text = io.StringIO()
        fields = ["file", "class", "seconds", "log_likelihood", "bits_per_sample", "attempt", "marks"]
        fields += ["log_posterior"] if self.settings.rank_by == "class" else []
        writer = csv.DictWriter(text, fields, lineterminator="\n")
        writer.writeheader()
        for row in outcome.rows:
            marks = " ".join(f"{name}@{second:.2f}s" for name, second in row["marks"].items())
            writer.writerow(row | {"class": row["class"] or "", "marks": marks})
        write_text(out / "samples.csv", text.getvalue())
        write_json(out / "generation.json", self._facts(outcome.rows, outcome))
        shown = []
        for row in outcome.rows[:SHOWN]:
            wave = np.concatenate(list(read_mono(out / row["file"], self.rate)))
            title = Path(row["file"]).stem.removeprefix("sample-") + ("" if row["class"] is None else f"  [{row['class']}]")
            shown.append((title + "".join(f"  {mark}" for mark in row["marks"]), wave))
        report.plot_contact_sheet(shown, self.rate, out / "contact_sheet.png")


class _StopOnInterrupt:
    """While this lasts, Ctrl-C asks for a stop after the block; a second one stops at once."""

    def __init__(self, stop: threading.Event):
        self.stop = stop

    def __enter__(self) -> None:
        self.before = None
        if threading.current_thread() is threading.main_thread():
            self.before = signal.signal(signal.SIGINT, self._handle)

    def _handle(self, number, frame) -> None:
        if self.stop.is_set():
            raise KeyboardInterrupt
        self.stop.set()

    def __exit__(self, *exc: object) -> None:
        if self.before is not None:
            signal.signal(signal.SIGINT, self.before)


@torch.inference_mode()
def log_likelihood(model: torch.nn.Module, ids: torch.Tensor, start: int, classes: torch.Tensor, piece: int = 1 << 17) -> torch.Tensor:
    """log p of ids[:, start:] given all before them and the classes (b,): (b,) float64. ids (b l) with start >= 1."""
    model.eval()
    state, total = None, torch.zeros(len(ids), dtype=torch.float64, device=ids.device)
    inputs, targets = ids[:, :-1], ids[:, 1:].long()
    size = max(1, piece // len(ids))
    for at in range(0, inputs.shape[1], size):
        part = slice(at, at + size)
        logits, state = model(inputs[:, part], state, classes=classes.to(ids.device))
        scores = logits.float().log_softmax(-1).gather(-1, targets[:, part, None])[..., 0]
        counted = torch.arange(at, at + scores.shape[1], device=ids.device) >= start - 1
        total += (scores * counted).double().sum(1)
    return total


def name_of(index: int) -> str:
    return f"sample-{index + 1:03d}.wav"


def class_index(labels: tuple[str, ...], name: str) -> int:
    if not labels:
        raise UserError(f"--class {name}: this run was trained without classes; prepare data with --label-from")
    if name not in labels:
        raise UserError(f"--class {name}: no such class; {nearest(name, labels)}")
    return labels.index(name)


def load_state(out: Path) -> dict[str, Any]:
    """What `--resume` needs, of a folder whose generation was stopped. Raises UserError."""
    path = out / ".state.pt"
    if not path.is_file():
        raise UserError(f"{out}: nothing to resume (no unfinished generation there)")
    try:
        return torch.load(path, weights_only=True)
    except Exception as error:  # torch raises a dozen kinds for a damaged file
        raise UserError(f"{path}: damaged ({type(error).__name__}); generate again without --resume") from None


def load_settings(out: Path) -> tuple[Path, Settings]:
    """(checkpoint, settings) of a folder that `to_folder` began. Raises UserError."""
    path = out / "generation.json"
    try:
        data = json.loads(path.read_text())
        settings = data["settings"]
        return Path(data["run"]), Settings(**{**settings, "classes": tuple(settings["classes"])})
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{out}: no readable generation.json; give the folder that `seqlab generate audio` wrote") from None


def write_to_stdout(data: bytes) -> None:
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


def check_sample_folder(folder: Path, overwrite: bool) -> None:
    """UserError unless samples may be written to `folder`; removes those of an earlier call with --overwrite."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"{folder}: is a file; choose another --out")
    if not any(folder.iterdir()):
        return
    if not overwrite:
        hint = "; go on with --resume" if (folder / ".state.pt").exists() else ""
        raise UserError(f"{folder}: already holds something{hint}; choose another --out, or add --overwrite")
    if not (folder / "generation.json").is_file():
        raise UserError(f"{folder}: was not written by `seqlab generate`, so --overwrite leaves it alone; choose another --out")
    for pattern in ("sample-*.wav", "samples.csv", "generation.json", "contact_sheet.png", ".state.pt"):
        for path in folder.glob(pattern):
            path.unlink()
