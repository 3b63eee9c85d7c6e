// Products of packed weights and a few tokens. No lane is ever added to another, and a token's sums
// are taken in the same order however many tokens share a call.
//
// A weight is packed in groups of 32 rows, one row to a lane of two vectors, the lower and the upper.
// Of a group block after block of 32 columns, of a block vector after vector as they are read, since
// memory is read at twice the speed where there is but one stream of it.

#pragma once

#include <immintrin.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#include "ggml.h"

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 8")

enum { LANES = 16, HALVES = 2, ROWS = 32, BLOCK = 32, MOST = 8, LINE = 64 };

// -- formats ---------------------------------------------------------------------------------

INLINE bool is_float(enum ggml_type type) { return type == GGML_TYPE_F16 || type == GGML_TYPE_BF16; }

static bool is_known(enum ggml_type type) {
    return is_float(type) || type == GGML_TYPE_Q8_0 || type == GGML_TYPE_Q4_0 || type == GGML_TYPE_Q4_1 ||
           type == GGML_TYPE_IQ4_NL;
}

// What is added to a weight's integer so that it has no sign.
INLINE int bias_of(enum ggml_type type) {
    return type == GGML_TYPE_Q8_0 || type == GGML_TYPE_IQ4_NL ? 128 : type == GGML_TYPE_Q4_0 ? 8 : 0;
}

// Bytes of a block in llama.cpp's memory.
INLINE size_t block_bytes(enum ggml_type type) {
    return is_float(type) ? 2 * BLOCK : type == GGML_TYPE_Q8_0 ? 34 : type == GGML_TYPE_Q4_1 ? 20 : 18;
}

// Bytes of a group's blocks here: integers, then scales in float32 (q4_1: scales and minima in float16).
INLINE size_t packed_bytes(enum ggml_type type) {
    return is_float(type) ? 2 * BLOCK * ROWS : HALVES * (type == GGML_TYPE_Q8_0 ? 9 : 5) * LINE;
}

INLINE size_t group_bytes(enum ggml_type type, size_t columns) {
    return columns / BLOCK * packed_bytes(type);
}

// One row's block into its lane, 0 to 31.
static void pack_block(enum ggml_type type, const uint8_t * from, uint8_t * to, size_t lane) {
    if (is_float(type)) {
        for (size_t k = 0; k < BLOCK; k++) memcpy(to + 2 * (ROWS * k + lane), from + 2 * k, 2);
        return;
    }
    const size_t integers = packed_bytes(type) - HALVES * LINE;
    uint8_t * scale = to + integers + lane / LANES * LINE;
    if (type == GGML_TYPE_Q4_1) {
        memcpy(scale + 2 * (lane % LANES), from, 2);
        memcpy(scale + LINE / 2 + 2 * (lane % LANES), from + 2, 2);
    } else {
        uint16_t half;
        memcpy(&half, from, 2);
        const float wide = _cvtsh_ss(half);
        memcpy(scale + 4 * (lane % LANES), &wide, 4);
    }
    from += block_bytes(type) - (type == GGML_TYPE_Q8_0 ? BLOCK : BLOCK / 2);
    for (size_t at = 0; at < integers; at += HALVES * LINE, from += 4) {
        uint32_t four;
        memcpy(&four, from, 4);
        if (type == GGML_TYPE_Q8_0) four ^= 0x80808080;
        memcpy(to + at + 4 * lane, &four, 4);
    }
}

static void pack_rows(enum ggml_type type, size_t rows, size_t columns, const uint8_t * from, uint8_t * to) {
    for (size_t row = 0; row < rows; row++) {
        uint8_t * group = to + row / ROWS * group_bytes(type, columns);
        for (size_t k = 0; k < columns; k += BLOCK, from += block_bytes(type), group += packed_bytes(type))
            pack_block(type, from, group, row % ROWS);
    }
}

// -- activations ------------------------------------------------------------------------------

// 32 numbers of a token as integers: x = d * q. s: their sum. c: what makes good for a weight's bias.
struct quantised {
    int32_t q[BLOCK / 4];  // four to a number
    float d, s;
    int32_t c, unused;
};

// Block after block, or column after column in float32, and in each token after token: so the kernels
// read what they need side by side.
struct activations {
    size_t tokens;
    const float * x;
    const struct quantised * blocks;
};

static size_t activations_bytes(enum ggml_type type, size_t columns, size_t tokens) {
    return tokens * (is_float(type) ? columns * sizeof(float) : columns / BLOCK * sizeof(struct quantised));
}

