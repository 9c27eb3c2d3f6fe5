// Loads of adjacent values as floats, as wide as the type allows.

inline void load_four(const device float* from, thread float* x) {
  float4 four = *(const device float4*)from;
  x[0] = four.x;
  x[1] = four.y;
  x[2] = four.z;
  x[3] = four.w;
}
inline void load_four(const device bfloat16_t* from, thread float* x) {
  uint2 two = *(const device uint2*)from;
  x[0] = as_type<float>(two.x << 16);
  x[1] = as_type<float>(two.x & 0xffff0000u);
  x[2] = as_type<float>(two.y << 16);
  x[3] = as_type<float>(two.y & 0xffff0000u);
}

// Load N values; if N is a multiple of four, four at a time from an address aligned to four values.
template <int N, typename T>
inline void load_some(const device T* from, thread float* x) {
  if (N % 4 == 0) {
#pragma unroll
    for (int i = 0; i < N / 4; i++) {
      load_four(from + 4 * i, x + 4 * i);
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; i++) {
      x[i] = float(from[i]);
    }
  }
}
