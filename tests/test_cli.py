"""The commands as a user types them: the real job end to end, and one clear line for every wrong input."""

import gzip
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import seqlab
from cli import app
from seqlab.config import load_yaml

ROOT = Path(__file__).resolve().parents[1]
TOY = ["--set", "model.d_model=16", "--set", "model.n_layer=1", "--set", "model.d_state=4", "--context", "64"]
TOY += ["--set", "train.tokens_per_step=512", "--device", "cpu", "--set", "eval.max_order=3"]


def run(*arguments, code=0, within=None):
    """Invoke in this process; returns (stdout, stderr). One line of error and no traceback whenever code is 1."""
    before = os.getcwd()
    os.chdir(within or before)
    try:
        result = CliRunner().invoke(app, [str(a) for a in arguments])
    finally:
        os.chdir(before)
    assert result.exit_code == code, f"{arguments}\n{result.stdout}\n{result.stderr}\n{result.exception!r}"
    if code == 1:
        errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1, result.stderr
        assert "Traceback" not in result.stderr and "unexpected" not in result.stderr, result.stderr
    return result.stdout, result.stderr


def error_of(*arguments, within=None):
    _, stderr = run(*arguments, code=1, within=within)
    return [line for line in stderr.splitlines() if line.startswith("error: ")][0]


def genome(path: Path, length: int = 6000, seed: int = 0, name: str = "chr") -> Path:
    rng = np.random.default_rng(seed)
    bases = np.frombuffer(b"ACGT", np.uint8)[rng.integers(0, 4, length)].tobytes().decode()
    path.write_text(f">{name}\n{bases}\n")
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A small run, made by the command itself."""
    folder = tmp_path_factory.mktemp("trained well")
    genome(folder / "g.fa")
    _, stderr = run("train", "dna", "--fasta", folder / "g.fa", "--out", folder / "run", "--max-steps", 6, *TOY)
    (folder / "said.txt").write_text(stderr)
    return folder / "run"


# -- the job -------------------------------------------------------------------------------------------------------
def test_train_leaves_a_run_that_explains_itself(trained):
    for name in ("config.yaml", "manifest.json", "run.json", "metrics.csv", "report.md", "evaluation.json"):
        assert (trained / name).stat().st_size > 0, name
    for plot in ("evaluation.png", "training.png"):
        assert (trained / "plots" / plot).read_bytes()[:4] == b"\x89PNG"
    report = (trained / "report.md").read_text()
    assert "Markov order 3" in report and "bits/base" in report
    facts = json.loads((trained / "run.json").read_text())
    assert facts["ended"] == "finished" and facts["result"]["steps"] == 6 and facts["torch"]


def test_the_commands_that_train_suggests_work(trained):
    """It named a context of 4096, which a small genome's test split does not hold; blanks in paths were not quoted."""
    said = [shlex.split(line) for line in (trained.parent / "said.txt").read_text().splitlines() if line.startswith("  ")]
    (words,) = [words for words in said if str(trained) in words and "eval" in words]
    assert "--context" in words
    run(*words[words.index("eval") :])


def test_a_run_is_evaluated_on_the_device_that_trained_it(trained, tmp_path, monkeypatch):
    """A run with train.accelerator: cpu, where a GPU is full, was evaluated on the GPU."""
    from tasks.commands import train

    devices, real = [], train.evaluate
    monkeypatch.setattr(train, "evaluate", lambda *given: devices.append(given[-1]) or real(*given))
    run("train", "dna", "--data", trained / "data", "--out", tmp_path / "run", "--max-steps", 1, *TOY)
    assert devices == ["cpu"]


def test_eval_prints_the_model_beside_markov_models(trained):
    stdout, stderr = run("eval", trained, "--context", 32, "--context", "1_00")
    assert "context 32" in stdout and "context 100" in stdout and "Markov order 0" in stdout
    assert "on the same" in stderr


def test_eval_refuses_to_change_what_was_trained(trained):
    """It was taken and counted for nothing."""
    assert "--set model: is as it was in training" in error_of("eval", trained, "--set", "model.n_layer=5")
    assert "--set optim: is as it was in training" in error_of("eval", trained, "--set", "optim.lr=1")


