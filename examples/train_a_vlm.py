"""Train a vision-language model in one file: a vision encoder, TokenPacker, a language model, two stages, answers.

    python examples/train_a_vlm.py

The pictures are 64 x 64 pixels and show one shape in one color. The questions are those of easy-VQA: "what color is the
circle?", "is there a blue shape?". Everything starts from random weights and takes about four minutes on two cores:

    before   The encoder learns which words describe a picture. The language model learns to read, without pictures.
    stage 1  Align: the model describes pictures. Only the packer learns.
    stage 2  Instruct: the model answers questions. The packer and the language model learn.

Large models are trained in the same two stages. They start from CLIP and from a language model such as Vicuna.

Shapes: B samples, L = 64 patches, T = 16 packed tokens, C vision width, D language width, S text tokens, V words.
"""

import argparse
import random
import re
import time

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from tokenpacker import TokenPacker, TokenPackerProjectorConfig, VisionFeatures
from tokenpacker.scenes import Sample, easy_vqa
from tokenpacker.scenes.guessing import guess_accuracy

PATCH, GRID = 8, 8  # a picture has 8 x 8 patches of 8 x 8 pixels
C, D, HEADS, LAYERS = 64, 128, 4, 4
BATCH = 64
END, IGNORED = 0, -100  # the token that ends an answer; the label of a token that is not learned
DESCRIBE = "describe the image."
split = re.compile(r"\w+|[^\w\s]").findall  # a text -> its words and punctuation marks; each is a token


class Data:
    """Samples with their pictures (B, 3, 64, 64), and the words that occur in them."""

    def __init__(self, first_seed: int, count: int):
        self.samples = [easy_vqa.make_sample(first_seed + number) for number in range(count)]
        pictures = np.stack([np.asarray(sample.image) for sample in self.samples])  # (B, 64, 64, 3)
        self.pictures = torch.from_numpy(pictures).permute(0, 3, 1, 2) / 127.5 - 1  # (B, 3, 64, 64), from -1 to 1
        texts = [DESCRIBE, "yes no", *(sample.caption for sample in self.samples), *easy_vqa.all_question_texts()]
        self.words = ["<end>", *sorted({word for text in texts for word in split(text)})]
        self.ids = {word: number for number, word in enumerate(self.words)}

    def encode(self, text: str) -> list[int]:
        return [self.ids[word] for word in split(text)]

    def draw(self) -> tuple[Tensor, list[Sample]]:
        """A random batch: pictures (B, 3, 64, 64) and their samples."""
        places = random.sample(range(len(self.samples)), BATCH)
        return self.pictures[places], [self.samples[place] for place in places]

    def texts(self, pairs: list[tuple[str, str]]) -> tuple[Tensor, Tensor]:
        """Token ids (B, S) and labels (B, S) of (prompt, answer) pairs: answers are learned, prompts are only read."""
        rows = [(self.encode(prompt), [*self.encode(answer), END]) for prompt, answer in pairs]
        ids = [torch.tensor(prompt + answer) for prompt, answer in rows]
        labels = [torch.tensor([IGNORED] * len(prompt) + answer) for prompt, answer in rows]
        return pad_sequence(ids, True, END), pad_sequence(labels, True, IGNORED)


class Block(nn.Module):
    """Attention and MLP. A `causal` block sees only earlier tokens and knows how far away they are."""

    def __init__(self, dim: int, causal: bool):
        super().__init__()
        self.causal = causal
        self.attention_norm, self.mlp_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.query_key_value, self.output = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:  # (B, S, C) -> (B, S, C)
        projected = self.query_key_value(self.attention_norm(x)).unflatten(-1, (3, HEADS, -1))
        query, key, value = projected.permute(2, 0, 3, 1, 4)  # each (B, HEADS, S, C / HEADS)
        if self.causal:
            query, key = rotate(query), rotate(key)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        x = x + self.output(attended.transpose(1, 2).flatten(2))  # (B, HEADS, S, C / HEADS) -> (B, S, C)
        return x + self.mlp(self.mlp_norm(x))


