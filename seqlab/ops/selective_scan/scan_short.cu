// The selective scan of sequences too short, or too few, to fill a GPU chunk by chunk (scan.cu): one launch.
//
// Time runs over lanes. A thread owns TILE neighbouring steps of two neighbouring channels, a warp 32 of those (SPAN steps),
// a block PAIRS pairs of channels and, side by side, TIMES spans of time; it goes through the sequence in rounds of TIMES
// spans. For each state in turn a thread runs over its steps from 0, the threads of a warp combine what their steps do to a
// state by exchanges, the warps through shared memory, and the thread runs again from the state that really enters.
//
// Logical time i runs in scan order; position = i, or length-1-i when reversed.
//
// Set from outside: STATES, PAIRS, TIMES, BF16, PAIRED, WIDE (as in scan.cu).

#ifndef WIDE
#define WIDE 0
#endif
#define TILE 8
#define SPAN (32 * TILE)
#define WARPS (PAIRS * TIMES)
#define THREADS (WARPS * 32)
#if WIDE
#define PER (BF16 ? 8 : 4)  // values of B or C fetched at a time
#else
#define PER 1
#endif
#ifndef UNROLL
#define UNROLL 1
#endif
#ifndef RESIDENT
#define RESIDENT 16  // warps a multiprocessor, which sets the registers a thread may have
#endif
#define ALL ((1u << TILE) - 1u)
#ifndef SEQLAB_EMULATED
DEVICE float lane_up(float v, int by) { return __shfl_up_sync(FULL, v, by); }    // of the lane `by` below; the first keep theirs
DEVICE float lane_last(float v) { return __shfl_sync(FULL, v, 31); }
#endif

struct Params {
    const elem *u, *delta, *B, *C, *z;
    const float *A, *D, *bias, *initial;
    const unsigned char* mask;  // (b l)
    elem* y;                    // (b l d)
    float* final;               // (b d n)
    float* segments;            // (b segment n d), state at a segment's start
    i64 A_c, A_n, u_b, u_t, delta_b, delta_t, B_b, B_t, C_b, C_t, z_b, z_t;
    i64 batch, length, channels, segment, all_segments, channel_blocks, all_states;
    i64 softplus, reverse;
};

