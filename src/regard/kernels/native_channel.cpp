// Causal linear attention with a decay per channel of the state, in float32 for CPUs (see linear.py for the recurrence).
//
// A chunk is walked in blocks of a few rows. Keys before a block are kept as they count at its start, so that its scores with
// them are one product; within the block each pair has exponents of its own. No exponent is ever positive. Sums of logarithms
// are double, and differences within a block are taken of two floats each, so that strong decays cost weak ones no digits.
#include "native_linear.h"

namespace {

constexpr int64_t BLOCK = 8;

struct Channel : Linear {
  using Linear::Linear;

  Scratch channel_scratch() const {
    Scratch s = forward_scratch();
    s.run.resize(chunk * dim), s.moved.resize(columns * deep), s.query.resize(columns * deep);
    s.across.resize(std::max(PANEL * dim, columns * dim)), s.scores.resize(columns * PANEL);
    return s;
  }

  void sums(int64_t lane, int64_t c, Scratch& s) const {
    const int64_t rows = rows_of(c);
    const float* g = decays + (lane * length + c * chunk) * dim;
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t n = 0; n < dim; ++n)
        s.run[i * dim + n] = (i ? s.run[(i - 1) * dim + n] : 0.) + std::max(double(g[i * dim + n]), LEAST);
  }

  double before(int64_t row, int64_t n, const Scratch& s) const { return row ? s.run[(row - 1) * dim + n] : 0.; }

  // exp of the sums from the row before `from` to `to`, as rows of `deep` floats in `to_`.
  void powers_of(int64_t first, int64_t from, int64_t end, const Scratch& s, float* to_) const {
    alignas(64) float gap[LANES];
    for (int64_t i = from; i < end; ++i)
      for (int64_t n = 0; n < dim; n += LANES) {
        const int64_t part = std::min<int64_t>(LANES, dim - n);
        for (int64_t m = 0; m < part; ++m) gap[m] = float((s.run[i * dim + n + m] - before(first, n + m, s)) * LOG2E);
        for (int64_t m = part; m < LANES; ++m) gap[m] = 0;
        store(to_ + (i - from) * deep + n, exp2v(load(gap)));
      }
  }

  // What keys up to `row` lose from the start of the block before to that of this one; keys of that block come in at full.
  // `scales` holds the factors of each key and channel, (row, deep).
  void carry_on(int64_t row, const Scratch& s, float* scales) const {
    const int64_t last = row - BLOCK;
    for (int64_t n = 0; n < dim; ++n) {
      const float by = float(std::exp(before(row, n, s) - before(last, n, s)));
      for (int64_t j = 0; j < last; ++j) scales[j * deep + n] *= by;
    }
    for (int64_t j = last; j < row; ++j)
      for (int64_t n = 0; n < dim; ++n) scales[j * deep + n] = float(std::exp(before(row, n, s) - s.run[j * dim + n]));
  }

  // The sums within a block as two floats, in units of log 2: `high` and `low`, (BLOCK, deep).
  void split(int64_t row, int64_t end, const Scratch& s, float* high, float* low) const {
    for (int64_t i = row; i < end; ++i)
      for (int64_t n = 0; n < deep; ++n) {
        const double sum = n < dim ? (s.run[i * dim + n] - before(row, n, s)) * double(LOG2E) : 0.;
        high[(i - row) * deep + n] = float(sum);
        low[(i - row) * deep + n] = float(sum - high[(i - row) * deep + n]);
      }
  }

