"""The persistent decoding kernel itself, run on the processor (emulate.py), against the model's own steps."""

import emulate
import pytest
import torch

from seqlab.model import build_model
from seqlab.ops.decode import persistent, reference
from seqlab.ops.decode.request import Request
from seqlab.ops.decode.sampling import Sampling, stream_key

pytestmark = pytest.mark.skipif(emulate.COMPILER is None, reason="g++ is not installed; it compiles the emulated kernels")

MODELS = {
    "isotropic": {"d_model": 24, "n_layer": 2, "d_state": 5, "vocab_size": 20, "bias": True},
    "unet": {"architecture": "unet", "d_model": 16, "n_layer": 1, "d_state": 16, "pool": (3, 2), "vocab_size": 70},
    "fixed": {"architecture": "unet", "d_model": 16, "n_layer": 1, "d_state": 5, "pool": (2,), "vocab_size": 16,
              "blocks": ("s4d_complex", "s4d")},
    "classes": {"d_model": 40, "n_layer": 1, "d_conv": 3, "conv_bias": False, "vocab_size": 16, "n_classes": 4},
    "sampled": {"architecture": "unet", "d_model": 16, "n_layer": 1, "pool": (3,), "vocab_size": 70, "prediction_order": 6,
                "n_classes": 4, "tie_embeddings": False},
    "held": {"d_model": 16, "n_layer": 1, "vocab_size": 60, "prediction_order": 7, "prediction_memory": 0.98},
}  # fmt: skip


class Device(emulate.Device):
    clusters = True

    def __init__(self):
        super().__init__(persistent.SOURCE, (persistent.KERNEL,))


def make(name: str):
    model = emulate.decoded_model(MODELS[name], shifts=0.05)
    if name == "held":
        model.prediction_head.predictor.hold = 0.3
    return model


