// One token of many streams, three kernels a mixer, each over all streams, so that a matrix is read a few times for hundreds of
// streams and all multiprocessors move states:
//
//     mixer_in     norm, in_proj, convolution, gate     64 rows of in_proj and IN_STREAMS streams a block
//     mixer_scan   x_proj, dt_proj, recurrence, gate    4 streams a block, all channels
//     mixer_out    out_proj, residual                   32 rows and OUT_STREAMS streams a block
//     finish       norm, head, drawing, embedding       8 streams a block
//
// Each may start while the one before runs (programmatic dependent launch): it then asks for its weights and states, which no other
// kernel of the token writes, and waits before it touches anything else. `finish` lets nobody start early, so states
// of the token before are always complete.
//
// Products run on tensor cores as in persistent.cu: bfloat16 weights with rounded activations, float32 ones as three products of tf32
// parts. Weights lie as [tile][16 or 8 of k][16 rows][lane], 16 bytes a lane.
//
// Set from outside: D_MODEL (a multiple of 32), INNER (of 64), RANK (of 8), VOCAB, STATES (n, a multiple of 16), WIDTH (of the convolution),
// BF16, IN_TILES, OUT_TILES (1 or 2), DEPTH (items of states that a thread has on their way).

#include "decode/draw.cuh"

struct Params {
    const char *w_in, *w_x, *w_dt, *w_out;  // packed
    const float *b_in, *w_conv, *b_conv, *b_dt, *a, *d, *b_out;
    float *conv, *ssm;       // (b WIDTH-1 inner), (b inner STATES)
    float* x;                // (b d_model), the residual stream
    elem* rounded;           // the same, as products take it: x itself if float32
    float *u, *gate;         // (b inner)
    elem* y;                 // (b inner)
    const float* shift;      // (b d_model), added to x for the next mixer, or 0
    const char* head;        // packed
    const float* head_bias;  // (vocab), -inf for what may not be drawn
    const float* embedding;  // (vocab d_model)
    const float* base;       // (b d_model), added to the embedding, or 0
    const float* settings;   // epsilon, temperature, top_p
    const i64* numbers;      // position, top_k, whether tokens are given
    const i64* keys;         // (b)
    const i64* forced;       // (b room)
    i64* out;                // (b room)
    float* log_probs;        // (b room)
    i64* steps;              // one a block of `finish`: tokens made in this run
    i64 batch, room;
};

#define UNIT (BF16 ? 16 : 8)  // columns that are worked on at a time
#define EACH (STATES / 4)     // states of a lane
#define X_GROUPS ((RANK + 2 * STATES + 15) / 16)  // 16 rows of x_proj each
#define X_ROWS (16 * X_GROUPS)
#define ITEMS ((4 * INNER + SCAN_THREADS - 1) / SCAN_THREADS)  // of a thread: a quarter of a channel's states, of all streams
// Numbers of a row of k in a tile: rows begin a quarter of the banks apart.
#define PITCH(k) ((BF16 ? ((k) + 63) / 64 * 64 : ((k) + 31) / 32 * 32) + 8)
#define IN_STREAMS (32 * IN_TILES)
#define OUT_STREAMS (16 * OUT_TILES)
#define SCAN_THREADS 512
#define SCAN_WARPS (SCAN_THREADS / 32)
#ifndef SCAN_BLOCKS
#define SCAN_BLOCKS 2  // registers for so many, so that other kernels find room beside it
#endif
#define TOGETHER 4  // streams of a block's scan

