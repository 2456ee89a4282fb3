// The selective scan, forward and backward, parallel over time.
//
//     h_t = exp(delta_t A) h_{t-1} + delta_t u_t B_t          y_t = (C_t . h_t + D u_t) silu(z_t)
//
// A warp owns 64 neighbouring channels, two a thread. Time is cut into chunks, one block each:
//   scan_ends     what a chunk adds to the state that leaves it (its decay is exp(A sum delta): one number a channel)
//   scan_carry    the state that enters every chunk
//   scan_forward  the outputs; also leaves the state at every segment start, for the backward pass
//   adjoint_ends, adjoint_carry   the same for dL/dh, right to left
//   scan_backward the gradients, segment by segment from the right, from checkpoints a tile apart
//   reduce_*      sums over chunks and channel blocks in a fixed order: the same bits on every run
//
// A thread keeps TILE steps of its two channels in registers and goes through the states one after the other, so nothing
// but a few KB of shared memory depends on the number of states. B and C come through shared memory, transposed.
// Logical time i runs in scan order; position = i, or length-1-i when reversed (strides carry the sign).
//
// Set from outside: STATES, WARPS, BF16, PAIRED, GROUPED (1: du, ddelta, dz are float and gather several groups of
// states, one launch each), and optionally the tuning constants below.

#ifndef GROUPED
#define GROUPED 0
#endif
#define TILE 8
#define STAGE 32                     // steps of B and C in shared memory at a time
#define TILES (STAGE / TILE)
#define ROW (STAGE + 4)              // padded row of the transposed B and C: 16-byte aligned, banks spread
#define THREADS (WARPS * 32)
#define EACH ((STAGE * STATES + THREADS - 1) / THREADS)  // values of B (and of C) a thread stages
#ifndef FORWARD_BLOCKS
#define FORWARD_BLOCKS (12 / WARPS)
#endif
#ifndef BACKWARD_BLOCKS
#define BACKWARD_BLOCKS (8 / WARPS)
#endif
#ifndef UNROLL
#define UNROLL 2
#endif
#define SUM_ROW (2 * STAGE + 2)      // sums of one state over a warp's channels: STAGE for C, STAGE for B, padding
#define PREFETCH (EACH <= 8)
#define MARKS_AHEAD (STATES <= 32)     // checkpoints fetched a tile ahead into shared memory
#define KEEP_A (STATES <= 32)          // A in shared memory; beyond, read through the cache
#ifdef SEQLAB_EMULATED
#define SETTLE(v)
#else
#define SETTLE(v) asm volatile("" : "+f"(v))
#endif
#define FORGET 27.f                  // what has decayed below 2^-27 is dropped: an eighth of a float's rounding

struct Params {
    const elem *u, *delta, *B, *C, *z, *dy;
    const float *A, *D, *bias, *initial, *dfinal;  // A as (n d), the states as (b d n)
    const unsigned char* mask;                     // (b l)
    elem* y;                                       // (b l d)
    float* final;                                  // (b d n)
    float *segments;                               // (b segment n d), state at a segment's start
    float *ends, *sums;                            // (b chunk n d), (b chunk d)
    elem *du, *ddelta, *dz;                        // (b l d)
    void *dB, *dC;                                 // (b l n) of elem, or (channel block b l n) of float if several
    float *partial;                                // (b*chunk n+2 d): dA, dD, dbias of one chunk
    float *dinitial, *dA, *dD, *dbias;             // dA as (d n)
    float *scratch;                                // checkpoints of the blocks in flight
    i64 u_b, u_t, delta_b, delta_t, B_b, B_t, C_b, C_t, z_b, z_t, dy_b, dy_t;
    i64 batch, length, channels, chunk, chunks, segment, all_segments, channel_blocks, items;
    i64 summed;            // chunks that *_ends sum up: all but the last one walked to, or all
    i64 all_states, add;   // STATES, or more when they are taken in groups; add to what earlier groups left
    i64 softplus, reverse;
};

// Where a thread stands: its batch row, chunk and channels.
struct Place {
    i64 b, k, c, cc;      // c: first channel, cc: the same inside the array
    int warp, lane, second;
    bool ok0, ok1;
};

DEVICE Place place(const Params& p, i64 item, i64 chunks) {
    Place q;
    q.warp = threadIdx.x / 32;
    q.lane = threadIdx.x % 32;
    i64 block = item % p.channel_blocks, rest = item / p.channel_blocks;
    q.k = rest % chunks;
    q.b = rest / chunks;
    q.c = block * (WARPS * 64) + q.warp * 64 + 2 * q.lane;
    q.ok0 = q.c < p.channels;
    q.ok1 = q.c + 1 < p.channels;
#if PAIRED
    q.cc = q.ok0 ? q.c : p.channels - 2;
    q.second = 1;
#else
    q.cc = q.ok0 ? q.c : p.channels - 1;
    q.second = q.ok1 ? 1 : 0;
#endif
    return q;
}

// A row of data in scan order: address of logical step 0 and the signed step.
struct Line {
    const elem* at;
    int step;
};
DEVICE Line line(const Params& p, const elem* base, i64 stride_b, i64 stride_t, i64 b, i64 c) {
    Line r;
    r.at = base + b * stride_b + c + (p.reverse ? (p.length - 1) * stride_t : 0);
    r.step = (int)(p.reverse ? -stride_t : stride_t);
    return r;
}

// One bit a step of the tile at i0: inside the sequence and not masked.
DEVICE u32 live_steps(const Params& p, i64 b, i64 i0) {
    i64 left = p.length - i0;
    u32 bits = left >= TILE ? (1u << TILE) - 1u : left <= 0 ? 0u : (1u << (int)left) - 1u;
    if (p.mask != 0) {
        const unsigned char* row = p.mask + b * p.length;
        for (int j = 0; j < TILE; j++)
            if ((bits >> j) & 1u)
                if (!row[p.reverse ? p.length - 1 - (i0 + j) : i0 + j]) bits &= ~(1u << j);
    }
    return bits;
}

