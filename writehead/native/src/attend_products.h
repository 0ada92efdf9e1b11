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
constexpr int kUnit = 2;                       // steps of a loop, since its own instructions count

// Vectors whose sums are held beside each other for so many rows.
constexpr int vectors_at_once(int rows) { return rows * 4 <= kSums ? 4 : 2; }

// How keys and values of a format are multiplied: one by one in float32, two bfloat16 one after the other, two numbers of
// 8 bits at once as integers, with queries and weights rounded to 16 bits of the largest of their row.
template <class T>
struct Products;
template <>
struct Products<float> {
    typedef vec Sum, Wide;
    typedef float Number;
    static constexpr int kFormat = WH_FLOAT32, kParts = 1;
};
template <>
struct Products<HalfPair> {
    typedef vec Sum, Wide;
    typedef float Number;
    static constexpr int kFormat = WH_BFLOAT16, kParts = 2;
};
template <>
struct Products<BytePair> {
    typedef ivec Sum;
    typedef svec Wide;
    typedef int32_t Number;
    static constexpr int kFormat = WH_INT8, kParts = 1;
};
template <class T>
using Sum = typename Products<T>::Sum;
template <class T>
using Wide = typename Products<T>::Wide;
template <class T>
using Number = typename Products<T>::Number;  // of queries and weights
template <class T>
constexpr int kTogether = stored(Products<T>::kFormat).together;  // numbers of a key, or keys of a value, that are a T
template <class T>
constexpr int kParts = Products<T>::kParts;  // what a T is multiplied in
template <class T>
constexpr int kSteps = kBlock / kTogether<T>;  // of a block of values
template <class T>
int steps_of(int dim) { return (dim + kTogether<T> - 1) / kTogether<T>; }
template <class T>
constexpr int kRow = kSpan * kParts<T> / kTogether<T>;  // numbers from one row of weights to the next

// Part p of a vector, widened.
inline vec part(const float* from, int) { return load(from); }
inline vec part(const HalfPair* from, int p) { return p == 0 ? load_first(from) : load_second(from); }
inline svec part(const BytePair* from, int) { return load_pairs(from); }

// What 1 is worth in a row; floats are what they are, and have none.
template <class T>
const float* grain_of(const float* grain, int row) {
    return std::is_same_v<T, BytePair> ? grain + row : nullptr;
}

// What sums stand for: integers are worth `grain` each.
inline vec worth(vec sum, const float*) { return sum; }
inline vec worth(ivec sum, const float* grain) { return to_float(sum) * splat(*grain); }

// Sums go on from y, or come on top of it in the end.
inline void begin(vec& sum, const float* y) { sum = load(y); }
inline void begin(ivec& sum, const float*) { sum = ivec{}; }
inline void end(vec sum, const float*, float* y) { store(y, sum); }
inline void end(ivec sum, const float* grain, float* y) { store(y, fma(to_float(sum), splat(*grain), load(y))); }

// Adds x times V vectors to the sums of row r; some rows read x from memory for each.
template <int V, class Sum, class Wide, class Number>
WH_INLINE void add_row(int r, Sum (&sums)[V], const Wide (&by)[V], const Number* x) {
    const Sum number = splat_at(x);
    WH_UNROLL for (int j = 0; j < V; j++)
        sums[j] = in_place(r, V) ? add_product(sums[j], by[j], x) : add_product(sums[j], by[j], number);
}

// What is fetched while something is computed: one line after the other, some for each unit of steps.
struct Ahead {
    const char *at, *end;
    int lines = 1;  // a unit: 1, 2, 4 or 8

    // `bytes` bytes from `at` on, or with null nothing, over so many units.
    Ahead(const char* at, size_t bytes, size_t units) : at(at), end(at ? at + bytes : at) {
        while (lines < 8 && lines * units * kLine < bytes) lines *= 2;
    }

