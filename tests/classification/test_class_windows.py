"""Windows of classes: the statistics of sampling, fixed evaluation windows, N, and classes that are too short."""

import numpy as np
import pytest

from data_prep.species import Source, prepare_species
from seqlab.classification.windows import ClassWindows
from seqlab.dataset import TokenStore
from seqlab.errors import UserError
from seqlab.tokenizers import nucleotide


def bases(length, seed):
    rng = np.random.default_rng(seed)
    return np.frombuffer(b"ACGT", np.uint8)[rng.integers(0, 4, length)].tobytes().decode()


def store_of(folder, species, **options):
    sources = []
    for name, records in species.items():
        path = folder / f"{name}.fa"
        path.write_text("".join(f">{key}\n{text}\n" for key, text in records.items()))
        sources.append(Source(name, path))
    return TokenStore.open(prepare_species(sources, folder / "out", **options))


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    held = {"v": bases(600, 90), "t": bases(600, 91)}
    return store_of(
        tmp_path_factory.mktemp("windows"),
        {"a": {**held, "long": bases(6000, 1), "short": bases(2000, 2)}, "b": {"v": bases(600, 92), "t": bases(600, 93), "x": bases(1000, 3)}},
        valid=["v"], test=["t"], allow_duplicates=True,
    )


def test_species_uniformly_then_sequences_by_length_then_position(store):
    windows = ClassWindows(store, "train").sample(np.random.default_rng(0), 20_000, 100)
    assert np.bincount(windows.label).tolist() == pytest.approx([10_000, 10_000], abs=300)
    assert windows.reverse.mean() == pytest.approx(0.5, abs=0.02)
    inside = np.searchsorted(store.offsets, windows.start, side="right") - 1
    names = np.array(store.names)[inside]
    of_a = names[windows.label == 0]
    assert set(of_a) == {"a/long", "a/short"}
    assert (of_a == "a/long").mean() == pytest.approx(5901 / (5901 + 1901), abs=0.02)
    position = windows.start - store.offsets[inside]
    assert position[names == "a/long"].max() == 5900 and position[names == "a/long"].min() < 5
    quarters = np.histogram(position[names == "a/long"], 4, (0, 5901))[0] / (names == "a/long").sum()
    assert quarters == pytest.approx([0.25] * 4, abs=0.02)
    assert (windows.length == 100).all()


def test_sampling_is_a_function_of_the_generator_alone(store):
    windows = ClassWindows(store, "train")
    one, two = (windows.sample(np.random.default_rng(5), 50, 64) for _ in range(2))
    assert np.array_equal(one.start, two.start) and np.array_equal(one.reverse, two.reverse)
    assert not np.array_equal(one.start, windows.sample(np.random.default_rng(6), 50, 64).start)


def test_windows_read_the_strand_they_say(store):
    windows = ClassWindows(store, "train").sample(np.random.default_rng(1), 20, 50)
    ids, mask = windows.tokens(store)
    assert mask is None and ids.shape == (20, 50)
    for row, start, reverse in zip(ids, windows.start, windows.reverse):
        own = store.tokens[start : start + 50]
        assert np.array_equal(row, nucleotide.reverse_complement(own) if reverse else own)
    assert not ClassWindows(store, "train").sample(np.random.default_rng(1), 20, 50, random_strand=False).reverse.any()


def test_a_class_of_short_sequences_gives_whole_ones_padded(store):
    windows = ClassWindows(store, "train").sample(np.random.default_rng(0), 40, 1500)
    assert (windows.length[windows.label == 1] == 1000).all() and (windows.length[windows.label == 0] == 1500).all()
    ids, mask = windows.tokens(store)
    row = int(np.flatnonzero(windows.label == 1)[0])
    assert mask[row].sum() == 1000 and (ids[row, 1000:] == nucleotide.PAD).all()


def test_windows_of_n_are_never_drawn(tmp_path):
    gap = bases(300, 1) + "N" * 5000 + bases(300, 2)
    store = store_of(tmp_path, {"a": {"v": bases(200, 3), "t": "N" * 500 + bases(200, 4), "x": gap}, "b": {"v": bases(200, 5), "t": bases(200, 6), "x": bases(900, 7)}},
                     valid=["v"], test=["t"])
    windows = ClassWindows(store, "train", 0.5).sample(np.random.default_rng(0), 300, 100)
    ids, _ = windows.tokens(store)
    known = ((ids >= nucleotide.A) & (ids <= nucleotide.T)).mean(1)
    assert known.min() >= 0.5 and (windows.label == 0).sum() > 100
    fixed, apart = ClassWindows(store, "test", 0.5).fixed(100, 50)
    ids, _ = fixed.tokens(store)
    assert ((ids >= nucleotide.A) & (ids <= nucleotide.T)).mean(1).min() >= 0.5 and apart == [2, 2]
    with pytest.raises(UserError, match="species a: a hundred windows"):
        ClassWindows(store, "train", 0.0).sample(np.random.default_rng(0), 300, 400)


def test_fixed_windows_stand_apart_if_there_is_room(store):
    windows, apart = ClassWindows(store, "test").fixed(50, 5)
    assert apart == [5, 5] and len(windows) == 10  # of those that were chosen, not of the twelve that there is room for
    for label in (0, 1):
        starts = windows.start[windows.label == label]
        assert (np.diff(starts) >= 50).all()
    again, _ = ClassWindows(store, "test").fixed(50, 5)
    assert np.array_equal(windows.start, again.start) and np.array_equal(windows.reverse, again.reverse)
    few, apart = ClassWindows(store, "test").fixed(10, 1)  # 60 places, of which 20 are looked at
    assert apart == [1, 1] and len(few) == 2
    crowded, apart = ClassWindows(store, "test").fixed(200, 10)
    assert apart == [3, 3] and len(crowded) == 18  # starts 0, 50, ... 400
    with pytest.raises(UserError, match="length 601: species a has no such window in the test split .*600"):
        ClassWindows(store, "test").fixed(601, 5)


def test_a_dataset_without_classes_is_refused(tmp_path):
    from data_prep.genome import prepare_genome

    (tmp_path / "g.fa").write_text(f">x\n{bases(3000, 1)}\n")
    plain = TokenStore.open(prepare_genome(tmp_path / "g.fa", tmp_path / "plain"))
    with pytest.raises(UserError, match="has no classes.*prep species"):
        ClassWindows(plain, "train")
