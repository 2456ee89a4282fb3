"""Several FASTA files to one dataset with classes: names, splits that share no base, duplicates, relatives, bad input."""

import json

import numpy as np
import pytest

from data_prep.species import Source, close_relatives, find_sources, kmer_hashes, prepare_species
from seqlab.dataset import SPLITS, TokenStore
from seqlab.errors import UserError
from seqlab.tokenizers import nucleotide


def bases(length, seed=0):
    rng = np.random.default_rng(seed)
    return np.frombuffer(b"ACGT", np.uint8)[rng.integers(0, 4, length)].tobytes().decode()


def fasta(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f">{name} text\n{text}\n" for name, text in records.items()))
    return path


def prepare(tmp_path, species, **options):
    sources = [Source(name, fasta(tmp_path / f"{name}.fa", records)) for name, records in species.items()]
    return TokenStore.open(prepare_species(sources, tmp_path / "out", **options))


def test_classes_are_sorted_and_sequences_carry_their_species(tmp_path):
    store = prepare(tmp_path, {"a": {"chr1": bases(3000, 1)}, "b": {"chr1": bases(2000, 2), "chr2": bases(1000, 3)}})
    assert store.manifest["classes"] == ["a", "b"]
    assert store.names == ["a/chr1", "b/chr1", "b/chr2"]
    assert [s["class"] for s in store.manifest["sequences"]] == [0, 1, 1]
    assert nucleotide.decode(store.tokens[:3000]) == bases(3000, 1)
    store.verify()


def test_every_species_has_its_blocks_in_every_split(tmp_path):
    store = prepare(tmp_path, {"a": {"x": bases(10_000, 1)}, "b": {"y": bases(700, 2), "z": bases(2300, 3)}}, block=200,
                    test_share=0.2, valid_share=0.1)
    table = np.zeros(store.total, int)
    for split in SPLITS:
        for start, end in store.intervals(split):
            table[start:end] += 1
    assert (table == 1).all()  # every base is in one split and in one only
    of_a = {split: sum(b - a for i, a, b in store.manifest["splits"][split] if i == 0) for split in SPLITS}
    assert of_a == {"test": 2000, "valid": 1000, "train": 7000}
    assert store.manifest["splits"]["test"][:2] == [[0, 0, 200], [0, 1000, 1200]]
    # b's sequences lie end to end: the period that starts at 1000 is 300 into z
    assert [1, 0, 200] in store.manifest["splits"]["test"] and [2, 300, 500] in store.manifest["splits"]["test"]
    known = store.manifest["class_bases"]
    assert known["b"]["train"] + known["b"]["valid"] + known["b"]["test"] == 3000


def test_folds_test_every_base_and_share_none_between_splits(tmp_path):
    # a: ten periods and 150 bases; b: less than a period, in two sequences
    species = {"a": {"x": bases(10_150, 1)}, "b": {"y": bases(130, 2), "z": bases(370, 3)}}
    tested = np.zeros(10_650, int)
    for fold in range(1, 6):
        store = prepare(tmp_path, species, block=200, test_share=0.2, fold=(fold, 5), overwrite=True)
        table = np.zeros(store.total, int)
        for split in SPLITS:
            for start, end in store.intervals(split):
                table[start:end] += 1
                tested[start:end] += split == "test"
        assert (table == 1).all()
        if fold == 1:
            assert store.manifest["splits"] == prepare(tmp_path, species, block=200, test_share=0.2, overwrite=True).manifest["splits"]
        if fold == 2:  # b moves along by 100 of its 500 bases: 30 of y and 170 of z test
            assert [row for row in store.manifest["splits"]["test"] if row[0] > 0] == [[1, 100, 130], [2, 0, 170]]
        if fold == 4:  # from 300 to the end
            assert [row for row in store.manifest["splits"]["test"] if row[0] > 0] == [[2, 170, 370]]
            assert [row for row in store.manifest["splits"]["valid"] if row[0] > 0] == [[1, 0, 100]]
    assert (tested[: 10_000 + 150] >= 1).all() and tested[:10_150].mean() < 1.06 and (tested[10_150:] == 2).all()


@pytest.mark.parametrize("fold", [(0, 5), (6, 5), (1, 0)])
def test_a_fold_that_is_none_is_refused(tmp_path, fold):
    with pytest.raises(UserError, match=f"--fold {fold[0]}/{fold[1]}: expected I/K .* such as 2/5"):
        prepare(tmp_path, {"a": {"x": bases(1000, 1)}, "b": {"y": bases(1000, 2)}}, fold=fold)
    with pytest.raises(UserError, match="--fold moves blocks along"):
        prepare(tmp_path, {"a": {"x": bases(1000, 1)}, "b": {"y": bases(1000, 2)}}, test=["x"], fold=(2, 5))


