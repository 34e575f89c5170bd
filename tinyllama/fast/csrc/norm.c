/* RMSNorm: y = x / rms(x) * weight for each row. `rms_norm_plain` says what it computes.
 *
 * PyTorch takes six operations for it, and starting them costs a token of a small model a tenth of its time.
 * Compiled once for each dtype of x, weight and y; see build.py. Arithmetic is float32.
 */

#include <math.h>

#include "values.h"

enum { MANY = 16384 }; /* values from which on a second thread helps */

/* x, y: (rows, cols). weight: (cols,). */
void rms_norm_plain(const value *x, const value *weight, value *y, long rows, long cols, float eps) {
    for (long r = 0; r < rows; r++) {
        double squares = 0;
        for (long c = 0; c < cols; c++) squares += (double)wide(x[r * cols + c]) * wide(x[r * cols + c]);
        float scale = 1 / sqrt(squares / cols + eps);
        for (long c = 0; c < cols; c++)
            y[r * cols + c] = narrow(wide(weight[c]) * wide(narrow(wide(x[r * cols + c]) * scale)));
    }
}

/* The same as `rms_norm_plain`, with float32 sums. */
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