def rotate(x: Tensor) -> Tensor:
    """Rotary position embedding: turns each pair of channels by an angle that grows with the position."""
    half = x.shape[-1] // 2
    frequencies = 1000.0 ** -(torch.arange(half) / half)
    angles = torch.arange(x.shape[-2])[:, None] * frequencies  # (S, half)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], dim=-1)


class VisionEncoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, C, kernel_size=PATCH, stride=PATCH)
        self.positions = nn.Parameter(0.02 * torch.randn(GRID * GRID, C))
        self.blocks = nn.ModuleList([Block(C, causal=False) for _ in range(LAYERS)])

    def forward(self, pictures: Tensor) -> list[Tensor]:  # (B, 3, 64, 64) -> 1 + LAYERS times (B, L, C)
        hidden_states = [self.patches(pictures).flatten(2).transpose(1, 2) + self.positions]  # (B, L, C)
        for block in self.blocks:
            hidden_states.append(block(hidden_states[-1]))
        return hidden_states


class LanguageModel(nn.Module):
    """A decoder. It takes embeddings, not token ids, because packed tokens are embeddings too."""

    def __init__(self, num_words: int):
        super().__init__()
        self.embed = nn.Embedding(num_words, D)
        self.blocks = nn.Sequential(*[Block(D, causal=True) for _ in range(LAYERS)])
        self.norm = nn.LayerNorm(D)
        self.head = nn.Linear(D, num_words)

    def forward(self, embeddings: Tensor) -> Tensor:  # (B, S, D) -> (B, S, V)
        return self.head(self.norm(self.blocks(embeddings)))


class VisionLanguageModel(nn.Module):
    def __init__(self, num_words: int, scale_factor: int):
        super().__init__()
        widths = {"vision_dim": C, "language_dim": D, "num_levels": LAYERS, "num_heads": HEADS}
        self.encoder = VisionEncoder()
        self.packer = TokenPacker(TokenPackerProjectorConfig(**widths, scale_factor=scale_factor))
        self.language_model = LanguageModel(num_words)

    def image_tokens(self, pictures: Tensor) -> Tensor:  # (B, 3, 64, 64) -> (B, T, D)
        hidden_states = self.encoder(pictures)  # 1 + LAYERS times (B, L, C); frozen in both stages
        features = VisionFeatures.from_hidden_states(hidden_states, (GRID, GRID), levels=range(1, LAYERS + 1))
        return self.packer(features)  # L patches -> T tokens: each token attends to its own window of 2 x 2 patches

    def forward(self, pictures: Tensor, ids: Tensor) -> Tensor:  # (B, 3, 64, 64), (B, S) -> (B, S, V)
        packed = self.image_tokens(pictures)  # (B, T, D)
        text = self.language_model.embed(ids)  # (B, S, D)
        logits = self.language_model(torch.cat([packed, text], dim=1))  # (B, T + S, V): the picture comes first
        return logits[:, packed.shape[1] :]

    @torch.no_grad()
    def generate(self, picture: Tensor, prompt: list[int], max_new_tokens: int = 8) -> list[int]:
        """Adds the most likely next word to the text, again and again, until it is the end token."""
        packed = self.image_tokens(picture[None])  # (1, T, D)
        answer: list[int] = []
        while len(answer) < max_new_tokens:
            text = self.language_model.embed(torch.tensor([prompt + answer]))  # (1, S, D)
            word = self.language_model(torch.cat([packed, text], dim=1))[0, -1].argmax().item()
            if word == END:
                break
            answer.append(word)
        return answer


def train(name: str, model: nn.Module, learning: list[nn.Module], compute_loss, num_steps: int) -> None:
    """The loop of all four phases. They differ in the loss of a batch and in the modules that learn."""
    model.requires_grad_(False)
    weights = [weight.requires_grad_() for module in learning for weight in module.parameters()]
    optimizer = torch.optim.AdamW(weights, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=num_steps + 2, pct_start=0.1)
    start = time.monotonic()
    for step in range(1, num_steps + 1):
        loss = compute_loss()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == num_steps:
            print(f"{name:14}  step {step:3}  loss {loss.item():.3f}  {time.monotonic() - start:3.0f} s", flush=True)


