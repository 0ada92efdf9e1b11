// The inner kernels: a tile of R rows of x times B blocks of 16 outputs, its sums held in registers.
#ifndef WRITEHEAD_TILES_H
#define WRITEHEAD_TILES_H

#include <algorithm>

#include "linear.h"
#include "vec.h"

namespace wh {

constexpr int kParts = kBlock / kLanes;  // vectors that hold the outputs of a block
constexpr int kUnits = kGroup / 4;       // 4-byte units in a group; those of 16 outputs are a cache line
static_assert(kUnits <= 8, "sums of nibbles are kept in 16 bits until `end_dots`");
constexpr int kMostFetched = 3;          // lines that a tile fetches at a time

// Where the sums of a tile go, and what to fetch meanwhile, line by line.
struct Output {
    float* y;
    size_t ldy;
    const float* bias;  // of the first output, or null
    bool add;
    int n;                 // outputs wanted; the last block of a matrix may have fewer than it holds
    const char* ahead[kMostFetched];  // the hardware alone stops at the end of a page
};

template <int R, int V>
inline void finish(const vec (&sums)[R][V], const Output& out) {
    if (out.n == V * kLanes) {
        WH_UNROLL
        for (int r = 0; r < R; r++) {
            float* y = out.y + r * out.ldy;
            WH_UNROLL
            for (int v = 0; v < V; v++) {
                vec sum = sums[r][v];
                if (out.bias) sum += load(out.bias + v * kLanes);
                if (out.add) sum += load(y + v * kLanes);
                store(y + v * kLanes, sum);
            }
        }
        return;
    }
    float rows[R][V * kLanes];  // with indices that vary, sums would not be registers anywhere
    WH_UNROLL
    for (int r = 0; r < R; r++) {
        WH_UNROLL
        for (int v = 0; v < V; v++) store(rows[r] + v * kLanes, sums[r][v]);
    }
    for (int r = 0; r < R; r++) {
        const float* row = rows[r];
        float* y = out.y + r * out.ldy;
        for (int n = 0; n < out.n; n++) {
            y[n] = row[n] + (out.bias ? out.bias[n] : 0) + (out.add ? y[n] : 0);
        }
    }
}

inline vec load_weights(const float* w) { return load(w); }
inline vec load_weights(const uint16_t* w) { return load_bf16(w); }

// Inputs [0, k) of B blocks that are `stride` numbers apart; x holds R numbers for each input. F lines are fetched at
// a time, for each input or once in TURN: every instruction counts where another thread shares the core.
template <class T, int R, int B, int F, int TURN = 1>
void float_tile(const T* w, size_t stride, const float* x, int k, const Output& out) {
    constexpr int V = B * kParts;
    constexpr int U = R * V >= 8 ? 1 : R * V >= 4 ? 2 : R * V >= 2 ? 4 : 8;  // sums in turn hide the latency
    constexpr int kAtOnce = TURN > 1 ? TURN : std::max(U, 2);
    constexpr int kStep = TURN > 1 ? kLine : sizeof(T) * kBlock;  // bytes from what is fetched to what is fetched next
    static_assert(kAtOnce % TURN == 0 && kAtOnce >= U);
    // one row of float32 is read fastest as the processor fetches it by itself, as measured on Zen 3
    constexpr int kFetched = kLanes == 8 && sizeof(T) == sizeof(float) && R == 1 ? 0 : F;
    vec sums[U][R][V] = {};
    const auto step = [&](int i, int u, vec(&sum)[R][V]) {
        vec weights[V];
        WH_UNROLL
        for (int v = 0; v < V; v++) {
            const T* from = w + v / kParts * stride + i * kBlock + v % kParts * kLanes;
            weights[v] = load_weights(from);
        }
        if (u % TURN == 0) {
            WH_UNROLL
            for (int f = 0; f < kFetched; f++) __builtin_prefetch(out.ahead[f] + i / TURN * kStep);
        }
        WH_UNROLL
        for (int r = 0; r < R; r++) {
            const float* from = x + static_cast<size_t>(i) * R + r;
            const vec input = splat(*from);
            WH_UNROLL
            for (int v = 0; v < V; v++) {
                sum[r][v] = in_place(r, V) ? add_product(sum[r][v], weights[v], from)
                                           : add_product(sum[r][v], weights[v], input);
            }
        }
    };
    int i = 0;
    for (; i + kAtOnce <= k; i += kAtOnce) {
        WH_UNROLL
        for (int u = 0; u < kAtOnce; u++) step(i + u, u, sums[u % U]);
    }
    for (; i < k; i++) step(i, 0, sums[0]);
    WH_UNROLL
    for (int u = 1; u < U; u++) {
        WH_UNROLL
        for (int r = 0; r < R; r++) {
            WH_UNROLL
            for (int v = 0; v < V; v++) sums[0][r][v] += sums[u][r][v];
        }
    }
    finish<R, V>(sums[0], out);
}

// A tile of quantised rows: for each group of inputs and each row
struct Quantised {
    const int32_t* values;  // kUnits times four signed bytes
    const float* scales;
    const int32_t* taken;  // where sums of int8 products begin: kWhole, and what offsets the 128 that a weight has too much
    const float* sums;     // scale times the sum of the values
};

enum Bytes { kInt8, kInt4 };
constexpr int group_bytes(Bytes format) { return (format == kInt4 ? kGroup / 2 : kGroup) * kBlock; }
constexpr int group_scales(Bytes format) { return (format == kInt4 ? 2 : 1) * kBlock; }

// Unit j of a group: four weights of each of kLanes outputs.
template <Bytes F>
inline bvec unit(const uint8_t* group, int j) {
    if (F == kInt8) return load_as<bvec>(group + j * kLine);
    if (j < kUnits / 2) return low_nibbles(load_as<bvec>(group + j * kLine));
    return high_nibbles(load_as<bvec>(group + (j - kUnits / 2) * kLine));
}

// `groups` groups of B blocks, whose bytes are `stride` and whose scales are `scale_stride` apart; with FETCH a line
// for each block is fetched at a time.
template <Bytes F, int R, int B, bool FETCH>
void byte_tile(const uint8_t* w, size_t stride, const uint16_t* scales, size_t scale_stride, Quantised x,
               int groups, const Output& out) {
    constexpr int V = B * kParts;
    constexpr int kBytes = group_bytes(F);
    vec sums[R][V] = {};
    for (int g = 0; g < groups; g++, x.values += kUnits * R, x.scales += R, x.taken += R, x.sums += R) {
        const auto start = [&](int r) { return F == kInt8 ? x.taken[r] : kWhole; };
        ivec products[R][V];
        WH_UNROLL
        for (int r = 0; r < R; r++) {
            WH_UNROLL
            for (int v = 0; v < V; v++) products[r][v] = begin_dots<F == kInt4>(start(r));
        }
        WH_UNROLL
        for (int j = 0; j < kUnits; j++) {
            bvec weights[V];
            WH_UNROLL
            for (int v = 0; v < V; v++) {
                const uint8_t* group = w + v / kParts * stride + static_cast<size_t>(g) * kBytes;
                weights[v] = unit<F>(group + v % kParts * 4 * kLanes, j);
            }
            WH_UNROLL
            for (int b = 0; b < B; b++) {
                if (FETCH && j * kLine < kBytes) __builtin_prefetch(out.ahead[b] + static_cast<size_t>(g) * kBytes + j * kLine);
            }
            WH_UNROLL
            for (int r = 0; r < R; r++) {
                const int32_t* from = x.values + j * R + r;
                const ivec input = splat_int(*from);
                WH_UNROLL
                for (int v = 0; v < V; v++) {
                    ivec& sum = products[r][v];
                    sum = in_place(r, V) ? add_dot<F == kInt4>(sum, weights[v], from)
                                         : add_dot<F == kInt4>(sum, weights[v], input);
                }
            }
        }
        WH_UNROLL
        for (int v = 0; v < V; v++) {
            const uint16_t* from = scales + v / kParts * scale_stride + static_cast<size_t>(g) * group_scales(F) + v % kParts * kLanes;
            const vec scale = load_f16(from), taken_off = less(scale), least = F == kInt4 ? load_f16(from + kBlock) : vec{};
            WH_UNROLL
            for (int r = 0; r < R; r++) {
                const ivec whole = end_dots<F == kInt4>(products[r][v], start(r));
                sums[r][v] = add_product(sums[r][v], scaled(whole, scale, taken_off), x.scales + r);
                if (F == kInt4) sums[r][v] = add_product(sums[r][v], least, x.sums + r);
            }
        }
    }
    finish<R, V>(sums, out);
}

}  // namespace wh
#endif
