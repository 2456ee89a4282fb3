"""Near copies, against sets of 32-mers in plain Python, and splits that keep them on one side."""

import random

import numpy as np
import pytest

import data_prep.near_copies
from data_prep.labelled import Reader, prepare_labelled
from data_prep.near_copies import copied, families, sketch
from seqlab.classification.dataset import LabelledStore
from seqlab.errors import UserError
from seqlab.tokenizers import nucleotide


def rc(text):
    return text[::-1].translate(str.maketrans("ACGT", "TGCA"))


def words(text):
    found = {text[i : i + 32] for i in range(len(text) - 31)}
    return {min(word, rc(word)) for word in found if set(word) <= set("ACGT")}


def sequences(seed=0):
    """Windows of one genome that overlap more or less, some from the other strand, some with N, some too short."""
    rng = random.Random(seed)
    genome = "".join(rng.choices("ACGT", k=3000))
    texts = []
    for _ in range(60):
        start, size = rng.randrange(2800), rng.choice([20, 31, 32, 40, 90, 150])
        text = genome[start : start + size]
        text = text[:10] + "N" + text[11:] if rng.random() < 0.2 else text
        texts.append(rc(text) if rng.random() < 0.3 else text)
    return texts


def sketch_of(texts):
    tokens = np.frombuffer(nucleotide.encode("".join(texts)).tobytes(), np.uint8)
    return sketch(tokens, np.cumsum([0, *map(len, texts)]))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("chunk", [50, 1 << 18])
def test_what_is_shared_is_what_sets_say(monkeypatch, seed, chunk):
    monkeypatch.setattr(data_prep.near_copies, "_CHUNK", chunk)
    texts = sequences(seed)
    found, sets = sketch_of(texts), [words(text) for text in texts]
    assert found.count.tolist() == [len(s) for s in sets]
    known = np.arange(60) % 3 == 0
    there = set().union(*(s for s, k in zip(sets, known) if k))
    expected = [bool(not k and s and len(s & there) >= 0.5 * len(s)) for s, k in zip(sets, known)]
    assert copied(found, known, ~known).tolist() == expected and any(expected) and not all(expected)
    assert not copied(found, np.zeros(60, bool), known).any()
    near = np.array([[bool(a and b and len(a & b) >= 0.5 * min(len(a), len(b))) for b in sets] for a in sets]) | np.eye(60, dtype=bool)
    for _ in range(6):
        near = near @ near
    family = families(found)
    assert np.array_equal(family[:, None] == family, near) and 5 < len(set(family.tolist())) < 55


def test_a_sample_of_the_words_says_nearly_the_same(monkeypatch):
    texts = sequences(1)
    whole = sketch_of(texts)
    monkeypatch.setattr(data_prep.near_copies, "MOST", 1500)
    part = sketch_of(texts)
    assert 0 < len(part.rows) < 0.7 * len(whole.rows)
    assert set(zip(part.rows.tolist(), part.hashes.tolist())) < set(zip(whole.rows.tolist(), whole.hashes.tolist()))


def test_no_sequence_has_a_word():
    found = sketch_of(["ACGT", "N" * 50])
    assert not copied(found, np.array([True, False]), np.array([False, True])).any() and families(found).tolist() == [0, 1]


def prepare(tmp_path, rows, name, **options):
    (tmp_path / f"{name}.csv").write_text("sequence,label" + ",split" * (len(rows[0]) > 2) + "\n" + "".join(",".join(row) + "\n" for row in rows))
    reader = Reader()
    return LabelledStore.open(prepare_labelled(reader.table(tmp_path / f"{name}.csv"), reader.sources, tmp_path / name, **options))


def test_near_copies_are_counted_and_can_stay_together(tmp_path):
    rng = random.Random(5)
    rows = []
    for i in range(100):
        genome = "".join(rng.choices("ACGT", k=130))
        rows += [(genome[:100], "pq"[i % 2]), (rc(genome[10:110]), "pq"[i % 2]), (genome[30:], "pq"[i % 2])]
    rng.shuffle(rows)
    texts = [text for text, _ in rows]
    apart = prepare(tmp_path, rows, "apart")
    train = set().union(*(words(texts[i]) for i in np.flatnonzero(apart.split == 0)))
    test = np.flatnonzero(apart.split == 2)
    count = sum(len(words(texts[i]) & train) >= 0.5 * len(words(texts[i])) for i in test)
    assert apart.manifest["duplicates"]["near_copies"] == count > 40 and len(test) == 60
    together = prepare(tmp_path, rows, "together", near_copies="together")
    assert together.manifest["duplicates"]["near_copies"] == 0 and "near copies are on one side" in together.manifest["split_rule"]
    test = together.split == 2
    assert 50 <= test.sum() <= 70
    for train, held in [(together.split == 0, test), *((together.rows("train", s), together.rows("valid", s)) for s in range(3))]:
        train, held = (set().union(*(words(texts[i]) for i in np.arange(300)[part])) for part in (train, held))
        assert held and not train & held


def test_when_they_cannot_stay_together(tmp_path):
    genome = "".join(random.Random(0).choices("ACGT", k=2200))
    rows = [(genome[20 * i : 20 * i + 200], "pq"[i % 2]) for i in range(100)]
    with pytest.raises(UserError, match="--near-copies together: leaves no fair split, 100 of 100 sequences are one family"):
        prepare(tmp_path, rows, "x", near_copies="together")
    with pytest.raises(UserError, match="the files bring a split already"):
        prepare(tmp_path, [(*row, "test" if i % 5 == 0 else "train") for i, row in enumerate(rows)], "x", near_copies="together")
    with pytest.raises(UserError, match="--near-copies yes: unknown; use apart or together"):
        prepare(tmp_path, rows, "x", near_copies="yes")
    assert not (tmp_path / "x").exists()
    assert prepare(tmp_path, rows, "x").manifest["duplicates"]["near_copies"] == 20
