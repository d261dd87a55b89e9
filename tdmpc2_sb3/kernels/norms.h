/* LayerNorm with Mish or SimNorm in one pass over rows that stay in the core's first cache. */

/* Mean and reciprocal deviation of a row. */
typedef struct {
    float mean, rstd;
} moments;

static inline moments row_moments(const float *x, int64_t cols, float eps) {
    float mean = sum_of(x, cols) / (float)cols;
    return (moments){mean, 1.0f / sqrtf(squares_of(x, mean, cols) / (float)cols + eps)};
}

/* y = activation(LayerNorm(x)) of a row with these moments. */
static inline void activate_row(const float *x, moments of, const float *gain, const float *shift,
                                float *y, int64_t cols, int64_t activation, int64_t simplex) {
    float mean = of.mean, rstd = of.rstd;
    if (activation == ACTIVATION_MISH) {
        int64_t begin = 0;
#if LANES >= 8
        for (int64_t next; (next = next_mish_cols(begin, cols)); begin += next)
            norm_mish(x + begin, mean, rstd, gain + begin, shift + begin, y + begin, next);
#endif
#pragma omp simd
        for (int64_t j = begin; j < cols; j++)
            y[j] = mish_f((x[j] - mean) * rstd * gain[j] + shift[j]);
        return;
    }
#pragma omp simd
    for (int64_t j = 0; j < cols; j++) y[j] = (x[j] - mean) * rstd * gain[j] + shift[j];
    if (activation == ACTIVATION_SIMNORM && simplex == 8) simnorm_eights(y, cols);
    else if (activation == ACTIVATION_SIMNORM) simnorm_groups(y, cols, simplex);
}

/* Rows that are normed together: the moments of one need not wait for the activations of another.
 */
#define NORM_ROWS 16

/* Rows begin..end of norm_forward, of x and y row floats apart. */
static inline void norm_rows(const float *x, int64_t row, const float *gain, const float *shift,
                             float *y, float *statistics, int64_t begin, int64_t end, int64_t rows,
                             int64_t cols, float eps, int64_t activation, int64_t simplex) {
    moments of[NORM_ROWS];
    for (; begin < end; begin += NORM_ROWS) {
        int64_t count = end - begin < NORM_ROWS ? end - begin : NORM_ROWS, at = begin * row;
        for (int64_t i = 0; i < count; i++)
            of[i] = row_moments(x + at + i * row, cols, eps);
        for (int64_t i = 0; statistics && i < count; i++) {
            statistics[begin + i] = of[i].mean;
            statistics[rows + begin + i] = of[i].rstd;
        }
        for (int64_t i = 0; i < count; i++)
            activate_row(x + at + i * row, of[i], gain, shift, y + at + i * row, cols, activation,
                         simplex);
    }
}

/* y = activation(LayerNorm(x)). y may be x. statistics may be null; they are the means, then the
 * reciprocal deviations, [2, rows]. */
void norm_forward(const float *x, const float *gain, const float *shift, float *y,
                  float *statistics, int64_t rows, int64_t cols, float eps, int64_t activation,
                  int64_t simplex, int64_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t t = 0; t < threads; t++)
        norm_rows(x, cols, gain, shift, y, statistics, rows * t / threads,
                  rows * (t + 1) / threads, rows, cols, eps, activation, simplex);
}

/* Gradients of rows begin..end of norm_forward, those of x and y row floats apart, by its input
 * into grad_x, which may be grad; added to sums, [3, cols], those by gain, by shift and by a bias
 * in front. */
static void norm_backward_rows(const float *grad, const float *x, const float *y, int64_t row,
                               const float *gain, const float *shift, const float *statistics,
                               float *grad_x, float *sums, int64_t begin, int64_t end,
                               int64_t rows, int64_t cols, int64_t activation, int64_t simplex) {
    float *grad_gain = sums, *grad_shift = sums + cols, *grad_bias = sums + 2 * cols;
    for (int64_t i = begin; i < end; i++) {
        const float *xi = x + i * row, *di = grad + i * cols;
        float *out = grad_x + i * cols;
        float mean = statistics[i], rstd = statistics[rows + i], s1 = 0.0f, s2 = 0.0f;
        int64_t done = 0; /* columns */
        if (activation == ACTIVATION_SIMNORM) {
            if (simplex == 8) simnorm_grad_eights(di, y + i * row, out, cols);
            else simnorm_grad_groups(di, y + i * row, out, cols, simplex);
            di = out;
        }
#define PASS(SLOPE)                                                                               \
    _Pragma("omp simd reduction(+ : s1, s2)") for (int64_t j = done; j < cols; j++) {             \
        float hat = (xi[j] - mean) * rstd;                                                        \
        float h = hat * gain[j] + shift[j];                                                       \
        (void)h;                                                                                  \
        float d = di[j] * (SLOPE);                                                                \
        grad_gain[j] += d * hat;                                                                  \
        grad_shift[j] += d;                                                                       \
        d *= gain[j];                                                                             \
        s1 += d;                                                                                  \
        s2 += d * hat;                                                                            \
        out[j] = d;                                                                               \
    }
        if (activation == ACTIVATION_MISH) {
#if LANES >= 8
            vector sum1 = {0}, sum2 = {0};
            for (int64_t next; (next = next_mish_cols(done, cols)); done += next)
                norm_mish_back(di + done, xi + done, mean, rstd, gain + done, shift + done,
                               grad_gain + done, grad_shift + done, out + done, &sum1, &sum2, next);
            s1 = lanes_added_up(sum1);
            s2 = lanes_added_up(sum2);
#endif
            PASS(mish_slope_f(h))
        } else {
            PASS(1.0f)
        }
        s1 /= (float)cols;
        s2 /= (float)cols;
        float by_distance = -rstd * rstd * s2, by_all = -rstd * s1;
#pragma omp simd
        for (int64_t j = 0; j < cols; j++) {
            out[j] = rstd * out[j] + (by_distance * (xi[j] - mean) + by_all);
            grad_bias[j] += out[j];
        }
    }
}

/* Gradients of norm_forward by its input, and by gain, shift and a bias added in front of it, [3,
 * cols]. sums: scratch, [threads, 3, cols]. */
void norm_backward(const float *grad, const float *x, const float *y, const float *gain,
                   const float *shift, const float *statistics, float *grad_x,
                   float *grad_parameters, float *sums, int64_t rows, int64_t cols,
                   int64_t activation, int64_t simplex, int64_t threads) {
    memset(sums, 0, sizeof(float) * (size_t)(threads * 3 * cols));
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t t = 0; t < threads; t++)
        norm_backward_rows(grad, x, y, cols, gain, shift, statistics, grad_x, sums + t * 3 * cols,
                           rows * t / threads, rows * (t + 1) / threads, rows, cols, activation,
                           simplex);
    add_up(sums, grad_parameters, 0, 3 * cols, 3 * cols, threads);
}
