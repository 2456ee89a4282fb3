// Token after token through a whole stack, drawing included, in one launch: a cluster of CLUSTER thread blocks (one block
// where clusters do not exist) keeps STREAMS streams and never meets anyone else.
//
// The residual stream x of every stream lies in the shared memory of every block of the cluster, the same in all. A block
// of the cluster owns d_inner / CLUSTER channels of each mixer:
//
//     in_proj    rows of its own channels, all of x          no exchange: convolution and gate are its channels' affair
//     x_proj     all rows, columns of its own channels       partial sums go to all blocks   -> cluster barrier
//     dt_proj, scan, gate: its own channels
//     out_proj   all rows, columns of its own channels       partial sums go to all blocks   -> cluster barrier
//
// so a mixer costs two barriers of the cluster. Pools and head work like out_proj; drawing is done by every block alike.
//
// Matrices: a warp takes 32 or 64 rows and a share of the columns, a lane is a row or two; weights lie as [16 bytes of k][row] and are
// read once for all streams, x is read from shared memory at the same address by all lanes. Shares are added up through
// shared memory. Sums, states and drawing are float32; BF16 says how matrices are stored. With 4 streams or more products
// run on tensor cores (TENSOR), 16 rows and 8 streams a time: bfloat16 matrices with x rounded to bfloat16 too, float32
// ones as three products of tf32 parts, which lose nothing that float32 sums would keep. Weights then lie as
// [16 or 8 of k][16 rows][lane], each lane's 16 bytes being its fragment.
//
// States: 4 threads share a channel of up to 4 streams, an item. Each asks for its own states while the products before run,
// or the item before: copies to shared memory in the background.
//
// Weights are places in the arena until the kernel has begun, which copies as much of it as fits to shared memory and makes
// addresses of the places. Shares are of columns; how many there are of each matrix stands in the operation (N_...).
//
// Set from outside: CLUSTER, STREAMS, STATES (n), WIDTH (of the convolution), WARPS, BF16, TENSOR.

#include "decode/draw.cuh"
#include "cluster.cuh"

struct Params {
    const i64* ops;          // (count of operations, FIELDS)
    const i64* phases;       // of every operation, at the start
    const float* embedding;  // (vocab d_model)
    const float* base;       // (b d_model), added to the embedding, or 0
    const char* arena;       // (CLUSTER arena_stride) bytes: what each block of a cluster reads, most wanted first
    const float* settings;   // epsilon, temperature, top_p, guidance, f0, f1 and hold of the linear prediction
    const i64* keys;         // (b)
    const i64* forced;       // (b count), or 0
    const i64* tokens;       // (b)
    i64* out;                // (b count)
    float* log_probs;        // (b count)
    // if there is a linear prediction of `order` K (heads/sample.py):
    const float* levels;     // (vocab), amplitudes of the tokens
    const float* inputs;     // (TOLD d_model), added to the embedding times what the predictor tells
    const double* table;     // (4 (K+1) + 3): what the sums S weigh, and what is added; what they decay by
    double* heard;           // (b numbers), the predictor's state: the last K amplitudes, oldest first, then S_0, S_1, S_2, p, e; with hold R, E, n, M
    i64 operations, batch, count, position, d_model, vocab, head_rows, order, numbers, top_k;
    i64 arena_stride, resident;  // bytes; so many of them are kept in shared memory
    i64 head, head_bias, head_shares;  // places in the arena; the bias is -inf for what may not be drawn
    i64 x_pitch, inner_pitch, slots, row_pitch, part_floats, exchange_rows, small_rows, input_pitch;
};

#define FIELDS 32
enum { KIND, SAVE, ADD, SLOT, JUMP, WIDE, INNER, RANK, POOL, D_OUT, INDEX, W_IN, W_X, W_OUT, B_IN, W_CONV, B_CONV, W_DT, B_DT,
       W_A, W_D, B_OUT, CONV, SSM, PENDING, HELD, N_IN, N_X, N_OUT, FIXED, W_C, SHIFT };
enum { BLOCK_OP, DOWN_OP, UP_OP };

#define THREADS (32 * WARPS)
#if TENSOR
#define UNIT (BF16 ? 16 : 8)  // columns that are worked on at a time
#define GROUP 16  // rows of a warp
#define PADDED 32  // rows of a matrix are a multiple of this
#else
#define UNIT (BF16 ? 8 : 4)
#define ROWS (STREAMS > 1 ? 2 : 1)  // of a lane: each number of x that it reads serves them all
#define GROUP (32 * ROWS)
#define PADDED GROUP
#endif
#define DEEP 4   // loads of weights that a warp has on their way, tensor cores
#define LANES 4  // threads that share the states of a channel
#define TOLD 3               // numbers that a linear predictor tells the network
#define WIDTH_MEMORY 0.99  // as in heads/sample.py
#define DRIFT 0.015625
#define EACH ((STATES + LANES - 1) / LANES)
#define TOGETHER (STREAMS < 4 ? STREAMS : 4)  // streams of a thread's item in the scan
#define QUEUED (STATES % 16 == 0)
#if STREAMS < 4
#define ITEMS ROLLED  // a loop over numbers of all streams, mostly of one round
#else
#define ITEMS
#endif
#define SEEN (STREAMS < 4 ? 1 : 4)  // streams of a thread's channel whose past is on its way

#ifndef SEQLAB_EMULATED
#define CALLED __device__ __noinline__  // one copy of the code: the loop over a stack has to fit the instruction cache
// Past the first-level cache, which does not see what other blocks write.
DEVICE float load_shared_global(const float* p) { float v; asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(v) : "l"(p) : "memory"); return v; }
#endif

