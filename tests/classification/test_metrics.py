"""Metrics against cases worked by hand and against scikit-learn called directly."""

import json

import numpy as np
import pytest
from sklearn import metrics as sk

from seqlab.classification.metrics import (
    calibration_curve,
    evaluate_predictions,
    expected_calibration_error,
    plot_calibration,
    plot_confusion,
    plot_regression,
)


def test_binary_by_hand():
    labels = np.array([1, 1, 1, 0, 0])
    p = np.array([0.9, 0.6, 0.4, 0.7, 0.2])  # predicted 1 1 0 1 0: tp 2, fn 1, fp 1, tn 1
    m = evaluate_predictions(labels, np.stack([1 - p, p], 1), ["no", "yes"], "binary")
    assert m["accuracy"] == pytest.approx(3 / 5)
    assert m["confusion"] == [[1, 1], [1, 2]]
    assert m["f1"] == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    assert m["f1_macro"] == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert m["mcc"] == pytest.approx((2 * 1 - 1 * 1) / np.sqrt(3 * 3 * 2 * 2))
    assert m["auroc"] == pytest.approx(4 / 6)  # of the 6 pairs, 0.7 beats 0.6 and 0.4
    # ranked 0.9+ 0.7- 0.6+ 0.4+ 0.2-: precision at each positive 1, 2/3, 3/4
    assert m["auprc"] == pytest.approx((1 + 2 / 3 + 3 / 4) / 3)
    assert m["brier"] == pytest.approx((0.1**2 + 0.4**2 + 0.6**2 + 0.7**2 + 0.2**2) / 5)
    assert m["classes"]["yes"] == pytest.approx({"support": 3, "recall": 2 / 3, "precision": 2 / 3, "f1": 2 / 3})
    json.dumps(m)


def test_multi_class_agrees_with_scikit_learn():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 200)
    p = rng.dirichlet(np.ones(4), 200) + 0.5 * np.eye(4)[labels]
    p /= p.sum(1, keepdims=True)
    m = evaluate_predictions(labels, p, list("abcd"), "multi-class")
    assert m["accuracy"] == pytest.approx(sk.accuracy_score(labels, p.argmax(1)))
    assert m["f1_macro"] == pytest.approx(sk.f1_score(labels, p.argmax(1), average="macro"))
    assert m["mcc"] == pytest.approx(sk.matthews_corrcoef(labels, p.argmax(1)))
    assert m["auroc"] == pytest.approx(sk.roc_auc_score(labels, p, multi_class="ovr", average="macro"))
    assert m["log_loss"] == pytest.approx(sk.log_loss(labels, p))
    assert m["confusion"] == sk.confusion_matrix(labels, p.argmax(1)).tolist()
    assert "f1" not in m
    assert m["brier"] == pytest.approx(((p - np.eye(4)[labels]) ** 2).sum(1).mean())


def test_a_class_that_never_occurs_is_left_out_not_guessed():
    m = evaluate_predictions(np.array([0, 1, 1]), np.eye(3)[[0, 1, 1]], list("abc"), "multi-class")
    assert m["accuracy"] == m["f1_macro"] == m["auroc"] == 1.0
    assert m["classes"]["c"]["support"] == 0
    labels, predicted = np.array([0, 1, 1]), np.array([0, 1, 2])  # unless it is predicted
    m = evaluate_predictions(labels, np.eye(3)[predicted], list("abc"), "multi-class")
    assert m["f1_macro"] == pytest.approx(sk.f1_score(labels, predicted, average="macro"))
    one = evaluate_predictions(np.array([1, 1]), np.array([[0.4, 0.6], [0.7, 0.3]]), list("ab"), "binary")
    assert one["auroc"] is None and one["mcc"] is None and one["accuracy"] == 0.5


def test_multi_label_by_hand():
    labels = np.array([[1, 0], [1, 1], [0, 0]])
    p = np.array([[0.8, 0.1], [0.9, 0.4], [0.6, 0.2]])  # predicted 10, 10, 10
    m = evaluate_predictions(labels, p, ["x", "y"], "multi-label")
    assert m["accuracy"] == pytest.approx(1 / 3)
    assert m["label_accuracy"] == pytest.approx(4 / 6)
    assert m["f1_macro"] == pytest.approx((0.8 + 0) / 2)
    assert m["f1_micro"] == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    assert m["auroc"] == 1.0 and m["mcc"] == 0.0  # nothing predicted varies
    varied = evaluate_predictions(labels, np.array([[0.9, 0.4], [0.4, 0.9], [0.1, 0.2]]), ["x", "y"], "multi-label")
    assert varied["mcc"] == pytest.approx((sk.matthews_corrcoef([1, 1, 0], [1, 0, 0]) + 1) / 2)
    assert m["classes"]["x"]["support"] == 2


def test_regression_by_hand():
    m = evaluate_predictions(np.array([1.0, 2, 3, 4]), np.array([[1.0], [2], [3], [8]]), [], "regression")
    assert m["r2"] == pytest.approx(1 - 16 / 5)
    assert m["spearman"] == pytest.approx(1.0)
    assert m["pearson"] == pytest.approx(np.corrcoef([1, 2, 3, 4], [1, 2, 3, 8])[0, 1])
    assert m["rmse"] == pytest.approx(2.0) and m["mae"] == pytest.approx(1.0)
    assert evaluate_predictions(np.ones(3), np.ones(3), [], "regression")["pearson"] is None


def test_calibration_by_hand():
    confidence, right = np.array([0.55, 0.55, 0.95, 1.0]), np.array([1, 0, 1, 1])
    assert calibration_curve(confidence, right) == pytest.approx(np.array([[0.55, 0.5, 2], [0.975, 1.0, 2]]))
    assert expected_calibration_error(confidence, right) == pytest.approx((0.05 * 2 + 0.025 * 2) / 4)


@pytest.mark.parametrize(
    "labels, p, names, kind",
    [
        ([0, 1], [[0.5, 0.5]], ["a", "b"], "binary"),
        ([], np.empty((0, 2)), ["a", "b"], "binary"),
        ([0, 3], [[0.5, 0.5]] * 2, ["a", "b"], "multi-class"),
        ([0, 1], [[0.5, 0.9]] * 2, ["a", "b"], "binary"),
        ([0, 1], [[0.5, np.nan]] * 2, ["a", "b"], "binary"),
        ([0, 1], [[0.5, 0.5]] * 2, ["a", "b"], "binaries"),
        ([0, 1], [[0.5, 0.5]] * 2, ["a"], "binary"),
        ([[0, 1]], [[0.5, 0.5, 0.1]], ["a", "b"], "multi-label"),
    ],
)
def test_wrong_shapes_are_refused(labels, p, names, kind):
    with pytest.raises(ValueError):
        evaluate_predictions(np.array(labels), np.array(p), names, kind)


def test_plots_are_drawn(tmp_path):
    rng = np.random.default_rng(1)
    plot_confusion([[3, 1], [0, 4]], ["a", "a very long name of a species"], tmp_path / "c.png", "confusion")
    curve = rng.random(50), rng.random(50) < 0.5
    plot_calibration({"model": curve, "k-mers": curve}, tmp_path / "p" / "k.png")
    plot_regression(rng.random(9), rng.random(9), tmp_path / "r.png")
    for name in ("c.png", "p/k.png", "r.png"):
        assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG"
