// body.h for one vector on tensor cores, with weights from the copy engine (tensor_stream.h). Weights pass through
// SLOTS of shared memory, BATCH times 16 rows at a time. Grid: x = any number of threadgroups, which divide the rows;
// SIMDGROUPS simdgroups share the columns. The vector is normalized as in body.h.

constexpr int CHUNKS = COLUMNS / CHUNK, ROWS = 16 * BATCH, STEPS = (OUTPUTS + ROWS - 1) / ROWS;
constexpr int ROW_BYTES = COLUMNS * BITS / 8, SCALE_BYTES = COLUMNS / GROUP * 2;
constexpr int SLOT_BYTES = ROWS * (ROW_BYTES + 2 * SCALE_BYTES);

DYNAMIC_SHARED(memory);
uchar* slots = (uchar*)memory;
uchar* vector = slots + SLOTS * SLOT_BYTES;
float* partial = (float*)(vector + staged_bytes(COLUMNS, GROUP));  // for two steps
unsigned long long* full = (unsigned long long*)(partial + 2 * ROWS * CHUNKS);
const int lane = thread_index_in_simdgroup, simdgroup = simdgroup_index_in_threadgroup;
const int mine = thread_index_in_threadgroup;
const int first = (long)threadgroup_position_in_grid.x * STEPS / gridDim.x;
const int steps = int((long)(threadgroup_position_in_grid.x + 1) * STEPS / gridDim.x) - first;

auto ask = [&](int step) {
  const long row = (long)(first + step) * ROWS;
  const int rows = min(ROWS, int(OUTPUTS - row));
  uchar* to = slots + step % SLOTS * SLOT_BYTES;
  unsigned long long* barrier = full + step % SLOTS;
  barrier_expect(barrier, rows * (ROW_BYTES + 2 * SCALE_BYTES));
  bring(to, (const uchar*)weight + row * ROW_BYTES, rows * ROW_BYTES, barrier);
  bring(to + ROWS * ROW_BYTES, (const uchar*)scales + row * SCALE_BYTES, rows * SCALE_BYTES, barrier);
  bring(to + ROWS * (ROW_BYTES + SCALE_BYTES), (const uchar*)biases + row * SCALE_BYTES, rows * SCALE_BYTES, barrier);
};

// Before weights are requested: these few bytes would wait behind them.
#if WITH_NORM
SHARED float squares[SIMDGROUPS];
float square = 0.0f;
#endif
for (int i = mine; i < COLUMNS / 8; i += 32 * SIMDGROUPS) {
  float values[8];
  eight_floats(__ldcg((const uint4*)x + i), values);
#if WITH_NORM
  float factors[8];
  eight_floats(((const uint4*)norm)[i], factors);
#pragma unroll
  for (int j = 0; j < 8; j++) {
    square += values[j] * values[j];
    values[j] *= factors[j];
  }
#endif
  stage<BITS, GROUP>(values, i, COLUMNS, vector);
}
#if WITH_NORM
square = simd_sum(square);
if (lane == 0) {
  squares[simdgroup] = square;
}
#endif
if (mine == 0) {
  for (int i = 0; i < SLOTS; i++) {
    barrier_init(full + i, 1);
  }
  barriers_are_ready();
  for (int step = 0; step < min(SLOTS, steps); step++) {
    ask(step);
  }
}
Stream<BITS, GROUP> weights;
weights.begin(lane);
weights.lay_out(2 * ROW_BYTES, ROW_BYTES, 2 * SCALE_BYTES, SCALE_BYTES);
__syncthreads();
#if WITH_NORM
const float scale = root_mean_square_scale(squares, SIMDGROUPS, COLUMNS, as_type<float>(EPS));
for (int i = threadgroup_position_in_grid.x * 32 * SIMDGROUPS + mine; i < COLUMNS; i += gridDim.x * 32 * SIMDGROUPS) {
  normed[i] = T(float(x[i]) * scale * float(norm[i]));
}
#endif
int taken = -1;  // the chunk of x in registers
for (int step = 0; step < steps; step++) {
  const uchar* codes = slots + step % SLOTS * SLOT_BYTES;
  const int tiles = min(BATCH, OUTPUTS / 16 - (first + step) * BATCH);
  float* products = partial + step % 2 * ROWS * CHUNKS;
  for (int i = simdgroup; i < tiles * CHUNKS; i += SIMDGROUPS) {
    const int chunk = i % CHUNKS, row = i / CHUNKS * 16;
    if (chunk != taken) {
      taken = chunk;
      weights.take(vector, COLUMNS, chunk);
    }
    barrier_wait(full + step % SLOTS, step / SLOTS & 1);
    const uchar* own = codes + ROWS * ROW_BYTES + row * SCALE_BYTES + chunk * weights.SCALES;
    weights.multiply_chunk(codes + row * ROW_BYTES + chunk * weights.CODES, own, own + ROWS * SCALE_BYTES, 1.0f,
                           products + 16 * i);
  }
  __syncthreads();
  if (mine == 0 && step + SLOTS < steps) {
    ask(step + SLOTS);
  }
  const int row = mine - 32 * (SIMDGROUPS - (ROWS + 31) / 32);  // not in the simdgroup that requests weights
  if (row >= 0 && row < 16 * tiles) {
    float sum = 0.0f;
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; chunk++) {
      sum += products[16 * (row / 16 * CHUNKS + chunk) + row % 16];
    }
    const long place = (long)(first + step) * ROWS + row;
#if WITH_NORM
    sum *= scale;
#endif
#if WITH_RESIDUAL
    sum += float(residual[place]);
#endif
    y[place] = T(sum);
  }
}
