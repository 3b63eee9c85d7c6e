// Products of packed weights and a few tokens. No lane is ever added to another, and a token's sums
// are taken in the same order however many tokens share a call.
//
// A weight is packed in groups of rows, one row to a lane of two vectors, the lower and the upper. Of a
// group block after block of 32 columns, of a block vector after vector as they are read, since memory
// is read at twice the speed where there is but one stream of it.

#pragma once

#include <math.h>
#include <string.h>

#include "ggml.h"
#include "vectors.h"

enum { HALVES = 2, ROWS = HALVES * LANES, BLOCK = 32, VECTOR = 4 * LANES };  // the last in bytes

// -- formats ---------------------------------------------------------------------------------

INLINE bool is_float(enum ggml_type type) { return type == GGML_TYPE_F16 || type == GGML_TYPE_BF16; }

// What a weight is packed as. q4_K's blocks of 32 are q4_1's, with scales of their own. Those of 5 and 6
// bits are rounded to 8, which adds a sixteenth of a step to what they were rounded by: llama.cpp has no
// quick kernels for them, and several rows take several times as long there. Others are unknown.
INLINE enum ggml_type packed_as(enum ggml_type type) {
    switch (type) {
        case GGML_TYPE_F16: case GGML_TYPE_BF16: case GGML_TYPE_Q8_0: case GGML_TYPE_Q4_0:
        case GGML_TYPE_Q4_1: case GGML_TYPE_IQ4_NL: return type;
        case GGML_TYPE_Q4_K: return GGML_TYPE_Q4_1;
        case GGML_TYPE_Q5_0: case GGML_TYPE_Q5_1: case GGML_TYPE_Q5_K: case GGML_TYPE_Q6_K: return GGML_TYPE_Q8_0;
        default: return GGML_TYPE_COUNT;
    }
}

INLINE bool has_sign(enum ggml_type type) { return type == GGML_TYPE_Q8_0 || type == GGML_TYPE_IQ4_NL; }

// What is added to a weight's integer; the products with it are taken off again.
INLINE int bias_of(enum ggml_type type) {
    return type == GGML_TYPE_Q4_0 ? 8 : has_sign(type) && !SIGNED_PRODUCTS ? 128 : 0;
}

// Bytes of a group's blocks here: integers, then scales in float32 (q4_1: scales and minima in float16).
INLINE size_t packed_bytes(enum ggml_type type) {
    return is_float(type) ? 2 * BLOCK * ROWS : HALVES * (type == GGML_TYPE_Q8_0 ? 9 : 5) * VECTOR;
}

INLINE size_t group_bytes(enum ggml_type type, size_t columns) {
    return columns / BLOCK * packed_bytes(type);
}

// 32 weights of a row: d * integer + m. 8 bits each, or 4, the first 16 in the lower halves of bytes.
struct block {
    float d, m;
    uint8_t integers[BLOCK];
};

// Block b of a row in llama.cpp's memory.
static struct block block_of(enum ggml_type type, const uint8_t * row, size_t b) {
    struct block block = {0};
    if (type == GGML_TYPE_Q4_K) {  // 256 weights: d, m, scales and minima in 6 bits, integers
        const uint8_t * from = row + b / 8 * 144, * s = from + 4, * q = from + 16 + b % 8 / 2 * BLOCK;
        const size_t j = b % 8, shift = j % 2 * 4;
        const int scale = j < 4 ? s[j] & 63 : (s[j + 4] & 15) | (s[j - 4] >> 6) << 4;
        const int least = j < 4 ? s[j + 4] & 63 : s[j + 4] >> 4 | (s[j] >> 6) << 4;
        block.d = half_at(from) * scale;
        block.m = -half_at(from + 2) * least;
        for (size_t k = 0; k < BLOCK / 2; k++)
            block.integers[k] = (q[k] >> shift & 15) | (q[k + BLOCK / 2] >> shift & 15) << 4;
        return block;
    }
    const size_t integers = type == GGML_TYPE_Q8_0 ? BLOCK : BLOCK / 2, scales = type == GGML_TYPE_Q4_1 ? 4 : 2;
    const uint8_t * from = row + b * (scales + integers);
    block.d = half_at(from);
    if (type == GGML_TYPE_Q4_1) block.m = half_at(from + 2);
    memcpy(block.integers, from + scales, integers);
    return block;
}

// 32 weights, rounded to 8 bits.
static struct block rounded(const float * x) {
    struct block block = {0};
    int32_t integers[BLOCK / 4];
    const float most = largest_of_32(x);
    round_32(x, most > 1e-30f ? 127.0f / most : 0.0f, integers);
    block.d = most / 127.0f;
    memcpy(block.integers, integers, BLOCK);
    return block;
}

