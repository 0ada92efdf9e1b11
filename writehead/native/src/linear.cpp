#include "linear.h"

#include <algorithm>
#include <array>
#include <utility>

#include "tiles.h"

namespace wh {

namespace {

// The largest tiles whose sums fit into the registers, and the panels of x that fit into the caches.
#if defined(__AVX512F__)
constexpr int kFloatRows = 12, kByteRows = 6, kBlocks = 2;
#elif defined(__AVX2__)
constexpr int kFloatRows = 6, kByteRows = 2, kBlocks = 1;
#else
constexpr int kFloatRows = 3, kByteRows = 1, kBlocks = 1;
#endif
constexpr int kPanel = 256;   // inputs of a float panel, when several tiles use it one after the other
constexpr int kCopied = 3;    // tiles from which bfloat16 weights are worth a copy in float32
constexpr int kAhead = 4096;  // bytes
constexpr int kPieceBytes = 64 * 1024, kPieces = 16;  // the most bytes, the least pieces of a matrix: a few us each

bool in_bytes(const wh_matrix& w) { return w.format == WH_INT8 || w.format == WH_INT4; }

int padded(const wh_matrix& w) { return round_up(w.k, kGroup); }

// Rows of x in tiles of nearly equal height.
struct Tiles {
    int rows, count;

