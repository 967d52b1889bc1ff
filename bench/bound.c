// The physical bound: the memory traffic of one optimizer step and hardly any arithmetic.
//
// The caller cuts every tensor into chunks. A chunk has one array that is only read, the gradient,
// and up to MAX_UPDATED that are read and written back, the parameter and its states, which may
// have fewer or more bytes each. The loops go through all of them side by side, as the hardware likes
// it best: element by element where all have the same size, else ROW elements at a time.
//
// The bits that are written are those that were read: `mask` is zero, which the compiler cannot know.

#include <stdint.h>

enum { MAX_UPDATED = 8 };
enum { ROW = 16 };  // elements

typedef uint64_t line __attribute__((vector_size(16), aligned(1), may_alias));

struct array {
    uint8_t *bytes;
    int64_t count;
    int64_t width;  // bytes of an element: 1, 2, 4 or 8; 0 if it has less than one for each
};

struct chunk {
    int64_t elements;
    struct array read;
    struct array updated[MAX_UPDATED];
};

#define ALWAYS __attribute__((always_inline)) static inline

ALWAYS line fold_lines(const uint8_t *bytes, int count, line folded) {
#pragma GCC unroll 8
    for (int i = 0; i < count; ++i) folded ^= *(const line *)(bytes + 16 * i);
    return folded;
}

ALWAYS void flip_lines(uint8_t *bytes, int count, line bits) {
#pragma GCC unroll 8
    for (int i = 0; i < count; ++i) *(line *)(bytes + 16 * i) ^= bits;
}

// A row of an array has as many lines as an element has bytes.
ALWAYS line fold_row(const struct array *array, int64_t row, line folded) {
    switch (array->width) {
        case 2: return fold_lines(array->bytes + 32 * row, 2, folded);
        case 4: return fold_lines(array->bytes + 64 * row, 4, folded);
        default: return fold_lines(array->bytes + 128 * row, 8, folded);
    }
}

ALWAYS void flip_row(const struct array *array, int64_t row, line bits) {
    switch (array->width) {
        case 1: flip_lines(array->bytes + 16 * row, 1, bits); break;
        case 2: flip_lines(array->bytes + 32 * row, 2, bits); break;
        case 4: flip_lines(array->bytes + 64 * row, 4, bits); break;
        case 8: flip_lines(array->bytes + 128 * row, 8, bits); break;
    }
}

static uint64_t fold_rest(const struct array *array, int64_t rows, uint64_t folded) {
    for (int64_t i = rows * ROW * array->width; i < array->count; ++i) folded ^= array->bytes[i];
    return folded;
}

static uint64_t sum(line folded) {
    uint64_t all = 0;
    for (int i = 0; i < 2; ++i) all ^= folded[i];
    return all;
}

// What a norm needs: one pass over the gradient.
static uint64_t read_pass(const struct chunk *chunk) {
    const int64_t rows = chunk->elements / ROW;
    line folded = {0};
    for (int64_t row = 0; row < rows; ++row) folded = fold_row(&chunk->read, row, folded);
    return fold_rest(&chunk->read, rows, sum(folded));
}

static void update_mixed(const struct chunk *chunk, int count, uint64_t mask) {
    const int64_t rows = chunk->elements / ROW;
    line bits = {0};
    for (int64_t row = 0; row < rows; ++row) {
        bits = fold_row(&chunk->read, row, bits) & mask;
        for (int i = 0; i < count; ++i) flip_row(&chunk->updated[i], row, bits);
    }
    const uint64_t rest = fold_rest(&chunk->read, rows, sum(bits)) & mask;
    for (int i = 0; i < count; ++i) {
        const struct array *array = &chunk->updated[i];
        for (int64_t j = rows * ROW * array->width; j < array->count; ++j)
            array->bytes[j] ^= (uint8_t)rest;
    }
}

ALWAYS void update_words(const struct chunk *chunk, int count, uint32_t mask) {
    const uint32_t *read = (const uint32_t *)chunk->read.bytes;
    uint32_t *a = (uint32_t *)chunk->updated[0].bytes, *b = (uint32_t *)chunk->updated[1].bytes;
    uint32_t *c = (uint32_t *)chunk->updated[2].bytes, *d = (uint32_t *)chunk->updated[3].bytes;
    const int64_t words = chunk->read.count / 4;
#pragma omp simd
    for (int64_t i = 0; i < words; ++i) {
        const uint32_t bits = read[i] & mask;
        if (count > 0) a[i] ^= bits;
        if (count > 1) b[i] ^= bits;
        if (count > 2) c[i] ^= bits;
        if (count > 3) d[i] ^= bits;
    }
}

// With a constant count the branches of `update_words` are gone and its loop vectorises.
static void update(const struct chunk *chunk, int count, uint64_t mask) {
    int same = chunk->read.count % 4 == 0;
    for (int i = 0; i < count; ++i) same &= chunk->updated[i].count == chunk->read.count;
    switch (same ? count : 0) {
        case 1: update_words(chunk, 1, (uint32_t)mask); break;
        case 2: update_words(chunk, 2, (uint32_t)mask); break;
        case 3: update_words(chunk, 3, (uint32_t)mask); break;
        case 4: update_words(chunk, 4, (uint32_t)mask); break;
        default: update_mixed(chunk, count, mask);
    }
}

// Returns what the pass for the norm found, so that the compiler has to keep it.
uint64_t bound(const struct chunk *chunks, int64_t n_chunks, int updated, int with_norm,
               uint64_t mask, int threads) {
    uint64_t folded = 0;
#pragma omp parallel num_threads(threads)
    {
        if (with_norm) {
#pragma omp for schedule(guided) reduction(^ : folded)
            for (int64_t i = 0; i < n_chunks; ++i) folded ^= read_pass(&chunks[i]);
        }
#pragma omp for schedule(guided)
        for (int64_t i = 0; i < n_chunks; ++i) update(&chunks[i], updated, mask);
    }
    return folded;
}
