// Causal linear attention over chunks on a CPU: what forms with a decay per head or token and per channel share.
#pragma once
#include "native_tiles.h"

namespace {

constexpr int64_t ROW_TILE = 24; // a multiple of every ROWS
// Powers below this are zero even in float64.
constexpr double LEAST = -800;

inline int64_t row_end(int64_t row, int64_t rows) { return std::min(row + ROW_TILE, rows); }

} // namespace

extern "C" {

enum Decay : int64_t { NONE = 0, PER_HEAD = 1, PER_TOKEN = 2 };

// Shapes of one call; the same order in native_linear.py.
struct LinearProblem {
  int64_t batch, heads, kv_heads, length, dim, value_dim, normalize, decay, chunk, keep, threads;
  float scale, eps;
};
}

namespace {

void copy_rows(const float* from, int64_t width, int64_t rows, float* to, int64_t stride) {
  for (int64_t i = 0; i < rows; ++i) {
    std::memcpy(to + i * stride, from + i * width, width * sizeof(float));
    std::fill(to + i * stride + width, to + (i + 1) * stride, 0.f);
  }
}

struct Scratch {
  std::vector<float> query, key, value, across, scores, out, faded, state, powers;
  std::vector<float> grads, slopes, value_across, state_across, moved, states, toward;
  std::vector<double> run;
};

struct Linear : LinearProblem {
  const float *query, *key, *value, *decays;
  int64_t wide, deep, columns, chunks, kept; // padded widths of values and keys, padded chunk, and their counts

  Linear(const LinearProblem& p, const float* q, const float* k, const float* v, const float* g)
      : LinearProblem(p), query(q), key(k), value(v), decays(g), wide(round_up(value_dim + normalize, PANEL)),
        deep(round_up(dim, PANEL)), columns(round_up(chunk, PANEL)), chunks((length + chunk - 1) / chunk),
        kept((chunks + keep - 1) / keep) {}

  int64_t lane_of_keys(int64_t lane) const { return lane / heads * kv_heads + lane % heads / (heads / kv_heads); }
  int64_t rows_of(int64_t c) const { return std::min(chunk, length - c * chunk); }

  Scratch forward_scratch() const {
    Scratch s;
    s.key.resize(columns * deep), s.value.resize(columns * wide), s.across.resize(columns * dim);
    s.scores.resize(ROW_TILE * columns), s.out.resize(ROW_TILE * wide), s.faded.resize(columns * deep);
    s.state.resize(dim * wide), s.powers.resize(chunk), s.run.resize(chunk);
    return s;
  }

  // Powers of a decay that is the same for all tokens, the largest distance first.
  void prepare(int64_t lane, Scratch& s) const {
    if (decay == PER_HEAD)
      for (int64_t n = 0; n < chunk; ++n)
        s.powers[chunk - 1 - n] = float(std::exp(n * std::max(double(decays[lane % heads]), LEAST)));
  }

  // The logarithm of what is left of the state before the chunk, after each of its tokens.
  void run_of(int64_t lane, int64_t c, Scratch& s) const {
    const int64_t rows = rows_of(c);
    double sum = 0;
    for (int64_t i = 0; i < rows; ++i) {
      if (decay == PER_TOKEN) sum += std::max(double(decays[lane * length + c * chunk + i]), LEAST);
      else if (decay == PER_HEAD) sum += std::max(double(decays[lane % heads]), LEAST);
      s.run[i] = sum;
    }
  }

  // One row of scores times scale and decay, zero after the diagonal up to `end`.
  void weigh(float* line, int64_t i, int64_t end, const Scratch& s) const {
    if (decay == NONE) {
      for (int64_t j = 0; j <= i; ++j) line[j] *= scale;
    } else if (decay == PER_HEAD) {
      const float* power = s.powers.data() + chunk - 1 - i;
      for (int64_t j = 0; j <= i; ++j) line[j] *= power[j] * scale;
    } else {
      float gap[PANEL];
      for (int64_t j = 0; j <= i; j += LANES) {
        const int64_t part = std::min<int64_t>(LANES, i + 1 - j);
        for (int64_t n = 0; n < part; ++n) gap[n] = float((s.run[i] - s.run[j + n]) * LOG2E);
        for (int64_t n = part; n < LANES; ++n) gap[n] = 0;
        store(line + j, load(line + j) * exp2v(load(gap)) * scale);
      }
    }
    std::fill(line + i + 1, line + end, 0.f);
  }

  float left(int64_t i, const Scratch& s) const { return decay == NONE ? 1.f : float(std::exp(s.run[i])); }
  float leaving(int64_t j, int64_t rows, const Scratch& s) const {
    return decay == NONE ? 1.f : float(std::exp(s.run[rows - 1] - s.run[j]));
  }

  void load_values(int64_t lane, int64_t c, float* to) const {
    const int64_t rows = rows_of(c);
    copy_rows(value + (lane_of_keys(lane) * length + c * chunk) * value_dim, value_dim, rows, to, wide);
    if (normalize)
      for (int64_t i = 0; i < rows; ++i) to[i * wide + value_dim] = 1;
  }

  const float* keys(int64_t lane, int64_t c) const { return key + (lane_of_keys(lane) * length + c * chunk) * dim; }

  // Keys as they count at the chunk's end.
  void fade_keys(const float* k, int64_t rows, Scratch& s) const {
    for (int64_t j = 0; j < rows; ++j) {
      const float by = leaving(j, rows, s);
      for (int64_t n = 0; n < dim; ++n) s.faded[j * deep + n] = k[j * dim + n] * by;
    }
  }

  // The state after a chunk, from that before it.
  void advance(float* state, int64_t rows, const Scratch& s) const {
    if (decay != NONE) {
      // In double: a float near one is off by up to 3e-8, which a state that is updated very often would show.
      const double fade = std::exp(s.run[rows - 1]);
      for (int64_t n = 0; n < dim * wide; ++n) state[n] = float(state[n] * fade);
    }
    product(true, dim, wide, rows, s.faded.data(), 1, deep, {s.value.data(), wide, PANEL}, state, wide);
  }

  void initial_state(const float* initial, int64_t lane, float* state) const {
    const int64_t width = value_dim + normalize;
    if (initial) copy_rows(initial + lane * dim * width, width, dim, state, wide);
    else std::fill_n(state, dim * wide, 0.f);
  }

  void final_state(const float* state, int64_t lane, float* to) const {
    const int64_t width = value_dim + normalize;
    for (int64_t n = 0; n < dim; ++n) std::memcpy(to + (lane * dim + n) * width, state + n * wide, width * sizeof(float));
  }
};

} // namespace
