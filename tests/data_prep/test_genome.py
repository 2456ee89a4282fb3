"""FASTA -> dataset: cases by hand, a naive reader and pyfaidx as oracles, splits, and bad input that leaves nothing."""

import errno
import gzip
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from Bio.bgzf import BgzfWriter
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data_prep import files, genome
from data_prep.genome import prepare_genome
from seqlab.dataset import SPLITS, TokenStore
from seqlab.errors import UserError
from seqlab.tokenizers import nucleotide

REPOSITORY = Path(__file__).resolve().parents[2]
DATA = REPOSITORY / "shared" / "data"
if not DATA.is_dir():
    DATA = REPOSITORY.parent / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the folder shared/data is not here")


def write(path: Path, content: bytes | str) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def prepared(folder: Path, content: bytes | str, **options) -> TokenStore:
    fasta = write(folder / "in.fa", content)
    return TokenStore.open(prepare_genome([fasta], folder / "out", **options))


def bases(count: int, seed: int = 0, letters: str = "ACGT") -> str:
    return "".join(random.Random(seed).choices(letters, k=count))


# -- by hand -------------------------------------------------------------------------------------------------------
def test_a_small_file_by_hand(tmp_path):
    text = ">one first >record\nACGTN\nacgtRU-\n\n>empty\n>two\nttNN\nAA"
    store = prepared(tmp_path, text, valid=["two"])
    assert store.tokens.tolist() == [7, 8, 9, 10, 11, 7, 8, 9, 10, 6, 10, 6] + [10, 10, 11, 11, 7, 7]
    assert store.soft_masked.tolist() == [[5, 9], [12, 14]]
    manifest = store.manifest
    assert manifest["sequences"] == [
        {
            "name": "one",
            "source": 0,
            "offset": 0,
            "length": 12,
            "counts": {"A": 2, "C": 2, "G": 2, "T": 3, "N": 1, "other": 2},
            "soft_masked": 4,
        },
        {
            "name": "two",
            "source": 0,
            "offset": 12,
            "length": 6,
            "counts": {"A": 2, "C": 0, "G": 0, "T": 2, "N": 2, "other": 0},
            "soft_masked": 2,
        },
    ]
    assert manifest["counts"] == {"A": 4, "C": 2, "G": 2, "T": 5, "N": 3, "other": 2}
    assert (manifest["total"], manifest["soft_masked"]) == (18, 6)
    assert manifest["splits"] == {"train": [[0, 0, 12]], "valid": [[1, 0, 6]], "test": []}
    assert manifest["skipped"] == {"sequences": 1, "bases": 0, "min_length": 1}  # the empty record
    assert (manifest["kind"], manifest["tokenizer"], manifest["sample_rate"]) == ("dna", "nucleotide", None)
    assert manifest["sha256"] == hashlib.sha256(store.tokens.tobytes()).hexdigest()
    source = tmp_path / "in.fa"
    assert manifest["sources"] == [
        {"path": str(source), "sha256": hashlib.sha256(source.read_bytes()).hexdigest(), "bytes": len(text)}
    ]
    store.verify()
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["manifest.json", "soft_masked.npy", "tokens.bin"]


@pytest.mark.parametrize(
    "text",
    [
        ">a\nACGTAC\n>b\nGGTT\n",
        ">a\nACGTAC\n>b\nGGTT",  # no final newline
        ">a\r\nACG\r\nTAC\r\n>b\r\nGGTT\r\n",  # CRLF
        ">a\rACG\rTAC\r>b\rGGTT\r",  # CR alone
        "\n\n  \n>a\n\nACG\n\n\nTAC\n\n>b\nGGTT\n\n\n",  # blank lines
        "  >a\n  ACG TAC\n\t>b x\n G\tG T T  \n",  # blanks around and within lines
        ">a with > and >> in it\nACGTAC\n>b>\nGGTT\n".replace("b>", "b"),
        ">a\nA\nC\nG\nT\nA\nC\n>b\nG\nG\nT\nT\n",
        "\ufeff>a\nACGTAC\n>b\nGGTT\n",  # UTF-8 byte order mark
        ">  a late name\nACGTAC\n>\tb\nGGTT\n",
        ">a\nACGUAC\n>b\nGGUU\n",  # RNA
    ],
)
@pytest.mark.parametrize("read_size", [16, 1 << 20])
def test_layouts_that_mean_the_same(tmp_path, monkeypatch, text, read_size):
    monkeypatch.setattr(files, "READ_SIZE", read_size)
    store = prepared(tmp_path, text, valid=["b"])
    assert nucleotide.decode(store.tokens) == "ACGTACGGTT"
    assert (store.names, store.lengths.tolist()) == (["a", "b"], [6, 4])


