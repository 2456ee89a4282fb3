"""Sequences to labels: embedding, backbone and classification head put together from one config.

    ids (b l) uint8 or int  ->  embedding  ->  causal or bidirectional Mamba  ->  head (pooled or last)  ->  (b n_outputs)

Sequences of any length: `feed`, piece by piece, and `finish` take a sequence in pieces. For a causal backbone that is exact, the
state is carried. A bidirectional backbone has no state: each piece is read for itself and the pieces are pooled together,
which for `mean` is the average of the pieces weighted by their lengths.

The two strands of DNA are one field, `strand`, and everything that it does is in this file (`ClassifierConfig.augments` is
what whoever draws training windows asks).
"""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqlab import homology
from seqlab.backbones import build_backbone
from seqlab.backbones.mamba import BackboneConfig, MixerState
from seqlab.embedding import TokenEmbedding
from seqlab.errors import UserError
from seqlab.genes import MAX_ORDER
from seqlab.heads.classification import ADDITIVE, ClassificationHead, Pooled, Pooling
from seqlab.heads.genes import GenePredictor, GeneState
from seqlab.heads.homology import Composition, Homology
from seqlab.heads.repeats import RepeatCounter
from seqlab.repeats import MAX_LENGTH
from seqlab.tokenizers import nucleotide


@dataclass(frozen=True)
class ClassifierConfig(BackboneConfig):
    """A classifier: a backbone, its vocabulary, how positions are pooled and what is done about the two strands of DNA.

    strand: none         the sequence as given
            augment      training reverse-complements half of the sequences
            average      the same, and outside training the outputs of both strands are averaged (post-hoc conjoining)
            equivariant  the outputs of both strands are averaged in training too: the same answer for a sequence and its
                         reverse complement by construction, at twice the work
    """

    vocab_size: int = 16  # 12 symbols, padded to a multiple of 8
    strand: Literal["none", "augment", "average", "equivariant"] = "average"
    pooling: Pooling = "mean"  # see seqlab/heads/classification.py
    length_scale: bool = False  # pooling: mean or evidence; learn how much surer to be of longer sequences
    kmer: int = 0  # DNA: beside each base, an embedding of the k-mer that ends there; 0: none
    period: int = 0  # beside each base, an embedding of its position modulo this (3: reading frames); 0: none
    # pooling: evidence; each class has a hidden Markov model of genes of this order, fitted to the training split, and the
    # network says how the next base differs from what that says; 0: none. See seqlab/heads/genes.py
    gene_order: int = 0
    # pooling: evidence; words of this many bases that some class's training split holds more than once count for the classes that
    # hold them; 0: none. See seqlab/heads/repeats.py
    repeat_word: int = 0
    # pooling: evidence; bases of the training split that are kept, all classes together, to tell what a sequence is like and how
    # much; 0: none. See seqlab/heads/homology.py
    homology: int = 0
    # pooling: evidence; a regression on k-mers of this length counts beside the network; 0: none. See seqlab/heads/homology.py
    composition: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.vocab_size < 1:
            raise ValueError(f"vocab_size: must be 1 or more, got {self.vocab_size}")
        if self.length_scale and self.pooling not in ADDITIVE:
            raise ValueError(f"length_scale: true needs pooling: mean or evidence, got pooling: {self.pooling}")
        if self.pooling == "evidence" and self.direction == "bidirectional":
            raise ValueError(
                "pooling: evidence needs direction: causal (a bidirectional model has seen the base that it would predict); use "
                "pooling: mean"
            )
        if self.kmer and not 2 <= self.kmer <= 10:
            raise ValueError(f"kmer: must be 0 (none) or lie in 2 .. 10, got {self.kmer}")
        if self.period and not 2 <= self.period <= 1024:
            raise ValueError(f"period: must be 0 (none) or lie in 2 .. 1024, got {self.period}")
        if self.gene_order and not 1 <= self.gene_order <= MAX_ORDER:
            raise ValueError(f"gene_order: must be 0 (none) or lie in 1 .. {MAX_ORDER}, got {self.gene_order}")
        if self.gene_order and self.pooling != "evidence":
            raise ValueError(f"gene_order: {self.gene_order} needs pooling: evidence, got pooling: {self.pooling}; set gene_order: 0")
        if self.repeat_word and not 8 <= self.repeat_word <= MAX_LENGTH:
            raise ValueError(f"repeat_word: must be 0 (none) or lie in 8 .. {MAX_LENGTH}, got {self.repeat_word}")
        if self.repeat_word and self.pooling != "evidence":
            raise ValueError(f"repeat_word: {self.repeat_word} needs pooling: evidence, got pooling: {self.pooling}; set repeat_word: 0")
        if self.homology and not homology.CODON[-1] < self.homology <= 1 << 26:
            raise ValueError(f"homology: must be 0 (none) or lie in {homology.CODON[-1] + 1} .. {1 << 26:,} bases, got {self.homology}")
        if self.composition and not 1 <= self.composition <= 8:
            raise ValueError(f"composition: must be 0 (none) or lie in 1 .. 8, got {self.composition}")
        for name in ("homology", "composition"):
            if getattr(self, name) and self.pooling != "evidence":
                raise ValueError(f"{name}: {getattr(self, name)} needs pooling: evidence, got pooling: {self.pooling}; set {name}: 0")
        if self.pooling == "centre" and self.direction == "causal":
            raise ValueError(
                "pooling: centre needs direction: bidirectional (the middle of a causal model has seen half of the sequence); "
                "use pooling: mean or last"
            )
        if self.pooling == "last" and self.direction == "bidirectional":
            raise ValueError(
                "pooling: last needs direction: causal (the last position of a bidirectional model is no better than any "
                "other); use pooling: mean"
            )

    @property
    def augments(self) -> bool:
        """Whether training windows are read from a random strand."""
        return self.strand in ("augment", "average")


