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
// Set from outside: STATES (n, a multiple of 16), WIDTH (of the convolution), BF16, IN_TILES, OUT_TILES (1 or 2), X_GROUPS (16 rows
// each, of x_proj), DEPTH (items of states that a thread has on their way).

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
    i64 batch, d_model, inner, rank, vocab, room;
};

#define UNIT (BF16 ? 16 : 8)  // columns that are worked on at a time
#define EACH (STATES / 4)     // states of a lane
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
DEVICE float fresh(const float* p) { float v; asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(v) : "l"(p) : "memory"); return v; }
DEVICE float4 fresh4(const float* p) {
    float4 v;
    asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "l"(p) : "memory");
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

DEVICE int tile_pitch(int k) { return (BF16 ? round_up(k, 64) : round_up(k, 32)) + 8; }  // rows a quarter of the banks apart

// Asks for one tile of weights: its units x GROUPS x 512 bytes are one piece.
template <int GROUPS> DEVICE void fetch_weights(uint4* to, const char* from, int tile, int units) {
    const uint4* at = (const uint4*)from + (i64)tile * units * GROUPS * 32;
    for (int i = threadIdx.x; i < units * GROUPS * 32; i += 256) fetch16(to + i, at + i);
}
// Asks for the rows of streams first, first + 1, ...; behind the last stream its row comes again.
DEVICE void fetch_rows(elem* to, const elem* from, int first, int count, int batch, int k) {
    const int per = k * (int)sizeof(elem) / 16, pitch = tile_pitch(k);
    for (int i = threadIdx.x; i < count * per; i += 256) {
        int s = quotient(i, per), j = i - s * per, row = first + s < batch ? first + s : batch - 1;
        fetch16((char*)(to + s * pitch) + 16 * j, (const char*)(from + (i64)row * k) + 16 * j);
    }
}

// sum[g][t] += 16 rows (group g) x 8 streams (tile t), units k to end. w: the lane's first fragment; x: the lane's stream and columns.
template <int G, int T> DEVICE void accumulate(float (&sum)[G][T][4], const uint4* w, int groups, const elem* x, int pitch, int k, int end) {
#pragma unroll 2
    for (; k < end; k++) {
        Rows a[G];
#pragma unroll
        for (int g = 0; g < G; g++) a[g] = rows_of(w[(k * groups + g) * 32]);
#pragma unroll
        for (int t = 0; t < T; t++) {
            Columns b = columns_of(x + 8 * t * pitch + UNIT * k);
#pragma unroll
            for (int g = 0; g < G; g++) multiply(sum[g][t], a[g], b);
        }
    }
}

// 1 / rms of a row of k numbers, by one warp.
DEVICE float inverse_rms(const elem* x, int k, float epsilon) {
    float v = 0.f;
    for (int i = threadIdx.x % 32; i < k; i += 32) { float f = to_float(x[i]); v += f * f; }
    return rsqrtf(warp_sum(v) * rcp_fast((float)k) + epsilon);
}

