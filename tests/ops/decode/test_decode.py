"""The decoder: every back end against the parallel forward pass, drawing against its definition, state and errors."""

import dataclasses

import pytest
import torch

from seqlab.model import ModelConfig, build_model
from seqlab.ops import decode
from seqlab.ops.decode import Decoder, Sampling
from seqlab.ops.decode.sampling import draw, sample, stream_key

AVAILABLE = [name for name, why in decode.unavailable().items() if why is None]
ON_GPU = ("persistent", "batched", "clustered", "solo", "graph")
STACKS = ("batched", "clustered", "solo")  # back ends that run isotropic stacks alone
ROUNDED = ("clustered",)  # and those that run bfloat16 alone
HERE = [pytest.param(name, marks=pytest.mark.gpu) if name in ON_GPU else name for name in AVAILABLE if name not in ROUNDED]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MODELS = {
    "isotropic": {"d_model": 24, "n_layer": 2, "d_state": 5, "vocab_size": 20},
    "wide": {"d_model": 64, "n_layer": 2, "vocab_size": 256, "tie_embeddings": False, "bias": True},
    "unet": {"architecture": "unet", "d_model": 24, "n_layer": 2, "d_state": 4, "pool": (3, 2), "vocab_size": 37},
    "classes": {"architecture": "unet", "d_model": 16, "n_layer": 1, "pool": (4,), "vocab_size": 256, "n_classes": 3},
    "fixed": {"architecture": "unet", "d_model": 24, "n_layer": 1, "d_state": 5, "pool": (2, 3), "vocab_size": 40,
              "blocks": ("s4d_complex", "s4d", "s6")},
    "predicted": {"d_model": 16, "n_layer": 2, "vocab_size": 50, "prediction_order": 7, "n_classes": 3},
    "sampled": {"architecture": "unet", "d_model": 24, "n_layer": 1, "pool": (4,), "vocab_size": 256, "prediction_order": 32,
                "n_classes": 3, "tie_embeddings": False},
    "held": {"d_model": 16, "n_layer": 1, "vocab_size": 60, "prediction_order": 7, "prediction_memory": 0.98},
    "shifted": {"d_model": 64, "n_layer": 3, "vocab_size": 50, "n_classes": 3, "expand": 1},
    "odd": {"d_model": 20, "n_layer": 2, "d_state": 16, "d_conv": 3, "expand": 1, "conv_bias": False, "vocab_size": 16},
}  # fmt: skip


def make(name: str, seed: int = 0):
    torch.manual_seed(seed)
    model = build_model(ModelConfig(**MODELS[name])).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.ndim < 2:
                parameter += 0.2 * torch.randn_like(parameter)
            if "embedding" in parameter_name or "lm_head" in parameter_name:
                parameter.mul_(20)
            if any(name in parameter_name for name in ("class_shifts", "prediction_head.weight", "prediction_head.input")):  # they start as zero
                parameter.normal_(std=0.05)
    if name == "held":
        model.prediction_head.predictor.hold = 0.3
    return model.to(DEVICE)


def tokens_of(model, batch: int, length: int, seed: int = 1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, model.config.vocab_size, (batch, length), generator=generator).to(DEVICE)


def classes_of(model, batch: int):
    return torch.arange(batch, device=DEVICE) % 3 if model.config.n_classes else None


def decoder_of(model, batch: int, backend: str, **options):
    request_options = {"classes": classes_of(model, batch), **options}
    try:
        return Decoder(model, batch, backend=backend, **request_options)
    except RuntimeError as error:
        if "cannot run this" not in str(error):
            raise
        pytest.skip(str(error).split("; ")[0])


@torch.no_grad()
def parallel(model, ids, classes=None, allowed=None):
    """Log-probability of ids[:, 1:] by one forward pass over the whole."""
    logits = model(ids, classes=classes)[0].float()
    if allowed is not None:
        keep = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
        keep[allowed] = True
        logits = logits.masked_fill(~keep, -torch.inf)
    return logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]


