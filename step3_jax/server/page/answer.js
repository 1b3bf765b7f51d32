// One answer on the page, with its reasoning folded above it.

import { log, make, makeButton, say, showMessage } from "./element.js";
import { MarkupView } from "./markup.js";

async function copy(text, element, button) {
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  } catch {
    // Browsers keep the clipboard from pages that came without TLS.
    getSelection().selectAllChildren(element);
    say("Selected: press Ctrl+C to copy.");
  }
}

/** Pieces are shown once a frame, however fast they come. */
export class Answer {
  constructor() {
    this.text = "";
    this.reasoning = "";
    this.usage = null;
    this.finishReason = null;
    this.startedAt = performance.now();
    this.firstAt = null;
    this.article = showMessage("assistant", "Answer");
    this.article.setAttribute("aria-busy", "true");
    this.details = make("details", "reasoning");
    this.summary = make("summary", "", "Thinking …");
    this.thoughts = make("div", "");
    this.details.append(this.summary, this.thoughts);
    this.details.hidden = true;
    this.body = make("div", "text");
    this.article.append(this.details, this.body);
    this.view = new MarkupView(this.body);
    this.waiting = { text: "", reasoning: "" };
    this.frame = 0;
  }

  push(chunk) {
    if (chunk.usage) this.usage = chunk.usage;
    const choice = chunk.choices?.[0];
    if (!choice) return;
    this.finishReason = choice.finish_reason ?? this.finishReason;
    const reasoning = choice.delta.reasoning_content ?? choice.delta.reasoning ?? "";
    const text = choice.delta.content ?? "";
    if (!reasoning && !text) return;
    this.firstAt ??= performance.now();
    if (text && !this.text && this.reasoning) {
      this.summary.textContent = `Thought for ${((performance.now() - this.firstAt) / 1000).toFixed(1)} s`;
    }
    this.text += text;
    this.reasoning += reasoning;
    this.waiting.text += text;
    this.waiting.reasoning += reasoning;
    this.frame ||= requestAnimationFrame(() => this.show());
  }

  show() {
    cancelAnimationFrame(this.frame);
    this.frame = 0;
    const isAtEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
    if (this.waiting.reasoning) {
      this.details.hidden = false;
      this.thoughts.append(this.waiting.reasoning);
    }
    if (this.waiting.text) this.view.push(this.waiting.text);
    this.waiting = { text: "", reasoning: "" };
    if (this.usage) say(this.describe());
    if (isAtEnd) log.scrollTop = log.scrollHeight;
  }

  describe() {
    const count = this.usage.completion_tokens;
    const seconds = (performance.now() - (this.firstAt ?? this.startedAt)) / 1000;
    const rate = count > 1 && seconds > 0 ? ` · ${((count - 1) / seconds).toFixed(1)} tokens/s` : "";
    const cached = this.usage.prompt_tokens_details?.cached_tokens;
    const prompt = `${this.usage.prompt_tokens} prompt${cached ? ` (${cached} cached)` : ""}`;
    const first = this.firstAt === null ? "" : ` · first after ${((this.firstAt - this.startedAt) / 1000).toFixed(2)} s`;
    return `${prompt} + ${count} tokens${rate}${first}`;
  }

  /** Ends the answer, with a note below it where there is something to know. */
  finish(note, isError = false) {
    this.show();
    this.article.removeAttribute("aria-busy");
    if (this.reasoning && !this.text) this.summary.textContent = "Reasoning";
    if (note) this.article.append(make("p", isError ? "note error" : "note", note));
    if (this.text) {
      const button = makeButton("Copy", "Copy this answer", () => copy(this.text, this.body, button));
      this.article.append(button);
    }
    log.scrollTop = log.scrollHeight;
  }
}
