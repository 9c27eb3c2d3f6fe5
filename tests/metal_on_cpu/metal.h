// The part of Metal's library that the kernels use, for clang on a CPU.
//
// With STRICT defined, address spaces are distinct, and mixing them is a compile error; this build never runs. Without
// STRICT they are erased, because clang does not instrument accesses to other address spaces.

#ifdef STRICT
#define device __attribute__((address_space(1)))
#define constant __attribute__((address_space(2)))
#define threadgroup __attribute__((address_space(3)))
#else
#define device
#define constant
#define threadgroup
#endif
#define thread
#define kernel
// C++ has no local variables in an address space. One threadgroup runs at a time, so static variables are equivalent.
#define SHARED static threadgroup __attribute__((section("metal_threadgroup")))

typedef unsigned int uint;
typedef unsigned short ushort;
typedef unsigned char uchar;
typedef unsigned char uint8_t;
typedef unsigned int uint32_t;
typedef int int32_t;
typedef __bf16 bfloat16_t;
#define VECTORS(T)                                   \
  typedef T T##2 __attribute__((ext_vector_type(2))); \
  typedef T T##3 __attribute__((ext_vector_type(3))); \
  typedef T T##4 __attribute__((ext_vector_type(4)));
VECTORS(float)
VECTORS(int)
VECTORS(uint)
#undef VECTORS

enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2, mem_device_and_threadgroup = 3 };

// Implemented in machine.cpp. Each function waits until all threads that it concerns are at the same `site`.
void metal_barrier(int flags, bool whole_threadgroup, int site);
const uint* metal_exchange(uint value, int site);
uint metal_lane();

inline void threadgroup_barrier(mem_flags flags, int site = __builtin_LINE()) {
  metal_barrier(int(flags), true, site);
}
inline void simdgroup_barrier(mem_flags flags, int site = __builtin_LINE()) {
  metal_barrier(int(flags), false, site);
}

template <typename To, typename From>
inline To as_type(From value) {
  static_assert(sizeof(To) == sizeof(From), "as_type keeps the size");
  return __builtin_bit_cast(To, value);
}

template <typename T>
inline T simd_shuffle_xor(T value, ushort mask, int site = __builtin_LINE()) {
  return as_type<T>(metal_exchange(as_type<uint>(value), site)[metal_lane() ^ mask]);
}
template <typename T>
inline T simd_broadcast(T value, ushort lane, int site = __builtin_LINE()) {
  return as_type<T>(metal_exchange(as_type<uint>(value), site)[lane]);
}
// Pairwise over the bits of the lane; Metal does not define the order.
inline float simd_sum(float value, int site = __builtin_LINE()) {
  const uint* all = metal_exchange(as_type<uint>(value), site);
  float sums[32];
  for (int i = 0; i < 32; i++) sums[i] = as_type<float>(all[i]);
  for (int half_of = 16; half_of; half_of /= 2)
    for (int i = 0; i < half_of; i++) sums[i] += sums[i + half_of];
  return sums[0];
}
inline float simd_max(float value, int site = __builtin_LINE()) {
  const uint* all = metal_exchange(as_type<uint>(value), site);
  float highest = as_type<float>(all[0]);
  for (int i = 1; i < 32; i++) highest = as_type<float>(all[i]) > highest ? as_type<float>(all[i]) : highest;
  return highest;
}

namespace metal {
inline float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline float rint(float x) { return __builtin_rintf(x); }
namespace precise {
inline float exp(float x) { return __builtin_expf(x); }
inline float log(float x) { return __builtin_logf(x); }
inline float sin(float x) { return __builtin_sinf(x); }
inline float cos(float x) { return __builtin_cosf(x); }
inline float rsqrt(float x) { return 1.0f / __builtin_sqrtf(x); }
}  // namespace precise
}  // namespace metal

// The position of a thread.
struct Position {
  uint3 thread_position_in_grid, thread_position_in_threadgroup, threadgroup_position_in_grid;
  uint3 threads_per_threadgroup, threadgroups_per_grid, threads_per_grid;
  uint thread_index_in_threadgroup, thread_index_in_simdgroup, simdgroup_index_in_threadgroup;
  uint simdgroups_per_threadgroup, threads_per_simdgroup;
};
