"""Likeness to known genomes: words, folds and counts against a slow reference; what it says of relatives; k-mer regression."""

import numpy as np
import pytest
import torch

from seqlab import genes, homology
from seqlab.heads import homology as heads
from seqlab.heads.genes import GenePredictor
from seqlab.heads.homology import Composition, Homology, scale_of, scaled


def digits(n, seed):
    return np.random.default_rng(seed).integers(0, 4, n).astype(np.uint8)


def turned(x):
    return np.where(x < 4, 3 - x, 4)[::-1].astype(np.uint8)


def words(x, offsets):
    """Slowly: at each place the word that begins there, the same from both strands; None where a base is not known."""
    found = []
    for i in range(len(x) - offsets[-1]):
        word = [int(x[i + o]) for o in offsets]
        other = [3 - v for v in word[::-1]]
        found.append(None if 4 in word else tuple(min(word, other)))
    return found


def cut(x):
    return [part[part < 4] for part in np.split(x, np.flatnonzero(x == 4))]


def slow_counts(genomes, line, n):
    """`homology.count` by sets and loops, of one line of digits whose last n bases count."""
    single, paired = [], []
    for (offsets, step, runs), pairs in zip(homology.KINDS, homology.PAIRED):
        # genomes are cut where a base is not known, even one that a word skips
        known = [[part for stretch in stretches for part in cut(stretch)] for stretches in genomes]
        held = [{word for part in parts for word in words(part, offsets)} for parts in known]
        mine = words(line, offsets)
        has = np.array([[word in of for of in held] for word in mine]).reshape(len(mine), len(genomes))
        for least in runs:
            row = np.array([[all(i - j * step >= 0 and has[i - j * step, s] for j in range(least)) for s in range(len(genomes))] for i in range(len(mine))])
            last = row[max(0, len(row) - n) :].astype(int)
            single.append(last.sum(0))
            if least in pairs:
                paired.append((last.T @ last).ravel())
    return np.concatenate([*single, *paired])


@pytest.fixture(scope="module")
def genomes():
    """Three: the second has stretches of the first, changed in places and turned over; unknown bases here and there."""
    first, second, third = digits(900, 0), digits(700, 1), digits(400, 2)
    second[100:300] = turned(first[200:400])
    second[150:300:20] = (second[150:300:20] + 1) % 4
    second[400:500] = first[700:800]
    second[402:500:3] = (second[402:500:3] + 2) % 4
    first[550], third[[7, 200]] = 4, 4
    return [[first[:600], first[600:]], [second], [third]]


def base(*rows):
    return torch.from_numpy(np.stack(rows).astype(np.int64)).where(torch.from_numpy(np.stack(rows)) < 4, -1)


def test_counts_are_those_of_the_reference_in_one_go_and_in_pieces(genomes):
    part = Homology(3, 4000)
    part.keep(homology.keep(genomes, 4000))
    rows = [genomes[0][0][150:450], turned(genomes[1][0][350:650]), np.concatenate([digits(150, 5), genomes[2][0][100:250]])]
    found = part.count(base(*rows))
    for row, counts in zip(rows, found.tolist()):
        padded = np.concatenate([np.full(homology.REACH, 4, np.uint8), row])
        assert counts == slow_counts(genomes, padded, len(row)).tolist()
    assert found.shape[1] == homology.n_counts(3) and found.sum() > 1000
    assert torch.equal(part.count(base(*(turned(row) for row in rows))), found)  # from the other strand
    state = torch.full((3, homology.REACH), -1)
    total = torch.zeros_like(found)
    for piece in base(*rows).split([1, 40, 3, 200, 56], 1):
        total += part.count(piece, state)
        state = torch.cat([state, piece], 1)[:, -homology.REACH - 5 :]
    assert torch.equal(total, found)


