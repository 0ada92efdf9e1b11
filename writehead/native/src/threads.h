// A team of threads that shares the pieces of a job. The caller leads: it runs everything between the jobs, and a
// helper touches a job only while it holds one of its pieces. So a helper that has lost its core delays a job by at
// most the piece it holds, and one that comes late finds the work done and nothing to wait for.
#ifndef WRITEHEAD_THREADS_H
#define WRITEHEAD_THREADS_H

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <type_traits>
#include <vector>

namespace wh {

class Team {
  public:
    // Throws std::system_error if the threads cannot be started.
    explicit Team(int threads);
    ~Team();
    Team(const Team&) = delete;
    Team& operator=(const Team&) = delete;

    int threads() const { return threads_; }

    // Calls piece(i), or piece(i, thread), once for each i in [0, pieces), and returns when all are done; what they
    // wrote is then visible to the caller and to later jobs. `thread` is below threads(): two pieces that run at
    // the same time have different ones. Not to be called inside a piece.
    template <class Piece>
    void share(int pieces, const Piece& piece) {
        const auto call = [](const void* closure, int i, int thread) {
            const Piece& piece = *static_cast<const Piece*>(closure);
            if constexpr (std::is_invocable_v<const Piece&, int, int>) {
                piece(i, thread);
            } else {
                piece(i);
            }
        };
        if (threads_ == 1 || pieces <= 1) {
            for (int i = 0; i < pieces; i++) call(&piece, i, 0);
        } else {
            lead({call, &piece, pieces});
        }
    }

  private:
    typedef void (*Call)(const void*, int, int);

    struct Job {
        Call call = nullptr;
        const void* closure = nullptr;
        int pieces = 0;
    };

    // What one thread needs to know of the job of the moment, in one cache line, and the pieces that stand to it: the
    // job's number in the upper half, how many are unclaimed in the lower. A claim lowers that if the job is still the
    // same, so nobody claims a piece of a job that is over; the rest may be read while the next job is written, but then
    // the claim fails.
    struct alignas(64) Share {
        std::atomic<uint64_t> left{0};
        std::atomic<Call> call{nullptr};
        std::atomic<const void*> closure{nullptr};
        std::atomic<int> pieces{0};

        uint32_t number() const { return static_cast<uint32_t>(left.load() >> 32); }
    };

    // Threads asleep until a condition holds.
    struct Bed {
        std::atomic<int> sleepers{0};
        std::mutex mutex;
        std::condition_variable woken;

        template <class Condition>
        void wait(const Condition& holds);
        void wake();
    };

    void lead(const Job& job);
    void help(int thread);
    void work(uint32_t number, const Job& job, int thread);
    void start();
    void stop();
    void abandon();

    const int threads_;
    long process_ = 0;  // threads do not survive a fork
    std::vector<std::thread> helpers_;
    std::vector<Share> shares_;
    std::atomic<bool> stopping_{false};
    alignas(64) std::atomic<int> undone_{0};
    std::unique_ptr<Bed> helpers_bed_{new Bed}, leader_bed_{new Bed};
};

}  // namespace wh
#endif
