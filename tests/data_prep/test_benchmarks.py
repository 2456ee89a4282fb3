"""Benchmarks from tiny files in the layouts of the public downloads, and the published figures beside them."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from data_prep.benchmarks import find_benchmarks, prepare_benchmark, species_sources
from seqlab.classification import published
from seqlab.classification.dataset import LabelledStore
from seqlab.errors import UserError

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data" / "classification"
needs_data = pytest.mark.skipif(not SHARED.is_dir(), reason="the folder shared/data is not here")


def bases(rng, n=30):
    return "".join(rng.choice(list("ACGT"), n))


def genomic(folder, seed=0, classes=("positive", "negative")):
    """train and test, one folder a class, one sequence a .txt file."""
    rng = np.random.default_rng(seed)
    for split, n in (("train", 6), ("test", 3)):
        for label in classes:
            (folder / split / label).mkdir(parents=True)
            for i in range(n):
                (folder / split / label / f"{i}.txt").write_text(bases(rng))
    return folder


def stores(suite, path, out, tasks=()):
    found = find_benchmarks(suite, path, tasks)
    return {b.task: LabelledStore.open(prepare_benchmark(b, out / b.task)) for b in found}


def test_genomic_benchmarks_as_unpacked(tmp_path):
    genomic(tmp_path / "gb" / "human_nontata_promoters")
    genomic(tmp_path / "gb" / "dummy_mouse_enhancers_ensembl", 1)
    made = stores("genomic-benchmarks", tmp_path / "gb", tmp_path / "out")
    assert sorted(made) == ["dummy_mouse_enhancers_ensembl", "human_nontata_promoters"]
    store = made["human_nontata_promoters"]
    assert store.classes == ["negative", "positive"] and np.bincount(store.split).tolist() == [12, 0, 6]
    assert store.manifest["benchmark"] == {"suite": "genomic-benchmarks", "task": "human_nontata_promoters", "max_length": None}
    assert made["dummy_mouse_enhancers_ensembl"].manifest["benchmark"]["max_length"] == 1024
    first = (tmp_path / "gb" / "human_nontata_promoters" / "train" / "negative" / "0.txt").read_text()
    assert store.names()[0] == "train/negative/0" and store.labels[0] == 0 and len(first) == store.lengths[0]
    sources = store.manifest["sources"]
    assert len(sources) == 4 and sources[0]["files"] == 6 and len(sources[0]["sha256"]) == 64
    alone = stores("genomic-benchmarks", tmp_path / "gb" / "human_nontata_promoters", tmp_path / "alone")
    assert np.array_equal(alone["human_nontata_promoters"].tokens, store.tokens)


def test_genomic_benchmarks_as_csv(tmp_path):
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        rows = "".join(f"{bases(rng)},{i % 2}\n" for i in range(8))
        (tmp_path / f"{split}_human_nontata_promoters.csv").write_text("seq,label\n" + rows)
    store = stores("genomic-benchmarks", tmp_path, tmp_path / "out")["human_nontata_promoters"]
    assert store.classes == ["0", "1"] and np.bincount(store.split).tolist() == [8, 0, 8]


def test_nucleotide_transformer_tasks_as_fasta(tmp_path):
    rng = np.random.default_rng(0)
    for task, head in {"H3": ">seq_{i}|{y}", "promoter_tata": ">promoter_{i}_{y}"}.items():
        (tmp_path / "nt" / task).mkdir(parents=True)
        for split in ("train", "test"):
            text = "".join(head.format(i=i, y=i % 2) + f"\n{bases(rng)}\n" for i in range(6))
            suffix = ".fna" if task == "H3" else ".fasta"
            (tmp_path / "nt" / task / f"{split}{suffix}").write_text(text)
    made = stores("nucleotide-transformer", tmp_path / "nt", tmp_path / "out")
    assert sorted(made) == ["H3", "promoter_tata"]
    for store in made.values():
        assert store.classes == ["0", "1"] and store.labels.tolist() == [0, 1] * 6
    assert made["H3"].manifest["benchmark"]["suite"] == "nucleotide-transformer"


def test_nucleotide_transformer_revised_tables(tmp_path):
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        rows = "".join(f"{bases(rng)}\tchr1:{i}-{i + 30}|{i % 2}\t{i % 2}\t{'H3K4me1' if i < 6 else 'enhancers'}\n" for i in range(12))
        (tmp_path / f"{split}.tsv.gz").write_bytes(gzip.compress(("sequence\tname\tlabel\ttask\n" + rows).encode()))
    made = stores("nucleotide-transformer", tmp_path, tmp_path / "out")
    assert sorted(made) == ["H3K4me1", "enhancers"] and len(made["enhancers"]) == 12
    assert made["H3K4me1"].manifest["benchmark"]["suite"] == "nucleotide-transformer-revised"
    assert published.figures("nucleotide-transformer-revised", "H3K4me1") == ("mcc", [])
    assert list(stores("nucleotide-transformer", tmp_path, tmp_path / "one", ("enhancers",))) == ["enhancers"]


def test_great_apes(tmp_path):
    for name in published.GREAT_APE_NAMES:
        (tmp_path / name).mkdir()
        for chromosome in ("1", "2A", "5", "13", "X", "MT", "Un_x"):
            (tmp_path / name / f"chr{chromosome}.fna.gz").write_bytes(gzip.compress(b">x\nACGT\n"))
    sources = species_sources("great-apes", tmp_path)
    assert {s.species for s in sources} == set(published.GREAT_APE_NAMES)
    splits = {s.path.name: s.split for s in sources if s.species == "human"}
    assert splits == {
        "chr1.fna.gz": "valid", "chr13.fna.gz": "valid", "chr5.fna.gz": "test", "chr2A.fna.gz": "train", "chrX.fna.gz": "train",
    }  # fmt: skip


@pytest.mark.parametrize(
    "suite, make, message",
    [
        ("genomic-benchmarks", lambda p: None, "holds no task of genomic-benchmarks"),
        ("genomic-benchmark", lambda p: None, "unknown benchmark; did you mean 'genomic-benchmarks'"),
        ("nucleotide-transformer", lambda p: genomic(p / "x"), "holds no task of nucleotide-transformer"),
        ("genomic-benchmarks", lambda p: (genomic(p / "x") / "test" / "third").mkdir(), "class 'third' is in one split only"),
        ("genomic-benchmarks", lambda p: genomic(p / "x", classes=("a",)), "only one class, 'a'"),
        ("great-apes", lambda p: None, "bonobo: is missing"),
    ],
)
def test_bad_folders_are_one_line(tmp_path, suite, make, message):
    make(tmp_path)
    with pytest.raises(UserError, match=message):
        if suite == "great-apes":
            species_sources(suite, tmp_path)
        stores(suite, tmp_path, tmp_path / "out")
    assert not (tmp_path / "out" / "x").exists()


def test_an_empty_class_is_one_line(tmp_path):
    for file in (genomic(tmp_path / "x") / "train" / "negative").iterdir():
        file.unlink()
    with pytest.raises(UserError, match="class 'negative' is empty"):
        stores("genomic-benchmarks", tmp_path, tmp_path / "out")


def test_published_figures():
    metric, figures = published.figures("genomic-benchmarks", "human_nontata_promoters")
    assert metric == "accuracy" and len(figures) == 6
    assert figures[4] == ("Caduceus-Ph 470K", 0.946, 0.007, "C")
    metric, figures = published.figures("nucleotide-transformer", "splice_sites_acceptors")
    assert metric == "f1" and max(figures, key=lambda f: f.score).model == "NT-v2-500M"
    assert published.figures("genomic-benchmarks", "mine") == ("accuracy", [])
    for task, (metric, *scores) in published.NT_TASKS.items():
        assert len(scores) == len(published.NT_MODELS) and metric == published.nt_metric(task), task
    for rows in published.GENOMIC_BENCHMARKS.values():
        assert len(rows) == len(published.GENOMIC_MODELS)
    table, source = published.species_figures(["Human", "chimpanzee", "gorilla", "orangutan", "bonobo"])
    assert table["Mamba 7M"][1 << 20] == 0.8131 and "Mamba" in source
    assert published.species_figures(["human", "mouse"]) is None
    json.dumps(published.GREAT_APES)


def test_parquet_tables(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="pip install pyarrow")
    from pyarrow import parquet

    rng = np.random.default_rng(0)
    (tmp_path / "H4").mkdir()
    for split in ("train", "test"):
        texts = [bases(rng) for _ in range(6)]
        table = pyarrow.table({"sequence": texts, "name": [f"s{i}" for i in range(6)], "label": [0, 1] * 3})
        parquet.write_table(table, tmp_path / "H4" / f"{split}-00000-of-00001.parquet")
    store = stores("nucleotide-transformer", tmp_path, tmp_path / "out")["H4"]
    assert store.classes == ["0", "1"] and np.bincount(store.split).tolist() == [6, 0, 6]
    for split in ("test", "train"):
        (tmp_path / "H4" / f"{split}-00000-of-00001.parquet").write_bytes(b"PAR1 not really")
        with pytest.raises(UserError, match=f"{split}.*not a readable parquet file"):
            stores("nucleotide-transformer", tmp_path, tmp_path / "out2")


def test_without_pyarrow_parquet_says_what_to_type(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    (tmp_path / "H4").mkdir()
    for split in ("train", "test"):
        (tmp_path / "H4" / f"{split}.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match="pip install pyarrow"):
        stores("nucleotide-transformer", tmp_path, tmp_path / "out")


# -- real files ----------------------------------------------------------------------------------------------------
@needs_data
def test_a_real_sample_of_the_revised_tasks(tmp_path):
    """The sample is one table; as both train and test it is a benchmark in which everything leaks, which is reported."""
    for split in ("train", "test"):
        (tmp_path / f"{split}.tsv.gz").write_bytes((SHARED / "nt_tasks_sample1500.tsv.gz").read_bytes())
    found = find_benchmarks("nucleotide-transformer", tmp_path)
    assert len(found) == 18
    made = stores("nucleotide-transformer", tmp_path, tmp_path / "out", ("promoter_tata", "splice_sites_all"))
    store = made["splice_sites_all"]
    assert store.classes == ["0", "1", "2"] and len(store) == 2 * 503 and set(store.lengths) == {600}
    assert store.manifest["duplicates"]["leaking"] == 503 and len(made["promoter_tata"]) == 18


@needs_data
def test_a_real_genomic_benchmark_as_csv(tmp_path):
    rows = gzip.decompress((SHARED / "gb_human_nontata_promoters.test.csv.gz").read_bytes()).decode().splitlines()
    (tmp_path / "human_nontata_promoters").mkdir()
    for split, part in (("train", rows[1::2]), ("test", rows[2::2])):
        (tmp_path / "human_nontata_promoters" / f"{split}.csv").write_text("\n".join([rows[0], *part]) + "\n")
    store = stores("genomic-benchmarks", tmp_path, tmp_path / "out")["human_nontata_promoters"]
    assert len(store) == 9034 and store.classes == ["0", "1"] and set(store.lengths) == {251}
    assert np.bincount(store.labels).tolist() == [4119, 4915] and store.manifest["duplicates"]["leaking"] == 0
