"""Overlapping intervals, against every pair looked at, and splits that keep them together."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.intervals import chains, joined, sharing
from data_prep.labelled import Reader, prepare_labelled
from seqlab.classification.dataset import LabelledStore

PLACES = st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 40), st.integers(1, 9)).map(lambda p: (p[0], p[1], p[1] + p[2])), max_size=12)


def overlap(p, q):
    return p[0] == q[0] and p[1] < q[2] and q[1] < p[2]


@given(PLACES, PLACES)
def test_who_shares_bases_is_what_every_pair_says(places, others):
    assert sharing(places, others).tolist() == [any(overlap(p, q) for q in others) for p in places]


@given(PLACES)
def test_chains_are_the_components_of_overlaps(places):
    reached = np.array([[overlap(p, q) for q in places] for p in places]).reshape(len(places), len(places))
    for _ in places:
        reached = reached | (reached.astype(int) @ reached.astype(int) > 0)
    chain = chains(places)
    assert np.array_equal(chain[:, None] == chain, reached)


def test_joined_follows_both_kinds_of_sameness():
    assert joined(np.array([7, 7, 5, 4, 9]), np.array([1, 2, 2, 3, 3])).tolist() == [0, 0, 0, 3, 3]
    assert joined(np.array([], np.int64), np.array([], np.int64)).tolist() == []


def prepare(tmp_path, rows, name, **options):
    """Rows of (start, end, label[, split]) on one random chromosome."""
    rng = np.random.default_rng(0)
    (tmp_path / "g.fa").write_text(">c\n" + "".join(rng.choice(list("ACGT"), 40_000)) + "\n")
    (tmp_path / f"{name}.bed").write_text("".join("\t".join(map(str, ("c", *row))) + "\n" for row in rows))
    reader = Reader()
    records = reader.bed(tmp_path / f"{name}.bed", tmp_path / "g.fa")
    return LabelledStore.open(prepare_labelled(records, reader.sources, tmp_path / name, **options))


def shared(store, rows, one, other):
    mine, theirs = ([("c", *rows[i][:2]) for i in part] for part in (one, other))
    return int(sharing(mine, theirs).sum())


def test_intervals_that_share_bases_stay_on_one_side(tmp_path):
    """Exons of several transcripts: the same start, another end; some occur twice."""
    rows = [(300 * i, 300 * i + 100 + 20 * j, "pq"[i % 2]) for i in range(100) for j in (0, 1, 1)]
    store = prepare(tmp_path, rows, "exons")
    names = store.names()
    assert names[:3] == ["c:0-100(+)", "c:0-120(+)", "c:0-120(+)#2"]
    test = np.flatnonzero(store.split == 2)
    assert 50 <= len(test) <= 70 and "share bases are on one side" in store.manifest["split_rule"]
    assert shared(store, rows, np.flatnonzero(store.split == 0), test) == 0
    assert store.manifest["duplicates"]["sharing_bases_with_test"] == 0
    for seed in range(3):
        train, valid = store.rows("train", seed), store.rows("valid", seed)
        assert len(valid) > 10 and len(train) > 150 and shared(store, rows, train, valid) == 0


def test_windows_that_slide_along_are_split_all_the_same_and_counted(tmp_path):
    rows = [(100 * i, 100 * i + 300, "pq"[i % 2]) for i in range(200)]
    store = prepare(tmp_path, rows, "windows")
    assert (store.split == 2).sum() == 40 and "overlap too much" in store.manifest["split_rule"]
    count = shared(store, rows, np.flatnonzero(store.split == 0), np.flatnonzero(store.split == 2))
    assert store.manifest["duplicates"]["sharing_bases_with_test"] == count > 50
    assert len(store.rows("valid", 1)) == 16
    given_splits = [(*row, "test" if row[0] >= 15_000 else "train") for row in rows]
    store = prepare(tmp_path, given_splits, "cut")
    assert store.manifest["duplicates"]["sharing_bases_with_test"] == 2  # those that reach over the border


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_other_shares(tmp_path, share):
    rows = [(300 * i, 300 * i + 100 + 20 * j, "pq"[i % 2]) for i in range(20) for j in (0, 1)]
    if share == 0:
        from seqlab.errors import UserError

        with pytest.raises(UserError, match="the test split is empty"):
            prepare(tmp_path, rows, "x", test_share=share)
    else:
        assert (prepare(tmp_path, rows, "x", test_share=share).split == 2).sum() == 20
