/* Sixteen levels looked up in registers: the part of lookup.c that depends on the processor, where WIDE is 512 or 256 bits.

   BLOCK columns are looked up at a time and multiplied by up to TOKENS tokens. `from` is the column, within a block, of input
   i; `dots` has y [T, R] of one row, whose last block lies at `end`; `expand_blocks` writes the levels of whole blocks in the
   order of columns, as elements of 4 or 2 bytes, and says up to which column. */

#include <immintrin.h>
#include <stdint.h>

#define INLINE static inline __attribute__((always_inline))

#if WIDE == 512

enum { BLOCK = 32, TOKENS = 8 }; /* columns that are looked up at a time; tokens that are multiplied by them */

/* Even columns of a block, then odd ones. */
INLINE long from(long i) { return i < 16 ? 2 * i : 2 * (i - 16) + 1; }

INLINE void dots(const uint8_t *row, const uint8_t *end, long blocks, const float *levels, const float *x, long stride,
                 const int tokens, float *y, long R) {
    __m512 table = _mm512_loadu_ps(levels), even[TOKENS], odd[TOKENS];
    for (int t = 0; t < tokens; t++) even[t] = odd[t] = _mm512_setzero_ps();
    for (long b = 0; b < blocks; b++) {
        const uint8_t *at = b < blocks - 1 ? row + b * 16 : end;
        __m512i pair = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)at)); /* a permute reads four bits only */
        __m512 first = _mm512_permutexvar_ps(_mm512_srli_epi32(pair, 4), table), second = _mm512_permutexvar_ps(pair, table);
        for (int t = 0; t < tokens; t++) {
            const float *in = x + t * stride + b * BLOCK;
            even[t] = _mm512_fmadd_ps(first, _mm512_loadu_ps(in), even[t]);
            odd[t] = _mm512_fmadd_ps(second, _mm512_loadu_ps(in + 16), odd[t]);
        }
    }
    for (int t = 0; t < tokens; t++) y[t * R] = _mm512_reduce_add_ps(_mm512_add_ps(even[t], odd[t]));
}

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

enum { BLOCK = 64, TOKENS = 4 };

/* Even columns, then odd ones; of either those of bytes 4 k to 4 k + 3 in both halves of a register, for k of 0..3. */
INLINE long from(long i) {
    long odd = i / 32, vector = i % 32 / 8, half = i % 8 / 4, place = i % 4;
    return 2 * (16 * half + 4 * vector + place) + odd;
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

INLINE void dots(const uint8_t *row, const uint8_t *end, long blocks, const float *levels, const float *x, long stride,
                 const int tokens, float *y, long R) {
    __m256i tables[4], found[4], low = _mm256_set1_epi8(15);
    __m256 sums[TOKENS][4]; /* more chains of sums for fewer tokens */
    const int chains = tokens == 1 ? 4 : tokens == 2 ? 2 : 1;
    byte_tables(levels, tables);
    for (int t = 0; t < tokens; t++)
        for (int k = 0; k < chains; k++) sums[t][k] = _mm256_setzero_ps();
    for (long b = 0; b < blocks; b++) {
        const uint8_t *at = b < blocks - 1 ? row + b * 32 : end;
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
