"""The numba kernels behind cpu.py. Imported when the back end first runs; compiled per data type on first use.

A unit of forward work is one tile of 16 channels of one batch row, over the whole sequence; of backward work, a group of
tiles over one segment of it. Time is cut into chunks of at most CHUNK_MAX steps. Within a chunk the loop over states is
outside the loop over time, so that two states live in registers, and everything that only depends on (time, channel)
sits in small scratch rows [time][16]. Forward leaves the state at the start of every chunk; backward starts from there,
recomputes two states' chunk into scratch (decay and h) and runs back over it. Nothing of size l*d*n ever exists.

All arguments travel in one int64 array `p`: addresses, byte strides (negative time strides make the reverse direction)
and sizes; the constants below name its slots. Parameters and states are padded to a multiple of 16 channels, and the
number of states to an even one: they are worked through in pairs, which halves the traffic with the scratch rows.
"""

from seqlab.ops.lanes import (
    compile_kernel,
    exp2,
    fma,
    helper,
    load,
    load_part,
    peek,
    peek_byte,
    poke,
    poke_totals,
    prefetch,
    sigmoid,
    softplus,
    splat,
    store,
    store_part,
)

# data (address, batch stride, time stride)
U, DELTA, Z, Y, B, C, MASK = range(0, 21, 3)
DY, DU, DDELTA, DZ, DB, DC = range(21, 39, 3)
# parameters: A log2(e) (n, dp); D, delta_bias (dp)
A, D, BIAS = 39, 40, 41
# states (b n dp), checkpoints (b chunks n dp), and what backward sums: float64 (b n dp), (b dp), (b dp)
STATE, CHECKPOINTS, DA, DD, DBIAS = 42, 43, 44, 45, 46
PARTIAL = 47  # (2 b groups segment n): each group's share of dB, dC
BATCH, LENGTH, CHANNELS, STATES, PADDED = 48, 49, 50, 51, 52
CHUNK, SOFTPLUS, SIZE, WORK = 53, 54, 55, 56  # steps a chunk, flag, bytes of a stored number, of a computed one
GROUPS, GROUP_TILES, SEGMENT, START, STOP = 57, 58, 59, 60, 61  # backward: this call handles times START..STOP
SAVE = 62
SLOTS = 63

VECTOR = 128  # bytes of scratch for one vector: room for 16 float64
APART = 3  # vectors between scratch arrays: exact multiples of 4 KiB would fight over the same cache sets


def scratch_bytes(chunk: int, states: int) -> int:
    """Scratch one thread needs for either kernel."""
    return (11 * (chunk + APART) + 8) * VECTOR + 2 * 8 * chunk * states


