// Products of one vector with weights in MLX's affine format on NVIDIA's tensor cores, the weights brought into shared
// memory by the copy engine of Hopper GPUs and later ones; for bf16 activations and codes of 2 or 4 bits.
//
// Copies of whole rows are asked for long before they are used and report to a barrier in shared memory; they pass
// through no registers and hold up no other loads. So enough is under way to keep memory busy.
//
// The tensor cores multiply integers: codes as they are with a vector in fixed point, of 15 bits for each group, whose
// largest value is 127 * 128 steps; so a step is 1/16256 of it, finer than the rounding of bf16 inputs by far. A value is
// 128 * high + low, two planes of 8 bits. This needs a third of the instructions that turning codes into bf16 does, and
// a Hopper GPU has no time for more while a code comes from memory.
//
// A simdgroup takes CHUNK consecutive codes of 16 rows at a time. mma.m16n8k32 multiplies 16 rows with 8 columns, of
// which a vector would need one. Here they keep planes and groups apart: lane 4 g + c takes a quarter of the chunk,
// number c, of rows g and g + 8, and column n holds plane n / 4 of quarter n % 4, zeros elsewhere. So sums of several
// groups grow side by side, and all lanes apply scales at once. Only lanes with c = g % 4 hold values of the columns that
// are not zero, those of a quarter, and keep them while rows change. Lanes walk through their quarters in different
// orders, so that fewer read the same bank of shared memory.

constexpr int CHUNK = 512;          // codes of a row
constexpr int QUARTER = CHUNK / 4;  // of which a lane takes these

inline float low_half(uint word) {
  return __uint_as_float(word << 16);
}
inline float high_half(uint word) {
  return __uint_as_float(word & 0xffff0000u);
}

// A vector in shared memory: two planes, then for each group its largest magnitude and its sum. In the planes, values
// lie in the order in which a word of codes gives them up: 4 at a time, 32 / BITS / 4 places apart.
inline constexpr int staged_bytes(int width, int group) {
  return 2 * width + width / group * 8;
}

// Stage values 8 i to 8 i + 7 of a vector of `width`. Whole simdgroups with consecutive `i`.
template <int BITS, int GROUP>
inline void stage(uint4 eight, int i, int width, uchar* vector) {
  const float values[8] = {low_half(eight.x), high_half(eight.x), low_half(eight.y), high_half(eight.y),
                           low_half(eight.z), high_half(eight.z), low_half(eight.w), high_half(eight.w)};
  float most = 0.0f, sum = 0.0f;
#pragma unroll
  for (int j = 0; j < 8; j++) {
    most = fmaxf(most, fabsf(values[j]));
    sum += values[j];
  }
#pragma unroll
  for (int mask = 1; mask < GROUP / 8; mask *= 2) {
    most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, mask));
    sum += __shfl_xor_sync(0xffffffffu, sum, mask);
  }
  if (i % (GROUP / 8) == 0) {
    ((float2*)(vector + 2 * width))[i / (GROUP / 8)] = make_float2(most, sum);
  }
  const float steps = most > 0.0f ? 16256.0f / most : 0.0f;
  uint high[8], low[8];
#pragma unroll
  for (int j = 0; j < 8; j++) {
    const int fixed = __float2int_rn(values[j] * steps), upper = (fixed + 64) >> 7;
    high[j] = uint(upper) & 255u, low[j] = uint(fixed - (upper << 7)) & 255u;
  }
  constexpr int apart = BITS == 8 ? 1 : 8 / BITS;  // places between the codes of a word that one shift and mask gives
#pragma unroll
  for (int plane = 0; plane < 2; plane++) {
    const uint* bytes = plane ? low : high;
    uchar* to = vector + plane * width + 8 * i;
    if (BITS == 2) {
      // A word of 16 codes spans two of these eights.
      unsigned short* halves = (unsigned short*)(to - i % 2 * 8) + i % 2;
#pragma unroll
      for (int j = 0; j < 4; j++) {
        halves[2 * j] = (unsigned short)(bytes[j] | bytes[j + 4] << 8);
      }
    } else {
      constexpr int second = BITS == 8 ? 4 : 1;
      *(uint2*)to = make_uint2(
          bytes[0] | bytes[apart] << 8 | bytes[2 * apart] << 16 | bytes[3 * apart] << 24,
          bytes[second] | bytes[second + apart] << 8 | bytes[second + 2 * apart] << 16 | bytes[second + 3 * apart] << 24);
    }
  }
}

template <int BITS, int GROUP>
struct Stream {
  static constexpr int CODES = CHUNK * BITS / 8, SCALES = CHUNK / GROUP * 2;  // bytes of a chunk of a row
  static constexpr int TURNS = QUARTER * BITS / 8 / 16;  // 16 bytes of codes each
  static constexpr int GROUPS = QUARTER / GROUP;         // of a quarter
  static constexpr int LOADS = 8 / TURNS;                // 16 bytes of a plane each, in a turn

  int g, c, order;
  bool feeds;
  uint4 x[8];                  // a plane of a quarter; zero where the lane does not feed
  float steps[GROUPS][2];      // of the groups of two columns: what 1 in the plane stands for
  float sums[GROUPS][2];       // their sums, where the columns are of the upper plane

