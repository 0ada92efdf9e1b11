// One step of a whole model for the tokens of a batch, in one parallel region.
#include <algorithm>
#include <vector>

#include "buffer.h"
#include "linear.h"
#include "lookup.h"
#include "rows.h"
#include "threads.h"
#include "writehead.h"

using wh::Buffer, wh::kGroup, wh::normalise, wh::round_up;

namespace {

constexpr int kAlone = 2;      // rows whose input the caller makes alone: that is faster than to share it
constexpr int kTilesEach = 4;  // of rows for each thread, from which on a thread claims a tile at a time

// Numbers from one row to the next: an odd number of cache lines, so that columns do not fight for a part of the caches.
int apart_for(int n) { return (round_up(n, kGroup) / 16 | 1) * 16; }

// Rows that a matrix multiplies.
struct Input {
    const float* x;
    const void* prepared;
};

struct Operand {
    Buffer<float> x;
    Buffer<char> prepared;
};

// Rows of numbers, padded with zeros to a multiple of 32.
struct Rows {
    Buffer<float> numbers;
    int apart = 0;

    float* operator[](int row) const { return numbers.data() + static_cast<size_t>(row) * apart; }
};

int slot_of(const wh_cache& cache, int pos) {
    return cache.ring == 0 || pos < cache.lead ? pos : cache.lead + (pos - cache.lead) % cache.ring;
}

const auto nothing = [](const wh::Area&) {};

}  // namespace

struct wh_engine {
  public:
    wh_engine(const wh_model& given, int threads);

    int32_t step(const wh_call& call);

  private:
    void number(const wh_call& call);
    void reserve();
    void embed(int token, const wh_call& call);
    void project(const wh_layer& layer, const wh_call& call);
    void keep_wanted(const wh_layer& layer, const wh_call& call);
    void attend(const wh_layer& layer);
    void place(int token, int head, const wh_layer& layer, const wh_call& call);
    void feed_inner(const wh_layer& layer);
    void feed_outer(const wh_layer& layer);
    void run(const wh_call& call);
    void spread(const wh_call& call) const;

    template <class Fill>
    Input fill(const wh_matrix& m, int rows, const Fill& row_of);
    Input prepare(const wh_matrix& m, const Rows& rows);
    template <class After>
    void multiply(const wh_matrix& m, const Input& in, int rows, float* y, int apart, bool add, int step,
                  const After& after);
    template <class Work>
    void share_rows(const wh_matrix& m, int rows, const Work& work);

    int count() const { return static_cast<int>(tokens.size()); }

    wh_model model;
    std::vector<wh_layer> layers;
    wh::Team team;

    std::vector<wh::Token> tokens;  // real ones, row by row
    std::vector<int> places;        // of each token in [B][T]
    std::vector<int> wanted;        // tokens whose logits are wanted
    std::vector<wh::Lookup> lookups;

    Rows x, qkv, inner, active;
    int most_inputs = 0;
    Operand input;
};

wh_engine::wh_engine(const wh_model& given, int threads)
    : model(given), layers(given.layers, given.layers + given.depth), team(threads) {
    x.apart = apart_for(model.dim);
    most_inputs = round_up(model.dim, kGroup);
    int caches = 0;
    for (const wh_layer& layer : layers) {
        qkv.apart = std::max(qkv.apart, apart_for(layer.qkv.n));
        inner.apart = std::max(inner.apart, apart_for(layer.inner.n));
        active.apart = std::max(active.apart, apart_for(layer.hidden));
        most_inputs = std::max(most_inputs, round_up(layer.out.k, kGroup));
        caches = std::max(caches, layer.cache + 1);
    }
    lookups = std::vector<wh::Lookup>(caches);
}

int32_t wh_engine::step(const wh_call& call) {
    for (int at = 0; at < call.rows * call.tokens; at++)
        if (call.ids[at] >= model.vocab) return WH_NO_TOKEN;
    number(call);
    reserve();
    if (!tokens.empty()) run(call);
    if (!call.wanted) spread(call);
    return WH_DONE;
}

// Gives each real token its position and its slot in every cache.
void wh_engine::number(const wh_call& call) {
    tokens.clear();
    places.clear();
    wanted.clear();
    for (int at = 0; at < call.rows * call.tokens; at++) {
        if (call.ids[at] < 0) continue;
        const int row = at / call.tokens;
        if (!call.wanted || call.wanted[at]) wanted.push_back(count());
        tokens.push_back({row, static_cast<int>(call.next[row]++)});
        places.push_back(at);
    }
    for (size_t i = 0; i < lookups.size(); i++) {
        const wh_cache& cache = call.caches[i];
        for (const wh::Token& token : tokens) {
            const int slot = slot_of(cache, token.pos);
            cache.pos[static_cast<size_t>(token.row) * cache.slots + slot] = token.pos;
        }
        lookups[i].plan(cache, tokens, team.threads());
    }
}

