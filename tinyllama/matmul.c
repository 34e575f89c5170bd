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

#include "values.h"
#include "weights.h"

enum {
    ROWS = 64,                       /* of W in a block */
    DEPTH = 1024,                    /* most words of each: blocks and sums have to fit in the second cache */
    CHAIN = WORD == 2 ? DEPTH : 256, /* words added up in one sum; bfloat16 numbers have larger errors anyway */
    VECTORS = 512,                   /* most vectors at once; for more, W is read again */
    APART = LANES,                   /* between rows of a block, or all would compete for the same places there */
};

/* LANES words of a vector. */
INLINE floats words(const value *x) {
#if defined(X_BFLOAT16) && !defined(PAIRS)
    float wider[LANES];
    for (int i = 0; i < LANES; i++) wider[i] = wide(x[i]);
    return load(wider);
#else
    return load((const float *)x);
#endif
}

/* LANES words of a row of W, from a column on. */
INLINE floats weights(const stored *w, const uint16_t *scales, long column) {
#if defined(PAIRS) && defined(BFLOAT16)
    return load((const float *)(w + column));
#elif defined(PAIRS)
    floats low = widened(w + column), high = widened(w + column + LANES);
    float scale = scale_of(scales, column);
    return (floats)_mm512_cvtne2ps_pbh((__m512)(high * scale), (__m512)(low * scale));
#else
    return widened(w + column) * scale_of(scales, column);
#endif
}

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

/* y[t][r] = sums[r][t], for LANES vectors t or what is left of n, and as many rows or what is left. */
INLINE void unpack(const float *sums, long width, value *y, long rows, long n, long left) {
    floats square[LANES];
    for (long r = 0; r < LANES; r++) square[r] = load(sums + r * width);
    transpose(square);
    for (long t = 0; t < LANES && t < n; t++) {
        value line[LANES];
        for (int r = 0; r < LANES; r++) line[r] = narrow(square[t][r]);
        if (left >= LANES)
            memcpy(y + t * rows, line, sizeof line);
        else
            memcpy(y + t * rows, line, left * sizeof *line);
    }
}

/* The products of up to ROWS rows with n packed vectors. w, scales: the rows'. y: (n, rows), from the first on. */
static void multiply(const stored *w, const uint16_t *scales, const float *packed, value *y, long high, long rows,
                     long cols, long n) {
    float sums[ROWS * VECTORS], block[ROWS * (DEPTH + APART)];
    long length = cols / WORD, width = (n + PANEL - 1) / PANEL * PANEL;
    memset(sums, 0, ROWS * width * sizeof *sums);
    for (long c = 0; c < length; c += DEPTH) {
        long depth = length - c < DEPTH ? length - c : DEPTH;
        for (long r = 0; r < high; r++)
            for (long i = 0; i < depth; i += LANES)
                store(block + r * (DEPTH + APART) + i, weights(w, scales, r * cols + (c + i) * WORD));
        for (long t = 0; t < width; t += PANEL)
            for (long r = 0; r < high; r += TILE)
                for (long k = 0; k < depth; k += CHAIN)
                    add_product(block + r * (DEPTH + APART) + k, DEPTH + APART, 1, packed + t * length + (c + k) * PANEL,
                                sums + r * width + t, width, depth - k < CHAIN ? depth - k : CHAIN);
    }
    for (long t = 0; t < n; t += LANES)
        for (long r = 0; r < high; r += LANES)
            unpack(sums + r * width + t, width, y + t * rows + r, rows, n - t, high - r);
}

/* w: (rows, cols). scales: bfloat16, (rows, cols / GROUP), for int8 alone. x: (n, cols). y: (n, rows).
 * packed: room for min(n, VECTORS) vectors, in whole panels of words. */
void matmul(const stored *w, const uint16_t *scales, const value *x, float *packed, value *y, long rows, long cols,
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
