"""Labelled sequences: every layout, labels of every kind, splits and duplicates, and one clear line for every bad file."""

import csv
import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from data_prep.labelled import LabelOptions, Reader, prepare_labelled, read_files
from seqlab.classification.dataset import LabelledStore, sequence_key, strata, stratified_parts
from seqlab.dataset import SPLITS, TokenStore
from seqlab.errors import UserError
from seqlab.tokenizers import nucleotide

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data" / "classification"
needs_data = pytest.mark.skipif(not SHARED.is_dir(), reason="the folder shared/data is not here")


def random_rows(n=60, seed=0, classes=("b", "a"), length=40):
    rng = np.random.default_rng(seed)
    return [("".join(rng.choice(list("ACGT"), length)), classes[i % len(classes)]) for i in range(n)]


def write_csv(path: Path, rows, header=("sequence", "label"), delimiter=","):
    with open(path, "w", newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows([header, *rows])
    return path


def prepare(path, out, *, files=None, labels=LabelOptions(), reading=None, **options):
    reader = Reader()
    records = read_files(reader, files or {None: path}, **(reading or {}))
    return LabelledStore.open(prepare_labelled(records, reader.sources, out, labels=labels, **options))


def text_of(store, row):
    return nucleotide.decode(store.sequence(row))


# -- layouts -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("block", [1, 7, 1 << 20])
def test_line_ends_of_any_system(tmp_path, monkeypatch, end, block):
    """The CR alone of old spreadsheets was an error of the csv module, "unexpected"."""
    text = end.join(["sequence,label", "ACGT,a", "", "GGCC,b", "AACC,a", "TTCC,b", "GAGA,a", "CTCA,b"])
    (tmp_path / "a.csv").write_bytes(text.encode())
    whole = Reader.blocks

    def in_pieces(self, path, wanted):
        for data in whole(self, path, wanted):
            yield from (data[i : i + block] for i in range(0, len(data), block))

    monkeypatch.setattr(Reader, "blocks", in_pieces)
    store = prepare(tmp_path / "a.csv", tmp_path / "d")
    assert [text_of(store, i) for i in range(len(store))] == ["ACGT", "GGCC", "AACC", "TTCC", "GAGA", "CTCA"]


def test_any_name_has_its_own_line(tmp_path):
    """Names with a line end, or one of the many characters that Python takes for one, moved the names of all that followed."""
    rows = random_rows(6)
    names = ["plain", "two\nlines", "form\x0cfeed", "next\x85line", "para\u2029graph", "last"]
    path = write_csv(tmp_path / "a.csv", [(x, y, name) for (x, y), name in zip(rows, names)], ("sequence", "label", "id"))
    store = prepare(path, tmp_path / "d", reading={"name_column": "id"})
    assert store.names() == [name.replace("\n", "") for name in names]


def test_parquet_columns_are_those_asked_for(tmp_path):
    """Column names were not looked at, and a split column was not seen."""
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    from pyarrow import parquet

    rows = random_rows(9)
    splits = ["train", "test", "train", "train", "test", "valid", "train", "train", "valid"]
    table = {"dna": [x for x, _ in rows], "group": [y for _, y in rows], "id": [f"s{i}" for i in range(9)], "split": splits}
    parquet.write_table(pyarrow.table(table), tmp_path / "a.parquet")
    columns = {"sequence_column": "dna", "label_column": "group", "name_column": "id"}
    store = prepare(tmp_path / "a.parquet", tmp_path / "d", reading=columns)
    assert store.names() == table["id"] and [text_of(store, i) for i in range(9)] == table["dna"]
    assert store.split.tolist() == [("train", "valid", "test").index(word) for word in splits]
    with pytest.raises(UserError, match="--label-column x: .* has no such column"):
        prepare(tmp_path / "a.parquet", tmp_path / "e", reading={**columns, "label_column": "x"})


def test_a_csv_by_hand(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('label , seq\r\n x ,"  acgRTn-u "\r\ny, CCCC\r\nx,GGGA\r\ny,TTGA\r\n\r\nx,ACCA\ny,AACA\n')
    store = prepare(path, tmp_path / "d")
    assert store.kind == "binary" and store.classes == ["x", "y"] and len(store) == 6
    assert text_of(store, 0) == "ACGNTNNT" and text_of(store, 1) == "CCCC"
    assert store.labels.tolist() == [0, 1, 0, 1, 0, 1]
    counts = store.manifest["counts"]
    assert (counts["N"], counts["other"], store.manifest["lower_case"]) == (1, 2, 5)
    assert store.manifest["sources"][0]["bytes"] == path.stat().st_size
    assert (store.split == 2).sum() == 2 and not store.has_valid()


def test_layouts_that_mean_the_same(tmp_path):
    rows = random_rows()
    plain = prepare(write_csv(tmp_path / "a.csv", rows), tmp_path / "d1")
    zipped = tmp_path / "b.tsv.gz"
    write_csv(tmp_path / "b", [(y, "extra", x) for x, y in rows], ("target", "other", "dna"), "\t")
    zipped.write_bytes(gzip.compress((tmp_path / "b").read_bytes()))
    columns = {"sequence_column": "dna", "label_column": "target"}
    (tmp_path / "c.data").write_text("".join(f"{y},{i},\t{x}\n" for i, (x, y) in enumerate(rows)))
    (tmp_path / "d.fa").write_text("".join(f">s{i} chr1|{y}\n{x[:20]}\n{x[20:]}\n" for i, (x, y) in enumerate(rows)))
    (tmp_path / "e.fa").write_text("".join(f">s{i} some words\n{x.lower()}\n" for i, (x, _) in enumerate(rows)))
    write_csv(tmp_path / "e.tsv", [(f"s{i}", y) for i, (_, y) in reversed(list(enumerate(rows)))], ("name", "label"), "\t")
    quoted = [f'"s{i}","{y}"' for i, (_, y) in enumerate(rows)]  # as R's write.csv does, names of columns too; they were not found
    (tmp_path / "f.csv").write_text("\n".join(['"name","label"', *quoted]))
    others = [
        prepare(zipped, tmp_path / "d2", reading=columns),
        prepare(tmp_path / "c.data", tmp_path / "d3", reading={"columns": ("label", "name", "sequence")}),
        prepare(tmp_path / "d.fa", tmp_path / "d4", reading={"label_from": "header"}),
        prepare(tmp_path / "e.fa", tmp_path / "d5", reading={"labels": tmp_path / "e.tsv"}),
        prepare(tmp_path / "e.fa", tmp_path / "d6", reading={"labels": tmp_path / "f.csv"}),
    ]
    for other in others:
        for name in ("tokens", "offsets", "labels", "split", "keys"):
            assert np.array_equal(getattr(plain, name), getattr(other, name)), name
        assert other.classes == ["a", "b"]
    assert others[2].names()[0] == "s0"


def test_sequences_of_any_length_are_read_from_a_table(tmp_path):
    rows = [*random_rows(8), ("ACGT" * 100_000, "a")]
    store = prepare(write_csv(tmp_path / "a.csv", rows), tmp_path / "d")
    assert int(store.lengths.max()) == 400_000 and len(store) == 9


def test_bed_with_a_genome(tmp_path):
    (tmp_path / "g.fa").write_text(">chr1 x\nAACCGGTTAC\n>chr2\nACGTNRTTTT\n")
    bed = tmp_path / "x.bed"
    bed.write_text("track name=x\nchr1\t0\t4\tp\t0\t+\nchr2\t0\t6\tq\t0\t-\nchr1\t2\t6\tp\t0\t.\nchr2\t6\t10\tq\t0\t+\nchr1\t5\t9\tp\t0\t-\nchr1\t3\t8\tq\t0\t+\n")
    store = prepare(bed, tmp_path / "d", reading={"genome": tmp_path / "g.fa"})
    assert [text_of(store, i) for i in range(3)] == ["AACC", "NNACGT", "CCGG"]
    assert store.names()[1] == "chr2:0-6(-)" and store.labels.tolist() == [0, 1, 0, 1, 0, 1]
    named = tmp_path / "y.bed"
    named.write_text("chrom\tstart\tend\tsplit\tlabel\n" + "".join(
        f"chr{1 + i % 2}\t{i}\t{i + 4}\t{split}\t{'pq'[i % 2]}\n" for i, split in enumerate(["train", "train", "train", "train", "test", "val"])))  # fmt: skip
    store = prepare(named, tmp_path / "d2", reading={"genome": tmp_path / "g.fa"}, duplicates="keep")
    assert store.split.tolist() == [0, 0, 0, 0, 2, 1] and store.has_valid()


def test_splits_in_three_files(tmp_path):
    files = {i: write_csv(tmp_path / f"{i}.csv", random_rows(8, seed=i)) for i in range(3)}
    store = prepare(None, tmp_path / "d", files=files)
    assert [int((store.split == i).sum()) for i in range(3)] == [8, 8, 8]
    assert store.names()[0] == "train-2" and store.names()[-1] == "test-9"
    assert len(store.rows("valid", 5)) == 8  # its own, whatever the seed


def test_where_and_a_split_column(tmp_path):
    rows = [(x, y, "keep" if i % 2 else "no", "test" if i > 40 else "train") for i, (x, y) in enumerate(random_rows(60, classes="aabb"))]
    path = write_csv(tmp_path / "a.csv", rows, ("seq", "label", "task", "split"))
    store = prepare(path, tmp_path / "d", reading={"where": {"task": "keep"}})
    assert len(store) == 30 and (store.split == 2).sum() == 10
    assert "as given" in store.manifest["split_rule"]


# -- labels --------------------------------------------------------------------------------------------------------
def test_whole_numbers_sort_by_value(tmp_path):
    store = prepare(write_csv(tmp_path / "a.csv", random_rows(60, classes=("10", "9", "2"))), tmp_path / "d")
    assert store.classes == ["2", "9", "10"] and store.kind == "multi-class"


def test_multi_label(tmp_path):
    rows = random_rows(40, classes=("x;y", "", "y", "z ; x"))
    store = prepare(write_csv(tmp_path / "a.csv", rows), tmp_path / "d", labels=LabelOptions(separator=";"))
    assert store.kind == "multi-label" and store.classes == ["x", "y", "z"]
    assert store.labels[:4].tolist() == [[1, 1, 0], [0, 0, 0], [0, 1, 0], [1, 0, 1]]


def test_regression_is_found_or_asked_for(tmp_path):
    rows = [(x, f"{i / 7:.3f}") for i, (x, _) in enumerate(random_rows(80))]
    store = prepare(write_csv(tmp_path / "a.csv", rows), tmp_path / "d")
    assert store.kind == "regression" and store.classes == [] and store.labels[7] == pytest.approx(1.0)
    few = [(x, str(i % 3)) for i, (x, _) in enumerate(random_rows(30))]
    path = write_csv(tmp_path / "b.csv", few)
    assert prepare(path, tmp_path / "d2").kind == "multi-class"
    assert prepare(path, tmp_path / "d3", labels=LabelOptions("regression")).kind == "regression"


# -- splits --------------------------------------------------------------------------------------------------------
def test_splits_are_stratified_and_do_not_depend_on_the_order(tmp_path):
    rows = random_rows(200, classes=("a", "a", "a", "b"))
    one = prepare(write_csv(tmp_path / "a.csv", rows), tmp_path / "d1")
    other = prepare(write_csv(tmp_path / "b.csv", rows[::-1]), tmp_path / "d2")
    assert one.classes == other.classes == ["a", "b"]
    for split in ("train", "valid", "test"):
        texts = [text_of(one, i) for i in one.rows(split, 3)]
        assert texts == [text_of(other, i) for i in other.rows(split, 3)]
        share = np.mean(one.labels[one.rows(split, 3)])
        assert abs(share - 0.25) < 0.05, split
    assert len(one.rows("test")) == 40 and len(one.rows("valid", 3)) == 16
    assert not np.array_equal(one.rows("valid", 3), one.rows("valid", 4))
    everything = np.concatenate([one.rows(s, 3) for s in ("train", "valid", "test")])
    assert sorted(everything) == list(range(200))
    third = prepare(tmp_path / "a.csv", tmp_path / "d3", seed=1)
    assert not np.array_equal(one.split, third.split)


def test_small_strata_have_one_in_each_part():
    part = stratified_parts(np.array([0] * 3 + [1] * 50 + [2]), np.arange(54, dtype=np.uint64), (0.1, 0.1), 0)
    assert sorted(part[:3]) == [0, 1, 2]
    assert np.bincount(part[3:53]).tolist() == [5, 5, 40]
    assert part[53] == 2  # one alone trains


def test_duplicates_fall_on_one_side():
    rng = np.random.default_rng(0)
    keys = rng.integers(0, 40, 200).astype(np.uint64)
    part = stratified_parts(rng.integers(0, 3, 200), keys, (0.3,), 0)
    for key in np.unique(keys):
        assert len(np.unique(part[keys == key])) == 1


def test_keys_are_shared_by_both_strands():
    ids = nucleotide.encode("ACCGTTN")
    assert sequence_key(ids) == sequence_key(nucleotide.reverse_complement(ids)) != sequence_key(ids[:-1])


def test_strata_of_regression_and_multi_label():
    assert np.bincount(strata(np.arange(100.0), "regression")).tolist() == [10] * 10
    labels = np.array([[1, 0], [0, 1], [1, 0]])
    assert strata(np.repeat(labels, 10, 0), "multi-label").reshape(3, 10).tolist() == [[1] * 10, [0] * 10, [1] * 10]
    assert len(np.unique(strata(labels, "multi-label"))) == 1


def test_labels_that_hardly_ever_combine_alike_leave_a_test_split():
    """A combination that one sequence has went to training, so there was nothing to test on."""
    rng = np.random.default_rng(0)
    labels, keys = rng.integers(0, 2, (500, 20)), rng.integers(0, 2**63, 500).astype(np.uint64)
    assert (stratified_parts(strata(labels, "multi-label"), keys, (0.2,), seed=0) == 0).sum() == 100


@pytest.mark.parametrize("action", ["drop", "keep", "error"])
def test_leaking_duplicates(tmp_path, action):
    rows = random_rows(20)
    leak = rows[0][0]
    back = nucleotide.decode(nucleotide.reverse_complement(nucleotide.encode(rows[1][0])))
    files = {0: write_csv(tmp_path / "0.csv", rows), 2: write_csv(tmp_path / "2.csv", [(leak, "a"), (back, "a"), *random_rows(4, 9)])}
    if action == "error":
        with pytest.raises(UserError, match="2 sequences are on both sides of a split, for example 'train-2' .* and 'test-2'"):
            prepare(None, tmp_path / "d", files=files, duplicates=action)
        assert not (tmp_path / "d").exists()
        return
    store = prepare(None, tmp_path / "d", files=files, duplicates=action)
    found = store.manifest["duplicates"]
    assert (found["repeats"], found["repeats_with_another_label"], found["leaking"]) == (2, 1, 2)
    assert len(store) == (24 if action == "drop" else 26)
    texts = [text_of(store, i) for i in store.rows("train", 0)]
    assert (leak in texts or leak in [text_of(store, i) for i in store.rows("valid", 0)]) == (action == "keep")
    assert store.names()[:2] == (["train-4", "train-5"] if action == "drop" else ["train-2", "train-3"])


# -- bad input -----------------------------------------------------------------------------------------------------
GOOD = "".join(f"{x},{y}\n" for x, y in random_rows(20))
TABLE = [
    ("x,y\nACGT,a\n", {}, "no column is called 'sequence' or 'seq' or 'seqs'; name the sequence column .* one of 'x', 'y'; if .* no header.*--columns label,name"),
    ("seq,y\nACGT,a\n", {}, "no column is called 'label' or 'labels'; .*--label-column, one of 'seq', 'y'"),
    ("seq,label\n" + GOOD, {"label_column": "lable"}, "--label-column lable: .* it has 'seq', 'label'"),
    ("seq,label\nACGT,a\nACCC,\n", {}, "line 3: no label; mend it, or .*--skip-bad"),
    ("seq,label\nACGT,a\nACGG,a\n", {}, "only one class, 'a'"),
    ("seq,label\nACGT,a\nnNN,b\n", {}, "line 3: no A, C, G or T in the sequence"),
    ("seq,label\nACGT,a\n,b\n", {}, "line 3: empty sequence"),
    ("seq,label\nACGT,a\nAC!T,b\n", {}, "line 3: '!' in the sequence is no nucleotide code"),
    ("seq,label\nACGT,a,3\n", {}, "line 2: 3 columns, the header has 2"),
    ("seq,label\n", {}, "no labelled sequence was read"),
    ("seq,label,id\nACGT,a,n1\nACGA,b,n1\n", {"name_column": "id"}, "line 3: id 'n1' was met before .*line 2"),
    ("seq,label,split\nACGT,a,train\nACGA,b,tset\n", {}, "line 3: split 'tset' is not one of"),
    ("seq,label,split\nACGT,a,train\nACGA,b,train\n", {}, "a training split but no test split"),
    (">s1 a\nACGT\n", {}, "looks like FASTA"),
    ("seq,label\n" + GOOD + "AAAA,c\n", {}, "class 'c' has 1 training sequence"),
]


@pytest.mark.parametrize("content, reading, message", TABLE)
def test_bad_tables_are_one_line(tmp_path, content, reading, message):
    path = tmp_path / "a.csv"
    path.write_text(content)
    with pytest.raises(UserError, match=message) as error:
        prepare(path, tmp_path / "d", reading=reading)
    assert "\n" not in str(error.value) and not (tmp_path / "d").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["a.csv"]  # nothing half-written


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(labels=LabelOptions(classes=("a", "b", "c"))), "class 'c' is empty: no sequence has this label"),
        (dict(labels=LabelOptions(classes=("a", "c"))), "label 'b' is not among --classes"),
        (dict(labels=LabelOptions("regression")), "label 'b' is not a number; --kind regression needs numbers"),
        (dict(test_share=1.5), "--test-share 1.5"),
        (dict(duplicates="maybe"), "--duplicates maybe"),
    ],
)
def test_bad_options_are_one_line(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        prepare(write_csv(tmp_path / "a.csv", random_rows()), tmp_path / "d", **options)
    assert not (tmp_path / "d").exists()


def test_a_gap_among_measurements_is_named(tmp_path):
    """80 classes of one sequence each, it was taken for, and the test split was said to be empty."""
    rng = np.random.default_rng(0)
    rows = ["".join(rng.choice(list("ACGT"), 20)) + f",{rng.normal()}" for _ in range(80)]
    rows[5] = rows[5].split(",")[0] + ",nan"
    (tmp_path / "a.csv").write_text("sequence,label\n" + "\n".join(rows) + "\n")
    with pytest.raises(UserError, match="line 7: label 'nan' is not a finite number, as nearly all"):
        prepare(tmp_path / "a.csv", tmp_path / "d")


def test_what_leaves_no_split_or_class_is_said(tmp_path):
    numbers = [(x, f"{0.1 * i:.1f}") for i, (x, _) in enumerate(random_rows(20))]
    with pytest.raises(UserError, match="the test split is empty.*--kind regression reads labels as numbers"):
        prepare(write_csv(tmp_path / "n.csv", numbers), tmp_path / "d")
    assert prepare(tmp_path / "n.csv", tmp_path / "r", labels=LabelOptions(kind="regression")).kind == "regression"
    twice = [(x, y, split) for x, y in random_rows(8) for split in ("train", "test")]
    path = write_csv(tmp_path / "t.csv", twice, ("sequence", "label", "split"))
    with pytest.raises(UserError, match="the train split is empty .8 on both sides .* --duplicates keep leaves them"):
        prepare(path, tmp_path / "d")
    path = write_csv(tmp_path / "h.csv", [])
    with pytest.raises(UserError, match=r"h\.csv: no labelled sequence was read; give"):
        prepare(path, tmp_path / "d")
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize("kind, separator", [("many", None), ("binary", ";"), ("multi-label", None)])
def test_label_options_are_checked(kind, separator):
    with pytest.raises(UserError):
        LabelOptions(kind, separator)


@pytest.mark.parametrize(
    "row, message",
    [
        ("chr1\t5\t11\tp", r"line 1: end 11 is past the end of 'chr1' \(10 bases\)"),
        ("chr9\t0\t4\tp", "line 1: no sequence 'chr9' in .*did you mean 'chr1'"),
        ("chr1\t4\t4\tp", "start 4 is not before end 4"),
        ("chr1\t0\t4", "3 columns; a row is"),
        ("chr1\t-1\t4\tp", "no column is called 'label'"),
        ("chr1\t0\t4\tp\nchr1\t²\t4\tq", "line 2: .*must be whole numbers"),  # a digit of another kind
    ],
)
def test_bad_bed_rows_are_one_line(tmp_path, row, message):
    (tmp_path / "g.fa").write_text(">chr1\nAACCGGTTAC\n")
    (tmp_path / "x.bed").write_text(row + "\n", encoding="utf-8")
    with pytest.raises(UserError, match=message):
        prepare(tmp_path / "x.bed", tmp_path / "d", reading={"genome": tmp_path / "g.fa"})


def test_bad_fasta_labels_are_one_line(tmp_path):
    fasta = tmp_path / "a.fa"
    fasta.write_text(">s1|a\nACGT\n>s2\nACGA\n")
    for reading, message in [
        ({}, "where are the labels of this FASTA"),
        ({"label_from": "header"}, "record 2 .*no label in the header"),
        ({"label_from": "header", "label_pattern": "(x"}, "not a regular expression"),
        ({"label_from": "header", "label_pattern": "x"}, "needs a group"),
        ({"labels": write_csv(tmp_path / "l.csv", [("s1|a", "p")], ("name", "label"))}, "record 2, 's2', has no label in"),
    ]:
        with pytest.raises(UserError, match=message):
            prepare(fasta, tmp_path / "d", reading=reading)


def test_a_table_of_labels_serves_the_fasta_files_of_all_splits(tmp_path):
    """Each file was to hold every name of the table, and its split was forgotten."""
    rows = random_rows(30)
    files = {0: tmp_path / "train.fa", 1: tmp_path / "valid.fa", 2: tmp_path / "test.fa"}
    for i, (split, path) in enumerate(files.items()):
        path.write_text("".join(f">{path.stem}{j}\n{sequence}\n" for j, (sequence, _) in enumerate(rows[i::3])))
    table = [(f"{path.stem}{j}", label) for i, path in enumerate(files.values()) for j, (_, label) in enumerate(rows[i::3])]
    reading = {"labels": write_csv(tmp_path / "l.csv", table, ("name", "label"))}
    store = prepare(None, tmp_path / "d", files=files, reading=reading)
    assert list(store.manifest["splits"].values()) == [10, 10, 10]
    assert [name.rstrip("0123456789") for name in store.names()] == [SPLITS[code] for code in store.split]
    assert [store.classes[label] for label in store.labels] == [label for _, label in table]
    write_csv(tmp_path / "l.csv", [*table, ("else", "a")], ("name", "label"))
    with pytest.raises(UserError, match="1 of its 31 names are not in .*train.fa or .*valid.fa or .*test.fa"):
        prepare(None, tmp_path / "e", files=files, reading=reading)


def test_an_option_that_a_reader_would_pass_over_is_refused(tmp_path):
    """`--where` chose nothing among the records of a FASTA, and all of them became the dataset."""
    (tmp_path / "a.fa").write_text("".join(f">s{i}|{label}\n{sequence}\n" for i, (sequence, label) in enumerate(random_rows())))
    (tmp_path / "a.bed").write_text("chr1\t0\t4\tp\n")
    (tmp_path / "g.fa").write_text(">chr1\nAACCGGTTAC\n")
    write_csv(tmp_path / "a.csv", random_rows())
    for file, reading, message in (
        ("a.fa", {"label_from": "header", "where": {"task": "x"}}, "--where: says nothing about .*a.fa, which is read as FASTA with labels in its headers"),
        ("a.fa", {"labels": tmp_path / "a.csv", "columns": ("a", "b")}, "--columns: .* read as FASTA with a table of labels"),
        ("a.bed", {"genome": tmp_path / "g.fa", "name_column": "id"}, "--name-column: .* read as BED"),
        ("a.bed", {"genome": tmp_path / "g.fa", "labels": tmp_path / "a.csv"}, "--labels: .* read as BED"),
        ("a.csv", {"label_pattern": "(x)", "split_column": "s"}, "--split-column: .* read as FASTA"),
    ):
        with pytest.raises(UserError, match=message):
            prepare(tmp_path / file, tmp_path / "d", reading=reading)
    for seed in (-1, 2**63):
        with pytest.raises(UserError, match=rf"--seed {seed}: must lie in \[0, 2\^63\)"):
            prepare(tmp_path / "a.csv", tmp_path / "d", seed=seed)
    assert not (tmp_path / "d").exists()


def test_bad_sequences_may_be_skipped(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("seq,label\n" + GOOD + "NNN,a\nACGT,\n,b\n")
    store = prepare(path, tmp_path / "d", skip_bad=True)
    assert len(store) == 20
    assert store.manifest["skipped"] == {"no A, C, G or T in the sequence": 1, "no label": 1, "empty sequence": 1}


def test_case_that_gives_the_label_away_is_reported_and_ignored(tmp_path):
    rows = [(x.lower() if y == "a" else x, y) for x, y in random_rows()]
    store = prepare(write_csv(tmp_path / "a.csv", rows), tmp_path / "d")
    assert store.manifest["case_gives_labels_away"]
    upper = prepare(write_csv(tmp_path / "b.csv", random_rows()), tmp_path / "d2")
    assert not upper.manifest["case_gives_labels_away"] and np.array_equal(store.tokens, upper.tokens)


def test_what_is_no_labelled_dataset(tmp_path):
    store = prepare(write_csv(tmp_path / "a.csv", random_rows()), tmp_path / "d")
    with pytest.raises(UserError, match="no such dataset"):
        LabelledStore.open(tmp_path / "none")
    with pytest.raises(UserError, match="holds labelled sequences; .*train classify"):
        TokenStore.open(store.directory)
    manifest = store.directory / "manifest.json"
    good = manifest.read_text()
    for change, message in [
        ({"kind": "dna"}, "is a dataset of kind 'dna'"),
        ({"n": 61}, "the manifest says 61 sequences"),
        ({"version": 99}, "version 99"),
        ({"label_kind": "odd"}, "damaged dataset"),
    ]:
        manifest.write_text(json.dumps(json.loads(good) | change))
        with pytest.raises(UserError, match=message):
            LabelledStore.open(store.directory)
    manifest.write_text(good)
    (store.directory / "tokens.bin").write_bytes(b"\x07")
    with pytest.raises(UserError, match="tokens.bin is 1 bytes"):
        LabelledStore.open(store.directory)


def test_an_existing_directory_is_not_overwritten(tmp_path):
    path = write_csv(tmp_path / "a.csv", random_rows())
    prepare(path, tmp_path / "d")
    with pytest.raises(UserError, match="exists"):
        prepare(path, tmp_path / "d")
    prepare(path, tmp_path / "d", overwrite=True)


# -- real files ----------------------------------------------------------------------------------------------------
@needs_data
def test_real_files(tmp_path):
    store = prepare(SHARED / "ecoli_sigma70_promoters.csv.gz", tmp_path / "a")
    assert len(store) == 5720 and store.manifest["case_gives_labels_away"] and store.lengths.max() == 81
    store = prepare(SHARED / "uci_splice_junctions.csv.gz", tmp_path / "b")
    assert store.classes == ["EI", "IE", "N"] and len(store) == 3190 and store.manifest["counts"]["other"] > 0
    assert store.manifest["duplicates"]["repeats"] == 185
    reading = {"columns": ("label", "name", "sequence"), "name_column": "name"}
    store = prepare(SHARED / "uci_promoters.data", tmp_path / "c", reading=reading)
    assert store.classes == ["+", "-"] and len(store) == 106 and store.names()[0] == "S10"
