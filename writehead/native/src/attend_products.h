// The two products of attention: scores of query rows with blocks of 16 keys, and sums of weighted values.
//
// Rows and vectors per step are chosen so that sums stay in registers, and lines that are read next are fetched evenly.
#ifndef WRITEHEAD_ATTEND_PRODUCTS_H
#define WRITEHEAD_ATTEND_PRODUCTS_H

#include <algorithm>
#include <type_traits>

#include "attention.h"
#include "linear.h"
#include "vec.h"

namespace wh {

constexpr int kBlocks = kSpan / kBlock;        // of keys whose scores stand together
constexpr int kPer = kBlock / kLanes;          // vectors of a block
constexpr int kSums = kLanes == 16 ? 24 : 12;  // registers for sums

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

// What 1 is worth in a row; floats are what they are, and have none.
template <class T>
const float* grain_of(const float* grain, int row) {
    return kTogether<T> > 1 ? grain + row : nullptr;
}

// What sums stand for: integers are worth `grain` each.
inline vec worth(vec sum, const float*) { return sum; }
inline vec worth(ivec sum, const float* grain) { return to_float(sum) * splat(*grain); }

// Sums go on from y, or come on top of it in the end.
inline void begin(vec& sum, const float* y) { sum = load(y); }
inline void begin(ivec& sum, const float*) { sum = ivec{}; }
inline void end(vec sum, const float*, float* y) { store(y, sum); }
inline void end(ivec sum, const float* grain, float* y) { store(y, fma(to_float(sum), splat(*grain), load(y))); }

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

// How `streams` of lines, at most MOST, are shared out among `passes` over them: pass number i fetches every `passes`-th from
// the i-th on.
template <int MOST, class Pass>
void with_fetches(const char* next, size_t apart, int streams, int passes, int i, const Pass& pass) {
    const int some = next && i < streams ? (streams - i + passes - 1) / passes : 0;
    const Ahead ahead{next + (next ? i * apart : 0), passes * apart};
    if (some == 0) return pass(std::integral_constant<int, 0>(), ahead);
    if (MOST == 1 || some == 1) return pass(std::integral_constant<int, 1>(), ahead);
    if (MOST == 2 || some == 2) return pass(std::integral_constant<int, std::min(MOST, 2)>(), ahead);
    return pass(std::integral_constant<int, MOST>(), ahead);
}

// Query rows, side by side in groups of kQueryRows.
template <class T>
struct Queries {
    const Number<T>* numbers;  // [rows/kQueryRows][steps][kQueryRows]
    const float* grain;        // [rows], what 1 is worth, where numbers are integers
    int steps;                 // of numbers that are multiplied together

    Queries from(int row) const {
        const int group = row / kQueryRows * kQueryRows;
        return {numbers + group * steps + row - group, grain_of<T>(grain, row), steps};
    }
};

// Scores of ROWS queries and BLOCKS blocks; F lines are fetched when so much of a block was read.
template <int ROWS, int BLOCKS, int F, class T>
void score_tile(Queries<T> q, const T* const* k, Ahead ahead, float* s) {
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
        WH_UNROLL for (int j = 0; j < BLOCKS * kPer; j++) store(s + r * kSpan + j * kLanes, worth(sums[r][j], grain_of<T>(q.grain, r)));
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
            with_fetches<kAtOnce>(more, bytes, kAtOnce, passes, pass, [&](auto lines, Ahead ahead) {
                score_tile<ROWS, kAtOnce, decltype(lines)::value>(q, k + b, ahead, s + b * kBlock);
            });
        }
    }
}

// Is a number best taken once for as many rows as there are registers? Where it must be widened, or where it is read once
// only; floats that many rows read are in the nearest cache, where few rows by many vectors need fewer loads.
template <class T>
bool tall(int rows) { return kLanes == 16 && (sizeof(T) < sizeof(float) || rows <= kQueryRows); }

// AT_ONCE rows at a time.
template <int AT_ONCE, class T>
void score_all(Queries<T> q, int rows, const T* const* k, int blocks, const char* next, float* s) {
    for (int first = 0; first < rows; first += kQueryRows) {
        const int some = std::min(kQueryRows, rows - first), passes = (some + AT_ONCE - 1) / AT_ONCE;
        for (int pass = 0; pass < passes; pass++) {
            const int r0 = some * pass / passes, r1 = some * (pass + 1) / passes;
            score_rows<AT_ONCE>(q.from(first + r0), r1 - r0, k, blocks, first ? nullptr : next, pass, passes,
                                      s + (first + r0) * kSpan);
        }
    }
}

template <class T>
void score(Queries<T> q, int rows, const T* const* k, int blocks, const char* next, float* s) {
    if constexpr (kLanes == 16 && sizeof(T) == sizeof(float)) {
        if (!tall<T>(rows)) return score_all<6>(q, rows, k, blocks, next, s);
    }
    score_all<kQueryRows>(q, rows, k, blocks, next, s);
}

// Weights of a span's keys, for each row.
template <class T>
struct Weights {
    const Number<T>* numbers;  // [rows][kRow]
    const float* grain;        // [rows], as in Queries

    Weights from(int row) const { return {numbers + row * kRow<T>, grain_of<T>(grain, row)}; }
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
        WH_UNROLL for (int c = 0; c < COLS; c++) end(sums[r][c], grain_of<T>(w.grain, r), y + r * wide + c * kLanes);
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
        with_fetches<kLines>(more, kLine, kLines, passes, pass, [&](auto lines, Ahead ahead) {
            add_rows<rows_at_once(COLS), COLS, decltype(lines)::value>(w.from(r0), r1 - r0, at, wide, blocks, ahead,
                                                                     y + r0 * wide + column);
        });
    }
}

// Values are taken by few columns where many rows are to take each once.
template <class T>
void add(Weights<T> w, int rows, const T* const* v, int wide, int blocks, const char* next, float* y) {
    const bool once = tall<T>(rows);
    int c = 0;
    if (!once || rows <= rows_at_once(4))
        for (; c + 4 * kLanes <= wide; c += 4 * kLanes) add_columns<4>(w, rows, v, c, wide, blocks, next, y);
    if (!once || rows <= rows_at_once(2))
        for (; c + 2 * kLanes <= wide; c += 2 * kLanes) add_columns<2>(w, rows, v, c, wide, blocks, next, y);
    for (; c < wide; c += kLanes) add_columns<1>(w, rows, v, c, wide, blocks, next, y);
}

}  // namespace wh
#endif
