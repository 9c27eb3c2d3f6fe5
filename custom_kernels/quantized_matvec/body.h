// y = W x for TOKENS vectors x, ROWS rows of W per threadgroup.
// Grid: x = rows / ROWS; THREADS threads share a row, and each processes some chunks of its columns.
//
// WITH_NORM: x (one vector) is normalized first, and y = scale * (W (x * norm)), because all threads know the scale,
// 1 / rms(x), only in the end.

const int first = threadgroup_position_in_grid.x * ROWS;
const uint lane = thread_index_in_simdgroup;

float products[TOKENS * ROWS];
#pragma unroll
for (int i = 0; i < TOKENS * ROWS; i++) {
  products[i] = 0.0f;
}
#if WITH_NORM
float square = 0.0f;
#endif
for (int chunk = thread_index_in_threadgroup; chunk < COLUMNS / CHUNK; chunk += THREADS) {
#pragma unroll
  for (int token = 0; token < TOKENS; token++) {
    float values[CHUNK];
    float sum = load_chunk(x + (long)token * COLUMNS + chunk * CHUNK, values);
#if WITH_NORM
    float factors[CHUNK];
    load_chunk(norm + chunk * CHUNK, factors);
    sum = 0.0f;
#pragma unroll
    for (int i = 0; i < CHUNK; i++) {
      square += values[i] * values[i];
      values[i] *= factors[i];
      sum += values[i];
    }
#endif
    add_products<BITS, GROUP, ROWS>(
        weight, scales, biases, first, COLUMNS, chunk, values, sum, products + token * ROWS);
  }
}

SHARED float partial[THREADS / 32][TOKENS * ROWS];
#pragma unroll
for (int token = 0; token < TOKENS; token++) {
  const float total = team_sums<ROWS, 32>(products + token * ROWS, lane);
  if (lane < ROWS) {
    partial[simdgroup_index_in_threadgroup][token * ROWS + sum_index<ROWS>(lane)] = total;
  }
}
#if WITH_NORM
SHARED float squares[THREADS / 32];
square = simd_sum(square);
if (lane == 0) {
  squares[simdgroup_index_in_threadgroup] = square;
}
#endif
wait_for_threadgroup();
#if WITH_NORM
const float scale = root_mean_square_scale(squares, THREADS / 32, COLUMNS, as_type<float>(EPS));
for (int i = threadgroup_position_in_grid.x * THREADS + thread_index_in_threadgroup; i < COLUMNS; i += OUTPUTS / ROWS * THREADS) {
  normed[i] = T(float(x[i]) * scale * float(norm[i]));
}
#endif
for (int mine = thread_index_in_threadgroup; mine < TOKENS * ROWS; mine += THREADS) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < THREADS / 32; i++) {
    sum += partial[i][mine];
  }
  const long place = (long)(mine / ROWS) * OUTPUTS + first + mine % ROWS;
#if WITH_NORM
  sum *= scale;
#endif
#if WITH_RESIDUAL
  sum += float(residual[place]);
#endif
  y[place] = T(sum);
}
