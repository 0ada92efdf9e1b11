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

// Rows are multiplied in tiles of nearly equal height: the first few have a row more. Where one begins takes no
// division, which would take as long as a part of a tile.
struct Tiles {
    int rows, count, low, high;  // `low` rows a tile, and one more in the first `high` tiles

    Tiles(const wh_matrix& w, int rows);
    int begin(int tile) const { return tile * low + (tile < high ? tile : high); }
    int of(int row) const {
        const int edge = high * (low + 1);
        return count == 1 ? 0 : row < edge ? row / (low + 1) : high + (row - edge) / low;
    }
};

// A part of a result: rows [row0, row1), which are whole tiles, and outputs [n0, n1).
struct Area {
    int row0, row1, n0, n1;
};

// A result cut into areas that a thread does well to claim at a time. Their outputs begin at a multiple of `step`,
// which is a multiple of 16; an area of many rows reads its part of x from the second cache.
class Pieces {
  public:
    Pieces(const wh_matrix& w, int rows, int step);
    int count() const { return blocks_ * across_; }
    Area operator[](int i) const;

  private:
    Tiles tiles_;
    int n_, outputs_, across_, blocks_;
};

// y[row * ldy + n] = (add ? y[row * ldy + n] : 0) + x W^T + bias in an area; x and scratch are as `prepare` left them.
void multiply(const wh_matrix& w, const float* x, const void* scratch, int rows, const Area& area, float* y, int ldy,
              bool add);

// Row n of W as k floats.
void weight_row(const wh_matrix& w, int n, float* out);

}  // namespace wh
#endif
