"""The loops over bases behind `seqlab.genes`, compiled by numba on first use. Digits: A C G T = 0 1 2 3, 4 for anything else."""

import numpy as np

from seqlab.ops.compiled import compiled


@compiled(nogil=True)
def contexts(digits, order):
    """(n,) int32: the context before each digit, see `genes.context_count`."""
    out = np.empty(len(digits), np.int32)
    offset = np.zeros(order + 1, np.int64)
    for j in range(1, order + 1):
        offset[j] = offset[j - 1] + 4 ** (j - 1)
    code, have, full = 0, 0, 4**order
    for t in range(len(digits)):
        out[t] = offset[have] + code
        if digits[t] > 3:
            code, have = 0, 0
        elif have < order:
            code, have = code * 4 + digits[t], have + 1
        else:
            code = (code * 4 + digits[t]) % full
    return out


@compiled(nogil=True, fastmath=True)
def expect(digits, context, emissions, transitions, start, first, counts, moves):
    """One stretch's share of an expectation step (Baum-Welch): the forward and the backward algorithm, scaled. Adds to counts
    (contexts from `first` on, s, 4) how often each state is expected to have emitted each base there, and to moves (s s) how
    often each state followed each. Returns the log-likelihood, nats."""
    n, states = len(digits), len(start)
    alpha, scale = np.empty((n, states), np.float32), np.empty(n, np.float32)
    total = 0.0
    for t in range(n):
        v, z = digits[t], np.float32(0)
        for s in range(states):
            x = np.float32(0)
            if t:
                for r in range(states):
                    x += alpha[t - 1, r] * transitions[r, s]
            else:
                x = start[s]
            if v < 4:
                x *= emissions[context[t], s, v]
            alpha[t, s] = x
            z += x
        total += np.log(z)
        scale[t] = np.float32(1) / z
        for s in range(states):
            alpha[t, s] *= scale[t]
    beta, ahead = np.ones(states, np.float32), np.empty(states, np.float32)
    for t in range(n - 1, -1, -1):
        v = digits[t]
        if v < 4 and context[t] >= first:
            c = context[t] - first
            for s in range(states):
                counts[c, s, v] += alpha[t, s] * beta[s]
        for s in range(states):
            ahead[s] = beta[s] * scale[t]
            if v < 4:
                ahead[s] *= emissions[context[t], s, v]
        if t:
            for r in range(states):
                x = np.float32(0)
                for s in range(states):
                    step = transitions[r, s] * ahead[s]
                    moves[r, s] += alpha[t - 1, r] * step
                    x += step
                beta[r] = x
    return total
