// The selective scan of sequences too short, or too few, to fill a GPU chunk by chunk (scan.cu): one launch forward,
//     short_forward
// and two backward:
//     short_backward  the gradients; those of B and C block by block, those of A, D and the bias row by row of the batch
//     short_reduce    the sums of these, in a fixed order
// *_pair: the same of two scans of one shape at once, the two directions of a bidirectional block, each with parameters of its own.
//
// Time runs over lanes, warps and blocks. A thread owns TILE neighbouring steps of two neighbouring channels (a pair). In a warp ACROSS
// lanes own neighbouring pairs, and 32 / ACROSS lanes follow each other in time (SPAN steps); a block has TIMES warps that follow each
// other, a cluster CLUSTER such blocks, which then cover the sequence; a block that is alone goes through it in rounds of TIMES spans.
// For each state in turn a thread runs over its steps from 0, the threads of a warp combine what their steps do to a state by
// exchanges, the warp waits for the state that the warp before hands on, through shared memory, hands on its own, and its threads run
// again from the state that really enters. Backward the same is done for the gradients dL/dh, from the right; the states that enter a
// span were kept by the forward pass.
//
// Set from outside: FORWARD (1: short_forward alone, 0: the other two), ACROSS, TIMES, CLUSTER, BOTH (1: the kernels for two scans), and
// what scan.cuh wants, TILE going forward only.

#include "selective_scan/scan.cuh"

#ifndef CLUSTER
#define CLUSTER 1
#endif
typedef unsigned long long u64;
#include "cluster.cuh"
#ifndef BOTH
#define BOTH 0
#endif
#define SPAN (32 / ACROSS * TILE)
#define THREADS (TIMES * 32)
#define ABREAST (16 / TILE)  // states at a time, going forward: as much to do while something is waited for
#define RESIDENT 8           // warps a multiprocessor, which sets the registers a thread may have
#ifndef SEQLAB_EMULATED
DEVICE float lane_up(float v, int by) { return __shfl_up_sync(FULL, v, by); }    // of the lane `by` below; the first keep theirs
DEVICE float lane_down(float v, int by) { return __shfl_down_sync(FULL, v, by); }
DEVICE int warp_wide(int v) { return __shfl_sync(FULL, v, 0); }  // the same in all lanes: now the compiler knows
// The compiler is to know nothing of how these came about, and neither make them earlier nor over again.
DEVICE void made(u32& v) { asm volatile("" : "+r"(v)); }
DEVICE void made(float2& v) { asm volatile("" : "+f"(v.x), "+f"(v.y)); }
DEVICE void made(float4& v) { asm volatile("" : "+f"(v.x), "+f"(v.y), "+f"(v.z), "+f"(v.w)); }
#else
DEVICE void made(float2&) {}
DEVICE void made(float4&) {}
DEVICE void made(u32&) {}
DEVICE int warp_wide(int v) { return v; }
#endif
// Barriers of so many arrivals a turn (mbarrier), in shared memory. What only some lanes do has no branch, so that the compiler knows that
// all lanes go on together.
#ifdef SEQLAB_EMULATED
DEVICE void barrier_begin(u64* b, int arrivals) { arrivals_begin(b, 1); }
DEVICE void barriers_begun() {}
DEVICE void arrive_if(u32 does, u64* b) {
    Arrivals* a = (Arrivals*)b;
    if (does && ++a->arrived == ACROSS) a->arrived = 0, a->phase ^= 1;
}
DEVICE void wait_if(u32 does, u64* b, u32 turn) {
    if (does) arrivals_wait(b, turn);
}
#else
DEVICE u32 place_of(const void* shared) { return (u32)__cvta_generic_to_shared(shared); }
DEVICE void barrier_begin(u64* b, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(place_of(b)), "r"(arrivals) : "memory");
}
DEVICE void barriers_begun() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
DEVICE void arrive_if(u32 does, u64* b) {
    asm volatile("{\n.reg .pred does;\n.reg .b64 state;\nsetp.ne.u32 does, %1, 0;\n@does mbarrier.arrive.shared::cta.b64 state, [%0];\n}" ::"r"(place_of(b)),
                 "r"(does) : "memory");
}
DEVICE void wait_if(u32 does, u64* b, u32 turn) {
    u32 done;
    do {
        asm volatile("{\n.reg .pred done, does;\nsetp.eq.u32 done, %3, 0;\nsetp.ne.u32 does, %3, 0;\n@does mbarrier."
#if __CUDA_ARCH__ >= 900
                     "try_wait"
#else
                     "test_wait"
#endif
                     ".parity.shared::cta.b64 done, [%1], %2;\nselp.u32 %0, 1, 0, done;\n}"
                     : "=r"(done) : "r"(place_of(b)), "r"(turn), "r"(does) : "memory");  // to try what nobody answers takes microseconds
    } while (!warp_all(done));
}
#endif

