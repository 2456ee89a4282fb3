"""Model laws: parity with an independent implementation, causality, pieces, padding, strands."""

import dataclasses

import pytest
import torch

from seqlab.backbones.mamba import Mamba
from seqlab.backbones.strand import average_strands
from seqlab.model import ModelConfig, build_model, language_model
from seqlab.training.checkpoint import load_model, save_model

COMPLEMENT = torch.tensor([0, 1, 2, 3, 4, 5, 6, 10, 9, 8, 7, 11, 12, 13, 14, 15])


def make(seed: int = 0, **options) -> torch.nn.Module:
    torch.manual_seed(seed)
    settings = {"d_model": 24, "n_layer": 2, "d_state": 5, **options}
    model = build_model(ModelConfig(**settings), COMPLEMENT).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim < 2:  # norms, biases and D away from 0 and 1, so that nothing cancels by accident
                parameter += 0.2 * torch.randn_like(parameter)
            if "embedding" in name:
                parameter.mul_(20)
    return model


def tokens(batch: int, length: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, 12, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("options", [{}, {"d_model": 32, "d_conv": 3, "expand": 1, "d_state": 16}])
def test_logits_equal_transformers_mamba(options):
    """An independent implementation (transformers' MambaForCausalLM, its pure PyTorch path), the same weights."""
    transformers = pytest.importorskip("transformers", reason="transformers is a test dependency: pip install '.[test]'")
    ours = make(**options)
    config = ours.config
    theirs = transformers.MambaForCausalLM(
        transformers.MambaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.d_model,
            state_size=config.d_state,
            num_hidden_layers=config.n_layer,
            conv_kernel=config.d_conv,
            expand=config.expand,
            time_step_rank=config.rank,
            layer_norm_epsilon=config.norm_epsilon,
            use_cache=False,
        )
    ).eval()
    weights = ours.state_dict()
    renamed = {
        name.replace("embedding.weight", "backbone.embeddings.weight") if name.startswith("embedding") else name: w
        for name, w in weights.items()
    }
    missing, unexpected = theirs.load_state_dict(renamed, strict=False)
    assert not missing and not unexpected
    ids = tokens(2, 83)
    with torch.no_grad():
        expected = theirs(ids).logits
        got, _ = ours(ids)
    assert expected.std() > 0.3
    assert (got - expected).abs().max() < 1e-4


def test_causal_changes_nothing_before():
    model, ids = make(), tokens(1, 40)
    with torch.no_grad():
        before, _ = model(ids)
        for t in (0, 7, 39):
            changed = ids.clone()
            changed[0, t] = 3 + (changed[0, t] - 2) % 9
            after, _ = model(changed)
            assert torch.equal(after[:, :t], before[:, :t])
            assert not torch.allclose(after[:, t], before[:, t])


