// Similarity maps of the patch that is clicked or tapped, or moved to with the arrow keys. Nothing is loaded from anywhere.
(function () {
  "use strict";
  const data = JSON.parse(document.getElementById("patches").textContent);
  if (!data) return;
  document.documentElement.classList.add("scripted");

  const decoded = new Map();
  function codesOf(encoder, image) {
    const key = encoder + "/" + image;
    if (!decoded.has(key)) {
      const bytes = atob(data.encoders[encoder].codes[image]);
      decoded.set(key, Int8Array.from(bytes, (c) => (c.charCodeAt(0) << 24) >> 24));
    }
    return decoded.get(key);
  }

  function similarities(encoder, image, row, column) {
    const { rows, columns, dim } = data.encoders[encoder];
    const codes = codesOf(encoder, image);
    const from = (row * columns + column) * dim;
    const values = new Float64Array(rows * columns);
    let own = 0;
    for (let k = 0; k < dim; k++) own += codes[from + k] ** 2;
    for (let p = 0; p < values.length; p++) {
      let dot = 0, square = 0;
      for (let k = 0; k < dim; k++) {
        const code = codes[p * dim + k];
        dot += code * codes[from + k];
        square += code * code;
      }
      values[p] = own > 0 && square > 0 ? dot / Math.sqrt(own * square) : 0;
    }
    return values;
  }

  function paint(pick, encoder, values) {
    const { rows, columns } = data.encoders[encoder];
    let canvas = pick.querySelector("canvas");
    if (!canvas) {
      canvas = document.createElement("canvas");
      canvas.width = columns;
      canvas.height = rows;
      canvas.setAttribute("aria-hidden", "true");
      pick.insertBefore(canvas, pick.querySelector(".mark"));
    }
    const context = canvas.getContext("2d");
    const pixels = context.createImageData(columns, rows);
    const last = data.stops.length - 1;
    for (let p = 0; p < values.length; p++) {
      const colour = data.stops[Math.floor(Math.min(1, Math.max(0, values[p])) * last + 0.5)];
      pixels.data.set([colour[0], colour[1], colour[2], 255], p * 4);
    }
    context.putImageData(pixels, 0, 0);
  }

  function cell(share, count) {
    return Math.min(count - 1, Math.max(0, Math.floor(share * count)));
  }

  function choose(figure, place) {
    const image = Number(figure.dataset.image);
    figure.place = place;
    for (const pick of figure.querySelectorAll(".pick")) {
      const encoder = Math.max(0, Number(pick.dataset.encoder)); // the image itself takes the teacher's grid
      const { rows, columns } = data.encoders[encoder];
      const row = cell(place.y, rows), column = cell(place.x, columns);
      if (Number(pick.dataset.encoder) >= 0) paint(pick, encoder, similarities(encoder, image, row, column));
      const mark = pick.querySelector(".mark");
      mark.style.left = (100 * column) / columns + "%";
      mark.style.top = (100 * row) / rows + "%";
      mark.style.width = 100 / columns + "%";
      mark.style.height = 100 / rows + "%";
    }
    const { rows, columns } = data.encoders[0];
    figure.querySelector(".status").textContent =
      "· patch in row " + (cell(place.y, rows) + 1) + ", column " + (cell(place.x, columns) + 1);
  }

  function initialPlace(figure) {
    const style = figure.querySelector(".mark").style;
    const share = (start, size) => (parseFloat(start) + parseFloat(size) / 2) / 100;
    return { x: share(style.left, style.width), y: share(style.top, style.height) };
  }

  const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  for (const figure of document.querySelectorAll("figure.similar")) {
    figure.place = initialPlace(figure);
    for (const pick of figure.querySelectorAll(".pick")) {
      pick.addEventListener("click", (event) => {
        const box = pick.getBoundingClientRect();
        choose(figure, { x: (event.clientX - box.left) / box.width, y: (event.clientY - box.top) / box.height });
      });
    }
    const strip = figure.querySelector(".strip");
    strip.tabIndex = 0;
    strip.addEventListener("keydown", (event) => {
      const move = moves[event.key];
      if (!move) return;
      event.preventDefault();
      const { rows, columns } = data.encoders[0];
      choose(figure, {
        x: (cell(figure.place.x, columns) + 0.5 + move[0]) / columns,
        y: (cell(figure.place.y, rows) + 0.5 + move[1]) / rows,
      });
    });
  }
})();
