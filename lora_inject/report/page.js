"use strict";
(() => {
  const body = document.querySelector("#sites tbody");
  const rows = [...body.rows];
  const map = document.querySelector("svg.map");

  // Tooltips: the browser's own come late and cannot be styled; without this script they still come.
  const tip = document.body.appendChild(document.createElement("div"));
  tip.id = "tip";
  map.addEventListener("pointermove", (event) => {
    const cell = event.target.closest("rect");
    const title = cell && cell.querySelector("title");
    if (title) {
      cell.setAttribute("aria-label", title.textContent);
      title.remove();
    }
    tip.textContent = cell ? cell.getAttribute("aria-label") : "";
    const right = event.clientX + 16 + tip.offsetWidth > innerWidth;
    const low = event.clientY + 16 + tip.offsetHeight > innerHeight;
    tip.style.left = `${right ? event.clientX - 12 - tip.offsetWidth : event.clientX + 16}px`;
    tip.style.top = `${low ? event.clientY - 12 - tip.offsetHeight : event.clientY + 16}px`;
  });
  map.addEventListener("pointerleave", () => { tip.textContent = ""; });

  // A click on a cell leads to its row.
  map.addEventListener("click", (event) => {
    const cell = event.target.closest("rect");
    if (!cell) return;
    document.querySelectorAll(".on").forEach((old) => old.classList.remove("on"));
    const row = rows[cell.dataset.site];
    row.hidden = false;
    [cell, row].forEach((found) => found.classList.add("on"));
    row.scrollIntoView({ block: "center" });
  });

  // Headers sort; what has no number comes last either way.
  const value = (row, column) => {
    const text = row.cells[column].textContent;
    const number = parseFloat(text.replaceAll(",", ""));
    return body.dataset.text.split(" ").includes(String(column)) ? text : number;
  };
  const order = (sign) => ([a], [b]) =>
    typeof a === "string" ? sign * a.localeCompare(b, "en", { numeric: true })
      : Number.isNaN(a) || Number.isNaN(b) ? Number.isNaN(a) - Number.isNaN(b) : sign * (a - b);
  document.querySelectorAll("#sites th").forEach((header, column) => {
    const button = document.createElement("button");
    button.append(...header.childNodes);
    header.append(button);
    button.addEventListener("click", () => {
      const up = header.getAttribute("aria-sort") === "descending";
      document.querySelectorAll("#sites th").forEach((other) => other.removeAttribute("aria-sort"));
      header.setAttribute("aria-sort", up ? "ascending" : "descending");
      const keyed = rows.map((row) => [value(row, column), row]).sort(order(up ? 1 : -1));
      body.append(...keyed.map(([, row]) => row));
    });
  });

  const find = document.createElement("input");
  find.id = "find";
  find.type = "search";
  find.placeholder = "Show sites whose path contains …";
  find.setAttribute("aria-label", find.placeholder);
  find.addEventListener("input", () => {
    for (const row of rows) row.hidden = !row.cells[0].textContent.includes(find.value);
  });
  document.querySelector("#sites").parentElement.before(find);
})();
