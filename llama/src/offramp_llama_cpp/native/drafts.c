// What an exit says by itself, in one loop: between two of Python's calls a few small layers have long
// been computed. It drafts on from its own state, or its tokens are fed to the layers below it.

#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "llama.h"
#include "tap.h"

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__)
#define WIDEST __attribute__((target_clones("avx512f", "avx2,fma", "default")))
#else
#define WIDEST
#endif

struct loop {
    int32_t (*decode)(struct llama_context *, struct llama_batch);
    float * (*logits)(struct llama_context *);
    struct llama_context * context;
    struct tap * tap;         // before the exit; of one that drafts on after its layer
    size_t width, words;      // of states, and how many words there are to say
    const float * of_words;   // [.., width]: what a word adds to what enters the first layer
    const int32_t * rows;     // whose row of these is a word's; none: that of its number
    const float * of_states;  // [width, width]: row i is what number i of a normed state adds
    float state_scale;        // how many times as large the tap's states are
};

// word [width], and what a state [width] adds, normed by its root mean square.
WIDEST static void enter(const struct loop * d, const float * word, const float * state, float * into) {
    const size_t width = d->width;
    double squares = 0;
    for (size_t i = 0; i < width; i++) squares += (double) state[i] * state[i];
    const double scale = d->state_scale;
    const float norm = 1 / (sqrt(squares / (scale * scale) / width + FLT_EPSILON) * scale);
    for (size_t j = 0; j < width; j++) into[j] = word[j];
    for (size_t i = 0; i < width; i++) {
        const float times = state[i] * norm;
        const float * row = d->of_states + i * width;
        for (size_t j = 0; j < width; j++) into[j] += times * row[j];
    }
}

WIDEST static int32_t largest(const float * numbers, size_t count) {
    size_t at = 0;
    for (size_t i = 1; i < count; i++)
        if (numbers[i] > numbers[at]) at = i;
    return at;
}

// e^x of x <= 0, to five digits: by the exponent's bits for the whole of x / ln 2, and by the first
// terms of its series for the rest. In a loop it becomes vectors, as expf does not.
static inline float power(float x) {
    const float two = (x < -80 ? -80 : x) * 1.44269504f, whole = rintf(two), r = (two - whole) * 0.69314718f;
    const float near = 1 + r * (1 + r * (1 / 2.0f + r * (1 / 6.0f + r * (1 / 24.0f + r / 120.0f))));
    const int32_t bits = (int32_t) (whole + 127) << 23;
    float scale;
    memcpy(&scale, &bits, sizeof scale);
    return near * scale;
}

// Probability by softmax of number `at`, the largest.
WIDEST static float share(const float * numbers, size_t count, size_t at) {
    enum { LANES = 16 };
    float sums[LANES] = {0}, sum = 0;
    size_t i = 0;
    for (; i + LANES <= count; i += LANES)
        for (size_t lane = 0; lane < LANES; lane++) sums[lane] += power(numbers[i + lane] - numbers[at]);
    for (; i < count; i++) sum += power(numbers[i] - numbers[at]);
    for (size_t lane = 0; lane < LANES; lane++) sum += sums[lane];
    return 1 / sum;
}

// Write words into `said`: up to `most`, to one of which `ends` [words] is true, or as long as the
// product of their probabilities is `sure`, and that product; how many, or -1 where llama.cpp refused a
// row. batch: of one row, whose logits are asked for. positions: [axes, most] of the rows. word, state:
// [width], of the first row.
int32_t offramp_drafts(const struct loop * d, const struct llama_batch * batch, const int32_t * positions,
                       size_t axes, const float * word, const float * state, const bool * ends, float sure,
                       size_t most, int32_t * said, float * product) {
    *product = 1;
    for (size_t n = 0; n < most; n++) {
        enter(d, word, state, batch->embd);
        for (size_t axis = 0; axis < axes; axis++) batch->pos[axis] = positions[axis * most + n];
        d->tap->held = 0;
        if (d->decode(d->context, *batch) != 0) return -1;
        const float * logits = d->logits(d->context);
        said[n] = largest(logits, d->words);
        const float with = *product * share(logits, d->words, said[n]);
        if (with < sure) return n;
        *product = with;
        if (ends[said[n]]) return n + 1;
        word = d->of_words + said[n] * d->width;
        state = (const float *) d->tap->into;
    }
    return most;
}

// Feed a token, given by its row, and after it each that the exit says, as long as its probability is
// `sure` and it ends nothing: `most` rows at most. How many, or -1 where llama.cpp refused one. Their
// states gather at the tap. said [most], kept [most, words]: what the exit says after each, and its
// logits. batch, positions, ends: as above.
int32_t offramp_feeds(const struct loop * d, const struct llama_batch * batch, const int32_t * positions,
                      size_t axes, int32_t row, const bool * ends, float sure, size_t most, int32_t * said,
                      float * kept) {
    d->tap->held = 0;
    for (size_t n = 0; n < most; n++) {
        memcpy(batch->embd, d->of_words + row * d->width, d->width * sizeof *batch->embd);
        for (size_t axis = 0; axis < axes; axis++) batch->pos[axis] = positions[axis * most + n];
        if (d->decode(d->context, *batch) != 0) return -1;
        const float * logits = d->logits(d->context);
        memcpy(kept + n * d->words, logits, d->words * sizeof *kept);
        said[n] = largest(logits, d->words);
        if (ends[said[n]] || share(logits, d->words, said[n]) < sure) return n + 1;
        row = d->rows ? d->rows[said[n]] : said[n];
    }
    return most;
}
