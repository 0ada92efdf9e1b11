// Softmax attention: query rows against blocks of 16 keys, with an exact softmax that runs along.
//
// Scores of a few blocks are computed, turned into weights, and used for the values, while the blocks are in the
// nearest cache. Rows and vectors per step are chosen so that sums stay in registers.
#include "attention.h"

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "linear.h"
#include "vec.h"

namespace wh {
namespace {

constexpr int kBlocks = kSpan / kBlock;       // of keys whose scores stand together
constexpr int kPer = kBlock / kLanes;         // vectors of a block
constexpr int kSums = kLanes == 16 ? 24 : 12;  // registers for sums
constexpr int kCopied = kLanes == 16 ? 18 : 3 * kQueryRows;  // rows from which narrow keys and values are worth a copy
constexpr int kLine = 64;    // bytes of a cache line
constexpr float kShort = 32767, kLeast = 1e-30f;  // the largest of 16 bits; weights below are nothing
constexpr float kSlack = 4;  // a score may be so much above `top`: its weight is a number as exact as any

// Where the sums of 2 blocks fit, those of 4 may not.
constexpr int blocks_at_once(int rows) {
    return rows * 4 * kPer <= kSums ? 4 : rows * 2 * kPer <= kSums ? 2 : 1;
}

inline vec widen(const float* from) { return load(from); }
inline vec widen(const uint16_t* from) { return load_bf16(from); }
inline svec widen(const Pair* from) { return load_pairs(from); }

// How keys and values of a format are multiplied: each number on its own in float32, or in pairs of integers, with
// queries and weights rounded to 16 bits of the largest of their row.
template <class T>
struct Products {
    typedef vec Sum;
    typedef float Number;
    static constexpr int kTogether = 1;  // numbers of a key, or keys of a value
};
template <>
struct Products<Pair> {
    typedef ivec Sum;
    typedef int32_t Number;
    static constexpr int kTogether = 2;
};
template <class T>
using Sum = typename Products<T>::Sum;
template <class T>
using Number = typename Products<T>::Number;
template <class T>
constexpr int kTogether = Products<T>::kTogether;
template <class T>
constexpr int kSteps = kBlock / kTogether<T>;  // of a block of values
template <class T>
int steps_of(int dim) { return (dim + kTogether<T> - 1) / kTogether<T>; }
template <class T>
constexpr int kRow = kSpan / kTogether<T>;  // numbers from one row of weights to the next

inline vec same(float x) { return splat(x); }
inline ivec same(int32_t x) { return splat_int(x); }

// What sums stand for: integers are worth `grain` each.
inline vec worth(vec sum, const float*) { return sum; }
inline vec worth(ivec sum, const float* grain) { return to_float(sum) * splat(*grain); }

// Sums go on from y, or come on top of it in the end.
inline void begin(vec& sum, const float* y) { sum = load(y); }
inline void begin(ivec& sum, const float*) { sum = ivec{}; }
inline void end(vec sum, const float*, float* y) { store(y, sum); }
inline void end(ivec sum, const float* grain, float* y) { store(y, fma(to_float(sum), splat(*grain), load(y))); }

// 2^r for |r| <= 1/2, the best of its degree.
constexpr float kPower[] = {1.5353361960e-4f, 1.3398875017e-3f, 9.6184369177e-3f, 5.5503323674e-2f,
                            2.4022647738e-1f, 6.9314718246e-1f, 1};

// e^x of N vectors with x <= 80, in step since each is one long chain: 0 below -87, NaN for NaN; to a grain in the last
// place, and one more for each 10 that x lies below 0.
template <int N>
inline void exp_below(vec (&x)[N]) {
    const vec magic = splat(12582912.0f), low = splat(-87.0f), log2e = splat(1.44269504f);
    vec n[N], r[N], p[N];
    WH_UNROLL for (int i = 0; i < N; i++) n[i] = fma(x[i], log2e, magic);  // the last bits are the nearest integer
    WH_UNROLL for (int i = 0; i < N; i++) r[i] = fma(x[i], log2e, magic - n[i]);
    WH_UNROLL for (int i = 0; i < N; i++) p[i] = fma(splat(kPower[0]), r[i], splat(kPower[1]));
    WH_UNROLL for (int k = 2; k < 7; k++)
        WH_UNROLL for (int i = 0; i < N; i++) p[i] = fma(p[i], r[i], splat(kPower[k]));
    WH_UNROLL for (int i = 0; i < N; i++)
        x[i] = x[i] < low ? vec{} : (vec)((uvec)p[i] + ((uvec)n[i] << 23));
}

// Adds x times some vectors to a row's sums; one vector reads x from memory, more of them from a register.
template <int N, class Sum, class Wide, class Number>
inline void add_row(Sum (&sums)[N], const Wide (&by)[N], const Number* x) {
    if constexpr (N == 1) {
        sums[0] = add_product(sums[0], by[0], x);
    } else {
        const Sum number = same(*x);
        WH_UNROLL for (int j = 0; j < N; j++) sums[j] = add_product(sums[j], by[j], number);
    }
}

// Lines to fetch while something is computed, F at a time: `apart` bytes lie between those.
struct Ahead {
    const char* from;
    size_t apart;
};

template <int F>
inline void fetch(Ahead ahead, size_t at) {
    WH_UNROLL for (int f = 0; f < F; f++) __builtin_prefetch(ahead.from + f * ahead.apart + at, 0, 2);
}

// How `streams` of lines are shared out among `passes` over them: pass number i fetches every `passes`-th from the i-th on.
template <class Pass>
void with_fetches(const char* next, size_t apart, int streams, int passes, int i, const Pass& pass) {
    const int some = next && i < streams ? (streams - i + passes - 1) / passes : 0;
    const Ahead ahead{next + (next ? i * apart : 0), passes * apart};
    switch (some) {
        case 0: return pass(std::integral_constant<int, 0>(), ahead);
        case 1: return pass(std::integral_constant<int, 1>(), ahead);
        case 2: return pass(std::integral_constant<int, 2>(), ahead);
        default: return pass(std::integral_constant<int, 4>(), ahead);
    }
}

// Query rows, side by side in groups of kQueryRows.
template <class T>
struct Queries {
    const Number<T>* numbers;  // [rows/kQueryRows][steps][kQueryRows]
    const float* grain;         // [rows], what 1 is worth, where numbers are integers
    int steps;                 // of numbers that are multiplied together