def test_several_files_are_one_genome(tmp_path):
    one = write(tmp_path / "1.fa", ">a\nAAaa")
    two = write(tmp_path / "2.fa.gz", gzip.compress(b">b\nccCC\n>c\nG"))
    seen = []
    out = prepare_genome([one, two], tmp_path / "x/y/out", valid=["b"], test=["c"], progress=lambda *n: seen.append(n))
    store = TokenStore.open(out)
    assert nucleotide.decode(store.tokens) == "AAAACCCCG"
    assert store.soft_masked.tolist() == [[2, 6]]  # in global coordinates a run may cross from a to b
    assert [s["source"] for s in store.manifest["sequences"]] == [0, 1, 1]
    assert [s["soft_masked"] for s in store.manifest["sequences"]] == [2, 2, 0]
    total = one.stat().st_size + two.stat().st_size
    assert seen[-1] == (total, total) and seen == sorted(seen)
    assert [store.intervals(split).tolist() for split in SPLITS] == [[[0, 4]], [[4, 8]], [[8, 9]]]


def test_the_same_input_gives_the_same_bytes(tmp_path):
    fasta = write(tmp_path / "in.fa", ">a\n" + bases(5000, letters="ACGTacgtN"))
    for name in ("one", "two"):
        prepare_genome(fasta, tmp_path / name)
    for file in ("tokens.bin", "soft_masked.npy", "manifest.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_short_sequences_can_be_left_out(tmp_path):
    text = ">a\nACGTac\n>b\ngg\n>c\naCGTT\n>d\nA\n>e\nccccc\n"
    store = prepared(tmp_path, text, min_length=5, valid=["c"], test=["e"])
    assert store.names == ["a", "c", "e"]
    assert nucleotide.decode(store.tokens) == "ACGTACACGTTCCCCC"
    assert store.soft_masked.tolist() == [[4, 7], [11, 16]]
    assert store.manifest["skipped"] == {"sequences": 2, "bases": 3, "min_length": 5}
    store.verify()
    with pytest.raises(UserError, match="no sequence of 50 bases or more"):
        prepare_genome([tmp_path / "in.fa"], tmp_path / "other", min_length=50)


# -- against a naive reader ----------------------------------------------------------------------------------------
def naive_reader(data: bytes) -> dict[str, str]:
    records: dict[str, str] = {}
    for line in data.decode().replace("\r\n", "\n").replace("\r", "\n").split("\n"):
        line = line.strip()
        if line.startswith(">"):
            name = line[1:].split()[0]
            records[name] = ""
        elif line:
            records[name] += "".join(line.split())
    return records


sequence = st.text(alphabet="ACGTacgtNnRyXu-*.", max_size=120) | st.builds(
    lambda a, n, b, m: a * n + b * m,
    st.sampled_from("Aa"),
    st.integers(0, 60),
    st.sampled_from("gGnN"),
    st.integers(0, 60),
)


@st.composite
def fasta_files(draw) -> bytes:
    lines = []
    for number, text in enumerate(draw(st.lists(sequence, min_size=1, max_size=6))):
        lines.append(f">s{number}" + draw(st.sampled_from(["", " d", "\tlong > description >", "  "])))
        width = draw(st.integers(1, 130))
        lines += [text[i : i + width] for i in range(0, len(text), width)]
        lines += [""] * draw(st.integers(0, 2))
    return draw(st.sampled_from(["\n", "\r\n", "\r"])).join(lines).encode() + draw(st.sampled_from([b"", b"\n"]))


def bgzip(data: bytes, path: Path, block: int) -> bytes:
    with BgzfWriter(str(path)) as file:
        for i in range(0, len(data), block):
            file.write(data[i : i + block])
            file.flush()  # one bgzip block each
    return path.read_bytes()


@settings(deadline=None, max_examples=150)
@given(
    fasta_files(),
    st.integers(16, 64),
    st.sampled_from([1, 30, 200, 1 << 19]),
    st.sampled_from(["plain", "gzip", "members", "bgzip"]),
    st.sampled_from([1, 2, 20, 70]),
)
def test_agrees_with_a_naive_reader(data, read_size, hold, packing, min_length):
    records = {name: text for name, text in naive_reader(data).items() if len(text) >= min_length}
    whole = "".join(records.values())
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "READ_SIZE", read_size)  # small buffers: records, lines and runs cross their borders
        patch.setattr(genome._Writer, "HOLD", hold)
        half = len(data) // 2
        packed = {
            "plain": lambda: data,
            "gzip": lambda: gzip.compress(data),
            "members": lambda: gzip.compress(data[:half]) + gzip.compress(b"") + gzip.compress(data[half:]) + b"\0" * 9,
            "bgzip": lambda: bgzip(data, Path(folder) / "b.gz", 50),
        }[packing]()
        fasta = write(Path(folder) / "in.fa", packed)
        if len(whole) < 3:
            with pytest.raises(UserError, match="no sequence|too few"):
                prepare_genome([fasta], Path(folder) / "out", min_length=min_length)
            return
        store = TokenStore.open(prepare_genome([fasta], Path(folder) / "out", min_length=min_length))
        assert store.names == list(records)
        assert store.lengths.tolist() == [len(text) for text in records.values()]
        np.testing.assert_array_equal(store.tokens, nucleotide.encode(whole))
        is_lower = np.array([c.islower() for c in whole])
        np.testing.assert_array_equal(store.soft_mask(0, store.total), is_lower)
        assert (store.soft_masked[1:, 0] > store.soft_masked[:-1, 1]).all()  # runs are as long as they can be
        assert store.manifest["soft_masked"] == is_lower.sum()
        for entry, text in zip(store.manifest["sequences"], records.values()):
            upper = text.upper().replace("U", "T")
            counts = {base: upper.count(base) for base in "ACGTN"}
            assert entry["counts"] == {**counts, "other": len(text) - sum(counts.values())}
            assert entry["soft_masked"] == sum(c.islower() for c in text)
        store.verify()
        assert store.manifest["sources"][0]["sha256"] == hashlib.sha256(packed).hexdigest()


