// Vectors of the width that the target has: 16 floats with AVX-512, 8 with AVX2, else 4.
#ifndef WRITEHEAD_VEC_H
#define WRITEHEAD_VEC_H

#include <cstdint>
#include <cstring>

#if defined(__SSE__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

// Loops over the registers of a tile, whose bounds are constants.
#if defined(__clang__)
#define WH_UNROLL _Pragma("clang loop unroll(full)")
#else
#define WH_UNROLL _Pragma("GCC unroll 32")
#endif
#define WH_INLINE __attribute__((always_inline)) inline
#define WH_COLD __attribute__((noinline, cold))

namespace wh {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
constexpr int kLine = 64;  // bytes of a cache line

typedef float vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t ivec __attribute__((vector_size(4 * kLanes)));
typedef uint32_t uvec __attribute__((vector_size(4 * kLanes)));
typedef int16_t svec __attribute__((vector_size(4 * kLanes)));
typedef uint16_t wvec __attribute__((vector_size(4 * kLanes)));
typedef uint8_t bvec __attribute__((vector_size(4 * kLanes)));
typedef uint16_t half __attribute__((vector_size(2 * kLanes)));
typedef int16_t shorts __attribute__((vector_size(2 * kLanes)));
typedef int8_t quarter __attribute__((vector_size(kLanes)));
typedef int8_t byte_pairs __attribute__((vector_size(2 * kLanes)));

template <class V, class T>
inline V load_as(const T* from) {
    V v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

inline vec load(const float* from) { return load_as<vec>(from); }
// A vector, or fewer numbers and zeros.
inline vec load_some(const float* from, int count) {
    if (count >= kLanes) return load(from);
    vec x = {};
    std::memcpy(&x, from, sizeof(float) * count);
    return x;
}
inline void store(float* to, vec v) { std::memcpy(to, &v, sizeof v); }
inline vec splat(float x) { return x - vec{}; }
inline ivec splat_int(int32_t x) { return x - ivec{}; }

// The same of a number in memory, loaded where this stands: GCC loads several rows' at once and runs out of registers.
inline vec splat_at(const float* from) {
#if defined(__AVX2__) && !defined(__AVX512F__)
    vec v;
    asm("vbroadcastss %1, %0" : "=x"(v) : "m"(*from));
    return v;
#else
    return splat(*from);
#endif
}
inline ivec splat_at(const int32_t* from) {
#if defined(__AVX2__) && !defined(__AVX512F__)
    ivec v;
    asm("vpbroadcastd %1, %0" : "=x"(v) : "m"(*from));
    return v;
#else
    return splat_int(*from);
#endif
}

// One instruction where there is one. Other products and sums are never fused: a quantised value must not depend on it.
inline vec fma(vec a, vec b, vec c) {
#if defined(__AVX512F__)
    return (vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
    return (vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
    return (vec)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
#endif
}

// fma(a, b, sum) whose result has the sum's register: compilers that move it run out of registers in the largest tiles.
inline vec add_product(vec sum, vec a, vec b) {
#if defined(__AVX512F__)
    asm("vfmadd231ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
    return sum;
#elif defined(__FMA__)
    asm("vfmadd231ps %2, %1, %0" : "+x"(sum) : "x"(a), "x"(b));
    return sum;
#else
    return fma(a, b, sum);
#endif
}

// The same for a number in memory, which there needs no instruction of its own.
inline vec add_product(vec sum, vec a, const float* b) {
#if defined(__AVX512F__)
    asm("vfmadd231ps %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(a), "m"(*b));
    return sum;
#else
    return add_product(sum, a, splat_at(b));
#endif
}

// Does row r of a tile read its number anew for each vector, not once into a register? Where instructions are what
// is short, some rows should; with all of them loads would be.
constexpr bool in_place(int r, int V) {
    constexpr int kOf = 9, kSome = 4;
    return V == 1 || (kLanes == 16 && (r + 1) * kSome / kOf != r * kSome / kOf);
}

inline vec max(vec a, vec b) { return a > b ? a : b; }
inline vec min(vec a, vec b) { return a < b ? a : b; }
inline vec as_float(ivec v) { return (vec)v; }
inline ivec as_int(vec v) { return (ivec)v; }
inline vec to_float(ivec v) { return __builtin_convertvector(v, vec); }

// Two numbers of 8 bits, whose products with two others are added at once.
struct BytePair {
    int8_t first, second;
};

inline svec load_pairs(const BytePair* from) {
#if defined(__AVX512F__)
    return (svec)_mm512_cvtepi8_epi16(load_as<__m256i>(from));
#elif defined(__AVX2__)
    return (svec)_mm256_cvtepi8_epi16(load_as<__m128i>(from));
#else
    return __builtin_convertvector(load_as<byte_pairs>(from), svec);
#endif
}

// Two bfloat16, the halves of a lane: either is a float after one instruction, where a narrow load takes two.
struct HalfPair {
    uint16_t first, second;
};

inline vec load_first(const HalfPair* from) { return (vec)(load_as<uvec>(from) << 16); }
inline vec load_second(const HalfPair* from) { return (vec)(load_as<uvec>(from) & 0xffff0000u); }

#if defined(__AVX2__) && !defined(__AVX512VNNI__)
// sum + x, not later: GCC would put sums off and keep what they add in memory until then.
inline ivec add_now(ivec sum, __m256i x) {
    asm("vpaddd %1, %0, %0" : "+x"(sum) : "x"(x));
    return sum;
}
#endif

// Adds to each lane of `sum` the products of two pairs of 16 bits.
inline ivec add_product(ivec sum, svec a, ivec b) {
#if defined(__AVX512VNNI__)
    asm("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
    return sum;
#elif defined(__AVX2__)
    return add_now(sum, _mm256_madd_epi16((__m256i)a, (__m256i)b));
#elif defined(__SSE2__)
    return sum + (ivec)_mm_madd_epi16((__m128i)a, (__m128i)b);
#elif defined(__aarch64__)
    const int16x8_t x = (int16x8_t)a, y = (int16x8_t)b;
    return sum + (ivec)vpaddq_s32(vmull_s16(vget_low_s16(x), vget_low_s16(y)), vmull_high_s16(x, y));
#else
    return sum + ((ivec)a << 16 >> 16) * (b << 16 >> 16) + ((ivec)a >> 16) * (b >> 16);
#endif
}

// The same for a pair in memory.
inline ivec add_product(ivec sum, svec a, const int32_t* b) {
#if defined(__AVX512VNNI__)
    asm("vpdpwssd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(a), "m"(*b));
    return sum;
#else
    return add_product(sum, a, splat_at(b));
#endif
}

// The nearest integers, halves to even, for |x| < 2^22: what is added pushes the fraction out of the mantissa.
inline ivec round_to_int(vec x) {
    const vec magic = splat(12582912.0f);
    return as_int(x + magic) - as_int(magic);
}

// Stores integers of 16 bits.
inline void store_shorts(int16_t* to, ivec v) {
    const shorts low = __builtin_convertvector(v, shorts);
    std::memcpy(to, &low, sizeof low);
}

inline vec load_bf16(const uint16_t* from) {
#if defined(__AVX512F__)
    const __m512i wide = _mm512_cvtepu16_epi32(load_as<__m256i>(from));  // GCC makes five shuffles of it
#elif defined(__AVX2__)
    const __m256i wide = _mm256_cvtepu16_epi32(load_as<__m128i>(from));
#else
    const uvec wide = __builtin_convertvector(load_as<half>(from), uvec);
#endif
    return (vec)((uvec)wide << 16);
}

// To the nearest bfloat16, halves to even; a NaN stays a NaN.
inline void store_bf16(uint16_t* to, vec v) {
    const uvec bits = (uvec)v;
    const uvec rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const uvec nan = (bits >> 16) | 0x40u;
    const half h = __builtin_convertvector(v == v ? rounded : nan, half);
    std::memcpy(to, &h, sizeof h);
}

inline vec load_f16(const uint16_t* from) {
#if defined(__AVX512F__)
    return (vec)_mm512_maskz_cvtph_ps(0xffff, load_as<__m256i>(from));  // the plain form warns in GCC 12
#elif defined(__F16C__)
    return (vec)_mm256_cvtph_ps(load_as<__m128i>(from));
#elif defined(__aarch64__)
    return (vec)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(from)));
#else
    const uvec h = __builtin_convertvector(load_as<half>(from), uvec);
    const uvec magnitude = (h & 0x7fffu) << 13;
    const uvec scaled = (uvec)((vec)magnitude * splat(0x1p112f));  // the product makes subnormals right
    const uvec infinite = magnitude | 0x7f800000u;
    return (vec)((magnitude < 0x0f800000u ? scaled : infinite) | (h & 0x8000u) << 16);
#endif
}

// Folds the lanes in halves: GCC 12 warns of its own reductions.
template <class Quad, class V, class Op>
inline auto fold(V v, const Op& op) {
    Quad quads[kLanes / 4];
    std::memcpy(quads, &v, sizeof v);
    for (int half = kLanes / 8; half > 0; half /= 2) {
        for (int i = 0; i < half; i++) quads[i] = op(quads[i], quads[i + half]);
    }
    return op(op(quads[0][0], quads[0][2]), op(quads[0][1], quads[0][3]));
}

typedef float vec4 __attribute__((vector_size(16)));
typedef int32_t ivec4 __attribute__((vector_size(16)));

// Four rows of four become four columns.
inline void transpose4(vec4 (&m)[4]) {
#if defined(__SSE__)
    _MM_TRANSPOSE4_PS(m[0], m[1], m[2], m[3]);
#else
    for (int i = 0; i < 4; i++) {
        for (int j = 0; j < i; j++) {
            const float x = m[i][j];
            m[i][j] = m[j][i];
            m[j][i] = x;
        }
    }
#endif
}

inline float reduce_add(vec v) {
    return fold<vec4>(v, [](auto a, auto b) { return a + b; });
}
inline int32_t reduce_add(ivec v) {
    return fold<ivec4>(v, [](auto a, auto b) { return a + b; });
}
// Is a lane of `a` greater than that of `b`?
inline bool any_greater(vec a, vec b) {
#if defined(__AVX512F__)
    return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ) != 0;
#else
    const ivec mask = a > b;
#if defined(__AVX__)
    return !_mm256_testz_si256((__m256i)mask, (__m256i)mask);
#else
    return (mask[0] | mask[1] | mask[2] | mask[3]) != 0;
#endif
#endif
}
inline float reduce_max(vec v) {
    return fold<vec4>(v, [](auto a, auto b) { return a > b ? a : b; });
}
inline int32_t reduce_max(ivec v) {
    return fold<ivec4>(v, [](auto a, auto b) { return a > b ? a : b; });
}

// e^x to two units in the last place; 0 below -87.3 (so of -infinity too), infinity above 88.7.
inline vec exp(vec x) {
    const vec low = splat(-87.33654f), high = splat(88.72283f);
    const vec clamped = x > high ? high : (x < low ? low : x);
    const ivec n = round_to_int(clamped * splat(1.44269504f));
    const vec whole = to_float(n);
    const vec r = fma(whole, splat(2.12194440e-4f), fma(whole, splat(-0.693359375f), clamped));
    vec p = splat(1.9875691500e-4f);
    p = fma(p, r, splat(1.3981999507e-3f));
    p = fma(p, r, splat(8.3334519073e-3f));
    p = fma(p, r, splat(4.1665795894e-2f));
    p = fma(p, r, splat(1.6666665459e-1f));
    p = fma(p, r, splat(5.0000001201e-1f));
    p = fma(p * r, r, r) + splat(1.0f);
    const ivec half_n = n >> 1;  // 2^n in two factors, since n = 128 has no float
    const vec y = p * as_float((half_n + 127) << 23) * as_float((n - half_n + 127) << 23);
    return x < low ? vec{} : (x > high ? splat(__builtin_inff()) : y);
}

// Adds to each lane of `sum` four products of bytes: unsigned w, less kTaken each, with signed x in [-127, 127].
#if defined(__AVX512VNNI__)
constexpr int kTaken = 0;
inline ivec dot_bytes(ivec sum, bvec w, ivec x) {
    return (ivec)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)w, (__m512i)x);
}
inline ivec dot_nibbles(ivec sum, bvec w, ivec x) { return dot_bytes(sum, w, x); }
#elif defined(__AVX2__)
constexpr int kTaken = 128;
inline ivec add_pairs(ivec sum, __m256i pairs) { return add_now(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1))); }
// w in [0, 15]: no eight pairs of products leave 16 bits, 16 * 15 * 127 < 2^15. Until `end_dots` a lane holds two sums.
inline ivec dot_nibbles(ivec sum, bvec w, ivec x) {
    const __m256i pairs = _mm256_maddubs_epi16((__m256i)w, (__m256i)x);
    asm("vpaddw %1, %0, %0" : "+x"(sum) : "x"(pairs));
    return sum;
}
// The sign goes over to x, so that no pair of products leaves 16 bits: 2 * 128 * 127 < 2^15.
inline ivec dot_bytes(ivec sum, bvec w, ivec x) {
    const __m256i centred = _mm256_xor_si256((__m256i)w, _mm256_set1_epi8(-128));
    const __m256i turned = _mm256_sign_epi8((__m256i)x, centred);
    return add_pairs(sum, _mm256_maddubs_epi16(_mm256_abs_epi8(centred), turned));
}
#elif defined(__aarch64__)
constexpr int kTaken = 128;
inline ivec dot_signed(ivec sum, int8x16_t w, ivec x) {
#if defined(__ARM_FEATURE_DOTPROD)
    return (ivec)vdotq_s32((int32x4_t)sum, w, (int8x16_t)x);
#else
    const int16x8_t low = vmull_s8(vget_low_s8(w), vget_low_s8((int8x16_t)x));  // |w| <= 128, |x| <= 127
    const int16x8_t high = vmull_high_s8(w, (int8x16_t)x);
    return sum + (ivec)vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high));
