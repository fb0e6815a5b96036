"""Handwritten digits in PyTorch, with ordinary and with over-parameterized convolutions.

The network and its training are those of PyTorch's tutorial "What is torch.nn really?". Whether
`Conv2d` below is `torch.nn.Conv2d` or `DOConv2d` is the only difference between the two.
"""

from doconv_torch import DOConv2d, export_state  # first, as it says what to install if torch lacks

# isort: split
import harness
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

LAYERS = {"conv": nn.Conv2d, "doconv": DOConv2d}


def network(Conv2d):
    """Return the tutorial's network: `(B, 1, 28, 28)` images to `(B, 10)` logits."""
    return nn.Sequential(
        Conv2d(1, 16, kernel_size=3, stride=2, padding=1),
        nn.ReLU(),
        Conv2d(16, 16, kernel_size=3, stride=2, padding=1),
        nn.ReLU(),
        Conv2d(16, 10, kernel_size=3, stride=2, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


def build(layer, seed, device):
    """Return a new network. Both layers draw the same weights from the same seed, and D is zero."""
    torch.manual_seed(seed)
    return network(LAYERS[layer]).to(device)


def train(model, data, options, seed, device, epochs):
    """Train with stochastic gradient descent, as the tutorial does."""
    images, labels = map(torch.from_numpy, (data.train_images[:, None], data.train_labels))
    batches = DataLoader(
        TensorDataset(images, labels),
        options.batch_size,
        shuffle=True,
        generator=torch.Generator().manual_seed(seed),
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=options.lr, momentum=0.9)
    for _ in epochs:
        for x, y in batches:
            loss = F.cross_entropy(model(x.to(device)), y.to(device))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()


@torch.no_grad()
def outputs(model, images, device):
    """Return the logits of `(N, 28, 28)` images, `(N, 10)`."""
    return model(torch.from_numpy(images[:, None]).to(device)).cpu().numpy()


def fold(model, device):
    """Return the same network with ordinary convolutions in place of the over-parameterized."""
    return nn.Sequential(
        *(layer.fold() if isinstance(layer, DOConv2d) else layer for layer in model)
    )


def devices():
    """Return PyTorch's CPU, and its accelerator where it finds one."""
    found = {"cpu": torch.device("cpu")}
    if torch.accelerator.is_available():
        found["gpu"] = torch.accelerator.current_accelerator()
    return found


SAMPLE = harness.Sample(
    name="sample_pt",
    description=__doc__,
    versions={"torch": torch.__version__},
    epochs={"digits": 150, "mnist": 2},
    lr={"digits": 0.03, "mnist": 0.1},
    why="2 epochs and the learning rate 0.1 are the tutorial's, for MNIST: 1,876 steps. On the "
    "digits 0.1 is too large: behind the network's last ReLU the outputs of whole classes die, "
    "more often the baseline's. With 0.03 it converges within 150 epochs, 3,000 steps.",
    batch_size=64,
    devices=devices(),
    build=build,
    train=train,
    outputs=outputs,
    fold=fold,
    parameters=lambda model: sum(p.numel() for p in model.parameters()),
    export_state=export_state,
)

if __name__ == "__main__":
    torch.backends.cudnn.deterministic = True  # the same seed gives the same result, on a GPU too
    torch.set_num_threads(1)  # so small a network is slower on several, which wait for each other
    harness.main(SAMPLE)
