// Short causal convolution over time, channel-last, forward and backward: bound by memory.
//
// A thread owns VEC neighbouring channels and a run of steps; the window lives in its registers, the rows to come are
// copied to shared memory in the background, AHEAD of them. Logical time i runs in filter order; position = i, or length-1-i when reversed.
//
// Set from outside: WIDTH (1..8), VEC, BF16, SILU, MASKED (1: only the positions in `order` exist, as many in each batch row
// as `counts` says), PAIRED (ignored).

#ifndef AHEAD
#define AHEAD 16        // rows on their way from memory, a thread and tensor: a ring in shared memory
#endif
#ifndef STEP
#define STEP 4          // rows taken from the ring at a time
#endif
// Blocks a multiprocessor, so many as registers allow without spills.
#ifndef FORWARD_BLOCKS
#define FORWARD_BLOCKS (WIDTH <= 4 ? (VEC >= 4 ? 5 : 8) : (VEC >= 4 ? 3 : 5))
#endif
#ifndef BACKWARD_BLOCKS
#define BACKWARD_BLOCKS (WIDTH <= 4 ? (VEC >= 4 ? 3 : 5) : (VEC >= 4 ? 1 : 3))
#endif
#ifndef PAIR_FORWARD_BLOCKS
#define PAIR_FORWARD_BLOCKS (WIDTH <= 4 ? (VEC >= 4 ? 4 : 6) : (VEC >= 4 ? 2 : 4))
#endif
#ifndef PAIR_BACKWARD_BLOCKS
#define PAIR_BACKWARD_BLOCKS (WIDTH <= 4 ? (VEC >= 4 ? 2 : 4) : (VEC >= 4 ? 1 : 2))
#endif
#define PAST (WIDTH - 1)
#define THREADS 128

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
    i64 reverse, add;                     // add: dx is added to what is there
};

// VEC neighbouring channels of one row, as words: as an array of 16-bit elements the compiler reads and writes each alone.
#define BYTES (VEC * (BF16 ? 2 : 4))
#if BYTES >= 4
struct alignas(BYTES) Vec { u32 w[BYTES / 4]; };
#else
struct Vec { elem w[1]; };
#endif

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
// Walks along logical steps.
struct Cursor {
    const elem* base;
    i64 step;
#if MASKED
    const i64* order;
    int way;
    DEVICE_MEMBER const elem* next() {
        const elem* at = base + *order * step;
        order += way;
        return at;
    }
    DEVICE_MEMBER void skip() { order += way; }
#else
    DEVICE_MEMBER const elem* next() {
        const elem* at = base;
        base += step;
        return at;
    }
    DEVICE_MEMBER void skip() { base += step; }
#endif
};
DEVICE Cursor cursor(const Line& a, i64 i) {
    Cursor r;
    r.step = a.step;
#if MASKED
    r.base = a.at;
    r.order = a.order + i * a.way;
    r.way = a.way;
#else
    r.base = a.at + i * a.step;
#endif
    return r;
}
DEVICE Vec zero_row() {
    Vec r;
#pragma unroll
    for (int k = 0; k < (BYTES + 3) / 4; k++) r.w[k] = 0;
    return r;
}
// Input row at logical step i, i >= -(w-1); before the start comes the initial state, or zeros.
DEVICE Vec input_row(const Params& p, const Line& x, const Place& q, i64 i) {
    if (i >= 0 && i < q.length) return *(const Vec*)cursor(x, i).next();
    if (i < 0 && p.initial != 0) return *(const Vec*)(p.initial + (q.b * PAST + (p.reverse ? -1 - i : i + PAST)) * p.channels + q.c);
    return zero_row();
}
DEVICE float channel(const Vec& r, int e) {
#if BYTES < 4
    return to_float(r.w[0]);
#elif BF16
    return e % 2 ? bf16_high(r.w[e / 2]) : bf16_low(r.w[e / 2]);
#else
    return __uint_as_float(r.w[e]);
#endif
}
DEVICE void widen(float (&v)[VEC], const Vec& r) {
#pragma unroll
    for (int e = 0; e < VEC; e++) v[e] = channel(r, e);
}
DEVICE void store_row(elem* at, const float (&v)[VEC]) {
    Vec r;
#if BYTES < 4
    r.w[0] = from_float(v[0]);
#elif BF16
#pragma unroll
    for (int k = 0; k < VEC / 2; k++) r.w[k] = pack_bf16(v[2 * k], v[2 * k + 1]);
#else
#pragma unroll
    for (int k = 0; k < VEC; k++) r.w[k] = __float_as_uint(v[k]);
#endif
    *(Vec*)at = r;
}

