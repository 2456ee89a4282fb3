// The selective scan, forward and backward, parallel over time.
//
// A warp owns 64 neighbouring channels, two a thread. Time is cut into chunks, one block each:
//   scan_ends     what a chunk adds to the state that leaves it (its decay is exp(A sum delta): one number a channel)
//   scan_carry    the state that enters every chunk
//   scan_forward  the outputs; also leaves the state at every segment start, for the backward pass
//   adjoint_ends, adjoint_carry   the same for dL/dh, right to left
//   scan_backward the gradients, segment by segment from the right, from checkpoints a tile apart; or (FINE, scan_fine.cuh) tile by
//                 tile, from the states and the outputs before the gate that scan_forward has kept
//   scan_reduce   sums over chunks and channel blocks in a fixed order: the same bits on every run
//
// A thread keeps TILE steps of its two channels in registers and goes through the states one after the other, so nothing
// but a few KB of shared memory depends on the number of states. B and C come through shared memory, transposed.
// When reversed, strides carry the sign (scan.cuh: positions).
//
// Set from outside: WARPS, GROUPED (1: du, ddelta, dz are float and gather several groups of states, one launch each), FINE (1:
// segments are tiles), and optionally the tuning constants below.

#include "selective_scan/scan.cuh"

#ifndef GATED
#define GATED 1                      // 0: no z, so the backward pass needs no outputs
#endif
#ifndef GROUPED
#define GROUPED 0
#endif
#ifndef FINE
#define FINE 0                       // 1: the state at every tile and the output before the gate are kept for the backward pass
#endif
#define STAGE 32                     // steps of B and C in shared memory at a time
#define TILES (STAGE / TILE)
#define ROW (STAGE + 4)              // padded row of the transposed B and C: 16-byte aligned, banks spread
#define THREADS (WARPS * 32)
#define EACH(steps) ((2 * (steps) * STATES / PER + THREADS - 1) / THREADS)  // fetches a thread does for B and C
#ifndef FORWARD_RESIDENT
#define FORWARD_RESIDENT 12          // warps a multiprocessor, which sets the registers a thread may have
#endif
#define FORWARD_BLOCKS (FORWARD_RESIDENT / WARPS)
#ifndef BACKWARD_BLOCKS
#define BACKWARD_BLOCKS (8 / WARPS)
#endif
#ifndef UNROLL
#define UNROLL (BF16 && STATES == 16 && FORWARD_RESIDENT == 12 ? 8 : 4)  // states at a time, scan_forward
#endif
#ifndef CHECKPOINT_UNROLL
#define CHECKPOINT_UNROLL 4          // states at a time, first half of scan_backward
#endif
#ifndef BACKWARD_UNROLL
#define BACKWARD_UNROLL 2            // the same, second half
#endif
#define PREFETCH (EACH(STAGE) * PER <= 16)  // the next stage of B and C waits in registers
#define KEEP_A (STATES <= 32)          // A in shared memory; beyond, read through the cache
#ifdef SEQLAB_EMULATED
#define SETTLE(v)
#else
#define SETTLE(v) asm volatile("" : "+f"(v))
#endif
#ifndef FORGET
#define FORGET (BF16 ? 18.f : 27.f)  // what has decayed below 2^-FORGET is dropped: less than the data's own rounding
#endif

// Where a thread stands: its batch row, chunk and channels.
struct Place : Channels {
    i64 b, k;
    int warp, lane;
};

DEVICE Place place(const Params& p, i64 item, i64 chunks) {
    Place q;
    q.warp = threadIdx.x / 32;
    q.lane = threadIdx.x % 32;
    i64 block = item % p.channel_blocks, rest = item / p.channel_blocks;
    q.k = rest % chunks;
    q.b = rest / chunks;
    own_channels(q, p, block * (WARPS * 64) + q.warp * 64 + 2 * q.lane);
    return q;
}

