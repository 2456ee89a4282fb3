// Runs a CUDA kernel on the processor: one fibre per GPU thread, switched at barriers and warp exchanges. The blocks of a
// cluster (CLUSTER, 1 unless set) run together, the clusters one after another.
// Enough of the language for the kernels of this package; shared memory starts as NaN, so that a read of something
// nobody wrote shows.
#pragma once
#include <cmath>
#include <cstdio>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <ucontext.h>
#include <memory>
#include <vector>

struct float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
static inline float2 make_float2(float x, float y) { return {x, y}; }
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
struct dim { unsigned x; };
static dim threadIdx, blockIdx, gridDim, blockDim;
static inline float __uint_as_float(unsigned v) { float f; memcpy(&f, &v, 4); return f; }
static inline unsigned __float_as_uint(float f) { unsigned v; memcpy(&v, &f, 4); return v; }

#ifndef CLUSTER
#define CLUSTER 1
#endif
#define CLUSTERED
#define KERNEL extern "C" void
#define BOUNDS(threads, blocks)
#define DEVICE static inline
#define DEVICE_MEMBER inline
#define SHARED_FLOATS(name) float* name = (float*)emulated::shared[emulated::block()].data()
#define __restrict__
template <class T> static inline T __ldg(const T* p) { return *p; }
#define FULL 0xffffffffu

