"""Token stores and windows: the format by hand, damage, and the laws of sampling (no leak, pure, complete, shared out)."""

import hashlib
import itertools
import json
import pickle
import random
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from seqlab.dataset import SPLITS, SequenceSampler, TokenStore, WindowSampler, _permute, eval_windows
from seqlab.errors import UserError
from seqlab.tokenizers import nucleotide


def write_dataset(
    folder: Path, sequences: list[str | np.ndarray], splits: dict[str, list], soft: list = (), **changes
) -> Path:
    """A dataset directory, written here without the help of data_prep."""
    arrays = [nucleotide.encode(s) if isinstance(s, str) else s for s in sequences]
    tokens = np.concatenate(arrays)
    lengths = [len(a) for a in arrays]
    manifest = {
        "format": "seqlab-dataset",
        "version": 1,
        "kind": "dna",
        "tokenizer": "nucleotide",
        "vocab": list(nucleotide.VOCAB),
        "sources": [],
        "sequences": [
            {"name": f"s{i}", "source": 0, "offset": sum(lengths[:i]), "length": n} for i, n in enumerate(lengths)
        ],
        "splits": splits,
        "soft_masked": int(sum(b - a for a, b in soft)),
        "total": len(tokens),
        "sample_rate": None,
        "sha256": hashlib.sha256(tokens.tobytes()).hexdigest(),
        **changes,
    }
    folder.mkdir(exist_ok=True)
    tokens.tofile(folder / "tokens.bin")
    np.save(folder / "soft_masked.npy", np.array(soft, np.int64).reshape(-1, 2))
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.fixture
def store(tmp_path) -> TokenStore:
    text = random.Random(0).choices("ACGT", k=1000)
    splits = {
        "train": [[0, 0, 100], [0, 100, 300], [0, 400, 500], [1, 0, 50], [1, 60, 360]],
        "valid": [[0, 300, 400]],
        "test": [[0, 500, 600]],
    }
    path = write_dataset(tmp_path / "d", ["".join(text[:600]), "".join(text[600:])], splits, [(10, 20), (20, 25), (590, 605)])
    return TokenStore.open(path)


# -- the store -----------------------------------------------------------------------------------------------------
def test_intervals_are_global_and_merged_within_a_sequence(store):
    assert store.intervals("train").tolist() == [[0, 300], [400, 500], [600, 650], [660, 960]]
    assert store.intervals("valid").tolist() == [[300, 400]]
    with pytest.raises(ValueError, match="'training': no such split; choose one of train, valid, test"):
        store.intervals("training")


def test_intervals_of_neighbouring_sequences_stay_apart(tmp_path):
    store = TokenStore.open(write_dataset(tmp_path / "d", ["ACGT", "ACGT"], {"train": [[0, 0, 4], [1, 0, 4]]}))
    assert store.intervals("train").tolist() == [[0, 4], [4, 8]]
    assert store.intervals("valid").shape == (0, 2)


def test_soft_mask_by_hand(store):
    assert np.flatnonzero(store.soft_mask(0, 30)).tolist() == list(range(10, 25))
    assert store.soft_mask(12, 15).tolist() == [True] * 3
    assert not store.soft_mask(25, 590).any()
    assert store.soft_mask(604, 606).tolist() == [True, False]
    assert store.soft_mask(5, 5).shape == (0,)
    for start, end in ((-1, 4), (4, 3), (0, 1001)):
        with pytest.raises(ValueError, match="outside"):
            store.soft_mask(start, end)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.booleans(), min_size=1, max_size=60), st.data())
def test_soft_mask_of_any_stretch(mask, data):
    edges = np.flatnonzero(np.diff([0, *mask, 0])).reshape(-1, 2)
    with tempfile.TemporaryDirectory() as folder:
        store = TokenStore.open(write_dataset(Path(folder), ["A" * len(mask)], {"train": []}, edges.tolist()))
        start = data.draw(st.integers(0, len(mask)))
        end = data.draw(st.integers(start, len(mask)))
        assert store.soft_mask(start, end).tolist() == mask[start:end]


