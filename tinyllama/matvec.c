/* y = W x for a few vectors x at once: the product that decoding consists of.
 *
 * With one vector its time is that of reading W from memory: every core reads its share of the rows in order,
 * and asks for what comes 6 kB later. It asks for that into the second cache, for some processors (AMD's Zen 4)
 * read at half the speed when asked for it into the first. Weights are widened to float32 in registers; sums are
 * float32. The order of additions follows from the length of a row alone, so that a vector gives the same bits
 * alone and among others, on any number of threads.
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
    CHAINS = 4,      /* sums per row: an addition takes four cycles, and four can be under way at once */
    BLOCK = 1024,    /* most columns after which sums are totalled: that much of VECTORS stays in the first cache */
    TOGETHER = 16,   /* rows that meet one block of several vectors before the next comes */
    AHEAD = 6144,    /* bytes between what is used and what is asked for */
};

typedef float four __attribute__((vector_size(16)));

INLINE float total(const floats *sums) {
    floats sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    four parts[LANES / 4];
    memcpy(parts, &sum, sizeof parts);
    for (int i = 1; i < LANES / 4; i++) parts[0] += parts[i];
    return (parts[0][0] + parts[0][2]) + (parts[0][1] + parts[0][3]);
}

/* Add the products of `part` columns of one row with n vectors, a constant where this is called. Meanwhile ask
 * for the columns from `from` up to `to` of `next`. */
INLINE void dots(const stored *w, const uint16_t *scales, const float *x, float *y, long rows, long cols,
                 long part, int n, const stored *next, long from, long to) {
    floats sums[VECTORS][CHAINS] = {0};
    for (long group = 0; group < part; group += GROUP) {
        if (from <= group && group < to)
            for (int i = 0; i < GROUP; i += 64 / sizeof(stored)) __builtin_prefetch(next + group + i, 0, 2);
        float scale = scale_of(scales, group);
        for (long c = group; c < group + GROUP; c += CHAINS * LANES)
            UNROLL for (int i = 0; i < CHAINS; i++) {
                floats weights = widened(w + c + i * LANES) * scale;
                UNROLL for (int k = 0; k < n; k++) sums[k][i] += weights * load(x + k * cols + c + i * LANES);
            }
    }
    UNROLL for (int k = 0; k < n; k++) y[k * rows] += total(sums[k]);
}

/* w: (rows, cols). scales: bfloat16, (rows, cols / GROUP), for int8 alone. x: (n, cols). y: (n, rows). */
void matvec(const stored *w, const uint16_t *scales, const float *x, float *y, long rows, long cols, long n) {
    long together = n > 1 ? TOGETHER : 1; /* a single vector reads each row to its end */
    long blocks = (cols + BLOCK - 1) / BLOCK, block = (cols / GROUP + blocks - 1) / blocks * GROUP; /* even ones */
    long passes = (n + VECTORS - 1) / VECTORS;
#pragma omp parallel for schedule(static)
    for (long top = 0; top < rows; top += together)
        for (long c = 0; c < cols; c += block)
            for (long pass = 0; pass < passes; pass++)
                for (long r = top; r < top + together && r < rows; r++) {
                    long k = pass * VECTORS, at = r * cols + c, part = cols - c < block ? cols - c : block;
                    const stored *wr = w + at, *next = wr + AHEAD / sizeof(stored);
                    if (n > 1) /* the next block of the row, or the first of a row after those together */
                        next = wr + (c + block < cols ? block : together * cols - c);
                    long from = part * pass / passes, to = part * (pass + 1) / passes; /* each pass its share */
                    const uint16_t *s = scales ? scales + at / GROUP : scales;
                    const float *xk = x + k * cols + c;
                    float *yk = y + k * rows + r;
                    if (c == 0)
                        for (long i = 0; i < VECTORS && i < n - k; i++) yk[i * rows] = 0;
                    switch (n - k < VECTORS ? n - k : VECTORS) { /* a constant in each, to unroll loops by */
                        case 1: dots(wr, s, xk, yk, rows, cols, part, 1, next, from, to); break;
                        case 2: dots(wr, s, xk, yk, rows, cols, part, 2, next, from, to); break;
#if VECTORS == 4
                        case 3: dots(wr, s, xk, yk, rows, cols, part, 3, next, from, to); break;
                        case 4: dots(wr, s, xk, yk, rows, cols, part, 4, next, from, to); break;
#endif
                    }
                }
}
