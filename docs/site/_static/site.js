// What a keyboard and a screen reader need: boxes that scroll can be reached, and every button says what it is.
document.addEventListener("DOMContentLoaded", () => {
  const boxes = "div.highlight pre, .cell_output pre, div.math, .glassbox-figure, .pst-scrollable-table-container";
  for (const box of document.querySelectorAll(boxes))
    if (box.scrollWidth > box.clientWidth && !box.hasAttribute("tabindex")) box.tabIndex = 0;
  for (const part of document.querySelectorAll("details > summary:has(.toctree-toggle)")) {
    const link = part.closest("li")?.querySelector("a");
    part.setAttribute("aria-label", `Pages below ${link ? link.textContent.trim() : "this one"}`);
  }
  for (const button of document.querySelectorAll(".search-button-field"))
    button.setAttribute("aria-label", button.textContent.replace(/\s+/g, " ").trim());
});

// circuitsvis writes white on middling colours; of black and white one always has a contrast of 4.5 or more.
const legible = (figure) => {
  for (const token of figure.querySelectorAll('span[style*="background-color"]')) {
    const [r, g, b] = getComputedStyle(token).backgroundColor.match(/[\d.]+/g).map((x) => {
      const share = x / 255;
      return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
    });
    const luminance = 0.2126 * r + 0.7152 * g + 0.0722 * b;
    token.style.color = luminance > 0.179 ? "black" : "white";
  }
};
document.addEventListener("DOMContentLoaded", () => {
  for (const figure of document.querySelectorAll(".glassbox-figure")) {
    new MutationObserver(() => legible(figure)).observe(figure, { childList: true, subtree: true });
    legible(figure);
  }
});