namespace emulated {
static std::vector<float4> shared[CLUSTER];
constexpr size_t STACK = 256 * 1024;  // bytes, of which a fibre touches a few pages: not filled, so the others cost nothing
struct Fibre { ucontext_t context; std::unique_ptr<char[]> stack; bool done; };
static std::vector<Fibre> fibres;
static ucontext_t scheduler;
static unsigned current;  // fibre: threads of the first block, then of the second, ...
static unsigned waiting_block[CLUSTER], block_round[CLUSTER], waiting_cluster, cluster_round;
static std::vector<unsigned> waiting_warp, warp_round;
static std::vector<float> slot, operands;
static int votes[CLUSTER], votes_out[CLUSTER];
static unsigned block() { return current / blockDim.x; }

static void yield() { unsigned me = current; swapcontext(&fibres[me].context, &scheduler); }
static void warp_barrier() {
    unsigned w = current / 32, mine = warp_round[w];
    if (++waiting_warp[w] == 32) { waiting_warp[w] = 0; warp_round[w]++; return; }
    while (warp_round[w] == mine) yield();
}
static float exchange(float v, unsigned from) {
    slot[current] = v;
    warp_barrier();
    float r = slot[current / 32 * 32 + from];
    warp_barrier();
    return r;
}
static int block_barrier(int vote) {
    unsigned b = block(), mine = block_round[b];
    votes[b] |= vote;
    if (++waiting_block[b] == blockDim.x) {
        waiting_block[b] = 0;
        votes_out[b] = votes[b];
        votes[b] = 0;
        block_round[b]++;
        return votes_out[b];
    }
    while (block_round[b] == mine) yield();
    return votes_out[b];
}
static void cluster_barrier() {
    unsigned mine = cluster_round;
    if (++waiting_cluster == blockDim.x * CLUSTER) { waiting_cluster = 0; cluster_round++; return; }
    while (cluster_round == mine) yield();
}
}
static inline void __syncthreads() { emulated::block_barrier(0); }
static inline int __syncthreads_or(int v) { return emulated::block_barrier(v != 0); }
static inline void __syncwarp() { emulated::warp_barrier(); }
DEVICE void cluster_barrier() { emulated::cluster_barrier(); }
DEVICE void cluster_arrive() {}
DEVICE void cluster_wait() { emulated::cluster_barrier(); }
#define CALLED static
static inline float rsqrtf(float x) { return 1.f / sqrtf(x); }
// Barriers that count bytes in, as the PTX ISA describes them for one arrival a phase: the phase ends once that arrival has come and no
// byte is missing. Too few or too many bytes: the kernel never ends.
struct Arrivals { int missing; short arrived, phase; };
DEVICE void arrivals_check(Arrivals* b) { if (b->arrived && b->missing == 0) b->arrived = 0, b->phase ^= 1; }
DEVICE void arrivals_begin(unsigned long long* barriers, int count) { memset(barriers, 0, 8 * count); }
DEVICE void arrivals_expect(unsigned long long* barrier, unsigned bytes) {
    Arrivals* b = (Arrivals*)barrier;
    b->missing += bytes, b->arrived = 1;
    arrivals_check(b);
}
DEVICE void arrivals_wait(unsigned long long* barrier, unsigned parity) {
    for (long tries = 0; ((volatile Arrivals*)barrier)->phase == (short)parity; emulated::yield())
        if (++tries == 50000) {
            fprintf(stderr, "block %u, thread %u waits for ever at barrier %d: %d bytes are missing\n", emulated::block(), threadIdx.x,
                    (int)((float*)barrier - (float*)emulated::shared[emulated::block()].data()) / 2, ((Arrivals*)barrier)->missing);
            abort();
        }
}
DEVICE void remote_store(float* at, int rank, float4 v, unsigned long long* barrier) {
    float *here = (float*)emulated::shared[emulated::block()].data(), *there = (float*)emulated::shared[rank].data();
    *(float4*)(there + (at - here)) = v;
    Arrivals* b = (Arrivals*)(there + ((float*)barrier - here));
    b->missing -= 16;
    arrivals_check(b);
}
DEVICE void remote_store_if(bool sends, float* at, int rank, float4 v, unsigned long long* barrier) {
    if (sends) remote_store(at, rank, v, barrier);
}
DEVICE float load_shared_global(const float* p) { return *p; }
// mma.m16n8k16 as the PTX ISA lays its fragments out: lane 4 g + t has rows g, g + 8 and columns 2t, 2t + 1 (and 8 further on).
namespace emulated { static std::vector<unsigned> fragments; }
DEVICE float half_of(unsigned pair, int which) { return __uint_as_float(which ? pair & 0xffff0000u : pair << 16); }
DEVICE void mma(float* sum, uint4 a, unsigned b0, unsigned b1) {
    using namespace emulated;
    if (fragments.size() < 6 * slot.size()) fragments.resize(6 * slot.size());
    unsigned mine[6] = {a.x, a.y, a.z, a.w, b0, b1}, *warp = fragments.data() + current / 32 * 32 * 6;
    memcpy(warp + current % 32 * 6, mine, sizeof mine);
    warp_barrier();
    for (int i = 0; i < 4; i++) {
        int row = current % 32 / 4 + (i / 2) * 8, column = current % 4 * 2 + i % 2;
        for (int k = 0; k < 16; k++) {
            int t = k % 8 / 2, far = k / 8;
            float x = half_of(warp[(row % 8 * 4 + t) * 6 + 2 * far + row / 8], k % 2);
            sum[i] += x * half_of(warp[(column * 4 + t) * 6 + 4 + far], k % 2);
        }
    }
    warp_barrier();
}
// ldmatrix as the PTX ISA describes it: lane 8 i + r points to row r of matrix i; lane 4 g + t gets two numbers of row g of each.
namespace emulated {
static std::vector<const void*> places;
static unsigned columns(const void* at, int matrix) {
    if (places.size() < slot.size()) places.resize(slot.size());
    places[current] = at;
    warp_barrier();
    const unsigned lane = current % 32;
    unsigned v;
    memcpy(&v, (const char*)places[current / 32 * 32 + 8 * matrix + lane / 4] + lane % 4 * 4, 4);
    warp_barrier();
    return v;
}
}
DEVICE float lane_from(float v, int lane) { return emulated::exchange(v, lane); }
DEVICE float lane_xor(float v, int bit) { return emulated::exchange(v, (threadIdx.x % 32) ^ bit); }
DEVICE unsigned warp_most(unsigned v) {
    for (int bit = 1; bit < 32; bit *= 2) {
        unsigned other = __float_as_uint(lane_xor(__uint_as_float(v), bit));
        v = v > other ? v : other;
    }
    return v;
}
DEVICE float lane_up(float v, int by) {
    const int lane = threadIdx.x % 32;
    return emulated::exchange(v, lane < by ? lane : lane - by);
}
DEVICE float lane_down(float v, int by) {
    const int lane = threadIdx.x % 32;
    return emulated::exchange(v, lane + by < 32 ? lane + by : lane);
}
DEVICE bool warp_all(bool v) {
    float s = v ? 0.f : 1.f;
    for (int bit = 1; bit < 32; bit *= 2) s += lane_xor(s, bit);
    return s == 0.f;
}
DEVICE void copy8(void* to, const void* from) { memcpy(to, from, 8); }
DEVICE void copy16(void* to, const void* from) { memcpy(to, from, 16); }
DEVICE void to_l2(const void*) {}
DEVICE void store_streaming(float* at, float2 v) { at[0] = v.x, at[1] = v.y; }
DEVICE void copies_begun() {}
DEVICE void copies_but_one() {}
DEVICE void copies_done() {}
DEVICE long long wide_product(int a, int b) { return (long long)a * b; }
// The matrix instruction of device.cuh, from its definition; tf32 drops the low 13 bits of what it multiplies.
DEVICE void sum_lanes(float (&c)[4], float a0, float a1, float a2, float a3, float b0, float b1) {
    using namespace emulated;
    const unsigned me = current, first = me / 32 * 32, lane = me % 32, row = lane / 4, column = lane % 4 * 2;
    const float mine[6] = {a0, a1, a2, a3, b0, b1};
    for (int i = 0; i < 6; i++) operands[me * 6 + i] = __uint_as_float(__float_as_uint(mine[i]) & 0xffffe000u);
    warp_barrier();
    for (unsigned i = 0; i < 4; i++)
        for (unsigned k = 0; k < 8; k++)
            c[i] += operands[(first + row * 4 + k % 4) * 6 + i / 2 + k / 4 * 2] *
                    operands[(first + (column + i % 2) * 4 + k % 4) * 6 + 4 + k / 4];
    warp_barrier();
}
// Copies become visible only once their batch is waited for, so that a missing wait shows.
struct Copy { void* to; const void* from; int bytes; };
static std::vector<std::vector<std::vector<Copy>>> batches;  // thread, batch, copy
template <int BYTES> static inline void copy_bytes(void* to, const void* from) {
    if (batches.size() < emulated::slot.size()) batches.resize(emulated::slot.size());
    auto& mine = batches[emulated::current];
    if (mine.empty()) mine.emplace_back();
    mine.back().push_back({to, from, BYTES});
}
static inline void end_batch() {
    if (batches.size() < emulated::slot.size()) batches.resize(emulated::slot.size());
    auto& mine = batches[emulated::current];
    if (mine.empty()) mine.emplace_back();
    mine.emplace_back();
}
template <int N> static inline void wait_batches() {
    if (batches.size() < emulated::slot.size()) batches.resize(emulated::slot.size());
    auto& mine = batches[emulated::current];
    while ((int)mine.size() > N + 1) {
        for (const Copy& c : mine.front()) memcpy(c.to, c.from, c.bytes);
        mine.erase(mine.begin());
    }
}
DEVICE float exp2_fast(float x) { return exp2f(x); }
DEVICE float log2_fast(float x) { return log2f(x); }
DEVICE float rcp_fast(float x) { return 1.f / x; }
DEVICE unsigned round_bf16(float v) {
    unsigned b = __float_as_uint(v);
    if (v != v) return 0x7fffu;
    return (b + 0x7fffu + ((b >> 16) & 1u)) >> 16;
}
DEVICE unsigned pack_bf16(float low, float high) { return round_bf16(low) | (round_bf16(high) << 16); }

