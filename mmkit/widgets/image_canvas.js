// The image that a model reconstructs, beside the canvas of a MaskLab and of the same size.
//
// From Python: `image` (PNG bytes), `rows`, `columns` (of patches) and `words`, the text below it,
// which also describes it to readers who cannot see it. A new image is drawn over the old one once
// it is decoded, so that nothing flickers. `data-drawn` counts drawings, for tests.
const SIDE = 336; // CSS pixels of the longer side, at most: as in mask_canvas.js

function render({ model, el }) {
  const rows = model.get("rows"), columns = model.get("columns"), density = devicePixelRatio;
  const cell = Math.max(2, Math.floor((SIDE * density) / Math.max(rows, columns)));
  const canvas = document.createElement("canvas"), text = document.createElement("div");
  const pen = canvas.getContext("2d");
  Object.assign(canvas, { width: columns * cell, height: rows * cell });
  canvas.style.width = text.style.width = `${canvas.width / density}px`;
  canvas.setAttribute("role", "img");
  el.classList.add("mmkit-back");
  el.append(canvas, text);
  let drawn = 0;

  async function load() {
    const bytes = model.get("image");
    const image = await createImageBitmap(new Blob([bytes], { type: "image/png" }));
    if (bytes !== model.get("image")) return; // another one has arrived since
    pen.imageSmoothingEnabled = canvas.width < 2 * image.width; // large pixels stay sharp
    pen.imageSmoothingQuality = "high";
    pen.drawImage(image, 0, 0, canvas.width, canvas.height);
    canvas.dataset.drawn = ++drawn;
  }

  function describe() {
    text.textContent = model.get("words");
    canvas.setAttribute("aria-label", `The reconstructed image. ${text.textContent}`);
  }

  model.on("change:image", load);
  model.on("change:words", describe);
  load();
  describe();
  return () => { model.off("change:image", load); model.off("change:words", describe); };
}

export default { render };