def test_folds_leave_out_what_stands_in_them_alone(genomes):
    kept, blocks = homology.keep(genomes, 4000), np.array([150, 80, 50])
    (codon, contiguous) = (homology.index(kept, offsets, blocks=blocks) for offsets, *_ in homology.KINDS)
    row = genomes[0][0][200:400]  # in the first genome in folds 1 and 2, in the second in its 100 to 300: folds 1, 2 and 3
    line = torch.nn.functional.pad(base(row), (homology.REACH, 0), value=-1)
    everything = torch.tensor([[15, 15, 15]])

    def held(allowed):
        return homology.count((codon, contiguous), line, len(row), 3, torch.tensor([allowed]))[0, 9 : 12].tolist()

    plain = homology.count((homology.index(kept, homology.CODON), homology.index(kept, homology.CONTIGUOUS)), line, len(row), 3)
    assert torch.equal(homology.count((codon, contiguous), line, len(row), 3, everything), plain)
    assert held([15, 15, 15]) == plain[0, 9:12].tolist() and held([15, 15, 15])[0] == len(row) - 15
    assert held([15 & ~2, 15, 15])[0] == 85 and held([15 & ~4, 15, 15])[0] == 100  # words begin in a fold
    assert held([15 & ~2 & ~4, 15, 15])[0] == 0 and held([1, 15, 15])[1] == held([15, 15, 15])[1] > 50
    assert held([15, 1, 15])[1] == 0


def test_large_genomes_are_kept_in_part_and_small_ones_whole(monkeypatch):
    monkeypatch.setattr(homology, "PIECE", 100)
    large, small = [digits(5000, 0), digits(3000, 1)], [digits(250, 2)]
    kept = homology.keep([large, small], 2250)
    assert [int(kept.pieces[kept.pieces[:, 0] == s, 1].sum()) for s in (0, 1)] == [2000, 250]
    for species, length, at in kept.pieces.tolist():
        start = int(kept.pieces[: kept.pieces.tolist().index([species, length, at]), 1].sum())
        assert any(np.array_equal(kept.bases[start : start + length], x[at : at + length]) for x in (large, small)[species])
    monkeypatch.setattr(homology, "PIECES", 3)
    assert len(homology.keep([large, small], 2250).pieces) == 3
    assert np.array_equal(homology.unpack(homology.pack(kept.bases), len(kept.bases)), kept.bases)
    assert len(homology.keep([[digits(90, i)] for i in range(3)], 200).bases) == 198  # what is over of 200 is nobody's
    assert len(homology.keep([[np.full(50, 4, np.uint8)], [digits(10, 0)]], 100).bases) == 0  # nothing known, nothing long enough


def test_weights_carry_the_genomes_and_a_fitted_part_answers_alike(genomes):
    part, other = Homology(3, 4000).eval(), Homology(3, 4000).eval()
    row = base(genomes[0][0][150:450])
    assert other.count(row).sum() == 0  # nothing is known yet
    part.keep(homology.keep(genomes, 4000))
    part.weight["last"].normal_()
    part.scale.copy_(torch.tensor([[0.5, -0.2]]))
    other.load_state_dict(part.state_dict())
    state, length = part.feed(None, row), torch.tensor([300.0], dtype=torch.float64)
    assert torch.equal(other.count(row), part.count(row)) and torch.equal(other(other.feed(None, row), length), part(state, length))
    assert part(state, length).abs().sum() > 0 and abs(float(part(state, length).sum())) < 1e-4
    assert torch.allclose(scale_of(torch.zeros(1, 2)), torch.tensor([[1.0, 0.0]]))
    two = torch.tensor([[[3.0, 1.0], [0.0, 1.0]]]), torch.tensor([[2.0, 1.0], [1.0, 0.0]]), torch.tensor([2048.0])
    assert torch.allclose(scaled(*two), torch.tensor([[4.0 - 0.5, -4.0 + 0.5]]))


def test_log_odds_of_a_sequence_are_the_mean_of_its_stretches(genomes, monkeypatch):
    monkeypatch.setattr(heads, "STRETCH", 64)
    part = Homology(3, 4000).eval()
    part.keep(homology.keep(genomes, 4000))
    for weight in part.parameters():
        weight.normal_(std=0.3)
    rows = base(genomes[0][0][150:450], turned(genomes[1][0][350:650]), genomes[2][0][50:350])
    length = torch.tensor([300, 200, 40])
    real = torch.arange(300) < length[:, None]
    rows = torch.where(real, rows, -1)
    line, expected = torch.nn.functional.pad(rows, (homology.REACH, 0), value=-1), torch.zeros(3, 1, 3, dtype=torch.float64)
    for row in range(3):  # a stretch at a time
        for at in range(0, int(length[row]), 64):
            n = min(64, int(length[row]) - at)
            counts = homology.count(part.indices(), line[row : row + 1, : homology.REACH + at + n][:, at:], n, 3)
            expected[row] += n / length[row] * part.judge(counts, torch.tensor([float(n)], dtype=torch.float64))
    assert expected.abs().min(2).values.max() > 0.01
    assert torch.allclose(part.unscaled(part.feed(None, rows, real=real), length), expected)
    state, at, before = None, 0, torch.full((3, homology.REACH), -1)
    for size in (1, 40, 23, 64, 100, 0, 72):  # in pieces, whether they end with a stretch or within one
        state = part.feed(state, rows[:, at : at + size], before, None, at, real[:, at : at + size])
        before, at = torch.cat([before, rows[:, at : at + size]], 1)[:, -homology.REACH :], at + size
    assert torch.allclose(part.unscaled(state, length), expected)


