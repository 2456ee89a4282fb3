"""Embeddings: by hand, in pieces and in company, of both strands, from the command."""

import json

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from cli import app
from seqlab.classifier import ClassifierConfig, SequenceClassifier
from seqlab.inference.classify import Predictor
from seqlab.inference.embed import MeanFeatures, embed_records
from seqlab.model import ModelConfig, build_model, language_model
from seqlab.tokenizers import nucleotide

SMALL = dict(d_model=16, n_layer=2, d_state=4)
COMPLEMENT = torch.from_numpy(nucleotide.COMPLEMENT.astype(np.int64))
MODELS = {
    "causal": lambda: build_model(ModelConfig(**SMALL)),
    "causal, both strands": lambda: build_model(ModelConfig(**SMALL, strand="augment")),
    "bidirectional": lambda: build_model(ModelConfig(**SMALL, direction="bidirectional", strand="augment")),
    "equivariant": lambda: build_model(ModelConfig(**SMALL, direction="bidirectional", strand="equivariant"), COMPLEMENT),
    "classifier": lambda: SequenceClassifier(ClassifierConfig(**SMALL, strand="average", pooling="mean", kmer=3, period=3), 3),
    "classifier, one strand": lambda: SequenceClassifier(ClassifierConfig(**SMALL, strand="none", pooling="last"), 3),
}
BOTH = [name for name in MODELS if "one strand" not in name and name != "causal"]


def make(name):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def sequence(length, seed=0, symbols="ACGTN"):
    rng = np.random.default_rng(seed)
    letters = rng.choice(list(symbols), length).tolist()
    return np.array(nucleotide.encode("".join(letters)), np.uint8)


@pytest.mark.parametrize("name", MODELS)
def test_the_mean_of_the_features_by_hand(name):
    model, ids = make(name), sequence(70)
    (_, got, length), = embed_records(model, [("x", ids)])
    reads = [ids, nucleotide.reverse_complement(ids)] if name in BOTH else [ids]
    expected = []
    for read in reads:
        batch = torch.from_numpy(np.ascontiguousarray(read))[None]
        with torch.no_grad():
            inner = model if isinstance(model, SequenceClassifier) else language_model(model)
            y = inner.features(batch).value if isinstance(inner, SequenceClassifier) else inner.read(batch)[0]
        rows = [y[0, t].double() for t in range(len(read)) if read[t] in nucleotide.BASES]
        expected.append(sum(rows) / len(rows))
    np.testing.assert_allclose(got, torch.stack(expected).mean(0).numpy(), atol=2e-6)
    assert length == 70 and got.dtype == np.float32 and got.shape == (16,)


@pytest.mark.parametrize("name", MODELS)
def test_pieces_company_and_order_change_nothing(name):
    model = make(name)
    records = [(str(i), sequence(n, i)) for i, n in enumerate((1, 64, 65, 200, 3, 130))]
    alone = {name: vector for record in records for name, vector, _ in embed_records(model, [record])}
    for found in (embed_records(model, records), embed_records(model, records[::-1], batch_size=4)):
        for name_of, vector, _ in found:
            np.testing.assert_array_equal(vector, alone[name_of])
    if name not in ("bidirectional", "equivariant"):  # those read each piece for itself
        long = sequence(500, 9)
        whole, cut = (Predictor(MeanFeatures(model), piece=piece).batch([long])[0] for piece in (1000, 96))
        np.testing.assert_allclose(cut, whole, atol=2e-6)


@pytest.mark.parametrize("name", BOTH)
def test_both_strands_have_one_vector(name):
    model, ids = make(name), sequence(90, 4)
    (_, here, _), (_, there, _) = embed_records(model, [("a", ids), ("b", nucleotide.reverse_complement(ids))])
    np.testing.assert_allclose(here, there, atol=1e-6)
    assert np.abs(here - next(embed_records(model, [("c", sequence(90, 5))]))[1]).max() > 1e-3


