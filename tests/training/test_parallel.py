"""Context parallelism: several processes with a piece of the sequence each, against one process with all of it."""

import contextlib
import functools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from pieces import CASES, COMPILER, outcome
from safetensors.torch import load_file
from toy import ToyTask

from seqlab.errors import UserError
from seqlab.model import LanguageModel, ModelConfig
from seqlab.training.callbacks import read_history
from seqlab.training.fit import several_processes
from seqlab.training.module import TrainConfig
from seqlab.training.parallel import share_mixers, share_sequences
from seqlab.training.place import Place

ROOT = Path(__file__).resolve().parents[2]

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """For each of four ranks, (size of the group, case's name) -> what the rank made of it."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, str(Path(__file__).parent / "pieces.py")]
    processes = [
        subprocess.Popen(
            [*command, str(rank), "4", str(folder / "store"), str(folder)],
            env=ENVIRONMENT,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(4)
    ]
    for process in processes:
        _, stderr = process.communicate(timeout=240)
        assert process.returncode == 0, stderr[-3000:]
    return [torch.load(folder / f"{rank}.pt") for rank in range(4)]


@functools.cache
def alone(name):
    return outcome(next(case for case in CASES if case.name == name))


def worst(pairs) -> float:
    """Largest relative error over (got, expected); NaN and missing answers count as infinite."""
    error = 0.0
    for got, expected in pairs:
        if got is None or got.shape != expected.shape:
            return float("inf")
        if expected.numel():
            e = float((got - expected).norm() / expected.norm().clamp(min=1e-3))
            error = max(error, float("inf") if e != e else e)
    return error


def test_worst_notices_wrong_and_missing_answers():
    x = torch.ones(3, dtype=torch.float64)
    assert worst([(x, x)]) == 0
    assert worst([(x + 1e-9, x)]) > 1e-10
    assert worst([(None, x)]) == worst([(x[:2], x)]) == worst([(x * float("nan"), x)]) == float("inf")


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_outputs_and_every_gradient_are_those_of_one_rank(outcomes, case, size):
    if case.fused and not COMPILER:
        pytest.skip("g++ is not installed; it compiles the emulated kernels")
    whole, parts = alone(case.name), [outcomes[rank][size, case.name] for rank in range(size)]
    pairs = {
        "y": (torch.cat([part["y"] for part in parts], 1), whole["y"]),
        "dx": (torch.cat([part["dx"] for part in parts], 1), whole["dx"]),
    }
    for name, gradient in whole["gradients"].items():
        pairs[name] = (sum(part["gradients"][name] for part in parts), gradient)
    errors = {name: worst([pair]) for name, pair in pairs.items()}
    assert max(errors.values()) < (3e-6 if case.fused else 1e-10), errors


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two NVIDIA GPUs here")
@pytest.mark.parametrize("direction", ["causal", "bidirectional"])
def test_gradients_of_a_sequence_on_two_gpus(direction):
    """The benchmark's gate: fused blocks and NCCL against one GPU's separate operators, kept and recomputed, both precisions."""
    command = [*TORCHRUN, "2", "benchmarks/bench_context_parallel.py", "--direction", direction, "--n-layer", "4"]
    command += ["--parity-length", "20001", "--lengths", "4096", "--repeats", "1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout.count("parity") >= 4, done.stdout + done.stderr[-3000:]


@pytest.mark.parametrize("size", [2, 3, 4])
def test_bytes_sent_do_not_depend_on_the_length(outcomes, size):
    layers, batch, channels, states, width, number = 2, 2, 12, 4, 4, 8  # float64; two sequences
    forward = (width - 1) * (channels + 1) + channels * (states + 1)  # halo and its flags; state and sum of steps
    backward = (width - 1) * channels + channels * states
    expected = (4 * layers, layers * batch * number * (forward + backward))
    for rank in range(size):
        for name in ("causal", "causal ten times as long"):
            assert outcomes[rank][size, name]["traffic"] == expected
        # a recomputed block sends nothing again
        assert outcomes[rank][size, "causal checkpointed"]["traffic"] == expected
        both_ways = outcomes[rank][size, "bidirectional"]["traffic"]
        assert both_ways == tuple(2 * n for n in expected)


# -- the trainer ---------------------------------------------------------------------------------------------------
SCRIPT = """
import sys
sys.path[:0] = [%r, %r]
from pathlib import Path
from toy import ToyTask
from seqlab.training.fit import fit
from seqlab.training.module import TrainConfig
from seqlab.training.optim import OptimConfig

