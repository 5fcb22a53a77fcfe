// Sums over pixels, for each channel.

#pragma once

#include <numeric>

#include "direct.h"

namespace ev3 {

constexpr int64_t SUM_FLOATS = 1 << 14;  // at least, of each part that is summed by itself

// Adds the sums over `rows` rows of V vectors, `width` floats apart, of a and of a b.
template <int V>
inline void sum_rows(const float* a, const float* b, int64_t rows, int64_t width, float* of_a, float* of_product) {
  Vector s[V] = {}, p[V] = {};
  for (int64_t r = 0; r < rows; ++r, a += width, b += width)
    for (int v = 0; v < V; ++v) {
      const Vector value = load(a + v * LANES);
      s[v] += value, p[v] += value * load(b + v * LANES);
    }
  for (int v = 0; v < V; ++v) store(of_a + v * LANES, s[v]), store(of_product + v * LANES, p[v]);
}

// out [2, C]: the sums over n pixels of a [n, C], and of a b.
inline void channel_sums(xla::ffi::ThreadPool& pool, const float* a, const float* b, int64_t n, int64_t C, float* out) {
  const int64_t least = std::lcm(C, static_cast<int64_t>(LANES)), width = least * std::max<int64_t>(1, 4 * LANES / least);
  const int64_t rows = n * C / width;
  const int64_t parts = std::clamp<int64_t>(std::min(rows, rows * width / SUM_FLOATS), 1, MAX_PARTIALS);
  float* sums = scratch<PARTIAL>(parts * 2 * width);
  parallel(pool, parts, [&](int64_t part) {
    const int64_t first = part * rows / parts, count = (part + 1) * rows / parts - first;
    float *to = sums + part * 2 * width, *product = to + width;
    const float *x = a + first * width, *y = b + first * width;
    int64_t w = 0;
    for (; w + 4 * LANES <= width; w += 4 * LANES) sum_rows<4>(x + w, y + w, count, width, to + w, product + w);
    for (; w < width; w += LANES) sum_rows<1>(x + w, y + w, count, width, to + w, product + w);
  });
  std::fill(out, out + 2 * C, 0.f);
  for (int64_t part = 0; part < parts; ++part)
    for (int64_t w = 0, c = 0; w < width; ++w, c = c + 1 == C ? 0 : c + 1) {
      out[c] += sums[part * 2 * width + w];
      out[C + c] += sums[part * 2 * width + width + w];
    }
  for (int64_t i = rows * width, c = 0; i < n * C; ++i, c = c + 1 == C ? 0 : c + 1) out[c] += a[i], out[C + c] += a[i] * b[i];
}

}  // namespace ev3
