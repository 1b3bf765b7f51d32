// Shows an answer as it comes: paragraphs, code blocks, `code` and **bold**. Nothing of it is ever read as HTML.

const INLINE = /`([^`\n]+)`|\*\*(?=\S)([^\n]*?\S)\*\*/g;
const FENCE = /^ {0,3}```/;

/** Cuts a line into pieces {kind, text}, kind being "text", "code" or "strong". */
export function splitInline(line) {
  const pieces = [];
  let end = 0;
  for (const match of line.matchAll(INLINE)) {
    if (match.index > end) pieces.push({ kind: "text", text: line.slice(end, match.index) });
    pieces.push(match[1] === undefined ? { kind: "strong", text: match[2] } : { kind: "code", text: match[1] });
    end = match.index + match[0].length;
  }
  if (end < line.length) pieces.push({ kind: "text", text: line.slice(end) });
  return pieces;
}

export function isFence(line) {
  return FENCE.test(line);
}

/** An element that text is added to. Whole lines are shown once; only the line that goes on is shown anew. */
export class MarkupView {
  #root;
  #block = null;
  #isCode = false;
  #line = "";
  #shown = [];

  constructor(root) {
    this.#root = root;
  }

  push(text) {
    this.#shown.forEach((node) => node.remove());
    this.#shown = [];
    const lines = text.split("\n");
    lines[0] = this.#line + lines[0];
    this.#line = lines.pop();
    lines.forEach((line) => this.#addLine(line));
    if (this.#line && !isFence(this.#line)) this.#shown = this.#append(this.#line);
  }

  #addLine(line) {
    if (isFence(line)) {
      this.#isCode = !this.#isCode;
      this.#block = null;
      if (this.#isCode) this.#append("");
    } else if (this.#isCode) {
      this.#append(`${line}\n`);
    } else if (line.trim()) {
      this.#append(`${line}\n`);
    } else {
      this.#block = null;
    }
  }

  /** The nodes that show a piece of the block under way, which is begun where there is none. */
  #append(text) {
    if (!this.#block) {
      const outer = document.createElement(this.#isCode ? "pre" : "p");
      this.#root.append(outer);
      this.#block = this.#isCode ? outer.appendChild(document.createElement("code")) : outer;
    }
    const nodes = this.#isCode ? [document.createTextNode(text)] : splitInline(text).map(makeNode);
    this.#block.append(...nodes);
    return nodes;
  }
}

function makeNode({ kind, text }) {
  if (kind === "text") return document.createTextNode(text);
  const element = document.createElement(kind);
  element.textContent = text;
  return element;
}
