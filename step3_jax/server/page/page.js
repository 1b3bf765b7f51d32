// The chat page: what was said, the form below it, and the request under way.

import { Answer } from "./answer.js";
import { find, log, make, makeButton, say, showMessage } from "./element.js";
import { readImage } from "./image.js";
import { authorise, readError, streamChat } from "./stream.js";

const MAX_IMAGES = 16;
const SETTINGS = ["system", "temperature", "max-tokens", "key"];
const STORE = "step3.settings";

const question = find("question");
const settings = find("settings");

let model = null;
let messages = []; // What was said, as the API has it.
let images = []; // Data URLs of the next message.
let running = null; // The AbortController of the request under way.

// Settings

function storeSettings() {
  const values = Object.fromEntries(SETTINGS.map((id) => [id, find(id).value]));
  sessionStorage.setItem(STORE, JSON.stringify(values));
}

function restoreSettings() {
  const values = JSON.parse(sessionStorage.getItem(STORE) ?? "{}");
  for (const id of SETTINGS) find(id).value = values[id] ?? "";
}

function openSettings(field) {
  settings.showModal();
  find(field).focus();
}

function buildRequest() {
  const request = { model, messages, stream_options: { include_usage: true, continuous_usage_stats: true } };
  const [system, temperature, maxTokens] = SETTINGS.map((id) => find(id).value.trim());
  if (system) request.messages = [{ role: "system", content: system }, ...messages];
  if (temperature) request.temperature = Number(temperature);
  if (maxTokens) request.max_completion_tokens = Number(maxTokens);
  return request;
}

async function findModel() {
  let response;
  try {
    response = await fetch("v1/models", { headers: authorise(find("key").value) });
  } catch {
    say("The server cannot be reached.", true);
    return;
  }
  if (!response.ok) {
    const error = await readError(response);
    say(error.message, true);
    if (error.status === 401) openSettings("key");
    return;
  }
  model = (await response.json()).data[0].id;
  find("model").textContent = model;
  document.title = model;
  say("");
}

// Images of the next message

async function addImages(files) {
  for (const file of files) {
    if (images.length === MAX_IMAGES) {
      say(`A message has at most ${MAX_IMAGES} images.`, true);
      break;
    }
    try {
      images.push(await readImage(file));
    } catch (error) {
      say(error.message, true);
    }
  }
  showImages();
  question.focus();
}

function makeImage(url) {
  const image = document.createElement("img");
  image.src = url;
  image.alt = "attached image";
  return image;
}

function showImages() {
  const items = images.map((url, number) => {
    const remove = makeButton("×", `Remove image ${number + 1}`, () => {
      images.splice(number, 1);
      showImages();
      question.focus();
    });
    const item = make("span", "thumbnail");
    item.append(makeImage(url), remove);
    return item;
  });
  find("images").replaceChildren(...items);
}

const imageFiles = (transfer) => [...transfer.files].filter((file) => file.type.startsWith("image/"));

// The conversation

function showQuestion(text, urls) {
  const article = showMessage("user", "You");
  if (urls.length) {
    const shown = make("div", "images");
    shown.append(...urls.map(makeImage));
    article.append(shown);
  }
  article.append(make("p", "", text));
  log.scrollTop = log.scrollHeight;
  return article;
}

async function send() {
  const text = question.value.trim();
  if (running || (!text && !images.length)) return;
  const urls = images;
  // In front of the text, as the model was trained.
  const parts = urls.map((url) => ({ type: "image_url", image_url: { url } }));
  const content = urls.length ? [...parts, ...(text ? [{ type: "text", text }] : [])] : text;
  const before = messages;
  messages = [...messages, { role: "user", content }];
  const shown = showQuestion(text, urls);
  question.value = "";
  images = [];
  showImages();
  resizeQuestion();
  setRunning(new AbortController());
  say("Waiting for the first token …");
  const own = running;
  const answer = new Answer();
  let note = "";
  let problem = null;
  try {
    if (model === null) await findModel();
    for await (const chunk of streamChat(buildRequest(), { key: find("key").value, signal: own.signal })) {
      answer.push(chunk);
    }
    if (answer.finishReason === "length") note = "Cut off: the most tokens were reached.";
  } catch (error) {
    if (own.signal.aborted) note = "Stopped.";
    else problem = error.status === undefined ? "The server cannot be reached." : error.message;
  }
  if (running !== own) return; // A new chat was begun meanwhile.
  setRunning(null);
  if (!answer.text && !answer.reasoning && !note.startsWith("Cut")) {
    // Nothing came: the question goes back into the form, so that it can be sent again.
    messages = before;
    shown.remove();
    answer.article.remove();
    find("welcome").hidden = log.querySelector("article") !== null;
    question.value = question.value || text;
    images = urls;
    showImages();
    resizeQuestion();
    say(problem ?? note, problem !== null);
  } else {
    // Reasoning is no part of the history: the model's template drops it too.
    messages = [...messages, { role: "assistant", content: answer.text }];
    answer.finish(problem ?? note, problem !== null);
    say(answer.usage ? answer.describe() : problem ?? "", problem !== null && !answer.usage);
  }
  question.focus();
}

function setRunning(controller) {
  running = controller;
  find("send").hidden = controller !== null;
  find("stop").hidden = controller === null;
  // What changes with every token would be read aloud with every token.
  find("status").setAttribute("aria-live", controller === null ? "polite" : "off");
}

function stop() {
  running?.abort();
}

function startNewChat() {
  stop();
  setRunning(null);
  messages = [];
  images = [];
  showImages();
  log.querySelectorAll("article").forEach((article) => article.remove());
  find("welcome").hidden = false;
  say("");
  question.focus();
}

function resizeQuestion() {
  question.style.height = "auto";
  question.style.height = `${question.scrollHeight + 2}px`;
}

// Events

find("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
question.addEventListener("input", resizeQuestion);
question.addEventListener("keydown", (event) => {
  // Enter also ends the choice of a character in some writing systems.
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    send();
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !settings.open) stop();
});
find("stop").addEventListener("click", stop);
find("new-chat").addEventListener("click", startNewChat);
find("open-settings").addEventListener("click", () => openSettings("system"));
settings.addEventListener("close", () => {
  storeSettings();
  if (model === null) findModel();
  question.focus();
});
find("add-image").addEventListener("click", () => find("image-file").click());
find("image-file").addEventListener("change", (event) => {
  const files = [...event.target.files];
  event.target.value = "";
  addImages(files);
});
document.addEventListener("paste", (event) => {
  const files = imageFiles(event.clipboardData);
  if (files.length) {
    event.preventDefault();
    addImages(files);
  }
});
document.addEventListener("dragover", (event) => event.preventDefault());
document.addEventListener("drop", (event) => {
  event.preventDefault();
  addImages(imageFiles(event.dataTransfer));
});

restoreSettings();
resizeQuestion();
findModel();