def test_places_have_names(store):
    assert [store.locate(p) for p in (0, 599, 600, 999)] == [("s0", 0), ("s0", 599), ("s1", 0), ("s1", 399)]
    with pytest.raises(ValueError, match="outside"):
        store.locate(1000)


def test_a_store_travels_to_worker_processes_by_its_path(store):
    data = pickle.dumps(store)
    assert len(data) < 300
    again = pickle.loads(data)
    assert again.hash == store.hash == hashlib.sha256((store.directory / "manifest.json").read_bytes()).hexdigest()
    np.testing.assert_array_equal(again.tokens, store.tokens)


def test_tokens_cannot_be_written(store):
    with pytest.raises(ValueError, match="read-only"):
        store.tokens[0] = 1


def test_verify_finds_a_changed_token(store):
    store.verify()
    path = store.directory / "tokens.bin"
    data = bytearray(path.read_bytes())
    data[500] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="does not have the sha256"):
        TokenStore.open(store.directory).verify()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "other"}, "not a seqlab dataset"),
        ({"version": 2}, "dataset version 2, this program reads 1"),
        ({"total": 5}, "tokens.bin is 8 bytes, the manifest says 5"),
        ({"splits": {"train": [[0, 0, 9]]}}, "outside its sequence"),
        ({"splits": {"train": [[0, 3, 3]]}}, "outside its sequence"),
        ({"splits": {"train": [[0, -1, 3]]}}, "outside its sequence"),
        ({"splits": {"train": [[1, 0, 3]]}}, "names a sequence that does not exist"),
        ({"splits": {"train": [[0, 0, 4], [0, 3, 5]]}}, "overlap or are not sorted"),
        ({"splits": {"train": [[0, 4, 8], [0, 0, 4]]}}, "overlap or are not sorted"),
        ({"splits": {"train": [[0, 0, 4]], "test": [[0, 3, 5]]}}, "two splits share bases"),
        ({"splits": {"train": [[0, 0]]}}, "damaged dataset"),
        ({"splits": None}, "damaged dataset"),
        ({"sequences": [{"name": "a", "offset": 1, "length": 7}]}, "do not lie end to end"),
        ({"sequences": [{"name": "a"}]}, "KeyError: 'offset'"),
        ({"sequences": []}, "damaged dataset"),
    ],
)
def test_a_damaged_manifest_is_one_line(tmp_path, changes, message):
    folder = write_dataset(tmp_path / "d", ["ACGTACGT"], {"train": [[0, 0, 8]]})
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, **changes}))
    with pytest.raises(UserError) as caught:
        TokenStore.open(folder)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_damaged_files_are_one_line(tmp_path):
    folder = write_dataset(tmp_path / "d", ["ACGTACGT"], {"train": [[0, 0, 8]]}, [(2, 4)])

    def message() -> str:
        with pytest.raises(UserError) as caught:
            TokenStore.open(folder)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    for table in ([(4, 2)], [(2, 5), (4, 6)], [(2, 9)], [(-1, 3)], [(4, 6), (1, 2)]):
        np.save(folder / "soft_masked.npy", np.array(table, np.int64))
        assert "soft_masked.npy overlap, are unsorted or lie outside" in message()
    np.save(folder / "soft_masked.npy", np.zeros((2, 3)))
    assert "holds float64 (2, 3), expected int64 (k, 2)" in message()
    (folder / "soft_masked.npy").write_bytes(b"\x93NUMPY\x01\x00")
    assert "soft_masked.npy" in message()
    (folder / "soft_masked.npy").unlink()
    assert "soft_masked.npy is missing" in message()
    (folder / "tokens.bin").unlink()
    assert "tokens.bin is missing, the manifest says 8" in message()
    (folder / "manifest.json").write_text('{"format": ')
    assert "not valid JSON" in message()
    (folder / "manifest.json").unlink()
    assert "holds no manifest.json; give a directory that `seqlab prep` wrote" in message()
    folder = tmp_path / "nowhere"
    assert "no such dataset" in message()


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_any_damage_to_the_manifest_is_one_line(data):
    with tempfile.TemporaryDirectory() as name:
        folder = write_dataset(Path(name), ["ACGTACGT"], {"train": [[0, 0, 8]]}, [(2, 4)])
        manifest = json.loads((folder / "manifest.json").read_text())
        junk = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.just([[1, 2]]) | st.just({})
        key = data.draw(st.sampled_from(sorted(manifest)))
        target, last = manifest, key
        if key == "sequences" and data.draw(st.booleans()):
            target, last = manifest["sequences"][0], data.draw(st.sampled_from(["name", "offset", "length"]))
        elif key == "splits" and data.draw(st.booleans()):
            target, last = manifest["splits"]["train"][0], data.draw(st.integers(0, 2))
        target[last] = data.draw(junk)
        text = json.dumps(manifest)
        (folder / "manifest.json").write_text(text[: data.draw(st.integers(0, len(text)))] if data.draw(st.booleans()) else text)
        try:
            store = TokenStore.open(folder)
        except UserError as error:
            assert "\n" not in str(error)
        else:
            assert store.total == 8


