"""`seqlab generate dna`: sequences drawn from a causal DNA model, as FASTA.

Only A, C, G and T are drawn, and log-likelihoods are among those four, as in training. A model has no start symbol, so
without a prompt the first base of each sequence is drawn evenly from the four (by the seed) and not counted.
"""

import math
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from seqlab.errors import UserError
from seqlab.ops.decode import Decoder, Sampling
from seqlab.tokenizers import nucleotide
from tasks import runs


@dataclass(frozen=True)
class GeneratedSequence:
    """bases: prompt included; log_likelihood: nats, of the drawn bases."""

    name: str
    bases: str
    drawn: int
    log_likelihood: float

    def fasta(self) -> str:
        bits = -self.log_likelihood / math.log(2) / max(1, self.drawn)
        header = f">{self.name} drawn={self.drawn} log_likelihood={self.log_likelihood:.3f} bits_per_base={bits:.4f}"
        return "\n".join([header, *textwrap.wrap(self.bases, 80)]) + "\n"


def generate(
    run: runs.LoadedRun,
    *,
    length: int,
    num: int,
    prompt: str = "",
    sampling: Sampling,
    device: str = "cpu",
    backend: str = "auto",
    batch: int = 256,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[list[GeneratedSequence], float, str]:
    """(sequences of `length` bases after the prompt, seconds taken, the decoder's back end). Raises UserError."""
    if run.config.model.direction != "causal":
        raise UserError(f"{run.directory}: is a bidirectional model, which fills gaps and cannot go on; train a causal one")
    if length < 1 or num < 1 or batch < 1:
        raise UserError("--length, --num and --batch: must be 1 or more")
    start = nucleotide.encode(prompt) if prompt else np.empty(0, np.uint8)
    bases = np.array(nucleotide.BASES, np.uint8)
    if not np.isin(start, [*nucleotide.BASES, nucleotide.N]).all():
        at = int(np.flatnonzero(~np.isin(start, [*nucleotide.BASES, nucleotide.N]))[0])
        raise UserError(f"--prompt: {prompt[at]!r} at {at + 1} is no base; use A, C, G, T and N, or the name of a FASTA file that holds them")
    first = bases[np.random.default_rng(sampling.seed).integers(0, 4, num)]
    sequences, done, began, used = [], 0, time.monotonic(), ""
    for at in range(0, num, batch):
        streams = range(at, min(num, at + batch))
        try:
            decoder = Decoder(
                run.model,
                batch=len(streams),
                device=device,
                backend=backend,
                allowed=list(nucleotide.BASES),
                streams=torch.tensor(list(streams)),
            )
        except (ValueError, RuntimeError) as error:
            raise UserError(f"--backend {backend}: {error}") from None
        used = decoder.backend
        given = np.tile(start, (len(streams), 1)) if len(start) else first[at : at + len(streams), None]
        decoder.prefill(torch.from_numpy(given.astype(np.int64)))
        rest = length if len(start) else length - 1
        parts, sums = [given], np.zeros(len(streams))
        while rest:
            n = min(rest, 1024)
            tokens, log_probs = decoder.generate(n, sampling)
            parts.append(tokens.cpu().numpy().astype(np.uint8))
            sums += log_probs.double().sum(1).cpu().numpy()
            rest -= n
            done += n * len(streams)
            if progress is not None:
                progress(done, length * num)
        for i, ids, total in zip(streams, np.concatenate(parts, axis=1), sums):
            drawn = length if len(start) else length - 1
            sequences.append(GeneratedSequence(f"sample_{i + 1}", nucleotide.decode(ids), drawn, float(total)))
    return sequences, time.monotonic() - began, used
