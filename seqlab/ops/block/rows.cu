// What a block does row by row: RMSNorm, its gradient added to that of the residual stream, sums, gates. Bound by memory.
//
//     norm: y = x r w,  r = 1 / sqrt(mean(x^2) + eps)
//           dx = residual + r (g - x r mean(g x r)),  g = dy w          dw = sum over rows of dy x r
//     gate: y = (x + other) silu(z)
//
// Norm: a warp owns a row, VEC neighbouring channels a lane at a time, all of it in registers; r is made again in the
// backward pass, so nothing is kept for it. dw: every warp adds up the rows it meets, then norm_reduce adds the warps in
// order. The rest: VEC neighbouring channels a thread, four of its pieces on their way at a time; rows may lie any distance
// apart, so that the halves of a projection's output are read and written in place.
//
// Set from outside: CHANNELS, VEC (4, or 1 where rows are not aligned to 4), BF16 (type of y, dy, other, z), WIDE (1: x,
// residual and dx are float, 0: like y), PAIRED (ignored).

struct Params {
    const void *x, *residual;       // (rows d); residual may be 0
    const elem *dy, *other, *z;     // (rows d)
    const float* weight;            // (d)
    elem *y, *dz;                   // (rows d)
    void* dx;                       // (rows d)
    float *partial, *dweight;       // (warps d), (d)
    i64 x_t, other_t, dx_t, z_t, dz_t;  // elements from row to row; norms and what is not named here: d
    i64 rows, warps, epsilon;       // epsilon: the bits of a float
};

#if WIDE || !BF16
typedef float wide;
#else
typedef elem wide;
#endif
// Beyond 4096 channels the norm is not asked for; let it stay small then.
#define ROUNDS (CHANNELS <= 4096 ? (CHANNELS + 32 * VEC - 1) / (32 * VEC) : 1)
template <class T> struct alignas(VEC * sizeof(T)) Vec { T e[VEC]; };

DEVICE float as_float(float v) { return v; }
DEVICE float as_float(unsigned short v) { return __uint_as_float((u32)v << 16); }
DEVICE void round_to(float& to, float v) { to = v; }
DEVICE void round_to(unsigned short& to, float v) { to = (unsigned short)(pack_bf16(v, 0.f) & 0xffffu); }

// A lane's share of a row; 0 beyond its end.
template <class T> DEVICE void load_row(float (&v)[ROUNDS][VEC], const T* row, int lane) {
#pragma unroll
    for (int r = 0; r < ROUNDS; r++) {
        const int c = (r * 32 + lane) * VEC;
        if (CHANNELS % (32 * VEC) == 0 || c < CHANNELS) {
            const Vec<T> raw = *(const Vec<T>*)(row + c);
#pragma unroll
            for (int e = 0; e < VEC; e++) v[r][e] = as_float(raw.e[e]);
        } else {
#pragma unroll
            for (int e = 0; e < VEC; e++) v[r][e] = 0.f;
        }
    }
}
template <class T> DEVICE void store_row(T* row, const float (&v)[ROUNDS][VEC], int lane) {
#pragma unroll
    for (int r = 0; r < ROUNDS; r++) {
        const int c = (r * 32 + lane) * VEC;
        if (CHANNELS % (32 * VEC) == 0 || c < CHANNELS) {
            Vec<T> raw;
#pragma unroll
            for (int e = 0; e < VEC; e++) round_to(raw.e[e], v[r][e]);
            *(Vec<T>*)(row + c) = raw;
        }
    }
}
DEVICE float warp_sum(float v) {
#pragma unroll
    for (int bit = 16; bit > 0; bit /= 2) v += lane_xor(v, bit);
    return v;
}
DEVICE float scale(const Params& p, const float (&x)[ROUNDS][VEC]) {
    float square = 0.f;
#pragma unroll
    for (int r = 0; r < ROUNDS; r++)
#pragma unroll
        for (int e = 0; e < VEC; e++) square += x[r][e] * x[r][e];
    return 1.f / sqrtf(warp_sum(square) * (1.f / CHANNELS) + __uint_as_float((u32)p.epsilon));
}

