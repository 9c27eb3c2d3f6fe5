// Weighted sums of rows, one value per thread. Grid: x = values / THREADS, rounded up.

const long at = long(threadgroup_position_in_grid.x) * THREADS + long(thread_index_in_threadgroup);
if (at < long(y_shape[0]) * WIDTH) {
  const long first = at / WIDTH * CHOICES;
  float sum = 0;
#pragma unroll
  for (int k = 0; k < CHOICES; k++) {
    const int place = places[first + k];
    if (place >= 0) {
      sum += weights[first + k] * float(rows[long(place) * WIDTH + at % WIDTH]);
    }
  }
  sums[at] = y[at] + sum;
}
