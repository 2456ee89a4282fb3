// What every kernel here starts with: number formats, fast maths, loads of two neighbouring channels.
// No header of the CUDA toolkit is needed, so that the compiler library inside torch's own packages is enough.
//
// Set from outside: BF16 (1: data are bfloat16, 0: float), PAIRED (1: rows of data are aligned to two elements).

typedef long long i64;
typedef unsigned int u32;

#ifndef SEQLAB_EMULATED
#define KERNEL extern "C" __global__ void
#define BOUNDS(threads, blocks) __launch_bounds__(threads, blocks)
#define DEVICE __device__ __forceinline__
#define DEVICE_MEMBER __device__ __forceinline__
#define SHARED_FLOATS(name) extern __shared__ float4 name##_raw[]; float* name = (float*)name##_raw

// 2^x on the special-function unit: 2 ulp, denormals flushed. Below 1 its error has a sign of its own (0.1 to 0.45 of 2^-24, by
// octave of x), and a state multiplies as many such decays as it remembers steps: gradients of float data came out wrong by
// 2e-5. There a polynomial is taken (least largest error on [-1/4, 1/4]: 1e-8), rounded to nearest; bfloat16 data are rounded
// far more coarsely.
DEVICE float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
#if !BF16
    float s = 0.00133478642f;
    s = 0.00963016972f + x * s;
    s = 0.0555040762f + x * s;
    s = 0.240226313f + x * s;
    s = 0.693147182f + x * s;
    y = fabsf(x) < 0.25f ? 1.f + x * s : y;
#endif
    return y;
}
DEVICE float log2_fast(float x) { float y; asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
DEVICE float rcp_fast(float x) { float y; asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
DEVICE u32 pack_bf16(float low, float high) {
    u32 v; asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low)); return v;
}
#define FULL 0xffffffffu
DEVICE float lane_xor(float v, int bit) { return __shfl_xor_sync(FULL, v, bit); }
DEVICE bool warp_all(bool v) { return __all_sync(FULL, v); }
// From global to shared memory in the background; the thread that asked for them waits.
DEVICE void copy8(void* to, const void* from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"((u32)__cvta_generic_to_shared(to)), "l"(from) : "memory");
}
DEVICE void copy16(void* to, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"((u32)__cvta_generic_to_shared(to)), "l"(from) : "memory");
}
// What this kernel does not read again goes first where the L2 is full.
DEVICE void store_streaming(float* at, float2 v) {
    asm volatile("st.global.cs.v2.f32 [%0], {%1, %2};" ::"l"(at), "f"(v.x), "f"(v.y) : "memory");
}
DEVICE void to_l2(const void* line) { asm volatile("prefetch.global.L2 [%0];" ::"l"(line)); }
DEVICE void copies_begun() { asm volatile("cp.async.commit_group;" ::: "memory"); }  // what was asked for so far: a group
DEVICE void copies_but_one() { asm volatile("cp.async.wait_group 1;" ::: "memory"); }  // all groups but the last
DEVICE void copies_done() { asm volatile("cp.async.wait_all;" ::: "memory"); }
// The same in batches: BYTES (4, 8, 16) each, a batch closed by end_batch, all but the newest N batches waited for.
template <int BYTES> DEVICE void copy_bytes(void* to, const void* from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"((u32)__cvta_generic_to_shared(to)), "l"(from), "n"(BYTES) : "memory");
}
DEVICE void end_batch() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> DEVICE void wait_batches() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }
// One instruction, where the compiler would rather multiply 64 bits.
DEVICE i64 wide_product(int a, int b) { i64 r; asm("mul.wide.s32 %0, %1, %2;" : "=l"(r) : "r"(a), "r"(b)); return r; }
// Matrix instruction m16n8k8 in tf32: adds A B to the accumulators.
DEVICE void sum_lanes(float (&c)[4], float a0, float a1, float a2, float a3, float b0, float b1) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(__float_as_uint(a0)), "r"(__float_as_uint(a1)), "r"(__float_as_uint(a2)), "r"(__float_as_uint(a3)),
          "r"(__float_as_uint(b0)), "r"(__float_as_uint(b1)));
}
#endif

#define LOG2E 1.4426950408889634f
#define LN2 0.6931471805599453f

DEVICE float bf16_low(u32 v) { return __uint_as_float(v << 16); }
DEVICE float bf16_high(u32 v) { return __uint_as_float(v & 0xffff0000u); }

#if BF16
typedef unsigned short elem;
typedef u32 pair;
DEVICE float to_float(elem v) { return __uint_as_float((u32)v << 16); }
DEVICE elem from_float(float v) { return (elem)(pack_bf16(v, 0.f) & 0xffffu); }
DEVICE float2 unpack(pair v) { return make_float2(bf16_low(v), bf16_high(v)); }
DEVICE pair make_pair(elem a, elem b) { return (u32)a | ((u32)b << 16); }
DEVICE pair pack(float2 v) { return pack_bf16(v.x, v.y); }
DEVICE elem pair_first(pair v) { return (elem)(v & 0xffffu); }
DEVICE elem pair_second(pair v) { return (elem)(v >> 16); }
#else
typedef float elem;
typedef float2 pair;
DEVICE float to_float(elem v) { return v; }
DEVICE elem from_float(float v) { return v; }
DEVICE float2 unpack(pair v) { return v; }
DEVICE pair make_pair(elem a, elem b) { return make_float2(a, b); }
DEVICE pair pack(float2 v) { return v; }
DEVICE elem pair_first(pair v) { return v.x; }
DEVICE elem pair_second(pair v) { return v.y; }
#endif

// Two neighbouring channels. `second` is the distance to the second one: 1, or 0 where the row has ended.
DEVICE pair load_pair(const elem* at, int second) {
#if PAIRED
    return __ldg((const pair*)at);
#else
    return make_pair(__ldg(at), __ldg(at + second));
#endif
}
DEVICE void store_pair(elem* at, float2 v, bool first, bool second) {
    pair w = pack(v);
#if PAIRED
    if (first) *(pair*)at = w;
#else
    if (first) at[0] = pair_first(w);
    if (second) at[1] = pair_second(w);
#endif
}

DEVICE float sigmoid(float x) { return rcp_fast(1.f + exp2_fast(-LOG2E * x)); }

// log(1 + exp(x)) = max(x, 0) + log(1 + exp(-|x|)); log(1 + e) / e on [0, 1] is a polynomial (least largest relative
// error: 1.3e-6 at degree 6, for bfloat16 data; 2e-7, rounding included, at degree 8).
DEVICE float softplus(float x) {
    const float e = exp2_fast(-LOG2E * fabsf(x));
#if BF16
    float s = 0.014141013f;
    s = -0.066401765f + e * s;
    s = 0.14922383f + e * s;
    s = -0.23503858f + e * s;
    s = 0.33109447f + e * s;
    s = -0.49986964f + e * s;
    s = 0.99999875f + e * s;
#else
    float s = 0.0052326897f;
    s = -0.029505221f + e * s;
    s = 0.078225926f + e * s;
    s = -0.13663243f + e * s;
    s = 0.19106005f + e * s;
    s = -0.24842982f + e * s;
    s = 0.33319098f + e * s;
    s = -0.49999493f + e * s;
    s = 0.99999994f + e * s;
#endif
    return e * s + fmaxf(x, 0.f);
}
