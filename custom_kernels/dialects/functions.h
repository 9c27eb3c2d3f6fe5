// Activation functions.

inline float silu(float x) {
  return x / (1.0f + exponential(-x));
}

// Below every score, and far enough from infinity that differences stay numbers.
constant constexpr float LOWEST = -1e30f;
