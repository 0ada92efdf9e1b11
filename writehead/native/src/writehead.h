// The C interface of the native engine: the only symbols that the shared libraries export.
#ifndef WRITEHEAD_H
#define WRITEHEAD_H

#include <stdint.h>

#if defined(__cplusplus)
extern "C" {
#endif

#define WH_EXPORT __attribute__((visibility("default")))

// Packed weights, described in docs/native.md; the bytes are the same for every instruction set.
enum { WH_FLOAT32, WH_BFLOAT16, WH_INT8, WH_INT4 };

typedef struct {
    int32_t format, n, k;  // n outputs and k inputs, before padding to multiples of 16 and 32
    const void *data, *scales;
    const float* bias;  // n numbers, or null
} wh_matrix;

// A number that changes whenever this interface or a packed format does.
WH_EXPORT int32_t wh_version(void);

// The instruction set that the library was compiled for.
WH_EXPORT const char* wh_instructions(void);

// Threads that compute together, the caller being one of them; null if they cannot be started.
typedef struct wh_team wh_team;
WH_EXPORT wh_team* wh_team_create(int32_t threads);
WH_EXPORT void wh_team_free(wh_team* team);

// What calls return that did what they should, or why they did not.
enum { WH_DONE = 0, WH_NO_MEMORY = -1, WH_NO_TOKEN = -2 };

// y (rows, n) = x (rows, k) times the matrix, plus its bias.
WH_EXPORT int32_t wh_linear(wh_team* team, const wh_matrix* w, const float* x, int32_t rows, float* y);

// Whole steps of a model. Everything that a struct points to must live as long as the engine or the call.

enum { WH_NO_NORM, WH_RMS_NORM, WH_LAYER_NORM };
enum { WH_IDENTITY, WH_RELU, WH_GELU, WH_GELU_TANH, WH_SILU, WH_SIGMOID };

typedef struct {
    int32_t kind;
    float eps;
    const float *weight, *bias;  // bias may be null
} wh_norm;

typedef struct {
    wh_matrix qkv, out;    // rows of queries, keys, values; back to the width of the model
    wh_matrix inner, outer;  // if gated, rows of inner alternate: 16 of the gate, 16 of the input
    wh_norm norm, inner_norm, q_norm, k_norm;
    float scale;             // of the scores
    int32_t window, lead;    // who reads what: the last `window` keys (0: all) and the first `lead`
    int32_t cache, layer;    // which cache, and which of its layers
    int32_t hidden, activation, gated;
} wh_layer;

typedef struct {
    int32_t depth, dim, vocab;
    int32_t parallel;                  // feed-forward layer beside attention, not after it
    int32_t rotary, interleaved;       // numbers of a head that turn; pairs side by side or half of them apart
    float embed_scale, logit_scale;
    wh_norm embed_norm, last_norm;
    wh_matrix table, head;             // embeddings and output
    const float* slopes;               // of each query head, or null: penalties on distance
    const wh_layer* layers;
} wh_model;

// Keys and values of several layers for the rows of a batch, as the kernels read them: k is
// [rows][layers][kv_heads][slots/16][head_dim][16], v [rows][layers][kv_heads][slots][head_dim to a multiple of 16]. Below
// 32 bits two numbers of a key lie together, k [..][slots/16][head_dim/2][16][2] (a last one alone beside a zero), and
// those of two keys' values, v [..][slots/2][head_dim to a multiple of 16][2].
typedef struct {
    int32_t format, layers, heads, kv_heads, head_dim;
    int32_t slots;                   // a multiple of 16
    int32_t lead, ring;              // position p is in slot p, or beyond the lead in one of `ring` slots (0: no ring)
    void *k, *v;
    float *k_scale, *v_scale;        // [rows][layers][kv_heads][slots] with WH_INT8, else null
    int32_t* pos;                    // [rows][slots], -1 = empty
} wh_cache;

typedef struct {
    int32_t rows, tokens;     // B and T; rings bound T (wh_cache.ring - window + 1)
    const int64_t* ids;       // [B][T], -1 = padding
    int64_t* next;            // [B], each row's next position; moved on
    wh_cache* caches;
    const float* turns;       // [positions][rotary], cosines then sines; null without rotation
    const float* places;      // [B][T][dim], added to the embeddings; null: nothing
    const uint8_t* wanted;    // [B][T], are the logits after this token wanted? Padding has none; null: all of [B][T]
    float* logits;            // a row for each wanted token, in their order; zeros behind padding if all are
    int32_t logits_apart;     // numbers from one row of logits to the next, a multiple of 16, at least vocab
} wh_call;

// Null if memory or threads cannot be had. The model is copied, what it points to is not.
typedef struct wh_engine wh_engine;
WH_EXPORT wh_engine* wh_engine_create(const wh_model* model, int32_t threads);
WH_EXPORT void wh_engine_free(wh_engine* engine);

// Takes tokens into the caches and gives the logits that are wanted. WH_NO_TOKEN, with nothing changed: an id that is not in the
// vocabulary.
WH_EXPORT int32_t wh_step(wh_engine* engine, const wh_call* call);

// Attention alone, over `layers` layers of a cache from `layer` on: y [layers][B][T][heads][head_dim] for one q
// [B][T][heads][head_dim] at positions pos [B][T].
WH_EXPORT int32_t wh_attend(wh_team* team, const wh_cache* cache, int32_t layer, int32_t layers, int32_t rows,
                            int32_t tokens, const float* q, const int32_t* pos, float scale, int32_t window, int32_t lead,
                            const float* slopes, float* y);

#if defined(__cplusplus)
}
#endif
#endif
