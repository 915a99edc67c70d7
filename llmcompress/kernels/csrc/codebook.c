/* The parts of the solver of codebooks that go weight by weight: clusters of sorted weights, and the normal equations of levels.

   The clusters are those of `algorithms.codebook_loops.cluster`, which explains them. The cost of all pairs of edges is one
   matrix of floats, over which each step of the dynamic programme goes once: there are few bins, and several ends are done at
   once. Ties are resolved as torch does: the first of equals is kept.

   N weights of a group, G groups, R rows (outputs), C columns (inputs), L levels. */

#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>

#define BINS 128 /* that are clustered, at most */
#define MOST 256 /* levels */
#define FEW 16   /* levels with normal equations */
#define WIDTH 64 /* columns of H whose sums are in registers */
#define ROWS 64  /* that read a part of H while it is in the second cache */

typedef float Floats __attribute__((vector_size(64), aligned(4)));
#define LANES 16

/* Where a thread keeps the weights of a group. */
typedef struct {
    uint64_t *key, *other; /* [N] */
    double *weigh, *mass, *moment, *square, *reach; /* [N + 1], the last but one are running sums */
    float *x; /* [N], ascending */
} Room;

static const long EACH = 2 * sizeof(uint64_t) + 5 * sizeof(double) + sizeof(float);

/* Bytes of a thread's room. */
long codebook_room(long N) { return (N + 8) * EACH; }

static Room room_of(char *at, long N) {
    const long size = N + 8;
    Room room;
    room.key = (uint64_t *)at, room.other = room.key + size;
    room.weigh = (double *)(room.other + size), room.mass = room.weigh + size, room.moment = room.mass + size;
    room.square = room.moment + size, room.reach = room.square + size;
    room.x = (float *)(room.reach + size);
    return room;
}

/* Sort weights in ascending order, equal ones by their place: in the keys, the weight is above its place. */
static void sort(Room *room, const float *w, long N) {
    uint32_t count[4][256] = {{0}};
    for (long n = 0; n < N; n++) {
        const float weight = w[n] + 0.0f; /* -0 is 0 */
        uint32_t bits;
        memcpy(&bits, &weight, 4);
        bits ^= bits >> 31 ? 0xffffffffu : 0x80000000u;
        room->key[n] = (uint64_t)bits << 32 | (uint32_t)n;
        for (int digit = 0; digit < 4; digit++) count[digit][bits >> 8 * digit & 255]++;
    }
    for (int digit = 0; digit < 4; digit++) {
        const int shift = 32 + 8 * digit;
        uint32_t begin = 0, *at = count[digit];
        if (at[room->key[0] >> shift & 255] == N) continue;
        for (int value = 0; value < 256; value++) {
            const uint32_t some = at[value];
            at[value] = begin, begin += some;
        }
        for (long n = 0; n < N; n++) room->other[at[room->key[n] >> shift & 255]++] = room->key[n];
        uint64_t *sorted = room->other;
        room->other = room->key, room->key = sorted;
    }
}

/* The cube root, to the last bits, of normal numbers from 0. */
static inline double root(double a) {
    uint64_t bits;
    memcpy(&bits, &a, 8);
    bits = (uint64_t)((double)bits * (1.0 / 3)) + 0x2a9f7893782da1ceULL;
    double y;
    memcpy(&y, &bits, 8);
    for (int step = 0; step < 3; step++) {
        const double cube = y * y * y;
        y = y * ((cube + 2 * a) / (2 * cube + a));
    }
    return a > 0 ? y : 0;
}

/* Where bins of the sorted weights begin, and the end of the last. */
static void cut_bins(const Room *room, long N, int bins, long *edge) {
    double *reach = room->reach;
#pragma omp simd
    for (long n = 0; n < N - 1; n++) {
        const double width = room->x[n + 1] - room->x[n];
        reach[n] = root((room->weigh[n + 1] + room->weigh[n]) / 2 * (width * width));
    }
    for (long n = 1; n < N - 1; n++) reach[n] += reach[n - 1];
    long found = 0, last = 0;
    edge[0] = 0, edge[bins] = N;
    for (int bin = 1; bin < bins; bin++) {
        const double goal = reach[N - 2] * bin / bins;
        while (found < N - 1 && reach[found] < goal) found++;
        if (found + 1 - bin > last) last = found + 1 - bin;
        if (last > N - bins) last = N - bins;
        edge[bin] = last + bin;
    }
}

