/* What torch would do in an operation of its own, for functions that are replayed (capture.py). */

void clear_array(float *x, int64_t count) { memset(x, 0, sizeof(float) * (size_t)count); }

/* Rows of cols numbers, from_row and to_row floats apart. */
void copy_rows(const float *from, int64_t from_row, float *to, int64_t to_row, int64_t rows,
               int64_t cols, int64_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t i = 0; i < rows; i++)
        memcpy(to + i * to_row, from + i * from_row, sizeof(float) * (size_t)cols);
}

/* y = a + b, which may be y, by rows; b's, b_rows of them, repeat. */
void add_rows(const float *a, const float *b, float *y, int64_t rows, int64_t b_rows,
              int64_t cols, int64_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t i = 0; i < rows; i++) {
        const float *bi = b + i % b_rows * cols;
#pragma omp simd
        for (int64_t j = 0; j < cols; j++) y[i * cols + j] = a[i * cols + j] + bi[j];
    }
}

/* factors (null for ones) times e^x, and added to it. */
void exponential(const float *x, const float *factors, float added, float *y, int64_t count) {
    for (int64_t i = 0; i < count; i++) y[i] = (factors ? factors[i] : 1.0f) * expf(x[i]) + added;
}

/* The least of each number's values, [heads, count]; NaN if one is. */
void least_values(const float *values, float *out, int64_t heads, int64_t count) {
    for (int64_t i = 0; i < count; i++) {
        float result = values[i];
        for (int64_t h = 1; h < heads; h++) {
            float value = values[h * count + i];
            result = value < result || isnan(value) ? value : result;
        }
        out[i] = result;
    }
}
