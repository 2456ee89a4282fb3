"""Plots and tables of a run: what a person looks at first. Needs matplotlib; draws to files, never to a window."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from seqlab.files import write_atomic
from seqlab.training.history import read_history

INK, MODEL, BASELINE, FAINT = "#22313f", "#0b6e8f", "#d1791f", "#c9d1d6"


def in_words(lengths: list[int]) -> str:
    """Ascending lengths, as they are told: "256 to 2,048", or the only one."""
    return " to ".join(f"{length:,}" for length in dict.fromkeys((lengths[0], lengths[-1])))


def report_path(directory: Path, name: str) -> Path:
    """Where the report of an evaluation goes: report.md is the run's own, of its test split; others do not take its place."""
    return directory / ("report.md" if name == "evaluation" else f"{name}.md")


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A GitHub-flavoured table; the first column is left-aligned, the others right."""
    lines = ["| " + " | ".join(header) + " |", "|---" + "|--:" * (len(header) - 1) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def evaluation_rows(evaluation: Any) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table that `eval` prints: the model by context length, then what it is measured against."""
    has_soft = any(s.bits_soft_masked is not None for s in evaluation.contexts.values())
    header = ["model", "bits/base", "perplexity", "accuracy"] + (["soft-mask", "other"] if has_soft else [])

    def row(name, score):
        cells = [name, f"{score.bits:.4f}", f"{score.perplexity:.3f}", f"{100 * score.accuracy:.2f} %"]
        if has_soft:
            for bits in (score.bits_soft_masked, score.bits_other):
                cells.append("-" if bits is None else f"{bits:.4f}")
        return cells

    rows = []
    for context, score in evaluation.contexts.items():
        note = " (trained)" if context == evaluation.trained_context else ""
        rows.append(row(f"context {context:,}{note}", score))
    best = evaluation.best_baseline
    for baseline in evaluation.baselines:
        rows.append(row(f"{baseline.name}{' (best)' if baseline == best else ''}", baseline.score))
    return header, rows


def evaluation_verdict(evaluation: Any) -> str:
    """One honest sentence: who won, by how much."""
    context, score = evaluation.best
    baseline = evaluation.best_baseline
    bits, is_markov = baseline.score.bits, baseline.kind == "markov"
    gap = bits - score.bits
    where = f"{evaluation.bases:,} bases of the {evaluation.split} split"
    if gap > 0:
        what = f"Markov model (order {baseline.order}, {bits:.4f})" if is_markov else f"counts of k-mers ({baseline.name}: {bits:.4f})"
        return f"The model needs {score.bits:.4f} bits per base at context {context:,}, {gap:.4f} fewer than the best {what} on the same {where}."
    what = f"The Markov model of order {baseline.order} wins" if is_markov else f"Counts of k-mers win ({baseline.name})"
    return f"{what}: {bits:.4f} bits per base against {score.bits:.4f} for the model at context {context:,}, on the same {where}."


def evaluation_dict(evaluation: Any) -> dict:
    """Plain values for --json."""

    def plain(score):
        return {
            "bits_per_base": score.bits,
            "perplexity": score.perplexity,
            "accuracy": score.accuracy,
            "bases": score.bases,
            "bits_soft_masked": score.bits_soft_masked,
            "bits_other": score.bits_other,
        }

    return {
        "split": evaluation.split,
        "bases": evaluation.bases,
        "not_scored": evaluation.not_scored,
        "soft_masked": evaluation.soft_masked,
        "trained_context": evaluation.trained_context,
        "contexts": {str(c): plain(s) for c, s in evaluation.contexts.items()},
        "markov": {str(o): plain(s) for o, s in evaluation.markov.items()},
        "both_sides": {str(k): plain(s) for k, s in evaluation.both_sides.items()},
    }


