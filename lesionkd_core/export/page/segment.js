// The student on this device: prepare as in training (Pillow's resampling, to the bit), run, bring back, draw.

const settings = JSON.parse(document.getElementById("model-settings").textContent);
const $ = (id) => document.getElementById(id);
const LARGEST = 40e6;  // pixels: what a phone's browser decodes without running out of memory
const STRIP = 256;  // rows of the photo in memory at a time; iOS takes no canvas over 16 megapixels
const SHOWN = 1024;  // longest side of the picture on the screen
const CONTOUR = [238, 119, 51];
let network = null;
let turn = 0;  // a photo chosen later wins over a slow one before it
let current = null;  // { name, width, height, photo (canvas), probability (S x S) }

// --- Pillow's resampling: weights of every output pixel over the input pixels that it covers

function weights(from, to, kind, whole) {
  const scale = from / to, wide = Math.max(scale, 1), support = (kind === "box" ? 0.5 : 1) * wide;
  return Array.from({ length: to }, (_, i) => {
    const centre = (i + 0.5) * scale;
    const first = Math.max(Math.trunc(centre - support + 0.5), 0), end = Math.min(Math.trunc(centre + support + 0.5), from);
    const w = [];
    let sum = 0;
    for (let x = first; x < end; x++) {
      const at = (x - centre + 0.5) * (1 / wide);
      const value = kind === "box" ? (at > -0.5 && at <= 0.5 ? 1 : 0) : Math.max(1 - Math.abs(at), 0);
      w.push(value);
      sum += value;
    }
    return { first, w: w.map((v) => (whole ? Math.trunc(0.5 + (v / sum) * 4194304) : v / sum)) };  // bytes: 22 bits, as Pillow
  });
}

const toByte = (sum) => Math.min(255, Math.max(0, Math.floor((sum + 2097152) / 4194304)));

function resampleRows(source, height, channels, stride, table, target, whole) {  // along a row: (height, from, stride) -> (height, to, channels)
  let out = 0;
  for (let y = 0; y < height; y++) {
    const row = y * stride.row;
    for (const { first, w } of table) {
      for (let c = 0; c < channels; c++) {
        let sum = 0;
        for (let k = 0, at = row + first * stride.pixel + c; k < w.length; k++, at += stride.pixel) sum += source[at] * w[k];
        target[out++] = whole ? toByte(sum) : sum;
      }
    }
  }
}

function resampleColumns(source, width, channels, table, target, whole) {  // (from, width, channels) -> (to, width, channels)
  const row = width * channels;
  table.forEach(({ first, w }, y) => {
    for (let i = 0; i < row; i++) {
      let sum = 0;
      for (let k = 0; k < w.length; k++) sum += source[(first + k) * row + i] * w[k];
      target[y * row + i] = whole ? toByte(sum) : sum;
    }
  });
}

function addRows(data, top, rows, width, table, sums) {  // adds a strip of the photo to the output rows that it covers
  table.forEach(({ first, w }, y) => {
    for (let k = Math.max(first, top); k < Math.min(first + w.length, top + rows); k++) {
      const weight = w[k - first];
      for (let x = 0, from = (k - top) * width * 4, to = y * width * 3; x < width; x++, from += 4, to += 3) {
        for (let c = 0; c < 3; c++) sums[to + c] += weight * data[from + c];
      }
    }
  });
}

// --- from a photo to the network's square, and back

const halfToEven = (x) => (x % 1 === 0.5 && Math.floor(x) % 2 === 0 ? Math.floor(x) : Math.round(x));  // Python's round

function box(width, height) {  // position and size of the photo in the square
  const size = settings.pixels;
  let across = size / width, down = size / height;
  if (settings.fit === "pad") across = down = Math.min(across, down);
  const inner = { width: Math.max(1, halfToEven(width * across)), height: Math.max(1, halfToEven(height * down)) };
  return { ...inner, left: Math.floor((size - inner.width) / 2), top: Math.floor((size - inner.height) / 2), shrinks: Math.max(across, down) <= 1 };
}

