// What kernels with weights brought by the copy engine use of NVIDIA's machine beyond CUDA's words: barriers in shared
// memory, copies that report to them, products of integers on tensor cores.

#define DYNAMIC_SHARED(name) extern __shared__ __align__(128) uint4 name[]

inline uint shared_address(const void* pointer) {
  return uint(__cvta_generic_to_shared(pointer));
}
inline void barrier_init(unsigned long long* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
// What was initialised is visible to the copy engine.
inline void barriers_are_ready() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
inline void barrier_arrive(unsigned long long* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
// Arrive, and have the barrier wait for `bytes` that copies bring.
inline void barrier_expect(unsigned long long* barrier, uint bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}
inline void barrier_wait(unsigned long long* barrier, int phase) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra.uni through;\n"
      "bra.uni again;\n"
      "through:\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(phase)
      : "memory");
}
inline void bring(void* to, const void* from, uint bytes, unsigned long long* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
          shared_address(to)),
      "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
}

// Wait until a counter that other threadgroups raise has reached `value`; what they wrote before is visible then.
inline void wait_for_counter(const uint* counter, uint value) {
  uint found;
  do {
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(found) : "l"(counter) : "memory");
  } while (found != value);
}

// Volatile, or the compiler moves it to where its result is used, which is not all lanes; those then wait for ever.
inline void multiply(int* sums, uint a0, uint a1, uint a2, uint a3, uint b0, uint b1) {
  asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
