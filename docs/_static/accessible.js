// What themes leave out for keyboards and screen readers: the level of the sidebar's captions, the names of what folds, and a way
// to what scrolls sideways.
function mend() {
  for (const caption of document.querySelectorAll(".caption[role=heading]")) {
    caption.setAttribute("aria-level", "2");
  }
  for (const summary of document.querySelectorAll("summary[aria-label]")) {
    summary.removeAttribute("aria-label"); // its text says more
  }
  for (const block of document.querySelectorAll("pre, .table-wrapper, article div")) {
    const scrolls = block.scrollWidth > block.clientWidth && getComputedStyle(block).overflowX === "auto";
    if (scrolls) block.tabIndex = 0;
    else block.removeAttribute("tabindex");
  }
}
addEventListener("load", mend);
addEventListener("resize", mend);
document.addEventListener("toggle", mend, true); // what a <details> hides has no width
