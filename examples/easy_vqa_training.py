"""Training of make_easy_vqa_model.py's tower and projector, and of its language model's adapter."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from easy_vqa_data import COLORS, SHAPES, Question, conversation, load_split
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize
from transformers import LlavaForConditionalGeneration, LlavaProcessor

IGNORED = -100


class Split:
    """One split's questions by picture, and its pictures as the processor makes them."""

    def __init__(self, split: str, processor: LlavaProcessor) -> None:
        self.questions, files = load_split(split)
        self.by_picture: dict[int, list[Question]] = defaultdict(list)
        for question in self.questions:
            self.by_picture[question.picture].append(question)
        order = sorted(files)
        opened = [Image.open(files[picture]) for picture in order]
        self._row = {picture: row for row, picture in enumerate(order)}
        self._pixels = processor.image_processor(opened, return_tensors="pt")["pixel_values"]

    def pixels(self, pictures: Sequence[int]) -> Tensor:
        """float32 [picture, 3, SIDE, SIDE]"""
        return self._pixels[[self._row[picture] for picture in pictures]]

    def labelled(self) -> tuple[list[int], Tensor]:
        """Pictures whose questions tell color and shape, and the two's indices [picture, 2]."""
        words = {
            picture: set().union(*(question.true_words() for question in questions))
            for picture, questions in self.by_picture.items()
        }
        known = sorted(picture for picture, found in words.items() if len(found) == 2)
        return known, torch.tensor(
            [
                [next(i for i, w in enumerate(kind) if w in words[p]) for kind in (COLORS, SHAPES)]
                for p in known
            ]
        )

    def pools(self) -> dict[tuple[int, int], Pool]:
        """All questions about pictures of a color and a shape, by the two's indices."""
        pictures, labels = self.labelled()
        questions: dict[tuple[int, int], list[Question]] = defaultdict(list)
        for picture, (color, shape) in zip(pictures, labels.tolist(), strict=True):
            questions[color, shape] += self.by_picture[picture]
        return {kind: Pool(found) for kind, found in questions.items()}


@dataclass(frozen=True)
class Packed:
    """Several questions a picture in one row; each sees the picture and itself alone."""

    input_ids: Tensor  # [picture, tokens]
    position_ids: Tensor
    attention_mask: Tensor  # bool [picture, 1, tokens, tokens]
    targets: Tensor  # the answer's token that comes next, else IGNORED


class Packer:
    """Questions to rows of token ids, as the chat template and the tokenizer write them."""

    def __init__(self, model: LlavaForConditionalGeneration, processor: LlavaProcessor) -> None:
        self._processor = processor
        self._image_tokens = model.config.image_seq_length
        self._image = processor.image_token_id
        self._known: dict[tuple[str, str], tuple[list[int], list[int], list[int]]] = {}

    def _tokens(self, question: Question) -> tuple[list[int], list[int], list[int]]:
        """Ids up to the picture's end, from there up to the answer, and of the answer."""
        key = question.text, question.answer
        if key not in self._known:
            messages = conversation(question, "", answered=False)["messages"]
            text = self._processor.apply_chat_template(messages, add_generation_prompt=True)
            token = self._processor.image_token
            text = text.replace(token, token * self._image_tokens)
            prompt = self._processor.tokenizer.encode(text)
            seen = len(prompt) - prompt[::-1].index(self._image)
            answer = self._processor.tokenizer.encode(question.answer + "<|im_end|>")
            self._known[key] = prompt[:seen], prompt[seen:], answer
        return self._known[key]

    def answer_length(self, question: Question) -> int:
        return len(self._tokens(question)[2])

    def pack(self, rows: Sequence[Sequence[Question]]) -> Packed:
        lists: list[list[tuple[int, int, int, int]]] = []  # (id, position, block, target) a token
        for questions in rows:
            start = self._tokens(questions[0])[0]
            row = [(token, place, 0, IGNORED) for place, token in enumerate(start)]
            for block, question in enumerate(questions, 1):
                _, prompt, answer = self._tokens(question)
                targets = [IGNORED] * (len(prompt) - 1) + answer
                for place, token in enumerate(prompt + answer[:-1]):
                    row.append((token, len(start) + place, block, targets[place]))
            lists.append(row)
        longest = max(map(len, lists))
        blank = (self._processor.tokenizer.pad_token_id, 0, -1, IGNORED)
        table = torch.tensor([row + [blank] * (longest - len(row)) for row in lists])
        ids, positions, blocks, targets = table.unbind(-1)
        seen_by_all = blocks[:, None, :] == 0
        own = blocks[:, None, :] == blocks[:, :, None]
        causal = torch.ones(longest, longest, dtype=torch.bool).tril()
        return Packed(ids, positions, ((seen_by_all | own) & causal)[:, None], targets)


