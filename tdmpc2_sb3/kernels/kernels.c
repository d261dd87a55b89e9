/* The world model's layers: matrix products, LayerNorm with Mish or SimNorm in one pass over rows
 * that stay in the core's first cache, and categorical regression over bins.
 *
 * All arrays are float32, a "row" is one vector of the last axis; they are contiguous where nothing
 * else is said. Reductions over rows go through one partial sum a thread, added in the order of the
 * threads, so that a result depends on nothing but the input and the number of threads. An entry of
 * a matrix product adds its terms in their order, so it does not even depend on that, nor on the
 * other rows.
 *
 * Only simd reductions are allowed to reassociate; NaN and infinity pass through everywhere.
 */
#include <float.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __AVX__
#include <immintrin.h>
#endif

enum { ACTIVATION_NONE = 0, ACTIVATION_MISH = 1, ACTIVATION_SIMNORM = 2 };

#define MISH_CLAMP 20.0f /* from here on mish(x) = x in float32, and squares stay finite */

/* Numbers of a vector register, and rows of a tile of a product that fill the registers. */
#if defined(__AVX512F__)
#define LANES 16
#define TILE_ROWS 14
#elif defined(__AVX2__) && defined(__FMA__)
#define LANES 8
#define TILE_ROWS 6
#else
#define LANES 4
#define TILE_ROWS 6
#endif

typedef float vector __attribute__((vector_size(4 * LANES)));
typedef float loose_vector __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

typedef union {
    float f;
    int32_t i;
    uint32_t u;
} bits32;

/* e^x to 1 ulp or two for |x| < 88: x = n ln 2 + r, a polynomial in r, n added to the exponent. */
static inline float exp_within(float x) {
    const float magic = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer */
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
    bits32 scale = {.u = (shifted.u - 0x4B400000u + 127u) << 23};
    return p * scale.f;
}

static inline float exp_f(float x) {
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;
    return exp_within(x);
}

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

/* Columns of a row that Mish takes at a time, step after step: what one step leaves for the next is
 * in the first cache. If a vector went through all steps at once, it would mostly wait for itself, and
 * no processor looks far enough ahead to have enough others under way. */
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

/* y = mish((x - mean) * rstd * gain + shift), as norm_exp takes them; y may be x. With u = e^h and w
 * = u (u + 2): tanh(softplus(h)) = w / (w + 2). */
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
 * dgain and dshift; into out those by hat, the normed x, whose sums are added to s1 and those of their
 * products with hat to s2. */
static inline void norm_mish_back(const float *grad, const float *x, float mean, float rstd,
                                  const float *gain, const float *shift, float *dgain,
                                  float *dshift, float *out, vector *s1, vector *s2,
                                  int64_t cols) {
    float h[MISH_COLS], u[MISH_COLS], less = -mean * rstd;
    norm_exp(x, mean, rstd, gain, shift, h, u, cols);
    vector sum1 = *s1, sum2 = *s2;
    EACH(j) {
        vector e = AT(u, j), w = e * e + (e + e), inverse = 1.0f / (w + 2.0f);
        vector slope = (AT(h, j) * 4.0f * (e * e + e) * inverse + w) * inverse;
        vector hat = AT(x, j) * rstd + less, d = AT(grad, j) * slope;
        TO(dgain, j) += d * hat;
        TO(dshift, j) += d;
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
        __m256 by_group = _mm256_loadu_ps(grad + j), group = _mm256_loadu_ps(y + j);
        __m256 dot = by_group * group;
        ACROSS(_mm256_add_ps, dot);
        _mm256_storeu_ps(out + j, group * (by_group - dot));
    }
}
#else
static void simnorm_eights(float *y, int64_t cols) { simnorm_groups(y, cols, 8); }

static void simnorm_grad_eights(const float *grad, const float *y, float *out, int64_t cols) {
    simnorm_grad_groups(grad, y, out, cols, 8);
}
#endif

/* The sum of a register's numbers. */
static inline float lanes_added_up(vector all) {
    float parts[LANES];
    memcpy(parts, &all, sizeof parts);
#pragma GCC unroll 4
    for (int64_t half = LANES / 2; half; half /= 2)
#pragma GCC unroll 8
        for (int64_t l = 0; l < half; l++) parts[l] += parts[half + l];
    return parts[0];
}

