"""The planner: what it predicts is what is measured, it takes the cheapest mode that fits, and refuses with a way out."""

import json
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_memory import BOTH, CAUSAL, Task, make, make_batch
from toy import ToyTask

import cli
from seqlab.errors import UserError
from seqlab.training import memory, planner
from seqlab.training.fit import fit, is_out_of_memory, out_of_memory_advice
from seqlab.training.memory import Memory
from seqlab.training.module import TrainConfig, TrainingModule
from seqlab.training.optim import OptimConfig

MIB = 2**20


def probe_of(rows=1, length=4000, **changes):
    model = make(torch.float32, **{"d_model": 16, **changes})
    return planner.Probe(model, Task(), make_batch(1, 100), rows, length, False)


def load_of(probe):
    return planner.load_of(probe.model, make_batch(1, 100), 1, False, probe.rows, probe.length)


@pytest.mark.parametrize(
    "mode, changes",
    [("plain", CAUSAL), ("block", BOTH), ("chunked", CAUSAL), ("layerwise", BOTH), ("layerwise", {**BOTH, "strand": "equivariant"})],
)
def test_predicted_peak_is_the_measured_one(mode, changes):
    """From probes of 256 to 1,024 tokens to 4,000."""
    probe = probe_of(**changes)
    setting = Memory(mode, 700) if mode in memory.CUTTING else Memory(mode)
    predicted = probe.cut(mode, 700, 4000)[0] if setting.cuts_sequences else probe.whole(mode, 4000)[0]
    measured, _ = probe.measure(setting, 1, 4000)
    assert predicted == pytest.approx(measured, rel=0.05)


def test_the_time_of_a_step_is_not_that_of_the_first_one(monkeypatch):
    """Which loads or compiles kernels: extrapolated, minutes became a month."""
    once, backward = [0.5], memory.backward

    def slow_once(*arguments):
        time.sleep(once.pop() if once else 0.0)
        return backward(*arguments)

    monkeypatch.setattr(planner.modes, "backward", slow_once)
    assert probe_of().measure(Memory(), 1, 64)[1] < 0.4


def test_what_the_first_pass_alone_allocates_is_not_the_peak_of_a_step(monkeypatch):
    """cuBLAS's workspace, which stays; counted in the shorter probe of two, the prediction was too low by many times as much."""
    probe = probe_of()
    settled = iter([100, 100 + 32 + 50, 100 + 32, 100 + 32 + 50])  # before and after the first pass, and the second
    monkeypatch.setattr(probe, "_settle", lambda peak=False: next(settled))
    monkeypatch.setattr(planner.Probe, "device", torch.device("mps"))  # an accelerator's path; the model stays on the CPU
    assert probe.measure(Memory(), 1, 64)[0] == 50


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")
def test_the_first_probe_of_a_process_measures_what_later_ones_do():
    model = make(torch.float32, d_model=64, **CAUSAL).cuda()
    batch = {key: value.cuda() for key, value in make_batch(1, 100).items()}
    probe = planner.Probe(model, Task(), batch, 1, 1 << 16, True)
    torch._C._cuda_clearCublasWorkspaces()
    first, _ = probe.measure(Memory(), 1, 1 << 14)
    assert first == probe.measure(Memory(), 1, 1 << 14)[0]


def test_the_peak_that_is_measured_is_what_is_alive():
    known = torch.zeros(1000)
    with planner.Storages(iter([known])) as storages:
        known.add_(1)
        a = torch.ones(1000)
        b = a.view(10, 100)
        del a
        c = torch.ones(500)
        del b
        d = torch.ones(250)
    assert storages.peak == 4 * 1500 and storages.now == 4 * 750
    del c, d
    assert storages.now == 0


def test_probing_leaves_no_trace():
    probe = probe_of(length=300)
    before, state = {k: v.clone() for k, v in probe.model.state_dict().items()}, torch.get_rng_state()
    probe.measure(Memory("chunked", 64), 1, 300)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(v, before[k]) for k, v in probe.model.state_dict().items())
    assert all(p.grad is None for p in probe.model.parameters()) and not probe.model.backbone.checkpoint_blocks


