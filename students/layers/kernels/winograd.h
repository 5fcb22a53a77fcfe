// 3x3 convolutions of stride 1 with 16 instead of 36 products for every 2x2 output pixels.
//
// For 4x4 input values d, a 3x3 kernel w and 2x2 output values y: y = A' [(G w G') * (B' d B)] A, with * by elements. The same
// identity, differentiated, gives the kernel's gradient: dw = G' [(A g A') * (B' d B)] G.
//
// Reference: Lavin and Gray, Fast algorithms for convolutional neural networks, CVPR 2016; arXiv:1509.09308.

#pragma once

#include "direct.h"

namespace ev3 {

constexpr int64_t GROUP_FLOATS = 1 << 16;  // transformed values of a group of tiles: they stay in the L2 cache
constexpr int64_t TILES_PER_PARTIAL = 256;

// 2x2 output pixels each, numbered along rows, then columns, then images.
struct Tiles {
  int64_t rows, columns, count, group;

  Tiles(int64_t B, int64_t height, int64_t width, int64_t channels)
      : rows(ceil_div(height, 2)), columns(ceil_div(width, 2)), count(B * rows * columns),
        group(std::clamp<int64_t>(GROUP_FLOATS / (16 * channels) / 16 * 16, 16, 512)) {}

  // Floats of one of the 16 values of a group's tiles. Multiples of 4096 bytes would share the same lines of the L1 cache.
  int64_t plane(int64_t channels) const { return group * channels + BLOCK; }
};

// B' d B of 4x4 values; the 16 results are `plane` floats apart.
inline void transform_tile(Vector* d, float* to, int64_t plane) {
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) {
    const Vector d0 = d[k], d1 = d[4 + k], d2 = d[8 + k], d3 = d[12 + k];
    d[k] = d0 - d2, d[4 + k] = d1 + d2, d[8 + k] = d2 - d1, d[12 + k] = d1 - d3;
  }
#pragma GCC unroll 4
  for (int k = 0; k < 16; k += 4, to += 4 * plane) {
    store(to, d[k] - d[k + 2]);
    store(to + plane, d[k + 1] + d[k + 2]);
    store(to + 2 * plane, d[k + 2] - d[k + 1]);
    store(to + 3 * plane, d[k + 1] - d[k + 3]);
  }
}

// Writes values [16, C / BLOCK, group, BLOCK], transformed from the 4x4 input pixels of tiles first .. first + n.
inline void transform_input(const float* x, Shape in, int64_t top, int64_t left, const Tiles& tiles, int64_t first, int64_t n,
                            float* to) {
  const int64_t blocks = ceil_div(in.C, BLOCK), plane = tiles.plane(blocks * BLOCK);
  const float* zeros = scratch<ZEROS>(blocks * BLOCK);
  int64_t column = first % tiles.columns, row = first / tiles.columns % tiles.rows, b = first / tiles.columns / tiles.rows;
  for (int64_t t = 0; t < n; ++t) {
    const int64_t i0 = 2 * row - top, j0 = 2 * column - left;
    const float *corner = x + ((b * in.H + i0) * in.W + j0) * in.C, *from[16];
    const bool inside = i0 >= 0 && i0 + 4 <= in.H && j0 >= 0 && j0 + 4 <= in.W;
#pragma GCC unroll 16
    for (int k = 0; k < 16; ++k) from[k] = corner + (k / 4 * in.W + k % 4) * in.C;
    if (!inside)
      for (int k = 0; k < 16; ++k) {
        const int64_t i = i0 + k / 4, j = j0 + k % 4;
        if (i < 0 || i >= in.H || j < 0 || j >= in.W) from[k] = zeros;
      }
    float* out = to + t * BLOCK;
    for (int64_t c = 0; c < 2 * in.C; c += 16) {
      __builtin_prefetch(corner + 4 * in.W * in.C + in.C + c);
      __builtin_prefetch(corner + 5 * in.W * in.C + in.C + c);
    }
    for (int64_t c = 0; c < blocks * BLOCK; c += LANES) {
      Vector d[16];
      if (in.C - c >= LANES) {
#pragma GCC unroll 16
        for (int k = 0; k < 16; ++k) d[k] = load(from[k] + c);
      } else {
        for (int k = 0; k < 16; ++k) d[k] = load(from[k] + c, std::max<int64_t>(in.C - c, 0));
      }
      transform_tile(d, out + c / BLOCK * tiles.group * BLOCK + c % BLOCK, plane);
    }
    if (++column == tiles.columns) {
      column = 0;
      if (++row == tiles.rows) row = 0, ++b;
    }
  }
}

