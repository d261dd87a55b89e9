/* What a planner evaluates, for a block of sequences at a time: networks and dynamics. */

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
        norm_rows(m->stream, width, it->gain, it->shift, m->normed, 0, 0, count, count, width,
                  it->eps, ACTIVATION_NONE, 1);
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