def test_a_run_that_has_ended_is_evaluated_as_resume_says(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    stdout, _ = run("train", "dna", "--resume", "--out", tmp_path / "run", "--set", "eval.max_order=1")
    assert "Markov order 1" in stdout and "Markov order 2" not in stdout


def test_eval_json_on_standard_output_is_json_alone(trained):
    stdout, _ = run("eval", trained, "--context", 64, "--json", "-")
    data = json.loads(stdout)
    assert data["contexts"]["64"]["bases"] == data["markov"]["0"]["bases"] == data["bases"] > 0


def test_eval_on_another_genome_scores_all_of_it(trained, tmp_path):
    genome(tmp_path / "other.fa", 700, seed=3)
    before = (trained / "report.md").read_text()
    stdout, _ = run("eval", trained, "--fasta", tmp_path / "other.fa", "--context", 100, "--json", tmp_path / "e.json")
    data = json.loads((tmp_path / "e.json").read_text())
    assert data["bases"] == 699 and "context 100" in stdout
    assert not list(tmp_path.glob("data*"))
    # its own test split's report stays in its place
    assert (trained / "report.md").read_text() == before and "699 bases" in (trained / "evaluation-other.md").read_text()
    _, stderr = run("eval", trained, "--split", "valid", "--context", 64, "--out", tmp_path / "there")
    assert str(tmp_path / "there" / "evaluation-valid.md") in stderr and (tmp_path / "there" / "evaluation-valid.md").is_file()
    assert not (trained / "evaluation-valid.md").exists()


def test_prep_then_train_then_init_from_it(trained, tmp_path):
    genome(tmp_path / "g.fa")
    stdout, stderr = run("prep", "dna", tmp_path / "g.fa", "--out", tmp_path / "data")
    assert "split train" in stdout and "train dna --data" in stderr
    run("train", "dna", "--data", tmp_path / "data", "--out", tmp_path / "b", "--init", trained, "--max-steps", 1, *TOY)
    assert json.loads((tmp_path / "b" / "run.json").read_text())["init"].endswith("model.safetensors")


def test_bed_and_names_decide_splits(tmp_path):
    genome(tmp_path / "a.fa", 3000, 1, "a")
    genome(tmp_path / "b.fa", 3000, 2, "b")
    run("prep", "dna", tmp_path / "a.fa", tmp_path / "b.fa", "--valid", "b", "--test", "b", "--out", tmp_path / "x", code=1)
    (tmp_path / "s.bed").write_text("a\t0\t3000\ttrain\nb\t0\t1000\tvalid\nb\t1000\t3000\ttest\n")
    run("prep", "dna", tmp_path / "a.fa", tmp_path / "b.fa", "--splits", tmp_path / "s.bed", "--out", tmp_path / "data")
    splits = json.loads((tmp_path / "data" / "manifest.json").read_text())["splits"]
    assert splits == {"train": [[0, 0, 3000]], "valid": [[1, 0, 1000]], "test": [[1, 1000, 3000]]}


def test_killed_and_resumed_on_the_command_line_equals_uninterrupted(tmp_path):
    genome(tmp_path / "g.fa")
    run("prep", "dna", tmp_path / "g.fa", "--out", tmp_path / "data")
    steps = ["--max-steps", "400", "--set", "train.validate_every=20"]
    command = ["train", "dna", "--data", tmp_path / "data", *TOY, *steps, "--seed", "7"]
    run(*command, "--out", tmp_path / "whole")
    process = subprocess.Popen(
        [sys.executable, "-m", "cli", *map(str, command), "--out", str(tmp_path / "killed")],
        cwd=ROOT,
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    saved, deadline = tmp_path / "killed" / "checkpoints" / "last" / "trainer.pt", time.monotonic() + 90
    while not saved.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run was over before it could be killed"
    run("train", "dna", "--resume", "--out", tmp_path / "killed")
    for which in ("last", "best"):
        name = f"checkpoints/{which}/model.safetensors"
        one, other = load_file(tmp_path / "whole" / name), load_file(tmp_path / "killed" / name)
        assert all(np.array_equal(one[key].numpy(), other[key].numpy()) for key in one)


def test_a_genome_that_is_shorter_than_the_presets_context(tmp_path):
    """`train dna --fasta phix174.fa` was refused: blocks of a small genome hold no window of 2,048 bases."""
    small = [word for key in ("d_model=8", "n_layer=1") for word in ("--set", f"model.{key}")]
    words = ["train", "dna", "--fasta", genome(tmp_path / "g.fa", 1500), *small, "--max-steps", 1, "--set", "eval.max_order=1"]
    _, stderr = run(*words, "--out", tmp_path / "run")
    kept = load_yaml(tmp_path / "run" / "config.yaml")["data"]["context"]
    assert f"context of 2,048 is longer than any stretch of the train split: {kept} instead" in stderr and kept & (kept - 1) == 0
    run("train", "dna", "--resume", "--out", tmp_path / "run", "--max-steps", 2)
    assert "does not fit" in error_of(*words, "--out", tmp_path / "x", "--context", 2048)  # what was asked for is not replaced
    assert "does not fit" in error_of(*words, "--out", tmp_path / "x", "--config", "dna_small")


def test_a_genome_in_lower_case_that_counts_for_nothing(tmp_path):
    """Training had no gradient, and the first validation said that there were no bases."""
    path = genome(tmp_path / "g.fa")
    path.write_text("\n".join(line if line.startswith(">") else line.lower() for line in path.read_text().splitlines()))
    words = ["train", "dna", "--fasta", path, *TOY, "--max-steps", 1, "--out", tmp_path / "run"]
    assert "all bases of the train split are lower case" in error_of(*words, "--set", "data.soft_mask_weight=0")
    assert not (tmp_path / "run").exists()
    run(*words, "--set", "data.soft_mask_weight=0.1")


@pytest.mark.parametrize("ignored", [False, True], ids=["terminal", "nohup"])
def test_a_lost_terminal_saves_and_stops_unless_it_does_not_matter(trained, tmp_path, ignored):
    """Closing the terminal, or losing the connection, lost all steps since the last validation."""
    command = ["train", "dna", "--data", trained / "data", *TOY, "--max-steps", "100000", "--set", "train.validate_every=100000", "--set", "train.log_every=1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "cli", *map(str, command), "--out", str(tmp_path / "run")],
        cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL),
    )  # fmt: skip
    try:
        rows, deadline = tmp_path / "run" / "metrics.csv", time.monotonic() + 90
        while not (rows.exists() and rows.read_text().count("\n") > 3) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGHUP)
        if ignored:
            time.sleep(1)
            assert process.poll() is None
        else:
            process.wait(timeout=60)
            assert (tmp_path / "run" / "checkpoints" / "last" / "trainer.pt").is_file()
            assert json.loads((tmp_path / "run" / "run.json").read_text())["ended"] == "interrupted"
    finally:
        process.kill()
        process.wait()


def test_killed_before_the_first_checkpoint_and_resumed_equals_uninterrupted(trained, tmp_path):
    """Nothing was saved yet, so --resume refused."""
    data = ["--data", trained / "data", "--max-steps", 3, *TOY]
    run("train", "dna", *data, "--out", tmp_path / "whole", "--init", trained)
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    shutil.rmtree(tmp_path / "killed" / "checkpoints")
    run("train", "dna", "--resume", "--out", tmp_path / "killed")
    one, other = (load_file(tmp_path / name / "checkpoints/last/model.safetensors") for name in ("whole", "killed"))
    assert all(np.array_equal(one[key].numpy(), other[key].numpy()) for key in one)
    facts = [json.loads((tmp_path / name / "run.json").read_text()) for name in ("whole", "killed")]
    assert facts[0]["init"] == facts[1]["init"] and facts[1]["result"]["steps"] == 3


def test_a_resumed_run_goes_on_to_the_end_that_it_was_last_given(trained, tmp_path):
    """Stopped again after `--resume --max-steps`, a run was over at once when it was resumed as the message says."""
    run("train", "dna", "--data", trained / "data", "--max-steps", 3, *TOY, "--out", tmp_path / "run")
    run("train", "dna", "--resume", "--out", tmp_path / "run", "--max-steps", 5, "--set", "optim.lr=2e-3")
    kept = load_yaml(tmp_path / "run" / "config.yaml")
    assert kept["train"]["max_steps"] == 5 and kept["optim"]["lr"] == 2e-3
    # as a run leaves it that was told to make 7 and killed at its checkpoint after 5
    last = tmp_path / "run" / "checkpoints" / "last" / "config.yaml"
    last.write_text(last.read_text().replace("max_steps: 5", "max_steps: 7"))
    run("train", "dna", "--resume", "--out", tmp_path / "run")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["result"]["steps"] == 7