@pytest.mark.parametrize("suffix", [".fa", ".fa.gz"])
def test_agrees_with_pyfaidx(tmp_path, suffix):
    """An independent reader, on plain and bgzip files: random stretches, as written (case and ambiguity codes kept)."""
    from pyfaidx import Fasta

    text = "".join(
        f">chr{i} d\n" + "\n".join(s[j : j + 61] for j in range(0, len(s), 61)) + "\n"
        for i, s in enumerate(bases(n, n, "ACGTacgtNRYk") for n in (30_000, 61, 122, 7, 20_000))
    ).encode()
    path = tmp_path / f"in{suffix}"
    write(path, text) if suffix == ".fa" else bgzip(text, path, 20_000)
    check_against_pyfaidx(TokenStore.open(prepare_genome([path], tmp_path / "out")), Fasta(str(path)))


@needs_data
@pytest.mark.parametrize("name", ["eukaryotes/human_hg18_chrM_chr20first1Mb_softmasked.fa.gz", "eukaryotes/athaliana_1pct.fa.gz"])
def test_agrees_with_pyfaidx_on_real_genomes(tmp_path, name):
    from pyfaidx import Fasta

    plain = write(tmp_path / "in.fa", gzip.decompress((DATA / name).read_bytes()))
    check_against_pyfaidx(TokenStore.open(prepare_genome([DATA / name], tmp_path / "out")), Fasta(str(plain)))


def check_against_pyfaidx(store: TokenStore, fasta) -> None:
    assert store.names == list(fasta.keys())
    rng = random.Random(0)
    for _ in range(200):
        index = rng.randrange(len(store.names))
        record, offset = fasta[store.names[index]], int(store.offsets[index])
        assert store.lengths[index] == len(record)
        start = rng.randrange(len(record))
        end = rng.randint(start, min(len(record), start + 3000))
        text = str(record[start:end])
        np.testing.assert_array_equal(store.tokens[offset + start : offset + end], nucleotide.encode(text))
        mask = store.soft_mask(offset + start, offset + end)
        np.testing.assert_array_equal(mask, np.array([c.islower() for c in text], bool))


def check_against_biopython(path: Path, folder: Path) -> None:
    from Bio import SeqIO

    store = TokenStore.open(prepare_genome([path], folder))
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt") as file:
        records = [(record.id, str(record.seq)) for record in SeqIO.parse(file, "genbank")]
    assert store.names == [name for name, _ in records]
    np.testing.assert_array_equal(store.tokens, nucleotide.encode("".join(text for _, text in records)))
    assert store.manifest["soft_masked"] == 0


def test_genbank_agrees_with_biopython(tmp_path):
    check_against_biopython(write(tmp_path / "a.gb", GENBANK.lstrip()), tmp_path / "a")
    check_against_biopython(write(tmp_path / "b.gb", GENBANK.lstrip().replace(b"\n", b"\r\n")), tmp_path / "b")


@needs_data
@pytest.mark.parametrize("name", ["genomes/mgenitalium_g37.NC_000908.2.gbk.gz", "small/sarscov2.MN908947.gb.gz"])
def test_genbank_agrees_with_biopython_on_real_genomes(tmp_path, name):
    check_against_biopython(DATA / name, tmp_path / "out")


@needs_data
def test_a_header_with_a_second_mark_and_a_known_genome(tmp_path):
    store = TokenStore.open(
        prepare_genome([DATA / "genomes/mtuberculosis_h37rv.NC_000962.3.fa.gz"], tmp_path / "out")
    )
    assert store.total == 4_411_532 and len(store.names) == 1
    assert sum(store.manifest["counts"].values()) == store.total


# -- splits --------------------------------------------------------------------------------------------------------
def covered(store: TokenStore) -> np.ndarray:
    """How many splits each base is in."""
    times = np.zeros(store.total, int)
    for split in store.manifest["splits"]:
        for start, end in store.intervals(split):
            times[start:end] += 1
    return times


