"""prep audio, train audio, eval and generate audio as a user types them."""

import csv
import dataclasses
import json
import shutil
import signal
import subprocess
import sys
import time
import wave
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from test_cli import ROOT, error_of, run
from typer.testing import CliRunner

from cli import app

TOY = ["--set", "model.d_model=16", "--set", "model.n_layer=1", "--set", "model.d_state=4", "--context", "256"]
TOY += ["--set", "train.tokens_per_step=1000", "--set", "train.accelerator=cpu", "--set", "train.validate_every=10"]
TOY += ["--set", "train.max_minutes=null", "--set", "model.prediction_order=8"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Recordings of two classes, prepared and trained on by the commands themselves: a folder with in/, data/ and run/."""
    folder = tmp_path_factory.mktemp("audio")
    (folder / "in").mkdir()
    for i in range(24):
        t = np.arange(500 + 10 * i) / 8000
        x = 0.4 * np.sin(2 * np.pi * (300 if i % 2 else 900) * t)
        soundfile.write(folder / "in" / f"{'low' if i % 2 else 'high'}_{i}.wav", x, 8000)
    run("prep", "audio", folder / "in", "--sample-rate", 8000, "--label-from", "name", "--out", folder / "data")
    run("train", "audio", "--data", folder / "data", "--out", folder / "run", "--max-steps", 20, *TOY)
    return folder


def samples(path):
    with wave.open(str(path)) as file:
        assert (file.getnchannels(), file.getsampwidth()) == (1, 2)
        return file.getframerate(), np.frombuffer(file.readframes(10**8), "<i2")


def test_prep_says_what_it_found(trained, tmp_path):
    stdout, stderr = run("prep", "audio", trained / "in", "--sample-rate", 4000, "--test", "*_[0-4].wav", "--out", tmp_path / "d")
    assert "split test" in stdout and "silent" in stdout and "clipped" in stdout and "train audio --data" in stderr
    data = json.loads(run("prep", "audio", trained / "in", "--out", tmp_path / "e", "--json", "-")[0])
    assert data["sample_rate"] == 16000 and data["skipped"] == []


def test_training_leaves_a_run_that_explains_itself(trained):
    report = (trained / "run" / "report.md").read_text()
    for word in ("bits/sample", "unigram", "Markov order 2", "adaptive linear", "class given"):
        assert word in report
    assert json.loads((trained / "run" / "run.json").read_text())["task"] == "audio"


def test_eval_by_context_beside_the_predictors(trained):
    stdout, stderr = run("eval", trained / "run", "--context", 16, "--context", "1_28", "--json", "-")
    data = json.loads(stdout)
    assert set(data["contexts"]) == {"16", "128"}
    counts = {s["samples"] for s in (*data["contexts"].values(), *data["baselines"].values(), data["with_class"])}
    assert counts == {data["samples"]} and data["recordings"] == 3
    one = data["contexts"]["16"]
    assert one["nats_per_sample"] == pytest.approx(one["bits_per_sample"] * np.log(2))


def test_resume_goes_on(trained, tmp_path):
    shutil.copytree(trained / "run", tmp_path / "r")
    run("train", "audio", "--resume", "--out", tmp_path / "r", "--max-steps", 23)
    assert json.loads((tmp_path / "r" / "run.json").read_text())["result"]["steps"] == 23
    assert "resume it with that command" in error_of("train", "dna", "--resume", "--out", tmp_path / "r")


# -- generate ------------------------------------------------------------------------------------------------------
def test_generate_writes_valid_files_and_a_contact_sheet(trained, tmp_path):
    out = tmp_path / "s"
    stdout, stderr = run("generate", "audio", trained / "run", "--seconds", 0.1, "--num", 4, "--class", "all", "--out", out)
    assert "sample-004.wav" in stdout and "x real time" in stderr
    rows = list(csv.DictReader((out / "samples.csv").open()))
    assert [r["class"] for r in rows] == ["high", "low", "high", "low"]
    assert (out / "contact_sheet.png").read_bytes()[:4] == b"\x89PNG" and not (out / ".state.pt").exists()
    waves = [samples(out / r["file"]) for r in rows]
    assert all(rate == 8000 and len(x) == 800 for rate, x in waves)
    assert len({x.tobytes() for _, x in waves}) == 4
    facts = json.loads((out / "generation.json").read_text())
    assert facts["real_time_factor"] > 0 and facts["settings"]["classes"] == ["high", "low"]


def test_likelihoods_are_those_of_the_parallel_forward(trained, tmp_path):
    import torch

    from seqlab.tokenizers.waveform import QUANTIZERS
    from tasks import runs

    run("generate", "audio", trained / "run", "--seconds", 0.05, "--class", "low", "--out", tmp_path / "s", "--temperature", 0.7)
    row = json.loads((tmp_path / "s" / "generation.json").read_text())["samples"][0]
    loaded = runs.load_run(trained / "run")
    codes = QUANTIZERS["mulaw-256"].encode(samples(tmp_path / "s" / row["file"])[1] / np.float32(32768))
    ids = torch.tensor([[128, *codes.tolist()]])
    with torch.no_grad():
        logits, _ = loaded.model.eval()(ids[:, :-1], classes=torch.tensor([1]))
    expected = logits[0].log_softmax(-1).gather(-1, ids[0, 1:, None]).sum().item()
    assert row["log_likelihood"] == pytest.approx(expected, abs=1e-2)


def test_a_seed_decides_everything_and_the_number_made_at_once_nothing(trained, tmp_path):
    base = ["generate", "audio", trained / "run", "--seconds", 0.05, "--num", 3]
    for name, more in (("a", []), ("b", ["--batch", 2]), ("c", ["--seed", 5]), ("d", ["--top-k", 1])):
        run(*base, "--out", tmp_path / name, *more)
    a, b, c, d = ([samples(tmp_path / n / f"sample-00{i}.wav")[1].tobytes() for i in (1, 2, 3)] for n in "abcd")
    assert a == b and a != c and d[0] == d[1] == d[2] != a[0]


def test_prompts_are_continued(trained, tmp_path):
    prompt = trained / "in" / "low_3.wav"
    base = ["generate", "audio", trained / "run", "--seconds", 0.05, "--prompt", prompt, "--prompt-seconds", 0.05]
    run(*base, "--out", tmp_path / "a", "--with-prompt")
    run(*base, "--out", tmp_path / "b")
    _, whole = samples(tmp_path / "a" / "sample-001.wav")
    _, rest = samples(tmp_path / "b" / "sample-001.wav")
    assert len(whole) == 800 and (whole[400:] == rest).all()
    original = soundfile.read(prompt, dtype="float32")[0][:400]
    assert np.abs(whole[:400] / 32768 - original).max() < 0.02
    run(*base, "--prompt-start", 0.011, "--out", tmp_path / "c")
    # a toy model may draw the same samples after another prompt, but it does not find them equally likely
    b, c = (json.loads((tmp_path / n / "generation.json").read_text()) for n in "bc")
    assert b["prompt_samples"] == c["prompt_samples"] == 400
    assert b["samples"][0]["log_likelihood"] != c["samples"][0]["log_likelihood"]


def test_the_best_of_many_are_kept(trained, tmp_path):
    run("generate", "audio", trained / "run", "--seconds", 0.03, "--num", 6, "--out", tmp_path / "all")
    run("generate", "audio", trained / "run", "--seconds", 0.03, "--num", 2, "--rank", 6, "--out", tmp_path / "best")
    every = json.loads((tmp_path / "all" / "generation.json").read_text())["samples"]
    best = json.loads((tmp_path / "best" / "generation.json").read_text())["samples"]
    order = sorted(every, key=lambda row: (bool(row["marks"]), -row["log_likelihood"]))
    assert [r["file"] for r in best] == [r["file"] for r in order[:2]]
    assert sorted(p.name for p in (tmp_path / "best").glob("*.wav")) == sorted(r["file"] for r in best)


def test_the_surest_of_every_class_are_kept(trained, tmp_path):
    import torch

    from seqlab.tokenizers.waveform import QUANTIZERS
    from tasks import runs

    base = ["generate", "audio", trained / "run", "--seconds", 0.03, "--class", "all"]
    run(*base, "--num", 8, "--out", tmp_path / "all")
    run(*base, "--num", 4, "--rank", 8, "--rank-by", "class", "--out", tmp_path / "best")
    best = json.loads((tmp_path / "best" / "generation.json").read_text())["samples"]
    assert [r["class"] for r in best] == ["high", "low", "high", "low"]
    model = runs.load_run(trained / "run").model.eval()
    surety = {}
    for i in range(8):
        codes = QUANTIZERS["mulaw-256"].encode(samples(tmp_path / "all" / f"sample-00{i + 1}.wav")[1] / np.float32(32768))
        ids = torch.tensor([[128, *codes.tolist()]])
        with torch.no_grad():
            logits = [model(ids[:, :-1], classes=torch.tensor([k]))[0][0].double().log_softmax(-1) for k in range(2)]
        p = torch.stack([one.gather(-1, ids[0, 1:, None]).sum() for one in logits]).log_softmax(0)
        surety[f"sample-00{i + 1}.wav"] = p[i % 2].item()
    for k in range(2):
        mine = sorted((n for n in surety if int(n[-5]) % 2 != k), key=lambda n: -surety[n])
        kept = [r for r in best if r["class"] == ("high", "low")[k]]
        assert [r["file"] for r in kept] == mine[:2]
        assert [r["log_posterior"] for r in kept] == pytest.approx([surety[n] for n in mine[:2]], abs=1e-3)
    assert "log_posterior" in (tmp_path / "best" / "samples.csv").read_text()


def test_what_ran_away_is_drawn_anew(trained, tmp_path, monkeypatch):
    from tasks import audio_generation

    finish = audio_generation.RunawayDetector.finish
    calls = []

    def first_two_run_away(self):
        calls.append(len(finish(self)))
        return [{"noise": 0.0} if len(calls) == 1 and i < 2 else {} for i in range(calls[-1])]

    monkeypatch.setattr(audio_generation.RunawayDetector, "finish", first_two_run_away)
    base = ["generate", "audio", trained / "run", "--seconds", 0.03, "--num", 3]
    run(*base, "--out", tmp_path / "b", "--runaway", "resample")
    assert calls == [3, 2]
    rows = json.loads((tmp_path / "b" / "generation.json").read_text())["samples"]
    assert [r["attempt"] for r in rows] == [1, 1, 0] and not any(r["marks"] for r in rows)
    monkeypatch.undo()
    run(*base, "--out", tmp_path / "a")
    same = [(tmp_path / n / f"sample-00{i}.wav").read_bytes() for n in "ab" for i in (1, 2, 3)]
    assert same[0] != same[3] and same[1] != same[4] and same[2] == same[5]


def test_raw_pcm_on_standard_output(trained, tmp_path):
    arguments = ["generate", "audio", trained / "run", "--seconds", 0.05, "--out"]
    done = CliRunner().invoke(app, [*map(str, arguments), "-"])
    assert done.exit_code == 0 and "aplay -f S16_LE" in done.stderr
    run(*arguments, tmp_path / "s")
    assert done.stdout_bytes == samples(tmp_path / "s" / "sample-001.wav")[1].tobytes()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=["ctrl-c", "killed"])
def test_stopped_and_resumed_equals_uninterrupted(number, trained, tmp_path):
    """Killed in its first half minute, before anything but the beginning is saved, it could not be resumed."""
    base = ["generate", "audio", trained / "run", "--num", 2, "--class", "low", "--guidance", 1.5, "--hold", 0.3]
    process = subprocess.Popen(
        [sys.executable, "-m", "cli", *map(str, base), "--seconds", "100000", "--out", str(tmp_path / "cut")],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )
    path, deadline = tmp_path / "cut" / "sample-002.wav", time.monotonic() + 60
    while not (path.exists() and path.stat().st_size > 3000) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    if number == signal.SIGINT:
        assert process.returncode == 130 and "generate audio --resume --out" in stderr and "Traceback" not in stderr, stderr
    left = len(samples(path)[1])
    assert left > 1000 and (tmp_path / "cut" / ".state.pt").is_file()
    if number == signal.SIGINT:  # of a run that was trained anew, with other sizes: it was "unexpected"
        shutil.copytree(tmp_path / "cut", tmp_path / "other")
        state = torch.load(tmp_path / "other" / ".state.pt", weights_only=True)
        name = next(key for key in state["decoder"] if key.endswith(".ssm"))
        state["decoder"][name] = state["decoder"][name][:, :-1]
        torch.save(state, tmp_path / "other" / ".state.pt")
        assert "cannot go on" in error_of("generate", "audio", "--resume", "--out", tmp_path / "other")
    # a shorter end than was asked for, so that the test is soon over
    facts = tmp_path / "cut" / "generation.json"
    data = json.loads(facts.read_text())
    data["settings"]["seconds"] = (left + 500) / 8000
    facts.write_text(json.dumps(data))
    run("generate", "audio", "--resume", "--out", tmp_path / "cut")
    run(*base, "--seconds", (left + 500) / 8000, "--out", tmp_path / "whole")
    for i in (1, 2):
        one, other = (tmp_path / n / f"sample-00{i}.wav" for n in ("cut", "whole"))
        assert one.read_bytes() == other.read_bytes()
    one, other = (json.loads((tmp_path / n / "generation.json").read_text())["samples"] for n in ("cut", "whole"))
    for a, b in zip(one, other):
        assert a["log_likelihood"] == pytest.approx(b["log_likelihood"], rel=1e-6) and a["marks"] == b["marks"]


# -- wrong input ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["--class", "hihg"], "no such class; did you mean 'high'"),
        (["--temperature", "-1"], "--temperature: must be 0"),
        (["--top-p", "0"], "--top-p: must lie in (0, 1]"),
        (["--top-k", "-3"], "--top-k: must be"),
        (["--guidance", "2"], "--guidance: goes with --class"),
        (["--hold", "2"], "--hold 2: must lie in 0 .. 1"),
        (["--guidance", "-1", "--class", "low"], "--guidance -1.0: must be 0"),
        (["--seconds", "0"], "--seconds 0.0: must be above 0"),
        (["--seconds", "1e9"], "a WAV file holds"),
        (["--num", "0"], "--num"),
        (["--rank", "1", "--num", "3"], "give at least as many"),
        (["--runaway", "panic"], "use mark or resample"),
        (["--rank", "4", "--rank-by", "looks"], "use likelihood or class"),
        (["--rank", "4", "--rank-by", "class"], "goes with --rank N and --class"),
        (["--prompt", "nowhere.wav"], "no such file"),
        (["--prompt-start", "2"], "go with --prompt"),
        (["--resume"], "nothing to resume"),
        (["--resume", "--seconds", "3", "--seed", "1"], "leave out --seconds, --seed"),
        (["--resume", "--class", "high", "--rank", "2", "--rank-by", "class"], "leave out --class, --rank, --rank-by"),
        (["--backend", "magic"], "magic"),
    ],
)
def test_wrong_options_are_one_line_and_leave_nothing(trained, arguments, expected, tmp_path):
    assert expected in error_of("generate", "audio", trained / "run", "--out", tmp_path / "s", *arguments)
    assert not list(tmp_path.iterdir())


def test_a_generation_is_resumed_without_any_option_of_its_own():
    """Options that a command line does not have are told by their defaults, which Settings has once more."""
    import inspect

    from tasks.audio_generation import Settings
    from tasks.commands.generate import generate_audio

    options = inspect.signature(generate_audio).parameters
    for field in dataclasses.fields(Settings):
        default = options[{"classes": "class_", "candidates": "rank"}.get(field.name, field.name)].default
        assert field.default == (() if field.name == "classes" else default), field.name


def test_other_wrong_input(trained, tmp_path):
    run("generate", "audio", trained / "run", "--seconds", 0.01, "--out", tmp_path / "s")
    assert "already holds something" in error_of("generate", "audio", trained / "run", "--seconds", 0.01, "--out", tmp_path / "s")
    run("generate", "audio", trained / "run", "--seconds", 0.01, "--out", tmp_path / "s", "--overwrite")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a.wav").write_bytes(b"x")
    assert "was not written by" in error_of("generate", "audio", trained / "run", "--out", tmp_path / "mine", "--overwrite")
    assert "one sample goes to standard output" in error_of("generate", "audio", trained / "run", "--num", 2, "--out", "-")
    assert "no such run" in error_of("generate", "audio", tmp_path / "none", "--out", tmp_path / "x")
    (tmp_path / "t.wav").write_text("this is text, not sound\n" * 9)
    assert "not a sound file" in error_of("generate", "audio", trained / "run", "--prompt", tmp_path / "t.wav", "--out", tmp_path / "x")
    prompt = trained / "in" / "low_1.wav"
    assert "nothing is left after" in error_of(
        "generate", "audio", trained / "run", "--prompt", prompt, "--prompt-start", 9, "--out", tmp_path / "x"
    )
    assert "give the dataset that `seqlab prep audio` wrote" in error_of("train", "audio", "--out", tmp_path / "x")
    assert "which run" in error_of("generate", "audio", "--out", tmp_path / "x")
    assert "give --data" in error_of("eval", trained / "run", "--fasta", prompt)
    assert "--scale loud" in error_of("prep", "audio", prompt, "--scale", "loud", "--out", tmp_path / "x")
    assert "no such file" in error_of("prep", "audio", tmp_path / "none.wav", "--out", tmp_path / "x")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("words", [["prep", "audio"], ["train", "audio"], ["generate", "audio"], ["generate", "dna"]])
def test_help_shows_an_example(words):
    result = CliRunner().invoke(app, [*words, "--help"])
    assert result.exit_code == 0 and "Example:" in result.stdout


def test_doctor_says_what_reads_sound(tmp_path, monkeypatch):
    from seqlab.doctor import sound

    monkeypatch.setenv("PATH", str(tmp_path))
    library, program = sound()
    assert library.status == "ok" and "flac" in library.detail
    assert program.status == "absent" and "m4a" in program.detail
    (tmp_path / "ffmpeg").write_text("#!/bin/sh\n")
    (tmp_path / "ffmpeg").chmod(0o755)
    assert sound()[1].status == "ok"


@pytest.fixture(scope="module")
def dna(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dna")
    (folder / "g.fa").write_text(">a\n" + "ACGT" * 2000 + "\n")
    toy = ["--set", "model.d_model=8", "--set", "model.n_layer=1", "--context", "64", "--set", "train.tokens_per_step=128"]
    toy += ["--set", "train.accelerator=cpu", "--set", "eval.max_order=1"]
    run("train", "dna", "--fasta", folder / "g.fa", "--max-steps", 1, "--out", folder / "r", *toy)
    return folder / "r"


def test_dna_runs_do_not_make_sound_nor_audio_runs_dna(trained, dna, tmp_path):
    assert "is a run of `train dna`" in error_of("generate", "audio", dna, "--out", tmp_path / "x")
    assert "is a run of `train audio`" in error_of("generate", "dna", trained / "run")


def test_dna_is_drawn_as_fasta(dna, tmp_path):
    import torch

    from seqlab.tokenizers import nucleotide
    from tasks import runs

    base = ["generate", "dna", dna, "--length", 90, "--num", 3, "--prompt", "ACGTACGTACGNNA"]
    text, stderr = run(*base)
    assert "bases/s" in stderr
    facts = json.loads(run(*base, "--batch", 2, "--out", tmp_path / "a.fa", "--json", "-")[0])
    assert (tmp_path / "a.fa").read_text() == text
    assert [f"log_likelihood={s['log_likelihood']:.3f}" in text for s in facts["sequences"]] == [True] * 3
    assert "standard output" in error_of(*base, "--json", "-")
    assert run(*base, "--seed", 1)[0] != text
    (tmp_path / "prompt.fa").write_text(">p\nacgtacg\nTACGNNA\n")
    assert run(*base, "--prompt", tmp_path / "prompt.fa")[0] == text  # the last one counts
    (tmp_path / "two.fa").write_text(">p\nA\n>q\nC\n")
    assert "holds several sequences" in error_of(*base, "--prompt", tmp_path / "two.fa")
    assert "is no base" in error_of(*base, "--prompt", "X" * 5000)
    records = [part.split("\n", 1) for part in text.split(">")[1:]]
    assert len(records) == 3
    model = runs.load_run(dna).model.eval()
    for header, body in records:
        bases = body.replace("\n", "")
        assert len(bases) == 104 and bases.startswith("ACGTACGTACGNNA") and set(bases[14:]) <= set("ACGT")
        ids = torch.from_numpy(nucleotide.encode(bases).astype(np.int64))[None]
        with torch.no_grad():
            logits, _ = model(ids[:, :-1])
        scores = logits[0, 13:, list(nucleotide.BASES)].log_softmax(-1)
        expected = scores.gather(-1, ids[0, 14:, None] - nucleotide.BASES[0]).sum().item()
        assert float(header.split("log_likelihood=")[1].split()[0]) == pytest.approx(expected, abs=2e-3)
    free = run("generate", "dna", dna, "--length", 50, "--num", 2)[0]
    assert [len(part.split("\n", 1)[1].replace("\n", "")) for part in free.split(">")[1:]] == [50, 50]
    assert "'X' at 4 is no base; use A, C, G, T and N, or the name of a FASTA file" in error_of(*base, "--prompt", "ACGX")
    assert error_of(*base, "--backend", "refrence").startswith("error: --backend 'refrence' is not a back end; allowed: auto, ")
    assert "must be 1 or more" in error_of("generate", "dna", dna, "--length", 0)
    assert "exists" in error_of(*base, "--out", tmp_path / "a.fa")
    assert "--temperature: must be" in error_of(*base, "--temperature", -1)
