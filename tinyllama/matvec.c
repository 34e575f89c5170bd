/* y = W x for a few vectors x at once: the product that decoding consists of.
 *
 * With one vector its time is that of reading W from memory: every core reads its share of the rows in order,
 * and asks for what comes 6 kB later. It asks for that into the second cache, for some processors (AMD's Zen 4)
 * read at half the speed when asked for it into the first. Weights are widened to float32 in registers; sums are
 * float32. Numbers are added group by group in the order of columns, whatever the blocks, so that a vector gives
 * the same bits alone and among others, on any number of threads.
 *
 * Compiled once for each dtype of W, with -DFLOAT32, -DBFLOAT16, -DFLOAT16 or -DINT8; see native.py.
 */

#include "weights.h"

/* How many vectors' sums the registers hold. */
#if defined(__AVX512F__)
#define VECTORS 4
#else
#define VECTORS 2
#endif

enum {
    BLOCK = 1024,  /* columns of several vectors at a time: that much of VECTORS stays in the first cache */
    TOGETHER = 16, /* rows that meet them before the next columns come */
    AHEAD = 6144,  /* bytes between what is used and what is asked for */
};

typedef float four __attribute__((vector_size(16)));

INLINE float total(floats sum) {
    four parts[LANES / 4];
    memcpy(parts, &sum, sizeof parts);
    for (int i = 1; i < LANES / 4; i++) parts[0] += parts[i];
    return (parts[0][0] + parts[0][2]) + (parts[0][1] + parts[0][3]);
}

/* Add to n sums, a constant where this is called, the products of `part` columns of one row. Meanwhile ask for the
 * columns from `from` up to `to` of `next`. A group is summed up by itself: one scale then serves it, and the
 * next need not wait for it. */
INLINE void dots(const stored *w, const uint16_t *scales, const float *x, floats *sums, long cols, long part,
                 int n, const stored *next, long from, long to) {
    floats sum[VECTORS];
    UNROLL for (int k = 0; k < n; k++) sum[k] = sums[k];
    for (long group = 0; group < part; group += GROUP) {
        if (from <= group && group < to)
            for (int i = 0; i < GROUP; i += 64 / sizeof(stored)) __builtin_prefetch(next + group + i, 0, 2);
        floats products[VECTORS];
        UNROLL for (int i = 0; i < GROUP; i += LANES) {
            floats weights = widened(w + group + i);
            UNROLL for (int k = 0; k < n; k++) {
                floats product = weights * load(x + k * cols + group + i);
                products[k] = i ? products[k] + product : product;
            }
        }
        UNROLL for (int k = 0; k < n; k++) sum[k] += products[k] * scale_of(scales, group);
    }
    UNROLL for (int k = 0; k < n; k++) sums[k] = sum[k];
}

/* w: (rows, cols). scales: bfloat16, (rows, cols / GROUP), for int8 alone. x: (n, cols). y: (n, rows). */
void matvec(const stored *w, const uint16_t *scales, const float *x, float *y, long rows, long cols, long n) {
    long together = 1, block = cols, ahead = AHEAD / sizeof(stored); /* a single vector reads each row to its end */
    if (n > 1) together = TOGETHER, block = BLOCK, ahead = TOGETHER * cols;
#pragma omp parallel for schedule(static)
    for (long top = 0; top < rows; top += together) {
        long high = rows - top < together ? rows - top : together;
        for (long k = 0; k < n; k += VECTORS) {
            long few = n - k < VECTORS ? n - k : VECTORS;
            floats sums[TOGETHER][VECTORS];
            memset(sums, 0, high * sizeof *sums);
            for (long c = 0; c < cols; c += block)
                for (long r = 0; r < high; r++) {
                    long at = (top + r) * cols + c, part = cols - c < block ? cols - c : block;
                    long from = part * k / n, to = part * (k + few) / n; /* each its share */
                    const stored *wr = w + at, *next = wr + ahead;
                    const uint16_t *s = scales ? scales + at / GROUP : scales;
                    const float *xk = x + k * cols + c;
                    switch (few) { /* a constant in each, to unroll loops by */
                        case 1: dots(wr, s, xk, sums[r], cols, part, 1, next, from, to); break;
                        case 2: dots(wr, s, xk, sums[r], cols, part, 2, next, from, to); break;
#if VECTORS == 4
                        case 3: dots(wr, s, xk, sums[r], cols, part, 3, next, from, to); break;
                        case 4: dots(wr, s, xk, sums[r], cols, part, 4, next, from, to); break;
#endif
                    }
                }
            for (long i = 0; i < few; i++)
                for (long r = 0; r < high; r++) y[(k + i) * rows + top + r] = total(sums[r][i]);
        }
    }
}