// 8 warps: 2 x 2 groups of rows, 4 x IN_TILES tiles of streams.
KERNEL BOUNDS(256, 2) mixer_in(const Params p) {
    SHARED_FLOATS(shared);
    const int d = p.d_model, inner = p.inner, batch = p.batch, units = round_up(d, UNIT) / UNIT, pitch = tile_pitch(d);
    const int tiles = 2 * inner / 64, tile = blockIdx.x % tiles, first = blockIdx.x / tiles * IN_STREAMS;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, part = warp % 2, quarter = warp / 2;
    uint4* weights = (uint4*)shared;
    elem* x = (elem*)(weights + units * 4 * 32);
    float* scale = (float*)(x + IN_STREAMS * pitch);
    next_may_begin();
    fetch_weights<4>(weights, p.w_in, tile, units);
    const int row = tile * 64 + part * 32 + lane / 4, stream = first + quarter * 8 * IN_TILES + lane % 4 * 2;
    const bool is_u = tile * 64 < inner;
    float past[2][IN_TILES][4][WIDTH - 1];
    if (is_u) {
#pragma unroll
        for (int g = 0; g < 2; g++)
#pragma unroll
            for (int t = 0; t < IN_TILES; t++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    int c = row + 16 * g + i / 2 * 8, s = stream + 8 * t + i % 2;
#pragma unroll
                    for (int k = 0; k < WIDTH - 1; k++) past[g][t][i][k] = s < batch ? fresh(p.conv + ((i64)s * (WIDTH - 1) + k) * inner + c) : 0.f;
                }
    }
    wait_for_earlier();
    fetch_rows(x, p.rounded, first, IN_STREAMS, batch, d);
    end_batch();
    wait_batches<0>();
    __syncthreads();
    for (int s = warp; s < IN_STREAMS; s += 8) {
        float v = inverse_rms(x + s * pitch, d, p.settings[0]);
        if (lane == 0) scale[s] = v;
    }
    float sum[2][IN_TILES][4] = {};
    accumulate<2, IN_TILES>(sum, weights + part * 2 * 32 + lane, 4, x + (quarter * 8 * IN_TILES + lane / 4) * pitch + lane % 4 * 2, pitch, 0, units);
    __syncthreads();
#pragma unroll
    for (int g = 0; g < 2; g++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int c = row + 16 * g + 8 * half;
            float bias = p.b_in[c], own = is_u ? p.b_conv[c] : 0.f, weight[WIDTH];
#pragma unroll
            for (int k = 0; k < WIDTH; k++) weight[k] = is_u ? p.w_conv[c * WIDTH + k] : 0.f;
#pragma unroll
            for (int t = 0; t < IN_TILES; t++)
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    int s = stream + 8 * t + i;
                    if (s >= batch) continue;
                    float v = scale[s - first] * sum[g][t][2 * half + i] + bias;
                    if (!is_u) {
                        p.gate[(i64)s * inner + c - inner] = v * sigmoid(v);
                        continue;
                    }
                    const float* before = past[g][t][2 * half + i];
                    float u = own + weight[WIDTH - 1] * v;
#pragma unroll
                    for (int k = 0; k < WIDTH - 1; k++) u += weight[k] * before[k];
                    p.u[(i64)s * inner + c] = u * sigmoid(u);
#pragma unroll
                    for (int k = 0; k < WIDTH - 1; k++)
                        p.conv[((i64)s * (WIDTH - 1) + k) * inner + c] = k + 1 < WIDTH - 1 ? before[k + 1] : v;
                }
        }
}

