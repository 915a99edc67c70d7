/* Second moments of inputs in bfloat16, summed in float32: H = mean of x x^T, gap = mean of (f - x) x^T.

   Some tokens at a time are rounded to bfloat16 and packed into panels: PANEL columns of two tokens after each other, as the
   product of bfloat16 pairs wants them. Both operands of every product come from such panels, so nothing is packed twice. A
   tile of STEP rows and PANEL columns of a result stays in registers. H is computed from its diagonal panels on; what lies
   below them is left as it is. Threads divide panels, then pairs of panels. T tokens, C columns. */

#include <stdint.h>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512BF16__)
#include <immintrin.h>

#define LANES 16
#define WIDE 3 /* registers across a panel */
#define PANEL (WIDE * LANES)
#define STEP 8 /* rows of a tile: STEP * WIDE sums, WIDE columns and one row fit 32 registers */
#define SOME 512 /* tokens at a time; with fewer, reading and writing the results shows */

typedef struct {
    const void *at;
    int half; /* whether in bfloat16, else float32 */
} Inputs;

/* Sixteen numbers from a place on, those of `which`; the others are zero. */
static inline __m512 floats_at(Inputs x, long place, __mmask16 which) {
    if (x.half) {
        const __m256i bits = _mm256_maskz_loadu_epi16(which, (const uint16_t *)x.at + place);
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
    }
    return _mm512_maskz_loadu_ps(which, (const float *)x.at + place);
}

/* Sixteen numbers of two tokens in bfloat16, the two of a column side by side. */
static inline __m512i paired(__m512 one, __m512 other) {
    const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(one));
    const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(other));
    return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

/* The columns of a panel that there are, for one of its registers. */
static inline __mmask16 present(long columns, long first) {
    const long left = columns - first;
    return left >= LANES ? 0xffff : left > 0 ? (__mmask16)((1u << left) - 1) : 0;
}

/* Pack one panel of x, and of f - x if there is f; add their columns to sums and raise the largest magnitudes. */
static void pack(Inputs x, const Inputs *f, long tokens, long columns, long panel, uint32_t *packed, uint32_t *packed_gap,
                 float *sum_x, float *sum_f, float *top) {
    for (long w = 0; w < WIDE; w++) {
        const long first = panel * PANEL + w * LANES;
        const __mmask16 which = present(columns, first);
        __m512 added_x = _mm512_setzero_ps(), added_f = _mm512_setzero_ps(), largest = _mm512_setzero_ps();
        for (long t = 0; t < tokens; t += 2) {
            const __mmask16 next = t + 1 < tokens ? which : 0;
            const long here = t * columns + first, after = here + columns;
            const __m512 x0 = floats_at(x, here, which), x1 = floats_at(x, after, next);
            added_x = _mm512_add_ps(added_x, _mm512_add_ps(x0, x1));
            const __m512 larger = _mm512_max_ps(_mm512_abs_ps(x0), _mm512_abs_ps(x1));
            largest = _mm512_max_ps(largest, larger);
            _mm512_storeu_si512(packed + t / 2 * PANEL + w * LANES, paired(x0, x1));
            if (f) {
                const __m512 f0 = floats_at(*f, here, which), f1 = floats_at(*f, after, next);
                added_f = _mm512_add_ps(added_f, _mm512_add_ps(f0, f1));
                const __m512i gap = paired(_mm512_sub_ps(f0, x0), _mm512_sub_ps(f1, x1));
                _mm512_storeu_si512(packed_gap + t / 2 * PANEL + w * LANES, gap);
            }
        }
        _mm512_mask_storeu_ps(sum_x + first, which, _mm512_add_ps(_mm512_maskz_loadu_ps(which, sum_x + first), added_x));
        _mm512_mask_storeu_ps(top + first, which, _mm512_max_ps(_mm512_maskz_loadu_ps(which, top + first), largest));
        if (f)
            _mm512_mask_storeu_ps(sum_f + first, which, _mm512_add_ps(_mm512_maskz_loadu_ps(which, sum_f + first), added_f));
    }
}

