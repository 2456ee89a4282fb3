"""Linear prediction in a model, and classes before every block: by hand, in pieces, from older checkpoints."""

import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from seqlab.errors import UserError
from seqlab.heads import sample
from seqlab.heads.sample import LinearPredictor, Prediction, PredictionHead, decaying_sum, levinson
from seqlab.model import LanguageModel, ModelConfig, build_model
from seqlab.training.checkpoint import load_model, save_model
from seqlab.training.parallel import share_mixers

SMALL = {"d_model": 12, "n_layer": 2, "d_state": 4, "vocab_size": 20, "prediction_order": 5}
UNET = {**SMALL, "architecture": "unet", "pool": (3,)}


def make(**config) -> LanguageModel:
    torch.manual_seed(0)
    model = build_model(ModelConfig(**config)).eval()
    for name, parameter in model.named_parameters():
        if name in ("prediction_head.weight", "prediction_head.input") or "class_shifts" in name:  # they start as zero
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def wave(n: int = 4000) -> np.ndarray:
    t = np.arange(n)
    rng = np.random.default_rng(0)
    return 0.5 * np.sin(0.3 * t) + 0.2 * np.sin(0.71 * t + 1) + 0.01 * rng.standard_normal(n)


# ------------------------------------------------------------------------------------------------------- the predictor
def test_levinson_solves_the_normal_equations():
    x = wave()
    r = torch.tensor([x[k:] @ x[: len(x) - k] for k in range(9)], dtype=torch.float64)
    r = torch.stack([r, r.flip(0).cumsum(0).flip(0) + 3 * torch.eye(9, dtype=torch.float64)[0] * r[0]], 1)
    lags = (torch.arange(8)[:, None] - torch.arange(8)).abs()
    for n in range(2):
        expected = torch.linalg.solve(r[lags, n], r[1:, n])
        torch.testing.assert_close(levinson(r)[:, n], expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("decay, length", [(0.5, 1), (0.5, 60), (0.998, 700)])
def test_decaying_sums_equal_the_loop(decay, length):
    x = torch.randn(2, length, 3, dtype=torch.float64)
    y, expected = torch.zeros(2, 3, dtype=torch.float64), []
    for t in range(length):
        y = decay * y + x[:, t]
        expected.append(y)
    torch.testing.assert_close(decaying_sum(x, decay), torch.stack(expected, 1), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("hold, memory", [(0.0, 0.995), (0.2, 0.995), (0.0, 0.98)])
def test_the_predictor_is_the_one_described(monkeypatch, hold, memory):
    """Sample by sample from the formulas, with the correlations of the windowed past computed from the window."""
    monkeypatch.setattr(sample, "PIECE", 64)
    order, n = 4, 150
    predictor = LinearPredictor(256, order, memory)
    predictor.hold = hold
    predictor.prior.copy_(torch.tensor([0.02, 0.01, 0.005, 0.002, 0.001]))
    codes = torch.from_numpy(np.clip(wave(n) * 128 + 128, 0, 255).astype(np.int64))[None]
    x = predictor.levels[codes[0]].double().numpy()
    got, heard = predictor(codes)
    p = e = mean = 0.0
    f0, f1 = predictor.floors()
    prior = predictor.prior.double().numpy()
    lags = np.abs(np.arange(order)[:, None] - np.arange(order))
    noisy = prior * np.where(np.arange(order + 1) == 0, 1 + sample.NOISE, 1)
    fixed = noisy[0] - noisy[1:] @ np.linalg.solve(noisy[lags], noisy[1:])  # error of one prediction for all
    sum_of_errors = sample.PAST * math.sqrt(2 / math.pi * fixed)
    for t in range(n):
        age = t - np.arange(t + 1)
        window = (memory ** (age / 2) - sample.ONSET**age) * x[: t + 1]
        r = np.array([window[k:] @ window[: t + 1 - k] if k <= t else 0.0 for k in range(order + 1)]) + prior
        r[0] *= 1 + sample.NOISE
        past = np.array([x[k : t + 1] @ x[: t + 1 - k] if k <= t else 0.0 for k in range(order + 1)]) + sample.PAST * prior
        r = r + hold * r[0] / past[0] * past
        c = np.linalg.solve(r[lags], r[1:])
        error, before = x[t] - p, e + f0 + f1 * abs(p)
        e = 0.99 * e + 0.01 * abs(error)
        mean += (x[t] - mean) / 64
        p = sum(c[k] * x[t - k] for k in range(min(order, t + 1))) - (mean / 64 if hold else 0.0)
        p = np.clip(p, -1, 1)
        w = e + f0 + f1 * abs(p)
        told = [np.tanh(error / before), 0.5 * np.log(w) + 2, np.arcsinh(255 * p) / np.arcsinh(255)]
        sum_of_errors += abs(error)
        held = w ** (1 - hold) * (sum_of_errors / (sample.PAST + t + 1) + f0 + f1 * abs(p)) ** hold
        np.testing.assert_allclose([got.p[0, t], got.width[0, t]], [p, held], atol=1e-5)
        np.testing.assert_allclose(got.inputs[0, t], told, atol=1e-4)
    np.testing.assert_allclose(heard[0, :order], x[-order:])
    assert np.mean(np.square(x[80:] - got.p[0, 79:-1].numpy())) < (0.1 if hold else 0.05) * np.mean(np.square(x[80:]))


# ------------------------------------------------------------------------------------------------------------ the head
def test_the_density_is_the_one_described():
    torch.manual_seed(0)
    head = PredictionHead(3, 4, 2)
    torch.nn.init.normal_(head.weight)
    with torch.no_grad():
        head.predictor.levels.copy_(torch.tensor([-0.9, -0.1, 0.2, 0.8]))
        head.shape.copy_(torch.tensor([0.1, -0.2, 0.5]))
        head.bias.copy_(torch.tensor([0.1, 0.2, 0.3, 0.4]))
    y, p, width = torch.randn(1, 3, 3), [0.5, -0.3, 0.1], [0.2, 0.4, 0.3]
    got = head(y, Prediction(torch.tensor([p]), torch.tensor([width]), torch.zeros(1, 3, 3)))[0]
    for t in range(3):
        out = (head.weight @ y[0, t]).tolist()
        m, s, a = p[t] + width[t] * (0.1 + out[0]), width[t] * math.exp(-0.2 + out[1]), math.exp(0.5 + out[2])
        expected = [b - a * math.log(1 + ((level - m) / s) ** 2) for level, b in zip((-0.9, -0.1, 0.2, 0.8), (0.1, 0.2, 0.3, 0.4))]
        torch.testing.assert_close(got[t], torch.tensor(expected), atol=1e-5, rtol=1e-5)


def test_its_logits_are_a_distribution_over_the_codes_of_unequal_width():
    """With a width far above the codes' own, every code gets its interval's share of a Student t distribution."""
    levels = np.sinh(np.linspace(-3, 3, 256)) / np.sinh(3)
    head = PredictionHead(2, 256, 3)
    head.fit(levels, np.array([1.0, 0.0, 0.0, 0.0]))
    with torch.no_grad():
        head.shape.copy_(torch.tensor([0.0, 0.0, math.log(2.0)]))
        here = Prediction(torch.zeros(1, 1), torch.full((1, 1), 0.1), torch.zeros(1, 1, 3))
        p = head(torch.zeros(1, 1, 2), here)[0, 0].softmax(-1).double().numpy()
    density = (1 + (levels / 0.1) ** 2) ** -2.0 * np.gradient(levels)
    np.testing.assert_allclose(p, density / density.sum(), rtol=1e-4)


@pytest.mark.parametrize("hold", [0.0, 0.2])
@pytest.mark.parametrize("config", [SMALL, UNET], ids=["isotropic", "unet"])
def test_pieces_and_steps_equal_the_whole(config, hold):
    model = make(**config, n_classes=3)
    model.prediction_head.predictor.hold = hold
    ids, classes = torch.randint(0, 20, (2, 31)), torch.tensor([2, 0])
    with torch.no_grad():
        whole, end = model(ids, classes=classes)
        parts, state = [], None
        for piece in ids.split([0, 1, 1, 2, 0, 10, 17, 0], 1):  # a cut at the same place twice leaves an empty piece
            logits, state = model(piece, state, classes=classes)
            parts.append(logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(state.heard, end.heard)
    changed = ids.clone()
    changed[:, 20] = (changed[:, 20] + 1) % 20
    with torch.no_grad():
        other, _ = model(changed, classes=classes)
    torch.testing.assert_close(other[:, :20], whole[:, :20])
    assert ((other[:, 20:] - whole[:, 20:]).abs().amax(-1) > 0).all()


@pytest.mark.parametrize("config", [SMALL, UNET], ids=["isotropic", "unet"])
def test_other_types_and_no_rows(config):
    ids, model = torch.randint(0, 20, (2, 9)), make(**config)
    with torch.no_grad():
        expected = model(ids)[0]
        assert model(ids[:0])[0].shape == (0, 9, 20)
        exact = model.double()(ids)[0]
    assert exact.dtype == torch.float64
    torch.testing.assert_close(exact.float(), expected, atol=1e-4, rtol=1e-4)


def test_what_it_cannot_do_is_refused():
    model = make(**SMALL)
    with pytest.raises(ValueError, match="without a mask"):
        model(torch.zeros(1, 4, dtype=torch.long), mask=torch.ones(1, 4, dtype=torch.bool))
    with pytest.raises(UserError, match="PredictionHead mixes positions"):
        share_mixers(model, None)
    with pytest.raises(ValueError, match="prediction_order: only a causal"):
        ModelConfig(direction="bidirectional", prediction_order=4)
    with pytest.raises(ValueError, match="prediction_order: must be 0"):
        ModelConfig(prediction_order=-1)


# ------------------------------------------------------------------------------------------------------------- classes
@pytest.mark.parametrize("config", [SMALL, UNET], ids=["isotropic", "unet"])
def test_every_block_hears_the_class(config):
    model = make(**{**config, "prediction_order": 0}, n_classes=3)
    ids, classes = torch.randint(0, 20, (2, 13)), torch.tensor([1, 2])
    before, _ = model(ids, classes=classes)
    before.square().sum().backward()
    assert len(model.class_shifts) == len(model.backbone.widths)
    for shift in model.class_shifts:
        assert shift.weight.grad[1].abs().sum() > 0 and not shift.weight.grad[0].any()
        with torch.no_grad():
            shift.weight[0] += 1.0  # of a class that no row has
    torch.testing.assert_close(model(ids, classes=classes)[0], before, atol=0, rtol=0)


def test_a_checkpoint_from_before_blocks_heard_the_class_gives_what_it_gave(tmp_path):
    torch.manual_seed(0)
    model = build_model(ModelConfig(**UNET, n_classes=3)).eval()
    save_model(model, tmp_path, "")
    weights = load_file(tmp_path / "model.safetensors")
    save_file({k: v for k, v in weights.items() if "class_shifts" not in k}, tmp_path / "old.safetensors")
    torch.manual_seed(1)
    other = build_model(ModelConfig(**UNET, n_classes=3)).eval()
    load_model(other, tmp_path / "old.safetensors")
    ids, classes = torch.randint(0, 20, (3, 9)), torch.tensor([0, 1, 2])
    prediction, _ = model.prediction_head.predictor(ids)
    y, _ = model.backbone(model.embedding(ids) + model.class_embedding(classes)[:, None])
    torch.testing.assert_close(other(ids, classes=classes)[0], model.logits(y, prediction), atol=1e-6, rtol=1e-5)
    del weights["backbone.centre.0.norm.weight"]
    save_file(weights, tmp_path / "damaged.safetensors")
    with pytest.raises(UserError, match="backbone.centre.0.norm.weight is in this model and not there"):
        load_model(other, tmp_path / "damaged.safetensors")


# ------------------------------------------------------------------------------------------------------ keeping a level
@pytest.mark.parametrize("hold, falls_by", [(0.0, (25, 90)), (0.2, (0, 12))], ids=["free", "held"])
def test_a_density_a_little_too_narrow_loses_its_level_unless_it_is_held(hold, falls_by):
    """What generated music died of: the width follows the errors that it made itself."""
    from seqlab.ops.decode import Decoder, Sampling
    from seqlab.tokenizers.waveform import QUANTIZERS

    quantizer = QUANTIZERS["mulaw-256"]
    torch.manual_seed(0)
    model = build_model(ModelConfig(d_model=8, n_layer=1, vocab_size=256, prediction_order=8)).eval()
    model.prediction_head.predictor.hold = hold
    prompt = np.convolve(np.random.default_rng(0).standard_normal(4000), 0.9 ** np.arange(40) * np.cos(0.4 * np.arange(40)))[:4000]
    prompt *= 0.1 / prompt.std()
    correlations = np.array([np.mean(prompt[k:] * prompt[: len(prompt) - k]) for k in range(9)])
    model.prediction_head.fit(quantizer.levels, correlations)
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.prediction_head.shape.copy_(torch.tensor([0.0, 1.75 - 0.2, 2.6]))  # 1.75: as wide as the errors are
    decoder = Decoder(model, batch=4, backend="cpu")
    decoder.prefill(torch.from_numpy(quantizer.encode(prompt.astype(np.float32)).astype(np.int64)))
    tokens, _ = decoder.generate(4000, Sampling(seed=1))
    level_db = 10 * np.log10(np.mean(quantizer.decode(tokens[:, -1000:].numpy()) ** 2) / 0.01)
    assert -falls_by[1] < level_db < -falls_by[0] + (3 if hold else 0)