def main(run, devices, context_parallel, stop_before_step=None, resume=False):
    c = TrainConfig(
        max_steps=10, validate_every=4, log_every=1, accelerator="cpu", ema_decay=0.5, devices=devices,
        context_parallel=context_parallel,
    )
    task = ToyTask(c, dropout=0.0, uneven=True, micro_rows=3, stop_before_step=stop_before_step)
    fit(task, OptimConfig(lr=1e-2), c, Path(run), resume=resume)

if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]) if len(sys.argv) > 4 else None)
""" % (str(ROOT), str(Path(__file__).parent))


def weights(run, which="last"):
    return load_file(run / "checkpoints" / which / "model.safetensors")


def test_two_ranks_train_as_one_and_one_goes_on_where_they_stopped(tmp_path):
    (tmp_path / "train.py").write_text(SCRIPT)
    sys.path.insert(0, str(tmp_path))
    try:
        from train import main
    finally:
        sys.path.remove(str(tmp_path))
        sys.modules.pop("train", None)
    main(tmp_path / "whole", 1, 1)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "train.py"), str(tmp_path / "shared"), "2", "2", "7"],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode != 0 and "pulled the plug" in done.stderr, done.stderr[-2000:]
    main(tmp_path / "shared", 1, 1, resume=True)
    for which in ("last", "best"):
        one, other = weights(tmp_path / "whole", which), weights(tmp_path / "shared", which)
        for name in one:
            torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=1e-5, msg=name)
    columns = ("step", "tokens", "loss", "valid", "grad_norm")
    rows = [read_history(tmp_path / run / "metrics.csv") for run in ("whole", "shared")]
    assert len(rows[0]) == len(rows[1])
    for one, other in zip(*rows):
        for column in columns:
            assert one[column] == pytest.approx(other[column], rel=1e-4, nan_ok=True), column


@pytest.mark.parametrize(
    "options, words",
    [
        ({"devices": 6, "context_parallel": 4}, "context_parallel: 4 does not divide devices 6"),
        ({"context_parallel": 0}, "context_parallel: must be 1 or more"),
        ({"devices": 2, "context_parallel": 2, "memory": "subtract"}, "devices that share a sequence"),
        ({"devices": 2, "context_parallel": 2, "memory": "chunked"}, "devices that share a sequence"),
        ({"devices": 2, "context_parallel": 2, "chunk_tokens": 100}, "devices that share a sequence"),
        ({"devices": 2, "context_parallel": 2, "compile": True}, "compile: not together with context_parallel"),
    ],
)
def test_impossible_combinations_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        TrainConfig(**options)


def test_tasks_and_models_that_cannot_be_cut_are_refused():
    class WholeSequences:
        pass

    with pytest.raises(UserError, match="WholeSequences needs whole sequences"):
        share_sequences(WholeSequences(), [], Place(0, 2, 2), "cpu")

    class OtherBackbone(torch.nn.Module):
        backbone = torch.nn.Identity()

    with pytest.raises(UserError, match="Identity mixes positions in a way that cannot be cut"):
        share_mixers(OtherBackbone(), None)
    with pytest.raises(UserError, match="UNet mixes positions"):
        share_mixers(LanguageModel(ModelConfig(d_model=8, n_layer=2, architecture="unet", pool=(2,))), None)
    with pytest.raises(UserError, match="S4D.* mixes positions"):
        share_mixers(LanguageModel(ModelConfig(d_model=8, n_layer=2, blocks=("s4d",))), None)


def test_a_batch_is_cut_along_its_positions():
    batch = {"ids": torch.arange(20).view(2, 10), "start": torch.tensor([5, 6])}
    places = [Place(rank, 6, 3) for rank in range(6)]
    assert [(p.data_rank, p.data_size) for p in places] == [(0, 2)] * 3 + [(1, 2)] * 3
    pieces = [p.piece(batch) for p in places[:3]]
    assert torch.equal(torch.cat([p["ids"] for p in pieces], 1), batch["ids"])
    assert [p["ids"].shape[1] for p in pieces] == [4, 3, 3]
    assert all(torch.equal(p["start"], batch["start"]) for p in pieces)
    assert Place(0, 2).piece(batch) is batch
    with pytest.raises(UserError, match="a sequence of 10 positions cannot be shared by 11 devices"):
        Place(0, 11, 11).piece(batch)


def test_what_the_first_process_says_before_it_is_killed(tmp_path, monkeypatch, capsys):
    """A rank that waits in NCCL cannot say that another one is gone; Lightning's thread, which kills it, can."""
    from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver

    killed = []
    monkeypatch.setattr(os, "kill", lambda *arguments: killed.append(arguments))
    child = subprocess.Popen([sys.executable, "-c", "import os; os._exit(7)"])
    child.wait()
    with several_processes(torch.nn.Module(), tmp_path):
        _ChildProcessObserver(os.getpid(), [child])._run()
    assert killed == [(os.getpid(), signal.SIGKILL)]
    line = capsys.readouterr().err
    assert line.startswith("error: lost contact with the other processes") and f"go on with --resume --out {tmp_path}" in line


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone tells a process that its parent has ended")
def test_a_process_ends_with_the_one_that_started_it():
    child = "from seqlab.processes import end_with_parent; end_with_parent(); print('there', flush=True); import time; time.sleep(60)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    environment = {k: v for k, v in ENVIRONMENT.items() if k not in ("RANK", "TORCHELASTIC_RUN_ID")} | {"LOCAL_RANK": "1"}
    process = subprocess.Popen([sys.executable, "-c", parent], env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "there\n"
    process.kill()
    started = time.monotonic()
    assert process.stdout.read() == ""  # ends when nobody holds the pipe any more
    assert time.monotonic() - started < 20


def test_only_the_first_process_writes_before_training(tmp_path, monkeypatch):
    """With torchrun the others may get there before the first one has looked whether the folder is free."""
    from seqlab.training import fit as fitting
    from tasks import runs

    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "manifest.json").write_text("{}")
    run, task = tmp_path / "run", ToyTask(TrainConfig())
    task.resolved_config = lambda: SimpleNamespace(task="toy", optim=None, train=None)
    monkeypatch.setattr(runs, "dump_yaml", lambda config: "task: toy\n")
    seen = []
    result = SimpleNamespace(ended="finished")
    monkeypatch.setattr(fitting, "fit", lambda *a, **k: (seen.append(sorted(p.name for p in run.glob("*"))), result)[1])
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        runs.train(task, run, tmp_path / "data", "0")
    assert seen == [[], ["checkpoints", "config.yaml", "manifest.json", "run.json"]]


