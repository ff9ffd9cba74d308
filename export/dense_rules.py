"""Gradients of matrix products."""

from __future__ import annotations

from export.gradients import Gradient, Product, Site, reduce_to

Gradients = dict[int, Gradient]


def gemm(site: Site) -> Gradients:
    """Y = alpha A' B' + beta C."""
    flags = site.attributes(alpha=1.0, beta=1.0, transA=0, transB=0)
    a, b = site.node.input[:2]
    trans_a, trans_b, alpha = bool(flags["transA"]), bool(flags["transB"]), float(flags["alpha"])
    gradients: Gradients = {}
    if 0 in site.wanted:
        gradients[0] = Product(b, site.gradient, trans_b, True, alpha) if trans_a else Product(site.gradient, b, False, not trans_b, alpha)
    if 1 in site.wanted:
        gradients[1] = Product(site.gradient, a, True, trans_a, alpha) if trans_b else Product(a, site.gradient, not trans_a, False, alpha)
    if 2 in site.wanted:
        scaled = site.gradient
        if flags["beta"] != 1.0:
            scaled = site.graph.emit("Mul", scaled, site.graph.real(flags["beta"]))
        gradients[2] = reduce_to(site, scaled, site.node.output[0], site.node.input[2])
    return gradients


def matmul(site: Site) -> Gradients:
    """Y = A B with B a matrix; A may have more axes in front."""
    site.attributes()
    graph = site.graph
    a, b = site.node.input
    if site.rank(b) != 2 or site.rank(a) < 2:
        raise site.unsupported("operands other than [..., m, k] and [k, n]", "reshape the second operand to a matrix")
    matrix = site.rank(a) == 2
    gradients: Gradients = {}
    if 0 in site.wanted:
        if matrix:
            gradients[0] = Product(site.gradient, b, transpose_b=True)
        else:
            gradients[0] = graph.emit("MatMul", site.gradient, graph.emit("Transpose", b, perm=[1, 0]))
    if 1 in site.wanted:
        inner, outer = site.shape(b)
        rows = a if matrix else graph.emit("Reshape", a, graph.integers(-1, inner))
        columns = site.gradient if matrix else graph.emit("Reshape", site.gradient, graph.integers(-1, outer))
        gradients[1] = Product(rows, columns, transpose_a=True)
    return gradients
