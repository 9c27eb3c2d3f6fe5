// Exceptions in the loops of the pool: in the caller, in another thread, and in several threads at once. Each must reach
// the caller, and the next loop must run on all threads as usual.
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <new>
#include <stdexcept>
#include <string>
#include <thread>

#include "pool.hpp"

using namespace flashmoe;

namespace {

constexpr int kThreads = 4;
constexpr int64_t kItems = 64;

void require(bool condition, const char* what) {
    if (condition) return;
    std::fprintf(stderr, "failed: %s\n", what);
    std::exit(1);
}

// Wait until all threads are inside the loop, so that each takes part.
void run_on_all_threads() {
    std::atomic<int> inside{0};
    std::atomic<int64_t> sum{0};
    parallel(kThreads, 1, [&](int64_t begin, int64_t, int) {
        inside.fetch_add(1);
        while (inside.load() < kThreads) std::this_thread::yield();
        sum.fetch_add(begin + 1);
    });
    require(sum.load() == kThreads * (kThreads + 1) / 2, "a loop after a failure");
}

// Throw in the threads for which `fails(thread)` holds, while all threads are inside the loop.
template <typename Error, typename Fails>
void fail(const Fails& fails, const char* what) {
    std::atomic<int> inside{0};
    bool caught = false;
    try {
        parallel(kItems, 1, [&](int64_t, int64_t, int thread) {
            inside.fetch_add(1);
            while (inside.load() < kThreads) std::this_thread::yield();
            if (fails(thread)) throw Error(what);
        });
    } catch (const Error&) {
        caught = true;
    }
    require(caught, what);
    run_on_all_threads();
}

struct NoMemory : std::bad_alloc {
    explicit NoMemory(const char*) {}
};

} // namespace

int main() {
    set_threads(kThreads);
    run_on_all_threads();
    for (int round = 0; round < 200; ++round) {
        fail<NoMemory>([](int thread) { return thread == 0; }, "the caller has no memory");
        fail<NoMemory>([](int thread) { return thread != 0; }, "the others have no memory");
        fail<std::runtime_error>([](int) { return true; }, "all fail");
        if (round % 20 == 0) set_threads(kThreads);
    }
    set_threads(1);
    bool caught = false;
    try {
        parallel(kItems, 1, [](int64_t, int64_t, int) { throw std::runtime_error("alone"); });
    } catch (const std::runtime_error&) {
        caught = true;
    }
    require(caught, "one thread alone");
    std::puts("every failure reached its caller");
}
