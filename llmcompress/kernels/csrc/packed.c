/* Products of few tokens and weights of 8 or 4 bits, straight from the stored bytes, as decoding needs them.

   - packed_table: 4-bit codes, the even column in the high half of a byte, that stand for sixteen levels times the scale of a
     group of columns. Each weight is rounded to a float as a dequantised one is; inputs and sums are floats.
   - packed_floats: int8 codes under one scale per row; inputs and sums are floats.
   - packed_integers: tokens rounded to int8 times int8 codes, or times 4-bit codes with an integer multiplier per group; sums are
     int32 and exact.

   Groups are multiples of 32 columns, of which a UNIT is one. Inputs are rearranged once to the order in which weights come out of
   a register. R rows (outputs), C columns (inputs), T tokens. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "lookup_wide.h"
#if !WIDE
#define INLINE static inline
enum { BLOCK = 32, ROWS = 1, TOKENS = 4 };
#endif

enum { UNIT = 32, MOST = 4 };        /* columns; rows of a tile */
enum { FLOAT32, FLOAT16, UINT8, NESTED }; /* types of scales */
enum { DYNAMIC, STATIC, LLM_INT8 };  /* roundings of tokens */

/* Which form was compiled. */
const char *packed_form(void) { return FORMS[WIDE / 256]; }

INLINE float of_bits(uint32_t bits) {
    float value;
    return memcpy(&value, &bits, 4), value;
}

INLINE uint32_t bits_of(float value) {
    uint32_t bits;
    return memcpy(&bits, &value, 4), bits;
}

INLINE float of_half(uint16_t half) {
#ifdef __F16C__
    return _cvtsh_ss(half);
#else
    const uint32_t sign = (uint32_t)(half & 0x8000) << 16, rest = half & 0x7fff;
    if (rest >= 0x7c00) return of_bits(sign | 0x7f800000 | (rest & 0x3ff) << 13);
    return of_bits(bits_of(of_bits(rest << 13) * 0x1p112f) | sign); /* subnormal ones too */
#endif
}

INLINE uint16_t to_bfloat(float value) {
    const uint32_t bits = bits_of(value), nan = (bits & 0x7fffffff) > 0x7f800000;
    return (uint16_t)(nan ? bits >> 16 | 0x40 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

/* Floats of a row of x, which has floats or, with `halves`, bfloat16. */
static void read_row(const void *x, int halves, long t, long C, float *out) {
    if (!halves) {
        memcpy(out, (const float *)x + t * C, (size_t)C * 4);
        return;
    }
    const uint16_t *in = (const uint16_t *)x + t * C;
    for (long c = 0; c < C; c++) out[c] = of_bits((uint32_t)in[c] << 16);
}

/* What is made of sums: y [T, R] in floats or bfloat16, scaled by row and with a bias, where there are such. */
typedef struct {
    void *y;
    int halves;
    long R;
    const float *scale, *bias;
} Output;

INLINE void put(const Output *out, long t, long r, float value) {
    if (out->bias) value += out->bias[r];
    if (out->halves)
        ((uint16_t *)out->y)[t * out->R + r] = to_bfloat(value);
    else
        ((float *)out->y)[t * out->R + r] = value;
}

/* Calls `name` with the number of rows and tokens as constants. */
#define CASE(name, count, ...) \
    case count: \
        if (rows == 1) name(__VA_ARGS__, 1, count); \
        else name(__VA_ARGS__, MOST, count); \
        break;
#define TILED(name, ...) \
    switch (tokens) { \
        CASE(name, 1, __VA_ARGS__) CASE(name, 2, __VA_ARGS__) CASE(name, 3, __VA_ARGS__) CASE(name, 4, __VA_ARGS__) \
    }

/* The bytes of a row in blocks of `size`, the last of them from `tail`, where it was copied if it is not whole. */
typedef struct {
    const uint8_t *row[MOST], *end[MOST];
} Bytes;

INLINE void take_row(Bytes *at, int i, const uint8_t *row, long bytes, long blocks, long size, uint8_t *tail) {
    const long before = (blocks - 1) * size;
    at->row[i] = row, at->end[i] = row + before;
    if (bytes < blocks * size) at->end[i] = memcpy(memset(tail, 0, (size_t)size), row + before, (size_t)(bytes - before));
}

INLINE const uint8_t *block_at(const Bytes *at, int i, long b, long blocks, long size) {
    return b < blocks - 1 ? at->row[i] + b * size : at->end[i];
}

/* 4-bit codes times levels and scales. */

typedef struct {
    const uint8_t *packed;
    const float *levels; /* sixteen */
    const void *scales;  /* [R, groups] */
    int type;
    const float *nested, *nested_levels, *offset; /* a scale is nested_levels[code] * nested[place / 256] + offset */
    long C, group, groups;
} Table;

/* The scales of the groups of a row as floats, in `out` or where they are. */
static const float *scales_of(const Table *w, long r, float *out) {
    const long first = r * w->groups;
    if (w->type == FLOAT32) return (const float *)w->scales + first;
    if (w->type == FLOAT16) {
        const uint16_t *in = (const uint16_t *)w->scales + first;
        long g = 0;
#if defined(__F16C__) && WIDE
        for (; g + 8 <= w->groups; g += 8)
            _mm256_storeu_ps(out + g, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(in + g))));
#endif
        for (; g < w->groups; g++) out[g] = of_half(in[g]);
        return out;
    }
    const uint8_t *in = (const uint8_t *)w->scales + first;
    for (long g = 0; g < w->groups;) { /* up to the end of the row, or of those under one nested scale */
        const long shared = 256 - (first + g) % 256, until = g + shared < w->groups ? g + shared : w->groups;
        if (w->type == UINT8) {
            for (; g < until; g++) out[g] = in[g];
            continue;
        }
        const float nested = w->nested[(first + g) / 256], offset = *w->offset;
        for (; g < until; g++) out[g] = w->nested_levels[in[g]] * nested + offset;
    }
    return out;
}

