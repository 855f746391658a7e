"use strict";
// Draws the figures, in the page's own colours, for the width of their box; opens every fold for printing.
(() => {
  const figures = JSON.parse(document.getElementById("figure-data").textContent);
  const NARROW_PX = 560;
  const shown = new Map();

  function themed(value, isColour) {
    const style = getComputedStyle(document.documentElement);
    const walk = (part, colour) => {
      if (Array.isArray(part)) return part.map((item) => walk(item, colour));
      if (part && typeof part === "object") {
        return Object.fromEntries(Object.entries(part).map(([key, item]) => [key, walk(item, /color/.test(key))]));
      }
      return colour && /^@[a-z-]+$/.test(part) ? style.getPropertyValue("--" + part.slice(1)).trim() : part;
    };
    return walk(value, isColour);
  }

  function draw(force) {
    for (const [id, sizes] of Object.entries(figures)) {
      const box = document.getElementById(id);
      const size = box.clientWidth < NARROW_PX ? "narrow" : "wide";
      if (!force && shown.get(id) === size) continue;
      shown.set(id, size);
      const figure = themed(sizes[size], false);
      Plotly.purge(box);
      Plotly.newPlot(box, figure.data, figure.layout, { displayModeBar: false, responsive: true });
    }
  }

  draw(true);
  addEventListener("resize", () => draw(false));
  for (const query of ["(prefers-color-scheme: dark)", "print"]) {
    matchMedia(query).addEventListener("change", () => draw(true));
  }
  addEventListener("beforeprint", () => {
    document.querySelectorAll("details").forEach((fold) => { fold.open = true; });
  });
})();
