// The selective scan of sequences too short, or too few, to fill a GPU chunk by chunk (scan.cu): one launch forward,
//     short_forward
// and two backward:
//     short_backward  the gradients; those of B and C block by block, those of A, D and the bias row by row of the batch
//     short_reduce    the sums of these, in a fixed order
// *_pair: the same of two scans of one shape at once, the two directions of a bidirectional block, each with parameters of its own.
//
// Time runs over lanes. A thread owns TILE neighbouring steps of two neighbouring channels (a pair). In a warp ACROSS lanes
// own neighbouring pairs, and 32 / ACROSS lanes follow each other in time (SPAN steps); a block has DOWN such warps side by side
// in channels and TIMES in time, and goes through the sequence in rounds of TIMES spans. For each state in turn a thread runs over its steps from 0, the threads of a warp combine what their steps do to a
// state by exchanges, the warps through shared memory, and the thread runs again from the state that really enters. Backward
// the rounds go from right to left, and the same is done for the gradients dL/dh, from the right; the states that enter a span
// were kept by the forward pass.
//
// Set from outside: ACROSS, DOWN, TIMES, BOTH (1: the kernels for two scans), and what scan.cuh wants.

#include "selective_scan/scan.cuh"

#ifndef BOTH
#define BOTH 0
#endif
#define SPAN (32 / ACROSS * TILE)
#define PAIRS (ACROSS * DOWN)
#define WARPS (DOWN * TIMES)
#define THREADS (WARPS * 32)
#ifndef ABREAST
#define ABREAST 2  // states at a time, short_forward
#endif
#ifndef RESIDENT
#define RESIDENT 8  // of short_forward: warps a multiprocessor, which sets the registers a thread may have
#endif
#ifndef SEQLAB_EMULATED
DEVICE float lane_up(float v, int by) { return __shfl_up_sync(FULL, v, by); }    // of the lane `by` below; the first keep theirs
DEVICE float lane_down(float v, int by) { return __shfl_down_sync(FULL, v, by); }
DEVICE float lane_from(float v, int lane) { return __shfl_sync(FULL, v, lane); }
#endif

#if BOTH
struct Pair {
    Params of[2];
};
#endif

struct Place : Channels {
    i64 b, block;                        // block: of channels
    int lane, step, across, down, time;  // step: of the lanes that follow each other, across: of the neighbouring ones
};
DEVICE Place place(const Params& p, i64 block) {
    Place q;
    const int warp = threadIdx.x / 32;
    q.lane = threadIdx.x % 32;
    q.step = q.lane / ACROSS;
    q.across = q.lane % ACROSS;
    q.down = warp % DOWN;
    q.time = warp / DOWN;
    q.b = block / p.channel_blocks;
    q.block = block % p.channel_blocks;
    own_channels(q, p, q.block * (2 * PAIRS) + 2 * (q.down * ACROSS + q.across));
    return q;
}
// Zeros where nothing lives.
DEVICE void load_tile(pair (&v)[TILE], const Params& p, const elem* base, i64 stride_b, i64 stride_t, i64 i0, u32 live, const Place& q) {
    const elem* at = base + q.b * stride_b + q.cc + position(p, i0) * stride_t;
    const i64 step = p.reverse ? -stride_t : stride_t;
#pragma unroll
    for (int j = 0; j < TILE; j++) {
        v[j] = make_pair((elem)0, (elem)0);
        if (((live >> j) & 1u) && q.ok0) v[j] = load_pair(at + j * step, q.second);
        if (!PAIRED && !q.ok1) v[j] = make_pair(pair_first(v[j]), (elem)0);
    }
}
DEVICE void store_tile(elem* base, const Params& p, i64 i0, const float2 (&v)[TILE], u32 live, const Place& q) {
    elem* at = base + (q.b * p.length + position(p, i0)) * p.channels + q.c;
    const i64 step = p.reverse ? -p.channels : p.channels;
#pragma unroll
    for (int j = 0; j < TILE; j++)
        if ((live >> j) & 1u) store_pair(at + j * step, v[j], q.ok0, q.ok1);
}

