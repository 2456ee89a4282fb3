// Short causal convolution over time, channel-last, forward and backward: bound by memory.
//
// A thread owns VEC neighbouring channels and a run of steps; the window lives in its registers, the rows to come are
// copied to shared memory in the background, AHEAD of them. Logical time i runs in filter order; position = i, or length-1-i when reversed.
//
// Set from outside: WIDTH (1..8), VEC, BF16, PAIRED (ignored).

#ifndef AHEAD
#define AHEAD 16        // rows on their way from memory, a thread and tensor: a ring in shared memory
#endif
#ifndef STEP
#define STEP 4          // rows taken from the ring at a time
#endif
#ifndef FORWARD_BLOCKS
#define FORWARD_BLOCKS (WIDTH <= 4 ? 8 : 5)
#endif
#ifndef BACKWARD_BLOCKS
#define BACKWARD_BLOCKS (WIDTH <= 4 ? 5 : 3)
#endif
#define PAST (WIDTH - 1)
#define THREADS 128

struct Params {
    const elem *x, *dy, *initial;         // (b l d), (b l d), (b w-1 d)
    const float *weight, *bias;           // (d w), (d)
    elem *y, *dx, *dinitial;
    float *partial, *dweight, *dbias;     // (b*runs w+1 d), (d w), (d)
    i64 x_b, x_t, dy_b, dy_t, dx_b, dx_t;
    i64 batch, length, channels, run, runs;
    i64 silu, reverse, add;               // add: dx is added to what is there
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

// A thread's own ring of rows in shared memory: no other thread looks at it, so no barrier is needed. Rows beyond the end
// of the sequence are zeros. ROWS rows, STEP of them a batch.
DEVICE void fetch_row(Vec* slot, const Line& a, i64 i, i64 length) {
    if (i < length) {
        const elem* at = a.at + i * a.step;
        if (sizeof(Vec) >= 4) copy_bytes<sizeof(Vec) >= 4 ? (int)sizeof(Vec) : 4>(slot, at);
        else *slot = *(const Vec*)at;
    } else {
        *slot = zero_row();
    }
}
DEVICE void fetch(Vec* ring, int slot, const Line& a, i64 i0, i64 length) {
#pragma unroll
    for (int j = 0; j < STEP; j++) fetch_row(ring + (slot + j) * THREADS, a, i0 + j, length);
}
DEVICE void take(Vec (&rows)[STEP], const Vec* ring, int slot) {
#pragma unroll
    for (int j = 0; j < STEP; j++) rows[j] = ring[(slot + j) * THREADS];
}

KERNEL BOUNDS(THREADS, FORWARD_BLOCKS) conv_forward(const Params p) {
    SHARED_FLOATS(shared);
    Vec* ring = (Vec*)shared + threadIdx.x;
    const i64 id = (i64)blockIdx.x * THREADS + threadIdx.x, groups = p.channels / VEC;
    const i64 c = id % groups * VEC, r = id / groups, b = r / p.runs, begin = r % p.runs * p.run;
    if (b >= p.batch) return;
    const i64 end = begin + p.run < p.length ? begin + p.run : p.length;
    const Line x = line(p, p.x, p.x_b, p.x_t, b, c), y = line(p, p.y, p.length * p.channels, p.channels, b, c);
#pragma unroll
    for (int s = 0; s < AHEAD; s += STEP) {
        fetch(ring, s, x, begin + s, p.length);
        end_batch();
    }
    float w[WIDTH][VEC], bias[VEC], row[PAST + STEP][VEC];
#pragma unroll
    for (int e = 0; e < VEC; e++) {
        bias[e] = p.bias != 0 ? p.bias[c + e] : 0.f;
#pragma unroll
        for (int k = 0; k < WIDTH; k++) w[k][e] = p.weight[(c + e) * WIDTH + k];
    }
#pragma unroll
    for (int k = 0; k < PAST; k++) widen(row[k], input_row(p, x, b, c, begin - PAST + k));
    int slot = 0;
    for (i64 i0 = begin; i0 < end; i0 += STEP) {
        Vec now[STEP];
        wait_batches<AHEAD / STEP - 1>();
        take(now, ring, slot);
        if (i0 + AHEAD < end) fetch(ring, slot, x, i0 + AHEAD, p.length);
        end_batch();
        slot = slot + STEP == AHEAD ? 0 : slot + STEP;
        elem* out = (elem*)y.at + i0 * y.step;
#pragma unroll
        for (int j = 0; j < STEP; j++) {
            float v[VEC];
            widen(row[PAST + j], now[j]);
#pragma unroll
            for (int e = 0; e < VEC; e++) {
                v[e] = bias[e];
#pragma unroll
                for (int k = 0; k < WIDTH; k++) v[e] += w[k][e] * row[j + k][e];
                if (p.silu) v[e] *= sigmoid(v[e]);
            }
            if (i0 + j < end) store_row(out + (i64)j * y.step, v);
        }
#pragma unroll
        for (int k = 0; k < PAST; k++)
#pragma unroll
            for (int e = 0; e < VEC; e++) row[k][e] = row[STEP + k][e];
    }
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
    Vec before[STEP];
    if (p.add) {
#pragma unroll
        for (int j = 0; j < STEP; j++) {
            const i64 s = i0 + j - PAST;
            if (INSIDE || (s >= begin && s < end)) before[j] = *(const Vec*)(out + (i64)j * dx.step);
        }
    }
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
        if (INSIDE || (s >= begin && s < end)) {
            if (p.add) {
#pragma unroll
                for (int e = 0; e < VEC; e++) v[e] += to_float(before[j].e[e]);
            }
            store_row(out + (i64)j * dx.step, v);
        } else if (s < 0 && begin == 0 && p.dinitial != 0) {
            store_row(p.dinitial + (b * PAST + (p.reverse ? -1 - s : s + PAST)) * p.channels + c, v);
        }
    }
#pragma unroll
    for (int k = 0; k < PAST; k++)
#pragma unroll
        for (int e = 0; e < VEC; e++) {
            q.row[k][e] = q.row[STEP + k][e];
            q.g[k][e] = q.g[STEP + k][e];
        }
}

