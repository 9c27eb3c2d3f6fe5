// PTX operations of kernels whose weights the copy engine transfers: barriers in shared memory, copies that signal
// these barriers, and words that threadgroups pass to each other.

#define DYNAMIC_SHARED(name) extern __shared__ __align__(128) uint4 name[]

inline void barrier_init(unsigned long long* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
// Make initialized barriers visible to the copy engine.
inline void barriers_are_ready() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
inline void barrier_arrive(unsigned long long* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
// Arrive at the barrier, and let it also wait for `bytes` from copies.
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
// The data is read once, so it should leave the L2 cache first.
inline void bring(void* to, const void* from, uint bytes, unsigned long long* barrier) {
  unsigned long long policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(
          shared_address(to)),
      "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(shared_address(barrier)), "l"(policy)
      : "memory");
}
// Words that one threadgroup passes to others. A word and its tag are written as one value of 8 bytes, so a reader that
// sees the tag has the word, without a fence.
inline void publish(uint2* place, uint word, uint tag) {
  asm volatile("st.relaxed.gpu.global.b64 [%0], %1;" ::"l"(__cvta_generic_to_global(place)),
               "l"((unsigned long long)(tag) << 32 | word)
               : "memory");
}
// Return four words, once all carry the tag.
inline uint4 wait_for_words(const uint4* from, uint tag) {
  unsigned long long found[4];
  bool there;
  do {
    there = true;
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
      asm volatile("ld.relaxed.gpu.global.v2.b64 {%0, %1}, [%2];"
                   : "=l"(found[i]), "=l"(found[i + 1])
                   : "l"(__cvta_generic_to_global(from + i / 2))
                   : "memory");
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
      there = there && uint(found[i] >> 32) == tag;
    }
  } while (!there);
  return make_uint4(uint(found[0]), uint(found[1]), uint(found[2]), uint(found[3]));
}
