"""`seqlab bench train`: the gate, the contenders, what is absent and why, the command."""

import json
import sys
import types
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from cli import app
from seqlab.backbones.mamba import MambaMixer
from seqlab.bench import train
from seqlab.errors import UserError
from seqlab.model import ModelConfig
from tasks import planning
from tasks.language_modeling import DataConfig, DnaConfig

SETTINGS = train.Settings(rows=3, length=40, micro_batches=2, device="cpu", dtype=torch.float32, seconds=0.01)


def run(settings=SETTINGS, say=lambda text: None, **model):
    config = DnaConfig(model=ModelConfig(**{"d_model": 16, "n_layer": 2, "d_state": 4, "dropout": 0.2, **model}), data=DataConfig(context=40))
    config = replace(config, train=replace(config.train, tokens_per_step=120))
    step = planning.step_of(config)
    return train.run(step.task, step.batch, settings, config.train, config.optim, say=say)


def test_what_is_found_is_told_at_once_and_long_steps_are_few(peer, monkeypatch):
    """`bench train caduceus_ps_131k` said nothing for minutes, and where it was cut short it had said nothing at all."""
    said, steps = [], []
    monkeypatch.setattr(train.Steps, "__call__", lambda self: steps.append(len(said)))
    result = run(replace(SETTINGS, seconds=1e-9), say=said.append)
    assert [line.partition(":")[0].split(" ")[-1] for line in said[1:]] == ["reference", "seqlab", "mamba_ssm"] and "parameters" in said[0]
    # a step to warm up, one timed, one whose memory is watched; the first contender's are over when it is told
    assert steps == [2, 2, 2, 3, 3, 3] and [row.steps for row in result.rows] == [1, 1]
    steps.clear()
    assert run(replace(SETTINGS, seconds=0.5)).rows[0].steps >= 3


@pytest.fixture
def peer(monkeypatch):
    """A mamba_ssm whose module is ours; yields what it was made with."""
    made = []

    class Mamba(MambaMixer):
        def __init__(self, d_model, layer_idx, **sizes):
            super().__init__(ModelConfig(d_model=d_model, **sizes))
            made.append(self)

        def forward(self, x):
            return super().forward(x, return_state=False)[0]

    for name in ("mamba_ssm", "mamba_ssm.modules", "mamba_ssm.modules.mamba_simple"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["mamba_ssm.modules.mamba_simple"].Mamba = Mamba
    monkeypatch.setattr(train, "why_no_peer", lambda model, device: None)
    return made


def test_steps_are_timed_and_what_is_absent_is_said():
    result = run()
    (row,) = result.rows
    assert row.contender == "seqlab" and row.tokens_per_second == pytest.approx(240 / row.step_ms * 1e3)
    assert 4 * 4 * result.parameters < row.peak_bytes < 1 << 24  # weights, gradients and two moments at least
    assert result.errors["seqlab"] < 1e-5 and "GPU" in result.absent["mamba_ssm"]
    header, rows = train.table(result)
    assert len(rows[0]) == len(header)
    json.dumps(result.as_dict())


@pytest.mark.parametrize(
    "model",
    [
        {},
        {"bias": True, "conv_bias": False, "dt_rank": 3},
        {"direction": "bidirectional"},
        {"direction": "bidirectional", "strand": "equivariant"},
        {"direction": "bidirectional", "tie_projections": False, "combine": "multiply"},
        {"architecture": "unet", "pool": (2,)},
    ],
    ids=str,
)
def test_the_peer_is_the_same_model(model, peer):
    result = run(**model)
    assert [row.contender for row in result.rows] == ["seqlab", "mamba_ssm"] and max(result.errors.values()) < 1e-5
    assert peer
    header, rows = train.table(result)
    assert header[-1] == "x mamba_ssm" and rows[1][-1] == "1.00"


def test_a_peer_that_differs_is_not_timed(peer, monkeypatch):
    right = MambaMixer.forward

    def wrong(self, x, *rest, **options):
        y, state = right(self, x, *rest, **options)
        return (y if type(self) is MambaMixer else 1.01 * y), state

    monkeypatch.setattr(MambaMixer, "forward", wrong)
    assert "loss or gradients differ" in run().absent["mamba_ssm"]


def test_the_reference_runs_on_one_thread(monkeypatch):
    """With two threads on a busy machine it took 120 s instead of 4 for caduceus_ps_131k."""
    seen, real, before = [], train.gradient, torch.get_num_threads()
    monkeypatch.setattr(train, "gradient", lambda *args: seen.append(torch.get_num_threads()) or real(*args))
    try:
        torch.set_num_threads(3)
        run()
        assert seen == [1, 3] and torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("error", [1.0, float("nan")])
def test_if_ours_differs_nothing_is_timed(error, monkeypatch):
    monkeypatch.setattr(train, "error", lambda found, exact: error)
    with pytest.raises(UserError, match="nothing of ours was timed: .*differ by"):
        run()


def test_a_peer_that_does_not_fit_recomputes_blocks_or_is_left_out(peer, monkeypatch):
    too_large = {"plain"}

    def measure(step, settings, measure=train.measure):
        if step.memory.mode in too_large and isinstance(step.model.backbone.layers[0].mixer, train.PeerMixer):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return measure(step, settings)

    monkeypatch.setattr(train, "measure", measure)
    assert [row.memory for row in run().rows] == ["plain", "block"]
    too_large.add("block")
    assert run().absent["mamba_ssm"] == "out of memory"


def test_a_model_without_selective_blocks_has_no_peer():
    step = planning.step_of(DnaConfig(model=ModelConfig(d_model=16, n_layer=1, blocks=("s4d",)), data=DataConfig(context=40)))
    assert "only selective ones" in train.why_no_peer(step.task.build_model(), "cuda")


def test_the_command(tmp_path):
    out = tmp_path / "train.json"
    toy = ["--context", "64", "--set", "model.d_model=16", "--set", "model.n_layer=1", "--set", "train.tokens_per_step=128"]
    words = ["bench", "train", "dna_demo", *toy, "--device", "cpu", "--seconds", "0.01"]
    done = CliRunner().invoke(app, [*words, "--json", str(out)])
    assert done.exit_code == 0, done.output
    found = json.loads(out.read_text())
    assert found["config"] == "dna_demo" and found["settings"]["tokens_per_step"] == 128 and found["rows"][0]["contender"] == "seqlab"
    assert "seqlab" in CliRunner().invoke(app, words).stdout
    for bad, expected in (
        (["bench", "train", "species"], "cannot be planned without data"),
        ([*words, "--seconds", "0"], "--seconds must be above 0"),
        (["bench", "train", "dna_dem"], "did you mean dna_demo?"),
    ):
        failed = CliRunner().invoke(app, bad)
        assert failed.exit_code == 1 and expected in failed.stderr, failed.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")
@pytest.mark.parametrize("model", [{}, {"direction": "bidirectional"}], ids=str)
def test_on_a_gpu_recorded_and_separate_steps_are_timed_too(model):
    result = run(replace(SETTINGS, device="cuda", dtype=torch.bfloat16, micro_batches=1, length=512), **model, dropout=0.0)
    assert {"seqlab", "recorded", "separate operators"} <= {row.contender for row in result.rows}, result.absent
    assert max(result.errors.values()) < 0.05 and all(row.peak_bytes > 0 for row in result.rows)
