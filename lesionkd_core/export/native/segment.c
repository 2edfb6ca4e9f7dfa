/* The student in C11 (also C++) with the vector types of clang and GCC.

   A block of the U-Net is two 3x3 convolutions with ReLU; BatchNorm is part of their weights. A map of
   features is stored as planes, one for each channel, in rows with at least one zero behind the last
   column and with a row of zeros above and below:

       plane[y * row_size(width) + x]        (y, -1) is a zero of the row above, (y, width) one of row y

   so a convolution reads the 8 neighbours of every pixel without asking whether they exist. */
#include "segment.h"

#ifndef LESION_NO_STUDENT
#include "student.h" /* lesion_student, lesion_student_count */
#endif

/* LANES: floats in a vector register. VECTORS: registers that a tile uses for one output channel. */
#if defined(__AVX512F__)
enum { LANES = 16, VECTORS = 4 };
#elif defined(__AVX__)
enum { LANES = 8, VECTORS = 2 };
#elif defined(__aarch64__)
enum { LANES = 4, VECTORS = 4 };
#else
enum { LANES = 4, VECTORS = 2 };
#endif
enum { TILE = LANES * VECTORS, BAND = 8, LEVELS = 5, MAX_SIDE = 4096, HEADER = 10, FORMAT = 1 };

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t words __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

#define INLINE inline __attribute__((always_inline))
#ifdef __clang__
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 9")
#endif
#ifdef __wasm_relaxed_simd__
#define MULTIPLY_ADD(sum, w, x) ((sum) = (vec)__builtin_wasm_relaxed_madd_f32x4((vec){} + (w), x, sum))
#else
#define MULTIPLY_ADD(sum, w, x) ((sum) += (w) * (x)) /* one instruction where the processor has it */
#endif

/* ---- Maps -------------------------------------------------------------------------------------- */

typedef struct {
    float *data;  /* pixel (0, 0) of the first channel */
    size_t plane; /* floats from one channel to the next */
    int height, width;
} map;

/* Floats from one row to the next; rows of wide maps begin at multiples of 64 bytes. */
static size_t row_size(int width) {
    return width < TILE ? (size_t)width + 1 : ((size_t)width + 16) / 16 * 16;
}

static float *row_of(map m, int channel, int y) {
    return m.data + (size_t)channel * m.plane + (size_t)y * row_size(m.width);
}

/* The rows from y to y + BAND as a map. */
static map band_of(map m, int y) {
    m.data = row_of(m, 0, y);
    m.height = m.height - y < BAND ? m.height - y : BAND;
    return m;
}

static void clear_border(map m, int first, int count) {
    size_t row = row_size(m.width);
    for (int c = first; c < first + count; c++) {
        float *above = row_of(m, c, -1), *below = row_of(m, c, m.height);
        for (size_t x = 0; x < row; x++) above[x] = below[x] = 0;
        above[-1] = 0;
        for (int y = 0; y < m.height; y++) row_of(m, c, y)[m.width] = row_of(m, c, y + 1)[-1] = 0;
    }
}

/* ---- Convolutions ------------------------------------------------------------------------------ */

/* The kernel: 4 output channels of a convolution at `vectors` x LANES positions from `at` on; 3x3 with
   ReLU (`taps` is 9) or 1x1 without (1). The sums stay in registers. A vector that is loaded serves 4
   multiply-adds, a weight serves `vectors` of them. Weights come in the order of use: 4 biases, then
   for each input channel and tap those of the 4 outputs. `taps` and `vectors` are constants at every
   call, so the compiler unrolls all loops but the one over input channels. */
static INLINE void tile(map in, int inputs, map out, int first, int outputs, size_t at, const float *w,
                        const int taps, const int vectors) {
    const float *from = in.data + at;
    const ptrdiff_t row = (ptrdiff_t)row_size(in.width);
    vec sum[4][VECTORS];
    for (int o = 0; o < 4; o++)
        for (int v = 0; v < vectors; v++) sum[o][v] = (vec){} + w[o];
    for (w += 4; inputs > 0; inputs--, from += in.plane) {
        UNROLL
        for (int k = 0; k < taps; k++, w += 4) {
            const float *shifted = taps == 1 ? from : from + (k / 3 - 1) * row + k % 3 - 1;
            for (int v = 0; v < vectors; v++) {
                vec x = *(const vec *)(shifted + v * LANES);
                for (int o = 0; o < 4; o++) MULTIPLY_ADD(sum[o][v], w[o], x);
            }
        }
    }
    for (int o = 0; o < 4 && first + o < outputs; o++)
        for (int v = 0; v < vectors; v++) {
            vec value = sum[o][v];
            if (taps == 9) value = (vec)((words)value & (value > (vec){}));
            *(vec *)(row_of(out, first + o, 0) + at + v * LANES) = value;
        }
}

