/**
 * A conversation: a tree of messages, so that an edited question or a second answer replaces nothing.
 *
 * It is plain data, as the browser stores it: `nodes` maps ids to messages, each with its `parent`, and `head` is the id
 * of the latest message in view. Roles are those of the API: user, assistant, tool.
 */

const LONGEST_TITLE = 80;

/** The settings of a new conversation; empty ones leave the choice to the server. */
export const DEFAULT_SETTINGS = Object.freeze({ system: "", tools: "", thinking: "", sampling: {} });

/** Return a new id. */
export function newId() {
  // randomUUID exists only on localhost and with https.
  return [...crypto.getRandomValues(new Uint8Array(12))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** Return a new, empty conversation. */
export function newConversation(settings = DEFAULT_SETTINGS) {
  const now = Date.now();
  return {
    id: newId(),
    title: "",
    created: now,
    updated: now,
    revision: 0,
    settings: structuredClone(settings),
    nodes: {},
    head: null,
    draft: "",
  };
}

/** Add a message after `parent`, bring it into view, and return it. */
export function addMessage(conversation, parent, message) {
  const node = { id: newId(), parent, created: Date.now(), ...message };
  conversation.nodes[node.id] = node;
  conversation.head = node.id;
  conversation.updated = node.created;
  if (!conversation.title && node.role === "user") conversation.title = titleOf(node.content);
  return node;
}

function titleOf(text) {
  const line = text.trim().split("\n", 1)[0];
  const letters = [...line];
  return letters.length > LONGEST_TITLE ? `${letters.slice(0, LONGEST_TITLE - 1).join("")}…` : line;
}

/** Return the messages from the first one to `end`, by default to the latest one in view. */
export function messagesTo(conversation, end = conversation.head) {
  const path = [];
  for (let id = end; id !== null; id = conversation.nodes[id].parent) path.push(conversation.nodes[id]);
  return path.reverse();
}

/** Return the alternatives to a message, itself among them, oldest first. */
export function alternatives(conversation, node) {
  return Object.values(conversation.nodes)
    .filter((other) => other.parent === node.parent && other.role === node.role)
    .sort((one, other) => one.created - other.created);
}

/** Bring a message into view, with the latest messages that follow it. */
export function bringIntoView(conversation, node) {
  let latest = node;
  for (;;) {
    const following = Object.values(conversation.nodes).filter((other) => other.parent === latest.id);
    if (following.length === 0) break;
    latest = following.reduce((one, other) => (other.created >= one.created ? other : one));
  }
  conversation.head = latest.id;
}

/** Remove a message that nothing follows; the message before it comes into view. */
export function removeLast(conversation, node) {
  delete conversation.nodes[node.id];
  conversation.head = node.parent;
}

/** Return the calls of an answer that have no result yet, given the messages in view. */
export function openCalls(path) {
  const last = path.findLastIndex((node) => node.role === "assistant");
  if (last < 0 || path[last].state !== "done") return [];
  const answered = new Set(path.slice(last + 1).map((node) => node.call));
  return path.slice(last + 1).some((node) => node.role === "user")
    ? []
    : completeCalls(path[last]).filter((call) => !answered.has(call.id));
}

/** Return the calls of an answer whose arguments are complete. */
export function completeCalls(node) {
  return (node.calls ?? []).filter((call) => {
    try {
      return typeof JSON.parse(call.arguments || "{}") === "object";
    } catch {
      return false;
    }
  });
}

/** Return the messages of the API for the conversation up to `end`. */
export function toApi(conversation, end) {
  const messages = messagesTo(conversation, end).flatMap((node) => {
    if (node.role === "user") return [{ role: "user", content: node.content }];
    if (node.role === "tool") return [{ role: "tool", tool_call_id: node.call, content: node.content }];
    const calls = completeCalls(node).map((call) => ({
      id: call.id,
      type: "function",
      function: { name: call.name, arguments: call.arguments || "{}" },
    }));
    const message = { role: "assistant", content: node.content };
    if (node.reasoning) message.reasoning_content = node.reasoning;
    if (calls.length) message.tool_calls = calls;
    return [message];
  });
  const system = conversation.settings.system.trim();
  return system ? [{ role: "system", content: system }, ...messages] : messages;
}
