"""The native GPU scan and convolution against mamba_ssm, causal_conv1d, a torch baseline and causal attention.

    python benchmarks/bench_scan_gpu.py [--quick] [--grid] [--large] [--json FILE] [--plot FILE]

First parity: on a small problem of every kind the output and all gradients are compared with the float64 reference, and
mamba_ssm's errors on the same inputs are printed beside ours; nothing is timed if ours are too large. Then median times
(CUDA events, after warm-up) of forward and forward + backward in bfloat16 with D, z, delta_bias and softplus, ours and
theirs in the same run on the same values, with the peak memory of both passes, inputs included (SEQLAB_SCAN_KEEP=0: ours keeping
few states); peers that are not installed are left out. Then lengths 2^10 to 2^20 against
causal attention (SDPA, 8 heads of 64). A table, and one JSON line at the end.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from seqlab.ops import causal_conv1d, nvrtc, selective_scan
from seqlab.ops.selective_scan import cuda as native

ISSUE = [  # batch, d_inner, length, d_state
    (1, 512, 1 << 20, 16), (1, 256, 1 << 20, 16), (1, 128, 1 << 20, 16), (1, 128, 1 << 20, 64), (8, 512, 1 << 17, 16),
    (64, 2048, 2048, 16),
]  # fmt: skip
GRID = [(b, d, n) for b in (1, 8, 64) for d in (128, 512, 2048) for n in (512, 2048, 16384, 131072)]
NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")


def inputs(batch, channels, length, states, dtype=torch.bfloat16, shift=-4.6):
    """Values like those in a trained model's layer: A = -(1..n), softplus(delta + bias) around 0.01."""
    g = torch.Generator("cuda").manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, device="cuda", generator=g)

    u, delta, z = (random(batch, length, channels).to(dtype) for _ in range(3))
    B, C = (random(batch, length, states).to(dtype) for _ in range(2))
    A = -torch.arange(1, states + 1, device="cuda", dtype=torch.float32).repeat(channels, 1)
    return [u, delta, A, B, C, random(channels), z, random(channels) * 0.1 + shift]


def ours(x, **kwargs):
    return selective_scan(*x, True, backend="cuda", **kwargs)


def peer():
    """mamba_ssm's kernel on channel-first copies, or None where it is not installed."""
    try:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    except Exception:
        return None
    return lambda x: selective_scan_fn(*x, True)


def channel_first(x):
    return [t.transpose(1, 2).contiguous() if t.dim() == 3 else t for t in x]


def same_bits(shape=(1, 512, 20000, 16), runs=10):
    """True if the output and every gradient are the same bits on every run."""
    x = [t.requires_grad_() for t in inputs(*shape)]
    grad, first, same = torch.randn_like(x[0]), None, True
    for _ in range(runs):
        y = ours(x)
        found = [y.detach(), *torch.autograd.grad(y, x, grad)]
        first = first or found
        same = same and all(torch.equal(a, b) for a, b in zip(first, found, strict=True))
    print(f"{runs} runs of {shape}: {'the same bits' if same else 'DIFFERENT bits'}", flush=True)
    return same


