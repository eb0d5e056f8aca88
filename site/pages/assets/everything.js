// The table of everything: filters and order live in the fragment of the address, so that a view can be linked:
// everything.html#dataset=mnist&block=floor&sort=-auroc
(() => {
  "use strict";
  const root = document.getElementById("everything");
  if (!root) return;
  const form = root.querySelector("form");
  const body = root.querySelector("tbody");
  const heads = [...root.querySelectorAll("thead th")];
  const rows = [...body.rows]; // in the order that the page was written in
  const shown = root.querySelector("output");

  const view = () => new URLSearchParams(location.hash.slice(1));

  // A number, or a text; null for an empty cell, which comes last in both directions.
  function value(row, column) {
    const cell = row.cells[column];
    const text = (cell.dataset.value ?? cell.textContent).trim();
    if (text === "") return null;
    return cell.classList.contains("number") ? Number(text) : text;
  }

  function matches(row, wanted) {
    for (const [name, text] of wanted) {
      if (name === "sort" || text === "") continue;
      const own = row.dataset[name];
      if (own === undefined) continue; // a fragment of some other kind
      if (name === "method" ? !row.cells[0].textContent.toLowerCase().includes(text.toLowerCase()) : own !== text) return false;
    }
    return true;
  }

  function order(sort) {
    const falling = sort.startsWith("-");
    const column = heads.findIndex((head) => head.dataset.key === sort.replace(/^-/, ""));
    heads.forEach((head, i) => {
      if (i === column) head.setAttribute("aria-sort", falling ? "descending" : "ascending");
      else head.removeAttribute("aria-sort");
    });
    if (column < 0) return rows;
    const sign = falling ? -1 : 1;
    return [...rows].sort((one, two) => {
      const a = value(one, column), b = value(two, column);
      if (a === null || b === null) return (a === null) - (b === null);
      return sign * (typeof a === "number" ? a - b : a.localeCompare(b, "en", { numeric: true }));
    });
  }

  function show() {
    const wanted = view();
    for (const control of form.elements) {
      if (!control.name) continue;
      const text = wanted.get(control.name) ?? "";
      if (control.type === "checkbox") control.checked = text !== "";
      else if (document.activeElement !== control || control.value.trim() !== text) control.value = text;
    }
    let count = 0;
    for (const row of rows) {
      row.hidden = !matches(row, wanted);
      count += !row.hidden;
    }
    body.append(...order(wanted.get("sort") ?? ""));
    shown.textContent = count;
  }

  function change(edit) {
    const wanted = view();
    edit(wanted);
    for (const [name, text] of [...wanted]) if (text === "") wanted.delete(name);
    history.replaceState(null, "", `${location.pathname}${location.search}${wanted.size ? `#${wanted}` : ""}`);
    show();
  }

  form.addEventListener("input", ({ target }) =>
    change((wanted) => wanted.set(target.name, target.type === "checkbox" ? (target.checked ? target.value : "") : target.value.trim())));
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", (event) => {
    event.preventDefault();
    change((wanted) => [...wanted.keys()].forEach((name) => wanted.delete(name)));
  });
  for (const head of heads) {
    const key = head.dataset.key;
    const first = head.classList.contains("number") ? `-${key}` : key; // numbers: the largest first
    const second = first === key ? `-${key}` : key;
    head.querySelector("button").addEventListener("click", () =>
      change((wanted) => wanted.set("sort", wanted.get("sort") === first ? second : wanted.get("sort") === second ? "" : first)));
  }
  addEventListener("hashchange", show);
  show();
})();