def answer_logits(
    model: LlavaForConditionalGeneration, packed: Packed, image_tokens: Tensor
) -> tuple[Tensor, Tensor]:
    """float32 [answer tokens, vocabulary] and the right tokens, row by row.

    image_tokens [picture, image tokens, hidden] stand where input_ids hold the image token.
    """
    embedded = model.get_input_embeddings()(packed.input_ids)
    places = packed.input_ids == model.config.image_token_id
    embedded = embedded.masked_scatter(places[..., None], image_tokens.to(embedded.dtype))
    hidden = model.model.language_model(
        inputs_embeds=embedded,
        attention_mask=packed.attention_mask,
        position_ids=packed.position_ids,
        use_cache=False,
    ).last_hidden_state
    wanted = packed.targets != IGNORED
    return model.lm_head(hidden[wanted]).float(), packed.targets[wanted]


def see(model: LlavaForConditionalGeneration, pixels: Tensor) -> Tensor:
    """The tower's and projector's image tokens, [picture, image tokens, hidden]."""
    pixels = pixels.to(model.model.multi_modal_projector.linear_1.weight.dtype)
    return torch.stack(list(model.model.get_image_features(pixels).pooler_output))


@torch.no_grad()
def evaluate(
    model: LlavaForConditionalGeneration, packer: Packer, split: Split, limit: int, seed: int
) -> tuple[Counter[str], Counter[str]]:
    """Right and all questions by kind: whether greedy decoding gives the answer and stops.

    Greedy text equals the answer exactly if every answer token, the end-of-turn token among them,
    is the most likely one after those before it; so one forward tells.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(split.questions), generator=generator)[:limit].tolist()
    grouped: dict[int, list[Question]] = defaultdict(list)
    for index in order:
        grouped[split.questions[index].picture].append(split.questions[index])
    pictures = sorted(grouped, key=lambda picture: len(grouped[picture]))
    right: Counter[str] = Counter()
    count: Counter[str] = Counter()
    for first in range(0, len(pictures), 16):
        chosen = pictures[first : first + 16]
        packed = packer.pack([grouped[picture] for picture in chosen])
        logits, targets = answer_logits(model, packed, see(model, split.pixels(chosen)))
        hits: Iterator[bool] = iter((logits.argmax(-1) == targets).tolist())
        for question in (question for picture in chosen for question in grouped[picture]):
            length = packer.answer_length(question)
            count[question.kind] += 1
            right[question.kind] += all([next(hits) for _ in range(length)])
    return right, count


def table(right: Counter[str], count: Counter[str]) -> str:
    kinds = [f"{kind} {right[kind] / count[kind]:.3f} of {count[kind]}" for kind in sorted(count)]
    return f"{right.total() / count.total():.4f} of {count.total()} ({'; '.join(kinds)})"


def rates(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warm-up over a twentieth of the steps, then half a cosine to zero."""
    warm = max(1, steps // 20)

    def factor(step: int) -> float:
        done = max(0.0, (step - warm) / max(1, steps - warm))
        return min(1.0, (step + 1) / warm) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


class Pool:
    """Questions of the pictures of one color and shape, to be asked with no wording's bias."""

    def __init__(self, questions: Sequence[Question]) -> None:
        groups: dict[tuple[bool, str, bool], list[Question]] = defaultdict(list)
        self._open: list[Question] = []
        for question in questions:
            if question.kind == "yes/no":
                groups[question.negated, question.answer, question.of_color].append(question)
            else:
                self._open.append(question)
        self._groups = list(groups.values())

    def asked(self, generator: torch.Generator) -> list[Question]:
        """Two open questions, and two of each kind of yes-or-no ones.

        "Yes" is then as often right as "no", whether the wording is negated or not and whether it
        names a color or a shape, so that nothing but the picture tells.
        """
        return [
            group[int(torch.randint(len(group), (1,), generator=generator))]
            for group in (self._open, *self._groups)
            for _ in range(2)
        ]


class Adapter(nn.Module):
    """weight + up @ down of low rank (LoRA, Hu et al. 2021, arXiv:2106.09685); starts at weight."""

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        rows, columns = weight.shape
        self.down = nn.Parameter(torch.randn(rank, columns) / math.sqrt(columns))
        self.up = nn.Parameter(torch.zeros(rows, rank))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.up @ self.down).to(weight.dtype)