/* Sums in four registers, whose additions need not wait for each other; rest is added to them. */
static inline float added_up(const vector *sums, float rest) {
    return rest + lanes_added_up((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

static inline float sum_of(const float *x, int64_t cols) {
    vector sums[4] = {{0}};
    float rest = 0.0f;
    int64_t j = 0;
    for (; j + 4 * LANES <= cols; j += 4 * LANES)
        for (int64_t k = 0; k < 4; k++) sums[k] += *(const loose_vector *)(x + j + k * LANES);
    for (; j < cols; j++) rest += x[j];
    return added_up(sums, rest);
}

/* Of the distances from the mean. */
static inline float squares_of(const float *x, float mean, int64_t cols) {
    vector sums[4] = {{0}};
    float rest = 0.0f;
    int64_t j = 0;
    for (; j + 4 * LANES <= cols; j += 4 * LANES)
        for (int64_t k = 0; k < 4; k++) {
            vector distance = *(const loose_vector *)(x + j + k * LANES) - mean;
            sums[k] += distance * distance;
        }
    for (; j < cols; j++) rest += (x[j] - mean) * (x[j] - mean);
    return added_up(sums, rest);
}

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

/* Rows that are normed together: the moments of one need not wait for the activations of another. */
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

/* Matrix products: a [rows, depth] by b [depth, cols].
 *
 * b is laid out in panels, each a few vectors wide and as deep as b, columns beyond the last being
 * zero. A tile of the result, as many rows as fill the registers by one panel, then takes one pass
 * over the depth (Goto and van de Geijn, 2008, without their blocking of the depth: the panels of
 * this project's layers fit the second cache). */
#define PANEL (2 * LANES)
#define LINE 16 /* numbers of a cache line */

/* Columns of a panel where these products are worth while, else 0: they need fused
 * multiply-adds of eight numbers or more, and threads of their own. */
int64_t panel_width(void) {
#if LANES >= 8 && defined(_OPENMP)
    return PANEL;
#else
    return 0;
#endif
}

/* memcpy of fewer numbers than a panel is wide, without a call. */
static inline void copy_few(float *restrict to, const float *restrict from, int64_t count) {
#define COPY(SIZE)                                \
    if (count & SIZE) {                           \
        memcpy(to, from, sizeof(float) * (SIZE)); \
        to += SIZE, from += SIZE;                 \
    }
#if PANEL > 16
    COPY(16)
#endif
    COPY(8) COPY(4) COPY(2) COPY(1)
#undef COPY
}

/* Panels that are laid out together, so that whole stretches of a row are read at a time. */
#define PANEL_GROUP 4

/* Columns begin..end of b, [depth, end], whose rows are b_row apart, in panels of panel_depth. */
static void pack_columns(const float *restrict b, int64_t b_row, int64_t depth, int64_t begin,
                         int64_t end, float *restrict packed, int64_t panel_depth) {
    int64_t group = PANEL_GROUP * PANEL;
    for (; begin + group <= end; begin += group)
        for (int64_t k = 0; k < depth; k++)
            for (int64_t p = 0; p < PANEL_GROUP; p++)
                memcpy(packed + (begin + p * PANEL) * panel_depth + k * PANEL,
                       b + k * b_row + begin + p * PANEL, sizeof(float) * PANEL);
    for (; begin < end; begin += PANEL) {
        float *restrict panel = packed + begin * panel_depth;
        int64_t cols = end - begin < PANEL ? end - begin : PANEL;
        if (cols < PANEL) memset(panel, 0, sizeof(float) * (size_t)(depth * PANEL));
        for (int64_t k = 0; k < depth; k++)
            if (cols == PANEL) memcpy(panel + k * PANEL, b + k * b_row + begin, sizeof(float) * PANEL);
            else copy_few(panel + k * PANEL, b + k * b_row + begin, cols);
    }
}

/* out[k * out_row + j] = in[j * in_row + k] for 8 by 8 of them. */
static inline void transpose_block(const float *restrict in, int64_t in_row, float *restrict out,
                                   int64_t out_row) {
#ifdef __AVX__
    __m256 r[8], s[8];
    for (int64_t i = 0; i < 8; i++) r[i] = _mm256_loadu_ps(in + i * in_row);
    for (int64_t i = 0; i < 8; i += 2) {
        s[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
        s[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
    for (int64_t i = 0; i < 8; i += 4) {
        r[i] = _mm256_shuffle_ps(s[i], s[i + 2], 0x44);
        r[i + 1] = _mm256_shuffle_ps(s[i], s[i + 2], 0xEE);
        r[i + 2] = _mm256_shuffle_ps(s[i + 1], s[i + 3], 0x44);
        r[i + 3] = _mm256_shuffle_ps(s[i + 1], s[i + 3], 0xEE);
    }
    for (int64_t i = 0; i < 4; i++) {
        _mm256_storeu_ps(out + i * out_row, _mm256_permute2f128_ps(r[i], r[i + 4], 0x20));
        _mm256_storeu_ps(out + (i + 4) * out_row, _mm256_permute2f128_ps(r[i], r[i + 4], 0x31));
    }
#else
    for (int64_t k = 0; k < 8; k++)
        for (int64_t j = 0; j < 8; j++) out[k * out_row + j] = in[j * in_row + k];
#endif
}

/* One panel of the transposed weight, [depth, cols]: of rows of the weight, weight_row apart. */
static void pack_transposed(const float *restrict weight, int64_t weight_row, int64_t depth,
                            int64_t cols, float *restrict panel) {
    int64_t k = 0;
    if (cols >= PANEL)
        for (; k + LINE <= depth; k += LINE) /* a cache line of every row at a time */
            for (int64_t j = 0; j < PANEL; j += 8)
                for (int64_t l = 0; l < LINE; l += 8)
                    transpose_block(weight + j * weight_row + k + l, weight_row,
                                    panel + (k + l) * PANEL + j, PANEL);
    for (; k < depth; k++)
        for (int64_t j = 0; j < PANEL; j++)
            panel[k * PANEL + j] = j < cols ? weight[j * weight_row + k] : 0.0f;
}

/* Some columns of a left matrix. */
typedef struct {
    const float *at;
    int64_t row; /* numbers from one row to the next */
    int64_t depth;
} columns;

static const columns no_columns = {0, 0, 0};

/* sum += a times a panel, gathered columns having their rows side by side. Of whole tiles four columns
 * are taken between two looks at whether there are more. */
static inline __attribute__((always_inline)) void add_product(const int64_t rows,
                                                              const int64_t vectors,
                                                              const int gathered, columns a,
                                                              const float *panel,
                                                              int64_t panel_row,
                                                              vector sum[][2]) {
    const float *at = a.at;
#define ADD_COLUMNS                                                                               \
    for (int64_t k = 0; k < a.depth; k++, at += gathered ? rows : 1, panel += panel_row) {        \
        vector left = ((const loose_vector *)panel)[0], right = ((const loose_vector *)panel)[1]; \
        _Pragma("GCC unroll 16") for (int64_t i = 0; i < rows; i++) {                             \
            vector entry = at[gathered ? i : i * a.row] - (vector){0}; /* in every lane */        \
            sum[i][0] += entry * left;                                                            \
            if (vectors == 2) sum[i][1] += entry * right;                                         \
        }                                                                                         \
    }
    if (rows == TILE_ROWS && vectors == 2) {
        _Pragma("GCC unroll 4") ADD_COLUMNS
    } else {
        ADD_COLUMNS
    }
#undef ADD_COLUMNS
}

static inline __attribute__((always_inline)) void tile_of(
    const int64_t rows, const int64_t vectors, const int gathered, const int fetched, columns a,
    columns more, const float *panel, int64_t panel_row, const float *start, int64_t start_row,
    float *c, int64_t c_row) {
    vector sum[TILE_ROWS][2];
#pragma GCC unroll 16
    for (int64_t i = 0; i < rows; i++) {
        if (fetched) __builtin_prefetch(c + i * c_row, 1);
        sum[i][0] = sum[i][1] = (vector){0};
        if (start) {
            sum[i][0] = *(const loose_vector *)(start + i * start_row);
            sum[i][1] = *(const loose_vector *)(start + i * start_row + LANES);
        }
    }
    add_product(rows, vectors, gathered, a, panel, panel_row, sum);
    if (!gathered)
        add_product(rows, vectors, 0, more, panel + a.depth * panel_row, panel_row, sum);
#pragma GCC unroll 16
    for (int64_t i = 0; i < rows; i++) {
        *(loose_vector *)(c + i * c_row) = sum[i][0];
        *(loose_vector *)(c + i * c_row + LANES) = sum[i][1];
    }
}

/* cols: of c from here on; of more than a panel's only those of it are meant. Fewer go by an edge that
 * is as wide as a panel, in place of c. */
static inline __attribute__((always_inline)) void tile(int64_t rows, const int gathered,
                                                       columns a, columns more,
                                                       const float *panel, int64_t panel_row,
                                                       const float *start, int64_t start_row,
                                                       float *c, int64_t c_row, int64_t cols) {
    float edge[TILE_ROWS * PANEL], *narrow = c;
    int64_t narrow_row = c_row;
    if (cols < PANEL) {
        c = edge;
        c_row = PANEL;
        if (start) {
            memset(edge, 0, sizeof edge);
            for (int64_t i = 0; i < rows; i++)
                copy_few(edge + i * PANEL, start + i * start_row, cols);
            start = edge, start_row = PANEL;
        }
    }
#define TILE(ROWS)                                                                             \
    case ROWS:                                                                                 \
        if (gathered || cols > LANES)                                                          \
            tile_of(ROWS, 2, gathered, 0, a, more, panel, panel_row, start, start_row, c,      \
                    c_row);                                                                    \
        else /* a vector is enough */                                                          \
            tile_of(ROWS, 1, gathered, 0, a, more, panel, panel_row, start, start_row, c,      \
                    c_row);                                                                    \
        break;
    switch (rows) { /* so that the sums are registers */
        TILE(1) TILE(2) TILE(3) TILE(4) TILE(5) TILE(6)
#if TILE_ROWS > 6
        TILE(7) TILE(8) TILE(9) TILE(10) TILE(11) TILE(12) TILE(13) TILE(14)
#endif
    }
    for (int64_t i = 0; cols < PANEL && i < rows; i++)
        copy_few(narrow + i * narrow_row, edge + i * PANEL, cols);
}

static inline int64_t tiles_of(int64_t rows) { return (rows + TILE_ROWS - 1) / TILE_ROWS; }

/* Rows of the t-th of tiles of nearly the same size, the larger ones in front. */
static inline int64_t tile_rows(int64_t rows, int64_t tiles, int64_t t) {
    return rows / tiles + (t < rows % tiles);
}

/* From this many tiles of rows on they take a panel in turn; then none has less than TILE_ROWS - 1. */
#define MANY_TILES 16

/* A matrix on the right: all of it in panels, or its first columns, as many as there are whole panels,
 * where they are, and the others in a panel of their own. */
typedef struct {
    const float *at;
    int64_t depth;
    const float *rest; /* the panel of their own; null if all are in panels */
    int64_t row;       /* else numbers from one row to the next, maybe 0 */
} right_matrix;

/* Where the panel of column p is, and the numbers from one of its rows to the next. */
static inline const float *panel_at(right_matrix b, int64_t p, int64_t cols) {
    return !b.rest ? b.at + p * b.depth : p + PANEL <= cols ? b.at + p : b.rest;
}

static inline int64_t panel_row(right_matrix b, int64_t p, int64_t cols) {
    return b.rest && p + PANEL <= cols ? b.row : PANEL;
}

/* Rows of the product of a, and more behind it, with b, into c, whose rows are c_row apart. Where there
 * are many, each panel of b goes through all their tiles while it is in the first cache, and meanwhile
 * the next one is fetched, and what will be written: all of b may be too large for the second cache. A
 * few leave that to the processor. Gathered rows of a are tile after tile, [depth, rows]. */
static inline __attribute__((always_inline)) void product(const int gathered, columns a,
                                                          columns more, right_matrix b,
                                                          const float *start, int64_t start_row,
                                                          float *c, int64_t c_row, int64_t rows,
                                                          int64_t cols) {
    int64_t tiles = tiles_of(rows), done = 0, depth = a.depth + more.depth;
    columns left = a, right = more;
    for (; tiles >= MANY_TILES && done + PANEL <= cols; done += PANEL) {
        const float *panel = panel_at(b, done, cols), *from = start ? start + done : 0;
        const float *next = panel_at(b, done + PANEL, cols);
        int64_t row = panel_row(b, done, cols), next_row = panel_row(b, done + PANEL, cols);
        int64_t fetched = done + PANEL < cols ? depth / tiles + 1 : 0; /* rows, by a tile */
        float *to = c + done;
        left.at = a.at, right.at = more.at;
        for (int64_t t = 0; t < tiles; t++) {
            int64_t count = tile_rows(rows, tiles, t);
            for (int64_t k = 0; k < fetched; k++, next += next_row)
                for (int64_t l = 0; l < PANEL; l += LINE) __builtin_prefetch(next + l);
            if (count == TILE_ROWS)
                tile_of(TILE_ROWS, 2, gathered, 1, left, right, panel, row, from, start_row, to,
                        c_row);
            else
                tile_of(TILE_ROWS - 1, 2, gathered, 1, left, right, panel, row, from, start_row,
                        to, c_row);
            left.at += count * (gathered ? a.depth : a.row);
            right.at += count * more.row;
            from = start ? from + count * start_row : 0;
            to += count * c_row;
        }
    }
    left.at = a.at, right.at = more.at;
    for (int64_t t = 0; t < tiles && done < cols; t++) {
        int64_t count = tile_rows(rows, tiles, t);
        for (int64_t p = done; p < cols; p += PANEL)
            tile(count, gathered, left, right, panel_at(b, p, cols), panel_row(b, p, cols),
                 start ? start + p : 0, start_row, c + p, c_row, cols - p);
        left.at += count * (gathered ? a.depth : a.row);
        right.at += count * more.row;
        start = start ? start + count * start_row : 0;
        c += count * c_row;
    }
}

/* Of functions that hold every kind of tile, of which copies would keep the compiler busy. */
#ifdef __clang__
#define ONE_COPY __attribute__((noinline))
#else
#define ONE_COPY __attribute__((noinline, noclone))
#endif

/* Rows begin..end of the product of a, and more behind it, with b, into c, whose rows are c_row floats
 * apart. The panels of b are panel_depth deep; fewer columns than that take as many rows of them from
 * packed on. start: what the product is added to, rows start_row floats apart: a bias where that is 0,
 * what is in c already where it is c; null for nothing. */
static ONE_COPY void product_rows(columns a, columns more, const float *packed,
                                  int64_t panel_depth, const float *start, int64_t start_row,
                                  float *c, int64_t c_row, int64_t begin, int64_t end,
                                  int64_t cols) {
    a.at += begin * a.row;
    if (more.depth) more.at += begin * more.row;
    product(0, a, more, (right_matrix){packed, panel_depth, 0, 0},
            start ? start + begin * start_row : 0, start_row, c + begin * c_row, c_row, end - begin,
            cols);
}

/* The same of gathered rows. */
static ONE_COPY void gathered_rows(const float *a, int64_t rows, int64_t depth, right_matrix b,
                                   float *c, int64_t c_row, int64_t cols) {
    product(1, (columns){a, 0, depth}, no_columns, b, 0, 0, c, c_row, rows, cols);
}

/* Gradients of rows begin..end of norm_forward, those of x and y row floats apart, by its input into
 * grad_x, which may be grad; added to sums, [3, cols], those by gain, by shift and by a bias in front. */
static void norm_backward_rows(const float *grad, const float *x, const float *y, int64_t row,
                               const float *gain, const float *shift, const float *statistics,
                               float *grad_x, float *sums, int64_t begin, int64_t end,
                               int64_t rows, int64_t cols, int64_t activation, int64_t simplex) {
    float *dgain = sums, *dshift = sums + cols, *dbias = sums + 2 * cols;
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
        dgain[j] += d * hat;                                                                      \
        dshift[j] += d;                                                                           \
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
                               dgain + done, dshift + done, out + done, &sum1, &sum2, next);
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
            dbias[j] += out[j];
        }
    }
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

/* A layer of a network: product with its weight and bias, then norm_forward if it has a gain. */
typedef struct {
    const float *weight;       /* [cols, depth], rows weight_row apart */
    float *packed;             /* transposed in panels, of lay_out */
    float *packed_back;        /* as it is in panels, of lay_out_back */
    const float *bias;         /* [cols] or null */
    const float *gain, *shift; /* [cols], or null without a norm */
    int64_t weight_row, depth, cols, activation, simplex;
    int64_t simplices; /* that the input is known to begin with, see below */
    float eps;
} layer;

static inline int64_t panels_of(int64_t cols) { return (cols + PANEL - 1) / PANEL; }

/* A latent consists of simplices, SIMPLEX numbers each that sum to 1. The last of them is 1 less the
 * others and is left out of products: with w their weights and c the last one's,
 *     w z + c (1 - sum z) = c + (w - c) z,
 * so the others' weights are laid out less the last one's, which is added to the bias. Rows without
 * those numbers are called reduced. A gradient by a reduced row is one by the whole row up to the
 * same number for all of a simplex, which SimNorm's own gradient takes out again. */
#define SIMPLEX 8

static inline int64_t reduced_depth(const layer *it) { return it->depth - it->simplices; }

/* What reduced rows are multiplied with has its bias behind it. */
static inline const float *product_bias(const layer *it) {
    return it->simplices ? it->packed + panels_of(it->cols) * PANEL * reduced_depth(it) : it->bias;
}

/* Rows begin..end reduced, rest numbers being behind the simplices; y may be x. */
static void reduce_rows(const float *x, int64_t x_row, float *y, int64_t y_row, int64_t simplices,
                        int64_t rest, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
        const float *in = x + i * x_row;
        float *out = y + i * y_row, numbers[SIMPLEX];
        for (int64_t g = 0; g < simplices; g++, in += SIMPLEX, out += SIMPLEX - 1) {
            memcpy(numbers, in, sizeof numbers);
            if (g < simplices - 1) memcpy(out, numbers, sizeof numbers); /* a number is overwritten */
            else memcpy(out, numbers, sizeof(float) * (SIMPLEX - 1));
        }
        for (int64_t j = 0; j < rest; j++) out[j] = in[j];
    }
}

/* Gradients by reduced rows as those by whole ones, [count, cols]. */
static void expand_rows(const float *x, int64_t x_row, float *y, int64_t cols, int64_t simplices,
                        int64_t count, int adds) {
    for (int64_t i = 0; i < count; i++) {
        const float *in = x + i * x_row;
        float *out = y + i * cols;
        for (int64_t g = 0; g < simplices; g++, in += SIMPLEX - 1, out += SIMPLEX) {
            for (int64_t k = 0; k < SIMPLEX - 1; k++) out[k] = adds ? out[k] + in[k] : in[k];
            if (!adds) out[SIMPLEX - 1] = 0.0f;
        }
        for (int64_t j = 0; j < cols - simplices * SIMPLEX; j++)
            out[j] = adds ? out[j] + in[j] : in[j];
    }
}

#define SIMPLICES_AT_ONCE 8

/* Panel p of a weight for reduced rows, and its part of their bias. */
static void pack_simplices(const layer *it, int64_t p) {
    const float *weight = it->weight + p * PANEL * it->weight_row;
    float *panel = it->packed + p * PANEL * reduced_depth(it);
    float *bias = it->packed + panels_of(it->cols) * PANEL * reduced_depth(it) + p * PANEL;
    float whole[SIMPLICES_AT_ONCE * SIMPLEX * PANEL];
    int64_t cols = it->cols - p * PANEL, from = it->simplices * SIMPLEX;
    for (int64_t j = 0; j < PANEL; j++)
        bias[j] = it->bias && j < cols ? it->bias[p * PANEL + j] : 0.0f;
    for (int64_t g = 0; g < it->simplices; g += SIMPLICES_AT_ONCE) {
        int64_t count = it->simplices - g;
        count = count < SIMPLICES_AT_ONCE ? count : SIMPLICES_AT_ONCE;
        pack_transposed(weight + g * SIMPLEX, it->weight_row, count * SIMPLEX, cols, whole);
        for (int64_t i = 0; i < count; i++) {
            const float *last = whole + (i * SIMPLEX + SIMPLEX - 1) * PANEL;
            for (int64_t k = 0; k < SIMPLEX - 1; k++, panel += PANEL)
                for (int64_t j = 0; j < PANEL; j++)
                    panel[j] = whole[(i * SIMPLEX + k) * PANEL + j] - last[j];
            for (int64_t j = 0; j < PANEL; j++) bias[j] += last[j];
        }
    }
    pack_transposed(weight + from, it->weight_row, it->depth - from, cols, panel);
}

/* pack_columns of the weight for gradients by reduced rows. begin: where a panel does. */
static void pack_simplices_back(const layer *it, int64_t begin, int64_t end) {
    int64_t inner = SIMPLEX - 1, reduced = it->simplices * inner, chunk = PANEL_GROUP * PANEL;
    float numbers[PANEL_GROUP * PANEL + 3 * SIMPLEX];
    for (; begin < end; begin += chunk) {
        int64_t until = begin + chunk < end ? begin + chunk : end; /* columns of reduced rows */
        int64_t first = begin < reduced ? begin / inner : it->simplices;
        int64_t base = begin < reduced ? first * inner : begin; /* column of numbers[0] */
        int64_t last = until < reduced ? (until + inner - 1) / inner : it->simplices;
        for (int64_t k = 0; k < it->cols; k++) {
            const float *row = it->weight + k * it->weight_row;
            for (int64_t g = first; g < last; g++) {
                const float *in = row + g * SIMPLEX;
                float *out = numbers + g * inner - base, less = in[SIMPLEX - 1];
                for (int64_t j = 0; j < SIMPLEX; j++) out[j] = in[j] - less; /* and one too many */
            }
            for (int64_t j = begin < reduced ? reduced : begin; j < until; j++)
                numbers[j - base] = row[it->simplices + j];
            for (int64_t j = begin; j < until; j += PANEL) {
                float *to = it->packed_back + j * it->cols + k * PANEL;
                const float *from = numbers + j - base;
                if (until - j >= PANEL) {
                    memcpy(to, from, sizeof(float) * PANEL);
                } else {
                    memset(to, 0, sizeof(float) * PANEL);
                    copy_few(to, from, until - j);
                }
            }
        }
    }
}

/* Lays the weights out for networks_forward and for planning. */
void lay_out(const layer *layers, int64_t count, int64_t threads) {
#pragma omp parallel num_threads(threads) if (threads > 1)
    for (int64_t l = 0; l < count; l++) {
        const layer *it = layers + l;
        int64_t panels = panels_of(it->cols);
#pragma omp for schedule(static) nowait
        for (int64_t p = 0; p < panels; p++)
            if (it->simplices) pack_simplices(it, p);
            else
                pack_transposed(it->weight + p * PANEL * it->weight_row, it->weight_row,
                                it->depth, it->cols - p * PANEL,
                                it->packed + p * PANEL * it->depth);
    }
}

/* Lays the weights of networks of count layers each out for networks_backward; of the first ones
 * the columns from input_from on, which is 0 or behind the simplices. */
void lay_out_back(const layer *layers, int64_t count, int64_t networks, int64_t input_from,
                  int64_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t t = 0; t < threads; t++)
        for (int64_t l = 0; l < networks * count; l++) {
            const layer *it = layers + l;
            int64_t from = l % count ? 0 : input_from;
            int64_t cols = from ? it->depth - from : reduced_depth(it), panels = panels_of(cols);
            int64_t begin = panels * t / threads * PANEL, end = panels * (t + 1) / threads * PANEL;
            end = end < cols ? end : cols;
            if (it->simplices && !from) pack_simplices_back(it, begin, end);
            else
                pack_columns(it->weight + from, it->weight_row, it->cols, begin, end,
                             it->packed_back, it->cols);
        }
}

static inline int64_t whole_lines(int64_t numbers) { return (numbers + LINE - 1) / LINE * LINE; }

/* Numbers from one row to the next of what a network keeps within: an odd number of cache lines, lest
 * the same columns of many rows meet in a few sets of the caches. */
static inline int64_t row_of(int64_t cols) { return ((cols + LINE - 1) / LINE | 1) * LINE; }

/* Dropout behind the first products of networks: some numbers are 0, the others divided by the
 * share of those. A norm follows, to which dividing them all is the same as another eps. */
typedef struct {
    const int64_t *positions; /* of the zeros in [networks, rows, cols], ascending; null for none */
    int64_t count;
    int64_t before; /* numbers of the networks before this one */
    float keep;
} dropout;

static const dropout nothing_dropped = {0, 0, 0, 1.0f};

static inline dropout dropout_of(const int64_t *positions, int64_t count, float keep,
                                 int64_t before) {
    return positions ? (dropout){positions, count, before, keep} : nothing_dropped;
}

/* Rows begin..end of x, row floats apart, dropped; sums, [cols] or null, no longer contain them. */
static void drop(dropout d, float *x, int64_t row, int64_t begin, int64_t end, float *sums,
                 int64_t cols) {
    int64_t at = 0;
    for (int64_t last = d.count; at < last;) { /* behind those before begin */
        int64_t middle = (at + last) / 2;
        if (d.positions[middle] < d.before + begin * cols) at = middle + 1;
        else last = middle;
    }
    for (; at < d.count && d.positions[at] < d.before + end * cols; at++) {
        int64_t i = d.positions[at] - d.before, j = i % cols;
        if (sums) sums[j] -= x[i / cols * row + j];
        x[i / cols * row + j] = 0.0f;
    }
}

/* Rows that go through networks together: few enough for their activations to stay near, and many, lest
 * the weights have to come from afar too often. */
#define BLOCK_ROWS 256

/* Rows of the next block, if all that are left are to have nearly the same size. */
static inline int64_t block_rows(int64_t left) {
    int64_t blocks = (left + BLOCK_ROWS - 1) / BLOCK_ROWS;
    return (left + blocks - 1) / blocks;
}

/* Where a layer writes. */
typedef struct {
    dropout dropped;
    int64_t row;       /* numbers from one row of product and output to the next */
    float *product;    /* before the norm, [rows, cols]; output if none is kept */
    float *statistics; /* of norm_forward, [2, rows] or null */
    float *output;     /* [rows, cols] */
} place;

/* Numbers of the reduced rows with which a workspace begins, if any. */
static inline int64_t reduced_size(const layer *first, int64_t rows) {
    return first->simplices ? rows * row_of(reduced_depth(first)) : 0;
}

/* Numbers of a layer's product or output in a workspace. */
static inline int64_t rows_size(const layer *it, int64_t rows) { return rows * row_of(it->cols); }

static inline int64_t kept_size(const layer *it, int64_t keep, int64_t rows) {
    return keep && it->gain ? rows_size(it, rows) + whole_lines(2 * rows) : 0;
}

/* Places of a network's layers: in its workspace, of which networks_backward needs all that keep
 * keeps, but the last output in result. */
static void find_places(const layer *layers, int64_t count, int64_t keep, int64_t rows,
                        dropout dropped, float *workspace, float *result, place *places) {
    workspace += reduced_size(layers, rows);
    for (int64_t l = 0; l < count; l++) {
        const layer *it = layers + l;
        int64_t kept = kept_size(it, keep, rows);
        place *p = places + l;
        p->dropped = l ? nothing_dropped : dropped;
        p->row = l == count - 1 ? it->cols : row_of(it->cols);
        p->output = l == count - 1 ? result : workspace + kept;
        p->product = kept ? workspace : p->output;
        p->statistics = kept ? workspace + rows_size(it, rows) : 0;
        if (l < count - 1) workspace += kept + rows_size(it, rows);
    }
}

/* Numbers of a network's workspace. */
int64_t workspace_size(const layer *layers, int64_t count, int64_t keep, int64_t rows) {
    int64_t size = reduced_size(layers, rows);
    for (int64_t l = 0; l < count; l++)
        size += kept_size(layers + l, keep, rows) +
                (l == count - 1 ? 0 : rows_size(layers + l, rows));
    return size;
}

/* Where a layer's gradients are prepared. */
typedef struct {
    float *by_product; /* by what comes before the norm, [rows, cols] */
    float *sums;       /* [threads, 3, cols] */
    float *rest;       /* of the input, columns beyond whole panels, [rows, PANEL] */
} gradient_place;

static inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

/* Numbers that a thread needs for itself: gathered columns, a share of the widest layer's, or reduced
 * rows of the gradients by an input, a block at a time. */
static int64_t own_size(const layer *layers, int64_t count, int64_t rows, int64_t threads) {
    int64_t size = 0, share = (rows + threads - 1) / threads;
    for (int64_t l = 0; l < count; l++) {
        int64_t columns = (tiles_of(layers[l].cols) + threads - 1) / threads * TILE_ROWS;
        size = most(size, most(columns * rows, share * layers[l].depth));
    }
    return whole_lines(size);
}

/* Places of a network's layers in its scratch. What is behind them is the threads' own. */
static float *find_gradient_places(const layer *layers, int64_t count, int64_t rows,
                                   int64_t threads, float *scratch, gradient_place *places) {
    for (int64_t l = 0; l < count; l++) {
        const layer *it = layers + l;
        places[l].by_product = scratch, scratch += whole_lines(rows * it->cols);
        places[l].sums = scratch, scratch += whole_lines(threads * 3 * it->cols);
        places[l].rest = scratch, scratch += rows * PANEL;
    }
    return scratch;
}

/* Numbers of a network's scratch for its gradients. */
int64_t scratch_size(const layer *layers, int64_t count, int64_t rows, int64_t threads) {
    int64_t size = threads * own_size(layers, count, rows, threads);
    for (int64_t l = 0; l < count; l++)
        size += whole_lines(rows * layers[l].cols) + whole_lines(threads * 3 * layers[l].cols) +
                rows * PANEL;
    return size;
}

/* Product and norm of rows begin..end of all rows. Their input, reduced if the layer's is, is the
 * first x_dim numbers of rows of x, x_row apart, and behind those the rows of a, if the layer is
 * deeper. shared: the part of the product that is x's, one row for all, in which case x is not read;
 * else null. */
static void layer_forward(const layer *it, const place *to, const float *x, int64_t x_row,
                          int64_t x_dim, const float *shared, const float *a, int64_t begin,
                          int64_t end, int64_t rows) {
    int64_t cols = it->cols, depth = reduced_depth(it), a_dim = depth - x_dim;
    columns left = {x, x_row, x_dim}, right = {a, a_dim, a_dim};
    if (shared)
        product_rows(right, no_columns, it->packed + x_dim * PANEL, depth, shared, 0, to->product,
                     to->row, begin, end, cols);
    else
        product_rows(left, right, it->packed, depth, product_bias(it), 0, to->product, to->row,
                     begin, end, cols);
    if (!it->gain) return;
    drop(to->dropped, to->product, to->row, begin, end, 0, cols);
    norm_rows(to->product, to->row, it->gain, it->shift, to->output, to->statistics, begin, end,
              rows, cols, it->eps * to->dropped.keep * to->dropped.keep, it->activation, it->simplex);
}

/* A network's layers in turn on rows begin..end of x. */
static void layers_forward(const layer *net, const place *to, int64_t count, const float *x,
                           int64_t x_row, int64_t begin, int64_t end, int64_t rows) {
    for (int64_t until; begin < end; begin = until) {
        until = begin + block_rows(end - begin);
        for (int64_t l = 0; l < count; l++)
            layer_forward(net + l, to + l, l ? to[l - 1].output : x, l ? to[l - 1].row : x_row,
                          reduced_depth(net + l), 0, 0, begin, until, rows);
    }
}

/* Networks of count layers each on the same x, [rows, depth], whose rows are x_row floats apart.
 * Every thread takes its rows through all layers, so that nobody waits for anybody between two.
 * dropped, count_dropped and share: see dropout. result: [networks, rows, last cols].
 * workspaces: one a network if they keep what networks_backward needs, else one for all; the first
 * begins with the reduced rows of x for all. */
void networks_forward(const layer *layers, int64_t count, int64_t networks, const float *x,
                      int64_t x_row, const int64_t *dropped, int64_t count_dropped, float share,
                      float *const *workspaces, int64_t keep, float *result, int64_t rows,
                      int64_t threads) {
    int64_t last = layers[count - 1].cols, first = layers[0].cols;
    int64_t inner = reduced_depth(layers), simplices = layers->simplices;
    const float *input = simplices ? workspaces[0] : x;
    int64_t input_row = simplices ? row_of(inner) : x_row;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t t = 0; t < threads; t++) {
        int64_t begin = rows * t / threads, end = rows * (t + 1) / threads;
        if (simplices)
            reduce_rows(x, x_row, workspaces[0], input_row, simplices,
                        layers->depth - simplices * SIMPLEX, begin, end);
        for (int64_t n = 0; n < networks; n++) {
            place to[count];
            find_places(layers + n * count, count, keep, rows,
                        dropout_of(dropped, count_dropped, share, n * rows * first),
                        workspaces[keep ? n : 0], result + n * rows * last, to);
            layers_forward(layers + n * count, to, count, input, input_row, begin, end, rows);
        }
    }
}

/* Dynamics of count layers applied step after step: z_1..z_steps, [steps, rows, Z], from z_0, [rows,
 * Z], under actions [steps, rows, A]. inputs: the layers' inputs (z, a), kept for rollout_backward
 * like the workspace. Every thread takes its rows through all steps. */
void rollout_forward(const layer *layers, int64_t count, const float *start, const float *actions,
                     float *inputs, float *workspace, int64_t keep, float *latents, int64_t steps,
                     int64_t rows, int64_t threads) {
    int64_t depth = layers[0].depth, z_dim = layers[count - 1].cols, a_dim = depth - z_dim;
    int64_t simplices = layers->simplices;
    int64_t input_row = simplices ? row_of(reduced_depth(layers)) : depth;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t t = 0; t < threads; t++) {
        place to[count];
        find_places(layers, count, keep, steps * rows, nothing_dropped, workspace, latents, to);
        for (int64_t h = 0; h < steps; h++) {
            int64_t begin = h * rows + rows * t / threads, end = h * rows + rows * (t + 1) / threads;
            for (int64_t i = begin; i < end; i++) {
                memcpy(inputs + i * depth, h ? latents + (i - rows) * z_dim : start + i * z_dim,
                       sizeof(float) * (size_t)z_dim);
                memcpy(inputs + i * depth + z_dim, actions + i * a_dim,
                       sizeof(float) * (size_t)a_dim);
            }
            if (simplices)
                reduce_rows(inputs, depth, workspace, input_row, simplices,
                            depth - simplices * SIMPLEX, begin, end);
            layers_forward(layers, to, count, simplices ? workspace : inputs, input_row, begin, end,
                           steps * rows);
        }
    }
}

