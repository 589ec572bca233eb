"""What a run can be told: one dataclass per section of a recipe; the same fields are the flags of the command line."""
# ruff: noqa: RUF009  (_setting returns a dataclass field, which makes a fresh list or dict each time)

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

from okdc.recipe.strict import Limits


def _setting(default: Any, help: str, *short: str, **rules: Any) -> Any:
    """A recipe field that is also a command line flag: its help text, its other spellings and its Limits."""
    metadata = {"help": help, "flags": short, "limits": Limits(**rules)}
    if isinstance(default, (dict, list)):
        return field(default_factory=lambda: copy.copy(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class NetworkSettings:
    """`network:` which network is to be deployed."""

    model: str = _setting(
        "resnet18", "timm name, torchvision/NAME, hf-hub:ID, local-dir:PATH or package.module:function"
    )
    pretrained: bool = _setting(False, "start from the pre-trained weights of that name")
    checkpoint: str | None = _setting(None, "start from the weights in this file", "--initial-checkpoint")
    task: str = _setting(
        "classify",
        "what its outputs are: classify (one class for each image), multilabel (several) or pose (heat maps of key "
        "points)",
    )
    head: str = _setting(
        "deconv", "pose: what makes the maps larger, deconvolutions or, for int8 in every runtime, upsample",
        choices=("deconv", "upsample"),
    )  # fmt: skip
    head_width: int | None = _setting(
        None, "pose: channels of the head; 64 or the network's own when not given", at_least=1
    )
    encoding: str = _setting(
        "exact", "pose: how points become maps and back; official is that of the papers, rounded to pixels",
        choices=("exact", "official"),
    )  # fmt: skip
    num_classes: int | None = _setting(None, "number of classes; found from the data when not given", at_least=1)
    img_size: int | None = _setting(
        None, "side of the square input image, pixels; the network's own when not given", at_least=1
    )
    in_chans: int = _setting(3, "number of image channels", at_least=1)
    small_input: bool = _setting(
        False, "for small images on an ImageNet network: its first layers keep the images' size; needs --img-size"
    )
    drop: float | None = _setting(None, "dropout rate", at_least=0, at_most=1)
    drop_path: float | None = _setting(None, "stochastic depth rate", at_least=0, at_most=1)
    model_kwargs: dict[str, Any] = _setting({}, "further arguments of the network, key=value")


@dataclass(frozen=True)
class CohortSettings:
    """`cohort:` what is built around the network; what is None is the method's own default."""

    members: int | None = _setting(None, "branches or peer networks, the target included", at_least=1)
    extra_blocks: int | None = _setting(
        None, "blocks that each branch has more than the one before it (AHBF's a)", at_least=0
    )
    private_stages: int | None = _setting(None, "number of last stages that each branch has for itself", at_least=1)
    cut: str | None = _setting(
        None,
        "module after which branches part (okdc inspect lists them); EARLY,LATE makes a tree that parts in two at each",
    )
    share: str | None = _setting(
        None, "trunk: branches share the layers before the cut; none: whole peer networks", choices=("trunk", "none")
    )
    trunk_gradient: str | None = _setting(
        None, "what shared layers get of the members' gradients; mean for pre-trained weights", choices=("sum", "mean")
    )
    peers: list[str] = _setting([], "networks that learn beside the target (comma separated names)")
    teacher: str | None = _setting(None, "trained network to copy: its name, a run folder or a checkpoint (kd, sokd)")


@dataclass(frozen=True)
class DataSettings:
    """`data:` images in, batches out; names and meanings are those of timm's train.py."""

    data: str = _setting(
        "digits",
        "folder with train/ and val/, labels as .csv, .tsv, .jsonl or COCO's .json, .npz, digits, or torch/NAME, "
        "hfds/ID, wds/PATH",
        "--data-dir",
    )
    train_split: str = _setting("train", "name of the training split")
    val_split: str = _setting("validation", "name of the validation split, or a second file of labels")
    holdout: float | None = _setting(
        None, "share of the training images that is set aside and picks the epoch that ships; the validation images "
        "then judge it once, at the end",
        above=0, at_most=0.5,
    )  # fmt: skip
    path_column: str | None = _setting(None, "column of a table that has the paths; found when not given")
    label_column: str | None = _setting(None, "column of a table that has the labels; found when not given")
    dataset_download: bool = _setting(False, "let torch/… and hfds/… download")
    class_map: str = _setting("", "file that maps class names to indices")
    workers: int = _setting(2, "data loading processes", "-j", at_least=0)
    resident: str = _setting(
        "auto",
        "keep images decoded, on the GPU if there is one; auto does so for small ones that fit",
        choices=("auto", "on", "off"),
    )
    crop_padding: int | None = _setting(
        None, "pad by this many pixels and crop at random (CIFAR) instead of a random resized crop", at_least=0
    )
    no_aug: bool = _setting(False, "no training augmentation: resize and centre crop only")
    scale: list[float] = _setting([0.08, 1.0], "random resized crop: area range", above=0, length=2)
    ratio: list[float] = _setting([3 / 4, 4 / 3], "random resized crop: aspect ratio range", above=0, length=2)
    hflip: float = _setting(0.5, "probability of a horizontal flip", at_least=0, at_most=1)
    vflip: float = _setting(0.0, "probability of a vertical flip", at_least=0, at_most=1)
    boxes: str = _setting(
        "given", "pose: crop to the labelled boxes with a margin, or take the whole frame", choices=("given", "frame")
    )
    flip_pairs: str | None = _setting(
        None, "pose: key points that change places in a mirror, left_ear/right_ear,..., or none; those of the data "
        "when not given",
    )  # fmt: skip
    rotation: float = _setting(30.0, "pose: spread of rotation, degrees", at_least=0)
    zoom: float = _setting(0.125, "pose: spread of scale, as a share", at_least=0, at_most=0.45)
    shift: float = _setting(0.05, "pose: largest move, as a share of the input's sides", at_least=0, at_most=1)
    color_jitter: float = _setting(0.0, "colour jitter", at_least=0)
    aa: str | None = _setting(None, "AutoAugment policy, such as rand-m9-mstd0.5")
    reprob: float = _setting(0.0, "probability of random erasing", at_least=0, at_most=1)
    remode: str = _setting(
        "const", "what erasing leaves: const (the mean), rand (one random colour) or pixel (a random colour each)",
        choices=("const", "rand", "pixel"),
    )  # fmt: skip
    recount: int = _setting(1, "erased boxes of an image, at most", at_least=1)
    balanced_sampling: bool = _setting(
        False, "draw every class equally often: images of rare classes repeat, those of frequent ones take turns"
    )
    mixup: float = _setting(0.0, "mixup alpha; 0 is off", at_least=0)
    cutmix: float = _setting(0.0, "cutmix alpha; 0 is off", at_least=0)
    mixup_prob: float = _setting(1.0, "probability that a batch is mixed at all", at_least=0, at_most=1)
    mixup_switch_prob: float = _setting(
        0.5, "with mixup and cutmix: probability that a batch gets cutmix", at_least=0, at_most=1
    )
    mixup_off_epoch: int = _setting(0, "no mixup and cutmix from this epoch on, counted from 0; 0: always", at_least=0)
    smoothing: float = _setting(0.0, "label smoothing", at_least=0, at_most=1)
    mean: list[float] | None = _setting(None, "channel means; the network's own when not given")
    std: list[float] | None = _setting(None, "channel standard deviations; the network's own when not given", above=0)
    interpolation: str | None = _setting(None, "bilinear, bicubic, …; the network's own when not given")
    train_interpolation: str | None = _setting(
        None, "how training crops are resized: random draws bilinear or bicubic for each; as the rest when not given",
        choices=("random", "bilinear", "bicubic"),
    )  # fmt: skip
    crop_pct: float | None = _setting(None, "share of the image kept by the evaluation crop", above=0)
    pixel_bits: int | None = _setting(
        None,
        "used bits of 16-bit images (PNG, TIFF): 12 where 4095 is white; found when not given",
        at_least=1,
        at_most=32,
    )
    exif: bool = _setting(True, "turn photos upright, as the orientation in their EXIF data says")
    max_bad_images: int = _setting(
        100, "unreadable images tolerated (named, counted and skipped) before a run stops", at_least=0
    )


@dataclass(frozen=True)
class TrainSettings:
    """`train:` how long, how fast, on what; names and meanings are those of timm's train.py."""

    epochs: int = _setting(100, "epochs to train", at_least=1)
    batch_size: int = _setting(128, "images per step on each device", "-b", at_least=1)
    validation_batch_size: int | None = _setting(None, "images per validation step on each device", "-vb", at_least=1)
    opt: str = _setting("sgd", "optimizer, any of timm's")
    lr: float | None = _setting(
        None, "learning rate; when not given, --lr-base times the images per step of all devices / 256", above=0
    )
    lr_base: float = _setting(0.1, "learning rate per 256 images", above=0)
    momentum: float = _setting(0.9, "momentum", at_least=0, at_most=1)
    weight_decay: float = _setting(5e-4, "weight decay", at_least=0)
    opt_betas: list[float] | None = _setting(
        None, "betas of Adam and its kin; the optimizer's own when not given", at_least=0, at_most=1
    )
    opt_eps: float | None = _setting(None, "epsilon of the optimizer; its own when not given", above=0)
    opt_kwargs: dict[str, Any] = _setting({}, "further arguments of the optimizer, key=value")
    layer_decay: float | None = _setting(
        None, "each layer of the target learns at this share of the next layer's rate (timm's networks)",
        above=0, at_most=1,
    )  # fmt: skip
    branch_lr_scale: float = _setting(
        1.0, "learning rate of the branches' and peers' own layers, as a multiple of the target's", above=0
    )
    freeze: list[str] = _setting(
        [], "modules of the target that learn nothing, their norms kept in evaluation mode (comma separated names)"
    )
    grad_checkpointing: bool = _setting(
        False, "keep less for the backward pass and compute the target's blocks again there, where timm's network can; "
        "their batch norms see each batch twice",
    )  # fmt: skip
    clip_grad: float | None = _setting(
        None, "clip the gradient norm to this; the method's own when not given (ahbf: 5), 0: not at all", at_least=0
    )
    grad_accum_steps: int = _setting(1, "batches per optimizer step; methods compare images within each", at_least=1)
    sched: str = _setting("cosine", "schedule, any of timm's")
    warmup_epochs: int = _setting(0, "epochs of linear warm-up", at_least=0)
    warmup_lr: float = _setting(1e-5, "learning rate at the start of warm-up", at_least=0)
    min_lr: float = _setting(0.0, "learning rate at the end", at_least=0)
    decay_milestones: list[int] = _setting([150, 225], "multistep: epochs at which the rate drops", at_least=1)
    decay_epochs: float = _setting(90.0, "step: epochs between drops", above=0)
    decay_rate: float = _setting(0.1, "step and multistep: factor of a drop", "--dr", above=0)
    sched_on_updates: bool = _setting(False, "move the schedule at every step rather than every epoch")
    amp: bool | None = _setting(None, "mixed precision; on by default on CUDA")
    amp_dtype: str | None = _setting(
        None, "bfloat16 or float16; bfloat16 where the device has it", choices=("bfloat16", "float16")
    )
    channels_last: bool | None = _setting(None, "channels-last memory layout; on by default on CUDA and with bfloat16")
    torchcompile: bool = _setting(False, "compile the training step")
    torchcompile_mode: str | None = _setting(
        None,
        "how to compile: reduce-overhead uses CUDA graphs, max-autotune takes long to begin",
        choices=("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"),
    )
    matmul_precision: str | None = _setting(
        None, "of float32 products of matrices, torch's own when not given: high is TF32 on CUDA, faster and three "
        "digits less; convolutions have TF32 there anyway", choices=("highest", "high", "medium"),
    )  # fmt: skip
    cudnn_benchmark: bool = _setting(
        False,
        "let cuDNN try which of its convolutions is the fastest; then no two runs on CUDA are the same to the bit",
    )
    model_ema: bool = _setting(False, "keep a moving average of the target and ship that (by-products ship without)")
    model_ema_decay: float = _setting(0.9998, "decay of that average", at_least=0, at_most=1)
    seed: int = _setting(42, "seed of weights, order and augmentation", at_least=0)
    device: str = _setting("auto", "where to train: auto, cpu, cuda, cuda:1 …")
    devices: int = _setting(1, "devices to train on, per node; each takes --batch-size images per step", at_least=1)
    nodes: int = _setting(1, "machines to train on, that many devices each; start the command on every one", at_least=1)
    sync_bn: bool = _setting(False, "batch norm over the images of all devices")
    timeout: float = _setting(
        600.0, "seconds without data, or without progress of a device, after which a run ends; 0: for ever", at_least=0
    )
    recovery_interval: int = _setting(
        0, "save after this many steps too, and not after each epoch alone; 0: after epochs only", at_least=0
    )
    checkpoint_hist: int = _setting(2, "last.pth.tar files kept", at_least=1)
    class_weights: str | None = _setting(
        None, "weights of classes in the cross-entropy with labels, and in no other loss: auto (rare ones count more), "
        "or a FILE of lines CLASS WEIGHT",
    )  # fmt: skip
    pos_weight: str | None = _setting(
        None, "multilabel: weights of labels that are there, in the loss with labels: auto (as many times as images "
        "without outnumber those with it), or a FILE of lines CLASS WEIGHT",
    )  # fmt: skip
    distance: str = _setting(
        "kl", "how members' outputs are compared, of one class: kl (as published), standardized (KL of standardised "
        "logits), dkd (decoupled) or dist (correlation)", choices=("kl", "standardized", "dkd", "dist"),
    )  # fmt: skip
    distance_kwargs: dict[str, Any] = _setting({}, "weights in it, key=value: alpha, beta of dkd; beta, gamma of dist")
    eval_metric: str | None = _setting(
        None, "the student's score that picks the epoch that ships: top1, top5 or balanced (the mean of all classes' "
        "recalls), map of several labels, pck@0.1, pck@0.05, pck@0.2, error or ap of key points; the task's first "
        "when not given",
    )  # fmt: skip
    patience: int | None = _setting(
        None, "stop when --eval-metric has not got better for this many epochs; the schedule still counts on --epochs",
        at_least=1,
    )  # fmt: skip
    log: list[str] | None = _setting(
        None, "who is told of every epoch: tensorboard, wandb, mlflow (comma separated); tensorboard, where installed, "
        "when not given", choices=("tensorboard", "wandb", "mlflow"),
    )  # fmt: skip
    log_interval: int = _setting(50, "steps between lines when there is no terminal", at_least=1)

    @property
    def images_per_step(self) -> int:
        """As timm counts them: a batch on each device, as often as gradients are accumulated."""
        return self.batch_size * self.devices * self.nodes * self.grad_accum_steps

    @property
    def peak_lr(self) -> float:
        """The learning rate that was given, or the base rate by the number of images per step."""
        return self.lr_base * self.images_per_step / 256 if self.lr is None else self.lr


@dataclass(frozen=True)
class ExportSettings:
    """`export:` what the student is written to after training, and how strictly that is verified."""

    onnx: bool = _setting(True, "write model.onnx")
    fp16: bool = _setting(False, "write model.fp16.onnx: half the size, fast on GPUs")
    int8: bool = _setting(False, "write model.int8.onnx for CPUs and model.int8.trt.onnx for TensorRT")
    int8_finetune: bool = _setting(
        False, "also write model.int8.finetuned.onnx for CPUs: every layer in int8, trained to give what float32 gives"
    )
    torch: bool = _setting(False, "write model.pt2 (torch.export)")
    trt: bool = _setting(False, "write model.engine (TensorRT); with fp16 or int8, an engine of each", "--tensorrt")
    trt_rtx: bool = _setting(
        False, "write model.rtx.engine (TensorRT for RTX) for RTX GPUs, and in fp16 and int8; no GPU is needed"
    )
    workspace: float = _setting(4.0, "memory that TensorRT may use for a layer while it builds, GiB", above=0)
    embed_preprocess: bool = _setting(False, "write model.full.onnx: decoded images of any size in, probabilities out")
    triton: bool = _setting(False, "write a model repository for the Triton server, made of the ONNX and the engine")
    byproducts: bool = _setting(True, "also write what else a method trains: narrower students, a fused classifier …")
    runtimes: list[str] = _setting(
        [], "runtimes such as openvino in which the ONNX files are verified, too; auto: all that are installed"
    )
    opset: int = _setting(20, "ONNX opset, 13 to 22: older ones for older runtimes", at_least=13, at_most=22)
    batch_sizes: list[int] = _setting([1, 8], "batch sizes whose latency is measured", at_least=1)
    threads: int = _setting(1, "CPU threads of the latency measurement", at_least=1)
    images: int | None = _setting(
        None, "validation images to verify with, drawn from all classes; all when not given", "--verify-images",
        at_least=1,
    )  # fmt: skip
    calibration_images: int = _setting(
        256, "training images that int8 is calibrated and tried on, half of them each", at_least=2
    )
    max_drop: float | None = _setting(
        None, "how much top-1 (or the task's own metric) a file may lose and still ship, points; 0.5, and 1.0 for "
        "int8, when not given", at_least=0,
    )  # fmt: skip
    min_agreement: float | None = _setting(
        None, "how often a file must agree with torch to ship, %; 99.9, 99.5 for fp16, 97 for int8 when not given",
        at_least=0, at_most=100,
    )  # fmt: skip
    license: str | None = _setting(None, "licence of the weights for the model card, such as apache-2.0 or mit")


STATED = ("mean", "std", "interpolation", "crop_pct")  # settings of the data that may stand beside a loader

STREAMS = ("wds/", "hfids/", "tfds/")  # data that is only read from front to back

LOADER = "loader"  # what the recipe calls the data of a run that was given its batches in Python

FIGURES = "figures"  # the data that okdc draws itself, for key points