# -- windows -------------------------------------------------------------------------------------------------------
@st.composite
def genomes(draw) -> tuple[list[int], dict[str, list]]:
    """Lengths of sequences, and splits that share nothing: each sequence cut in places, the pieces dealt out."""
    lengths = draw(st.lists(st.integers(1, 120), min_size=1, max_size=4))
    splits = {split: [] for split in SPLITS}
    for index, length in enumerate(lengths):
        cuts = sorted({0, length, *draw(st.lists(st.integers(0, length), max_size=6))})
        for start, end in itertools.pairwise(cuts):
            split = draw(st.sampled_from(["train", "train", "valid", "test", None]))
            if split:
                splits[split].append([index, start, end])
    assume(splits["train"])
    return lengths, splits


def positions_store(folder: Path, lengths: list[int], splits: dict[str, list]) -> TokenStore:
    """Tokens that tell their split: 7 trains, 8 validates, 9 tests, 10 is in no split."""
    arrays = [np.full(n, 10, np.uint8) for n in lengths]
    for split, token in zip(SPLITS, (7, 8, 9)):
        for index, start, end in splits[split]:
            arrays[index][start:end] = token
    return TokenStore.open(write_dataset(folder, arrays, splits))


@settings(deadline=None, max_examples=150)
@given(genomes(), st.integers(1, 40), st.integers(1, 9), st.integers(0, 1), st.integers(0, 5))
def test_no_window_reads_a_base_outside_its_split(genome, context, batch_size, extra, seed):
    with tempfile.TemporaryDirectory() as folder:
        store = positions_store(Path(folder), *genome)
        for split, token in zip(SPLITS, (7, 8, 9)):
            intervals = store.intervals(split)
            longest = max(intervals[:, 1] - intervals[:, 0], default=0)
            if longest < context + extra:
                with pytest.raises(UserError, match="does not fit|is empty"):
                    WindowSampler(store, split, context, batch_size, extra=extra, seed=seed)
                continue
            sampler = WindowSampler(store, split, context, batch_size, extra=extra, seed=seed)
            for step in range(12):
                batch = sampler.batch(step)
                assert batch["tokens"].shape == (batch_size, context + extra)
                assert (batch["tokens"] == token).all()
                for start in batch["start"]:  # within one interval, so never over the border of a sequence either
                    home = intervals[np.searchsorted(intervals[:, 0], start, side="right") - 1]
                    assert home[0] <= start and start + context + extra <= home[1]
        for split, token in zip(SPLITS, (7, 8, 9)):
            for start, end in eval_windows(store, split, context, extra=extra):
                assert (store.tokens[start:end] == token).all()


