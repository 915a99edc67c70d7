/* Attention in bfloat16, with sums and softmax in float32.

   Some queries at a time are multiplied with some keys, the softmax is carried on from one block of keys to the next, and
   keys that come after all queries of a block are never looked at. Both products are of the same kind: rows of bfloat16
   pairs times packed panels of pairs. Keys and values are packed once for all queries that read them. Threads divide the
   heads of keys, then blocks of queries. B sequences, H heads of queries, G of keys and values, L tokens, D numbers a head. */

#include <stdint.h>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512BF16__)
#include <immintrin.h>
#include <math.h>
#include <omp.h>
#include <string.h>

#define LANES 16
#define WIDE 4 /* registers across a panel */
#define PANEL (WIDE * LANES)
#define STEP 6 /* rows of a tile: STEP * WIDE sums, WIDE columns and one row fit 32 registers */
#define QUERIES (8 * STEP)
#define KEYS 512 /* keys at a time: a block of scores stays in the cache of a core */
#define SEEN 256 /* keys at a time where gradients are computed, which needs more room */
#define TURNED 32 /* pairs of queries in a row of turned weights: QUERIES / 2, in whole registers */
#define LARGEST_HEAD 256
#define LOG2E 1.44269504088896341f

typedef struct {
    const uint16_t *at;
    long batch, head, token; /* how far apart in memory; the numbers of a head lie side by side */
} Rows;

/* A row: the numbers of one token in one head. */
static inline const uint16_t *row_of(Rows x, long b, long h, long t) { return x.at + b * x.batch + h * x.head + t * x.token; }

/* A tensor with the strides that are given for it. */
static inline Rows rows_of(const uint16_t *at, const long *strides, int which) {
    return (Rows){at, strides[3 * which], strides[3 * which + 1], strides[3 * which + 2]};
}

/* A count rounded up to a multiple. */
static inline long up(long count, long by) { return (count + by - 1) / by * by; }

/* The lanes of a register that hold something, where so many numbers are left. */
static inline __mmask16 lanes(long left) { return left >= LANES ? 0xffff : left > 0 ? (__mmask16)((1u << left) - 1) : 0; }

/* For each row of a tile; an array of sums would not stay in registers. */
#define ROWS(DO) DO(0) DO(1) DO(2) DO(3) DO(4) DO(5)
#define DECLARE(r) __m512 a##r = _mm512_setzero_ps(), b##r = a##r, c##r = a##r, d##r = a##r;
#define RESUME(r) \
    a##r = _mm512_loadu_ps(result + r * width); \
    b##r = _mm512_loadu_ps(result + r * width + LANES); \
    c##r = _mm512_loadu_ps(result + r * width + 2 * LANES); \
    d##r = _mm512_loadu_ps(result + r * width + 3 * LANES);
#define ADD(r) \
    row = (__m512bh)_mm512_set1_epi32((int)rows[r * stride + p]); \
    a##r = _mm512_dpbf16_ps(a##r, row, first); \
    b##r = _mm512_dpbf16_ps(b##r, row, second); \
    c##r = _mm512_dpbf16_ps(c##r, row, third); \
    d##r = _mm512_dpbf16_ps(d##r, row, fourth);
