// One token on NVIDIA's tensor cores: norm and rotary embedding of its queries, storage of its key and value in the
// cache, and attention over a span of the cache, for all query heads of a kv head at once (up to 16 rows of a product;
// missing rows are 0).
// Grid: x = spans of the cache's capacity, so that it does not depend on the position; y = kv heads; z = sequences;
// SIMDGROUPS simdgroups. The keys of a span depend on the position alone, as in decode.h.
//
// Keys and values arrive in tiles of KEYS, which are copied into shared memory while the previous STAGES - 1 tiles are
// processed. The copies begin before the queries are ready, so in a long context preparing queries costs no time; its
// inputs are loaded first, because they would wait behind the tiles. Tiles are processed from last to first, so the
// token's own key, which no copy provides, is in the first processed tile. A simdgroup computes the scores of 8 of a
// tile's keys over 1 / PARTS of the dimensions and shares them; then all simdgroups compute the same softmax, and each
// sums its own dimensions of the values.

constexpr int GROUP = HEADS / KV_HEADS;
constexpr int THREADS = 32 * SIMDGROUPS;
constexpr int CHUNKS = DIM / 8;                             // in a row
constexpr int TILE = KEYS * CHUNKS;                         // chunks in a tile of keys or values
constexpr int PARTS = SIMDGROUPS / (KEYS / 8);              // of the dimensions in scores
constexpr int STEPS = DIM / PARTS / 16;                     // products for 8 keys over one part of the dimensions
constexpr int PITCH = KEYS + 8;                             // of rows of scores; 8 rows of pairs are in different banks
constexpr int OWN = DIM / SIMDGROUPS;                       // dimensions of the values in a simdgroup
constexpr int PIECES = DIM / 32;                            // of 32 dimensions of a head, two for each of 16 lanes
constexpr int ROTATED = ROTARY / 64;                        // pieces whose rotary partners are as many pieces later
constexpr int ROUNDS = GROUP / (2 * SIMDGROUPS) + 1;        // over query heads and the new key, two rows per simdgroup

extern __shared__ uint4 stages[];
SHARED uint4 query_tile[16 * CHUNKS];
SHARED float scores[PARTS * 16 * PITCH];

const int part = threadgroup_position_in_grid.x, kv_head = threadgroup_position_in_grid.y;
const int mine = thread_index_in_threadgroup, lane = thread_index_in_simdgroup;
const int simdgroup = simdgroup_index_in_threadgroup;
const int sequence = threadgroup_position_in_grid.z, capacity = keys_shape[2];
const int length = position[sequence] + 1, spans = threadgroups_per_grid.x;
const int rounded = (length + GROWTH - 1) / GROWTH * GROWTH, room = rounded < capacity ? rounded : capacity;
const int room_tiles = (room + KEYS - 1) / KEYS, equal = (room_tiles + spans - 1) / spans;
const int wanted = (room_tiles + MOST_SPANS - 1) / MOST_SPANS, span = (equal > wanted ? equal : wanted) * KEYS;
const long first_head = (long)sequence * HEADS + (long)kv_head * GROUP;
const int begin = part * span;
const int end = begin + span < length ? begin + span : length;
if (begin >= length) {
  for (int i = mine; i < GROUP * DIM; i += THREADS) {
    partial[((first_head + i / DIM) * spans + part) * DIM + i % DIM] = 0.0f;
  }
  if (mine < GROUP) {
    *(float2*)(peaks + 2 * ((first_head + mine) * spans + part)) = make_float2(LOWEST, 0.0f);
  }
  return;
}
const int tiles = (end - begin + KEYS - 1) / KEYS;
const int last = begin + (tiles - 1) * KEYS;  // the first key of the last tile
const bool has_new = part == (length - 1) / span;
const int new_row = length - 1 - last;  // in the last tile
const long first_row = ((long)sequence * KV_HEADS + kv_head) * capacity;
const T* last_keys = keys + (first_row + last) * DIM;
const T* last_values = values + (first_row + last) * DIM;

const int two = lane % 16 * 2;  // the lane's dimensions in every piece
uint rows[ROUNDS][PIECES], norms[ROUNDS][PIECES];
float2 frequency[ROTATED], lost[ROTATED];
uint4 value_chunk = make_uint4(0, 0, 0, 0);
#pragma unroll
for (int round = 0; round < ROUNDS; round++) {
  const int first = 2 * (round * SIMDGROUPS + simdgroup), row = first + lane / 16;
  if (first < GROUP + has_new) {
    const T* from = row < GROUP ? q_and_gate + (first_head + row) * (1 + GATED) * DIM
                                : k + ((long)sequence * KV_HEADS + kv_head) * DIM;
    const T* norm = row < GROUP ? q_norm : k_norm;
#pragma unroll
    for (int piece = 0; piece < PIECES; piece++) {
      rows[round][piece] = *(const uint*)(from + piece * 32 + two);
      norms[round][piece] = *(const uint*)(norm + piece * 32 + two);
    }
    // Inside this block, because the compiler would move them past the copies.
    if (round == 0) {
#pragma unroll
      for (int piece = 0; piece < ROTATED; piece++) {
        frequency[piece] = *(const float2*)(frequencies + piece * 32 + two);
        lost[piece] = *(const float2*)(frequencies + ROTARY / 2 + piece * 32 + two);
      }
      if (has_new && mine < CHUNKS) {
        value_chunk = *(const uint4*)(v + ((long)sequence * KV_HEADS + kv_head) * DIM + mine * 8);
      }
    }
  }
}

