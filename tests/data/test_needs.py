"""What methods ask of the data beyond images and labels: views, pairs, indices, images set aside."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

from okdc.cohort import Branch, Cohort
from okdc.data import Data, in_order, load, open_source, wrap
from okdc.data.images import Images
from okdc.data.pairs import images_per_class, paired_order
from okdc.errors import CutError, DataError, MethodError
from okdc.needs import Needs
from okdc.recipe import DataSettings
from tests.helpers.networks import Depthwise, Tiny, Tokens

CONFIG = {
    "input_size": (3, 16, 16), "mean": (0.5,) * 3, "std": (0.25,) * 3,
    "interpolation": "bilinear", "crop_pct": 1.0, "crop_mode": "center",
}  # fmt: skip


def digits(needs: Needs, views: int = 1, batch_size: int = 40, **changes: object) -> Data:
    settings = DataSettings(data="digits", **{"workers": 0, **changes})
    source = open_source(settings, 7)
    return load(
        source, settings, CONFIG, batch_size=batch_size, validation_batch_size=64, seed=7, device="cpu", needs=needs,
        views=views,
    )  # fmt: skip


def same(left: Data, right: Data, epoch: int = 1, start: int = 0) -> bool:
    mine, theirs = list(left.train.batches(epoch))[start:], list(right.train.batches(epoch, start))
    return len(mine) == len(theirs) and all(
        torch.equal(a, b) for x, y in zip(mine, theirs) for a, b in zip(x, y, strict=True)
    )


def test_views_are_independent_augmentations_of_the_same_images() -> None:
    data = digits(Needs(views=True), views=3, hflip=0.0)
    plain = digits(Needs(), hflip=0.0)
    (images, labels), (once, plain_labels) = next(data.train.batches(0)), next(plain.train.batches(0))
    assert images.shape == (3, 40, 3, 16, 16) and labels.shape == (40,)
    assert torch.equal(images[0], once) and torch.equal(labels, plain_labels)  # the first is what one view would be
    differs = (images[0] - images[1]).abs().amax((1, 2, 3)) > 0
    assert differs.float().mean() > 0.9 and not torch.equal(images[1], images[2])
    flat = next(digits(Needs(views=True), views=3, no_aug=True).train.batches(0))[0]
    assert torch.equal(flat[0], flat[1])  # the same images, then


def test_views_share_their_mixture_because_they_share_their_labels() -> None:
    images, labels = next(digits(Needs(views=True), views=2, mixup=0.8, no_aug=True).train.batches(0))
    assert torch.equal(images[0], images[1]) and labels.shape == (40, 10)
    images, _ = next(digits(Needs(views=True), views=2, no_aug=False, reprob=1.0, scale=[1, 1]).train.batches(0))
    assert not torch.equal(images[0], images[1])  # but each is erased in a place of its own


@pytest.mark.parametrize("resident", ["auto", "off"])
def test_a_method_of_one_member_has_as_many_views_as_it_says_how_strong(
    resident: str, caplog: pytest.LogCaptureFixture
) -> None:
    three = next(digits(Needs(views=3), resident=resident).train.batches(0))[0]
    once = next(digits(Needs(), resident=resident).train.batches(0))[0]
    assert three.shape == (3, 40, 3, 16, 16) and torch.equal(three[0], once) and not torch.equal(three[1], three[2])
    pair = Needs(views=("strong", "weak"))
    strong, weak = next(digits(pair, resident=resident, reprob=1.0, hflip=0.0, scale=[1, 1]).train.batches(0))[0]
    bare = next(digits(Needs(), resident=resident, hflip=0.0, scale=[1, 1]).train.batches(0))[0]
    changed = [(each != bare).any(1).flatten(1).float().mean(1) for each in (strong, weak)]  # the share of each image
    assert changed[0].min() > 0 and not changed[1].any()
    assert not caplog.messages
    digits(pair, resident=resident)
    assert "here they are alike" in caplog.text and len(caplog.messages) == 1


def test_a_weak_view_is_of_crops_and_flips_alone() -> None:
    strong = {"aa": "rand-m9-n3-mstd0.5", "color_jitter": 0.4, "hflip": 0.0, "scale": [1, 1], "ratio": [1, 1]}
    weak, other = next(digits(Needs(views=("weak", "strong")), **strong).train.batches(0))[0]
    bare = next(digits(Needs(), resident="off", hflip=0.0, scale=[1, 1], ratio=[1, 1]).train.batches(0))[0]
    assert torch.equal(weak, bare) and (other != weak).flatten(1).any(1).float().mean() > 0.7


@pytest.mark.parametrize("views", [1, 0, -2, ("weak",), ("weak", "hard"), "strong", ["weak", "strong"], 2.0])
def test_views_that_there_are_not_are_refused(views: object) -> None:
    with pytest.raises(MethodError, match=r"expected True, one for each member, or a number of 2 or more, or how str"):
        Needs(views=views)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("needs", "views"),
    [(Needs(views=True), 2), (Needs(views=("weak", "strong")), 1), (Needs(pairs=True), 1), (Needs(indices=True), 1)],
    ids=str,
)
def test_order_and_augmentation_stay_stateless(needs: Needs, views: int) -> None:
    strong = {"aa": "rand-m9-mstd0.5", "reprob": 0.5} if isinstance(needs.views, tuple) else {}
    assert same(digits(needs, views, **strong), digits(needs, views, workers=2, **strong), start=9)


def test_indices_say_which_image_it_is() -> None:
    data = digits(Needs(indices=True), no_aug=True)
    seen = []
    for _, labels, indices in data.train.batches(0):
        assert torch.equal(data.train_labels[indices], labels)
        seen += indices.tolist()
    assert len(set(seen)) == len(seen) and len(data.train_labels) == data.sizes[0]
    one, other = ({i: x for xs, _, ii in data.train.batches(e) for i, x in zip(ii.tolist(), xs)} for e in (0, 1))
    assert all(torch.equal(one[i], other[i]) for i in set(one) & set(other)) and len(set(one) & set(other)) > 1000


@pytest.mark.parametrize("law", [{"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.8, "cutmix": 1.0, "mixup_prob": 0.5}])
def test_a_method_that_takes_mixed_images_is_told_of_which_and_how_much(law: dict[str, float]) -> None:
    needs, size = Needs(indices=True, mixed=True), 25  # the odd one out stays as it is
    plain = {
        int(i): x for xs, _, ii in digits(Needs(indices=True), no_aug=True).train.batches(0) for i, x in zip(ii, xs)
    }
    data = digits(needs, batch_size=size, no_aug=True, mixup_off_epoch=1, smoothing=0.1, **law)
    seen = set()
    for images, labels, indices, shares in data.train.batches(0):
        own, others = torch.nn.functional.one_hot(data.train_labels[indices], 10).float().unbind(1)
        exact = 0.9 * (shares[:, None] * own + (1 - shares[:, None]) * others) + 0.01
        torch.testing.assert_close(labels, exact)
        assert shares[-1] == 1 and indices[-1, 0] == indices[-1, 1] and (shares[:-1] == shares[0]).all()
        assert torch.equal(indices[:-1, 0], indices[:-1, 1].flip(0))
        if list(law) == ["mixup"] and all(int(i) in plain for i in indices.flatten()):
            first, second = (torch.stack([plain[int(i)] for i in column]) for column in indices.unbind(1))
            by = shares.view(-1, 1, 1, 1)
            torch.testing.assert_close(images, by * first + (1 - by) * second, rtol=1e-4, atol=1e-4)
            seen.add("images")
        seen.add(float(shares[0]))
    assert len(seen) > 5 and ("images" in seen or len(law) > 1 or "cutmix" in law)
    assert {float(s) for *_, shares in data.train.batches(1) for s in shares} == {1.0}  # mixup_off_epoch


@pytest.mark.parametrize(("classes", "batch_size", "expected"), [(100, 128, 2), (10, 128, 16), (10, 40, 4), (2, 6, 3)])
def test_every_class_of_a_batch_has_a_pair(classes: int, batch_size: int, expected: int) -> None:
    labels = torch.arange(classes * 20)[torch.randperm(classes * 20)] % classes
    count = images_per_class(labels, batch_size)
    assert count == expected
    order = paired_order(labels, batch_size, count, torch.Generator().manual_seed(0))
    assert len(order) == len(labels) // batch_size * batch_size
    for batch in order.split(batch_size):
        counts = labels[batch].bincount(minlength=classes)
        assert set(counts.tolist()) <= {0, count}
        assert len(batch.unique()) == batch_size


def test_pairs_are_drawn_evenly_and_in_either_order() -> None:
    sizes = torch.tensor([0, 3, 1, 4, 2, 0])
    labels = torch.arange(len(sizes)).repeat_interleave(sizes).repeat(400)  # the classes' sizes are 400 times these
    for count in (2, 3):
        order = paired_order(labels, 2 * count, count, torch.Generator().manual_seed(1)).reshape(-1, count)
        drawn = labels[order[:, 0]].bincount(minlength=len(sizes))
        assert (drawn[sizes > 0] - len(order) / 4).abs().max() < 5 * (len(order) / 4) ** 0.5
        assert ((order[:, 0] < order[:, 1]).float().mean() - 0.5).abs() < 5 * 0.5 / len(order) ** 0.5
    few = torch.tensor([0] * 3 + [1] * 5000)
    order = paired_order(few, 6, 3, torch.Generator().manual_seed(1)).reshape(-1, 3)
    every = order[few[order[:, 0]] == 0]  # the three images of a class in each of their six orders
    assert len(every) > 800 and every.sort(1).values.unique(dim=0).tolist() == [[0, 1, 2]]
    counts = every.unique(dim=0, return_counts=True)[1]
    assert len(counts) == 6 and (counts - len(every) / 6).abs().max() < 5 * (len(every) / 6) ** 0.5


@pytest.mark.parametrize("needs", [Needs(pairs=True, indices=True), Needs(indices=True)], ids=["pairs", "any"])
def test_an_unreadable_image_is_stood_in_for(needs: Needs, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = set(range(0, 1437, 7))
    read = Images.__getitem__

    def sometimes(self: Images, position: int) -> tuple[Image.Image, int]:
        if position in broken and len(self) == 1437:
            raise OSError("broken")
        return read(self, position)

    monkeypatch.setattr(Images, "__getitem__", sometimes)
    data = digits(needs, max_bad_images=300)
    assert data.sizes[0] == 1437
    for _, labels, indices in data.train.batches(0):
        assert torch.equal(data.train_labels[indices], labels) and not broken & set(indices.tolist())
        if needs.pairs:  # of its own class, and not an image that is there already... unless two miss their neighbours
            assert labels.bincount(minlength=10).tolist().count(0) == 0 and len(indices.unique()) >= 38


def test_pairs_that_cannot_be_had_are_refused() -> None:
    with pytest.raises(DataError, match=r"7 images of 2 classes cannot be.*-b 8"):
        images_per_class(torch.arange(20) % 2, 7)
    with pytest.raises(DataError, match="--mixup and --cutmix make images"):
        digits(Needs(pairs=True), mixup=0.2)


def test_images_set_aside_are_not_trained_on() -> None:
    data = digits(Needs(indices=True, held_out=True))
    aside = sum(len(labels) for _, labels in data.held_out)
    whole = digits(Needs())
    assert aside > 50 and aside + data.sizes[0] == whole.sizes[0] and data.sizes[1] == whole.sizes[1]
    assert len(data.train_labels) == data.sizes[0]
    rare = Images([], torch.tensor([0] + [1] * 30 + [2] * 30), "rare")
    training, aside = rare.split(20)
    assert 0 in training.labels and 0 not in aside.labels  # the only image of a class stays


def test_a_loader_of_ones_own_cannot_say_which_image_is_which(tmp_path: Path) -> None:
    loader = DataLoader(TensorDataset(torch.randn(8, 3, 8, 8), torch.arange(8) % 2), batch_size=4)
    with pytest.raises(DataError, match="data=FOLDER"):
        wrap(loader, needs=Needs(indices=True))
    with pytest.raises(DataError, match="set aside"):
        wrap(loader, needs=Needs(held_out=True))
    assert wrap(loader, needs=Needs(views=True, pairs=True)).train_labels is None


def test_a_loader_of_ones_own_gives_the_views_that_are_asked_for() -> None:
    needs, images, labels = Needs(views=("weak", "strong")), torch.rand(9, 3, 8, 8), torch.arange(9) % 2
    pairs = [((image, -image), label) for image, label in zip(images, labels)]
    data = wrap(DataLoader(pairs, batch_size=4), needs=needs)  # type: ignore[arg-type]
    views, told = next(data.train.batches(0))
    assert torch.equal(views, torch.stack([images[:4], -images[:4]])) and torch.equal(told, labels[:4])
    assert len(list(data.train.batches(0))) == 2 and data.sizes[0] == 9  # the last image alone is left out
    assert next(in_order(data, 4))[0].shape == (4, 3, 8, 8)
    with pytest.raises(DataError, match=r"needs 2 views of each image \(weak, strong\), and .* gave one Tensor; .*=FO"):
        wrap(DataLoader(TensorDataset(images, labels), 4), needs=needs)
    with pytest.raises(DataError, match=r"needs 3 views .*gave 2 of them"):
        wrap(DataLoader(pairs, 4), needs=Needs(views=3))  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"images of shape \(4, 8\)"):
        wrap([([torch.rand(4, 8)] * 2, labels[:4])], needs=needs)


@pytest.mark.parametrize("network", [Tiny, Depthwise, Tokens])
def test_each_member_sees_its_own_view(network: type[torch.nn.Module]) -> None:
    torch.manual_seed(0)
    target, example = network(), torch.randn(2, 3, 32, 32)
    cut = {"Tiny": "early", "Depthwise": "early"}.get(network.__name__)
    anatomy = Cohort(network(), example).anatomy
    cohort = Cohort(target, example, [Branch(cut or anatomy.cut(1))] * 2, taps=("embeddings",))
    views = torch.randn(3, 8, 3, 32, 32)
    cohort.eval()
    out = cohort(views)
    for i in range(3):  # a member alone on its view is what it says of it when all see that one
        together = cohort(views[i])
        torch.testing.assert_close(out.logits[i], together.logits[i])
        torch.testing.assert_close(out.embeddings[i], together.embeddings[i])
    cohort.train()
    sum(z.square().sum() for z in cohort(views).logits[1:]).backward()
    with pytest.raises(CutError, match=r"2 views of each image came to a cohort of 3 members.*self.cohort\(images"):
        cohort(views[:2])
    trunk = next(p for p in target.parameters())
    assert trunk.grad is not None and trunk.grad.abs().sum() > 0  # also what only the branches saw reaches the trunk


def test_batch_norm_of_the_trunk_sees_one_view_at_a_time() -> None:
    torch.manual_seed(0)
    target, views = Tiny(), torch.randn(2, 8, 3, 32, 32) * torch.tensor([1.0, 4.0]).view(2, 1, 1, 1, 1)
    cohort = Cohort(target, torch.randn(2, 3, 32, 32), [Branch("early")])
    before = target.stem[1].running_var.clone()
    cohort.train()(views)
    own = Tiny()
    own.load_state_dict({**target.state_dict(), "stem.1.running_var": before})
    own.stem[1].running_mean.zero_()
    for view in views:
        own.train().stem(view)
    torch.testing.assert_close(target.stem[1].running_var, own.stem[1].running_var)
    assert target.stem[1].num_batches_tracked == 2
