// Block-sparse softmax attention in float32 for CPUs, behind a plain C interface (see native.py, which compiles it).
//
// Keys and values are packed once per call; a query block then walks over the key blocks that it visits with a running maximum,
// as in FlashAttention.
#include "native_tiles.h"

namespace {

constexpr int64_t SUB_ROWS = 128;        // query rows computed together
constexpr int64_t FORWARD_COLUMNS = 256; // scores of a row that are formed before the running maximum moves
constexpr int64_t BACKWARD_COLUMNS = 128;

} // namespace

extern "C" {

// Shapes and lists of one call; the same order in native.py.
struct Problem {
  int64_t batch, heads, kv_heads, q_len, k_len, dim, value_dim, block_q, block_k;
  int64_t list_batch, list_heads;     // how many batches and heads the lists tell apart
  int64_t first_block, last_block;    // query blocks of this call
  int64_t threads;
  int64_t bias_heads, bias_size;      // of the table of biases
  const int64_t* starts;
  const int32_t* columns;
  const int32_t* tiles;
  const uint8_t* visible;             // without biases: the pairs seen in each distinct mask
  const int32_t* codes;               // with biases: places in the table of each distinct block, -1 where a pair is not seen
  const float* bias;
  float scale;
};

int64_t regard_panel() { return PANEL; }

// Blocks of `length x width` sequences, each packed in panels: rows (panels over the width) or transposed (over the block).
void regard_pack(const float* from, int64_t lanes, int64_t length, int64_t width, int64_t block, int64_t transposed, int64_t threads,
                 float* to) {
  struct Pack {
    const float* from;
    int64_t length, width, block, count, transposed, size;
    float* to;
    int scratch() const { return 0; }
    void operator()(int64_t i, int) const {
      const int64_t lane = i / count, first = i % count * block, rows = std::min(block, length - first);
      const float* at = from + (lane * length + first) * width;
      if (transposed) pack_columns(at, width, width, rows, width * PANEL, to + i * size);
      else pack_rows(at, width, rows, width, block * PANEL, to + i * size);
    }
  };
  const int64_t count = (length + block - 1) / block;
  const int64_t size = transposed ? round_up(block, PANEL) * width : round_up(width, PANEL) * block;
  in_parallel(threads, lanes * count, Pack{from, length, width, block, count, transposed, size, to});
}

namespace {

struct Layout : Problem {
  int64_t q_blocks, k_blocks;
  explicit Layout(const Problem& p) : Problem(p) {
    q_blocks = (q_len + block_q - 1) / block_q;
    k_blocks = (k_len + block_k - 1) / block_k;
  }
  int64_t list(int64_t b, int64_t h, int64_t block) const {
    return ((list_batch == 1 ? 0 : b) * list_heads + (list_heads == 1 ? 0 : h)) * q_blocks + block;
  }
  // A block of keys or values by rows: where they stand if whole panels fit, else in packed form.
  Right rows_of(const float* from, int64_t lane, int64_t block, int64_t width) const {
    if (width % PANEL == 0) return {from + (lane * k_len + block * block_k) * width, width, PANEL};
    return {from + (lane * k_blocks + block) * round_up(width, PANEL) * block_k, PANEL, block_k * PANEL};
  }
  const uint8_t* mask(int64_t entry) const {
    return codes || tiles[entry] < 0 ? nullptr : visible + tiles[entry] * block_q * block_k;
  }
  const int32_t* code(int64_t entry) const { return codes ? codes + tiles[entry] * block_q * block_k : nullptr; }
  const float* biases(int64_t head) const { return bias + (bias_heads == 1 ? 0 : head % heads) * bias_size; }
};

// Biases added to `columns` scores, in units of log 2; pairs that are not seen are hidden.
inline void add_bias(float* scores, const int32_t* code, const float* bias, int64_t columns) {
  for (int64_t j = 0; j < columns; ++j) {
    const int32_t c = code[j];
    const float moved = scores[j] + bias[c < 0 ? 0 : c] * LOG2E;
    scores[j] = c < 0 ? -INF : moved;
  }
}

struct ForwardScratch {
  std::vector<float> scores, out, query, top, total;
};

struct Forward : Layout {
  const float *query, *keys, *values;
  float *out, *lse;
  int64_t wide, score_stride;

  Forward(const Problem& p, const float* q, const float* k, const float* v, float* o, float* l)
      : Layout(p), query(q), keys(k), values(v), out(o), lse(l), wide(round_up(value_dim, PANEL)),
        score_stride(FORWARD_COLUMNS + round_up(std::min(block_k, FORWARD_COLUMNS), PANEL)) {}

  ForwardScratch scratch() const {
    const int64_t rows = std::min(SUB_ROWS, block_q);
    ForwardScratch s;
    s.scores.resize(rows * score_stride);
    s.out.resize(rows * wide);
    s.query.resize(rows * dim);
    s.top.resize(rows);
    s.total.resize(rows);
    return s;
  }

  void operator()(int64_t task, ForwardScratch& s) const {
    const int64_t blocks = last_block - first_block, head = task / blocks, block = first_block + task % blocks;
    const int64_t stop = std::min((block + 1) * block_q, q_len);
    for (int64_t row = block * block_q; row < stop; row += SUB_ROWS) run(head, block, row, std::min(SUB_ROWS, stop - row), s);
  }

  struct Piece {
    const float* key;
    Right value;
    const uint8_t* mask;
    const int32_t* code;
    int64_t columns, at;
  };

  void run(int64_t head, int64_t block, int64_t row, int64_t rows, ForwardScratch& s) const {
    const int64_t b = head / heads, h = head % heads, lane = b * kv_heads + h / (heads / kv_heads), place = list(b, h, block);
    const int64_t key_size = round_up(block_k, PANEL) * dim;
    const float factor = scale * LOG2E;
    const float* q = query + (head * q_len + row) * dim;
    for (int64_t i = 0; i < rows * dim; ++i) s.query[i] = q[i] * factor;
    std::fill_n(s.out.begin(), rows * wide, 0.f);
    std::fill_n(s.top.begin(), rows, -INF);
    std::fill_n(s.total.begin(), rows, 0.f);
    Piece pieces[FORWARD_COLUMNS + 1];
    int64_t count = 0, width = 0;
    for (int64_t entry = starts[place]; entry < starts[place + 1]; ++entry) {
      const int64_t column = columns[entry], size = std::min(block_k, k_len - column * block_k);
      const float* key = keys + (lane * k_blocks + column) * key_size;
      const Right value = rows_of(values, lane, column, value_dim);
      const uint8_t* hide = mask(entry);
      const int32_t* places = code(entry);
      if (hide) hide += (row - block * block_q) * block_k;
      if (places) places += (row - block * block_q) * block_k;
      for (int64_t from = 0; from < size; from += FORWARD_COLUMNS) {
        const int64_t part = std::min(FORWARD_COLUMNS, size - from);
        pieces[count++] = {key + from * dim, value.from(from), hide ? hide + from : nullptr, places ? places + from : nullptr,
                           part, width};
        width += round_up(part, PANEL);
        if (width >= FORWARD_COLUMNS) flush(pieces, count, width, head, rows, s), count = width = 0;
      }
    }
    if (count) flush(pieces, count, width, head, rows, s);
    float* o = out + (head * q_len + row) * value_dim;
    for (int64_t i = 0; i < rows; ++i) {
      const float total = s.total[i], inverse = total == 0 ? 0.f : 1.f / total;
      for (int64_t j = 0; j < value_dim; ++j) o[i * value_dim + j] = s.out[i * wide + j] * inverse;
      lse[head * q_len + row + i] = total == 0 ? -INF : (s.top[i] + std::log2(total)) * LN2;
    }
  }

  void flush(const Piece* pieces, int64_t count, int64_t width, int64_t head, int64_t rows, ForwardScratch& s) const {
    float* scores = s.scores.data();
    for (int64_t n = 0; n < count; ++n) {
      const Piece& p = pieces[n];
      const int64_t full = round_up(p.columns, PANEL);
      float* at = scores + p.at;
      product(false, rows, full, dim, s.query.data(), dim, 1, {p.key, PANEL, dim * PANEL}, at, score_stride);
      for (int64_t i = 0; i < rows && (p.mask || p.code || full > p.columns); ++i) {
        float* line = at + i * score_stride;
        if (p.code) add_bias(line, p.code + i * block_k, biases(head), p.columns);
        if (p.mask) {
          const uint8_t* seen = p.mask + i * block_k;
          for (int64_t j = 0; j < p.columns; ++j) line[j] = seen[j] ? line[j] : -INF;
        }
        for (int64_t j = p.columns; j < full; ++j) line[j] = -INF;
      }
    }
    for (int64_t i = 0; i < rows; ++i) {
      float* line = scores + i * score_stride;
      vec most0 = splat(s.top[i]), most1 = most0;
      for (int64_t j = 0; j < width; j += PANEL) {
        most0 = larger(load(line + j), most0);
        most1 = larger(load(line + j + LANES), most1);
      }
      most0 = larger(most0, most1);
      float top = most0[0];
      for (int j = 1; j < LANES; ++j) top = std::max(top, most0[j]);
      const vec base = splat(top == -INF ? 0.f : top);
      vec sum0 = vec{}, sum1 = vec{};
      for (int64_t j = 0; j < width; j += PANEL) {
        const vec p0 = exp2v(load(line + j) - base), p1 = exp2v(load(line + j + LANES) - base);
        store(line + j, p0);
        store(line + j + LANES, p1);
        sum0 += p0;
        sum1 += p1;
      }
      sum0 += sum1;
      float sum = 0;
      for (int j = 0; j < LANES; ++j) sum += sum0[j];
      if (top > s.top[i]) {
        const float shrink = std::exp2(s.top[i] - top);
        for (int64_t j = 0; j < wide; j += LANES) store(&s.out[i * wide + j], load(&s.out[i * wide + j]) * shrink);
        s.total[i] *= shrink;
        s.top[i] = top;
      }
      s.total[i] += sum;
    }
    for (int64_t n = 0; n < count; ++n) {
      const Piece& p = pieces[n];
      product(true, rows, wide, p.columns, scores + p.at, score_stride, 1, p.value, s.out.data(), wide);
    }
  }
};

struct BackwardScratch {
  std::vector<float> scores, slopes, query, query_panels, grad_panels, grad_query, top, delta;
};

// One task takes the query blocks of one share of a key/value head, and adds to that share's own sums.
struct Backward : Layout {
  const float *query, *keys_across, *values_across, *keys, *out, *lse, *grad_out, *grad_lse;
  float *grad_query, *grad_keys, *grad_values, *grad_bias;
  int64_t shares, wide, value_wide, rows_most, columns_most;

  BackwardScratch scratch() const {
    BackwardScratch s;
    s.scores.resize(rows_most * columns_most);
    s.slopes.resize(rows_most * columns_most);
    s.query.resize(rows_most * dim);
    s.query_panels.resize(rows_most * wide);
    s.grad_panels.resize(rows_most * value_wide);
    s.grad_query.resize(rows_most * wide);
    s.top.resize(rows_most);
    s.delta.resize(rows_most);
    return s;
  }

  void operator()(int64_t task, BackwardScratch& s) const {
    const int64_t share = task % shares, lane = task / shares, b = lane / kv_heads, group = heads / kv_heads;
    const int64_t blocks = last_block - first_block, all = group * blocks;
    // Shares of equal work: visited blocks, plus one for each query block.
    int64_t total = 0;
    for (int64_t i = 0; i < all; ++i) total += weight(b, lane, group, blocks, i);
    int64_t before = 0;
    for (int64_t i = 0; i < all; ++i) {
      if (before * shares / total == share) {
        const int64_t head = lane * group + i / blocks, block = first_block + i % blocks;
        const int64_t stop = std::min((block + 1) * block_q, q_len);
        for (int64_t row = block * block_q; row < stop; row += SUB_ROWS)
          run(b, head, lane, share, block, row, std::min(SUB_ROWS, stop - row), s);
      }
      before += weight(b, lane, group, blocks, i);
    }
  }

  int64_t weight(int64_t b, int64_t lane, int64_t group, int64_t blocks, int64_t i) const {
    const int64_t place = list(b, lane % kv_heads * group + i / blocks, first_block + i % blocks);
    return starts[place + 1] - starts[place] + 1;
  }

  void run(int64_t b, int64_t head, int64_t lane, int64_t share, int64_t block, int64_t row, int64_t rows, BackwardScratch& s) const {
    const int64_t place = list(b, head % heads, block), first = head * q_len + row;
    const float *q = query + first * dim, *g = grad_out + first * value_dim, *o = out + first * value_dim;
    const float factor = scale * LOG2E;
    for (int64_t i = 0; i < rows * dim; ++i) s.query[i] = q[i] * factor;
    pack_rows(q, dim, rows, dim, rows * PANEL, s.query_panels.data());
    pack_rows(g, value_dim, rows, value_dim, rows * PANEL, s.grad_panels.data());
    std::fill_n(s.grad_query.begin(), rows * wide, 0.f);
    for (int64_t i = 0; i < rows; ++i) {
      float delta = grad_lse ? -grad_lse[first + i] : 0.f;
      for (int64_t j = 0; j < value_dim; ++j) delta += g[i * value_dim + j] * o[i * value_dim + j];
      s.delta[i] = delta;
      s.top[i] = lse[first + i] == -INF ? INF : lse[first + i] * LOG2E;
    }
    const int64_t key_size = round_up(block_k, PANEL) * dim, value_size = round_up(block_k, PANEL) * value_dim;
    const int64_t lanes = batch * kv_heads;
    float* toward = grad_bias + (share * batch * heads + head) * bias_size;
    for (int64_t entry = starts[place]; entry < starts[place + 1]; ++entry) {
      const int64_t column = columns[entry], size = std::min(block_k, k_len - column * block_k);
      const int64_t at = lane * k_blocks + column, sums = (share * lanes + lane) * k_blocks + column;
      const uint8_t* hide = mask(entry);
      const int32_t* places = code(entry);
      if (hide) hide += (row - block * block_q) * block_k;
      if (places) places += (row - block * block_q) * block_k;
      for (int64_t from = 0; from < size; from += BACKWARD_COLUMNS) {
        const int64_t part = std::min(BACKWARD_COLUMNS, size - from), full = round_up(part, PANEL);
        float *p = s.scores.data(), *d = s.slopes.data();
        product(false, rows, full, dim, s.query.data(), dim, 1, {keys_across + at * key_size + from * dim, PANEL, dim * PANEL}, p, columns_most);
        product(false, rows, full, value_dim, g, value_dim, 1,
                {values_across + at * value_size + from * value_dim, PANEL, value_dim * PANEL}, d, columns_most);
        for (int64_t i = 0; i < rows; ++i) {
          float *pi = p + i * columns_most, *di = d + i * columns_most;
          const vec top = splat(s.top[i]), delta = splat(s.delta[i]);
          if (places) add_bias(pi, places + from + i * block_k, biases(head), part);
          for (int64_t j = 0; j < full; j += LANES) store(pi + j, exp2v(load(pi + j) - top));
          if (hide) {
            const uint8_t* seen = hide + from + i * block_k;
            for (int64_t j = 0; j < part; ++j) pi[j] = seen[j] ? pi[j] : 0.f;
          }
          for (int64_t j = 0; j < full; j += LANES) store(di + j, load(pi + j) * (load(di + j) - delta));
          if (places) {
            const int32_t* c = places + from + i * block_k;
            for (int64_t j = 0; j < part; ++j)
              if (c[j] >= 0) toward[c[j]] += di[j];
          }
        }
        product(true, part, value_wide, rows, p, 1, columns_most, {s.grad_panels.data(), PANEL, rows * PANEL},
                grad_values + (sums * block_k + from) * value_wide, value_wide);
        product(true, part, wide, rows, d, 1, columns_most, {s.query_panels.data(), PANEL, rows * PANEL},
                grad_keys + (sums * block_k + from) * wide, wide);
        product(true, rows, wide, part, d, columns_most, 1, rows_of(keys, lane, column, dim).from(from), s.grad_query.data(), wide);
      }
    }
    float* gq = grad_query + first * dim;
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < dim; ++j) gq[i * dim + j] = s.grad_query[i * wide + j] * scale;
  }
};

} // namespace