#define STORE(r) \
    _mm512_storeu_ps(result + r * width, a##r); \
    _mm512_storeu_ps(result + r * width + LANES, b##r); \
    _mm512_storeu_ps(result + r * width + 2 * LANES, c##r); \
    _mm512_storeu_ps(result + r * width + 3 * LANES, d##r);

/* result [STEP, PANEL] = rows [STEP, pairs] x panel [pairs, PANEL], added to what is there if `on`. */
static inline void tile(const uint32_t *rows, long stride, const uint32_t *panel, long pairs, float *result, long width, int on) {
    ROWS(DECLARE)
    if (on) {
        ROWS(RESUME)
    }
    for (long p = 0; p < pairs; p++, panel += PANEL) {
        const __m512bh first = (__m512bh)_mm512_loadu_ps(panel);
        const __m512bh second = (__m512bh)_mm512_loadu_ps(panel + LANES);
        const __m512bh third = (__m512bh)_mm512_loadu_ps(panel + 2 * LANES);
        const __m512bh fourth = (__m512bh)_mm512_loadu_ps(panel + 3 * LANES);
        __m512bh row;
        ROWS(ADD)
    }
    ROWS(STORE)
}

/* Sixteen by sixteen 32-bit words, transposed. */
static void turn(__m512i r[LANES]) {
    __m512i t[LANES];
    for (int i = 0; i < LANES; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < LANES; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < LANES; i += 8)
        for (int j = 0; j < 4; j++) {
            t[i + j] = _mm512_shuffle_i32x4(r[i + j], r[i + j + 4], 0x88);
            t[i + j + 4] = _mm512_shuffle_i32x4(r[i + j], r[i + j + 4], 0xdd);
        }
    for (int j = 0; j < 8; j++) {
        r[j] = _mm512_shuffle_i32x4(t[j], t[j + 8], 0x88);
        r[j + 8] = _mm512_shuffle_i32x4(t[j], t[j + 8], 0xdd);
    }
}

/* Pack tokens of a head as columns, pairs along the numbers of the head: panels of PANEL tokens, [D / 2, PANEL] each. */
static void pack_across(Rows x, long b, long h, long tokens, long D, uint32_t *packed) {
    for (long t = 0; t < tokens; t += LANES) {
        uint32_t *panel = packed + t / PANEL * PANEL * (D / 2) + t % PANEL;
        for (long pair = 0; pair < D / 2; pair += LANES) {
            const __mmask16 which = lanes(D / 2 - pair);
            __m512i r[LANES];
            for (int i = 0; i < LANES; i++)
                r[i] = t + i < tokens ? _mm512_maskz_loadu_epi32(which, (const uint32_t *)row_of(x, b, h, t + i) + pair)
                                      : _mm512_setzero_si512();
            turn(r);
            for (int i = 0; i < LANES && pair + i < D / 2; i++) _mm512_storeu_si512(panel + (pair + i) * PANEL, r[i]);
        }
    }
    for (long t = up(tokens, LANES); t < up(tokens, PANEL); t += LANES)
        for (long pair = 0; pair < D / 2; pair++)
            memset(packed + t / PANEL * PANEL * (D / 2) + t % PANEL + pair * PANEL, 0, LANES * sizeof(uint32_t));
}

/* Pack tokens of a head as rows, pairs along the tokens: for each PANEL numbers of the head, [pairs, PANEL]. */
static void pack_along(Rows x, long b, long h, long tokens, long pairs, long D, uint32_t *packed) {
    for (long column = 0; column < up(D, PANEL); column += LANES) {
        uint32_t *panel = packed + column / PANEL * PANEL * pairs + column % PANEL;
        const __mmask16 which = lanes(D - column);
        for (long pair = 0; pair < pairs; pair++) {
            const __mmask16 one = 2 * pair < tokens ? which : 0, other = 2 * pair + 1 < tokens ? which : 0;
            const uint16_t *at = row_of(x, b, h, 2 * pair) + column;
            const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(one, at));
            const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(other, at + x.token));
            _mm512_storeu_si512(panel + pair * PANEL, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
        }
    }
}

/* 2^x for x <= 0, to a unit in the last place or two of float32. */
static inline __m512 power(__m512 x) {
    const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 r = _mm512_sub_ps(x, whole);
    __m512 p = _mm512_set1_ps(1.5403530393381608e-4f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3333558146428443e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(9.618129107628477e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.550410866482158e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(2.402265069591007e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(6.931471805599453e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, _mm512_max_ps(whole, _mm512_set1_ps(-1000)));
}

typedef struct {
    float scores[QUERIES * KEYS], out[QUERIES * LARGEST_HEAD], largest[QUERIES], sum[QUERIES];
    uint16_t weights[QUERIES * KEYS], queries[QUERIES * LARGEST_HEAD];
} Room;

/* The weights of one query for the first `keys` keys of a block, in bfloat16; zero for those up to `width`. The softmax so
   far and what it has summed up are scaled to the largest score. */
static void soften(Room *room, long row, long keys, long width, float scale, long D) {
    float *scores = room->scores + row * KEYS;
    uint16_t *weights = room->weights + row * KEYS;
    __m512 top = _mm512_set1_ps(-INFINITY);
    for (long k = 0; k < keys; k += LANES) {
        const __mmask16 which = lanes(keys - k);
        const __m512 s = _mm512_mul_ps(_mm512_loadu_ps(scores + k), _mm512_set1_ps(scale));
        _mm512_storeu_ps(scores + k, s);
        top = _mm512_mask_max_ps(top, which, top, s);
    }
    const float before = room->largest[row], found = _mm512_reduce_max_ps(top);
    const float largest = before > found ? before : found;
    __m512 sum = _mm512_setzero_ps();
    for (long k = 0; k < keys; k += LANES) {
        const __mmask16 which = lanes(keys - k);
        const __m512 raised = power(_mm512_sub_ps(_mm512_loadu_ps(scores + k), _mm512_set1_ps(largest)));
        const __m512 p = _mm512_maskz_mov_ps(which, raised);
        sum = _mm512_add_ps(sum, p);
        _mm256_storeu_si256((__m256i *)(weights + k), (__m256i)_mm512_cvtneps_pbh(p));
    }
    for (long k = up(keys, LANES); k < width; k += LANES) _mm256_storeu_si256((__m256i *)(weights + k), _mm256_setzero_si256());
    const float shrunk = before == -INFINITY ? 0 : _mm512_cvtss_f32(power(_mm512_set1_ps(before - largest)));
    room->sum[row] = room->sum[row] * shrunk + _mm512_reduce_add_ps(sum);
    room->largest[row] = largest;
    if (shrunk != 1)
        for (long d = 0; d < D; d += LANES) {
            float *at = room->out + row * LARGEST_HEAD + d;
            _mm512_storeu_ps(at, _mm512_mul_ps(_mm512_loadu_ps(at), _mm512_set1_ps(shrunk)));
        }
}

/* The output of QUERIES queries of a head, or of those that are left, and the logarithms of what the softmax divides by. */
static void block(Rows q, long b, long h, long first, const uint32_t *keys, const uint32_t *values, uint16_t *out, float *logs,
                  long H, long tokens, long D, float scale, int causal, Room *room) {
    const long rows = tokens - first < QUERIES ? tokens - first : QUERIES, tiles = up(rows, STEP), pairs = up(tokens, PANEL) / 2;
    memset(room->queries, 0, sizeof room->queries);
    for (long r = 0; r < rows; r++) memcpy(room->queries + r * D, row_of(q, b, h, first + r), D * sizeof(uint16_t));
    memset(room->out, 0, sizeof room->out);
    for (long r = 0; r < QUERIES; r++) {
        room->largest[r] = -INFINITY;
        room->sum[r] = 0;
    }
    const long seen = causal ? first + rows : tokens; /* by the last query */
    for (long start = 0; start < seen; start += KEYS) {
        const long some = seen - start < KEYS ? seen - start : KEYS, width = up(some, PANEL);
        for (long k = 0; k < width; k += PANEL)
            for (long r = 0; r < tiles; r += STEP)
                tile((const uint32_t *)room->queries + r * D / 2, D / 2, keys + (start + k) * (D / 2), D / 2,
                     room->scores + r * KEYS + k, KEYS, 0);
        for (long r = 0; r < tiles; r++) {
            const long left = causal ? first + r + 1 - start : some, mine = r >= rows ? 0 : left < some ? left : some;
            if (mine > 0) soften(room, r, mine, width, scale, up(D, PANEL));
            else memset(room->weights + r * KEYS, 0, width * sizeof(uint16_t));
        }
        for (long d = 0; d < D; d += PANEL)
            for (long r = 0; r < tiles; r += STEP)
                tile((const uint32_t *)room->weights + r * KEYS / 2, KEYS / 2, values + d * pairs + start / 2 * PANEL, width / 2,
                     room->out + r * LARGEST_HEAD + d, LARGEST_HEAD, 1);
    }
    for (long r = 0; r < rows && logs; r++) logs[(b * H + h) * tokens + first + r] = room->largest[r] + log2f(room->sum[r]);
    for (long r = 0; r < rows; r++)
        for (long d = 0; d < D; d += LANES) {
            const __m512 o = _mm512_div_ps(_mm512_loadu_ps(room->out + r * LARGEST_HEAD + d), _mm512_set1_ps(room->sum[r]));
            const __mmask16 which = lanes(D - d);
            _mm256_mask_storeu_epi16(out + ((b * tokens + first + r) * H + h) * D + d, which, (__m256i)_mm512_cvtneps_pbh(o));
        }
}

int attention_largest_head(void) { return LARGEST_HEAD; }

/* How many 32-bit words of room the packed keys and values of one head need. */
long attention_packed(long tokens, long D) { return up(tokens, PANEL) * (D / 2 + up(D, PANEL) / 2); }

/* How many bytes of room one thread needs. */
long attention_room(void) { return up(sizeof(Room), 64); }

/* out [B, L, H, D] = softmax(scale q k^T) v for q [B, H, L, D], k and v [B, G, L, D], whose strides are given batch, head and
   token; `causal`: each token sees itself and those before it. D is even. If there are `logs` [B, H, L], they take the binary
   logarithms of the sums that the softmax divides by. `packed` holds B G times attention_packed words, `room` attention_room
   bytes for each thread. */
void attention(const uint16_t *q, const uint16_t *k, const uint16_t *v, const long *strides, uint16_t *out, float *logs, long B,
               long H, long G, long tokens, long D, float scale, int causal, uint32_t *packed, char *room, int threads) {
    const Rows queries = rows_of(q, strides, 0), keys = rows_of(k, strides, 1), values = rows_of(v, strides, 2);
    const long across = up(tokens, PANEL) * (D / 2), all = attention_packed(tokens, D), blocks = (tokens + QUERIES - 1) / QUERIES;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (long head = 0; head < B * G; head++) {
            pack_across(keys, head / G, head % G, tokens, D, packed + head * all);
            pack_along(values, head / G, head % G, tokens, up(tokens, PANEL) / 2, D, packed + head * all + across);
        }
#pragma omp for schedule(dynamic, 1)
        for (long part = 0; part < B * H * blocks; part++) {
            const long b = part / blocks / H, h = part / blocks % H, from = blocks - 1 - part % blocks;
            const uint32_t *here = packed + (b * G + h / (H / G)) * all;
            block(queries, b, h, from * QUERIES, here, here + across, out, logs, H, tokens, D, scale * LOG2E, causal,
                  (Room *)(room + omp_get_thread_num() * attention_room()));
        }
    }
}

/* What the gradients of a block of queries need. */
typedef struct {
    float scores[QUERIES * SEEN], steps[QUERIES * SEEN], out[QUERIES * LARGEST_HEAD];
    uint32_t turned[(SEEN + STEP) * TURNED], turned_steps[(SEEN + STEP) * TURNED];
    uint32_t along[QUERIES / 2 * LARGEST_HEAD], grad_along[QUERIES / 2 * LARGEST_HEAD];
    uint16_t weights[QUERIES * SEEN], slopes[QUERIES * SEEN];
    uint16_t queries[QUERIES * LARGEST_HEAD], grads[QUERIES * LARGEST_HEAD];
    float logs[QUERIES], shared[QUERIES];
} BackRoom;

/* Weights and slopes of the scores of one query for the first `keys` keys of a block, in bfloat16, zero up to `width`. */
static void slope(BackRoom *room, long row, long keys, long width, float scale) {
    const __m512 log = _mm512_set1_ps(room->logs[row]), shared = _mm512_set1_ps(room->shared[row]);
    for (long k = 0; k < width; k += LANES) {
        const long at = row * SEEN + k;
        const __mmask16 which = lanes(keys - k);
        const __m512 s = _mm512_mul_ps(_mm512_loadu_ps(room->scores + at), _mm512_set1_ps(scale * LOG2E));
        const __m512 p = _mm512_maskz_mov_ps(which, power(_mm512_sub_ps(s, log)));
        const __m512 step = _mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(room->steps + at), shared), _mm512_set1_ps(scale));
        _mm256_storeu_si256((__m256i *)(room->weights + at), (__m256i)_mm512_cvtneps_pbh(p));
        _mm256_storeu_si256((__m256i *)(room->slopes + at), (__m256i)_mm512_cvtneps_pbh(_mm512_maskz_mul_ps(which, p, step)));
    }
}

/* Rows [QUERIES, SEEN] in bfloat16 turned to [keys, TURNED] pairs of rows. */
static void turn_rows(const uint16_t *from, long keys, uint32_t *to) {
    for (long k = 0; k < keys; k += LANES)
        for (long pair = 0; pair < QUERIES / 2; pair += LANES) {
            __m512i r[LANES];
            for (long i = 0; i < LANES; i++) {
                const uint16_t *at = from + 2 * (pair + i) * SEEN + k;
                if (pair + i >= QUERIES / 2) r[i] = _mm512_setzero_si512();
                else {
                    const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)at));
                    const __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(at + SEEN)));
                    r[i] = _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
                }
            }
            turn(r);
            for (long i = 0; i < LANES; i++) _mm512_storeu_si512(to + (k + i) * TURNED + pair, r[i]);
        }
}

