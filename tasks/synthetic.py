"""Two made-up problems that tell models apart by what they can remember: no data, minutes to train (Mamba, arXiv 2312.00752,
section 4.1). Codes: 0 noise, 1 marker, 2 and up symbols.

    selective_copying   .  5 . . 2 . 7 | | |        repeat the symbols among the noise, in their order
                                    -> 5 2 7
    induction_heads     4 2 | 7 5 5 3 2 6 4 |       say what followed the marker the last time
                                         -> 7

Both ask a model to take up some inputs and to pass over others: a recurrence that does not depend on its input (`model.blocks:
[s4d]`) can do neither at any length but the one it was trained for. Every sequence is a function of the run's seed and its number,
so nothing is stored; those that are evaluated on are never trained on.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from seqlab import report
from seqlab.errors import UserError
from seqlab.files import write_json, write_text
from seqlab.heads.language import weighted_cross_entropy
from seqlab.model import ModelConfig
from seqlab.model import build_model as build_language_model
from seqlab.training.config import TrainConfig, step_seed
from seqlab.training.facts import FitResult, read_run_facts
from seqlab.training.optim import OptimConfig
from seqlab.training.task import Batch
from tasks import runs

MARKER, FIRST_SYMBOL = 1, 2


@dataclass(frozen=True)
class DataConfig:
    problem: Literal["selective_copying", "induction_heads"] = "selective_copying"
    context: int = 256  # length of a training sequence, markers included
    symbols: int = 16
    remember: int = 16  # symbols to repeat; selective_copying

    def __post_init__(self) -> None:
        if not 2 <= self.symbols <= 250:
            raise ValueError(f"symbols: 2 to 250, got {self.symbols}")
        if self.remember < 1:
            raise ValueError(f"remember: must be 1 or more, got {self.remember}")
        if self.context < (least := shortest(self)):
            raise ValueError(f"context: {self.problem} needs sequences of {least} or more, got {self.context}")


@dataclass(frozen=True)
class EvalConfig:
    lengths: tuple[int, ...] = ()  # empty: the trained one, twice that, and on to 64 times
    sequences: int = 256  # of each length

    def __post_init__(self) -> None:
        if self.sequences < 1:
            raise ValueError(f"sequences: must be 1 or more, got {self.sequences}")


@dataclass(frozen=True)
class SyntheticConfig:
    """One run of `seqlab train synthetic`. The vocabulary follows from data.symbols."""

    task: Literal["synthetic"] = "synthetic"
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    def __post_init__(self) -> None:
        if self.model.direction != "causal" or self.model.strand != "single" or self.model.n_classes:
            raise ValueError("model: these problems are for causal models of one strand, without classes")
        rows = self.train.tokens_per_step // self.data.context
        if rows < 1 or rows % (self.train.devices // self.train.context_parallel):
            raise ValueError(
                f"train.tokens_per_step: {self.train.tokens_per_step} are {rows} sequences of {self.data.context}; give "
                f"at least one, and a multiple of the devices"
            )
        if short := [n for n in self.eval.lengths if n < shortest(self.data)]:
            raise ValueError(f"eval.lengths: {self.data.problem} needs {shortest(self.data)} or more, got {short[0]}")


NAME, Config = "synthetic", SyntheticConfig


def shortest(data: DataConfig) -> int:
    return 2 * data.remember if data.problem == "selective_copying" else 4


def answers(data: DataConfig) -> int:
    """Of one sequence: its last positions."""
    return data.remember if data.problem == "selective_copying" else 1


def sequences(data: DataConfig, length: int, rng: np.random.Generator, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """ids (rows length) uint8, and what is right at the last `answers(data)` positions, (rows answers) uint8."""
    symbols = (FIRST_SYMBOL, FIRST_SYMBOL + data.symbols)
    if data.problem == "selective_copying":
        ids = np.zeros((rows, length), np.uint8)
        ids[:, -data.remember :] = MARKER
        right = rng.integers(*symbols, (rows, data.remember), dtype=np.uint8)
        order = rng.random((rows, length - data.remember)).argsort(1)
        places = np.sort(order[:, : data.remember], 1)  # without repetition
        np.put_along_axis(ids, places, right, 1)
        return ids, right
    ids = rng.integers(*symbols, (rows, length), dtype=np.uint8)
    place = rng.integers(0, length - 2, (rows, 1))
    np.put_along_axis(ids, place, MARKER, 1)
    ids[:, -1] = MARKER
    return ids, np.take_along_axis(ids, place + 1, 1)


def as_batch(ids: np.ndarray, right: np.ndarray) -> Batch:
    target, weight = np.zeros_like(ids), np.zeros(ids.shape, np.float32)
    target[:, -right.shape[1] :], weight[:, -right.shape[1] :] = right, 1.0
    return {"ids": torch.from_numpy(ids), "target": torch.from_numpy(target), "weight": torch.from_numpy(weight)}


def generator(*parts: int | str) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=step_seed(*parts)))


def resolve(config: SyntheticConfig) -> SyntheticConfig:
    """With the vocabulary that the symbols want."""
    size = max(12, FIRST_SYMBOL + config.data.symbols)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=size))


def build_model(config: SyntheticConfig) -> nn.Module:
    return build_language_model(resolve(config).model)


class Synthetic:
    """The task that `seqlab.training` trains; see seqlab/training/task.py for the protocol."""

    metric = "bits per answer"
    positionwise = True

    def __init__(self, config: SyntheticConfig):
        self.config = resolve(config)

    def build_model(self) -> nn.Module:
        return build_model(self.config)

    def resolved_config(self) -> SyntheticConfig:
        return self.config

    def train_batches(self, step: int, rank: int, world_size: int) -> list[Batch]:
        train, data = self.config.train, self.config.data
        rows = train.tokens_per_step // data.context // world_size
        batch = as_batch(*sequences(data, data.context, generator(train.seed, step, rank), rows))
        together = max(1, (train.micro_batch_tokens or rows * data.context) // data.context)
        return [{key: value[i : i + together] for key, value in batch.items()} for i in range(0, rows, together)]

    def validation_batches(self, rank: int, world_size: int) -> Iterator[Batch]:
        train, data = self.config.train, self.config.data
        rows = max(1, min(train.validation_tokens, 1 << 20) // data.context)
        together = max(1, train.tokens_per_step // data.context)
        for i in range(0, rows, together):
            batch = as_batch(*sequences(data, data.context, generator(train.seed, "validation", i), min(together, rows - i)))
            yield {key: value[rank::world_size] for key, value in batch.items()}

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        logits, _ = model(batch["ids"], return_state=False)
        return self.piece_loss(logits, batch, 0, logits.shape[1])

    def piece_loss(self, output: Tensor, batch: Batch, start: int, stop: int) -> tuple[Tensor, Tensor]:
        piece = slice(start, stop)
        return weighted_cross_entropy(output, batch["target"][:, piece], batch["weight"][:, piece])

    def weight(self, batch: Batch) -> float:
        return batch["weight"].sum().item()

    def tokens(self, batch: Batch) -> int:
        return batch["ids"].numel()

    def metric_value(self, mean_loss: float) -> float:
        return mean_loss / math.log(2)

    def describe(self, batch: Batch) -> str:
        return f"{len(batch['ids'])} made-up sequences of {self.config.data.problem}"


def example(config: SyntheticConfig, rows: int, length: int) -> tuple[Synthetic, Batch]:
    """The task and a batch: what `seqlab plan` and `seqlab bench train` measure."""
    length = max(length, shortest(config.data))
    return Synthetic(config), as_batch(*sequences(config.data, length, generator("example"), rows))


def train(config: SyntheticConfig, run_dir: Path, *, init: Path | None = None, resume: bool = False) -> FitResult:
    resume, init = runs.start_of(run_dir, resume, init)
    return runs.train(Synthetic(config), run_dir, None, None, init=init, resume=resume)


# -- evaluation ------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Score:
    accuracy: float  # of answers
    whole: float  # sequences of which every answer is right
    bits: float  # per answer


@dataclass(frozen=True)
class Evaluation:
    problem: str
    lengths: dict[int, Score]
    chance: float  # accuracy of guessing among the symbols
    sequences: int
    trained_context: int


@torch.inference_mode()
def evaluate_run(
    run: runs.LoadedRun, lengths: tuple[int, ...] = (), device: str = "cpu", progress: Callable[[float, float], None] | None = None
) -> Evaluation:
    """Answers at each length, on sequences that no run of this seed was trained on; long ones are read in pieces."""
    config: SyntheticConfig = resolve(run.config)
    data, count = config.data, config.eval.sequences
    lengths = lengths or config.eval.lengths or tuple(data.context * 2**i for i in range(7))
    if min(lengths) < shortest(data):
        raise UserError(f"--context {min(lengths)}: {data.problem} needs {shortest(data)} or more")
    model = run.model.to(device).eval()
    scores, done, total = {}, 0, count * sum(lengths)
    for length in sorted(set(lengths)):
        rng = generator(config.train.seed, "test", length)
        right_answers, whole, nats = 0, 0, 0.0
        together = max(1, min(count, (1 << (20 if device == "cuda" else 16)) // length))
        for i in range(0, count, together):
            ids, right = sequences(data, length, rng, min(together, count - i))
            logits = answer(model, torch.from_numpy(ids).to(device), answers(data))
            right = torch.from_numpy(right).long().to(device)
            hits = logits.argmax(-1) == right
            right_answers += int(hits.sum())
            whole += int(hits.all(1).sum())
            nats -= float(logits.double().log_softmax(-1).gather(-1, right[..., None]).sum())
            done += ids.size
            if progress is not None:
                progress(done, total)
        n = count * answers(data)
        scores[length] = Score(right_answers / n, whole / count, nats / n / math.log(2))
    return Evaluation(data.problem, scores, 1 / data.symbols, count, data.context)


def answer(model: nn.Module, ids: Tensor, last: int, piece: int = 1 << 16) -> Tensor:
    """Logits (b last vocab) of the last positions of ids (b l), the state carried from piece to piece."""
    state, kept = None, []
    step = max(1, piece // len(ids))
    for at in range(0, ids.shape[1], step):
        logits, state = model(ids[:, at : at + step], state, return_state=True)
        kept = [*kept, logits][-(-(-last // step) + 1) :]
    return torch.cat(kept, 1)[:, -last:].float()


def evaluation_rows(evaluation: Evaluation) -> tuple[list[str], list[list[str]]]:
    rows = [[f"{n:,}", f"{s.accuracy:.4f}", f"{s.whole:.4f}", f"{s.bits:.4f}"] for n, s in evaluation.lengths.items()]
    return ["length", "accuracy", "all of a sequence", "bits per answer"], rows


def evaluation_verdict(evaluation: Evaluation) -> str:
    good = [n for n, score in evaluation.lengths.items() if score.accuracy >= 0.99]
    reach = f"99 % of the answers are right up to length {max(good):,}" if good else "At no length are 99 % of the answers right"
    return (
        f"{evaluation.problem}: {reach}; trained on {evaluation.trained_context:,}. {evaluation.sequences:,} sequences of each "
        f"length; guessing is right {evaluation.chance:.2%} of the time."
    )


def evaluation_dict(evaluation: Evaluation) -> dict:
    found = dataclasses.asdict(evaluation)
    return {**found, "lengths": {str(n): score for n, score in found["lengths"].items()}}


def write_report(run_dir: Path, evaluation: Evaluation, name: str = "evaluation", out: Path | None = None) -> Path:
    """Plots, `{name}.json` and the report of a run, in `out` (default: the run); returns the report's path."""
    target = Path(out or run_dir)
    plots = target / "plots"
    figure, axes = report.new_figure()
    axes.plot(list(evaluation.lengths), [s.accuracy for s in evaluation.lengths.values()], "o-", color=report.MODEL, linewidth=2, label="model")
    axes.axhline(evaluation.chance, color=report.BASELINE, linewidth=1.6, label="guessing")
    axes.axvline(evaluation.trained_context, color=report.FAINT, linewidth=1, zorder=0, label="trained length")
    axes.set(xscale="log", ylim=(0, 1.03), xlabel="length", ylabel="accuracy", title=evaluation.problem)
    axes.legend(frameon=False, fontsize=8)
    report.save_figure(figure, plots / f"{name}.png")
    write_json(target / f"{name}.json", evaluation_dict(evaluation))
    lines = [f"# {Path(run_dir).name}", "", evaluation_verdict(evaluation), "", report.markdown_table(*evaluation_rows(evaluation)), ""]
    lines += [f"![accuracy by length](plots/{name}.png)", ""]
    lines += report.training_lines(run_dir, read_run_facts(run_dir), Synthetic.metric, plots)
    write_text(path := report.report_path(target, name), "\n".join(lines))
    return path
