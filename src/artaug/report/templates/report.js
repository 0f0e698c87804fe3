"use strict";
// Before/after sliders that follow keys, mouse and finger, an enlarged view, and annotations (boxes and prompts) on demand.
const dialog = document.querySelector("dialog");
const stage = dialog.querySelector(".stage");
const rangeOf = (element) => element.querySelector("input");
const visibleCards = () => [...document.querySelectorAll("main .card")].filter((card) => card.checkVisibility());
let enlarged = null; // the card that the dialog shows
let annotated = false; // whether the dialog shows annotations

function setPosition(slider, percent) {
  const range = rangeOf(slider);
  range.value = percent;
  slider.style.setProperty("--position", `${percent}%`);
  range.setAttribute("aria-valuetext", `${Math.round(percent)}% before`);
}

function drag(slider, event) {
  const bounds = slider.getBoundingClientRect();
  const percent = (100 * (event.clientX - bounds.left)) / bounds.width;
  slider.style.setProperty("--position", `${Math.min(Math.max(percent, 0), 100)}%`);
  rangeOf(slider).value = percent;
}

document.addEventListener("pointerdown", (event) => {
  const slider = event.target.closest(".slider");
  if (!slider || event.button || event.target.closest("button")) return;
  event.preventDefault();
  rangeOf(slider).focus({ preventScroll: true });
  slider.setPointerCapture(event.pointerId);
  drag(slider, event);
});
document.addEventListener("pointermove", (event) => {
  const slider = event.target.closest?.(".slider");
  if (slider?.hasPointerCapture(event.pointerId)) drag(slider, event);
});
document.addEventListener("dblclick", (event) => {
  const slider = event.target.closest("main .slider");
  if (slider) enlarge(slider.closest(".card"));
});
document.addEventListener("input", (event) => {
  const slider = event.target.closest(".slider");
  if (slider) setPosition(slider, event.target.value);
});

function enlarge(card) {
  enlarged = card;
  if (!dialog.open) dialog.showModal();
  const parts = [...card.children].map((part) => part.cloneNode(true));
  stage.replaceChildren(...parts);
  setPosition(parts[0], rangeOf(card).value);
  for (const image of stage.querySelectorAll("img")) image.loading = "eager";
  const annotations = stage.querySelector(".annotations");
  if (annotations) annotations.open = annotated || annotations.open;
  dialog.setAttribute("aria-label", `Enlarged picture: ${card.dataset.prompt}`);
  rangeOf(stage).focus({ preventScroll: true });
}

function setOpen(details, open) {
  for (const element of details) element.open = open;
}

function cardBeside(card, offset) {
  const cards = visibleCards();
  return cards[(cards.indexOf(card) + offset + cards.length) % cards.length];
}

dialog.addEventListener("close", () => {
  enlarged.scrollIntoView({ block: "nearest" });
  rangeOf(enlarged).focus({ preventScroll: true });
});

document.addEventListener("click", (event) => {
  const { target } = event;
  if (target === dialog || target.closest(".close")) dialog.close();
  else if (target.closest("main .enlarge")) enlarge(target.closest(".card"));
  else if (target.closest("dialog .enlarge")) dialog.close();
  else if (target.closest(".toggle")) {
    const button = target.closest(".toggle");
    const open = button.getAttribute("aria-pressed") !== "true";
    button.setAttribute("aria-pressed", String(open));
    setOpen(button.closest("section").querySelectorAll(".annotations"), open);
  }
});

document.addEventListener("change", (event) => {
  if (event.target.name !== "arm") return;
  for (const part of event.target.closest("section").querySelectorAll(".grid [data-arm]")) {
    part.hidden = part.dataset.arm !== event.target.value;
  }
});

document.addEventListener("keydown", (event) => {
  if (event.altKey || event.ctrlKey || event.metaKey) return;
  const offset = { ArrowUp: -1, ArrowDown: 1 }[event.key];
  const card = event.target.closest(".card");
  const onRange = card && event.target.type === "range";
  if (event.key === "w" && dialog.open) {
    annotated = !annotated;
    setOpen(stage.querySelectorAll(".annotations"), annotated);
  } else if (event.key === "w" && card) {
    setOpen(card.querySelectorAll(".annotations"), !card.querySelector(".annotations")?.open);
  } else if (offset && dialog.open) enlarge(cardBeside(enlarged, offset));
  else if (offset && onRange) rangeOf(cardBeside(card, offset)).focus();
  else if (event.key === "Enter" && onRange) enlarge(card);
  else return;
  event.preventDefault();
});