@settings(deadline=None, max_examples=100)
@given(genomes(), st.integers(1, 30), st.integers(0, 1), st.integers(0, 2**40), st.integers(1, 7))
def test_an_epoch_visits_every_window_once(genome, context, extra, seed, batch_size):
    with tempfile.TemporaryDirectory() as folder:
        store = positions_store(Path(folder), *genome)
        intervals = store.intervals("train")
        length = intervals[:, 1] - intervals[:, 0]
        assume((length >= context + extra).any())
        sampler = WindowSampler(store, "train", context, batch_size, extra=extra, seed=seed)
        assert sampler.windows == ((length - extra).clip(0) // context).sum()
        assert sampler.skipped_bases == length[length < context + extra].sum()
        starts = np.concatenate([sampler.batch(s)["start"] for s in range(-(-3 * sampler.windows // batch_size))])
        for epoch in range(3):
            mine = np.sort(starts[epoch * sampler.windows : (epoch + 1) * sampler.windows])
            assert len(np.unique(mine)) == sampler.windows
            for start, end in intervals:
                inside = mine[(mine >= start) & (mine < end)]
                assert (np.diff(inside) == context).all()  # side by side: no base is a target twice, none between is left out
                assert len(inside) == max(end - start - extra, 0) // context


def test_every_epoch_shifts_and_shuffles_anew(tmp_path):
    store = TokenStore.open(write_dataset(tmp_path / "d", ["A" * 6500], {"train": [[0, 0, 6500]]}))
    sampler = WindowSampler(store, "train", 64, 101, seed=3)
    assert sampler.windows == 101 and sampler.epoch(5) == 5
    epochs = [sampler.batch(step)["start"] for step in range(40)]
    shifts = [e.min() for e in epochs]
    assert set(shifts) <= set(range(37)) and len(set(shifts)) > 15  # slack 36
    orders = {tuple((e - e.min()) // 64) for e in epochs}
    assert len(orders) == 40
    first = np.array([(e[0] - e.min()) // 64 for e in epochs])
    assert 25 < first.mean() < 75  # not always from the beginning
    other = WindowSampler(store, "train", 64, 101, seed=4).batch(0)["start"]
    assert (other != epochs[0]).any()


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 400), st.integers(0, 2**64 - 1))
@example(1, 0)
def test_the_permutation_is_one(size, key):
    result = _permute(np.arange(size, dtype=np.uint64), size, np.uint64(key))
    assert sorted(result.tolist()) == list(range(size))
    one_by_one = [int(_permute(np.array([i], np.uint64), size, np.uint64(key))[0]) for i in range(0, size, 7)]
    assert one_by_one == result[::7].tolist()


def test_the_permutation_is_fair():
    """Over many keys every place is about equally likely (a chi-square far from both tails), and neighbours part."""
    size, keys = 10, 5_000
    table = np.stack([_permute(np.arange(size, dtype=np.uint64), size, np.uint64(k * 7919)) for k in range(keys)])
    for column in range(size):
        seen = np.bincount(table[:, column].astype(int), minlength=size)
        assert ((seen - keys / size) ** 2 / (keys / size)).sum() < 35  # 9 degrees of freedom: p = 6e-5
    assert abs((np.diff(table.astype(int), axis=1) == 1).mean() - 1 / size) < 0.01


@pytest.mark.parametrize("step", [0, 1, 17, 10**7])
def test_a_batch_depends_on_the_step_alone(store, step):
    def make() -> WindowSampler:
        return WindowSampler(store, "train", 30, 6, extra=1, seed=5, reverse_complement=True, soft_mask=True)

    used = make()
    for other in (3, 10**6, 2):
        used.batch(other)
    for key, value in make().batch(step).items():
        np.testing.assert_array_equal(used.batch(step)[key], value)
    longer = WindowSampler(store, "train", 60, 3, extra=1, seed=5)  # another context: a length warm-up's next stage
    assert longer.batch(step)["tokens"].shape == (3, 61)


@pytest.mark.parametrize("world_size", [2, 3, 6])
def test_ranks_share_out_the_batch_of_one_rank(store, world_size):
    options = {"extra": 1, "seed": 9, "reverse_complement": True, "soft_mask": True}
    alone = WindowSampler(store, "train", 20, 12, **options)
    ranks = [WindowSampler(store, "train", 20, 12, rank=r, world_size=world_size, **options) for r in range(world_size)]
    for step in (0, 1, 2, 5, 31):
        parts = [rank.batch(step) for rank in ranks]
        for key, value in alone.batch(step).items():
            np.testing.assert_array_equal(np.concatenate([part[key] for part in parts]), value)


def test_reverse_complement_and_soft_mask_agree_with_the_source(store):
    sampler = WindowSampler(store, "train", 40, 50, extra=1, seed=1, reverse_complement=True, soft_mask=True)
    reversed_rows = 0
    for step in range(10):
        batch = sampler.batch(step)
        for tokens, start, reverse, soft in zip(*(batch[k] for k in ("tokens", "start", "reverse", "soft_mask"))):
            expected, mask = store.tokens[start : start + 41], store.soft_mask(start, start + 41)
            if reverse:
                expected, mask = nucleotide.reverse_complement(expected), mask[::-1]
            np.testing.assert_array_equal(tokens, expected)
            np.testing.assert_array_equal(soft, mask)
            reversed_rows += bool(reverse)
    assert 200 < reversed_rows < 300
    plain = WindowSampler(store, "train", 40, 50, extra=1, seed=1).batch(0)
    np.testing.assert_array_equal(plain["start"], sampler.batch(0)["start"])  # the strand does not move the windows
    assert not plain["reverse"].any() and "soft_mask" not in plain
    plain["tokens"][:] = 0  # the caller's own, to mask in place


def test_windows_that_do_not_fit_are_explained(store):
    with pytest.raises(UserError) as caught:
        WindowSampler(store, "train", 300, 4, extra=1)
    message = str(caught.value)
    assert "context 300 does not fit: the longest stretch of the train split" in message
    assert "is 300 tokens; use a context of 299 or less" in message
    assert WindowSampler(store, "train", 299, 4, extra=1).skipped_bases == 150
    for arguments, options in (
        ((0, 4), {}),
        ((10, 0), {}),
        ((10, 4), {"extra": -1}),
        ((10, 4), {"world_size": 3}),
        ((10, 4), {"rank": 1}),
        ((10, 4), {"rank": -1}),
    ):
        with pytest.raises(ValueError):
            WindowSampler(store, "train", *arguments, **options)


def test_only_dna_has_another_strand(tmp_path):
    path = write_dataset(tmp_path / "d", ["ACGT" * 9], {"train": [[0, 0, 36]]}, kind="audio", tokenizer="mulaw")
    store = TokenStore.open(path)
    WindowSampler(store, "train", 4, 2)
    with pytest.raises(ValueError, match="only DNA"):
        WindowSampler(store, "train", 4, 2, reverse_complement=True)


@settings(deadline=None, max_examples=100)
@given(genomes(), st.integers(1, 40), st.integers(0, 1))
def test_evaluation_scores_every_base_once(genome, context, extra):
    with tempfile.TemporaryDirectory() as folder:
        store = positions_store(Path(folder), *genome)
        scored = np.zeros(store.total, int)
        for start, end in eval_windows(store, "train", context, extra=extra):
            assert extra < end - start <= context + extra
            scored[start + extra : end] += 1
        expected = np.zeros(store.total, int)
        for start, end in store.intervals("train"):
            expected[start + extra : end] = 1  # nothing comes before the first base, so it cannot be predicted
        np.testing.assert_array_equal(scored, expected)


def test_evaluation_windows_by_hand(store):
    assert list(eval_windows(store, "valid", 45)) == [(300, 345), (345, 390), (390, 400)]
    assert list(eval_windows(store, "valid", 45, extra=1)) == [(300, 346), (345, 391), (390, 400)]
    assert list(eval_windows(store, "valid", 99, extra=1)) == [(300, 400)]
    with pytest.raises(ValueError, match="context 0"):
        list(eval_windows(store, "valid", 0))


def test_positions_past_four_giga(tmp_path):
    """Offsets past 2^32, in a sparse file: only what is written takes room."""
    size = 2**32 + 5000
    folder = write_dataset(tmp_path / "d", ["ACGT"], {"train": [[0, size - 3000, size]]})
    with open(folder / "tokens.bin", "r+b") as file:
        file.truncate(size)
        file.seek(size - 3000)
        file.write((np.arange(3000) % 4 + 7).astype(np.uint8).tobytes())
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["total"] = manifest["sequences"][0]["length"] = size
    (folder / "manifest.json").write_text(json.dumps(manifest))
    np.save(folder / "soft_masked.npy", np.array([[2**32, 2**32 + 7]]))
    store = TokenStore.open(folder)
    batch = WindowSampler(store, "train", 1000, 3, soft_mask=True).batch(4)
    assert batch["start"].min() >= size - 3000 and (batch["tokens"] >= 7).all()
    first = int(batch["start"][0])
    np.testing.assert_array_equal(batch["tokens"][0], (np.arange(first, first + 1000) - (size - 3000)) % 4 + 7)
    assert store.soft_mask(2**32 - 1, 2**32 + 9).sum() == 7
    assert store.locate(2**32 + 1) == ("s0", 2**32 + 1)


# -- whole sequences -----------------------------------------------------------------------------------------------
def test_whole_sequences_hide_what_is_not_in_the_split(tmp_path):
    """Each sequence from end to end, every epoch once, with the other splits' bases unread."""
    splits = {"train": [[0, 0, 6], [0, 9, 14], [1, 0, 12]], "valid": [[0, 6, 9]], "test": [[2, 0, 4]]}
    store = TokenStore.open(write_dataset(tmp_path / "d", ["ACGTACGTACGTAC", "GGGGCCCCAAAA", "TTTT"], splits))
    sampler = SequenceSampler(store, "train", 1, seed=3)
    assert sampler.longest == 14 and len(sampler.sequences) == 2
    for epoch in range(6):
        windows = [sampler.batch(2 * epoch + i) for i in range(2)]
        assert all(len(w) == 1 for w in windows)
        texts = {int(w[0]["start"][0]): nucleotide.decode(w[0]["tokens"][0]) for w in windows}
        assert texts == {0: "ACGTACNNNCGTAC", 14: "GGGGCCCCAAAA"}
    order = [int(sampler.batch(step)[0]["start"][0]) for step in range(40)]
    assert order[::2] != [order[0]] * 20, "the order changes from epoch to epoch"
    both = SequenceSampler(store, "train", 2, reverse_complement=True)
    seen = {nucleotide.decode(w["tokens"][0]) for step in range(30) for w in both.batch(step)}
    assert seen == {"ACGTACNNNCGTAC", "GTACGNNNGTACGT", "GGGGCCCCAAAA", "TTTTGGGGCCCC"}
    halves = [SequenceSampler(store, "train", 2, rank=rank, world_size=2) for rank in (0, 1)]
    whole = SequenceSampler(store, "train", 2)
    for step in range(4):
        parts = [int(w["start"][0]) for half in halves for w in half.batch(step)]
        assert parts == [int(w["start"][0]) for w in whole.batch(step)]
    with pytest.raises(ValueError, match="shared evenly"):
        SequenceSampler(store, "train", 3, world_size=2)
