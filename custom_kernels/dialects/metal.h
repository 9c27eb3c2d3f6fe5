// Names that bodies use beyond the common part of Metal and CUDA; cuda.h defines the same names.

#ifndef SHARED
#define SHARED threadgroup  // for arrays declared in a kernel; pointer parameters to them are `threadgroup`
#endif

inline uint4 load_once(const device uint4* from) {
  return *from;
}
inline uint2 load_once(const device uint2* from) {
  return *from;
}
inline uint load_once(const device uint* from) {
  return *from;
}
inline void wait_for_threadgroup() {
  threadgroup_barrier(mem_flags::mem_threadgroup);
}
inline float exponential(float x) {
  return metal::precise::exp(x);
}
inline float logarithm(float x) {
  return metal::precise::log(x);
}
inline float cosine(float x) {
  return metal::precise::cos(x);
}
inline float sine(float x) {
  return metal::precise::sin(x);
}
inline float reciprocal_root(float x) {
  return metal::precise::rsqrt(x);
}
inline float multiply_add(float a, float b, float c) {
  return metal::fma(a, b, c);
}
inline float nearest(float x) {
  return metal::rint(x);
}
