"""What likeness to known genomes says of a sequence: log-odds of the species, from how many words each genome holds.

`Homology` keeps the genomes of the training split, two bits a base (seqlab/homology.py). Of every stretch of a sequence it counts the
words that each species holds, at several levels of identity; a small network makes log-odds of the counts, which are averaged over the
stretches. (A genome is a patchwork: what relatives share ends after some hundred bases, and counts of a whole window mix both kinds.)

What likeness means is much the same for every species: "found in its genome four fifths identical, and nowhere better" speaks against it, "found
there without a difference" for it. So all species share the network's weights: of each it reads the counts of its words, and of each
pair what one holds and the other does not; a few numbers of each species and each pair (`trait`, `relation`) say what is special
about them. Two such networks are averaged, since what they make of the rarest stretches is a matter of chance. A species of which the training split has no ribosomal operon, say, is so told by what the others' operons have taught.

The network is fitted after training (seqlab/classification/words.py) on windows whose own place was left out of their genome, and on some for which it was
not: it so learns that a stretch which stands in one species four fifths identical, and nowhere else, speaks for that species' relative, and one that
stands there without a difference for the species itself.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqlab import homology

WIDTH, DROPOUT = 64, 0.2  # of the network's hidden layers
TRAITS = 8  # numbers that are a species' own, and a pair's
MEMBERS = 2  # networks, whose log-odds are averaged
STRETCH = 512  # bases of which likeness is judged together
LONGEST = 8192  # bases; composition is fitted to windows up to here
SHORTEST = 64
UNITS = 1 << 16  # to a k-mer that is counted by reading frame


class Homology(nn.Module):
    """feed(state or None, base (b l), ...) -> state (b n) float64, piece by piece; forward(state, length (b)) -> log-odds (b n_species)
    float32, times `scale`, which is 0 until it is calibrated. It is computed in float64: where a row stands in a batch decides the last
    bits of logarithms and products, and in float32 they would be seen. `capacity`: bases that are kept, of all species together.

    A state holds, of the stretches that are over, the sum of what `judge` says times their bases (n_species), then the bases of
    the one that is not, and its counts."""

    def __init__(self, n_species: int, capacity: int):
        super().__init__()
        self.n_species, self.capacity = n_species, capacity
        self.register_buffer("bases", torch.zeros(-(-capacity // 4), dtype=torch.uint8))
        self.register_buffer("pieces", torch.zeros(homology.PIECES, 3, dtype=torch.int64))
        own, pair = (part.shape[-1] for part in self.inputs(torch.zeros(1, homology.n_counts(n_species)), torch.ones(1)))
        for name, width in (("own", own), ("pair", pair)):
            self.register_buffer(f"{name}_centre", torch.zeros(width))
            self.register_buffer(f"{name}_spread", torch.ones(width))
        own, pair = own + TRAITS, pair + TRAITS
        inputs = dict(mine=own, theirs=own, pair=pair, first=own, compared=2 * WIDTH, second=WIDTH)
        self.weight = nn.ParameterDict({name: nn.Parameter(torch.zeros(MEMBERS, WIDTH, width)) for name, width in inputs.items()})
        self.weight["last"] = nn.Parameter(torch.zeros(MEMBERS, 1, WIDTH))
        self.bias = nn.ParameterDict({name: nn.Parameter(torch.zeros(MEMBERS, WIDTH)) for name in ("mine", "first", "second")})
        self.trait = nn.Parameter(torch.zeros(MEMBERS, n_species, TRAITS))
        self.relation = nn.Parameter(torch.zeros(MEMBERS, n_species, n_species, TRAITS))
        self.start_anew()
        self.requires_grad_(False)  # training leaves it alone
        self.register_buffer("scale", torch.zeros(1, 2))  # what its log-odds count at 1,024 bases, and the exponent of the length
        self._indices: tuple[homology.Index, ...] | None = None

    @torch.no_grad()
    def start_anew(self, rng: torch.Generator | None = None) -> None:
        """Weights as before they are fitted: no log-odds at all."""
        for name, weight in self.weight.items():
            width = weight.shape[2] ** -0.5
            for part in (weight, self.bias[name]) if name in self.bias else (weight,):
                part.copy_((2 * torch.rand(part.shape, generator=rng) - 1) * width)
        self.trait.copy_(0.5 * torch.randn(self.trait.shape, generator=rng))
        self.relation.zero_()
        self.weight["last"].zero_()

    @torch.no_grad()
    def keep(self, genomes: homology.Genomes) -> None:
        """Take over the genomes that are to be looked up in."""
        packed = homology.pack(genomes.bases)
        self.bases.zero_()[: len(packed)] = torch.from_numpy(packed)
        self.pieces.zero_()[: len(genomes.pieces)] = torch.from_numpy(genomes.pieces)
        self._indices = None

    def genomes(self) -> homology.Genomes:
        pieces = self.pieces.cpu().numpy()
        pieces = pieces[pieces[:, 1] > 0]
        return homology.Genomes(homology.unpack(self.bases.cpu().numpy(), int(pieces[:, 1].sum())), pieces)

    def indices(self, blocks: np.ndarray | None = None) -> tuple[homology.Index, ...]:
        """An index for each kind of word, on the device of the weights; with `blocks`, of their folds."""
        genomes, device = self.genomes(), self.bases.device
        return tuple(homology.index(genomes, offsets, blocks=blocks, device=device) for offsets, *_ in homology.KINDS)

    def _load_from_state_dict(self, *arguments) -> None:
        super()._load_from_state_dict(*arguments)
        self._indices = None

    @torch.no_grad()
    def count(self, base: Tensor, before: Tensor | None = None) -> Tensor:
        """Counts (b n) of all of a piece: base (b l), before (b REACH or more): 0 to 3, -1 where not known; before: the bases that
        precede this piece, not known where None."""
        return homology.count(*self._line(base, before), base.shape[1], self.n_species)

    def _line(self, base: Tensor, before: Tensor | None) -> tuple[tuple[homology.Index, ...], Tensor]:
        if self._indices is None or self._indices[0].keys.device != base.device:
            self._indices = self.indices()
        line = F.pad(base, (homology.REACH, 0), value=-1)
        if before is not None:
            line[:, : homology.REACH] = before[:, -homology.REACH :]
        return self._indices, line

    @torch.no_grad()
    def feed(
        self, state: Tensor | None, base: Tensor, before: Tensor | None = None, reading: Tensor | None = None, position: int = 0, real: Tensor | None = None
    ) -> Tensor:
        """Take in a piece that begins at `position`: base, before as for `count`; real (b l) bool: which positions are no padding, which
        is on the right (None: all are). `reading` is not looked at (see `Composition`)."""
        n, said = homology.n_counts(self.n_species), self.n_species
        if state is None:
            state = base.new_zeros(len(base), said + 1 + n, dtype=torch.float64)
        if not base.shape[1]:
            return state
        used = position % STRETCH
        counts = homology.count_stretches(*self._line(base, before), base.shape[1], self.n_species, STRETCH, used)
        ones = torch.ones_like(base, dtype=torch.bool) if real is None else real
        length = F.pad(ones, (used, -(used + base.shape[1]) % STRETCH)).unflatten(1, (-1, STRETCH)).sum(2).double()  # (b k)
        counts[:, 0] += state[:, said + 1 :]
        length[:, 0] += state[:, said]
        over = (used + base.shape[1]) // STRETCH  # how many stretches end in this piece
        judged = self.judge(counts[:, :over].flatten(0, 1), length[:, :over].flatten()).unflatten(0, (len(base), over))
        sums = state[:, :said] + (length[:, :over, None] * judged).sum(1)
        if over == counts.shape[1]:
            return torch.cat([sums, torch.zeros_like(state[:, said:])], 1)
        return torch.cat([sums, length[:, over:], counts[:, over]], 1)

    def inputs(self, counts: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
        """What the network reads, counts (b n), length (b): of each species (b n_species m) how many words it holds, of each pair (b n_species
        n_species m') how many one holds and the other does not, the reverse, and how many both do; logarithms and shares."""
        n = self.n_species
        single, both = counts.split([counts.shape[1] - homology.N_PAIRED * n * n, homology.N_PAIRED * n * n], 1)
        single = single.unflatten(1, (-1, n)).transpose(1, 2)
        both = both.unflatten(1, (homology.N_PAIRED, n, n)).permute(0, 2, 3, 1)
        length = length.clamp(min=SHORTEST)[:, None, None]
        log_length = (length / 1024).log().expand(-1, n, 1)
        rate = single / length
        own = torch.cat([(1024 * rate).log1p(), single.log1p(), 4 * rate, log_length], -1)
        held = both.diagonal(dim1=1, dim2=2).transpose(1, 2)
        alone = held[:, :, None] - both  # the first holds, the second does not
        pair = torch.cat([alone, alone.transpose(1, 2), both], -1)
        return own, torch.cat([pair.log1p(), 4 * pair / length[..., None]], -1)

    def log_odds(self, inputs: tuple[Tensor, Tensor]) -> Tensor:
        """(members b n_species) of what `inputs` gave, in its precision; differentiable, for fitting."""
        with torch.autocast(inputs[0].device.type, enabled=False):
            own = self._known("own", inputs[0], self.trait[:, None])  # (members b n_species m)
            pair = self._known("pair", inputs[1], self.relation[:, None])
            # what each species hears of every other: (members b n_species n_species w)
            heard = F.silu(self._map("mine", own)[:, :, :, None] + self._map("theirs", own)[:, :, None] + self._map("pair", pair))
            itself = torch.eye(self.n_species, dtype=torch.bool, device=own.device)[..., None]
            mean = heard.masked_fill(itself, 0.0).sum(3) / max(1, self.n_species - 1)
            most = heard.masked_fill(itself, -torch.inf).amax(3) if self.n_species > 1 else mean
            hidden = F.silu(self._map("first", own) + self._map("compared", torch.cat([mean, most], -1)))
            hidden = F.dropout(hidden, DROPOUT, self.training)
            return self._map("last", F.silu(self._map("second", hidden)))[..., 0]

    def _known(self, name: str, counted: Tensor, special: Tensor) -> Tensor:
        """What was counted, in standard deviations, and the numbers that are a species' or a pair's own, for each member."""
        counted = (counted - getattr(self, f"{name}_centre")) / getattr(self, f"{name}_spread")
        counted, special = counted.expand(MEMBERS, *counted.shape), special.to(counted.dtype)
        return torch.cat([counted, special.expand(*counted.shape[:-1], TRAITS)], -1)

    def _map(self, name: str, x: Tensor) -> Tensor:
        """The linear map of each member: (members ... m) -> (members ... m')."""
        y = x.flatten(1, -2) @ self.weight[name].to(x.dtype).transpose(1, 2)
        if name in self.bias:
            y = y + self.bias[name].to(x.dtype)[:, None]
        return y.view(*x.shape[:-1], y.shape[-1])

    def judge(self, counts: Tensor, length: Tensor) -> Tensor:
        """Log-odds (b n_species) of single stretches."""
        return self.log_odds(self.inputs(counts, length)).mean(0)

    def unscaled(self, state: Tensor, length: Tensor) -> Tensor:
        """(b 1 n_species) before `scale`: the mean of all stretches, of sequences of length (b)."""
        sums, last, counts = state.split([self.n_species, 1, state.shape[1] - self.n_species - 1], 1)
        sums = sums + last * self.judge(counts, last[:, 0])
        return (sums / length.clamp(min=1)[:, None].double())[:, None]

    def forward(self, state: Tensor, length: Tensor) -> Tensor:
        return scaled(self.unscaled(state, length), self.scale, length).float()


class Composition(nn.Module):
    """K-mer regression as part of a model: feed(counts or None, base (b l), ...) -> counts (b n) float64, how often each k-mer occurs;
    forward(counts, length (b)) -> log-odds (b n_species) float32, a linear map of their shares, times `scale`, which is 0 until it is calibrated.
    Fitted after training (seqlab/classification/words.py).

    A k-mer and its reverse complement are one. `framed`: they are counted by reading frame. `reading` (b l s), from the gene models, has
    the probabilities of the state that follows each position (`genes.STATES`); a k-mer counts in each of the three positions of a
    codon in which it may begin, read on the strand of its gene, and among what lies between genes, as much as is probable."""

    def __init__(self, n_species: int, k: int, framed: bool = False):
        super().__init__()
        self.k, self.framed = k, framed
        if framed:
            self.n = 4 * 4**k  # begins at codon position 1, 2, 3; between genes
        else:
            digits = np.stack([np.arange(4**k) // 4 ** (k - 1 - i) % 4 for i in range(k)])
            other = sum((3 - digits[i]) * 4**i for i in range(k))
            same, column = np.unique(np.minimum(np.arange(4**k), other), return_inverse=True)
            self.n = len(same)
            self.register_buffer("column", torch.from_numpy(np.append(column, self.n)), persistent=False)  # the last: not known
        self.register_buffer("weight", torch.zeros(n_species, self.n))
        self.register_buffer("centre", torch.zeros(self.n))
        self.register_buffer("scale", torch.zeros(1, 2))

    @torch.no_grad()
    def count(self, base: Tensor, before: Tensor | None = None, reading: Tensor | None = None) -> Tensor:
        """base (b l), before (b k-1 or more): 0 to 3, -1 where not known; reading (b l s) where `framed`."""
        rows, length = base.shape
        line = F.pad(base, (self.k - 1, 0), value=-1)
        if before is not None:
            line[:, : self.k - 1] = before[:, len(before[0]) - (self.k - 1) :]
        code, other, known = torch.zeros_like(base), torch.zeros_like(base), torch.ones_like(base, dtype=torch.bool)
        for i in range(self.k):
            part = line[:, i : i + length]
            known = known & (part >= 0)
            code = code * 4 + part
            other = other + (3 - part) * 4**i
        if self.framed:
            return self._count_framed(code.where(known, 0), other.where(known, 0), known, reading)
        column = self.column[torch.where(known, code, 4**self.k)]
        row = torch.arange(rows, device=base.device)[:, None] * (self.n + 1)
        counts = torch.bincount((column + row).flatten(), minlength=rows * (self.n + 1))
        return counts.view(rows, self.n + 1)[:, : self.n].double()

    def feed(
        self, state: Tensor | None, base: Tensor, before: Tensor | None = None, reading: Tensor | None = None, position: int = 0, real: Tensor | None = None
    ) -> Tensor:
        """Counts (b n) so far: see `Homology.feed`; `position` and `real` are not looked at."""
        counts = self.count(base, before, reading)
        return counts if state is None else state + counts

    def _count_framed(self, code: Tensor, other: Tensor, known: Tensor, reading: Tensor) -> Tensor:
        # In whole numbers, whose sums do not depend on the order in which a GPU adds them.
        share = (reading * UNITS).round().long() * known[..., None]
        counts = share.new_zeros(len(code), self.n)
        words = 4**self.k

        def add(group: int, word: Tensor, units: Tensor) -> None:
            counts.scatter_add_(1, (group * words + word).long(), units)

        for position in range(3):  # of the next base, if a gene goes on
            add((position - self.k) % 3, code, 2 * share[..., 1 + position])
            add(-position % 3, other, 2 * share[..., 4 + position])  # met backwards: the newest base is the word's first
        add(3, code, share[..., 0])  # half a word on either strand
        add(3, other, share[..., 0])
        return counts.double() / (2 * UNITS)

    def shares(self, counts: Tensor) -> Tensor:
        return counts / counts.sum(1, keepdim=True).clamp(min=1.0)

    def log_odds(self, shares: Tensor) -> Tensor:
        with torch.autocast(shares.device.type, enabled=False):
            return F.linear(shares - self.centre, self.weight.to(shares.dtype))

    def unscaled(self, counts: Tensor, length: Tensor) -> Tensor:
        """(b 1 n_species) before `scale`."""
        return self.log_odds(self.shares(counts))[:, None]

    def forward(self, counts: Tensor, length: Tensor) -> Tensor:
        return scaled(self.unscaled(counts, length), self.scale, length).float()


def scaled(log_odds: Tensor, scale: Tensor, length: Tensor) -> Tensor:
    """(b n): log-odds (b m n), less their means, times what each counts, summed. scale (m 2): at 1,024 bases, and the exponent with
    which that changes with the length (b)."""
    logs = (length.clamp(min=SHORTEST) / 1024.0).log().to(log_odds.dtype)[:, None]
    by_length = scale[:, 0] * torch.exp(logs * scale[:, 1])
    return (by_length[..., None] * (log_odds - log_odds.mean(-1, keepdim=True))).sum(1)


def scale_of(found: Tensor) -> Tensor:
    """Free numbers (m 2) -> scales above 0, exponents between -1 and 1, which independent witnesses have. Where all answers are right
    nothing else would hold them back."""
    return torch.stack([found[:, 0].exp(), found[:, 1].tanh()], 1)