function readRows(source, width, height, take) {  // RGBA strips of the photo at its own size
  const strip = document.createElement("canvas");
  strip.width = width;
  strip.height = Math.min(STRIP, height);
  const context = strip.getContext("2d", { willReadFrequently: true });
  for (let y = 0; y < height; y += STRIP) {
    const rows = Math.min(STRIP, height - y);
    context.clearRect(0, 0, width, rows);
    context.drawImage(source, 0, y, width, rows, 0, 0, width, rows);
    take(context.getImageData(0, 0, width, rows).data, y, rows);
  }
}

function prepare(source, width, height) {  // -> (S, S, 3) bytes, equal to lesionkd_core's prepare_image
  const size = settings.pixels, where = box(width, height), kind = where.shrinks ? "box" : "bilinear";
  const across = weights(width, where.width, kind, true), down = weights(height, where.height, kind, true);
  const inner = new Uint8ClampedArray(where.height * where.width * 3);
  const columnsFirst = height > where.height && height - where.height > 2 * (width - where.width);  // as Pillow 13 decides
  if (columnsFirst) {
    const sums = new Float64Array(where.height * width * 3);
    readRows(source, width, height, (data, y, rows) => {
      addRows(data, y, rows, width, down, sums);
    });
    resampleRows(Uint8ClampedArray.from(sums, toByte), where.height, 3, { row: width * 3, pixel: 3 }, across, inner, true);
  } else {
    const narrow = new Uint8ClampedArray(height * where.width * 3);
    readRows(source, width, height, (data, y, rows) => {
      resampleRows(data, rows, 3, { row: width * 4, pixel: 4 }, across, narrow.subarray(y * where.width * 3), true);
    });
    resampleColumns(narrow, where.width, 3, down, inner, true);
  }
  const square = new Uint8Array(size * size * 3);
  for (let y = 0; y < where.height; y++) {
    square.set(inner.subarray(y * where.width * 3, (y + 1) * where.width * 3), ((y + where.top) * size + where.left) * 3);
  }
  return square;
}

function restore(probability, photo, width, height) {  // bytes (S, S) -> Float32 0..255 (height, width), padding cut away
  const size = settings.pixels, where = box(photo.width, photo.height);
  const wide = new Float32Array(where.height * width), out = new Float32Array(height * width);
  const from = probability.subarray(where.top * size + where.left);
  resampleRows(from, where.height, 1, { row: size, pixel: 1 }, weights(where.width, width, "bilinear", false), wide, false);
  resampleColumns(wide, width, 1, weights(where.height, height, "bilinear", false), out, false);
  return out;
}

// --- the page

function say(text) {
  $("result").textContent = text;
}

function fail(text) {
  $("problem").textContent = text;
  $("problem").hidden = !text;
}

