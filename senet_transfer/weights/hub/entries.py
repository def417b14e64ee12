"""Where published weights are: addresses as their publishers' own code and documents state them.

Names are the publishers' too. The hexadecimal digits at the end of a file's name are the beginning
of its SHA-256, by the convention of torch.hub, which all of these projects load their files with or
write them for; a file whose name has none can't be verified.

Left out: what is published over plain HTTP alone (it is listed to be fetched by hand), and what no
network of this project takes.
"""

from dataclasses import dataclass

_TIMM = "https://github.com/huggingface/pytorch-image-models/releases/download"
# Under the owner that timm names for each.
_RWIGHTMAN = "https://github.com/rwightman/pytorch-image-models/releases/download"
_GLUON = "https://github.com/rwightman/pytorch-pretrained-gluonresnet/releases/download"
_OPENMMLAB = "https://download.openmmlab.com/mmclassification/v0"
_FACEBOOK = "https://dl.fbaipublicfiles.com"


@dataclass(frozen=True)
class Shelf:
    """Files of one family at one place.

    Attributes:
        family: of all of them; the publisher's part of their names where ``title`` is empty.
        place: the address that the files lie under; a page to look at where they are by hand.
        files: by name, each the path of a file under ``place``.
        licence: as the publisher states it, or empty.
        note: what else there is to know.
        by_hand: whether a person has to fetch them, because there is no address that can be.
        title: the publisher's part of their names, where it is not the family.
        cached_as: put before the name of the file in the cache, where another has the same.
    """

    family: str
    place: str
    files: dict[str, str]
    licence: str = ""
    note: str = ""
    by_hand: bool = False
    title: str = ""
    cached_as: str = ""


_TORCHVISION_V1 = {
    "resnet18": "resnet18-f37072fd.pth",
    "resnet34": "resnet34-b627a593.pth",
    "resnet50": "resnet50-0676ba61.pth",
    "resnet101": "resnet101-63fe2227.pth",
    "resnet152": "resnet152-394f9c45.pth",
    "resnext50_32x4d": "resnext50_32x4d-7cdf4587.pth",
    "vgg16_bn": "vgg16_bn-6c64b313.pth",
}

_TORCHVISION = (
    Shelf(
        "torchvision_v1",
        "https://download.pytorch.org/models",
        _TORCHVISION_V1,
        "BSD-3-Clause",
    ),
    Shelf(
        "torchvision_v1",
        "https://download.pytorch.org/models",
        _TORCHVISION_V1,
        "BSD-3-Clause",
        "torchvision's V1",
        title="torchvision",
    ),
    Shelf(
        "torchvision_v2",
        "https://download.pytorch.org/models",
        {
            "resnet50": "resnet50-11ad3fa6.pth",
            "resnet101": "resnet101-cd907fc2.pth",
            "resnet152": "resnet152-f82ba261.pth",
            "resnext50_32x4d": "resnext50_32x4d-1a0047aa.pth",
        },
        "BSD-3-Clause",
    ),
)

_CADENE = (
    Shelf(
        "cadene",
        f"{_RWIGHTMAN}/v0.1-cadene",
        {
            "se_resnet50": "se_resnet50-ce0d4300.pth",
            "se_resnet101": "se_resnet101-7e38fcc6.pth",
            "se_resnet152": "se_resnet152-d17c99b7.pth",
        },
        note="Cadene's own files, by name and hash, where timm keeps them",
    ),
    Shelf(
        "cadene",
        "https://data.lip6.fr/cadene/pretrainedmodels",
        {
            "se_resnext50_32x4d": "se_resnext50_32x4d-a260b3a4.pth",
            "se_resnext101_32x4d": "se_resnext101_32x4d-3b2fe3d8.pth",
            "senet154": "senet154-c7b49a05.pth",
            "bninception": "bn_inception-52deb4733.pth",
            "inceptionresnetv2": "inceptionresnetv2-520b38e4.pth",
        },
        note="the server's certificate expired in 2022 and may still be; timm_legacy/ has its own "
        "copies of these networks",
    ),
    Shelf(
        "timm_legacy",
        f"{_RWIGHTMAN}/v0.1-cadene",
        {
            "seresnet50": "se_resnet50-ce0d4300.pth",
            "seresnet101": "se_resnet101-7e38fcc6.pth",
            "seresnet152": "se_resnet152-d17c99b7.pth",
        },
        "Apache-2.0",
        "the same files as cadene/",
    ),
    Shelf(
        "timm_legacy",
        f"{_RWIGHTMAN}/v0.1-weights",
        {
            "seresnet18": "seresnet18-4bb0ce65.pth",
            "seresnet34": "seresnet34-a4004e63.pth",
            "seresnext50_32x4d": "legacy_se_resnext50_32x4d-f3651bad.pth",
            "seresnext101_32x4d": "legacy_se_resnext101_32x4d-37725eac.pth",
            "senet154": "legacy_senet154-e9eb9fe6.pth",
        },
        "Apache-2.0",
    ),
)

