/** Frames of the feed, as `flashmoe_mlx/server/observed.py` makes them, and their way into a history. */

const bytes = (text) => Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
const words = (text) => new Uint16Array(bytes(text).buffer);

/** Add the content of `frame` to `history`. */
export function addFrame(history, frame, now) {
  const { layers, num_experts: width, experts_k: k } = history.shape;
  const { passes, rest } = frame;
  if (rest) history.addRest({ ...rest, used: words(rest.used), read: words(rest.read) }, now);
  const experts = width <= 256 ? bytes(frame.experts) : words(frame.experts);
  const bits = bytes(frame.missed);
  const size = layers * k;
  frame.positions.forEach((position, index) => {
    const missed = Uint8Array.from({ length: size }, (_, place) => {
      const bit = index * size + place;
      return (bits[bit >> 3] >> (bit & 7)) & 1;
    });
    const token = { experts: experts.subarray(index * size, (index + 1) * size), missed, position };
    history.addToken({ ...token, answer: frame.answers[index], text: frame.texts[index] }, now);
  });
  for (let row = 0; row < passes.seconds.length; row++) {
    history.addPass(Object.fromEntries(Object.entries(passes).map(([name, values]) => [name, values[row]])));
  }
}