DEVICE float sum4(float v) { v += lane_xor(v, 1); return v + lane_xor(v, 2); }
#if TENSOR
#define TILES ((STREAMS + 7) / 8)
// sum (16 rows, 8 streams) += a (16 rows, UNIT of k) x (UNIT of k, 8 streams): a lane has x of its stream from its columns on.
DEVICE void multiply(float (&sum)[4], uint4 a, const float* x, bool live) {
    float2 low = make_float2(0.f, 0.f), high = low;
#if BF16
    if (STREAMS >= 8 || live) low = *(const float2*)x, high = *(const float2*)(x + 8);
    mma(sum, a, pack_bf16(low.x, low.y), pack_bf16(high.x, high.y));
#else
    if (STREAMS >= 8 || live) low = *(const float2*)x;
    const float whole[6] = {__uint_as_float(a.x), __uint_as_float(a.y), __uint_as_float(a.z), __uint_as_float(a.w), low.x, low.y};
    float v[6], rest[6];  // v keeps what tf32 can hold
#pragma unroll
    for (int i = 0; i < 6; i++) v[i] = __uint_as_float(__float_as_uint(whole[i]) & 0xffffe000u), rest[i] = whole[i] - v[i];
    float part[4] = {0.f, 0.f, 0.f, 0.f};  // tensor cores cut sums off instead of rounding them: long ones are made here
    sum_lanes(part, rest[0], rest[1], rest[2], rest[3], v[4], v[5]);
    sum_lanes(part, v[0], v[1], v[2], v[3], rest[4], rest[5]);
    sum_lanes(part, v[0], v[1], v[2], v[3], v[4], v[5]);
#pragma unroll
    for (int i = 0; i < 4; i++) sum[i] += part[i];
#endif
}
#endif

// part[share][stream][row] = sums over the share's columns. rows: a multiple of 32; units: columns / UNIT. in and part are
// offsets in shared memory: pointers to it would be of unknown kind behind a call.
CALLED void product(const uint4* w, int rows, int units, int n, int in_at, int pitch, int part_at) {
    SHARED_FLOATS(shared);
    const float* in = shared + in_at;
    float* part = shared + part_at;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, groups = rows / GROUP;
#if TENSOR
    int row = lane / 4, pair = lane % 4 * 2;  // of a fragment, PTX ISA: mma.m16n8k16 and m16n8k8
    for (int job = warp; job < groups * n; job += WARPS) {
        int share = quotient(job, groups), group = job - share * groups;
        int k = quotient(units * share, n), end = quotient(units * (share + 1), n);
        float sum[TILES][4];
#pragma unroll
        for (int s = 0; s < TILES; s++) sum[s][0] = sum[s][1] = sum[s][2] = sum[s][3] = 0.f;
        const uint4* at = w + ((i64)k * groups + group) * 32 + lane;
        for (; k < end; k += DEEP, at += DEEP * groups * 32) {
            uint4 a[DEEP];
#pragma unroll
            for (int i = 0; i < DEEP; i++) if (k + i < end) a[i] = at[i * groups * 32];
#pragma unroll
            for (int i = 0; i < DEEP; i++) {
                if (k + i >= end) break;
#pragma unroll
                for (int s = 0; s < TILES; s++) multiply(sum[s], a[i], in + (8 * s + row) * pitch + UNIT * (k + i) + pair, row < STREAMS);
            }
        }
        float* out = part + share * STREAMS * rows + 16 * group + row;
        if (pair < STREAMS) {
#pragma unroll
            for (int s = 0; s < TILES; s++) {
                out[(8 * s + pair) * rows] = sum[s][0];
                out[(8 * s + pair + 1) * rows] = sum[s][1];
                out[(8 * s + pair) * rows + 8] = sum[s][2];
                out[(8 * s + pair + 1) * rows + 8] = sum[s][3];
            }
        }
    }
#else
    for (int job = warp; job < groups * n; job += WARPS) {
        int share = quotient(job, groups), row = (job - share * groups) * GROUP + lane;
        int k = quotient(units * share, n), end = quotient(units * (share + 1), n);
        const uint4* at = w + (i64)k * rows + row;
        float sum[ROWS][STREAMS];
#pragma unroll
        for (int r = 0; r < ROWS; r++)
#pragma unroll
            for (int s = 0; s < STREAMS; s++) sum[r][s] = 0.f;
#pragma unroll 4
        for (; k < end; k++, at += rows) {
            float f[ROWS][UNIT];
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                uint4 v = at[32 * r];
                u32 word[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
                for (int j = 0; j < UNIT; j++)
                    f[r][j] = UNIT == 4 ? __uint_as_float(word[j % 4]) : j % 2 ? bf16_high(word[j / 2 % 4]) : bf16_low(word[j / 2 % 4]);
            }
#pragma unroll
            for (int s = 0; s < STREAMS; s++) {
                const float4* x = (const float4*)(in + s * pitch + k * UNIT);
#pragma unroll
                for (int j = 0; j < UNIT; j += 4) {
                    float4 a = x[j / 4];
#pragma unroll
                    for (int r = 0; r < ROWS; r++) {
                        sum[r][s] += f[r][j] * a.x;
                        sum[r][s] += f[r][j + 1] * a.y;
                        sum[r][s] += f[r][j + 2] * a.z;
                        sum[r][s] += f[r][j + 3] * a.w;
                    }
                }
            }
        }
#pragma unroll
        for (int r = 0; r < ROWS; r++)
#pragma unroll
            for (int s = 0; s < STREAMS; s++) part[(share * STREAMS + s) * rows + row + 32 * r] = sum[r][s];
    }
#endif
}

// i = s * n + j; the division is worth avoiding
#if STREAMS == 1
#define SPLIT(i, n, s, j) const int s = 0, j = (int)(i)
#else
#define SPLIT(i, n, s, j) const int s = quotient((int)(i), n), j = (int)(i) - s * (n)
#endif

DEVICE float add_shares(const float* part, int rows, int n, int s, int row) {
    float v = 0.f;
    ROLLED for (int i = 0; i < n; i++) v += part[(i * STREAMS + s) * rows + row];
    return v;
}

struct Place {  // shared memory
    float* shared;  // its beginning
    float *x, *slots, *u, *gate, *y, *part, *exchange, *projected, *logits, *weights, *scale, *input, *settings, *told, *queue;
    int *token, *phase;
    double *heard, *fit;
    u64* barriers;
    i64* ops;
};
struct Turn {      // of the two halves of the exchange
    int half;
    u32 parity;    // a bit for each half
    int at, rows;  // where this half's sums lie, and how many a stream has room for
};