#if BOTH
struct Pair {
    Params of[2];
};
#endif

struct Place : Channels {
    i64 b, block;                        // block: of channels
    int lane, step, across, time, rank;  // step: of the lanes that follow each other, across: of the neighbouring ones
};
DEVICE Place place(const Params& p, i64 block) {
    Place q;
    q.lane = threadIdx.x % 32;
    q.step = q.lane / ACROSS;
    q.across = q.lane % ACROSS;
    q.time = threadIdx.x / 32;
    q.rank = blockIdx.x % CLUSTER;
    q.b = (u32)block / (u32)p.channel_blocks;
    q.block = (u32)block % (u32)p.channel_blocks;
    own_channels(q, p, 2 * (q.block * ACROSS + q.across));
    return q;
}
// Zeros where nothing lives.
DEVICE void load_tile(pair (&v)[TILE], const Params& p, const elem* base, i64 stride_b, i64 stride_t, i64 i0, u32 live, const Place& q) {
    const elem* at = base + q.b * stride_b + q.cc + position(p, i0) * stride_t;
    const i64 step = p.reverse ? -stride_t : stride_t;
    if (!q.ok0) live = 0u;
    if (live == ALL) {
#pragma unroll
        for (int j = 0; j < TILE; j++) v[j] = load_pair(at + j * step, q.second);
    } else {
#pragma unroll
        for (int j = 0; j < TILE; j++) {
            v[j] = make_pair((elem)0, (elem)0);
            if ((live >> j) & 1u) v[j] = load_pair(at + j * step, q.second);
        }
    }
#if !PAIRED
    if (!q.ok1) {
#pragma unroll
        for (int j = 0; j < TILE; j++) v[j] = make_pair(pair_first(v[j]), (elem)0);
    }
#endif
}
DEVICE void store_tile(elem* base, const Params& p, i64 i0, const float2 (&v)[TILE], u32 live, const Place& q) {
    elem* at = base + (q.b * p.length + position(p, i0)) * p.channels + q.c;
    const i64 step = p.reverse ? -p.channels : p.channels;
    if (!q.ok0) return;
    if (live == ALL) {
#pragma unroll
        for (int j = 0; j < TILE; j++) store_pair(at + j * step, v[j], true, q.ok1);
    } else {
#pragma unroll
        for (int j = 0; j < TILE; j++)
            if ((live >> j) & 1u) store_pair(at + j * step, v[j], true, q.ok1);
    }
}

