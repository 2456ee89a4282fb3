"""`prepare_audio`: what is stored, measured, labelled and split, against the sounds by hand."""

import hashlib
import json
import tracemalloc

import numpy as np
import pytest
import soundfile

from data_prep.audio import find_files, natural, prepare_audio
from seqlab.dataset import TokenStore
from seqlab.errors import UserError
from seqlab.tokenizers.waveform import QUANTIZERS


def sound(path, n=4000, rate=8000, seed=0, level=0.3):
    path.parent.mkdir(parents=True, exist_ok=True)
    x = level * np.random.default_rng(seed).uniform(-1, 1, n)
    soundfile.write(path, x, rate, subtype="PCM_16")
    return path


def manifest_of(folder):
    return json.loads((folder / "manifest.json").read_text())


def test_tokens_are_the_quantized_samples_end_to_end(tmp_path):
    for i, n in enumerate((3000, 1, 777)):
        sound(tmp_path / "in" / f"{i}.wav", n, seed=i)
    store = TokenStore.open(prepare_audio(tmp_path / "in", tmp_path / "out", sample_rate=8000, scale=0.5))
    assert store.kind == "audio" and store.lengths.tolist() == [3000, 1, 777] and store.names == ["0.wav", "1.wav", "2.wav"]
    store.verify()
    parts = [QUANTIZERS["mulaw-256"].encode(0.5 * soundfile.read(tmp_path / "in" / f"{i}.wav")[0]) for i in range(3)]
    np.testing.assert_array_equal(store.tokens, np.concatenate(parts))
    m = store.manifest
    assert m["sample_rate"] == 8000 and m["scale"] == 0.5 and sum(m["counts"].values()) == 3778
    source = m["sources"][0]
    assert source["sha256"] == hashlib.sha256((tmp_path / "in" / "0.wav").read_bytes()).hexdigest()
    assert source["format"] == "WAV PCM_16" and source["channels"] == 1


def test_one_scale_for_the_whole_dataset(tmp_path):
    """A loud file does not change what silence, or a quiet file, is."""
    sound(tmp_path / "a" / "quiet.wav", level=0.05)
    sound(tmp_path / "b" / "quiet.wav", level=0.05)
    soundfile.write(tmp_path / "b" / "loud.wav", np.array([0.9] * 100), 8000)
    one = TokenStore.open(prepare_audio(tmp_path / "a", tmp_path / "da", sample_rate=8000))
    two = TokenStore.open(prepare_audio(tmp_path / "b", tmp_path / "db", sample_rate=8000))
    i = two.names.index("quiet.wav")
    np.testing.assert_array_equal(one.tokens, two.tokens[two.offsets[i] : two.offsets[i] + two.lengths[i]])
    peak = manifest_of(prepare_audio(tmp_path / "b", tmp_path / "dp", sample_rate=8000, scale="peak"))
    assert peak["scale"] == pytest.approx(1 / 0.9, rel=1e-3) and max(s["peak"] for s in peak["sequences"]) == pytest.approx(1, abs=1e-3)


def test_silence_and_clipping_are_counted(tmp_path):
    x = np.zeros(8000)
    x[2000:4000] = 0.5 * np.sin(np.arange(2000))
    x[3000:3010] = 1.0
    (tmp_path / "in").mkdir()
    soundfile.write(tmp_path / "in" / "a.wav", x, 8000, subtype="PCM_16")
    m = manifest_of(prepare_audio(tmp_path / "in", tmp_path / "out", sample_rate=8000))
    # frames of 160 samples: 2000 .. 4000 touches frames 12 to 24
    assert m["clipped"] == 10 and m["silent"] == 8000 - 13 * 160


def test_labels_from_folder_and_name(tmp_path):
    for name in ("yes/a_1.wav", "no/b_1.wav", "no/b_2.wav"):
        sound(tmp_path / "in" / name, 300)
    m = manifest_of(prepare_audio(tmp_path / "in", tmp_path / "f", sample_rate=8000, label_from="folder"))
    assert m["labels"] == ["no", "yes"] and {s["name"]: s["label"] for s in m["sequences"]}["yes/a_1.wav"] == "yes"
    m = manifest_of(prepare_audio(tmp_path / "in", tmp_path / "n", sample_rate=8000, label_from="name"))
    assert m["labels"] == ["a", "b"]
    pattern = r"^(\w)_(\d)"
    m = manifest_of(prepare_audio(tmp_path / "in", tmp_path / "p", sample_rate=8000, label_from="name", label_pattern=pattern))
    assert m["labels"] == ["a_1", "b_1", "b_2"]
    for options, message in (
        ({"label_from": "name", "label_pattern": "x(y)"}, "does not hold a label"),
        ({"label_from": "name", "label_pattern": "abc"}, "has no group"),
        ({"label_from": "name", "label_pattern": "("}, "not a regular expression"),
        ({"label_from": "moon"}, "use folder or name"),
        ({"label_pattern": "(a)"}, "goes with --label-from name"),
    ):
        with pytest.raises(UserError, match=message):
            prepare_audio(tmp_path / "in", tmp_path / "bad", sample_rate=8000, **options)
    assert not (tmp_path / "bad").exists()