def test_the_cheapest_mode_that_fits_is_chosen():
    """With less and less memory: all at once, fewer rows at once, blocks, pieces; then nothing."""
    probe = probe_of(rows=4, length=3000, **CAUSAL)
    load, train = load_of(probe), TrainConfig(accelerator="cpu")
    peak = {m: probe.whole(m, 3000)[0] + load.static for m in ("plain", "block")}
    everything = probe.whole("plain", 12_000)[0] + load.static

    def chosen(available):
        plan = planner.plan(probe, load, train, available=int(1.2 * available) + 1)
        return None if plan.chosen is None else plan.chosen.memory

    assert chosen(everything) == Memory("plain")
    assert chosen(everything - 1) == Memory("plain", 6000)
    assert chosen(peak["plain"]) == Memory("plain", 3000)
    assert chosen(peak["block"]) == Memory("block", 3000)
    least = chosen(peak["block"] - 1)
    assert least.mode == "chunked" and least.chunk_tokens in (1024, 2048)
    assert chosen(load.static) is None


def test_states_are_kept_while_all_fits_at_once(monkeypatch):
    """Ahead of plain, but never in parts; and not where batches are too small for it."""
    probe = probe_of(rows=4, length=3000, **CAUSAL)
    load = load_of(probe)
    right = memory.unavailable
    monkeypatch.setattr(memory, "unavailable", lambda mode, *rest: None if mode == "states" else right(mode, *rest))
    monkeypatch.setattr(memory, "FINE_ABOVE", 0)
    plain = probe.whole

    def whole(mode, tokens):  # what a GPU would keep more
        return tuple(x * (3 if mode == "states" else 1) for x in plain("plain" if mode == "states" else mode, tokens))

    monkeypatch.setattr(probe, "whole", whole)

    def chosen(tokens, mode, **train):
        available = int(1.2 * (whole(mode, tokens)[0] + load.static)) + 1
        return planner.plan(probe, load, TrainConfig(accelerator="cpu", **train), available=available).chosen.memory

    assert chosen(12_000, "states") == Memory("states")
    assert chosen(12_000, "plain") == chosen(11_000, "states") == Memory("plain")
    assert chosen(12_000, "states", memory="plain") == Memory("plain")
    monkeypatch.setattr(memory, "FINE_ABOVE", 1 << 30)
    assert chosen(12_000, "states") == Memory("plain")
    with pytest.raises(UserError, match="train.memory: states cannot be used: batches as small as these"):
        chosen(12_000, "states", memory="states")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")
@pytest.mark.parametrize("direction", ("causal", "bidirectional"))
def test_predicted_peak_of_kept_states_on_a_gpu(direction):
    """From probes of 65,536 and 131,072 tokens to half a million, and the states are a good part of it."""
    model = make(torch.float32, d_model=64, n_layer=3, d_state=16, direction=direction).cuda()
    batch = {key: value.cuda() for key, value in make_batch(1, 100).items()}
    probe = planner.Probe(model, Task(), batch, 1, 1 << 19, True)
    predicted, _ = probe.whole("states", 1 << 19)
    measured, _ = probe.measure(Memory("states"), 1, 1 << 19)
    assert predicted == pytest.approx(measured, rel=0.02)
    scans = 3 if direction == "causal" else 6
    assert measured > scans * (1 << 19) // 8 * 16 * 128 * 4  # a state of 16 numbers of every of 128 channels


def test_longest_context_is_where_it_stops_fitting():
    probe = probe_of(**CAUSAL)
    load, available = load_of(probe), 64 * MIB
    for setting in (Memory(), Memory("chunked", 256)):
        found = planner.estimate(probe, load, setting, available, available)

        def fits(length, setting=setting):
            peak = probe.cut("chunked", 256, length)[0] if setting.cuts_sequences else probe.whole("plain", length)[0]
            return 1.2 * (peak + load.static) <= available

        assert fits(found.longest) and not fits(int(1.003 * found.longest) + 2)
    assert found.longest > 1000 * 256


