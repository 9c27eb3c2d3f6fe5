// Products of one vector with weights in MLX's affine format on NVIDIA's tensor cores, for bf16 activations and codes
// of 2, 4 or 8 bits. The copy engine of Hopper and later GPUs transfers the weights into shared memory.
//
// Copies of whole rows are requested long before their use and signal a barrier in shared memory, without registers. So
// enough copies are in flight to keep memory busy.
//
// The tensor cores multiply integers: codes by a vector in fixed point, with 15 bits and a power of two for each group.
// A step is at most 1/8192 of the largest value, much finer than the rounding of bf16 inputs. A value is 256 * high +
// low, stored as two planes of signed bytes. Codes in the upper halves of bytes stay there and count 16 times as much,
// so four codes need only a mask. Conversion to bf16 would take several times the instructions, more than a Hopper GPU
// can execute while memory delivers a code.
//
// A simdgroup processes CHUNK consecutive codes of 16 rows at a time. mma.m16n8k32 multiplies 16 rows by 8 columns, and
// a vector would need only one. Here the columns separate planes and groups: lane 4 g + c processes quarter c of the
// chunk in its two rows, and column n holds plane n / 4 of quarter n % 4, and zeros elsewhere. So sums of several
// groups accumulate in parallel, and all lanes apply scales at once. Only lanes with c = g % 4 hold nonzero values of a
// column, those of one quarter, and keep them for all rows. Lanes visit the pieces of their quarters in different
// orders, and a gap may separate two blocks of rows, so that fewer lanes read the same bank of shared memory.

constexpr int CHUNK = 512;          // codes of a row
constexpr int QUARTER = CHUNK / 4;  // codes of a row for one lane

// The bytes of a staged vector in shared memory: two planes, then for each group the value of 1 in the lower plane, and
// the group's sum. The planes are in the order in which masks extract codes, 4 at a time: from one word (2 bits) or two
// words (4 bits), first the lower halves of bytes, then the upper halves.
inline constexpr int staged_bytes(int width, int group) {
  return 2 * width + width / group * 8;
}

inline void eight_floats(uint4 eight, float* values) {
  values[0] = low_half(eight.x), values[1] = high_half(eight.x);
  values[2] = low_half(eight.y), values[3] = high_half(eight.y);
  values[4] = low_half(eight.z), values[5] = high_half(eight.z);
  values[6] = low_half(eight.w), values[7] = high_half(eight.w);
}

// Stage values 8 i to 8 i + 7 of a vector of `width`, by whole simdgroups with consecutive `i`.
template <int BITS, int GROUP>
inline void stage(const float* values, int i, int width, uchar* vector) {
  uint most = 0;  // magnitudes of floats are in the order of their bits
#pragma unroll
  for (int j = 0; j < 8; j++) {
    most = max(most, __float_as_uint(values[j]) & 0x7fffffffu);
  }
  float sum = ((values[0] + values[1]) + (values[2] + values[3])) + ((values[4] + values[5]) + (values[6] + values[7]));
#pragma unroll
  for (int mask = 1; mask < GROUP / 8; mask *= 2) {
    most = max(most, __shfl_xor_sync(0xffffffffu, most, mask));
    sum += __shfl_xor_sync(0xffffffffu, sum, mask);
  }
  // The exponent bits of the largest magnitude in a float, clamped so that the derived exponents are valid.
  const uint exponent = max(most >> 23, 16u);
  if (i % (GROUP / 8) == 0) {
    ((float2*)(vector + 2 * width))[i / (GROUP / 8)] = make_float2(__uint_as_float((exponent - 13) << 23), sum);
  }
  const float steps = __uint_as_float((267 - exponent) << 23);
  uint fixed[8], raised[8];
#pragma unroll
  for (int j = 0; j < 8; j++) {
    fixed[j] = __float_as_uint(fmaf(values[j], steps, 12582912.0f));  // 1.5 * 2^23: low bits are the integer
    raised[j] = fixed[j] + 128;
  }
#pragma unroll
  for (int plane = 0; plane < 2; plane++) {
    const uint* from = plane ? fixed : raised;
    const uint pick = plane ? 0x0040 : 0x0051;  // the lowest byte of two words, or the second lowest
    uchar* to = vector + plane * width + 8 * i;
    if (BITS == 2) {
      // A word of 16 codes spans two blocks of eight values.
      unsigned short* halves = (unsigned short*)(to - i % 2 * 8) + i % 2;
#pragma unroll
      for (int j = 0; j < 4; j++) {
        halves[2 * j] = (unsigned short)__byte_perm(from[j], from[j + 4], pick);
      }
    } else {
      constexpr int apart = BITS == 8 ? 1 : 2, second = BITS == 8 ? 4 : 1;
      uint words[2];
#pragma unroll
      for (int j = 0; j < 2; j++) {
        const uint* first = from + j * second;
        words[j] = __byte_perm(__byte_perm(first[0], first[apart], pick),
                               __byte_perm(first[2 * apart], first[3 * apart], pick), 0x5410);
      }
      if (BITS == 8) {
        *(uint2*)to = make_uint2(words[0], words[1]);
      } else {
        uint* pairs = (uint*)(to - i % 2 * 4);  // for two words of codes, their lower halves, then their upper halves
        pairs[0] = words[0], pairs[2] = words[1];
      }
    }
  }
}

