"use strict";
// The C code of the student, compiled to WebAssembly, as a function of an image.

const up = (value) => Math.ceil(value / 64) * 64;

// code: one build of segment.c; model: header and weights. Returns (rgb, height, width) -> mask, bytes all.
async function load(code, model) {
  const { instance } = await WebAssembly.instantiate(code);
  const c = instance.exports, count = model.length / 4, at = up(c.__heap_base.value), image = up(at + model.length);
  const reserve = (end) => {
    const missing = end - c.memory.buffer.byteLength;
    if (missing > 0) c.memory.grow(Math.ceil(missing / 65536));
    return new Uint8Array(c.memory.buffer);
  };
  reserve(image).set(model, at);
  return (rgb, height, width) => {
    const mask = up(image + rgb.length), space = up(mask + height * width);
    const memory = reserve(space + c.lesion_model_workspace_size(at, count, height, width));
    memory.set(rgb, image);
    const error = c.lesion_model_segment(at, count, image, height, width, mask, space);
    if (error) throw new Error(`the network refuses the image (code ${error})`);
    return memory.slice(mask, mask + height * width);
  };
}