KERNEL BOUNDS(128, 1) norm_forward(const Params p) {
    const int lane = threadIdx.x % 32;
    float w[ROUNDS][VEC];
    load_row(w, p.weight, lane);
    for (i64 row = (i64)blockIdx.x * 4 + threadIdx.x / 32; row < p.rows; row += p.warps) {
        float x[ROUNDS][VEC];
        load_row(x, (const wide*)p.x + row * CHANNELS, lane);
        const float s = scale(p, x);
#pragma unroll
        for (int r = 0; r < ROUNDS; r++)
#pragma unroll
            for (int e = 0; e < VEC; e++) x[r][e] *= s * w[r][e];
        store_row(p.y + row * CHANNELS, x, lane);
    }
}

KERNEL BOUNDS(128, 1) norm_backward(const Params p) {
    const int lane = threadIdx.x % 32;
    const i64 first = (i64)blockIdx.x * 4 + threadIdx.x / 32;
    float w[ROUNDS][VEC], dw[ROUNDS][VEC];
    load_row(w, p.weight, lane);
#pragma unroll
    for (int r = 0; r < ROUNDS; r++)
#pragma unroll
        for (int e = 0; e < VEC; e++) dw[r][e] = 0.f;
    for (i64 row = first; row < p.rows; row += p.warps) {
        float x[ROUNDS][VEC], g[ROUNDS][VEC], more[ROUNDS][VEC];
        load_row(x, (const wide*)p.x + row * CHANNELS, lane);
        load_row(g, p.dy + row * CHANNELS, lane);
        if (p.residual != 0) load_row(more, (const wide*)p.residual + row * CHANNELS, lane);
        const float s = scale(p, x);
        float dot = 0.f;
#pragma unroll
        for (int r = 0; r < ROUNDS; r++)
#pragma unroll
            for (int e = 0; e < VEC; e++) {
                x[r][e] *= s;
                dw[r][e] += g[r][e] * x[r][e];
                g[r][e] *= w[r][e];
                dot += g[r][e] * x[r][e];
            }
        dot = warp_sum(dot) * (1.f / CHANNELS);
#pragma unroll
        for (int r = 0; r < ROUNDS; r++)
#pragma unroll
            for (int e = 0; e < VEC; e++) {
                g[r][e] = s * (g[r][e] - x[r][e] * dot);
                if (p.residual != 0) g[r][e] += more[r][e];
            }
        store_row((wide*)p.dx + row * CHANNELS, g, lane);
    }
    store_row(p.partial + first * CHANNELS, dw, lane);
}

#define PIECES 4
#define GROUPS (CHANNELS / VEC)
// A thread's pieces: where each is, and whether it is there.
struct Piece {
    i64 row;
    int c;
    bool there;
};
DEVICE Piece piece(const Params& p, i64 i) {
    Piece q;
    q.there = i < p.rows * GROUPS;
    q.row = i / GROUPS;
    q.c = (int)(i % GROUPS) * VEC;
    return q;
}
template <class T> DEVICE Vec<T> get(const T* base, i64 row_t, const Piece& q) {
    Vec<T> zero = {};
    return q.there ? *(const Vec<T>*)(base + q.row * row_t + q.c) : zero;
}
template <class T> DEVICE void put(T* base, i64 row_t, const Piece& q, const float (&v)[VEC]) {
    Vec<T> raw;
#pragma unroll
    for (int e = 0; e < VEC; e++) round_to(raw.e[e], v[e]);
    if (q.there) *(Vec<T>*)(base + q.row * row_t + q.c) = raw;
}
#define FOR_PIECES(first) for (i64 first = (i64)blockIdx.x * 128 + threadIdx.x; first < p.rows * GROUPS; first += (i64)gridDim.x * 128 * PIECES)

