"use strict";
// The C code of the student, compiled to WebAssembly, as functions of an image. All images are bytes.

const up = (value) => Math.ceil(value / 64) * 64;
const RGB = 1, RGBA = 3;  // segment.h

// code: one build of segment.c; model: header and weights.
async function load(code, model) {
  const { instance } = await WebAssembly.instantiate(code);
  const c = instance.exports, size = model.length, at = up(c.__heap_base.value), image = up(at + model.length);
  const reserve = (end) => {
    const missing = end - c.memory.buffer.byteLength;
    if (missing > 0) c.memory.grow(Math.ceil(missing / 65536));
    return new Uint8Array(c.memory.buffer);
  };
  reserve(image).set(model, at);
  const call = (bytes, write, width, height, sizeOf, run) => {
    const mask = up(image + bytes), space = up(mask + height * width);
    write(reserve(space + sizeOf()), image);
    const error = run(mask, space);
    if (error) throw new Error(`the network refuses the image (code ${error})`);
    return new Uint8Array(c.memory.buffer).slice(mask, mask + height * width);
  };
  return {
    // (height, width, 3), both sides multiples of 32 -> (height, width)
    prepared: (rgb, height, width) => call(rgb.length, (memory, to) => memory.set(rgb, to), width, height,
      () => c.lesion_model_workspace_size(at, size, height, width),
      (mask, space) => c.lesion_model_segment(at, size, image, height, width, mask, space)),
    // any size; `write` puts the pixels into the memory at a position -> (height, width)
    picture: (write, width, height, format) => call(width * height * (format === RGBA ? 4 : 3), write, width, height,
      () => c.lesion_model_image_workspace_size(at, size, width, height),
      (mask, space) => c.lesion_model_segment_image(at, size, image, width, height, 0, format, mask, 0, space)),
  };
}
