"""Generation beside mamba_ssm's, and back ends beside each other: parity gate, table, one JSON line.

    python benchmarks/bench_generate.py                        # GPU: what auto takes, 1, 64 and 512 streams
    python benchmarks/bench_generate.py --backends persistent,graph --batch 1,8,64
    python benchmarks/bench_generate.py --device cpu --batch 1 --prompt 0
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402

from seqlab.bench import generate  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shapes", default=",".join(generate.SHAPES))
    parser.add_argument("--batch", default="1,64,512")
    parser.add_argument("--backends", default="auto")
    parser.add_argument("--prompt", type=int, default=160_000)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--seconds", type=float, default=0.5)
    arguments = parser.parse_args()
    dtypes = (torch.float32, torch.bfloat16) if arguments.device == "cuda" else (torch.float32,)
    settings = generate.Settings(
        shapes=tuple(arguments.shapes.split(",")),
        batches=tuple(int(b) for b in arguments.batch.split(",")),
        dtypes=dtypes,
        backends=tuple(arguments.backends.split(",")),
        prompt=arguments.prompt,
        tokens=arguments.tokens,
        seconds=arguments.seconds,
        device=arguments.device,
    )
    result = generate.run(settings, lambda text: print(text, file=sys.stderr, flush=True))
    print(f"{result.machine}, torch {result.torch}\n")
    for key, value in result.errors.items():
        print(f"parity {value:.1e}  {key}")
    for header, rows in (generate.table(result), generate.facts(result)):
        widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
        print()
        for row in [header, *rows]:
            print("  ".join(cell.rjust(width) for cell, width in zip(row, widths)))
    for key, why in result.absent.items():
        print(f"{key}: {why}")
    print(json.dumps(result.as_dict()))


if __name__ == "__main__":
    main()
