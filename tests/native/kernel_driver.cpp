// Checks matrix products and attention against plain loops; for processors on which the tests' Python does not run.
// Prints what differs; the exit code is the number of such cases.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "writehead.h"

namespace {

std::mt19937 draw(7);
int failures = 0;

int whole(int low, int high) { return std::uniform_int_distribution<int>(low, high)(draw); }
float real() { return std::normal_distribution<float>()(draw); }

uint16_t top_half(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return static_cast<uint16_t>(bits >> 16);
}

float from_top_half(uint16_t half) {
    const uint32_t bits = static_cast<uint32_t>(half) << 16;
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

// Half precision numbers 2^-e and their bits.
uint16_t power(int e) { return static_cast<uint16_t>((15 - e) << 10); }

void report(const char* what, int a, int b, int c, double error, double bound) {
    if (error <= bound) return;
    failures++;
    std::printf("%s %d %d %d: off by %g, at most %g\n", what, a, b, c, error, bound);
}

// A packed matrix and the numbers that it stands for.
struct Matrix {
    wh_matrix matrix;
    std::vector<uint8_t> data;
    std::vector<uint16_t> scales;
    std::vector<float> bias;
    std::vector<double> numbers;
};

void fill(Matrix& to, int format, int n, int k) {
    const int panels = (n + 15) / 16, groups = (k + 31) / 32, K = groups * 32;
    const size_t all = static_cast<size_t>(panels) * 16 * K;
    to.numbers.assign(all, 0.0);
    to.data.assign(format == WH_FLOAT32 ? 4 * all : format == WH_BFLOAT16 ? 2 * all : format == WH_INT8 ? all : all / 2, 0);
    to.scales.assign(static_cast<size_t>(panels) * groups * 32, 0);
    to.bias.resize(n);
    for (float& b : to.bias) b = real();
    for (int row = 0; row < panels * 16; row++) {
        const int panel = row / 16, lane = row % 16;
        for (int col = 0; col < K; col++) {
            const int group = col / 32, inside = col % 32;
            double& number = to.numbers[static_cast<size_t>(row) * K + col];
            const bool real_one = row < n && col < k;
            if (format == WH_FLOAT32 || format == WH_BFLOAT16) {
                const size_t at = (static_cast<size_t>(panel) * K + col) * 16 + lane;
                const float x = real_one ? from_top_half(top_half(real())) : 0.0f;
                const uint16_t half = top_half(x);
                if (format == WH_FLOAT32) std::memcpy(&to.data[4 * at], &x, 4);
                else std::memcpy(&to.data[2 * at], &half, 2);
                number = x;
                continue;
            }
            const int e = (row + group) % 3 + 3;
            if (format == WH_INT8) {
                const int u = real_one ? whole(1, 255) : 128;
                to.data[((static_cast<size_t>(panel) * (K / 4) + col / 4) * 16 + lane) * 4 + col % 4] = u;
                to.scales[(static_cast<size_t>(panel) * groups + group) * 16 + lane] = power(e);
                number = std::ldexp(u - 128, -e);
            } else {
                const int q = whole(0, 15), j = inside % 16 / 4, i = inside % 4;
                const size_t at = (((static_cast<size_t>(panel) * groups + group) * 4 + j) * 16 + lane) * 4 + i;
                to.data[at] |= inside < 16 ? q : q << 4;
                uint16_t* own = &to.scales[(static_cast<size_t>(panel) * groups + group) * 32];
                own[lane] = power(e);
                own[16 + lane] = power(e - 3) | 0x8000;  // -8 scale
                number = std::ldexp(q - 8, -e);
            }
        }
    }
    to.matrix = {format, n, k, to.data.data(), to.scales.data(), to.bias.data()};
}

// Inputs are whole numbers that reach 127 in each group of 32, so quantising them loses nothing.
void check_linear(wh_team* team, int format, int n, int k, int rows) {
    Matrix w;
    fill(w, format, n, k);
    const int K = (k + 31) / 32 * 32;
    std::vector<float> x(static_cast<size_t>(rows) * k), y(static_cast<size_t>(rows) * n);
    for (int row = 0; row < rows; row++) {
        for (int col = 0; col < k; col++) x[static_cast<size_t>(row) * k + col] = col % 32 ? whole(-127, 127) : 127;
    }
    if (wh_linear(team, &w.matrix, x.data(), rows, y.data())) report("no memory", format, n, k, 1, 0);
    double worst = 0;
    for (int row = 0; row < rows; row++) {
        for (int out = 0; out < n; out++) {
            double sum = w.bias[out], size = std::fabs(sum);
            for (int col = 0; col < k; col++) {
                const double term = w.numbers[static_cast<size_t>(out) * K + col] * x[static_cast<size_t>(row) * k + col];
                sum += term;
                size += std::fabs(term);
            }
            worst = std::fmax(worst, std::fabs(y[static_cast<size_t>(row) * n + out] - sum) / size);
        }
    }
    std::printf("linear format %d, %d x %d, %d rows: %.1e\n", format, n, k, rows, worst);
    report("linear: format, n, k", format, n, k, worst, 2e-6);
}

// Queries are whole numbers of 1/8192 that reach 16 bits, so rounding them loses nothing; weights of 8-bit values are rounded
// to 16 bits of the largest, which may cost half a unit a key.
void check_attention(wh_team* team, int format, int H, int G, int D, int context, int tokens, int window, int lead) {
    const int slots = (context + 15) / 16 * 16, wide = (D + 15) / 16 * 16;
    const int pair = format == WH_FLOAT32 ? 1 : 2, steps = (D + pair - 1) / pair;
    const size_t keys = static_cast<size_t>(G) * slots * steps * pair, values = static_cast<size_t>(G) * slots * wide;
    std::vector<float> k(keys), v(values, 0.0f), k_scale(G * slots), v_scale(G * slots), q(tokens * H * D), y(q.size());
    std::vector<uint16_t> k_half(keys), v_half(values);
    std::vector<int8_t> k_byte(keys), v_byte(values);
    std::vector<int32_t> pos(slots, -1), at(tokens);
    for (int s = 0; s < context; s++) pos[s] = s;
    for (int t = 0; t < tokens; t++) at[t] = context - tokens + t;
    for (size_t i = 0; i < q.size(); i++) q[i] = (i % D ? whole(-32767, 32767) : 32767) / 8192.0f;
    for (float& x : k_scale) x = 0.01f + 0.01f * whole(0, 9);
    for (float& x : v_scale) x = 0.01f + 0.01f * whole(0, 9);
    const auto key_at = [&](int g, int s, int d) {
        return (((static_cast<size_t>(g) * (slots / 16) + s / 16) * steps + d / pair) * 16 + s % 16) * pair + d % pair;
    };
    const auto value_at = [&](int g, int s, int d) {
        return ((static_cast<size_t>(g) * slots + s) / pair * wide + d) * pair + s % pair;
    };
    const auto put = [&](float& x, uint16_t& half, int8_t& byte, float scale) {
        byte = static_cast<int8_t>(whole(-127, 127));
        half = top_half(real());
        x = format == WH_INT8 ? byte * scale : from_top_half(half);
    };
    for (int g = 0; g < G; g++) {
        for (int s = 0; s < context; s++) {
            for (int d = 0; d < D; d++) {
                const size_t a = key_at(g, s, d), b = value_at(g, s, d);
                put(k[a], k_half[a], k_byte[a], k_scale[g * slots + s]);
                put(v[b], v_half[b], v_byte[b], v_scale[g * slots + s]);
            }
        }
    }
    void* kept_k = format == WH_INT8 ? (void*)k_byte.data() : format == WH_BFLOAT16 ? (void*)k_half.data() : (void*)k.data();
    void* kept_v = format == WH_INT8 ? (void*)v_byte.data() : format == WH_BFLOAT16 ? (void*)v_half.data() : (void*)v.data();
    const bool bytes = format == WH_INT8;
    wh_cache cache = {format, 1, H, G, D, slots, 0, 0, kept_k, kept_v,
                      bytes ? k_scale.data() : nullptr, bytes ? v_scale.data() : nullptr, pos.data()};
    const float scale = 0.1f;
    if (wh_attend(team, &cache, 0, 1, 1, tokens, q.data(), at.data(), scale, window, lead, nullptr, y.data())) failures++;
    double worst = 0;
    for (int t = 0; t < tokens; t++) {
        for (int h = 0; h < H; h++) {
            const int g = h / (H / G);
            std::vector<double> weight(context, 0.0);
            double top = -INFINITY, sum = 0, most = 0;
            for (int s = 0; s <= at[t]; s++) {
                if (window && s <= at[t] - window && s >= lead) continue;
                double score = 0;
                for (int d = 0; d < D; d++) score += static_cast<double>(q[(t * H + h) * D + d]) * k[key_at(g, s, d)];
                weight[s] = score * scale;
                top = std::fmax(top, weight[s]);
            }
            for (int s = 0; s <= at[t]; s++) {
                const bool seen = !(window && s <= at[t] - window && s >= lead);
                weight[s] = seen ? std::exp(weight[s] - top) : 0;
                sum += weight[s];
                most = std::fmax(most, weight[s] * v_scale[g * slots + s]);
            }
            for (int d = 0; d < D; d++) {
                double expected = 0, size = 0;
                for (int s = 0; s <= at[t]; s++) {
                    expected += weight[s] / sum * v[value_at(g, s, d)];
                    size += std::fabs(v[value_at(g, s, d)]) / v_scale[g * slots + s];
                }
                const double rounding = format == WH_INT8 ? most / 65534 * size / sum : 0;
                worst = std::fmax(worst, std::fabs(y[(t * H + h) * D + d] - expected) - rounding);
            }
        }
    }
    std::printf("attention format %d, %d on %d heads of %d, %d of %d tokens, window %d: %.1e\n", format, H, G, D, tokens,
                context, window, worst);
    report("attention: format, context, tokens", format, context, tokens, worst, 2e-5);
}

}  // namespace

int main() {
    std::printf("%s\n", wh_instructions());
    wh_team* team = wh_team_create(2);
    for (int format : {WH_FLOAT32, WH_BFLOAT16, WH_INT8, WH_INT4}) {
        for (int rows : {1, 2, 5, 17, 40}) {
            check_linear(team, format, 16, 32, rows);
            check_linear(team, format, 33, 70, rows);
            check_linear(team, format, 97, 256, rows);
        }
    }
    for (int format : {WH_FLOAT32, WH_BFLOAT16, WH_INT8}) {
        check_attention(team, format, 4, 1, 16, 45, 1, 0, 0);
        check_attention(team, format, 4, 2, 20, 130, 7, 0, 0);
        check_attention(team, format, 3, 3, 8, 90, 3, 20, 4);
    }
    wh_team_free(team);
    std::printf(failures ? "%d failures\n" : "all equal\n", failures);
    return failures;
}
