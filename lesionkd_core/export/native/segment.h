/* Lesion segmentation by a trained student: one C file, no dependencies, no allocation, no state. */
#ifndef LESION_SEGMENT_H
#define LESION_SEGMENT_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Return codes; lesion_error_string says them in words. After an error nothing was written. */
enum {
    LESION_OK = 0,
    LESION_NULL = 1,
    LESION_SIZE = 2,
    LESION_TOO_LARGE = 3,
    LESION_MODEL = 4,
    LESION_WEIGHTS = 5,
    LESION_DAMAGED = 6,
    LESION_FORMAT = 7
};
const char *lesion_error_string(int error);

/* Order of the bytes of a pixel. Alpha is ignored. Added to a format, LESION_BINARY asks for a mask of 0
   and 255 at the threshold of the model instead of probability x 255. */
enum { LESION_GRAY = 0, LESION_RGB = 1, LESION_BGR = 2, LESION_RGBA = 3, LESION_BGRA = 4, LESION_BINARY = 8 };

/* ---- The student that is compiled in (student.h) ---- */

/* From a picture to its mask: resized as in training, segmented, resized back.
   pixels: width x height pixels of `format`; their rows are `stride` bytes apart (0: without a gap;
   negative: the first row is the last one in memory). mask: a byte for every pixel, rows `mask_stride` bytes
   apart. workspace: lesion_image_workspace_size bytes; keep it for the next picture of this size. Calls with
   workspaces of their own may run in parallel. */
size_t lesion_image_workspace_size(int width, int height); /* 0 after an error */
int lesion_segment_image(const uint8_t *pixels, int width, int height, ptrdiff_t stride, int format,
                         uint8_t *mask, ptrdiff_t mask_stride, void *workspace);

/* The network alone, for pictures that are prepared already: height x width x 3 bytes RGB, both sides
   multiples of 32. mask: height x width bytes, probability x 255. */
size_t lesion_workspace_size(int height, int width); /* 0 after an error */
int lesion_segment(const uint8_t *rgb, int height, int width, uint8_t *mask, void *workspace);

/* ---- Any number of students: the same with a model, the array of a student.h or the bytes of a student.bin,
   aligned to 4 bytes ---- */

/* Whether a model is whole: format, number of weights, checksum, no weight that is NaN or infinite. The
   two functions for the workspace check too; the calls do not repeat it. */
int lesion_model_check(const void *model, size_t size);
enum { LESION_PIXELS = 2, LESION_THRESHOLD = 4 }; /* floats of a model: side that it was trained at; threshold */

size_t lesion_model_image_workspace_size(const void *model, size_t size, int width, int height);
int lesion_model_segment_image(const void *model, size_t size, const uint8_t *pixels, int width, int height,
                               ptrdiff_t stride, int format, uint8_t *mask, ptrdiff_t mask_stride,
                               void *workspace);
size_t lesion_model_workspace_size(const void *model, size_t size, int height, int width);
int lesion_model_segment(const void *model, size_t size, const uint8_t *rgb, int height, int width,
                         uint8_t *mask, void *workspace);

#ifdef __cplusplus
}
#endif
#endif
