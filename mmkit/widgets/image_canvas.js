// The picture that a model puts back, beside the canvas of a MaskLab and of its size.
//
// From Python: `picture` (PNG bytes), `rows`, `columns` (of patches) and `words` below it, which are
// its text for those who cannot see it, too. A new picture is drawn over the old one once it is
// decoded, so that nothing flickers. `data-drawn` counts drawings, for tests.
const SIDE = 336; // CSS pixels of the longer side, at most: as mask_canvas.js

function render({ model, el }) {
  const rows = model.get("rows"), columns = model.get("columns"), dense = devicePixelRatio;
  const cell = Math.max(2, Math.floor((SIDE * dense) / Math.max(rows, columns)));
  const canvas = document.createElement("canvas"), words = document.createElement("div");
  const pen = canvas.getContext("2d");
  Object.assign(canvas, { width: columns * cell, height: rows * cell });
  canvas.style.width = words.style.width = `${canvas.width / dense}px`;
  canvas.setAttribute("role", "img");
  el.classList.add("mmkit-back");
  el.append(canvas, words);
  let drawn = 0;

  async function load() {
    const bytes = model.get("picture");
    const picture = await createImageBitmap(new Blob([bytes], { type: "image/png" }));
    if (bytes !== model.get("picture")) return; // overtaken by another one
    pen.imageSmoothingEnabled = canvas.width < 2 * picture.width; // large pixels stay sharp
    pen.imageSmoothingQuality = "high";
    pen.drawImage(picture, 0, 0, canvas.width, canvas.height);
    canvas.dataset.drawn = ++drawn;
  }

  function say() {
    words.textContent = model.get("words");
    canvas.setAttribute("aria-label", `The picture put back. ${words.textContent}`);
  }

  model.on("change:picture", load);
  model.on("change:words", say);
  load();
  say();
  return () => { model.off("change:picture", load); model.off("change:words", say); };
}

export default { render };