#if CLUSTER > 1
// Adds up the shares of part and sends the sums to every block of the cluster, itself too; returns when all have come.
CALLED void send_and_wait(int part_at, int exchange_at, int exchange_rows, int rows, int n, int rank, int barrier_at, u32 parity) {
    SHARED_FLOATS(shared);
    const float* part = shared + part_at;
    u64* barrier = (u64*)(shared + barrier_at);
    int quads = rows / 4;
    if (threadIdx.x == 0) arrivals_expect(barrier, CLUSTER * STREAMS * rows * 4);
    float* mine = shared + exchange_at + rank * STREAMS * exchange_rows;
    ITEMS for (int i = threadIdx.x; i < quads * STREAMS; i += THREADS) {
        SPLIT(i, quads, s, quad);
        int row = 4 * quad;
        float4 v = make_float4(0.f, 0.f, 0.f, 0.f);
        ROLLED for (int j = 0; j < n; j++) {
            float4 a = *(const float4*)(part + (j * STREAMS + s) * rows + row);
            v.x += a.x; v.y += a.y; v.z += a.z; v.w += a.w;
        }
#pragma unroll
        for (int c = 0; c < CLUSTER; c++) remote_store(mine + s * exchange_rows + row, c, v, barrier);
    }
    arrivals_wait(barrier, parity);
}
#endif

// Makes the sums of part whole, across the cluster if there is one: afterwards whole(...) gives them, in every block.
//
// A block sends its next but one sums, into this same half of the exchange, only after it has received everyone's next
// ones, and those are sent by threads that have read these: nothing is overwritten too early. Where all blocks of a stack
// have an x_proj (small_rows is set), its few sums have a small half of their own and all others the large one; the head's,
// which follow an out_proj's, then need a barrier before them.
DEVICE void gather(const Params& p, const Place& m, int rows, int n, int rank, Turn& turn, bool small = false) {
    __syncthreads();
#if CLUSTER > 1
    int large = CLUSTER * STREAMS * (int)p.exchange_rows;
    turn.half = p.small_rows ? (int)small : turn.half ^ 1;
    turn.parity ^= 1u << turn.half;  // a half's barrier ends phases 0, 1, 0, ...
    turn.rows = small && p.small_rows ? (int)p.small_rows : (int)p.exchange_rows;
    turn.at = (int)(m.exchange - m.shared) + turn.half * large;
    int barrier = (int)((float*)(m.barriers + turn.half) - m.shared);
    send_and_wait((int)(m.part - m.shared), turn.at, turn.rows, rows, n, rank, barrier, turn.parity >> turn.half & 1u);
#endif
}
DEVICE float whole(const Params& p, const Place& m, int rows, int n, const Turn& turn, int s, int row) {
#if CLUSTER > 1
    const float* at = m.shared + turn.at + s * turn.rows + row;
    float v = 0.f;
#pragma unroll
    for (int c = 0; c < CLUSTER; c++) v += at[c * STREAMS * turn.rows];
    return v;
#else
    return add_shares(m.part, rows, n, s, row);
#endif
}

#define OFFSET(pointer) ((int)((pointer) - m.shared))

// 1 / rms of every stream's x, by one warp each; visible after the next barrier.
DEVICE void norms(const Params& p, const Place& m, int d) {
    int lane = threadIdx.x % 32;
    for (int s = threadIdx.x / 32; s < STREAMS; s += WARPS) {
        float v = 0.f;
#pragma unroll 2
        for (int i = lane; i < d; i += 32) { float x = m.x[s * p.x_pitch + i]; v += x * x; }
        v = warp_sum(v);
        if (lane == 0) m.scale[s] = rsqrtf(v * rcp_fast((float)d) + m.settings[0]);
    }
}

// Item `item` of a scan: a lane of channel c of the streams from s on.
#define ITEM(item) \
    const int group = STREAMS > TOGETHER ? quotient(item, own * LANES) : 0, s = group * TOGETHER; \
    const int c = ((item) - group * own * LANES) / LANES

// Asks for the states of this thread's item number j.
DEVICE void fetch_states(const Place& m, const float* states, i64 inner, int own, int streams, int j) {
#if QUEUED
    int item = threadIdx.x + j * THREADS;
    if (item < own * LANES * (STREAMS / TOGETHER)) {
        ITEM(item);
        float4* to = (float4*)m.queue + threadIdx.x;
        const float* from = states + (s * inner + c) * STATES + item % LANES * EACH;
#pragma unroll
        for (int q = 0; q < TOGETHER; q++, from += inner * STATES)
#pragma unroll
            for (int i = 0; i < EACH / 4; i++) if (s + q < streams) copy16(to + (q * (EACH / 4) + i) * THREADS, from + 4 * i);
    }
    end_batch();
#endif
}
DEVICE void load_row(float* v, const float* at, int lane) {
#if QUEUED
#pragma unroll
    for (int i = 0; i < EACH; i += 4) {
        float4 a = *(const float4*)(at + lane * EACH + i);
        v[i] = a.x; v[i + 1] = a.y; v[i + 2] = a.z; v[i + 3] = a.w;
    }
#else
#pragma unroll
    for (int i = 0; i < EACH; i++) v[i] = lane * EACH + i < STATES ? at[lane * EACH + i] : 0.f;
#endif
}
DEVICE void store_row(const float* v, float* at, int lane) {
#if QUEUED
#pragma unroll
    for (int i = 0; i < EACH; i += 4) *(float4*)(at + lane * EACH + i) = make_float4(v[i], v[i + 1], v[i + 2], v[i + 3]);
#else
#pragma unroll
    for (int i = 0; i < EACH; i++) if (lane * EACH + i < STATES) at[lane * EACH + i] = v[i];
#endif
}