/* Put the edges of the L clusters of bins with the least loss in place of those of the bins. */
static void cluster_bins(const Room *room, int bins, int L, long *edge) {
    double mass[BINS + 1], moment[BINS + 1], square[BINS + 1];
    float cost[BINS][BINS]; /* of a cluster, by its first bin and its last */
    float least[FEW][BINS]; /* of some clusters, by their last bin */
    for (int e = 0; e <= bins; e++)
        mass[e] = room->mass[edge[e]], moment[e] = room->moment[edge[e]], square[e] = room->square[edge[e]];
    const double whole = square[bins] - square[0] - (moment[bins] - moment[0]) * (moment[bins] - moment[0]) / (mass[bins] - mass[0]);
    const double unit = 1 / (whole > 1e-300 ? whole : 1e-300);
    for (int i = 0; i < bins; i++) {
        const int start = i / LANES * LANES;
        for (int j = start; j < i; j++) cost[i][j] = INFINITY;
#pragma omp simd
        for (int j = i; j < bins; j++) {
            const double sum = moment[j + 1] - moment[i];
            const double lost = square[j + 1] - square[i] - sum * sum / (mass[j + 1] - mass[i]);
            cost[i][j] = (float)((lost > 0 ? lost : 0) * unit);
        }
    }
    memcpy(least[0], cost[0], bins * sizeof(float));
    for (int l = 1; l < L; l++) {
        float *to = least[l];
        for (int j = 0; j < bins; j++) to[j] = INFINITY;
        for (int i = l; i < bins; i++) {
            const float before = least[l - 1][i - 1];
            const float *more = cost[i];
#pragma omp simd
            for (int j = i / LANES * LANES; j < bins; j++) {
                const float all = before + more[j];
                to[j] = all < to[j] ? all : to[j];
            }
        }
    }
    int first[FEW + 1];
    first[L] = bins, first[0] = 0;
    for (int l = L - 1; l; l--) {
        const int j = first[l + 1] - 1;
        int i = l;
        while (i < j && least[l - 1][i - 1] + cost[i][j] != least[l][j]) i++;
        first[l] = i;
    }
    for (int l = 0; l <= L; l++) edge[l] = edge[first[l]];
}

/* The first place whose weight is not below `border`, near the place where it was before. */
static inline long place_of(const float *x, long N, float border, long near) {
    long low = near, high = near, step = 1; /* all below low are below the border, and none from high on */
    if (near < N && x[near] < border) {
        low = ++high;
        while (high < N && x[high] < border) low = high + 1, high += step, step *= 2;
        if (high > N) high = N;
    } else {
        while (low > 0 && x[low - 1] >= border) high = low - 1, low -= step, step *= 2;
        if (low < 0) low = 0;
    }
    while (low < high) {
        const long middle = low + (high - low) / 2;
        if (x[middle] < border) low = middle + 1;
        else high = middle;
    }
    return low;
}

/* Levels of k-means from the clusters between edges. */
static void lloyd(const Room *room, long N, int L, int steps, long *edge, double *level) {
    for (int l = 0; l < L; l++) level[l] = room->x[edge[l]];
    for (int step = 0; step < steps; step++) {
        int moved = 0;
        for (int l = 0; l < L; l++) {
            const double inside = room->mass[edge[l + 1]] - room->mass[edge[l]];
            if (!(inside > 0)) continue;
            const double mean = (room->moment[edge[l + 1]] - room->moment[edge[l]]) / inside;
            moved |= mean != level[l];
            level[l] = mean;
        }
        if (!moved) break;
        for (int l = 1; l < L; l++) edge[l] = place_of(room->x, N, (float)((level[l] + level[l - 1]) / 2), edge[l]);
    }
}

/* Ascending levels [L] of a group: its distinct weights, if they are no more. */
static void levels_of(const Room *room, long N, int L, const double *level, float *levels) {
    long distinct = 1;
    float found[MOST];
    found[0] = room->x[0];
    for (long n = 1; n < N && distinct <= L; n++)
        if (room->x[n] != room->x[n - 1]) {
            if (distinct < L) found[distinct] = room->x[n];
            distinct++;
        }
    for (int l = 0; l < L; l++) {
        float value = distinct > L ? (float)level[l] : found[l < distinct ? l : distinct - 1];
        int place = l;
        for (; place && levels[place - 1] > value; place--) levels[place] = levels[place - 1];
        levels[place] = value;
    }
}

