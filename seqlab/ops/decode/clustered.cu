// Token after token of hundreds of streams by clusters of CLUSTER blocks that keep their streams from the first token of a launch to
// the last, drawing included. Clusters never meet.
//
// A block owns 64 channels of every mixer and 32 numbers of x, of all streams of its cluster. States are what has to move: a warp asks for
// those of its next DEPTH items (32 channels of a stream) by copies in the background, which go on while products are made and blocks wait
// for each other. Of a mixer:
//
//     in_proj, convolution, gate     own channels, from all of x
//     x_proj                         sums over own channels go to the block that adds up a stream's, and from there to all
//     dt_proj, recurrence, gate      own channels; y goes to all as it is made
//     out_proj, residual             own numbers of x, from all of y; x goes to all
//
// so the cluster meets four times, each time counted in at a barrier of the block that data go to. Weights are asked for one or two
// meetings ahead, into registers. Products run on tensor cores, streams in tiles of eight; activations are rounded to bfloat16, as in training.
//
// Set from outside: CLUSTER, D_MODEL (32 CLUSTER), INNER (64 CLUSTER), RANK (a multiple of 4), STATES (16), WIDTH (of the convolution), VOCAB,
// HEAD_ROWS (of a block, a multiple of 32), TILES (of streams of a cluster), DEPTH, BF16 (1).

#include "decode/draw.cuh"
#include "decode/tiles.cuh"
#include "cluster.cuh"

struct Params {
    const char *w_in, *w_x, *w_out;  // (layers CLUSTER ...), packed in clustered.py
    const char* head;                // (CLUSTER ...)
    const float *b_in, *w_conv, *b_conv, *w_dt, *b_dt, *a, *d, *b_out;  // (layers ...)
    const float* head_bias;          // (vocab), -inf for what may not be drawn
    const float* embedding;          // (vocab d_model)
    const float* base;               // (b d_model), added to the embedding, or 0
    const float* shifts;             // (layers b d_model), added to x before each mixer but the first, or 0
    const i64 *conv, *ssm;           // (layers): where (b WIDTH-1 inner) and (b inner STATES) lie
    const float* settings;           // epsilon, temperature, top_p
    const i64* keys;                 // (b)
    const i64* forced;               // (b count), or 0
    const i64* tokens;               // (b)
    i64* out;                        // (b count)
    float* log_probs;                // (b count)
    i64 layers, batch, count, position, top_k;
};

#define THREADS 512
#define WARPS 16
#define OWN 64
#define SHARE 32
#define STREAMS (8 * TILES)
#define SLOTS ((STREAMS + CLUSTER - 1) / CLUSTER)  // streams whose sums and draws are a block's affair
#define UNITS (D_MODEL / 16)
#define HALF_UNITS (UNITS / 2)
#define SPLITS (INNER < 256 ? INNER / 32 : 8)       // of the columns of out_proj, two units or more each
#define OUT_UNITS (INNER / 16 / SPLITS)
#define HEAD_SPLITS (D_MODEL < 256 ? D_MODEL / 32 : 8)
#define HEAD_UNITS (UNITS / HEAD_SPLITS)
#define PAST (WIDTH > 1 ? WIDTH - 1 : 1)
#define X_ROWS (RANK + 2 * STATES)
#define X_GROUPS ((X_ROWS + 15) / 16)
#define X_UNITS (OWN / 16)
#define X_WARPS (WARPS / X_GROUPS * X_GROUPS)  // so that a warp keeps its rows
#define X_PITCH (16 * X_GROUPS + 4)  // pitches: eight rows, four lanes each, lie in different banks
#define U_PITCH (OWN + 8)
#define Y_PITCH (OWN + 8)
#define IN_PITCH (2 * OWN + 4)
#define OUT_PITCH (SHARE + 4)
#define S_PITCH (SHARE + 8)  // of x
#define HALF 32              // channels of an item
#define OCTETS 4             // times eight channels: a lane has four states of one channel of each
#define GROUPS (WARPS / 2)   // a warp has one of so many streams
#define ITEM (GROUPS * INNER * STATES)  // from one item to the next
#define LARGER(a, b) ((a) > (b) ? (a) : (b))
#define Y_FLOATS LARGER(CLUSTER * STREAMS * Y_PITCH / 2, LARGER(2 * STREAMS * IN_PITCH, 2 * SLOTS * CLUSTER * HEAD_ROWS))
#define U_FLOATS LARGER((2 * U_PITCH + X_PITCH + Y_PITCH / 2) * STREAMS + SLOTS * CLUSTER * X_PITCH, LARGER(SPLITS, HEAD_SPLITS) * STREAMS * OUT_PITCH)