def test_blocks_by_hand(tmp_path):
    store = prepared(tmp_path, ">a\n" + "A" * 25 + "\n>b\n" + "C" * 95, block=10)
    # blocks of a: 0 (test) 1 (valid) 2, the last one short; of b: 3..12, of which 10 tests and 11 validates
    assert store.manifest["splits"] == {
        "train": [[0, 20, 25], [1, 0, 70], [1, 90, 95]],
        "valid": [[0, 10, 20], [1, 80, 90]],
        "test": [[0, 0, 10], [1, 70, 80]],
    }


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 400), min_size=1, max_size=5), st.none() | st.integers(1, 300))
def test_blocks_use_every_base_once(lengths, block):
    text = "".join(f">s{i}\n{'ACGT' * 100}"[: len(f">s{i}\n") + n] + "\n" for i, n in enumerate(lengths))
    with tempfile.TemporaryDirectory() as folder:
        fasta = write(Path(folder) / "in.fa", text)
        try:
            store = TokenStore.open(prepare_genome([fasta], Path(folder) / "out", block=block))
        except UserError as error:
            blocks = sum(-(-n // (block or 1)) for n in lengths)
            assert blocks < 3 and ("too few" in str(error) or "--block" in str(error))
            return
        assert (covered(store) == 1).all()
        sizes = [store.intervals(split).shape[0] for split in SPLITS]
        assert min(sizes) > 0


def test_a_small_genome_has_all_three_splits(tmp_path):
    store = prepared(tmp_path, ">phage\n" + bases(5386))
    share = {split: int(np.diff(store.intervals(split)).sum()) for split in SPLITS}
    assert share["test"] == 3 * 256 and share["valid"] == 2 * 256 + 10 and sum(share.values()) == 5386
    assert "blocks of 256 bases" in store.manifest["split_rule"]


def test_large_genomes_have_blocks_of_65536(tmp_path):
    store = prepared(tmp_path, ">a\n" + "ACGT" * 500_000)
    assert store.manifest["splits"]["test"][0] == [0, 0, 65_536]


@pytest.mark.parametrize("turn", [str, lambda text: text[::-1].translate(str.maketrans("ACGT", "TGCA"))], ids=["same", "rc"])
def test_a_sequence_on_both_sides_of_a_split_is_told(tmp_path, turn):
    same, other = bases(300, seed=1), "".join(sorted(bases(300, seed=1)))  # other: the same letters
    text = f">x\n{same}\n>y\n{turn(same).lower()}\n>z\n{other}\n>u\n{'ACGT' * 5}\n>v\n{'ACGT' * 5}\n"

    def pairs(name, **options):
        (tmp_path / name).mkdir()
        return prepared(tmp_path / name, text, **options).manifest["duplicates"]

    told = {"pairs": 1, "example": ["x", "y"]}
    assert pairs("names", valid=["z"], test=["y", "v"]) == told  # u and v are too short to say anything
    assert pairs("blocks", block=50) == told
    assert pairs("together", valid=["z"], test=["x", "y"]) == pairs("whole", whole="test") == {"pairs": 0, "example": []}
    bed = write(tmp_path / "s.bed", "x\t0\t300\ttrain\nz\t0\t300\ttest\n")  # y is in no split
    assert pairs("bed", splits=bed)["pairs"] == 0


def test_a_name_on_both_sides_is_told_before_anything_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(files.SourceFile, "__enter__", lambda source: pytest.fail(f"{source.path} was read"))
    with pytest.raises(UserError, match="'chr1' is in --valid and in --test"):
        prepared(tmp_path, ">chr1\nAAAA\n", valid=["chr1"], test=["chr1"])


def test_splits_by_name(tmp_path):
    text = ">chr1\nAAAA\n>chr2\nCCC\n>chr3\nGG\n"
    store = prepared(tmp_path, text, valid=["chr3"], test=["chr1"])
    assert store.manifest["splits"] == {"train": [[1, 0, 3]], "valid": [[2, 0, 2]], "test": [[0, 0, 4]]}
    store = prepared(tmp_path, text, test=["chr1"], overwrite=True)
    assert store.manifest["splits"]["valid"] == [] and len(store.intervals("valid")) == 0
    for options, message in (
        ({"valid": ["chr9"]}, "--valid chr9: no such sequence; did you mean 'chr"),
        ({"valid": ["chr1"], "test": ["chr1"]}, "'chr1' is in --valid and in --test"),
        ({"valid": ["chr1"], "test": ["chr2", "chr3"]}, "leave at least one to train on"),
        ({"valid": ["chr1"], "block": 3}, "--block"),
        ({"valid": ["chr1"], "splits": "x.bed"}, "not from both"),
        ({"block": 0}, "--block 0: must be 1 or more"),
        ({"min_length": 0}, "--min-length 0: must be 1 or more"),
    ):
        refuses(tmp_path, text, message, **options)
    refuses(tmp_path, ">a\n" + bases(90), "fewer than the 3 blocks", block=45)


def test_a_whole_genome_in_one_split(tmp_path):
    store = prepared(tmp_path, ">a\nACGT\n>b\n>c\nGG", whole="test")
    assert store.manifest["splits"] == {"train": [], "valid": [], "test": [[0, 0, 4], [1, 0, 2]]}
    for options in ({"whole": "tests"}, {"whole": "test", "block": 2}, {"whole": "test", "valid": ["a"]}):
        with pytest.raises(ValueError, match="whole must be one of train, valid, test and the only rule"):
            prepare_genome([tmp_path / "in.fa"], tmp_path / "other", **options)


def test_splits_from_a_bed_file(tmp_path):
    bed = write(
        tmp_path / "s.bed",
        "track name=x\n# a comment\nchr1\t10\t20\tvalid\textra\nchr1\t0\t10\ttrain\r\n\nchr2 0 5 test\nchr1\t20\t30\tvalid\n",
    )
    text = ">chr1\n" + "A" * 40 + "\n>chr2\n" + "C" * 10
    store = prepared(tmp_path, text, splits=bed)
    assert store.manifest["splits"] == {"train": [[0, 0, 10]], "valid": [[0, 10, 30]], "test": [[1, 0, 5]]}
    assert covered(store).tolist() == [1] * 30 + [0] * 10 + [1] * 5 + [0] * 5
    zipped = write(tmp_path / "s.bed.gz", gzip.compress(bed.read_bytes()))
    again = prepared(tmp_path, text, splits=zipped, overwrite=True)
    assert again.manifest["splits"] == store.manifest["splits"]


def test_rows_of_one_split_may_overlap(tmp_path):
    """As the published human intervals do; they were refused."""
    rng = np.random.default_rng(0)
    paint, rows = np.zeros((2, 400), int), []
    for split, chrom, low in ((1, 0, 0), (2, 0, 200), (3, 1, 0)):
        for start in rng.integers(low, low + 180, 9):
            end = start + rng.integers(1, 20)
            paint[chrom, start:end] = split
            rows.append(f"chr{chrom + 1}\t{start}\t{end}\t{('train', 'valid', 'test')[split - 1]}\n")
    bed = write(tmp_path / "s.bed", "".join(rng.permutation(rows)))
    store = prepared(tmp_path, ">chr1\n" + "A" * 400 + "\n>chr2\n" + "C" * 400, splits=bed)
    found = np.zeros((2, 400), int)
    for split, intervals in enumerate(store.manifest["splits"].values(), start=1):
        for (index, start, end), after in zip(intervals, [*intervals[1:], None]):
            assert after is None or after[0] > index or after[1] > end, "stretches that touch are one"
            found[index, start:end] += split
    assert np.array_equal(found, paint) and "27 rows, " in store.manifest["split_rule"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("chr1\t0\t10\ttrain\nchr3\t0\t5\ttest\n", "line 2: no sequence 'chr3' in the FASTA; did you mean 'chr"),
        ("chr1\t0\t41\ttrain\n", "line 1: end 41 is past the end of 'chr1' (40 bases)"),
        ("chr1\t0\t10\ttrain\nchr1\t20\t30\ttest\nchr1\t9\t12\tvalid\n", "lines 1 and 3 overlap in 'chr1'"),
        ("chr1\t0\t10\ttrain\nchr1\t0\t10\ttest\n", "lines 1 and 2 overlap"),
        ("chr1\t0\t30\ttrain\nchr1\t5\t9\ttrain\nchr1\t20\t25\tvalid\n", "lines 1 and 3 overlap in 'chr1' and are of two splits, train and valid"),
        ("chr1\t0\t10\ttrian\n", "line 1: split 'trian' is not one of train, valid, test; did you mean train?"),
        ("chr1\t0\t10\n", "line 1: 3 columns"),
        ("chr1\t0\tten\ttrain\n", "line 1: '0', 'ten': start and end must be whole numbers"),
        ("chr1\t-1\t10\ttrain\n", "whole numbers"),
        ("chr1\t1\u00b2\t10\ttrain\n", "whole numbers"),
        ("chr1\t10\t10\ttrain\n", "line 1: start 10 is not before end 10"),
        ("# only a comment\n", "holds no rows"),
        ("chr1\t0\t10\ttest\n", "nothing is left to train on"),
        ("", "is empty; give a BED file"),
    ],
)
def test_bad_bed_files_are_refused(tmp_path, rows, message):
    bed = write(tmp_path / "s.bed", rows)
    refuses(tmp_path, ">chr1\n" + "A" * 40 + "\n>chr2\n" + "C" * 10, message, splits=bed)


@settings(deadline=None, max_examples=100)
@given(
    st.binary(max_size=80)
    | st.lists(
        st.tuples(
            st.sampled_from(["a", "b", "c"]),
            st.integers(-2, 60),
            st.integers(-2, 60),
            st.sampled_from(["train", "valid", "test", "x"]),
        ),
        max_size=6,
    ).map(lambda rows: "\n".join("\t".join(map(str, row)) for row in rows).encode())
)
@example(b"\xff\xfea\x000\x00")
@example(b"\x1f\x8b\x08")
@example(b"a\t0\t10\ttrain\na\t5\t12\ttrain")
@example(b"a\t0\t10\ttrain\na\t5\t12\ttest")
def test_any_bed_file_is_used_rightly_or_refused_in_one_line(data):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bed = write(folder / "s.bed", data)
        fasta = write(folder / "in.fa", ">a\n" + "A" * 50 + "\n>b\n" + "C" * 20)
        try:
            store = TokenStore.open(prepare_genome([fasta], folder / "out", splits=bed))
        except UserError as error:
            assert "\n" not in str(error)
            assert sorted(p.name for p in folder.iterdir()) == ["in.fa", "s.bed"]
            return
        split_of = np.full(70, "", object)
        for row in data.decode().splitlines():
            chrom, start, end, split = row.split("\t")
            here = split_of[int(start) + 50 * (chrom == "b") : int(end) + 50 * (chrom == "b")]
            assert set(here) <= {"", split}  # rows of one split may overlap, those of two may not
            here[:] = split
        np.testing.assert_array_equal(covered(store), (split_of != "").astype(int))


# -- bad input -----------------------------------------------------------------------------------------------------
def refuses(folder: Path, content: bytes | str, message: str, name: str = "in.fa", **options) -> None:
    """The input is refused in one line that holds `message`, and nothing is left behind."""
    fasta = write(folder / name, content)
    before = sorted(folder.rglob("*"))
    with pytest.raises(UserError) as caught:
        prepare_genome([fasta], folder / "deep" / "er" / "out", **options)
    assert message in str(caught.value), str(caught.value)
    assert "\n" not in str(caught.value)
    assert sorted(folder.rglob("*")) == before


GENBANK = b"""
LOCUS       TEST1                     74 bp    DNA     linear   UNA 01-JAN-2000
DEFINITION  A record.
VERSION     TEST1.7  GI:1
FEATURES             Location/Qualifiers
     source          1..74
                     /note="ORIGIN of the //"
ORIGIN
        1 acgtacgtac ggttaaccnn acgtacgtac rcgtacgtac acgtacgtac acgtacgtac
       61 tttttttttt gggg
//
LOCUS       TEST2                     20 bp    DNA     circular UNA 01-JAN-2000
ORIGIN      
        1 ccccccccca aaaaaaaaac
//
"""
PROTEIN = ">sp|P69905|HBA_HUMAN Hemoglobin\nMVLSPADKTNVKAAWGKVGAHAGEYGAEALERMFLSFPTTKTYFPHFDLSHGSAQVKGHGKK\n"
TEXT = b">a\n" + b"ACGT" * 2000 + b"\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (gzip.compress(b""), "no sequence, only blanks"),
        (b" \n\n\t\n", "no sequence, only blanks"),
        (b">a\n>b\n", "no sequence; a FASTA file holds"),
        (b">a", "no sequence; a FASTA file holds"),
        (b">\nACGT\n", "record 1 has no name"),
        (b">a\nAC\n> \nGT\n", "record 2 has no name"),
        (b"ACGT\n>a\nACGT\n", "does not start with '>' but with 'ACGT'"),
        (b"chrom\tstart\n", "does not start with '>'"),
        (b"@read1\nACGT\n+\nIIII\n", "looks like FASTQ"),
        (b"ID   X56734; SV 1; linear\n", "looks like EMBL"),
        (GENBANK[:-4], "record 'TEST2' is cut short (no '//')"),
        (GENBANK.replace(b"//\nLOCUS", b"LOCUS"), "record 'TEST1.7' has no end ('//')"),
        (GENBANK.replace(b"ORIGIN\n        1 ac", b"CONTIG      join(X)\n        1 ac"), "record 'TEST1.7' has no sequence (ORIGIN)"),
        (b"LOCUS a\nLOCUS b\n", "record 'a' has no end"),
        (b"LOCUS a\nORIGIN\n1 acgt\n//\nand so on\n", "'and' is between two records"),
        (b"LOCUS a\nORIGIN\n" + b"a" * 70_000, "a line of more than 65,536 bytes"),
        (GENBANK + GENBANK, "sequence 'TEST1.7' is twice in"),
        (b"\x00\x01\x02\x03ELF", "is not a text file"),
        (b"\xff\xfe>\x00a\x00", "UTF-16"),
        (b">a\nAC\x00GT\n", "record 'a' has byte 0x00 at base 3"),
        (b">a\nACGT\nACGEACGTACGTACGT\n", "record 'a' has 'E' at base 8, which is no nucleotide code"),
        (b">a\n1 acgt\n", "has '1' at base 1"),
        (b">a\nAC\n>b\n" + b"GT\n" * 20 + b">c\nACGTACGTACGTACG\nT!\n>d\nA", "record 'c' has '!' at base 17,"),
        (b">a\nACGT>b\nACGT\n", "record 'a' has a '>' within a line of bases, after base 4"),
        (PROTEIN.encode(), "looks like protein: 24% of its letters are not nucleotide codes (E F L P Q)"),
        (b">a\nAC\n>b\nGG\n>a\nTT\n", "sequence 'a' is twice in"),
        (b">a\nAC\n", "2 bases: too few"),
        (b"BZh91AY", "is bzip2, which is not read; bunzip2 it first"),
        (b"\xfd7zXZ\x00", "is xz"),
        (b"\x28\xb5\x2f\xfd\x00", "is zstd"),
        (b"PK\x03\x04", "is a zip archive"),
        (b"\x1a\x41\x27\x43\x00", "is a .2bit file"),
        (gzip.compress(TEXT)[:-12], "cut short"),
        (gzip.compress(TEXT)[:9], "cut short"),
        (gzip.compress(TEXT)[:30] + b"\xff" * 20 + gzip.compress(TEXT)[50:], "is damaged"),
        (gzip.compress(TEXT)[:-8] + b"\0" * 8, "is damaged"),  # checksum
        (gzip.compress(TEXT) + b"rest", "something else after the gzip data"),
        (gzip.compress(TEXT) + b"\0" * 70_000 + b"rest", "something else after the gzip data"),
    ],
)
@pytest.mark.parametrize("hold", [1, 1 << 19])
def test_bad_files_are_refused_in_one_line(tmp_path, monkeypatch, content, message, hold):
    monkeypatch.setattr(genome._Writer, "HOLD", hold)
    refuses(tmp_path, content, message)


