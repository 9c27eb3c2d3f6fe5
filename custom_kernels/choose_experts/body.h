// The experts with the highest scores of a token, of equal scores the first; ascending, with their softmax:
// over the chosen scores if RENORMALIZED, else over all scores. They may join a list of experts of earlier layers. A
// shared expert (SHARED_EXPERT is 1) has the sigmoid of the last score.
// Grid: x = tokens, one simdgroup each. Lane n keeps the scores of experts n, n + 32 and so on.

const int token = threadgroup_position_in_grid.x;
const int lane = thread_index_in_simdgroup;
constexpr int OWN = (EXPERTS + 31) / 32;

float score[OWN];
#pragma unroll
for (int i = 0; i < OWN; i++) {
  const int expert = 32 * i + lane;
  score[i] = expert < EXPERTS ? float(scores[(long)token * WIDTH + expert]) : LOWEST;
}

int mine = 0;          // lane n keeps the choice of rank n
float value = LOWEST;  // and its score
float highest = 0.0f;
for (int k = 0; k < CHOSEN; k++) {
  float best = LOWEST;
  float at = float(EXPERTS);
#pragma unroll
  for (int i = 0; i < OWN; i++) {
    if (score[i] > best) {
      best = score[i];
      at = float(32 * i + lane);
    }
  }
  const float most = simd_max(best);
  const float first = -simd_max(best == most ? -at : -float(EXPERTS));
  const int winner = first < float(EXPERTS) ? int(first) : EXPERTS - 1;  // scores that are not numbers win nothing
#pragma unroll
  for (int i = 0; i < OWN; i++) {
    if (32 * i + lane == winner) {
      score[i] = LOWEST;
    }
  }
  if (k == 0) {
    highest = most;
  }
  if (lane == k) {
    mine = winner;
    value = most;
  }
}

SHARED int picked[32];
picked[lane] = mine;
wait_for_threadgroup();
const float weight = lane < CHOSEN ? exponential(value - highest) : 0.0f;
float unchosen = 0.0f;
if (!RENORMALIZED) {
#pragma unroll
  for (int i = 0; i < OWN; i++) {
    unchosen += exponential(score[i] - highest);  // 0 for the scores of chosen experts, which were replaced
  }
}
const float total = simd_sum(weight + unchosen);
if (lane < CHOSEN) {
  int rank = 0;
  for (int k = 0; k < CHOSEN; k++) {
    rank += picked[k] < mine || (picked[k] == mine && k < lane) ? 1 : 0;
  }
#if WITH_EARLIER
  chosen[earlier_shape[0] + token * CHOSEN + rank] = mine;
#else
  chosen[token * CHOSEN + rank] = mine;
#endif
  places[token * CHOSEN + rank] = table[mine];
  weights[token * (CHOSEN + SHARED_EXPERT) + rank] = weight / total;
}
#if WITH_EARLIER
for (int i = lane; token == 0 && i < earlier_shape[0]; i += 32) {
  chosen[i] = earlier[i];
}
#endif
if (SHARED_EXPERT && lane == 0) {
  const float logit = float(scores[(long)token * WIDTH + EXPERTS]);
  weights[token * (CHOSEN + SHARED_EXPERT) + CHOSEN] = 1.0f / (1.0f + exponential(-logit));
}
