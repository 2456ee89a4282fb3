"""Records down a pipe: every way to write FASTA and FASTQ, any block size, and one clear line for what is neither."""

import gzip
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import data_prep.files
from data_prep.records import read_records
from seqlab.errors import UserError
from seqlab.tokenizers import nucleotide


def read(path):
    return [(name, nucleotide.decode(ids)) for name, ids in read_records(path)]


def test_fasta_in_all_its_forms(tmp_path):
    path = tmp_path / "x.fa"
    path.write_bytes(b"\n  >a one > two\r\nAC\r\ngt\r\n\r\n>b\nNNR-\n>c\n>d\nA C\tG")
    assert read(path) == [("a", "ACGT"), ("b", "NNNN"), ("c", ""), ("d", "ACG")]
    with gzip.open(tmp_path / "x.fa.gz", "wb") as file:
        file.write(path.read_bytes())
    assert read(tmp_path / "x.fa.gz") == read(path)


def test_fastq(tmp_path):
    path = tmp_path / "x.fq"
    path.write_text("@r1 x\nACGT\n+\nIII>\n@r2\nNN\n+r2\n@@\n")
    assert read(path) == [("r1", "ACGT"), ("r2", "NN")]


GENBANK = b"LOCUS       ONE 12 bp\nVERSION     ONE.2\nFEATURES\nORIGIN\n        1 acgtacgtac gn\n//\n\nLOCUS       TWO\nORIGIN\n        1 ttt\n//\n"


@pytest.mark.parametrize("block", [1, 7, 1 << 20])
def test_genbank(tmp_path, monkeypatch, block):
    monkeypatch.setattr(data_prep.files, "READ_SIZE", block)
    (tmp_path / "x.gb").write_bytes(b"\n" + GENBANK)
    assert read(tmp_path / "x.gb") == [("ONE.2", "ACGTACGTACGN"), ("TWO", "TTT")]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.text("xyz1", min_size=1, max_size=9), st.text("ACGTN", max_size=40)), min_size=1, max_size=8),
    st.integers(1, 15), st.integers(1, 30), st.sampled_from(["\n", "\r\n"]),
)
def test_blocks_of_any_size_give_the_same_records(tmp_path_factory, records, width, block, newline):
    path = tmp_path_factory.mktemp("records") / "x.fa"
    text = ""
    for name, letters in records:
        text += f">{name}{newline}" + "".join(letters[i : i + width] + newline for i in range(0, len(letters), width))
    path.write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data_prep.files, "READ_SIZE", block)
        assert read(path) == records


@pytest.mark.parametrize("text,said", [
    (b"", "is empty"),
    (b"\n \n", "only blanks"),
    (b"ACGT\n", "starts with 'ACGT'"),
    (b">p\nMKLV\n", "record 'p' has 'L' at base 3"),
    (b"@r\nACGT\n+\nII\n", "FASTQ record 1"),
    (b"@r\nACGT\n", "FASTQ record 1"),
    (b"BZh91AY", "bzip2"),
    (b"LOCUS       A\nORIGIN\n   1 acgt\n", "record 'A' is cut short"),
    (b"LOCUS       A\nORIGIN\n   1 acel\n//\n", "record 'A' has 'E' at base 3"),
])
def test_what_is_neither_is_one_clear_line(tmp_path, text, said):
    path = tmp_path / "x"
    path.write_bytes(text)
    with pytest.raises(UserError, match=said):
        list(read_records(path))


def test_memory_holds_one_record(tmp_path):
    path = tmp_path / "x.fa"
    path.write_text(">a\n" + "ACGT\n" * 10 + ">b\nL\n")
    records = read_records(path)
    name, ids = next(records)  # the fault of b is found only when b is asked for
    assert name == "a" and len(ids) == 40 and ids.dtype == np.uint8
    with pytest.raises(UserError, match="record 'b'"):
        next(records)


def test_what_is_wrong_with_standard_input_names_it(tmp_path):
    """It was "/dev/stdin: is empty", of a user who had typed -."""
    command = "import sys; from data_prep.records import read_records\ntry: list(read_records('-'))\nexcept Exception as error: print(error)"
    for piped, said in [(b"", "standard input: is empty"), (gzip.compress(b">a\nACGT\n")[:-9], "standard input: the gzip file is cut short")]:
        done = subprocess.run([sys.executable, "-c", command], input=piped, capture_output=True, check=True)
        assert done.stdout.decode().startswith(said)
