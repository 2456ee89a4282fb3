// scan_backward of scan.cu where scan_forward has kept the state at every tile and the output before the gate: nothing is computed
// twice, and a tile is all there is to know at a time.
//
// A state comes from memory into registers while the one before it is worked on, a tile's states having been brought into the L2 a tile
// ahead. What a warp needs once a tile is kept in shared memory; dy, z and the output come into room that sums over channels take later.
//
// A chunk is one segment here and a stage one tile. The loops over segments, stages and tiles are left as they are in scan.cu all the same: with
// a single one the compiler orders the loop over states otherwise, and the kernel takes 9.2 ms instead of 8.6 (docs/kernels.md).

#define ROOM (FOLD_FLOATS > 3 * TENSOR ? FOLD_FLOATS : 3 * TENSOR)
#define INPUTS (2 * TENSOR)
#define WARP_FLOATS (3 * PLANE / 2 + ROOM + INPUTS + SUMS)

// What a warp knows of its item and needs once a tile, out of the registers.
struct Held {
    const elem *u, *delta, *dy, *z, *ungated;  // row of the chunk's first step
    const elem *B, *C;                         // of the batch row's first
    i64 out, row;                              // the chunk's first step in du, in elements, and in dB and dC, in rows
    i64 padding;
};
DEVICE Line held_line(const Params& p, const elem* at, i64 stride_t, i64 c) {
    Line r;
    r.at = at + c;
    r.step = (int)(p.reverse ? -stride_t : stride_t);
    return r;
}
// What scan_backward reads of a tile: first what its steps are, then what the gradient before the gate is made of.
DEVICE void fetch_steps(pair* inU, pair* inD, const Params& p, const Held& held, int i, u32 live, bool whole, const Place& q) {
    bring(inU, held_line(p, held.u, p.u_t, q.cc), i, live, whole, q);
    bring(inD, held_line(p, held.delta, p.delta_t, q.cc), i, live, whole, q);
}
DEVICE void fetch_gate(pair* inG, pair* inZ, pair* inY, const Params& p, const Held& held, int i, u32 live, bool whole, const Place& q) {
    bring(inG, held_line(p, held.dy, p.dy_t, q.cc), i, live, whole, q);
#if GATED
    bring(inZ, held_line(p, held.z, p.z_t, q.cc), i, live, whole, q);
    bring(inY, held_line(p, held.ungated, p.channels, q.cc), i, live, whole, q);
#endif
}
// A tile's states into the L2: 32 floats of one state a lane.
DEVICE void fetch_ahead(const float* tile, const Params& p, const Place& q) {
    const int n = q.lane / 2;
    const i64 c = q.c - 2 * q.lane + q.lane % 2 * 32;
    if (n < STATES && c < p.channels) to_l2(tile + n * p.channels + c);
}

