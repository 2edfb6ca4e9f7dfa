/* Segments random pictures of random sizes with random models, all memory of exactly the size that the
   library asks for, and once more with another content of the workspace: the mask must be the same.
   Arguments: number of trials, then width and number of floats of every model. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "segment.h"

static uint32_t state = 1;
static uint32_t draw(uint32_t below) {
    state = state * 1664525u + 1013904223u;
    return (state >> 8) % below;
}

static float *random_model(float width, size_t count) {
    float *model = malloc(count * sizeof(float));
    uint32_t sum = 0, bits;
    for (size_t i = 0; i < count; i++) model[i] = (float)draw(2001) / 5000 - 0.2f;
#ifdef LESION_INT8
    model[0] = 3;
#else
    model[0] = 2;
#endif
    model[1] = width, model[2] = 32 * (float)(1 + draw(4)), model[3] = (float)draw(2);
    model[4] = 0.5f, model[5] = (float)(count - 13), model[6] = 0;
    for (size_t i = 0; i < count; i++) {
        memcpy(&bits, model + i, sizeof bits);
        if (i != 6) sum += bits * (2 * (uint32_t)i + 1);
    }
    model[6] = (float)(sum % 16777213);
    return model;
}

int main(int argc, char **argv) {
    const int trials = atoi(argv[1]), models = (argc - 2) / 2;
    for (int t = 0; t < trials; t++) {
        static const int sizes[] = {1, 3, 3, 4, 4};
        char **about = argv + 2 + 2 * draw((uint32_t)models);
        const size_t count = (size_t)atol(about[1]);
        float *model = random_model((float)atoi(about[0]), count);
        const int whole = t % 2, format = whole ? (int)draw(5) : LESION_RGB;
        const int height = whole ? 1 + (int)draw(150) : 32 * (1 + (int)draw(3));
        const int width = whole ? 1 + (int)draw(150) : 32 * (1 + (int)draw(3));
        const size_t pixels = (size_t)height * (size_t)width, bytes = pixels * (size_t)sizes[format];
        const size_t size = whole ? lesion_model_image_workspace_size(model, 4 * count, width, height)
                                  : lesion_model_workspace_size(model, 4 * count, height, width);
        uint8_t *picture = malloc(bytes), *masks[] = {malloc(pixels), malloc(pixels)}, *space = malloc(size);
        for (size_t i = 0; i < bytes; i++) picture[i] = (uint8_t)draw(256);
        int error = 0;
        for (int i = 0; i < 2; i++) {
            memset(space, i ? 0 : 0xFF, size); /* NaN */
            error |= whole ? lesion_model_segment_image(model, 4 * count, picture, width, height, 0, format, masks[i], 0, space)
                           : lesion_model_segment(model, 4 * count, picture, height, width, masks[i], space);
        }
        if (error || memcmp(masks[0], masks[1], pixels)) {
            printf("%d x %d, width %s: code %d or another mask\n", height, width, about[0], error);
            return 1;
        }
        free(model), free(picture), free(masks[0]), free(masks[1]), free(space);
    }
    printf("%d trials\n", trials);
    return 0;
}
