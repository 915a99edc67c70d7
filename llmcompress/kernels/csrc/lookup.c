/* Products with weights that are indices into small codebooks, straight from the packed indices.

   Sixteen levels fit the registers that a shuffle looks up: with AVX-512 as floats in one, with AVX2 as the four bytes of
   float32 in four tables of sixteen bytes, which are then woven together. 2- and 3-bit indices are widened to 4 bits a row at a
   time. Weights come out of a register in another order than that of the columns, so the inputs are put into that order once.
   Inputs in bfloat16 are multiplied as such, and the levels rounded to it, where the processor has such products; sums are
   floats. 256 levels, and other processors, take plain C. Indices: first column in the highest bits, rows from a byte of their own.
   Levels of row r begin at levels + r / rows * 2^bits. R rows (outputs), C columns (inputs), T tokens. */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "lookup_wide.h"

/* Which form was compiled. */
const char *lookup_form(void) { return FORMS[WIDE / 256]; }

static size_t row_bytes(long columns, int bits) {
    return bits == 3 ? (size_t)((columns + 7) / 8 * 3) : (size_t)((columns * bits + 7) / 8);
}

/* 4-bit indices of a row of 2- or 3-bit ones; `out` has room for columns / 2 + 8 bytes. */
static void widen(const uint8_t *row, long columns, int bits, uint8_t *out) {
    const uint8_t *end = row + row_bytes(columns, bits);
#if WIDE && defined(__BMI2__)
    const uint64_t places = bits == 2 ? 0x3333333333333333u : 0x7777777777777777u; /* of sixteen indices */
    for (; end - row >= 8; row += 2 * bits, out += 8) {
        uint64_t word;
        memcpy(&word, row, 8);
        word = __builtin_bswap64(_pdep_u64(__builtin_bswap64(word) >> (64 - 16 * bits), places));
        memcpy(out, &word, 8);
    }
#endif
    for (; row < end; row += bits, out += 4) {
        uint32_t word = 0, wide = 0; /* eight indices */
        for (int b = 0; b < bits; b++) word = word << 8 | (row + b < end ? row[b] : 0);
        for (int i = 7; i >= 0; i--) wide = wide << 4 | (word >> (i * bits) & ((1u << bits) - 1));
        out[0] = wide >> 24, out[1] = wide >> 16, out[2] = wide >> 8, out[3] = wide;
    }
}

/* The levels of a row of 4- or 8-bit indices, in the order of columns: elements of `size` bytes. */
static inline __attribute__((always_inline)) void expand_row(const uint8_t *row, long columns, const void *levels,
                                                             const int bits, const int size, void *out) {
    long c = 0;
#if WIDE
    if (bits == 4) c = expand_blocks(row, columns, levels, size, out);
#endif
    for (; c < columns; c++) {
        int index = bits == 8 ? row[c] : row[c / 2] >> (c % 2 ? 0 : 4) & 15;
        if (size == 4)
            ((uint32_t *)out)[c] = ((const uint32_t *)levels)[index];
        else
            ((uint16_t *)out)[c] = ((const uint16_t *)levels)[index];
    }
}

#if WIDE

#define CASE(dots, count) \
    case count: \
        if (rows == 1) dots(tile, blocks, x, stride, 1, count, y, R); \
        else dots(tile, blocks, x, stride, ROWS, count, y, R); \
        break;

/* `dots` of one row or ROWS and up to TOKENS tokens, compiled for each number of them. */
#define DOTS_OF(name, dots, type) \
    static void name(const Tile *tile, int rows, long blocks, const type *x, long stride, long tokens, float *y, long R) { \
        switch (tokens) { CASE(dots, 1) CASE(dots, 2) CASE(dots, 3) CASE(dots, 4) } \
    }

DOTS_OF(dots_of, dots, float)
#ifdef HALVES
DOTS_OF(dots_of_halves, dots_halves, uint16_t)
#endif

#endif

/* Whether products of inputs in bfloat16 were compiled. */
int lookup_halves(void) {
#ifdef HALVES
    return 1;
#else
    return 0;
#endif
}

/* Packed indices: bytes of a row, columns, rows that share a codebook, bits of an index. */
typedef struct {
    const uint8_t *packed;
    size_t bytes;
    long C, rows;
    int bits;
} Weight;

/* Elements of `size` bytes, 2 or 4, of the rows from `first` to `last`. */
static void expand_rows(const Weight *w, const uint8_t *levels, int size, long start, long first, long last, uint8_t *out,
                        uint8_t *room) {
    const size_t entry = ((size_t)size << w->bits), wide = (size_t)w->C * size;
    uint8_t table[64] = {0};
    for (long r = first; r < last; r++) {
        const uint8_t *row = w->packed + (size_t)(start + r) * w->bytes;
        const uint8_t *own = levels + (size_t)((start + r) / w->rows) * entry;
        if (w->bits < 4) {
            widen(row, w->C, w->bits, room);
            row = room, own = memcpy(table, own, entry);
        }
        if (w->bits == 8)
            size == 4 ? expand_row(row, w->C, own, 8, 4, out + r * wide) : expand_row(row, w->C, own, 8, 2, out + r * wide);
        else
            size == 4 ? expand_row(row, w->C, own, 4, 4, out + r * wide) : expand_row(row, w->C, own, 4, 2, out + r * wide);
    }
}

/* out [R, C], the weights of R rows from `start`, elements of `size` bytes as the levels; 0 where memory is short. */
int lookup_expand(const uint8_t *packed, const uint8_t *levels, uint8_t *out, long start, long R, long C, long rows, int bits,
                  int size, int threads) {
    const Weight w = {packed, row_bytes(C, bits), C, rows, bits};
    const size_t room = (size_t)C / 2 + 64;
    uint8_t *rooms = malloc(room * threads);
    if (!rooms) return 0;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int id = 0; id < threads; id++)
        expand_rows(&w, levels, size, start, R * id / threads, R * (id + 1) / threads, out, rooms + id * room);
    free(rooms);
    return 1;
}

