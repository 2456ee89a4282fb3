// What blocks of a cluster (CLUSTER of them; 1: there are no clusters) send to each other.

#ifndef SEQLAB_EMULATED
#if CLUSTER > 1
#define CLUSTERED __cluster_dims__(CLUSTER, 1, 1)
// Orders everything, global memory too, among all threads of the cluster: a microsecond, and the first-level cache is lost.
DEVICE void cluster_barrier() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// What exchanges use instead: data that count themselves in at a barrier of the block that they go to.
DEVICE void arrivals_begin(u64* barriers, int count) {
    for (int i = 0; i < count; i++)
        asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"((u32)__cvta_generic_to_shared(barriers + i)) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
DEVICE void arrivals_expect(u64* barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"((u32)__cvta_generic_to_shared(barrier)), "r"(bytes) : "memory");
}
DEVICE void arrivals_wait(u64* barrier, u32 parity) {
    asm volatile(
        "{\n.reg .pred done;\nAGAIN:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@done bra READY;\nbra AGAIN;\nREADY:\n}" ::"r"(
            (u32)__cvta_generic_to_shared(barrier)),
        "r"(parity)
        : "memory");
}
// Four floats to the same place of a block of the cluster, counted at its barrier.
DEVICE void remote_store(float* at, int rank, float4 v, u64* barrier) {
    asm volatile(
        "{\n.reg .u32 a, b;\nmapa.shared::cluster.u32 a, %0, %2;\nmapa.shared::cluster.u32 b, %1, %2;\n"
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [a], {%3, %4, %5, %6}, [b];\n}" ::"r"(
            (u32)__cvta_generic_to_shared(at)),
        "r"((u32)__cvta_generic_to_shared(barrier)), "r"(rank), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w)
        : "memory");
}
// remote_store of some lanes, without a branch: what follows can then begin before.
DEVICE void remote_store_if(bool sends, float* at, int rank, float4 v, u64* barrier) {
    asm volatile(
        "{\n.reg .u32 a, b;\n.reg .pred sends;\nsetp.ne.u32 sends, %7, 0;\nmapa.shared::cluster.u32 a, %0, %2;\nmapa.shared::cluster.u32 b, %1, %2;\n"
        "@sends st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [a], {%3, %4, %5, %6}, [b];\n}" ::"r"(
            (u32)__cvta_generic_to_shared(at)),
        "r"((u32)__cvta_generic_to_shared(barrier)), "r"(rank), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w), "r"((u32)sends)
        : "memory");
}
// cluster_barrier in two parts, which orders nothing but barriers that arrivals_begin has made.
DEVICE void cluster_arrive() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }
DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
#else
#define CLUSTERED
DEVICE void cluster_barrier() {}
DEVICE void cluster_arrive() {}
DEVICE void cluster_wait() {}
#endif
#endif
