/* Vectors of floats as wide as the machine's registers. */

#pragma once

#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

/* The sums of TILE rows and PANEL columns fill the registers, of which there are 32 from AVX-512 on, and leave
 * room for the factors. */
#if defined(__AVX512F__)
enum { LANES = 16, TILE = 8 };
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
enum { LANES = 8, TILE = 4 };
#else
enum { LANES = 4, TILE = 4 };
#endif
enum { ACROSS = 2, PANEL = ACROSS * LANES, LINE = 64 /* bytes that memory gives at once */ };

typedef float floats __attribute__((vector_size(4 * LANES)));
typedef uint32_t bits __attribute__((vector_size(4 * LANES)));
typedef int32_t places __attribute__((vector_size(4 * LANES)));

INLINE floats load(const float *p) {
    floats v;
    memcpy(&v, p, sizeof v);
    return v;
}

/* LANES bfloat16 numbers, which are the upper halves of float32 ones. */
#if defined(__AVX512F__)
#include <immintrin.h>
INLINE floats load_bfloat16(const uint16_t *p) {
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p));
    return (floats)_mm512_slli_epi32(wide, 16);
}
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include <immintrin.h>
INLINE floats load_bfloat16(const uint16_t *p) {
    __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p));
    return (floats)_mm256_slli_epi32(wide, 16);
}
#else /* any other: the compiler finds the instructions */
INLINE floats load_bfloat16(const uint16_t *p) {
    return (floats)(bits){(uint32_t)p[0] << 16, (uint32_t)p[1] << 16, (uint32_t)p[2] << 16, (uint32_t)p[3] << 16};
}
#endif

INLINE void store(float *p, floats v) { memcpy(p, &v, sizeof v); }

/* Swap the rows and the columns of LANES vectors. */
INLINE void transpose(floats *rows) {
#ifdef __clang__ /* shuffles by constants alone */
    float swapped[LANES][LANES];
    UNROLL for (int r = 0; r < LANES; r++)
        UNROLL for (int l = 0; l < LANES; l++) swapped[l][r] = rows[r][l];
    memcpy(rows, swapped, sizeof swapped);
#else
    UNROLL for (int half = 1; half < LANES; half *= 2) /* of squares: their off-diagonal quarters change places */
        UNROLL for (int r = 0; r < LANES; r++)
            if (!(r & half)) {
                places even, odd;
                UNROLL for (int l = 0; l < LANES; l++) {
                    even[l] = l & half ? LANES + l - half : l;
                    odd[l] = l & half ? LANES + l : l + half;
                }
                floats upper = rows[r], lower = rows[r + half];
                rows[r] = __builtin_shuffle(upper, lower, even);
                rows[r + half] = __builtin_shuffle(upper, lower, odd);
            }
#endif
}
