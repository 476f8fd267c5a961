// The region: a mask of the picture's pixels on a canvas above it, drawn with a box, a brush or an eraser.

const INSIDE = [230, 40, 40, 45];
const EDGE = [230, 40, 40, 150];

export class Region {
  // `changed` is called after every change, with the number of pixels and the box around them (or null).
  constructor(canvas, changed) {
    this.canvas = canvas;
    this.changed = changed;
    this.tool = "box";
    this.radius = 4;
    this.start = null;
    canvas.addEventListener("pointerdown", (event) => this.#down(event));
    canvas.addEventListener("pointermove", (event) => this.#move(event));
    for (const end of ["pointerup", "pointercancel"]) canvas.addEventListener(end, () => { this.start = null; });
  }

  // An empty region of this size; the same region where the size is the same.
  resize(width, height) {
    if (this.canvas.width === width && this.canvas.height === height && this.mask) return;
    this.canvas.width = width;
    this.canvas.height = height;
    this.clear();
  }

  clear() {
    this.mask = new Uint8Array(this.canvas.width * this.canvas.height);
    this.#show();
  }

  // The pixels x0 <= x < x1, y0 <= y < y1, and no others.
  setBox(x0, y0, x1, y1) {
    const { width, height } = this.canvas;
    this.mask.fill(0);
    for (let y = Math.max(0, y0); y < Math.min(height, y1); y++) {
      this.mask.fill(1, y * width + Math.max(0, x0), y * width + Math.min(width, x1));
    }
    this.#show();
  }

  // Lengths of runs in raster order, outside and inside in turn.
  runs() {
    const lengths = [];
    let inside = 0;
    let length = 0;
    for (const value of this.mask) {
      if (value !== inside) {
        lengths.push(length);
        inside = value;
        length = 0;
      }
      length += 1;
    }
    lengths.push(length);
    return lengths;
  }

  #at(event) {
    const place = this.canvas.getBoundingClientRect();
    const limit = (value, size) => Math.min(size - 1, Math.max(0, Math.floor(value * size)));
    return {
      x: limit((event.clientX - place.left) / place.width, this.canvas.width),
      y: limit((event.clientY - place.top) / place.height, this.canvas.height),
    };
  }

  #down(event) {
    event.preventDefault();
    this.canvas.setPointerCapture(event.pointerId);
    this.start = this.#at(event);
    this.last = this.start;
    this.#move(event);
  }

  #move(event) {
    if (!this.start) return;
    const to = this.#at(event);
    if (this.tool === "box") {
      const { x, y } = this.start;
      this.setBox(Math.min(x, to.x), Math.min(y, to.y), Math.max(x, to.x) + 1, Math.max(y, to.y) + 1);
      return;
    }
    const steps = Math.max(1, Math.abs(to.x - this.last.x), Math.abs(to.y - this.last.y));
    for (let i = 0; i <= steps; i++) {
      this.#dot(this.last.x + ((to.x - this.last.x) * i) / steps, this.last.y + ((to.y - this.last.y) * i) / steps);
    }
    this.last = to;
    this.#show();
  }

  #dot(cx, cy) {
    const { width, height } = this.canvas;
    const r = this.radius / 2;
    const value = this.tool === "brush" ? 1 : 0;
    for (let y = Math.max(0, Math.ceil(cy - r)); y <= Math.min(height - 1, cy + r); y++) {
      for (let x = Math.max(0, Math.ceil(cx - r)); x <= Math.min(width - 1, cx + r); x++) {
        if ((x - cx) ** 2 + (y - cy) ** 2 <= r * r + 0.01) this.mask[y * width + x] = value;
      }
    }
  }

  #show() {
    const { width, height } = this.canvas;
    const context = this.canvas.getContext("2d");
    const image = context.createImageData(width, height);
    let pixels = 0;
    let [x0, y0, x1, y1] = [width, height, 0, 0];
    for (let i = 0; i < this.mask.length; i++) {
      if (!this.mask[i]) continue;
      const x = i % width;
      const y = (i - x) / width;
      const within = x > 0 && x < width - 1 && this.mask[i - 1] && this.mask[i + 1] && this.mask[i - width]
        && this.mask[i + width];
      image.data.set(within ? INSIDE : EDGE, 4 * i);
      pixels += 1;
      x0 = Math.min(x0, x);
      y0 = Math.min(y0, y);
      x1 = Math.max(x1, x + 1);
      y1 = Math.max(y1, y + 1);
    }
    context.putImageData(image, 0, 0);
    this.changed(pixels, pixels ? [x0, y0, x1, y1] : null);
  }
}
