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
    config = ModelConfig(**{"d_model": 8, "n_layer": 2, "d_state": 4, **changes})
    return build_model(config, COMPLEMENT).to(dtype)


def make_batch(rows=2, length=23, seed=1, mask=False):
    generator = torch.Generator().manual_seed(seed)
    batch = {
        "ids": torch.randint(7, 11, (rows, length), generator=generator, dtype=torch.uint8),
        "target": torch.randint(7, 11, (rows, length), generator=generator, dtype=torch.uint8),
        "weight": torch.rand(rows, length, generator=generator),
    }
    if mask:  # padding on either side and holes
        batch["mask"] = torch.rand(rows, length, generator=generator) < 0.7
        batch["mask"][0, :4] = False
        batch["mask"][-1, -8:] = False
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
    expected = gradients(model, "plain", None, batch)
    # pieces of 5 (for the equivariant model's four rows 2), the last shorter; and of one position, shorter than the
    # convolution
    for chunk_tokens in (11, 1) if mode != "block" else (None,):
        assert_equal(gradients(model, mode, chunk_tokens, batch), expected, TOLERANCE[dtype])


def test_comparison_notices_a_wrong_gradient(monkeypatch):
    """The states' gradients dropped, as in truncated back-propagation."""
    model, batch = make(**CAUSAL), make_batch()
    expected = gradients(model, "plain", None, batch)
    right = memory._back
    monkeypatch.setattr(memory, "_back", lambda outputs, gradients: right(outputs[:1], gradients[:1]))
    with pytest.raises(AssertionError, match=r"weight: \d\.\de-0"):
        assert_equal(gradients(model, "chunked", 11, batch), expected, 1e-5)


@pytest.mark.parametrize("mode", ["plain", "block", "chunked", "layerwise"])
def test_batches_are_dealt_out_by_rows_before_they_are_cut(mode):
    model = make(**(BOTH if mode == "layerwise" else CAUSAL))
    batch = make_batch(rows=5, length=13)
    expected = gradients(model, "plain", None, batch)
    seen = []
    model.embedding.register_forward_hook(lambda module, inputs, output: seen.append(tuple(inputs[0].shape)))
    assert_equal(gradients(model, mode, 30, batch), expected, 1e-10)
    assert seen == [(2, 13), (2, 13), (1, 13)]


def test_a_unet_runs_in_pieces():
    """Any causal backbone with the state contract; cuts fall inside its pooled frames."""
    model = make(d_model=6, n_layer=1, d_state=3, architecture="unet", pool=(4, 2))
    for masked in (False, True):
        batch = make_batch(length=43, mask=masked)
        expected = gradients(model, "plain", None, batch)
        assert_equal(gradients(model, "chunked", 14, batch), expected, 1e-10)


def test_dropout_is_drawn_again_when_a_piece_is_run_again():
    """The reference runs the pieces one after the other with the same seeds, one graph through all of them."""
    model, batch, task = make(dropout=0.4, **CAUSAL), make_batch(rows=1), Task()
    found = gradients(model, "chunked", 11, batch)
    model.zero_grad(set_to_none=True)
    torch.manual_seed(5)
    seed, state, total = int(torch.randint(2**62, ())), None, 0.0
    for i, piece in enumerate(memory.pieces(1, 23, 11)):
        memory._seed(seed, 0, i)
        output, state = model(batch["ids"][:, piece], state)
        total = total + task.piece_loss(output, batch, piece.start, piece.stop)[0]
    (total * 0.37).backward()
    expected = (total.detach(), {name: p.grad.clone() for name, p in model.named_parameters()})
    assert_equal(found, expected, 1e-10)
    assert any((g - h).norm() > 1e-3 for g, h in zip(found[1].values(), gradients(make(**CAUSAL), "plain", None, batch)[1].values()))


