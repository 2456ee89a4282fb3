// One token of many streams, three kernels a mixer, each over all streams, so that a matrix is read a few times for hundreds of
// streams and all multiprocessors move states:
//
//     mixer_in     norm, in_proj, convolution, gate     32 channels (64 rows of in_proj) and IN_STREAMS streams a block
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
#include "decode/tiles.cuh"

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

#define EACH (STATES / 4)     // states of a lane
#define X_GROUPS ((RANK + 2 * STATES + 15) / 16)  // 16 rows of x_proj each
#define X_ROWS (16 * X_GROUPS)
#define ITEMS ((4 * INNER + SCAN_THREADS - 1) / SCAN_THREADS)  // of a thread: a quarter of a channel's states, of all streams
#define IN_STREAMS (32 * IN_TILES)
#define OUT_STREAMS (16 * OUT_TILES)
#define SCAN_THREADS 512
#define SCAN_WARPS (SCAN_THREADS / 32)
#define SCAN_BLOCKS 2  // registers for so many, so that other kernels find room beside it
#define TOGETHER 4  // streams of a block's scan

#ifndef SEQLAB_EMULATED
#if __CUDA_ARCH__ >= 900
DEVICE void next_may_begin() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
DEVICE void wait_for_earlier() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
#else
DEVICE void next_may_begin() {}
DEVICE void wait_for_earlier() {}
#endif
#else
DEVICE void next_may_begin() {}
DEVICE void wait_for_earlier() {}
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

