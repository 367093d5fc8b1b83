// Causal linear attention in float32 for CPUs (see linear.py for the recurrence, native_linear.py for the calls).
//
// A head's sequence is walked in chunks with the state in cache: what happens inside a chunk is a triangle of products, what
// came before it is one product with the state. Backward walks the chunks from the end, over stretches whose states are formed
// again from those that the forward pass kept.
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

struct LinearForward : Linear {
  const float* initial;
  float *out, *last, *states, *totals;

  Scratch scratch() const { return forward_scratch(); }

  void operator()(int64_t lane, Scratch& s) const {
    prepare(lane, s);
    initial_state(initial, lane, s.state.data());
    for (int64_t c = 0; c < chunks; ++c) {
      if (states && c % keep == 0)
        std::memcpy(states + (lane * kept + c / keep) * dim * wide, s.state.data(), dim * wide * sizeof(float));
      run(lane, c, s);
    }
    final_state(s.state.data(), lane, last);
  }

  void run(int64_t lane, int64_t c, Scratch& s) const {
    const int64_t rows = rows_of(c), first = lane * length + c * chunk;
    const float *q = query + first * dim, *k = keys(lane, c);
    if (decay != PER_HEAD || c == 0 || rows < chunk) run_of(lane, c, s);
    pack_columns(k, dim, dim, rows, dim * PANEL, s.across.data());
    load_values(lane, c, s.value.data());
    for (int64_t row = 0; row < rows; row += ROW_TILE) {
      const int64_t end = row_end(row, rows), some = end - row, seen = round_up(end, PANEL);
      product(false, some, seen, dim, q + row * dim, dim, 1, {s.across.data(), PANEL, dim * PANEL}, s.scores.data(), columns);
      for (int64_t i = 0; i < some; ++i) {
        weigh(s.scores.data() + i * columns, row + i, seen, s);
        const float by = left(row + i, s) * scale;
        for (int64_t n = 0; n < dim; ++n) s.faded[i * deep + n] = q[(row + i) * dim + n] * by;
      }
      product(false, some, wide, dim, s.faded.data(), deep, 1, {s.state.data(), wide, PANEL}, s.out.data(), wide);
      product(true, some, wide, end, s.scores.data(), columns, 1, {s.value.data(), wide, PANEL}, s.out.data(), wide);
      for (int64_t i = 0; i < some; ++i) {
        const float* line = s.out.data() + i * wide;
        float* to = out + (first + row + i) * value_dim;
        const float by = normalize ? 1.f / (line[value_dim] + eps) : 1.f;
        for (int64_t n = 0; n < value_dim; ++n) to[n] = line[n] * by;
        if (normalize) totals[first + row + i] = line[value_dim];
      }
    }
    fade_keys(k, rows, s);
    advance(s.state.data(), rows, s);
  }
};

struct LinearBackward : Linear {
  const float *states, *totals, *grad_out, *grad_last;
  float *grad_query, *grad_key, *grad_value, *grad_decay, *grad_initial;

  Scratch scratch() const {
    Scratch s = forward_scratch();
    s.scores.resize(columns * columns), s.slopes.resize(columns * columns), s.query.resize(columns * deep);
    s.grads.resize(columns * wide), s.value_across.resize(columns * wide), s.state_across.resize(deep * wide);
    s.states.resize((keep + 1) * dim * wide), s.toward.resize(dim * wide);
    s.out.resize(columns * std::max(deep, wide)), s.moved.resize(columns * deep);
    return s;
  }

  void operator()(int64_t lane, Scratch& s) const {
    prepare(lane, s);
    initial_state(grad_last, lane, s.toward.data());
    for (int64_t stretch = kept - 1; stretch >= 0; --stretch) {
      const int64_t begin = stretch * keep, end = std::min(begin + keep, chunks), size = dim * wide;
      std::memcpy(s.states.data(), states + (lane * kept + stretch) * size, size * sizeof(float));
      for (int64_t c = begin; c < end; ++c) {
        run_of(lane, c, s);
        load_values(lane, c, s.value.data());
        fade_keys(keys(lane, c), rows_of(c), s);
        float* after = s.states.data() + (c - begin + 1) * size;
        std::memcpy(after, after - size, size * sizeof(float));
        advance(after, rows_of(c), s);
      }
      for (int64_t c = end - 1; c >= begin; --c) run(lane, c, s.states.data() + (c - begin) * size, s);
    }
    final_state(s.toward.data(), lane, grad_initial);
  }