/* The sum of products of one query's output and its gradient: what all its scores share. */
static float shared_of(const uint16_t *out, const uint16_t *grad, long D) {
    __m512 sum = _mm512_setzero_ps();
    for (long d = 0; d < D; d += LANES) {
        const __mmask16 which = lanes(D - d);
        const __m512i o = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(which, out + d)), 16);
        const __m512i g = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(which, grad + d)), 16);
        sum = _mm512_fmadd_ps(_mm512_castsi512_ps(o), _mm512_castsi512_ps(g), sum);
    }
    return _mm512_reduce_add_ps(sum);
}

/* Rows of float32, `width` apart, to bfloat16 rows of D numbers, `apart` apart. */
static void leave(const float *from, long width, long rows, long D, uint16_t *to, long apart) {
    for (long r = 0; r < rows; r++)
        for (long d = 0; d < D; d += LANES) {
            const __mmask16 which = lanes(D - d);
            _mm256_mask_storeu_epi16(to + r * apart + d, which, (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(from + r * width + d)));
        }
}

/* The packed forms of the keys and values of one head, and the sums of their gradients. */
typedef struct {
    const uint32_t *keys_across, *values_across, *keys_along;
    float *key_sums, *value_sums; /* [L, up(D, PANEL)] */
} Head;

