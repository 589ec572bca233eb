"""PCL against the numbers of its reimplementation (tests/golden/pcl_*), in float64."""

from __future__ import annotations

import copy
from pathlib import Path

import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from okdc.cohort import Branch, Cohort, CohortOutput
from okdc.losses import kl, rampup
from okdc.methods.pcl import Pcl
from tests.helpers.networks import Tiny, Tokens
from tests.methods.golden import assert_same, load

IMAGES, LABELS = torch.randn(3, 8, 3, 32, 32), torch.arange(8) % 4


def method(members: int = 3, width: int = 8, **settings: object) -> Pcl:
    torch.manual_seed(0)
    branches = [Branch("early") for _ in range(members - 1)]
    return Pcl(Cohort(Tiny(width=width), torch.randn(2, 3, 32, 32), branches, taps=Pcl.taps), **settings)  # type: ignore[arg-type]


def step(pcl: Pcl, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    sum(pcl.train()(IMAGES, LABELS).values()).backward()
    optimizer.step()
    pcl.after_step([(IMAGES, LABELS)])


def trained(steps: int = 3, **settings: object) -> Pcl:
    pcl = method(**settings)
    optimizer = torch.optim.SGD(pcl.param_groups(0.05), momentum=0.9)
    for _ in range(steps):
        step(pcl, optimizer)
    return pcl


@pytest.mark.parametrize("row", [0, 1])
def test_losses_and_gradients(row: int) -> None:
    t, meta = load("pcl_losses")
    hyper = meta["hyper"]
    pcl = method(temperature=hyper["T"], kd_weight=hyper["lambda"], rampup_epochs=hyper["alpha"]).double()
    pcl.epoch.fill_(hyper["epochs"][row])
    assert_same(t["ramp.epoch"][row], hyper["epochs"][row])
    assert_same(rampup(pcl.epoch, hyper["alpha"]), t["ramp.weight"][row])
    peers, ensemble = [t[f"logits.{i}"].requires_grad_() for i in range(3)], t["ensemble"].requires_grad_()
    means = [t[f"mean_teacher.{i}"] for i in range(3)]
    parts = pcl.collaborative_losses(peers, ensemble, means, t["labels"])
    weight = t["ramp.weight"][row]
    assert_same(parts["ce/ensemble"], t["expected.ce.ensemble"])
    for i, name in enumerate(pcl.cohort.names):
        ce, kd, mean = (parts[f"{kind}/{name}"] for kind in ("ce", "kd", "mean"))
        assert_same(ce, t["expected.ce.peer"][i])
        assert_same(kd / weight, t["expected.kd.peer_from_ensemble"][i])
        assert_same(mean / weight, t["expected.kd.peer_from_mean"][i])
        assert_same(ce + kd + mean, t[f"expected.loss.r{row}.peer.{i}"])
        assert_same(ce + kd + mean, meta["expected"][f"r{row}.peer{i}"])
    assert_same(sum(parts.values()), t[f"expected.loss.r{row}.total"])
    assert_same(sum(parts.values()), meta["expected"][f"r{row}.total"])
    sum(parts.values()).backward()
    for i, leaf in enumerate(peers):
        assert_same(leaf.grad, t[f"expected.grad.r{row}.logits.{i}"])
    assert_same(ensemble.grad, t[f"expected.grad.r{row}.ensemble"])


def test_head_and_gradients_through_it() -> None:
    t, meta = load("pcl_head")
    pcl = method(width=16, temperature=meta["hyper"]["T"], kd_weight=meta["hyper"]["w"], rampup_epochs=0).double()
    pcl.head.weight = nn.Parameter(t["ensemble_classifier.weight"])
    pcl.head.bias = nn.Parameter(t["ensemble_classifier.bias"])
    maps = [t[f"feat.{i}"].requires_grad_() for i in range(3)]
    embeddings = tuple(x.mean((2, 3)) for x in maps)
    logits = tuple(x @ t[f"classifier.{i}.weight"].T + t[f"classifier.{i}.bias"] for i, x in enumerate(embeddings))
    ensemble = pcl.ensemble(CohortOutput(logits, embeddings=embeddings))
    for z in (*logits, ensemble):
        z.retain_grad()
    parts = pcl.collaborative_losses(logits, ensemble, [t[f"mean_teacher.{i}"] for i in range(3)], t["labels"])
    assert_same(sum(parts.values()), meta["expected"]["total"])
    sum(parts.values()).backward()
    assert_same(ensemble, t["expected.ensemble"])
    assert_same(ensemble.grad, t["expected.grad.ensemble"])
    assert_same(pcl.head.weight.grad, t["expected.grad.ensemble_classifier.weight"])
    for i, z in enumerate(logits):
        assert_same(z, t[f"expected.logits.{i}"])
        assert_same(z.grad, t[f"expected.grad.logits.{i}"])
        assert_same(maps[i].grad, t[f"expected.grad.feat.{i}"])


class Small(nn.Module):
    """The network of pcl_ema: four features, a batch norm and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.bn = nn.Linear(4, 4), nn.BatchNorm1d(4)


def golden_pair(t: dict[str, Tensor]) -> tuple[Pcl, nn.Module, nn.Module]:
    """A method whose cohort and average are the golden file's student and its average, for `after_step` alone."""
    pcl, pair = method().double(), []
    for prefix in ("student", "ema_before"):
        network = Small().double()
        network.load_state_dict({k.removeprefix(f"{prefix}."): v for k, v in t.items() if k.startswith(prefix)}, False)
        pair.append(network)
    pcl.cohort, pcl.mean.cohort = pair  # type: ignore[assignment]
    return pcl, *pair


def test_averages() -> None:
    t, meta = load("pcl_ema")
    assert t["global_step"].tolist() == meta["hyper"]["steps"]
    for done, decay in zip(meta["hyper"]["steps"], t["expected.decay"], strict=True):
        pcl, _, mean = golden_pair(t)
        assert_same(torch.tensor(1 - max(1 / (done + 1), 1 - pcl.decay)).double(), decay)
        pcl.steps = done
        pcl.after_step([(IMAGES, LABELS)])
        for key, value in mean.state_dict().items():
            if not key.endswith("num_batches_tracked"):
                assert_same(value, t[f"expected.step{done}.{key}"])


def test_averages_step_by_step() -> None:
    t, meta = load("pcl_ema")
    pcl, student, mean = golden_pair(t)
    for i in range(meta["hyper"]["traj"]):
        student.fc.weight.data = t["traj.student.fc.weight"][i].clone()
        pcl.after_step([(IMAGES, LABELS)])
        assert_same(mean.fc.weight, t["expected.traj.ema.fc.weight"][i])


def test_rampup_and_its_share_of_a_short_run() -> None:
    t, meta = load("pcl_rampup")
    assert t["epoch"].tolist() == meta["hyper"]["epochs"]
    ramp = torch.stack([rampup(e.double(), meta["hyper"]["alpha"]) for e in t["epoch"]])
    assert_same(meta["hyper"]["lambda"] * ramp, t["intended.weight"])
    logits = [torch.randn(5, 4) for _ in range(3)]
    share, fixed = method(), method(rampup_epochs=80)
    share.epoch.fill_(2), share.epochs.fill_(30), fixed.epoch.fill_(20)
    mine, theirs = (m.collaborative_losses(logits, logits[0], logits, LABELS[:5]) for m in (share, fixed))
    torch.testing.assert_close(mine, theirs)


def test_averages_teach_on_the_same_views_and_learn_nothing() -> None:
    pcl = trained(kd_weight=0.5, rampup_epochs=0)
    pcl.zero_grad()
    twin = copy.deepcopy(pcl)
    parts = pcl(IMAGES, LABELS)
    means, out = twin.mean.cohort(IMAGES).logits, twin.cohort(IMAGES)
    expected = 0.5 * (kl(out.logits[0], means[1], 3.0) + kl(out.logits[0], means[2], 3.0)) / 2
    torch.testing.assert_close(parts["mean/target"], expected)
    sum(parts.values()).backward()
    assert all(p.grad is None and not p.requires_grad for p in pcl.mean.parameters())
    optimised = {id(p) for group in pcl.param_groups(0.1) for p in group["params"]}
    assert optimised == {id(p) for p in (*pcl.cohort.parameters(), *pcl.head.parameters())}


def test_averages_share_nothing_with_the_cohort() -> None:
    pcl = trained()
    own = {x.data_ptr() for x in (*pcl.cohort.state_dict().values(), *pcl.head.state_dict().values())}
    assert not own & {x.data_ptr() for x in pcl.mean.state_dict().values()}
    assert pcl.mean.cohort.tape is not pcl.cohort.tape
    assert pcl.double().student.head.weight.dtype == torch.float64
    alone = trained(steps=1)  # the first update is a copy
    for mean, mine in zip(alone.mean.parameters(), (*alone.cohort.parameters(), *alone.head.parameters())):
        assert torch.equal(mean, mine)


def test_the_average_ships_with_statistics_of_its_own() -> None:
    pcl = trained()
    shipped = Tiny()
    shipped.load_state_dict(pcl.student.state_dict())
    assert torch.equal(shipped.eval()(IMAGES[0]), pcl.eval().mean.cohort(IMAGES[0]).logits[0])
    assert not torch.equal(pcl.student.stem[1].running_mean, pcl.cohort.target.stem[1].running_mean)
    assert pcl.student.stem[1].num_batches_tracked == pcl.cohort.target.stem[1].num_batches_tracked == 9
    own = method(ship="own")
    assert own.student is own.cohort.target


def test_statistics_copied_or_averaged() -> None:
    copied, averaged = trained(ema_buffers="copy"), trained(ema_buffers="average", steps=0)
    for mean, own in zip(copied.mean.cohort.buffers(), copied.cohort.buffers(), strict=True):
        assert torch.equal(mean, own)
    optimizer, seen = torch.optim.SGD(averaged.param_groups(0.05)), []
    for _ in range(3):
        step(averaged, optimizer)
        seen.append(averaged.cohort.target.stem[1].running_mean.clone())
    torch.testing.assert_close(averaged.student.stem[1].running_mean, torch.stack(seen).mean(0))
    assert averaged.student.stem[1].num_batches_tracked == 9


def test_the_ensemble_is_a_network_that_can_be_exported(tmp_path: Path) -> None:
    pcl = trained().eval()
    (network,) = pcl.byproducts().values()
    network.eval()
    logits = network(IMAGES[0])
    assert torch.equal(logits, pcl.mean(IMAGES[0])) and not torch.equal(logits, pcl.ensemble(pcl.cohort(IMAGES[0])))
    assert not {x.data_ptr() for x in pcl.state_dict().values()} & {x.data_ptr() for x in network.parameters()}
    file = tmp_path / "model.onnx"
    torch.onnx.export(network, (IMAGES[0][:2],), file, dynamo=True, dynamic_shapes=({0: "batch"},), verbose=False)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: IMAGES[0].numpy()})
    torch.testing.assert_close(torch.from_numpy(found), logits.detach(), rtol=1e-4, atol=1e-5)


def test_peers_of_another_width() -> None:
    torch.manual_seed(0)
    images = torch.randn(2, 4, 3, 32, 32)
    pcl = Pcl(Cohort(Tiny(), images[0], [Branch(network=Tokens())], taps=Pcl.taps))
    assert pcl.head.in_features == 32 + 16
    sum(pcl(images, torch.arange(4)).values()).backward()
    assert all(p.grad is not None for p in (*pcl.cohort.parameters(), *pcl.head.parameters()))
