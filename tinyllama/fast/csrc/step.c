/* What a layer does beside its matrix products, each in one pass over values that the processor's cache holds.
 *
 * Once the weights are read as fast as memory gives them, what is left of a token's time goes into starting
 * operations: PyTorch takes six for a norm, and two dozen for RoPE, the KV cache and attention. In a prefill the
 * same operations write and read many temporary values.
 *
 * Compiled once for each dtype of the activations, with -DX_FLOAT32 or -DX_BFLOAT16; see native.py. Arithmetic is
 * float32, in the compiler's own vectors of the machine's width.
 */

#include <math.h>

#include "values.h"

enum {
    BLOCK = 64,        /* keys whose scores are held at once */
    FEW = 32,          /* tokens in a row, up to which each has the bits that it has alone */
    MANY_KEYS = 128,   /* keys of a single token from which on a second core is worth its start */
    MANY = 16384,      /* values likewise */
    PART = 1024,       /* of them for a core at a time */
};

typedef float four __attribute__((vector_size(16)));
typedef int32_t order __attribute__((vector_size(16)));

/* n values as floats: the same memory, or `room` where they must be converted. */
INLINE const float *widened(const value *p, long n, float *room) {
#ifdef X_FLOAT32
    return p;
#else
    for (long i = 0; i < n; i++) room[i] = wide(p[i]);
    return room;
#endif
}

/* y = x / rms(x) * weight for each row of x. x, y: (rows, cols). */
void rms_norm(const value *x, const value *weight, value *y, long rows, long cols, float eps) {
#pragma omp parallel for schedule(static) if (rows * cols >= MANY)
    for (long r = 0; r < rows; r++) {
        const value *xr = x + r * cols;
        value *yr = y + r * cols;
        float squares = 0;
#pragma omp simd reduction(+ : squares)
        for (long c = 0; c < cols; c++) squares += wide(xr[c]) * wide(xr[c]);
        float scale = 1 / sqrtf(squares / cols + eps);
        for (long c = 0; c < cols; c++) yr[c] = narrow(wide(weight[c]) * wide(narrow(wide(xr[c]) * scale)));
    }
}

/* Turn each pair (i, i + D/2) of one head by its angle. */
INLINE void rotate(const value *x, const value *cos, const value *sin, float *y, long D) {
    for (long i = 0; i < D / 2; i++) {
        float x1 = wide(x[i]), x2 = wide(x[i + D / 2]), c = wide(cos[i]), s = wide(sin[i]);
        y[i] = x1 * c - x2 * s;
        y[i + D / 2] = x2 * c + x1 * s;
    }
}

/* e^x for x <= 0, off by two units in the last place at most; NaN stays NaN. */
INLINE float exponential(float x) {
    x = x < -87 ? -87 : x;                      /* beyond, the result would be denormal */
    float shifted = x * 1.44269504f + 12582912; /* 1.5 * 2^23: the sum's last bits are n = round(x / ln 2) */
    float n = shifted - 12582912;
    float r = (x - n * 0.693359375f) + n * 2.12194440e-4f; /* x - n ln 2; the first product is exact */
    float p = 1.3981999e-3f * r + 8.3334519e-3f;           /* e^r: Taylor's series, its end fitted */
    p = ((((p * r + 4.1665796e-2f) * r + 1.6666666e-1f) * r + 0.5f) * r + 1) * r + 1;
    uint32_t bits;
    memcpy(&bits, &shifted, sizeof bits);
    bits = (bits + 127) << 23;
    float power; /* 2^n */
    memcpy(&power, &bits, sizeof power);
    return p * power;
}

/* As above, but 0 below -87. */
INLINE floats exponentials(floats x) {
    floats shifted = x * 1.44269504f + 12582912;
    floats n = shifted - 12582912;
    floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    floats p = 1.3981999e-3f * r + 8.3334519e-3f;
    p = ((((p * r + 4.1665796e-2f) * r + 1.6666666e-1f) * r + 0.5f) * r + 1) * r + 1;
    p *= (floats)(((bits)shifted + 127) << 23);
    return (floats)((places)p & ~(x < -87));
}

