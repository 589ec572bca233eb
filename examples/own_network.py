"""A network of your own and loaders of your own: okdc trains the very object that you pass, and gives it back."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import okdc


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x + self.norm(self.conv(x)))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, padding=1)
        self.early = nn.Sequential(Block(16), Block(16))
        self.down = nn.Conv2d(16, 32, 3, stride=2, padding=1)
        self.late = nn.Sequential(Block(32), Block(32))
        self.head = nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.late(self.down(self.early(self.stem(x))))
        return self.head(x.mean((2, 3)))


digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
labels = torch.tensor(digits.target)
train = DataLoader(TensorDataset(images[:1500], labels[:1500]), batch_size=64, shuffle=True, drop_last=True)
validation = DataLoader(TensorDataset(images[1500:], labels[1500:]), batch_size=256)

network = Net()
result = okdc.compress(network, train, validation, method="ahbf", members=3, extra_blocks=1, epochs=2)

assert result.student is network  # the same object, the same class, the same state_dict keys
print(f"top-1 {result.metrics['top1']:.1f} %, bundle in {result.path / 'export'}")