// x_proj and the recurrence that it steers: u, gate -> y, own channels.
DEVICE void selective_scan(const Params& p, const Place& m, const i64* op, i64 first, int streams, int rank, Turn& turn) {
    int own = op[INNER] / CLUSTER, r = round_up(op[RANK], 4), n = op[N_X];
    int own_units = round_up(own, UNIT) / UNIT, pitch = p.inner_pitch, row_pitch = p.row_pitch;
    i64 inner = op[INNER];
    float* states = (float*)op[SSM] + (first * inner + rank * own) * STATES;
    int projected = r + 2 * STATES, x_rows = round_up(projected, PADDED);
    product((const uint4*)op[W_X], x_rows, own_units, n, OFFSET(m.u), pitch, OFFSET(m.part));
    gather(p, m, x_rows, n, rank, turn, true);
    ITEMS for (int i = threadIdx.x; i < projected * STREAMS; i += THREADS) {
        SPLIT(i, projected, s, row);
        m.projected[s * row_pitch + row] = whole(p, m, x_rows, n, turn, s, row);
    }
    __syncthreads();

    const float* dt_weight = (const float*)op[W_DT];  // (r / 4, own, 4)
    int items = own * LANES * (STREAMS / TOGETHER), lane = threadIdx.x % LANES;
    for (int j = 0;; j++) {
        int item = threadIdx.x + j * THREADS;
        if (item - (int)threadIdx.x % 32 >= items) break;  // a whole warp: its lanes add up together
        bool live = item < items;
        if (!live) item = lane;
        ITEM(item);
        float a[EACH], h[TOGETHER][EACH], y[TOGETHER], dt[TOGETHER], u[TOGETHER];
        load_row(a, (const float*)op[W_A] + c * STATES, lane);
        float D = ((const float*)op[W_D])[c], dt_bias = ((const float*)op[B_DT])[c];
        const float* row = m.projected + s * row_pitch;
#if TOGETHER >= 4  // a lane makes the deltas of its streams
        float own_u[TOGETHER / 4], own_dt[TOGETHER / 4];
#pragma unroll
        for (int g = 0; g < TOGETHER / 4; g++) own_u[g] = m.u[(s + 4 * g + lane) * pitch + c], own_dt[g] = dt_bias;
#pragma unroll 2
        for (int k = 0; k < r; k += 4) {
            float4 w = *(const float4*)(dt_weight + k * own + 4 * c);
#pragma unroll
            for (int g = 0; g < TOGETHER / 4; g++) {
                float4 x = *(const float4*)(row + (4 * g + lane) * row_pitch + k);
                own_dt[g] += w.x * x.x; own_dt[g] += w.y * x.y; own_dt[g] += w.z * x.z; own_dt[g] += w.w * x.w;
            }
        }
#pragma unroll
        for (int g = 0; g < TOGETHER / 4; g++) own_dt[g] = softplus(own_dt[g]);
#pragma unroll
        for (int q = 0; q < TOGETHER; q++) {
            dt[q] = lane_from(own_dt[q / 4], threadIdx.x % 32 - lane + q % 4);
            u[q] = lane_from(own_u[q / 4], threadIdx.x % 32 - lane + q % 4);
        }
#else  // the lanes add up each
#pragma unroll
        for (int q = 0; q < TOGETHER; q++) {
            dt[q] = 0.f;
#pragma unroll 2
            for (int k = 0; k < r; k += 4) dt[q] += dt_weight[k * own + 4 * c + lane] * row[q * row_pitch + k + lane];
            dt[q] = softplus(sum4(dt[q]) + dt_bias);
            u[q] = m.u[(s + q) * pitch + c];
        }
#endif
        float* state = states + (s * inner + c) * STATES;
#if QUEUED
        wait_batches<0>();
        const float4* queue = (const float4*)m.queue + threadIdx.x;
#pragma unroll
        for (int q = 0; q < TOGETHER; q++)
#pragma unroll
            for (int i = 0; i < EACH; i += 4) {
                float4 v = queue[(q * (EACH / 4) + i / 4) * THREADS];
                h[q][i] = v.x; h[q][i + 1] = v.y; h[q][i + 2] = v.z; h[q][i + 3] = v.w;
            }
        fetch_states(m, states, inner, own, streams, j + 1);
#else
#pragma unroll
        for (int q = 0; q < TOGETHER; q++) if (s + q < streams) load_row(h[q], state + q * inner * STATES, lane);
#endif
#pragma unroll
        for (int q = 0; q < TOGETHER; q++) {
            float B[EACH], C[EACH];
            load_row(B, row + q * row_pitch + r, lane);
            load_row(C, row + q * row_pitch + r + STATES, lane);
            y[q] = 0.f;
#pragma unroll
            for (int i = 0; i < EACH; i++) {
                if (lane * EACH + i < STATES) {
                    h[q][i] = exp2_fast(dt[q] * a[i]) * h[q][i] + dt[q] * u[q] * B[i];
                    y[q] += h[q][i] * C[i];
                }
            }
        }
#pragma unroll  // all stores behind all loads, which might be of the same places for all the compiler knows
        for (int q = 0; q < TOGETHER; q++) if (live && s + q < streams) store_row(h[q], state + q * inner * STATES, lane);
#if TOGETHER >= 4  // a lane gets the sums of its streams
        float sums[TOGETHER / 4];
#pragma unroll
        for (int g = 0; g < TOGETHER / 4; g++) {
            const float* v = y + 4 * g;
            float even = lane & 1 ? v[1] : v[0], odd = lane & 1 ? v[3] : v[2];
            even += lane_xor(lane & 1 ? v[0] : v[1], 1);
            odd += lane_xor(lane & 1 ? v[2] : v[3], 1);
            sums[g] = lane & 2 ? odd : even;
            sums[g] += lane_xor(lane & 2 ? even : odd, 2);
            sums[g] = (sums[g] + D * own_u[g]) * m.gate[(s + 4 * g + lane) * pitch + c];
        }
#pragma unroll
        for (int g = 0; g < TOGETHER / 4; g++) if (live) m.y[(s + 4 * g + lane) * pitch + c] = sums[g];
#else
#pragma unroll
        for (int q = 0; q < TOGETHER; q++) {
            y[q] = sum4(y[q]);
            int at = (s + q) * pitch + c;
            if (live && lane == 0) m.y[at] = (y[q] + D * u[q]) * m.gate[at];
        }
#endif
    }
}

