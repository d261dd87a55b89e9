/* Elementwise parts of the world model's layers, each in one pass over a row that stays in the
 * core's first cache: LayerNorm with Mish or SimNorm, and categorical regression over bins.
 *
 * All arrays are contiguous float32, a "row" is one vector of the last axis. Reductions over rows go through one partial sum a thread, added in the order of the threads, so
 * that a result depends on nothing but the input and the number of threads.
 *
 * Only simd reductions are allowed to reassociate; NaN and infinity pass through everywhere.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

enum { ACTIVATION_NONE = 0, ACTIVATION_MISH = 1, ACTIVATION_SIMNORM = 2 };

#define MISH_CLAMP 20.0f /* from here on mish(x) = x in float32, and squares stay finite */

typedef union {
    float f;
    int32_t i;
} bits32;

/* e^x to 1 ulp or two: x = n ln 2 + r, a polynomial in r, n added to the exponent. */
static inline float exp_f(float x) {
    const float magic = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer */
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;
    bits32 shifted = {.f = x * 1.44269504f + magic};
    float n = shifted.f - magic;
    float r = x - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    bits32 scale = {.i = (shifted.i - 0x4B400000 + 127) << 23};
    return p * scale.f;
}

/* With u = e^h and w = u (u + 2): tanh(softplus(h)) = w / (w + 2). */
static inline float mish_f(float h) {
    float u = exp_f(h > MISH_CLAMP ? MISH_CLAMP : h);
    float w = u * (u + 2.0f);
    return h * (w / (w + 2.0f));
}

static inline float mish_slope_f(float h) {
    float u = exp_f(h > MISH_CLAMP ? MISH_CLAMP : h);
    float w = u * (u + 2.0f);
    float inverse = 1.0f / (w + 2.0f);
    return w * inverse + h * 4.0f * u * (u + 1.0f) * inverse * inverse;
}

static inline void simnorm_groups(float *restrict y, int64_t cols, int64_t simplex) {
    for (int64_t j = 0; j < cols; j += simplex) {
        float top = y[j];
        for (int64_t k = 1; k < simplex; k++) top = y[j + k] > top ? y[j + k] : top;
        for (int64_t k = 0; k < simplex; k++) y[j + k] -= top;
    }
#pragma omp simd
    for (int64_t j = 0; j < cols; j++) y[j] = exp_f(y[j]);
    for (int64_t j = 0; j < cols; j += simplex) {
        float sum = 0.0f;
        for (int64_t k = 0; k < simplex; k++) sum += y[j + k];
        float inverse = 1.0f / sum;
        for (int64_t k = 0; k < simplex; k++) y[j + k] *= inverse;
    }
}

static void simnorm_row(float *y, int64_t cols, int64_t simplex) {
    if (simplex == 8) simnorm_groups(y, cols, 8); /* the paper's size: unrolled */
    else simnorm_groups(y, cols, simplex);
}

static inline void simnorm_grad_groups(const float *restrict grad, const float *restrict y,
                                       float *restrict out, int64_t cols, int64_t simplex) {
    for (int64_t j = 0; j < cols; j += simplex) { /* d softmax: y (g - sum g y) */
        float dot = 0.0f;
        for (int64_t k = 0; k < simplex; k++) dot += grad[j + k] * y[j + k];
        for (int64_t k = 0; k < simplex; k++) out[j + k] = y[j + k] * (grad[j + k] - dot);
    }
}

/* y = activation(LayerNorm(x * mask)). y may be x. mask and statistics may be null; statistics are
 * the means, then the reciprocal deviations, [2, rows]. */
void norm_forward(const float *x, const float *mask, const float *gain, const float *shift,
                  float *y, float *statistics, int64_t rows, int64_t cols, float eps,
                  int64_t activation, int64_t simplex, int64_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t i = 0; i < rows; i++) {
        const float *xi = x + i * cols;
        float *yi = y + i * cols;
        if (mask) {
            const float *mi = mask + i * cols;
#pragma omp simd
            for (int64_t j = 0; j < cols; j++) yi[j] = xi[j] * mi[j];
            xi = yi;
        }
        float sum = 0.0f, squares = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (int64_t j = 0; j < cols; j++) sum += xi[j];
        float mean = sum / (float)cols;
#pragma omp simd reduction(+ : squares)
        for (int64_t j = 0; j < cols; j++) squares += (xi[j] - mean) * (xi[j] - mean);
        float rstd = 1.0f / sqrtf(squares / (float)cols + eps);
        if (statistics) {
            statistics[i] = mean;
            statistics[rows + i] = rstd;
        }
        if (activation == ACTIVATION_MISH) {
#pragma omp simd
            for (int64_t j = 0; j < cols; j++)
                yi[j] = mish_f((xi[j] - mean) * rstd * gain[j] + shift[j]);
        } else {
#pragma omp simd
            for (int64_t j = 0; j < cols; j++) yi[j] = (xi[j] - mean) * rstd * gain[j] + shift[j];
            if (activation == ACTIVATION_SIMNORM) simnorm_row(yi, cols, simplex);
        }
    }
}