/* A scale for each unit of a row, in `out`, which has room for twice as many. Units beyond the columns meet inputs of zero. */
static void read_scales(const Table *w, long r, long units, float *out) {
    const long each = w->group / UNIT;
    const float *in = scales_of(w, r, out + units);
    long g = 0;
    if (each == 1) {
        g = units < w->groups ? units : w->groups;
        memcpy(out, in, (size_t)g * sizeof(float));
    } else if (each == 2) {
        for (; g < w->groups && 2 * g + 1 < units; g++) out[2 * g] = out[2 * g + 1] = in[g];
    }
    for (; g * each < units; g++)
        for (long u = g * each; u < (g + 1) * each && u < units; u++) out[u] = in[g < w->groups ? g : w->groups - 1];
}

#if WIDE == 512

INLINE void table_dots(const Bytes *at, const float *levels, const float *scales, long units, const float *x, long stride,
                       long blocks, float (*found)[TOKENS], const int rows, const int tokens) {
    const __m512 table = _mm512_loadu_ps(levels);
    __m512 sums[MOST][TOKENS][2];
    const int chains = tokens < 3 ? 2 : 1; /* of sums, more for fewer tokens */
    for (int i = 0; i < rows; i++)
        for (int t = 0; t < tokens; t++) sums[i][t][0] = sums[i][t][1] = _mm512_setzero_ps();
    for (long b = 0; b < blocks; b++)
        for (int i = 0; i < rows; i++) {
            const uint8_t *bytes = block_at(at, i, b, blocks, BLOCK / 2);
            const __m512i pair = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)bytes)); /* a permute reads four bits */
            const __m512 own = _mm512_mul_ps(table, _mm512_set1_ps(scales[i * units + b]));
            const __m512 even = _mm512_permutexvar_ps(_mm512_srli_epi32(pair, 4), own);
            const __m512 odd = _mm512_permutexvar_ps(pair, own);
            for (int t = 0; t < tokens; t++) {
                const float *in = x + t * stride + b * BLOCK;
                sums[i][t][0] = _mm512_fmadd_ps(even, _mm512_loadu_ps(in), sums[i][t][0]);
                sums[i][t][chains - 1] = _mm512_fmadd_ps(odd, _mm512_loadu_ps(in + 16), sums[i][t][chains - 1]);
            }
        }
    for (int i = 0; i < rows; i++)
        for (int t = 0; t < tokens; t++)
            found[i][t] = _mm512_reduce_add_ps(chains == 2 ? _mm512_add_ps(sums[i][t][0], sums[i][t][1]) : sums[i][t][0]);
}

#elif WIDE == 256

