// Convolutions of any kernel size and strides, as sums over kernel positions.

#pragma once

#include "parallel.h"
#include "tiles.h"

namespace ev3 {

constexpr int64_t BAND_FLOATS = 1 << 15;      // of the input rows that are copied at a time: they stay in the L2 cache
constexpr int64_t PARTIAL_FLOATS = 1 << 22;   // of all partial sums of a kernel's gradient
constexpr int64_t MAX_PARTIALS = 32;

struct Shape {  // of images [B, H, W, C]
  int64_t B, H, W, C;
  int64_t size() const { return H * W * C; }
};

// One kernel position: output pixel (i, j) reads input pixel (i strides + row - top, j strides + column - left).
struct Position {
  int64_t row, column;
};

// Images whose rows are copied with zeros around them, as [rows, C / block, columns, block].
struct Padded {
  Shape in;
  int64_t top, left, columns, block;

  Padded(Shape in, int64_t top, int64_t left, int64_t columns)
      : in(in), top(top), left(left), columns(columns), block(in.C <= 4 ? 4 : BLOCK) {}
  int64_t blocks() const { return ceil_div(in.C, block); }
  int64_t block_step() const { return columns * block; }
  int64_t row_step() const { return blocks() * block_step(); }
  Channels channels() const { return {in.C, block, block_step()}; }

  // Rows first .. first + count of the padded image.
  void copy(const float* image, int64_t first, int64_t count, float* to) const {
    const int64_t width = std::clamp<int64_t>(columns - left, 0, in.W);
    for (int64_t i = first - top; i < first - top + count; ++i, to += row_step()) {
      if (i < 0 || i >= in.H) {
        std::fill(to, to + row_step(), 0.f);
        continue;
      }
      for (int64_t b = 0; b < blocks(); ++b) {
        const int64_t n = std::min(block, in.C - b * block);
        float* line = to + b * block_step();
        const float* from = image + i * in.W * in.C + b * block;
        std::fill(line, line + left * block, 0.f);
        std::fill(line + (left + width) * block, line + block_step(), 0.f);
        line += left * block;
        for (int64_t j = 0; j < width; ++j, line += block, from += in.C) {
          for (int64_t c = 0; c < n; ++c) line[c] = from[c];
          for (int64_t c = n; c < block; ++c) line[c] = 0.f;
        }
      }
    }
  }

