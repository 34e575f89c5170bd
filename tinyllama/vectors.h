/* Vectors of floats as wide as the machine's registers, and the small product that they are best at. */

#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 8")

/* The sums of TILE rows and PANEL columns fill the registers, of which there are 32 from AVX-512 on, and leave
 * room for the factors. */
#if defined(__AVX512F__)
enum { LANES = 16, TILE = 8 };
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
enum { LANES = 8, TILE = 4 };
#else
enum { LANES = 4, TILE = 4 };
#endif
enum { ACROSS = 2, PANEL = ACROSS * LANES };

typedef float floats __attribute__((vector_size(4 * LANES)));

INLINE floats load(const float *p) {
    floats v;
    memcpy(&v, p, sizeof v);
    return v;
}

INLINE void store(float *p, floats v) { memcpy(p, &v, sizeof v); }

/* y[r][t] += the sum of w[r][k] * x[k][t] over k < depth, for TILE rows r and PANEL columns t.
 * w[r][k] is at w[r * row + k * step]. x: (depth, PANEL). y: rows of `width`. */
INLINE void add_product(const float *w, long row, long step, const float *x, float *y, long width, long depth) {
    floats sums[TILE][ACROSS] = {0};
    for (long k = 0; k < depth; k++) {
        floats columns[ACROSS];
        UNROLL for (int i = 0; i < ACROSS; i++) columns[i] = load(x + k * PANEL + i * LANES);
        UNROLL for (int r = 0; r < TILE; r++)
            UNROLL for (int i = 0; i < ACROSS; i++) sums[r][i] += w[r * row + k * step] * columns[i];
    }
    UNROLL for (int r = 0; r < TILE; r++)
        UNROLL for (int i = 0; i < ACROSS; i++) {
            float *at = y + r * width + i * LANES;
            store(at, load(at) + sums[r][i]);
        }
}
