// Products of small matrices in registers: the inner loops of all convolutions.
//
// Vectors hold LANES output channels. Input channels are stored in blocks of up to BLOCK neighbors, so that the distance
// between pixels is a constant of the program and every input value is one broadcast from memory.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace ev3 {

#if defined(__AVX512F__)
constexpr int LANES = 16, REGISTERS = 32;
#else
constexpr int LANES = 8, REGISTERS = 16;
#endif
constexpr int BLOCK = 16;

typedef float Vector __attribute__((vector_size(LANES * sizeof(float))));
typedef float Unaligned __attribute__((vector_size(LANES * sizeof(float)), aligned(sizeof(float))));

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

inline Vector load(const float* from) { return *reinterpret_cast<const Unaligned*>(from); }

// The first n values, then zeros.
inline Vector load(const float* from, int64_t n) {
  if (n >= LANES) return load(from);
  Vector v{};
  std::memcpy(&v, from, n * sizeof(float));
  return v;
}

// Stores the first n values, or all.
inline void store(float* to, Vector v, int64_t n = LANES) {
  if (n >= LANES) *reinterpret_cast<Unaligned*>(to) = v;
  else std::memcpy(to, &v, n * sizeof(float));
}

// Vectors of the tile that starts at output channel o of O: two if there are more than LANES left.
inline int vectors(int64_t o, int64_t O) { return O - o > LANES ? 2 : 1; }

// [rows, O] -> for each tile of output channels [rows, vectors * LANES]. The tile of channel o starts at o * rows.
inline void pack(const float* weights, int64_t rows, int64_t O, float* to) {
  for (int64_t o = 0; o < O;) {
    const int64_t width = vectors(o, O) * LANES, n = std::min(width, O - o);
    for (int64_t r = 0; r < rows; ++r, to += width) {
      std::memcpy(to, weights + r * O + o, n * sizeof(float));
      std::fill(to + n, to + width, 0.f);
    }
    o += width;
  }
}

// Input pixels that one kernel position multiplies: `offset` floats after those of the output pixel, from row `row` of weights.
struct Tap {
  int64_t offset, row;
};

// Where input channels are: blocks of `block` channels, `block_step` floats apart.
struct Channels {
  int64_t count, block, block_step;
};

// P output pixels x V vectors of channels: y[p] = sum over taps and channels of x[p STEP + offset + channel] * weights.
template <int P, int V, int STEP>
inline void pixels(const float* x, int64_t step, const Channels& in, const Tap* taps, int64_t n_taps, const float* weights,
                   float* y, int64_t y_step, int64_t n) {
  if (STEP) step = STEP;
  Vector sum[P][V];
  for (int p = 0; p < P; ++p)
    for (int v = 0; v < V; ++v) sum[p][v] = Vector{};
  for (int64_t t = 0; t < n_taps; ++t) {
    const float* w = weights + taps[t].row * V * LANES;
    for (int64_t b = 0; b * in.block < in.count; ++b) {
      const float* from = x + taps[t].offset + b * in.block_step;
      const int64_t channels = std::min(in.block, in.count - b * in.block);
#pragma GCC unroll 2
      for (int64_t c = 0; c < channels; ++c, w += V * LANES) {
        Vector row[V];
        for (int v = 0; v < V; ++v) row[v] = load(w + v * LANES);
        for (int p = 0; p < P; ++p)
          for (int v = 0; v < V; ++v) sum[p][v] += row[v] * from[p * step + c];
      }
    }
  }
  for (int p = 0; p < P; ++p)
    for (int v = 0; v < V; ++v) store(y + p * y_step + v * LANES, sum[p][v], n - v * LANES);
}

// As `pixels`, for any number of them: as many tiles of P as fit, then of P / 2, and so on.
template <int P, int V, int STEP>
inline void all_pixels(int64_t count, const float* x, int64_t step, const Channels& in, const Tap* taps, int64_t n_taps,
                       const float* weights, float* y, int64_t y_step, int64_t n) {
  if (STEP) step = STEP;
  for (; count >= P; count -= P, x += P * step, y += P * y_step)
    pixels<P, V, STEP>(x, step, in, taps, n_taps, weights, y, y_step, n);
  if constexpr (P > 1)
    if (count) all_pixels<P / 2, V, STEP>(count, x, step, in, taps, n_taps, weights, y, y_step, n);
}

// A row of output pixels with all O channels; `rows` is the number of rows of packed weights.
template <int STEP>
inline void all_channels(int64_t count, const float* x, int64_t step, const Channels& in, const Tap* taps, int64_t n_taps,
                         const float* packed, int64_t rows, float* y, int64_t y_step, int64_t O) {
  for (int64_t o = 0; o < O;) {
    const int v = vectors(o, O);
    if (v == 2)
      all_pixels<REGISTERS / 4, 2, STEP>(count, x, step, in, taps, n_taps, packed + o * rows, y + o, y_step, O - o);
    else
      all_pixels<REGISTERS / 2, 1, STEP>(count, x, step, in, taps, n_taps, packed + o * rows, y + o, y_step, O - o);
    o += v * LANES;
  }
}

// Lines of pixels of a kernel's gradient.
struct Lines {
  int64_t count, width;              // lines, and pixels of each
  int64_t x_line, x_step;            // floats between lines and pixels of x
  int64_t g_line, g_step;            // and of the gradient
};

// R input values x V vectors of output channels: to[r] = sum over all pixels of x[r] * g, plus to[r] if `add`.
template <int R, int V, int STEP>
inline void outer(const float* x, const float* g, const Lines& lines, bool add, float* to, int64_t to_step) {
  const int64_t step = STEP ? STEP : lines.x_step;
  Vector sum[R][V];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) sum[r][v] = add ? load(to + r * to_step + v * LANES) : Vector{};
  for (int64_t i = 0; i < lines.count; ++i) {
    const float *a = x + i * lines.x_line, *b = g + i * lines.g_line;
    for (int64_t j = 0; j < lines.width; ++j, a += step, b += lines.g_step) {
      Vector row[V];
      for (int v = 0; v < V; ++v) row[v] = load(b + v * LANES);
      for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) sum[r][v] += row[v] * a[r];
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) store(to + r * to_step + v * LANES, sum[r][v]);
}

template <int R, int V, int STEP>
inline void outer_rows(int64_t rows, const float* x, const float* g, const Lines& lines, bool add, float* to, int64_t to_step) {
  for (; rows >= R; rows -= R, x += R, to += R * to_step) outer<R, V, STEP>(x, g, lines, add, to, to_step);
  if constexpr (R > 1)
    if (rows) outer_rows<R / 2, V, STEP>(rows, x, g, lines, add, to, to_step);
}

// As `outer`, for any number of rows and O channels, a multiple of LANES.
template <int STEP>
inline void outer_channels(int64_t rows, const float* x, const float* g, const Lines& lines, bool add, float* to,
                           int64_t O) {
  for (int64_t o = 0; o < O;) {
    const int v = vectors(o, O);
    if (v == 2) outer_rows<REGISTERS / 4, 2, STEP>(rows, x, g + o, lines, add, to + o, O);
    else outer_rows<8, 1, STEP>(rows, x, g + o, lines, add, to + o, O);
    o += v * LANES;
  }
}

}  // namespace ev3
