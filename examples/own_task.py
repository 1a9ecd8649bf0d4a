"""A task of one's own: rows from anywhere, as prompts and answers."""

from ia2mini import METHODS, Example, Grid, LoRA, draw_episode, load, score, teach

# the first four are answered 1, the others 0
WORDS = "lovely bright warm sweet awful dull dreary bleak".split()
rows = []
for i, word in enumerate(WORDS * 4):
    label = 1 if i % 8 < 4 else 0
    rows.append(Example(f"Text:a {word} film\nLabel:", str(label), label))

model, tokenizer = load("tiny")
taught = teach(model, tokenizer, draw_episode(rows, n=8))
lora = LoRA(model)
grid = Grid(model, lora, [taught], rates=[1e-2])
trained = METHODS["ia2-sft"](grid)
print(f"accuracy {score(model, tokenizer, rows, ('0', '1'), lora, trained.theta)[0]['acc']:.2f}")
