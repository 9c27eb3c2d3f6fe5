// One query over a span of the cache: scores, softmax and the sum of values, for HEADS_AT_ONCE heads that share keys.
// Grid: x = spans, y = query heads / HEADS_AT_ONCE, z = sequences. A simdgroup processes every SIMDGROUPS-th key of its
// span; lane l holds WIDTH dimensions, beginning at l * WIDTH. Sums are relative to the largest score so far.
// The grid depends on the capacity of the cache. The keys of a span depend on the position alone, so a sequence has the
// same sums whatever sequences share its arrays.

const int part = threadgroup_position_in_grid.x;
const int head = threadgroup_position_in_grid.y * HEADS_AT_ONCE;
const int kv_head = head / (HEADS / KV_HEADS);
const int lane = thread_index_in_simdgroup;
const int simdgroup = simdgroup_index_in_threadgroup;
const int sequence = threadgroup_position_in_grid.z, sequences = keys_shape[0];
const int length = position[sequence] + 1, capacity = keys_shape[2], spans = threadgroups_per_grid.x;
const int rounded = (length + GROWTH - 1) / GROWTH * GROWTH, room = rounded < capacity ? rounded : capacity;
const int equal = (room + spans - 1) / spans, wanted = (room + MOST_SPANS - 1) / MOST_SPANS;
const int least = wanted > SIMDGROUPS ? wanted : SIMDGROUPS;
const int span = equal > least ? equal : least;
const int begin = part * span;
const int end = begin + span < length ? begin + span : length;
const long first_row = ((long)sequence * KV_HEADS + kv_head) * capacity;
const device KV* own_keys = keys + first_row * ROW;
const device KV* own_values = values + first_row * ROW;

float q[HEADS_AT_ONCE * WIDTH], sums[HEADS_AT_ONCE * WIDTH], largest[HEADS_AT_ONCE], total[HEADS_AT_ONCE];
#pragma unroll
for (int h = 0; h < HEADS_AT_ONCE; h++) {
  largest[h] = LOWEST;
  total[h] = 0.0f;
#pragma unroll
  for (int c = 0; c < WIDTH; c++) {
    const float value = float(queries[((long)(head + h) * sequences + sequence) * DIM + lane * WIDTH + c]);
    q[h * WIDTH + c] = value * reciprocal_root(float(DIM));
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
  const long at = ((long)sequence * HEADS + head + h) * spans + part;
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