DEVICE void fetch_states(const Params& p, float4* queue, int first, int streams, int j) {
    int item = threadIdx.x + j * SCAN_THREADS;
    if (item < 4 * (int)p.inner) {
        float4* to = queue + (j % DEPTH) * TOGETHER * (EACH / 4) * SCAN_THREADS + threadIdx.x;
        const float* from = p.ssm + (i64)first * p.inner * STATES + item * EACH;  // item: channel, then lane
#pragma unroll
        for (int q = 0; q < TOGETHER; q++)
#pragma unroll
            for (int i = 0; i < EACH / 4; i++)
                if (q < streams) fetch16(to + (q * (EACH / 4) + i) * SCAN_THREADS, from + q * p.inner * STATES + 4 * i);
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
    const int inner = p.inner, first = blockIdx.x * TOGETHER, pitch = inner + 8;
    const int streams = (int)p.batch - first < TOGETHER ? (int)p.batch - first : TOGETHER;
    const int r = round_up((int)p.rank, 8), row_pitch = X_GROUPS * 16 + 4, units = inner / UNIT;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = lane / 4, pair = lane % 4 * 2;
    float4* queue = (float4*)shared;
    float* u = shared + DEPTH * TOGETHER * EACH * SCAN_THREADS;
    float* gate = u + TOGETHER * pitch;
    float* projected = gate + TOGETHER * pitch;
    float* part = projected + TOGETHER * row_pitch;  // of x_proj, (warp stream row); later dt
    float* dt = part;
    next_may_begin();
#pragma unroll
    for (int j = 0; j < DEPTH; j++) fetch_states(p, queue, first, streams, j);
    const uint4* w_x = (const uint4*)p.w_x + lane;  // [unit][group][lane]
    uint4 early[2][X_GROUPS];
#pragma unroll
    for (int n = 0; n < 2; n++)
#pragma unroll
        for (int g = 0; g < X_GROUPS; g++)
            if (warp + n * SCAN_WARPS < units) early[n][g] = load_now(w_x + ((warp + n * SCAN_WARPS) * X_GROUPS + g) * 32);
    float a[EACH], a_next[EACH], D_next = 0.f;
    if ((int)threadIdx.x < 4 * inner) load_floats(a_next, p.a + threadIdx.x * EACH), D_next = p.d[threadIdx.x / 4];
    wait_for_earlier();

    for (int i = threadIdx.x; i < TOGETHER * inner / 4; i += SCAN_THREADS) {
        int q = quotient(i, inner / 4), j = 4 * (i - q * (inner / 4));
        float4 v = make_float4(0.f, 0.f, 0.f, 0.f), z = v;
        if (q < streams) {
            i64 at = (i64)(first + q) * inner + j;
            v = fresh4(p.u + at), z = fresh4(p.gate + at);
        }
        *(float4*)(u + q * pitch + j) = v;
        *(float4*)(gate + q * pitch + j) = z;
    }
    __syncthreads();
    {  // x_proj: a warp takes every SCAN_WARPS-th unit of all rows; only streams 0 to 3 of the tile are there
        float sum[X_GROUPS][4] = {};
        const float* mine = u + row % TOGETHER * pitch + pair;
#pragma unroll
        for (int n = 0; n < 2; n++) {
            if (warp + n * SCAN_WARPS >= units) break;
            Columns b = columns_of(mine + UNIT * (warp + n * SCAN_WARPS));
#pragma unroll
            for (int g = 0; g < X_GROUPS; g++) multiply(sum[g], rows_of(early[n][g]), b);
        }
        for (int k = warp + 2 * SCAN_WARPS; k < units; k += SCAN_WARPS) {
            Columns b = columns_of(mine + UNIT * k);
#pragma unroll
            for (int g = 0; g < X_GROUPS; g++) multiply(sum[g], rows_of(__ldg(w_x + (k * X_GROUPS + g) * 32)), b);
        }
        if (pair < TOGETHER) {
            float* at = part + (warp * TOGETHER + pair) * X_GROUPS * 16 + row;
#pragma unroll
            for (int g = 0; g < X_GROUPS; g++)
#pragma unroll
                for (int i = 0; i < 4; i++) at[i % 2 * X_GROUPS * 16 + 16 * g + i / 2 * 8] = sum[g][i];
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < TOGETHER * X_GROUPS * 16; i += SCAN_THREADS) {
        float v = 0.f;
#pragma unroll
        for (int w = 0; w < SCAN_WARPS; w++) v += part[w * TOGETHER * X_GROUPS * 16 + i];
        projected[i / (X_GROUPS * 16) * row_pitch + i % (X_GROUPS * 16)] = v;
    }
    __syncthreads();
    for (int group = warp; group < inner / 16; group += SCAN_WARPS) {  // dt_proj, float32 whatever the matrices are
        const uint4* w = (const uint4*)p.w_dt + group * 32 + lane;
        float sum[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll 2
        for (int k = 0; k < r / 8; k++)
            multiply(sum, exact_rows(__ldg(w + k * (inner / 16) * 32)), exact_columns(projected + row % TOGETHER * row_pitch + 8 * k + pair));
        if (pair < TOGETHER) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                int c = group * 16 + row + i / 2 * 8;
                dt[(pair + i % 2) * pitch + c] = softplus(sum[i] + p.b_dt[c]);
            }
        }
    }
    __syncthreads();

    const int own = threadIdx.x % 4;
    for (int j = 0;; j++) {
        int item = threadIdx.x + j * SCAN_THREADS;
        if (item >= 4 * inner) break;  // a whole warp
        int c = item / 4;
        float D = D_next, h[TOGETHER][EACH], y[TOGETHER];
#pragma unroll
        for (int i = 0; i < EACH; i++) a[i] = a_next[i];
        if (item + SCAN_THREADS < 4 * inner) load_floats(a_next, p.a + (item + SCAN_THREADS) * EACH), D_next = p.d[c + SCAN_THREADS / 4];
        wait_batches<DEPTH - 1>();
        const float4* mine = queue + (j % DEPTH) * TOGETHER * (EACH / 4) * SCAN_THREADS + threadIdx.x;
#pragma unroll
        for (int q = 0; q < TOGETHER; q++)
#pragma unroll
            for (int i = 0; i < EACH; i += 4) {
                float4 v = mine[(q * (EACH / 4) + i / 4) * SCAN_THREADS];
                h[q][i] = v.x; h[q][i + 1] = v.y; h[q][i + 2] = v.z; h[q][i + 3] = v.w;
            }
        fetch_states(p, queue, first, streams, j + DEPTH);
#pragma unroll
        for (int q = 0; q < TOGETHER; q++) {
            float B[EACH], C[EACH], step = dt[q * pitch + c], push = step * u[q * pitch + c];
            load_floats(B, projected + q * row_pitch + r + own * EACH);
            load_floats(C, projected + q * row_pitch + r + STATES + own * EACH);
            y[q] = 0.f;
#pragma unroll
            for (int i = 0; i < EACH; i++) {
                h[q][i] = exp2_fast(step * a[i]) * h[q][i] + push * B[i];
                y[q] += h[q][i] * C[i];
            }
        }
        float* state = p.ssm + (i64)first * inner * STATES + item * EACH;
#pragma unroll
        for (int q = 0; q < TOGETHER; q++)
#pragma unroll
            for (int i = 0; i < EACH; i += 4)
                if (q < streams) *(float4*)(state + (i64)q * inner * STATES + i) = make_float4(h[q][i], h[q][i + 1], h[q][i + 2], h[q][i + 3]);
        // a lane gets the sums of its stream
        float even = own & 1 ? y[1] : y[0], odd = own & 1 ? y[3] : y[2];
        even += lane_xor(own & 1 ? y[0] : y[1], 1);
        odd += lane_xor(own & 1 ? y[2] : y[3], 1);
        float whole = own & 2 ? odd : even;
        whole += lane_xor(own & 2 ? even : odd, 2);
        whole = (whole + D * u[own * pitch + c]) * gate[own * pitch + c];
        if (own < streams) p.y[(i64)(first + own) * inner + c] = from_float(whole);
    }
}

// 8 warps: 2 groups of rows, 2 x OUT_TILES tiles of streams, 2 halves of the columns.
KERNEL BOUNDS(256, 2) mixer_out(const Params p) {
    SHARED_FLOATS(shared);
    const int d = p.d_model, inner = p.inner, batch = p.batch, units = inner / UNIT, pitch = tile_pitch(inner);
    const int tiles = d / 32, tile = blockIdx.x % tiles, first = blockIdx.x / tiles * OUT_STREAMS;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = warp % 2, side = warp / 2 % 2, half = warp / 4;
    uint4* weights = (uint4*)shared;
    elem* y = (elem*)(weights + units * 2 * 32);
    float* other = (float*)(y + OUT_STREAMS * pitch);  // sums of the second half
    next_may_begin();
    fetch_weights<2>(weights, p.w_out, tile, units);
    const int row = tile * 32 + group * 16 + lane / 4, stream = first + side * 8 * OUT_TILES + lane % 4 * 2;
    wait_for_earlier();
    fetch_rows(y, p.y, first, OUT_STREAMS, batch, inner);
    end_batch();
    float before[OUT_TILES][4];
#pragma unroll
    for (int t = 0; t < OUT_TILES; t++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int c = row + i / 2 * 8, s = stream + 8 * t + i % 2;
            before[t][i] = p.b_out[c];
            if (s < batch && half == 0) before[t][i] += fresh(p.x + (i64)s * d + c) + (p.shift ? p.shift[(i64)s * d + c] : 0.f);
        }
    wait_batches<0>();
    __syncthreads();
    float sum[1][OUT_TILES][4] = {};
    accumulate<1, OUT_TILES>(sum, weights + group * 32 + lane, 2, y + (side * 8 * OUT_TILES + lane / 4) * pitch + lane % 4 * 2, pitch,
                             half ? units / 2 : 0, half ? units : units / 2);
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
            int c = row + i / 2 * 8, s = stream + 8 * t + i % 2;
            if (s >= batch) continue;
            float v = before[t][i] + (sum[0][t][i] + mine[4 * t + i]);
            p.x[(i64)s * d + c] = v;
#if BF16
            p.rounded[(i64)s * d + c] = from_float(v);
#endif
        }
}

