/* y = W x for many vectors x at once: the product that a prompt consists of.
 *
 * Its time is that of multiplying, so both factors are laid out as the arithmetic likes them before (Goto and van
 * de Geijn 2008, "Anatomy of high-performance matrix multiplication"): the vectors in panels, one in each lane,
 * and a block of W in its core's own cache, where every weight then meets every panel. Where processors multiply
 * bfloat16 numbers and x has such, W is rounded to them; else both are widened. Sums are float32. Of float32
 * products at most `CHAIN` are added up in one: over long rows its rounding errors would be twice as large.
 *
 * Compiled once for each dtype of W and each of x and y, with -DX_FLOAT32 or -DX_BFLOAT16; see native.py.
 */

#include "weights.h"

int omp_get_num_threads(void); /* as in omp.h, which not every compiler comes with */

enum {
    ROWS = 64,                       /* of W in a block */
    DEPTH = 1408,                    /* most words of each: blocks and sums have to fit in the second cache */
    CHAIN = WORD == 2 ? DEPTH : 256, /* words added up in one sum; bfloat16 numbers have larger errors anyway */
    VECTORS = 512,                   /* most vectors at once; for more, W is read again */
    APART = LANES,                   /* between rows of a block, or all would compete for the same places there */
    TALL = sizeof(floats) / sizeof(value), /* rows whose results fill a vector */
    SHARES = VECTORS / PANEL / TILE, /* tiles that ask for a row of the next block, each for a part of it */
};

/* packed[panel][c][lane] = word c of vector panel * PANEL + lane; the last panel is filled up with the last one. */
static void pack(const value *x, float *packed, long cols, long n) {
#pragma omp for schedule(static)
    for (long first = 0; first < (n + PANEL - 1) / PANEL * PANEL; first += LANES)
        for (long c = 0; c < cols / WORD; c += LANES) {
            floats square[LANES];
            for (long lane = 0; lane < LANES; lane++) {
                long vector = first + lane < n ? first + lane : n - 1;
                square[lane] = words(x + vector * cols + c * WORD);
            }
            transpose(square);
            float *to = packed + (first / PANEL * cols / WORD + c) * PANEL + first % PANEL;
            for (long i = 0; i < LANES; i++) store(to + i * PANEL, square[i]);
        }
}

/* y[t][r] = sums[r][t], for LANES vectors t or what is left of n, and TALL rows or what is left. */
INLINE void unpack(const float *sums, value *y, long rows, long n, long left) {
    floats square[LANES];
    for (long i = 0; i < LANES; i++) {
#ifdef X_FLOAT32
        square[i] = load(sums + i * PANEL);
#else
        square[i] = halves(load(sums + 2 * i * PANEL), load(sums + (2 * i + 1) * PANEL));
#endif
    }
    transpose(square);
    for (long t = 0; t < LANES && t < n; t++)
        if (left >= TALL)
            memcpy(y + t * rows, square + t, sizeof *square);
        else
            memcpy(y + t * rows, square + t, left * sizeof *y);
}

/* The products of up to ROWS rows with n packed vectors. w, scales: the rows'. y: (n, rows), from the first on.
 *
 * The arithmetic alone runs at what the processor can do. So that it does not wait for W and for y, memory is asked
 * meanwhile for what comes next, a little with each tile. */
static void multiply(const stored *w, const uint16_t *scales, const float *packed, value *y, long high, long rows,
                     long cols, long n) {
    const long every = LINE * SHARES / (WORD * sizeof *w);
    _Alignas(LINE) float block[ROWS * (DEPTH + APART)];
    _Alignas(LINE) float sums[VECTORS * ROWS]; /* by panels; where the block has the whole depth, one is enough */
    long length = cols / WORD, panels = length > DEPTH;
    for (long c = 0; c < length; c += DEPTH) {
        long depth = length - c < DEPTH ? length - c : DEPTH, done = c + depth == length;
        const stored *next = done ? w + omp_get_num_threads() * ROWS * cols /* most likely */ : w + (c + depth) * WORD;
        for (long r = 0; r < high; r++)
            for (long i = 0; i < depth; i += LANES) {
                long at = r * cols + (c + i) * WORD;
                store(block + r * (DEPTH + APART) + i, factors(w + at, scale_of(scales, at)));
            }
        for (long t = 0; t < n; t += PANEL) {
            float *panel = sums + panels * t * ROWS;
            if (c == 0) memset(panel, 0, ROWS * PANEL * sizeof *panel);
            for (long r = 0; r < high; r += TILE) {
                for (long i = t + r * PANEL / ROWS; done && i < t + (r + TILE) * PANEL / ROWS; i++)
                    for (long at = 0; at < ROWS; at += LINE / sizeof *y) __builtin_prefetch(y + i * rows + at, 1);
                long tile = t / PANEL * (ROWS / TILE) + r / TILE, part = tile % SHARES * depth / SHARES;
                const stored *ahead = next + tile / SHARES * cols + part * WORD;
                for (long k = 0; k < depth; k += CHAIN)
                    add_product(block + r * (DEPTH + APART) + k, DEPTH + APART, 1, packed + t * length + (c + k) * PANEL,
                                panel + r * PANEL, PANEL, depth - k < CHAIN ? depth - k : CHAIN,
                                (const char *)(ahead + k * WORD / SHARES), every);
            }
            for (long i = 0; done && i < PANEL; i += LANES)
                for (long r = 0; r < high; r += TALL)
                    unpack(panel + r * PANEL + i, y + (t + i) * rows + r, rows, n - t - i, high - r);
        }
    }
}

/* For each of `count` matrices; w: (rows, cols). scales: bfloat16, (rows, cols / GROUP), for int8 alone.
 * x: (n, cols), for all of them. y: (n, rows). packed: room for min(n, VECTORS) vectors, in whole panels of words. */
void matmul(const stored *const *w, const uint16_t *const *scales, const value *x, float *packed, value *const *y,
            const long *rows, long count, long cols, long n) {
#pragma omp parallel
    for (long first = 0; first < n; first += VECTORS) {
        long many = n - first < VECTORS ? n - first : VECTORS;
        pack(x + first * cols, packed, cols, many);
        for (long i = 0; i < count; i++)
#pragma omp for schedule(dynamic) nowait
            for (long top = 0; top < rows[i]; top += ROWS)
                multiply(w[i] + top * cols, scales[i] ? scales[i] + top * cols / GROUP : NULL, packed,
                         y[i] + first * rows[i] + top, rows[i] - top < ROWS ? rows[i] - top : ROWS, rows[i], cols, many);
#pragma omp barrier
    }
}
