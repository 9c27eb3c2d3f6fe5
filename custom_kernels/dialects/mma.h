// Products of tiles on NVIDIA's tensor cores, and pairs of bf16 numbers in a word.

inline uint shared_address(const void* of) {
  return uint(__cvta_generic_to_shared(of));
}

inline float low_half(uint pair) {
  return __uint_as_float(pair << 16);
}
inline float high_half(uint pair) {
  return __uint_as_float(pair & 0xffff0000u);
}
inline float2 halves_of(uint pair) {
  return make_float2(low_half(pair), high_half(pair));
}
// Return two values as bf16 in a word, the first in the lower half.
inline uint pair_of(float low, float high) {
  uint pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// Compute sums [16, 8] += a b, for bf16 numbers a [16, 16] and b [16, 8], or unsigned 8-bit integers a [16, 32] and
// signed b [32, 8]. The assembly is volatile: otherwise the compiler moves it into a branch that only some lanes take,
// and these wait for the other lanes forever.
inline void multiply(float* sums, uint a0, uint a1, uint a2, uint a3, uint b0, uint b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
               : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
inline void multiply(float* sums, const uint* a, const uint* b) {
  multiply(sums, a[0], a[1], a[2], a[3], b[0], b[1]);
}
inline void multiply(int* sums, uint a0, uint a1, uint a2, uint a3, uint b0, uint b1) {
  asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3])
               : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
