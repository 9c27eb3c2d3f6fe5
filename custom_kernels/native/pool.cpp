#include "pool.hpp"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

namespace flashmoe {
namespace {

using Clock = std::chrono::steady_clock;

// A layer has gaps between its loops, in which Python, MLX or a disk works. Waking a sleeping thread of an idle processor
// takes longer than most gaps, on virtual machines above all. An idle thread therefore first spins, then offers its
// processor to other threads again and again, and then sleeps (docs/measurements/2026-11-27-overlap.md). If another thread
// takes the processor meanwhile, the machine has other work, and the idle thread sleeps at once.
constexpr auto kSpin = std::chrono::microseconds(100);
constexpr auto kAwake = std::chrono::milliseconds(4);
constexpr auto kTaken = std::chrono::microseconds(50);

inline void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

class Pool {
public:
    explicit Pool(int count) : count_(count), ranges_(count) {}

    // Start threads; there may be fewer than requested, if the system refuses more.
    void start() {
        for (int number = 1; number < count_; ++number) {
            try {
                std::thread([this, number] { serve(number); }).detach();
            } catch (const std::exception&) { // no more threads, or no memory for another
                break;
            }
        }
    }

    // End the threads; no loop may be running.
    void stop() {
        stopping_.store(true);
        run(1, 1, [](void*, int64_t, int64_t, int) {}, nullptr);
    }

    void run(int64_t count, int64_t step, Body body, void* context) {
        body_ = body, context_ = context, step_ = step;
        const int64_t steps = (count + step - 1) / step;
        for (int thread = 0; thread < count_; ++thread) {
            ranges_[thread].end = std::min(count, steps * (thread + 1) / count_ * step);
            ranges_[thread].next.store(steps * thread / count_ * step, std::memory_order_relaxed);
        }
        const uint64_t opened = ((gate_.load(std::memory_order_relaxed) >> kEpoch) + 1) << kEpoch | kOpen;
        {
            // Sequentially consistent with `asleep_`: either a thread sees the loop before it sleeps, or the caller
            // sees that it sleeps and wakes it.
            gate_.store(opened, std::memory_order_seq_cst);
            if (asleep_.load(std::memory_order_seq_cst) > 0) {
                std::lock_guard<std::mutex> lock(mutex_);
                wake_.notify_all();
            }
        }
        work(0);
        gate_.fetch_and(~kOpen, std::memory_order_acq_rel);
        for (int spins = 0; gate_.load(std::memory_order_acquire) & kInside; ++spins) {
            if (spins < 2000)
                relax();
            else
                sched_yield();
        }
        if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
    }

private:
    // The number of threads inside the loop, whether more may enter, and the number of the loop, in one word: a thread
    // enters by raising the first number, if the rest has not changed.
    static constexpr uint64_t kInside = 0xffff, kOpen = 1 << 16;
    static constexpr int kEpoch = 17;

    // The remaining items of a thread, on a separate cache line.
    struct alignas(64) Range {
        std::atomic<int64_t> next{0};
        int64_t end = 0;
    };

    // An exception must not leave a thread; the caller rethrows it after all threads have left the loop.
    void work(int thread) noexcept {
        try {
            take_part(thread);
        } catch (...) {
            std::lock_guard<std::mutex> lock(failing_);
            if (!error_) error_ = std::current_exception();
            // The remaining work is useless.
            for (Range& range : ranges_) range.next.store(range.end, std::memory_order_relaxed);
        }
    }

    void take_part(int thread) {
        for (int i = 0; i < count_; ++i) { // this thread's range, then the ranges of other threads
            Range& range = ranges_[(thread + i) % count_];
            while (range.next.load(std::memory_order_relaxed) < range.end) {
                const int64_t begin = range.next.fetch_add(step_, std::memory_order_relaxed);
                if (begin < range.end) body_(context_, begin, std::min(begin + step_, range.end), thread);
            }
        }
    }

    void serve(int thread) {
        uint64_t seen = 0;
        for (;;) {
            uint64_t gate = wait(seen);
            if (stopping_.load()) return;
            seen = gate >> kEpoch;
            while (gate & kOpen && gate >> kEpoch == seen) {
                if (gate_.compare_exchange_weak(gate, gate + 1, std::memory_order_acquire)) {
                    work(thread);
                    gate_.fetch_sub(1, std::memory_order_release);
                    break;
                }
            }
        }
    }

    // Return the state of the gate after a loop other than `seen` was opened.
    uint64_t wait(uint64_t seen) {
        const auto start = Clock::now();
        auto now = start;
        for (int spins = 0; now - start < kAwake; ++spins) {
            const uint64_t gate = gate_.load(std::memory_order_acquire);
            if (gate >> kEpoch != seen) return gate;
            if (now - start < kSpin) {
                relax();
                if (spins % 64 == 63) now = Clock::now();
                continue;
            }
            sched_yield();
            const auto before = std::exchange(now, Clock::now());
            if (now - before > kTaken) break;
        }
        std::unique_lock<std::mutex> lock(mutex_);
        asleep_.fetch_add(1, std::memory_order_seq_cst);
        uint64_t gate;
        wake_.wait(lock, [&] { return (gate = gate_.load(std::memory_order_seq_cst)) >> kEpoch != seen; });
        asleep_.fetch_sub(1, std::memory_order_relaxed);
        return gate;
    }

    const int count_;
    Body body_ = nullptr;
    void* context_ = nullptr;
    int64_t step_ = 1;
    std::vector<Range> ranges_;
    alignas(64) std::atomic<uint64_t> gate_{0};
    alignas(64) std::atomic<int> asleep_{0};
    std::atomic<bool> stopping_{false};
    std::mutex mutex_;
    std::condition_variable wake_;
    std::mutex failing_;
    std::exception_ptr error_; // of this loop; written under `failing_`, read after all other threads have left
};

// Never freed: its threads may be waiting in it when the process ends, or when another pool replaces it.
std::atomic<Pool*> pool{nullptr};
std::vector<Pool*>* const retired = new std::vector<Pool*>; // keeps them reachable for leak checkers; guarded by `busy`
std::atomic<int> wanted{1};
std::atomic_flag busy = ATOMIC_FLAG_INIT;

// Release the pool, also when a loop ends with an exception.
struct ClearBusy {
    ClearBusy() = default;
    ClearBusy(const ClearBusy&) = delete;
    ~ClearBusy() { busy.clear(std::memory_order_release); }
};

// A child process has no threads, and possibly a loop of its parent's that will never end.
void forget_in_child() {
    pool.store(nullptr);
    busy.clear();
}

} // namespace

void set_threads(int count) {
    while (busy.test_and_set(std::memory_order_acquire)) sched_yield();
    const ClearBusy at_end;
    retired->reserve(retired->size() + 1); // may throw, before anything changes
    wanted.store(count < 1 ? 1 : count > kMostThreads ? kMostThreads : count);
    if (Pool* previous = pool.exchange(nullptr)) {
        previous->stop();
        retired->push_back(previous);
    }
}

int threads() { return wanted.load(); }

void run(int64_t count, int64_t step, Body body, void* context) {
    if (count <= 0) return;
    if (count <= step || threads() == 1 || busy.test_and_set(std::memory_order_acquire)) {
        body(context, 0, count, 0);
        return;
    }
    const ClearBusy at_end;
    Pool* current = pool.load();
    if (current == nullptr) {
        static const int registered = pthread_atfork(nullptr, nullptr, forget_in_child);
        (void)registered;
        current = new Pool(threads());
        pool.store(current);
        current->start();
    }
    current->run(count, step, body, context);
}

} // namespace flashmoe
