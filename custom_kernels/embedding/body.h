// Rows of a quantized matrix, one value per thread. Grid: x = values / THREADS, rounded up.

const long at = long(threadgroup_position_in_grid.x) * THREADS + long(thread_index_in_threadgroup);
if (at < long(indices_shape[0]) * COLUMNS) {
  const int column = int(at % COLUMNS);
  const long row = long(indices[at / COLUMNS]);
  const long word = row * (COLUMNS * BITS / 32) + column * BITS / 32;
  const uint shift = uint(column * BITS) % 32u;
  uint code = weight[word] >> shift;
  if (shift + BITS > 32u) {  // the rest of the code is in the next word
    code |= weight[word + 1] << (32u - shift);
  }
  code &= (1u << BITS) - 1u;
  const long group = row * (COLUMNS / GROUP) + column / GROUP;
  y[at] = T(float(scales[group]) * float(code) + float(biases[group]));
}
