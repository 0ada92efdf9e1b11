// Attention of all tokens of a call over the caches of their rows.
#include "lookup.h"

#include <algorithm>
#include <cmath>

#include "linear.h"
#include "vec.h"

namespace wh {
namespace {

constexpr int kLeastSlots = 64;    // of a stretch of the cache
constexpr int kStretchSlots = 96;  // that are read in the time that beginning and merging a stretch takes
constexpr int kMostStretches = 8;  // for each thread
constexpr int kMerged = 16;        // that are read side by side, since another thread's sums are far away

// Numbers of scratch memory that a thread needs: for the queries of a tile, and for keys and values.
size_t scratch_numbers(int dim) {
    const size_t even = round_up(dim, 2);
    return round_up(kTileRows, kQueryRows) * even + kSpan * (even + round_up(dim, kBlock));
}

// Into how many stretches each of `units` caches is cut. The last thread to end has its share of the pieces, and ends about
// a piece late: small pieces make up for that, large ones are cheaper.
int stretches(int units, int slots, int threads) {
    if (units == 0 || threads == 1) return 1;
    int best = 1;
    double least = INFINITY;
    for (int s = 1; s == 1 || (s * units <= kMostStretches * threads && s * kLeastSlots <= slots); s++) {
        const int pieces = (units * s + threads - 1) / threads + 1;
        const double time = pieces * (static_cast<double>(slots) / s + kStretchSlots);
        if (time < least) {
            best = s;
            least = time;
        }
    }
    return best;
}

// to[d * kQueryRows + row] = factor * from[row][d].
template <class Number>
void interleave(const Number* const* from, int rows, int count, Number factor, Number* to) {
    typedef Number four __attribute__((vector_size(16)));
    int d = 0;
    for (; kQueryRows >= 4 && d + 4 <= count; d += 4) {
        for (int row = 0; row < rows; row += 4) {
            const int first = std::max(0, std::min(row, rows - 4));  // the last four may overlap those before, or repeat
            vec4 lines[4];
            for (int i = 0; i < 4; i++) {
                const four line = load_as<four>(from[std::min(first + i, rows - 1)] + d) * factor;
                std::memcpy(lines + i, &line, sizeof line);
            }
            transpose4(lines);
            for (int i = 0; i < 4; i++) std::memcpy(to + (d + i) * kQueryRows + first, lines + i, sizeof lines[i]);
        }
    }
    for (; d < count; d++) {
        for (int row = 0; row < rows; row++) to[d * kQueryRows + row] = factor * from[row][d];
    }
}

// Rounds to integers of 16 bits, so few that no sum of `dim` products with 8 bits overflows: what 1 is worth.
float round_row(const float* from, int dim, float scale, int16_t* to) {
    const float limit = std::min(kMost, std::floor(2147483647.0f / 128 / dim));
    vec most = {}, wrong = {};
    for (int d = 0; d < dim; d += kLanes) {
        const vec x = load_some(from + d, dim - d);
        most = max(max(x, -x), most);
        wrong += x * splat(0);  // a NaN or an infinity
    }
    const float top = reduce_max(most);
    const vec factor = splat(top > kLeast ? limit / top : 0);
    for (int d = 0; d < dim; d += kLanes) store_shorts(to + d, round_to_int(load_some(from + d, dim - d) * factor));
    return scale * (top / limit) + reduce_add(wrong);
}

// Scaled queries as a tile wants them: to[d][row]; where keys are in pairs, an odd one out meets zeros.
void pack_queries(const float* const* from, int rows, int dim, float scale, float* to) {
    interleave(from, rows, dim, scale, to);
    if (dim % 2) std::fill_n(to + static_cast<size_t>(dim) * kQueryRows, kQueryRows, 0.0f);
}

// The same as pairs of integers, and what those of each row are worth.
void pack_pairs(const float* const* from, int rows, int dim, float scale, void* spare, void* to, float* grain) {
    const int apart = round_up(dim, kBlock) / 2;
    const int32_t* pairs[kQueryRows];
    for (int row = 0; row < rows; row++) {
        int32_t* line = static_cast<int32_t*>(spare) + row * apart;
        grain[row] = round_row(from[row], dim, scale, reinterpret_cast<int16_t*>(line));
        pairs[row] = line;
    }
    interleave(pairs, rows, (dim + 1) / 2, 1, static_cast<int32_t*>(to));
}

}  // namespace

void Lookup::plan(const wh_cache& cache, const std::vector<Token>& tokens, int threads) {
    cache_ = cache;
    tokens_ = tokens;
    group_ = cache.heads / cache.kv_heads;
    wide_ = round_up(cache.head_dim, kBlock);
    parts_.clear();
    part_of_.clear();
    int most = 0;
    rows_ = 0;
    for (size_t first = 0, last; first < tokens.size(); first = last) {
        int newest = 0;
        for (last = first; last < tokens.size() && tokens[last].row == tokens[first].row; last++) {
            part_of_.push_back(static_cast<int>(parts_.size()));
            newest = std::max(newest, tokens[last].pos);
        }
        const int slots = std::min(cache.slots, round_up(newest + 1, kBlock));
        const int rows = static_cast<int>(last - first) * group_;
        for (int row = 0; row < rows; row += kTileRows)
            parts_.push_back({row, std::min(rows, row + kTileRows), static_cast<int>(first), slots});
        rows_ = std::max(rows_, std::min(rows, kTileRows));
        most = std::max(most, slots);
    }
    const int units = static_cast<int>(parts_.size()) * cache.kv_heads;
    splits_ = stretches(units, most, threads);
    const size_t sums = static_cast<size_t>(units) * splits_ * rows_;
    y_.reserve(sums * wide_);
    top_.reserve(sums + kLanes);  // whole vectors are read
    total_.reserve(sums + kLanes);
    scratch_.reserve(static_cast<size_t>(threads) * scratch_numbers(cache.head_dim));
}

void Lookup::read(Team& team, const Look& look, const float* q, int apart) {
    const int heads = cache_.kv_heads;
    team.share(static_cast<int>(parts_.size()) * heads * splits_, [&](int unit, int thread) {
        float* scratch = scratch_.data() + thread * scratch_numbers(cache_.head_dim);
        read_part(unit, look, q, apart, scratch);
    });
}

Lookup::Place Lookup::place(size_t unit) const {
    const size_t heads = cache_.kv_heads;
    return {static_cast<int>(unit / splits_ / heads), static_cast<int>(unit / splits_ % heads), static_cast<int>(unit % splits_)};
}

int Lookup::first_slot(const Part& part, int split) const {
    return std::min(part.slots, split * round_up((part.slots + splits_ - 1) / splits_, kBlock));
}

size_t Lookup::key_bytes() const {
    const Stored kind = stored(cache_.format);
    return static_cast<size_t>(kind.size) * round_up(cache_.head_dim, kind.together);
}

size_t Lookup::value_bytes() const { return static_cast<size_t>(stored(cache_.format).size) * wide_; }

Keys Lookup::keys_at(const Part& part, int head, const Look& look) const {
    const int row = tokens_[part.token].row;
    const size_t slots = cache_.slots;
    const size_t first = ((static_cast<size_t>(row) * cache_.layers + look.layer) * cache_.kv_heads + head) * slots;
    return {
        cache_.format,
        cache_.head_dim,
        static_cast<const char*>(cache_.k) + first * key_bytes(),
        static_cast<const char*>(cache_.v) + first * value_bytes(),
        cache_.k_scale ? cache_.k_scale + first : nullptr,
        cache_.v_scale ? cache_.v_scale + first : nullptr,
        cache_.pos + row * slots,
        nullptr,
        nullptr,
    };
}

void Lookup::read_part(size_t unit, const Look& look, const float* q, int apart, float* scratch) {
    const auto [part_number, head, split] = place(unit);
    const Part& part = parts_[part_number];
    const int D = cache_.head_dim, rows = part.last - part.first;
    const Stored kind = stored(cache_.format);
    const size_t each = static_cast<size_t>(kind.query) * round_up(D, kind.together);  // bytes of a packed query
    int pos[kTileRows];
    float slope[kTileRows], grain[kTileRows];
    const float* from[kTileRows];
    for (int r = 0; r < rows; r++) {
        const int token = part.token + (part.first + r) / group_;
        const int query_head = head * group_ + (part.first + r) % group_;
        from[r] = q + static_cast<size_t>(token) * apart + query_head * D;
        pos[r] = tokens_[token].pos;
        if (look.slopes) slope[r] = look.slopes[query_head];
    }
    float* spare = scratch + static_cast<size_t>(round_up(kTileRows, kQueryRows)) * round_up(D, 2);
    for (int r = 0; r < rows; r += kQueryRows) {
        const int some = std::min(kQueryRows, rows - r);
        float* to = scratch + r * each / sizeof(float);
        if (cache_.format == WH_INT8)
            pack_pairs(from + r, some, D, look.scale, spare, to, grain + r);
        else
            pack_queries(from + r, some, D, look.scale, to);
    }
    const int begin = first_slot(part, split), end = first_slot(part, split + 1);
    Keys keys = keys_at(part, head, look);
    if (unit + 1 < parts_.size() * cache_.kv_heads * splits_) {  // as a rule this thread's next
        const Place next = place(unit + 1);
        const Keys other = keys_at(parts_[next.part], next.head, look);
        const size_t slot = first_slot(parts_[next.part], next.split);
        keys.next_k = static_cast<const char*>(other.k) + slot * key_bytes();
        keys.next_v = static_cast<const char*>(other.v) + slot * value_bytes();
    }
    const size_t at = unit * rows_;
    const Tile tile{
        rows,  scratch, grain,
        pos,   look.slopes ? slope : nullptr,
        spare, y_.data() + at * wide_,
        top_.data() + at, total_.data() + at,
    };
    attend(tile, keys, look.reach, begin, end);
}

void Lookup::collect(int token, float* to) const {
    const int first_part = part_of_[token], begin = (token - parts_[first_part].token) * group_;
    for (int head = 0; head < cache_.kv_heads; head++) {
        for (int row = begin, some; row < begin + group_; row += some, to += some * cache_.head_dim) {
            some = std::min({kLanes, begin + group_ - row, kTileRows - row % kTileRows});
            const size_t unit = (static_cast<size_t>(first_part + row / kTileRows) * cache_.kv_heads + head) * splits_;
            merge(unit * rows_ + row % kTileRows, some, to);
        }
    }
}

// The sums of some rows over all stretches of the cache, by the sums of their weights; a row that read nothing gets zeros.
void Lookup::merge(size_t at, int rows, float* to) const {
    const int D = cache_.head_dim;
    const size_t apart = static_cast<size_t>(rows_) * wide_;
    vec top = splat(-INFINITY), total = {};
    for (int s = 0; s < splits_; s++) top = max(top, load(top_.data() + at + s * rows_));
    top = top > splat(-INFINITY) ? top : vec{};
    const auto weight = [&](int s) { return exp(load(top_.data() + at + s * rows_) - top); };
    for (int s = 0; s < splits_; s++) total = fma(weight(s), load(total_.data() + at + s * rows_), total);
    std::fill_n(to, static_cast<size_t>(rows) * D, 0.0f);
    for (int first = 0; first < splits_; first += kMerged) {
        const int some = std::min(kMerged, splits_ - first);
        float share[kMerged][kLanes];
        for (int s = 0; s < some; s++) store(share[s], total == vec{} ? vec{} : weight(first + s) / total);
        for (int r = 0; r < rows; r++) {
            const float* from = y_.data() + (at + first * rows_ + r) * wide_;
            float* y = to + r * D;
            int d = 0;
            for (; d + kLanes <= D; d += kLanes) {
                vec sum = load(y + d);
                for (int s = 0; s < some; s++) sum = fma(splat(share[s][r]), load(from + s * apart + d), sum);
                store(y + d, sum);
            }
            for (; d < D; d++) {
                for (int s = 0; s < some; s++) y[d] += share[s][r] * from[s * apart + d];
            }
        }
    }
}

}  // namespace wh