class StreamState(NamedTuple):
    """Of a sequence fed in pieces: what the backbone carries and what the head has pooled."""

    backbone: list[MixerState] | None
    pooled: Pooled | None
    tail: Tensor | None = None  # (b k-1) the last ids, for the words of the next piece
    position: int = 0  # where the next piece begins
    last: Tensor | None = None  # (b d_model) the features there, for the evidence of the next piece's first base
    genes: GeneState | None = None
    counts: tuple[Tensor, ...] = ()  # (b n) states of each of `SequenceClassifier.counters`


class Features(NamedTuple):
    """What the network makes of a piece, and what its gene models do."""

    value: Tensor  # (b l d_model)
    prior: Tensor | None  # (b l n_outputs 4) log-probabilities of the bases, from those before them
    repeats: Tensor | None  # (b l n_outputs); outside training
    backbone: list[MixerState] | None  # if asked for
    genes: GeneState | None
    reading: Tensor | None = None  # (b l s), see `GenePredictor`; where k-mers are counted by it


def _base(ids: Tensor) -> Tensor:
    """A C G T = 0 1 2 3, -1 for anything else: ids (b l) -> (b l) int64."""
    base = ids.long() - nucleotide.A
    return torch.where((base >= 0) & (base < 4), base, -1)


class KmerEmbedding(nn.Module):
    """ids (b l) -> (b l d_model): a vector for the k-mer that ends at each position, zero where it holds anything but A, C,
    G, T or begins before the sequence. What k-mer logistic regression knows is one linear map away from here.

    `before` (b k-1): the ids that precede this piece.
    """

    def __init__(self, k: int, d_model: int):
        super().__init__()
        self.k = k
        self.table = nn.Embedding(4**k + 1, d_model, padding_idx=4**k)
        with torch.no_grad():
            self.table.weight[:-1].normal_(std=0.02)

    def forward(self, ids: Tensor, before: Tensor | None = None) -> Tensor:
        if before is None:
            before = ids.new_full((ids.shape[0], self.k - 1), nucleotide.PAD)
        digit = torch.cat([before.to(ids.dtype), ids], 1).long() - nucleotide.A
        is_base = (digit >= 0) & (digit < 4)
        digit = torch.where(is_base, digit, 0)
        length = ids.shape[1]
        code = torch.zeros_like(ids, dtype=torch.long)
        known = torch.ones_like(ids, dtype=torch.bool)
        for i in range(self.k):  # the first letter is the most significant
            code = code * 4 + digit[:, i : i + length]
            known &= is_base[:, i : i + length]
        return self.table(torch.where(known, code, 4**self.k))