@compile_kernel
def forward(p, scratch, like, work, first, last):
    """Units [first, last): y, the last state (in place of the first) and, if asked, the state at each chunk's start."""
    length, d, n, padded, chunk = p[LENGTH], p[CHANNELS], p[STATES], p[PADDED], p[CHUNK]
    size, row, cell = p[SIZE], 16 * p[WORK], p[WORK]
    zeros, spare = scratch, scratch + VECTOR
    pitch = (chunk + APART) * row
    dt_rows = spare + VECTOR
    dtu_rows = dt_rows + pitch
    y_rows = dtu_rows + pitch
    store(work, zeros, splat(work, 0.0))
    store(work, zeros + row, splat(work, 0.0))
    has_z, next_B, next_C = p[Z] != 0, p[B + 2], p[C + 2]  # not re-read in the inner loops
    tiles = padded // 16
    chunks = (length + chunk - 1) // chunk
    none = splat(work, 0.0)
    for unit in range(first, last):
        b, tile = unit // tiles, unit % tiles
        lanes = min(16, d - 16 * tile)
        here = tile * row  # within padded parameters
        at = 16 * tile * size  # within data
        skip = load(work, p[D] + here) if p[D] else none
        bias = load(work, p[BIAS] + here) if p[BIAS] else none
        for c in range(chunks):
            t0 = c * chunk
            steps = min(chunk, length - t0)
            u = p[U] + b * p[U + 1] + t0 * p[U + 2] + at
            delta = p[DELTA] + b * p[DELTA + 1] + t0 * p[DELTA + 2] + at
            z = p[Z] + b * p[Z + 1] + t0 * p[Z + 2] + at
            out = p[Y] + b * p[Y + 1] + t0 * p[Y + 2] + at
            mask = p[MASK] + b * p[MASK + 1] + t0 * p[MASK + 2]
            for t in range(steps):
                x = load_part(like, u + t * p[U + 2], lanes, size, zeros)
                dt = load_part(like, delta + t * p[DELTA + 2], lanes, size, zeros) + bias
                if p[SOFTPLUS]:
                    dt, _ = softplus(work, dt)
                dtu = dt * x
                y = skip * x
                if p[MASK] and peek_byte(mask + t * p[MASK + 2]) == 0:
                    dt, dtu, y = none, none, none
                store(work, dt_rows + t * row, dt)
                store(work, dtu_rows + t * row, dtu)
                store(work, y_rows + t * row, y)
            B0 = p[B] + b * p[B + 1] + t0 * p[B + 2]
            C0 = p[C] + b * p[C + 1] + t0 * p[C + 2]
            for i in range(0, n, 2):
                A1 = load(work, p[A] + i * tiles * row + here)
                A2 = load(work, p[A] + (i + 1) * tiles * row + here)
                state = p[STATE] + (b * n + i) * tiles * row + here
                h1, h2 = load(work, state), load(work, state + tiles * row)
                if p[SAVE]:
                    kept = p[CHECKPOINTS] + ((b * chunks + c) * n + i) * tiles * row + here
                    store(work, kept, h1)
                    store(work, kept + tiles * row, h2)
                for t in range(i * steps // n, (i + 2) * steps // n):
                    prefetch(u + (chunk + t) * p[U + 2])
                    prefetch(delta + (chunk + t) * p[DELTA + 2])
                    prefetch(z + t * p[Z + 2])
                    prefetch(out + t * p[Y + 2])
                Bi, Ci = B0 + i * cell, C0 + i * cell
                for t in range(steps):
                    r = t * row
                    dt, dtu = load(work, dt_rows + r), load(work, dtu_rows + r)
                    h1 = fma(exp2(dt * A1), h1, dtu * peek(work, Bi))
                    h2 = fma(exp2(dt * A2), h2, dtu * peek(work, Bi + cell))
                    y = load(work, y_rows + r) + h1 * peek(work, Ci) + h2 * peek(work, Ci + cell)
                    store(work, y_rows + r, y)
                    Bi += next_B
                    Ci += next_C
                store(work, state, h1)
                store(work, state + tiles * row, h2)
            for t in range(steps):
                y = load(work, y_rows + t * row)
                if has_z:
                    gate = load_part(like, z + t * p[Z + 2], lanes, size, zeros)
                    y = y * (gate * sigmoid(work, gate))
                if p[MASK] and peek_byte(mask + t * p[MASK + 2]) == 0:
                    y = none
                store_part(like, out + t * p[Y + 2], lanes, size, spare, y)


@helper
def add_to_double(work, size, target, source):
    """Add 16 numbers of `work`'s type (`size` bytes each) onto 16 float64."""
    for j in range(16):
        poke(0.0, target + 8 * j, peek(0.0, target + 8 * j) + float(peek(work, source + j * size)))


@helper
def add_rows(work, size, target, source, count, overwrite):
    """Add `count` numbers onto others, or write them."""
    whole = count // 16 * 16
    for j in range(0, whole, 16):
        x = load(work, source + j * size)
        if not overwrite:
            x = x + load(work, target + j * size)
        store(work, target + j * size, x)
    for j in range(whole, count):
        x = peek(work, source + j * size)
        if not overwrite:
            x += peek(work, target + j * size)
        poke(work, target + j * size, x)


@compile_kernel
def backward(p, scratch, like, work, first, last):
    """Units [first, last) for times START..STOP, which later times have already been through.

    p[STATE] holds the gradient of the state that leaves this segment and gets that of the state that entered it.
    """
    length, d, n, padded, chunk = p[LENGTH], p[CHANNELS], p[STATES], p[PADDED], p[CHUNK]
    size, row, cell = p[SIZE], 16 * p[WORK], p[WORK]
    zeros, spare = scratch, scratch + VECTOR
    pitch = (chunk + APART) * row
    dt_rows = spare + VECTOR
    dtu_rows = dt_rows + pitch
    dyg_rows = dtu_rows + pitch
    slope_rows = dyg_rows + pitch
    y_rows = slope_rows + pitch
    ddt_rows = y_rows + pitch
    ddtu_rows = ddt_rows + pitch
    a1_rows = ddtu_rows + pitch
    a2_rows = a1_rows + pitch
    h1_rows = a2_rows + pitch  # one vector more than the others
    h2_rows = h1_rows + pitch
    dB_rows = h2_rows + pitch  # (chunk n) numbers
    dC_rows = dB_rows + chunk * n * cell + VECTOR
    store(work, zeros, splat(work, 0.0))
    store(work, zeros + row, splat(work, 0.0))
    none, one = splat(work, 0.0), splat(work, 1.0)
    has_z, next_B, next_C = p[Z] != 0, p[B + 2], p[C + 2]  # not re-read in the inner loops
    tiles = padded // 16
    chunks = (length + chunk - 1) // chunk
    start, stop, groups, group_tiles = p[START], p[STOP], p[GROUPS], p[GROUP_TILES]
    for unit in range(first, last):
        b, group = unit // groups, unit % groups
        part_dB = p[PARTIAL] + unit * p[SEGMENT] * n * cell
        part_dC = part_dB + p[BATCH] * groups * p[SEGMENT] * n * cell
        for tile in range(group * group_tiles, min((group + 1) * group_tiles, tiles)):
            lanes = min(16, d - 16 * tile)
            here = tile * row
            at = 16 * tile * size
            skip = load(work, p[D] + here) if p[D] else none
            bias = load(work, p[BIAS] + here) if p[BIAS] else none
            for c in range((stop - 1) // chunk, start // chunk - 1, -1):
                t0 = c * chunk
                steps = min(chunk, length - t0)
                u = p[U] + b * p[U + 1] + t0 * p[U + 2] + at
                delta = p[DELTA] + b * p[DELTA + 1] + t0 * p[DELTA + 2] + at
                z = p[Z] + b * p[Z + 1] + t0 * p[Z + 2] + at
                dy = p[DY] + b * p[DY + 1] + t0 * p[DY + 2] + at
                du = p[DU] + b * p[DU + 1] + t0 * p[DU + 2] + at
                ddelta = p[DDELTA] + b * p[DDELTA + 1] + t0 * p[DDELTA + 2] + at
                dz = p[DZ] + b * p[DZ + 1] + t0 * p[DZ + 2] + at
                mask = p[MASK] + b * p[MASK + 1] + t0 * p[MASK + 2]
                for t in range(steps):
                    x = load_part(like, u + t * p[U + 2], lanes, size, zeros)
                    dt = load_part(like, delta + t * p[DELTA + 2], lanes, size, zeros) + bias
                    slope = one
                    if p[SOFTPLUS]:
                        dt, slope = softplus(work, dt)
                    dyg = load_part(like, dy + t * p[DY + 2], lanes, size, zeros)
                    if has_z:
                        gate = load_part(like, z + t * p[Z + 2], lanes, size, zeros)
                        dyg = dyg * (gate * sigmoid(work, gate))
                    dtu = dt * x
                    y = skip * x
                    if p[MASK] and peek_byte(mask + t * p[MASK + 2]) == 0:
                        dt, dtu, dyg, y = none, none, none, none
                    r = t * row
                    store(work, dt_rows + r, dt)
                    store(work, dtu_rows + r, dtu)
                    store(work, dyg_rows + r, dyg)
                    store(work, slope_rows + r, slope)
                    store(work, y_rows + r, y)
                    store(work, ddt_rows + r, none)
                    store(work, ddtu_rows + r, none)
                B0 = p[B] + b * p[B + 1] + t0 * p[B + 2]
                C0 = p[C] + b * p[C + 1] + t0 * p[C + 2]
                for i in range(0, n, 2):
                    A1 = load(work, p[A] + i * tiles * row + here)
                    A2 = load(work, p[A] + (i + 1) * tiles * row + here)
                    kept = p[CHECKPOINTS] + ((b * chunks + c) * n + i) * tiles * row + here
                    h1, h2 = load(work, kept), load(work, kept + tiles * row)
                    store(work, h1_rows, h1)
                    store(work, h2_rows, h2)
                    for t in range(i * steps // n, (i + 2) * steps // n):
                        prefetch(u + (t - chunk) * p[U + 2])
                        prefetch(delta + (t - chunk) * p[DELTA + 2])
                        prefetch(z + (t - chunk) * p[Z + 2])
                        prefetch(dy + (t - chunk) * p[DY + 2])
                        prefetch(du + t * p[DU + 2])
                        prefetch(ddelta + t * p[DDELTA + 2])
                        prefetch(dz + t * p[DZ + 2])
                    Bi, Ci = B0 + i * cell, C0 + i * cell
                    at_dC = dC_rows + i * cell
                    for t in range(steps):
                        r = t * row
                        dt, dtu, dyg = load(work, dt_rows + r), load(work, dtu_rows + r), load(work, dyg_rows + r)
                        a1, a2 = exp2(dt * A1), exp2(dt * A2)
                        h1 = fma(a1, h1, dtu * peek(work, Bi))
                        h2 = fma(a2, h2, dtu * peek(work, Bi + cell))
                        store(work, a1_rows + r, a1)
                        store(work, a2_rows + r, a2)
                        store(work, h1_rows + r + row, h1)
                        store(work, h2_rows + r + row, h2)
                        if has_z:
                            y = load(work, y_rows + r) + h1 * peek(work, Ci) + h2 * peek(work, Ci + cell)
                            store(work, y_rows + r, y)
                        poke_totals(at_dC, dyg * h1, dyg * h2)
                        Bi += next_B
                        Ci += next_C
                        at_dC += n * cell
                    state = p[STATE] + (b * n + i) * tiles * row + here
                    dh1, dh2 = load(work, state), load(work, state + tiles * row)
                    dA1, dA2 = none, none
                    at_dB = dB_rows + (steps * n + i) * cell
                    for t in range(steps - 1, -1, -1):
                        r = t * row
                        Bi -= next_B
                        Ci -= next_C
                        at_dB -= n * cell
                        dt, dtu, dyg = load(work, dt_rows + r), load(work, dtu_rows + r), load(work, dyg_rows + r)
                        dh1 = dh1 + dyg * peek(work, Ci)
                        dh2 = dh2 + dyg * peek(work, Ci + cell)
                        poke_totals(at_dB, dtu * dh1, dtu * dh2)
                        ddtu = load(work, ddtu_rows + r) + dh1 * peek(work, Bi) + dh2 * peek(work, Bi + cell)
                        store(work, ddtu_rows + r, ddtu)
                        dh1 = dh1 * load(work, a1_rows + r)  # what reaches the state before this step
                        dh2 = dh2 * load(work, a2_rows + r)
                        g1, g2 = dh1 * load(work, h1_rows + r), dh2 * load(work, h2_rows + r)
                        dA1, dA2 = dA1 + g1 * dt, dA2 + g2 * dt
                        store(work, ddt_rows + r, load(work, ddt_rows + r) + g1 * A1 + g2 * A2)
                    store(work, state, dh1)
                    store(work, state + tiles * row, dh2)
                    store(work, spare, dA1)
                    add_to_double(work, cell, p[DA] + 8 * ((b * n + i) * padded + 16 * tile), spare)
                    store(work, spare, dA2)
                    add_to_double(work, cell, p[DA] + 8 * ((b * n + i + 1) * padded + 16 * tile), spare)
                is_first = tile == group * group_tiles
                add_rows(work, cell, part_dB + (t0 - start) * n * cell, dB_rows, steps * n, is_first)
                add_rows(work, cell, part_dC + (t0 - start) * n * cell, dC_rows, steps * n, is_first)
                ln2 = splat(work, 0.6931471805599453)
                dD, dbias = none, none
                for t in range(steps):
                    r = t * row
                    x = load_part(like, u + t * p[U + 2], lanes, size, zeros)
                    dyg = load(work, dyg_rows + r)
                    ddtu = load(work, ddtu_rows + r)
                    d_u = ddtu * load(work, dt_rows + r) + skip * dyg
                    d_delta = (load(work, ddt_rows + r) * ln2 + ddtu * x) * load(work, slope_rows + r)
                    d_skip = dyg * x
                    real = not p[MASK] or peek_byte(mask + t * p[MASK + 2]) != 0
                    if not real:
                        d_u, d_delta, d_skip = none, none, none
                    dD = dD + d_skip
                    dbias = dbias + d_delta
                    store_part(like, du + t * p[DU + 2], lanes, size, spare, d_u)
                    store_part(like, ddelta + t * p[DDELTA + 2], lanes, size, spare, d_delta)
                    if has_z:
                        gate = load_part(like, z + t * p[Z + 2], lanes, size, zeros)
                        open_ = sigmoid(work, gate)
                        d_z = load_part(like, dy + t * p[DY + 2], lanes, size, zeros) * load(work, y_rows + r)
                        d_z = d_z * (open_ + gate * open_ * (one - open_))
                        if not real:
                            d_z = none
                        store_part(like, dz + t * p[DZ + 2], lanes, size, spare, d_z)
                if p[DD]:
                    store(work, spare, dD)
                    add_to_double(work, cell, p[DD] + 8 * (b * padded + 16 * tile), spare)
                if p[DBIAS]:
                    store(work, spare, dbias)
                    add_to_double(work, cell, p[DBIAS] + 8 * (b * padded + 16 * tile), spare)


@compile_kernel
def sum_groups(p, scratch, like, work, first, last):
    """dB and dC of times START + [first, last): the groups' shares, added in their order."""
    n, cell, groups, batch = p[STATES], p[WORK], p[GROUPS], p[BATCH]
    for which in range(2):
        slot = DB + 3 * which
        for b in range(batch):
            share0 = p[PARTIAL] + (which * batch + b) * groups * p[SEGMENT] * n * cell
            for t in range(first, last):
                target = p[slot] + b * p[slot + 1] + (p[START] + t) * p[slot + 2]
                for i in range(n):
                    share = share0 + (t * n + i) * cell
                    x = peek(work, share)
                    for g in range(1, groups):
                        x += peek(work, share + g * p[SEGMENT] * n * cell)
                    poke(work, target + i * cell, x)
