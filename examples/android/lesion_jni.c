/* The native side of Lesion.java. It keeps nothing: the buffers belong to the Java object. */
#include <jni.h>
#include <stdlib.h>

#include "golden.h"
#include "segment.h"

JNIEXPORT jint JNICALL Java_org_example_Lesion_workspaceSize(JNIEnv *env, jclass self, jint width, jint height) {
    (void)env, (void)self;
    return (jint)lesion_image_workspace_size(width, height); /* 0: the size is not allowed */
}

JNIEXPORT jstring JNICALL Java_org_example_Lesion_segment(JNIEnv *env, jclass self, jobject pixels, jint width,
                                                           jint height, jint stride, jint format, jobject mask,
                                                           jobject workspace) {
    (void)self;
    static const int sizes[] = {1, 3, 3, 4, 4};
    const int order = format & ~LESION_BINARY, known = order >= LESION_GRAY && order <= LESION_BGRA;
    const jlong row = known ? (jlong)width * sizes[order] : 0, step = stride ? stride : row;
    if (!pixels || !mask || !workspace) return (*env)->NewStringUTF(env, "a buffer is null");
    const uint8_t *from = (*env)->GetDirectBufferAddress(env, pixels);
    uint8_t *to = (*env)->GetDirectBufferAddress(env, mask);
    void *space = (*env)->GetDirectBufferAddress(env, workspace);
    if (!from || !to || !space) return (*env)->NewStringUTF(env, "a buffer is not direct");
    if (stride < 0 || (*env)->GetDirectBufferCapacity(env, pixels) < step * (height - 1) + row)
        return (*env)->NewStringUTF(env, "the buffer has fewer pixels than width, height and stride say");
    const int error = lesion_segment_image(from, width, height, stride, format, to, 0, space);
    return error ? (*env)->NewStringUTF(env, lesion_error_string(error)) : NULL;
}

JNIEXPORT jint JNICALL Java_org_example_Lesion_goldenDifference(JNIEnv *env, jclass self) {
    (void)env, (void)self;
    void *workspace = malloc(lesion_image_workspace_size(golden_width, golden_height));
    uint8_t *mask = malloc(golden_width * golden_height);
    int largest = 256;
    if (workspace && mask &&
        !lesion_segment_image(golden_rgb, golden_width, golden_height, 0, LESION_RGB, mask, 0, workspace)) {
        largest = 0;
        for (int i = 0; i < golden_width * golden_height; i++)
            if (abs(mask[i] - golden_mask[i]) > largest) largest = abs(mask[i] - golden_mask[i]);
    }
    free(workspace);
    free(mask);
    return largest;
}