// A thread's own ring of rows in shared memory: no other thread looks at it, so no barrier is needed. AHEAD rows, STEP of
// them a batch. Steps are counted from the run's first; not INSIDE: those outside [low, room) are zeros.
template <bool INSIDE> DEVICE void fetch(Vec* ring, int slot, Cursor& a, int t, int low, int room) {
#pragma unroll
    for (int j = 0; j < STEP; j++) {
        Vec* to = ring + (slot + j) * THREADS;
        if (INSIDE || (t + j >= low && t + j < room)) {
            if (BYTES >= 4) copy_bytes<BYTES >= 4 ? BYTES : 4>(to, a.next());
            else *to = *(const Vec*)a.next();
        } else {
            *to = zero_row();
            a.skip();
        }
    }
}
DEVICE void take(Vec (&rows)[STEP], const Vec* ring, int slot) {
#pragma unroll
    for (int j = 0; j < STEP; j++) rows[j] = ring[(slot + j) * THREADS];
}
DEVICE int count(i64 n) { return n < (1 << 30) ? (int)n : 1 << 30; }

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

DEVICE void shift(float (&v)[PAST + STEP][VEC]) {
#pragma unroll
    for (int k = 0; k < PAST; k++)
#pragma unroll
        for (int e = 0; e < VEC; e++) v[k][e] = v[STEP + k][e];
}

// STEP outputs, from step t of the run's `own` on. All are computed before any is stored: a branch between them would make
// the exponentials of one row wait for those of the row before.
template <bool INSIDE> DEVICE void forward_steps(Cursor& y, const float (&w)[WIDTH][VEC], const float (&bias)[VEC],
                                                 const float (&row)[PAST + STEP][VEC], int t, int own) {
    float r[STEP][VEC];
#pragma unroll
    for (int j = 0; j < STEP; j++)
#pragma unroll
        for (int e = 0; e < VEC; e++) {
            r[j][e] = filtered(w, bias, row + j, e);
            if (SILU) r[j][e] *= sigmoid(r[j][e]);
        }
#pragma unroll
    for (int j = 0; j < STEP; j++) {
        if (INSIDE || (t + j >= 0 && t + j < own)) store_row((elem*)y.next(), r[j]);
        else y.skip();
    }
}

