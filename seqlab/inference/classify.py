"""Run a classifier over sequences of any length, in order, with answers that do not depend on the company.

Matrix products round differently at different sizes, so an answer computed in a batch of 64 may differ in the last bits
from one computed alone. Here every sequence is computed in a tile whose shape depends on that sequence's own length alone:

    up to PIECE bases     padded to the next of 64, 80, 96, 112, 128, 160, ... (four lengths an octave), in a tile of as many
                          rows as make the tile's tokens; rows that are not needed are empty (masked)
    longer                alone, in pieces of PIECE bases, the state carried (a bidirectional model reads each piece for
                          itself and its pieces are pooled together, see seqlab/classifier.py)

So the batch size is how many sequences are looked at together, which decides speed and memory and not one digit; nor do
the order of sequences and what else is in the file.
"""

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from seqlab.classifier import SequenceClassifier
from seqlab.tokenizers import nucleotide


class Predictor:
    """outputs(sequences): arrays (l) of uint8 ids -> arrays (n_outputs) float32 of logits, in order.

    device: "cpu" or "cuda"; precision: auto (bfloat16 on a GPU), float32 or bfloat16
    tile: tokens of one forward pass over short sequences; piece: bases of one forward pass over a long one
    """

    def __init__(
        self,
        model: SequenceClassifier,
        device: str = "cpu",
        precision: str = "auto",
        *,
        tile: int | None = None,
        piece: int | None = None,
    ):
        self.device = torch.device(device)
        self.model = model.to(self.device).eval()
        self.bf16 = precision == "bfloat16" or (precision == "auto" and self.device.type == "cuda")
        on_gpu = self.device.type == "cuda"
        self.tile = tile or (65_536 if on_gpu else 4_096)
        self.piece = piece or (65_536 if on_gpu else 16_384)

    def outputs(self, sequences: Iterable[np.ndarray], batch_size: int = 1024, batch_bases: int = 1 << 26) -> Iterator[np.ndarray]:
        """Looks at up to `batch_size` sequences (or `batch_bases` bases) together."""
        for group in groups(((None, sequence) for sequence in sequences), batch_size, batch_bases):
            yield from self.batch([sequence for _, sequence in group])

    def batch(self, sequences: list[np.ndarray]) -> list[np.ndarray]:
        """Of these sequences, looked at together, in order."""
        answers: list[np.ndarray | None] = [None] * len(sequences)
        by_width: dict[int, list[int]] = {}
        for i, sequence in enumerate(sequences):
            if len(sequence) > self.piece:
                answers[i] = self.long(sequence)
            else:
                by_width.setdefault(min(padded_length(len(sequence)), self.piece), []).append(i)
        for width, members in by_width.items():
            for i, answer in zip(members, self.padded([sequences[i] for i in members], width)):
                answers[i] = answer
        return answers

    def padded(self, sequences: list[np.ndarray], width: int) -> Iterator[np.ndarray]:
        """Of sequences of at most `width` bases, all padded to that."""
        rows = max(1, self.tile // width)
        for at in range(0, len(sequences), rows):
            yield from self._tile(sequences[at : at + rows], rows, width)

    @torch.inference_mode()
    def _tile(self, sequences: list[np.ndarray], rows: int, width: int) -> np.ndarray:
        ids = np.full((rows, width), nucleotide.PAD, np.uint8)
        lengths = np.zeros(rows, np.int64)
        for i, sequence in enumerate(sequences):
            ids[i, : len(sequence)] = sequence
            lengths[i] = len(sequence)
        mask = torch.from_numpy(np.arange(width) < lengths[:, None]).to(self.device)
        with self._autocast():
            outputs = self.model(torch.from_numpy(ids).to(self.device), mask)
        return outputs.float().cpu().numpy()[: len(sequences)]

    @torch.inference_mode()
    def long(self, sequence: np.ndarray) -> np.ndarray:
        """One sequence of any length in pieces: memory does not grow with it (beyond its own byte a base)."""
        outputs = self._strand(sequence)
        if self.model.reads_both_strands:
            outputs = 0.5 * (outputs + self._strand(nucleotide.reverse_complement(sequence)))
        return outputs.float().cpu().numpy()[0]

    def _strand(self, sequence: np.ndarray) -> Tensor:
        state = None
        piece = len(sequence) if self.model.head.pooling == "centre" else self.piece  # the centre needs the whole
        with self._autocast():
            for at in range(0, len(sequence), piece):
                part = sequence[at : at + piece]
                width = min(padded_length(len(part)), piece)
                ids = np.full((1, width), nucleotide.PAD, np.uint8)
                ids[0, : len(part)] = part
                mask = None if width == len(part) else torch.from_numpy(np.arange(width)[None] < len(part)).to(self.device)
                more = at + piece < len(sequence)
                state = self.model.feed(torch.from_numpy(ids).to(self.device), mask, state, more=more)
            return self.model.finish(state)

    def _autocast(self):
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bf16)


def predict_records(
    model: SequenceClassifier,
    records: Iterable[tuple[str, np.ndarray]],
    interpret: Callable[[np.ndarray], tuple[list[str], np.ndarray]],
    *,
    device: str = "cpu",
    precision: str = "auto",
    batch_size: int = 1024,
    batch_bases: int = 1 << 26,
) -> Iterator[tuple[str, str | None, np.ndarray | None, int]]:
    """(name, label, values (n_outputs), length) of each record, in order; a record without any A, C, G or T has no label
    and no values. `interpret` makes labels and values of the model's outputs (n n_outputs)."""
    predictor = Predictor(model, device, precision)
    for group in groups(records, batch_size, batch_bases):
        is_known = [bool(((ids >= nucleotide.A) & (ids <= nucleotide.T)).any()) for _, ids in group]
        outputs = predictor.batch([ids for (_, ids), known in zip(group, is_known) if known])
        labels, values = interpret(np.stack(outputs)) if outputs else ([], np.empty(0))
        answers = iter(zip(labels, values))
        for (name, ids), known in zip(group, is_known):
            label, value = next(answers) if known else (None, None)
            yield name, label, value, len(ids)


def groups(records: Iterable, size: int, bases: int) -> Iterator[list]:
    """Lists of up to `size` records and, unless one alone is longer, about `bases` bases."""
    held, held_bases = [], 0
    for record in records:
        held.append(record)
        held_bases += len(record[1])
        if len(held) >= size or held_bases >= bases:
            yield held
            held, held_bases = [], 0
    if held:
        yield held


def padded_length(length: int) -> int:
    """The next of 64, 80, 96, 112, 128, 160, ...: four lengths an octave, at most a quarter of padding from 64 on."""
    if length <= 64:
        return 64
    step = 1 << max(0, (length - 1).bit_length() - 3)
    return -(-length // step) * step
