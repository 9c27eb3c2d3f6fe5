// hidden = silu(gate x) * up x for ROWS rows of one choice (a token and an expert) per threadgroup.
// Grid: x = rows / ROWS, y = choices; THREADS threads share a row, and each processes some chunks of its columns.

const int choice = threadgroup_position_in_grid.y;
const int first = threadgroup_position_in_grid.x * ROWS;
const uint lane = thread_index_in_simdgroup;
const device T* input = x + (long)(choice / CHOICES) * HIDDEN;
#if WITH_SHARED_EXPERT
const bool routed = choice % CHOICES < CHOICES - 1;
const int row = routed ? rows[choice / CHOICES * (CHOICES - 1) + choice % CHOICES] : 0;
#else
const bool routed = true;
const int row = rows[choice];
#endif
if (row < 0) {  // not in this slab; the second dispatch skips it
  if (thread_index_in_threadgroup < ROWS) {
    hidden[(long)choice * INTERMEDIATE + first + thread_index_in_threadgroup] = 0.0f;
  }
  return;
}
const device uchar* record = slab + (long)row * RECORD_BYTES;
const device uint* gate_weight = (const device uint*)(record + GATE_WEIGHT);
const device GATE_S* gate_scales = (const device GATE_S*)(record + GATE_SCALES);
const device GATE_S* gate_biases = (const device GATE_S*)(record + GATE_BIASES);
const device uint* up_weight = (const device uint*)(record + UP_WEIGHT);
const device UP_S* up_scales = (const device UP_S*)(record + UP_SCALES);
const device UP_S* up_biases = (const device UP_S*)(record + UP_BIASES);
#if WITH_SHARED_EXPERT
if (!routed) {
  gate_weight = shared_gate_weight;
  gate_scales = shared_gate_scales;
  gate_biases = shared_gate_biases;
  up_weight = shared_up_weight;
  up_scales = shared_up_scales;
  up_biases = shared_up_biases;
}
#endif

float products[2 * ROWS];
#pragma unroll
for (int i = 0; i < 2 * ROWS; i++) {
  products[i] = 0.0f;
}
for (int chunk = thread_index_in_threadgroup; chunk < HIDDEN / CHUNK; chunk += THREADS) {
  float values[CHUNK];
  const float sum = load_chunk(input + chunk * CHUNK, values);
  add_products<GATE_BITS, GATE_GROUP, ROWS>(
      gate_weight, gate_scales, gate_biases, first, HIDDEN, chunk, values, sum, products);
  add_products<UP_BITS, UP_GROUP, ROWS>(
      up_weight, up_scales, up_biases, first, HIDDEN, chunk, values, sum, products + ROWS);
}

SHARED float partial[THREADS / 32][2 * ROWS];
const float total = team_sums<2 * ROWS, 32>(products, lane);
if (lane < 2 * ROWS) {
  partial[simdgroup_index_in_threadgroup][sum_index<2 * ROWS>(lane)] = total;
}
wait_for_threadgroup();
const int mine = thread_index_in_threadgroup;
if (mine < ROWS) {
  float gate = 0.0f, up = 0.0f;
#pragma unroll
  for (int i = 0; i < THREADS / 32; i++) {
    gate += partial[i][mine];
    up += partial[i][mine + ROWS];
  }
  hidden[(long)choice * INTERMEDIATE + first + mine] = silu(gate) * up;
}