def adapt(model: LlavaForConditionalGeneration, rank: int) -> None:
    """Give each query and value projection of the language model an adapter."""
    for name, module in list(model.model.language_model.named_modules()):
        if name.endswith((".q_proj", ".v_proj")):
            parametrize.register_parametrization(module, "weight", Adapter(module.weight, rank))


def merge(model: LlavaForConditionalGeneration) -> None:
    """Add the adapters to the weights; what remains are transformers' own modules."""
    for module in list(model.model.language_model.modules()):
        if parametrize.is_parametrized(module):
            parametrize.remove_parametrizations(module, "weight")


def find_image_tokens(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    train: Split,
    steps: int,
    threads: int,
    generator: torch.Generator,
) -> Tensor:
    """Stage 1, without pictures: image tokens and adapters that make the language model answer.

    Prompt tuning (Lester et al. 2021, arXiv:2104.08691) by cross-entropy of the answers: tokens =
    shared + color's + shape's.  They start from the embeddings of the color word (even tokens) and
    of the shape word (odd tokens).  Returns [color, shape, image tokens, hidden].
    """
    embedding = model.get_input_embeddings().weight

    def start(words: Sequence[str], first: int) -> Tensor:
        ids = [processor.tokenizer.encode(" " + word) for word in words]
        vectors = torch.stack([embedding[word].float().mean(0) for word in ids])
        tokens = torch.zeros(len(words), model.config.image_seq_length, embedding.shape[1])
        tokens[:, first::2] = vectors[:, None]
        return tokens.requires_grad_()

    colors, shapes = start(COLORS, 0), start(SHAPES, 1)
    shared = torch.zeros_like(colors[0]).requires_grad_()
    adapters = [module for module in model.modules() if isinstance(module, Adapter)]
    low_rank = [parameter for adapter in adapters for parameter in adapter.parameters()]
    groups = [{"params": [colors, shapes, shared], "lr": 2e-4}, {"params": low_rank, "lr": 1e-3}]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.98))
    scheduler = rates(optimizer, steps)
    packer = Packer(model, processor)
    pools = train.pools()

    def learn(tokens: Tensor, rows: list[list[Question]]) -> tuple[float, tuple[Tensor, ...]]:
        """A part's share of the loss, and its gradients by image tokens and adapters."""
        tokens = tokens.detach().requires_grad_()
        loss = functional.cross_entropy(*answer_logits(model, packer.pack(rows), tokens))
        loss = loss * (len(rows) / len(SHAPES))
        return loss.item(), torch.autograd.grad(loss, [tokens, *low_rank])

    recent: list[float] = []
    for step in range(steps):
        color = torch.randint(len(COLORS), (len(SHAPES),), generator=generator)
        shape = torch.randperm(len(SHAPES), generator=generator)
        kinds = zip(color.tolist(), shape.tolist(), strict=True)
        rows = [pools[kind].asked(generator) for kind in kinds]
        tokens = shared + colors[color] + shapes[shape]
        size = -(-len(rows) // threads)
        parts = [rows[first : first + size] for first in range(0, len(rows), size)]
        with ThreadPoolExecutor(threads) as pool:
            losses, gradients = zip(*pool.map(learn, tokens.split(size), parts), strict=True)
        by_tokens, *by_adapters = zip(*gradients, strict=True)
        optimizer.zero_grad()
        tokens.backward(torch.cat(by_tokens))
        for parameter, parts_of_it in zip(low_rank, by_adapters, strict=True):
            parameter.grad = torch.stack(parts_of_it).sum(0)
        optimizer.step()
        scheduler.step()
        recent.append(sum(losses))
        if (step + 1) % 10 == 0:
            print(f"  step {step + 1}: loss {sum(recent[-10:]) / 10:.3f}", flush=True)
    return (shared + colors[:, None] + shapes[None]).detach()


def turned(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """The batch in one of a picture's eight orientations."""
    turn = int(torch.randint(8, (1,), generator=generator))
    return torch.rot90(pixels.flip(-1) if turn >= 4 else pixels, turn % 4, (-2, -1))


def teach_tower(
    model: LlavaForConditionalGeneration,
    train: Split,
    test: Split,
    steps: int,
    generator: torch.Generator,
) -> None:
    """Stage 2, without the language model: the tower tells colors and shapes apart.

    A head, thrown away afterwards, classifies the mean of the patches the projector will be given.
    """
    tower, layer = model.model.vision_tower, model.config.vision_feature_layer
    head = torch.nn.Linear(tower.config.hidden_size, len(COLORS) + len(SHAPES))
    parameters = [*tower.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.01)
    scheduler = rates(optimizer, steps)

    def classified(pixels: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            states = tower(pixels, output_hidden_states=True).hidden_states[layer]
        scores = head(states[:, 1:].float().mean(1))
        return scores[:, : len(COLORS)], scores[:, len(COLORS) :]

    pictures, labels = train.labelled()
    pixels = train.pixels(pictures)
    hits: list[Tensor] = []
    for step in range(steps):
        chosen = torch.randint(len(labels), (32,), generator=generator)
        color, shape = classified(turned(pixels[chosen], generator))
        loss = functional.cross_entropy(color, labels[chosen, 0])
        loss = loss + functional.cross_entropy(shape, labels[chosen, 1])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        scheduler.step()
        hits.append((shape.argmax(1) == labels[chosen, 1]).float().mean())
        if (step + 1) % 50 == 0:
            print(f"  step {step + 1}: shapes {torch.stack(hits[-50:]).mean():.3f}", flush=True)
    pictures, labels = test.labelled()
    with torch.no_grad():
        scores = classified(test.pixels(pictures))
    right = [(s.argmax(1) == labels[:, i]).float().mean().item() for i, s in enumerate(scores)]
    print(f"  test pictures: colors {right[0]:.3f}, shapes {right[1]:.3f}", flush=True)


def teach_projector(
    model: LlavaForConditionalGeneration,
    train: Split,
    wanted: Tensor,
    steps: int,
    generator: torch.Generator,
) -> None:
    """Stage 3, without the language model: tower and projector emit stage 1's image tokens.

    The squared distance to the picture's tokens, in units of the 24 kinds' spread.
    """
    tower, projector = model.model.vision_tower, model.model.multi_modal_projector
    parameters = [*tower.parameters(), *projector.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.01)
    scheduler = rates(optimizer, steps)
    spread = (wanted - wanted.mean((0, 1))).square().mean()
    pictures, labels = train.labelled()
    pixels = train.pixels(pictures)
    losses: list[float] = []
    for step in range(steps):
        chosen = torch.randint(len(labels), (32,), generator=generator)
        color, shape = labels[chosen].unbind(1)
        with torch.autocast("cpu", torch.bfloat16):
            seen = see(model, turned(pixels[chosen], generator))
        loss = (seen.float() - wanted[color, shape]).square().mean() / spread
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
        if (step + 1) % 50 == 0:
            print(f"  step {step + 1}: distance {sum(losses[-50:]) / 50:.3f}", flush=True)


def train(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    steps: Sequence[int],
    test_questions: int,
    threads: int,
    seed: int,
) -> str:
    """All three stages, then the model in bfloat16; returns how many test questions it answers."""
    generators = [torch.Generator().manual_seed(seed) for _ in steps]
    train, test = Split("train", processor), Split("test", processor)
    print("stage 1: image tokens and adapters", flush=True)
    torch.set_num_threads(1)  # each of the threads takes whole pictures instead
    wanted = find_image_tokens(model, processor, train, steps[0], threads, generators[0])
    torch.set_num_threads(threads)
    print("stage 2: the tower tells colors and shapes", flush=True)
    teach_tower(model, train, test, steps[1], generators[1])
    print("stage 3: tower and projector make stage 1's image tokens", flush=True)
    teach_projector(model, train, wanted, steps[2], generators[2])
    model.to(torch.bfloat16)
    packer = Packer(model, processor)
    return table(*evaluate(model, packer, test, test_questions, seed))
