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
            if (cols == PANEL)
                memcpy(panel + k * PANEL, b + k * b_row + begin, sizeof(float) * PANEL);
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

/* sum += a times a panel, gathered columns having their rows side by side. Of whole tiles four
 * columns are taken between two looks at whether there are more. */
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

/* cols: of c from here on; of more than a panel's only those of it are meant. Fewer go by an edge
 * that is as wide as a panel, in place of c. */
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

/* From this many tiles of rows on they take a panel in turn; then none has less than TILE_ROWS -
 * 1. */
#define MANY_TILES 16

/* A matrix on the right: all of it in panels, or its first columns, as many as there are whole
 * panels, where they are, and the others in a panel of their own. */
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

/* Rows of the product of a, and more behind it, with b, into c, whose rows are c_row apart. Where
 * there are many, each panel of b goes through all their tiles while it is in the first cache, and
 * meanwhile the next one is fetched, and what will be written: all of b may be too large for the
 * second cache. A few leave that to the processor. Gathered rows of a are tile after tile, [depth,
 * rows]. */
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

/* Rows begin..end of the product of a, and more behind it, with b, into c, whose rows are c_row
 * floats apart. The panels of b are panel_depth deep; fewer columns than that take as many rows of
 * them from packed on. start: what the product is added to, rows start_row floats apart: a bias
 * where that is 0, what is in c already where it is c; null for nothing. */
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
