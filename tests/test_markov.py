"""Markov models against a dictionary of strings, a known figure, and laws of counting."""

import itertools
import math
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from data_prep.genome import prepare_genome
from seqlab import markov
from seqlab.dataset import SPLITS, TokenStore
from seqlab.errors import UserError
from seqlab.markov import PSEUDO_COUNTS, MarkovModels, fit

DATA = next(
    (p / "shared" / "data" for p in Path(__file__).resolve().parents if (p / "shared" / "data").is_dir()), Path("absent")
)


def make_store(folder: Path, sequences: list[str], rows: list[tuple[str, int, int, str]]) -> TokenStore:
    (folder / "in.fa").write_text("".join(f">s{i}\n{s}\n" for i, s in enumerate(sequences)))
    (folder / "in.bed").write_text("".join("\t".join(map(str, row)) + "\n" for row in rows))
    return TokenStore.open(prepare_genome([folder / "in.fa"], folder / "out", splits=folder / "in.bed", overwrite=True))


def pieces(sequences, rows, split: str) -> list[str]:
    """The split's intervals as upper-case text, neighbours joined."""
    intervals = sorted((name, start, end) for name, start, end, s in rows if s == split)
    joined: list[list] = []
    for name, start, end in intervals:
        if joined and joined[-1][0] == name and joined[-1][2] == start:
            joined[-1][2] = end
        else:
            joined.append([name, start, end])
    return [sequences[int(name[1:])][start:end].upper() for name, start, end in joined]


def reverse_complement(text: str) -> str:
    return text[::-1].translate(str.maketrans("ACGT", "TGCA"))


def slow_counts(texts: list[str], order: int, both_strands: bool) -> Counter:
    """(order+1)-mers of A, C, G, T, by string."""
    counts = Counter()
    for text in texts:
        for strand in (text, reverse_complement(text)) if both_strands else (text,):
            for i in range(len(strand) - order):
                word = strand[i : i + order + 1]
                if set(word) <= set("ACGT"):
                    counts[word] += 1
    return counts


def slow_bits(text: str, at: int, order: int, counts: list[Counter], pseudo: list[float]) -> tuple[float, bool]:
    """-log2 p of text[at] under the order-k model with back-off to the longest clean context."""
    k = 0
    while k < order and at - k - 1 >= 0 and text[at - k - 1] in "ACGT":
        k += 1
    context = text[at - k : at]
    seen = [counts[k][context + base] for base in "ACGT"]
    index = "ACGT".index(text[at])
    p = (seen[index] + pseudo[k]) / (sum(seen) + 4 * pseudo[k])
    return -math.log2(p), seen.index(max(seen)) == index


@st.composite
def genomes(draw):
    letters = draw(st.sampled_from(["ACGT", "AC", "ACGTacgt", "ACGTN", "ACGTNRn"]))
    sequences = draw(st.lists(st.text(alphabet=letters, min_size=1, max_size=90), min_size=1, max_size=3))
    rows = []
    for i, text in enumerate(sequences):
        cuts = sorted({0, len(text), *draw(st.lists(st.integers(0, len(text)), max_size=4))})
        for start, end in itertools.pairwise(cuts):
            split = draw(st.sampled_from(["train", "train", "valid", "test", None]))
            if split:
                rows.append((f"s{i}", start, end, split))
    assume(any(row[3] == "train" for row in rows))
    return sequences, rows


@settings(deadline=None, max_examples=80)
@given(genomes(), st.integers(0, 5), st.booleans(), st.sampled_from([7, 16, 1 << 21]))
def test_agrees_with_a_dictionary_of_strings(genome, max_order, both_strands, chunk):
    sequences, rows = genome
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(markov, "_CHUNK", chunk)  # borders of chunks must not show
        store = make_store(Path(folder), sequences, rows)
        texts = pieces(sequences, rows, "train")
        counts = [slow_counts(texts, k, both_strands) for k in range(max_order + 1)]
        if not counts[0]:
            with pytest.raises(UserError, match="holds no A, C, G or T"):
                fit(store, max_order=max_order, both_strands=both_strands)
            return
        models = fit(store, max_order=max_order, both_strands=both_strands)
        assert models.max_order == max_order and set(models.pseudo_counts) <= set(PSEUDO_COUNTS)
        for k, table in enumerate(models.counts):
            assert table.shape == (4 ** (k + 1),)
            seen = {}
            for code in np.flatnonzero(table):
                word = "".join("ACGT"[code >> (2 * (k - i)) & 3] for i in range(k + 1))
                seen[word] = int(table[code])
            assert seen == counts[k]

        for split in SPLITS:
            expected = {k: [] for k in range(max_order + 1)}
            for text in pieces(sequences, rows, split):
                for at in range(len(text)):
                    if text[at] in "ACGT":
                        for k, scored in expected.items():
                            scored.append(slow_bits(text, at, k, counts, models.pseudo_counts))
            for k, score in models.score(store, split).items():
                assert score.bases == len(expected[k])
                if score.bases:
                    bits, hits = zip(*expected[k], strict=True)
                    assert score.bits == pytest.approx(np.mean(bits), rel=1e-12)
                    assert score.accuracy == pytest.approx(np.mean(hits))
                else:
                    assert math.isnan(score.bits)