// The recurrence of parameters alone, real (FIXED 1) or complex (2, imaginary parts STATES further on).
DEVICE void fixed_scan(const Params& p, const Place& m, const i64* op, i64 first, int streams, int start) {
    int inner = op[INNER], own = inner / CLUSTER, pitch = p.inner_pitch, lane = threadIdx.x % LANES;
    int items = own * STREAMS * LANES, numbers = STATES * (int)op[FIXED];
    bool is_complex = op[FIXED] == 2;
    for (int item = threadIdx.x; item - (int)threadIdx.x % 32 < items; item += THREADS) {
        bool live = item < items;
        SPLIT(live ? item / LANES : 0, own, s, c);
        float u = m.u[s * pitch + c], v = ((const float*)op[B_DT])[c] * u, y = 0.f;
        const float *decay = (const float*)op[W_A] + c * numbers, *C = (const float*)op[W_C] + c * numbers;
        float* state = (float*)op[SSM] + ((first + s) * inner + start + c) * numbers;
        if (live && s < streams) {
#pragma unroll
            for (int i = 0; i < EACH; i++) {
                int j = lane * EACH + i;
                if (j < STATES) {
                    float a = decay[j], h = state[j], now = a * h + v;
                    if (is_complex) {
                        float b = decay[STATES + j], g = state[STATES + j], turned = a * g + b * h;
                        now -= b * g;
                        y -= turned * C[STATES + j];
                        state[STATES + j] = turned;
                    }
                    y += now * C[j];
                    state[j] = now;
                }
            }
        }
        y = sum4(y);
        if (live && lane == 0) m.y[s * pitch + c] = (y + ((const float*)op[W_D])[c] * u) * m.gate[s * pitch + c];
    }
}

// What the convolution needs of channel c: its parameters, and what it has seen of the streams s, s + step, ...
struct Channel {
    float bias_u, bias_z, bias, weight[WIDTH], past[SEEN][WIDTH];
};
DEVICE void load_channel(Channel& v, const i64* op, int own, int c) {
    v.bias_u = ((const float*)op[B_IN])[c];
    v.bias_z = ((const float*)op[B_IN])[own + c];
    v.bias = ((const float*)op[B_CONV])[c];
#pragma unroll
    for (int k = 0; k < WIDTH; k++) v.weight[k] = ((const float*)op[W_CONV])[c * WIDTH + k];
}
DEVICE void load_past(Channel& v, const float* seen, int inner, int streams, int c, int s, int step) {
#pragma unroll
    for (int i = 0; i < SEEN; i++, s += step)
#pragma unroll
        for (int k = 0; k < WIDTH - 1; k++) v.past[i][k] = s < streams ? seen[(s * (WIDTH - 1) + k) * inner + c] : 0.f;
}

// x += mixer(norm(x)), then the operation's add and save.
DEVICE void mixer(const Params& p, const Place& m, const i64* op, i64 first, int streams, int rank, Turn& turn) {
    int d = op[WIDE], inner = op[INNER], own = inner / CLUSTER, start = rank * own;
    int own_units = round_up(own, UNIT) / UNIT, pitch = p.inner_pitch;
    int in_rows = round_up(2 * own, PADDED), in_units = round_up(d, UNIT) / UNIT, n = op[N_IN];
    if (op[SHIFT]) {
        ITEMS for (int i = threadIdx.x; i < d * STREAMS; i += THREADS) {
            SPLIT(i, d, s, j);
            if (s < streams) m.x[s * p.x_pitch + j] += __ldg((const float*)op[SHIFT] + (first + s) * d + j);
        }
        __syncthreads();
    }
    // a thread has a channel, and of its streams every step-th; what is needed from memory later is asked for now
    float* seen = (float*)op[CONV] + first * (WIDTH - 1) * inner + start;
    int step = own < THREADS ? quotient(THREADS, own) : 1, begin = own < THREADS ? quotient(threadIdx.x, own) : 0;
    int first_c = begin < step ? (int)threadIdx.x - begin * own : own;
    Channel v;
    if (first_c < own) {
        load_channel(v, op, own, first_c);
        load_past(v, seen, inner, streams, first_c, begin, step);
    }
    if (!op[FIXED]) fetch_states(m, (const float*)op[SSM] + (first * inner + start) * STATES, inner, own, streams, 0);
    norms(p, m, d);
    product((const uint4*)op[W_IN], in_rows, in_units, n, OFFSET(m.x), p.x_pitch, OFFSET(m.part));
    __syncthreads();

    for (int c = first_c; c < own; c += THREADS) {
        if (c != first_c) load_channel(v, op, own, c);
        for (int from = begin; from < STREAMS; from += SEEN * step) {
            if (c != first_c || from != begin) load_past(v, seen, inner, streams, c, from, step);
            float u[SEEN], z[SEEN];
#pragma unroll
            for (int i = 0; i < SEEN; i++) {
                int s = from + i * step;
                if (s >= STREAMS) break;
                float scale = m.scale[s];
                v.past[i][WIDTH - 1] = scale * add_shares(m.part, in_rows, n, s, c) + v.bias_u;
                z[i] = scale * add_shares(m.part, in_rows, n, s, own + c) + v.bias_z;
                z[i] *= sigmoid(z[i]);
                u[i] = v.bias;
#pragma unroll
                for (int k = 0; k < WIDTH; k++) u[i] += v.weight[k] * v.past[i][k];
                u[i] *= sigmoid(u[i]);
            }
#pragma unroll
            for (int i = 0; i < SEEN; i++) {
                int s = from + i * step;
                if (s >= STREAMS) break;
                m.gate[s * pitch + c] = z[i];
                m.u[s * pitch + c] = u[i];
#pragma unroll
                for (int k = 0; k < WIDTH - 1; k++)
                    if (s < streams) seen[(s * (WIDTH - 1) + k) * inner + c] = v.past[i][k + 1];
            }
        }
    }
    __syncthreads();

    if (op[FIXED]) fixed_scan(p, m, op, first, streams, start);
    else selective_scan(p, m, op, first, streams, rank, turn);
    __syncthreads();

    int out_rows = round_up(d, PADDED);
    n = op[N_OUT];
    product((const uint4*)op[W_OUT], out_rows, own_units, n, OFFSET(m.y), pitch, OFFSET(m.part));
    gather(p, m, out_rows, n, rank, turn);
    ITEMS for (int i = threadIdx.x; i < d * STREAMS; i += THREADS) {
        SPLIT(i, d, s, j);
        float* x = m.x + s * p.x_pitch + j;
        float v = *x + whole(p, m, out_rows, n, turn, s, j) + ((const float*)op[B_OUT])[j];
        if (op[ADD] >= 0) v += m.slots[s * p.slots + op[ADD] + j];
        if (op[SAVE] >= 0) m.slots[s * p.slots + op[SAVE] + j] = v;
        *x = v;
    }
    __syncthreads();
}

