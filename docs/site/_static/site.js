// What a keyboard needs: boxes that scroll can be reached.
document.addEventListener("DOMContentLoaded", () => {
  for (const box of document.querySelectorAll("div.highlight pre, .cell_output pre, div.math, .glassbox-figure, .pst-scrollable-table-container"))
    if (box.scrollWidth > box.clientWidth && !box.hasAttribute("tabindex")) box.tabIndex = 0;
});
