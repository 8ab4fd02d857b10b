"""Hugging Face `Trainer` over MPI: ``mpiexec -n 2 python -m mpi4py examples/hf_trainer.py OUT``.

A tiny BERT learns whether most of 16 letters are of the first half of the alphabet; one label in ten is wrong.
"""

import sys

import torch
from mpi4py.MPI import COMM_WORLD as comm

from mpi_ef import DistributedOptimizer, TopK, shard
from mpi_ef.integrations import one_process, prepare_trainer

one_process(comm)  # before anything asks how many processes there are

from transformers import (  # noqa: E402
    BertConfig,
    BertForSequenceClassification,
    EarlyStoppingCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)

BATCH = 32  # of all ranks together


def samples(count, seed):
    random = torch.Generator().manual_seed(seed)
    letters = torch.randint(0, 26, (count, 16), generator=random)
    labels = ((letters < 13).sum(1) > 8).long() ^ (torch.rand(count, generator=random) < 0.1).long()
    return [{"input_ids": text, "labels": label} for text, label in zip(letters, labels, strict=True)]


def accuracy(prediction):
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def build(out):
    set_seed(0)
    model = BertForSequenceClassification(BertConfig(
        vocab_size=26, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, num_labels=2,
        max_position_embeddings=16))
    adamw = torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.5, 0.999))
    args = TrainingArguments(
        out, num_train_epochs=4, per_device_train_batch_size=BATCH // 2 // comm.size, gradient_accumulation_steps=2,
        max_grad_norm=1.0, lr_scheduler_type="cosine", eval_strategy="epoch", save_strategy="epoch", logging_steps=16,
        load_best_model_at_end=True, metric_for_best_model="accuracy", use_cpu=True, report_to=[], disable_tqdm=True,
        dataloader_pin_memory=False,
        accelerator_config={"use_configured_state": True})  # the one that one_process has made
    trainer = Trainer(
        model, args, train_dataset=shard(samples(2048, 1), comm), eval_dataset=shard(samples(512, 2), comm),
        compute_metrics=accuracy, callbacks=[EarlyStoppingCallback(early_stopping_patience=3)],
        optimizers=(DistributedOptimizer(adamw, comm, TopK(0.1), model=model), None))
    prepare_trainer(trainer, comm)
    return trainer


def main(out, resume=None):
    trainer = build(out)
    trainer.train(resume_from_checkpoint=resume)
    result = trainer.evaluate()
    if comm.rank == 0:
        print(f"final loss {result['eval_loss']:.4f}  accuracy {result['eval_accuracy']:.4f}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
