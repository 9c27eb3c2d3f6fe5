// Rows of a matrix, 16 bytes per thread. Grid: x = words of 16 bytes / THREADS, rounded up.

const long at = long(threadgroup_position_in_grid.x) * THREADS + long(thread_index_in_threadgroup);
if (at < long(indices_shape[0]) * WORDS) {
  ((device uint4*)y)[at] = ((const device uint4*)x)[long(indices[at / WORDS]) * WORDS + at % WORDS];
}