// 8 warps: 2 groups of u's rows and the same of z's, 4 x IN_TILES tiles of streams.
KERNEL BOUNDS(256, 2) mixer_in(const Params p) {
    SHARED_FLOATS(shared);
    constexpr int UNITS = D_MODEL / UNIT, TILES = INNER / 32, PER = 256 / IN_STREAMS;
    const int batch = p.batch, tile = blockIdx.x % TILES, first = blockIdx.x / TILES * IN_STREAMS;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, part = warp % 2, quarter = warp / 2;
    uint4* weights = (uint4*)shared;  // two groups of u, two of z
    elem* x = (elem*)(weights + UNITS * 4 * 32);
    float* scale = (float*)(x + IN_STREAMS * PITCH(D_MODEL));
    float *b_u = scale + IN_STREAMS, *b_z = b_u + 32, *b_conv = b_z + 32, *w_conv = b_conv + 32;  // of this tile's channels
    next_may_begin();
    fetch<UNITS * 4 * 32, 256>(weights, p.w_in + (i64)tile * UNITS * 4 * 512);
    const int piece = threadIdx.x;
    if (piece < 8) fetch16(b_u + 4 * piece, p.b_in + tile * 32 + 4 * piece);
    else if (piece < 16) fetch16(b_z + 4 * (piece - 8), p.b_in + INNER + tile * 32 + 4 * (piece - 8));
    else if (piece < 24) fetch16(b_conv + 4 * (piece - 16), p.b_conv + tile * 32 + 4 * (piece - 16));
    else if (piece < 24 + 8 * WIDTH) fetch16(w_conv + 4 * (piece - 24), p.w_conv + tile * 32 * WIDTH + 4 * (piece - 24));
    // a thread has channels own and own + 8, and of each tile t the streams 8 t and 8 t + 1 further
    const int own = part * 16 + lane / 4, stream = first + quarter * 8 * IN_TILES + lane % 4 * 2;
    float* conv = p.conv + (i64)stream * (WIDTH - 1) * INNER + tile * 32 + own;
    float past[IN_TILES][2][2][WIDTH - 1];
#pragma unroll
    for (int t = 0; t < IN_TILES; t++)
#pragma unroll
        for (int i = 0; i < 2; i++)
            if (stream + 8 * t + i < batch)
#pragma unroll
                for (int high = 0; high < 2; high++)
#pragma unroll
                    for (int k = 0; k < WIDTH - 1; k++) past[t][i][high][k] = fresh(conv + ((8 * t + i) * (WIDTH - 1) + k) * INNER + 8 * high);
    wait_for_earlier();
    fetch_rows<D_MODEL, IN_STREAMS, 256>(x, p.rounded, first, batch);
    end_batch();
    wait_batches<0>();
    __syncthreads();
    {
        const elem* row = x + threadIdx.x / PER * PITCH(D_MODEL) + threadIdx.x % PER * (16 / (int)sizeof(elem));
        float v = 0.f;
#pragma unroll 4
        for (int i = 0; i < D_MODEL * (int)sizeof(elem) / 16; i += PER)
            if (i + (int)threadIdx.x % PER < D_MODEL * (int)sizeof(elem) / 16) v += squares(row + i * (16 / (int)sizeof(elem)));
#pragma unroll
        for (int bit = 1; bit < PER; bit *= 2) v += lane_xor(v, bit);
        if (threadIdx.x % PER == 0) scale[threadIdx.x / PER] = rsqrtf(v * (1.f / D_MODEL) + p.settings[0]);
    }
    float sum[2][IN_TILES][4] = {};  // u and z
    accumulate<2, 2, IN_TILES, UNITS, 4, PITCH(D_MODEL)>(sum, weights + part * 32 + lane, x + (quarter * 8 * IN_TILES + lane / 4) * PITCH(D_MODEL) + lane % 4 * 2);
    __syncthreads();
    const i64 at = (i64)stream * INNER + tile * 32 + own;
#pragma unroll
    for (int high = 0; high < 2; high++) {
        const int row = own + 8 * high;
        float weight[WIDTH];
#pragma unroll
        for (int k = 0; k < WIDTH; k++) weight[k] = w_conv[row * WIDTH + k];
#pragma unroll
        for (int t = 0; t < IN_TILES; t++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                if (stream + 8 * t + i >= batch) continue;
                const int further = (8 * t + i) * INNER + 8 * high;
                const float norm = scale[stream - first + 8 * t + i], *before = past[t][i][high];
                float v = norm * sum[0][t][2 * high + i] + b_u[row], z = norm * sum[1][t][2 * high + i] + b_z[row];
                float u = b_conv[row] + weight[WIDTH - 1] * v;
#pragma unroll
                for (int k = 0; k < WIDTH - 1; k++) u += weight[k] * before[k];
                p.u[at + further] = u * sigmoid(u);
                p.gate[at + further] = z * sigmoid(z);
#pragma unroll
                for (int k = 0; k < WIDTH - 1; k++)
                    conv[((8 * t + i) * (WIDTH - 1) + k) * INNER + 8 * high] = k + 1 < WIDTH - 1 ? before[k + 1] : v;
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
    // a tile of eight streams has the four twice: of what a lane has of two rows, it keeps one
    const int upper = pair >= TOGETHER;
    {  // x_proj: a warp takes every SCAN_WARPS-th unit of all rows
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
        float* at = part + (warp * TOGETHER + pair % TOGETHER) * X_ROWS + row + 8 * upper;
#pragma unroll
        for (int g = 0; g < X_GROUPS; g++)
#pragma unroll
            for (int i = 0; i < 2; i++) at[i * X_ROWS + 16 * g] = upper ? sum[g][2 + i] : sum[g][i];
    }
    // dt_proj's weights while the sums are on their way; float32 whatever the matrices are
    constexpr int GROUPS = INNER / 16, OWN_GROUPS = (GROUPS + SCAN_WARPS - 1) / SCAN_WARPS, FIRST = OWN_GROUPS * RANK / 8 <= 4 ? OWN_GROUPS : 1;
    const uint4* w_dt = (const uint4*)p.w_dt + warp * 32 + lane;
    uint4 first_dt[FIRST][RANK / 8];
    float b_dt[FIRST];
#pragma unroll
    for (int n = 0; n < FIRST; n++)
        if (warp + n * SCAN_WARPS < GROUPS) {
#pragma unroll
            for (int k = 0; k < RANK / 8; k++) first_dt[n][k] = load_now(w_dt + (k * GROUPS + n * SCAN_WARPS) * 32);
            b_dt[n] = __ldg(p.b_dt + (warp + n * SCAN_WARPS) * 16 + row + 8 * upper);
        }
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
    for (int n = 0; n < OWN_GROUPS; n++) {
        const int group = warp + n * SCAN_WARPS;
        if (group >= GROUPS) break;
        float sum[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
        for (int k = 0; k < RANK / 8; k++)
            multiply(sum, exact_rows(n < FIRST ? first_dt[n < FIRST ? n : 0][k] : __ldg(w_dt + (k * GROUPS + n * SCAN_WARPS) * 32)),
                     exact_columns(projected + row % TOGETHER * R_PITCH + 8 * k + pair));
        const int c = group * 16 + row + 8 * upper, s = pair % TOGETHER;
        const float bias = n < FIRST ? b_dt[n < FIRST ? n : 0] : __ldg(p.b_dt + c);
        dt[s * P + c] = softplus((upper ? sum[2] : sum[0]) + bias);
        dt[(s + 1) * P + c] = softplus((upper ? sum[3] : sum[1]) + bias);
    }
    __syncthreads();

    const int own = tid % 4;
    elem* out = p.y + ((i64)first + own) * INNER + tid / 4;
    const float4* mine = queue + tid;
    ROLLED for (int j = 0; j < ITEMS; j++) {  // four copies of this would wait for instructions
        const int item = tid + j * SCAN_THREADS, c = tid / 4 + j * (SCAN_THREADS / 4);
        if (4 * INNER % SCAN_THREADS && item >= 4 * INNER) break;  // a whole warp
        float D = D_next, h[TOGETHER][EACH], y[TOGETHER];
#pragma unroll
        for (int i = 0; i < EACH; i++) a[i] = a_next[i];
        if (j + 1 < ITEMS && item + SCAN_THREADS < 4 * INNER)
            load_floats(a_next, p.a + (item + SCAN_THREADS) * EACH), D_next = p.d[c + SCAN_THREADS / 4];
        wait_batches<DEPTH - 1>();
#pragma unroll
        for (int q = 0; q < TOGETHER; q++)
#pragma unroll
            for (int i = 0; i < EACH; i += 4) {
                float4 v = mine[(q * (EACH / 4) + i / 4) * SCAN_THREADS];
                h[q][i] = v.x; h[q][i + 1] = v.y; h[q][i + 2] = v.z; h[q][i + 3] = v.w;
            }
        if (ITEMS > DEPTH) fetch_states(queue, states, streams, j + DEPTH);
        else end_batch();
        mine = (j + 1) % DEPTH ? mine + TOGETHER * (EACH / 4) * SCAN_THREADS : queue + tid;
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
    const float bias[2] = {p.b_out[row], p.b_out[row + 8]};
    float before[OUT_TILES][4], shift[OUT_TILES][4] = {};
    const float* residual[OUT_TILES][2];  // rows of streams that are there
#pragma unroll
    for (int t = 0; t < OUT_TILES; t++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int s = stream + 8 * t + i, last = s < batch ? s : batch - 1;
            residual[t][i] = p.x + (i64)last * D_MODEL + row;
            if (p.shift) shift[t][i] = p.shift[(i64)last * D_MODEL + row], shift[t][2 + i] = p.shift[(i64)last * D_MODEL + row + 8];
        }
    wait_for_earlier();
    fetch_rows<INNER, OUT_STREAMS, 256>(y, p.y, first, batch);
    end_batch();
#pragma unroll
    for (int t = 0; t < OUT_TILES; t++)
#pragma unroll
        for (int i = 0; i < 4; i++) before[t][i] = fresh(residual[t][i % 2] + i / 2 * 8);
    wait_batches<0>();
    __syncthreads();
    float sum[1][OUT_TILES][4] = {};
    accumulate<1, 1, OUT_TILES, UNITS / 2, 2, P>(sum, weights + (half * (UNITS / 2) * 2 + group) * 32 + lane,
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
            float v = before[t][i] + bias[i / 2] + shift[t][i] + (sum[0][t][i] + mine[4 * t + i]);
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
    const float settings[3] = {p.settings[0], p.settings[1], p.settings[2]};
    const i64 position = p.numbers[0], key = warp < streams ? p.keys[first + warp] : 0;
    const int top_k = (int)p.numbers[1], given = (int)p.numbers[2];
    wait_for_earlier();
    const i64 step = *(volatile i64*)(p.steps + blockIdx.x);
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
        if (lane == 0) scale[warp] = rsqrtf(v * (1.f / D_MODEL) + settings[0]);
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
        int drawn = draw(VOCAB, top_k, settings, mine, weights + warp * V_PITCH, uniform(key, position + step), &normaliser);
        if (given) drawn = (int)p.forced[place];
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