def test_layerwise_dropout_is_the_derivative_of_what_was_drawn():
    """Finite differences of the loss that the mode itself computes, with its own masks."""
    model, batch = make(n_layer=2, dropout=0.4, **BOTH), make_batch(length=17)
    loss, found = gradients(model, "layerwise", 9, batch, scale=1.0)
    for name in ("embedding.weight", "backbone.layers.0.mixer.mamba_rev.A_log", "backbone.layers.1.mixer.mamba_fwd.x_proj.weight"):
        parameter = dict(model.named_parameters())[name]
        direction = torch.randn(parameter.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        values = []
        for step in (1e-6, -1e-6):
            with torch.no_grad():
                parameter += step * direction
            values.append(gradients(model, "layerwise", 9, batch, scale=1.0)[0])
            with torch.no_grad():
                parameter -= step * direction
        numeric = (values[0] - values[1]).item() / 2e-6
        assert numeric == pytest.approx((found[name] * direction).sum().item(), rel=1e-6, abs=1e-8), name


@pytest.mark.parametrize("mode, changes", [("chunked", CAUSAL), ("layerwise", BOTH)])
def test_autocast_loses_no_gradient(mode, changes):
    """Autocast's cache would hand the second run of a piece weights cast without gradients."""
    model, batch = make(torch.float32, **changes), make_batch()
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(model, mode, 11, batch)
        expected = gradients(model, "plain", None, batch)
    assert_equal(found, expected, 0.1)


@pytest.mark.parametrize("mode, changes", [("chunked", CAUSAL), ("layerwise", {**BOTH, "strand": "equivariant"})])
def test_loss_without_gradients(mode, changes):
    model, batch = make(**changes).eval(), make_batch(mask=True)
    state = torch.get_rng_state()
    found = memory.loss(Memory(mode, 11), model, Task(), batch)
    expected = Task().loss(model, batch)
    assert torch.equal(state, torch.get_rng_state())
    for a, b in zip(found, expected, strict=True):
        assert not a.requires_grad and a.item() == pytest.approx(b.item(), rel=1e-6)


def saved_bytes(model, mode, chunk_tokens, batch):
    """Most bytes that autograd keeps at one time."""
    alive, most = {}, 0

    class Kept:
        def __init__(self, tensor):
            nonlocal most
            self.tensor = tensor
            alive[id(self)] = tensor.untyped_storage().nbytes()
            most = max(most, sum(alive.values()))

        def __del__(self):
            alive.pop(id(self), None)

    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        gradients(model, mode, chunk_tokens, batch)
    return most


def test_memory_of_the_chunked_mode_does_not_grow_with_length():
    model = make(**CAUSAL)
    plain, chunked = (
        [saved_bytes(model, mode, chunk, make_batch(1, length)) for length in (64, 256)]
        for mode, chunk in (("plain", None), ("chunked", 32))
    )
    assert plain[1] > 3.5 * plain[0]
    assert chunked[1] <= 1.02 * chunked[0] and chunked[0] < 0.7 * plain[0]


def test_which_modes_a_model_can_have():
    cpu = torch.device("cpu")

    def reasons(task=None, **changes):
        model = make(**changes)
        return {m: memory.unavailable(m, model, task or Task(), cpu) for m in memory.MODES}

    causal, both = reasons(**CAUSAL), reasons(**BOTH)
    assert [m for m in causal if causal[m] is None] == ["plain", "block", "chunked"]
    assert [m for m in both if both[m] is None] == ["plain", "block", "layerwise"]
    assert "host's already" in both["offload"] and "GPU" in both["subtract"] and "GPU" in both["states"]

    class Whole:
        """A task whose loss is not a sum over positions."""

    assert "pieces" in reasons(Whole(), **CAUSAL)["chunked"] and "sum over positions" in reasons(Whole(), **BOTH)["layerwise"]


def test_the_states_mode_is_the_blocks_own(monkeypatch):
    """Set on every block and taken back by the next mode; where blocks can run as one operator, and only for batches that gain."""
    model = make(n_layer=3, **BOTH)
    blocks = [m for m in model.modules() if isinstance(m, memory.Block)]
    for mode in ("states", "plain"):
        memory.prepare(Memory(mode), model)
        assert [m.keep_every_state for m in blocks] == [mode == "states"] * 3
    monkeypatch.setattr(memory.Block, "_fusible", lambda self, x: x.shape == (1, 1, 8))
    assert memory.unavailable("states", model, Task(), torch.device("cpu")) is None
    widest = memory.FINE_ABOVE // blocks[0].mixer.config.d_inner
    assert memory.keeps_states(model, widest + 1) and not memory.keeps_states(model, widest)


class LastTask:
    """A loss on the last position alone, by way of `piece`: the state says all that later pieces need."""

    def loss(self, model, batch):
        return self.piece(model, batch, 0, batch["ids"].shape[1], None, False)[:2]

    def piece(self, model, batch, start, stop, state, more):
        output, state = model(batch["ids"][:, start:stop], state, return_state=more)
        if more:
            return output.new_zeros(()), output.new_zeros(()), state
        loss, weight = weighted_cross_entropy(output[:, -1:], batch["target"][:, -1:], batch["weight"][:, -1:])
        return loss, weight, state


def test_a_task_with_a_loss_at_the_end():
    model, batch = make(**CAUSAL), make_batch()
    expected = gradients(model, "plain", None, batch, task=LastTask())
    assert_equal(gradients(model, "chunked", 11, batch, task=LastTask()), expected, 1e-10)
