// Text to tokens and back, and conversations to prompts.  The counterpart of engine/tokenizer.py and engine/template.py
// in runtime/mbq_runtime.

import { Template } from "@huggingface/jinja";
import { Tokenizer as Native } from "@huggingface/tokenizers";
import { MbqError } from "./errors.js";

const INCOMPLETE = "\uFFFD";  // what a decoder gives for bytes that are not yet a character
const DECODE = { skip_special_tokens: true, clean_up_tokenization_spaces: false };
const REASONING = ["reasoning_content", "thinking", "reasoning"];

export class Tokenizer {
  // document: tokenizer.json; config: tokenizer_config.json or {}; template: text of chat_template.jinja or null.
  constructor(document, config, template) {
    this.native = new Native(document, { ...config, clean_up_tokenization_spaces: false });
    this.special = new Set();
    for (const [id, token] of this.native.get_added_tokens_decoder()) if (token.special) this.special.add(id);
    this.bytes = new Set();
    for (let byte = 0; byte < 256; byte++) {
      const id = this.native.token_to_id(`<0x${byte.toString(16).toUpperCase().padStart(2, "0")}>`);
      if (id !== undefined) this.bytes.add(id);
    }
    const given = config.chat_template;
    const source = template ?? (Array.isArray(given) ? given.find(entry => entry.name === "default")?.template : given);
    this.template = source ? parsed(source) : null;
    this.names = specialTokens(config);
  }

  encode(text) {
    return text ? this.native.encode(text, { add_special_tokens: false }).ids : [];
  }

  decode(ids) {
    return ids.length ? this.native.decode(ids, DECODE) : "";
  }

  // What the tokenizer puts before every text: often [bos], or nothing.
  get openingTokens() {
    const plain = this.encode("a"), full = this.native.encode("a", { add_special_tokens: true }).ids;
    const opening = full.slice(0, full.length - plain.length);
    return String(full.slice(opening.length)) === String(plain) ? opening : [];
  }

  get hasChatTemplate() {
    return this.template !== null;
  }

  // messages: [{role, content}]; options: variables of the template.
  chatPrompt(messages, options = {}) {
    if (!this.template) throw new MbqError("usage", "the bundle has no chat template; give the prompt as a text");
    const given = messages.map(message => {
      const held = Object.fromEntries(Object.entries(message).filter(([, value]) => value !== null && value !== undefined));
      const reasoning = REASONING.map(name => held[name]).find(value => value !== undefined);
      return reasoning === undefined ? held : { thinking: reasoning, ...held, reasoning_content: reasoning };
    });
    try {
      return this.template.render(
        { ...this.names, messages: given, tools: null, documents: null, add_generation_prompt: true, ...options });
    } catch (error) {
      throw new MbqError("usage", `the chat template does not take this conversation: ${error.message}`);
    }
  }

  stream() {
    return new TextStream(this);
  }
}

function parsed(source) {
  try {
    return new Template(source);
  } catch (error) {
    throw new MbqError("unsupported", `this page cannot read the bundle's chat template: ${error.message}; run the bundle ` +
      "with mbq chat");
  }
}

function specialTokens(config) {
  const found = {};
  for (const group of [config.model_specific_special_tokens, config.extra_special_tokens, config]) {
    if (typeof group !== "object" || group === null || Array.isArray(group)) continue;
    for (const [name, value] of Object.entries(group)) {
      const text = typeof value === "object" && value !== null ? value.content : value;
      if (typeof text === "string" && (group !== config || name.endsWith("_token"))) found[name] = text;
    }
  }
  return found;
}

// Decodes the tokens of one reply as they come.  Text waits while it may still change: after an incomplete character,
// and after a token of one byte.
class TextStream {
  constructor(tokenizer) {
    this.tokenizer = tokenizer;
    this.window = [];  // decoders look at the tokens before: the last ones that gave text stay
    this.given = 0;
    this.givenText = "";
  }

  add(token) {
    if (this.tokenizer.special.has(token)) return "";
    this.window.push(token);
    if (this.tokenizer.bytes.has(token)) return "";
    const text = this.tokenizer.decode(this.window);
    return text.endsWith(INCOMPLETE) ? "" : this.#take(text);
  }

  rest() {
    return this.#take(this.tokenizer.decode(this.window));
  }

  #take(text) {
    const found = text.slice(this.givenText.length);
    if (found) {
      this.window.splice(0, this.given);
      this.given = this.window.length;
      this.givenText = this.tokenizer.decode(this.window);
    }
    return found;
  }
}
