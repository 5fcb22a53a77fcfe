// Depthwise convolutions: every channel has a kernel of its own. Memory bounds them, so nothing is copied.

#pragma once

#include "direct.h"

namespace ev3 {

struct Window {  // a kernel of kh x kw, its strides, and the paddings before the image
  int64_t kh, kw, down, right, top, left;

  bool is_fast() const { return kh == 3 && kw == 3 && (right == 1 || right == 2); }

  // Number of output columns of `out` whose input columns end inside an image of width W.
  int64_t last_inside(int64_t W, int64_t out) const { return W + left < kw ? 0 : std::min(out, (W + left - kw) / right + 1); }
};

// Kernel positions first .. end along one axis for which `low` + position is inside 0 .. n.
struct Span {
  int64_t first, end;
  Span(int64_t low, int64_t k, int64_t n) : first(std::max<int64_t>(0, -low)), end(std::min(k, n - low)) {}
};

// Output pixels first .. end of a row for kernels of 3x3, whose columns are all inside; n channels. `rows` are the input rows, or
// nullptr outside of the image.
template <int S>
inline void row_3x3(const float* const* rows, const float* w, int64_t C, int64_t n, int64_t left, int64_t first, int64_t end,
                    float* y) {
  Vector k[3][3];
  const float* from[3];
  for (int p = 0; p < 3; ++p) {
    from[p] = rows[p] ? rows[p] : rows[1];
    for (int q = 0; q < 3; ++q) k[p][q] = rows[p] ? load(w + (3 * p + q) * C, n) : Vector{};
  }
  constexpr int N = 4, COLUMNS = (N - 1) * S + 3;
  int64_t j = first;
  if (n >= LANES)
    for (; j + N <= end; j += N) {
      Vector sum[N] = {};
#pragma GCC unroll 3
      for (int p = 0; p < 3; ++p) {
        const float* at = from[p] + (j * S - left) * C;
        Vector x[COLUMNS];
#pragma GCC unroll 9
        for (int q = 0; q < COLUMNS; ++q) x[q] = load(at + q * C);
#pragma GCC unroll 4
        for (int m = 0; m < N; ++m)
#pragma GCC unroll 3
          for (int q = 0; q < 3; ++q) sum[m] += x[m * S + q] * k[p][q];
      }
      for (int m = 0; m < N; ++m) store(y + (j + m) * C, sum[m]);
    }
  for (; j < end; ++j) {
    Vector sum{};
    for (int p = 0; p < 3; ++p)
      for (int q = 0; q < 3; ++q) sum += load(from[p] + (j * S - left + q) * C, n) * k[p][q];
    store(y + j * C, sum, n);
  }
}

// y[i, j, c] = sum over (p, q) of x[i down + p - top, j right + q - left, c] w[p, q, c]
inline void depthwise(xla::ffi::ThreadPool& pool, const float* x, Shape in, const float* w, const Window& k, float* y, Shape out) {
  const int64_t C = in.C, last = k.last_inside(in.W, out.W), first = std::min(last, ceil_div(k.left, k.right));
  const bool fast = k.is_fast() && first < last;
  parallel(pool, out.B * out.H, [&](int64_t item) {
    const int64_t b = item / out.H, i = item % out.H, i0 = i * k.down - k.top;
    const Span span(i0, k.kh, in.H);
    for (int64_t c = 0; c < C; c += LANES) {
      const int64_t n = C - c;
      float* to = y + (b * out.H + i) * out.W * C + c;
      const auto pixel = [&](int64_t j) {
        const int64_t j0 = j * k.right - k.left;
        const Span columns(j0, k.kw, in.W);
        Vector sum{};
        for (int64_t p = span.first; p < span.end; ++p) {
          const float* from = x + ((b * in.H + i0 + p) * in.W + j0) * C + c;
          const float* weights = w + p * k.kw * C + c;
          for (int64_t q = columns.first; q < columns.end; ++q) sum += load(from + q * C, n) * load(weights + q * C, n);
        }
        store(to + j * C, sum, n);
      };
      if (!fast || span.first > 1 || span.end < 2) {
        for (int64_t j = 0; j < out.W; ++j) pixel(j);
        continue;
      }
      for (int64_t j = 0; j < first; ++j) pixel(j);
      const float* rows[3];
      for (int64_t p = 0; p < 3; ++p)
        rows[p] = p >= span.first && p < span.end ? x + (b * in.H + i0 + p) * in.W * C + c : nullptr;
      if (k.right == 1) row_3x3<1>(rows, w + c, C, n, k.left, first, last, to);
      else row_3x3<2>(rows, w + c, C, n, k.left, first, last, to);
      for (int64_t j = last; j < out.W; ++j) pixel(j);
    }
  });
}

// dx[i, j, c] = sum over (p, q) of g[(i + top - p) / down, (j + left - q) / right, c] w[p, q, c], where the divisions are exact
inline void depthwise_input(xla::ffi::ThreadPool& pool, const float* g, Shape out, const float* w, const Window& k, float* dx,
                            Shape in) {
  const int64_t C = in.C;
  if (k.down == 1 && k.right == 1) {  // a convolution with the flipped kernel
    float* flipped = scratch<TRANSPOSED>(k.kh * k.kw * C);
    for (int64_t r = 0; r < k.kh * k.kw; ++r) std::memcpy(flipped + r * C, w + (k.kh * k.kw - 1 - r) * C, C * sizeof(float));
    return depthwise(pool, g, out, flipped, {k.kh, k.kw, 1, 1, k.kh - 1 - k.top, k.kw - 1 - k.left}, dx, in);
  }
  parallel(pool, in.B * in.H, [&](int64_t item) {
    const int64_t b = item / in.H, i = item % in.H + k.top;
    for (int64_t c = 0; c < C; c += LANES) {
      const int64_t n = C - c;
      for (int64_t j = k.left; j < in.W + k.left; ++j) {
        Vector sum{};
        for (int64_t p = i % k.down; p < k.kh && p <= i; p += k.down) {
          const int64_t row = (i - p) / k.down;
          if (row >= out.H) continue;
          for (int64_t q = j % k.right; q < k.kw && q <= j; q += k.right) {
            const int64_t column = (j - q) / k.right;
            if (column < out.W)
              sum += load(g + ((b * out.H + row) * out.W + column) * C + c, n) * load(w + (p * k.kw + q) * C + c, n);
          }
        }
        store(dx + (item * in.W + j - k.left) * C + c, sum, n);
      }
    }
  });
}

// Adds to dw [3, stride] the products of columns first .. end of a row's gradient with three rows of x, as in `row_3x3`.
template <int S>
inline void gradient_row_3x3(const float* const* rows, const float* g, int64_t C, int64_t n, int64_t left, int64_t first,
                             int64_t end, float* dw, int64_t stride) {
  constexpr int N = 4, COLUMNS = (N - 1) * S + 3;
  Vector sum[3][3];
  for (int p = 0; p < 3; ++p)
    for (int q = 0; q < 3; ++q) sum[p][q] = load(dw + (3 * p + q) * stride);
  int64_t j = first;
  if (n >= LANES)
    for (; j + N <= end; j += N) {
      Vector grad[N];
#pragma GCC unroll 4
      for (int m = 0; m < N; ++m) grad[m] = load(g + (j + m) * C);
#pragma GCC unroll 3
      for (int p = 0; p < 3; ++p) {
        const float* at = (rows[p] ? rows[p] : rows[1]) + (j * S - left) * C;
        Vector x[COLUMNS];
#pragma GCC unroll 9
        for (int q = 0; q < COLUMNS; ++q) x[q] = load(at + q * C);
#pragma GCC unroll 4
        for (int m = 0; m < N; ++m)
#pragma GCC unroll 3
          for (int q = 0; q < 3; ++q) sum[p][q] += x[m * S + q] * grad[m];
      }
    }
  for (; j < end; ++j)
    for (int p = 0; p < 3; ++p)
      for (int q = 0; q < 3; ++q)
        sum[p][q] += load((rows[p] ? rows[p] : rows[1]) + (j * S - left + q) * C, n) * load(g + j * C, n);
  for (int p = 0; p < 3; ++p)
    if (rows[p])
      for (int q = 0; q < 3; ++q) store(dw + (3 * p + q) * stride, sum[p][q]);
}

// dw[p, q, c] = sum over examples and pixels of x[i down + p - top, j right + q - left, c] g[i, j, c]
inline void depthwise_kernel(xla::ffi::ThreadPool& pool, const float* x, Shape in, const float* g, Shape out, const Window& k,
                             float* dw) {
  const int64_t C = in.C, wide = round_up(C, LANES), size = k.kh * k.kw * wide;
  const int64_t last = k.last_inside(in.W, out.W), first = std::min(last, ceil_div(k.left, k.right));
  const bool fast = k.is_fast() && first < last;
  const int64_t items = out.B * out.H, parts = std::clamp<int64_t>(std::min(items, PARTIAL_FLOATS / size), 1, MAX_PARTIALS);
  float* sums = scratch<PARTIAL>(parts * size);
  parallel(pool, parts, [&](int64_t part) {
    std::fill(sums + part * size, sums + (part + 1) * size, 0.f);
    for (int64_t item = part * items / parts; item < (part + 1) * items / parts; ++item) {
      const int64_t b = item / out.H, i = item % out.H, i0 = i * k.down - k.top;
      const Span span(i0, k.kh, in.H);
      for (int64_t c = 0; c < C; c += LANES) {
        const int64_t n = C - c;
        float* to = sums + part * size + c;
        const float *line = x + (b * in.H + i0) * in.W * C + c, *grad = g + item * out.W * C + c;
        const auto pixels = [&](int64_t from, int64_t end) {
          for (int64_t j = from; j < end; ++j) {
            const int64_t j0 = j * k.right - k.left;
            const Span columns(j0, k.kw, in.W);
            const Vector value = load(grad + j * C, n);
            for (int64_t p = span.first; p < span.end; ++p)
              for (int64_t q = columns.first; q < columns.end; ++q) {
                float* at = to + (p * k.kw + q) * wide;
                store(at, load(at) + load(line + (p * in.W + j0 + q) * C, n) * value);
              }
          }
        };
        if (!fast || span.first > 1 || span.end < 2) {
          pixels(0, out.W);
          continue;
        }
        pixels(0, first), pixels(last, out.W);
        const float* rows[3];
        for (int64_t p = 0; p < 3; ++p) rows[p] = p >= span.first && p < span.end ? line + p * in.W * C : nullptr;
        if (k.right == 1) gradient_row_3x3<1>(rows, grad, C, n, k.left, first, last, to, wide);
        else gradient_row_3x3<2>(rows, grad, C, n, k.left, first, last, to, wide);
      }
    }
  });
  for (int64_t r = 0; r < k.kh * k.kw; ++r)
    for (int64_t c = 0; c < C; ++c) {
      float total = 0.f;
      for (int64_t part = 0; part < parts; ++part) total += sums[part * size + r * wide + c];
      dw[r * C + c] = total;
    }
}

}  // namespace ev3
