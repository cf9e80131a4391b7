// What the theme leaves to mend for those who listen to a page or use it by keyboard.
"use strict";
(() => {
  const each = (selector, act) => document.querySelectorAll(selector).forEach(act);

  function mend() {
    // A name that differs from the visible text cannot be spoken: let the text be the name.
    each(".search-button-field[aria-label], details.hide > summary[aria-label]", (e) => e.removeAttribute("aria-label"));
    each(".theme-switch-button svg", (icon) => icon.removeAttribute("title"));
    // The title above the sidebar lies in no landmark.
    each(".sidebar-primary-item:has(> .navbar-brand)", (item) => {
      item.setAttribute("role", "navigation");
      item.setAttribute("aria-label", "Title of the book");
    });
    // The roles of a bibliography contradict each other: a list whose children are no items.
    each(".citation-list > .citation", (entry) => entry.setAttribute("role", "listitem"));
    each("input.task-list-item-checkbox", (box) => {
      const text = box.parentElement.textContent.trim();
      box.setAttribute("aria-label", text.slice(0, 120) || "task");
    });
    // A heading cell that holds nothing is no heading.
    each("thead th", (cell) => {
      if (!cell.textContent.trim() && !cell.querySelector("img, svg")) {
        cell.replaceWith(Object.assign(document.createElement("td"), { className: cell.className }));
      }
    });
    reach();
  }

  // What scrolls sideways must be reachable by the keyboard.
  function reach() {
    each("div.math, div.cell_output .output, pre, .pst-scrollable-table-container", (box) => {
      const scrolls = box.scrollWidth > box.clientWidth + 1 && getComputedStyle(box).overflowX !== "visible";
      if (scrolls) box.tabIndex = 0;
    });
  }

  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", mend);
  else mend();
  window.addEventListener("load", mend);
})();
