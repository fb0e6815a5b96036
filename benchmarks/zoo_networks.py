"""The networks of the sweep: which there are in each zoo, and at what size they are tried.

There are three zoos of others, and this package's own networks by name in each framework.

Sizes are the smallest that a network takes, or that leaves its last layers more than a point.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Network(NamedTuple):
    """A network of a zoo.

    name: what the zoo calls it. shape: of the input without the batch, channels where the zoo has
    them. options: for the zoo's constructor. further: integers for further inputs, such as the
    lengths of sequences. distribution: mean and standard deviation of the input's normal numbers.
    quick: whether it is part of the quick selection. environment: variables that it needs.
    note: what else is to be known of it. failure: the beginning of the problem that is expected
    of it, and the explanation of that. own: whether it is one of this package's, by name.
    """

    name: str
    shape: tuple[int, ...]
    options: Mapping[str, Any] = {}
    further: tuple[int, ...] = ()
    distribution: tuple[float, float] = (0.0, 1.0)
    quick: bool = False
    environment: Mapping[str, str] = {}
    note: str = ""
    failure: tuple[str, str] | None = None
    own: bool = False

    def folded(self) -> Network:
        """Return the network that it folds to: another one where it is built of DO-Conv layers."""
        return self._replace(name=self.name.removesuffix("_doconv")) if self.own else self


_RGB = (3, 224, 224)


def _of_size(size: int, names: str, **options: Any) -> list[Network]:
    return [Network(name, (3, size, size), options) for name in names.split()]


def _segmentation(size: int, name: str) -> Network:
    return Network(name, (3, size, size), {"in_size": (size, size)})


_NO_INT = (
    "AttributeError: module 'numpy' has no attribute 'int'",
    "pytorchcv builds it with `np.int`, which NumPy 1.24 removed: not built, nothing tried",
)

_SUBCLASS = (
    "no layer was replaced",
    "each of its convolutions with more than one tap is of a subclass that computes something else "
    "(masked sequences, weights of one bit), and is left as it is",
)

_DROPPED = (
    "training moved",
    "it trains without some of its paths, drawn anew for each batch; those layers had no gradient",
)

PYTORCHCV = (
    # where the last pooling is of 7×7 positions
    *_of_size(
        224,
        "alexnet zfnet vgg11 bn_vgg11 bninception resnet18 resnet50 preresnet18 resnext14_32x4d "
        "seresnet18 sepreresnet18 seresnext50_32x4d senet16 ibn_resnet50 ibnb_resnet50 "
        "ibn_densenet121 airnet50_1x64d_r2 bam_resnet18 cbam_resnet18 resattnet56 sknet50 "
        "diaresnet18 diapreresnet18 diracnet18v2 sharesnet18 densenet121 "
        "sparsenet121 peleenet wrn50_2 drnc26 dpn68 darknet_tiny darknet53 channelnet revnet38 "
        "bagnet9 dla34 fishnet99 espnetv2_wd2 hrnet_w18_small_v1 vovnet27s selecsls42 "
        "hardnet39ds xdensenet121_2 squeezenet_v1_1 squeezeresnet_v1_0 sqnxt23_w1 "
        "shufflenet_g3_w1 shufflenetv2_wd2 shufflenetv2b_wd2 menet108_8x1_g3 mobilenet_w1 "
        "mobilenetb_w1 fdmobilenet_w1 mobilenetv2_w1 mobilenetv3_small_w1 mobilenetv3_large_w1 "
        "igcv3_w1 ghostnet mnasnet_b1 darts proxylessnas_mobile fbnet_cb nasnet_4a1056 spnasnet "
        "mixnet_s octresnet10_ad2",
    ),
    Network(
        "condensenet74_c4_g4",
        _RGB,
        failure=(
            "training moved 1 of 37",
            "which channels its layers read comes with the trained weights; without them it is the "
            "first channel everywhere, so that only the first layer has a gradient",
        ),
    ),
    Network(
        "msdnet22",
        _RGB,
        failure=(
            "training moved 103 of 121",
            "it returns the last of its ten classifiers' outputs; the two convolutions of each of "
            "the others have no gradient",
        ),
    ),
    *_of_size(128, "scnet50"),
    *_of_size(
        64,
        "resnesta18 dicenet_wd5 efficientnet_b0 efficientnet_edge_small_b isqrtcovresnet18 "
        "resneta10 resnetd50b",
    ),
    *_of_size(299, "xception inceptionv3 inceptionv4 inceptionresnetv1 inceptionresnetv2"),
    # made for CIFAR
    *_of_size(
        32,
        "nin_cifar10 preresnet20_cifar10 resnext20_16x4d_cifar10 seresnet20_cifar10 "
        "pyramidnet110_a48_cifar10 densenet40_k12_cifar10 wrn16_10_cifar10 "
        "ror3_56_cifar10 rir_cifar10 shakeshakeresnet20_2x16d_cifar10 shakedropresnet20_cifar10",
    ),
    Network("resdropresnet20_cifar10", (3, 32, 32), failure=_DROPPED),
    Network("fractalnet_cifar10", (3, 32, 32), failure=_DROPPED),
    Network("resnet20_cifar10", (3, 32, 32), quick=True),
    # segmentation
    Network("deeplabv3_resnetd50b_voc", (3, 64, 64), {"in_size": (64, 64)}),
    *(_segmentation(64, n) for n in ("fcn8sd_resnetd50b_voc", "danet_resnetd50b_cityscapes")),
    *(_segmentation(96, n) for n in ("pspnet_resnetd50b_voc", "icnet_resnetd50b_cityscapes")),
    *(_segmentation(128, n) for n in ("fastscnn_cityscapes", "bisenet_resnet18_celebamaskhq")),
    *_of_size(
        64,
        "cgnet_cityscapes dabnet_cityscapes fpenet_cityscapes ctxnet_cityscapes esnet_cityscapes "
        "edanet_cityscapes enet_cityscapes erfnet_cityscapes segnet_cityscapes unet_cityscapes "
        "sqnet_cityscapes lednet_cityscapes",
    ),
    *_of_size(128, "sinet_cityscapes"),
    # pose, faces, detection
    *_of_size(
        64,
        "simplepose_resnet18_coco simplepose_mobile_resnet18_coco prnet centernet_resnet18_voc "
        "lwopenpose2d_mobilenet_cmupan_coco",
    ),
    *_of_size(128, "lffd20x5s320v2_widerface"),
    # speech; here are convolutions of one dimension
    Network("nvpattexp116bazel76", (8, 16, 29), further=(3, 100), quick=True),
    # nothing but convolutions of classes of their own
    Network("jasper5x3", (64, 64), {"from_audio": False}, (64, 48), failure=_SUBCLASS),
    Network("quartznet5x5_en_ls", (64, 64), {"from_audio": False}, (64, 48), failure=_SUBCLASS),
    Network("wrn20_10_1bit_cifar10", (3, 32, 32), failure=_SUBCLASS),
    # what this version of pytorchcv cannot build here
    Network("regnetx002", _RGB, failure=_NO_INT),
    Network("ntsnet_cub", _RGB, failure=_NO_INT),
    Network(
        "linknet_cityscapes",
        _RGB,
        failure=(
            "AttributeError: 'Sequential' object has no attribute 'init_block'",
            "pytorchcv's own constructor fails: not built, nothing tried",
        ),
    ),
)


_PIXELS = {"distribution": (128.0, 64.0)}  # for those that take 0 to 255 and normalise it


def _keras(size: int, names: str, **settings: Any) -> list[Network]:
    return [Network(name, (size, size, 3), **settings) for name in names.split()]


KERAS = (
    *_keras(
        64,
        "VGG16 ResNet50 ResNet101 ResNet50V2 ResNet101V2 DenseNet121 DenseNet169 MobileNet "
        "NASNetMobile",
    ),
    *_keras(64, "MobileNetV3Large ConvNeXtTiny", **_PIXELS),
    # At 64 their last batch norms see so few points that they amplify every rounding.
    *_keras(128, "EfficientNetB0 EfficientNetB1 EfficientNetV2B0 EfficientNetV2S", **_PIXELS),
    *_keras(64, "MobileNetV2"),
    *_keras(64, "MobileNetV3Small", quick=True, **_PIXELS),
    *_keras(75, "InceptionV3 InceptionResNetV2 Xception"),
    Network(
        "RegNetX002",
        (64, 64, 3),
        failure=(
            "AttributeError: module 'keras.applications' has no attribute 'RegNetX002'",
            "Keras 3 has no RegNet: nothing tried",
        ),
    ),
)

_BASE = {"pretrained_base": False}
_FROM_480 = {**_BASE, "crop_size": 96}
_NO_ONEDNN = {
    "environment": {"MXNET_MKLDNN_ENABLED": "0", "MXNET_STORAGE_FALLBACK_LOG_VERBOSE": "0"},
    "note": "without oneDNN, because MXNet's use of it fails in the gradient of the network as "
    "GluonCV has it",
}

GLUONCV = (
    Network("resnet18_v1", (3, 64, 64), quick=True),
    *_of_size(64, "resnet34_v1 resnet50_v1 resnet101_v1 resnet152_v1"),
    *_of_size(64, "resnet18_v1b resnet34_v1b resnet50_v1b resnet101_v1b resnet152_v1b"),
    *_of_size(64, "resnet18_v2 resnet34_v2 resnet50_v2 resnet101_v2 resnet152_v2"),
    *_of_size(64, "resnext50_32x4d mobilenet1.0 mobilenetv2_1.0 mobilenetv3_large"),
    Network("mobilenetv3_small", (3, 64, 64), quick=True),
    # more families than the table has
    *_of_size(
        64,
        "alexnet vgg11_bn se_resnet18_v1 resnest14 resnet50_v1b_gn xception shufflenet_v1 "
        "shufflenet_v2 darknet53 hrnet_w18_small_v1_c dla34",
    ),
    *_of_size(32, "cifar_resnet20_v1 cifar_wideresnet16_10"),
    *_of_size(224, "densenet121 squeezenet1.1 googlenet"),
    *_of_size(299, "inceptionv3"),
    # segmentation
    Network("fcn_resnet50_ade", (3, 96, 96), _FROM_480),
    Network("psp_resnet50_ade", (3, 96, 96), _FROM_480),
    Network("deeplab_resnet50_ade", (3, 96, 96), _FROM_480),
    # detection and pose
    Network("center_net_resnet18_v1b_voc", (3, 64, 64), _BASE),
    Network(
        "center_net_resnet18_v1b_dcnv2_voc",
        (3, 64, 64),
        _BASE,
        failure=(
            'MXNetError: Traceback (most recent call last): File "../src/operator/contrib/././nn/'
            "modulated_deformable_im2col.h",
            "MXNet has the gradient of its modulated deformable convolutions on GPUs only: not "
            "trained, nothing tried",
        ),
    ),
    Network("ssd_300_mobilenet0.25_voc", (3, 300, 300), _BASE),
    Network("simple_pose_resnet18_v1b", (3, 64, 64), _BASE),
    Network("nasnet_4_1056", (3, 64, 64), **_NO_ONEDNN),
    # video: convolutions of three dimensions
    Network("i3d_inceptionv1_kinetics400", (3, 8, 64, 64), _BASE, **_NO_ONEDNN),
    Network("p3d_resnet50_kinetics400", (3, 16, 64, 64), _BASE, **_NO_ONEDNN),
)

# Every family, with ordinary, DO-Conv and BSConv layers, by channels and size, but those of dynamic
# group convolutions: these are not folded, and give nothing finite in inference before training.
_OWN = {
    (3, 64): "resnet10 resnet10_bsconvu resnet10_bsconvs_p1d4 preresnet10_doconv "
    "mobilenetv1_w1d4_bsconvu mobilenetv2_w1d4_bsconvs_p1d6 mobilenetv3_small_w7d20 "
    "mobilenetv3_large_w7d20_doconv plain18 plain18_doconv resnet18_v1 resnet50_v1b_doconv "
    "resnet18_v2 resnext50_32x4d mobilenet0.25 mobilenetv2_0.25_doconv mobilenetv3_small "
    "densenet74",
    (3, 32): "cifar_resnet20 cifar_resnet20_doconv cifar_resnet20_bsconvu "
    "cifar_resnet20_bsconvs_p1d4 cifar_preresnet20 cifar_preresnet20_bsconvu cifar_wrn16_1_doconv "
    "cifar_wrn16_1_bsconvs_p1d4 cifar_mobilenetv1_w1d4 cifar_mobilenetv1_w1d4_bsconvu "
    "cifar_mobilenetv2_w1d4_doconv cifar_mobilenetv2_w1d4_bsconvs_p1d6 "
    "cifar_mobilenetv3_small_w7d20_bsconvs_p1d6 cifar_mobilenetv3_large_w7d20 "
    "cifar_densenet86_doconv",
    (1, 28): "tutorial_pt tutorial_pt_doconv tutorial_tf tutorial_gluon_doconv",
}
_OWN_QUICK = ("tutorial_pt_doconv", "cifar_wrn16_1_bsconvs_p1d4")


def _own(*, channels_last: bool = False) -> tuple[Network, ...]:
    """Return this package's own networks, with shapes as a framework has them."""
    networks = []
    for (channels, size), names in _OWN.items():
        shape = (size, size, channels) if channels_last else (channels, size, size)
        networks += [
            Network(name, shape, {"num_classes": 10}, quick=name in _OWN_QUICK, own=True)
            for name in names.split()
        ]
    return tuple(networks)


ZOOS = {
    "torch": PYTORCHCV,
    "keras": KERAS,
    "gluon": GLUONCV,
    "doconv_torch": _own(),
    "doconv_tf": _own(channels_last=True),
    "doconv_mx": _own(),
}
TITLES = {
    "torch": "pytorchcv",
    "keras": "keras.applications",
    "gluon": "gluoncv.model_zoo",
    "doconv_torch": "doconv_torch.get_model",
    "doconv_tf": "doconv_tf.get_model",
    "doconv_mx": "doconv_mx.get_model",
}
# The module that can do what only the framework of a zoo can.
DRIVERS = {
    **{zoo: f"zoo_{zoo}" for zoo in ("torch", "keras", "gluon")},
    "doconv_torch": "zoo_torch",
    "doconv_tf": "zoo_keras",
    "doconv_mx": "zoo_gluon",
}
