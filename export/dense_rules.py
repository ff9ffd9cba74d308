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
    """Y = A B: matrices, stacks of matrices that broadcast against each other, and vectors as NumPy has them."""
    site.attributes()
    ranks = [site.rank(name) for name in site.node.input]
    if ranks == [2, 2]:
        return _of_matrices(site)
    if ranks[1] == 2 and ranks[0] > 2:
        return _of_rows_and_matrix(site)
    return _of_stacks(site, ranks)


def _of_matrices(site: Site) -> Gradients:
    a, b = site.node.input
    both: Gradients = {0: Product(site.gradient, b, transpose_b=True), 1: Product(a, site.gradient, transpose_a=True)}
    return {index: both[index] for index in site.wanted}


def _of_rows_and_matrix(site: Site) -> Gradients:
    """A [..., m, k] is many rows for one matrix, whose gradient is one GEMM over all of them."""
    graph, (a, b) = site.graph, site.node.input
    gradients: Gradients = {}
    if 0 in site.wanted:
        gradients[0] = graph.emit("MatMul", site.gradient, graph.emit("Transpose", b, perm=[1, 0]))
    if 1 in site.wanted:
        inner, outer = site.shape(b)
        rows = graph.emit("Reshape", a, graph.integers(-1, inner))
        columns = graph.emit("Reshape", site.gradient, graph.integers(-1, outer))
        gradients[1] = Product(rows, columns, transpose_a=True)
    return gradients


def _of_stacks(site: Site, ranks: list[int]) -> Gradients:
    """Matrix by matrix, summed over the axes along which an operand was repeated; a vector becomes a row or a column before."""
    graph, (a, b), gradient = site.graph, site.node.input, site.gradient
    rank = max(2, *ranks)
    if ranks[1] == 1:
        b, gradient = graph.emit("Unsqueeze", b, graph.integers(1)), graph.emit("Unsqueeze", gradient, graph.integers(-1))
    if ranks[0] == 1:
        a, gradient = graph.emit("Unsqueeze", a, graph.integers(0)), graph.emit("Unsqueeze", gradient, graph.integers(-2))
    gradients: Gradients = {}
    if 0 in site.wanted:
        product = graph.emit("MatMul", gradient, _transposed(site, b, max(2, ranks[1])))
        gradients[0] = _unstacked(site, product, 0, ranks, rank)
    if 1 in site.wanted:
        product = graph.emit("MatMul", _transposed(site, a, max(2, ranks[0])), gradient)
        gradients[1] = _unstacked(site, product, 1, ranks, rank)
    return gradients


def _transposed(site: Site, name: str, rank: int) -> str:
    """With the last two axes exchanged; onnxruntime takes this into the MatMul."""
    return site.graph.emit("Transpose", name, perm=[*range(rank - 2), rank - 1, rank - 2])


def _unstacked(site: Site, product: str, index: int, ranks: list[int], rank: int) -> str:
    """A gradient of all stacked axes, summed to those of one operand."""
    graph = site.graph
    if ranks[index] == 1:
        product = graph.emit("Squeeze", product, graph.integers(-2 if index == 0 else -1))
        return graph.emit("ReduceSum", product, graph.integers(*range(rank - 2)), keepdims=0) if rank > 2 else product
    shapes = [graph.static_shape(each) or () for each in site.node.input]
    stacks = [shape[:-2] if len(shape) > 1 else () for shape in shapes]
    added = rank - ranks[index]
    other = (1,) * (rank - 2 - len(stacks[1 - index])) + stacks[1 - index]
    stretched = [axis for axis, size in enumerate(stacks[index], added) if size == 1 and other[axis] != 1]
    if stretched:
        product = graph.emit("ReduceSum", product, graph.integers(*stretched), keepdims=1)
    if added:
        product = graph.emit("ReduceSum", product, graph.integers(*range(added)), keepdims=0)
    return product
