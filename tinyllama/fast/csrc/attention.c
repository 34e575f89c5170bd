/* softmax(q k^T * scale) v with a causal mask, for the last T of S tokens. `attend_plain` says what it computes.
 *
 * Compiled once for each dtype of q, k, v and z; see build.py. Arithmetic is float32.
 */

#include <math.h>

#include "team.h"
#include "values.h"

enum {
    BLOCK = 64,      /* keys whose scores are held at once */
    FEW = 32,        /* most tokens of a row that are computed one by one: each has the same bits alone */
    MANY_KEYS = 128, /* keys from which on a second thread helps a single token */
};

/* Where the numbers of a tensor (batch, heads, tokens, D) lie; those of a head's token follow each other. */
struct strides {
    long batch, head, token;
};

/* q, z: (B, H, T, D). k, v: (B, K, S, D). Token t of T stands at S - T + t and sees the keys up to there. */
void attend_plain(const value *q, const value *k, const value *v, value *z, const struct strides *at, long B, long H,
                  long K, long T, long S, long D, float scale) {
    for (long b = 0; b < B; b++)
        for (long h = 0; h < H; h++)
            for (long t = 0; t < T; t++) {
                const value *qt = q + b * at[0].batch + h * at[0].head + t * at[0].token;
                const value *keys = k + b * at[1].batch + h / (H / K) * at[1].head;
                const value *values = v + b * at[2].batch + h / (H / K) * at[2].head;
                float largest = -INFINITY, weight = 0, sums[D];
                memset(sums, 0, sizeof sums);
                for (int pass = 0; pass < 2; pass++) /* the largest score first, so that no exponential overflows */
                    for (long s = 0; s <= S - T + t; s++) {
                        float score = 0;
                        for (long d = 0; d < D; d++) score += wide(qt[d]) * wide(keys[s * at[1].token + d]);
                        score *= scale;
                        if (pass == 0) {
                            largest = score > largest ? score : largest;
                            continue;
                        }
                        float p = expf(score - largest);
                        weight += p;
                        for (long d = 0; d < D; d++) sums[d] += p * wide(values[s * at[2].token + d]);
                    }
                value *zt = z + b * at[3].batch + h * at[3].head + t * at[3].token;
                for (long d = 0; d < D; d++) zt[d] = narrow(sums[d] / weight);
            }
}

typedef float four __attribute__((vector_size(16)));
typedef int32_t order __attribute__((vector_size(16)));

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

/* The same for a vector, but 0 below -87. */
INLINE floats exponentials(floats x) {
    floats shifted = x * 1.44269504f + 12582912;
    floats n = shifted - 12582912;
    floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    floats p = 1.3981999e-3f * r + 8.3334519e-3f;
    p = ((((p * r + 4.1665796e-2f) * r + 1.6666666e-1f) * r + 0.5f) * r + 1) * r + 1;
    p *= (floats)(((bits)shifted + 127) << 23);
    return (floats)((places)p & ~(x < -87));
}

/* The sum over the lanes of each of four vectors. */
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

/* Prefetch rows s to s + count of keys or values, this head's share of each; into the second cache, see matvec.c. */
INLINE void ask(const value *p, long s, long count, long stride, long from, long to) {
    for (long r = s; r < s + count; r++)
        for (long i = from; i < to; i += LINE / sizeof(value)) __builtin_prefetch(p + r * stride + i, 0, 2);
}

/* The G query heads of one token that share a KV head, by blocks of keys, with a softmax that is corrected as
 * blocks come (Milakov & Gimelshein 2018, arXiv:1805.02867). The next block is prefetched meanwhile.
 * q, z: (G, D). keys, values: (S, D). D is a constant at each call. */