_TIMM_SHELVES = (
    Shelf(
        "timm",
        f"{_RWIGHTMAN}/v0.1-weights",
        {
            "seresnet50.ra2_in1k": "seresnet50_ra_224-8efdb4bb.pth",
            "seresnext50_32x4d.racm_in1k": "seresnext50_32x4d_racm-a304a460.pth",
            "resnet34.bt_in1k": "resnet34-43635321.pth",
            "inception_resnet_v2.tf_in1k": "inception_resnet_v2-940b1cd6.pth",
            "inception_resnet_v2.tf_ens_adv_in1k": "ens_adv_inception_resnet_v2-2592a550.pth",
        },
        "Apache-2.0",
    ),
    Shelf(
        "timm",
        f"{_TIMM}/v0.1-weights",
        {
            "resnet50.am_in1k": "resnet50_am-6c502b37.pth",
            "resnet50.bt_in1k": "rw_resnet50-86acaeed.pth",
            "resnet50.ra_in1k": "resnet50_ra-85ebb6e5.pth",
            "resnet50.ram_in1k": "resnet50_ram-a26f946b.pth",
            "resnext50_32x4d.ra_in1k": "resnext50_32x4d_ra-d733960d.pth",
        },
        "Apache-2.0",
    ),
    Shelf(
        "timm",
        f"{_TIMM}/v0.1-rsb-weights",
        {
            "seresnet50.a1_in1k": "seresnet50_a1_0-ffa00869.pth",
            "seresnet50.a2_in1k": "seresnet50_a2_0-850de0d9.pth",
            "seresnet50.a3_in1k": "seresnet50_a3_0-317ecd56.pth",
            "resnet18.a1_in1k": "resnet18_a1_0-d63eafa0.pth",
            "resnet18.a2_in1k": "resnet18_a2_0-b61bd467.pth",
            "resnet18.a3_in1k": "resnet18_a3_0-40c531c8.pth",
            "resnet34.a1_in1k": "resnet34_a1_0-46f8f793.pth",
            "resnet34.a2_in1k": "resnet34_a2_0-82d47d71.pth",
            "resnet34.a3_in1k": "resnet34_a3_0-a20cabb6.pth",
            "resnet50.a1h_in1k": "resnet50_a1h2_176-001a1197.pth",
            "resnet50.a2_in1k": "resnet50_a2_0-a2746f79.pth",
            "resnet50.a3_in1k": "resnet50_a3_0-59cae1ef.pth",
            "resnet50.b1k_in1k": "resnet50_b1k-532a802a.pth",
            "resnet50.b2k_in1k": "resnet50_b2k-1ba180c1.pth",
            "resnet50.c1_in1k": "resnet50_c1-5ba5e060.pth",
            "resnet50.c2_in1k": "resnet50_c2-d01e05b2.pth",
            "resnet50.d_in1k": "resnet50_d-f39db8af.pth",
            "resnet101.a1_in1k": "resnet101_a1_0-cdcb52a9.pth",
            "resnet101.a2_in1k": "resnet101_a2_0-6edb36c7.pth",
            "resnet101.a3_in1k": "resnet101_a3_0-1db14157.pth",
            "resnet152.a1_in1k": "resnet152_a1_0-2eee8a7a.pth",
            "resnet152.a2_in1k": "resnet152_a2_0-b4c6978f.pth",
            "resnet152.a3_in1k": "resnet152_a3_0-134d4688.pth",
            "resnext50_32x4d.a1_in1k": "resnext50_32x4d_a1_0-b5a91a1d.pth",
            "resnext50_32x4d.a2_in1k": "resnext50_32x4d_a2_0-efc76add.pth",
            "resnext50_32x4d.a3_in1k": "resnext50_32x4d_a3_0-3e450271.pth",
        },
        "Apache-2.0",
    ),
    Shelf(
        "timm",
        f"{_RWIGHTMAN}/v0.1-rsb-weights",
        {
            "resnet50.a1_in1k": "resnet50_a1_0-14fe96d1.pth",
            "resnet101.a1h_in1k": "resnet101_a1h-36d3f2aa.pth",
            "resnet152.a1h_in1k": "resnet152_a1h-dc400468.pth",
            "resnext50_32x4d.a1h_in1k": "resnext50_32x4d_a1h-0146ab0a.pth",
        },
        "Apache-2.0",
    ),
    Shelf(
        "timm",
        f"{_GLUON}/v0.1",
        {
            "seresnext50_32x4d.gluon_in1k": "gluon_seresnext50_32x4d-90cf2d6e.pth",
            "seresnext101_32x4d.gluon_in1k": "gluon_seresnext101_32x4d-cf52900d.pth",
            "senet154.gluon_in1k": "gluon_senet154-70a1a3c0.pth",
            "resnet18.gluon_in1k": "gluon_resnet18_v1b-0757602b.pth",
            "resnet34.gluon_in1k": "gluon_resnet34_v1b-c6d82d59.pth",
            "resnet50.gluon_in1k": "gluon_resnet50_v1b-0ebe02e2.pth",
            "resnet101.gluon_in1k": "gluon_resnet101_v1b-3b017079.pth",
            "resnet152.gluon_in1k": "gluon_resnet152_v1b-c1edb0dd.pth",
            "resnext50_32x4d.gluon_in1k": "gluon_resnext50_32x4d-e6a097c1.pth",
            "resnext101_32x4d.gluon_in1k": "gluon_resnext101_32x4d-b253c8c4.pth",
        },
        "Apache-2.0",
    ),
)

