/* Every product and the norm on random shapes, fast and plain: ends with status 1 where they differ.
 *
 * Memory is allocated to the byte, so that AddressSanitizer sees what is read or written beyond it.
 */

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "weights.h"

void matvec(const stored *, const uint16_t *, const value *, value *, long, long, long);
void matvec_plain(const stored *, const uint16_t *, const value *, value *, long, long, long);
void matmul(const stored *, const uint16_t *, const value *, float *, value *, long, long, long);
long packed_size(long, long);
void rms_norm(const value *, const value *, value *, long, long, float);
void rms_norm_plain(const value *, const value *, value *, long, long, float);

static float random_number(void) { return rand() / (float)RAND_MAX * 2 - 1; }

static stored random_weight(void) {
#if defined(FLOAT32)
    return random_number();
#elif defined(INT8)
    return rand() % 255 - 127;
#else /* sign and mantissa: 0.5 to 1 in float16, and a small number in bfloat16 */
    return 0x3800 | (rand() & 0x83ff);
#endif
}

/* Relative RMS difference. */
static double difference(const value *got, const value *expected, long n) {
    double error = 0, size = 1e-30;
    for (long i = 0; i < n; i++) {
        error += pow(wide(got[i]) - wide(expected[i]), 2);
        size += pow(wide(expected[i]), 2);
    }
    return sqrt(error / size);
}

static double trial(long rows, long cols, long n) {
    stored *w = malloc(rows * cols * sizeof *w);
    uint16_t *scales = malloc(rows * cols / GROUP * sizeof *scales);
    value *x = malloc(n * cols * sizeof *x), *y = malloc(n * rows * sizeof *y), *expected = malloc(n * rows * sizeof *y);
    value *normed = malloc(n * cols * sizeof *x), *plain = malloc(n * cols * sizeof *x);
    float *packed = malloc(packed_size(cols, n) * sizeof *packed);
    for (long i = 0; i < rows * cols; i++) w[i] = random_weight();
    for (long i = 0; i < rows * cols / GROUP; i++) scales[i] = 0x3c00 + rand() % 64; /* about 0.01, in bfloat16 */
    for (long i = 0; i < n * cols; i++) x[i] = narrow(random_number());
#ifdef INT8
    const uint16_t *given = scales;
#else
    const uint16_t *given = NULL;
#endif
    matvec_plain(w, given, x, expected, rows, cols, n);
    matvec(w, given, x, y, rows, cols, n);
    double worst = difference(y, expected, n * rows);
    matmul(w, given, x, packed, y, rows, cols, n);
    worst = fmax(worst, difference(y, expected, n * rows));
    rms_norm(x, x, normed, n, cols, 1e-5f); /* by the first row as weight */
    rms_norm_plain(x, x, plain, n, cols, 1e-5f);
    worst = fmax(worst, difference(normed, plain, n * cols));
    free(w), free(scales), free(x), free(y), free(expected), free(normed), free(plain), free(packed);
    return worst;
}

int main(void) {
    double worst = 0;
    for (int i = 0; i < 60; i++)
        worst = fmax(worst, trial(1 + rand() % 150, GROUP * (1 + rand() % (i % 8 ? 5 : 30)), 1 + rand() % (i % 3 ? 5 : 70)));
    printf("%.1e\n", worst);
    return worst > (sizeof(value) == 2 ? 4e-3 : 1e-5);
}