    Tiles(const wh_matrix& w, int rows) : rows(rows) {
        const int most = in_bytes(w) ? kByteRows : kFloatRows;
        count = (rows + most - 1) / most;
    }
    int begin(int tile) const { return static_cast<int>(static_cast<long>(rows) * tile / count); }
    int of(int row) const { return static_cast<int>(((row + 1L) * count - 1) / rows); }
};

// Bytes of one quantised row: its values, then scale, taken and sum of each group.
size_t row_bytes(const wh_matrix& w) { return padded(w) + 12 * static_cast<size_t>(padded(w) / kGroup); }

Quantised quantised(const wh_matrix& w, const void* scratch, int first, int rows) {
    const size_t k = padded(w), groups = k / kGroup;
    const char* base = static_cast<const char*>(scratch) + first * row_bytes(w);
    const char* scales = base + k * rows;
    const size_t each = 4 * groups * rows;
    return {reinterpret_cast<const int32_t*>(base), reinterpret_cast<const float*>(scales),
            reinterpret_cast<const int32_t*>(scales + each), reinterpret_cast<const float*>(scales + 2 * each)};
}

// Quantises 32 activations: 8 units of four signed bytes, the scale and the sum of the values.
void quantise_group(const float* x, int32_t (&units)[kUnits], float& scale, int32_t& sum) {
    constexpr int V = kGroup / kLanes;
    vec inputs[V];
    ivec largest = {};
    for (int v = 0; v < V; v++) {
        inputs[v] = load(x + v * kLanes);
        const ivec magnitude = as_int(inputs[v]) & 0x7fffffff;  // as integers a NaN is the largest of all
        largest = magnitude > largest ? magnitude : largest;
    }
    const int32_t bits = reduce_max(largest);
    float most;
    std::memcpy(&most, &bits, 4);
    scale = most / 127;
    const vec inverse = splat(most > 1e-36f ? 127 / most : 0);
    ivec total = {};
    for (int v = 0; v < V; v++) {
        const ivec values = round_to_int(inputs[v] * inverse);
        const quarter bytes = __builtin_convertvector(values, quarter);
        total += values;
        std::memcpy(reinterpret_cast<char*>(units) + v * kLanes, &bytes, sizeof bytes);
    }
    sum = reduce_add(total);
}

void quantise_row(const wh_matrix& w, const float* x, const Quantised& to, int rows, int row) {
    int32_t* values = const_cast<int32_t*>(to.values) + row;
    const auto put = [&](int g, const float* from) {
        int32_t units[kUnits], sum;
        float scale;
        quantise_group(from, units, scale, sum);
        for (int j = 0; j < kUnits; j++) values[(static_cast<size_t>(g) * kUnits + j) * rows] = units[j];
        const_cast<float*>(to.scales)[g * rows + row] = scale;
        // unsigned, since a row that is not finite has any sum, which may wrap: its scale is not finite either
        const_cast<int32_t*>(to.taken)[g * rows + row] =
            static_cast<int32_t>(static_cast<uint32_t>(kTaken - 128) * static_cast<uint32_t>(sum));
        const_cast<float*>(to.sums)[g * rows + row] = scale * static_cast<float>(sum);
    };
    const int whole = w.k / kGroup;
    for (int g = 0; g < whole; g++) put(g, x + g * kGroup);
    if (w.k % kGroup) {
        float last[kGroup] = {};
        std::copy(x + whole * kGroup, x + w.k, last);
        put(whole, last);
    }
}

template <class T>
using FloatTile = void (*)(const T*, size_t, const float*, int, const Output&);
using ByteTile = void (*)(const uint8_t*, size_t, const uint16_t*, size_t, const Quantised&, int, const Output&);

template <class T, int B, size_t... R>
constexpr std::array<FloatTile<T>, sizeof...(R)> float_tiles(std::index_sequence<R...>) {
    return {float_tile<T, static_cast<int>(R) + 1, B>...};
}
template <Bytes F, int B, size_t... R>
constexpr std::array<ByteTile, sizeof...(R)> byte_tiles(std::index_sequence<R...>) {
    return {byte_tile<F, static_cast<int>(R) + 1, B>...};
}

// A lone tile runs at the speed of memory and fetches its own weights; the first of several tiles fetch those of
// the next blocks, one block each, so that memory works while they compute.
template <class T>
void fetch(Output& out, int tile, int tiles, const T* weights, const T* next, size_t stride) {
    for (int b = 0; b < 2; b++) {
        const char* own = reinterpret_cast<const char*>(weights + (b < kBlocks ? b : 0) * stride);
        out.ahead[b] = tiles == 1 ? own + kAhead : own;
    }
    if (tiles > 1 && tile < kBlocks) out.ahead[0] = reinterpret_cast<const char*>(next + tile * stride);
}

// Calls body(n, blocks, k) for the outputs [n0, n1), some blocks at a time, with each panel of inputs.
template <class Body>
void each_panel(int k_end, int panel, int n0, int n1, int blocks, const Body& body) {
    for (int k = 0; k < k_end; k += panel) {
        for (int n = n0; n < n1; n += blocks * kBlock) body(n, std::min(blocks, (n1 - n + kBlock - 1) / kBlock), k);
    }
}

// Adds up over the panels of inputs: the first one brings the bias in, the others add to what is there.
Output panel_output(const wh_matrix& w, const Output& all, int n, int n1, int blocks, int k) {
    Output out = all;
    out.n = std::min(blocks * kBlock, n1 - n);
    out.bias = w.bias && k == 0 ? w.bias + n : nullptr;
    out.add = all.add || k > 0;
    return out;
}

template <class T>
void multiply_float(const wh_matrix& w, const float* x, int rows, int n0, int n1, const Output& all) {
    static constexpr auto narrow = float_tiles<T, 1>(std::make_index_sequence<kFloatRows>());
    static constexpr auto wide = float_tiles<T, kBlocks>(std::make_index_sequence<kFloatRows>());
    static constexpr auto narrow_copy = float_tiles<float, 1>(std::make_index_sequence<kFloatRows>());
    static constexpr auto wide_copy = float_tiles<float, kBlocks>(std::make_index_sequence<kFloatRows>());
    const Tiles tiles(w, rows);
    const bool copied = sizeof(T) < sizeof(float) && tiles.count >= kCopied;
    const size_t stride = static_cast<size_t>(padded(w)) * kBlock;
    const int panel = tiles.count > 1 ? kPanel : std::max(w.k, 1);
    alignas(64) float copy[kBlocks * kPanel * kBlock];
    each_panel(w.k, panel, n0, n1, rows < 4 ? 1 : kBlocks, [&](int n, int blocks, int k) {
        const int inputs = std::min(panel, w.k - k);
        const T* const weights = static_cast<const T*>(w.data) + n / kBlock * stride + static_cast<size_t>(k) * kBlock;
        for (int b = 0; copied && b < blocks; b++) {
            float* to = copy + static_cast<size_t>(b) * kPanel * kBlock;
            for (int i = 0; i < inputs * kBlock; i += kLanes) store(to + i, load_weights(weights + b * stride + i));
        }
        Output out = panel_output(w, all, n, n1, blocks, k);
        for (int tile = 0; tile < tiles.count; tile++) {
            const int first = tiles.begin(tile), height = tiles.begin(tile + 1) - first;
            const float* from = x + static_cast<size_t>(first) * w.k + static_cast<size_t>(k) * height;
            out.y = all.y + first * all.ldy + n;
            fetch(out, tile, tiles.count, weights, weights + blocks * stride, stride);
            if (copied) {
                (blocks == kBlocks ? wide_copy : narrow_copy)[height - 1](copy, kPanel * kBlock, from, inputs, out);
            } else {
                (blocks == kBlocks ? wide : narrow)[height - 1](weights, stride, from, inputs, out);
            }
        }
    });
}

template <Bytes F>
void multiply_bytes(const wh_matrix& w, const void* scratch, int rows, int n0, int n1, const Output& all) {
    static constexpr auto narrow = byte_tiles<F, 1>(std::make_index_sequence<kByteRows>());
    static constexpr auto wide = byte_tiles<F, kBlocks>(std::make_index_sequence<kByteRows>());
    const Tiles tiles(w, rows);
    const int groups = padded(w) / kGroup;
    const size_t bytes = static_cast<size_t>(groups) * group_bytes(F), scales = static_cast<size_t>(groups) * group_scales(F);
    each_panel(1, 1, n0, n1, rows < 2 ? 1 : kBlocks, [&](int n, int blocks, int) {
        const uint8_t* const weights = static_cast<const uint8_t*>(w.data) + n / kBlock * bytes;
        const uint16_t* const scale = static_cast<const uint16_t*>(w.scales) + n / kBlock * scales;
        Output out = panel_output(w, all, n, n1, blocks, 0);
        for (int tile = 0; tile < tiles.count; tile++) {
            const int first = tiles.begin(tile), height = tiles.begin(tile + 1) - first;
            out.y = all.y + first * all.ldy + n;
            fetch(out, tile, tiles.count, weights, weights + blocks * bytes, bytes);
            (blocks == kBlocks ? wide : narrow)[height - 1](weights, bytes, scale, scales,
                                                            quantised(w, scratch, first, height), groups, out);
        }
    });
}

float half_to_float(const uint16_t* from) {
    uint16_t lanes[kLanes] = {*from};
    return load_f16(lanes)[0];
}

}  // namespace

size_t prepared_bytes(const wh_matrix& w, int rows) {
    if (in_bytes(w)) return row_bytes(w) * rows;
    return rows > 1 ? sizeof(float) * w.k * rows : 0;
}

void prepare(const wh_matrix& w, const float* x, int ldx, int first, int last, int rows, void* scratch) {
    const Tiles tiles(w, rows);
    for (int row = first; row < last; row++) {
        const float* from = x + static_cast<size_t>(row) * ldx;
        const int tile = tiles.of(row), begin = tiles.begin(tile), height = tiles.begin(tile + 1) - begin;
        if (in_bytes(w)) {
            quantise_row(w, from, quantised(w, scratch, begin, height), height, row - begin);
        } else if (rows > 1) {
            float* to = static_cast<float*>(scratch) + static_cast<size_t>(begin) * w.k + (row - begin);
            for (int k = 0; k < w.k; k++) to[static_cast<size_t>(k) * height] = from[k];
        }
    }
}

void multiply(const wh_matrix& w, const float* x, int, const void* scratch, int rows, int n0, int n1, float* y,
              int ldy, bool add) {
    const Output out{y, static_cast<size_t>(ldy), nullptr, add, 0, {}};
    const float* inputs = rows > 1 ? static_cast<const float*>(scratch) : x;
    switch (w.format) {
        case WH_FLOAT32:
            return multiply_float<float>(w, inputs, rows, n0, n1, out);
        case WH_BFLOAT16:
            return multiply_float<uint16_t>(w, inputs, rows, n0, n1, out);
        case WH_INT8:
            return multiply_bytes<kInt8>(w, scratch, rows, n0, n1, out);
        default:
            return multiply_bytes<kInt4>(w, scratch, rows, n0, n1, out);
    }
}

int piece_outputs(const wh_matrix& w, int) {
    const int bits = w.format == WH_FLOAT32 ? 32 : w.format == WH_BFLOAT16 ? 16 : w.format == WH_INT8 ? 9 : 5;
    const int by_size = static_cast<int>(8L * kPieceBytes / (static_cast<long>(bits) * padded(w)));
    return std::max(std::min(by_size, w.n / kPieces) / 32, 1) * 32;
}

void weight_row(const wh_matrix& w, int n, float* out) {
    const size_t groups = padded(w) / kGroup, block = n / kBlock, lane = n % kBlock;
    const uint8_t* bytes = static_cast<const uint8_t*>(w.data);
    const uint16_t* scales = static_cast<const uint16_t*>(w.scales);
    for (int k = 0; k < w.k; k++) {
        const size_t group = block * groups + k / kGroup, i = k % kGroup;
        const size_t at = (group * kGroup + i) * kBlock + lane;
        if (w.format == WH_FLOAT32) {
            out[k] = static_cast<const float*>(w.data)[at];
        } else if (w.format == WH_BFLOAT16) {
            const uint32_t bits = static_cast<uint32_t>(static_cast<const uint16_t*>(w.data)[at]) << 16;
            std::memcpy(out + k, &bits, 4);
        } else if (w.format == WH_INT8) {
            const int byte = bytes[(group * kUnits + i / 4) * 4 * kBlock + lane * 4 + i % 4];
            out[k] = half_to_float(scales + group * kBlock + lane) * static_cast<float>(byte - 128);
        } else {
            const int byte = bytes[(group * kUnits / 2 + i % 16 / 4) * 4 * kBlock + lane * 4 + i % 4];
            const uint16_t* scale = scales + group * 2 * kBlock + lane;
            out[k] = half_to_float(scale) * static_cast<float>(i < 16 ? byte & 15 : byte >> 4) +
                     half_to_float(scale + kBlock);
        }
    }
}

}  // namespace wh