/* Gradients of norm_forward by its input, and by gain, shift and a bias added in front of it (the
 * sum over rows of the first), [3, cols]. sums: scratch, [threads, 3, cols]. */
void norm_backward(const float *grad, const float *x, const float *mask, const float *y,
                   const float *gain, const float *shift, const float *statistics,
                   float *grad_x, float *grad_parameters, float *sums, int64_t rows,
                   int64_t cols, int64_t activation, int64_t simplex, int64_t threads) {
    memset(sums, 0, sizeof(float) * (size_t)(threads * 3 * cols));
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t thread = 0; thread < threads; thread++) {
        float *dgain = sums + thread * 3 * cols, *dshift = dgain + cols, *dbias = dshift + cols;
        int64_t begin = rows * thread / threads, end = rows * (thread + 1) / threads;
        for (int64_t i = begin; i < end; i++) {
            const float *xi = x + i * cols, *di = grad + i * cols;
            const float *mi = mask ? mask + i * cols : 0;
            float *out = grad_x + i * cols;
            float mean = statistics[i], rstd = statistics[rows + i], s1 = 0.0f, s2 = 0.0f;
            if (activation == ACTIVATION_SIMNORM) {
                if (simplex == 8) simnorm_grad_groups(di, y + i * cols, out, cols, 8);
                else simnorm_grad_groups(di, y + i * cols, out, cols, simplex);
                di = out;
            }
#define PASS(INPUT, SLOPE)                                                                        \
    _Pragma("omp simd reduction(+ : s1, s2)") for (int64_t j = 0; j < cols; j++) {                \
        float hat = ((INPUT)-mean) * rstd;                                                        \
        float h = hat * gain[j] + shift[j];                                                          \
        (void)h;                                                                                  \
        float d = di[j] * (SLOPE);                                                                \
        dgain[j] += d * hat;                                                                      \
        dshift[j] += d;                                                                           \
        d *= gain[j];                                                                             \
        s1 += d;                                                                                  \
        s2 += d * hat;                                                                            \
        out[j] = d;                                                                               \
    }
            if (activation == ACTIVATION_MISH) {
                if (mi) {
                    PASS(xi[j] * mi[j], mish_slope_f(h))
                } else {
                    PASS(xi[j], mish_slope_f(h))
                }
            } else if (mi) {
                PASS(xi[j] * mi[j], 1.0f)
            } else {
                PASS(xi[j], 1.0f)
            }
            s1 /= (float)cols;
            s2 /= (float)cols;
            if (mi) {
#pragma omp simd
                for (int64_t j = 0; j < cols; j++) {
                    float hat = (xi[j] * mi[j] - mean) * rstd;
                    out[j] = rstd * (out[j] - s1 - hat * s2) * mi[j];
                    dbias[j] += out[j];
                }
            } else {
#pragma omp simd
                for (int64_t j = 0; j < cols; j++) {
                    float hat = (xi[j] - mean) * rstd;
                    out[j] = rstd * (out[j] - s1 - hat * s2);
                    dbias[j] += out[j];
                }
            }
        }
    }
    for (int64_t j = 0; j < 3 * cols; j++) {
        float total = 0.0f;
        for (int64_t thread = 0; thread < threads; thread++) total += sums[thread * 3 * cols + j];
        grad_parameters[j] = total;
    }
}

static inline float row_max(const float *restrict x, int64_t cols) {
    float top = x[0];
#pragma omp simd reduction(max : top)
    for (int64_t j = 0; j < cols; j++) top = x[j] > top ? x[j] : top;
    return top;
}

/* Mean of the bins under softmax(logits), and the sum of the exponentials. */
static inline float expected_bin(const float *restrict logits, const float *restrict bins,
                                 int64_t cols, float top, float *sum_out) {
    float sum = 0.0f, weighted = 0.0f;
#pragma omp simd reduction(+ : sum, weighted)
    for (int64_t j = 0; j < cols; j++) {
        float e = exp_f(logits[j] - top);
        sum += e;
        weighted += e * bins[j];
    }
    *sum_out = sum;
    return weighted / sum;
}