// Output pixels from products [16, group, O].
inline void transform_output(const float* products, const Tiles& tiles, int64_t first, int64_t n, int64_t O, float* y,
                             int64_t height, int64_t width, int64_t channels) {
  const int64_t plane = tiles.plane(O);
  for (int64_t t = 0; t < n; ++t) {
    const int64_t tile = first + t, b = tile / (tiles.rows * tiles.columns);
    const int64_t i = 2 * (tile / tiles.columns % tiles.rows), j = 2 * (tile % tiles.columns);
    float* next = y + ((b * height + i + 2) * width + j) * channels;
    for (int64_t o = 0; o < 2 * channels; o += 16) {
      __builtin_prefetch(next + o, 1);
      __builtin_prefetch(next + width * channels + o, 1);
    }
    for (int64_t o = 0; o < channels; o += LANES) {
      const float* from = products + t * O + o;
      Vector s[4][2];
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) {
        const Vector m0 = load(from + 4 * k * plane), m1 = load(from + (4 * k + 1) * plane);
        const Vector m2 = load(from + (4 * k + 2) * plane), m3 = load(from + (4 * k + 3) * plane);
        s[k][0] = m0 + m1 + m2, s[k][1] = m1 - m2 - m3;
      }
      for (int64_t q = 0; q < 2 && j + q < width; ++q) {
        float* to = y + ((b * height + i) * width + j + q) * channels + o;
        store(to, s[0][q] + s[1][q] + s[2][q], channels - o);
        if (i + 1 < height) store(to + width * channels, s[1][q] - s[2][q] - s[3][q], channels - o);
      }
    }
  }
}

// Writes values [16, group, O], transformed from the 2x2 gradients of tiles first .. first + n.
inline void transform_gradient(const float* g, Shape out, const Tiles& tiles, int64_t first, int64_t n, int64_t O, float* to) {
  const int64_t plane = tiles.plane(O);
  for (int64_t t = 0; t < n; ++t) {
    const int64_t tile = first + t, b = tile / (tiles.rows * tiles.columns);
    const int64_t i = 2 * (tile / tiles.columns % tiles.rows), j = 2 * (tile % tiles.columns);
    const float* next = g + ((b * out.H + i + 2) * out.W + j) * out.C;
    for (int64_t o = 0; o < 2 * out.C; o += 16) {
      __builtin_prefetch(next + o);
      __builtin_prefetch(next + out.W * out.C + o);
    }
    for (int64_t o = 0; o < O; o += LANES) {
      Vector v[2][2];
      for (int64_t p = 0; p < 2; ++p)
        for (int64_t q = 0; q < 2; ++q)
          v[p][q] = i + p < out.H && j + q < out.W ? load(g + ((b * out.H + i + p) * out.W + j + q) * out.C + o, out.C - o)
                                                   : Vector{};
      const Vector rows[4][2] = {{v[0][0], v[0][1]},
                                 {v[0][0] + v[1][0], v[0][1] + v[1][1]},
                                 {v[0][0] - v[1][0], v[0][1] - v[1][1]},
                                 {-v[1][0], -v[1][1]}};
      float* at = to + t * O + o;
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k, at += 4 * plane) {
        store(at, rows[k][0]);
        store(at + plane, rows[k][0] + rows[k][1]);
        store(at + 2 * plane, rows[k][0] - rows[k][1]);
        store(at + 3 * plane, -rows[k][1]);
      }
    }
  }
}

// [3, 3, n] -> [16, n]
inline void transform_kernel(const float* w, int64_t n, float* to) {
  for (int64_t c = 0; c < n; ++c) {
    float half[4][3];
    for (int q = 0; q < 3; ++q) {
      const float w0 = w[q * n + c], w1 = w[(3 + q) * n + c], w2 = w[(6 + q) * n + c];
      half[0][q] = w0, half[1][q] = 0.5f * (w0 + w1 + w2), half[2][q] = 0.5f * (w0 - w1 + w2), half[3][q] = w2;
    }
    for (int k = 0; k < 4; ++k) {
      const float *h = half[k];
      float* out = to + 4 * k * n + c;
      out[0] = h[0], out[n] = 0.5f * (h[0] + h[1] + h[2]), out[2 * n] = 0.5f * (h[0] - h[1] + h[2]), out[3 * n] = h[2];
    }
  }
}