def beyond(length, channels, states=2, piece=1 << 17):
    """A scan of more elements than an offset of 31 or 32 bits reaches, against the same in pieces with the carried state:
    relative errors of y and of dC (which a piece knows by itself), and of du in the last piece."""
    g = torch.Generator("cuda").manual_seed(0)
    u = torch.randn(1, length, channels, device="cuda", generator=g, dtype=torch.bfloat16)
    A = -torch.rand(channels, states, device="cuda") - 0.5
    B, C = (torch.randn(1, length, states, device="cuda", generator=g).bfloat16() for _ in range(2))
    leaves = [u.requires_grad_(), A, B, C.requires_grad_()]
    y, final = selective_scan(leaves[0], leaves[0].detach(), *leaves[1:], delta_softplus=True, return_final_state=True,
                              backend="cuda")  # fmt: skip
    whole_du, whole_dC = torch.autograd.grad(y, (leaves[0], leaves[3]), u.detach())
    y, state, worst = y.detach(), None, {"y": 0.0, "dC": 0.0, "du": 0.0}
    for begin in range(0, length, piece):
        cut = slice(begin, begin + piece)
        part, c = u.detach()[:, cut].clone().requires_grad_(), C.detach()[:, cut].clone().requires_grad_()
        here, state = selective_scan(part, part.detach(), A, B[:, cut], c, None, None, None, True, state,
                                     return_final_state=True, backend="cuda")  # fmt: skip
        du, dC = torch.autograd.grad(here, (part, c), part.detach())
        state = state.detach()
        worst["y"] = max(worst["y"], relative(here, y[:, cut].double()))
        worst["dC"] = max(worst["dC"], relative(dC, whole_dC[:, cut].double()))
        if begin + piece >= length:
            worst["du"] = relative(du, whole_du[:, cut].double())
    row = {"elements": length * channels, "errors": worst, "final_state": relative(final, state.double())}
    print(f"{length * channels} elements, whole against pieces: {row['errors']}, final state {row['final_state']:.1e}", flush=True)
    return row


def timings(f, repeats=5, warm=2):
    """Milliseconds from the call to the end of its last kernel."""
    for _ in range(warm):
        f()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        f()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return times


def median(f, repeats=5, warm=2):
    return statistics.median(timings(f, repeats, warm))


def passes(call, x):
    """Forward alone, and forward + backward."""
    x = [t.detach().requires_grad_() for t in x]
    with torch.no_grad():
        grad = torch.randn_like(call(x))

    def forward():
        with torch.no_grad():
            return call(x)

    return forward, lambda: torch.autograd.grad(call(x), x, grad)


def both_passes(call, x):
    """Median milliseconds of forward alone and of forward + backward; peak GiB of the latter."""
    forward, both = passes(call, x)
    row = {"forward_ms": median(forward)}
    torch.cuda.reset_peak_memory_stats()
    row["both_ms"] = median(both)
    return {**row, "peak_gib": torch.cuda.max_memory_allocated() / 2**30}


def in_turn(contenders, rounds=6, repeats=10):
    """The same of several contenders {name: (call, arguments)}, round by round, so that a machine that is busy now and then
    is so for all of them."""
    rows = {name: both_passes(*given) for name, given in contenders.items()}
    for number, key in enumerate(("forward_ms", "both_ms")):
        found = {name: [] for name in contenders}
        for _ in range(rounds):
            for name, given in contenders.items():
                found[name] += timings(passes(*given)[number], repeats)
        for name, times in found.items():
            rows[name][key] = statistics.median(times)
    return rows


def relative(a, r):
    return float((a.detach().double() - r).norm() / r.norm())


def gate():
    """Errors against the float64 reference, ours and mamba_ssm's; exits where ours are too large."""
    theirs, rows = peer(), []
    cases = ((torch.float32, -4.6, "small delta"), (torch.float32, 0.0, "random"), (torch.float32, 3.0, "large delta"),
             (torch.bfloat16, -4.6, "small delta"), (torch.bfloat16, 0.0, "random"))  # fmt: skip
    for dtype, shift, label in cases:
        x = inputs(2, 96, 1000, 16, dtype, shift)
        exact = [t.double().requires_grad_() for t in x]
        y64 = selective_scan(*exact, True, backend="reference")
        grad = torch.randn_like(y64).to(dtype)
        true = [y64.detach(), *torch.autograd.grad(y64, exact, grad.double())]
        leaves = [t.detach().requires_grad_() for t in x]
        y = ours(leaves)
        errors = [relative(a, r) for a, r in zip((y, *torch.autograd.grad(y, leaves, grad)), true, strict=True)]
        row = {"case": f"{str(dtype)[6:]}, {label}", "ours": errors}
        if theirs is not None:
            leaves = [t.detach().requires_grad_() for t in channel_first(x)]
            y = theirs(leaves)
            got = (y, *torch.autograd.grad(y, leaves, grad.transpose(1, 2).contiguous()))
            got = [t.transpose(1, 2) if t.dim() == 3 else t for t in got]
            row["mamba_ssm"] = [relative(a, r) for a, r in zip(got, true, strict=True)]
        rows.append(row)
        for who in ("ours", "mamba_ssm"):
            if who in row:
                named = " ".join(f"{k} {e:.1e}" for k, e in zip(("y", *NAMES), row[who], strict=True))
                print(f"parity {row['case']:<24} {who:<10}{named}", flush=True)
        limit = 1e-5 if dtype == torch.float32 else 5e-3
        if not max(errors) < limit:
            sys.exit(f"parity failed: {max(errors):.1e} is not below {limit:.0e}; nothing was timed")
    return rows


