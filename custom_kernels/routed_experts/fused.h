// Routed experts in one dispatch, on tensor cores (tensor_stream.h).
//
// The work is divided into SHARES: each has some of the units of gate and up, whose 16 rows (8 of each) give 8 values of
// `hidden`, and some of the units of down, whose 16 rows, over all choices of a token, give 16 of y. Threadgroups draw
// shares from a counter. Once none is left, a threadgroup waits for the hidden values of all, while the weights of down
// that it needs are on their way. What it waits for was drawn by threadgroups that are running and wait for nothing
// before it is done; so none waits for ever, however few of them run at once.
//
// Weights pass through SLOTS of shared memory: a unit of gate and up fills one, a unit of down one for every
// EXPERTS_A_PART choices. Simdgroups take turns at asking for them.
//
// `turns`: three counters 128 bytes apart: shares drawn, shares whose hidden values are there, threadgroups that left.
// The last one to leave sets them to zero again.
// Grid: x = SHARES; SIMDGROUPS simdgroups share the columns.

constexpr int UP_ROW = HIDDEN * BITS / 8, UP_SCALES_ROW = HIDDEN / GROUP * 2;
constexpr int DOWN_ROW = INTERMEDIATE * BITS / 8, DOWN_SCALES_ROW = INTERMEDIATE / GROUP * 2;
constexpr int UP_CHUNKS = HIDDEN / CHUNK, EXPERT_CHUNKS = INTERMEDIATE / CHUNK, DOWN_CHUNKS = CHOICES * EXPERT_CHUNKS;
constexpr int UP_UNITS = TOKENS * CHOICES * (INTERMEDIATE / 8), DOWN_UNITS = TOKENS * (HIDDEN / 16);
constexpr int PARTS = (CHOICES + EXPERTS_A_PART - 1) / EXPERTS_A_PART;
constexpr int ROUTED = CHOICES - WITH_SHARED_EXPERT;
constexpr int COPIES = 4;  // of hidden values, or all threadgroups would read the same few lines of cache at once

DYNAMIC_SHARED(memory);
uchar* slots = (uchar*)memory;
uchar* vectors = slots + SLOTS * SLOT_BYTES;  // of the tokens of a share: x, later hidden values; staged
float* partial = (float*)(vectors + VECTOR_BYTES);
unsigned long long* full = (unsigned long long*)(partial + PARTIALS);
unsigned long long* empty = full + SLOTS;
int* row_of = (int*)(empty + SLOTS);
float* share_of = (float*)(row_of + TOKENS * CHOICES);
unsigned short* held = (unsigned short*)(share_of + TOKENS * CHOICES);  // shares drawn, the last number drawn

const int lane = thread_index_in_simdgroup, simdgroup = simdgroup_index_in_threadgroup;
const int mine = thread_index_in_threadgroup, threads = 32 * SIMDGROUPS;
uint* counters = const_cast<uint*>(turns);
if (mine == 0) {
  held[0] = (unsigned short)atomicAdd(counters, 1u);
}
for (int i = mine - 32; i >= 0 && i < TOKENS * CHOICES; i += threads - 32) {
  row_of[i] = i % CHOICES < ROUTED ? rows[i / CHOICES * ROUTED + i % CHOICES] : 0;
  share_of[i] = shares[i];
}
if (mine == threads - 1) {
  for (int i = 0; i < SLOTS; i++) {
    barrier_init(full + i, 1);
    barrier_init(empty + i, SIMDGROUPS);
  }
  barriers_are_ready();
}
Stream<BITS, GROUP> weights;
weights.begin(lane);
__syncthreads();

int share = held[0], count = 0, index = 0;  // of shares held
bool down = false;
bool fresh = true;  // nothing of this share was asked for
int first_up, first_down, up_units, down_units;
int slot_number = 0;  // filled slots are numbered throughout
int begun = 0, end = 0;  // numbers of this share: of its first slot, and behind its last
int ups = 0;             // slots of gate and up among them, before those of down