/* y = silu(gate) * up for n values. */
void swiglu(const value *gate, const value *up, value *y, long n) {
#pragma omp parallel for schedule(static) if (n >= MANY)
    for (long start = 0; start < n; start += PART) /* with `parallel for simd` GCC 12 makes scalar code of it */
#pragma omp simd
        for (long i = start; i < (start + PART < n ? start + PART : n); i++) {
            float x = wide(gate[i]), e = exponential(-fabsf(x));
            float silu = (x < 0 ? x * e : x) / (1 + e);
            y[i] = narrow(wide(narrow(silu)) * wide(up[i]));
        }
}

/* The sums over the lanes of four vectors. */
INLINE four totals(const floats *vectors) {
    const order low = {0, 4, 1, 5}, high = {2, 6, 3, 7};
    four t[4];
    for (int i = 0; i < 4; i++) {
        four parts[LANES / 4];
        memcpy(parts, vectors + i, sizeof parts);
        t[i] = parts[0];
        for (int part = 1; part < LANES / 4; part++) t[i] += parts[part];
    }
    four ab = __builtin_shuffle(t[0], t[1], low) + __builtin_shuffle(t[0], t[1], high);
    four cd = __builtin_shuffle(t[2], t[3], low) + __builtin_shuffle(t[2], t[3], high);
    return __builtin_shuffle(ab, cd, (order){0, 1, 4, 5}) + __builtin_shuffle(ab, cd, (order){2, 3, 6, 7});
}

/* Let the second cache get what will be read; why that one, matvec.c says. */
INLINE void ask(const value *p, long from, long to) {
    for (long i = from; i < to; i += LINE / sizeof(value)) __builtin_prefetch(p + i, 0, 2);
}

/* One KV head and the G query heads of a token that read it: by blocks of keys, with a softmax that is corrected
 * as blocks come (Milakov & Gimelshein 2018, arXiv:1805.02867). Memory is asked for the next block meanwhile.
 * q: (G, D), turned. keys, values: (S, D). z: (G, D). */
INLINE void attend_head(const float *q, const value *keys, const value *values, value *z, long G, long D,
                        long S, float scale) {
    long vectors = D / LANES, share = D / G; /* of a row, for each head to ask for */
    floats sums[G * vectors];
    float largest[G], weight[G], key_room[BLOCK * D], value_room[BLOCK * D];
    memset(sums, 0, sizeof sums);
    for (long h = 0; h < G; h++) largest[h] = -INFINITY, weight[h] = 0;
    for (long start = 0; start < S; start += BLOCK) {
        long n = S - start < BLOCK ? S - start : BLOCK, next = (start + BLOCK) * D;
        const float *kb = widened(keys + start * D, n * D, key_room);
        const float *vb = widened(values + start * D, n * D, value_room);
        for (long h = 0; h < G; h++) {
            floats qh[vectors], sum[vectors];
            float p[BLOCK], top = largest[h], added = 0; /* scores, then e^(score - top) */
            for (long i = 0; i < vectors; i++) qh[i] = load(q + h * D + i * LANES);
            for (long s = 0; s < n; s += 4) {
                ask(keys + next, (h * BLOCK + s) * share, (h * BLOCK + s + 4) * share);
                floats dots[4];
                for (long j = 0; j < 4; j++) {
                    const float *key = kb + (s + j < n ? s + j : s) * D;
                    dots[j] = qh[0] * load(key);
                    for (long i = 1; i < vectors; i++) dots[j] += qh[i] * load(key + i * LANES);
                }
                four scores = totals(dots) * scale;
                memcpy(p + s, &scores, sizeof scores);
            }
            for (long s = n; s < BLOCK; s++) p[s] = -INFINITY;
#pragma omp simd reduction(max : top)
            for (long s = 0; s < BLOCK; s++) top = p[s] > top ? p[s] : top;
#pragma omp simd
            for (long s = 0; s < BLOCK; s++) p[s] = exponential(p[s] - top);
            for (long s = n; s < BLOCK; s++) p[s] = 0;
#pragma omp simd reduction(+ : added)
            for (long s = 0; s < BLOCK; s++) added += p[s];
            float before = exponential(largest[h] - top);
            weight[h] = weight[h] * before + added;
            largest[h] = top;

            for (long i = 0; i < vectors; i++) sum[i] = sums[h * vectors + i] * before;
            for (long s = 0; s < n; s += 2) { /* by two: half as many sums wait for each other */
                ask(values + next, (h * BLOCK + s) * share, (h * BLOCK + s + 2) * share);
                const float *v0 = vb + s * D, *v1 = s + 1 < n ? v0 + D : v0;
                for (long i = 0; i < vectors; i++)
                    sum[i] += p[s] * load(v0 + i * LANES) + p[s + 1] * load(v1 + i * LANES);
            }
            for (long i = 0; i < vectors; i++) sums[h * vectors + i] = sum[i];
        }
    }
    for (long h = 0; h < G; h++)
        for (long i = 0; i < D; i++)
            z[h * D + i] = narrow(S > 0 ? sums[h * vectors + i / LANES][i % LANES] / weight[h] : 0);
}

