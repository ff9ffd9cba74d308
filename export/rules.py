"""Which gradient rule belongs to which op: the one table to extend."""

from __future__ import annotations

from export.convolution_rules import conv
from export.dense_rules import add, gemm, matmul, relu, same_numbers
from export.gradients import Rule
from export.pool_rules import global_average_pool, max_pool

RULES: dict[str, Rule] = {
    "Add": add,
    "Conv": conv,
    "Flatten": same_numbers,
    "Gemm": gemm,
    "GlobalAveragePool": global_average_pool,
    "Identity": same_numbers,
    "MatMul": matmul,
    "MaxPool": max_pool,
    "Relu": relu,
    "Reshape": same_numbers,
}