// Have slot number `number` filled.
auto ask = [&](int number) {
  const int slot = number % SLOTS;
  if (number >= SLOTS) {
    barrier_wait(empty + slot, (number / SLOTS - 1) & 1);
  }
  // Each lane asks for one piece: codes, scales or biases of a matrix.
  const int matrix = lane / 3, what = lane % 3;
  uchar* to = slots + slot * SLOT_BYTES;
  const uchar* from = slab;
  uint bytes = 0;
  int step = number - begun;
  if (step < ups) {
    const int unit = first_up + step, choice = unit / (INTERMEDIATE / 8), row = unit % (INTERMEDIATE / 8) * 8;
    if (matrix < 2 && row_of[choice] >= 0) {
      from += (long)row_of[choice] * RECORD_BYTES;
      from += matrix == 0 ? (what == 0 ? GATE_WEIGHT : what == 1 ? GATE_SCALES : GATE_BIASES)
                          : (what == 0 ? UP_WEIGHT : what == 1 ? UP_SCALES : UP_BIASES);
#if WITH_SHARED_EXPERT
      if (choice % CHOICES == ROUTED) {
        const uchar* gate = what == 0   ? (const uchar*)shared_gate_weight
                            : what == 1 ? (const uchar*)shared_gate_scales
                                        : (const uchar*)shared_gate_biases;
        const uchar* up = what == 0   ? (const uchar*)shared_up_weight
                          : what == 1 ? (const uchar*)shared_up_scales
                                      : (const uchar*)shared_up_biases;
        from = matrix == 0 ? gate : up;
      }
#endif
      const int row_bytes = what == 0 ? UP_ROW : UP_SCALES_ROW;
      from += (long)row * row_bytes;
      bytes = 8 * row_bytes;
      to += matrix * bytes + (what == 0 ? 0 : 16 * UP_ROW + (what - 1) * 16 * UP_SCALES_ROW);
    }
  } else {
    step -= ups;
    const int unit = first_down + step % down_units, token = unit / (HIDDEN / 16), row = unit % (HIDDEN / 16) * 16;
    const int choice = step / down_units * EXPERTS_A_PART + matrix;
    const int record = matrix < EXPERTS_A_PART && choice < CHOICES ? row_of[token * CHOICES + choice] : -1;
    if (record >= 0) {
      from += (long)record * RECORD_BYTES + (what == 0 ? DOWN_WEIGHT : what == 1 ? DOWN_SCALES : DOWN_BIASES);
#if WITH_SHARED_EXPERT
      if (choice == ROUTED) {
        from = what == 0   ? (const uchar*)shared_down_weight
               : what == 1 ? (const uchar*)shared_down_scales
                           : (const uchar*)shared_down_biases;
      }
#endif
      const int row_bytes = what == 0 ? DOWN_ROW : DOWN_SCALES_ROW;
      from += (long)row * row_bytes;
      bytes = 16 * row_bytes;
      to += matrix * bytes + EXPERTS_A_PART * (what == 0 ? 0 : 16 * DOWN_ROW + (what - 1) * 16 * DOWN_SCALES_ROW);
    }
  }
  const uint all = __reduce_add_sync(0xffffffffu, bytes);
  if (lane == 0) {
    barrier_expect(full + slot, all);
  }
  __syncwarp();
  if (bytes) {
    bring(to, from, bytes, full + slot);
  }
};

// The vectors of tokens `first` to `last`.
auto stage_vectors = [&](const uint4* from, int width, int first, int last) {
  for (int token = first; token <= last; token++) {
    for (int i = mine; i < width / 8; i += threads) {
      stage<BITS, GROUP>(__ldcg(from + token * (width / 8) + i), i, width,
                         vectors + (token - first) * staged_bytes(width, GROUP));
    }
  }
};

