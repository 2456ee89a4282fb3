"""Memory modes: every parameter's gradient equal to the plain one's, whatever the cuts, masks, strands and dropout."""

import pytest
import torch

from seqlab.heads.language import weighted_cross_entropy
from seqlab.model import ModelConfig, build_model
from seqlab.training import memory
from seqlab.training.memory import Memory

COMPLEMENT = torch.tensor([0, 1, 2, 3, 4, 5, 6, 10, 9, 8, 7, 11])
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


class Task:
    """Weighted cross-entropy of every position."""

    def loss(self, model, batch):
        output, _ = model(batch["ids"], mask=batch.get("mask"), return_state=False)
        return self.piece_loss(output, batch, 0, output.shape[1])

    def piece_loss(self, output, batch, start, stop):
        return weighted_cross_entropy(output, batch["target"][:, start:stop], batch["weight"][:, start:stop])


def make(dtype=torch.float64, seed=0, **changes):
    torch.manual_seed(seed)
    config = ModelConfig(**{"d_model": 8, "n_layer": 3, "d_state": 4, **changes})
    return build_model(config, COMPLEMENT).to(dtype)


def make_batch(rows=2, length=53, seed=1, mask=False):
    generator = torch.Generator().manual_seed(seed)
    batch = {
        "ids": torch.randint(7, 11, (rows, length), generator=generator, dtype=torch.uint8),
        "target": torch.randint(7, 11, (rows, length), generator=generator, dtype=torch.uint8),
        "weight": torch.rand(rows, length, generator=generator),
    }
    if mask:  # padding on either side and holes
        batch["mask"] = torch.rand(rows, length, generator=generator) < 0.7
        batch["mask"][0, :9] = False
        batch["mask"][-1, -20:] = False
        batch["weight"] *= batch["mask"]
    return batch


def gradients(model, mode, chunk_tokens, batch, scale=0.37, task=None):
    model.zero_grad(set_to_none=True)
    setting = Memory(mode, chunk_tokens)
    memory.prepare(setting, model)
    torch.manual_seed(5)
    loss = memory.backward(setting, model, task or Task(), batch, scale)
    memory.prepare(Memory("plain"), model)
    return loss, {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_equal(found, expected, tolerance):
    assert abs(found[0] - expected[0]) <= tolerance * abs(expected[0])
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert gradient.norm() > 0, name
        error = ((found[1][name] - gradient).norm() / gradient.norm()).item()
        assert error < tolerance, f"{name}: {error:.1e}"


CAUSAL = {"direction": "causal"}
BOTH = {"direction": "bidirectional"}
CASES = {
    "block causal": ("block", CAUSAL),
    "block bidirectional": ("block", BOTH),
    "chunked": ("chunked", CAUSAL),
    "layerwise": ("layerwise", BOTH),
    "layerwise untied": ("layerwise", {**BOTH, "tie_projections": False, "tie_embeddings": False, "bias": True}),
    "layerwise multiply": ("layerwise", {**BOTH, "combine": "multiply", "bias": True}),
    "layerwise equivariant": ("layerwise", {**BOTH, "strand": "equivariant"}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("case", CASES)
def test_gradients_equal_the_plain_ones(case, masked, dtype):
    mode, changes = CASES[case]
    model, batch = make(dtype, **changes), make_batch(mask=masked)
    expected = gradients(model, "plain", 1, batch)
    # pieces of 7 (5 for four rows) and of one position, which is shorter than the convolution; the last piece shorter
    for chunk_tokens in (14, 1) if mode != "block" else (1,):
        assert_equal(gradients(model, mode, chunk_tokens, batch), expected, TOLERANCE[dtype])
