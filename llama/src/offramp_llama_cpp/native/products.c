// Products of weights and few tokens, and their attention, in the place of llama.cpp's own.
//
// A token at a time is bound by reading weights, so tokens that catch up together should cost hardly
// more than one; by llama.cpp's kernels two cost up to two and a half times as much. Here a weight is
// packed for kernels that read it once, from front to end, for up to 8 tokens. Activations are rounded
// in blocks of 32: to 8 bits for quantised weights, as llama.cpp does it, and to 16 for others.
//
// A graph's node is taken over while llama.cpp asks its callback about it, before it is computed:
// MUL_MAT, FLASH_ATTN_EXT or RMS_NORM becomes CUSTOM, an operation of ggml's public interface, with the same sources.

#define _GNU_SOURCE
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "attention.h"
#include "ggml-backend.h"
#include "kernels.h"

enum { HUGE_PAGE = 1 << 21, ARENA = 1 << 25 };  // bytes

// -- ggml's nodes ------------------------------------------------------------------------------

// What a node becomes.
struct custom {
    enum ggml_op op;
    int32_t parameters[GGML_MAX_OP_PARAMS / sizeof(int32_t)];
};

struct weight {
    struct products * all;
    const struct ggml_tensor * tensor;
    enum ggml_type type;  // as it is packed
    size_t rows, columns;
    const uint8_t * packed;  // none: llama.cpp multiplies it
    struct custom custom;
};

// What takes nodes over that have a number among their parameters, which they no longer hold then.
struct numbered {
    struct numbered * next;
    ggml_custom_op_t function;
    float number;
    struct custom custom;
};

// -- weights that were seen ---------------------------------------------------------------------

struct products {
    bool (*is_host)(struct ggml_backend_buffer *);
    enum ggml_backend_buffer_usage (*usage)(struct ggml_backend_buffer *);
    struct ggml_context * (*init)(struct ggml_init_params);
    struct ggml_tensor * (*custom)(struct ggml_context *, enum ggml_type, int64_t, int64_t, int64_t, int64_t,
                                   struct ggml_tensor **, int, ggml_custom_op_t, int, void *);
    void (*free)(struct ggml_context *);
    const struct ggml_type_traits * (*traits)(enum ggml_type);
    struct weight ** seen;  // by the tensor's address, open addressing
    size_t slots, count, packed_bytes;
    struct arena { struct arena * next; size_t bytes, used; } * arenas;
    struct numbered * numbered;
    void * scratch;  // a node's activations, arranged by all threads together
    size_t scratch_bytes;
    const struct ggml_tensor * arranged;  // the activations that are there, in this graph, and for which
    enum ggml_type arranged_for;          // weights: several products read the same
    atomic_size_t arrived;  // threads that arranged their share, since the graph's nodes were asked about
};

// Wait until all threads arranged their share. llama.cpp has all of them at one node, and none goes on
// to the next before.
static void wait_for_all(struct products * all, size_t threads) {
    if (threads == 1) return;
    const size_t before = atomic_fetch_add(&all->arrived, 1);
    for (int turns = 0; atomic_load(&all->arrived) < (before / threads + 1) * threads; turns++)
        if (turns < 1000) _mm_pause();
        else sched_yield();  // there may be more threads than processors
}

static void multiply(struct ggml_tensor * out, int thread, int threads, void * user) {
    const struct weight * weight = user;
    const struct ggml_tensor * x = out->src[1];
    const size_t groups = (weight->rows + ROWS - 1) / ROWS, tokens = x->ne[1];
    const struct product product = {
        weight->packed, weight->rows, weight->columns, groups * thread / threads,
        groups * (thread + 1) / threads, out->nb[1] / sizeof(float), out->data,
    };
    struct products * all = weight->all;
    if (all->arranged != x || all->arranged_for != weight->type) {
        const size_t stride = x->nb[1] / sizeof(float);
        arrange(weight->type, weight->columns, tokens, x->data, stride, all->scratch, thread, threads);
        wait_for_all(all, threads);
        all->arranged = x;
        all->arranged_for = weight->type;
    }
    const struct activations a = {tokens, all->scratch};
    multiply_packed(weight->type, &product, &a);
}