def slow_sides(text: str, hidden: list[bool], at: int, most: int, counts: list[Counter], pseudo: list[float]) -> tuple[float, bool]:
    """The same for the widest clean context of up to `most` bases on either side, none of them hidden."""
    k = 0
    while k < most and all(0 <= i < len(text) and text[i] in "ACGT" and not hidden[i] for i in (at - k - 1, at + k + 1)):
        k += 1
    seen = [counts[2 * k][text[at - k : at] + base + text[at + 1 : at + k + 1]] for base in "ACGT"]
    index = "ACGT".index(text[at])
    p = (seen[index] + pseudo[k]) / (sum(seen) + 4 * pseudo[k])
    return -math.log2(p), seen.index(max(seen)) == index


@settings(deadline=None, max_examples=60)
@given(genomes(), st.integers(0, 5), st.sampled_from([7, 1 << 21]), st.integers(1, 5))
def test_contexts_on_both_sides_agree_with_strings(genome, max_order, chunk, every):
    sequences, rows = genome
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(markov, "_CHUNK", chunk)
        store = make_store(Path(folder), sequences, rows)
        counts = [slow_counts(pieces(sequences, rows, "train"), k, True) for k in range(max_order + 1)]
        assume(counts[0])
        models = fit(store, max_order=max_order, hidden=lambda positions: positions % every == 0)
        assert len(models.side_pseudo_counts) == max_order // 2 + 1 and set(models.side_pseudo_counts) <= set(PSEUDO_COUNTS)
        for start, end in [pair for split in SPLITS for pair in store.intervals(split).tolist()]:
            text = "".join("ACGT"[t - 7] if 7 <= t < 11 else "N" for t in store.tokens[start:end])
            scored = [at for at in range(len(text)) if text[at] in "ACGT"]
            found = models.score_both_sides(store, np.array(scored, np.int64) + start, lambda positions: positions % every == 0)
            assert list(found) == list(range(1, max_order // 2 + 1))
            hidden = [position % every == 0 for position in range(start, end)]
            for k, (bits, hits) in found.items():
                expected = [slow_sides(text, hidden, at, k, counts, models.side_pseudo_counts) for at in scored]
                np.testing.assert_allclose(bits, [b for b, _ in expected], rtol=1e-12)
                assert hits.tolist() == [h for _, h in expected]


def test_by_hand(tmp_path):
    store = make_store(tmp_path, ["ACACACAG", "ACAT"], [("s0", 0, 8, "train"), ("s1", 0, 4, "test")])
    models = fit(store, max_order=1, both_strands=False)
    assert models.pseudo_counts == [1.0, 1.0]  # nothing to choose them on
    assert models.counts[0].tolist() == [4, 3, 1, 0]
    assert models.counts[1].reshape(4, 4).tolist() == [[0, 3, 1, 0], [3, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    bits, hits = models.score_positions(store, np.array([8, 9, 10, 11]))[1]
    # A begins the interval: order 0, 5/12; C after A 4/8; A after C 4/7; T after A 1/8
    np.testing.assert_allclose(2.0**-bits, [5 / 12, 4 / 8, 4 / 7, 1 / 8])
    assert hits.tolist() == [True, True, True, False]
    both = fit(store, max_order=1)
    assert both.counts[0].tolist() == [4, 4, 4, 4]
    assert both.counts[1].reshape(4, 4).tolist() == [[0, 3, 1, 0], [3, 0, 0, 1], [0, 0, 0, 3], [0, 0, 3, 0]]


def random_store(folder: Path, length: int = 6000) -> TokenStore:
    rng = np.random.default_rng(0)
    text = "".join(rng.choice(list("ACGTacgtN"), length, p=[0.2, 0.2, 0.2, 0.2, 0.05, 0.05, 0.05, 0.03, 0.02]))
    (folder / "in.fa").write_text(f">a\n{text}\n")
    return TokenStore.open(prepare_genome([folder / "in.fa"], folder / "out", overwrite=True))


def test_positions_may_come_in_any_order_and_several_times(tmp_path):
    store = random_store(tmp_path)
    models = fit(store, max_order=6)
    positions = np.flatnonzero((store.tokens >= 7) & (store.tokens <= 10))
    shuffled = np.random.default_rng(1).choice(positions, 3000)
    whole, some = models.score_positions(store, positions), models.score_positions(store, shuffled)
    for order in range(7):
        place = np.searchsorted(positions, shuffled)
        np.testing.assert_array_equal(whole[order][0][place], some[order][0])
        np.testing.assert_array_equal(whole[order][1][place], some[order][1])
    assert all(len(bits) == 0 for bits, _ in models.score_positions(store, np.array([], int)).values())


def test_soft_masked_and_other_bases_add_up(tmp_path):
    store = random_store(tmp_path)
    models = fit(store, max_order=4)
    every, soft, other = (models.score(store, "test", soft_masked=s) for s in (None, True, False))
    for k in every:
        assert soft[k].bases > 0 and soft[k].bases + other[k].bases == every[k].bases
        total = soft[k].bits * soft[k].bases + other[k].bits * other[k].bases
        assert total / every[k].bases == pytest.approx(every[k].bits)


def test_probabilities_add_up_to_one(tmp_path):
    """The same place scored with each base in turn."""
    chances = np.zeros(5)
    for base in "ACGT":
        folder = tmp_path / base
        folder.mkdir()
        rows = [("s0", 0, 60, "train"), ("s1", 0, 8, "test")]
        store = make_store(folder, ["ACGGTCATTACA" * 5, "ACGGTCA" + base], rows)
        scores = fit(store, max_order=4).score_positions(store, np.array([67]))
        chances += [2.0 ** -scores[k][0][0] for k in range(5)]
    np.testing.assert_allclose(chances, 1)


def test_pseudo_counts_are_the_best_ones_on_the_validation_split(tmp_path):
    store = random_store(tmp_path, 20_000)
    models = fit(store, max_order=5)
    for order in range(6):
        bits = {}
        for pseudo in PSEUDO_COUNTS:
            chosen = [pseudo if k == order else p for k, p in enumerate(models.pseudo_counts)]
            bits[pseudo] = MarkovModels(models.counts, chosen).score(store, "valid")[order].bits
        # bases with a short context are scored by the lower orders, alike in all
        assert bits[models.pseudo_counts[order]] == min(bits.values())


def test_counting_both_strands_is_symmetric(tmp_path):
    """The sequence and its reverse complement give the same models, longest order included."""
    text = "".join(np.random.default_rng(2).choice(list("ACGT"), 3000))
    tables = []
    for i, sequence in enumerate((text, reverse_complement(text))):
        folder = tmp_path / str(i)
        folder.mkdir()
        tables.append(fit(make_store(folder, [sequence], [("s0", 0, 3000, "train")]), max_order=12).counts)
    for order in (0, 1, 7, 11, 12):
        np.testing.assert_array_equal(tables[0][order], tables[1][order])
        assert tables[0][order].sum(dtype=np.int64) == 2 * (3000 - order)


@pytest.mark.parametrize(("length", "max_order"), [(140, 10), (280, 10), (150, 11), (150, 10)])
def test_a_counter_that_overflows_is_noticed(tmp_path, monkeypatch, length, max_order):
    monkeypatch.setattr(markov, "_COUNTER", np.uint8)
    store = make_store(tmp_path, ["A" * length], [("s0", 0, length, "train")])
    if (length, max_order) == (140, 10):  # 130 fit
        assert fit(store, max_order=10, both_strands=False).counts[10][0] == 130
        return
    with pytest.raises(UserError, match="use an order of 9 or less"):
        fit(store, max_order=max_order)
    assert fit(store, max_order=9).counts[9].sum() == 2 * (length - 9)


def test_bad_arguments(tmp_path):
    store = make_store(tmp_path, ["ACGTN"], [("s0", 0, 4, "train"), ("s0", 4, 5, "test")])
    for order in (-1, 13):
        with pytest.raises(ValueError, match="0 .. 12"):
            fit(store, max_order=order)
    models = fit(store, max_order=2)
    for positions, message in (([4], "position 4 .s0:4. holds no A, C, G or T"), ([-1], "0 .. 4"), ([5], "0 .. 4")):
        with pytest.raises(ValueError, match=message):
            models.score_positions(store, np.array(positions))
    with pytest.raises(UserError, match="the test split holds no A, C, G or T"):
        fit(store, "test", max_order=2)


@pytest.mark.skipif(not DATA.is_dir(), reason="the folder shared/data is not here")
def test_the_known_figure_for_e_coli(tmp_path):
    """E. coli K-12, every tenth block tests and the next validates, both strands: order 7 is best, 1.927 bits a base."""
    fasta = DATA / "genomes" / "ecoli_k12_mg1655.NC_000913.3.fa.gz"
    store = TokenStore.open(prepare_genome([fasta], tmp_path / "out"))
    scores = fit(store, max_order=8).score(store, "test")
    best = min(scores, key=lambda order: scores[order].bits)
    assert best == 7 and scores[7].bits == pytest.approx(1.927, abs=0.0005)