def test_what_is_unknown_is_not_counted_and_nothing_known_is_nan():
    model = make("causal")
    (_, nothing, _), (_, empty, _) = embed_records(model, [("n", sequence(40, symbols="N")), ("e", sequence(0))])
    assert np.isnan(nothing).all() and np.isnan(empty).all()
    ids = sequence(40, symbols="ACGT")
    (_, a, _), (_, b, _) = embed_records(model, [("a", ids), ("b", np.concatenate([ids, sequence(9, symbols="N")]))])
    np.testing.assert_allclose(a, b, atol=1e-6)  # causal: what follows changes no feature before it


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU here")
@pytest.mark.parametrize("name", MODELS)
def test_the_gpu_gives_the_same_vectors_in_any_company(name):
    model = make(name)
    records = [(str(i), sequence(n, i)) for i, n in enumerate((1, 64, 65, 200, 3, 130, 3000))]
    expected = [vector for _, vector, _ in embed_records(model, records)]
    for (_, vector, _), wanted in zip(embed_records(model, records, device="cuda", precision="float32"), expected, strict=True):
        np.testing.assert_allclose(vector, wanted, atol=1e-4)
    together = [vector for _, vector, _ in embed_records(model, records, device="cuda")]
    for record, vector in zip(records, together, strict=True):
        ((_, alone, _),) = embed_records(model, [record], device="cuda", batch_size=1)
        np.testing.assert_array_equal(alone, vector)


# -- the command ---------------------------------------------------------------------------------------------------
def call(*arguments, code=0):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, (result.stdout, result.stderr)
    return result


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    letters = "".join(np.random.default_rng(0).choice(list("ACGT"), 4000))
    (folder / "g.fa").write_text(f">chr\n{letters}\n")
    toy = ["model.d_model=16", "model.n_layer=1", "model.d_state=4", "train.tokens_per_step=512", "train.accelerator=cpu"]
    toy += ["eval.max_order=1", "eval.max_bases=1000"]
    call("train", "dna", "--fasta", folder / "g.fa", "--context", 64, "--max-steps", 1, *(w for t in toy for w in ("--set", t)),
         "--out", folder / "run")  # fmt: skip
    return folder / "run"


def test_the_command_writes_tsv_and_npz(run, tmp_path):
    (tmp_path / "x.fa").write_text(">a one\nACGTACGT\n>b\nNNNN\n>c\nGGGCCCATAT\n")
    stdout = call("embed", run, tmp_path / "x.fa").stdout
    rows = [line.split("\t") for line in stdout.splitlines()]
    assert rows[0] == ["name", *(f"e{i}" for i in range(16)), "length"]
    assert [row[0] for row in rows[1:]] == ["a", "b", "c"] and rows[2][1:17] == ["nan"] * 16 and rows[3][-1] == "10"
    call("embed", run, tmp_path / "x.fa", "--out", tmp_path / "new" / "x.npz", "--json", tmp_path / "x.json")
    with np.load(tmp_path / "new" / "x.npz") as found:
        assert found["names"].tolist() == ["a", "b", "c"] and found["lengths"].tolist() == [8, 4, 10]
        np.testing.assert_allclose(found["embeddings"][2], [float(v) for v in rows[3][1:-1]], rtol=1e-5)
    assert json.loads((tmp_path / "x.json").read_text())["bases"] == 22


def test_wrong_input_is_one_line_and_leaves_nothing(run, tmp_path):
    (tmp_path / "x.fa").write_text(">a\nACGT\n")
    (tmp_path / "protein.fa").write_text(">a\nACGT\n>p\nMKVL\n")
    (tmp_path / "there.tsv").write_text("")
    (tmp_path / "sound").mkdir()
    (tmp_path / "sound" / "model.safetensors").write_bytes(b"")
    (tmp_path / "sound" / "config.yaml").write_text("task: poetry\n")
    before = {p.name for p in tmp_path.iterdir()}
    for arguments, expected in (
        ([tmp_path / "none", tmp_path / "x.fa"], "no such run"),
        ([tmp_path / "sound", tmp_path / "x.fa"], "task: poetry: unknown"),
        ([run, tmp_path / "none.fa"], "no such file"),
        ([run, tmp_path / "protein.fa", "--out", tmp_path / "o.npz"], "no nucleotide code"),
        ([run, tmp_path / "protein.fa", "--out", tmp_path / "o.tsv"], "no nucleotide code"),
        ([run, tmp_path / "x.fa", "--out", tmp_path / "o.csv"], "ends in .npz or .tsv"),
        ([run, tmp_path / "x.fa", "--out", tmp_path / "there.tsv"], "exists"),
        ([run, tmp_path / "x.fa", "--out", tmp_path / "x.fa" / "o.npz"], "is not a directory"),
        ([run, tmp_path / "x.fa", "--batch-size", 0], "must be 1 or more"),
        ([run, tmp_path / "x.fa", "--json", "-"], "standard output is taken"),
    ):
        stderr = call("embed", *arguments, code=1).stderr
        errors = [line for line in stderr.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and expected in errors[0] and "unexpected" not in stderr, stderr
    assert {p.name for p in tmp_path.iterdir()} == before
