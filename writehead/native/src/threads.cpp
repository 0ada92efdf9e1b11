#include "threads.h"

#include <unistd.h>

#include <chrono>

namespace wh {

namespace {

typedef std::chrono::steady_clock Clock;
constexpr auto kPatience = std::chrono::microseconds(50);  // longer than the usual wait inside a step, shorter than a lost core
constexpr int kLooks = 16;  // before the clock is asked: how long a pause is differs tenfold between processors

inline void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

}  // namespace

template <class Condition>
void Team::Bed::wait(const Condition& holds) {
    if (holds()) return;
    const Clock::time_point end = Clock::now() + kPatience;
    do {
        for (int i = 0; i < kLooks; i++) {
            if (holds()) return;
            pause();
        }
    } while (Clock::now() < end);
    std::unique_lock<std::mutex> lock(mutex);
    sleepers.fetch_add(1);
    woken.wait(lock, holds);
    sleepers.fetch_sub(1);
}

// The condition was made true before, by a sequentially consistent store: a thread that counts as a sleeper only
// after this has looked will find it true.
void Team::Bed::wake() {
    if (sleepers.load() == 0) return;
    std::lock_guard<std::mutex> lock(mutex);
    woken.notify_all();
}

Team::Team(int threads) : threads_(threads), shares_(static_cast<size_t>(threads)) { start(); }

Team::~Team() {
    if (getpid() == process_)
        stop();
    else
        abandon();
}

void Team::start() {
    process_ = getpid();
    try {
        for (int i = 1; i < threads_; i++) helpers_.emplace_back(&Team::help, this, i);
    } catch (...) {
        stop();
        throw;
    }
}

void Team::stop() {
    stopping_ = true;
    helpers_bed_->wake();
    for (std::thread& helper : helpers_) helper.join();
    helpers_.clear();
}

// After a fork: the helpers are not there, and what they slept on may be locked for ever, so it is left behind.
void Team::abandon() {
    for (std::thread& helper : helpers_) helper.detach();
    helpers_.clear();
    helpers_bed_.release();
    leader_bed_.release();
    helpers_bed_.reset(new Bed);
    leader_bed_.reset(new Bed);
}

void Team::lead(const Job& job) {
    if (getpid() != process_) {
        abandon();
        start();
    }
    const uint32_t number = shares_[0].number() + 1;
    undone_.store(job.pieces, std::memory_order_relaxed);
    for (int t = 0; t < threads_; t++) {
        const uint64_t all = job.pieces;
        const uint64_t left = all * (t + 1) / threads_ - all * t / threads_;
        shares_[t].call.store(job.call, std::memory_order_relaxed);
        shares_[t].closure.store(job.closure, std::memory_order_relaxed);
        shares_[t].pieces.store(job.pieces, std::memory_order_relaxed);
        shares_[t].left.store(static_cast<uint64_t>(number) << 32 | left);
    }
    helpers_bed_->wake();
    work(number, job, 0);
    leader_bed_->wait([&] { return undone_.load() == 0; });
}

void Team::help(int thread) {
    const Share& own = shares_[thread];
    uint32_t seen = own.number();
    for (;;) {
        helpers_bed_->wait([&] { return own.number() != seen || stopping_.load(); });
        if (stopping_.load()) return;
        seen = own.number();
        work(seen, {own.call.load(std::memory_order_relaxed), own.closure.load(std::memory_order_relaxed),
                    own.pieces.load(std::memory_order_relaxed)},
             thread);
    }
}

// Its own share first, so that memory is read in long runs, then what others have left.
void Team::work(uint32_t number, const Job& job, int thread) {
    int done = 0;
    for (int turn = 0; turn < threads_; turn++) {
        const int owner = (thread + turn) % threads_;
        std::atomic<uint64_t>& share = shares_[owner].left;
        const int end = static_cast<int>(static_cast<int64_t>(job.pieces) * (owner + 1) / threads_);
        uint64_t left = share.load(std::memory_order_relaxed);
        while (left >> 32 == number && static_cast<uint32_t>(left) > 0) {
            if (!share.compare_exchange_weak(left, left - 1)) continue;
            job.call(job.closure, end - static_cast<int>(static_cast<uint32_t>(left)), thread);
            done++;
            left = share.load(std::memory_order_relaxed);
        }
    }
    if (done > 0 && undone_.fetch_sub(done) == done) leader_bed_->wake();
}

}  // namespace wh
