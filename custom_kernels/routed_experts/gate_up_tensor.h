// gate_up.h on tensor cores: 8 rows per threadgroup; a lane holds one row of gate and the same row of up.
// Grid: x = rows / 8, y = choices; SIMDGROUPS simdgroups share the columns.

const int choice = threadgroup_position_in_grid.y;
const int first = threadgroup_position_in_grid.x * 8;
const int lane = thread_index_in_simdgroup, simdgroup = simdgroup_index_in_threadgroup;
const int mine = thread_index_in_threadgroup;
#if WITH_SHARED_EXPERT
const bool routed = choice % CHOICES < CHOICES - 1;
const int row = routed ? rows[choice / CHOICES * (CHOICES - 1) + choice % CHOICES] : 0;
#else
const bool routed = true;
const int row = rows[choice];
#endif
if (row < 0) {
  if (mine < 8) {
    hidden[(long)choice * INTERMEDIATE + first + mine] = T(0.0f);
  }
  return;
}

SHARED uint4 staged[HIDDEN / 8];
SHARED float sums[HIDDEN / GATE_GROUP];
SHARED float partial[SIMDGROUPS][16];
uint* pairs = (uint*)staged;
const uchar* record = slab + (long)row * RECORD_BYTES;
const long own = first + lane / 4;
Row gate = row_of<GATE_BITS, GATE_GROUP>(
    (const uint*)(record + GATE_WEIGHT), (const T*)(record + GATE_SCALES), (const T*)(record + GATE_BIASES), own, HIDDEN);
Row up = row_of<GATE_BITS, GATE_GROUP>(
    (const uint*)(record + UP_WEIGHT), (const T*)(record + UP_SCALES), (const T*)(record + UP_BIASES), own, HIDDEN);
#if WITH_SHARED_EXPERT
if (!routed) {
  gate = row_of<GATE_BITS, GATE_GROUP>(shared_gate_weight, shared_gate_scales, shared_gate_biases, own, HIDDEN);
  up = row_of<GATE_BITS, GATE_GROUP>(shared_up_weight, shared_up_scales, shared_up_biases, own, HIDDEN);
}
#endif
RowProducts<GATE_BITS, GATE_GROUP, DEPTH> products;
products.begin(gate, up, HIDDEN / STEP, simdgroup, SIMDGROUPS, lane);
stage<GATE_BITS, GATE_GROUP>(x + (long)(choice / CHOICES) * HIDDEN, HIDDEN, mine, 32 * SIMDGROUPS, pairs, sums);
wait_for_threadgroup();
float results[2] = {0.0f, 0.0f};
products.finish(pairs, sums, results);
if (lane % 4 == 0) {
  partial[simdgroup][lane / 4] = results[0];
  partial[simdgroup][lane / 4 + 8] = results[1];
}
wait_for_threadgroup();
if (mine < 8) {
  float g = 0.0f, u = 0.0f;
#pragma unroll
  for (int i = 0; i < SIMDGROUPS; i++) {
    g += partial[i][mine];
    u += partial[i][mine + 8];
  }
  hidden[(long)choice * INTERMEDIATE + first + mine] = T(silu(g) * u);
}
