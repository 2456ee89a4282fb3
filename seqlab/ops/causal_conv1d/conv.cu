// Short causal convolution over time, channel-last, forward and backward: bound by memory.
//
// A thread owns VEC neighbouring channels (one 16- or 8-byte access a step) and a run of steps; the window lives in its
// registers. Logical time i runs in filter order; position = i, or length-1-i when reversed.
//
// Set from outside: WIDTH (1..8), VEC, BF16, PAIRED (ignored).

#ifndef AHEAD
#define AHEAD 8         // steps loaded before the first is used
#endif
#ifndef STEP
#define STEP 4
#endif
#ifndef FORWARD_BLOCKS
#define FORWARD_BLOCKS (WIDTH <= 4 ? 8 : 5)
#endif
#ifndef BACKWARD_BLOCKS
#define BACKWARD_BLOCKS (WIDTH <= 4 ? 5 : 3)
#endif
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

// A sequence in filter order: address of logical step 0 of a thread's channels, signed step.
struct Line {
    const elem* at;
    int step;
};
DEVICE Line line(const Params& p, const elem* base, i64 stride_b, i64 stride_t, i64 b, i64 c) {
    Line r;
    r.at = base + b * stride_b + c + (p.reverse ? (p.length - 1) * stride_t : 0);
    r.step = (int)(p.reverse ? -stride_t : stride_t);
    return r;
}

