/* Vector registers: numbers in them, their exponentials and sums. */

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
