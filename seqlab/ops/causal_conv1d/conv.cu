// Short causal convolution over time, channel-last, forward and backward: bound by memory.
//
// A thread owns VEC neighbouring channels (one 16- or 8-byte access a step) and a run of steps; the window lives in its
// registers. Logical time i runs in filter order; position = i, or length-1-i when reversed.
//
// Set from outside: WIDTH (1..8), VEC, BF16, PAIRED (ignored).

#define AHEAD 8         // steps loaded before the first is used
#define PAST (WIDTH - 1)

struct Params {
    const elem *x, *dy, *initial;         // (b l d), (b l d), (b w-1 d)
    const float *weight, *bias;           // (d w), (d)
    elem *y, *dx, *dinitial;
    float *partial, *dweight, *dbias;     // (b*runs w+1 d), (d w), (d)
    i64 x_b, x_t, dy_b, dy_t;
    i64 batch, length, channels, run, runs;
    i64 silu, reverse;
};

struct alignas(VEC * sizeof(elem)) Vec { elem e[VEC]; };

// Input row at logical step i, i >= -(w-1); before the start comes the initial state, or zeros.
DEVICE void input_row(float (&v)[VEC], const Params& p, const elem* x, i64 b, i64 c, i64 i) {
    Vec r;
    if (i >= 0 && i < p.length) {
        r = *(const Vec*)(x + (p.reverse ? p.length - 1 - i : i) * p.x_t);
    } else if (i < 0 && p.initial != 0) {
        const i64 row = p.reverse ? -1 - i : i + PAST;
        r = *(const Vec*)(p.initial + (b * PAST + row) * p.channels + c);
    } else {
#pragma unroll
        for (int e = 0; e < VEC; e++) r.e[e] = (elem)0;
    }
#pragma unroll
    for (int e = 0; e < VEC; e++) v[e] = to_float(r.e[e]);
}
DEVICE void store_row(elem* at, const float (&v)[VEC]) {
    Vec r;
#if BF16 && VEC >= 2
#pragma unroll
    for (int e = 0; e < VEC; e += 2) {
        const u32 two = pack_bf16(v[e], v[e + 1]);
        r.e[e] = (elem)(two & 0xffffu);
        r.e[e + 1] = (elem)(two >> 16);
    }
#else
#pragma unroll
    for (int e = 0; e < VEC; e++) r.e[e] = from_float(v[e]);
#endif
    *(Vec*)at = r;
}

KERNEL conv_forward(const Params p) {
    const i64 id = (i64)blockIdx.x * blockDim.x + threadIdx.x, groups = p.channels / VEC;
    const i64 c = id % groups * VEC, r = id / groups, b = r / p.runs, begin = r % p.runs * p.run;
    if (b >= p.batch) return;
    const i64 end = begin + p.run < p.length ? begin + p.run : p.length;
    const elem* x = p.x + b * p.x_b + c;
    elem* y = p.y + b * p.length * p.channels + c;
    float w[WIDTH][VEC], bias[VEC], row[PAST + AHEAD][VEC];
#pragma unroll
    for (int e = 0; e < VEC; e++) {
        bias[e] = p.bias != 0 ? p.bias[c + e] : 0.f;
#pragma unroll
        for (int k = 0; k < WIDTH; k++) w[k][e] = p.weight[(c + e) * WIDTH + k];
    }
#pragma unroll
    for (int k = 0; k < PAST; k++) input_row(row[k], p, x, b, c, begin - PAST + k);
    for (i64 i0 = begin; i0 < end; i0 += AHEAD) {
#pragma unroll
        for (int j = 0; j < AHEAD; j++) input_row(row[PAST + j], p, x, b, c, i0 + j);
#pragma unroll
        for (int j = 0; j < AHEAD; j++) {
            float v[VEC];
#pragma unroll
            for (int e = 0; e < VEC; e++) {
                v[e] = bias[e];
#pragma unroll
                for (int k = 0; k < WIDTH; k++) v[e] += w[k][e] * row[j + k][e];
                if (p.silu) v[e] *= sigmoid(v[e]);
            }
            const i64 i = i0 + j;
            if (i < end) store_row(y + (p.reverse ? p.length - 1 - i : i) * p.channels, v);
        }
#pragma unroll
        for (int k = 0; k < PAST; k++)
#pragma unroll
            for (int e = 0; e < VEC; e++) row[k][e] = row[AHEAD + k][e];
    }
}

