/* Lesion segmentation by the trained student: one C file, no dependencies, no allocation. */
#ifndef LESION_SEGMENT_H
#define LESION_SEGMENT_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum {
    LESION_OK = 0,
    LESION_NULL = 1,      /* a pointer is null */
    LESION_SIZE = 2,      /* height or width is not a positive multiple of 32 */
    LESION_TOO_LARGE = 3, /* height or width exceeds 4096, or the workspace exceeds the address space */
    LESION_MODEL = 4,     /* the model is truncated or of another format */
    LESION_WEIGHTS = 5    /* the number of weights does not fit the architecture */
};

/* Bytes of workspace that lesion_segment needs; 0 if the size is not allowed. */
size_t lesion_workspace_size(int height, int width);

/* rgb: height x width x 3 bytes. mask: height x width bytes, probability of lesion x 255.
   workspace: aligned to 4 bytes, may be reused; calls with different workspaces may run in parallel.
   Returns LESION_OK, or an error code; then nothing is written. */
int lesion_segment(const uint8_t *rgb, int height, int width, uint8_t *mask, void *workspace);

/* The same with a model that the caller has loaded: `count` floats as in student.h. */
size_t lesion_model_workspace_size(const float *model, size_t count, int height, int width);
int lesion_model_segment(const float *model, size_t count, const uint8_t *rgb, int height, int width,
                         uint8_t *mask, void *workspace);

#ifdef __cplusplus
}
#endif
#endif
