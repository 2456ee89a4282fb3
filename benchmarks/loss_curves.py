"""The loss of every training step on two operator back ends, from the same seed: do the curves lie on top of each other?

    python benchmarks/loss_curves.py ecoli_k12.fa.gz [--backends cuda mamba_ssm] [--steps 200] [--set model.direction=bidirectional]
        [--plot FILE]

Each back end trains the preset dna_small through the command line in a process of its own, with SEQLAB_BACKEND set and
dropout off; the tables of metrics.csv are compared step by step. A table, and one JSON line.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from seqlab.training.history import read_history

ROOT = Path(__file__).resolve().parents[1]


def train(fasta: Path, backend: str, steps: int, settings: list[str], folder: Path) -> list[float]:
    """Bits per base of every step."""
    # one validation, of little, at the end: nothing but the steps is wanted
    settings = ["model.dropout=0", "train.log_every=1", f"train.validate_every={steps}", "train.validation_tokens=20000", *settings]
    command = [sys.executable, "-m", "cli", "train", "dna", "--fasta", str(fasta), "--config", "dna_small"]
    command += ["--max-steps", str(steps), "--seed", "1", "--out", str(folder / backend)]
    command += [word for setting in settings for word in ("--set", setting)]
    table, errors = folder / backend / "metrics.csv", folder / f"{backend}.err"
    with open(errors, "w", encoding="utf-8") as file:
        run = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "SEQLAB_BACKEND": backend}, stdout=file, stderr=file)
        bits: list[float] = []
        while len(bits) < steps and run.poll() is None:
            time.sleep(0.5)
            bits = bits_of(table)
        run.terminate()  # the evaluation that would follow is not wanted
        run.wait()
    bits = bits_of(table)
    if len(bits) < steps:
        sys.exit(f"back end {backend}: {errors.read_text().strip()[-2000:]}")
    print(f"{backend}: {len(bits)} steps", flush=True)
    return bits


def bits_of(table: Path) -> list[float]:
    with contextlib.suppress(OSError, TypeError, ValueError):  # not there yet, or its last line half written
        return [row["bits"] for row in read_history(table) if row["bits"] == row["bits"]]
    return []


def plot(curves: dict[str, list[float]], target: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4))
    for style, (name, bits) in zip(("-", "--", ":"), curves.items()):
        axes.plot(range(1, len(bits) + 1), bits, style, label=name)
    axes.set(xlabel="step", ylabel="training loss, bits per base")
    axes.legend()
    figure.savefig(target, dpi=120, bbox_inches="tight")


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fasta", type=Path)
    parser.add_argument("--backends", nargs=2, default=["cuda", "mamba_ssm"])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--set", action="append", default=[], dest="settings", help="KEY=VALUE laid over the preset")
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        curves = {
            name: train(options.fasta.resolve(), name, options.steps, options.settings, Path(folder))
            for name in options.backends
        }
    first, second = curves.values()
    differences = [abs(a - b) for a, b in zip(first, second, strict=True)]
    print(f"step   {options.backends[0]:>10} {options.backends[1]:>10}   bits per base")
    for i in sorted({0, 9, 49, 99, 149, len(first) - 1}):
        if i < len(first):
            print(f"{i + 1:<6} {first[i]:10.4f} {second[i]:10.4f}")
    mean = sum(differences) / len(differences)
    print(f"largest difference {max(differences):.4f}, mean {mean:.5f}, over {len(first)} steps")
    if options.plot:
        plot(curves, options.plot)
    print(json.dumps({"steps": len(first), "largest": max(differences), "mean": mean, **curves}))


if __name__ == "__main__":
    main()
