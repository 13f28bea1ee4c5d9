/* What lies between a decoder's matrix products, each in one pass over memory.

   torch writes and reads a tensor for every operation; here a row stays in a core's registers and first cache
   from the first operation to the last. Each function does what the Python named beside it does, with the same
   roundings; sums are floats. Compiled for one model: with BF16 defined its numbers are bfloat16, else floats;
   KV key heads of K numbers, each for G query heads; blocks of BLOCK tokens. N rows (tokens), C width, F hidden
   width. A row of `qkv` holds KV G query heads, then KV key heads, then as many value heads. */
#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined __AVX512F__ && !defined __clang__
#pragma GCC target("prefer-vector-width=512")
#endif

#ifdef BF16
typedef uint16_t number;                     /* the upper half of a float */

static inline float get(number x) {
    uint32_t bits = (uint32_t)x << 16;
    float y;
    memcpy(&y, &bits, sizeof y);
    return y;
}

static inline number put(float y) {           /* to the nearest, ties to even */
    uint32_t bits;
    memcpy(&bits, &y, sizeof bits);
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
#else
typedef float number;
static inline float get(number x) { return x; }
static inline number put(float y) { return y; }
#endif

#define ENOUGH 16384                        /* numbers, for threads to be worth their start */

/* model/layers.py, RMSNorm, of one row: to = x / sqrt(mean(x^2) + eps) * weight; `to` may be x. */
static inline void normed(number *to, const number *x, const number *weight, long C, float eps) {
    float sum = 0;
    for (long c = 0; c < C; c++) sum += get(x[c]) * get(x[c]);
    float scale = 1 / sqrtf(sum / C + eps);
    for (long c = 0; c < C; c++) to[c] = put(get(put(get(x[c]) * scale)) * get(weight[c]));
}

/* model/decoder.py, Block: x = x + more, unless there is none; to = norm(x). All (N, C). */
void add_norm(number *x, const number *more, number *to, const number *weight, long N, long C, double eps) {
#pragma omp parallel for if (N * C > ENOUGH)
    for (long n = 0; n < N; n++) {
        number *row = x + n * C;
        if (more) for (long c = 0; c < C; c++) row[c] = put(get(row[c]) + get(more[n * C + c]));
        normed(to + n * C, row, weight, C, eps);
    }
}

/* model/layers.py, MLP: to (N, F) = silu(gate) * up; a row of gate_up has F of one, then F of the other. */
void swiglu(number *to, const number *gate_up, long N, long F) {
#pragma omp parallel for if (N * F > ENOUGH)
    for (long n = 0; n < N; n++) {
        const number *gate = gate_up + 2 * n * F, *up = gate + F;
        for (long f = 0; f < F; f++) {
            float g = get(gate[f]);
            to[n * F + f] = put(get(put(g / (1 + expf(-g)))) * get(up[f]));
        }
    }
}

/* model/layers.py, rotate, of one head, in place. */
static inline void rotated(number *a, const float *cosine, const float *sine) {
    number *b = a + K / 2;
    for (long j = 0; j < K / 2; j++) {
        float aj = get(a[j]), bj = get(b[j]);
        a[j] = put(aj * cosine[j] - bj * sine[j]);
        b[j] = put(bj * cosine[j] + aj * sine[j]);
    }
}

/* model/attention.py, Attention, before its core: norms of queries and keys (none where null), both rotated, in
   place; then, as serve/engine/paged_attention.py, keys and values into their slots of `pool` (2 KV, all, K). cosine and sine
   are (N, K/2). */
void place(number *qkv, const number *q_norm, const number *k_norm, double eps, const float *cosine,
           const float *sine, number *pool, const long *slots, long N, long all) {
#pragma omp parallel for if (N * KV * G * K > ENOUGH)
    for (long n = 0; n < N; n++) {
        number *q = qkv + n * (KV * G + 2 * KV) * K, *k = q + KV * G * K;
        for (long h = 0; h < KV * G + KV; h++) {
            const number *weight = h < KV * G ? q_norm : k_norm;
            if (weight) normed(q + h * K, q + h * K, weight, K, eps);
            rotated(q + h * K, cosine + n * (K / 2), sine + n * (K / 2));
        }
        for (long h = 0; h < 2 * KV; h++) memcpy(pool + (h * all + slots[n]) * K, k + h * K, K * sizeof *k);
    }
}

/* Of a block's pages, (BLOCK, K) at `page`: the processor may begin to fetch them. */
static inline void soon(const number *page) {
    for (long i = 0; i < BLOCK * K; i += 64 / sizeof *page) __builtin_prefetch(page + i);
}

/* serve/engine/paged_attention.py, PagedKV, sequences with one query. Each of B rows sees the last `window` of its `ends[b]` keys
   where they lie, block by block in the order of its row of `tables` (B, width). The softmax goes along (Milakov & Gimelshein
   2018): y and sum are those of the keys so far, relative to the highest score so far. to (B, KV G K);
   `pool` (2 KV, blocks, BLOCK, K). */
void attend(number *to, const number *qkv, const number *pool, const long *tables, const long *ends, long B,
            long width, long blocks, long window) {
    const long values = KV * blocks * BLOCK * K;                     /* from a key to its value */
#pragma omp parallel for collapse(2) schedule(dynamic) if (B > 1)
    for (long b = 0; b < B; b++)
        for (long h = 0; h < KV; h++) {
            const number *heads = qkv + (b * (KV * G + 2 * KV) + h * G) * K, *own = pool + h * blocks * BLOCK * K;
            long begin = ends[b] > window ? ends[b] - window : 0, skipped = begin / BLOCK;
            const long *table = tables + b * width + skipped;
            float q[G][K], y[G][K], score[G][BLOCK], sum[G], top[G], one[K];
            for (long g = 0; g < G; g++) {
                for (long j = 0; j < K; j++) q[g][j] = get(heads[g * K + j]) / sqrtf(K), y[g][j] = 0;
                sum[g] = 0, top[g] = -1e30;
            }
            for (long first = skipped * BLOCK; first < ends[b]; first += BLOCK) {
                const number *page = own + *table++ * BLOCK * K;
                long count = ends[b] - first < BLOCK ? ends[b] - first : BLOCK, i0 = begin > first ? begin - first : 0;
                if (first + BLOCK < ends[b]) {
                    soon(own + *table * BLOCK * K);
                    soon(own + *table * BLOCK * K + values);
                }
                for (long i = i0; i < count; i++) {
                    for (long j = 0; j < K; j++) one[j] = get(page[i * K + j]);
                    for (long g = 0; g < G; g++) {
                        float dot = 0;
                        for (long j = 0; j < K; j++) dot += q[g][j] * one[j];
                        score[g][i] = dot;
                    }
                }
                for (long g = 0; g < G; g++) {
                    float high = top[g], more = 0;
                    for (long i = i0; i < count; i++) high = score[g][i] > high ? score[g][i] : high;
                    for (long i = i0; i < count; i++) more += score[g][i] = expf(score[g][i] - high);
                    float shrink = expf(top[g] - high);
                    for (long j = 0; j < K; j++) y[g][j] *= shrink;
                    sum[g] = sum[g] * shrink + more, top[g] = high;
                }
                for (long i = i0; i < count; i++) {
                    for (long j = 0; j < K; j++) one[j] = get(page[values + i * K + j]);
                    for (long g = 0; g < G; g++)
                        for (long j = 0; j < K; j++) y[g][j] += score[g][i] * one[j];
                }
            }
            for (long g = 0; g < G; g++)
                for (long j = 0; j < K; j++) to[((b * KV + h) * G + g) * K + j] = put(y[g][j] / sum[g]);
        }
}

/* serve/engine/engine.py, likeliest: of each row of logits (N, V) the first of the largest. */
void likeliest(long *to, const number *logits, long N, long V) {
#pragma omp parallel for if (N * V > ENOUGH)
    for (long n = 0; n < N; n++) {
        const number *from = logits + n * V;
        long stretch = 0, v;
        float highest = -INFINITY;
        for (long first = 0; first < V; first += 1024) {
            long end = first + 1024 < V ? first + 1024 : V;
            float high = get(from[first]);
            for (v = first; v < end; v++) high = get(from[v]) > high ? get(from[v]) : high;
            if (high > highest) highest = high, stretch = first;
        }
        for (v = stretch; v < V - 1 && get(from[v]) < highest; v++);
        to[n] = v;
    }
}

/* serve/engine/packed_linear.py, Packed, of a single row: to (out) = x (in) weight^T, plus bias (out) unless it is null.
   The order of the weights is our own and the plainest, on every processor: (out, in), row after row, as a
   checkpoint has them. A row is one stretch of memory and one sum, so that a compiler needs no more than its
   widest registers (AVX-512, AVX2, NEON) and a core waits for memory alone. */
void gemv(number *to, const number *x, const number *weight, const number *bias, long in, long out) {
    float wide[in];                          /* x, converted once for all rows */
    for (long i = 0; i < in; i++) wide[i] = get(x[i]);
#pragma omp parallel for if (in * out > ENOUGH)
    for (long o = 0; o < out; o++) {
        const number *row = weight + o * in;
        float sum = 0;
        for (long i = 0; i < in; i++) sum += get(row[i]) * wide[i];
        to[o] = put(bias ? sum + get(bias[o]) : sum);
    }
}

/* What all of this was compiled for. */
const char *instructions(void) {
#if defined __AVX512F__
    return "AVX-512";
#elif defined __AVX2__
    return "AVX2";
#elif defined __ARM_NEON
    return "NEON";
#elif defined __SSE2__
    return "SSE2";
#else
    return "no vectors";
#endif
}
