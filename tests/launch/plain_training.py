"""Train a small network on a curve: plain torch, nothing distributed. tests/launch/test_readme.py makes it so."""

import torch
from torch import nn

EPOCHS, BATCH = 6, 64

torch.manual_seed(0)
x = torch.linspace(-3, 3, 1024).reshape(-1, 1)
y = torch.sin(2 * x) + 0.1 * torch.randn(1024, 1)


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
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(epoch))
    total = 0.0
    for batch in order.split(BATCH):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x[batch]), y[batch])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        total += loss.item() * len(batch)
    scheduler.step()
    print(f"epoch {epoch}: loss {float.hex(total / len(x))}")