/* PANEL queries of one KV head, one in each lane: a softmax goes down the lanes, and both products are those of
 * small matrices. The queries of a row's tokens come one after another, query i being head i % G of token i / G;
 * these are those from `first` on.
 * q, z: (T, H, D), from the first head on. cos, sin: (T, D/2). positions: (T,). keys, values: (slots, D). */
static void attend_panel(const value *q, const value *cos, const value *sin, const int64_t *positions,
                         const value *keys, const value *values, value *z, long first, long T, long H, long G,
                         long D, float scale) {
    long length = D / WORD; /* of queries and keys in words; values and their weights are words along the keys */
    float turned[PANEL * D], queries[length * PANEL], key_words[BLOCK * length], value_words[BLOCK / WORD * D];
    float scores[BLOCK * PANEL], weights[BLOCK / WORD * PANEL], sums[D * PANEL];
    float largest[PANEL], weight[PANEL], before[PANEL];
    int last[PANEL], all = INT32_MAX, S = 0; /* the last slot that each lane sees, that all see, and how many one sees */
    for (long lane = 0; lane < PANEL; lane++) {
        long i = first + lane < T * G ? first + lane : T * G - 1, t = i / G;
        rotate(q + (t * H + i % G) * D, cos + t * D / 2, sin + t * D / 2, turned + lane * D, D);
        last[lane] = positions[t];
        if (all > last[lane]) all = last[lane];
        if (S <= last[lane]) S = last[lane] + 1;
        largest[lane] = -INFINITY, weight[lane] = 0;
    }
    for (long at = 0; at < PANEL; at += LANES)
        for (long d = 0; d < D; d += LANES) {
            floats square[LANES];
            for (long i = 0; i < LANES; i++) square[i] = load(turned + (at + i) * D + d);
            transpose(square);
            for (long i = 0; i < LANES; i += WORD)
                store(queries + (d + i) / WORD * PANEL + at, rounded(square[i], square[i + WORD - 1]));
        }
    memset(sums, 0, sizeof sums);
    for (int start = 0; start < S; start += BLOCK) {
        int n = S - start < BLOCK ? S - start : BLOCK;
        const value *kb = keys + start * D, *vb = values + start * D;
        for (long i = 0; i < n * length; i++) key_words[i] = word(kb[i * WORD], kb[i * WORD + WORD - 1]);
        for (int s = 0; s < n; s += WORD) {
            long next = s + WORD - 1 < n ? D * (WORD - 1) : 0; /* the last one may be without another */
            for (long d = 0; d < D; d++) value_words[s / WORD * D + d] = word(vb[s * D + d], vb[s * D + d + next]);
        }
        memset(scores, 0, sizeof scores);
        for (long s = 0; s < n; s += TILE)
            add_product(key_words + s * length, length, 1, queries, scores + s * PANEL, PANEL, length, NULL, 1);
        n = (n + WORD - 1) / WORD * WORD;
        if (start + n > all + 1)
            for (int s = 0; s < n; s++)
                for (long lane = 0; lane < PANEL; lane++)
                    if (start + s > last[lane]) scores[s * PANEL + lane] = -INFINITY;
        memcpy(before, largest, sizeof before);
        for (int s = 0; s < n; s++)
            for (long lane = 0; lane < PANEL; lane++) {
                float score = scores[s * PANEL + lane] * scale;
                scores[s * PANEL + lane] = score;
                largest[lane] = score > largest[lane] ? score : largest[lane];
            }
        for (long at = 0; at < PANEL; at += LANES) {
            floats top = load(largest + at), factor = exponentials(load(before + at) - top), added = {0};
            for (int s = 0; s < n; s += WORD) {
                floats p[WORD];
                for (int i = 0; i < WORD; i++) {
                    p[i] = exponentials(load(scores + (s + i) * PANEL + at) - top);
                    added += p[i];
                }
                store(weights + s / WORD * PANEL + at, rounded(p[0], p[WORD - 1]));
            }
            store(before + at, factor);
            store(weight + at, load(weight + at) * factor + added);
        }
        for (long d = 0; d < D; d++)
            for (long lane = 0; lane < PANEL; lane++) sums[d * PANEL + lane] *= before[lane];
        for (long d = 0; d < D; d += TILE)
            add_product(value_words + d, 1, D, weights, sums + d * PANEL, PANEL, n / WORD, NULL, 1);
    }
    for (long lane = 0; lane < PANEL; lane++) weight[lane] = 1 / weight[lane];
    for (long at = 0; at < PANEL; at += LANES)
        for (long d = 0; d < D; d += LANES) {
            floats square[LANES];
            for (long i = 0; i < LANES; i++) square[i] = load(sums + (d + i) * PANEL + at) * load(weight + at);
            transpose(square);
            for (long lane = at, i = first + at; lane < at + LANES && i < T * G; lane++, i++)
                for (long l = 0; l < LANES; l++)
                    z[(i / G * H + i % G) * D + d + l] = narrow(last[lane] < 0 ? 0 : square[lane - at][l]);
        }
}

