// The few operations on vectors that the kernels are written in: for AVX-512 with VNNI, and for AVX2.

#pragma once

#include <immintrin.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")
// What is read after it is loaded after it: a processor fetches ahead of what is read from front to end.
#define IN_ORDER __asm__ volatile("" ::: "memory")

INLINE float float_of(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

// LANES: numbers in a vector. MOST: tokens whose sums fit into the registers, and MOST_BYTES where bytes are
// multiplied. SHORT_SUMS: whether products of bytes are added in 16 bits, which hold those of bytes with 4 bits.
#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__)

#define INSTRUCTIONS "AVX-512"
#define MOST 8
enum { LANES = 16, MOST_BYTES = 8, SHORT_SUMS = false };
typedef __m512 floats;
typedef __m512i ints;

static bool vectors_run(void) {
    return __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512f");
}

INLINE floats all_floats(float x) { return _mm512_set1_ps(x); }
INLINE floats load_floats(const void * p) { return _mm512_load_ps(p); }
INLINE floats load_halves(const void * p) { return _mm512_cvtph_ps(_mm256_load_si256(p)); }
INLINE floats product(floats a, floats b) { return _mm512_mul_ps(a, b); }
INLINE floats product_plus(floats a, floats b, floats c) { return _mm512_fmadd_ps(a, b, c); }
INLINE floats to_floats(ints a) { return _mm512_cvtepi32_ps(a); }
INLINE floats load_any(const float * p) { return _mm512_loadu_ps(p); }  // wherever it lies
INLINE floats sum(floats a, floats b) { return _mm512_add_ps(a, b); }
INLINE float sum_of(floats a) { return _mm512_reduce_add_ps(a); }
INLINE float largest_of_lanes(floats a) { return _mm512_reduce_max_ps(a); }
// The sum of each row, as `sum_of` adds it.
INLINE floats sums_of(const floats rows[LANES]) {
    floats halves[8], quarters[4], pairs[2];
    UNROLL for (int i = 0; i < 8; i++) {  // rows in an order in which the sums come in theirs
        const floats a = rows[2 * i % 4 * 4 + i / 2], b = rows[(2 * i + 1) % 4 * 4 + i / 2];
        halves[i] = sum(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
    }
    UNROLL for (int i = 0; i < 4; i++) {
        const floats a = halves[2 * i], b = halves[2 * i + 1];
        quarters[i] = sum(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
    }
    UNROLL for (int i = 0; i < 2; i++) {
        const floats a = quarters[2 * i], b = quarters[2 * i + 1];
        pairs[i] = sum(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee));
    }
    return sum(_mm512_shuffle_ps(pairs[0], pairs[1], 0x88), _mm512_shuffle_ps(pairs[0], pairs[1], 0xdd));
}
// Which of 32 halves have other bits than these.
INLINE uint32_t unlike(const uint16_t * p, uint16_t bits) {
    return _mm512_cmpneq_epi16_mask(_mm512_loadu_si512(p), _mm512_set1_epi16(bits));
}
INLINE floats rounded_to_integers(floats a) { return _mm512_roundscale_ps(a, 0); }
INLINE floats times_two_to(floats a, floats n) { return _mm512_scalef_ps(a, n); }
INLINE floats larger(floats a, floats b) { return _mm512_max_ps(a, b); }
INLINE void store_some(float * p, floats a, size_t count) {
    _mm512_mask_storeu_ps(p, count < LANES ? (__mmask16) ((1u << count) - 1) : (__mmask16) 0xffff, a);
}

INLINE ints all_ints(int32_t x) { return _mm512_set1_epi32(x); }
INLINE ints load_ints(const void * p) { return _mm512_load_si512(p); }
INLINE ints low_nibbles(ints a) { return _mm512_and_si512(a, _mm512_set1_epi8(15)); }
INLINE ints even_bytes(ints a) { return _mm512_and_si512(a, _mm512_set1_epi16(255)); }
INLINE ints odd_bytes(ints a) { return _mm512_srli_epi16(a, 8); }
INLINE ints high_nibbles(ints a) { return low_nibbles(_mm512_srli_epi16(a, 4)); }
INLINE ints looked_up(ints a, __m128i table) { return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(table), a); }

INLINE ints sum_ints(ints a, ints b) { return _mm512_add_epi32(a, b); }

INLINE ints made(ints a) { return a; }

// sums + u * x, four bytes to a lane; u without a sign. `whole`: a lane's sum of eight such.
INLINE ints dot_plus(ints sums, ints u, ints x) { return _mm512_dpbusd_epi32(sums, u, x); }
INLINE ints whole(ints sums) { return sums; }

// sums + w * x, two numbers of 16 bits to a lane.
INLINE ints pairs_plus(ints sums, ints w, ints x) { return _mm512_dpwssd_epi32(sums, w, x); }

// The largest of 32 numbers without their signs; where one is infinite or no number, that. As
// integers, their bits are in this order.
INLINE float largest_of_32(const float * x) {
    const ints low = _mm512_loadu_si512(x), high = _mm512_loadu_si512(x + 16), number = all_ints(INT32_MAX);
    const ints bits = _mm512_max_epi32(_mm512_and_si512(low, number), _mm512_and_si512(high, number));
    return float_of(_mm512_reduce_max_epi32(bits));
}

// 32 numbers, scaled and rounded to bytes; their sum.
INLINE int round_32(const float * x, float up, int32_t * q) {
    const ints low = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x), all_floats(up)));
    const ints high = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + 16), all_floats(up)));
    _mm_storeu_si128((void *) q, _mm512_cvtepi32_epi8(low));
    _mm_storeu_si128((void *) (q + 4), _mm512_cvtepi32_epi8(high));
    return _mm512_reduce_add_epi32(_mm512_add_epi32(low, high));
}