/* A whole map, tile by tile. Narrow maps count as one long row, so that tiles are full there too. What a
   tile writes behind the last column is cleared afterwards; behind the last row it fills spare floats. */
static INLINE const float *convolve(map in, int inputs, map out, int outputs, const float *w,
                                    const int taps) {
    size_t row = row_size(in.width), all = (size_t)in.height * row;
    size_t step = in.width < TILE ? all : row, run = step - row + (size_t)in.width;
    for (int o = 0; o < outputs; o += 4, w += 4 + 4 * taps * inputs)
        for (size_t start = 0; start < all; start += step) {
            size_t at = start, end = start + run;
            for (; at + TILE <= end; at += TILE) tile(in, inputs, out, o, outputs, at, w, taps, VECTORS);
            for (; at < end; at += LANES) tile(in, inputs, out, o, outputs, at, w, taps, 1);
        }
    return w;
}

static const float *convolve_3x3(map in, int inputs, map out, int outputs, const float *w) {
    w = convolve(in, inputs, out, outputs, w, 9);
    clear_border(out, 0, outputs);
    return w;
}

static void convolve_1x1(map in, int inputs, map out, int outputs, const float *w) {
    convolve(in, inputs, out, outputs, w, 1);
}

/* Transposed 2x2 convolution with stride 2: a 1x1 convolution whose 4 outputs are the 2x2 pixels of one
   channel. It writes the channels of `out` from `first` on; `four` is space for its 4 outputs. */
static const float *upsample(map in, int channels, map four, map out, int first, const float *w) {
    for (int c = first; c < first + channels; c++, w += 4 + 4 * channels)
        for (int y = 0; y < in.height; y += BAND) {
            map band = band_of(in, y);
            convolve_1x1(band, channels, four, 4, w);
            for (int k = 0; k < 2 * band.height; k++) {
                const float *even = row_of(four, k % 2 * 2, k / 2);
                const float *odd = row_of(four, k % 2 * 2 + 1, k / 2);
                float *to = row_of(out, c, 2 * y + k);
                for (int x = 0; x < in.width; x++) {
                    to[2 * x] = even[x];
                    to[2 * x + 1] = odd[x];
                }
            }
        }
    clear_border(out, first, channels);
    return w;
}

static INLINE float larger(float a, float b) { return a > b ? a : b; }

/* Maximum of every 2x2 pixels. */
static void pool(map in, int channels, map out) {
    for (int c = 0; c < channels; c++)
        for (int y = 0; y < out.height; y++) {
            const float *a = row_of(in, c, 2 * y), *b = row_of(in, c, 2 * y + 1);
            float *to = row_of(out, c, y);
            for (int x = 0; x < out.width; x++)
                to[x] = larger(larger(a[2 * x], b[2 * x]), larger(a[2 * x + 1], b[2 * x + 1]));
        }
    clear_border(out, 0, channels);
}

/* ---- Image and mask ---------------------------------------------------------------------------- */

/* (byte - mean) * scale. Pixel k of every block of stem x stem pixels becomes a channel of its colour. */
static INLINE void read_image(const uint8_t *rgb, map out, const int stem, const float *mean,
                              const float *scale) {
    const int block = stem * stem;
    for (int k = 0; k < block; k++)
        for (int y = 0; y < out.height; y++) {
            float *red = row_of(out, k, y), *green = row_of(out, block + k, y);
            float *blue = row_of(out, 2 * block + k, y);
            const size_t first = (size_t)(y * stem + k / stem) * (size_t)out.width * stem + k % stem;
            const uint8_t *from = rgb + 3 * first;
            for (int x = 0; x < out.width; x++, from += 3 * stem) {
                red[x] = ((float)from[0] - mean[0]) * scale[0];
                green[x] = ((float)from[1] - mean[1]) * scale[1];
                blue[x] = ((float)from[2] - mean[2]) * scale[2];
            }
        }
    clear_border(out, 0, 3 * block);
}

