/* The student in C11 (also C++17) with the vector types of clang and GCC.

   A block of the U-Net is two 3x3 convolutions with ReLU; BatchNorm is part of their weights. A map of
   features is stored as planes, one for each channel. Its rows have at least one zero behind the last
   column, and there is one before the first row, so (y, -1) is a zero of the row above and a convolution
   reads the 8 neighbours of every pixel without asking whether they exist.

   Only what is needed again is stored whole: the skip connections and the output of each level. All else
   exists for a band of rows, small enough for a processor's cache. */
#include "segment.h"

#if defined(LESION_INT8) && !defined(LESION_NO_STUDENT)
#include "student_int8.h" /* the array lesion_student */
#elif !defined(LESION_NO_STUDENT)
#include "student.h"
#endif

#if defined(_MSC_VER) && !defined(__clang__)
#error "MSVC has no vector types: compile segment.c with clang-cl, which Visual Studio brings"
#endif
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
#error "segment.c reads pixels as little-endian words"
#endif

/* ---- Vectors ----------------------------------------------------------------------------------- */

/* LANES: pixels in a register. VECTORS: registers that a tile uses for one output channel. A `real` is one
   channel of a pixel; with LESION_INT8 it is four of them as bytes, and a multiply-add adds four products.
   The multiply-add is written out, because a compiler may leave it to an option whether it fuses the two. */
#if defined(LESION_INT8)
typedef int32_t real;
#elif defined(LESION_HALF)
typedef _Float16 real;
#else
typedef float real;
#endif

#if defined(LESION_INT8) && defined(__AVX512VNNI__)
#include <immintrin.h>
#define LANES 16
#define VECTORS 4
#define MULTIPLY_ADD(a, b, c) ((vec)_mm512_dpbusd_epi32((__m512i)(c), (__m512i)(b), (__m512i)(a)))
#define MAXIMUM(a, b) ((vec)_mm512_max_epu8((__m512i)(a), (__m512i)(b)))
#elif defined(LESION_INT8) && defined(__AVXVNNI__)
#include <immintrin.h>
#define LANES 8
#define VECTORS 2
#define MULTIPLY_ADD(a, b, c) ((vec)_mm256_dpbusd_avx_epi32((__m256i)(c), (__m256i)(b), (__m256i)(a)))
#define MAXIMUM(a, b) ((vec)_mm256_max_epu8((__m256i)(a), (__m256i)(b)))
#elif defined(LESION_INT8) && defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>
#define LANES 4
#define VECTORS 4
#define MULTIPLY_ADD(a, b, c) ((vec)vdotq_s32((int32x4_t)(c), (int8x16_t)(b), (int8x16_t)(a)))
#define MAXIMUM(a, b) ((vec)vmaxq_s8((int8x16_t)(a), (int8x16_t)(b)))
#elif defined(LESION_INT8)
#error "LESION_INT8 needs dot products of bytes: AVX512-VNNI or AVX-VNNI, on ARM -march=armv8.2-a+dotprod"
#elif defined(LESION_HALF) && !defined(__ARM_FEATURE_FP16_VECTOR_ARITHMETIC)
#error "LESION_HALF computes in half precision on ARM: compile with -march=armv8.2-a+fp16"
#elif defined(LESION_HALF)
#include <arm_neon.h>
#define LANES 8
#define VECTORS 4
#define MULTIPLY_ADD(a, b, c) ((vec)vfmaq_f16((float16x8_t)(c), (float16x8_t)(a), (float16x8_t)(b)))
#define MAXIMUM(a, b) ((vec)vmaxq_f16((float16x8_t)(a), (float16x8_t)(b)))
#elif defined(__aarch64__)
#include <arm_neon.h>
#define LANES 4
#define VECTORS 4
#define MULTIPLY_ADD(a, b, c) ((vec)vfmaq_f32((float32x4_t)(c), (float32x4_t)(a), (float32x4_t)(b)))
#define MAXIMUM(a, b) ((vec)vmaxq_f32((float32x4_t)(a), (float32x4_t)(b)))
#elif defined(__AVX512F__)
#include <immintrin.h>
#define LANES 16
#define VECTORS 4
#define MULTIPLY_ADD(a, b, c) ((vec)_mm512_fmadd_ps((__m512)(a), (__m512)(b), (__m512)(c)))
#define MAXIMUM(a, b) ((vec)_mm512_max_ps((__m512)(a), (__m512)(b)))
#elif defined(__AVX__) && defined(__FMA__)
#include <immintrin.h>
#define LANES 8
#define VECTORS 2
#define MULTIPLY_ADD(a, b, c) ((vec)_mm256_fmadd_ps((__m256)(a), (__m256)(b), (__m256)(c)))
#define MAXIMUM(a, b) ((vec)_mm256_max_ps((__m256)(a), (__m256)(b)))
#else
#define LANES 4
#ifdef __wasm__
#define VECTORS 4
#else
#define VECTORS 2
#endif
#ifdef __wasm_relaxed_simd__
#define MULTIPLY_ADD(a, b, c) ((vec)__builtin_wasm_relaxed_madd_f32x4(a, b, c))
#else
#define MULTIPLY_ADD(a, b, c) ((a) * (b) + (c))
#endif
#define MAXIMUM(a, b) choose((words)((a) > (b)), a, b)
#endif
#if defined(__AVX512F__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized" /* in immintrin.h: GCC bug 105593 */
#endif

typedef float number __attribute__((may_alias));
typedef real vec __attribute__((vector_size(LANES * sizeof(real)), aligned(sizeof(real)), may_alias));
typedef float floats __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef int32_t words __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef uint32_t bits __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef uint8_t bytes __attribute__((vector_size(LANES), aligned(1), may_alias));
typedef int32_t pixel __attribute__((vector_size(16)));
typedef uint8_t quad __attribute__((vector_size(4), aligned(1), may_alias));