#ifndef SEQLAB_EMULATED
#if __CUDA_ARCH__ >= 900
DEVICE void next_may_begin() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
DEVICE void wait_for_earlier() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
#else
DEVICE void next_may_begin() {}
DEVICE void wait_for_earlier() {}
#endif
DEVICE void fetch16(void* to, const void* from) { copy16(to, from); }
// Past the first-level cache, which does not see what other kernels write meanwhile.
DEVICE float fresh(const float* p) { float v; asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(v) : "l"(p)); return v; }
DEVICE float4 fresh4(const float* p) {
    float4 v;
    asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "l"(p));
    return v;
}
// Here and not where the compiler would like it.
DEVICE uint4 load_now(const uint4* p) {
    uint4 v;
    asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
    return v;
}
#else
DEVICE void next_may_begin() {}
DEVICE void wait_for_earlier() {}
DEVICE void fetch16(void* to, const void* from) { copy_bytes<16>(to, from); }
DEVICE float fresh(const float* p) { return *p; }
DEVICE float4 fresh4(const float* p) { return *(const float4*)p; }
DEVICE uint4 load_now(const uint4* p) { return *p; }
#endif

// Fragments of 16 rows and UNIT columns of weights, and of UNIT rows and 8 streams of activations: lane 4 g + t has rows g, g + 8 and
// stream g, columns 2t, 2t + 1, for bfloat16 also those 8 further on.
struct ExactRows { float v[4], rest[4]; };
struct ExactColumns { float v[2], rest[2]; };
DEVICE float tf32_part(float v) { return __uint_as_float(__float_as_uint(v) & 0xffffe000u); }
DEVICE ExactRows exact_rows(uint4 a) {
    const float whole[4] = {__uint_as_float(a.x), __uint_as_float(a.y), __uint_as_float(a.z), __uint_as_float(a.w)};
    ExactRows r;
#pragma unroll
    for (int i = 0; i < 4; i++) r.v[i] = tf32_part(whole[i]), r.rest[i] = whole[i] - r.v[i];
    return r;
}
DEVICE ExactColumns exact_columns(const float* x) {
    float2 b = *(const float2*)x;
    ExactColumns c;
    c.v[0] = tf32_part(b.x), c.rest[0] = b.x - c.v[0];
    c.v[1] = tf32_part(b.y), c.rest[1] = b.y - c.v[1];
    return c;
}
DEVICE void multiply(float (&sum)[4], const ExactRows& a, const ExactColumns& b) {
    float part[4] = {0.f, 0.f, 0.f, 0.f};  // tensor cores cut sums off instead of rounding them: long ones are made here
    sum_lanes(part, a.rest[0], a.rest[1], a.rest[2], a.rest[3], b.v[0], b.v[1]);
    sum_lanes(part, a.v[0], a.v[1], a.v[2], a.v[3], b.rest[0], b.rest[1]);
    sum_lanes(part, a.v[0], a.v[1], a.v[2], a.v[3], b.v[0], b.v[1]);
#pragma unroll
    for (int i = 0; i < 4; i++) sum[i] += part[i];
}
#if BF16
struct Rows { uint4 a; };
struct Columns { u32 low, high; };
DEVICE Rows rows_of(uint4 a) { return {a}; }
DEVICE Columns columns_of(const elem* x) { return {*(const u32*)x, *(const u32*)(x + 8)}; }
DEVICE Columns columns_of(const float* x) {
    float2 low = *(const float2*)x, high = *(const float2*)(x + 8);
    return {pack_bf16(low.x, low.y), pack_bf16(high.x, high.y)};
}
DEVICE void multiply(float (&sum)[4], const Rows& a, const Columns& b) { mma(sum, a.a, b.low, b.high); }
#else
typedef ExactRows Rows;
typedef ExactColumns Columns;
DEVICE Rows rows_of(uint4 a) { return exact_rows(a); }
DEVICE Columns columns_of(const float* x) { return exact_columns(x); }
#endif