// A row of data in scan order: address of logical step i (0 if not given) and the signed step.
struct Line {
    const elem* at;
    int step;
};
DEVICE Line line(const Params& p, const elem* base, i64 stride_b, i64 stride_t, i64 b, i64 c, i64 i = 0) {
    Line r;
    r.at = base + b * stride_b + c + (p.reverse ? p.length - 1 - i : i) * stride_t;
    r.step = (int)(p.reverse ? -stride_t : stride_t);
    return r;
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
// One state at a tile's start, two channels a thread.
DEVICE void keep_pair(float* at, float2 h, const Place& q) {
#if PAIRED
    if (q.ok0) store_streaming(at, h);
#else
    if (q.ok0) at[0] = h.x;
    if (q.ok1) at[1] = h.y;
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

// What a thread keeps of every state: a value of its two channels and, up to 32 states, log2(e) A beside it.
#if KEEP_A
typedef float4 slot;
DEVICE slot make_slot(float2 h, float2 a) { return make_float4(h.x, h.y, a.x, a.y); }
#define COEFFICIENTS(s, n) make_float2((s).z, (s).w)
#else
typedef float2 slot;
DEVICE slot make_slot(float2 h, float2 a) { return h; }
#define COEFFICIENTS(s, n) coefficients(p, q, n)
#endif
DEVICE float2& value(slot& s) { return *(float2*)&s; }
// B and C, STEPS steps from logical step i0 on: into registers, then transposed into shared memory. Zeros at dead steps.
#if WIDE
typedef uint4 piece;
#else
typedef elem piece;
#endif
DEVICE elem staged_value(const Params& p, const elem* base, i64 stride_t, const unsigned char* mask, i64 i, int n) {
    if (i >= p.length) return (elem)0;
    const i64 at = position(p, i);
    if (mask != 0 && !mask[at]) return (elem)0;
    return __ldg(base + at * stride_t + n);
}
template <int STEPS> DEVICE void place_piece(int e, bool& second, int& t, int& n) {
    const int all = STEPS * STATES / PER;
    second = e >= all;
    e -= second ? all : 0;
    t = WIDE ? e % STEPS : e / STATES;
    n = WIDE ? e / STEPS * PER : e % STATES;
}
template <int STEPS> DEVICE piece fetch_piece(int e, const Params& p, const elem* rowsB, const elem* rowsC,
                                              const unsigned char* mask, i64 i0) {
    bool second;
    int t, n;
    place_piece<STEPS>(e, second, t, n);
    const elem* rows = second ? rowsC : rowsB;
    const i64 stride = second ? p.C_t : p.B_t;
#if WIDE
    if (mask == 0 && i0 + STEPS <= p.length)
        return __ldg((const uint4*)(rows + (p.reverse ? p.length - 1 - (i0 + t) : i0 + t) * stride + n));
    union { uint4 all; elem each[PER]; } r;
#pragma unroll
    for (int m = 0; m < PER; m++) r.each[m] = staged_value(p, rows, stride, mask, i0 + t, n + m);
    return r.all;
#else
    return staged_value(p, rows, stride, mask, i0 + t, n);
#endif
}
template <int STEPS, int PITCH> DEVICE void put_piece(int e, float* tileB, float* tileC, const piece& v) {
    bool second;
    int t, n;
    place_piece<STEPS>(e, second, t, n);
    float* to = (second ? tileC : tileB) + n * PITCH + t;
#if WIDE
    union { uint4 all; elem each[PER]; } r;
    r.all = v;
#pragma unroll
    for (int m = 0; m < PER; m++) to[m * PITCH] = to_float(r.each[m]);
#else
    *to = to_float(v);
#endif
}
template <int STEPS> DEVICE void fetch_rows(piece (&r)[EACH(STEPS)], const Params& p, const elem* rowsB, const elem* rowsC,
                                            const unsigned char* mask, i64 i0) {
#pragma unroll
    for (int k = 0; k < EACH(STEPS); k++) {
        const int e = threadIdx.x + k * THREADS;
        if (e < 2 * STEPS * STATES / PER) r[k] = fetch_piece<STEPS>(e, p, rowsB, rowsC, mask, i0);
    }
}
template <int STEPS, int PITCH> DEVICE void put_rows(float* tileB, float* tileC, const piece (&r)[EACH(STEPS)]) {
#pragma unroll
    for (int k = 0; k < EACH(STEPS); k++) {
        const int e = threadIdx.x + k * THREADS;
        if (e < 2 * STEPS * STATES / PER) put_piece<STEPS, PITCH>(e, tileB, tileC, r[k]);
    }
}
template <int STEPS, int PITCH, int WORKERS = THREADS> DEVICE void stage_rows(float* tileB, float* tileC, const Params& p, const elem* rowsB,
                                                       const elem* rowsC, const unsigned char* mask, i64 i0) {
#pragma unroll 1
    for (int e = threadIdx.x; e < 2 * STEPS * STATES / PER; e += WORKERS)
        put_piece<STEPS, PITCH>(e, tileB, tileC, fetch_piece<STEPS>(e, p, rowsB, rowsC, mask, i0));
}
template <int PITCH = ROW> DEVICE void read_row(float (&v)[TILE], const float* tile, int n, int t) {
#pragma unroll
    for (int j = 0; j < TILE; j += 4) {
        float4 f = *(const float4*)(tile + n * PITCH + t + j);
        v[j] = f.x;
        v[j + 1] = f.y;
        v[j + 2] = f.z;
        v[j + 3] = f.w;
    }
}

#define TENSOR (TILE * 16 * (int)sizeof(elem))  // floats of a tile of one tensor: TILE rows of 64 channels
DEVICE bool whole_warp(const Params& p, const Place& q) { return WIDE && q.c - 2 * q.lane + 64 <= p.channels; }
// A tile of one tensor from global into shared memory, (TILE, 32) pairs, zeros where nothing lives. `whole`: all steps
// and channels are there, so that it goes in the background in 16-byte pieces.
DEVICE void bring(pair* to, const Line& a, int i, u32 live, bool whole, const Place& q) {
    if (whole) {
        const int pieces = 4 * (int)sizeof(elem), lane = q.lane;  // of 16 bytes a row
        const int step = a.step * (int)sizeof(elem);
        const char* from = (const char*)(a.at + (lane % pieces * (16 / (int)sizeof(elem)) - 2 * lane)) + wide_product(i + lane / pieces, step);
#pragma unroll
        for (int k = 0; k < TILE * pieces / 32; k++)
            copy16((char*)to + (k * 32 + lane) * 16, from + wide_product(k * (32 / pieces), step));
    } else {
#pragma unroll 1
        for (int j = 0; j < TILE; j++) {
            pair v = make_pair((elem)0, (elem)0);
            if (((live >> j) & 1u) && q.ok0) {
                v = load_pair(a.at + (i64)(i + j) * a.step, q.second);
                if (!q.ok1) v = make_pair(pair_first(v), (elem)0);
            }
            to[j * 32 + q.lane] = v;
        }
    }
}

// ------------------------------------------------------------------------------------------------- chunk summaries
// Forward:  sum_t exp(A sum_{s>t} delta_s) delta_t u_t B_t, walking left from the chunk's right end.
// Adjoint:  sum_t exp(A sum_{s<=t} delta_s) dy_t C_t,       walking right from its left end.
// The weight of a step only falls as the walk goes on (delta' >= 0 under softplus, A < 0): a state is finished once the
// weight is below 2^-FORGET in every channel of the warp, and the walk once all are. What is dropped is then at most
// 2^-FORGET of the state at the place where the walk stopped.
#define HALF (STAGE * STATES / PER)  // the first half of the pieces of B and C is B's
#define EACH_OF_HALF ((HALF + THREADS - 1) / THREADS)
template <bool ADJOINT> DEVICE void fetch_half(piece (&r)[EACH_OF_HALF], const Params& p, const elem* rows, const unsigned char* mask, i64 i0) {
#pragma unroll
    for (int k = 0; k < EACH_OF_HALF; k++) {
        const int e = threadIdx.x + k * THREADS;
        if (e < HALF) r[k] = fetch_piece<STAGE>(e + (ADJOINT ? HALF : 0), p, rows, rows, mask, i0);
    }
}
DEVICE void put_half(float* tile, const piece (&r)[EACH_OF_HALF]) {
#pragma unroll
    for (int k = 0; k < EACH_OF_HALF; k++) {
        const int e = threadIdx.x + k * THREADS;
        if (e < HALF) put_piece<STAGE, ROW>(e, tile, tile, r[k]);
    }
}
#define SLOTS (WARPS * (STATES * 32 * (int)(sizeof(slot) / 4) + 3 * TENSOR))  // floats of the slots and inputs
template <bool ADJOINT> DEVICE void chunk_ends(const Params& p) {
    SHARED_FLOATS(shared);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    slot* sums = (slot*)shared + warp * STATES * 32 + lane;
    pair* inD = (pair*)(shared + WARPS * STATES * 32 * (sizeof(slot) / 4)) + warp * 3 * TILE * 32;
    pair *inV = inD + TILE * 32, *inZ = inD + 2 * TILE * 32;
    float* rows_in = shared + SLOTS;  // (STATES, ROW)
    Place q = place(p, blockIdx.x, p.summed);
    if (ADJOINT) q.k += p.chunks - p.summed;
    const i64 begin = q.k * p.chunk;
    const int size = (int)(begin + p.chunk < p.length ? p.chunk : p.length - begin), tiles = (size + TILE - 1) / TILE;
    const int stages = (size + STAGE - 1) / STAGE;
    const Line delta = line(p, p.delta, p.delta_b, p.delta_t, q.b, q.cc, begin);
    const Line first = ADJOINT ? line(p, p.dy, p.dy_b, p.dy_t, q.b, q.cc, begin) : line(p, p.u, p.u_b, p.u_t, q.b, q.cc, begin);
    const Line gate = ADJOINT && p.z != 0 ? line(p, p.z, p.z_b, p.z_t, q.b, q.cc, begin) : delta;
    const bool full = whole_warp(p, q);
    const elem* rows = ADJOINT ? p.C + q.b * p.C_b : p.B + q.b * p.B_b;
    const unsigned char* mask = p.mask == 0 ? p.mask : p.mask + q.b * p.length;
    const float2 bias = read_vector(p.bias, q);
    for (int n = 0; n < STATES; n++) sums[n * 32] = make_slot(make_float2(0.f, 0.f), coefficients(p, q, n));
    float2 total = make_float2(0.f, 0.f);
    int active = STATES, tile = ADJOINT ? 0 : tiles - 1;
    u32 live = live_steps(p, q.b, begin + tile * TILE);
    bring(inD, delta, tile * TILE, live, full && live == ALL, q);
    bring(inV, first, tile * TILE, live, full && live == ALL, q);
    if (ADJOINT && p.z != 0) bring(inZ, gate, tile * TILE, live, full && live == ALL, q);
#if PREFETCH
    piece next[EACH_OF_HALF];
    fetch_half<ADJOINT>(next, p, rows, mask, begin + (ADJOINT ? 0 : stages - 1) * STAGE);
#endif
    for (int s = 0; s < stages; s++) {
        const int stage = ADJOINT ? s : stages - 1 - s, steps = stage * STAGE;
        if (!__syncthreads_or(active > 0)) break;
#if PREFETCH
        put_half(rows_in, next);
        __syncthreads();
        if (s + 1 < stages) fetch_half<ADJOINT>(next, p, rows, mask, begin + (ADJOINT ? s + 1 : stages - 2 - s) * STAGE);
#else
        for (int e = threadIdx.x; e < HALF; e += THREADS)
            put_piece<STAGE, ROW>(e, rows_in, rows_in, fetch_piece<STAGE>(e + (ADJOINT ? HALF : 0), p, rows, rows, mask, begin + steps));
        __syncthreads();
#endif
        for (int w = 0; w < TILES && active > 0; w++) {
            const int t0 = (ADJOINT ? w : TILES - 1 - w) * TILE;
            if (steps + t0 >= size) continue;
            pair raw[TILE];
            float2 dt[TILE], v[TILE];
            copies_done();
            __syncwarp();
#pragma unroll
            for (int j = 0; j < TILE; j++) raw[j] = inD[j * 32 + lane];
            step_sizes(dt, raw, bias, p.softplus, live);
#pragma unroll
            for (int j = 0; j < TILE; j++) {
                v[j] = unpack(inV[j * 32 + lane]);
                if (ADJOINT && p.z != 0) {
                    const float2 g = unpack(inZ[j * 32 + lane]);
                    v[j].x *= g.x * sigmoid(g.x);
                    v[j].y *= g.y * sigmoid(g.y);
                }
            }
            __syncwarp();
            tile += ADJOINT ? 1 : -1;
            if (tile >= 0 && tile < tiles) {
                live = live_steps(p, q.b, begin + tile * TILE);
                bring(inD, delta, tile * TILE, live, full && live == ALL, q);
                bring(inV, first, tile * TILE, live, full && live == ALL, q);
                if (ADJOINT && p.z != 0) bring(inZ, gate, tile * TILE, live, full && live == ALL, q);
            }
            if (ADJOINT) {
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
#pragma unroll 2
            for (int n = 0; n < active; n++) {
                slot now = sums[n * 32];
                const float2 a = COEFFICIENTS(now, n);
                float2 h = value(now);
                float b[TILE];
                read_row(b, rows_in, n, t0);
#pragma unroll
                for (int j = 0; j < TILE; j++) {
                    h.x += exp2_fast(fminf(a.x * dt[j].x, 127.f)) * (v[j].x * b[j]);  // no inf: it may meet a 0
                    h.y += exp2_fast(fminf(a.y * dt[j].y, 127.f)) * (v[j].y * b[j]);
                }
                value(sums[n * 32]) = h;
            }
            if (p.softplus)
                while (active > 0) {
                    const float2 a = COEFFICIENTS(sums[(active - 1) * 32], active - 1);
                    if (!warp_all(a.x * total.x < -FORGET && a.y * total.y < -FORGET)) break;
                    active--;
                }
        }
    }
    float* out = p.ends + (q.b * p.chunks + q.k) * STATES * p.channels;
    for (int n = 0; n < STATES; n++) write2(out + n * p.channels, q, value(sums[n * 32]));
    write2(p.sums + (q.b * p.chunks + q.k) * p.channels, q, total);
}
KERNEL BOUNDS(THREADS, FORWARD_BLOCKS) scan_ends(const Params p) { chunk_ends<false>(p); }
KERNEL BOUNDS(THREADS, FORWARD_BLOCKS) adjoint_ends(const Params p) { chunk_ends<true>(p); }

// ------------------------------------------------------------------------------------------------------ carries
// Replaces what every chunk adds by what enters it. A block of 256 threads has 256 / p.shares neighbouring (state, channel) of one row
// of the batch, each with as many threads, which take a run of chunks each: first what their run does, then, from what enters
// the run, every chunk's.
#define AHEAD 8
template <bool ADJOINT> DEVICE void carry(const Params& p) {
    SHARED_FLOATS(shared);  // (2, shares, columns): sum of steps and addition of a run
    const int columns = 256 / (int)p.shares, lane = threadIdx.x % columns, share = threadIdx.x / columns;
    const i64 per = STATES * p.channels, groups = (per + columns - 1) / columns;
    const i64 b = blockIdx.x / groups, wanted = blockIdx.x % groups * columns + lane, r = wanted < per ? wanted : per - 1;
    const i64 n = r / p.channels, c = r % p.channels, run = (p.chunks + p.shares - 1) / p.shares, first = share * run;
    const float a = LOG2E * p.A[c * p.A_c + n * p.A_n];
    float* ends = p.ends + b * p.chunks * per + r;
    const float* sums = p.sums + b * p.chunks * p.channels + c;
    const float* start = ADJOINT ? p.dfinal : p.initial;
    const float enters = start != 0 ? start[(b * p.channels + c) * p.all_states + n] : 0.f;
    float h = p.shares == 1 ? enters : 0.f, sum = 0.f;
    for (int pass = p.shares == 1; pass < 2; pass++) {
        for (i64 k0 = first; k0 < first + run; k0 += AHEAD) {
            float e[AHEAD], s[AHEAD];
#pragma unroll
            for (int j = 0; j < AHEAD; j++) {
                const i64 k = ADJOINT ? p.chunks - 1 - (k0 + j) : k0 + j;
                const bool there = k0 + j < first + run && k0 + j < p.chunks - 1;  // the last chunk's own addition goes nowhere
                e[j] = there ? ends[k * per] : 0.f;
                s[j] = there ? sums[k * p.channels] : 0.f;
            }
#pragma unroll
            for (int j = 0; j < AHEAD; j++) {
                const i64 k = ADJOINT ? p.chunks - 1 - (k0 + j) : k0 + j;
                if (pass == 1 && wanted < per && k0 + j < first + run && k0 + j < p.chunks) ends[k * per] = h;
                h = decayed(exp2_fast(a * s[j]), h) + e[j];
                sum += s[j];
            }
        }
        if (pass == 1) break;
        shared[threadIdx.x] = sum;
        shared[256 + threadIdx.x] = h;
        __syncthreads();
        h = enters;
        for (int k = 0; k < share; k++)
            h = decayed(exp2_fast(a * shared[k * columns + lane]), h) + shared[256 + k * columns + lane];
    }
}
KERNEL scan_carry(const Params p) { carry<false>(p); }
KERNEL adjoint_carry(const Params p) { carry<true>(p); }

// ------------------------------------------------------------------------------------------------------ outputs
// What enters chunk k of state n: computed by the carry, or here from what the chunks before it leave.
DEVICE float2 entering(const Params& p, const Place& q, int n) {
    const i64 row = q.b * p.chunks;
    if (p.chunks > 1 && p.carried) return read2(p.ends + ((row + q.k) * STATES + n) * p.channels, q);
    float2 h = make_float2(0.f, 0.f);
    if (p.initial != 0) h = read_state(p, q, p.initial, q.b, n);
    const float2 a = coefficients(p, q, n);
    for (i64 k = 0; k < q.k; k++) {
        const float2 sum = read2(p.sums + (row + k) * p.channels, q), end = read2(p.ends + ((row + k) * STATES + n) * p.channels, q);
        h.x = decayed(exp2_fast(a.x * sum.x), h.x) + end.x;
        h.y = decayed(exp2_fast(a.y * sum.y), h.y) + end.y;
    }
    return h;
}
KERNEL BOUNDS(THREADS, FORWARD_BLOCKS) scan_forward(const Params p) {
    SHARED_FLOATS(shared);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    slot* state = (slot*)shared + warp * STATES * 32 + lane;
    pair* inputs = (pair*)(shared + WARPS * STATES * 32 * (sizeof(slot) / 4)) + warp * 3 * TILE * 32;
    pair *inU = inputs, *inD = inputs + TILE * 32, *inZ = inputs + 2 * TILE * 32;
    float* tiles = shared + SLOTS;  // (2 or 1, B and C, STATES, ROW)
    const Place q = place(p, blockIdx.x, p.chunks);
    const i64 begin = q.k * p.chunk;
    const int size = (int)(begin + p.chunk < p.length ? p.chunk : p.length - begin), segment = (int)p.segment;
    const int stages = (size + STAGE - 1) / STAGE;
    const Line u = line(p, p.u, p.u_b, p.u_t, q.b, q.cc, begin), delta = line(p, p.delta, p.delta_b, p.delta_t, q.b, q.cc, begin);
    const Line z = p.z != 0 ? line(p, p.z, p.z_b, p.z_t, q.b, q.cc, begin) : u;
    const Line y = line(p, p.y, p.length * p.channels, p.channels, q.b, q.c, begin);
#if FINE
    const Line ungated = line(p, p.ungated, p.length * p.channels, p.channels, q.b, q.c, begin);
#endif
    const bool full = whole_warp(p, q);
    const elem *rowsB = p.B + q.b * p.B_b, *rowsC = p.C + q.b * p.C_b;
    const unsigned char* mask = p.mask == 0 ? p.mask : p.mask + q.b * p.length;
    const float2 none = make_float2(0.f, 0.f);
    const float2 bias = read_vector(p.bias, q), skip = read_vector(p.D, q);
    u32 live = live_steps(p, q.b, begin);
    bring(inU, u, 0, live, full && live == ALL, q);
    bring(inD, delta, 0, live, full && live == ALL, q);
    for (int n = 0; n < STATES; n++) state[n * 32] = make_slot(entering(p, q, n), coefficients(p, q, n));
#if PREFETCH
    piece next[EACH(STAGE)];
    fetch_rows<STAGE>(next, p, rowsB, rowsC, mask, begin);
#endif
    for (int s = 0; s < stages; s++) {
#if PREFETCH
        float *tileB = tiles + (s & 1) * 2 * STATES * ROW, *tileC = tileB + STATES * ROW;
        put_rows<STAGE, ROW>(tileB, tileC, next);
        __syncthreads();  // one is enough: what is overwritten next was read before the previous one
        if (s + 1 < stages) fetch_rows<STAGE>(next, p, rowsB, rowsC, mask, begin + (s + 1) * STAGE);
#else
        float *tileB = tiles, *tileC = tileB + STATES * ROW;
        __syncthreads();
        stage_rows<STAGE, ROW>(tileB, tileC, p, rowsB, rowsC, mask, begin + s * STAGE);
        __syncthreads();
#endif
        if (!FINE && p.segments != 0 && s * STAGE % segment == 0) {
            float* out = p.segments + (q.b * p.all_segments + (begin + s * STAGE) / segment) * p.all_states * p.channels;
            for (int n = 0; n < STATES; n++) write2(out + n * p.channels, q, value(state[n * 32]));
        }
        for (int t0 = 0; t0 < STAGE; t0 += TILE) {
            const int i = s * STAGE + t0;
            if (i >= size) break;
            float2 dt[TILE], v[TILE], sum[TILE];
            copies_done();
            __syncwarp();
            {
                pair raw[TILE];
#pragma unroll
                for (int j = 0; j < TILE; j++) raw[j] = inD[j * 32 + lane];
                step_sizes(dt, raw, bias, p.softplus, live);
            }
#pragma unroll
            for (int j = 0; j < TILE; j++) {
                const float2 x = unpack(inU[j * 32 + lane]);
                v[j] = make_float2(dt[j].x * x.x, dt[j].y * x.y);
                sum[j] = make_float2(skip.x * x.x, skip.y * x.y);
            }
            settle(dt);
            settle(v);
            const u32 now = live;
            __syncwarp();
            if (p.z != 0) bring(inZ, z, i, now, full && now == ALL, q);
            if (i + TILE < size) {
                live = live_steps(p, q.b, begin + i + TILE);
                bring(inU, u, i + TILE, live, full && live == ALL, q);
                bring(inD, delta, i + TILE, live, full && live == ALL, q);
            }
#if FINE
            float* keep = p.segments + (q.b * p.all_segments + (begin + i) / TILE) * p.all_states * p.channels + q.c;
#endif
#pragma unroll UNROLL
            for (int n = 0; n < STATES; n++) {
                slot at = state[n * 32];
                const float2 a = COEFFICIENTS(at, n);
                float2 h = value(at);
                float b[TILE], c[TILE];
#if FINE
                keep_pair(keep, h, q);
                keep += p.channels;
#endif
                read_row(b, tileB, n, t0);
                read_row(c, tileC, n, t0);
#pragma unroll
                for (int j = 0; j < TILE; j++) {
                    h.x = exp2_fast(a.x * dt[j].x) * h.x + v[j].x * b[j];
                    h.y = exp2_fast(a.y * dt[j].y) * h.y + v[j].y * b[j];
                    sum[j].x += c[j] * h.x;
                    sum[j].y += c[j] * h.y;
                }
                value(state[n * 32]) = h;
            }
            if (p.z != 0) {
#if FINE
                store_tile((elem*)ungated.at + (i64)i * ungated.step, ungated.step, sum, now, q);
#endif
                copies_done();
                __syncwarp();
#pragma unroll
                for (int j = 0; j < TILE; j++) {
                    const float2 g = unpack(inZ[j * 32 + lane]);
                    sum[j].x *= g.x * sigmoid(g.x);
                    sum[j].y *= g.y * sigmoid(g.y);
                }
            }
            store_tile((elem*)y.at + (i64)i * y.step, y.step, sum, now, q);
        }
    }
    if (p.final != 0 && q.k == p.chunks - 1)
        for (int n = 0; n < STATES; n++) write_state(p, q, p.final, q.b, n, value(state[n * 32]));
}

// ----------------------------------------------------------------------------------------------------- gradients
#if STATES <= 16
#if FINE
#define BSTAGE TILE                  // steps of B and C in shared memory at a time
#define BROW TILE
#else
#define BSTAGE (WARPS > 2 ? 16 : 8)  // with 16 four blocks of two warps would not fit
#define BROW (BSTAGE + 4)
#endif
#define BTILES (BSTAGE / TILE)
#define SUM_ROW (2 * BSTAGE + 2)     // sums of one state over a warp's channels: BSTAGE for C, BSTAGE for B, padding
#define PLANE (STATES * 128)         // floats of (STATES, 32) float4
#define SUMS ((STATES * SUM_ROW + 3) / 4 * 4)
#if BF16
#define FOLD_ROW 36                  // float4 of one state's accumulators: 32 and padding
#define FOLD_FLOATS (4 * FOLD_ROW * 4)
#else
#define TRUNCATED 1.f
#define FOLD (4 * 32 * 4)            // floats of one round; there are two, so that one is read while the next is computed
#define FOLD_FLOATS (2 * FOLD)
#endif

// A tile of results. Dead steps are left alone. `out` is where du lies; other results lie alike.
// Float, added to what other groups of states gave:
DEVICE void add_tile(const Params& p, float* base, const Line& out, int i, const float2 (&v)[TILE], u32 live, bool whole, const Place& q) {
    float* at = base + (out.at - p.du) + (i64)i * out.step;
    if (PAIRED && whole) {
        float2 sum[TILE];
#pragma unroll
        for (int j = 0; j < TILE; j++) sum[j] = p.add ? *(float2*)(at + wide_product(j, out.step)) : make_float2(0.f, 0.f);
#pragma unroll
        for (int j = 0; j < TILE; j++)
            *(float2*)(at + wide_product(j, out.step)) = make_float2(sum[j].x + v[j].x, sum[j].y + v[j].y);
        return;
    }
#pragma unroll
    for (int j = 0; j < TILE; j++, at += out.step) {
        if (!((live >> j) & 1u)) continue;
        if (q.ok0) at[0] = p.add ? at[0] + v[j].x : v[j].x;
        if (q.ok1) at[1] = p.add ? at[1] + v[j].y : v[j].y;
    }
}
// Of the data's type, through shared memory:
DEVICE void give_tile(const Params& p, elem* base, const Line& out, int i, const float2 (&v)[TILE], pair* by, u32 live, bool whole,
                      const Place& q) {
    const int pieces = 4 * (int)sizeof(elem), step = out.step * (int)sizeof(elem);
#pragma unroll
    for (int j = 0; j < TILE; j++) by[j * 32 + q.lane] = pack(v[j]);
    char* at = (char*)base + ((const char*)out.at - (const char*)p.du);
    if (whole) {
        __syncwarp();
        at += (q.lane % pieces * (16 / (int)sizeof(elem)) - 2 * q.lane) * (int)sizeof(elem);
        at += wide_product(i + q.lane / pieces, step);
#pragma unroll
        for (int k = 0; k < TILE * pieces / 32; k++)
            *(uint4*)(at + wide_product(k * (32 / pieces), step)) = *(uint4*)((char*)by + (k * 32 + q.lane) * 16);
    } else {
        at += wide_product(i, step);
#pragma unroll 1
        for (int j = 0; j < TILE; j++, at += step) {
            const pair w = by[j * 32 + q.lane];
            if (!((live >> j) & 1u)) continue;
            if (q.ok0) ((elem*)at)[0] = pair_first(w);
            if (q.ok1) ((elem*)at)[1] = pair_second(w);
        }
    }
}
DEVICE void give(const Params& p, elem* base, const Line& out, int i, const float2 (&v)[TILE], pair* by, u32 live, bool whole,
                 const Place& q) {
#if GROUPED
    add_tile(p, (float*)base, out, i, v, live, whole, q);
#else
    give_tile(p, base, out, i, v, by, live, whole, q);
#endif
}
DEVICE u32 live_at(const Params& p, const Place& q, i64 begin, int i, int size, bool plain) {
    return plain && i + TILE <= size ? ALL : live_steps(p, q.b, begin + i);
}

// The adjoint that enters chunk k of state n from the right.
DEVICE float2 adjoint_entering(const Params& p, const Place& q, int n) {
    const i64 row = q.b * p.chunks;
    if (p.chunks > 1 && p.carried) return read2(p.ends + ((row + q.k) * STATES + n) * p.channels, q);
    float2 h = make_float2(0.f, 0.f);
    if (p.dfinal != 0) h = read_state(p, q, p.dfinal, q.b, n);
    const float2 a = coefficients(p, q, n);
    for (i64 k = p.chunks - 1; k > q.k; k--) {
        const float2 sum = read2(p.sums + (row + k) * p.channels, q), end = read2(p.ends + ((row + k) * STATES + n) * p.channels, q);
        h.x = decayed(exp2_fast(a.x * sum.x), h.x) + end.x;
        h.y = decayed(exp2_fast(a.y * sum.y), h.y) + end.y;
    }
    return h;
}

#if BF16
// Sums of 16 values a lane over the warp by matrix instructions: four values are A, B picks their columns
// such that lane 4r+t ends up with values 4t to 4t+3 summed over lanes 4r to 4r+3.
// The unit drops the low 13 bits of what it multiplies: 3.4e-4 too small on average, put right at the end; what is left is
// a fifth of the rounding of the bfloat16 result.
#define TRUNCATED 1.00034f
DEVICE void sum_four(float (&acc)[4], const float (&v)[4], const float2& pick) {
    sum_lanes(acc, v[0], v[2], v[1], v[3], pick.x, pick.y);
}
// The eight partial sums of four states' values; lane 8n+2t+half takes values 4t+2half and the next of state n.
DEVICE float2 fold_states(const float* fold, int lane) {
    const float2* at = (const float2*)fold + lane / 8 * (2 * FOLD_ROW) + lane % 8;
    float2 v[8];
#pragma unroll
    for (int k = 0; k < 8; k++) v[k] = at[8 * k];
#pragma unroll
    for (int step = 4; step > 0; step /= 2)
#pragma unroll
        for (int k = 0; k < step; k++) v[k].x += v[k + step].x, v[k].y += v[k + step].y;
    return v[0];
}
#else
// The same exactly, through shared memory. Lanes write their values as rows of four; each lane then adds four rows' worth
// and the rest goes by exchanges. Lane l (even) ends up with value l / 2.
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
#endif

#if FINE
#include "selective_scan/scan_fine.cuh"
#else
#define INPUTS (2 * TILE * 64 + 3 * TENSOR)
#define WARP_FLOATS (2 * PLANE + FOLD_FLOATS + INPUTS + SUMS)
KERNEL BOUNDS(THREADS, BACKWARD_BLOCKS) scan_backward(const Params p) {
    SHARED_FLOATS(shared);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    float* own = shared + warp * WARP_FLOATS;
    float4* hs = (float4*)own + lane;               // (STATES, 32): state entering the tile, log2(e) A
    float4* adj = (float4*)(own + PLANE) + lane;    // (STATES, 32): adjoint coming from the right, sum for dA
    float* fold = own + 2 * PLANE;
    float* inputs = fold + FOLD_FLOATS;
    float4* inT = (float4*)inputs + lane;           // second half: (4, 32) delta' and (4, 32) gated dy, a tile ahead,
    pair* inU = (pair*)(inputs + 2 * TILE * 64);    // two tiles of u,
    pair* inD = inU + 2 * TILE * 32;                // one of delta
    pair *ckD = (pair*)inputs, *ckU = ckD + TILE * 32, *ckZ = ckU + TILE * 32, *ckY = ckZ + TILE * 32;  // first half
    float* mine = inputs + INPUTS;                  // (STATES, SUM_ROW)
    const float* channel_sums = shared + 2 * PLANE + FOLD_FLOATS + INPUTS;
    float* tileB = shared + WARPS * WARP_FLOATS;    // (STATES, BROW)
    float* tileC = tileB + STATES * BROW;           // (STATES, BROW)
    const int tiles = (int)(p.segment / TILE), segment = (int)p.segment;
    // What the first half of a segment leaves for the second: the state at every tile, delta' and the gated dy.
    float2* marks = (float2*)p.scratch + ((i64)blockIdx.x * WARPS + warp) * ((tiles + 1) * STATES * 32 + tiles * 512) + lane;
    float4* steps = (float4*)(marks - lane + (tiles + 1) * STATES * 32) + lane;
    const float2 none = make_float2(0.f, 0.f);
#if BF16
    float2 pick[4];
#pragma unroll
    for (int k = 0; k < 4; k++) pick[k] = make_float2(lane / 4 == 2 * k ? 1.f : 0.f, lane / 4 == 2 * k + 1 ? 1.f : 0.f);
#endif
    for (i64 item = blockIdx.x; item < p.items; item += gridDim.x) {
        const Place q = place(p, item, p.chunks);
        const i64 begin = q.k * p.chunk;
        const int size = (int)(begin + p.chunk < p.length ? p.chunk : p.length - begin);
        const Line u = line(p, p.u, p.u_b, p.u_t, q.b, q.cc, begin), delta = line(p, p.delta, p.delta_b, p.delta_t, q.b, q.cc, begin);
        const Line z = p.z != 0 ? line(p, p.z, p.z_b, p.z_t, q.b, q.cc, begin) : u;
        const Line dy = line(p, p.dy, p.dy_b, p.dy_t, q.b, q.cc, begin);
        const Line out = line(p, p.du, p.length * p.channels, p.channels, q.b, q.c, begin);  // du, ddelta, dz lie alike
        const bool plain = warp_all(whole_warp(p, q) && p.mask == 0);
        const elem *rowsB = p.B + q.b * p.B_b, *rowsC = p.C + q.b * p.C_b;
        const unsigned char* mask = p.mask == 0 ? p.mask : p.mask + q.b * p.length;
        const float2 bias = read_vector(p.bias, q), skip = read_vector(p.D, q);
        for (int n = 0; n < STATES; n++) {
            const float2 ag = adjoint_entering(p, q, n), a = coefficients(p, q, n);
            adj[n * 32] = make_float4(q.ok0 ? ag.x : 0.f, q.ok1 ? ag.y : 0.f, 0.f, 0.f);
            hs[n * 32] = make_float4(0.f, 0.f, a.x, a.y);
        }
        float2 dD = none, dbias = none;
        const i64 first_row = (item % p.channel_blocks * p.batch + q.b) * p.length + (p.reverse ? p.length - 1 - begin : begin);
#pragma unroll 1
        for (int left = (size - 1) / segment * segment; left >= 0; left -= segment) {
            const int right = left + segment < size ? left + segment : size;
            const int stages = (right - left + BSTAGE - 1) / BSTAGE, last = (right - left + TILE - 1) / TILE - 1;
            // The state at the start of every tile of the segment; the outputs before the gate, hence dz.
            const float* from = p.segments + (q.b * p.all_segments + (begin + left) / p.segment) * p.all_states * p.channels;
            for (int n = 0; n < STATES; n++) {
                const float2 h = read2(from + n * p.channels, q);
                *(float2*)&hs[n * 32] = h;
                marks[n * 32] = h;
            }
            u32 live = live_at(p, q, begin, left, size, plain);
            bring(ckD, delta, left, live, plain && live == ALL, q);
            bring(ckU, u, left, live, plain && live == ALL, q);
            piece next[EACH(BSTAGE)];  // the next stage of B and C
            fetch_rows<BSTAGE>(next, p, rowsB, rowsC, mask, begin + left);
#pragma unroll 1
            for (int s = 0; s < stages; s++) {
                __syncthreads();
                put_rows<BSTAGE, BROW>(tileB, tileC, next);
                __syncthreads();
                if (s + 1 < stages) fetch_rows<BSTAGE>(next, p, rowsB, rowsC, mask, begin + left + (s + 1) * BSTAGE);
#pragma unroll 1
                for (int w = 0; w < BTILES; w++) {
                    const int tile = s * BTILES + w, i = left + tile * TILE;
                    if (tile > last) break;
                    const u32 now = live;
                    const bool whole = plain && now == ALL;
                    float2 dt[TILE], v[TILE], sumY[TILE];
                    copies_done();
                    __syncwarp();
                    {
                        pair raw[TILE];
#pragma unroll
                        for (int j = 0; j < TILE; j++) raw[j] = ckD[j * 32 + lane];
                        step_sizes(dt, raw, bias, p.softplus, now);
                    }
#pragma unroll
                    for (int j = 0; j < TILE; j++) {
                        const float2 x = unpack(ckU[j * 32 + lane]);
                        v[j] = make_float2(dt[j].x * x.x, dt[j].y * x.y);
                        sumY[j] = make_float2(skip.x * x.x, skip.y * x.y);
                    }
                    settle(dt);
                    settle(v);
                    float4* keep = steps + tile * 256;
#pragma unroll
                    for (int k = 0; k < 4; k++)
                        keep[k * 32] = make_float4(dt[2 * k].x, dt[2 * k].y, dt[2 * k + 1].x, dt[2 * k + 1].y);
                    __syncwarp();
                    if (p.z != 0) bring(ckZ, z, i, now, whole, q);
                    bring(ckY, dy, i, now, whole, q);
                    if (tile < last) {
                        live = live_at(p, q, begin, i + TILE, size, plain);
                        bring(ckD, delta, i + TILE, live, plain && live == ALL, q);
                        bring(ckU, u, i + TILE, live, plain && live == ALL, q);
                    }
                    float2* mark = marks + (tile + 1) * STATES * 32;
                    float4* slot_of = hs;
                    const float* row_of = tileB + w * TILE;
#if !GATED
                    if (tile < last)  // the state that leaves the segment is not needed
#endif
#pragma unroll CHECKPOINT_UNROLL
                    for (int n = 0; n < STATES; n++) {
                        const float4 ha = *slot_of;
                        float2 h = make_float2(ha.x, ha.y);
                        float b[TILE], c[TILE];
                        read_row<BROW>(b, row_of, 0, 0);
                        read_row<BROW>(c, row_of + STATES * BROW, 0, 0);
#pragma unroll
                        for (int j = 0; j < TILE; j++) {
                            h.x = exp2_fast(ha.z * dt[j].x) * h.x + v[j].x * b[j];
                            h.y = exp2_fast(ha.w * dt[j].y) * h.y + v[j].y * b[j];
#if GATED
                            sumY[j].x += c[j] * h.x;
                            sumY[j].y += c[j] * h.y;
#endif
                        }
                        *(float2*)slot_of = h;
                        *mark = h;
                        slot_of += 32;
                        row_of += BROW;
                        mark += 32;
                    }
                    copies_done();
                    __syncwarp();
                    float2 d[TILE];
#pragma unroll
                    for (int j = 0; j < TILE; j++) d[j] = unpack(ckY[j * 32 + lane]);
                    if (p.z != 0) {
#pragma unroll
                        for (int j = 0; j < TILE; j++) {
                            const float2 g = unpack(ckZ[j * 32 + lane]);
                            const float s0 = sigmoid(g.x), s1 = sigmoid(g.y), g0 = g.x * s0, g1 = g.y * s1;
                            sumY[j].x *= d[j].x * (s0 + g0 * (1.f - s0));
                            sumY[j].y *= d[j].y * (s1 + g1 * (1.f - s1));
                            d[j].x *= g0;
                            d[j].y *= g1;
                        }
                        __syncwarp();
                        give(p, p.dz, out, i, sumY, ckZ, now, whole, q);
                    }
#pragma unroll
                    for (int k = 0; k < 4; k++)
                        keep[(k + 4) * 32] = make_float4(d[2 * k].x, d[2 * k].y, d[2 * k + 1].x, d[2 * k + 1].y);
                }
            }
            // Back through the segment, reading one tile ahead.
            __syncthreads();
            live = live_at(p, q, begin, left + last * TILE, size, plain);
            bring(inU + (last & 1) * TILE * 32, u, left + last * TILE, live, plain && live == ALL, q);
#pragma unroll
            for (int k = 0; k < 8; k++) copy16(inT + k * 32, steps + last * 256 + k * 32);
            for (int n = 0; n < STATES; n++) copy8(&hs[n * 32], marks + (last * STATES + n) * 32);
            fetch_rows<BSTAGE>(next, p, rowsB, rowsC, mask, begin + left + (stages - 1) * BSTAGE);
#pragma unroll 1
            for (int s = stages - 1; s >= 0; s--) {
                __syncthreads();
                put_rows<BSTAGE, BROW>(tileB, tileC, next);
                __syncthreads();
                if (s > 0) fetch_rows<BSTAGE>(next, p, rowsB, rowsC, mask, begin + left + (s - 1) * BSTAGE);
#pragma unroll 1
                for (int w = BTILES - 1; w >= 0; w--) {
                    const int tile = s * BTILES + w, t0 = w * TILE, i = left + tile * TILE;
                    if (tile > last) {
                        for (int n = 0; n < STATES; n++)
                            if (lane < 2 * TILE) mine[n * SUM_ROW + (lane < TILE ? t0 + lane : BSTAGE + t0 + lane - TILE)] = 0.f;
                        continue;
                    }
                    const u32 now = live;
                    const bool whole = plain && now == ALL;
                    pair* nowU = inU + (tile & 1) * TILE * 32;
                    float2 dt[TILE], v[TILE], dout[TILE], sumB[TILE], sumA[TILE];
                    copies_done();
                    __syncwarp();
#pragma unroll
                    for (int k = 0; k < 4; k++) {
                        const float4 a = inT[k * 32], b = inT[(k + 4) * 32];
                        dt[2 * k] = make_float2(a.x, a.y);
                        dt[2 * k + 1] = make_float2(a.z, a.w);
                        dout[2 * k] = make_float2(b.x, b.y);
                        dout[2 * k + 1] = make_float2(b.z, b.w);
                    }
#pragma unroll
                    for (int j = 0; j < TILE; j++) {
                        const float2 x = unpack(nowU[j * 32 + lane]);
                        v[j] = make_float2(dt[j].x * x.x, dt[j].y * x.y);
                        sumB[j] = none;
                        sumA[j] = none;
                    }
                    settle(dt);
                    settle(v);
                    settle(dout);
                    bring(inD, delta, i, now, whole, q);
                    copies_begun();
                    const float2* coming = marks + (tile > 0 ? tile - 1 : 0) * STATES * 32;
                    if (tile > 0) {
                        live = live_at(p, q, begin, i - TILE, size, plain);
                        bring(inU + (~tile & 1) * TILE * 32, u, i - TILE, live, plain && live == ALL, q);
                        const float4* keep = steps + (tile - 1) * 256;
#pragma unroll
                        for (int k = 0; k < 8; k++) copy16(inT + k * 32, keep + k * 32);
                    }
                    copies_begun();
#if BF16
                    float4* slot_of = hs;  // of the state in turn; the adjoint's is PLANE floats further
                    const float* row_of = tileB + t0;
                    float* sum_of = mine + lane / 8 * SUM_ROW + (lane % 8 >= 4 ? BSTAGE : 0) + t0 + lane % 4 * 2;
#pragma unroll 1
                    for (int first = 0; first < STATES; first += 4) {
                        float4* sums_of = (float4*)fold + lane;
#pragma unroll BACKWARD_UNROLL
                        for (int m = 0; m < (STATES % 4 == 0 || first + 4 <= STATES ? 4 : STATES % 4); m++) {
                            const float4 ha = slot_of[0], ad = slot_of[PLANE / 4];
                            float2 h = make_float2(ha.x, ha.y), ag = make_float2(ad.x, ad.y), da = make_float2(ad.z, ad.w);
                            float b[TILE], c[TILE], acc[4] = {0.f, 0.f, 0.f, 0.f}, part[4];
                            float2 e[TILE], kept[TILE];
                            read_row<BROW>(b, row_of, 0, 0);
                            read_row<BROW>(c, row_of + STATES * BROW, 0, 0);
#pragma unroll
                            for (int j = 0; j < TILE; j++) {
                                e[j].x = exp2_fast(ha.z * dt[j].x);
                                e[j].y = exp2_fast(ha.w * dt[j].y);
                                kept[j].x = e[j].x * h.x;
                                kept[j].y = e[j].y * h.y;
                                h.x = kept[j].x + v[j].x * b[j];
                                h.y = kept[j].y + v[j].y * b[j];
                                part[j % 4] = dout[j].x * h.x + dout[j].y * h.y;
                                if (j % 4 == 3) sum_four(acc, part, pick[j / 4]);
                            }
                            copy8(slot_of, coming);
#pragma unroll
                            for (int j = TILE - 1; j >= 0; j--) {
                                const float2 d = make_float2(ag.x + c[j] * dout[j].x, ag.y + c[j] * dout[j].y);  // dL/dh_t
                                sumB[j].x += d.x * b[j];
                                sumB[j].y += d.y * b[j];
                                const float2 r = make_float2(d.x * kept[j].x, d.y * kept[j].y);
                                sumA[j].x += ha.z * r.x;
                                sumA[j].y += ha.w * r.y;
                                da.x += dt[j].x * r.x;
                                da.y += dt[j].y * r.y;
                                part[j % 4] = d.x * v[j].x + d.y * v[j].y;
                                if (j % 4 == 0) sum_four(acc, part, pick[2 + j / 4]);
                                ag.x = e[j].x * d.x;
                                ag.y = e[j].y * d.y;
                            }
                            *sums_of = make_float4(acc[0], acc[1], acc[2], acc[3]);
                            slot_of[PLANE / 4] = make_float4(ag.x, ag.y, da.x, da.y);
                            slot_of += 32;
                            row_of += BROW;
                            coming += 32;
                            sums_of += FOLD_ROW;
                        }
                        __syncwarp();
                        const float2 total = fold_states(fold, lane);
                        if (STATES % 4 == 0 || first + lane / 8 < STATES) *(float2*)sum_of = total;
                        sum_of += 4 * SUM_ROW;
                        __syncwarp();
                    }
#else
                    float* column = mine + (lane >= 16 ? BSTAGE : 0) + t0 + lane / 2 % TILE;
#pragma unroll 1
                    for (int n = 0; n < STATES; n++) {
                        const float4 ha = hs[n * 32], ad = adj[n * 32];
                        float2 h = make_float2(ha.x, ha.y), ag = make_float2(ad.x, ad.y), da = none;
                        float b[TILE], c[TILE], part[TILE];
                        float2 e[TILE], kept[TILE];
                        read_row<BROW>(b, tileB, n, t0);
                        read_row<BROW>(c, tileC, n, t0);
                        float* round = fold + n % 2 * FOLD;
                        __syncwarp();
                        // The sums of the state before: their exchanges hide behind this state's work.
                        if (n > 0) {
                            const float total = fold_read(fold + (n + 1) % 2 * FOLD, lane);
                            if (lane % 2 == 0) column[(n - 1) * SUM_ROW] = total;
                        }
#pragma unroll
                        for (int j = 0; j < TILE; j++) {
                            e[j].x = exp2_fast(ha.z * dt[j].x);
                            e[j].y = exp2_fast(ha.w * dt[j].y);
                            kept[j].x = e[j].x * h.x;
                            kept[j].y = e[j].y * h.y;
                            h.x = kept[j].x + v[j].x * b[j];
                            h.y = kept[j].y + v[j].y * b[j];
                            part[j] = dout[j].x * h.x + dout[j].y * h.y;
                        }
                        copy8(&hs[n * 32], coming + n * 32);
                        fold_write(round, 0, part, lane);
#pragma unroll
                        for (int j = TILE - 1; j >= 0; j--) {
                            const float2 d = make_float2(ag.x + c[j] * dout[j].x, ag.y + c[j] * dout[j].y);  // dL/dh_t
                            sumB[j].x += d.x * b[j];
                            sumB[j].y += d.y * b[j];
                            const float2 r = make_float2(d.x * kept[j].x, d.y * kept[j].y);
                            sumA[j].x += ha.z * r.x;
                            sumA[j].y += ha.w * r.y;
                            da.x += dt[j].x * r.x;
                            da.y += dt[j].y * r.y;
                            part[j] = d.x * v[j].x + d.y * v[j].y;
                            ag.x = e[j].x * d.x;
                            ag.y = e[j].y * d.y;
                        }
                        adj[n * 32] = make_float4(ag.x, ag.y, ad.z + da.x, ad.w + da.y);
                        fold_write(round, 2, part, lane);
                    }
                    __syncwarp();
                    const float total = fold_read(fold + (STATES - 1) % 2 * FOLD, lane);
                    if (lane % 2 == 0) column[(STATES - 1) * SUM_ROW] = total;
#endif
                    copies_but_one();  // delta is there; what belongs to the next tile need not be
                    __syncwarp();
                    float2 r[TILE];
#pragma unroll
                    for (int j = 0; j < TILE; j++) {
                        const float2 x = unpack(nowU[j * 32 + lane]);
                        r[j].x = skip.x * dout[j].x + dt[j].x * sumB[j].x;
                        r[j].y = skip.y * dout[j].y + dt[j].y * sumB[j].y;
                        dD.x += dout[j].x * x.x;
                        dD.y += dout[j].y * x.y;
                        sumA[j].x = LN2 * sumA[j].x + x.x * sumB[j].x;
                        sumA[j].y = LN2 * sumA[j].y + x.y * sumB[j].y;
                    }
                    if (p.softplus) {
#pragma unroll
                        for (int j = 0; j < TILE; j++) {
                            const float2 x = unpack(inD[j * 32 + lane]);
                            sumA[j].x *= sigmoid(x.x + bias.x);
                            sumA[j].y *= sigmoid(x.y + bias.y);
                        }
                    }
                    if (!whole) {
#pragma unroll
                        for (int j = 0; j < TILE; j++)
                            if (!((now >> j) & 1u)) sumA[j] = none;
                    }
#pragma unroll
                    for (int j = 0; j < TILE; j++) {
                        dbias.x += sumA[j].x;
                        dbias.y += sumA[j].y;
                    }
                    __syncwarp();
                    give(p, p.du, out, i, r, nowU, now, whole, q);
                    give(p, p.ddelta, out, i, sumA, inD, now, whole, q);
                    __syncwarp();
                }
                __syncthreads();
                for (int e = threadIdx.x; e < BSTAGE * STATES; e += THREADS) {
                    const int n = e % STATES, t = e / STATES, i = left + s * BSTAGE + t;
                    float sumC = 0.f, sumB = 0.f;
                    const float* from = channel_sums + n * SUM_ROW + t;
#pragma unroll
                    for (int w = 0; w < WARPS; w++) sumC += from[w * WARP_FLOATS], sumB += from[w * WARP_FLOATS + BSTAGE];
                    sumC *= TRUNCATED;
                    sumB *= TRUNCATED;
                    if (i < right) {
                        const i64 at = first_row + (p.reverse ? -i : i);
                        if (p.channel_blocks == 1) {
                            ((elem*)p.dC)[at * p.all_states + n] = from_float(sumC);
                            ((elem*)p.dB)[at * p.all_states + n] = from_float(sumB);
                        } else {
                            ((float*)p.dC)[at * STATES + n] = sumC;
                            ((float*)p.dB)[at * STATES + n] = sumB;
                        }
                    }
                }
            }
            copies_done();  // what was fetched for a tile that does not exist must not arrive in the next segment
        }
        float* rows = p.partial + (q.b * p.chunks + q.k) * (STATES + 2) * p.channels;
        for (int n = 0; n < STATES; n++) write2(rows + n * p.channels, q, make_float2(adj[n * 32].z, adj[n * 32].w));
        write2(rows + STATES * p.channels, q, dD);
        write2(rows + (STATES + 1) * p.channels, q, dbias);
        if (p.dinitial != 0 && q.k == 0)
            for (int n = 0; n < STATES; n++) write_state(p, q, p.dinitial, q.b, n, make_float2(adj[n * 32].x, adj[n * 32].y));
        __syncthreads();
    }
}
#endif
#endif

// What is left to add up. 256 threads. The first (STATES + 2) channels / 32 blocks: dA, dD, dbias over chunks, 32 columns and 8
// shares of the chunks, then the 8 shares in order. The others: dB and dC over channel blocks.
KERNEL scan_reduce(const Params p) {
    SHARED_FLOATS(shared);
    const i64 width = (STATES + 2) * p.channels, columns = (width + 31) / 32;
    if (blockIdx.x >= columns) {
        const i64 size = p.batch * p.length * STATES, workers = (gridDim.x - columns) * (i64)blockDim.x;
        for (i64 e = (blockIdx.x - columns) * (i64)blockDim.x + threadIdx.x; e < size; e += workers) {
            const float *atB = (const float*)p.dB + e, *atC = (const float*)p.dC + e;
            float b = 0.f, c = 0.f;
#pragma unroll 4
            for (i64 k = 0; k < p.channel_blocks; k++) b += __ldg(atB + k * size), c += __ldg(atC + k * size);
            const i64 at = e / STATES * p.all_states + e % STATES;
            p.into_B[at] = from_float(b);
            p.into_C[at] = from_float(c);
        }
        return;
    }
    const i64 column = (i64)blockIdx.x * 32 + threadIdx.x % 32;
    const int share = threadIdx.x / 32;
    float total = 0.f;
    if (column < width) {
#pragma unroll 8
        for (i64 r = share; r < p.batch * p.chunks; r += 8) total += __ldg(p.partial + r * width + column);
    }
    shared[threadIdx.x] = total;
    __syncthreads();
    if (share != 0 || column >= width) return;
    for (int s = 1; s < 8; s++) total += shared[s * 32 + threadIdx.x];
    give_parameter(p, column, total);
}