  // The scores of a block's rows, transposed: scores[j][i - row] for j < end.
  void block_scores(int64_t row, int64_t end, const float* q, const float* k, const float* faded, const float* reached,
                    const float* high, const float* low, Scratch& s) const {
    const int64_t some = end - row;
    if (row) {
      pack_columns(reached, deep, dim, some, dim * PANEL, s.across.data());
      product(false, row, PANEL, dim, faded, deep, 1, {s.across.data(), PANEL, dim * PANEL}, s.scores.data(), PANEL);
    }
    for (int64_t j = row; j < end; ++j)
      for (int64_t i = row; i < end; ++i) {
        float sum = 0;
        if (i >= j) {
          vec total = vec{};
          const float *hi = high + (i - row) * deep, *hj = high + (j - row) * deep;
          const float *li = low + (i - row) * deep, *lj = low + (j - row) * deep;
          for (int64_t n = 0; n < deep; n += LANES) {
            const vec gap = (load(hi + n) - load(hj + n)) + (load(li + n) - load(lj + n));
            total += load(q + i * deep + n) * load(k + j * deep + n) * exp2v(gap);
          }
          for (int m = 0; m < LANES; ++m) sum += total[m];
        }
        s.scores[j * PANEL + i - row] = sum * scale;
      }
  }

  // Keys as they count at the chunk's end, and the state after it.
  void advance(int64_t lane, int64_t c, const float* k, float* state, Scratch& s) const {
    const int64_t rows = rows_of(c);
    for (int64_t j = 0; j < rows; ++j)
      for (int64_t n = 0; n < dim; ++n)
        s.faded[j * deep + n] = k[j * dim + n] * float(std::exp(s.run[(rows - 1) * dim + n] - s.run[j * dim + n]));
    for (int64_t n = 0; n < dim; ++n) {
      const double fade = std::exp(s.run[(rows - 1) * dim + n]);
      for (int64_t m = 0; m < wide; ++m) state[n * wide + m] = float(state[n * wide + m] * fade);
    }
    product(true, dim, wide, rows, s.faded.data(), 1, deep, {s.value.data(), wide, PANEL}, state, wide);
  }
};

struct ChannelForward : Channel {
  const float* initial;
  float *out, *last, *states, *totals;

  Scratch scratch() const {
    Scratch s = channel_scratch();
    s.toward.resize(2 * BLOCK * deep), s.grads.resize(2 * BLOCK * deep);
    return s;
  }

  void operator()(int64_t lane, Scratch& s) const {
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
    float *reached = s.grads.data(), *far = reached + BLOCK * deep, *high = s.toward.data(), *low = high + BLOCK * deep;
    sums(lane, c, s);
    load_values(lane, c, s.value.data());
    copy_rows(q, dim, rows, s.query.data(), deep);
    copy_rows(k, dim, rows, s.key.data(), deep);
    for (int64_t row = 0; row < rows; row += BLOCK) {
      const int64_t end = std::min(row + BLOCK, rows), some = end - row;
      if (row) {
        carry_on(row, s, s.moved.data());
        for (int64_t n = 0; n < row * deep; ++n) s.faded[n] = s.key[n] * s.moved[n];
      }
      powers_of(row, row, end, s, reached);
      powers_of(0, row, end, s, far);
      for (int64_t i = 0; i < some; ++i)
        for (int64_t n = 0; n < deep; ++n) {
          const float x = n < dim ? s.query[(row + i) * deep + n] * scale : 0.f;
          reached[i * deep + n] = n < dim ? x * reached[i * deep + n] : 0.f;
          far[i * deep + n] = n < dim ? x * far[i * deep + n] : 0.f;
        }
      split(row, end, s, high, low);
      block_scores(row, end, s.query.data(), s.key.data(), s.faded.data(), reached, high, low, s);
      product(false, some, wide, dim, far, deep, 1, {s.state.data(), wide, PANEL}, s.out.data(), wide);
      product(true, some, wide, end, s.scores.data(), 1, PANEL, {s.value.data(), wide, PANEL}, s.out.data(), wide);
      for (int64_t i = 0; i < some; ++i) {
        const float* line = s.out.data() + i * wide;
        float* to = out + (first + row + i) * value_dim;
        const float by = normalize ? 1.f / (line[value_dim] + eps) : 1.f;
        for (int64_t n = 0; n < value_dim; ++n) to[n] = line[n] * by;
        if (normalize) totals[first + row + i] = line[value_dim];
      }
    }
    advance(lane, c, k, s.state.data(), s);
  }
};