// As llama.cpp rounds them, but with scales in float32.
static void quantise(const float * x, int bias, struct quantised * to) {
    const __m512 low = _mm512_loadu_ps(x), high = _mm512_loadu_ps(x + LANES);
    const float most = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(low), _mm512_abs_ps(high)));
    const __m512 up = _mm512_set1_ps(most > 1e-30f ? 127.0f / most : 0.0f);
    const __m512i i = _mm512_cvtps_epi32(_mm512_mul_ps(low, up));
    const __m512i j = _mm512_cvtps_epi32(_mm512_mul_ps(high, up));
    const int sum = _mm512_reduce_add_epi32(_mm512_add_epi32(i, j));
    _mm_storeu_si128((void *) to->q, _mm512_cvtepi32_epi8(i));
    _mm_storeu_si128((void *) (to->q + BLOCK / 8), _mm512_cvtepi32_epi8(j));
    to->d = most / 127.0f;
    to->s = to->d * sum;
    to->c = -bias * sum;
}

// x: rows of tokens, `stride` numbers apart. memory: of `activations_bytes`.
static struct activations arranged(enum ggml_type type, size_t columns, size_t tokens, const float * x,
                                   size_t stride, void * memory) {
    float * floats = memory;
    struct quantised * blocks = memory;
    for (size_t n = 0; n < tokens; n++, x += stride) {
        if (is_float(type))
            for (size_t k = 0; k < columns; k++) floats[k * tokens + n] = x[k];
        else
            for (size_t b = 0; b < columns / BLOCK; b++)
                quantise(x + b * BLOCK, bias_of(type), blocks + b * tokens + n);
    }
    return (struct activations) {tokens, floats, blocks};
}

// -- one group of rows, some tokens -----------------------------------------------------------

INLINE __m512 floats(enum ggml_type type, const uint8_t * w) {
    const __m256i bits = _mm256_load_si256((const void *) w);
    if (type == GGML_TYPE_F16) return _mm512_cvtph_ps(bits);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

INLINE void float_group(enum ggml_type type, const uint8_t * w, size_t columns, const int tokens,
                        const struct activations * a, size_t first, __m512 sums[HALVES][MOST]) {
    const float * x = a->x + first;
    for (size_t k = 0; k < columns; k++, w += 2 * ROWS, x += a->tokens) {
        const __m512 lower = floats(type, w), upper = floats(type, w + 2 * LANES);
        UNROLL for (int n = 0; n < tokens; n++) {
            sums[0][n] = _mm512_fmadd_ps(lower, _mm512_set1_ps(x[n]), sums[0][n]);
            sums[1][n] = _mm512_fmadd_ps(upper, _mm512_set1_ps(x[n]), sums[1][n]);
        }
    }
}

// A block's integers without a sign: 8 times 4 columns.
INLINE void integers(enum ggml_type type, const uint8_t * w, __m512i u[8][HALVES]) {
    // q4_1 and others by nibbles; iq4_nl's are numbers of its uneven steps, which have the bias here.
    const __m128i steps = _mm_setr_epi8(1, 24, 45, 63, 79, 93, 106, 118, -127, -115, -103, -90, -75, -59, -39, -15);
    const __m512i table = _mm512_broadcast_i32x4(steps), low = _mm512_set1_epi8(15);
    const int vectors = type == GGML_TYPE_Q8_0 ? 8 : 4;
    UNROLL for (int j = 0; j < vectors; j++) {
        UNROLL for (int h = 0; h < HALVES; h++, w += LINE) {
            const __m512i bytes = _mm512_load_si512(w);
            if (type == GGML_TYPE_Q8_0) {
                u[j][h] = bytes;
                continue;
            }
            u[j][h] = _mm512_and_si512(bytes, low);
            u[j + 4][h] = _mm512_and_si512(_mm512_srli_epi16(bytes, 4), low);
            if (type == GGML_TYPE_IQ4_NL) {
                u[j][h] = _mm512_shuffle_epi8(table, u[j][h]);
                u[j + 4][h] = _mm512_shuffle_epi8(table, u[j + 4][h]);
            }
        }
    }
}

INLINE void integer_group(enum ggml_type type, const uint8_t * w, size_t columns, const int tokens,
                          const struct activations * a, size_t first, __m512 sums[HALVES][MOST]) {
    const struct quantised * x = a->blocks + first;
    for (size_t k = 0; k < columns; k += BLOCK, w += packed_bytes(type), x += a->tokens) {
        __m512i u[8][HALVES];
        integers(type, w, u);
        __m512 scales[HALVES], minima[HALVES];
        UNROLL for (int h = 0; h < HALVES; h++) {
            const uint8_t * at = w + packed_bytes(type) - (HALVES - h) * LINE;
            if (type == GGML_TYPE_Q4_1) {
                scales[h] = _mm512_cvtph_ps(_mm256_load_si256((const void *) at));
                minima[h] = _mm512_cvtph_ps(_mm256_load_si256((const void *) (at + LINE / 2)));
            } else {
                scales[h] = _mm512_load_ps(at);
            }
        }
        UNROLL for (int n = 0; n < tokens; n++) {
            __m512i lower = bias_of(type) ? _mm512_set1_epi32(x[n].c) : _mm512_setzero_si512();
            __m512i upper = lower;
            UNROLL for (int j = 0; j < 8; j++) {
                const __m512i four = _mm512_set1_epi32(x[n].q[j]);
                lower = _mm512_dpbusd_epi32(lower, u[j][0], four);
                upper = _mm512_dpbusd_epi32(upper, u[j][1], four);
            }
            const __m512 d = _mm512_set1_ps(x[n].d), s = _mm512_set1_ps(x[n].s);
            sums[0][n] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(lower), _mm512_mul_ps(scales[0], d), sums[0][n]);
            sums[1][n] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(upper), _mm512_mul_ps(scales[1], d), sums[1][n]);
            if (type == GGML_TYPE_Q4_1) {
                sums[0][n] = _mm512_fmadd_ps(minima[0], s, sums[0][n]);
                sums[1][n] = _mm512_fmadd_ps(minima[1], s, sums[1][n]);
            }
        }
    }
}