def test_a_bgzip_file_without_its_end_mark_is_cut_short(tmp_path):
    whole = bgzip(TEXT, tmp_path / "whole.gz", 1000)
    refuses(tmp_path, whole[:-28], "bgzip file is cut short")
    prepare_genome([tmp_path / "whole.gz"], tmp_path / "out")


def test_files_that_cannot_be_read(tmp_path):
    for path, message in (
        (tmp_path / "nowhere.fa", "no such file"),
        (tmp_path, "is a directory; give the files in it"),
        (tmp_path / "x\0y", "no such file"),
    ):
        with pytest.raises(UserError, match=message):
            prepare_genome([path], tmp_path / "out")
    with pytest.raises(UserError, match="no FASTA file given"):
        prepare_genome([], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read and write everything")
def test_permissions(tmp_path):
    fasta = write(tmp_path / "in.fa", ">a\nACGTACGT")
    fasta.chmod(0)
    with pytest.raises(UserError, match="cannot be read"):
        prepare_genome([fasta], tmp_path / "out")
    fasta.chmod(0o600)
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    for mode in (0o500, 0):
        locked.chmod(mode)
        with pytest.raises(UserError, match="cannot be written"):
            prepare_genome([fasta], locked / "out")


def test_a_name_that_the_system_refuses(tmp_path):
    fasta = write(tmp_path / "in.fa", ">a\nACGTACGT")
    with pytest.raises(UserError, match="cannot be written .File name too long"):
        prepare_genome([fasta], tmp_path / ("x" * 300))
    with pytest.raises(UserError, match="cannot be read .File name too long"):
        prepare_genome([tmp_path / ("x" * 300)], tmp_path / "out")
    with pytest.raises(UserError, match="cannot be written .Not a directory"):
        prepare_genome([fasta], fasta / "out")
    assert list(tmp_path.iterdir()) == [fasta]


def test_names_that_two_files_share(tmp_path):
    one, two = write(tmp_path / "1.fa", ">a\nAC"), write(tmp_path / "2.fa", ">b\nAC\n>a\nGT")
    with pytest.raises(UserError, match=r"'a' is in .*1\.fa and .*2\.fa; names must differ"):
        prepare_genome([one, two], tmp_path / "out")
    with pytest.raises(UserError, match="names must differ"):
        prepare_genome([one, one], tmp_path / "out")


def test_nothing_is_overwritten_unasked(tmp_path):
    fasta = write(tmp_path / "in.fa", ">a\n" + bases(100))
    out = prepare_genome([fasta], tmp_path / "out")
    first = (out / "manifest.json").read_bytes()
    with pytest.raises(UserError, match="exists; choose another directory or add --overwrite"):
        prepare_genome([fasta], out)
    write(fasta, ">b\n" + bases(200))
    bad = write(tmp_path / "bad.fa", "nothing")
    with pytest.raises(UserError):
        prepare_genome([bad], out, overwrite=True)
    assert (out / "manifest.json").read_bytes() == first  # a failed run leaves the old dataset
    prepare_genome([fasta], out, overwrite=True)
    assert TokenStore.open(out).names == ["b"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.fa", "in.fa", "out"]

    precious = tmp_path / "precious"
    precious.mkdir()
    write(precious / "thesis.txt", "text")
    with pytest.raises(UserError, match="is not a seqlab dataset, so --overwrite leaves it alone"):
        prepare_genome([fasta], precious, overwrite=True)
    with pytest.raises(UserError, match="is not a directory"):
        prepare_genome([fasta], fasta, overwrite=True)
    assert (precious / "thesis.txt").read_text() == "text"
    (tmp_path / "void").mkdir()
    prepare_genome([fasta], tmp_path / "void", overwrite=True)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_an_interrupted_run_leaves_nothing(tmp_path, error):
    fasta = write(tmp_path / "in.fa", ">a\n" + bases(100))

    def progress(done: int, total: int) -> None:
        if done == total:
            raise error

    with pytest.raises(error):
        prepare_genome([fasta], tmp_path / "new" / "out", progress=progress)
    assert list(tmp_path.iterdir()) == [fasta]


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(genome.os, "fsync", full)
    refuses(tmp_path, ">a\n" + bases(100), "the disk is full")


def test_a_write_that_fails_midway_is_one_line(tmp_path):
    """The operating system refuses to let the file grow past 1 MB."""
    write(tmp_path / "in.fa", ">a\n" + "ACGT" * 1_000_000)
    script = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20));"
        "from data_prep.genome import prepare_genome; from seqlab.errors import UserError\n"
        "try: prepare_genome([sys.argv[1]], sys.argv[2])\n"
        "except UserError as error: print(error); sys.exit(1)"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "in.fa", tmp_path / "out"],
        check=False,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1 and "cannot be written (File too large)" in result.stdout, result
    assert [p.name for p in tmp_path.iterdir()] == ["in.fa"]