// Stores the position in its frame and hears the frame before; true if the frame is full, x then being the pooled frame.
DEVICE bool down(const Params& p, const Place& m, const i64* op, i64 first, int streams, int rank, Turn& turn) {
    int d = op[WIDE], pool = op[POOL], d_out = op[D_OUT], phase = m.phase[op[INDEX]];
    bool full = phase + 1 == pool;
    float* pending = (float*)op[PENDING];
    ROLLED for (int i = threadIdx.x; i < d * STREAMS; i += THREADS) {
        SPLIT(i, d, s, j);
        float x = m.x[s * p.x_pitch + j], heard = 0.f;
        if (s < streams) {
            heard = load_shared_global((const float*)op[HELD] + ((first + s) * pool + phase) * d + j);
            if (!full) pending[((first + s) * (pool - 1) + phase) * d + j] = x;
        }
        m.slots[s * p.slots + op[SLOT] + j] = x + heard;
        if (!full) m.x[s * p.x_pitch + j] = x + heard;
    }
    int units = round_up((pool * d + CLUSTER - 1) / CLUSTER, UNIT) / UNIT, share = units * UNIT;
    if (full) {
        ROLLED for (int i = threadIdx.x; i < share * STREAMS; i += THREADS) {
            SPLIT(i, share, s, column);
            int k = rank * share + column, at = k / d, j = k % d;
            float v = 0.f;
            if (s < streams && at < pool)
                v = at + 1 < pool ? pending[((first + s) * (pool - 1) + at) * d + j] : m.x[s * p.x_pitch + j];
            m.input[s * p.input_pitch + column] = v;
        }
    }
    __syncthreads();
    if (threadIdx.x == 0) m.phase[op[INDEX]] = full ? 0 : phase + 1;
    if (!full) return false;
    int rows = round_up(d_out, PADDED);
    int n = op[N_IN];
    product((const uint4*)op[W_IN], rows, units, n, OFFSET(m.input), p.input_pitch, OFFSET(m.part));
    gather(p, m, rows, n, rank, turn);
    ROLLED for (int i = threadIdx.x; i < d_out * STREAMS; i += THREADS) {
        SPLIT(i, d_out, s, j);
        float v = whole(p, m, rows, n, turn, s, j) + ((const float*)op[B_IN])[j];
        m.x[s * p.x_pitch + j] = v;
        m.slots[s * p.slots + op[SAVE] + j] = v;
    }
    __syncthreads();
    return true;
}

// The frame's words for its successor's positions; each block writes its own share of the rows.
DEVICE void up(const Params& p, const Place& m, const i64* op, i64 first, int streams, int rank) {
    int d = op[WIDE], pool = op[POOL], d_out = op[D_OUT], total = pool * d_out;
    int own = (total + CLUSTER - 1) / CLUSTER, rows = round_up(own, PADDED), units = round_up(d, UNIT) / UNIT;
    int n = op[N_IN];
    product((const uint4*)op[W_IN], rows, units, n, OFFSET(m.x), p.x_pitch, OFFSET(m.part));
    __syncthreads();
    ROLLED for (int i = threadIdx.x; i < own * STREAMS; i += THREADS) {
        SPLIT(i, own, s, mine);
        int row = rank * own + mine;
        if (s < streams && row < total)
            ((float*)op[HELD])[(first + s) * total + row] = add_shares(m.part, rows, n, s, mine) + ((const float*)op[B_IN])[mine];
    }
    ROLLED for (int i = threadIdx.x; i < d_out * STREAMS; i += THREADS) {
        SPLIT(i, d_out, s, j);
        m.x[s * p.x_pitch + j] = m.slots[s * p.slots + op[SLOT] + j];
    }
    __syncthreads();
    cluster_barrier();  // the other blocks will read these rows
}

// The sum over a warp, good to 48 bits.
DEVICE double warp_sum(double v) {
    for (int b = 16; b; b >>= 1) {
        float high = (float)v, low = (float)(v - (double)high);
        high = lane_xor(high, b);
        v += (double)high + (double)lane_xor(low, b);
    }
    return v;
}

DEVICE double width_floor(double p, const float* floors) { return (double)floors[0] + (double)floors[1] * (p < 0. ? -p : p); }