class SequenceClassifier(nn.Module):
    """forward(ids (b l), mask (b l) or None) -> outputs (b n_outputs), float32: logits, or values for regression.

    `mask` is True at real positions; the others change nothing. Rows are padded on the right. `complement` (vocab) maps
    ids to those of the other strand; the default is the nucleotide tokenizer's.
    """

    def __init__(self, config: ClassifierConfig, n_outputs: int, complement: Tensor | None = None):
        super().__init__()
        if n_outputs < 1:
            raise ValueError(f"n_outputs must be 1 or more, got {n_outputs}")
        if config.homology and n_outputs > homology.MOST_SPECIES:
            raise UserError(f"model.homology: compares at most {homology.MOST_SPECIES} species, got {n_outputs}; set it to 0")
        self.config = config
        self.embedding = TokenEmbedding(config.vocab_size, config.d_model)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.kmer_embedding = KmerEmbedding(config.kmer, config.d_model) if config.kmer else None
        # A scan whose states only decay cannot count modulo 3; told where it is, it can add up evidence for each frame.
        self.clock = TokenEmbedding(config.period, config.d_model) if config.period else None
        if self.clock is not None:
            nn.init.normal_(self.clock.weight, std=0.02)
        self.dropout = nn.Dropout(config.dropout)
        self.backbone = build_backbone(config)
        has_genes, has_repeats = config.gene_order > 0, config.repeat_word > 0
        self.head = ClassificationHead(
            config.d_model, n_outputs, config.pooling, config.length_scale, has_prior=has_genes, has_repeats=has_repeats
        )
        self.repeats = RepeatCounter(n_outputs, config.repeat_word) if has_repeats else None
        self.genes = GenePredictor(n_outputs, config.gene_order) if has_genes else None
        # what the network is told: the reading frame that each species sees, and how well each foretells the bases
        self.gene_input = nn.Linear(self.genes.start.numel() + n_outputs, config.d_model, bias=False) if has_genes else None
        if has_genes:
            nn.init.normal_(self.gene_input.weight, std=0.02)
        self.homology = Homology(n_outputs, config.homology) if config.homology else None
        self.composition = Composition(n_outputs, config.composition, framed=has_genes) if config.composition else None
        if complement is None:
            complement = torch.from_numpy(nucleotide.COMPLEMENT.astype("int64"))
        table = torch.arange(max(config.vocab_size, len(complement)))
        table[: len(complement)] = complement
        self.register_buffer("complement", table, persistent=False)

    @property
    def reads_both_strands(self) -> bool:
        return self.config.strand == "equivariant" or (self.config.strand == "average" and not self.training)

    @property
    def counters(self) -> tuple[nn.Module, ...]:
        """What counts words and is asked at the end, of those that have been calibrated; never in training, where every word is
        found in the sequence itself."""
        if self.training:
            return ()
        return tuple(part for part in (self.homology, self.composition) if part is not None and part.scale[0, 0] > 0)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        if not self.reads_both_strands:
            return self.finish(self.feed(ids, mask))
        both = torch.cat([ids, self.reverse_complement(ids, mask)])  # (2b l)
        there, back = self.finish(self.feed(both, None if mask is None else mask.repeat(2, 1))).chunk(2)
        return 0.5 * (there + back)

    def features(
        self,
        ids: Tensor,
        mask: Tensor | None = None,
        before: StreamState | None = None,
        return_state: bool = False,
        fold: Tensor | None = None,
        clean: Tensor | None = None,
    ) -> Features:
        """Of one strand, ids (b l), or of a piece of it that comes after `before`. In training, fold (b): see `GenePredictor`;
        clean (b l): the sequence itself where ids have noise, for the gene models."""
        before = StreamState(None, None) if before is None else before
        x = self.embedding(ids.long())
        if self.kmer_embedding is not None:
            x = x + self.kmer_embedding(ids, None if before.tail is None else before.tail[:, 1 - self.config.kmer :])
        if self.clock is not None:
            x = x + self.clock((before.position + torch.arange(ids.shape[1], device=ids.device)) % self.config.period)
        prior, genes, repeats, reading = None, None, None, None
        if self.repeats is not None and not self.training:  # of training windows every word is counted in themselves
            tail = None if before.tail is None else _base(before.tail[:, 1 - self.config.repeat_word :])
            repeats = self.repeats(_base(ids), tail)
        if self.genes is not None:
            with_reading = self.composition is not None and self.composition in self.counters
            prediction, genes = self.genes(_base(ids if clean is None else clean), before.genes, fold, with_reading)
            prior, reading = prediction.log_p, prediction.reading
            x = x + self.gene_input(torch.cat([prediction.frame.flatten(2), prediction.lead], -1))
        value, backbone = self.backbone(self.dropout(x), before.backbone, mask, return_state=return_state)
        return Features(value, prior, repeats, backbone, genes, reading)

    def read(
        self, ids: Tensor, mask: Tensor | None = None, fold: Tensor | None = None, clean: Tensor | None = None
    ) -> Tensor:
        """What the head adds up (see `ClassificationHead.read`) at every position of whole sequences (b l), one strand. In
        training, fold (b): see `GenePredictor`; clean (b l): the sequence itself, whose bases are to be foretold, where the
        network reads ids with noise."""
        features = self.features(ids, mask, fold=fold, clean=clean)
        return self.head.read(features.value, _base(ids if clean is None else clean), None, features.prior, features.repeats)

    def feed(
        self, ids: Tensor, mask: Tensor | None = None, state: StreamState | None = None, more: bool = False
    ) -> StreamState:
        """One piece of one strand, in order. `more`: further pieces follow, so the backbone's state is made. Raises ValueError for a
        piece after one that was fed as the last of a causal model, which would be read as if nothing came before."""
        if ids.shape[1] == 0:
            if state is not None and state.pooled is not None:
                return state
            if more:
                return StreamState(None, None)
            ids = ids.new_full((len(ids), 1), nucleotide.PAD)  # nothing at all is read as padding alone
            mask = torch.zeros_like(ids, dtype=torch.bool)
        before = StreamState(None, None) if state is None else state
        if before.position and self.backbone.is_causal and before.backbone is None:
            raise ValueError("state: the piece before this one was fed as the last; feed it with more=True")
        carried = more and self.backbone.is_causal
        features = self.features(ids, mask, before, carried)
        read = self.head.read(features.value, _base(ids), before.last, features.prior, features.repeats)
        pooled = self.head.pool(read, mask, before.pooled)
        base, tail = _base(ids), None if before.tail is None else _base(before.tail)
        if mask is not None:
            base = torch.where(mask, base, -1)
        counters = self.counters
        counted = before.counts or (None,) * len(counters)
        counts = tuple(
            counter.feed(so_far, base, tail, features.reading, before.position, mask) for counter, so_far in zip(counters, counted, strict=True)
        )
        return self.next_state(ids, features, before, pooled, more, carried, counts)

    def next_state(
        self, ids: Tensor, features: Features, before: StreamState | None, pooled: Pooled | None, more: bool = True, carried: bool = True,
        counts: tuple[Tensor, ...] = (),
    ) -> StreamState:
        """After the piece `ids`, of which these are the features. `carried`: they have a state of the backbone."""
        before = StreamState(None, None) if before is None else before
        tail = None
        word = max(self.config.kmer, self.config.repeat_word, self.config.composition, homology.REACH + 1 if self.config.homology else 0)
        if more and word:
            tail = ids if before.tail is None else torch.cat([before.tail, ids], 1)
            tail = F.pad(tail, (word, 0), value=nucleotide.PAD)[:, 1 - word :]
        last = features.value[:, -1] if carried else None
        return StreamState(features.backbone, pooled, tail, before.position + ids.shape[1], last, features.genes, counts)

    def finish(self, state: StreamState) -> Tensor:
        """(b n_outputs) of everything that was fed."""
        outputs = self.head(state.pooled)
        for counter, counts in zip(self.counters, state.counts, strict=True):
            outputs = outputs + counter(counts, state.pooled.count)
        return outputs

    def reverse_complement(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        return reverse_complement(ids, mask, self.complement)

    def freeze_backbone(self) -> None:
        """Train the head alone."""
        self.embedding.requires_grad_(False)
        self.backbone.requires_grad_(False)


def reverse_complement(ids: Tensor, mask: Tensor | None, complement: Tensor) -> Tensor:
    """(b l): the other strand of each row of ids (b l), padding (where mask (b l) is False) still on the right. complement
    (vocab): id -> id on the other strand."""
    if mask is None:
        return complement[ids.flip(1).long()].to(ids.dtype)
    length = mask.sum(1, keepdim=True)
    position = torch.arange(ids.shape[1], device=ids.device)[None, :]
    source = torch.where(position < length, length - 1 - position, position)
    return complement[ids.gather(1, source).long()].to(ids.dtype)


def load_pretrained(model: SequenceClassifier, checkpoint: Path, vocab: list[str] | None = None) -> None:
    """Embedding, backbone and, where both have them, the embeddings of k-mers and of positions of a language model's (or another
    classifier's) `model.safetensors` into `model`; the head keeps its fresh weights.

    `vocab`: the symbols of the dataset that `model` will read; compared with those that the run was trained on, if its
    manifest lies beside it. Raises UserError when vocabularies, shapes or layers differ.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    checkpoint = Path(checkpoint)
    if not checkpoint.is_file():
        raise UserError(f"{checkpoint}: no such checkpoint; give a run directory that `seqlab train` has written")
    check_vocabulary(checkpoint, vocab)
    try:
        weights = load_file(checkpoint)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(
            f"{checkpoint}: damaged or not a safetensors file ({str(error)[:80]}); use another checkpoint"
        ) from None
    weights = {name.removeprefix("model."): tensor for name, tensor in weights.items()}  # strand: equivariant wraps it
    parts = ("embedding.", "backbone.")
    for optional in ("kmer_embedding.", "clock."):
        if any(name.startswith(optional) for name in weights) and any(name.startswith(optional) for name in model.state_dict()):
            parts += (optional,)
    own = {k: v for k, v in model.state_dict().items() if k.startswith(parts)}
    theirs = {k: v for k, v in weights.items() if k.startswith(parts)}
    for name, tensor in theirs.items():
        if name not in own:
            raise UserError(
                f"{checkpoint}: holds {name}, which this model does not have; use its direction and n_layer "
                "(--set model.direction=..., model.n_layer=...)"
            )
        if own[name].shape != tensor.shape:
            raise UserError(
                f"{checkpoint}: {name} is {list(tensor.shape)} there and {list(own[name].shape)} in this model; use the "
                "sizes that it was trained with (--set model.d_model=...)"
            )
    pointers = {own[name].data_ptr() for name in theirs}
    absent = [name for name, tensor in own.items() if tensor.data_ptr() not in pointers]
    if absent:
        raise UserError(
            f"{checkpoint}: lacks {absent[0]} (and {len(absent) - 1} more); use its direction and n_layer "
            "(--set model.direction=..., model.n_layer=...)"
        )
    model.load_state_dict(theirs, strict=False)


def backbone_shape(checkpoint: Path) -> dict:
    """The values of a run's config that decide the shape of its backbone, from the config.yaml beside its checkpoint."""
    from seqlab.config import load_yaml

    path = Path(checkpoint).parent / "config.yaml"
    model = load_yaml(path).get("model", {})
    theirs = {f.name for f in fields(BackboneConfig)} - {"dropout"} | {"vocab_size", "kmer", "period"}
    return {key: value for key, value in model.items() if key in theirs} if isinstance(model, dict) else {}


def check_vocabulary(checkpoint: Path, vocab: list[str] | None) -> None:
    """UserError if the run that a checkpoint belongs to was trained on other symbols than `vocab`."""
    import json

    for directory in checkpoint.parents[:3]:
        path = directory / "manifest.json"
        if vocab is None or not path.is_file():
            continue
        try:
            theirs = json.loads(path.read_text()).get("vocab")
        except (OSError, ValueError, AttributeError):
            return
        if theirs is not None and list(theirs) != list(vocab):
            raise UserError(
                f"{directory}: was trained on {len(theirs)} symbols ({' '.join(map(str, theirs[:6]))} ...), this dataset "
                f"has {len(vocab)} ({' '.join(map(str, vocab[:6]))} ...); the vocabularies must be the same"
            )
        return
