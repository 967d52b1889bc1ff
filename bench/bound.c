// The physical bound: the memory traffic of one optimizer step and hardly any arithmetic.
//
// The caller cuts every tensor into chunks. A chunk has one array that is only read, the gradient,
// and up to MAX_UPDATED that are read and written back, the parameter and its states.
//
// The bits that are written are those that were read: `mask` is zero, which the compiler cannot know.

#include <stdint.h>

enum { MAX_UPDATED = 4 };

struct chunk {
    int64_t words;
    const uint32_t *read;
    uint32_t *updated[MAX_UPDATED];
};

// What a norm needs: one pass over the gradient.
static uint32_t read_pass(const struct chunk *chunk) {
    const uint32_t *read = chunk->read;
    uint32_t folded = 0;
    for (int64_t i = 0; i < chunk->words; ++i) folded ^= read[i];
    return folded;
}

__attribute__((always_inline)) static inline void update(const struct chunk *chunk, int count,
                                                         uint32_t mask) {
    const uint32_t *read = chunk->read;
    uint32_t *a = chunk->updated[0], *b = chunk->updated[1];
    uint32_t *c = chunk->updated[2], *d = chunk->updated[3];
#pragma omp simd
    for (int64_t i = 0; i < chunk->words; ++i) {
        const uint32_t bits = read[i] & mask;
        if (count > 0) a[i] ^= bits;
        if (count > 1) b[i] ^= bits;
        if (count > 2) c[i] ^= bits;
        if (count > 3) d[i] ^= bits;
    }
}

// With a constant count the branches of `update` are gone and its loop vectorises.
static void update_pass(const struct chunk *chunk, int count, uint32_t mask) {
    switch (count) {
        case 1: update(chunk, 1, mask); break;
        case 2: update(chunk, 2, mask); break;
        case 3: update(chunk, 3, mask); break;
        case 4: update(chunk, 4, mask); break;
    }
}

// Returns what the read pass found, so that the compiler has to keep it.
uint32_t bound(const struct chunk *chunks, int64_t n_chunks, int updated, int with_norm,
               uint32_t mask, int threads) {
    uint32_t folded = 0;
#pragma omp parallel num_threads(threads)
    {
        if (with_norm) {
#pragma omp for schedule(guided) reduction(^ : folded)
            for (int64_t i = 0; i < n_chunks; ++i) folded ^= read_pass(&chunks[i]);
        }
#pragma omp for schedule(guided)
        for (int64_t i = 0; i < n_chunks; ++i) update_pass(&chunks[i], updated, mask);
    }
    return folded;
}
