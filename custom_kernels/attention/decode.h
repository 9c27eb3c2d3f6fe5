// One query over a span of the cache: scores, softmax and the sum of values, for HEADS_AT_ONCE heads that share keys.
// Grid: x = spans, y = query heads / HEADS_AT_ONCE. A simdgroup processes every SIMDGROUPS-th key of its span; lane l
// holds WIDTH dimensions, beginning at l * WIDTH. Sums are relative to the largest score so far.
// The capacity of the cache is divided into spans, so that the grid does not depend on the position.

const int part = threadgroup_position_in_grid.x;
const int head = threadgroup_position_in_grid.y * HEADS_AT_ONCE;
const int kv_head = head / (HEADS / KV_HEADS);
const int lane = thread_index_in_simdgroup;
const int simdgroup = simdgroup_index_in_threadgroup;
const int length = position[0] + 1, capacity = keys_shape[2], spans = threadgroups_per_grid.x;
const int span = (capacity + spans - 1) / spans;
const int begin = part * span;
const int end = begin + span < length ? begin + span : length;
const device KV* own_keys = keys + (long)kv_head * capacity * ROW;
const device KV* own_values = values + (long)kv_head * capacity * ROW;

float q[HEADS_AT_ONCE * WIDTH], sums[HEADS_AT_ONCE * WIDTH], largest[HEADS_AT_ONCE], total[HEADS_AT_ONCE];
#pragma unroll
for (int h = 0; h < HEADS_AT_ONCE; h++) {
  largest[h] = LOWEST;
  total[h] = 0.0f;
#pragma unroll
  for (int c = 0; c < WIDTH; c++) {
    q[h * WIDTH + c] = float(queries[(long)(head + h) * DIM + lane * WIDTH + c]) * reciprocal_root(float(DIM));
    sums[h * WIDTH + c] = 0.0f;
  }
}
for (int key = begin + simdgroup; key < end; key += SIMDGROUPS) {
  float k[WIDTH], v[WIDTH];
  load_row<DIM, GROUP, BITS, WIDTH>(own_keys + (long)key * ROW, lane * WIDTH, k);
  load_row<DIM, GROUP, BITS, WIDTH>(own_values + (long)key * ROW, lane * WIDTH, v);
#pragma unroll
  for (int h = 0; h < HEADS_AT_ONCE; h++) {
    float score = 0.0f;
#pragma unroll
    for (int c = 0; c < WIDTH; c++) {
      score += q[h * WIDTH + c] * k[c];
    }
    score = simd_sum(score);
    const float higher = score > largest[h] ? score : largest[h];
    const float kept = exponential(largest[h] - higher), weight = exponential(score - higher);
    largest[h] = higher;
    total[h] = total[h] * kept + weight;
#pragma unroll
    for (int c = 0; c < WIDTH; c++) {
      sums[h * WIDTH + c] = sums[h * WIDTH + c] * kept + weight * v[c];
    }
  }
}

SHARED float maxima[SIMDGROUPS][HEADS_AT_ONCE];
SHARED float totals[SIMDGROUPS][HEADS_AT_ONCE];
SHARED float gathered[SIMDGROUPS][DIM];
#pragma unroll
for (int h = 0; h < HEADS_AT_ONCE; h++) {
  if (lane == 0) {
    maxima[simdgroup][h] = largest[h];
    totals[simdgroup][h] = total[h];
  }
}
wait_for_threadgroup();
#pragma unroll
for (int h = 0; h < HEADS_AT_ONCE; h++) {
  float higher = LOWEST;
#pragma unroll
  for (int i = 0; i < SIMDGROUPS; i++) {
    higher = maxima[i][h] > higher ? maxima[i][h] : higher;
  }
  const float kept = exponential(largest[h] - higher);
#pragma unroll
  for (int c = 0; c < WIDTH; c++) {
    gathered[simdgroup][lane * WIDTH + c] = sums[h * WIDTH + c] * kept;
  }
  wait_for_threadgroup();
  const long at = (long)(head + h) * spans + part;
  for (int c = thread_index_in_threadgroup; c < DIM; c += 32 * SIMDGROUPS) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < SIMDGROUPS; i++) {
      sum += gathered[i][c];
    }
    partial[at * DIM + c] = sum;
  }
  if (thread_index_in_threadgroup == 0) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < SIMDGROUPS; i++) {
      sum += totals[i][h] * exponential(maxima[i][h] - higher);
    }
    peaks[2 * at] = higher;
    peaks[2 * at + 1] = sum;
  }
  wait_for_threadgroup();
}