// Asks for PIECES times 16 bytes in one piece.
template <int PIECES, int THREADS> DEVICE void fetch(void* to, const void* from) {
#pragma unroll
    for (int n = 0; n < (PIECES + THREADS - 1) / THREADS; n++) {
        int i = threadIdx.x + n * THREADS;
        if (PIECES % THREADS == 0 || i < PIECES) fetch16((uint4*)to + i, (const uint4*)from + i);
    }
}
// Asks for the rows (K numbers) of COUNT streams from `first` on; behind the last stream its row comes again.
template <int K, int COUNT, int THREADS> DEVICE void fetch_rows(elem* to, const elem* from, int first, int batch) {
    constexpr int PER = K * (int)sizeof(elem) / 16;
#pragma unroll
    for (int n = 0; n < (COUNT * PER + THREADS - 1) / THREADS; n++) {
        int i = threadIdx.x + n * THREADS, s = i / PER, j = i % PER, row = first + s < batch ? first + s : batch - 1;
        if (COUNT * PER % THREADS == 0 || i < COUNT * PER)
            fetch16((char*)to + s * PITCH(K) * (int)sizeof(elem) + 16 * j, (const char*)from + (i64)row * (K * (int)sizeof(elem)) + 16 * j);
    }
}

// sum[g][t] += 16 rows (group g) x 8 streams (tile t), UNITS units. w: the lane's first fragment; x: the lane's stream and columns.
template <int G, int T, int UNITS, int GROUPS, int PITCH> DEVICE void accumulate(float (&sum)[G][T][4], const uint4* w, const elem* x) {
#pragma unroll 4
    for (int k = 0; k < UNITS; k++) {
        Rows a[G];
#pragma unroll
        for (int g = 0; g < G; g++) a[g] = rows_of(w[(k * GROUPS + g) * 32]);
#pragma unroll
        for (int t = 0; t < T; t++) {
            Columns b = columns_of(x + 8 * t * PITCH + UNIT * k);
#pragma unroll
            for (int g = 0; g < G; g++) multiply(sum[g][t], a[g], b);
        }
    }
}

// The squares of 16 bytes of a row.
DEVICE float squares(const elem* x) {
#if BF16
    uint4 v = *(const uint4*)x;
    const u32 word[4] = {v.x, v.y, v.z, v.w};
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < 4; i++) sum += bf16_low(word[i]) * bf16_low(word[i]), sum += bf16_high(word[i]) * bf16_high(word[i]);
    return sum;
#else
    float4 v = *(const float4*)x;
    return v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
#endif
}

