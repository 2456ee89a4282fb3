"""Variant effects: by hand without tiles and padding, in any company, both strands, and the command end to end."""

import json

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from cli import app
from seqlab.inference.variants import MOST_MASKED, Variant, score_variants
from seqlab.model import ModelConfig, build_model
from seqlab.tokenizers import nucleotide

COMPLEMENT = torch.from_numpy(nucleotide.COMPLEMENT.astype(np.int64))
MODELS = {
    "causal": dict(direction="causal", strand="single"),
    "causal, both strands": dict(direction="causal", strand="augment"),
    "bidirectional": dict(direction="bidirectional", strand="single"),
    "bidirectional, both strands": dict(direction="bidirectional", strand="augment"),
    "equivariant": dict(direction="bidirectional", strand="equivariant"),
}
CONTEXT = 70


def make(name):
    torch.manual_seed(0)
    model = build_model(ModelConfig(d_model=16, n_layer=2, d_state=4, **MODELS[name]), COMPLEMENT).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def ids(text):
    return np.array(nucleotide.encode(text), np.uint8)


GENOME = "".join(np.random.default_rng(1).choice(list("ACGT"), 300))


def variant(start, length, *alts, genome=GENOME):
    return Variant(ids(genome), start, ids(genome[start : start + length]), [None if a is None else ids(a) for a in alts])