void wh_engine::reserve() {
    const size_t rows = tokens.size();
    size_t prepared = wh::prepared_bytes(model.head, count());
    for (const wh_layer& layer : layers) {
        for (const wh_matrix* m : {&layer.qkv, &layer.out, &layer.inner, &layer.outer})
            prepared = std::max(prepared, wh::prepared_bytes(*m, count()));
    }
    for (Rows* r : {&x, &qkv, &inner, &active}) r->numbers.reserve(rows * r->apart);
    input.x.reserve(rows * most_inputs);
    input.prepared.reserve(prepared);
}

void wh_engine::run(const wh_call& call) {
    team.share(count(), [&](int token) { embed(token, call); });
    for (const wh_layer& layer : layers) {
        project(layer, call);
        if (&layer == &layers.back()) keep_wanted(layer, call);
        if (count() == 0) return;
        if (model.parallel) feed_inner(layer);
        attend(layer);
        if (!model.parallel) feed_inner(layer);
        feed_outer(layer);
    }
    const Input in = fill(model.head, count(), [&](int row, float* to) {
        normalise(model.last_norm, x[row], model.dim, to);
        if (model.logit_scale != 1)
            for (int i = 0; i < model.dim; i++) to[i] *= model.logit_scale;
    });
    multiply(model.head, in, count(), call.logits, call.logits_apart, false, wh::kBlock, nothing);
}

// Moves the logits of all tokens, which lie one behind the other, to their places in [B][T].
void wh_engine::spread(const wh_call& call) const {
    const size_t apart = call.logits_apart;
    size_t from = wanted.size();
    for (int at = call.rows * call.tokens - 1; at >= 0; at--) {  // backwards, so that nothing is overwritten before it moves
        float* to = call.logits + at * apart;
        if (call.ids[at] < 0)
            std::fill_n(to, apart, 0.0f);
        else if (static_cast<int>(--from) != at)
            std::copy_n(call.logits + from * apart, apart, to);
    }
}

void wh_engine::embed(int token, const wh_call& call) {
    float* to = x[token];
    wh::weight_row(model.table, static_cast<int>(call.ids[places[token]]), to);
    if (model.embed_scale != 1)
        for (int i = 0; i < model.dim; i++) to[i] *= model.embed_scale;
    normalise(model.embed_norm, to, model.dim, to);
    if (call.places)
        for (int i = 0; i < model.dim; i++) to[i] += call.places[static_cast<size_t>(places[token]) * model.dim + i];
}

// Queries, keys and values of all tokens; the last two go into the cache.
void wh_engine::project(const wh_layer& layer, const wh_call& call) {
    const Input in = fill(layer.qkv, count(),
                          [&](int row, float* to) { normalise(layer.norm, x[row], model.dim, to); });
    multiply(layer.qkv, in, count(), qkv[0], qkv.apart, false, wh::kBlock, nothing);
    const int heads = call.caches[layer.cache].kv_heads;
    const auto place_one = [&](int i) { place(i / heads, i % heads, layer, call); };
    if (count() <= kAlone) {
        for (int i = 0; i < count() * heads; i++) place_one(i);
    } else {
        team.share(count() * heads, place_one);
    }
}

// Behind the last keys and values, only tokens whose logits are wanted go on: the others leave.
void wh_engine::keep_wanted(const wh_layer& layer, const wh_call& call) {
    if (wanted.size() == tokens.size()) return;
    for (size_t i = 0; i < wanted.size(); i++) {  // in order, so that nothing is overwritten before it moves
        const size_t from = wanted[i];
        if (from == i) continue;
        tokens[i] = tokens[from];
        std::copy_n(x[from], x.apart, x[i]);
        std::copy_n(qkv[from], qkv.apart, qkv[i]);
    }
    tokens.resize(wanted.size());
    lookups[layer.cache].plan(call.caches[layer.cache], tokens, team.threads());
}

// x += attention of what `project` made
void wh_engine::attend(const wh_layer& layer) {
    wh::Lookup& lookup = lookups[layer.cache];
    lookup.read(team, {layer.layer, {layer.window, layer.lead}, layer.scale, model.slopes}, qkv[0], qkv.apart);
    const Input y = fill(layer.out, count(), [&](int row, float* to) { lookup.collect(row, to); });
    multiply(layer.out, y, count(), x[0], x.apart, true, wh::kBlock, nothing);
}

