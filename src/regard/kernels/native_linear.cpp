// Causal linear attention in float32 for CPUs (see linear.py for the recurrence, native_linear.py for the calls).
//
// A head's sequence is walked in chunks with the state in cache: what happens inside a chunk is a triangle of products, what
// came before it is one product with the state. Backward walks the chunks from the end, over stretches whose states are formed
// again from those that the forward pass kept.
#include "native_linear.h"

namespace {

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