KERNEL BOUNDS(THREADS, BACKWARD_BLOCKS) scan_backward(const Params p) {
    SHARED_FLOATS(shared);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    float* own = shared + warp * WARP_FLOATS;
    float4* adj = (float4*)own + lane;              // (STATES, 32): adjoint coming from the right, sum for dA
    float2* rates = (float2*)(own + PLANE) + lane;  // (STATES, 32): log2(e) A
    float* fold = own + 3 * PLANE / 2;              // sums of a few states over channels; before and after the loop over states
    pair *inG = (pair*)fold, *inZ = inG + TILE * 32, *inY = inZ + TILE * 32;  // dy, z, the output before the gate; then results
    float* inputs = fold + ROOM;
    pair *inU = (pair*)inputs, *inD = inU + TILE * 32;
    float* mine = inputs + INPUTS;                  // (STATES, SUM_ROW)
    const float* channel_sums = shared + WARP_FLOATS - SUMS;
    float* tileB = shared + WARPS * WARP_FLOATS;    // (STATES, BROW); two of these, which take turns
    float* tileC = tileB + STATES * BROW;           // (STATES, BROW)
    Held* held = (Held*)(shared + WARPS * WARP_FLOATS + 4 * STATES * BROW) + warp;
    const int segment = (int)p.chunk;
    const i64 tile_floats = p.all_states * p.channels;
    const float2 none = make_float2(0.f, 0.f);
#if BF16
    float2 pick[4];
#pragma unroll
    for (int k = 0; k < 4; k++) pick[k] = make_float2(lane / 4 == 2 * k ? 1.f : 0.f, lane / 4 == 2 * k + 1 ? 1.f : 0.f);
#endif
    for (i64 item = blockIdx.x; item < p.items; item += gridDim.x) {
        const Place q = place(p, item, p.chunks);
        const i64 begin = q.k * p.chunk;
        const int size = (int)(begin + p.chunk < p.length ? p.chunk : p.length - begin);
        if (lane == 0) {
            held->u = line(p, p.u, p.u_b, p.u_t, q.b, 0, begin).at;
            held->delta = line(p, p.delta, p.delta_b, p.delta_t, q.b, 0, begin).at;
            held->dy = line(p, p.dy, p.dy_b, p.dy_t, q.b, 0, begin).at;
            held->z = line(p, p.z, p.z_b, p.z_t, q.b, 0, begin).at;
            held->ungated = line(p, p.ungated, p.length * p.channels, p.channels, q.b, 0, begin).at;
            held->out = line(p, p.du, p.length * p.channels, p.channels, q.b, 0, begin).at - p.du;
            held->B = p.B + q.b * p.B_b;
            held->C = p.C + q.b * p.C_b;
            held->row = (item % p.channel_blocks * p.batch + q.b) * p.length + (p.reverse ? p.length - 1 - begin : begin);
        }
        __syncwarp();
        const bool plain = warp_all(whole_warp(p, q) && p.mask == 0);
        const unsigned char* mask = p.mask == 0 ? p.mask : p.mask + q.b * p.length;
        const float2 bias = read_vector(p.bias, q), skip = read_vector(p.D, q);
        for (int n = 0; n < STATES; n++) {
            const float2 ag = adjoint_entering(p, q, n), a = coefficients(p, q, n);
            adj[n * 32] = make_float4(q.ok0 ? ag.x : 0.f, q.ok1 ? ag.y : 0.f, 0.f, 0.f);
            rates[n * 32] = a;
        }
        float2 dD = none, dbias = none;
#pragma unroll 1
        for (int left = (size - 1) / segment * segment; left >= 0; left -= segment) {
            const int right = left + segment < size ? left + segment : size;
            const int stages = (right - left + BSTAGE - 1) / BSTAGE, last = (right - left + TILE - 1) / TILE - 1;
            u32 live = live_at(p, q, begin, last * TILE, size, plain);
            // The states that enter the tile in turn, and the next of them.
            const float* states = p.segments + (q.b * p.all_segments + begin / TILE + last) * tile_floats;
            fetch_steps(inU, inD, p, *held, last * TILE, live, plain && live == ALL, q);
            copies_begun();
            fetch_gate(inG, inZ, inY, p, *held, last * TILE, live, plain && live == ALL, q);
            copies_begun();
            float2 entering = read2(states, q);
            piece next[EACH(BSTAGE)];
            fetch_rows<BSTAGE>(next, p, held->B, held->C, mask, begin + left + (stages - 1) * BSTAGE);
#pragma unroll 1
            for (int s = stages - 1; s >= 0; s--) {
                tileB = shared + WARPS * WARP_FLOATS + (s & 1) * 2 * STATES * BROW;  // the other half may still be read
                tileC = tileB + STATES * BROW;
                put_rows<BSTAGE, BROW>(tileB, tileC, next);
                __syncthreads();
                if (s > 0) fetch_rows<BSTAGE>(next, p, held->B, held->C, mask, begin + left + (s - 1) * BSTAGE);
#pragma unroll 1
                for (int w = BTILES - 1; w >= 0; w--) {
                    const int tile = s * BTILES + w, t0 = w * TILE, i = left + tile * TILE;
                    if (tile > last) {
                        for (int n = 0; n < STATES; n++)
                            if (lane < 2 * TILE) mine[n * SUM_ROW + (lane < TILE ? t0 + lane : BSTAGE + t0 + lane - TILE)] = 0.f;
                        continue;
                    }
                    const u32 now = live;
                    const bool whole = plain && now == ALL;
                    float2 dt[TILE], v[TILE], dout[TILE], sumB[TILE], sumA[TILE];
                    pair *nowU = inU, *nowD = inD;
                    copies_but_one();  // u and delta are there
                    __syncwarp();
                    {
                        pair raw[TILE];
#pragma unroll
                        for (int j = 0; j < TILE; j++) raw[j] = nowD[j * 32 + lane];
                        step_sizes(dt, raw, bias, p.softplus, now);
                    }
                    copies_done();
                    __syncwarp();
#pragma unroll
                    for (int j = 0; j < TILE; j++) dout[j] = unpack(inG[j * 32 + lane]);
#if GATED
                    {
                        float2 dz[TILE];
#pragma unroll
                        for (int j = 0; j < TILE; j++) {
                            const float2 g = unpack(inZ[j * 32 + lane]), o = unpack(inY[j * 32 + lane]);
                            const float s0 = sigmoid(g.x), s1 = sigmoid(g.y), g0 = g.x * s0, g1 = g.y * s1;
                            dz[j].x = o.x * (dout[j].x * (s0 + g0 * (1.f - s0)));
                            dz[j].y = o.y * (dout[j].y * (s1 + g1 * (1.f - s1)));
                            dout[j].x *= g0;
                            dout[j].y *= g1;
                        }
                        if (p.dz != 0) give_tile(p, p.dz, held_line(p, p.du + held->out, p.channels, q.c), i, dz, inZ, now, whole, q);
                    }
#endif
#pragma unroll
                    for (int j = 0; j < TILE; j++) {
                        const float2 x = unpack(nowU[j * 32 + lane]);
                        v[j] = make_float2(dt[j].x * x.x, dt[j].y * x.y);
                        sumB[j] = none;
                        sumA[j] = none;
                    }
                    settle(dt);
                    settle(v);
                    settle(dout);
                    __syncwarp();  // the room is free
                    const float* coming = states;
                    if (tile > 0) {
                        states -= tile_floats;
                        fetch_ahead(states, p, q);
                    }
#if BF16
                    float4* slot_of = adj;
                    const float2* rate_of = rates;
                    const float* row_of = tileB + t0;
                    float* sum_of = mine + lane / 8 * SUM_ROW + (lane % 8 >= 4 ? BSTAGE : 0) + t0 + lane % 4 * 2;
#pragma unroll 1
                    for (int first = 0; first < STATES; first += 4) {
                        float4* sums_of = (float4*)fold + lane;
#pragma unroll BACKWARD_UNROLL
                        for (int m = 0; m < (STATES % 4 == 0 || first + 4 <= STATES ? 4 : STATES % 4); m++) {
                            const float4 ad = *slot_of;
                            const float2 rate = *rate_of;
                            float2 h = entering;
                            coming += p.channels;
                            if (first + m + 1 < STATES) entering = read2(coming, q);
                            float2 ag = make_float2(ad.x, ad.y), da = make_float2(ad.z, ad.w);
                            float b[TILE], c[TILE], acc[4] = {0.f, 0.f, 0.f, 0.f}, part[4];
                            float2 e[TILE], kept[TILE];
                            read_row<BROW>(b, row_of, 0, 0);
                            read_row<BROW>(c, row_of + STATES * BROW, 0, 0);
#pragma unroll
                            for (int j = 0; j < TILE; j++) {
                                e[j].x = exp2_fast(rate.x * dt[j].x);
                                e[j].y = exp2_fast(rate.y * dt[j].y);
                                kept[j].x = e[j].x * h.x;
                                kept[j].y = e[j].y * h.y;
                                h.x = kept[j].x + v[j].x * b[j];
                                h.y = kept[j].y + v[j].y * b[j];
                                part[j % 4] = dout[j].x * h.x + dout[j].y * h.y;
                                if (j % 4 == 3) sum_four(acc, part, pick[j / 4]);
                            }
#pragma unroll
                            for (int j = TILE - 1; j >= 0; j--) {
                                const float2 d = make_float2(ag.x + c[j] * dout[j].x, ag.y + c[j] * dout[j].y);  // dL/dh_t
                                sumB[j].x += d.x * b[j];
                                sumB[j].y += d.y * b[j];
                                const float2 r = make_float2(d.x * kept[j].x, d.y * kept[j].y);
                                sumA[j].x += rate.x * r.x;
                                sumA[j].y += rate.y * r.y;
                                da.x += dt[j].x * r.x;
                                da.y += dt[j].y * r.y;
                                part[j % 4] = d.x * v[j].x + d.y * v[j].y;
                                if (j % 4 == 0) sum_four(acc, part, pick[2 + j / 4]);
                                ag.x = e[j].x * d.x;
                                ag.y = e[j].y * d.y;
                            }
                            *sums_of = make_float4(acc[0], acc[1], acc[2], acc[3]);
                            *slot_of = make_float4(ag.x, ag.y, da.x, da.y);
                            rate_of += 32;
                            slot_of += 32;
                            row_of += BROW;
                            sums_of += FOLD_ROW;
                        }
                        __syncwarp();
                        const float2 total = fold_states(fold, lane);
                        if (STATES % 4 == 0 || first + lane / 8 < STATES) *(float2*)sum_of = total;
                        sum_of += 4 * SUM_ROW;
                        __syncwarp();
                    }
#else
                    float* column = mine + (lane >= 16 ? BSTAGE : 0) + t0 + lane / 2 % TILE;
#pragma unroll 1
                    for (int n = 0; n < STATES; n++) {
                        const float4 ad = adj[n * 32];
                        const float2 rate = rates[n * 32];
                        float2 h = entering;
                        coming += p.channels;
                        if (n + 1 < STATES) entering = read2(coming, q);
                        float2 ag = make_float2(ad.x, ad.y), da = none;
                        float b[TILE], c[TILE], part[TILE];
                        float2 e[TILE], kept[TILE];
                        read_row<BROW>(b, tileB, n, t0);
                        read_row<BROW>(c, tileC, n, t0);
                        float* round = fold + n % 2 * FOLD;
                        __syncwarp();
                        // The sums of the state before: their exchanges hide behind this state's work.
                        if (n > 0) {
                            const float total = fold_read(fold + (n + 1) % 2 * FOLD, lane);
                            if (lane % 2 == 0) column[(n - 1) * SUM_ROW] = total;
                        }
#pragma unroll
                        for (int j = 0; j < TILE; j++) {
                            e[j].x = exp2_fast(rate.x * dt[j].x);
                            e[j].y = exp2_fast(rate.y * dt[j].y);
                            kept[j].x = e[j].x * h.x;
                            kept[j].y = e[j].y * h.y;
                            h.x = kept[j].x + v[j].x * b[j];
                            h.y = kept[j].y + v[j].y * b[j];
                            part[j] = dout[j].x * h.x + dout[j].y * h.y;
                        }
                        fold_write(round, 0, part, lane);
#pragma unroll
                        for (int j = TILE - 1; j >= 0; j--) {
                            const float2 d = make_float2(ag.x + c[j] * dout[j].x, ag.y + c[j] * dout[j].y);  // dL/dh_t
                            sumB[j].x += d.x * b[j];
                            sumB[j].y += d.y * b[j];
                            const float2 r = make_float2(d.x * kept[j].x, d.y * kept[j].y);
                            sumA[j].x += rate.x * r.x;
                            sumA[j].y += rate.y * r.y;
                            da.x += dt[j].x * r.x;
                            da.y += dt[j].y * r.y;
                            part[j] = d.x * v[j].x + d.y * v[j].y;
                            ag.x = e[j].x * d.x;
                            ag.y = e[j].y * d.y;
                        }
                        adj[n * 32] = make_float4(ag.x, ag.y, ad.z + da.x, ad.w + da.y);
                        fold_write(round, 2, part, lane);
                    }
                    __syncwarp();
                    const float total = fold_read(fold + (STATES - 1) % 2 * FOLD, lane);
                    if (lane % 2 == 0) column[(STATES - 1) * SUM_ROW] = total;
#endif
                    if (tile > 0) entering = read2(states, q);
                    float2 r[TILE];
#pragma unroll
                    for (int j = 0; j < TILE; j++) {
                        const float2 x = unpack(nowU[j * 32 + lane]);
                        r[j].x = skip.x * dout[j].x + dt[j].x * sumB[j].x;
                        r[j].y = skip.y * dout[j].y + dt[j].y * sumB[j].y;
                        dD.x += dout[j].x * x.x;
                        dD.y += dout[j].y * x.y;
                        sumA[j].x = LN2 * sumA[j].x + x.x * sumB[j].x;
                        sumA[j].y = LN2 * sumA[j].y + x.y * sumB[j].y;
                    }
                    if (p.softplus) {
#pragma unroll
                        for (int j = 0; j < TILE; j++) {
                            const float2 x = unpack(nowD[j * 32 + lane]);
                            sumA[j].x *= sigmoid(x.x + bias.x);
                            sumA[j].y *= sigmoid(x.y + bias.y);
                        }
                    }
                    if (!whole) {
#pragma unroll
                        for (int j = 0; j < TILE; j++)
                            if (!((now >> j) & 1u)) sumA[j] = none;
                    }
#pragma unroll
                    for (int j = 0; j < TILE; j++) {
                        dbias.x += sumA[j].x;
                        dbias.y += sumA[j].y;
                    }
                    __syncwarp();
                    if (tile > 0) {
                        live = live_at(p, q, begin, i - TILE, size, plain);
                        fetch_steps(inU, inD, p, *held, i - TILE, live, plain && live == ALL, q);
                    }
                    copies_begun();
                    const Line out = held_line(p, p.du + held->out, p.channels, q.c);
                    give(p, p.du, out, i, r, inG, now, whole, q);
                    give(p, p.ddelta, out, i, sumA, inZ, now, whole, q);
                    __syncwarp();
                    if (tile > 0) fetch_gate(inG, inZ, inY, p, *held, i - TILE, live, plain && live == ALL, q);
                    copies_begun();
                }
                __syncthreads();
                for (int e = threadIdx.x; e < BSTAGE * STATES; e += THREADS) {
                    const int n = e % STATES, t = e / STATES, i = left + s * BSTAGE + t;
                    float sumC = 0.f, sumB = 0.f;
                    const float* from = channel_sums + n * SUM_ROW + t;
#pragma unroll
                    for (int w = 0; w < WARPS; w++) sumC += from[w * WARP_FLOATS], sumB += from[w * WARP_FLOATS + BSTAGE];
                    sumC *= TRUNCATED;
                    sumB *= TRUNCATED;
                    if (i < right) {
                        const i64 at = held->row + (p.reverse ? -i : i);
                        if (p.channel_blocks == 1) {
                            ((elem*)p.dC)[at * p.all_states + n] = from_float(sumC);
                            ((elem*)p.dB)[at * p.all_states + n] = from_float(sumB);
                        } else {
                            ((float*)p.dC)[at * STATES + n] = sumC;
                            ((float*)p.dB)[at * STATES + n] = sumB;
                        }
                    }
                }
            }
            copies_done();  // what was fetched for a tile that does not exist must not arrive in the next segment
        }
        float* rows = p.partial + (q.b * p.chunks + q.k) * (STATES + 2) * p.channels;
        for (int n = 0; n < STATES; n++) write2(rows + n * p.channels, q, make_float2(adj[n * 32].z, adj[n * 32].w));
        write2(rows + STATES * p.channels, q, dD);
        write2(rows + (STATES + 1) * p.channels, q, dbias);
        if (p.dinitial != 0 && q.k == 0)
            for (int n = 0; n < STATES; n++) write_state(p, q, p.dinitial, q.b, n, make_float2(adj[n * 32].x, adj[n * 32].y));
        __syncthreads();
    }
}
