#include <cstdlib>
#include <new>

#include "linear.h"
#include "threads.h"

struct wh_team {
    explicit wh_team(int threads) : team(threads) {}
    ~wh_team() { std::free(scratch); }

    wh::Team team;
    void* scratch = nullptr;  // grows to the largest call
    size_t held = 0;
};

int32_t wh_version(void) { return 1; }

const char* wh_instructions(void) {
#if defined(__AVX512F__)
    return "avx512";
#elif defined(__AVX2__)
    return "avx2";
#elif defined(__aarch64__)
    return "neon";
#else
    return "portable";
#endif
}

wh_team* wh_team_create(int32_t threads) {
    try {
        return new wh_team(threads);
    } catch (...) {
        return nullptr;
    }
}

void wh_team_free(wh_team* team) { delete team; }

int32_t wh_linear(wh_team* team, const wh_matrix* w, const float* x, int32_t rows, float* y) {
    const size_t needed = (wh::prepared_bytes(*w, rows) + 63) / 64 * 64;
    if (needed > team->held) {
        std::free(team->scratch);
        team->scratch = std::aligned_alloc(64, needed);
        team->held = team->scratch ? needed : 0;
        if (!team->scratch) return -1;
    }
    const int piece = wh::piece_outputs(*w, rows), pieces = (w->n + piece - 1) / piece;
    team->team.run([&](wh::Worker& worker) {
        if (needed) {
            worker.share(rows, [&](int row) { wh::prepare(*w, x, w->k, row, row + 1, rows, team->scratch); });
        }
        worker.share(pieces, [&](int i) {
            const int n0 = i * piece, n1 = n0 + piece < w->n ? n0 + piece : w->n;
            wh::multiply(*w, x, w->k, team->scratch, rows, n0, n1, y, w->n, false);
        });
    });
    return 0;
}
