/* Makes what lesion_segment_image does before the network visible: the prepared square, 4 bytes a pixel. */
#include <stdlib.h>
#include "segment.c"

void prepare_square(const void *model, size_t size, const uint8_t *pixels, int width, int height, int format,
                    uint32_t *square) {
    static const int sizes[] = {1, 3, 3, 4, 4};
    network net;
    read_model(model, size, &net);
    float *space = malloc((size_t)make_plan(&net, width, height, 0).used * sizeof(float));
    const plan p = make_plan(&net, width, height, space);
    const image picture = {pixels, (ptrdiff_t)width * sizes[format], format, 0, 0, 0};
    prepare(&p, &picture, width, height, net.pixels);
    __builtin_memcpy(square, p.square, (size_t)(net.pixels * net.pixels) * sizeof *square);
    free(space);
}
