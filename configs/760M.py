# 760M with ALiBi, started from the 580M grown in depth:
#   python grow.py out/580M.pt out/760M-init.pt --n_layer=24
data = "data/corpus"
init_from = "out/760M-init.pt"
max_tokens = 10_000_000_000
block_size = 1024
batch_size = 512            # 0.5M tokens
micro_batch_size = 8

n_layer = 24
n_head = 12                 # heads of 128
n_embd = 1536
dropout = 0.1
bias = False
pos = "alibi"

learning_rate = 2.0e-4
min_lr = 2.0e-5
warmup_steps = 2000
weight_decay = 0.1
beta2 = 0.95
grad_clip = 1.0
dtype = "bfloat16"
