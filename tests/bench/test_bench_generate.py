"""`seqlab bench generate`: the gate, the rows, what is absent and why, the command."""

import json

import pytest
import torch
from typer.testing import CliRunner

from cli import app
from seqlab.bench import generate
from seqlab.errors import UserError

CPU = "cpu"
TOY = {"toy": {"d_model": 16, "n_layer": 1}, "toy unet": {"architecture": "unet", "d_model": 16, "n_layer": 1, "pool": (2,)}}


@pytest.fixture(autouse=True)
def toys(monkeypatch):
    monkeypatch.setattr(generate, "SHAPES", TOY)


def settings(**changes) -> generate.Settings:
    values = {"shapes": tuple(TOY), "batches": (1, 2), "dtypes": (torch.float32,), "prompt": 40, "tokens": 8, "seconds": 0.01, "device": CPU}
    return generate.Settings(**values | changes)


def test_every_shape_and_number_of_streams_is_checked_and_timed():
    told = []
    result = generate.run(settings(backends=("auto", "reference")), say=told.append)
    assert len(result.rows) == 8 and all(row.total == row.per_stream * row.batch > 0 and row.whole > 0 for row in result.rows)
    assert len(result.errors) == 8 and max(result.errors.values()) < 1e-4
    assert result.prompt_seconds["toy"] > 0 and result.state_bytes["toy"] == 32 * (16 + 3) * 4
    assert "GPU" in result.absent["mamba_ssm"]
    json.dumps(result.as_dict())
    header, rows = generate.table(result)
    assert all(len(row) == len(header) for row in rows) and "x mamba_ssm" not in header
    assert [line for line in told if "prompt of 40" in line] == told[4::5]  # of a shape, after its rows
    del told[4::5]
    for line, (shape, streams, backend, dtype, each, total, whole) in zip(told, rows, strict=True):  # the table's rows, in words
        assert line.startswith(f"{shape}, {streams} streams, {backend}, {dtype}: {each} further") and f"{total} in total, {whole} by whole" in line


def test_both_ways_of_timing(monkeypatch):
    """A call of one second and half a second a token: two further tokens a second, and what whole calls make of them."""
    now = [0.0]

    def call(n: int) -> None:
        now[0] += 1.0 + 0.5 * n

    monkeypatch.setattr(generate.time, "perf_counter", lambda: now[0])
    assert generate.rates(call, settings(tokens=64)) == pytest.approx((2.0, 64 / 33.0))
    rows = [generate._row("toy", 4, name, "bf16", timed) for name, timed in (("batched", (6.0, 2.0)), ("mamba_ssm", (2.0, 1.0)))]
    result = generate.Result({"tokens": 64}, "", "", {}, rows)
    header, (ours, theirs) = generate.table(result)
    assert ours[4:] == ["6", "24", "3.00", "8", "2.00"] and theirs[4:] == ["2", "8", "", "4", ""] and header[7] == "calls of 64"


def test_what_differs_is_not_timed(monkeypatch):
    monkeypatch.setattr(generate, "error", lambda model, batch, *rest: 1.0 if batch == 2 else 0.0)
    result = generate.run(settings())
    assert {row.batch for row in result.rows} == {1}
    assert sum("differ by 1" in why for why in result.absent.values()) == 2
    monkeypatch.setattr(generate, "error", lambda *a: float("nan"))
    with pytest.raises(UserError, match="nothing was timed"):
        generate.run(settings())


def test_the_gate_sees_a_wrong_step(monkeypatch):
    model = generate.make_model("toy", settings())
    assert generate.error(model, 2, "reference", torch.float32, settings()) < 1e-4
    from seqlab.ops.decode import reference

    right = reference.one_token
    monkeypatch.setattr(reference, "one_token", lambda request, token, *rest: right(request, token * 0, *rest))
    assert generate.error(model, 2, "reference", torch.float32, settings()) > 1e-2


def test_impossible_settings_are_one_clear_line():
    for change, words in (({"shapes": ("huge",)}, "huge"), ({"batches": (0,)}, "--batch"), ({"seconds": 0.0}, "--seconds"), ({"tokens": 1}, "--tokens")):
        with pytest.raises(UserError, match=words):
            settings(**change)


def test_the_command(tmp_path):
    out = tmp_path / "generate.json"
    args = ["bench", "generate", "--device", "cpu", "--shape", "toy", "--batch", "1", "--prompt", "0", "--tokens", "8", "--seconds", "0.01"]
    done = CliRunner().invoke(app, [*args, "--json", str(out)])
    assert done.exit_code == 0, done.output
    assert json.loads(out.read_text())["rows"][0]["shape"] == "toy"
    assert "toy, 1 streams, " in done.stderr and "further tokens/s of a stream" in done.stderr
    bad = CliRunner().invoke(app, [*args, "--backend", "graf"])
    assert bad.exit_code == 1 and "error: --backend 'graf' is not a back end; " in bad.output and "did you mean 'graph'?" in bad.output