// B and C of a round in shared memory, transposed: (span, B or C, state, SPAN), a thread's TILE steps in 16-byte pieces that
// the lanes that follow each other have side by side. Zeros at dead steps.
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
DEVICE void read_steps(float (&v)[TILE], const elem* row, int step) {
#if BF16
    const uint4 f = *(const uint4*)(row + TILE * step);
    v[0] = bf16_low(f.x), v[1] = bf16_high(f.x), v[2] = bf16_low(f.y), v[3] = bf16_high(f.y);
    v[4] = bf16_low(f.z), v[5] = bf16_high(f.z), v[6] = bf16_low(f.w), v[7] = bf16_high(f.w);
#else
    const float4 f = *(const float4*)(row + 4 * step), g = *(const float4*)(row + SPAN / 2 + 4 * step);
    v[0] = f.x, v[1] = f.y, v[2] = f.z, v[3] = f.w, v[4] = g.x, v[5] = g.y, v[6] = g.z, v[7] = g.w;
#endif
}

// What steps do to a state: it is multiplied by d and gets h. Two channels.
struct Effect {
    float2 d, h;
};
DEVICE float2 after(const Effect& e, float2 h) { return make_float2(decayed(e.d.x, h.x) + e.h.x, decayed(e.d.y, h.y) + e.h.y); }
// The effect of the lane `by` steps before, on the left or for what comes from the RIGHT on the right.
template <bool RIGHT> DEVICE Effect lane_before(const Effect& e, int by) {
    by *= ACROSS;
    if (RIGHT)
        return {make_float2(lane_down(e.d.x, by), lane_down(e.d.y, by)), make_float2(lane_down(e.h.x, by), lane_down(e.h.y, by))};
    return {make_float2(lane_up(e.d.x, by), lane_up(e.d.y, by)), make_float2(lane_up(e.h.x, by), lane_up(e.h.y, by))};
}
// One of the rounds after which an effect is that of this lane's steps and of all before them.
#define STEPS (32 / ACROSS)
template <bool RIGHT> DEVICE void combine_lanes(Effect& e, int by, const Place& q) {
    const Effect before = lane_before<RIGHT>(e, by);
    if (RIGHT ? q.step + by < STEPS : q.step >= by) {
        e.h = after(e, before.h);
        e.d = make_float2(e.d.x * before.d.x, e.d.y * before.d.y);
    }
}
// What enters a lane's steps, given the combined effects and what enters the warp's.
template <bool RIGHT> DEVICE float2 entering_lane(const Effect& e, float2 h, const Place& q) {
    const Effect before = lane_before<RIGHT>(e, 1);
    return q.step == (RIGHT ? STEPS - 1 : 0) ? h : after(before, h);
}
// From what enters the block's steps what enters this warp's (returned) and what leaves the block's: leave_total, a barrier,
// entering_warp. `totals`: (TIMES, PAIRS), two of them used in turn, so that one barrier is enough: what is overwritten next
// was read before the previous one.
template <bool RIGHT> DEVICE void leave_total(const Effect& e, Effect* totals, const Place& q) {
    if (TIMES > 1 && q.step == (RIGHT ? 0 : STEPS - 1)) totals[q.time * PAIRS + q.down * ACROSS + q.across] = e;
}
DEVICE void totals_left() {
    if (TIMES > 1) __syncthreads();
    else __syncwarp();  // all lanes have read their state, which one of them writes next
}
template <bool RIGHT> DEVICE float2 entering_warp(const Effect& e, float2 h, float2& out, const Effect* totals, const Place& q) {
#if TIMES > 1
    const Effect* mine = totals + q.down * ACROSS + q.across;
    float2 all = h;
#pragma unroll
    for (int k = 0; k < TIMES; k++) {
        const int w = RIGHT ? TIMES - 1 - k : k;
        if (w == q.time) h = all;
        all = after(mine[w * PAIRS], all);
    }
    out = all;
#else
    const int from = (RIGHT ? 0 : STEPS - 1) * ACROSS + q.across;
    const Effect all = {make_float2(lane_from(e.d.x, from), lane_from(e.d.y, from)),
                        make_float2(lane_from(e.h.x, from), lane_from(e.h.y, from))};
    out = after(all, h);
#endif
    return h;
}