  inline void begin(int lane) {
    g = lane / 4, c = lane % 4;
    feeds = c == g % 4;
    order = BITS == 8 ? c : BITS == 4 ? c / 2 : 0;
#pragma unroll
    for (int i = 0; i < 8; i++) {
      x[i] = make_uint4(0, 0, 0, 0);
    }
  }

  // Chunk number `chunk` of a vector of `width` that was staged.
  inline void take(const uchar* vector, int width, int chunk) {
    if (feeds) {
      const uint4* own = (const uint4*)(vector + g / 4 * width + (chunk * 4 + c) * QUARTER);
#pragma unroll
      for (int turn = 0; turn < TURNS; turn++) {
#pragma unroll
        for (int i = 0; i < LOADS; i++) {
          x[turn * LOADS + i] = own[(turn ^ order) * LOADS + i];
        }
      }
    }
    const float2* groups = (const float2*)(vector + 2 * width) + (chunk * 4 + c % 2 * 2) * GROUPS;
#pragma unroll
    for (int i = 0; i < 2 * GROUPS; i++) {
      const float2 most_and_sum = groups[i];
      steps[i % GROUPS][i / GROUPS] = most_and_sum.x * (c < 2 ? 1.0f / 127.0f : 1.0f / 16256.0f);
      sums[i % GROUPS][i / GROUPS] = c < 2 ? most_and_sum.y : 0.0f;
    }
  }

  // Bytes of four codes, number `part` of the 8 / BITS of a word.
  inline uint some_codes(uint word, int part) const {
    constexpr uint mask = BITS == 8 ? 0xffffffffu : ((1u << BITS) - 1u) * 0x01010101u;
    return (word >> (BITS * part)) & mask;
  }

  // The products of a chunk of 16 rows with what was taken, times `factor`, into `products` [16]. Rows of codes are
  // `row_bytes` apart, those of scales and of biases `scale_bytes`.
  inline void multiply_chunk(const uchar* codes, int row_bytes, const uchar* scales, const uchar* biases,
                             int scale_bytes, float factor, float* products) const {
    const uchar* own = codes + g * row_bytes + c * (QUARTER * BITS / 8);
    const int eight_rows = 8 * row_bytes;
    uint scale[2][GROUPS], bias[2][GROUPS];  // of rows g, g + 8: the groups of two quarters, two in a word
#pragma unroll
    for (int row = 0; row < 2; row++) {
      const int place = (g + 8 * row) * scale_bytes + c % 2 * (SCALES / 2);
      if (GROUPS == 2) {
        const uint2 s = *(const uint2*)(scales + place), b = *(const uint2*)(biases + place);
        scale[row][0] = s.x, scale[row][GROUPS - 1] = s.y;
        bias[row][0] = b.x, bias[row][GROUPS - 1] = b.y;
      } else {
        scale[row][0] = *(const uint*)(scales + place);
        bias[row][0] = *(const uint*)(biases + place);
      }
    }
    int dots[GROUPS][4];
#pragma unroll
    for (int i = 0; i < 4 * GROUPS; i++) {
      dots[i / 4][i % 4] = 0;
    }
    uint4 low[TURNS], high[TURNS];
#pragma unroll
    for (int turn = 0; turn < TURNS; turn++) {
      const int place = (turn ^ order) * 16;
      low[turn] = *(const uint4*)(own + place);
      high[turn] = *(const uint4*)(own + eight_rows + place);
    }
#pragma unroll
    for (int step = 0; step < TURNS; step++) {
      // Turns of two groups in turn, so that fewer products wait for the one before.
      const int turn = GROUPS == 2 ? step % 2 * (TURNS / 2) + step / 2 : step;
      const uint a[4] = {low[turn].x, low[turn].y, low[turn].z, low[turn].w};
      const uint b[4] = {high[turn].x, high[turn].y, high[turn].z, high[turn].w};
      int* sum = dots[turn / (TURNS / GROUPS)];
#pragma unroll
      for (int i = 0; i < 2 * LOADS; i++) {
        const uint4 four = x[turn * LOADS + i / 2];
        const uint first = i % 2 ? four.z : four.x, second = i % 2 ? four.w : four.y;
        if (BITS == 8) {
          multiply(sum, a[2 * i], b[2 * i], a[2 * i + 1], b[2 * i + 1], first, second);
        } else {
          constexpr int halves = 4 / BITS;  // products of a word
          const uint l = a[i / halves], h = b[i / halves];
          const int part = i % halves * 2;
          multiply(sum, some_codes(l, part), some_codes(h, part), some_codes(l, part + 1), some_codes(h, part + 1),
                   first, second);
        }
      }
    }
#pragma unroll
    for (int row = 0; row < 2; row++) {
      float result = 0.0f;
#pragma unroll
      for (int i = 0; i < 2 * GROUPS; i++) {  // groups of the first quarter, then of the second
        const uint s = scale[row][i / 2], b = bias[row][i / 2];
        const int group = i % GROUPS, quarter = i / GROUPS;
        result += (i % 2 ? high_half(s) : low_half(s)) * (steps[group][quarter] * float(dots[group][2 * row + quarter]));
        result += (i % 2 ? high_half(b) : low_half(b)) * sums[group][quarter];
      }
      result += __shfl_xor_sync(0xffffffffu, result, 1);
      result += __shfl_xor_sync(0xffffffffu, result, 2);
      if (c == 0) {
        products[g + 8 * row] = factor * result;
      }
    }
  }
};