# ------------------------------------------------------------------------------------------------------------ parity
@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("name", MODELS)
def test_steps_equal_the_parallel_forward(backend, name):
    model = make(name)
    ids = tokens_of(model, 3, 41)
    decoder = decoder_of(model, 3, backend)
    first = decoder.score(ids[:, :18])
    second = decoder.score(ids[:, 18:])
    got = torch.cat([first, second], 1)
    expected = parallel(model, ids, classes_of(model, 3))
    assert expected.std() > 0.5
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("prompt", [1, 7, 18])
def test_prompt_then_steps_equal_the_parallel_forward(backend, name, prompt, monkeypatch):
    monkeypatch.setattr(decode, "PREFILL", 15)  # the prompt goes in pieces
    model = make(name)
    ids = tokens_of(model, 3, 40)
    decoder = decoder_of(model, 3, backend)
    expected = parallel(model, ids, classes_of(model, 3))
    torch.testing.assert_close(decoder.prefill(ids[:, :prompt], log_probs=True), expected[:, : prompt - 1], atol=1e-4, rtol=0)
    torch.testing.assert_close(decoder.score(ids[:, prompt:30]), expected[:, prompt - 1 : 29], atol=1e-4, rtol=0)
    torch.testing.assert_close(decoder.prefill(ids[:, 30:], log_probs=True), expected[:, 29:], atol=1e-4, rtol=0)


@pytest.mark.parametrize("backend", [b for b in HERE if b != "reference"])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "sampling", [Sampling(seed=3), Sampling(0.7, top_k=5, top_p=0.8, seed=4), Sampling(1.3, top_p=0.9), Sampling(0.0)], ids=str
)
def test_tokens_are_those_of_the_reference(backend, name, sampling):
    model = make(name)
    prompt = tokens_of(model, 2, 5)
    decoders = [decoder_of(model, 2, b) for b in (backend, "reference")]
    for decoder in decoders:
        decoder.prefill(prompt)
    (got, got_lp), (expected, expected_lp) = (decoder.generate(33, sampling) for decoder in decoders)
    assert torch.equal(got, expected)
    torch.testing.assert_close(got_lp, expected_lp, atol=1e-4, rtol=0)
    whole = torch.cat([prompt, got.long()], 1)
    torch.testing.assert_close(got_lp, parallel(model, whole, classes_of(model, 2))[:, 4:], atol=1e-4, rtol=0)


@pytest.mark.parametrize("backend", HERE)
def test_blocks_batches_and_streams_change_nothing(backend):
    model = make("wide" if backend in STACKS else "unet")
    prompt, sampling = tokens_of(model, 4, 3), Sampling(seed=9)
    together = decoder_of(model, 4, backend)
    together.prefill(prompt)
    expected, _ = together.generate(30, sampling)
    pieces = decoder_of(model, 2, backend, streams=torch.tensor([3, 1]))
    pieces.prefill(prompt[[3, 1]])
    got = torch.cat([pieces.generate(n, sampling)[0] for n in (1, 5, 0, 24)], 1)
    assert torch.equal(got, expected[[3, 1]])
    assert len({tuple(row.tolist()) for row in expected}) == 4
    assert pieces.position == 33