template <class P> struct Launch { static void (*kernel)(const P); static const P* params; };
template <class P> void (*Launch<P>::kernel)(const P);
template <class P> const P* Launch<P>::params;
template <class P> static void fibre_main() {
    Launch<P>::kernel(*Launch<P>::params);
    emulated::fibres[emulated::current].done = true;
    emulated::yield();
}
template <class P> static void run_grid(void (*kernel)(const P), const P* params, unsigned grid, unsigned block, size_t bytes) {
    using namespace emulated;
    Launch<P>::kernel = kernel;
    Launch<P>::params = params;
    gridDim.x = grid;
    blockDim.x = block;
    unsigned count = block * CLUSTER;
    fibres.resize(count);
    for (unsigned b = 0; b < grid; b += CLUSTER) {
        for (unsigned c = 0; c < CLUSTER; c++) {
            shared[c].assign(bytes / 16 + 1, make_float4(NAN, NAN, NAN, NAN));
            waiting_block[c] = 0;
        }
        slot.assign(count, 0.f);
        operands.assign(count * 6, 0.f);
        waiting_warp.assign(count / 32 + 1, 0);
        warp_round.assign(count / 32 + 1, 0);
        waiting_cluster = 0;
        for (unsigned t = 0; t < count; t++) {
            Fibre& f = fibres[t];
            f.done = false;
            if (t < batches.size()) batches[t].clear();
            if (!f.stack) f.stack.reset(new char[STACK]);
            getcontext(&f.context);
            f.context.uc_stack.ss_sp = f.stack.get();
            f.context.uc_stack.ss_size = STACK;
            f.context.uc_link = nullptr;
            makecontext(&f.context, (void (*)())fibre_main<P>, 0);
        }
        for (unsigned left = count; left > 0;) {
            left = 0;
            for (unsigned t = 0; t < count; t++) {
                if (fibres[t].done) continue;
                current = t;
                threadIdx.x = t % block;
                blockIdx.x = b + t / block;
                swapcontext(&scheduler, &fibres[t].context);
                if (!fibres[t].done) left++;
            }
        }
    }
}
