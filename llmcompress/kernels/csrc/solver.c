/* The parts of the solver of codes that go weight by weight or column by column.

   Grids have at most sixteen levels, in ascending order, or are even: -largest / largest, ..., -1 / largest, 0 and so on to 1.
   The level nearest to x is the one whose index is the number of midpoints below x, as torch.bucketize has it: with AVX-512
   by a binary search in registers, else by comparing x with each. On an even grid it is found by rounding. Codebooks are grids
   of which each serves some adjacent rows, one row at least.
   Matrices of the column loops are transposed, [C, R], so that a column is contiguous and its rows are done at once. Threads
   divide the rows. R rows (outputs), C columns (inputs), G groups of columns with one scale. */

#include <math.h>
#include <stdint.h>

#if defined(__AVX512F__) && defined(__AVX512DQ__)
#include <immintrin.h>
#define WIDE 1
#else
#define WIDE 0
#endif

#define MOST 16 /* levels */
#define ROWS 64 /* of a column at a time, so that a block of 64 such columns stays in the first cache */

#define SIDE 16 /* rows of a column that are compared at once */
typedef float Side __attribute__((vector_size(SIDE * 4), aligned(4)));
typedef int32_t Sides __attribute__((vector_size(SIDE * 4), aligned(4)));

typedef struct {
    float level[MOST], middle[MOST];
    float largest; /* of an even grid; else zero */
} Grid;

/* A grid of sixteen levels: one with fewer is filled up with its last level, which nothing is nearer to. One with more is
   even. */
static Grid grid_of(const float *levels, const float *middles, int count) {
    Grid grid;
    grid.largest = count > MOST ? (count - 1) / 2 : 0;
    for (int l = 0; l < MOST; l++) {
        grid.level[l] = levels[l < count ? l : count - 1];
        grid.middle[l] = l < count - 1 ? middles[l] : INFINITY;
    }
    return grid;
}

#if WIDE
typedef __m512 Floats;
#define LANES 16
#define LOAD(from) _mm512_loadu_ps(from)

static inline __m512i search(Floats x, Floats middle) {
    __m512i found = _mm512_setzero_si512();
    for (int half = MOST / 2; half; half /= 2) {
        const Floats at = _mm512_permutexvar_ps(_mm512_add_epi32(found, _mm512_set1_epi32(half - 1)), middle);
        found = _mm512_mask_add_epi32(found, _mm512_cmp_ps_mask(x, at, _CMP_GT_OQ), found, _mm512_set1_epi32(half));
    }
    return found;
}

/* Indices of the levels nearest to x, and these levels. */
static inline __attribute__((always_inline)) __m512i nearest(const Grid *grid, Floats x, Floats *level) {
    if (grid->largest > 0) {
        const Floats top = _mm512_set1_ps(grid->largest), bottom = _mm512_set1_ps(-grid->largest);
        const Floats below = _mm512_fmsub_ps(x, top, _mm512_set1_ps(0.5f));
        const Floats up = _mm512_roundscale_ps(below, _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC);
        const Floats code = _mm512_min_ps(_mm512_max_ps(up, bottom), top);
        *level = _mm512_div_ps(code, top);
        return _mm512_cvtps_epi32(_mm512_add_ps(code, top));
    }
    const __m512i found = search(x, LOAD(grid->middle));
    *level = _mm512_permutexvar_ps(found, LOAD(grid->level));
    return found;
}
#endif

static inline __attribute__((always_inline)) int index_of(const Grid *grid, float x) {
    if (grid->largest > 0) {
        const float up = ceilf(x * grid->largest - 0.5f);
        return (int)(fminf(fmaxf(up, -grid->largest), grid->largest) + grid->largest);
    }
    int found = 0;
    for (int l = 0; l < MOST - 1; l++) found += x > grid->middle[l];
    return found;
}

static inline __attribute__((always_inline)) float level_at(const Grid *grid, int index) {
    return grid->largest > 0 ? (index - grid->largest) / grid->largest : grid->level[index];
}

/* The error of a group under one scale, each weight's square weighted by h. */
static inline __attribute__((always_inline)) float error_of(const Grid *grid, const float *w, const float *h, long size,
                                                            float scale) {
    float error = 0;
    long c = 0;
#if WIDE
    const Floats by = _mm512_set1_ps(scale);
    Floats sum = _mm512_setzero_ps();
    for (; c + LANES <= size; c += LANES) {
        const Floats weight = LOAD(w + c);
        Floats q;
        nearest(grid, _mm512_div_ps(weight, by), &q);
        const Floats lost = _mm512_sub_ps(weight, _mm512_mul_ps(q, by));
        sum = _mm512_fmadd_ps(_mm512_mul_ps(lost, lost), LOAD(h + c), sum);
    }
    error = _mm512_reduce_add_ps(sum);
#endif
    for (; c < size; c++) {
        const float lost = w[c] - level_at(grid, index_of(grid, w[c] / scale)) * scale;
        error += lost * lost * h[c];
    }
    return error;
}

