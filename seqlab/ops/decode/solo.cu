// Token after token of one stream by one cluster of CLUSTER blocks, drawing included, in one launch: for stacks of equal
// mixers that a cluster's registers and shared memory can serve without ever waiting for a weight.
//
// Blocks own channels as in persistent.cu. Behind x_proj each sends its part of every sum to all. Behind out_proj that would be 16 KB
// into every block, more than the way between multiprocessors takes in a hurry: each sum's parts go to one block, which adds them up
// and sends x to all. So the cluster meets three times a mixer. Sizes are constants, and
//
//   - a thread's weights of the next mixer are in its registers before their turn comes: it asks for them as soon as those of this
//     mixer are used up. A block reads every weight once a token and nobody waits for it. The head counts as a mixer more;
//   - states, convolutions' pasts and all vectors stay in shared memory from the first token to the last;
//   - threads that share a row lie in one warp, so that sums need no barrier: the block meets three times a mixer.
//
// Products: in_proj and head 8 threads a row, 64 rows a time; x_proj the same; out_proj 512 / D_MODEL threads a row. Sums are float32;
// BF16 says how in_proj, out_proj and head are stored.
//
// Set from outside: CLUSTER, D_MODEL, INNER, RANK (a multiple of 4), STATES (a multiple of 16), WIDTH, VOCAB, HEAD_ROWS (of a block, a
// multiple of 4), BF16.

#include "decode/draw.cuh"
#include "cluster.cuh"

struct Params {
    const char *w_in, *w_x, *w_out;  // (layers CLUSTER ...), packed in solo.py
    const char* head;                // (CLUSTER ...)
    const float* small;              // (layers CLUSTER SMALL): biases, convolution, dt_proj, A, D
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
#define OWN (INNER / CLUSTER)
#define PIECE (BF16 ? 8 : 4)                     // weights in 16 bytes
#define IN_ROUNDS (2 * OWN / 64)                 // rows of a thread
#define IN_PIECES (D_MODEL / (8 * PIECE))        // of a row
#define X_ROWS (RANK + 2 * STATES)
#define X_ROUNDS ((X_ROWS + 63) / 64)
#define PER_ROW (THREADS / D_MODEL)              // threads of a row of out_proj
#define OUT_PIECES (OWN / (PER_ROW * PIECE))
#define WARP_ROWS (32 / PER_ROW)                 // rows of out_proj of a warp
#define QUADS (WARP_ROWS / 4)                    // of these, four each
#define HEAD_ROUNDS ((HEAD_ROWS + 63) / 64)
#define EACH (STATES / 4)
#define X_PITCH (X_ROWS + 4)                     // other banks for other blocks' sums
#define SHARE (D_MODEL / CLUSTER)                // rows of x that a block adds up
#define OUT_PITCH (SHARE + 4)
// of `small`, in floats
#define AT_B_IN 0
#define AT_W_CONV (AT_B_IN + 2 * OWN)
#define AT_B_CONV (AT_W_CONV + WIDTH * OWN)
#define AT_B_DT (AT_B_CONV + OWN)
#define AT_D (AT_B_DT + OWN)
#define AT_A (AT_D + OWN)
#define AT_W_DT (AT_A + STATES * OWN)
#define AT_B_OUT (AT_W_DT + RANK * OWN)
#define SMALL (AT_B_OUT + D_MODEL)

#ifndef SEQLAB_EMULATED
// Here and not where the compiler would like it; read once a token, so not for the first-level cache.
DEVICE uint4 load_now(const uint4* p) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
    return v;
}
#else
DEVICE uint4 load_now(const uint4* p) { return *p; }
#endif

template <int N> DEVICE void load_pieces(uint4 (&w)[N], const uint4* at) {
#pragma unroll
    for (int i = 0; i < N; i++) w[i] = load_now(at + i * THREADS);
}
DEVICE float dot4(float sum, float a, float b, float c, float d, float4 x) {
    sum += a * x.x; sum += b * x.y; sum += c * x.z; sum += d * x.w;
    return sum;
}
DEVICE float dot_exact(float sum, uint4 w, float4 x) {
    return dot4(sum, __uint_as_float(w.x), __uint_as_float(w.y), __uint_as_float(w.z), __uint_as_float(w.w), x);
}
// A piece of weights times its columns: the first four, and the others `further` on.
DEVICE float dot(float sum, uint4 w, const float4* x, int further) {
#if BF16
    sum = dot4(sum, bf16_low(w.x), bf16_high(w.x), bf16_low(w.y), bf16_high(w.y), x[0]);
    return dot4(sum, bf16_low(w.z), bf16_high(w.z), bf16_low(w.w), bf16_high(w.w), x[further]);
#else
    return dot_exact(sum, w, x[0]);
#endif
}
template <int N> DEVICE void sum_over(float (&v)[N], int lanes) {
#pragma unroll
    for (int bit = lanes / 2; bit; bit /= 2)
#pragma unroll
        for (int i = 0; i < N; i++) v[i] += lane_xor(v[i], bit);
}

