// Products with weights in MLX's affine format on NVIDIA's tensor cores; for bf16 activations and codes of 2 or 4 bits.
//
// codes.h needs five instructions per code, more than a Hopper GPU can execute while memory delivers a code. Here one
// instruction turns two codes into two bf16 numbers: in the mantissa of 128 they read as 128 + code, exactly. The bias
// term subtracts 128 * sum(x); sums are in f32.
//
// mma.m16n8k16 multiplies 16 rows of weights by 16 values of x. Any 16 columns will do, if both operands use the same.
// Lane 4 g + c holds rows g and g + 8 and loads 32 consecutive codes of each at once; a word of codes gives the pairs
// (j, j + half). `stage` stores x in shared memory in this order. The other operand has 8 columns; each group of the
// 128 codes in a step has a column for itself, so that groups do not mix.

constexpr int STEP = 128;  // codes of a row in one step of a simdgroup

template <int BITS>
struct Chunk {
  uint words[BITS];  // 32 codes
};

template <int BITS>
inline Chunk<BITS> load_chunk_of_codes(const uint* from) {
  Chunk<BITS> chunk;
  if (BITS == 4) {
    const uint4 four = __ldcs((const uint4*)from);
    chunk.words[0] = four.x;
    chunk.words[1] = four.y;
    chunk.words[BITS - 2] = four.z;
    chunk.words[BITS - 1] = four.w;
  } else {
    const uint2 two = __ldcs((const uint2*)from);
    chunk.words[0] = two.x;
    chunk.words[1] = two.y;
  }
  return chunk;
}

// Return codes j and j + 16 / BITS of a word as 128 + code.
template <int BITS>
inline uint pair_of_codes(uint word, int j) {
  const uint mask = (1u << BITS) - 1u;
  return ((word >> (BITS * j)) & (mask | mask << 16)) | 0x43004300u;
}

// Store x, bf16 [columns], into `pairs` [columns / 2] in the order of the codes, and the sum of every group into
// `sums`. `threads` threads in whole simdgroups share the work; `mine` is the number of this thread. They must
// synchronize after.
template <int BITS, int GROUP>
inline void stage(const __nv_bfloat16* x, int columns, int mine, int threads, uint* pairs, float* sums) {
  constexpr int unit = 32 / BITS;  // codes in a word
  for (int i = mine; i < columns / 8; i += threads) {
    const uint4 eight = *(const uint4*)(x + 8 * i);
    float sum = (low_half(eight.x) + high_half(eight.x)) + (low_half(eight.y) + high_half(eight.y)) +
                ((low_half(eight.z) + high_half(eight.z)) + (low_half(eight.w) + high_half(eight.w)));
    for (int mask = 1; mask < GROUP / 8; mask *= 2) {
      sum += __shfl_xor_sync(0xffffffffu, sum, mask);
    }
    if (i % (GROUP / 8) == 0) {
      sums[i / (GROUP / 8)] = sum;
    }
    if (unit == 8) {
      uint4 ordered;
      ordered.x = __byte_perm(eight.x, eight.z, 0x5410);
      ordered.y = __byte_perm(eight.x, eight.z, 0x7632);
      ordered.z = __byte_perm(eight.y, eight.w, 0x5410);
      ordered.w = __byte_perm(eight.y, eight.w, 0x7632);
      *(uint4*)(pairs + 4 * i) = ordered;
    } else {
      // A word spans two blocks of eight values: this block is the low or the high half of its pairs.
      unsigned short* halves = (unsigned short*)(pairs + i / 2 * 8) + i % 2;
      const uint words[4] = {eight.x, eight.y, eight.z, eight.w};
#pragma unroll
      for (int j = 0; j < 4; j++) {
        halves[4 * j] = words[j] & 0xffffu;
        halves[4 * j + 2] = words[j] >> 16;
      }
    }
  }
}

// The first codes, scales and biases of a lane's row.
struct Row {
  const uint* weight;
  const __nv_bfloat16* scales;
  const __nv_bfloat16* biases;
};

template <int BITS, int GROUP>
inline Row row_of(const uint* weight, const __nv_bfloat16* scales, const __nv_bfloat16* biases, long row, int columns) {
  return Row{weight + row * (columns / 32 * BITS), scales + row * (columns / GROUP), biases + row * (columns / GROUP)};
}

