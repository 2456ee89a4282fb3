"""The batched decoding kernels themselves, run on the processor (emulate.py), against the model's own steps."""

import emulate
import pytest
import torch

from seqlab.model import ModelConfig, build_model
from seqlab.ops.decode import batched, reference
from seqlab.ops.decode.request import Request
from seqlab.ops.decode.sampling import Sampling

pytestmark = pytest.mark.skipif(emulate.COMPILER is None, reason="g++ is not installed; it compiles the emulated kernels")

MODELS = {
    "plain": {"d_model": 32, "n_layer": 2, "vocab_size": 20, "bias": True},
    "wide": {"d_model": 160, "n_layer": 1, "d_state": 32, "vocab_size": 70, "tie_embeddings": False},
    "classes": {"d_model": 64, "n_layer": 2, "d_conv": 3, "expand": 1, "conv_bias": False, "vocab_size": 16, "n_classes": 4},
    "ranks": {"d_model": 64, "n_layer": 1, "dt_rank": 20, "vocab_size": 33},
}  # fmt: skip


@torch.inference_mode()
def errors(name, batch, half=False, steps=7, sampling=None, allowed=None, given=False, monkeypatch=None, tiles=None):
    """Largest difference of log-probabilities and of every state tensor; whether all tokens agree."""
    sampling = sampling or Sampling(seed=2)
    model = emulate.decoded_model(MODELS[name])
    classes = torch.arange(batch) % 4 if model.config.n_classes else None
    base = None if classes is None else model.class_embedding.weight[classes]
    device = emulate.Device(batched.SOURCE, batched.KERNELS)
    request = Request(model, batch, torch.device("cpu"), torch.bfloat16 if half else torch.float32, allowed, classes, base)
    assert batched.unfit(request) is None
    if tiles:
        monkeypatch.setattr(batched.Sizes, "of", lambda program, half, limit: batched.Sizes(program, half, *tiles))
    exact = reference.Runner(Request(model, batch, torch.device("cpu"), torch.float32, allowed, classes, base))
    runner = batched.Runner(request, device)
    worst, states, tokens, expected = emulate.decoded_beside(runner, exact, model, batch, classes, steps, sampling, given)
    return max(worst, states), torch.equal(tokens, expected)


@pytest.mark.parametrize("name, batch", [("plain", 1), ("plain", 70), ("wide", 5), ("classes", 35), ("ranks", 3)])
def test_steps_equal_the_models(name, batch):
    worst, same = errors(name, batch)
    assert worst < 5e-5 and same


@pytest.mark.parametrize("tiles", [(1, 1), (1, 2), (2, 1)])
def test_every_tile_equals_the_models_steps(tiles, monkeypatch):
    worst, same = errors("plain", 37, steps=5, tiles=tiles, monkeypatch=monkeypatch)
    assert worst < 5e-5 and same


def test_tokens_given_and_tokens_allowed():
    allowed = torch.zeros(20, dtype=torch.bool)
    allowed[3:9] = True
    worst, same = errors("plain", 3, sampling=Sampling(3.0, top_p=0.9), allowed=allowed, steps=12)
    assert worst < 5e-5 and same
    worst, same = errors("plain", 3, given=True)
    assert worst < 5e-5 and same


@pytest.mark.parametrize("name", ["plain", "wide", "classes"])
def test_rounded_weights_are_close(name):
    worst, _ = errors(name, 3, half=True, given=True)
    assert 1e-6 < worst < 0.15


@pytest.mark.parametrize(
    "changes, words",
    [({"architecture": "unet", "pool": (2,)}, "isotropic"), ({"d_state": 8}, "d_state is 8"), ({"d_model": 24}, "multiple of 32"),
     ({"vocab_size": 2000}, "2000 tokens"), ({"vocab_size": 256, "prediction_order": 4}, "linear prediction")],
)  # fmt: skip
def test_models_that_do_not_fit_are_refused_with_the_reason(changes, words):
    model = build_model(ModelConfig(**{"d_model": 32, "n_layer": 1, "vocab_size": 16, **changes})).eval()
    assert words in batched.unfit(Request(model, 2, torch.device("cpu"), torch.float32))