/* For the elements of a column: indices of the levels nearest to x, and these levels times the scale. */
static inline __attribute__((always_inline)) void round_column(const Grid *grid, const float *x, const float *scale, long some,
                                                               int64_t *index, float *q) {
    long r = 0;
#if WIDE
    for (; r + LANES <= some; r += LANES) {
        const Floats by = LOAD(scale + r);
        Floats level;
        const __m512i found = nearest(grid, _mm512_div_ps(LOAD(x + r), by), &level);
        _mm512_storeu_si512(index + r, _mm512_cvtepi32_epi64(_mm512_castsi512_si256(found)));
        _mm512_storeu_si512(index + r + 8, _mm512_cvtepi32_epi64(_mm512_extracti64x4_epi64(found, 1)));
        _mm512_storeu_ps(q + r, _mm512_mul_ps(level, by));
    }
#endif
    for (; r < some; r++) {
        const int found = index_of(grid, x[r] / scale[r]);
        index[r] = found, q[r] = level_at(grid, found) * scale[r];
    }
}

/* Grids of `entries` levels, a power of two, each for `shared` adjacent rows; none are shared by 0. */
typedef struct {
    const float *levels, *middles; /* [G, entries], [G, entries - 1] */
    int entries;
    long shared;
} Codebooks;

/* The grids of ROWS rows, level by level. */
typedef struct {
    float level[MOST][ROWS], middle[MOST][ROWS];
    int32_t first[ROWS]; /* index of a row's first level in the table of all */
    long book[ROWS];
} Shelf;

static void take(Shelf *shelf, const Codebooks *books, long start, long some) {
    if (!books->shared) return;
    for (long r = 0; r < ROWS; r++) {
        const long book = (start + (r < some ? r : 0)) / books->shared;
        shelf->book[r] = book, shelf->first[r] = (int32_t)(book * books->entries);
        for (int l = 0; l < books->entries && books->entries <= MOST; l++) {
            shelf->level[l][r] = books->levels[book * books->entries + l];
            if (l < books->entries - 1) shelf->middle[l][r] = books->middles[book * (books->entries - 1) + l];
        }
    }
}

/* As `round_column`, each row on its own grid. */
static inline void round_shelf(const Shelf *shelf, const Codebooks *books, const float *x, const float *scale, long some,
                               int64_t *index, float *q) {
    float value[ROWS] = {0};
    for (long r = 0; r < some; r++) value[r] = x[r] / scale[r];
    if (books->entries > MOST) {
        for (long r = 0; r < some; r++) {
            const float *middle = books->middles + shelf->book[r] * (books->entries - 1);
            int found = 0;
            for (int half = books->entries / 2; half; half /= 2) found += value[r] > middle[found + half - 1] ? half : 0;
            index[r] = shelf->first[r] + found, q[r] = books->levels[index[r]] * scale[r];
        }
        return;
    }
    for (long r = 0; r < some; r += SIDE) {
        const Side x = *(const Side *)(value + r);
        Sides found = *(const Sides *)(shelf->first + r), level = *(const Sides *)(shelf->level[0] + r);
        for (int l = 0; l < books->entries - 1; l++) {
            const Sides above = x > *(const Side *)(shelf->middle[l] + r);
            found -= above;
            level = (above & *(const Sides *)(shelf->level[l + 1] + r)) | (~above & level);
        }
        const Side nearest = (Side)level;
        for (long i = 0; i < SIDE && r + i < some; i++) index[r + i] = found[i], q[r + i] = nearest[i] * scale[r + i];
    }
}

/* Scales [R, G] with the least error weighted by h [C], among `ratios` times the largest magnitude of each group. */
void solver_search(const float *weight, const float *h, const float *levels, const float *middles, int count,
                   const float *ratios, int tried, long rows, long columns, long size, float *scales, int threads) {
    const Grid grid = grid_of(levels, middles, count);
    const long groups = columns / size;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long at = 0; at < rows * groups; at++) {
        const float *w = weight + at * size, *weighing = h + at % groups * size;
        float top = 0;
        for (long c = 0; c < size; c++) top = fmaxf(top, fabsf(w[c]));
        if (!(top > 0)) top = 1;
        float best = top, least = INFINITY;
        for (int t = 0; t < tried; t++) {
            const float error = error_of(&grid, w, weighing, size, top * ratios[t]);
            if (error < least) least = error, best = top * ratios[t];
        }
        scales[at] = best;
    }
}

/* Push what a column lost, or moved by, onto the later columns of its block: other -= by * step. */
static inline void push(float *near, const float *by, const float *step, long from, long width, long rows, long some) {
    for (long later = from; later < width; later++) {
        float *restrict other = near + later * rows;
        const float times = by[later];
#pragma omp simd
        for (long r = 0; r < some; r++) other[r] -= times * step[r];
    }
}