INLINE void table_dots(const Bytes *at, const float *levels, const float *scales, long units, const float *x, long stride,
                       long blocks, float (*found)[TOKENS], const int rows, const int tokens) {
    const __m256i low = _mm256_set1_epi8(15);
    const int chains = tokens == 1 ? 4 : tokens == 2 ? 2 : 1;
    __m256i tables[4], values[4];
    byte_tables(levels, tables);
    for (int i = 0; i < rows; i++) {
        __m256 sums[TOKENS][4];
        for (int t = 0; t < tokens; t++)
            for (int k = 0; k < chains; k++) sums[t][k] = _mm256_setzero_ps();
        for (long b = 0; b < blocks; b++) {
            const __m256i pair = _mm256_loadu_si256((const __m256i *)block_at(at, i, b, blocks, BLOCK / 2));
            const float *two = scales + i * units + 2 * b; /* a half of a register has the columns of one unit */
            const __m256 scale = _mm256_set_m128(_mm_set1_ps(two[1]), _mm_set1_ps(two[0]));
            for (int odd = 0; odd < 2; odd++) {
                look_up(_mm256_and_si256(odd ? pair : _mm256_srli_epi16(pair, 4), low), tables, values);
                for (int k = 0; k < 4; k++) {
                    const __m256 weights = _mm256_mul_ps(_mm256_castsi256_ps(values[k]), scale);
                    for (int t = 0; t < tokens; t++) {
                        const __m256 in = _mm256_loadu_ps(x + t * stride + b * BLOCK + odd * 32 + k * 8);
                        sums[t][k % chains] = _mm256_fmadd_ps(weights, in, sums[t][k % chains]);
                    }
                }
            }
        }
        for (int t = 0; t < tokens; t++) {
            for (int k = 1; k < chains; k++) sums[t][0] = _mm256_add_ps(sums[t][0], sums[t][k]);
            found[i][t] = total(sums[t][0]);
        }
    }
}

#else

INLINE void arrange(const float *in, float *out) { memcpy(out, in, BLOCK * sizeof(float)); }

INLINE void table_dots(const Bytes *at, const float *levels, const float *scales, long units, const float *x, long stride,
                       long blocks, float (*found)[TOKENS], const int rows, const int tokens) {
    for (int i = 0; i < rows; i++)
        for (int t = 0; t < tokens; t++) found[i][t] = 0;
    for (int i = 0; i < rows; i++)
        for (long b = 0; b < blocks; b++) {
            const uint8_t *bytes = block_at(at, i, b, blocks, BLOCK / 2);
            float weights[BLOCK];
            for (long c = 0; c < BLOCK; c++)
                weights[c] = levels[c % 2 ? bytes[c / 2] & 15 : bytes[c / 2] >> 4] * scales[i * units + b];
            for (int t = 0; t < tokens; t++)
                for (long c = 0; c < BLOCK; c++) found[i][t] += weights[c] * x[t * stride + b * BLOCK + c];
        }
}

#endif

/* y of the rows from `first` to `last`, from x [T, stride] as arranged. */
static void table_rows(const Table *w, const float *x, long stride, long T, long first, long last, const Output *out, float *scales) {
    const long blocks = stride / BLOCK, units = stride / UNIT, bytes = (w->C + 1) / 2;
    uint8_t tails[MOST][BLOCK / 2];
    for (long r = first; r < last;) {
        const int rows = last - r < MOST ? 1 : MOST;
        Bytes at;
        for (int i = 0; i < rows; i++) {
            take_row(&at, i, w->packed + (r + i) * bytes, bytes, blocks, BLOCK / 2, tails[i]);
            read_scales(w, r + i, units, scales + i * units); /* the room of the next row is free, or beyond the last */
        }
        for (long t = 0; t < T; t += TOKENS) {
            const int tokens = T - t < TOKENS ? (int)(T - t) : TOKENS;
            const float *in = x + t * stride;
            float found[MOST][TOKENS];
            TILED(table_dots, &at, w->levels, scales, units, in, stride, blocks, found)
            for (int i = 0; i < rows; i++)
                for (int k = 0; k < tokens; k++) put(out, t + k, r + i, out->scale ? found[i][k] * out->scale[r + i] : found[i][k]);
        }
        r += rows;
    }
}

/* x [T, stride] in the order of `arrange`, padded with zeros to whole blocks, or NULL where memory is short. */
static float *arranged(const void *x, int halves, long T, long C, long stride) {
    float *out = malloc((size_t)(T + 1) * stride * sizeof(float)), *row = out ? out + T * stride : NULL;
    if (!out) return NULL;
    memset(row, 0, (size_t)stride * sizeof(float));
    for (long t = 0; t < T; t++) {
        read_row(x, halves, t, C, row);
        for (long c = 0; c < stride; c += BLOCK) arrange(row + c, out + t * stride + c);
    }
    return out;
}