template <int BITS, int GROUP>
inline void stage(uint4 eight, int i, int width, uchar* vector) {
  float values[8];
  eight_floats(eight, values);
  stage<BITS, GROUP>(values, i, width, vector);
}

template <int BITS, int GROUP>
struct Stream {
  static constexpr int CODES = CHUNK * BITS / 8, SCALES = CHUNK / GROUP * 2;  // bytes per chunk of a row
  static constexpr int STEPS = QUARTER * BITS / 8 / 16;  // of 16 bytes of codes
  static constexpr int GROUPS = QUARTER / GROUP;         // in a quarter
  static constexpr int LOADS = 8 / STEPS;                // of 16 bytes of a plane, in a step
  static constexpr float UNIT = BITS == 8 ? 1.0f : 1.0f / 16.0f;  // weight of the sums of products

  int g, c, order;
  int codes_at, codes_on, scales_at, scales_on;  // offsets of the lane's first row, and distances to its second
  bool feeds;
  uint4 x[8];                  // a plane of a quarter; zero in lanes without nonzero columns
  float steps[GROUPS][2];      // for the groups of two columns, the value of 1 in the plane
  float sums[GROUPS][2];       // sums of these groups, where the columns hold the upper plane

  inline void begin(int lane) {
    g = lane / 4, c = lane % 4;
    feeds = c == g % 4;
    order = BITS == 8 ? c : BITS == 4 ? c / 2 : 0;
#pragma unroll
    for (int i = 0; i < 8; i++) {
      x[i] = make_uint4(0, 0, 0, 0);
    }
  }

  // Load chunk `chunk` of a staged vector of `width`.
  inline void take(const uchar* vector, int width, int chunk) {
    if (feeds) {
      const uint4* own = (const uint4*)(vector + g / 4 * width + (chunk * 4 + c) * QUARTER);
#pragma unroll
      for (int turn = 0; turn < STEPS; turn++) {
#pragma unroll
        for (int i = 0; i < LOADS; i++) {
          x[turn * LOADS + i] = own[(turn ^ order) * LOADS + i];
        }
      }
    }
    const float2* groups = (const float2*)(vector + 2 * width) + (chunk * 4 + c % 2 * 2) * GROUPS;
#pragma unroll
    for (int i = 0; i < 2 * GROUPS; i++) {
      const float2 step_and_sum = groups[i];
      steps[i % GROUPS][i / GROUPS] = step_and_sum.x * (c < 2 ? 256.0f * UNIT : UNIT);
      sums[i % GROUPS][i / GROUPS] = c < 2 ? step_and_sum.y : 0.0f;
    }
  }

  // Return four codes from the lower or upper halves of the bytes of `word`; upper codes stay there, 16 times as large.
  inline uint some_codes(uint word, bool upper) const {
    constexpr uint mask = BITS == 8 ? 0xffffffffu : BITS == 4 ? 0x0f0f0f0fu : 0x03030303u;
    return word & (upper ? mask << 4 : mask);
  }

  // Set the places of the 16 rows of a chunk, in two blocks, relative to the first code, scale or bias. The distances
  // of rows and blocks are `row_bytes` and `block_bytes` for codes, `scale_bytes` and `scale_block_bytes` for the
  // others.
  inline void lay_out(int row_bytes, int block_bytes, int scale_bytes, int scale_block_bytes) {
    codes_at = g % 2 * block_bytes + g / 2 * row_bytes + c * (QUARTER * BITS / 8);
    codes_on = 4 * row_bytes;
    scales_at = g % 2 * scale_block_bytes + g / 2 * scale_bytes + c % 2 * (SCALES / 2);
    scales_on = 4 * scale_bytes;
  }