def test_a_run_is_trained_by_one_process_at_a_time(trained, tmp_path):
    """`--resume` beside the process that was still at it wrote each other's checkpoints over; --overwrite took them away."""
    from tasks.run_directory import held
    from tasks.runs import discard_empty

    shutil.copytree(trained, tmp_path / "run")
    before = (tmp_path / "run" / "run.json").read_bytes()
    script = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from pathlib import Path; from tasks.run_directory import held\n"
    script += f"with held(Path({str(tmp_path / 'run')!r})): print('held', flush=True); sys.stdin.read()"
    other = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert other.stdout.readline() == b"held\n"
        for words in (["--resume"], ["--data", trained / "data", "--overwrite", "--max-steps", 1, *TOY]):
            assert "another process is training this run" in error_of("train", "dna", *words, "--out", tmp_path / "run")
        assert (tmp_path / "run" / "run.json").read_bytes() == before
        shutil.rmtree(tmp_path / "run" / "checkpoints")
        discard_empty(tmp_path / "run")  # what a run that failed does
        assert (tmp_path / "run" / "run.json").is_file()
    finally:
        other.kill()  # as a run that was killed leaves it
        other.wait()
    with held(tmp_path / "run"):
        pass
    discard_empty(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_a_resumed_run_takes_from_itself_is_refused_by_name(trained, tmp_path):
    """--splits, --valid and --test were passed over; of the others all were named, also those that nobody had given."""
    for words, named in (
        (["--test", "chr"], "--test"), (["--splits", tmp_path / "s.bed", "--valid", "chr"], "--splits, --valid"),
        (["--context", 64, "--seed", 0, "--fasta", tmp_path / "g.fa"], "--fasta, --context, --seed"),
    ):  # fmt: skip
        assert error_of("train", "dna", "--resume", "--out", trained, *words).endswith(f"run's own data and settings; leave out {named}")


@pytest.mark.parametrize("change", ["model.d_model=24", "model.direction=bidirectional", "data.context=32", "train.seed=9"])
def test_a_resumed_run_stays_what_it_is(trained, change):
    """A model of another size was a RuntimeError, "unexpected"; the others went on as another run."""
    before = (trained / "run.json").read_bytes()
    _, stderr = run("train", "dna", "--resume", "--out", trained, "--set", change, code=1)
    assert f"--set {change}: --resume goes on with the run's own" in stderr and "unexpected" not in stderr
    assert (trained / "run.json").read_bytes() == before


def test_a_run_killed_while_its_data_was_prepared_can_be_started_again(tmp_path):
    """Its directory was "already used", and "not a run directory" for --overwrite."""
    genome(tmp_path / "g.fa")
    (tmp_path / "run" / ".data.abc.partial").mkdir(parents=True)
    run("train", "dna", "--fasta", tmp_path / "g.fa", "--out", tmp_path / "run", "--max-steps", 1, *TOY)
    assert (tmp_path / "run" / "report.md").is_file() and not (tmp_path / "run" / ".data.abc.partial").exists()
    assert not list(tmp_path.glob(".run*"))


def test_splits_without_bases_are_refused_before_training_and_a_missing_test_split_is_no_error(tmp_path):
    """Both were errors at the end, when the model was trained."""
    rng = np.random.default_rng(0)
    one, other = ("".join(rng.choice(list("ACGT"), 1000)) for _ in range(2))
    (tmp_path / "g.fa").write_text(f">a\n{one}\n>b\n{other}\n>n\n{'N' * 1000}\n")
    train = ["train", "dna", "--fasta", tmp_path / "g.fa", *TOY, "--max-steps", 1, "--out", tmp_path / "run"]
    for splits, empty in ((("b", "n"), "test"), (("n", "b"), "valid")):
        message = error_of(*train, "--valid", splits[0], "--test", splits[1])
        assert f"the {empty} split holds no A, C, G or T" in message and not (tmp_path / "run").exists()
    (tmp_path / "s.bed").write_text("n\t0\t1000\ttrain\na\t0\t1000\tvalid\nb\t0\t1000\ttest\n")
    assert "the train split holds no A, C, G or T" in error_of(*train, "--splits", tmp_path / "s.bed")
    _, stderr = run(*train, "--valid", "b")
    assert "no test split: evaluated on the validation split" in stderr
    assert "bases of the valid split" in (tmp_path / "run" / "report.md").read_text()


def test_lengths_that_cannot_be_evaluated_are_refused_before_training(tmp_path):
    genome(tmp_path / "g.fa")
    train = ["train", "dna", "--fasta", tmp_path / "g.fa", *TOY, "--max-steps", 1, "--out", tmp_path / "run"]
    message = error_of(*train, "--set", "eval.contexts=[64, 100000]")
    assert "eval.contexts: 100,000: the test split of" in message and "windows of at most" in message
    assert not (tmp_path / "run").exists()


def test_a_run_and_its_dataset_may_move(trained, tmp_path):
    """A run of --fasta has its dataset inside, and did not find it after a move; a dataset that had moved could not be named."""
    shutil.copytree(trained, tmp_path / "run")
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    (tmp_path / "run" / "run.json").write_text(json.dumps({**facts, "dataset": str(tmp_path / "gone")}))
    run("eval", tmp_path / "run", "--context", 64)
    run("train", "dna", "--resume", "--out", tmp_path / "run", "--max-steps", 7)
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert facts["dataset"] == str((tmp_path / "run" / "data").resolve()) and facts["result"]["steps"] == 7
    (tmp_path / "run" / "data").rename(tmp_path / "moved")
    before = (tmp_path / "run" / "report.md").read_text()
    assert "if it has moved, say where: --data DIR" in error_of("eval", tmp_path / "run", "--context", 64)
    assert "if it has moved" in error_of("train", "dna", "--resume", "--out", tmp_path / "run")
    _, stderr = run("eval", tmp_path / "run", "--context", 64, "--data", tmp_path / "moved")
    assert "run/report.md" in stderr and (tmp_path / "run" / "report.md").read_text() != before  # its own test split


def test_a_number_of_steps_is_not_bounded_by_the_preset_s_time():
    """The learning rate followed the clock of a preset with max_minutes, and no two runs of as many steps were the same."""
    from tasks.commands.settings import load_config, train_options
    from tasks.language_modeling import DnaConfig

    def minutes(**given):
        return load_config(DnaConfig, "dna_demo", [], train_options(**given)).train.max_minutes

    assert (minutes(), minutes(max_steps=9), minutes(max_steps=9, max_minutes=2.0)) == (2.5, None, 2.0)


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path):
    genome(tmp_path / "g.fa")
    run("prep", "dna", tmp_path / "g.fa", "--out", tmp_path / "data")
    process = subprocess.Popen(
        [sys.executable, "-m", "cli", "train", "dna", "--data", str(tmp_path / "data"), *TOY, "--max-steps", "100000"]
        + ["--set", "train.validate_every=25", "--out", str(tmp_path / "run")],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )
    saved, deadline = tmp_path / "run" / "checkpoints" / "last" / "trainer.pt", time.monotonic() + 90
    while not saved.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr[-1500:]
    assert "saved. Go on with:  " in stderr and "train dna --resume --out" in stderr and "Traceback" not in stderr
    steps = json.loads((tmp_path / "run" / "run.json").read_text())["result"]["steps"]
    run("train", "dna", "--resume", "--out", tmp_path / "run", "--max-steps", steps + 3)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["result"]["steps"] == steps + 3