/* symexp of the expected bin. */
void two_hot_inverse_forward(const float *logits, const float *bins, float *out, int64_t rows,
                             int64_t cols, int64_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t i = 0; i < rows; i++) {
        const float *li = logits + i * cols;
        float sum;
        float mean = expected_bin(li, bins, cols, row_max(li, cols), &sum);
        out[i] = copysignf(expm1f(fabsf(mean)), mean);
    }
}

void two_hot_inverse_backward(const float *grad, const float *logits, const float *bins,
                              float *grad_logits, int64_t rows, int64_t cols, int64_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t i = 0; i < rows; i++) {
        const float *li = logits + i * cols;
        float *gi = grad_logits + i * cols;
        float top = row_max(li, cols), sum;
        float mean = expected_bin(li, bins, cols, top, &sum);
        float scale = grad[i] * expf(fabsf(mean)) / sum; /* d symexp(m) / dm = e^|m| */
#pragma omp simd
        for (int64_t j = 0; j < cols; j++)
            gi[j] = scale * exp_f(li[j] - top) * (bins[j] - mean);
    }
}

/* log sum exp(logits) - sum_k target_k logits_k for the two-hot target at a position counted in
 * bins from the first, in [0, cols - 1]; targets repeat every target_rows rows. */
void two_hot_cross_entropy_forward(const float *logits, const float *position, float *out,
                                   float *log_sum, int64_t rows, int64_t target_rows,
                                   int64_t cols, int64_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t i = 0; i < rows; i++) {
        const float *li = logits + i * cols;
        float top = row_max(li, cols), sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (int64_t j = 0; j < cols; j++) sum += exp_f(li[j] - top);
        float p = position[i % target_rows];
        float total = top + logf(sum);
        if (log_sum) log_sum[i] = total;
        if (!(p >= 0.0f && p <= (float)(cols - 1))) { /* NaN */
            out[i] = NAN;
            continue;
        }
        int64_t low = (int64_t)p;
        if (low > cols - 2) low = cols - 2;
        float share = p - (float)low;
        out[i] = total - (1.0f - share) * li[low] - share * li[low + 1];
    }
}

void two_hot_cross_entropy_backward(const float *grad, const float *logits,
                                    const float *position, const float *log_sum,
                                    float *grad_logits, int64_t rows, int64_t target_rows,
                                    int64_t cols, int64_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t i = 0; i < rows; i++) {
        const float *li = logits + i * cols;
        float *gi = grad_logits + i * cols;
        float g = grad[i], total = log_sum[i], p = position[i % target_rows];
#pragma omp simd
        for (int64_t j = 0; j < cols; j++) gi[j] = g * exp_f(li[j] - total);
        if (!(p >= 0.0f && p <= (float)(cols - 1))) continue;
        int64_t low = (int64_t)p;
        if (low > cols - 2) low = cols - 2;
        float share = p - (float)low;
        gi[low] -= g * (1.0f - share);
        gi[low + 1] -= g * share;
    }
}

/* GELU in its tanh approximation of a + b: x sigmoid(2 c (x + 0.044715 x^3)), c = sqrt(2 / pi).
 * Rows of b lie b_stride apart. */
void gelu_sum_forward(const float *a, const float *b, float *y, int64_t rows, int64_t cols,
                      int64_t b_stride, int64_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t i = 0; i < rows; i++) {
        const float *ai = a + i * cols, *bi = b + i * b_stride;
        float *yi = y + i * cols;
#pragma omp simd
        for (int64_t j = 0; j < cols; j++) {
            float x = ai[j] + bi[j];
            float inner = x * (1.5957691216f + 0.0713548163f * x * x);
            yi[j] = x / (1.0f + exp_f(-inner));
        }
    }
}

void gelu_sum_backward(const float *grad, const float *a, const float *b, float *grad_x,
                       int64_t rows, int64_t cols, int64_t b_stride, int64_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t i = 0; i < rows; i++) {
        const float *ai = a + i * cols, *bi = b + i * b_stride, *di = grad + i * cols;
        float *out = grad_x + i * cols;
#pragma omp simd
        for (int64_t j = 0; j < cols; j++) {
            float x = ai[j] + bi[j];
            float s = 1.0f / (1.0f + exp_f(-x * (1.5957691216f + 0.0713548163f * x * x)));
            out[j] = di[j] * (s + x * s * (1.0f - s) * (1.5957691216f + 0.2140644488f * x * x));
        }
    }
}
