"""Branches that are narrower than the target, and members that become networks of their own."""

from __future__ import annotations

import sys

import pytest
import timm
import torch
from torch import nn

import okdc.networks  # noqa: F401 (registers the CIFAR networks)
from okdc.cohort import Branch, Cohort
from okdc.cohort.replay import Record, Replay, Tap
from okdc.errors import CutError, NetworkError
from tests.helpers import networks, traps

KINDS = {  # network, side of its images, where it is cut
    "Tiny": (networks.Tiny, 32, "stem"),
    "Tokens": (networks.Tokens, 32, "blocks.3"),
    "resnet20_cifar": (lambda: timm.create_model("resnet20_cifar", num_classes=4), 32, "stages.0.0"),
    "mobilenetv3_small_100": (lambda: timm.create_model("mobilenetv3_small_100", num_classes=4), 32, "blocks.1"),
    "vit_tiny": (
        lambda: timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=3, num_classes=4),
        32,
        "blocks.0",
    ),
    "resnext50": (lambda: timm.create_model("resnext50_32x4d", num_classes=4), 32, "layer3"),
}
TAPS = ("feature_maps", "embeddings", "stage_maps")


def example(size: int = 32) -> torch.Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", KINDS)
def test_narrower_branches_run_train_and_stand_alone(kind: str) -> None:
    torch.manual_seed(0)
    make, size, cut = KINDS[kind]
    target, images = make(), example(size)
    widths = (0.75, 0.5, 0.3)
    cohort = Cohort(target, images, [Branch(cut, width=w) for w in widths], taps=TAPS)
    assert cohort.widths == (1.0, *widths) and cohort.grown == [f"width {w}" for w in widths]
    sizes, flops = [c.own_params for c in cohort.costs[1:]], [c.flops for c in cohort.costs]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 3
    assert flops == sorted(flops, reverse=True)
    out = cohort.train()(images)
    sum(z.square().sum() for z in out.logits).backward()
    assert [n for n, p in cohort.named_parameters() if p.grad is None] == []
    assert tuple(tuple(x.shape[1] for x in maps) for maps in out.stage_maps) == cohort.stage_widths
    assert all(x.shape[0] == 2 and x.dim() == 4 for maps in out.stage_maps for x in maps)
    logits = cohort.eval()(images).logits
    for i, expected in enumerate(logits):
        alone = cohort.extract(i)
        assert not any(isinstance(m, Replay) for m in alone.modules())
        hooks = [h for m in alone.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
        assert not any(isinstance(hook, (Record, Tap)) for hook in hooks)
        torch.testing.assert_close(alone.eval()(images), expected)
        assert not {id(p) for p in alone.parameters()} & {id(p) for p in cohort.parameters()}


def test_channels_are_truncated_and_trunk_and_logits_keep_theirs() -> None:
    tail = Cohort(networks.Tiny(width=10), example(), [Branch("stem", width=0.33)]).extract(1)
    assert [m.weight.shape[:2] for m in tail.modules() if isinstance(m, nn.Conv2d)] == [(10, 3), (6, 10), (13, 6)]
    assert tail.head.weight.shape == (4, 13) and tail.late[1].num_features == 13
    least = Cohort(networks.Tiny(width=2), example(), [Branch("stem", width=0.1)]).extract(1)
    assert [m.out_channels for m in least.modules() if isinstance(m, nn.Conv2d)] == [2, 1, 1]


def test_heads_and_groups_stay_whole() -> None:
    make, size, cut = KINDS["vit_tiny"]
    block = Cohort(make(), example(size), [Branch(cut, width=0.75)]).branches[0].blocks[2]
    assert (block.attn.num_heads, block.attn.attn_dim, block.attn.head_dim) == (2, 128, 64), "two of three heads"
    assert block.attn.qkv.weight.shape == (3 * 128, 192) and block.mlp.fc1.weight.shape == (576, 192)
    make, size, cut = KINDS["resnext50"]
    conv = Cohort(make(), example(size), [Branch(cut, width=0.75)]).branches[0].layer4[1].conv2
    assert (conv.in_channels, conv.out_channels, conv.groups) == (768, 768, 32)
    whole = Cohort(networks.Tokens(width=20), example(), [Branch(width=0.75)]).branches[0]
    attention = whole.blocks[0].self_attn
    assert (attention.embed_dim, attention.num_heads) == (14, 2), "15 channels are no two heads"
    assert whole.position.shape == (1, 17, 14)


def test_a_first_block_that_adds_the_trunks_map_gets_a_projection() -> None:
    torch.manual_seed(0)
    target = timm.create_model("resnet20_cifar", num_classes=4)
    narrow, wide = Cohort(target, example(), [Branch("stages.0.0", width=0.5), Branch("stages.0.0")]).branches
    assert [m.weight.shape[:2] for m in narrow.stages[0][1].downsample if hasattr(m, "out_channels")] == [(8, 16)]
    assert narrow.stages[0][2].downsample is None and wide.stages[0][1].downsample is None
    deeper = Cohort(target, example(), [Branch("stages.0.1", (2,), width=0.5)]).branches[0]
    assert deeper.stages[0][2].downsample[0].out_channels == 8 and deeper.stages[0][2].further[1].conv1.in_channels == 8
    after = Cohort(target, example(), [Branch("stages.0", width=0.5)]).branches[0]
    assert after.stages[1][0].downsample[0].weight.shape[:2] == (16, 16), "its own, as narrow as the stage is now"


@pytest.mark.parametrize("pretrained", [False, True])
def test_narrow_branches_have_weights_of_their_own(pretrained: bool) -> None:
    torch.manual_seed(0)
    target = networks.Tiny()
    target.late[0].weight.requires_grad_(False)
    plan = [Branch("stem", width=0.5), Branch("stem", width=0.5)]
    cohort = Cohort(target, example(), plan, pretrained=pretrained)
    one, two = (branch.late[0].weight for branch in cohort.branches)
    own = target.late[0].weight[:16, :8]
    assert one.shape == own.shape and (one - two).abs().max() > 1e-4
    assert ((one - own).std() / own.std() < 0.2) == pretrained, "a trained network's channels are kept, with noise"
    assert not one.requires_grad and cohort.branches[0].early[0].weight.requires_grad


def test_narrow_and_deeper_cohorts_compile_to_one_graph() -> None:
    images = example()
    plan = [Branch("stem", (1,), width=0.5), Branch("stem", (2,))]
    cohort = Cohort(networks.Tiny(), images, plan, taps=("stage_maps",)).eval()
    compiled = torch.compile(cohort, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        mine, theirs = compiled(images), cohort(images)
    for a, b in zip((*mine.logits, *mine.stage_maps[1]), (*theirs.logits, *theirs.stage_maps[1]), strict=True):
        torch.testing.assert_close(a, b)
    torch._dynamo.reset()


def test_what_cannot_be_narrowed_is_refused_and_the_target_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = networks.Tokens()
    with pytest.raises(CutError, match=r"nothing of Tokens after 'blocks.5' can be made narrower.*--cut"):
        Cohort(tokens, example(), [Branch("blocks.5", width=0.5)])

    class Halves(networks.Tiny):
        """Knows by heart how many channels it has."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.early(self.stem(x))
            return self.head(self.late(x.reshape(len(x), 16, 16, 16)).mean((2, 3)))

    halves = Halves()
    with pytest.raises(NetworkError, match=r"Halves cannot be made narrower after 'stem': .*--cut"):
        Cohort(halves, example(), [Branch("stem", width=0.5)])
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(NetworkError, match=r"pip install 'okdc\[prune\]'"):
        Cohort(tokens, example(), [Branch("blocks.3", width=0.5)])
    assert not any(m._forward_hooks for m in [*tokens.modules(), *halves.modules()])


@pytest.mark.parametrize(
    ("kind", "plan"),
    [
        (traps.ControlFlow, Branch("early", (1,))),
        (traps.ReadsAttribute, Branch("early", (2,))),
        (traps.CalledTwice, Branch("early")),
        (networks.Tokens, Branch("blocks.2", (1,))),
        (networks.Tiny, Branch()),
        (networks.Tiny, Branch(network=networks.Tokens())),
    ],
)
def test_members_of_every_kind_stand_alone(kind: type[nn.Module], plan: Branch) -> None:
    torch.manual_seed(0)
    target = kind()
    target.register_forward_hook(lambda module, args, output: output * 2)  # the user's own stays
    cohort = Cohort(target, example(), [plan, plan] if plan.network is None else [plan], taps=("embeddings",))
    cohort.train()(example())
    expected = cohort.eval()(example()).logits
    modes = [m.training for m in cohort.train().modules()]
    alone = [cohort.extract(i) for i in range(len(cohort))]
    assert [m.training for m in cohort.modules()] == modes
    assert type(alone[0]) is kind and alone[0] is not target
    for i, network in enumerate(alone):
        torch.testing.assert_close(network.eval()(example()), expected[i])
    cohort.strip()
    assert [len(m._forward_hooks) for m in alone[0].modules()] == [len(m._forward_hooks) for m in target.modules()]
    with torch.no_grad():
        for parameter in cohort.parameters():
            parameter.zero_()
    for i, network in enumerate(alone):
        torch.testing.assert_close(network(example()), expected[i])


def test_a_branch_that_is_no_network_by_itself_is_refused() -> None:
    class Shared(networks.Tiny):
        """Its norm serves on both sides of the cut, with the branch's own weights on one of them."""

        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.early[0](self.stem(x))
            return self.head(self.late(self.norm(self.early[1](self.norm(x)))).mean((2, 3)))

    torch.manual_seed(0)
    cohort = Cohort(Shared(), example(), [Branch("early.1")])
    with torch.no_grad():
        cohort.branches[0].norm.weight.fill_(0.5)
    cohort.extract(0)
    with pytest.raises(NetworkError, match=r"branch1 of Shared is no network by itself.*'early.1'.*--cut"):
        cohort.extract(1)