@pytest.mark.parametrize("module", ["typer", "tasks.commands.terminal"])
def test_ctrl_c_while_the_command_line_is_imported_is_one_line(module):
    script = f"""
import signal, sys
class CtrlC:
    def find_spec(self, name, *rest):
        if name == {module!r}:
            try:
                signal.raise_signal(signal.SIGINT)
            except KeyboardInterrupt as error:
                raise RuntimeError from error
sys.meta_path.insert(0, CtrlC())
import cli
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "Stopped by Ctrl-C.\n")


@pytest.mark.parametrize("part", ["typer.main.get_command", "typer.core.TyperGroup.make_context", "typer.core.TyperGroup.invoke"])
def test_ctrl_c_before_a_command_has_begun_is_one_line(part):
    """While typer built the commands there was a traceback; of an import that it needs to read options it made a RuntimeError."""
    script = f"""
import signal, typer.main, cli
def press(*arguments, **options):
    try:
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt as error:
        raise RuntimeError from error
{part} = press
cli.app(["doctor"])
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "Stopped by Ctrl-C.\n")


def test_ctrl_c_in_an_import_that_swallows_it_comes_after_that(tmp_path, monkeypatch):
    """An import of training did: the run went on to its end."""
    import typer

    from tasks.commands.options import Json
    from tasks.commands.terminal import command

    (tmp_path / "swallows.py").write_text("import signal\ntry:\n    signal.raise_signal(signal.SIGINT)\nexcept BaseException:\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    group = typer.Typer()

    @command(group, "work")
    def work(json_out: Json = None) -> None:
        import swallows  # noqa: F401

        time.sleep(10)

    result = CliRunner().invoke(group, [])
    assert (result.exit_code, result.stderr) == (130, "Stopped by Ctrl-C.\n")


@pytest.mark.parametrize("is_swallowed", [False, True])
def test_ctrl_c_in_a_command_is_one_line_whatever_becomes_of_the_exception(is_swallowed):
    """numpy's import swallowed it, and was then "cannot load module more than once per process (unexpected; ...)"."""
    import typer

    from tasks.commands.options import Json
    from tasks.commands.terminal import command

    group = typer.Typer()

    @command(group, "work")
    def work(json_out: Json = None) -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            if not is_swallowed:
                raise
        raise ImportError("cannot load module more than once per process")

    result = CliRunner().invoke(group, [])
    assert (result.exit_code, result.stderr) == (130, "Stopped by Ctrl-C.\n")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_doctor_checks_every_back_end():
    stdout, _ = run("doctor")
    for word in ("selective_scan", "causal_conv1d", "reference", "cpu", "mamba_ssm", "torch + torchaudio"):
        assert word in stdout
    data = json.loads(run("doctor", "--json", "-")[0])
    found = {(f["section"].removeprefix("back ends of "), f["name"]): f for f in data["findings"] if f["section"].startswith("back ends of ")}
    folders = {path.parent.name for path in (ROOT / "seqlab" / "ops").glob("*/__init__.py")}
    assert {op for op, _ in found} == folders  # no operator is left out
    for op in folders - {"block"}:
        assert found[op, "reference"]["status"] == found[op, "cpu"]["status"] == "ok"
    if not torch.cuda.is_available():
        reason = found["hidden_markov", "cuda"]["detail"]
        assert reason and reason == found["block", "cuda"]["detail"] == found["selective_scan", "cuda"]["detail"]


def test_doctor_reports_a_broken_pair_of_torch_and_torchaudio(monkeypatch):
    import importlib

    from seqlab import doctor

    def broken(name, *rest):
        if name == "torchaudio":
            raise RuntimeError("Detected that PyTorch and TorchAudio were compiled with different CUDA versions.")
        return real(name, *rest)

    real = importlib.import_module
    monkeypatch.setattr(doctor.importlib, "import_module", broken)
    finding = doctor.torch_and_torchaudio()
    assert finding.status == "problem" and "different CUDA versions" in finding.detail
    assert "pip install" in finding.remedy


COMMANDS = "prep dna, prep species, prep labelled, prep benchmark, prep audio, train dna, train species, train classify, train audio, train synthetic"
COMMANDS += ", predict, embed, score, eval, generate audio, generate dna, plan, bench scan, bench generate, bench train, import, export, doctor"


@pytest.mark.parametrize("words", [[], ["prep"], ["train"], *(name.split() for name in COMMANDS.split(", "))], ids=" ".join)
def test_help_is_there_and_shows_an_example(words):
    stdout, _ = run(*words, "--help")
    assert "Usage" in stdout
    if words and words not in (["prep"], ["train"]):
        assert "Example:" in stdout and "--json" in stdout and "--debug" in stdout and "--seed" in stdout


@pytest.mark.parametrize("both", [False, True], ids=["to a file", "to the terminal"])
@pytest.mark.parametrize("command", ["embed", "score"])
def test_rows_go_to_standard_output_beside_a_progress_bar(trained, tmp_path, command, both):
    """`seqlab embed RUN reads.fa > reads.tsv` at a terminal wrote an empty file: the bar took standard output for its own."""
    import pty

    name, letters = "chr1", "ACGT" * 50
    (tmp_path / "r.fa").write_text(f">{name}\n{letters}\n>r2\n{letters[:90]}\n")
    (tmp_path / "v.vcf").write_text(f"##fileformat=VCFv4.2\n#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\n{name}\t5\t.\tA\tC\t.\t.\t.\n")
    words = ["embed", trained, tmp_path / "r.fa"] if command == "embed" else ["score", trained, tmp_path / "v.vcf", "--fasta", tmp_path / "r.fa"]
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "cli", *map(str, words)], cwd=ROOT, stderr=theirs, stdout=theirs if both else subprocess.PIPE,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "80"},
    )  # fmt: skip
    os.close(theirs)
    shown = b""
    try:
        while block := os.read(ours, 65536):
            shown += block
    except OSError:  # the other side is closed
        pass
    rows = shown.replace(b"\r\n", b"\n") if both else process.stdout.read()
    assert process.wait() == 0, shown
    lines = [line.split("\t") for line in rows.decode().splitlines()]
    if command == "embed":
        assert [line[0] for line in lines if len(line) > 5] == ["name", name, "r2"]
    else:
        assert [line[1] for line in lines if line[0] == name and "SEQLAB=" in line[-1]] == ["5"]
    assert both or (b"embedding" in shown or b"scoring" in shown)


