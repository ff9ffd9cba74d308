"""Ways to compute the same gradients: which is fastest depends on the shapes and on the board.

The exporter writes every training program in its default way, chosen where onnxruntime's times crossed on x86-64 with one thread, and
publishes it in other ways too (export/programs.py); the device times them and keeps the fastest (edge_agent/tuning.py). Results differ in
rounding only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

NEVER = float("inf")


@dataclass(frozen=True)
class Ways:
    """Bounds between the ways of export/convolution_rules.py and export/depthwise.py.

    Attributes:
        product_pairs: most pairs of an input and an output position in one matrix product of a depthwise convolution: of a map of 9x9 as
            a whole, of one of 24x24 in bands of two rows.
        columns_positions: largest output map that is computed (unless by 1x1 kernels), and whose input gradient is, through columns.
        shift_channels: least input channels for shifting: each kernel position is a GEMM of its own, with so many columns.
        shift_waste: most padding that shifting may multiply by zeros: positions of the padded maps for each of the plain ones.
        unfold_positions: largest output map on which a weight gradient without groups that is not shifted is unfolded; above, correlated.
        narrow: a product with no more rows than this, and with more columns, is computed transposed: onnxruntime packs one operand, which
            does not pay for few rows.
        multiply_positions: smallest output map on which a depthwise weight gradient is summed position by position.
    """

    product_pairs: float = 8_192
    columns_positions: float = 32
    shift_channels: float = 8
    shift_waste: float = 1.5
    unfold_positions: float = NEVER
    narrow: float = 96
    multiply_positions: float = 64


DEFAULT = Ways()
OTHERS: Mapping[str, Ways] = MappingProxyType(
    {
        "convolve": Ways(product_pairs=0, shift_channels=NEVER, columns_positions=0, unfold_positions=0, multiply_positions=NEVER),
        "multiply": Ways(columns_positions=NEVER, multiply_positions=0),
    }
)
"""By the name that a variant bears (`train~convolve`): as much as can be by Conv and ConvTranspose, and as much as can be by GEMM."""