// What a warp keeps of every state and pair, (STATES, ACROSS): log2(e) A and what enters the round, at first `from` (b d n) or 0.
DEVICE void first_states(float4* state, const Params& p, const float* from, const Place& q) {
    for (int n = q.step; n < STATES; n += STEPS) {
        const float2 a = coefficients(p, q, n), h = from != 0 ? read_state(p, q, from, q.b, n) : make_float2(0.f, 0.f);
        state[n * ACROSS + q.across] = make_float4(a.x, a.y, h.x, h.y);
    }
}
DEVICE void last_states(const float4* state, const Params& p, float* to, const Place& q) {
    if (to == 0 || q.time != 0) return;
    for (int n = q.step; n < STATES; n += STEPS) {
        const float4 s = state[n * ACROSS + q.across];
        write_state(p, q, to, q.b, n, make_float2(s.z, s.w));
    }
}

DEVICE void forward(const Params& p, i64 block) {
    SHARED_FLOATS(shared);
    elem* tile = (elem*)shared;                                                  // (TIMES, 2, STATES, SPAN)
    float4* states = (float4*)(tile + TIMES * 2 * STATES * SPAN);                // (WARPS, STATES, ACROSS)
    Effect* totals = (Effect*)(states + WARPS * STATES * ACROSS);                // (2, ABREAST, TIMES, PAIRS)
    const Place q = place(p, block);
    float4* state = states + threadIdx.x / 32 * STATES * ACROSS;
    const float2 none = make_float2(0.f, 0.f);
    const float2 bias = read_vector(p.bias, q), skip = read_vector(p.D, q);
    first_states(state, p, p.initial, q);
    for (i64 begin = 0; begin < p.length; begin += TIMES * SPAN) {
        const i64 i0 = begin + q.time * SPAN + q.step * TILE;
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
#pragma unroll 1
        for (int first = 0; first < STATES; first += ABREAST) {
            float4 s[ABREAST];
            float2 h[ABREAST], e[ABREAST][TILE], x[ABREAST][TILE];
            Effect effect[ABREAST], *left = totals + first / ABREAST % 2 * ABREAST * TIMES * PAIRS;
#pragma unroll
            for (int m = 0; m < ABREAST; m++) {
                const int n = first + m < STATES ? first + m : STATES - 1;
                float b[TILE];
                s[m] = state[n * ACROSS + q.across];
                h[m] = none;
                read_steps(b, tile + ROW(q.time, 0, n), q.step);
#pragma unroll
                for (int j = 0; j < TILE; j++) {
                    e[m][j] = make_float2(exp2_fast(s[m].x * dt[j].x), exp2_fast(s[m].y * dt[j].y));
                    x[m][j] = make_float2(v[j].x * b[j], v[j].y * b[j]);
                    h[m].x = e[m][j].x * h[m].x + x[m][j].x;
                    h[m].y = e[m][j].y * h[m].y + x[m][j].y;
                }
                effect[m] = {make_float2(exp2_fast(s[m].x * total.x), exp2_fast(s[m].y * total.y)), h[m]};
            }
#pragma unroll
            for (int by = 1; by < STEPS; by *= 2)
#pragma unroll
                for (int m = 0; m < ABREAST; m++) combine_lanes<false>(effect[m], by, q);
#pragma unroll
            for (int m = 0; m < ABREAST; m++) leave_total<false>(effect[m], left + m * TIMES * PAIRS, q);
            totals_left();
#pragma unroll
            for (int m = 0; m < ABREAST; m++) {
                const int n = first + m;
                float2 leaves;
                h[m] = entering_warp<false>(effect[m], make_float2(s[m].z, s[m].w), leaves, left + m * TIMES * PAIRS, q);
                h[m] = entering_lane<false>(effect[m], h[m], q);
                if (n >= STATES) continue;
                if (keeps) write2(out + n * p.channels, q, h[m]);
                if (q.step == 0) *(float2*)&state[n * ACROSS + q.across].z = leaves;
                float c[TILE];
                read_steps(c, tile + ROW(q.time, 1, n), q.step);
#pragma unroll
                for (int j = 0; j < TILE; j++) {
                    h[m].x = e[m][j].x * h[m].x + x[m][j].x;
                    h[m].y = e[m][j].y * h[m].y + x[m][j].y;
                    sum[j].x += c[j] * h[m].x;
                    sum[j].y += c[j] * h[m].y;
                }
            }
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
    last_states(state, p, p.final, q);
}
#if BOTH
KERNEL BOUNDS(THREADS, RESIDENT / WARPS) short_forward_pair(const Pair p) { forward(p.of[blockIdx.x % 2], blockIdx.x / 2); }
#else
KERNEL BOUNDS(THREADS, RESIDENT / WARPS) short_forward(const Params p) { forward(p, blockIdx.x); }
#endif

// ----------------------------------------------------------------------------------------------------- gradients
// What a thread has of dC and dB of one state, two times TILE steps: over the block's pairs of channels and out. `sums`:
// (2, TIMES, PAIRS, SUMS), used in turn; a row holds C or B, first or second half of the tile, 32 / ACROSS lanes, 4 steps.
#define SUMS (2 * SPAN + 8)  // with padding for the banks
DEVICE float* sums_of(float* sums, int turn, int pair, const Place& q) { return sums + ((turn % 2 * TIMES + q.time) * PAIRS + pair) * SUMS; }
DEVICE void give_sums(float* sums, int turn, const float (&dC)[TILE], const float (&dB)[TILE], const Place& q) {
    float* to = sums_of(sums, turn, q.down * ACROSS + q.across, q) + 4 * q.step;
    *(float4*)to = make_float4(dC[0], dC[1], dC[2], dC[3]);
    *(float4*)(to + SPAN / 2) = make_float4(dC[4], dC[5], dC[6], dC[7]);
    *(float4*)(to + SPAN) = make_float4(dB[0], dB[1], dB[2], dB[3]);
    *(float4*)(to + SPAN + SPAN / 2) = make_float4(dB[4], dB[5], dB[6], dB[7]);
}
DEVICE void take_sums(float* sums, int turn, const Params& p, int n, i64 span, const Place& q) {
    const i64 row = q.block * p.batch + q.b;
    for (int e = q.down * 32 + q.lane; e < 2 * SPAN; e += 32 * DOWN) {
        float total = 0.f;
#pragma unroll
        for (int k = 0; k < PAIRS; k++) total += sums_of(sums, turn, k, q)[e];
        const int which = e / SPAN, half = e % SPAN / (SPAN / 2), t = e % (SPAN / 2) / 4 * TILE + half * 4 + e % 4;
        if (span + t < p.length) p.blocks[((row * 2 + which) * STATES + n) * p.length + span + t] = total;
    }
}

DEVICE void backward(const Params& p, i64 block) {
    SHARED_FLOATS(shared);
    elem* tile = (elem*)shared;                                    // (TIMES, 2, STATES, SPAN)
    float4* states = (float4*)(tile + TIMES * 2 * STATES * SPAN);  // (WARPS, STATES, ACROSS), of dL/dh
    Effect* totals = (Effect*)(states + WARPS * STATES * ACROSS);  // (2, TIMES, PAIRS)
    float* sums = (float*)(totals + 2 * TIMES * PAIRS);
    float2* gathered = (float2*)(sums + 2 * TIMES * PAIRS * SUMS);  // (WARPS, STATES, 32): dA of a lane's steps
    float2* starts = gathered + WARPS * STATES * 32;  // (WARPS, STATES, ACROSS): state entering the warp's steps
    const Place q = place(p, block);
    const int warp = threadIdx.x / 32;
    float4* state = states + warp * STATES * ACROSS;
    float2 *mine = gathered + warp * STATES * 32 + q.lane, *start = starts + warp * STATES * ACROSS + q.across;
    const float2 none = make_float2(0.f, 0.f);
    const float2 bias = read_vector(p.bias, q), skip = read_vector(p.D, q);
    float2 dD = none, dbias = none;
    first_states(state, p, p.dfinal, q);
    for (int n = 0; n < STATES; n++) mine[n * 32] = none;
    for (i64 begin = (p.length - 1) / (TIMES * SPAN) * (TIMES * SPAN); begin >= 0; begin -= TIMES * SPAN) {
        const i64 span = begin + q.time * SPAN, i0 = span + q.step * TILE;
        const u32 live = live_steps(p, q.b, i0);
        float2 dt[TILE], v[TILE], dout[TILE], sumY[TILE], sumA[TILE], sumB[TILE], total = none;
        pair delta[TILE], u[TILE], z[TILE], dy[TILE];
        load_tile(delta, p, p.delta, p.delta_b, p.delta_t, i0, live, q);
        load_tile(u, p, p.u, p.u_b, p.u_t, i0, live, q);
        load_tile(dy, p, p.dy, p.dy_b, p.dy_t, i0, live, q);
        if (p.z != 0) load_tile(z, p, p.z, p.z_b, p.z_t, i0, live, q);
        __syncthreads();
        const float* kept = p.segments + (q.b * p.all_segments + (span < p.length ? span / p.segment : 0)) * p.all_states * p.channels;
        for (int n = q.step; n < STATES; n += STEPS) start[n * ACROSS] = read2(kept + n * p.channels, q);
        stage_rows(tile, p, q.b, begin);
        step_sizes(dt, delta, bias, p.softplus, live);
#pragma unroll
        for (int j = 0; j < TILE; j++) {
            const float2 x = unpack(u[j]);
            dout[j] = unpack(dy[j]);
            if (p.z != 0) {
                const float2 g = unpack(z[j]);
                dout[j].x *= g.x * sigmoid(g.x);
                dout[j].y *= g.y * sigmoid(g.y);
            }
            sumY[j] = make_float2(skip.x * x.x, skip.y * x.y);
            sumA[j] = none;
            sumB[j] = none;
            v[j] = make_float2(dt[j].x * x.x, dt[j].y * x.y);
            total.x += dt[j].x, total.y += dt[j].y;
        }
        __syncthreads();
#pragma unroll 1
        for (int n = 0; n < STATES; n++) {
            const float4 s = state[n * ACROSS + q.across];
            float2 h = none, r = none, e[TILE], leaves;
            float b[TILE], c[TILE], part[TILE], part_too[TILE];
            read_steps(b, tile + ROW(q.time, 0, n), q.step);
            read_steps(c, tile + ROW(q.time, 1, n), q.step);
#pragma unroll
            for (int j = 0; j < TILE; j++) {
                e[j] = make_float2(exp2_fast(s.x * dt[j].x), exp2_fast(s.y * dt[j].y));
                h.x = e[j].x * h.x + v[j].x * b[j];
                h.y = e[j].y * h.y + v[j].y * b[j];
            }
#pragma unroll
            for (int j = TILE - 1; j >= 0; j--) {
                r.x = e[j].x * (r.x + c[j] * dout[j].x);
                r.y = e[j].y * (r.y + c[j] * dout[j].y);
            }
            const float2 d = make_float2(exp2_fast(s.x * total.x), exp2_fast(s.y * total.y));
            Effect forth = {d, h}, back = {d, r};
#pragma unroll
            for (int by = 1; by < STEPS; by *= 2) {
                combine_lanes<false>(forth, by, q);
                combine_lanes<true>(back, by, q);
            }
            Effect* left = totals + n % 2 * TIMES * PAIRS;
            leave_total<true>(back, left, q);
            totals_left();
            r = entering_warp<true>(back, make_float2(s.z, s.w), leaves, left, q);
#if TIMES == 1
            if (DOWN > 1) __syncthreads();
            else __syncwarp();
#endif
            if (n > 0) take_sums(sums, n - 1, p, n - 1, span, q);
            h = entering_lane<false>(forth, start[n * ACROSS], q);
            r = entering_lane<true>(back, r, q);
            float2 passed[TILE];
#pragma unroll
            for (int j = 0; j < TILE; j++) {
                passed[j] = make_float2(e[j].x * h.x, e[j].y * h.y);
                h.x = passed[j].x + v[j].x * b[j];
                h.y = passed[j].y + v[j].y * b[j];
                sumY[j].x += c[j] * h.x;
                sumY[j].y += c[j] * h.y;
                part[j] = dout[j].x * h.x + dout[j].y * h.y;
            }
            float2 dA = none;
#pragma unroll
            for (int j = TILE - 1; j >= 0; j--) {
                const float2 g = make_float2(r.x + c[j] * dout[j].x, r.y + c[j] * dout[j].y);  // dL/dh
                const float2 w = make_float2(g.x * passed[j].x, g.y * passed[j].y);
                sumB[j].x += g.x * b[j];
                sumB[j].y += g.y * b[j];
                sumA[j].x += s.x * w.x;
                sumA[j].y += s.y * w.y;
                dA.x += dt[j].x * w.x;
                dA.y += dt[j].y * w.y;
                part_too[j] = g.x * v[j].x + g.y * v[j].y;
                r.x = e[j].x * g.x;
                r.y = e[j].y * g.y;
            }
            mine[n * 32].x += dA.x;
            mine[n * 32].y += dA.y;
            if (q.step == 0) *(float2*)&state[n * ACROSS + q.across].z = leaves;
            give_sums(sums, n, part, part_too, q);
        }
        __syncthreads();
        take_sums(sums, STATES - 1, p, STATES - 1, span, q);
#pragma unroll
        for (int j = 0; j < TILE; j++) {
            const float2 x = unpack(u[j]);
            if (p.z != 0) {
                const float2 g = unpack(z[j]), d = unpack(dy[j]);
                const float s0 = sigmoid(g.x), s1 = sigmoid(g.y);
                sumY[j].x *= d.x * (s0 + g.x * s0 * (1.f - s0));
                sumY[j].y *= d.y * (s1 + g.y * s1 * (1.f - s1));
            }
            dD.x += dout[j].x * x.x;
            dD.y += dout[j].y * x.y;
            sumA[j].x = LN2 * sumA[j].x + x.x * sumB[j].x;
            sumA[j].y = LN2 * sumA[j].y + x.y * sumB[j].y;
            if (p.softplus) {
                const float2 raw = unpack(delta[j]);
                sumA[j].x *= sigmoid(raw.x + bias.x);
                sumA[j].y *= sigmoid(raw.y + bias.y);
            }
            if (!((live >> j) & 1u)) sumA[j] = none;
            dbias.x += sumA[j].x;
            dbias.y += sumA[j].y;
            sumB[j].x = skip.x * dout[j].x + dt[j].x * sumB[j].x;
            sumB[j].y = skip.y * dout[j].y + dt[j].y * sumB[j].y;
        }
        store_tile(p.du, p, i0, sumB, live, q);
        store_tile(p.ddelta, p, i0, sumA, live, q);
        if (p.z != 0) store_tile(p.dz, p, i0, sumY, live, q);
    }
    __syncthreads();
    last_states(state, p, p.dinitial, q);
    // dA, dD and dbias over lanes, then over the spans side by side.
    float2* over_lanes = (float2*)sums;  // (STATES + 2, TIMES, PAIRS)
    const int pair = q.down * ACROSS + q.across;
    for (int n = 0; n < STATES + 2; n++) {
        float2 t = n < STATES ? mine[n * 32] : n == STATES ? dD : dbias;
#pragma unroll
        for (int by = 16; by >= ACROSS; by /= 2) t = make_float2(t.x + lane_xor(t.x, by), t.y + lane_xor(t.y, by));
        if (q.step == 0) over_lanes[(n * TIMES + q.time) * PAIRS + pair] = t;
    }
    __syncthreads();
    if (q.time == 0)
        for (int n = q.step; n < STATES + 2; n += STEPS) {
            float2 t = none;
            for (int w = 0; w < TIMES; w++) {
                const float2 one = over_lanes[(n * TIMES + w) * PAIRS + pair];
                t = make_float2(t.x + one.x, t.y + one.y);
            }
            write2(p.partial + (q.b * (STATES + 2) + n) * p.channels, q, t);
        }
}
#if BOTH
KERNEL BOUNDS(THREADS, 1) short_backward_pair(const Pair p) { backward(p.of[blockIdx.x % 2], blockIdx.x / 2); }
#else
KERNEL BOUNDS(THREADS, 1) short_backward(const Params p) { backward(p, blockIdx.x); }
#endif

// The sums over blocks of channels, to dC and dB, and over rows of the batch, to dA, dD and dbias: one thread each.
DEVICE void reduce(const Params& p, i64 block) {
    const i64 row = STATES * p.length, size = p.batch * 2 * row, id = block * blockDim.x + threadIdx.x;
    if (id < size) {
        float total = 0.f;
#pragma unroll 8
        for (i64 k = 0; k < p.channel_blocks; k++) total += __ldg(p.blocks + k * size + id);
        const i64 b = id / (2 * row), rest = id % row, at = (b * p.length + position(p, rest % p.length)) * p.all_states + rest / p.length;
        (id / row % 2 ? p.into_B : p.into_C)[at] = from_float(total);
    } else if (id - size < (STATES + 2) * p.channels) {
        const i64 e = id - size;
        float total = 0.f;
#pragma unroll 8
        for (i64 b = 0; b < p.batch; b++) total += __ldg(p.partial + b * (STATES + 2) * p.channels + e);
        give_parameter(p, e, total);
    }
}
#if BOTH
KERNEL short_reduce_pair(const Pair p) { reduce(p.of[blockIdx.x % 2], blockIdx.x / 2); }
#else
KERNEL short_reduce(const Params p) { reduce(p, blockIdx.x); }
#endif
