"""`seqlab bench scan`: the gate, the contenders, what is dropped and why, the command."""

import dataclasses
import json
import math

import pytest
import torch
from typer.testing import CliRunner

from cli import app
from seqlab.bench import scan
from seqlab.errors import UserError

TOY = scan.Settings(d_inner=8, d_state=3, min_length=16, max_length=64, device="cpu", dtype=torch.float32, repeats=1)


def test_lengths_end_at_the_longest():
    assert TOY.lengths == [16, 64]
    assert scan.Settings(min_length=16, max_length=100, device="cpu").lengths == [16, 64, 100]


@pytest.mark.parametrize("change, words", [
    ({"batch": 0}, "--batch must be 1 or more, got 0"), ({"d_inner": -1}, "--d-inner must be 1 or more, got -1"),
    ({"repeats": 0}, "scan: repeats must be"), ({"seconds": 0.0}, "--seconds must be above 0, got 0"), ({"seconds": float("nan")}, "got nan"),
    ({"d_state": 257}, "--d-state must be at most 256, got 257"), ({"max_length": 8}, "--max-length 8 is below --min-length 16"),
])  # fmt: skip
def test_impossible_settings_are_one_clear_line(change, words):
    with pytest.raises(UserError, match=words):
        dataclasses.replace(TOY, **change)


def test_the_parallel_scan_of_plain_torch_is_the_reference():
    x = scan.make_inputs(TOY, 37)
    torch.testing.assert_close(scan.torch_parallel(x), scan.selective_scan(*x, True, backend="reference"))


def test_the_gate_sees_a_wrong_gradient_and_a_nan():
    def wrong(x):
        y = scan.torch_parallel(x)
        return y + 0.01 * (x[5] - x[5].detach())  # the value is right, D's gradient is not

    def nan(x):
        return scan.torch_parallel(x) * torch.nan

    errors = scan.parity(TOY, {"right": scan.torch_parallel, "wrong": wrong, "nan": nan})
    assert max(errors["right"].values()) < 1e-5
    assert errors["wrong"]["y"] < 1e-5 < errors["wrong"]["D"]
    assert math.isinf(errors["nan"]["y"])


def test_a_wrong_back_end_of_ours_stops_everything(monkeypatch):
    monkeypatch.setitem(scan.LIMITS, torch.float32, 1e-12)
    with pytest.raises(UserError, match="nothing was timed"):
        scan.run(TOY)


def test_run_times_every_contender_and_says_what_is_absent():
    told = []
    result = scan.run(TOY, say=told.append)
    assert set(result.times) == {16, 64}
    assert {"torch loop", "torch parallel", "attention"} <= set(result.times[64])
    assert all(t.forward_ms > 0 and t.both_ms > 0 and t.peak_gib is None for t in result.times[64].values())
    if not torch.cuda.is_available():
        assert "GPU" in result.absent["cuda"]
    assert json.loads(json.dumps(result.as_dict()))["times"]
    header, rows = scan.table(result)
    assert told[0].startswith("parity") and len(told) == 1 + len(rows)
    for line, (length, *cells) in zip(told[1:], rows, strict=True):  # the table's rows, in words
        assert line.startswith(f"length {length}, ms: ")
        assert all(f"{name} {cell}" in line for name, cell in zip(header[1:], cells, strict=True))


def test_slow_contenders_are_dropped_with_a_reason():
    times = {16: {"x": scan.Time(1.0, 100.0, None)}, 64: {"x": scan.Time(4.0, 1600.0, None)}}
    assert scan._expected_seconds(times, "x", 256) == pytest.approx(3 * 25.6)  # quadratic: it grew 16 times for 4
    assert scan._expected_seconds(times, "y", 256) == 0
    told = []
    result = scan.run(scan.Settings(d_inner=8, min_length=16, max_length=64, device="cpu", dtype=torch.float32, seconds=1e-9), say=told.append)
    assert [line.split(",")[0] for line in told[1:]] == ["length 16"]  # nothing is told of a length that nothing reached
    assert result.times[64] == {} and all("64" in why for why in result.dropped.values())


def test_the_command_prints_tables_writes_a_plot_and_one_json_line(tmp_path):
    plot, out = tmp_path / "scan.png", tmp_path / "scan.json"
    args = ["bench", "scan", "--d-inner", "8", "--d-state", "2", "--min-length", "16", "--max-length", "32"]
    done = CliRunner().invoke(app, [*args, "--device", "cpu", "--plot", str(plot), "--json", str(out)])
    assert done.exit_code == 0, done.output
    assert "length 16, ms: " in done.stderr and "length 32, ms: " in done.stderr and "ms: cpu" not in done.stdout
    assert plot.read_bytes()[:4] == b"\x89PNG" and json.loads(out.read_text())["settings"]["d_inner"] == 8
    bad = CliRunner().invoke(app, [*args, "--device", "cpu", "--precision", "fp16"])
    assert bad.exit_code == 1 and "fp16" in bad.output
    bad = CliRunner().invoke(app, [*args, "--device", "cpu", "--plot", str(tmp_path / "scan.xyz")])  # was told when all was measured
    assert bad.exit_code == 1 and ".png, .pdf or .svg" in bad.output and "Error against" not in bad.output
    bad = CliRunner().invoke(app, ["bench", "scan", "--max-length", "10"])
    assert bad.exit_code == 1 and "--min-length" in bad.output