#define ALL ((1u << TILE) - 1u)
DEVICE void load_tile(pair (&raw)[TILE], const Line& a, i64 i0, u32 live, int second) {
    const elem* at = a.at + i0 * a.step;
    if (live == ALL) {
#pragma unroll
        for (int j = 0; j < TILE; j++) raw[j] = load_pair(at + (i64)j * a.step, second);
    } else {
#pragma unroll
        for (int j = 0; j < TILE; j++) {
            raw[j] = make_pair((elem)0, (elem)0);
            if ((live >> j) & 1u) raw[j] = load_pair(at + (i64)j * a.step, second);
        }
    }
}

// delta' from what was read; 0 at dead steps, where the state then passes through.
DEVICE void step_sizes(float2 (&dt)[TILE], const pair (&raw)[TILE], float2 bias, i64 soft, u32 live) {
#pragma unroll
    for (int j = 0; j < TILE; j++) {
        dt[j] = unpack(raw[j]);
        dt[j].x += bias.x;
        dt[j].y += bias.y;
    }
    if (soft) {
#pragma unroll
        for (int j = 0; j < TILE; j++) {
            dt[j].x = softplus(dt[j].x);
            dt[j].y = softplus(dt[j].y);
        }
    }
    if (live != ALL) {
#pragma unroll
        for (int j = 0; j < TILE; j++)
            if (!((live >> j) & 1u)) dt[j] = make_float2(0.f, 0.f);
    }
}

// Results of a tile, two channels a thread. Dead steps are left alone.
DEVICE void store_tile(elem* at, int step, const float2 (&v)[TILE], u32 live, const Place& q) {
    if (live == ALL && q.ok1) {
#pragma unroll
        for (int j = 0; j < TILE; j++) store_pair(at + (i64)j * step, v[j], true, true);
    } else {
#pragma unroll
        for (int j = 0; j < TILE; j++)
            if ((live >> j) & 1u) store_pair(at + (i64)j * step, v[j], q.ok0, q.ok1);
    }
}
// A gradient's tile at an offset (in elements) of an array.
DEVICE void give_tile(const Params& p, elem* base, i64 offset, int step, const float2 (&v)[TILE], u32 live, const Place& q) {
#if GROUPED
    float* at = (float*)base + offset;
#pragma unroll
    for (int j = 0; j < TILE; j++, at += step) {
        if (!((live >> j) & 1u)) continue;
        if (q.ok0) at[0] = p.add ? at[0] + v[j].x : v[j].x;
        if (q.ok1) at[1] = p.add ? at[1] + v[j].y : v[j].y;
    }
#else
    store_tile(base + offset, step, v, live, q);
#endif
}
// Computed once: keeps the compiler from computing a value again in every round of a loop to save a register.
DEVICE void settle(float2 (&v)[TILE]) {
#pragma unroll
    for (int j = 0; j < TILE; j++) {
        SETTLE(v[j].x);
        SETTLE(v[j].y);
    }
}

DEVICE float2 read2(const float* row, const Place& q) {
    #if PAIRED
    return __ldg((const float2*)(row + q.cc));
#else
    return make_float2(__ldg(row + q.cc), __ldg(row + q.cc + q.second));
#endif
}
DEVICE float2 coefficients(const Params& p, const Place& q, int n) {  // log2(e) A
    float2 a = read2(p.A + (i64)n * p.channels, q);
    a.x *= LOG2E;
    a.y *= LOG2E;
    return a;
}
#if KEEP_A
#define COEFFICIENTS(n) coef[(n) * 32]
#define COEF_FLOATS (WARPS * STATES * 64)
#else
#define COEFFICIENTS(n) coefficients(p, q, n)
#define COEF_FLOATS 0
#endif
DEVICE void write2(float* row, const Place& q, float2 v) {
    if (q.ok0) row[q.c] = v.x;
    if (q.ok1) row[q.c + 1] = v.y;
}

// B or C: STAGE steps from logical step i0 on, into registers, then transposed into shared memory.
DEVICE elem staged_value(const Params& p, const elem* base, i64 stride_t, const unsigned char* mask, i64 i0, int e) {
    int n = e % STATES, t = e / STATES;
    i64 i = i0 + t;
    if (e >= STAGE * STATES || i < 0 || i >= p.length) return (elem)0;
    i64 at = p.reverse ? p.length - 1 - i : i;
    if (mask != 0 && !mask[at]) return (elem)0;
    return __ldg(base + at * stride_t + n);
}
DEVICE void fetch(elem (&r)[EACH], const Params& p, const elem* base, i64 stride_t, const unsigned char* mask, i64 i0) {
#pragma unroll
    for (int s = 0; s < EACH; s++) r[s] = staged_value(p, base, stride_t, mask, i0, threadIdx.x + s * THREADS);
}
DEVICE void put(float* tile, const elem (&r)[EACH]) {
#pragma unroll
    for (int s = 0; s < EACH; s++) {
        int e = threadIdx.x + s * THREADS;
        if (e < STAGE * STATES) tile[(e % STATES) * ROW + e / STATES] = to_float(r[s]);
    }
}
DEVICE void stage(float* tile, const Params& p, const elem* base, i64 stride_t, const unsigned char* mask, i64 i0) {
    for (int e = threadIdx.x; e < STAGE * STATES; e += THREADS)
        tile[(e % STATES) * ROW + e / STATES] = to_float(staged_value(p, base, stride_t, mask, i0, e));
}
DEVICE void read_row(float (&v)[TILE], const float* tile, int n, int t) {
#pragma unroll
    for (int j = 0; j < TILE; j += 4) {
        float4 f = *(const float4*)(tile + n * ROW + t + j);
        v[j] = f.x;
        v[j + 1] = f.y;
        v[j + 2] = f.z;
        v[j + 3] = f.w;
    }
}