// y = x convolved with weights [3, 3, C, O].
inline void winograd(xla::ffi::ThreadPool& pool, const float* x, Shape in, int64_t top, int64_t left, const float* weights,
                     float* y, Shape out) {
  const int64_t C = in.C, O = round_up(out.C, LANES), blocks = ceil_div(C, BLOCK);
  const Tiles tiles(out.B, out.H, out.W, blocks * BLOCK + O);
  float *transformed = scratch<TRANSFORMED>(16 * C * out.C), *packed = scratch<PACKED>(16 * C * O);
  transform_kernel(weights, C * out.C, transformed);
  for (int k = 0; k < 16; ++k) pack(transformed + k * C * out.C, C, out.C, packed + k * C * O);
  const int64_t plane = tiles.plane(blocks * BLOCK), o_plane = tiles.plane(O);
  parallel(pool, ceil_div(tiles.count, tiles.group), [&](int64_t item) {
    const int64_t first = item * tiles.group, n = std::min(tiles.group, tiles.count - first);
    float *values = scratch<INPUT>(16 * plane), *products = scratch<OUTPUT>(16 * o_plane);
    transform_input(x, in, top, left, tiles, first, n, values);
    const Tap tap{0, 0};
    const Channels channels{C, BLOCK, tiles.group * BLOCK};
    for (int k = 0; k < 16; ++k)
      all_channels<BLOCK>(n, values + k * plane, BLOCK, channels, &tap, 1, packed + k * C * O, C,
                          products + k * o_plane, O, O);
    transform_output(products, tiles, first, n, O, y, out.H, out.W, out.C);
  });
}

// dw [3, 3, C, O]
inline void winograd_kernel(xla::ffi::ThreadPool& pool, const float* x, Shape in, const float* g, Shape out, int64_t top,
                            int64_t left, float* dw) {
  const int64_t O = round_up(out.C, LANES), blocks = ceil_div(in.C, BLOCK), size = 16 * blocks * BLOCK * O;
  const Tiles tiles(out.B, out.H, out.W, blocks * BLOCK + O);
  const int64_t most = std::min(tiles.count / TILES_PER_PARTIAL, PARTIAL_FLOATS / size);
  const int64_t groups = ceil_div(tiles.count, tiles.group), parts = std::clamp<int64_t>(std::min(most, groups), 1, MAX_PARTIALS);
  const int64_t plane = tiles.plane(blocks * BLOCK), o_plane = tiles.plane(O);
  float* sums = scratch<PARTIAL>(parts * size);
  parallel(pool, parts, [&](int64_t part) {
    float *values = scratch<INPUT>(16 * plane), *gradients = scratch<OUTPUT>(16 * o_plane), *sum = sums + part * size;
    const int64_t begin = part * groups / parts;
    for (int64_t group = begin; group < (part + 1) * groups / parts; ++group) {
      const int64_t first = group * tiles.group, n = std::min(tiles.group, tiles.count - first);
      transform_input(x, in, top, left, tiles, first, n, values);
      transform_gradient(g, out, tiles, first, n, O, gradients);
      const Lines lines{1, n, 0, BLOCK, 0, O};
      for (int k = 0; k < 16; ++k)
        for (int64_t b = 0; b < blocks; ++b)
          outer_channels<BLOCK>(BLOCK, values + k * plane + b * tiles.group * BLOCK, gradients + k * o_plane, lines,
                                group > begin, sum + (k * blocks + b) * BLOCK * O, O);
    }
  });
  parallel(pool, in.C, [&](int64_t c) {
    for (int64_t o = 0; o < O; o += LANES) {
      Vector m[16] = {}, half[3][4];
      for (int64_t part = 0; part < parts; ++part)
        for (int k = 0; k < 16; ++k) m[k] += load(sums + part * size + (k * blocks * BLOCK + c) * O + o);
      for (int k = 0; k < 4; ++k) {
        const Vector sum = 0.5f * (m[4 + k] + m[8 + k]);
        half[0][k] = m[k] + sum, half[1][k] = 0.5f * (m[4 + k] - m[8 + k]), half[2][k] = sum + m[12 + k];
      }
      for (int p = 0; p < 3; ++p) {
        const Vector *h = half[p], sum = 0.5f * (h[1] + h[2]), row[3] = {h[0] + sum, 0.5f * (h[1] - h[2]), sum + h[3]};
        for (int q = 0; q < 3; ++q) store(dw + ((3 * p + q) * in.C + c) * out.C + o, row[q], out.C - o);
      }
    }
  });
}

}  // namespace ev3
