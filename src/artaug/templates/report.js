"use strict";
// A picture opens large; arrow keys and buttons flip between the pictures of one prompt, in place.
const dialog = document.querySelector("dialog");
const [large, caption, flip] = ["img", ".caption", ".flip"].map((part) => dialog.querySelector(part));
const cards = () => [...document.querySelectorAll(".card")].filter((card) => card.checkVisibility());
let card = null;
let at = 0;

function show() {
  const buttons = [...card.querySelectorAll(".shot button")];
  at = (at + buttons.length) % buttons.length;
  const image = buttons[at].querySelector("img");
  large.src = image.src;
  large.alt = image.alt;
  large.style.setProperty("--ratio", image.naturalWidth / image.naturalHeight);
  caption.textContent = card.dataset.prompt;
  flip.replaceChildren(
    ...buttons.map((button, index) => {
      const choice = document.createElement("button");
      choice.type = "button";
      choice.textContent = button.dataset.name;
      choice.setAttribute("aria-pressed", String(index === at));
      choice.addEventListener("click", () => { at = index; show(); });
      return choice;
    }),
  );
}

function step(by) {
  const all = cards();
  card = all[(all.indexOf(card) + by + all.length) % all.length];
  show();
}

document.addEventListener("click", (event) => {
  const button = event.target.closest(".shot button");
  if (!button) return;
  card = button.closest(".card");
  at = [...card.querySelectorAll(".shot button")].indexOf(button);
  show();
  dialog.showModal();
});

dialog.addEventListener("click", (event) => {
  if (event.target === dialog) dialog.close();
  else if (event.target === large) { at += 1; show(); }
});

dialog.addEventListener("keydown", (event) => {
  const moves = {
    ArrowLeft: () => { at -= 1; show(); },
    ArrowRight: () => { at += 1; show(); },
    ArrowUp: () => step(-1),
    ArrowDown: () => step(1),
  };
  if (!(event.key in moves)) return;
  event.preventDefault();
  moves[event.key]();
});