// Decay of a whole chunk. Where the state is 0 it stays 0, also against an infinite growth.
DEVICE float decayed(float a, float sum, float h) { return h == 0.f ? 0.f : exp2_fast(a * sum) * h; }

// ------------------------------------------------------------------------------------------------- chunk summaries
// Forward:  sum_t exp(A sum_{s>t} delta_s) delta_t u_t B_t, walking left from the chunk's right end.
// Adjoint:  sum_t exp(A sum_{s<=t} delta_s) dy_t C_t,       walking right from its left end.
// The weight of a step only falls as the walk goes on (delta' >= 0 under softplus, A < 0): a state is finished once the
// weight is below 2^-FORGET in every channel of the warp, and the walk once all are. What is dropped is then at most
// 2^-FORGET of the state at the place where the walk stopped.
template <bool ADJOINT> DEVICE void chunk_ends(const Params& p) {
    SHARED_FLOATS(shared);
    float* tile = shared;                                             // (STATES, ROW)
    float2* sums = (float2*)(shared + STATES * ROW) + (threadIdx.x / 32) * STATES * 32 + threadIdx.x % 32;
    Place q = place(p, blockIdx.x, p.summed);
    if (ADJOINT) q.k += p.chunks - p.summed;
    const i64 begin = q.k * p.chunk, end = begin + p.chunk < p.length ? begin + p.chunk : p.length;
    const int stages = (int)((end - begin + STAGE - 1) / STAGE);
    const Line delta = line(p, p.delta, p.delta_b, p.delta_t, q.b, q.cc);
    const Line first = ADJOINT ? line(p, p.dy, p.dy_b, p.dy_t, q.b, q.cc) : line(p, p.u, p.u_b, p.u_t, q.b, q.cc);
    const Line gate = ADJOINT && p.z != 0 ? line(p, p.z, p.z_b, p.z_t, q.b, q.cc) : delta;
    const elem* rows = ADJOINT ? p.C + q.b * p.C_b : p.B + q.b * p.B_b;
    const i64 rows_t = ADJOINT ? p.C_t : p.B_t;
    const unsigned char* mask = p.mask == 0 ? p.mask : p.mask + q.b * p.length;
    const float2 bias = p.bias != 0 ? read2(p.bias, q) : make_float2(0.f, 0.f);
    for (int n = 0; n < STATES; n++) sums[n * 32] = make_float2(0.f, 0.f);
    float2 total = make_float2(0.f, 0.f);
    int active = STATES;
    for (int s = 0; s < stages; s++) {
        const i64 i0 = begin + (i64)(ADJOINT ? s : stages - 1 - s) * STAGE;
        if (!__syncthreads_or(active > 0)) break;
        stage(tile, p, rows, rows_t, mask, i0);
        __syncthreads();
        for (int w = 0; w < TILES && active > 0; w++) {
            const int t0 = (ADJOINT ? w : TILES - 1 - w) * TILE;
            const u32 live = live_steps(p, q.b, i0 + t0);
            if (live == 0) continue;
            pair raw[TILE], more[TILE];
            float2 dt[TILE], v[TILE];
            load_tile(raw, delta, i0 + t0, live, q.second);
            load_tile(more, first, i0 + t0, live, q.second);
            step_sizes(dt, raw, bias, p.softplus, live);
#pragma unroll
            for (int j = 0; j < TILE; j++) v[j] = unpack(more[j]);
            if (ADJOINT) {
                if (p.z != 0) {
                    load_tile(raw, gate, i0 + t0, live, q.second);
#pragma unroll
                    for (int j = 0; j < TILE; j++) {
                        float2 g = unpack(raw[j]);
                        v[j].x *= g.x * sigmoid(g.x);
                        v[j].y *= g.y * sigmoid(g.y);
                    }
                }
#pragma unroll
                for (int j = 0; j < TILE; j++) {
                    total.x += dt[j].x;
                    total.y += dt[j].y;
                    dt[j] = total;
                }
            } else {
#pragma unroll
                for (int j = TILE - 1; j >= 0; j--) {
                    v[j].x *= dt[j].x;
                    v[j].y *= dt[j].y;
                    float2 before = total;
                    total.x += dt[j].x;
                    total.y += dt[j].y;
                    dt[j] = before;
                }
            }
            settle(dt);
            settle(v);
            float2 nextA = coefficients(p, q, 0);
            for (int n = 0; n < active; n++) {
                const float2 a = nextA;
                nextA = coefficients(p, q, n + 1 < active ? n + 1 : n);
                float2 h = sums[n * 32];
                float b[TILE];
                read_row(b, tile, n, t0);
#pragma unroll
                for (int j = 0; j < TILE; j++) {
                    h.x += exp2_fast(fminf(a.x * dt[j].x, 127.f)) * (v[j].x * b[j]);  // no inf: it may meet a 0
                    h.y += exp2_fast(fminf(a.y * dt[j].y, 127.f)) * (v[j].y * b[j]);
                }
                sums[n * 32] = h;
            }
            if (p.softplus)
                while (active > 0) {
                    const float2 a = coefficients(p, q, active - 1);
                    if (!warp_all(a.x * total.x < -FORGET && a.y * total.y < -FORGET)) break;
                    active--;
                }
        }
    }
    float* out = p.ends + (q.b * p.chunks + q.k) * STATES * p.channels;
    for (int n = 0; n < STATES; n++) write2(out + n * p.channels, q, sums[n * 32]);
    write2(p.sums + (q.b * p.chunks + q.k) * p.channels, q, total);
}
KERNEL BOUNDS(THREADS, FORWARD_BLOCKS) scan_ends(const Params p) { chunk_ends<false>(p); }
KERNEL BOUNDS(THREADS, FORWARD_BLOCKS) adjoint_ends(const Params p) { chunk_ends<true>(p); }

