// The image of a MaskLab: shows it with its masked patches and lets the reader paint the mask.
//
// From Python: `image` (PNG bytes), `rows`, `columns` (of patches), `mode` ("drop", "replace").
// Both ways: `mask`, one byte per patch, 1 = masked. A stroke is drawn at once and sent at most once
// per frame. `data-drawn` counts drawings and `data-masked` patches, for tests.
const SIDE = 336; // CSS pixels of the longer side, at most
const GREY = "#d0d0d0"; // mmkit.plots.MASKED
const KEYS = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
const HELP = "Paint with the mouse; or with Tab, arrow keys and space.";

function render({ model, el }) {
  const rows = model.get("rows"), columns = model.get("columns"), density = devicePixelRatio;
  const cell = Math.max(2, Math.floor((SIDE * density) / Math.max(rows, columns)));
  const canvas = document.createElement("canvas"), hint = document.createElement("div");
  const pen = canvas.getContext("2d");
  Object.assign(canvas, { width: columns * cell, height: rows * cell, tabIndex: 0 });
  canvas.style.width = `${canvas.width / density}px`;
  canvas.setAttribute("role", "application");
  canvas.setAttribute("aria-label", `The image, ${rows} by ${columns} patches. ${HELP}`);
  canvas.setAttribute("data-lm-suppress-shortcuts", "true"); // JupyterLab's own use of these keys
  hint.style.width = canvas.style.width;
  hint.setAttribute("aria-live", "polite");
  hint.textContent = HELP;
  el.classList.add("mmkit-canvas");
  el.append(canvas, hint);

  let mask = new Uint8Array(rows * columns), image = null, drawn = 0, frame = 0;
  let cursor = [0, 0], showCursor = false; // the patch that the keyboard is on
  let stroke = null, last = null; // while dragging: mask (1) or unmask (0), and the last patch

  function drawMasked(x, y, page) {
    if (model.get("mode") === "replace") { // the mask token takes its position
      pen.fillStyle = GREY;
      pen.fillRect(x, y, cell, cell);
      pen.fillStyle = "#707070";
      pen.beginPath();
      pen.arc(x + cell / 2, y + cell / 2, cell / 10, 0, 7);
      pen.fill();
    } else { // removed: the background, lightly hatched
      pen.fillStyle = page;
      pen.fillRect(x, y, cell, cell);
      pen.beginPath();
      for (const fraction of [0.5, 1, 1.5]) { // diagonals that meet those of the next patch
        const from = Math.max(0, fraction - 1) * cell, to = Math.min(1, fraction) * cell;
        pen.moveTo(x + from, y + to);
        pen.lineTo(x + to, y + from);
      }
      pen.rect(x + 0.5, y + 0.5, cell - 1, cell - 1);
      pen.stroke();
    }
  }

  function draw() {
    if (!image) return; // a new one is being decoded
    const page = getComputedStyle(el).getPropertyValue("--jp-layout-color0").trim() || "#fff";
    pen.imageSmoothingEnabled = canvas.width < 2 * image.width; // large pixels stay sharp
    pen.imageSmoothingQuality = "high";
    pen.drawImage(image, 0, 0, canvas.width, canvas.height);
    pen.strokeStyle = "rgba(128, 128, 128, 0.35)";
    pen.lineWidth = 1;
    mask.forEach((masked, i) => {
      if (masked) drawMasked((i % columns) * cell, Math.floor(i / columns) * cell, page);
    });
    if (showCursor) {
      for (const [colour, width] of [["#fff", 7], ["#0072b2", 4]]) {
        pen.strokeStyle = colour;
        pen.lineWidth = width;
        pen.strokeRect(cursor[1] * cell + 3.5, cursor[0] * cell + 3.5, cell - 7, cell - 7);
      }
    }
    canvas.dataset.masked = mask.reduce((sum, masked) => sum + masked, 0);
    canvas.dataset.drawn = ++drawn;
  }

  function adopt() {
    const bytes = model.get("mask");
    mask = new Uint8Array(bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.byteLength));
    draw();
  }

  async function load() {
    const bytes = model.get("image");
    image = null;
    const loaded = await createImageBitmap(new Blob([bytes], { type: "image/png" }));
    if (bytes !== model.get("image")) return; // another one has arrived since
    image = loaded;
    draw();
  }

  function send() {
    frame = 0;
    model.set("mask", new DataView(mask.slice().buffer));
    model.save_changes();
  }

  function paint([row, column], masked) {
    mask[row * columns + column] = masked;
    if (!frame) frame = requestAnimationFrame(send);
  }

  function patchAt(event) {
    const box = canvas.getBoundingClientRect();
    const index = (fraction, count) => Math.min(count - 1, Math.max(0, Math.floor(fraction * count)));
    return [
      index((event.clientY - box.top) / box.height, rows),
      index((event.clientX - box.left) / box.width, columns),
    ];
  }

  function drag(event) { // all patches from the last one to this one, so that fast strokes have no gaps
    const to = patchAt(event), steps = Math.max(...to.map((x, i) => Math.abs(x - last[i])), 1);
    for (let step = 1; step <= steps; step++)
      paint(to.map((x, i) => Math.round(last[i] + ((x - last[i]) * step) / steps)), stroke);
    last = to;
    draw();
  }

  canvas.addEventListener("pointerdown", (event) => {
    if (event.button !== 0) return;
    canvas.setPointerCapture(event.pointerId);
    cursor = last = patchAt(event);
    stroke = 1 - mask[last[0] * columns + last[1]];
    showCursor = false;
    drag(event);
  });
  canvas.addEventListener("pointermove", (event) => { if (stroke !== null) drag(event); });
  for (const end of ["pointerup", "pointercancel"])
    canvas.addEventListener(end, () => { stroke = null; });

  canvas.addEventListener("keydown", (event) => {
    const move = KEYS[event.key];
    if (!move && event.key !== " " && event.key !== "Enter") return;
    event.preventDefault(); // the page must not scroll
    event.stopPropagation();
    if (move) {
      const inside = (x, count) => Math.min(count - 1, Math.max(0, x));
      cursor = [inside(cursor[0] + move[0], rows), inside(cursor[1] + move[1], columns)];
    } else paint(cursor, 1 - mask[cursor[0] * columns + cursor[1]]);
    const state = mask[cursor[0] * columns + cursor[1]] ? "masked" : "visible";
    hint.textContent = `Row ${cursor[0] + 1}, column ${cursor[1] + 1}: ${state}. Space changes it.`;
    showCursor = true;
    draw();
  });
  canvas.addEventListener("focus", () => { showCursor = canvas.matches(":focus-visible"); draw(); });
  canvas.addEventListener("blur", () => { showCursor = false; hint.textContent = HELP; draw(); });

  function arrive() { // the canvas is in the page, within the lab
    const before = el.closest(".jp-OutputArea-child")?.previousElementSibling, tail = model.get("still");
    if (tail && before?.querySelector("img")?.src.endsWith(tail)) before.style.display = "none";
    const lab = el.closest(".mmkit-lab");
    if (lab) arrived.observe(lab);
    for (const slider of lab?.querySelectorAll(".widget-slider") ?? []) // ipywidgets does not name them
      slider.querySelector(".noUi-handle")?.setAttribute("aria-label", slider.querySelector("label").textContent);
  }
  const arrived = new ResizeObserver(arrive);
  arrived.observe(canvas);

  const listeners = { "change:mask": adopt, "change:image": load, "change:mode": draw };
  for (const [name, listener] of Object.entries(listeners)) model.on(name, listener);
  adopt();
  load();
  return () => {
    arrived.disconnect();
    cancelAnimationFrame(frame);
    for (const [name, listener] of Object.entries(listeners)) model.off(name, listener);
  };
}

export default { render };