    Queries from(int row) const {
        const int group = row / kQueryRows * kQueryRows;
        return {numbers + group * steps + row - group, grain + row, steps};
    }
};

// Scores of ROWS queries and BLOCKS blocks; F lines are fetched when so much of a block was read.
template <int ROWS, int BLOCKS, int F, class T>
void score(Queries<T> q, const T* const* k, Ahead ahead, float* s) {
    constexpr int kAtOnce = kLine / (kBlock * sizeof(T));
    Sum<T> sums[ROWS][BLOCKS * kPer] = {};
    const auto step = [&](int d) {
        decltype(widen(*k)) key[BLOCKS * kPer];
        WH_UNROLL for (int j = 0; j < BLOCKS * kPer; j++)
            key[j] = widen(k[j / kPer] + d * kBlock + j % kPer * kLanes);
        WH_UNROLL for (int r = 0; r < ROWS; r++) add_row(sums[r], key, q.numbers + d * kQueryRows + r);
    };
    int d = 0;
    for (; d + kAtOnce <= q.steps; d += kAtOnce) {
        fetch<F>(ahead, d * kBlock * sizeof(T));
        WH_UNROLL for (int i = 0; i < kAtOnce; i++) step(d + i);
    }
    for (; d < q.steps; d++) step(d);
    WH_UNROLL for (int r = 0; r < ROWS; r++)
        WH_UNROLL for (int j = 0; j < BLOCKS * kPer; j++) store(s + r * kSpan + j * kLanes, worth(sums[r][j], q.grain + r));
}

// Pass number `pass` of `passes` over all blocks, with the next rows each.
template <int ROWS, class T>
void score_rows(Queries<T> q, int rows, const T* const* k, int blocks, const char* next, int pass, int passes,
                float* s) {
    if constexpr (ROWS > 0) {
        if (rows < ROWS) return score_rows<ROWS - 1>(q, rows, k, blocks, next, pass, passes, s);
        constexpr int kAtOnce = blocks_at_once(ROWS);
        const size_t bytes = q.steps * kBlock * sizeof(T);
        // blocks beyond the last are copies of it, whose scores nobody reads
        for (int b = 0; b < blocks; b += kAtOnce) {
            const char* more = next ? next + b * bytes : nullptr;
            with_fetches(more, bytes, kAtOnce, passes, pass, [&](auto lines, Ahead ahead) {
                score<ROWS, kAtOnce, decltype(lines)::value>(q, k + b, ahead, s + b * kBlock);
            });
        }
    }
}

// Rows whose scores are computed at once: where keys must be widened, that is done once for more of them.
template <class T>
constexpr int kScoreRows = kLanes == 16 && sizeof(T) == sizeof(float) ? 6 : kQueryRows;

template <class T>
void score_all(Queries<T> q, int rows, const T* const* k, int blocks, const char* next, float* s) {
    for (int first = 0; first < rows; first += kQueryRows) {
        const int some = std::min(kQueryRows, rows - first), passes = (some + kScoreRows<T> - 1) / kScoreRows<T>;
        for (int pass = 0; pass < passes; pass++) {
            const int r0 = some * pass / passes, r1 = some * (pass + 1) / passes;
            score_rows<kScoreRows<T>>(q.from(first + r0), r1 - r0, k, blocks, first ? nullptr : next, pass, passes,
                                      s + (first + r0) * kSpan);
        }
    }
}

// Weights of a span's keys, for each row.
template <class T>
struct Weights {
    const Number<T>* numbers;  // [rows][kRow]
    const float* grain;         // [rows], as in Queries

