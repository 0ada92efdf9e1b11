// Softmax attention: query rows against blocks of 16 keys, with an exact softmax that runs along.
//
// Scores of a few blocks are computed, turned into weights, and used for the values, while the blocks are in the
// nearest cache.
#include "attention.h"

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "attend_products.h"

namespace wh {
namespace {

constexpr int kCopied = kLanes == 16 ? 24 : 3 * kQueryRows;  // rows from which 16 bits are worth a copy in 32
constexpr int kWeighed = kLanes == 16 ? 4 : 2;  // vectors of scores at once, for which there are registers
constexpr float kSlack = 4;  // a score may be so much above `top`: its weight is a number as exact as any

// 2^r for |r| <= 1/2, the best of its degree that ends in 1.
constexpr float kPower[] = {1.3264711784e-3f, 9.6715133767e-3f, 5.5507338151e-2f, 2.4022242070e-1f, 6.9314697752e-01f, 1};

// 2^x of N vectors with x <= 100, in step since each is one long chain: 0 below -125, NaN for NaN; to two units in the
// last place.
template <int N>
inline void powers(vec (&x)[N]) {
    const vec magic = splat(12582912.0f), low = splat(-125.5f);
    vec n[N], r[N], p[N];
    WH_UNROLL for (int i = 0; i < N; i++) n[i] = x[i] + magic;  // the last bits are the nearest integer
    WH_UNROLL for (int i = 0; i < N; i++) r[i] = x[i] - (n[i] - magic);
    WH_UNROLL for (int i = 0; i < N; i++) p[i] = fma(splat(kPower[0]), r[i], splat(kPower[1]));
    WH_UNROLL for (int k = 2; k < 6; k++)
        WH_UNROLL for (int i = 0; i < N; i++) p[i] = fma(p[i], r[i], splat(kPower[k]));
    WH_UNROLL for (int i = 0; i < N; i++)
        x[i] = x[i] < low ? vec{} : (vec)((uvec)p[i] + ((uvec)n[i] << 23));
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

// What is known of a tile's rows so far: the scores that weights are relative to, and the sums of weights by lane.
struct Running {
    float top[kTileRows];
    vec total[kTileRows];
};

// Takes the largest of a row's scores for its `top`; rescales its sums.
WH_COLD void raise(const Tile& tile, int row, int wide, vec most, Running& running) {
    const float top = reduce_max(most), before = running.top[row];
    running.top[row] = top;
    if (before == -INFINITY) return;  // sums are zeros still
    const float shrink = std::exp2(before - top);
    float* y = tile.y + row * wide;
    for (int c = 0; c < wide; c += kLanes) store(y + c, splat(shrink) * load(y + c));
    running.total[row] *= splat(shrink);
}

// Turns N vectors of scores into weights: their sum.
template <int N>
inline vec weights(float* s, vec top) {
    vec w[N];
    WH_UNROLL for (int i = 0; i < N; i++) w[i] = load(s + i * kLanes) - top;
    powers(w);
    WH_UNROLL for (int i = 0; i < N; i++) store(s + i * kLanes, w[i]);
    WH_UNROLL for (int i = 1; i < N; i++) w[0] += w[i];
    return w[0];
}

// Turns a row's scores into weights; that of a NaN is NaN.
WH_INLINE void weigh(const Tile& tile, int row, int wide, int count, float* s, Running& running) {
    vec most = splat(running.top[row]);
    for (int i = 0; i < count; i += kBlock)
        WH_UNROLL for (int j = 0; j < kBlock; j += kLanes) most = max(load(s + i + j), most);  // no NaN stays
    if (any_greater(most, splat(running.top[row] + kSlack))) raise(tile, row, wide, most, running);
    const vec top = splat(running.top[row] == -INFINITY ? 0 : running.top[row]);
    vec sum = running.total[row];
    int i = 0;
    for (; i + kWeighed * kLanes <= count; i += kWeighed * kLanes) sum += weights<kWeighed>(s + i, top);
    for (; i < count; i += kLanes) sum += weights<1>(s + i, top);
    running.total[row] = sum;
}

// Weights times the scales of their values: floats, or what they are in pairs of integers.
WH_INLINE void scale_weights(const float* v_scale, const Span& span, float* row, int16_t* shorts, float* grain) {
    vec most = {};
    for (int b = 0; b < span.count; b++) {
        for (int i = 0; i < kBlock; i += kLanes) {
            const vec w = load(row + b * kBlock + i) * load(v_scale + span.slot[b] + i);
            store(row + b * kBlock + i, w);
            most = max(w, most);  // no NaN stays: the sum of the weights has it
        }
    }
    const float top = reduce_max(most);
    *grain = top / kMost;
    const vec factor = splat(top > kLeast ? kMost / top : 0);
    for (int i = 0; i < span.count * kBlock; i += kLanes) store_shorts(shorts + i, round_to_int(load(row + i) * factor));
}

// Blocks of `steps` times `width` pairs in float32, one after the other.
void copy_blocks(const HalfPair* const* from, int count, int steps, int width, float* to, const float** blocks) {
    const size_t each = static_cast<size_t>(2) * steps * width;
    for (int b = 0; b < kBlocks; b++) {
        blocks[b] = to + std::min(b, count - 1) * each;
        if (b >= count) continue;
        for (int i = 0; i < steps; i++) {
            for (int c = 0; c < width; c += kLanes) {
                const HalfPair* pairs = from[b] + i * width + c;
                float* line = to + b * each + static_cast<size_t>(2) * i * width + c;
                store(line, load_first(pairs));
                store(line + width, load_second(pairs));
            }
        }
    }
}

// What is read after the keys and after the values of a span.
struct Next {
    const void *values, *keys;
};

template <class T>
void read_blocks(const Tile& tile, const Keys& keys, Reach reach, const Span& span, bool plain, const T* const* k,
                 const T* const* v, Next next, Running& running) {
    alignas(64) float s[kTileRows * kSpan];
    const Queries<T> q{static_cast<const Number<T>*>(tile.q), tile.grain, steps_of<T>(keys.dim)};
    const int wide = round_up(keys.dim, kBlock), count = span.count * kBlock;
    score(q, tile.rows, k, span.count, static_cast<const char*>(next.values), s);
    for (int r = 0; r < tile.rows; r++) {
        if (!plain) adjust(tile, r, keys, reach, span, s + r * kSpan);
        weigh(tile, r, wide, count, s + r * kSpan, running);
    }
    if constexpr (std::is_same_v<T, BytePair>) {
        alignas(64) int32_t pairs[kTileRows * kRow<BytePair>];
        float grain[kTileRows];
        for (int r = 0; r < tile.rows; r++)
            scale_weights(keys.v_scale, span, s + r * kSpan, reinterpret_cast<int16_t*>(pairs + r * kRow<BytePair>), grain + r);
        add(Weights<T>{pairs, grain}, tile.rows, v, wide, span.count, static_cast<const char*>(next.keys), tile.y);
    } else {
        add(Weights<T>{s, nullptr}, tile.rows, v, wide, span.count, static_cast<const char*>(next.keys), tile.y);
    }
}

template <class T>
void read_span(const Tile& tile, const Keys& keys, Reach reach, const Span& span, bool plain, int slot, int last,
               Running& running) {
    const int steps = steps_of<T>(keys.dim), wide = round_up(keys.dim, kBlock);
    const T *k[kBlocks], *v[kBlocks];
    const auto key = [&](int slot) { return static_cast<const T*>(keys.k) + static_cast<size_t>(slot) * steps; };
    for (int b = 0; b < kBlocks; b++) {
        const int at = span.slot[std::min(b, span.count - 1)];
        k[b] = key(at);
        v[b] = static_cast<const T*>(keys.v) + static_cast<size_t>(at) / kTogether<T> * wide;
    }
    if constexpr (std::is_same_v<T, HalfPair>) {
        if (tile.rows >= kCopied) {
            const float *keys_copy[kBlocks], *values_copy[kBlocks];
            Keys even = keys;
            even.dim = 2 * steps;
            copy_blocks(k, span.count, steps, kBlock, tile.spare, keys_copy);
            copy_blocks(v, span.count, kBlock / 2, wide, tile.spare + kSpan * even.dim, values_copy);
            return read_blocks<float>(tile, even, reach, span, plain, keys_copy, values_copy, {nullptr, nullptr}, running);
        }
    }
    read_blocks(tile, keys, reach, span, plain, k, v, {v[0], slot < last ? key(slot) : keys.next}, running);
}

template <class T>
void read_slots(const Tile& tile, const Keys& keys, Reach reach, int first, int last, Running& running) {
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
        if (span.count) read_span<T>(tile, keys, reach, span, plain, slot, last, running);
    }
}

}  // namespace

void attend(const Tile& tile, const Keys& keys, Reach reach, int first, int last) {
    std::fill_n(tile.y, static_cast<size_t>(tile.rows) * round_up(keys.dim, kBlock), 0.0f);
    Running running;
    std::fill_n(running.top, tile.rows, -INFINITY);
    std::fill_n(running.total, tile.rows, vec{});
    if (keys.format == WH_FLOAT32)
        read_slots<float>(tile, keys, reach, first, last, running);
    else if (keys.format == WH_BFLOAT16)
        read_slots<HalfPair>(tile, keys, reach, first, last, running);
    else
        read_slots<BytePair>(tile, keys, reach, first, last, running);
    for (int row = 0; row < tile.rows; row++) {
        tile.top[row] = running.top[row];
        tile.total[row] = reduce_add(running.total[row]);
    }
}

}  // namespace wh
