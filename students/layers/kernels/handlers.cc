// Handlers of XLA's foreign function interface: convolutions of float32 images [B, H, W, C] with kernels [kh, kw, C, O].
//
// The attribute `window` holds the strides of H and W and the paddings before the image. Results do not depend on the number
// of threads: sums over examples are split by shape alone.

#include "depthwise.h"
#include "pointwise.h"
#include "sums.h"
#include "winograd.h"

namespace {

namespace ffi = xla::ffi;
using ev3::Shape;
using Images = ffi::Buffer<ffi::F32, 4>;
using Result = ffi::Result<Images>;
using Attribute = ffi::Span<const int64_t>;

Shape shape(const Images& images) {
  const auto d = images.dimensions();
  return {d[0], d[1], d[2], d[3]};
}

ev3::Window window(const Images& kernel, Attribute numbers) {
  const auto d = kernel.dimensions();
  return {d[0], d[1], numbers[0], numbers[1], numbers[2], numbers[3]};
}

bool is_winograd(const ev3::Window& k, int64_t C, int64_t O) {
  return k.kh == 3 && k.kw == 3 && k.down == 1 && k.right == 1 && C >= 8 && O >= 8;
}

std::vector<ev3::Position> positions(int64_t kh, int64_t kw) {
  std::vector<ev3::Position> all;
  for (int64_t p = 0; p < kh; ++p)
    for (int64_t q = 0; q < kw; ++q) all.push_back({p, q});
  return all;
}

ffi::Error forward(ffi::ThreadPool pool, Images x, Images w, Result y, Attribute numbers) {
  const ev3::Window k = window(w, numbers);
  const Shape in = shape(x), out = shape(*y);
  if (is_winograd(k, in.C, out.C)) {
    ev3::winograd(pool, x.typed_data(), in, k.top, k.left, w.typed_data(), y->typed_data(), out);
  } else {
    const ev3::Output to{y->typed_data(), out.size(), out.H, out.W, out.W * out.C, out.C, out.C};
    ev3::direct(pool, x.typed_data(), in, positions(k.kh, k.kw), k.top, k.left, k.down, k.right, w.typed_data(), to);
  }
  return ffi::Error::Success();
}

// The input's gradient: a convolution of g for each of the strides' phases, with the kernel positions that meet it.
ffi::Error input_gradient(ffi::ThreadPool pool, Images g, Images w, Result dx, Attribute numbers) {
  const ev3::Window k = window(w, numbers);
  const Shape out = shape(g), in = shape(*dx);
  const auto transposed = [&](const std::vector<ev3::Position>& from) {  // [positions, O, C]
    float* to = ev3::scratch<ev3::TRANSPOSED>(from.size() * in.C * out.C);
    for (size_t t = 0; t < from.size(); ++t) {
      const float* at = w.typed_data() + (from[t].row * k.kw + from[t].column) * in.C * out.C;
      for (int64_t o = 0; o < out.C; ++o)
        for (int64_t c = 0; c < in.C; ++c) to[(t * out.C + o) * in.C + c] = at[c * out.C + o];
    }
    return to;
  };
  if (is_winograd(k, out.C, in.C)) {
    std::vector<ev3::Position> flipped = positions(3, 3);
    std::reverse(flipped.begin(), flipped.end());
    ev3::winograd(pool, g.typed_data(), out, 2 - k.top, 2 - k.left, transposed(flipped), dx->typed_data(), in);
    return ffi::Error::Success();
  }
  for (int64_t i = 0; i < std::min(k.down, in.H); ++i)
    for (int64_t j = 0; j < std::min(k.right, in.W); ++j) {
      // Pixel i + m down takes row (i + top) / down + m - t of g from kernel row (i + top) % down + t down.
      const int64_t rows = (i + k.top) / k.down, columns = (j + k.left) / k.right;
      std::vector<ev3::Position> from, at;
      int64_t up = 0, before = 0;
      for (int64_t p = (i + k.top) % k.down, t = 0; p < k.kh; p += k.down, ++t)
        for (int64_t q = (j + k.left) % k.right, s = 0; q < k.kw; q += k.right, ++s) {
          from.push_back({p, q}), at.push_back({rows - t, columns - s});
          up = std::max(up, t - rows), before = std::max(before, s - columns);
        }
      for (ev3::Position& position : at) position.row += up, position.column += before;
      float* to = dx->typed_data() + (i * in.W + j) * in.C;
      ev3::direct(pool, g.typed_data(), out, at, up, before, 1, 1, transposed(from),
                  {to, in.size(), ev3::ceil_div(in.H - i, k.down), ev3::ceil_div(in.W - j, k.right), k.down * in.W * in.C,
                   k.right * in.C, in.C});
    }
  return ffi::Error::Success();
}

ffi::Error kernel_gradient(ffi::ThreadPool pool, Images x, Images g, Result dw, Attribute numbers) {
  const ev3::Window k = window(*dw, numbers);
  const Shape in = shape(x), out = shape(g);
  if (k.kh == 1 && k.kw == 1 && k.down == 1 && k.right == 1)
    ev3::pointwise_kernel(pool, x.typed_data(), g.typed_data(), in.B * in.H * in.W, in.C, out.C, dw->typed_data());
  else if (is_winograd(k, in.C, out.C))
    ev3::winograd_kernel(pool, x.typed_data(), in, g.typed_data(), out, k.top, k.left, dw->typed_data());
  else
    ev3::direct_kernel(pool, x.typed_data(), in, g.typed_data(), out, k.top, k.left, k.down, k.right, dw->typed_data(), k.kh,
                       k.kw);
  return ffi::Error::Success();
}

ffi::Error depthwise(ffi::ThreadPool pool, Images x, Images w, Result y, Attribute numbers) {
  ev3::depthwise(pool, x.typed_data(), shape(x), w.typed_data(), window(w, numbers), y->typed_data(), shape(*y));
  return ffi::Error::Success();
}

ffi::Error depthwise_input(ffi::ThreadPool pool, Images g, Images w, Result dx, Attribute numbers) {
  ev3::depthwise_input(pool, g.typed_data(), shape(g), w.typed_data(), window(w, numbers), dx->typed_data(), shape(*dx));
  return ffi::Error::Success();
}

ffi::Error depthwise_kernel(ffi::ThreadPool pool, Images x, Images g, Result dw, Attribute numbers) {
  ev3::depthwise_kernel(pool, x.typed_data(), shape(x), g.typed_data(), shape(g), window(*dw, numbers), dw->typed_data());
  return ffi::Error::Success();
}

using Array = ffi::Buffer<ffi::F32>;

ffi::Error channel_sums(ffi::ThreadPool pool, Array a, Array b, ffi::Result<Array> sums) {
  const int64_t C = a.dimensions().back();
  ev3::channel_sums(pool, a.typed_data(), b.typed_data(), C ? a.element_count() / C : 0, C, sums->typed_data());
  return ffi::Error::Success();
}

}  // namespace

#define EV3_HANDLER(name, function)                                    \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(name, function,                        \
                                ffi::Ffi::Bind()                       \
                                    .Ctx<ffi::ThreadPool>()            \
                                    .Arg<Images>()                     \
                                    .Arg<Images>()                     \
                                    .Ret<Images>()                     \
                                    .Attr<Attribute>("window"))

EV3_HANDLER(ev3_convolution, forward);
EV3_HANDLER(ev3_convolution_x, input_gradient);
EV3_HANDLER(ev3_convolution_kernel, kernel_gradient);
EV3_HANDLER(ev3_depthwise, depthwise);
EV3_HANDLER(ev3_depthwise_x, depthwise_input);
EV3_HANDLER(ev3_depthwise_kernel, depthwise_kernel);
XLA_FFI_DEFINE_HANDLER_SYMBOL(ev3_channel_sums, channel_sums,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Array>().Arg<Array>().Ret<Array>());