/* Add what a block of queries gives to the gradients of keys and values; its own gradient is left in room->out. */
static void back_block(Head head, long first, long rows, long tokens, long D, float scale, int causal, BackRoom *room) {
    const long tiles = up(rows, STEP), wide = up(D, PANEL), pairs = up(tokens, PANEL) / 2;
    const long seen = causal ? first + rows : tokens; /* by the last query */
    memset(room->out, 0, sizeof room->out);
    for (long start = 0; start < seen; start += SEEN) {
        const long some = seen - start < SEEN ? seen - start : SEEN, width = up(some, PANEL);
        for (long k = 0; k < width; k += PANEL)
            for (long r = 0; r < tiles; r += STEP) {
                const long panel = (start + k) * (D / 2), at = r * SEEN + k;
                tile((const uint32_t *)room->queries + r * D / 2, D / 2, head.keys_across + panel, D / 2, room->scores + at, SEEN, 0);
                tile((const uint32_t *)room->grads + r * D / 2, D / 2, head.values_across + panel, D / 2, room->steps + at, SEEN, 0);
            }
        for (long r = 0; r < QUERIES; r++) {
            const long left = causal ? first + r + 1 - start : some;
            slope(room, r, r >= rows ? 0 : left < some ? left : some, width, scale);
        }
        turn_rows(room->weights, width, room->turned);
        turn_rows(room->slopes, width, room->turned_steps);
        memset(room->turned + width * TURNED, 0, STEP * TURNED * sizeof(uint32_t));
        memset(room->turned_steps + width * TURNED, 0, STEP * TURNED * sizeof(uint32_t));
        for (long d = 0; d < D; d += PANEL) {
            for (long r = 0; r < tiles; r += STEP)
                tile((const uint32_t *)room->slopes + r * SEEN / 2, SEEN / 2, head.keys_along + d * pairs + start / 2 * PANEL,
                     width / 2, room->out + r * LARGEST_HEAD + d, LARGEST_HEAD, 1);
            for (long k = 0; k < width; k += STEP) {
                float *key = head.key_sums + (start + k) * wide + d, *value = head.value_sums + (start + k) * wide + d;
                tile(room->turned_steps + k * TURNED, TURNED, room->along + d * (QUERIES / 2), QUERIES / 2, key, wide, 1);
                tile(room->turned + k * TURNED, TURNED, room->grad_along + d * (QUERIES / 2), QUERIES / 2, value, wide, 1);
            }
        }
    }
}

