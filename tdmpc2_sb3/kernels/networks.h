/* Whole networks on rows, and networks applied step after step to their own outputs. */

static inline int64_t whole_lines(int64_t numbers) { return (numbers + LINE - 1) / LINE * LINE; }

/* Numbers from one row to the next of what a network keeps within: an odd number of cache lines,
 * lest the same columns of many rows meet in a few sets of the caches. */
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

/* Rows that go through networks together: few enough for their activations to stay near, and many,
 * lest the weights have to come from afar too often. */
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

/* Product and norm of rows begin..end of all rows. Their input, reduced if the layer's is, is the
 * first x_dim numbers of rows of x, x_row apart, and behind those the rows of a, if the layer is
 * deeper. shared: the part of the product that is x's, one row for all, in which case x is not
 * read; else null. */
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
              rows, cols, it->eps * to->dropped.keep * to->dropped.keep, it->activation,
              it->simplex);
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

/* Dynamics of count layers applied step after step: z_1..z_steps, [steps, rows, Z], from z_0,
 * [rows, Z], under actions [steps, rows, A]. inputs: the layers' inputs (z, a), kept for
 * rollout_backward like the workspace. Every thread takes its rows through all steps. */
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
            int64_t begin = h * rows + rows * t / threads;
            int64_t end = h * rows + rows * (t + 1) / threads;
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