/* y [T, R] of x [T, C], both floats or bfloat16; 0 where memory is short. `nested` to `offset` belong to scales in 8 bits;
   `scale` and `bias`, [R] or NULL, are for the sums of a row. */
int packed_table(const void *x, int halves, const uint8_t *packed, const float *levels, const void *scales, int type,
                 const float *nested, const float *nested_levels, const float *offset, const float *scale, const float *bias,
                 void *y, long T, long R, long C, long group, int threads) {
    const Table w = {packed, levels, scales, type, nested, nested_levels, offset, C, group, (C + group - 1) / group};
    const Output out = {y, halves, R, scale, bias};
    const long stride = (C + BLOCK - 1) / BLOCK * BLOCK, room = stride / UNIT * (MOST + 1);
    float *inputs = arranged(x, halves, T, C, stride), *rooms = malloc((size_t)room * threads * sizeof(float));
    const int enough = inputs && rooms;
    if (enough) {
#pragma omp parallel for num_threads(threads) schedule(static)
        for (int id = 0; id < threads; id++)
            table_rows(&w, inputs, stride, T, R * id / threads, R * (id + 1) / threads, &out, rooms + id * room);
    }
    free(inputs), free(rooms);
    return enough;
}

/* out [R, C], the weights of R rows from `start` in floats or, with `halves`, bfloat16, rounded once; 0 where memory is short. */
int packed_expand(const uint8_t *packed, const float *levels, const void *scales, int type, const float *nested,
                  const float *nested_levels, const float *offset, const float *scale, void *out, int halves, long start, long R,
                  long C, long group, int threads) {
    const Table w = {packed, levels, scales, type, nested, nested_levels, offset, C, group, (C + group - 1) / group};
    const long units = (C + UNIT - 1) / UNIT, room = 2 * units + units * UNIT, bytes = (C + 1) / 2;
    float *rooms = malloc((size_t)room * threads * sizeof(float));
    if (!rooms) return 0;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int id = 0; id < threads; id++) {
        float *own = rooms + id * room, *row = own + 2 * units;
        for (long r = R * id / threads; r < R * (id + 1) / threads; r++) {
            const uint8_t *at = packed + (start + r) * bytes;
            long c = 0;
            read_scales(&w, start + r, units, own);
#if WIDE
            c = expand_blocks(at, C, levels, 4, row);
#endif
            for (; c < C; c++) row[c] = levels[c % 2 ? at[c / 2] & 15 : at[c / 2] >> 4];
            const float whole = scale ? scale[start + r] : 1;
            for (long u = 0; u < units; u++)
                for (long i = u * UNIT; i < (u + 1) * UNIT && i < C; i++) row[i] = row[i] * own[u] * whole;
            if (!halves) memcpy((float *)out + r * C, row, (size_t)C * 4);
            for (long i = 0; halves && i < C; i++) ((uint16_t *)out)[r * C + i] = to_bfloat(row[i]);
        }
    }
    free(rooms);
    return 1;
}

/* int8 codes times floats. */

enum { LANES = WIDE == 512 ? 16 : 8, STEP = 4 * LANES }; /* columns at a time */

#if WIDE == 512
typedef __m512 Floats;
#define ZEROS _mm512_setzero_ps()
#define ADD _mm512_add_ps
#define TOTAL _mm512_reduce_add_ps
#define FMA(codes, in, sum) \
    _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(codes)))), _mm512_loadu_ps(in), sum)
#elif WIDE == 256
typedef __m256 Floats;
#define ZEROS _mm256_setzero_ps()
#define ADD _mm256_add_ps
#define TOTAL total
#define FMA(codes, in, sum) \
    _mm256_fmadd_ps(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(codes)))), _mm256_loadu_ps(in), sum)
#else
typedef float Floats;
#define ZEROS 0.0f
#define ADD(a, b) ((a) + (b))
#define TOTAL(sum) (sum)
INLINE float FMA(const int8_t *codes, const float *in, float sum) {
    float part = 0;
    for (int i = 0; i < LANES; i++) part += codes[i] * in[i];
    return sum + part;
}
#endif