/* 255 / (1 + exp(-x)), rounded. exp(-x) is 2^n * 2^f; the polynomial of 2^f, 0 <= f < 1, has a relative
   error of at most 1.5e-7, so the byte is right but for ties. */
static INLINE uint8_t probability(float x) {
    float t = (x > -80 ? x < 80 ? x : 80 : -80) * -1.44269504f, power;
    int32_t n = (int32_t)(t + 128) - 128;
    uint32_t bits = (uint32_t)(n + 127) << 23;
    float f = t - (float)n;
    __builtin_memcpy(&power, &bits, sizeof power);
    power *= 1 + f * (0.69315308f + f * (0.24015361f + f * (0.055826318f + f * (0.0089893397f + f * 0.0018775767f))));
    return (uint8_t)(255 / (1 + power) + 0.5f);
}

/* 1x1 convolution to the stem x stem pixels of a block, and their probabilities. */
static INLINE void write_mask(map in, int inputs, map logits, uint8_t *mask, const int stem,
                              const float *w) {
    for (int y = 0; y < in.height; y += BAND) {
        map band = band_of(in, y);
        convolve_1x1(band, inputs, logits, stem * stem, w);
        for (int k = 0; k < stem * stem; k++)
            for (int dy = 0; dy < band.height; dy++) {
                const float *from = row_of(logits, k, dy);
                uint8_t *to = mask + (size_t)((y + dy) * stem + k / stem) * (size_t)in.width * stem + k % stem;
                for (int x = 0; x < in.width; x++) to[x * stem] = probability(from[x]);
            }
    }
}

/* ---- The network ------------------------------------------------------------------------------- */

typedef struct {
    int stem, levels;           /* levels of resolution: strides stem, 2 stem, ... 16 */
    int down[LEVELS], up[LEVELS]; /* channels of a level's encoder and decoder block */
    const float *mean, *scale, *weights;
} network;

/* A model is 10 numbers (format, width, stem, number of weights, 3 means, 3 scales) and the weights. */
static int read_model(const float *model, size_t count, network *net) {
    if (!model) return LESION_NULL;
    if (count < HEADER || model[0] != FORMAT) return LESION_MODEL;
    int width = 0, stem = 0;
    for (int w = 4; w <= 64; w += 4)
        if (model[1] == (float)w) width = w;
    for (int s = 1; s <= 4; s *= 2)
        if (model[2] == (float)s) stem = s;
    if (!width || !stem) return LESION_MODEL;
    net->stem = stem;
    net->levels = stem == 1 ? 5 : stem == 2 ? 4 : 3;
    net->mean = model + 4;
    net->scale = model + 7;
    net->weights = model + HEADER;
    size_t weights = 0;
    for (int l = 0, stride = stem, in = 3 * stem * stem; l < net->levels; l++, stride *= 2) {
        int c = width * (stride < 8 ? stride : 8);
        net->down[l] = c;
        net->up[l] = l == 0 || stride == 16 ? c : width * stride / 2;
        weights += (size_t)c * (size_t)(1 + 9 * in + 1 + 9 * c);
        in = c;
    }
    for (int l = 0; l + 1 < net->levels; l++) {
        int c = net->up[l], below = net->up[l + 1];
        weights += (size_t)below * (size_t)(4 + 4 * below);
        weights += (size_t)c * (size_t)(1 + 9 * (net->down[l] + below) + 1 + 9 * c);
    }
    weights += (size_t)(stem == 4 ? 16 : 4) * (size_t)(1 + net->up[0]);
    return model[3] == (float)weights && count == HEADER + weights ? LESION_OK : LESION_WEIGHTS;
}

/* The maps of a level: input (and at last output) of its blocks, between the convolutions of a block, and
   the skip connection with the upsampled maps behind it, so that they need no concatenation. */
typedef struct {
    map in, mid, cat;
} level;