// ------------------------------------------------------------------------------------------------------ carries
// Replaces what every chunk adds by what enters it. One thread a (batch, state, channel).
#define AHEAD 16
template <bool ADJOINT> DEVICE void carry(const Params& p) {
    const i64 id = (i64)blockIdx.x * blockDim.x + threadIdx.x, per = STATES * p.channels;
    if (id >= p.batch * per) return;
    const i64 b = id / per, r = id % per, n = r / p.channels, c = r % p.channels;
    const float a = LOG2E * p.A[r];
    const float* start = ADJOINT ? p.dfinal : p.initial;
    float h = start != 0 ? start[(b * p.channels + c) * p.all_states + n] : 0.f;
    float* ends = p.ends + b * p.chunks * per + r;
    const float* sums = p.sums + b * p.chunks * p.channels + c;
    for (i64 k0 = 0; k0 < p.chunks; k0 += AHEAD) {
        float e[AHEAD], s[AHEAD];
#pragma unroll
        for (int j = 0; j < AHEAD; j++) {
            i64 k = ADJOINT ? p.chunks - 1 - (k0 + j) : k0 + j;
            bool there = k0 + j < p.chunks - 1;  // the last chunk's own addition goes nowhere
            e[j] = there ? ends[k * per] : 0.f;
            s[j] = there ? sums[k * p.channels] : 0.f;
        }
#pragma unroll
        for (int j = 0; j < AHEAD; j++) {
            i64 k = ADJOINT ? p.chunks - 1 - (k0 + j) : k0 + j;
            if (k0 + j < p.chunks) ends[k * per] = h;
            h = decayed(a, s[j], h) + e[j];
        }
    }
}
KERNEL scan_carry(const Params p) { carry<false>(p); }
KERNEL adjoint_carry(const Params p) { carry<true>(p); }

// ------------------------------------------------------------------------------------------------------ outputs
// What enters chunk k: computed by the carry, or given from outside when there is a single chunk.
DEVICE float2 entering(const Params& p, const Place& q, const float* given, int n) {
    if (p.chunks > 1) return read2(p.ends + ((q.b * p.chunks + q.k) * STATES + n) * p.channels, q);
    if (given == 0) return make_float2(0.f, 0.f);
    const float* at = given + (q.b * p.channels + q.cc) * p.all_states + n;
    return make_float2(at[0], at[q.second * p.all_states]);
}
DEVICE void leaving(const Params& p, const Place& q, float* out, int n, float2 v) {  // (b d n)
    float* at = out + (q.b * p.channels + q.c) * p.all_states + n;
    if (q.ok0) at[0] = v.x;
    if (q.ok1) at[p.all_states] = v.y;
}

