// Routed experts in one dispatch for one token, on tensor cores (tensor_stream.h).
//
// A unit of gate and up has 16 rows (8 of each) and gives 8 hidden values; threadgroups draw these units from a
// counter, in the order of experts. A unit of down has 16 rows and gives 16 values of y over all choices; these units
// are assigned to threadgroups, two at a time. Products with the first EXPERTS_A_PART experts come first, because their
// hidden values arrive first. A threadgroup waits for hidden values only after all units of gate and up have been
// drawn. Each of these was drawn by a running threadgroup, which completes it without waiting; so no threadgroup waits
// forever, however few run at once.
//
// Simdgroups have roles. One requests weights from the copy engine, which pass through SLOTS of shared memory; only as
// many copies are in flight as keep memory busy, because all other traffic on the chip waits behind them. WORKERS
// multiply, in teams with one worker per chunk of a row of gate; a slot belongs to one team. One simdgroup adds the
// results of a slot's workers, and sends hidden values to all threadgroups. STAGERS receive these as they arrive.
//
// `tickets` holds two words 128 bytes apart, the number of drawn units and the tag of the previous call; then COPIES
// times all hidden values, in words that carry the tag of their call and so differ from those of earlier calls. With
// one copy, all threadgroups would read the same cache lines at once.
// CHOOSES: every threadgroup chooses the experts from their scores, which takes less time than another dispatch.
//
// Grid: x = any number of threadgroups of WORKERS + 2 + STAGERS simdgroups.

constexpr int UP_ROW = HIDDEN * BITS / 8, UP_SCALES_ROW = HIDDEN / GROUP * 2;
constexpr int DOWN_ROW = INTERMEDIATE * BITS / 8, DOWN_SCALES_ROW = INTERMEDIATE / GROUP * 2;
constexpr int UP_BLOCK = 8 * UP_ROW + BLOCK_GAP, DOWN_BLOCK = 8 * DOWN_ROW + BLOCK_GAP;
constexpr int UP_CHUNKS = HIDDEN / CHUNK, EXPERT_CHUNKS = INTERMEDIATE / CHUNK, DOWN_CHUNKS = CHOICES * EXPERT_CHUNKS;
constexpr int UP_UNITS = CHOICES * (INTERMEDIATE / 8), DOWN_UNITS = HIDDEN / 16;
constexpr int PARTS = (CHOICES + EXPERTS_A_PART - 1) / EXPERTS_A_PART, PART_CHUNKS = EXPERTS_A_PART * EXPERT_CHUNKS;
constexpr int SLOT_CHUNKS = UP_CHUNKS > PART_CHUNKS ? UP_CHUNKS : PART_CHUNKS;
constexpr int ROUTED = CHOICES - WITH_SHARED_EXPERT;
constexpr int WORDS = CHOICES * INTERMEDIATE / 2;  // words of hidden values
constexpr int WORKERS = TEAM * TEAMS, ASKS = WORKERS, ADDS = WORKERS + 1, STAGES = WORKERS + 2;
constexpr int JOBS = INTERMEDIATE / 256;  // of a stager, per expert
constexpr int END = UP_UNITS + PARTS;     // steps are units of gate and up, then parts of units of down, then END

DYNAMIC_SHARED(memory);
uchar* slots = (uchar*)memory;
uchar* staged_x = slots + SLOTS * SLOT_BYTES;
uchar* staged_hidden = staged_x + staged_bytes(HIDDEN, GROUP);
float* partial = (float*)(staged_hidden + staged_bytes(CHOICES * INTERMEDIATE, GROUP));
unsigned long long* full = (unsigned long long*)(partial + 16 * SLOTS * SLOT_CHUNKS);  // two per slot
unsigned long long* done = full + 2 * SLOTS;
unsigned long long* empty = done + SLOTS;
unsigned long long* x_there = empty + SLOTS;
unsigned long long* all_drawn = x_there + 1;
unsigned long long* hidden_there = all_drawn + 1;  // one per choice
int* row_of = (int*)(hidden_there + CHOICES);
float* share_of = (float*)(row_of + CHOICES);
int* step_of = (int*)(share_of + CHOICES);  // the step of each slot
uint* tag = (uint*)(step_of + SLOTS);

