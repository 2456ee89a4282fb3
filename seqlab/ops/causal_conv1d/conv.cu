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
#ifndef PAIR_FORWARD_BLOCKS
#define PAIR_FORWARD_BLOCKS (WIDTH <= 4 ? 6 : 4)
#endif
#ifndef PAIR_BACKWARD_BLOCKS
#define PAIR_BACKWARD_BLOCKS (WIDTH <= 4 ? 4 : 2)
#endif
#define PAST (WIDTH - 1)
#define THREADS 128

#ifndef MASKED
#define MASKED 0        // 1: only the positions in `order` exist, as many in each batch row as `counts` says
#endif

struct Params {
    const i64 *order, *counts;            // (b l), real positions first, left to right; (b)
    const elem *x, *dy, *initial;         // (b l d), (b l d), (b w-1 d)
    const float *weight, *bias;           // (d w), (d)
    elem *y, *dx, *dinitial;
    float *partial, *dweight, *dbias;     // (sides b*runs w+1 d), (sides d w), (sides d)
    const elem* dy_too;                   // the other direction, where two go in one pass
    const float *weight_too, *bias_too;
    elem* y_too;
    i64 x_b, x_t, dy_b, dy_t, dx_b, dx_t, dy_too_b, dy_too_t;
    i64 batch, length, channels, run, runs;
    i64 silu, reverse, add;               // add: dx is added to what is there
};

struct alignas(VEC * sizeof(elem)) Vec { elem e[VEC]; };

// A thread's place: its channels, its batch row (of so many real steps), its run of them.
struct Place {
    i64 c, r, b, begin, end, length;
};
DEVICE bool place(Place& q, const Params& p) {
    const i64 id = (i64)blockIdx.x * THREADS + threadIdx.x, groups = p.channels / VEC;
    q.c = id % groups * VEC;
    q.r = id / groups;
    q.b = q.r / p.runs;
    if (q.b >= p.batch) return false;
    q.length = MASKED ? p.counts[q.b] : p.length;
    q.begin = q.r % p.runs * p.run;
    q.end = q.begin + p.run < q.length ? q.begin + p.run : q.length;
    if (q.end < q.begin) q.end = q.begin;
    return true;
}

