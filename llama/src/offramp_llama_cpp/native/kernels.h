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

enum { HALVES = 2, ROWS = HALVES * LANES, BLOCK = 32, VECTOR = 4 * LANES, LINE = 64 };  // the last two in bytes

// -- formats ---------------------------------------------------------------------------------

// What a weight is packed as. Halves become integers of 16 bits with a scale a row: a processor multiplies
// two of them in the time of one in float32. q4_K's blocks of 32 are q4_1's, with scales of their own.
// Those of 5 and 6 bits are rounded to 8, which adds a sixteenth of a step to what they were rounded by:
// llama.cpp has no quick kernels for them, and several rows take several times as long there. Others are
// unknown.
INLINE enum ggml_type packed_as(enum ggml_type type) {
    switch (type) {
        case GGML_TYPE_F16: case GGML_TYPE_BF16: return GGML_TYPE_I16;
        case GGML_TYPE_Q8_0: case GGML_TYPE_Q4_0: case GGML_TYPE_Q4_1: case GGML_TYPE_IQ4_NL: return type;
        case GGML_TYPE_Q4_K: return GGML_TYPE_Q4_1;
        case GGML_TYPE_Q5_0: case GGML_TYPE_Q5_1: case GGML_TYPE_Q5_K: case GGML_TYPE_Q6_K: return GGML_TYPE_Q8_0;
        default: return GGML_TYPE_COUNT;
    }
}

INLINE bool has_sign(enum ggml_type type) { return type == GGML_TYPE_Q8_0 || type == GGML_TYPE_IQ4_NL; }

// What is added to a weight's integer; the products with it are taken off again.
INLINE int bias_of(enum ggml_type type) {
    return type == GGML_TYPE_Q4_0 ? 8 : has_sign(type) ? 128 : 0;
}

// Integers of 32 bits that hold 32 weights.
INLINE int words(enum ggml_type type) { return type == GGML_TYPE_I16 ? 16 : type == GGML_TYPE_Q8_0 ? 8 : 4; }

// Bytes of a group's scales, in float32 (q4_1: scales and minima in float16).
enum { SCALES = HALVES * VECTOR };

// Bytes of a group's blocks here: integers, then scales, if they have some of their own.
INLINE size_t packed_bytes(enum ggml_type type) {
    return words(type) * HALVES * VECTOR + (type == GGML_TYPE_I16 ? 0 : SCALES);
}

// With 16 bits, the rows' scales stand behind the blocks.
INLINE size_t group_bytes(enum ggml_type type, size_t columns) {
    return columns / BLOCK * packed_bytes(type) + (type == GGML_TYPE_I16 ? SCALES : 0);
}