/* Gradients of rows begin..end by what comes before the norm, and of that by the parameters. */
static const float *layer_backward(const layer *it, const place *kept, const gradient_place *to,
                                   const float *grad, float *sums, int64_t begin, int64_t end,
                                   int64_t rows) {
    int64_t cols = it->cols;
    if (it->gain) {
        norm_backward_rows(grad, kept->product, kept->output, kept->row, it->gain, it->shift,
                           kept->statistics, to->by_product, sums, begin, end, rows, cols,
                           it->activation, it->simplex);
        drop(kept->dropped, to->by_product, cols, begin, end, sums + 2 * cols, cols);
        return to->by_product;
    }
    for (int64_t i = begin; i < end; i++)
#pragma omp simd
        for (int64_t j = 0; j < cols; j++) sums[2 * cols + j] += grad[i * cols + j];
    return grad;
}

/* Columns begin..end of by_product, [rows, cols], as gathered rows: in place their numbers lie so far
 * apart that they fall out of the first cache before the next panel. */
static void gather_columns(const float *by_product, int64_t cols, int64_t begin, int64_t end,
                           int64_t rows, float *gathered) {
    int64_t tiles = tiles_of(end - begin);
    for (int64_t from = 0; from < rows; from += LINE) { /* some rows, for all cache lines of theirs */
        int64_t until = from + LINE < rows ? from + LINE : rows;
        const float *in = by_product + begin;
        float *to = gathered;
        for (int64_t t = 0; t < tiles; t++) {
            int64_t width = tile_rows(end - begin, tiles, t);
            if (width == TILE_ROWS) /* of a known width: copied without a call */
                for (int64_t i = from; i < until; i++)
                    memcpy(to + i * TILE_ROWS, in + i * cols, sizeof(float) * TILE_ROWS);
            else
                for (int64_t i = from; i < until; i++)
                    copy_few(to + i * width, in + i * cols, width);
            to += width * rows;
            in += width;
        }
    }
}

