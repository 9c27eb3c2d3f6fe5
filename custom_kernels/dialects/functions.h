// Activation functions.

inline float silu(float x) {
  return x / (1.0f + exponential(-x));
}

// Below every score, and far enough from infinity that differences stay numbers.
constant constexpr float LOWEST = -1e30f;

// The angle of a rotary embedding, position * frequency, in turns between -1/2 and 1/2. The frequency is in turns, rounded
// to f32, and `lost` is what the rounding lost. Whole turns are taken off before the angle is rounded: exact at any
// position, where one float would lose a digit for every power of ten.
inline float rotary_turns(float position, float frequency, float lost) {
  const float turns = position * frequency;
  const float rest = multiply_add(position, frequency, -turns) + position * lost;
  return (turns - nearest(turns)) + rest;
}
