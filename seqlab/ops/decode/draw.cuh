// What the decoder's kernels share: sums over a warp, the matrix instruction for bfloat16, drawing.

// The code of one token has to fit the instruction caches: what runs once or twice is not unrolled.
#define ROLLED _Pragma("unroll 1")

typedef unsigned long long u64;

#ifndef SEQLAB_EMULATED
// sum (16 rows, 8 streams) += a (16 rows, 16 k) b (16 k, 8 streams), in fragments of a warp.
DEVICE void mma(float* sum, uint4 a, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
}
DEVICE float lane_from(float v, int lane) { return __shfl_sync(FULL, v, lane); }
// The largest of a warp.
DEVICE u32 warp_most(u32 v) { u32 r; asm volatile("redux.sync.max.u32 %0, %1, 0xffffffff;" : "=r"(r) : "r"(v)); return r; }
#endif

DEVICE float warp_sum(float v) { for (int b = 16; b; b >>= 1) v += lane_xor(v, b); return v; }
// In one instruction, which knows whole numbers alone: a float's bits are put into its order first. -0 is less than 0.
DEVICE float warp_max(float v) {
    const u32 bits = __float_as_uint(v), most = warp_most(bits >> 31 ? ~bits : bits | 0x80000000u);
    return __uint_as_float(most >> 31 ? most & 0x7fffffffu : ~most);
}

DEVICE int round_up(int n, int to) { return (n + to - 1) / to * to; }
DEVICE int quotient(int a, int b) { return (int)(((float)a + 0.5f) * rcp_fast((float)b)); }  // exact for a below 2^20

DEVICE float uniform(i64 key, i64 position) {  // sampling.draw
    u64 z = (u64)key + (u64)position * 0x9E3779B97F4A7C15ull;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    z ^= z >> 31;
    return ((float)(u32)(z >> 41) + 0.5f) * 1.1920928955078125e-7f;
}

// sampling.sample for one stream by one warp; a lane has `each` neighbouring tokens. Returns the token and sets
// *normaliser to log sum exp(logits).
DEVICE int draw(int vocab, int top_k, const float* settings, const float* logits, float* weights, float r, float* normaliser) {
    int each = (vocab + 31) / 32, lane = threadIdx.x % 32;
    int begin = lane * each < vocab ? lane * each : vocab, end = begin + each < vocab ? begin + each : vocab;
    float temperature = settings[1], top_p = settings[2];
    float top = __uint_as_float(0xff800000u);
#pragma unroll 4
    for (int v = begin; v < end; v++) top = fmaxf(top, logits[v]);
    top = warp_max(top);
    bool greedy = temperature == 0.f;
    float best = 1e9f, sum = 0.f, own = 0.f, per = greedy ? LOG2E : LOG2E / temperature;
#pragma unroll 4
    for (int v = end - 1; v >= begin; v--) {
        float below = logits[v] - top, w = exp2_fast(per * below);
        if (below == 0.f) best = v;
        sum += exp2_fast(LOG2E * below);
        weights[v] = w;
        own += w;
    }
    *normaliser = top + LN2 * log2_fast(warp_sum(sum));
    if (greedy) return (int)-warp_max(-best);
    if (top_k || top_p < 1.f) {
        __syncwarp();
        u32 keep = 0;
        float mass = 0.f;
        ROLLED for (int v = begin; v < end; v++) {
            int above = 0;
#pragma unroll 4
            for (int o = 0; o < vocab; o++) above += logits[o] > logits[v] || (logits[o] == logits[v] && o < v);
            if (!top_k || above < top_k) { keep |= 1u << (v - begin); mass += weights[v]; }
        }
        mass = warp_sum(mass);
        __syncwarp();
        ROLLED for (int v = begin; v < end; v++) if (!(keep >> (v - begin) & 1)) weights[v] = 0.f;
        __syncwarp();
        if (top_p < 1.f) {
            ROLLED for (int v = begin; v < end; v++) {
                float before = 0.f;
#pragma unroll 4
                for (int o = 0; o < vocab; o++)
                    if (logits[o] > logits[v] || (logits[o] == logits[v] && o < v)) before += weights[o];
                if (!(before < top_p * mass)) keep &= ~(1u << (v - begin));
            }
            __syncwarp();
            ROLLED for (int v = begin; v < end; v++) if (!(keep >> (v - begin) & 1)) weights[v] = 0.f;
            __syncwarp();
        }
        own = 0.f;
        ROLLED for (int v = begin; v < end; v++) own += weights[v];
    }
    float running = own;
    for (int step = 1; step < 32; step *= 2) {
        float other = lane_from(running, lane >= step ? lane - step : lane);
        if (lane >= step) running += other;
    }
    float threshold = r * lane_from(running, 31);
    running -= own;
    float found = 1e9f, last = 0.f;
#pragma unroll 4
    for (int v = begin; v < end; v++) {
        if (weights[v] > 0.f) {
            running += weights[v];
            last = v;
            if (running > threshold && found > 1e8f) found = v;
        }
    }
    found = -warp_max(-found);
    last = warp_max(last);
    return (int)(found < last ? found : last);
}