// rows x of 64 R rows, 8 threads each; and the sum of squares of x, for the norm, behind them. Piece i of thread `part` has the columns
// from 4 part on of each run of 32.
template <int R> DEVICE void times_x(float (&sum)[R + 1], const uint4* w, const float* x, int part) {
    const float4* at = (const float4*)x + part;
#pragma unroll
    for (int r = 0; r <= R; r++) sum[r] = 0.f;
#pragma unroll
    for (int i = 0; i < IN_PIECES; i++) {
#pragma unroll
        for (int r = 0; r < R; r++) sum[r] = dot(sum[r], w[r * IN_PIECES + i], at + i * (2 * PIECE), 8);
#pragma unroll
        for (int h = 0; h < PIECE / 4; h++) {
            float4 v = at[i * (2 * PIECE) + 8 * h];
            sum[R] = dot4(sum[R], v.x, v.y, v.z, v.w, v);
        }
    }
    sum_over(sum, 8);
}

// Sends the rows of a warp, 8 lanes each, four in all, to every block.
DEVICE void send4(float* to, float mine, u64* barrier) {
    float4 v = make_float4(lane_from(mine, 0), lane_from(mine, 8), lane_from(mine, 16), lane_from(mine, 24));
    int lane = threadIdx.x % 32;
    if (lane < CLUSTER) remote_store(to, lane, v, barrier);
}