  // Gradients of outputs before they are divided.
  void load_grads(int64_t first, int64_t rows, Scratch& s) const {
    copy_rows(grad_out + first * value_dim, value_dim, rows, s.grads.data(), wide);
    for (int64_t i = 0; i < rows && normalize; ++i) {
      const float by = 1.f / (totals[first + i] + eps);
      for (int64_t n = 0; n < value_dim; ++n) s.grads[i * wide + n] *= by;
    }
  }

  // The gradient of what outputs are divided by, which stands in the column after the values. It nearly cancels what comes
  // through the values where one key dominates, so it is made of the same products.
  void add_divisors(int64_t first, int64_t rows, const float* q, const float* state, Scratch& s) const {
    for (int64_t i = 0; i < rows; ++i) {
      const float *p = s.scores.data() + i * columns, *from = s.out.data() + i * deep;
      float *r = s.slopes.data() + i * columns, dot = 0, far = 0;
      for (int64_t j = 0; j <= i; ++j) dot += p[j] * r[j];
      for (int64_t n = 0; n < dim; ++n) far += q[i * dim + n] * from[n];
      const float delta = (dot + far * left(i, s) * scale) / (totals[first + i] + eps);
      for (int64_t j = 0; j <= i; ++j) r[j] -= delta;
      for (int64_t n = 0; n < dim; ++n) s.out[i * deep + n] -= delta * state[n * wide + value_dim];
      s.grads[i * wide + value_dim] = -delta;
    }
  }

  void run(int64_t lane, int64_t c, const float* state, Scratch& s) const {
    const int64_t rows = rows_of(c), first = lane * length + c * chunk;
    const float *q = query + first * dim, *k = keys(lane, c);
    float *dq = grad_query + first * dim, *dk = grad_key + first * dim, *dv = grad_value + first * value_dim;
    run_of(lane, c, s);
    load_values(lane, c, s.value.data());
    load_grads(first, rows, s);
    copy_rows(q, dim, rows, s.query.data(), deep);
    copy_rows(k, dim, rows, s.key.data(), deep);
    fade_keys(k, rows, s);
    pack_columns(k, dim, dim, rows, dim * PANEL, s.across.data());
    pack_columns(s.value.data(), wide, wide, rows, wide * PANEL, s.value_across.data());
    for (int64_t row = 0; row < rows; row += ROW_TILE) {
      const int64_t end = row_end(row, rows), some = end - row, seen = round_up(end, PANEL);
      float *p = s.scores.data() + row * columns, *r = s.slopes.data() + row * columns;
      product(false, some, seen, dim, q + row * dim, dim, 1, {s.across.data(), PANEL, dim * PANEL}, p, columns);
      product(false, some, seen, wide, s.grads.data() + row * wide, wide, 1, {s.value_across.data(), PANEL, wide * PANEL}, r, columns);
      for (int64_t i = 0; i < some; ++i) weigh(p + i * columns, row + i, seen, s);
    }
    // Queries: from the state before, and from keys of the chunk.
    pack_columns(state, wide, wide, dim, wide * PANEL, s.state_across.data());
    product(false, rows, deep, wide, s.grads.data(), wide, 1, {s.state_across.data(), PANEL, wide * PANEL}, s.out.data(), deep);
    if (normalize) add_divisors(first, rows, q, state, s);
    for (int64_t i = 0; i < rows; ++i) {
      weigh(s.slopes.data() + i * columns, i, round_up(row_end(i / ROW_TILE * ROW_TILE, rows), PANEL), s);
      const float by = left(i, s) * scale;
      for (int64_t n = 0; n < deep; ++n) s.out[i * deep + n] *= by;
    }
    for (int64_t row = 0; row < rows; row += ROW_TILE) {
      const int64_t end = row_end(row, rows);
      product(true, end - row, deep, end, s.slopes.data() + row * columns, columns, 1, {s.key.data(), deep, PANEL},
              s.out.data() + row * deep, deep);
    }
    for (int64_t i = 0; i < rows; ++i) std::memcpy(dq + i * dim, s.out.data() + i * deep, dim * sizeof(float));
    // Keys: through the state after, and from queries of the chunk.
    pack_columns(s.toward.data(), wide, wide, dim, wide * PANEL, s.state_across.data());
    product(false, rows, deep, wide, s.value.data(), wide, 1, {s.state_across.data(), PANEL, wide * PANEL}, s.moved.data(), deep);
    for (int64_t j = 0; j < rows; ++j) {
      const float by = leaving(j, rows, s);
      for (int64_t n = 0; n < deep; ++n) s.moved[j * deep + n] *= by;
    }
    for (int64_t row = 0; row < rows; row += ROW_TILE)
      product(true, row_end(row, rows) - row, deep, rows - row, s.slopes.data() + row * columns + row, 1, columns,
              {s.query.data() + row * deep, deep, PANEL}, s.moved.data() + row * deep, deep);
    for (int64_t j = 0; j < rows; ++j) std::memcpy(dk + j * dim, s.moved.data() + j * deep, dim * sizeof(float));
    if (decay != NONE) decay_slope(lane, c, rows, state, s);
    // Values, then the state before.
    product(false, rows, wide, dim, s.faded.data(), deep, 1, {s.toward.data(), wide, PANEL}, s.out.data(), wide);
    for (int64_t row = 0; row < rows; row += ROW_TILE)
      product(true, row_end(row, rows) - row, wide, rows - row, s.scores.data() + row * columns + row, 1, columns,
              {s.grads.data() + row * wide, wide, PANEL}, s.out.data() + row * wide, wide);
    for (int64_t j = 0; j < rows; ++j) std::memcpy(dv + j * value_dim, s.out.data() + j * wide, value_dim * sizeof(float));
    for (int64_t i = 0; i < rows; ++i) {
      const float by = left(i, s) * scale;
      for (int64_t n = 0; n < dim; ++n) s.query[i * deep + n] *= by;
    }
    const float fade = left(rows - 1, s);
    for (int64_t n = 0; n < dim * wide; ++n) s.toward[n] *= fade;
    product(true, dim, wide, rows, s.query.data(), 1, deep, {s.grads.data(), wide, PANEL}, s.toward.data(), wide);
  }