#define INLINE inline __attribute__((always_inline))
#ifdef __clang__
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 9")
#endif
#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (words){__VA_ARGS__})
#endif
/* GCC would read a vector from memory again for each of its multiply-adds. */
#if defined(__clang__)
#define KEEP(x) (void)0
#elif defined(__aarch64__)
#define KEEP(x) __asm__("" : "+w"(x))
#elif defined(__x86_64__)
#define KEEP(x) __asm__("" : "+v"(x))
#else
#define KEEP(x) (void)0
#endif
#if LANES == 16
#define EVEN 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30
#define ODD 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31
#define LOW 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define HIGH 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif LANES == 8
#define EVEN 0, 2, 4, 6, 8, 10, 12, 14
#define ODD 1, 3, 5, 7, 9, 11, 13, 15
#define LOW 0, 8, 1, 9, 2, 10, 3, 11
#define HIGH 4, 12, 5, 13, 6, 14, 7, 15
#else
#define EVEN 0, 2, 4, 6
#define ODD 1, 3, 5, 7
#define LOW 0, 4, 1, 5
#define HIGH 2, 6, 3, 7
#endif

static INLINE vec load(const real *from) { return *(const vec *)from; }
static INLINE void store(real *to, vec value) { *(vec *)to = value; }
static INLINE vec all(real value) { return value - (vec){0}; }
static INLINE floats choose(words which, floats a, floats b) {
    return (floats)(((words)a & which) | ((words)b & ~which));
}

enum { TILE = LANES * VECTORS, GAP = 2 * LANES, BAND = 16, LEVELS = 5, HEADER = 13 };
enum { MAX_SIDE = 4096, MAX_PICTURE = 16384 };
#define BITS 22

/* ---- Floats or bytes --------------------------------------------------------------------------- */

/* FORMAT: of a model. PACK: channels in a `real`. BIAS: numbers before the weights of 4 output channels. ZERO: 0
   in a map that has no negative values, MIDDLE: in one that has. Bytes are unsigned on x86 and signed on ARM. */
#ifdef LESION_INT8
enum { FORMAT = 3, PACK = 4, BIAS = 12 };
#else
enum { FORMAT = 2, PACK = 1, BIAS = 4 };
#endif
#if defined(LESION_INT8) && defined(__aarch64__)
enum { SIGNED = 1 };
static const real FLIP = (real)0x80808080u, ZERO = (real)0x80808080u, MIDDLE = 0;
#elif defined(LESION_INT8)
enum { SIGNED = 0 };
static const real FLIP = 0, ZERO = 0, MIDDLE = (real)0x80808080u;
#else
enum { SIGNED = 0 };
static const real ZERO = 0, MIDDLE = 0;
#endif

static INLINE int packed(int channels) { return (channels + PACK - 1) / PACK; }

static INLINE floats positive(floats x) { return choose((words)(x > 0), x, (floats){0}); }

#ifdef LESION_INT8
/* Sums of 4 channels as bytes. Their scales follow 4 biases for unsigned and 4 for signed bytes. */
static INLINE vec to_bytes(vec a, vec b, vec c, vec d, const real *w, float offset) {
    const vec sums[] = {a, b, c, d};
    vec four = {0};
    UNROLL for (int o = 0; o < 4; o++) {
        const floats value = positive(__builtin_convertvector(sums[o], floats) * ((const number *)w)[8 + o] + offset);
        const floats byte = choose((words)(value < 255), value, 255 - (floats){0});
        four |= (vec)((bits)__builtin_convertvector(byte, words) << (8 * o));
    }
    return four ^ FLIP;
}

static INLINE floats activation(vec sum, const real *w, int o) {
    return positive(__builtin_convertvector(sum, floats) * ((const number *)w)[8 + o]);
}
static INLINE vec from_floats(floats x) { return (vec)x; }
static INLINE floats to_floats(vec x) { return (floats)x; }
#else
static INLINE vec from_floats(floats x) { return __builtin_convertvector(x, vec); }
static INLINE floats to_floats(vec x) { return __builtin_convertvector(x, floats); }
static INLINE floats activation(vec sum, const real *w, int o) { return (void)w, (void)o, positive(to_floats(sum)); }
#endif

/* ---- Space ------------------------------------------------------------------------------------- */

/* What is taken of the workspace so far, in units of 4 bytes; `start` is null while sizes are computed. */
typedef struct {
    float *start;
    uint64_t used;
} arena;

