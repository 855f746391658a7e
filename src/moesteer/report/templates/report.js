"use strict";
// Draws the figures, in the page's own colours, for the width of their box; opens every fold for printing.
(() => {
  const figures = JSON.parse(document.getElementById("figure-data").textContent);
  const NARROW_PX = 560;
  const PRINT_PX = 640;
  const SUMMARY_PX = 400;
  const THEMES = ["system", "light", "dark"];
  const shown = new Map();
  let printing = false;

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
      // a closed fold has no width: its figures are drawn when it opens
      if (!box || (!box.clientWidth && !printing)) continue;
      const size = !printing && box.clientWidth < NARROW_PX ? "narrow" : "wide";
      if (!force && shown.get(id) === size) continue;
      shown.set(id, size);
      const figure = themed(sizes[size], false);
      if (printing) {
        figure.layout.width = PRINT_PX;
        // the summary is to stay on one sheet
        if (box.closest(".summary")) figure.layout.height = Math.min(figure.layout.height, SUMMARY_PX);
      }
      Plotly.purge(box);
      Plotly.newPlot(box, figure.data, figure.layout, { displayModeBar: false, responsive: !printing });
    }
  }

  function print(now) {
    printing = now;
    draw(true);
  }

  const button = document.getElementById("theme");
  button.hidden = false;
  button.addEventListener("click", () => {
    const root = document.documentElement;
    const next = THEMES[(THEMES.indexOf(root.dataset.theme || "system") + 1) % THEMES.length];
    if (next === "system") delete root.dataset.theme;
    else root.dataset.theme = next;
    button.textContent = "Theme: " + next;
    draw(true);
  });

  draw(true);
  addEventListener("resize", () => draw(false));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => draw(true));
  matchMedia("print").addEventListener("change", (event) => print(event.matches));
  for (const fold of document.querySelectorAll("details")) fold.addEventListener("toggle", () => draw(false));
  // a link to a table that is folded away opens it
  function unfold() {
    const target = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)));
    if (target && target.tagName === "DETAILS") target.open = true;
  }
  addEventListener("hashchange", unfold);
  unfold();
  addEventListener("beforeprint", () => {
    for (const fold of document.querySelectorAll("details")) fold.open = true;
  });
})();