// g_t = dy_t act'(pre_t);  dx_s = sum_k w_k g_{s+(w-1)-k};  dw_k = sum_t g_t x_{t-(w-1)+k};  dbias = sum_t g_t.
// A run recomputes the w-1 values of g to its right.
#define STEP 4
KERNEL conv_backward(const Params p) {
    const i64 id = (i64)blockIdx.x * blockDim.x + threadIdx.x, groups = p.channels / VEC;
    const i64 c = id % groups * VEC, r = id / groups, b = r / p.runs, begin = r % p.runs * p.run;
    if (b >= p.batch) return;
    const i64 end = begin + p.run < p.length ? begin + p.run : p.length;
    const elem *x = p.x + b * p.x_b + c, *dy = p.dy + b * p.dy_b + c;
    elem* dx = p.dx + b * p.length * p.channels + c;
    float w[WIDTH][VEC], bias[VEC], row[PAST + STEP][VEC], g[PAST + STEP][VEC], dw[WIDTH][VEC], db[VEC];
#pragma unroll
    for (int e = 0; e < VEC; e++) {
        bias[e] = p.bias != 0 ? p.bias[c + e] : 0.f;
        db[e] = 0.f;
#pragma unroll
        for (int k = 0; k < WIDTH; k++) {
            w[k][e] = p.weight[(c + e) * WIDTH + k];
            dw[k][e] = 0.f;
        }
#pragma unroll
        for (int k = 0; k < PAST; k++) g[k][e] = 0.f;
    }
#pragma unroll
    for (int k = 0; k < PAST; k++) input_row(row[k], p, x, b, c, begin - PAST + k);
    for (i64 i0 = begin; i0 < end + PAST; i0 += STEP) {
        Vec raw[STEP];
#pragma unroll
        for (int j = 0; j < STEP; j++) {
            const i64 i = i0 + j;
            input_row(row[PAST + j], p, x, b, c, i);
            if (i < p.length) {
                raw[j] = *(const Vec*)(dy + (p.reverse ? p.length - 1 - i : i) * p.dy_t);
            } else {
#pragma unroll
                for (int e = 0; e < VEC; e++) raw[j].e[e] = (elem)0;
            }
        }
#pragma unroll
        for (int j = 0; j < STEP; j++) {
            const i64 i = i0 + j, s = i - PAST;
            float v[VEC];
#pragma unroll
            for (int e = 0; e < VEC; e++) {
                float d = to_float(raw[j].e[e]);
                if (p.silu) {
                    float pre = bias[e];
#pragma unroll
                    for (int k = 0; k < WIDTH; k++) pre += w[k][e] * row[j + k][e];
                    const float f = sigmoid(pre);
                    d *= f * (1.f + pre * (1.f - f));
                }
                g[PAST + j][e] = d;
                const float own = i < end ? d : 0.f;
                db[e] += own;
                v[e] = 0.f;
#pragma unroll
                for (int k = 0; k < WIDTH; k++) {
                    dw[k][e] += own * row[j + k][e];
                    v[e] += w[k][e] * g[PAST + j - k][e];
                }
            }
            if (s >= begin && s < end) store_row(dx + (p.reverse ? p.length - 1 - s : s) * p.channels, v);
            else if (s < 0 && begin == 0 && p.dinitial != 0)
                store_row(p.dinitial + (b * PAST + (p.reverse ? -1 - s : s + PAST)) * p.channels + c, v);
        }
#pragma unroll
        for (int k = 0; k < PAST; k++)
#pragma unroll
            for (int e = 0; e < VEC; e++) {
                row[k][e] = row[STEP + k][e];
                g[k][e] = g[STEP + k][e];
            }
    }
    float* out = p.partial + r * (WIDTH + 1) * p.channels + c;
#pragma unroll
    for (int e = 0; e < VEC; e++) {
#pragma unroll
        for (int k = 0; k < WIDTH; k++) out[k * p.channels + e] = dw[k][e];
        out[WIDTH * p.channels + e] = db[e];
    }
}

// Sums over runs in a fixed order: 32 columns and 32 shares of the runs a block of 1024 threads.
KERNEL BOUNDS(1024, 1) conv_reduce(const Params p) {
    SHARED_FLOATS(shared);
    const i64 width = (WIDTH + 1) * p.channels, column = (i64)blockIdx.x * 32 + threadIdx.x % 32;
    const int share = threadIdx.x / 32;
    float total = 0.f;
    if (column < width)
        for (i64 r = share; r < p.batch * p.runs; r += 32) total += p.partial[r * width + column];
    shared[threadIdx.x] = total;
    __syncthreads();
    if (share != 0 || column >= width) return;
    for (int s = 1; s < 32; s++) total += shared[s * 32 + threadIdx.x];
    const i64 k = column / p.channels, c = column % p.channels;
    if (k < WIDTH) p.dweight[c * WIDTH + k] = total;
    else if (p.dbias != 0) p.dbias[c] = total;
}