def test_refusal_names_what_fits():
    probe = probe_of(length=3000, **CAUSAL)
    load = load_of(probe)
    plain = planner.plan(probe, load, TrainConfig(memory="plain"), available=int(probe.whole("plain", 3000)[0] * 0.8))
    assert plain.chosen is None
    line = plain.refusal("plain")
    assert "context 3,000" in line and "--set train.memory=block" in line and "\n" not in line
    nothing = planner.plan(probe, load, TrainConfig(chunk_tokens=2000), available=int(probe.whole("plain", 1500)[0]))
    assert nothing.chosen is None and "--context" in nothing.refusal()
    # pieces that the config says are too large for this machine: smaller ones, not a context shorter than they are
    probe = probe_of(length=100_000, **CAUSAL)
    load, least = load_of(probe), probe.cut("chunked", 4096, 100_000)[0]
    large = planner.plan(probe, load, TrainConfig(memory="chunked", chunk_tokens=16384), available=int(1.5 * (1.2 * least + load.static)))
    assert large.chosen is None
    smaller = int(large.refusal("chunked").rsplit("; use --set train.chunk_tokens=")[1])
    assert planner.plan(probe, load, TrainConfig(memory="chunked", chunk_tokens=smaller), available=large.capacity).chosen is not None
    with pytest.raises(UserError, match="train.memory: layerwise cannot be used: only a stack of bidirectional"):
        planner.plan(probe, load, TrainConfig(memory="layerwise"))


# -- in a run ------------------------------------------------------------------------------------------------------
def train(tmp_path, name, *, steps=6, resume=False, task=None, **options):
    config = TrainConfig(**{"max_steps": steps, "validate_every": 2, "log_every": 1, "accelerator": "cpu", **options})
    result = fit(task or ToyTask(config), OptimConfig(lr=1e-2), config, tmp_path / name, resume=resume)
    return result, load_file(tmp_path / name / "checkpoints" / "last" / "model.safetensors")


def test_a_run_in_pieces_is_resumed_to_the_bit(tmp_path, capfd):
    """With dropout; the resumed run keeps the mode and the pieces of the checkpoint even where it could choose anew."""
    options = {"memory": "chunked", "chunk_tokens": 5}
    _, whole = train(tmp_path, "whole", **options)
    assert "memory: chunked, 5 tokens at a time" in capfd.readouterr().err
    with pytest.raises(RuntimeError, match="pulled the plug"):
        train(tmp_path, "broken", task=ToyTask(TrainConfig(max_steps=6), stop_before_step=4), **options)
    capfd.readouterr()
    _, resumed = train(tmp_path, "broken", resume=True)
    assert "memory:" not in capfd.readouterr().err
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[k], resumed[k]) for k in whole)


def test_pieces_and_the_whole_train_alike(tmp_path):
    task = lambda: ToyTask(TrainConfig(max_steps=3), dropout=0.0, uneven=True)  # noqa: E731
    _, plain = train(tmp_path, "plain", steps=3, task=task(), memory="plain")
    for name, options in (("chunked", {"chunk_tokens": 5}), ("block", {}), ("plain", {"chunk_tokens": 40})):
        _, other = train(tmp_path, f"{name}-2", steps=3, task=task(), memory=name, **options)
        for key in plain:
            torch.testing.assert_close(plain[key], other[key], rtol=1e-4, atol=1e-5, msg=f"{name} {key}")


def test_a_run_that_cannot_fit_is_refused_before_it_starts(tmp_path, monkeypatch):
    monkeypatch.setattr(planner, "capacity", lambda device: 20_000)
    with pytest.raises(UserError, match="context 16: a step needs .* are free on this machine; use"):
        train(tmp_path, "run")
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_old_configs_say_checkpoint_blocks(tmp_path, capfd):
    train(tmp_path, "run", steps=2, checkpoint_blocks=True)
    assert "memory: block" in capfd.readouterr().err
    with pytest.raises(ValueError, match="leave one of them out"):
        TrainConfig(checkpoint_blocks=True, memory="chunked")