/* A row of a weight's gradient, in place, from that by the weight of reduced rows and that by their
 * bias. */
static void expand_weight_gradient(const layer *it, float by_bias, float *by_weight) {
    int64_t inner = reduced_depth(it), outside = it->depth - it->simplices * SIMPLEX;
    memmove(by_weight + it->depth - outside, by_weight + inner - outside,
            sizeof(float) * (size_t)outside);
    for (int64_t g = it->simplices - 1; g >= 0; g--) { /* from behind: each moves by g numbers */
        float *to = by_weight + g * SIMPLEX, last = by_bias;
        memmove(to, by_weight + g * (SIMPLEX - 1), sizeof(float) * (SIMPLEX - 1));
        for (int64_t k = 0; k < SIMPLEX - 1; k++) last -= to[k];
        to[SIMPLEX - 1] = last;
    }
}

/* Gradients of layers_forward, by_output those by its output. x is reduced if the first layer's input
 * is. by_input: by input_cols columns of x from input_from on, from which packed_back of the first
 * layer was laid out; added to what stands there if add_up_inputs; null if not wanted. packs, packs_x:
 * whether columns beyond whole panels of the layers' inputs, and of the first's, are packed for
 * parameter_gradients. own: what the thread has for itself. */
static void layers_backward(const layer *net, const place *kept, const gradient_place *to,
                            int64_t count, const float *x, int64_t x_row, const float *by_output,
                            float *by_input, int64_t input_from, int64_t input_cols,
                            int add_up_inputs, int packs, int packs_x, float *own, int64_t thread,
                            int64_t begin, int64_t end, int64_t rows) {
    for (int64_t until; begin < end; begin = until) {
        until = begin + block_rows(end - begin);
        const float *grad = by_output;
        for (int64_t l = count - 1; l >= 0; l--) {
            const layer *it = net + l;
            int64_t cols = it->cols, input_row = l ? kept[l - 1].row : x_row;
            int64_t in_panels = reduced_depth(it) / PANEL * PANEL;
            const float *input = l ? kept[l - 1].output : x;
            const float *by_product =
                layer_backward(it, kept + l, to + l, grad, to[l].sums + thread * 3 * cols, begin,
                               until, rows);
            if (l ? packs : packs_x)
                pack_columns(input + begin * input_row + in_panels, input_row, until - begin, 0,
                             reduced_depth(it) - in_panels, to[l].rest + begin * PANEL, rows);
            float *by_x = l ? to[l - 1].by_product : by_input;
            int64_t width = l ? it->depth : input_cols, simplices = input_from ? 0 : it->simplices;
            int64_t inner = width - simplices, adds = !l && add_up_inputs;
            if (by_x) {
                columns a = {by_product + begin * cols, cols, cols};
                float *rows_x = by_x + begin * width;
                product_rows(a, no_columns, it->packed_back, cols, adds && !simplices ? rows_x : 0,
                             width, simplices ? own : rows_x, inner, 0, until - begin, inner);
                if (simplices)
                    expand_rows(own, inner, rows_x, width, simplices, until - begin, (int)adds);
            }
            grad = by_x;
        }
    }
}

static void clear_sums(const layer *net, const gradient_place *to, int64_t count, int64_t thread) {
    for (int64_t l = 0; l < count; l++)
        memset(to[l].sums + thread * 3 * net[l].cols, 0, sizeof(float) * (size_t)(3 * net[l].cols));
}

/* A thread's part of the sums over rows, once layers_backward is through with all: gradients of the
 * n-th of all networks by the parameters. by_output: by its output. own: what it has for itself. */
static void parameter_gradients(const layer *net, const place *kept, const gradient_place *to,
                                int64_t count, const float *x, int64_t x_row,
                                const float *by_output, int64_t n, int64_t networks,
                                float *const *by_parameters, float *own, int64_t rows,
                                int64_t thread, int64_t threads) {
    for (int64_t l = 0; l < count; l++) {
        const layer *it = net + l;
        int64_t cols = it->cols, depth = it->depth, tiles = tiles_of(cols);
        const float *by_product =
            l == count - 1 && !it->gain ? by_output : to[l].by_product;
        float *by_weight = by_parameters[l] + n * cols * depth;
        float *by_vectors = by_parameters[l] + networks * cols * depth + n * cols;
        for (int64_t v = 0; v < 3; v++)
            add_up(to[l].sums + v * cols, by_vectors + v * networks * cols,
                   cols * thread / threads, cols * (thread + 1) / threads, 3 * cols, threads);
        int64_t begin = cols * (tiles * thread / threads) / tiles;
        int64_t end = cols * (tiles * (thread + 1) / threads) / tiles;
        gather_columns(by_product, cols, begin, end, rows, own);
        right_matrix input = {l ? kept[l - 1].output : x, rows, to[l].rest,
                              l ? kept[l - 1].row : x_row};
        gathered_rows(own, end - begin, rows, input, by_weight + begin * depth, depth,
                      reduced_depth(it));
        for (int64_t j = begin; it->simplices && j < end; j++) {
            float by_bias;
            add_up(to[l].sums + 2 * cols + j, &by_bias, 0, 1, 3 * cols, threads);
            expand_weight_gradient(it, by_bias, by_weight + j * depth);
        }
    }
}

