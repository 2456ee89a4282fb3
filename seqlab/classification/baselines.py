"""Baselines that could beat the model: k-mer logistic regression, a small convolutional network, and chance.

All three learn from the same training sequences as the model, choose on the same validation sequences, and predict the
same test sequences. Sequences are token ids padded on the right (see `Sequences`).

    chance    the classes' shares in the training split (regression: the mean)
    k-mers    frequencies of all k-mers, standardised; logistic regression (regression: ridge). k from 1 to 6, counts of
              one strand or of both (canonical), and the penalty are chosen on the validation split
    cnn       the network of GenomicBenchmarks (Gresova et al. 2023), 264 thousand parameters
"""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqlab.classification.metrics import Kind
from seqlab.inference.classify import padded_length
from seqlab.tokenizers import nucleotide

VERSION = 2  # of what the baselines compute: raise it when that changes, and kept predictions are made anew
K_MERS = (1, 2, 3, 4, 5, 6)
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # C of logistic regression on standardised features, strongest penalty first


@dataclass(frozen=True)
class Sequences:
    """n labelled sequences as arrays.

    tokens: (n l) uint8 ids, sequence i in tokens[i, :lengths[i]]
    lengths: (n) int64
    labels: (n) int64 class indices; (n c) 0/1 for multi-label; (n) float for regression
    """

    tokens: np.ndarray
    lengths: np.ndarray
    labels: np.ndarray

    def __post_init__(self) -> None:
        n = len(self.tokens)
        if self.tokens.ndim != 2 or self.tokens.dtype != np.uint8:
            raise ValueError(f"tokens must be (n l) uint8, got {self.tokens.shape} {self.tokens.dtype}")
        if len(self.lengths) != n or len(self.labels) != n:
            raise ValueError(f"{n} sequences, {len(self.lengths)} lengths and {len(self.labels)} labels: must be equal")
        if n and int(np.max(self.lengths)) > self.tokens.shape[1]:
            raise ValueError(f"a length of {int(np.max(self.lengths))} is more than the array's {self.tokens.shape[1]}")

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class BaselineResult:
    """What a baseline says about the test sequences.

    predictions: (n classes) probabilities; regression (n)
    detail: what was chosen, for example "k = 4, both strands, C = 0.1"
    valid: the validation score that the choice was made by (accuracy; 1 - log loss; minus squared error)
    """

    name: str
    predictions: np.ndarray
    detail: str
    valid: float
    seconds: float


# -- chance --------------------------------------------------------------------------------------------------------
def chance(train: Sequences, test: Sequences, kind: Kind, n_outputs: int) -> BaselineResult:
    """Shares of the classes in training as everyone's probabilities, so the most frequent class is predicted."""
    if kind == "regression":
        constant = float(train.labels.mean())
        return BaselineResult("chance", np.full(len(test), constant), f"the mean, {constant:.4g}", 0.0, 0.0)
    if kind == "multi-label":
        shares = train.labels.mean(0)
    else:
        shares = np.bincount(train.labels, minlength=n_outputs) / len(train)
    return BaselineResult("chance", np.tile(shares, (len(test), 1)), "class shares of the training split", 0.0, 0.0)


# -- k-mers --------------------------------------------------------------------------------------------------------
def kmer_counts(tokens: np.ndarray, lengths: np.ndarray, k: int) -> np.ndarray:
    """(n 4**k) float32: how often each k-mer occurs in tokens (n l). See `kmer_tables`."""
    return kmer_tables(tokens, lengths, (k,))[k]


