// The choice of experts by scores in bf16, by one simdgroup of an NVIDIA GPU.

// Choose CHOSEN of EXPERTS experts, at most 32, by descending scores, of equal scores the first. Lane n gets the choice
// of rank n and its score; all lanes get the highest score. Scores that are not numbers win nothing.
template <int EXPERTS, int CHOSEN>
inline void choose_by_scores(const ushort* scores, int lane, uint* winner, float* value, float* highest) {
  // A key orders experts by their scores, of equal scores the first; scores that are not numbers have key 0.
  constexpr int OWN_SCORES = (EXPERTS + 31) / 32;
  uint keys[OWN_SCORES];
#pragma unroll
  for (int i = 0; i < OWN_SCORES; i++) {
    const uint expert = 32 * i + lane;
    uint bits = expert < EXPERTS ? scores[expert] : 0x7fffu;
    bits = bits == 0x8000u ? 0 : bits;  // -0 equals 0
    const uint ordered = bits & 0x8000u ? ~bits & 0xffffu : bits | 0x8000u;
    keys[i] = (bits & 0x7fffu) > 0x7f80u ? 0 : ordered << 16 | (0xffffu - expert);
  }
  *winner = 0;
  *value = LOWEST;
  *highest = LOWEST;
  for (int k = 0; k < CHOSEN; k++) {
    uint best = 0;
#pragma unroll
    for (int i = 0; i < OWN_SCORES; i++) {
      best = max(best, keys[i]);
    }
    best = __reduce_max_sync(0xffffffffu, best);
#pragma unroll
    for (int i = 0; i < OWN_SCORES; i++) {
      keys[i] = keys[i] == best ? 0 : keys[i];
    }
    const uint bits = best >> 31 ? best >> 16 & 0x7fffu : ~(best >> 16) & 0xffffu;
    const float score = best ? __uint_as_float(bits << 16) : LOWEST;
    *highest = k == 0 ? score : *highest;
    if (lane == k) {
      *winner = min(0xffffu - (best & 0xffffu), uint(EXPERTS - 1));
      *value = score;
    }
  }
}
