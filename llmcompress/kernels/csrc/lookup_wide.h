/* Sixteen levels looked up in registers: the part of lookup.c and packed.c that depends on the processor. WIDE is the width of
   its registers, 512 or 256 bits; where it is 0 there is plain C alone.

   BLOCK columns are looked up at a time, of up to ROWS rows, and multiplied by up to TOKENS tokens. `arrange` puts the inputs of
   a block into the order in which its weights come out of a register; `dots` has y [T, R] of the rows of a tile; `expand_blocks`
   writes the levels of whole blocks in the order of columns, as elements of 4 or 2 bytes, and says up to which column. With
   AVX512-BF16 `arrange_halves` and `dots_halves` do the same, HALVES columns at a time, with inputs and levels in bfloat16; sums
   are floats. */

#if defined(__AVX512F__) && defined(__AVX512BW__)
#define WIDE 512
#elif defined(__AVX2__) && defined(__FMA__)
#define WIDE 256
#else
#define WIDE 0
#endif

static const char *const FORMS[] = {"plain", "avx2", "avx512"};

#if WIDE

#include <immintrin.h>
#include <stdint.h>

#define INLINE static inline __attribute__((always_inline))

/* Some rows of a weight: where each begins, where its last block lies, and its levels. */
#if WIDE == 512
enum { BLOCK = 32, ROWS = 4, TOKENS = 4 };
#else
enum { BLOCK = 64, ROWS = 1, TOKENS = 4 };
#endif
typedef struct {
    const uint8_t *row[ROWS], *end[ROWS];
    const float *levels[ROWS];
} Tile;

#if WIDE == 512

/* Even columns of a block, then odd ones. */
INLINE void arrange(const float *in, float *out) {
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    __m512 a = _mm512_loadu_ps(in), b = _mm512_loadu_ps(in + 16);
    _mm512_storeu_ps(out, _mm512_permutex2var_ps(a, even, b));
    _mm512_storeu_ps(out + 16, _mm512_permutex2var_ps(a, _mm512_or_epi32(even, _mm512_set1_epi32(1)), b));
}

INLINE void dots(const Tile *tile, long blocks, const float *x, long stride, const int rows, const int tokens, float *y, long R) {
    __m512 table[ROWS], sums[ROWS][TOKENS][2];
    const int chains = tokens < 3 ? 2 : 1; /* of sums, more for fewer tokens */
    for (int r = 0; r < rows; r++) {
        table[r] = _mm512_loadu_ps(tile->levels[r]);
        for (int t = 0; t < tokens; t++) sums[r][t][0] = sums[r][t][1] = _mm512_setzero_ps();
    }
    for (long b = 0; b < blocks; b++)
        for (int r = 0; r < rows; r++) {
            const uint8_t *at = b < blocks - 1 ? tile->row[r] + b * (BLOCK / 2) : tile->end[r];
            __m512i pair = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)at)); /* a permute reads four bits only */
            __m512 even = _mm512_permutexvar_ps(_mm512_srli_epi32(pair, 4), table[r]);
            __m512 odd = _mm512_permutexvar_ps(pair, table[r]);
            for (int t = 0; t < tokens; t++) {
                const float *in = x + t * stride + b * BLOCK;
                sums[r][t][0] = _mm512_fmadd_ps(even, _mm512_loadu_ps(in), sums[r][t][0]);
                sums[r][t][chains - 1] = _mm512_fmadd_ps(odd, _mm512_loadu_ps(in + 16), sums[r][t][chains - 1]);
            }
        }
    for (int r = 0; r < rows; r++)
        for (int t = 0; t < tokens; t++)
            y[t * R + r] = _mm512_reduce_add_ps(chains == 2 ? _mm512_add_ps(sums[r][t][0], sums[r][t][1]) : sums[r][t][0]);
}

#ifdef __AVX512BF16__

#define HALVES 64

/* Even columns of a block, then odd ones. */
INLINE void arrange_halves(const uint16_t *in, uint16_t *out) {
    __m512i a = _mm512_loadu_si512(in), b = _mm512_loadu_si512(in + 32);
    __m512i places = _mm512_set1_epi32(0x00010000); /* 0, 1 in each pair of places */
    __m512i step = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44, 48, 52, 56, 60);
    __m512i even = _mm512_add_epi16(_mm512_add_epi16(places, places), _mm512_or_epi32(step, _mm512_slli_epi32(step, 16)));
    _mm512_storeu_si512(out, _mm512_permutex2var_epi16(a, even, b));
    _mm512_storeu_si512(out + 32, _mm512_permutex2var_epi16(a, _mm512_or_epi32(even, _mm512_set1_epi16(1)), b));
}

