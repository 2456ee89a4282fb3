"""How good predictions are: one function for every kind of label, plain numbers that JSON can hold.

Names as in scikit-learn, which does the arithmetic. A metric that the labels do not define (the AUROC of a class that
never occurs) is None, not a guess.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from seqlab.report import BASELINE, FAINT, INK, MODEL, new_figure, save_figure

Kind = Literal["binary", "multi-class", "multi-label", "regression"]
KINDS: tuple[Kind, ...] = ("binary", "multi-class", "multi-label", "regression")
CALIBRATION_BINS = 10


def evaluate_predictions(
    labels: np.ndarray, probabilities: np.ndarray, class_names: Sequence[str], kind: Kind
) -> dict[str, Any]:
    """Metrics of predictions on n sequences.

    kind "binary", "multi-class": labels (n) are class indices, probabilities (n classes) sum to 1. accuracy, f1_macro,
        mcc, auroc, auprc (both one-vs-rest, macro over classes, for more than two classes), brier (binary: the square of
        the second class's error; else the sum of squares over classes), ece (expected calibration error of the most likely class, ten equal bins),
        log_loss (nats), confusion (rows: true class, columns: predicted), per class recall, precision, f1, support;
        binary adds f1 (of the second class).
    kind "multi-label": labels (n classes) of 0 and 1, probabilities (n classes), each on its own; a class is predicted
        from 1/2 on. accuracy is the share of sequences with every label right; f1_macro, f1_micro, auroc, auprc, mcc
        (mean over classes), brier, ece and log_loss over all labels.
    kind "regression": labels (n) numbers, probabilities (n) or (n 1) the predictions. r2, pearson, spearman, rmse, mae.

    Raises ValueError for shapes that do not fit or values that are not finite.
    """
    labels, probabilities = np.asarray(labels), np.asarray(probabilities, np.float64)
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if len(labels) == 0 or len(labels) != len(probabilities):
        raise ValueError(f"{len(labels)} labels and {len(probabilities)} predictions; both must be the same, and not 0")
    if not np.isfinite(probabilities).all():
        raise ValueError("a prediction is not a finite number")
    if kind == "regression":
        return _regression(labels.astype(np.float64).reshape(-1), probabilities.reshape(len(labels), -1))
    if probabilities.ndim != 2 or probabilities.shape[1] != len(class_names):
        raise ValueError(f"probabilities must be (n {len(class_names)}), got {probabilities.shape}")
    if kind == "multi-label":
        return _multi_label(labels, probabilities, class_names)
    if kind == "binary" and len(class_names) != 2:
        raise ValueError(f"binary labels have two classes, got {len(class_names)}")
    return _classes(labels.astype(np.int64), probabilities, class_names)


def main_metric(kind: Kind) -> str:
    """The metric that tables lead with and that decides who wins."""
    return {"binary": "accuracy", "multi-class": "accuracy", "multi-label": "f1_macro", "regression": "pearson"}[kind]


def _classes(labels: np.ndarray, probabilities: np.ndarray, class_names: Sequence[str]) -> dict[str, Any]:
    from sklearn import metrics

    n_classes = len(class_names)
    every = np.arange(n_classes)
    if labels.min() < 0 or labels.max() >= n_classes:
        raise ValueError(f"labels must lie in 0 .. {n_classes - 1}, got {labels.min()} .. {labels.max()}")
    if np.abs(probabilities.sum(1) - 1).max() > 1e-3:
        raise ValueError("the probabilities of a sequence must sum to 1")
    predicted = probabilities.argmax(1)
    one_hot = labels[:, None] == every
    precision, recall, f1, support = metrics.precision_recall_fscore_support(
        labels, predicted, labels=every, zero_division=0
    )
    present = support > 0
    scored = [1] if n_classes == 2 else [c for c in every if present[c]]  # one-vs-rest over the classes that occur
    is_defined = len(np.unique(labels)) > 1
    result = {
        "n": len(labels),
        "accuracy": float((predicted == labels).mean()),
        # a class that never occurs but is predicted counts, with 0, as in scikit-learn
        "f1_macro": float(f1[present | np.isin(every, predicted)].mean()),
        "mcc": float(metrics.matthews_corrcoef(labels, predicted)) if is_defined else None,
        "auroc": _mean([_auroc(one_hot[:, c], probabilities[:, c]) for c in scored]) if is_defined else None,
        "auprc": _mean([_auprc(one_hot[:, c], probabilities[:, c]) for c in scored]) if is_defined else None,
        "brier": float(((probabilities - one_hot) ** 2).sum(1).mean()) / (2 if n_classes == 2 else 1),
        "ece": expected_calibration_error(probabilities.max(1), predicted == labels),
        "log_loss": float(-np.log(probabilities[np.arange(len(labels)), labels].clip(1e-12)).mean()),
        "confusion": metrics.confusion_matrix(labels, predicted, labels=every).tolist(),
        "classes": {
            str(name): {
                "support": int(support[c]),
                "recall": float(recall[c]),
                "precision": float(precision[c]),
                "f1": float(f1[c]),
            }
            for c, name in enumerate(class_names)
        },
    }
    if n_classes == 2:
        result["f1"] = float(f1[1])
    return result


def _multi_label(labels: np.ndarray, probabilities: np.ndarray, class_names: Sequence[str]) -> dict[str, Any]:
    from sklearn import metrics

    if labels.shape != probabilities.shape:
        raise ValueError(f"labels must be (n {len(class_names)}), got {labels.shape}")
    labels = labels.astype(bool)
    predicted = probabilities >= 0.5
    columns = range(len(class_names))
    f1 = [float(metrics.f1_score(labels[:, c], predicted[:, c], zero_division=0)) for c in columns]
    auroc = [_auroc(labels[:, c], probabilities[:, c]) for c in columns]
    auprc = [_auprc(labels[:, c], probabilities[:, c]) for c in columns]
    mcc = [_mcc(labels[:, c], predicted[:, c]) for c in columns]
    p = probabilities.clip(1e-12, 1 - 1e-12)
    confidence = np.where(predicted, probabilities, 1 - probabilities)
    return {
        "n": len(labels),
        "accuracy": float((predicted == labels).all(1).mean()),
        "label_accuracy": float((predicted == labels).mean()),
        "f1_macro": float(np.mean(f1)),
        "f1_micro": float(metrics.f1_score(labels.ravel(), predicted.ravel(), zero_division=0)),
        "mcc": float(np.mean(mcc)),
        "auroc": _mean(auroc),
        "auprc": _mean(auprc),
        "brier": float(((probabilities - labels) ** 2).mean()),
        "ece": expected_calibration_error(confidence.ravel(), (predicted == labels).ravel()),
        "log_loss": float(-np.where(labels, np.log(p), np.log1p(-p)).mean()),
        "classes": {
            str(name): {"support": int(labels[:, c].sum()), "f1": f1[c], "auroc": auroc[c], "auprc": auprc[c]}
            for c, name in enumerate(class_names)
        },
    }


def _regression(labels: np.ndarray, predictions: np.ndarray) -> dict[str, Any]:
    from scipy import stats
    from sklearn import metrics

    if predictions.shape[1] != 1:
        raise ValueError(f"predictions must be (n) or (n 1), got {predictions.shape}")
    predictions = predictions[:, 0]
    varies = len(labels) > 1 and np.ptp(labels) > 0
    both_vary = varies and np.ptp(predictions) > 0
    return {
        "n": len(labels),
        "r2": float(metrics.r2_score(labels, predictions)) if varies else None,
        "pearson": float(stats.pearsonr(labels, predictions)[0]) if both_vary else None,
        "spearman": float(stats.spearmanr(labels, predictions)[0]) if both_vary else None,
        "rmse": float(math.sqrt(((labels - predictions) ** 2).mean())),
        "mae": float(np.abs(labels - predictions).mean()),
    }


def _auroc(is_class: np.ndarray, score: np.ndarray) -> float | None:
    from sklearn import metrics

    return float(metrics.roc_auc_score(is_class, score)) if 0 < is_class.sum() < len(is_class) else None


def _auprc(is_class: np.ndarray, score: np.ndarray) -> float | None:
    """Average precision: the area under the precision-recall steps, without interpolation."""
    from sklearn import metrics

    return float(metrics.average_precision_score(is_class, score)) if is_class.any() else None


def _mcc(labels: np.ndarray, predicted: np.ndarray) -> float:
    """Matthews correlation of two boolean arrays; 0 where one of them does not vary."""
    if labels.all() or not labels.any() or predicted.all() or not predicted.any():
        return 0.0
    return float(np.corrcoef(labels, predicted)[0, 1])


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def calibration_curve(confidence: np.ndarray, is_right: np.ndarray, bins: int = CALIBRATION_BINS) -> np.ndarray:
    """(k 3) rows of mean confidence, share right, count: equal bins of confidence over [0, 1], empty ones left out."""
    confidence, is_right = np.asarray(confidence, np.float64), np.asarray(is_right, np.float64)
    index = np.minimum((confidence * bins).astype(np.int64), bins - 1)
    count = np.bincount(index, minlength=bins)
    used = count > 0
    mean = np.bincount(index, confidence, bins)[used] / count[used]
    share = np.bincount(index, is_right, bins)[used] / count[used]
    return np.stack([mean, share, count[used]], axis=1)


def expected_calibration_error(confidence: np.ndarray, is_right: np.ndarray, bins: int = CALIBRATION_BINS) -> float:
    """Mean gap between confidence and the share that is right, weighted by bin (Guo et al. 2017, equation 3)."""
    mean, share, count = calibration_curve(confidence, is_right, bins).T
    return float((np.abs(mean - share) * count).sum() / count.sum())


# -- plots ---------------------------------------------------------------------------------------------------------
def plot_confusion(confusion: Sequence[Sequence[int]], class_names: Sequence[str], path: Path, title: str = "") -> Path:
    """The confusion matrix: share of each true class (row) by predicted class, with the counts."""
    table = np.asarray(confusion, np.float64)
    share = table / np.maximum(table.sum(1, keepdims=True), 1)
    size = max(3.2, 1.2 + 0.55 * len(class_names))
    figure, axes = new_figure(size + 0.8, size)
    axes.grid(False)
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    ticks = range(len(class_names))
    names = [str(name) if len(str(name)) <= 22 else str(name)[:21] + "…" for name in class_names]
    axes.set_xticks(ticks, names, rotation=45 if max(map(len, names)) > 3 else 0, ha="right" if max(map(len, names)) > 3 else "center", fontsize=8)
    axes.set_yticks(ticks, names, fontsize=8)
    if len(class_names) <= 20:
        for i in ticks:
            for j in ticks:
                if table[i, j]:
                    colour = "white" if share[i, j] > 0.55 else INK
                    axes.text(j, i, f"{int(table[i, j]):,}", ha="center", va="center", fontsize=7, color=colour)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    if title:
        axes.set_title(title, fontsize=10, color=INK)
    figure.colorbar(image, ax=axes, shrink=0.8, label="share of the true class")
    return save_figure(figure, path)


def plot_calibration(curves: dict[str, tuple[np.ndarray, np.ndarray]], path: Path, title: str = "") -> Path:
    """Share right against confidence; `curves` maps a name to (confidence (n), is_right (n)), the model first."""
    figure, axes = new_figure(4.6, 4.2)
    axes.plot([0, 1], [0, 1], color=FAINT, linewidth=1.2, linestyle="--", label="perfectly calibrated")
    colours = [MODEL, BASELINE, INK, "#7a9a3c", "#8e5ea2"]
    for i, (name, (confidence, is_right)) in enumerate(curves.items()):
        mean, share, count = calibration_curve(confidence, is_right).T
        error = expected_calibration_error(confidence, is_right)
        colour = colours[i % len(colours)]
        axes.plot(mean, share, "-", color=colour, linewidth=1.8 if i == 0 else 1.1, label=f"{name} (ECE {error:.3f})")
        axes.scatter(mean, share, s=8 + 60 * np.sqrt(count / count.sum()), color=colour, zorder=3)
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.set_xlabel("confidence of the prediction")
    axes.set_ylabel("share that is right")
    if title:
        axes.set_title(title, fontsize=10, color=INK)
    axes.legend(frameon=False, fontsize=8, loc="upper left")
    return save_figure(figure, path)


def plot_regression(labels: np.ndarray, predictions: np.ndarray, path: Path, title: str = "") -> Path:
    """Predicted against measured values."""
    figure, axes = new_figure(4.6, 4.2)
    labels, predictions = np.ravel(labels), np.ravel(predictions)
    axes.scatter(labels, predictions, s=8, alpha=0.5, color=MODEL, linewidths=0)
    low, high = min(labels.min(), predictions.min()), max(labels.max(), predictions.max())
    axes.plot([low, high], [low, high], color=FAINT, linewidth=1.2, linestyle="--")
    axes.set_xlabel("measured")
    axes.set_ylabel("predicted")
    if title:
        axes.set_title(title, fontsize=10, color=INK)
    return save_figure(figure, path)