def table(shapes, label):
    theirs, rows = peer(), []
    print(f"\n{label}: batch, d_inner, length, d_state | ours fwd, fwd+bwd ms (peak GiB; a state kept every) | mamba_ssm | ratio")
    for shape in shapes:
        x, turns = inputs(*shape), math.prod(shape[:3]) < 1 << 25
        every = native.kept_every(native._device(x[0]), shape[0], shape[2], shape[1], shape[3])
        row = {"shape": shape, "kept_every": every}
        if turns:
            both = {"ours": (ours, x)} | ({} if theirs is None else {"mamba_ssm": (theirs, channel_first(x))})
            row |= in_turn(both, repeats=50 if math.prod(shape[:3]) <= 1 << 22 else 10)  # the host's time scatters most
        else:
            row["ours"] = both_passes(ours, x)
        text = f"{str(shape):<26} {row['ours']['forward_ms']:8.3f} {row['ours']['both_ms']:8.3f} ({row['ours']['peak_gib']:.2f}; {every})"
        if theirs is not None:
            if not turns:
                x = channel_first(x)
                row["mamba_ssm"] = both_passes(theirs, x)
            f, t = (row["mamba_ssm"][k] / row["ours"][k] for k in ("forward_ms", "both_ms"))
            theirs_ms = f"{row['mamba_ssm']['forward_ms']:8.3f} {row['mamba_ssm']['both_ms']:8.3f}"
            text += f" | {theirs_ms} ({row['mamba_ssm']['peak_gib']:.2f}) | {f:.2f}x {t:.2f}x"
        rows.append(row)
        print(text, flush=True)
        del x
        torch.cuda.empty_cache()
    return rows


def host_us(f, calls=300):
    """Microseconds that a call keeps the processor busy; the GPU must be faster."""
    for _ in range(20):
        f()
    best = float("inf")
    for _ in range(3):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            f()
        best = min(best, (time.perf_counter() - start) / calls)
        torch.cuda.synchronize()
    return best * 1e6


