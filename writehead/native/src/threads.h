// A team of threads that runs one region at a time, and what its threads do inside: share pieces and wait.
#ifndef WRITEHEAD_THREADS_H
#define WRITEHEAD_THREADS_H

#include <atomic>
#include <cstdint>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

namespace wh {

class Team;

// One thread's part in a region. All threads of a region make the same calls of `share` and `wait` in order.
class Worker {
  public:
    Worker(Team& team, int index) : team_(team), index_(index) {}

    int index() const { return index_; }
    int threads() const;

    // Returns when every thread has arrived; what they wrote before is then visible.
    void wait();

    // Calls piece(i) once for each i in [0, pieces), on whichever thread is free, and waits for all of them.
    template <class Piece>
    void share(int pieces, const Piece& piece);

  private:
    Team& team_;
    int index_;
    int shares_ = 0;
};

class Team {
  public:
    explicit Team(int threads);
    ~Team();
    Team(const Team&) = delete;
    Team& operator=(const Team&) = delete;

    int threads() const { return threads_; }

    // Runs body(worker) on every thread, the caller included, and returns when all are done.
    template <class Body>
    void run(const Body& body) {
        run_erased([](const void* closure, Worker& worker) { (*static_cast<const Body*>(closure))(worker); }, &body);
    }

  private:
    friend class Worker;
    typedef void (*Erased)(const void*, Worker&);

    // Pieces of one thread's range that nobody has claimed yet; alone on its cache line.
    struct alignas(64) Range {
        std::atomic<int> next{0};
    };

    void run_erased(Erased body, const void* closure);
    void start();
    void stop();
    void serve(int index, uint32_t seen);
    void arrive();
    void await(const std::atomic<uint32_t>& value, uint32_t old);
    void wake();

    int threads_;
    long process_ = 0;  // threads do not survive a fork
    Erased body_ = nullptr;
    const void* closure_ = nullptr;
    bool stopping_ = false;
    std::vector<Range> ranges_;  // two sets: one in use, one being cleared
    std::vector<std::thread> others_;
    alignas(64) std::atomic<uint32_t> regions_{0};
    alignas(64) std::atomic<uint32_t> barriers_{0};
    alignas(64) std::atomic<int> arrived_{0};
    alignas(64) std::atomic<int> sleepers_{0};
    std::mutex mutex_;
    std::condition_variable changed_;
};

inline int Worker::threads() const { return team_.threads_; }
inline void Worker::wait() { team_.arrive(); }

template <class Piece>
void Worker::share(int pieces, const Piece& piece) {
    const int threads = team_.threads_;
    if (threads == 1) {
        for (int i = 0; i < pieces; i++) piece(i);
        return;
    }
    Team::Range* ranges = &team_.ranges_[shares_++ % 2 * threads];
    // its own range first, so that memory is read in long runs, then what others have left
    for (int turn = 0; turn < threads; turn++) {
        const int owner = (index_ + turn) % threads;
        const int first = static_cast<int>(static_cast<long>(pieces) * owner / threads);
        const int count = static_cast<int>(static_cast<long>(pieces) * (owner + 1) / threads) - first;
        if (ranges[owner].next.load(std::memory_order_relaxed) >= count) continue;
        for (int i; (i = ranges[owner].next.fetch_add(1, std::memory_order_relaxed)) < count;) piece(first + i);
    }
    team_.arrive();
    ranges[index_].next.store(0, std::memory_order_relaxed);  // the next share uses the other set
}

}  // namespace wh
#endif
