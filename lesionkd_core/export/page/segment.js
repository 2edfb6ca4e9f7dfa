// The student on this device: decode a photo, segment it by the C code, draw the mask, save it.

const settings = JSON.parse(document.getElementById("model-settings").textContent);
const $ = (id) => document.getElementById(id);
const LARGEST = 40e6;  // pixels: what a phone's browser decodes without running out of memory
const STRIP = 256;  // rows of the photo in memory at a time; iOS takes no canvas over 16 megapixels
const SHOWN = 1024;  // longest side of the picture on the screen
const CONTOUR = [238, 119, 51];
let network = null;
let turn = 0;  // a photo chosen later wins over a slow one before it
let current = null;  // { name, width, height, mask, milliseconds, shown (canvas), restored (the mask at its size) }

function readRows(source, width, height, take) {  // RGBA strips of the photo at its own size
  const strip = document.createElement("canvas");
  strip.width = width;
  strip.height = Math.min(STRIP, height);
  const context = strip.getContext("2d", { willReadFrequently: true });
  for (let y = 0; y < height; y += STRIP) {
    const rows = Math.min(STRIP, height - y);
    context.clearRect(0, 0, width, rows);
    context.drawImage(source, 0, y, width, rows, 0, 0, width, rows);
    take(context.getImageData(0, 0, width, rows).data, y);
  }
}

function segment(source, width, height) {  // a photo -> its mask (height, width): probability x 255
  let begun = 0;
  const write = (memory, to) => {
    readRows(source, width, height, (rows, y) => memory.set(rows, to + y * width * 4));
    begun = performance.now();
  };
  const mask = network.picture(write, width, height, RGBA);
  return { mask, milliseconds: performance.now() - begun };
}

function sampled(mask, from, to) {  // the mask at the size on the screen: the pixels in the middle of each step
  const shown = new Uint8Array(to.width * to.height), across = from.width / to.width, down = from.height / to.height;
  for (let y = 0, out = 0; y < to.height; y++) {
    const row = Math.floor((y + 0.5) * down) * from.width;
    for (let x = 0; x < to.width; x++) shown[out++] = mask[row + Math.floor((x + 0.5) * across)];
  }
  return shown;
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
    const found = network.picture((memory, to) => memory.set(parts.golden, to), ...settings.golden, RGB);
    largest = found.reduce((most, value, i) => Math.max(most, Math.abs(value - parts.mask[i])), 0);
    document.body.dataset.build = build;
    if (largest <= 1) break;
  }
  if (largest > 1) {
    throw new Error(`on its test image this device computes another mask than the network that was trained (largest difference ${largest} of 255). Its results would be wrong`);
  }
  for (const id of ["camera", "choose"]) $(id).disabled = false;
  say("Ready. Take a photo or choose one.");
  document.body.dataset.state = "ready";
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
    const { mask, milliseconds } = segment(photo, width, height);
    if (mine !== turn) return;
    const scale = Math.min(1, SHOWN / Math.max(width, height)), shown = document.createElement("canvas");
    shown.width = Math.max(1, Math.round(width * scale));
    shown.height = Math.max(1, Math.round(height * scale));
    shown.getContext("2d").drawImage(photo, 0, 0, shown.width, shown.height);
    const restored = sampled(mask, { width, height }, shown);
    current = { name: file.name, width, height, mask, milliseconds, shown, restored };
    $("save").disabled = false;
    draw();
  } catch (error) {
    if (mine !== turn) return;
    fail(error instanceof RangeError ? `${file.name} is too large for this browser. Choose a smaller photo.` : error.message);
    say(current ? `Still showing ${current.name}.` : "No photo yet.");
  }
  document.body.dataset.state = "ready";
}

const limit = () => 255 * $("threshold").value / 100;

function draw() {
  $("threshold-value").textContent = `${$("threshold").value} %`;
  if (!current) return;
  const { mask, shown, restored, milliseconds } = current, { width, height } = shown, canvas = $("view");
  canvas.width = width;
  canvas.height = height;
  const context = canvas.getContext("2d");
  context.drawImage(shown, 0, 0);
  const kind = document.querySelector("[name=shown]:checked").value, over = limit();
  const share = mask.reduce((sum, p) => sum + (p > over), 0) / mask.length;
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
  const { width, height, mask, name } = current, over = limit();
  const canvas = document.createElement("canvas");
  canvas.width = width;
  canvas.height = height;
  const picture = new ImageData(width, height), pixels = new Uint32Array(picture.data.buffer);
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
