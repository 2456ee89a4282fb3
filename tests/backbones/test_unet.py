"""U-Net laws: causality sample by sample, pieces == whole == step, any length, pooling as SaShiMi computes it."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from seqlab.backbones.mamba import BackboneConfig
from seqlab.backbones.unet import DownPool, UNet, UpPool
from seqlab.model import ModelConfig, build_model

SMALL = {"architecture": "unet", "d_model": 8, "n_layer": 2, "d_state": 4, "pool": (3, 2)}


def make(seed: int = 0, **options) -> UNet:
    torch.manual_seed(seed)
    model = UNet(BackboneConfig(**{**SMALL, **options})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim < 2:
                parameter += 0.2 * torch.randn_like(parameter)
    return model.double()


def signal(batch: int, length: int, d_model: int = 8) -> torch.Tensor:
    return torch.randn(batch, length, d_model, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def same(got, expected):
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)  # scan states are at least float32


# ------------------------------------------------------------------------------------------------ the arithmetic
def test_pools_are_sashimis():
    """audio.md 3.1, written channel-first as there: (H, L) -> (H p, L/p) -> Linear, and back behind one frame of zeros."""
    torch.manual_seed(0)
    down, up, x = DownPool(5, 7, 4), UpPool(7, 5, 4), torch.randn(2, 5, 12)
    pooled = torch.einsum("oc,bcl->bol", down.linear.weight, x.reshape(2, 5, 3, 4).transpose(2, 3).reshape(2, 20, 3))
    pooled = pooled + down.linear.bias[:, None]
    got = down(x.transpose(1, 2).reshape(2, 3, 4, 5))
    torch.testing.assert_close(got, pooled.transpose(1, 2))
    expanded = torch.einsum("oc,bcl->bol", up.linear.weight, pooled) + up.linear.bias[:, None]
    expected = expanded.reshape(2, 5, 4, 3).transpose(2, 3).reshape(2, 5, 12)
    torch.testing.assert_close(up(got).flatten(1, 2), expected.transpose(1, 2))


def textbook(model: UNet, x: torch.Tensor) -> torch.Tensor:
    """The U-Net as SaShiMi's code walks it, with a stack of skips, for lengths that fill every frame."""
    def block(layer, x):
        return layer(x, None, None, False)[0]

    outputs = [x]
    for blocks, pool in zip(model.down, model.down_pools):
        for layer in blocks:
            outputs.append(block(layer, outputs[-1]))
        h = outputs[-1]
        p = pool.linear.in_features // h.shape[2]
        h = h.transpose(1, 2)  # (b d l)
        h = h.reshape(*h.shape[:2], -1, p).permute(0, 1, 3, 2).flatten(1, 2)  # (b d p, l/p)
        outputs.append(F.linear(h.transpose(1, 2), pool.linear.weight, pool.linear.bias))
    h = outputs[-1]
    for layer in model.centre:
        h = block(layer, h)
    h = h + outputs.pop()
    for blocks, pool in reversed(list(zip(model.up, model.up_pools))):
        h = F.linear(h, pool.linear.weight, pool.linear.bias).transpose(1, 2)
        h = F.pad(h[..., :-1], (1, 0))  # one frame late
        h = h.reshape(h.shape[0], -1, pool.pool, h.shape[2]).permute(0, 1, 3, 2).flatten(2).transpose(1, 2)
        h = h + outputs.pop()
        for layer in blocks:
            h = block(layer, h) + outputs.pop()
    assert not outputs
    return model.norm_f(h)


@pytest.mark.parametrize("pool", [(3, 2), (4,), (2, 2, 2)])
def test_whole_sequence_equals_the_textbook(pool):
    model, x = make(pool=pool), signal(2, 24)
    with torch.no_grad():
        same(model(x)[0], textbook(model, x))


@pytest.mark.parametrize(
    "d_model, n_layer, pool, published", [(64, 3, (16, 16), 3.5e6), (64, 8, (4, 4), 6.1e6), (96, 15, (4, 4), 24.3e6)]
)
def test_parameter_counts_of_the_papers_audio_models(d_model, n_layer, pool, published):
    config = ModelConfig(architecture="unet", d_model=d_model, n_layer=n_layer, pool=pool, vocab_size=256, tie_embeddings=False)
    with torch.device("meta"):
        count = sum(p.numel() for p in build_model(config).parameters())
    assert abs(count / published - 1) < 0.03


# --------------------------------------------------------------------------------------------------------- streaming
@given(length=st.integers(1, 40), cuts=st.lists(st.integers(1, 39), max_size=6))
@settings(max_examples=25, deadline=None)
def test_any_cut_of_any_length_equals_the_whole(length, cuts):
    model, x = make(), signal(2, length)
    with torch.no_grad():
        whole, last = model(x)
        assert whole.shape == x.shape
        state, pieces = None, []
        for piece in torch.tensor_split(x, sorted(c for c in cuts if c < length), dim=1):
            y, state = model(piece, state)
            pieces.append(y)
    same(torch.cat(pieces, 1), whole)
    for one, other in zip(state.pools, last.pools):
        assert one.phase == other.phase
        same(one.pending, other.pending)
        same(one.held, other.held)
    for one, other in zip(state.blocks, last.blocks):
        assert (one is None) == (other is None)
        if one is not None:
            same(one.ssm, other.ssm)


