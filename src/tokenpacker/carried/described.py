"""Foundation, part two: the language model learns to answer from described tiles, before it has seen any image.

A described tile has a bag of attributes (the encoder's labels) in place of each packed token, in the same grid with the
same separators. So questions, looking things up among hundreds of tokens, joining the halves of a number across a tile
border, and counting are learned here, and not through the projector later.

Shapes: N tiles, K label heads, (h, w) patch grid, s scale factor, T = (h/s)*(w/s), A attributes, D language width.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from tokenpacker.carried.vocabulary import IMAGE_TOKEN
from tokenpacker.scenes.dense_labels import ATTRIBUTE_HEADS, HEADS, NUM_CLASSES
from tokenpacker.sequence import IGNORED, scatter_image_tokens


class DescribedTiles(nn.Module):
    """Makes packed tokens from the labels of patches, in place of encoder and projector.

    An attribute starts as the embedding of its own word, plus a random part that tells, say, a red frame from red ink.
    Questions and descriptions then have the same words from the first step, and looking up is learned sooner.
    """

    def __init__(self, word_embeddings: Tensor, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__()
        self.attributes = nn.Linear(sum(NUM_CLASSES[head] for head in ATTRIBUTE_HEADS), word_embeddings.shape[1])
        names = [name for head in ATTRIBUTE_HEADS for name in ("", *HEADS[head])]
        with torch.no_grad():
            nn.init.normal_(self.attributes.weight, std=float(word_embeddings.std()))
            for index, name in enumerate(names):
                if name:
                    tokens = tokenizer(f" {name}", add_special_tokens=False).input_ids
                    self.attributes.weight[:, index] += word_embeddings[tokens].mean(dim=0)

    def forward(self, patch_labels: Tensor, scale_factor: int) -> Tensor:
        """(N, T, D) from (N, K, h, w): for each window, the sum of the embeddings of all attributes in it."""
        shares = []
        for index, head in enumerate(ATTRIBUTE_HEADS):
            present = F.one_hot(patch_labels[:, index].clamp(min=0), NUM_CLASSES[head]).float()  # (N, h, w, classes)
            present[..., 0] = 0  # "none of these" is no attribute
            shares.append(present)
        patches = torch.cat(shares, dim=-1).permute(0, 3, 1, 2)  # (N, A, h, w)
        windows = F.max_pool2d(patches, scale_factor)  # (N, A, h/s, w/s)
        return self.attributes(windows.flatten(2).transpose(1, 2))


class DescribedLanguageModel(nn.Module):
    """A language model that reads described tiles in place of images."""

    def __init__(self, language_model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__()
        self.language_model = language_model
        embeddings = language_model.get_input_embeddings().weight
        with torch.no_grad():
            nn.init.normal_(embeddings, std=embeddings.shape[1] ** -0.5)
            language_model.lm_head.weight.copy_(embeddings)  # a word of the input can be repeated at once
        self.described_tiles = DescribedTiles(embeddings, tokenizer)
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor,
        patch_labels: Tensor,
        scale_factor: int,
    ) -> dict[str, Tensor]:
        """The mean cross-entropy of the labelled tokens, each predicted from the position before it."""
        embeddings = self.language_model.get_input_embeddings()(input_ids)
        packed = self.described_tiles(patch_labels, scale_factor)
        hidden_states = self.language_model.model(
            inputs_embeds=scatter_image_tokens(embeddings, input_ids, packed, self.image_token_id),
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=False,
        ).last_hidden_state
        targets = labels[:, 1:]
        labelled = targets != IGNORED
        logits = self.language_model.lm_head(hidden_states[:, :-1][labelled])  # only where something is learned
        return {"loss": F.cross_entropy(logits, targets[labelled])}
