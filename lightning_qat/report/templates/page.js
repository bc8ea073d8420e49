"use strict";
// Sort: a heading is a button; numbers before words, the first click has the largest on top.
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent;
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const numeric = body.rows[0] && body.rows[0].cells[column].classList.contains("n");
      const before = head.getAttribute("aria-sort");
      const order = before ? (before === "descending" ? "ascending" : "descending")
        : numeric ? "descending" : "ascending";
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", order);
      const sign = order === "ascending" ? 1 : -1;
      const value = (row) => {
        const cell = row.cells[column];
        const text = cell.dataset.v ?? cell.textContent.trim();
        if (!numeric) return text;
        return text === "∞" ? Infinity : text === "-∞" ? -Infinity : parseFloat(text);
      };
      const keyed = [...body.rows].map((row) => [value(row), row]);
      keyed.sort(([a], [b]) => {
        if (!numeric) return sign * a.localeCompare(b, "en", { numeric: true });
        if (Number.isNaN(a) || Number.isNaN(b)) return Number.isNaN(a) - Number.isNaN(b);
        return a === b ? 0 : sign * (a < b ? -1 : 1);
      });
      body.append(...keyed.map(([, row]) => row));
    });
  });
}

// Filter: every word must stand in a row or figure.
const filter = document.getElementById("filter");
const shown = document.getElementById("filter-count");
const parts = [...document.querySelectorAll("table.filtered tbody tr, figure[data-filter]")];
const texts = parts.map((part) =>
  (part.dataset.filter ?? `${part.cells[0].textContent} ${part.cells[1].textContent}`).toLowerCase());
filter.addEventListener("input", () => {
  const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
  parts.forEach((part, i) => { part.hidden = !words.every((word) => texts[i].includes(word)); });
  const rows = document.querySelectorAll("#layer-table tbody tr");
  const left = [...rows].filter((row) => !row.hidden).length;
  shown.textContent = words.length ? `${left} of ${rows.length} layers` : "";
});

// Zoom: buttons, plus and minus, Ctrl and the wheel.
const plan = document.querySelector(".plan");
const drawing = document.getElementById("plan-svg");
const [width, height] = [drawing.width.baseVal.value, drawing.height.baseVal.value];
let scale = 1;
const zoom = (factor) => {
  const fitting = Math.min(1, plan.clientWidth / width);
  const before = scale;
  scale = factor ? Math.min(4, Math.max(0.05, scale * factor)) : fitting;
  const [x, y] = [plan.scrollLeft + plan.clientWidth / 2, plan.scrollTop + plan.clientHeight / 2];
  drawing.setAttribute("width", width * scale);
  drawing.setAttribute("height", height * scale);
  plan.scrollTo(x * scale / before - plan.clientWidth / 2, y * scale / before - plan.clientHeight / 2);
};
for (const button of document.querySelectorAll("[data-zoom]")) {
  button.addEventListener("click", () => zoom(Number(button.dataset.zoom)));
}
plan.addEventListener("keydown", (event) => {
  if (event.key === "+" || event.key === "=") zoom(1.25);
  else if (event.key === "-") zoom(0.8);
  else if (event.key === "0") zoom(0);
});
plan.addEventListener("wheel", (event) => {
  if (!event.ctrlKey) return;
  event.preventDefault();
  zoom(event.deltaY < 0 ? 1.1 : 0.9);
}, { passive: false });

// A link from the plan or another page may lead to a row that the filter hides.
addEventListener("hashchange", () => {
  const row = document.getElementById(location.hash.slice(1));
  if (row && row.hidden) { filter.value = ""; filter.dispatchEvent(new Event("input")); row.scrollIntoView(); }
});
