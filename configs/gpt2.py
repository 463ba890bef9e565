# GPT-2 124M on OpenWebText. Exactly Hugging Face's GPT2LMHeadModel.
data = "data/openwebtext"
max_tokens = 300_000_000_000
batch_size = 480
micro_batch_size = 12

dropout = 0.0
learning_rate = 6e-4
min_lr = 6e-5
warmup_steps = 2000