#endif
}
inline ivec dot_bytes(ivec sum, bvec w, ivec x) { return dot_signed(sum, (int8x16_t)(w ^ 128), x); }
inline ivec dot_nibbles(ivec sum, bvec w, ivec x) { return dot_signed(sum, (int8x16_t)w, x); }
#else
constexpr int kTaken = 128;
// Even and odd bytes side by side in 16 bits, which two products with |w| <= 128 do not leave.
inline ivec dot_signed(ivec sum, svec even, svec odd, ivec x) {
    const svec both = even * (((svec)x << 8) >> 8) + odd * ((svec)x >> 8);
    return sum + (((ivec)both << 16) >> 16) + ((ivec)both >> 16);
}
inline ivec dot_bytes(ivec sum, bvec w, ivec x) {
    return dot_signed(sum, (svec)((wvec)w & 0xff) - 128, (svec)((wvec)w >> 8) - 128, x);
}
inline ivec dot_nibbles(ivec sum, bvec w, ivec x) {
    return dot_signed(sum, (svec)((wvec)w & 0xff), (svec)((wvec)w >> 8), x);
}
#endif
// dot_bytes(sum, w, x), or dot_nibbles, as `add_product`.
template <bool NIBBLES>
inline ivec add_dot(ivec sum, bvec w, ivec x) {
#if defined(__AVX512VNNI__)
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(w), "v"(x));
    return sum;
