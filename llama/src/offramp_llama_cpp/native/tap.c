// The callback that llama.cpp asks about every tensor of its graph: first whether it is wanted,
// then, once it is computed, with its data.

#include <string.h>

#include "tap.h"

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