/* The levels [G, L] of weights [G, N], those of column c = n % C weighted by h [C]. */
void codebook_cluster(const float *weight, const double *h, long columns, long groups, long N, int L, int steps, char *room,
                      float *levels, int threads) {
#pragma omp parallel for num_threads(threads) schedule(dynamic, 8)
    for (long g = 0; g < groups; g++) {
        Room own = room_of(room + omp_get_thread_num() * codebook_room(N), N);
        long edge[MOST + 1];
        double level[MOST];
        sort(&own, weight + g * N, N);
        double mass = 0, moment = 0, square = 0;
        for (long n = 0; n < N; n++) {
            const uint32_t place = (uint32_t)own.key[n];
            const double x = weight[g * N + place], weigh = h[N == columns ? place : place % columns];
            own.x[n] = (float)x, own.weigh[n] = weigh;
            own.mass[n] = mass, own.moment[n] = moment, own.square[n] = square;
            mass += weigh, moment += weigh * x, square += weigh * (x * x);
        }
        own.mass[N] = mass, own.moment[N] = moment, own.square[N] = square;
        if (L < N) {
            const int bins = L >= BINS ? L : N < BINS ? (int)N : BINS;
            cut_bins(&own, N, bins, edge);
            if (L < BINS) cluster_bins(&own, bins, L, edge);
            lloyd(&own, N, L, steps, edge, level);
        } else
            for (int l = 0; l < L; l++) level[l] = own.x[N - 1];
        levels_of(&own, N, L, level, levels + g * L);
    }
}

/* Floats of H as `codebook_normal` packs it. */
long codebook_packed(long C) {
    long size = 0;
    for (long start = 0; start < C; start += WIDTH) size += (C - start) * WIDTH;
    return size;
}

/* Bytes of a thread's room for the order of columns. */
long codebook_ordered(long C) { return ROWS * C * (long)(sizeof(uint32_t) + 1); }

/* The normal matrices [R, L, L] of the levels of rows: sums of H [C, C] over the columns that take one level, and those that
   take another; index [R, C]. H is packed first: what is below its diagonal, and half of the diagonal, in parts of WIDTH
   columns. The other half of a sum is the transpose. */
void codebook_normal(const float *H, const int64_t *index, long rows, long C, int L, float *packed, char *room, float *normal,
                     int threads) {
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(dynamic, 1)
        for (long start = 0; start < C; start += WIDTH) {
            const long part = start / WIDTH;
            float *to = packed + WIDTH * (part * C - WIDTH * (part * (part - 1) / 2));
            for (long row = start; row < C; row++)
                for (long c = start; c < start + WIDTH; c++, to++)
                    *to = c < row ? H[row * C + c] : c == row ? H[row * C + c] / 2 : 0;
        }
#pragma omp for schedule(dynamic, 1)
        for (long first = 0; first < rows; first += ROWS) {
            const long some = rows - first < ROWS ? rows - first : ROWS;
            uint32_t *ordered = (uint32_t *)(room + omp_get_thread_num() * codebook_ordered(C));
            uint8_t *level_of = (uint8_t *)(ordered + ROWS * C);
            uint32_t next[ROWS][FEW], end[ROWS][FEW];
            float sums[ROWS][FEW][FEW];
            memset(sums, 0, sizeof(sums));
            for (long r = 0; r < some; r++) {
                const int64_t *own = index + (first + r) * C;
                uint32_t count[FEW] = {0}, begin = 0;
                for (long c = 0; c < C; c++) {
                    level_of[r * C + c] = (uint8_t)own[c] & (FEW - 1);
                    count[level_of[r * C + c]]++;
                }
                for (int l = 0; l < FEW; l++) next[r][l] = end[r][l] = begin, begin += count[l];
                for (long c = 0; c < C; c++) ordered[r * C + end[r][level_of[r * C + c]]++] = (uint32_t)c;
            }
            const float *part = packed;
            for (long start = 0; start < C; part += (C - start) * WIDTH, start += WIDTH) {
                const long wide = C - start < WIDTH ? C - start : WIDTH;
                for (long r = 0; r < some; r++) {
                    const uint32_t *order = ordered + r * C;
                    const uint8_t *taken = level_of + r * C + start;
                    for (int l = 0; l < L; l++) {
                        uint32_t at = next[r][l];
                        const uint32_t stop = end[r][l];
                        while (at < stop && order[at] < start) at++;
                        next[r][l] = at;
                        Floats sum[WIDTH / LANES] = {{0}};
                        for (; at < stop; at++) {
                            const Floats *from = (const Floats *)(part + (order[at] - start) * WIDTH);
                            for (int lane = 0; lane < WIDTH / LANES; lane++) sum[lane] += from[lane];
                        }
                        float one[WIDTH];
                        memcpy(one, sum, sizeof(one));
                        for (long c = 0; c < wide; c++) sums[r][l][taken[c]] += one[c];
                    }
                }
            }
            for (long r = 0; r < some; r++)
                for (int l = 0; l < L; l++)
                    for (int m = 0; m < L; m++) normal[((first + r) * L + l) * L + m] = sums[r][l][m] + sums[r][m][l];
        }
    }
}