begin_partial_tile<DIM, KEYS, THREADS>(stages, last_keys, mine, end - last, has_new ? new_row : -1);
begin_partial_tile<DIM, KEYS, THREADS>(stages + TILE, last_values, mine, end - last, has_new ? new_row : -1);
end_batch();
#pragma unroll
for (int number = 1; number < STAGES - 1; number++) {
  if (number < tiles) {
    begin_tile<DIM, KEYS, THREADS>(stages + number * (2 * TILE), last_keys - (long)number * KEYS * DIM, mine);
    begin_tile<DIM, KEYS, THREADS>(stages + number * (2 * TILE) + TILE, last_values - (long)number * KEYS * DIM, mine);
  }
  end_batch();
}

float2 cosines[ROTATED], sines[ROTATED];
#pragma unroll
for (int piece = 0; piece < ROTATED; piece++) {
  const float turned = float(length - 1);
  sincospif(2.0f * rotary_revolutions(turned, frequency[piece].x, lost[piece].x), &sines[piece].x, &cosines[piece].x);
  sincospif(2.0f * rotary_revolutions(turned, frequency[piece].y, lost[piece].y), &sines[piece].y, &cosines[piece].y);
}
#pragma unroll
for (int round = 0; round < ROUNDS; round++) {
  const int first = 2 * (round * SIMDGROUPS + simdgroup), row = first + lane / 16;
  if (first < GROUP + has_new) {
    float2 x[PIECES];
    float square = 0.0f;
#pragma unroll
    for (int piece = 0; piece < PIECES; piece++) {
      x[piece] = halves_of(rows[round][piece]);
      square += x[piece].x * x[piece].x + x[piece].y * x[piece].y;
    }
#pragma unroll
    for (int mask = 1; mask < 16; mask *= 2) {
      square += simd_shuffle_xor(square, mask);
    }
    const float scale = rsqrtf(square / float(DIM) + as_type<float>(EPS));
#pragma unroll
    for (int piece = 0; piece < PIECES; piece++) {
      const float2 norm = halves_of(norms[round][piece]);
      x[piece].x *= scale * norm.x;
      x[piece].y *= scale * norm.y;
    }
#pragma unroll
    for (int piece = 0; piece < ROTATED; piece++) {
      const float2 low = x[piece], high = x[piece + ROTATED];
      x[piece].x = low.x * cosines[piece].x - high.x * sines[piece].x;
      x[piece].y = low.y * cosines[piece].y - high.y * sines[piece].y;
      x[piece + ROTATED].x = high.x * cosines[piece].x + low.x * sines[piece].x;
      x[piece + ROTATED].y = high.y * cosines[piece].y + low.y * sines[piece].y;
    }
    if (row < GROUP + has_new) {
      uint4* tile = row < GROUP ? query_tile : stages;
      const int tile_row = row < GROUP ? row : new_row;
#pragma unroll
      for (int piece = 0; piece < PIECES; piece++) {
        const uint pair = pair_of(x[piece].x, x[piece].y);
        ((uint*)(tile + chunk_of<DIM>(tile_row, piece * 4 + two / 8)))[two % 8 / 2] = pair;
        if (row == GROUP) {
          *(uint*)((T*)last_keys + new_row * DIM + piece * 32 + two) = pair;
        }
      }
    }
  }
}
for (int i = GROUP * CHUNKS + mine; i < 16 * CHUNKS; i += THREADS) {
  query_tile[i] = make_uint4(0, 0, 0, 0);
}
if (has_new && mine < CHUNKS) {
  stages[TILE + chunk_of<DIM>(new_row, mine)] = value_chunk;
  *(uint4*)((T*)last_values + new_row * DIM + mine * 8) = value_chunk;
}
wait_for_batches<STAGES - 2>();
wait_for_threadgroup();

// The scores of a simdgroup: 8 keys from 8 * (simdgroup / PARTS), over one part of the dimensions.
const int score_part = simdgroup % PARTS, score_keys = simdgroup / PARTS * 8;
const int g = lane / 4, c = lane % 4;  // an accumulator holds rows g and g + 8, columns 2 c and 2 c + 1
uint q[STEPS][4];
#pragma unroll
for (int step = 0; step < STEPS; step++) {
  load_tiles(q[step], query_tile + chunk_of<DIM>(lane % 16, (score_part * STEPS + step) * 2 + lane / 16));
}

const float unit = 1.4426950408889634f * rsqrtf(float(DIM));  // of scores, so that the softmax uses powers of two
float sums[OWN / 8][4];
#pragma unroll
for (int i = 0; i < OWN / 8; i++) {
  sums[i][0] = sums[i][1] = sums[i][2] = sums[i][3] = 0.0f;
}
float largest[2] = {LOWEST, LOWEST}, total[2] = {0.0f, 0.0f};