    // Calls pass(F, from) for a pass of so many units, each of which is to fetch F lines from there on.
    template <class Pass>
    void with_lines(size_t units, const Pass& pass) {
        const char* from = at;
        if (at == end) return pass(std::integral_constant<int, 0>(), from);
        at += std::min(static_cast<size_t>(end - at), units * lines * kLine);
        if (lines == 1) return pass(std::integral_constant<int, 1>(), from);
        if (lines == 2) return pass(std::integral_constant<int, 2>(), from);
        if (lines == 4) return pass(std::integral_constant<int, 4>(), from);
        pass(std::integral_constant<int, 8>(), from);
    }
};

// The lines of F a unit that fall on its step i.
template <int F>
WH_INLINE void fetch(const char* from, int i) {
    WH_UNROLL for (int f = i * F / kUnit; f < (i + 1) * F / kUnit; f++) __builtin_prefetch(from + f * kLine, 0, 2);
}

// Query rows, those of a pass side by side.
template <class T>
struct Queries {
    const Number<T>* numbers;  // [passes][steps][kParts][kQueryRows]
    const float* grain;        // [rows], what 1 is worth, where numbers are integers
    int steps;                 // T of a key

    Queries of(int pass, int row) const {
        return {numbers + pass * steps * kParts<T> * kQueryRows, grain_of<T>(grain, row), steps};
    }
};

// Calls work(pass, row, count) for each pass over the rows.
template <class Work>
WH_INLINE void each_pass(int rows, const Work& work) {
    const int each = pass_rows(rows);
    for (int pass = 0, row = 0; row < rows; pass++, row += each) work(pass, row, std::min(each, rows - row));
}

// Scores of ROWS queries and V vectors of keys; F lines are fetched each unit.
template <int ROWS, int V, int F, class T>
void score_tile(Queries<T> q, const T* const* k, const char* ahead, float* s) {
    Sum<T> sums[ROWS][V] = {};
    const auto step = [&](int d) {
        WH_UNROLL for (int p = 0; p < kParts<T>; p++) {
            Wide<T> key[V];
            WH_UNROLL for (int j = 0; j < V; j++) key[j] = part(k[j / kPer] + d * kBlock + j % kPer * kLanes, p);
            WH_UNROLL for (int r = 0; r < ROWS; r++)
                add_row(r, sums[r], key, q.numbers + (d * kParts<T> + p) * kQueryRows + r);
        }
    };
    int d = 0;
    for (; d + kUnit <= q.steps; d += kUnit, ahead += F * kLine) {
        WH_UNROLL for (int i = 0; i < kUnit; i++) {
            fetch<F>(ahead, i);
            step(d + i);
        }
    }
    for (; d < q.steps; d++) step(d);
    WH_UNROLL for (int r = 0; r < ROWS; r++)
        WH_UNROLL for (int j = 0; j < V; j++) store(s + r * kSpan + j * kLanes, worth(sums[r][j], grain_of<T>(q.grain, r)));
}

template <int ROWS, int V, int F, class T>
void score_rows(Queries<T> q, int rows, const T* const* k, const char* ahead, float* s) {
    if constexpr (ROWS > 0) {
        if (rows < ROWS) return score_rows<ROWS - 1, V, F>(q, rows, k, ahead, s);
        score_tile<ROWS, V, F>(q, k, ahead, s);
    }
}

// V vectors at a time, for all rows while they are in the nearest cache.
template <int V, class T>
void score_all(Queries<T> q, int rows, const T* const* k, int blocks, const char* next, float* s) {
    constexpr int kAtOnce = V / kPer;
    const size_t units = q.steps / kUnit;
    Ahead ahead(next, blocks * q.steps * kBlock * sizeof(T), (blocks + kAtOnce - 1) / kAtOnce * passes(rows) * units);
    // blocks beyond the last are copies of it, whose scores nobody reads
    for (int b = 0; b < blocks; b += kAtOnce) {
        each_pass(rows, [&](int pass, int row, int count) {
            ahead.with_lines(units, [&](auto lines, const char* from) {
                score_rows<std::min(kQueryRows, kSums / V), V, decltype(lines)::value>(
                    q.of(pass, row), count, k + b, from, s + row * kSpan + b * kBlock);
            });
        });
    }
}

template <class T>
void score(Queries<T> q, int rows, const T* const* k, int blocks, const char* next, float* s) {
    if (kPer == 4 || vectors_at_once(std::min(rows, kQueryRows)) == 4) return score_all<4>(q, rows, k, blocks, next, s);
    if constexpr (kPer <= 2) score_all<2>(q, rows, k, blocks, next, s);
}