KERNEL BOUNDS(THREADS, FORWARD_BLOCKS) scan_forward(const Params p) {
    SHARED_FLOATS(shared);
    float2* coef = (float2*)shared + (threadIdx.x / 32) * STATES * 32 + threadIdx.x % 32;
    float* tileB = shared + COEF_FLOATS;                 // (2 or 1, STATES, ROW)
    float* tileC = tileB + (PREFETCH ? 2 : 1) * STATES * ROW;
    float2* state = (float2*)(tileC + (PREFETCH ? 2 : 1) * STATES * ROW) + (threadIdx.x / 32) * STATES * 32 + threadIdx.x % 32;
    const Place q = place(p, blockIdx.x, p.chunks);
    const i64 begin = q.k * p.chunk, end = begin + p.chunk < p.length ? begin + p.chunk : p.length;
    const int stages = (int)((end - begin + STAGE - 1) / STAGE);
    const Line u = line(p, p.u, p.u_b, p.u_t, q.b, q.cc), delta = line(p, p.delta, p.delta_b, p.delta_t, q.b, q.cc);
    const Line z = p.z != 0 ? line(p, p.z, p.z_b, p.z_t, q.b, q.cc) : u;
    const Line y = line(p, p.y, p.length * p.channels, p.channels, q.b, q.c);
    const elem *rowsB = p.B + q.b * p.B_b, *rowsC = p.C + q.b * p.C_b;
    const unsigned char* mask = p.mask == 0 ? p.mask : p.mask + q.b * p.length;
    const float2 none = make_float2(0.f, 0.f);
    const float2 bias = p.bias != 0 ? read2(p.bias, q) : none, skip = p.D != 0 ? read2(p.D, q) : none;
    for (int n = 0; n < STATES; n++) {
        state[n * 32] = entering(p, q, p.initial, n);
        if (KEEP_A) coef[n * 32] = coefficients(p, q, n);
    }
#if PREFETCH
    elem nextB[EACH], nextC[EACH];
    fetch(nextB, p, rowsB, p.B_t, mask, begin);
    fetch(nextC, p, rowsC, p.C_t, mask, begin);
    put(tileB, nextB);
    put(tileC, nextC);
    __syncthreads();
#endif
    u32 live = live_steps(p, q.b, begin);
    pair rawU[TILE], rawD[TILE];
    load_tile(rawU, u, begin, live, q.second);
    load_tile(rawD, delta, begin, live, q.second);
    for (int s = 0; s < stages; s++) {
        const i64 i0 = begin + (i64)s * STAGE;
#if PREFETCH
        float *nowB = tileB + (s & 1) * STATES * ROW, *nowC = tileC + (s & 1) * STATES * ROW;
        if (s + 1 < stages) {
            fetch(nextB, p, rowsB, p.B_t, mask, i0 + STAGE);
            fetch(nextC, p, rowsC, p.C_t, mask, i0 + STAGE);
        }
#else
        float *nowB = tileB, *nowC = tileC;
        __syncthreads();
        stage(nowB, p, rowsB, p.B_t, mask, i0);
        stage(nowC, p, rowsC, p.C_t, mask, i0);
        __syncthreads();
#endif
        if (p.segments != 0 && (i0 - begin) % p.segment == 0) {
            float* out = p.segments + (q.b * p.all_segments + i0 / p.segment) * p.all_states * p.channels;
            for (int n = 0; n < STATES; n++) write2(out + n * p.channels, q, state[n * 32]);
        }
        for (int t0 = 0; t0 < STAGE; t0 += TILE) {
            float2 dt[TILE], v[TILE], sum[TILE];
            pair rawZ[TILE];
            step_sizes(dt, rawD, bias, p.softplus, live);
#pragma unroll
            for (int j = 0; j < TILE; j++) {
                float2 x = unpack(rawU[j]);
                v[j] = make_float2(dt[j].x * x.x, dt[j].y * x.y);
                sum[j] = make_float2(skip.x * x.x, skip.y * x.y);
            }
            settle(dt);
            settle(v);
            if (p.z != 0) load_tile(rawZ, z, i0 + t0, live, q.second);
            const u32 now = live;
            const i64 after = i0 + t0 + TILE;
            live = after < end ? live_steps(p, q.b, after) : 0u;
            load_tile(rawU, u, after, live, q.second);
            load_tile(rawD, delta, after, live, q.second);
            if (now == 0) continue;
            float2 nextA = COEFFICIENTS(0);
#pragma unroll UNROLL
            for (int n = 0; n < STATES; n++) {
                const float2 a = nextA;
                nextA = COEFFICIENTS(n + 1 < STATES ? n + 1 : n);
                float2 h = state[n * 32];
                float b[TILE], c[TILE];
                read_row(b, nowB, n, t0);
                read_row(c, nowC, n, t0);
#pragma unroll
                for (int j = 0; j < TILE; j++) {
                    h.x = exp2_fast(a.x * dt[j].x) * h.x + v[j].x * b[j];
                    h.y = exp2_fast(a.y * dt[j].y) * h.y + v[j].y * b[j];
                    sum[j].x += c[j] * h.x;
                    sum[j].y += c[j] * h.y;
                }
                state[n * 32] = h;
            }
            if (p.z != 0) {
#pragma unroll
                for (int j = 0; j < TILE; j++) {
                    float2 g = unpack(rawZ[j]);
                    sum[j].x *= g.x * sigmoid(g.x);
                    sum[j].y *= g.y * sigmoid(g.y);
                }
            }
            store_tile((elem*)y.at + (i0 + t0) * y.step, y.step, sum, now, q);
        }
#if PREFETCH
        if (s + 1 < stages) {
            put(tileB + ((s + 1) & 1) * STATES * ROW, nextB);
            put(tileC + ((s + 1) & 1) * STATES * ROW, nextC);
        }
        __syncthreads();
#endif
    }
    if (p.final != 0 && q.k == p.chunks - 1)
        for (int n = 0; n < STATES; n++) leaving(p, q, p.final, n, state[n * 32]);
}

// ----------------------------------------------------------------------------------------------------- gradients
// Sums 16 values over the 32 lanes through shared memory. Lanes write their values as rows of four; 
// each lane then adds four rows' worth and the rest goes by exchanges. Lane l (even) ends up with value l / 2.
#define FOLD (4 * 32 * 4)  // floats of one round; a warp has two, so that a round is read while the next is computed
DEVICE void fold_write(float* fold, int row, const float (&v)[TILE], int lane) {
    float4* at = (float4*)fold + row * 32 + lane;
    at[0] = make_float4(v[0], v[1], v[2], v[3]);
    at[32] = make_float4(v[4], v[5], v[6], v[7]);
}
DEVICE float fold_read(const float* fold, int lane) {
    const float4* at = (const float4*)fold + (lane / 8) * 32 + lane % 8;
    const float4 a = at[0], b = at[8], c = at[16], d = at[24];
    float v[4] = {(a.x + b.x) + (c.x + d.x), (a.y + b.y) + (c.y + d.y), (a.z + b.z) + (c.z + d.z),
                  (a.w + b.w) + (c.w + d.w)};
    bool upper = (lane & 4) != 0;
    float k0 = upper ? v[2] : v[0], k1 = upper ? v[3] : v[1];
    k0 += lane_xor(upper ? v[0] : v[2], 4);
    k1 += lane_xor(upper ? v[1] : v[3], 4);
    upper = (lane & 2) != 0;
    float k = upper ? k1 : k0;
    k += lane_xor(upper ? k0 : k1, 2);
    return k + lane_xor(k, 1);
}

