// y = x W^T for packed matrices, one row of x or many; the formats are described in docs/native.md.
#ifndef WRITEHEAD_LINEAR_H
#define WRITEHEAD_LINEAR_H

#include <cstddef>

#include "writehead.h"

namespace wh {

constexpr int kBlock = 16;  // outputs that stand together in a packed matrix
constexpr int kGroup = 32;  // inputs that share a scale

inline int round_up(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }

// Bytes of the scratch memory that `prepare` fills for so many rows of x; 0 if it need not be called.
size_t prepared_bytes(const wh_matrix& w, int rows);

// Brings rows [first, last) of x (`rows` in all, `ldx` apart) into the form that `multiply` reads, with
// activations in 8 bits for int8 and int4 matrices. All rows must be prepared before the first product.
// `scratch` is aligned to 64 bytes; it serves every matrix with the same k and kind of format.
void prepare(const wh_matrix& w, const float* x, int ldx, int first, int last, int rows, void* scratch);

// y[row * ldy + n] = (add ? y[row * ldy + n] : 0) + x W^T + bias for outputs n in [n0, n1), n0 a multiple of 16.
void multiply(const wh_matrix& w, const float* x, int ldx, const void* scratch, int rows, int n0, int n1,
              float* y, int ldy, bool add);

// Outputs that a thread does well to claim at a time: a multiple of 32.
int piece_outputs(const wh_matrix& w, int rows);

// Row n of W as k floats.
void weight_row(const wh_matrix& w, int n, float* out);

}  // namespace wh
#endif
