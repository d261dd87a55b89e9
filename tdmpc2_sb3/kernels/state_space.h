/* The recurrence of state-space dynamics and what is beside it. */

/* GELU in its tanh approximation of a + b: x sigmoid(2 c (x + 0.044715 x^3)), c = sqrt(2 / pi). */
static inline void gelu_sum_row(const float *a, const float *b, float *y, int64_t cols) {
#pragma omp simd
    for (int64_t j = 0; j < cols; j++) {
        float x = a[j] + b[j];
        float inner = x * (1.5957691216f + 0.0713548163f * x * x);
        y[j] = x / (1.0f + exp_f(-inner));
    }
}

/* Rows of b lie b_row apart. */
void gelu_sum_forward(const float *a, const float *b, float *y, int64_t rows, int64_t cols,
                      int64_t b_row, int64_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t i = 0; i < rows; i++)
        gelu_sum_row(a + i * cols, b + i * b_row, y + i * cols, cols);
}

void gelu_sum_backward(const float *grad, const float *a, const float *b, float *grad_x,
                       int64_t rows, int64_t cols, int64_t b_row, int64_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t i = 0; i < rows; i++) {
        const float *ai = a + i * cols, *bi = b + i * b_row, *di = grad + i * cols;
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
 * hold real, then imaginary parts: drive rows of 2 modes, drive_row apart, [steps, rows]; start
 * [rows, 2 modes]; states [steps, rows, 2 modes]. */
void selective_scan_forward(const float *selection, const float *drive, const float *start,
                            const float *alpha, const float *omega, const float *beta,
                            float *states, int64_t steps, int64_t rows, int64_t modes,
                            int64_t drive_row, int64_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t i = 0; i < rows; i++) {
        const float *x = start + i * 2 * modes;
        for (int64_t k = 0; k < steps; k++) {
            float *out = states + (k * rows + i) * 2 * modes;
            scan_row(selection + (k * rows + i) * modes, drive + (k * rows + i) * drive_row, x,
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
                             int64_t modes, int64_t drive_row, int64_t threads) {
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
                const float *sel = selection + at * modes, *b = drive + at * drive_row;
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