// A step of the linear predictor of one stream by one warp (heads/sample.py): the newest sample x moves in. `fit` (3K+2) is room.
DEVICE void hear(const Params& p, double* heard, double* fit, float* told, double x, const float* floors) {
    int K = p.order, lane = threadIdx.x % 32;
    double *r = fit, *b = r + K + 1, *c = b + K + 1, e = x - heard[4 * K + 3], before = heard[4 * K + 4];
    for (int k = lane; k <= K; k += 32) {
        double product = x * (k ? heard[K - k] : x), sum = p.table[3 * (K + 1) + k];
        if (floors[2] > 0.f) heard[4 * K + 5 + k] += product;
        for (int j = 0; j < 3; j++) {
            double* S = heard + K + j * (K + 1) + k;
            *S = p.table[4 * (K + 1) + j] * *S + product;
            sum += *S * p.table[j * (K + 1) + k];
        }
        r[k] = sum;
    }
    __syncwarp();
    if (floors[2] > 0.f) {
        double share = (double)floors[2] * r[0] / heard[4 * K + 5];
        __syncwarp();
        for (int k = lane; k <= K; k += 32) r[k] += share * heard[4 * K + 5 + k];
        if (lane == 0) {
            heard[5 * K + 6] += e < 0. ? -e : e;
            heard[5 * K + 7] += 1.;
            heard[5 * K + 8] += DRIFT * (x - heard[5 * K + 8]);
        }
        __syncwarp();
    }
    for (int k = lane; k - lane < K; k += 32) {
        double moved = k < K - 1 ? heard[k + 1] : x;
        __syncwarp();
        if (k < K) heard[k] = moved;
        __syncwarp();
    }
    for (int k = lane; k <= K; k += 32) b[k] = r[k];
    __syncwarp();
    // Levinson's coefficients by Schur's recursion: it keeps what every lag has left, r[i + 1] after i rounds what its sum of products
    // would give, so that no round waits for a sum over the warp.
    double error = r[0];
    for (int i = 0; i < K; i++) {
        double reflection = r[i + 1] / error;
        for (int j = 1 + lane; j < K - i; j += 32) {
            double forwards = r[i + 1 + j], backwards = b[j];
            r[i + 1 + j] = forwards - reflection * backwards;
            b[j] = backwards - reflection * forwards;
        }
        for (int j = lane; j < (i + 1) / 2; j += 32) {
            double one = c[j], other = c[i - 1 - j];
            c[j] = one - reflection * other;
            c[i - 1 - j] = other - reflection * one;
        }
        if (lane == 0) c[i] = reflection;
        error *= 1. - reflection * reflection;
        __syncwarp();
    }
    double sum = 0.;
    for (int k = lane; k < K; k += 32) sum += c[k] * heard[K - 1 - k];
    sum = warp_sum(sum);
    if (floors[2] > 0.f) sum -= DRIFT * heard[5 * K + 8];
    sum = fmin(fmax(sum, -1.), 1.);
    if (lane == 0) {
        double earlier = before + width_floor(heard[4 * K + 3], floors), width = WIDTH_MEMORY * before + (1. - WIDTH_MEMORY) * (e < 0. ? -e : e);
        heard[4 * K + 3] = sum;
        heard[4 * K + 4] = width;
        told[0] = tanhf((float)(e / earlier));
        told[1] = .5f * logf((float)(width + width_floor(sum, floors))) + 2.f;
        told[2] = asinhf(255.f * (float)sum) * .16039998f;  // 1 / asinh(255)
    }
    __syncwarp();
}

// The density around the linear prediction, added to the logits of one stream by one warp; behind the logits are (m - p) / w,
// log s / w and log a.
DEVICE void predict(const Params& p, float* logits, const double* heard, const float* floors) {
    int vocab = p.vocab, order = p.order;
    float centre = (float)heard[4 * order + 3];
    double floor = width_floor(heard[4 * order + 3], floors);
    float width = (float)(heard[4 * order + 4] + floor);
    if (floors[2] > 0.f) width *= exp2_fast(floors[2] * log2_fast((float)(heard[5 * order + 6] / heard[5 * order + 7] + floor) / width));
    float per = 1.f / width;
    float move = logits[vocab], scale = exp2_fast(-LOG2E * logits[vocab + 1]), tail = LN2 * exp2_fast(LOG2E * logits[vocab + 2]);
    for (int v = threadIdx.x % 32; v < vocab; v += 32) {
        float z = ((__ldg(p.levels + v) - centre) * per - move) * scale;
        logits[v] -= tail * log2_fast(1.f + z * z);
    }
    __syncwarp();
}

// untold = told + guidance (told - untold), by one warp; -inf, what may not be drawn, stays.
DEVICE void guide(const float* told, float* untold, float guidance, int vocab) {
    for (int v = threadIdx.x % 32; v < vocab; v += 32) {
        float a = told[v];
        if (a > __uint_as_float(0xff800000u)) untold[v] = a + guidance * (a - untold[v]);
    }
    __syncwarp();
}