// dx = x + other
KERNEL BOUNDS(128, 1) add_rows(const Params p) {
    FOR_PIECES(first) {
        Piece q[PIECES];
        Vec<wide> a[PIECES];
        Vec<elem> b[PIECES];
#pragma unroll
        for (int j = 0; j < PIECES; j++) {
            q[j] = piece(p, first + (i64)j * gridDim.x * 128);
            a[j] = get((const wide*)p.x, p.x_t, q[j]);
            b[j] = get(p.other, p.other_t, q[j]);
        }
#pragma unroll
        for (int j = 0; j < PIECES; j++) {
            float v[VEC];
#pragma unroll
            for (int e = 0; e < VEC; e++) v[e] = as_float(a[j].e[e]) + as_float(b[j].e[e]);
            put((wide*)p.dx, p.dx_t, q[j], v);
        }
    }
}

// dx = x + other, y = dx silu(z); all in the data's type.
KERNEL BOUNDS(128, 1) gate_forward(const Params p) {
    FOR_PIECES(first) {
        Piece q[PIECES];
        Vec<elem> a[PIECES], b[PIECES], z[PIECES];
#pragma unroll
        for (int j = 0; j < PIECES; j++) {
            q[j] = piece(p, first + (i64)j * gridDim.x * 128);
            a[j] = get((const elem*)p.x, CHANNELS, q[j]);
            b[j] = get(p.other, CHANNELS, q[j]);
            z[j] = get(p.z, p.z_t, q[j]);
        }
#pragma unroll
        for (int j = 0; j < PIECES; j++) {
            float s[VEC], y[VEC];
#pragma unroll
            for (int e = 0; e < VEC; e++) {
                const float g = as_float(z[j].e[e]);
                s[e] = as_float(a[j].e[e]) + as_float(b[j].e[e]);
                y[e] = s[e] * g * sigmoid(g);
            }
            put((elem*)p.dx, CHANNELS, q[j], s);
            put(p.y, CHANNELS, q[j], y);
        }
    }
}

// From x, the sum before the gate: y again, its gradient dx, that of z.
KERNEL BOUNDS(128, 1) gate_backward(const Params p) {
    FOR_PIECES(first) {
        Piece q[PIECES];
        Vec<elem> a[PIECES], d[PIECES], z[PIECES];
#pragma unroll
        for (int j = 0; j < PIECES; j++) {
            q[j] = piece(p, first + (i64)j * gridDim.x * 128);
            a[j] = get((const elem*)p.x, CHANNELS, q[j]);
            d[j] = get(p.dy, CHANNELS, q[j]);
            z[j] = get(p.z, p.z_t, q[j]);
        }
#pragma unroll
        for (int j = 0; j < PIECES; j++) {
            float ds[VEC], dz[VEC], y[VEC];
#pragma unroll
            for (int e = 0; e < VEC; e++) {
                const float g = as_float(z[j].e[e]), f = sigmoid(g), s = as_float(a[j].e[e]), dy = as_float(d[j].e[e]);
                y[e] = s * g * f;
                ds[e] = dy * g * f;
                dz[e] = dy * s * f * (1.f + g * (1.f - f));
            }
            put((elem*)p.dx, CHANNELS, q[j], ds);
            put(p.dz, p.dz_t, q[j], dz);
            put(p.y, CHANNELS, q[j], y);
        }
    }
}

// Sums over warps in a fixed order: 32 channels and 32 shares of the warps a block of 1024 threads.
KERNEL BOUNDS(1024, 1) norm_reduce(const Params p) {
    SHARED_FLOATS(shared);
    const int column = blockIdx.x * 32 + threadIdx.x % 32, share = threadIdx.x / 32;
    float total = 0.f;
    if (column < CHANNELS)
        for (i64 row = share; row < p.warps; row += 32) total += p.partial[row * CHANNELS + column];
    shared[threadIdx.x] = total;
    __syncthreads();
    if (share != 0 || column >= CHANNELS) return;
    for (int s = 1; s < 32; s++) total += shared[s * 32 + threadIdx.x];
    p.dweight[column] = total;
}