// A block into its row's lane, 0 to ROWS - 1. type: packed_as.
static void pack_block(enum ggml_type type, const struct block * block, uint8_t * to, size_t lane) {
    const size_t integers = packed_bytes(type) - HALVES * VECTOR;
    uint8_t * scale = to + integers + lane / LANES * VECTOR;
    if (type == GGML_TYPE_Q4_1) {
        const uint16_t d = _cvtss_sh(block->d, 0), m = _cvtss_sh(block->m, 0);
        memcpy(scale + 2 * (lane % LANES), &d, 2);
        memcpy(scale + VECTOR / 2 + 2 * (lane % LANES), &m, 2);
    } else {
        memcpy(scale + 4 * (lane % LANES), &block->d, 4);
    }
    const uint8_t * from = block->integers;
    for (size_t at = 0; at < integers; at += HALVES * VECTOR, from += 4) {
        uint32_t four;
        memcpy(&four, from, 4);
        if (type == GGML_TYPE_Q8_0 && bias_of(type)) four ^= 0x80808080;  // adds 128 to each
        memcpy(to + at + 4 * lane, &four, 4);
    }
}

typedef void (*to_floats_t)(const void *, float *, int64_t);

// from: rows of `stride` bytes. to_float: of the type. numbers: room for a row.
static void pack_rows(enum ggml_type type, size_t rows, size_t columns, const uint8_t * from, size_t stride,
                      to_floats_t to_float, float * numbers, uint8_t * to) {
    const enum ggml_type as = packed_as(type);
    const bool rounds = as == GGML_TYPE_Q8_0 && type != as;
    for (size_t row = 0; row < rows; row++, from += stride) {
        uint8_t * group = to + row / ROWS * group_bytes(as, columns);
        if (rounds) to_float(from, numbers, columns);
        for (size_t b = 0; b < columns / BLOCK; b++, group += packed_bytes(as)) {
            if (is_float(type)) {
                for (size_t k = 0; k < BLOCK; k++)
                    memcpy(group + 2 * (ROWS * k + row % ROWS), from + 2 * (b * BLOCK + k), 2);
                continue;
            }
            const struct block block = rounds ? rounded(numbers + b * BLOCK) : block_of(type, from, b);
            pack_block(as, &block, group, row % ROWS);
        }
    }
}

// -- activations ------------------------------------------------------------------------------

// 32 numbers of a token as integers: x = d * q. s: their sum. c: what takes a weight's bias off.
struct quantised {
    int32_t q[BLOCK / 4];  // four to a number
    float d, s;
    int32_t c, unused;
};

// Tokens are taken `MOST` at a time, and the last ones that are left. Of such a chunk they lie block
// after block, or column after column in float32, and in each token after token: as they are read.
struct activations {
    size_t tokens;
    const float * x;
    const struct quantised * blocks;
};

static size_t activations_bytes(enum ggml_type type, size_t columns, size_t tokens) {
    return tokens * (is_float(type) ? columns * sizeof(float) : columns / BLOCK * sizeof(struct quantised));
}

// As llama.cpp rounds them, but with scales in float32. A block that holds no number, or an infinite
// one, has no scale: every product with it is none either, as it is in float32.
INLINE void quantise(const float * x, int bias, struct quantised * to) {
    const float most = largest_of_32(x);
    if (!(most < INFINITY)) {
        *to = (struct quantised) {.d = NAN, .s = NAN};
        return;
    }
    const int sum = round_32(x, most > 1e-30f ? 127.0f / most : 0.0f, to->q);
    to->d = most / 127.0f;
    to->s = to->d * sum;
    to->c = -bias * sum;
}

// x: rows of tokens, `stride` numbers apart. memory: of `activations_bytes`. Each thread does its share.
static void arrange(enum ggml_type type, size_t columns, size_t tokens, const float * x, size_t stride,
                    void * memory, int thread, int threads) {
    float * numbers = memory;
    struct quantised * to = memory;
    const size_t blocks = columns / BLOCK, all = (tokens + MOST - 1) / MOST * blocks;
    for (size_t i = all * thread / threads; i < all * (thread + 1) / threads; i++) {
        const size_t first = i / blocks * MOST, b = i % blocks;
        const size_t chunk = tokens - first < MOST ? tokens - first : MOST;
        const float * from = x + first * stride + b * BLOCK;
        if (is_float(type) && chunk == 1)
            memcpy(numbers + first * columns + b * BLOCK, from, BLOCK * sizeof *from);
        else if (is_float(type))
            for (size_t k = 0; k < BLOCK; k++)
                for (size_t n = 0; n < chunk; n++)
                    numbers[first * columns + (b * BLOCK + k) * chunk + n] = from[n * stride + k];
        else
            for (size_t n = 0; n < chunk; n++)
                quantise(from + n * stride, bias_of(type), &to[first * blocks + b * chunk + n]);
    }
}

// -- one group of rows, some tokens -----------------------------------------------------------