KERNEL CLUSTERED BOUNDS(THREADS, WARPS >= 16 ? 1 : 2) decode(const Params p) {
    SHARED_FLOATS(shared);
    int rank = blockIdx.x % CLUSTER;
    i64 first = (i64)(blockIdx.x / CLUSTER) * STREAMS;
    int streams = p.batch - first < STREAMS ? (int)(p.batch - first) : STREAMS;
    Place m;
    m.shared = shared;
    float* next = shared;
    m.ops = (i64*)next; next += round_up(2 * FIELDS * (int)p.operations, 4);
    m.barriers = (u64*)next; next += 4;
    m.x = next; next += STREAMS * p.x_pitch;
    m.u = next; next += STREAMS * p.inner_pitch;
    m.y = next; next += STREAMS * p.inner_pitch;
    m.gate = next; next += STREAMS * p.inner_pitch;
    m.input = next; next += STREAMS * p.input_pitch;
    float* zero_end = next;
    m.slots = next; next += STREAMS * p.slots;
    m.part = next; next += p.part_floats;
#if CLUSTER > 1
    m.exchange = next; next += CLUSTER * STREAMS * (p.exchange_rows + (p.small_rows ? p.small_rows : p.exchange_rows));
#endif
    m.projected = next; next += STREAMS * p.row_pitch;
    // states are on their way between in_proj and scan only; the end of a token has the same place
    int ending = STREAMS * round_up((int)p.head_rows, 4), queued = QUEUED ? TOGETHER * EACH * THREADS : 0;
    m.queue = m.logits = next;
    m.weights = next + ending;
    next += 2 * ending > queued ? 2 * ending : queued;
    m.told = next; next += STREAMS * 4;
    m.scale = next; next += round_up(STREAMS, 4);
    m.settings = next; next += 8;
    m.token = (int*)next; next += round_up(STREAMS, 4);
    m.phase = (int*)next; next += round_up((int)p.operations, 4);
    int order = p.order, state = (int)p.numbers, room = 3 * order + 2;
    m.heard = (double*)next; next += order ? round_up(2 * STREAMS * state, 4) : 0;
    m.fit = (double*)next; next += order ? round_up(2 * (STREAMS < WARPS ? STREAMS : WARPS) * room, 4) : 0;

    const char* arena = p.arena + rank * p.arena_stride;
#pragma unroll 4
    for (i64 i = threadIdx.x; i < p.resident / 16; i += THREADS) ((uint4*)next)[i] = __ldg((const uint4*)arena + i);
#define PLACE(at) ((at) < p.resident ? (i64)((char*)next + (at)) : (i64)(arena + (at)))
    ROLLED for (int i = threadIdx.x; i < FIELDS * p.operations; i += THREADS) {
        int field = i % FIELDS;
        m.ops[i] = (field >= W_IN && field <= B_OUT) || field == W_C ? PLACE(p.ops[i]) : p.ops[i];
    }
    const uint4* head = (const uint4*)PLACE(p.head);
    const float* head_bias = (const float*)PLACE(p.head_bias);
    if (threadIdx.x < 7) m.settings[threadIdx.x] = p.settings[threadIdx.x];
    ROLLED for (float* q = m.x + threadIdx.x; q < zero_end; q += THREADS) *q = 0.f;
    ROLLED for (int i = threadIdx.x; i < p.operations; i += THREADS) m.phase[i] = (int)p.phases[i];
    ROLLED for (int s = threadIdx.x; s < STREAMS; s += THREADS) m.token[s] = s < streams ? (int)p.tokens[first + s] : 0;
    if (order)
        ROLLED for (int i = threadIdx.x; i < state * STREAMS; i += THREADS) m.heard[i] = i < state * streams ? p.heard[first * state + i] : 0.;
#if CLUSTER > 1
    if (threadIdx.x == 0) arrivals_begin(m.barriers, 2);
#endif
    __syncthreads();
    cluster_barrier();  // nobody writes to a block that has not begun

    int d = p.d_model, vocab = p.vocab, rows = p.head_rows, v_pitch = round_up(rows, 4);
    Turn turn = {0, 3u, 0, 0};
    int head_rows = round_up(rows, PADDED), head_units = round_up((d + CLUSTER - 1) / CLUSTER, UNIT) / UNIT;
    for (i64 step = 0; step < p.count; step++) {
        if (order) {
            int warp = threadIdx.x / 32;
            for (int s = warp; s < streams; s += WARPS)
                hear(p, m.heard + s * state, m.fit + warp * room, m.told + s * 4, __ldg(p.levels + m.token[s]), m.settings + 4);
            __syncthreads();
        }
        ITEMS for (int i = threadIdx.x; i < d * STREAMS; i += THREADS) {
            SPLIT(i, d, s, j);
            float v = __ldg(p.embedding + (i64)m.token[s] * d + j);
            if (order && s < streams)
                for (int k = 0; k < TOLD; k++) v += m.told[s * 4 + k] * __ldg(p.inputs + k * d + j);
            if (p.base && s < streams) v += __ldg(p.base + (first + s) * d + j);
            m.x[s * p.x_pitch + j] = v;
            if (p.slots) m.slots[s * p.slots + j] = v;
        }
        __syncthreads();
        for (int o = 0; o < p.operations;) {
            const i64* op = m.ops + FIELDS * o++;
            if (op[KIND] == BLOCK_OP) mixer(p, m, op, first, streams, rank, turn);
            else if (op[KIND] == UP_OP) up(p, m, op, first, streams, rank);
            else if (!down(p, m, op, first, streams, rank, turn)) o = (int)op[JUMP];
        }
        norms(p, m, d);
        int n = p.head_shares;
        product(head, head_rows, head_units, n, OFFSET(m.x) + rank * head_units * UNIT, p.x_pitch, OFFSET(m.part));
        if (p.small_rows) cluster_barrier();
        gather(p, m, head_rows, n, rank, turn);
        ITEMS for (int i = threadIdx.x; i < rows * STREAMS; i += THREADS) {
            SPLIT(i, rows, s, v);
            m.logits[s * v_pitch + v] = m.scale[s] * whole(p, m, head_rows, n, turn, s, v) + head_bias[v];
        }
        __syncthreads();
        float guidance = m.settings[3];
        int each = guidance > 0.f ? 2 : 1, guided = 0;  // with guidance a warp draws for both rows of a pair
        for (int pair = threadIdx.x / 32; pair * each < streams; pair += WARPS) {
            for (int s = pair * each; s < (pair + 1) * each; s++) {
                float* logits = m.logits + s * v_pitch;
                if (order) predict(p, logits, m.heard + s * state, m.settings + 4);
                if (s % each) guide(logits - v_pitch, logits, guidance, vocab);
            }
            for (int s = (pair + 1) * each - 1; s >= pair * each; s--) {
                float normaliser;
                const float* logits = m.logits + s * v_pitch;
                int token = draw(vocab, (int)p.top_k, m.settings, logits, m.weights + s * v_pitch, uniform(p.keys[first + s], p.position + step), &normaliser);
                if (s % each) guided = token;
                else if (each > 1) token = guided;
                i64 place = (first + s) * p.count + step;
                if (p.forced) token = (int)p.forced[place];
                if (threadIdx.x % 32 == 0) {
                    m.token[s] = token;
                    if (rank == 0) {
                        p.out[place] = token;
                        p.log_probs[place] = logits[token] - normaliser;
                    }
                }
            }
        }
        __syncthreads();
    }
    if (order && rank == 0)
        for (int i = threadIdx.x; i < state * streams; i += THREADS) p.heard[first * state + i] = m.heard[i];
}