const int lane = thread_index_in_simdgroup, simdgroup = simdgroup_index_in_threadgroup;
const int mine = thread_index_in_threadgroup, group = threadgroup_position_in_grid.x, groups = gridDim.x;
uint* counters = const_cast<uint*>(tickets);
uint2* hidden = (uint2*)(counters + 64);

// Every simdgroup begins with its slowest loads; x comes first, because it would wait behind all requested weights.
constexpr int EIGHTS = HIDDEN / 8, OWN = (EIGHTS + 32 * WORKERS - 1) / (32 * WORKERS);
uint4 own[OWN];
uint drawn = 0;
if (simdgroup == ASKS) {
  if (lane == 0) {
    drawn = atomicAdd(counters, 2u);
    *tag = __ldcg(counters + 32) + 1;
  }
} else if (simdgroup == ADDS) {
#if CHOOSES
  uint winner;
  float value, highest;
  choose_by_scores<EXPERTS, ROUTED>((const ushort*)scores, lane, &winner, &value, &highest);
  const float weight = lane < ROUTED ? exponential(value - highest) : 0.0f;
  float unchosen = 0.0f;
  if (!RENORMALIZED) {
    for (int expert = lane; expert < EXPERTS; expert += 32) {
      unchosen += exponential(float(scores[expert]) - highest);
    }
  }
  const float total = simd_sum(RENORMALIZED ? weight : unchosen);
  int rank = 0;
  for (int k = 0; k < ROUTED; k++) {
    const uint other = __shfl_sync(0xffffffffu, winner, k);
    rank += other < winner || (other == winner && k < lane) ? 1 : 0;
  }
  if (lane < ROUTED) {
    row_of[rank] = table[winner];
    share_of[rank] = weight / total;
    if (group == 0) {
      chosen[earlier_shape[0] + rank] = winner;
    }
  }
  if (lane == 0 && ROUTED < CHOICES) {
    row_of[ROUTED] = 0;
    share_of[ROUTED] = 1.0f / (1.0f + exponential(-float(scores[EXPERTS])));
  }
#else
  for (int i = lane; i < CHOICES; i += 32) {
    row_of[i] = i < ROUTED ? rows[i] : 0;
    share_of[i] = routing_weights[i];
  }
#endif
} else {
  // Each thread initializes a few barriers; one thread would take half a microsecond for all.
  if (lane == 0) {
    for (int i = simdgroup < ASKS ? simdgroup : simdgroup - 2; i < 4 * SLOTS + 2 + CHOICES; i += WORKERS + STAGERS) {
      barrier_init(full + i, i < 2 * SLOTS        ? 1
                             : i < 3 * SLOTS      ? TEAM
                             : i < 4 * SLOTS      ? 1
                             : i == 4 * SLOTS     ? WORKERS
                             : i == 4 * SLOTS + 1 ? 1
                                                  : JOBS);
    }
    barriers_are_ready();
  }
  if (simdgroup < WORKERS) {
#pragma unroll
    for (int i = 0; i < OWN; i++) {
      if (mine + i * 32 * WORKERS < EIGHTS) {
        own[i] = __ldcg((const uint4*)x + mine + i * 32 * WORKERS);
      }
    }
  }
}
__syncthreads();