static map place(uint64_t *floats, float *workspace, int channels, int height, int width) {
    size_t row = row_size(width), before = (row + 16) / 16 * 16, spare = 16;
    map m = {NULL, (before + (size_t)(height + 1) * row + spare + 15) / 16 * 16, height, width};
    if (workspace) m.data = workspace + *floats + before;
    *floats += (uint64_t)channels * m.plane;
    return m;
}

/* Places all maps in the workspace, from its first multiple of 64 bytes on; returns its size in floats. */
static uint64_t place_maps(const network *net, int height, int width, void *workspace, level *maps) {
    float *start = (float *)(((uintptr_t)workspace + 63) / 64 * 64);
    uint64_t floats = 0;
    for (int l = 0, in = 3 * net->stem * net->stem; l < net->levels; in = net->down[l++]) {
        int h = height / net->stem >> l, w = width / net->stem >> l, c = net->down[l];
        maps[l].in = place(&floats, start, in > c ? in : c, h, w);
        maps[l].mid = place(&floats, start, c, h, w);
        if (l + 1 < net->levels) maps[l].cat = place(&floats, start, c + net->up[l + 1], h, w);
    }
    return floats + 16;
}

static int check(const float *model, size_t count, int height, int width, network *net, size_t *bytes) {
    level maps[LEVELS];
    int error = read_model(model, count, net);
    if (error) return error;
    if (height <= 0 || width <= 0 || height % 32 || width % 32) return LESION_SIZE;
    if (height > MAX_SIDE || width > MAX_SIDE) return LESION_TOO_LARGE;
    uint64_t floats = place_maps(net, height, width, NULL, maps);
    if (floats >= SIZE_MAX / 2 / sizeof(float)) return LESION_TOO_LARGE;
    *bytes = (size_t)floats * sizeof(float);
    return LESION_OK;
}

size_t lesion_model_workspace_size(const float *model, size_t count, int height, int width) {
    network net;
    size_t bytes;
    return check(model, count, height, width, &net, &bytes) ? 0 : bytes;
}

int lesion_model_segment(const float *model, size_t count, const uint8_t *rgb, int height, int width,
                         uint8_t *mask, void *workspace) {
    network net;
    size_t bytes;
    level maps[LEVELS];
    int error = check(model, count, height, width, &net, &bytes);
    if (error) return error;
    if (!rgb || !mask || !workspace) return LESION_NULL;
    place_maps(&net, height, width, workspace, maps);

    const int *down = net.down, *up = net.up, bottom = net.levels - 1, stem = net.stem;
    const float *w = net.weights;
    if (stem == 1) read_image(rgb, maps[0].in, 1, net.mean, net.scale);
    if (stem == 2) read_image(rgb, maps[0].in, 2, net.mean, net.scale);
    if (stem == 4) read_image(rgb, maps[0].in, 4, net.mean, net.scale);
    for (int l = 0; l <= bottom; l++) {
        const level *m = maps + l;
        if (l) pool(maps[l - 1].cat, down[l - 1], m->in);
        w = convolve_3x3(m->in, l ? down[l - 1] : 3 * stem * stem, m->mid, down[l], w);
        w = convolve_3x3(m->mid, down[l], l < bottom ? m->cat : m->in, down[l], w);
    }
    for (int l = bottom - 1; l >= 0; l--) {
        const level *m = maps + l;
        w = upsample(maps[l + 1].in, up[l + 1], maps[l + 1].mid, m->cat, down[l], w);
        w = convolve_3x3(m->cat, down[l] + up[l + 1], m->mid, up[l], w);
        w = convolve_3x3(m->mid, up[l], m->in, up[l], w);
    }
    if (stem == 1) write_mask(maps[0].in, up[0], maps[0].mid, mask, 1, w);
    if (stem == 2) write_mask(maps[0].in, up[0], maps[0].mid, mask, 2, w);
    if (stem == 4) write_mask(maps[0].in, up[0], maps[0].mid, mask, 4, w);
    return LESION_OK;
}

#ifndef LESION_NO_STUDENT
size_t lesion_workspace_size(int height, int width) {
    return lesion_model_workspace_size(lesion_student, lesion_student_count, height, width);
}

int lesion_segment(const uint8_t *rgb, int height, int width, uint8_t *mask, void *workspace) {
    return lesion_model_segment(lesion_student, lesion_student_count, rgb, height, width, mask, workspace);
}
#endif
