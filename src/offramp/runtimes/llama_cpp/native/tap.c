// The callback that llama.cpp asks about every tensor of its graph: first whether it is wanted,
// then, once it is computed, with its data.

#include <stdbool.h>
#include <stddef.h>
#include <string.h>

struct tap {
    const char * wanted;  // may be none
    const char * (*name)(const void *);
    size_t (*bytes)(const void *);
    void (*get)(const void *, void *, size_t, size_t);
    void (*offer)(void *, void *);  // see products.c; may be none
    void * products;
    char * into;
    size_t room, held;
    bool stop;
};

bool offramp_tap(void * tensor, bool ask, void * user) {
    struct tap * tap = user;
    if (ask && tap->offer) tap->offer(tap->products, tensor);
    const bool wanted = tap->wanted && strcmp(tap->name(tensor), tap->wanted) == 0;
    if (ask || !wanted) return ask ? wanted : true;
    const size_t bytes = tap->bytes(tensor);
    if (tap->held + bytes <= tap->room) tap->get(tensor, tap->into + tap->held, 0, bytes);
    tap->held += bytes;
    return !tap->stop;
}
