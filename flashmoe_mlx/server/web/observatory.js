/** The observatory: what the experts of the model do. */

/**
 * Draw the observatory in `element`, and return a function that ends it.
 *
 * `feed.events(signal)` yields the events of `/observatory/events` until `signal` aborts; `feed.state()` returns a
 * promise of `/observatory/state`. Both send the API key.
 */
export function mount(element, feed) {
  void feed;
  element.replaceChildren();
  return () => element.replaceChildren();
}