// 32 weights of a row: d * integer + m. 16 bits each, 8, or 4, the first 16 in the lower halves of bytes.
struct block {
    float d, m;
    uint8_t integers[2 * BLOCK];
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
    const size_t integers = words(type) * HALVES * VECTOR;
    uint8_t * scale = to + integers + lane / LANES * VECTOR;
    if (type == GGML_TYPE_Q4_1) {
        const uint16_t d = _cvtss_sh(block->d, 0), m = _cvtss_sh(block->m, 0);
        memcpy(scale + 2 * (lane % LANES), &d, 2);
        memcpy(scale + VECTOR / 2 + 2 * (lane % LANES), &m, 2);
    } else if (type != GGML_TYPE_I16) {
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

// The largest of a row's numbers without their signs, as `largest_of_32` has it.
static float largest_of(const float * x, size_t columns) {
    float most = 0.0f;
    for (size_t k = 0; k < columns; k += BLOCK) {
        const float some = largest_of_32(x + k);
        if (!(some <= most)) most = some;
    }
    return most;
}

// What takes numbers of at most so much to 16 bits.
INLINE float up_to_16_bits(float most) { return most > 1e-30f ? 32767.0f / most : 0.0f; }

// 32 weights of a row whose largest is given, in 16 bits.
static struct block rounded_to_16(const float * x, float most) {
    struct block block = {0};
    round_32_to_16(x, up_to_16_bits(most), block.integers);
    return block;
}

// Whether 16 bits hold a row: what is rounded off has at most 2^-11 of its length, as in float16. So it
// is where the largest of its numbers is up to 55 times their root mean square.
static bool keeps_in_16_bits(const float * x, size_t columns, float most) {
    const floats up = all_floats(up_to_16_bits(most)), down = all_floats(-most / 32767.0f);
    floats off = all_floats(0.0f), all = off;
    for (size_t k = 0; k < columns; k += LANES) {
        const floats some = load_any(x + k);
        const floats lost = product_plus(rounded_to_integers(product(some, up)), down, some);
        off = product_plus(lost, lost, off);
        all = product_plus(some, some, all);
    }
    return sum_of(off) <= 0x1p-22f * sum_of(all);
}

// Rows that are packed one after the other. from: rows of `stride` bytes. to_float: of the type.
// numbers: room for a row.
struct rows {
    enum ggml_type type;
    size_t rows, columns, stride;
    const uint8_t * from;
    to_floats_t to_float;
    float * numbers;
};

// False where what they are packed as does not hold one of them.
static bool pack_rows(const struct rows * r, uint8_t * to) {
    const enum ggml_type as = packed_as(r->type);
    const bool halves = as == GGML_TYPE_I16, rounds = as == GGML_TYPE_Q8_0 && as != r->type;
    for (size_t row = 0; row < r->rows; row++) {
        const uint8_t * from = r->from + row * r->stride;
        uint8_t * group = to + row / ROWS * group_bytes(as, r->columns);
        if (halves || rounds) r->to_float(from, r->numbers, r->columns);
        const float most = halves ? largest_of(r->numbers, r->columns) : 0.0f, d = most / 32767.0f;
        if (halves && !keeps_in_16_bits(r->numbers, r->columns, most)) return false;
        for (size_t b = 0; b < r->columns / BLOCK; b++, group += packed_bytes(as)) {
            const float * numbers = r->numbers + b * BLOCK;
            const struct block block = halves   ? rounded_to_16(numbers, most)
                                       : rounds ? rounded(numbers)
                                                : block_of(r->type, from, b);
            pack_block(as, &block, group, row % ROWS);
        }
        if (halves) memcpy(group + 4 * (row % ROWS), &d, 4);
    }
    return true;
}

// -- activations ------------------------------------------------------------------------------

// 32 numbers of a token as integers: x = d * q. s: their sum. c: what takes a weight's bias off. q: four
// to a number, or two of 16 bits; those of halves have no s and no c.
struct quantised {
    float d, s;
    int32_t c, unused;
    int32_t q[];
};

// Whether bytes are multiplied as two of 16 bits, the even ones and the odd: short sums do not hold them.
INLINE bool splits(enum ggml_type type) { return SHORT_SUMS && has_sign(type); }

INLINE size_t quantised_bytes(enum ggml_type type) {
    return sizeof(struct quantised) + (type == GGML_TYPE_I16 || splits(type) ? 2 : 1) * BLOCK;
}

// Tokens are taken some at a time, about as many in each pass. Of a pass they lie block after block, and in
// each token after token: as they are read.
struct activations {
    size_t tokens;
    const uint8_t * blocks;
};

INLINE size_t passes_of(enum ggml_type type, size_t tokens) {
    const size_t most = type == GGML_TYPE_I16 ? MOST : MOST_BYTES;
    return (tokens + most - 1) / most;
}

// The first token of a pass; of the one after the last, how many there are.
INLINE size_t first_of(enum ggml_type type, size_t tokens, size_t pass) {
    return tokens * pass / passes_of(type, tokens);
}

static size_t activations_bytes(enum ggml_type type, size_t columns, size_t tokens) {
    return tokens * (columns / BLOCK) * quantised_bytes(type);
}

// As llama.cpp rounds them, but with scales in float32. A block that holds no number, or an infinite
// one, has no scale: every product with it is none either, as it is in float32.
INLINE void quantise(const float * x, int bias, struct quantised * to) {
    const float most = largest_of_32(x);
    if (!(most < INFINITY)) {
        memset(to->q, 0, BLOCK);
        *to = (struct quantised) {.d = NAN, .s = NAN};
        return;
    }
    const int sum = round_32(x, most > 1e-30f ? 127.0f / most : 0.0f, to->q);
    to->d = most / 127.0f;
    to->s = to->d * sum;
    to->c = -bias * sum;
}

// To 16 bits, but so that magnitudes are at most 65536 in all: 32 products with a weight's integers then
// are less than 2^31. llama.cpp rounds to float16, by more.
INLINE void quantise_16(const float * x, struct quantised * to) {
    const float most = largest_of_32(x);
    const bool finite = most < 1e37f;  // so is a sum of 32
    floats magnitudes = all_floats(0.0f);
    for (size_t k = 0; k < BLOCK; k += LANES) {
        const floats some = load_any(x + k);
        magnitudes = sum(magnitudes, larger(some, product(some, all_floats(-1.0f))));
    }
    const float by_largest = most / 32767.0f, by_sum = sum_of(magnitudes) / 65520.0f;
    const float d = by_largest > by_sum ? by_largest : by_sum;
    to->d = finite ? d : NAN;
    round_32_to_16(x, finite && most > 1e-30f ? 1.0f / d : 0.0f, to->q);
}

// x: rows of tokens, `stride` numbers apart. memory: of `activations_bytes`. Each thread does its share.
static void arrange(enum ggml_type type, size_t columns, size_t tokens, const float * x, size_t stride,
                    uint8_t * memory, int thread, int threads) {
    const size_t blocks = columns / BLOCK, all = passes_of(type, tokens) * blocks;
    for (size_t i = all * thread / threads; i < all * (thread + 1) / threads; i++) {
        const size_t pass = i / blocks, b = i % blocks;
        const size_t first = first_of(type, tokens, pass), some = first_of(type, tokens, pass + 1) - first;
        for (size_t n = 0; n < some; n++) {
            const float * from = x + (first + n) * stride + b * BLOCK;
            struct quantised * to = (void *) (memory + (first * blocks + b * some + n) * quantised_bytes(type));
            if (type == GGML_TYPE_I16)
                quantise_16(from, to);
            else
                quantise(from, bias_of(type), to);
            if (splits(type)) split_bytes(to->q);
        }
    }
}

// -- one group of rows, some tokens -----------------------------------------------------------

// A word of each row of a block: two columns from 2 * j on, or four from 4 * j on.
INLINE ints load_integers(enum ggml_type type, const uint8_t * w, int j, int half) {
    const int8_t steps[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
    const ints word = load_ints(w + (HALVES * (j % words(type)) + half) * VECTOR);
    if (words(type) > 4) return word;
    const ints nibbles = j < 4 ? low_nibbles(word) : high_nibbles(word);
    if (type != GGML_TYPE_IQ4_NL) return nibbles;
    return looked_up(nibbles, _mm_add_epi8(_mm_loadu_si128((const void *) steps), _mm_set1_epi8(bias_of(type))));
}

INLINE ints multiply_word(enum ggml_type type, ints sums, ints w, ints x) {
    const bool pairs = type == GGML_TYPE_I16 || splits(type);
    return pairs ? pairs_plus(sums, w, x) : dot_plus(sums, w, x);
}

// A block's products with tokens `from` to `to`. blocks: theirs and the others'.
INLINE void multiply_block(enum ggml_type type, const uint8_t * w, const uint8_t * blocks, const int from,
                           const int to, floats sums[HALVES][MOST]) {
    const int steps = type == GGML_TYPE_I16 ? BLOCK / 2 : BLOCK / 4, parts = splits(type) ? 2 : 1;
    const bool is_short = SHORT_SUMS && type != GGML_TYPE_I16 && !splits(type);  // and then holds no bias
    const struct quantised * x[MOST];
    ints dots[HALVES][MOST];
    UNROLL for (int n = from; n < to; n++) {
        x[n] = (const void *) (blocks + n * quantised_bytes(type));
        dots[0][n] = dots[1][n] = all_ints(bias_of(type) && !is_short ? x[n]->c : 0);
    }
    UNROLL for (int j = 0; j < steps; j++) {
        IN_ORDER;
        const ints lower = made(load_integers(type, w, j, 0)), upper = made(load_integers(type, w, j, 1));
        UNROLL for (int part = 0; part < parts; part++) {
            const ints l = parts == 1 ? lower : part ? odd_bytes(lower) : even_bytes(lower);
            const ints u = parts == 1 ? upper : part ? odd_bytes(upper) : even_bytes(upper);
            UNROLL for (int n = from; n < to; n++) {
                const ints y = all_ints(x[n]->q[j + part * steps]);
                dots[0][n] = multiply_word(type, dots[0][n], l, y);
                dots[1][n] = multiply_word(type, dots[1][n], u, y);
            }
        }
    }
    UNROLL for (int half = 0; half < HALVES; half++) {
        const uint8_t * at = w + (words(type) * HALVES + half) * VECTOR;
        UNROLL for (int n = from; n < to; n++) {
            ints all = dots[half][n];
            if (is_short) all = sum_ints(whole(all), all_ints(bias_of(type) ? x[n]->c : 0));
            const floats dot = to_floats(all);
            floats scale = all_floats(x[n]->d);
            if (type == GGML_TYPE_Q4_1) scale = product(load_halves(at), scale);
            else if (type != GGML_TYPE_I16) scale = product(load_floats(at), scale);
            sums[half][n] = product_plus(dot, scale, sums[half][n]);
            if (type == GGML_TYPE_Q4_1)
                sums[half][n] = product_plus(load_halves(at + VECTOR / 2), all_floats(x[n]->s), sums[half][n]);
        }
    }
}

INLINE void multiply_group(enum ggml_type type, const uint8_t * w, size_t columns, const int tokens,
                           const struct activations * a, size_t pass, floats sums[HALVES][MOST]) {
    const size_t first = first_of(type, a->tokens, pass), passes = passes_of(type, a->tokens);
    const uint8_t * blocks = a->blocks + first * (columns / BLOCK) * quantised_bytes(type);
    // The sums of more than six tokens leave too few registers for the products of all.
    const int some = type == GGML_TYPE_I16 && tokens > 6 ? 4 : tokens;
    // Of several passes, each fetches its share of the next group; one alone fetches ahead if it multiplies for
    // longer than it reads. Both fetch to the second cache: the first holds little more than what is multiplied.
    const size_t bytes = packed_bytes(type), lines = bytes / LINE;
    const size_t share = passes > 1 ? lines / passes + 1 : 2 * tokens > words(type) ? lines : 0;
    const size_t ahead = passes > 1 ? group_bytes(type, columns) + pass * share * LINE : 16 * bytes;
    for (size_t k = 0; k < columns; k += BLOCK, w += bytes, blocks += tokens * quantised_bytes(type)) {
        for (size_t i = 0; i < share; i++) _mm_prefetch((const void *) (w + ahead + i * LINE), _MM_HINT_T1);
        multiply_block(type, w, blocks, 0, some, sums);
        if (some < tokens) multiply_block(type, w, blocks, some, tokens, sums);
    }
    if (type != GGML_TYPE_I16) return;
    UNROLL for (int n = 0; n < tokens; n++) {  // the rows' scales
        sums[0][n] = product(sums[0][n], load_floats(w));
        sums[1][n] = product(sums[1][n], load_floats(w + VECTOR));
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
                        size_t group, size_t pass, const int tokens) {
    floats sums[HALVES][MOST];
    UNROLL for (int n = 0; n < tokens; n++) sums[0][n] = sums[1][n] = all_floats(0.0f);
    const uint8_t * w = p->packed + group * group_bytes(type, p->columns);
    multiply_group(type, w, p->columns, tokens, a, pass, sums);
    const size_t left = p->rows - group * ROWS;
    UNROLL for (int n = 0; n < tokens; n++) {
        float * out = p->out + (first_of(type, a->tokens, pass) + n) * p->stride + group * ROWS;
        store_some(out, sums[0][n], left);
        if (left > LANES) store_some(out + LANES, sums[1][n], left - LANES);
    }
}

INLINE void all_tokens(enum ggml_type type, const struct product * p, const struct activations * a) {
    for (size_t group = p->from; group < p->to; group++)
        for (size_t pass = 0; pass < passes_of(type, a->tokens); pass++) {
            switch (first_of(type, a->tokens, pass + 1) - first_of(type, a->tokens, pass)) {
                case 1: some_tokens(type, p, a, group, pass, 1); break;
                case 2: some_tokens(type, p, a, group, pass, 2); break;
                case 3: some_tokens(type, p, a, group, pass, 3); break;
                case 4: some_tokens(type, p, a, group, pass, 4); break;
                case 5: some_tokens(type, p, a, group, pass, 5); break;
                case 6: some_tokens(type, p, a, group, pass, 6); break;
#if MOST > 6
                case 7: some_tokens(type, p, a, group, pass, 7); break;
                case 8: some_tokens(type, p, a, group, pass, 8); break;
#endif
            }
        }
}

static void multiply_packed(enum ggml_type type, const struct product * p, const struct activations * a) {
    switch (type) {
        case GGML_TYPE_I16: all_tokens(GGML_TYPE_I16, p, a); break;
        case GGML_TYPE_Q8_0: all_tokens(GGML_TYPE_Q8_0, p, a); break;
        case GGML_TYPE_Q4_0: all_tokens(GGML_TYPE_Q4_0, p, a); break;
        case GGML_TYPE_Q4_1: all_tokens(GGML_TYPE_Q4_1, p, a); break;
        default: all_tokens(GGML_TYPE_IQ4_NL, p, a);
    }
}
