"use strict";
// Tables sort by the column whose heading is pressed; without scripts they keep their order.
for (const table of document.querySelectorAll("table.sortable")) {
  const headings = [...table.tHead.rows[0].cells];
  for (const heading of headings.filter((cell) => cell.dataset.sort)) {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...heading.childNodes);
    heading.append(button);
    button.addEventListener("click", () => sort(table, headings, heading));
  }
}

function sort(table, headings, heading) {
  const column = headings.indexOf(heading);
  const numbers = heading.dataset.sort === "number";
  const first = numbers ? "descending" : "ascending";
  const other = numbers ? "ascending" : "descending";
  const order = heading.getAttribute("aria-sort") === first ? other : first;
  for (const cell of headings) cell.removeAttribute("aria-sort");
  heading.setAttribute("aria-sort", order);
  const sign = order === "ascending" ? 1 : -1;
  const names = new Intl.Collator(undefined, { numeric: true });
  const rows = [...table.tBodies[0].rows].map((row) => [key(row.cells[column], numbers), row]);
  rows.sort(([a], [b]) => {
    if (a === null || b === null) return (a === null) - (b === null);
    return sign * (numbers ? a - b : names.compare(a, b));
  });
  table.tBodies[0].append(...rows.map(([, row]) => row));
}

function key(cell, numbers) {
  if (!numbers) return cell.textContent;
  const text = cell.dataset.value;
  if (text === "") return null;
  return Number(text.replace("inf", "Infinity"));
}
