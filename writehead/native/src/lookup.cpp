// Attention of all tokens of a call over the caches of their rows.
#include "lookup.h"

#include <algorithm>
#include <cmath>

#include "linear.h"
#include "vec.h"

namespace wh {
namespace {

constexpr int kMerged = 16;  // pieces that are read side by side, since another thread's sums are far away

// Numbers of scratch memory that a thread needs: for the queries of a tile, and for keys and values.
size_t scratch_numbers(int dim) {
    const size_t even = round_up(dim, 2);
    return passes(kTileRows) * kQueryRows * even + kSpan * (even + round_up(dim, kBlock));
}

// Behind the queries of a thread: room for keys and values of 16 bits as floats, or for queries that are rounded.
float* spare_of(float* scratch, int dim) {
    return scratch + static_cast<size_t>(passes(kTileRows)) * kQueryRows * round_up(dim, 2);
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
    }
    cut(threads);
    const size_t sums = pieces_.size() * rows_;
    y_.reserve(sums * wide_);
    top_.reserve(sums + kLanes);  // whole vectors are read
    total_.reserve(sums + kLanes);
    scratch_.reserve(static_cast<size_t>(threads) * scratch_numbers(cache.head_dim));
    packed_.resize(threads);
}

// Lays all slots on a line, of which each thread has its share, and cuts what is left of a share in halves: large pieces are
// cheap, and small ones at the end let all threads end together.
void Lookup::cut(int threads) {
    std::vector<std::vector<Piece>> shares(threads);
    size_t all = 0, at = 0;
    for (const Part& part : parts_) all += static_cast<size_t>(part.slots) * cache_.kv_heads;
    const auto whole = [](size_t slots, size_t of) { return (slots + of - 1) / of * of; };
    const auto end_of = [&](size_t thread) { return whole(all * (thread + 1) / threads, kBlock); };
    int thread = 0;
    for (int part = 0; part < static_cast<int>(parts_.size()); part++) {
        for (int head = 0; head < cache_.kv_heads; head++) {
            for (int slot = 0, some; slot < parts_[part].slots; slot += some, at += some) {
                while (at >= end_of(thread)) thread++;
                const size_t left = end_of(thread) - at;
                const size_t wanted = threads == 1 || left < 2 * kSpan ? left : whole(left / 2, kSpan);
                some = static_cast<int>(std::min<size_t>(wanted, parts_[part].slots - slot));
                shares[thread].push_back({part, head, slot, slot + some});
            }
        }
    }
    size_t most = 0;
    for (const auto& share : shares) most = std::max(most, share.size());
    pieces_.clear();
    first_of_.clear();
    for (const auto& share : shares) {
        for (const Piece& piece : share) {
            if (piece.first == 0) first_of_.push_back(pieces_.size());
            pieces_.push_back(piece);
        }
        for (size_t i = share.size(); i < most; i++) {  // pieces of nothing
            Piece last = pieces_.back();
            last.first = last.last;
            pieces_.push_back(last);
        }
    }
    first_of_.push_back(pieces_.size());
}

void Lookup::read(Team& team, const Look& look, const float* q, int apart) {
    for (Packed& packed : packed_) packed.part = -1;
    team.share(static_cast<int>(pieces_.size()), [&](int i, int thread) { read_piece(i, look, q, apart, thread); });
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
    };
}

void Lookup::pack(Packed& packed, const Piece& piece, const Look& look, const float* q, int apart, float* scratch) const {
    const Part& part = parts_[piece.part];
    const int D = cache_.head_dim, rows = part.last - part.first;
    const float* from[kTileRows];
    for (int r = 0; r < rows; r++) {
        const int token = part.token + (part.first + r) / group_;
        const int query_head = piece.head * group_ + (part.first + r) % group_;
        from[r] = q + static_cast<size_t>(token) * apart + query_head * D;
        packed.pos[r] = tokens_[token].pos;
        if (look.slopes) packed.slope[r] = look.slopes[query_head] * kLog2e;
    }
    const float scale = look.scale * kLog2e;
    const Stored kind = stored(cache_.format);
    const size_t each = static_cast<size_t>(kind.query) * round_up(D, kind.together) * kQueryRows;  // bytes of a pass
    float* to = scratch;
    for (int row = 0; row < rows; row += pass_rows(rows), to += each / sizeof(float)) {
        const int count = std::min(pass_rows(rows), rows - row);
        if (cache_.format == WH_INT8)
            pack_pairs(from + row, count, D, scale, spare_of(scratch, D), to, packed.grain + row);
        else
            pack_queries(from + row, count, D, scale, to);
    }
    packed.part = piece.part;
    packed.head = piece.head;
}

