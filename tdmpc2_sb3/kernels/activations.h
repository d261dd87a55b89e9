/* Mish, in one pass with the layer norm in front of it, and SimNorm: of a row, and their
 * gradients. */

#define MISH_CLAMP 20.0f /* from here on mish(x) = x in float32, and squares stay finite */

/* e^h for h in [-87, MISH_CLAMP], the nearer end of that beyond; not NaN for NaN. The ends are
 * compared as integers, in whose order floats of one sign lie: of floats, gcc makes branches. */
static inline float mish_exp_f(float h) {
    const bits32 most = {.f = MISH_CLAMP}, least = {.f = -87.0f};
    bits32 x = {.f = h};
    x.i = x.i < most.i ? x.i : most.i;
    x.u = x.u < least.u ? x.u : least.u;
    return exp_within(x.f);
}

/* With u = e^h and w = u (u + 2): tanh(softplus(h)) = w / (w + 2). */
static inline float mish_f(float h) {
    float u = mish_exp_f(h);
    float w = u * (u + 2.0f);
    return h * (w / (w + 2.0f));
}

static inline float mish_slope_f(float h) {
    float u = mish_exp_f(h);
    float w = u * (u + 2.0f);
    float inverse = 1.0f / (w + 2.0f);
    return w * inverse + h * 4.0f * u * (u + 1.0f) * inverse * inverse;
}

#if LANES >= 8
#if LANES == 16
#define LESSER(A, B) ((vector)_mm512_min_ps((__m512)(A), (__m512)(B)))
#define GREATER(A, B) ((vector)_mm512_max_ps((__m512)(A), (__m512)(B)))
#else
#define LESSER(A, B) ((vector)_mm256_min_ps((__m256)(A), (__m256)(B)))
#define GREATER(A, B) ((vector)_mm256_max_ps((__m256)(A), (__m256)(B)))
#endif
#define AT(ARRAY, J) (*(const loose_vector *)((ARRAY) + (J)))
#define TO(ARRAY, J) (*(loose_vector *)((ARRAY) + (J)))

typedef uint32_t whole_vector __attribute__((vector_size(4 * LANES)));

/* Columns of a row that Mish takes at a time, step after step: what one step leaves for the next
 * is in the first cache. If a vector went through all steps at once, it would mostly wait for
 * itself, and no processor looks far enough ahead to have enough others under way. */
#define MISH_COLS 256
#define EACH(J) _Pragma("GCC unroll 4") for (int64_t J = 0; J < cols; J += LANES)

/* h = (x - mean) * rstd * gain + shift and u = e^h of cols numbers, at most MISH_COLS and whole
 * vectors; e^h to 2 ulp or three, h being taken as the nearer end of [-80, MISH_CLAMP] beyond; not
 * NaN for NaN. With h / ln 2 = n + f, n whole: e^h = 2^n 2^f, a polynomial in f of relative error
 * 1e-7, and n added to the exponent. */
static inline void norm_exp(const float *x, float mean, float rstd, const float *gain,
                            const float *shift, float *restrict h, float *restrict u,
                            int64_t cols) {
    const float log2_e = 1.44269504f, magic = 12582912.0f; /* adding it rounds to an integer */
    float exponents[MISH_COLS], less = -mean * rstd;
    EACH(j) {
        vector y = (AT(x, j) * rstd + less) * AT(gain, j) + AT(shift, j);
        TO(h, j) = y;
        y = GREATER(LESSER(y, (vector){0} + MISH_CLAMP), (vector){0} - 80.0f);
        vector shifted = y * log2_e + magic;
        TO(exponents, j) = shifted; /* n in the last bits */
        TO(u, j) = y * log2_e - (shifted - magic);
    }
    EACH(j) {
        vector f = AT(u, j), square = f * f;
        vector high = (f * 1.3264673e-3f + 9.6715550e-3f) * square;
        high = (high + (f * 5.5507343e-2f + 2.4022241e-1f)) * square;
        vector power = high + (f * 6.9314700e-1f + 1.0f);
        TO(u, j) = (vector)((whole_vector)power + ((whole_vector)AT(exponents, j) << 23));
    }
}

/* y = mish((x - mean) * rstd * gain + shift), as norm_exp takes them; y may be x. With u = e^h and
 * w = u (u + 2): tanh(softplus(h)) = w / (w + 2). */