def test_the_default_block_suits_the_smallest_species(tmp_path):
    store = prepare(tmp_path, {"a": {"x": bases(50_000, 1)}, "b": {"y": bases(4000, 2)}})
    lengths = {b - a for _, a, b in store.manifest["splits"]["test"]}
    assert max(lengths) == 192  # 4000 / 20, a multiple of 64


def test_sequences_are_held_out_by_name_in_every_species(tmp_path):
    one = {f"chr{i}": bases(300, i) for i in range(3)}
    two = {f"chr{i}": bases(300, 10 + i) for i in range(3)}
    store = prepare(tmp_path, {"a": one, "b": two}, valid=["chr0"], test=["chr2"])
    assert store.manifest["splits"]["test"] == [[2, 0, 300], [5, 0, 300]]
    assert store.manifest["splits"]["train"] == [[1, 0, 300], [4, 0, 300]]


def test_a_table_gives_files_and_splits(tmp_path):
    for name in ("a", "b"):
        for i, split in enumerate(SPLITS):
            fasta(tmp_path / "files" / f"{name}_{split}.fa", {f"s{i}": bases(200, 10 * i + (name == "b"))})
    rows = [f"{name}\tfiles/{name}_{split}.fa\t{split}" for name in "ba" for split in SPLITS]
    text = "species\tfile\tsplit\n# comment\n" + "\n".join(rows) + "\n"
    (tmp_path / "t.tsv").write_text(text, encoding="utf-8-sig")  # as spreadsheets save it
    store = TokenStore.open(prepare_species(find_sources([tmp_path / "t.tsv"]), tmp_path / "out"))
    assert store.names == ["a/s0", "a/s1", "a/s2", "b/s0", "b/s1", "b/s2"]
    assert store.manifest["splits"]["valid"] == [[1, 0, 200], [4, 0, 200]]


def test_folders_name_their_species(tmp_path):
    fasta(tmp_path / "sub" / "a" / "1.fa", {"x": "ACGT"})
    fasta(tmp_path / "sub" / "a" / "2.fna", {"y": "ACGT"})
    fasta(tmp_path / "sub" / "b" / "1.fasta", {"x": "ACGT"})
    (tmp_path / "sub" / "a" / "notes.txt").write_text("not a sequence")
    assert [(s.species, s.path.name) for s in find_sources([tmp_path / "sub"])] == [("a", "1.fa"), ("a", "2.fna"), ("b", "1.fasta")]
    fasta(tmp_path / "flat" / "human.fa", {"x": "ACGT"})
    fasta(tmp_path / "flat" / "chimp.v2.fa", {"x": "ACGT"})
    assert [s.species for s in find_sources([tmp_path / "flat"])] == ["chimp.v2", "human"]


def reverse_complement(text):
    return text[::-1].translate(str.maketrans("ACGT", "TGCA"))


@pytest.mark.parametrize("turn", [str, reverse_complement])
def test_identical_sequences_across_classes_or_splits_are_refused_or_reported(tmp_path, turn):
    same = bases(400, 7)
    with pytest.raises(UserError, match="a/x and b/y are the same sequence in two classes.*allow-duplicates"):
        prepare(tmp_path, {"a": {"x": same, "o": bases(4000, 1)}, "b": {"y": turn(same), "p": bases(4000, 2)}})
    assert not (tmp_path / "out").exists()
    split = {"a": {"chr0": bases(300), "chr1": same, "chr2": turn(same)}, "b": {f"chr{i}": bases(300, 20 + i) for i in range(3)}}
    with pytest.raises(UserError, match="a/chr1 and a/chr2 .* two sides of a split"):
        prepare(tmp_path, split, valid=["chr0"], test=["chr2"])
    store = prepare(tmp_path, split, valid=["chr0"], test=["chr2"], allow_duplicates=True)
    assert store.manifest["duplicates"] == [["a/chr1", "a/chr2"]]
    # both in training harms nobody
    fine = {"a": {"chr0": bases(300), "chr1": same, "chr3": turn(same), "chr2": bases(300, 5)}, "b": split["b"]}
    (tmp_path / "fine").mkdir()
    assert prepare(tmp_path / "fine", fine, valid=["chr0"], test=["chr2"]).manifest["duplicates"] == []