// What is counted in at a barrier.
enum { PARTS, PROJECTED, OUTPUTS, RESIDUALS, LOGITS, TOKENS, MEETINGS };

#ifndef SEQLAB_EMULATED
// What lanes need of 32 rows and 8 columns, that is two units of a tile of streams: at is (row lane % 8, column lane / 8 * 8) of the tile.
DEVICE void load_columns(u32 (&v)[4], const elem* at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3]) : "r"((u32)__cvta_generic_to_shared(at)) : "memory");
}
// Asked for anew in each part of the kernel: what follows from it would otherwise be kept for all parts, and there are no registers for that.
DEVICE int thread() {
    int i;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(i));
    __builtin_assume(i >= 0 && i < THREADS);
    return i;
}
// A policy as createpolicy makes it: what leaves the second-level cache last. States would push the weights out, token after token.
#define STAYS 0x14F0000000000000ull
// Weights, read once a token: not for the first-level cache, which shared memory leaves little of. Not as constants (ld.global.nc): those the
// compiler loads where they are needed, behind all barriers.
DEVICE uint4 load_weights(const uint4* p) {
    uint4 v;
    asm volatile("ld.global.L1::no_allocate.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %5;" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p), "l"(STAYS));
    return v;
}
DEVICE float4 load_weights(const float4* p) {
    float4 v;
    asm volatile("ld.global.L1::no_allocate.L2::cache_hint.v4.f32 {%0, %1, %2, %3}, [%4], %5;" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "l"(p), "l"(STAYS));
    return v;
}
DEVICE float load_weights(const float* p) {
    float v;
    asm volatile("ld.global.L1::no_allocate.L2::cache_hint.f32 %0, [%1], %2;" : "=f"(v) : "l"(p), "l"(STAYS));
    return v;
}
// Nothing, and yet the compiler makes these numbers here and not further down, where their loads would be waited for together with others.
DEVICE void made(float4& v) { asm volatile("" : "+f"(v.x), "+f"(v.y), "+f"(v.z), "+f"(v.w)); }
#else
DEVICE int thread() { return threadIdx.x; }
DEVICE uint4 load_weights(const uint4* p) { return *p; }
DEVICE float4 load_weights(const float4* p) { return *p; }
DEVICE float load_weights(const float* p) { return *p; }
DEVICE void made(float4& v) {}
DEVICE void load_columns(u32 (&v)[4], const elem* at) {
    const elem* row = at;
    for (int i = 0; i < 4; i++) v[i] = emulated::columns(at, i);
}
#endif

template <int N> DEVICE void load_weights(float (&v)[N], const float* at) {
#pragma unroll
    for (int i = 0; i < N; i += 4) {
        float4 a = load_weights((const float4*)(at + i));
        v[i] = a.x; v[i + 1] = a.y; v[i + 2] = a.z; v[i + 3] = a.w;
    }
}

// Waits until all has come that is counted at a barrier for the turn-th time; it will be as many bytes the next time. A phase of no bytes would
// end at once and be taken for the one before: SOME tells that there always are some.
template <int WHICH, bool SOME = true> DEVICE void meet(u64* barriers, u32 turn) {
    const u32* bytes = (const u32*)(barriers + 8);
    if (!SOME && bytes[WHICH] == 0) return;
    arrivals_wait(barriers + WHICH, turn & 1);
    if (threadIdx.x == 0) arrivals_expect(barriers + WHICH, bytes[WHICH]);
}

// sum[t] += 16 rows x 8 streams (tile t), 32 columns. x: as load_columns wants it, of the first tile.
template <int PITCH> DEVICE void multiply_tiles(float (&sum)[TILES][4], uint4 low, uint4 high, const elem* x) {
#pragma unroll
    for (int t = 0; t < TILES; t++) {
        u32 v[4];
        load_columns(v, x + 8 * t * PITCH);
        mma(sum[t], low, v[0], v[1]);
        mma(sum[t], high, v[2], v[3]);
    }
}
// To where the other splits' sums are: [stream][row]. row: of the lane's first number.
template <int PITCH> DEVICE void put_tiles(float* at, const float (&sum)[TILES][4]) {
    const int lane = threadIdx.x % 32;
    at += lane % 4 * 2 * PITCH + lane / 4;
#pragma unroll
    for (int t = 0; t < TILES; t++)
#pragma unroll
        for (int i = 0; i < 4; i++) at[(8 * t + i % 2) * PITCH + i / 2 * 8] = sum[t][i];
}
// Four rows of a stream, added up over the splits.
template <int N> DEVICE float4 add_splits(const float* at) {
    float4 v = *(const float4*)at;
#pragma unroll
    for (int i = 1; i < N; i++) {
        float4 w = *(const float4*)(at + i * STREAMS * OUT_PITCH);
        v.x += w.x; v.y += w.y; v.z += w.z; v.w += w.w;
    }
    return v;
}

