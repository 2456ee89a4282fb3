// Products in tiles on tensor cores: 16 rows of weights times 8 streams at a time.

#define UNIT (BF16 ? 16 : 8)  // columns that are worked on at a time
// Numbers of a row of k in a tile: rows begin a quarter of the banks apart.
#define PITCH(k) ((BF16 ? ((k) + 63) / 64 * 64 : ((k) + 31) / 32 * 32) + 8)

#ifndef SEQLAB_EMULATED
DEVICE void fetch16(void* to, const void* from) { copy16(to, from); }
// Past the first-level cache, which does not see what other kernels write meanwhile.
DEVICE float fresh(const float* p) { float v; asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(v) : "l"(p)); return v; }
DEVICE float4 fresh4(const float* p) {
    float4 v;
    asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "l"(p));
    return v;
}
// Here and not where the compiler would like it.
DEVICE uint4 load_now(const uint4* p) {
    uint4 v;
    asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
    return v;
}
#else
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

// sum[g][t] += 16 rows (group STEP g) x 8 streams (tile t), UNITS units. w: the lane's first fragment; x: the lane's stream and columns.
template <int G, int STEP, int T, int UNITS, int GROUPS, int PITCH> DEVICE void accumulate(float (&sum)[G][T][4], const uint4* w, const elem* x) {
#pragma unroll 4
    for (int k = 0; k < UNITS; k++) {
        Rows a[G];
#pragma unroll
        for (int g = 0; g < G; g++) a[g] = rows_of(w[(k * GROUPS + STEP * g) * 32]);
#pragma unroll
        for (int t = 0; t < T; t++) {
            Columns b = columns_of(x + 8 * t * PITCH + UNIT * k);
#pragma unroll
            for (int g = 0; g < G; g++) multiply(sum[g][t], a[g], b);
        }
    }
}

// The squares of 16 bytes of a row.
DEVICE float squares(const elem* x) {
#if BF16
    uint4 v = *(const uint4*)x;
    const u32 word[4] = {v.x, v.y, v.z, v.w};
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < 4; i++) sum += bf16_low(word[i]) * bf16_low(word[i]), sum += bf16_high(word[i]) * bf16_high(word[i]);
    return sum;
#else
    float4 v = *(const float4*)x;
    return v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
#endif
}

template <int N> DEVICE void load_floats(float (&v)[N], const float* at) {
#pragma unroll
    for (int i = 0; i < N; i += 4) {
        float4 a = *(const float4*)(at + i);
        v[i] = a.x; v[i + 1] = a.y; v[i + 2] = a.z; v[i + 3] = a.w;
    }
}
