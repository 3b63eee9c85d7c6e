// How fast a processor multiplies and adds integers by the kernels' own operations, in registers alone.

#include "vectors.h"

enum { SUMS = 12 };

// So many rounds of products of 16 bits, or of bytes; multiplications a round.
size_t peak(bool bytes, size_t rounds, int32_t * kept) {
    ints sums[SUMS], a = all_ints(0x01010101), b = all_ints(0x02020202);
    UNROLL for (int i = 0; i < SUMS; i++) sums[i] = all_ints(0);
    for (size_t n = 0; n < rounds; n++) {
        UNROLL for (int i = 0; i < SUMS; i++) {
            __asm__ volatile("" : "+x"(a));  // or the same product would be taken once for all sums
            sums[i] = bytes ? dot_plus(sums[i], a, b) : pairs_plus(sums[i], a, b);
        }
    }
    for (int i = 1; i < SUMS; i++) sums[0] = sum_ints(sums[0], sums[i]);
    memcpy(kept, &sums[0], sizeof *kept);
    return SUMS * (bytes ? 4 : 2) * LANES;
}
