package org.example;

import java.nio.ByteBuffer;

/**
 * The student in an app: direct buffers in, a direct buffer out, no copies.
 *
 * <p>The workspace is kept for the next picture of the same size. Use one object for each thread.
 * From Kotlin: {@code val mask = Lesion().segment(pixels, bitmap.width, bitmap.height, 0, Lesion.RGBA)}
 * after {@code bitmap.copyPixelsToBuffer(pixels)} with a bitmap in ARGB_8888, whose bytes are RGBA.
 */
public final class Lesion {
    /** Order of the bytes of a pixel; added to it, BINARY gives a mask of 0 and 255. */
    public static final int GRAY = 0, RGB = 1, BGR = 2, RGBA = 3, BGRA = 4, BINARY = 8;

    static {
        System.loadLibrary("lesion");
    }

    private ByteBuffer workspace, mask;
    private int width, height;

    /**
     * The mask of a picture: a byte for every pixel, valid until the next call.
     *
     * @param pixels direct buffer; the position does not matter
     * @param stride bytes from one row to the next; 0 without gaps
     * @throws IllegalArgumentException with the reason in words
     */
    public ByteBuffer segment(ByteBuffer pixels, int width, int height, int stride, int format) {
        if (workspace == null || width != this.width || height != this.height) {
            int size = workspaceSize(width, height);
            if (size == 0) throw new IllegalArgumentException("no picture has " + width + " x " + height + " pixels");
            ByteBuffer newMask = ByteBuffer.allocateDirect(width * height);
            workspace = ByteBuffer.allocateDirect(size); // after what may fail, so that all four agree
            mask = newMask;
            this.width = width;
            this.height = height;
        }
        String error = segment(pixels, width, height, stride, format, mask, workspace);
        if (error != null) throw new IllegalArgumentException(error);
        return mask;
    }

    /** The app's first test: the largest difference from PyTorch on the golden picture: 0 or 1, in bytes up to 10. */
    public static native int goldenDifference();

    private static native int workspaceSize(int width, int height);

    private static native String segment(
            ByteBuffer pixels, int width, int height, int stride, int format, ByteBuffer mask, ByteBuffer workspace);
}
