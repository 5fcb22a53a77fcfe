"""Fast convolution for convolutional students.

Activations are [B, H, W, C], kernels [kh, kw, C / groups, O]. Sequences are images of height 1, [B, 1, L, C], with kernels
of size (1, k), because the last axis but one is the fast one.

XLA:CPU computes the gradients of a convolution 13 to 350 times slower inside a loop body (jax-ml/jax issue 12868), and
depthwise convolutions slowly everywhere. On CPU, `convolve` is therefore a primitive that the kernels of `compiled.py`
compute, or, without them, XLA, with gradients written as convolutions that stay fast. The primitive is bilinear, so forward
mode, reverse mode of any order and `vmap` all work.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from ev3_distill.students.layers import compiled

Pair = tuple[int, int]
# Examples per chunk of a kernel's gradient by XLA. Chunks of 8 take 10% longer at 16 channels, chunks of 32 take 28% longer,
# and all 128 at once take 2-3 times as long at 16 to 64 channels.
CHUNK = 16


def computed_by() -> str:
    """What computes the convolutions of this process: "compiled kernels", or "XLA", with the reason on CPUs."""
    if jax.default_backend() != "cpu":
        return "XLA"
    return f"XLA ({compiled.reason()})" if compiled.reason() else "compiled kernels"


class Conv(nnx.Module):
    """A 2-D convolution without bias, "SAME" padding; He-normal kernel (fan out)."""

    def __init__(
        self,
        c_in: int,
        c_out: int,
        size: int | Sequence[int] = 3,
        *,
        strides: int | Sequence[int] = 1,
        groups: int = 1,
        rngs: nnx.Rngs,
    ):
        """Initializes the kernel. Sizes and strides are one number or (for H, for W); `groups` divides both channel counts."""
        init = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")
        self.kernel = nnx.Param(init(rngs.params(), (*_pair(size), c_in // groups, c_out)))
        self.strides, self.groups = _pair(strides), groups

    def __call__(self, x_BxHxWxC: jax.Array) -> jax.Array:
        """Returns [B, ceil(H / strides), ceil(W / strides), O]."""
        return convolve(x_BxHxWxC, self.kernel[...], self.strides, self.groups)


def convolve(x: jax.Array, kernel: jax.Array, strides: Pair = (1, 1), groups: int = 1) -> jax.Array:
    """A convolution with "SAME" padding. The only place that decides how it is computed.

    Args:
      x: [B, H, W, C].
      kernel: [kh, kw, C / groups, O].
      strides: of H and W.
      groups: number of groups that C and O are divided into; a group's outputs depend on its inputs only.

    Returns:
      [B, ceil(H / strides), ceil(W / strides), O].
    """
    if compiled.standard():
        return _xla_convolution(x, kernel, strides, groups)
    channels = x.shape[-1]
    if groups == channels > 1:
        return _each_channel(x, kernel, strides)
    if groups > 1:
        parts = zip(jnp.split(x, groups, -1), jnp.split(kernel, groups, -1), strict=True)
        return jnp.concatenate([convolve(*part, strides) for part in parts], -1)
    if kernel.shape[:2] == (1, 1):
        x, strides = strided_slice(x, strides), (1, 1)
        if not compiled.can_take(x, kernel):
            return x @ kernel[0, 0]  # the kernel's gradient is 3x faster than with the primitive
    out: jax.Array = _conv.bind(x, kernel, strides=strides, by_kernels=compiled.can_take(x, kernel))
    return out


def strided_slice(x: jax.Array, strides: Pair, *, first: Pair = (0, 0), end: Pair | None = None) -> jax.Array:
    """Pixels first:end:strides along H and W of x [B, H, W, C].

    It stays a slice in exported programs with a free batch axis. Indexing would become a gather there, 16 of them in a Conv4.
    """
    end = end or (x.shape[1], x.shape[2])
    if (strides, first, end) == ((1, 1), (0, 0), x.shape[1:3]):
        return x
    batch, *_, channels = x.shape
    return jax.lax.slice(x, (0, *first, 0), (batch, *end, channels), (1, *strides, 1))


def _each_channel(x: jax.Array, kernel: jax.Array, strides: Pair) -> jax.Array:
    """A depthwise convolution, with kernels [kh, kw, 1, O] for O / C outputs of each channel.

    Without compiled kernels it is shifts and products, 8-13x faster than XLA:CPU's (96 channels, forward).
    """
    x = jnp.repeat(x, kernel.shape[3] // x.shape[3], -1)
    if compiled.can_take(x, kernel):
        out: jax.Array = _depthwise.bind(x, kernel, strides=strides, by_kernels=True)
        return out
    pads, (height, width) = _same(x.shape[1:3], kernel.shape[:2], strides)
    x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    down, right = strides
    return functools.reduce(
        jnp.add,
        (
            x[:, i : i + down * height : down, j : j + right * width : right] * kernel[i, j, 0]
            for i in range(kernel.shape[0])
            for j in range(kernel.shape[1])
        ),
    )


def _xla_convolution(x: jax.Array, kernel: jax.Array, strides: Pair, groups: int = 1) -> jax.Array:
    return _window(
        x, kernel, _same(x.shape[1:3], kernel.shape[:2], strides)[0], window_strides=strides, feature_group_count=groups
    )


def _window(
    x: jax.Array, kernel: jax.Array, pads: Sequence[Pair], *, window_strides: Pair = (1, 1), **options: Any
) -> jax.Array:
    """A convolution whose axis order XLA:CPU runs fast everywhere, without transposition."""
    return jax.lax.conv_general_dilated(
        x, kernel, window_strides, pads, dimension_numbers=("NHWC", "HWIO", "NHWC"), **options
    )


def _same(image: Sequence[int], size: Sequence[int], strides: Pair) -> tuple[list[Pair], Pair]:
    """The paddings of H and W for "SAME", and the output's H and W, from the sizes of the input and the kernel."""
    pads = jax.lax.padtype_to_pads(image, size, strides, "SAME")
    return pads, (-(-image[0] // strides[0]), -(-image[1] // strides[1]))


def _numbers(strides: Pair, pads: Sequence[Pair]) -> list[int]:
    return [*strides, *(low for low, _ in pads)]


def _forward(x: jax.Array, kernel: jax.Array, *, strides: Pair, by_kernels: bool) -> jax.Array:
    if kernel.shape[:2] == (1, 1) and strides == (1, 1):
        return x @ kernel[0, 0]
    pads, out = _same(x.shape[1:3], kernel.shape[:2], strides)
    if by_kernels:
        return compiled.call("ev3_convolution", x, kernel, (x.shape[0], *out, kernel.shape[3]), _numbers(strides, pads))
    return _step_1(x, kernel, pads) if strides == (1, 1) else _xla_convolution(x, kernel, strides)


def _step_1(x: jax.Array, kernel: jax.Array, pads: Sequence[Pair]) -> jax.Array:
    """A convolution of stride 1 by XLA.

    XLA leaves vector registers half empty where filters are few. A kernel padded by one or three columns computes 2 or 4
    neighboring pixels at once: 16 to 16 channels take 6.5 ms instead of 9.1, 3 to 16 take 2.2 instead of 7.1, although a third
    or more of the kernel is zeros.
    """
    _, kw, c_in, c_out = kernel.shape
    width = x.shape[2] + sum(pads[1]) - kw + 1
    pixels = 1 if kw < 3 or max(c_in, c_out) > 16 else 2 if min(c_in, c_out - 1) >= 8 else 4
    pixels = math.gcd(pixels, width)
    wide = [jnp.pad(kernel, ((0, 0), (q, pixels - 1 - q), (0, 0), (0, 0))) for q in range(pixels)]
    out = _window(x, jnp.concatenate(wide, -1), pads, window_strides=(1, pixels))
    return out.reshape(*out.shape[:2], width, c_out)


def _gradient_x(g: jax.Array, kernel: jax.Array, *, strides: Pair, image: Pair, by_kernels: bool) -> jax.Array:
    """dX: the gradient convolved with the flipped kernel; by XLA, strides s have all s x s phases in one convolution.

    Along one axis y[m] = sum_i x[s m + i - low] w[i], so dx[s a + r - low] = sum_t g[a - t] w[s t + r], for r < s.
    """
    if kernel.shape[:2] == (1, 1) and strides == (1, 1):
        return g @ kernel[0, 0].T
    pads, out = _same(image, kernel.shape[:2], strides)
    if by_kernels:
        return compiled.call(
            "ev3_convolution_x", g, kernel, (g.shape[0], *image, kernel.shape[2]), _numbers(strides, pads)
        )
    (kh, kw, c_in, c_out), (down, right), (height, width) = kernel.shape, strides, image
    taps = [-(-k // s) for k, s in zip((kh, kw), strides, strict=True)]  # per phase
    firsts = [low // s for (low, _), s in zip(pads, strides, strict=True)]  # range of a
    ends = [-(-(n + low) // s) for n, (low, _), s in zip((height, width), pads, strides, strict=True)]
    around = [(t - 1 - first, end - m) for t, first, end, m in zip(taps, firsts, ends, out, strict=True)]
    kernel = jnp.pad(kernel, ((0, taps[0] * down - kh), (0, taps[1] * right - kw), (0, 0), (0, 0)))
    kernel = kernel.reshape(taps[0], down, taps[1], right, c_in, c_out)[::-1, :, ::-1]
    phases = kernel.transpose(0, 2, 5, 1, 3, 4).reshape(*taps, c_out, -1)
    dx = _step_1(g, phases, around)
    dx = dx.reshape(*dx.shape[:3], down, right, c_in).transpose(0, 1, 3, 2, 4, 5)
    dx = dx.reshape(dx.shape[0], dx.shape[1] * down, dx.shape[3] * right, c_in)
    top, left = (low - first * s for (low, _), first, s in zip(pads, firsts, strides, strict=True))
    return dx[:, top : top + height, left : left + width]


def _gradient_kernel(x: jax.Array, g: jax.Array, *, strides: Pair, size: Pair, by_kernels: bool) -> jax.Array:
    """dW; by XLA, the input, with examples as channels, convolved with the gradient as a kernel, dilated by the strides.

    All examples at once would exceed the caches, so they are taken in chunks of CHUNK. The chunks form a loop, because XLA
    would fuse the layers before into each unrolled chunk, with a transposition, and compute them again (a ResNet-20 step then
    takes 6% longer). Each channel is an image: [C, H, W, S] convolved with [H', W', S, O] is [C, kh, kw, O].
    """
    pads, out = _same(x.shape[1:3], size, strides)
    if by_kernels:
        return compiled.call("ev3_convolution_kernel", x, g, (*size, x.shape[3], g.shape[3]), _numbers(strides, pads))
    ends = [(m - 1) * s + k - low for k, (low, _), m, s in zip(size, pads, out, strides, strict=True)]
    x = x[:, : ends[0], : ends[1]]  # strides reach no other pixels
    around = [(low, end - n) for (low, _), end, n in zip(pads, ends, x.shape[1:3], strict=True)]
    chunk = min(CHUNK, x.shape[0])
    x, g = _pad_to_multiple(x, chunk), _pad_to_multiple(g, chunk)

    def add(i: jax.Array, total: jax.Array) -> jax.Array:
        x_SxHxWxC, g_SxHxWxO = (jax.lax.dynamic_slice_in_dim(a, i * chunk, chunk) for a in (x, g))
        return total + _window(
            x_SxHxWxC.transpose(3, 1, 2, 0), g_SxHxWxO.transpose(1, 2, 0, 3), around, rhs_dilation=strides
        )

    zeros = jnp.zeros((x.shape[-1], *size, g.shape[-1]), x.dtype)
    return jax.lax.fori_loop(0, x.shape[0] // chunk, add, zeros).transpose(1, 2, 0, 3)


def _depthwise_forward(x: jax.Array, kernel: jax.Array, *, strides: Pair, by_kernels: bool) -> jax.Array:
    pads, out = _same(x.shape[1:3], kernel.shape[:2], strides)
    return compiled.call("ev3_depthwise", x, kernel, (x.shape[0], *out, x.shape[3]), _numbers(strides, pads))


def _depthwise_gradient_x(
    g: jax.Array, kernel: jax.Array, *, strides: Pair, image: Pair, by_kernels: bool
) -> jax.Array:
    pads, _ = _same(image, kernel.shape[:2], strides)
    return compiled.call("ev3_depthwise_x", g, kernel, (g.shape[0], *image, g.shape[3]), _numbers(strides, pads))


def _depthwise_gradient_kernel(x: jax.Array, g: jax.Array, *, strides: Pair, size: Pair, by_kernels: bool) -> jax.Array:
    pads, _ = _same(x.shape[1:3], size, strides)
    return compiled.call("ev3_depthwise_kernel", x, g, (*size, 1, x.shape[3]), _numbers(strides, pads))


def _pad_to_multiple(x: jax.Array, size: int) -> jax.Array:
    """Pads x [B, ...] with zero examples up to a multiple of the size."""
    missing = -x.shape[0] % size
    return jnp.pad(x, ((0, missing), *[(0, 0)] * (x.ndim - 1))) if missing else x


def _bilinear(name: str, function: Callable[..., jax.Array]) -> Primitive:
    """Registers a primitive; its derivatives are defined separately. The function takes two arrays and named parameters."""
    primitive = Primitive(name)
    primitive.def_impl(function)
    primitive.def_abstract_eval(functools.partial(_shape, function))
    mlir.register_lowering(primitive, mlir.lower_fun(function, multiple_results=False))
    batching.primitive_batchers[primitive] = functools.partial(_batch, primitive)
    return primitive


def _shape(function: Callable[..., jax.Array], *arrays: Any, **params: Any) -> jax.core.ShapedArray:
    out = jax.eval_shape(functools.partial(function, **params), *arrays)
    return jax.core.ShapedArray(out.shape, out.dtype)


def _batch(
    primitive: Primitive, args: Sequence[jax.Array], axes: Sequence[int | None], **params: Any
) -> tuple[jax.Array, int]:
    """vmap over inputs alone: a larger batch; over a convolution's kernels alone: more filters; over both: a loop over members,
    which is 13x faster than groups.
    """
    one, other = (arg if axis is None else jnp.moveaxis(arg, axis, 0) for arg, axis in zip(args, axes, strict=True))
    if axes[1] is None and primitive not in (_conv_kernel, _depthwise_kernel):
        out = primitive.bind(one.reshape(-1, *one.shape[2:]), other, **params)
        return out.reshape(*one.shape[:2], *out.shape[1:]), 0
    if axes[0] is None and primitive is _conv:
        kernels = jnp.moveaxis(other, 0, 3)  # [kh, kw, C, members, O]
        out = primitive.bind(one, kernels.reshape(*kernels.shape[:3], -1), **params)
        return out.reshape(*out.shape[:3], *kernels.shape[3:]), 3
    if axes[0] is None:
        return jax.lax.map(lambda other: primitive.bind(one, other, **params), other), 0
    if axes[1] is None:
        return jax.lax.map(lambda one: primitive.bind(one, other, **params), one), 0
    return jax.lax.map(lambda pair: primitive.bind(*pair, **params), (one, other)), 0


def _family(name: str, forward: Callable[..., jax.Array], *gradients: Callable[..., jax.Array]) -> Sequence[Primitive]:
    """The primitives of a convolution y = conv(x, w) and its derivatives dx = conv_x(g, w) and dw = conv_kernel(x, g).

    They are the derivatives of one form, <g, conv(x, w)>, which is linear in each of its three arguments. So the transposes of
    each primitive are the other two. All take `strides` and `by_kernels`: whether kernels compute them, or XLA.
    """
    conv = _bilinear(name, forward)
    conv_x, conv_kernel = (_bilinear(name + end, f) for end, f in zip(("_x", "_kernel"), gradients, strict=True))
    ad.defbilinear(
        conv,
        lambda g, x, w, **how: conv_x.bind(g, w, image=x.aval.shape[1:3], **how),
        lambda g, x, w, **how: conv_kernel.bind(x, g, size=w.aval.shape[:2], **how),
    )
    ad.defbilinear(
        conv_x,
        lambda x, g, w, image, **how: conv.bind(x, w, **how),
        lambda x, g, w, image, **how: conv_kernel.bind(x, g, size=w.aval.shape[:2], **how),
    )
    ad.defbilinear(
        conv_kernel,
        lambda w, x, g, size, **how: conv_x.bind(g, w, image=x.aval.shape[1:3], **how),
        lambda w, x, g, size, **how: conv.bind(x, w, **how),
    )
    return conv, conv_x, conv_kernel


_conv, _conv_x, _conv_kernel = _family("students_conv", _forward, _gradient_x, _gradient_kernel)
_depthwise, _depthwise_x, _depthwise_kernel = _family(
    "students_depthwise", _depthwise_forward, _depthwise_gradient_x, _depthwise_gradient_kernel
)


def _pair(value: int | Sequence[int]) -> Pair:
    first, second = (value, value) if isinstance(value, int) else value
    return first, second
