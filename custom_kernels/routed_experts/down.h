// y = residual + sum over a token's choices of weight * down hidden, ROWS rows for each team of TEAM lanes.
// Grid: x = rows / (ROWS * 32 / TEAM), y = tokens; a simdgroup processes every SIMDGROUPS-th choice.

const int token = threadgroup_position_in_grid.y;
const uint lane = thread_index_in_simdgroup;
const int rows_a_group = ROWS * (32 / TEAM);
const int first = threadgroup_position_in_grid.x * rows_a_group + int(lane) / TEAM * ROWS;

float products[ROWS];
#pragma unroll
for (int i = 0; i < ROWS; i++) {
  products[i] = 0.0f;
}
for (int choice = simdgroup_index_in_threadgroup; choice < CHOICES; choice += SIMDGROUPS) {
#if WITH_SHARED_EXPERT
  const bool routed = choice < CHOICES - 1;
  const int row = routed ? rows[token * (CHOICES - 1) + choice] : 0;
#else
  const int row = rows[token * CHOICES + choice];
#endif
  if (row < 0) {
    continue;
  }
  const device uchar* record = slab + (long)row * RECORD_BYTES;
  const device uint* weight = (const device uint*)(record + DOWN_WEIGHT);
  const device DOWN_S* scales = (const device DOWN_S*)(record + DOWN_SCALES);
  const device DOWN_S* biases = (const device DOWN_S*)(record + DOWN_BIASES);
#if WITH_SHARED_EXPERT
  if (!routed) {
    weight = shared_down_weight;
    scales = shared_down_scales;
    biases = shared_down_biases;
  }
#endif
  const float share = routing_weights[token * CHOICES + choice];
  const device float* input = hidden + (long)(token * CHOICES + choice) * INTERMEDIATE;
  for (int chunk = int(lane) % TEAM; chunk < INTERMEDIATE / CHUNK; chunk += TEAM) {
    float values[CHUNK], found[ROWS];
    const float sum = load_chunk(input + chunk * CHUNK, values);
#pragma unroll
    for (int i = 0; i < ROWS; i++) {
      found[i] = 0.0f;
    }
    add_products<DOWN_BITS, DOWN_GROUP, ROWS>(weight, scales, biases, first, INTERMEDIATE, chunk, values, sum, found);
#pragma unroll
    for (int i = 0; i < ROWS; i++) {
      products[i] += share * found[i];
    }
  }
}

SHARED float partial[SIMDGROUPS][ROWS * (32 / TEAM)];
const float total = team_sums<ROWS, TEAM>(products, lane);
if (int(lane) % TEAM < ROWS) {
  partial[simdgroup_index_in_threadgroup][int(lane) / TEAM * ROWS + sum_index<ROWS>(lane % TEAM)] = total;
}
wait_for_threadgroup();
const int mine = thread_index_in_threadgroup;
if (mine < rows_a_group) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < SIMDGROUPS; i++) {
    sum += partial[i][mine];
  }
  const long place = (long)token * HIDDEN + threadgroup_position_in_grid.x * rows_a_group + mine;
  y[place] = RESULT(float(residual[place]) + sum);
}
