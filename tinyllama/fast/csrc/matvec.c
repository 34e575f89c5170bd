/* y = W x for a few vectors x: the product that decoding consists of. `matvec_plain` says what it computes.
 *
 * With one vector the time is that of reading W from memory: each core reads its share of the rows in order and
 * prefetches what comes 6 kB later. It prefetches into the second-level cache, because AMD's Zen 4 reads at half
 * the speed when asked for the first level. Weights become float32 in registers, or bfloat16 where x is bfloat16
 * and the processor multiplies such numbers; sums are float32. Products are added group by group in the order of
 * the columns, whatever the blocks are, so a vector gives the same bits alone, among others, and on any number of
 * threads.
 *
 * Compiled once for each dtype of W and each dtype of x and y; see build.py.
 */

#ifndef __clang__
#pragma GCC optimize("schedule-insns") /* without it GCC 12 loads a value again at every use, registers or not */
#endif

#include "weights.h"

/* How many vectors' sums the registers hold, for each of TALL rows. */
#if defined(__AVX512F__)
#define VECTORS 4
#else
#define VECTORS 2
#endif

enum {
    TALL = 2,      /* rows that share each load of the vectors */
    BLOCK = 1024,  /* columns of several vectors at a time: VECTORS of them stay in the first-level cache */
    TOGETHER = 16, /* rows that use a block of columns before the next block is loaded */
    AHEAD = 6144,  /* bytes between what is used and what is prefetched */
};

/* w: (rows, cols). scales: bfloat16, (rows, cols / GROUP), for int8 alone. x: (n, cols). y: (n, rows). */
void matvec_plain(const stored *w, const uint16_t *scales, const value *x, value *y, long rows, long cols, long n) {
    for (long k = 0; k < n; k++)
        for (long r = 0; r < rows; r++) {
            float sum = 0;
            for (long c = 0; c < cols; c++)
                sum += widen(w[r * cols + c]) * scale_of(scales, r * cols + c) * wide(x[k * cols + c]);
            y[k * rows + r] = narrow(sum);
        }
}

typedef float four __attribute__((vector_size(16)));

INLINE float total(floats sum) {
    four parts[LANES / 4];
    memcpy(parts, &sum, sizeof parts);
    for (int i = 1; i < LANES / 4; i++) parts[0] += parts[i];
    return (parts[0][0] + parts[0][2]) + (parts[0][1] + parts[0][3]);
}

/* Add the products of `part` columns to the sums of `tall` rows and n vectors (both constants at each call).
 * Prefetch the columns from `from` up to `to` that come `ahead` numbers later. Each group has a sum of its own:
 * it needs one scale, and the next group need not wait for it. */
INLINE void dots(const stored *w, const uint16_t *scales, const value *x, floats (*sums)[VECTORS], long cols, long part,
                 int tall, int n, long ahead, long from, long to) {
    floats sum[TALL][VECTORS];
    UNROLL for (int r = 0; r < tall; r++)
        UNROLL for (int k = 0; k < n; k++) sum[r][k] = sums[r][k];
    for (long group = 0; group < part; group += GROUP) {
        if (from <= group && group < to)
            UNROLL for (int r = 0; r < tall; r++)
                UNROLL for (int i = 0; i < GROUP; i += LINE / sizeof(stored))
                    __builtin_prefetch(w + ahead + r * cols + group + i, 0, 2);
        floats products[TALL][VECTORS] = {0};
        UNROLL for (int i = 0; i < GROUP; i += LANES * WORD) {
            floats row[TALL];
            UNROLL for (int r = 0; r < tall; r++) row[r] = factors(w + r * cols + group + i, 1);
            UNROLL for (int k = 0; k < n; k++) {
                floats column = words(x + k * cols + group + i);
                UNROLL for (int r = 0; r < tall; r++) products[r][k] = plus(products[r][k], row[r], column);
            }
        }
        UNROLL for (int r = 0; r < tall; r++)
            UNROLL for (int k = 0; k < n; k++) sum[r][k] += products[r][k] * scale_of(scales, r * cols + group);
    }
    UNROLL for (int r = 0; r < tall; r++)
        UNROLL for (int k = 0; k < n; k++) sums[r][k] = sum[r][k];
}

/* `dots` with n as a constant, so that the compiler unrolls its loops. */
INLINE void some_dots(const stored *w, const uint16_t *scales, const value *x, floats (*sums)[VECTORS], long cols,
                      long part, int tall, long n, long ahead, long from, long to) {
    switch (n) {
        case 1: dots(w, scales, x, sums, cols, part, tall, 1, ahead, from, to); break;
        case 2: dots(w, scales, x, sums, cols, part, tall, 2, ahead, from, to); break;
#if VECTORS == 4
        case 3: dots(w, scales, x, sums, cols, part, tall, 3, ahead, from, to); break;
        case 4: dots(w, scales, x, sums, cols, part, tall, 4, ahead, from, to); break;
#endif
    }
}

/* The same as `matvec_plain`. */
void matvec(const stored *w, const uint16_t *scales, const value *x, value *y, long rows, long cols, long n) {
    long together = 1, block = cols, ahead = AHEAD / sizeof(stored); /* one vector: read each row to its end */
    if (n > 1) together = TOGETHER, block = BLOCK, ahead = TOGETHER * cols;
#pragma omp parallel for schedule(static)
    for (long top = 0; top < rows; top += together) {
        long high = rows - top < together ? rows - top : together;
        for (long k = 0; k < n; k += VECTORS) {
            long few = n - k < VECTORS ? n - k : VECTORS;
            floats sums[TOGETHER][VECTORS];
            memset(sums, 0, high * sizeof *sums);
            for (long c = 0; c < cols; c += block) {
                long part = cols - c < block ? cols - c : block;
                long from = part * k / n, to = part * (k + few) / n; /* these vectors' share of the prefetching */
                for (long r = 0; r < high; r += TALL) {
                    long at = (top + r) * cols + c;
                    const uint16_t *s = scales ? scales + at / GROUP : scales;
                    if (high - r < TALL)
                        some_dots(w + at, s, x + k * cols + c, sums + r, cols, part, 1, few, ahead, from, to);
                    else
                        some_dots(w + at, s, x + k * cols + c, sums + r, cols, part, TALL, few, ahead, from, to);
                }
            }
            for (long i = 0; i < few; i++)
                for (long r = 0; r < high; r++) y[(k + i) * rows + top + r] = narrow(total(sums[r][i]));
        }
    }
}