// Normalises and turns the queries and the key of one key/value head, and stores key and value.
void wh_engine::place(int token, int head, const wh_layer& layer, const wh_call& call) {
    const wh_cache& cache = call.caches[layer.cache];
    const int D = cache.head_dim, group = cache.heads / cache.kv_heads, pos = tokens[token].pos;
    float *q = qkv[token] + head * group * D, *k = qkv[token] + (cache.heads + head) * D;
    for (int i = 0; i <= group; i++) {
        float* to = i < group ? q + i * D : k;
        normalise(i < group ? layer.q_norm : layer.k_norm, to, D, to);
        if (call.turns)
            wh::rotate(to, call.turns + static_cast<size_t>(pos) * model.rotary, model.rotary / 2, model.interleaved);
    }
    wh::store_key_value(cache, tokens[token].row, layer.layer, head, slot_of(cache, pos), k, k + cache.kv_heads * D);
}

void wh_engine::feed_inner(const wh_layer& layer) {
    const Input in = fill(layer.inner, count(),
                          [&](int row, float* to) { normalise(layer.inner_norm, x[row], model.dim, to); });
    const int per = layer.gated ? 2 : 1;
    multiply(layer.inner, in, count(), inner[0], inner.apart, false, per * wh::kBlock, [&](const wh::Area& area) {
        for (int row = area.row0; row < area.row1; row++)
            wh::activate(layer.activation, layer.gated, inner[row] + area.n0, (area.n1 - area.n0) / per,
                         active[row] + area.n0 / per);
    });
}

void wh_engine::feed_outer(const wh_layer& layer) {
    multiply(layer.outer, prepare(layer.outer, active), count(), x[0], x.apart, true, wh::kBlock, nothing);
}

// The input of a matrix whose rows `row_of(row, to)` writes.
template <class Fill>
Input wh_engine::fill(const wh_matrix& m, int rows, const Fill& row_of) {
    const int apart = round_up(m.k, kGroup);
    const Input in{input.x.data(), input.prepared.data()};
    share_rows(m, rows, [&](int first, int last) {
        for (int row = first; row < last; row++) {
            float* to = input.x.data() + static_cast<size_t>(row) * apart;
            row_of(row, to);
            std::fill(to + m.k, to + apart, 0.0f);
        }
        if (wh::prepared_bytes(m, rows)) wh::prepare(m, in.x, apart, first, last, rows, input.prepared.data());
    });
    return in;
}

// The input of a matrix whose rows are there.
Input wh_engine::prepare(const wh_matrix& m, const Rows& from) {
    void* prepared = input.prepared.data();
    if (wh::prepared_bytes(m, count())) {
        share_rows(m, count(), [&](int first, int last) {
            wh::prepare(m, from[0], from.apart, first, last, count(), prepared);
        });
    }
    return {from[0], prepared};
}

// Calls work(first, last) for all rows, on all threads: tile by tile, or row by row where tiles are few.
template <class Work>
void wh_engine::share_rows(const wh_matrix& m, int rows, const Work& work) {
    if (rows <= kAlone) {
        if (rows) work(0, rows);
        return;
    }
    const wh::Tiles tiles(m, rows);
    if (tiles.count < kTilesEach * team.threads())
        team.share(rows, [&](int row) { work(row, row + 1); });
    else
        team.share(tiles.count, [&](int tile) { work(tiles.begin(tile), tiles.begin(tile + 1)); });
}

// y = (or +=) the product, on all threads; `after(area)` follows each piece, whose outputs begin at a multiple of `step`.
template <class After>
void wh_engine::multiply(const wh_matrix& m, const Input& in, int rows, float* y, int apart, bool add, int step,
                         const After& after) {
    const wh::Pieces pieces(m, rows, step);
    team.share(pieces.count(), [&](int i) {
        const wh::Area area = pieces[i];
        wh::multiply(m, in.x, in.prepared, rows, area, y, apart, add);
        after(area);
    });
}

wh_engine* wh_engine_create(const wh_model* model, int32_t threads) {
    try {
        return new wh_engine(*model, threads);
    } catch (...) {
        return nullptr;
    }
}

void wh_engine_free(wh_engine* engine) { delete engine; }

int32_t wh_step(wh_engine* engine, const wh_call* call) {
    try {
        return engine->step(*call);
    } catch (...) {
        return WH_NO_MEMORY;
    }
}