KERNEL BOUNDS(512, 1) finish(const Params p) {
    SHARED_FLOATS(shared);
    const int d = p.d_model, vocab = p.vocab, first = blockIdx.x * 8, units = round_up(d, UNIT) / UNIT, pitch = round_up(d, 32) + 8;
    const int streams = (int)p.batch - first < 8 ? (int)p.batch - first : 8, groups = round_up(vocab, 16) / 16, v_pitch = groups * 16 + 4;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = lane / 4, pair = lane % 4 * 2;
    float* x = shared;
    float* scale = x + 8 * pitch;
    int* token = (int*)(scale + 8);
    float* logits = scale + 16;
    float* weights = logits + 8 * v_pitch;
    wait_for_earlier();
    const i64 step = *(volatile i64*)(p.steps + blockIdx.x), position = p.numbers[0] + step;
    for (int i = threadIdx.x; i < 8 * d; i += 512) {
        int s = quotient(i, d), j = i - s * d;
        x[s * pitch + j] = s < streams ? fresh(p.x + (i64)(first + s) * d + j) : 0.f;
    }
    __syncthreads();
    if (warp < 8) {
        float v = 0.f;
        for (int i = lane; i < d; i += 32) v += x[warp * pitch + i] * x[warp * pitch + i];
        v = warp_sum(v);
        if (lane == 0) scale[warp] = rsqrtf(v * rcp_fast((float)d) + p.settings[0]);
    }
    __syncthreads();
    for (int group = warp; group < groups; group += 16) {
        const uint4* w = (const uint4*)p.head + group * 32 + lane;
        float sum[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll 8
        for (int k = 0; k < units; k++) multiply(sum, rows_of(__ldg(w + (i64)k * groups * 32)), columns_of((const float*)(x + row * pitch + UNIT * k + pair)));
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int v = group * 16 + row + i / 2 * 8, s = pair + i % 2;
            if (v < vocab) logits[s * v_pitch + v] = scale[s] * sum[i] + p.head_bias[v];
        }
    }
    __syncthreads();
    if (warp < streams) {
        i64 s = first + warp, place = s * p.room + step;
        float normaliser;
        const float* mine = logits + warp * v_pitch;
        int drawn = draw(vocab, (int)p.numbers[1], p.settings, mine, weights + warp * v_pitch, uniform(p.keys[s], position), &normaliser);
        if (p.numbers[2]) drawn = (int)p.forced[place];
        if (lane == 0) {
            token[warp] = drawn;
            p.out[place] = drawn;
            p.log_probs[place] = mine[drawn] - normaliser;
        }
    }
    __syncthreads();
    if (threadIdx.x == 0) p.steps[blockIdx.x] = step + 1;
    for (int i = threadIdx.x; i < streams * d; i += 512) {
        int s = quotient(i, d), j = i - s * d;
        i64 at = (i64)(first + s) * d + j;
        float v = __ldg(p.embedding + (i64)token[s] * d + j);
        if (p.base) v += p.base[at];
        if (p.shift) v += p.shift[at];
        p.x[at] = v;
#if BF16
        p.rounded[at] = from_float(v);
#endif
    }
}