struct Place {
    i64 b, c, cc;  // c: first channel, cc: the same inside the array
    int pair, time, lane, second;
    bool ok0, ok1;
};
DEVICE Place place(const Params& p) {
    Place q;
    const int warp = threadIdx.x / 32;
    q.lane = threadIdx.x % 32;
    q.pair = warp % PAIRS;
    q.time = warp / PAIRS;
    q.b = blockIdx.x / p.channel_blocks;
    q.c = blockIdx.x % p.channel_blocks * (2 * PAIRS) + 2 * q.pair;
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
DEVICE i64 position(const Params& p, i64 i) { return p.reverse ? p.length - 1 - i : i; }

// One bit a step of the tile at i0: inside the sequence and not masked.
DEVICE u32 live_steps(const Params& p, i64 b, i64 i0) {
    const i64 left = p.length - i0;
    u32 bits = left >= TILE ? ALL : left <= 0 ? 0u : (1u << (int)left) - 1u;
    if (p.mask != 0) {
        const unsigned char* row = p.mask + b * p.length;
        for (int j = 0; j < TILE; j++)
            if ((bits >> j) & 1u)
                if (!row[position(p, i0 + j)]) bits &= ~(1u << j);
    }
    return bits;
}
DEVICE void load_tile(pair (&v)[TILE], const Params& p, const elem* base, i64 stride_b, i64 stride_t, i64 i0, u32 live, const Place& q) {
    const elem* at = base + q.b * stride_b + q.cc + position(p, i0) * stride_t;
    const i64 step = p.reverse ? -stride_t : stride_t;
#pragma unroll
    for (int j = 0; j < TILE; j++)
        v[j] = (live >> j) & 1u ? load_pair(at + j * step, q.second) : make_pair((elem)0, (elem)0);
}
DEVICE void store_tile(elem* base, const Params& p, i64 i0, const float2 (&v)[TILE], u32 live, const Place& q) {
    elem* at = base + (q.b * p.length + position(p, i0)) * p.channels + q.c;
    const i64 step = p.reverse ? -p.channels : p.channels;
#pragma unroll
    for (int j = 0; j < TILE; j++)
        if ((live >> j) & 1u) store_pair(at + j * step, v[j], q.ok0, q.ok1);
}
DEVICE void step_sizes(float2 (&dt)[TILE], const pair (&raw)[TILE], float2 bias, i64 soft, u32 live) {
#pragma unroll
    for (int j = 0; j < TILE; j++) {
        dt[j] = unpack(raw[j]);
        dt[j].x += bias.x;
        dt[j].y += bias.y;
        if (soft) dt[j] = make_float2(softplus(dt[j].x), softplus(dt[j].y));
        if (!((live >> j) & 1u)) dt[j] = make_float2(0.f, 0.f);
    }
}
DEVICE float2 read2(const float* row, const Place& q) { return make_float2(__ldg(row + q.cc), __ldg(row + q.cc + q.second)); }
DEVICE void write2(float* row, const Place& q, float2 v) {
    if (q.ok0) row[q.c] = v.x;
    if (q.ok1) row[q.c + 1] = v.y;
}

// B and C of a round in shared memory, transposed: (span, B or C, state, SPAN), a thread's TILE steps in 16-byte pieces that
// neighbouring lanes have side by side. Zeros at dead steps.
#define ROW(span, which, n) ((((span) * 2 + (which)) * STATES + (n)) * SPAN)
DEVICE int column(int t) { return BF16 ? t : t % TILE / 4 * (SPAN / 2) + t / TILE * 4 + t % 4; }
DEVICE void stage_rows(elem* tile, const Params& p, i64 b, i64 i0) {
    const elem *rowsB = p.B + b * p.B_b, *rowsC = p.C + b * p.C_b;
    const unsigned char* mask = p.mask == 0 ? p.mask : p.mask + b * p.length;
    for (int e = threadIdx.x; e < TIMES * SPAN * 2 * STATES / PER; e += THREADS) {
        const int t = e % SPAN, rest = e / SPAN, n = rest % (STATES / PER) * PER, which = rest / (STATES / PER) % 2;
        const int span = rest / (STATES / PER) / 2;
        const i64 i = i0 + span * SPAN + t;
        union { uint4 all; elem each[16 / sizeof(elem)]; } v;
        v.all = make_uint4(0u, 0u, 0u, 0u);
        if (i < p.length) {
            const i64 at = position(p, i);
            if (mask == 0 || mask[at]) {
                const elem* from = which ? rowsC + at * p.C_t + n : rowsB + at * p.B_t + n;
#if WIDE
                v.all = __ldg((const uint4*)from);
#else
                v.each[0] = __ldg(from);
#endif
            }
        }
#pragma unroll
        for (int m = 0; m < PER; m++) tile[ROW(span, which, n + m) + column(t)] = v.each[m];
    }
}
DEVICE void read_steps(float (&v)[TILE], const elem* row, int lane) {
#if BF16
    const uint4 f = *(const uint4*)(row + TILE * lane);
    v[0] = bf16_low(f.x), v[1] = bf16_high(f.x), v[2] = bf16_low(f.y), v[3] = bf16_high(f.y);
    v[4] = bf16_low(f.z), v[5] = bf16_high(f.z), v[6] = bf16_low(f.w), v[7] = bf16_high(f.w);
#else
    const float4 f = *(const float4*)(row + 4 * lane), g = *(const float4*)(row + SPAN / 2 + 4 * lane);
    v[0] = f.x, v[1] = f.y, v[2] = f.z, v[3] = f.w, v[4] = g.x, v[5] = g.y, v[6] = g.z, v[7] = g.w;
#endif
}

// What steps do to a state: it is multiplied by d and gets h. Two channels.
struct Effect {
    float2 d, h;
};
// Where the state is 0 it stays 0, also against an infinite growth.
DEVICE float decayed(float d, float h) { return h == 0.f ? 0.f : d * h; }
DEVICE float2 after(const Effect& e, float2 h) { return make_float2(decayed(e.d.x, h.x) + e.h.x, decayed(e.d.y, h.y) + e.h.y); }
// Of this lane's steps and of all before them.
DEVICE void combine_lanes(Effect& e, int lane) {
#pragma unroll
    for (int by = 1; by < 32; by *= 2) {
        Effect before;
        before.d = make_float2(lane_up(e.d.x, by), lane_up(e.d.y, by));
        before.h = make_float2(lane_up(e.h.x, by), lane_up(e.h.y, by));
        if (lane >= by) {
            e.h = after(e, before.h);
            e.d = make_float2(e.d.x * before.d.x, e.d.y * before.d.y);
        }
    }
}
// The state entering a lane's steps, from the effects up to each lane and the state entering the warp's; and the one leaving
// the block's steps. `totals`: (2, WARPS), used in turn.
DEVICE float2 entering(const Effect& e, float2 h, float2& out, Effect* totals, int turn, const Place& q) {
    Effect before;
    before.d = make_float2(lane_up(e.d.x, 1), lane_up(e.d.y, 1));
    before.h = make_float2(lane_up(e.h.x, 1), lane_up(e.h.y, 1));
#if TIMES > 1
    Effect* mine = totals + turn % 2 * WARPS + q.pair;
    if (q.lane == 31) mine[q.time * PAIRS] = e;
    __syncthreads();  // one is enough: what is overwritten next was read before the previous one
    float2 all = h;
#pragma unroll
    for (int w = 0; w < TIMES; w++) {
        if (w == q.time) h = all;
        all = after(mine[w * PAIRS], all);
    }
    out = all;
#else
    const Effect all = {make_float2(lane_last(e.d.x), lane_last(e.d.y)), make_float2(lane_last(e.h.x), lane_last(e.h.y))};
    out = after(all, h);
#endif
    return q.lane == 0 ? h : after(before, h);
}

KERNEL BOUNDS(THREADS, RESIDENT / WARPS) short_forward(const Params p) {
    SHARED_FLOATS(shared);
    elem* tile = (elem*)shared;                                                  // (TIMES, 2, STATES, SPAN)
    float4* states = (float4*)(tile + TIMES * 2 * STATES * SPAN);                // (WARPS, STATES): log2(e) A, state entering the round
    Effect* totals = (Effect*)(states + WARPS * STATES);                         // (2, WARPS)
    const Place q = place(p);
    float4* state = states + threadIdx.x / 32 * STATES;
    const float2 none = make_float2(0.f, 0.f);
    const float2 bias = p.bias != 0 ? read2(p.bias, q) : none, skip = p.D != 0 ? read2(p.D, q) : none;
    for (int n = q.lane; n < STATES; n += 32) {
        const float* a = p.A + q.cc * p.A_c + n * p.A_n;
        float4 s = make_float4(LOG2E * a[0], LOG2E * a[q.second * p.A_c], 0.f, 0.f);
        if (p.initial != 0) {
            const float* at = p.initial + (q.b * p.channels + q.cc) * p.all_states + n;
            s.z = at[0], s.w = at[q.second * p.all_states];
        }
        state[n] = s;
    }
    for (i64 begin = 0; begin < p.length; begin += TIMES * SPAN) {
        const i64 i0 = begin + q.time * SPAN + q.lane * TILE;
        const u32 live = live_steps(p, q.b, i0);
        float2 dt[TILE], v[TILE], sum[TILE], total = none;
        pair delta[TILE], u[TILE], z[TILE];
        load_tile(delta, p, p.delta, p.delta_b, p.delta_t, i0, live, q);
        load_tile(u, p, p.u, p.u_b, p.u_t, i0, live, q);
        if (p.z != 0) load_tile(z, p, p.z, p.z_b, p.z_t, i0, live, q);
        __syncthreads();
        stage_rows(tile, p, q.b, begin);
        step_sizes(dt, delta, bias, p.softplus, live);
#pragma unroll
        for (int j = 0; j < TILE; j++) {
            const float2 x = unpack(u[j]);
            sum[j] = make_float2(skip.x * x.x, skip.y * x.y);
            v[j] = make_float2(dt[j].x * x.x, dt[j].y * x.y);
            total.x += dt[j].x, total.y += dt[j].y;
        }
        __syncthreads();
        const bool keeps = p.segments != 0 && i0 < p.length && i0 % p.segment == 0;
        float* out = p.segments + (q.b * p.all_segments + (keeps ? i0 / p.segment : 0)) * p.all_states * p.channels;
#pragma unroll UNROLL
        for (int n = 0; n < STATES; n++) {
            const float4 s = state[n];
            float2 h = none, e[TILE], x[TILE], leaves;
            float b[TILE];
            read_steps(b, tile + ROW(q.time, 0, n), q.lane);
#pragma unroll
            for (int j = 0; j < TILE; j++) {
                e[j] = make_float2(exp2_fast(s.x * dt[j].x), exp2_fast(s.y * dt[j].y));
                x[j] = make_float2(v[j].x * b[j], v[j].y * b[j]);
                h.x = e[j].x * h.x + x[j].x;
                h.y = e[j].y * h.y + x[j].y;
            }
            Effect effect = {make_float2(exp2_fast(s.x * total.x), exp2_fast(s.y * total.y)), h};
            combine_lanes(effect, q.lane);
            h = entering(effect, make_float2(s.z, s.w), leaves, totals, n, q);
            if (keeps) write2(out + n * p.channels, q, h);
            float c[TILE];
            read_steps(c, tile + ROW(q.time, 1, n), q.lane);
#pragma unroll
            for (int j = 0; j < TILE; j++) {
                h.x = e[j].x * h.x + x[j].x;
                h.y = e[j].y * h.y + x[j].y;
                sum[j].x += c[j] * h.x;
                sum[j].y += c[j] * h.y;
            }
            if (q.lane == 0) *(float2*)&state[n].z = leaves;
        }
        if (p.z != 0) {
#pragma unroll
            for (int j = 0; j < TILE; j++) {
                const float2 g = unpack(z[j]);
                sum[j].x *= g.x * sigmoid(g.x);
                sum[j].y *= g.y * sigmoid(g.y);
            }
        }
        store_tile(p.y, p, i0, sum, live, q);
    }
    __syncthreads();
    if (p.final != 0 && q.time == 0)
        for (int n = q.lane; n < STATES; n += 32) {
            float* at = p.final + (q.b * p.channels + q.c) * p.all_states + n;
            if (q.ok0) at[0] = state[n].z;
            if (q.ok1) at[p.all_states] = state[n].w;
        }
}