while (share < SHARES || count > 0) {
  uint drawn = 0;
  if (fresh) {
    first_up = (long)share * UP_UNITS / SHARES, up_units = int((long)(share + 1) * UP_UNITS / SHARES) - first_up;
    first_down = (long)share * DOWN_UNITS / SHARES;
    down_units = int((long)(share + 1) * DOWN_UNITS / SHARES) - first_down;
  }
  constexpr int up_of_token = CHOICES * (INTERMEDIATE / 8), down_of_token = HIDDEN / 16;
  const int first_token = down ? first_down / down_of_token : first_up / up_of_token;
  const int last_token = down ? (first_down + down_units - 1) / down_of_token : (first_up + up_units - 1) / up_of_token;
  if (!down) {
    // Before weights are asked for: these few bytes would wait behind all of theirs.
    stage_vectors((const uint4*)x, HIDDEN, first_token, last_token);
    if (mine == 0) {
      drawn = atomicAdd(counters, 1u);
    }
    __syncthreads();
  }
  if (fresh) {
    fresh = false;
    begun = slot_number;
    ups = down ? 0 : up_units;
    end = begun + ups + down_units * PARTS;
    for (int number = begun; number < min(begun + SLOTS, end); number++) {
      if (number % SIMDGROUPS == simdgroup) {
        ask(number);
      }
    }
  }
  if (down) {
    stage_vectors((const uint4*)hidden + (long)(share % COPIES) * TOKENS * (CHOICES * INTERMEDIATE / 8),
                  CHOICES * INTERMEDIATE, first_token, last_token);
    __syncthreads();
  }

  const int chunks_of_all = down ? DOWN_CHUNKS : UP_CHUNKS;
  const int width = down ? CHOICES * INTERMEDIATE : HIDDEN;
  int taken = -1;  // the chunk of the vectors that registers hold
  int dealt = 0;   // chunks, to simdgroups in turn
  const int steps = down ? down_units * PARTS : up_units;
  for (int step = 0; step < steps; step++, slot_number++) {
    const int slot = slot_number % SLOTS;
    const int tile = down ? step % down_units : step, part = down ? step / down_units : 0;
    const int unit = (down ? first_down : first_up) + tile;
    const int token = down ? unit / (HIDDEN / 16) : unit / (CHOICES * (INTERMEDIATE / 8));
    const int from = part * EXPERTS_A_PART * EXPERT_CHUNKS;
    const int chunks = down ? min(DOWN_CHUNKS - from, EXPERTS_A_PART * EXPERT_CHUNKS) : UP_CHUNKS;
    const uchar* codes = slots + slot * SLOT_BYTES;
    bool waited = false;
    for (int i = (simdgroup - dealt) & (SIMDGROUPS - 1); i < chunks; i += SIMDGROUPS) {
      const int chunk = from + i, wanted = (token - first_token) * chunks_of_all + chunk;
      if (wanted != taken) {
        taken = wanted;
        weights.take(vectors + (token - first_token) * staged_bytes(width, GROUP), width, chunk);
      }
      if (!waited) {
        waited = true;
        barrier_wait(full + slot, slot_number / SLOTS & 1);
      }
      const int choice = down ? token * CHOICES + chunk / EXPERT_CHUNKS : unit / (INTERMEDIATE / 8);
      float* products = partial + 16 * (tile * chunks_of_all + chunk);
      if (row_of[choice] >= 0) {
        const int matrix = down ? i / EXPERT_CHUNKS : 0, within = down ? i % EXPERT_CHUNKS : i;
        const int row_bytes = down ? DOWN_ROW : UP_ROW, scale_bytes = down ? DOWN_SCALES_ROW : UP_SCALES_ROW;
        const uchar* scales = codes + (down ? EXPERTS_A_PART * 16 * DOWN_ROW : 16 * UP_ROW) +
                              matrix * 16 * scale_bytes + within * weights.SCALES;
        weights.multiply_chunk(codes + matrix * 16 * row_bytes + within * weights.CODES, row_bytes, scales,
                               scales + (down ? EXPERTS_A_PART * 16 * DOWN_SCALES_ROW : 16 * UP_SCALES_ROW),
                               scale_bytes, down ? share_of[choice] : 1.0f, products);
      } else if (lane < 16) {
        products[lane] = 0.0f;
      }
    }
    dealt = (dealt + chunks) & (SIMDGROUPS - 1);
    if (!waited) {  // or this simdgroup could let go of the slot twice before others have once
      barrier_wait(full + slot, slot_number / SLOTS & 1);
    }
    __syncwarp();
    if (lane == 0) {
      barrier_arrive(empty + slot);
    }
    const int next = slot_number + SLOTS;
    if (next < end && next % SIMDGROUPS == simdgroup) {
      ask(next);
    }
  }
  if (!down) {
    if (mine == 0) {
      held[count] = (unsigned short)share;
      held[count + 1] = (unsigned short)drawn;
    }
    __syncthreads();
    for (int i = mine; i < COPIES * 8 * up_units; i += threads) {
      const int value = i / COPIES;
      float gate = 0.0f, up = 0.0f;
#pragma unroll
      for (int chunk = 0; chunk < UP_CHUNKS; chunk++) {
        gate += partial[16 * (value / 8 * UP_CHUNKS + chunk) + value % 8];
        up += partial[16 * (value / 8 * UP_CHUNKS + chunk) + value % 8 + 8];
      }
      hidden[(long)(i % COPIES) * TOKENS * CHOICES * INTERMEDIATE + first_up * 8 + value] = T(silu(gate) * up);
    }
    count++;
    share = held[count];
    __syncthreads();
    if (mine == 0) {
      __threadfence();
      atomicAdd(counters + 32, 1u);
    }
    const bool more = share < SHARES;  // a share that no other threadgroup has begun
    if (more || count > 1) {           // what was asked for is not what comes next
      for (end = min(end, slot_number + SLOTS); slot_number < end; slot_number++) {
        barrier_wait(full + slot_number % SLOTS, slot_number / SLOTS & 1);
        __syncwarp();
        if (lane == 0) {
          barrier_arrive(empty + slot_number % SLOTS);
        }
      }
      fresh = true;
    }
    if (more) {
      continue;
    }
    down = true;
    share = held[0];
    if (lane == 0) {
      wait_for_counter(counters + 32, SHARES);
    }
    __syncwarp();
  } else {
    __syncthreads();
    for (int i = mine; i < 16 * down_units; i += threads) {
      float sum = 0.0f;
#pragma unroll
      for (int chunk = 0; chunk < DOWN_CHUNKS; chunk++) {
        sum += partial[16 * (i / 16 * DOWN_CHUNKS + chunk) + i % 16];
      }
      y[(long)first_down * 16 + i] = T(sum);
    }
    if (++index == count) {
      break;
    }
    share = held[index];
    fresh = true;
    __syncthreads();
  }
}
if (mine == 0 && atomicAdd(counters + 64, 1u) == gridDim.x - 1) {
  counters[0] = counters[32] = counters[64] = 0;
}
