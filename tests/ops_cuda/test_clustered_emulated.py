"""The kernel whose clusters keep hundreds of streams itself, run on the processor (emulate.py), against the model's own steps."""

import emulate
import pytest
import torch

from seqlab.model import ModelConfig, build_model
from seqlab.ops.decode import clustered, reference
from seqlab.ops.decode.program import Program
from seqlab.ops.decode.request import Request
from seqlab.ops.decode.sampling import Sampling

pytestmark = pytest.mark.skipif(emulate.COMPILER is None, reason="g++ is not installed; it compiles the emulated kernels")

MODELS = {
    "plain": {"d_model": 64, "n_layer": 2, "vocab_size": 20, "bias": True},
    "classes": {"d_model": 64, "n_layer": 3, "d_conv": 3, "conv_bias": False, "vocab_size": 80, "n_classes": 4},
    "wide": {"d_model": 128, "n_layer": 2, "d_conv": 2, "dt_rank": 30, "vocab_size": 70, "tie_embeddings": False},
}


@torch.inference_mode()
def errors(name, batch, steps=7, sampling=None, allowed=None, given=False, clusters=None, tiles=1, depth=1):
    """Largest difference of log-probabilities, and of every state tensor; the share of tokens that agree. The model's matrices are rounded
    as the kernel's are, so that what is left is the rounding of activations."""
    sampling = sampling or Sampling(seed=2)
    model = emulate.decoded_model(MODELS[name])
    for layer in model.backbone.layers:
        layer.norm.weight.fill_(1.0)  # folded into in_proj before that is rounded
        for matrix in (layer.mixer.in_proj, layer.mixer.x_proj, layer.mixer.out_proj):
            matrix.weight.copy_(matrix.weight.bfloat16())
    model.backbone.norm_f.weight.fill_(1.0)
    model.lm_head.weight.copy_(model.lm_head.weight.bfloat16())
    classes = torch.arange(batch) % 4 if model.config.n_classes else None
    base = None if classes is None else model.class_embedding.weight[classes]
    request = Request(model, batch, torch.device("cpu"), torch.bfloat16, allowed, classes, base)
    assert clustered.unfit(request) is None
    exact = reference.Runner(Request(model, batch, torch.device("cpu"), torch.float32, allowed, classes, base))
    device = emulate.Device(clustered.SOURCE, (clustered.KERNEL,))
    sizes = clustered.Sizes.of(Program(model), batch, clusters or 1, device.shared_limit)
    sizes = sizes._replace(clusters=clusters or 1, tiles=tiles, depth=depth)
    runner = clustered.Runner(request, device, sizes)
    worst, states, tokens, expected = emulate.decoded_beside(runner, exact, model, batch, classes, steps, sampling, given)
    return worst, states, float((tokens == expected).float().mean())


@pytest.mark.parametrize("name, batch, options", [
    ("plain", 1, {}), ("plain", 13, {"tiles": 2}), ("plain", 21, {"tiles": 3, "depth": 2}), ("plain", 15, {"clusters": 2}), ("classes", 7, {}), ("wide", 6, {}), ("wide", 21, {"tiles": 3}),
])  # fmt: skip
def test_steps_equal_the_models(name, batch, options):
    worst, states, _ = errors(name, batch, given=True, **options)
    assert 1e-6 < worst < 0.05 and states < 0.05


def test_drawing_and_tokens_allowed():
    allowed = torch.zeros(20, dtype=torch.bool)
    allowed[3:9] = True
    worst, states, agree = errors("plain", 11, sampling=Sampling(3.0, top_p=0.9), allowed=allowed, tiles=2)
    assert worst < 0.05 and states < 0.05 and agree > 0.9  # but for draws at a border between two tokens


def test_streams_are_shared_out_among_the_clusters_that_run_at_once():
    def sizes(batch, **config):
        program = Program(build_model(ModelConfig(vocab_size=256, **{"n_layer": 8, **config})))
        of = clustered.Sizes.of(program, batch, clustered.at_once(config["d_model"] // 32, 132), 227 * 1024)
        return of.cluster, of.clusters, of.tiles

    assert [sizes(512, d_model=d) for d in (64, 128, 256)] == [(2, 64, 1), (4, 30, 3), (8, 15, 5)]
    assert sizes(3, d_model=256) == (8, 1, 1) and sizes(1024, d_model=256) == (8, 30, 5)


@pytest.mark.parametrize(
    "changes, words",
    [({"architecture": "unet", "pool": (2,)}, "isotropic"), ({"d_state": 8}, "d_state is 8"), ({"d_model": 96}, "d_model is 96"),
     ({"expand": 1}, "d_inner 64"), ({"n_layer": 1}, "one layer"), ({"dt_rank": 40}, "dt_rank is 40"), ({"vocab_size": 2000}, "2000 tokens"),
     ({"vocab_size": 256, "prediction_order": 4}, "linear prediction")],
)  # fmt: skip
def test_models_that_do_not_fit_are_refused_with_the_reason(changes, words):
    model = build_model(ModelConfig(**{"d_model": 64, "n_layer": 2, "vocab_size": 16, **changes})).eval()
    half = torch.float32 if "prediction_order" in changes else torch.bfloat16
    assert words in clustered.unfit(Request(model, 2, torch.device("cpu"), half))
    assert "float32" in clustered.unfit(Request(build_model(ModelConfig(d_model=64, n_layer=2)), 2, torch.device("cpu"), torch.float32))
