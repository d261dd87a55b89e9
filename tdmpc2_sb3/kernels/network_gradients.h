/* Gradients of networks by their inputs and parameters. */

/* Where a layer's gradients are prepared. */
typedef struct {
    float *grad_product; /* by what comes before the norm, [rows, cols] */
    float *sums;       /* [threads, 3, cols] */
    float *rest;       /* of the input, columns beyond whole panels, [rows, PANEL] */
} gradient_place;

static inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

/* Numbers that a thread needs for itself: gathered columns, a share of the widest layer's, or
 * reduced rows of the gradients by an input, a block at a time. */
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
        places[l].grad_product = scratch, scratch += whole_lines(rows * it->cols);
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

/* Gradients of rows begin..end by what comes before the norm, and of that by the parameters. */
static const float *layer_backward(const layer *it, const place *kept, const gradient_place *to,
                                   const float *grad, float *sums, int64_t begin, int64_t end,
                                   int64_t rows) {
    int64_t cols = it->cols;
    if (it->gain) {
        norm_backward_rows(grad, kept->product, kept->output, kept->row, it->gain, it->shift,
                           kept->statistics, to->grad_product, sums, begin, end, rows, cols,
                           it->activation, it->simplex);
        drop(kept->dropped, to->grad_product, cols, begin, end, sums + 2 * cols, cols);
        return to->grad_product;
    }
    for (int64_t i = begin; i < end; i++)
#pragma omp simd
        for (int64_t j = 0; j < cols; j++) sums[2 * cols + j] += grad[i * cols + j];
    return grad;
}

/* Columns begin..end of grad_product, [rows, cols], as gathered rows: in place their numbers lie
 * so far apart that they fall out of the first cache before the next panel. */
static void gather_columns(const float *grad_product, int64_t cols, int64_t begin, int64_t end,
                           int64_t rows, float *gathered) {
    int64_t tiles = tiles_of(end - begin);
    for (int64_t from = 0; from < rows; from += LINE) { /* some rows, all cache lines of theirs */
        int64_t until = from + LINE < rows ? from + LINE : rows;
        const float *in = grad_product + begin;
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
static void expand_weight_gradient(const layer *it, float grad_bias, float *grad_weight) {
    int64_t inner = reduced_depth(it), outside = it->depth - it->simplices * SIMPLEX;
    memmove(grad_weight + it->depth - outside, grad_weight + inner - outside,
            sizeof(float) * (size_t)outside);
    for (int64_t g = it->simplices - 1; g >= 0; g--) { /* from behind: each moves by g numbers */
        float *to = grad_weight + g * SIMPLEX, last = grad_bias;
        memmove(to, grad_weight + g * (SIMPLEX - 1), sizeof(float) * (SIMPLEX - 1));
        for (int64_t k = 0; k < SIMPLEX - 1; k++) last -= to[k];
        to[SIMPLEX - 1] = last;
    }
}

/* Gradients of layers_forward, grad_output those by its output. x is reduced if the first layer's
 * input is. grad_input: by input_cols columns of x from input_from on, from which packed_back of
 * the first layer was laid out; added to what stands there if add_up_inputs; null if not wanted.
 * packs, packs_x: whether columns beyond whole panels of the layers' inputs, and of the first's,
 * are packed for parameter_gradients. own: what the thread has for itself. */
static void layers_backward(const layer *net, const place *kept, const gradient_place *to,
                            int64_t count, const float *x, int64_t x_row, const float *grad_output,
                            float *grad_input, int64_t input_from, int64_t input_cols,
                            int add_up_inputs, int packs, int packs_x, float *own, int64_t thread,
                            int64_t begin, int64_t end, int64_t rows) {
    for (int64_t until; begin < end; begin = until) {
        until = begin + block_rows(end - begin);
        const float *grad = grad_output;
        for (int64_t l = count - 1; l >= 0; l--) {
            const layer *it = net + l;
            int64_t cols = it->cols, input_row = l ? kept[l - 1].row : x_row;
            int64_t in_panels = reduced_depth(it) / PANEL * PANEL;
            const float *input = l ? kept[l - 1].output : x;
            const float *grad_product =
                layer_backward(it, kept + l, to + l, grad, to[l].sums + thread * 3 * cols, begin,
                               until, rows);
            if (l ? packs : packs_x)
                pack_columns(input + begin * input_row + in_panels, input_row, until - begin, 0,
                             reduced_depth(it) - in_panels, to[l].rest + begin * PANEL, rows);
            float *grad_x = l ? to[l - 1].grad_product : grad_input;
            int64_t width = l ? it->depth : input_cols, simplices = input_from ? 0 : it->simplices;
            int64_t inner = width - simplices, adds = !l && add_up_inputs;
            if (grad_x) {
                columns a = {grad_product + begin * cols, cols, cols};
                float *rows_x = grad_x + begin * width;
                product_rows(a, no_columns, it->packed_back, cols, adds && !simplices ? rows_x : 0,
                             width, simplices ? own : rows_x, inner, 0, until - begin, inner);
                if (simplices)
                    expand_rows(own, inner, rows_x, width, simplices, until - begin, (int)adds);
            }
            grad = grad_x;
        }
    }
}

static void clear_sums(const layer *net, const gradient_place *to, int64_t count, int64_t thread) {
    for (int64_t l = 0; l < count; l++)
        memset(to[l].sums + thread * 3 * net[l].cols, 0, sizeof(float) * (size_t)(3 * net[l].cols));
}

/* A thread's part of the sums over rows, once layers_backward is through with all: gradients of
 * the n-th of all networks by the parameters. grad_output: by its output. own: what it has for
 * itself. */
static void parameter_gradients(const layer *net, const place *kept, const gradient_place *to,
                                int64_t count, const float *x, int64_t x_row,
                                const float *grad_output, int64_t n, int64_t networks,
                                float *const *grad_parameters, float *own, int64_t rows,
                                int64_t thread, int64_t threads) {
    for (int64_t l = 0; l < count; l++) {
        const layer *it = net + l;
        int64_t cols = it->cols, depth = it->depth, tiles = tiles_of(cols);
        const float *grad_product =
            l == count - 1 && !it->gain ? grad_output : to[l].grad_product;
        float *grad_weight = grad_parameters[l] + n * cols * depth;
        float *grad_vectors = grad_parameters[l] + networks * cols * depth + n * cols;
        for (int64_t v = 0; v < 3; v++)
            add_up(to[l].sums + v * cols, grad_vectors + v * networks * cols,
                   cols * thread / threads, cols * (thread + 1) / threads, 3 * cols, threads);
        int64_t begin = cols * (tiles * thread / threads) / tiles;
        int64_t end = cols * (tiles * (thread + 1) / threads) / tiles;
        gather_columns(grad_product, cols, begin, end, rows, own);
        right_matrix input = {l ? kept[l - 1].output : x, rows, to[l].rest,
                              l ? kept[l - 1].row : x_row};
        gathered_rows(own, end - begin, rows, input, grad_weight + begin * depth, depth,
                      reduced_depth(it));
        for (int64_t j = begin; it->simplices && j < end; j++) {
            float grad_bias;
            add_up(to[l].sums + 2 * cols + j, &grad_bias, 0, 1, 3 * cols, threads);
            expand_weight_gradient(it, grad_bias, grad_weight + j * depth);
        }
    }
}

/* Gradients of networks_forward with keep, whose dropout, workspaces and result these are. grad:
 * by the result. grad_input: by input_cols columns of x from input_from on, from which packed_back
 * of the first layers was laid out, [rows, input_cols], added up over the networks, and to what
 * stands there if adds; null if not wanted. They contain all simplices, or none. grad_parameters:
 * of each of the count layers by the weights, [networks, cols, depth], and behind those by gains,
 * shifts and biases, [3, networks, cols]; null if not wanted. scratches: one a network. */
void networks_backward(const layer *layers, int64_t count, int64_t networks, const float *x,
                       int64_t x_row, const int64_t *dropped, int64_t count_dropped, float share,
                       float *const *workspaces, float *result, const float *grad,
                       float *grad_input, int64_t input_from, int64_t input_cols, int64_t adds,
                       float *const *grad_parameters, float *const *scratches, int64_t rows,
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
                            grad_input, input_from, input_cols, adds || n, grad_parameters != 0,
                            grad_parameters && !n, own + t * own_numbers, t, rows * t / threads,
                            rows * (t + 1) / threads, rows);
        }
    if (!grad_parameters) return;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t t = 0; t < threads; t++)
        for (int64_t n = 0; n < networks; n++) {
            FIND_PLACES
            parameter_gradients(net, kept, to, count, input, input_row, grad + n * rows * last, n,
                                networks, grad_parameters, own + t * own_numbers, rows, t, threads);
        }