def test_shared_kmers_find_a_relative(tmp_path):
    common = bases(2000, 1)
    # a's common stretch tests, b's trains, read from the other strand
    store = prepare(
        tmp_path,
        {"a": {"v": bases(500, 2), "t": common, "r": bases(1500, 3)}, "b": {"v": bases(500, 4), "t": bases(900, 5), "r": reverse_complement(common) + bases(100, 6)}},
        valid=["v"], test=["t"],
    )
    shared = store.manifest["shared_kmers"]
    assert shared["k"] == 32 and shared["sampled"] == 1
    assert shared["test_in_train"][0][1] == 1.0 and shared["test_in_train"][1] == [0.0, 0.0]
    assert list(close_relatives(store.manifest)) == [("a", "b", 1.0)]


def test_hashes_are_of_canonical_kmers_of_bases_only():
    ids = nucleotide.encode(bases(100, 1))
    there, back = kmer_hashes(ids), kmer_hashes(nucleotide.reverse_complement(ids))
    assert len(there) == 69 and np.array_equal(there, back[::-1]) and len(set(there.tolist())) == 69
    ids[50] = nucleotide.N
    assert np.array_equal(kmer_hashes(ids), np.concatenate([there[:19], there[51:]]))


def test_what_cannot_be_used_is_one_clear_line(tmp_path):
    a = fasta(tmp_path / "a.fa", {"x": bases(2000, 1)})
    b = fasta(tmp_path / "b.fa", {"x": bases(2000, 2)})
    n = fasta(tmp_path / "n.fa", {"x": "N" * 2000})
    twice = fasta(tmp_path / "t.fa", {"x": bases(50)})
    twice.write_text(twice.read_text() * 2)
    (tmp_path / "blank.fa").write_text("\n\n")
    (tmp_path / "empty").mkdir()
    fasta(tmp_path / "mixed" / "one" / "x.fa", {"x": bases(50)})
    fasta(tmp_path / "mixed" / "two.fa", {"x": bases(50)})
    for arguments, said in [
        ([], "no species"),
        ([f"a={a}"], "one species only"),
        ([str(a)], "NAME=FILE"),
        ([f"a={a}", f"b={tmp_path / 'none.fa'}"], "no such file"),
        ([f"a b={a}", f"b={b}"], "no name for a species"),
        ([str(tmp_path / "empty")], "holds no FASTA"),
        (["a=", f"b={b}"], "a=: names no file; expected NAME=FILE"),  # was the folder it was typed in
        ([str(tmp_path / "mixed")], r"subfolders \(one\) and sequence files \(two.fa\) side by side"),  # two.fa was left out
    ]:
        with pytest.raises(UserError, match=said):
            find_sources(arguments)
    for arguments, options, said in [
        ([f"a={a}", f"b={n}"], {}, "species b: .*no A, C, G or T"),
        ([f"a={a}", f"b={twice}"], {}, "'b/x' is twice"),
        ([f"a={a}", f"b={tmp_path / 'blank.fa'}"], {}, "no sequence"),
        ([f"a={a}", f"b={b}"], {"block": 1900}, "species a: 2,000 bases leave nothing to train on"),
        ([f"a={a}", f"b={b}"], {"test": ["chrX"]}, "--test chrX: no species has"),
        ([f"a={a}", f"b={b}"], {"test": ["x"]}, "no A, C, G or T in its train split"),
        ([f"a={a}", f"b={b}"], {"test_share": 1.5}, "test-share"),
        ([f"a={a}", f"b={b}"], {"min_length": 5000}, "species a: no sequence"),
        ([f"a={a}", f"b={b}"], {"block": 50, "test": ["x"]}, "leave all but one out"),
    ]:
        with pytest.raises(UserError, match=said):
            prepare_species(find_sources(arguments), tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()
    (tmp_path / "t.tsv").write_text("a\ta.fa\ttrain\nb\tb.fa\ttrian\n")
    with pytest.raises(UserError, match="line 2: split 'trian'"):
        find_sources([tmp_path / "t.tsv"])
    (tmp_path / "t.tsv").write_text("a\ta.fa\ttrain\nb\tb.fa\n")
    with pytest.raises(UserError, match="no split"):
        prepare_species(find_sources([tmp_path / "t.tsv"]), tmp_path / "out")


def test_the_manifest_is_json_that_opens_again(tmp_path):
    store = prepare(tmp_path, {"a": {"x": bases(3000, 1)}, "b": {"y": bases(3000, 2)}})
    text = (store.directory / "manifest.json").read_text()
    assert json.loads(text)["kind"] == "species" and TokenStore.open(store.directory).hash == store.hash