KERNEL CLUSTERED BOUNDS(THREADS, 1) solo(const Params p) {
    SHARED_FLOATS(shared);
    const int rank = blockIdx.x % CLUSTER, stream = blockIdx.x / CLUSTER, layers = p.layers;
    const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32, part = tid % 8, eighth = tid / 8;
    const int out_row = tid / PER_ROW, out_part = tid % PER_ROW;
    float* next = shared;
    u64* barriers = (u64*)next; next += 8;  // sums of x_proj, of out_proj, logits, x
    float* settings = next; next += 4;
    int* token = (int*)next; next += 4;
    float* x = next; next += D_MODEL;
    float* u = next; next += OWN;
    float* gate = next; next += OWN;
    float* y = next; next += OWN;
    float* projected = next; next += X_ROWS;
    float* from_x = next; next += CLUSTER * X_PITCH;
    float* from_out = next; next += CLUSTER * OUT_PITCH;
    float* logits = next; next += CLUSTER * HEAD_ROWS;
    float* weights = next; next += CLUSTER * HEAD_ROWS;
    float* small = next; next += layers * SMALL;
    float* states = next; next += layers * OWN * STATES;
    float* pasts = next;  // (layers WIDTH-1 OWN)

    const uint4* w_in = (const uint4*)p.w_in + (i64)rank * IN_ROUNDS * IN_PIECES * THREADS + tid;
    const uint4* w_x = (const uint4*)p.w_x + (i64)rank * X_ROUNDS * (OWN / 32) * THREADS + tid;
    const uint4* w_out = (const uint4*)p.w_out + (i64)rank * OUT_PIECES * THREADS + tid;
    const uint4* head = (const uint4*)p.head + (i64)rank * IN_ROUNDS * IN_PIECES * THREADS + tid;  // as much room as an in_proj
    const i64 in_step = (i64)CLUSTER * IN_ROUNDS * IN_PIECES * THREADS, x_step = (i64)CLUSTER * X_ROUNDS * (OWN / 32) * THREADS;
    const i64 out_step = (i64)CLUSTER * OUT_PIECES * THREADS;
    uint4 in[IN_ROUNDS * IN_PIECES], xs[X_ROUNDS * (OWN / 32)], outs[OUT_PIECES];
    load_pieces(in, w_in);
    load_pieces(xs, w_x);
    load_pieces(outs, w_out);

    for (int l = 0; l < layers; l++) {
        for (int i = tid; i < SMALL; i += THREADS) small[l * SMALL + i] = p.small[((i64)l * CLUSTER + rank) * SMALL + i];
        const float* s = (const float*)p.ssm[l] + ((i64)stream * INNER + rank * OWN) * STATES;
        for (int i = tid; i < OWN * STATES; i += THREADS) states[l * OWN * STATES + i] = s[i];
        const float* c = (const float*)p.conv[l] + (i64)stream * (WIDTH - 1) * INNER + rank * OWN;
        for (int i = tid; i < OWN * (WIDTH - 1); i += THREADS) pasts[l * OWN * (WIDTH - 1) + i] = c[i / OWN * INNER + i % OWN];
    }
    __syncthreads();
    if (p.shifts)  // a mixer's shift is added together with the bias of the one before
        for (int l = 0; l + 1 < layers; l++)
            for (int i = tid; i < D_MODEL; i += THREADS)
                small[l * SMALL + AT_B_OUT + i] += p.shifts[((i64)(l + 1) * p.batch + stream) * D_MODEL + i];
    if (tid < 3) settings[tid] = p.settings[tid];
    if (tid == 0) {
        arrivals_begin(barriers, 4);
        *token = (int)p.tokens[stream];
    }
    __syncthreads();
    cluster_barrier();  // nobody sends to a block that has not begun

    const float epsilon = settings[0], per = 1.f / D_MODEL, base = p.base ? p.base[(i64)stream * D_MODEL + out_row] : 0.f;
    const i64 key = p.keys[stream];
    u32 parity = 0, head_parity = 0;
    for (i64 step = 0; step < p.count; step++) {
        if (out_part == 0) x[out_row] = __ldg(p.embedding + (i64)*token * D_MODEL + out_row) + base;
        __syncthreads();
        for (int l = 0; l < layers; l++) {
            const float* own = small + l * SMALL;
            {  // norm, in_proj, convolution, gate
                float sum[IN_ROUNDS + 1], *past = pasts + l * OWN * (WIDTH - 1);
                times_x<IN_ROUNDS>(sum, in, x, part);
                load_pieces(in, l + 1 < layers ? w_in + (l + 1) * in_step : head);
                float scale = rsqrtf(sum[IN_ROUNDS] * per + epsilon);
#pragma unroll
                for (int j = 0; j < IN_ROUNDS; j++) {
                    int row = 64 * j + eighth;
                    float v = scale * sum[j] + own[AT_B_IN + row];
                    if (row < OWN) {  // a whole warp
                        float seen[WIDTH], c = own[AT_B_CONV + row];
#pragma unroll
                        for (int k = 0; k < WIDTH; k++) {
                            seen[k] = k < WIDTH - 1 ? past[k * OWN + row] : v;
                            c += own[AT_W_CONV + row * WIDTH + k] * seen[k];
                        }
                        __syncwarp();
                        if (part == 0) {
                            u[row] = c * sigmoid(c);
#pragma unroll
                            for (int k = 0; k < WIDTH - 1; k++) past[k * OWN + row] = seen[k + 1];
                        }
                    } else if (part == 0) {
                        gate[row - OWN] = v * sigmoid(v);
                    }
                }
            }
            __syncthreads();
            if (tid == 0) arrivals_expect(barriers, CLUSTER * X_ROWS * 4);
#pragma unroll
            for (int j = 0; j < X_ROUNDS; j++) {  // x_proj
                if (64 * j + 4 * warp < X_ROWS) {
                    float sum[1] = {0.f};
#pragma unroll
                    for (int h = 0; h < OWN / 32; h++) sum[0] = dot_exact(sum[0], xs[j * (OWN / 32) + h], *(const float4*)(u + 32 * h + 4 * part));
                    sum_over(sum, 8);
                    send4(from_x + rank * X_PITCH + 64 * j + 4 * warp, sum[0], barriers);
                }
            }
            load_pieces(xs, w_x + (l + 1 < layers ? l + 1 : 0) * x_step);
            // what the scan needs, while the sums are on their way
            const int c = tid / 4, quarter = tid % 4;
            const bool scans = tid < 4 * OWN;  // whole warps
            float a[EACH], h[EACH], w_dt[RANK / 4], D = 0.f, b_dt = 0.f, own_u = 0.f, z = 0.f;
            float* state = states + (l * OWN + c) * STATES + quarter * EACH;
            if (scans) {
#pragma unroll
                for (int i = 0; i < EACH; i++) a[i] = own[AT_A + c * STATES + quarter * EACH + i], h[i] = state[i];
#pragma unroll
                for (int k = 0; k < RANK / 4; k++) w_dt[k] = own[AT_W_DT + (k * OWN + c) * 4 + quarter];
                D = own[AT_D + c], b_dt = own[AT_B_DT + c], own_u = u[c], z = gate[c];
            }
            arrivals_wait(barriers, parity);
#pragma unroll
            for (int j = 0; j < X_ROUNDS; j++) {
                int row = 64 * j + eighth;
                if (64 * j + 4 * warp < X_ROWS) {
                    float sum[1] = {0.f};
#pragma unroll
                    for (int r = 0; r < CLUSTER; r += 8) if (r + part < CLUSTER) sum[0] += from_x[(r + part) * X_PITCH + row];
                    sum_over(sum, 8);
                    if (part == 0) projected[row] = sum[0];
                }
            }
            __syncthreads();
            if (scans) {
                float sum[1] = {0.f};
#pragma unroll
                for (int k = 0; k < RANK / 4; k++) sum[0] += w_dt[k] * projected[4 * k + quarter];
                sum_over(sum, 4);
                float dt = softplus(sum[0] + b_dt), push = dt * own_u;
                sum[0] = 0.f;
#pragma unroll
                for (int i = 0; i < EACH; i++) {
                    h[i] = exp2_fast(dt * a[i]) * h[i] + push * projected[RANK + quarter * EACH + i];
                    sum[0] += h[i] * projected[RANK + STATES + quarter * EACH + i];
                    state[i] = h[i];
                }
                sum_over(sum, 4);
                if (quarter == 0) y[c] = (sum[0] + D * own_u) * z;
            }
            __syncthreads();
            if (tid == 0) {
                arrivals_expect(barriers + 1, D_MODEL * 4);
                arrivals_expect(barriers + 3, D_MODEL * 4);
            }
            {  // out_proj
                float sum[1] = {0.f};
#pragma unroll
                for (int i = 0; i < OUT_PIECES; i++) sum[0] = dot(sum[0], outs[i], (const float4*)(y + (i * PER_ROW + out_part) * PIECE), 1);
                sum_over(sum, PER_ROW);
                load_pieces(outs, w_out + (l + 1 < layers ? l + 1 : 0) * out_step);
                const int quad = lane % QUADS, first = warp * WARP_ROWS + 4 * quad;
                float4 v;
                v.x = lane_from(sum[0], 4 * quad * PER_ROW);
                v.y = lane_from(sum[0], (4 * quad + 1) * PER_ROW);
                v.z = lane_from(sum[0], (4 * quad + 2) * PER_ROW);
                v.w = lane_from(sum[0], (4 * quad + 3) * PER_ROW);
                if (lane < QUADS) remote_store(from_out + rank * OUT_PITCH + first % SHARE, first / SHARE, v, barriers + 1);
            }
            const bool adds = 4 * warp < SHARE;  // eight threads a row again
            const int x_row = rank * SHARE + eighth;
            float before = adds ? x[x_row] + own[AT_B_OUT + x_row] : 0.f;
            arrivals_wait(barriers + 1, parity);
            if (adds) {
                float sum[1] = {0.f};
#pragma unroll
                for (int r = 0; r < CLUSTER; r += 8) if (r + part < CLUSTER) sum[0] += from_out[(r + part) * OUT_PITCH + eighth];
                sum_over(sum, 8);
                send4(x + rank * SHARE + 4 * warp, before + sum[0], barriers + 3);
            }
            arrivals_wait(barriers + 3, parity);
            parity ^= 1;
        }
        if (tid == 0) arrivals_expect(barriers + 2, CLUSTER * HEAD_ROWS * 4);
        {
            float sum[HEAD_ROUNDS + 1];
            times_x<HEAD_ROUNDS>(sum, in, x, part);
            load_pieces(in, w_in);
            float scale = rsqrtf(sum[HEAD_ROUNDS] * per + epsilon);
#pragma unroll
            for (int j = 0; j < HEAD_ROUNDS; j++) {
                int row = 64 * j + eighth;
                if (64 * j + 4 * warp < HEAD_ROWS) {
                    int v = rank * HEAD_ROWS + row;
                    float bias = v < VOCAB ? __ldg(p.head_bias + v) : 0.f;
                    send4(logits + rank * HEAD_ROWS + 64 * j + 4 * warp, scale * sum[j] + bias, barriers + 2);
                }
            }
        }
        arrivals_wait(barriers + 2, head_parity);
        head_parity ^= 1;
        if (warp == 0) {
            float normaliser;
            int drawn = draw(VOCAB, (int)p.top_k, settings, logits, weights, uniform(key, p.position + step), &normaliser);
            i64 place = stream * p.count + step;
            if (p.forced) drawn = (int)p.forced[place];
            if (lane == 0) {
                *token = drawn;
                if (rank == 0) {
                    p.out[place] = drawn;
                    p.log_probs[place] = logits[drawn] - normaliser;
                }
            }
        }
        __syncthreads();
    }
    for (int l = 0; l < layers; l++) {
        float* s = (float*)p.ssm[l] + ((i64)stream * INNER + rank * OWN) * STATES;
        for (int i = tid; i < OWN * STATES; i += THREADS) s[i] = states[l * OWN * STATES + i];
        float* c = (float*)p.conv[l] + (i64)stream * (WIDTH - 1) * INNER + rank * OWN;
        for (int i = tid; i < OWN * (WIDTH - 1); i += THREADS) c[i / OWN * INNER + i % OWN] = pasts[l * OWN * (WIDTH - 1) + i];
    }
    cluster_barrier();  // nobody leaves while others may send to it
}
