// One answer as it streams: tinted tokens, what each of them says when asked, and what the answer cost.

import { chat } from "./api.js";

/** Natural logarithms of odds at which a tint gets darker: the token became 1.2, 1.6, 2.7, 7 times as likely. */
const SHIFTS = [0.2, 0.5, 1, 2];

const inspector = () => document.getElementById("inspector");

/** A card with one answer. */
export class Answer {
  constructor(title, subtitle) {
    this.entries = [];
    this.pending = { entries: [], text: "" };
    this.card = document.createElement("article");
    this.card.className = "card";
    this.card.dataset.state = "waiting";
    this.card.setAttribute("aria-label", `${title}: ${subtitle}`);
    const head = node("header", "", node("h2", "", title), node("p", "", subtitle));
    this.text = node("div", "text");
    this.text.setAttribute("role", "listbox");
    this.text.setAttribute("aria-label", `Tokens of the answer: ${title}`);
    this.foot = node("footer", "", "waiting…");
    this.card.append(head, this.text, this.foot);
    this.#listen();
  }

  /** Streams the answer to `body` into the card. Never throws: what goes wrong is shown. */
  async run(body, signal) {
    const began = performance.now();
    this.card.dataset.state = "running";
    try {
      for await (const chunk of chat({ ...body, logprobs: true, top_logprobs: 5 }, signal)) {
        this.firstMs ??= chunk.choices.some((choice) => choice.logprobs) ? performance.now() - began : undefined;
        for (const choice of chunk.choices) this.#take(choice);
        if (chunk.usage) this.#finish(chunk, performance.now() - began);
        else if (this.entries.length) this.foot.textContent = pace(this.entries.length, performance.now() - began);
      }
    } catch (error) {
      this.#fail(error);
    }
    return this;
  }

  get plain() {
    return this.text.textContent;
  }

  #take({ delta, logprobs, uniarm, finish_reason: end }) {
    const pending = this.pending;
    pending.entries.push(...(logprobs?.content ?? []));
    pending.text += delta.content ?? "";
    if (uniarm?.unguided) this.card.dataset.unguided = "";
    if (!pending.text && !end) return;
    // Tokens that hold parts of a character, or of a stop string, have no text of their own: they are shown as one.
    const apart = pending.entries.map((entry) => entry.token).join("") === pending.text;
    const shown = apart ? pending.entries.map((entry) => [entry.token, entry]) : [[pending.text, pending.entries.at(-1)]];
    for (const [text, entry] of shown) if (text && entry) this.#show(text, entry);
    this.entries.push(...pending.entries);
    this.pending = { entries: [], text: "" };
  }

  #show(text, entry) {
    const token = node("span", "token", text);
    token.setAttribute("role", "option");
    token.tabIndex = this.text.childElementCount === 0 ? 0 : -1;
    token.dataset.shift = bucket(entry.logprob - entry.uniarm.base_logprob);
    token.entry = entry;
    this.text.append(token);
  }

  #finish({ usage, uniarm }, ms) {
    const guided = uniarm.exchange.certified + uniarm.exchange.queried + uniarm.exchange.dense > 0;
    const parts = [pace(usage.completion_tokens, ms), `first after ${Math.round(this.firstMs ?? ms)} ms`];
    if (guided) parts.push(`${(uniarm.speculation.base_passes / Math.max(usage.completion_tokens, 1)).toFixed(2)} base passes a token`);
    if (uniarm.unguided_tokens) parts.push(`${uniarm.unguided_tokens} tokens UNGUIDED`);
    this.foot.textContent = parts.join(" · ");
    this.card.dataset.state = "done";
  }

  #fail(error) {
    const stopped = error.name === "AbortError";
    this.card.dataset.state = stopped ? "stopped" : "failed";
    if (stopped) {
      this.foot.textContent = `stopped after ${this.entries.length} tokens`;
      return;
    }
    const message = error instanceof TypeError ? "The router cannot be reached. Is it still running?" : error.message;
    const later = error.retryAfterMs ? ` Try again in ${Math.ceil(error.retryAfterMs / 1000)} s.` : "";
    const shown = node("p", "error", `${message}${later}`);
    shown.setAttribute("role", "alert");
    if (error.code) shown.append(" ", node("code", "", error.code));
    this.foot.replaceChildren(shown);
  }

  #listen() {
    const inspected = (event) => event.target.closest?.(".token");
    this.text.addEventListener("pointerover", (event) => inspected(event) && inspect(inspected(event)));
    this.text.addEventListener("pointerleave", () => this.text.contains(document.activeElement) || hide());
    this.text.addEventListener("focusin", (event) => inspected(event) && inspect(inspected(event)));
    this.text.addEventListener("focusout", hide);
    this.text.addEventListener("pointerdown", (event) => inspected(event)?.focus());
    this.text.addEventListener("keydown", (event) => {
      const token = inspected(event);
      const next = { ArrowRight: "nextElementSibling", ArrowLeft: "previousElementSibling" }[event.key];
      const edge = { Home: "firstElementChild", End: "lastElementChild" }[event.key];
      const target = next ? token?.[next] : edge ? this.text[edge] : null;
      if (!target) return;
      event.preventDefault();
      token.tabIndex = -1;
      target.tabIndex = 0;
      target.focus();
    });
  }
}