INLINE floats load_weights(enum ggml_type type, const uint8_t * w) {
    return type == GGML_TYPE_F16 ? load_halves(w) : load_bf16(w);
}

INLINE void float_group(enum ggml_type type, const uint8_t * w, size_t columns, const int tokens,
                        const struct activations * a, size_t first, floats sums[HALVES][MOST]) {
    const float * x = a->x + first * columns;
    for (size_t k = 0; k < columns; k++, w += 2 * ROWS, x += tokens) {
        const floats lower = load_weights(type, w), upper = load_weights(type, w + 2 * LANES);
        UNROLL for (int n = 0; n < tokens; n++) {
            sums[0][n] = product_plus(lower, all_floats(x[n]), sums[0][n]);
            sums[1][n] = product_plus(upper, all_floats(x[n]), sums[1][n]);
        }
    }
}

// Four columns of a block, those from 4 * j on.
INLINE ints load_integers(enum ggml_type type, const uint8_t * w, int j, int half) {
    const int8_t steps[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
    if (type == GGML_TYPE_Q8_0) return load_ints(w + (HALVES * j + half) * VECTOR);
    const ints pairs = load_ints(w + (HALVES * (j % 4) + half) * VECTOR);
    const ints nibbles = j < 4 ? low_nibbles(pairs) : high_nibbles(pairs);
    if (type != GGML_TYPE_IQ4_NL) return nibbles;
    return looked_up(nibbles, _mm_add_epi8(_mm_loadu_si128((const void *) steps), _mm_set1_epi8(bias_of(type))));
}

INLINE void integer_group(enum ggml_type type, const uint8_t * w, size_t columns, const int tokens,
                          const struct activations * a, size_t first, floats sums[HALVES][MOST]) {
    const struct quantised * x = a->blocks + first * (columns / BLOCK);
    for (size_t k = 0; k < columns; k += BLOCK, w += packed_bytes(type), x += tokens) {
        ints dots[HALVES][MOST];
        UNROLL for (int n = 0; n < tokens; n++)
            dots[0][n] = dots[1][n] = all_ints(bias_of(type) ? x[n].c : 0);
        UNROLL for (int j = 0; j < BLOCK / 4; j++) {
            const ints lower = load_integers(type, w, j, 0), upper = load_integers(type, w, j, 1);
            UNROLL for (int n = 0; n < tokens; n++) {
                dots[0][n] = dot_plus(dots[0][n], lower, all_ints(x[n].q[j]), has_sign(type));
                dots[1][n] = dot_plus(dots[1][n], upper, all_ints(x[n].q[j]), has_sign(type));
            }
        }
        UNROLL for (int half = 0; half < HALVES; half++) {
            const uint8_t * at = w + packed_bytes(type) - (HALVES - half) * VECTOR;
            const floats scales = type == GGML_TYPE_Q4_1 ? load_halves(at) : load_floats(at);
            UNROLL for (int n = 0; n < tokens; n++) {
                const floats dot = to_floats(dots[half][n]);
                sums[half][n] = product_plus(dot, product(scales, all_floats(x[n].d)), sums[half][n]);
                if (type == GGML_TYPE_Q4_1)
                    sums[half][n] = product_plus(load_halves(at + VECTOR / 2), all_floats(x[n].s), sums[half][n]);
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
    floats sums[HALVES][MOST];
    UNROLL for (int n = 0; n < tokens; n++) sums[0][n] = sums[1][n] = all_floats(0.0f);
    const uint8_t * w = p->packed + group * group_bytes(type, p->columns);
    if (is_float(type))
        float_group(type, w, p->columns, tokens, a, first, sums);
    else
        integer_group(type, w, p->columns, tokens, a, first, sums);
    const size_t left = p->rows - group * ROWS;
    UNROLL for (int n = 0; n < tokens; n++) {
        float * out = p->out + (first + n) * p->stride + group * ROWS;
        store_some(out, sums[0][n], left);
        if (left > LANES) store_some(out + LANES, sums[1][n], left - LANES);
    }
}

INLINE void all_tokens(enum ggml_type type, const struct product * p, const struct activations * a) {
    for (size_t group = p->from; group < p->to; group++)
        for (size_t first = 0; first < a->tokens; first += MOST) {
            const size_t left = a->tokens - first;
            switch (left < MOST ? left : MOST) {
                case 1: some_tokens(type, p, a, group, first, 1); break;
                case 2: some_tokens(type, p, a, group, first, 2); break;
                case 3: some_tokens(type, p, a, group, first, 3); break;
                case 4: some_tokens(type, p, a, group, first, 4); break;
#if MOST > 4
                case 5: some_tokens(type, p, a, group, first, 5); break;
                case 6: some_tokens(type, p, a, group, first, 6); break;
                case 7: some_tokens(type, p, a, group, first, 7); break;
                case 8: some_tokens(type, p, a, group, first, 8); break;
#endif
            }
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
