/* Sums over rows by threads, each of which adds up its own rows. */

/* Of each of the threads, every row that is its share. */
#define FOR_EACH_SHARE                                                                            \
    _Pragma("omp parallel for num_threads(threads) schedule(static) if (threads > 1)")            \
    for (int64_t t = 0; t < threads; t++)                                                         \
        for (int64_t i = rows * t / threads; i < rows * (t + 1) / threads; i++)

static float sum_of_shares(const double *shares, int64_t threads) {
    double sum = 0.0;
    for (int64_t t = 0; t < threads; t++) sum += shares[t];
    return (float)sum;
}

/* What was added up by every thread, [threads, size], from column begin to end into out. */
static void add_up(const float *sums, float *out, int64_t begin, int64_t end, int64_t size,
                   int64_t threads) {
    for (int64_t j = begin; j < end; j++) {
        float total = 0.0f;
        for (int64_t thread = 0; thread < threads; thread++) total += sums[thread * size + j];
        out[j] = total;
    }
}
