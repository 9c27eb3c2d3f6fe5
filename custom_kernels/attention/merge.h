// What the spans of the cache gave, put together, times the output gate. Grid: x = query heads; DIM threads.

const int head = threadgroup_position_in_grid.x;
const int mine = thread_index_in_threadgroup;
const int spans = place[3];

float higher = LOWEST;
for (int i = 0; i < spans; i++) {
  const float peak = peaks[2 * ((long)head * spans + i)];
  higher = peak > higher ? peak : higher;
}
float total = 0.0f, sum = 0.0f;
for (int i = 0; i < spans; i++) {
  const long at = (long)head * spans + i;
  const float kept = exponential(peaks[2 * at] - higher);
  total += peaks[2 * at + 1] * kept;
  sum += partial[at * DIM + mine] * kept;
}
const float gate = float(q_and_gate[((long)head * 2 + 1) * DIM + mine]);
y[head * DIM + mine] = T(sum / total / (1.0f + exponential(-gate)));
