// Block-sparse softmax attention in float32 for CPUs, behind a plain C interface (see native.py, which compiles it).
//
// Everything is one matrix product on small tiles: A is read by broadcast, element by element, B is packed in panels of PANEL
// columns, and a tile of ROWS x PANEL sums stays in registers. Keys and values are packed once per call; a query block then
// walks over the key blocks that it visits with a running maximum, as in FlashAttention. Work is dealt to threads in an order
// that does not change results.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <dlfcn.h>
#include <limits>
#include <thread>
#include <vector>

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16, ROWS = 12;
#elif defined(__AVX__)
constexpr int LANES = 8, ROWS = 6;
#else
constexpr int LANES = 4, ROWS = 8;
#endif
constexpr int64_t PANEL = 2 * LANES;
constexpr int64_t SUB_ROWS = 128;        // query rows computed together
constexpr int64_t FORWARD_COLUMNS = 256; // scores of a row that are formed before the running maximum moves
constexpr int64_t BACKWARD_COLUMNS = 128;
constexpr float LOG2E = 1.44269504088896340736f, LN2 = 0.69314718055994530942f;
constexpr float INF = std::numeric_limits<float>::infinity();

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
typedef float uvec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

inline vec load(const float* p) { return *reinterpret_cast<const uvec*>(p); }
inline void store(float* p, vec x) { *reinterpret_cast<uvec*>(p) = x; }
inline vec splat(float x) { return x - vec{}; } // x - 0 is x: compiled to one broadcast
inline vec choose(ivec mask, vec a, vec b) { return (vec)(((ivec)a & mask) | ((ivec)b & ~mask)); }
inline vec larger(vec a, vec b) { return choose(a > b, a, b); }
inline int64_t round_up(int64_t n, int64_t m) { return (n + m - 1) / m * m; }

// 2^x, relative error about 1e-7; zero below 2^-126.
inline vec exp2v(vec x) {
  const ivec under = x < splat(-126.f);
  x = choose(under, splat(-126.f), x);
  const vec magic = splat(12582912.f); // 1.5 * 2^23: adding it rounds to an integer
  const vec n = (x + magic) - magic, r = x - n;
  vec p = splat(1.535336188319500e-4f);
  p = p * r + 1.339887440266574e-3f;
  p = p * r + 9.618437357674640e-3f;
  p = p * r + 5.550332471162809e-2f;
  p = p * r + 2.402264791363012e-1f;
  p = p * r + 6.931472028550421e-1f;
  p = p * r + 1.f;
  const ivec result = (ivec)p + (__builtin_convertvector(n, ivec) << 23);
  return (vec)(result & ~under);
}

// c[R x PANEL] (+)= a[R x depth] b[depth x PANEL].
template <int R>
inline void tile(bool add, int64_t depth, const float* a, int64_t a_row, int64_t a_depth, const float* b, int64_t b_row, float* c,
                 int64_t ldc) {
  vec low[R], high[R];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) low[r] = high[r] = vec{};
  for (int64_t k = 0; k < depth; ++k, b += b_row, a += a_depth) {
    const vec b0 = load(b), b1 = load(b + LANES);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const vec x = splat(a[r * a_row]);
      low[r] += x * b0;
      high[r] += x * b1;
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    float* at = c + r * ldc;
    store(at, add ? load(at) + low[r] : low[r]);
    store(at + LANES, add ? load(at + LANES) + high[r] : high[r]);
  }
}

template <int R>
void some_rows(int64_t rows, bool add, int64_t depth, const float* a, int64_t a_row, int64_t a_depth, const float* b, int64_t b_row,
               float* c, int64_t ldc) {
  if (rows == R) tile<R>(add, depth, a, a_row, a_depth, b, b_row, c, ldc);
  else if constexpr (R > 1) some_rows<R - 1>(rows, add, depth, a, a_row, a_depth, b, b_row, c, ldc);
}

// A matrix for the right side of a product: panels of PANEL columns that lie `panel` floats apart, their rows `row` apart.
struct Right {
  const float* at;
  int64_t row, panel;
  Right from(int64_t first) const { return {at + first * row, row, panel}; }
};

// c[rows x columns] (+)= a[rows x depth] b. All columns of the last panel are written.
void product(bool add, int64_t rows, int64_t columns, int64_t depth, const float* a, int64_t a_row, int64_t a_depth, Right right,
             float* c, int64_t ldc) {
  const float* b = right.at;
  for (int64_t n = 0; n < columns; n += PANEL, b += right.panel) {
    for (int64_t r = 0, left = rows; left;) {
      // A tile of few rows cannot keep the arithmetic units busy, so the last two share what is left.
      const int64_t now = left <= ROWS ? left : left < ROWS + ROWS / 2 + 1 ? (left + 1) / 2 : ROWS;
      some_rows<ROWS>(now, add, depth, a + r * a_row, a_row, a_depth, b, right.row, c + r * ldc + n, ldc);
      r += now, left -= now;
    }
  }
}

// b[depth x columns] in panels, from rows `stride` floats apart; columns are filled up with zeros.
void pack_rows(const float* from, int64_t stride, int64_t depth, int64_t columns, int64_t panel, float* to) {
  for (int64_t n = 0; n < columns; n += PANEL, to += panel) {
    const int64_t wide = std::min(PANEL, columns - n);
    for (int64_t k = 0; k < depth; ++k) {
      std::memcpy(to + k * PANEL, from + k * stride + n, wide * sizeof(float));
      for (int64_t j = wide; j < PANEL; ++j) to[k * PANEL + j] = 0;
    }
  }
}

// The same for the transpose: b[k][n] = from[n][k].
void pack_columns(const float* from, int64_t stride, int64_t depth, int64_t columns, int64_t panel, float* to) {
  for (int64_t n = 0; n < columns; n += PANEL, to += panel) {
    const int64_t wide = std::min(PANEL, columns - n);
    for (int64_t k = 0; k < depth; ++k) {
      for (int64_t j = 0; j < wide; ++j) to[k * PANEL + j] = from[(n + j) * stride + k];
      for (int64_t j = wide; j < PANEL; ++j) to[k * PANEL + j] = 0;
    }
  }
}

// torch's own OpenMP pool where it is loaded, so that its idle threads, which spin for a while, do not stand in the way.
typedef void (*Fork)(void (*)(void*), void*, unsigned, unsigned);

void on_threads(int64_t threads, void (*run)(void*), void* job) {
  static const Fork fork = reinterpret_cast<Fork>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  if (threads <= 1) return run(job);
  if (fork) return fork(run, job, static_cast<unsigned>(threads), 0);
  std::vector<std::thread> others;
  for (int64_t t = 1; t < threads; ++t) others.emplace_back(run, job);
  run(job);
  for (auto& other : others) other.join();
}

template <class Work>
void in_parallel(int64_t threads, int64_t tasks, const Work& work) {
  struct Job {
    const Work& work;
    int64_t tasks;
    std::atomic<int64_t> next{0};
  } job{work, tasks};
  const auto run = [](void* data) {
    Job& job = *static_cast<Job*>(data);
    auto scratch = job.work.scratch();
    for (int64_t i; (i = job.next.fetch_add(1)) < job.tasks;) job.work(i, scratch);
  };
  on_threads(std::min(threads, tasks), run, &job);
}

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