// B and C of a round in shared memory, transposed: (span, B or C, state, SPAN), a thread's TILE steps in 16-byte pieces that
// the lanes that follow each other have side by side. Zeros at dead steps.
#define ROW(span, which, n) ((((span) * 2 + (which)) * STATES + (n)) * SPAN)
#define PIECE (16 / (u32)sizeof(elem))
DEVICE u32 column(u32 t) { return t % TILE / PIECE * (SPAN / TILE * PIECE) + t / TILE * PIECE + t % PIECE; }
// All pieces of a thread are asked for before the first is needed, but for those that more than AHEAD registers would take.
#define STAGED (TIMES * SPAN)
#define PIECES ((STAGED * 2 * STATES / PER + THREADS - 1) / THREADS)
#define AHEAD (PIECES < 8 ? PIECES : 8)
DEVICE void stage_rows(elem* tile, const Params& p, i64 b, i64 i0) {
    const i64 begin = position(p, i0);
    const elem *rowsB = p.B + b * p.B_b + begin * p.B_t, *rowsC = p.C + b * p.C_b + begin * p.C_t;
    const unsigned char* mask = p.mask == 0 ? p.mask : p.mask + b * p.length + begin;
    const int left = p.length <= i0 ? 0 : p.length - i0 < STAGED ? (int)(p.length - i0) : STAGED;  // rows are less than 2^29 apart
    union Piece { uint4 all; elem each[16 / sizeof(elem)]; };
#pragma unroll 1
    for (int first = 0; first < PIECES; first += AHEAD) {
        Piece v[AHEAD];
#pragma unroll
        for (int k = 0; k < AHEAD; k++) {
            const u32 e = threadIdx.x + (first + k) * THREADS, t = e % STAGED, rest = e / STAGED;
            const u32 n = rest % (STATES / PER) * PER, which = rest / (STATES / PER);
            const int at = p.reverse ? -(int)t : (int)t;
            v[k].all = make_uint4(0u, 0u, 0u, 0u);
            if (which < 2 && t < (u32)left) {
                if (mask == 0 || mask[at]) {
                    const elem* from = (which ? rowsC : rowsB) + wide_product(at, (int)(which ? p.C_t : p.B_t)) + n;
#if WIDE
                    v[k].all = __ldg((const uint4*)from);
#else
                    v[k].each[0] = __ldg(from);
#endif
                }
            }
        }
#pragma unroll
        for (int k = 0; k < AHEAD; k++) {
            const u32 e = threadIdx.x + (first + k) * THREADS, t = e % STAGED, rest = e / STAGED;
            const u32 n = rest % (STATES / PER) * PER, which = rest / (STATES / PER);
            elem* to = tile + ROW(t / SPAN, which, n) + column(t % SPAN);
            if (which < 2)
#pragma unroll
                for (int m = 0; m < PER; m++) to[m * SPAN] = v[k].each[m];
        }
    }
}
DEVICE void read_steps(float (&v)[TILE], const elem* row, int step) {
#pragma unroll
    for (u32 j = 0; j < TILE; j += PIECE) {
        const elem* at = row + j * (SPAN / TILE) + PIECE * step;
#if BF16
        const uint4 f = *(const uint4*)at;
        v[j] = bf16_low(f.x), v[j + 1] = bf16_high(f.x), v[j + 2] = bf16_low(f.y), v[j + 3] = bf16_high(f.y);
        v[j + 4] = bf16_low(f.z), v[j + 5] = bf16_high(f.z), v[j + 6] = bf16_low(f.w), v[j + 7] = bf16_high(f.w);
#else
        const float4 f = *(const float4*)at;
        v[j] = f.x, v[j + 1] = f.y, v[j + 2] = f.z, v[j + 3] = f.w;
#endif
    }
}