/* Whether n positions have slots; -1 is padding. */
static int within(const int64_t *positions, long n, long slots) {
    for (long i = 0; i < n; i++)
        if (positions[i] < -1 || positions[i] >= slots) return 0;
    return 1;
}

/* Attention of T tokens in each of B rows: turn their queries and keys, store their keys and values in the slots
 * of their positions, and let each attend to the slots up to its own. A position of -1 is padding: it stores
 * nothing and gets zeros. Nothing is computed for tokens before the one numbered `first`.
 *
 * q: (B, T, H, D), k, v: (B, T, K, D), before RoPE; D a multiple of 16. cos, sin: (B, T, D/2). positions: (B, T).
 * keys, values: (B, K, slots, D). z: (B, T, H, D). Returns 0 and does nothing if a position has no slot. */
int attend(const value *q, const value *k, const value *v, const value *cos, const value *sin,
            const int64_t *positions, value *keys, value *values, value *z, long B, long T, long first, long H,
            long K, long D, long slots, float scale) {
    if (!within(positions, B * T, slots)) return 0;
    long G = H / K;
#pragma omp parallel if (B * T != 1 || positions[0] >= MANY_KEYS)
    {
#pragma omp for schedule(static)
        for (long bt = 0; bt < B * T; bt++)
            for (long g = 0; g < K && positions[bt] >= 0; g++) {
                float turned[D];
                long slot = ((bt / T * K + g) * slots + positions[bt]) * D;
                rotate(k + (bt * K + g) * D, cos + bt * D / 2, sin + bt * D / 2, turned, D);
                for (long i = 0; i < D; i++) keys[slot + i] = narrow(turned[i]);
                memcpy(values + slot, v + (bt * K + g) * D, D * sizeof(value));
            }
        long asked = T - first, tasks = T > FEW ? (asked * G + PANEL - 1) / PANEL : asked; /* for each KV head */
#pragma omp for schedule(dynamic)
        for (long task = 0; task < B * K * tasks; task++) { /* in this order the next one needs the same keys */
            long b = task / tasks / K, g = task / tasks % K, head = (b * T * H + g * G) * D;
            const value *kg = keys + (b * K + g) * slots * D, *vg = values + (b * K + g) * slots * D;
            const value *cos_b = cos + b * T * D / 2, *sin_b = sin + b * T * D / 2;
            if (T > FEW) {
                attend_panel(q + head, cos_b, sin_b, positions + b * T, kg, vg, z + head,
                             first * G + task % tasks * PANEL, T, H, G, D, scale);
                continue;
            }
            long t = first + task % tasks, S = positions[b * T + t] + 1;
            value *zt = z + head + t * H * D;
            float turned[G * D];
            for (long h = 0; h < G; h++)
                rotate(q + head + (t * H + h) * D, cos_b + t * D / 2, sin_b + t * D / 2, turned + h * D, D);
            switch (D) { /* a constant in each, to unroll loops by */
                case 64: attend_head(turned, kg, vg, zt, G, 64, S, scale); break;
                case 128: attend_head(turned, kg, vg, zt, G, 128, S, scale); break;
                default: attend_head(turned, kg, vg, zt, G, D, S, scale);
            }
        }
    }
    return 1;
}