// 8 warps: 2 x 2 groups of rows, 4 x IN_TILES tiles of streams.
KERNEL BOUNDS(256, 2) mixer_in(const Params p) {
    SHARED_FLOATS(shared);
    constexpr int UNITS = D_MODEL / UNIT, TILES = 2 * INNER / 64, PER = 256 / IN_STREAMS;
    const int batch = p.batch, tile = blockIdx.x % TILES, first = blockIdx.x / TILES * IN_STREAMS;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, part = warp % 2, quarter = warp / 2;
    uint4* weights = (uint4*)shared;
    elem* x = (elem*)(weights + UNITS * 4 * 32);
    float* scale = (float*)(x + IN_STREAMS * PITCH(D_MODEL));
    float *bias = scale + IN_STREAMS, *b_conv = bias + 64, *w_conv = b_conv + 64;  // of this tile's rows
    const bool is_u = tile * 64 < INNER;
    next_may_begin();
    fetch<UNITS * 4 * 32, 256>(weights, p.w_in + (i64)tile * UNITS * 4 * 512);
    const int piece = threadIdx.x;
    if (piece < 16) fetch16(bias + 4 * piece, p.b_in + tile * 64 + 4 * piece);
    else if (is_u && piece < 32) fetch16(b_conv + 4 * (piece - 16), p.b_conv + tile * 64 + 4 * (piece - 16));
    else if (is_u && piece < 32 + 16 * WIDTH) fetch16(w_conv + 4 * (piece - 32), p.w_conv + tile * 64 * WIDTH + 4 * (piece - 32));
    const int own = part * 32 + lane / 4, stream = first + quarter * 8 * IN_TILES + lane % 4 * 2;  // of 16 g + 8 half, 8 t + i more
    float* conv = p.conv + (i64)stream * (WIDTH - 1) * INNER + tile * 64 + own;
    float past[2][IN_TILES][4][WIDTH - 1];
    if (is_u) {
#pragma unroll
        for (int t = 0; t < IN_TILES; t++)
#pragma unroll
            for (int i = 0; i < 2; i++)
                if (stream + 8 * t + i < batch)
#pragma unroll
                    for (int g = 0; g < 4; g++)
#pragma unroll
                        for (int k = 0; k < WIDTH - 1; k++)
                            past[g / 2][t][g % 2 * 2 + i][k] = fresh(conv + ((8 * t + i) * (WIDTH - 1) + k) * INNER + 8 * g);
    }
    wait_for_earlier();
    fetch_rows<D_MODEL, IN_STREAMS, 256>(x, p.rounded, first, batch);
    end_batch();
    wait_batches<0>();
    __syncthreads();
    {
        const elem* row = x + threadIdx.x / PER * PITCH(D_MODEL) + threadIdx.x % PER * (16 / (int)sizeof(elem));
        float v = 0.f;
#pragma unroll 8
        for (int i = 0; i < D_MODEL * (int)sizeof(elem) / 16; i += PER)
            if (i + (int)threadIdx.x % PER < D_MODEL * (int)sizeof(elem) / 16) v += squares(row + i * (16 / (int)sizeof(elem)));
#pragma unroll
        for (int bit = 1; bit < PER; bit *= 2) v += lane_xor(v, bit);
        if (threadIdx.x % PER == 0) scale[threadIdx.x / PER] = rsqrtf(v * (1.f / D_MODEL) + p.settings[0]);
    }
    float sum[2][IN_TILES][4] = {};
    accumulate<2, IN_TILES, UNITS, 4, PITCH(D_MODEL)>(sum, weights + part * 2 * 32 + lane, x + (quarter * 8 * IN_TILES + lane / 4) * PITCH(D_MODEL) + lane % 4 * 2);
    __syncthreads();
    float* to = (is_u ? p.u : p.gate - INNER) + (i64)stream * INNER + tile * 64 + own;
#pragma unroll
    for (int g = 0; g < 4; g++) {
        const int row = own + 8 * g;
        const float v_bias = bias[row], u_bias = is_u ? b_conv[row] : 0.f;
        float weight[WIDTH];
#pragma unroll
        for (int k = 0; k < WIDTH; k++) weight[k] = is_u ? w_conv[row * WIDTH + k] : 0.f;
#pragma unroll
        for (int t = 0; t < IN_TILES; t++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                if (stream + 8 * t + i >= batch) continue;
                float v = scale[stream - first + 8 * t + i] * sum[g / 2][t][g % 2 * 2 + i] + v_bias, u = v;
                if (is_u) {
                    const float* before = past[g / 2][t][g % 2 * 2 + i];
                    u = u_bias + weight[WIDTH - 1] * v;
#pragma unroll
                    for (int k = 0; k < WIDTH - 1; k++) u += weight[k] * before[k];
#pragma unroll
                    for (int k = 0; k < WIDTH - 1; k++)
                        conv[((8 * t + i) * (WIDTH - 1) + k) * INNER + 8 * g] = k + 1 < WIDTH - 1 ? before[k + 1] : v;
                }
                to[(8 * t + i) * INNER + 8 * g] = u * sigmoid(u);
            }
    }
}

// Asks for this thread's item j. states: the thread's first state of the block's first stream.
DEVICE void fetch_states(float4* queue, const float* states, int streams, int j) {
    if (j < ITEMS && (4 * INNER % SCAN_THREADS == 0 || (int)threadIdx.x + j * SCAN_THREADS < 4 * INNER)) {
        float4* to = queue + (j % DEPTH) * TOGETHER * (EACH / 4) * SCAN_THREADS + threadIdx.x;
#pragma unroll
        for (int q = 0; q < TOGETHER; q++)
            if (q < streams)
#pragma unroll
                for (int i = 0; i < EACH / 4; i++)
                    fetch16(to + (q * (EACH / 4) + i) * SCAN_THREADS, states + j * SCAN_THREADS * EACH + q * INNER * STATES + 4 * i);
    }
    end_batch();
}
template <int N> DEVICE void load_floats(float (&v)[N], const float* at) {
#pragma unroll
    for (int i = 0; i < N; i += 4) {
        float4 a = *(const float4*)(at + i);
        v[i] = a.x; v[i + 1] = a.y; v[i + 2] = a.z; v[i + 3] = a.w;
    }
}