@pytest.mark.parametrize("length", [1, 5, 29])
def test_step_by_step_equals_the_whole(length):
    model, x = make(), signal(2, length)
    with torch.no_grad():
        whole, _ = model(x)
        state, steps = None, []
        for t in range(length):
            y, state = model.step(x[:, t : t + 1], state)
            steps.append(y)
    same(torch.cat(steps, 1), whole)


def test_causal_sample_by_sample():
    model, x = make(), signal(1, 25)
    with torch.no_grad():
        before, _ = model(x)
        for t in range(25):
            changed = x.clone()
            changed[0, t] += 1.0
            after, _ = model(changed)
            assert torch.equal(after[:, :t], before[:, :t])
            assert not torch.allclose(after[:, t], before[:, t])


def test_a_frame_is_heard_from_the_next_frame_on():
    """Without blocks at the full rate only the pools carry anything from one position to another."""
    model, x = make(n_layer=1, pool=(4,)), signal(1, 12)
    for blocks in (*model.down, *model.up):
        for layer in blocks:
            torch.nn.init.zeros_(layer.mixer.out_proj.weight)
    with torch.no_grad():
        before = model(x)[0]
        x[0, 5] += 1.0
        moved = (model(x)[0] - before).abs().amax((0, 2)) > 1e-9
    assert moved.tolist() == [False] * 5 + [True] + [False] * 2 + [True] * 4


# ------------------------------------------------------------------------------------------------------------- masks
def test_padding_and_rows_of_different_length_change_nothing():
    model, lengths = make(), [19, 8, 13]
    x = signal(3, 24)
    mask = torch.zeros(3, 24, dtype=torch.bool)
    mask[0, 5:] = True  # left padding
    mask[1, :8] = True  # right padding
    mask[2, 1:20:2] = mask[2, 20:23] = True  # holes
    more = signal(3, 7)
    with torch.no_grad():
        y, state = model(x, mask=mask)
        y_more, _ = model(more, state)
        pair, _ = model(more[:, 3:], model(more[:, :3], state, torch.ones(3, 3, dtype=torch.bool))[1])
        for row, length in enumerate(lengths):
            alone = torch.cat([x[row, mask[row]], more[row]])[None]
            expected = model(alone)[0][0]
            assert mask[row].sum() == length
            same(y[row, mask[row]], expected[:length])
            same(y_more[row], expected[length:])
            same(pair[row], expected[length + 3 :])


# --------------------------------------------------------------------------------------------------------- gradients
def test_gradient_flows_through_the_state_between_pieces():
    model, x = make(), signal(2, 22).requires_grad_()
    weight = signal(2, 22) * 0.3
    (model(x)[0] * weight).sum().backward()
    whole = {name: p.grad.clone() for name, p in model.named_parameters()}
    dx = x.grad.clone()
    assert all(g.abs().max() > 0 for g in whole.values())
    model.zero_grad()
    x.grad = None
    first, state = model(x[:, :7])
    second, _ = model(x[:, 7:], state)
    (torch.cat([first, second], 1) * weight).sum().backward()
    same(x.grad, dx)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, whole[name], rtol=2e-5, atol=2e-5, msg=name)


def test_checkpointed_blocks_change_neither_gradients_nor_names():
    model, x = make(), signal(1, 13)
    model(x)[0].square().sum().backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model.checkpoint_blocks = True
    model(x)[0].square().sum().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, plain[name], msg=name)


# ------------------------------------------------------------------------------------------------------ configuration
def test_configs_refuse_impossible_values():
    for change, words in (
        ({"direction": "bidirectional"}, "unet is causal"),
        ({"pool": ()}, "pool: one or more"),
        ({"pool": (4, 1)}, "pool: one or more"),
        ({"pool_expand": 0}, "pool_expand"),
        ({"blocks": ("s6", "s6")}, "blocks: 1 or 3 names"),
    ):
        with pytest.raises(ValueError, match=words):
            dataclasses.replace(BackboneConfig(**SMALL), **change)


# ------------------------------------------------------------------------------------------------ class conditioning
def test_class_embedding_is_added_to_every_token():
    torch.manual_seed(0)
    model = build_model(ModelConfig(**SMALL, vocab_size=16, n_classes=3)).eval()
    ids, classes = torch.randint(0, 16, (3, 10)), torch.tensor([2, 0, 2])
    with torch.no_grad():
        got, state = model(ids[:, :4], classes=classes)
        rest, _ = model(ids[:, 4:], state, classes=classes)
        x = model.embedding(ids) + model.class_embedding(classes)[:, None]
        expected = model.lm_head(model.backbone(x)[0])
    torch.testing.assert_close(torch.cat([got, rest], 1), expected, atol=1e-5, rtol=1e-4)


def test_classes_are_asked_for_where_needed_and_refused_elsewhere():
    ids = torch.zeros(1, 2, dtype=torch.long)
    with pytest.raises(ValueError, match="this model is conditional"):
        build_model(ModelConfig(**SMALL, n_classes=3))(ids)
    with pytest.raises(ValueError, match="not conditional"):
        build_model(ModelConfig(**SMALL))(ids, classes=torch.tensor([0]))
    with pytest.raises(ValueError, match="n_classes"):
        ModelConfig(n_classes=-1)
