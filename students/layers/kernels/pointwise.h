// The kernel's gradient of a 1x1 convolution, a product of two long matrices.

#pragma once

#include "direct.h"

namespace ev3 {

constexpr int64_t CHUNK_FLOATS = 1 << 16;  // of pixels that are multiplied at a time: they stay in the L2 cache

// dw [C, O] = x' g, for x [n, C] and g [n, O]
inline void pointwise_kernel(xla::ffi::ThreadPool& pool, const float* x, const float* g, int64_t n, int64_t C, int64_t O,
                             float* dw) {
  const int64_t wide = round_up(O, LANES), size = C * wide;
  const int64_t chunk = std::clamp<int64_t>(CHUNK_FLOATS / (C + wide), 16, n), chunks = ceil_div(n, chunk);
  const int64_t parts = std::clamp<int64_t>(std::min(chunks / 4, PARTIAL_FLOATS / size), 1, MAX_PARTIALS);
  float* sums = scratch<PARTIAL>(parts * size);
  parallel(pool, parts, [&](int64_t part) {
    const int64_t begin = part * chunks / parts;
    for (int64_t item = begin; item < (part + 1) * chunks / parts; ++item) {
      const int64_t first = item * chunk, count = std::min(chunk, n - first);
      const float* grad = g + first * O;
      if (wide != O) {
        float* copy = scratch<OUTPUT>(count * wide);
        for (int64_t j = 0; j < count; ++j) {
          std::memcpy(copy + j * wide, grad + j * O, O * sizeof(float));
          std::fill(copy + j * wide + O, copy + (j + 1) * wide, 0.f);
        }
        grad = copy;
      }
      outer_channels<0>(C, x + first * C, grad, {1, count, 0, C, 0, wide}, item > begin, sums + part * size, wide);
    }
  });
  parallel(pool, C, [&](int64_t c) {
    for (int64_t o = 0; o < O; o += LANES) {
      Vector total{};
      for (int64_t part = 0; part < parts; ++part) total += load(sums + part * size + c * wide + o);
      store(dw + c * O + o, total, O - o);
    }
  });
}

}  // namespace ev3
