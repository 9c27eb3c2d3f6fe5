// The dense matrices of some experts, eight weights per thread.
// Grid: x = SIZE / 8 / THREADS, rounded up, of one matrix; y = experts; z = gate, up, down.

const int eight = int(threadgroup_position_in_grid.x) * THREADS + int(thread_index_in_threadgroup);
const int expert = threadgroup_position_in_grid.y;
const int projection = threadgroup_position_in_grid.z;
if (eight < SIZE / 8) {
  const device uchar* record = slab + (long)rows[expert] * RECORD_BYTES;
  const int weight_at = projection == 0 ? GATE_WEIGHT : projection == 1 ? UP_WEIGHT : DOWN_WEIGHT;
  const int scales_at = projection == 0 ? GATE_SCALES : projection == 1 ? UP_SCALES : DOWN_SCALES;
  const int biases_at = projection == 0 ? GATE_BIASES : projection == 1 ? UP_BIASES : DOWN_BIASES;
  const int BITS = projection == 0 ? GATE_BITS : projection == 1 ? UP_BITS : DOWN_BITS;
  const int group = eight / ((projection == 0 ? GATE_GROUP : projection == 1 ? UP_GROUP : DOWN_GROUP) / 8);
  // Rows are whole groups, so groups are numbered across the rows of a matrix.
  const float scale = projection == 0   ? float(((const device GATE_S*)(record + scales_at))[group])
                      : projection == 1 ? float(((const device UP_S*)(record + scales_at))[group])
                                        : float(((const device DOWN_S*)(record + scales_at))[group]);
  const float bias = projection == 0   ? float(((const device GATE_S*)(record + biases_at))[group])
                     : projection == 1 ? float(((const device UP_S*)(record + biases_at))[group])
                                       : float(((const device DOWN_S*)(record + biases_at))[group]);
  const device uchar* codes = record + weight_at + (long)eight * BITS;
  uint low = 0, high = 0;  // the first and the last four codes
  if (BITS == 8) {
    const uint2 two = load_once((const device uint2*)codes);
    low = two.x;
    high = two.y;
  } else if (BITS == 4) {
    low = load_once((const device uint*)codes);
    high = low >> 16;
  } else {
#pragma unroll
    for (int i = 0; i < BITS; i++) {
      low |= uint(codes[i]) << (8 * i);
    }
    high = low >> (4 * BITS);
  }
  float values[8];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    values[i] = scale * float((low >> (i * BITS)) & ((1u << BITS) - 1u)) + bias;
    values[i + 4] = scale * float((high >> (i * BITS)) & ((1u << BITS) - 1u)) + bias;
  }
  device T* matrix = projection == 0 ? gate : projection == 1 ? up : down;
  store_eight(matrix + (long)expert * SIZE + (long)eight * 8, values);
}
