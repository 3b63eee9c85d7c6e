// Attention of a few tokens over keys and values in float16. llama.cpp's own sums values in float16 and
// takes a cell and a head at a time, which with several tokens is a fifth of what a small model's call takes.
//
// A token's sums are taken in the order of the cells that it sees, however many tokens share a call.

#pragma once

#include <math.h>
#include <string.h>

#include "vectors.h"

// Cells that are weighed at once, some whole vectors, and heads of the same keys for which these are read once.
enum { SOME_CELLS = 64, BESIDE = 4 };

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

// Which of the cells from `first` on, `SOME_CELLS` at most, a token sees.
INLINE size_t seen(const uint16_t * mask, size_t first, size_t cells, uint32_t * which) {
    size_t count = 0, cell = first;
    const size_t end = cells - first < SOME_CELLS ? cells : first + SOME_CELLS;
    for (; end - cell >= 32; cell += 32)
        for (uint32_t some = unlike(mask + cell, 0xfc00); some; some &= some - 1)
            which[count++] = cell + __builtin_ctz(some);
    for (; cell < end; cell++) {
        which[count] = cell;
        count += mask[cell] != 0xfc00;
    }
    return count;
}

// What a token's heads that are taken together have seen so far.
struct heads {
    float most[BESIDE], total[BESIDE], weights[BESIDE][SOME_CELLS];
    const float * q[BESIDE];
    float * out[BESIDE];
};

INLINE void logits_of(struct heads * h, const int heads, const struct attention * a, const uint8_t * k,
                      const uint16_t * mask, const uint32_t * cells, size_t count, const size_t wide) {
    floats rows[BESIDE][LANES];
    float masked[LANES] = {0};
    for (size_t first = 0; first < count; first += LANES) {
        const size_t here = count - first < LANES ? count - first : LANES;
        for (size_t n = 0; n < here; n++) {
            floats sums[BESIDE];
            UNROLL for (int i = 0; i < heads; i++) sums[i] = all_floats(0.0f);
            for (size_t w = 0; w < wide; w++) {
                const floats key = load_halves(k + cells[first + n] * a->k_cell + 2 * LANES * w);
                UNROLL for (int i = 0; i < heads; i++)
                    sums[i] = product_plus(key, load_any(h->q[i] + LANES * w), sums[i]);
            }
            masked[n] = half_at(mask + cells[first + n]);
            UNROLL for (int i = 0; i < heads; i++) rows[i][n] = sums[i];
        }
        for (size_t n = here; n < LANES; n++)
            UNROLL for (int i = 0; i < heads; i++) rows[i][n] = all_floats(0.0f);
        UNROLL for (int i = 0; i < heads; i++)
            store_some(h->weights[i] + first, product_plus(all_floats(a->scale), sums_of(rows[i]), load_any(masked)),
                       LANES);
    }
}

// Logits into weights; what was summed before fades where one is larger (Milakov and Gimelshein 2018). By how much.
INLINE float weigh(struct heads * h, int head, size_t count) {
    float * weights = h->weights[head];
    for (size_t n = count; n % LANES; n++) weights[n] = -INFINITY;
    floats sums = all_floats(0.0f), most = all_floats(h->most[head]);
    for (size_t n = 0; n < count; n += LANES) most = larger(load_any(weights + n), most);
    const float largest = largest_of_lanes(most);
    for (size_t n = 0; n < count; n += LANES) {
        const floats made = exp_of(sum(load_any(weights + n), all_floats(-largest)));
        store_some(weights + n, made, LANES);
        sums = sum(sums, made);
    }
    const bool is_first = h->most[head] == -INFINITY && largest > -INFINITY;
    const float fading = is_first ? 0.0f : expf(h->most[head] - largest);
    h->most[head] = largest;
    h->total[head] = h->total[head] * fading + sum_of(sums);
    return fading;
}

INLINE void add_values(struct heads * h, const int heads, const struct attention * a, const uint8_t * v,
                       const uint32_t * cells, size_t count, const float * fading, const size_t wide) {
    for (size_t first = 0; first < wide; first += 4) {
        const size_t here = wide - first < 4 ? wide - first : 4;
        floats sums[BESIDE][4];
        UNROLL for (int i = 0; i < heads; i++)
            for (size_t w = 0; w < here; w++)
                sums[i][w] = product(load_any(h->out[i] + LANES * (first + w)), all_floats(fading[i]));
        for (size_t n = 0; n < count; n++)
            for (size_t w = 0; w < here; w++) {
                const floats value = load_halves(v + cells[n] * a->v_cell + 2 * LANES * (first + w));
                UNROLL for (int i = 0; i < heads; i++)
                    sums[i][w] = product_plus(value, all_floats(h->weights[i][n]), sums[i][w]);
            }
        UNROLL for (int i = 0; i < heads; i++)
            for (size_t w = 0; w < here; w++) store_some(h->out[i] + LANES * (first + w), sums[i][w], LANES);
    }
}

// One token, `heads` of the same keys from one on. Cells come some at a time.
INLINE void attend_by(const struct attention * a, size_t token, size_t head, const int heads, const size_t wide_k,
                      const size_t wide_v) {
    const uint16_t * mask = a->mask + token * a->mask_token;
    const uint8_t * k = a->k + head / a->shared * a->k_head, * v = a->v + head / a->shared * a->v_head;
    struct heads h;
    uint32_t cells[SOME_CELLS];
    for (int i = 0; i < heads; i++) {
        h.most[i] = -INFINITY;
        h.total[i] = 0.0f;
        h.q[i] = a->q + token * a->q_token + (head + i) * a->q_head;
        h.out[i] = a->out + token * a->out_token + (head + i) * a->out_head;
        memset(h.out[i], 0, wide_v * LANES * sizeof *h.out[i]);
    }
    for (size_t first = 0; first < a->cells; first += SOME_CELLS) {
        const size_t count = seen(mask, first, a->cells, cells);
        if (!count) continue;
        float fading[BESIDE];
        logits_of(&h, heads, a, k, mask, cells, count, wide_k);
        for (int i = 0; i < heads; i++) fading[i] = weigh(&h, i, count);
        add_values(&h, heads, a, v, cells, count, fading, wide_v);
    }
    for (int i = 0; i < heads; i++) {
        const floats scale = all_floats(h.total[i] > 0.0f ? 1.0f / h.total[i] : h.total[i]);
        for (size_t w = 0; w < wide_v; w++)
            store_some(h.out[i] + LANES * w, product(load_any(h.out[i] + LANES * w), scale), LANES);
    }
}

INLINE void attend_some(const struct attention * a, size_t token, size_t head, const int heads) {
    if (a->width_k == 64 && a->width_v == 64)
        attend_by(a, token, head, heads, 64 / LANES, 64 / LANES);
    else if (a->width_k == 128 && a->width_v == 128)
        attend_by(a, token, head, heads, 128 / LANES, 128 / LANES);
    else
        attend_by(a, token, head, heads, a->width_k / LANES, a->width_v / LANES);
}

// Heads `from` to `to`, of all tokens.
static void attend(const struct attention * a, size_t from, size_t to) {
    for (size_t token = 0; token < a->tokens; token++)
        for (size_t head = from, beside; head < to; head += beside) {
            const size_t alike = a->shared - head % a->shared, left = to - head < alike ? to - head : alike;
            beside = left < BESIDE ? left : BESIDE;
            switch (beside) {
                case 1: attend_some(a, token, head, 1); break;
                case 2: attend_some(a, token, head, 2); break;
                case 3: attend_some(a, token, head, 3); break;
                default: attend_some(a, token, head, BESIDE);
            }
        }
}