/* Gradients of networks_forward with keep, whose dropout, workspaces and result these are. grad: by
 * the result. by_input: by input_cols columns of x from input_from on, from which packed_back of the
 * first layers was laid out, [rows, input_cols], added up over the networks, and to what stands
 * there if adds; null if not wanted. They contain all simplices, or none. by_parameters: of each of
 * the count layers by the weights, [networks, cols, depth], and behind those by gains, shifts and
 * biases, [3, networks, cols]; null if not wanted. scratches: one a network. */
void networks_backward(const layer *layers, int64_t count, int64_t networks, const float *x,
                       int64_t x_row, const int64_t *dropped, int64_t count_dropped, float share,
                       float *const *workspaces, float *result, const float *grad,
                       float *by_input, int64_t input_from, int64_t input_cols, int64_t adds,
                       float *const *by_parameters, float *const *scratches, int64_t rows,
                       int64_t threads) {
    int64_t last = layers[count - 1].cols, first = layers[0].cols;
    const float *input = layers->simplices ? workspaces[0] : x;
    int64_t input_row = layers->simplices ? row_of(reduced_depth(layers)) : x_row;
    int64_t own_numbers = own_size(layers, count, rows, threads);
    gradient_place first_places[count]; /* of the first network */
    /* What the threads have for themselves, for one network after the other, is behind those. */
    float *own = find_gradient_places(layers, count, rows, threads, scratches[0], first_places);
#define FIND_PLACES                                                                             \
    const layer *net = layers + n * count;                                                      \
    place kept[count]; /* of one network only: a thread's stack holds few */                    \
    gradient_place to[count];                                                                   \
    find_places(net, count, 1, rows,                                                            \
                dropout_of(dropped, count_dropped, share, n * rows * first), workspaces[n],     \
                result + n * rows * last, kept);                                                \
    find_gradient_places(net, count, rows, threads, scratches[n], to);                          \
    to[0].rest = first_places[0].rest; /* x is the same for all */
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t t = 0; t < threads; t++)
        for (int64_t n = 0; n < networks; n++) {
            FIND_PLACES
            clear_sums(net, to, count, t);
            layers_backward(net, kept, to, count, input, input_row, grad + n * rows * last,
                            by_input, input_from, input_cols, adds || n, by_parameters != 0,
                            by_parameters && !n, own + t * own_numbers, t, rows * t / threads,
                            rows * (t + 1) / threads, rows);
        }
    if (!by_parameters) return;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t t = 0; t < threads; t++)
        for (int64_t n = 0; n < networks; n++) {
            FIND_PLACES
            parameter_gradients(net, kept, to, count, input, input_row, grad + n * rows * last, n,
                                networks, by_parameters, own + t * own_numbers, rows, t, threads);
        }
#undef FIND_PLACES
}

/* Gradients of rollout_forward with keep, whose inputs, workspace and latents these are. by_latents:
 * by z_0..z_steps as far as they do not come from later latents, [1 + steps, rows, Z]; afterwards in
 * full. by_parameters: see networks_backward. */
void rollout_backward(const layer *layers, int64_t count, const float *inputs, float *workspace,
                      float *latents, float *by_latents, float *const *by_parameters,
                      float *scratch, int64_t steps, int64_t rows, int64_t threads) {
    int64_t z_dim = layers[count - 1].cols, all = steps * rows;
    const float *x = layers->simplices ? workspace : inputs;
    int64_t x_row = layers->simplices ? row_of(reduced_depth(layers)) : layers->depth;
    place all_places[count], *kept = all_places;
    gradient_place all_gradients[count], *to = all_gradients;
    find_places(layers, count, 1, all, nothing_dropped, workspace, latents, kept);
    int64_t own_numbers = own_size(layers, count, all, threads);
    float *own = find_gradient_places(layers, count, all, threads, scratch, to);
    const float *by_next = by_latents + rows * z_dim; /* a step's input is row for row its output's */
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t t = 0; t < threads; t++) {
        clear_sums(layers, to, count, t);
        for (int64_t h = steps - 1; h >= 0; h--)
            layers_backward(layers, kept, to, count, x, x_row, by_next, by_latents, 0, z_dim, 1, 1,
                            1, own + t * own_numbers, t, h * rows + rows * t / threads,
                            h * rows + rows * (t + 1) / threads, all);
    }
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t t = 0; t < threads; t++)
        parameter_gradients(layers, kept, to, count, x, x_row, by_next, 0, 1, by_parameters,
                            own + t * own_numbers, all, t, threads);
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

/* Loss and gradients at once, where what follows the loss is known.
 *
 * Losses are sums over rows of a weight times what the row loses; each thread adds up its rows. */
#define FOR_EACH_SHARE                                                                            \
    _Pragma("omp parallel for num_threads(threads) schedule(static) if (threads > 1)")            \
    for (int64_t t = 0; t < threads; t++)                                                         \
        for (int64_t i = rows * t / threads; i < rows * (t + 1) / threads; i++)

static float sum_of_shares(const double *shares, int64_t threads) {
    double sum = 0.0;
    for (int64_t t = 0; t < threads; t++) sum += shares[t];
    return (float)sum;
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

static int compare_floats(const void *a, const void *b) { /* NaN behind all others */
    float x = *(const float *)a, y = *(const float *)b;
    return isnan(x) || isnan(y) ? isnan(x) - isnan(y) : (x > y) - (x < y);
}

/* Of numbers in order. */
static float percentile(const float *ordered, int64_t count, double share) {
    double position = share * (double)(count - 1);
    int64_t low = (int64_t)position, high = low + 1 < count ? low + 1 : low;
    return between(ordered[low], ordered[high], (float)(position - (double)low));
}

/* The policy prior's loss as in losses.py, from values of heads networks at rows states, [heads,
 * rows], of which the first ones, at the sub-sequences' starts, move the scale. out: loss, mean
 * entropy, mean scaled entropy, new scale. Gradients: by the values and by the scaled entropies.
 * ordered: scratch, [starts]. */
void policy_objective(const float *values, const float *log_prob, const float *entropy,
                      const float *weights, const float *scale, float tau, float entropy_coef,
                      float *by_values, float *by_entropy, float *out, float *ordered,
                      int64_t heads, int64_t rows, int64_t starts) {
    double loss = 0.0, log_probs = 0.0, entropies = 0.0;
    for (int64_t i = 0; i < rows; i++) {
        float mean = 0.0f;
        for (int64_t n = 0; n < heads; n++) mean += values[n * rows + i];
        by_entropy[i] = mean / (float)heads;
        if (i < starts) ordered[i] = by_entropy[i];
    }
    qsort(ordered, (size_t)starts, sizeof(float), compare_floats);
    float range = percentile(ordered, starts, 0.95) - percentile(ordered, starts, 0.05);
    out[3] = between(*scale, range < 1.0f ? 1.0f : range, tau);
    for (int64_t i = 0; i < rows; i++) {
        loss -= weights[i] * (entropy_coef * entropy[i] + by_entropy[i] / out[3]);
        log_probs += log_prob[i];
        entropies += entropy[i];
        by_entropy[i] = -entropy_coef * weights[i];
        for (int64_t n = 0; n < heads; n++)
            by_values[n * rows + i] = -weights[i] / ((float)heads * out[3]);
    }
    out[0] = (float)loss;
    out[1] = (float)(-log_probs / (double)rows);
    out[2] = (float)(entropies / (double)rows);
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

/* Operations on all parameters of a model, count arrays of these sizes: each thread takes its part of
 * every one, so that threads wait for each other once and not once an array. */
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

/* GELU in its tanh approximation of a + b: x sigmoid(2 c (x + 0.044715 x^3)), c = sqrt(2 / pi). */
static inline void gelu_sum_row(const float *a, const float *b, float *y, int64_t cols) {
#pragma omp simd
    for (int64_t j = 0; j < cols; j++) {
        float x = a[j] + b[j];
        float inner = x * (1.5957691216f + 0.0713548163f * x * x);
        y[j] = x / (1.0f + exp_f(-inner));
    }
}

/* Rows of b lie b_stride apart. */
void gelu_sum_forward(const float *a, const float *b, float *y, int64_t rows, int64_t cols,
                      int64_t b_stride, int64_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t i = 0; i < rows; i++)
        gelu_sum_row(a + i * cols, b + i * b_stride, y + i * cols, cols);
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

/* sin and cos to an ulp or two for |x| up to some thousands: a quarter turn at a time. */
static inline void sin_cos_f(float x, float *sin_out, float *cos_out) {
    const float magic = 12582912.0f;
    bits32 shifted = {.f = x * 0.636619772f + magic};
    float quarters = shifted.f - magic;
    float r = x - quarters * 1.5703125f;
    r -= quarters * 4.83751297e-4f;
    r -= quarters * 7.54978995e-8f;
    float r2 = r * r;
    float s = ((-1.9515295891e-4f * r2 + 8.3321608736e-3f) * r2 - 1.6666654611e-1f) * r2 * r + r;
    float c = ((2.443315711809948e-5f * r2 - 1.388731625493765e-3f) * r2 +
               4.166664568298827e-2f) * r2 * r2 - 0.5f * r2 + 1.0f;
    int32_t q = shifted.i & 3;
    float swapped_s = q & 1 ? c : s, swapped_c = q & 1 ? s : c;
    *sin_out = q & 2 ? -swapped_s : swapped_s;
    *cos_out = (q + 1) & 2 ? -swapped_c : swapped_c;
}

/* e^x - 1 for x <= 0, accurate near 0 where the difference cancels. */
static inline float expm1_f(float x) {
    float series = x * (1.0f + x * (0.5f + x * (0.16666667f + x * (0.041666668f +
                   x * (0.0083333338f + x * 0.0013888889f)))));
    return x > -0.25f ? series : exp_f(x) - 1.0f;
}

#define DT_MIN 1e-3f
#define DT_MAX 5.0f

/* softplus, clamped to the step sizes that are allowed. */
static inline float step_size_f(float raw) {
    float e = exp_f(raw < 0.0f ? raw : -raw); /* e^-|raw| in (0, 1] */
    /* log1p(e) by its series in u = e / (2 + e): 2 atanh(u) */
    float u = e / (2.0f + e), u2 = u * u;
    float log1p_e = 2.0f * u * (1.0f + u2 * (0.33333333f + u2 * (0.2f + u2 * (0.14285715f +
                    u2 * (0.11111111f + u2 * (0.09090909f + u2 * 0.07692308f))))));
    float dt = (raw > 0.0f ? raw : 0.0f) + log1p_e;
    dt = dt < DT_MIN ? DT_MIN : dt;
    return dt > DT_MAX ? DT_MAX : dt;
}

/* Abar = e^(dt lambda) and G = (Abar - 1) / lambda for lambda = -alpha + i omega. */
static inline void discretise_f(float dt, float alpha, float omega, float *a_re, float *a_im,
                                float *g_re, float *g_im) {
    float shrink = expm1_f(-dt * alpha), scale = shrink + 1.0f, s, c;
    sin_cos_f(0.5f * dt * omega, &s, &c);
    float sine = 2.0f * s * c, versine = 2.0f * s * s, cosine = 1.0f - versine;
    float top_re = shrink * cosine - versine, top_im = scale * sine;
    float inverse = 1.0f / (alpha * alpha + omega * omega);
    *a_re = scale * cosine;
    *a_im = top_im;
    *g_re = (omega * top_im - alpha * top_re) * inverse;
    *g_im = -(alpha * top_im + omega * top_re) * inverse;
}

/* x' = Abar x + G b with step sizes softplus(beta + selection), of one row: real, then imaginary
 * parts. next may be x. */
static inline void scan_row(const float *selection, const float *b, const float *x,
                            const float *alpha, const float *omega, const float *beta, float *next,
                            int64_t modes) {
#pragma omp simd
    for (int64_t j = 0; j < modes; j++) {
        float a_re, a_im, g_re, g_im, x_re = x[j], x_im = x[modes + j];
        float b_re = b[j], b_im = b[modes + j];
        discretise_f(step_size_f(beta[j] + selection[j]), alpha[j], omega[j], &a_re, &a_im, &g_re,
                     &g_im);
        next[j] = a_re * x_re - a_im * x_im + g_re * b_re - g_im * b_im;
        next[modes + j] = a_re * x_im + a_im * x_re + g_re * b_im + g_im * b_re;
    }
}

/* The recurrence of scan_row for all rows. selection: [steps, rows, modes]; drive, x and states
 * hold real, then imaginary parts: drive rows of 2 modes, drive_stride apart, [steps, rows]; start
 * [rows, 2 modes]; states [steps, rows, 2 modes]. */
void selective_scan_forward(const float *selection, const float *drive, const float *start,
                            const float *alpha, const float *omega, const float *beta,
                            float *states, int64_t steps, int64_t rows, int64_t modes,
                            int64_t drive_stride, int64_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t i = 0; i < rows; i++) {
        const float *x = start + i * 2 * modes;
        for (int64_t k = 0; k < steps; k++) {
            float *out = states + (k * rows + i) * 2 * modes;
            scan_row(selection + (k * rows + i) * modes, drive + (k * rows + i) * drive_stride, x,
                     alpha, omega, beta, out, modes);
            x = out;
        }
    }
}

/* Gradients by selection, drive, start, and alpha, omega, beta ([3, modes]). With gradients as
 * complex numbers, the one by x_k is that by x_{k+1} times conj(Abar), and dAbar/ddt = lambda Abar,
 * dG/ddt = Abar, dAbar/dlambda = dt Abar, dG/dlambda = (dt Abar - G) / lambda.
 * carry: scratch, [threads, 2 modes]; sums: scratch, [threads, 3, modes]. */
void selective_scan_backward(const float *grad, const float *selection, const float *drive,
                             const float *start, const float *alpha, const float *omega,
                             const float *beta, const float *states, float *grad_selection,
                             float *grad_drive, float *grad_start, float *grad_parameters,
                             float *carry, float *sums, int64_t steps, int64_t rows,
                             int64_t modes, int64_t drive_stride, int64_t threads) {
    memset(sums, 0, sizeof(float) * (size_t)(threads * 3 * modes));
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t thread = 0; thread < threads; thread++) {
        float *restrict own = sums + thread * 3 * modes;
        float *restrict back = carry + thread * 2 * modes;
        int64_t begin = rows * thread / threads, end = rows * (thread + 1) / threads;
        for (int64_t i = begin; i < end; i++) {
            memset(back, 0, sizeof(float) * (size_t)(2 * modes));
            for (int64_t k = steps - 1; k >= 0; k--) {
                int64_t at = k * rows + i;
                const float *sel = selection + at * modes, *b = drive + at * drive_stride;
                const float *x = k ? states + (at - rows) * 2 * modes : start + i * 2 * modes;
                const float *g = grad + at * 2 * modes;
                float *out_sel = grad_selection + at * modes;
                float *out_drive = grad_drive + at * 2 * modes;
#pragma omp simd
                for (int64_t j = 0; j < modes; j++) {
                    float al = alpha[j], om = omega[j], raw = beta[j] + sel[j];
                    float dt = step_size_f(raw), a_re, a_im, g_re, g_im;
                    discretise_f(dt, al, om, &a_re, &a_im, &g_re, &g_im);
                    float d_re = g[j] + back[j], d_im = g[modes + j] + back[modes + j];
                    float x_re = x[j], x_im = x[modes + j], b_re = b[j], b_im = b[modes + j];
                    back[j] = a_re * d_re + a_im * d_im;
                    back[modes + j] = a_re * d_im - a_im * d_re;
                    out_drive[j] = g_re * d_re + g_im * d_im;
                    out_drive[modes + j] = g_re * d_im - g_im * d_re;
                    /* gradients by Abar and G: conj(x) d, conj(b) d */
                    float da_re = x_re * d_re + x_im * d_im, da_im = x_re * d_im - x_im * d_re;
                    float dg_re = b_re * d_re + b_im * d_im, dg_im = b_re * d_im - b_im * d_re;
                    float la_re = -al * a_re - om * a_im, la_im = om * a_re - al * a_im;
                    float d_dt = la_re * da_re + la_im * da_im + a_re * dg_re + a_im * dg_im;
                    int inside = dt > DT_MIN && dt < DT_MAX;
                    float e = exp_f(raw < 0.0f ? raw : -raw), slope = 1.0f / (1.0f + e);
                    slope = raw < 0.0f ? 1.0f - slope : slope; /* sigmoid */
                    float d_raw = inside ? d_dt * slope : 0.0f;
                    /* (dt Abar - G) / lambda = (dt Abar - G) (-alpha - i omega) / |lambda|^2 */
                    float inverse = 1.0f / (al * al + om * om);
                    float h_re = dt * a_re - g_re, h_im = dt * a_im - g_im;
                    float q_re = (om * h_im - al * h_re) * inverse;
                    float q_im = -(al * h_im + om * h_re) * inverse;
                    float p_re = dt * a_re, p_im = dt * a_im;
                    float l_re = p_re * da_re + p_im * da_im + q_re * dg_re + q_im * dg_im;
                    float l_im = p_re * da_im - p_im * da_re + q_re * dg_im - q_im * dg_re;
                    out_sel[j] = d_raw;
                    own[j] -= l_re;
                    own[modes + j] += l_im;
                    own[2 * modes + j] += d_raw;
                }
            }
            memcpy(grad_start + i * 2 * modes, back, sizeof(float) * (size_t)(2 * modes));
        }
    }
    for (int64_t j = 0; j < 3 * modes; j++) {
        float total = 0.0f;
        for (int64_t thread = 0; thread < threads; thread++)
            total += sums[thread * 3 * modes + j];
        grad_parameters[j] = total;
    }
}