if (simdgroup == ASKS) {
  int number = 0;      // filled slots
  int copies = 0;      // requested copies
  int in_flight = 0;   // of the last 32 copies, one per lane: the copy's barrier and its phase
  auto wait_for_slot = [&] {
    if (number >= SLOTS) {
      barrier_wait(empty + number % SLOTS, (number / SLOTS - 1) & 1);
    }
  };
  // Wait until fewer than `most` copies are in flight; the next copy goes to piece `piece` of the slot.
  auto wait_for_copies = [&](int piece, int most) {
    if (copies >= most) {
      const int before = __shfl_sync(0xffffffffu, in_flight, (copies - most) % 32);
      barrier_wait(full + before / 2, before & 1);
    }
    if (lane == copies % 32) {
      in_flight = (number % SLOTS * 2 + piece) * 2 + (number / SLOTS & 1);
    }
    copies++;
  };

  uint next = drawn + 1;
  for (uint unit = __shfl_sync(0xffffffffu, drawn, 0); unit < UP_UNITS;) {
    const int slot = number % SLOTS, choice = unit / (INTERMEDIATE / 8), row = unit % (INTERMEDIATE / 8) * 8;
    const int what = lane % 4;  // codes, scales, biases
    const bool there = row_of[choice] >= 0;
    wait_for_slot();
#pragma unroll
    for (int piece = 0; piece < 2; piece++) {  // gate, up
      wait_for_copies(piece, AHEAD);
      const uchar* from = slab + (long)row_of[choice] * RECORD_BYTES;
      from += piece == 0 ? (what == 0 ? GATE_WEIGHT : what == 1 ? GATE_SCALES : GATE_BIASES)
                         : (what == 0 ? UP_WEIGHT : what == 1 ? UP_SCALES : UP_BIASES);
#if WITH_SHARED_EXPERT
      if (choice == ROUTED) {
        const uchar* gate = what == 0   ? (const uchar*)shared_gate_weight
                            : what == 1 ? (const uchar*)shared_gate_scales
                                        : (const uchar*)shared_gate_biases;
        const uchar* up = what == 0   ? (const uchar*)shared_up_weight
                          : what == 1 ? (const uchar*)shared_up_scales
                                      : (const uchar*)shared_up_biases;
        from = piece == 0 ? gate : up;
      }
#endif
      const int row_bytes = what == 0 ? UP_ROW : UP_SCALES_ROW;
      from += (long)row * row_bytes;
      uchar* to = slots + slot * SLOT_BYTES;
      to += what == 0 ? piece * UP_BLOCK : 2 * UP_BLOCK + (2 * (what - 1) + piece) * 8 * UP_SCALES_ROW;
      if (lane == 0) {
        step_of[slot] = unit;
        barrier_expect(full + 2 * slot + piece, there ? 8 * (UP_ROW + 2 * UP_SCALES_ROW) : 0);
      }
      __syncwarp();
      if (there && lane < 3) {
        bring(to, from, 8 * row_bytes, full + 2 * slot + piece);
      }
    }
    number++;
    unit = __shfl_sync(0xffffffffu, next, 0);
    if (lane == 0) {
      next = atomicAdd(counters, 1u);
    }
  }
  if (lane == 0) {
    barrier_arrive(all_drawn);
    // Each threadgroup draws two numbers too many; the last threadgroup resets the counters for the next call.
    if (next == UP_UNITS + 2 * groups - 1) {
      counters[0] = 0;
      counters[32] = *tag;
    }
  }
  for (int pair = group; pair < DOWN_UNITS; pair += 2 * groups) {
    for (int part = 0; part < PARTS; part++) {
      for (int unit = pair; unit < DOWN_UNITS && unit <= pair + groups; unit += groups) {
        const int slot = number % SLOTS;
        wait_for_slot();
        wait_for_copies(0, AHEAD_DOWN);
        const int matrix = lane / 4, what = lane % 4;  // codes, scales, biases, further codes
        const int choice = part * EXPERTS_A_PART + matrix;
        const int record = matrix < EXPERTS_A_PART && choice < CHOICES ? row_of[choice] : -1;
        uchar* to = slots + slot * SLOT_BYTES;
        const uchar* from = slab;
        uint bytes = 0;
        if (record >= 0) {
          from += (long)record * RECORD_BYTES + (what == 1 ? DOWN_SCALES : what == 2 ? DOWN_BIASES : DOWN_WEIGHT);
#if WITH_SHARED_EXPERT
          if (choice == ROUTED) {
            from = what == 1   ? (const uchar*)shared_down_scales
                   : what == 2 ? (const uchar*)shared_down_biases
                               : (const uchar*)shared_down_weight;
          }
#endif
          const bool codes = what == 0 || what == 3;
          const int row_bytes = codes ? DOWN_ROW : DOWN_SCALES_ROW;
          from += (long)(unit * 16 + what / 3 * 8) * row_bytes;
          bytes = (codes ? 8 : 16) * row_bytes;
          to += codes ? (2 * matrix + what / 3) * DOWN_BLOCK
                      : EXPERTS_A_PART * 2 * DOWN_BLOCK + ((what - 1) * EXPERTS_A_PART + matrix) * 16 * DOWN_SCALES_ROW;
        }
        const uint all = __reduce_add_sync(0xffffffffu, bytes);
        if (lane == 0) {
          step_of[slot] = UP_UNITS + part;
          barrier_expect(full + 2 * slot, all);
          barrier_arrive(full + 2 * slot + 1);
        }
        __syncwarp();
        if (bytes) {
          bring(to, from, bytes, full + 2 * slot);
        }
        number++;
      }
    }
  }
  for (int i = 0; i < TEAMS; i++) {
    wait_for_slot();
    if (lane == 0) {
      step_of[number % SLOTS] = END;
      barrier_arrive(full + 2 * (number % SLOTS));
      barrier_arrive(full + 2 * (number % SLOTS) + 1);
    }
    number++;
  }
} else if (simdgroup == ADDS) {
  const int half = lane / 16;
  int number = 0;
  // Return the sums of the products in the next slot, 16 per chunk; each half of the lanes adds every second chunk.
  auto sum_of_slot = [&](int chunks) {
    const float* products = partial + 16 * SLOT_CHUNKS * (number % SLOTS) + lane;
    float sum = 0.0f;
#pragma unroll
    for (int chunk = 0; chunk < SLOT_CHUNKS; chunk += 2) {
      sum += chunk + half < chunks ? products[16 * chunk] : 0.0f;
    }
    sum += __shfl_xor_sync(0xffffffffu, sum, 16);
    if (lane == 0) {
      barrier_arrive(empty + number % SLOTS);
    }
    number++;
    return sum;
  };
  while (true) {
    barrier_wait(done + number % SLOTS, number / SLOTS & 1);
    const int unit = step_of[number % SLOTS];
    if (unit >= UP_UNITS) {
      break;
    }
    // Lanes 2 r and 2 r + 1 hold gate and up of row r; two rows make a word.
    const float sum = sum_of_slot(UP_CHUNKS), other = __shfl_xor_sync(0xffffffffu, sum, 1);
    const float value = silu(lane % 2 ? other : sum) * (lane % 2 ? sum : other);
    const float beside = __shfl_xor_sync(0xffffffffu, value, 2);
    const uint pair = lane % 4 < 2 ? pair_of(value, beside) : pair_of(beside, value);
    const uint word = __shfl_sync(0xffffffffu, pair, 4 * (lane % 4));
    if (lane / 4 < COPIES) {
      publish(hidden + lane / 4 * WORDS + unit * 4 + lane % 4, word, *tag);
    }
  }
  for (int pair = group; pair < DOWN_UNITS; pair += 2 * groups) {
    const int unit = pair + half * groups;  // the unit of this half of the lanes
    float sum = 0.0f;
    for (int part = 0; part < PARTS; part++) {
      for (int i = 0; i < 2 && pair + i * groups < DOWN_UNITS; i++) {
        barrier_wait(done + number % SLOTS, number / SLOTS & 1);
        const float more = sum_of_slot(min(DOWN_CHUNKS - part * PART_CHUNKS, PART_CHUNKS));
        sum += i == half ? more : 0.0f;
      }
    }
    if (unit < DOWN_UNITS) {
      const int place = unit * 16 + lane % 2 * 8 + lane % 16 / 2;
      y[place] = RESULT(float(residual[place]) + sum);
    }
  }
#if CHOOSES
  for (int i = lane; group == 0 && i < earlier_shape[0]; i += 32) {
    chosen[i] = earlier[i];
  }
#endif
} else if (simdgroup >= STAGES) {
  barrier_wait(all_drawn, 0);  // earlier, few have arrived, and polling for them would delay weights
  for (int job = group < DOWN_UNITS ? simdgroup - STAGES : CHOICES * JOBS; job < CHOICES * JOBS; job += STAGERS) {
    const int choice = job / JOBS;
    if (row_of[choice] >= 0) {
      const uint4* from = (const uint4*)(hidden + group % COPIES * WORDS) + job * 64 + 2 * lane;
      const uint4 eight = wait_for_words(from, *tag);
      __syncwarp();
      stage<BITS, GROUP>(eight, job * 32 + lane, CHOICES * INTERMEDIATE, staged_hidden);
    }
    __syncwarp();
    if (lane == 0) {
      barrier_arrive(hidden_there + choice);
    }
  }
} else {
#pragma unroll
  for (int i = 0; i < OWN; i++) {
    if (mine + i * 32 * WORKERS < EIGHTS) {
      stage<BITS, GROUP>(own[i], mine + i * 32 * WORKERS, HIDDEN, staged_x);
    }
  }
  __syncwarp();
  if (lane == 0) {
    barrier_arrive(x_there);
  }
  Stream<BITS, GROUP> weights;
  weights.begin(lane);
  weights.lay_out(UP_ROW, UP_BLOCK, UP_SCALES_ROW, 8 * UP_SCALES_ROW);
  barrier_wait(x_there, 0);
  int number = simdgroup / TEAM, step;
  int taken = -1;  // the chunk of the vector in registers
  while (true) {
    const int slot = number % SLOTS;
    barrier_wait(full + 2 * slot, number / SLOTS & 1);
    barrier_wait(full + 2 * slot + 1, number / SLOTS & 1);
    step = step_of[slot];
    if (step >= UP_UNITS) {
      break;
    }
    const uchar* codes = slots + slot * SLOT_BYTES;
    const uchar* scales = codes + 2 * UP_BLOCK;
    for (int chunk = simdgroup % TEAM; chunk < UP_CHUNKS; chunk += TEAM) {
      float* products = partial + 16 * (SLOT_CHUNKS * slot + chunk);
      if (row_of[step / (INTERMEDIATE / 8)] >= 0) {
        if (chunk != taken) {
          taken = chunk;
          weights.take(staged_x, HIDDEN, chunk);
        }
        const uchar* own_scales = scales + chunk * weights.SCALES;
        weights.multiply_chunk(codes + chunk * weights.CODES, own_scales, own_scales + 16 * UP_SCALES_ROW, 1.0f, products);
      } else if (lane < 16) {
        products[lane] = 0.0f;
      }
    }
    __syncwarp();
    if (lane == 0) {
      barrier_arrive(done + slot);
    }
    number += TEAMS;
  }
  weights.lay_out(DOWN_ROW, DOWN_BLOCK, DOWN_SCALES_ROW, 8 * DOWN_SCALES_ROW);
  taken = -1;
  int dealt = simdgroup % TEAM;  // chunks go round the members of the team
  while (step < END) {
    const int slot = number % SLOTS, before = (step - UP_UNITS) * PART_CHUNKS;
    const int chunks = min(DOWN_CHUNKS - before, PART_CHUNKS);
    const uchar* codes = slots + slot * SLOT_BYTES;
    const uchar* scales = codes + EXPERTS_A_PART * 2 * DOWN_BLOCK;
    for (; dealt < chunks; dealt += TEAM) {
      const int chunk = before + dealt, choice = chunk / EXPERT_CHUNKS;
      const int matrix = dealt / EXPERT_CHUNKS, within = dealt % EXPERT_CHUNKS;
      float* products = partial + 16 * (SLOT_CHUNKS * slot + dealt);
      if (row_of[choice] >= 0) {
        if (chunk != taken) {
          taken = chunk;
          barrier_wait(hidden_there + choice, 0);
          weights.take(staged_hidden, CHOICES * INTERMEDIATE, chunk);
        }
        const uchar* own_scales = scales + matrix * 16 * DOWN_SCALES_ROW + within * weights.SCALES;
        weights.multiply_chunk(codes + matrix * 2 * DOWN_BLOCK + within * weights.CODES, own_scales,
                               own_scales + EXPERTS_A_PART * 16 * DOWN_SCALES_ROW, share_of[choice], products);
      } else if (lane < 16) {
        products[lane] = 0.0f;
      }
    }
    dealt -= chunks;
    __syncwarp();
    if (lane == 0) {
      barrier_arrive(done + slot);
    }
    number += TEAMS;
    barrier_wait(full + 2 * (number % SLOTS), number / SLOTS & 1);
    step = step_of[number % SLOTS];
  }
  if (lane == 0) {
    barrier_arrive(done + number % SLOTS);
  }
}