// What this was compiled for; none where the processor lacks it.
const char * offramp_products_instructions(void) { return vectors_run() ? INSTRUCTIONS : NULL; }

void * offramp_products_new(void * is_host, void * usage, void * init, void * custom, void * free_context,
                            void * traits) {
    struct products * all = calloc(1, sizeof *all);
    if (!all) return NULL;
    all->is_host = is_host;
    all->usage = usage;
    all->init = init;
    all->custom = custom;
    all->free = free_context;
    all->traits = traits;
    return all;
}

size_t offramp_products_bytes(void * products) { return ((struct products *) products)->packed_bytes; }

void offramp_products_free(void * products) {
    struct products * all = products;
    for (size_t i = 0; i < all->slots; i++) free(all->seen[i]);
    free(all->seen);
    free(all->scratch);
    for (struct arena * arena = all->arenas, * next; arena; arena = next) {
        next = arena->next;
        munmap(arena, arena->bytes);
    }
    for (struct numbered * numbered = all->numbered, * next; numbered; numbered = next) {
        next = numbered->next;
        free(numbered);
    }
    free(all);
}

// Memory in huge pages, as reading is else bound by looking pages up: twice as fast where it was
// measured. None where there is none left.
static uint8_t * take(struct products * all, size_t bytes) {
    bytes = (bytes + LINE - 1) / LINE * LINE;
    struct arena * arena = all->arenas;
    if (!arena || arena->used + bytes > arena->bytes) {
        size_t whole = bytes + LINE > ARENA ? bytes + LINE : ARENA;
        whole = (whole + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
        arena = mmap(NULL, whole, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (arena == MAP_FAILED) return NULL;
#ifdef MADV_HUGEPAGE
        madvise(arena, whole, MADV_HUGEPAGE);
#endif
        *arena = (struct arena) {all->arenas, whole, LINE};
        all->arenas = arena;
    }
    uint8_t * memory = (uint8_t *) arena + arena->used;
    arena->used += bytes;
    return memory;
}

// What makes a node call a function, as ggml's own constructor writes it. source: any.
static struct custom custom_of(struct products * all, const struct ggml_tensor * source, ggml_custom_op_t function,
                               void * user) {
    struct ggml_context * context = all->init((struct ggml_init_params) {4096, NULL, true});
    struct ggml_tensor * sources[] = {(struct ggml_tensor *) source};
    const struct ggml_tensor * node =
        all->custom(context, GGML_TYPE_F32, 1, 1, 1, 1, sources, 1, function, GGML_N_TASKS_MAX, user);
    struct custom custom = {.op = node->op};
    memcpy(custom.parameters, node->op_params, sizeof custom.parameters);
    all->free(context);
    return custom;
}

static void become(struct ggml_tensor * node, const struct custom * custom) {
    node->op = custom->op;
    memcpy(node->op_params, custom->parameters, sizeof node->op_params);
}

static void become_numbered(struct products * all, struct ggml_tensor * node, ggml_custom_op_t function, float number) {
    struct numbered * it = all->numbered;
    while (it && (it->function != function || it->number != number)) it = it->next;
    if (!it) {
        if (!(it = malloc(sizeof *it))) return;
        *it = (struct numbered) {all->numbered, function, number, custom_of(all, node->src[0], function, it)};
        all->numbered = it;
    }
    become(node, &it->custom);
}

// Rows in memory of their own, as they are packed; none where they do not fit or memory ran out.
static uint8_t * packed_rows(struct products * all, struct rows rows) {
    const size_t groups = (rows.rows + ROWS - 1) / ROWS;
    uint8_t * packed = NULL;
    rows.numbers = malloc(rows.columns * sizeof *rows.numbers);
    if (rows.numbers) packed = take(all, groups * group_bytes(packed_as(rows.type), rows.columns));
    if (packed && !pack_rows(&rows, packed)) {
        all->arenas->used = packed - (uint8_t *) all->arenas;  // it was taken last
        packed = NULL;
    }
    free(rows.numbers);
    return packed;
}

static void pack(struct products * all, struct weight * weight) {
    const struct ggml_tensor * tensor = weight->tensor;
    uint8_t * packed = packed_rows(all, (struct rows) {
        tensor->type, weight->rows, weight->columns, tensor->nb[1], tensor->data,
        all->traits(tensor->type)->to_float, NULL,
    });
    if (!packed) return;
    weight->custom = custom_of(all, tensor, multiply, weight);
    weight->packed = packed;
    all->packed_bytes += (weight->rows + ROWS - 1) / ROWS * group_bytes(weight->type, weight->columns);
#ifdef MADV_PAGEOUT
    // Nothing reads llama.cpp's copy from here on: a mapped file's pages need not stay.
    const uintptr_t page = 4096, start = ((uintptr_t) tensor->data + page - 1) / page * page;
    const uintptr_t end = ((uintptr_t) tensor->data + weight->rows * tensor->nb[1]) / page * page;
    if (end > start) madvise((void *) start, end - start, MADV_PAGEOUT);
#endif
}

static bool can_pack(const struct products * all, const struct ggml_tensor * tensor) {
    const struct ggml_type_traits * traits = all->traits(tensor->type);
    return packed_as(tensor->type) != GGML_TYPE_COUNT && tensor->buffer && all->is_host(tensor->buffer) &&
           all->usage(tensor->buffer) == GGML_BACKEND_BUFFER_USAGE_WEIGHTS &&
           tensor->ne[0] % BLOCK == 0 && tensor->ne[2] == 1 && tensor->ne[3] == 1 &&
           tensor->nb[1] == tensor->ne[0] / traits->blck_size * traits->type_size;
}

static struct weight ** place_of(struct weight ** seen, size_t slots, const struct ggml_tensor * tensor) {
    size_t at = ((uintptr_t) tensor >> 4) % slots;
    while (seen[at] && seen[at]->tensor != tensor) at = (at + 1) % slots;
    return &seen[at];
}

// The weight of a tensor, packed when it is first seen, if it can be; none where memory ran out.
static struct weight * weight_of(struct products * all, const struct ggml_tensor * tensor) {
    if (2 * all->count >= all->slots) {
        const size_t slots = all->slots ? 2 * all->slots : 1024;
        struct weight ** seen = calloc(slots, sizeof *seen);
        if (!seen) return NULL;
        for (size_t i = 0; i < all->slots; i++)
            if (all->seen[i]) *place_of(seen, slots, all->seen[i]->tensor) = all->seen[i];
        free(all->seen);
        all->seen = seen;
        all->slots = slots;
    }
    struct weight ** place = place_of(all->seen, all->slots, tensor);
    if (!*place) {
        struct weight * weight = calloc(1, sizeof *weight);
        if (!weight) return NULL;
        weight->all = all;
        weight->tensor = tensor;
        weight->type = packed_as(tensor->type);
        weight->rows = tensor->ne[1];
        weight->columns = tensor->ne[0];
        if (can_pack(all, tensor)) pack(all, weight);
        *place = weight;
        all->count++;
    }
    return *place;
}

// Whether there is memory for the activations of so many tokens. Nothing is computed meanwhile.
static bool has_room(struct products * all, const struct weight * weight, size_t tokens) {
    size_t bytes = activations_bytes(weight->type, weight->columns, tokens);
    if (bytes <= all->scratch_bytes) return true;
    bytes = (bytes + LINE - 1) / LINE * LINE;
    void * memory = aligned_alloc(LINE, bytes);
    if (!memory) return false;
    free(all->scratch);
    all->scratch = memory;
    all->scratch_bytes = bytes;
    return true;
}

static void offer_product(struct products * all, struct ggml_tensor * node) {
    const struct ggml_tensor * w = node->src[0], * x = node->src[1];
    if (w->op != GGML_OP_NONE || x->type != GGML_TYPE_F32 || x->nb[0] != sizeof(float) || x->ne[2] != 1 ||
        x->ne[3] != 1 || node->type != GGML_TYPE_F32 || node->nb[0] != sizeof(float))
        return;
    const struct weight * weight = weight_of(all, w);
    if (!weight || !weight->packed || !has_room(all, weight, x->ne[1])) return;
    atomic_store(&all->arrived, 0);
    become(node, &weight->custom);
}

// -- attention ----------------------------------------------------------------------------------

// Of one sequence of a node's.
static struct attention attention_of(const struct ggml_tensor * node, float scale, size_t sequence) {
    const struct ggml_tensor * q = node->src[0], * k = node->src[1], * v = node->src[2], * mask = node->src[3];
    const size_t masked = mask->ne[3] > 1 ? sequence : 0;
    return (struct attention) {
        q->ne[1], q->ne[2], q->ne[2] / k->ne[2], k->ne[1], k->ne[0], v->ne[0],
        (const void *) ((const char *) q->data + sequence * q->nb[3]), q->nb[1] / sizeof(float), q->nb[2] / sizeof(float),
        (const uint8_t *) k->data + sequence * k->nb[3], (const uint8_t *) v->data + sequence * v->nb[3],
        k->nb[1], k->nb[2], v->nb[1], v->nb[2],
        (const void *) ((const char *) mask->data + masked * mask->nb[3]), mask->nb[1] / sizeof(uint16_t),
        (void *) ((char *) node->data + sequence * node->nb[3]), node->nb[2] / sizeof(float), node->nb[1] / sizeof(float),
        scale,
    };
}

static void attend_node(struct ggml_tensor * node, int thread, int threads, void * user) {
    const struct numbered * scale = user;
    const size_t heads = node->src[0]->ne[2];
    for (int64_t sequence = 0; sequence < node->src[0]->ne[3]; sequence++) {
        const struct attention a = attention_of(node, scale->number, sequence);
        attend(&a, heads * thread / threads, heads * (thread + 1) / threads);
    }
}

// Whether a head's keys or values are whole vectors of halves where they can be loaded.
static bool can_load(const struct ggml_tensor * cache) {
    const uintptr_t places = (uintptr_t) cache->data | cache->nb[1] | cache->nb[2] | cache->nb[3];
    return cache->type == GGML_TYPE_F16 && cache->nb[0] == sizeof(uint16_t) && cache->ne[0] % LANES == 0 &&
           places % (2 * LANES) == 0;
}

// Attention of as many tokens as llama.cpp takes one by one; it has kernels for more. With sinks, a slope
// or a cap of logits it stays llama.cpp's.
static bool can_attend(const struct ggml_tensor * node, float slope, float cap) {
    enum { TOO_MANY = 64 };
    const struct ggml_tensor * q = node->src[0], * k = node->src[1], * v = node->src[2], * mask = node->src[3];
    return q->type == GGML_TYPE_F32 && q->nb[0] == sizeof(float) && node->nb[0] == sizeof(float) &&
           q->ne[1] < TOO_MANY && can_load(k) && can_load(v) && k->ne[2] == v->ne[2] && q->ne[2] % k->ne[2] == 0 &&
           q->ne[3] == k->ne[3] && q->ne[3] == v->ne[3] && mask && mask->type == GGML_TYPE_F16 &&
           mask->nb[0] == sizeof(uint16_t) && mask->ne[2] == 1 && (mask->ne[3] == 1 || mask->ne[3] == q->ne[3]) &&
           !node->src[4] && slope == 0.0f && cap == 0.0f;
}

static void offer_attention(struct products * all, struct ggml_tensor * node) {
    float options[3];  // scale, slope, cap
    memcpy(options, node->op_params, sizeof options);
    if (can_attend(node, options[1], options[2])) become_numbered(all, node, attend_node, options[0]);
}

// -- norms ----------------------------------------------------------------------------------------

// The mean of squares in float64, for numbers whose squares float32 does not hold.
static double mean_square(const float * x, size_t width) {
    double squares = 0.0;
    for (size_t i = 0; i < width; i++) squares += (double) x[i] * x[i];
    return squares / width;
}

// By root mean square. llama.cpp adds squares one after the other, in float64.
static void normalise(const float * x, size_t width, float epsilon, float * out) {
    enum { SUMS = 4 };
    floats sums[SUMS];
    for (size_t n = 0; n < SUMS; n++) sums[n] = all_floats(0.0f);
    for (size_t i = 0; i < width; i += LANES) {
        const floats some = load_any(x + i);
        floats * into = &sums[i / LANES % SUMS];
        *into = product_plus(some, some, *into);
    }
    const float squares = sum_of(sum(sum(sums[0], sums[1]), sum(sums[2], sums[3])));
    const bool fits = isfinite(squares);
    const float root = fits ? sqrtf(squares / width + epsilon) : (float) sqrt(mean_square(x, width) + epsilon);
    const floats times = all_floats(1.0f / root);
    for (size_t i = 0; i < width; i += LANES) store_some(out + i, product(load_any(x + i), times), LANES);
}

static void normalise_node(struct ggml_tensor * node, int thread, int threads, void * user) {
    const struct numbered * epsilon = user;
    const struct ggml_tensor * x = node->src[0];
    const size_t plane = x->ne[1] * x->ne[2], rows = plane * x->ne[3];
    for (size_t row = rows * thread / threads; row < rows * (thread + 1) / threads; row++) {
        const size_t i = row % x->ne[1], j = row % plane / x->ne[1], k = row / plane;
        const char * from = (const char *) x->data + i * x->nb[1] + j * x->nb[2] + k * x->nb[3];
        char * to = (char *) node->data + i * node->nb[1] + j * node->nb[2] + k * node->nb[3];
        normalise((const float *) from, x->ne[0], epsilon->number, (float *) to);
    }
}

static void offer_norm(struct products * all, struct ggml_tensor * node) {
    const struct ggml_tensor * x = node->src[0];
    float epsilon;
    memcpy(&epsilon, node->op_params, sizeof epsilon);
    if (x->type == GGML_TYPE_F32 && x->nb[0] == sizeof(float) && node->nb[0] == sizeof(float) && x->ne[0] % LANES == 0)
        become_numbered(all, node, normalise_node, epsilon);
}

// Take a node over, if it is one that is known here.
void offramp_products_offer(void * products, void * tensor) {
    struct products * all = products;
    struct ggml_tensor * node = tensor;
    all->arranged = NULL;  // by a graph that was computed before
    if (node->op == GGML_OP_MUL_MAT) offer_product(all, node);
    if (node->op == GGML_OP_FLASH_ATTN_EXT) offer_attention(all, node);
    if (node->op == GGML_OP_RMS_NORM) offer_norm(all, node);
}

// -- outside of llama.cpp -------------------------------------------------------------------------

// A product outside of llama.cpp. weights: rows as llama.cpp holds them, of `stride` bytes; x: [tokens,
// columns]. False where the type is not known, does not hold the weights, or memory ran out.
bool offramp_product(void * products, int type, size_t rows, size_t columns, const void * weights, size_t stride,
                     size_t tokens, const float * x, float * out) {
    struct products * all = products;
    const enum ggml_type as = packed_as(type);
    if (as == GGML_TYPE_COUNT) return false;
    const struct weight weight = {.all = all, .type = as, .rows = rows, .columns = columns};
    const size_t groups = (rows + ROWS - 1) / ROWS;
    const uint8_t * packed = packed_rows(all, (struct rows) {
        type, rows, columns, stride, weights, all->traits(type)->to_float, NULL,
    });
    const bool possible = packed && has_room(all, &weight, tokens);
    if (possible) {
        arrange(as, columns, tokens, x, columns, all->scratch, 0, 1);
        const struct product product = {packed, rows, columns, 0, groups, rows, out};
        multiply_packed(as, &product, &(struct activations) {tokens, all->scratch});
    }
    return possible;
}

// A norm outside of llama.cpp; width: whole vectors.
void offramp_norm(const float * x, size_t width, float epsilon, float * out) { normalise(x, width, epsilon, out); }

// Attention outside of llama.cpp.
void offramp_attention(const struct attention * a) { attend(a, 0, a->heads); }

// Products of bytes in registers alone, so many times: as many as a processor manages. Returns how many bytes
// were multiplied.
size_t offramp_peak(size_t times) {
    enum { SUMS = 12 };
    ints sums[SUMS], x = all_ints(0x01010101);
    UNROLL for (int i = 0; i < SUMS; i++) sums[i] = all_ints(0);
    for (size_t n = 0; n < times; n++)
        UNROLL for (int i = 0; i < SUMS; i++) {
            __asm__ volatile("" : "+x"(x));  // a compiler would take the same product but once
            sums[i] = dot_plus(sums[i], x, x);
        }
    UNROLL for (int i = 0; i < SUMS; i++) __asm__ volatile("" : : "x"(sums[i]));
    return times * SUMS * VECTOR;
}
