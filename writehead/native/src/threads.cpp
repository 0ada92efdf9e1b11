#include "threads.h"

#include <sched.h>
#include <unistd.h>

namespace wh {

namespace {

constexpr int kSpins = 400;   // some 20 us: the usual wait inside a step
constexpr int kYields = 100;  // then others may have the core, and then it sleeps

inline void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

}  // namespace

Team::Team(int threads) : threads_(threads), ranges_(2 * static_cast<size_t>(threads)) { start(); }

Team::~Team() {
    if (getpid() == process_) {
        stop();
    } else {
        for (std::thread& other : others_) other.detach();
    }
}

void Team::start() {
    process_ = getpid();
    const uint32_t seen = regions_.load();
    try {
        for (int i = 1; i < threads_; i++) others_.emplace_back(&Team::serve, this, i, seen);
    } catch (...) {
        stop();
        throw;
    }
}

void Team::stop() {
    stopping_ = true;
    regions_.fetch_add(1);
    wake();
    for (std::thread& other : others_) other.join();
    others_.clear();
}

void Team::serve(int index, uint32_t seen) {
    for (;; seen++) {
        await(regions_, seen);
        if (stopping_) return;
        Worker worker(*this, index);
        body_(closure_, worker);
        arrive();
    }
}

void Team::run_erased(Erased body, const void* closure) {
    if (threads_ > 1 && getpid() != process_) {
        for (std::thread& other : others_) other.detach();
        others_.clear();
        start();
    }
    body_ = body;
    closure_ = closure;
    regions_.fetch_add(1);
    wake();
    Worker worker(*this, 0);
    body(closure, worker);
    arrive();
}

void Team::arrive() {
    if (threads_ == 1) return;
    const uint32_t phase = barriers_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads_) {
        arrived_.store(0, std::memory_order_relaxed);
        barriers_.store(phase + 1);
        wake();
    } else {
        await(barriers_, phase);
    }
}

void Team::await(const std::atomic<uint32_t>& value, uint32_t old) {
    for (int i = 0; i < kSpins; i++) {
        if (value.load(std::memory_order_acquire) != old) return;
        pause();
    }
    for (int i = 0; i < kYields; i++) {
        if (value.load(std::memory_order_acquire) != old) return;
        sched_yield();
    }
    std::unique_lock<std::mutex> lock(mutex_);
    sleepers_.fetch_add(1);
    changed_.wait(lock, [&] { return value.load() != old; });
    sleepers_.fetch_sub(1);
}

void Team::wake() {
    if (sleepers_.load() == 0) return;
    std::lock_guard<std::mutex> lock(mutex_);
    changed_.notify_all();
}

}  // namespace wh
