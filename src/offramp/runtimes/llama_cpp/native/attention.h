// Attention of a few tokens over keys and values in float16. llama.cpp's own sums values in float16 and
// takes a logit at a time, which with several tokens is a fifth of what a small model's call takes.
//
// A token's sums are taken in the order of the cells that it sees, however many tokens share a call.

#pragma once

#include <math.h>
#include <string.h>

#include "vectors.h"

enum { SOME_CELLS = 64, MOST_HEADS = 256 };

// Numbers of q and out, bytes of keys and values, halves of the mask from one token, head or cell to the
// next. width_k, width_v: of a head, whole vectors. shared: heads that read the same keys. The mask is added
// to logits; of a cell that a token does not see it is -infinity.
struct attention {
    size_t tokens, heads, shared, cells, width_k, width_v;
    const float * q;
    size_t q_token, q_head;
    const uint8_t * k, * v;
    size_t k_cell, k_head, v_cell, v_head;
    const uint16_t * mask;
    size_t mask_token;
    float * out;
    size_t out_token, out_head;
    float scale;
};

INLINE float logit_of(const float * q, const uint8_t * k, const size_t wide) {
    floats sums[2] = {all_floats(0.0f), all_floats(0.0f)};
    for (size_t i = 0; i < wide; i++)
        sums[i % 2] = product_plus(load_halves(k + 2 * LANES * i), load_any(q + LANES * i), sums[i % 2]);
    return sum_of(sum(sums[0], sums[1]));
}

// Add values, weighed, to what there is, which fades.
INLINE void add_values(const uint8_t * v, size_t v_cell, const uint32_t * cells, size_t count, const float * weights,
                       float fading, float * out, const size_t wide) {
    for (size_t first = 0; first < wide; first += 4) {
        const size_t here = wide - first < 4 ? wide - first : 4;
        floats sums[4];
        for (size_t i = 0; i < here; i++)
            sums[i] = product(load_any(out + LANES * (first + i)), all_floats(fading));
        for (size_t n = 0; n < count; n++) {
            const uint8_t * from = v + cells[n] * v_cell + 2 * LANES * first;
            for (size_t i = 0; i < here; i++)
                sums[i] = product_plus(load_halves(from + 2 * LANES * i), all_floats(weights[n]), sums[i]);
        }
        for (size_t i = 0; i < here; i++) store_some(out + LANES * (first + i), sums[i], LANES);
    }
}

// Which of the cells from `first` on, `SOME_CELLS` at most, a token sees.
INLINE size_t seen(const uint16_t * mask, size_t first, size_t cells, uint32_t * which) {
    size_t count = 0;
    const size_t end = cells - first < SOME_CELLS ? cells : first + SOME_CELLS;
    for (size_t cell = first; cell < end; cell++) {
        which[count] = cell;
        count += mask[cell] != 0xfc00;
    }
    return count;
}

// One token, heads `from` to `to`. Cells come some at a time, and what was summed before fades where
// a logit is larger (Milakov and Gimelshein 2018).
INLINE void attend_by(const struct attention * a, size_t token, size_t from, size_t to, const size_t wide_k,
                      const size_t wide_v) {
    const uint16_t * mask = a->mask + token * a->mask_token;
    float most[MOST_HEADS], total[MOST_HEADS], weights[SOME_CELLS + LANES];
    uint32_t cells[SOME_CELLS];
    float * out = a->out + token * a->out_token;
    for (size_t head = from; head < to; head++) {
        most[head] = -INFINITY;
        total[head] = 0.0f;
        memset(out + head * a->out_head, 0, wide_v * LANES * sizeof *out);
    }
    for (size_t first = 0; first < a->cells; first += SOME_CELLS) {
        const size_t count = seen(mask, first, a->cells, cells);
        if (!count) continue;
        for (size_t head = from; head < to; head++) {
            const float * q = a->q + token * a->q_token + head * a->q_head;
            const uint8_t * k = a->k + head / a->shared * a->k_head, * v = a->v + head / a->shared * a->v_head;
            float largest = most[head];
            for (size_t n = 0; n < count; n++) {
                weights[n] = a->scale * logit_of(q, k + cells[n] * a->k_cell, wide_k) + half_at(mask + cells[n]);
                largest = weights[n] > largest ? weights[n] : largest;
            }
            for (size_t n = count; n % LANES; n++) weights[n] = -INFINITY;
            floats sums = all_floats(0.0f);
            for (size_t n = 0; n < count; n += LANES) {
                const floats made = exp_of(sum(load_any(weights + n), all_floats(-largest)));
                store_some(weights + n, made, LANES);
                sums = sum(sums, made);
            }
            const float fading = expf(most[head] - largest);
            most[head] = largest;
            total[head] = total[head] * fading + sum_of(sums);
            add_values(v, a->v_cell, cells, count, weights, fading, out + head * a->out_head, wide_v);
        }
    }
    for (size_t head = from; head < to; head++) {
        const float scale = total[head] > 0.0f ? 1.0f / total[head] : 0.0f;
        float * to_scale = out + head * a->out_head;
        for (size_t i = 0; i < wide_v; i++)
            store_some(to_scale + LANES * i, product(load_any(to_scale + LANES * i), all_floats(scale)), LANES);
    }
}

// Heads `from` to `to`, of all tokens.
static void attend(const struct attention * a, size_t from, size_t to) {
    for (size_t token = 0; token < a->tokens; token++) {
        if (a->width_k == 64 && a->width_v == 64)
            attend_by(a, token, from, to, 64 / LANES, 64 / LANES);
        else if (a->width_k == 128 && a->width_v == 128)
            attend_by(a, token, from, to, 128 / LANES, 128 / LANES);
        else
            attend_by(a, token, from, to, a->width_k / LANES, a->width_v / LANES);
    }
}