def test_splits_by_file_never_share_a_recording(tmp_path):
    for i in range(40):
        sound(tmp_path / "in" / f"{i}.wav", 200 + i)
    store = TokenStore.open(prepare_audio(tmp_path / "in", tmp_path / "out", sample_rate=8000))
    where = {split: {row[0] for row in rows} for split, rows in store.manifest["splits"].items()}
    assert where["test"] == {0, 10, 20, 30} and where["valid"] == {1, 11, 21, 31} and len(where["train"]) == 32
    lengths = sum(int((e - s)) for split in where for s, e in store.intervals(split))
    assert lengths == store.total
    m = manifest_of(prepare_audio(tmp_path / "in", tmp_path / "t", sample_rate=8000, test=["[0-4].wav"]))
    names = [s["name"] for s in m["sequences"]]
    assert sorted(names[i] for i, _, _ in m["splits"]["test"]) == [f"{i}.wav" for i in range(5)]
    assert len(m["splits"]["valid"]) == 4 and len(m["splits"]["train"]) == 31
    for options, message in (
        ({"test": ["*.mp3"]}, "matches no file"),
        ({"test": ["1*.wav"], "valid": ["11.wav"]}, "a file is in one split"),
        ({"test": ["*"]}, "nothing is left to train on"),
        ({"test": ["1.wav"], "share": 0.1}, "leave one of them out"),
        ({"share": 0.6}, "at most 0.4"),
    ):
        with pytest.raises(UserError, match=message):
            prepare_audio(tmp_path / "in", tmp_path / "bad", sample_rate=8000, **options)


@pytest.mark.parametrize("whole", [True, False])
def test_splits_from_lists_of_names(tmp_path, whole):
    """As Speech Commands has them: the lists name more words than are used, and names of files repeat in the folders."""
    for word in ("one", "two"):
        for i in range(4):
            sound(tmp_path / "sc" / word / f"a_nohash_{i}.wav", 200, seed=i + 10 * len(word) + ord(word[0]))
    names = "one/a_nohash_0.wav\ncat/b_nohash_0.wav\ntwo/a_nohash_2.wav\n\n"
    (tmp_path / "sc" / "testing_list.txt").write_text(names, encoding="utf-8-sig")  # some editors' mark is no part of a name
    (tmp_path / "sc" / "validation_list.txt").write_text("./one/a_nohash_3.wav\r\n")
    sources = [tmp_path / "sc"] if whole else [tmp_path / "sc" / "one", tmp_path / "sc" / "two"]
    lists = {"test": [f"@{tmp_path}/sc/testing_list.txt"], "valid": [f"@{tmp_path}/sc/validation_list.txt"]}
    m = manifest_of(prepare_audio(sources, tmp_path / "out", sample_rate=8000, label_from="folder", **lists))
    split = {"/".join(m["sources"][i]["path"].split("/")[-2:]): name for name, rows in m["splits"].items() for i, _, _ in rows}
    assert sorted(split[n] for n in split) == ["test", "test", "train", "train", "train", "train", "train", "valid"]
    assert split["one/a_nohash_0.wav"] == split["two/a_nohash_2.wav"] == "test" and split["one/a_nohash_3.wav"] == "valid"
    (tmp_path / "other.txt").write_text("three/a_nohash_0.wav\n")
    for given, said in (("other.txt", "matches no file"), ("none.txt", "cannot be read .No such file"), ("sc", "cannot be read")):
        with pytest.raises(UserError, match=f"--test @.*{said}"):
            prepare_audio(sources, tmp_path / "no", sample_rate=8000, test=[f"@{tmp_path / given}"])
    assert not (tmp_path / "no").exists()


def test_copies_of_a_recording_stay_together(tmp_path):
    """Under other names and in another format: what counts is the sound."""
    for i in range(24):
        sound(tmp_path / "in" / f"{i:02d}.wav", 400, seed=0 if i % 8 == 0 else i)
    samples, rate = soundfile.read(tmp_path / "in" / "01.wav", dtype="int16")
    soundfile.write(tmp_path / "in" / "99.flac", samples, rate, subtype="PCM_16")
    m = manifest_of(prepare_audio(tmp_path / "in", tmp_path / "out", sample_rate=8000))
    split = {m["sequences"][i]["name"]: name for name, rows in m["splits"].items() for i, _, _ in rows}
    assert split["00.wav"] == split["08.wav"] == split["16.wav"] == "test" and split["01.wav"] == split["99.flac"] == "valid"
    assert len(split) == 25 and m["repeats"] == {"recordings": 3, "leaking": 0, "example": []}
    m = manifest_of(prepare_audio(tmp_path / "in", tmp_path / "two", sample_rate=8000, test=["16.wav", "99.flac"]))
    split = {m["sequences"][i]["name"]: name for name, rows in m["splits"].items() for i, _, _ in rows}
    assert split["00.wav"] == split["08.wav"] == "valid" and split["01.wav"] == "train"  # with --test alone, the first others validate
    assert m["repeats"] == {"recordings": 3, "leaking": 3, "example": ["00.wav", "16.wav"]}
    m = manifest_of(prepare_audio(tmp_path / "in", tmp_path / "few", sample_rate=8000, test=["2?.wav"], valid=["0?.wav"]))
    assert m["repeats"]["leaking"] == 2 and m["repeats"]["example"] == ["16.wav", "08.wav"]  # training and validation


