/* y = W x for many vectors x: the product that a prompt consists of.
 *
 * Its time is that of multiplying, so both factors are laid out as the arithmetic likes them before (Goto and van
 * de Geijn 2008, "Anatomy of high-performance matrix multiplication"): the vectors in panels, one in each lane,
 * and a block of W widened to float32 in its core's own cache, where every weight then meets every panel.
 * Meanwhile the next block comes from memory. Sums are float32, and those of `DEPTH` columns at a time are added
 * up: in one chain over long rows the rounding errors would be twice as large.
 *
 * Compiled once for each dtype of W; see native.py.
 */

#include "weights.h"

enum {
    ROWS = 64,       /* of W in a block */
    DEPTH = 256,     /* most columns of a block: that much of a panel stays in the first cache */
    VECTORS = 512,   /* most vectors at once; for more, W is read again */
    APART = LANES,   /* between rows of a block, or all would compete for the same places of the cache */
};

/* packed[panel][c][lane] = x[panel * PANEL + lane][c]; the last panel is filled up with the last vector. */
static void pack(const float *x, float *packed, long cols, long n) {
#pragma omp for schedule(static)
    for (long panel = 0; panel < (n + PANEL - 1) / PANEL; panel++)
        for (long c = 0; c < cols; c += GROUP) /* so many, to read each line of x once */
            for (long lane = 0; lane < PANEL; lane++) {
                long vector = panel * PANEL + lane < n ? panel * PANEL + lane : n - 1;
                for (long i = c; i < c + GROUP; i++) packed[(panel * cols + i) * PANEL + lane] = x[vector * cols + i];
            }
}

/* The products of up to ROWS rows with n packed vectors. w, scales: the rows'. y: (n, rows), from the first on. */
static void multiply(const stored *w, const uint16_t *scales, const float *packed, float *y, long high, long rows,
                     long cols, long n) {
    float sums[ROWS * VECTORS], block[ROWS * (DEPTH + APART)];
    long blocks = (cols + DEPTH - 1) / DEPTH, depth = (cols / GROUP + blocks - 1) / blocks * GROUP; /* even ones */
    long panels = (n + PANEL - 1) / PANEL, tiles = (high + TILE - 1) / TILE, tasks = panels * tiles;
    long width = panels * PANEL;
    memset(sums, 0, ROWS * width * sizeof *sums);
    for (long c = 0; c < cols; c += depth) {
        long part = cols - c < depth ? cols - c : depth, task = 0;
        const stored *next = c + depth < cols ? w + c + depth : w + ROWS * cols;
        for (long r = 0; r < high; r++)
            for (long i = 0, at = r * cols + c; i < part; i += LANES, at += LANES)
                store(block + r * (depth + APART) + i, widened(w + at) * scale_of(scales, at));
        for (long p = 0; p < panels; p++)
            for (long r = 0; r < tiles * TILE; r += TILE, task++) {
                for (long row = task * high / tasks; row < (task + 1) * high / tasks; row++) /* its share of them */
                    for (long i = 0; i < depth; i += 64 / sizeof(stored))
                        __builtin_prefetch(next + row * cols + i, 0, 2);
                add_product(block + r * (depth + APART), depth + APART, 1, packed + (p * cols + c) * PANEL,
                            sums + r * width + p * PANEL, width, part);
            }
    }
    for (long t = 0; t < n; t++)
        for (long r = 0; r < high; r++) y[t * rows + r] = sums[r * width + t];
}

/* w: (rows, cols). scales: bfloat16, (rows, cols / GROUP), for int8 alone. x: (n, cols). y: (n, rows).
 * packed: room for min(n, VECTORS) vectors, in whole panels. */
void matmul(const stored *w, const uint16_t *scales, const float *x, float *packed, float *y, long rows, long cols,
            long n) {
#pragma omp parallel
    for (long first = 0; first < n; first += VECTORS) {
        long many = n - first < VECTORS ? n - first : VECTORS;
        pack(x + first * cols, packed, cols, many);
#pragma omp for schedule(dynamic)
        for (long top = 0; top < rows; top += ROWS)
            multiply(w + top * cols, scales ? scales + top * cols / GROUP : scales, packed, y + first * rows + top,
                     rows - top < ROWS ? rows - top : ROWS, rows, cols, many);
    }
}