// A lane's operands of one step: codes of both rows, and the scales and biases of their groups, two per word.
template <int BITS>
struct Step {
  Chunk<BITS> low, high;
  uint low_scales, low_biases, high_scales, high_biases;
};

// For the 1 or 2 groups of a step.
template <int GROUP>
inline uint load_groups(const __nv_bfloat16* values, int step) {
  if (GROUP == STEP) {
    return *(const unsigned short*)(values + step);
  }
  return *(const uint*)(values + 2 * step);
}

// The products of a lane's two rows with x, over every `stride`-th step. Loads run DEPTH steps ahead; `begin` starts
// them and does not read x, so that x can be staged meanwhile.
template <int BITS, int GROUP, int DEPTH>
struct RowProducts {
  Row low, high;
  int steps, stride, next, lane;
  Step<BITS> ahead[DEPTH];

  inline void load(int slot, int step) {
    const int word = step * (STEP / 32 * BITS) + lane % 4 * BITS;
    ahead[slot].low = load_chunk_of_codes<BITS>(low.weight + word);
    ahead[slot].high = load_chunk_of_codes<BITS>(high.weight + word);
    ahead[slot].low_scales = load_groups<GROUP>(low.scales, step);
    ahead[slot].low_biases = load_groups<GROUP>(low.biases, step);
    ahead[slot].high_scales = load_groups<GROUP>(high.scales, step);
    ahead[slot].high_biases = load_groups<GROUP>(high.biases, step);
  }

  inline void begin(Row low_row, Row high_row, int all_steps, int first, int every, int own_lane) {
    low = low_row, high = high_row, steps = all_steps, stride = every, next = first, lane = own_lane;
#pragma unroll
    for (int slot = 0; slot < DEPTH; slot++) {
      if (next + slot * stride < steps) {
        load(slot, next + slot * stride);
      }
    }
  }

  // Only lanes with c = 0 have valid results, for rows g and g + 8.
  inline void finish(const uint* pairs, const float* sums, float* results) {
    constexpr int groups = STEP / GROUP;
    const int c = lane % 4, column = lane / 4;
    const bool feeds = column < groups && c / (4 / groups) == column;
    while (next < steps) {
#pragma unroll
      for (int slot = 0; slot < DEPTH; slot++) {
        if (next < steps) {
          const Step<BITS> now = ahead[slot];
          const int step = next;
          if (next + DEPTH * stride < steps) {
            load(slot, next + DEPTH * stride);
          }
          next += stride;
          float dots[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
          for (int i = 0; i < BITS; i++) {
            const uint own = now.low.words[i], other = now.high.words[i];
#pragma unroll
            for (int j = 0; j < 16 / BITS; j += 4) {
              const uint4 x = feeds ? *(const uint4*)(pairs + step * (STEP / 2) + c * 16 + i * (16 / BITS) + j)
                                    : make_uint4(0, 0, 0, 0);
              multiply(dots, pair_of_codes<BITS>(own, j), pair_of_codes<BITS>(other, j),
                       pair_of_codes<BITS>(own, j + 1), pair_of_codes<BITS>(other, j + 1), x.x, x.y);
              multiply(dots, pair_of_codes<BITS>(own, j + 2), pair_of_codes<BITS>(other, j + 2),
                       pair_of_codes<BITS>(own, j + 3), pair_of_codes<BITS>(other, j + 3), x.z, x.w);
            }
          }
#pragma unroll
          for (int group = 0; group < groups; group++) {
            const float sum = sums[step * groups + group];
            const float low_scale = group ? high_half(now.low_scales) : low_half(now.low_scales);
            const float high_scale = group ? high_half(now.high_scales) : low_half(now.high_scales);
            const float low_bias = group ? high_half(now.low_biases) : low_half(now.low_biases);
            const float high_bias = group ? high_half(now.high_biases) : low_half(now.high_biases);
            results[0] += low_scale * (dots[group] - 128.0f * sum) + low_bias * sum;
            results[1] += high_scale * (dots[2 + group] - 128.0f * sum) + high_bias * sum;
          }
        }
      }
    }
  }
};
