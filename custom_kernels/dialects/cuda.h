// Metal's names in CUDA, as far as the bodies use them. Threadgroups are one-dimensional.

typedef unsigned int uint;
typedef unsigned short ushort;
typedef unsigned char uchar;
typedef __nv_bfloat16 bfloat16_t;
typedef __half half;

#define device
#define constant
#define thread
#define threadgroup
#define SHARED __shared__

#define threadgroup_position_in_grid blockIdx
#define threadgroups_per_grid gridDim
#define thread_index_in_threadgroup threadIdx.x
#define thread_index_in_simdgroup (threadIdx.x & 31u)
#define simdgroup_index_in_threadgroup (threadIdx.x >> 5)

template <typename To, typename From>
__device__ inline To as_type(From value) {
  static_assert(sizeof(To) == sizeof(From), "as_type keeps the size");
  To result;
  memcpy(&result, &value, sizeof(To));
  return result;
}
__device__ inline float simd_shuffle_xor(float value, uint mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}
__device__ inline float simd_sum(float value) {
  for (uint mask = 16; mask; mask >>= 1) {
    value += simd_shuffle_xor(value, mask);
  }
  return value;
}
__device__ inline float simd_max(float value) {
  for (uint mask = 16; mask; mask >>= 1) {
    value = fmaxf(value, simd_shuffle_xor(value, mask));
  }
  return value;
}

// Load data that is read once, such as weights, so that the caches do not keep it.
__device__ inline uint4 load_once(const uint4* from) {
  return __ldcs(from);
}
__device__ inline uint2 load_once(const uint2* from) {
  return __ldcs(from);
}
__device__ inline uint load_once(const uint* from) {
  return __ldcs(from);
}
__device__ inline void wait_for_threadgroup() {
  __syncthreads();
}
__device__ inline float exponential(float x) {
  return expf(x);
}
__device__ inline float logarithm(float x) {
  return logf(x);
}
__device__ inline float cosine(float x) {
  return cosf(x);
}
__device__ inline float sine(float x) {
  return sinf(x);
}
__device__ inline float reciprocal_root(float x) {
  return 1.0f / sqrtf(x);
}
__device__ inline float multiply_add(float a, float b, float c) {
  return fmaf(a, b, c);
}
__device__ inline float nearest(float x) {
  return rintf(x);
}
