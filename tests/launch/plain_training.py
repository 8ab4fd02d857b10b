"""Train a small network on a curve: plain torch, nothing distributed. tests/launch/test_readme.py makes it so."""

import torch
from torch import nn

EPOCHS, BATCH = 6, 64

torch.manual_seed(0)
x = 6 * torch.rand(1024, 1) - 3
data = torch.utils.data.TensorDataset(x, torch.sin(2 * x) + 0.1 * torch.randn(1024, 1))
loader = torch.utils.data.DataLoader(data, batch_size=BATCH, shuffle=False)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh())
        self.head = nn.Linear(32, 1)

    def forward(self, inputs):
        return self.head(self.body(inputs))


model = Net()
optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, betas=(0.5, 0.99), weight_decay=0.01)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)

for epoch in range(EPOCHS):
    total = 0.0
    for inputs, targets in loader:
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(inputs), targets)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        total += loss.item() * len(inputs)
    scheduler.step()
    print(f"epoch {epoch}: loss {float.hex(total / len(data))}")
