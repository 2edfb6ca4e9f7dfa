/* Reads count, height and width as 32-bit integers and images from standard input; writes the masks. */
#include <stdio.h>
#include <stdlib.h>
#include "segment.h"

int main(void) {
    int32_t about[3];
    if (fread(about, sizeof about, 1, stdin) != 1) return 100;
    size_t pixels = (size_t)about[1] * about[2];
    uint8_t *rgb = malloc(3 * pixels), *mask = malloc(pixels);
    void *workspace = malloc(lesion_workspace_size(about[1], about[2]));
    for (int i = 0; i < about[0]; i++) {
        if (fread(rgb, 3, pixels, stdin) != pixels) return 101;
        int error = lesion_segment(rgb, about[1], about[2], mask, workspace);
        if (error) return error;
        fwrite(mask, 1, pixels, stdout);
    }
    return 0;
}