def device_us(f, calls=10, replays=10):
    """Microseconds that a call keeps the GPU busy: replayed as a CUDA graph, which needs no host."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            f()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            f()
    return median(graph.replay, replays) / calls * 1e3


def apart(call, x):
    """Of forward alone and of forward + backward: microseconds on the GPU."""
    x = [t.detach().requires_grad_() for t in x]
    with torch.no_grad():
        grad = torch.randn_like(call(x))
        forward = device_us(lambda: call(x))
    return {"forward_us": forward, "both_us": device_us(lambda: torch.autograd.grad(call(x), x, grad))}


def short(shapes):
    """Where launches count: time on the host and on the GPU, each by itself, ours and mamba_ssm's."""
    theirs, result = peer(), {"host": {}, "device": []}
    x = [t.requires_grad_() for t in inputs(1, 128, 64, 16)]
    small = torch.randn(1, 64, 128, device="cuda").bfloat16().requires_grad_()
    filters = [torch.randn(128, 4, device="cuda").requires_grad_(), torch.randn(128, device="cuda").requires_grad_()]
    contenders = {"scan": (ours, x), "conv": (lambda t: causal_conv1d(*t, "silu", backend="cuda"), [small, *filters])}
    if theirs is not None:
        from causal_conv1d import causal_conv1d_fn

        contenders["scan, mamba_ssm"] = (theirs, [t.detach().requires_grad_() for t in channel_first(x)])
        turned = [t.detach().bfloat16().requires_grad_() for t in (small.transpose(1, 2).contiguous(), *filters)]
        contenders["conv, causal_conv1d"] = (lambda t: causal_conv1d_fn(*t, activation="silu"), turned)
    for name, (call, given) in contenders.items():
        grad = torch.randn_like(call(given))
        with torch.no_grad():
            bare = host_us(lambda: call(given))
        row = {"forward": bare, "forward for a gradient": host_us(lambda: call(given)),
               "both": host_us(lambda: torch.autograd.grad(call(given), given, grad))}  # fmt: skip
        result["host"][name] = row
        print(f"host, {name:<20}", ", ".join(f"{k} {v:.0f} us" for k, v in row.items()), flush=True)
    print("\non the GPU: batch, d_inner, length | ours fwd, fwd+bwd us | mamba_ssm | ratio")
    for shape in shapes:
        x = inputs(*shape)
        row = {"shape": shape, "ours": apart(ours, x)}
        text = f"{str(shape):<22} {row['ours']['forward_us']:8.1f} {row['ours']['both_us']:8.1f}"
        if theirs is not None:
            row["mamba_ssm"] = apart(theirs, channel_first(x))
            f, t = (row["mamba_ssm"][k] / row["ours"][k] for k in ("forward_us", "both_us"))
            text += f" | {row['mamba_ssm']['forward_us']:8.1f} {row['mamba_ssm']['both_us']:8.1f} | {f:.2f}x {t:.2f}x"
        result["device"].append(row)
        print(text, flush=True)
    return result


@torch.no_grad()
def at_once(shapes):
    """Both directions of a bidirectional block, whose scans share no tensor, in one launch and one after the other:
    microseconds on the GPU and on the host, forward and backward."""
    rows, choose = [], native.short
    print("\ntwo scans of batch, d_inner, length | GPU forward, backward us: apart, at once | host forward, backward us: apart, at once")
    for shape in shapes:
        scans = tuple((*x[:6], None, x[7]) for x in (inputs(*shape), inputs(*shape)))
        segment = native.segment_length(shape[0], shape[2], shape[1])
        row, dy = {"shape": shape}, torch.randn_like(scans[0][0])
        for name in ("apart", "at_once"):
            native.short = choose if name == "at_once" else lambda *a: None if a[-1] == 2 else choose(*a)  # two at once: never
            native._recipes.clear()
            kept = [states for _, states in native.forward_pair(scans, None, True, segment)]
            calls = (lambda: native.forward_pair(scans, None, True, segment),
                     lambda kept=kept: native.backward_pair(dy, scans, None, kept, True, segment))  # fmt: skip
            row[name] = {"device_us": [device_us(f) for f in calls], "host_us": [host_us(f, 100) for f in calls]}
        native.short = choose
        native._recipes.clear()
        rows.append(row)
        pairs = [(row["apart"][k][i], row["at_once"][k][i]) for k in ("device_us", "host_us") for i in (0, 1)]
        print(f"{str(shape):<22}", " | ".join(f"{a:6.1f} -> {b:6.1f}" for a, b in pairs), flush=True)
    return rows


