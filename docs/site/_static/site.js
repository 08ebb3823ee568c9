// What a keyboard and a screen reader need: boxes that scroll can be reached, and every button says what it is.
document.addEventListener("DOMContentLoaded", () => {
  const boxes = "div.highlight pre, .cell_output pre, div.math, .glassbox-figure, .pst-scrollable-table-container";
  for (const box of document.querySelectorAll(boxes))
    if (box.scrollWidth > box.clientWidth && !box.hasAttribute("tabindex")) box.tabIndex = 0;
  for (const part of document.querySelectorAll("details > summary:has(.toctree-toggle)")) {
    const link = part.closest("li")?.querySelector("a");
    part.setAttribute("aria-label", `Pages below ${link ? link.textContent.trim() : "this one"}`);
  }
  for (const head of document.querySelectorAll("th")) if (!head.textContent.trim()) head.setAttribute("role", "none");
  for (const button of document.querySelectorAll(".search-button-field"))
    button.setAttribute("aria-label", button.textContent.replace(/\s+/g, " ").trim());
});

// circuitsvis writes white on middling colours (of black and white one always has a contrast of 4.5 or more), and its
// canvases have no names.
const accessible = (figure) => {
  for (const text of figure.querySelectorAll('span[style*="background"], h4[style*="background"]')) {
    const [red, green, blue, alpha = 1] = getComputedStyle(text).backgroundColor.match(/[\d.]+/g).map(Number);
    if (alpha < 1) continue;
    const [r, g, b] = [red, green, blue].map((x) => x / 255).map((x) => (x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4));
    text.style.color = 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.179 ? "black" : "white";
  }
  for (const canvas of figure.querySelectorAll('canvas[role="img"]:not([aria-label])')) {
    const head = canvas.closest("div:has(> h4), div:has(h4)")?.querySelector("h4");
    canvas.setAttribute("aria-label", `Attention pattern${head ? ` of ${head.textContent.trim()}` : ""}`);
  }
};
document.addEventListener("DOMContentLoaded", () => {
  for (const figure of document.querySelectorAll(".glassbox-figure")) {
    let asked = false;
    const soon = () => {
      if (asked) return;
      asked = true;
      requestAnimationFrame(() => { asked = false; accessible(figure); });
    };
    new MutationObserver(soon).observe(figure, { childList: true, subtree: true });
    soon();
  }
});
