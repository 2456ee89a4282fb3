"""How fast a FASTA becomes a dataset, in how much memory, and how fast windows are read from it.

    python benchmarks/bench_prep.py [--gigabytes 3] [--folder TMP] [--json FILE]

First parity: a small file is prepared and compared with a naive reader. Then a FASTA of N GB is generated (lines of 60,
half of it soft-masked in runs of about 300, some N), plus, at a tenth of the size, the same as one line, as gzip, as
bgzip and as a million-contig assembly (1,000 bases each). Each is prepared in a process of its own (wall time, processor
time and peak memory of that process); then tokens per second of the window sampler. A table, and one JSON line at the end.
Everything generated is deleted.
"""

import argparse
import gzip
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_prep.genome import prepare_genome
from seqlab.dataset import TokenStore, WindowSampler
from seqlab.tokenizers import nucleotide

_CHILD = """
import json, sys, time
from data_prep.genome import prepare_genome
start, cpu = time.perf_counter(), time.process_time()
prepare_genome([sys.argv[1]], sys.argv[2])
seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
# not getrusage: its peak begins with that of the process this one was forked from
peak = next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps({"seconds": seconds, "cpu_seconds": cpu,
                  "peak_rss_mb": peak}))
"""


def bases(count: int, rng: np.random.Generator) -> np.ndarray:
    """(count,) uint8 letters: runs of lower case, a few N."""
    letters = np.frombuffer(b"ACGT", np.uint8)[rng.integers(0, 4, count, dtype=np.uint8)]
    edges = np.cumsum(rng.integers(1, 600, count // 300 + 1))
    lower = (np.searchsorted(edges, np.arange(count)) % 2).astype(np.uint8)
    letters[: count // 100] = ord("N")
    return letters | (lower << 5)


def write_fasta(path: Path, size: int, line: int | None, contig: int, seed: int = 0) -> None:
    """About `size` bytes; the same 60 million random bases again and again (the reader cannot profit from that)."""
    letters = bases(60_000_000, np.random.default_rng(seed))
    with open(path, "wb") as file:
        number = written = 0
        while written < size:
            left = contig
            written += file.write(b">contig%d\n" % number)
            while left > 0 and written < size:
                at = (number * contig) % (len(letters) - contig) if contig < len(letters) else 0
                part = letters[at : at + min(left, len(letters))]
                left -= len(part)
                if line:
                    full = len(part) // line * line
                    rows = np.full((full // line, line + 1), ord("\n"), np.uint8)
                    rows[:, :line] = part[:full].reshape(-1, line)
                    written += file.write(rows.tobytes())
                    if full < len(part):
                        written += file.write(part[full:].tobytes() + b"\n")
                else:
                    written += file.write(part.tobytes())
            if not line:
                written += file.write(b"\n")
            number += 1


def check_parity(folder: Path) -> None:
    write_fasta(folder / "small.fa", 3_000_000, 61, 100_000)
    store = TokenStore.open(prepare_genome([folder / "small.fa"], folder / "small"))
    text = "".join(
        line for line in (folder / "small.fa").read_text().splitlines() if not line.startswith(">")
    )
    np.testing.assert_array_equal(store.tokens, nucleotide.encode(text))
    is_lower = np.frombuffer(text.encode(), np.uint8) >= ord("a")
    np.testing.assert_array_equal(store.soft_mask(0, store.total), is_lower)


def time_preparation(fasta: Path, out: Path) -> dict:
    result = subprocess.run(
        [sys.executable, "-c", _CHILD, str(fasta), str(out)],
        cwd=Path(__file__).resolve().parents[1],
        check=True,
        capture_output=True,
        text=True,
    )
    facts = json.loads(result.stdout)
    store = TokenStore.open(out)
    facts.update(file_gb=fasta.stat().st_size / 1e9, bases=store.total)
    facts["mb_per_second"] = facts["file_gb"] * 1e3 / facts["seconds"]
    facts["mb_per_cpu_second"] = facts["file_gb"] * 1e3 / facts["cpu_seconds"]
    return facts


def time_loader(store: TokenStore, context: int, batch_size: int, seconds: float = 2.0, **options) -> float:
    """Tokens per second, best of three."""
    sampler = WindowSampler(store, "train", context, batch_size, extra=1, seed=0, **options)
    best, step = 0.0, 0
    for _ in range(3):
        start = time.perf_counter()
        tokens = 0
        while time.perf_counter() - start < seconds / 3:
            tokens += sampler.batch(step)["tokens"].size
            step += 1
        best = max(best, tokens / (time.perf_counter() - start))
    return best


def bgzip(source: Path, target: Path) -> None:
    from Bio.bgzf import BgzfWriter

    with open(source, "rb") as file, BgzfWriter(str(target), compresslevel=1) as out:
        while data := file.read(1 << 20):
            out.write(data)


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=3.0, help="size of the large FASTA")
    parser.add_argument("--folder", type=Path, help="where to write (default: the system's temporary folder)")
    parser.add_argument("--json", type=Path, help="also write the JSON line here")
    args = parser.parse_args()
    results: dict = {"benchmark": "prep", "processor": processor(), "cores": os.cpu_count(), "preparation": {}, "loader": {}}
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        check_parity(folder)
        print("parity: tokens and soft mask equal those of a naive reader\n")
        print(f"{'input':<22}{'GB':>7}{'s':>8}{'cpu s':>8}{'MB/s':>8}{'MB/cpu s':>10}{'peak MB':>9}")
        tenth = int(args.gigabytes * 1e8)
        for label, size, line, contig in (
            ("one line", tenth, None, 1 << 40),
            ("1,000-base contigs", tenth, 60, 1000),
            ("gzip", tenth, 60, 100_000_000),
            ("bgzip", tenth, 60, 100_000_000),
            ("lines of 60", tenth * 10, 60, 100_000_000),
        ):
            fasta = folder / "in.fa"
            write_fasta(fasta, size, line, contig)
            if label == "gzip":
                packed = folder / "in.fa.gz"
                with open(fasta, "rb") as file, gzip.open(packed, "wb", compresslevel=1) as out:
                    while data := file.read(1 << 20):
                        out.write(data)
                text_size, fasta = fasta.stat().st_size, packed
            elif label == "bgzip":
                bgzip(fasta, folder / "in.bgz")
                text_size, fasta = fasta.stat().st_size, folder / "in.bgz"
            else:
                text_size = fasta.stat().st_size
            facts = time_preparation(fasta, folder / "out")
            facts["text_mb_per_second"] = text_size / 1e6 / facts["seconds"]
            results["preparation"][label] = facts
            print(
                f"{label:<22}{text_size / 1e9:>7.2f}{facts['seconds']:>8.2f}{facts['cpu_seconds']:>8.2f}"
                f"{facts['text_mb_per_second']:>8.0f}{text_size / 1e6 / facts['cpu_seconds']:>10.0f}{facts['peak_rss_mb']:>9.0f}"
            )
            if label != "lines of 60":
                for path in (folder / "out").iterdir():
                    path.unlink()
                (folder / "out").rmdir()
            for path in folder.glob("in.*"):
                path.unlink()

        start = time.perf_counter()
        store = TokenStore.open(folder / "out")
        results["open_seconds"] = time.perf_counter() - start
        store.verify()  # and the file is in memory after this
        # the default blocks of 65,536 bases are shorter than a million: one interval, for the loader alone
        store._intervals["train"] = np.array([[0, store.total]])
        print(f"\n{'loader':<44}{'million tokens/s':>18}")
        for context, batch_size in ((1024, 1024), (1_048_576, 1)):
            for label, options in (
                ("forward strand", {}),
                ("random strand", {"reverse_complement": True}),
                ("random strand, soft mask", {"reverse_complement": True, "soft_mask": True}),
            ):
                rate = time_loader(store, context, batch_size, **options)
                results["loader"][f"{context} x {batch_size}, {label}"] = rate
                print(f"{f'{context:,} x {batch_size:,}, {label}':<44}{rate / 1e6:>18.0f}")
    text = json.dumps(results)
    if args.json:
        args.json.write_text(text + "\n")
    print("\n" + text)


if __name__ == "__main__":
    main()
