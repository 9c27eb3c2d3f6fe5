// Runs CUDA kernels written with custom_kernels/dialects/copy_engine.h on a CPU: every thread is a coroutine, and threads
// meet at barriers, shuffles and tensor cores as a simdgroup does. Copies land later and in any order; until then their
// target holds rubbish. Which simdgroup goes on next is drawn at random, and so few threadgroups run at once as asked.

#include <math.h>
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
struct alignas(8) float2 {
  float x, y;
};
struct Dimension {
  int x;
};
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
static inline uint __vmaxu2(uint a, uint b) { return max(a & 0xffff, b & 0xffff) | max(a >> 16, b >> 16) << 16; }
static inline uint __byte_perm(uint low, uint high, uint pick) {
  uint result = 0;
  for (int i = 0; i < 4; i++) {
    const uint which = pick >> (4 * i) & 7;
    result |= ((which < 4 ? low : high) >> (8 * (which & 3)) & 255) << (8 * i);
  }
  return result;
}
static inline float exponential(float x) { return expf(x); }
static inline float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
static inline float nearest(float x) { return rintf(x); }
template <typename V>
static inline V __ldcg(const V* from) {
  return *from;
}

// The machine.

constexpr int LANES = 32, MOST_THREADS = 512, MOST_COPIES = 4096, MOST_BARRIERS = 128, STACK = 1 << 16;

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
struct Threadgroup;
struct Thread {
  ucontext_t context;
  Threadgroup* group;
  int number;
  bool done;
  char stack[STACK];
};
struct Threadgroup {
  int number, arrived, barriers;
  uint meeting;
  uchar* shared;
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
static ucontext_t scheduler;
static Copy copies[MOST_COPIES];
static int copies_under_way, threads_a_group, groups_in_all;
static uint64_t random_state;
static const char* fault;
static long events;  // of those that others may wait for

static inline uint drawn(uint below) {
  random_state = random_state * 6364136223846793005ull + 1442695040888963407ull;
  return uint(random_state >> 33) % below;
}
static inline void pause() { swapcontext(&now->context, &scheduler); }
static inline void fail(const char* what) {
  fault = what;
  while (true) {
    pause();
  }
}

#define threadgroup_position_in_grid (Dimension{now->group->number})
#define thread_index_in_threadgroup (now->number)
#define thread_index_in_simdgroup (now->number % LANES)
#define simdgroup_index_in_threadgroup (now->number / LANES)
#define gridDim (Dimension{groups_in_all})
#define constant
#define thread
#define DYNAMIC_SHARED(name) uint4* name = (uint4*)now->group->shared

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
// All lanes give `words` and the last to come works on them.
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
static inline float low_half(uint pair) { return __uint_as_float(pair << 16); }
static inline float high_half(uint pair) { return __uint_as_float(pair & 0xffff0000u); }
static inline uint pair_of(float low, float high) {
  return uint(__nv_bfloat16(low).bits) | uint(__nv_bfloat16(high).bits) << 16;
}

static void body();
static void enter() {
  body();
  now->done = true;
  while (true) {
    pause();
  }
}

static void** buffers;

// Run `groups` threadgroups of `threads`, `at_once` at a time; null, or what went wrong.
extern "C" const char* run(void** arrays, int groups, int threads, int at_once, size_t shared, uint64_t seed) {
  if (threads > MOST_THREADS || threads % LANES) {
    return "the machine has no so large threadgroups";
  }
  buffers = arrays, threads_a_group = threads, groups_in_all = groups;
  copies_under_way = 0, random_state = seed, fault = nullptr;
  Threadgroup** live = (Threadgroup**)calloc(size_t(at_once), sizeof(Threadgroup*));
  int begun = 0, left = groups;
  long idle = 0, seen = events;
  while (left && !fault) {
    for (int place = 0; place < at_once && !fault; place++) {
      if (!live[place] && begun < groups) {
        Threadgroup* group = live[place] = (Threadgroup*)calloc(1, sizeof(Threadgroup));
        group->number = begun++;
        group->shared = (uchar*)aligned_alloc(128, (shared + 127) / 128 * 128);
        memset(group->shared, 0xff, shared);
        for (int number = 0; number < threads; number++) {
          Thread* one = &group->threads[number];
          one->group = group, one->number = number;
          getcontext(&one->context);
          one->context.uc_stack.ss_sp = one->stack, one->context.uc_stack.ss_size = STACK;
          one->context.uc_link = &scheduler;
          makecontext(&one->context, enter, 0);
        }
      }
      Threadgroup* group = live[place];
      if (!group) {
        continue;
      }
      const int simdgroups = threads / LANES, only = drawn(4) == 0 ? -1 : int(drawn(uint(simdgroups)));
      bool done = true;
      for (int number = 0; number < threads; number++) {
        Thread* one = &group->threads[number];
        if (!one->done && (only < 0 || only == number / LANES)) {
          now = one;
          swapcontext(&scheduler, &one->context);
        }
        done = done && one->done;
      }
      land_a_copy();
      idle = events == seen ? idle + 1 : 0, seen = events;
      if (done) {
        free(group->shared), free(group);
        live[place] = nullptr;
        left--, events++;
      }
    }
    if (idle > 5000) {
      fault = "threads wait for each other for ever";
    }
  }
  for (int place = 0; place < at_once; place++) {
    if (live[place]) {
      free(live[place]->shared), free(live[place]);
    }
  }
  free(live);
  return fault;
}