  // Store the products of a chunk of 16 rows with the loaded chunk of the vector, times `factor`, into `products` [16];
  // product 2 r + b belongs to row r of block b.
  inline void multiply_chunk(const uchar* codes, const uchar* scales, const uchar* biases, float factor,
                             float* products) const {
    uint4 low[STEPS], high[STEPS];  // for both rows of the lane
#pragma unroll
    for (int turn = 0; turn < STEPS; turn++) {
      const int place = codes_at + (turn ^ order) * 16;
      low[turn] = *(const uint4*)(codes + place);
      high[turn] = *(const uint4*)(codes + codes_on + place);
    }
    uint scale[2][GROUPS], bias[2][GROUPS];  // for the groups of two quarters, two per word
#pragma unroll
    for (int row = 0; row < 2; row++) {
      const int place = scales_at + row * scales_on;
      if (GROUPS == 2) {
        const uint2 s = *(const uint2*)(scales + place), b = *(const uint2*)(biases + place);
        scale[row][0] = s.x, scale[row][GROUPS - 1] = s.y;
        bias[row][0] = b.x, bias[row][GROUPS - 1] = b.y;
      } else {
        scale[row][0] = *(const uint*)(scales + place);
        bias[row][0] = *(const uint*)(biases + place);
      }
    }
    int dots[2][GROUPS][4];  // of lower and upper halves
#pragma unroll
    for (int i = 0; i < 8 * GROUPS; i++) {
      dots[i / (4 * GROUPS)][i / 4 % GROUPS][i % 4] = 0;
    }
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
      // Alternate between two groups, so that fewer products wait for the previous one.
      const int turn = GROUPS == 2 ? step % 2 * (STEPS / 2) + step / 2 : step;
      const uint a[4] = {low[turn].x, low[turn].y, low[turn].z, low[turn].w};
      const uint b[4] = {high[turn].x, high[turn].y, high[turn].z, high[turn].w};
      const int group = turn / (STEPS / GROUPS);
#pragma unroll
      for (int i = 0; i < LOADS; i++) {
        const uint4 four = x[turn * LOADS + i];
        if (BITS == 8) {
          multiply(dots[0][group], a[0], b[0], a[1], b[1], four.x, four.y);
          multiply(dots[0][group], a[2], b[2], a[3], b[3], four.z, four.w);
        } else {
          const uint l = a[BITS == 4 ? 2 * i % 4 : i], next_l = BITS == 4 ? a[2 * i % 4 + 1] : l >> 2;
          const uint h = b[BITS == 4 ? 2 * i % 4 : i], next_h = BITS == 4 ? b[2 * i % 4 + 1] : h >> 2;
          multiply(dots[0][group], some_codes(l, false), some_codes(h, false), some_codes(next_l, false),
                   some_codes(next_h, false), four.x, four.y);
          multiply(dots[1][group], some_codes(l, true), some_codes(h, true), some_codes(next_l, true),
                   some_codes(next_h, true), four.z, four.w);
        }
      }
    }
#pragma unroll
    for (int row = 0; row < 2; row++) {
      // Groups of the first quarter, then of the second; biases first, because they wait for no product.
      float result = 0.0f;
#pragma unroll
      for (int i = 0; i < 2 * GROUPS; i++) {
        const uint b = bias[row][i / 2];
        result += (i % 2 ? high_half(b) : low_half(b)) * sums[i % GROUPS][i / GROUPS];
      }
#pragma unroll
      for (int i = 0; i < 2 * GROUPS; i++) {
        const uint s = scale[row][i / 2];
        const int group = i % GROUPS, quarter = i / GROUPS;
        const int dot = BITS == 8 ? dots[0][group][2 * row + quarter]
                                  : 16 * dots[0][group][2 * row + quarter] + dots[1][group][2 * row + quarter];
        result += (i % 2 ? high_half(s) : low_half(s)) * (steps[group][quarter] * float(dot));
      }
      result += __shfl_xor_sync(0xffffffffu, result, 1);
      result += __shfl_xor_sync(0xffffffffu, result, 2);
      if (c == 0) {
        products[g + 8 * row] = factor * result;
      }
    }
  }
};
