"""Other projects' checkpoints, both ways: transformers reads what we write and we read what it writes; runs made of either."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from cli import app
from seqlab.errors import UserError
from seqlab.interop import caduceus, mamba_ssm, transformers_mamba
from seqlab.interop.caduceus import load_caduceus, save_caduceus
from seqlab.interop.mamba_ssm import load_mamba_ssm, save_mamba_ssm
from seqlab.interop.transformers_mamba import load_transformers_mamba, save_transformers_mamba
from seqlab.model import ModelConfig, build_model
from seqlab.tokenizers import nucleotide
from tasks.runs import load_run

COMPLEMENT = torch.from_numpy(nucleotide.COMPLEMENT.astype(np.int64))
IDS = torch.randint(7, 12, (2, 60), generator=torch.Generator().manual_seed(0))


def make(**changes):
    torch.manual_seed(0)
    model = build_model(ModelConfig(**{"d_model": 24, "n_layer": 2, "d_state": 4, **changes}), COMPLEMENT).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def logits(model):
    with torch.no_grad():
        found = model(IDS)
    return found[0] if isinstance(found, tuple) else found.logits


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": False}, {"bias": True, "conv_bias": False, "dt_rank": 3, "expand": 3, "d_conv": 3}])
def test_transformers_reads_what_is_exported_and_we_read_what_it_saves(changes, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is a test dependency: pip install '.[test]'")
    ours = make(**changes)
    save_transformers_mamba(ours, tmp_path / "ours")
    theirs = transformers.MambaForCausalLM.from_pretrained(tmp_path / "ours").eval()
    assert logits(ours).std() > 0.1
    assert (logits(theirs) - logits(ours)).abs().max() < 1e-4
    theirs.save_pretrained(tmp_path / "theirs")
    back = load_transformers_mamba(tmp_path / "theirs").eval()
    assert torch.equal(logits(back), logits(ours)) and (back.lm_head.weight is back.embedding.weight) == ours.config.tie_embeddings
    if ours.config.tie_embeddings:  # a model without a head, whose names lack a word
        theirs.backbone.save_pretrained(tmp_path / "headless")
        assert torch.equal(logits(load_transformers_mamba(tmp_path / "headless").eval()), logits(ours))
    # what the weights may lie in instead
    (tmp_path / "theirs" / "model.safetensors").rename(tmp_path / "theirs" / "model-00001-of-00002.safetensors")
    (tmp_path / "theirs" / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match="pytorch_model.bin: is a pickle, which is not read; make a safetensors file"):
        load_transformers_mamba(tmp_path / "theirs")
    (tmp_path / "theirs" / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(UserError, match="index.json: the weights are in several files"):
        load_transformers_mamba(tmp_path / "theirs")


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": False}, {"bias": True, "conv_bias": False, "dt_rank": 3, "expand": 3, "d_conv": 3}])
def test_mamba_ssm_layout_there_and_back(changes, tmp_path):
    ours = make(**changes)
    save_mamba_ssm(ours, tmp_path)
    back = load_mamba_ssm(tmp_path).eval()
    assert torch.equal(logits(back), logits(ours)) and (back.lm_head.weight is back.embedding.weight) == ours.config.tie_embeddings
    # its load_state_dict is strict: every name of MambaLMHeadModel, the tied head's too
    stored = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    block = {"norm.weight", *(f"mixer.{n}" for n in ("A_log", "D", "in_proj.weight", "conv1d.weight", "x_proj.weight", "out_proj.weight"))}
    block |= {"mixer.dt_proj.weight", "mixer.dt_proj.bias", *(["mixer.conv1d.bias"] if ours.config.conv_bias else [])}
    block |= {"mixer.in_proj.bias", "mixer.out_proj.bias"} if ours.config.bias else set()
    names = {"backbone.embedding.weight", "backbone.norm_f.weight", "lm_head.weight"}
    assert set(stored) == names | {f"backbone.layers.{i}.{name}" for i in range(2) for name in block}
    # a vocabulary that its own code pads, and names left to their defaults
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["vocab_size"] == 16
    (tmp_path / "config.json").write_text(json.dumps({**config, "vocab_size": 12, "pad_vocab_size_multiple": 8}))
    assert torch.equal(logits(load_mamba_ssm(tmp_path).eval()), logits(ours))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match="is a pickle, which is not read; make a safetensors file of it: python -c") as error:
        load_mamba_ssm(tmp_path)
    program = str(error.value).split('python -c "')[1].rstrip('"')
    exec(program, {})
    assert torch.equal(logits(load_mamba_ssm(tmp_path).eval()), logits(ours))


@pytest.mark.parametrize("changes", [{"strand": "augment"}, {"strand": "equivariant"}, {"strand": "augment", "tie_projections": False, "combine": "multiply"}])
def test_caduceus_layout_there_and_back(changes, tmp_path):
    ours = make(direction="bidirectional", **changes)
    save_caduceus(ours, tmp_path)
    assert torch.equal(logits(load_caduceus(tmp_path).eval()), logits(ours))
    stored = load_file(tmp_path / "model.safetensors")
    assert any("mamba_rev.in_proj" in name for name in stored) != changes.get("tie_projections", True)
    # Caduceus' own code wraps mixers, and norms that are not fused with the addition, for PS; it reads no other names
    equivariant = changes["strand"] == "equivariant"
    wrapped, inner = (".submodule", ".embedding") if equivariant else ("", "")
    outside = {f"embeddings.word_embeddings{inner}.weight", f"norm_f{wrapped}.weight", f"layers.0.norm{wrapped}.weight"}
    outside |= {"embeddings.word_embeddings.complement_map"} if equivariant else set()
    names = {name.removeprefix("caduceus.backbone.") for name in stored}
    assert outside <= names and f"layers.1.mixer{wrapped}.mamba_rev.A_log" in names
    assert ({"lm_head.complement_map"} & names) == ({"lm_head.complement_map"} if equivariant else set())
    assert not json.loads((tmp_path / "config.json").read_text())["fused_add_norm"]


def test_models_that_are_something_else_are_refused(tmp_path):
    for changes in ({"direction": "bidirectional"}, {"architecture": "unet"}, {"blocks": ("s4d",)}, {"n_classes": 2}, {"prediction_order": 4}):
        with pytest.raises(UserError, match="export: transformers' Mamba is a causal stack"):
            save_transformers_mamba(make(**changes), tmp_path)
        with pytest.raises(UserError, match="export: mamba_ssm's MambaLMHeadModel is a causal stack"):
            save_mamba_ssm(make(**changes), tmp_path)
    with pytest.raises(UserError, match="norm_epsilon 1e-06"):
        save_mamba_ssm(make(norm_epsilon=1e-6), tmp_path)
    with pytest.raises(UserError, match="export: Caduceus is a bidirectional stack"):
        save_caduceus(make(), tmp_path)
    assert not list(tmp_path.iterdir())


# -- the commands --------------------------------------------------------------------------------------------------
def call(*arguments, code=0):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, (result.stdout, result.stderr)
    return result


TOY = ["train.tokens_per_step=512", "train.accelerator=cpu", "eval.max_order=1", "eval.max_bases=500"]
TOY = [word for text in TOY for word in ("--set", text)]
SMALL = ["--set", "model.d_model=16", "--set", "model.n_layer=1", "--set", "model.d_state=4"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    letters = "".join(np.random.default_rng(0).choice(list("ACGT"), 4000))
    (folder / "g.fa").write_text(f">chr\n{letters}\n")
    call("prep", "dna", folder / "g.fa", "--out", folder / "data")
    return folder / "data"


@pytest.mark.parametrize("kind", [["model.direction=causal"], ["model.direction=bidirectional", "model.strand=augment"], ["model.direction=bidirectional", "model.strand=equivariant"]], ids=" ".join)
def test_a_run_exported_and_imported_is_the_same_model(kind, data, tmp_path):
    kind = [word for text in kind for word in ("--set", text)]
    call("train", "dna", "--data", data, "--context", 64, "--max-steps", 1, *TOY, *SMALL, *kind, "--out", tmp_path / "run")
    call("export", tmp_path / "run", "--out", tmp_path / "theirs")
    assert "exists" in call("export", tmp_path / "run", "--out", tmp_path / "theirs", code=1).stderr
    call("import", tmp_path / "theirs", "--out", tmp_path / "again", "--json", tmp_path / "i.json")
    one, other = load_run(tmp_path / "run"), load_run(tmp_path / "again")
    assert torch.equal(logits(one.model.eval()), logits(other.model.eval()))
    assert json.loads((tmp_path / "i.json").read_text())["parameters"] == one.facts["parameters"]
    assert "was imported" in (line := call("eval", tmp_path / "again", code=1).stderr) and "--data DIR" in line
    how = ["--context", 32, "--set", "eval.max_order=1", "--set", "eval.max_bases=320"]
    call("eval", tmp_path / "again", "--data", data, *how, "--json", tmp_path / "e.json")
    call("eval", tmp_path / "run", *how, "--json", tmp_path / "own.json")
    theirs, own = (json.loads((tmp_path / name).read_text()) for name in ("e.json", "own.json"))
    assert theirs["trained_context"] == 0 and theirs["markov"] == own["markov"]
    if kind != ["--set", "model.direction=causal"]:  # of a causal model strands are not said, nor averaged
        assert theirs["contexts"] == own["contexts"]
    assert (tmp_path / "again" / "report.md").is_file()
    assert "was imported; start from it with --init" in call("train", "dna", "--resume", "--out", tmp_path / "again", code=1).stderr
    call("train", "dna", "--data", data, "--context", 64, "--max-steps", 1, *TOY, "--init", tmp_path / "again", "--out", tmp_path / "further")
    assert load_run(tmp_path / "further").config.model.d_model == 16


@pytest.mark.parametrize("layers", [2, 3])
def test_a_released_caduceus_ps_is_a_run_like_any_other(layers, data, tmp_path):
    from tests.interop.test_caduceus import write

    source = write(tmp_path / "ps", rcps=True, n_layer=layers)
    call("import", source, "--out", tmp_path / "run")
    assert torch.equal(logits(load_run(tmp_path / "run").model.eval()), logits(load_caduceus(source).eval()))
    letters = "".join(np.random.default_rng(1).choice(list("ACGTN"), 300))
    other = letters[::-1].translate(str.maketrans("ACGT", "TGCA"))
    (tmp_path / "x.fa").write_text(f">a\n{letters}\n>b\n{other}\n")
    call("embed", tmp_path / "run", tmp_path / "x.fa", "--out", tmp_path / "x.npz")
    with np.load(tmp_path / "x.npz") as found:
        a, b = found["embeddings"]
        assert a.std() > 0.1
        np.testing.assert_allclose(a, b, atol=1e-5)
    base = letters.replace("N", "A")
    (tmp_path / "g.fa").write_text(f">chr\n{base}\n")
    alt = "C" if base[149] != "C" else "G"
    (tmp_path / "v.vcf").write_text(f"##fileformat=VCFv4.2\n#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\nchr\t150\t.\t{base[149]}\t{alt}\t.\t.\t.\n")
    call("score", tmp_path / "run", "--fasta", tmp_path / "g.fa", tmp_path / "v.vcf", "--context", 64, "--out", tmp_path / "s.vcf")
    assert "SEQLAB" in (tmp_path / "s.vcf").read_text().splitlines()[-1].upper()
    call("train", "dna", "--data", data, "--context", 64, "--max-steps", 1, *TOY, "--init", tmp_path / "run", "--out", tmp_path / "further")
    assert "causal" in call("generate", "dna", tmp_path / "run", "--length", 10, code=1).stderr


def test_wrong_input_is_one_line_and_leaves_nothing(data, tmp_path):
    def folder(name, config, weights=None):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
        if weights is not None:
            save_file(weights, tmp_path / name / "model.safetensors")
        return tmp_path / name

    save_transformers_mamba(make(), tmp_path / "good")
    good = json.loads((tmp_path / "good" / "config.json").read_text())
    weights = load_file(tmp_path / "good" / "model.safetensors")
    save_caduceus(make(direction="bidirectional", strand="equivariant"), tmp_path / "ps")
    config = json.loads((tmp_path / "ps" / "config.json").read_text())
    (tmp_path / "ps" / "config.json").write_text(json.dumps({**config, "complement_map": {str(i): i for i in range(16)}}))
    (tmp_path / "file").write_text("x")
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "run.json").write_text("{}")
    cases = (
        (tmp_path / "none", "no such folder"),
        (tmp_path / "file", "no such folder"),
        (data, "holds no config.json; give the folder"),
        (tmp_path / "made", "is a run already"),
        (folder("broken", "{"), "cannot be read as a model's config.json"),
        (folder("list", "[]"), "holds no table"),
        (folder("bert", {"model_type": "bert"}), "caduceus and mamba are known"),
        (folder("little", {"model_type": "mamba"}), "has no 'hidden_size'"),
        (folder("words", {**good, "hidden_size": "wide"}), "config.json: "),  # was a TypeError, "unexpected"
        (folder("small", {"model_type": "caduceus"}), "has no 'vocab_size'"),
        (folder("two", {"d_model": 8, "n_layer": 1, "vocab_size": 12, "ssm_cfg": {"layer": "Mamba2"}}), "only Mamba1 is supported"),
        (folder("attention", {"d_model": 8, "n_layer": 1, "vocab_size": 12, "attn_layer_idx": [0]}), "attn_layer_idx is [0]"),
        (folder("text", {**good, "vocab_size": 50280}), "vocab_size is 50,280"),
        (folder("odd", {**good, "state_size": 9999}), "d_state: at most 256"),
        (folder("gelu", {**good, "hidden_act": "gelu"}), "only silu"),
        (folder("empty", good), "cannot be read"),
        (folder("short", good, {k: v for k, v in weights.items() if "norm_f" not in k}), "lacks backbone.norm_f.weight"),
        (folder("wide", {**good, "hidden_size": 32}, weights), "in a model of its config.json"),
        (tmp_path / "ps", "complement_map is not that of the vocabulary"),
        (folder("map", {**config, "complement_map": {"7": 99}}), "complement_map is not an involution"),
        (folder("one way", {**config, "bidirectional": False}), "equivariant"),
    )
    before = {p.name for p in tmp_path.iterdir()}
    for source, expected in cases:
        stderr = call("import", source, "--out", tmp_path / "run", code=1).stderr
        errors = [line for line in stderr.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and expected in errors[0] and "unexpected" not in stderr, stderr
    assert "already used" in call("import", tmp_path / "good", "--out", tmp_path / "good", code=1).stderr
    assert "is a file" in call("export", tmp_path / "none", "--out", tmp_path / "file", code=1).stderr
    assert "no such run" in call("export", tmp_path / "none", "--out", tmp_path / "x", code=1).stderr
    assert {p.name for p in tmp_path.iterdir()} == before


def test_an_export_that_fails_leaves_no_folder(data, tmp_path, monkeypatch):
    call("train", "dna", "--data", data, "--context", 64, "--max-steps", 1, *TOY, *SMALL, "--out", tmp_path / "run")

    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("seqlab.interop.weights.save_file", full)
    assert "No space left" in call("export", tmp_path / "run", "--out", tmp_path / "theirs", code=1).stderr
    assert not (tmp_path / "theirs").exists()


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("caduceus", {"bidirectional_strategy": "concat"}, "bidirectional_strategy is 'concat'; allowed: 'add', 'ew_multiply'"),
        ("caduceus", {"ssm_cfg": [1]}, "ssm_cfg holds no table"),
        ("caduceus", {"ssm_cfg": {"layer": "Mamba2"}}, "ssm_cfg.layer is 'Mamba2'; only Mamba1"),
        ("caduceus", {"ssm_cfg": {"expand": 1.5}}, "expand: expected a whole number, got 1.5"),
        ("caduceus", {"ssm_cfg": {"dt_rank": "all"}}, "dt_rank: expected a whole number, got all"),
        ("caduceus", {"d_model": True}, "d_model: expected a whole number, got true"),
        ("caduceus", {"norm_epsilon": "a"}, "norm_epsilon: expected a number, got a"),
        ("caduceus", {"pad_vocab_size_multiple": 0}, "pad_vocab_size_multiple: expected a whole number of 1 or more, got 0"),
        ("caduceus", {"rcps": True}, "rcps is true and there is no complement_map"),
        ("mamba_ssm", {"vocab_size": None}, "vocab_size: expected a whole number of 1 or more, got None"),
        ("mamba_ssm", {"ssm_cfg": [1]}, "ssm_cfg holds no table"),
        ("mamba_ssm", {"pad_vocab_size_multiple": None}, "pad_vocab_size_multiple: expected a whole number of 1 or more, got None"),
        ("transformers", {"layer_norm_epsilon": None}, "norm_epsilon: expected a number, got null"),
        ("transformers", {"expand": 1.5}, "expand: expected a whole number, got 1.5"),
    ],
)
def test_a_config_of_another_kind_is_one_line(kind, changes, message, tmp_path):
    """Types and kinds that were taken, or ended in a traceback: an unknown strategy was read as a product."""
    sizes = {"d_model": 8, "n_layer": 1, "vocab_size": 16}
    plain, read = {
        "caduceus": ({"model_type": "caduceus", **sizes}, caduceus.read_config),
        "mamba_ssm": (sizes, mamba_ssm.read_config),
        "transformers": ({"model_type": "mamba", "hidden_size": 8, "num_hidden_layers": 1, "vocab_size": 16}, transformers_mamba.read_config),
    }[kind]
    path = tmp_path / "config.json"
    path.write_text(json.dumps(plain))
    read(path)
    path.write_text(json.dumps(plain | changes))
    with pytest.raises(UserError) as error:
        read(path)
    assert message in str(error.value) and "\n" not in str(error.value)