def slow_log_odds(part, counts, length):
    """`Homology.judge` of one stretch by loops: a score for each species, from its counts and what is heard of every other."""
    n, length = part.n_species, max(64.0, float(length))
    single, both = counts[: len(counts) - 3 * n * n].reshape(-1, n), counts[len(counts) - 3 * n * n :].reshape(3, n, n)

    def silu(x):
        return x / (1 + np.exp(-x))

    def score(member, s):
        def map_(name, x):
            bias = part.bias[name][member].double().numpy() if name in part.bias else 0
            return part.weight[name][member].double().numpy() @ x + bias

        def own(s):
            rate = single[:, s] / length
            x = np.concatenate([np.log1p(1024 * rate), np.log1p(single[:, s]), 4 * rate, [np.log(length / 1024)]])
            return np.concatenate([(x - part.own_centre.double().numpy()) / part.own_spread.double().numpy(), part.trait[member, s].double().numpy()])

        heard = []
        for r in set(range(n)) - {s}:
            x = np.concatenate([both[:, s, s] - both[:, s, r], both[:, r, r] - both[:, s, r], both[:, s, r]])
            x = (np.concatenate([np.log1p(x), 4 * x / length]) - part.pair_centre.double().numpy()) / part.pair_spread.double().numpy()
            pair = np.concatenate([x, part.relation[member, s, r].double().numpy()])
            heard.append(silu(map_("mine", own(s)) + map_("theirs", own(r)) + map_("pair", pair)))
        hidden = silu(map_("first", own(s)) + map_("compared", np.concatenate([np.mean(heard, 0), np.max(heard, 0)])))
        return map_("last", silu(map_("second", hidden)))[0]

    return [np.mean([score(member, s) for member in range(heads.MEMBERS)]) for s in range(n)]


def test_log_odds_are_those_of_the_reference(genomes):
    part = Homology(3, 4000).eval()
    part.keep(homology.keep(genomes, 4000))
    for name, value in (*part.named_parameters(), *part.named_buffers()):
        if name not in ("bases", "pieces", "scale"):
            value.copy_(torch.rand(value.shape) + 0.5 if name.endswith("spread") else torch.randn(value.shape) * 0.3)
    counts = part.count(base(genomes[0][0][150:450], turned(genomes[1][0][350:650])))
    found = part.judge(counts, torch.tensor([300.0, 300.0], dtype=torch.float64))
    for row in range(2):
        assert np.allclose(found[row].numpy(), slow_log_odds(part, counts[row].numpy(), 300))
    assert found.std(1).min() > 0.01


def test_without_traits_no_species_is_another_than_the_rest(genomes):
    """Genomes in another order: the same log-odds in that order. Nothing found: no log-odds at all."""
    part, other = Homology(3, 4000).eval(), Homology(3, 4000).eval()
    part.weight["last"].normal_()
    part.trait.zero_()
    other.load_state_dict(part.state_dict())
    order = [2, 0, 1]
    part.keep(homology.keep(genomes, 4000))
    other.keep(homology.keep([genomes[i] for i in order], 4000))
    rows, length = base(genomes[0][0][150:450], digits(300, 9)), torch.full((2,), 300.0, dtype=torch.float64)
    odds, turned_odds = (p.judge(p.count(rows), length) for p in (part, other))
    assert torch.allclose(turned_odds, odds[:, order]) and odds[0].std() > 0.01
    assert part.count(rows[1:]).sum() == 0 and odds[1].std() < 1e-12