INLINE void float_dots(const Bytes *at, const float *x, long stride, long blocks, float (*found)[TOKENS], const int rows,
                       const int tokens) {
    const int chains = tokens == 1 ? 4 : tokens == 2 ? 2 : 1;
    for (int i = 0; i < rows; i++) {
        Floats sums[TOKENS][4];
        for (int t = 0; t < tokens; t++)
            for (int k = 0; k < 4; k++) sums[t][k] = ZEROS;
        for (long b = 0; b < blocks; b++) {
            const int8_t *codes = (const int8_t *)block_at(at, i, b, blocks, STEP);
            for (int k = 0; k < 4; k++)
                for (int t = 0; t < tokens; t++)
                    sums[t][k % chains] = FMA(codes + k * LANES, x + t * stride + b * STEP + k * LANES, sums[t][k % chains]);
        }
        for (int t = 0; t < tokens; t++) {
            for (int k = 1; k < chains; k++) sums[t][0] = ADD(sums[t][0], sums[t][k]);
            found[i][t] = TOTAL(sums[t][0]);
        }
    }
}

/* y [T, R] of x [T, C], both floats or bfloat16, and codes [R, C] under `scale` [R]; 0 where memory is short. */
int packed_floats(const void *x, int halves, const int8_t *codes, const float *scale, const float *bias, void *y, long T, long R,
                  long C, int threads) {
    const Output out = {y, halves, R, scale, bias};
    const long blocks = (C + STEP - 1) / STEP, stride = blocks * STEP;
    float *inputs = malloc((size_t)T * stride * sizeof(float));
    if (!inputs) return 0;
    for (long t = 0; t < T; t++) {
        read_row(x, halves, t, C, inputs + t * stride);
        memset(inputs + t * stride + C, 0, (size_t)(stride - C) * sizeof(float));
    }
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int id = 0; id < threads; id++) {
        uint8_t tails[MOST][STEP];
        const long last = R * (id + 1) / threads;
        for (long r = R * id / threads; r < last;) {
            const int rows = last - r < MOST ? 1 : MOST;
            Bytes at;
            for (int i = 0; i < rows; i++) take_row(&at, i, (const uint8_t *)codes + (r + i) * C, C, blocks, STEP, tails[i]);
            for (long t = 0; t < T; t += TOKENS) {
                const int tokens = T - t < TOKENS ? (int)(T - t) : TOKENS;
                const float *in = inputs + t * stride;
                float found[MOST][TOKENS];
                TILED(float_dots, &at, in, stride, blocks, found)
                for (int i = 0; i < rows; i++)
                    for (int k = 0; k < tokens; k++) put(&out, t + k, r + i, found[i][k] * scale[r + i]);
            }
            r += rows;
        }
    }
    free(inputs);
    return 1;
}

/* Integers times integers. */

#if WIDE == 512 && defined(__AVX512VNNI__)
enum { BYTES = 64 }; /* of a weight at a time */
#else
enum { BYTES = 32 };
#endif

#if WIDE
INLINE int32_t total_of(__m256i sums) {
    __m128i half = _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
    half = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(half, _mm_shuffle_epi32(half, 0xb1)));
}
#endif

/* Sums of products of int8 codes; `all` has the sums of x, in case weights are shifted to be unsigned. */
INLINE void byte_dots(const Bytes *at, const int8_t *x, long stride, long blocks, const int32_t *all, int split,
                      int32_t (*found)[TOKENS], const int rows, const int tokens) {
    (void)split;
#if WIDE == 512 && defined(__AVX512VNNI__)
    const __m512i shift = _mm512_set1_epi8(-128);
    __m512i sums[MOST][TOKENS];
    for (int i = 0; i < rows; i++)
        for (int t = 0; t < tokens; t++) sums[i][t] = _mm512_setzero_si512();
    for (long b = 0; b < blocks; b++)
        for (int i = 0; i < rows; i++) {
            const __m512i weights = _mm512_xor_si512(_mm512_loadu_si512(block_at(at, i, b, blocks, BYTES)), shift);
            for (int t = 0; t < tokens; t++)
                sums[i][t] = _mm512_dpbusd_epi32(sums[i][t], weights, _mm512_loadu_si512(x + t * stride + b * BYTES));
        }
    for (int i = 0; i < rows; i++)
        for (int t = 0; t < tokens; t++)
            found[i][t] = (int32_t)((uint32_t)_mm512_reduce_add_epi32(sums[i][t]) - 128 * (uint32_t)all[t]);
#elif WIDE
    (void)all; /* one factor gives its sign to the other: sums of two products fit int16 */
    const __m256i ones = _mm256_set1_epi16(1);
    for (int i = 0; i < rows; i++) {
        __m256i sums[TOKENS];
        for (int t = 0; t < tokens; t++) sums[t] = _mm256_setzero_si256();
        for (long b = 0; b < blocks; b++) {
            const __m256i weights = _mm256_loadu_si256((const __m256i *)block_at(at, i, b, blocks, BYTES));
            for (int t = 0; t < tokens; t++) {
                const __m256i in = _mm256_loadu_si256((const __m256i *)(x + t * stride + b * BYTES));
                /* -128 has no negative: only split inputs have it, or else weights may */
                const __m256i sized = split ? in : weights, other = split ? weights : in;
                const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(sized), _mm256_sign_epi8(other, sized));
                sums[t] = _mm256_add_epi32(sums[t], _mm256_madd_epi16(pairs, ones));
            }
        }
        for (int t = 0; t < tokens; t++) found[i][t] = total_of(sums[t]);
    }
