// A machine that runs CUDA kernels on a CPU. Every thread is a coroutine; threads synchronize at barriers, shuffles and
// tensor-core operations. Copies of the copy engine arrive later and in any order, copies of a thread when it waits for
// them; until then their target holds garbage. The next simdgroup to run is drawn at random, and the number of
// concurrent threadgroups is limited. This file defines CUDA's names and, under the names of custom_kernels/dialects,
// replacements for the functions in PTX.

#include <math.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

typedef unsigned int uint;
typedef unsigned char uchar;
struct alignas(16) uint4 {
  uint x, y, z, w;
};
struct alignas(8) uint2 {
  uint x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct Dimension {
  uint x, y, z;
};
typedef _Float16 __half;
static inline uint4 make_uint4(uint x, uint y, uint z, uint w) { return uint4{x, y, z, w}; }
static inline uint2 make_uint2(uint x, uint y) { return uint2{x, y}; }
static inline float2 make_float2(float x, float y) { return float2{x, y}; }
template <typename To, typename From>
static inline To same_bits(From value) {
  To result;
  memcpy(&result, &value, sizeof(To));
  return result;
}
static inline float __uint_as_float(uint word) { return same_bits<float>(word); }
struct __nv_bfloat16 {
  unsigned short bits;
  __nv_bfloat16() {}
  explicit __nv_bfloat16(float value) {
    const uint word = same_bits<uint>(value);
    bits = (unsigned short)((word + 0x7fff + (word >> 16 & 1)) >> 16);
  }
  operator float() const { return __uint_as_float(uint(bits) << 16); }
};
static inline int min(int a, int b) { return a < b ? a : b; }
static inline uint max(uint a, uint b) { return a > b ? a : b; }
static inline uint __float_as_uint(float value) { return same_bits<uint>(value); }
static inline uint __byte_perm(uint low, uint high, uint pick) {
  uint result = 0;
  for (int i = 0; i < 4; i++) {
    const uint which = pick >> (4 * i) & 7;
    result |= ((which < 4 ? low : high) >> (8 * (which & 3)) & 255) << (8 * i);
  }
  return result;
}
static inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
static inline void sincospif(float x, float* sine, float* cosine) {
  *sine = float(sin(M_PI * double(x))), *cosine = float(cos(M_PI * double(x)));
}
template <typename V>
static inline V __ldcs(const V* from) {
  return *from;
}
template <typename V>
static inline V __ldcg(const V* from) {
  return *from;
}

// The machine.

constexpr int LANES = 32, MOST_THREADS = 512, MOST_COPIES = 4096, MOST_BARRIERS = 128, STACK = 1 << 17;
constexpr int MOST_OWN_COPIES = 128;

struct Simdgroup {
  int arrived;
  uint meeting;
  uint given[LANES][10], taken[LANES][10];
};
struct Barrier {
  const void* place;
  int phase, pending, arrivals;
  long bytes;
};
struct OwnCopy {
  uint4* to;
  const uint4* from;
  int batch;
};
struct Threadgroup;
struct Thread {
  ucontext_t context;
  jmp_buf place;  // where it continues
  Threadgroup* group;
  int number, batches, own_copies;
  bool begun, done;
  OwnCopy own_copy[MOST_OWN_COPIES];
  char stack[STACK];
};
struct Threadgroup {
  bool live;
  int number, arrived, barriers;
  uint meeting;
  uchar *shared, *statics;
  Simdgroup simdgroups[MOST_THREADS / LANES];
  Barrier barrier[MOST_BARRIERS];
  Thread threads[MOST_THREADS];
};
struct Copy {
  uchar* to;
  const uchar* from;
  uint bytes;
  Barrier* barrier;
};
static Thread* now;
static jmp_buf scheduler;
static Dimension grid;
static Copy copies[MOST_COPIES];
static int copies_under_way, threads_a_group;
static uint64_t random_state;
static const char* fault;
static long events;  // number of events that other threads may wait for

static inline uint drawn(uint below) {
  random_state = random_state * 6364136223846793005ull + 1442695040888963407ull;
  return uint(random_state >> 33) % below;
}
static __attribute__((noinline)) void pause() {
  if (!_setjmp(now->place)) {
    _longjmp(scheduler, 1);
  }
}
static __attribute__((noinline)) void go_on(Thread* one) {
  now = one;
  if (!_setjmp(scheduler)) {
    if (one->begun) {
      _longjmp(one->place, 1);
    }
    one->begun = true;
    setcontext(&one->context);
  }
}
static inline void fail(const char* what) {
  fault = what;
  while (true) {
    pause();
  }
}

#define __device__
#define __shared__ static __attribute__((section("shared_memory")))
#define blockIdx (place_of(now->group->number))
#define blockDim (Dimension{uint(threads_a_group), 1, 1})
#define threadIdx (Dimension{uint(now->number), 0, 0})
#define gridDim grid
static inline Dimension place_of(int group) {
  return Dimension{group % grid.x, group / grid.x % grid.y, group / grid.x / grid.y};
}
// Shared arrays of a kernel are static; each threadgroup has a copy of their bytes, which is swapped in while it runs.
extern "C" char __start_shared_memory[] __attribute__((weak));
extern "C" char __stop_shared_memory[] __attribute__((weak));
static Threadgroup* running;
static inline size_t statics() { return size_t(__stop_shared_memory - __start_shared_memory); }
static inline void run_in(Threadgroup* group) {
  if (running != group && statics()) {
    if (running) {
      memcpy(running->statics, __start_shared_memory, statics());
    }
    memcpy(__start_shared_memory, group->statics, statics());
  }
  running = group;
}

static inline void __syncthreads() {
  Threadgroup* group = now->group;
  const uint meeting = group->meeting;
  if (++group->arrived == threads_a_group) {
    group->arrived = 0, group->meeting++, events++;
  } else {
    while (group->meeting == meeting) {
      pause();
    }
  }
}
// All lanes pass `words`; the last lane to arrive processes them.
template <typename Work>
static inline const uint* meet(const uint* given, int words, Work work) {
  Simdgroup& own = now->group->simdgroups[now->number / LANES];
  memcpy(own.given[now->number % LANES], given, 4 * words);
  const uint meeting = own.meeting;
  if (++own.arrived == LANES) {
    own.arrived = 0;
    work(own);
    own.meeting++, events++;
  } else {
    while (own.meeting == meeting) {
      pause();
    }
  }
  return own.taken[now->number % LANES];
}
static inline void __syncwarp() {
  const uint nothing = 0;
  meet(&nothing, 1, [](Simdgroup&) {});
}
static inline uint __shfl_xor_sync(uint, uint value, int mask) {
  return *meet(&value, 1, [mask](Simdgroup& all) {
    for (int lane = 0; lane < LANES; lane++) {
      all.taken[lane][0] = all.given[lane ^ mask][0];
    }
  });
}
static inline float __shfl_xor_sync(uint all, float value, int mask) {
  return __uint_as_float(__shfl_xor_sync(all, same_bits<uint>(value), mask));
}
static inline uint __shfl_sync(uint, uint value, int lane) {
  const uint given[2] = {value, uint(lane)};
  return *meet(given, 2, [](Simdgroup& all) {
    for (int to = 0; to < LANES; to++) {
      all.taken[to][0] = all.given[all.given[to][1]][0];
    }
  });
}
static inline uint __reduce_add_sync(uint, uint value) {
  return *meet(&value, 1, [](Simdgroup& all) {
    uint sum = 0;
    for (int lane = 0; lane < LANES; lane++) {
      sum += all.given[lane][0];
    }
    for (int lane = 0; lane < LANES; lane++) {
      all.taken[lane][0] = sum;
    }
  });
}
static inline uint __reduce_max_sync(uint, uint value) {
  return *meet(&value, 1, [](Simdgroup& all) {
    uint most = 0;
    for (int lane = 0; lane < LANES; lane++) {
      most = max(most, all.given[lane][0]);
    }
    for (int lane = 0; lane < LANES; lane++) {
      all.taken[lane][0] = most;
    }
  });
}
// mma.m16n8k16: 4 g + c holds rows g and g + 8 of A, column g of B, columns 2 c and 2 c + 1 of the sums.
static inline void multiply(float* sums, uint a0, uint a1, uint a2, uint a3, uint b0, uint b1) {
  const uint given[10] = {a0, a1, a2, a3, b0, b1, same_bits<uint>(sums[0]), same_bits<uint>(sums[1]),
                          same_bits<uint>(sums[2]), same_bits<uint>(sums[3])};
  const uint* taken = meet(given, 10, [](Simdgroup& all) {
    float a[16][16], b[16][8];
    for (int lane = 0; lane < LANES; lane++) {
      const int g = lane / 4, c = lane % 4;
      for (int word = 0; word < 6; word++) {
        for (int i = 0; i < 2; i++) {
          const float value = __uint_as_float(all.given[lane][word] >> (16 * i) << 16);
          if (word < 4) {
            a[g + word % 2 * 8][2 * c + i + word / 2 * 8] = value;
          } else {
            b[2 * c + i + (word - 4) * 8][g] = value;
          }
        }
      }
    }
    for (int lane = 0; lane < LANES; lane++) {
      for (int r = 0; r < 4; r++) {
        float sum = __uint_as_float(all.given[lane][6 + r]);
        for (int k = 0; k < 16; k++) {
          sum += a[lane / 4 + r / 2 * 8][k] * b[k][lane % 4 * 2 + r % 2];
        }
        all.taken[lane][r] = same_bits<uint>(sum);
      }
    }
  });
  for (int r = 0; r < 4; r++) {
    sums[r] = __uint_as_float(taken[r]);
  }
}
// mma.m16n8k32: 4 g + c holds rows g and g + 8 of A, column g of B, columns 2 c and 2 c + 1 of the sums.
static inline void multiply(int* sums, uint a0, uint a1, uint a2, uint a3, uint b0, uint b1) {
  const uint given[10] = {a0, a1, a2, a3, b0, b1, uint(sums[0]), uint(sums[1]), uint(sums[2]), uint(sums[3])};
  const uint* taken = meet(given, 10, [](Simdgroup& all) {
    int a[16][32], b[32][8];
    for (int lane = 0; lane < LANES; lane++) {
      const int g = lane / 4, c = lane % 4;
      for (int word = 0; word < 6; word++) {
        for (int i = 0; i < 4; i++) {
          const uint byte = all.given[lane][word] >> (8 * i) & 255;
          if (word < 4) {
            a[g + word % 2 * 8][4 * c + i + word / 2 * 16] = int(byte);
          } else {
            b[4 * c + i + (word - 4) * 16][g] = int(int8_t(byte));
          }
        }
      }
    }
    for (int lane = 0; lane < LANES; lane++) {
      for (int r = 0; r < 4; r++) {
        int sum = int(all.given[lane][6 + r]);
        for (int k = 0; k < 32; k++) {
          sum += a[lane / 4 + r / 2 * 8][k] * b[k][lane % 4 * 2 + r % 2];
        }
        all.taken[lane][r] = uint(sum);
      }
    }
  });
  for (int r = 0; r < 4; r++) {
    sums[r] = int(taken[r]);
  }
}

static inline Barrier& barrier_at(const void* place) {
  Threadgroup* group = now->group;
  for (int i = 0; i < group->barriers; i++) {
    if (group->barrier[i].place == place) {
      return group->barrier[i];
    }
  }
  fail("a barrier is used that was not made");
  return group->barrier[0];
}
static inline void settle(Barrier& barrier) {
  if (barrier.pending == 0 && barrier.bytes == 0) {
    barrier.phase ^= 1, barrier.pending = barrier.arrivals, events++;
  }
}
static inline void barrier_init(unsigned long long* place, int arrivals) {
  if (now->group->barriers == MOST_BARRIERS) {
    fail("too many barriers");
  }
  now->group->barrier[now->group->barriers++] = Barrier{place, 0, arrivals, arrivals, 0};
}
static inline void barriers_are_ready() {}
static inline void barrier_expect(unsigned long long* place, uint bytes) {
  Barrier& barrier = barrier_at(place);
  barrier.bytes += bytes;
  if (--barrier.pending < 0) {
    fail("more arrive at a barrier than it waits for");
  }
  settle(barrier);
}
static inline void barrier_arrive(unsigned long long* place) { barrier_expect(place, 0); }
static inline void barrier_wait(unsigned long long* place, int phase) {
  while (barrier_at(place).phase == (phase & 1)) {
    pause();
  }
}
static inline void bring(void* to, const void* from, uint bytes, unsigned long long* place) {
  if (bytes == 0 || bytes % 16 || uintptr_t(to) % 16 || uintptr_t(from) % 16) {
    fail("a copy is empty or not aligned to 16 bytes");
  }
  if (copies_under_way == MOST_COPIES) {
    fail("too many copies");
  }
  memset(to, 0xff, bytes);
  copies[copies_under_way++] = Copy{(uchar*)to, (const uchar*)from, bytes, &barrier_at(place)};
}
static inline void land_a_copy() {
  if (copies_under_way && drawn(3) == 0) {
    const int which = int(drawn(uint(copies_under_way)));
    const Copy copy = copies[which];
    copies[which] = copies[--copies_under_way];
    memcpy(copy.to, copy.from, copy.bytes);
    copy.barrier->bytes -= copy.bytes;
    settle(*copy.barrier);
  }
}
static inline uint atomicAdd(uint* place, uint value) {
  const uint before = *place;
  *place += value;
  events++;
  return before;
}
static inline void publish(uint2* place, uint word, uint tag) {
  *place = uint2{word, tag};
  events++;
}
static inline uint4 wait_for_words(const volatile uint4* from, uint tag) {
  while (from[0].y != tag || from[0].w != tag || from[1].y != tag || from[1].w != tag) {
    pause();
  }
  return uint4{from[0].x, from[0].z, from[1].x, from[1].z};
}
static inline uint pair_of(float low, float high) {
  return uint(__nv_bfloat16(low).bits) | uint(__nv_bfloat16(high).bits) << 16;
}

static inline float power_of_two(float x) { return exp2f(x); }

// Copies of a thread (cp.async): their target is garbage from the start, and they arrive when the thread waits for
// them.
static inline void begin_copy(uint4* to, const void* from, bool there = true) {
  if (uintptr_t(to) % 16 || uintptr_t(from) % 16) {
    fail("a copy is not aligned to 16 bytes");
  }
  if (now->own_copies == MOST_OWN_COPIES) {
    fail("too many copies");
  }
  memset((void*)to, 0xff, 16);
  now->own_copy[now->own_copies++] = OwnCopy{to, there ? (const uint4*)from : nullptr, now->batches};
}
static inline void end_batch() { now->batches++; }
template <int LATER>
static inline void wait_for_batches() {
  int left = 0;
  for (int i = 0; i < now->own_copies; i++) {
    const OwnCopy copy = now->own_copy[i];
    if (copy.batch >= now->batches - LATER) {
      now->own_copy[left++] = copy;
    } else {
      *copy.to = copy.from ? *copy.from : uint4{0, 0, 0, 0};
    }
  }
  now->own_copies = left;
}
// ldmatrix: lane l = 4 g + c passes row l % 8 of tile l / 8, and receives columns 2 c and 2 c + 1 of row g of each
// tile; transposed, rows 2 c and 2 c + 1 of column g.
template <bool TRANSPOSED>
static inline void load_matrices(uint* tiles, const uint4* row) {
  uint given[2];
  memcpy(given, &row, sizeof row);
  const uint* taken = meet(given, 2, [](Simdgroup& all) {
    const unsigned short* rows[LANES];
    for (int lane = 0; lane < LANES; lane++) {
      memcpy(&rows[lane], all.given[lane], sizeof rows[lane]);
    }
    for (int lane = 0; lane < LANES; lane++) {
      const int g = lane / 4, c = lane % 4;
      for (int tile = 0; tile < 4; tile++) {
        const unsigned short** own = rows + 8 * tile;
        all.taken[lane][tile] = TRANSPOSED ? own[2 * c][g] | uint(own[2 * c + 1][g]) << 16
                                           : own[g][2 * c] | uint(own[g][2 * c + 1]) << 16;
      }
    }
  });
  memcpy(tiles, taken, 16);
}
static inline void load_tiles(uint* tiles, const uint4* row) { load_matrices<false>(tiles, row); }
static inline void load_transposed(uint* tiles, const uint4* row) { load_matrices<true>(tiles, row); }

static void body();
static void enter() {
  while (true) {
    body();
    now->done = true;
    pause();
  }
}

static void** buffers;

static void begin(Threadgroup* group, int number, size_t shared) {
  group->live = true, group->number = number, group->arrived = 0, group->barriers = 0, group->meeting = 0;
  memset(group->simdgroups, 0, sizeof group->simdgroups);
  memset(group->shared, 0xff, shared);
  memset(group->statics, 0xff, statics());
  for (int i = 0; i < threads_a_group; i++) {
    Thread* one = &group->threads[i];
    one->done = false, one->batches = 0, one->own_copies = 0;
    if (!one->begun) {
      one->group = group, one->number = i;
      getcontext(&one->context);
      one->context.uc_stack.ss_sp = one->stack, one->context.uc_stack.ss_size = STACK;
      makecontext(&one->context, enter, 0);
    }
  }
}

// Run `size` threadgroups of `threads`, `at_once` at a time; return null or an error message.
extern "C" const char* run(void** arrays, const uint* size, int threads, int at_once, size_t shared, uint64_t seed) {
  if (threads > MOST_THREADS || threads % LANES) {
    return "the machine has no so large threadgroups";
  }
  buffers = arrays, threads_a_group = threads, grid = Dimension{size[0], size[1], size[2]};
  copies_under_way = 0, random_state = seed, fault = nullptr, running = nullptr;
  const int groups = int(size[0] * size[1] * size[2]);
  at_once = min(at_once, groups);
  Threadgroup** place = (Threadgroup**)calloc(size_t(at_once), sizeof(Threadgroup*));
  for (int i = 0; i < at_once; i++) {
    place[i] = (Threadgroup*)calloc(1, sizeof(Threadgroup));
    place[i]->shared = (uchar*)aligned_alloc(128, (shared + 128) / 128 * 128);
    place[i]->statics = (uchar*)malloc(statics() + 1);
  }
  int begun = 0, left = groups;
  long idle = 0, seen = events;
  while (left && !fault) {
    for (int i = 0; i < at_once && !fault; i++) {
      Threadgroup* group = place[i];
      if (!group->live) {
        if (begun == groups) {
          continue;
        }
        if (running == group) {
          running = nullptr;
        }
        begin(group, begun++, shared);
      }
      run_in(group);
      const int simdgroups = threads / LANES, only = drawn(4) == 0 ? -1 : int(drawn(uint(simdgroups)));
      bool done = true;
      for (int number = 0; number < threads; number++) {
        Thread* one = &group->threads[number];
        if (!one->done && (only < 0 || only == number / LANES)) {
          go_on(one);
        }
        done = done && one->done;
      }
      land_a_copy();
      idle = events == seen ? idle + 1 : 0, seen = events;
      if (done) {
        group->live = false;
        left--, events++;
      }
    }
    if (idle > 5000) {
      fault = "threads wait for each other for ever";
    }
  }
  for (int i = 0; i < at_once; i++) {
    free(place[i]->shared), free(place[i]->statics), free(place[i]);
  }
  free(place);
  return fault;
}