def naming_loss(encoder: VisionEncoder, name_words: nn.Module, data: Data) -> Tensor:
    """Before: a picture -> the words of its caption, in any order."""
    pictures, samples = data.draw()
    occurs = torch.zeros(BATCH, len(data.words))  # (B, V)
    for row, sample in enumerate(samples):
        occurs[row, data.encode(sample.caption)] = 1
    pooled = encoder(pictures)[-1].mean(dim=1)  # (B, L, C) -> (B, C)
    return F.binary_cross_entropy_with_logits(name_words(pooled), occurs)


def reading_loss(language_model: LanguageModel, data: Data) -> Tensor:
    """Before: a description and a question about it -> the answer. There is no picture."""
    _, samples = data.draw()
    tasks = [ask(sample) if random.random() < 0.8 else (DESCRIBE, sample.caption) for sample in samples]
    told = [(f"{sample.caption} {asked}", answer) for sample, (asked, answer) in zip(samples, tasks, strict=True)]
    ids, labels = data.texts(told)
    return text_loss(language_model(language_model.embed(ids)), labels)


def picture_loss(model: VisionLanguageModel, data: Data, make_task) -> Tensor:
    """Stages 1 and 2: a picture in place of the description, and a task -> the answer."""
    pictures, samples = data.draw()
    ids, labels = data.texts([make_task(sample) for sample in samples])
    return text_loss(model(pictures, ids), labels)


def text_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """The logits (B, S, V) at each token predict the label (B, S) of the next token."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)


def ask(sample: Sample) -> tuple[str, str]:
    question = random.choice(sample.questions)
    return question.text, question.answer


def answer(model: VisionLanguageModel, data: Data, picture: Tensor, question: str) -> str:
    return " ".join(data.words[word] for word in model.generate(picture, data.encode(question)))


def accuracy(model: VisionLanguageModel, data: Data, unseen: Data) -> float:
    """The share of right answers to all questions about the unseen pictures."""
    pairs = list(zip(unseen.pictures, unseen.samples, strict=True))
    right = [answer(model, data, picture, it.text) == it.answer for picture, sample in pairs for it in sample.questions]
    return sum(right) / len(right)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400, help="training steps of each phase; 2 shows that it runs")
    parser.add_argument("--unseen", type=int, default=100, help="pictures to test on, with 10 questions each")
    parser.add_argument("--scale-factor", type=int, default=2, help="2 packs 64 patches into 16 tokens, 4 into 4")
    args = parser.parse_args()
    random.seed(0)
    torch.manual_seed(0)
    data, unseen = Data(first_seed=0, count=4000), Data(first_seed=1_000_000, count=args.unseen)
    model = VisionLanguageModel(len(data.words), args.scale_factor)
    encoder, packer, language_model = model.encoder, model.packer, model.language_model
    name_words = nn.Linear(C, len(data.words))

    train("vision encoder", model, [encoder, name_words], lambda: naming_loss(encoder, name_words, data), args.steps)
    train("language model", model, [language_model], lambda: reading_loss(language_model, data), args.steps)
    train("stage 1", model, [packer], lambda: picture_loss(model, data, lambda it: (DESCRIBE, it.caption)), args.steps)
    print(f"After stage 1, {accuracy(model, data, unseen):.1%} of the answers are right.")
    train("stage 2", model, [packer, language_model], lambda: picture_loss(model, data, ask), args.steps)

    for question in unseen.samples[0].questions[:4]:
        print(f"  {question.text} {answer(model, data, unseen.pictures[0], question.text)} (right: {question.answer})")
    questions = [[question for sample in part.samples for question in sample.questions] for part in (data, unseen)]
    guessed, asked = guess_accuracy(*questions)
    print(f"On {args.unseen} unseen pictures, {accuracy(model, data, unseen):.1%} of {asked} answers are right.")
    print(f"Guessing, always the most frequent answer to a question, gets {guessed / asked:.1%} right.")


if __name__ == "__main__":
    main()
