// Stores of adjacent values, as wide as the type allows, to an address aligned to their total size.

inline void store_eight(device float* to, thread const float* x) {
#pragma unroll
  for (int i = 0; i < 2; i++) {
    float4 four;
    four.x = x[4 * i];
    four.y = x[4 * i + 1];
    four.z = x[4 * i + 2];
    four.w = x[4 * i + 3];
    *((device float4*)to + i) = four;
  }
}
inline uint two_bfloats(float low, float high) {
  return uint(as_type<ushort>(bfloat16_t(low))) | (uint(as_type<ushort>(bfloat16_t(high))) << 16);
}
inline void store_eight(device bfloat16_t* to, thread const float* x) {
  uint4 four;
  four.x = two_bfloats(x[0], x[1]);
  four.y = two_bfloats(x[2], x[3]);
  four.z = two_bfloats(x[4], x[5]);
  four.w = two_bfloats(x[6], x[7]);
  *(device uint4*)to = four;
}