def test_there_is_no_bar_where_there_is_no_terminal(trained, tmp_path):
    """With FORCE_COLOR, which machines that test set, logs were full of bars."""
    (tmp_path / "r.fa").write_text(">a\nACGTACGTAC\n")
    command = [sys.executable, "-m", "cli", "embed", str(trained), str(tmp_path / "r.fa")]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "FORCE_COLOR": "1"}, capture_output=True, text=True, check=True)
    assert "embedding" not in done.stderr and "\x1b[?25l" not in done.stderr and done.stdout.count("\n") == 2


def test_wide_tables_are_not_cut(capsys):
    """Where no terminal says how wide it is there are 80 columns, and nine cells of a table were "sh…", "str…"."""
    from tasks.commands.terminal import print_table

    print_table("title", [f"a long name {i}" for i in range(9)], [["1,000,000"] * 9])
    shown = capsys.readouterr().out
    assert "…" not in shown and all(f"a long name {i}" in shown for i in range(9))


def test_version_and_order_of_the_commands():
    assert run("--version")[0] == f"seqlab {seqlab.__version__}\n"
    found = [line.split()[1] for line in run("--help")[0].splitlines() if line.startswith("│ ") and line[2] not in " -"]
    assert found[0] == "doctor" and found.index("prep") < found.index("train") < found.index("eval") < found.index("bench")


# -- wrong input ---------------------------------------------------------------------------------------------------
def fasta_cases(folder: Path) -> dict[str, tuple[Path, str]]:
    good = genome(folder / "good.fa").read_bytes()
    packed = gzip.compress(good)
    cases = {
        "missing": (None, "no such file"),
        "empty": (b"", "is empty"),
        "truncated": (packed[: len(packed) // 2], "truncated"),
        "corrupt": (packed[:40] + b"\xff" * 60 + packed[100:], ""),
        "binary": (bytes(range(256)) * 20, ""),
        "text": (b"hello world\nthis is text\n", ""),
        "protein": (b">p\nMKVLAAGIVGLPNVGKSTLFNALTKAGIEAANYPFCTIEPNTGVVPMPDPRLDALAEIVKPERTLPTTMEFVDIAGLVAGASKGEGLGNKF\n", "p"),
        "duplicate": (b">a\nACGT\n>a\nACGT\n", "a"),
        "fastq": (b"@r\nACGT\n+\nIIII\n", "FASTQ"),
        "headers only": (b">a\n>b\n", "no sequence"),
        "short": (b">a\n" + b"ACGT" * 30 + b"\n", "context"),
    }
    found = {}
    for name, (data, expected) in cases.items():
        path = folder / f"{name.replace(' ', '_')}.fa"
        if name in ("truncated", "corrupt"):
            path = path.with_suffix(".fa.gz")
        if data is not None:
            path.write_bytes(data)
        found[name] = (path, expected)
    return found


CASES = ["missing", "empty", "truncated", "corrupt", "binary", "text", "protein", "duplicate", "fastq", "headers only"]


@pytest.mark.parametrize("case", CASES + ["short"])
def test_wrong_fasta_is_one_line_and_leaves_nothing(case, tmp_path):
    path, expected = fasta_cases(tmp_path)[case]
    (tmp_path / "work").mkdir()
    message = error_of("train", "dna", "--fasta", path, *TOY, "--context", 128, within=tmp_path / "work")
    assert expected.lower() in message.lower(), message
    assert not list((tmp_path / "work").iterdir()), "a refused run leaves nothing behind"
    if case != "short":
        message = error_of("prep", "dna", path, "--out", tmp_path / "work" / "data")
        assert expected.lower() in message.lower() and not list((tmp_path / "work").iterdir())


@pytest.mark.parametrize(
    "bed, expected",
    [
        ("chrX\t0\t10\ttrain\n", "chrX"),
        ("chr\t0\t100000\ttrain\n", "6,000"),
        ("chr\t0\t300\ttrain\nchr\t200\t400\ttest\n", "overlap"),
        ("chr\t0\t300\tlearn\n", "learn"),
        ("chr\t5\n", "line 1"),
        ("chr\tx\t9\ttrain\n", "line 1"),
        ("chr\t0\t3000\ttest\nchr\t3000\t6000\tvalid\n", "train"),
        ("", ""),
    ],
)
def test_wrong_bed_is_one_line_and_leaves_nothing(bed, expected, tmp_path):
    genome(tmp_path / "g.fa")
    (tmp_path / "s.bed").write_text(bed)
    message = error_of("prep", "dna", tmp_path / "g.fa", "--splits", tmp_path / "s.bed", "--out", tmp_path / "data")
    assert expected.lower() in message.lower(), message
    assert {p.name for p in tmp_path.iterdir()} == {"g.fa", "s.bed"}


def test_ambiguous_bases_are_counted_and_no_error(tmp_path):
    bases = "ACGTRYKMN" * 700
    (tmp_path / "g.fa").write_text(f">chr\n{bases}\n")
    run("prep", "dna", tmp_path / "g.fa", "--out", tmp_path / "data")
    counts = json.loads((tmp_path / "data" / "manifest.json").read_text())["counts"]
    assert counts["other"] == 4 * 700 and counts["N"] == 700


def test_splits_that_are_empty_are_told_when_they_are_made(tmp_path):
    """`prep` was content, and `train` refused its dataset."""
    genome(tmp_path / "a.fa", 3000, 1, "a")
    genome(tmp_path / "b.fa", 3000, 2, "b")
    prep = ["prep", "dna", tmp_path / "a.fa", tmp_path / "b.fa", "--overwrite", "--out", tmp_path / "data"]
    for words, valid, test in ((["--test", "b"], True, False), (["--valid", "b"], False, True), ([], False, False)):
        _, stderr = run(*prep, *words)
        assert ("Nothing validates" in stderr, "Nothing tests" in stderr) == (valid, test)


def test_scraps_of_an_assembly_may_be_left_out_of_any_dataset(tmp_path):
    """`prep dna` had no --min-length, which its own messages named."""
    for name in "ab":
        text = genome(tmp_path / f"{name}.fa", seed=ord(name), name=name).read_text()
        (tmp_path / f"{name}.fa").write_text(text + f">{name}2\n{'ACGTTGCA' * 10}\n")
    for words in (["dna", tmp_path / "a.fa"], ["species", f"a={tmp_path / 'a.fa'}", f"b={tmp_path / 'b.fa'}"]):
        out = tmp_path / words[0]
        _, stderr = run("prep", *words, "--out", out, "--min-length", 100)
        skipped = json.loads((out / "manifest.json").read_text())["skipped"]
        n = len(words) - 1
        assert skipped == {"sequences": n, "bases": 80 * n, "min_length": 100} and f"{n} sequence" in stderr and f"{80 * n} bases in all" in stderr


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["--config", "dna_smal"], "did you mean dna_small"),
        (["--set", "model.d_modle=3"], "model.d_modle: unknown; did you mean d_model?"),
        (["--set", "model.d_model=wide"], "model.d_model: expected a whole number, got wide"),
        (["--set", "model.strand=equivariant"], "needs direction: bidirectional"),
        (["--set", "nonsense"], "--set nonsense: expected KEY=VALUE"),
        (["--context", "many"], "--context many: expected a whole number"),
        (["--precision", "fp16"], "float16 is refused"),
        (["--precision", "int3"], "use fp32, bf16 or auto"),
        (["--device", "gpu"], "--device gpu: unknown; use auto, cpu or cuda"),
        (["--max-minutes", "-1"], "max_minutes: must be above 0"),
        (["--devices", "0"], "devices: must be 1 or more"),
        (["--devices", "3"], "cannot be shared evenly by 3 devices"),
        (["--init", "nowhere"], "nowhere: no such run"),
        (["--fasta", "x.fa"], "--data and --fasta: give one of them"),
    ],
)
def test_wrong_options_are_one_line(trained, arguments, expected, tmp_path):
    base = ["train", "dna", "--data", trained / "data", *TOY, "--out", tmp_path / "new"]
    assert expected in error_of(*base, *arguments)
    assert not list(tmp_path.iterdir())