/* A block of GPTQ: near [width, R] are its columns, which are used up; U [width, ld] the rows of the factor, from the
   block's own columns on. There is one grid of `count` levels if `shared` is 0; else each grid serves so many rows, and
   indices count through the levels of all. Leaves the indices and the errors over the diagonal of U, both [width, R]. */
void solver_round(float *near, const float *U, long ld, const float *scale, const float *levels, const float *middles,
                  int count, long shared, long width, long rows, int64_t *index, float *errors, int threads) {
    const Grid grid = grid_of(levels, middles, count);
    const Codebooks books = {levels, middles, count, shared};
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long start = 0; start < rows; start += ROWS) {
        const long some = rows - start < ROWS ? rows - start : ROWS;
        Shelf shelf;
        float q[ROWS];
        take(&shelf, &books, start, some);
        for (long c = 0; c < width; c++) {
            const long at = c * rows + start;
            const float diagonal = U[c * ld + c];
            if (shared) round_shelf(&shelf, &books, near + at, scale + at, some, index + at, q);
            else round_column(&grid, near + at, scale + at, some, index + at, q);
            for (long r = 0; r < some; r++) errors[at + r] = (near[at + r] - q[r]) / diagonal;
            push(near + start, U + c * ld, errors + at, c + 1, width, rows, some);
        }
    }
}

/* A block of coordinate descent: near [width, R] is minus half the gradient of its columns, Q [width, R] their weights;
   H [width, ld] the rows of the second moments, from the block's own columns on; grids as above. Leaves the new indices
   and what the weights change by, both [width, R]. */
void solver_move(float *near, const float *H, long ld, const float *Q, const float *scale, const float *levels,
                 const float *middles, int count, long shared, long width, long rows, int64_t *index, float *moved,
                 int threads) {
    const Grid grid = grid_of(levels, middles, count);
    const Codebooks books = {levels, middles, count, shared};
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long start = 0; start < rows; start += ROWS) {
        const long some = rows - start < ROWS ? rows - start : ROWS;
        Shelf shelf;
        float q[ROWS], x[ROWS];
        take(&shelf, &books, start, some);
        for (long c = 0; c < width; c++) {
            const long at = c * rows + start;
            const float curvature = H[c * ld + c];
            if (curvature > 0) {
                for (long r = 0; r < some; r++) x[r] = Q[at + r] + near[at + r] / curvature;
                if (shared) round_shelf(&shelf, &books, x, scale + at, some, index + at, q);
                else round_column(&grid, x, scale + at, some, index + at, q);
                for (long r = 0; r < some; r++) moved[at + r] = q[r] - Q[at + r];
                push(near + start, H + c * ld, moved + at, c + 1, width, rows, some);
            } else
                for (long r = 0; r < some; r++) moved[at + r] = 0;
        }
    }
}

/* The index of the level nearest to x on the grid of a codebook, and this level. */
static inline __attribute__((always_inline)) int64_t index_in(const Codebooks *books, long book, float x, float *level) {
    const float *middle = books->middles + book * (books->entries - 1);
    int64_t found = 0;
    for (int half = books->entries / 2; half; half /= 2) found += x > middle[found + half - 1] ? half : 0;
    found += book * books->entries;
    *level = books->levels[found];
    return found;
}

/* As `solver_move`, for at most ROWS rows that count together: F [R, R] weighs them, and near is minus half the gradient under
   both H and F. Weights move one by one, along each column in turn. The codebooks count from `first` rows before these.
   Leaves the new indices and what the weights change by. */
void solver_move_together(float *near, const float *H, long ld, const float *F, const float *Q, const float *scale,
                          const float *levels, const float *middles, int count, long shared, long first, long width, long rows,
                          int64_t *index, float *moved) {
    const Grid grid = grid_of(levels, middles, count);
    const Codebooks books = {levels, middles, count, shared};
    for (long c = 0; c < width; c++) {
        const long at = c * rows;
        const float curvature = H[c * ld + c];
        float pushed[ROWS] = {0}; /* what the rows moved by in this column, weighed by F */
        int any = 0;
        for (long r = 0; r < rows; r++) {
            const float *weigh = F + r * rows;
            moved[at + r] = 0;
            if (!(curvature > 0 && weigh[r] > 0)) continue;
            const float slope = near[at + r] - curvature * pushed[r];
            const float best = (Q[at + r] + slope / (curvature * weigh[r])) / scale[at + r];
            float level;
            if (shared) index[at + r] = index_in(&books, (first + r) / shared, best, &level);
            else index[at + r] = index_of(&grid, best), level = level_at(&grid, (int)index[at + r]);
            const float step = level * scale[at + r] - Q[at + r];
            if (step == 0) continue;
            moved[at + r] = step, any = 1;
#pragma omp simd
            for (long other = 0; other < rows; other++) pushed[other] += step * weigh[other];
        }
        if (any) push(near, H + c * ld, pushed, c, width, rows, rows);
    }
}
