// What a tap reads, and where it puts it: see tap.c.

#include <stdbool.h>
#include <stddef.h>

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