#else
    return NIBBLES ? dot_nibbles(sum, w, x) : dot_bytes(sum, w, x);
#endif
}
template <bool NIBBLES>
inline ivec add_dot(ivec sum, bvec w, const int32_t* x) {
#if defined(__AVX512VNNI__)
    asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(w), "m"(*x));
    return sum;
#else
    return add_dot<NIBBLES>(sum, w, splat_int(*x));
#endif
}

// What a sum of at most eight dots that is to begin at `start` begins with, and what it is in the end.
template <bool NIBBLES>
inline ivec begin_dots(int32_t start) {
#if defined(__AVX2__) && !defined(__AVX512VNNI__)
    if (NIBBLES) return ivec{};
#endif
    return splat_int(start);
}
template <bool NIBBLES>
inline ivec end_dots(ivec sum, [[maybe_unused]] int32_t start) {
#if defined(__AVX2__) && !defined(__AVX512VNNI__)
    if (NIBBLES) return add_pairs(splat_int(start), (__m256i)sum);
#endif
    return sum;
}

// Integers n with |n| < 2^22 times a scale of few bits: n that begins at kWhole is a float without a conversion, since
// kWhole is 1.5 * 2^23 there, whose last bit is worth 1; what that adds to the product is exact, and `less` takes it off.
#if defined(__AVX512F__) || defined(__FMA__) || defined(__aarch64__)
constexpr int32_t kWhole = 0x4b400000;
inline vec less(vec scale) { return scale * splat(-12582912.0f); }
inline vec scaled(ivec n, vec scale, vec less) { return fma(as_float(n), scale, less); }
#else
constexpr int32_t kWhole = 0;
inline vec less(vec) { return vec{}; }
inline vec scaled(ivec n, vec scale, vec) { return to_float(n) * scale; }
#endif

inline bvec low_nibbles(bvec w) { return w & 15; }
inline bvec high_nibbles(bvec w) { return (bvec)(((wvec)w >> 4) & 0x0f0f); }

}  // namespace wh
#endif
