"""Caffe's messages, as far as weights and geometry need them: field numbers, names and kinds.

From Caffe's public message definition (NetParameter, LayerParameter, V1LayerParameter). The same
tables read the binary ``.caffemodel`` and the text ``.prototxt``. A field that is not here is
passed over in the binary, and kept as it is written in the text.
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Field:
    """One field of a message.

    Attributes:
        name: as in the text format.
        kind: ``int``, ``float``, ``bool``, ``str``, a tuple of an enumeration's names in the order
            of their numbers, or the dict (number to :class:`Field`) of a nested message.
        repeated: whether the value is a list.
    """

    name: str
    kind: Any = int
    repeated: bool = False


Schema = dict[int, Field]

SHAPE: Schema = {1: Field("dim", int, repeated=True)}

CONVOLUTION: Schema = {
    1: Field("num_output"),
    2: Field("bias_term", bool),
    3: Field("pad", repeated=True),
    4: Field("kernel_size", repeated=True),
    5: Field("group"),
    6: Field("stride", repeated=True),
    9: Field("pad_h"),
    10: Field("pad_w"),
    11: Field("kernel_h"),
    12: Field("kernel_w"),
    13: Field("stride_h"),
    14: Field("stride_w"),
    16: Field("axis"),
    18: Field("dilation", repeated=True),
}
POOLING: Schema = {
    1: Field("pool", ("MAX", "AVE", "STOCHASTIC")),
    2: Field("kernel_size"),
    3: Field("stride"),
    4: Field("pad"),
    5: Field("kernel_h"),
    6: Field("kernel_w"),
    7: Field("stride_h"),
    8: Field("stride_w"),
    9: Field("pad_h"),
    10: Field("pad_w"),
    12: Field("global_pooling", bool),
    13: Field("round_mode", ("CEIL", "FLOOR")),
}
INNER_PRODUCT: Schema = {
    1: Field("num_output"),
    2: Field("bias_term", bool),
    5: Field("axis"),
    6: Field("transpose", bool),
}
BATCH_NORM: Schema = {
    1: Field("use_global_stats", bool),
    2: Field("moving_average_fraction", float),
    3: Field("eps", float),
}
SCALE: Schema = {1: Field("axis"), 2: Field("num_axes"), 4: Field("bias_term", bool)}
CONCAT: Schema = {1: Field("concat_dim"), 2: Field("axis")}
ELTWISE: Schema = {
    1: Field("operation", ("PROD", "SUM", "MAX")),
    2: Field("coeff", float, repeated=True),
}
DROPOUT: Schema = {1: Field("dropout_ratio", float)}
RELU: Schema = {1: Field("negative_slope", float)}
RESHAPE: Schema = {1: Field("shape", SHAPE), 2: Field("axis"), 3: Field("num_axes")}
INPUT: Schema = {1: Field("shape", SHAPE, repeated=True)}
RULE: Schema = {1: Field("phase", ("TRAIN", "TEST"))}

# LayerParameter: what is neither name, type, bottom, top (1-4) nor blobs (7).
LAYER: Schema = {
    8: Field("include", RULE, repeated=True),
    104: Field("concat_param", CONCAT),
    106: Field("convolution_param", CONVOLUTION),
    108: Field("dropout_param", DROPOUT),
    110: Field("eltwise_param", ELTWISE),
    117: Field("inner_product_param", INNER_PRODUCT),
    121: Field("pooling_param", POOLING),
    123: Field("relu_param", RELU),
    133: Field("reshape_param", RESHAPE),
    139: Field("batch_norm_param", BATCH_NORM),
    142: Field("scale_param", SCALE),
    143: Field("input_param", INPUT),
}
# V1LayerParameter (files of 2014): other numbers for the same, and no BatchNorm and Scale yet.
V1_LAYER: Schema = {
    32: Field("include", RULE, repeated=True),
    9: Field("concat_param", CONCAT),
    10: Field("convolution_param", CONVOLUTION),
    12: Field("dropout_param", DROPOUT),
    17: Field("inner_product_param", INNER_PRODUCT),
    19: Field("pooling_param", POOLING),
    24: Field("eltwise_param", ELTWISE),
    30: Field("relu_param", RELU),
}
# V1's enumeration of layer types: number, its name in the text format, today's name.
V1_TYPES: tuple[tuple[int, str, str], ...] = (
    (1, "ACCURACY", "Accuracy"),
    (3, "CONCAT", "Concat"),
    (4, "CONVOLUTION", "Convolution"),
    (5, "DATA", "Data"),
    (6, "DROPOUT", "Dropout"),
    (8, "FLATTEN", "Flatten"),
    (12, "IMAGE_DATA", "ImageData"),
    (14, "INNER_PRODUCT", "InnerProduct"),
    (15, "LRN", "LRN"),
    (17, "POOLING", "Pooling"),
    (18, "RELU", "ReLU"),
    (19, "SIGMOID", "Sigmoid"),
    (20, "SOFTMAX", "Softmax"),
    (21, "SOFTMAX_LOSS", "SoftmaxWithLoss"),
    (22, "SPLIT", "Split"),
    (23, "TANH", "TanH"),
    (25, "ELTWISE", "Eltwise"),
    (26, "POWER", "Power"),
    (33, "SLICE", "Slice"),
    (39, "DECONVOLUTION", "Deconvolution"),
)