struct ChannelBackward : Channel {
  const float *states, *totals, *grad_out, *grad_last;
  float *grad_query, *grad_key, *grad_value, *grad_decay, *grad_initial;

  struct Room : Scratch {
    std::vector<float> reached, pair, grad_rows, scales, grad_far, map;
    std::vector<double> slope;
  };

  Room scratch() const {
    Room s;
    static_cast<Scratch&>(s) = channel_scratch();
    s.slopes.resize(columns * columns), s.map.resize(columns * columns), s.grads.resize(columns * wide);
    s.value_across.resize(columns * wide), s.state_across.resize(deep * wide), s.out.resize(columns * std::max(deep, wide));
    s.states.resize((keep + 1) * dim * wide), s.toward.resize(dim * wide), s.reached.resize(columns * deep);
    s.pair.resize(2 * columns * deep), s.grad_rows.resize(BLOCK * deep), s.scales.resize(columns * deep);
    s.grad_far.resize(columns * deep), s.slope.resize(dim);
    return s;
  }

  void operator()(int64_t lane, Room& s) const {
    initial_state(grad_last, lane, s.toward.data());
    const int64_t size = dim * wide;
    for (int64_t stretch = kept - 1; stretch >= 0; --stretch) {
      const int64_t begin = stretch * keep, end = std::min(begin + keep, chunks);
      std::memcpy(s.states.data(), states + (lane * kept + stretch) * size, size * sizeof(float));
      for (int64_t c = begin; c < end; ++c) {
        sums(lane, c, s);
        load_values(lane, c, s.value.data());
        float* after = s.states.data() + (c - begin + 1) * size;
        std::memcpy(after, after - size, size * sizeof(float));
        advance(lane, c, keys(lane, c), after, s);
      }
      for (int64_t c = end - 1; c >= begin; --c) run(lane, c, s.states.data() + (c - begin) * size, s);
    }
    final_state(s.toward.data(), lane, grad_initial);
  }

  // s.map and s.slopes (chunk x chunk): scores, and the products of their rows' gradients with values.
  void maps(int64_t rows, Room& s) const {
    for (int64_t row = 0; row < rows; row += BLOCK) {
      const int64_t end = std::min(row + BLOCK, rows);
      if (row) {
        carry_on(row, s, s.scales.data());
        for (int64_t n = 0; n < row * deep; ++n) s.faded[n] = s.key[n] * s.scales[n];
      }
      float *high = s.pair.data() + row * deep, *low = high + columns * deep;
      split(row, end, s, high, low);
      block_scores(row, end, s.query.data(), s.key.data(), s.faded.data(), s.reached.data() + row * deep, high, low, s);
      for (int64_t i = row; i < end; ++i)
        for (int64_t j = 0; j < end; ++j) s.map[i * columns + j] = s.scores[j * PANEL + i - row];
    }
    for (int64_t row = 0; row < rows; row += ROW_TILE) {
      const int64_t end = row_end(row, rows);
      product(false, end - row, round_up(end, PANEL), wide, s.grads.data() + row * wide, wide, 1,
              {s.value_across.data(), PANEL, wide * PANEL}, s.slopes.data() + row * columns, columns);
    }
  }

  // The gradient of what outputs are divided by, made of the same products as what comes through the values (see
  // native_linear.cpp). `far` (rows, deep): queries as they meet the state before the chunk.
  void add_divisors(int64_t first, int64_t rows, const float* far, const float* state, Room& s) const {
    for (int64_t i = 0; i < rows; ++i) {
      float dot = 0;
      for (int64_t j = 0; j <= i; ++j) dot += s.map[i * columns + j] * s.slopes[i * columns + j];
      for (int64_t n = 0; n < dim; ++n) dot += far[i * deep + n] * s.out[i * deep + n];
      const float delta = dot / (totals[first + i] + eps);
      for (int64_t j = 0; j <= i; ++j) s.slopes[i * columns + j] -= delta;
      for (int64_t n = 0; n < dim; ++n) s.out[i * deep + n] -= delta * state[n * wide + value_dim];
      s.grads[i * wide + value_dim] = -delta;
    }
  }

