"""The classification task and its commands: batches, weights, losses, toy training of every kind, seeds, reports, bad input."""

import csv
import dataclasses
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from typer.testing import CliRunner

from cli import app, load_config, presets
from seqlab.classification.dataset import LabelledStore
from seqlab.errors import UserError
from seqlab.tokenizers import nucleotide
from seqlab.training import fit as fit_module
from seqlab.training.facts import FitResult
from tasks import classification, runs
from tasks.classification import ClassificationTask, Config, interpret

SIZE = ["--set", "model.d_model=16", "--set", "model.n_layer=1", "--set", "model.d_state=4", "--set", "train.accelerator=cpu"]
QUICK = ["--set", "min_steps=0", "--set", "eval.max_k=2", "--set", "eval.baselines=[k-mers]", "--set", "train.ema_decay=0"]


def run(*arguments, code=0):
    """Invoke the command; (stdout, stderr). One line of error and no traceback where code is 1."""
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, f"{arguments}\n{result.stdout}\n{result.stderr}\n{result.exception!r}"
    if code == 1:
        assert sum(line.startswith("error: ") for line in result.stderr.splitlines()) == 1, result.stderr
        assert "Traceback" not in result.stderr and "unexpected" not in result.stderr, result.stderr
    return result.stdout, result.stderr


def error_of(*arguments):
    return next(line for line in run(*arguments, code=1)[1].splitlines() if line.startswith("error: "))


def write(path, kind="binary", n=150, seed=0, low=24, high=40):
    """Sequences rich in A and T, or in G and C; what that means depends on the kind."""
    rng = np.random.default_rng(seed)
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["sequence", "label"])
        for i in range(n):
            share = (0.2, 0.8, 0.5)[i % 3] if kind == "multi-class" else (0.2, 0.8)[i % 2]
            p = [(1 - share) / 2, share / 2, share / 2, (1 - share) / 2]
            text = "".join(rng.choice(list("ACGT"), rng.integers(low, high), p=p))
            label = {
                "binary": ("lean", "rich")[i % 2],
                "multi-class": ("lean", "rich", "even")[i % 3],
                "multi-label": ("at;dna", "gc;dna")[i % 2],
                "regression": f"{3 + 2 * sum(c in 'GC' for c in text) / len(text):.4f}",
            }[kind]
            writer.writerow([text, label])
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """One dataset of every kind, prepared by the command."""
    folder = tmp_path_factory.mktemp("labelled")
    for kind in ("binary", "multi-class", "multi-label", "regression"):
        extra = ["--label-separator", ";"] if kind == "multi-label" else []
        stdout, stderr = run("prep", "labelled", write(folder / f"{kind}.csv", kind), "--out", folder / kind, *extra)
        assert kind in stdout and "train classify --data" in stderr
        (told,) = (line for line in stderr.splitlines() if " bases" in line and "ambiguity" in line)
        assert ("median" in told) == (" to " in told)  # of sequences as long as each other: their length, once
    return folder


@pytest.fixture(scope="module")
def trained(data):
    """Two seeds of the binary set, by the command."""
    stdout, stderr = run(
        "train", "classify", "--data", data / "binary", "--out", data / "run", "--seeds", 2, "--epochs", 12, "--set", "min_steps=0", "--set",
        "optim.lr=0.02", "--set", "data.batch_size=32", *SIZE, "--set", "eval.max_k=2", "--set", "train.ema_decay=0",
        "--set", "eval.baseline_seeds=1",
    )  # fmt: skip
    assert "k-mers" in stdout and "small CNN" in stdout and "chance" in stdout
    return data / "run"


def toy(**changes) -> Config:
    model = dataclasses.replace(Config().model, d_model=16, n_layer=1, d_state=4, direction="bidirectional")
    return dataclasses.replace(Config(), **{"model": model, **changes})