// 32 numbers, scaled and rounded to 16 bits.
INLINE void round_32_to_16(const float * x, float up, void * q) {
    for (int i = 0; i < 2; i++) {
        const ints some = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + 16 * i), all_floats(up)));
        _mm256_storeu_si256((__m256i *) q + i, _mm512_cvtepi32_epi16(some));
    }
}

#else  // AVX2

#define INSTRUCTIONS "AVX2"
#define MOST 6
enum { LANES = 8, MOST_BYTES = 4, SHORT_SUMS = true };
typedef __m256 floats;
typedef __m256i ints;

static bool vectors_run(void) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

INLINE floats all_floats(float x) { return _mm256_set1_ps(x); }
INLINE floats load_floats(const void * p) { return _mm256_load_ps(p); }
INLINE floats load_halves(const void * p) { return _mm256_cvtph_ps(_mm_load_si128(p)); }
INLINE floats product(floats a, floats b) { return _mm256_mul_ps(a, b); }
INLINE floats product_plus(floats a, floats b, floats c) { return _mm256_fmadd_ps(a, b, c); }
INLINE floats to_floats(ints a) { return _mm256_cvtepi32_ps(a); }
INLINE floats load_any(const float * p) { return _mm256_loadu_ps(p); }
INLINE floats sum(floats a, floats b) { return _mm256_add_ps(a, b); }
INLINE float sum_of(floats a) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
INLINE float largest_of_lanes(floats a) {
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}
// The sum of each row, as `sum_of` adds it.
INLINE floats sums_of(const floats rows[LANES]) {
    floats halves[4], pairs[2];
    UNROLL for (int i = 0; i < 4; i++) {  // rows in an order in which the sums come in theirs
        const floats a = rows[i], b = rows[i + 4];
        halves[i] = sum(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
    }
    UNROLL for (int i = 0; i < 2; i++) {
        const floats a = halves[2 * i], b = halves[2 * i + 1];
        pairs[i] = sum(_mm256_shuffle_ps(a, b, 0x44), _mm256_shuffle_ps(a, b, 0xee));
    }
    return sum(_mm256_shuffle_ps(pairs[0], pairs[1], 0x88), _mm256_shuffle_ps(pairs[0], pairs[1], 0xdd));
}
// Which of 32 halves have other bits than these.
INLINE uint32_t unlike(const uint16_t * p, uint16_t bits) {
    const ints other = _mm256_set1_epi16(bits);
    const ints low = _mm256_cmpeq_epi16(_mm256_loadu_si256((const void *) p), other);
    const ints high = _mm256_cmpeq_epi16(_mm256_loadu_si256((const void *) (p + 16)), other);
    const ints order = _mm256_permute4x64_epi64(_mm256_packs_epi16(low, high), 0xd8);  // both halves by themselves
    return ~(uint32_t) _mm256_movemask_epi8(order);
}
INLINE floats rounded_to_integers(floats a) {
    return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
INLINE floats times_two_to(floats a, floats n) {
    const ints exponents = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_mul_ps(a, _mm256_castsi256_ps(_mm256_slli_epi32(exponents, 23)));
}
INLINE floats larger(floats a, floats b) { return _mm256_max_ps(a, b); }
INLINE void store_some(float * p, floats a, size_t count) {
    const ints lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    _mm256_maskstore_ps(p, _mm256_cmpgt_epi32(_mm256_set1_epi32(count < LANES ? (int) count : LANES), lane), a);
}

INLINE ints all_ints(int32_t x) { return _mm256_set1_epi32(x); }
INLINE ints load_ints(const void * p) { return _mm256_load_si256(p); }
INLINE ints low_nibbles(ints a) { return _mm256_and_si256(a, _mm256_set1_epi8(15)); }
INLINE ints even_bytes(ints a) { return _mm256_and_si256(a, _mm256_set1_epi16(255)); }
INLINE ints odd_bytes(ints a) { return _mm256_srli_epi16(a, 8); }
INLINE ints high_nibbles(ints a) { return low_nibbles(_mm256_srli_epi16(a, 4)); }
INLINE ints looked_up(ints a, __m128i table) { return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(table), a); }

INLINE ints sum_ints(ints a, ints b) { return _mm256_add_epi32(a, b); }

// What is in a register from here on. Compilers else add integers in an order that keeps all products in memory,
// and read a weight again for every token.
INLINE ints made(ints a) {
    __asm__("" : "+x"(a));
    return a;
}

INLINE ints dot_plus(ints sums, ints u, ints x) { return made(_mm256_add_epi16(sums, _mm256_maddubs_epi16(u, x))); }
INLINE ints whole(ints sums) { return _mm256_madd_epi16(sums, _mm256_set1_epi16(1)); }
INLINE ints pairs_plus(ints sums, ints w, ints x) { return made(_mm256_add_epi32(sums, _mm256_madd_epi16(w, x))); }

INLINE int sum_of_ints(ints a) {
    const __m128i four = _mm_add_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
    const __m128i two = _mm_add_epi32(four, _mm_unpackhi_epi64(four, four));
    return _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, 1)));
}