/* kept * result + share * sum, for one register of a row of the result. */
static inline void store(float *result, long columns, long row, long first, __m512 sum, float kept, float share) {
    const __mmask16 which = row < columns ? present(columns, first) : 0;
    float *at = result + row * columns + first;
    const __m512 before = _mm512_mul_ps(_mm512_maskz_loadu_ps(which, at), _mm512_set1_ps(kept));
    _mm512_mask_storeu_ps(at, which, _mm512_fmadd_ps(sum, _mm512_set1_ps(share), before));
}

/* For each row of a tile; an array of sums would not stay in registers. */
#define ROWS(DO) DO(0) DO(1) DO(2) DO(3) DO(4) DO(5) DO(6) DO(7)
#define DECLARE(r) __m512 a##r = _mm512_setzero_ps(), b##r = a##r, c##r = a##r;
#define ADD(r) \
    row = (__m512bh)_mm512_set1_epi32((int)left[r]); \
    a##r = _mm512_dpbf16_ps(a##r, row, first); \
    b##r = _mm512_dpbf16_ps(b##r, row, second); \
    c##r = _mm512_dpbf16_ps(c##r, row, third);
#define STORE(r) \
    store(result, columns, top + r, column, a##r, kept, share); \
    store(result, columns, top + r, column + LANES, b##r, kept, share); \
    store(result, columns, top + r, column + 2 * LANES, c##r, kept, share);

/* A block of a result, rows of panel `a` and columns of panel `b`: kept * result + share * a b^T. */
static void multiply(const uint32_t *rows, const uint32_t *others, long pairs, long columns, long row_panel,
                     long column_panel, float kept, float share, float *result) {
    const long column = column_panel * PANEL;
    for (long step = 0; step < PANEL; step += STEP) {
        const long top = row_panel * PANEL + step;
        if (top >= columns) return;
        const uint32_t *left = rows + step, *right = others;
        ROWS(DECLARE)
        for (long p = 0; p < pairs; p++, left += PANEL, right += PANEL) {
            const __m512bh first = (__m512bh)_mm512_loadu_ps(right);
            const __m512bh second = (__m512bh)_mm512_loadu_ps(right + LANES);
            const __m512bh third = (__m512bh)_mm512_loadu_ps(right + 2 * LANES);
            __m512bh row;
            ROWS(ADD)
        }
        ROWS(STORE)
    }
}

/* How many 32-bit words of room `moments_add` needs for each of x and f - x. */
long moments_room(long columns) { return (columns + PANEL - 1) / PANEL * PANEL * (SOME / 2); }

/* H = kept H + share sum of x x^T, from the diagonal panels on; likewise gap with (f - x) x^T, whole, if there is f. The sums
   of columns and the largest magnitudes are added to what is there. x and f are [T, C], `room` holds two times moments_room. */
void moments_add(const void *x, int x_half, const void *f, int f_half, long tokens, long columns, float kept, float share,
                 float *H, float *gap, float *sum_x, float *sum_f, float *top, uint32_t *room, int threads) {
    const long panels = (columns + PANEL - 1) / PANEL, length = PANEL * (SOME / 2);
    uint32_t *room_gap = room + moments_room(columns);
    for (long start = 0; start < tokens; start += SOME) {
        const long some = tokens - start < SOME ? tokens - start : SOME, pairs = (some + 1) / 2;
        const Inputs here = {(const char *)x + start * columns * (x_half ? 2 : 4), x_half};
        const Inputs full = {(const char *)f + start * columns * (f_half ? 2 : 4), f_half};
        const float before = start ? 1 : kept;
#pragma omp parallel num_threads(threads)
        {
#pragma omp for schedule(static)
            for (long p = 0; p < panels; p++)
                pack(here, f ? &full : 0, some, columns, p, room + p * length, room_gap + p * length, sum_x, sum_f, top);
#pragma omp for schedule(dynamic, 4)
            for (long pair = 0; pair < panels * panels; pair++) {
                const long p = pair / panels, q = pair % panels;
                if (q >= p) multiply(room + p * length, room + q * length, pairs, columns, p, q, before, share, H);
                if (f) multiply(room_gap + p * length, room + q * length, pairs, columns, p, q, before, share, gap);
            }
        }
    }
}

int moments_works(void) { return 1; }

#else

/* Without products of bfloat16 there is no kernel. */
int moments_works(void) { return 0; }

#endif