static inline void norm_mish(const float *x, float mean, float rstd, const float *gain,
                             const float *shift, float *y, int64_t cols) {
    float h[MISH_COLS], u[MISH_COLS];
    norm_exp(x, mean, rstd, gain, shift, h, u, cols);
    EACH(j) {
        vector e = AT(u, j), more = e + 2.0f;
        TO(y, j) = AT(h, j) * e * more / (e * more + 2.0f);
    }
}

/* Gradients of norm_forward with Mish, grad those by its output, as norm_exp takes them: added to
 * grad_gain and grad_shift; into out those by hat, the normed x, whose sums are added to s1 and
 * those of their products with hat to s2. */
static inline void norm_mish_back(const float *grad, const float *x, float mean, float rstd,
                                  const float *gain, const float *shift, float *grad_gain,
                                  float *grad_shift, float *out, vector *s1, vector *s2,
                                  int64_t cols) {
    float h[MISH_COLS], u[MISH_COLS], less = -mean * rstd;
    norm_exp(x, mean, rstd, gain, shift, h, u, cols);
    vector sum1 = *s1, sum2 = *s2;
    EACH(j) {
        vector e = AT(u, j), w = e * e + (e + e), inverse = 1.0f / (w + 2.0f);
        vector slope = (AT(h, j) * 4.0f * (e * e + e) * inverse + w) * inverse;
        vector hat = AT(x, j) * rstd + less, d = AT(grad, j) * slope;
        TO(grad_gain, j) += d * hat;
        TO(grad_shift, j) += d;
        d *= AT(gain, j);
        TO(out, j) = d;
        sum1 += d;
        sum2 += d * hat;
    }
    *s1 = sum1;
    *s2 = sum2;
}

/* How many of the columns from begin on the two above take next. */
static inline int64_t next_mish_cols(int64_t begin, int64_t cols) {
    int64_t rest = (cols - begin) / LANES * LANES;
    return rest < MISH_COLS ? rest : MISH_COLS;
}
#endif

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

static inline void simnorm_grad_groups(const float *grad, const float *restrict y, float *out,
                                       int64_t cols, int64_t simplex) {
    for (int64_t j = 0; j < cols; j += simplex) { /* d softmax: y (g - sum g y) */
        float dot = 0.0f;
        for (int64_t k = 0; k < simplex; k++) dot += grad[j + k] * y[j + k];
        for (int64_t k = 0; k < simplex; k++) out[j + k] = y[j + k] * (grad[j + k] - dot);
    }
}

#ifdef __AVX__
/* The numbers of a register combined, in every lane. */
#define ACROSS(COMBINE, X)                                       \
    X = COMBINE(X, _mm256_permute2f128_ps(X, X, 1));             \
    X = COMBINE(X, _mm256_shuffle_ps(X, X, 0x4E));               \
    X = COMBINE(X, _mm256_shuffle_ps(X, X, 0xB1))

/* The two above for groups of 8, the paper's size: a register each. */
static void simnorm_eights(float *y, int64_t cols) {
    for (int64_t j = 0; j < cols; j += 8) {
        __m256 group = _mm256_loadu_ps(y + j), top = group;
        ACROSS(_mm256_max_ps, top);
        _mm256_storeu_ps(y + j, group - top);
    }
#pragma omp simd
    for (int64_t j = 0; j < cols; j++) y[j] = exp_f(y[j]);
    for (int64_t j = 0; j < cols; j += 8) {
        __m256 group = _mm256_loadu_ps(y + j), sum = group;
        ACROSS(_mm256_add_ps, sum);
        _mm256_storeu_ps(y + j, group / sum);
    }
}

static void simnorm_grad_eights(const float *grad, const float *y, float *out, int64_t cols) {
    for (int64_t j = 0; j < cols; j += 8) {
        __m256 grad_group = _mm256_loadu_ps(grad + j), group = _mm256_loadu_ps(y + j);
        __m256 dot = grad_group * group;
        ACROSS(_mm256_add_ps, dot);
        _mm256_storeu_ps(out + j, group * (grad_group - dot));
    }
}
#else
static void simnorm_eights(float *y, int64_t cols) { simnorm_groups(y, cols, 8); }

static void simnorm_grad_eights(const float *grad, const float *y, float *out, int64_t cols) {
    simnorm_grad_groups(grad, y, out, cols, 8);
}
#endif
