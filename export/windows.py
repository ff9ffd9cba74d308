"""Where the windows of a convolution or a pooling lie on their map."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from export.gradients import Site

Pads = tuple[tuple[int, int], ...]
"""(begin, end) per spatial axis."""


@dataclass(frozen=True)
class Window:
    """One entry per spatial axis: `sizes` of the map that windows slide over, `out_sizes` of the map with one number per window."""

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: Pads
    sizes: tuple[int, ...]
    out_sizes: tuple[int, ...]
    group: int = 1

    @property
    def onnx_pads(self) -> list[int]:
        return [begin for begin, _ in self.pads] + [end for _, end in self.pads]

    @property
    def padded_sizes(self) -> list[int]:
        return [begin + size + end for size, (begin, end) in zip(self.sizes, self.pads, strict=True)]

    @property
    def pad_amounts(self) -> list[int]:
        """As Pad takes them for [_, _, ...]."""
        rank = len(self.kernel)
        return [0, 0, *self.onnx_pads[:rank], 0, 0, *self.onnx_pads[rank:]]

    @property
    def offsets(self) -> list[tuple[int, ...]]:
        """Of every kernel position, in the kernel's order: where it meets the padded map at output 0."""
        steps = zip(self.kernel, self.dilations, strict=True)
        return list(itertools.product(*(range(0, count * step, step) for count, step in steps)))

    @property
    def axes(self) -> range:
        return range(2, 2 + len(self.kernel))

    @property
    def left_over(self) -> list[int]:
        """What the last window leaves over at the end of each padded axis; negative where it hangs over (ceil_mode)."""
        axes = zip(self.sizes, self.pads, self.out_sizes, self.strides, self.kernel, self.dilations, strict=True)
        return [size + sum(pads) - (out - 1) * stride - (kernel - 1) * dilation - 1 for size, pads, out, stride, kernel, dilation in axes]


def window_of(site: Site, options: Mapping[str, Any], kernel: Sequence[int]) -> Window:
    """The window of a node whose first input is the map that it slides over.

    Args:
        options: the node's attributes auto_pad, dilations, pads and strides; group for a convolution.

    Raises:
        LocalError: padding is negative, or a spatial axis has no fixed size.
    """
    sizes = site.shape(site.node.input[0], static_from=2)[2:]
    out_sizes = site.shape(site.node.output[0], static_from=2)[2:]
    strides, dilations = tuple(options["strides"]), tuple(options["dilations"])
    rank = len(kernel)
    pads = tuple(zip(options["pads"][:rank], options["pads"][rank:], strict=True))
    if options["auto_pad"] in ("SAME_UPPER", "SAME_LOWER"):
        reach = [(o - 1) * s + (k - 1) * d + 1 for o, s, k, d in zip(out_sizes, strides, kernel, dilations, strict=True)]
        totals = [max(0, need - size) for need, size in zip(reach, sizes, strict=True)]
        pads = tuple((t // 2, t - t // 2) for t in totals)
        if options["auto_pad"] == "SAME_LOWER":
            pads = tuple((end, begin) for begin, end in pads)
    if any(pad < 0 for pair in pads for pad in pair):
        raise site.unsupported("negative padding", "slice the input instead")
    axes = zip(sizes, pads, out_sizes, strides, strict=True)
    if options.get("ceil_mode") and any((out - 1) * stride >= size + begin for size, (begin, _), out, stride in axes):
        raise site.unsupported("ceil_mode 1 with a window that lies beyond the map", "use ceil_mode 0")
    return Window(tuple(kernel), strides, dilations, pads, sizes, out_sizes, options.get("group", 1))