INLINE void dots_halves(const Tile *tile, long blocks, const uint16_t *x, long stride, const int rows, const int tokens,
                        float *y, long R) {
    __m512i table[ROWS];
    __m512 sums[ROWS][TOKENS][2];
    const int chains = tokens < 3 ? 2 : 1;
    for (int r = 0; r < rows; r++) {
        __m256i levels = (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(tile->levels[r]));
        table[r] = _mm512_broadcast_i64x4(levels); /* twice, for a permute reads five bits */
        for (int t = 0; t < tokens; t++) sums[r][t][0] = sums[r][t][1] = _mm512_setzero_ps();
    }
    for (long b = 0; b < blocks; b++)
        for (int r = 0; r < rows; r++) {
            const uint8_t *at = b < blocks - 1 ? tile->row[r] + b * (HALVES / 2) : tile->end[r];
            __m512i pair = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)at));
            __m512bh even = (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(pair, 4), table[r]);
            __m512bh odd = (__m512bh)_mm512_permutexvar_epi16(pair, table[r]);
            for (int t = 0; t < tokens; t++) {
                const uint16_t *in = x + t * stride + b * HALVES;
                sums[r][t][0] = _mm512_dpbf16_ps(sums[r][t][0], even, (__m512bh)_mm512_loadu_si512(in));
                sums[r][t][chains - 1] = _mm512_dpbf16_ps(sums[r][t][chains - 1], odd, (__m512bh)_mm512_loadu_si512(in + 32));
            }
        }
    for (int r = 0; r < rows; r++)
        for (int t = 0; t < tokens; t++)
            y[t * R + r] = _mm512_reduce_add_ps(chains == 2 ? _mm512_add_ps(sums[r][t][0], sums[r][t][1]) : sums[r][t][0]);
}

#endif

/* Indices of 32 columns in their order, a byte each. */
INLINE __m256i indices(const uint8_t *row) {
    __m256i pair = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)row));
    return _mm256_and_si256(_mm256_or_si256(_mm256_srli_epi16(pair, 4), _mm256_slli_epi16(pair, 8)), _mm256_set1_epi8(15));
}

INLINE long expand_blocks(const uint8_t *row, long columns, const void *levels, const int size, void *out) {
    long whole = columns / BLOCK * BLOCK;
    __m512i table = size == 4 ? _mm512_loadu_si512(levels)
                              : _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)levels));
    for (long c = 0; c < whole; c += BLOCK) {
        __m256i index = indices(row + c / 2);
        if (size == 2) {
            _mm512_storeu_si512((uint16_t *)out + c, _mm512_permutexvar_epi16(_mm512_cvtepu8_epi16(index), table));
            continue;
        }
        __m512i low = _mm512_cvtepu8_epi32(_mm256_castsi256_si128(index));
        __m512i high = _mm512_cvtepu8_epi32(_mm256_extracti128_si256(index, 1));
        _mm512_storeu_si512((uint32_t *)out + c, _mm512_permutexvar_epi32(low, table));
        _mm512_storeu_si512((uint32_t *)out + c + 16, _mm512_permutexvar_epi32(high, table));
    }
    return whole;
}

#elif WIDE == 256

/* Even columns, then odd ones; of either those of bytes 4 k to 4 k + 3 in both halves of a register, for k of 0..3. */
INLINE void arrange(const float *in, float *out) {
    for (long i = 0; i < BLOCK; i++) {
        long odd = i / 32, vector = i % 32 / 8, half = i % 8 / 4, place = i % 4;
        out[i] = in[2 * (16 * half + 4 * vector + place) + odd];
    }
}

/* Byte b of each of the sixteen floats, in both halves of tables[b]. */
INLINE void byte_tables(const float *levels, __m256i *tables) {
    __m128i sort = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), part[4];
    for (int i = 0; i < 4; i++) part[i] = _mm_shuffle_epi8(_mm_loadu_si128((const __m128i *)levels + i), sort);
    __m128i a = _mm_unpacklo_epi32(part[0], part[1]), b = _mm_unpacklo_epi32(part[2], part[3]);
    __m128i c = _mm_unpackhi_epi32(part[0], part[1]), d = _mm_unpackhi_epi32(part[2], part[3]);
    tables[0] = _mm256_broadcastsi128_si256(_mm_unpacklo_epi64(a, b));
    tables[1] = _mm256_broadcastsi128_si256(_mm_unpackhi_epi64(a, b));
    tables[2] = _mm256_broadcastsi128_si256(_mm_unpacklo_epi64(c, d));
    tables[3] = _mm256_broadcastsi128_si256(_mm_unpackhi_epi64(c, d));
}