def new_figure(width: float = 7.0, height: float = 4.2):
    """(figure, axes) in the house style, in inches."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(width, height), dpi=130, layout="constrained")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.grid(axis="y", color=FAINT, linewidth=0.6, alpha=0.7)
    axes.set_axisbelow(True)
    return figure, axes


def save_figure(figure, path: Path) -> Path:
    import matplotlib.pyplot as plt

    write_atomic(path, figure.savefig)
    plt.close(figure)
    return path


def plot_evaluation(evaluation: Any, path: Path) -> Path:
    """Bits per base against context length, with the baselines as levels."""
    figure, axes = new_figure()
    contexts = list(evaluation.contexts)
    bits = [s.bits for s in evaluation.contexts.values()]
    axes.plot(contexts, bits, "o-", color=MODEL, linewidth=2, markersize=5, label="model", zorder=3)
    best = evaluation.best_baseline
    best_bits = best.score.bits
    axes.axhline(best_bits, color=BASELINE, linewidth=1.6, label=f"best of k-mer counts ({best.name})")
    others = [other for other in evaluation.baselines if other.kind == "markov" and other.order in (0, 3, 6, 9, 12) and other != best]
    low, high = min([*bits, best_bits]), max([*bits, best_bits])
    room = max(0.02, 0.5 * (high - low))
    labelled = [best_bits]
    for other in others:
        level = other.score.bits
        is_clear = all(abs(level - taken) > 0.04 * (high - low + 2 * room) for taken in labelled)
        if low - room <= level <= high + room and is_clear:
            labelled.append(level)
            axes.axhline(level, color=BASELINE, linewidth=0.8, linestyle=":")
            axes.annotate(f"order {other.order}", (contexts[-1], level), fontsize=7, color=BASELINE, ha="right", va="bottom")
    axes.set_xscale("log", base=2)
    axes.set_ylim(low - room, high + room)
    if evaluation.trained_context in evaluation.contexts:
        axes.axvline(evaluation.trained_context, color=FAINT, linewidth=1, zorder=0)
        axes.annotate(
            "trained context",
            (evaluation.trained_context, low - room),
            fontsize=7,
            color=INK,
            rotation=90,
            ha="right",
            va="bottom",
            xytext=(-2, 3),
            textcoords="offset points",
        )
    axes.set_xlabel("context length (bases)")
    axes.set_ylabel("bits per base")
    axes.set_title(f"{evaluation.bases:,} bases of the {evaluation.split} split", fontsize=10, color=INK)
    axes.legend(frameon=False, fontsize=8)
    return save_figure(figure, path)


def plot_history(rows: list[dict[str, float]], metric: str, path: Path, baseline: tuple[str, float] | None = None) -> Path:
    """Training loss (a moving mean over the raw points) and validation against steps."""
    figure, axes = new_figure()
    points = [(r["step"], r["bits"]) for r in rows if not math.isnan(r["bits"])]
    valid = [(r["step"], r["valid"]) for r in rows if not math.isnan(r["valid"])]
    if points:
        steps, bits = zip(*points)
        axes.plot(steps, bits, color=FAINT, linewidth=0.8)
        window = max(1, len(bits) // 40)
        smooth = [sum(bits[max(0, i - window + 1) : i + 1]) / (i + 1 - max(0, i - window + 1)) for i in range(len(bits))]
        axes.plot(steps, smooth, color=MODEL, linewidth=1.5, label="training")
    if valid:
        axes.plot(*zip(*valid), "o-", color=INK, linewidth=1.2, markersize=4, label="validation")
        best = min(valid, key=lambda point: point[1])
        axes.annotate(f"{best[1]:.4f}", best, fontsize=8, color=INK, xytext=(0, -12), textcoords="offset points", ha="center")
    if baseline is not None:
        axes.axhline(baseline[1], color=BASELINE, linewidth=1.4, label=baseline[0])
    everything = [b for _, b in valid] + [b for _, b in points[len(points) // 20 :]]
    if everything:
        low, high = min(everything), max(everything)
        axes.set_ylim(low - 0.1 * (high - low) - 1e-3, high + 0.1 * (high - low) + 1e-3)
    axes.set_xlabel("step")
    axes.set_ylabel(metric)
    axes.legend(frameon=False, fontsize=8)
    return save_figure(figure, path)


def training_lines(
    run_dir: Path, facts: dict, metric: str, plots: Path, level: tuple[str, float] | None = None, unit: str = "tokens"
) -> list[str]:
    """The end of a run's report: the plot of its training, drawn into `plots` with a baseline's `level` (name, value), what the
    training took, in tokens called `unit`, and with which versions. `facts` are those of run.json."""
    lines, metrics = [], Path(run_dir) / "metrics.csv"
    if metrics.is_file():
        plot_history(read_history(metrics), metric, plots / "training.png", level)
        lines += ["![training](plots/training.png)", ""]
    if result := facts.get("result"):
        lines += [
            f"{facts.get('parameters', 0):,} parameters, {result['tokens']:,} {unit} in {result['minutes']:.1f} minutes "
            f"({result['tokens_per_second']:,.0f} {unit}/s) on {facts.get('machine')}; best at step {result['best_step']:,} "
            f"of {result['steps']:,}; {versions(facts)}.",
            "",
        ]
    return lines


def versions(facts: dict) -> str:
    return f"seqlab {facts.get('seqlab')} ({facts.get('git')}), torch {facts.get('torch')}"


# -- audio ---------------------------------------------------------------------------------------------------------
def audio_evaluation_rows(evaluation: Any) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table that `eval` prints for sound: the model by context length, then the predictors."""

    def row(name, score):
        return [name, f"{score.bits:.4f}", f"{score.nats:.4f}"]

    rows = []
    for context, score in evaluation.contexts.items():
        note = " (trained)" if context == evaluation.trained_context else ""
        rows.append(row(f"context {context:,}, {_seconds(context / evaluation.sample_rate)}{note}", score))
    if evaluation.with_class is not None:
        rows.append(row(f"context {max(evaluation.contexts):,}, class given", evaluation.with_class))
    best = evaluation.best_baseline[0]
    rows += [row(name + (" (best)" if name == best else ""), score) for name, score in evaluation.baselines.items()]
    return ["model", "bits/sample", "nats"], rows