def test_few_recordings_are_split_along_time(tmp_path):
    sound(tmp_path / "in" / "long.wav", 10_000)
    m = manifest_of(prepare_audio(tmp_path / "in", tmp_path / "out", sample_rate=8000, share=0.2))
    assert m["splits"] == {"train": [[0, 0, 6000]], "valid": [[0, 6000, 8000]], "test": [[0, 8000, 10_000]]}


def test_a_bad_file_stops_everything_or_is_left_out_and_listed(tmp_path):
    for i in range(3):
        sound(tmp_path / "in" / f"{i}.wav", 500, seed=i)
    (tmp_path / "in" / "1b.wav").write_bytes(b"not a sound " * 30)
    with pytest.raises(UserError, match="1b.wav"):
        prepare_audio(tmp_path / "in", tmp_path / "out", sample_rate=8000)
    assert {p.name for p in tmp_path.iterdir()} == {"in"}
    store = TokenStore.open(prepare_audio(tmp_path / "in", tmp_path / "out", sample_rate=8000, skip_bad=True))
    assert store.names == ["0.wav", "1.wav", "2.wav"] and store.total == 1500
    (bad,) = store.manifest["skipped"]
    assert bad["path"].endswith("1b.wav") and "not a sound file" in bad["reason"]
    store.verify()
    # damage after some good samples: nothing of it stays
    x = np.random.default_rng(0).uniform(-1, 1, 200_000).astype(np.float32)
    x[150_000] = np.nan
    soundfile.write(tmp_path / "in" / "1b.wav", x, 8000, subtype="FLOAT")
    again = TokenStore.open(prepare_audio(tmp_path / "in", tmp_path / "out", sample_rate=8000, skip_bad=True, overwrite=True))
    np.testing.assert_array_equal(again.tokens, store.tokens)
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "x.wav").write_bytes(b"?")
    with pytest.raises(UserError, match="none of 1 files"):
        prepare_audio(tmp_path / "only", tmp_path / "o2", sample_rate=8000, skip_bad=True)


def test_memory_does_not_grow_with_the_recording(tmp_path):
    rate = 44_100
    with soundfile.SoundFile(tmp_path / "long.wav", "w", rate, 1, "PCM_16") as file:
        for i in range(60):
            file.write(np.random.default_rng(i).uniform(-0.5, 0.5, rate))
    soundfile.write(tmp_path / "warm.wav", np.zeros(1000), rate)
    prepare_audio(tmp_path / "warm.wav", tmp_path / "warm", sample_rate=16000)
    tracemalloc.start()
    prepare_audio(tmp_path / "long.wav", tmp_path / "out", sample_rate=16000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert TokenStore.open(tmp_path / "out").total == 60 * 16000
    assert peak < 24e6, "the whole recording is 10 MB as float32 at either rate, and there would be several copies"


def test_finding_files(tmp_path):
    for name in ("b10.wav", "b9.wav", "sub/c.FLAC", "notes.txt", "._b9.wav"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    assert [name for name, _ in find_files(tmp_path)] == ["b9.wav", "b10.wav", "sub/c.FLAC"]
    assert [name for name, _ in find_files([tmp_path / "notes.txt"])] == ["notes.txt"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no sound file"):
        find_files(tmp_path / "empty")
    with pytest.raises(UserError, match="no such file"):
        find_files(tmp_path / "absent")
    assert natural("take_9") < natural("take_10") < natural("take_b")
    assert natural("9²") < natural("10²")  # a digit to Python, and no number


@pytest.mark.parametrize(
    "options, message",
    [
        ({"sample_rate": 0}, "--sample-rate 0"),
        ({"sample_rate": 8000, "quantizer": "mulaw"}, "--quantizer mulaw"),
        ({"sample_rate": 8000, "scale": -1.0}, "--scale"),
        ({"sample_rate": 8000, "scale": float("nan")}, "--scale"),
    ],
)
def test_wrong_options(options, message, tmp_path):
    sound(tmp_path / "a.wav", 100)
    with pytest.raises(UserError, match=message):
        prepare_audio(tmp_path / "a.wav", tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