KERNEL BOUNDS(THREADS, BACKWARD_BLOCKS) scan_backward(const Params p) {
    SHARED_FLOATS(shared);
    float2* coef = (float2*)(shared + WARPS * 2 * FOLD) + (threadIdx.x / 32) * STATES * 32 + threadIdx.x % 32;
    float* tileB = shared + WARPS * 2 * FOLD + COEF_FLOATS;   // (STATES, ROW)
    float* tileC = tileB + STATES * ROW;                      // (STATES, ROW)
    float* channel_sums = tileC + STATES * ROW;               // (WARPS, STATES, SUM_ROW)
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    float* fold = shared + warp * 2 * FOLD;
    float* mine = channel_sums + warp * STATES * SUM_ROW;
    float2* state = (float2*)mine + lane;                     // the checkpoint pass keeps its state in the same place
    float2* adjoint = (float2*)(channel_sums + WARPS * STATES * SUM_ROW) + warp * STATES * 32 + lane;
    float2* dA = adjoint + WARPS * STATES * 32;
    float2* ready = dA + WARPS * STATES * 32;                 // the next tile's checkpoints, on their way
    const int tiles = (int)(p.segment / TILE);
    float2* marks = (float2*)p.scratch + ((i64)blockIdx.x * WARPS + warp) * tiles * STATES * 32 + lane;
    const float2 none = make_float2(0.f, 0.f);
    const i64 segments = p.chunk / p.segment;
    for (i64 item = blockIdx.x; item < p.items; item += gridDim.x) {
        const Place q = place(p, item, p.chunks);
        const i64 begin = q.k * p.chunk;
        const Line u = line(p, p.u, p.u_b, p.u_t, q.b, q.cc), delta = line(p, p.delta, p.delta_b, p.delta_t, q.b, q.cc);
        const Line z = p.z != 0 ? line(p, p.z, p.z_b, p.z_t, q.b, q.cc) : u;
        const Line dy = line(p, p.dy, p.dy_b, p.dy_t, q.b, q.cc);
        const Line out = line(p, p.du, p.length * p.channels, p.channels, q.b, q.c);  // du, ddelta and dz lie alike
        const elem *rowsB = p.B + q.b * p.B_b, *rowsC = p.C + q.b * p.C_b;
        const unsigned char* mask = p.mask == 0 ? p.mask : p.mask + q.b * p.length;
        const float2 bias = p.bias != 0 ? read2(p.bias, q) : none, skip = p.D != 0 ? read2(p.D, q) : none;
        for (int n = 0; n < STATES; n++) {
            adjoint[n * 32] = entering(p, q, p.dfinal, n);
            dA[n * 32] = none;
            if (KEEP_A) coef[n * 32] = coefficients(p, q, n);
        }
        float2 dD = none, dbias = none;
        for (i64 g = segments - 1; g >= 0; g--) {
            const i64 left = begin + g * p.segment;
            if (left >= p.length) continue;
            const i64 right = left + p.segment < p.length ? left + p.segment : p.length;
            const int stages = (int)((right - left + STAGE - 1) / STAGE);
            // The state at the start of every tile of the segment; the outputs before the gate, hence dz.
            const float* from = p.segments + (q.b * p.all_segments + left / p.segment) * p.all_states * p.channels;
            __syncthreads();
            for (int n = 0; n < STATES; n++) {
                const float2 h = read2(from + n * p.channels, q);
                state[n * 33] = h;
                marks[n * 32] = h;
            }
            {
            u32 live = live_steps(p, q.b, left);
            pair rawD[TILE], rawU[TILE];
            load_tile(rawD, delta, left, live, q.second);
            load_tile(rawU, u, left, live, q.second);
            for (int s = 0; s < stages; s++) {
                const i64 i0 = left + (i64)s * STAGE;
                __syncthreads();
                stage(tileB, p, rowsB, p.B_t, mask, i0);
                stage(tileC, p, rowsC, p.C_t, mask, i0);
                __syncthreads();
                for (int t0 = 0; t0 < STAGE; t0 += TILE) {
                    const int next = s * TILES + t0 / TILE + 1;
                    float2 dt[TILE], v[TILE], sumY[TILE];
                    pair rawY[TILE], rawZ[TILE];
                    step_sizes(dt, rawD, bias, p.softplus, live);
#pragma unroll
                    for (int j = 0; j < TILE; j++) {
                        const float2 x = unpack(rawU[j]);
                        v[j] = make_float2(dt[j].x * x.x, dt[j].y * x.y);
                        sumY[j] = make_float2(skip.x * x.x, skip.y * x.y);
                    }
                    settle(dt);
                    settle(v);
                    const u32 now = live;
                    if (p.z != 0) {
                        load_tile(rawZ, z, i0 + t0, now, q.second);
                        load_tile(rawY, dy, i0 + t0, now, q.second);
                    }
                    live = live_steps(p, q.b, i0 + t0 + TILE);
                    load_tile(rawD, delta, i0 + t0 + TILE, live, q.second);
                    load_tile(rawU, u, i0 + t0 + TILE, live, q.second);
                    float2 nextA = COEFFICIENTS(0);
#pragma unroll UNROLL
                    for (int n = 0; n < STATES; n++) {
                        const float2 a = nextA;
                        nextA = COEFFICIENTS(n + 1 < STATES ? n + 1 : n);
                        float2 h = state[n * 33];
                        float b[TILE], c[TILE];
                        read_row(b, tileB, n, t0);
                        read_row(c, tileC, n, t0);
#pragma unroll
                        for (int j = 0; j < TILE; j++) {
                            h.x = exp2_fast(a.x * dt[j].x) * h.x + v[j].x * b[j];
                            h.y = exp2_fast(a.y * dt[j].y) * h.y + v[j].y * b[j];
                            sumY[j].x += c[j] * h.x;
                            sumY[j].y += c[j] * h.y;
                        }
                        state[n * 33] = h;
                        if (next < tiles) marks[((i64)next * STATES + n) * 32] = h;
                    }
                    if (p.z != 0) {
#pragma unroll
                        for (int j = 0; j < TILE; j++) {
                            const float2 g = unpack(rawZ[j]), d = unpack(rawY[j]);
                            const float s0 = sigmoid(g.x), s1 = sigmoid(g.y);
                            sumY[j].x *= d.x * s0 * (1.f + g.x * (1.f - s0));
                            sumY[j].y *= d.y * s1 * (1.f + g.y * (1.f - s1));
                        }
                        give_tile(p, p.dz, (out.at - p.du) + (i0 + t0) * out.step, out.step, sumY, now, q);
                    }
                }
            }
            }
            // Back through the segment, reading one tile ahead.
            const int last = (int)((right - left + TILE - 1) / TILE) - 1;
            u32 live = live_steps(p, q.b, left + (i64)last * TILE);
            pair rawD[TILE], rawU[TILE], rawY[TILE], rawZ[TILE];
            load_tile(rawD, delta, left + (i64)last * TILE, live, q.second);
            load_tile(rawU, u, left + (i64)last * TILE, live, q.second);
            load_tile(rawY, dy, left + (i64)last * TILE, live, q.second);
            if (p.z != 0) load_tile(rawZ, z, left + (i64)last * TILE, live, q.second);
#if MARKS_AHEAD
            copies_done();
            for (int n = 0; n < STATES; n++) copy_ahead(ready + n * 32, marks + ((i64)last * STATES + n) * 32);
#endif
            for (int s = stages - 1; s >= 0; s--) {
                const i64 i0 = left + (i64)s * STAGE;
                __syncthreads();
                stage(tileB, p, rowsB, p.B_t, mask, i0);
                stage(tileC, p, rowsC, p.C_t, mask, i0);
                __syncthreads();
                for (int w = TILES - 1; w >= 0; w--) {
                    const int t0 = w * TILE;
                    const int tile = s * TILES + w;
                    const u32 now = tile <= last ? live : 0u;
                    float2 dt[TILE], v[TILE], dout[TILE], sumB[TILE], sumA[TILE];
                    {
                        step_sizes(dt, rawD, bias, p.softplus, now);
#pragma unroll
                        for (int j = 0; j < TILE; j++) {
                            const float2 x = unpack(rawU[j]);
                            float2 d = unpack(rawY[j]);
                            if (p.z != 0) {
                                const float2 g = unpack(rawZ[j]);
                                d.x *= g.x * sigmoid(g.x);
                                d.y *= g.y * sigmoid(g.y);
                            }
                            v[j] = make_float2(q.ok0 ? dt[j].x * x.x : 0.f, q.ok1 ? dt[j].y * x.y : 0.f);
                            dout[j] = make_float2(q.ok0 ? d.x : 0.f, q.ok1 ? d.y : 0.f);
                            sumB[j] = none;
                            sumA[j] = none;
                        }
                    }
                    settle(dt);
                    settle(v);
                    settle(dout);
                    if (tile <= last) {
                        const i64 before = i0 + t0 - TILE;
                        live = tile > 0 ? live_steps(p, q.b, before) : 0u;
                        load_tile(rawD, delta, before, live, q.second);
                        load_tile(rawU, u, before, live, q.second);
                        load_tile(rawY, dy, before, live, q.second);
                        if (p.z != 0) load_tile(rawZ, z, before, live, q.second);
                    }
                    const float2* mark = marks + (i64)tile * STATES * 32;
                    const float2* coming = mark - (tile > 0 ? STATES * 32 : 0);
                    if (now == 0) {
                        for (int n = 0; n < STATES; n++)
                            if (lane < 2 * TILE) mine[n * SUM_ROW + (lane < TILE ? t0 + lane : STAGE + t0 + lane - TILE)] = 0.f;
#if MARKS_AHEAD
                        if (tile <= last)
                            for (int n = 0; n < STATES; n++) copy_ahead(ready + n * 32, coming + n * 32);
#endif
                        continue;
                    }
#if MARKS_AHEAD
                    copies_done();
#endif
                    float* column = mine + (lane >= 16 ? STAGE : 0) + t0 + lane / 2 % TILE;
                    float2 nextA = COEFFICIENTS(0);
#if !MARKS_AHEAD
                    float2 nextH = mark[0];
#endif
#pragma unroll 1
                    for (int n = 0; n < STATES; n++) {
                        const float2 a = nextA;
                        float* round = fold + n % 2 * FOLD;
                        __syncwarp();
                        // The sums of the state before: their exchanges hide behind this state's work.
                        const float total = fold_read(fold + (n + 1) % 2 * FOLD, lane);
                        if (n > 0 && lane % 2 == 0) column[(n - 1) * SUM_ROW] = total;
                        const int after = n + 1 < STATES ? n + 1 : n;
                        nextA = COEFFICIENTS(after);
#if MARKS_AHEAD
                        float2 h = ready[n * 32];
#else
                        float2 h = nextH;
                        nextH = mark[after * 32];
#endif
                        float2 ag = adjoint[n * 32], da = none;
                        float b[TILE], c[TILE], part[TILE];
                        float2 e[TILE], kept[TILE];
                        read_row(b, tileB, n, t0);
                        read_row(c, tileC, n, t0);
#pragma unroll
                        for (int j = 0; j < TILE; j++) {
                            e[j].x = exp2_fast(a.x * dt[j].x);
                            e[j].y = exp2_fast(a.y * dt[j].y);
                            kept[j].x = e[j].x * h.x;
                            kept[j].y = e[j].y * h.y;
                            h.x = kept[j].x + v[j].x * b[j];
                            h.y = kept[j].y + v[j].y * b[j];
                            part[j] = dout[j].x * h.x + dout[j].y * h.y;
                        }
                        fold_write(round, 0, part, lane);
#pragma unroll
                        for (int j = TILE - 1; j >= 0; j--) {
                            const float2 d = make_float2(ag.x + c[j] * dout[j].x, ag.y + c[j] * dout[j].y);  // dL/dh_t
                            sumB[j].x += d.x * b[j];
                            sumB[j].y += d.y * b[j];
                            const float2 r = make_float2(d.x * kept[j].x, d.y * kept[j].y);
                            sumA[j].x += a.x * r.x;
                            sumA[j].y += a.y * r.y;
                            da.x += dt[j].x * r.x;
                            da.y += dt[j].y * r.y;
                            part[j] = d.x * v[j].x + d.y * v[j].y;
                            ag.x = e[j].x * d.x;
                            ag.y = e[j].y * d.y;
                        }
#if MARKS_AHEAD
                        copy_ahead(ready + n * 32, coming + n * 32);
#endif
                        adjoint[n * 32] = ag;
                        float2 old = dA[n * 32];
                        dA[n * 32] = make_float2(old.x + da.x, old.y + da.y);
                        fold_write(round, 2, part, lane);
                    }
                    __syncwarp();
                    const float total = fold_read(fold + (STATES - 1) % 2 * FOLD, lane);
                    if (lane % 2 == 0) column[(STATES - 1) * SUM_ROW] = total;
                    {
                        const i64 offset = (out.at - p.du) + (i0 + t0) * out.step;
                        pair raw[TILE], again[TILE];
                        float2 r[TILE], x[TILE];
                        load_tile(again, u, i0 + t0, now, q.second);
                        load_tile(raw, delta, i0 + t0, now, q.second);
#pragma unroll
                        for (int j = 0; j < TILE; j++) {
                            x[j] = unpack(again[j]);
                            r[j].x = skip.x * dout[j].x + dt[j].x * sumB[j].x;
                            r[j].y = skip.y * dout[j].y + dt[j].y * sumB[j].y;
                            dD.x += dout[j].x * x[j].x;
                            dD.y += dout[j].y * x[j].y;
                        }
                        give_tile(p, p.du, offset, out.step, r, now, q);
#pragma unroll
                        for (int j = 0; j < TILE; j++) {
                            r[j].x = LN2 * sumA[j].x + x[j].x * sumB[j].x;
                            r[j].y = LN2 * sumA[j].y + x[j].y * sumB[j].y;
                            if (p.softplus) {
                                const float2 w = unpack(raw[j]);
                                r[j].x *= sigmoid(w.x + bias.x);
                                r[j].y *= sigmoid(w.y + bias.y);
                            }
                            const bool on = (now >> j) & 1u;
                            dbias.x += on ? r[j].x : 0.f;
                            dbias.y += on ? r[j].y : 0.f;
                        }
                        give_tile(p, p.ddelta, offset, out.step, r, now, q);
                    }
                }
                __syncthreads();
                const i64 block = item % p.channel_blocks;
                for (int e = threadIdx.x; e < 2 * STAGE * STATES; e += THREADS) {
                    const int n = e % STATES, t = e / STATES;  // t < STAGE: C, else B
                    float total = 0.f;
                    for (int w = 0; w < WARPS; w++) total += channel_sums[(w * STATES + n) * SUM_ROW + t];
                    const i64 i = i0 + t % STAGE;
                    if (i < right) {
                        const i64 at = (block * p.batch + q.b) * p.length + (p.reverse ? p.length - 1 - i : i);
                        void* to = t < STAGE ? p.dC : p.dB;
                        if (p.channel_blocks == 1) ((elem*)to)[at * p.all_states + n] = from_float(total);
                        else ((float*)to)[at * STATES + n] = total;
                    }
                }
            }
        }
        float* rows = p.partial + (q.b * p.chunks + q.k) * (STATES + 2) * p.channels;
        for (int n = 0; n < STATES; n++) write2(rows + n * p.channels, q, dA[n * 32]);
        write2(rows + STATES * p.channels, q, dD);
        write2(rows + (STATES + 1) * p.channels, q, dbias);
        if (p.dinitial != 0 && q.k == 0)
            for (int n = 0; n < STATES; n++) leaving(p, q, p.dinitial, n, adjoint[n * 32]);
        __syncthreads();
    }
}

