import CoreVideo
import Foundation

/// What `lesion_error_string` says.
struct LesionError: Error, CustomStringConvertible {
    let description: String

    init(_ code: Int32) {
        description = String(cString: lesion_error_string(code))
    }
}

/// The student in an app. The workspace is kept for the next picture of the same size; use one object
/// for each thread.
final class Lesion {
    private var workspace: UnsafeMutableRawPointer?
    private var size = (width: 0, height: 0)

    deinit { workspace?.deallocate() }

    /// Probability of lesion x 255 for every pixel; with `LESION_BINARY` added to the format, 0 and 255.
    func segment(
        pixels: UnsafeRawPointer, width: Int, height: Int, stride: Int = 0, format: Int = Int(LESION_RGBA)
    ) throws -> [UInt8] {
        if workspace == nil || size != (width, height) {
            let bytes = lesion_image_workspace_size(Int32(width), Int32(height))
            guard bytes > 0 else { throw LesionError(Int32(LESION_SIZE)) }
            workspace?.deallocate()
            workspace = .allocate(byteCount: bytes, alignment: 64)
            size = (width, height)
        }
        var mask = [UInt8](repeating: 0, count: width * height)
        let code = lesion_segment_image(
            pixels.assumingMemoryBound(to: UInt8.self), Int32(width), Int32(height), stride, Int32(format),
            &mask, 0, workspace)
        guard code == 0 else { throw LesionError(code) }
        return mask
    }

    /// A camera frame in kCVPixelFormatType_32BGRA.
    func segment(frame: CVPixelBuffer) throws -> [UInt8] {
        CVPixelBufferLockBaseAddress(frame, .readOnly)
        defer { CVPixelBufferUnlockBaseAddress(frame, .readOnly) }
        guard let pixels = CVPixelBufferGetBaseAddress(frame) else { throw LesionError(Int32(LESION_NULL)) }
        return try segment(
            pixels: pixels, width: CVPixelBufferGetWidth(frame), height: CVPixelBufferGetHeight(frame),
            stride: CVPixelBufferGetBytesPerRow(frame), format: Int(LESION_BGRA))
    }

    /// The app's first test: the largest difference from PyTorch on the golden picture: 0 or 1, in bytes up to 10.
    static func goldenDifference() throws -> Int {
        let width = Int(golden_width), height = Int(golden_height)
        let expected = UnsafeBufferPointer(start: golden_mask, count: width * height)
        let mask = try Lesion().segment(
            pixels: golden_rgb, width: width, height: height, format: Int(LESION_RGB))
        return zip(mask, expected).map { abs(Int($0) - Int($1)) }.max() ?? 256
    }
}
