"""Which gradient rule belongs to which op: the one table to extend."""

from __future__ import annotations

from export.axis_rules import concat, cut, pad, reduce_mean, reduce_sum, same_numbers, softmax, transpose
from export.batch_norm import batch_normalization
from export.convolution_rules import conv
from export.dense_rules import gemm, matmul
from export.elementwise_rules import (
    add,
    clip,
    div,
    erf,
    exp,
    hard_sigmoid,
    hard_swish,
    leaky_relu,
    mul,
    power,
    relu,
    sigmoid,
    sqrt,
    sub,
    tanh,
)
from export.gradients import Rule
from export.norm_rules import instance_normalization
from export.pool_rules import average_pool, global_average_pool, max_pool
from export.recurrent_rules import gru, lstm

RULES: dict[str, Rule] = {
    "Add": add,
    "AveragePool": average_pool,
    "BatchNormalization": batch_normalization,
    "Clip": clip,
    "Concat": concat,
    "Conv": conv,
    "Div": div,
    "Erf": erf,
    "Exp": exp,
    "Flatten": same_numbers,
    "GRU": gru,
    "Gemm": gemm,
    "GlobalAveragePool": global_average_pool,
    "HardSigmoid": hard_sigmoid,
    "HardSwish": hard_swish,
    "Identity": same_numbers,
    "InstanceNormalization": instance_normalization,
    "LSTM": lstm,
    "LeakyRelu": leaky_relu,
    "MatMul": matmul,
    "MaxPool": max_pool,
    "Mul": mul,
    "Pad": pad,
    "Pow": power,
    "ReduceMean": reduce_mean,
    "ReduceSum": reduce_sum,
    "Relu": relu,
    "Reshape": same_numbers,
    "Sigmoid": sigmoid,
    "Slice": cut,
    "Softmax": softmax,
    "Sqrt": sqrt,
    "Squeeze": same_numbers,
    "Sub": sub,
    "Tanh": tanh,
    "Transpose": transpose,
    "Unsqueeze": same_numbers,
}