def bidirectional(shape):
    """Both directions with one set of inputs, ours without flips, theirs with."""
    x, theirs = inputs(*shape), peer()
    row = {"shape": shape, "ours": both_passes(lambda t: ours(t) + ours(t, reverse=True), x)}
    print(f"bidirectional {shape}: ours {row['ours']['forward_ms']:.2f} {row['ours']['both_ms']:.2f} ms ({row['ours']['peak_gib']:.2f} GiB)", end="")
    if theirs is not None:
        def pair(t):
            flipped = [v.flip(-1) if v.dim() == 3 else v for v in t]
            return theirs(t) + theirs(flipped).flip(-1)

        row["mamba_ssm"] = both_passes(pair, channel_first(x))
        print(f" | mamba_ssm {row['mamba_ssm']['forward_ms']:.2f} {row['mamba_ssm']['both_ms']:.2f} ms ({row['mamba_ssm']['peak_gib']:.2f} GiB)", end="")
    print(flush=True)
    return row


def convolution(shape):
    """causal_conv1d of width 4 with SiLU, beside a device copy and the peer."""
    batch, channels, length = shape
    x = torch.randn(batch, length, channels, device="cuda").bfloat16()
    weight, bias = torch.randn(channels, 4, device="cuda"), torch.randn(channels, device="cuda")
    target = torch.empty_like(x)
    gbs = 2 * x.numel() * 2 / median(lambda: target.copy_(x)) / 1e6
    row = {"shape": shape, "copy_gb_per_s": gbs}
    row["ours"] = both_passes(lambda t: causal_conv1d(*t, "silu", backend="cuda"), [x, weight, bias])
    back = row["ours"]["both_ms"] - row["ours"]["forward_ms"]
    of_copy = 2 * x.numel() * 2 / row["ours"]["forward_ms"] / 1e6 / gbs, 3 * x.numel() * 2 / back / 1e6 / gbs
    print(f"conv {shape}: ours {row['ours']['forward_ms']:.3f} {row['ours']['both_ms']:.3f} ms, "
          f"{of_copy[0]:.0%} (forward) and {of_copy[1]:.0%} (backward) of the copy's {gbs:.0f} GB/s", end="")  # fmt: skip
    try:
        from causal_conv1d import causal_conv1d_fn
    except Exception:
        print(flush=True)
        return row
    first = [x.transpose(1, 2).contiguous(), weight.bfloat16(), bias.bfloat16()]
    row["causal_conv1d"] = both_passes(lambda t: causal_conv1d_fn(*t, activation="silu"), first)
    print(f" | causal_conv1d {row['causal_conv1d']['forward_ms']:.3f} {row['causal_conv1d']['both_ms']:.3f} ms", flush=True)
    return row


