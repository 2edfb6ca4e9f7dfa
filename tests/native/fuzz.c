/* Segments random images of random sizes with random models, all memory of exactly the size that the
   library asks for, and once more with another content of the workspace: the mask must be the same.
   Arguments: number of trials, then width, stem and number of floats of every model. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "segment.h"

static uint32_t state = 1;
static uint32_t draw(uint32_t below) {
    state = state * 1664525u + 1013904223u;
    return (state >> 8) % below;
}

int main(int argc, char **argv) {
    int trials = atoi(argv[1]), models = (argc - 2) / 3;
    for (int t = 0; t < trials; t++) {
        char **about = argv + 2 + 3 * draw(models);
        size_t count = (size_t)atol(about[2]);
        int height = 32 * (1 + draw(3)), width = 32 * (1 + draw(3));
        float *model = malloc(count * sizeof(float));
        for (size_t i = 0; i < count; i++) model[i] = (float)draw(2001) / 5000 - 0.2f;
        model[0] = 1, model[1] = (float)atoi(about[0]), model[2] = (float)atoi(about[1]), model[3] = (float)(count - 10);
        size_t pixels = (size_t)height * width, size = lesion_model_workspace_size(model, count, height, width);
        uint8_t *rgb = malloc(3 * pixels), *mask = malloc(pixels), *again = malloc(pixels), *space = malloc(size);
        for (size_t i = 0; i < 3 * pixels; i++) rgb[i] = (uint8_t)draw(256);
        memset(space, 0xFF, size); /* NaN */
        int error = lesion_model_segment(model, count, rgb, height, width, mask, space);
        memset(space, 0, size);
        error |= lesion_model_segment(model, count, rgb, height, width, again, space);
        if (error || memcmp(mask, again, pixels)) {
            printf("%d x %d, width %s, stem %s: code %d or another mask\n", height, width, about[0], about[1], error);
            return 1;
        }
        free(model), free(rgb), free(mask), free(again), free(space);
    }
    printf("%d trials\n", trials);
    return 0;
}
