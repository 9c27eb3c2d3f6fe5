/** One answer of the model: asks the server and writes what comes into a message of the conversation. */

import * as api from "./api.js";
import { toApi } from "./conversation.js";

/** Return the body of the request for the message after `parent`. */
export function requestBody(model, conversation, parent) {
  const { tools, thinking, sampling } = conversation.settings;
  const body = {
    model,
    messages: toApi(conversation, parent),
    stream: true,
    stream_options: { include_usage: true },
    ...sampling,
  };
  if (tools.trim()) body.tools = JSON.parse(tools);
  if (thinking) body.chat_template_kwargs = { enable_thinking: thinking === "on" };
  return body;
}

/** Return the fields of a message that is being written. */
export function emptyAnswer() {
  return { role: "assistant", content: "", reasoning: "", calls: [], state: "writing" };
}

/** An answer in progress. */
export class Answer {
  /** `node` is the message to write into; `onChange` is called after every change. */
  constructor(node, onChange) {
    this.node = node;
    this.onChange = onChange;
    this.abort = new AbortController();
  }

  /** End the answer; what has come stays. */
  stop() {
    this.abort.abort();
  }

  /** Ask the server with `body`. Errors become the state of the message. */
  async run(body) {
    const { node } = this;
    const begun = performance.now();
    const seconds = () => (performance.now() - begun) / 1000;
    try {
      let complete = false;
      for await (const chunk of api.events("v1/chat/completions", { body, signal: this.abort.signal })) {
        if (chunk === null) {
          complete = true;
          break;
        }
        if (chunk.error) throw new api.RequestFailed(chunk.error.message, 200, chunk.error.code);
        this.#take(chunk, seconds());
        this.onChange();
      }
      if (!complete) throw new api.RequestFailed("the connection ended before the answer was complete");
      node.state = "done";
    } catch (error) {
      node.state = error.name === "AbortError" ? "stopped" : "failed";
      if (node.state === "failed") node.error = error.message;
      if (!(error instanceof api.RequestFailed) && node.state === "failed") console.error(error);
    }
    node.seconds = seconds();
    this.onChange();
  }

  #take(chunk, seconds) {
    const { node } = this;
    if (chunk.usage) {
      node.usage = {
        prompt: chunk.usage.prompt_tokens,
        cached: chunk.usage.prompt_tokens_details?.cached_tokens ?? 0,
        completion: chunk.usage.completion_tokens,
      };
    }
    const choice = chunk.choices[0];
    if (!choice) return;
    if (choice.finish_reason) node.finish = choice.finish_reason;
    const { content, reasoning_content: reasoning, tool_calls: calls } = choice.delta;
    if (!content && !reasoning && !calls) return;
    node.first ??= seconds;
    if (reasoning) node.reasoning += reasoning;
    if ((content || calls) && node.reasoning) node.thought ??= seconds;
    if (content) node.content += content;
    for (const call of calls ?? []) {
      node.calls[call.index] ??= { id: call.id, name: call.function.name, arguments: "" };
      node.calls[call.index].arguments += call.function.arguments ?? "";
    }
  }
}
