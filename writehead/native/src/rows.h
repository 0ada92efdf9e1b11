// What a step does with single rows of numbers: norms, activations, rotation, storing keys and values.
#ifndef WRITEHEAD_ROWS_H
#define WRITEHEAD_ROWS_H

#include "writehead.h"

namespace wh {

// y = norm(x) of n numbers; may be done in place.
void normalise(const wh_norm& norm, const float* x, int n, float* y);

// y = f(x) for n numbers, or with a gate y = f(gate) * x, where x holds 16 of the gate, 16 of the input and so on.
void activate(int32_t activation, bool gated, const float* x, int n, float* y);

// Turns the first 2 `half` numbers of a head by the angles whose cosines, then sines, are given.
void rotate(float* head, const float* turn, int half, bool interleaved);

// Stores the key and value of one token and one head in their slot.
void store_key_value(const wh_cache& cache, int row, int layer, int head, int slot, const float* k, const float* v);

}  // namespace wh
#endif
