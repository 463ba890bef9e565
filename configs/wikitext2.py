# Fine-tune GPT-2 medium on WikiText-2 for one epoch; also --init_from=gpt2-large or gpt2-xl, and
# --block_size=256 or 512.
#   python prepare.py wikitext-2 --out data/wikitext-2
data = "data/wikitext-2"
init_from = "gpt2-medium"
block_size = 1024
batch_size = 8
max_epochs = 1
eval_interval = 100
dropout = 0.1

optimizer = "adafactor"
learning_rate = 5e-5
min_lr = 0.0
schedule = "linear"
warmup_steps = 30           # a tenth of the steps at context 1024
weight_decay = 0.0
