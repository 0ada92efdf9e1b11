// Softmax attention of a tile of query rows over the slots of a cache. Scores are logarithms to the base of 2, whose
// powers are cheapest: queries and slopes come scaled for that.
#ifndef WRITEHEAD_ATTENTION_H
#define WRITEHEAD_ATTENTION_H

#include <cstdint>

#include "vec.h"
#include "writehead.h"

namespace wh {

constexpr int kTileRows = 96;  // query rows that read a block of keys while it is in the nearest cache
constexpr int kQueryRows = kLanes == 16 ? 8 : kLanes == 8 ? 6 : 3;  // most of them at once, their sums in registers
constexpr int kSpan = 128;     // keys whose scores stand together
constexpr float kLog2e = 1.44269504f;
constexpr float kMost = 32767, kLeast = 1e-30f;  // of 16 bits, which a row's largest becomes; below kLeast it is nothing

// Rows are computed in passes; where the last would have too few for their sums to hide how long a product takes, all
// have about as many.
constexpr int kFewRows = 4;
constexpr int passes(int rows) { return (rows + kQueryRows - 1) / kQueryRows; }
constexpr int pass_rows(int rows) {
    const int rest = rows % kQueryRows;
    return rest == 0 || rest >= kFewRows ? kQueryRows : (rows + passes(rows) - 1) / passes(rows);
}

// What a format of keys and values needs; attend_products.h says how its numbers are multiplied.
struct Stored {
    int size;      // bytes of a number
    int together;  // numbers of a key, or keys of a value, that lie side by side
    int query;     // bytes of a number of the queries
};
constexpr Stored stored(int format) {
    return format == WH_FLOAT32 ? Stored{4, 1, 4} : format == WH_BFLOAT16 ? Stored{2, 2, 4} : Stored{1, 2, 2};
}

// One key/value head of one row of the batch, as the cache keeps it: below 32 bits in pairs, of numbers of a key, and of
// numbers of two keys' values.
struct Keys {
    int format;                      // WH_FLOAT32, WH_BFLOAT16 or WH_INT8
    int dim;                         // width of a head; values are padded to a multiple of 16
    const void* k;                   // [slots/16][dim][16], or pairs: [slots/16][dim/2][16]
    const void* v;                   // [slots][padded dim], or pairs: [slots/2][padded dim]
    const float *k_scale, *v_scale;  // [slots], with WH_INT8
    const int32_t* pos;              // [slots], -1 = empty
    const void* next;                // keys that are read after these, or null
};

// Who reads what: a query at q reads keys at 0 <= p <= q with q - p < window (0: any) or p < lead.
struct Reach {
    int window, lead;
};

// Query rows and what attention gives for them.
struct Tile {
    int rows;
    const void* q;       // [passes][dim][kQueryRows] floats, scaled; for WH_INT8 pairs [..][dim/2][..] int32_t
    const float* grain;  // [rows], for WH_INT8: what 1 is worth
    const int32_t* pos;  // [rows]
    const float* slope;  // [rows], of the penalty on distance; null: none
    float* spare;        // [kSpan][even dim + padded dim], for 16 bits that many rows read
    float* y;            // [rows][padded dim], weighted sums of values
    float* top;          // [rows], about the largest score, -infinity where nothing was read
    float* total;        // [rows], the sum of the weights 2^(score - top)
};

// Sums over slots [first, last), both multiples of 16; parts of a cache merge by `top` and `total`.
void attend(const Tile& tile, const Keys& keys, Reach reach, int first, int last);

}  // namespace wh
#endif