/* y [T, R] of the rows from `first` to `last`, from x [T, C] as it is: each row is looked up into `room`. */
static void plain_rows(const Weight *w, const float *levels, const float *x, long T, long R, long first, long last, float *y,
                       uint8_t *room) {
    float *row = (float *)room;
    for (long r = first; r < last; r++) {
        expand_rows(w, (const uint8_t *)levels, 4, r, 0, 1, room, room + (size_t)w->C * 4);
        for (long t = 0; t < T; t++) {
            const float *in = x + t * w->C;
            float sum = 0;
#pragma omp simd reduction(+ : sum)
            for (long c = 0; c < w->C; c++) sum += row[c] * in[c];
            y[t * R + r] = sum;
        }
    }
}

#if WIDE

/* The inputs x [T, C] of `size` bytes in the order of `arrange`, padded with zeros to whole blocks: out [T, stride]. */
static void arrange_rows(const uint8_t *x, long C, long block, long stride, int size, long first, long last, uint8_t *out) {
    uint8_t part[BLOCK * 4 > 128 ? BLOCK * 4 : 128] = {0};
    for (long t = first; t < last; t++)
        for (long c = 0; c < stride; c += block) {
            const uint8_t *in = x + (size_t)(t * C + c) * size;
            uint8_t *to = out + (size_t)(t * stride + c) * size;
            if (c + block > C) in = memcpy(part, in, (size_t)(C - c) * size);
#ifdef HALVES
            if (size == 2) {
                arrange_halves((const uint16_t *)in, (uint16_t *)to);
                continue;
            }
#endif
            arrange((const float *)in, (float *)to);
        }
}

/* y [T, R] of the rows from `first` to `last`, from x [T, stride] of `size` bytes as arranged in blocks. */
static void wide_rows(const Weight *w, const float *levels, const uint8_t *x, long block, long stride, int size, long T, long R,
                      long first, long last, float *y, uint8_t *room) {
    const long blocks = stride / block, entries = 1l << w->bits;
    const size_t before = (size_t)(blocks - 1) * (block / 2), space = (size_t)blocks * (block / 2) + 16;
    float tables[ROWS][16] = {{0}};
    memset(room, 0, space * ROWS);
    for (long r = first; r < last;) {
        const int rows = last - r < ROWS ? 1 : ROWS;
        Tile tile;
        for (int i = 0; i < rows; i++) {
            uint8_t *own = room + i * space;
            tile.row[i] = w->packed + (size_t)(r + i) * w->bytes, tile.end[i] = tile.row[i] + before;
            tile.levels[i] = levels + (r + i) / w->rows * entries;
            if (w->bits < 4) {
                widen(tile.row[i], w->C, w->bits, own);
                tile.row[i] = own, tile.end[i] = own + before;
                tile.levels[i] = memcpy(tables[i], tile.levels[i], entries * sizeof(float));
            } else if (w->C % block) {
                tile.end[i] = memcpy(own, tile.end[i], w->bytes - before);
            }
        }
        for (long t = 0; t < T; t += TOKENS) {
            const uint8_t *in = x + (size_t)(t * stride) * size;
            const long tokens = T - t < TOKENS ? T - t : TOKENS;
#ifdef HALVES
            if (size == 2) {
                dots_of_halves(&tile, rows, blocks, (const uint16_t *)in, stride, tokens, y + t * R + r, R);
                continue;
            }
#endif
            dots_of(&tile, rows, blocks, (const float *)in, stride, tokens, y + t * R + r, R);
        }
        r += rows;
    }
}

#endif

/* y [T, R] of x [T, C], of floats or, where `halves` says so and lookup_halves too, of bfloat16; 0 where memory is short. With
   8 bits, inputs are floats. */
int lookup_matmul(const uint8_t *x, const uint8_t *packed, const float *levels, float *y, long T, long R, long C, long rows,
                  int bits, int halves, int threads) {
    const Weight w = {packed, row_bytes(C, bits), C, rows, bits};
    (void)halves;
    const size_t room = ((size_t)C * 5 + 1024) / 64 * 64; /* a row of floats and one of 4 bits, or some of 4 bits */
    uint8_t *rooms = malloc(room * threads), *inputs = NULL;
#if WIDE
    const int size = halves ? 2 : 4;
    long block = BLOCK;
#ifdef HALVES
    if (halves) block = HALVES;
#endif
    const long stride = (C + block - 1) / block * block;
    if (bits != 8) inputs = malloc((size_t)T * stride * size);
#endif
    if (!rooms || (WIDE && bits != 8 && !inputs)) {
        free(rooms), free(inputs);
        return 0;
    }
#pragma omp parallel num_threads(threads)
    {
#if WIDE
        if (bits != 8) {
#pragma omp for schedule(static)
            for (int id = 0; id < threads; id++)
                arrange_rows(x, C, block, stride, size, T * id / threads, T * (id + 1) / threads, inputs);
        }
#endif
#pragma omp for schedule(static)
        for (int id = 0; id < threads; id++) {
            const long first = R * id / threads, last = R * (id + 1) / threads;
#if WIDE
            if (bits != 8) {
                wide_rows(&w, levels, inputs, block, stride, size, T, R, first, last, y, rooms + id * room);
                continue;
            }
#endif
            plain_rows(&w, levels, (const float *)x, T, R, first, last, y, rooms + id * room);
        }
    }
    free(inputs), free(rooms);
    return 1;
}