# -- the task ------------------------------------------------------------------------------------------------------
def test_batches_are_functions_of_the_step_and_each_epoch_sees_every_sequence_once(data):
    store = LabelledStore.open(data / "binary")
    config = toy(data=classification.DataConfig(batch_size=16))
    task, again = ClassificationTask(config, store), ClassificationTask(config, store)
    n = len(task.train_rows)
    rows = np.concatenate([task.step_rows(step) for step in range(-(-2 * n // 16))])
    for epoch in range(2):
        assert sorted(rows[epoch * n : (epoch + 1) * n]) == sorted(task.train_rows)
    assert not np.array_equal(rows[:n], rows[n : 2 * n])
    a, b = task.train_batches(5, 0, 1)[0], again.train_batches(5, 0, 1)[0]
    assert all(torch.equal(a[key], b[key]) for key in a)
    halves = [task.train_batches(5, rank, 2)[0]["row"] for rank in (0, 1)]
    assert torch.equal(torch.cat(halves), a["row"])


def test_splits_are_disjoint_and_differ_by_seed(data):
    store = LabelledStore.open(data / "binary")
    tasks = [ClassificationTask(toy(train=dataclasses.replace(Config().train, seed=s)), store) for s in (0, 1)]
    for task in tasks:
        assert not set(task.train_rows) & set(task.valid_rows)
        assert not set(store.rows("test")) & (set(task.train_rows) | set(task.valid_rows))
    assert set(tasks[0].valid_rows) != set(tasks[1].valid_rows)


def test_augmented_batches_hold_reverse_complements(data):
    store = LabelledStore.open(data / "binary")
    model = dataclasses.replace(toy().model, strand="augment")
    task = ClassificationTask(toy(model=model), store)
    batch = task.train_batches(0, 0, 1)[0]
    turned = 0
    for ids, mask, row in zip(batch["ids"].numpy(), batch["mask"].numpy(), batch["row"].numpy()):
        own = store.sequence(row)
        assert mask.sum() == len(own) and (ids[~mask] == nucleotide.PAD).all()
        is_reverse = np.array_equal(ids[mask], nucleotide.reverse_complement(own))
        assert is_reverse or np.array_equal(ids[mask], own)
        turned += is_reverse
    assert 15 < turned < 50  # of 64
    none = ClassificationTask(toy(model=dataclasses.replace(model, strand="none")), store).train_batches(0, 0, 1)[0]
    assert all(np.array_equal(i[m], store.sequence(r)) for i, m, r in zip(none["ids"].numpy(), none["mask"].numpy(), none["row"].numpy()))


@pytest.mark.parametrize("pooling", ["mean", "centre", "max"])
def test_batches_of_a_few_layouts_have_the_same_loss(data, pooling):
    store = LabelledStore.open(data / "binary")
    config = toy(model=dataclasses.replace(toy().model, pooling=pooling, strand="average"), data=classification.DataConfig(batch_size=8))
    tight, wide = (ClassificationTask(config, store) for _ in range(2))
    tight.multiple, wide.multiple = 1, 8
    model = tight.build_model().eval()
    layouts = [set(), set()]
    for step in range(12):
        for a, b in zip(tight.train_batches(step, 0, 1), wide.train_batches(step, 0, 1), strict=True):
            assert b["ids"].shape[1] % 8 == 0 and 0 <= b["ids"].shape[1] - a["ids"].shape[1] < 8
            if step < 3:
                with torch.no_grad():
                    found, expected = wide.loss(model, b)[0], tight.loss(model, a)[0]
                torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
            for seen, batch in zip(layouts, (a, b)):
                seen.add(tuple(batch["ids"].shape))
    assert len(layouts[1]) < len(layouts[0])


def test_max_length_cuts_and_the_benchmarks_limit_is_the_default(data, tmp_path):
    store = LabelledStore.open(data / "binary")
    task = ClassificationTask(toy(data=classification.DataConfig(max_length=10)), store)
    assert task.train_batches(0, 0, 1)[0]["ids"].shape[1] == 10
    store.manifest["benchmark"] = {"suite": "genomic-benchmarks", "task": "x", "max_length": 12}
    assert ClassificationTask(toy(), store).config.data.max_length == 12


def test_how_long_a_run_is(data):
    store = LabelledStore.open(data / "binary")
    n = len(ClassificationTask(toy(), store).train_rows)
    for changes, steps in [
        (dict(epochs=3.0), -(-3 * n // 64)),
        (dict(epochs=3.0, min_steps=50), 50),
        (dict(epochs=3.0, min_steps=50, train=dataclasses.replace(Config().train, max_steps=7)), 7),
    ]:
        train = ClassificationTask(toy(**changes), store).config.train
        assert train.max_steps == steps and 1 <= train.validate_every <= steps


def test_balanced_weights(data):
    store = LabelledStore.open(data / "binary")
    task = ClassificationTask(toy(class_weights="balanced"), store)
    count = np.bincount(store.labels[task.train_rows])
    assert task.class_weight.tolist() == pytest.approx([count.sum() / (2 * c) for c in count])
    model = task.build_model().train()
    batch = task.train_batches(0, 0, 1)[0]
    loss, total = task.loss(model, batch)
    assert float(total) == pytest.approx(task.weight(batch))
    outputs = model(batch["ids"], batch.get("mask"))
    expected = (F.cross_entropy(outputs, batch["target"], reduction="none") * task.class_weight[batch["target"]]).sum()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    _, n = task.loss(model.eval(), batch)  # validation is not weighted
    assert n.item() == 64


def test_validation_can_count_errors(data):
    store = LabelledStore.open(data / "multi-class")
    task = ClassificationTask(toy(select_by="error"), store)
    model = task.build_model().eval()
    batch = next(iter(task.validation_batches(0, 1)))
    wrong, n = task.loss(model, batch)
    predicted = model(batch["ids"], batch.get("mask")).argmax(1)
    assert float(wrong) == float((predicted != batch["target"]).sum()) and task.metric == "error rate"
    loss, _ = task.loss(model.train(), batch)
    assert loss.item() != wrong.item()


def test_resolved_config_builds_the_model_alone(data):
    for kind, n_outputs in {"binary": 2, "multi-class": 3, "multi-label": 3, "regression": 1}.items():
        config = ClassificationTask(toy(), LabelledStore.open(data / kind)).resolved_config()
        assert config.kind == kind and classification.build_model(config).head.linear.out_features == n_outputs
    with pytest.raises(UserError, match="kind: auto"):
        classification.build_model(toy())


def test_interpret():
    config = toy(kind="binary", classes=("a", "b"))
    labels, values = interpret(config, np.array([[0.0, 0.0], [0.0, 2.0]], np.float32))
    assert labels == ["a", "b"] and values[1] == pytest.approx([0.1192, 0.8808], abs=1e-4)
    labels, values = interpret(toy(kind="multi-label", classes=("a", "b")), np.array([[1.0, 2.0], [-1.0, -1.0]]))
    assert labels == ["a,b", "none"] and values[0, 0] == pytest.approx(0.7311, abs=1e-4)
    labels, values = interpret(toy(kind="regression", target_mean=5.0, target_scale=2.0), np.array([[0.5]]))
    assert labels == ["6"] and values[0, 0] == 6.0


def test_presets_build_and_follow_the_published_protocol():
    assert {"classify", "genomic_benchmarks", "nucleotide_transformer_tasks"} <= set(presets("classify"))
    for name in presets("classify"):
        config = load_config(Config, name, [], {})
        classification.build_model(dataclasses.replace(config, kind="binary", classes=("a", "b")))
    config = load_config(Config, "genomic_benchmarks", [], {})
    assert (config.epochs, config.data.batch_size, config.seeds, config.select_by) == (10, 256, 5, "error")
    assert (config.model.d_model, config.model.n_layer, config.optim.lr, config.optim.min_lr) == (118, 4, 1e-3, 1e-4)
    nt = load_config(Config, "nucleotide_transformer_tasks", [], {})
    assert (nt.epochs, nt.seeds, nt.model.d_model) == (20, 10, 256)


# -- the commands --------------------------------------------------------------------------------------------------
def test_a_run_explains_itself(trained, data):
    text = (trained / "report.md").read_text()
    assert "k-mers" in text and "small CNN" in text and "chance" in text and "264,710 parameters" in text
    assert "The model wins" in text or "A baseline wins" in text
    facts = json.loads((trained / "run.json").read_text())
    assert facts["seeds"] == [0, 1] and facts["ended"] == "finished" and set(facts["results"]) == {"0", "1"}
    for seed in (0, 1):
        assert (trained / "seeds" / str(seed) / "checkpoints" / "best" / "model.safetensors").is_file()
    for plot in ("evaluation-calibration.png", "evaluation-confusion.png"):
        assert (trained / "plots" / plot).read_bytes()[:4] == b"\x89PNG"
    found = json.loads((trained / "evaluation.json").read_text())
    model = found["predictors"]["model"]
    assert model["mean"]["accuracy"] > 0.85 > found["predictors"]["chance"]["mean"]["accuracy"]
    assert model["min"]["accuracy"] <= model["mean"]["accuracy"] <= model["max"]["accuracy"]
    assert len(model["seeds"]) == 2 and found["n"] == 30 and found["classes"] == ["lean", "rich"]
    assert len(list((data / "binary" / "baselines").glob("*.npz"))) == 2  # of the first seed


@pytest.mark.parametrize(
    "model, kmers, chance, said",
    [
        (0.9, 0.8, 0.5, "The model wins: accuracy 0.900 against 0.800"),
        (0.8, 0.9, 0.5, "A baseline wins: k-mer logistic regression reaches accuracy 0.900, the model 0.800"),
        (0.4, 0.6, 0.5, "A baseline wins"),
        (0.5, 0.4, 0.5, "Nothing is better than chance: accuracy 0.500, the model 0.500"),  # the model won, it said
    ],
)
def test_the_verdict_knows_chance(model, kmers, chance, said):
    found = classification.Evaluation(
        split="test", dataset="d", kind="binary", classes=("a", "b"), seeds=(0,), n=10, details={"k-mers": [""]}, best_seed=0,
        metrics={name: [{"accuracy": value}] for name, value in (("model", model), ("k-mers", kmers), ("chance", chance))},
        labels=np.zeros(10), predictions={}, benchmark=None,
    )  # fmt: skip
    assert classification.evaluation_verdict(found).startswith(said)


def test_eval_repeats_the_report_without_fitting_baselines_again(trained, monkeypatch):
    before = json.loads((trained / "evaluation.json").read_text())

    def refuse(*args, **kwargs):
        raise AssertionError("fitted again")

    monkeypatch.setattr(classification, "kmer_baseline", refuse)
    monkeypatch.setattr(classification, "cnn_baseline", refuse)
    stdout, _ = run("eval", trained, "--json", "-")
    again = json.loads(stdout)
    assert again["predictors"]["model"] == before["predictors"]["model"]
    assert again["predictors"]["k-mers"] == before["predictors"]["k-mers"]


def test_eval_of_another_split_leaves_the_report(trained):
    before = (trained / "report.md").read_text()
    stdout, _ = run("eval", trained, "--split", "valid", "--set", "eval.baselines=[k-mers]")
    assert "valid split" in stdout and (trained / "evaluation-valid.md").is_file()
    assert (trained / "report.md").read_text() == before
    assert "no such split" in error_of("eval", trained, "--split", "tset")
    assert "--context" in error_of("eval", trained, "--context", 64)


def test_predict_reads_sequences(trained, tmp_path):
    (tmp_path / "x.fa").write_text(">a\nATATTTAATTATATATATAATA\n>b\nGCGGCCGCGGGCGCCGCGCGC\n>c\nNNNN\n")
    stdout, _ = run("predict", trained, tmp_path / "x.fa")
    rows = [line.split("\t") for line in stdout.splitlines()]
    assert rows[0] == ["name", "label", "lean", "rich", "length"]
    assert [row[:2] for row in rows[1:]] == [["a", "lean"], ["b", "rich"], ["c", "."]]


def test_a_seed_stopped_before_its_first_validation_has_no_best(data, tmp_path, monkeypatch):
    """It was "best validation inf"."""

    def stopped(config, dataset, run_dir, *, each_seed, **rest):
        each_seed(0, result := FitResult(2, 0.1, math.inf, 0, 128, 20.0, "interrupted"))
        return {0: result}

    monkeypatch.setattr(classification, "train", stopped)
    _, stderr = run("train", "classify", "--data", data / "binary", "--out", tmp_path / "run", code=130)
    assert "Seed 0: 2 steps in 0.1 minutes, interrupted.\n" in stderr


def test_one_seed_is_not_gone_on_with_alone(trained):
    """It began a run inside the run."""
    line = error_of("train", "classify", "--resume", "--out", trained / "seeds" / "0")
    assert f"is one seed of a run; go on with that: --resume --out {trained}" in line and not (trained / "seeds" / "0" / "seeds").exists()


def test_a_killed_run_goes_on_with_the_seeds_that_are_left(data, tmp_path, trained, monkeypatch):
    """A seed that is done is not trained again, one that is not begins anew, and the answer is that of the first run."""
    import shutil

    again = tmp_path / "again"
    shutil.copytree(trained, again)
    shutil.rmtree(again / "seeds" / "1")
    kept = (again / "seeds" / "0" / "metrics.csv").read_text()
    whole, fit = [], fit_module.fit
    monkeypatch.setattr(fit_module, "fit", lambda *a, **options: whole.append(options["whole"]) or fit(*a, **options))
    run("train", "classify", "--resume", "--out", again)
    assert whole == [again]  # what messages say to go on with
    assert (again / "seeds" / "0" / "metrics.csv").read_text() == kept
    before, after = (json.loads((p / "evaluation.json").read_text())["predictors"]["model"]["seeds"] for p in (trained, again))
    assert before == after


@pytest.mark.parametrize("kind", ["multi-class", "multi-label", "regression"])
def test_every_kind_trains_and_beats_chance(data, tmp_path, kind):
    stdout, _ = run(
        "train", "classify", "--data", data / kind, "--out", tmp_path / "run", "--epochs", 12, "--set", "optim.lr=0.02", "--set",
        "data.batch_size=32", *SIZE, *QUICK, "--json", "-",
    )  # fmt: skip
    found = json.loads(stdout)["evaluation"]
    model, chance = (found["predictors"][name]["mean"] for name in ("model", "chance"))
    if kind == "regression":
        assert model["pearson"] > 0.7 and model["rmse"] < 0.8 * chance["rmse"]
        assert (tmp_path / "run" / "plots" / "evaluation-regression.png").is_file()
    else:
        metric = {"multi-class": "accuracy", "multi-label": "f1_macro"}[kind]
        assert model[metric] > chance[metric] + 0.15
        assert (tmp_path / "run" / "plots" / "evaluation-calibration.png").is_file()


def test_starting_from_a_language_model_takes_its_shape_and_weights(data, tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "g.fa").write_text(">c\n" + "".join(rng.choice(list("ACGT"), 4000)) + "\n")
    run(
        "train", "dna", "--fasta", tmp_path / "g.fa", "--out", tmp_path / "dna", "--max-steps", 2, *SIZE, "--context", 64,
        "--set", "train.tokens_per_step=512", "--set", "eval.max_order=2", "--set", "train.ema_decay=0", "--set",
        "model.direction=causal",
    )  # fmt: skip
    out = tmp_path / "run"
    run("train", "classify", "--data", data / "binary", "--init", tmp_path / "dna", "--freeze", "--out", out, "--max-steps", 3,
        "--set", "train.accelerator=cpu", *QUICK)  # fmt: skip
    loaded, source = runs.load_run(out), runs.load_run(tmp_path / "dna")
    assert loaded.config.model.direction == "causal" and loaded.config.model.d_model == 16
    theirs = source.model.state_dict()
    for name, tensor in loaded.model.state_dict().items():
        if name.startswith(("embedding.", "backbone.")):
            assert torch.equal(tensor, theirs[name]), name  # frozen
    assert json.loads((out / "run.json").read_text())["init"].startswith(str(tmp_path / "dna"))


def test_published_figures_stand_beside_ours(data, tmp_path):
    folder = tmp_path / "gb" / "demo_human_or_worm"
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for label, p in {"human": (0.4, 0.1, 0.1, 0.4), "worm": (0.1, 0.4, 0.4, 0.1)}.items():
            (folder / split / label).mkdir(parents=True)
            for i in range(20):
                (folder / split / label / f"{i}.txt").write_text("".join(rng.choice(list("ACGT"), 30, p=p)))
    stdout, _ = run("prep", "benchmark", "genomic-benchmarks", tmp_path / "gb", "--out", tmp_path / "sets")
    assert "demo_human_or_worm" in stdout
    out = tmp_path / "run"
    stdout, _ = run("train", "classify", "--data", tmp_path / "sets" / "demo_human_or_worm", "--out", out, "--max-steps", 2,
                    "--set", "optim.lr=0.02", *SIZE, *QUICK)  # fmt: skip
    assert "Published by others, not measured here" in stdout and "0.973 ± 0.001" in stdout
    assert "Caduceus-Ph 470K" in (out / "report.md").read_text()


# -- bad input -----------------------------------------------------------------------------------------------------
def test_bad_input_is_one_line_and_leaves_nothing(data, trained, tmp_path):
    out = tmp_path / "out"
    train = ["train", "classify", "--out", out, "--max-steps", 1, *SIZE]
    assert "--data: give the dataset that `seqlab prep labelled` wrote" in error_of(*train)
    assert "no such dataset" in error_of(*train, "--data", tmp_path / "none")
    assert "--freeze" in error_of(*train, "--data", data / "binary", "--freeze")
    assert "expected one of none, augment, average, equivariant" in error_of(*train, "--data", data / "binary", "--strand", "both")
    for kind in ("auto", "regression"):
        assert "a regression has no classes" in error_of(
            *train, "--data", data / "regression", "--set", f"kind={kind}", "--set", "class_weights=balanced"
        )
    causal = ["--set", "model.direction=causal", "--set", "model.pooling=evidence"]
    assert "evidence weighs classes that exclude each other" in error_of(*train, "--data", data / "regression", *causal)
    assert "gene_order" in error_of(*train, "--data", data / "regression", *causal, "--set", "model.gene_order=3")
    assert "kind: binary, but" in error_of(*train, "--data", data / "multi-class", "--set", "kind=binary")
    message = error_of("eval", trained, "--data", data / "multi-class")
    assert "holds multi-class labels (even, lean, rich), this run was trained on binary (lean, rich)" in message
    assert not out.exists()
    manifest = json.loads((data / "binary" / "manifest.json").read_text())
    import shutil

    odd = tmp_path / "odd"
    shutil.copytree(trained, odd)
    for path in (odd / "manifest.json", odd / "seeds" / "0" / "manifest.json"):
        path.write_text(json.dumps(manifest | {"vocab": ["A", "C", "G", "T"]}))
    message = error_of(*train, "--data", data / "multi-class", "--init", odd, "--set", "model.strand=average")
    assert "vocabularies must be the same" in message
    assert not out.exists()


def test_prep_labelled_says_what_it_wants(data, tmp_path):
    out = ["--out", tmp_path / "d"]
    table = data / "binary.csv"
    for arguments, message in [
        ([], "give one FILE, or --train and --test"),
        ([table, "--train", table], "give one FILE, or --train and --test"),
        (["--train", table], "--train: needs --test too"),
        ([table, "--test", table], "--valid and --test: belong to --train"),
        ([table, "--where", "x"], "expected COLUMN=VALUE"),
        ([table, "--where", "x=1"], "--where x: .* it has 'sequence', 'label'"),
        ([table, "--where", "label=rch"], "no row has label 'rch' .--where label=rch.; did you mean 'rich'"),
        ([table, "--where", "label=rich", "--where", "sequence=A"], "no row has sequence 'A'"),
        ([tmp_path / "none.csv"], "no such file"),
        (["--train", table, "--test", table, "--duplicates", "error"], "120|150 sequences are on both sides"),
    ]:
        import re

        assert re.search(message, error_of("prep", "labelled", *arguments, *out)), message
    assert not (tmp_path / "d").exists()
    assert "unknown benchmark" in error_of("prep", "benchmark", "gnomic", tmp_path, *out)


def test_published_figures_of_species_need_exactly_those_species():
    from types import SimpleNamespace

    from tasks.species import published_rows

    header, rows = published_rows(SimpleNamespace(classes=("bonobo", "chimpanzee", "gorilla", "human", "orangutan")))
    assert header[1:] == ["1,024", "4,096", "16,384", "65,536", "262,144", "1,048,576"] and "Mamba" in header[0]
    assert rows[2] == ["Mamba 7M", "30.00 %", "29.01 %", "31.48 %", "43.73 %", "56.60 %", "81.31 %"]
    assert published_rows(SimpleNamespace(classes=("human", "mouse"))) is None