@pytest.mark.parametrize("backend", HERE)
def test_only_allowed_tokens_are_drawn_and_scored(backend):
    """A DNA model: vocabulary of 16, of which A, C, G, T."""
    model = make("wide" if backend in STACKS else "odd")
    ids = torch.randint(7, 11, (2, 30), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    decoder = decoder_of(model, 2, backend, allowed=[7, 8, 9, 10])
    expected = parallel(model, ids, allowed=[7, 8, 9, 10])
    torch.testing.assert_close(decoder.score(ids), expected, atol=1e-4, rtol=0)
    drawn, _ = decoder.generate(200, Sampling(temperature=3.0))
    assert set(drawn.unique().tolist()) == {7, 8, 9, 10}


LAUNCHES = [(1, 1, 16), (1, 2, 16), (1, 4, 16), (1, 8, 16), (2, 1, 8), (2, 4, 8), (2, 8, 16), (2, 16, 16), (4, 4, 16), (4, 8, 8), (4, 16, 16),
            (8, 1, 16), (8, 2, 8), (8, 8, 16)]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.skipif("persistent" not in AVAILABLE, reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("cluster, streams, warps", LAUNCHES)
@pytest.mark.parametrize("name", ["large", "unet"])
def test_every_launch_of_the_persistent_kernel(cluster, streams, warps, name, monkeypatch):
    """Float32 exactly, bfloat16 closely; the last cluster has streams to spare."""
    shapes = decode.persistent.Shape
    monkeypatch.setattr(decode.persistent, "plan", lambda program, batch, half, *rest: shapes(cluster, streams, half, warps))
    monkeypatch.setitem(MODELS, "large", {"d_model": 256, "n_layer": 3, "vocab_size": 256, "tie_embeddings": False})
    monkeypatch.setitem(MODELS, "unet", {"architecture": "unet", "d_model": 64, "n_layer": 1, "pool": (3, 2), "vocab_size": 64})
    model = make(name)
    shape = shapes(cluster, streams, False, warps)
    if decode.persistent.sizes(decode.persistent.Program(model), shape)["shared"] > shape.room(decode.persistent.Device(0).shared_limit):
        pytest.skip("does not fit shared memory")
    batch = 5 * streams - (streams > 1)
    ids = tokens_of(model, batch, 40)
    with torch.no_grad():  # log-probabilities as spread as a trained model's
        model.lm_head.weight.mul_(2.0 / parallel(model, ids).std())
    expected = parallel(model, ids)
    assert expected.std() > 0.5
    for dtype, limit in ((torch.float32, 1e-4), (torch.bfloat16, 0.5)):
        decoder = Decoder(model, batch, backend="persistent", dtype=dtype)
        assert (decoder.score(ids) - expected).abs().max() < limit


@pytest.mark.gpu
@pytest.mark.skipif("persistent" not in AVAILABLE, reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("batch", [64, 513, 4096])
@pytest.mark.parametrize("name, backend", [("wide", "persistent"), ("unet", "persistent"), ("wide", "batched"), ("shifted", "batched")])
def test_thousands_of_streams(batch, name, backend):
    model = make(name)
    ids = tokens_of(model, batch, 24)
    decoder = decoder_of(model, batch, backend)
    torch.testing.assert_close(decoder.score(ids), parallel(model, ids, classes_of(model, batch)), atol=1e-4, rtol=0)


@pytest.mark.gpu
@pytest.mark.skipif("persistent" not in AVAILABLE, reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("backend, batch", [("batched", 1), ("batched", 70), ("batched", 512), ("solo", 1), ("solo", 9)])
@pytest.mark.parametrize("d_model", [64, 128, 256, 512])
def test_wide_stacks(backend, batch, d_model, monkeypatch):
    """Float32 exactly, bfloat16 closely; tokens as the other kernel draws them; twice the same."""
    monkeypatch.setitem(MODELS, "stack", {"d_model": d_model, "n_layer": 3, "vocab_size": 256, "tie_embeddings": False})
    model = make("stack")
    ids = tokens_of(model, batch, 40)
    with torch.no_grad():  # log-probabilities as spread as a trained model's
        model.lm_head.weight.mul_(2.0 / parallel(model, ids).std())
    expected = parallel(model, ids)
    for dtype, limit in ((torch.float32, 1e-4), (torch.bfloat16, 0.5)):
        decoder = decoder_of(model, batch, backend, dtype=dtype)
        assert (decoder.score(ids) - expected).abs().max() < limit
    drawn = []
    for name in (backend, backend, "persistent"):
        decoder = Decoder(model, batch, backend=name)
        decoder.prefill(ids[:, :5])
        drawn.append(decoder.generate(100, Sampling(top_p=0.95, seed=2)))
    assert torch.equal(drawn[0][0], drawn[1][0]) and torch.equal(drawn[0][1], drawn[1][1])
    assert (drawn[0][0] == drawn[2][0]).float().mean() > 0.99  # a draw at the border between two tokens may fall either way


@pytest.mark.gpu
@pytest.mark.skipif("clustered" not in AVAILABLE, reason="needs an NVIDIA GPU with clusters of sixteen blocks")
@pytest.mark.parametrize("batch", [1, 9, 70, 512, 1100])
@pytest.mark.parametrize("d_model, changes", [(64, {"n_layer": 2}), (64, {"n_classes": 3, "bias": True}), (128, {"d_conv": 3}), (256, {}), (512, {})])
def test_clusters_of_streams(batch, d_model, changes, monkeypatch):
    """No further from the parallel forward pass in float32 than `batched` with the same rounded weights; twice the same; a state that
    goes on elsewhere, in blocks of any length, with any neighbours."""
    stack = {"d_model": d_model, "n_layer": 3, "vocab_size": 200, "tie_embeddings": False, **changes}
    monkeypatch.setitem(MODELS, "stack", stack)
    model = make("stack")
    classes, ids, half = classes_of(model, batch), tokens_of(model, batch, 40), {"dtype": torch.bfloat16}
    with torch.no_grad():  # log-probabilities as spread as a trained model's
        model.lm_head.weight.mul_(2.0 / parallel(model, ids, classes).std())
    expected = parallel(model, ids, classes)
    errors = {}
    for name in ("batched", "clustered"):
        decoder = decoder_of(model, batch, name, **half)
        errors[name] = (torch.cat([decoder.score(ids[:, :18]), decoder.score(ids[:, 18:])], 1) - expected).abs()
    assert errors["clustered"].max() < 1.5 * errors["batched"].max() + 0.01 and errors["clustered"].mean() < 1.1 * errors["batched"].mean()
    drawn, decoders = [], []
    for blocks in ((30,), (30,), (1, 11, 18)):
        decoder = decoder_of(model, batch, "clustered", **half)
        decoder.prefill(ids[:, :5])
        drawn.append([torch.cat(parts, 1) for parts in zip(*(decoder.generate(n, Sampling(top_p=0.95, seed=2)) for n in blocks))])
        decoders.append(decoder)
    for tokens, log_probs in drawn[1:]:
        assert torch.equal(tokens, drawn[0][0]) and torch.equal(log_probs, drawn[0][1])
    other = decoder_of(model, batch, "batched", **half)
    other.load_state_dict(decoders[0].state_dict())
    following = ids[:, :20]
    assert (other.score(following) - decoders[0].score(following)).abs().max() < 0.2
    few = min(batch, 3)
    alone = decoder_of(model, few, "clustered", streams=torch.arange(few), **half)
    alone.prefill(ids[:few, :5])
    assert torch.equal(alone.generate(30, Sampling(top_p=0.95, seed=2))[0], drawn[0][0][:few])


@pytest.mark.gpu
@pytest.mark.skipif("clustered" not in AVAILABLE, reason="needs an NVIDIA GPU with clusters of sixteen blocks")
def test_only_allowed_tokens_are_drawn_by_clusters():
    model = make("wide")
    decoder = decoder_of(model, 40, "clustered", allowed=[7, 8, 9, 10], dtype=torch.bfloat16)
    decoder.prefill(tokens_of(model, 40, 3))
    drawn, _ = decoder.generate(50, Sampling(temperature=3.0))
    assert set(drawn.unique().tolist()) == {7, 8, 9, 10}
    with pytest.raises(RuntimeError, match="weights are float32"):
        Decoder(model, 40, backend="clustered")


@pytest.mark.gpu
@pytest.mark.skipif("batched" not in AVAILABLE, reason="needs an NVIDIA GPU")
def test_auto_takes_what_costs_least(monkeypatch):
    model = make("wide")
    for cheap in ("persistent", "batched", "solo"):
        for name in ("persistent", "batched", "solo"):
            monkeypatch.setattr(decode.BACKENDS[name], "price", lambda request, name=name: float(name != cheap))
        assert Decoder(model, 2).backend == cheap
    assert Decoder(make("unet"), 2).backend == "persistent"


@pytest.mark.parametrize("name", MODELS)
def test_a_step_asks_nothing_of_the_host(name):
    """Numbers that Python waits for cannot be part of a CUDA graph; fake tensors have none to give."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    model = make(name)
    request = decode.Request(model, 2, torch.device(DEVICE), torch.float32, classes=classes_of(model, 2))
    token, keys, state = tokens_of(model, 2, 1)[:, 0], torch.zeros(2, dtype=torch.long, device=DEVICE), None
    with torch.inference_mode(False), torch.no_grad():
        for position in range(3):
            r = draw(keys, torch.tensor(position, device=DEVICE))
            token, _, state = decode.reference.one_token(request, token, state, r, Sampling(), None)
        with FakeTensorMode(allow_non_fake_inputs=True):
            decode.reference.one_token(request, token, state, r, Sampling(), None)


# ------------------------------------------------------------------------------------------------------------- state
@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("name", ["isotropic", "unet", "classes", "fixed", "wide", "shifted"])
def test_saved_state_goes_on_exactly(backend, name):
    model = make(name)
    decoder = decoder_of(model, 2, backend)
    decoder.prefill(tokens_of(model, 2, 4))
    decoder.generate(9)
    saved = decoder.state_dict()
    expected = decoder.generate(20)
    other = decoder_of(model, 2, backend)
    other.load_state_dict(saved)
    got = other.generate(20)
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])
    assert other.position == decoder.position == 33
    on_reference = decoder_of(model, 2, "reference")
    on_reference.load_state_dict(saved)
    assert torch.equal(on_reference.generate(20)[0], expected[0])


def test_state_before_any_frame_goes_on_too():
    model = make("unet")
    decoder = Decoder(model, 1)
    decoder.prefill(torch.tensor([1, 2]))
    other = Decoder(model, 1)
    other.load_state_dict(decoder.state_dict())
    assert torch.equal(other.generate(9)[0], decoder.generate(9)[0])
    empty = Decoder(model, 1)
    empty.load_state_dict(Decoder(model, 1).state_dict())
    with pytest.raises(ValueError, match="call prefill"):
        empty.generate(1)


@pytest.mark.parametrize("backend", HERE)
def test_memory_per_stream_does_not_grow(backend):
    model = make("isotropic")
    decoder = decoder_of(model, 3, backend)
    decoder.prefill(tokens_of(model, 3, 10))
    before = decoder.state_bytes_per_stream
    decoder.generate(50)
    assert decoder.state_bytes_per_stream == before == 2 * 48 * (5 + 3) * 4


def test_same_prompt_for_all_streams_is_read_once(monkeypatch):
    model = make("isotropic")
    decoder, other = Decoder(model, 5), Decoder(model, 5)
    rows = []
    monkeypatch.setattr(decode.Decoder, "_forward", lambda self, *a, f=decode.Decoder._forward: rows.append(len(a[0])) or f(self, *a))
    prompt = tokens_of(model, 1, 12)
    decoder.prefill(prompt[0])
    assert rows == [1]
    other.prefill(torch.cat([prompt.expand(4, -1), tokens_of(model, 1, 12, seed=5)]))
    assert rows == [1, 5]
    assert torch.equal(decoder.generate(20)[0][:4], other.generate(20)[0][:4])


# ---------------------------------------------------------------------------------------------------------- sampling
def test_draws_are_uniform_and_independent_of_order():
    keys = torch.tensor([stream_key(7, s) for s in range(2000)])
    r = torch.stack([draw(keys, position) for position in range(50)])
    assert 0 < r.min() and r.max() < 1
    for values in (r.flatten(), r[0], r[:, 0].repeat(1)):
        assert abs(values.mean() - 0.5) < 5 * (1 / 12 / len(values)) ** 0.5
    counts = torch.histc(r.flatten(), 20, 0, 1)
    assert ((counts - 5000).square() / 5000).sum() < 45  # chi-squared, 19 degrees of freedom: 1e-3 at 43.8
    pairs = torch.corrcoef(torch.stack([r[:-1].flatten(), r[1:].flatten()]))[0, 1]
    assert abs(pairs) < 0.02
    assert draw(keys[5:6], 17) == r[17, 5]


def test_keys_match_splitmix64():
    """The finaliser's published test vector: the third output of splitmix64 seeded with 0 needs mix(3 g)."""
    from seqlab.ops.decode.sampling import GOLDEN, mix

    assert [mix((k * GOLDEN) % 2**64) for k in (1, 2, 3)] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


@pytest.mark.parametrize(
    "sampling, kept",
    [
        (Sampling(), {0, 1, 2, 3, 4}),
        (Sampling(top_k=2), {3, 1}),
        (Sampling(top_k=3), {3, 1, 0}),  # 0 and 4 tie: the lower token stays
        (Sampling(top_p=0.5), {3, 1}),  # 0.4 is not enough
        (Sampling(top_p=0.39), {3}),
        (Sampling(top_k=3, top_p=0.79), {3, 1}),  # of the mass of the three: 0.4 / 0.8, 0.7 / 0.8...
        (Sampling(temperature=0), {3}),
        (Sampling(temperature=0.05), {3, 1}),
    ],
    ids=str,
)
def test_cuts(sampling, kept):
    logits = torch.tensor([0.1, 0.3, 0.1, 0.4, 0.1]).log()
    logits[2] = torch.tensor(0.099).log()
    r = (torch.arange(4000) + 0.5) / 4000
    drawn = sample(logits.expand(4000, -1), r, sampling)
    assert set(drawn.unique().tolist()) == kept
    if sampling == Sampling():
        counts = torch.bincount(drawn, minlength=5) / 4000
        torch.testing.assert_close(counts, logits.exp() / logits.exp().sum(), atol=1e-3, rtol=0)


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("name", ["classes", "sampled"])
@pytest.mark.parametrize("weight", [0.7, 3.0])
def test_guided_draws_move_away_from_what_is_likely_without_the_class(backend, name, weight):
    model, sampling = make(name), Sampling(0.9, top_p=0.95, seed=4)
    classes, prompt = classes_of(model, 2), tokens_of(model, 2, 6)
    decoder = decoder_of(model, 2, backend, guidance=weight)
    decoder.prefill(prompt)
    tokens, log_probs = (torch.cat(parts, 1) for parts in zip(*(decoder.generate(n, sampling) for n in (5, 12))))
    whole = torch.cat([prompt, tokens.long()], 1)
    torch.testing.assert_close(log_probs, parallel(model, whole, classes)[:, 5:], atol=1e-4, rtol=0)
    keys = torch.tensor([stream_key(4, 0), stream_key(4, 1)], device=DEVICE)
    with torch.no_grad():
        told, untold = (model(whole, classes=c)[0].log_softmax(-1) for c in (classes, torch.full_like(classes, 2)))
    for i in range(17):
        drawn = sample((told + weight * (told - untold))[:, 5 + i], draw(keys, 6 + i), sampling)
        assert torch.equal(drawn, tokens[:, i].long())
    other = decoder_of(model, 2, "reference", guidance=weight)
    other.load_state_dict(decoder.state_dict())
    assert torch.equal(other.generate(9, sampling)[0], decoder.generate(9, sampling)[0])


# ------------------------------------------------------------------------------------------------------------ errors
def test_what_does_not_fit_is_one_clear_line():
    model, conditional = make("isotropic"), make("classes")
    for make_it, words in (
        (lambda: Decoder(build_model(ModelConfig(direction="bidirectional", d_model=8, n_layer=1))), "causal"),
        (lambda: Decoder(model, 0), "batch"),
        (lambda: Decoder(model, dtype=torch.float16), "float32 or bfloat16"),
        (lambda: Decoder(model, allowed=[99]), "allowed"),
        (lambda: Decoder(model, classes=torch.tensor([0])), "not conditional"),
        (lambda: Decoder(model, guidance=1.0), "not conditional"),
        (lambda: Decoder(conditional, classes=torch.tensor([0]), guidance=-1.0), "guidance: must be 0"),
        (lambda: Decoder(conditional, 2), "each of the 2 streams"),
        (lambda: Decoder(conditional, 2, classes=torch.tensor([0, 3])), "0 to 2"),
        (lambda: Decoder(model, 2, streams=torch.tensor([0])), "streams"),
        (lambda: Decoder(model, backend="refrence"), "did you mean"),
        (lambda: Decoder(model).generate(3), "call prefill"),
        (lambda: Decoder(model, 2).prefill(torch.zeros(3, 2, dtype=torch.long)), "ids"),
        (lambda: Decoder(model).prefill(torch.tensor([50])), "0 to 19"),
        (lambda: Sampling(temperature=-1), "temperature"),
        (lambda: Sampling(top_k=-1), "top_k"),
        (lambda: Sampling(top_p=0), "top_p"),
        (lambda: Sampling(seed=-1), "seed"),
    ):
        with pytest.raises(ValueError, match=words):
            make_it()
    with pytest.raises(RuntimeError, match="cannot run this.*reference: can run this"):
        Decoder(model, backend="cpu", dtype=torch.bfloat16)


@pytest.mark.parametrize("backend", ["cpu", "persistent"])
def test_an_adapter_in_the_place_of_a_projection_is_not_overlooked(backend):
    class Adapted(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1.0

    model = make("isotropic")
    model.backbone.layers[1].mixer.out_proj.__class__ = Adapted
    with pytest.raises(RuntimeError, match="Adapted|GPU"):
        Decoder(model, backend=backend)
    ids = tokens_of(model, 2, 12)
    torch.testing.assert_close(Decoder(model, 2, backend="auto").score(ids), parallel(model, ids), atol=1e-4, rtol=0)


def test_a_parameter_nobody_knows_keeps_the_compiled_back_ends_away():
    model = make("unet")
    model.backbone.gain = torch.nn.Parameter(torch.ones(1, device=DEVICE))
    reasons = decode.unavailable(decode.Request(model, 1, torch.device("cpu"), torch.float32))
    assert "backbone.gain" in reasons["cpu"] and reasons["reference"] is None


def test_state_of_another_model_is_refused():
    decoder = Decoder(make("isotropic"), 1)
    decoder.prefill(torch.tensor([1, 2]))
    saved = decoder.state_dict()
    with pytest.raises(ValueError, match="not of this model"):
        Decoder(make("wide"), 1).load_state_dict(saved)
    with pytest.raises(ValueError, match="1 streams, the decoder 2"):
        Decoder(make("isotropic"), 2).load_state_dict(saved)


@pytest.mark.parametrize("backend", [*HERE, *(pytest.param(name, marks=pytest.mark.gpu) for name in ROUNDED if name in AVAILABLE)])
def test_self_check_is_small_and_sees_a_wrong_back_end(backend, monkeypatch):
    from seqlab.ops.decode.self_check import self_check

    limit = getattr(decode.BACKENDS[backend], "TOLERANCE", 1e-5)
    assert self_check(backend) < limit
    run = decode.BACKENDS[backend].Runner.run
    monkeypatch.setattr(decode.BACKENDS[backend].Runner, "run", lambda self, token, *rest: run(self, token * 0, *rest))
    assert self_check(backend) > max(1e-3, limit)


def test_environment_names_a_back_end(monkeypatch):
    monkeypatch.setenv("SEQLAB_BACKEND", "reference")
    assert Decoder(make("isotropic")).backend == "reference"
    monkeypatch.setenv("SEQLAB_BACKEND", "mamba_ssm")  # of the scan; decoders have none
    assert Decoder(make("isotropic"), device="cpu").backend == "cpu"
    monkeypatch.setenv("SEQLAB_BACKEND", "refrence")  # was ignored
    with pytest.raises(ValueError, match="SEQLAB_BACKEND 'refrence' is not a back end; .*did you mean 'reference'"):
        Decoder(make("isotropic"))
    assert dataclasses.fields(Sampling)[0].name == "temperature"
