/* y = W x for a few vectors x at once: the product that decoding consists of.
 *
 * With one vector its time is that of reading W from memory: every core reads its share of the rows in order,
 * and asks for what comes 4 kB later. Weights are widened to float32 in registers; sums are float32. The order
 * of additions follows from the length of a row alone, so that a vector gives the same bits alone and among
 * others, on any number of threads.
 *
 * Compiled once for each dtype of W, with -DFLOAT32, -DBFLOAT16, -DFLOAT16 or -DINT8; see native.py.
 */

#include <stdint.h>
#include <string.h>

/* The machine's registers: LANES floats each, and enough of them for the sums of VECTORS vectors. */
#if defined(__AVX512F__)
#include <immintrin.h>
#define VECTORS 4
enum { LANES = 16 };
typedef __m512 floats;
#define MULTIPLY_ADD(a, b, c) _mm512_fmadd_ps(a, b, c)
static inline floats from_float32(const float *p) { return _mm512_loadu_ps(p); }
static inline floats from_bfloat16(const uint16_t *p) {
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
static inline floats from_float16(const uint16_t *p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
}
static inline floats from_int8(const int8_t *p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
}
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include <immintrin.h>
#define VECTORS 2
enum { LANES = 8 };
typedef __m256 floats;
#define MULTIPLY_ADD(a, b, c) _mm256_fmadd_ps(a, b, c)
static inline floats from_float32(const float *p) { return _mm256_loadu_ps(p); }
static inline floats from_bfloat16(const uint16_t *p) {
    __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
static inline floats from_float16(const uint16_t *p) {
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
}
static inline floats from_int8(const int8_t *p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)));
}
#else /* any other: the compiler finds the instructions */
#define VECTORS 2
enum { LANES = 4 };
typedef float floats __attribute__((vector_size(16)));
#define MULTIPLY_ADD(a, b, c) ((a) * (b) + (c))
static inline floats from_float32(const float *p) { return (floats){p[0], p[1], p[2], p[3]}; }
static inline floats from_int8(const int8_t *p) { return (floats){p[0], p[1], p[2], p[3]}; }
static inline floats from_bfloat16(const uint16_t *p) {
    uint32_t bits[4] = {(uint32_t)p[0] << 16, (uint32_t)p[1] << 16, (uint32_t)p[2] << 16, (uint32_t)p[3] << 16};
    floats values;
    memcpy(&values, bits, sizeof values);
    return values;
}
#ifdef FLOAT16
static inline floats from_float16(const uint16_t *p) {
    _Float16 v[4];
    memcpy(v, p, sizeof v);
    return (floats){v[0], v[1], v[2], v[3]};
}
#endif
#endif

#if defined(FLOAT32)
typedef float stored;
#define WIDENED from_float32
#elif defined(BFLOAT16)
typedef uint16_t stored;
#define WIDENED from_bfloat16
#elif defined(FLOAT16)
typedef uint16_t stored;
#define WIDENED from_float16
#else
typedef int8_t stored;
#define WIDENED from_int8
#define SCALED
#endif

enum {
    CHAINS = 4,      /* sums per row: an addition takes four cycles, and four can be under way at once */
    GROUP = 64,      /* columns that share a scale; the number of columns is a multiple of it */
    BLOCK = 2048,    /* most columns after which sums are totalled: that much of x stays in the first cache */
    TOGETHER = 16,   /* rows that meet one block of several vectors before the next comes */
    AHEAD = 6144,    /* bytes between what is used and what is asked for */
};

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 4")

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
            for (int i = 0; i < GROUP; i += 64 / sizeof(stored)) __builtin_prefetch(next + group + i, 0, 0);
#ifdef SCALED
        uint32_t bits = (uint32_t)scales[group / GROUP] << 16;
        float scale;
        memcpy(&scale, &bits, sizeof scale);
#endif
        for (long c = group; c < group + GROUP; c += CHAINS * LANES)
            UNROLL for (int i = 0; i < CHAINS; i++) {
                floats weights = WIDENED(w + c + i * LANES);
#ifdef SCALED
                weights *= scale;
#endif
                UNROLL for (int k = 0; k < n; k++) {
                    floats values = from_float32(x + k * cols + c + i * LANES);
                    sums[k][i] = MULTIPLY_ADD(weights, values, sums[k][i]);
                }
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
