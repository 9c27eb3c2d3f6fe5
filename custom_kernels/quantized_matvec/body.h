// y = W x for TOKENS vectors x, ROWS rows of W per threadgroup.
// Grid: x = rows / ROWS; THREADS threads share a row, and each processes some chunks of its columns.

const int first = threadgroup_position_in_grid.x * ROWS;
const uint lane = thread_index_in_simdgroup;

float products[TOKENS * ROWS];
#pragma unroll
for (int i = 0; i < TOKENS * ROWS; i++) {
  products[i] = 0.0f;
}
for (int chunk = thread_index_in_threadgroup; chunk < COLUMNS / CHUNK; chunk += THREADS) {
#pragma unroll
  for (int token = 0; token < TOKENS; token++) {
    float values[CHUNK];
    const float sum = load_chunk(x + (long)token * COLUMNS + chunk * CHUNK, values);
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
wait_for_threadgroup();
for (int mine = thread_index_in_threadgroup; mine < TOKENS * ROWS; mine += THREADS) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < THREADS / 32; i++) {
    sum += partial[i][mine];
  }
  const int row = first + mine % ROWS;
  y[(long)(mine / ROWS) * OUTPUTS + row] = T(sum);
}