/* How many 32-bit words of room one thread needs for the packed keys and values of a head and the sums of their gradients. */
long attention_back_packed(long tokens, long D) {
    const long wide = up(D, PANEL), rows = up(tokens, PANEL);
    return rows * (D / 2) * 2 + rows * (wide / 2) + 2 * (rows + STEP) * wide;
}

/* How many bytes of room one thread needs beside. */
long attention_back_room(void) { return up(sizeof(BackRoom), 64); }

/* The gradients of `attention`: of q [B, L, H, D], k and v [B, L, G, D], from that of its output. The strides are those of q, k,
   v, the output and its gradient. For each thread `packed` holds attention_back_packed words, `room` attention_back_room bytes. */
void attention_back(const uint16_t *q, const uint16_t *k, const uint16_t *v, const uint16_t *out, const uint16_t *grad,
                    const long *strides, const float *logs, uint16_t *dq, uint16_t *dk, uint16_t *dv, long B, long H, long G,
                    long tokens, long D, float scale, int causal, uint32_t *packed, char *room, int threads) {
    const Rows queries = rows_of(q, strides, 0), keys = rows_of(k, strides, 1), values = rows_of(v, strides, 2);
    const Rows outs = rows_of(out, strides, 3), grads = rows_of(grad, strides, 4);
    const long wide = up(D, PANEL), padded = up(tokens, PANEL), across = padded * (D / 2);
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (long part = 0; part < B * G; part++) {
        const long b = part / G, g = part % G;
        uint32_t *own = packed + omp_get_thread_num() * attention_back_packed(tokens, D);
        BackRoom *here = (BackRoom *)(room + omp_get_thread_num() * attention_back_room());
        float *sums = (float *)(own + 2 * across + padded * (wide / 2));
        const Head head = {own, own + across, own + 2 * across, sums, sums + (padded + STEP) * wide};
        pack_across(keys, b, g, tokens, D, own);
        pack_across(values, b, g, tokens, D, own + across);
        pack_along(keys, b, g, tokens, padded / 2, D, own + 2 * across);
        memset(sums, 0, 2 * (padded + STEP) * wide * sizeof(float));
        for (long h = g * (H / G); h < (g + 1) * (H / G); h++)
            for (long first = 0; first < tokens; first += QUERIES) {
                const long rows = tokens - first < QUERIES ? tokens - first : QUERIES;
                memset(here->queries, 0, sizeof here->queries);
                memset(here->grads, 0, sizeof here->grads);
                for (long r = 0; r < rows; r++) {
                    const uint16_t *mine = row_of(grads, b, h, first + r);
                    memcpy(here->queries + r * D, row_of(queries, b, h, first + r), D * sizeof(uint16_t));
                    memcpy(here->grads + r * D, mine, D * sizeof(uint16_t));
                    here->logs[r] = logs[(b * H + h) * tokens + first + r];
                    here->shared[r] = shared_of(row_of(outs, b, h, first + r), mine, D);
                }
                const Rows block = {here->queries, 0, 0, D}, block_grads = {here->grads, 0, 0, D};
                pack_along(block, 0, 0, QUERIES, QUERIES / 2, D, here->along);
                pack_along(block_grads, 0, 0, QUERIES, QUERIES / 2, D, here->grad_along);
                back_block(head, first, rows, tokens, D, scale, causal, here);
                leave(here->out, LARGEST_HEAD, rows, D, dq + ((b * tokens + first) * H + h) * D, H * D);
            }
        leave(head.key_sums, wide, tokens, D, dk + (b * tokens * G + g) * D, G * D);
        leave(head.value_sums, wide, tokens, D, dv + (b * tokens * G + g) * D, G * D);
    }
}

int attention_works(void) { return 1; }

#else

/* Without products of bfloat16 there is no kernel. */
int attention_works(void) { return 0; }

#endif
