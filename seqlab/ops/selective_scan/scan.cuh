// What scan.cu and scan_short.cu have in common: the parameters of a scan, who owns which channels, steps and their sizes.
//
//     h_t = exp(delta_t A) h_{t-1} + delta_t u_t B_t          y_t = (C_t . h_t + D u_t) silu(z_t)
//
// A thread owns TILE steps of two neighbouring channels. Logical time i runs in scan order; position = i, or length-1-i when
// reversed.
//
// Set from outside: STATES, BF16, PAIRED (device.cuh), WIDE (1: rows of data, B and C are aligned to 16 bytes).

#ifndef WIDE
#define WIDE 0
#endif
#if WIDE
#define PER (BF16 ? 8 : 4)  // values of B or C fetched at a time
#else
#define PER 1
#endif
#ifndef TILE
#define TILE 8
#endif
#define ALL ((1u << TILE) - 1u)

struct Params {
    const elem *u, *delta, *B, *C, *z, *dy;        // what is read first (the host writes these addresses at once)
    const float *A, *D, *bias, *initial, *dfinal;  // A with any strides, the states as (b d n)
    const unsigned char* mask;                     // (b l)
    elem* y;                                       // (b l d)
    elem* ungated;                                 // (b l d), y before the gate, where it is kept
    float* final;                                  // (b d n)
    float* segments;                               // (b segment n d), state at a segment's start
    elem *du, *ddelta, *dz;                        // (b l d)
    elem *into_B, *into_C;                         // (b l n)
    float *dinitial, *dA, *dD, *dbias;             // dA as (d n)
    float* partial;                                // (b*chunk n+2 d): dA, dD, dbias of one chunk
    // scan.cu
    float *ends, *sums;                            // (b chunk n d), (b chunk d)
    void *dB, *dC;                                 // into_B and into_C, or if several (channel block b l n) of float
    float* scratch;                                // checkpoints of the blocks in flight
    // scan_short.cu
    float* blocks;                                 // (channel block, b, C or B, n, l): what a block's channels add to dC and dB
    i64 A_c, A_n, u_b, u_t, delta_b, delta_t, B_b, B_t, C_b, C_t, z_b, z_t, dy_b, dy_t;
    i64 batch, length, channels, chunk, chunks, segment, all_segments, channel_blocks, items;
    i64 summed;            // chunks that *_ends sum up: all but the last one walked to, or all
    i64 carried;           // 1: `ends` has been turned into what enters every chunk; 0: every block does so for itself
    i64 shares;            // threads that share the carry over the chunks of one state of one channel
    i64 all_states, add;   // STATES, or more when they are taken in groups; add to what earlier groups left
    i64 softplus, reverse;
};

// The two channels of a thread.
struct Channels {
    i64 c, cc;  // the first one, and the same inside the array
    int second; // distance to the second one inside the array: 1, or 0 at the end
    bool ok0, ok1;
};
DEVICE void own_channels(Channels& q, const Params& p, i64 c) {
    q.c = c;
    q.ok0 = c < p.channels;
    q.ok1 = c + 1 < p.channels;
#if PAIRED
    q.cc = q.ok0 ? c : p.channels - 2;
    q.second = 1;
#else
    q.cc = q.ok0 ? c : p.channels - 1;
    q.second = q.ok1 ? 1 : 0;
#endif
}
// Of a row of our own making, aligned to two channels where the data are.
DEVICE float2 read2(const float* row, const Channels& q) {
#if PAIRED
    return __ldg((const float2*)(row + q.cc));
#else
    return make_float2(__ldg(row + q.cc), __ldg(row + q.cc + q.second));
#endif
}
// Of D or the bias, which may begin anywhere (0: all are 0).
DEVICE float2 read_vector(const float* v, const Channels& q) {
    return v != 0 ? make_float2(__ldg(v + q.cc), __ldg(v + q.cc + q.second)) : make_float2(0.f, 0.f);
}
DEVICE void write2(float* row, const Channels& q, float2 v) {
    if (q.ok0) row[q.c] = v.x;
    if (q.ok1) row[q.c + 1] = v.y;
}
// One state of a tensor (b d n) of all states.
DEVICE float2 read_state(const Params& p, const Channels& q, const float* from, i64 b, int n) {
    const float* at = from + (b * p.channels + q.cc) * p.all_states + n;
    return make_float2(at[0], at[q.second * p.all_states]);
}
DEVICE void write_state(const Params& p, const Channels& q, float* to, i64 b, int n, float2 v) {
    float* at = to + (b * p.channels + q.c) * p.all_states + n;
    if (q.ok0) at[0] = v.x;
    if (q.ok1) at[p.all_states] = v.y;
}
DEVICE float2 coefficients(const Params& p, const Channels& q, int n) {  // log2(e) A
    const float* at = p.A + q.cc * p.A_c + n * p.A_n;
    return make_float2(LOG2E * __ldg(at), LOG2E * __ldg(at + q.second * p.A_c));
}

DEVICE i64 position(const Params& p, i64 i) { return p.reverse ? p.length - 1 - i : i; }
// One bit a step of the tile at i0: inside the sequence and not masked.
DEVICE u32 live_steps(const Params& p, i64 b, i64 i0) {
    const i64 left = p.length - i0;
    u32 bits = left >= TILE ? ALL : left <= 0 ? 0u : (1u << (int)left) - 1u;
    if (p.mask != 0) {
        const unsigned char* row = p.mask + b * p.length;
#pragma unroll 1
        for (int j = 0; j < TILE; j++)
            if ((bits >> j) & 1u)
                if (!row[position(p, i0 + j)]) bits &= ~(1u << j);
    }
    return bits;
}
// delta' from what was read; 0 at dead steps, where the state then passes through.
DEVICE void step_sizes(float2 (&dt)[TILE], const pair (&raw)[TILE], float2 bias, i64 soft, u32 live) {
#pragma unroll
    for (int j = 0; j < TILE; j++) {
        dt[j] = unpack(raw[j]);
        dt[j].x += bias.x;
        dt[j].y += bias.y;
    }
    if (soft) {
#pragma unroll
        for (int j = 0; j < TILE; j++) {
            dt[j].x = softplus(dt[j].x);
            dt[j].y = softplus(dt[j].y);
        }
    }
    if (live != ALL) {
#pragma unroll
        for (int j = 0; j < TILE; j++)
            if (!((live >> j) & 1u)) dt[j] = make_float2(0.f, 0.f);
    }
}
// A state after a decay d. Where it is 0 it stays 0, also against an infinite growth.
DEVICE float decayed(float d, float h) { return h == 0.f ? 0.f : d * h; }

// dA, dD, dbias: the sum of column e of `partial`.
DEVICE void give_parameter(const Params& p, i64 e, float total) {
    const i64 n = e / p.channels, c = e % p.channels;
    if (n < STATES) p.dA[c * p.all_states + n] = total;
    else if (n == STATES) { if (p.dD != 0) p.dD[c] = total; }
    else if (p.dbias != 0) p.dbias[c] = total;
}