#define LOG_STD_MIN (-10.0f)
#define LOG_STD_RANGE 12.0f /* up to 2 */
#define SQUASH_EPSILON 1e-6f
#define ENTROPY_EPSILON 1e-8f
#define LOG_SQRT_2_PI 0.91893853f

/* Draws of the policy prior from its outputs, [rows, 2 A], and standard normal noise, [rows, A]:
 * rows of latents, [rows, Z], and actions into pairs; the actions' log-probabilities and scaled
 * entropies (scaled_entropy in losses.py, by one or the other of its names), [rows]. kept: for the
 * gradients, tanh(s), the deviations and the actions, [3, rows, A]. */
void policy_sample_forward(const float *moments, const float *noise, const float *latents,
                           float *pairs, float *log_prob, float *entropy, float *kept,
                           int64_t rows, int64_t latent_dim, int64_t action_dim,
                           int64_t squashed_entropy, int64_t threads) {
    int64_t all = rows * action_dim;
    FOR_EACH_SHARE {
        const float *mean = moments + 2 * i * action_dim, *s = mean + action_dim;
        float *pair = pairs + i * (latent_dim + action_dim);
        memcpy(pair, latents + i * latent_dim, sizeof(float) * (size_t)latent_dim);
        float gaussian = 0.0f, squashed = 0.0f;
        for (int64_t j = 0; j < action_dim; j++) {
            int64_t at = i * action_dim + j;
            float tanh_s = tanhf(s[j]), log_std = LOG_STD_MIN + 0.5f * LOG_STD_RANGE * (tanh_s + 1.0f);
            float std = expf(log_std), action = tanhf(mean[j] + noise[at] * std);
            float room = 1.0f - action * action;
            gaussian -= 0.5f * noise[at] * noise[at] + log_std + LOG_SQRT_2_PI;
            squashed += logf((room < 0.0f ? 0.0f : room) + SQUASH_EPSILON);
            pair[latent_dim + j] = action;
            kept[at] = tanh_s;
            kept[all + at] = std;
            kept[2 * all + at] = action;
        }
        float p = gaussian - squashed;
        log_prob[i] = p;
        entropy[i] = squashed_entropy
                         ? -(p + (float)(action_dim - 1) * gaussian)
                         : -p * (gaussian * (float)action_dim / (p + ENTROPY_EPSILON));
    }
}

/* Gradients of policy_sample_forward by moments, from those by the actions, [rows, A], and by the
 * entropies, [rows]; log_prob and kept are what it wrote. */
void policy_sample_backward(const float *noise, const float *log_prob, const float *kept,
                            const float *by_actions, const float *by_entropy, float *by_moments,
                            int64_t rows, int64_t action_dim, int64_t squashed_entropy,
                            int64_t threads) {
    int64_t all = rows * action_dim;
    FOR_EACH_SHARE {
        float *by_mean = by_moments + 2 * i * action_dim, *by_s = by_mean + action_dim;
        float p = log_prob[i], gaussian = 0.0f;
        for (int64_t j = i * action_dim; j < (i + 1) * action_dim; j++)
            gaussian -= 0.5f * noise[j] * noise[j] + LOG_SQRT_2_PI + LOG_STD_MIN +
                        0.5f * LOG_STD_RANGE * (kept[j] + 1.0f);
        /* by p = g - what squashing takes, and by g in all: of -(p + (A - 1) g) */
        float by_p = -by_entropy[i], by_gaussian = -(float)action_dim * by_entropy[i];
        if (!squashed_entropy) { /* of -A p g / (p + epsilon) */
            float scale = -(float)action_dim * by_entropy[i] / (p + ENTROPY_EPSILON);
            by_p = scale * gaussian * ENTROPY_EPSILON / (p + ENTROPY_EPSILON);
            by_gaussian = scale * p + by_p;
        }
        for (int64_t j = 0; j < action_dim; j++) {
            int64_t at = i * action_dim + j;
            float tanh_s = kept[at], std = kept[all + at], action = kept[2 * all + at];
            float room = 1.0f - action * action;
            float by_action = by_actions[at];
            if (room > 0.0f) by_action += by_p * 2.0f * action / (room + SQUASH_EPSILON);
            by_mean[j] = by_action * room;
            by_s[j] = (by_mean[j] * noise[at] * std - by_gaussian) * 0.5f * LOG_STD_RANGE *
                      (1.0f - tanh_s * tanh_s);
        }
    }
}

/* Planning by sampled action sequences, in one call that takes each sequence through all networks.
 *
 * E environments have N sequences each, of which the first P are the policy prior's and the others,
 * S of them, are drawn from a Gaussian that I iterations improve. Steps come before environments, as
 * in the planner. */
typedef struct {
    const layer *layers;
    int64_t count;
} network;

/* A block: count sequences of one environment, from its first on. */
typedef struct {
    int64_t env, first, count;
} block;

/* layer_forward of count rows into y, [count, cols], which is neither x nor a. */
static void layer_rows(const layer *it, const float *x, int64_t x_dim, const float *shared,
                       const float *a, int64_t count, float *y) {
    place to = {.dropped = nothing_dropped, .row = it->cols, .product = y, .output = y};
    layer_forward(it, &to, x, x_dim, x_dim, shared, a, 0, count, count);
}

/* A network on rows of x, or of x and a; its outputs, in one of the two blocks of the scratch that
 * x may not be in, unless out, [count, last cols], is given. is_shared: x is one row for all. */
