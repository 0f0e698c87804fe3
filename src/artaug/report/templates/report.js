"use strict";
// A picture's handle follows keys, mouse and finger; pictures open large; words and boxes come on demand.
const dialog = document.querySelector("dialog");
const stage = dialog.querySelector(".stage");
const range = (wipe) => wipe.querySelector("input");
const shown = () => [...document.querySelectorAll("main .card")].filter((card) => card.checkVisibility());
let card = null;

function place(wipe, value) {
  const input = range(wipe);
  input.value = value;
  wipe.style.setProperty("--at", `${value}%`);
  input.setAttribute("aria-valuetext", `${Math.round(value)}% before`);
}

function drag(wipe, event) {
  const box = wipe.getBoundingClientRect();
  const at = (100 * (event.clientX - box.left)) / box.width;
  wipe.style.setProperty("--at", `${Math.min(Math.max(at, 0), 100)}%`);
  range(wipe).value = at;
}

document.addEventListener("pointerdown", (event) => {
  const wipe = event.target.closest(".wipe");
  if (!wipe || event.button || event.target.closest("button")) return;
  event.preventDefault();
  range(wipe).focus({ preventScroll: true });
  wipe.setPointerCapture(event.pointerId);
  drag(wipe, event);
});
document.addEventListener("pointermove", (event) => {
  const wipe = event.target.closest?.(".wipe");
  if (wipe?.hasPointerCapture(event.pointerId)) drag(wipe, event);
});
document.addEventListener("dblclick", (event) => {
  const wipe = event.target.closest("main .wipe");
  if (wipe) enlarge(wipe.closest(".card"));
});
document.addEventListener("input", (event) => {
  const wipe = event.target.closest(".wipe");
  if (wipe) place(wipe, event.target.value);
});

function fill() {
  const parts = [...card.children].map((part) => part.cloneNode(true));
  stage.replaceChildren(...parts);
  place(parts[0], range(card).value);
  for (const image of stage.querySelectorAll("img")) image.loading = "eager";
  const words = stage.querySelector(".words");
  if (words) words.open = telling || words.open;
  dialog.setAttribute("aria-label", `Enlarged picture: ${card.dataset.prompt}`);
  range(stage).focus({ preventScroll: true });
}

function enlarge(one) {
  card = one;
  if (!dialog.open) dialog.showModal();
  fill();
}

let telling = false;
function tell(words, open) {
  for (const one of words) one.open = open;
}

function next(from, by) {
  const all = shown();
  return all[(all.indexOf(from) + by + all.length) % all.length];
}

dialog.addEventListener("close", () => {
  card.scrollIntoView({ block: "nearest" });
  range(card).focus({ preventScroll: true });
});

document.addEventListener("click", (event) => {
  const { target } = event;
  if (target === dialog || target.closest(".close")) dialog.close();
  else if (target.closest("main .enlarge")) enlarge(target.closest(".card"));
  else if (target.closest("dialog .enlarge")) dialog.close();
  else if (target.closest(".all")) {
    const button = target.closest(".all");
    const open = button.getAttribute("aria-pressed") !== "true";
    button.setAttribute("aria-pressed", String(open));
    tell(button.closest("section").querySelectorAll(".words"), open);
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
  const by = { ArrowUp: -1, ArrowDown: 1 }[event.key];
  const here = event.target.closest(".card");
  if (event.key === "w" && dialog.open) {
    telling = !telling;
    tell(stage.querySelectorAll(".words"), telling);
  } else if (event.key === "w" && here) tell(here.querySelectorAll(".words"), !here.querySelector(".words")?.open);
  else if (by && dialog.open) enlarge(next(card, by));
  else if (by && here && event.target.type === "range") range(next(here, by)).focus();
  else if (event.key === "Enter" && here && event.target.type === "range") enlarge(here);
  else return;
  event.preventDefault();
});