// keys: packed transposed; values: as they are where whole panels fit their width, else packed by rows.
void regard_block_forward(const Problem* problem, const float* query, const float* keys, const float* values, float* out, float* lse) {
  const Forward work(*problem, query, keys, values, out, lse);
  in_parallel(work.threads, work.batch * work.heads * (work.last_block - work.first_block), work);
}

// keys_across, values_across: packed transposed; keys: as values above. grad_keys (shares, lanes, blocks, block_k, dim filled up
// to panels), grad_values and grad_bias (shares, batch * heads, bias_size) are added to; grad_keys still lacks the scale.
void regard_block_backward(const Problem* problem, int64_t shares, const float* query, const float* keys_across,
                           const float* values_across, const float* keys, const float* out, const float* lse, const float* grad_out,
                           const float* grad_lse, float* grad_query, float* grad_keys, float* grad_values, float* grad_bias) {
  const Problem& p = *problem;
  const Backward work{Layout(p), query, keys_across, values_across, keys, out, lse, grad_out, grad_lse, grad_query, grad_keys,
                      grad_values, grad_bias, shares, round_up(p.dim, PANEL), round_up(p.value_dim, PANEL), std::min(SUB_ROWS, p.block_q),
                      round_up(std::min(p.block_k, BACKWARD_COLUMNS), PANEL)};
  in_parallel(work.threads, p.batch * p.kv_heads * shares, work);
}

} // extern "C"