#else
    (void)all;
    for (int i = 0; i < rows; i++)
        for (int t = 0; t < tokens; t++) {
            int32_t sum = 0;
            for (long b = 0; b < blocks; b++) {
                const int8_t *weights = (const int8_t *)block_at(at, i, b, blocks, BYTES), *in = x + t * stride + b * BYTES;
                for (long c = 0; c < BYTES; c++) sum += weights[c] * in[c];
            }
            found[i][t] = sum;
        }
#endif
}

/* Sums of products with 4-bit codes + 8 and their multipliers, less eight times what the multipliers have of `all`, the sums of x
   by unit. Of 2 BYTES columns x has the even ones, then the odd ones. */
INLINE void nibble_dots(const Bytes *at, const int32_t *multipliers, long units, const int8_t *x, long stride, long blocks,
                        const int32_t *all, int32_t (*found)[TOKENS], const int rows, const int tokens) {
    for (int i = 0; i < rows; i++) {
        const int32_t *own = multipliers + i * units;
#if WIDE == 512 && defined(__AVX512VNNI__)
        const __m512i low = _mm512_set1_epi8(15);
        const __m512i lanes = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
        __m512i sums[TOKENS];
        for (int t = 0; t < tokens; t++) sums[t] = _mm512_setzero_si512();
        for (long b = 0; b < blocks; b++) {
            const __m512i pair = _mm512_loadu_si512(block_at(at, i, b, blocks, BYTES));
            const __m512i even = _mm512_and_si512(_mm512_srli_epi16(pair, 4), low), odd = _mm512_and_si512(pair, low);
            const __m512i four = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i *)(own + 4 * b)));
            const __m512i times = _mm512_permutexvar_epi32(lanes, four);
            for (int t = 0; t < tokens; t++) {
                const int8_t *in = x + t * stride + b * 2 * BYTES;
                const __m512i pairs = _mm512_add_epi16(_mm512_maddubs_epi16(even, _mm512_loadu_si512(in)),
                                                       _mm512_maddubs_epi16(odd, _mm512_loadu_si512(in + BYTES)));
                sums[t] = _mm512_add_epi32(sums[t], _mm512_madd_epi16(pairs, times));
            }
        }
        for (int t = 0; t < tokens; t++) found[i][t] = _mm512_reduce_add_epi32(sums[t]);
#elif WIDE
        const __m256i low = _mm256_set1_epi8(15), lanes = _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1);
        __m256i sums[TOKENS];
        for (int t = 0; t < tokens; t++) sums[t] = _mm256_setzero_si256();
        for (long b = 0; b < blocks; b++) {
            const __m256i pair = _mm256_loadu_si256((const __m256i *)block_at(at, i, b, blocks, BYTES));
            const __m256i even = _mm256_and_si256(_mm256_srli_epi16(pair, 4), low), odd = _mm256_and_si256(pair, low);
            const __m256i two = _mm256_castsi128_si256(_mm_loadl_epi64((const __m128i *)(own + 2 * b)));
            const __m256i times = _mm256_permutevar8x32_epi32(two, lanes);
            for (int t = 0; t < tokens; t++) {
                const __m256i *in = (const __m256i *)(x + t * stride + b * 2 * BYTES);
                const __m256i pairs = _mm256_add_epi16(_mm256_maddubs_epi16(even, _mm256_loadu_si256(in)),
                                                       _mm256_maddubs_epi16(odd, _mm256_loadu_si256(in + 1)));
                sums[t] = _mm256_add_epi32(sums[t], _mm256_madd_epi16(pairs, times));
            }
        }
        for (int t = 0; t < tokens; t++) found[i][t] = total_of(sums[t]);
