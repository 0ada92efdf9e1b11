#include "linear.h"

#include <cmath>

#include "vec.h"

namespace wh {

namespace {

struct Quantised {  // one group of 32 activations of one row
    float scale;
    int32_t sum;
    int8_t values[kGroup];
};

bool in_bytes(const wh_matrix& w) { return w.format == WH_INT8 || w.format == WH_INT4; }

}  // namespace

size_t prepared_bytes(const wh_matrix& w, int rows) {
    return in_bytes(w) ? sizeof(Quantised) * rows * (round_up(w.k, kGroup) / kGroup) : 0;
}

void prepare(const wh_matrix& w, const float* x, int ldx, int first, int last, int, void* scratch) {
    if (!in_bytes(w)) return;
    const int groups = round_up(w.k, kGroup) / kGroup;
    for (int row = first; row < last; row++) {
        for (int g = 0; g < groups; g++) {
            Quantised& q = static_cast<Quantised*>(scratch)[static_cast<size_t>(row) * groups + g];
            const float* from = x + static_cast<size_t>(row) * ldx + g * kGroup;
            const int n = w.k - g * kGroup < kGroup ? w.k - g * kGroup : kGroup;
            float largest = 0;
            for (int i = 0; i < n; i++) largest = std::fmax(largest, std::fabs(from[i]));
            q.scale = largest / 127;
            q.sum = 0;
            for (int i = 0; i < kGroup; i++) {
                q.values[i] = i < n && largest > 0 ? static_cast<int8_t>(std::nearbyint(from[i] * (127 / largest))) : 0;
                q.sum += q.values[i];
            }
        }
    }
}

void weight_row(const wh_matrix& w, int n, float* out) {
    const size_t groups = round_up(w.k, kGroup) / kGroup, block = n / kBlock, lane = n % kBlock;
    const uint8_t* bytes = static_cast<const uint8_t*>(w.data);
    for (int k = 0; k < w.k; k++) {
        const size_t g = k / kGroup, i = k % kGroup;
        const size_t at = (block * groups * kGroup + k) * kBlock + lane;
        float scale[kLanes];
        if (w.format == WH_FLOAT32) {
            out[k] = static_cast<const float*>(w.data)[at];
        } else if (w.format == WH_BFLOAT16) {
            const uint32_t bits = static_cast<uint32_t>(static_cast<const uint16_t*>(w.data)[at]) << 16;
            std::memcpy(out + k, &bits, 4);
        } else if (w.format == WH_INT8) {
            const uint16_t* scales = static_cast<const uint16_t*>(w.scales) + (block * groups + g) * kBlock;
            store(scale, load_f16(scales + lane / kLanes * kLanes));
            const int u = bytes[((block * groups + g) * 8 + i / 4) * 64 + lane * 4 + i % 4];
            out[k] = scale[lane % kLanes] * static_cast<float>(u - 128);
        } else {
            const uint16_t* scales = static_cast<const uint16_t*>(w.scales) + (block * groups + g) * 2 * kBlock;
            store(scale, load_f16(scales + lane / kLanes * kLanes));
            const int u = bytes[((block * groups + g) * 4 + i % 16 / 4) * 64 + lane * 4 + i % 4];
            const float scaled = scale[lane % kLanes] * static_cast<float>(i < 16 ? u & 15 : u >> 4);
            store(scale, load_f16(scales + kBlock + lane / kLanes * kLanes));
            out[k] = scaled + scale[lane % kLanes];
        }
    }
}

// PLACEHOLDER until the kernels land: right, and slow.
void multiply(const wh_matrix& w, const float* x, int ldx, const void* scratch, int rows, int n0, int n1,
              float* y, int ldy, bool add) {
    const int groups = round_up(w.k, kGroup) / kGroup;
    float* weights = new float[groups * kGroup];
    for (int n = n0; n < n1; n++) {
        weight_row(w, n, weights);
        for (int row = 0; row < rows; row++) {
            float sum = w.bias ? w.bias[n] : 0;
            for (int k = 0; k < w.k; k++) {
                const Quantised* q = static_cast<const Quantised*>(scratch) + static_cast<size_t>(row) * groups;
                sum += weights[k] * (in_bytes(w) ? q[k / kGroup].scale * q[k / kGroup].values[k % kGroup]
                                                 : x[static_cast<size_t>(row) * ldx + k]);
            }
            float& to = y[static_cast<size_t>(row) * ldy + n];
            to = (add ? to : 0) + sum;
        }
    }
    delete[] weights;
}

int piece_outputs(const wh_matrix& w, int) {
    const int bytes = w.format == WH_FLOAT32 ? 4 * w.k : w.format == WH_BFLOAT16 ? 2 * w.k : w.k;
    return round_up(64 * 1024 / (bytes + 1) + 1, 32);
}

}  // namespace wh