    Weights from(int row) const { return {numbers + row * kRow<T>, grain + row}; }
};

// Steps whose values in COLS vectors fill a cache line, or more.
template <int COLS, class T>
constexpr int kStepsALine = COLS * kLanes * sizeof(T) < kLine ? kLine / (COLS * kLanes * sizeof(T)) : 1;

// Adds the values of `blocks` blocks, weighted by w, to COLS vectors of ROWS sums; with F, lines are fetched.
template <int ROWS, int COLS, int F, class T>
void add_values(Weights<T> w, const T* const* v, int wide, int blocks, Ahead ahead, float* y) {
    constexpr int kAtOnce = kStepsALine<COLS, T>;
    Sum<T> sums[ROWS][COLS];
    WH_UNROLL for (int r = 0; r < ROWS; r++)
        WH_UNROLL for (int c = 0; c < COLS; c++) begin(sums[r][c], y + r * wide + c * kLanes);
    const auto step = [&](int b, int i) {
        decltype(widen(*v)) value[COLS];
        WH_UNROLL for (int c = 0; c < COLS; c++) value[c] = widen(v[b] + i * wide + c * kLanes);
        WH_UNROLL for (int r = 0; r < ROWS; r++) add_row(sums[r], value, w.numbers + r * kRow<T> + b * kSteps<T> + i);
    };
    for (int b = 0; b < blocks; b++) {
        for (int i = 0; i < kSteps<T>; i += kAtOnce) {
            fetch<F>(ahead, (b * kSteps<T> + i) * COLS * kLanes * sizeof(T));
            WH_UNROLL for (int j = 0; j < kAtOnce; j++) step(b, i + j);
        }
    }
    WH_UNROLL for (int r = 0; r < ROWS; r++)
        WH_UNROLL for (int c = 0; c < COLS; c++) end(sums[r][c], w.grain + r, y + r * wide + c * kLanes);
}

template <int ROWS, int COLS, int F, class T>
void add_rows(Weights<T> w, int rows, const T* const* v, int wide, int blocks, Ahead ahead, float* y) {
    if constexpr (ROWS > 0) {
        if (rows < ROWS) return add_rows<ROWS - 1, COLS, F>(w, rows, v, wide, blocks, ahead, y);
        add_values<ROWS, COLS, F>(w, v, wide, blocks, ahead, y);
    }
}

// Rows whose sums of so many vectors are in registers.
constexpr int rows_at_once(int cols) { return std::min(kSums / cols, kLanes == 16 ? 16 : 8); }

// Columns from `column` on; what is fetched lies one after the other, so that all columns fetch alike.
template <int COLS, class T>
void add_columns(Weights<T> w, int rows, const T* const* v, int column, int wide, int blocks, const char* next, float* y) {
    constexpr int kLines = COLS * kLanes * sizeof(T) * kStepsALine<COLS, T> / kLine;
    const int passes = (rows + rows_at_once(COLS) - 1) / rows_at_once(COLS);
    const char* more = next ? next + static_cast<size_t>(column) * blocks * kSteps<T> * sizeof(T) : nullptr;
    const T* at[kBlocks];
    for (int b = 0; b < blocks; b++) at[b] = v[b] + column;
    for (int pass = 0; pass < passes; pass++) {
        const int r0 = rows * pass / passes, r1 = rows * (pass + 1) / passes;
        with_fetches(more, kLine, kLines, passes, pass, [&](auto lines, Ahead ahead) {
            add_rows<rows_at_once(COLS), COLS, decltype(lines)::value>(w.from(r0), r1 - r0, at, wide, blocks, ahead,
                                                                     y + r0 * wide + column);
        });
    }
}

// Values that must be widened are taken by few columns for many rows.
template <class T>
void add(Weights<T> w, int rows, const T* const* v, int wide, int blocks, const char* next, float* y) {
    const bool tall = kLanes == 16 && sizeof(T) < sizeof(float);
    int c = 0;
    if (!tall || rows <= rows_at_once(4))
        for (; c + 4 * kLanes <= wide; c += 4 * kLanes) add_columns<4>(w, rows, v, c, wide, blocks, next, y);
    if (!tall || rows <= rows_at_once(2))
        for (; c + 2 * kLanes <= wide; c += 2 * kLanes) add_columns<2>(w, rows, v, c, wide, blocks, next, y);
    for (; c < wide; c += kLanes) add_columns<1>(w, rows, v, c, wide, blocks, next, y);
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
    const float top = reduce_max(most);
    const float shrink = std::exp(running.top[row] - top);
    float* y = tile.y + row * wide;
    for (int c = 0; c < wide; c += kLanes) store(y + c, splat(shrink) * load(y + c));
    running.total[row] *= splat(shrink);
    running.top[row] = top;
}

// Turns N vectors of scores into weights: their sum.
template <int N>
inline vec weights(float* s, vec top) {
    vec w[N];
    WH_UNROLL for (int i = 0; i < N; i++) w[i] = load(s + i * kLanes) - top;
    exp_below(w);
    WH_UNROLL for (int i = 0; i < N; i++) store(s + i * kLanes, w[i]);
    WH_UNROLL for (int i = 1; i < N; i++) w[0] += w[i];
    return w[0];
}

// Turns a row's scores into weights; that of a NaN is NaN.
WH_INLINE void weigh(const Tile& tile, int row, int wide, int count, float* s, Running& running) {
    vec most = splat(running.top[row]);
    for (int i = 0; i < count; i += kLanes) most = max(load(s + i), most);  // no NaN stays
    if (any_greater(most, splat(running.top[row] + kSlack))) raise(tile, row, wide, most, running);
    const vec top = splat(running.top[row] == -INFINITY ? 0 : running.top[row]);
    vec sum = running.total[row];
    int i = 0;
    for (; i + 4 * kLanes <= count; i += 4 * kLanes) sum += weights<4>(s + i, top);
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
    *grain = top / kShort;
    const vec factor = splat(top > kLeast ? kShort / top : 0);
    for (int i = 0; i < span.count * kBlock; i += kLanes) store_shorts(shorts + i, round_to_int(load(row + i) * factor));
}

// Blocks of keys and values in float32, one after the other.
template <class T>
void copy_blocks(const T* const* from, int count, size_t each, float* to, const float** blocks) {
    for (int b = 0; b < kBlocks; b++) {
        blocks[b] = to + std::min(b, count - 1) * each;
        if (b >= count) continue;
        for (size_t i = 0; i < each; i += kLanes) store(to + b * each + i, widen(from[b] + i));
    }
}

// What is read after a span.
struct Next {
    const char *k, *v;
};

template <class T>
void read_blocks(const Tile& tile, const Keys& keys, Reach reach, const Span& span, bool plain, const T* const* k,
                 const T* const* v, Next next, Running& running) {
    alignas(64) float s[kTileRows * kSpan];
    const Queries<T> q{static_cast<const Number<T>*>(tile.q), tile.grain, steps_of<T>(keys.dim)};
    const int wide = round_up(keys.dim, kBlock), count = span.count * kBlock;
    score_all(q, tile.rows, k, span.count, next.k, s);
    for (int r = 0; r < tile.rows; r++) {
        if (!plain) adjust(tile, r, keys, reach, span, s + r * kSpan);
        weigh(tile, r, wide, count, s + r * kSpan, running);
    }
    if constexpr (std::is_same_v<T, Pair>) {
        alignas(64) int32_t pairs[kTileRows * kRow<Pair>];
        float grain[kTileRows];
        for (int r = 0; r < tile.rows; r++)
            scale_weights(keys.v_scale, span, s + r * kSpan, reinterpret_cast<int16_t*>(pairs + r * kRow<Pair>), grain + r);
        add(Weights<T>{pairs, grain}, tile.rows, v, wide, span.count, next.v, tile.y);
    } else {
        add(Weights<T>{s, nullptr}, tile.rows, v, wide, span.count, next.v, tile.y);
    }
}

template <class T>
void read_span(const Tile& tile, const Keys& keys, Reach reach, const Span& span, bool plain, int slot, int last,
               Running& running) {
    const size_t steps = steps_of<T>(keys.dim), wide = round_up(keys.dim, kBlock);
    const T *k[kBlocks + 1], *v[kBlocks + 1];
    const auto at = [&](int slot, int b) {
        k[b] = static_cast<const T*>(keys.k) + static_cast<size_t>(slot) * steps;
        v[b] = static_cast<const T*>(keys.v) + static_cast<size_t>(slot) / kTogether<T> * wide;
    };
    for (int b = 0; b < kBlocks; b++) at(span.slot[std::min(b, span.count - 1)], b);
    if constexpr (std::is_same_v<T, uint16_t>) {
        if (tile.rows >= kCopied) {
            const float *keys_copy[kBlocks], *values_copy[kBlocks];
            copy_blocks(k, span.count, kBlock * steps, tile.spare, keys_copy);
            copy_blocks(v, span.count, kBlock * wide, tile.spare + kSpan * steps, values_copy);
            return read_blocks<float>(tile, keys, reach, span, plain, keys_copy, values_copy, {nullptr, nullptr}, running);
        }
    }
    at(slot, kBlocks);
    const Next next = slot < last ? Next{reinterpret_cast<const char*>(k[kBlocks]), reinterpret_cast<const char*>(v[kBlocks])}
                                  : Next{static_cast<const char*>(keys.next_k), static_cast<const char*>(keys.next_v)};
    read_blocks(tile, keys, reach, span, plain, k, v, next, running);
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
        read_slots<uint16_t>(tile, keys, reach, first, last, running);
    else
        read_slots<Pair>(tile, keys, reach, first, last, running);
    for (int row = 0; row < tile.rows; row++) {
        tile.top[row] = running.top[row];
        tile.total[row] = reduce_add(running.total[row]);
    }
}

}  // namespace wh