static const float *network_rows(network net, const float *x, int64_t x_dim, int is_shared,
                                 const float *a, int64_t count, float *out, float *scratch,
                                 int64_t widest) {
    float *blocks[2] = {scratch, scratch + BLOCK_ROWS * widest};
    float *shared = scratch + 2 * BLOCK_ROWS * widest;
    const layer *it = net.layers;
    if (is_shared)
        product_rows((columns){x, x_dim, x_dim}, no_columns, it->packed, reduced_depth(it),
                     product_bias(it), 0, shared, it->cols, 0, 1, it->cols);
    for (int64_t l = 0; l < net.count; l++, it++) {
        float *y = l == net.count - 1 && out ? out : blocks[l & 1];
        layer_rows(it, x, l ? it->depth : x_dim, !l && is_shared ? shared : 0, l ? 0 : a, count,
                   y);
        x = y;
    }
    return x;
}

/* Squashed draws of the policy prior, [count, A], from its outputs and standard normal noise. */
static void policy_rows(const float *moments, const float *noise, float *actions, int64_t count,
                        int64_t action_dim) {
    for (int64_t i = 0; i < count; i++)
        for (int64_t j = 0; j < action_dim; j++) {
            const float *row = moments + i * 2 * action_dim;
            float log_std =
                LOG_STD_MIN + 0.5f * LOG_STD_RANGE * (tanhf(row[action_dim + j]) + 1.0f);
            actions[i * action_dim + j] =
                tanhf(row[j] + noise[i * action_dim + j] * expf(log_std));
        }
}

/* A layer of the state-space dynamics (tdmpc2_sb3/model/dynamics/ssm.py tells what they compute). */
typedef struct {
    const float *gain, *shift;          /* of the LayerNorm in front, [width] */
    layer products;                     /* B, V and W_1 side by side */
    layer selection;                    /* W_2; of no columns if time-invariant */
    layer readout, mix;                 /* C, W */
    const float *alpha, *omega, *beta;  /* [modes] */
    int64_t modes;
    float eps; /* of the LayerNorm */
} state_space_layer;

/* Dynamics: a network, or a state space. */
typedef struct {
    network net; /* of no layers if it is a state space */
    layer features, context, starts, action, out; /* W_c, W_u, P, W_a, W_o */
    const state_space_layer *stack;
    int64_t depth;
} dynamics;

/* Where a block's state space keeps its parts. */
typedef struct {
    float *features, *context, *starts; /* of z_0, one row */
    float *stream, *normed, *products, *selection, *hidden; /* of each row */
    float *states; /* [depth, BLOCK_ROWS, 2 modes] */
} state_space_memory;

/* The memory in an array, and x_0 of count rows in it. */
static state_space_memory state_space_start(const dynamics *d, const float *z, int64_t count,
                                            float *array) {
    int64_t width = d->action.cols, modes = d->stack->modes;
    int64_t rank = d->stack->selection.depth, hidden = d->stack->readout.cols;
    state_space_memory m;
    m.features = array, array += d->features.cols;
    m.context = array, array += width;
    m.starts = array, array += 2 * modes * d->depth;
    m.stream = array, array += BLOCK_ROWS * width;
    m.normed = array, array += BLOCK_ROWS * width;
    m.products = array, array += BLOCK_ROWS * d->stack->products.cols;
    m.selection = array, array += BLOCK_ROWS * modes;
    m.hidden = array, array += BLOCK_ROWS * (hidden > rank ? hidden : rank);
    m.states = array;
    layer_rows(&d->features, z, reduced_depth(&d->features), 0, 0, 1, m.features);
    layer_rows(&d->context, m.features, d->context.depth, 0, 0, 1, m.context);
    layer_rows(&d->starts, m.features, d->starts.depth, 0, 0, 1, m.starts);
    memset(m.selection, 0, sizeof(float) * (size_t)(BLOCK_ROWS * modes));
    for (int64_t l = 0; l < d->depth; l++)
        for (int64_t i = 0; i < count; i++)
            memcpy(m.states + (l * BLOCK_ROWS + i) * 2 * modes, m.starts + l * 2 * modes,
                   sizeof(float) * (size_t)(2 * modes));
    return m;
}

static void state_space_step(const dynamics *d, const state_space_memory *m, const float *a,
                             int64_t count, float *next) {
    int64_t width = d->action.cols;
    layer_rows(&d->action, 0, 0, m->context, a, count, m->stream); /* u^0 */
    for (int64_t l = 0; l < d->depth; l++) {
        const state_space_layer *it = d->stack + l;
        int64_t modes = it->modes, all = it->products.cols, hidden = it->readout.cols;
        float *states = m->states + l * BLOCK_ROWS * 2 * modes;
        norm_rows(m->stream, width, it->gain, it->shift, m->normed, 0, 0, count, count, width, it->eps,
                  ACTIVATION_NONE, 1);
        layer_rows(&it->products, m->normed, width, 0, 0, count, m->products);
        if (it->selection.cols) {
            int64_t rank = it->selection.depth; /* W_1 v are the last columns */
            for (int64_t i = 0; i < count; i++)
                memcpy(m->hidden + i * rank, m->products + (i + 1) * all - rank,
                       sizeof(float) * (size_t)rank);
            layer_rows(&it->selection, m->hidden, rank, 0, 0, count, m->selection);
        }
        for (int64_t i = 0; i < count; i++)
            scan_row(m->selection + i * modes, m->products + i * all, states + i * 2 * modes,
                     it->alpha, it->omega, it->beta, states + i * 2 * modes, modes);
        layer_rows(&it->readout, states, 2 * modes, 0, 0, count, m->hidden);
        for (int64_t i = 0; i < count; i++)
            gelu_sum_row(m->hidden + i * hidden, m->products + i * all + 2 * modes,
                         m->hidden + i * hidden, hidden);
        product_rows((columns){m->hidden, hidden, hidden}, no_columns, it->mix.packed, hidden,
                     m->stream, width, m->stream, width, 0, count, width); /* residual */
    }
    layer_rows(&d->out, m->stream, width, 0, 0, count, next);
}

/* What a search reads and where it writes. D environments have noise of their own: E, or 1 where all
 * share it. */
typedef struct {
    int64_t iterations, horizon, envs, samples, prior, elites, noise_envs, latent_dim, action_dim;
    int64_t simplices; /* of a latent, if all rows of latents are reduced; else 0 */
    int64_t widest; /* numbers of a row of the scratch: of the widest layer */
    int64_t memory; /* numbers that the dynamics keep a row; 0 for a network */
    int64_t steps_work, prior_work, value_work; /* multiply-adds of a row, see first_of_thread */
    dynamics dynamics;
    network reward, policy;
    network termination; /* of no layers if episodes do not end */
    network q;           /* all of them, one after the other; count is that of one */
    const float *bins, *start; /* start: z_0, [E, Z] or reduced */
    const float *policy_noise;   /* standard normal, as are the next two, [H, D, P, A] */
    const float *sample_noise;   /* [I, H, D, S, A] */
    const float *terminal_noise; /* of the policy's actions at z_H, [I, D, N, A] */
    const int64_t *heads;        /* of Q, whose mean counts, [I, 2] */
    float *actions;              /* [H, E, N, A] */
    float *prior_latents;        /* z_H of the policy's sequences, [E, P, Z] or reduced */
    float *rewards, *discounts;  /* on the way, and of what follows, [E, N] */
    float *values;               /* [E, N] */
    float *means, *stds; /* of the Gaussians, the first mean given, [I + 1, H, E, A] */
    float *elite_values;         /* the highest first, [E, K] */
    float *weights;              /* [E, K] */
    float *first_actions;        /* [E, K, A] */
    int64_t *positions;          /* of the elites among the sequences, [E, K] */
    int64_t *valued;             /* sequences in all iterations so far, [E] */
    float *scratch;              /* [threads, planning_scratch] */
    double gamma;
    float temperature, min_std, max_std;
} search;

static inline int64_t networks_scratch(int64_t widest, int64_t memory) {
    return (2 * BLOCK_ROWS + 1) * widest + (BLOCK_ROWS + 1) * memory;
}

/* Numbers of scratch that a thread needs: two blocks of rows and what the dynamics keep, and the
 * same of a row for z_0; latents and last actions of a block. */
int64_t planning_scratch(const search *s) {
    return networks_scratch(s->widest, s->memory) +
           BLOCK_ROWS * (s->horizon * s->latent_dim + s->action_dim);
}

/* Numbers of a row of latents. */
static inline int64_t latent_row(const search *s) { return s->latent_dim - s->simplices; }

/* Row of an array [H, E, N, ...] where the block starts. */
static inline int64_t row_at(const search *s, int64_t step, block b) {
    return (step * s->envs + b.env) * s->samples + b.first;
}

/* The same of an array [H, D, count, ...], which has numbers of count sequences from from on. */
static inline int64_t noise_row_at(const search *s, int64_t step, block b, int64_t from,
                                   int64_t count) {
    return (step * s->noise_envs + (s->noise_envs > 1 ? b.env : 0)) * count + b.first - from;
}

/* Actions of Gaussian samples, within their bounds; NaN stays. */
static void draw_samples(const search *s, int64_t iteration, block b) {
    int64_t a_dim = s->action_dim, drawn = s->samples - s->prior;
    for (int64_t h = 0; h < s->horizon; h++) {
        int64_t at = ((iteration * s->horizon + h) * s->envs + b.env) * a_dim;
        int64_t from = noise_row_at(s, iteration * s->horizon + h, b, s->prior, drawn);
        const float *mean = s->means + at, *std = s->stds + at;
        const float *noise = s->sample_noise + from * a_dim;
        float *actions = s->actions + row_at(s, h, b) * a_dim;
        for (int64_t i = 0; i < b.count; i++)
            for (int64_t j = 0; j < a_dim; j++) {
                float a = mean[j] + std[j] * noise[i * a_dim + j];
                a = a < -1.0f ? -1.0f : a;
                actions[i * a_dim + j] = a > 1.0f ? 1.0f : a;
            }
    }
}

/* z_1..z_H into latents, BLOCK_ROWS Z numbers for each step, from z_0: under the policy's actions,
 * which are written, if the block is of its sequences, else under the actions as they are. */
static void roll_out(const search *s, block b, float *latents, float *own) {
    int64_t z_dim = latent_row(s), a_dim = s->action_dim;
    const dynamics *d = &s->dynamics;
    const float *z = s->start + b.env * z_dim;
    state_space_memory memory = {0};
    if (d->depth) memory = state_space_start(d, z, b.count, own + networks_scratch(s->widest, 0));
    for (int64_t h = 0; h < s->horizon; h++) {
        float *a = s->actions + row_at(s, h, b) * a_dim;
        float *next = latents + h * BLOCK_ROWS * s->latent_dim;
        if (b.first < s->prior) {
            const float *noise = s->policy_noise + noise_row_at(s, h, b, 0, s->prior) * a_dim;
            const float *moments =
                network_rows(s->policy, z, z_dim, 0, 0, h ? b.count : 1, 0, own, s->widest);
            for (int64_t i = 0; i < b.count; i++) /* z_0 is the same for all */
                policy_rows(moments + (h ? i : 0) * 2 * a_dim, noise + i * a_dim, a + i * a_dim,
                            1, a_dim);
        }
        if (d->depth) state_space_step(d, &memory, a, b.count, next);
        else network_rows(d->net, z, z_dim, h == 0, a, b.count, next, own, s->widest);
        if (s->simplices)
            reduce_rows(next, s->latent_dim, next, z_dim, s->simplices, 0, 0, b.count);
        z = next;
    }
}

/* Discounted sums of the rewards on the way, and the discount of what follows. With a termination
 * network nothing counts after its logit exceeds 0. */
