#include "linear.h"

#include <algorithm>
#include <array>
#include <numeric>
#include <utility>

#include "tiles.h"

namespace wh {

namespace {

// The largest tiles whose sums fit into the registers, rows by blocks.
#if defined(__AVX512F__)
constexpr int kFloatRows = 9, kFloatBlocks = 3, kByteRows = 6, kByteBlocks = 2;
#elif defined(__AVX2__)
constexpr int kFloatRows = 6, kFloatBlocks = 1, kByteRows = 4, kByteBlocks = 1;
#else
constexpr int kFloatRows = 3, kFloatBlocks = 1, kByteRows = 1, kByteBlocks = 1;
#endif
constexpr int kTallRows = kLanes == 16 ? 28 : kFloatRows;  // of bfloat16 in a tile of one block: each is widened once
constexpr int kPanel = 128;      // inputs of a float panel, which stays in the first cache while tiles pass
constexpr int kCopied = 3;       // tiles from which bfloat16 weights are worth a copy in float32
constexpr int kAhead = kLanes == 16 ? 4096 : 1024;  // bytes, as measured on Cascade Lake and on Zen 3
constexpr int kBlockRows = 128;  // of x that several blocks of outputs read one after the other
constexpr int kPieceBytes = 64 * 1024, kPieces = 16;  // the most bytes, the least pieces of a matrix: a few us each
constexpr int kMostInputs = 4;   // from one line that a tile fetches to the next
constexpr int kFew = 4;          // rows below which one block of outputs at a time is fastest

bool in_bytes(const wh_matrix& w) { return w.format == WH_INT8 || w.format == WH_INT4; }

// Rows in bfloat16 that are one tile of one block; in float32, where memory is the limit, two tiles of three are faster.
bool tall(const wh_matrix& w, int rows) {
    return w.format == WH_BFLOAT16 && rows > kFloatRows && rows <= kTallRows;
}

// Blocks of outputs that a tile takes at a time.
int blocks_at_once(const wh_matrix& w, int rows) {
    if (in_bytes(w)) return rows < 2 ? 1 : kByteBlocks;
    return rows < kFew || tall(w, rows) ? 1 : kFloatBlocks;
}

int padded(const wh_matrix& w) { return round_up(w.k, kGroup); }

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
            static_cast<int32_t>(kWhole + static_cast<uint32_t>(kTaken - 128) * static_cast<uint32_t>(sum));
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

// to[k * apart + row] = from[row * ldx + k], four by four where there are so many.
void transpose(const float* from, int ldx, int rows, int n, float* to, int apart) {
    const auto one = [&](int row, int k) { to[static_cast<size_t>(k) * apart + row] = from[static_cast<size_t>(row) * ldx + k]; };
    int k = 0;
    for (; rows >= 4 && k + 4 <= n; k += 4) {
        for (int row = 0; row < rows; row += 4) {
            const int first = std::min(row, rows - 4);  // the last four may overlap those before
            const float* x = from + static_cast<size_t>(first) * ldx + k;
            vec4 lines[4];
            for (int i = 0; i < 4; i++) lines[i] = load_as<vec4>(x + static_cast<size_t>(i) * ldx);
            transpose4(lines);
            for (int i = 0; i < 4; i++) std::memcpy(to + static_cast<size_t>(k + i) * apart + first, lines + i, sizeof lines[i]);
        }
    }
    for (; k < n; k++) {
        for (int row = 0; row < rows; row++) one(row, k);
    }
}

template <class T>
using FloatTile = void (*)(const T*, size_t, const float*, int, const Output&);
using ByteTile = void (*)(const uint8_t*, size_t, const uint16_t*, size_t, Quantised, int, const Output&);

// Tiles by their height; from `Least` rows on.
template <class T, int B, int F, int Least = 1, int Turn = 1, size_t... R>
constexpr std::array<FloatTile<T>, sizeof...(R)> float_tiles(std::index_sequence<R...>) {
    return {float_tile<T, static_cast<int>(R) + Least, B, F, Turn>...};
}
template <Bytes F, int B, bool FETCH, size_t... R>
constexpr std::array<ByteTile, sizeof...(R)> byte_tiles(std::index_sequence<R...>) {
    return {byte_tile<F, static_cast<int>(R) + 1, B, FETCH>...};
}

// The tile of one block that fetches a line once in so many inputs; 0: none, 1: as a lone tile does. One of several is at
// least half as high as they may be.
template <class T>
FloatTile<T> paced_tile_of(int height, int turn) {
    constexpr int kHalf = (kFloatRows + 1) / 2;
    constexpr auto every = std::make_index_sequence<kFloatRows>();
    constexpr auto high = std::make_index_sequence<kFloatRows - kHalf + 1>();
    static constexpr auto alone = float_tiles<T, 1, 1>(every);
    static constexpr std::array several = {float_tiles<T, 1, 0, kHalf>(high), float_tiles<T, 1, 1, kHalf, 2>(high),
                                           float_tiles<T, 1, 1, kHalf, 3>(high), float_tiles<T, 1, 1, kHalf, 4>(high)};
    if (turn == 1 || height < kHalf) return alone[height - 1];
    return several[turn == 0 ? 0 : turn - 1][height - kHalf];
}

// The tile of so many rows and blocks that fetches so many lines at a time; one with fewer blocks than the registers
// hold fetches a line for each of them. The first of several tiles is at least half as high as they may be.
template <class T>
FloatTile<T> float_tile_of(int height, int blocks, int fetched) {
    constexpr auto every = std::make_index_sequence<kFloatRows>();
    constexpr int kHalf = (kFloatRows + 1) / 2, kSome = kFloatBlocks > 1 ? 2 : 1;
    constexpr auto high = std::make_index_sequence<kFloatRows - kHalf + 1>();
    constexpr auto tall = std::make_index_sequence<sizeof(T) == sizeof(float) ? kFloatRows : kTallRows>();
    static constexpr auto one = float_tiles<T, 1, 1>(tall);
    static constexpr auto some = float_tiles<T, kSome, kSome>(every);
    static constexpr auto alone = float_tiles<T, kFloatBlocks, kFloatBlocks>(every);
    static constexpr auto none = float_tiles<T, kFloatBlocks, 0, kHalf>(high);
    static constexpr auto first = float_tiles<T, kFloatBlocks, 1, kHalf>(high);
    static constexpr auto both = float_tiles<T, kFloatBlocks, kSome, kHalf>(high);
    if (blocks == 1) return one[height - 1];
    if (blocks < kFloatBlocks) return some[height - 1];
    if (fetched == kFloatBlocks || height < kHalf) return alone[height - 1];
    return (fetched == 0 ? none : fetched == 1 ? first : both)[height - kHalf];
}

// A lone tile runs at the speed of memory and fetches its own weights. Of several tiles each of the first fetches its
// share of the blocks that come next, so that memory works while they compute. Says how many lines at a time.
int fetch(Output& out, int tile, int tiles, const char* own, const char* next, size_t stride, int blocks) {
    const int share = (blocks + tiles - 1) / tiles, first = std::min(blocks, tile * share);
    const int count = std::min(blocks, first + share) - first;
    for (int f = 0; f < kMostFetched; f++) {
        if (tiles == 1) {
            out.ahead[f] = own + std::min(f, blocks - 1) * stride + kAhead;
        } else {
            out.ahead[f] = f < count ? next + (first + f) * stride : own;
        }
    }
    return count;
}

// The same for tiles of one block: each of the first fetches lines that lie one behind the other, so many inputs apart
// that together they fetch all. Says how many inputs; 0: the tile fetches nothing.
int pace(Output& out, int tile, int tiles, const char* own, const char* next, int lines, int inputs) {
    const int turn = tiles == 1 ? 1 : std::min(tiles * inputs / lines, kMostInputs);
    const int first = tile * ((inputs + turn - 1) / turn);
    out.ahead[0] = tiles == 1 ? own + kAhead : next + static_cast<size_t>(first) * kLine;
    return first < lines ? turn : 0;
}

// Adds up over the panels of inputs: the first one brings the bias in, the others add to what is there.
Output panel_output(const wh_matrix& w, const Output& all, int n, int n1, int blocks, int k) {
    Output out = all;
    out.n = std::min(blocks * kBlock, n1 - n);
    out.bias = w.bias && k == 0 ? w.bias + n : nullptr;
    out.add = all.add || k > 0;
    return out;
}

// Calls body(first row, height, number) for some tiles.
template <class Body>
void each_tile(const Tiles& tiles, int from, int count, const Body& body) {
    for (int tile = from; tile < from + count; tile++) {
        const int row = tiles.begin(tile);
        body(row, tiles.begin(tile + 1) - row, tile - from);
    }
}

template <class T>
void multiply_float(const wh_matrix& w, const float* x, int rows, const Area& area, const Output& all) {
    const Tiles tiles(w, rows);
    const int tile = tiles.of(area.row0), count = tiles.of(area.row1 - 1) - tile + 1, most = blocks_at_once(w, rows);
    const bool copied = sizeof(T) < sizeof(float) && count >= kCopied;
    const size_t stride = static_cast<size_t>(padded(w)) * kBlock;
    const int panels = count > 1 ? std::max(1, (w.k + kPanel - 1) / kPanel) : 1;
    alignas(64) float copy[kFloatBlocks * kPanel * kBlock];
    for (int n = area.n0, blocks; n < area.n1; n += blocks * kBlock) {
        blocks = std::min(most, (area.n1 - n + kBlock - 1) / kBlock);
        const T* weights = static_cast<const T*>(w.data) + n / kBlock * stride;
        const T* const beyond = weights + blocks * stride;
        for (int panel = 0, k = 0, inputs; panel < panels; panel++, k += inputs, weights += inputs * kBlock) {
            inputs = static_cast<int>(static_cast<long>(w.k) * (panel + 1) / panels) - k;
            const T* const next = panel + 1 < panels ? weights + inputs * kBlock : beyond;
            for (int b = 0; copied && b < blocks; b++) {
                float* to = copy + static_cast<size_t>(b) * kPanel * kBlock;
                for (int i = 0; i < inputs * kBlock; i += kLanes) store(to + i, load_weights(weights + b * stride + i));
            }
            Output out = panel_output(w, all, n, area.n1, blocks, k);
            each_tile(tiles, tile, count, [&](int first, int height, int number) {
                const float* from = x + static_cast<size_t>(first) * w.k + static_cast<size_t>(k) * height;
                out.y = all.y + first * all.ldy + n;
                const char* const own = reinterpret_cast<const char*>(weights);
                const char* const ahead = reinterpret_cast<const char*>(next);
                const int lines = std::max<int>(1, inputs * sizeof(T) * kBlock / kLine);
                const int fetched = kFloatBlocks == 1 ? pace(out, number, count, own, ahead, lines, inputs)
                                                      : fetch(out, number, count, own, ahead, stride * sizeof(T), blocks);
                const auto tile_of = [&](auto weight) {
                    if constexpr (kFloatBlocks == 1)
                        return paced_tile_of<decltype(weight)>(height, fetched);
                    else
                        return float_tile_of<decltype(weight)>(height, blocks, fetched);
                };
                if (copied) {
                    tile_of(float())(copy, kPanel * kBlock, from, inputs, out);
                } else {
                    tile_of(T())(weights, stride, from, inputs, out);
                }
            });
        }
    }
}

// Whatever stands between two blocks of one row, memory waits for.
template <Bytes F>
void multiply_row(const wh_matrix& w, const void* scratch, const Area& area, Output out) {
    const int groups = padded(w) / kGroup;
    const size_t bytes = static_cast<size_t>(groups) * group_bytes(F), scales = static_cast<size_t>(groups) * group_scales(F);
    const Quantised x = quantised(w, scratch, 0, 1);
    float* const y = out.y;
    for (int n = area.n0; n < area.n1; n += kBlock) {
        const uint8_t* weights = static_cast<const uint8_t*>(w.data) + n / kBlock * bytes;
        out.y = y + n;
        out.n = std::min(kBlock, area.n1 - n);
        out.bias = w.bias ? w.bias + n : nullptr;
        out.ahead[0] = reinterpret_cast<const char*>(weights) + kAhead;
        byte_tile<F, 1, 1, true>(weights, bytes, static_cast<const uint16_t*>(w.scales) + n / kBlock * scales, scales, x, groups, out);
    }
}

template <Bytes F>
void multiply_bytes(const wh_matrix& w, const void* scratch, int rows, const Area& area, const Output& all) {
    if (rows == 1) return multiply_row<F>(w, scratch, area, all);
    static constexpr auto narrow = byte_tiles<F, 1, true>(std::make_index_sequence<kByteRows>());
    static constexpr auto wide = byte_tiles<F, kByteBlocks, true>(std::make_index_sequence<kByteRows>());
    static constexpr auto still = byte_tiles<F, kByteBlocks, false>(std::make_index_sequence<kByteRows>());
    const Tiles tiles(w, rows);
    const int tile = tiles.of(area.row0), count = tiles.of(area.row1 - 1) - tile + 1, most = blocks_at_once(w, rows);
    const int groups = padded(w) / kGroup;
    const size_t bytes = static_cast<size_t>(groups) * group_bytes(F), scales = static_cast<size_t>(groups) * group_scales(F);
    for (int n = area.n0, blocks; n < area.n1; n += blocks * kBlock) {
        blocks = std::min(most, (area.n1 - n + kBlock - 1) / kBlock);
        const uint8_t* const weights = static_cast<const uint8_t*>(w.data) + n / kBlock * bytes;
        const uint16_t* const scale = static_cast<const uint16_t*>(w.scales) + n / kBlock * scales;
        const char *const own = reinterpret_cast<const char*>(weights), *const next = own + blocks * bytes;
        Output out = panel_output(w, all, n, area.n1, blocks, 0);
        each_tile(tiles, tile, count, [&](int first, int height, int number) {
            out.y = all.y + first * all.ldy + n;
            const int fetched = fetch(out, number, count, own, next, bytes, blocks);
            (blocks < kByteBlocks ? narrow : fetched ? wide : still)[height - 1](
                weights, bytes, scale, scales, quantised(w, scratch, first, height), groups, out);
        });
    }
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
    for (int row = first, next; row < last; row = next) {
        const int tile = tiles.of(row), begin = tiles.begin(tile), height = tiles.begin(tile + 1) - begin;
        next = std::min(last, begin + height);
        const float* from = x + static_cast<size_t>(row) * ldx;
        if (in_bytes(w)) {
            for (int r = row; r < next; r++, from += ldx) {
                quantise_row(w, from, quantised(w, scratch, begin, height), height, r - begin);
            }
        } else if (rows > 1) {
            float* to = static_cast<float*>(scratch) + static_cast<size_t>(begin) * w.k + (row - begin);
            transpose(from, ldx, next - row, w.k, to, height);
        }
    }
}

Tiles::Tiles(const wh_matrix& w, int rows) : rows(rows) {
    const int most = in_bytes(w) ? kByteRows : tall(w, rows) ? kTallRows : kFloatRows;
    count = (rows + most - 1) / most;
    low = count ? rows / count : 0;
    high = count ? rows % count : 0;
}

Pieces::Pieces(const wh_matrix& w, int rows, int step) : tiles_(w, rows), n_(w.n) {
    const int least = std::lcm(step, blocks_at_once(w, rows) * kBlock);
    const int bits = w.format == WH_FLOAT32 ? 32 : w.format == WH_BFLOAT16 ? 16 : w.format == WH_INT8 ? 9 : 5;
    const int by_size = static_cast<int>(8L * kPieceBytes / (static_cast<long>(bits) * std::max(padded(w), 1)));
    outputs_ = std::max(std::min(by_size, w.n / kPieces) / least, 1) * least;
    across_ = (w.n + outputs_ - 1) / outputs_;
    blocks_ = rows == 0 ? 0 : std::max(1, (rows + kBlockRows / 2) / kBlockRows);
}

Area Pieces::operator[](int i) const {
    const int block = i / across_, n0 = i % across_ * outputs_;
    const auto row = [&](int b) { return tiles_.begin(static_cast<int>(static_cast<long>(tiles_.count) * b / blocks_)); };
    return {row(block), row(block + 1), n0, std::min(n_, n0 + outputs_)};
}

void multiply(const wh_matrix& w, const float* x, const void* scratch, int rows, const Area& area, float* y, int ldy,
              bool add) {
    const Output out{y, static_cast<size_t>(ldy), nullptr, add, 0, {}};
    const float* inputs = rows > 1 ? static_cast<const float*>(scratch) : x;
    switch (w.format) {
        case WH_FLOAT32:
            return multiply_float<float>(w, inputs, rows, area, out);
        case WH_BFLOAT16:
            return multiply_float<uint16_t>(w, inputs, rows, area, out);
        case WH_INT8:
            return multiply_bytes<kInt8>(w, scratch, rows, area, out);
        default:
            return multiply_bytes<kInt4>(w, scratch, rows, area, out);
    }
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