#undef FIND_PLACES
}

/* Gradients of rollout_forward with keep, whose inputs, workspace and latents these are.
 * grad_latents: by z_0..z_steps as far as they do not come from later latents, [1 + steps, rows,
 * Z]; afterwards in full. grad_parameters: see networks_backward. */
void rollout_backward(const layer *layers, int64_t count, const float *inputs, float *workspace,
                      float *latents, float *grad_latents, float *const *grad_parameters,
                      float *scratch, int64_t steps, int64_t rows, int64_t threads) {
    int64_t z_dim = layers[count - 1].cols, all = steps * rows;
    const float *x = layers->simplices ? workspace : inputs;
    int64_t x_row = layers->simplices ? row_of(reduced_depth(layers)) : layers->depth;
    place all_places[count], *kept = all_places;
    gradient_place all_gradients[count], *to = all_gradients;
    find_places(layers, count, 1, all, nothing_dropped, workspace, latents, kept);
    int64_t own_numbers = own_size(layers, count, all, threads);
    float *own = find_gradient_places(layers, count, all, threads, scratch, to);
    /* A step's input is row for row its output's. */
    const float *grad_next = grad_latents + rows * z_dim;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t t = 0; t < threads; t++) {
        clear_sums(layers, to, count, t);
        for (int64_t h = steps - 1; h >= 0; h--)
            layers_backward(layers, kept, to, count, x, x_row, grad_next, grad_latents, 0, z_dim, 1,
                            1, 1, own + t * own_numbers, t, h * rows + rows * t / threads,
                            h * rows + rows * (t + 1) / threads, all);
    }
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t t = 0; t < threads; t++)
        parameter_gradients(layers, kept, to, count, x, x_row, grad_next, 0, 1, grad_parameters,
                            own + t * own_numbers, all, t, threads);
}