static void sum_rewards(const search *s, block b, const float *latents, float *own) {
    int64_t z_dim = latent_row(s), a_dim = s->action_dim;
    int64_t cols = s->reward.layers[s->reward.count - 1].cols;
    const float *z = s->start + b.env * z_dim;
    float *total = s->rewards + row_at(s, 0, b), *alive = s->discounts + row_at(s, 0, b);
    double discount = 1.0;
    for (int64_t i = 0; i < b.count; i++) {
        total[i] = 0.0f;
        alive[i] = 1.0f;
    }
    for (int64_t h = 0; h < s->horizon; h++) {
        const float *logits =
            network_rows(s->reward, z, z_dim, h == 0, s->actions + row_at(s, h, b) * a_dim,
                         b.count, 0, own, s->widest);
        for (int64_t i = 0; i < b.count; i++)
            total[i] += (float)discount * alive[i] *
                        two_hot_inverse_row(logits + i * cols, s->bins, cols);
        z = latents + h * BLOCK_ROWS * s->latent_dim;
        discount *= s->gamma;
        if (s->termination.count) {
            logits = network_rows(s->termination, z, z_dim, 0, 0, b.count, 0, own, s->widest);
            for (int64_t i = 0; i < b.count; i++)
                if (logits[i] > 0.0f) alive[i] = 0.0f;
        }
    }
    for (int64_t i = 0; i < b.count; i++) alive[i] *= (float)discount;
}

/* What sequences are worth: their rewards, and discounted the mean of two networks of q at z_H, of
 * which z has the rows, and the policy's action there. a: scratch, [BLOCK_ROWS, A]. */
static void sum_values(const search *s, int64_t iteration, block b, const float *z, float *a,
                       float *own) {
    int64_t z_dim = latent_row(s), a_dim = s->action_dim, row = row_at(s, 0, b);
    const float *noise =
        s->terminal_noise + noise_row_at(s, iteration, b, 0, s->samples) * a_dim;
    float *values = s->values + row;
    policy_rows(network_rows(s->policy, z, z_dim, 0, 0, b.count, 0, own, s->widest), noise, a,
                b.count, a_dim);
    for (int64_t n = 0; n < 2; n++) {
        network net = {s->q.layers + s->heads[2 * iteration + n] * s->q.count, s->q.count};
        int64_t cols = net.layers[net.count - 1].cols;
        const float *logits = network_rows(net, z, z_dim, 0, a, b.count, 0, own, s->widest);
        for (int64_t i = 0; i < b.count; i++) {
            float value = 0.5f * two_hot_inverse_row(logits + i * cols, s->bins, cols);
            values[i] = n ? values[i] + value : value;
        }
    }
    for (int64_t i = 0; i < b.count; i++)
        values[i] = s->rewards[row + i] + s->discounts[row + i] * values[i];
}

/* Values of a block's sequences. Those of the policy are the same in every iteration: of them only
 * what follows z_H is drawn anew. */
static void evaluate(const search *s, int64_t iteration, block b, float *own) {
    int64_t z_dim = latent_row(s);
    float *latents = own + networks_scratch(s->widest, s->memory);
    float *last = latents + (s->horizon - 1) * BLOCK_ROWS * s->latent_dim;
    float *last_actions = latents + s->horizon * BLOCK_ROWS * s->latent_dim;
    block prior = b, drawn = b;
    prior.count = s->prior - b.first;
    prior.count = prior.count < 0 ? 0 : prior.count > b.count ? b.count : prior.count;
    drawn.first += prior.count;
    drawn.count -= prior.count;
    if (prior.count) {
        float *kept = s->prior_latents + (b.env * s->prior + b.first) * z_dim;
        size_t size = sizeof(float) * (size_t)(prior.count * z_dim);
        if (iteration == 0) {
            roll_out(s, prior, latents, own);
            sum_rewards(s, prior, latents, own);
            memcpy(kept, last, size);
        } else {
            memcpy(last, kept, size);
        }
    }
    if (drawn.count) {
        latents += prior.count * z_dim;
        draw_samples(s, iteration, drawn);
        roll_out(s, drawn, latents, own);
        sum_rewards(s, drawn, latents, own);
    }
    sum_values(s, iteration, b, last, last_actions, own);
}

/* Where the thread begins among all sequences, so that all have the same work: a sequence's steps,
 * for one of the policy only in the first iteration and then with the policy itself, and its value. */
static int64_t first_of_thread(const search *s, int64_t iteration, int64_t thread,
                               int64_t threads) {
    int64_t prior = s->value_work + (iteration ? 0 : s->prior_work);
    int64_t drawn = s->value_work + s->steps_work;
    int64_t of_prior = s->prior * prior, of_env = of_prior + (s->samples - s->prior) * drawn;
    int64_t at = s->envs * of_env * thread / threads, rest = at % of_env;
    return at / of_env * s->samples +
           (rest < of_prior ? rest / prior : s->prior + (rest - of_prior) / drawn);
}

/* The block at that position among all sequences, up to end. */
static block block_at(const search *s, int64_t position, int64_t end) {
    int64_t env = position / s->samples, left = (env + 1) * s->samples;
    left = (left < end ? left : end) - position;
    return (block){env, position - env * s->samples, block_rows(left)};
}

/* The elites of an environment by their values, the highest first and among equals the first.
 * NaN counts as 0, and infinities as the largest numbers. */
static void choose_elites(const search *s, int64_t env) {
    const float *values = s->values + env * s->samples;
    float *best = s->elite_values + env * s->elites;
    int64_t *positions = s->positions + env * s->elites, count = 0;
    for (int64_t n = 0; n < s->samples; n++) {
        float value = isnan(values[n]) ? 0.0f : values[n];
        value = value > FLT_MAX ? FLT_MAX : value < -FLT_MAX ? -FLT_MAX : value;
        if (count == s->elites && !(value > best[count - 1])) continue;
        int64_t at = 0;
        for (int64_t end = count; at < end;) { /* behind those that are not less */
            int64_t middle = (at + end) / 2;
            if (best[middle] >= value) at = middle + 1;
            else end = middle;
        }
        if (count < s->elites) count++;
        memmove(best + at + 1, best + at, sizeof(float) * (size_t)(count - 1 - at));
        memmove(positions + at + 1, positions + at, sizeof(int64_t) * (size_t)(count - 1 - at));
        best[at] = value;
        positions[at] = n;
    }
}

/* The next Gaussian of an environment: mean and deviation of its elites, weighted by their values. */
static void refit(const search *s, int64_t iteration, int64_t env) {
    int64_t a_dim = s->action_dim, elites = s->elites;
    const float *value = s->elite_values + env * elites;
    const int64_t *positions = s->positions + env * elites;
    float *weight = s->weights + env * elites, sum = 0.0f;
    for (int64_t k = 0; k < elites; k++) {
        weight[k] = expf(s->temperature * (value[k] - value[0]));
        sum += weight[k];
    }
    for (int64_t k = 0; k < elites; k++) weight[k] /= sum;
    for (int64_t h = 0; h < s->horizon; h++) {
        int64_t at = (((iteration + 1) * s->horizon + h) * s->envs + env) * a_dim;
        float *m = s->means + at, *d = s->stds + at;
        const float *actions = s->actions + row_at(s, h, (block){env, 0, 0}) * a_dim;
        for (int64_t j = 0; j < a_dim; j++) m[j] = d[j] = 0.0f;
        for (int64_t k = 0; k < elites; k++)
            for (int64_t j = 0; j < a_dim; j++) m[j] += weight[k] * actions[positions[k] * a_dim + j];
        for (int64_t k = 0; k < elites; k++)
            for (int64_t j = 0; j < a_dim; j++) {
                float distance = actions[positions[k] * a_dim + j] - m[j];
                d[j] += weight[k] * distance * distance;
            }
        for (int64_t j = 0; j < a_dim; j++) {
            float deviation = sqrtf(d[j]);
            deviation = deviation < s->min_std ? s->min_std : deviation;
            d[j] = deviation > s->max_std ? s->max_std : deviation;
        }
        for (int64_t k = 0; h == 0 && k < elites; k++)
            memcpy(s->first_actions + (env * elites + k) * a_dim, actions + positions[k] * a_dim,
                   sizeof(float) * (size_t)a_dim);
    }
}

/* All iterations. Whoever values the last sequence of an environment refits it, so that the threads
 * wait for each other once in each: on a busy machine every wait costs a slice of the scheduler. */
void plan_search(const search *s, int64_t threads) {
    int64_t size = planning_scratch(s);
    memset(s->valued, 0, sizeof(int64_t) * (size_t)s->envs);
    for (int64_t i = 0; i < s->horizon * s->envs * s->action_dim; i++) s->stds[i] = s->max_std;
#pragma omp parallel num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < s->iterations; i++) {
#pragma omp for schedule(static)
        for (int64_t t = 0; t < threads; t++) {
            int64_t at = first_of_thread(s, i, t, threads);
            int64_t end = first_of_thread(s, i, t + 1, threads);
            while (at < end) {
                block b = block_at(s, at, end);
                evaluate(s, i, b, s->scratch + t * size);
                if (__atomic_add_fetch(s->valued + b.env, b.count, __ATOMIC_ACQ_REL) ==
                    (i + 1) * s->samples) {
                    choose_elites(s, b.env);
                    refit(s, i, b.env);
                }
                at += b.count;
            }
        }
    }
}

/* What planner.py's plan makes of a search's elites: an action of one that is chosen by its weight,
 * which with exploration (null for none) is moved by the first deviation, and statistics. */
void choose_action(const float *elite_values, const float *weights, const float *first_actions,
                   const float *previous_mean, const float *mean, const float *std,
                   const float *gumbel, const float *exploration, float *action,
                   float *mean_by_env, float *std_by_env, float *value, float *elite_std,
                   float *effective_samples, float *mean_change, int64_t envs, int64_t elites,
                   int64_t horizon, int64_t a_dim) {
    for (int64_t e = 0; e < envs; e++) {
        const float *w = weights + e * elites, *v = elite_values + e * elites;
        int64_t chosen = 0;
        float best = 0.0f;
        double weighted = 0.0, sum = 0.0, squares = 0.0, distances = 0.0, changes = 0.0;
        for (int64_t k = 0; k < elites; k++) {
            float score = logf(w[k]) + gumbel[e * elites + k];
            if (k == 0 || score > best || (isnan(score) && !isnan(best))) { /* torch's argmax */
                best = score;
                chosen = k;
            }
            weighted += w[k] * v[k];
            squares += w[k] * w[k];
            sum += v[k];
        }
        for (int64_t k = 0; k < elites; k++) {
            double distance = v[k] - sum / (double)elites;
            distances += distance * distance;
        }
        for (int64_t h = 0; h < horizon; h++)
            for (int64_t j = 0; j < a_dim; j++) {
                int64_t from = (h * envs + e) * a_dim + j, to = (e * horizon + h) * a_dim + j;
                float change = mean[from] - previous_mean[from];
                changes += change * change;
                mean_by_env[to] = mean[from];
                std_by_env[to] = std[from];
            }
        for (int64_t j = 0; j < a_dim; j++) {
            float a = first_actions[(e * elites + chosen) * a_dim + j];
            if (exploration) a += std[e * a_dim + j] * exploration[e * a_dim + j];
            a = a < -1.0f ? -1.0f : a;
            action[e * a_dim + j] = a > 1.0f ? 1.0f : a; /* NaN stays */
        }
        value[e] = (float)weighted;
        elite_std[e] = (float)sqrt(distances / (double)elites);
        effective_samples[e] = (float)(1.0 / squares);
        mean_change[e] = (float)(changes / (double)(horizon * a_dim));
    }
}