DEVICE Vec zero_row() {
    Vec r;
#pragma unroll
    for (int e = 0; e < VEC; e++) r.e[e] = (elem)0;
    return r;
}
// Input row at logical step i, i >= -(w-1); before the start comes the initial state, or zeros.
DEVICE Vec input_row(const Params& p, const Line& x, i64 b, i64 c, i64 i) {
    if (i >= 0 && i < p.length) return *(const Vec*)(x.at + i * x.step);
    if (i < 0 && p.initial != 0) return *(const Vec*)(p.initial + (b * PAST + (p.reverse ? -1 - i : i + PAST)) * p.channels + c);
    return zero_row();
}
DEVICE void widen(float (&v)[VEC], const Vec& r) {
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

// COUNT rows from logical step i0 on; INSIDE: all of them are there.
template <bool INSIDE, int COUNT> DEVICE void input_rows(Vec (&raw)[COUNT], const Params& p, const Line& x, i64 b, i64 c, i64 i0) {
    const elem* at = x.at + i0 * x.step;
#pragma unroll
    for (int j = 0; j < COUNT; j++) raw[j] = INSIDE ? *(const Vec*)(at + (i64)j * x.step) : input_row(p, x, b, c, i0 + j);
}

template <bool INSIDE> DEVICE void forward_run(const Params& p, i64 b, i64 c, i64 begin, i64 end) {
    const Line x = line(p, p.x, p.x_b, p.x_t, b, c), y = line(p, p.y, p.length * p.channels, p.channels, b, c);
    float w[WIDTH][VEC], bias[VEC], row[PAST + AHEAD][VEC];
    Vec raw[AHEAD];
#pragma unroll
    for (int e = 0; e < VEC; e++) {
        bias[e] = p.bias != 0 ? p.bias[c + e] : 0.f;
#pragma unroll
        for (int k = 0; k < WIDTH; k++) w[k][e] = p.weight[(c + e) * WIDTH + k];
    }
#pragma unroll
    for (int k = 0; k < PAST; k++) widen(row[k], input_row(p, x, b, c, begin - PAST + k));
    input_rows<INSIDE>(raw, p, x, b, c, begin);
    for (i64 i0 = begin; i0 < end; i0 += AHEAD) {
        Vec now[AHEAD];
#pragma unroll
        for (int j = 0; j < AHEAD; j++) now[j] = raw[j];
        if (i0 + AHEAD < end) input_rows<INSIDE>(raw, p, x, b, c, i0 + AHEAD);
        elem* out = (elem*)y.at + i0 * y.step;
#pragma unroll
        for (int j = 0; j < AHEAD; j++) {
            float v[VEC];
            widen(row[PAST + j], now[j]);
#pragma unroll
            for (int e = 0; e < VEC; e++) {
                v[e] = bias[e];
#pragma unroll
                for (int k = 0; k < WIDTH; k++) v[e] += w[k][e] * row[j + k][e];
                if (p.silu) v[e] *= sigmoid(v[e]);
            }
            if (INSIDE || i0 + j < end) store_row(out + (i64)j * y.step, v);
        }
#pragma unroll
        for (int k = 0; k < PAST; k++)
#pragma unroll
            for (int e = 0; e < VEC; e++) row[k][e] = row[AHEAD + k][e];
    }
}
KERNEL BOUNDS(128, FORWARD_BLOCKS) conv_forward(const Params p) {
    const i64 id = (i64)blockIdx.x * blockDim.x + threadIdx.x, groups = p.channels / VEC;
    const i64 c = id % groups * VEC, r = id / groups, b = r / p.runs, begin = r % p.runs * p.run;
    if (b >= p.batch) return;
    if (begin + p.run <= p.length) forward_run<true>(p, b, c, begin, begin + p.run);
    else forward_run<false>(p, b, c, begin, p.length);
}

// g_t = dy_t act'(pre_t);  dx_s = sum_k w_k g_{s+(w-1)-k};  dw_k = sum_t g_t x_{t-(w-1)+k};  dbias = sum_t g_t.
// A run recomputes the w-1 values of g to its right.
struct Gradients {
    float w[WIDTH][VEC], bias[VEC], row[PAST + STEP][VEC], g[PAST + STEP][VEC], dw[WIDTH][VEC], db[VEC];
};
// STEP steps from i0 on. INSIDE: all are the run's own, and so are the STEP steps of dx that come out.
template <bool INSIDE> DEVICE void backward_steps(Gradients& q, const Params& p, const Vec (&x)[STEP], const Vec (&dy)[STEP],
                                                  const Line& dx, i64 b, i64 c, i64 i0, i64 begin, i64 end) {
    elem* out = (elem*)dx.at + (i0 - PAST) * dx.step;
#pragma unroll
    for (int j = 0; j < STEP; j++) {
        const i64 i = i0 + j, s = i - PAST;
        float v[VEC];
        widen(q.row[PAST + j], x[j]);
#pragma unroll
        for (int e = 0; e < VEC; e++) {
            float d = to_float(dy[j].e[e]);
            if (p.silu) {
                float pre = q.bias[e];
#pragma unroll
                for (int k = 0; k < WIDTH; k++) pre += q.w[k][e] * q.row[j + k][e];
                const float f = sigmoid(pre);
                d *= f * (1.f + pre * (1.f - f));
            }
            q.g[PAST + j][e] = d;
            const float own = INSIDE || i < end ? d : 0.f;
            q.db[e] += own;
            v[e] = 0.f;
#pragma unroll
            for (int k = 0; k < WIDTH; k++) {
                q.dw[k][e] += own * q.row[j + k][e];
                v[e] += q.w[k][e] * q.g[PAST + j - k][e];
            }
        }
        if (INSIDE || (s >= begin && s < end)) store_row(out + (i64)j * dx.step, v);
        else if (s < 0 && begin == 0 && p.dinitial != 0)
            store_row(p.dinitial + (b * PAST + (p.reverse ? -1 - s : s + PAST)) * p.channels + c, v);
    }
#pragma unroll
    for (int k = 0; k < PAST; k++)
#pragma unroll
        for (int e = 0; e < VEC; e++) {
            q.row[k][e] = q.row[STEP + k][e];
            q.g[k][e] = q.g[STEP + k][e];
        }
}
DEVICE void given_rows(Vec (&raw)[STEP], const Params& p, const Line& dy, i64 i0) {
#pragma unroll
    for (int j = 0; j < STEP; j++) raw[j] = i0 + j < p.length ? *(const Vec*)(dy.at + (i0 + j) * dy.step) : zero_row();
}
KERNEL BOUNDS(128, BACKWARD_BLOCKS) conv_backward(const Params p) {
    const i64 id = (i64)blockIdx.x * blockDim.x + threadIdx.x, groups = p.channels / VEC;
    const i64 c = id % groups * VEC, r = id / groups, b = r / p.runs, begin = r % p.runs * p.run;
    if (b >= p.batch) return;
    const i64 end = begin + p.run < p.length ? begin + p.run : p.length;
    const Line x = line(p, p.x, p.x_b, p.x_t, b, c), dy = line(p, p.dy, p.dy_b, p.dy_t, b, c);
    const Line dx = line(p, p.dx, p.length * p.channels, p.channels, b, c);
    Gradients q;
#pragma unroll
    for (int e = 0; e < VEC; e++) {
        q.bias[e] = p.bias != 0 ? p.bias[c + e] : 0.f;
        q.db[e] = 0.f;
#pragma unroll
        for (int k = 0; k < WIDTH; k++) {
            q.w[k][e] = p.weight[(c + e) * WIDTH + k];
            q.dw[k][e] = 0.f;
        }
#pragma unroll
        for (int k = 0; k < PAST; k++) q.g[k][e] = 0.f;
    }
#pragma unroll
    for (int k = 0; k < PAST; k++) widen(q.row[k], input_row(p, x, b, c, begin - PAST + k));
    // The first PAST steps give dx of the run before; those after the end only complete this run's dx.
    Vec rx[STEP], rd[STEP];
    i64 i0 = begin;
    const i64 first = begin + (PAST + STEP - 1) / STEP * STEP;
    for (; i0 < first && i0 < end + PAST; i0 += STEP) {
        input_rows<false>(rx, p, x, b, c, i0);
        given_rows(rd, p, dy, i0);
        backward_steps<false>(q, p, rx, rd, dx, b, c, i0, begin, end);
    }
    if (i0 + STEP <= end) {
        input_rows<true>(rx, p, x, b, c, i0);
        input_rows<true>(rd, p, dy, b, c, i0);
    }
    for (; i0 + STEP <= end; i0 += STEP) {
        Vec nx[STEP], nd[STEP];
        if (i0 + 2 * STEP <= end) {
            input_rows<true>(nx, p, x, b, c, i0 + STEP);
            input_rows<true>(nd, p, dy, b, c, i0 + STEP);
        }
        backward_steps<true>(q, p, rx, rd, dx, b, c, i0, begin, end);
#pragma unroll
        for (int j = 0; j < STEP; j++) {
            rx[j] = nx[j];
            rd[j] = nd[j];
        }
    }
    for (; i0 < end + PAST; i0 += STEP) {
        input_rows<false>(rx, p, x, b, c, i0);
        given_rows(rd, p, dy, i0);
        backward_steps<false>(q, p, rx, rd, dx, b, c, i0, begin, end);
    }
    float* out = p.partial + r * (WIDTH + 1) * p.channels + c;
#pragma unroll
    for (int e = 0; e < VEC; e++) {
#pragma unroll
        for (int k = 0; k < WIDTH; k++) out[k * p.channels + e] = q.dw[k][e];
        out[WIDTH * p.channels + e] = q.db[e];
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
