"""What else timm's train.py takes: flags with nothing to do here, and flags that are refused with a way out."""

from __future__ import annotations

import os

import click

# Flag: how many values it has in timm, and why nothing is left to do.
NOTED = {
    "--pin-mem": (0, "done where it helps"),
    "--no-prefetcher": (0, "images are normalised on the device either way"),
    "--use-multi-epochs-loader": (0, "data processes always stay from epoch to epoch"),
    "--fuser": (1, "of TorchScript, which torch has replaced by --torchcompile"),
    "--worker-seeding": (1, "augmentation depends on seed, epoch and image, not on workers"),
    "--no-ddp-bb": (0, "buffers are kept equal without a broadcast"),
    "--synchronize-step": (0, "each step waits for the device once"),
    "--dist-bn": (1, "running statistics are averaged over devices at each step"),
    "--local_rank": (1, "torchrun and SLURM say it, and --devices N starts the processes itself"),
    "--local-rank": (1, "torchrun and SLURM say it, and --devices N starts the processes itself"),
    "--model-ema-force-cpu": (0, "the average is kept beside the network"),
}  # fmt: skip

REFUSED = {
    "--dataset": "put the prefix into --data: torch/cifar100, hfds/ID, wds/PATH",
    "--input-img-mode": "--in-chans 1 or 3",
    "--dataset-trust-remote-code": "okdc runs no code of a data set",
    "--pretrained-path": "--initial-checkpoint FILE",
    "--no-resume-opt": "a new run: --initial-checkpoint FILE",
    "--gp": "--model-kwargs global_pool=max",
    "--input-size": "--in-chans and --img-size",
    "--amp-impl": "torch's own: --amp",
    "--model-dtype": "weights are float32; --amp for speed",
    "--clip-mode": "always by norm: --clip-grad",
    "--lr-base-size": "always 256: change --lr-base",
    "--lr-base-scale": "always linear: say --lr",
    "--start-epoch": "--resume knows the epoch",
    "--patience-epochs": "--patience stops a run early",
    "--train-crop-mode": "--crop-padding 4 pads and crops",
    "--bce-loss": "it is the loss of --task multilabel; where an image has one class, leave it out: "
    "--smoothing and --mixup work with cross-entropy",
    "--bce-sum": "there is no --bce-loss here: leave it out",
    "--bce-target-thresh": "there is no --bce-loss here: leave it out",
    "--bce-pos-weight": "there is no --bce-loss here; --class-weights weighs classes",
    "--jsd-loss": "methods have their own losses: leave it out",
    "--aug-splits": "--method pcl gives each member a view of its own",
    "--mixup-mode": "always batch",
    "--drop-connect": "--drop-path",
    "--val-interval": "every epoch",
    "--wandb-project": "WANDB_PROJECT=NAME before the command",
    "--naflex-loader": "images have one size: --img-size",
    "--kd-model-name": "--method kd --teacher NAME",
}  # fmt: skip

_WITHOUT_ADVICE = """
    --train-num-samples --val-num-samples --input-key --target-key --fast-norm --head-init-scale
    --head-init-bias --torchscript --device-modules --layer-decay-min-scale --layer-decay-no-opt-scale
    --lr-noise --lr-noise-pct --lr-noise-std --lr-cycle-mul --lr-cycle-decay --lr-cycle-limit --lr-k-decay
    --epoch-repeats --warmup-prefix --cooldown-epochs --color-jitter-prob --grayscale-prob --gaussian-blur-prob
    --aug-repeats --resplit --cutmix-minmax --drop-block --bn-momentum --bn-eps --split-bn --model-ema-warmup
    --save-images --tta --wandb-tags --wandb-resume-id
"""
REFUSED |= dict.fromkeys(_WITHOUT_ADVICE.split(), "nothing here does its work, so leave it out")


# As they stand in commands that timm's documentation shows.
_OLDER = {"--jsd": "--jsd-loss", "--native-amp": "--amp-impl", "--apex-amp": "--amp-impl"}


def taken(words: list[str]) -> list[str]:
    """The words without flags that have nothing to do, of which a note is printed; UsageError for those refused."""
    _refuse([word.partition("=")[0] for word in words])
    left, rest = [], iter(words)
    for word in rest:
        flag, equals, _ = word.partition("=")
        if flag not in NOTED:
            left.append(word)
            continue
        values, reason = NOTED[flag]
        if values and not equals:
            next(rest, None)
        if os.environ.get("RANK", "0") == "0":
            click.echo(f"{flag} has nothing to do here: {reason}.", err=True)
    return left


def _refuse(words: list[str]) -> None:
    """UsageError that names all flags of timm that okdc does not have."""
    found = {word: REFUSED[_OLDER.get(word, word)] for word in words if _OLDER.get(word, word) in REFUSED}
    if len(found) > 1:
        each = ". ".join(f"{flag}: {advice}" for flag, advice in found.items())
        raise click.UsageError(f"{len(found)} flags of timm are here that okdc does not have. {each}.")
    for flag, advice in found.items():
        raise click.UsageError(f"{flag} is a flag of timm that okdc does not have: {advice}.")
