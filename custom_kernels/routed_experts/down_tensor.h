// down.h on tensor cores: 16 rows per threadgroup. Grid: x = rows / 16, y = tokens; a simdgroup processes every
// SIMDGROUPS-th choice.

const int token = threadgroup_position_in_grid.y;
const int first = threadgroup_position_in_grid.x * 16;
const int lane = thread_index_in_simdgroup, simdgroup = simdgroup_index_in_threadgroup;
const int mine = thread_index_in_threadgroup;
SHARED uint4 staged[SIMDGROUPS][INTERMEDIATE / 8];
SHARED float sums[SIMDGROUPS][INTERMEDIATE / DOWN_GROUP];
SHARED float partial[SIMDGROUPS][16];
const long own = first + lane / 4;

float total[2] = {0.0f, 0.0f};
for (int choice = simdgroup; choice < CHOICES; choice += SIMDGROUPS) {
#if WITH_SHARED_EXPERT
  const bool routed = choice < CHOICES - 1;
  const int row = routed ? rows[token * (CHOICES - 1) + choice] : 0;
#else
  const int row = rows[token * CHOICES + choice];
#endif
  if (row < 0) {
    continue;
  }
  const uchar* record = slab + (long)row * RECORD_BYTES;
  const uint* weight = (const uint*)(record + DOWN_WEIGHT);
  const T* scales = (const T*)(record + DOWN_SCALES);
  const T* biases = (const T*)(record + DOWN_BIASES);
#if WITH_SHARED_EXPERT
  if (!routed) {
    weight = shared_down_weight;
    scales = shared_down_scales;
    biases = shared_down_biases;
  }
#endif
  RowProducts<DOWN_BITS, DOWN_GROUP, DEPTH> products;
  products.begin(
      row_of<DOWN_BITS, DOWN_GROUP>(weight, scales, biases, own, INTERMEDIATE),
      row_of<DOWN_BITS, DOWN_GROUP>(weight, scales, biases, own + 8, INTERMEDIATE), INTERMEDIATE / STEP, 0, 1, lane);
  uint* pairs = (uint*)staged[simdgroup];
  __syncwarp();
  stage<DOWN_BITS, DOWN_GROUP>(
      hidden + (long)(token * CHOICES + choice) * INTERMEDIATE, INTERMEDIATE, lane, 32, pairs, sums[simdgroup]);
  __syncwarp();
  float results[2] = {0.0f, 0.0f};
  products.finish(pairs, sums[simdgroup], results);
  const float share = routing_weights[token * CHOICES + choice];
  total[0] += share * results[0];
  total[1] += share * results[1];
}
if (lane % 4 == 0) {
  partial[simdgroup][lane / 4] = total[0];
  partial[simdgroup][lane / 4 + 8] = total[1];
}
wait_for_threadgroup();
if (mine < 16) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < SIMDGROUPS; i++) {
    sum += partial[i][mine];
  }
  const long place = (long)token * HIDDEN + first + mine;
  y[place] = RESULT(float(residual[place]) + sum);
}