#else
        for (int t = 0; t < tokens; t++) {
            uint32_t sum = 0;
            for (long b = 0; b < blocks; b++) {
                const uint8_t *bytes = block_at(at, i, b, blocks, BYTES);
                const int8_t *in = x + t * stride + b * 2 * BYTES;
                for (long c = 0; c < BYTES; c++)
                    sum += (uint32_t)(((bytes[c] >> 4) * in[c] + (bytes[c] & 15) * in[BYTES + c]) *
                                      (int16_t)own[(b * 2 * BYTES + 2 * c) / UNIT]);
            }
            found[i][t] = (int32_t)sum;
        }
#endif
        for (int t = 0; t < tokens; t++) {
            int32_t shifted = 0;
            for (long u = 0; u < units; u++) shifted += (own[u] & 0xff) * all[t * units + u];
            found[i][t] = (int32_t)((uint32_t)found[i][t] - 8 * (uint32_t)shifted);
        }
    }
}

/* The multiplier of each unit of a row, twice, for both halves of 32 bits. Units beyond the columns meet inputs of zero. */
static void read_multipliers(const uint8_t *in, long groups, long each, long units, int32_t *out) {
    long g = 0;
    if (each == 1) {
        for (; g < groups && g < units; g++) out[g] = in[g] * 0x10001;
    } else if (each == 2) {
        for (; g < groups && 2 * g + 1 < units; g++) out[2 * g] = out[2 * g + 1] = in[g] * 0x10001;
    }
    for (; g * each < units; g++)
        for (long u = g * each; u < (g + 1) * each && u < units; u++) out[u] = in[g < groups ? g : groups - 1] * 0x10001;
}

/* Codes of a row of inputs, and their scale. `largest` is the greatest code; codes beyond int8 are split into those to be
   multiplied by 256, and, `rest` bytes further, those to be added. */
static float round_row(const float *x, long C, float largest, int mode, float step, int8_t *codes, long rest) {
    uint32_t most = 0; /* bits of the greatest magnitude; those of NaN are greater than any number's */
    for (long c = 0; mode != STATIC && c < C; c++) {
        const uint32_t size = bits_of(x[c]) & 0x7fffffff;
        most = size > most ? size : most;
    }
    const float absmax = of_bits(most), tiny = 0x1p-126f;
    float scale = mode == STATIC ? step : absmax / largest;
    if (mode == DYNAMIC && scale < tiny) scale = tiny;
    const float factor = absmax > 0 ? 1 / absmax * largest : 0; /* in two steps, as torch divides a number by a tensor */
    for (long c = 0; c < C; c++) {
        float code = rintf(mode == LLM_INT8 ? x[c] * factor : x[c] / scale);
        code = code > largest ? largest : code;
        code = code >= -largest ? code : -largest; /* NaN too; the scale is NaN then */
        const int32_t whole = (int32_t)code;
        if (!rest) {
            codes[c] = (int8_t)whole;
            continue;
        }
        const int32_t high = (whole + 128) >> 8;
        codes[c] = (int8_t)high, codes[rest + c] = (int8_t)(whole - 256 * high);
    }
    return mode == LLM_INT8 ? absmax : scale;
}

/* Inputs as integers: codes [tokens, stride], their sums by token or, for 4-bit weights, [tokens, units], and scales [T]. */
typedef struct {
    int8_t *codes;
    int32_t *all;
    float *scale;
} Rounded;

static void round_tokens(const void *x, int halves, long T, long C, long stride, float largest, int mode, float step, int nibbles,
                         float *row, const Rounded *out) {
    const int split = largest > 127;
    const long tokens = split ? 2 * T : T, units = nibbles ? stride / UNIT : 1, wide = stride / units;
    memset(out->codes, 0, (size_t)tokens * stride);
    for (long t = 0; t < T; t++) {
        read_row(x, halves, t, C, row);
        out->scale[t] = round_row(row, C, largest, mode, step, out->codes + t * stride, split ? T * stride : 0);
    }
    for (long t = 0; t < tokens; t++) {
        int8_t *codes = out->codes + t * stride;
        for (long u = 0; u < units; u++) {
            int32_t sum = 0;
            for (long c = u * wide; c < (u + 1) * wide; c++) sum += codes[c];
            out->all[t * units + u] = sum;
        }
        for (long c = 0; nibbles && c < stride; c += 2 * BYTES) {
            int8_t block[2 * BYTES];
            for (long i = 0; i < BYTES; i++) block[i] = codes[c + 2 * i], block[BYTES + i] = codes[c + 2 * i + 1];
            memcpy(codes + c, block, sizeof block);
        }
    }
}

