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

// y (rows, n) = x (rows, k) times the matrix, plus its bias; -1 if memory runs out, else 0.
WH_EXPORT int32_t wh_linear(wh_team* team, const wh_matrix* w, const float* x, int32_t rows, float* y);

#if defined(__cplusplus)
}
#endif
#endif