def test_composition_counts_kmers_of_both_strands_in_pieces():
    part = Composition(2, 3)
    x = np.concatenate([digits(60, 0), [4], digits(20, 1)]).astype(np.uint8)
    found = part.count(base(x, turned(x)[: len(x)]))
    assert part.count(base(x)[:0]).shape == (0, 32)
    assert found.shape == (2, 32) and torch.equal(found[0], found[1]) and found[0].sum() == 58 + 18
    slow = {}
    for word in words(x, (0, 1, 2)):
        if word is not None:
            slow[word] = slow.get(word, 0) + 1
    assert sorted(found[0][found[0] > 0].tolist()) == sorted(slow.values())
    pieces, tail = torch.zeros(1, 32, dtype=torch.float64), torch.full((1, 7), -1)
    for piece in base(x).split([1, 30, 2, 48], 1):
        pieces += part.count(piece, tail)
        tail = torch.cat([tail, piece], 1)[:, -7:]
    assert torch.equal(pieces[0], found[0])
    assert torch.isfinite(part(torch.zeros(1, 32, dtype=torch.float64), torch.zeros(1, dtype=torch.float64))).all()


@pytest.mark.parametrize("k", [2, 3, 4])
def test_composition_by_reading_frame_counts_what_the_states_say(k):
    part = Composition(2, k, framed=True)
    x = np.concatenate([digits(60, 0), [4], digits(20, 1)]).astype(np.uint8)
    reading = torch.rand(1, len(x), 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    reading /= reading.sum(2, keepdim=True)
    slow = np.zeros((4, 4**k))
    for end in range(k - 1, len(x)):
        word = x[end - k + 1 : end + 1]
        if word.max() > 3:
            continue
        here = int("".join(map(str, word)), 4)
        there = int("".join(str(3 - v) for v in word[::-1]), 4)
        p = reading[0, end].tolist()
        slow[3, here] += p[0] / 2
        slow[3, there] += p[0] / 2
        for following in range(3):  # codon position, from 0, of the base that comes next
            slow[(following - k) % 3, here] += p[1 + following]
        for state in range(3):  # of the other strand, codon positions are met as 3 2 1; the base before has the position after
            slow[(3 - state) % 3, there] += p[4 + state]
    found = part.count(base(x), reading=reading)
    assert found.shape == (1, 4 * 4**k)
    torch.testing.assert_close(found[0].view(4, -1), torch.from_numpy(slow), rtol=0, atol=2e-3)
    torch.testing.assert_close(found.sum().item(), float(60 - k + 1 + 20 - k + 1), rtol=0, atol=1e-2)
    pieces, tail, at = torch.zeros_like(found), torch.full((1, 7), -1), 0
    for piece in base(x).split([1, 30, 2, 48], 1):
        pieces += part.count(piece, tail, reading[:, at : at + piece.shape[1]])
        tail, at = torch.cat([tail, piece], 1)[:, -7:], at + piece.shape[1]
    assert torch.equal(pieces, found)


def test_a_gene_is_read_in_its_frame_on_either_strand():
    """In a genome of one repeated codon every frame is known: its 3-mers that begin a codon are that codon, on both strands."""
    rng = np.random.default_rng(0)
    codons = np.array([[0, 1, 2], [2, 2, 1], [1, 0, 1], [2, 1, 3]])
    gene = codons[rng.integers(0, 4, 400)].ravel().astype(np.uint8)
    predictor = GenePredictor(2, 2)
    model = genes.fit([np.concatenate([gene, genes.reverse_complement(gene)])], 2)
    predictor.fit([model, model])
    part = Composition(2, 3, framed=True)
    # a model that was given no annotation has no names for strands and codon positions: the gene may be the other strand's
    used = [sorted(int("".join(map(str, codon)), 4) for codon in side) for side in (codons.tolist(), (3 - codons[:, ::-1]).tolist())]
    for strand in (gene, genes.reverse_complement(gene)):
        line = base(strand)
        reading = predictor(line, with_reading=True)[0].reading
        torch.testing.assert_close(reading.sum(2), torch.ones(1, len(gene), dtype=reading.dtype), rtol=0, atol=1e-5)
        counts = part.count(line, reading=reading)[0].view(4, 64)
        inside = torch.stack([counts[:3, side].sum(1) for side in used]) / counts[:3].sum(1)
        best = int(inside.max(0).values.argmax())
        assert counts[best].sum() > 380 and inside[:, best].max() > 0.97  # one frame, which holds the codons and nothing else
        first, state = predictor(line[:, :500], with_reading=True)
        second, _ = predictor(line[:, 500:], state, with_reading=True)
        torch.testing.assert_close(torch.cat([first.reading, second.reading], 1), reading, rtol=0, atol=1e-6)