void Lookup::read_piece(size_t i, const Look& look, const float* q, int apart, int thread) {
    const Piece& piece = pieces_[i];
    const Part& part = parts_[piece.part];
    const int D = cache_.head_dim;
    float* scratch = scratch_.data() + thread * scratch_numbers(D);
    Packed& packed = packed_[thread];
    if (packed.part != piece.part || packed.head != piece.head) pack(packed, piece, look, q, apart, scratch);
    Keys keys = keys_at(part, piece.head, look);
    if ((i + 1) % (pieces_.size() / packed_.size()) != 0) {  // as a rule this thread's next
        const Piece& next = pieces_[i + 1];
        const Keys other = keys_at(parts_[next.part], next.head, look);
        keys.next = static_cast<const char*>(other.k) + next.first * key_bytes();
    }
    const size_t at = i * rows_;
    const Tile tile{
        part.last - part.first, scratch,          packed.grain,      packed.pos, look.slopes ? packed.slope : nullptr,
        spare_of(scratch, D),   y_.data() + at * wide_, top_.data() + at, total_.data() + at,
    };
    attend(tile, keys, look.reach, piece.first, piece.last);
}

void Lookup::collect(int token, float* to) const {
    const int first_part = part_of_[token], begin = (token - parts_[first_part].token) * group_;
    for (int head = 0; head < cache_.kv_heads; head++) {
        for (int row = begin, some; row < begin + group_; row += some, to += some * cache_.head_dim) {
            some = std::min({kLanes, begin + group_ - row, kTileRows - row % kTileRows});
            const size_t part = first_part + row / kTileRows;
            merge(part * cache_.kv_heads + head, row % kTileRows, some, to);
        }
    }
}

// Some rows' sums over all pieces of a unit, by the sums of their weights; a row that read nothing gets zeros.
void Lookup::merge(size_t unit, int row, int rows, float* to) const {
    const int D = cache_.head_dim, pieces = static_cast<int>(first_of_[unit + 1] - first_of_[unit]);
    const size_t at = first_of_[unit] * rows_ + row, apart = static_cast<size_t>(rows_) * wide_;
    vec top = splat(-INFINITY), total = {};
    for (int i = 0; i < pieces; i++) top = max(top, load(top_.data() + at + i * rows_));
    top = top > splat(-INFINITY) ? top : vec{};
    const auto weight = [&](int i) { return exp((load(top_.data() + at + i * rows_) - top) * splat(1 / kLog2e)); };
    for (int i = 0; i < pieces; i++) total = fma(weight(i), load(total_.data() + at + i * rows_), total);
    std::fill_n(to, static_cast<size_t>(rows) * D, 0.0f);
    for (int first = 0; first < pieces; first += kMerged) {
        const int some = std::min(kMerged, pieces - first);
        float share[kMerged][kLanes];
        for (int i = 0; i < some; i++) store(share[i], total == vec{} ? vec{} : weight(first + i) / total);
        for (int r = 0; r < rows; r++) {
            const float* from = y_.data() + (at + first * rows_ + r) * wide_;
            float* y = to + r * D;
            int d = 0;
            for (; d + kLanes <= D; d += kLanes) {
                vec sum = load(y + d);
                for (int i = 0; i < some; i++) sum = fma(splat(share[i][r]), load(from + i * apart + d), sum);
                store(y + d, sum);
            }
            for (; d < D; d++) {
                for (int i = 0; i < some; i++) y[d] += share[i][r] * from[i * apart + d];
            }
        }
    }
}

}  // namespace wh