async function unpack(id) {
  const packed = Uint8Array.from(atob($(id).textContent), (c) => c.charCodeAt(0));
  $(id).remove();
  return new Uint8Array(await new Response(new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"))).arrayBuffer());
}

const tooOld = "this browser is too old; the page needs Chrome or Edge 105, Firefox 121, Safari 16.4 or newer";
async function start() {
  if (!("DecompressionStream" in window) || !("WebAssembly" in window)) throw new Error(tooOld);
  const parts = {};
  for (const id of ["relaxed", "simd", "student", "golden", "mask"]) parts[id] = await unpack(id);
  const builds = ["relaxed", "simd"].filter((id) => WebAssembly.validate(parts[id]));
  if (!builds.length) throw new Error(tooOld);
  let largest = 0;
  for (const build of builds) {
    network = await load(parts[build], parts.student);
    const found = network(parts.golden, settings.golden, settings.golden);
    largest = found.reduce((most, value, i) => Math.max(most, Math.abs(value - parts.mask[i])), 0);
    document.body.dataset.build = build;
    if (largest <= 1) break;
  }
  if (largest > 1) {
    throw new Error(`on its test image this device computes another mask than the network that was trained (largest difference ${largest} of 255). Its results would be wrong`);
  }
  segment(new Uint8Array(settings.pixels ** 2 * 3));  // the first run is slower
  for (const id of ["camera", "choose"]) $(id).disabled = false;
  say("Ready. Take a photo or choose one.");
  document.body.dataset.state = "ready";
}

function segment(square) {
  const begun = performance.now();
  const probability = network(square, settings.pixels, settings.pixels);
  return { probability, milliseconds: performance.now() - begun };
}

async function sizeOf(file) {  // without decoding the pixels yet
  const photo = new Image();
  photo.src = URL.createObjectURL(file);
  try {
    await new Promise((resolve, reject) => { photo.onload = resolve; photo.onerror = reject; });
  } catch {
    throw new Error(`${file.name} is not a picture that this browser can read. Choose a JPEG or PNG photo.`);
  } finally {
    URL.revokeObjectURL(photo.src);
  }
  return [photo.naturalWidth, photo.naturalHeight];
}

async function refuse(file) {  // what the browser would read otherwise than lesionkd_core, or not at all
  const cure = "Choose a JPEG photo or an 8-bit PNG.";
  if (file.type && (!file.type.startsWith("image/") || file.type === "image/svg+xml")) {
    throw new Error(`${file.name} is not a photo (${file.type}). ${cure}`);
  }
  const start = new Uint8Array(await file.slice(0, 25).arrayBuffer());
  if (start[0] === 0x89 && start[1] === 0x50 && start[24] === 16) {  // PNG: bits of a channel
    throw new Error(`${file.name} has 16 bits for each channel, which a browser shortens to 8. ${cure}`);
  }
}

async function decode(file) {  // rotated by its Exif orientation, without colour management: as Pillow reads it
  const [width, height] = await sizeOf(file);
  if (width * height > LARGEST) {
    throw new Error(`${file.name} has ${Math.round(width * height / 1e6)} megapixels; this page takes up to ${LARGEST / 1e6}. Choose a smaller photo or make it smaller first.`);
  }
  if (width < 2 || height < 2) throw new Error(`${file.name} has ${width} x ${height} px: nothing to segment. Choose a larger picture.`);
  try {
    const photo = await createImageBitmap(file, { colorSpaceConversion: "none", imageOrientation: "from-image" });
    return { photo, width, height };
  } catch {
    throw new Error(`${file.name} is damaged: this browser cannot decode it. Choose another file, or open and save it in an image program first.`);
  }
}

async function open(file) {
  if (!file) return;
  const mine = ++turn;
  fail("");
  document.body.dataset.state = "busy";
  say(`Segmenting ${file.name} …`);
  try {
    await refuse(file);
    const { photo, width, height } = await decode(file);
    const { probability, milliseconds } = segment(prepare(photo, width, height));
    if (mine !== turn) return;
    const scale = Math.min(1, SHOWN / Math.max(width, height)), shown = document.createElement("canvas");
    shown.width = Math.max(1, Math.round(width * scale));
    shown.height = Math.max(1, Math.round(height * scale));
    shown.getContext("2d").drawImage(photo, 0, 0, shown.width, shown.height);
    const restored = restore(probability, { width, height }, shown.width, shown.height);
    current = { name: file.name, width, height, shown, probability, milliseconds, restored };
    $("save").disabled = false;
    draw();
  } catch (error) {
    if (mine !== turn) return;
    fail(error.message);
    say(current ? `Still showing ${current.name}.` : "No photo yet.");
  }
  document.body.dataset.state = "ready";
}

const limit = () => 255 * $("threshold").value / 100;

function draw() {
  $("threshold-value").textContent = `${$("threshold").value} %`;
  if (!current) return;
  const { shown, restored, milliseconds } = current, { width, height } = shown, canvas = $("view");
  canvas.width = width;
  canvas.height = height;
  const context = canvas.getContext("2d");
  context.drawImage(shown, 0, 0);
  const kind = document.querySelector("[name=shown]:checked").value, over = limit();
  const share = restored.reduce((sum, p) => sum + (p > over), 0) / restored.length;
  if (kind !== "photo") {
    const picture = context.getImageData(0, 0, width, height);
    (kind === "contour" ? drawContour : drawProbability)(picture.data, restored, width, height, over);
    context.putImageData(picture, 0, 0);
  }
  const text = share ? `Lesion on ${(100 * share).toFixed(1)} % of the picture` : "No lesion found at this threshold";
  canvas.setAttribute("aria-label", `${current.name}: ${text}, shown as ${kind}`);
  say(`${text} · ${milliseconds.toFixed(0)} ms on this device`);
}

function drawProbability(data, restored) {
  restored.forEach((p, i) => {
    const strength = 0.65 * p / 255;
    for (let c = 0; c < 3; c++) data[4 * i + c] += strength * (CONTOUR[c] - data[4 * i + c]);
  });
}

function drawContour(data, restored, width, height, over) {
  const reach = Math.max(1, Math.round(Math.max(width, height) * 0.003)), inside = (x, y) => x >= 0 && y >= 0 && x < width && y < height && restored[y * width + x] > over;
  const paint = (x0, y0, by, colour) => {
    for (let y = Math.max(y0 - by, 0); y <= Math.min(y0 + by, height - 1); y++) {
      for (let x = Math.max(x0 - by, 0); x <= Math.min(x0 + by, width - 1); x++) data.set(colour, 4 * (y * width + x));
    }
  };
  const edge = [];
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      if (inside(x, y) && !(inside(x - 1, y) && inside(x + 1, y) && inside(x, y - 1) && inside(x, y + 1))) edge.push([x, y]);
    }
  }
  edge.forEach(([x, y]) => paint(x, y, 2 * reach, [0, 0, 0]));  // dark around bright, so that it is seen on any skin
  edge.forEach(([x, y]) => paint(x, y, reach, CONTOUR));
}