typedef void matvec(const void *w, const uint16_t *scales, const value *x, value *y, long rows, long cols, long n);
typedef void matmul(const void *const *w, const uint16_t *const *scales, const value *x, float *packed,
                    value *const *y, const long *rows, long count, long cols, long n);

/* y = W x for each of `count` matrices, by the one of the two that is given. packed: room for what `many` packs. */
static void multiply(matvec *few, matmul *many, const void *const *w, const uint16_t *const *scales, const value *x,
                     value *const *y, float *packed, const long *rows, long count, long cols, long n) {
    if (many) many(w, scales, x, packed, y, rows, count, cols, n);
    for (long i = 0; i < count && few; i++) few(w[i], scales[i], x, y[i], rows[i], cols, n);
}

/* y = a + b, n values. */
static void add(const value *a, const value *b, value *y, long n) {
#pragma omp parallel for schedule(static) if (n >= MANY)
    for (long start = 0; start < n; start += PART)
        for (long i = start; i < (start + PART < n ? start + PART : n); i++) y[i] = narrow(wide(a[i]) + wide(b[i]));
}

/* A decoder layer for T tokens in each of B rows. few, many: of matvec.c and matmul.c, one of them NULL.
 * x: (B, T, C). y: likewise, or where B is 1, of the tokens from `first` on; else that is 0. room: for C and the
 * larger of 2 H D + 2 K D and 2 F values of each token. packed: as above, for the largest of C, H D and F. norms:
 * two, (C,). w, scales: of q, k, v, o, gate, up, down. The rest, and the result, as in `attend`. */
int layer(matvec *few, matmul *many, const value *x, value *y, value *room, float *packed,
          const value *const *norms, const void *const *w, const uint16_t *const *scales, const value *cos,
          const value *sin, const int64_t *positions, value *keys, value *values, long B, long T, long first,
          long C, long H, long K, long D, long F, long slots, const float *eps, float scale) {
    long n = B * T;
    if (!within(positions, n, slots)) return 0;
    value *normed = room, *added = room, *q = room + n * C, *z = q + n * H * D, *k = z + n * H * D, *v = k + n * K * D,
          *gate = q, *up = gate + n * F; /* what is read no more makes room for others */

    rms_norm(x, norms[0], normed, n, C, eps[0]);
    value *const qkv[] = {q, k, v}, *asked = q + first * H * D;
    const long sizes[] = {H * D, K * D, K * D}, apart = first > 0; /* few queries, and all keys and values */
    multiply(few, many, w + apart, scales + apart, normed, qkv + apart, packed, sizes + apart, 3 - apart, C, n);
    if (apart) multiply(few, many, w, scales, normed + first * C, &asked, packed, sizes, 1, C, n - first);
    attend(q, k, v, cos, sin, positions, keys, values, z, B, T, first, H, K, D, slots, scale);
    n -= first, x += first * C, z += first * H * D;
    multiply(few, many, w + 3, scales + 3, z, &added, packed, &C, 1, H * D, n);
    add(x, added, y, n * C);

    rms_norm(y, norms[1], normed, n, C, eps[1]);
    multiply(few, many, w + 4, scales + 4, normed, (value *[]){gate, up}, packed, (long[]){F, F}, 2, C, n);
    swiglu(gate, up, gate, n * F);
    multiply(few, many, w + 6, scales + 6, gate, &added, packed, &C, 1, F, n);
    add(y, added, y, n * C);
    return 1;
}
