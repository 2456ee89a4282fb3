"""Simulated genomes: deterministic, of the length asked for, with the structure they promise."""

import random
import re

import pytest

from data_prep.genome import prepare_genome
from data_prep.simulate import simulate_genome
from seqlab.dataset import TokenStore
from seqlab.errors import UserError
from seqlab.markov import fit


def test_the_seed_and_the_length_decide(tmp_path):
    paths = [
        simulate_genome(tmp_path / f"{i}.fa", length=length, seed=seed)
        for i, (length, seed) in enumerate([(20_000, 0), (20_000, 0), (20_000, 1)])
    ]
    one, same, other = (path.read_bytes() for path in paths)
    assert one == same and one != other
    for text in (one, other):
        lines = text.decode().splitlines()
        assert sum(len(line) for line in lines if not line.startswith(">")) == 20_000
        assert sum(line.startswith(">") for line in lines) == 4 and max(map(len, lines)) == 60


def test_bad_arguments(tmp_path):
    with pytest.raises(UserError, match="10,000 bases or more, got 9,999"):
        simulate_genome(tmp_path / "x.fa", length=9999)
    with pytest.raises(UserError, match="cannot be written"):
        simulate_genome(tmp_path / "no" / "x.fa", length=10_000)
    path = simulate_genome(tmp_path / "x.fa", length=10_000)
    with pytest.raises(UserError, match="exists"):
        simulate_genome(path, length=10_000)
    assert [p.name for p in tmp_path.iterdir()] == ["x.fa"]


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> TokenStore:
    folder = tmp_path_factory.mktemp("sim")
    return TokenStore.open(prepare_genome([simulate_genome(folder / "s.fa", length=600_000)], folder / "out"))


def test_composition(store):
    manifest = store.manifest
    assert manifest["counts"]["N"] == 200 and manifest["counts"]["other"] == 0
    assert 0.01 < manifest["soft_masked"] / manifest["total"] < 0.2


def test_genes_lie_on_both_strands(tmp_path):
    """Open reading frames of 150 codons and more are far too many for chance, on each strand."""
    text = simulate_genome(tmp_path / "s.fa", length=300_000).read_text()
    sequence = "".join(line for line in text.splitlines() if not line.startswith(">")).upper()
    frame = re.compile(r"ATG(?:(?!TAA|TAG|TGA)[ACGT]{3}){150,}(?:TAA|TAG|TGA)")
    reverse = sequence[::-1].translate(str.maketrans("ACGT", "TGCA"))
    found = [len(frame.findall(strand)) for strand in (sequence, reverse)]
    by_chance = len(frame.findall("".join(random.Random(0).sample(sequence, len(sequence)))))
    assert min(found) > 50 and by_chance < min(found) / 4


def test_markov_models_find_some_of_it_but_not_all(store):
    """Codons come from 1.56 bits a base once strand and phase are known; no short context knows them."""
    best = min(score.bits for score in fit(store, max_order=8).score(store, "test").values())
    assert 1.75 < best < 1.93
