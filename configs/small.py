# A small GPT with GPT-2's vocabulary from scratch on WikiText-2, on a CPU: something that eval.py can score.
#   python prepare.py wikitext-2 --out data/wikitext-2
data = "data/wikitext-2"
block_size = 256
batch_size = 16
max_steps = 300
eval_interval = 100
eval_tokens = 2**15
save_interval = 100
log_interval = 20

n_layer = 4
n_head = 4
n_embd = 128
bias = False
pos = "alibi"

learning_rate = 2e-3
min_lr = 2e-4
warmup_steps = 50
beta2 = 0.99
