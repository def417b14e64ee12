"""Caffe's protobuf messages, reduced to the fields for weights and layer settings.

Field names, numbers and types are those of Caffe's public ``caffe.proto``. Protobuf skips other
fields. Enumerations are declared as integers, so that unknown values are preserved.
"""

from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

# Number and type of each field, by message; "*" marks a repeated field.
_MESSAGES: dict[str, dict[str, tuple[int, str]]] = {
    "BlobShape": {"dim": (1, "int64*")},
    "BlobProto": {
        "num": (1, "int32"),
        "channels": (2, "int32"),
        "height": (3, "int32"),
        "width": (4, "int32"),
        "data": (5, "float*"),
        "shape": (7, "BlobShape"),
        "double_data": (8, "double*"),
    },
    "ConvolutionParameter": {
        "num_output": (1, "uint32"),
        "pad": (3, "uint32*"),
        "kernel_size": (4, "uint32*"),
        "group": (5, "uint32"),
        "stride": (6, "uint32*"),
        "pad_h": (9, "uint32"),
        "pad_w": (10, "uint32"),
        "kernel_h": (11, "uint32"),
        "kernel_w": (12, "uint32"),
        "stride_h": (13, "uint32"),
        "stride_w": (14, "uint32"),
        "dilation": (18, "uint32*"),
    },
    "PoolingParameter": {
        "pool": (1, "int32"),
        "kernel_size": (2, "uint32"),
        "stride": (3, "uint32"),
        "pad": (4, "uint32"),
        "kernel_h": (5, "uint32"),
        "kernel_w": (6, "uint32"),
        "stride_h": (7, "uint32"),
        "stride_w": (8, "uint32"),
        "pad_h": (9, "uint32"),
        "pad_w": (10, "uint32"),
        "global_pooling": (12, "bool"),
        "round_mode": (13, "int32"),
    },
    "InnerProductParameter": {"num_output": (1, "uint32"), "transpose": (6, "bool")},
    "BatchNormParameter": {"eps": (3, "float")},
    "LayerParameter": {
        "name": (1, "string"),
        "type": (2, "string"),
        "bottom": (3, "string*"),
        "top": (4, "string*"),
        "blobs": (7, "BlobProto*"),
        "convolution_param": (106, "ConvolutionParameter"),
        "inner_product_param": (117, "InnerProductParameter"),
        "pooling_param": (121, "PoolingParameter"),
        "batch_norm_param": (139, "BatchNormParameter"),
    },
    # The 2014 format, which has no BatchNorm. `layer` belongs to the unsupported 2013 format.
    "V1LayerParameter": {
        "layer": (1, "bytes"),
        "bottom": (2, "string*"),
        "top": (3, "string*"),
        "name": (4, "string"),
        "type": (5, "int32"),
        "blobs": (6, "BlobProto*"),
        "convolution_param": (10, "ConvolutionParameter"),
        "inner_product_param": (17, "InnerProductParameter"),
        "pooling_param": (19, "PoolingParameter"),
    },
    # This message is complete, so an unknown field shows that a file is not a Caffe file.
    "NetParameter": {
        "name": (1, "string"),
        "layers": (2, "V1LayerParameter*"),
        "input": (3, "string*"),
        "input_dim": (4, "int32*"),
        "force_backward": (5, "bool"),
        "state": (6, "bytes"),
        "debug_info": (7, "bool"),
        "input_shape": (8, "BlobShape*"),
        "layer": (100, "LayerParameter*"),
    },
}

# Values of V1LayerParameter.LayerType, and the corresponding type names in the current format.
V1_TYPES = {
    1: "Accuracy",
    3: "Concat",
    4: "Convolution",
    5: "Data",
    6: "Dropout",
    8: "Flatten",
    12: "ImageData",
    14: "InnerProduct",
    15: "LRN",
    17: "Pooling",
    18: "ReLU",
    19: "Sigmoid",
    20: "Softmax",
    21: "SoftmaxWithLoss",
    22: "Split",
    23: "TanH",
    25: "Eltwise",
    26: "Power",
    33: "Slice",
    39: "Deconvolution",
}


def _net_parameter() -> Any:
    """Build the protobuf message class for a Caffe network."""
    # Edition 2023 tracks field presence as proto2 does, and rejects text that is not UTF-8.
    file = descriptor_pb2.FileDescriptorProto(
        name="caffe.proto",
        package="caffe",
        syntax="editions",
        edition=descriptor_pb2.Edition.EDITION_2023,
    )
    for message, fields in _MESSAGES.items():
        descriptor = file.message_type.add(name=message)
        for name, (number, kind) in fields.items():
            label = "LABEL_REPEATED" if kind.endswith("*") else "LABEL_OPTIONAL"
            kind = kind.rstrip("*")
            field = descriptor.field.add(name=name, number=number, label=label)
            if kind in _MESSAGES:
                field.type_name = f".caffe.{kind}"
            else:
                field.type = getattr(field, f"TYPE_{kind.upper()}")
    # Use a separate pool, because the default pool may contain Caffe's full definition.
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("caffe.NetParameter"))


NetParameter = _net_parameter()