@pytest.mark.parametrize("cuts", [[1], [2, 3], [40], [17, 18, 60], list(range(1, 61))])
def test_pieces_with_carried_state_equal_the_whole(cuts):
    model, ids = make(), tokens(2, 61)
    with torch.no_grad():
        whole, last = model(ids)
        state, pieces = None, []
        for piece in torch.tensor_split(ids, cuts, dim=1):
            if piece.shape[1]:
                logits, state = model(piece, state)
                pieces.append(logits)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, atol=2e-5, rtol=1e-4)
    for one, other in zip(state, last):
        torch.testing.assert_close(one.ssm, other.ssm, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(one.conv, other.conv, atol=2e-5, rtol=1e-4)


def test_gradient_flows_through_the_state_between_pieces():
    model, ids = make().double(), tokens(1, 30)
    weight = torch.randn(1, 30, 16, dtype=torch.float64)
    (model(ids)[0] * weight).sum().backward()
    whole = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    first, state = model(ids[:, :11])
    second, _ = model(ids[:, 11:], state)
    ((first * weight[:, :11]).sum() + (second * weight[:, 11:]).sum()).backward()
    for name, p in model.named_parameters():
        # the logits are float32 whatever the model: about 1e-7 of relative error is theirs
        torch.testing.assert_close(p.grad, whole[name], rtol=2e-5, atol=2e-5, msg=name)


@pytest.mark.parametrize("direction", ["causal", "bidirectional"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(direction, side):
    model, ids = make(direction=direction), tokens(2, 33)
    with torch.no_grad():
        plain, _ = model(ids, return_state=False)
        pad = torch.full((2, 9), 4)
        padded = torch.cat([pad, ids] if side == "left" else [ids, pad], 1)
        mask = torch.ones_like(padded, dtype=torch.bool)
        real = slice(9, None) if side == "left" else slice(0, 33)
        mask[:, :9 if side == "left" else 0] = False
        mask[:, 33 if side == "right" else 42 :] = False
        out, _ = model(padded, mask=mask, return_state=False)
    torch.testing.assert_close(out[:, real], plain, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("direction", ["causal", "bidirectional"])
def test_rows_of_a_batch_do_not_meet(direction):
    model, ids = make(direction=direction), tokens(4, 20)
    with torch.no_grad():
        together, _ = model(ids, return_state=False)
        order = [2, 0, 3, 1]
        torch.testing.assert_close(model(ids[order], return_state=False)[0], together[order], atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(model(ids[1:2], return_state=False)[0], together[1:2], atol=1e-6, rtol=1e-5)


def flipped_reference(mixer, x):
    """The textbook bidirectional mixer: a plain mixer, and one on the flipped sequence, flipped back."""
    return mixer.mamba_fwd(x)[0], mixer.mamba_rev(x.flip(1))[0].flip(1)


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("combine", ["add", "multiply"])
def test_bidirectional_mixer_equals_flipping(tie, combine):
    model = make(direction="bidirectional", tie_projections=tie, combine=combine)
    mixer = model.backbone.layers[0].mixer
    assert (mixer.mamba_fwd.in_proj.weight is mixer.mamba_rev.in_proj.weight) == tie
    x = torch.randn(2, 29, 24)
    with torch.no_grad():
        fwd, rev = flipped_reference(mixer, x)
        got, _ = mixer(x)
    torch.testing.assert_close(got, fwd + rev if combine == "add" else fwd * rev, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("length", [1, 2, 31])
def test_equivariant_model_commutes_with_reverse_complement(length):
    model, ids = make(direction="bidirectional", strand="equivariant"), tokens(2, length)
    with torch.no_grad():
        there, _ = model(ids)
        back, _ = model(COMPLEMENT[ids].flip(1))
    assert (back - there.flip(1)[..., COMPLEMENT]).abs().max() < 1e-5
    # the law is not vacuous: the same stack without sharing breaks it
    plain = make(direction="bidirectional")
    with torch.no_grad():
        there, back = plain(ids)[0], plain(COMPLEMENT[ids].flip(1))[0]
    assert (back - there.flip(1)[..., COMPLEMENT]).abs().max() > 1e-2


def test_averaging_strands_is_equivariant():
    model, ids = make(direction="bidirectional"), tokens(2, 31)
    with torch.no_grad():
        there = average_strands(model, COMPLEMENT, ids)
        back = average_strands(model, COMPLEMENT, COMPLEMENT[ids].flip(1))
    torch.testing.assert_close(back, there.flip(1)[..., COMPLEMENT], atol=1e-6, rtol=1e-5)


def test_equivariance_needs_a_bidirectional_model():
    with pytest.raises(ValueError, match="strand: equivariant needs direction: bidirectional"):
        ModelConfig(strand="equivariant", direction="causal")


def test_checkpointed_blocks_change_neither_gradients_nor_names():
    model, ids = make(), tokens(2, 25)
    model(ids, return_state=False)[0].square().sum().backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model.backbone.checkpoint_blocks = True
    model(ids, return_state=False)[0].square().sum().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, plain[name], msg=name)


@pytest.mark.parametrize("direction", ["causal", "bidirectional"])
def test_weights_round_trip_and_tied_tensors_are_stored_once(tmp_path, direction):
    from safetensors.torch import load_file

    model, ids = make(direction=direction), tokens(1, 12)
    save_model(model, tmp_path, "model: {}\n")
    stored = load_file(tmp_path / "model.safetensors")
    assert sum(w.numel() for w in stored.values()) == sum(p.numel() for p in model.parameters())
    other = make(seed=9, direction=direction)
    load_model(other, tmp_path / "model.safetensors")
    with torch.no_grad():
        assert torch.equal(other(ids, return_state=False)[0], model(ids, return_state=False)[0])


@pytest.mark.parametrize(
    "d_model, n_layer, expected", [(118, 4, 470_702), (128, 4, 541_312), (256, 4, 1_934_592), (256, 16, 7_725_312)]
)
def test_parameter_counts_of_the_published_caduceus_models(d_model, n_layer, expected):
    with torch.device("meta"):
        backbone_config = ModelConfig(d_model=d_model, n_layer=n_layer, direction="bidirectional")
    model = build_model(backbone_config)
    assert sum(p.numel() for p in model.parameters()) == expected


def test_initial_steps_lie_between_dt_min_and_dt_max():
    config = ModelConfig(d_model=64, n_layer=4)
    torch.manual_seed(0)
    mixer = Mamba(config).layers[0].mixer
    delta = torch.nn.functional.softplus(mixer.dt_proj.bias)
    assert delta.min() >= config.dt_min * 0.99 and delta.max() <= config.dt_max * 1.01
    assert torch.allclose(-torch.exp(mixer.A_log)[0], -torch.arange(1.0, 17.0))


def test_configs_refuse_impossible_values():
    for change in ({"d_model": 0}, {"dropout": 1.0}, {"dt_min": 0.0}, {"d_state": 300}, {"vocab_size": 4}):
        with pytest.raises(ValueError, match=next(iter(change))):
            dataclasses.replace(ModelConfig(), **change)


def test_language_model_is_found_inside_the_equivariant_wrapper():
    inner = make(direction="bidirectional", strand="equivariant")
    assert language_model(inner) is inner.model
    assert language_model(inner.model) is inner.model


TIED = [
    {"direction": "bidirectional"},
    {"direction": "bidirectional", "combine": "multiply", "bias": True},
    {"direction": "bidirectional", "strand": "equivariant"},
]


@pytest.mark.parametrize("options", TIED, ids=str)
def test_a_call_with_other_parameters_leaves_the_model_as_it_was(options):
    """torch.func.functional_call, which per-sample gradients and ensembles are made with, and projections of two names."""
    model, other = make(**options), make(seed=1, **options)
    ids = tokens(2, 9)
    before = dict(model.named_parameters())
    with torch.no_grad():
        found = torch.func.functional_call(model, dict(other.named_parameters()), (ids,))[0]
        torch.testing.assert_close(found, other(ids)[0])
    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items()) and len(after) == len(before)


@pytest.mark.parametrize("options", [{}, *TIED], ids=str)
@pytest.mark.parametrize("assign", [False, True])
def test_a_model_made_on_the_meta_device_is_filled_by_its_weights(options, assign):
    model, ids = make(**options), tokens(2, 9)
    with torch.device("meta"):
        empty = build_model(model.model.config if hasattr(model, "model") else model.config, COMPLEMENT)
    if not assign:
        empty.to_empty(device="cpu")
    empty.load_state_dict(model.state_dict(), assign=assign)
    torch.testing.assert_close(empty.eval()(ids)[0], model(ids)[0])
    assert dict(empty.named_parameters()).keys() == dict(model.named_parameters()).keys()  # what is tied stays so


def test_a_model_made_in_inference_mode_moves_outside_of_it():
    """The complement was written anew whenever the model was moved, which torch refuses for a tensor of inference mode."""
    with torch.inference_mode():
        model = make(direction="bidirectional", strand="equivariant")
    ids = tokens(1, 9)
    with torch.inference_mode():
        expected = model(ids)[0]
        assert torch.equal(model.to("cpu")(ids)[0], expected)
    model.to("cpu")
    with torch.no_grad():
        torch.testing.assert_close(model(ids)[0], expected)


def test_an_embedding_takes_whole_numbers_alone():
    with pytest.raises(ValueError, match="ids must be integers, got torch.float32 of shape"):
        make()(torch.zeros(1, 5, 4))
