/* Activations as they are kept, -DX_FLOAT32 or -DX_BFLOAT16, and the words that a lane multiplies at once. */

#include "vectors.h"

#ifdef X_FLOAT32
typedef float value;
INLINE float wide(value v) { return v; }
INLINE value narrow(float v) { return v; }
#else
typedef uint16_t value; /* bfloat16: the upper half of a float32 */
INLINE float wide(value v) {
    uint32_t b = (uint32_t)v << 16;
    float result;
    memcpy(&result, &b, sizeof result);
    return result;
}
INLINE value narrow(float v) { /* to the nearest, ties to even; a NaN made of bfloat16 has no lower half */
    uint32_t b;
    memcpy(&b, &v, sizeof b);
    return (b + 0x7fff + (b >> 16 & 1)) >> 16;
}

/* Both, narrowed as above: in each lane the first in the lower half, the second in the upper one. */
INLINE floats halves(floats first, floats second) {
    bits low = (bits)first, high = (bits)second;
    low += 0x7fff + (low >> 16 & 1);
    high += 0x7fff + (high >> 16 & 1);
    return (floats)(low >> 16 | (high & 0xffff0000));
}
#endif

/* A lane multiplies words: float32 numbers, or pairs of bfloat16 ones where activations are such and the processor
 * adds the products of both to a float32 sum at once. */
#if defined(X_BFLOAT16) && defined(__AVX512BF16__)
#define PAIRS
enum { WORD = 2 }; /* numbers in one */
INLINE floats everywhere(float w) { return (floats)_mm512_set1_ps(w); }
INLINE floats plus(floats sum, floats w, floats x) {
    return (floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)w, (__m512bh)x);
}
#else
enum { WORD = 1 };
INLINE floats everywhere(float w) { return w - (floats){0}; } /* one in all lanes */
INLINE floats plus(floats sum, floats w, floats x) { return sum + w * x; }
#endif

/* LANES words of a vector. */
INLINE floats words(const value *x) {
#if defined(X_BFLOAT16) && !defined(PAIRS)
    return load_bfloat16(x);
#else
    return load((const float *)x);
#endif
}

/* y[r][t] += the sum over k < depth of w[r][k] * x[k][t], for TILE rows r and PANEL columns t, in words.
 * w[r][k] is at w[r * row + k]. x: (depth, PANEL). y: rows of `width`. If next is not NULL, one cache line
 * from there on is prefetched each `every` steps: more at a time would evict x. */
INLINE void add_product(const float *w, long row, const float *x, float *y, long width, long depth,
                        const char *next, long every) {
    floats sums[TILE][ACROSS] = {0};
    for (long k = 0; k < depth; k++) {
        if (next && k % every == 0) __builtin_prefetch(next + k / every * LINE);
        floats columns[ACROSS];
        UNROLL for (int i = 0; i < ACROSS; i++) columns[i] = load(x + k * PANEL + i * LANES);
        UNROLL for (int r = 0; r < TILE; r++)
            UNROLL for (int i = 0; i < ACROSS; i++)
                sums[r][i] = plus(sums[r][i], everywhere(w[r * row + k]), columns[i]);
    }
    UNROLL for (int r = 0; r < TILE; r++)
        UNROLL for (int i = 0; i < ACROSS; i++) {
            float *at = y + r * width + i * LANES;
            store(at, load(at) + sums[r][i]);
        }
}