KERNEL BOUNDS(SCAN_THREADS, SCAN_BLOCKS) mixer_scan(const Params p) {
    SHARED_FLOATS(shared);
    constexpr int P = INNER + 8, R_PITCH = X_ROWS + 4, UNITS = INNER / UNIT, ROUNDS = (UNITS + SCAN_WARPS - 1) / SCAN_WARPS;
    const int first = blockIdx.x * TOGETHER, streams = (int)p.batch - first < TOGETHER ? (int)p.batch - first : TOGETHER;
    const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32, row = lane / 4, pair = lane % 4 * 2;
    float4* queue = (float4*)shared;
    float* u = shared + DEPTH * TOGETHER * EACH * SCAN_THREADS;
    float* gate = u + TOGETHER * P;
    float* projected = gate + TOGETHER * P;
    float* part = projected + TOGETHER * R_PITCH;  // of x_proj, (warp stream row); later dt
    float* dt = part;
    float* states = p.ssm + (i64)first * INNER * STATES + tid * EACH;  // items: channel, then lane
    next_may_begin();
#pragma unroll
    for (int j = 0; j < DEPTH; j++) fetch_states(queue, states, streams, j);
    const uint4* w_x = (const uint4*)p.w_x + lane;  // [unit][group][lane]
    uint4 early[2][X_GROUPS];
#pragma unroll
    for (int n = 0; n < 2 && n < ROUNDS; n++)
#pragma unroll
        for (int g = 0; g < X_GROUPS; g++)
            if (warp + n * SCAN_WARPS < UNITS) early[n][g] = load_now(w_x + ((warp + n * SCAN_WARPS) * X_GROUPS + g) * 32);
    float a[EACH], a_next[EACH], D_next = 0.f;
    if (tid < 4 * INNER) load_floats(a_next, p.a + tid * EACH), D_next = p.d[tid / 4];
    wait_for_earlier();

    constexpr int QUADS = TOGETHER * INNER / 4;
#pragma unroll
    for (int n = 0; n < (QUADS + SCAN_THREADS - 1) / SCAN_THREADS; n++) {
        const int i = tid + n * SCAN_THREADS, q = i / (INNER / 4), j = i % (INNER / 4) * 4;
        if (QUADS % SCAN_THREADS && i >= QUADS) break;
        float4 v = make_float4(0.f, 0.f, 0.f, 0.f), z = v;
        if (q < streams) v = fresh4(p.u + ((i64)first + q) * INNER + j), z = fresh4(p.gate + ((i64)first + q) * INNER + j);
        *(float4*)(u + q * P + j) = v;
        *(float4*)(gate + q * P + j) = z;
    }
    __syncthreads();
    {  // x_proj: a warp takes every SCAN_WARPS-th unit of all rows; only streams 0 to 3 of the tile are there
        float sum[X_GROUPS][4] = {};
        const float* mine = u + row % TOGETHER * P + pair + UNIT * warp;
#pragma unroll
        for (int n = 0; n < ROUNDS; n++) {
            if (warp + n * SCAN_WARPS >= UNITS) break;
            Columns b = columns_of(mine + UNIT * n * SCAN_WARPS);
#pragma unroll
            for (int g = 0; g < X_GROUPS; g++)
                multiply(sum[g], rows_of(n < 2 ? early[n < 2 ? n : 0][g] : __ldg(w_x + ((warp + n * SCAN_WARPS) * X_GROUPS + g) * 32)), b);
        }
        if (pair < TOGETHER) {
            float* at = part + (warp * TOGETHER + pair) * X_ROWS + row;
#pragma unroll
            for (int g = 0; g < X_GROUPS; g++)
#pragma unroll
                for (int i = 0; i < 4; i++) at[i % 2 * X_ROWS + 16 * g + i / 2 * 8] = sum[g][i];
        }
    }
    // dt_proj's weights while the sums are on their way; float32 whatever the matrices are
    constexpr int GROUPS = INNER / 16;
    const uint4* w_dt = (const uint4*)p.w_dt + warp * 32 + lane;
    uint4 first_dt[RANK / 8];
#pragma unroll
    for (int k = 0; k < RANK / 8; k++) if (warp < GROUPS) first_dt[k] = __ldg(w_dt + k * GROUPS * 32);
    __syncthreads();
#pragma unroll
    for (int n = 0; n < (TOGETHER * X_ROWS + SCAN_THREADS - 1) / SCAN_THREADS; n++) {
        const int i = tid + n * SCAN_THREADS;
        if (i >= TOGETHER * X_ROWS) break;
        float v = 0.f;
#pragma unroll
        for (int w = 0; w < SCAN_WARPS; w++) v += part[w * TOGETHER * X_ROWS + i];
        projected[i / X_ROWS * R_PITCH + i % X_ROWS] = v;
    }
    __syncthreads();
#pragma unroll
    for (int n = 0; n < (GROUPS + SCAN_WARPS - 1) / SCAN_WARPS; n++) {
        const int group = warp + n * SCAN_WARPS;
        if (group >= GROUPS) break;
        float sum[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
        for (int k = 0; k < RANK / 8; k++)
            multiply(sum, exact_rows(n ? __ldg(w_dt + (k * GROUPS + n * SCAN_WARPS) * 32) : first_dt[k]), exact_columns(projected + row % TOGETHER * R_PITCH + 8 * k + pair));
        if (pair < TOGETHER) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                int c = group * 16 + row + i / 2 * 8;
                dt[(pair + i % 2) * P + c] = softplus(sum[i] + __ldg(p.b_dt + c));
            }
        }
    }
    __syncthreads();

    const int own = tid % 4;
    elem* out = p.y + ((i64)first + own) * INNER + tid / 4;
