"use strict";
(function () {
  const all = (selector, root) => Array.from((root || document).querySelectorAll(selector));
  const tip = document.getElementById("tip");

  function element(name, text) {
    const made = document.createElement(name);
    made.textContent = text;
    return made;
  }

  // Hovering or focusing a circle of the plot shows its recipe and figures. All text goes in as text, never as markup.
  function show(mark) {
    const table = document.createElement("div");
    for (const [name, value] of JSON.parse(mark.dataset.facts)) table.append(element("span", name), element("em", value));
    for (const value of all("em", table)) value.style.fontStyle = "normal";
    tip.replaceChildren(element("b", mark.dataset.title), table);
    tip.hidden = false;
    const at = mark.querySelector("circle").getBoundingClientRect();
    const wide = document.documentElement.clientWidth;
    const left = at.right + 10 + tip.offsetWidth < wide ? at.right + 10 : Math.max(6, at.left - 10 - tip.offsetWidth);
    const above = at.top + at.height / 2 - tip.offsetHeight / 2;
    const top = Math.max(6, Math.min(above, window.innerHeight - tip.offsetHeight - 6));
    tip.style.left = left + window.scrollX + "px";
    tip.style.top = top + window.scrollY + "px";
  }

  const hide = () => { tip.hidden = true; };

  for (const mark of all("g.mark")) {
    mark.addEventListener("mouseenter", () => show(mark));
    mark.addEventListener("focus", () => show(mark));
    mark.addEventListener("mouseleave", hide);
    mark.addEventListener("blur", hide);
  }
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") hide(); });

  // A row of the table of the front lights up its circle.
  for (const row of all("tr[data-number]")) {
    const mark = all("g.mark").find((other) => other.dataset.number === row.dataset.number);
    if (!mark) continue;
    row.addEventListener("mouseenter", () => mark.classList.add("lit"));
    row.addEventListener("mouseleave", () => mark.classList.remove("lit"));
  }

  function key(row, column) {
    const cell = row.children[column];
    return cell.dataset.sort === undefined ? cell.textContent : Number(cell.dataset.sort);
  }

  function sort(table, column, heading) {
    const down = heading.getAttribute("aria-sort") === "ascending";
    for (const other of all("thead th", table)) other.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", down ? "descending" : "ascending");
    const rows = all("tbody tr", table).sort((one, other) => {
      const a = key(one, column), b = key(other, column);
      const order = typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b));
      return down ? -order : order;
    });
    table.tBodies[0].append(...rows);
  }

  for (const table of all("table.sortable")) {
    all("thead th", table).forEach((heading, column) => {
      const button = heading.querySelector("button");
      if (button) button.addEventListener("click", () => sort(table, column, heading));
    });
  }

  // Pages opened from a file may not use the clipboard interface, so the text is selected where that is refused.
  function select(node) {
    const range = document.createRange();
    range.selectNodeContents(node);
    window.getSelection().removeAllRanges();
    window.getSelection().addRange(range);
  }

  async function copy(button) {
    const node = document.getElementById(button.dataset.of);
    try {
      await navigator.clipboard.writeText(node.textContent);
      button.textContent = "Copied";
    } catch {
      select(node);
      button.textContent = document.execCommand("copy") ? "Copied" : "Selected";
    }
    window.setTimeout(() => { button.textContent = "Copy"; }, 1600);
  }

  for (const button of all("button.copy")) button.addEventListener("click", () => copy(button));

  // What is folded away on the screen is opened on paper.
  let folded = [];
  window.addEventListener("beforeprint", () => {
    folded = all("details:not([open])");
    for (const item of folded) item.open = true;
  });
  window.addEventListener("afterprint", () => { for (const item of folded) item.open = false; });

  document.documentElement.dataset.script = "ran";
})();
