/* From a picture to its mask: ./segment_ppm photo.ppm mask.pgm [student.bin]
   Without arguments it compares the golden picture with PyTorch: "largest difference 0 of 255".

   Build it beside the files of the folder native:
       cc -O2 -march=native -I native segment_ppm.c native/segment.c -o segment_ppm
   student.bin replaces the student that is compiled in: a model can be updated without a new app. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "golden.h"
#include "segment.h"
#ifdef LESION_INT8
#include "student_int8.h"
enum { ALLOWED = 255 };
#else
#include "student.h"
enum { ALLOWED = 1 };
#endif

typedef struct {
    const void *model;
    size_t size;
} student;

static int fail(const char *what) {
    fprintf(stderr, "%s\n", what);
    return 1;
}

/* A mask of width x height bytes, or null. A real app keeps the workspace for its next picture. */
static uint8_t *segment(student s, const uint8_t *pixels, int width, int height, int format) {
    size_t size = lesion_model_image_workspace_size(s.model, s.size, width, height);
    void *workspace = size ? malloc(size) : NULL;
    uint8_t *mask = malloc((size_t)width * (size_t)height);
    int error = LESION_NULL;
    if (workspace && mask)
        error = lesion_model_segment_image(s.model, s.size, pixels, width, height, 0, format, mask, 0, workspace);
    free(workspace);
    if (!error) return mask;
    fail(lesion_error_string(size ? error : lesion_model_check(s.model, s.size)));
    free(mask);
    return NULL;
}

static int compare_golden(student s) {
    uint8_t *mask = segment(s, golden_rgb, golden_width, golden_height, LESION_RGB);
    const int pixels = golden_width * golden_height;
    int largest = mask ? 0 : 256, flipped = 0;
    for (int i = 0; mask && i < pixels; i++) {
        if (abs(mask[i] - golden_mask[i]) > largest) largest = abs(mask[i] - golden_mask[i]);
        flipped += (mask[i] > 127) != (golden_mask[i] > 127);
    }
    printf("largest difference %d of 255, %d of %d pixels change sides\n", largest, flipped, pixels);
    free(mask);
    return largest > ALLOWED || flipped > pixels / 100;
}

static void *read_file(const char *path, size_t *size) {
    FILE *file = fopen(path, "rb");
    if (!file) return NULL;
    fseek(file, 0, SEEK_END);
    const long end = ftell(file);
    rewind(file);
    void *content = end > 0 ? malloc((size_t)end + 1) : NULL;
    *size = content ? fread(content, 1, (size_t)end, file) : 0;
    if (content) ((char *)content)[*size] = 0; /* so that sscanf ends */
    fclose(file);
    return content;
}

/* The next number of a header; lines that begin with # are comments. -1: there is none. */
static int number(const char **at) {
    while (**at == ' ' || **at == '\n' || **at == '\r' || **at == '\t' || **at == '#') {
        if (**at == '#')
            while (**at && **at != '\n') ++*at;
        else
            ++*at;
    }
    int value = 0, read = 0;
    if (sscanf(*at, "%d%n", &value, &read) != 1) return -1;
    *at += read;
    return value;
}

int main(int argc, char **argv) {
    if (argc == 2 || argc > 4) return fail("use: segment_ppm [PICTURE.ppm MASK.pgm [student.bin]]");
    student s = {lesion_student, sizeof lesion_student};
    size_t size = 0;
    if (argc == 4) {
        s.model = read_file(argv[3], &s.size);
        if (!s.model) return fail("the file of the student cannot be read");
    }
    const int error = lesion_model_check(s.model, s.size);
    if (error) return fail(lesion_error_string(error));
    if (argc < 3) return compare_golden(s);

    char *picture = read_file(argv[1], &size);
    if (!picture || picture[0] != 'P') return fail("expected a binary PPM or PGM picture");
    const char kind = picture[1], *at = picture + 2;
    const int width = number(&at), height = number(&at), levels = number(&at);
    if (levels != 255) return fail("expected a binary PPM or PGM picture with 255 levels");
    const size_t start = (size_t)(at - picture);
    const size_t bytes = (size_t)width * (size_t)height * (kind == '6' ? 3 : 1);
    if ((kind != '5' && kind != '6') || width < 1 || height < 1 || size < start + 1 + bytes)
        return fail("the picture is of another kind, or cut off");
    const uint8_t *pixels = (const uint8_t *)picture + start + 1;
    uint8_t *mask = segment(s, pixels, width, height, kind == '6' ? LESION_RGB : LESION_GRAY);
    FILE *out = mask ? fopen(argv[2], "wb") : NULL;
    if (!out) return fail("no mask was written");
    fprintf(out, "P5\n%d %d\n255\n", width, height);
    fwrite(mask, 1, (size_t)width * (size_t)height, out);
    return fclose(out);
}