def kmer_tables(tokens: np.ndarray, lengths: np.ndarray, ks: Iterable[int] = K_MERS) -> dict[int, np.ndarray]:
    """k -> (n 4**k) float32 counts of every k-mer, overlapping, on the strand given.

    Column of a k-mer: its letters as base-4 digits, A C G T = 0 1 2 3, the first the most significant. A k-mer that
    holds anything but A, C, G, T (N, padding), or reaches past the sequence's length, is not counted.
    """
    ks = sorted(set(ks))
    if not ks or ks[0] < 1 or ks[-1] > 10:
        raise ValueError(f"k must lie in 1 .. 10, got {ks}")
    n, width = tokens.shape
    tables = {k: np.zeros((n, 4**k), np.float32) for k in ks}
    rows = max(1, (1 << 22) // max(1, width))  # a few million positions at a time
    place = np.arange(width)
    for at in range(0, n, rows):
        part = tokens[at : at + rows]
        digit = part.astype(np.int32) - nucleotide.A
        is_base = (digit >= 0) & (digit < 4) & (place < np.asarray(lengths)[at : at + rows, None])
        digit[~is_base] = 0
        code, valid = np.zeros_like(digit), np.ones_like(is_base)
        for k in range(1, ks[-1] + 1):
            # code of the k-mer that starts at each position: the (k-1)-mer's, then one letter more
            span = width - k + 1
            if span < 1:
                break
            code = code[:, :span] * 4 + digit[:, k - 1 :]
            valid = valid[:, :span] & is_base[:, k - 1 :]
            if k in tables:
                row = np.broadcast_to(np.arange(len(part))[:, None], valid.shape)[valid]
                index = row * 4**k + code[valid]
                counts = np.bincount(index, minlength=len(part) * 4**k)
                tables[k][at : at + rows] = counts.reshape(len(part), 4**k)
    return tables


def canonical_columns(k: int) -> np.ndarray:
    """(4**k) int64: the column, among the canonical ones, of each k-mer: a k-mer and its reverse complement share one."""
    code = np.arange(4**k)
    digits = (code[:, None] >> (2 * np.arange(k - 1, -1, -1))) & 3
    reverse = ((3 - digits)[:, ::-1] << (2 * np.arange(k - 1, -1, -1))).sum(1)
    return np.unique(np.minimum(code, reverse), return_inverse=True)[1]


def kmer_frequencies(counts: np.ndarray, k: int, both_strands: bool) -> np.ndarray:
    """Counts (n 4**k) -> frequencies (n features) that sum to 1, a k-mer and its reverse complement together or apart."""
    if both_strands:
        column = canonical_columns(k)
        order = np.argsort(column, kind="stable")
        starts = np.flatnonzero(np.diff(column[order], prepend=-1))
        counts = np.add.reduceat(counts[:, order], starts, axis=1)
    return counts / np.maximum(counts.sum(1, keepdims=True), 1)


def kmer_baseline(
    train: Sequences,
    valid: Sequences,
    test: Sequences,
    kind: Kind,
    n_outputs: int,
    *,
    ks: Sequence[int] = K_MERS,
    strands: Sequence[bool] = (True, False),
    penalties: Sequence[float] = PENALTIES,
    max_bytes: int = 16 << 30,
    progress: Callable[[int, int], None] | None = None,
) -> BaselineResult:
    """Logistic regression (multi-label: one per label; regression: ridge) on standardised k-mer frequencies.

    k, counting both strands or one (`strands`), and the penalty are those with the best validation score: accuracy, then
    log loss; multi-label log loss; regression squared error. A sequence without any k-mer (shorter than k, all N) has
    frequencies 0. A k whose tables would need more than `max_bytes` is left out, and `detail` says so.
    """
    started = time.perf_counter()
    parts = [train, valid, test]
    affordable = [k for k in ks if 3 * 4 * 4**k * sum(map(len, parts)) <= max_bytes] or [min(ks)]
    limit = "" if len(affordable) == len(ks) else f" (k to {max(affordable)} only: memory)"
    ks = affordable
    best: tuple[tuple, str, Any] | None = None
    trials = [(k, both) for k in ks for both in strands]
    for done, (k, both) in enumerate(trials):
        if done == 0 or k != trials[done - 1][0]:
            counts = [kmer_counts(p.tokens, p.lengths, k) for p in parts]
        features = [kmer_frequencies(c, k, both) for c in counts]
        mean, scale = features[0].mean(0), features[0].std(0)
        used = features[0].max(0) > features[0].min(0)  # of a share that never changes, rounding alone has a deviation
        features = [(f[:, used] - mean[used]) / scale[used] for f in features]
        if not used.any():
            features = [np.zeros((len(p), 1), np.float32) for p in parts]
        for penalty, predict in _linear_models(features[0], train.labels, kind, n_outputs, penalties):
            score = _validation_score(valid.labels, predict(features[1]), kind)
            if best is None or score > best[0]:
                strand = "both strands" if both else "one strand"
                best = score, f"k = {k}, {strand}, C = {penalty:g}{limit}", predict(features[2])
        if progress is not None:
            progress(done + 1, len(trials))
    score, detail, predictions = best
    return BaselineResult("k-mers", predictions, detail, score[0], time.perf_counter() - started)


def _linear_models(features, labels, kind, n_outputs, penalties):
    """(C, predict) for each penalty; each fit starts from the one before, so the whole path costs little more than one."""
    from sklearn.linear_model import LogisticRegression, Ridge

    if kind == "regression":
        for penalty in penalties:
            model = Ridge(alpha=1 / penalty).fit(features, labels)
            yield penalty, model.predict
        return
    targets = [labels[:, c] for c in range(n_outputs)] if kind == "multi-label" else [labels]
    models = [LogisticRegression(max_iter=200, tol=1e-3, warm_start=True) for _ in targets]
    for penalty in penalties:
        for model, target in zip(models, targets):
            if len(np.unique(target)) > 1:
                model.set_params(C=penalty)
                _fit_quietly(model, features, target)

        def predict(x, models=models):
            if kind == "multi-label":
                columns = [
                    m.predict_proba(x)[:, 1] if hasattr(m, "classes_") else np.full(len(x), float(t[0]))
                    for m, t in zip(models, targets)
                ]
                return np.stack(columns, 1)
            out = np.zeros((len(x), n_outputs))  # a class without a training sequence keeps probability 0
            if hasattr(models[0], "classes_"):
                out[:, models[0].classes_] = models[0].predict_proba(x)
            else:
                out[:, int(targets[0][0])] = 1
            return out

        yield penalty, predict


def _fit_quietly(model, features, target) -> None:
    """Fit; 200 iterations are enough for the choice, so the warning that a path's end is not exact is not shown."""
    import warnings

    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(features, target)


def _validation_score(labels: np.ndarray, predictions: np.ndarray, kind: Kind) -> tuple[float, float]:
    """Higher is better; compared as a pair."""
    if kind == "regression":
        error = -float(((predictions - labels) ** 2).mean())
        return error, error
    p = predictions.clip(1e-6, 1 - 1e-6)
    if kind == "multi-label":
        score = 1 + float(np.where(labels > 0, np.log(p), np.log1p(-p)).mean())
        return score, score
    accuracy = float((predictions.argmax(1) == labels).mean())
    return accuracy, float(np.log(p[np.arange(len(labels)), labels]).mean())


# -- the convolutional network -------------------------------------------------------------------------------------
class BaselineCNN(nn.Module):
    """The network of GenomicBenchmarks (`genomic_benchmarks:models/torch.py`), ids (b l) -> (b n_outputs).

    Embedding of 100, three times convolution of 8 + batch norm + ReLU + max pooling of 2 (16, 8, 4 channels), then two
    linear layers over 121 positions x 4 channels. 121 positions are what 1,024 bases leave, where this is the published
    network with its 264 thousand parameters; at other lengths adaptive max pooling keeps them 121, so that the size does
    not depend on the length. Shorter than 64 bases is padded to 64.

    The first convolution of the embedding is computed as one convolution of the one-hot ids: the same function at an
    eighth of the work.
    """

    POSITIONS, MIN_LENGTH = 121, 64  # of which padded_length makes no less

    def __init__(self, n_outputs: int, vocab_size: int = nucleotide.VOCAB_SIZE):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, 100)
        self.conv1, self.norm1 = nn.Conv1d(100, 16, 8), nn.BatchNorm1d(16)
        self.conv2, self.norm2 = nn.Conv1d(16, 8, 8), nn.BatchNorm1d(8)
        self.conv3, self.norm3 = nn.Conv1d(8, 4, 8), nn.BatchNorm1d(4)
        self.hidden = nn.Linear(4 * self.POSITIONS, 512)
        self.out = nn.Linear(512, n_outputs)

    def forward(self, ids: Tensor) -> Tensor:
        if ids.shape[1] < self.MIN_LENGTH:
            ids = F.pad(ids, (0, self.MIN_LENGTH - ids.shape[1]), value=nucleotide.PAD)
        kernel = torch.einsum("ock,vc->ovk", self.conv1.weight, self.embedding.weight)
        one_hot = F.one_hot(ids.long(), self.embedding.num_embeddings).transpose(1, 2).to(kernel.dtype)  # (b v l)
        x = F.max_pool1d(F.relu(self.norm1(F.conv1d(one_hot, kernel, self.conv1.bias))), 2)
        x = F.max_pool1d(F.relu(self.norm2(self.conv2(x))), 2)
        x = F.max_pool1d(F.relu(self.norm3(self.conv3(x))), 2)
        x = F.adaptive_max_pool1d(x, self.POSITIONS)
        return self.out(self.hidden(x.flatten(1)))


