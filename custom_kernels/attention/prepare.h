// Norm and rotary embedding of one head of one token per simdgroup; keys and values are written to the cache in place.
// The tokens follow each other in one sequence, or each belongs to another sequence, if the cache holds several.
// Grid: x = query heads, then key heads, then value heads; y = tokens.

const int index = threadgroup_position_in_grid.x, token = threadgroup_position_in_grid.y;
const int lane = thread_index_in_simdgroup;
const int tokens = q_and_gate_shape[0], capacity = keys_shape[2];
const int sequence = keys_shape[0] > 1 ? token : 0;
const int place = position[sequence] + token - sequence;
const bool is_query = index < HEADS;
const bool is_key = !is_query && index < HEADS + KV_HEADS;
const int head = is_query ? index : (index - HEADS) % KV_HEADS;
const device T* from = is_query ? q_and_gate + ((long)token * HEADS + head) * (1 + GATED) * DIM
                     : is_key   ? k + ((long)token * KV_HEADS + head) * DIM
                                : v + ((long)token * KV_HEADS + head) * DIM;
const long cached = (((long)sequence * KV_HEADS + head) * capacity + place) * ROW;

SHARED float row[DIM];
if (!is_query && !is_key) {
  for (int c = lane; c < DIM; c += 32) {
    row[c] = float(from[c]);
  }
  wait_for_threadgroup();
  store_row<DIM, GROUP, BITS>(row, lane, (device KV*)values + cached);
  return;
}

float square = 0.0f;
for (int c = lane; c < DIM; c += 32) {
  const float value = float(from[c]);
  square += value * value;
}
const float scale = reciprocal_root(simd_sum(square) / float(DIM) + as_type<float>(EPS));
for (int c = lane; c < DIM; c += 32) {
  row[c] = float(from[c]) * scale * float(is_query ? q_norm[c] : k_norm[c]);
}
wait_for_threadgroup();

const int pairs = ROTARY / 2;
float placed[(DIM + 31) / 32];
for (int c = lane; c < DIM; c += 32) {
  float value = row[c];
  if (c < ROTARY) {
    const int pair = c % pairs;
    const float revolutions = rotary_revolutions(float(place), frequencies[pair], frequencies[pairs + pair]);
    const float angle = 6.283185307179586f * revolutions;
    const float partner = c < pairs ? -row[c + pairs] : row[c - pairs];
    value = value * cosine(angle) + partner * sine(angle);
  }
  placed[c / 32] = value;
}
wait_for_threadgroup();
for (int c = lane; c < DIM; c += 32) {
  row[c] = placed[c / 32];
}
wait_for_threadgroup();
if (is_query) {
  store_row<DIM, GROUP, 0>(row, lane, queries + ((long)head * tokens + token) * DIM);
} else {
  store_row<DIM, GROUP, BITS>(row, lane, (device KV*)keys + cached);
}