/* The sums of a tile as outputs. */
static void scaled(const Output *out, long t, long r, int rounding, int split, const int32_t *sums, const float *scale) {
    const float sum = split ? (float)sums[0] * 256.0f + (float)sums[1] : (float)sums[0];
    if (rounding == LLM_INT8)
        put(out, t, r, sum * (scale[t] * out->scale[r]) * 6.200124e-05f);
    else
        put(out, t, r, sum * scale[t] * out->scale[r]);
}

/* y [T, R] of x [T, C], both floats or bfloat16, rounded token by token to codes up to `largest`, and codes [R, C] under `scale`
   [R], which are int8 or, where there are multipliers [R, groups], 4-bit codes + 8. `rounding` is one of the enum above; `step` is
   the scale of STATIC. 0 where memory is short. */
int packed_integers(const void *x, int halves, float largest, int rounding, const float *step, const uint8_t *codes,
                    const uint8_t *multipliers, const float *scale, const float *bias, void *y, long T, long R, long C, long group,
                    int threads) {
    const int nibbles = multipliers != NULL, split = largest > 127;
    const Output out = {y, halves, R, scale, bias};
    const long bytes = nibbles ? (C + 1) / 2 : C, blocks = (bytes + BYTES - 1) / BYTES, stride = blocks * BYTES * (nibbles ? 2 : 1);
    const long tokens_all = split ? 2 * T : T, units = nibbles ? stride / UNIT : 1, groups = nibbles ? (C + group - 1) / group : 0;
    Rounded in = {malloc((size_t)tokens_all * stride), malloc((size_t)tokens_all * units * 4), malloc((size_t)T * 4)};
    float *row = malloc((size_t)C * 4);
    int32_t *rooms = malloc(((size_t)units * MOST + (size_t)tokens_all * MOST) * threads * 4);
    const int enough = in.codes && in.all && in.scale && row && rooms;
    if (enough) {
        round_tokens(x, halves, T, C, stride, largest, rounding, step ? *step : 0, nibbles, row, &in);
#pragma omp parallel for num_threads(threads) schedule(static)
        for (int id = 0; id < threads; id++) {
            int32_t *own = rooms + (units * MOST + tokens_all * MOST) * id, *sums = own + units * MOST;
            uint8_t tails[MOST][BYTES];
            const long last = R * (id + 1) / threads;
            for (long r = R * id / threads; r < last;) {
                const int rows = last - r < MOST ? 1 : MOST;
                Bytes at;
                for (int i = 0; i < rows; i++) {
                    take_row(&at, i, codes + (r + i) * bytes, bytes, blocks, BYTES, tails[i]);
                    if (nibbles) read_multipliers(multipliers + (r + i) * groups, groups, group / UNIT, units, own + i * units);
                }
                for (long t = 0; t < tokens_all; t += TOKENS) {
                    const int tokens = tokens_all - t < TOKENS ? (int)(tokens_all - t) : TOKENS;
                    const int8_t *part = in.codes + t * stride;
                    const int32_t *all = in.all + t * units;
                    int32_t found[MOST][TOKENS];
                    if (nibbles) {
                        TILED(nibble_dots, &at, own, units, part, stride, blocks, all, found)
                    } else {
                        TILED(byte_dots, &at, part, stride, blocks, all, split, found)
                    }
                    for (int i = 0; i < rows; i++)
                        for (int k = 0; k < tokens; k++) sums[i * tokens_all + t + k] = found[i][k];
                }
                for (int i = 0; i < rows; i++)
                    for (long t = 0; t < T; t++) {
                        const int32_t two[2] = {sums[i * tokens_all + t], split ? sums[i * tokens_all + T + t] : 0};
                        scaled(&out, t, r + i, rounding, split, two, in.scale);
                    }
                r += rows;
            }
        }
    }
    free(in.codes), free(in.all), free(in.scale), free(row), free(rooms);
    return enough;
}