// dA, dD, dbias: sums over chunks. 256 threads: 32 columns, 8 shares of the chunks, then the 8 shares in order.
KERNEL reduce_rows(const Params p) {
    SHARED_FLOATS(shared);
    const i64 width = (STATES + 2) * p.channels, column = (i64)blockIdx.x * 32 + threadIdx.x % 32;
    const int share = threadIdx.x / 32;
    float total = 0.f;
    if (column < width)
        for (i64 r = share; r < p.batch * p.chunks; r += 8) total += p.partial[r * width + column];
    shared[threadIdx.x] = total;
    __syncthreads();
    if (share != 0 || column >= width) return;
    for (int s = 1; s < 8; s++) total += shared[s * 32 + threadIdx.x];
    const i64 n = column / p.channels, c = column % p.channels;
    if (n < STATES) p.dA[c * p.all_states + n] = total;
    else if (n == STATES) { if (p.dD != 0) p.dD[c] = total; }
    else if (p.dbias != 0) p.dbias[c] = total;
}

// dB and dC: sums over channel blocks; p.dB and p.dC hold the blocks' sums, p.y and p.du receive the results.
KERNEL reduce_blocks(const Params p) {
    const i64 size = p.batch * p.length * STATES;
    for (i64 e = (i64)blockIdx.x * blockDim.x + threadIdx.x; e < size; e += (i64)gridDim.x * blockDim.x) {
        float b = 0.f, c = 0.f;
        for (i64 k = 0; k < p.channel_blocks; k++) {
            b += ((const float*)p.dB)[k * size + e];
            c += ((const float*)p.dC)[k * size + e];
        }
        const i64 at = e / STATES * p.all_states + e % STATES;
        p.y[at] = from_float(b);
        p.du[at] = from_float(c);
    }
}