#pragma unroll
    for (int j = 0; j < ITEMS; j++) {
        const int item = tid + j * SCAN_THREADS, c = tid / 4 + j * (SCAN_THREADS / 4);
        if (4 * INNER % SCAN_THREADS && item >= 4 * INNER) break;  // a whole warp
        float D = D_next, h[TOGETHER][EACH], y[TOGETHER];
#pragma unroll
        for (int i = 0; i < EACH; i++) a[i] = a_next[i];
        if (j + 1 < ITEMS && item + SCAN_THREADS < 4 * INNER)
            load_floats(a_next, p.a + (item + SCAN_THREADS) * EACH), D_next = p.d[c + SCAN_THREADS / 4];
        wait_batches<DEPTH - 1>();
        const float4* mine = queue + (j % DEPTH) * TOGETHER * (EACH / 4) * SCAN_THREADS + tid;
#pragma unroll
        for (int q = 0; q < TOGETHER; q++)
#pragma unroll
            for (int i = 0; i < EACH; i += 4) {
                float4 v = mine[(q * (EACH / 4) + i / 4) * SCAN_THREADS];
                h[q][i] = v.x; h[q][i + 1] = v.y; h[q][i + 2] = v.z; h[q][i + 3] = v.w;
            }
        fetch_states(queue, states, streams, j + DEPTH);
#pragma unroll
        for (int q = 0; q < TOGETHER; q++) {
            float B[EACH], C[EACH], step = dt[q * P + c], push = step * u[q * P + c];
            load_floats(B, projected + q * R_PITCH + RANK + own * EACH);
            load_floats(C, projected + q * R_PITCH + RANK + STATES + own * EACH);
            y[q] = 0.f;
#pragma unroll
            for (int i = 0; i < EACH; i++) {
                h[q][i] = exp2_fast(step * a[i]) * h[q][i] + push * B[i];
                y[q] += h[q][i] * C[i];
            }
        }
        float* state = states + j * SCAN_THREADS * EACH;
#pragma unroll
        for (int q = 0; q < TOGETHER; q++)
            if (q < streams)
#pragma unroll
                for (int i = 0; i < EACH; i += 4) *(float4*)(state + q * INNER * STATES + i) = make_float4(h[q][i], h[q][i + 1], h[q][i + 2], h[q][i + 3]);
        // a lane gets the sums of its stream
        float even = own & 1 ? y[1] : y[0], odd = own & 1 ? y[3] : y[2];
        even += lane_xor(own & 1 ? y[0] : y[1], 1);
        odd += lane_xor(own & 1 ? y[2] : y[3], 1);
        float whole = own & 2 ? odd : even;
        whole += lane_xor(own & 2 ? even : odd, 2);
        whole = (whole + D * u[own * P + c]) * gate[own * P + c];
        if (own < streams) out[j * (SCAN_THREADS / 4)] = from_float(whole);
    }
}

