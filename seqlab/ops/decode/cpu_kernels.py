"""The numba kernel behind cpu.py: so many tokens through the whole stack, drawing included, in one call.

Every vector is padded to a multiple of 16 numbers, and sixteen of its elements are one `Lanes`. A matrix (rows k) is kept
as tiles [rows/16][k][16]: four tiles times one number of the input are four fused multiply-adds, and the sums stay in
registers. Streams of one call go through an operation together, so that its weights are read from the first level of the
cache for all streams but the first.

Arguments travel in int64 arrays: `p` (constants below), one row of `ops` an operation, one row of `rows` a stream.
"""

import math

import numpy as np
from numba import int64, uint64

from seqlab.heads.sample import DRIFT, WIDTH_MEMORY
from seqlab.ops.decode.program import BLOCK, DOWN
from seqlab.ops.lanes import (
    compile_kernel,
    exp,
    exp2,
    fma,
    helper,
    load,
    peek,
    poke,
    poke_totals,
    sigmoid,
    softplus,
    splat,
    store,
)

# p: sizes of the program, then of the call
(OPERATIONS, STATES, WIDTH, D_MODEL, VOCAB, EMBEDDING, HEAD, HEAD_BIAS, SCRATCH, TOKENS, POSITION, COUNT, FORCED, OUT,
 LOG_PROBS, TOP_K, RANKED, HEAD_ROWS, ORDER, LEVELS, TOLD) = range(21)  # fmt: skip
SLOTS_P = 21
# one operation
(KIND, SAVE, ADD, SLOT, JUMP, WIDE, INNER, RANK, POOL, D_OUT, W_IN, B_IN, W_CONV, B_CONV, W_X, W_DT, B_DT, W_A, W_D, W_OUT,
 B_OUT, CONV, SSM, PENDING, HELD, PHASE, FIXED, W_C, SHIFT, SHIFT_PITCH) = range(30)  # fmt: skip
SLOTS_OP = 30
# scratch of one stream: byte offsets
X, NORMED, UZ, PROJECTED, DELTA, Y, LOGITS, WEIGHTS, SKIPS, PITCH = range(10)
# state of one stream is at `state + stream * STATE_PITCH + offset`; the pitch is of the operation's own arrays
GOLDEN = np.uint64(0x9E3779B97F4A7C15)
M1, M2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
F = np.float32(0)  # witness: everything is float32


@helper
def _padded(n):
    return (n + 15) // 16 * 16


@helper
def _product(work, weight, bias, x, x_pitch, out, out_pitch, tiles, k, streams):
    """out = weight x (+ bias), for every stream."""
    pitch = k * 64
    none = splat(work, 0.0)
    t = 0
    while t + 4 <= tiles:
        w0 = weight + t * pitch
        for s in range(streams):
            a0, a1, a2, a3 = none, none, none, none
            if bias:
                b = bias + t * 64
                a0, a1, a2, a3 = load(work, b), load(work, b + 64), load(work, b + 128), load(work, b + 192)
            xs = x + s * x_pitch
            for j in range(k):
                v = splat(work, peek(work, xs + 4 * j))
                w = w0 + 64 * j
                a0 = fma(load(work, w), v, a0)
                a1 = fma(load(work, w + pitch), v, a1)
                a2 = fma(load(work, w + 2 * pitch), v, a2)
                a3 = fma(load(work, w + 3 * pitch), v, a3)
            o = out + s * out_pitch + t * 64
            store(work, o, a0)
            store(work, o + 64, a1)
            store(work, o + 128, a2)
            store(work, o + 192, a3)
        t += 4
    while t < tiles:
        w0 = weight + t * pitch
        for s in range(streams):
            a0, a1, a2, a3 = none, none, none, none
            if bias:
                a0 = load(work, bias + t * 64)
            xs = x + s * x_pitch
            j = 0
            while j + 4 <= k:
                w = w0 + 64 * j
                at = xs + 4 * j
                a0 = fma(load(work, w), splat(work, peek(work, at)), a0)
                a1 = fma(load(work, w + 64), splat(work, peek(work, at + 4)), a1)
                a2 = fma(load(work, w + 128), splat(work, peek(work, at + 8)), a2)
                a3 = fma(load(work, w + 192), splat(work, peek(work, at + 12)), a3)
                j += 4
            while j < k:
                a0 = fma(load(work, w0 + 64 * j), splat(work, peek(work, xs + 4 * j)), a0)
                j += 1
            store(work, out + s * out_pitch + t * 64, (a0 + a1) + (a2 + a3))
        t += 1


