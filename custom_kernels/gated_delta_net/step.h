// GatedDeltaNet for a few tokens, one value head per threadgroup: convolution and SiLU, normalized q and k, decay and
// beta, the recurrence with its state in registers, the gated RMS norm. Grid: x = value heads, y = sequences, with equal
// numbers of tokens.
//
// A simdgroup holds ROWS rows of the state; lane l holds columns l, l + 32, ...

const int head = threadgroup_position_in_grid.x;
const int key_head = head / (VALUE_HEADS / KEY_HEADS);
const int mine = thread_index_in_threadgroup;
const int lane = thread_index_in_simdgroup;
const int first_row = int(simdgroup_index_in_threadgroup) * ROWS;
const int sequence = threadgroup_position_in_grid.y;
const int tokens = qkv_shape[0] / recurrent_state_shape[0], before = sequence * tokens;  // tokens of earlier sequences
const long own_state = ((long)sequence * VALUE_HEADS + head) * VALUE_DIM;
const int key_width = KEY_HEADS * KEY_DIM, value_width = VALUE_HEADS * VALUE_DIM;
const int channels = 2 * key_width + value_width;
const int mixed_size = 2 * KEY_DIM + VALUE_DIM;  // q, k and v of this head
const int first_input = (sequence + 1) * (TAPS - 1);  // of the convolution, after those in conv_state

SHARED float mixed[2 * KEY_DIM + VALUE_DIM];
SHARED float out[VALUE_DIM];

float memory[ROWS * COLUMNS];
#pragma unroll
for (int i = 0; i < ROWS; i++) {
#pragma unroll
  for (int j = 0; j < COLUMNS; j++) {
    memory[i * COLUMNS + j] = recurrent_state[(own_state + first_row + i) * KEY_DIM + lane + 32 * j];
  }
}

for (int token = 0; token < tokens; token++) {
  for (int c = mine; c < mixed_size; c += THREADS) {
    const int channel = c < 2 * KEY_DIM ? c / KEY_DIM * key_width + key_head * KEY_DIM + c % KEY_DIM
                                        : 2 * key_width + head * VALUE_DIM + c - 2 * KEY_DIM;
    float sum = 0.0f;
#pragma unroll
    for (int tap = 0; tap < TAPS; tap++) {
      const int at = token + tap - (TAPS - 1);
      const float value = at < 0 ? float(conv_state[(long)(first_input + at) * channels + channel])
                                 : float(qkv[(long)(before + at) * channels + channel]);
      sum += value * float(convolution[channel * TAPS + tap]);
    }
    mixed[c] = silu(sum);
  }
  wait_for_threadgroup();

  float q[COLUMNS], k[COLUMNS];
  float q_square = 0.0f, k_square = 0.0f, q_times_k = 0.0f;
#pragma unroll
  for (int j = 0; j < COLUMNS; j++) {
    q[j] = mixed[lane + 32 * j];
    k[j] = mixed[KEY_DIM + lane + 32 * j];
    q_square += q[j] * q[j];
    k_square += k[j] * k[j];
  }
  const float q_scale = reciprocal_root(simd_sum(q_square) + 1e-6f) * reciprocal_root(float(KEY_DIM));
  const float k_scale = reciprocal_root(simd_sum(k_square) + 1e-6f);
#pragma unroll
  for (int j = 0; j < COLUMNS; j++) {
    q[j] *= q_scale;
    k[j] *= k_scale;
    q_times_k += q[j] * k[j];
  }
  q_times_k = simd_sum(q_times_k);

  const float beta = 1.0f / (1.0f + exponential(-float(b[(before + token) * VALUE_HEADS + head])));
  const float step = float(a[(before + token) * VALUE_HEADS + head]) + float(dt_bias[head]);
  const float softplus = step > 20.0f ? step : logarithm(1.0f + exponential(step));
  const float decay = exponential(-exponential(float(a_log[head])) * softplus);

  // y = S_new q with S_new = decay S + change k^T, so one pass over the old state gives both S k and S q.
#pragma unroll
  for (int i = 0; i < ROWS; i++) {
    float recalled = 0.0f, asked = 0.0f;
#pragma unroll
    for (int j = 0; j < COLUMNS; j++) {
      recalled += memory[i * COLUMNS + j] * k[j];
      asked += memory[i * COLUMNS + j] * q[j];
    }
    recalled = simd_sum(recalled) * decay;
    asked = simd_sum(asked) * decay;
    const float change = beta * (mixed[2 * KEY_DIM + first_row + i] - recalled);
#pragma unroll
    for (int j = 0; j < COLUMNS; j++) {
      memory[i * COLUMNS + j] = memory[i * COLUMNS + j] * decay + change * k[j];
    }
    if (lane == 0) {
      out[first_row + i] = asked + change * q_times_k;
    }
  }
  wait_for_threadgroup();

  float square = 0.0f;
  for (int c = lane; c < VALUE_DIM; c += 32) {
    square += out[c] * out[c];
  }
  const float scale = reciprocal_root(simd_sum(square) / float(VALUE_DIM) + as_type<float>(EPS));
  for (int c = mine; c < VALUE_DIM; c += THREADS) {
    const long at = (long)(before + token) * value_width + head * VALUE_DIM + c;
    y[at] = T(out[c] * scale * float(norm[c]) * silu(float(z[at])));
  }
}

#pragma unroll
for (int i = 0; i < ROWS; i++) {
#pragma unroll
  for (int j = 0; j < COLUMNS; j++) {
    new_recurrent_state[(own_state + first_row + i) * KEY_DIM + lane + 32 * j] = memory[i * COLUMNS + j];
  }
}
// Store the last inputs of the convolution; several value heads share q and k, and the first of them stores these.
const bool writes_keys = head % (VALUE_HEADS / KEY_HEADS) == 0;
for (int c = mine; c < mixed_size; c += THREADS) {
  if (c < 2 * KEY_DIM && !writes_keys) {
    continue;
  }
  const int channel = c < 2 * KEY_DIM ? c / KEY_DIM * key_width + key_head * KEY_DIM + c % KEY_DIM
                                      : 2 * key_width + head * VALUE_DIM + c - 2 * KEY_DIM;
  for (int place = 0; place < TAPS - 1; place++) {
    const int at = tokens + place - (TAPS - 1);
    new_conv_state[(long)(sequence * (TAPS - 1) + place) * channels + channel] =
        at < 0 ? conv_state[(long)(first_input + at) * channels + channel]
               : qkv[(long)(before + at) * channels + channel];
  }
}
