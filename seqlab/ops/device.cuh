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

// 2^x on the special-function unit: 2 ulp, denormals flushed.
DEVICE float exp2_fast(float x) { float y; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
DEVICE float log2_fast(float x) { float y; asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
DEVICE float rcp_fast(float x) { float y; asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
DEVICE u32 pack_bf16(float low, float high) {
    u32 v; asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low)); return v;
}
#define FULL 0xffffffffu
DEVICE float lane_xor(float v, int bit) { return __shfl_xor_sync(FULL, v, bit); }
DEVICE bool warp_all(bool v) { return __all_sync(FULL, v); }
// Eight bytes from global to shared memory in the background; the thread that asked for them waits and reads them.
DEVICE void copy_ahead(float2* to, const float2* from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"((u32)__cvta_generic_to_shared(to)), "l"(from) : "memory");
}
DEVICE void copies_done() { asm volatile("cp.async.wait_all;" ::: "memory"); }
// The same in batches: BYTES (4, 8, 16) each, a batch closed by end_batch, all but the newest N batches waited for.
template <int BYTES> DEVICE void copy_bytes(void* to, const void* from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"((u32)__cvta_generic_to_shared(to)), "l"(from), "n"(BYTES) : "memory");
}
DEVICE void end_batch() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> DEVICE void wait_batches() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }
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

// log(1 + exp(x)). Below exp(x) = 1/8 the logarithm's absolute error would be a large relative one: a short series there.
DEVICE float softplus(float x) {
    float e = exp2_fast(LOG2E * x);
    float s = e * (1.f + e * (-0.5f + e * (0.33333333f + e * (-0.25f + e * (0.2f + e * (-0.16666667f + e * 0.14285715f))))));
    float y = e < 0.125f ? s : LN2 * log2_fast(1.f + e);
    return x > 20.f ? x : y;
}
