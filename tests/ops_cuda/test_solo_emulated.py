"""The kernel for one stream a cluster itself, run on the processor (emulate.py), against the model's own steps."""

import emulate
import pytest
import torch

from seqlab.model import ModelConfig, build_model
from seqlab.ops.decode import reference, solo
from seqlab.ops.decode.program import Program
from seqlab.ops.decode.request import Request
from seqlab.ops.decode.sampling import Sampling

pytestmark = pytest.mark.skipif(emulate.COMPILER is None, reason="g++ is not installed; it compiles the emulated kernels")

MODELS = {
    "plain": {"d_model": 64, "n_layer": 2, "vocab_size": 20, "bias": True},
    "classes": {"d_model": 64, "n_layer": 3, "d_conv": 3, "expand": 1, "conv_bias": False, "vocab_size": 16, "n_classes": 4},
    "wide": {"d_model": 128, "n_layer": 1, "dt_rank": 36, "vocab_size": 70, "tie_embeddings": False},
}


@torch.inference_mode()
def errors(name, batch, half=False, steps=7, sampling=None, allowed=None, given=False):
    """Largest difference of log-probabilities and of every state tensor; whether all tokens agree."""
    sampling = sampling or Sampling(seed=2)
    model = emulate.decoded_model(MODELS[name])
    classes = torch.arange(batch) % 4 if model.config.n_classes else None
    base = None if classes is None else model.class_embedding.weight[classes]
    request = Request(model, batch, torch.device("cpu"), torch.bfloat16 if half else torch.float32, allowed, classes, base)
    assert solo.unfit(request) is None
    exact = reference.Runner(Request(model, batch, torch.device("cpu"), torch.float32, allowed, classes, base))
    runner = solo.Runner(request, emulate.Device(solo.SOURCE, (solo.KERNEL,)))
    worst, states, tokens, expected = emulate.decoded_beside(runner, exact, model, batch, classes, steps, sampling, given)
    return max(worst, states), torch.equal(tokens, expected)


@pytest.mark.parametrize("name, batch", [("plain", 1), ("plain", 3), ("classes", 3), ("wide", 1)])
def test_steps_equal_the_models(name, batch):
    worst, same = errors(name, batch)
    assert worst < 5e-5 and same


def test_tokens_given_and_tokens_allowed():
    allowed = torch.zeros(20, dtype=torch.bool)
    allowed[3:9] = True
    worst, same = errors("plain", 2, sampling=Sampling(3.0, top_p=0.9), allowed=allowed)
    assert worst < 5e-5 and same
    worst, same = errors("plain", 2, given=True)
    assert worst < 5e-5 and same


def test_rounded_weights_are_close():
    worst, _ = errors("wide", 1, half=True, given=True)
    assert 1e-6 < worst < 0.15


def test_a_cluster_takes_what_fits():
    def sizes(half, **config):
        return solo.Sizes.of(Program(build_model(ModelConfig(vocab_size=256, **config))), half, 227 * 1024, 1, 132)

    assert [sizes(True, d_model=d, n_layer=8).cluster for d in (64, 128, 256)] == [4, 8, 16]
    assert not sizes(True, d_model=64, n_layer=8).half
    assert sizes(True, d_model=512, n_layer=16) is None and sizes(True, d_model=256, n_layer=40) is None


@pytest.mark.parametrize(
    "changes, words",
    [({"architecture": "unet", "pool": (2,)}, "isotropic"), ({"d_state": 8}, "d_state is 8"), ({"d_model": 96}, "d_model is 96"),
     ({"vocab_size": 2000}, "2000 tokens"), ({"vocab_size": 256, "prediction_order": 4}, "linear prediction")],
)  # fmt: skip
def test_models_that_do_not_fit_are_refused_with_the_reason(changes, words):
    model = build_model(ModelConfig(**{"d_model": 64, "n_layer": 1, "vocab_size": 16, **changes})).eval()
    assert words in solo.unfit(Request(model, 2, torch.device("cpu"), torch.float32))