  // Output rows whose input fits into BAND_FLOATS, at least one.
  int64_t band(int64_t kernel_height, int64_t stride) const {
    return std::max<int64_t>(1, (BAND_FLOATS / row_step() - kernel_height) / stride + 1);
  }
};

// Calls f<STEP>() with the constant distance between neighboring pixels, or 0 for any other.
template <typename F>
inline void with_step(int64_t step, const F& f) {
  switch (step) {
    case 4: return f(std::integral_constant<int, 4>());
    case 8: return f(std::integral_constant<int, 8>());
    case 16: return f(std::integral_constant<int, 16>());
    case 32: return f(std::integral_constant<int, 32>());
    default: return f(std::integral_constant<int, 0>());
  }
}

// Output pixels y[i, j] of an image: `rows` x `columns` of them, row_step and step floats apart.
struct Output {
  float* y;
  int64_t image_step, rows, columns, row_step, step, O;
};

// y = sum over positions k of x[strides, position k] weights[k], weights [positions, C, O].
inline void direct(xla::ffi::ThreadPool& pool, const float* x, Shape in, const std::vector<Position>& positions, int64_t top,
                   int64_t left, int64_t down, int64_t right, const float* weights, const Output& out) {
  if (out.rows <= 0 || out.columns <= 0) return;
  int64_t height = 1, width = 1;
  for (const Position& k : positions) height = std::max(height, k.row + 1), width = std::max(width, k.column + 1);
  const Padded padded(in, top, left, (out.columns - 1) * right + width);
  const int64_t rows = positions.size() * in.C;
  float* packed = scratch<PACKED>(rows * round_up(out.O, LANES));
  pack(weights, rows, out.O, packed);
  std::vector<Tap> taps;
  for (const Position& k : positions)
    taps.push_back({k.row * padded.row_step() + k.column * padded.block, static_cast<int64_t>(taps.size()) * in.C});
  const int64_t band = std::min(padded.band(height, down), out.rows), bands = ceil_div(out.rows, band);
  parallel(pool, in.B * bands, [&](int64_t item) {
    const int64_t b = item / bands, first = item % bands * band, count = std::min(band, out.rows - first);
    const int64_t needed = (count - 1) * down + height;
    float* copy = scratch<INPUT>(needed * padded.row_step());
    padded.copy(x + b * in.size(), first * down, needed, copy);
    with_step(right * padded.block, [&](auto step) {
      for (int64_t i = 0; i < count; ++i)
        all_channels<step>(out.columns, copy + i * down * padded.row_step(), right * padded.block, padded.channels(),
                           taps.data(), taps.size(), packed, rows,
                           out.y + b * out.image_step + (first + i) * out.row_step, out.step, out.O);
    });
  });
}

// dw [kh, kw, C, O] = sum over examples and pixels of x[strides, position] g.
inline void direct_kernel(xla::ffi::ThreadPool& pool, const float* x, Shape in, const float* g, Shape out, int64_t top,
                          int64_t left, int64_t down, int64_t right, float* dw, int64_t kh, int64_t kw) {
  const Padded padded(in, top, left, (out.W - 1) * right + kw);
  const int64_t O = round_up(out.C, LANES), line = kw * padded.block, size = kh * padded.blocks() * line * O;
  const int64_t band = std::min(padded.band(kh, down), out.H), bands = ceil_div(out.H, band), items = out.B * bands;
  const int64_t parts = std::clamp<int64_t>(std::min(items, PARTIAL_FLOATS / size), 1, MAX_PARTIALS);
  float* sums = scratch<PARTIAL>(parts * size);
  parallel(pool, parts, [&](int64_t part) {
    float* sum = sums + part * size;
    const int64_t begin = part * items / parts;
    for (int64_t item = begin; item < (part + 1) * items / parts; ++item) {
      const int64_t b = item / bands, first = item % bands * band, count = std::min(band, out.H - first);
      const int64_t needed = (count - 1) * down + kh;
      float* copy = scratch<INPUT>(needed * padded.row_step() + line);
      padded.copy(x + b * in.size(), first * down, needed, copy);
      const float* grad = g + b * out.size() + first * out.W * out.C;
      if (O != out.C) {
        float* wide = scratch<OUTPUT>(count * out.W * O);
        std::fill(wide, wide + count * out.W * O, 0.f);
        for (int64_t j = 0; j < count * out.W; ++j) std::memcpy(wide + j * O, grad + j * out.C, out.C * sizeof(float));
        grad = wide;
      }
      const Lines lines{count, out.W, down * padded.row_step(), right * padded.block, out.W * O, O};
      with_step(lines.x_step, [&](auto step) {
        for (int64_t p = 0; p < kh; ++p)
          for (int64_t k = 0; k < padded.blocks(); ++k)
            outer_channels<step>(line, copy + p * padded.row_step() + k * padded.block_step(), grad, lines,
                                 item > begin, sum + (p * padded.blocks() + k) * line * O, O);
      });
    }
  });
  parallel(pool, kh * kw, [&](int64_t position) {
    const int64_t p = position / kw, q = position % kw;
    for (int64_t c = 0; c < in.C; ++c) {
      float* to = dw + (position * in.C + c) * out.C;
      const int64_t row = (p * padded.blocks() + c / padded.block) * line + q * padded.block + c % padded.block;
      std::fill(to, to + out.C, 0.f);
      for (int64_t part = 0; part < parts; ++part)
        for (int64_t o = 0; o < out.C; ++o) to[o] += sums[part * size + row * O + o];
    }
  });
}

}  // namespace ev3