# -- the command ---------------------------------------------------------------------------------------------------
TOY = "--config dna_demo --context 250 --max-steps 60 --set model.d_model=16 --set model.n_layer=2 --set model.d_state=4"
TOY += " --set model.direction=bidirectional --set model.strand=equivariant --set train.tokens_per_step=1024"
TOY += " --set train.max_minutes=null --set train.log_every=1 --set train.validate_every=4 --set train.validation_tokens=1000"
TOY += " --set train.accelerator=cpu --set train.ema_decay=0.5 --set eval.max_order=2 --set eval.contexts=[64]"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node"]


def command(folder, run, *options, launcher=(sys.executable,)):
    arguments = ["-m", "cli", "train", "dna", "--out", str(folder / run), *options]
    environment = {**ENVIRONMENT, "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen([*launcher, *arguments], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)


def finish(process, code=0):
    _, stderr = process.communicate(timeout=240)
    assert process.returncode == code, stderr[-3000:]
    return stderr


def rank_of_run(run, rank, seconds=120):
    """Process id of a rank, once the run has saved something."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if (run / "checkpoints" / "last" / "trainer.pt").exists():
            for path in Path("/proc").glob("[0-9]*"):
                with contextlib.suppress(OSError):
                    words = (path / "cmdline").read_bytes().decode().split("\0")
                    settings = (path / "environ").read_bytes().decode().split("\0")
                    if str(run) in words and "torch.distributed.run" not in words and f"LOCAL_RANK={rank}" in settings:
                        return int(path.name)
        time.sleep(0.05)
    raise AssertionError("the run saved nothing")


@pytest.fixture(scope="module")
def genome(tmp_path_factory):
    path = tmp_path_factory.mktemp("genome") / "g.fa"
    bases = torch.randint(0, 4, (20_000,), generator=torch.Generator().manual_seed(0))
    path.write_text(">chr\n" + "".join("ACGT"[i] for i in bases) + "\n")
    return str(path)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
def test_a_killed_rank_ends_the_run_which_goes_on_with_any_number_of_ranks(tmp_path, genome):
    options = ["--fasta", genome, *TOY.split()]
    finish(command(tmp_path, "whole", *options))
    process = command(
        tmp_path, "killed", *options, "--context-parallel", "2", "--set", "train.max_steps=100000", launcher=[*TORCHRUN, "2"]
    )
    os.kill(rank_of_run(tmp_path / "killed", 1), signal.SIGKILL)
    started = time.monotonic()
    stderr = finish(process, code=1)
    assert time.monotonic() - started < 60
    assert "Signal 9 (SIGKILL) received" in stderr or "lost contact with the other processes" in stderr

    process = command(tmp_path, "stopped", *options, "--context-parallel", "2", launcher=[*TORCHRUN, "2"])
    os.kill(rank_of_run(tmp_path / "stopped", 0), signal.SIGKILL)
    finish(process, code=1)
    finish(command(tmp_path, "stopped", "--resume", "--context-parallel", "2", launcher=[*TORCHRUN, "4"]))
    for which in ("best", "last"):
        one, other = weights(tmp_path / "whole", which), weights(tmp_path / "stopped", which)
        for name in one:
            torch.testing.assert_close(one[name], other[name], rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
def test_ctrl_c_ends_all_ranks_with_the_step(tmp_path, genome):
    options = ["--fasta", genome, *TOY.split(), "--set", "train.max_steps=100000", "--devices", "2", "--context-parallel", "2"]
    process = command(tmp_path, "run", *options)
    for rank in (1, 0):
        os.kill(rank_of_run(tmp_path / "run", rank) if rank else process.pid, signal.SIGINT)
    stderr = finish(process, code=130)
    assert "saved. Go on with:" in stderr
    rows = read_history(tmp_path / "run" / "metrics.csv")
    state = torch.load(tmp_path / "run" / "checkpoints" / "last" / "trainer.pt", weights_only=True)
    assert state["global_step"] == rows[-1]["step"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
def test_a_scheduler_that_ends_the_run_gets_a_checkpoint_of_the_step(tmp_path, genome):
    options = ["--fasta", genome, *TOY.split(), "--set", "train.max_steps=100000", "--context-parallel", "2"]
    process = command(tmp_path, "run", *options, launcher=[*TORCHRUN, "2"])
    rank_of_run(tmp_path / "run", 1)
    process.send_signal(signal.SIGTERM)  # torchrun tells its processes, and waits for them
    started = time.monotonic()
    _, stderr = process.communicate(timeout=240)
    assert time.monotonic() - started < 25 and "saved. Go on with:" in stderr, stderr[-3000:]
    rows = read_history(tmp_path / "run" / "metrics.csv")
    state = torch.load(tmp_path / "run" / "checkpoints" / "last" / "trainer.pt", weights_only=True)
    assert state["global_step"] == rows[-1]["step"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
def test_a_process_that_waits_for_one_that_is_gone_ends_soon_when_told_to(tmp_path, genome):
    """One that is stopped stands in for one that is gone: with gloo, unlike NCCL, its end would be noticed."""
    options = ["--fasta", genome, *TOY.split(), "--set", "train.max_steps=100000", "--context-parallel", "2"]
    process = command(tmp_path, "run", *options, launcher=[*TORCHRUN, "2"])
    other, waiting = (rank_of_run(tmp_path / "run", rank) for rank in (1, 0))
    os.kill(other, signal.SIGSTOP)
    time.sleep(3)
    os.kill(waiting, signal.SIGTERM)
    started = time.monotonic()
    while Path(f"/proc/{waiting}/cmdline").is_file() and Path(f"/proc/{waiting}/cmdline").read_bytes():
        assert time.monotonic() - started < 20, "it still waits"
        time.sleep(0.1)
    os.kill(other, signal.SIGKILL)
    assert "lost contact with the other processes of this run" in finish(process, code=1)


@pytest.mark.slow
def test_srun_starts_the_processes_too(tmp_path, genome):
    """Slurm's environment, without Slurm: ranks and the mesh come from it."""
    slurm = {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_NNODES": "1", "SLURM_NODEID": "0"}
    slurm |= {"SLURM_NODELIST": "127.0.0.1", "SLURM_JOB_NAME": "seqlab", "SLURM_JOB_ID": str(os.getpid())}
    options = ["--fasta", genome, *TOY.split(), "--max-steps", "4", "--context-parallel", "2"]
    processes = []
    for rank in range(2):
        launcher = ["env", *(f"{k}={v}" for k, v in slurm.items()), f"SLURM_PROCID={rank}", f"SLURM_LOCALID={rank}"]
        processes.append(command(tmp_path, "run", *options, launcher=[*launcher, sys.executable]))
    lines = [finish(process) for process in processes]
    assert "Trained 4 steps" in lines[0] and "Trained" not in lines[1]


def test_the_scaling_model_counts_what_is_sent():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        from simulate_scaling import GPUS, TOKENS, Machine, Model, step
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))
    halo, state = 3 * 13 + 3 * 12, 12 * 5 + 12 * 4  # numbers a layer, as in the test of the bytes that are sent
    assert sum(Model(d_model=6, d_state=4).payloads()) == 2 * halo + 4 * state
    for tokens in TOKENS:
        rows = [step(Machine(), Model(), n, tokens) for n in GPUS]
        assert all(0 < row["efficiency"] <= 1 for row in rows)
        efficiency = [row["efficiency"] for row in rows]
        assert efficiency == sorted(efficiency, reverse=True), "more GPUs on one sequence are never better used"