INLINE float largest_of_32(const float * x) {
    const ints number = all_ints(INT32_MAX);
    ints most = all_ints(0);
    for (int i = 0; i < 32; i += 8)
        most = _mm256_max_epi32(most, _mm256_and_si256(_mm256_loadu_si256((const void *) (x + i)), number));
    uint32_t all[8], found = 0;
    _mm256_storeu_si256((void *) all, most);
    for (int i = 0; i < 8; i++) found = all[i] > found ? all[i] : found;
    return float_of(found);
}

INLINE int round_32(const float * x, float up, int32_t * q) {
    ints four[4];
    for (int i = 0; i < 4; i++)
        four[i] = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + 8 * i), all_floats(up)));
    const ints low = _mm256_packs_epi32(four[0], four[1]), high = _mm256_packs_epi32(four[2], four[3]);
    const ints order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);  // both halves were packed by themselves
    _mm256_storeu_si256((void *) q, _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), order));
    return sum_of_ints(_mm256_add_epi32(_mm256_add_epi32(four[0], four[1]), _mm256_add_epi32(four[2], four[3])));
}

INLINE void round_32_to_16(const float * x, float up, void * q) {
    for (int i = 0; i < 2; i++) {
        const ints low = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + 16 * i), all_floats(up)));
        const ints high = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + 16 * i + 8), all_floats(up)));
        // both halves are packed by themselves
        _mm256_storeu_si256((ints *) q + i, _mm256_permute4x64_epi64(_mm256_packs_epi32(low, high), 0xd8));
    }
}

#endif

// 32 bytes with a sign as 16 bits each: those at even places of theirs, then the others.
INLINE void split_bytes(int32_t * q) {
    const __m256i bytes = _mm256_loadu_si256((const void *) q);
    _mm256_storeu_si256((void *) q, _mm256_srai_epi16(_mm256_slli_epi16(bytes, 8), 8));
    _mm256_storeu_si256((void *) (q + 8), _mm256_srai_epi16(bytes, 8));
}

INLINE float half_at(const void * from) {
    uint16_t half;
    memcpy(&half, from, 2);
    return _cvtsh_ss(half);
}

// e to the power of x, for x of at most 0; below the least normal number it is about that.
// By n = round(x / ln 2) and the series of x - n ln 2 (Cody and Waite 1980).
INLINE floats exp_of(floats x) {
    x = larger(all_floats(-87.0f), x);  // in this order: what is no number stays none
    const floats n = rounded_to_integers(product(x, all_floats(0x1.715476p+0f)));
    const floats r = product_plus(n, all_floats(-0x1.7f7d1cp-20f), product_plus(n, all_floats(-0x1.62e4p-1f), x));
    floats sums = all_floats(1.0f / 720);
    sums = product_plus(sums, r, all_floats(1.0f / 120));
    sums = product_plus(sums, r, all_floats(1.0f / 24));
    sums = product_plus(sums, r, all_floats(1.0f / 6));
    sums = product_plus(sums, r, all_floats(0.5f));
    sums = product_plus(sums, r, all_floats(1.0f));
    sums = product_plus(sums, r, all_floats(1.0f));
    return times_two_to(sums, n);
}