  void run(int64_t lane, int64_t c, const float* state, Room& s) const {
    const int64_t rows = rows_of(c), first = lane * length + c * chunk;
    const float *q = query + first * dim, *k = keys(lane, c);
    float *dq = grad_query + first * dim, *dk = grad_key + first * dim, *dv = grad_value + first * value_dim;
    sums(lane, c, s);
    load_values(lane, c, s.value.data());
    copy_rows(grad_out + first * value_dim, value_dim, rows, s.grads.data(), wide);
    for (int64_t i = 0; i < rows && normalize; ++i)
      for (int64_t n = 0; n < value_dim; ++n) s.grads[i * wide + n] *= 1.f / (totals[first + i] + eps);
    copy_rows(q, dim, rows, s.query.data(), deep);
    copy_rows(k, dim, rows, s.key.data(), deep);
    pack_columns(s.value.data(), wide, wide, rows, wide * PANEL, s.value_across.data());
    for (int64_t row = 0; row < rows; row += BLOCK) powers_of(row, row, std::min(row + BLOCK, rows), s, s.reached.data() + row * deep);
    float* far = s.moved.data();
    powers_of(0, 0, rows, s, far);
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t n = 0; n < deep; ++n) {
        const float x = n < dim ? s.query[i * deep + n] * scale : 0.f;
        float &near = s.reached[i * deep + n], &back = far[i * deep + n];
        near = n < dim ? x * near : 0.f, back = n < dim ? x * back : 0.f;
      }
    maps(rows, s);
    // Queries, from the state before.
    pack_columns(state, wide, wide, dim, wide * PANEL, s.state_across.data());
    product(false, rows, deep, wide, s.grads.data(), wide, 1, {s.state_across.data(), PANEL, wide * PANEL}, s.out.data(), deep);
    if (normalize) add_divisors(first, rows, far, state, s);
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t n = 0; n < dim; ++n) dq[i * dim + n] = scale * float(std::exp(s.run[i * dim + n])) * s.out[i * deep + n];
    // Keys, through the state after.
    pack_columns(s.toward.data(), wide, wide, dim, wide * PANEL, s.state_across.data());
    product(false, rows, deep, wide, s.value.data(), wide, 1, {s.state_across.data(), PANEL, wide * PANEL}, s.grad_far.data(), deep);
    const double* last = s.run.data() + (rows - 1) * dim;
    for (int64_t j = 0; j < rows; ++j)
      for (int64_t n = 0; n < dim; ++n) {
        const float by = float(std::exp(last[n] - s.run[j * dim + n]));
        dk[j * dim + n] = by * s.grad_far[j * deep + n];
        s.faded[j * deep + n] = by * k[j * dim + n];
      }
    // Values.
    product(false, rows, wide, dim, s.faded.data(), deep, 1, {s.toward.data(), wide, PANEL}, s.out.data(), wide);
    for (int64_t row = 0; row < rows; row += BLOCK) {
      const int64_t end = std::min(row + BLOCK, rows);
      product(true, end - row, wide, rows - row, s.map.data() + row * columns + row, 1, columns,
              {s.grads.data() + row * wide, wide, PANEL}, s.out.data() + row * wide, wide);
    }
    for (int64_t j = 0; j < rows; ++j) std::memcpy(dv + j * value_dim, s.out.data() + j * wide, value_dim * sizeof(float));
    for (int64_t row = 0; row < rows; row += BLOCK) pairs(row, std::min(row + BLOCK, rows), dq, dk, s);
    decay_slope(lane, c, rows, q, k, state, s);
    // The state before.
    for (int64_t n = 0; n < dim; ++n)
      for (int64_t m = 0; m < wide; ++m) s.toward[n * wide + m] *= float(std::exp(last[n]));
    product(true, dim, wide, rows, far, 1, deep, {s.grads.data(), wide, PANEL}, s.toward.data(), wide);
  }

  // Gradients of queries and keys through the scores of one block's rows.
  void pairs(int64_t row, int64_t end, float* dq, float* dk, Room& s) const {
    const int64_t some = end - row;
    if (row) {
      carry_on(row, s, s.scales.data());
      for (int64_t n = 0; n < row * deep; ++n) s.faded[n] = s.key[n] * s.scales[n];
      product(false, some, deep, row, s.slopes.data() + row * columns, columns, 1, {s.faded.data(), deep, PANEL}, s.grad_rows.data(), deep);
      for (int64_t i = 0; i < some; ++i)
        for (int64_t n = 0; n < dim; ++n) {
          const float by = scale * float(std::exp(s.run[(row + i) * dim + n] - before(row, n, s)));
          dq[(row + i) * dim + n] += by * s.grad_rows[i * deep + n];
        }
      product(false, row, deep, some, s.slopes.data() + row * columns, 1, columns, {s.reached.data() + row * deep, deep, PANEL},
              s.grad_far.data(), deep);
      for (int64_t j = 0; j < row; ++j)
        for (int64_t n = 0; n < dim; ++n) dk[j * dim + n] += s.scales[j * deep + n] * s.grad_far[j * deep + n];
    }
    const float *high = s.pair.data() + row * deep, *low = high + columns * deep;
    alignas(64) float power[LANES];
    for (int64_t i = row; i < end; ++i)
      for (int64_t j = row; j <= i; ++j) {
        const float w = s.slopes[i * columns + j] * scale;
        const float *hi = high + (i - row) * deep, *hj = high + (j - row) * deep, *li = low + (i - row) * deep, *lj = low + (j - row) * deep;
        for (int64_t n = 0; n < dim; n += LANES) {
          const vec gap = (load(hi + n) - load(hj + n)) + (load(li + n) - load(lj + n));
          store(power, exp2v(gap) * w);
          const int64_t part = std::min<int64_t>(LANES, dim - n);
          for (int64_t m = 0; m < part; ++m) {
            dq[i * dim + n + m] += power[m] * s.key[j * deep + n + m];
            dk[j * dim + n + m] += power[m] * s.query[i * deep + n + m];
          }
        }
      }
  }

  // As in native_linear.cpp, channel by channel.
  void decay_slope(int64_t lane, int64_t c, int64_t rows, const float* q, const float* k, const float* state, Room& s) const {
    const float* after = state + dim * wide;
    const int64_t first = (lane * length + c * chunk) * dim;
    for (int64_t n = 0; n < dim; ++n) {
      s.slope[n] = 0;
      for (int64_t m = 0; m < wide; ++m) s.slope[n] += double(after[n * wide + m]) * s.toward[n * wide + m];
    }
    for (int64_t i = rows - 1; i >= 0; --i)
      for (int64_t n = 0; n < dim; ++n) {
        const int64_t at = first + i * dim + n;
        s.slope[n] += double(q[i * dim + n]) * grad_query[at] - double(k[i * dim + n]) * grad_key[at];
        grad_decay[at] = float(s.slope[n]);
      }
  }
};

} // namespace

extern "C" {

// As regard_linear_forward and _backward, with decays (lanes, length, dim).
void regard_channel_forward(const LinearProblem* problem, const float* query, const float* key, const float* value,
                            const float* decays, const float* initial, float* out, float* last, float* states, float* totals) {
  const ChannelForward work{Channel(*problem, query, key, value, decays), initial, out, last, states, totals};
  in_parallel(work.threads, work.batch * work.heads, work);
}

void regard_channel_backward(const LinearProblem* problem, const float* query, const float* key, const float* value,
                             const float* decays, const float* states, const float* totals, const float* grad_out,
                             const float* grad_last, float* grad_query, float* grad_key, float* grad_value, float* grad_decay,
                             float* grad_initial) {
  const ChannelBackward work{Channel(*problem, query, key, value, decays), states, totals, grad_out, grad_last, grad_query,
                             grad_key, grad_value, grad_decay, grad_initial};
  in_parallel(work.threads, work.batch * work.heads, work);
}

} // extern "C"