def by_hand(model, name, start, length, alt, genome=GENOME, context=CONTEXT):
    """No tiles, no padding, text in the place of arrays: the windows as the documentation has them."""
    before = min(start, (context - length) // 2)
    left, right = genome[start - before : start], genome[start + length : start + length + context - length - before]

    def log_p(symbols):
        with torch.no_grad():
            logits = model(torch.from_numpy(symbols)[None].long(), return_state=False)[0][0]
        return logits

    if name.startswith("causal"):
        sums = []
        for allele in (genome[start : start + length], alt):
            window, total = left + allele + right, []
            for text in (window, "".join("TGCA"["ACGT".index(c)] for c in reversed(window)))[: 1 + ("both" in name)]:
                table = log_p(ids(text))[:-1, 7:11].double().log_softmax(-1)
                total.append(sum(table[t, "ACGT".index(c)].item() for t, c in enumerate(text[1:])))
            sums.append(np.mean(total))
        return sums[1] - sums[0]
    symbols = np.concatenate([ids(left), np.full(length, nucleotide.MASK, np.uint8), ids(right)])
    table = log_p(symbols).double()
    if "both" in name:
        back = log_p(nucleotide.COMPLEMENT[symbols][::-1].copy()).double().log_softmax(-1).flip(0)[:, COMPLEMENT]
        table = 0.5 * (table.log_softmax(-1) + back)
    table = table[:, 7:11].log_softmax(-1)[before : before + length]
    ref = genome[start : start + length]
    return sum((table[i, "ACGT".index(alt[i])] - table[i, "ACGT".index(ref[i])]).item() for i in range(length))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("start, length, alt", [(150, 1, "A"), (150, 1, "C"), (0, 1, "T"), (299, 1, "G"), (3, 1, "G"), (120, 4, "TTAC")])
def test_substitutions_by_hand(name, start, length, alt):
    model = make(name)
    ((got,),) = score_variants(model, [variant(start, length, alt)], context=CONTEXT)
    assert got == pytest.approx(by_hand(model, name, start, length, alt), abs=2e-5)
    if alt == GENOME[start : start + length]:
        assert got == 0


@pytest.mark.parametrize("name", ["causal", "causal, both strands"])
@pytest.mark.parametrize("length, alt", [(1, "ACCGT"), (6, "A"), (3, "TTTTTTT")])
def test_insertions_and_deletions_by_hand(name, length, alt):
    model = make(name)
    ((got,),) = score_variants(model, [variant(100, length, alt)], context=CONTEXT)
    assert got == pytest.approx(by_hand(model, name, 100, length, alt), abs=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_company_and_order_change_no_score(name):
    model, rng = make(name), np.random.default_rng(3)
    some = [variant(int(rng.integers(0, 290)), int(rng.integers(1, 4)), *rng.choice(["A", "C", "GT", "TTAAG"], 2)) for _ in range(40)]
    alone = [next(score_variants(model, [v], context=CONTEXT)) for v in some]
    assert list(score_variants(model, some, context=CONTEXT)) == alone
    assert list(score_variants(model, some[::-1], context=CONTEXT, together=7)) == alone[::-1]
    assert len({score for scores in alone for score in scores}) > 10


def test_what_cannot_be_scored_has_no_score_and_harms_no_other():
    text = GENOME[:100] + "N" + GENOME[101:]
    some = [variant(100, 1, "A", genome=text), variant(50, 1, None, "G"), variant(60, 1), variant(50, 2, "A")]
    some.append(variant(50, MOST_MASKED + 1, "A" * (MOST_MASKED + 1)))
    for name in ("causal", "bidirectional"):
        model = make(name)
        no, mixed, nothing, shorter, long = score_variants(model, some, context=CONTEXT)
        assert no == [None] and nothing == [] and mixed[0] is None
        assert mixed[1] == next(score_variants(model, [variant(50, 1, "G")], context=CONTEXT))[0]
        assert (shorter == [None]) == (long == [None]) == (name == "bidirectional")
    assert list(score_variants(make("causal"), [], context=CONTEXT)) == []


def test_a_model_that_reads_both_strands_scores_a_variant_alike_on_both():
    other = "".join("TGCA"["ACGT".index(c)] for c in reversed(GENOME))
    for name in ("causal, both strands", "bidirectional, both strands", "equivariant"):
        model = make(name)
        # an odd window has its middle in the middle
        ((one,),) = score_variants(model, [variant(150, 1, "A")], context=71)
        ((two,),) = score_variants(model, [variant(149, 1, "T", genome=other)], context=71)
        assert one == pytest.approx(two, abs=2e-5) and (one != 0 or GENOME[150] == "A")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU here")
@pytest.mark.parametrize("name", MODELS)
def test_the_gpu_gives_the_same_scores_in_any_company(name):
    model, rng = make(name), np.random.default_rng(3)
    some = [variant(int(rng.integers(0, 290)), int(rng.integers(1, 4)), *rng.choice(["A", "C", "GT", "TTAAG"], 2)) for _ in range(40)]
    expected = list(score_variants(model, some, context=CONTEXT))
    options = dict(context=CONTEXT, device="cuda")
    exact = list(score_variants(model, some, **options))
    for got, wanted in zip(exact, expected, strict=True):
        assert got == pytest.approx(wanted, abs=1e-3)
    options["precision"] = "bfloat16"
    half = [next(score_variants(model, [v], **options)) for v in some]
    assert list(score_variants(model, some, **options)) == half and half != exact
    assert list(score_variants(model, some[::-1], together=7, **options)) == half[::-1]


# -- the command ---------------------------------------------------------------------------------------------------
def call(*arguments, code=0):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, (result.stdout, result.stderr)
    return result


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("variants")
    (folder / "g.fa").write_text(f">chr\n{GENOME * 12}\n")
    toy = ["model.d_model=16", "model.n_layer=1", "model.d_state=4", "train.tokens_per_step=512", "train.accelerator=cpu"]
    toy += ["eval.max_order=1", "eval.max_bases=1000"]
    call("train", "dna", "--fasta", folder / "g.fa", "--context", 64, "--max-steps", 2, *(w for t in toy for w in ("--set", t)),
         "--out", folder / "run")  # fmt: skip
    lines = ["##fileformat=VCFv4.2", "#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO"]
    lines += [f"chr\t{at}\t.\t{GENOME[at - 1]}\t{alt}\t.\t.\t{info}" for at, alt, info in ((1, "A,T", "."), (40, "<DEL>", "X=1"), (90, "GG", "."))]
    (folder / "v.vcf").write_text("\n".join(lines) + "\n")
    return folder


def test_the_command_adds_a_score_and_changes_nothing_else(folder, tmp_path):
    result = call("score", folder / "run", folder / "v.vcf", "--fasta", folder / "g.fa")
    before, after = (folder / "v.vcf").read_text().splitlines(), result.stdout.splitlines()
    assert after[1].startswith("##INFO=<ID=SEQLAB,Number=A,Type=Float,") and "windows of 64 bases" in after[1]
    assert [after[0], after[2]] == before[:2] and len(after) == 6
    for old, new in zip(before[2:], after[3:]):
        assert old.split("\t")[:7] == new.split("\t")[:7]
    assert after[4].endswith("X=1;SEQLAB=.") and "3 of 4 alleles of 3 variants scored" in result.stderr
    many = before[:2] + before[2:] * 700  # more than is held at a time
    (tmp_path / "many.vcf").write_text("\n".join(many) + "\n")
    found = call("score", folder / "run", tmp_path / "many.vcf", "--fasta", folder / "g.fa").stdout.splitlines()
    assert found == after[:3] + after[3:] * 700
    call("score", folder / "run", folder / "v.vcf", "--fasta", folder / "g.fa", "--out", tmp_path / "s.vcf", "--json", tmp_path / "s.json")
    assert (tmp_path / "s.vcf").read_text().splitlines() == after
    assert json.loads((tmp_path / "s.json").read_text())["scored"] == 3


def test_variants_of_another_reference_can_be_left_without_a_score(folder, tmp_path):
    """As in public files: a few REF are the other strand's (celegans_1pct.variants has 10 of 8,713)."""
    lines = (folder / "v.vcf").read_text().splitlines()
    wrong = str.maketrans("ACGT", "TGCA")[ord(GENOME[49])]
    lines.insert(3, f"chr\t50\tother\t{chr(wrong)}\t{GENOME[49]},A\t.\t.\t.")
    (tmp_path / "w.vcf").write_text("\n".join(lines) + "\n")
    arguments = ("score", folder / "run", tmp_path / "w.vcf", "--fasta", folder / "g.fa")
    stopped = call(*arguments, code=1)
    assert f"1 of 4 variants have another REF than the genome, the first: chr:50 has REF {chr(wrong)}, the genome has {GENOME[49]}" in stopped.stderr
    assert "--skip-mismatches" in stopped.stderr and stopped.stdout == ""
    found = call(*arguments, "--skip-mismatches", "--json", tmp_path / "w.json")
    after = found.stdout.splitlines()
    assert after.pop(4) == lines[3].removesuffix(".") + "SEQLAB=.,."
    assert after == call("score", folder / "run", folder / "v.vcf", "--fasta", folder / "g.fa").stdout.splitlines()
    summary = json.loads((tmp_path / "w.json").read_text())
    assert (summary["variants"], summary["alleles"], summary["scored"], summary["mismatches"]) == (4, 6, 3, 1)
    (tmp_path / "other.fa").write_text(">chr\n" + "N" * 300 + "\n")  # another genome altogether: nothing to skip
    assert "of 3 variants have another REF" in call(*arguments[:2], folder / "v.vcf", "--fasta", tmp_path / "other.fa", "--skip-mismatches", code=1).stderr


def test_wrong_input_is_one_line_and_leaves_nothing(folder, tmp_path):
    (tmp_path / "other.fa").write_text(">chr\n" + "A" * 300 + "\n")
    (tmp_path / "text").write_text("hello\n")
    (tmp_path / "none.vcf").write_text("\n".join((folder / "v.vcf").read_text().splitlines()[:2]) + "\n")
    before = {p.name for p in tmp_path.iterdir()}
    run, vcf, fasta = folder / "run", folder / "v.vcf", ("--fasta", folder / "g.fa")
    for arguments, expected in (
        ([tmp_path / "no", vcf, *fasta], "no such run"),
        ([run, tmp_path / "no.vcf", *fasta], "no such file"),
        ([run, folder, *fasta], "is a directory; give a VCF file"),
        ([run, tmp_path / "text", *fasta], "a VCF starts with"),
        ([run, tmp_path / "none.vcf", *fasta], "holds no variant"),
        ([run, vcf, "--fasta", tmp_path / "no.fa"], "no such file"),
        ([run, vcf, "--fasta", tmp_path / "other.fa"], "the genome has"),
        ([run, vcf, *fasta, "--context", "x"], "--context x: expected a whole number"),
        ([run, vcf, *fasta, "--out", tmp_path / "o.vcf.gz"], "bgzip"),
        ([run, vcf, *fasta, "--out", tmp_path / "text"], "exists"),
        ([run, vcf, *fasta, "--json", "-"], "standard output is taken"),
    ):
        stderr = call("score", *arguments, code=1).stderr
        errors = [line for line in stderr.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and expected in errors[0] and "unexpected" not in stderr, stderr
    assert {p.name for p in tmp_path.iterdir()} == before
