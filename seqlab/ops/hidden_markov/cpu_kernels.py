"""The loop behind cpu.py, compiled by numba on first use."""

import numpy as np

from seqlab.ops.compiled import compiled


@compiled(nogil=True, error_model="numpy")
def follow(base, context, emissions, transitions, start, log_p, after, first, last):
    """Units [first, last); unit i is row i // models with model i % models."""
    length = base.shape[1]
    models, states = transitions.shape[0], transitions.shape[1]
    q, a = np.empty(states, np.float32), np.empty(states, np.float32)
    for unit in range(first, last):
        row, m = unit // models, unit % models
        for s in range(states):
            q[s] = start[row, m, s]
        for t in range(length):
            E = emissions[m, context[row, t]]
            v = base[row, t]
            p0, p1, p2, p3 = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
            for s in range(states):
                p0 += q[s] * E[s, 0]
                p1 += q[s] * E[s, 1]
                p2 += q[s] * E[s, 2]
                p3 += q[s] * E[s, 3]
            log_p[row, t, m, 0] = np.log(p0)
            log_p[row, t, m, 1] = np.log(p1)
            log_p[row, t, m, 2] = np.log(p2)
            log_p[row, t, m, 3] = np.log(p3)
            if 0 <= v < 4:
                scale = np.float32(1) / (p0 if v == 0 else p1 if v == 1 else p2 if v == 2 else p3)
                for s in range(states):
                    a[s] = q[s] * E[s, v] * scale
            else:
                for s in range(states):
                    a[s] = q[s]
            for s in range(states):
                q[s] = 0
            for r in range(states):
                for s in range(states):
                    q[s] += a[r] * transitions[m, r, s]
            for s in range(states):
                after[row, t, m, s] = q[s]