// Weights of a span's keys, for each row.
template <class T>
struct Weights {
    const Number<T>* numbers;  // [rows][kRow]
    const float* grain;        // [rows], as in Queries

    Weights from(int row) const { return {numbers + row * kRow<T>, grain_of<T>(grain, row)}; }
};

// Adds the values of `blocks` blocks, weighted by w, to V vectors of ROWS sums; F lines are fetched each unit.
template <int ROWS, int V, int F, class T>
void add_values(Weights<T> w, const T* const* v, int wide, int blocks, const char* ahead, float* y) {
    Sum<T> sums[ROWS][V];
    WH_UNROLL for (int r = 0; r < ROWS; r++)
        WH_UNROLL for (int c = 0; c < V; c++) begin(sums[r][c], y + r * wide + c * kLanes);
    const auto step = [&](int b, int i) {
        WH_UNROLL for (int p = 0; p < kParts<T>; p++) {
            Wide<T> value[V];
            WH_UNROLL for (int c = 0; c < V; c++) value[c] = part(v[b] + i * wide + c * kLanes, p);
            WH_UNROLL for (int r = 0; r < ROWS; r++)
                add_row(r, sums[r], value, w.numbers + r * kRow<T> + (b * kSteps<T> + i) * kParts<T> + p);
        }
    };
    for (int b = 0; b < blocks; b++) {
        for (int u = 0; u < kSteps<T>; u += kUnit, ahead += F * kLine) {
            WH_UNROLL for (int i = 0; i < kUnit; i++) {
                fetch<F>(ahead, i);
                step(b, u + i);
            }
        }
    }
    WH_UNROLL for (int r = 0; r < ROWS; r++)
        WH_UNROLL for (int c = 0; c < V; c++) end(sums[r][c], grain_of<T>(w.grain, r), y + r * wide + c * kLanes);
}

template <int ROWS, int V, int F, class T>
void add_rows(Weights<T> w, int rows, const T* const* v, int wide, int blocks, const char* ahead, float* y) {
    if constexpr (ROWS > 0) {
        if (rows < ROWS) return add_rows<ROWS - 1, V, F>(w, rows, v, wide, blocks, ahead, y);
        add_values<ROWS, V, F>(w, v, wide, blocks, ahead, y);
    }
}

// V vectors of values from `column` on, for all rows while they are in the nearest cache.
template <int V, class T>
void add_columns(Weights<T> w, int rows, const T* const* v, int column, int wide, int blocks, Ahead& ahead, float* y) {
    const T* at[kBlocks];
    for (int b = 0; b < blocks; b++) at[b] = v[b] + column;
    each_pass(rows, [&](int, int row, int count) {
        ahead.with_lines(static_cast<size_t>(blocks) * kSteps<T> / kUnit, [&](auto lines, const char* from) {
            add_rows<std::min(kQueryRows, kSums / V), V, decltype(lines)::value>(
                w.from(row), count, at, wide, blocks, from, y + row * wide + column);
        });
    });
}

template <class T>
void add(Weights<T> w, int rows, const T* const* v, int wide, int blocks, const char* next, float* y) {
    const int most = vectors_at_once(std::min(rows, kQueryRows)), vectors = wide / kLanes;
    const size_t strips = vectors / most + vectors % most;
    Ahead ahead(next, static_cast<size_t>(blocks) * kSteps<T> * wide * sizeof(T),
                strips * passes(rows) * blocks * kSteps<T> / kUnit);
    int c = 0;
    if (most == 4)
        for (; c + 4 * kLanes <= wide; c += 4 * kLanes) add_columns<4>(w, rows, v, c, wide, blocks, ahead, y);
    if (most == 2)
        for (; c + 2 * kLanes <= wide; c += 2 * kLanes) add_columns<2>(w, rows, v, c, wide, blocks, ahead, y);
    for (; c < wide; c += kLanes) add_columns<1>(w, rows, v, c, wide, blocks, ahead, y);
}

}  // namespace wh
#endif
