# A small GPT on the source code of Python's standard library, in minutes on a laptop's CPU.
#   python prepare.py python --out data/python --tokenizer bytes
data = "data/python"
block_size = 256
batch_size = 16
max_steps = 380
eval_interval = 95
eval_tokens = 2**16
save_interval = 95
log_interval = 20

n_layer = 4
n_head = 3
n_embd = 192
bias = False
pos = "alibi"

optimizer = "muon"
learning_rate = 6e-3
schedule = "linear"
min_lr = 0
warmup_steps = 50
beta2 = 0.99
