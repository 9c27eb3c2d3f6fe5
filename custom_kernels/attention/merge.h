// The combination of the results of all spans of the cache, times the output gate if GATED. Grid: x = query heads, one
// sequence after the other, y = slices of 32 dimensions; a simdgroup processes every SIMDGROUPS-th span, at most
// MOST_SPANS / SIMDGROUPS spans.

constexpr int MOST = MOST_SPANS / SIMDGROUPS;
const int head = threadgroup_position_in_grid.x, lane = thread_index_in_simdgroup;
const int own = threadgroup_position_in_grid.y * 32 + lane;
const int simdgroup = simdgroup_index_in_threadgroup;
const int spans = partial_shape[1];
const long first = (long)head * spans;

// Load first: loads take longer than everything else.
float values[MOST], maxima[MOST];
#pragma unroll
for (int i = 0; i < MOST; i++) {
  const int span = i * SIMDGROUPS + simdgroup;
  values[i] = span < spans ? partial[(first + span) * DIM + own] : 0.0f;
  maxima[i] = span < spans ? peaks[2 * (first + span)] : LOWEST;
}
float higher = LOWEST, total = 0.0f, sum = 0.0f;
float lane_peaks[MOST_SPANS / 32], lane_totals[MOST_SPANS / 32];
#pragma unroll
for (int i = 0; i < MOST_SPANS / 32; i++) {
  const int span = i * 32 + lane;
  lane_peaks[i] = span < spans ? peaks[2 * (first + span)] : LOWEST;
  lane_totals[i] = span < spans ? peaks[2 * (first + span) + 1] : 0.0f;
}
const float gate = GATED ? float(q_and_gate[((long)head * (1 + GATED) + GATED) * DIM + own]) : 0.0f;
#pragma unroll
for (int i = 0; i < MOST_SPANS / 32; i++) {
  higher = lane_peaks[i] > higher ? lane_peaks[i] : higher;
}
higher = simd_max(higher);
#pragma unroll
for (int i = 0; i < MOST_SPANS / 32; i++) {
  total += lane_totals[i] * exponential(lane_peaks[i] - higher);
}
total = simd_sum(total);
#pragma unroll
for (int i = 0; i < MOST; i++) {
  sum += values[i] * exponential(maxima[i] - higher);
}

SHARED float gathered[SIMDGROUPS][32];
gathered[simdgroup][lane] = sum;
wait_for_threadgroup();
if (simdgroup == 0) {
  float all = 0.0f;
#pragma unroll
  for (int i = 0; i < SIMDGROUPS; i++) {
    all += gathered[i][lane];
  }
  y[head * DIM + own] = T(GATED ? all / total / (1.0f + exponential(-gate)) : all / total);
}
