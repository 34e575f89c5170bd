/* How weights are stored, and how they become floats: one of -DFLOAT32, -DBFLOAT16, -DFLOAT16 and -DINT8. */

#include "values.h"

/* GROUP columns of a row share a scale in 8 bits; -DGROUP=... comes from build.py. */

#if defined(FLOAT32)
typedef float stored;
#elif defined(INT8)
typedef int8_t stored;
#else
typedef uint16_t stored;
#endif

#if defined(FLOAT32)
INLINE floats widened(const stored *p) { return load(p); }
#elif defined(BFLOAT16)
INLINE floats widened(const stored *p) { return load_bfloat16(p); }
#elif defined(__AVX512F__)
INLINE floats widened(const stored *p) {
#if defined(FLOAT16)
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
#else
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
#endif
}
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
INLINE floats widened(const stored *p) {
#if defined(FLOAT16)
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
#else
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)));
#endif
}
#else
INLINE floats widened(const stored *p) {
#if defined(FLOAT16)
    _Float16 v[LANES];
    memcpy(v, p, sizeof v);
    return (floats){v[0], v[1], v[2], v[3]};
#else
    return (floats){p[0], p[1], p[2], p[3]};
#endif
}
#endif

INLINE float widen(stored w) { /* one weight */
#if defined(BFLOAT16)
    uint32_t bits = (uint32_t)w << 16;
    float v;
    memcpy(&v, &bits, sizeof v);
    return v;
#elif defined(FLOAT16) && defined(__F16C__) /* where clang has no _Float16 */
    return _cvtsh_ss(w);
#elif defined(FLOAT16)
    _Float16 v;
    memcpy(&v, &w, sizeof v);
    return v;
#else
    return w;
#endif
}

/* The scale of the weight at an index into W; 1 but for int8. */
INLINE float scale_of(const uint16_t *scales, long column) {
#ifdef INT8
    uint32_t bits = (uint32_t)scales[column / GROUP] << 16;
    float scale;
    memcpy(&scale, &bits, sizeof scale);
    return scale;
#else
    return (void)scales, (void)column, 1;
#endif
}

/* LANES words of a row of W, times a scale. */
INLINE floats factors(const stored *w, float scale) {
#if defined(PAIRS) && defined(BFLOAT16)
    return (void)scale, load((const float *)w);
#elif defined(PAIRS)
    floats low = widened(w), high = widened(w + LANES);
    return (floats)_mm512_cvtne2ps_pbh((__m512)(high * scale), (__m512)(low * scale));
#else
    return widened(w) * scale;
#endif
}
