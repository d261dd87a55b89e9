/* Operations on all parameters of a model, count arrays of these sizes: each thread takes its part
 * of every one, so that threads wait for each other once and not once an array. */

#define FOR_EACH_ARRAY                                                                            \
    _Pragma("omp parallel for num_threads(threads) schedule(static) if (threads > 1)")            \
    for (int64_t t = 0; t < threads; t++)                                                         \
        for (int64_t k = 0; k < count; k++)

#define SUMMED_AT_ONCE 1024 /* numbers, in single precision */

/* The root of the sum of all squares. */
void total_norm(float *const *arrays, const int64_t *sizes, float *norm, int64_t count,
                int64_t threads) {
    double shares[threads];
    memset(shares, 0, sizeof shares);
    FOR_EACH_ARRAY {
        const float *x = arrays[k];
        int64_t end = sizes[k] * (t + 1) / threads;
        for (int64_t i = sizes[k] * t / threads; i < end; i += SUMMED_AT_ONCE) {
            int64_t length = end - i < SUMMED_AT_ONCE ? end - i : SUMMED_AT_ONCE;
            shares[t] += squares_of(x + i, 0.0f, length);
        }
    }
    double sum = 0.0;
    for (int64_t t = 0; t < threads; t++) sum += shares[t];
    *norm = (float)sqrt(sum);
}

/* The arrays moved by weight towards the targets. */
void lerp_arrays(float *const *arrays, float *const *targets, const int64_t *sizes, float weight,
                 int64_t count, int64_t threads) {
    FOR_EACH_ARRAY {
        float *x = arrays[k];
        const float *target = targets[k];
#pragma omp simd
        for (int64_t i = sizes[k] * t / threads; i < sizes[k] * (t + 1) / threads; i++)
            x[i] += weight * (target[i] - x[i]);
    }
}

/* A step of Adam (Kingma and Ba, 2015) with a learning rate for each array. steps: made so far, one
 * number an array. */
void adam_step(float *const *parameters, float *const *gradients, float *const *means,
               float *const *squares, float *const *steps, const int64_t *sizes,
               const float *rates, double beta1, double beta2, float eps, int64_t count,
               int64_t threads) {
    float new_mean = (float)(1.0 - beta1), keep = (float)beta2, add = (float)(1.0 - beta2);
    FOR_EACH_ARRAY {
        double step = *steps[k] + 1.0;
        float rate = (float)(rates[k] / (1.0 - pow(beta1, step)));
        float root = (float)(1.0 / sqrt(1.0 - pow(beta2, step)));
        float *p = parameters[k], *m = means[k], *v = squares[k];
        const float *g = gradients[k];
#pragma omp simd
        for (int64_t i = sizes[k] * t / threads; i < sizes[k] * (t + 1) / threads; i++) {
            m[i] += new_mean * (g[i] - m[i]);
            v[i] = keep * v[i] + add * g[i] * g[i];
            p[i] -= rate * m[i] / (sqrtf(v[i]) * root + eps);
        }
    }
    for (int64_t k = 0; k < count; k++) *steps[k] += 1.0f;
}