/* The floats at 32 indices of a byte each: vector k has those of bytes 4 k to 4 k + 3 in both halves. */
INLINE void look_up(__m256i index, const __m256i *tables, __m256i *found) {
    __m256i b0 = _mm256_shuffle_epi8(tables[0], index), b1 = _mm256_shuffle_epi8(tables[1], index);
    __m256i b2 = _mm256_shuffle_epi8(tables[2], index), b3 = _mm256_shuffle_epi8(tables[3], index);
    __m256i low = _mm256_unpacklo_epi8(b0, b1), high = _mm256_unpacklo_epi8(b2, b3);
    found[0] = _mm256_unpacklo_epi16(low, high), found[1] = _mm256_unpackhi_epi16(low, high);
    low = _mm256_unpackhi_epi8(b0, b1), high = _mm256_unpackhi_epi8(b2, b3);
    found[2] = _mm256_unpacklo_epi16(low, high), found[3] = _mm256_unpackhi_epi16(low, high);
}

INLINE float total(__m256 sums) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

INLINE void dots(const Tile *tile, long blocks, const float *x, long stride, const int rows, const int tokens, float *y, long R) {
    (void)rows; /* one */
    __m256i tables[4], found[4], low = _mm256_set1_epi8(15);
    __m256 sums[TOKENS][4]; /* more chains of sums for fewer tokens */
    const int chains = tokens == 1 ? 4 : tokens == 2 ? 2 : 1;
    byte_tables(tile->levels[0], tables);
    for (int t = 0; t < tokens; t++)
        for (int k = 0; k < chains; k++) sums[t][k] = _mm256_setzero_ps();
    for (long b = 0; b < blocks; b++) {
        const uint8_t *at = b < blocks - 1 ? tile->row[0] + b * 32 : tile->end[0];
        __m256i pair = _mm256_loadu_si256((const __m256i *)at);
        for (int odd = 0; odd < 2; odd++) {
            look_up(_mm256_and_si256(odd ? pair : _mm256_srli_epi16(pair, 4), low), tables, found);
            for (int k = 0; k < 4; k++)
                for (int t = 0; t < tokens; t++) {
                    __m256 in = _mm256_loadu_ps(x + t * stride + b * BLOCK + odd * 32 + k * 8), *sum = &sums[t][k % chains];
                    *sum = _mm256_fmadd_ps(_mm256_castsi256_ps(found[k]), in, *sum);
                }
        }
    }
    for (int t = 0; t < tokens; t++) {
        for (int k = 1; k < chains; k++) sums[t][0] = _mm256_add_ps(sums[t][0], sums[t][k]);
        y[t * R] = total(sums[t][0]);
    }
}

/* Two vectors whose halves belong to columns that are 32 apart, written in the order of columns. */
INLINE void store(uint8_t *out, long apart, __m256i first, __m256i second) {
    _mm256_storeu_si256((__m256i *)out, _mm256_permute2x128_si256(first, second, 0x20));
    _mm256_storeu_si256((__m256i *)(out + apart), _mm256_permute2x128_si256(first, second, 0x31));
}

INLINE long expand_blocks(const uint8_t *row, long columns, const void *levels, const int size, void *out) {
    long whole = columns / BLOCK * BLOCK;
    __m256i tables[4], found[4], low = _mm256_set1_epi8(15);
    if (size == 4) {
        byte_tables(levels, tables);
    } else {
        __m128i sort = _mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
        __m128i a = _mm_shuffle_epi8(_mm_loadu_si128(levels), sort);
        __m128i b = _mm_shuffle_epi8(_mm_loadu_si128((const __m128i *)levels + 1), sort);
        tables[0] = _mm256_broadcastsi128_si256(_mm_unpacklo_epi64(a, b));
        tables[1] = _mm256_broadcastsi128_si256(_mm_unpackhi_epi64(a, b));
    }
    for (long c = 0; c < whole; c += BLOCK) {
        __m256i pair = _mm256_loadu_si256((const __m256i *)(row + c / 2));
        __m256i first = _mm256_and_si256(_mm256_srli_epi16(pair, 4), low), second = _mm256_and_si256(pair, low);
        for (int part = 0; part < 2; part++) { /* columns 0..15 and 32..47, then 16..31 and 48..63 */
            __m256i index = part ? _mm256_unpackhi_epi8(first, second) : _mm256_unpacklo_epi8(first, second);
            uint8_t *to = (uint8_t *)out + (c + 16 * part) * size;
            if (size == 4) {
                look_up(index, tables, found);
                store(to, 128, found[0], found[1]);
                store(to + 32, 128, found[2], found[3]);
            } else {
                __m256i b0 = _mm256_shuffle_epi8(tables[0], index), b1 = _mm256_shuffle_epi8(tables[1], index);
                store(to, 64, _mm256_unpacklo_epi8(b0, b1), _mm256_unpackhi_epi8(b0, b1));
            }
        }
    }
    return whole;
}

#endif

#endif
