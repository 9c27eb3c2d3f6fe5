// Activation functions.

inline float silu(float x) {
  return x / (1.0f + exponential(-x));
}

// Less than every score, and far enough from infinity that differences are finite.
constant constexpr float LOWEST = -1e30f;

// Return the angle of a rotary embedding, position * frequency, in revolutions between -1/2 and 1/2. The frequency is
// in revolutions per position, rounded to f32; `lost` is its rounding error. Whole revolutions are subtracted before
// the angle is rounded, so the result is exact at any position; one float would lose a digit for every power of ten.
inline float rotary_revolutions(float position, float frequency, float lost) {
  const float revolutions = position * frequency;
  const float rest = multiply_add(position, frequency, -revolutions) + position * lost;
  return (revolutions - nearest(revolutions)) + rest;
}

// Return 1 / sqrt(mean of squares + eps) of `width` values; simdgroup i has stored its sum of squares in squares[i].
inline float root_mean_square_scale(const threadgroup float* squares, int simdgroups, int width, float eps) {
  float sum = 0.0f;
  for (int i = 0; i < simdgroups; i++) {
    sum += squares[i];
  }
  return reciprocal_root(sum / float(width) + eps);
}
