// Elements of the page that several scripts use. Text goes in as text, never as HTML.

export const find = (id) => document.getElementById(id);
export const log = find("log");

export function make(tag, className, text = "") {
  const element = document.createElement(tag);
  element.className = className;
  element.textContent = text;
  return element;
}

export function makeButton(text, label, act) {
  const button = make("button", "small", text);
  button.type = "button";
  button.setAttribute("aria-label", label);
  button.addEventListener("click", act);
  return button;
}

/** Shows a line below the form. */
export function say(text, isError = false) {
  find("status").textContent = text;
  find("status").classList.toggle("error", isError);
}

/** Adds an empty message to the conversation. */
export function showMessage(role, name) {
  find("welcome").hidden = true;
  const article = make("article", role);
  article.setAttribute("aria-label", name);
  log.append(article);
  log.scrollTop = log.scrollHeight;
  return article;
}