// A sequence in filter order: address of logical step 0 of a thread's channels, signed step. With a mask, of position 0, and
// where in `order` logical step 0 stands.
struct Line {
    const elem* at;
    int step;
#if MASKED
    const i64* order;
    int way;
#endif
};
DEVICE Line line(const Params& p, const elem* base, i64 stride_b, i64 stride_t, const Place& q) {
    Line r;
    r.at = base + q.b * stride_b + q.c;
#if MASKED
    r.step = (int)stride_t;
    r.order = p.order + q.b * p.length + (p.reverse ? q.length - 1 : 0);
    r.way = p.reverse ? -1 : 1;
#else
    r.at += p.reverse ? (p.length - 1) * stride_t : 0;
    r.step = (int)(p.reverse ? -stride_t : stride_t);
#endif
    return r;
}
// Logical step i0 + j.
DEVICE const elem* row_of(const Line& a, i64 i0, int j) {
#if MASKED
    return a.at + a.order[(i0 + j) * a.way] * a.step;
#else
    return a.at + i0 * a.step + (i64)j * a.step;
#endif
}
DEVICE Vec zero_row() {
    Vec r;
#pragma unroll
    for (int e = 0; e < VEC; e++) r.e[e] = (elem)0;
    return r;
}
// Input row at logical step i, i >= -(w-1); before the start comes the initial state, or zeros.
DEVICE Vec input_row(const Params& p, const Line& x, const Place& q, i64 i) {
    if (i >= 0 && i < q.length) return *(const Vec*)row_of(x, i, 0);
    if (i < 0 && p.initial != 0) return *(const Vec*)(p.initial + (q.b * PAST + (p.reverse ? -1 - i : i + PAST)) * p.channels + q.c);
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
// of the sequence are zeros. AHEAD rows, STEP of them a batch.
DEVICE void fetch_row(Vec* slot, const Line& a, i64 i0, int j, i64 length) {
    if (i0 + j >= 0 && i0 + j < length) {
        const elem* at = row_of(a, i0, j);
        if (sizeof(Vec) >= 4) copy_bytes<sizeof(Vec) >= 4 ? (int)sizeof(Vec) : 4>(slot, at);
        else *slot = *(const Vec*)at;
    } else {
        *slot = zero_row();
    }
}
DEVICE void fetch(Vec* ring, int slot, const Line& a, i64 i0, i64 length) {
#pragma unroll
    for (int j = 0; j < STEP; j++) fetch_row(ring + (slot + j) * THREADS, a, i0, j, length);
}
DEVICE void take(Vec (&rows)[STEP], const Vec* ring, int slot) {
#pragma unroll
    for (int j = 0; j < STEP; j++) rows[j] = ring[(slot + j) * THREADS];
}

// A filter and its bias. MIRRORED: of the other direction, whose output at step i - (w-1) sees the rows that this one's
// output at step i sees, in the opposite order.
template <bool MIRRORED> DEVICE void load_filter(float (&w)[WIDTH][VEC], float (&bias)[VEC], const Params& p, i64 c) {
    const float *weight = MIRRORED ? p.weight_too : p.weight, *b = MIRRORED ? p.bias_too : p.bias;
#pragma unroll
    for (int e = 0; e < VEC; e++) {
        bias[e] = b != 0 ? b[c + e] : 0.f;
#pragma unroll
        for (int k = 0; k < WIDTH; k++) w[k][e] = weight[(c + e) * WIDTH + (MIRRORED ? PAST - k : k)];
    }
}
DEVICE float filtered(const float (&w)[WIDTH][VEC], const float (&bias)[VEC], const float (*row)[VEC], int e) {
    float v = bias[e];
#pragma unroll
    for (int k = 0; k < WIDTH; k++) v += w[k][e] * row[k][e];
    return v;
}

// PAIR: both directions of x in one pass, y left to right and y_too right to left.
template <bool PAIR> DEVICE void forward_pass(const Params& p) {
    SHARED_FLOATS(shared);
    Vec* ring = (Vec*)shared + threadIdx.x;
    Place q;
    if (!place(q, p)) return;
    const Line x = line(p, p.x, p.x_b, p.x_t, q), y = line(p, p.y, p.length * p.channels, p.channels, q);
    const Line too = line(p, p.y_too, p.length * p.channels, p.channels, q);
    const i64 last = PAIR ? q.end + PAST : q.end;
#pragma unroll
    for (int s = 0; s < AHEAD; s += STEP) {
        fetch(ring, s, x, q.begin + s, q.length);
        end_batch();
    }
    float w[WIDTH][VEC], bias[VEC], v[WIDTH][VEC], bias_too[VEC], row[PAST + STEP][VEC];
    load_filter<false>(w, bias, p, q.c);
    if (PAIR) load_filter<true>(v, bias_too, p, q.c);
#pragma unroll
    for (int k = 0; k < PAST; k++) widen(row[k], input_row(p, x, q, q.begin - PAST + k));
    int slot = 0;
    for (i64 i0 = q.begin; i0 < last; i0 += STEP) {
        Vec now[STEP];
        wait_batches<AHEAD / STEP - 1>();
        take(now, ring, slot);
        if (i0 + AHEAD < last) fetch(ring, slot, x, i0 + AHEAD, q.length);
        end_batch();
        slot = slot + STEP == AHEAD ? 0 : slot + STEP;
#pragma unroll
        for (int j = 0; j < STEP; j++) {
            float r[VEC];
            widen(row[PAST + j], now[j]);
            if (i0 + j < q.end) {
#pragma unroll
                for (int e = 0; e < VEC; e++) {
                    r[e] = filtered(w, bias, row + j, e);
                    if (p.silu) r[e] *= sigmoid(r[e]);
                }
                store_row((elem*)row_of(y, i0, j), r);
            }
            if (PAIR && i0 + j - PAST >= q.begin && i0 + j - PAST < q.end) {
#pragma unroll
                for (int e = 0; e < VEC; e++) {
                    r[e] = filtered(v, bias_too, row + j, e);
                    if (p.silu) r[e] *= sigmoid(r[e]);
                }
                store_row((elem*)row_of(too, i0 - PAST, j), r);
            }
        }
#pragma unroll
        for (int k = 0; k < PAST; k++)
#pragma unroll
            for (int e = 0; e < VEC; e++) row[k][e] = row[STEP + k][e];
    }
}
KERNEL BOUNDS(THREADS, FORWARD_BLOCKS) conv_forward(const Params p) { forward_pass<false>(p); }
KERNEL BOUNDS(THREADS, PAIR_FORWARD_BLOCKS) conv_forward_pair(const Params p) { forward_pass<true>(p); }

// g_t = dy_t act'(pre_t);  dx_s = sum_k w_k g_{s+(w-1)-k};  dw_k = sum_t g_t x_{t-(w-1)+k};  dbias = sum_t g_t.
// A run recomputes the w-1 values of g to its right. Of the mirrored direction, step i makes g at i - (w-1), which is the
// step whose dx it completes, from the same rows; so a run recomputes the w-1 values of that g to its left.
struct Side {
    float w[WIDTH][VEC], bias[VEC], g[PAST + STEP][VEC], dw[WIDTH][VEC], db[VEC];
};
template <bool MIRRORED> DEVICE void start(Side& q, const Params& p, i64 c) {
    load_filter<MIRRORED>(q.w, q.bias, p, c);
#pragma unroll
    for (int e = 0; e < VEC; e++) {
        q.db[e] = 0.f;
#pragma unroll
        for (int k = 0; k < WIDTH; k++) q.dw[k][e] = 0.f;
#pragma unroll
        for (int k = 0; k < PAST; k++) q.g[k][e] = 0.f;
    }
}
// Step j of a round: g from dy, its share of dw and dbias if it is the run's own, its share of dx added to v.
template <bool MIRRORED> DEVICE void one_step(Side& q, float (&v)[VEC], const Vec& dy, const float (*row)[VEC], int j, i64 silu, bool own) {
#pragma unroll
    for (int e = 0; e < VEC; e++) {
        float d = to_float(dy.e[e]);
        if (silu) {
            const float pre = filtered(q.w, q.bias, row, e), f = sigmoid(pre);
            d *= f * (1.f + pre * (1.f - f));
        }
        q.g[PAST + j][e] = d;
        const float mine = own ? d : 0.f;
        q.db[e] += mine;
#pragma unroll
        for (int k = 0; k < WIDTH; k++) {
            q.dw[k][e] += mine * row[k][e];
            v[e] += MIRRORED ? q.w[PAST - k][e] * q.g[j + k][e] : q.w[k][e] * q.g[PAST + j - k][e];
        }
    }
}
template <bool MIRRORED> DEVICE void finish(const Side& q, const Params& p, i64 r, i64 c) {
    float* out = p.partial + (MIRRORED ? p.batch * p.runs + r : r) * (WIDTH + 1) * p.channels + c;
#pragma unroll
    for (int e = 0; e < VEC; e++) {
#pragma unroll
        for (int k = 0; k < WIDTH; k++) out[k * p.channels + e] = q.dw[MIRRORED ? PAST - k : k][e];
        out[WIDTH * p.channels + e] = q.db[e];
    }
}
DEVICE void shift(float (&v)[PAST + STEP][VEC]) {
#pragma unroll
    for (int k = 0; k < PAST; k++)
#pragma unroll
        for (int e = 0; e < VEC; e++) v[k][e] = v[STEP + k][e];
}
// STEP steps from i0 on. INSIDE: all are the run's own, and so are the STEP steps of dx that come out.
template <bool INSIDE, bool PAIR> DEVICE void backward_steps(Side& one, Side& two, float (&row)[PAST + STEP][VEC], const Params& p, const Place& q,
                                                             const Vec (&x)[STEP], const Vec (&dy)[STEP], const Vec (&dy_too)[STEP],
                                                             const Line& dx, i64 i0) {
    Vec before[STEP];
    if (!PAIR && p.add) {
#pragma unroll
        for (int j = 0; j < STEP; j++) {
            const i64 s = i0 + j - PAST;
            if (INSIDE || (s >= q.begin && s < q.end)) before[j] = *(const Vec*)row_of(dx, i0 - PAST, j);
        }
    }
#pragma unroll
    for (int j = 0; j < STEP; j++) {
        const i64 i = i0 + j, s = i - PAST;
        const bool inside = INSIDE || (s >= q.begin && s < q.end);
        float v[VEC];
        widen(row[PAST + j], x[j]);
#pragma unroll
        for (int e = 0; e < VEC; e++) v[e] = 0.f;
        one_step<false>(one, v, dy[j], row + j, j, p.silu, INSIDE || i < q.end);
        if (PAIR) one_step<true>(two, v, dy_too[j], row + j, j, p.silu, inside);
        if (inside) {
            if (!PAIR && p.add) {
#pragma unroll
                for (int e = 0; e < VEC; e++) v[e] += to_float(before[j].e[e]);
            }
            store_row((elem*)row_of(dx, i0 - PAST, j), v);
        } else if (!PAIR && s < 0 && q.begin == 0 && p.dinitial != 0) {
            store_row(p.dinitial + (q.b * PAST + (p.reverse ? -1 - s : s + PAST)) * p.channels + q.c, v);
        }
    }
    shift(row);
    shift(one.g);
    if (PAIR) shift(two.g);
}

template <bool PAIR> DEVICE void backward_pass(const Params& p) {
    SHARED_FLOATS(shared);
    Vec *ring_x = (Vec*)shared + threadIdx.x, *ring_dy = ring_x + AHEAD * THREADS, *ring_too = ring_dy + AHEAD * THREADS;
    Place q;
    if (!place(q, p)) return;
    const Line x = line(p, p.x, p.x_b, p.x_t, q), dy = line(p, p.dy, p.dy_b, p.dy_t, q);
    const Line too = line(p, p.dy_too, p.dy_too_b, p.dy_too_t, q), dx = line(p, p.dx, p.dx_b, p.dx_t, q);
    const i64 last = q.end + PAST;
#pragma unroll
    for (int s = 0; s < AHEAD; s += STEP) {
        fetch(ring_x, s, x, q.begin + s, q.length);
        fetch(ring_dy, s, dy, q.begin + s, q.length);
        if (PAIR) fetch(ring_too, s, too, q.begin + s - PAST, q.length);
        end_batch();
    }
    Side one, two;
    float row[PAST + STEP][VEC];
    start<false>(one, p, q.c);
    if (PAIR) start<true>(two, p, q.c);
#pragma unroll
    for (int k = 0; k < PAST; k++) widen(row[k], input_row(p, x, q, q.begin - PAST + k));
    // The first PAST steps give dx of the run before; those after the end only complete this run's dx.
    int slot = 0;
    for (i64 i0 = q.begin; i0 < last; i0 += STEP) {
        Vec rx[STEP], rd[STEP], rt[STEP];
        wait_batches<AHEAD / STEP - 1>();
        take(rx, ring_x, slot);
        take(rd, ring_dy, slot);
        if (PAIR) take(rt, ring_too, slot);
        if (i0 + AHEAD < last) {
            fetch(ring_x, slot, x, i0 + AHEAD, q.length);
            fetch(ring_dy, slot, dy, i0 + AHEAD, q.length);
            if (PAIR) fetch(ring_too, slot, too, i0 + AHEAD - PAST, q.length);
        }
        end_batch();
        slot = slot + STEP == AHEAD ? 0 : slot + STEP;
        if (i0 >= q.begin + PAST && i0 + STEP <= q.end) backward_steps<true, PAIR>(one, two, row, p, q, rx, rd, rt, dx, i0);
        else backward_steps<false, PAIR>(one, two, row, p, q, rx, rd, rt, dx, i0);
    }
    finish<false>(one, p, q.r, q.c);
    if (PAIR) finish<true>(two, p, q.r, q.c);
}
KERNEL BOUNDS(THREADS, BACKWARD_BLOCKS) conv_backward(const Params p) { backward_pass<false>(p); }
KERNEL BOUNDS(THREADS, PAIR_BACKWARD_BLOCKS) conv_backward_pair(const Params p) { backward_pass<true>(p); }

// Sums over runs in a fixed order: 32 columns and 32 shares of the runs a block of 1024 threads.
// As many blocks again for the other direction of a pair.
KERNEL BOUNDS(1024, 1) conv_reduce(const Params p) {
    SHARED_FLOATS(shared);
    const i64 width = (WIDTH + 1) * p.channels, each = (width + 31) / 32, side = blockIdx.x / each;
    const i64 column = blockIdx.x % each * 32 + threadIdx.x % 32;
    const float* partial = p.partial + side * p.batch * p.runs * width;
    const int share = threadIdx.x / 32;
    float total = 0.f;
    if (column < width)
        for (i64 r = share; r < p.batch * p.runs; r += 32) total += partial[r * width + column];
    shared[threadIdx.x] = total;
    __syncthreads();
    if (share != 0 || column >= width) return;
    for (int s = 1; s < 32; s++) total += shared[s * 32 + threadIdx.x];
    const i64 k = column / p.channels, c = column % p.channels;
    if (k < WIDTH) p.dweight[(side * p.channels + c) * WIDTH + k] = total;
    else if (p.dbias != 0) p.dbias[side * p.channels + c] = total;
}
