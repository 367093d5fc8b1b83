// Matrix products on small tiles in float32 for CPUs, and dealing work to threads: what all native kernels stand on.
//
// A is read by broadcast, element by element, B is packed in panels of PANEL columns, and a tile of ROWS x PANEL sums stays in
// registers. Work is dealt to threads in an order that does not change results.
#pragma once
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
