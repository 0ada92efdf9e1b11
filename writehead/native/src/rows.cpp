// What a step does with single rows of numbers.
#include "rows.h"

#include <algorithm>
#include <cmath>

#include "attention.h"
#include "linear.h"
#include "vec.h"

namespace wh {
namespace {

float sum_of(const float* x, int n) {
    vec sum{};
    int i = 0;
    for (; i + kLanes <= n; i += kLanes) sum += load(x + i);
    float rest = 0;
    for (; i < n; i++) rest += x[i];
    return reduce_add(sum) + rest;
}

float squares_of(const float* x, int n, float mean) {
    vec sum{};
    int i = 0;
    for (; i + kLanes <= n; i += kLanes) {
        const vec d = load(x + i) - splat(mean);
        sum = fma(d, d, sum);
    }
    float rest = 0;
    for (; i < n; i++) rest += (x[i] - mean) * (x[i] - mean);
    return reduce_add(sum) + rest;
}

// erf to 2e-7 (Abramowitz and Stegun, 7.1.26).
vec erf(vec x) {
    const vec one = splat(1.0f), size = max(x, -x);
    const vec t = one / fma(splat(0.3275911f), size, one);
    vec p = splat(1.061405429f);
    p = fma(p, t, splat(-1.453152027f));
    p = fma(p, t, splat(1.421413741f));
    p = fma(p, t, splat(-0.284496736f));
    p = fma(p, t, splat(0.254829592f));
    const vec y = one - p * t * exp(-size * size);
    return x < vec{} ? -y : y;
}

vec sigmoid(vec x) { return splat(1.0f) / (splat(1.0f) + exp(-x)); }

template <int KIND>
vec active(vec x) {
    switch (KIND) {
        case WH_RELU: return max(x, vec{});
        case WH_GELU: return splat(0.5f) * x * (splat(1.0f) + erf(x * splat(0.70710678f)));
        // 0.5 (1 + tanh u) = sigmoid(2 u)
        case WH_GELU_TANH: return x * sigmoid(splat(1.59576912f) * fma(splat(0.044715f) * x * x, x, x));
        case WH_SILU: return x * sigmoid(x);
        case WH_SIGMOID: return sigmoid(x);
        default: return x;
    }
}

template <int KIND>
void activate_as(bool gated, const float* x, int n, float* y) {
    for (int i = 0; gated && i < n; i += kBlock)
        for (int j = 0; j < kBlock; j += kLanes)
            store(y + i + j, active<KIND>(load(x + 2 * i + j)) * load(x + 2 * i + kBlock + j));
    if (gated) return;
    int i = 0;
    for (; i + kLanes <= n; i += kLanes) store(y + i, active<KIND>(load(x + i)));
    for (; i < n; i++) y[i] = active<KIND>(splat(x[i]))[0];
}

// Stores number i of n at to[at(i)].
template <class At>
void put(int format, void* to, const float* x, int n, float* scale, const At& at) {
    if (format == WH_FLOAT32) {
        for (int i = 0; i < n; i++) static_cast<float*>(to)[at(i)] = x[i];
    } else if (format == WH_BFLOAT16) {
        for (int i = 0, some; i < n; i += some) {
            uint16_t rounded[kLanes];
            some = std::min(kLanes, n - i);
            store_bf16(rounded, load_some(x + i, some));
            for (int j = 0; j < some; j++) static_cast<uint16_t*>(to)[at(i + j)] = rounded[j];
        }
    } else {
        float most = 0;
        for (int i = 0; i < n; i++) most = std::max(most, std::fabs(x[i]));
        *scale = most / 127;
        const float divisor = std::max(*scale, 1e-30f);
        for (int i = 0; i < n; i++) static_cast<int8_t*>(to)[at(i)] = static_cast<int8_t>(std::nearbyint(x[i] / divisor));
    }
}

}  // namespace

void normalise(const wh_norm& norm, const float* x, int n, float* y) {
    if (norm.kind == WH_NO_NORM) {
        if (x != y) std::copy_n(x, n, y);
        return;
    }
    const float mean = norm.kind == WH_LAYER_NORM ? sum_of(x, n) / n : 0;
    const float factor = 1 / std::sqrt(squares_of(x, n, mean) / n + norm.eps);
    for (int i = 0; i < n; i++) y[i] = (x[i] - mean) * factor * norm.weight[i];
    if (norm.bias)
        for (int i = 0; i < n; i++) y[i] += norm.bias[i];
}

void activate(int32_t activation, bool gated, const float* x, int n, float* y) {
    switch (activation) {
        case WH_RELU: return activate_as<WH_RELU>(gated, x, n, y);
        case WH_GELU: return activate_as<WH_GELU>(gated, x, n, y);
        case WH_GELU_TANH: return activate_as<WH_GELU_TANH>(gated, x, n, y);
        case WH_SILU: return activate_as<WH_SILU>(gated, x, n, y);
        case WH_SIGMOID: return activate_as<WH_SIGMOID>(gated, x, n, y);
        default: return activate_as<WH_IDENTITY>(gated, x, n, y);
    }
}

void rotate(float* head, const float* turn, int half, bool interleaved) {
    const int step = interleaved ? 2 : 1, apart = interleaved ? 1 : half;
    const float *cos = turn, *sin = turn + half;
    int i = 0;
    for (; !interleaved && i + kLanes <= half; i += kLanes) {
        const vec a = load(head + i), b = load(head + half + i), c = load(cos + i), s = load(sin + i);
        store(head + i, a * c - b * s);
        store(head + half + i, a * s + b * c);
    }
    for (; i < half; i++) {
        const float a = head[i * step], b = head[i * step + apart];
        head[i * step] = a * cos[i] - b * sin[i];
        head[i * step + apart] = a * sin[i] + b * cos[i];
    }
}

void store_key_value(const wh_cache& cache, int row, int layer, int head, int slot, const float* k, const float* v) {
    const int D = cache.head_dim, wide = round_up(D, kBlock);
    const size_t place = (static_cast<size_t>(row) * cache.layers + layer) * cache.kv_heads + head;
    const size_t first = place * cache.slots, at = first + slot;
    float* k_scale = cache.k_scale ? cache.k_scale + at : nullptr;
    float* v_scale = cache.v_scale ? cache.v_scale + at : nullptr;
    const size_t together = stored(cache.format).together, odd = together - 1;  // of 1 or 2 a bit: numbers need no division
    const size_t keys = (first + slot / kBlock * kBlock) * ((D + odd) & ~odd), lane = slot % kBlock * together;
    const size_t values = (at & ~odd) * wide + (at & odd);
    put(cache.format, cache.k, k, D, k_scale, [&](size_t i) { return keys + (i & ~odd) * kBlock + lane + (i & odd); });
    put(cache.format, cache.v, v, D, v_scale, [&](size_t i) { return values + i * together; });
}

}  // namespace wh
