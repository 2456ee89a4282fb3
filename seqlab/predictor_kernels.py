"""The loops over samples of `predictors.AdaptivePredictor`, compiled."""

import numpy as np

from seqlab.ops.compiled import compiled


@compiled()
def predict(x, correlations, order, memory, width_memory, refit_every, prior, floor):
    """x (n,) -> (prediction (n,), width (n,)) of each sample from those before it.

    Exponentially weighted least squares: R = sum of memory^age h h', r = sum of memory^age h x over the past, h the `order`
    samples before x (newest first); every `refit_every` samples (R + ridge) w = r is solved. R and r begin as those of
    `prior` samples with the given correlations. width: running mean of the absolute error, at least `floor`.
    """
    n = len(x)
    prediction, width = np.empty(n), np.empty(n)
    R, r = np.empty((order, order)), np.empty(order)
    for i in range(order):
        r[i] = prior * correlations[i + 1]
        for j in range(order):
            R[i, j] = prior * correlations[abs(i - j)]
    w = solve(R, r, order)
    h = np.zeros(order)
    scale = max(floor, 0.1 * np.sqrt(correlations[0]))
    for t in range(n):
        p = 0.0
        for i in range(order):
            p += w[i] * h[i]
        p = min(1.0, max(-1.0, p))
        prediction[t], width[t] = p, max(scale, floor)
        scale = width_memory * scale + (1 - width_memory) * abs(x[t] - p)
        for i in range(order):
            r[i] = memory * r[i] + h[i] * x[t]
            for j in range(i + 1):
                R[i, j] = memory * R[i, j] + h[i] * h[j]
        for i in range(order - 1, 0, -1):
            h[i] = h[i - 1]
        h[0] = x[t]
        if (t + 1) % refit_every == 0:
            w = solve(R, r, order)
    return prediction, width


@compiled()
def solve(R, r, order):
    """w of (R + ridge) w = r by Cholesky; only the lower triangle of R is read."""
    trace = 0.0
    for i in range(order):
        trace += R[i, i]
    ridge = 1e-5 * trace / order + 1e-9
    L, w = np.zeros((order, order)), np.empty(order)
    for i in range(order):
        for j in range(i + 1):
            s = R[i, j]
            if i == j:
                s += ridge
            for k in range(j):
                s -= L[i, k] * L[j, k]
            if i == j:
                L[i, i] = np.sqrt(max(s, 1e-12))
            else:
                L[i, j] = s / L[j, j]
    for i in range(order):
        s = r[i]
        for k in range(i):
            s -= L[i, k] * w[k]
        w[i] = s / L[i, i]
    for i in range(order - 1, -1, -1):
        s = w[i]
        for k in range(i + 1, order):
            s -= L[k, i] * w[k]
        w[i] = s / L[i, i]
    return w


@compiled()
def masses(codes, prediction, width, edges, multiples):
    """(n, components): what a logistic distribution around the prediction, as wide as multiples * width, puts into the
    interval of amplitudes that became the code."""
    out = np.empty((len(codes), len(multiples)))
    for t in range(len(codes)):
        low, high = edges[codes[t]] - prediction[t], edges[codes[t] + 1] - prediction[t]
        for k in range(len(multiples)):
            s = width[t] * multiples[k]
            if low > 0:  # by symmetry: the tails keep their precision
                out[t, k] = logistic(-low / s) - logistic(-high / s)
            else:
                out[t, k] = logistic(high / s) - logistic(low / s)
    return out


@compiled()
def logistic(v):
    if v >= 0:
        return 1.0 / (1.0 + np.exp(-v))
    e = np.exp(v)
    return e / (1.0 + e)