_OTHERS = (
    Shelf(
        "mmpretrain",
        _OPENMMLAB,
        {
            "seresnet50": "se-resnet/se-resnet50_batch256_imagenet_20200804-ae206104.pth",
            "seresnet101": "se-resnet/se-resnet101_batch256_imagenet_20200804-ba5b51d4.pth",
            "resnet18": "resnet/resnet18_8xb32_in1k_20210831-fbbb1da6.pth",
            "resnet34": "resnet/resnet34_8xb32_in1k_20210831-f257d4e6.pth",
            "resnet50": "resnet/resnet50_8xb32_in1k_20210831-ea4938fc.pth",
            "resnet101": "resnet/resnet101_8xb32_in1k_20210831-539c63f8.pth",
            "resnet152": "resnet/resnet152_8xb32_in1k_20210901-4d7582fa.pth",
            "resnext50_32x4d": "resnext/resnext50_32x4d_b32x8_imagenet_20210429-56066e27.pth",
            "resnext101_32x4d": "resnext/resnext101_32x4d_b32x8_imagenet_20210506-e0fa3dd5.pth",
        },
    ),
    Shelf(
        "moskomule",
        "https://github.com/moskomule/senet.pytorch/releases/download/archive",
        {"se_resnet50": "seresnet50-60a8950a85b2b.pkl"},
    ),
    Shelf(
        "detectron2",
        f"{_FACEBOOK}/detectron2/ImageNetPretrained/MSRA",
        {"R-50": "R-50.pkl", "R-101": "R-101.pkl"},
        "CC BY-SA 3.0",
        cached_as="detectron2-",
    ),
    Shelf(
        "detectron1",
        f"{_FACEBOOK}/detectron/ImageNetPretrained/MSRA",
        {"R-50": "R-50.pkl", "R-101": "R-101.pkl"},
        note="norms without statistics: for FrozenBN alone",
        cached_as="detectron1-",
    ),
)

_BY_HAND = (
    Shelf(
        "caffe",
        "https://github.com/hujie-frank/SENet",
        {
            "se_resnet50": "SE-ResNet-50.caffemodel",
            "se_resnet101": "SE-ResNet-101.caffemodel",
            "se_resnet152": "SE-ResNet-152.caffemodel",
            "se_resnext50_32x4d": "SE-ResNeXt-50.caffemodel",
            "se_resnext101_32x4d": "SE-ResNeXt-101.caffemodel",
            "senet154": "SENet-154.caffemodel",
            "se_bn_inception": "SE-BN-Inception.caffemodel",
        },
        note="the table in that page's README leads to Google Drive and Baidu, which ask for a "
        "person",
        by_hand=True,
    ),
    Shelf(
        "places365",
        "http://places2.csail.mit.edu/models_places365",
        {
            "resnet18": "resnet18_places365.pth.tar",
            "resnet50": "resnet50_places365.pth.tar",
        },
        "CC BY",
        "published over plain HTTP and without a hash, so a change on the way would not be seen; "
        "the server has often been out of reach since 2023",
        by_hand=True,
    ),
    Shelf(
        "places365_caffe",
        "http://places2.csail.mit.edu/models_places365",
        {"resnet152": "resnet152_places365.caffemodel"},
        "CC BY",
        "published over plain HTTP and without a hash, so a change on the way would not be seen; "
        "the server has often been out of reach since 2023",
        by_hand=True,
        title="places365",
    ),
)

SHELVES = (*_TORCHVISION, *_CADENE, *_TIMM_SHELVES, *_OTHERS, *_BY_HAND)
