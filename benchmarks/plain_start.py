"""What a plain script needs before its first training step: its libraries and a model, nothing else."""

from benchmarks.turns import Turns

import numpy as np
import pandas as pd
import pytorch_lightning as pl
import tokenizers
import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

assert np and pd and pl and tokenizers and torch and AutoTokenizer
model = GPT2LMHeadModel(GPT2Config(vocab_size=4096, n_positions=128, n_layer=4, n_head=4, n_embd=128))
turns = Turns()
turns.next_step()
turns.next_step()