// 8 warps: 2 groups of rows, 2 x OUT_TILES tiles of streams, 2 halves of the columns.
KERNEL BOUNDS(256, 2) mixer_out(const Params p) {
    SHARED_FLOATS(shared);
    constexpr int UNITS = INNER / UNIT, TILES = D_MODEL / 32, P = PITCH(INNER);
    const int batch = p.batch, tile = blockIdx.x % TILES, first = blockIdx.x / TILES * OUT_STREAMS;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = warp % 2, side = warp / 2 % 2, half = warp / 4;
    uint4* weights = (uint4*)shared;
    elem* y = (elem*)(weights + UNITS * 2 * 32);
    float* other = (float*)(y + OUT_STREAMS * P);  // sums of the second half
    next_may_begin();
    fetch<UNITS * 2 * 32, 256>(weights, p.w_out + (i64)tile * UNITS * 2 * 512);
    const int row = tile * 32 + group * 16 + lane / 4, stream = first + side * 8 * OUT_TILES + lane % 4 * 2;
    const i64 at = (i64)stream * D_MODEL + row;
    wait_for_earlier();
    fetch_rows<INNER, OUT_STREAMS, 256>(y, p.y, first, batch);
    end_batch();
    float before[OUT_TILES][4];
#pragma unroll
    for (int t = 0; t < OUT_TILES; t++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int further = (8 * t + i % 2) * D_MODEL + i / 2 * 8;
            before[t][i] = 0.f;
            if (half == 0 && stream + 8 * t + i % 2 < batch)
                before[t][i] = fresh(p.x + at + further) + __ldg(p.b_out + row + i / 2 * 8) + (p.shift ? __ldg(p.shift + at + further) : 0.f);
        }
    wait_batches<0>();
    __syncthreads();
    float sum[1][OUT_TILES][4] = {};
    accumulate<1, OUT_TILES, UNITS / 2, 2, P>(sum, weights + (half * (UNITS / 2) * 2 + group) * 32 + lane,
                                              y + (side * 8 * OUT_TILES + lane / 4) * P + lane % 4 * 2 + half * (UNITS / 2) * UNIT);
    float* mine = other + (warp % 4 * 32 + lane) * 4 * OUT_TILES;
    if (half) {
#pragma unroll
        for (int t = 0; t < OUT_TILES; t++) *(float4*)(mine + 4 * t) = make_float4(sum[0][t][0], sum[0][t][1], sum[0][t][2], sum[0][t][3]);
    }
    __syncthreads();
    if (half) return;
#pragma unroll
    for (int t = 0; t < OUT_TILES; t++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int further = (8 * t + i % 2) * D_MODEL + i / 2 * 8;
            if (stream + 8 * t + i % 2 >= batch) continue;
            float v = before[t][i] + (sum[0][t][i] + mine[4 * t + i]);
            p.x[at + further] = v;
#if BF16
            p.rounded[at + further] = from_float(v);
#endif
        }
}

