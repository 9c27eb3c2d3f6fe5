// Rows of a KV cache: the layout of kv_rows.py. BITS is 0 for rows in the type of activations.

// Load N values of a row, beginning at value `at`.
template <int DIM, int GROUP, int BITS, int N, typename T>
inline void load_row(const device T* row, int at, thread float* x) {
  load_some<N>(row + at, x);
}
template <int DIM, int GROUP, int BITS, int N>
inline void load_row(const device uint* row, int at, thread float* x) {
  const uint ends = row[DIM * BITS / 32 + at / GROUP];
  const float scale = as_type<float>(ends << 16), bias = as_type<float>(ends & 0xffff0000u);
#pragma unroll
  for (int c = 0; c < N; c++) {
    const int bit = (at + c) * BITS;
    x[c] = float(row[bit / 32] >> uint(bit % 32) & ((1u << BITS) - 1u)) * scale + bias;
  }
}

// Round to bf16, half to even, and return the bits.
inline uint to_brain(float value) {
  const uint bits = as_type<uint>(value);
  return (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
}

// Store a row, which a simdgroup holds in threadgroup memory.
template <int DIM, int GROUP, int BITS, typename T>
inline void store_row(const threadgroup float* row, int lane, device T* to) {
  for (int c = lane; c < DIM; c += 32) {
    to[c] = T(row[c]);
  }
}
template <int DIM, int GROUP, int BITS>
inline void store_row(const threadgroup float* row, int lane, device uint* to) {
  const float most = float((1 << BITS) - 1);
  for (int group = 0; group < DIM / GROUP; group++) {
    const threadgroup float* own = row + group * GROUP;
    float low = own[lane], high = own[lane];
    for (int c = lane + 32; c < GROUP; c += 32) {
      low = own[c] < low ? own[c] : low;
      high = own[c] > high ? own[c] : high;
    }
    const uint bias = to_brain(-simd_max(-low));
    const float least = as_type<float>(bias << 16);
    const uint scale = to_brain((simd_max(high) - least) / most);
    const float rounded = as_type<float>(scale << 16), step = rounded > 1e-30f ? rounded : 1e-30f;
    for (int word = lane; word < GROUP * BITS / 32; word += 32) {
      uint codes = 0;
      for (int c = 0; c < 32 / BITS; c++) {
        const float code = nearest((own[word * (32 / BITS) + c] - least) / step);
        codes |= uint(code > 0.0f ? (code < most ? code : most) : 0.0f) << uint(c * BITS);
      }
      to[group * (GROUP * BITS / 32) + word] = codes;
    }
    if (lane == 0) {
      to[DIM * BITS / 32 + group] = bias << 16 | scale;
    }
  }
}
