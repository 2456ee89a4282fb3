"""The block with a fixed recurrence: against the recurrence itself, and the laws of every causal backbone."""

import pytest
import torch

from seqlab.backbones import s4d
from seqlab.model import ModelConfig, build_model
from seqlab.training.optim import parameter_groups

KINDS = ("s4d", "s4d_complex")


def loop(v, log_decay, C, h):
    decay, outputs = torch.exp(log_decay), []
    for t in range(v.shape[1]):
        h = decay * h + v[:, t, :, None]
        y = (C * h).sum(-1)
        outputs.append(y.real if y.is_complex() else y)
    return torch.stack(outputs, 1), h


@pytest.mark.parametrize("is_complex", [False, True])
@pytest.mark.parametrize("length", [1, 5, 8, 9, 41, 200])
def test_scan_equals_the_recurrence(is_complex, length, monkeypatch):
    monkeypatch.setattr(s4d, "CHUNK", 8)
    monkeypatch.setattr(s4d, "GROUP", 3)  # 200 steps: 25 chunks, groups of groups
    torch.manual_seed(length)
    dtype = torch.complex128 if is_complex else torch.float64
    v = torch.randn(2, length, 3, dtype=torch.float64, requires_grad=True)
    log_decay = -torch.rand(3, 4, dtype=torch.float64) * 0.2 + (1j * torch.randn(3, 4) if is_complex else 0)
    log_decay, C, h = (
        x.to(dtype).requires_grad_() for x in (log_decay, torch.randn(3, 4, dtype=dtype), torch.randn(2, 3, 4, dtype=dtype))
    )
    inputs = (v, log_decay, C, h)
    got, expected = s4d.lti_scan(*inputs), loop(*inputs)
    for one, other in zip(got, expected):
        torch.testing.assert_close(one, other)
    weights = [torch.randn_like(x) for x in expected]
    grads = [torch.autograd.grad(out, inputs, weights) for out in (got, expected)]
    for one, other in zip(*grads):
        torch.testing.assert_close(one, other)


def make(kind: str, **options):
    torch.manual_seed(0)
    settings = {"d_model": 16, "n_layer": 2, "d_state": 4, "blocks": (kind,), **options}
    return build_model(ModelConfig(**settings)).eval()


def tokens(batch, length):
    return torch.randint(0, 16, (batch, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cuts", [[1], [2, 3], [130], list(range(1, 140))])
def test_pieces_and_steps_equal_the_whole(kind, cuts):
    model, ids = make(kind), tokens(2, 140)
    with torch.no_grad():
        whole, last = model(ids)
        state, pieces = None, []
        for piece in torch.tensor_split(ids, cuts, dim=1):
            if piece.shape[1]:
                logits, state = model(piece, state)
                pieces.append(logits)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, atol=1e-5, rtol=1e-4)
    assert whole.std() > 0.01
    for one, other in zip(state, last):
        torch.testing.assert_close(one.ssm, other.ssm, atol=1e-4, rtol=1e-4)
        assert one.ssm.dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
def test_a_float64_model_has_a_float64_state(kind):
    """It was rounded to float32 at every cut."""
    model, ids = make(kind).double(), tokens(2, 60)
    mask = torch.rand(2, 60, generator=torch.Generator().manual_seed(2)) < 0.7
    with torch.no_grad():
        for real in (None, mask):
            whole, _ = model(ids, mask=real)
            first, state = model(ids[:, :23], mask=None if real is None else real[:, :23])
            second, _ = model(ids[:, 23:], state, mask=None if real is None else real[:, 23:])
            torch.testing.assert_close(torch.cat([first, second], 1), whole, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_a_bfloat16_model_keeps_its_recurrence_in_float32(kind):
    """As `model.bfloat16()` makes it: everything but the parameters of the recurrence, which are rounded but read as float32."""
    torch.manual_seed(4)
    model = build_model(ModelConfig(d_model=8, n_layer=2, d_state=4, blocks=(kind,)))
    ids = torch.randint(0, 16, (2, 150))
    with torch.no_grad():
        expected, _ = model(ids)
        got, states = model.bfloat16()(ids)
    assert all(state.ssm.dtype == torch.float32 and state.ssm.isfinite().all() for state in states)
    assert (got - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_causal_changes_nothing_before(kind):
    model, ids = make(kind), tokens(1, 20)
    with torch.no_grad():
        before, _ = model(ids)
        for t in (0, 7, 19):
            changed = ids.clone()
            changed[0, t] = (changed[0, t] + 3) % 16
            after, _ = model(changed)
            torch.testing.assert_close(after[:, :t], before[:, :t], atol=1e-7, rtol=0)
            assert not torch.allclose(after[:, t], before[:, t])


@pytest.mark.parametrize("kind", KINDS)
def test_masked_positions_are_not_there(kind):
    model, ids = make(kind), tokens(2, 20)
    mask = torch.ones(2, 20, dtype=torch.bool)
    mask[0, :6] = False
    mask[1, 3:9:2] = mask[1, 18:] = False
    more = tokens(2, 7)
    with torch.no_grad():
        y, state = model(ids, mask=mask)
        y_more, _ = model(more, state)
        again, _ = model(more, model(ids, state, mask)[1])
        for row in range(2):
            once = ids[row, mask[row]]
            alone = model(torch.cat([once, more[row]])[None])[0][0]
            torch.testing.assert_close(y[row, mask[row]], alone[: len(once)], atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(y_more[row], alone[len(once) :], atol=1e-5, rtol=1e-4)
            twice = model(torch.cat([once, once, more[row]])[None])[0][0]
            torch.testing.assert_close(again[row], twice[2 * len(once) :], atol=1e-5, rtol=1e-4)


def test_kinds_are_chosen_stage_by_stage():
    model = make("s6", architecture="unet", pool=(2, 2), n_layer=1, blocks=("s4d_complex", "s4d", "s6"))
    kinds = [[type(layer.mixer).__name__, getattr(layer.mixer, "is_complex", None)] for stage in model.backbone.stages for layer in stage]
    outer, middle, centre = ["S4DMixer", True], ["S4DMixer", False], ["MambaMixer", None]
    assert kinds == [outer, middle, centre, middle, outer]
    ids = tokens(2, 23)
    with torch.no_grad():
        whole, _ = model(ids)
        first, state = model(ids[:, :9])
        second, _ = model(ids[:, 9:], state)
    torch.testing.assert_close(torch.cat([first, second], 1), whole, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="bidirectional stack is made of s6"):
        ModelConfig(direction="bidirectional", blocks=("s4d",))


@pytest.mark.parametrize("kind", KINDS)
def test_recurrence_is_free_of_weight_decay_and_trains(kind):
    model = make(kind)
    decayed, free = parameter_groups(model, 0.1)
    mixer = model.backbone.layers[0].mixer
    for parameter in (mixer.A_log, mixer.C, mixer.D, mixer.dt_bias, *([mixer.A_imag] if mixer.is_complex else [])):
        assert any(p is parameter for p in free["params"])
    model(tokens(2, 30), return_state=False)[0].square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())