KERNEL BOUNDS(512, 1) finish(const Params p) {
    SHARED_FLOATS(shared);
    constexpr int UNITS = D_MODEL / UNIT, P = (D_MODEL + 31) / 32 * 32 + 8, GROUPS = (VOCAB + 15) / 16, V_PITCH = GROUPS * 16 + 4;
    constexpr int EARLY = UNITS < 8 ? UNITS : 8;  // units of a warp's first rows that it asks for before it waits
    const int first = blockIdx.x * 8, streams = (int)p.batch - first < 8 ? (int)p.batch - first : 8;
    const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32, row = lane / 4, pair = lane % 4 * 2;
    float* x = shared;
    float* scale = x + 8 * P;
    int* token = (int*)(scale + 8);
    float* logits = scale + 16;
    float* weights = logits + 8 * V_PITCH;
    const uint4* head = (const uint4*)p.head + lane;
    uint4 early[EARLY];
#pragma unroll
    for (int k = 0; k < EARLY; k++) if (warp < GROUPS) early[k] = load_now(head + (k * GROUPS + warp) * 32);
    wait_for_earlier();
    const i64 step = *(volatile i64*)(p.steps + blockIdx.x), position = p.numbers[0] + step;
#pragma unroll
    for (int n = 0; n < (8 * D_MODEL / 4 + 511) / 512; n++) {
        const int i = tid + n * 512, s = i / (D_MODEL / 4), j = i % (D_MODEL / 4) * 4;
        if (8 * D_MODEL / 4 % 512 && i >= 8 * D_MODEL / 4) break;
        *(float4*)(x + s * P + j) = s < streams ? fresh4(p.x + ((i64)first + s) * D_MODEL + j) : make_float4(0.f, 0.f, 0.f, 0.f);
    }
    __syncthreads();
    if (warp < 8) {
        float v = 0.f;
#pragma unroll
        for (int i = 0; i < D_MODEL; i += 32) { float f = x[warp * P + i + lane]; v += f * f; }
        v = warp_sum(v);
        if (lane == 0) scale[warp] = rsqrtf(v * (1.f / D_MODEL) + p.settings[0]);
    }
    __syncthreads();
    for (int group = warp; group < GROUPS; group += 16) {
        const uint4* w = head + group * 32;
        float sum[4] = {0.f, 0.f, 0.f, 0.f};
        uint4 now[EARLY];
#pragma unroll
        for (int k = 0; k < EARLY; k++) now[k] = group == warp ? early[k] : __ldg(w + k * GROUPS * 32);
#pragma unroll
        for (int k = 0; k < EARLY; k++) multiply(sum, rows_of(now[k]), columns_of((const float*)(x + row * P + UNIT * k + pair)));
#pragma unroll 8
        for (int k = EARLY; k < UNITS; k++) multiply(sum, rows_of(__ldg(w + k * GROUPS * 32)), columns_of((const float*)(x + row * P + UNIT * k + pair)));
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int v = group * 16 + row + i / 2 * 8, s = pair + i % 2;
            if (v < VOCAB) logits[s * V_PITCH + v] = scale[s] * sum[i] + p.head_bias[v];
        }
    }
    __syncthreads();
    if (warp < streams) {
        i64 s = first + warp, place = s * p.room + step;
        float normaliser;
        const float* mine = logits + warp * V_PITCH;
        int drawn = draw(VOCAB, (int)p.numbers[1], p.settings, mine, weights + warp * V_PITCH, uniform(p.keys[s], position), &normaliser);
        if (p.numbers[2]) drawn = (int)p.forced[place];
        if (lane == 0) {
            token[warp] = drawn;
            p.out[place] = drawn;
            p.log_probs[place] = mine[drawn] - normaliser;
        }
    }
    __syncthreads();
    if (tid == 0) p.steps[blockIdx.x] = step + 1;
#pragma unroll
    for (int n = 0; n < (8 * D_MODEL + 511) / 512; n++) {
        const int i = tid + n * 512, s = i / D_MODEL, j = i % D_MODEL;
        if (s >= streams) break;
        const i64 at = ((i64)first + s) * D_MODEL + j;
        float v = __ldg(p.embedding + (i64)token[s] * D_MODEL + j);
        if (p.base) v += __ldg(p.base + at);
        if (p.shift) v += __ldg(p.shift + at);
        p.x[at] = v;
#if BF16
        p.rounded[at] = from_float(v);
#endif
    }
}
