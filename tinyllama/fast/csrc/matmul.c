/* y = W x for many vectors x: the product that a prompt consists of. `matvec_plain` says what it computes.
 *
 * Its time is that of multiplying, so both factors are first laid out for the arithmetic (Goto and van de Geijn
 * 2008, "Anatomy of high-performance matrix multiplication"): the vectors in panels with one vector in each lane,
 * and a block of W in the core's own cache, where it meets every panel. Where x is bfloat16 and the processor
 * multiplies such numbers, W is rounded to bfloat16; otherwise both are widened to float32. Sums are float32. At
 * most CHAIN float32 products are added in one sum: over long rows its rounding error would be twice as large.
 *
 * Compiled once for each dtype of W and each dtype of x and y; see build.py.
 */

#include "weights.h"

#ifdef _OPENMP
int omp_get_num_threads(void); /* as in omp.h, which not every compiler comes with */
#else
INLINE int omp_get_num_threads(void) { return 1; }
#endif

enum {
    ROWS = 64,                       /* rows of W in a block */
    DEPTH = 1408,                    /* most words of a row in a block: blocks and sums must fit the second cache */
    CHAIN = WORD == 2 ? DEPTH : 256, /* words in one sum; bfloat16 products have larger errors anyway */
    VECTORS = 512,                   /* vectors at a time; for more, W is read again */
    APART = LANES,                   /* gap between rows of a block, or they would share the same cache sets */
    TALL = sizeof(floats) / sizeof(value), /* rows whose results fill a register */
    SHARES = VECTORS / PANEL / TILE, /* tiles that prefetch one row of the next block, each a part of it */
};

/* packed[panel][c][lane] = word c of vector panel * PANEL + lane; the last vector fills up the last panel. */
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

/* y[t][r] = sums[r][t] for at most LANES vectors t < n and at most TALL rows r < left. */
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

/* The products of `high` rows, at most ROWS, with n packed vectors. w, scales and y begin at the first of the rows.
 * Each tile also prefetches a little of what comes next, so that the arithmetic never waits for W or y. */
static void multiply(const stored *w, const uint16_t *scales, const float *packed, value *y, long high, long rows,
                     long cols, long n) {
    const long every = LINE * SHARES / (WORD * sizeof *w);
    /* Not on the stack, which is as small as 128 kB for a thread of some systems. */
    static _Thread_local _Alignas(LINE) float block[ROWS * (DEPTH + APART)];
    static _Thread_local _Alignas(LINE) float sums[VECTORS * ROWS]; /* a panel each; one where a block is deep */
    long length = cols / WORD, panels = length > DEPTH;
    for (long c = 0; c < length; c += DEPTH) {
        long depth = length - c < DEPTH ? length - c : DEPTH, done = c + depth == length;
        const stored *next = done ? w + omp_get_num_threads() * ROWS * cols /* the likely one */ : w + (c + depth) * WORD;
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
                    add_product(block + r * (DEPTH + APART) + k, DEPTH + APART, packed + t * length + (c + k) * PANEL,
                                panel + r * PANEL, PANEL, depth - k < CHAIN ? depth - k : CHAIN,
                                (const char *)(ahead + k * WORD / SHARES), every);
            }
            for (long i = 0; done && i < PANEL; i += LANES)
                for (long r = 0; r < high; r += TALL)
                    unpack(panel + r * PANEL + i, y + (t + i) * rows + r, rows, n - t - i, high - r);
        }
    }
}

/* How many floats `packed` needs for n vectors. */
long packed_size(long cols, long n) {
    long most = n < VECTORS ? n : VECTORS;
    return (most + PANEL - 1) / PANEL * PANEL * cols;
}

/* w: (rows, cols). scales: bfloat16, (rows, cols / GROUP), for int8 alone. x: (n, cols). y: (n, rows).
 * packed: see `packed_size`. */
void matmul(const stored *w, const uint16_t *scales, const value *x, float *packed, value *y, long rows, long cols,
            long n) {
    for (long first = 0; first < n; first += VECTORS) {
        long many = n - first < VECTORS ? n - first : VECTORS;
#pragma omp parallel
        {
            pack(x + first * cols, packed, cols, many);
#pragma omp for schedule(dynamic) nowait
            for (long top = 0; top < rows; top += ROWS)
                multiply(w + top * cols, scales ? scales + top * cols / GROUP : NULL, packed, y + first * rows + top,
                         rows - top < ROWS ? rows - top : ROWS, rows, cols, many);
        }
    }
}