def cnn_baseline(
    train: Sequences,
    valid: Sequences,
    test: Sequences,
    kind: Kind,
    n_outputs: int,
    *,
    seed: int = 0,
    lr: float = 1e-3,
    batch_size: int = 64,
    max_epochs: int = 20,
    min_steps: int = 600,
    patience: int = 5,
    max_tokens: int = 1 << 21,
    device: str = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> BaselineResult:
    """Train `BaselineCNN` with Adam and keep the epoch with the best validation score.

    Published protocol: lr 1e-3, batches of 64, 10 epochs, the best validation accuracy. Here up to `max_epochs`, or as
    many as make `min_steps` where the set is small; it stops after `patience` validations without an improvement, at
    least 50 steps apart. `max_tokens` bounds a batch: 64 sequences of 262,144 bases become 8 at a time, then one step.
    """
    started = time.perf_counter()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    rng = np.random.default_rng(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = BaselineCNN(n_outputs)
    model = model.to(device)
    mean, scale = 0.0, 1.0
    if kind == "regression":
        mean, scale = float(train.labels.mean()), float(train.labels.std()) or 1.0
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    steps_per_epoch = max(1, math.ceil(len(train) / batch_size))
    epochs = max(max_epochs, math.ceil(min_steps / steps_per_epoch))
    every = max(1, round(50 / steps_per_epoch))  # epochs between validations
    best, best_weights, stale, best_epoch = None, None, 0, 0
    groups = _by_padded_length(train.lengths)
    for epoch in range(1, epochs + 1):
        model.train()
        for rows in _batches(groups, batch_size, rng):
            micro = max(2, max_tokens // padded_length(int(train.lengths[rows].max())))
            pieces = [rows[i : i + micro] for i in range(0, len(rows), micro)]
            if len(pieces) > 1 and len(pieces[-1]) == 1:  # batch norm needs two
                pieces[-2:] = [np.concatenate(pieces[-2:])]
            optimizer.zero_grad(set_to_none=True)
            for piece in pieces:
                logits = model(_ids(train, piece, device))
                _loss(logits, train.labels[piece], kind, mean, scale, device).mul(len(piece) / len(rows)).backward()
            optimizer.step()
        if progress is not None:
            progress(epoch, epochs)
        if epoch % every and epoch != epochs:
            continue
        score = _validation_score(valid.labels, _predict(model, valid, kind, mean, scale, max_tokens, device), kind)
        if best is None or score > best:
            best, stale, best_epoch = score, 0, epoch
            best_weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        else:
            stale += 1
            if stale >= patience:
                break
    model.load_state_dict(best_weights)
    predictions = _predict(model, test, kind, mean, scale, max_tokens, device)
    parameters = sum(p.numel() for p in model.parameters())
    detail = f"{parameters:,} parameters, epoch {best_epoch} of {epoch}"
    return BaselineResult("cnn", predictions, detail, best[0], time.perf_counter() - started)


def _by_padded_length(lengths: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """(padded length, rows) for each padded length that occurs, ascending."""
    padded = np.array([padded_length(int(length)) for length in np.unique(lengths)])
    of_row = padded[np.searchsorted(np.unique(lengths), lengths)]
    return [(int(value), np.flatnonzero(of_row == value)) for value in np.unique(padded)]


def _batches(groups, batch_size: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Rows of an epoch's batches: similar lengths together, shuffled; a last batch of one joins the one before."""
    batches = []
    for _, rows in groups:
        rows = rng.permutation(rows)
        parts = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
        if len(parts[-1]) == 1 and len(parts) > 1:
            parts[-2:] = [np.concatenate(parts[-2:])]
        batches += parts
    singles = [b for b in batches if len(b) == 1]
    batches = [b for b in batches if len(b) > 1]
    if singles:  # rare lengths: batch norm needs at least two sequences, so they are padded to the longest of them
        alone = np.concatenate(singles)
        batches.append(alone if len(alone) > 1 else np.repeat(alone, 2))
    return [batches[i] for i in rng.permutation(len(batches))]


def _ids(sequences: Sequences, rows: np.ndarray, device: str) -> Tensor:
    """(b l) uint8, right-padded with [PAD] to the padded length of the longest."""
    lengths = sequences.lengths[rows]
    width = padded_length(int(lengths.max()))
    held = sequences.tokens[rows, : min(width, sequences.tokens.shape[1])]
    ids = np.full((len(rows), width), nucleotide.PAD, np.uint8)
    ids[:, : held.shape[1]] = np.where(np.arange(held.shape[1]) < lengths[:, None], held, nucleotide.PAD)
    return torch.from_numpy(ids).to(device)


def _loss(logits: Tensor, labels: np.ndarray, kind: Kind, mean: float, scale: float, device: str) -> Tensor:
    if kind == "regression":
        target = torch.as_tensor((labels - mean) / scale, dtype=torch.float32, device=device)
        return F.mse_loss(logits[:, 0], target)
    if kind == "multi-label":
        return F.binary_cross_entropy_with_logits(logits, torch.as_tensor(labels, dtype=torch.float32, device=device))
    return F.cross_entropy(logits, torch.as_tensor(labels, device=device))


@torch.no_grad()
def _predict(model, sequences: Sequences, kind: Kind, mean: float, scale: float, max_tokens: int, device: str) -> np.ndarray:
    model.eval()
    out = None
    for width, rows in _by_padded_length(sequences.lengths):
        size = max(1, min(512, max_tokens // width))
        for i in range(0, len(rows), size):
            piece = rows[i : i + size]
            logits = model(_ids(sequences, piece, device)).double().cpu()
            if out is None:
                out = np.zeros((len(sequences), logits.shape[1]))
            out[piece] = logits.numpy()
    if kind == "regression":
        return out[:, 0] * scale + mean
    logits = torch.from_numpy(out)
    return (logits.sigmoid() if kind == "multi-label" else logits.softmax(1)).numpy()