// What steps do to a state: it is multiplied by d and gets h. Two channels. d is finite, so that a state of 0 stays 0 also against a
// growth beyond all numbers: to ask whether it is 0 would take three times as long.
struct Effect {
    float2 d, h;
};
DEVICE float2 finite(float2 d) { return make_float2(fminf(d.x, 3.4e38f), fminf(d.y, 3.4e38f)); }
DEVICE float2 after(const Effect& e, float2 h) { return make_float2(e.d.x * h.x + e.h.x, e.d.y * h.y + e.h.y); }
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
    const bool any = RIGHT ? q.step + by < STEPS : q.step >= by;
    e.h = after(e, make_float2(any ? before.h.x : 0.f, any ? before.h.y : 0.f));
    e.d = finite(make_float2(any ? e.d.x * before.d.x : e.d.x, any ? e.d.y * before.d.y : e.d.y));
}
// What enters a lane's steps, given the combined effects and what enters the warp's.
template <bool RIGHT> DEVICE float2 entering_lane(const Effect& e, float2 h, const Place& q) {
    const Effect before = lane_before<RIGHT>(e, 1);
    return q.step == (RIGHT ? STEPS - 1 : 0) ? h : after(before, h);
}
// What enters a warp's steps comes from the warp before it, in its block or in the one before: a row of (STATES, ACROSS) for every
// warp, a barrier for each of its states, and two rows for what leaves the block and enters its next round. Nobody waits for more
// than that, so the warps of a block are as many states apart as they like.
#define ROWS (TIMES + 2)
template <bool RIGHT> struct Chain {
    enum { WAITS = 1, STORES = 2, SENDS = 4, SIGNALS = 8 };
    float4* rows;
    u64* barriers;
    u32 in, out, own, next, does, parity;
    // before, behind: there is a block of this cluster where that is.
    DEVICE_MEMBER Chain(float4* rows, u64* barriers, u32 turn, bool before, bool behind, const Place& q) : rows(rows), barriers(barriers) {
        const int to = q.time + (RIGHT ? -1 : 1), first = RIGHT ? TIMES - 1 : 0;
        parity = turn % 2;
        const bool waits = before || q.time != first, inside = 0 <= to && to < TIMES, last = q.step == (RIGHT ? 0 : STEPS - 1);
        const u32 target = inside ? to : behind ? first : TIMES + 1 - parity;
        in = (waits ? q.time : TIMES + parity) * STATES * ACROSS + q.across;
        out = target * STATES * ACROSS + q.across;
        own = q.time * STATES;
        next = (target < TIMES ? target : 0) * STATES;
        does = (waits ? WAITS : 0) | (!last ? 0 : inside || !behind ? STORES : SENDS) | (inside && last ? SIGNALS : 0);
        made(in), made(out), made(own), made(next), made(does);
    }
    DEVICE_MEMBER float2 receive(int n) const {
        wait_if(does & WAITS, barriers + (own + n), parity);
        const float4 v = rows[in + n * ACROSS];
        return make_float2(v.x, v.y);
    }
    DEVICE_MEMBER void pass_on(int n, float2 v, const Place& q) const {
        const float4 all = make_float4(v.x, v.y, 0.f, 0.f);
        if (does & STORES) rows[out + n * ACROSS] = all;
        arrive_if(does & SIGNALS, barriers + (next + n));
#if CLUSTER > 1
        remote_store_if(does & SENDS, (float*)(rows + (out + n * ACROSS)), q.rank + (RIGHT ? -1 : 1), all, barriers + (next + n));
#endif
    }
};
// Before the first round. before: a block sends to this one.
template <bool RIGHT> DEVICE void begin_chain(u64* barriers, bool before, const Place& q) {
    const int time = warp_wide(q.time);
    u64* mine = barriers + time * STATES;
    if (q.lane == 0) {
        const bool remote = before && time == (RIGHT ? TIMES - 1 : 0);  // data that come count themselves in, else lanes do
#pragma unroll
        for (int n = 0; n < STATES; n++) barrier_begin(mine + n, remote ? 1 : ACROSS);
#if CLUSTER > 1
        barriers_begun();
        if (remote)
#pragma unroll
            for (int n = 0; n < STATES; n++) arrivals_expect(mine + n, 16 * ACROSS);
#endif
    }
    __syncwarp();
    cluster_arrive();
}

