// Products with weights in MLX's affine format: weight = scale * code + bias, codes packed least significant bit first.
//
// A thread processes CHUNK consecutive codes of a row at a time. Groups are multiples of CHUNK, so a chunk belongs to
// one group and contributes scale * sum(code * x) + bias * sum(x); sum(x) is computed once for all rows.
//
// A code becomes a float without a conversion instruction: at the top of the mantissa of 2^BITS it reads as
// 2^BITS + code. The bias term subtracts 2^BITS * sum(x).

constant constexpr int CHUNK = 32;

template <int BITS>
struct Codes {
  uint words[BITS];  // CHUNK codes of BITS bits
};

template <int BITS>
inline Codes<BITS> load_codes(const device uint* row, int chunk) {
  Codes<BITS> codes;
  const device uint* from = row + chunk * BITS;
  if (BITS % 4 == 0) {
#pragma unroll
    for (int i = 0; i < BITS / 4; i++) {
      uint4 four = load_once((const device uint4*)from + i);
      codes.words[4 * i + 0] = four.x;
      codes.words[4 * i + 1] = four.y;
      codes.words[4 * i + 2] = four.z;
      codes.words[4 * i + 3] = four.w;
    }
  } else if (BITS == 2) {
    uint2 two = load_once((const device uint2*)from);
    codes.words[0] = two.x;
    codes.words[BITS - 1] = two.y;
  } else {
#pragma unroll
    for (int i = 0; i < BITS; i++) {
      codes.words[i] = load_once(from + i);
    }
  }
  return codes;
}

// Return 2^BITS + code `index`.
template <int BITS>
inline float raised_code(thread const Codes<BITS>& codes, int index) {
  const int bit = index * BITS, word = bit / 32, first = bit % 32, place = 23 - BITS;
  uint found;
  if (first + BITS > 32) {
    found = ((codes.words[word] >> first) | (codes.words[word + 1 < BITS ? word + 1 : word] << (32 - first))) << place;
  } else if (first > place) {
    found = codes.words[word] >> (first - place);
  } else {
    found = codes.words[word] << (place - first);
  }
  return as_type<float>((found & (((1u << BITS) - 1u) << place)) | (uint(127 + BITS) << 23));
}

// Return sum((2^BITS + code) * x) over a chunk.
template <int BITS>
inline float raised_dot(thread const Codes<BITS>& codes, thread const float* x) {
  float even = 0.0f, odd = 0.0f;
#pragma unroll
  for (int i = 0; i < CHUNK; i += 2) {
    even += raised_code<BITS>(codes, i) * x[i];
    odd += raised_code<BITS>(codes, i + 1) * x[i + 1];
  }
  return even + odd;
}

// CHUNK values as floats and their sum.
template <typename T>
inline float load_chunk(const device T* from, thread float* x) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < CHUNK; i += 4) {
    load_four(from + i, x + i);
    sum += (x[i] + x[i + 1]) + (x[i + 2] + x[i + 3]);
  }
  return sum;
}

// Add the products of ROWS rows with one chunk of x, beginning at row `first` of a matrix with `columns` columns.
template <int BITS, int GROUP, int ROWS, typename S>
inline void add_products(
    const device uint* weight, const device S* scales, const device S* biases, long first, int columns, int chunk,
    thread const float* x, float sum, thread float* products) {
  Codes<BITS> codes[ROWS];
  float scale[ROWS], bias[ROWS];
#pragma unroll
  for (int i = 0; i < ROWS; i++) {
    codes[i] = load_codes<BITS>(weight + (first + i) * (columns / 32 * BITS), chunk);
  }
#pragma unroll
  for (int i = 0; i < ROWS; i++) {
    const long group = (first + i) * (columns / GROUP) + chunk / (GROUP / CHUNK);
    scale[i] = float(scales[group]);
    bias[i] = float(biases[group]) - float(1 << BITS) * scale[i];
  }
#pragma unroll
  for (int i = 0; i < ROWS; i++) {
    products[i] += scale[i] * raised_dot<BITS>(codes[i], x) + bias[i] * sum;
  }
}

// Sum N values (a power of two) over teams of TEAM >= N adjacent lanes, with fewer shuffles than N separate sums. Lane
// l of a team returns the sum of value `sum_index<N>(l)`; lanes N and above repeat the results of the first N lanes.
template <int N, int TEAM>
inline float team_sums(thread float* values, uint lane) {
  uint mask = 1;
#pragma unroll
  for (int half_of = N / 2; half_of > 0; half_of /= 2) {
    const bool upper = (lane & mask) != 0;
#pragma unroll
    for (int i = 0; i < half_of; i++) {
      const float kept = upper ? values[i + half_of] : values[i];
      const float sent = upper ? values[i] : values[i + half_of];
      values[i] = kept + simd_shuffle_xor(sent, mask);
    }
    mask *= 2;
  }
  float sum = values[0];
#pragma unroll
  for (uint other = N; other < uint(TEAM); other *= 2) {
    sum += simd_shuffle_xor(sum, other);
  }
  return sum;
}

// Return the lowest bits of a lane's number, below N, in reverse order.
template <int N>
inline int sum_index(uint lane) {
  int index = 0;
#pragma unroll
  for (int half_of = N / 2; half_of > 0; half_of /= 2) {
    index += (lane & 1u) ? half_of : 0;
    lane >>= 1;
  }
  return index;
}