// PAIR: both directions of x in one pass, y left to right and y_too right to left.
template <bool PAIR> DEVICE void forward_pass(const Params& p) {
    SHARED_FLOATS(shared);
    Vec* ring = (Vec*)shared + threadIdx.x;
    Place q;
    if (!place(q, p)) return;
    const Line x = line(p, p.x, p.x_b, p.x_t, q);
    const int own = (int)(q.end - q.begin), room = count(q.length - q.begin), last = PAIR ? own + PAST : own;
    Cursor in = cursor(x, q.begin), y = cursor(line(p, p.y, p.length * p.channels, p.channels, q), q.begin), too = y;
    if (PAIR) too = cursor(line(p, p.y_too, p.length * p.channels, p.channels, q), q.begin - PAST);
#pragma unroll
    for (int s = 0; s < AHEAD; s += STEP) {
        fetch<false>(ring, s, in, s, 0, room);
        end_batch();
    }
    float w[WIDTH][VEC], bias[VEC], v[WIDTH][VEC], bias_too[VEC], row[PAST + STEP][VEC];
    load_filter<false>(w, bias, p, q.c);
    if (PAIR) load_filter<true>(v, bias_too, p, q.c);
#pragma unroll
    for (int k = 0; k < PAST; k++) widen(row[k], input_row(p, x, q, q.begin - PAST + k));
    int slot = 0;
    for (int t = 0; t < last; t += STEP) {
        Vec now[STEP];
        wait_batches<AHEAD / STEP - 1>();
        take(now, ring, slot);
        if (t + AHEAD >= last) {  // nothing more
        } else if (t + AHEAD + STEP <= room) {
            fetch<true>(ring, slot, in, 0, 0, 0);
        } else {
            fetch<false>(ring, slot, in, t + AHEAD, 0, room);
        }
        end_batch();
        slot = (slot + STEP) % AHEAD;
#pragma unroll
        for (int j = 0; j < STEP; j++) widen(row[PAST + j], now[j]);
        if (t + STEP <= own) forward_steps<true>(y, w, bias, row, 0, 0);
        else forward_steps<false>(y, w, bias, row, t, own);
        if (PAIR) {
            if (t >= PAST && t + STEP - PAST <= own) forward_steps<true>(too, v, bias_too, row, 0, 0);
            else forward_steps<false>(too, v, bias_too, row, t - PAST, own);
        }
        shift(row);
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
template <bool MIRRORED> DEVICE void one_step(Side& q, float (&v)[VEC], const Vec& dy, const float (*row)[VEC], int j, bool own) {
#pragma unroll
    for (int e = 0; e < VEC; e++) {
        float d = channel(dy, e);
        if (SILU) {
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
// STEP steps from t on. INSIDE: all are the run's own, and so are the STEP steps of dx that come out.
template <bool INSIDE, bool PAIR> DEVICE void backward_steps(Side& one, Side& two, float (&row)[PAST + STEP][VEC], const Params& p, const Place& q,
                                                             const Vec (&x)[STEP], const Vec (&dy)[STEP], const Vec (&dy_too)[STEP],
                                                             Cursor& dx, int t, int own) {
    Vec before[STEP];
    Cursor reading = dx;
    if (!PAIR && p.add) {
#pragma unroll
        for (int j = 0; j < STEP; j++)
            if (INSIDE || (t + j >= PAST && t + j - PAST < own)) before[j] = *(const Vec*)reading.next();
            else reading.skip();
    }
#pragma unroll
    for (int j = 0; j < STEP; j++) {
        const bool inside = INSIDE || (t + j >= PAST && t + j - PAST < own);
        float v[VEC];
        widen(row[PAST + j], x[j]);
#pragma unroll
        for (int e = 0; e < VEC; e++) v[e] = 0.f;
        one_step<false>(one, v, dy[j], row + j, j, INSIDE || t + j < own);
        if (PAIR) one_step<true>(two, v, dy_too[j], row + j, j, inside);
        if (inside) {
            if (!PAIR && p.add) {
#pragma unroll
                for (int e = 0; e < VEC; e++) v[e] += channel(before[j], e);
            }
            store_row((elem*)dx.next(), v);
        } else {
            dx.skip();
            const int s = t + j - PAST;
            if (!PAIR && s < 0 && q.begin == 0 && p.dinitial != 0)
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
    const Line x = line(p, p.x, p.x_b, p.x_t, q);
    const int own = (int)(q.end - q.begin), room = count(q.length - q.begin), last = own + PAST;
    const int low = q.begin < PAST ? PAST - (int)q.begin : 0;  // of the mirrored direction, counted from PAST before
    Cursor in = cursor(x, q.begin), dy = cursor(line(p, p.dy, p.dy_b, p.dy_t, q), q.begin), too = dy;
    if (PAIR) too = cursor(line(p, p.dy_too, p.dy_too_b, p.dy_too_t, q), q.begin - PAST);
    Cursor dx = cursor(line(p, p.dx, p.dx_b, p.dx_t, q), q.begin - PAST);
#pragma unroll
    for (int s = 0; s < AHEAD; s += STEP) {
        fetch<false>(ring_x, s, in, s, 0, room);
        fetch<false>(ring_dy, s, dy, s, 0, room);
        if (PAIR) fetch<false>(ring_too, s, too, s, low, room + PAST);
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
    for (int t = 0; t < last; t += STEP) {
        Vec rx[STEP], rd[STEP], rt[STEP];
        wait_batches<AHEAD / STEP - 1>();
        take(rx, ring_x, slot);
        take(rd, ring_dy, slot);
        if (PAIR) take(rt, ring_too, slot);
        if (t + AHEAD >= last) {  // nothing more
        } else if (t + AHEAD + STEP <= room) {
            fetch<true>(ring_x, slot, in, 0, 0, 0);
            fetch<true>(ring_dy, slot, dy, 0, 0, 0);
            if (PAIR) fetch<true>(ring_too, slot, too, 0, 0, 0);
        } else {
            fetch<false>(ring_x, slot, in, t + AHEAD, 0, room);
            fetch<false>(ring_dy, slot, dy, t + AHEAD, 0, room);
            if (PAIR) fetch<false>(ring_too, slot, too, t + AHEAD, 0, room + PAST);
        }
        end_batch();
        slot = (slot + STEP) % AHEAD;
        if (t >= PAST && t + STEP <= own) backward_steps<true, PAIR>(one, two, row, p, q, rx, rd, rt, dx, t, own);
        else backward_steps<false, PAIR>(one, two, row, p, q, rx, rd, rt, dx, t, own);
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