static uint64_t round_up(uint64_t value, uint64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

static float *take(arena *space, uint64_t count) {
    float *at = space->start ? space->start + space->used : 0;
    space->used += round_up(count, 16);
    return at;
}

typedef struct {
    real *data;           /* pixel (0, 0) of the first channel */
    ptrdiff_t plane, row; /* numbers from one channel to the next, from one row to the next */
    int width;
    real border; /* stands for 0 */
} map;

static int narrow(int width) { return width < TILE; }

static map take_map(arena *space, int channels, int rows, int width) {
    map m = {0, 0, 0, width, ZERO};
    m.row = narrow(width) ? width + 1 : (ptrdiff_t)round_up((uint64_t)width + 1, GAP);
    m.plane = (ptrdiff_t)round_up((uint64_t)(rows * m.row) + 2 * GAP + TILE, 32);
    real *start = (real *)take(space, (uint64_t)packed(channels) * (uint64_t)m.plane * sizeof(real) / 4);
    if (start) m.data = start + GAP;
    return m;
}

static map below(map m, int rows) {
    if (m.data) m.data += rows * m.row;
    return m;
}

static INLINE real *row_of(map m, int channel, int y) { return m.data + channel * m.plane + y * m.row; }

static void fill(real *from, ptrdiff_t count, real value) {
    for (ptrdiff_t i = 0; i < count; i++) from[i] = value;
}

static void clear_row(map m, int channels, int y) {
    for (int c = 0; c < packed(channels); c++) fill(row_of(m, c, y) - 1, m.row + 1, m.border);
}

/* Zeros behind the last column and before the first one of the next row. */
static void clear_sides(map m, int channels, int rows) {
    for (int c = 0; c < packed(channels); c++)
        for (int y = 0; y < rows; y++) {
            real *row = row_of(m, c, y);
            row[m.width] = row[m.row - 1] = m.border;
        }
}

/* ---- Convolutions ------------------------------------------------------------------------------ */

/* Adds the products of 4 output channels at `vectors` x LANES positions; 3x3 (`taps` is 9) or 1x1 (1). The
   sums stay in registers. A vector that is loaded serves 4 multiply-adds, a weight serves `vectors` of
   them. Weights come in the order of use: for each input channel (or four) and tap those of the 4 outputs. `taps`
   and `vectors` are constants at every call, and all loops but the one over channels are unrolled. */
static INLINE const real *accumulate(vec sum[4][VECTORS], const real *from, map in, int channels, const real *w,
                                     const int taps, const int vectors) {
    for (int c = 0; c < packed(channels); c++, from += in.plane) {
        UNROLL for (int k = 0; k < taps; k++, w += 4) {
            const real *shifted = taps == 1 ? from : from + (k / 3 - 1) * in.row + (k % 3 - 1);
            UNROLL for (int v = 0; v < vectors; v++) {
                vec x = load(shifted + v * LANES);
                KEEP(x);
                UNROLL for (int o = 0; o < 4; o++) sum[o][v] = MULTIPLY_ADD(all(w[o]), x, sum[o][v]);
            }
        }
    }
    return w;
}

static INLINE void begin(vec sum[4][VECTORS], const real *bias, const int vectors) {
    UNROLL for (int o = 0; o < 4; o++) UNROLL for (int v = 0; v < vectors; v++) sum[o][v] = all(bias[o + 4 * SIGNED]);
}

/* Inputs: the channels of `a`, then those of `b`. Output: 4 channels of `out` at a time, or with weights of
   a head (bias, then one for each channel) what they add to its only channel. */
typedef struct {
    map a, b, out;
    int in_a, in_b;
    const number *head;
} layer;

static INLINE void tile(const layer *l, ptrdiff_t at, int first, const real *w, const int vectors) {
    vec sum[4][VECTORS];
    begin(sum, w, vectors);
    const real *next = accumulate(sum, l->a.data + at, l->a, l->in_a, w + BIAS, 9, vectors);
    accumulate(sum, l->b.data + at, l->b, l->in_b, next, 9, vectors);
    UNROLL for (int v = 0; v < vectors; v++) {
        real *to = l->out.data + at + v * LANES;
        if (l->head) {
            floats total = l->head[0] - (floats){0};
            if (first) total = to_floats(load(to));
            UNROLL for (int o = 0; o < 4; o++) total += activation(sum[o][v], w, o) * l->head[1 + first + o];
            store(to, from_floats(total));
        } else {
#ifdef LESION_INT8
            store(to + first / 4 * l->out.plane, to_bytes(sum[0][v], sum[1][v], sum[2][v], sum[3][v], w, 0.5f));
#else
            UNROLL for (int o = 0; o < 4; o++) store(to + (first + o) * l->out.plane, MAXIMUM(sum[o][v], all(0)));
#endif
        }
    }
}

/* A 3x3 convolution with ReLU of some rows, tile by tile. The rows of narrow maps count as one long row, so
   that tiles are full there too. What a tile writes behind the last column is cleared afterwards; behind
   the last row it fills spare numbers. */
static void convolve(layer l, int outputs, int rows, const real *w) {
    const ptrdiff_t row = l.out.row, end = rows * row, step = narrow(l.out.width) ? end : row;
    for (int o = 0; o < outputs; o += 4, w += BIAS + 36 * (packed(l.in_a) + packed(l.in_b)))
        for (ptrdiff_t start = 0; start < end; start += step) {
            const ptrdiff_t stop = start + step - row + l.out.width;
            ptrdiff_t at = start;
            for (; at + TILE <= stop; at += TILE) tile(&l, at, o, w, VECTORS);
            for (; at < stop; at += LANES) tile(&l, at, o, w, 1);
        }
    clear_sides(l.out, l.head ? 1 : outputs, rows);
}

static INLINE void upsample_tile(map in, int channels, const real *from, real *even, real *odd, const real *w,
                                 const int vectors) {
    vec sum[4][VECTORS];
#ifdef LESION_INT8 /* 4 channels of one of the 4 pixels at a time */
    vec pixels[4][VECTORS];
    for (int k = 0; k < 4; k++, w += BIAS + 4 * packed(channels)) {
        begin(sum, w, vectors);
        accumulate(sum, from, in, channels, w + BIAS, 1, vectors);
        UNROLL for (int v = 0; v < vectors; v++)
            pixels[k][v] = to_bytes(sum[0][v], sum[1][v], sum[2][v], sum[3][v], w, 128.5f);
    }
#else /* the 4 pixels of one channel */
    vec(*pixels)[VECTORS] = sum;
    begin(sum, w, vectors);
    accumulate(sum, from, in, channels, w + BIAS, 1, vectors);
#endif
    UNROLL for (int v = 0; v < vectors; v++, even += 2 * LANES, odd += 2 * LANES) {
        store(even, SHUFFLE(pixels[0][v], pixels[1][v], LOW));
        store(even + LANES, SHUFFLE(pixels[0][v], pixels[1][v], HIGH));
        store(odd, SHUFFLE(pixels[2][v], pixels[3][v], LOW));
        store(odd + LANES, SHUFFLE(pixels[2][v], pixels[3][v], HIGH));
    }
}

/* Transposed 2x2 convolution with stride 2: each row of `in` gives two of `out`. The last tile of a row begins
   early enough to end with it: what it wrote behind the even row would be in the odd one. */
static void upsample(map in, int channels, map out, int rows, const real *w) {
    for (int c = 0; c < packed(channels); c++, w += PACK * (BIAS + 4 * packed(channels)))
        for (int y = 0; y < rows; y += 2) {
            const real *from = row_of(in, 0, y / 2);
            real *even = row_of(out, c, y), *odd = row_of(out, c, y + 1);
            int x = 0;
            for (; x + 2 * LANES <= in.width; x += 2 * LANES)
                upsample_tile(in, channels, from + x, even + 2 * x, odd + 2 * x, w, 2);
            for (; x < in.width; x += LANES) {
                if (x && x + LANES > in.width) x = in.width - LANES;
                upsample_tile(in, channels, from + x, even + 2 * x, odd + 2 * x, w, 1);
            }
        }
    clear_sides(out, channels, rows);
}

/* Maximum of every 2x2 pixels. */
static void pool(map in, map out, int channels, int rows) {
    for (int c = 0; c < packed(channels); c++)
        for (int y = 0; y < rows; y++) {
            const real *a = row_of(in, c, 2 * y), *b = row_of(in, c, 2 * y + 1);
            real *to = row_of(out, c, y);
            for (int x = 0; x < out.width; x += LANES) {
                const vec left = MAXIMUM(load(a + 2 * x), load(b + 2 * x));
                const vec right = MAXIMUM(load(a + 2 * x + LANES), load(b + 2 * x + LANES));
                store(to + x, MAXIMUM(SHUFFLE(left, right, EVEN), SHUFFLE(left, right, ODD)));
            }
        }
    clear_sides(out, channels, rows);
}

/* ---- Pixels and probabilities ------------------------------------------------------------------ */

/* Where pictures come from and masks go to. */
typedef struct {
    const uint8_t *pixels;
    ptrdiff_t stride;
    int format;
    uint8_t *mask; /* bytes; if null, numbers in 0..1 go to `probability` */
    ptrdiff_t mask_stride;
    float *probability;
} image;

/* A row of pixels as words: the first byte of a pixel is the lowest. */
static void read_words(const image *picture, int y, int width, uint32_t *to) {
    const uint8_t *from = picture->pixels + y * picture->stride;
    const int last = width - 1;
    if (picture->format == LESION_GRAY)
        for (int x = 0; x < width; x++) to[x] = from[x] * 0x010101u;
    else if (picture->format >= LESION_RGBA)
        __builtin_memcpy(to, from, (size_t)width * 4);
    else {
        for (int x = 0; x < last; x++) __builtin_memcpy(to + x, from + 3 * x, 4); /* and a byte of the next */
        to[last] = from[3 * last] | (uint32_t)from[3 * last + 1] << 8 | (uint32_t)from[3 * last + 2] << 16;
    }
}

/* A row of words as three channels: (byte - mean) * scale, which for bytes is part of the weights. */
static void normalize(const uint32_t *from, map out, int blue_first, const number *mean, const number *scale) {
#ifdef LESION_INT8
    (void)mean, (void)scale;
    for (int x = 0; x < out.width; x++) {
        const uint32_t word = from[x], swapped = (word & 0xff00) | (word >> 16 & 255) | (word & 255) << 16;
        out.data[x] = (real)(blue_first ? swapped : word) ^ FLIP;
    }
#else
    for (int c = 0; c < 3; c++) {
        const int shift = 8 * (blue_first ? 2 - c : c);
        real *to = row_of(out, c, 0);
        for (int x = 0; x < out.width; x += LANES) {
            const words byte = *(const words *)(from + x) >> shift & 255;
            store(to + x, from_floats((__builtin_convertvector(byte, floats) - mean[c]) * scale[c]));
        }
    }
#endif
    clear_sides(out, 3, 1);
}

/* 1 / (1 + exp(-x)). exp(-x) is 2^n * 2^f; the polynomial of 2^f, 0 <= f < 1, has a relative error of at
   most 1.5e-7. */
static INLINE floats sigmoid(floats x) {
    const floats limit = 80 - (floats){0};
    const floats t = choose((words)(x > -80), choose((words)(x < 80), x, limit), -limit) * -1.44269504f;
    const words n = __builtin_convertvector(t + 128, words) - 128;
    const floats f = t - __builtin_convertvector(n, floats);
    floats power = 0.055826318f + f * (0.0089893397f + f * 0.0018775767f);
    power = 1 + f * (0.69315308f + f * (0.24015361f + f * power));
    return 1 / (1 + power * (floats)((n + 127) << 23));
}

/* Probabilities as bytes: x 255, or 0 and 255 at a threshold in 0..1. */
static INLINE void write_bytes(uint8_t *to, floats p, float threshold) {
    const words byte = threshold < 0 ? __builtin_convertvector(p * 255 + 0.5f, words) : (words)(p > threshold);
    *(bytes *)to = __builtin_convertvector(byte, bytes);
}

/* ---- The network ------------------------------------------------------------------------------- */

typedef struct {
    int down[LEVELS], up[LEVELS]; /* channels of a level's encoder and decoder block */
    int pixels, pad;
    float threshold;
    size_t count;
    real border; /* of the picture: its mean */
    const number *mean, *scale;
    const void *weights;
} network;

/* Numbers of a layer and of a block of two, in the order of use. */
static int layer_size(int inputs, int outputs, int taps) { return outputs / 4 * (BIAS + 4 * taps * packed(inputs)); }

static int block_size(int in_a, int in_b, int outputs) {
    return outputs / 4 * (BIAS + 36 * (packed(in_a) + packed(in_b))) + layer_size(outputs, outputs, 9);
}

static int upsample_size(int channels) { return layer_size(channels, 4 * channels, 1); }

/* A model is 13 floats (format, width, side that it was trained at, 1 if pictures are padded to a square,
   threshold, count of weights, checksum, 3 means, 3 scales) and the weights. */
static int read_model(const void *model, size_t size, network *net) {
    const number *about = (const number *)model;
    if (!model) return LESION_NULL;
    if (size < HEADER * 4 || size % 4 || about[0] != (float)FORMAT) return LESION_MODEL;
    int width = 0;
    for (int w = 4; w <= 64; w += 4)
        if (about[1] == (float)w) width = w;
    const int known = about[2] >= 32 && about[2] <= (float)MAX_SIDE && about[4] > 0 && about[4] < 1;
    if (!width || !known || (int)about[2] % 32) return LESION_MODEL;
    net->pixels = (int)about[2];
    net->pad = about[3] > 0;
    net->threshold = about[4];
    net->mean = about + 7;
    net->scale = about + 10;
    net->weights = about + HEADER;
    net->border = 0;
#ifdef LESION_INT8
    for (int c = 0; c < 3; c++) {
        const float mean = net->mean[c] > 0 && net->mean[c] < 255 ? net->mean[c] : 0;
        net->border |= (int)(mean + 0.5f) << (8 * c);
    }
    net->border ^= FLIP;
#endif
    int weights = 0;
    for (int l = 0, in = 3; l < LEVELS; in = net->down[l++]) {
        net->down[l] = width << (l < 3 ? l : 3);
        net->up[l] = l == 0 || l == LEVELS - 1 ? net->down[l] : width << (l - 1);
        weights += block_size(in, 0, net->down[l]);
    }
    for (int l = 0; l < LEVELS - 1; l++)
        weights += upsample_size(net->up[l + 1]) + block_size(net->down[l], net->up[l + 1], net->up[l]);
    weights += 1 + net->up[0];
    net->count = (size_t)weights;
    return about[5] == (float)weights && size == 4 * (HEADER + net->count) ? LESION_OK : LESION_WEIGHTS;
}

int lesion_model_check(const void *model, size_t size) {
    network net;
    uint32_t sum = 0, word;
    const int error = read_model(model, size, &net);
    if (error) return error;
    for (size_t i = 0; i < size / 4; i++) {
        __builtin_memcpy(&word, (const uint8_t *)model + 4 * i, sizeof word);
        if (PACK == 1 && (word >> 23 & 255) == 255) return LESION_DAMAGED; /* NaN or infinite */
        if (i != 6) sum += word * (2 * (uint32_t)i + 1);
    }
    return ((const number *)model)[6] == (float)(sum % 16777213) ? LESION_OK : LESION_DAMAGED;
}

typedef struct {
    map skip, out;    /* whole, with a row of zeros above and below: of the encoder, of the decoder */
    map in, mid, end; /* bands: input, between the convolutions, logits */
    int height, band;
} level;

typedef struct {
    level levels[LEVELS];
    real *weights;
    uint32_t *line;
} places;

/* Places all that a call needs; returns how much space that is. */
static uint64_t place(const network *net, int height, int width, float *start, places *maps) {
    arena space = {start, 0};
    maps->line = (uint32_t *)take(&space, (uint64_t)width);
#ifdef LESION_HALF
    maps->weights = (real *)take(&space, net->count / 2 + 1);
#endif
    for (int l = 0; l < LEVELS; l++) {
        level *m = maps->levels + l;
        m->height = height >> l;
        m->band = narrow(width >> l) || m->height < BAND ? m->height + 2 : BAND;
        if (l < LEVELS - 1) m->skip = below(take_map(&space, net->down[l], m->height + 2, width >> l), 1);
        if (l > 0) m->out = below(take_map(&space, net->up[l], m->height + 2, width >> l), 1);
    }
    const uint64_t whole = space.used;
    uint64_t most = 0;
    for (int l = 0; l < LEVELS; l++) { /* the bands of one level at a time */
        level *m = maps->levels + l;
        const int before = l ? net->down[l - 1] : 3, after = l < LEVELS - 1 ? net->up[l + 1] : 0;
        space.used = whole;
        m->in = take_map(&space, before > after ? before : after, m->band + 2, width >> l);
        m->mid = take_map(&space, net->down[l], m->band + 2, width >> l);
        if (l == 0) m->end = take_map(&space, 1, m->band + 2, width);
        if (space.used > most) most = space.used;
    }
    return most;
}

/* Prepares a band for the rows from s on: the last two rows of the band before become its first two. */
static void advance(map band, int channels, int rows, int s) {
    for (int c = 0; c < packed(channels); c++) {
        real *top = row_of(band, c, 0);
        if (s == 0) fill(top - GAP, GAP + 3 * band.row, band.border);
        else __builtin_memmove(top, row_of(band, c, rows), (size_t)(2 * band.row) * sizeof(real));
    }
}

/* The two convolutions of a block. The band `in` has rows from s - 2 on, so the rows between the convolutions
   begin at s - 1 and the results at s - 2: rows of `out`, or logits in the band `end` if there is a head.
   `in_a` channels of the whole map `a` come before those of the band. */
static void run_block(const level *m, map a, int in_a, map in, int in_b, map out, int channels, int s, const real *w,
                      const number *head) {
    const int n = m->band, h = m->height;
    int from = s ? 0 : 1, to = h + 1 - s < n ? h + 1 - s : n;
    advance(m->mid, channels, n, s);
    layer l = {in_a ? below(a, s - 1 + from) : in, below(in, 1 + from), below(m->mid, 2 + from), in_a, in_b, 0};
    convolve(l, channels, to - from, w);
    if (to < n) clear_row(m->mid, channels, 2 + to);
    from = s ? 0 : 2, to = h + 2 - s < n ? h + 2 - s : n;
    out = head ? below(m->end, from) : below(out, s - 2 + from);
    const layer second = {below(m->mid, 1 + from), m->mid, out, channels, 0, head};
    convolve(second, channels, to - from, w + block_size(in_a, in_b, channels) - layer_size(channels, channels, 9));
}

static void write_row(const image *picture, int y, map logits, int row, int width) {
    for (int x = 0; x < width; x += LANES) {
        const floats p = sigmoid(to_floats(load(row_of(logits, 0, row) + x)));
        if (picture->mask) write_bytes(picture->mask + y * picture->mask_stride + x, p, -1);
        else *(floats *)(picture->probability + (ptrdiff_t)y * width + x) = p;
    }
}

static void run(const network *net, const image *picture, int width, const places *space) {
    const int *down = net->down, *up = net->up, bottom = LEVELS - 1;
    const int blue_first = picture->format == LESION_BGR || picture->format == LESION_BGRA;
    const real *w = (const real *)net->weights;
    const number *head = (const number *)net->weights + net->count - 1 - up[0];
#ifdef LESION_HALF
    w = space->weights;
    for (size_t i = 0; i < net->count; i++) space->weights[i] = (real)((const number *)net->weights)[i];
#endif
    for (int l = 0; l <= bottom; l++) {
        const level *m = space->levels + l;
        const int n = m->band, h = m->height, channels = l ? down[l - 1] : 3;
        const map out = l < bottom ? m->skip : m->out;
        map in = m->in;
        if (!l) in.border = net->border;
        clear_row(out, down[l], -1);
        for (int s = 0; s < h + 2; s += n) {
            const int left = h > s ? h - s : 0, rows = left < n ? left : n;
            advance(in, channels, n, s);
            if (l && rows) pool(below(m[-1].skip, 2 * s), below(in, 2), channels, rows);
            for (int y = 0; !l && y < rows; y++) {
                read_words(picture, s + y, width, space->line);
                normalize(space->line, below(in, 2 + y), blue_first, net->mean, net->scale);
            }
            if (rows < n) clear_row(in, channels, 2 + rows);
            run_block(m, m->skip, 0, in, channels, out, down[l], s, w, 0);
        }
        clear_row(out, down[l], h);
        w += block_size(channels, 0, down[l]);
    }
    for (int l = bottom - 1; l >= 0; l--) {
        const level *m = space->levels + l;
        const int n = m->band, h = m->height, channels = up[l + 1];
        const real *convolutions = w + upsample_size(channels);
        map in = m->in;
        in.border = MIDDLE;
        if (l) clear_row(m->out, up[l], -1);
        for (int s = 0; s < h + 2; s += n) {
            const int left = h > s ? h - s : 0, rows = left < n ? left : n;
            advance(in, channels, n, s);
            if (rows) upsample(below(m[1].out, s / 2), channels, below(in, 2), rows, w);
            if (rows < n) clear_row(in, channels, 2 + rows);
            run_block(m, m->skip, down[l], in, channels, m->out, up[l], s, convolutions, l ? 0 : head);
            for (int y = s ? s - 2 : 0; !l && y < s + n - 2 && y < h; y++)
                write_row(picture, y, m->end, y - s + 2, width);
        }
        if (l) clear_row(m->out, up[l], h);
        w = convolutions + block_size(down[l], channels, up[l]);
    }
}

/* ---- Any picture ------------------------------------------------------------------------------- */

/* How a line is resized, as Pillow does: the pixels that make each new one, and their weights. For bytes the
   weights are whole numbers with 22 bits behind the point. */
typedef struct {
    int to, most; /* length of the new line; weights of a pixel at most */
    int32_t *first, *count, *whole;
    float *part;
} resampler;

static resampler take_resampler(arena *space, int from, int to) {
    resampler r = {to, 2 * (from / to + 1) + 2, 0, 0, 0, 0};
    r.first = (int32_t *)take(space, (uint64_t)to);
    r.count = (int32_t *)take(space, (uint64_t)to);
    r.part = take(space, (uint64_t)to * (uint64_t)r.most);
    r.whole = (int32_t *)r.part;
    return r;
}

/* The weight of pixel x. `volatile` keeps compilers from fusing the product, which rounds differently. */
static double weight(int x, double centre, double wide, int box) {
    const volatile double at = (x - centre + 0.5) * (1 / wide);
    const double near = at < 0 ? -at : at;
    return box ? at > -0.5 && at <= 0.5 : near < 1 ? 1 - near : 0;
}

static void set_weights(resampler r, int from, int box, int whole) {
    const double scale = (double)from / r.to, wide = scale > 1 ? scale : 1, support = box ? wide / 2 : wide;
    for (int i = 0; i < r.to; i++) {
        const volatile double centre = (i + 0.5) * scale;
        const double low = centre - support + 0.5, high = centre + support + 0.5;
        int first = low > 0 ? (int)low : 0, end = high < from ? (int)high : from;
        double sum = 0;
        for (int x = first; x < end; x++) sum += weight(x, centre, wide, box);
        while (weight(first, centre, wide, box) == 0) first++;
        while (weight(end - 1, centre, wide, box) == 0) end--;
        r.first[i] = first;
        r.count[i] = end - first;
        for (int x = first, at = i * r.most; x < end; x++, at++) {
            const double w = weight(x, centre, wide, box) / sum;
            if (whole) r.whole[at] = (int32_t)(0.5 + w * (1 << BITS));
            else r.part[at] = (float)w;
        }
    }
}

/* Where a picture lies in the square that the network sees. */
typedef struct {
    int left, top, width, height, shrinks;
} placement;

static int round_to_even(double value) { /* for 0 <= value < 2^51 */
    const volatile double shifted = value + 4503599627370496.0;
    return (int)(shifted - 4503599627370496.0);
}

static placement fit(const network *net, int width, int height) {
    double across = (double)net->pixels / width, down = (double)net->pixels / height;
    if (net->pad) across = down = across < down ? across : down;
    const volatile double w = width * across, h = height * down;
    placement p = {0, 0, round_to_even(w), round_to_even(h), across <= 1 && down <= 1};
    if (p.width < 1) p.width = 1;
    if (p.height < 1) p.height = 1;
    p.left = (net->pixels - p.width) / 2;
    p.top = (net->pixels - p.height) / 2;
    return p;
}

/* The space of a call: the square, which at last has the probabilities, and one after the other in the same
   place that of resizing, of the network and of resizing back. */
typedef struct {
    placement at;
    resampler across, down, back_across, back_down;
    uint32_t *square, *lines, *ring;
    float *rows;
    int columns_first;
    places maps;
    uint64_t used;
} plan;

static plan make_plan(const network *net, int width, int height, float *start) {
    plan p;
    arena space = {start, 0};
    const uint64_t side = (uint64_t)net->pixels, w = (uint64_t)width;
    p.at = fit(net, width, height);
    /* the order of Pillow 13: columns first where that leaves less to do */
    p.columns_first = height > p.at.height && height - p.at.height > 2 * (width - p.at.width);
    p.square = (uint32_t *)take(&space, side * side);
    const uint64_t kept = space.used;
    p.across = take_resampler(&space, width, p.at.width);
    p.down = take_resampler(&space, height, p.at.height);
    p.lines = (uint32_t *)take(&space, 2 * w);
    p.ring = (uint32_t *)take(&space, 2 * (uint64_t)p.down.most * (p.columns_first ? w : (uint64_t)p.at.width));
    p.used = space.used;
    space.used = kept;
    p.back_across = take_resampler(&space, p.at.width, width);
    p.back_down = take_resampler(&space, p.at.height, height);
    p.rows = take(&space, (2 * (uint64_t)p.back_down.most + 1) * round_up(w, 16));
    if (space.used > p.used) p.used = space.used;
    space.used = kept + place(net, net->pixels, net->pixels, start ? start + kept : 0, &p.maps);
    if (space.used > p.used) p.used = space.used;
    return p;
}

/* A pixel of a resized line: all bytes of `count` words at once. */
static INLINE uint32_t mix(const uint32_t *from, ptrdiff_t step, int count, const int32_t *w) {
    pixel sum = (1 << (BITS - 1)) - (pixel){0};
    for (int k = 0; k < count; k++) sum += __builtin_convertvector(*(const quad *)(from + k * step), pixel) * w[k];
    const quad mixed = __builtin_convertvector(sum >> BITS, quad);
    uint32_t word;
    __builtin_memcpy(&word, &mixed, 4);
    return word;
}

static void resize_line(const uint32_t *from, const resampler *r, uint32_t *to) {
    for (int i = 0; i < r->to; i++) to[i] = mix(from + r->first[i], 1, r->count[i], r->whole + i * r->most);
}

/* Resizes a picture into the square, row by row. Rows that are needed again are in a ring, twice, so that
   those of a new row follow one another. */
static void prepare(const plan *p, const image *picture, int width, int height, int side) {
    const int ring_width = p->columns_first ? width : p->at.width, slots = p->down.most;
    uint32_t *line = p->lines, *mixed = p->lines + width;
    set_weights(p->across, width, p->at.shrinks, 1);
    set_weights(p->down, height, p->at.shrinks, 1);
    __builtin_memset(p->square, 0, (size_t)side * (size_t)side * 4);
    for (int y = 0, next = 0; y < p->at.height; y++) {
        const int first = p->down.first[y], count = p->down.count[y];
        for (next = next > first ? next : first; next < first + count; next++) {
            uint32_t *slot = p->ring + (ptrdiff_t)(next % slots) * ring_width;
            read_words(picture, next, width, p->columns_first ? slot : line);
            if (!p->columns_first) resize_line(line, &p->across, slot);
            __builtin_memcpy(slot + (ptrdiff_t)slots * ring_width, slot, (size_t)ring_width * 4);
        }
        const uint32_t *top = p->ring + (ptrdiff_t)(first % slots) * ring_width;
        uint32_t *to = p->square + (p->at.top + y) * side + p->at.left, *out = p->columns_first ? mixed : to;
        for (int x = 0; x < ring_width; x++) out[x] = mix(top + x, ring_width, count, p->down.whole + y * slots);
        if (p->columns_first) resize_line(mixed, &p->across, to);
    }
}

/* Resizes the probabilities of the square to the size of the picture, and writes the mask. */
static void restore(const plan *p, const image *picture, int width, int height, int side, float threshold) {
    const resampler *across = &p->back_across, *down = &p->back_down;
    const ptrdiff_t row = (ptrdiff_t)round_up((uint64_t)width, 16);
    uint8_t *line = (uint8_t *)(p->rows + 2 * down->most * row);
    set_weights(*across, p->at.width, 0, 0);
    set_weights(*down, p->at.height, 0, 0);
    for (int y = 0, next = 0; y < height; y++) {
        const int first = down->first[y], count = down->count[y];
        for (next = next > first ? next : first; next < first + count; next++) {
            const float *from = picture->probability + (p->at.top + next) * side + p->at.left;
            float *slot = p->rows + next % down->most * row;
            for (int x = 0; x < width; x++) {
                const float *w = across->part + x * across->most, *at = from + across->first[x];
                slot[x] = w[0] * at[0];
                for (int k = 1; k < across->count[x]; k++) slot[x] += w[k] * at[k];
            }
            __builtin_memcpy(slot + down->most * row, slot, (size_t)row * sizeof(float));
        }
        const float *top = p->rows + first % down->most * row, *w = down->part + y * down->most;
        for (ptrdiff_t x = 0; x < row; x += LANES) {
            floats sum = {0};
            for (int k = 0; k < count; k++) sum += *(const floats *)(top + k * row + x) * w[k];
            write_bytes(line + x, sum, threshold);
        }
        __builtin_memcpy(picture->mask + y * picture->mask_stride, line, (size_t)width);
    }
}

/* ---- What an app calls ------------------------------------------------------------------------- */

static int check_sides(int height, int width, int multiple, int largest) {
    if (height <= 0 || width <= 0 || height % multiple || width % multiple) return LESION_SIZE;
    return height > largest || width > largest ? LESION_TOO_LARGE : LESION_OK;
}

static int check_network(const void *model, size_t size, int height, int width, network *net, uint64_t *used) {
    places space;
    int error = read_model(model, size, net);
    if (!error) error = check_sides(height, width, 32, MAX_SIDE);
    if (error) return error;
    *used = place(net, height, width, 0, &space);
    return *used < SIZE_MAX / 8 ? LESION_OK : LESION_TOO_LARGE;
}

static int check_picture(const void *model, size_t size, int height, int width, network *net, uint64_t *used) {
    int error = read_model(model, size, net);
    if (!error) error = check_sides(height, width, 1, MAX_PICTURE);
    if (error) return error;
    *used = make_plan(net, width, height, 0).used;
    return *used < SIZE_MAX / 8 ? LESION_OK : LESION_TOO_LARGE;
}

static float *aligned(void *workspace) { return (float *)(((uintptr_t)workspace + 63) / 64 * 64); }

size_t lesion_model_workspace_size(const void *model, size_t size, int height, int width) {
    network net;
    uint64_t used;
    if (lesion_model_check(model, size) || check_network(model, size, height, width, &net, &used)) return 0;
    return ((size_t)used + 16) * sizeof(float);
}

size_t lesion_model_image_workspace_size(const void *model, size_t size, int width, int height) {
    network net;
    uint64_t used;
    if (lesion_model_check(model, size) || check_picture(model, size, height, width, &net, &used)) return 0;
    return ((size_t)used + 16) * sizeof(float);
}

int lesion_model_segment(const void *model, size_t size, const uint8_t *rgb, int height, int width,
                         uint8_t *mask, void *workspace) {
    network net;
    places space;
    uint64_t used;
    const int error = check_network(model, size, height, width, &net, &used);
    if (error) return error;
    if (!rgb || !mask || !workspace) return LESION_NULL;
    place(&net, height, width, aligned(workspace), &space);
    const image picture = {rgb, (ptrdiff_t)width * 3, LESION_RGB, mask, width, 0};
    run(&net, &picture, width, &space);
    return LESION_OK;
}

int lesion_model_segment_image(const void *model, size_t size, const uint8_t *pixels, int width, int height,
                               ptrdiff_t stride, int format, uint8_t *mask, ptrdiff_t mask_stride,
                               void *workspace) {
    static const int sizes[] = {1, 3, 3, 4, 4};
    const int order = format & ~LESION_BINARY;
    network net;
    uint64_t used;
    const int error = check_picture(model, size, height, width, &net, &used);
    if (error) return error;
    if (!pixels || !mask || !workspace) return LESION_NULL;
    if (order < LESION_GRAY || order > LESION_BGRA) return LESION_FORMAT;
    const ptrdiff_t row = (ptrdiff_t)width * sizes[order];
    if (!stride) stride = row;
    if (!mask_stride) mask_stride = width;
    if ((stride < 0 ? -stride : stride) < row || (mask_stride < 0 ? -mask_stride : mask_stride) < width)
        return LESION_FORMAT;

    const plan p = make_plan(&net, width, height, aligned(workspace));
    const int side = net.pixels, blue_first = order == LESION_BGR || order == LESION_BGRA;
    const image picture = {pixels, stride, order, mask, mask_stride, (float *)p.square};
    image square = {(const uint8_t *)p.square, (ptrdiff_t)side * 4, LESION_RGBA, 0, 0, (float *)p.square};
    if (blue_first) square.format = LESION_BGRA;
    prepare(&p, &picture, width, height, side);
    run(&net, &square, side, &p.maps);
    restore(&p, &picture, width, height, side, format & LESION_BINARY ? net.threshold : -1);
    return LESION_OK;
}

const char *lesion_error_string(int error) {
    static const char *const texts[] = {
        "no error",
        "a pointer is null",
        "a side is not positive, or for the network alone not a multiple of 32",
        "a side exceeds 16384, or for the network alone 4096, or the workspace exceeds the address space",
        "the model is truncated or of another format",
        "the number of weights does not fit the architecture",
        "the model is damaged: its checksum differs, or a weight is NaN or infinite",
        "the pixel format is unknown, or a stride is shorter than a row",
    };
    return error >= LESION_OK && error <= LESION_FORMAT ? texts[error] : "unknown error";
}

#ifndef LESION_NO_STUDENT
size_t lesion_image_workspace_size(int width, int height) {
    return lesion_model_image_workspace_size(lesion_student, sizeof lesion_student, width, height);
}

int lesion_segment_image(const uint8_t *pixels, int width, int height, ptrdiff_t stride, int format,
                         uint8_t *mask, ptrdiff_t mask_stride, void *workspace) {
    return lesion_model_segment_image(lesion_student, sizeof lesion_student, pixels, width, height, stride, format,
                                      mask, mask_stride, workspace);
}

size_t lesion_workspace_size(int height, int width) {
    return lesion_model_workspace_size(lesion_student, sizeof lesion_student, height, width);
}

int lesion_segment(const uint8_t *rgb, int height, int width, uint8_t *mask, void *workspace) {
    return lesion_model_segment(lesion_student, sizeof lesion_student, rgb, height, width, mask, workspace);
}
#endif