@settings(deadline=None, max_examples=300)
@given(
    st.binary(max_size=200)
    | st.text(alphabet="ACGTacgtN>\r\n \tEx-*@;1", max_size=200).map(str.encode)
    | st.binary(max_size=60).map(lambda b: b">a\n" + b)
    | st.lists(st.sampled_from([*GENBANK.splitlines(), b"//", b"LOCUS a"]), max_size=9).map(b"\n".join)
    | st.tuples(st.binary(max_size=40), st.integers(0, 80)).map(lambda t: gzip.compress(b">a\nACGT\n" + t[0])[: t[1]])
    | st.tuples(st.integers(0, 60), st.integers(0, 255)).map(
        lambda t: (g := gzip.compress(b">a\nACGTTTACACGGATCACAG"))[: t[0]] + bytes([t[1]]) + g[t[0] + 1 :]
    ),
    st.integers(16, 64),
)
@example(b"\x1f\x8b", 16)
@example(b">", 16)
@example(b">\r", 16)
@example(b"LOCUS \nORIGIN", 16)
@example(b"LOCUS \nORIGIN\n//\n", 16)
def test_any_bytes_are_read_or_refused_in_one_line(data, read_size):
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "READ_SIZE", read_size)
        fasta = write(Path(name) / "in.fa", data)
        out = Path(name) / "new" / "out"
        try:
            store = TokenStore.open(prepare_genome([fasta], out))
        except UserError as error:
            assert "\n" not in str(error) and "\r" not in str(error)
            assert [p.name for p in Path(name).iterdir()] == ["in.fa"]
            return
        store.verify()
        assert sum(store.manifest["counts"].values()) == store.total
        assert [p.name for p in out.parent.iterdir()] == ["out"]


