// Softmax attention: query rows against blocks of 16 keys, with an exact softmax that runs along.
//
// Scores of a few blocks are computed, turned into weights, and used for the values, while the blocks are in the
// nearest cache. Rows and vectors per step are chosen so that sums stay in registers.
#include "attention.h"

#include <algorithm>
#include <cmath>

#include "linear.h"
#include "vec.h"

namespace wh {
namespace {

constexpr int kBlocks = 4;                    // of keys whose scores stand together
constexpr int kSpan = kBlocks * kBlock;       // scores of a row at a time
constexpr int kPer = kBlock / kLanes;         // vectors of a block
constexpr int kSums = kLanes == 16 ? 24 : 12;                  // registers for sums of values

template <class T>
constexpr int kPerLine = 64 / (kLanes * sizeof(T)) < 1 ? 1 : 64 / (kLanes * sizeof(T));  // vectors of a cache line

constexpr int blocks_at_once(int rows) { return kLanes == 16 ? (rows <= 4 ? 4 : 2) : kLanes == 8 && rows <= 3 ? 2 : 1; }

inline vec widen(const float* from) { return load(from); }
inline vec widen(const uint16_t* from) { return load_bf16(from); }
inline vec widen(const int8_t* from) {
#if defined(__AVX512F__)
    return to_float((ivec)_mm512_cvtepi8_epi32(load_as<__m128i>(from)));
#elif defined(__AVX2__)
    return to_float((ivec)_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
#else
    return to_float(__builtin_convertvector(load_as<quarter>(from), ivec));
#endif
}

// e^x for x <= 0 to two units in the last place; 0 below -87.
inline vec exp_below(vec x) {
    const vec low = splat(-87.0f);
    const vec bounded = max(x, low);
    const ivec n = round_to_int(bounded * splat(1.44269504f));
    const vec whole = to_float(n);
    const vec r = fma(whole, splat(2.12194440e-4f), fma(whole, splat(-0.693359375f), bounded));
    vec p = splat(1.9875691500e-4f);
    p = fma(p, r, splat(1.3981999507e-3f));
    p = fma(p, r, splat(8.3334519073e-3f));
    p = fma(p, r, splat(4.1665795894e-2f));
    p = fma(p, r, splat(1.6666665459e-1f));
    p = fma(p, r, splat(5.0000001201e-1f));
    p = fma(p * r, r, r) + splat(1.0f);
    return x < low ? vec{} : p * as_float((n + 127) << 23);
}

// Scores of ROWS queries and BLOCKS blocks; what lies `ahead` is fetched meanwhile.
template <int ROWS, int BLOCKS, class T>
void score(const float* q, int dim, const T* const* k, size_t ahead, float* s) {
    vec sums[ROWS][BLOCKS * kPer] = {};
    for (int d = 0; d < dim; d++) {
        vec key[BLOCKS * kPer];
        WH_UNROLL for (int j = 0; j < BLOCKS * kPer; j++)
            key[j] = widen(k[j / kPer] + d * kBlock + j % kPer * kLanes);
        WH_UNROLL for (int b = 0; b < BLOCKS; b++) __builtin_prefetch(k[b] + d * kBlock + ahead, 0, 2);
        WH_UNROLL for (int r = 0; r < ROWS; r++) {
            const vec x = splat(q[d * kQueryRows + r]);
            WH_UNROLL for (int j = 0; j < BLOCKS * kPer; j++) sums[r][j] = fma(x, key[j], sums[r][j]);
        }
    }
    WH_UNROLL for (int r = 0; r < ROWS; r++)
        WH_UNROLL for (int j = 0; j < BLOCKS * kPer; j++) store(s + r * kSpan + j * kLanes, sums[r][j]);
}

template <int ROWS, class T>
void score_rows(const float* q, int dim, int rows, const T* const* k, int blocks, size_t ahead, float* s) {
    if constexpr (ROWS > 0) {
        if (rows < ROWS) return score_rows<ROWS - 1>(q, dim, rows, k, blocks, ahead, s);
        constexpr int kAtOnce = blocks_at_once(ROWS);
        // blocks beyond the last are copies of it, whose scores nobody reads
        for (int b = 0; b < blocks; b += kAtOnce) score<ROWS, kAtOnce>(q, dim, k + b, ahead, s + b * kBlock);
    }
}

// Adds the values of `blocks` blocks, weighted by w, to COLS vectors of ROWS sums.
template <int ROWS, int COLS, class T>
void add_values(const float* w, const T* const* v, int wide, int blocks, size_t ahead, float* y) {
    vec sums[ROWS][COLS];
    WH_UNROLL for (int r = 0; r < ROWS; r++)
        WH_UNROLL for (int c = 0; c < COLS; c++) sums[r][c] = load(y + r * wide + c * kLanes);
    for (int b = 0; b < blocks; b++) {
        for (int key = 0; key < kBlock; key++) {
            vec value[COLS];
            WH_UNROLL for (int c = 0; c < COLS; c++) value[c] = widen(v[b] + key * wide + c * kLanes);
            WH_UNROLL for (int c = 0; c < COLS; c += kPerLine<T>) {
                __builtin_prefetch(v[b] + key * wide + c * kLanes + ahead, 0, 2);
            }
            WH_UNROLL for (int r = 0; r < ROWS; r++) {
                const vec x = splat(w[r * kSpan + b * kBlock + key]);
                WH_UNROLL for (int c = 0; c < COLS; c++) sums[r][c] = fma(x, value[c], sums[r][c]);
            }
        }
    }
    WH_UNROLL for (int r = 0; r < ROWS; r++)
        WH_UNROLL for (int c = 0; c < COLS; c++) store(y + r * wide + c * kLanes, sums[r][c]);
}

template <int ROWS, int COLS, class T>
void add_rows(const float* w, int rows, const T* const* v, int wide, int blocks, size_t ahead, float* y) {
    if constexpr (ROWS > 0) {
        if (rows < ROWS) return add_rows<ROWS - 1, COLS>(w, rows, v, wide, blocks, ahead, y);
        add_values<ROWS, COLS>(w, v, wide, blocks, ahead, y);
    }
}

template <int COLS, class T>
void add_columns(const float* w, int rows, const T* const* v, int wide, int blocks, size_t ahead, float* y) {
    constexpr int kAtOnce = kSums / COLS < 8 ? kSums / COLS : 8;
    for (int r = 0; r < rows; r += kAtOnce) {
        const int some = std::min(kAtOnce, rows - r);
        add_rows<kAtOnce, COLS>(w + r * kSpan, some, v, wide, blocks, r ? 0 : ahead, y + r * wide);
    }
}

template <class T>
void add(const float* w, int rows, const T* const* v, int wide, int blocks, size_t ahead, float* y) {
    int c = 0;
    const T* at[kBlocks];
    const auto move = [&] {
        for (int b = 0; b < blocks; b++) at[b] = v[b] + c;
        return at;
    };
    for (; c + 4 * kLanes <= wide; c += 4 * kLanes) add_columns<4>(w, rows, move(), wide, blocks, ahead, y + c);
    for (; c + 2 * kLanes <= wide; c += 2 * kLanes) add_columns<2>(w, rows, move(), wide, blocks, ahead, y + c);
    for (; c < wide; c += kLanes) add_columns<1>(w, rows, move(), wide, blocks, ahead, y + c);
}

// The positions that the queries of a tile reach: some of them or all of them.
struct Bounds {
    int first, last;    // of the queries
    int oldest, newest; // what every query reads: positions in [oldest, newest] ...
    int from;           // what some query reads: positions from here (or in the lead) up to `last`
};

Bounds bounds(const Tile& tile, Reach reach) {
    const auto [first, last] = std::minmax_element(tile.pos, tile.pos + tile.rows);
    Bounds b{*first, *last, 0, *first, 0};
    if (reach.window > 0) {
        b.oldest = std::max(0, *last - reach.window + 1);
        b.from = *first - reach.window + 1;
    }
    return b;
}

enum Read { kNone, kSome, kAll };

// Do queries read nothing, something or everything of 16 slots?
Read reads(const int32_t* pos, const Bounds& b, Reach reach) {
    int any = 0, all = 1;
    for (int i = 0; i < kBlock; i++) {
        const int p = pos[i];
        any |= (p >= 0) & (p <= b.last) & ((p >= b.from) | (p < reach.lead));
        all &= (p >= 0) & (p <= b.newest) & ((p >= b.oldest) | (p < reach.lead));
    }
    return all ? kAll : any ? kSome : kNone;
}

// A few blocks of the cache that a tile reads.
struct Span {
    int count = 0;
    int slot[kBlocks];
    Read read[kBlocks];
};

// Scales, penalties and masks of one row's scores.
void adjust(const Tile& tile, int row, const Keys& keys, Reach reach, const Span& span, float* s) {
    const ivec q = splat_int(tile.pos[row]);
    const ivec oldest = splat_int(reach.window > 0 ? tile.pos[row] - reach.window + 1 : 0);
    const ivec lead = splat_int(reach.lead);
    const vec nothing = splat(-INFINITY);
    for (int b = 0; b < span.count; b++) {
        for (int i = 0; i < kBlock; i += kLanes) {
            const int slot = span.slot[b] + i;
            vec x = load(s + b * kBlock + i);
            const ivec p = load_as<ivec>(keys.pos + slot);
            if (keys.k_scale) x *= load(keys.k_scale + slot);
            if (tile.slope) x = fma(splat(tile.slope[row]), to_float(p - q), x);
            if (span.read[b] != kAll) {
                const ivec open = (p >= 0) & (p <= q) & ((p >= oldest) | (p < lead));
                x = open ? x : nothing;
            }
            store(s + b * kBlock + i, x);
        }
    }
}

// Turns a row's scores into weights; rescales its sums where a larger score than before turns up.
void weigh(const Tile& tile, int row, int wide, int count, float* s) {
    vec most = load(s);
    for (int i = kLanes; i < count; i += kLanes) most = max(most, load(s + i));
    const float top = std::max(tile.top[row], reduce_max(most));
    if (top == -INFINITY) {
        for (int i = 0; i < count; i += kLanes) store(s + i, vec{});
        return;
    }
    if (top > tile.top[row]) {
        const float shrink = std::exp(tile.top[row] - top);
        float* y = tile.y + row * wide;
        for (int c = 0; c < wide; c += kLanes) store(y + c, splat(shrink) * load(y + c));
        tile.total[row] *= shrink;
        tile.top[row] = top;
    }
    vec sum{};
    for (int i = 0; i < count; i += kLanes) {
        const vec w = exp_below(load(s + i) - splat(top));
        sum += w;
        store(s + i, w);
    }
    tile.total[row] += reduce_add(sum);
}

template <class T>
void read_span(const Tile& tile, const Keys& keys, Reach reach, const Span& span, bool plain) {
    alignas(64) float s[kTileRows * kSpan];
    const int wide = round_up(keys.dim, kBlock), count = span.count * kBlock;
    const T *k[kBlocks], *v[kBlocks];
    for (int b = 0; b < kBlocks; b++) {
        const int slot = span.slot[std::min(b, span.count - 1)];
        k[b] = static_cast<const T*>(keys.k) + static_cast<size_t>(slot) * keys.dim;
        v[b] = static_cast<const T*>(keys.v) + static_cast<size_t>(slot) * wide;
    }
    for (int r = 0; r < tile.rows; r += kQueryRows) {
        const int rows = std::min(kQueryRows, tile.rows - r);
        const size_t ahead = r ? 0 : static_cast<size_t>(count) * keys.dim;
        score_rows<kQueryRows>(tile.q + r * keys.dim, keys.dim, rows, k, span.count, ahead, s + r * kSpan);
    }
    for (int r = 0; r < tile.rows; r++) {
        float* row = s + r * kSpan;
        if (!plain) adjust(tile, r, keys, reach, span, row);
        weigh(tile, r, wide, count, row);
        if (keys.v_scale)
            for (int i = 0; i < count; i += kLanes)
                store(row + i, load(row + i) * load(keys.v_scale + span.slot[i / kBlock] + i % kBlock));
    }
    add(s, tile.rows, v, wide, span.count, static_cast<size_t>(count) * wide, tile.y);
}

template <class T>
void read_slots(const Tile& tile, const Keys& keys, Reach reach, int first, int last) {
    const Bounds b = bounds(tile, reach);
    for (int slot = first; slot < last;) {
        Span span;
        bool plain = !tile.slope && !keys.k_scale;
        for (; slot < last && span.count < kBlocks; slot += kBlock) {
            const Read read = reads(keys.pos + slot, b, reach);
            if (read == kNone) continue;
            span.slot[span.count] = slot;
            span.read[span.count++] = read;
            plain &= read == kAll;
        }
        if (span.count) read_span<T>(tile, keys, reach, span, plain);
    }
}

}  // namespace

void attend(const Tile& tile, const Keys& keys, Reach reach, int first, int last) {
    std::fill_n(tile.y, static_cast<size_t>(tile.rows) * round_up(keys.dim, kBlock), 0.0f);
    std::fill_n(tile.top, tile.rows, -INFINITY);
    std::fill_n(tile.total, tile.rows, 0.0f);
    if (keys.format == WH_FLOAT32) return read_slots<float>(tile, keys, reach, first, last);
    if (keys.format == WH_BFLOAT16) return read_slots<uint16_t>(tile, keys, reach, first, last);
    read_slots<int8_t>(tile, keys, reach, first, last);
}

}  // namespace wh
