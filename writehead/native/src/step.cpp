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

constexpr int kAlone = 2;  // rows whose input the caller makes alone: that is faster than to share it

// Rows that a matrix multiplies.
struct Input {
    const float* x;
    int apart;
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

const auto nothing = [](int, int) {};

}  // namespace

struct wh_engine {
  public:
    wh_engine(const wh_model& given, int threads);

    void step(const wh_call& call);

  private:
    void number(const wh_call& call);
    void reserve();
    void embed(int token, const wh_call& call);
    void attend(const wh_layer& layer, const wh_call& call);
    void place(int token, int head, const wh_layer& layer, const wh_call& call);
    void feed_inner(const wh_layer& layer);
    void feed_outer(const wh_layer& layer);
    void run(const wh_call& call);

    template <class Fill>
    Input fill(const wh_matrix& m, int rows, const Fill& row_of);
    Input prepare(const wh_matrix& m, const Rows& rows);
    template <class After>
    void multiply(const wh_matrix& m, const Input& in, int rows, float* y, int apart, bool add,
                  const After& after);

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
    x.apart = round_up(model.dim, kGroup);
    most_inputs = x.apart;
    int caches = 0;
    for (const wh_layer& layer : layers) {
        qkv.apart = std::max(qkv.apart, round_up(layer.qkv.n, kGroup));
        inner.apart = std::max(inner.apart, round_up(layer.inner.n, kGroup));
        active.apart = std::max(active.apart, round_up(layer.hidden, kGroup));
        most_inputs = std::max(most_inputs, round_up(layer.out.k, kGroup));
        caches = std::max(caches, layer.cache + 1);
    }
    lookups = std::vector<wh::Lookup>(caches);
}

void wh_engine::step(const wh_call& call) {
    number(call);
    reserve();
    if (tokens.empty()) return;
    run(call);
}

// Gives each real token its position and its slot in every cache.
void wh_engine::number(const wh_call& call) {
    tokens.clear();
    places.clear();
    wanted.clear();
    for (int at = 0; at < call.rows * call.tokens; at++) {
        if (call.ids[at] < 0) continue;
        const int row = at / call.tokens;
        if (call.wanted[at]) wanted.push_back(count());
        tokens.push_back({row, static_cast<int>(call.next[row]++)});
        places.push_back(at);
    }
    for (size_t i = 0; i < lookups.size(); i++) {
        wh_cache& cache = call.caches[i];
        for (const wh::Token& token : tokens) {
            const int slot = slot_of(cache, token.pos);
            cache.pos[static_cast<size_t>(token.row) * cache.slots + slot] = token.pos;
            cache.used = std::max(cache.used, slot + 1);
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
        attend(layer, call);
        if (!model.parallel) feed_inner(layer);
        feed_outer(layer);
    }
    const int rows = static_cast<int>(wanted.size());
    if (rows == 0) return;
    const Input in = fill(model.head, rows, [&](int row, float* to) {
        normalise(model.last_norm, x[wanted[row]], model.dim, to);
        if (model.logit_scale != 1)
            for (int i = 0; i < model.dim; i++) to[i] *= model.logit_scale;
    });
    multiply(model.head, in, rows, call.logits, call.logits_apart, false, nothing);
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

// x += attention(norm(x)); beside it, with a parallel feed-forward layer, what that makes of the same x.
void wh_engine::attend(const wh_layer& layer, const wh_call& call) {
    const Input in = fill(layer.qkv, count(),
                          [&](int row, float* to) { normalise(layer.norm, x[row], model.dim, to); });
    multiply(layer.qkv, in, count(), qkv[0], qkv.apart, false, nothing);
    if (model.parallel) feed_inner(layer);
    const int heads = call.caches[layer.cache].kv_heads;
    const auto place_one = [&](int i) { place(i / heads, i % heads, layer, call); };
    if (count() <= kAlone) {
        for (int i = 0; i < count() * heads; i++) place_one(i);
    } else {
        team.share(count() * heads, place_one);
    }
    wh::Lookup& lookup = lookups[layer.cache];
    lookup.read(team, {layer.layer, {layer.window, layer.lead}, layer.scale, model.slopes}, qkv[0], qkv.apart);
    const Input y = fill(layer.out, count(), [&](int row, float* to) { lookup.collect(row, to); });
    multiply(layer.out, y, count(), x[0], x.apart, true, nothing);
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
    multiply(layer.inner, in, count(), inner[0], inner.apart, false, [&](int n0, int n1) {
        const int from = layer.gated ? n0 / 2 : n0, n = layer.gated ? (n1 - n0) / 2 : n1 - n0;
        for (int row = 0; row < count(); row++)
            wh::activate(layer.activation, layer.gated, inner[row] + n0, n, active[row] + from);
    });
}

void wh_engine::feed_outer(const wh_layer& layer) {
    multiply(layer.outer, prepare(layer.outer, active), count(), x[0], x.apart, true, nothing);
}

// The input of a matrix whose rows `row_of(row, to)` writes.
template <class Fill>
Input wh_engine::fill(const wh_matrix& m, int rows, const Fill& row_of) {
    const int apart = round_up(m.k, kGroup);
    const bool alone = rows <= kAlone;
    const Input in{input.x.data(), apart, input.prepared.data()};
    const auto write = [&](int row) {
        float* to = input.x.data() + static_cast<size_t>(row) * apart;
        row_of(row, to);
        std::fill(to + m.k, to + apart, 0.0f);
        if (wh::prepared_bytes(m, rows)) wh::prepare(m, in.x, apart, row, row + 1, rows, input.prepared.data());
    };
    if (!alone) {
        team.share(rows, write);
    } else {
        for (int row = 0; row < rows; row++) write(row);
    }
    return in;
}

// The input of a matrix whose rows are there.
Input wh_engine::prepare(const wh_matrix& m, const Rows& from) {
    const int rows = count();
    const bool alone = rows <= kAlone;
    void* prepared = input.prepared.data();
    if (wh::prepared_bytes(m, rows)) {
        if (alone)
            wh::prepare(m, from[0], from.apart, 0, rows, rows, prepared);
        else
            team.share(rows, [&](int row) { wh::prepare(m, from[0], from.apart, row, row + 1, rows, prepared); });
    }
    return {from[0], from.apart, prepared};
}

// y = (or +=) the product, on all threads; `after(n0, n1)` follows each piece of the outputs.
template <class After>
void wh_engine::multiply(const wh_matrix& m, const Input& in, int rows, float* y, int apart, bool add,
                         const After& after) {
    const int piece = wh::piece_outputs(m, rows);
    team.share((m.n + piece - 1) / piece, [&](int i) {
        const int n0 = i * piece, n1 = std::min(m.n, n0 + piece);
        wh::multiply(m, in.x, in.apart, in.prepared, rows, n0, n1, y, apart, add);
        after(n0, n1);
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
        engine->step(*call);
        return 0;
    } catch (...) {
        return -1;
    }
}