// log2(e) A and the state that enters the first round, `from` (b d n) or 0: asked for first and kept when they have come, so that nothing
// else waits for them.
struct FirstStates {
    float4 of[(STATES + TIMES * STEPS - 1) / (TIMES * STEPS)];
    DEVICE_MEMBER FirstStates(const Params& p, const float* from, const Place& q) {
#pragma unroll
        for (int k = 0, n = q.time * STEPS + q.step; n < STATES; k++, n += TIMES * STEPS) {
            const float2 h = from != 0 ? read_state(p, q, from, q.b, n) : make_float2(0.f, 0.f);
            const float* a = p.A + q.cc * p.A_c + n * p.A_n;
            of[k] = make_float4(__ldg(a), __ldg(a + q.second * p.A_c), h.x, h.y);
        }
    }
    DEVICE_MEMBER void keep(float2* rates, float4* rows, const Place& q) {
#pragma unroll
        for (int k = 0, n = q.time * STEPS + q.step; n < STATES; k++, n += TIMES * STEPS) {
            made(of[k]);  // else they are multiplied, and waited for, as soon as they are asked for
            rates[n * ACROSS + q.across] = make_float2(LOG2E * of[k].x, LOG2E * of[k].y);
            rows[(TIMES * STATES + n) * ACROSS + q.across] = make_float4(of[k].z, of[k].w, 0.f, 0.f);
        }
    }
};
DEVICE void last_states(const float4* rows, u32 turn, const Params& p, float* to, const Place& q) {
    if (to == 0) return;
    for (int n = q.time * STEPS + q.step; n < STATES; n += TIMES * STEPS) {
        const float4 v = rows[((TIMES + turn % 2) * STATES + n) * ACROSS + q.across];
        write_state(p, q, to, q.b, n, make_float2(v.x, v.y));
    }
}