def test_memory_is_bounded(tmp_path, monkeypatch):
    """Sixteen megabases in one line, the case changing at every base: memory follows READ_SIZE, not the file."""
    monkeypatch.setattr(files, "READ_SIZE", 1 << 18)
    monkeypatch.setattr(genome._Writer, "HOLD", 1 << 17)
    fasta = write(tmp_path / "in.fa", b">a\n" + b"aC" * (8 << 20))
    tracemalloc.start()
    try:
        out = prepare_genome([fasta], tmp_path / "out")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 16 << 20, f"{peak / 2**20:.0f} MB for blocks of 0.25 MB"
    store = TokenStore.open(out)
    assert (store.total, store.manifest["soft_masked"], len(store.soft_masked)) == (16 << 20, 8 << 20, 8 << 20)


def test_the_manifest_is_readable_json(tmp_path):
    store = prepared(tmp_path, ">a \"quoted\" \u00e9\n" + bases(100) + "\n>\u00fc\u4e2d\n" + bases(50))
    text = (tmp_path / "out" / "manifest.json").read_text(encoding="utf-8")
    assert json.loads(text) == store.manifest
    assert len(text.splitlines()) < 60 and store.names == ["a", "\u00fc\u4e2d"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_has_come_to_lie_there_meanwhile_is_not_lost(tmp_path, overwrite):
    """Of two `prep` at the same time the second one to end replaced the first one's dataset, and any other folder too."""
    out = tmp_path / "data"
    with pytest.raises(UserError, match="data: (exists|is not a seqlab dataset)"):
        with files.output_directory(out, overwrite) as directory:
            (directory / "tokens.bin").write_bytes(b"x")
            out.mkdir()
            (out / "thesis.txt").write_text("years of work")
    assert (out / "thesis.txt").read_text() == "years of work" and [path.name for path in tmp_path.iterdir()] == ["data"]