// -- all of it ----------------------------------------------------------------------------------

// Groups `from` to `to` of the packed rows. out: `stride` numbers a token.
struct product {
    const uint8_t * packed;
    size_t rows, columns, from, to, stride;
    float * out;
};

INLINE void some_tokens(enum ggml_type type, const struct product * p, const struct activations * a,
                        size_t group, size_t first, const int tokens) {
    __m512 sums[HALVES][MOST];
    UNROLL for (int n = 0; n < tokens; n++) sums[0][n] = sums[1][n] = _mm512_setzero_ps();
    (is_float(type) ? float_group : integer_group)(
        type, p->packed + group * group_bytes(type, p->columns), p->columns, tokens, a, first, sums);
    const size_t left = p->rows - group * ROWS;
    const __mmask32 there = left < ROWS ? (1u << left) - 1 : 0xffffffff;
    UNROLL for (int n = 0; n < tokens; n++) {
        float * out = p->out + (first + n) * p->stride + group * ROWS;
        _mm512_mask_storeu_ps(out, (__mmask16) there, sums[0][n]);
        _mm512_mask_storeu_ps(out + LANES, (__mmask16) (there >> LANES), sums[1][n]);
    }
}

INLINE void all_tokens(enum ggml_type type, const struct product * p, const struct activations * a) {
    for (size_t group = p->from; group < p->to; group++)
        for (size_t first = 0; first < a->tokens; first += MOST)
            switch (a->tokens - first) {
                case 1: some_tokens(type, p, a, group, first, 1); break;
                case 2: some_tokens(type, p, a, group, first, 2); break;
                case 3: some_tokens(type, p, a, group, first, 3); break;
                case 4: some_tokens(type, p, a, group, first, 4); break;
                case 5: some_tokens(type, p, a, group, first, 5); break;
                case 6: some_tokens(type, p, a, group, first, 6); break;
                case 7: some_tokens(type, p, a, group, first, 7); break;
                default: some_tokens(type, p, a, group, first, MOST);
            }
}

static void multiply_packed(enum ggml_type type, const struct product * p, const struct activations * a) {
    switch (type) {
        case GGML_TYPE_F16: all_tokens(GGML_TYPE_F16, p, a); break;
        case GGML_TYPE_BF16: all_tokens(GGML_TYPE_BF16, p, a); break;
        case GGML_TYPE_Q8_0: all_tokens(GGML_TYPE_Q8_0, p, a); break;
        case GGML_TYPE_Q4_0: all_tokens(GGML_TYPE_Q4_0, p, a); break;
        case GGML_TYPE_Q4_1: all_tokens(GGML_TYPE_Q4_1, p, a); break;
        default: all_tokens(GGML_TYPE_IQ4_NL, p, a);
    }
}
