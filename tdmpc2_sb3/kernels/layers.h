/* The layers of networks, and their weights laid out for products. */

static inline int64_t panels_of(int64_t cols) { return (cols + PANEL - 1) / PANEL; }

/* A latent consists of simplices, SIMPLEX numbers each that sum to 1. The last of them is 1 less
 * the others and is left out of products: with w their weights and c the last one's,
 *     w z + c (1 - sum z) = c + (w - c) z,
 * so the others' weights are laid out less the last one's, which is added to the bias. Rows
 * without those numbers are called reduced. A gradient by a reduced row is one by the whole row up
 * to the same number for all of a simplex, which SimNorm's own gradient takes out again. */

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
            if (g < simplices - 1) memcpy(out, numbers, sizeof numbers); /* and one too many */
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
