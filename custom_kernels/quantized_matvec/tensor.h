// body.h on tensor cores: 16 rows per threadgroup. Grid: x = rows / 16, y = vectors; SIMDGROUPS simdgroups share the
// columns.

const int token = threadgroup_position_in_grid.y;
const int first = threadgroup_position_in_grid.x * 16;
const int lane = thread_index_in_simdgroup, simdgroup = simdgroup_index_in_threadgroup;
const int mine = thread_index_in_threadgroup;
SHARED uint4 staged[COLUMNS / 8];
SHARED float sums[COLUMNS / GROUP];
SHARED float partial[SIMDGROUPS][16];
uint* pairs = (uint*)staged;
const long own = first + lane / 4;
RowProducts<BITS, GROUP, DEPTH> products;
products.begin(
    row_of<BITS, GROUP>(weight, scales, biases, own, COLUMNS),
    row_of<BITS, GROUP>(weight, scales, biases, own + 8, COLUMNS), COLUMNS / STEP, simdgroup, SIMDGROUPS, lane);
stage<BITS, GROUP>(x + (long)token * COLUMNS, COLUMNS, mine, 32 * SIMDGROUPS, pairs, sums);
wait_for_threadgroup();
float results[2] = {0.0f, 0.0f};
products.finish(pairs, sums, results);
if (lane % 4 == 0) {
  partial[simdgroup][lane / 4] = results[0];
  partial[simdgroup][lane / 4 + 8] = results[1];
}
wait_for_threadgroup();
if (mine < 16) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < SIMDGROUPS; i++) {
    sum += partial[i][mine];
  }
  const long place = (long)token * OUTPUTS + first + mine;
#if WITH_RESIDUAL
  sum += float(residual[place]);
#endif
  y[place] = T(sum);
}