def test_out_of_memory_says_what_to_change(tmp_path, monkeypatch):
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    assert is_out_of_memory(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to ..."))
    assert not is_out_of_memory(RuntimeError("size mismatch"))
    monkeypatch.setattr(ToyTask, "describe", lambda self, batch: "")
    task = ToyTask(TrainConfig(max_steps=6))
    module = TrainingModule(task, OptimConfig(), TrainConfig())
    line = out_of_memory_advice(module, tmp_path / "absent", 3)
    assert "at step 3" in line and "--set train.memory=block" in line and "nothing was saved" in line
    module.memory = Memory("chunked", 1000)
    assert "--set train.chunk_tokens=500" in out_of_memory_advice(module, Path(__file__), 3)
    original = memory.backward
    calls = []

    def backward(setting, model, task, batch, scale, *rest):
        if rest:  # a step of the trainer, not of the probe
            calls.append(1)
            if len(calls) > 3:
                full()
        return original(setting, model, task, batch, scale, *rest)

    monkeypatch.setattr(memory, "backward", backward)
    with pytest.raises(UserError, match="out of memory at step 3 .* the last checkpoint is kept: add it to --resume"):
        train(tmp_path, "run")


# -- the command ---------------------------------------------------------------------------------------------------
TOY = ["model.d_model=16", "model.n_layer=2", "model.d_state=4"]


def run_plan(*arguments):
    from typer.testing import CliRunner

    return CliRunner().invoke(cli.app, ["plan", *arguments, *(x for text in TOY for x in ("--set", text))])


def test_plan_of_a_run_bounded_by_time_counts_the_steps_that_it_takes():
    """100,000 steps in 2.5 minutes, it said of the demo: the limit of steps beside the limit of time."""
    limits = ["--set", "train.max_minutes=0.5", "--set", "train.max_steps=10000000"]
    plan = json.loads(run_plan("dna_small", "--json", "-", *limits).stdout)
    assert plan["seconds"] == 30 and plan["steps"] == max(1, int(30 / plan["plan"]["chosen"]["step_seconds"]))


def test_plan_command(tmp_path):
    done = run_plan("dna_small", "--context", "1_000_000", "--json", str(tmp_path / "plan.json"))
    assert done.exit_code == 0, done.output
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["tokens_per_step"] == 1_000_000 and plan["steps"] == 20_000
    by_mode = {e["memory"]["mode"]: e for e in plan["plan"]["modes"]}
    assert by_mode.keys() == {"plain", "block", "chunked"} and set(plan["plan"]["unavailable"]) == {"states", "subtract", "layerwise", "offload"}
    assert by_mode["plain"]["peak"] > by_mode["block"]["peak"] > by_mode["chunked"]["peak"]
    assert plan["plan"]["chosen"]["fits"] and plan["device_hours"] == pytest.approx(plan["seconds"] / 3600)
    shared = run_plan("dna_small", "--context", "4096", "--set", "train.tokens_per_step=32768", "--devices", "4", "--json", "-")
    assert json.loads(shared.stdout)["plan"]["rows"] == 2
    pieces = ["dna_small", "--context", "4096", "--set", "train.tokens_per_step=8192", "--context-parallel", "4", "--json", "-"]
    planned = json.loads(run_plan(*pieces, "--devices", "8").stdout)
    assert planned["plan"]["length"] == 4096 and planned["plan"]["rows"] == 1 and planned["tokens_per_step"] == 8192
    assert [e["memory"]["mode"] for e in planned["plan"]["modes"]] == ["plain", "block"]
    block = planned["plan"]["modes"][1]  # of a piece of a quarter
    assert block["longest"] > 2 * by_mode["block"]["longest"] and block["peak"] < by_mode["block"]["peak"] / 100
    assert "does not divide devices 6" in " ".join(run_plan(*pieces, "--devices", "6").output.split())
    assert run_plan("nonsense").exit_code == 1
    sound = run_plan("audio_fsdd", "--context", "2000", "--set", "model.pool=[4, 4]", "--json", "-")
    assert json.loads(sound.stdout)["plan"]["modes"][-1]["memory"]["mode"] == "chunked", sound.output
    for preset in ("species", "classify"):
        refused = run_plan(preset, "--context", "512")  # which classify has not
        assert refused.exit_code == 1 and "cannot be planned without data" in " ".join(refused.output.split()), refused.output
