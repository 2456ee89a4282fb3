"""VCF text in and out: coordinates, alleles that are no sequence, and one clear line for what cannot be read."""

import gzip
from pathlib import Path

import numpy as np
import pytest

from data_prep.variants import Record, mismatch, read_genome, read_vcf
from seqlab.errors import UserError
from seqlab.tokenizers import nucleotide

COLUMNS = "#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO"
DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"


def write(path, *lines, head=("##fileformat=VCFv4.2", COLUMNS), end="\n"):
    path.write_bytes((end.join([*head, *lines]) + end).encode())
    return path


def records(path):
    return [item for item in read_vcf(path) if isinstance(item, Record)]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_positions_count_from_zero_and_only_plain_alleles_are_sequences(tmp_path, end):
    path = write(tmp_path / "x.vcf", "c\t1\t.\tA\tT\t.\t.\t.", "c\t5\tid\tac\tA,<DEL>,*,N,acg\t9\tPASS\tAC=1\tGT\t0/1", end=end)
    first, second = records(path)
    assert (first.chrom, first.start) == ("c", 0) and second.start == 4
    assert nucleotide.decode(second.ref) == "AC"
    assert [None if alt is None else nucleotide.decode(alt) for alt in second.alts] == ["A", None, None, None, "ACG"]
    assert first.line([-1.25]) == "c\t1\t.\tA\tT\t.\t.\tSEQLAB=-1.2500"
    assert second.line([0.5, None, None, None, 2]) == (
        "c\t5\tid\tac\tA,<DEL>,*,N,acg\t9\tPASS\tAC=1;SEQLAB=0.5000,.,.,.,2.0000\tGT\t0/1"
    )
    packed = tmp_path / "x.vcf.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert [r.fields for r in records(packed)] == [r.fields for r in records(path)]
    assert [item for item in read_vcf(path) if isinstance(item, str)] == ["##fileformat=VCFv4.2", COLUMNS]


def test_a_record_without_alt_stays_as_it_is(tmp_path):
    """It got "SEQLAB=", which is no INFO value."""
    text = "c\t5\t.\tA\t.\t.\t.\tDP=3\tGT\t0/0"
    (record,) = records(write(tmp_path / "x.vcf", text))
    assert record.alts == [] and record.line([]) == text


def test_an_ambiguity_code_of_the_genome_agrees_with_any_ref(tmp_path):
    (tmp_path / "g.fa").write_text(">c\nACMTAC\n")
    genome, _ = read_genome(tmp_path / "g.fa", {"c"})
    (record,) = records(write(tmp_path / "x.vcf", "c\t2\t.\tCA\tC\t.\t.\t."))
    assert mismatch(record, genome["c"]) is None
    (record,) = records(write(tmp_path / "x.vcf", "c\t5\t.\tACC\tA\t.\t.\t."))
    assert "the genome has AC there" in mismatch(record, genome["c"])


@pytest.mark.parametrize(
    "text, said",
    [
        ("", "is empty"),
        ("chr1\t5\tA\n", r"x.vcf: starts with 'chr1\\t5\\tA'; a VCF starts with ##fileformat=VCF"),
        ("##fileformat=VCFv4.2\nc\t1\t.\tA\tT\t.\t.\t.\n", "line 2: a record before the line of columns"),
        ("##fileformat=VCFv4.2\n", "no line of columns"),
        (f"##fileformat=VCFv4.2\n{COLUMNS}\nc 1 . A T . . .\n", "line 3: 1 columns"),
        (f"##fileformat=VCFv4.2\n{COLUMNS}\nc\tx\t.\tA\tT\t.\t.\t.\n", "line 3: POS is 'x'"),
        (f"##fileformat=VCFv4.2\n{COLUMNS}\nc\t0\t.\tA\tT\t.\t.\t.\n", "line 3: POS is '0'"),
        (f"##fileformat=VCFv4.2\n{COLUMNS}\nc\t{'9' * 5000}\t.\tA\tT\t.\t.\t.\n", "line 3: POS is '999"),
        (f"##fileformat=VCFv4.2\n##INFO=<ID=SEQLAB,Number=A>\n{COLUMNS}\n", "has INFO SEQLAB already"),
    ],
)
def test_wrong_files_are_one_line(text, said, tmp_path):
    (tmp_path / "x.vcf").write_text(text)
    with pytest.raises(UserError, match=said) as error:
        list(read_vcf(tmp_path / "x.vcf"))
    assert "\n" not in str(error.value)