KERNEL BOUNDS(THREADS, BACKWARD_BLOCKS) conv_backward(const Params p) {
    SHARED_FLOATS(shared);
    Vec *ring_x = (Vec*)shared + threadIdx.x, *ring_dy = ring_x + AHEAD * THREADS;
    const i64 id = (i64)blockIdx.x * THREADS + threadIdx.x, groups = p.channels / VEC;
    const i64 c = id % groups * VEC, r = id / groups, b = r / p.runs, begin = r % p.runs * p.run;
    if (b >= p.batch) return;
    const i64 end = begin + p.run < p.length ? begin + p.run : p.length;
    const Line x = line(p, p.x, p.x_b, p.x_t, b, c), dy = line(p, p.dy, p.dy_b, p.dy_t, b, c);
    const Line dx = line(p, p.dx, p.dx_b, p.dx_t, b, c);
#pragma unroll
    for (int s = 0; s < AHEAD; s += STEP) {
        fetch(ring_x, s, x, begin + s, p.length);
        fetch(ring_dy, s, dy, begin + s, p.length);
        end_batch();
    }
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
    int slot = 0;
    for (i64 i0 = begin; i0 < end + PAST; i0 += STEP) {
        Vec rx[STEP], rd[STEP];
        wait_batches<AHEAD / STEP - 1>();
        take(rx, ring_x, slot);
        take(rd, ring_dy, slot);
        if (i0 + AHEAD < end + PAST) {
            fetch(ring_x, slot, x, i0 + AHEAD, p.length);
            fetch(ring_dy, slot, dy, i0 + AHEAD, p.length);
        }
        end_batch();
        slot = slot + STEP == AHEAD ? 0 : slot + STEP;
        if (i0 >= begin + PAST && i0 + STEP <= end) backward_steps<true>(q, p, rx, rd, dx, b, c, i0, begin, end);
        else backward_steps<false>(q, p, rx, rd, dx, b, c, i0, begin, end);
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