@helper
def _norm(work, x, out, d, epsilon, scratch):
    """out = x / rms(x)."""
    total = splat(work, 0.0)
    for t in range((d + 15) // 16):
        v = load(work, x + 64 * t)
        total = fma(v, v, total)
    poke_totals(scratch, total, total)
    scale = np.float32(1.0) / np.float32(math.sqrt(peek(work, scratch) / np.float32(d) + epsilon))
    for t in range((d + 15) // 16):
        store(work, out + 64 * t, load(work, x + 64 * t) * splat(work, scale))


@helper
def _copy(work, to, source, d):
    for t in range((d + 15) // 16):
        store(work, to + 64 * t, load(work, source + 64 * t))


@helper
def _add(work, to, source, d):
    for t in range((d + 15) // 16):
        store(work, to + 64 * t, load(work, to + 64 * t) + load(work, source + 64 * t))


@helper
def _selective_scan(work, op, n, at, scratch, first, streams):
    """The recurrence that x_proj steers, and the gate: u, z -> y."""
    di, rank, pitch = op[INNER], op[RANK], at[PITCH]
    dip = _padded(di)
    tiles = dip // 16
    projected = (rank + 2 * n + 15) // 16
    _product(work, op[W_X], 0, scratch + at[UZ], pitch, scratch + at[PROJECTED], pitch, projected, di, streams)
    _product(work, op[W_DT], op[B_DT], scratch + at[PROJECTED], pitch, scratch + at[DELTA], pitch, tiles, rank, streams)
    for s in range(streams):
        mine = scratch + s * pitch
        u, z = mine + at[UZ], mine + at[UZ] + dip * 4
        B = mine + at[PROJECTED] + rank * 4
        C = B + n * 4
        for t in range(tiles):
            here = 64 * t
            dt, _ = softplus(work, load(work, mine + at[DELTA] + here))
            x = load(work, u + here)
            dtu = dt * x
            y = x * load(work, op[W_D] + here)
            y2 = splat(work, 0.0)
            state = op[SSM] + (first + s) * n * dip * 4 + here
            A = op[W_A] + here
            i = 0
            while i + 2 <= n:
                row = i * dip * 4
                h = fma(exp2(dt * load(work, A + row)), load(work, state + row), dtu * peek(work, B + 4 * i))
                store(work, state + row, h)
                y = y + h * peek(work, C + 4 * i)
                row += dip * 4
                h = fma(exp2(dt * load(work, A + row)), load(work, state + row), dtu * peek(work, B + 4 * i + 4))
                store(work, state + row, h)
                y2 = y2 + h * peek(work, C + 4 * i + 4)
                i += 2
            if i < n:
                row = i * dip * 4
                h = fma(exp2(dt * load(work, A + row)), load(work, state + row), dtu * peek(work, B + 4 * i))
                store(work, state + row, h)
                y = y + h * peek(work, C + 4 * i)
            gate = load(work, z + here)
            store(work, mine + at[Y] + here, (y + y2) * (gate * sigmoid(work, gate)))


@helper
def _fixed_scan(work, op, n, at, scratch, first, streams):
    """The recurrence of parameters alone, real (FIXED 1) or complex (2), and the gate: u, z -> y."""
    dip, pitch = _padded(op[INNER]), at[PITCH]
    half = n * dip * 4  # to the imaginary parts
    numbers = n * op[FIXED]
    for s in range(streams):
        mine = scratch + s * pitch
        u, z = mine + at[UZ], mine + at[UZ] + dip * 4
        for t in range(dip // 16):
            here = 64 * t
            x = load(work, u + here)
            v = x * load(work, op[B_DT] + here)
            y = x * load(work, op[W_D] + here)
            state = op[SSM] + (first + s) * numbers * dip * 4 + here
            A, C = op[W_A] + here, op[W_C] + here
            for i in range(n):
                row = i * dip * 4
                a, h = load(work, A + row), load(work, state + row)
                if op[FIXED] == 1:
                    h = fma(a, h, v)
                    y = fma(h, load(work, C + row), y)
                else:
                    b, g = load(work, A + half + row), load(work, state + half + row)
                    turned = a * g + b * h
                    h = (a * h - b * g) + v
                    y = y + (h * load(work, C + row) - turned * load(work, C + half + row))
                    store(work, state + half + row, turned)
                store(work, state + row, h)
            gate = load(work, z + here)
            store(work, mine + at[Y] + here, y * (gate * sigmoid(work, gate)))


@helper
def _mixer(work, op, p, at, scratch, first, streams, epsilon):
    """x += mixer(norm(x)) for every stream of the group; `at`: offsets of the scratch areas."""
    d, di, n, width = op[WIDE], op[INNER], p[STATES], p[WIDTH]
    dp, dip = _padded(d), _padded(di)
    pitch, tiles = at[PITCH], dip // 16
    for s in range(streams):
        mine = scratch + s * pitch
        if op[SHIFT] != -1:
            _add(work, mine + at[X], op[SHIFT] + (first + s) * op[SHIFT_PITCH], d)
        _norm(work, mine + at[X], mine + at[NORMED], d, epsilon, mine + at[PROJECTED])
    _product(work, op[W_IN], op[B_IN], scratch + at[NORMED], pitch, scratch + at[UZ], pitch, 2 * tiles, d, streams)
    for s in range(streams):
        u = scratch + s * pitch + at[UZ]
        seen = op[CONV] + (first + s) * (width - 1) * dip * 4
        for t in range(tiles):
            here = 64 * t
            now = load(work, u + here)
            total = fma(now, load(work, op[W_CONV] + (width - 1) * dip * 4 + here), load(work, op[B_CONV] + here))
            for k in range(width - 1):
                past = seen + k * dip * 4 + here
                total = fma(load(work, past), load(work, op[W_CONV] + k * dip * 4 + here), total)
                following = load(work, past + dip * 4) if k + 2 < width else now
                store(work, past, following)
            store(work, u + here, total * sigmoid(work, total))
    if op[FIXED]:
        _fixed_scan(work, op, n, at, scratch, first, streams)
    else:
        _selective_scan(work, op, n, at, scratch, first, streams)
    _product(work, op[W_OUT], op[B_OUT], scratch + at[Y], pitch, scratch + at[NORMED], pitch, dp // 16, di, streams)
    for s in range(streams):
        _add(work, scratch + s * pitch + at[X], scratch + s * pitch + at[NORMED], d)


@helper
def _hear(heard, table, fit, order, x, f0, f1, hold, told):
    """A step of the linear predictor of one stream (heads/sample.py): the newest sample x moves in. `heard` (4K+5, or 5K+9 with
    `hold`) is its state, told (3) what the network is told, fit (2K+1) room."""
    e, earlier = x - heard[4 * order + 3], heard[4 * order + 4] + f0 + f1 * abs(heard[4 * order + 3])
    width = WIDTH_MEMORY * heard[4 * order + 4] + (1.0 - WIDTH_MEMORY) * abs(e)
    r, c, n = fit[: order + 1], fit[order + 1 :], order + 1
    s0, s1, s2, past = heard[order:], heard[2 * order + 1 :], heard[3 * order + 2 :], heard[4 * order + 5 :]
    for k in range(order + 1):
        product = x * (heard[order - k] if k else x)
        s0[k] = table[4 * n] * s0[k] + product
        s1[k] = table[4 * n + 1] * s1[k] + product
        s2[k] = table[4 * n + 2] * s2[k] + product
        r[k] = s0[k] * table[k] + s1[k] * table[n + k] + s2[k] * table[2 * n + k] + table[3 * n + k]
        if hold:
            past[k] += product
    if hold:
        share = hold * r[0] / past[0]
        for k in range(order + 1):
            r[k] += share * past[k]
        past[order + 1] += abs(e)
        past[order + 2] += 1.0
        past[order + 3] += DRIFT * (x - past[order + 3])
    for k in range(order - 1):
        heard[k] = heard[k + 1]
    heard[order - 1] = x
    error = r[0]
    for i in range(order):
        total = r[i + 1]
        for j in range(i):
            total -= c[j] * r[i - j]
        reflection = total / error
        for j in range((i + 1) // 2):
            a, b = c[j], c[i - 1 - j]
            c[j], c[i - 1 - j] = a - reflection * b, b - reflection * a
        c[i] = reflection
        error *= 1.0 - reflection * reflection
    p = 0.0
    for k in range(order):
        p += c[k] * heard[order - 1 - k]
    if hold:
        p -= DRIFT * past[order + 3]
    p = min(max(p, -1.0), 1.0)
    heard[4 * order + 3], heard[4 * order + 4] = p, width
    told[0] = math.tanh(e / earlier)
    told[1] = 0.5 * math.log(width + f0 + f1 * abs(p)) + 2.0
    told[2] = math.asinh(255.0 * p) / math.asinh(255.0)


@helper
def _predict(work, logits, rows, heard, order, f0, f1, hold, levels, vocab):
    """logits += the density around the linear prediction; rows: (m - p) / w, log s / w and log a."""
    p = np.float32(heard[4 * order + 3])
    floor = f0 + f1 * abs(heard[4 * order + 3])
    width = heard[4 * order + 4] + floor
    if hold:
        width *= ((heard[5 * order + 6] / heard[5 * order + 7] + floor) / width) ** hold
    per = np.float32(1.0 / width)
    move, scale = peek(work, rows), np.float32(math.exp(-peek(work, rows + 4)))
    tail = np.float32(math.exp(peek(work, rows + 8)))
    for v in range(vocab):
        z = ((peek(work, levels + 4 * v) - p) * per - move) * scale
        poke(work, logits + 4 * v, peek(work, logits + 4 * v) - tail * np.float32(math.log(np.float32(1.0) + z * z)))


@helper
def _guide(work, told, untold, guidance, vocab):
    """untold = told + guidance (told - untold); -inf, what may not be drawn, stays."""
    for v in range(vocab):
        a, b = peek(work, told + 4 * v), peek(work, untold + 4 * v)
        if a > -np.inf:
            poke(work, untold + 4 * v, a + guidance * (a - b))


@helper
def _uniform(key, position):
    """sampling.draw."""
    z = uint64(key) + uint64(position) * GOLDEN
    z = (z ^ (z >> uint64(30))) * M1
    z = (z ^ (z >> uint64(27))) * M2
    z = z ^ (z >> uint64(31))
    return (np.float32(int64(z >> uint64(41))) + np.float32(0.5)) * np.float32(2.0**-23)


@helper
def _rank(work, logits, order, spare, vocab):
    """order = tokens by falling logit, ties by rising token: merge sort. Both hold `vocab` int64."""
    for v in range(vocab):
        poke(int64(0), order + 8 * v, v)
    run = 1
    a, b = order, spare
    while run < vocab:
        for low in range(0, vocab, 2 * run):
            middle, high = min(low + run, vocab), min(low + 2 * run, vocab)
            i, j = low, middle
            for k in range(low, high):
                left = i < middle
                if left and j < high:
                    left = not (
                        peek(work, logits + 4 * peek(int64(0), a + 8 * j))
                        > peek(work, logits + 4 * peek(int64(0), a + 8 * i))
                    )
                if left:
                    poke(int64(0), b + 8 * k, peek(int64(0), a + 8 * i))
                    i += 1
                else:
                    poke(int64(0), b + 8 * k, peek(int64(0), a + 8 * j))
                    j += 1
        a, b = b, a
        run *= 2
    if a != order:
        for v in range(vocab):
            poke(int64(0), order + 8 * v, peek(int64(0), a + 8 * v))


@helper
def _weigh(work, logits, weights, tiles, top, scale):
    """weights = exp((logits - top) scale); their sum."""
    total = splat(work, 0.0)
    for t in range(tiles):
        w = exp((load(work, logits + 64 * t) - splat(work, top)) * splat(work, scale))
        store(work, weights + 64 * t, w)
        total = total + w
    poke_totals(weights + 64 * tiles, total, total)
    return peek(work, weights + 64 * tiles)


@helper
def _draw(work, logits, weights, order, vocab, r, temperature, top_k, top_p):
    """sampling.sample for one stream, and log sum exp(logits)."""
    tiles = (vocab + 15) // 16
    best = 0
    for v in range(1, vocab):
        if peek(work, logits + 4 * v) > peek(work, logits + 4 * best):
            best = v
    top = peek(work, logits + 4 * best)
    normaliser = top + np.float32(math.log(_weigh(work, logits, weights, tiles, top, np.float32(1.0))))
    if temperature == 0:
        return best, normaliser
    if temperature != 1:
        _weigh(work, logits, weights, tiles, top, np.float32(1.0) / temperature)
    if top_k or top_p < 1:
        _rank(work, logits, order, order + 8 * vocab, vocab)
        kept = top_k if top_k else vocab
        mass = np.float32(0.0)
        for k in range(vocab):
            at = weights + 4 * peek(int64(0), order + 8 * k)
            if k < kept:
                mass += peek(work, at)
            else:
                poke(work, at, np.float32(0.0))
        if top_p < 1:
            before = np.float32(0.0)
            for k in range(vocab):
                at = weights + 4 * peek(int64(0), order + 8 * k)
                w = peek(work, at)
                if not before < top_p * mass:
                    poke(work, at, np.float32(0.0))
                before += w
    total = np.float32(0.0)
    for v in range(vocab):
        total += peek(work, weights + 4 * v)
    threshold, running, last = r * total, np.float32(0.0), best
    for v in range(vocab):
        w = peek(work, weights + 4 * v)
        if w > 0:
            running += w
            last = v
            if running > threshold:
                break
    return last, normaliser


@compile_kernel
def decode(p, ops, rows, at, settings, heard, table, first, last):
    """COUNT tokens of the streams [first, last). rows (batch 3): address of the stream's base vector, its key, its token.

    at: offsets of the scratch areas, then those of the skip slots; settings: temperature, top_p, epsilon, guidance and the floors
    and hold of the linear prediction (float32), of which heard (batch numbers) is the state and table what program.py says.
    """
    work = F
    streams, vocab, d = last - first, p[VOCAB], p[D_MODEL]
    pitch = at[PITCH]
    scratch = p[SCRATCH] + first * pitch
    temperature, top_p, epsilon, guidance = settings[0], settings[1], settings[2], settings[3]
    f0, f1, hold = np.float64(settings[4]), np.float64(settings[5]), np.float64(settings[6])
    fit, told = np.empty(2 * p[ORDER] + 1), np.empty(3)
    phases = np.empty(p[OPERATIONS], np.int64)
    for o in range(p[OPERATIONS]):
        phases[o] = ops[o, PHASE]
    skips = at[PITCH + 1 :]
    for i in range(p[COUNT]):
        for s in range(streams):
            mine = scratch + s * pitch
            row = p[EMBEDDING] + rows[first + s, 2] * _padded(d) * 4
            for t in range((d + 15) // 16):
                v = load(work, row + 64 * t) + load(work, rows[first + s, 0] + 64 * t)
                store(work, mine + at[X] + 64 * t, v)
            if p[ORDER]:
                x = np.float64(peek(work, p[LEVELS] + 4 * rows[first + s, 2]))
                _hear(heard[first + s], table, fit, p[ORDER], x, f0, f1, hold, told)
                for t in range((d + 15) // 16):
                    v = load(work, mine + at[X] + 64 * t)
                    for k in range(3):
                        v = fma(load(work, p[TOLD] + (k * _padded(d) + 16 * t) * 4), splat(work, np.float32(told[k])), v)
                    store(work, mine + at[X] + 64 * t, v)
            if len(skips):
                _copy(work, mine + skips[0], mine + at[X], d)
        o = 0
        while o < p[OPERATIONS]:
            op = ops[o]
            o += 1
            if op[KIND] == BLOCK:
                _mixer(work, op, p, at, scratch, first, streams, epsilon)
                for s in range(streams):
                    mine = scratch + s * pitch
                    if op[ADD] >= 0:
                        _add(work, mine + at[X], mine + skips[op[ADD]], op[WIDE])
                    if op[SAVE] >= 0:
                        _copy(work, mine + skips[op[SAVE]], mine + at[X], op[WIDE])
                continue
            wide, pool, d_out = _padded(op[WIDE]), op[POOL], _padded(op[D_OUT])
            if op[KIND] == DOWN:
                phase = phases[o - 1]
                full = phase + 1 == pool
                for s in range(streams):
                    mine = scratch + s * pitch
                    frame = op[PENDING] + (first + s) * pool * wide * 4
                    _copy(work, frame + phase * wide * 4, mine + at[X], op[WIDE])
                    _copy(work, mine + skips[op[SLOT]], mine + at[X], op[WIDE])
                    _add(work, mine + skips[op[SLOT]], op[HELD] + ((first + s) * pool + phase) * wide * 4, op[WIDE])
                    if not full:
                        _copy(work, mine + at[X], mine + skips[op[SLOT]], op[WIDE])
                phases[o - 1] = 0 if full else phase + 1
                if not full:
                    o = op[JUMP]
                    continue
                frames = op[PENDING] + first * pool * wide * 4
                _product(work, op[W_IN], op[B_IN], frames, pool * wide * 4, scratch + at[X], pitch, d_out // 16, pool * wide,
                         streams)  # fmt: skip
                for s in range(streams):
                    _copy(work, scratch + s * pitch + skips[op[SAVE]], scratch + s * pitch + at[X], op[D_OUT])
            else:
                held = op[HELD] + first * pool * d_out * 4
                _product(work, op[W_IN], op[B_IN], scratch + at[X], pitch, held, pool * d_out * 4, pool * d_out // 16, op[WIDE],
                         streams)  # fmt: skip
                for s in range(streams):
                    mine = scratch + s * pitch
                    _copy(work, mine + at[X], mine + skips[op[SLOT]], op[D_OUT])
        for s in range(streams):
            mine = scratch + s * pitch
            _norm(work, mine + at[X], mine + at[NORMED], d, epsilon, mine + at[PROJECTED])
        _product(work, p[HEAD], p[HEAD_BIAS], scratch + at[NORMED], pitch, scratch + at[LOGITS], pitch, (p[HEAD_ROWS] + 15) // 16, d,
                 streams)  # fmt: skip
        for s in range(streams):
            mine = scratch + s * pitch
            if p[ORDER]:
                _predict(work, mine + at[LOGITS], mine + at[LOGITS] + 4 * _padded(vocab), heard[first + s], p[ORDER], f0,
                         f1, hold, p[LEVELS], vocab)  # fmt: skip
            if guidance and s % 2:
                _guide(work, mine + at[LOGITS] - pitch, mine + at[LOGITS], guidance, vocab)
        for s in range(streams - 1, -1, -1):
            mine = scratch + s * pitch
            r = _uniform(rows[first + s, 1], p[POSITION] + i)
            token, normaliser = _draw(work, mine + at[LOGITS], mine + at[WEIGHTS], p[RANKED] + (first + s) * 16 * vocab, vocab, r,
                                      temperature, p[TOP_K], top_p)  # fmt: skip
            if guidance and s % 2 == 0:
                token = rows[first + s + 1, 2]  # drawn already, from the logits of both
            if p[FORCED]:
                token = peek(int64(0), p[FORCED] + ((first + s) * p[COUNT] + i) * 8)
            place = (first + s) * p[COUNT] + i
            poke(int64(0), p[OUT] + 8 * place, token)
            poke(work, p[LOG_PROBS] + 4 * place, peek(work, mine + at[LOGITS] + 4 * token) - normaliser)
            rows[first + s, 2] = token