  // By how much each token's own decay moves all that is read at it and after it: sums of q dq - k dk from the chunk's end, where
  // the state after stands for all later chunks.
  void decay_slope(int64_t lane, int64_t c, int64_t rows, const float* state, const Scratch& s) const {
    const float* after = state + dim * wide;
    double sum = 0;
    for (int64_t n = 0; n < dim * wide; ++n) sum += double(after[n]) * s.toward[n];
    double whole = 0;
    for (int64_t i = rows - 1; i >= 0; --i) {
      for (int64_t n = 0; n < dim; ++n)
        sum += double(s.query[i * deep + n]) * grad_query[(lane * length + c * chunk + i) * dim + n] -
               double(s.key[i * deep + n]) * s.moved[i * deep + n];
      if (decay == PER_TOKEN) grad_decay[lane * length + c * chunk + i] = float(sum);
      whole += sum;
    }
    if (decay == PER_HEAD) grad_decay[lane] += float(whole);
  }
};

} // namespace

extern "C" {

// states (lanes, kept chunks, dim, value columns filled up to panels) and totals (lanes, length) may be null where no gradient
// or no normaliser is wanted; initial may be null.
void regard_linear_forward(const LinearProblem* problem, const float* query, const float* key, const float* value,
                           const float* decays, const float* initial, float* out, float* last, float* states, float* totals) {
  const LinearForward work{Linear(*problem, query, key, value, decays), initial, out, last, states, totals};
  in_parallel(work.threads, work.batch * work.heads, work);
}

// Gradients of keys and values are per query head. grad_decay (batch * heads, length) or, per head, (batch * heads), is added to.
void regard_linear_backward(const LinearProblem* problem, const float* query, const float* key, const float* value,
                            const float* decays, const float* states, const float* totals, const float* grad_out,
                            const float* grad_last, float* grad_query, float* grad_key, float* grad_value, float* grad_decay,
                            float* grad_initial) {
  const LinearBackward work{Linear(*problem, query, key, value, decays), states, totals, grad_out, grad_last, grad_query,
                            grad_key, grad_value, grad_decay, grad_initial};
  in_parallel(work.threads, work.batch * work.heads, work);
}

} // extern "C"