for (int number = 0; number < tiles; number++) {
  if (number + STAGES - 1 < tiles) {
    const long before = (long)(number + STAGES - 1) * KEYS * DIM;
    uint4* free_stage = stages + (number + STAGES - 1) % STAGES * (2 * TILE);
    begin_tile<DIM, KEYS, THREADS>(free_stage, last_keys - before, mine);
    begin_tile<DIM, KEYS, THREADS>(free_stage + TILE, last_values - before, mine);
  }
  end_batch();
  const uint4* key_tile = stages + number % STAGES * (2 * TILE);
  const uint4* value_tile = key_tile + TILE;

  float even[4] = {0.0f, 0.0f, 0.0f, 0.0f}, odd[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
  for (int step = 0; step < STEPS; step += 2) {
    uint b[4];
    load_tiles(b, key_tile + chunk_of<DIM>(score_keys + lane % 8, (score_part * STEPS + step) * 2 + lane / 8));
    multiply(even, q[step], b);
    multiply(odd, q[step + 1], b + 2);
  }
  float* own_scores = scores + (score_part * 16 + g) * PITCH + score_keys + 2 * c;
  *(float2*)own_scores = make_float2(even[0] + odd[0], even[1] + odd[1]);
  *(float2*)(own_scores + 8 * PITCH) = make_float2(even[2] + odd[2], even[3] + odd[3]);
  wait_for_threadgroup();

  // Scores of rows g and g + 8 in the order of the product with the values: keys 2 c + {0, 1, 8, 9} of every 16.
  float weights[2][KEYS / 4];
#pragma unroll
  for (int low = 0; low < 2; low++) {
#pragma unroll
    for (int i = 0; i < KEYS / 8; i++) {
      float2 score = make_float2(0.0f, 0.0f);
#pragma unroll
      for (int p = 0; p < PARTS; p++) {
        const float2 one = *(const float2*)(scores + (p * 16 + low * 8 + g) * PITCH + i * 8 + 2 * c);
        score.x += one.x;
        score.y += one.y;
      }
      weights[low][2 * i] = score.x;
      weights[low][2 * i + 1] = score.y;
    }
  }
  if (number == 0) {
#pragma unroll
    for (int i = 0; i < KEYS / 4; i++) {
      const bool seen = i / 2 * 8 + 2 * c + i % 2 < end - last;
      weights[0][i] = seen ? weights[0][i] : LOWEST;
      weights[1][i] = seen ? weights[1][i] : LOWEST;
    }
  }
#pragma unroll
  for (int low = 0; low < 2; low++) {
    float higher = largest[low];
#pragma unroll
    for (int i = 0; i < KEYS / 4; i++) {
      higher = fmaxf(higher, weights[low][i]);
    }
    higher = fmaxf(higher, simd_shuffle_xor(higher, 1));
    higher = fmaxf(higher, simd_shuffle_xor(higher, 2));
    const float kept = power_of_two((largest[low] - higher) * unit);
    largest[low] = higher;
    total[low] *= kept;
#pragma unroll
    for (int i = 0; i < KEYS / 4; i++) {
      weights[low][i] = power_of_two((weights[low][i] - higher) * unit);
      total[low] += weights[low][i];
    }
#pragma unroll
    for (int i = 0; i < OWN / 8; i++) {
      sums[i][2 * low] *= kept;
      sums[i][2 * low + 1] *= kept;
    }
  }
#pragma unroll
  for (int step = 0; step < KEYS / 16; step++) {
    uint a[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int at = 4 * step + i / 2 * 2;
      a[i] = pair_of(weights[i % 2][at], weights[i % 2][at + 1]);
    }
#pragma unroll
    for (int i = 0; i < OWN / 16; i++) {
      uint b[4];
      load_transposed(b, value_tile + chunk_of<DIM>(step * 16 + lane % 16, simdgroup * (OWN / 8) + 2 * i + lane / 16));
      multiply(sums[2 * i], a, b);
      multiply(sums[2 * i + 1], a, b + 2);
    }
  }
  wait_for_batches<STAGES - 2>();
  wait_for_threadgroup();  // the next tile has arrived, and all threads have read this one
}

#pragma unroll
for (int low = 0; low < 2; low++) {
  const int row = low * 8 + g;
  float sum = total[low];
  sum += simd_shuffle_xor(sum, 1);
  sum += simd_shuffle_xor(sum, 2);
  if (row < GROUP) {
    const long at = (first_head + row) * spans + part;
#pragma unroll
    for (int i = 0; i < OWN / 8; i++) {
      *(float2*)(partial + at * DIM + simdgroup * OWN + i * 8 + 2 * c) =
          make_float2(sums[i][2 * low], sums[i][2 * low + 1]);
    }
    if (simdgroup == 0 && c == 0) {
      *(float2*)(peaks + 2 * at) = make_float2(largest[low] * rsqrtf(float(DIM)), sum);
    }
  }
}
