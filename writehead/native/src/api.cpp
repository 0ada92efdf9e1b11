#include "linear.h"
#include "team.h"

int32_t wh_version(void) { return 4; }

const char* wh_instructions(void) {
#if defined(__AVX512F__)
    return "avx512";
#elif defined(__AVX2__)
    return "avx2";
#elif defined(__ARM_FEATURE_DOTPROD)
    return "dotprod";
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
    const size_t needed = wh::prepared_bytes(*w, rows);
    try {
        team->scratch.reserve(needed);
    } catch (...) {
        return WH_NO_MEMORY;
    }
    void* scratch = team->scratch.data();
    const wh::Pieces pieces(*w, rows, wh::kBlock);
    if (needed) team->team.share(rows, [&](int row) { wh::prepare(*w, x, w->k, row, row + 1, rows, scratch); });
    team->team.share(pieces.count(), [&](int i) { wh::multiply(*w, x, scratch, rows, pieces[i], y, w->n, false); });
    return WH_DONE;
}

int32_t wh_attend(wh_team* team, const wh_cache* cache, int32_t layer, int32_t layers, int32_t rows, int32_t tokens,
                  const float* q, const int32_t* pos, float scale, int32_t window, int32_t lead, const float* slopes,
                  float* y) {
    const int apart = cache->heads * cache->head_dim, count = rows * tokens;
    try {
        std::vector<wh::Token> all;
        for (int i = 0; i < count; i++) all.push_back({i / tokens, pos[i]});
        team->lookup.plan(*cache, all, team->team.threads());
    } catch (...) {
        return WH_NO_MEMORY;
    }
    for (int i = 0; i < layers; i++, y += static_cast<size_t>(count) * apart) {
        team->lookup.read(team->team, {layer + i, {window, lead}, scale, slopes}, q, apart);
        team->team.share(count, [&](int token) { team->lookup.collect(token, y + static_cast<size_t>(token) * apart); });
    }
    return WH_DONE;
}
