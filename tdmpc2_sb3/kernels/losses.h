/* Categorical regression over bins, and losses with their gradients at once, where what follows the
 * loss is known. Losses are sums over rows of a weight times what the row loses. */

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

/* symexp of the expected bin of one row. */
static inline float two_hot_inverse_row(const float *logits, const float *bins, int64_t cols) {
    float sum, mean = expected_bin(logits, bins, cols, row_max(logits, cols), &sum);
    return copysignf(expm1f(fabsf(mean)), mean);
}

void two_hot_inverse_forward(const float *logits, const float *bins, float *out, int64_t rows,
                             int64_t cols, int64_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t i = 0; i < rows; i++)
        out[i] = two_hot_inverse_row(logits + i * cols, bins, cols);
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

/* two_hot_cross_entropy with scalars, [target_rows], which like their weights repeat; loss: its
 * weighted sum; grad_logits: scale times its gradients, [rows, cols]. */
void two_hot_loss(const float *logits, const float *scalars, const float *weights,
                  const float *bins, float *loss, float *grad_logits, int64_t rows,
                  int64_t target_rows, int64_t cols, float scale, int64_t threads) {
    double shares[threads];
    memset(shares, 0, sizeof shares);
    float last = (float)(cols - 1), bins_a_unit = last / (bins[cols - 1] - bins[0]);
    FOR_EACH_SHARE {
        const float *li = logits + i * cols;
        float *gi = grad_logits + i * cols;
        float x = scalars[i % target_rows], weight = weights[i % target_rows];
        float p = (copysignf(log1pf(fabsf(x)), x) - bins[0]) * bins_a_unit;
        p = p < 0.0f ? 0.0f : p > last ? last : p; /* NaN stays */
        float top = row_max(li, cols), sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (int64_t j = 0; j < cols; j++) {
            gi[j] = exp_f(li[j] - top);
            sum += gi[j];
        }
        float g = scale * weight, factor = g / sum;
#pragma omp simd
        for (int64_t j = 0; j < cols; j++) gi[j] *= factor;
        if (!(p >= 0.0f)) {
            shares[t] += p;
            continue;
        }
        int64_t low = (int64_t)p;
        if (low > cols - 2) low = cols - 2;
        float share = p - (float)low;
        gi[low] -= g * (1.0f - share);
        gi[low + 1] -= g * share;
        shares[t] +=
            weight * (top + logf(sum) - (1.0f - share) * li[low] - share * li[low + 1]);
    }
    *loss = sum_of_shares(shares, threads);
}

/* Mean squares of the rows' distances; loss: their sum, weighted by weights, [rows]; grad: scale
 * times its gradients by x. */
void squared_loss(const float *x, const float *target, const float *weights, float *loss,
                  float *grad, int64_t rows, int64_t cols, float scale, int64_t threads) {
    double shares[threads];
    memset(shares, 0, sizeof shares);
    FOR_EACH_SHARE {
        float weight = weights[i] / (float)cols, factor = 2.0f * scale * weight, squares = 0.0f;
#pragma omp simd reduction(+ : squares)
        for (int64_t j = i * cols; j < (i + 1) * cols; j++) {
            float distance = x[j] - target[j];
            squares += distance * distance;
            grad[j] = factor * distance;
        }
        shares[t] += weight * squares;
    }
    *loss = sum_of_shares(shares, threads);
}

/* Binary cross-entropy with terminations, [targets], which like valid (null for ones) repeat; loss:
 * its mean; grad_logits: scale times its gradients, [count]. */
void termination_loss(const float *logits, const float *terminations, const float *valid,
                      float *loss, float *grad_logits, int64_t count, int64_t targets,
                      float scale) {
    double sum = 0.0;
    for (int64_t i = 0; i < count; i++) {
        float x = logits[i], ended = terminations[i % targets];
        float counted = valid ? valid[i % targets] : 1.0f, small = expf(-fabsf(x));
        float probability = (x < 0.0f ? small : 1.0f) / (1.0f + small);
        sum += counted * ((x > 0.0f ? x : 0.0f) - x * ended + log1pf(small));
        grad_logits[i] = scale / (float)count * counted * (probability - ended);
    }
    *loss = (float)(sum / (double)count);
}

/* torch's lerp. */
static inline float between(float a, float b, float share) {
    return share < 0.5f ? a + share * (b - a) : b - (1.0f - share) * (b - a);
}

/* Targets [steps, rows] as in losses.py, from values of the next states, [steps, rows]; of the last
 * of them alone, [1, rows], if lambda is 1. */
void lambda_returns(const float *values, const float *rewards, const float *terminations,
                    float gamma, float lambda, float *targets, int64_t steps, int64_t rows) {
    const float *last = lambda == 1.0f ? values : values + (steps - 1) * rows;
    for (int64_t t = steps - 1; t >= 0; t--)
        for (int64_t i = t * rows; i < (t + 1) * rows; i++) {
            float future = t == steps - 1 ? last[i - t * rows] : targets[i + rows];
            if (lambda == 0.0f) future = values[i];
            else if (lambda < 1.0f) future = between(values[i], future, lambda);
            targets[i] = rewards[i] + gamma * (1.0f - terminations[i]) * future;
        }
}