INLINE void attend_head(const value *q, const value *keys, const value *values, value *z, const struct strides *at,
                        long G, long D, long S, float scale) {
    long vectors = D / LANES, share = D / G; /* of a row, for each head to prefetch */
    floats sums[G * vectors];
    float largest[G], weight[G], heads[G * D];
    memset(sums, 0, sizeof sums);
    for (long h = 0; h < G; h++) {
        largest[h] = -INFINITY, weight[h] = 0;
        for (long d = 0; d < D; d++) heads[h * D + d] = wide(q[h * at[0].head + d]);
    }
    for (long start = 0; start < S; start += BLOCK) {
        long n = S - start < BLOCK ? S - start : BLOCK, k_row = at[1].token, v_row = at[2].token;
        const value *next_k = keys + (start + BLOCK) * k_row, *next_v = values + (start + BLOCK) * v_row;
#ifdef X_FLOAT32
        const float *kb = keys + start * k_row, *vb = values + start * v_row;
#else
        float kb[BLOCK * D], vb[BLOCK * D];
        for (long s = 0; s < n; s++)
            for (long d = 0; d < D; d++) {
                kb[s * D + d] = wide(keys[(start + s) * k_row + d]);
                vb[s * D + d] = wide(values[(start + s) * v_row + d]);
            }
        k_row = v_row = D;
#endif
        for (long h = 0; h < G; h++) {
            floats qh[vectors], sum[vectors];
            float p[BLOCK], top = largest[h], added = 0; /* scores, then e^(score - top) */
            for (long i = 0; i < vectors; i++) qh[i] = load(heads + h * D + i * LANES);
            for (long s = 0; s < n; s += 4) {
                ask(next_k, s, 4, at[1].token, h * share, (h + 1) * share);
                floats dots[4];
                for (long j = 0; j < 4; j++) {
                    const float *key = kb + (s + j < n ? s + j : s) * k_row;
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
            for (long s = 0; s < n; s += 2) { /* two at a time: half as many sums wait for each other */
                ask(next_v, s, 2, at[2].token, h * share, (h + 1) * share);
                const float *v0 = vb + s * v_row, *v1 = s + 1 < n ? v0 + v_row : v0;
                for (long i = 0; i < vectors; i++)
                    sum[i] += p[s] * load(v0 + i * LANES) + p[s + 1] * load(v1 + i * LANES);
            }
            for (long i = 0; i < vectors; i++) sums[h * vectors + i] = sum[i];
        }
    }
    for (long h = 0; h < G; h++)
        for (long d = 0; d < D; d++)
            z[h * at[3].head + d] = narrow(sums[h * vectors + d / LANES][d % LANES] / weight[h]);
}

/* PANEL queries of one KV head, one in each lane: the softmax goes down the lanes, and both products are those of
 * small matrices. Query i is head i % G of token i / G; these are those from `first` on.
 * q, z: (G, T, D). keys, values: (S, D). */
static void attend_panel(const value *q, const value *keys, const value *values, value *z, const struct strides *at,
                         long first, long T, long G, long D, long S, float scale) {
    long length = D / WORD; /* of queries and keys in words; values and their weights are words along the keys */
    float queries[length * PANEL], key_words[BLOCK * length], value_words[BLOCK / WORD * D];
    float scores[BLOCK * PANEL], weights[BLOCK / WORD * PANEL], sums[D * PANEL];
    float largest[PANEL], weight[PANEL], before[PANEL];
    int last[PANEL], all = S - T + first / G, seen = 0; /* the last key of each lane; of the first; how many in all */
    for (long lane = 0; lane < PANEL; lane++) {
        long i = first + lane < T * G ? first + lane : T * G - 1;
        const value *head = q + i % G * at[0].head + i / G * at[0].token;
        for (long c = 0; c < length; c++) queries[c * PANEL + lane] = word(head[c * WORD], head[c * WORD + WORD - 1]);
        last[lane] = S - T + i / G;
        if (seen <= last[lane]) seen = last[lane] + 1;
        largest[lane] = -INFINITY, weight[lane] = 0;
    }
    memset(sums, 0, sizeof sums);
    for (int start = 0; start < seen; start += BLOCK) {
        int n = seen - start < BLOCK ? seen - start : BLOCK;
        for (long s = 0; s < n; s++) {
            const value *key = keys + (start + s) * at[1].token;
            for (long c = 0; c < length; c++) key_words[s * length + c] = word(key[c * WORD], key[c * WORD + WORD - 1]);
        }
        for (int s = 0; s < n; s += WORD) {
            const value *v0 = values + (start + s) * at[2].token;
            const value *v1 = s + WORD - 1 < n ? v0 + (WORD - 1) * at[2].token : v0; /* the last may have no partner */
            for (long d = 0; d < D; d++) value_words[s / WORD * D + d] = word(v0[d], v1[d]);
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
        for (long i = 0; i < PANEL; i += LANES) {
            floats top = load(largest + i), factor = exponentials(load(before + i) - top), added = {0};
            for (int s = 0; s < n; s += WORD) {
                floats p[WORD];
                for (int j = 0; j < WORD; j++) {
                    p[j] = exponentials(load(scores + (s + j) * PANEL + i) - top);
                    added += p[j];
                }
                store(weights + s / WORD * PANEL + i, rounded(p[0], p[WORD - 1]));
            }
            store(before + i, factor);
            store(weight + i, load(weight + i) * factor + added);
        }
        for (long d = 0; d < D; d++)
            for (long lane = 0; lane < PANEL; lane++) sums[d * PANEL + lane] *= before[lane];
        for (long d = 0; d < D; d += TILE)
            add_product(value_words + d, 1, D, weights, sums + d * PANEL, PANEL, n / WORD, NULL, 1);
    }
    for (long lane = 0; lane < PANEL; lane++) weight[lane] = 1 / weight[lane];
    for (long i = 0; i < PANEL; i += LANES)
        for (long d = 0; d < D; d += LANES) {
            floats square[LANES];
            for (long l = 0; l < LANES; l++) square[l] = load(sums + (d + l) * PANEL + i) * load(weight + i);
            transpose(square);
            for (long lane = i, query = first + i; lane < i + LANES && query < T * G; lane++, query++) {
                value *zt = z + query % G * at[3].head + query / G * at[3].token + d;
                for (long l = 0; l < LANES; l++) zt[l] = narrow(square[lane - i][l]);
            }
        }
}

/* The same as `attend_plain`, D a multiple of 16. A single token has the same bits alone as among up to FEW. */
void attend(const value *q, const value *k, const value *v, value *z, const struct strides *at, long B, long H, long K,
            long T, long S, long D, float scale) {
    long G = H / K, tasks = T > FEW ? (T * G + PANEL - 1) / PANEL : T; /* for each KV head of each row */
    struct team team = gather();
    if (B * T == 1 && S < MANY_KEYS) team.threads = 1;
#pragma omp parallel num_threads(team.threads)
    {
#pragma omp for schedule(dynamic) nowait
        for (long task = 0; task < B * K * tasks; task++) { /* in this order the next task needs the same keys */
            long b = task / tasks / K, g = task / tasks % K, t = task % tasks;
            const value *qg = q + b * at[0].batch + g * G * at[0].head, *kg = k + b * at[1].batch + g * at[1].head;
            const value *vg = v + b * at[2].batch + g * at[2].head;
            value *zg = z + b * at[3].batch + g * G * at[3].head;
            if (T > FEW) {
                attend_panel(qg, kg, vg, zg, at, t * PANEL, T, G, D, S, scale);
                continue;
            }
            const value *qt = qg + t * at[0].token;
            value *zt = zg + t * at[3].token;
            long seen = S - T + t + 1;
            switch (D) { /* a constant in each, so that the compiler unrolls loops */
                case 64: attend_head(qt, kg, vg, zt, at, G, 64, seen, scale); break;
                case 128: attend_head(qt, kg, vg, zt, at, G, 128, seen, scale); break;
                default: attend_head(qt, kg, vg, zt, at, G, D, seen, scale);
            }
        }
        arrive(&team);
    }
    dismiss(&team);
}