def audio_verdict(evaluation: Any) -> str:
    context, score = evaluation.best
    name, baseline = evaluation.best_baseline
    where = f"{evaluation.samples:,} samples ({_seconds(evaluation.samples / evaluation.sample_rate)}) of the {evaluation.split} split"
    if score.bits < baseline.bits:
        return (
            f"The model needs {score.bits:.4f} bits per sample at context {context:,}, {baseline.bits - score.bits:.4f} fewer "
            f"than the best simple predictor ({name}, {baseline.bits:.4f}) on the same {where}."
        )
    return (
        f"The predictor `{name}` wins: {baseline.bits:.4f} bits per sample against {score.bits:.4f} for the model at context "
        f"{context:,}, on the same {where}."
    )


def audio_evaluation_dict(evaluation: Any) -> dict:
    """Plain values for --json."""

    def plain(score):
        return None if score is None else {"bits_per_sample": score.bits, "nats_per_sample": score.nats, "samples": score.samples}

    return {
        "split": evaluation.split,
        "samples": evaluation.samples,
        "recordings": evaluation.recordings,
        "sample_rate": evaluation.sample_rate,
        "trained_context": evaluation.trained_context,
        "contexts": {str(c): plain(s) for c, s in evaluation.contexts.items()},
        "with_class": plain(evaluation.with_class),
        "baselines": {name: plain(s) for name, s in evaluation.baselines.items()},
    }


def plot_audio_evaluation(evaluation: Any, path: Path) -> Path:
    """Bits per sample against context length, with the predictors as levels."""
    figure, axes = new_figure()
    contexts, bits = list(evaluation.contexts), [s.bits for s in evaluation.contexts.values()]
    axes.plot(contexts, bits, "o-", color=MODEL, linewidth=2, markersize=5, label="model", zorder=3)
    styles = iter(("-", "--", "-.", ":"))
    for name, score in sorted(evaluation.baselines.items(), key=lambda item: item[1].bits):
        axes.axhline(score.bits, color=BASELINE, linewidth=1.2, linestyle=next(styles, ":"), label=f"{name}: {score.bits:.2f}")
    if evaluation.trained_context in evaluation.contexts:
        axes.axvline(evaluation.trained_context, color=FAINT, linewidth=1, zorder=0)
    axes.set_xscale("log", base=2)
    axes.set_xlabel(f"context length (samples at {evaluation.sample_rate:,} Hz)")
    axes.set_ylabel("bits per sample")
    axes.set_title(f"{evaluation.samples:,} samples of the {evaluation.split} split", fontsize=10, color=INK)
    axes.legend(frameon=False, fontsize=8)
    return save_figure(figure, path)


def plot_contact_sheet(samples: Sequence[tuple[str, Any]], sample_rate: int, path: Path) -> Path:
    """Waveform above spectrogram of every (title, samples float32 (n,)), four in a row; each is as tall as its own peak, and
    its colours span the 70 dB below its loudest frequency."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    columns = min(4, max(1, len(samples)))
    rows = -(-len(samples) // columns)
    figure, axes = plt.subplots(
        2 * rows,
        columns,
        figsize=(3.0 * columns, 1.75 * rows + 0.3),
        dpi=80,
        layout="constrained",
        squeeze=False,
        gridspec_kw={"height_ratios": [1, 1.6] * rows},
    )
    for axis in axes.flat:
        axis.set_axis_off()
    for i, (title, wave) in enumerate(samples):
        top, bottom = axes[2 * (i // columns), i % columns], axes[2 * (i // columns) + 1, i % columns]
        seconds = len(wave) / sample_rate
        bins = min(len(wave), 400)
        edges = np.linspace(0, len(wave), bins + 1).astype(int)[:-1]
        low, high = np.minimum.reduceat(wave, edges), np.maximum.reduceat(wave, edges)
        top.fill_between(edges / sample_rate, low, high, color=MODEL, linewidth=0.4)
        peak = max(0.02, float(np.abs(wave).max(initial=0)))
        top.set(xlim=(0, seconds), ylim=(-peak, peak))
        top.set_title(title, fontsize=7, color=INK, pad=2)
        size = 256
        padded = np.pad(wave, (size // 2, size // 2 + max(0, size - len(wave))))
        hop = max(64, len(wave) // 300)
        frames = np.lib.stride_tricks.sliding_window_view(padded, size)[::hop] * np.hanning(size)
        level = 20 * np.log10(np.abs(np.fft.rfft(frames)).T + 1e-4)
        level -= level.max()
        extent = (0, seconds, 0, sample_rate / 2)
        bottom.imshow(level, origin="lower", aspect="auto", extent=extent, cmap="magma", vmin=-70, vmax=0, interpolation="nearest")
    return save_figure(figure, path)


def _seconds(value: float) -> str:
    return f"{1000 * value:.0f} ms" if value < 1 else f"{value:,.1f} s"
