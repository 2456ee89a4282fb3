"""The numba kernels behind cpu.py. Imported when the back end first runs; compiled per data type on first use.

The inputs seen by the filter are the state's w-1 rows, then x; call them rows 0 .. l+w-2, so that y_t sees rows
t .. t+w-1. A cell is a stretch of STEPS times of one batch row; a unit is a fixed run of cells, worked through in order
(so the number of threads never changes a sum). Time is the outer loop and channels the inner one: memory is read and
written once, in order.

All arguments travel in one int64 array `p`: addresses, byte strides (negative time strides make the reverse direction)
and sizes; the constants below name its slots.
"""

from seqlab.ops.lanes import (
    compile_kernel,
    helper,
    load,
    load_part,
    sigmoid,
    splat,
    store,
    store_part,
)

# data (address, batch stride, time stride)
X, STATE, Y, DY, DX, DSTATE = range(0, 18, 3)
# weight (w dp), bias (dp), each unit's share of their gradients (units w+1 dp)
WEIGHT, BIAS, SHARES = 18, 19, 20
BATCH, LENGTH, CHANNELS, WIDTH, PADDED = 21, 22, 23, 24, 25
STEPS, CELLS, SILU, SIZE, WORK = 26, 27, 28, 29, 30  # times a cell, cells a unit, flag, bytes stored, bytes computed
SLOTS = 31


@helper
def filtered(p, like, work, b, t, tile, lanes, zeros):
    """bias + sum_k weight[k] row_{t+k} for one tile: the output before the activation."""
    width, here, at = p[WIDTH], tile * 16 * p[WORK], tile * 16 * p[SIZE]
    row = p[PADDED] * p[WORK]
    y = load(work, p[BIAS] + here) if p[BIAS] else splat(work, 0.0)
    for k in range(width):
        address = row_address(p, b, t + k)
        if address:
            y = y + load_part(like, address + at, lanes, p[SIZE], zeros) * load(work, p[WEIGHT] + k * row + here)
    return y


@helper
def row_address(p, b, j):
    """Where row j of the inputs lies; 0 for a row of zeros."""
    before = p[WIDTH] - 1
    if j >= before:
        return p[X] + b * p[X + 1] + (j - before) * p[X + 2]
    if p[STATE]:
        return p[STATE] + b * p[STATE + 1] + j * p[STATE + 2]
    return 0


@compile_kernel
def forward(p, scratch, like, work, first, last):
    """Units [first, last) of y."""
    length, d, size, steps = p[LENGTH], p[CHANNELS], p[SIZE], p[STEPS]
    zeros, spare = scratch, scratch + 128
    store(work, zeros, splat(work, 0.0))
    stretches = (length + steps - 1) // steps
    for cell in range(first * p[CELLS], min(last * p[CELLS], p[BATCH] * stretches)):
        b, t0 = cell // stretches, cell % stretches * steps
        for t in range(t0, min(t0 + steps, length)):
            out = p[Y] + b * p[Y + 1] + t * p[Y + 2]
            for tile in range(p[PADDED] // 16):
                lanes = min(16, d - 16 * tile)
                y = filtered(p, like, work, b, t, tile, lanes, zeros)
                if p[SILU]:
                    y = y * sigmoid(work, y)
                store_part(like, out + 16 * tile * size, lanes, size, spare, y)


@compile_kernel
def backward(p, scratch, like, work, first, last):
    """Units [first, last) of dx, of the state's gradient, and of the shares of the parameters' gradients.

    g_t, the gradient before the activation, is kept for the last w times; row j gets sum_k weight[k] g_{j-k}, ready as
    soon as g_j is known. A stretch therefore looks w-1 times ahead.
    """
    length, d, size, steps, width = p[LENGTH], p[CHANNELS], p[SIZE], p[STEPS], p[WIDTH]
    row = p[PADDED] * p[WORK]
    zeros, spare = scratch, scratch + 128
    ring = spare + 128  # (w dp)
    none, one = splat(work, 0.0), splat(work, 1.0)
    store(work, zeros, none)
    tiles = p[PADDED] // 16
    stretches = (length + steps - 1) // steps
    for unit in range(first, last):
        share = p[SHARES] + unit * (width + 1) * row
        for j in range((width + 1) * tiles):
            store(work, share + j * 16 * p[WORK], none)
        for cell in range(unit * p[CELLS], min((unit + 1) * p[CELLS], p[BATCH] * stretches)):
            b, t0 = cell // stretches, cell % stretches * steps
            t1 = min(t0 + steps, length)
            for t in range(t0, t1 + width - 1):
                dy = p[DY] + b * p[DY + 1] + t * p[DY + 2]
                now = ring + t % width * row
                j = t - (width - 1)  # the position in x of row t
                dx = p[DX] + b * p[DX + 1] + j * p[DX + 2] if j >= t0 else 0
                if t0 == 0 and t < width - 1 and p[DSTATE]:
                    dx = p[DSTATE] + b * p[DSTATE + 1] + t * p[DSTATE + 2]
                for tile in range(tiles):
                    lanes = min(16, d - 16 * tile)
                    here, at = tile * 16 * p[WORK], tile * 16 * size
                    g = none
                    if t < length:
                        g = load_part(like, dy + at, lanes, size, zeros)
                        if p[SILU]:
                            y = filtered(p, like, work, b, t, tile, lanes, zeros)
                            open_ = sigmoid(work, y)
                            g = g * (open_ + y * open_ * (one - open_))
                    store(work, now + here, g)
                    if t < t1:
                        for k in range(width):
                            address = row_address(p, b, t + k)
                            if address:
                                target = share + k * row + here
                                seen = load_part(like, address + at, lanes, size, zeros)
                                store(work, target, load(work, target) + g * seen)
                        target = share + width * row + here
                        store(work, target, load(work, target) + g)
                    if dx:
                        sum_ = none
                        for k in range(min(width, t + 1)):
                            weight = load(work, p[WEIGHT] + k * row + here)
                            sum_ = sum_ + weight * load(work, ring + (t - k) % width * row + here)
                        store_part(like, dx + at, lanes, size, spare, sum_)