KERNEL CLUSTERED BOUNDS(THREADS, 1) clustered(const Params p) {
    SHARED_FLOATS(shared);
    const int rank = blockIdx.x % CLUSTER, clusters = gridDim.x / CLUSTER, layers = p.layers;
    const int first = (int)((i64)(blockIdx.x / CLUSTER) * p.batch / clusters);
    const int streams = (int)((i64)(blockIdx.x / CLUSTER + 1) * p.batch / clusters) - first;
    float* next = shared;
    u64* barriers = (u64*)next; next += 24;  // and the bytes that are counted at them
    float* settings = next; next += 4;
    float* scale = next; next += STREAMS;
    float* squares = next; next += CLUSTER * STREAMS;     // sums of squares of x, (block stream)
    float4* tokens = (float4*)next; next += 4 * CLUSTER * SLOTS;  // (stream)
    elem* x = (elem*)next; next += CLUSTER * STREAMS * S_PITCH / 2;  // (block stream S_PITCH)
    float* y_room = next; next += Y_FLOATS;
    float* u_room = next; next += U_FLOATS;
    float* pasts = next; next += STREAMS * (WIDTH - 1) * OWN;  // of the convolution that comes next, (stream WIDTH-1 OWN)
    float4* ring = (float4*)next; next += WARPS * DEPTH * OCTETS * 32 * 4;  // states of the next items, (warp item octet lane)
    const i64 *conv_at = (const i64*)next, *ssm_at = conv_at + layers;
    elem* y = (elem*)y_room;          // (block stream Y_PITCH)
    float* in_sums = y_room;          // (half stream IN_PITCH)
    float* logits = y_room;           // (slot CLUSTER*HEAD_ROWS)
    float* weights = logits + SLOTS * CLUSTER * HEAD_ROWS;
    float* u = u_room;                // (stream U_PITCH)
    float* gate = u + STREAMS * U_PITCH;
    float* projected = gate + STREAMS * U_PITCH;   // (stream X_PITCH); before, this block's part of it
    float* parts = projected + STREAMS * X_PITCH;  // (slot block X_PITCH)
    elem* rounded = (elem*)(parts + SLOTS * CLUSTER * X_PITCH);  // u as x_proj takes it, (stream Y_PITCH)
    float* out_sums = u_room;         // (split stream OUT_PITCH)

    const int own_slots = rank < streams ? (streams - rank + CLUSTER - 1) / CLUSTER : 0;

    // in_proj: a warp takes 16 rows and half of the columns
    uint4 in[HALF_UNITS];
    auto load_in = [&](int l) {
        const int tid = thread(), group = tid / 32 % 8, half = tid / 256;
        const uint4* w = (const uint4*)p.w_in + (((i64)(l * CLUSTER + rank) * UNITS + half * HALF_UNITS) * 8 + group) * 32 + tid % 32;
#pragma unroll
        for (int k = 0; k < HALF_UNITS; k++) in[k] = load_weights(w + k * 8 * 32);
    };
    load_in(0);

    const int tid = thread();
    for (int i = tid; i < layers; i += THREADS) ((i64*)conv_at)[i] = p.conv[i], ((i64*)ssm_at)[i] = p.ssm[i];
    if (tid < 3) settings[tid] = p.settings[tid];
    for (int i = tid; i < streams; i += THREADS) ((int*)(tokens + i))[0] = (int)p.tokens[first + i];
    if (tid == 0) {
        u32* bytes = (u32*)(barriers + 8);
        bytes[PARTS] = own_slots * CLUSTER * X_ROWS * 4;
        bytes[PROJECTED] = streams * X_ROWS * 4;
        bytes[OUTPUTS] = CLUSTER * streams * OWN * 2;
        bytes[RESIDUALS] = CLUSTER * (streams * SHARE * 2 + (streams + 3) / 4 * 16);
        bytes[LOGITS] = own_slots * CLUSTER * HEAD_ROWS * 4;
        bytes[TOKENS] = streams * 16;
        arrivals_begin(barriers, MEETINGS);
        for (int i = 0; i < MEETINGS; i++) arrivals_expect(barriers + i, bytes[i]);
    }
    __syncthreads();
    cluster_barrier();  // nobody sends to a block that has not begun

    // Recurrence: a warp has half of the channels of every eighth stream, an item is one of these: 2 KB that lie together.
    auto warp_items = [&]() { return (streams + GROUPS - 1 - thread() / 64) / GROUPS; };
    auto warp_state = [&](int l) {
        const int warp = thread() / 32;
        return (float*)ssm_at[l] + ((i64)(first + warp / 2) * INNER + rank * OWN + warp % 2 * HALF) * STATES;
    };
    int slot = 0;
    auto fetch = [&](const float* from) {
        const int tid = thread(), lane = tid % 32;
        float4* to = ring + (tid / 32 * DEPTH + slot) * (OCTETS * 32) + lane;
#pragma unroll
        for (int q = 0; q < OCTETS; q++) fetch16(to + q * 32, from + (q * 32 + lane) * 4);
        end_batch();
    };
    auto fetch_pasts = [&](int l) {
        const float* from = (const float*)conv_at[l] + (i64)first * (WIDTH - 1) * INNER + rank * OWN;
        ROLLED for (int i = thread(); i < streams * (WIDTH - 1) * (OWN / 4); i += THREADS)
            fetch16(pasts + 4 * i, from + i / (OWN / 4) * INNER + i % (OWN / 4) * 4);
        end_batch();
    };
    fetch_pasts(0);
    if (warp_items())
        ROLLED for (int i = 0; i < DEPTH; i++) {
            fetch(warp_state(0) + i * ITEM);
            slot = slot + 1 < DEPTH ? slot + 1 : 0;
        }

    float4 residual = make_float4(0.f, 0.f, 0.f, 0.f);  // four numbers of x of stream tid / 8
    u32 turn = 0;  // mixers so far
    // x to all, and what it adds to the norm
    auto send_x = [&]() {
        const int tid = thread(), warp = tid / 32, lane = tid % 32, own_stream = tid / 8, quad = tid % 8;
        const float low = __uint_as_float(pack_bf16(residual.x, residual.y)), high = __uint_as_float(pack_bf16(residual.z, residual.w));
        const float other_low = lane_xor(low, 1), other_high = lane_xor(high, 1);
        float sum = residual.x * residual.x + residual.y * residual.y + residual.z * residual.z + residual.w * residual.w;
#pragma unroll
        for (int bit = 1; bit < 8; bit *= 2) sum += lane_xor(sum, bit);
        const float4 eight = lane % 2 ? make_float4(other_low, other_high, low, high) : make_float4(low, high, other_low, other_high);
        float* to = (float*)(x + (rank * STREAMS + own_stream) * S_PITCH + quad / 2 * 8);
#pragma unroll
        for (int i = 0; i < CLUSTER / 2; i++) remote_store_if(own_stream < streams, to, 2 * i + lane % 2, eight, barriers + RESIDUALS);
        const float4 four = make_float4(lane_from(sum, 0), lane_from(sum, 8), lane_from(sum, 16), lane_from(sum, 24));
        remote_store_if(lane < CLUSTER && 4 * warp < streams, squares + rank * STREAMS + 4 * warp, lane, four, barriers + RESIDUALS);
    };
    // x is there, of all streams; the norms follow
    auto meet_x = [&](u32 turn) {
        meet<RESIDUALS>(barriers, turn);
        const int tid = thread();
        if (tid < STREAMS) {
            float sum = 0.f;
#pragma unroll
            for (int r = 0; r < CLUSTER; r++) sum += squares[r * STREAMS + tid];
            scale[tid] = rsqrtf(sum * (1.f / D_MODEL) + settings[0]);
        }
    };

    for (i64 step = 0; step < p.count; step++) {
        if (const int tid = thread(), own_stream = tid / 8; own_stream < streams) {
            const int at = rank * SHARE + tid % 8 * 4;
            residual = load_weights((const float4*)(p.embedding + (i64)((const int*)(tokens + own_stream))[0] * D_MODEL + at));
            if (p.base) {
                float4 v = __ldg((const float4*)(p.base + (i64)(first + own_stream) * D_MODEL + at));
                residual.x += v.x; residual.y += v.y; residual.z += v.z; residual.w += v.w;
            }
        }
        send_x();
        for (int l = 0; l < layers; l++, turn++) {
            uint4 w[X_UNITS];
            float w_conv[WIDTH], b_conv, b_u, b_z;
            float4 bias, shift = make_float4(0.f, 0.f, 0.f, 0.f);
            {
                const int tid = thread(), own_stream = tid / 8, at = rank * SHARE + tid % 8 * 4;
                bias = load_weights((const float4*)(p.b_out + (i64)l * D_MODEL + at));
                if (p.shifts && l + 1 < layers && own_stream < streams)
                    shift = load_weights((const float4*)(p.shifts + ((i64)(l + 1) * p.batch + first + own_stream) * D_MODEL + at));
                const i64 own = (i64)l * INNER + rank * OWN + tid % OWN;
#pragma unroll
                for (int k = 0; k < WIDTH; k++) w_conv[k] = load_weights(p.w_conv + own * WIDTH + k);
                b_conv = load_weights(p.b_conv + own), b_u = load_weights(p.b_in + own + (i64)l * INNER), b_z = load_weights(p.b_in + own + (i64)(l + 1) * INNER);
                const uint4* from = (const uint4*)p.w_x + ((i64)(l * CLUSTER + rank) * X_UNITS * X_GROUPS + tid / 32 % X_GROUPS) * 32 + tid % 32;
#pragma unroll
                for (int k = 0; k < X_UNITS; k++) w[k] = load_weights(from + k * X_GROUPS * 32);
            }
            {  // norm, in_proj
                const int tid = thread(), lane = tid % 32, group = tid / 32 % 8, half = tid / 256;
                meet_x(turn + (u32)step);
                float sum[TILES][4] = {};
                const elem* at = x + (half * (HALF_UNITS / 2) * STREAMS + lane % 8) * S_PITCH + lane / 8 * 8;
#pragma unroll
                for (int k = 0; k < HALF_UNITS / 2; k++) multiply_tiles<S_PITCH>(sum, in[2 * k], in[2 * k + 1], at + k * STREAMS * S_PITCH);
                put_tiles<IN_PITCH>(in_sums + half * STREAMS * IN_PITCH + group * 16, sum);
                wait_batches<0>();  // pasts
                __syncthreads();
                // x itself is on its way already
                residual.x += bias.x + shift.x; residual.y += bias.y + shift.y; residual.z += bias.z + shift.z; residual.w += bias.w + shift.w;
                made(residual);
            }
            {  // convolution and gate of one channel and every eighth stream
                const int tid = thread(), channel = tid % OWN, oldest = (int)((u32)step % PAST);
                float* conv = (float*)conv_at[l] + (i64)first * (WIDTH - 1) * INNER + rank * OWN + channel;
#pragma unroll
                for (int t = 0; t < TILES; t++) {
                    const int s = 8 * t + tid / OWN;
                    if (t == TILES - 1 && s >= streams) break;
                    const float *at = in_sums + s * IN_PITCH + channel, *past = pasts + s * (WIDTH - 1) * OWN + channel;
                    const float norm = scale[s];
                    const float v = norm * (at[0] + at[STREAMS * IN_PITCH]) + b_u, z = norm * (at[OWN] + at[OWN + STREAMS * IN_PITCH]) + b_z;
                    float sum = b_conv + w_conv[WIDTH - 1] * v, seen[WIDTH];
#pragma unroll
                    for (int k = 0; k < WIDTH - 1; k++) {
                        const int slot = oldest + k < WIDTH - 1 ? oldest + k : oldest + k - (WIDTH - 1);
                        seen[k] = past[slot * OWN], sum += w_conv[k] * seen[k];
                    }
                    seen[WIDTH - 1] = v;
                    sum *= sigmoid(sum);
                    u[s * U_PITCH + channel] = sum;
                    rounded[s * Y_PITCH + channel] = from_float(sum);
                    gate[s * U_PITCH + channel] = z * sigmoid(z);
                    // the newest takes the oldest one's place; the last step of a launch puts them in order
                    if (WIDTH > 1 && s < streams && step + 1 < p.count) conv[(s * (WIDTH - 1) + oldest) * INNER] = v;
                    if (s < streams && step + 1 == p.count)
#pragma unroll
                        for (int k = 0; k < WIDTH - 1; k++) conv[(s * (WIDTH - 1) + k) * INNER] = seen[k + 1];
                }
            }
            __syncthreads();
            // x_proj: 16 rows and 8 streams a warp
            ROLLED for (int i = thread() / 32; i < X_GROUPS * TILES && thread() / 32 < X_WARPS; i += X_WARPS) {
                float sum[4] = {};
                const int lane = thread() % 32;
                const elem* at = rounded + (i / X_GROUPS * 8 + lane % 8) * Y_PITCH + lane / 8 * 8;
                u32 v[4];
#pragma unroll
                for (int k = 0; k < X_UNITS; k += 2) {
                    load_columns(v, at + 16 * k);
                    mma(sum, w[k], v[0], v[1]);
                    mma(sum, w[k + 1], v[2], v[3]);
                }
                float* to = projected + (i / X_GROUPS * 8 + lane % 4 * 2) * X_PITCH + i % X_GROUPS * 16 + lane / 4;
                to[0] = sum[0], to[X_PITCH] = sum[1], to[8] = sum[2], to[X_PITCH + 8] = sum[3];
            }
            __syncthreads();
            // a stream's parts to one block
            ROLLED for (int i = thread(); i < streams * (X_ROWS / 4); i += THREADS) {
                const int s = i / (X_ROWS / 4), j = i % (X_ROWS / 4) * 4;
                remote_store(parts + (s / CLUSTER * CLUSTER + rank) * X_PITCH + j, s % CLUSTER, *(const float4*)(projected + s * X_PITCH + j), barriers + PARTS);
            }
            // what the recurrence and out_proj need
            uint4 out[OUT_UNITS];
            auto load_out = [&]() {
                const int tid = thread(), warp = tid / 32, lane = tid % 32;
                const uint4* w = (const uint4*)p.w_out + ((i64)((l * CLUSTER + rank) * SPLITS + warp / 2) * OUT_UNITS * 2 + warp % 2) * 32 + lane;
#pragma unroll
                for (int k = 0; k < OUT_UNITS; k++) if (warp / 2 < SPLITS) out[k] = load_weights(w + k * 2 * 32);
            };
            float a[OCTETS][4], w_dt[RANK], D, b_dt;
            {
                const int tid = thread(), warp = tid / 32, lane = tid % 32;
                const i64 here = (i64)l * INNER + rank * OWN + warp % 2 * HALF, own = here + lane % 4 * 8 + lane / 4;
#pragma unroll
                for (int q = 0; q < OCTETS; q++) load_weights(a[q], p.a + here * STATES + (q * 32 + lane) * 4);
                load_weights(w_dt, p.w_dt + own * RANK);
                D = load_weights(p.d + own), b_dt = load_weights(p.b_dt + own);
            }
            fetch_pasts(l + 1 < layers ? l + 1 : 0);
            meet<PARTS, false>(barriers, turn);
            ROLLED for (int tid = thread(), i = tid / CLUSTER; i - tid % 32 / CLUSTER < own_slots * (X_ROWS / 4); i += THREADS / CLUSTER) {  // whole warps
                const int r = tid % CLUSTER, at = i / (X_ROWS / 4), j = i % (X_ROWS / 4) * 4;
                float4 v = *(const float4*)(parts + (at < SLOTS ? at * CLUSTER + r : 0) * X_PITCH + j);
#pragma unroll
                for (int bit = 1; bit < CLUSTER; bit *= 2) {
                    v.x += lane_xor(v.x, bit); v.y += lane_xor(v.y, bit); v.z += lane_xor(v.z, bit); v.w += lane_xor(v.w, bit);
                }
                if (at < own_slots) remote_store(projected + (at * CLUSTER + rank) * X_PITCH + j, r, v, barriers + PROJECTED);
            }
            meet<PROJECTED>(barriers, turn);

            {  // dt_proj, recurrence, gate
                const int tid = thread(), lane = tid % 32, quarter = tid % 4, group = tid / 64, c = tid / 32 % 2 * HALF + quarter * 8 + lane / 4;
                const int items = warp_items();
                float* state = warp_state(l);
                const float* following = warp_state(l + 1 < layers ? l + 1 : 0);
                const float4* come = ring + tid / 32 * DEPTH * (OCTETS * 32) + lane;
                float delta, push, own_u, z, sums[OCTETS] = {}, last_u = 0.f, last_z = 0.f;
                // what the delta of channel c is made of, which is the lane's in octet `quarter`; behind the last stream: what lies there, for nobody
                float4 rows[RANK / 4];
                float next_u, next_z;
                auto look = [&](int item) {
                    const int mine = group + item * GROUPS;
#pragma unroll
                    for (int k = 0; k < RANK / 4; k++) rows[k] = *(const float4*)(projected + mine * X_PITCH + 4 * k);
                    next_u = u[mine * U_PITCH + c], next_z = gate[mine * U_PITCH + c];
                };
                auto prepare = [&]() {
                    float part[RANK / 4];
#pragma unroll
                    for (int k = 0; k < RANK / 4; k++) {
                        const float4 v = rows[k];
                        part[k] = w_dt[4 * k] * v.x; part[k] += w_dt[4 * k + 1] * v.y; part[k] += w_dt[4 * k + 2] * v.z; part[k] += w_dt[4 * k + 3] * v.w;
                    }
                    own_u = next_u, z = next_z;
#pragma unroll
                    for (int step = 1; step < RANK / 4; step *= 2)
#pragma unroll
                        for (int k = 0; k + step < RANK / 4; k += 2 * step) part[k] += part[k + step];
                    delta = softplus(part[0] + b_dt);
                    push = delta * own_u;
                };
                look(0);
                prepare();
                // y of the item before is added up and sent while the next item's states are computed
                float even, odd, whole;
                auto first_sums = [&]() {
                    even = quarter & 1 ? sums[1] : sums[0], odd = quarter & 1 ? sums[3] : sums[2];
                    even += lane_xor(quarter & 1 ? sums[0] : sums[1], 1);
                    odd += lane_xor(quarter & 1 ? sums[2] : sums[3], 1);
                };
                auto second_sums = [&]() {  // a lane gets the sum of channel c
                    whole = quarter & 2 ? odd : even;
                    whole += lane_xor(quarter & 2 ? even : odd, 2);
                    whole = (whole + D * last_u) * last_z;
                };
                float4 eight;
                auto gather = [&]() {  // and those of its octet, to send them
                    const float other = lane_xor(whole, 4), both = __uint_as_float(lane & 4 ? pack_bf16(other, whole) : pack_bf16(whole, other));
                    eight = make_float4(lane_from(both, quarter), lane_from(both, 8 + quarter), lane_from(both, 16 + quarter), lane_from(both, 24 + quarter));
                };
                auto send = [&](int item) {
                    float* to = (float*)(y + (rank * STREAMS + group + item * GROUPS) * Y_PITCH + tid / 32 % 2 * HALF + quarter * 8);
#pragma unroll
                    for (int r = 0; r < CLUSTER; r += 8) remote_store_if(item >= 0 && r + lane / 4 < CLUSTER, to, r + lane / 4, eight, barriers + OUTPUTS);
                };
                ROLLED for (int item = 0; item < items; item++) {
                    wait_batches<DEPTH - 1>();
                    __syncwarp();  // lanes are together, which the compiler cannot see
                    float h[OCTETS][4];
#pragma unroll
                    for (int q = 0; q < OCTETS; q++) {
                        float4 v = come[(slot * OCTETS + q) * 32];
                        h[q][0] = v.x; h[q][1] = v.y; h[q][2] = v.z; h[q][3] = v.w;
                    }
                    const float* at = projected + (group + item * GROUPS) * X_PITCH + RANK + quarter * 4;
                    const float4 B = *(const float4*)at, C = *(const float4*)(at + STATES);
                    const int further = item + DEPTH - items;  // 0 and more: of the next mixer
                    fetch(further < 0 ? state + DEPTH * ITEM : following + (DEPTH > 1 ? further * ITEM : 0));
                    slot = slot + 1 < DEPTH ? slot + 1 : 0;
                    first_sums();
                    float by[OCTETS], in[OCTETS];
#pragma unroll
                    for (int q = 0; q < OCTETS; q++) by[q] = lane_from(delta, lane - quarter + q), in[q] = lane_from(push, lane - quarter + q);
                    second_sums();
                    last_u = own_u, last_z = z;
#pragma unroll
                    for (int q = 0; q < OCTETS; q++) {
                        h[q][0] = exp2_fast(by[q] * a[q][0]) * h[q][0] + in[q] * B.x;
                        h[q][1] = exp2_fast(by[q] * a[q][1]) * h[q][1] + in[q] * B.y;
                        h[q][2] = exp2_fast(by[q] * a[q][2]) * h[q][2] + in[q] * B.z;
                        h[q][3] = exp2_fast(by[q] * a[q][3]) * h[q][3] + in[q] * B.w;
                        sums[q] = h[q][0] * C.x + h[q][1] * C.y + h[q][2] * C.z + h[q][3] * C.w;
                        if (q == 1) gather();
                    }
                    look(item + 1);
                    prepare();
                    send(item - 1);
#pragma unroll
                    for (int q = 0; q < OCTETS; q++) ((float4*)state)[q * 32 + lane] = make_float4(h[q][0], h[q][1], h[q][2], h[q][3]);
                    state += ITEM;
                }
                load_out();
                first_sums();
                second_sums();
                gather();
                send(items - 1);
            }
            load_in(l + 1 < layers ? l + 1 : 0);
            meet<OUTPUTS>(barriers, turn);
            {  // out_proj: a warp takes 16 rows and an eighth of the columns
                const int tid = thread(), lane = tid % 32, out_group = tid / 32 % 2, split = tid / 64;
                if (split < SPLITS) {
                    float sum[TILES][4] = {};
#pragma unroll
                    for (int k = 0; k < OUT_UNITS / 2; k++) {
                        const int two = split * (OUT_UNITS / 2) + k;
                        multiply_tiles<Y_PITCH>(sum, out[2 * k], out[2 * k + 1], y + (two / 2 * STREAMS + lane % 8) * Y_PITCH + two % 2 * 32 + lane / 8 * 8);
                    }
                    put_tiles<OUT_PITCH>(out_sums + split * STREAMS * OUT_PITCH + out_group * 16, sum);
                }
            }
            __syncthreads();
            {  // behind the last stream: what lies there, for nobody
                const int tid = thread(), own_stream = tid / 8, quad = tid % 8;
                if (own_stream - own_stream % 4 < streams) {  // of the warp's four streams one or more
                    const float4 v = add_splits<SPLITS>(out_sums + own_stream * OUT_PITCH + 4 * quad);
                    residual.x += v.x; residual.y += v.y; residual.z += v.z; residual.w += v.w;
                }
            }
            send_x();
        }

        // head, as out_proj; 32 rows at a time
        const int tid = thread(), warp = tid / 32, lane = tid % 32, out_group = warp % 2, split = warp / 2;
        const int own_stream = tid / 8, quad = tid % 8;
        const uint4* head = (const uint4*)p.head + (i64)rank * UNITS * (HEAD_ROWS / 16) * 32 + lane;
        uint4 w[HEAD_UNITS];
#pragma unroll
        for (int k = 0; k < HEAD_UNITS; k++)
            if (split < HEAD_SPLITS) w[k] = load_weights(head + ((split * HEAD_UNITS + k) * (HEAD_ROWS / 16) + out_group) * 32);
        meet_x(turn + (u32)step);
        ROLLED for (int part = 0; part < HEAD_ROWS / 32; part++) {
            if (split < HEAD_SPLITS) {
                float sum[TILES][4] = {};
                if (part)
#pragma unroll
                    for (int k = 0; k < HEAD_UNITS; k++) w[k] = load_weights(head + ((split * HEAD_UNITS + k) * (HEAD_ROWS / 16) + 2 * part + out_group) * 32);
#pragma unroll
                for (int k = 0; k < HEAD_UNITS / 2; k++)
                    multiply_tiles<S_PITCH>(sum, w[2 * k], w[2 * k + 1], x + ((split * (HEAD_UNITS / 2) + k) * STREAMS + lane % 8) * S_PITCH + lane / 8 * 8);
                put_tiles<OUT_PITCH>(out_sums + split * STREAMS * OUT_PITCH + out_group * 16, sum);
            }
            __syncthreads();
            if (own_stream < streams) {
                float4 v = add_splits<HEAD_SPLITS>(out_sums + own_stream * OUT_PITCH + 4 * quad);
                const int at = rank * HEAD_ROWS + 32 * part + 4 * quad;
                const float norm = scale[own_stream];
                v.x = norm * v.x + (at < VOCAB ? __ldg(p.head_bias + at) : 0.f);
                v.y = norm * v.y + (at + 1 < VOCAB ? __ldg(p.head_bias + at + 1) : 0.f);
                v.z = norm * v.z + (at + 2 < VOCAB ? __ldg(p.head_bias + at + 2) : 0.f);
                v.w = norm * v.w + (at + 3 < VOCAB ? __ldg(p.head_bias + at + 3) : 0.f);
                remote_store(logits + own_stream / CLUSTER * (CLUSTER * HEAD_ROWS) + at, own_stream % CLUSTER, v, barriers + LOGITS);
            }
            __syncthreads();
        }
        meet<LOGITS, false>(barriers, (u32)step);
        for (int i = warp; i < own_slots; i += WARPS) {
            const int s = i * CLUSTER + rank;
            const i64 place = (i64)(first + s) * p.count + step;
            const float* mine = logits + i * CLUSTER * HEAD_ROWS;
            float normaliser;
            int drawn = draw(VOCAB, (int)p.top_k, settings, mine, weights + i * CLUSTER * HEAD_ROWS, uniform(p.keys[first + s], p.position + step), &normaliser);
            if (p.forced) drawn = (int)p.forced[place];
            if (lane == 0) {
                p.out[place] = drawn;
                p.log_probs[place] = mine[drawn] - normaliser;
            }
            const float v = __uint_as_float((u32)drawn);
            if (lane < CLUSTER) remote_store((float*)(tokens + s), lane, make_float4(v, v, v, v), barriers + TOKENS);
        }
        meet<TOKENS>(barriers, (u32)step);
    }
    wait_batches<0>();
    cluster_barrier();  // nobody leaves while others may send to it
}