def lengths(powers, attention_up_to):
    """Length against time at (1, 512): ours, theirs, causal attention, and the reference loop where it is bearable."""
    theirs, rows = peer(), []
    print("\nlength | ours | mamba_ssm | SDPA causal | torch loop (forward, forward + backward ms)")
    for power in powers:
        length = 1 << power
        x = inputs(1, 512, length, 16)
        row = {"length": length, "ours": both_passes(ours, x)}
        if theirs is not None:
            row["mamba_ssm"] = both_passes(theirs, channel_first(x))
        if power <= attention_up_to:
            qkv = [torch.randn(1, 8, length, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
            row["sdpa"] = both_passes(lambda t: F.scaled_dot_product_attention(*t, is_causal=True), qkv)
        if power <= 10:
            row["torch_loop"] = both_passes(lambda t: selective_scan(*t, True, backend="reference"), x)
        rows.append(row)
        print(f"2^{power:<3}", *(f"| {row[k]['forward_ms']:9.3f} {row[k]['both_ms']:9.3f}" if k in row else "|" + " " * 20
                                 for k in ("ours", "mamba_ssm", "sdpa", "torch_loop")), flush=True)  # fmt: skip
    return rows


def compile_seconds():
    """First use at d_state 16: cold, and from the disk cache. In a process of its own: the parity gate has compiled the same files, and what is
    compiled a second time in a process may take less."""
    major, minor = torch.cuda.get_device_capability()
    script = f"""
import json, time
from seqlab.ops import nvrtc
from seqlab.ops.selective_scan import cuda as native
nvrtc.compiler()
basic = dict(STATES=16, BF16=1, PAIRED=1, WIDE=1)
short = basic | dict(ACROSS=4, TIMES=8, CLUSTER={2 if major >= 9 else 1}, BOTH=0)
files = {{
    "scan.cu, few states kept": (native.SOURCE, basic | dict(WARPS=4)),
    "scan.cu, every tile's state kept": (native.SOURCE, basic | dict(WARPS=4, FINE=1)),
    "scan_short.cu, forward": (native.SHORT_SOURCE, short | dict(TILE=16, FORWARD=1)),
    "scan_short.cu, backward": (native.SHORT_SOURCE, short | dict(TILE=native.TILE, FORWARD=0)),
}}
seconds = {{}}
for name, (source, defines) in files.items():
    for state in ("cold", "cached"):
        start = time.perf_counter()
        nvrtc.code(source, tuple(defines.items()), {10 * major + minor})
        seconds.setdefault(name, {{}})[state] = time.perf_counter() - start
print(json.dumps(seconds))
"""
    root = Path(__file__).resolve().parents[1]
    with tempfile.TemporaryDirectory() as folder:
        paths = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
        fresh = {**os.environ, nvrtc.CACHE: folder, "PYTHONPATH": paths}
        done = subprocess.run([sys.executable, "-c", script], env=fresh, stdout=subprocess.PIPE, text=True, check=True)
    seconds = json.loads(done.stdout)
    print()
    for name, found in seconds.items():
        print(f"compile {name}: {found['cold']:.2f} s cold, {found['cached'] * 1e3:.1f} ms from the cache")
    return seconds


def plot(rows, target):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4))
    for who in ("ours", "mamba_ssm", "sdpa", "torch_loop"):
        points = [(r["length"], r[who]["both_ms"]) for r in rows if who in r]
        if points:
            axes.loglog(*zip(*points, strict=True), marker="o", label=who)
    axes.set(xlabel="length", ylabel="forward + backward, ms", title="(1, 512, length, 16), bfloat16")
    axes.legend()
    figure.savefig(target, dpi=120, bbox_inches="tight")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the issue's shapes only")
    parser.add_argument("--grid", action="store_true", help="also every batch x d_inner x length that must not be slower")
    parser.add_argument("--short", action="store_true", help="nothing but the grid below 2^25 elements, host and GPU apart")
    parser.add_argument("--large", action="store_true", help="also more than 2^31 and 2^32 elements, in pieces (50 GB)")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args(argv)
    if (reason := native.unavailable()) is not None:
        sys.exit(f"the cuda back end cannot run here: {reason}")
    result = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "parity": gate()}
    if options.short:
        few = [(b, d, n, 16) for b, d, n in GRID if b * d * n < 1 << 25]
        result["short"], result["grid"] = short(few), table(few, "never slower than mamba_ssm")
        result["at_once"] = at_once([s for s in few if math.prod(s[:3]) <= 1 << 20])
        print(json.dumps(result))
        return
    result["compile"] = compile_seconds()
    result["same_bits"] = same_bits()
    result["shapes"] = table(ISSUE, "scan, bfloat16")
    result["bidirectional"] = bidirectional((1, 512, 1 << 20, 16))
    result["convolution"] = [convolution(s) for s in ((1, 512, 1 << 20), (8, 512, 1 << 17))]
    if options.grid:
        fits = [(b, d, n, 16) for b, d, n in GRID if b * d * n <= 1 << 30]
        result["grid"] = table(fits, "never slower than mamba_ssm")
    if not options.quick:
        result["lengths"] = lengths(range(10, 21, 2), 16)
        if options.plot:
            plot(result["lengths"], options.plot)
    if options.large:
        sizes = ((1 << 31) // 2048 + 1000, 2048), ((1 << 32) // 4096 + 1000, 4096)
        result["beyond"] = [beyond(*size) for size in sizes]
    line = json.dumps(result)
    if options.json:
        options.json.write_text(line + "\n", encoding="utf-8")
    print(line)


if __name__ == "__main__":
    main()
