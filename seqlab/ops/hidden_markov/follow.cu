// hidden_markov: forward algorithm of several hidden Markov models, see __init__.py for the maths. A thread follows one row with
// one model; a block's threads are rows of the same model, so that they read its transitions, in shared memory, at the same address.
//
// What a step reads does not depend on the states, so it is on its way a step before.
//
// Set from outside: STATES, ROWS (threads of a block).

struct Params {
    const int* base;            // (b l)
    const int* context;         // (b l)
    const float* emissions;     // (m k s 4)
    const float* transitions;   // (m s s)
    const float* start;         // (b m s)
    float* log_p;               // (b l m 4)
    float* after;               // (b l m s)
    i64 batch, length, models, contexts;
};

KERNEL BOUNDS(ROWS, 1) follow(const Params p) {
    SHARED_FLOATS(A);
    const int m = blockIdx.x % (int)p.models;
    const i64 row = (i64)(blockIdx.x / (int)p.models) * ROWS + threadIdx.x;
    for (int i = threadIdx.x; i < STATES * STATES; i += ROWS) A[i] = p.transitions[(i64)m * STATES * STATES + i];
    __syncthreads();
    if (row >= p.batch) return;

    const int* base = p.base + row * p.length;
    const int* context = p.context + row * p.length;
    const float4* tables = (const float4*)p.emissions + (i64)m * p.contexts * STATES;
    float4* log_p = (float4*)p.log_p + row * p.length * p.models + m;
    float* after = p.after + (row * p.length * p.models + m) * STATES;

    float q[STATES];
    float4 E[STATES], next[STATES];
#pragma unroll
    for (int s = 0; s < STATES; s++) q[s] = p.start[(row * p.models + m) * STATES + s];
    const float4* from = tables + (i64)context[0] * STATES;
#pragma unroll
    for (int s = 0; s < STATES; s++) next[s] = from[s];
    int coming = base[0];
    int context_coming = p.length > 1 ? context[1] : 0;

    for (i64 t = 0; t < p.length; t++) {
        const int v = coming;
#pragma unroll
        for (int s = 0; s < STATES; s++) E[s] = next[s];
        if (t + 1 < p.length) {
            from = tables + (i64)context_coming * STATES;
#pragma unroll
            for (int s = 0; s < STATES; s++) next[s] = from[s];
            coming = base[t + 1];
            if (t + 2 < p.length) context_coming = context[t + 2];
        }
        float4 sum = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
        for (int s = 0; s < STATES; s++) {
            sum.x += q[s] * E[s].x;
            sum.y += q[s] * E[s].y;
            sum.z += q[s] * E[s].z;
            sum.w += q[s] * E[s].w;
        }
        float4 out = {logf(sum.x), logf(sum.y), logf(sum.z), logf(sum.w)};
        *log_p = out;
        log_p += p.models;
        if (v >= 0 && v < 4) {
            const float scale = 1.f / (v == 0 ? sum.x : v == 1 ? sum.y : v == 2 ? sum.z : sum.w);
#pragma unroll
            for (int s = 0; s < STATES; s++) q[s] *= (v == 0 ? E[s].x : v == 1 ? E[s].y : v == 2 ? E[s].z : E[s].w) * scale;
        }
        float a[STATES];
#pragma unroll
        for (int s = 0; s < STATES; s++) a[s] = 0.f;
#pragma unroll
        for (int r = 0; r < STATES; r++)
#pragma unroll
            for (int s = 0; s < STATES; s++) a[s] += q[r] * A[r * STATES + s];
#pragma unroll
        for (int s = 0; s < STATES; s++) after[s] = q[s] = a[s];
        after += p.models * STATES;
    }
}