def test_another_genome_is_noticed(tmp_path):
    (tmp_path / "g.fa").write_text(">c\nACGTAC\n>d\nGG\n")
    genome, _ = read_genome(tmp_path / "g.fa", {"c"})
    assert list(genome) == ["c"] and nucleotide.decode(genome["c"]) == "ACGTAC"
    with pytest.raises(UserError, match="has no sequence 'e', which the variants are on; it has 'c', 'd'"):
        read_genome(tmp_path / "g.fa", {"c", "e"})
    (tmp_path / "twice.fa").write_text(">c\nACGT\n>c\nGG\n")
    with pytest.raises(UserError, match="sequence 'c' is there twice"):
        read_genome(tmp_path / "twice.fa", {"c"})
    right, wrong, beyond, across = records(
        write(tmp_path / "x.vcf", *(f"c\t{at}\t.\t{ref}\tT\t.\t.\t." for at, ref in ((2, "CG"), (2, "A"), (7, "A"), (6, "CA"))))
    )
    assert mismatch(right, genome["c"]) is None
    for record, said in ((wrong, "c:2 has REF A, the genome has C"), (beyond, "its end (6 bases)"), (across, "c:6 has REF CA, the genome has C")):
        assert said in mismatch(record, genome["c"])


@pytest.mark.parametrize(
    "there, names, aliases, renamed",
    [
        (["20", "21", "MT"], {"chr20", "21", "chrM"}, {}, {"chr20": "20", "chrM": "MT"}),
        (["chr20", "chrX"], {"20", "X"}, {}, {"20": "chr20", "X": "chrX"}),
        (["MN908947"], {"MN908947.3"}, {}, {"MN908947.3": "MN908947"}),
        (["MN908947.3", "other"], {"MN908947", "x"}, {"x": "other"}, {"MN908947": "MN908947.3", "x": "other"}),
        (["NC_1.2", "NC_1.3"], {"NC_1.3"}, {}, {}),
        (["chr1", "1"], {"1", "chr1"}, {}, {}),
    ],
)
def test_a_sequence_may_have_another_name_in_the_genome(tmp_path, there, names, aliases, renamed):
    (tmp_path / "g.fa").write_text("".join(f">{name}\n{'ACGT' * (1 + i)}\n" for i, name in enumerate(there)))
    genome, found = read_genome(tmp_path / "g.fa", names, aliases)
    assert found == renamed and set(genome) == names
    for name in names:
        assert len(genome[name]) == 4 * (1 + there.index(renamed.get(name, name)))


@pytest.mark.parametrize(
    "there, names, aliases, said",
    [
        (["NC_1.2", "NC_1.3"], {"NC_1.4"}, {}, "no sequence 'NC_1.4', .* --alias NC_1.4=NAME"),  # which of the two?
        (["1"], {"chr1", "chr1.1"}, {}, "no sequence 'chr1'"),
        (["1"], {"1", "chr1"}, {}, "no sequence 'chr1'"),  # two names in one file are two sequences
        (["c"], {"x"}, {"x": "d"}, "no sequence 'd'"),
        (["c"], {"c"}, {"x": "c"}, "--alias x=c: no variant is on 'x'; there is 'c'"),
    ],
)
def test_names_that_could_be_several_sequences_are_not_guessed(tmp_path, there, names, aliases, said):
    (tmp_path / "g.fa").write_text("".join(f">{name}\nACGT\n" for name in there))
    with pytest.raises(UserError, match=said):
        read_genome(tmp_path / "g.fa", names, aliases)


def test_a_real_file_and_its_genome_agree():
    if not DATA.is_dir():
        pytest.skip("the folder shared/data is not here")
    path = DATA / "eukaryotes" / "human_b37_chr20_1M-2M.1kgp3.vcf.gz"
    found = records(path)
    genome = read_genome(DATA / "eukaryotes" / "human_b37_chr20_1M-2M.fa.gz", {"z"})[0]["z"]
    for record in found:
        assert mismatch(record, genome) is None
    assert len(found) == 28_998 and sum(any(alt is None for alt in r.alts) for r in found) == 24
    assert np.mean([len(r.ref) == 1 for r in found]) > 0.9