#if FORWARD
DEVICE void forward(const Params& p, i64 block) {
    SHARED_FLOATS(shared);
    elem* tile = (elem*)shared;                                                  // (TIMES, 2, STATES, SPAN)
    float4* rows = (float4*)(tile + TIMES * 2 * STATES * SPAN);  // (ROWS, STATES, ACROSS)
    u64* barriers = (u64*)(rows + ROWS * STATES * ACROSS);       // (TIMES, STATES)
    float2* rates = (float2*)(barriers + TIMES * STATES);        // (STATES, ACROSS): log2(e) A
    const Place q = place(p, block);
    const float2 none = make_float2(0.f, 0.f);
    const float2 bias = read_vector(p.bias, q), skip = read_vector(p.D, q);
    FirstStates at_first(p, q.rank == 0 ? p.initial : 0, q);
    u32 turn = 0;
    for (i64 begin = q.rank * (TIMES * SPAN); begin < p.length || CLUSTER > 1; begin += TIMES * SPAN, turn++) {
        const i64 i0 = begin + q.time * SPAN + q.step * TILE;
        const u32 live = live_steps(p, q.b, i0);
        float2 dt[TILE], v[TILE], sum[TILE], total = none;
        pair delta[TILE], u[TILE], z[TILE];
        load_tile(delta, p, p.delta, p.delta_b, p.delta_t, i0, live, q);
        load_tile(u, p, p.u, p.u_b, p.u_t, i0, live, q);
        if (p.z != 0) load_tile(z, p, p.z, p.z_b, p.z_t, i0, live, q);
        if (turn == 0) begin_chain<false>(barriers, q.rank > 0, q);
        else __syncthreads();  // what the round before reads has been read
        stage_rows(tile, p, q.b, begin);
        if (turn == 0) at_first.keep(rates, rows, q);
        step_sizes(dt, delta, bias, p.softplus, live);
#pragma unroll
        for (int j = 0; j < TILE; j++) {
            const float2 x = unpack(u[j]);
            sum[j] = make_float2(skip.x * x.x, skip.y * x.y);
            v[j] = make_float2(dt[j].x * x.x, dt[j].y * x.y);
            total.x += dt[j].x, total.y += dt[j].y;
        }
        made(total);  // else it is added up again for every state, to save two registers
        __syncthreads();
        const bool behind = CLUSTER > 1 && begin + TIMES * SPAN < p.length;
        const Chain<false> chain(rows, barriers, turn, q.rank > 0, behind, q);
        if (CLUSTER > 1) {
            cluster_wait();  // nobody sends to a block that has not begun
            if (begin >= p.length) return;
        }
        const bool keeps = p.segments != 0 && i0 < p.length && (u32)i0 % (u32)p.segment == 0;
        float* out = p.segments + (q.b * p.all_segments + (keeps ? (u32)i0 / (u32)p.segment : 0)) * p.all_states * p.channels;
#pragma unroll 1
        for (int first = 0; first < STATES; first += ABREAST) {
            float2 h[ABREAST], e[ABREAST][TILE], x[ABREAST][TILE];
            Effect effect[ABREAST];
#pragma unroll
            for (int m = 0; m < ABREAST; m++) {
                const int n = first + m < STATES ? first + m : STATES - 1;
                float b[TILE];
                const float2 s = rates[n * ACROSS + q.across];
                h[m] = none;
                read_steps(b, tile + ROW(q.time, 0, n), q.step);
#pragma unroll
                for (int j = 0; j < TILE; j++) {
                    e[m][j] = make_float2(exp2_fast(s.x * dt[j].x), exp2_fast(s.y * dt[j].y));
                    x[m][j] = make_float2(v[j].x * b[j], v[j].y * b[j]);
                    h[m].x = e[m][j].x * h[m].x + x[m][j].x;
                    h[m].y = e[m][j].y * h[m].y + x[m][j].y;
                }
                effect[m] = {finite(make_float2(exp2_fast(s.x * total.x), exp2_fast(s.y * total.y))), h[m]};
            }
#pragma unroll
            for (int by = 1; by < STEPS; by *= 2)
#pragma unroll
                for (int m = 0; m < ABREAST; m++) combine_lanes<false>(effect[m], by, q);
#pragma unroll
            for (int m = 0; m < ABREAST; m++) {
                const int n = first + m;
                if (STATES % ABREAST && n >= STATES) continue;
                h[m] = chain.receive(n);
                chain.pass_on(n, after(effect[m], h[m]), q);
                h[m] = entering_lane<false>(effect[m], h[m], q);
                if (p.segments != 0)
                    if (keeps) write2(out + n * p.channels, q, h[m]);
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
        if (behind) return;
        if (CLUSTER > 1) {
            turn++;
            break;
        }
    }
    __syncthreads();
    last_states(rows, turn, p, p.final, q);
}
#if BOTH
KERNEL CLUSTERED BOUNDS(THREADS, RESIDENT / TIMES) short_forward_pair(const Pair p) {
    forward(p.of[blockIdx.x / CLUSTER % 2], blockIdx.x / CLUSTER / 2);
}
#else
KERNEL CLUSTERED BOUNDS(THREADS, RESIDENT / TIMES) short_forward(const Params p) { forward(p, blockIdx.x / CLUSTER); }
#endif

#else
// ----------------------------------------------------------------------------------------------------- gradients
// What a thread has of dC and dB of one state, two times TILE steps: over the block's pairs of channels and out. `sums`:
// (2, TIMES, ACROSS, SUMS), used in turn; a row holds C or B, first or second half of the tile, 32 / ACROSS lanes, 4 steps.
#define SUMS (2 * SPAN + (ACROSS < 8 ? 32 / ACROSS : 4))  // with padding for the banks
DEVICE float* sums_of(float* sums, int turn, int pair, const Place& q) { return sums + ((turn % 2 * TIMES + q.time) * ACROSS + pair) * SUMS; }
DEVICE void give_sums(float* sums, int turn, const float (&dC)[TILE], const float (&dB)[TILE], const Place& q) {
    float* to = sums_of(sums, turn, q.across, q) + 4 * q.step;
    *(float4*)to = make_float4(dC[0], dC[1], dC[2], dC[3]);
    *(float4*)(to + SPAN / 2) = make_float4(dC[4], dC[5], dC[6], dC[7]);
    *(float4*)(to + SPAN) = make_float4(dB[0], dB[1], dB[2], dB[3]);
    *(float4*)(to + SPAN + SPAN / 2) = make_float4(dB[4], dB[5], dB[6], dB[7]);
}
DEVICE void take_sums(float* sums, int turn, const Params& p, int n, i64 span, const Place& q) {
    float* to = p.blocks + ((q.block * p.batch + q.b) * 2 * STATES + n) * p.length + span;
    const i64 other = STATES * p.length;
    const int left = p.length - span < SPAN ? (int)(p.length - span) : SPAN;
#pragma unroll
    for (int e = q.lane; e < SPAN; e += 32) {
        const int t = e % (SPAN / 2) / 4 * TILE + e / (SPAN / 2) * 4 + e % 4;
        float dC = 0.f, dB = 0.f;
#pragma unroll
        for (int k = 0; k < ACROSS; k++) {
            const float* row = sums_of(sums, turn, k, q);
            dC += row[e];
            dB += row[SPAN + e];
        }
        if (t < left) to[t] = dC, to[other + t] = dB;
    }
}

DEVICE void backward(const Params& p, i64 block) {
    SHARED_FLOATS(shared);
    elem* tile = (elem*)shared;                                    // (TIMES, 2, STATES, SPAN)
    float4* rows = (float4*)(tile + TIMES * 2 * STATES * SPAN);  // (ROWS, STATES, ACROSS), of dL/dh
    float* sums = (float*)(rows + ROWS * STATES * ACROSS);
    u64* barriers = (u64*)(sums + 2 * TIMES * ACROSS * SUMS);    // (TIMES, STATES)
    float2* rates = (float2*)(barriers + TIMES * STATES);        // (STATES, ACROSS): log2(e) A
    float2* gathered = rates + STATES * ACROSS;                  // (TIMES, STATES, 32): dA of a lane's steps
    float2* starts = gathered + TIMES * STATES * 32;             // (TIMES, STATES, ACROSS): state entering the warp's steps
    const Place q = place(p, block);
    float2 *mine = gathered + q.time * STATES * 32 + q.lane, *start = starts + q.time * STATES * ACROSS + q.across;
    const float2 none = make_float2(0.f, 0.f);
    const float2 bias = read_vector(p.bias, q), skip = read_vector(p.D, q);
    float2 dD = none, dbias = none;
    const i64 last = (p.length - 1) / (TIMES * SPAN) * (TIMES * SPAN);
    FirstStates at_first(p, CLUSTER == 1 || q.rank * (TIMES * SPAN) == last ? p.dfinal : 0, q);
    u32 turn = 0;
    for (int n = 0; n < STATES; n++) mine[n * 32] = none;
    for (i64 begin = CLUSTER == 1 ? last : q.rank * (TIMES * SPAN); begin >= 0; begin = CLUSTER == 1 ? begin - TIMES * SPAN : -1, turn++) {
        const bool before = CLUSTER > 1 && begin < last;
        const i64 span = begin + q.time * SPAN, i0 = span + q.step * TILE;
        const u32 live = live_steps(p, q.b, i0);
        float2 dt[TILE], v[TILE], dout[TILE], sumY[TILE], sumA[TILE], sumB[TILE], total = none;
        pair delta[TILE], u[TILE], z[TILE], dy[TILE];
        load_tile(delta, p, p.delta, p.delta_b, p.delta_t, i0, live, q);
        load_tile(u, p, p.u, p.u_b, p.u_t, i0, live, q);
        load_tile(dy, p, p.dy, p.dy_b, p.dy_t, i0, live, q);
        if (p.z != 0) load_tile(z, p, p.z, p.z_b, p.z_t, i0, live, q);
        const float* kept = p.segments + (q.b * p.all_segments + (span < p.length ? (u32)span / (u32)p.segment : 0)) * p.all_states * p.channels;
        float2 entering[(STATES + STEPS - 1) / STEPS];
#pragma unroll
        for (int k = 0, n = q.step; n < STATES; k++, n += STEPS) entering[k] = read2(kept + n * p.channels, q);
        if (turn == 0) begin_chain<true>(barriers, before, q);
        else __syncthreads();  // what the round before reads has been read
        stage_rows(tile, p, q.b, begin);
        if (turn == 0) at_first.keep(rates, rows, q);
#pragma unroll
        for (int k = 0, n = q.step; n < STATES; k++, n += STEPS) start[n * ACROSS] = entering[k];
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
        if (CLUSTER > 1) {
            cluster_wait();  // nobody sends to a block that has not begun
            if (begin > last) break;
        }
        const Chain<true> chain(rows, barriers, turn, before, q.rank > 0, q);
#pragma unroll 1
        for (int n = 0; n < STATES; n++) {
            const float2 s = rates[n * ACROSS + q.across];
            float2 h = none, r = none, e[TILE];
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
            const float2 d = finite(make_float2(exp2_fast(s.x * total.x), exp2_fast(s.y * total.y)));
            Effect forth = {d, h}, back = {d, r};
#pragma unroll
            for (int by = 1; by < STEPS; by *= 2) {
                combine_lanes<false>(forth, by, q);
                combine_lanes<true>(back, by, q);
            }
            r = chain.receive(n);
            chain.pass_on(n, after(back, r), q);
            __syncwarp();  // the sums of the state before have been given, and those of two before taken
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
    if (q.rank == 0) last_states(rows, turn, p, p.dinitial, q);
    // dA, dD and dbias over lanes, then over the spans side by side.
    float2* over_lanes = (float2*)sums;  // (STATES + 2, TIMES, ACROSS)
    const int pair = q.across;
    for (int n = 0; n < STATES + 2; n++) {
        float2 t = n < STATES ? mine[n * 32] : n == STATES ? dD : dbias;
#pragma unroll
        for (int by = 16; by >= ACROSS; by /= 2) t = make_float2(t.x + lane_xor(t.x, by), t.y + lane_xor(t.y, by));
        if (q.step == 0) over_lanes[(n * TIMES + q.time) * ACROSS + pair] = t;
    }
    __syncthreads();
    if (q.time == 0)
        for (int n = q.step; n < STATES + 2; n += STEPS) {
            float2 t = none;
            for (int w = 0; w < TIMES; w++) {
                const float2 one = over_lanes[(n * TIMES + w) * ACROSS + pair];
                t = make_float2(t.x + one.x, t.y + one.y);
            }
            write2(p.partial + ((q.b * CLUSTER + q.rank) * (STATES + 2) + n) * p.channels, q, t);
        }
}
#if BOTH
KERNEL CLUSTERED BOUNDS(THREADS, RESIDENT / TIMES) short_backward_pair(const Pair p) {
    backward(p.of[blockIdx.x / CLUSTER % 2], blockIdx.x / CLUSTER / 2);
}
#else
KERNEL CLUSTERED BOUNDS(THREADS, RESIDENT / TIMES) short_backward(const Params p) { backward(p, blockIdx.x / CLUSTER); }
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
        for (i64 b = 0; b < p.batch * CLUSTER; b++) total += __ldg(p.partial + b * (STATES + 2) * p.channels + e);
        give_parameter(p, e, total);
    }
}
#if BOTH
KERNEL short_reduce_pair(const Pair p) { reduce(p.of[blockIdx.x % 2], blockIdx.x / 2); }
#else
KERNEL short_reduce(const Params p) { reduce(p, blockIdx.x); }
#endif
#endif