@torch.inference_mode()
def errors(name, batch, cluster, streams, half=False, steps=11, sampling=None, allowed=None, given=False, guidance=0.0):
    """Largest differences of log-probabilities and of every state tensor; whether all tokens agree."""
    sampling = sampling or Sampling(seed=2)
    model = make(name)
    classes = torch.arange(batch) % 4 if model.config.n_classes else None
    classes = torch.tensor([0, 3, 1, 3, 2, 3])[:batch] if guidance else classes  # pairs, with a class and without
    base = None if classes is None else model.class_embedding.weight[classes]
    dtype = torch.bfloat16 if half else torch.float32
    request = Request(model, batch, torch.device("cpu"), dtype, allowed, classes, base, guidance)
    exact = reference.Runner(Request(model, batch, torch.device("cpu"), torch.float32, allowed, classes, base, guidance))
    if half:  # the same rounded weights for the model
        rounded = build_model(model.config).eval()
        rounded.load_state_dict(model.state_dict())
        for layer in rounded.backbone.layers:
            for linear in (layer.mixer.in_proj, layer.mixer.x_proj, layer.mixer.out_proj):
                linear.weight.copy_(linear.weight.bfloat16().float())
            layer.norm.weight.fill_(1.0)
        rounded.backbone.norm_f.weight.fill_(1.0)
        rounded.lm_head.weight.copy_(rounded.lm_head.weight.bfloat16().float())
        exact = reference.Runner(Request(rounded, batch, torch.device("cpu"), torch.float32, allowed, classes, base))
        model.load_state_dict(rounded.state_dict())
    runner = persistent.Runner(request, Device(), persistent.Shape(cluster, streams, half, warps=4))
    keys = torch.tensor([stream_key(sampling.seed, s // (2 if guidance else 1)) for s in range(batch)])
    prompt = torch.randint(0, model.config.vocab_size, (batch, 5))
    if guidance:
        prompt[1::2] = prompt[::2]
    state = model(prompt[:, :4], classes=classes)[1] if classes is not None else model(prompt[:, :4])[1]
    runner.load(state)
    exact.load(state)
    forced = torch.randint(0, model.config.vocab_size, (batch, steps)) if given else None
    first, rest = (None, None) if forced is None else forced.split([6, steps - 6], 1)
    got = [runner.run(prompt[:, 4], 5, 6, sampling, keys, first)]
    got.append(runner.run(got[0][0][:, -1], 11, steps - 6, sampling, keys, rest))
    tokens, log_probs = (torch.cat(parts, 1) for parts in zip(*got))
    expected, expected_lp = exact.run(prompt[:, 4], 5, steps, sampling, keys, forced)
    each = 2 if guidance else 1  # of a pair, only the row with the class has a log-probability
    worst = float((log_probs - expected_lp)[::each].abs().max())
    mine, theirs = runner.state(), exact.state()
    if model.config.prediction_order:
        worst = max(worst, float((mine.heard - theirs.heard).abs().max()))
        mine, theirs = mine.backbone, theirs.backbone
    for a, b in zip(getattr(mine, "blocks", mine), getattr(theirs, "blocks", theirs)):
        worst = max(worst, float((a.ssm - b.ssm).abs().max()), float((a.conv - b.conv).abs().max()))
    for a, b in zip(getattr(mine, "pools", ()), getattr(theirs, "pools", ())):
        assert a.phase == b.phase
        pending = (a.pending - b.pending)[:, : a.phase]
        worst = max([worst, float((a.held - b.held).abs().max()), *pending.abs().flatten().tolist()])
    return worst, torch.equal(tokens, expected)


@pytest.mark.parametrize(
    "name, batch, cluster, streams",
    [("isotropic", 1, 1, 1), ("isotropic", 3, 4, 2), ("unet", 3, 1, 2), ("unet", 3, 4, 2), ("classes", 3, 2, 4),
     ("fixed", 3, 2, 2), ("sampled", 1, 1, 1), ("sampled", 3, 2, 2), ("unet", 3, 4, 4), ("unet", 13, 1, 16),
     ("isotropic", 9, 2, 8), ("sampled", 9, 2, 8), ("held", 1, 1, 1), ("held", 9, 2, 8)],
)
def test_steps_equal_the_models(name, batch, cluster, streams):
    worst, same = errors(name, batch, cluster, streams)
    assert worst < 2e-5 and same


def test_rounded_weights():
    worst, same = errors("isotropic", 2, 2, 2, half=True)
    assert worst < 2e-5 and same


def test_tensor_cores_of_rounded_weights():
    """Eight streams of rounded weights: activations are rounded too, so nothing is exact but close."""
    worst, _ = errors("isotropic", 3, 2, 8, half=True, given=True)
    assert worst < 0.1


def test_tensor_core_layout_is_exact_on_small_integers():
    """Weights and inputs that bfloat16 holds exactly: a product must come out exactly."""
    torch.manual_seed(0)
    shape = persistent.Shape(1, 8, True)
    weight, x = (torch.randint(-8, 9, size).float() for size in ((40, 50), (50, 8)))
    packed = persistent.pack([weight], 48, 4, shape)  # (1 units groups g t far high pair)
    lanes = packed.reshape(4, 3, 32, 2, 2, 2)
    whole = torch.zeros(48, 64)
    for lane in range(32):
        g, t = divmod(lane, 4)
        for far in range(2):
            for high in range(2):
                for pair in range(2):
                    for unit in range(4):
                        for group in range(3):
                            value = lanes[unit, group, lane, far, high, pair]
                            whole[16 * group + 8 * high + g, 16 * unit + 8 * far + 2 * t + pair] = value
    assert torch.equal(whole[:40, :50] @ x, weight @ x)
    assert not whole[40:].any() and not whole[:, 50:].any()


@pytest.mark.parametrize("sampling", [Sampling(0.7, top_k=5, top_p=0.8), Sampling(1.2, top_p=0.9), Sampling(0.0)], ids=str)
def test_drawing(sampling):
    worst, same = errors("unet", 2, 1, 2, sampling=sampling, steps=20)
    assert worst < 5e-5 and same


@pytest.mark.parametrize("name, batch, cluster, streams", [("classes", 6, 2, 2), ("sampled", 6, 1, 4)])
def test_guidance(name, batch, cluster, streams):
    worst, same = errors(name, batch, cluster, streams, guidance=1.5, sampling=Sampling(0.8, top_p=0.9, seed=1))
    assert worst < 5e-5 and same


def test_only_allowed_tokens():
    allowed = torch.zeros(16, dtype=torch.bool)
    allowed[7:11] = True
    worst, same = errors("classes", 3, 2, 4, sampling=Sampling(3.0), allowed=allowed, steps=20)
    assert worst < 2e-5 and same