/** An element of a class with text or children. */
export function node(name, className, ...children) {
  const made = document.createElement(name);
  if (className) made.className = className;
  made.append(...children);
  return made;
}

export function hide() {
  inspector().hidden = true;
}

function bucket(shift) {
  const size = SHIFTS.filter((edge) => Math.abs(shift) >= edge).length;
  return shift < 0 ? -size : size;
}

const pace = (tokens, ms) => `${tokens} tokens · ${((1000 * tokens) / Math.max(ms, 1)).toFixed(1)} a second`;

const percent = (logprob) => {
  const share = 100 * Math.exp(logprob);
  return share >= 99.95 ? "100 %" : share >= 0.1 ? `${share.toFixed(1)} %` : "< 0.1 %";
};

/** A token's text with what cannot be seen made visible. */
const visible = (text) => text.replace(/ /g, "␣").replace(/\n/g, "⏎").replace(/\t/g, "⇥") || "∅";

// === the inspector ===

function inspect(token) {
  const { entry } = token;
  const { base_logprob: base, reward_contribution: reward } = entry.uniarm;
  const factor = Math.exp(entry.logprob - base);
  const change = Math.abs(factor - 1) < 0.005 ? "as likely as without" : factor > 1 ? `${short(factor)} × as likely` : `${short(1 / factor)} × less likely`;
  const facts = node("dl", "");
  for (const [name, value] of [
    ["base model", `${percent(base)} (log ${signed(base)})`],
    ["guided", `${percent(entry.logprob)} (log ${signed(entry.logprob)})`],
    ["reward adds", `${signed(reward)} nats`],
  ]) facts.append(node("dt", "", name), node("dd", "", value));
  const title = node("p", "title", node("code", "", visible(entry.token)), ` ${change}`);
  const key = node("p", "key", ...["base", "guided"].map((kind) => node("span", kind, node("i", ""), kind)));
  inspector().replaceChildren(title, facts, key, runnersUp(entry));
  inspector().hidden = false;
  place(inspector(), token.getBoundingClientRect());
}

const signed = (number) => number.toFixed(2).replace("-", "−");

const short = (factor) => (factor >= 100 ? Math.round(factor) : Number(factor.toPrecision(2)));

function runnersUp(entry) {
  const list = node("ol", "runners");
  list.setAttribute("aria-label", "Most probable tokens here: base model, guided");
  for (const other of entry.top_logprobs) {
    const row = node("li", other.uniarm.id === entry.uniarm.id ? "chosen" : "", node("code", "", visible(other.token)));
    for (const [kind, logprob] of [["base", other.uniarm.base_logprob], ["guided", other.logprob]]) {
      const bar = node("meter", kind);
      Object.assign(bar, { min: 0, max: 1, value: Math.exp(logprob), title: `${kind} ${percent(logprob)}` });
      bar.setAttribute("aria-label", kind);
      row.append(bar);
    }
    row.append(node("small", "", percent(other.logprob)));
    list.append(row);
  }
  return list;
}

/** Below the token, or above where there is no room. Phones have it at the bottom of the screen, by style. */
function place(panel, { left, top, bottom }) {
  const { offsetWidth: width, offsetHeight: height } = panel;
  // Without the gutter of the scroll bar, which the window counts.
  const x = Math.min(Math.max(8, left), document.body.clientWidth - width - 8);
  const y = bottom + height + 12 > innerHeight && top > height + 12 ? top - height - 8 : bottom + 8;
  panel.style.setProperty("--x", `${x}px`);
  panel.style.setProperty("--y", `${y}px`);
}