async function save() {
  try {
    await writeMask();
  } catch {
    fail(`The mask of ${current.width} x ${current.height} px is too large for this browser. Choose a smaller photo.`);
  }
}

async function writeMask() {
  const { width, height, probability, name } = current, over = limit();
  const canvas = document.createElement("canvas");
  canvas.width = width;
  canvas.height = height;
  const mask = restore(probability, current, width, height), picture = new ImageData(width, height), pixels = new Uint32Array(picture.data.buffer);
  mask.forEach((p, i) => { pixels[i] = p > over ? 0xffffffff : 0xff000000; });  // white, black; opaque
  canvas.getContext("2d").putImageData(picture, 0, 0);
  const blob = await new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
  if (!blob) throw new Error("no canvas of this size");
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = `${name.replace(/\.[^.]*$/, "")}_mask.png`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
}

$("threshold").value = Math.round(100 * settings.threshold);
$("threshold").addEventListener("input", () => {
  $("result").setAttribute("aria-busy", "true");  // a screen reader hears the last value only
  draw();
});
$("threshold").addEventListener("change", () => $("result").removeAttribute("aria-busy"));
document.querySelectorAll("[name=shown]").forEach((choice) => choice.addEventListener("change", draw));
for (const id of ["camera", "choose"]) {
  $(id).addEventListener("change", async (event) => {
    await open(event.target.files[0]);
    event.target.value = "";  // so that the same photo can be chosen again
  });
}
$("save").addEventListener("click", save);
draw();
start().catch((error) => {
  say("The network was not started.");
  fail(`The network could not be started: ${error.message ?? error}. Open the page in a current browser.`);
  document.body.dataset.state = "failed";
});
