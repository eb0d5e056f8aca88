"""A detector, a Trainer and plain loaders; no configuration and no command: python examples/bare_lightning.py"""

import torch
from lightning import Trainer, seed_everything
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score
from torch.utils.data import DataLoader

from anomaly_lab.methods.shared_autoencoder import EncoderDecoderEncoder
from anomaly_lab.players import Learning

seed_everything(0)
images, labels = load_digits(return_X_y=True)
x = torch.nn.functional.interpolate(torch.tensor(images).float().view(-1, 1, 8, 8) / 8 - 1, 32)  # from -1 to 1
normal = torch.tensor(labels == 3)
detector = EncoderDecoderEncoder((1, 32, 32), width=16, latent_size=100, alpha=1.0, beta=0.0, omega=1.0)
detector.learning = Learning(lambda parameters: torch.optim.Adam(parameters, lr=1e-3))
trainer = Trainer(max_epochs=20, logger=False, enable_checkpointing=False)
trainer.fit(detector, DataLoader(x[normal][:140], batch_size=70, shuffle=True))
test = normal.nonzero()[140:].flatten().tolist() + (~normal).nonzero().flatten().tolist()
scores = torch.cat(trainer.predict(detector, DataLoader(x[test], batch_size=100)))
print(f"AUROC {roc_auc_score(labels[test] != 3, scores):.3f}")