def test_a_gpu_that_is_not_there(trained, tmp_path):
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU; the message is for machines without")
    base = ["train", "dna", "--data", trained / "data", *TOY, "--out", tmp_path / "new"]
    assert "torch sees no GPU here" in error_of(*base, "--set", "train.accelerator=gpu")
    assert "torch sees no GPU here" in error_of(*base, "--device", "cuda")
    assert "torch sees no GPU here" in error_of("eval", trained, "--device", "cuda")
    assert not list(tmp_path.iterdir())


def test_used_and_unwritable_output_folders(trained, tmp_path):
    base = ["train", "dna", "--data", trained / "data", *TOY, "--max-steps", 1]
    before = sorted(p.name for p in trained.rglob("*"))
    assert "already used" in error_of(*base, "--out", trained)
    assert before == sorted(p.name for p in trained.rglob("*"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    assert "not a run directory" in error_of(*base, "--out", tmp_path / "mine", "--overwrite")
    assert (tmp_path / "mine" / "thesis.txt").exists()
    assert "error: " in error_of("prep", "dna", genome(tmp_path / "g.fa"), "--out", "/proc/nowhere/data")
    assert "error: " in error_of(*base, "--out", "/proc/nowhere/run")
    (tmp_path / "file").write_text("x")
    assert "error: " in error_of(*base, "--out", tmp_path / "file")


def test_overwrite_loses_the_old_run_only_to_a_new_one(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "old")
    before = (tmp_path / "old" / "run.json").read_bytes()
    base = ["train", "dna", *TOY, "--max-steps", 1, "--out", tmp_path / "old", "--overwrite"]
    (tmp_path / "bad.fa").write_text(">a\nACGT\n>a\nACGT\n")
    for arguments, expected in (
        (["--data", trained / "data", "--init", "nowhere"], "no such run"),
        (["--data", trained / "data", "--context", 5000, "--set", "train.tokens_per_step=5000"], "does not fit"),
        (["--fasta", tmp_path / "bad.fa"], "a"),
        (["--data", tmp_path / "old" / "data"], "which --overwrite would replace"),
        (["--data", trained / "data", "--init", tmp_path / "old"], "which --overwrite would replace"),
    ):
        assert expected in error_of(*base, *arguments)
        assert (tmp_path / "old" / "run.json").read_bytes() == before
        assert {p.name for p in tmp_path.iterdir()} == {"old", "bad.fa"}
    run(*base, "--data", trained / "data")
    assert (tmp_path / "old" / "run.json").read_bytes() != before
    assert {p.name for p in tmp_path.iterdir()} == {"old", "bad.fa"}


def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(trained, tmp_path):
    """A limit on file size stands in for a full disk: the write fails the same way, with an OSError."""
    resource = pytest.importorskip("resource", reason="needs a Unix system")
    genome(tmp_path / "big.fa", 400_000)
    data = trained / "data"
    (tmp_path / "w").mkdir()

    def limit(size):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    for arguments, size in (
        (["prep", "dna", str(tmp_path / "big.fa"), "--out", str(tmp_path / "w" / "d")], 100_000),
        (["train", "dna", "--data", str(data), *TOY, "--max-steps", "2", "--out", str(tmp_path / "w" / "r")], 4_000),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "cli", *arguments],
            cwd=ROOT,
            capture_output=True,
            text=True,
            preexec_fn=lambda size=size: limit(size),
            env={**os.environ, "SEQLAB_BACKEND": "reference", "PYTHONDONTWRITEBYTECODE": "1"},
        )
        assert done.returncode == 1, done.stderr[-1000:]
        errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and "Traceback" not in done.stderr, done.stderr[-2000:]
        assert not list((tmp_path / "w").iterdir()), done.stderr


def test_damaged_and_foreign_checkpoints(trained, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(trained, broken)
    weights = broken / "checkpoints" / "best" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "damaged" in error_of("eval", broken)
    shutil.copytree(trained, tmp_path / "other")
    path = tmp_path / "other" / "checkpoints" / "best" / "config.yaml"
    path.write_text(path.read_text().replace("d_model: 16", "d_model: 24"))
    assert "in this model" in error_of("eval", tmp_path / "other")
    assert "no such run" in error_of("eval", tmp_path / "none")
    assert "holds no checkpoint" in error_of("eval", tmp_path)
    assert "--resume" in error_of("train", "dna", "--resume", within=tmp_path)
    damaged = tmp_path / "damaged"
    shutil.copytree(trained / "data", damaged)
    (damaged / "tokens.bin").write_bytes(b"\x07" * 10)
    assert "damaged dataset" in error_of("train", "dna", "--data", damaged, *TOY, "--out", tmp_path / "n")


def test_a_run_of_another_version_that_cannot_be_read_says_so(trained, tmp_path):
    """It belonged "to another model", whose config was to be used: its own. --resume was a RuntimeError, "unexpected"."""
    shutil.copytree(trained, tmp_path / "run")
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    (tmp_path / "run" / "run.json").write_text(json.dumps({**facts, "seqlab": "0.0.9", "git": "0123456789ab"}))
    for weights in (tmp_path / "run").glob("checkpoints/*/model.safetensors"):
        save_file({**load_file(weights), "head.scale": torch.zeros(2)}, weights)
    advice = f"the run was written by seqlab 0.0.9 (0123456789ab), this is seqlab {seqlab.__version__}"
    for words in (["eval", tmp_path / "run"], ["train", "dna", "--resume", "--out", tmp_path / "run"]):
        message = error_of(*words)
        assert "head.scale is there and not in this model" in message and advice in message and "use that version, or train it again" in message
    for config in (tmp_path / "run").glob("**/config.yaml"):
        config.write_text(config.read_text().replace("d_model:", "width:"))
    for words in (["eval", tmp_path / "run"], ["train", "dna", "--resume", "--out", tmp_path / "run"]):
        message = error_of(*words)
        assert "model.width: unknown" in message and advice in message


def test_a_resumed_run_is_checked_by_names_and_shapes_before_its_weights_are_read(trained, tmp_path, monkeypatch):
    from seqlab.training import checkpoint
    from tasks import runs

    shutil.copytree(trained, tmp_path / "run")
    weights = tmp_path / "run" / "checkpoints" / "last" / "model.safetensors"
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "load_file", lambda path: pytest.fail(f"{path} was read"))
        runs.check_weights(tmp_path / "run")
    whole, config = weights.read_bytes(), weights.with_name("config.yaml")
    for length in (4, 1000, len(whole) - 1):  # the header's length, the header, the last weight
        weights.write_bytes(whole[:length])
        assert "damaged or not a safetensors file" in error_of("train", "dna", "--resume", "--out", tmp_path / "run")
    weights.write_bytes(whole)
    config.write_text(config.read_text().replace("d_model: 16", "d_model: 24"))
    assert "is [32, 4] there and [48, 4] in this model" in error_of("train", "dna", "--resume", "--out", tmp_path / "run")


def test_loss_turning_nan_is_one_line_and_keeps_the_last_good_checkpoint(trained, tmp_path):
    # a learning rate that no model survives
    sets = ["--set", "optim.lr=1e30", "--set", "optim.clip=0", "--set", "optim.warmup=0", "--set", "train.validate_every=1"]
    message = error_of("train", "dna", "--data", trained / "data", *TOY, *sets, "--max-steps", 50, "--out", tmp_path / "r")
    assert "step " in message and "batch: windows at chr:" in message and "optim.lr" in message
    kept = load_file(tmp_path / "r" / "checkpoints" / "last" / "model.safetensors")
    assert kept


@pytest.mark.parametrize("context, expected", [("0", "must be 2 or more"), ("x", "expected a whole number"), ("9999", "the longest")])
def test_eval_at_an_impossible_context(trained, context, expected):
    assert expected in error_of("eval", trained, "--context", context)


def test_a_preset_that_does_not_exist_is_named_as_it_was_typed(tmp_path):
    """`seqlab plan NAME` was told of a --config that plan does not have."""
    told = "no such file or preset; did you mean dna_small? presets: "
    for words in (["plan", "dna_smal"], ["bench", "train", "dna_smal"]):
        assert error_of(*words, within=tmp_path).startswith(f"error: dna_smal: {told}")
    assert error_of("train", "dna", "--config", "dna_smal", within=tmp_path).startswith(f"error: --config dna_smal: {told}")


def test_standard_output_is_for_one_of_two(trained, tmp_path):
    genome(tmp_path / "x.fa", 100)
    for words, taken in ((["generate", "dna", trained], "FASTA"), (["embed", trained, tmp_path / "x.fa"], "table")):
        assert f"--json -: standard output is taken by the {taken}; give --out FILE" in error_of(*words, "--json", "-")


def test_a_back_end_that_cannot_be_had_is_one_line(trained, monkeypatch):
    import torch

    monkeypatch.setenv("SEQLAB_BACKEND", "refrence")
    assert "SEQLAB_BACKEND 'refrence' is not a back end; allowed: auto, " in error_of("eval", trained, "--context", 32)
    if not torch.cuda.is_available():
        monkeypatch.setenv("SEQLAB_BACKEND", "cuda")
        message = error_of("eval", trained, "--context", 32)
        assert "back end 'cuda' (asked for by SEQLAB_BACKEND) cannot run this" in message and "reference: can run this" in message


def test_debug_shows_the_traceback(tmp_path):
    result = CliRunner().invoke(app, ["eval", str(tmp_path / "none"), "--debug"])
    assert result.exit_code == 1 and "Traceback" in result.stderr


def test_importing_the_library_costs_torch_alone():
    script = (
        "import sys, seqlab, seqlab.ops, seqlab.model\n"
        "heavy = {'numba', 'lightning', 'typer', 'triton', 'pyfaidx', 'Bio', 'matplotlib', 'torchaudio', 'transformers'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"
    again = subprocess.run(
        [sys.executable, "-c", "import typer\n" + script], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert "typer" in again, "this test can fail"


def test_reading_a_run_costs_neither_lightning_nor_plots(trained):
    """They take seconds, which `predict` and `generate` would pay as well."""
    heavy = "{'lightning', 'matplotlib', 'sklearn', 'torchaudio', 'transformers'}"
    script = "import sys, tasks.audio_generation, tasks.classification, tasks.species\nfrom tasks.runs import load_run\n"
    script += f"load_run({str(trained)!r})\nprint(sorted({heavy} & set(sys.modules)))"
    for first, expected in (("", "[]"), ("import lightning\n", "'lightning'")):
        done = subprocess.run([sys.executable, "-c", first + script], cwd=ROOT, capture_output=True, text=True, check=True)
        assert expected in done.stdout


def test_help_needs_neither_torch_nor_numpy():
    script = "import sys\nfrom cli import app\ntry:\n    app(['train', 'dna', '--help'])\nexcept SystemExit:\n    pass\n"
    script += "print(sorted({'torch', 'numpy', 'yaml', 'tasks.runs', 'tasks.commands.train'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "['tasks.commands.train']"


@pytest.mark.parametrize("task", ["dna", "audio", "species", "classify"])
def test_what_is_no_dataset_is_one_line_before_anything_else(task, tmp_path):
    stdout, stderr = run("train", task, "--data", tmp_path / "none", "--out", tmp_path / "out", code=1)
    assert not stdout and len(stderr.splitlines()) == 1 and stderr.startswith("error: ") and "no such dataset" in stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("task", ["dna", "audio", "species", "classify"])
def test_a_dataset_of_another_kind_is_one_line_before_anything_else(task, trained, tmp_path):
    shutil.copytree(trained / "data", tmp_path / "data")
    manifest = json.loads((tmp_path / "data" / "manifest.json").read_text())
    kind = "audio" if task == "dna" else "dna"
    (tmp_path / "data" / "manifest.json").write_text(json.dumps({**manifest, "kind": kind}))
    stdout, stderr = run("train", task, "--data", tmp_path / "data", "--out", tmp_path / "out", code=1)
    assert not stdout and len(stderr.splitlines()) == 1 and f"is a dataset of kind '{kind}'" in stderr
    assert not (tmp_path / "out").exists()
    if task == "dna":
        assert f"is a dataset of kind '{kind}'" in error_of("eval", trained, "--data", tmp_path / "data")


def test_init_makes_the_model_of_that_run_unless_a_config_says_what_it_is(trained, tmp_path):
    base = ["train", "dna", "--data", trained / "data", "--init", trained, "--max-steps", 1]
    base += [*TOY[TOY.index("--context") :], "--out", tmp_path / "new"]
    run(*base)
    theirs, ours = (load_yaml(folder / "config.yaml")["model"] for folder in (trained, tmp_path / "new"))
    assert theirs == ours and ours["d_model"] == 16
    assert "in this model" in error_of(*base, "--overwrite", "--config", "dna_small", "--set", "model.d_model=24")
    path = tmp_path / "other" / "model.safetensors"
    shutil.copytree(trained / "checkpoints" / "best", path.parent)
    path.with_name("config.yaml").write_text("task: audio\n")
    assert "is of a run of `train audio`; start from one of train dna" in error_of(*base, "--overwrite", "--init", path)
    path.with_name("config.yaml").unlink()
    assert "no config.yaml beside" in error_of("eval", path)


def test_results_that_could_not_be_written_are_refused_before_the_work(trained, tmp_path):
    (tmp_path / "file").write_text("x")
    for arguments in (["eval", trained], ["doctor"], ["prep", "dna", trained / "simulated.fa", "--out", tmp_path / "data"]):
        message = error_of(*arguments, "--json", tmp_path)
        assert message == f"error: --json {tmp_path}: is a directory; give a file in it, or - for standard output"
    assert f"{tmp_path / 'file'} is not a directory" in error_of("eval", trained, "--json", tmp_path / "file" / "x.json")
    assert f"{tmp_path / 'file'} is not a directory" in error_of("eval", trained, "--out", tmp_path / "file")
    if os.geteuid():
        shutil.copytree(trained, tmp_path / "run")
        (tmp_path / "run").chmod(0o500)
        assert "is not writable; give --out DIR" in error_of("eval", tmp_path / "run")
        (tmp_path / "run").chmod(0o700)
        shutil.rmtree(tmp_path / "run")
    assert {p.name for p in tmp_path.iterdir()} == {"file"}


def test_a_file_that_was_named_is_replaced_with_overwrite_alone(trained, tmp_path):
    """--json, --plot and eval's --out took the place of what was there, without a word."""
    (tmp_path / "r.fa").write_text(">a\nACGTACGTAC\n")
    scan = ["bench", "scan", "--max-length", "4", "--min-length", "2", "--d-inner", 2, "--d-state", 1, "--no-attention", "--seconds", "0.001"]
    kept, out = tmp_path / "kept.json", tmp_path / "out"
    commands = (
        (["embed", trained, tmp_path / "r.fa"], "--out", "e.tsv"),
        (["eval", trained, "--context", 64, "--set", "eval.max_order=1"], "--out", "there"),
        (["generate", "dna", trained, "--length", 5], "--out", "d.fa"),
        (["export", trained], "--out", "hf"),
        ([*scan, "--device", "cpu"], "--plot", "p.png"),
    )
    for words, option, name in commands:
        command = [*words, option, out / name]
        kept.write_text("years of work")
        assert f"--json {kept}: exists; choose another name, or add --overwrite" in error_of(*command, "--json", kept)
        assert kept.read_text() == "years of work" and not out.exists()
        run(*command, "--json", kept, "--overwrite")
        assert json.loads(kept.read_text())
        assert "exists; choose another" in error_of(*command)
        run(*command, "--overwrite")
        shutil.rmtree(out)
    assert "is what --out writes" in error_of("embed", trained, tmp_path / "r.fa", "--out", out / "e.tsv", "--json", out / ".." / "out" / "e.tsv")
    (tmp_path / "link.tsv").symlink_to(kept)  # written through, so what it leads to counts
    assert "exists; choose another" in error_of("embed", trained, tmp_path / "r.fa", "--out", tmp_path / "link.tsv")


def test_overwrite_takes_no_run_that_is_resumed(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    (tmp_path / "kept.json").write_text("years of work")
    resume = ["train", "dna", "--resume", "--out", tmp_path / "run", "--max-steps", 7, "--json", tmp_path / "kept.json"]
    assert "exists; choose another" in error_of(*resume)
    run(*resume, "--overwrite")
    for path in ("kept.json", "run/run.json"):
        assert json.loads((tmp_path / path).read_text())["result"]["steps"] == 7


def test_a_run_file_that_is_no_table_and_a_damaged_trainer_state(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    state = tmp_path / "run" / "checkpoints" / "last" / "trainer.pt"
    state.write_bytes(b"junk" * 100)
    weights = state.with_name("model.safetensors")
    assert f"start a new run from its weights: --init {weights}" in error_of("train", "dna", "--resume", "--out", tmp_path / "run")
    (tmp_path / "run" / "run.json").write_text('"text"')
    assert "no readable run.json" in error_of("train", "dna", "--resume", "--out", tmp_path / "run")


def test_paths_and_titles_are_printed_as_they_are(trained, tmp_path):
    """No emoji for :cat:, no markup for [red], no title broken to the width of a narrow table."""
    folder = tmp_path / "a:cat:[red]b"
    stdout, stderr = run("prep", "dna", genome(tmp_path / "g.fa"), "--out", folder)
    assert f"{folder}: 6,000 bases in 1 sequences" in stdout.splitlines()
    assert str(folder) in stderr
    assert str(folder) in error_of("prep", "dna", tmp_path / "g.fa", "--out", folder)
