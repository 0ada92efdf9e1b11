// Causal linear attention token by token, as fast-transformers' product for CPUs goes about it: the sum of
// k v^T is carried along, each row and head by one thread, and the backward pass goes over the tokens twice.
// All arrays are (N, T, M) or (N, T, E), N rows times heads.

#include <cstdint>
#include <vector>

extern "C" void causal_forward(const float* q, const float* k, const float* v, float* y, int64_t N, int64_t T,
                               int64_t M, int64_t E) {
#pragma omp parallel for
  for (int64_t n = 0; n < N; n++) {
    std::vector<float> sum(M * E, 0.0f);
    for (int64_t t = n * T; t < (n + 1) * T; t++) {
      float* out = y + t * E;
      for (int64_t e = 0; e < E; e++) out[e] = 0;
      for (int64_t m = 0; m < M; m++) {
        float* row = sum.data() + m * E;
        const float key = k[t * M + m], query = q[t * M + m];
        for (int64_t e = 0; e < E; e++) {
          row[e] += key * v[t * E + e];
          out[e] += query * row[e];
        }
      }
    }
  }
}

extern "C" void causal_backward(const float* q, const float* k, const float* v, const float* g, float* dq,
                                float* dk, float* dv, int64_t N, int64_t T, int64_t M, int64_t E) {
#pragma omp parallel for
  for (int64_t n = 0; n < N; n++) {
    std::vector<float> sum(M * E, 0.0f);
    for (int64_t t = n * T; t < (n + 1) * T; t++) {
      for (int64_t m = 0; m < M; m++) {
        float* row = sum.data() + m * E;
        const float key = k[t * M + m];
        float found = 0;
        for (int64_t e = 0; e < E; e++) {
          row[e] += key * v[t * E + e];
          found += g[t * E + e] * row[e];
        }
        dq[t * M + m] = found;
      }
    }
    for (float& one : sum) one = 0;
    for (int64_t t = (n + 1) * T - 1; t >= n * T; t--) {
      float* out = dv + t * E;
      for (int64_t e = 0; e < E; e++) out[e] = 0;
      for (int64_t m = 0; m < M; m++) {
        float* row = sum.data() + m * E;
        const float key = k[t * M + m], query = q[t * M + m];
        float found = 0;
        for (int64_t e = 0; e < E; e++) {
          row[e] += query * g[t * E + e];
          out[e] += key * row[e];
          found += v[t * E + e] * row[e];
        }
        dk[t * M + m] = found;
      }
    }
  }
}
